"""The inception score, exp of the mean KL(p(y|x) || p(y)) (Salimans et al., arXiv 1606.03498, section 4).

It is the mean over parts of the set, and how the set is cut is most of what tools differ in: more parts give a lower
score, and a set stored class by class scores far too low unless it is shuffled first.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from varkit.metrics.features import check_features


class InceptionScore(NamedTuple):
    """Over the parts: the mean, and the standard deviation with divisor N."""

    mean: float
    std: float


def parts_of(count: int, splits: int | None, split_size: int | None) -> list[slice]:
    """Part i of `splits` ends at (i + 1) * count // splits; blocks of `split_size` leave a shorter last one.

    Raises: ValueError unless exactly one is given, for numbers below 1, and for fewer samples than splits.
    """
    given = [n for n in (splits, split_size) if n is not None]
    if len(given) != 1 or given[0] < 1:
        raise ValueError(f"give splits or split_size, at least 1; got splits={splits}, split_size={split_size}")
    if splits is None:
        return [slice(first, min(first + given[0], count)) for first in range(0, count, given[0])]
    if count < splits:
        raise ValueError(f"{splits} splits need at least {splits} samples; got {count}")
    return [slice(i * count // splits, (i + 1) * count // splits) for i in range(splits)]


def divergences(logits: Tensor, eps: float = 0.0) -> Tensor:
    """(N, classes) -> KL(p(y|x) || p(y)) of every sample of a part, in the dtype of the logits."""
    log_p = logits.log_softmax(1)
    p = log_p.exp()
    q = p.mean(0)
    if eps:
        divergence = p * ((p + eps).log() - (q + eps).log())
    else:
        divergence = p * log_p - torch.special.xlogy(p, q)  # a probability of 0 adds 0
    return divergence.sum(1)


class Scored(NamedTuple):
    """A score and what every sample, in the order given, contributes to it to first order (N,)."""

    score: InceptionScore
    contributions: Tensor


def inception_score(
    logits: Tensor,
    *,
    splits: int | None = 10,
    split_size: int | None = None,
    shuffle: int | None = 2020,
    dtype: torch.dtype = torch.float64,
    eps: float = 0.0,
) -> InceptionScore:
    """The score of a set; between 1 and the number of classes.

    The ADM evaluator is `splits=None, split_size=5000, shuffle=None, dtype=torch.float32`; torch-fidelity is the
    default.

    Args:
        logits: (N, classes), before the softmax; for Inception the 1008 without their bias.
        splits, split_size: how the set is cut (`parts_of`); one of them is None.
        shuffle: seed of the permutation taken first (numpy's RandomState); None keeps the order given.
        dtype: of the softmax and the sums of a part.   eps: added inside both logarithms.
    Raises: ValueError for no samples, fewer samples than splits, and logits that are not finite (naming the rows).
    """
    return inception_score_with_contributions(
        logits, splits=splits, split_size=split_size, shuffle=shuffle, dtype=dtype, eps=eps
    ).score


def inception_score_with_contributions(
    logits: Tensor,
    *,
    splits: int | None,
    split_size: int | None,
    shuffle: int | None,
    dtype: torch.dtype,
    eps: float,
) -> Scored:
    """As `inception_score`, with the numbers that a bootstrap resamples."""
    logits = check_features(logits, "logits", least=1)
    count = len(logits)
    parts = parts_of(count, splits, split_size)
    order = torch.arange(count)
    if shuffle is not None:
        order = torch.from_numpy(np.random.RandomState(shuffle).permutation(count))
    scores, contributions = [], torch.zeros(count, dtype=torch.float64)
    for part in parts:
        rows = order[part]
        divergence = divergences(logits[rows.to(logits.device)].to(dtype), eps)
        mean = divergence.mean().clamp_min(0)
        scores.append(float(mean.exp()))
        contributions[rows] = ((divergence - mean) * mean.exp()).double().cpu() * (count / len(parts) / len(rows))
    return Scored(InceptionScore(float(np.mean(scores)), float(np.std(scores))), contributions)
