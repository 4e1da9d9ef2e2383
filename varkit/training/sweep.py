"""A ladder of runs that differ in size: trained in any order, each resumed where it stopped, then fitted together."""

from __future__ import annotations

import json
import logging
import os
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import yaml
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from varkit.config import ConfigError, build, config, load_yaml, nearest
from varkit.data.transforms import RANDOM_MODES
from varkit.interfaces import Objective
from varkit.rng import Rng
from varkit.training.checkpoint import Checkpoints
from varkit.training.codes import CodeMemory
from varkit.training.recipe import Recipe, load_recipe, recipe_values
from varkit.training.scaling import Fit, Point, draw_scaling, fit_all, write_results

if TYPE_CHECKING:
    from varkit.training.loop import Trainer

logger = logging.getLogger(__name__)

POINTS = "points.json"
"""In a member's folder, once it is finished: its validations, with their compute."""


@config
class Sweep:
    """A ladder: one recipe, and what each member changes in it."""

    name: str
    recipe: str  # a shipped recipe or the path of a .yaml file
    common: list[str] = field(default_factory=list)  # key=value, for all members, as after `varkit train RECIPE`
    members: dict[str, list[str]]  # name -> key=value
    out: str | None = None  # folder of all runs; None: runs/<name>

    def __post_init__(self) -> None:
        for name in self.members:
            if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", name):
                raise ConfigError(f"members: {name!r} names a folder; use letters, digits, '.', '_' and '-'")
        if not self.members:
            raise ConfigError("members: a sweep needs at least one")

    @property
    def folder(self) -> Path:
        return Path(self.out or f"runs/{self.name}")

    def member(self, name: str) -> Recipe:
        """The recipe of one member. Raises ConfigError naming the nearest when there is none of that name."""
        if name not in self.members:
            raise ConfigError(
                f"{self.name} has no member {name!r}{nearest(name, self.members)}; members: {', '.join(self.members)}"
            )
        return load_recipe(
            self.recipe,
            [
                *self.common,
                *self.members[name],
                f"name={self.name}-{name}",
                f"out={json.dumps(str(self.folder / name))}",
            ],
        )


@dataclass(frozen=True)
class SweepResult:
    """What a sweep has, after some or all of its members were trained."""

    folder: Path
    finished: list[str]
    waiting: list[str]  # members not finished
    points: list[Point]
    fits: list[Fit]  # empty below three finished members
    files: list[Path]
    stopped: bool  # by a signal


def shipped_sweeps() -> dict[str, Path]:
    """Name -> file of the sweeps that come with varkit."""
    folder = Path(str(files("varkit"))) / "sweeps"
    return {p.stem: p for p in sorted(folder.glob("*.yaml"))}


def load_sweep(name: str | Path, overrides: Sequence[str] = ()) -> Sweep:
    """Read and check a sweep, and the recipes of all its members, before anything is trained.

    Args: overrides: key=value for every member; `out=FOLDER` is the folder of the sweep.
    Raises: ConfigError naming each bad key, or the nearest shipped sweep.
    """
    path, shipped = Path(name), shipped_sweeps()
    if path.suffix not in (".yaml", ".yml"):
        if str(name) not in shipped:
            raise ConfigError(
                f"no sweep is called {str(name)!r}{nearest(str(name), shipped)}; shipped: {', '.join(shipped)}; "
                f"or give the path of a .yaml file"
            )
        path = shipped[str(name)]
    sweep = build(Sweep, {"name": path.stem, **load_yaml(path)}, source=str(path))
    outs = [text.removeprefix("out=") for text in overrides if text.startswith("out=")]
    more = [text for text in overrides if not text.startswith("out=")]
    sweep = replace(sweep, out=outs[-1] if outs else sweep.out, common=[*sweep.common, *more])
    for member in sweep.members:
        recipe = sweep.member(member)
        if recipe.data.validation is None:
            raise ConfigError(f"{sweep.name} measures held-out images: its recipe {sweep.recipe} needs data.validation")
    return sweep


def run_sweep(sweep: Sweep, members: Sequence[str] | None = None) -> SweepResult:
    """Train members that are not finished, then fit and draw what is.

    A finished member is skipped; one that was killed goes on from its newest checkpoint. Processes on other machines
    may train other members into the same folder.

    Args: members: in this order; None: all, in the sweep's order; empty: train none.
    Raises: ConfigError before any work for an unknown member, and for a folder that other settings were trained in.
    """
    names = list(sweep.members) if members is None else list(members)
    recipes = {name: sweep.member(name) for name in names}
    for recipe in [sweep.member(name) for name in sweep.members]:
        _refuse_other_settings(recipe)
    memory: dict[str, CodeMemory] = {}
    stopped = False
    for name, recipe in recipes.items():
        if (recipe.folder / POINTS).is_file():
            logger.info("%s is finished: skipped", name)
            continue
        if not train_member(name, recipe, memory):
            stopped = True
            break
    return _collect(sweep, stopped)


def train_member(name: str, recipe: Recipe, memory: dict[str, CodeMemory]) -> bool:
    """Train one member to its end, and write its points; False when a signal stopped it."""
    from varkit.training.loop import Trainer

    resume = Checkpoints(recipe.folder / "checkpoints", recipe.loop.keep).latest() is not None
    trainer = Trainer(recipe, resume)
    _remember(trainer, recipe, memory)
    parameters = sum(p.numel() for p in trainer.objective.trained("main").parameters())
    flops = forward_flops(trainer.objective, trainer.dataset.__getitems__([0]))
    result = trainer.run()
    if not result.finished:
        return False
    if trainer.accelerator.is_main_process:
        points = member_points(name, recipe, parameters, flops)
        part = recipe.folder / f".{POINTS}.part"
        facts = {"forward_flops_per_image": flops, "seconds": result.seconds}
        part.write_text(json.dumps({**facts, "points": [asdict(p) for p in points]}, indent=1) + "\n")
        os.replace(part, recipe.folder / POINTS)
    trainer.accelerator.wait_for_everyone()
    return True


