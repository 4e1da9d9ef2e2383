"""ZipAR: rows of a grid are decoded side by side, each a few tokens behind the one above it. It needs no training; it
is not lossless.

Sources: He et al., "ZipAR: Parallel Auto-regressive Image Generation through Spatial Locality", arXiv 2412.04062;
ThisisBillhe/ZipAR: LlamaGen-ZipAR/autoregressive/models/generate_zipar.py (2a5695c).

A row begins once the one above it has `window` tokens; a pass reads the newest token of every row that is open. What
precedes a row's first token in the raster, the last token of the row above, is not there yet: the newest token of the
row above stands in for it, at its place, until it is, and then it is read once more. Rows 0 and 1 are not begun early,
and h rows of w tokens take 2 w + (h - 2) window passes. With a window of a row it is plain decoding.

What is not decided yet is masked. `official_quirks=True` is as released: it is attended to as zero keys and values, and
what stands in is the newest token of the second row above. A draw is keyed by its position, as in plain decoding. The
window of the paper's later version, which a test moves, was not released and is not here.

Shapes: B images, R rows of the cache (2 B under guidance), n entries of a pass, L tokens, G parts of factorised codes.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from diffusers.configuration_utils import register_to_config
from diffusers.schedulers.scheduling_utils import SchedulerMixin
from torch import Tensor

from varkit.heads.categorical import Categorical, pick
from varkit.interfaces import Cond, Generator, Tokenizer
from varkit.layers.cache import CacheSlots, KVCache
from varkit.rng import Draw, Rng
from varkit.samplers.next_group import Known, NextGroupSampler, SamplerOutput, StepInfo
from varkit.samplers.speculative.target import Target, check_target, target_of

# ---- which tokens a pass decides ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class ZipStep:
    """One pass. An entry stands before a position of the raster, which it predicts where it is drawn.

    positions: (n,) int64, rising.   drawn: (n,) bool; the others are read for their keys alone.
    reads: (n,) int64, the position of the token that each reads: the one before, or what stands in for it.
    copied: a position and the one whose token it gets, before the pass (`official_quirks`).
    """

    positions: Tensor
    drawn: Tensor
    reads: Tensor
    copied: tuple[int, int] | None = None


def zip_steps(grid: Sequence[int], window: int, official_quirks: bool = False) -> list[ZipStep]:
    """The passes of a grid (h, w); the first reads what stands before the image.

    Args: official_quirks: what stands in is of the second row above; with a window of a whole row it is not drawn over:
        the row begins with a copy of it.
    """
    height, width = grid
    copying = official_quirks and window >= width
    counts, again, early, steps = [0] * height, -1, set[int](), list[ZipStep]()
    while sum(counts) < height * width:
        entries, copied, done = list[tuple[int, bool, int]](), None, list(counts)
        if again >= 0:
            entries.append((again, False, again - 1))
            again = -1
        for row in range(height):
            if row and done[row - 1] < (width if row == 1 else min(window, width)):
                break
            if done[row] == width:
                continue
            position = row * width + done[row]
            if copying and row > 1 and done[row] == 0:
                copied = (position, (row - 1) * width - 1)
                entries += [(position, False, position - 1), (position + 1, True, position)]
                counts[row] += 2
                continue
            reads = position - 1
            if row and done[row] == 0 and done[row - 1] < width:
                above = row - 2 if official_quirks else row - 1
                reads = above * width + done[above] - 1
                early.add(row)
            entries.append((position, True, reads))
            counts[row] += 1
        for row in early:  # of one whose row above is whole now, the entry that read another token
            if counts[row - 1] == width > done[row - 1]:
                again = row * width
        positions, drawn, read = zip(*entries, strict=True)
        steps.append(ZipStep(torch.tensor(positions), torch.tensor(drawn), torch.tensor(read), copied))
    return steps


class ScatteredSlots(CacheSlots):
    """Entries anywhere in a cache, each of which sees those before it that were ever written.

    Args: cache: its final positions are seen by all.   zeros: see what was not written too, as zero keys and values.
    """

    def __init__(self, cache: KVCache, zeros: bool = False) -> None:
        super().__init__(cache.keys, cache.values, torch.zeros(1, dtype=torch.int64, device=cache.keys[0].device))
        self.written = torch.arange(cache.keys[0].shape[2], device=self.positions.device) < cache.length
        if zeros:
            for memory in (*cache.keys, *cache.values):
                memory[:, :, cache.length :] = 0
        self.zeros = zeros

    def open(self, places: Tensor) -> None:
        """Where the next entries are written, (n,) int64."""
        self.positions = self.places = places
        self.written[places] = True
        self.end = int(places.max()) + 1

    def extend(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        keys, values = super().extend(layer, k, v)
        return keys[:, :, : self.end], values[:, :, : self.end]

    def visible(self, seen: Tensor | None = None) -> Tensor | None:
        every = torch.arange(self.end, device=self.positions.device)
        mask = (every <= self.positions[:, None])[None, None]
        if not self.zeros:
            mask = mask & self.written[: self.end]
        return mask if seen is None else mask & seen[:, None, None, : self.end]


# ---- the sampler --------------------------------------------------------------------------------------------------


@dataclass
class ZipAROutput(SamplerOutput):
    """As of any sampler; lists have one number an image.

    target_calls: passes.   tokens_per_call: tokens by passes.   lossless: whether this is plain decoding.
    """

    target_calls: list[int]
    tokens_per_call: list[float]
    lossless: bool


class ZipARSampler(NextGroupSampler, SchedulerMixin):  # named here too: diffusers looks for it in this module
    """Decode rows of a grid side by side.

    Args:
        window: tokens that a row has before the next one begins.
        official_quirks: as released, see the module; the window is then at least 2 and at most a row.
        others: see `NextGroupSampler`; guidance of a token is that of its turn in the raster. `more_smooth`,
            `num_tokens`, another `num_steps` and any order but the raster are refused.
    """

    @register_to_config
    def __init__(
        self,
        window: int = 8,
        official_quirks: bool = False,
        guidance_scale: float = 1.0,
        guidance_schedule: str = "linear",
        guidance_interval: Sequence[int] | None = None,
        temperature: float = 1.0,
        top_k: int = 0,
        top_p: float = 1.0,
        min_p: float = 0.0,
        more_smooth: bool = False,
        num_tokens: int | None = None,
        guidance_power: float = 1.0,
        num_steps: int | None = None,
        order: str | None = None,
    ) -> None:
        self.settings(**dict(self.config))

    def settings(self, **changes: Any) -> dict[str, Any]:
        merged = super().settings(**changes)
        least = 2 if self.config.official_quirks else 1
        if not isinstance(self.config.window, int) or self.config.window < least:
            raise ValueError(f"window must be a whole number of tokens, at least {least}; got {self.config.window!r}")
        if merged["order"] not in (None, "raster") or merged["num_tokens"] is not None or merged["more_smooth"]:
            raise ValueError(
                "ZipAR decodes all rows of the raster side by side, and ids: leave out order, num_tokens, more_smooth"
            )
        return merged

    @staticmethod
    def check(transformer: Any) -> None:
        """Raises ValueError unless the model decides a grid of tokens in raster order, one a step."""
        check_target(transformer, "ZipAR")
        grids = transformer.layout.grids
        if len(grids) != 1 or len(grids[0]) != 2:
            raise ValueError(
                f"ZipAR decodes rows of a grid (h, w) side by side; {type(transformer).__name__} has tokens of grids "
                f"{grids}. Leave the sampler out"
            )

    def steps(self, transformer: Generator) -> list[ZipStep]:
        """The passes that `generate` will take. Raises ValueError as `check`, or on a window longer than released."""
        self.check(transformer)
        grid, quirks = transformer.layout.grids[0], self.config.official_quirks
        if quirks and self.config.window > grid[1]:
            raise ValueError(f"as released the window is at most a row, {grid[1]} tokens; got {self.config.window}")
        return zip_steps(grid, self.config.window, quirks)

    def count_steps(self, transformer: Generator, known: Known | None = None, **changes: Any) -> int:
        return len(self.steps(transformer))

    @torch.no_grad()
    def generate(
        self,
        tokenizer: Tokenizer,
        transformer: Generator,
        cond: Cond,
        rng: Rng,
        null: Cond | None = None,
        known: Known | None = None,
        on_step: Callable[[StepInfo], None] | None = None,
        draw: Callable[[Any, Tensor], Tensor] | None = None,
        **changes: Any,
    ) -> ZipAROutput:
        """As `NextGroupSampler.generate`; known tokens take the place of what stands in for them.

        Raises: ValueError on a bad setting, or a model without a raster of tokens, before any work.
        """
        settings = self.settings(**changes)
        if draw is not None:
            raise ValueError("ZipAR draws by the numbers of positions: draw= goes with NextGroupSampler")
        transformer.layout.require(tokenizer.layout, "the generator", "the tokenizer")
        steps, groups = self.steps(transformer), self.groups(transformer, **settings)
        began = time.perf_counter()
        run = _Run(target_of(transformer, cond, null, settings, groups), rng, known, self.config.official_quirks)
        decided = list[Tensor]()
        for number, step in enumerate(steps):
            predicted = run.step(step)
            positions = step.positions[step.drawn]
            decided.append(positions)
            if on_step is not None:
                tokens = run.tokens[:, torch.cat(decided)]
                on_step(StepInfo(number, len(steps), positions, predicted, tokens, torch.empty(0)))
        return ZipAROutput(
            tokens=run.tokens,
            steps=len(steps),
            network_calls=len(steps),
            seconds=time.perf_counter() - began,
            target_calls=[len(steps)] * len(cond),
            tokens_per_call=[transformer.layout.length / len(steps)] * len(cond),
            lossless=len(steps) == transformer.layout.length,
        )


class _Run:
    """One batch on its way. `target` must be fresh; it makes laws, its window is not used."""

    def __init__(self, target: Target, rng: Rng, known: Known | None, zeros: bool) -> None:
        self.target, self.zeros, batch, length = target, zeros, len(target.turns), len(target.order)
        device = target.order.device
        self.slots: ScatteredSlots | None = None
        self.known = None if known is None else (known[0], known[1].expand(batch, length))
        count = target.factors[0] if target.factors else None
        self.uniform = rng.uniform(target.order, Draw.TOKEN, count=count)  # B L, B L G
        self.tokens = torch.zeros(batch, length, *target.factors, dtype=torch.int64, device=device)

    def with_known(self, tokens: Tensor, positions: Tensor) -> Tensor:
        """Tokens (B, n) or (B, n, G) with the known ones of positions (n,) in their places."""
        if self.known is None:
            return tokens
        given, keep = self.known[0][:, positions], self.known[1][:, positions]
        return torch.where(keep[..., None] if tokens.dim() == 3 else keep, given, tokens)

    def step(self, step: ZipStep) -> Tensor:
        """One pass. Returns what was drawn, before known tokens replaced any, (B, n) or (B, n, G)."""
        target, device = self.target, self.tokens.device
        if step.copied is not None:
            self.tokens[:, step.copied[0]] = self.tokens[:, step.copied[1]]
        positions = step.positions[step.drawn].to(device)
        law = target.first()[:, None] if self.slots is None else self.look(step)
        uniform = self.uniform[:, positions]
        predicted = pick(law.flatten(0, -2), uniform.flatten()).view_as(uniform)
        self.tokens[:, positions] = self.with_known(predicted, positions)
        if self.slots is None:
            target.model.append(target.state, self.tokens[:, :1], positions)
            self.base = target.state.cache.length - 1  # the entry before position p stands at base + p
            self.slots = ScatteredSlots(target.state.cache, self.zeros)
        return predicted

    def look(self, step: ZipStep) -> Tensor:
        """Laws (B, n, V) or (B, n, G, V) of the positions that are drawn."""
        target, model, device = self.target, self.target.model, self.tokens.device
        assert self.slots is not None
        positions, drawn, before = step.positions.to(device), step.drawn.to(device), (step.positions - 1).to(device)
        self.slots.open(self.base + positions)
        inputs = self.with_known(self.tokens[:, step.reads.to(device)], before)
        if target.null is not None:
            inputs = torch.cat([inputs, inputs])
        hidden = model.nodes(inputs, self.slots, positions, model.extra(target.state, before))
        logits = model.output_of(hidden[:, drawn]).chunk(1 if target.null is None else 2)
        return target.law(Categorical(*logits), positions[drawn].expand(len(self.tokens), -1))
