"""What a verifier does, worked out in full: for proofs at small sizes, of your own verifier too."""

from __future__ import annotations

import itertools

import torch
from torch import Tensor

from varkit.samplers.speculative.interfaces import Proposal, Siblings, Verifier
from varkit.samplers.speculative.proposals import proposed

HALVINGS = 40


def acceptance_probabilities(
    verifier: Verifier, p: Tensor, siblings: Siblings, hidden: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Asks the verifier itself: the uniform that separates acceptance from rejection is found by halving.

    Args: p: (B, V), siblings (B, K), float64 for full precision.
    Returns: (B, K), of each sibling given that those before it were rejected; (B, V), the law where all are.
    """
    rows, count = siblings.tokens.shape
    copies = _rows(siblings, torch.arange(rows, device=p.device).repeat(count))  # the k-th copy looks at sibling k
    laws, states = p.repeat(count, 1), None if hidden is None else hidden.repeat(count, *[1] * (hidden.dim() - 1))
    looked_at = torch.arange(count, device=p.device).repeat_interleave(rows)
    low, high = (torch.full_like(looked_at, end, dtype=torch.float64) for end in (0, 1))
    uniform = torch.ones(rows * count, count, dtype=torch.float64, device=p.device)
    certain = verifier.step(laws, copies, uniform, states).accepted == looked_at
    for _ in range(HALVINGS):
        middle = (low + high) / 2
        passes = verifier.step(laws, copies, uniform.scatter(1, looked_at[:, None], middle[:, None]), states)
        accepted = passes.accepted == looked_at
        low, high = torch.where(accepted, middle, low), torch.where(accepted, high, middle)
    left = verifier.step(p, siblings, uniform[:rows], hidden).residual
    return torch.where(certain, 1, low).view(count, rows).T, left


def _rows(siblings: Siblings, index: Tensor) -> Siblings:
    q = None if siblings.q is None else siblings.q[index]
    tokens, valid, point = (x[index] for x in (siblings.tokens, siblings.valid, siblings.point))
    return Siblings(tokens, valid, point, q, siblings.proposal)


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
    possible = weight.nonzero()[:, 0]
    row = possible // (len(weight) // len(p))
    siblings, weight = _rows(siblings, possible), weight[possible]
    chance, left = acceptance_probabilities(verifier, p[row], siblings)
    reached = torch.cat([torch.ones_like(chance[:, :1]), (1 - chance).cumprod(1)], 1)  # the k-th is tested; none is
    laws = (left.double() * reached[:, -1:]).scatter_add(1, siblings.tokens, chance * reached[:, :-1])
    law = torch.zeros_like(p, dtype=torch.float64).index_add(0, row, laws * weight[:, None])
    return law, torch.zeros_like(law[:, 0]).index_add(0, row, (1 - reached[:, -1]) * weight)


def block_efficiency(rate: Tensor, length: Tensor) -> Tensor:
    """Tokens a call of the target, in the mean: chains of `length` drafts, each accepted with probability `rate`.

    Args: rate, length: of shapes that broadcast.   Source: Leviathan et al., arXiv 2211.17192.
    """
    more = 1 - rate
    return torch.where(more > 0, (1 - rate ** (length + 1)) / more, (length + 1).to(rate.dtype))
