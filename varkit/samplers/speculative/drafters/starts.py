"""First drafts of a window's new positions, for Jacobi decoding: what they start from before any law of them is known.

Shapes: B rows, N drafts of a window, T tokens by turn, V codebook, G parts of factorised codes.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from varkit.heads.categorical import pick

STARTS = ("random", "repeat-left", "repeat-above", "resample")
SIDES = {"repeat-left": "left", "resample": "left", "repeat-above": "above"}


@dataclass
class FirstDrafts:
    """`random`: a token of the vocabulary; `repeat-left`, `repeat-above`: the neighbour's token; `resample`: a draw
    from the neighbour's law. Where there is no neighbour, it is random.

    start: one of `STARTS`.   neighbours: (T,) turns, see `Neighbours`; None with `random`.
    random: (B, T) or (B, T, G) int64.   numbers: (B, T) or (B, T, G), of the draws.
    official_quirks: as released, the newest known token stands for neighbours that are new themselves, and `resample`
        takes the likeliest token.
    before: tokens of the sequence before the image; as long as no other is known, all drafts are random.
    """

    start: str
    neighbours: Tensor | None
    random: Tensor
    numbers: Tensor
    official_quirks: bool = False
    before: int = 0

    def keep(self, rows: Tensor) -> None:
        self.random, self.numbers = self.random[rows], self.numbers[rows]

    def fill(
        self, board: Tensor, turns: Tensor, tokens: Tensor, q: Tensor, kept: Tensor, law: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Tokens, which of them are points (B, N) bool, and q of all nodes: those behind the kept ones are new.

        Args:
            board: (B, T) decided tokens by turn.   turns: (B,) how many they are, which is the turn of node 0.
            tokens, q: (B, N) and (B, N, V) of the kept nodes, in their places.   kept: (B,) how many.
            law: (B, V) of the newest decided token; zeros where it is not known.
        """
        rows = torch.arange(len(kept), device=kept.device)
        every = torch.arange(tokens.shape[1], device=kept.device)
        places, total = turns[:, None] + every, board.shape[1]  # B N
        inside = places.clamp(max=total - 1)
        new = every >= kept[:, None]
        tokens = torch.where(wide(new, tokens), self.random[rows[:, None], inside], tokens)
        point = new.clone()
        if self.neighbours is None or not bool(new.any()):
            return tokens, point, q
        known = turns + kept
        side = self.neighbours[inside]
        side = side.masked_fill((known <= self.before)[:, None], -1)
        if self.official_quirks:
            side = torch.where(side < 0, side, torch.minimum(side, known[:, None] - 1))
        if self.start == "resample":
            return self._resample(turns, tokens, new, inside, side, q, law)
        board = board.clone()
        for node in range(tokens.shape[1]):  # in order, so that a draft can be copied from a draft
            copied = board[rows, side[:, node].clamp_min(0)]
            wanted = new[:, node] & (side[:, node] >= 0)
            tokens[:, node] = torch.where(wide(wanted, copied), copied, tokens[:, node])
            real = places[:, node] < total
            board[rows[real], inside[real, node]] = tokens[real, node]
        return tokens, point, q

    def _resample(
        self, turns: Tensor, tokens: Tensor, new: Tensor, inside: Tensor, side: Tensor, q: Tensor, law: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        rows = torch.arange(len(new), device=new.device)
        laws, point = torch.cat([law[:, None], q], 1), new.clone()  # of the newest token, then of the nodes
        for node in range(new.shape[1]):
            source = (side[:, node] - turns + 1).clamp_min(0)
            found = laws[rows, source]
            wanted = new[:, node] & (side[:, node] >= 0) & (found.flatten(1).sum(1) > 0)
            drawn = draw(found, self.numbers[rows, inside[:, node]])
            if self.official_quirks:
                drawn = found.argmax(-1)
            else:
                point[:, node] &= ~wanted
            tokens[:, node] = torch.where(wide(wanted, drawn), drawn, tokens[:, node])
            here = torch.where(wide(new[:, node], found), torch.zeros_like(found), laws[:, node + 1])
            laws[:, node + 1] = torch.where(wide(wanted, found), found, here)
        return tokens, point, laws[:, 1:]


def wide(rows: Tensor, x: Tensor) -> Tensor:
    """(B, ...) with as many dimensions as x."""
    return rows.view(*rows.shape, *[1] * (x.dim() - rows.dim()))


def draw(law: Tensor, uniform: Tensor) -> Tensor:
    """(..., V) and (...) -> (...) tokens."""
    return pick(law.flatten(0, -2), uniform.flatten()).view_as(uniform)
