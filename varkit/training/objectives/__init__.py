"""What can be trained. Each objective is one file; a recipe names one by `objective.name`."""

from __future__ import annotations

from importlib import import_module
from typing import Any

from varkit.config import ConfigError, build, nearest
from varkit.interfaces import Objective
from varkit.pipelines.auto import tokenizer_frames

OBJECTIVES = {
    "multiscale-vq": "varkit.training.objectives.multiscale_vq",
    "vq": "varkit.training.objectives.vq",
    "titok": "varkit.training.objectives.titok",
    "bae": "varkit.training.objectives.binary_autoencoder",
    "kl-vae": "varkit.training.objectives.kl_vae",
    "larp": "varkit.training.objectives.larp",
    "flextok": "varkit.training.objectives.flextok",
    "video-vq": "varkit.training.objectives.video_vq",
    "next-scale": "varkit.training.objectives.next_scale",
    "next-token": "varkit.training.objectives.next_token",
    "next-entity": "varkit.training.objectives.next_entity",
    "energy": "varkit.training.objectives.energy",
    "distilled": "varkit.training.objectives.distilled",
    "sub-codes": "varkit.training.objectives.sub_codes",
    "eagle": "varkit.training.objectives.eagle",
    "classifier": "varkit.training.objectives.classifier",
    "clip-classifier": "varkit.training.objectives.clip_classifier",
    "matcher": "varkit.training.objectives.matcher",
}
"""Name -> module; each module has `Config` and `Training`, and `CLIPS = True` where it always takes clips."""


def objective_module(name: Any) -> Any:
    """Raises ConfigError naming the nearest objective when `name` is none."""
    if name not in OBJECTIVES:
        raise ConfigError(
            f"objective.name must be one of {', '.join(OBJECTIVES)}; got {name!r}{nearest(str(name), OBJECTIVES)}"
        )
    return import_module(OBJECTIVES[name])


def objective_config(values: dict[str, Any], source: str = "") -> Any:
    """The `objective:` section of a recipe, checked by its objective's own Config."""
    return build(objective_module(values.get("name")).Config, values, source=source, prefix="objective.")


def takes_clips(config: Any) -> bool:
    """Whether an objective takes clips, before it is built: always, by its num_frames, or because its tokenizer codes
    them."""
    if getattr(objective_module(config.name), "CLIPS", False) or getattr(config, "num_frames", None) is not None:
        return True
    tokenizer = getattr(config, "tokenizer", None)
    return isinstance(tokenizer, str) and tokenizer_frames(tokenizer) is not None


def build_objective(config: Any, classes: list[str]) -> Objective:
    """Build the networks that `config` describes for data with these classes."""
    return objective_module(config.name).Training(config, classes)
