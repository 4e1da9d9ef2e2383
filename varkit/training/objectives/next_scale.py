"""Training VAR on a frozen multi-scale tokenizer.

Source: FoundationVision/VAR: train.py, trainer.py (78b9539); paper arXiv 2404.02905, section 4.
"""

from __future__ import annotations

from typing import Any, Literal

from varkit.config import ConfigError, config
from varkit.generators.var import VAR
from varkit.training.objectives.generation import GeneratorConfig, GeneratorTraining
from varkit.training.optim import OptimConfig


@config
class Config(GeneratorConfig):
    """A VAR transformer and how it learns; `GeneratorConfig` has what all generators share."""

    name: Literal["next-scale"] = "next-scale"
    model: str = "var_d16"  # a registered generator, trained from nothing; the tokenizer gives its sizes
    label_smoothing: float = 0.0
    gamma_gain: float = 1e-3  # initial size of the gates' weights (official alng)
    progressive: float = 0.0  # share of the steps until all scales are trained (official pg); 0: always all
    progressive_from: int = 4  # scales after the first at the start (official pg0)

    def __post_init__(self) -> None:
        if not 0 <= self.progressive <= 1:
            raise ConfigError(f"objective.progressive is a share of the steps, 0 to 1; got {self.progressive}")
        if not 0 <= self.label_smoothing < 1:
            raise ConfigError(f"objective.label_smoothing must be in [0, 1); got {self.label_smoothing}")
        if self.progressive and self.mixed_prediction is not None:
            raise ConfigError(
                "objective.progressive trains the first scales only, objective.mixed_prediction predicts all: "
                "choose one"
            )
        super().__post_init__()


def progressive_stage(step: int, max_steps: int, warmup: int, share: float, first: int, last: int) -> tuple[int, float]:
    """Which scale is the newest at `step`, and the weight of its loss.

    Args: share: of the steps until the last scale.   first, last: scale indices.
    Source: FoundationVision/VAR: train.py:232-240, trainer.py:76-92.
    """

    def newest(s: int) -> int:
        end = max_steps * share
        if s <= warmup:
            return first
        if s >= end:
            return last
        return first + round((s - warmup) / (end - warmup) * (last - first))

    scale = newest(step)
    if scale in (first, last):
        return scale, 1.0
    low, high = 0, step  # the first step of this stage, by bisection: stages never go back
    while low < high:
        middle = (low + high) // 2
        low, high = (middle + 1, high) if newest(middle) < scale else (low, middle)
    return scale, min(max((step - low + 1) / max(max_steps / 300, 1), 0.01), 1.0)


class Training(GeneratorTraining):
    """Owns the transformer; see `GeneratorTraining`."""

    kind = VAR
    config: Config
    warmup = 0

    def sizes(self, tokenizer: Any) -> dict[str, Any]:
        layout = tokenizer.layout
        return {"scales": tokenizer.config.scales, "codebook_size": layout.codebook_size, "latent_dim": layout.dim}

    def fresh(self, sizes: dict[str, Any]) -> VAR:
        model: VAR = super().fresh(sizes)
        model.init_weights(gamma_gain=self.config.gamma_gain)
        return model

    def optim(self, phase: str, default: OptimConfig) -> OptimConfig:
        self.warmup = default.warmup_steps
        return default

    def options(self, step: int, max_steps: int) -> dict[str, Any]:
        options: dict[str, Any] = {"label_smoothing": self.config.label_smoothing}
        last = len(self.model.layout.grids) - 1
        if self.config.progressive:
            scale, weight = progressive_stage(
                step,
                max_steps,
                self.warmup,
                self.config.progressive,
                min(self.config.progressive_from, last),
                last,
            )
            options |= {"num_scales": scale + 1, "newest_weight": weight}
        return options
