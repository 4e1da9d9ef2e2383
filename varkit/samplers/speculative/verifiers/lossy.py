"""Verifiers that change the law and give no bound for it."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from varkit.samplers.speculative.interfaces import Siblings, Verdict, Verifier
from varkit.samplers.speculative.proposals import Proposed, wide
from varkit.samplers.speculative.verifiers.exact import EVERY, Recursive, acceptance, refuse_others


class Grouped(Recursive):
    """GSD: x is tested by the masses of its group in p and in q. A rejection leaves what it leaves in `Exact`.

    The group of x: of the `below` tokens under it in the order of p, itself and the `above` - 1 over it, those whose p
    differs by less than `probability_gap` and whose code is nearer than `squared_distance`. Where fewer than `below`
    are under it, x is tested alone, as in the release. One draft a node.

    Args: distance_token_limit: distances do not count where an id of the order's part is above it.
    Source: junhyukso/GSD (arXiv 2508.07747): scheduler/jacobi_iteration_lumina_mgpt.py, whose constants are literals.
    """

    lossless = False
    many = False
    _codes: Tensor | None = None

    def __init__(
        self,
        *,
        below: int = 7,
        above: int = 7,
        probability_gap: float = 0.15,
        squared_distance: float = 0.5,
        distance_token_limit: int = 10_000,
    ) -> None:
        if below < 0 or above < 1:
            raise ValueError(f"below must be >= 0 and above >= 1, x counts among these; got {below} and {above}")
        self.below, self.above, self.probability_gap = below, above, probability_gap
        self.squared_distance, self.distance_token_limit = squared_distance, distance_token_limit

    def use_codebook(self, codebook: Tensor, first: int = 0) -> Self:
        """Args: codebook: (V', C), or the embedding that the target reads, as released.   first: the token that is
        entry 0."""
        self._codes, self._first = codebook, first
        return self

    def ratio(self, p: Tensor, q: Tensor, token: Tensor) -> tuple[Tensor, Tensor]:
        """Args: p, q: (B, V).   token: (B, 1).
        Returns: (B,), at most 1, 0 where both groups are empty; (B,), how many tokens are under x in p.
        Raises: ValueError without a codebook.
        """
        if self._codes is None:
            raise ValueError("Grouped compares entries of the codebook: give it one with use_codebook(...)")
        self._codes = codes = self._codes.to(p.device)
        order = p.argsort(dim=-1, stable=True)
        rank = (order == token).int().argmax(1)
        place = rank[:, None] + torch.arange(-self.below, self.above, device=p.device)
        there = (place >= 0) & (place < p.shape[1])
        group = order.gather(1, place.clamp(0, p.shape[1] - 1))
        mass = p.gather(1, group)
        keep = there & ((mass - p.gather(1, token)).abs() < self.probability_gap)
        last = min(len(codes) - 1, self.distance_token_limit)
        vectors, own = (codes[(t - self._first).clamp(0, last)] for t in (group, token))
        far = (vectors - own).square().sum(-1) >= self.squared_distance
        beyond = (there & (group > self.distance_token_limit)).any(1, keepdim=True)
        keep = keep & (beyond | ~far)
        ratio = (mass * keep).sum(1) / (q.gather(1, group) * keep).sum(1)
        ratio = torch.where(rank < self.below, acceptance(p, q, token), ratio)
        return ratio.clamp(max=1).nan_to_num(0), rank

    def _passes(self, aimed: Tensor, draft: Proposed, uniform: Tensor, hidden: Tensor | None) -> Tensor:
        return uniform < self.ratio(aimed, draft.law, draft.token)[0]


class Greedy(Verifier):
    """Accepts the target's best token, and emits it where no sibling is: what greedy decoding emits, for any drafts.

    Not lossless, as it does not draw: of a law that is filtered to one token (`top_k=1`), it is.
    """

    lossless = False
    proposals = EVERY

    def step(self, p: Tensor, siblings: Siblings, uniform: Tensor, hidden: Tensor | None = None) -> Verdict:
        refuse_others(self, siblings)
        best = p.argmax(-1)
        return first_of(siblings.valid & (siblings.tokens == best[:, None]), p)


class Threshold(Verifier):
    """Big-Little's rollback: a draft stays unless -log p(x) is above `rollback` and it is not the target's best token,
    which then replaces it. The other half, to stop drafting where the small model is unsure, is the drafter's.

    Args: rollback: in nats. The release's 5 was chosen for text; images have flatter laws.
    Source: kssteven418/BigLittleDecoder (arXiv 2302.07863).
    """

    lossless = False
    proposals = EVERY

    def __init__(self, *, rollback: float = 5.0) -> None:
        if not rollback >= 0:
            raise ValueError(f"rollback must be >= 0 (nats; 0 keeps the target's best alone); got {rollback}")
        self.rollback = rollback

    def step(self, p: Tensor, siblings: Siblings, uniform: Tensor, hidden: Tensor | None = None) -> Verdict:
        refuse_others(self, siblings)
        tokens = siblings.tokens.clamp(0, p.shape[1] - 1)
        likely = wide(p).gather(1, tokens) >= math.exp(-self.rollback)
        return first_of(siblings.valid & (likely | (tokens == p.argmax(-1, keepdim=True))), p)


def first_of(passes: Tensor, p: Tensor) -> Verdict:
    """The first sibling that passes, (B, K) bool; where none does, the target's best token."""
    accepted = torch.where(passes.any(1), passes.int().argmax(1), -1)
    return Verdict(accepted, F.one_hot(p.argmax(-1), p.shape[1]).to(p.dtype))


class JudgeHead(nn.Module):
    """Says from the target's state, (..., C), whether a token is right: the log-odds, (...)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.linear = nn.Linear(width, 1)
        nn.init.zeros_(self.linear.weight)
        nn.init.zeros_(self.linear.bias)

    def forward(self, state: Tensor) -> Tensor:
        return self.linear(state.to(self.linear.weight.dtype))[..., 0]

    def save(self, path: str | Path) -> None:
        """Writes a safetensors file."""
        from safetensors.torch import save_file

        save_file({k: v.contiguous() for k, v in self.state_dict().items()}, path)

    @classmethod
    def load(cls, path: str | Path) -> Self:
        """Raises: ValueError where there is no such file or it holds something else."""
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        try:
            state = load_file(path)
            head = cls(state["linear.weight"].shape[1])
            head.load_state_dict(state)
        except (OSError, SafetensorError, KeyError, IndexError, RuntimeError) as error:
            raise ValueError(f"{path} holds no head of a judge, as JudgeHead.save writes it: {error}") from None
        return head.eval()


def train_judge(
    states: Tensor, right: Tensor, *, wrong_weight: float = 1.0, weight_decay: float = 1e-4, steps: int = 100
) -> JudgeHead:
    """Logistic regression on the target's states. The same states give the same head.

    Args:
        states: (N, C), of the target behind each token that is judged.   right: (N,) bool, whoever decided that.
        wrong_weight: how much more a wrong token counts than a right one.
        weight_decay: of the weights over states of spread 1.   steps: of L-BFGS, at most.
    Raises: ValueError for shapes that do not fit, or labels of one kind only.
    """
    if states.dim() != 2 or right.shape != states.shape[:1]:
        raise ValueError(f"states must be (N, C) and right (N,); got {tuple(states.shape)} and {tuple(right.shape)}")
    if not 0 < int(right.sum()) < len(right):
        raise ValueError(f"a judge needs right and wrong tokens to learn from; {int(right.sum())} of {len(right)} are")
    states, label = wide(states.detach()), wide(right)
    mean, spread = states.mean(0), states.std(0).clamp(min=1e-6)
    scaled = (states - mean) / spread
    weight = torch.where(right, 1.0, wrong_weight).to(scaled)
    line = torch.zeros(scaled.shape[1] + 1, dtype=scaled.dtype, device=scaled.device, requires_grad=True)
    solver = torch.optim.LBFGS([line], max_iter=steps, line_search_fn="strong_wolfe")

    def loss() -> Tensor:
        solver.zero_grad()
        odds = scaled @ line[:-1] + line[-1]
        value = F.binary_cross_entropy_with_logits(odds, label, weight) + weight_decay * line[:-1].square().sum() / 2
        value.backward()
        return value

    with torch.enable_grad():
        solver.step(loss)  # type: ignore[no-untyped-call]
    head = JudgeHead(states.shape[1])
    with torch.no_grad():
        head.linear.weight.copy_((line[:-1] / spread)[None])
        head.linear.bias.copy_(line[-1] - (line[:-1] / spread * mean).sum())
    return head.eval()


class Judge(Recursive):
    """Judge decoding: a draft is accepted where the exact test passes or a linear head finds it right.

    The head reads the target's state behind the token, where a wrong one shows; given one state a node, it judges the
    place, all siblings alike. Train one with `train_judge`, or give it with `use_head`.

    Args: head: a file that `JudgeHead.save` wrote.   threshold: accept where the head is surer than that, in (0, 1).
    Source: Bachmann et al., arXiv 2501.19309 (no public code).
    """

    lossless = False

    def __init__(self, *, head: str | None = None, threshold: float = 0.5) -> None:
        if not 0 < threshold < 1:
            raise ValueError(f"threshold must be a probability in (0, 1); got {threshold}")
        self.head, self.threshold = head, threshold
        self._head = None if head is None else JudgeHead.load(head)

    def use_head(self, head: JudgeHead) -> Self:
        self._head = head
        return self

    def _passes(self, aimed: Tensor, draft: Proposed, uniform: Tensor, hidden: Tensor | None) -> Tensor:
        odds = self.odds(hidden)
        odds = odds[:, draft.k] if odds.dim() == 2 else odds
        right = odds > math.log(self.threshold / (1 - self.threshold))
        return right | super()._passes(aimed, draft, uniform, hidden)

    def odds(self, hidden: Tensor | None) -> Tensor:
        """Log-odds (B, K) of states (B, K, C), one a sibling, or (B,) of states (B, C).

        Raises: ValueError without a head or without states.
        """
        if self._head is None:
            raise ValueError("Judge has no head: give the file of one, head=..., or use_head(train_judge(...))")
        if hidden is None:
            raise ValueError("Judge reads the target's hidden state, and this model gives none: use the verifier exact")
        self._head = self._head.to(hidden.device)
        with torch.no_grad():
            return self._head(hidden)
