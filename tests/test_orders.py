"""Token orders: each a permutation, each with the property that its name promises."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.test_mar import draw, small
from varkit.interfaces import Cond
from varkit.orders import LPD_SIZES, NAMES, locality_groups, order_groups, random_orders, token_order
from varkit.registry import create_model, model_entry
from varkit.rng import Rng
from varkit.samplers.masked import MaskedSampler

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


def built(name: str) -> tuple[Any, Any]:
    """A tiny model and its tokenizer."""
    entry = model_entry(name)
    tokenizer = model_entry(str(entry.tokenizer))
    return entry.build(**entry.tiny).eval(), create_model(str(entry.tokenizer), **tokenizer.tiny).eval()


GRID = (8, 8)
SIZES = (1, 1, 2, 4, 8, 12, 16, 20)


def apart(a: int, b: int, width: int = 8) -> int:
    return max(abs(a // width - b // width), abs(a % width - b % width))


@pytest.mark.parametrize("repulsion", [1.0, 2.0])
def test_locality_groups_are_near_the_old_and_far_from_each_other(repulsion: float) -> None:
    groups = [g.tolist() for g in locality_groups(GRID, SIZES, repulsion_threshold=repulsion, seed=5)]
    assert [len(g) for g in groups] == list(SIZES)
    assert sorted(p for g in groups for p in g) == list(range(64))
    done = list(groups[0])
    for group in groups[1:5]:
        near = [p for p in group if any(apart(p, o) == 1 for o in done)]
        assert near and near == group[: len(near)]  # then the far ones
        assert all(apart(a, b) > repulsion for i, a in enumerate(near) for b in near[:i])
        done += group
    if repulsion == 1:
        assert len([p for p in groups[3] if any(apart(p, o) == 1 for g in groups[:3] for o in g)]) > 1


def test_locality_groups_depend_on_the_seed_alone() -> None:
    one, two, other = (torch.cat(locality_groups(GRID, SIZES, seed=s)).tolist() for s in (1, 1, 2))
    assert one == two != other
    first = [locality_groups(GRID, SIZES, seed=s)[0].item() for s in range(40)]
    assert len(set(first)) > 15
    plain = [torch.cat(locality_groups(GRID, SIZES, first=9, shuffle=False, seed=s)).tolist() for s in (1, 2)]
    assert plain[0] == plain[1] and plain[0][0] == 9
    assert torch.cat(locality_groups((2, 3), (6,), proximity_threshold=9)).sort().values.tolist() == list(range(6))


def test_groups_of_an_order() -> None:
    groups = order_groups("raster", (2, 3), (1, 2, 3))
    assert [g.tolist() for g in groups] == [[0], [1, 2], [3, 4, 5]]
    for (length, steps), sizes in LPD_SIZES.items():
        assert sum(sizes) == length and len(sizes) == steps
    released = order_groups("lpd", (16, 16), [12] * 19 + [28])
    assert tuple(len(g) for g in released) == LPD_SIZES[256, 20]
    assert [len(g) for g in order_groups("lpd", (3, 4), (2, 4, 6))] == [2, 4, 6]
    with pytest.raises(ValueError, match="several a step"):
        token_order("lpd", (4, 4))
    with pytest.raises(ValueError, match=r"neighbours in a grid"):
        order_groups("lpd", (16,), (8, 8))
    with pytest.raises(ValueError, match="16 in all"):
        locality_groups((4, 4), (8, 9))
    with pytest.raises(ValueError, match="0 to 15; got 16"):
        locality_groups((4, 4), (8, 8), first=16)


def open_ids(ids: torch.Tensor, mask_id: int) -> torch.Tensor:
    """(B, L), negative where nothing is decided."""
    ids = ids.masked_fill(ids == mask_id, -1)
    return ids.amin(2) if ids.dim() == 3 else ids


def order_of(steps: list[torch.Tensor]) -> list[list[int]]:
    """What each step decided, from the ids before the first and after each (B, L)."""
    decided = [set((ids[0] >= 0).nonzero().flatten().tolist()) for ids in steps]
    return [sorted(now - before) for before, now in zip([set(), *decided], decided, strict=False)]


@pytest.mark.parametrize(("model_name", "name"), [("elm_mlm_l_1_16", "lpd"), ("maskgit_titok_l32", "raster")])
def test_masked_generators_decide_in_the_order_that_is_asked_for(model_name: str, name: str) -> None:
    """MaskGIT's decoding keeps, in each step, the tokens of that group, known ones besides."""
    model, tokenizer = built(model_name)
    length = model.layout.length
    wanted = model.in_order(name, 4)
    seen: list[torch.Tensor] = []
    original = model.predict

    def predict(state: object, ids: torch.Tensor, positions: torch.Tensor) -> object:
        seen.append(open_ids(ids, model.mask_id))
        return original(state, ids, positions)

    model.predict = predict
    keep = torch.zeros(length, dtype=torch.bool)
    keep[3] = True
    parts = model.layout.codebook_size
    shape = (2, length, len(parts)) if isinstance(parts, tuple) else (2, length)
    for known in (None, (torch.ones(shape, dtype=torch.int64), keep)):
        seen.clear()
        out = MaskedSampler(num_steps=4, order=name).generate(
            tokenizer, model, Cond(torch.tensor([0, 1])), Rng.from_seed(0, 2), known=known
        )
        found = order_of([*seen, open_ids(out.tokens, model.mask_id)])[1:]
        given = {3} if known is not None else set()
        assert found == [sorted(set(g.tolist()) - given) for g in wanted]


def test_every_generator_of_groups_takes_lpd_and_others_say_why_not() -> None:
    for name in ("mar_b", "elm_mlm_l_1_16"):
        model, _ = built(name)
        groups = model.in_order("lpd", 4)
        assert len(groups) == 4
        assert sorted(torch.cat(groups).flatten().tolist()) == list(range(model.layout.length))
    for name, message in (
        ("rar_b", "several a step"),
        ("llamagen_b", "one order only"),
        ("var_d16", "one order only"),
        ("maskgit_titok_l32", "neighbours in a grid"),
    ):
        with pytest.raises(ValueError, match=message):
            built(name)[0].in_order("lpd", None)


def test_mar_draws_patches_in_the_order_and_around_known_ones() -> None:
    model, rng = small(2), Rng.from_seed(0, 3)
    groups = model.groups(rng, 4, "lpd")
    assert [g.shape for g in groups] == [(3, n * 4) for n in (len(t) // 4 for t in model.in_order("lpd", 4))]
    assert (groups[1] == groups[1][:1]).all()  # the same for every image
    keep = torch.zeros(3, model.layout.length, dtype=torch.bool)
    for i in range(3):
        keep[i, model.positions[[i, 9 + i]].flatten()] = True
    known, rest = model.groups_around(keep, rng, 4, "lpd")
    order = torch.cat(model.in_order("lpd", 4)).tolist()
    for i in range(3):
        taken = torch.cat([g[i] for g in rest]).tolist()
        assert sorted(taken + known[i].tolist()) == list(range(model.layout.length))
        first = [min(order.index(p) // 4 for p in g[i].tolist()) for g in rest]
        assert first == sorted(first)
    tokens, _ = draw(model, order="lpd", num_steps=4)
    alone, _ = draw(model, batch=1, order="lpd", num_steps=4)
    torch.testing.assert_close(tokens[:1], alone, atol=5e-3, rtol=1e-3)  # rounding grows in the head
    assert not torch.equal(tokens, draw(model, num_steps=4)[0])
    with pytest.raises(ValueError, match="no order is called 'lpt'"):
        draw(model, order="lpt")
