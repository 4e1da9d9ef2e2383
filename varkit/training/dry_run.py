"""What a run would take and write, found by taking a few of its steps: `varkit train RECIPE --dry-run`."""

from __future__ import annotations

import io
import os
import time
from collections import deque
from collections.abc import Iterable, Iterator
from itertools import cycle
from statistics import median
from typing import Any

import torch
from torch import Tensor

from varkit.interfaces import Tokenizer
from varkit.pictures import grid, to_pil
from varkit.training.flops import count_flops, speed
from varkit.training.logbook import tracker_place
from varkit.training.loop import Trainer
from varkit.training.memory import memory_now, memory_peak, memory_total, reset_peak
from varkit.training.recipe import Recipe
from varkit.training.run_facts import (
    disk_facts,
    disk_seconds,
    events,
    nearest_folder,
    networks,
    run_facts,
    size_of,
    times,
    tokens,
    warnings,
)

STEPS = 3
"""Timed steps of each kind, after one that is not."""


def dry_run(recipe: Recipe, *, resume: bool = False) -> dict[str, Any]:
    """Set a run up as `train` does, take a few steps, forget them, and say what the whole run would take.

    Nothing is written in the run's folder. Steps are measured at the end of the run, where progressive training is
    largest; each kind of step (with the discriminator, without) by itself.

    Returns: plain values, in bytes and seconds; `varkit.training.dry_run_text.lines` puts them into words.
    Raises: what `train` would raise, and PermissionError when the run's folder cannot be written.
    """
    trainer = Trainer(recipe, resume)
    place = nearest_folder(recipe.folder)
    if not os.access(recipe.folder if recipe.folder.is_dir() else place, os.W_OK):
        raise PermissionError(f"{recipe.folder} cannot be written; choose another folder with out=...")
    rehearsal, bad_before = Rehearsal(trainer), trainer.progress.bad_steps
    kinds = rehearsal.kinds()
    pauses = rehearsal.pauses()
    facts: dict[str, Any] = {
        "run": run_facts(trainer),
        "networks": networks(trainer),
        "tokens": tokens(trainer.objective),
        "step_kinds": kinds,
        "memory": rehearsal.memory(),
    }
    writes = rehearsal.writes(pauses["picture_bytes"])
    facts["time"] = times(trainer, kinds, pauses, disk_seconds(place, rehearsal.checkpoint_bytes))
    facts["writes"], facts["disk"] = writes, disk_facts(trainer, place, writes, rehearsal.checkpoint_bytes)
    facts["warnings"] = warnings(trainer, facts, trainer.progress.bad_steps - bad_before)
    trainer.accelerator.wait_for_everyone()
    return facts


