"""Going on with clips by energies: frame after frame, each refined from noise downhill, the best of several kept."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.schedulers.scheduling_utils import SchedulerMixin
from torch import Tensor

from varkit.heads.energy import Energy, check_refinement
from varkit.interfaces import Cond, Generator, Tokenizer
from varkit.rng import Rng
from varkit.samplers.continuous import keep_known, put, take
from varkit.samplers.next_group import Known, SamplerOutput


@dataclass
class EnergyStep:
    """What `on_step` sees after each frame."""

    step: int
    num_steps: int
    positions: Tensor  # (n,)
    predicted: Tensor  # (B, n, C) as drawn, before known tokens replaced any
    tokens: Tensor  # (B, L, C), zero where nothing is decided
    energies: Tensor  # (B, N) of the refined candidates
    predictive: Energy  # with `refined`: the candidates themselves, and the energies of each step


@dataclass
class EnergyOutput(SamplerOutput):
    """`tokens` (B, L, C) float32. `head_calls`: how often candidates were scored, all N of a frame as one."""

    head_calls: int = 0


class EnergySampler(SchedulerMixin, ConfigMixin):
    """Goes on with the first frames of clips. The settings are defaults of a model's folder; `generate` takes any anew.

    Args:
        head_steps: of the descent of each frame; None is as many as in training. More think longer.
        candidates: refined for each frame, of which one is kept.   select: how, see `varkit.heads.energy.SELECT`.
        alpha: how far a step goes; None is as learned.
        noise: standard deviation of what each step adds to the embedded candidates; None is as in training.
    """

    @register_to_config
    def __init__(
        self,
        head_steps: int | None = None,
        candidates: int = 1,
        alpha: float | None = None,
        noise: float | None = None,
        select: str = "min_energy",
    ) -> None:
        self.settings(**dict(self.config))

    def settings(self, **changes: Any) -> dict[str, Any]:
        """The configured settings with those `changes` that are not None. Raises ValueError on a bad one."""
        merged = {name: value for name, value in self.config.items() if not name.startswith("_")}
        merged |= {k: v for k, v in changes.items() if v is not None and k in merged}
        check_refinement(*(merged[k] for k in ("head_steps", "candidates", "alpha", "noise", "select")))
        return merged

    def count_steps(self, transformer: Generator, known: Known | None = None, **changes: Any) -> int:
        """How many frames `generate` will draw. Raises ValueError where no first frame is known."""
        self.settings(**changes)
        return len(self._groups(transformer, known, None)[1])

    @staticmethod
    def _groups(transformer: Generator, known: Known | None, rng: Rng | None) -> tuple[Tensor, list[Tensor]]:
        if known is None:
            raise ValueError(
                f"{type(transformer).__name__} predicts what follows given frames: give the first frame or frames "
                f"(frames= of a pipeline, known= of a sampler)"
            )
        keep = known[1].expand(known[0].shape[:2])
        rng = Rng.from_seed(0, len(keep), device=keep.device) if rng is None else rng
        return transformer.groups_around(keep, rng)

    @torch.no_grad()
    def generate(
        self,
        tokenizer: Tokenizer,
        transformer: Generator,
        cond: Cond,
        rng: Rng,
        null: Cond | None = None,
        known: Known | None = None,
        on_step: Callable[[EnergyStep], None] | None = None,
        **changes: Any,
    ) -> EnergyOutput:
        """Draw the latents of one clip for each row of `cond`.

        Args: as those of `NextGroupSampler.generate`; `known` holds latents (B, L, C), those of one frame at least, and
            `null` is not read.
        Raises: ValueError on a bad setting, where no first frame is known, or parts with different layouts.
        """
        settings = self.settings(**changes)
        transformer.layout.require(tokenizer.layout, "the generator", "the tokenizer")
        before, groups = self._groups(transformer, known, rng)
        assert known is not None
        batch, length, dim = len(cond), transformer.layout.length, transformer.layout.dim
        began = time.perf_counter()
        state = transformer.start(cond)
        every = torch.zeros(batch, length, dim, device=before.device)

        def record(tokens: Tensor, positions: Tensor) -> None:
            transformer.append(state, tokens, positions)
            put(every, positions, tokens)

        record(take(known[0], before).to(every).expand(batch, -1, -1), before)
        calls = 0
        for step, positions in enumerate(groups):
            predictive = transformer.predict(state, every[:, positions], positions)
            if not isinstance(predictive, Energy):
                raise ValueError(f"{type(transformer).__name__} gives no energies: draw with {transformer.sampler}")
            how = {name: settings[name] for name in ("candidates", "alpha", "noise", "select")}
            predicted = predictive.sample(rng, positions, num_steps=settings["head_steps"], **how).float()
            calls += predictive.calls
            record(keep_known(predicted, known, positions), positions)
            if on_step is not None:
                energies = predictive.refined.energies
                on_step(EnergyStep(step, len(groups), positions, predicted, every, energies, predictive))
        return EnergyOutput(every, len(groups), len(groups), time.perf_counter() - began, calls)
