"""What every metric asks of its features before it counts: two dimensions, enough rows, all of them finite."""

from __future__ import annotations

import torch
from torch import Tensor

SHOWN = 8
"""Offending rows that an error names."""


def check_features(features: Tensor, name: str = "features", *, least: int = 0, first_row: int = 0) -> Tensor:
    """The features themselves, detached.

    Args:
        features: (N, D), any floating dtype.   name: what an error calls them.
        least: samples needed.   first_row: number of the first row, where rows come in batches.
    Raises: ValueError for another shape or dtype, too few samples, or NaN or infinity; the last names the rows.
    """
    if features.ndim != 2 or not features.is_floating_point():
        raise ValueError(f"{name} must be floats (samples, dimensions); got {features.dtype} {tuple(features.shape)}")
    if len(features) < least:
        raise ValueError(f"{name}: needs at least {least} samples; got {len(features)}")
    bad = (~features.isfinite()).any(1).nonzero().flatten() + first_row
    if len(bad):
        rows = ", ".join(map(str, bad[:SHOWN].tolist())) + (", ..." if len(bad) > SHOWN else "")
        raise ValueError(f"{name}: {len(bad)} of {len(features)} rows not finite (from 0: {rows})")
    return features.detach()


def check_pair(first: Tensor, second: Tensor, names: tuple[str, str], *, least: int = 0) -> tuple[Tensor, Tensor]:
    """Two checked sets of one width. Raises: ValueError as `check_features`, or where the widths differ."""
    first, second = (check_features(f, n, least=least) for f, n in zip((first, second), names, strict=True))
    if first.shape[1] != second.shape[1]:
        raise ValueError(f"features of one network are needed; got widths {first.shape[1]} and {second.shape[1]}")
    return first, second


def rounded(values: Tensor, dtype: torch.dtype) -> Tensor:
    """float64 values that carry no more digits than `dtype` does."""
    return values.to(dtype).double()
