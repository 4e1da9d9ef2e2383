"""What is known of a run without taking a step, or once the steps are timed: the arithmetic of a dry run."""

from __future__ import annotations

import os
import platform
import shutil
import tempfile
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from varkit.generators.distilled import Student
from varkit.interfaces import Generator, Objective, Tokenizer
from varkit.training.loop import Trainer

TRIAL = 256 << 20
"""Bytes that are written, at most, to see how fast the disk is."""


def size_of(tensors: Iterable[Tensor]) -> int:
    return sum(tensor.nbytes for tensor in tensors)


def events(first: int, last: int, every: int) -> int:
    """How often a thing that is due every so many steps, and at the last, happens after step `first`."""
    if first >= last:
        return 0
    due = last // every - first // every if every else 0
    return due + bool(not every or last % every)


def run_facts(trainer: Trainer) -> dict[str, Any]:
    recipe, loop, a = trainer.recipe, trainer.loop, trainer.accelerator
    left = loop.steps - trainer.progress.step
    name = torch.cuda.get_device_name(a.device) if a.device.type == "cuda" else platform.machine()
    return {
        "recipe": recipe.name,
        "objective": recipe.objective.name,
        "folder": str(trainer.folder),
        "device": f"{a.device} ({name})",
        "processes": a.num_processes,
        "precision": loop.precision,
        "compile": loop.compile,
        "data": recipe.data.train,
        "images": len(trainer.dataset),
        "classes": len(trainer.dataset.classes),
        "validation": recipe.data.validation,
        "validation_images": len(trainer.validation) if trainer.validation is not None else 0,
        "image_size": list(trainer.objective.image_size),
        "from_step": trainer.progress.step,
        "seconds_so_far": trainer.progress.seconds,
        "steps": loop.steps,
        "steps_left": left,
        "batch_size": loop.batch_size,
        "accumulation": loop.accumulation,
        "micro_batch": loop.batch_size // (loop.accumulation * a.num_processes),
        "epochs": loop.steps * loop.batch_size / len(trainer.dataset),
    }


def networks(trainer: Trainer) -> list[dict[str, Any]]:
    """Parameters that learn and that do not, of each network and of its parts."""
    learning = {id(weight) for weights in trainer.parameters.values() for weight in weights}

    def counts(parameters: Iterable[nn.Parameter]) -> dict[str, int]:
        sizes = [(p.numel(), id(p) in learning) for p in parameters]
        return {"trained": sum(n for n, yes in sizes if yes), "frozen": sum(n for n, yes in sizes if not yes)}

    objective = trainer.objective
    named = [(p, objective.trained(p)) for p in trainer.phases] + list(objective.frozen_parts().items())
    found = []
    for name, module in named:
        parts = {part: counts(child.parameters()) for part, child in module.named_children()}
        own = counts(module.parameters(recurse=False))
        if sum(own.values()):
            parts["its own"] = own
        found.append({"name": name, "class": type(module).__name__, **counts(module.parameters()), "parts": parts})
    return found


def tokens(objective: Objective) -> dict[str, Any] | None:
    """Of one image: those that the generator predicts, in how many groups, or that the tokenizer makes."""
    for kind in (Generator, Student, Tokenizer):
        for module in objective.modules():
            if isinstance(module, kind):
                layout = module.layout
                groups = len(module.schedule()) if isinstance(module, Generator) else None
                return {"length": layout.length, "groups": groups, **layout.to_dict()}
    return None


# ---- time and disk ------------------------------------------------------------------------------------------


def times(trainer: Trainer, kinds: list[dict[str, Any]], pauses: dict[str, Any], save: float) -> dict[str, Any]:
    """Seconds of the rest of the run, by what takes them: measured once, times how often."""
    loop, first, last = trainer.loop, trainer.progress.step, trainer.loop.steps
    validations = events(first, last, loop.validate_every) if trainer.validation is not None else 0
    samples, saves = events(first, last, loop.sample_every), events(first, last, loop.save_every)
    parts = {
        "steps": sum(kind["steps"] * kind["seconds"] for kind in kinds),
        "validation": validations * pauses["validation"],
        "samples": samples * pauses["sample"],
        "saves": saves * save,
    }
    counts = {"validations": validations, "sample_sheets": samples, "save_count": saves}
    return {**parts, **counts, "total": sum(parts.values())}


def nearest_folder(folder: Path) -> Path:
    """The folder that holds, or will hold, the run's folder: the nearest that is there.

    Raises: NotADirectoryError when a file is in the way.
    """
    path = folder.absolute()
    nearest = next(p for p in path.parents if p.exists())
    if not nearest.is_dir() or path.is_file():
        raise NotADirectoryError(f"{path if path.is_file() else nearest} is a file; choose another folder with out=...")
    return nearest


def disk_seconds(folder: Path, size: int) -> float:
    """Seconds to write `size` bytes, by writing some into a file without a name."""
    block, trial = os.urandom(1 << 20), min(size, TRIAL)
    place = folder if os.access(folder, os.W_OK) else None  # None: where temporary files are
    try:
        with tempfile.TemporaryFile(dir=place) as file:
            began = time.perf_counter()
            for start in range(0, trial, len(block)):
                file.write(block[: trial - start])
            file.flush()
            os.fsync(file.fileno())
            return (time.perf_counter() - began) * size / max(trial, 1)
    except OSError:  # a full disk is warned of by its numbers
        return 0.0


def disk_facts(trainer: Trainer, place: Path, writes: list[dict[str, Any]], checkpoint: int) -> dict[str, int]:
    """Bytes that the run needs at most at one time beyond what it has written, and that are free."""
    present = sum(f.stat().st_size for f in trainer.folder.rglob("*") if f.is_file()) if trainer.folder.is_dir() else 0
    need = sum(row["bytes"] for row in writes) + checkpoint  # the next checkpoint stands before the oldest goes
    disk = trainer.folder if trainer.folder.is_dir() else place
    return {"need": max(need - present, 0), "free": shutil.disk_usage(disk).free, "checkpoint": checkpoint}


def warnings(trainer: Trainer, facts: dict[str, Any], bad_steps: int) -> list[str]:
    found = []
    if text := slow_precision(trainer.accelerator.device, trainer.loop.precision):
        found.append(text)
    memory, disk = facts["memory"], facts["disk"]
    if memory["total"] and memory["peak"] > 0.9 * memory["total"]:
        found.append(
            "the peak is over 90 % of the memory: a larger loop.accumulation makes micro-batches smaller, and "
            "objective.gradient_checkpointing, where there is one, trades time for memory"
        )
    if disk["need"] > disk["free"]:
        found.append("the run will not fit on the disk: lower loop.keep, or choose another folder with out=...")
    if any(kind["data_wait"] > 0.2 for kind in facts["step_kinds"]):
        found.append("steps wait for images: raise data.workers")
    if bad_steps:
        found.append(f"{bad_steps} of the steps taken were not finite: lower optim.lr, or train with loop.precision=no")
    return found


def slow_precision(device: torch.device, precision: str) -> str | None:
    if precision != "bf16":
        return None
    if device.type == "cpu" and platform.machine().lower() in ("x86_64", "amd64"):
        fast = torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported()
        return None if fast else "this CPU has neither AMX nor AVX512-BF16 and is slow in bf16: use loop.precision=no"
    if device.type == "cuda" and not torch.cuda.is_bf16_supported(including_emulation=False):
        return "this GPU has no bf16 and emulates it: use loop.precision=fp16"
    return None
