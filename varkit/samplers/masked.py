"""Masked parallel decoding: predict all open positions, draw, keep the surest, open the others again.

Sources: MaskGIT (Chang et al., arXiv 2202.04200, section 3.2); bytedance/1d-tokenizer: modeling/maskgit.py (942a96f).
The release draws ids and confidences by adding Gumbel noise of scale `choice_temperature * (1 - ratio)`. For ids that
is the softmax at this temperature, which one uniform number draws; the confidence keeps its noise. The release counts
what is masked again on the first image of a batch; here every image counts its own, which is the same number unless
known tokens differ between images.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.schedulers.scheduling_utils import SchedulerMixin
from torch import Tensor

from varkit.config import nearest
from varkit.heads.categorical import Categorical, pick
from varkit.interfaces import Cond, Generator, Processor, Tokenizer
from varkit.orders import check_order
from varkit.rng import Draw, Rng
from varkit.samplers.guidance import guidance_schedule
from varkit.samplers.next_group import Known, SamplerOutput, StepInfo
from varkit.samplers.processors import build_processors, scale_temperature

MASK_SCHEDULES: dict[str, Callable[[float], float]] = {
    "arccos": lambda ratio: math.acos(ratio) * 2 / math.pi,
    "cosine": lambda ratio: math.cos(math.pi / 2 * ratio),
    "linear": lambda ratio: 1 - ratio,
}
"""The share that stays masked after the share `ratio` of the steps; 1 at 0, 0 at 1."""
DRAWS = ("annealed", "plain")
CONFIDENCES = ("logit", "log-prob")


def _one_of(name: str, value: Any, allowed: Any) -> None:
    if value not in allowed:
        raise ValueError(f"{name} must be one of {', '.join(allowed)}; got {value!r}{nearest(str(value), allowed)}")


class MaskedSampler(SchedulerMixin, ConfigMixin):
    """Parallel decoding of a masked generator, whose `mask_id` stands where nothing is decided.

    The settings are defaults of a model's folder; `generate` takes any of them anew.

    Args:
        guidance_scale, guidance_schedule, guidance_power: as in `NextGroupSampler`.
        temperature, top_k, top_p, min_p: as in transformers (top_k 0, top_p 1, min_p 0 are off).
        num_steps: None is the generator's own number.
        mask_schedule: `arccos`, `cosine` or `linear`: how many tokens stay masked.
        choice_temperature: of the noise on ids and confidences, times 1 - ratio; 0 is greedy.
        draw: `annealed` draws ids at that temperature too (TiTok); `plain` from the softmax as it is (MaskGIT).
        confidence: `logit` (TiTok) or `log-prob` (MaskGIT) of what was drawn; of factorised ids, the mean over factors.
        softmax_annealing: divide logits by 0.5 + 0.8 (1 - ratio) before all else.
        order: which tokens stay in each step, by a name of `varkit.orders`, such as `lpd`, in groups as large as those
            of the generator's schedule; None is by confidence.
    """

    @register_to_config
    def __init__(
        self,
        guidance_scale: float = 1.0,
        guidance_schedule: str = "linear-open",
        guidance_power: float = 1.0,
        temperature: float = 1.0,
        top_k: int = 0,
        top_p: float = 1.0,
        min_p: float = 0.0,
        num_steps: int | None = None,
        mask_schedule: str = "arccos",
        choice_temperature: float = 4.5,
        draw: str = "annealed",
        confidence: str = "logit",
        softmax_annealing: bool = False,
        order: str | None = None,
    ) -> None:
        self.settings(**dict(self.config))

    def settings(self, **changes: Any) -> dict[str, Any]:
        """The configured settings with those `changes` that are not None. Raises ValueError on a bad one."""
        merged = {name: value for name, value in self.config.items() if not name.startswith("_")}
        merged |= {k: v for k, v in changes.items() if v is not None and k in merged}
        guidance_schedule(merged["guidance_schedule"], merged["guidance_power"])
        self._processors(merged)
        _one_of("mask_schedule", merged["mask_schedule"], MASK_SCHEDULES)
        _one_of("draw", merged["draw"], DRAWS)
        _one_of("confidence", merged["confidence"], CONFIDENCES)
        if merged["order"] is not None:
            check_order(merged["order"])
        if merged["choice_temperature"] < 0:
            raise ValueError(f"choice_temperature must be >= 0 (0 is greedy); got {merged['choice_temperature']}")
        if merged["num_steps"] is not None and merged["num_steps"] < 1:
            raise ValueError(f"num_steps must be at least 1; got {merged['num_steps']}")
        return merged

    @staticmethod
    def _processors(settings: dict[str, Any]) -> list[Processor]:
        return build_processors(**{k: settings[k] for k in ("temperature", "top_k", "top_p", "min_p")})

    def count_steps(self, transformer: Generator, **changes: Any) -> int:
        """How many steps `generate` will take."""
        return self.settings(**changes)["num_steps"] or len(transformer.schedule())

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
        **changes: Any,
    ) -> SamplerOutput:
        """Sample one token sequence for each row of `cond`: arguments and errors as `NextGroupSampler.generate`.

        Raises: ValueError also when the generator is not a masked one.
        """
        settings = self.settings(**changes)
        transformer.layout.require(tokenizer.layout, "the generator", "the tokenizer")
        if transformer.causal or transformer.mask_id is None:
            raise ValueError(f"MaskedSampler draws from masked generators; {type(transformer).__name__} is none")
        schedule = guidance_schedule(settings["guidance_schedule"], settings["guidance_power"])
        w, steps = float(settings["guidance_scale"]), self.count_steps(transformer, **settings)
        if w != 1 and null is None:
            raise ValueError(f"guidance_scale {w:g} needs the unconditional branch (null=)")
        every = torch.cat(transformer.schedule()).sort().values  # all positions
        turn = None if settings["order"] is None else turns_of(transformer.in_order(settings["order"], steps))
        began = time.perf_counter()
        state = transformer.start(cond, null if w != 1 else None)
        ids = _masked(transformer, len(cond), every.device)
        if known is not None:
            ids = torch.where(_beside(known[1].expand(ids.shape[:2]), ids), known[0], ids)
        total = _open(ids, transformer).sum(1)  # B
        for step in range(steps):
            state.reset()
            transformer.append(state, ids, every)
            predictive = transformer.predict(state, ids, every)
            assert isinstance(predictive, Categorical)
            if w != 1:
                predictive = predictive.guide(schedule(w, step, steps - 1))
            ratio = (step + 1) / steps
            drawn, confidence = self._draw(predictive, rng, every, step, ratio, settings)
            still_open = _open(ids, transformer)
            drawn = torch.where(_beside(still_open, ids), drawn, ids)
            if step < steps - 1:
                if turn is None:
                    count = (total * MASK_SCHEDULES[settings["mask_schedule"]](ratio)).floor().long()
                    again = least_sure(confidence, still_open, count)
                else:
                    again = still_open & (turn > step)
                ids = drawn.masked_fill(_beside(again, ids), transformer.mask_id)
            else:
                ids = drawn
            if on_step is not None:
                on_step(StepInfo(step, steps, every, drawn, drawn, predictive.logits))
        return SamplerOutput(ids, steps, steps, time.perf_counter() - began)

    def _draw(
        self, predictive: Categorical, rng: Rng, every: Tensor, step: int, ratio: float, settings: dict[str, Any]
    ) -> tuple[Tensor, Tensor]:
        """Ids (B, L) or (B, L, G), and how sure each position is of them, (B, L)."""
        heat = settings["choice_temperature"] * (1 - ratio)
        processors = self._processors(settings)
        if settings["softmax_annealing"]:
            processors.insert(0, partial(scale_temperature, value=0.5 + 0.8 * (1 - ratio)))
        logits = predictive.process(processors).logits  # B L V, or B L G V
        factors = logits.shape[2] if logits.dim() == 4 else None
        if settings["draw"] == "annealed" and heat == 0:
            drawn = logits.argmax(-1)
        else:
            uniform = rng.uniform(every, Draw.TOKEN, step=step, count=factors)
            drawn = pick((logits / heat if settings["draw"] == "annealed" else logits).softmax(-1), uniform)
        scores = logits.log_softmax(-1) if settings["confidence"] == "log-prob" else logits
        confidence = scores.gather(-1, drawn[..., None])[..., 0]
        if factors is not None:
            confidence = confidence.mean(-1)
        if heat > 0:
            confidence = confidence + heat * rng.gumbel(every, Draw.CONFIDENCE, step=step)[..., 0]
        return drawn, confidence


def turns_of(groups: list[Tensor]) -> Tensor:
    """(L,): of each position, the number of its group."""
    turn = torch.empty(sum(len(group) for group in groups), dtype=torch.int64, device=groups[0].device)
    for step, group in enumerate(groups):
        turn[group] = step
    return turn


def _masked(transformer: Generator, batch: int, device: torch.device) -> Tensor:
    """(B, L) or (B, L, G): nothing decided."""
    size = transformer.layout.codebook_size
    factors = (len(size),) if isinstance(size, tuple) else ()
    shape = (batch, transformer.layout.length, *factors)
    return torch.full(shape, transformer.mask_id or 0, dtype=torch.int64, device=device)


def _open(ids: Tensor, transformer: Generator) -> Tensor:
    """(B, L): where nothing is decided. A position of factorised ids is masked as a whole."""
    masked = ids.eq(transformer.mask_id or 0)
    return masked.any(-1) if masked.dim() == 3 else masked


def _beside(mask: Tensor, ids: Tensor) -> Tensor:
    """(B, L) -> the dimensions of `ids`."""
    return mask[..., None] if ids.dim() == 3 else mask


def least_sure(confidence: Tensor, still_open: Tensor, count: Tensor) -> Tensor:
    """Which of the open positions are masked again: the `count` (B,) least confident of each image.

    At least one, and at least one fewer than are open, as far as there are any. All (B, L).
    """
    confidence = confidence.masked_fill(~still_open, torch.inf)
    count = torch.minimum(still_open.sum(1) - 1, count).clamp_min(1)
    bound = confidence.sort(1).values.gather(1, count[:, None] - 1)
    return (confidence <= bound) & still_open
