"""A recipe: everything a training run depends on, as one checked YAML file."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any, Literal

from varkit.config import ConfigError, build, config, load_yaml, nearest, override, to_dict
from varkit.training.objectives import objective_config
from varkit.training.optim import OptimConfig


@config
class ClipsConfig:
    """Which clips are taken of videos; how many frames they have, the objective says (docs/video-data.md)."""

    stride: int = 1  # every which frame
    fps: float | None = None  # instead: wanted frames a second, of files that say how many they have
    short: Literal["skip", "refuse"] = "skip"  # what becomes of videos with too few frames
    held_out: Literal["middle", "first"] = "middle"  # where held-out clips begin; those of training at random
    fold: int = 1  # of UCF-101: which of its lists

    def __post_init__(self) -> None:
        if self.stride < 1 or self.fold < 1:
            raise ConfigError(f"data.clips: stride and fold count from 1; got {self.stride} and {self.fold}")
        if self.fps is not None and (self.fps <= 0 or self.stride != 1):
            raise ConfigError(
                f"data.clips.fps must be above 0 and stands instead of stride; got fps={self.fps}, stride={self.stride}"
            )


@config
class DataConfig:
    """Where images or clips come from and how they are cut."""

    train: str  # a folder, an .npz or .npy file, IDX files, tars, hf:NAME, or the name of a data set (docs/data.md);
    # for objectives of clips: moving-fashion, a folder of videos, UCF-101, Kinetics (docs/video-data.md);
    # or, for generators, a folder of `varkit tokenize`; splits and views are then its own
    train_split: str = "train"
    validation: str | None = None  # None: no validation
    validation_split: str = "test"
    root: str | None = None  # where a named data set lies, if not in its usual place
    mode: Literal["crop", "center", "pad", "squash", "shift"] = "crop"
    enlarge: float = 1.125  # crop and center: the shorter side becomes this times the size
    flip: bool = False  # mirror half of the images
    clips: ClipsConfig | None = None  # of videos alone; None: every frame, from a random one on
    workers: int = 2  # processes that read images; 0: in the training process


@config
class LoopConfig:
    """How long, how fast, and what is written when. Counts are optimiser steps and images."""

    steps: int
    batch_size: int  # images a step, over all processes and accumulated micro-batches
    accumulation: int = 1  # micro-batches a step
    precision: Literal["no", "bf16", "fp16"] = "bf16"
    compile: bool = False  # torch.compile the trained network: a minute at the start, then faster steps
    channels_last: bool = False  # images and convolutions as (B, H, W, C) in memory: faster on most devices
    ema_decay: float = 0.999  # of the weights that are validated and exported; 0: none
    seed: int = 0
    log_every: int = 20
    validate_every: int = 500
    validate_images: int = 1024
    sample_every: int = 500
    save_every: int = 500
    keep: int = 2  # newest checkpoints kept
    max_bad_steps: int = 10  # so many steps in a row without a finite loss and gradient end the run
    tracker: str = "none"  # none, or a name that accelerate knows: tensorboard, wandb, trackio, ...

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size", "accumulation", "log_every", "keep", "max_bad_steps"):
            if getattr(self, name) < 1:
                raise ConfigError(f"loop.{name} must be at least 1; got {getattr(self, name)}")
        for name in ("validate_every", "sample_every", "save_every"):
            if getattr(self, name) < 0:
                raise ConfigError(f"loop.{name} must not be negative (0: never); got {getattr(self, name)}")
        if self.batch_size % self.accumulation:
            raise ConfigError(
                f"loop.batch_size {self.batch_size} must be a multiple of loop.accumulation {self.accumulation}"
            )
        if not 0 <= self.ema_decay < 1:
            raise ConfigError(f"loop.ema_decay must be in [0, 1); got {self.ema_decay}")


@config
class Recipe:
    """One training run."""

    name: str
    objective: Any  # the Config of one of varkit.training.objectives
    data: DataConfig
    loop: LoopConfig
    optim: OptimConfig = OptimConfig()
    out: str | None = None  # folder of the run; None: runs/<name>

    @property
    def folder(self) -> Path:
        return Path(self.out or f"runs/{self.name}")


def shipped_recipes() -> dict[str, Path]:
    """Recipes that come with varkit, by name."""
    folder = Path(str(files("varkit"))) / "recipes"
    return {p.stem: p for p in sorted(folder.glob("*.yaml"))}


def find_recipe(name: str | Path) -> Path:
    """A recipe's file, by name or path. Raises ConfigError naming the nearest shipped recipe."""
    if Path(name).suffix in (".yaml", ".yml"):
        return Path(name)
    shipped = shipped_recipes()
    if str(name) not in shipped:
        raise ConfigError(
            f"no recipe is called {str(name)!r}{nearest(str(name), shipped)}; shipped: {', '.join(shipped)}; "
            f"or give the path of a .yaml file"
        )
    return shipped[str(name)]


def load_recipe(name: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """Read and check a recipe. Raises ConfigError naming each bad key, before anything is built."""
    path = find_recipe(name)
    return make_recipe(override({"name": path.stem, **load_yaml(path)}, overrides), str(path))


def make_recipe(values: dict[str, Any], source: str = "") -> Recipe:
    """Check plain nested values into a recipe."""
    objective = values.get("objective")
    if not isinstance(objective, dict):
        raise ConfigError(f"bad configuration in {source}:\n  objective must be a section with a name")
    return build(Recipe, {**values, "objective": objective_config(objective, source)}, source=source)


def recipe_values(recipe: Recipe) -> dict[str, Any]:
    """The recipe as plain data, every default spelled out; `make_recipe` reads it back."""
    return to_dict(recipe)
