"""Exact verifiers: what is emitted follows the target's law, whatever was drafted."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from varkit.heads.categorical import pick
from varkit.samplers.speculative.interfaces import Siblings, Verdict, Verifier


class Exact(Verifier):
    """Recursive rejection: sibling k is accepted with min(1, p_k(x) / q_k(x)), and p_(k+1) = norm(relu(p_k - q_k)).

    One draft is Leviathan et al. (arXiv 2211.17192), several drawn alike SpecInfer (arXiv 2305.09781), several without
    replacement RSD (arXiv 2402.14160), where q_k is q without the siblings before k, renormalised.
    """

    lossless = True
    proposals = frozenset({"iid", "without-replacement", "point"})

    def step(self, p: Tensor, siblings: Siblings, uniform: Tensor, hidden: Tensor | None = None) -> Verdict:
        tokens, rest = siblings.tokens, siblings.q
        accepted = torch.full_like(tokens[:, 0], -1)
        for k in range(tokens.shape[1]):
            x = tokens[:, k : k + 1]
            one_hot = F.one_hot(x[:, 0], p.shape[1]).to(p)
            q = one_hot if siblings.q is None else siblings.q[:, k]
            if siblings.q is not None and rest is not None:
                if siblings.proposal == "without-replacement":
                    left = rest[:, k]
                    q = left / left.sum(1, keepdim=True).clamp_min(torch.finfo(p.dtype).tiny)
                    rest = rest.masked_fill(one_hot.bool()[:, None], 0.0)
                q = torch.where(siblings.point[:, k : k + 1], one_hot, q)
            open_ = (accepted < 0) & siblings.valid[:, k]
            taken = open_ & (uniform[:, k] * q.gather(1, x)[:, 0] < p.gather(1, x)[:, 0])
            accepted = torch.where(taken, k, accepted)
            left = (p - q).clamp_min(0)
            mass = left.sum(1, keepdim=True)
            rejected = (open_ & ~taken)[:, None] & (mass > 0)
            p = torch.where(rejected, left / mass, p)
        return Verdict(accepted, p)


class Match(Verifier):
    """Plain Jacobi decoding: a token is drawn from p as ever, and a draft that is this token is accepted.

    Exact for drafts of any kind, and greedy drafts are accepted as often as by `Exact`; under sampling fewer are.
    """

    lossless = True
    proposals = frozenset({"iid", "without-replacement", "point"})

    def step(self, p: Tensor, siblings: Siblings, uniform: Tensor, hidden: Tensor | None = None) -> Verdict:
        drawn = pick(p, uniform[:, 0])
        same = siblings.valid & (siblings.tokens == drawn[:, None])
        accepted = torch.where(same.any(1), same.int().argmax(1), -1)
        return Verdict(accepted, F.one_hot(drawn, p.shape[1]).to(p))


VERIFIERS: dict[str, type[Verifier]] = {"exact": Exact, "match": Match}
