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


def all_drafts(
    q: Tensor, count: int, proposal: Proposal = "iid", chosen: Tensor | None = None
) -> tuple[Siblings, Tensor]:
    """Everything that could be drafted below one node, and how probable it is.

    Args:
        q: (B, V), what the drafter draws from.   count: K, siblings.
        chosen: (B, K), tokens that are points, or -1 for a draw; None for draws alone.
    Returns: siblings of B x V^K rows, those of a row of q together; (B x V^K,) float64.
    """
    batch, size = q.shape
    tuples = torch.tensor(list(itertools.product(range(size), repeat=count)), device=q.device)  # T K
    tokens = tuples.repeat(batch, 1)
    if chosen is None:
        chosen = q.new_full((batch, count), -1, dtype=torch.int64)
    chosen = chosen.repeat_interleave(len(tuples), 0)
    laws = q.repeat_interleave(len(tuples), 0)[:, None].expand(-1, count, -1)
    valid = torch.ones_like(tokens, dtype=torch.bool)
    weight = torch.ones(len(tokens), dtype=torch.float64, device=q.device)
    for draft in proposed(Siblings(tokens, valid, ~valid, laws, proposal), size):
        token, fixed = draft.token[:, 0], chosen[:, draft.k]
        chance = draft.law.gather(1, draft.token)[:, 0]
        # Where nothing is left to draw there is no sibling, and one tuple stands for that.
        spent = ~draft.law.sum(1).isfinite() & (fixed < 0)
        chance = torch.where(spent, (token == 0).to(chance), chance)
        weight = weight * torch.where(fixed < 0, chance, (token == fixed).to(chance))
        valid = valid.index_copy(1, torch.tensor([draft.k], device=q.device), ~spent[:, None])
    return Siblings(tokens, valid, chosen >= 0, laws, proposal), weight


def emitted_law(verifier: Verifier, p: Tensor, siblings: Siblings, weight: Tensor) -> tuple[Tensor, Tensor]:
    """The law of the token that one node emits.

    Args: p: (B, V), what the target draws from.   siblings, weight: of `all_drafts`.
    Returns: (B, V) float64, and the probability (B,) that a draft is accepted.
    """
    batch = len(p)
    every = p.repeat_interleave(len(weight) // batch, 0)
    chance, left = acceptance_probabilities(verifier, every, siblings)
    reached = torch.cat([torch.ones_like(chance[:, :1]), (1 - chance).cumprod(1)], 1)  # the k-th is tested; none is
    law = left.double() * reached[:, -1:]
    law = law.scatter_add(1, siblings.tokens, chance * reached[:, :-1]) * weight[:, None]
    accepted = (1 - reached[:, -1]) * weight
    return law.view(batch, -1, p.shape[1]).sum(1), accepted.view(batch, -1).sum(1)


def block_efficiency(rate: Tensor, length: Tensor) -> Tensor:
    """Tokens a call of the target, in the mean: chains of `length` drafts, each accepted with probability `rate`.

    Args: rate, length: of shapes that broadcast.   Source: Leviathan et al., arXiv 2211.17192.
    """
    more = 1 - rate
    return torch.where(more > 0, (1 - rate ** (length + 1)) / more, (length + 1).to(rate.dtype))
