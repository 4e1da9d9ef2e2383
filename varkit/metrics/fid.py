"""The Frechet distance between two sets of features (Heusel et al., arXiv 1706.08500, equation 6)."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor


class FeatureStatistics:
    """Mean and covariance of features, accumulated in float64; two of them can be merged."""

    def __init__(self, dim: int) -> None:
        self.count = 0
        self.total = torch.zeros(dim, dtype=torch.float64)
        self.outer = torch.zeros(dim, dim, dtype=torch.float64)

    def update(self, features: Tensor) -> None:
        """(N, dim)."""
        f = features.detach().cpu().double()
        self.count += len(f)
        self.total += f.sum(0)
        self.outer += f.T @ f

    def merge(self, other: FeatureStatistics) -> None:
        self.count += other.count
        self.total += other.total
        self.outer += other.outer

    def mean_and_covariance(self) -> tuple[Tensor, Tensor]:
        """(dim,), (dim, dim) unbiased. Raises ValueError below two samples."""
        if self.count < 2:
            raise ValueError(f"a covariance needs at least 2 samples; got {self.count}")
        mean = self.total / self.count
        covariance = (self.outer - self.count * torch.outer(mean, mean)) / (self.count - 1)
        return mean, covariance


def frechet_distance(first: FeatureStatistics, second: FeatureStatistics) -> float:
    """|m1 - m2|^2 + tr(S1 + S2 - 2 (S1 S2)^1/2), in float64.

    tr (S1 S2)^1/2 is the sum of the square roots of the eigenvalues of S1 S2, which are those of the symmetric
    S1^1/2 S2 S1^1/2: no matrix square root of a non-symmetric matrix, no imaginary parts to discard.
    """
    m1, s1 = (t.numpy() for t in first.mean_and_covariance())
    m2, s2 = (t.numpy() for t in second.mean_and_covariance())
    values, vectors = np.linalg.eigh(s1)
    root = (vectors * np.sqrt(np.clip(values, 0, None))) @ vectors.T
    cross = np.sqrt(np.clip(np.linalg.eigvalsh(root @ s2 @ root), 0, None)).sum()
    return float(np.square(m1 - m2).sum() + np.trace(s1) + np.trace(s2) - 2 * cross)
