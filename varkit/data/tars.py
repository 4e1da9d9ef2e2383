"""Webdataset tars as a data set of known length and order: images are read at random, through an index of each tar.

    open_images("shards/")                          all tars of a folder, or those of a split (train-*.tar, val-*.tar)
    open_images("shards/train-{000000..000146}.tar")
    open_images("shards/train-*.tar")

Shuffling, sharding over processes and resuming are those of a folder, bit by bit. Order: tars by name, or as a pattern
in braces lists them; members as they stand in a tar.
"""

from __future__ import annotations

import glob
import io
import itertools
import os
import re
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import BinaryIO

import numpy as np
import numpy.typing as npt
from tqdm.auto import tqdm

from varkit.data.dataset import ImageDataset
from varkit.data.labels import class_ids
from varkit.data.splits import SPLITS
from varkit.data.tar_index import TarIndex, index_tar, kept_index
from varkit.data.transforms import EXTENSIONS, FilePixels, SkippedImage

TARS = "webdataset"
"""The `kind` of such a set."""

MAX_TARS = 1_000_000
SHOWN = 5

_BRACES = re.compile(r"\{([^{}]*)\}")
_RANGE = re.compile(r"(\d+)\.\.(\d+)")


class TarPixels(FilePixels):
    """Images inside tars.   tar, offset, size: int64 (N,), which of `tars`, and the bytes in it."""

    def __init__(self, tars: Sequence[Path], indexes: Sequence[TarIndex]) -> None:
        samples = [(i, sample) for i, index in enumerate(indexes) for sample in index.samples]
        super().__init__([f"{tars[i]}/{sample.name}" for i, sample in samples])
        self.tars = [str(path) for path in tars]
        self.tar: npt.NDArray[np.int64] = np.array([i for i, _ in samples], np.int64)
        self.offset: npt.NDArray[np.int64] = np.array([sample.offset for _, sample in samples], np.int64)
        self.size: npt.NDArray[np.int64] = np.array([sample.size for _, sample in samples], np.int64)

    def open(self, index: int) -> BinaryIO:
        """The bytes of image `index`. Raises: OSError; ValueError if the tar has become shorter."""
        size = int(self.size[index])
        with open(self.tars[self.tar[index]], "rb") as file:
            file.seek(int(self.offset[index]))
            raw = file.read(size)
        if len(raw) != size:
            raise ValueError(f"{len(raw)} of {size} bytes are there; the tar has changed since it was opened")
        return io.BytesIO(raw)


def open_tars(tars: Sequence[Path], name: str, source: str) -> ImageDataset:
    """Tars as one data set; each is indexed once.

    Raises: FileNotFoundError; ValueError if one is no tar, or none holds an image.
    """
    kept = {path: kept_index(path) for path in tars}
    new = [path for path, index in kept.items() if index is None]
    busy = tqdm(new, desc="indexing", unit="tar", leave=False, disable=len(new) < 2 or not sys.stderr.isatty())
    fresh = {path: index_tar(path) for path in busy}
    indexes = [kept[path] or fresh[path] for path in tars]
    pixels = TarPixels(tars, indexes)
    dropped = [
        SkippedImage(f"{path}/{member}" if member else str(path), reason)
        for path, index in zip(tars, indexes, strict=True)
        for member, reason in index.skipped
    ]
    if len(pixels) == 0:
        found = sorted({ending for index in indexes for ending in index.other_endings})
        what = f"; its members end in {', '.join(found[:8])}" if found else ""
        what += f"; {dropped[0].path}: {dropped[0].reason}" if dropped else ""
        raise ValueError(
            f"{source} holds no images{what}. Allowed: KEY{', KEY'.join(EXTENSIONS)}; a KEY has no dot in its last part"
        )
    samples = [sample for index in indexes for sample in index.samples]
    labels, classes = class_ids([sample.label for sample in samples], source)
    texts = [sample.text or "" for sample in samples]
    return ImageDataset(
        pixels,
        labels,
        classes,
        name=name,
        source=source,
        kind=TARS,
        texts=texts if any(texts) else None,
        dropped=dropped,
        warnings=_warnings(tars, indexes),
    )


