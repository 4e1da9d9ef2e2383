"""Drafts that are copied from what stands beside them: the image's n-gram."""

from __future__ import annotations

import torch
from torch import Tensor

from varkit.rng import Rng
from varkit.samplers.speculative.drafters.neighbours import Neighbours
from varkit.samplers.speculative.interfaces import DraftBlock, Drafter, Outcome, Progress, as_point
from varkit.samplers.speculative.target import Target


class Neighbour(Drafter):
    """A chain of copies, each a point: of the token to the left (so all of a row alike), or of the row above.

    Args: count: drafts a pass.   side: `left` or `above`. Where nothing is there, the newest token is copied.
    """

    proposals = frozenset({"point"})
    factorised = True

    def __init__(self, count: int = 4, side: str = "left") -> None:
        if count < 1:
            raise ValueError(f"count must be at least 1; got {count}")
        self.nodes, self.side = count, side

    def check(self, target: Target) -> None:
        Neighbours.of(target.model, target.order, self.side)

    def begin(self, target: Target, rng: Rng) -> None:
        self.neighbours = Neighbours.of(target.model, target.order, self.side).turn

    def propose(self, progress: Progress) -> DraftBlock:
        rows, last = torch.arange(len(progress.turns), device=progress.turns.device), len(self.neighbours) - 1
        board, tokens = progress.tokens.clone(), list[Tensor]()
        for node in range(self.nodes):  # in order, so that a copy can be copied
            turn = (progress.turns + node).clamp(max=last)
            side = self.neighbours[turn]
            tokens.append(board[rows, torch.where(side < 0, progress.turns - 1, side)])
            board[rows, turn] = tokens[-1]
        return as_point(torch.stack(tokens, 1))

    def observe(self, outcome: Outcome) -> None:
        """Nothing is learnt."""

    def keep(self, rows: Tensor) -> None:
        """Nothing is remembered."""
