"""How drafts were drawn: the law of each sibling, and draws without replacement.

Shapes: B rows, K siblings of a node in the order of drawing, V codebook size.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from varkit.heads.categorical import pick
from varkit.samplers.speculative.interfaces import Siblings


def wide(x: Tensor) -> Tensor:
    """float64 where the device has it: a residual is a small difference of laws."""
    return x.to(torch.float32 if x.device.type == "mps" else torch.float64)


@dataclass(frozen=True)
class Proposed:
    """The k-th sibling of each row.

    token: (B, 1).   live: (B,) bool, there is one to test.   point: (B,) bool.
    law: (B, V) wide, what it was drawn from given the siblings before it; one-hot where `point`.
    """

    k: int
    token: Tensor
    live: Tensor
    point: Tensor
    law: Tensor


def proposed(siblings: Siblings, vocabulary: int) -> Iterator[Proposed]:
    """Siblings one by one, each with its own law.

    Without replacement, each earlier sibling leaves q, points too; a draw that was made when q had nothing left, or of
    a token that q gives nothing, was not drawn from q and is passed over. Of a sibling that is not valid, tokens and q
    may be anything.
    """
    tokens = siblings.tokens.clamp(0, vocabulary - 1)
    without = siblings.proposal == "without-replacement"
    taken = torch.zeros(len(tokens), vocabulary, dtype=torch.bool, device=tokens.device)
    for k in range(tokens.shape[1]):
        token, live, point = tokens[:, k : k + 1], siblings.valid[:, k], siblings.point[:, k]
        here = torch.zeros_like(taken).scatter(1, token, True)
        law = wide(here)
        if siblings.q is not None:
            drawn = wide(siblings.q[:, k])
            if without:
                drawn = drawn.masked_fill(taken, 0)
                drawn = drawn / drawn.sum(-1, keepdim=True)  # NaN where nothing is left
                live = live & (point | (drawn.gather(1, token)[:, 0] > 0))
            law = torch.where(point[:, None], law, drawn)
        yield Proposed(k, token, live, point, law)
        taken = taken | (here & siblings.valid[:, k : k + 1])


def draw_without_replacement(q: Tensor, uniform: Tensor) -> tuple[Tensor, Tensor]:
    """One after the other, each from what is left of q.

    Args: q: (..., V), need not sum to 1.   uniform: (..., K) in (0, 1), one a draw.
    Returns: tokens (..., K) int64; conditional (..., K) of q's dtype, the probability of each given those before it:
        0 where nothing was left. Such a draw is the lowest id not drawn yet, and must not be `valid` in a block.
    """
    left = q.clone()
    unused = torch.ones_like(q)
    tokens, conditional = [], []
    for k in range(uniform.shape[-1]):
        mass = left.sum(-1)
        token = torch.where(mass > 0, pick(left, uniform[..., k]), unused.argmax(-1))[..., None]
        tokens.append(token)
        conditional.append(torch.where(mass > 0, left.gather(-1, token)[..., 0] / mass, 0))
        left, unused = left.scatter(-1, token, 0), unused.scatter(-1, token, 0)
    return torch.cat(tokens, -1), torch.stack(conditional, -1)


def gumbel_top_k(q: Tensor, gumbel: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The same law in one go: the largest log q + noise, in that order (RSD, arXiv 2402.14160).

    Args: q, gumbel: (..., V).   Returns: as `draw_without_replacement`; draws of probability 0 come last.
    """
    order = (q.log() + gumbel).topk(count, dim=-1).indices
    chosen = q.gather(-1, order)
    before = chosen.cumsum(-1) - chosen
    left = (q.sum(-1, keepdim=True) - before).clamp(min=torch.finfo(q.dtype).tiny)
    return order, (chosen / left).clamp(max=1)
