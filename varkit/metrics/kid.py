"""The kernel distance: squared MMD of features under a polynomial kernel (Binkowski et al., arXiv 1801.01401).

The unbiased estimate leaves the diagonals out and may be negative: near 0, for equal sets even below it. It is not
clamped. A cube of large features loses digits in float32, so the kernel is float64 by default.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from varkit.metrics.features import check_pair

Estimator = Literal["unbiased", "biased"]


class KernelDistance(NamedTuple):
    """Over the subsets: the mean, and the standard deviation with divisor N. Often printed times 1000."""

    mean: float
    std: float


class Kernel(NamedTuple):
    """(gamma x.y + coef0) ** degree, summed over pairs."""

    degree: int
    gamma: float
    coef0: float

    def total(self, x: Tensor, y: Tensor, block: int) -> float:
        """Over all pairs of rows of x and rows of y; at most (block, block) kernel values are held."""
        return sum(
            float((self.gamma * (a @ b.T) + self.coef0).pow(self.degree).sum(dtype=torch.float64))
            for a in x.split(block)
            for b in y.split(block)
        )

    def rows(self, x: Tensor, y: Tensor, block: int = 2048) -> Tensor:
        """For each row of x, over all rows of y."""
        return torch.cat([sum((self.gamma * (a @ b.T) + self.coef0).pow(self.degree).sum(1) for b in y.split(block))
                          for a in x.split(block)])  # type: ignore[misc]  # fmt: skip

    def diagonal(self, x: Tensor) -> float:
        """Over the pairs of each row with itself."""
        squares = x.square().sum(1)
        return float((self.gamma * squares + self.coef0).pow(self.degree).sum(dtype=torch.float64))


def squared_mmd(x: Tensor, y: Tensor, kernel: Kernel, estimator: Estimator, block: int) -> float:
    """Of all rows of x (N, D) and y (M, D), in their dtype, the sums in float64."""
    within = 0.0
    for rows in (x, y):
        n = len(rows)
        if estimator == "unbiased":
            within += (kernel.total(rows, rows, block) - kernel.diagonal(rows)) / (n * (n - 1))
        else:
            within += kernel.total(rows, rows, block) / n**2
    return within - 2 * kernel.total(x, y, block) / (len(x) * len(y))


def drawn_pairs(first: int, second: int, subsets: int, size: int, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Rows of each subset, drawn without repeats, as torch-fidelity draws them: the first set, then the second."""
    stream = np.random.RandomState(seed)
    for _ in range(subsets):
        a, b = (stream.choice(n, size, replace=False) for n in (first, second))
        yield torch.from_numpy(a), torch.from_numpy(b)


def kernel_distance(
    first: Tensor,
    second: Tensor,
    *,
    subsets: int | None = 100,
    subset_size: int = 1000,
    seed: int = 2020,
    degree: int = 3,
    gamma: float | None = None,
    coef0: float = 1.0,
    estimator: Estimator = "unbiased",
    dtype: torch.dtype = torch.float64,
    block: int = 2048,
) -> KernelDistance:
    """Squared MMD between two sets of features.

    Args:
        first, second: (N, D) and (M, D).
        subsets, subset_size, seed: how many pairs of random subsets of which size; subsets=None takes both sets whole,
            which needs no randomness (the deviation is then 0).
        degree, gamma, coef0: of the kernel; gamma None is 1 / D.   dtype: of the kernel.
        block: rows and columns of kernel values held at once.
    Raises: ValueError for fewer samples than a subset has (two without subsets), features that are not finite
        (naming the rows), different widths, or an unknown estimator.
    """
    if estimator not in ("unbiased", "biased"):
        raise ValueError(f"estimator must be unbiased or biased; got {estimator!r}")
    if subsets is not None and (subsets < 1 or subset_size < 2):
        raise ValueError(f"subsets must be at least 1 and of at least 2 samples; got {subsets} of {subset_size}")
    least = 2 if subsets is None else subset_size
    first, second = check_pair(first, second, ("first features", "second features"), least=least)
    kernel = Kernel(degree, 1 / first.shape[1] if gamma is None else gamma, coef0)
    if subsets is None:
        values = [squared_mmd(first.to(dtype), second.to(dtype), kernel, estimator, block)]
    else:
        values = [
            squared_mmd(first[a].to(dtype), second[b].to(dtype), kernel, estimator, block)
            for a, b in drawn_pairs(len(first), len(second), subsets, subset_size, seed)
        ]
    return KernelDistance(float(np.mean(values)), float(np.std(values)))


def kernel_contributions(
    first: Tensor, second: Tensor, *, degree: int = 3, gamma: float | None = None, coef0: float = 1.0, most: int = 5000
) -> Tensor:
    """What a sample of the first set adds to the unbiased distance, to first order: (min(N, most),) float64.

    Twice the difference of its mean kernel to the others and to the second set; of the first `most` rows of each.
    """
    first, second = check_pair(first, second, ("first features", "second features"), least=2)
    x, y = first[:most].double(), second[:most].double()
    kernel = Kernel(degree, 1 / first.shape[1] if gamma is None else gamma, coef0)
    own = kernel.rows(x, x) - (kernel.gamma * x.square().sum(1) + coef0).pow(degree)
    return 2 * (own / (len(x) - 1) - kernel.rows(x, y) / len(y)).cpu()
