"""A set of sampled images on disk: blocks while it is made, then one .npz or one folder of PNG files.

While it is made, `OUT.parts/` holds settings.json and block-000000.npy, ..., each uint8 (n, H, W, 3). A file appears
under its name whole or not at all, so whatever is there after a stop counts.

The order of the finished set matters: the ADM evaluator takes the inception score of 5000 images at a time, as they are
stored, and images stored class by class score far lower. So row k holds image order[k], where order is
`numpy.random.RandomState(shuffle_seed).permutation(num)`; labels go with their images.
"""

from __future__ import annotations

import csv
import json
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.lib.format import open_memmap
from PIL import Image

from varkit.data.npz import write_npz
from varkit.pictures import save_png

COMMENTS = ("model", "device", "batch_size", "processes")
"""Entries of a record that images do not depend on, but for rounding: a run may be resumed with others."""
WRITERS = 8
"""Threads that write PNG files; compression runs outside of Python's lock."""
CHUNK = 64
"""Rows of the finished set held at once."""


class SampleStore:
    """Where N images go.

    Args:
        out: FILE.npz for `arr_0` uint8 (N, H, W, 3) and `arr_1` int64 (N,), with the record in FILE.npz.json; or FOLDER
            for 000000.png (row 0), ..., labels.csv and the record in settings.json.
        record: everything that the images depend on, as JSON keeps it; `num`, `block_size` and `shuffle_seed` (None:
            not shuffled) are read here.
        labels: N class ids.   shape: (H, W, 3).
    Raises: ValueError for another kind of `out`.
    """

    def __init__(self, out: Path, record: dict[str, Any], labels: Sequence[int], shape: tuple[int, ...]) -> None:
        if out.suffix not in (".npz", "") or not out.name:
            raise ValueError(f"--out {out} must end in .npz, or be a folder without a dot in its name")
        self.out, self.labels, self.shape = out, labels, shape
        self.record: dict[str, Any] = json.loads(json.dumps(record))
        self.num: int = record["num"]
        self.folder = out.suffix == ""
        self.parts = out.with_name(f"{out.name}.parts")
        self.sidecar = out / "settings.json" if self.folder else out.with_name(f"{out.name}.json")

    # ---- what is there --------------------------------------------------------------------------------------------

    def is_there(self, overwrite: bool = False) -> bool:
        """Whether the whole set is there, made with these settings, and may stay.

        Raises: ValueError when something else is there, and what to do about it.
        """
        if self.out.exists() and self.out.is_dir() != self.folder:
            raise ValueError(f"{self.out} is a {'file' if self.folder else 'folder'}; choose another --out")
        occupied = any(self.out.iterdir()) if self.out.is_dir() else self.out.exists()
        made_with = _read_record(self.sidecar) if occupied else None
        differences = "nothing says how it was made" if made_with is None else self._differences(made_with)
        if occupied and not differences and not overwrite:
            return True
        if occupied and made_with is None and self.folder:  # never replaced: it may be anything
            raise ValueError(f"{self.out} holds files that are no sampled set; choose another --out")
        if self.parts.exists():
            self._require_own_parts()  # a run was allowed to begin, so it may end
        elif occupied and not overwrite:
            raise ValueError(f"{self.out} exists ({differences}); --overwrite replaces it, or choose another --out")
        return False

    def _require_own_parts(self) -> None:
        made_with = _read_record(self.parts / "settings.json")
        if made_with is None:
            if not self.parts.is_dir() or any(not p.name.endswith(".part") for p in self.parts.iterdir()):
                raise ValueError(f"{self.parts} holds no readable settings.json; remove it, or choose another --out")
        elif differences := self._differences(made_with):
            raise ValueError(
                f"{self.parts} was begun with other settings ({differences}); go on with those, remove that folder, "
                "or choose another --out"
            )

    def _differences(self, other: dict[str, Any]) -> str:
        keys = [k for k in {**other, **self.record} if k not in COMMENTS and other.get(k) != self.record.get(k)]
        return "; ".join(f"{k} was {other.get(k)}, is now {self.record.get(k)}" for k in keys)

    # ---- blocks ---------------------------------------------------------------------------------------------------

    def blocks(self) -> range:
        return range(-(-self.num // self.record["block_size"]))

    def span(self, block: int) -> range:
        """Indices of the images of a block."""
        size = self.record["block_size"]
        return range(block * size, min((block + 1) * size, self.num))

    def path(self, block: int) -> Path:
        return self.parts / f"block-{block:06d}.npy"

    def missing(self) -> list[int]:
        """Blocks that were never finished, or were cut short since."""
        return [b for b in self.blocks() if not _is_array(self.path(b), (len(self.span(b)), *self.shape))]

    def begin(self, missing: Iterable[int], comments: dict[str, Any]) -> None:
        """Write the record into `parts`. One process does it, before any block is made."""
        self.parts.mkdir(parents=True, exist_ok=True)
        for block in missing:
            self.path(block).unlink(missing_ok=True)  # what was cut short is not counted as done
        _write_json(self.parts / "settings.json", {**self.record, **comments})

    def write_block(self, block: int, pixels: np.ndarray) -> None:
        """uint8 (n, H, W, 3), the images `span(block)`."""
        _write(self.path(block), lambda file: np.save(file, pixels, allow_pickle=False))

    def done(self) -> int:
        """Images in blocks that are there; looks at names only."""
        names = set(os.listdir(self.parts)) if self.parts.is_dir() else set()
        return sum(len(self.span(b)) for b in self.blocks() if self.path(b).name in names)

    # ---- the finished set -----------------------------------------------------------------------------------------

    def order(self) -> np.ndarray:
        """int64 (N,): which image each row of the finished set holds."""
        seed = self.record["shuffle_seed"]
        return np.arange(self.num) if seed is None else np.random.RandomState(seed).permutation(self.num)

    def merge(self, comments: dict[str, Any]) -> None:
        """Write `out` and its record, then remove `parts`. One process does it, after all blocks are made.

        Raises: ValueError when a block is missing.
        """
        if missing := self.missing():
            raise ValueError(
                f"{len(missing)} blocks are missing in {self.parts}, from {self.path(missing[0]).name} on; run the "
                "same command again, and let every machine see that folder"
            )
        record = {**self.record, **comments}
        if self.folder:
            self._write_folder(record)
        else:
            labels = np.asarray(self.labels, np.int64)[self.order()]
            self.sidecar.unlink(missing_ok=True)  # of a set that is being replaced
            arrays = {
                "arr_0": ((self.num, *self.shape), np.uint8, self._rows()),
                "arr_1": (labels.shape, np.int64, [labels]),
            }
            write_npz(self.out, arrays)
            _write_json(self.sidecar, record)
        shutil.rmtree(self.parts)

    def _rows(self) -> Iterator[np.ndarray]:
        """Images in the order of the finished set, uint8 (n, H, W, 3) at a time."""
        blocks = [open_memmap(self.path(b), mode="r") for b in self.blocks()]
        order = self.order()
        for first in range(0, self.num, CHUNK):
            places = (divmod(int(i), self.record["block_size"]) for i in order[first : first + CHUNK])
            yield np.stack([blocks[block][row] for block, row in places])

    def _write_folder(self, record: dict[str, Any]) -> None:
        """All files into a folder inside `parts`, which then takes the place of `out`."""
        new, old = self.parts / "images", self.parts / "replaced"
        new.mkdir(exist_ok=True)
        table = [(f"{row:06d}.png", int(i), self.labels[i]) for row, i in enumerate(self.order())]

        def write(entry: tuple[str, int, int], pixels: np.ndarray) -> None:
            name, index, label = entry
            save_png(Image.fromarray(pixels), new / name, {**record, "index": index, "class": label})

        with ThreadPoolExecutor(WRITERS) as pool:
            for number, rows in enumerate(self._rows()):
                for _ in pool.map(write, table[number * CHUNK : (number + 1) * CHUNK], rows):
                    pass
        with (new / "labels.csv").open("w", newline="") as file:
            csv.writer(file).writerows([("file", "index", "class"), *table])
        _write_json(new / "settings.json", record)
        if self.out.exists():
            os.replace(self.out, old)
        os.replace(new, self.out)


def _write(path: Path, write: Callable[[IO[bytes]], Any]) -> None:
    """A file that appears whole or not at all."""
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    with part.open("wb") as file:
        write(file)
        file.flush()
        os.fsync(file.fileno())
    os.replace(part, path)


def _write_json(path: Path, values: dict[str, Any]) -> None:
    _write(path, lambda file: file.write(json.dumps(values, indent=1).encode() + b"\n"))


def _read_record(path: Path) -> dict[str, Any] | None:
    """The record that `SampleStore` wrote; None where there is none."""
    try:
        found = json.loads(path.read_bytes())
    except (FileNotFoundError, NotADirectoryError, ValueError):
        return None
    return found if isinstance(found, dict) and {"num", "block_size", "shuffle_seed"} <= found.keys() else None


def _is_array(path: Path, shape: tuple[int, ...]) -> bool:
    """Whether a .npy file is whole and holds bytes of that shape."""
    try:
        array = open_memmap(path, mode="r")
    except (OSError, ValueError):
        return False
    return array.dtype == np.uint8 and array.shape == shape
