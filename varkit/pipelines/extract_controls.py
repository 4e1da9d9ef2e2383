"""Folders of images -> folders of control maps, under the same paths; what is there is kept, so a stop costs little."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import torch
from PIL import Image
from torch import Tensor

from varkit.conditioning.extractors import Extractor
from varkit.data.controls import keyed_files
from varkit.data.transforms import EXTENSIONS, reason_of, refuse_large, to_rgb
from varkit.pictures import save_png

RECORD = "control.json"
"""In the folder of maps: what made them."""
CHUNK = 32
"""Images held at once."""
THREADS = 8
"""They read and write; Pillow works outside of Python's lock."""


class Made(NamedTuple):
    """made: maps written now.   there: kept from before.   skipped: (file, reason) of unreadable images."""

    made: int
    there: int
    skipped: list[tuple[str, str]]


def find_images(source: Path) -> dict[str, str]:
    """The file itself, or all of a folder, by path without ending. Raises: as `keyed_files`; ValueError."""
    if source.is_file():
        if not source.name.lower().endswith(EXTENSIONS):
            raise ValueError(f"{source} is no image by its name; allowed endings: {', '.join(EXTENSIONS)}")
        return {source.stem: str(source)}
    if not source.exists():
        raise FileNotFoundError(f"{source} does not exist; give an image, or a folder of images")
    return keyed_files(source)


def check_folder(source: Path, out: Path, record: dict[str, Any]) -> None:
    """Make sure that maps may go to `out`, and that what it holds was made alike. Writes nothing.

    Raises: ValueError for a folder inside of the images, of other settings, or of images that nothing tells about.
    """
    if out.exists() and not out.is_dir():
        raise ValueError(f"--out {out} is a file; give a folder")
    if source.is_dir() and (out.resolve() == source.resolve() or source.resolve() in out.resolve().parents):
        raise ValueError(f"{out} lies in {source}: maps would count as images; choose a folder beside it")
    path = out / RECORD
    if path.is_file():
        try:
            held = json.loads(path.read_text(encoding="utf-8"))
        except ValueError:
            held = {}
        if held != record:
            raise ValueError(f"{out} holds maps made with {held}, not {record}; choose another folder")
    elif out.is_dir() and any(name.lower().endswith(EXTENSIONS) for name in os.listdir(out)):
        raise ValueError(f"{out} holds images and no {RECORD} that says what they are; choose another folder")


def _write_record(out: Path, record: dict[str, Any]) -> None:
    out.mkdir(parents=True, exist_ok=True)
    part = out / f".{RECORD}.{os.getpid()}.part"
    part.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    os.replace(part, out / RECORD)


def extract_controls(
    build: Callable[[], Extractor],
    source: Path,
    out: Path,
    *,
    record: dict[str, Any],
    batch_size: int = 16,
    process_index: int = 0,
    num_processes: int = 1,
    progress: bool = False,
) -> Made:
    """Write the map of each image as OUT/PATH.png, grey or RGB. A map that is there is not made again.

    Args:
        build: gives the extractor; called once, if there is anything to do.
        record: what the maps depend on, as JSON keeps it; it stays in the folder.
        batch_size: images of one size extracted at once.
        process_index, num_processes: each process does a part of the files.
    Raises: FileNotFoundError; ValueError for bad input, before any work.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1; got {batch_size}")
    found = find_images(source)
    check_folder(source, out, record)
    keys = list(found)[process_index * len(found) // num_processes : (process_index + 1) * len(found) // num_processes]
    targets = {key: out / f"{key}.png" for key in keys}
    todo = [key for key in keys if not targets[key].is_file()]
    made, skipped = 0, []
    if not todo:
        return Made(0, len(keys), [])
    extractor = build()
    _write_record(out, record)
    from tqdm import tqdm

    with ThreadPoolExecutor(THREADS) as pool, tqdm(total=len(todo), unit="image", disable=not progress) as bar:
        for start in range(0, len(todo), CHUNK):
            chunk = todo[start : start + CHUNK]
            read = dict(zip(chunk, pool.map(_read, [found[key] for key in chunk]), strict=True))
            skipped += [(found[key], image) for key, image in read.items() if isinstance(image, str)]
            for names, images in _batches(read, batch_size):
                try:
                    maps = extractor(images).cpu().numpy()
                except ValueError as error:
                    raise ValueError(f"{found[names[0]]}: {error}") from None
                list(pool.map(save_png, map(Image.fromarray, maps), [targets[name] for name in names]))
                made += len(names)
            bar.update(len(chunk))
    return Made(made, len(keys) - len(todo), skipped)


def _read(path: str) -> Tensor | str:
    """uint8 (H, W, 3), or why not."""
    import numpy as np

    try:
        refuse_large(os.stat(path).st_size)
        with Image.open(path) as image:
            return torch.from_numpy(np.array(to_rgb(image)))
    except Exception as error:  # Pillow's plugins raise anything on damaged files
        return reason_of(error)


def _batches(read: dict[str, Tensor | str], batch_size: int) -> Iterator[tuple[list[str], Tensor]]:
    """Images of one size together."""
    by_size: dict[tuple[int, ...], list[str]] = {}
    for name, image in read.items():
        if isinstance(image, Tensor):
            by_size.setdefault(tuple(image.shape), []).append(name)
    for names in by_size.values():
        for start in range(0, len(names), batch_size):
            batch = names[start : start + batch_size]
            yield batch, torch.stack([read[name] for name in batch])  # type: ignore[misc]
