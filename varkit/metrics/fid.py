"""The Frechet distance between two sets of features (Heusel et al., arXiv 1706.08500, equation 6).

With covariances S1 = A^T A and S2 = B^T B the trace of (S1 S2)^1/2 is the sum of the singular values of A B^T. So
no square root of a non-symmetric matrix is taken: nothing complex appears, and singular covariances are no
special case. The arithmetic is float64 throughout.

Under which name a distance may be printed depends on the network; this file knows only features.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from scipy.linalg import blas
from torch import Tensor

from varkit.metrics.features import check_features, rounded

BLOCK = 4096
"""Rows that are widened to float64 at a time."""

FULL_RANK = 1e-10
"""Smallest square of a Cholesky pivot, relative to the largest variance, at which eigenvalues keep their digits."""


@dataclass(frozen=True)
class Gaussian:
    """A normal distribution as the distance wants it. Keep the one of a fixed reference: it is factored once.

    mean: (D,) float64.   root: (R, D) float64 with root.T @ root the covariance.
    full_rank: the root is square, upper triangular and safely invertible.
    """

    mean: Tensor
    root: Tensor
    full_rank: bool

    @classmethod
    def from_moments(cls, mean: Tensor, covariance: Tensor) -> Gaussian:
        """From (D,) and (D, D) of any floating dtype, as files of statistics hold them.

        Raises: ValueError for other shapes, values that are not finite, and what is no covariance: not symmetric, or
            with clearly negative eigenvalues.
        """
        mean, covariance = mean.detach().cpu().double(), covariance.detach().cpu().double()
        if mean.ndim != 1 or covariance.shape != (len(mean), len(mean)):
            raise ValueError(f"a mean (D,) and a covariance (D, D); got {tuple(mean.shape)}, {tuple(covariance.shape)}")
        check_features(mean[None], "mean")
        check_features(covariance, "covariance")
        largest = covariance.diagonal().amax()
        if float((covariance - covariance.T).abs().amax()) > 1e-3 * float(largest):
            raise ValueError("the covariance is not symmetric")
        lower, failed = torch.linalg.cholesky_ex(covariance)
        if not failed and lower.diagonal().square().amin() > FULL_RANK * largest:
            return cls(mean, lower.T, True)
        values, vectors = torch.linalg.eigh(covariance)
        if values[0] < -1e-3 * values[-1].abs():
            raise ValueError(f"the covariance has negative eigenvalues, down to {float(values[0]):.3g}")
        keep = values > len(mean) * torch.finfo(torch.float64).eps * values[-1]
        return cls(mean, (vectors[:, keep] * values[keep].sqrt()).T, False)


class FeatureStatistics:
    """Mean and covariance of features that arrive in batches, in float64; two of them can be merged.

    Up to `dim` samples are kept as they are: that is no more memory than the covariance, and a covariance of lower
    rank is exact that way. Beyond, only the mean and the centred second moment are held, pooled by the update of
    Chan, Golub and LeVeque (1983), which loses no digits to a large common offset.

    Args:
        dim: width of the features.
        ddof: 1 divides the covariance by N - 1, 0 by N.
        mean_dtype, dtype: to which the mean and the covariance are rounded at the end. Several tools take the mean in
            float32, which shifts a distance in about the seventh digit.
    """

    def __init__(
        self,
        dim: int,
        *,
        ddof: Literal[0, 1] = 1,
        mean_dtype: torch.dtype = torch.float64,
        dtype: torch.dtype = torch.float64,
    ) -> None:
        if ddof not in (0, 1):
            raise ValueError(f"ddof must be 1 (divide by N - 1) or 0 (by N); got {ddof!r}")
        self.dim, self.ddof, self.mean_dtype, self.dtype = dim, ddof, mean_dtype, dtype
        self.count = 0
        self._kept: list[Tensor] = []  # every sample, or ...
        self._mean = torch.zeros(dim, dtype=torch.float64)
        self._scatter: Tensor | None = None  # ... the sum of (x - mean)(x - mean)^T

    def update(self, features: Tensor) -> None:
        """(N, dim), any floating dtype and device.

        Raises: ValueError for another width or values that are not finite, naming the rows as counted since the
            first update. The statistics are then what they were before.
        """
        features = check_features(features, first_row=self.count)
        if features.shape[1] != self.dim:
            raise ValueError(f"these statistics are of {self.dim} features; got {features.shape[1]}")
        for block in features.split(BLOCK):
            self._add(block.cpu().to(torch.float64, copy=True))

    def merge(self, other: FeatureStatistics) -> None:
        """Add what another one saw: afterwards this one is as if it had seen both, to rounding.

        Raises: ValueError where the widths differ.
        """
        if other.dim != self.dim:
            raise ValueError(f"statistics of {self.dim} and of {other.dim} features cannot be merged")
        if other._scatter is None:
            for rows in list(other._kept):
                self._add(rows)
            return
        scatter = self._fold()
        shift, total = other._mean - self._mean, self.count + other.count
        scatter += other._scatter + torch.outer(shift, shift) * (self.count * other.count / total)
        self._mean += shift * (other.count / total)
        self.count = total

    def mean_and_covariance(self) -> tuple[Tensor, Tensor]:
        """(dim,), (dim, dim), float64 tensors rounded to the two dtypes. Raises ValueError below two samples."""
        self._require_two()
        if self._scatter is None:
            mean, centred = self._centred()
            scatter = centred.T @ centred
        else:
            mean, scatter = self._mean, self._scatter
        return rounded(mean, self.mean_dtype), rounded(scatter / (self.count - self.ddof), self.dtype)

    def gaussian(self) -> Gaussian:
        """The normal distribution of these moments. Raises ValueError below two samples."""
        self._require_two()
        if self._scatter is None:
            mean, centred = self._centred()
            fitted = Gaussian(mean, centred / math.sqrt(self.count - self.ddof), False)
        else:
            fitted = Gaussian.from_moments(self._mean, self._scatter / (self.count - self.ddof))
        return Gaussian(rounded(fitted.mean, self.mean_dtype), rounded(fitted.root, self.dtype), fitted.full_rank)

    def _require_two(self) -> None:
        if self.count < 2:
            raise ValueError(f"a covariance needs at least 2 samples; got {self.count}")

    def _centred(self) -> tuple[Tensor, Tensor]:
        rows = torch.cat(self._kept)
        mean = rows.mean(0)
        return mean, rows - mean

    def _add(self, rows: Tensor) -> None:
        """float64 rows that nobody else writes to."""
        if self._scatter is None and self.count + len(rows) <= self.dim:
            self._kept.append(rows)
        elif len(rows):
            self._pool(self._fold(), self.count, rows)
        self.count += len(rows)

    def _fold(self) -> Tensor:
        """Give up the kept samples for their moments."""
        if self._scatter is None:
            self._scatter = torch.zeros(self.dim, self.dim, dtype=torch.float64)
            if self._kept:
                self._pool(self._scatter, 0, torch.cat(self._kept))
            self._kept = []
        return self._scatter

    def _pool(self, scatter: Tensor, before: int, rows: Tensor) -> None:
        """Add rows to the moments of `before` others; how far the two means lie apart is one more centred row."""
        mean, share = rows.mean(0), len(rows) / (before + len(rows))
        shift = mean - self._mean
        spread = torch.cat([rows - mean, shift[None] * math.sqrt(before * share)])
        scatter.addmm_(spread.T, spread)
        self._mean += shift * share


def frechet_distance(first: FeatureStatistics | Gaussian, second: FeatureStatistics | Gaussian) -> float:
    """|m1 - m2|^2 + tr(S1 + S2 - 2 (S1 S2)^1/2), in float64; never negative.

    At full rank the singular values of A B^T come from one symmetric eigenvalue problem, which is several times faster.
    Where a rank is lower it would return square roots of rounding, so there they are computed as what they are; with
    fewer samples than dimensions the matrix is that small.

    Raises: ValueError below two samples in a set, and where the widths differ.
    """
    a, b = (s if isinstance(s, Gaussian) else s.gaussian() for s in (first, second))
    if a.mean.shape != b.mean.shape:
        raise ValueError(f"features of one network are needed; got widths {len(a.mean)} and {len(b.mean)}")
    if a.full_rank and b.full_rank:
        # Both roots are triangular, which halves the first product, and the second is symmetric.
        product = blas.dtrmm(1.0, np.asfortranarray(b.root.T), np.asfortranarray(a.root), side=1, lower=1)
        square = torch.from_numpy(blas.dsyrk(1.0, product, lower=1))
        singular = torch.linalg.eigvalsh(square).clamp_min(0).sqrt()
    else:
        singular = torch.linalg.svdvals(a.root @ b.root.T)
    apart = (a.mean - b.mean).square().sum()
    return float((apart + a.root.square().sum() + b.root.square().sum() - 2 * singular.sum()).clamp_min(0))


def frechet_contributions(features: Tensor, second: FeatureStatistics | Gaussian, *, ddof: int = 1) -> Tensor:
    """What every sample adds to the Frechet distance, to first order: (N, D) -> (N,) float64 of mean about 0.

    It is the influence function of the distance at the distribution of `features`. With the root B of the second
    covariance, B S1 B^T = V diag(l) V^T and y = x - m1, it is |y|^2 + 2 (m1 - m2).y - sum_j (v_j.B y)^2 / sqrt(l_j).

    Raises: ValueError as `frechet_distance`, and where the widths differ.
    """
    features = check_features(features, least=2).cpu()
    b = second if isinstance(second, Gaussian) else second.gaussian()
    if features.shape[1] != len(b.mean):
        raise ValueError(f"features of one network are needed; got widths {features.shape[1]} and {len(b.mean)}")
    n, mean = len(features), features.mean(0, dtype=torch.float64)
    apart = 2 * (mean - b.mean)
    if n <= features.shape[1]:
        centred = features.double() - mean
        u, s, _ = torch.linalg.svd(centred @ b.root.T / math.sqrt(n - ddof), full_matrices=False)
        transported = u.square() @ s * (n - ddof)
        result = centred.square().sum(1) + centred @ apart - transported
    else:
        scatter = torch.zeros(len(b.root), len(b.root), dtype=torch.float64)
        for block in features.split(BLOCK):
            z = (block.double() - mean) @ b.root.T
            scatter.addmm_(z.T, z)
        values, vectors = torch.linalg.eigh(scatter / (n - ddof))
        keep = values > len(values) * torch.finfo(torch.float64).eps * values[-1].clamp_min(1e-300)
        turned = b.root.T @ (vectors[:, keep] * values[keep].pow(-0.25))  # D R
        parts = []
        for block in features.split(BLOCK):
            centred = block.double() - mean
            parts.append(centred.square().sum(1) + centred @ apart - (centred @ turned).square().sum(1))
        result = torch.cat(parts)
    return result - result.mean()


def spatial_features(activations: Tensor, channels: int = 7, layout: Literal["nhwc", "nchw"] = "nhwc") -> Tensor:
    """Activations (N, C, H, W) -> the features (N, H * W * channels) of a spatial distance (sFID).

    Source: openai/guided-diffusion: evaluations/evaluator.py (22e0df8): the first 7 channels of Inception's
    `mixed_6/conv`, per image in the order row, column, channel. Stored reference statistics are in that order.

    Raises: ValueError for another number of dimensions, fewer channels, or another layout.
    """
    if activations.ndim != 4 or activations.shape[1] < channels:
        raise ValueError(f"activations (N, C >= {channels}, H, W) are needed; got {tuple(activations.shape)}")
    if layout not in ("nhwc", "nchw"):
        raise ValueError(f"layout must be nhwc or nchw; got {layout!r}")
    kept = activations[:, :channels]
    return (kept.permute(0, 2, 3, 1) if layout == "nhwc" else kept).flatten(1)
