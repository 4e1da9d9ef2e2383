"""In which order the tokens of a grid are predicted: one name an order, one permutation of (L,) positions each."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from varkit.config import nearest
from varkit.rng import Draw, Rng


def raster(height: int, width: int) -> Tensor:
    """Row by row, left to right."""
    return torch.arange(height * width)


def column(height: int, width: int) -> Tensor:
    """Column by column, top to bottom."""
    return raster(height, width).view(height, width).T.flatten()


def snake(height: int, width: int) -> Tensor:
    """Row by row, turning back at each end: neighbours in time are neighbours in the grid."""
    rows = raster(height, width).view(height, width).clone()
    rows[1::2] = rows[1::2].flip(1)
    return rows.flatten()


def spiral(height: int, width: int) -> Tensor:
    """From the top left corner along the border, clockwise, inwards."""
    left, parts = raster(height, width).view(height, width), []
    while left.numel():
        parts.append(left[0])
        left = left[1:].T.flip(0)  # what was the right border is the first row
    return torch.cat(parts)


def spiral_out(height: int, width: int) -> Tensor:
    """`spiral` backwards: from the middle to the border."""
    return spiral(height, width).flip(0)


def coarse_to_fine(height: int, width: int) -> Tensor:
    """Every 2^k-th row and column first, then every 2^(k-1)-th, ...: each stage refines the grid of those before."""
    top = max(height, width).bit_length()
    powers = torch.tensor([2**k for k in range(top)])
    y, x = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    level = ((y[..., None] % powers == 0) & (x[..., None] % powers == 0)).sum(-1)  # of the coarsest grid it lies on
    return (-level).flatten().argsort(stable=True)


ORDERS: dict[str, Callable[[int, int], Tensor]] = {
    "raster": raster,
    "column": column,
    "snake": snake,
    "spiral": spiral,
    "spiral-out": spiral_out,
    "coarse-to-fine": coarse_to_fine,
}
NAMES = (*ORDERS, "random")


def token_order(name: str, grid: Sequence[int], seed: int = 0) -> Tensor:
    """The positions of a grid in the order in which they are predicted.

    Args:
        name: one of `NAMES`.
        grid: (h, w), or (n,), which is one row.
        seed: of the random order, the same for every image.
    Returns: (L,) int64, a permutation of 0 .. L - 1.
    Raises: ValueError naming the nearest order, or on another kind of grid.
    """
    check_order(name)
    if len(grid) not in (1, 2):
        raise ValueError(f"an order is of a grid (h, w) or (n,); got {tuple(grid)}")
    height, width = grid if len(grid) == 2 else (1, grid[0])
    if name == "random":
        return random_orders(Rng.from_seed(seed, 1), height * width)[0]
    return ORDERS[name](height, width)


def check_order(name: str) -> None:
    """Raises ValueError naming the nearest order when `name` is none."""
    if name not in NAMES:
        raise ValueError(f"no order is called {name!r}{nearest(name, NAMES)}; choose one of {', '.join(NAMES)}")


def random_orders(rng: Rng, length: int) -> Tensor:
    """(B, L): a permutation for each image, uniform over all of them."""
    u = rng.uniform(torch.arange(length, device=rng.seeds.device), Draw.ORDER)
    return u.argsort(dim=1, stable=True)
