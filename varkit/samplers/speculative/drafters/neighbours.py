"""What stands beside a token in the grid: first drafts of images, where large areas repeat."""

from __future__ import annotations

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
        width = grid[-1]
        place = order - 1 if side == "left" else order - width
        there = order % width > 0 if side == "left" else order >= width
        turns = torch.full((model.layout.length,), len(order), device=order.device)
        turns[order] = torch.arange(len(order), device=order.device)
        found = turns[place.clamp_min(0)]
        there = there & (found < torch.arange(len(order), device=order.device))
        return cls(torch.where(there, found, -1))
