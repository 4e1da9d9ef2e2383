"""Looking at every image of a set: what is there, and what is wrong with it."""

import hashlib
import sys
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from PIL import Image

from varkit.data.images import open_images
from varkit.data.transforms import ArrayPixels, FilePixels, Pixels, SkippedImage, reason_of, to_rgb

TINY_CLASS = 10  # images below which the report warns


@dataclass(frozen=True)
class DataReport:
    """What `check_images` found."""

    path: str
    kind: str
    """class folders, metadata.jsonl, flat folder, webdataset, hugging face, npz, npy, idx or fashion-mnist."""
    total: int
    """Images found, readable or not."""
    readable: int
    classes: dict[str, int]
    """Readable images by class; empty if there are no classes."""
    sizes: dict[str, int]
    """Readable images by "HxW", the ten commonest and "other"."""
    modes: dict[str, int]
    """Readable images by Pillow's mode as stored ("RGB", "L", "P", ...)."""
    duplicates: int
    """Readable images whose content equals that of another one before."""
    texts: int = 0
    """Readable images with a text (caption)."""
    broken: list[SkippedImage] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON; `broken` as {"path", "reason"}."""
        return asdict(self) | {"broken": [skipped._asdict() for skipped in self.broken]}

    def lines(self) -> list[str]:
        """The report as text, for people."""
        counts = self.classes.values()
        per_class = f", {min(counts)} to {max(counts)} images each" if counts else ""
        text = [
            f"{self.path} ({self.kind})",
            f"  images   {self.readable} readable of {self.total}",
            f"  classes  {len(self.classes)}{per_class}" if counts else "  classes  none",
            *([f"  texts    {self.texts}"] if self.texts else []),
            "  sizes    " + ", ".join(f"{size}: {n}" for size, n in self.sizes.items()),
            "  modes    " + ", ".join(f"{mode}: {n}" for mode, n in self.modes.items()),
        ]
        return text + what_is_wrong(self.broken, self.warnings)


def what_is_wrong(broken: list[SkippedImage], warnings: list[str]) -> list[str]:
    """The last lines of a report: files that cannot be read, at most 20, and warnings."""
    text = [f"  broken   {skipped.path}: {skipped.reason}" for skipped in broken[:20]]
    if len(broken) > 20:
        text.append(f"  broken   and {len(broken) - 20} more")
    return text + [f"  warning  {warning}" for warning in warnings]


class _Seen(NamedTuple):
    """One fully decoded image."""

    size: str
    mode: str
    digest: bytes


def check_images(
    source: str | Path,
    *,
    workers: int = 0,
    progress: bool = False,
    split: str = "train",
    root: str | Path | None = None,
) -> DataReport:
    """Decode every image of a set and report what is there and what is wrong.

    Args:
        source, split, root: as `open_images`.
        workers: decoding threads; 0 decodes in the calling one.
        progress: count on standard error.
    Raises: as `open_images`; damaged images are no error but are reported.
    """
    if workers < 0:
        raise ValueError(f"workers is {workers}; give 0 or a number of threads")
    dataset = open_images(source, split=split, root=root)
    readable, seen, broken = [], [], list(dataset.dropped)
    for index, outcome in enumerate(_look_at_all(dataset.pixels, workers)):
        if isinstance(outcome, SkippedImage):
            broken.append(outcome)
        else:
            readable.append(index)
            seen.append(outcome)
        if progress and ((index + 1) % 1000 == 0 or index + 1 == len(dataset)):
            end = "\n" if index + 1 == len(dataset) else ""
            print(f"\rchecked {index + 1} of {len(dataset)}", end=end, file=sys.stderr, flush=True)
    labels = dataset.labels[readable]
    counts = torch.bincount(labels[labels >= 0], minlength=dataset.num_classes).tolist()
    sizes = Counter(one.size for one in seen)
    top = dict(sizes.most_common(10))
    others = len(seen) - sum(top.values())
    duplicates = len(seen) - len({one.digest for one in seen})
    warnings = list(dataset.warnings)
    tiny = [f"{name} ({n})" for name, n in zip(dataset.classes, counts, strict=True) if n < TINY_CLASS]
    if tiny:
        more = f" and {len(tiny) - 5} more" if len(tiny) > 5 else ""
        warnings.append(f"fewer than {TINY_CLASS} images in class {', '.join(tiny[:5])}{more}")
    if dataset.classes and (unlabelled := int((labels < 0).sum())):
        warnings.append(f"{unlabelled} images have no label")
    texts = 0 if dataset.texts is None else sum(bool(dataset.texts[i].strip()) for i in readable)
    if dataset.texts is not None and texts < len(seen):
        warnings.append(f"{len(seen) - texts} images have no text, or an empty one")
    if len(sizes) > 1:
        warnings.append(f"{len(sizes)} different sizes; train with a transform that makes them equal")
    if duplicates:
        warnings.append(f"{duplicates} images equal another one")
    return DataReport(
        path=dataset.source,
        kind=dataset.kind,
        total=len(dataset) + len(dataset.dropped),
        readable=len(seen),
        classes=dict(zip(dataset.classes, counts, strict=True)),
        sizes=top | ({"other": others} if others else {}),
        modes=dict(Counter(one.mode for one in seen).most_common()),
        duplicates=duplicates,
        texts=texts,
        broken=broken,
        warnings=warnings,
    )


def _look_at_all(pixels: Pixels, workers: int) -> Iterator[_Seen | SkippedImage]:
    """Every image in order."""
    if isinstance(pixels, ArrayPixels):
        _, height, width, channels = pixels.array.shape
        for image in pixels.array:
            digest = hashlib.blake2b(image.tobytes(), digest_size=16).digest()
            yield _Seen(f"{height}x{width}", "L" if channels == 1 else "RGB", digest)
    elif isinstance(pixels, FilePixels):
        look, everything = partial(_look_at, pixels), range(len(pixels))
        if workers == 0:
            yield from map(look, everything)
        else:
            with ThreadPoolExecutor(workers) as pool:  # Pillow decodes outside of Python's lock
                for start in range(0, len(pixels), 1024):
                    yield from pool.map(look, everything[start : start + 1024])


def _look_at(pixels: FilePixels, index: int) -> _Seen | SkippedImage:
    try:
        with pixels.open(index) as file:
            digest = hashlib.blake2b(file.read(), digest_size=16).digest()
            file.seek(0)
            with Image.open(file) as image:
                mode, rgb = image.mode, to_rgb(image)
    except Exception as error:  # as in FilePixels.load
        return SkippedImage(pixels.paths[index], reason_of(error))
    return _Seen(f"{rgb.height}x{rgb.width}", mode, digest)
