"""What stands beside a token in the grid: first drafts of images, where large areas repeat."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from varkit.interfaces import Generator

SIDES = ("left", "above")


@dataclass(frozen=True)
class Neighbours:
    """turn: (T,) int64, by turn: the turn of the token on that side; -1 where there is none, or it is a later one."""

    turn: Tensor

    @classmethod
    def of(cls, model: Generator, order: Tensor, side: str) -> Neighbours:
        """Args: order: (T,) positions by turn. The left neighbour in a sequence without rows is the token before.

        Raises: ValueError on an unknown side, or where the tokens have no such side.
        """
        if side not in SIDES:
            raise ValueError(f"a neighbour is {' or '.join(SIDES)}; got {side!r}")
        grid = model.layout.grids[-1]
        if len(model.layout.grids) > 1 or (side == "above" and len(grid) != 2):
            raise ValueError(
                f"tokens of grids {model.layout.grids} have no neighbours above; draft from the left, or at random"
            )
        return cls.of_grid(grid, order, side)

    @classmethod
    def of_grid(cls, grid: Sequence[int], order: Tensor, side: str, line_end: int = 0, before: int = 0) -> Neighbours:
        """Args:
        grid: (h, w) or (n,) of the image.   order: (T,) positions of the whole sequence by turn.
        line_end: tokens that end each row of the sequence and are no part of the image (Lumina-mGPT, Emu3): the last
            token of a row is to their left, and they are to nobody's.
        before: tokens before the image, which have no neighbours and are nobody's.
        """
        width, place = grid[-1] + line_end, order - before
        there = place % width > 0 if side == "left" else place >= width
        place = order - (1 if side == "left" else width)
        turns = torch.full((int(order.max()) + 1,), len(order), device=order.device)
        turns[order] = torch.arange(len(order), device=order.device)
        found = turns[place.clamp_min(0)]
        there = there & (order >= before) & (found < torch.arange(len(order), device=order.device))
        return cls(torch.where(there, found, -1))
