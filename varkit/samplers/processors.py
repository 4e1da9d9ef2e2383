"""Logit processors: temperature, top-k, top-p, min-p, with the names and meaning of transformers.

Each takes logits (..., V) of any float dtype and returns new ones; a dropped entry becomes -inf.
"""

from __future__ import annotations

import math
from functools import partial

import torch
from torch import Tensor

from varkit.interfaces import Processor


def scale_temperature(logits: Tensor, value: float) -> Tensor:
    """Divide by `value` > 0: below 1 sharper, above 1 flatter."""
    return logits / value


def keep_top_k(logits: Tensor, k: int) -> Tensor:
    """Keep the `k` best entries and all that tie with the last of them; 0 keeps all."""
    if not 0 < k < logits.shape[-1]:
        return logits
    worst_kept = logits.topk(k, dim=-1).values[..., -1:]
    return logits.masked_fill(logits < worst_kept, -torch.inf)


def keep_top_p(logits: Tensor, p: float) -> Tensor:
    """Keep the smallest set of best entries whose mass is at least `p`; 1 keeps all, the best stays always.

    Source: FoundationVision/VAR: models/helpers.py (there `top_p=0` means off).
    """
    if p >= 1:
        return logits
    # Ascending, as the reference: an entry goes while the mass up to and including it is <= 1 - p.
    ordered, index = logits.sort(dim=-1)
    drop = ordered.softmax(-1).cumsum(-1) <= 1 - p
    drop[..., -1] = False
    return logits.masked_fill(drop.scatter(-1, index, drop), -torch.inf)


def keep_min_p(logits: Tensor, p: float) -> Tensor:
    """Drop entries less likely than `p` times the best one; 0 keeps all."""
    if p <= 0:
        return logits
    best = logits.amax(-1, keepdim=True)
    return logits.masked_fill(logits < best + math.log(p), -torch.inf)


def build_processors(
    *, temperature: float = 1.0, top_k: int = 0, top_p: float = 1.0, min_p: float = 0.0
) -> list[Processor]:
    """The processors that these settings switch on, in the order temperature, top-k, top-p, min-p.

    Raises: ValueError naming the setting outside its range.
    """
    if not temperature > 0:
        raise ValueError(f"temperature must be > 0 (1 is neutral; top_k=1 is greedy); got {temperature}")
    if top_k < 0:
        raise ValueError(f"top_k must be >= 0 (0 keeps all); got {top_k}")
    if not 0 < top_p <= 1:
        raise ValueError(f"top_p must be in (0, 1] (1 keeps all); got {top_p}")
    if not 0 <= min_p <= 1:
        raise ValueError(f"min_p must be in [0, 1] (0 keeps all); got {min_p}")
    chosen: list[Processor] = []
    if temperature != 1:
        chosen.append(partial(scale_temperature, value=temperature))
    if top_k:
        chosen.append(partial(keep_top_k, k=top_k))
    if top_p < 1:
        chosen.append(partial(keep_top_p, p=top_p))
    if min_p:
        chosen.append(partial(keep_min_p, p=min_p))
    return chosen
