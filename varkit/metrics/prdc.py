"""Precision and recall (Kynkaanniemi et al., arXiv 1904.06991), density and coverage (Naeem et al., arXiv 2002.09797).

Around every sample of a set lies a ball that reaches to its k-th nearest other sample; the balls are the set's
manifold. Distances are |a|^2 + |b|^2 - 2 a.b block by block: matrix products, and never a matrix of all pairs.

The ADM evaluator rounds its distances to float16 where they fit, on a GPU; that is not imitated, so a published
recall may differ in the third digit.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
from torch import Tensor

from varkit.metrics.features import check_pair

Comparison = Literal["strict", "inclusive"]
Distance = Literal["euclidean", "squared_euclidean"]


class PRDC(NamedTuple):
    """All in [0, 1], but the density, which may exceed 1.

    precision: share of generated samples in some ball of the real ones.   recall: share of real samples in some ball
    of the generated ones.   density: balls of real samples around a generated one, on average, over k.
    coverage: share of real samples whose own ball holds a generated one.
    """

    precision: float
    recall: float
    density: float
    coverage: float


class Memberships(NamedTuple):
    """Of every sample; their means are precision, recall, density and coverage.

    precision, density: (M,) of generated samples.   recall, coverage: (N,) of real ones.   All float64.
    """

    precision: Tensor
    recall: Tensor
    density: Tensor
    coverage: Tensor

    def means(self) -> PRDC:
        return PRDC(*(value.mean().item() for value in self))


def distances(a: Tensor, b: Tensor, distance: Distance) -> Tensor:
    """(N, D), (M, D) -> (N, M), never negative."""
    squares = torch.addmm(a.square().sum(1, keepdim=True) + b.square().sum(1), a, b.T, alpha=-2).clamp_min_(0)
    return squares.sqrt_() if distance == "euclidean" else squares


def radii(x: Tensor, k: int, distance: Distance, block: int) -> Tensor:
    """(N, D) -> (N,): how far the k-th nearest other row lies."""
    result = []
    for i, a in enumerate(x.split(block)):
        nearest = a.new_full((len(a), k), torch.inf)
        for j, b in enumerate(x.split(block)):
            found = distances(a, b, distance)
            if i == j:
                found.fill_diagonal_(torch.inf)  # not to itself
            nearest = torch.cat([nearest, found], 1).topk(k, largest=False).values
        result.append(nearest.amax(1))
    return torch.cat(result)


def prdc(
    real: Tensor,
    fake: Tensor,
    *,
    k: int = 3,
    comparison: Comparison = "inclusive",
    distance: Distance = "squared_euclidean",
    dtype: torch.dtype = torch.float32,
    block: int = 2048,
) -> PRDC:
    """Precision, recall, density and coverage of generated features beside real ones: `memberships`, averaged."""
    options = {"k": k, "comparison": comparison, "distance": distance, "dtype": dtype, "block": block}
    return memberships(real, fake, **options).means()  # type: ignore[arg-type]


def memberships(
    real: Tensor,
    fake: Tensor,
    *,
    k: int = 3,
    comparison: Comparison = "inclusive",
    distance: Distance = "squared_euclidean",
    dtype: torch.dtype = torch.float32,
    block: int = 2048,
) -> Memberships:
    """Which sample lies in whose ball.

    The defaults are those of the ADM evaluator; the prdc package has `k=5, comparison="strict", distance="euclidean"`.
    The two comparisons differ only in ties: at radius 0 (repeated rows) a strict ball is empty.

    Args:
        real, fake: (N, D) and (M, D), on one device.   k: neighbours, the sample itself not counted.
        comparison: `strict`: inside the ball; `inclusive`: inside or on it.
        distance: rounding aside, both give the same answer.   dtype: of the distances.
        block: rows and columns of distances held at once.
    Raises: ValueError for k below 1, fewer than k + 1 samples in a set, features that are not finite (naming the
        rows), different widths, or an unknown comparison or distance.
    """
    if k < 1:
        raise ValueError(f"k must be at least 1; got {k}")
    if comparison not in ("strict", "inclusive"):
        raise ValueError(f"comparison must be strict or inclusive; got {comparison!r}")
    if distance not in ("euclidean", "squared_euclidean"):
        raise ValueError(f"distance must be euclidean or squared_euclidean; got {distance!r}")
    real, fake = check_pair(real, fake, ("real features", "generated features"), least=k + 1)
    wide = torch.promote_types(real.dtype, dtype)
    real, fake = real.to(wide), fake.to(wide)
    # An offset common to all costs digits. A sample, unlike the mean, leaves features on a grid on the grid.
    centre = real[torch.cdist(real.mean(0, keepdim=True), real).argmin()]
    real, fake = (real - centre).to(dtype), (fake - centre).to(dtype)
    real_radii, fake_radii = (radii(x, k, distance, block) for x in (real, fake))
    within = torch.lt if comparison == "strict" else torch.le

    balls = torch.zeros(len(fake), dtype=torch.int64, device=fake.device)  # of real samples, around each generated one
    recalled = torch.zeros(len(real), dtype=torch.bool, device=real.device)
    covered = torch.zeros_like(recalled)
    for i in range(0, len(real), block):
        rows = slice(i, i + block)
        for j in range(0, len(fake), block):
            columns = slice(j, j + block)
            apart = distances(real[rows], fake[columns], distance)
            in_real = within(apart, real_radii[rows, None])
            balls[columns] += in_real.sum(0)
            covered[rows] |= in_real.any(1)
            recalled[rows] |= within(apart, fake_radii[columns]).any(1)
    return Memberships((balls > 0).double(), recalled.double(), balls.double() / k, covered.double())
