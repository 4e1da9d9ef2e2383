"""Random numbers: the published answers, the laws they follow, and what they do and do not depend on.

Every statistical test fails when its p-value is below ALPHA. The seeds are fixed, so none can fail by chance: a
failure means that the numbers changed.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from itertools import combinations

import numpy as np
import pytest
import torch
from scipy import stats
from torch import Tensor

from varkit.rng import Draw, RecordedRng, Rng, philox4x32

ALPHA = 1e-4
N = 1 << 17
MASK = 0xFFFFFFFF


def philox(counter: tuple[int, ...], key: tuple[int, ...]) -> tuple[int, ...]:
    """Philox4x32-10 in Python integers, from the paper's definition."""
    (x0, x1, x2, x3), (k0, k1) = counter, key
    for i in range(10):
        r0, r1 = (k0 + i * 0x9E3779B9) % 2**32, (k1 + i * 0xBB67AE85) % 2**32
        (h0, l0), (h1, l1) = divmod(x0 * 0xD2511F53, 2**32), divmod(x2 * 0xCD9E8D57, 2**32)
        x0, x1, x2, x3 = h1 ^ x1 ^ r0, l1, h0 ^ x3 ^ r1, l0
    return x0, x1, x2, x3


def words(text: str) -> tuple[int, ...]:
    return tuple(int(word, 16) for word in text.split())


# ---- the generator ----------------------------------------------------------------------------------------------

