"""Counter-based random numbers: a function of *what* is drawn, never of *when* or *beside whom*.

Every number is Philox4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011)
of the counter (position, draw index, kind, step) under a 64-bit key, the image's seed. So an image
keeps its random numbers whatever the batch, window, device or process count, nothing is drawn on the
host, and two different uses can never share a number: they differ in a word of the counter.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from enum import IntEnum, unique
from typing import Self

import torch
from torch import Tensor

_MASK = 0xFFFFFFFF
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)


@unique
class Draw(IntEnum):
    """What a number is for: one word of the counter, so no two uses ever meet."""

    TOKEN = 0  # the uniform that picks a token
    GUMBEL = 1  # noise of a relaxed (soft) pick
    LABEL = 2  # a class drawn because none was given
    COND_DROP = 3  # dropping a condition in training
    AUGMENT = 4  # crops and flips
    SHUFFLE = 5  # the order of the data
    KEY = 6  # deriving the seeds of images from one seed
    RESTART = 7  # which encoder outputs replace dead codes
    TREE = 8  # which tokens a fixed tree of drafts holds
    LATENT_ACCEPT = 9  # whether a drafted latent is accepted
    LATENT_RESIDUAL = 10  # proposals in place of one that is not, and whether they are accepted
    CONTROL_DROP = 12  # dropping control images alone in training
    SIZE = 13  # the size of the images of a batch in training
    PHRASES = 14  # whether a caption is read as a set of phrases in training
    INPUT_MASK = 20  # which inputs are masked in training
    OWN_TOKEN = 21  # where the model's own tokens stand in for true ones in training
    PREFIX = 22  # how much of a sequence is shown in training
    HIDDEN = 23  # which tokens are hidden, and how many, in training
    FILL_NOISE = 24  # noise in place of hidden inputs, or over what is read, and how much of it
    MOTION = 44  # what a computed clip shows, and how it moves
    DISCRIMINATOR = 30  # how images are changed before a discriminator sees them
    TARGET_NOISE = 31  # how far from certain a discriminator's targets are
    LATENT = 50  # the sample of a posterior over latents
    NOISE = 51  # where a flow starts, and the noise it is trained with
    STUDENT_NOISE = 53  # where a distilled student starts: never a trajectory that it learned from
    SIGMA = 52  # how much of that noise, in training
    FRAME = 55  # deriving the seeds of the frames of a clip
    ORDER = 60  # the order in which tokens are predicted, and whether it is a random one
    CONFIDENCE = 61  # noise on how sure a drawn token is, in masked sampling
    MASK = 62  # which tokens are masked, and how many, when a masked generator trains
    UNQUANTISED = 70  # which training images a quantiser passes on as they are
    CODE = 72  # which code a stochastic quantiser takes
    CORRUPT = 71  # which tokens are replaced by random ones in training, and by which
    DENOISE = 80  # the noise that each step of a diffusion adds
    SOLVER_NOISE = 90  # the noise that a stochastic solver adds in its steps
    CANDIDATE = 95  # deriving the seeds of further candidates for the same image
    DRAFT = 100  # the uniform that picks a drafted token
    FILL = 101  # a token that is drafted where nothing is known of its law
    DRAFT_NOISE = 102  # Gumbel noise that orders several drafts of one position
    ACCEPT = 103  # whether drafts are accepted, one number each
    RESIDUAL = 104  # the uniform that picks a token where drafts were rejected


def philox4x32(counter: tuple[Tensor, ...], key: tuple[Tensor, Tensor]) -> tuple[Tensor, ...]:
    """Ten rounds of Philox4x32 on int64 tensors that hold unsigned 32-bit words.

    Args:
        counter: four tensors, each broadcastable to a common shape, values in [0, 2**32).
        key: two tensors, likewise.
    Returns: four int64 tensors of the common shape, values in [0, 2**32).
    """
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        # The product needs 64 unsigned bits; int64 wraps, and shift-and-mask reads the same bits.
        p0, p1 = c0 * _MULTIPLIERS[0], c2 * _MULTIPLIERS[1]
        c0, c1, c2, c3 = (
            ((p1 >> 32) & _MASK) ^ c1 ^ k0,
            p1 & _MASK,
            ((p0 >> 32) & _MASK) ^ c3 ^ k1,
            p0 & _MASK,
        )
        k0, k1 = (k0 + _WEYL[0]) & _MASK, (k1 + _WEYL[1]) & _MASK
    return c0, c1, c2, c3


def pick(probs: Tensor, uniform: Tensor) -> Tensor:
    """Inverse-CDF draw: one uniform in (0, 1) picks one entry, never one of probability 0.

    Args: probs: (..., V), need not sum to 1.   uniform: (...).
    Returns: (...) int64.
    """
    # float64 where the device has it: the sum over a large codebook must not round away its tail.
    cdf = probs.to(torch.float32 if probs.device.type == "mps" else torch.float64).cumsum(-1)
    total = cdf[..., -1:].contiguous()
    ids = torch.searchsorted(cdf, total * uniform.to(cdf.dtype)[..., None], right=True)
    last = torch.searchsorted(cdf, total)  # the first entry to reach the total: the last possible one
    return torch.minimum(ids, last)[..., 0]


class Rng:
    """Random numbers of a batch of images, keyed by image seed, position, kind of draw and step.

    Args:
        seeds: (B,) int64, one seed an image; the device of `seeds` is the device of the draws.
    """

    def __init__(self, seeds: Tensor) -> None:
        if seeds.dtype != torch.int64 or seeds.dim() != 1:
            raise ValueError(
                f"seeds must be a 1-D int64 tensor, one an image; got {seeds.dtype}, shape "
                f"{tuple(seeds.shape)}. Use Rng.from_seed(seed, batch) to derive them."
            )
        self.seeds = seeds

    @classmethod
    def for_keys(cls, seed: int, keys: Tensor) -> Self:
        """Seeds for samples known by a number: `keys` (B,) int64, hashed to 64 bits under `seed`."""
        k0, k1 = (torch.full_like(keys, w) for w in (seed & _MASK, (seed >> 32) & _MASK))
        zero = torch.zeros_like(keys)
        a, b, _, _ = philox4x32((keys & _MASK, (keys >> 32) & _MASK, zero + int(Draw.KEY), zero), (k0, k1))
        return cls((a << 32) | b)

    @classmethod
    def from_seed(cls, seed: int, batch: int, first: int = 0, device: str | torch.device = "cpu") -> Self:
        """Images `first` .. `first + batch - 1` of the endless set that `seed` names."""
        return cls.for_keys(seed, torch.arange(first, first + batch, device=device))

    @classmethod
    def from_generator(cls, generator: torch.Generator, batch: int, device: str | torch.device = "cpu") -> Self:
        """One seed drawn from a torch generator (which advances by one draw), then as `from_seed`."""
        draw = torch.randint(0, 2**62, (1,), generator=generator, device=generator.device)
        return cls.from_seed(int(draw.item()), batch, device=device)

    def __len__(self) -> int:
        return self.seeds.shape[0]

    def to(self, device: str | torch.device) -> Self:
        return type(self)(self.seeds.to(device))

    def __getitem__(self, rows: slice | Tensor) -> Self:
        """The random numbers of some of the images."""
        return type(self)(self.seeds[rows])

    def candidate(self, number: int) -> Rng:
        """The random numbers of another draw of the same images; number 0 is these themselves."""
        if number == 0:
            return self
        words = self.bits(torch.tensor([number], device=self.seeds.device), Draw.CANDIDATE)[:, 0]  # B 4
        return Rng((words[:, 0] << 32) | words[:, 1])

    def bits(self, positions: Tensor, kind: int, step: int = 0, blocks: int = 1) -> Tensor:
        """(B, n, 4 * blocks) int64 words in [0, 2**32) for `positions` (n,) or (B, n)."""
        if positions.dim() == 1:
            positions = positions[None]
        position = positions.to(self.seeds.device)[..., None]  # B|1 n 1
        block = torch.arange(blocks, device=self.seeds.device).view(1, 1, -1)
        seeds = self.seeds.view(-1, 1, 1)
        shape = torch.broadcast_shapes(position.shape, block.shape, seeds.shape)
        kind_word, step_word = (torch.full_like(seeds, int(w)) for w in (kind, step))
        words = philox4x32((position & _MASK, block, kind_word, step_word), (seeds & _MASK, (seeds >> 32) & _MASK))
        return torch.stack([w.expand(shape) for w in words], -1).flatten(2)  # B n 4*blocks

    def uniform(self, positions: Tensor, kind: int, step: int = 0, count: int | None = None) -> Tensor:
        """Uniform float32 in the open interval (0, 1), 23 random bits each.

        Args:
            positions: (n,) or (B, n) int64 in [0, 2**32).
            kind, step: words of the counter; see `Draw`.
            count: None for one number a position, else how many.
        Returns: (B, n) or (B, n, count) float32.
        """
        words = self.bits(positions, kind, step, 1 if count is None else -(-count // 4))
        words = words[..., 0] if count is None else words[..., :count]
        return ((words >> 9).to(torch.float32) + 0.5) * 2.0**-23  # exact: never 0, never 1

    def normal(self, positions: Tensor, kind: int, step: int = 0, count: int | None = None) -> Tensor:
        """Standard normal float32 by Box-Muller; shapes as `uniform`. Devices may differ by an ulp."""
        n = 1 if count is None else count
        u = self.uniform(positions, kind, step, 2 * n)
        radius = torch.sqrt(-2.0 * torch.log(u[..., :n]))
        z = radius * torch.cos(2.0 * math.pi * u[..., n:])
        return z[..., 0] if count is None else z

    def gumbel(self, positions: Tensor, kind: int = Draw.GUMBEL, step: int = 0, count: int = 1) -> Tensor:
        """Standard Gumbel float32, (B, n, count)."""
        return -torch.log(-torch.log(self.uniform(positions, kind, step, count)))


class RecordedRng(Rng):
    """Replays recorded numbers, for fixtures: a table by kind of draw, read at the positions asked for.

    Args:
        uniform: {kind: (B, L)} or {kind: (B, L, count)} float32.
        gumbel, normal: {kind: (B, L, count)} float32.
    """

    def __init__(
        self,
        uniform: dict[int, Tensor] | None = None,
        gumbel: dict[int, Tensor] | None = None,
        normal: dict[int, Tensor] | None = None,
    ) -> None:
        self.tables = {"uniform": uniform or {}, "gumbel": gumbel or {}, "normal": normal or {}}
        rows = {t.shape[0] for tables in self.tables.values() for t in tables.values()}
        if len(rows) != 1:
            raise ValueError(f"recorded tables must share one batch size; got {sorted(rows)}")
        super().__init__(torch.arange(rows.pop()))

    def to(self, device: str | torch.device) -> Self:
        return self._each(lambda table: table.to(device))

    def __getitem__(self, rows: slice | Tensor) -> Self:
        return self._each(lambda table: table[rows])

    def _each(self, change: Callable[[Tensor], Tensor]) -> Self:
        return type(self)(**{what: {k: change(t) for k, t in tables.items()} for what, tables in self.tables.items()})

    def _read(self, what: str, positions: Tensor, kind: int) -> Tensor:
        if kind not in self.tables[what]:
            raise KeyError(f"no recorded {what} numbers for {Draw(kind).name}")
        table = self.tables[what][kind]
        index = positions.expand(table.shape[0], -1) if positions.dim() == 2 else positions
        if index.dim() == 1:
            return table[:, index]
        return table[torch.arange(table.shape[0])[:, None], index]

    def uniform(self, positions: Tensor, kind: int, step: int = 0, count: int | None = None) -> Tensor:
        return self._read("uniform", positions, kind)

    def gumbel(self, positions: Tensor, kind: int = Draw.GUMBEL, step: int = 0, count: int = 1) -> Tensor:
        return self._read("gumbel", positions, kind)

    def normal(self, positions: Tensor, kind: int, step: int = 0, count: int | None = None) -> Tensor:
        return self._read("normal", positions, kind)
