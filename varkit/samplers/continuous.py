"""Sampling continuous tokens group by group: predict, guide, draw by a flow or a diffusion, record.

A group is what the generator says: a token, a cell, a scale, a random set of positions of each image's own. Its head
draws all tokens of a group in one integration.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.schedulers.scheduling_utils import SchedulerMixin
from torch import Tensor

from varkit.heads.categorical import Categorical
from varkit.heads.diffusion import SOLVERS as DIFFUSION_SOLVERS
from varkit.heads.diffusion import Diffusion
from varkit.heads.flow import Flow
from varkit.heads.gaussian import spaced
from varkit.interfaces import Cond, Generator, Predictive, Tokenizer
from varkit.rng import Rng
from varkit.samplers.branches import check_guidance_every
from varkit.samplers.guidance import guidance_interval, guidance_schedule
from varkit.samplers.next_group import Known, SamplerOutput
from varkit.samplers.ode import SOLVERS, time_interval


@dataclass
class ContinuousStep:
    """What `on_step` sees after each group."""

    step: int
    num_steps: int
    positions: Tensor  # (n,) or (B, n)
    predicted: Tensor  # (B, n, C) as drawn, before known tokens replaced any
    tokens: Tensor  # (B, L, C), zero where nothing is decided
    predictive: Predictive  # guided
    guidance: float  # how strongly


@dataclass
class ContinuousOutput(SamplerOutput):
    """`tokens` (B, L, C) float32; what the flow or diffusion took, besides the `network_calls` of the generator.

    `head_calls`: its evaluations, those of both branches as one; `null_calls`: how many of them were of both. So
    head_calls + null_calls rows were evaluated for each image.
    """

    head_calls: int = 0
    null_calls: int = 0


class ContinuousSampler(SchedulerMixin, ConfigMixin):
    """Draws the tokens of one group after another from a `Flow` or a `Diffusion`.

    The settings are defaults of a model's folder; `generate` takes any of them anew.

    Args:
        guidance_scale: w of uncond + w (cond - uncond); 1 is off.
        guidance_schedule, guidance_power: over the groups, see `varkit.samplers.guidance`; where the generator says
            so (`guidance_by = "tokens"`, as MAR), over the share of tokens, see `token_progress`.
        guidance_interval: first and last guided group, counted from 0. None is all.
        guidance_times: lowest and highest time t of a flow at which guidance is on, 1 being noise. None is all.
        guidance_every: k: within a group the unconditional branch runs in each k-th guided step of the head alone;
            its difference from the conditional one is foretold in between (`varkit.samplers.branches`). 1 is exact.
        num_steps: of groups, where the generator can take several numbers; None is its own.
        head_steps: of the integration of a group; of a diffusion also how they are spaced, such as "ddim50", see
            `varkit.heads.gaussian.Spacing`.   head_steps_last: of the last group; between them the number falls
            (or rises) linearly over the groups (DiSA, arXiv 2505.20297). None is the same for all.
        solver: of the head, for a flow a name of `varkit.samplers.ode.SOLVERS`; None is its own.
        temperature: of its noise; 1 is neutral.
    """

    @register_to_config
    def __init__(
        self,
        guidance_scale: float = 1.0,
        guidance_schedule: str = "linear",
        guidance_power: float = 1.0,
        guidance_interval: Sequence[int] | None = None,
        guidance_times: Sequence[float] | None = None,
        num_steps: int | None = None,
        head_steps: int | str = 25,
        head_steps_last: int | None = None,
        solver: str | None = None,
        temperature: float = 1.0,
        guidance_every: int = 1,
    ) -> None:
        self.settings(**dict(self.config))

    def settings(self, **changes: Any) -> dict[str, Any]:
        """The configured settings with those `changes` that are not None. Raises ValueError on a bad one."""
        merged = {name: value for name, value in self.config.items() if not name.startswith("_")}
        merged |= {k: v for k, v in changes.items() if v is not None and k in merged}
        guidance_schedule(merged["guidance_schedule"], merged["guidance_power"])
        guidance_interval(merged["guidance_interval"])
        if merged["guidance_times"] is not None:
            merged["guidance_times"] = time_interval(merged["guidance_times"])
        check_guidance_every(merged["guidance_every"])
        known = dict.fromkeys([*SOLVERS, *DIFFUSION_SOLVERS])
        if merged["solver"] is not None and merged["solver"] not in known:
            raise ValueError(f"solver must be one of {', '.join(known)}; got {merged['solver']!r}")
        if isinstance(merged["head_steps"], str):
            spaced(merged["head_steps"])
            if merged["head_steps_last"] is not None:
                raise ValueError(f"head_steps_last goes with a number of head_steps; got {merged['head_steps']!r}")
        for name in ("num_steps", "head_steps", "head_steps_last"):
            if isinstance(merged[name], int) and merged[name] < 1:
                raise ValueError(f"{name} must be at least 1; got {merged[name]}")
        if not merged["temperature"] > 0:
            raise ValueError(f"temperature must be > 0 (1 is neutral); got {merged['temperature']}")
        return merged

    def count_steps(self, transformer: Generator, known: Known | None = None, **changes: Any) -> int:
        """How many groups `generate` will draw."""
        steps = self.settings(**changes)["num_steps"]
        if known is None:
            return len(transformer.schedule(steps))
        rng = Rng.from_seed(0, len(known[0]), device=known[0].device)
        return len(transformer.groups_around(known[1].expand(known[0].shape[:2]), rng, steps)[1])

    @torch.no_grad()
    def generate(
        self,
        tokenizer: Tokenizer,
        transformer: Generator,
        cond: Cond,
        rng: Rng,
        null: Cond | None = None,
        known: Known | None = None,
        on_step: Callable[[ContinuousStep], None] | None = None,
        **changes: Any,
    ) -> ContinuousOutput:
        """Sample the latents of one image for each row of `cond`.

        Args: as those of `NextGroupSampler.generate`; `known` holds latents (B, L, C).
        Raises: ValueError on a bad setting, a generator of ids, or parts with different layouts, before any work.
        """
        settings = self.settings(**changes)
        transformer.layout.require(tokenizer.layout, "the generator", "the tokenizer")
        if transformer.layout.codebook_size is not None:
            raise ValueError(f"ContinuousSampler draws latents; {type(transformer).__name__} predicts ids")
        w = float(settings["guidance_scale"])
        if w != 1 and null is None:
            raise ValueError(f"guidance_scale {w:g} needs the unconditional branch (null=)")
        batch, length, dim = len(cond), transformer.layout.length, transformer.layout.dim
        if known is None:
            before, groups = None, transformer.groups(rng, settings["num_steps"])
        else:
            before, groups = transformer.groups_around(known[1].expand(batch, length), rng, settings["num_steps"])
        device = groups[0].device
        began = time.perf_counter()
        state = transformer.start(cond, null if w != 1 else None)
        running = tokenizer.running(batch)
        every = torch.zeros(batch, length, dim, device=device)

        def record(tokens: Tensor, positions: Tensor) -> None:
            transformer.append(state, tokens, positions)
            running.record(tokens, positions)
            put(every, positions, tokens)

        decided, calls, null_calls = 0, 0, 0
        if known is not None and before is not None and before.numel():
            record(take(known[0], before).to(every), before)
            decided = before.shape[1]
        for step, positions in enumerate(groups):
            decided += positions.shape[-1]
            strength = 1.0 if w == 1 else strength_at(settings, step, len(groups), decided, transformer)
            state.expect_guidance(strength != 1)
            predictive: Any = transformer.predict(state, running.inputs(positions), positions)
            head_steps = settings["head_steps"]
            check_predictive(predictive, type(transformer).__name__, settings)
            if w != 1:
                more = {"interval": settings["guidance_times"], "every": settings["guidance_every"]}
                predictive = predictive.guide(strength, **{k: v for k, v in more.items() if v not in (None, 1)})
            if known is not None and isinstance(predictive, Flow):
                predictive.known = take(known[0], positions), take(known[1].expand(batch, length), positions)
            if isinstance(head_steps, int):
                head_steps = steps_of(step, len(groups), head_steps, settings["head_steps_last"])
            options = {"solver": settings["solver"]} if settings["solver"] is not None else {}
            predicted = predictive.sample(
                rng, positions, num_steps=head_steps, temperature=settings["temperature"], **options
            )
            calls, null_calls = calls + predictive.calls, null_calls + predictive.null_calls
            record(predicted if known is None else keep_known(predicted, known, positions), positions)
            if on_step is not None:
                on_step(ContinuousStep(step, len(groups), positions, predicted, every, predictive, strength))
        seconds = time.perf_counter() - began
        return ContinuousOutput(every, len(groups), len(groups), seconds, calls, null_calls)


def check_predictive(predictive: Predictive, name: str, settings: dict[str, Any]) -> None:
    """Raises ValueError when this is nothing to draw latents from, or not with such settings."""
    head_steps = settings["head_steps"]
    if isinstance(predictive, Categorical):
        raise ValueError(f"{name} gives logits: draw with NextGroupSampler")
    if settings["guidance_times"] is not None and not isinstance(predictive, Flow):
        raise ValueError(f"guidance_times are times of a flow; {name} gives none: leave it out")
    if isinstance(head_steps, str) and not isinstance(predictive, Diffusion):
        raise ValueError(f"head_steps {head_steps!r} spaces the steps of a diffusion; a flow takes a whole number")


def strength_at(settings: dict[str, Any], step: int, groups: int, decided: int, transformer: Generator) -> float:
    """How strongly group `step` of so many is guided. Args: decided: tokens, with those of this group."""
    first, last = guidance_interval(settings["guidance_interval"]) or (0, groups)
    if not first <= step <= last:
        return 1.0
    done, end = step, groups - 1
    if transformer.guidance_by == "tokens":
        done, end = token_progress(decided, transformer.layout.length, transformer.positions_per_token)
    schedule = guidance_schedule(settings["guidance_schedule"], settings["guidance_power"])
    return schedule(float(settings["guidance_scale"]), done, end)


def token_progress(decided: int, length: int, places: int = 1) -> tuple[int, int]:
    """What a schedule of guidance reads where tokens count: those decided, with the group at hand, of how many.

    The last group too leaves one token (of `places` positions) uncounted, so `linear` is 1 + (w - 1) (L - m) / L with
    m tokens masked after the group, and never quite w. Source: LTH14/mar: models/mar.py (fe470ac).
    """
    return min(decided, length - places), length


def steps_of(step: int, groups: int, head_steps: int, head_steps_last: int | None) -> int:
    """Steps of the head for group `step`: from head_steps to head_steps_last in a line, whole numbers below it.

    Source: Qinyu-Allen-Zhao/DiSA, whose rule for xAR and FlowAR it is.
    """
    if head_steps_last is None or groups == 1:
        return head_steps
    return int((groups - 1 - step) / (groups - 1) * (head_steps - head_steps_last) + head_steps_last)


def take(tokens: Tensor, positions: Tensor) -> Tensor:
    """(B, L, ...) at positions (n,) or (B, n) -> (B, n, ...)."""
    if positions.dim() == 1:
        return tokens[:, positions]
    return tokens[torch.arange(len(tokens), device=tokens.device)[:, None], positions]


def put(tokens: Tensor, positions: Tensor, values: Tensor) -> None:
    """Write values (B, n, ...) into tokens (B, L, ...) at positions (n,) or (B, n)."""
    if positions.dim() == 1:
        tokens[:, positions] = values.to(tokens.dtype)
    else:
        tokens[torch.arange(len(tokens), device=tokens.device)[:, None], positions] = values.to(tokens.dtype)


def keep_known(tokens: Tensor, known: Known, positions: Tensor) -> Tensor:
    """Latents (B, n, C) of a group with the known ones in their places."""
    given = take(known[0], positions)
    keep = take(known[1].expand(known[0].shape[:2]), positions)
    return torch.where(keep[..., None], given.to(tokens), tokens)
