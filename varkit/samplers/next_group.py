"""Sampling group by group: predict, guide, filter, draw, record. Which groups, the generator says."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.schedulers.scheduling_utils import SchedulerMixin
from torch import Tensor

from varkit.heads.categorical import Categorical, pick
from varkit.interfaces import Cond, Generator, PreviousToken, Running, Tokenizer
from varkit.orders import check_order
from varkit.rng import Draw, Rng
from varkit.samplers.guidance import guidance_interval, guidance_schedule
from varkit.samplers.processors import build_processors


@dataclass
class StepInfo:
    """What `on_step` sees after each group."""

    step: int
    num_steps: int
    positions: Tensor  # (n,)
    predicted: Tensor  # (B, n) ids as drawn, before known tokens replaced any
    tokens: Tensor  # (B, decided so far): ids, or (B, ., C) vectors when smoothing
    logits: Tensor  # (B, n, V) guided, not filtered


@dataclass
class SamplerOutput:
    """`tokens` (B, L) ids, or (B, L, C) vectors when smoothing; what it took."""

    tokens: Tensor
    steps: int
    network_calls: int
    seconds: float


Draws = Callable[[Categorical, Tensor], Tensor]
"""A filtered predictive and its positions (n,) -> ids (B, n)."""

Known = tuple[Tensor, Tensor]
"""Tokens (B, L) and a bool mask (L,) or (B, L): where it is True the given token is kept."""


class NextGroupSampler(SchedulerMixin, ConfigMixin):
    """Predict one group of positions after another; for VAR a group is a scale.

    The settings are defaults of a model's folder; `generate` takes any of them anew.

    Args:
        guidance_scale: w of uncond + w (cond - uncond); 1 is off.
        guidance_schedule: `constant`, `linear` (VAR's ramp), `cosine`, `late`, `linear-open` or `power-cosine` (RAR's).
        guidance_power: of power-cosine: the larger, the later guidance sets in; 0 is constant.
        guidance_interval: first and last guided step, counted from 0; outside the condition counts alone. None is all.
        temperature, top_k, top_p, min_p: as in transformers (top_k 0, top_p 1, min_p 0 are off).
        num_tokens: stop after the first so many tokens, for tokenizers that decode them; None is all.
        more_smooth: hand on mixtures of codes instead of codes (VAR's "for visualisation only"): smoother
            pictures, worse statistics.
        num_steps: None is the generator's own number.
        order: of the tokens, by its name in `varkit.orders`, for generators that can take any; None is their own.
    """

    @register_to_config
    def __init__(
        self,
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
        """The configured settings with those `changes` that are not None. Raises ValueError on a bad one."""
        names = [
            "guidance_scale",
            "guidance_schedule",
            "guidance_interval",
            "temperature",
            "top_k",
            "top_p",
            "min_p",
            "more_smooth",
            "num_tokens",
            "guidance_power",
            "num_steps",
            "order",
        ]
        merged = {name: self.config[name] for name in names}
        merged |= {k: v for k, v in changes.items() if v is not None and k in names}
        guidance_schedule(merged["guidance_schedule"], merged["guidance_power"])
        guidance_interval(merged["guidance_interval"])
        build_processors(**{k: merged[k] for k in ("temperature", "top_k", "top_p", "min_p")})
        if merged["order"] is not None:
            check_order(merged["order"])
        return merged

    def groups(self, transformer: Generator, **changes: Any) -> list[Tensor]:
        """The positions of each step, (n,) each, under these settings. Raises ValueError as the generator does."""
        settings = self.settings(**changes)
        if settings["order"] is None:
            groups = transformer.schedule(settings["num_steps"])
        else:
            groups = transformer.in_order(settings["order"])
        return first_groups(groups, settings["num_tokens"])

    def groups_around(
        self, transformer: Generator, known: Known | None, rng: Rng, **changes: Any
    ) -> tuple[Tensor, list[Tensor]]:
        """Positions (k,) of known tokens that are read before the first group, and the groups.

        There are such positions where a generator can take any order, no order is asked for, and the mask is one for
        all images, (L,).
        """
        settings = self.settings(**changes)
        if known is None or known[1].dim() > 1 or settings["order"] is not None or settings["num_tokens"] is not None:
            return torch.empty(0, dtype=torch.int64), self.groups(transformer, **changes)
        before, groups = transformer.groups_around(known[1][None], rng[:1], settings["num_steps"])
        return before[0], groups

    def count_steps(self, transformer: Generator, known: Known | None = None, **changes: Any) -> int:
        """How many steps `generate` will take."""
        return len(self.groups_around(transformer, known, Rng.from_seed(0, 1), **changes)[1])

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
        draw: Draws | None = None,
        **changes: Any,
    ) -> SamplerOutput:
        """Sample one token sequence for each row of `cond`.

        Args:
            null: the unconditional branch; needed unless guidance_scale is 1.
            known: tokens to keep: the hook of in-painting, out-painting and editing; see `groups_around`.
            on_step: called after each group.
            draw: how ids are drawn; None is by one uniform number each.
            changes: settings to use instead of the configured ones.
        Raises: ValueError on a bad setting, or on parts with different layouts, before any work.
        """
        settings = self.settings(**changes)
        transformer.layout.require(tokenizer.layout, "the generator", "the tokenizer")
        processors = build_processors(**{k: settings[k] for k in ("temperature", "top_k", "top_p", "min_p")})
        schedule = guidance_schedule(settings["guidance_schedule"], settings["guidance_power"])
        w = float(settings["guidance_scale"])
        first, last = guidance_interval(settings["guidance_interval"]) or (0, transformer.layout.length)
        if w != 1 and null is None:
            raise ValueError(f"guidance_scale {w:g} needs the unconditional branch (null=)")
        before, groups = self.groups_around(transformer, known, rng, **settings)
        size = transformer.layout.codebook_size
        if settings["more_smooth"] and isinstance(size, tuple):
            raise ValueError(
                "more_smooth hands on mixtures of codes, but this model's codes are factorised: leave it off"
            )
        # One draw for all positions: a number depends on its position, not on when it is asked for.
        every = torch.arange(transformer.layout.length, device=(groups[0] if groups else before).device)
        uniform = rng.uniform(every, Draw.TOKEN, count=len(size) if isinstance(size, tuple) else None)  # B L, B L G
        began = time.perf_counter()
        state = transformer.start(cond, null if w != 1 else None)
        running: Running = tokenizer.running(len(cond))
        if settings["order"] is not None or before.numel():
            factors = (len(size),) if isinstance(size, tuple) else ()
            running = PreviousToken((len(cond), len(every), *factors), every.device, torch.cat([before, *groups]))
        total, count, decided = len(before) + sum(len(g) for g in groups), len(before), torch.empty(0)
        if known is not None and count:
            given = known[0][:, before]
            running.record(given, before)
            transformer.predict(state, running.inputs(before), before)  # what it says is not used: keys are written
            transformer.append(state, given, before)
            decided = given.new_empty(len(given), total, *given.shape[2:])
            decided[:, :count] = given
        passed = count
        for step, positions in enumerate(groups):
            predictive = transformer.predict(state, running.inputs(positions), positions)
            assert isinstance(predictive, Categorical)
            if w != 1:
                turn = step + passed  # one token a step where known ones come first
                scale = schedule(w, turn, len(groups) + passed - 1) if first <= turn <= last else 1.0
                predictive = predictive.guide(scale)
            filtered = predictive.process(processors)
            if draw is None:
                predicted = pick(filtered.probs(), uniform[:, positions])
            else:
                predicted = draw(filtered, positions)
            tokens = predicted
            if settings["more_smooth"]:
                progress = (step + passed) / max(len(groups) + passed - 1, 1)
                noise = rng.gumbel(positions, Draw.GUMBEL, count=filtered.logits.shape[-1])
                tokens = mixture(filtered.logits, noise, progress) @ tokenizer.codebook
            if known is not None:
                tokens = keep_known(tokens, known, positions, tokenizer)
            transformer.append(state, tokens, positions)
            running.record(tokens, positions)
            if count == 0:
                decided = tokens.new_empty(len(tokens), total, *tokens.shape[2:])
            decided[:, count : count + len(positions)] = tokens
            count += len(positions)
            if on_step is not None:
                on_step(StepInfo(step, len(groups), positions, predicted, decided[:, :count], predictive.logits))
        in_layout_order = decided[:, torch.cat([before, *groups]).argsort()]
        calls = len(groups) + bool(passed)
        return SamplerOutput(in_layout_order, len(groups), calls, time.perf_counter() - began)


def first_groups(groups: list[Tensor], num_tokens: int | None) -> list[Tensor]:
    """The groups that decide positions 0 .. num_tokens - 1; None is all of them.

    Raises: ValueError when no number of first groups decides just these.
    """
    if num_tokens is None:
        return groups
    ends, count, last = [], 0, -1
    for positions in groups:
        count, last = count + len(positions), max(last, int(positions.max()))
        ends.append(count if last + 1 == count else 0)
    if num_tokens not in ends or num_tokens < 1:
        possible = [n for n in ends if n]
        shown = f"1 to {possible[-1]}" if possible == list(range(1, len(ends) + 1)) else ", ".join(map(str, possible))
        raise ValueError(f"this model can stop after {shown} tokens; got num_tokens={num_tokens}")
    return groups[: ends.index(num_tokens) + 1]


def mixture(logits: Tensor, gumbel: Tensor, progress: float) -> Tensor:
    """Weights (B, n, V) of a soft pick that hardens from the first scale (0) to the last (1).

    Source: FoundationVision/VAR: models/var.py, `more_smooth`.
    """
    tau = max(0.27 * (1 - 0.95 * progress), 0.005)
    return ((logits * (1 + progress) + gumbel) / tau).softmax(-1)


def keep_known(tokens: Tensor, known: Known, positions: Tensor, tokenizer: Tokenizer) -> Tensor:
    """`tokens` of a group (ids or vectors) with the known ones in their places."""
    given, keep = known[0][:, positions], known[1][..., positions]
    if tokens.is_floating_point():
        return torch.where(keep[..., None], tokenizer.vectors(given), tokens)
    return torch.where(keep[..., None] if given.dim() == 3 else keep, given, tokens)  # of factorised ids, all factors