def forward_flops(objective: Objective, batch: dict[str, Any]) -> int:
    """Floating-point operations of the trained network's forward pass over one image, a multiply-add counted as two.

    Counted by torch over the matrix products, those of attention included; element-wise work is left out.
    """
    model = objective.trained("main")
    device = next(model.parameters()).device
    moved = {k: v.to(device) for k, v in batch.items() if k != "keys" and isinstance(v, torch.Tensor)}
    batch = batch | moved  # texts are strings
    counter, began, spent = FlopCounterMode(display=False), [0], [0]
    hooks = [
        model.register_forward_pre_hook(lambda *_: began.append(counter.get_total_flops())),
        model.register_forward_hook(lambda *_: spent.append(counter.get_total_flops() - began[-1])),
    ]
    objective.eval()
    try:
        with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), torch.compiler.set_stance("force_eager"), counter:
            objective.validate(batch, Rng.for_keys(0, batch["keys"]))
    finally:
        objective.train()
        for hook in hooks:
            hook.remove()
    return sum(spent)


def member_points(name: str, recipe: Recipe, parameters: int, flops: int) -> list[Point]:
    """The validations of a finished run, from its metrics.jsonl.

    Args: flops: of the forward pass over one image; training takes three times as many.
    Raises: ValueError when the objective does not measure what is fitted.
    """
    rows: dict[int, dict[str, float]] = {}
    for line in (recipe.folder / "metrics.jsonl").read_text().splitlines():
        row = json.loads(line)
        if "validation/loss" in row:
            rows[row["step"]] = row  # of a step written twice, before and after a kill, the later one counts
    points = []
    for step in sorted(rows):
        row = {k.removeprefix("validation/"): v for k, v in rows[step].items()}
        missing = {"loss", "loss_last", "accuracy", "accuracy_last"} - row.keys()
        if missing:
            raise ValueError(
                f"objective {recipe.objective.name} does not validate {', '.join(sorted(missing))}; a sweep fits "
                f"generators of tokens, such as next-scale"
            )
        images = step * recipe.loop.batch_size
        points.append(
            Point(
                member=name,
                parameters=parameters,
                step=step,
                images=images,
                compute=3.0 * flops * images,
                final=step == recipe.loop.steps,
                loss=row["loss"],
                loss_last=row["loss_last"],
                error=1 - row["accuracy"],
                error_last=1 - row["accuracy_last"],
            )
        )
    return points


def _remember(trainer: Trainer, recipe: Recipe, memory: dict[str, CodeMemory]) -> None:
    """Let members that read the same images through the same tokenizer share the codes."""
    held = getattr(trainer.objective, "memory", None)
    network: Any = trainer.objective.trained("main")
    if held is None or network.layout.codebook_size is None:  # latents are drawn anew
        return
    data = recipe_values(recipe)["data"]
    key = json.dumps([recipe.objective.tokenizer, data], sort_keys=True)
    sets = {False: trainer.validation}
    fixed = recipe.data.mode not in RANDOM_MODES and not recipe.data.flip and not trainer.clips
    if fixed:  # in training an image must always look the same
        sets[True] = trainer.dataset
    for training, dataset in sets.items():
        if dataset is not None:
            name = f"{training} {key}"
            held[training] = memory.setdefault(name, CodeMemory(len(dataset), network.layout.length))


def _refuse_other_settings(recipe: Recipe) -> None:
    path = recipe.folder / "recipe.yaml"
    if not path.is_file():
        return
    before, now = load_yaml(path), yaml.safe_load(yaml.safe_dump(recipe_values(recipe)))
    changed = [
        f"{k}.{f} was {before.get(k, {}).get(f)}, is {v}"
        for k in ("objective", "data", "optim", "loop")
        for f, v in now[k].items()
        if before.get(k, {}).get(f) != v
    ]
    if changed:
        raise ConfigError(
            f"{recipe.folder} was trained by other settings: {'; '.join(changed[:4])}. Choose another folder with "
            f"out=..., or remove it"
        )


def _collect(sweep: Sweep, stopped: bool) -> SweepResult:
    points: list[Point] = []
    members: dict[str, Any] = {}
    for name in sweep.members:
        path = sweep.folder / name / POINTS
        if path.is_file():
            found = json.loads(path.read_text())
            points += [Point(**p) for p in found.pop("points")]
            members[name] = found
    finished = list(members)
    written: list[Path] = []
    fits: list[Fit] = []
    if points:
        if len(finished) >= 3:
            fits = fit_all(points)
        facts = {"sweep": sweep.name, "recipe": sweep.recipe, "common": sweep.common, "members": members}
        written = write_results(sweep.folder, points, fits, facts)
    if fits:
        for path in (sweep.folder / "scaling.png", sweep.folder / "scaling.svg"):
            draw_scaling(points, fits, path)
            written.append(path)
    waiting = [name for name in sweep.members if name not in members]
    return SweepResult(sweep.folder, finished, waiting, points, fits, written, stopped)
