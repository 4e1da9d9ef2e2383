"""LANTERN and LANTERN++: a draft counts with the probability of its neighbours in the codebook. Lossy.

Sources: Jang et al., arXiv 2410.03355; Park et al., 2502.06352; jadohu/LANTERN: models/ea_model_*.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from varkit.samplers.speculative.interfaces import Siblings, Verdict
from varkit.samplers.speculative.proposals import Proposed, proposed, wide
from varkit.samplers.speculative.verifiers.codes import OverCodes
from varkit.samplers.speculative.verifiers.exact import Recursive, acceptance, refuse_others, residual

RELEASED_BOUND = 0.1


class Lantern(OverCodes, Recursive):
    """Tests x against p', in which the mass of x's nearest neighbours is x's: of the longest run of them, nearest
    first and at most `k`, that has no more than `tv_bound`, or than (`ratio_bound` - 1) p(x). A rejection leaves
    relu(p' - q), normalised, as in the paper. The bound is of p', not of what is emitted: see `Bounded` for that.

    Args:
        k: at most that many neighbours.
        tv_bound: the paper's delta, in [0, 1].   ratio_bound: LANTERN++'s lambda, at least 1. One of them; without
            any, tv_bound 0.1.
        syntax: tokens accepted always, such as Lumina-mGPT's end of a line. With any, tokens that are neither of the
            codebook nor these are rejected.
        greedy: accept where x is the best of p', else emit the best of p: for laws that are not filtered.
        official_quirks: the released code, which after a rejection takes k + 1 neighbours away however few counted,
            counts neighbours without mass, accepts at equality, and goes on with all tokens alike when nothing is left.
        left: of these quirks, for siblings that were drawn: "drafts" takes the neighbours from q, so that they keep
            their mass (LlamaGen, Anole); "target" from p (Lumina-mGPT). Chosen ones always: from p.
    """

    lossless = False

    def __init__(
        self,
        *,
        k: int = 1000,
        tv_bound: float | None = None,
        ratio_bound: float | None = None,
        syntax: Sequence[int] = (),
        greedy: bool = False,
        official_quirks: bool = False,
        left: Literal["drafts", "target"] = "drafts",
    ) -> None:
        if tv_bound is not None and ratio_bound is not None:
            raise ValueError(f"give tv_bound or ratio_bound, not both; got {tv_bound} and {ratio_bound}")
        if tv_bound is None and ratio_bound is None:
            tv_bound = RELEASED_BOUND
        if tv_bound is not None and not 0 <= tv_bound <= 1:
            raise ValueError(f"tv_bound must be in [0, 1]; got {tv_bound}. LANTERN++'s lambda is ratio_bound.")
        if ratio_bound is not None and not ratio_bound >= 1:
            raise ValueError(f"ratio_bound must be at least 1, where nothing is added; got {ratio_bound}")
        if k < 0:
            raise ValueError(f"k must be a number of neighbours >= 0; got {k}")
        if left not in ("drafts", "target"):
            raise ValueError(f"left must be 'drafts' or 'target'; got {left!r}")
        self.k, self.tv_bound, self.ratio_bound = k, tv_bound, ratio_bound
        self.syntax, self.greedy, self.official_quirks, self.left = tuple(syntax), greedy, official_quirks, left
        self._extra = int(official_quirks)

    def aggregate(self, p: Tensor, token: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """p' of one token of each row.

        Args: p: (B, V).   token: (B, 1).
        Returns: p' (B, V); size (B,), neighbours that counted; near (B, k + 1 or fewer), tokens, nearest first.
        """
        if not self.k:
            return p, torch.zeros_like(token[:, 0]), token[:, :0]
        table = self.table(p)
        code = token[:, 0] - self._first
        near = table[code.clamp(0, len(table) - 1)] + self._first
        inside = ((code >= 0) & (code < len(table)))[:, None]
        mass = p.gather(1, near[:, : self.k])
        if self.tv_bound is not None:
            counts = inside & (mass.cumsum(1) <= self.tv_bound)
        else:
            assert self.ratio_bound is not None
            counts = inside & (mass.cumsum(1) <= (self.ratio_bound - 1) * p.gather(1, token))
        if not self.official_quirks:
            counts = counts & (mass > 0)
        moved = mass * counts
        gone = p.scatter(1, near[:, : self.k], torch.where(counts, 0, mass))
        return gone.scatter_add(1, token, moved.sum(1, keepdim=True)), counts.sum(1), near

    def step(self, p: Tensor, siblings: Siblings, uniform: Tensor, hidden: Tensor | None = None) -> Verdict:
        if not self.greedy:
            return super().step(p, siblings, uniform, hidden)
        refuse_others(self, siblings)
        target, best = wide(p), p.argmax(-1, keepdim=True)
        accepted = torch.full((len(p),), -1, device=p.device)
        for draft in proposed(siblings, p.shape[1]):
            own = self.aggregate(target, draft.token)[0].gather(1, draft.token)
            passes = target.scatter(1, draft.token, own).argmax(-1, keepdim=True) == draft.token
            passes = draft.live & self._syntax(passes[:, 0], draft, p.shape[1])
            accepted = torch.where(passes & (accepted < 0), draft.k, accepted)
        return Verdict(accepted, F.one_hot(best[:, 0], p.shape[1]).to(p.dtype))

    def _syntax(self, passes: Tensor, draft: Proposed, vocabulary: int) -> Tensor:
        if not self.syntax:
            return passes
        token = draft.token[:, 0]
        always = torch.zeros_like(passes)
        for one in self.syntax:
            always = always | (token == one)
        size = vocabulary - self._first if self._table is None else len(self._table)
        return always | (passes & (token >= self._first) & (token < self._first + size))

    def _aim(self, whole: Tensor, target: Tensor, draft: Proposed, slack: Tensor) -> tuple[Tensor, Tensor]:
        return self.aggregate(target, draft.token)[0], slack

    def _passes(self, aimed: Tensor, draft: Proposed, uniform: Tensor, hidden: Tensor | None) -> Tensor:
        ratio = acceptance(aimed, draft.law, draft.token)
        passes = uniform <= ratio if self.official_quirks else uniform < ratio
        return self._syntax(passes, draft, aimed.shape[1])

    def _left(self, target: Tensor, aimed: Tensor, draft: Proposed) -> Tensor:
        if not self.official_quirks:
            return residual(aimed, draft.law)
        _, size, near = self.aggregate(target, draft.token)
        wipe = (size > 0)[:, None].expand(near.shape)

        def wiped(law: Tensor) -> Tensor:
            return law.scatter(1, near, torch.where(wipe, 0, law.gather(1, near)))

        left = (wiped(target) - draft.law).relu()
        if self.left == "drafts":
            left = torch.where(draft.point[:, None], left, (target - wiped(draft.law)).relu())
        mass = left.sum(-1, keepdim=True)
        return torch.where(mass > 0, left / mass, 1 / left.shape[1])
