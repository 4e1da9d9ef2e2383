"""How sure a score is: bootstrap intervals from what each image contributes.

A smooth score changes, to first order, by the mean of one number per image (its influence function; Efron and
Tibshirani, An Introduction to the Bootstrap, chapter 21). So images are drawn with replacement and the contributions
averaged, instead of computing every score anew: a thousand resamples of 50,000 images take less than a second, and a
Frechet distance does not read repeated images as a narrower distribution. The reference is held fixed.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from torch import Tensor


class Interval(NamedTuple):
    """Both ends; the value lies between them."""

    low: float
    high: float


def bootstrap_interval(
    value: float, contributions: Tensor, *, level: float = 0.95, resamples: int = 1000, seed: int = 0,
    count: int | None = None
) -> Interval:  # fmt: skip
    """Percentiles of value + mean(resampled contributions) - mean(contributions).

    Args:
        value: the score of all images.   contributions: (N,); only their differences matter.
        level: share of the resamples between the ends.   resamples: how many.
        count: images of a resample, where the contributions are of some of the images only; None: N.
    Raises: ValueError for no contributions, values that are not finite, or a level outside (0, 1).
    """
    if not 0 < level < 1 or resamples < 1:
        raise ValueError(f"level must be in (0, 1) and resamples at least 1; got {level}, {resamples}")
    c = contributions.detach().double().cpu().numpy()
    if c.ndim != 1 or not len(c) or not np.isfinite(c).all():
        raise ValueError(f"contributions must be finite numbers, one an image; got shape {c.shape}")
    c = c - c.mean()
    stream = np.random.default_rng(seed)
    size = len(c) if count is None else count
    means = np.array([c[stream.integers(0, len(c), size)].mean() for _ in range(resamples)])
    low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2])
    return Interval(value + min(float(low), 0.0), value + max(float(high), 0.0))


def standard_error(contributions: Tensor) -> float:
    """Of a score, from its contributions (N,)."""
    return float(contributions.double().std() / len(contributions) ** 0.5)
