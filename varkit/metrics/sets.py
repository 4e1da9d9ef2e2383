"""Sets of images to be scored: opened from anything, checked before any work, read as uint8 in batches.

What a training run may skip, a score may not: an unreadable file, a second size or a missing image changes the number.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from varkit.data.images import DATASETS, ImageDataset, open_images
from varkit.data.transforms import ArrayPixels, FilePixels, ImageTransform, reason_of
from varkit.pictures import UInt8Rule, to_uint8

THREADS = 8
"""That decode; Pillow does it outside of Python's lock."""
CHUNK = 32
"""Images that one thread decodes at a time."""
COLOUR = 10.0
"""Levels by which the channels of areas differ on average, below which images count as grey."""
SHOWN = 5
"""Files that an error names."""

Size = tuple[int, ...]
"""(height, width) of images, (frames, height, width) of clips."""


@dataclass
class ImageSet:
    """N images of one size, or N clips.

    read(indices) -> uint8 (B, 3, H, W), or clips (B, T, H, W, 3).   hash() -> 32 hex digits of the content.
    labels: (N,) int64 or None.   channels: 1 where every image is stored grey, else 3; None for a model.
    settings: how the set was made, where that is known.   bound: what others are measured by, such as real images.
    """

    name: str
    source: str
    kind: str
    num: int
    size: Size
    read: Callable[[Sequence[int]], Tensor]
    hash: Callable[[], str]
    channels: int | None = 3
    labels: Tensor | None = None
    class_names: list[str] = field(default_factory=list)
    texts: list[str] | None = None
    settings: dict[str, Any] = field(default_factory=dict)
    bound: bool = False
    threads: int = THREADS  # that read ahead; 0: read where it is asked for
    chunk: int = CHUNK  # images that one of them reads at a time
    title: Callable[[int], str] = "image {}".format  # what an error calls an image

    def __len__(self) -> int:
        return self.num

    @cached_property
    def grey(self) -> bool | None:
        """Whether images are grey, however stored. Of those stored in colour some are looked at: a little noise in the
        channels makes no colour. None: unknown.
        """
        if self.channels != 3:
            return None if self.channels is None else True
        some = sorted({round(i * (self.num - 1) / 15) for i in range(16)})
        images = self.read(some)
        if images.ndim != 4:
            return False
        areas = F.adaptive_avg_pool2d(images.float(), 4)  # B 3 4 4
        return float((areas.amax(1) - areas.amin(1)).mean()) < COLOUR

    def batches(self, indices: Sequence[int], batch_size: int) -> Iterator[Tensor]:
        """uint8 (B, 3, H, W), in the order of the indices; decoded ahead by threads, three batches at most."""
        if self.threads == 0:
            for first in range(0, len(indices), batch_size):
                yield self.read(indices[first : first + batch_size])
            return
        chunks = [indices[i : i + self.chunk] for i in range(0, len(indices), self.chunk)]
        ahead = 3 * -(-batch_size // self.chunk)
        held: list[Tensor] = []
        with ThreadPoolExecutor(self.threads) as pool:
            waiting: list[Future[Tensor]] = [pool.submit(self.read, c) for c in chunks[:ahead]]
            try:
                for position in range(len(chunks)):
                    held.append(waiting.pop(0).result())
                    if (following := position + ahead) < len(chunks):
                        waiting.append(pool.submit(self.read, chunks[following]))
                    while sum(map(len, held)) >= batch_size:
                        joined = torch.cat(held)
                        yield joined[:batch_size]
                        held = [joined[batch_size:]] if len(joined) > batch_size else []
                if held:
                    yield torch.cat(held)
            finally:
                for future in waiting:
                    future.cancel()


def tensor_set(
    images: Tensor, *, name: str = "tensor", rule: UInt8Rule = "round", labels: Tensor | None = None
) -> ImageSet:
    """A set held in memory.

    Args: images: uint8 (N, 3 or 1, H, W), or floats in [-1, 1], made 8-bit by `rule` (`varkit.pictures.to_uint8`).
    Raises: ValueError for another shape or dtype, and for floats that are not finite or clearly not in [-1, 1].
    """
    if (
        images.ndim != 4
        or images.shape[1] not in (1, 3)
        or not (images.is_floating_point() or images.dtype == torch.uint8)
    ):
        raise ValueError(
            f"{name}: images must be (N, 3, H, W) or (N, 1, H, W), uint8 or floats in [-1, 1]; got {images.dtype} "
            f"{tuple(images.shape)}"
        )
    if images.is_floating_point():
        bad = (~images.isfinite()).flatten(1).any(1).nonzero().flatten().tolist()
        if bad:
            raise ValueError(f"{name}: {len(bad)} images hold NaN or infinity (from 0: {bad[:SHOWN]})")
        if len(images) and float(images.abs().amax()) > 2:
            raise ValueError(f"{name}: floats must be in [-1, 1]; the largest is {float(images.abs().amax()):g}")
        images = to_uint8(images, rule)
    channels = images.shape[1]
    pixels = images.cpu().expand(-1, 3, -1, -1)
    return ImageSet(
        name=name,
        source=name,
        kind="tensor",
        num=len(images),
        size=(images.shape[2], images.shape[3]),
        read=lambda indices: pixels[list(indices)],
        hash=lambda: hash_arrays(images.cpu().numpy()),
        channels=channels,
        labels=labels,
        threads=0,
    )


def stored_set(
    source: str | Path,
    *,
    split: str | None = None,
    root: str | Path | None = None,
    size: Size | None = None,
    fit: str = "none",
) -> ImageSet:
    """A folder, an .npz or .npy file, IDX files, tars, or a data set by name: what `open_images` opens.

    Args:
        split, root: as `varkit.data.images.open_images` takes them.
        size, fit: with a fit of `center`, `squash` or `pad`, images are made this (height, width).
    Raises: FileNotFoundError; ValueError for no images, files that cannot be read, images of several sizes.
    """
    dataset = open_images(source, split=split or "train", root=root)
    if dataset.skipped:
        _refuse_unreadable(dataset, [(s.path, s.reason) for s in dataset.skipped])
    stored, channels = _look(dataset)
    fitted = fit != "none" and size is not None and (len(stored) > 1 or next(iter(stored)) != size)
    if len(stored) > 1 and not fitted:
        (a, one), (b, other) = list(stored.items())[:2]
        raise ValueError(
            f"{dataset.source}: images of {len(stored)} sizes, such as {one} ({a[0]}x{a[1]}) and {other} "
            f"({b[0]}x{b[1]}); a score needs one size. Resize them first, or use a protocol with images.fit"
        )
    if fitted and size is not None:
        dataset.transform = ImageTransform(size, mode=fit, enlarge=1.0)  # type: ignore[arg-type]
    labelled = bool(len(dataset.labels)) and bool((dataset.labels >= 0).all())
    return ImageSet(
        name=dataset.name,
        source=dataset.source,
        kind=dataset.kind if source not in DATASETS else f"{source}, {split or 'train'} split",
        num=len(dataset),
        size=size if fitted and size is not None else next(iter(stored)),
        read=lambda indices: _read(dataset, indices),
        hash=lambda: _hash(dataset, fit if fitted else "none", size if fitted else None),
        channels=channels,
        labels=dataset.labels if labelled else None,
        class_names=dataset.classes,
        texts=dataset.texts,
        title=dataset.pixels.paths.__getitem__ if isinstance(dataset.pixels, FilePixels) else "image {}".format,
    )


def _look(dataset: ImageDataset) -> tuple[dict[Size, str], int]:
    """Size -> an image of it, from the headers of all files; and 1 where all of them are grey."""
    if isinstance(dataset.pixels, ArrayPixels):
        _, height, width, channels = dataset.pixels.array.shape
        return {(height, width): "the array"}, channels
    assert isinstance(dataset.pixels, FilePixels)
    sizes: dict[Size, str] = {}
    modes: Counter[str] = Counter()
    broken = []
    with ThreadPoolExecutor(THREADS) as pool:
        headers = pool.map(partial(_header, dataset.pixels), range(len(dataset)))
        for path, (size, mode, error) in zip(dataset.pixels.paths, headers, strict=True):
            if error:
                broken.append((path, error))
            else:
                sizes.setdefault(size, path)
                modes[mode] += 1
    if broken:
        _refuse_unreadable(dataset, broken)
    return sizes, 1 if set(modes) <= {"L", "1", "I;16", "LA"} else 3


def _header(pixels: FilePixels, index: int) -> tuple[Size, str, str]:
    try:
        with pixels.open(index) as file, Image.open(file) as image:
            turned = image.getexif().get(0x0112, 1) in (5, 6, 7, 8)  # the data sets turn pictures upright
            return (image.size if turned else image.size[::-1]), image.mode, ""
    except Exception as error:  # Pillow's plugins raise anything on damaged files
        return (0, 0), "", reason_of(error)


def _read(dataset: ImageDataset, indices: Sequence[int]) -> Tensor:
    batch = dataset.__getitems__(list(indices))
    if batch["index"].tolist() != list(indices):
        _refuse_unreadable(dataset, [(s.path, s.reason) for s in dataset.skipped])
    images = batch["images"]
    return to_uint8(images) if images.is_floating_point() else images


def _refuse_unreadable(dataset: ImageDataset, broken: list[tuple[str, str]]) -> None:
    named = "; ".join(f"{path}: {reason}" for path, reason in broken[:SHOWN])
    raise ValueError(
        f"{dataset.source}: {len(broken)} of {len(dataset) + len(dataset.dropped)} files cannot be read ({named}). "
        "A score of the others would be another number; replace or remove them"
    )


def _hash(dataset: ImageDataset, fit: str, size: Size | None) -> str:
    if isinstance(dataset.pixels, ArrayPixels):
        digest = hash_arrays(dataset.pixels.array)
    else:
        assert isinstance(dataset.pixels, FilePixels)
        with ThreadPoolExecutor(THREADS) as pool:
            digest = "".join(pool.map(partial(_file_digest, dataset.pixels), range(len(dataset))))
    return hashlib.blake2b(f"{digest} {fit} {size}".encode(), digest_size=16).hexdigest()


def _file_digest(pixels: FilePixels, index: int) -> str:
    with pixels.open(index) as file:
        return hashlib.blake2b(file.read(), digest_size=16).hexdigest()


def hash_arrays(*arrays: np.ndarray) -> str:
    """32 hex digits of dtypes, shapes and values, read in pieces."""
    digest = hashlib.blake2b(digest_size=16)
    for array in arrays:
        digest.update(f"{array.dtype} {array.shape}".encode())
        for first in range(0, len(array), 1024):
            digest.update(np.ascontiguousarray(array[first : first + 1024]).data)
    return digest.hexdigest()
