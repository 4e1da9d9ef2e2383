"""Token layouts: arithmetic of grids, identity, and errors that show both sides."""

from __future__ import annotations

import json
from dataclasses import FrozenInstanceError, replace
from math import prod

import pytest
import torch

from varkit.layout import Grid, TokenLayout, square_grids

LAYOUTS = {
    "pyramid": TokenLayout(square_grids([1, 2, 3, (2, 4)]), 512, 16),
    "sequence": TokenLayout(((32,),), 4096, 12),
    "video": TokenLayout(((1, 4, 4), (4, 4, 4)), 1024, 8),
    "latents": TokenLayout(((16, 16),), None, 16),
    "factorised": TokenLayout(((4, 4), (7,)), (8, 5, 3), 4),
}


@pytest.fixture(params=LAYOUTS, name="layout")
def _layout(request: pytest.FixtureRequest) -> TokenLayout:
    return LAYOUTS[request.param]


def test_sizes_length_and_slices_agree(layout: TokenLayout) -> None:
    assert layout.sizes == tuple(prod(g) for g in layout.grids)
    covered = [i for s in layout.slices for i in range(layout.length)[s]]
    assert covered == list(range(layout.length))  # each position once, in order
    assert [s.stop - s.start for s in layout.slices] == list(layout.sizes)


def test_numbers_by_hand() -> None:
    pyramid = LAYOUTS["pyramid"]
    assert pyramid.grids == ((1, 1), (2, 2), (3, 3), (2, 4))
    assert pyramid.sizes == (1, 4, 9, 8)
    assert pyramid.length == 22
    assert pyramid.slices == (slice(0, 1), slice(1, 5), slice(5, 14), slice(14, 22))
    assert LAYOUTS["video"].sizes == (16, 64)


@pytest.mark.parametrize("trailing", [(), (3,), (3, 2)])
def test_split_is_undone_by_concatenation(layout: TokenLayout, trailing: tuple[int, ...]) -> None:
    tokens = torch.rand(2, layout.length, *trailing)
    parts = layout.split(tokens)
    assert [p.shape[1] for p in parts] == list(layout.sizes)
    assert torch.equal(torch.cat(parts, 1), tokens)
    assert all(p.untyped_storage().data_ptr() == tokens.untyped_storage().data_ptr() for p in parts)  # views


@pytest.mark.parametrize("off", [-1, 1])
def test_split_refuses_another_length(layout: TokenLayout, off: int) -> None:
    with pytest.raises(ValueError, match=f"got {layout.length + off} tokens; this layout has {layout.length}"):
        layout.split(torch.zeros(2, layout.length + off))


def test_round_trip_also_through_json(layout: TokenLayout) -> None:
    for data in (layout.to_dict(), json.loads(json.dumps(layout.to_dict()))):
        back = TokenLayout.from_dict(data)
        assert back == layout and hash(back) == hash(layout)
        assert back.fingerprint() == layout.fingerprint()


def test_lists_and_tuples_are_the_same_layout() -> None:
    lists = TokenLayout([[4, 4], [7]], [8, 5, 3], 4)  # type: ignore[arg-type]
    assert lists == LAYOUTS["factorised"] and hash(lists) == hash(LAYOUTS["factorised"])


def test_fingerprint_is_what_it_was() -> None:
    """Files on disk carry fingerprints: these must never change."""
    assert {name: layout.fingerprint() for name, layout in LAYOUTS.items()} == FINGERPRINTS


FINGERPRINTS = {
    "pyramid": "b0dbc290c64e3c83",
    "sequence": "af1d4951404b6dbe",
    "video": "24d27a7a41494d3c",
    "latents": "7ece6210bb8ecf92",
    "factorised": "fac08a9091d52c36",
}


def test_fingerprint_notices_every_change() -> None:
    base = LAYOUTS["pyramid"]
    variants = [
        *LAYOUTS.values(),
        replace(base, dim=17),
        replace(base, codebook_size=513),
        replace(base, codebook_size=None),
        replace(base, codebook_size=(512,)),
        replace(base, grids=base.grids[:-1]),
        replace(base, grids=base.grids[::-1]),
        replace(base, grids=((1, 1), (2, 2), (3, 3), (4, 2))),
        replace(base, grids=((1, 1), (2, 2), (3, 3), (8,))),
        replace(base, grids=((1, 1), (2, 2), (3, 3), (1, 2, 4))),
    ]
    prints = [v.fingerprint() for v in variants]
    assert len(set(prints)) == len(variants)
    assert all(len(p) == 16 and int(p, 16) >= 0 for p in prints)


def test_require_passes_on_equal_layouts(layout: TokenLayout) -> None:
    layout.require(TokenLayout.from_dict(layout.to_dict()), "the generator", "the tokenizer")


@pytest.mark.parametrize("change", [{"dim": 17}, {"codebook_size": 4096}, {"grids": ((5, 5),)}])
def test_require_shows_both_sides(change: dict[str, object]) -> None:
    mine, theirs = LAYOUTS["pyramid"], replace(LAYOUTS["pyramid"], **change)  # type: ignore[arg-type]
    with pytest.raises(ValueError) as caught:
        mine.require(theirs, "the generator", "tokenizer x")
    text = str(caught.value)
    assert f"the generator has {mine.describe()}" in text
    assert f"tokenizer x has {theirs.describe()}" in text


def test_describe() -> None:
    assert LAYOUTS["pyramid"].describe() == "grids 1x1+2x2+3x3+2x4, codebook 512, dim 16"


@pytest.mark.parametrize("grids", [(), ((),), ((0, 4),), ((4, -1),), ((2, 2), (1, 2, 3, 4))])
def test_bad_grids(grids: tuple[Grid, ...]) -> None:
    with pytest.raises(ValueError, match=r"grids must be .* positive sides; got"):
        TokenLayout(grids, 8, 4)


@pytest.mark.parametrize(("codebook_size", "dim"), [(0, 4), (-8, 4), ((8, 0), 4), ((), 4), (8, 0), (None, -1)])
def test_bad_sizes(codebook_size: int | tuple[int, ...] | None, dim: int) -> None:
    with pytest.raises(ValueError, match="codebook_size and dim must be positive; got"):
        TokenLayout(((2, 2),), codebook_size, dim)


def test_frozen() -> None:
    with pytest.raises(FrozenInstanceError):
        LAYOUTS["pyramid"].dim = 3  # type: ignore[misc]


def test_square_grids() -> None:
    assert square_grids([1, 2, (2, 3), [4, 5]]) == ((1, 1), (2, 2), (2, 3), (4, 5))
