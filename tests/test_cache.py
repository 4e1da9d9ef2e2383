"""The key-value cache against the plainest possible model of it: a list of blocks that are concatenated."""

from __future__ import annotations

import random

import pytest
import torch
from torch import Tensor

from varkit.layers.cache import KVCache

LAYERS, ROWS, HEADS, LENGTH, DIM = 3, 2, 4, 12, 5


def cache(dtype: torch.dtype = torch.float32) -> KVCache:
    return KVCache(LAYERS, ROWS, HEADS, LENGTH, DIM, dtype, torch.device("cpu"))


def block(n: int) -> tuple[Tensor, Tensor]:
    return torch.rand(ROWS, HEADS, n, DIM), torch.rand(ROWS, HEADS, n, DIM)


def fill(c: KVCache, n: int, layers: int = LAYERS) -> list[tuple[Tensor, Tensor]]:
    """Write n positions into every layer and keep them."""
    blocks = [block(n) for _ in range(layers)]
    for layer, (k, v) in enumerate(blocks):
        c.extend(layer, k, v)
    c.advance(n)
    return blocks


def test_extend_returns_all_final_positions_and_the_new_ones() -> None:
    c = cache()
    first, second = fill(c, 3), [block(4) for _ in range(LAYERS)]
    for layer in range(LAYERS):
        k, v = c.extend(layer, *second[layer])
        assert torch.equal(k, torch.cat([first[layer][0], second[layer][0]], 2))
        assert torch.equal(v, torch.cat([first[layer][1], second[layer][1]], 2))
    assert c.length == 3  # not final until `advance`
    c.advance(4)
    assert c.length == 7


def test_extend_before_advance_overwrites() -> None:
    c = cache()
    first, draft, kept = fill(c, 2), block(5), block(3)
    c.extend(0, *draft)
    k, v = c.extend(0, *kept)
    assert torch.equal(k, torch.cat([first[0][0], kept[0]], 2))
    assert torch.equal(v, torch.cat([first[0][1], kept[1]], 2))


def test_advance_may_keep_a_part() -> None:
    c = cache()
    k, v = block(5)
    for layer in range(LAYERS):
        c.extend(layer, k, v)
    c.advance(2)
    new = block(1)
    assert torch.equal(c.extend(0, *new)[0], torch.cat([k[:, :, :2], new[0]], 2))


def test_rewind_forgets_the_last_positions() -> None:
    c = cache()
    blocks, new = fill(c, 6), block(2)
    c.rewind(4)
    assert c.length == 2
    k, v = c.extend(1, *new)
    assert torch.equal(k, torch.cat([blocks[1][0][:, :, :2], new[0]], 2))
    assert torch.equal(v, torch.cat([blocks[1][1][:, :, :2], new[1]], 2))


def test_reset_forgets_all_and_keeps_the_memory() -> None:
    c = cache()
    fill(c, 6)
    memory = c.keys[0].data_ptr()
    c.reset()
    new = block(LENGTH)
    assert c.length == 0
    assert torch.equal(c.extend(2, *new)[0], new[0])
    assert c.keys[0].data_ptr() == memory


def test_any_history_equals_concatenation() -> None:
    rand, c = random.Random(0), cache()
    expected: list[list[tuple[Tensor, Tensor]]] = [[] for _ in range(LAYERS)]  # one entry a position
    seen = set()
    for _ in range(200):
        action = rand.choice(["extend", "draft", "rewind", "reset"] + ["extend"] * 3)
        n = rand.randint(0, LENGTH - c.length)
        seen.add(action)
        if action in ("extend", "draft"):
            keep = n if action == "extend" else rand.randint(0, n)
            for layer in range(LAYERS):
                k, v = block(n)
                got_k, got_v = c.extend(layer, k, v)
                past = expected[layer]
                assert torch.equal(got_k, torch.cat([*(p[0] for p in past), k], 2))
                assert torch.equal(got_v, torch.cat([*(p[1] for p in past), v], 2))
                past += [(k[:, :, i : i + 1], v[:, :, i : i + 1]) for i in range(keep)]
            c.advance(keep)
        elif action == "rewind":
            n = rand.randint(0, c.length)
            c.rewind(n)
            expected = [past[: len(past) - n] for past in expected]
        else:
            c.reset()
            expected = [[] for _ in range(LAYERS)]
        assert c.length == len(expected[0])
    assert seen == {"extend", "draft", "rewind", "reset"}


def test_full_to_the_last_position_and_not_beyond() -> None:
    c = cache()
    fill(c, LENGTH - 1)
    with pytest.raises(ValueError, match=f"the cache holds {LENGTH} positions; {LENGTH + 1} were asked for"):
        c.extend(0, *block(2))
    assert c.length == LENGTH - 1
    assert c.extend(0, *block(1))[0].shape == (ROWS, HEADS, LENGTH, DIM)


@pytest.mark.parametrize("count", [4, -1])
def test_rewind_beyond_what_is_there(count: int) -> None:
    c = cache()
    fill(c, 3)
    with pytest.raises(ValueError, match=f"cannot rewind {count} of 3 positions"):
        c.rewind(count)
    assert c.length == 3


def test_dtype() -> None:
    k, v = cache(torch.bfloat16).extend(0, *block(2))
    assert k.dtype == v.dtype == torch.bfloat16
