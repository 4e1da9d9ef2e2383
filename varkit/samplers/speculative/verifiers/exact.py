"""Recursive rejection sampling, and what is built on its steps.

Sources: Leviathan et al., arXiv 2211.17192; Chen et al., 2302.01318; SpecInfer, 2305.09781; RSD, 2402.14160.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from varkit.heads.categorical import pick
from varkit.samplers.processors import build_processors
from varkit.samplers.speculative.interfaces import Siblings, Verdict, Verifier
from varkit.samplers.speculative.proposals import Proposed, proposed, wide

EVERY = frozenset({"iid", "without-replacement", "point"})


def acceptance(p: Tensor, law: Tensor, token: Tensor) -> Tensor:
    """min(1, p / q) of one token of each row, (B,); NaN, which no uniform is below, where both are 0."""
    return (p.gather(1, token) / law.gather(1, token)).clamp(max=1)[:, 0]


def residual(p: Tensor, law: Tensor) -> Tensor:
    """What of p the law leaves uncovered, summing to 1; p itself where rounding leaves nothing. (B, V)"""
    left = (p - law).relu()
    mass = left.sum(-1, keepdim=True)
    return torch.where(mass > 0, left / mass, p)


def refuse_others(verifier: Verifier, siblings: Siblings) -> None:
    """Raises: ValueError where the verifier cannot treat what it is given."""
    name = type(verifier).__name__
    kind = "point" if siblings.q is None else siblings.proposal
    mixed = "point" not in verifier.proposals and siblings.tokens.device.type == "cpu"  # where looking costs nothing
    if mixed and bool((siblings.point & siblings.valid).any()):
        kind = "point"
    if kind not in verifier.proposals:
        raise ValueError(
            f"{name} cannot treat siblings of kind {kind!r}; it takes {', '.join(sorted(verifier.proposals))}. "
            "Choose another drafter, or the verifier exact, which takes all kinds."
        )
    if not verifier.many and siblings.tokens.shape[1] > 1:
        raise ValueError(
            f"{name} takes one draft a node; got {siblings.tokens.shape[1]}. Draft a chain, or use the verifier exact."
        )


class Recursive(Verifier):
    """Siblings are tested in the order of drawing; each that is rejected leaves another target to the next.

    Subclasses change the target before a test (`_aim`), the test (`_passes`) or what a rejection leaves (`_left`).
    """

    proposals = EVERY

    def step(self, p: Tensor, siblings: Siblings, uniform: Tensor, hidden: Tensor | None = None) -> Verdict:
        refuse_others(self, siblings)
        whole = target = wide(p)
        accepted = torch.full((len(p),), -1, device=p.device)
        slack = self._slack(whole)
        for draft in proposed(siblings, p.shape[1]):
            if p.device.type == "cpu" and bool((accepted >= 0).all()):
                break  # looking costs nothing there, each sibling several passes over the vocabulary
            tested = draft.live & (accepted < 0)
            aimed, left_over = self._aim(whole, target, draft, slack)
            passes = tested & self._passes(aimed, draft, wide(uniform[:, draft.k]), hidden)
            accepted = torch.where(passes, draft.k, accepted)
            rejected = tested & ~passes
            target = torch.where(rejected[:, None], self._left(target, aimed, draft), target)
            slack = torch.where(rejected, left_over, slack)
        return Verdict(accepted, target.to(p.dtype))

    def _slack(self, p: Tensor) -> Tensor:
        """(B,): how far the law may still be moved."""
        return torch.zeros_like(p[:, 0])

    def _aim(self, whole: Tensor, target: Tensor, draft: Proposed, slack: Tensor) -> tuple[Tensor, Tensor]:
        """What to test against, (B, V), and the slack behind a rejection, (B,)."""
        return target, slack

    def _passes(self, aimed: Tensor, draft: Proposed, uniform: Tensor, hidden: Tensor | None) -> Tensor:
        """(B,) bool."""
        return uniform < acceptance(aimed, draft.law, draft.token)

    def _left(self, target: Tensor, aimed: Tensor, draft: Proposed) -> Tensor:
        """(B, V): the target of what comes behind a rejection."""
        return residual(aimed, draft.law)


def chosen(p: Tensor, siblings: Siblings, uniform: Tensor) -> Verdict:
    """What `Recursive` comes to where all siblings are points, for all at once: each is accepted with its share of what
    those before it leave of p, and p without them is left."""
    law, tokens, count = wide(p), siblings.tokens.clamp(0, p.shape[1] - 1), siblings.tokens.shape[1]
    alike = (tokens[:, :, None] == tokens[:, None]) & siblings.valid[:, None]  # B K K
    again = alike.tril(-1).any(2)  # tested before, so nothing is left of it
    mass = law.gather(1, tokens).masked_fill(again | ~siblings.valid, 0)
    left = law.sum(1, keepdim=True) - mass.cumsum(1) + mass
    passes = siblings.valid & (wide(uniform) < mass / left.clamp(min=torch.finfo(law.dtype).tiny))
    accepted = torch.where(passes.any(1), passes.int().argmax(1), -1)
    end = torch.where(accepted < 0, count, accepted)[:, None]
    rejected = siblings.valid & (torch.arange(count, device=p.device) < end)
    taken = torch.zeros_like(law).scatter_add(1, tokens, rejected.to(law))
    rest = law.masked_fill(taken > 0, 0)
    total = rest.sum(1, keepdim=True)
    rest = torch.where(rejected.any(1, keepdim=True) & (total > 0), rest / total, law)
    return Verdict(accepted, rest.to(p.dtype))


class Exact(Recursive):
    """Accepts x with min(1, p(x) / q(x)), else p becomes relu(p - q), normalised.

    With replacement every sibling has the same q (SpecInfer); without, the earlier siblings leave it (RSD); a chosen
    token's q is one-hot, so it is accepted with p(x) and leaves p without it. Why what is emitted follows p: given the
    siblings before it, a sibling's acceptance contributes min(p, q) and its rejection the mass 1 - sum min(p, q), which
    the rest spends on the law relu(p - q) / (1 - sum min(p, q)) by induction. The kinds may be mixed in any way: a
    sibling, chosen or drawn, may depend on those before it and on nothing that is drawn later.

    Args:
        official_quirks: as SJD's released code, pass what is left through top-k and top-p once more, which is not
            exact with top-p.   residual_top_k, residual_top_p: these filters; 0 and 1 are off.
    Source: the quirk: tyshiwo1/Accelerating-T2I-AR-with-SJD (arXiv 2410.01699).
    """

    lossless = True

    def __init__(self, *, official_quirks: bool = False, residual_top_k: int = 0, residual_top_p: float = 1.0) -> None:
        if not official_quirks and (residual_top_k or residual_top_p < 1):
            raise ValueError(
                "residual_top_k and residual_top_p would filter a second time and make the law wrong; "
                "they are there for official_quirks=True only"
            )
        self.official_quirks = official_quirks
        self.residual_top_k, self.residual_top_p = residual_top_k, residual_top_p
        self._again = build_processors(top_k=residual_top_k, top_p=residual_top_p)
        self.lossless = not self._again

    def step(self, p: Tensor, siblings: Siblings, uniform: Tensor, hidden: Tensor | None = None) -> Verdict:
        if siblings.q is None and not self._again:
            return chosen(p, siblings, uniform)
        return super().step(p, siblings, uniform, hidden)

    def _left(self, target: Tensor, aimed: Tensor, draft: Proposed) -> Tensor:
        left = residual(aimed, draft.law)
        if self._again:
            logits = left.log()
            for processor in self._again:
                logits = processor(logits)
            left = logits.softmax(-1)
        return left


class Match(Verifier):
    """Plain Jacobi decoding: a token is drawn from p as ever, and a draft that is this token is accepted.

    Exact for drafts of any kind, and greedy drafts are accepted as often as by `Exact`; under sampling fewer are.
    """

    lossless = True
    proposals = EVERY

    def step(self, p: Tensor, siblings: Siblings, uniform: Tensor, hidden: Tensor | None = None) -> Verdict:
        drawn = pick(p, uniform[:, 0])
        same = siblings.valid & (siblings.tokens == drawn[:, None])
        accepted = torch.where(same.any(1), same.int().argmax(1), -1)
        return Verdict(accepted, F.one_hot(drawn, p.shape[1]).to(p))
