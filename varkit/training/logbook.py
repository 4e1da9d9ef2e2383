"""The numbers of a run: means between two log lines, metrics.jsonl, trackers."""

from __future__ import annotations

import json
import os
import time
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from varkit.config import ConfigError, nearest
from varkit.training.sync import place, summed

TRACKERS = {
    "tensorboard": "tensorboard",
    "wandb": "wandb",
    "trackio": "trackio",
    "aim": "aim",
    "clearml": "clearml",
    "comet_ml": "comet_ml",
    "dvclive": "dvclive",
    "mlflow": "mlflow",
    "swanlab": "swanlab",
}
"""Names that accelerate knows -> package."""


def require_tracker(name: str) -> None:
    """Raises ConfigError for a name nobody knows, ImportError naming the package that is missing."""
    if name == "none":
        return
    if name not in TRACKERS:
        raise ConfigError(f"loop.tracker must be none, {', '.join(TRACKERS)}; got {name!r}{nearest(name, TRACKERS)}")
    found = find_spec(TRACKERS[name])
    if found is None or found.origin is None:  # a folder wandb/ of earlier runs passes for a package without code
        raise ImportError(
            f"loop.tracker={name} needs the package {TRACKERS[name]}: pip install {TRACKERS[name]}, or leave it out "
            f"(metrics.jsonl is always written)"
        )


def tracker_options(name: str, run_id: str, step: int) -> dict[str, Any]:
    """What a tracker is told so that a resumed run goes on in the same place, from `step` on."""
    options: dict[str, dict[str, Any]] = {
        "tensorboard": {"purge_step": step + 1},
        "wandb": {"id": run_id, "resume": "allow"},
        "trackio": {"name": run_id, "resume": "allow"},
    }
    return {name: options[name]} if name in options else {}


def tracker_place(name: str, folder: Path, run: str) -> str:
    """Where a tracker's numbers go, in words."""
    places = {
        "tensorboard": str(folder / run),
        "wandb": "wandb/ (or WANDB_DIR), and the server unless WANDB_MODE=offline",
        "trackio": "TRACKIO_DIR, or the trackio folder of the Hugging Face cache",
    }
    return places.get(name, f"where {name} keeps its runs")


def drop_later_lines(file: Path, step: int) -> int:
    """Remove from a metrics.jsonl what was written after `step`, and a torn last line; atomically.

    Returns: how many lines went.
    """
    if not file.exists():
        return 0
    lines = file.read_text(encoding="utf-8").splitlines(keepends=True)
    kept = [line for line in lines if line.endswith("\n") and json.loads(line)["step"] <= step]
    if len(kept) < len(lines):
        part = file.with_name(f".{file.name}.part")
        part.write_text("".join(kept), encoding="utf-8")
        os.replace(part, file)
    return len(lines) - len(kept)


def write_line(file: Path, step: int, numbers: dict[str, float]) -> None:
    """Append one JSON object; seven digits of each number."""
    line = {"step": step, **{name: float(f"{value:.7g}") for name, value in numbers.items()}}
    with file.open("a", encoding="utf-8") as handle:
        handle.write(json.dumps(line) + "\n")


class Window:
    """Means of named numbers since the last log line, summed on the device: one sync a line, not a step."""

    def __init__(self) -> None:
        self._open()

    def _open(self) -> None:
        self.sums: dict[str, Tensor] = {}
        self.counts: dict[str, int] = {}
        self.steps, self.waited, self.began = 0, 0.0, time.perf_counter()

    def add(self, numbers: dict[str, Tensor], waited: float = 0.0) -> None:
        """Args: waited: seconds that the step waited for its images."""
        for name, value in numbers.items():
            self.sums[name] = self.sums.get(name, 0) + value.float()
            self.counts[name] = self.counts.get(name, 0) + 1
        self.steps += 1
        self.waited += waited

    def close(self) -> tuple[dict[str, float], float, int]:
        """Means over steps and processes, seconds, steps; and a new window."""
        means: dict[str, float] = {}
        if self.sums:
            names = sorted(self.sums)  # the same order on all processes
            values = torch.stack([self.sums[n] / self.counts[n] for n in names])
            means = dict(zip(names, (summed(values) / place()[1]).tolist(), strict=True))
        seconds, steps = time.perf_counter() - self.began, self.steps
        self._open()
        return means, seconds, steps
