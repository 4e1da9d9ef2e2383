"""Relaxed acceptance whose distance from the target is bounded by what it promises."""

from __future__ import annotations

import torch
from torch import Tensor

from varkit.samplers.speculative.proposals import Proposed
from varkit.samplers.speculative.verifiers.codes import OverCodes
from varkit.samplers.speculative.verifiers.exact import Recursive


class Bounded(OverCodes, Recursive):
    """Mass moves between neighbours in the codebook before the exact test: at most `tv_bound` of it a token.

    **What goes wrong otherwise.** LANTERN moves mass onto the drafted x, from its neighbours: p'_x. Where x was drawn,
    the emitted law is sum_x q(x) [a_x (at x) + (1 - a_x) left_x] with a_x = min(1, p'_x(x) / q(x)): each x is tested
    against a law that favours it, no x against one that it pays for. With four tokens, p = (1, 1, 1, 1) / 4, q =
    (1, 1, 0, 0) / 2 and neighbours 0-2 and 1-3, p'_0 = (2, 1, 0, 1) / 4 and p'_1 = (1, 2, 1, 0) / 4 are both 1/4 away
    from p in total variation, yet both drafts are always accepted, and q, which is emitted, is 1/2 away.

    **What is done.** p' depends on p, on the law q of the next sibling and on the codebook, never on what was drawn.
    Testing x against such a p' exactly emits p', whatever x is. A chosen token is its law, so p' may depend on it.
    Mass moves to x, where q(x) > p(x) > 0, from its `k` nearest z, the nearest first, while p(z) > q(z); where several
    x ask one z for more than it has, each gets its share. So every bit moved raises sum min(p', q), the probability of
    acceptance, by itself; what left z is missing there, also in the residual; nothing comes up that p does not allow.

    **The bound.** Let d be the slack, at first `tv_bound`, and m <= d the mass moved, so TV(p', p) <= m. The test emits
    min(p', q) and, with probability R = 1 - sum min(p', q), goes on with the next sibling and the target left(p', q),
    where the slack is (d - m) / R. Suppose that the rest emits a law within that slack of its target. Then the whole
    differs from p' by at most R (d - m) / R, from p by at most m + (d - m) = d. Behind the last sibling the target
    itself is drawn, so by induction the law is within `tv_bound` of p, given any history, thus also averaged over it.
    With siblings without replacement the rest depends on the token rejected; its slack and target do not.

    **The sequence.** Couple the sampler with the target token by token: as long as they agree they disagree next with
    probability at most `tv_bound`, so after L tokens with at most 1 - (1 - tv_bound)^L, a bound of the joint laws' TV.

    `tv_bound` = 0 or `k` = 0 is `Exact`, to the bit. The cost is k scatters over the vocabulary a sibling.

    Args: tv_bound: in [0, 1].   k: neighbours that mass may come from.
    """

    lossless = False

    def __init__(self, *, tv_bound: float = 0.1, k: int = 10) -> None:
        if not 0 <= tv_bound <= 1:
            raise ValueError(f"tv_bound must be in [0, 1], 0 is exact; got {tv_bound}")
        if k < 0:
            raise ValueError(f"k must be a number of neighbours >= 0, 0 is exact; got {k}")
        self.tv_bound, self.k = tv_bound, k
        self.lossless = not (tv_bound and k)

    def _slack(self, p: Tensor) -> Tensor:
        return torch.full_like(p[:, 0], self.tv_bound)

    def _aim(self, whole: Tensor, target: Tensor, draft: Proposed, slack: Tensor) -> tuple[Tensor, Tensor]:
        if self.lossless:
            return target, slack
        aimed, moved = self.move(target, draft.law, slack, whole > 0)
        rejects = 1 - torch.minimum(aimed, draft.law).sum(-1)
        return aimed, torch.where(rejects > 0, ((slack - moved) / rejects).clamp(0, 1), 0)

    def move(self, p: Tensor, q: Tensor, slack: Tensor, allowed: Tensor) -> tuple[Tensor, Tensor]:
        """p' and how much was moved.

        Args: p, q: (B, V).   slack: (B,), the most that may be moved.   allowed: (B, V) bool, where mass may go.
        Returns: (B, V), (B,).
        """
        table = self.table(p)
        codes = slice(self._first, self._first + len(table))
        spare = (p - q).relu()[:, codes]
        want = ((q - p).relu() * allowed)[:, codes]
        change = torch.zeros_like(spare)
        left = slack
        for near in table.T[: self.k]:
            asked = torch.zeros_like(want).index_add(1, near, want)  # of each z, by all that are near it
            share = torch.where(asked > 0, (spare / asked).clamp(max=1), 0)
            got = want * share[:, near]
            total = got.sum(-1)
            got = got * torch.where(total > left, left / total, 1)[:, None]
            given = torch.zeros_like(got).index_add(1, near, got)
            want, spare = (want - got).clamp(min=0), (spare - given).clamp(min=0)
            change = change + got - given
            left = (left - got.sum(-1)).clamp(min=0)
        aimed = p.clone()
        aimed[:, codes] = (aimed[:, codes] + change).clamp(min=0)
        return aimed, slack - left
