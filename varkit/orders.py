"""In which order the tokens of a grid are predicted: one name an order, one permutation of (L,) positions each; and
`lpd`, an order of groups of positions that are predicted at once (Zhang et al., "Locality-aware Parallel Decoding",
arXiv 2507.01957)."""

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
"""Orders of single tokens."""

GROUPED = ("lpd",)
"""Orders that depend on how many tokens a step predicts."""

_AT_20 = (1, 2, 4, 5, 7, 8, 10, 11, 12, 14, 15, 16, 17, 18, 18, 19, 19, 20, 20, 20)
_AT_32 = (1, 1, 2, 2, 3, 3, 4, 5, 5, 6, 6, 7, 7, 8, 8, 9, 9, 10, 10, 10, *[11] * 4, *[12] * 8)
_AT_48 = (*range(1, 24), 23, 24, 25, 26, 26, 27, 28, 28, 29, 29, 30, 30, 31, 31, 32, 32, 32, *[33] * 7, 34)
LPD_SIZES: dict[tuple[int, int], tuple[int, ...]] = {(256, 20): _AT_20, (256, 32): _AT_32, (1024, 48): _AT_48}
"""Tokens and steps -> tokens of each step, as released (mit-han-lab/lpd: orders/group_sizes_lookup.json, f447b83)."""


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
    if name in GROUPED:
        raise ValueError(
            f"the order {name} decides which tokens are predicted at once; it goes with generators that predict "
            f"several a step, such as MAR and masked ones. For one token a step choose one of {', '.join(NAMES)}"
        )
    if len(grid) not in (1, 2):
        raise ValueError(f"an order is of a grid (h, w) or (n,); got {tuple(grid)}")
    height, width = grid if len(grid) == 2 else (1, grid[0])
    if name == "random":
        return random_orders(Rng.from_seed(seed, 1), height * width)[0]
    return ORDERS[name](height, width)


def check_order(name: str) -> None:
    """Raises ValueError naming the nearest order when `name` is none."""
    names = (*NAMES, *GROUPED)
    if name not in names:
        raise ValueError(f"no order is called {name!r}{nearest(name, names)}; choose one of {', '.join(names)}")


def order_groups(name: str, grid: Sequence[int], sizes: Sequence[int], seed: int = 0) -> list[Tensor]:
    """The positions of a grid in groups that are predicted at once, (n,) int64 each.

    Args:
        name: one of `NAMES`, cut into groups, or of `GROUPED`.   grid, seed: as those of `token_order`.
        sizes: of the groups; `lpd` takes the released ones for as many tokens and steps where there are any.
    Raises: ValueError as `token_order`.
    """
    check_order(name)
    if name not in GROUPED:
        return list(token_order(name, grid, seed).split(list(sizes)))
    if len(grid) != 2:
        raise ValueError(
            f"the order {name} goes by neighbours in a grid (h, w); these tokens have the grid {tuple(grid)}"
        )
    length = grid[0] * grid[1]
    return locality_groups(grid, LPD_SIZES.get((length, len(sizes)), sizes), seed=seed)


def locality_groups(
    grid: Sequence[int],
    sizes: Sequence[int],
    *,
    first: int | None = None,
    proximity_threshold: float = 1.0,
    repulsion_threshold: float = 1.0,
    shuffle: bool = True,
    seed: int = 0,
) -> list[Tensor]:
    """Groups of positions near those decided before and far from one another.

    A position's proximity is the sum of 1 / distance to those of its 8 neighbours that are decided. Of a group, the
    positions of at least `proximity_threshold` come first, the largest proximity first, unless one lies no further than
    `repulsion_threshold` (rows or columns, the larger) from another of the group; then the positions farthest from the
    group so far. The last group is what is left, by proximity. Source: mit-han-lab/lpd: orders/lpd_order.py (f447b83).

    Args:
        grid: (h, w).   sizes: of the groups, h w in all.
        first: the position that the first group starts with; None is one drawn by `seed`.
        shuffle: order equal proximities at random, by `seed`; else as the raster.
    Raises: ValueError on sizes that are not those of the grid, or a first position outside of it.
    """
    height, width = grid
    length = height * width
    if sum(sizes) != length or min(sizes, default=0) < 1:
        raise ValueError(f"sizes of groups must be at least 1 and {length} in all, for the grid {height}x{width}")
    if first is not None and not 0 <= first < length:
        raise ValueError(f"first must be a position of the grid {height}x{width}, 0 to {length - 1}; got {first}")
    u = Rng.from_seed(seed, 1).uniform(torch.arange(length), Draw.ORDER, step=2)[0]
    rank = u.argsort() if shuffle else torch.arange(length)
    y, x = (torch.arange(length) // width).double(), (torch.arange(length) % width).double()
    rows, columns = (y[:, None] - y).abs(), (x[:, None] - x).abs()
    distance, apart = torch.hypot(rows, columns), torch.maximum(rows, columns)
    weight = torch.where(apart == 1, 1 / distance, 0.0)
    left = torch.ones(length, dtype=torch.bool)
    groups, proximity, every = (
        list[Tensor](),
        torch.zeros(length, dtype=torch.float64),
        torch.zeros(0, dtype=torch.int64),
    )
    for size in sizes:
        ranked = rank[proximity[rank].round(decimals=9).argsort(descending=True, stable=True)]
        ranked = ranked[left[ranked]]
        chosen = [int(u.argmin()) if first is None else first] if not groups else list[int]()
        near = proximity[ranked] >= proximity_threshold - 1e-9
        for candidate in ranked[near].tolist() if groups else ():
            if len(chosen) < size and bool((apart[candidate, chosen] > repulsion_threshold).all()):
                chosen.append(candidate)
        _fill(chosen, size, torch.cat([ranked[~near], ranked[near]]), ranked, distance, every)
        group = torch.tensor(chosen)
        proximity = proximity + weight[group].sum(0)
        left[group] = False
        every = torch.cat([every, group])
        groups.append(group)
    return groups


def _fill(chosen: list[int], size: int, pool: Tensor, ranked: Tensor, distance: Tensor, decided: Tensor) -> None:
    """Add to `chosen` until there are `size`: each time the position of the pool (m,) that is farthest from the group,
    or from the decided ones where the group is empty; all of `ranked` (m,), as they stand, where all are needed."""
    if size == len(ranked):
        chosen += [position for position in ranked.tolist() if position not in chosen]
    nearest_one = distance[:, chosen or decided].amin(1)
    while len(chosen) < size:
        open_ones = pool[~torch.isin(pool, torch.tensor(chosen))] if chosen else pool
        chosen.append(int(open_ones[nearest_one[open_ones].argmax()]))
        nearest_one = torch.minimum(nearest_one, distance[:, chosen[-1]])
        if len(chosen) == 1:
            nearest_one = distance[:, chosen[0]]


def random_orders(rng: Rng, length: int) -> Tensor:
    """(B, L): a permutation for each image, uniform over all of them."""
    u = rng.uniform(torch.arange(length, device=rng.seeds.device), Draw.ORDER)
    return u.argsort(dim=1, stable=True)