class Rehearsal:
    """A trainer whose steps are measured and then forgotten with it."""

    def __init__(self, trainer: Trainer) -> None:
        self.trainer, self.device = trainer, trainer.accelerator.device
        self.names: list[str] = []  # of the numbers of a step
        self.base, self.optimizer_before = memory_now(self.device), self._optimizer_bytes()
        self.peaks = {"steps": self.base, "pauses": self.base}
        self._batches = self._micros()

    def _micros(self) -> Iterator[dict[str, Tensor]]:
        while True:
            yield from self.trainer._loader()

    def _synchronize(self) -> None:
        torch.get_device_module(self.device).synchronize()

    def kinds(self) -> list[dict[str, Any]]:
        """Each kind of step that is still to come: its phases, how many, seconds and share of waiting of one, FLOPs."""
        t = self.trainer
        counts: dict[tuple[str, ...], int] = {}
        last: dict[tuple[str, ...], deque[int]] = {}
        for step in range(t.progress.step, t.loop.steps):
            phases = tuple(t.objective.phases(step))
            counts[phases] = counts.get(phases, 0) + 1
            last.setdefault(phases, deque(maxlen=STEPS + 1)).append(step)
        reset_peak(self.device)
        timed = {phases: self._timed(steps) for phases, steps in last.items()}
        self.peaks["steps"] = max(memory_peak(self.device), self.base)
        found = []
        for phases, steps in last.items():  # counting at last: an uncompiled step may need more memory
            with torch.compiler.set_stance("force_eager" if t.loop.compile else "default"):
                flops = count_flops(lambda step=steps[-1]: self._step(step, self._next()))[1]  # type: ignore[misc]
            seconds, waited = timed[phases]
            found.append(
                {
                    "phases": list(phases),
                    "steps": counts[phases],
                    "seconds": seconds,
                    "data_wait": waited / seconds,
                    "flops": flops,
                    **speed(flops, seconds, t.flops.peak),
                }
            )
        return found

    def _next(self) -> list[dict[str, Tensor]]:
        return [self.trainer._move(next(self._batches)) for _ in range(self.trainer.loop.accumulation)]

    def _step(self, step: int, micros: list[dict[str, Tensor]]) -> None:
        numbers = self.trainer.step(step, micros)
        self._synchronize()
        self.names = sorted({*self.names, *numbers})

    def _timed(self, steps: Iterable[int]) -> tuple[float, float]:
        """Median seconds of a step, and of its wait for images."""
        seconds, waits = [], []
        for _, step in zip(range(STEPS + 1), cycle(steps), strict=False):
            began = time.perf_counter()
            micros = self._next()
            waits.append(time.perf_counter() - began)
            self._step(step, micros)
            seconds.append(time.perf_counter() - began)
        return median(seconds[1:]), median(waits[1:])

    def pauses(self) -> dict[str, Any]:
        """Seconds of one validation and one sample sheet, on the main process; bytes of the sheet."""
        t = self.trainer
        found: dict[str, Any] = {"validation": 0.0, "sample": 0.0, "picture_bytes": 0}
        if not t.accelerator.is_main_process:
            return found
        reset_peak(self.device)
        if t.validation is not None:
            count = min(t.loop.validate_images, len(t.validation))
            size = min(t.held_out_batch, count)
            began = time.perf_counter()
            with t._averaged():
                for batch, rng in t._held_out(size, size):
                    t.objective.validate(batch, rng)
            self._synchronize()
            found["validation"] = (time.perf_counter() - began) * count / size
        began = time.perf_counter()
        with t._averaged():
            images = t.objective.pictures(*next(t._held_out(16, 16)))
        if images is not None:
            file = io.BytesIO()
            grid(to_pil(images), t.picture_columns(len(images))).save(file, "PNG")
            found["picture_bytes"] = file.tell()
        found["sample"] = time.perf_counter() - began
        self.peaks["pauses"] = memory_peak(self.device)
        return found

    # ---- memory and disk ------------------------------------------------------------------------------------

    def _optimizer_bytes(self) -> int:
        states = [o.state_dict()["state"].values() for o in self.trainer.optimizers.values()]
        return size_of(v for state in states for values in state for v in values.values() if isinstance(v, Tensor))

    def memory(self) -> dict[str, int]:
        """Bytes: what the parts hold by their sizes, what steps need besides as measured, and the peak."""
        t = self.trainer
        modules = [t.objective, *t.objective.frozen_parts().values()]
        parameters = sum(size_of(m.parameters()) + size_of(m.buffers()) for m in modules)
        average = size_of(t.ema.shadow_params) if t.ema is not None else 0
        gradients = max(size_of(weights) for weights in t.parameters.values())  # a phase forgets its own
        optimizer = self._optimizer_bytes()
        grown = optimizer - self.optimizer_before
        return {
            "parameters": parameters,
            "gradients": gradients,
            "optimizer": optimizer,
            "average": average,
            "activations": max(self.peaks["steps"] - self.base - grown - gradients, 0),
            "other": max(self.base - parameters - average - self.optimizer_before, 0),
            "peak_steps": self.peaks["steps"],
            "peak_pauses": self.peaks["pauses"],
            "peak": max(self.peaks.values()),
            "total": memory_total(self.device),
        }

    @property
    def checkpoint_bytes(self) -> int:
        t = self.trainer
        average = size_of(t.ema.shadow_params) if t.ema is not None else 0
        return size_of(t.objective.state_dict().values()) + self._optimizer_bytes() + average

    def writes(self, picture_bytes: int) -> list[dict[str, Any]]:
        """What will be written: where, how many, how large in all."""
        t, loop, folder = self.trainer, self.trainer.loop, self.trainer.folder
        first, last = t.progress.step, loop.steps
        kept = min(loop.keep, events(first, last, loop.save_every) + len(t.checkpoints.steps()))
        sheets = events(first, last, loop.sample_every) if picture_bytes else 0
        rows = events(first, last, loop.log_every)
        numbers = [*self.names, *t.objective.statistics(), "lr", "images_per_second", "data_wait", "seconds", "tflops"]
        tokenizers = [m for m in t.objective.frozen_parts().values() if isinstance(m, Tokenizer)]
        model = sum(size_of(m.state_dict().values()) for m in [t.objective.trained("main"), *tokenizers])
        found = [
            {"path": str(folder / "checkpoints"), "count": kept, "bytes": kept * self.checkpoint_bytes},
            {"path": str(folder / "model"), "count": 1, "bytes": model},
            {"path": str(folder / "samples"), "count": sheets, "bytes": sheets * picture_bytes},
            {
                "path": str(folder / "metrics.jsonl"),
                "count": rows,
                "bytes": rows * sum(len(name) + 16 for name in numbers),
            },
            {"path": str(folder / "recipe.yaml"), "count": 1, "bytes": 2048},
        ]
        if loop.tracker != "none":
            found.append({"path": tracker_place(loop.tracker, folder, t.recipe.name), "count": rows, "bytes": 0})
        return [row for row in found if row["count"]]