def _warnings(tars: Sequence[Path], indexes: Sequence[TarIndex]) -> list[str]:
    warnings = [f"{path}: {text}" for path, index in zip(tars, indexes, strict=True) for text in index.warnings]
    for what, listed in (
        ("samples have no image and are left out", [index.without_image for index in indexes]),
        (
            "members do not stand beside the others of their key; they are joined here, "
            "but readers of streams take them as samples of their own",
            [index.scattered for index in indexes],
        ),
    ):
        members = [f"{path}/{member}" for path, found in zip(tars, listed, strict=True) for member in found]
        if members:
            more = ", ..." if len(members) > SHOWN else ""
            warnings.append(f"{len(members)} {what}: {', '.join(members[:SHOWN])}{more}")
    return warnings


def is_tars(path: Path) -> bool:
    """Whether a path means tars by its name: one, or a pattern."""
    return path.suffix == ".tar" and (path.exists() or "{" in str(path) or glob.has_magic(str(path)))


def tar_paths(pattern: Path) -> list[Path]:
    """The tars of a pattern: `{000..146}` and `{a,b}` in their order, `*`, `?` and `[0-9]` sorted.

    Raises: FileNotFoundError naming those that are missing; ValueError for a range that counts down or has no end.
    """
    if pattern.exists():
        return [pattern]
    paths: list[Path] = []
    for text in expand_braces(str(pattern)):
        paths += [Path(found) for found in sorted(glob.glob(text))] if glob.has_magic(text) else [Path(text)]
    missing = [str(path) for path in paths if not path.is_file()]
    if missing or not paths:
        some = f": {', '.join(missing[:SHOWN])}" if missing else ""
        raise FileNotFoundError(f"{pattern}: {len(missing)} of {len(paths)} tars do not exist{some}")
    return list(dict.fromkeys(paths))


def expand_braces(text: str) -> list[str]:
    """`a-{08..10}-{x,y}.tar` -> `a-08-x.tar`, `a-08-y.tar`, `a-09-x.tar`, ... as a shell does.

    Raises: ValueError for a range that counts down, or more than a million names.
    """
    parts = _BRACES.split(text)  # text and the insides of braces, in turn
    choices: list[Iterable[str]] = [[part] for part in parts[::2]]
    count = 1
    for position, inside in enumerate(parts[1::2]):
        words: Sequence[str] = inside.split(",")
        if found := _RANGE.fullmatch(inside):
            first, last = int(found[1]), int(found[2])
            if last < first or last - first >= MAX_TARS:
                raise ValueError(
                    f"{text}: {{{inside}}} counts {'down' if last < first else 'too far'}; use {{000..146}}"
                )
            words = [str(number).zfill(len(found[1])) for number in range(first, last + 1)]
        choices.insert(2 * position + 1, words)
        count *= len(words)
        if count > MAX_TARS:
            raise ValueError(f"{text} stands for more than {MAX_TARS:,} names")
    return ["".join(words) for words in itertools.product(*choices)]


def tars_by_split(tars: Sequence[Path]) -> dict[str, list[Path]]:
    """Split -> tars, by a word in their names (`imagenet-val-0003.tar`); all are "train" where no name has one.

    Raises: ValueError if some have such a word and others do not.
    """
    splits: dict[str, list[Path]] = {}
    for path in tars:
        words = [word for word in re.split(r"[^a-z]+", path.stem.lower()) if word in SPLITS]
        splits.setdefault(words[-1] if words else "", []).append(path)
    if len(splits) > 1 and "" in splits:
        raise ValueError(
            f"{os.path.dirname(tars[0])}: the names of some tars tell their split, not {splits[''][0].name}; "
            "give a pattern, such as train-{000..146}.tar"
        )
    return {"train": splits[""]} if "" in splits else splits
