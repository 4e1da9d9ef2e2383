"""What a verifier does, worked out in full: for proofs at small sizes, of your own verifier too."""

from __future__ import annotations

import itertools

import torch
from torch import Tensor

from varkit.samplers.speculative.interfaces import Proposal, Siblings, Verifier
from varkit.samplers.speculative.proposals import proposed

HALVINGS = 54


def acceptance_probabilities(
    verifier: Verifier, p: Tensor, siblings: Siblings, hidden: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Asks the verifier itself: the uniform that separates acceptance from rejection is found by halving.

    Args: p: (B, V), siblings (B, K), float64 for full precision.
    Returns: (B, K), of each sibling given that those before it were rejected; (B, V), the law where all are.
    """
    shape = siblings.tokens.shape
    chance = torch.zeros(shape, dtype=torch.float64, device=p.device)
    for k in range(shape[1]):
        low, high = torch.zeros_like(chance[:, k]), torch.ones_like(chance[:, k])
        for _ in range(HALVINGS):
            uniform = torch.ones_like(chance)
            uniform[:, k] = (low + high) / 2
            passes = verifier.step(p, siblings, uniform, hidden).accepted == k
            low, high = torch.where(passes, uniform[:, k], low), torch.where(passes, high, uniform[:, k])
        certain = verifier.step(p, siblings, torch.ones_like(chance), hidden).accepted == k
        chance[:, k] = torch.where(certain, 1, low)
    return chance, verifier.step(p, siblings, torch.ones_like(chance), hidden).residual


def emitted_law(
    verifier: Verifier,
    p: Tensor,
    q: Tensor,
    count: int,
    proposal: Proposal = "iid",
    chosen: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The law of the token that one node emits, summed over everything that could be drafted.

    Args:
        p, q: (B, V), what the target and the drafter draw from.   count: K, siblings; V^K tuples are tried.
        chosen: (B, K), tokens that are points, or -1 for a draw; None for draws alone.
    Returns: (B, V) float64, and the probability (B,) that a draft is accepted.
    """
    batch, size = p.shape
    tuples = torch.tensor(list(itertools.product(range(size), repeat=count)), device=p.device)  # T K
    rows = len(tuples)
    p_all, q_all = p.repeat_interleave(rows, 0), q.repeat_interleave(rows, 0)
    tokens = tuples.repeat(batch, 1)
    point = torch.zeros_like(tokens, dtype=torch.bool)
    if chosen is not None:
        point = (chosen >= 0).repeat_interleave(rows, 0)
    laws = q_all[:, None].expand(-1, count, -1)
    everything = torch.ones_like(point)
    weight = torch.ones(len(tokens), dtype=torch.float64, device=p.device)
    valid = everything.clone()
    for draft in proposed(Siblings(tokens, everything, torch.zeros_like(point), laws, proposal), size):
        k = draft.k
        here = draft.law.gather(1, draft.token)[:, 0]
        spent = ~draft.law.sum(1).isfinite()  # nothing left to draw: there is no sibling
        valid[:, k] = ~spent | point[:, k]
        first = (draft.token[:, 0] == 0).double()  # one tuple stands for it
        here = torch.where(spent, first, here)
        if chosen is not None:
            fixed = chosen.repeat_interleave(rows, 0)[:, k]
            here = torch.where(point[:, k], (draft.token[:, 0] == fixed).double(), here)
        weight = weight * here
    chance, left = acceptance_probabilities(verifier, p_all, Siblings(tokens, valid, point, laws, proposal))
    reached = torch.cat([torch.ones_like(chance[:, :1]), (1 - chance).cumprod(1)], 1)  # the k-th is tested; none is
    law = left.double() * reached[:, -1:]
    law = law.scatter_add(1, tokens, chance * reached[:, :-1]) * weight[:, None]
    accepted = (1 - reached[:, -1]) * weight
    return law.view(batch, rows, size).sum(1), accepted.view(batch, rows).sum(1)


def block_efficiency(rate: Tensor, length: Tensor) -> Tensor:
    """Tokens a call of the target, in the mean: chains of `length` drafts, each accepted with probability `rate`.

    Args: rate, length: of shapes that broadcast.   Source: Leviathan et al., arXiv 2211.17192.
    """
    more = 1 - rate
    return torch.where(more > 0, (1 - rate ** (length + 1)) / more, (length + 1).to(rate.dtype))
