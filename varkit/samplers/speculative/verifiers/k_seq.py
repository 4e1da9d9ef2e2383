"""SpecTr's k-sequential selection. Source: Sun et al., arXiv 2310.15141 (no public code)."""

from __future__ import annotations

import torch
from torch import Tensor

from varkit.samplers.speculative.interfaces import Siblings, Verdict, Verifier
from varkit.samplers.speculative.proposals import wide
from varkit.samplers.speculative.verifiers.exact import refuse_others

HALVINGS = 40


class KSeq(Verifier):
    """The first of K independent drafts that passes min(1, p / (gamma q)) is accepted.

    With beta = sum min(q, p / gamma) that happens with probability 1 - (1 - beta)^K, at least 1 - 1/e of the most that
    any exact rule can reach. The draw behind K rejections follows p - min(q, p / gamma) (1 - (1 - beta)^K) / beta,
    normalised, which is a law where 1 - (1 - beta)^K <= gamma beta; the smallest such gamma in [1, K] accepts most.

    Args: gamma: None for that smallest one, found by bisection in each row; or a number >= 1, cheaper: K takes its
        place where it is more than K or no law would be left, and K is always right.
    """

    lossless = True
    proposals = frozenset({"iid"})

    def __init__(self, *, gamma: float | None = None) -> None:
        if gamma is not None and not gamma >= 1:
            raise ValueError(f"gamma must be at least 1, or None for the best one; got {gamma}")
        self.gamma = gamma

    def plan(self, p: Tensor, q: Tensor, count: Tensor) -> tuple[Tensor, Tensor]:
        """gamma and beta, (B,), of laws (B, V) and numbers of drafts (B,)."""
        most = count.to(p.dtype).clamp(min=1)

        def beta(gamma: Tensor) -> Tensor:
            return torch.minimum(q, p / gamma[:, None]).sum(-1).clamp(max=1)

        def wrong(gamma: Tensor) -> Tensor:
            b = beta(gamma)
            return 1 - (1 - b) ** most > gamma * b

        if self.gamma is None:
            low, high = torch.ones_like(most), most
            for _ in range(HALVINGS):
                middle = (low + high) / 2
                bad = wrong(middle)
                low, high = torch.where(bad, middle, low), torch.where(bad, high, middle)
            # Where 1 itself is right, as it is for one draft, halving only comes near it.
            gamma = torch.where(wrong(torch.ones_like(most)), high, 1)
        else:
            gamma = torch.minimum(torch.full_like(most, self.gamma), most)
            gamma = torch.where(wrong(gamma), most, gamma)
        return gamma, beta(gamma)

    def step(self, p: Tensor, siblings: Siblings, uniform: Tensor, hidden: Tensor | None = None) -> Verdict:
        refuse_others(self, siblings)
        assert siblings.q is not None
        valid, target = siblings.valid, wide(p)
        first = valid.int().argmax(1)[:, None, None].expand(-1, 1, p.shape[1])  # a sibling that has the law
        q = wide(siblings.q.gather(1, first)[:, 0])
        count = valid.sum(1)
        gamma, beta = self.plan(target, q, count)
        tokens = siblings.tokens.clamp(0, p.shape[1] - 1)
        passes = valid & (wide(uniform) < target.gather(1, tokens) / (gamma[:, None] * q.gather(1, tokens)))
        accepted = torch.where(passes.any(1), passes.int().argmax(1), -1)
        none = (1 - beta) ** count
        share = torch.where(beta > 0, (1 - none) / beta, count.to(beta.dtype))
        left = (target - torch.minimum(q, target / gamma[:, None]) * share[:, None]).relu()
        left = torch.where(valid.any(1)[:, None], left, target)
        mass = left.sum(-1, keepdim=True)
        return Verdict(accepted, torch.where(mass > 0, left / mass, target).to(p.dtype))