KNOWN = [  # Random123, kat_vectors: philox4x32 10
    ("0 0 0 0", "0 0", "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
    ("ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff", "408f276d 41c83b0e a20bc7c6 6d5451fd"),
    ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0", "d16cfe09 94fdcceb 5001e420 24126ea1"),
]


@pytest.mark.parametrize(("counter", "key", "answer"), KNOWN)
def test_known_answers(counter: str, key: str, answer: str) -> None:
    as_tensors = [tuple(torch.tensor([w]) for w in words(text)) for text in (counter, key)]
    assert tuple(int(w) for w in philox4x32(*as_tensors)) == words(answer)  # type: ignore[arg-type]
    assert philox(words(counter), words(key)) == words(answer)


def test_equals_integers_on_random_words() -> None:
    rand = random.Random(0)
    edges = [0, 1, MASK, 1 << 31, (1 << 31) - 1]
    rows = [[rand.choice([rand.getrandbits(32), rand.choice(edges)]) for _ in range(6)] for _ in range(500)]
    c0, c1, c2, c3, k0, k1 = torch.tensor(rows).unbind(1)
    got = torch.stack(philox4x32((c0, c1, c2, c3), (k0, k1)), 1).tolist()
    assert got == [list(philox(tuple(row[:4]), tuple(row[4:]))) for row in rows]


def test_counter_words_are_position_block_kind_step() -> None:
    seeds = [0, 1, -1, -(2**63), 2**63 - 1, 0x123456789ABCDEF]
    positions = [0, 1, 7, 2**31, 2**32 - 1]
    got = Rng(torch.tensor(seeds)).bits(torch.tensor(positions), Draw.AUGMENT, step=2**32 - 1, blocks=3)
    assert got.shape == (len(seeds), len(positions), 12)
    for seed, rows in zip(seeds, got.tolist(), strict=True):
        key = (seed & MASK, seed >> 32 & MASK)
        for position, row in zip(positions, rows, strict=True):
            blocks = [philox((position, block, int(Draw.AUGMENT), 2**32 - 1), key) for block in range(3)]
            assert row == [word for block in blocks for word in block]


def test_no_two_uses_share_a_number() -> None:
    """Under one key Philox is a bijection of the counter, so four words repeat only if a counter does."""
    rng = Rng.from_seed(0, 3)
    blocks = [
        rng.bits(torch.arange(20), kind, step, blocks=4).view(-1, 4) for kind in range(len(Draw)) for step in range(4)
    ]
    every = torch.cat(blocks)
    assert len(every.unique(dim=0)) == len(every) == 3 * 20 * 4 * 4 * len(Draw)
    assert len({int(kind) for kind in Draw}) == len(Draw.__members__)


# ---- uniform ----------------------------------------------------------------------------------------------------


def one(step: int = 0, kind: int = Draw.TOKEN, seed: int = 0, first: int = 0) -> Tensor:
    return Rng.from_seed(seed, 1).uniform(torch.arange(first, first + N), kind, step)[0]


def raw(first: int) -> Tensor:
    """The first number under the keys first, first + 1, ... themselves."""
    return Rng(torch.arange(first, first + N)).uniform(torch.tensor([0]), Draw.TOKEN)[:, 0]


STREAMS: dict[str, Callable[[], Tensor]] = {
    "positions": one,
    "far positions": lambda: one(first=2**32 - N),
    "images": lambda: Rng.from_seed(0, N).uniform(torch.tensor([5]), Draw.TOKEN)[:, 0],
    "raw keys": lambda: raw(0),
    "draws of one position": lambda: Rng.from_seed(0, 1).uniform(torch.tensor([5]), Draw.TOKEN, count=N)[0, 0],
    "fourth word": lambda: Rng.from_seed(0, 1).uniform(torch.arange(N), Draw.TOKEN, count=4)[0, :, 3],
    "steps": lambda: torch.cat([Rng.from_seed(0, 64).uniform(torch.arange(8), 0, s).flatten() for s in range(256)]),
    "seeds": lambda: torch.cat([Rng.from_seed(s, 64).uniform(torch.arange(8), 0).flatten() for s in range(256)]),
}


@pytest.mark.parametrize("name", STREAMS)
def test_uniform_law(name: str) -> None:
    u = STREAMS[name]().double().numpy()
    assert len(u) == N
    bins = np.histogram(u, bins=256, range=(0, 1))[0]
    assert stats.chisquare(bins).pvalue > ALPHA
    assert stats.kstest(u, "uniform").pvalue > ALPHA
    low = np.bincount((u * 2**23).astype(np.int64) % 256, minlength=256)  # the low bits are as good
    assert stats.chisquare(low).pvalue > ALPHA
    assert len(np.unique(u)) > 0.98 * len(u)  # a short period would repeat


def test_uniform_reads_the_top_23_bits() -> None:
    rng, positions = Rng.from_seed(3, 4), torch.arange(9)
    top = (rng.bits(positions, Draw.TOKEN, 2, blocks=2) >> 9).double()
    expected = ((top + 0.5) / 2**23).float()
    u = rng.uniform(positions, Draw.TOKEN, 2, count=7)
    assert u.dtype == torch.float32
    assert torch.equal(u, expected[..., :7])
    assert torch.equal(rng.uniform(positions, Draw.TOKEN, 2), expected[..., 0])


@pytest.mark.parametrize(
    ("word", "value"), [(0, 2.0**-24), (0x1FF, 2.0**-24), (1 << 31, 0.5 + 2.0**-24), (MASK, 1 - 2.0**-24)]
)
def test_open_interval_at_the_extreme_words(monkeypatch: pytest.MonkeyPatch, word: int, value: float) -> None:
    def bits(self: Rng, positions: Tensor, kind: int, step: int = 0, blocks: int = 1) -> Tensor:
        return torch.full((len(self), positions.shape[-1], 4 * blocks), word)

    monkeypatch.setattr(Rng, "bits", bits)
    rng, positions = Rng.from_seed(0, 2), torch.arange(3)
    u = rng.uniform(positions, Draw.TOKEN)
    assert (u.double() == value).all() and (u > 0).all() and (u < 1).all()
    assert rng.normal(positions, Draw.TOKEN, count=2).isfinite().all()
    assert rng.gumbel(positions).isfinite().all()


# ---- independence -----------------------------------------------------------------------------------------------

PAIRS: dict[str, Callable[[], tuple[Tensor, Tensor]]] = {
    "images of a batch": lambda: tuple(Rng.from_seed(0, 2).uniform(torch.arange(N), 0)),  # type: ignore[return-value]
    "steps": lambda: (one(step=0), one(step=1)),
    "step and kind swapped": lambda: (one(step=2, kind=1), one(step=1, kind=2)),
    "position and next": lambda: (one(), one(first=1)),
    "position and the one 256 on": lambda: (one(), one(first=256)),
    "neighbouring seeds": lambda: (one(seed=0), one(seed=1)),
    "seeds that differ in the high word": lambda: (one(seed=7), one(seed=7 + 2**32)),
    "neighbouring raw keys": lambda: (raw(0), raw(1)),
    "raw keys that differ in the high word": lambda: (raw(0), raw(2**32)),
    "first and second draw": lambda: tuple(Rng.from_seed(0, 1).uniform(torch.arange(N), 0, count=2)[0].T),  # type: ignore[return-value]
    "first and fifth draw": lambda: tuple(Rng.from_seed(0, 1).uniform(torch.arange(N), 0, count=5)[0].T[[0, 4]]),  # type: ignore[return-value]
    **{
        f"{a.name} and {b.name}": lambda a=a, b=b: (one(kind=a), one(kind=b))  # type: ignore[misc]
        for a, b in combinations(Draw, 2)
    },
}


def independent(x: np.ndarray, y: np.ndarray, law: Callable[[np.ndarray], np.ndarray] = lambda v: v) -> bool:
    """No correlation, and 16 x 16 cells of (law(x), law(y)) equally full."""
    u, v = law(x), law(y)
    cells = np.histogram2d(u, v, bins=16, range=((0, 1), (0, 1)))[0]
    return stats.pearsonr(x, y).pvalue > ALPHA and stats.chisquare(cells.ravel()).pvalue > ALPHA


@pytest.mark.parametrize("name", PAIRS)
def test_independence(name: str) -> None:
    x, y = (t.double().numpy() for t in PAIRS[name]())
    assert independent(x, y)


# ---- normal and gumbel ------------------------------------------------------------------------------------------


def normals(count: int | None = None) -> np.ndarray:
    return Rng.from_seed(1, 2).normal(torch.arange(N), Draw.TOKEN, count=count).double().numpy()


def test_normal_law() -> None:
    z = normals().ravel()
    n = len(z)
    assert stats.kstest(z, "norm").pvalue > ALPHA
    limit = stats.norm.isf(ALPHA / 2)  # of the standardised moments below
    assert abs(z.mean()) * n**0.5 < limit
    assert abs((z**2).mean() - 1) * (n / 2) ** 0.5 < limit
    assert abs((z**3).mean()) * (n / 15) ** 0.5 < limit
    assert abs((z**4).mean() - 3) * (n / 96) ** 0.5 < limit
    for bound in (2.0, 3.0, 4.0):
        for beyond in (z > bound, z < -bound):
            assert stats.binomtest(int(beyond.sum()), n, stats.norm.sf(bound)).pvalue > ALPHA
    assert np.abs(z).max() < np.sqrt(2 * np.log(2**24))  # what 23 bits can reach


def test_normal_draws_are_independent_of_each_other() -> None:
    z = normals(3)
    assert z.shape == (2, N, 3)
    for i, j in combinations(range(3), 2):
        assert independent(z[0, :, i], z[0, :, j], stats.norm.cdf)
        assert stats.pearsonr(z[0, :, i] ** 2, z[0, :, j] ** 2).pvalue > ALPHA  # no radius is used twice
    assert independent(z[0, :, 0], z[1, :, 0], stats.norm.cdf)
    assert np.array_equal(normals(), normals(1)[..., 0])


def test_gumbel_law() -> None:
    g = Rng.from_seed(2, 1).gumbel(torch.arange(N), count=2).double().numpy()
    assert g.shape == (1, N, 2)
    assert stats.kstest(g.ravel(), "gumbel_r").pvalue > ALPHA
    assert independent(g[0, :, 0], g[0, :, 1], stats.gumbel_r.cdf)


def test_gumbel_maximum_is_a_softmax_draw() -> None:
    logits = torch.tensor([0.0, 1.0, -1.0, 2.5, 0.3])
    picks = (Rng.from_seed(2, 1).gumbel(torch.arange(N), count=5)[0] + logits).argmax(-1)
    expected = logits.double().softmax(-1).numpy() * N
    assert stats.chisquare(np.bincount(picks.numpy(), minlength=5), expected).pvalue > ALPHA


# ---- what a number depends on -----------------------------------------------------------------------------------

DRAWS: dict[str, Callable[[Rng, Tensor], Tensor]] = {
    "bits": lambda rng, p: rng.bits(p, Draw.TOKEN, 3, blocks=2),
    "uniform": lambda rng, p: rng.uniform(p, Draw.TOKEN, 3),
    "uniforms": lambda rng, p: rng.uniform(p, Draw.TOKEN, 3, count=6),
    "normal": lambda rng, p: rng.normal(p, Draw.TOKEN, 3),
    "normals": lambda rng, p: rng.normal(p, Draw.TOKEN, 3, count=3),
    "gumbel": lambda rng, p: rng.gumbel(p, step=3, count=5),
}


@pytest.mark.parametrize("name", DRAWS)
def test_numbers_do_not_depend_on_the_company(name: str) -> None:
    draw, rng, positions = DRAWS[name], Rng.from_seed(11, 6), torch.arange(40)
    whole = draw(rng, positions)
    for row in range(6):
        assert torch.equal(draw(rng[row : row + 1], positions), whole[row : row + 1])
    rows, columns = torch.tensor([4, 1, 5, 1]), torch.tensor([7, 39, 0])
    assert torch.equal(draw(rng[rows], columns), whole[rows][:, columns])
    own = torch.stack([torch.randperm(40)[:9] for _ in range(6)])  # positions of each image's own
    assert torch.equal(draw(rng, own), whole[torch.arange(6)[:, None], own])
    assert torch.equal(draw(rng, positions[None]), whole)


@pytest.mark.parametrize("name", DRAWS)
def test_drawing_leaves_no_trace(name: str) -> None:
    rng, before = Rng.from_seed(11, 2), torch.get_rng_state()
    first = DRAWS[name](rng, torch.arange(5))
    assert torch.equal(DRAWS[name](rng, torch.arange(5)), first)
    assert torch.equal(torch.get_rng_state(), before)


def test_more_draws_keep_the_first_ones() -> None:
    rng, positions = Rng.from_seed(0, 2), torch.arange(4)
    many = rng.uniform(positions, Draw.TOKEN, count=9)
    for count in range(1, 9):
        assert torch.equal(rng.uniform(positions, Draw.TOKEN, count=count), many[..., :count])


# ---- seeds ------------------------------------------------------------------------------------------------------


def test_for_keys_gives_each_key_its_own_seed() -> None:
    far = torch.tensor([-1, -2, -(2**63), 2**63 - 1, 2**62]) + torch.zeros(1, dtype=torch.int64)
    keys = torch.cat([torch.arange(200_000), 2**32 + torch.arange(1000), far])
    seeds = torch.cat([Rng.for_keys(seed, keys).seeds for seed in (0, 1, 2**32, -1)])
    assert len(seeds.unique()) == len(seeds) == 4 * len(keys)


def test_for_keys_reads_all_bits_of_seed_and_key() -> None:
    def at(seed: int, key: int) -> int:
        return int(Rng.for_keys(seed, torch.tensor([key])).seeds)

    signed = [1 << i for i in range(63)] + [-(2**63)]
    assert len({at(0, 0), *(at(0, bit) for bit in signed), *(at(bit, 0) for bit in signed)}) == 129
    assert at(5, 9) == int.from_bytes(
        b"".join(w.to_bytes(4, "big") for w in philox((9, 0, int(Draw.KEY), 0), (5, 0))[:2]), "big", signed=True
    )


def test_from_seed_names_one_endless_set() -> None:
    ten = Rng.from_seed(3, 10)
    assert len(ten) == 10
    assert torch.equal(Rng.from_seed(3, 4, first=6).seeds, ten.seeds[6:])
    assert torch.equal(Rng.for_keys(3, torch.tensor([8, 2])).seeds, ten.seeds[[8, 2]])


def test_from_generator_advances_it_by_one_draw() -> None:
    generator, twin = (torch.Generator().manual_seed(4) for _ in range(2))
    first, second = (Rng.from_generator(generator, 3).seeds for _ in range(2))
    assert len({*first.tolist(), *second.tolist()}) == 6
    again = Rng.from_generator(twin, 5).seeds
    assert torch.equal(again[:3], first)  # a larger batch begins with the smaller one
    torch.randint(0, 2**62, (1,), generator=twin)
    assert torch.equal(generator.get_state(), twin.get_state())


def test_slicing() -> None:
    rng = Rng.from_seed(0, 5)
    assert torch.equal(rng[1:3].seeds, rng.seeds[1:3])
    assert torch.equal(rng[torch.tensor([True, False, False, True, False])].seeds, rng.seeds[[0, 3]])
    assert torch.equal(rng.to("cpu").seeds, rng.seeds)
    assert len(rng[:0].uniform(torch.arange(3), Draw.TOKEN)) == 0


@pytest.mark.parametrize(
    "seeds", [torch.zeros(3), torch.zeros(3, dtype=torch.int32), torch.tensor(3), torch.zeros(2, 2, dtype=torch.int64)]
)
def test_bad_seeds(seeds: Tensor) -> None:
    with pytest.raises(ValueError, match=r"1-D int64.*from_seed"):
        Rng(seeds)


# ---- replaying --------------------------------------------------------------------------------------------------


def recorded() -> tuple[RecordedRng, Tensor, Tensor]:
    uniform, gumbel = torch.rand(3, 8), torch.rand(3, 8, 4)
    return RecordedRng(uniform={Draw.TOKEN: uniform}, gumbel={Draw.GUMBEL: gumbel}), uniform, gumbel


def test_recorded_numbers_come_back_by_position() -> None:
    rng, uniform, gumbel = recorded()
    some, own = torch.tensor([6, 0, 3]), torch.tensor([[1, 2], [7, 0], [5, 5]])
    assert len(rng) == 3
    for _ in range(2):  # asking again changes nothing
        assert torch.equal(rng.uniform(some, Draw.TOKEN), uniform[:, some])
        assert torch.equal(rng.uniform(some[None], Draw.TOKEN), uniform[:, some])
        assert torch.equal(rng.gumbel(some, count=4), gumbel[:, some])
        assert torch.equal(rng.gumbel(own, count=4), gumbel[torch.arange(3)[:, None], own])


def test_recorded_slicing() -> None:
    rng, uniform, gumbel = recorded()
    for rows in (slice(1, 3), torch.tensor([2, 0])):
        part = rng[rows].to("cpu")
        assert isinstance(part, RecordedRng) and len(part) == 2
        assert torch.equal(part.uniform(torch.arange(8), Draw.TOKEN), uniform[rows])
        assert torch.equal(part.gumbel(torch.arange(8), count=4), gumbel[rows])


def test_recorded_errors() -> None:
    rng, uniform, gumbel = recorded()
    with pytest.raises(KeyError, match="no recorded uniform numbers for AUGMENT"):
        rng.uniform(torch.arange(2), Draw.AUGMENT)
    with pytest.raises(KeyError, match="no recorded gumbel numbers for TOKEN"):
        rng.gumbel(torch.arange(2), Draw.TOKEN)
    with pytest.raises(ValueError, match=r"one batch size; got \[2, 3\]"):
        RecordedRng(uniform={Draw.TOKEN: uniform}, gumbel={Draw.GUMBEL: gumbel[:2]})
    with pytest.raises(ValueError, match=r"one batch size; got \[\]"):
        RecordedRng()
