"""Checkpoints: written whole or not at all, the newest few kept."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path


def replace_folder(part: Path, target: Path) -> None:
    """Put the finished folder `part` in the place of `target`, which is at any moment whole or absent.

    What stood there goes under a hidden name first: removing a folder takes long enough to be killed in.
    """
    for file in part.rglob("*"):  # the rename must not reach the disk before the bytes
        if file.is_file():
            with file.open("rb") as handle:
                os.fsync(handle.fileno())
    remove_folder(target)
    os.replace(part, target)


def remove_folder(folder: Path) -> None:
    """Remove a folder that nobody may find half removed."""
    if folder.exists():
        old = folder.with_name(f".old-{folder.name}")
        shutil.rmtree(old, ignore_errors=True)
        os.replace(folder, old)
        shutil.rmtree(old)


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
            for leftover in [*self.folder.glob(".part-*"), *self.folder.glob(".old-step-*")]:
                shutil.rmtree(leftover)
            part.mkdir(parents=True)
        wait()
        write(part)
        wait()
        if main:
            replace_folder(part, self.path(step))
            for old in self.steps()[: -self.keep]:
                remove_folder(self.path(old))
        wait()
        return self.path(step)
