"""Speculative Jacobi decoding (Teng et al., arXiv 2410.01699): the target's own last guesses are the drafts.

Source: tyshiwo1/Accelerating-T2I-AR-with-SJD, scheduler/jacobi_iteration_lumina_mgpt.py (b389cfb). No drafter network:
each look at a window gives a law for every position of it, and behind the first rejection a draw from that law is the
next window's draft, the law its q. What differs: rows advance at their own speed, processors are in p and q once, and a
window never leaves the image; so it is exact in any batch and with top-p.

**Coupled drafts** (`coupling`) draw the draft of a position by the same number u_i in every round, where the release
takes a fresh one. The law stays exact. Let F_i be the numbers of all positions before i, for drafting, accepting and
drawing alike. Which tokens are decided before i, in which round position i is first tested, and each q_i until then,
are functions of F_i: a law at a position depends on tokens before it, and whether those were accepted depends on their
own numbers. So given F_i the draft x_i = (inverse of q_i)(u_i) follows q_i, with u_i and the number a_i of its test
independent and fresh; and it is tested once, as either way the position is decided. The step of one draft applies:
min(p, q) + (1 - sum min(p, q)) norm(relu(p - q)) = p. What coupling gains: when the tokens before i are guessed again,
x_i is guessed again too, so a window settles (Jacobi iterations converge) and then q_i = p_i, which accepts always.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from varkit.config import nearest
from varkit.rng import Draw, Rng
from varkit.samplers.speculative.drafters.neighbours import Neighbours
from varkit.samplers.speculative.drafters.starts import SIDES, STARTS, FirstDrafts, draw
from varkit.samplers.speculative.interfaces import DraftBlock, Drafter, Outcome, Progress
from varkit.samplers.speculative.target import Target


class Jacobi(Drafter):
    """Args:
    window: positions looked at in a pass: the newest token and window - 1 drafts.
    start: how a position gets its first draft: `random`, a token of the vocabulary; `repeat-left`, `repeat-above`,
        the neighbour's token; `resample`, a draw from the law of the token before. At a border it is random. See
        `FirstDrafts`.
    coupling: draw a position by the same number in each round; see above.
    interval: how many tokens are decided, besides the first, when drafting begins and when it ends; None is always.
    official_quirks: as released, `interval` is compared with what was decided one round before, and new positions copy
        the newest known token where their neighbour is new too; of `resample`, the likeliest.
    """

    proposals = frozenset({"iid", "point"})
    factorised = True

    def __init__(
        self,
        window: int = 16,
        start: str = "random",
        coupling: bool = True,
        interval: Sequence[int] | None = None,
        official_quirks: bool = False,
    ) -> None:
        if window < 2:
            raise ValueError(f"window must be at least 2, the newest token and one draft; got {window}")
        if start not in STARTS:
            raise ValueError(f"start must be one of {', '.join(STARTS)}; got {start!r}{nearest(start, STARTS)}")
        self.window, self.start, self.coupling = window, start, coupling
        self.interval = None if interval is None else (int(interval[0]), int(interval[1]))
        self.official_quirks = official_quirks
        self.nodes = window - 1

    def check(self, target: Target) -> None:
        self._neighbours(target)

    def _neighbours(self, target: Target) -> Tensor | None:
        return Neighbours.of(target.model, target.order, SIDES[self.start]).turn if self.start in SIDES else None

    def begin(self, target: Target, rng: Rng) -> None:
        self.order, self.factors, self.vocabulary = target.order, target.factors, target.vocabulary
        batch, device = len(target.turns), target.order.device
        self.rng, self.round = rng, 0
        count = self.factors[0] if self.factors else None
        self.numbers = rng.uniform(self.order, Draw.DRAFT, count=count)  # B T, B T G
        fill = rng.uniform(self.order, Draw.FILL, count=count)
        random = (fill * self.vocabulary).long().clamp(max=self.vocabulary - 1)
        self.first = FirstDrafts(self.start, self._neighbours(target), random, self.numbers, self.official_quirks)
        self.tokens = torch.zeros(batch, self.nodes, *self.factors, dtype=torch.int64, device=device)
        self.q = torch.zeros(batch, self.nodes, *self.factors, self.vocabulary, device=device)
        self.kept = torch.zeros(batch, dtype=torch.int64, device=device)
        self.last = self.q[:, 0]  # the law of the newest token
        self.turns = self.before = target.turns

    def _window(self, progress: Progress) -> Tensor:
        """(B,) how many drafts each row has."""
        drafts = torch.full_like(progress.turns, self.nodes)
        if self.interval is not None:
            first, end = self.interval
            held = (self.before if self.official_quirks else progress.turns) - 1
            drafts = torch.minimum(drafts, end - 1 - held).clamp_min(0)
            drafts = drafts.masked_fill((held < first) | (held >= end), 0)
        self.before = self.turns = progress.turns
        return torch.minimum(drafts, progress.room)

    def propose(self, progress: Progress) -> DraftBlock:
        drafts = self._window(progress)
        kept = torch.minimum(self.kept, drafts)
        tokens, point, q = self.first.fill(progress.tokens, progress.turns, self.tokens, self.q, kept, self.last)
        every = torch.arange(self.nodes, device=kept.device).expand(len(kept), -1)
        return DraftBlock(tokens, every, every < drafts[:, None], point, q)

    def observe(self, outcome: Outcome) -> None:
        """Draw what is behind the decided tokens from the laws that were seen there."""
        block, laws, count = outcome.block, outcome.laws, outcome.count
        rows = torch.arange(len(count), device=count.device)[:, None]
        self.round += 1
        nodes = count[:, None] + torch.arange(self.nodes, device=count.device)  # B N: whose laws are the next q
        there = nodes <= block.valid.sum(1, keepdim=True)
        inside = nodes.clamp(max=laws.shape[1] - 1)
        place = (self.turns[:, None] + nodes).clamp(max=len(self.order) - 1)
        if self.coupling:
            numbers = self.numbers[rows, place]
        else:
            parts = self.factors[0] if self.factors else None
            numbers = self.rng.uniform(self.order[place], Draw.DRAFT, step=self.round, count=parts)
        self.q = laws[rows, inside]
        self.tokens = draw(self.q, numbers)
        self.kept = there.sum(1)
        self.last = laws[rows[:, 0], count - 1]

    def keep(self, rows: Tensor) -> None:
        self.rng = self.rng[rows]
        self.first.keep(rows)
        for name in ("numbers", "tokens", "q", "kept", "last", "before", "turns"):
            setattr(self, name, getattr(self, name)[rows])
