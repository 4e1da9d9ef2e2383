"""Token orders: each a permutation, each with the property that its name promises."""

from __future__ import annotations

import pytest
import torch

from varkit.orders import NAMES, random_orders, token_order
from varkit.rng import Rng

GRIDS = [(1, 1), (1, 5), (4, 4), (3, 5), (6, 2), (7, 7)]


@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("name", NAMES)
def test_each_is_a_permutation(name: str, grid: tuple[int, int]) -> None:
    order = token_order(name, grid)
    assert order.dtype == torch.int64 and sorted(order.tolist()) == list(range(grid[0] * grid[1]))


@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("name", ["snake", "spiral", "spiral-out"])
def test_the_next_token_is_a_neighbour(name: str, grid: tuple[int, int]) -> None:
    order = token_order(name, grid)
    y, x = order // grid[1], order % grid[1]
    assert ((y.diff().abs() + x.diff().abs()) == 1).all()


def test_known_orders() -> None:
    assert token_order("raster", (2, 3)).tolist() == [0, 1, 2, 3, 4, 5]
    assert token_order("column", (2, 3)).tolist() == [0, 3, 1, 4, 2, 5]
    assert token_order("snake", (2, 3)).tolist() == [0, 1, 2, 5, 4, 3]
    assert token_order("spiral", (3, 3)).tolist() == [0, 1, 2, 5, 8, 7, 6, 3, 4]
    assert token_order("spiral-out", (3, 3)).tolist() == [4, 3, 6, 7, 8, 5, 2, 1, 0]
    assert token_order("raster", (4,)).tolist() == [0, 1, 2, 3]


@pytest.mark.parametrize("grid", [(8, 8), (6, 10)])
def test_coarse_to_fine_is_nested(grid: tuple[int, int]) -> None:
    """The first tokens are the whole grid at a stride, for every stride 8, 4, 2, 1."""
    order = token_order("coarse-to-fine", grid)
    for stride in (8, 4, 2, 1):
        coarse = torch.arange(grid[0] * grid[1]).view(grid)[::stride, ::stride].flatten()
        assert set(order[: len(coarse)].tolist()) == set(coarse.tolist())


def test_random_orders_belong_to_images_and_cover_all_permutations() -> None:
    rng = Rng.from_seed(3, 3000)
    orders = random_orders(rng, 4)
    assert torch.equal(random_orders(rng[torch.tensor([7, 2])], 4), orders[[7, 2]])
    counts = orders.unique(dim=0, return_counts=True)[1]
    assert len(counts) == 24 and counts.min() > 80 and counts.max() < 180  # 125 expected, standard deviation 11
    assert not torch.equal(token_order("random", (4, 4), seed=0), token_order("random", (4, 4), seed=1))


def test_wrong_names_and_grids_are_refused() -> None:
    with pytest.raises(ValueError, match=r"no order is called 'spirel'.*did you mean 'spiral'"):
        token_order("spirel", (2, 2))
    with pytest.raises(ValueError, match=r"got \(2, 2, 2\)"):
        token_order("raster", (2, 2, 2))
