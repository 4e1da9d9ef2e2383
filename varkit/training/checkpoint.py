"""Checkpoints: written whole or not at all, the newest few kept."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path


class Checkpoints:
    """`folder/step-00001000/` and so on. A folder of that name is always complete.

    Args: keep: how many of the newest stay.
    """

    def __init__(self, folder: Path, keep: int) -> None:
        self.folder, self.keep = folder, keep

    def steps(self) -> list[int]:
        """Steps of complete checkpoints, oldest first."""
        names = [p.name for p in self.folder.glob("step-*") if p.is_dir()]
        numbers = [(n, int(d)) for n in names if (d := n.removeprefix("step-")).isdecimal()]
        return sorted(step for n, step in numbers if n == self.path(step).name)  # step-5, step-5.bak: none of ours

    def path(self, step: int) -> Path:
        return self.folder / f"step-{step:08d}"

    def latest(self) -> Path | None:
        steps = self.steps()
        return self.path(steps[-1]) if steps else None

    def save(self, step: int, write: Callable[[Path], None], main: bool, wait: Callable[[], None]) -> Path:
        """Have `write` fill a hidden folder, then rename it; then remove what is too old.

        Args: main: whether this process renames and removes.   wait: a barrier of all processes.
        """
        part = self.folder / f".part-{step:08d}"
        if main:
            for leftover in self.folder.glob(".part-*"):
                shutil.rmtree(leftover)
            part.mkdir(parents=True)
        wait()
        write(part)
        wait()
        if main:
            for file in part.rglob("*"):  # the rename must not reach the disk before the bytes
                if file.is_file():
                    with file.open("rb") as handle:
                        os.fsync(handle.fileno())
            target = self.path(step)
            if target.exists():
                shutil.rmtree(target)
            os.replace(part, target)
            for old in self.steps()[: -self.keep]:
                shutil.rmtree(self.path(old))
        wait()
        return self.path(step)
