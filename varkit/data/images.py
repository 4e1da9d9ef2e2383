"""Image data sets: one class, one function that opens anything, one that checks it.

    dataset = open_images("flowers/", transform=ImageTransform(256, flip=True))
    loader = DataLoader(dataset, batch_size=64, shuffle=True, collate_fn=collate)

Shapes: N images in the set, B in a batch, h w size as stored, H W size after the transform.
"""

import hashlib
import io
import json
import logging
import operator
import os
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from varkit.config import nearest
from varkit.data.fashion import (
    FASHION_CLASSES,
    find_idx,
    prepare_fashion_mnist,
    read_array,
    read_fashion_mnist,
    read_idx_pair,
)
from varkit.data.transforms import (
    MAX_FAILURES,
    ArrayPixels,
    FilePixels,
    ImageTransform,
    Pixels,
    SkippedImage,
    reason_of,
    stack_images,
    to_rgb,
)

__all__ = [
    "DataReport",
    "ImageDataset",
    "ImageTransform",
    "SkippedImage",
    "check_images",
    "collate",
    "open_images",
    "prepare_fashion_mnist",
]

log = logging.getLogger("varkit.data")

EXTENSIONS = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp")
DATASETS = ("fashion-mnist",)
HELD_OUT = ("val", "validation", "test")
SPLITS = ("train", *HELD_OUT)
MAX_CLASSES = 1_000_000
TINY_CLASS = 10  # images below which the report warns
ALLOWED = (
    "a folder with one sub-folder per class, a folder with metadata.jsonl, a folder of images, "
    f"a .npz or .npy array, IDX files, or a name ({', '.join(DATASETS)})"
)


class ImageDataset(Dataset[dict[str, Any]]):
    """N images with class ids and, if there are any, texts. Made by `open_images`.

    An item is asked for by its index, or by `(index, key)`: the key chooses the random crop and
    flip, so a sampler that gives a new key each epoch gets new crops, the same on every machine. A
    plain index is its own key.

    An image that does not decode is logged once, listed in `skipped`, and the next readable one is
    returned in its place with its own index and label. After 100 failures in a row: ValueError.

    Attributes:
        classes: class names, the position is the id; empty if there are no labels.
        labels: int64 (N,), -1 where unlabelled.
        texts: N strings, or None.
        name, source, kind: how the set is called, where it is, what was found there.
        warnings: what looked odd when it was opened.
        transform: applied to every image; None gives the stored uint8 pixels.
    """

    def __init__(
        self,
        pixels: Pixels,
        labels: Tensor | npt.NDArray[np.int64] | None = None,
        classes: Sequence[str] = (),
        *,
        name: str,
        source: str,
        kind: str,
        texts: list[str] | None = None,
        dropped: Sequence[SkippedImage] = (),
        warnings: Sequence[str] = (),
        transform: ImageTransform | None = None,
    ) -> None:
        self.pixels = pixels
        self.labels = torch.full((len(pixels),), -1) if labels is None else torch.as_tensor(labels)
        self.classes = list(classes)
        self.name, self.source, self.kind = name, source, kind
        self.texts = texts
        self.dropped = list(dropped)
        self.warnings = list(warnings)
        self.transform = transform

    @property
    def num_classes(self) -> int:
        return len(self.classes)

    @property
    def skipped(self) -> list[SkippedImage]:
        """Left out so far: dropped on opening, or found unreadable since by any loader worker."""
        return self.dropped + self.pixels.failures()

    def __len__(self) -> int:
        return len(self.pixels)

    def __getitem__(self, entry: int | tuple[int, int]) -> dict[str, Any]:
        """One image.

        Returns: "image" float32 (3, H, W) in [-1, 1] (uint8 (3, h, w) without transform), "label",
            "index" and "key" ints, "text" if the set has texts.
        Raises: IndexError; ValueError if no image is readable or a `pad` transform is too small.
        """
        batch = self.__getitems__([entry])
        item = {"image": batch["images"][0], "label": int(batch["labels"][0])}
        item |= {"index": int(batch["index"][0]), "key": int(batch["keys"][0])}
        return item | ({"text": batch["texts"][0]} if "texts" in batch else {})

    def __getitems__(self, entries: Sequence[int | tuple[int, int]]) -> dict[str, Any]:
        """A whole batch, which is what a torch DataLoader with `collate_fn=collate` asks for.

        Returns: "images" float32 (B, 3, H, W) in [-1, 1] (uint8 (B, 3, h, w) without transform),
            "labels", "index" and "keys" int64 (B,), "texts" list of B strings if the set has texts.
        Raises: as `__getitem__`; ValueError if there is no transform and the sizes differ.
        """
        pairs = [self._pair(entry) for entry in entries]
        keys = torch.tensor([key for _, key in pairs], dtype=torch.int64)
        images, used = self.pixels.read([index for index, _ in pairs], keys, self.transform)
        index = torch.tensor(used, dtype=torch.int64)
        batch = {"images": images, "labels": self.labels[index], "index": index, "keys": keys}
        return batch | ({"texts": [self.texts[i] for i in used]} if self.texts is not None else {})

    def _pair(self, entry: int | tuple[int, int]) -> tuple[int, int]:
        index, key = entry if isinstance(entry, (tuple, list)) else (entry, None)
        index = operator.index(index)
        if not -len(self) <= index < len(self):
            raise IndexError(f"index {index} is out of range for {len(self)} images of {self.name}")
        index %= len(self)
        return index, index if key is None else operator.index(key)


def collate(items: dict[str, Any] | Sequence[dict[str, Any]]) -> dict[str, Any]:
    """`collate_fn` of a DataLoader: passes the batch of `__getitems__` on, or stacks single items.

    Returns: the batch described at `ImageDataset.__getitems__`.
    Raises: ValueError if the images have different sizes.
    """
    if isinstance(items, dict):
        return items
    batch: dict[str, Any] = {"images": stack_images([item["image"] for item in items])}
    for name, one in (("labels", "label"), ("index", "index"), ("keys", "key")):
        batch[name] = torch.tensor([item[one] for item in items], dtype=torch.int64)
    return batch | ({"texts": [item["text"] for item in items]} if "text" in items[0] else {})


def open_images(
    source: str | Path,
    *,
    split: str = "train",
    transform: ImageTransform | None = None,
    root: str | Path | None = None,
) -> ImageDataset:
    """Open a set of images, whatever form it is in. Nothing is decoded but one image, as a probe.

    Args:
        source: one of
            - a folder with one sub-folder per class (sorted names are the ids, files may be
              nested);
            - a folder with metadata.jsonl: lines of `file_name`, optional `label` (all ints, or all
              names) and `text`;
            - a folder of images without classes;
            - a folder of train/ and val|validation|test/, each one of the above (class ids are
              those of train/), or of train.npz and so on;
            - .npz in ADM layout (arr_0 images, optional arr_1 labels) or .npy: uint8 (N, h, w, 3),
              (N, h, w, 1) or (N, h, w);
            - IDX files, gzipped or not: their folder, or the images file, labels beside it;
            - "fashion-mnist".
        split: train, val, validation or test, where the source has splits; a held-out name means
            the only held-out split there is. A source without splits takes only "train": itself.
        root: where a named set lies; see `varkit.data.fashion.read_fashion_mnist`.
    Raises: FileNotFoundError if it does not exist; ValueError if it holds no readable image, is
        damaged, or has no such split. Both say what is allowed.
    """
    if split not in SPLITS:
        raise ValueError(f"split is {split!r}; choose one of {', '.join(SPLITS)}{nearest(split, SPLITS)}")
    if isinstance(source, str) and source in DATASETS:
        pixels, labels, path = read_fashion_mnist(split, root)
        dataset = ImageDataset(ArrayPixels(pixels), labels, FASHION_CLASSES, name=source, source=str(path), kind=source)
    elif root is not None:
        raise ValueError(f"root is only for named sets ({', '.join(DATASETS)}), not for {source}")
    else:
        path = Path(source).expanduser()
        if not os.path.exists(path):
            beside = os.listdir(path.parent) if path.parent.is_dir() else []
            hint = nearest(str(source), DATASETS) or nearest(path.name, beside)
            raise FileNotFoundError(f"{source} does not exist{hint or '.'} Allowed: {ALLOWED}.")
        dataset = _open_folder(path, split) if path.is_dir() else _open_file(path, split)
    if len(dataset) == 0:
        raise ValueError(f"{source} holds no images; allowed: {ALLOWED}")
    if isinstance(dataset.pixels, FilePixels):
        dataset.pixels.load(0)
    for warning in dataset.warnings:
        log.warning("%s: %s", dataset.source, warning)
    for skipped in dataset.dropped[:MAX_FAILURES]:
        log.warning("skipping %s: %s", *skipped)
    dataset.transform = transform
    return dataset


def _open_file(path: Path, split: str) -> ImageDataset:
    if split != "train":
        raise ValueError(f"{path} is one file and has no split {split!r}; leave split out")
    if path.suffix in (".npz", ".npy"):
        return _open_array(path)
    if "labels" in path.name and "idx1" in path.name:
        raise ValueError(f"{path} is a labels file; give the images file (images-idx3) beside it")
    if "idx3" in path.name:
        return _open_idx(path)
    if path.suffix.lower() in EXTENSIONS:
        raise ValueError(f"{path} is one image; give the folder that holds it")
    raise ValueError(f"{path} is no image data that can be read; allowed: {ALLOWED}")


def _open_array(path: Path) -> ImageDataset:
    pixels, labels = read_array(path)
    classes = _numbered(labels, path)
    kind = path.suffix[1:]
    return ImageDataset(ArrayPixels(pixels), labels, classes, name=path.stem, source=str(path), kind=kind)


def _open_idx(path: Path) -> ImageDataset:
    pixels, labels = read_idx_pair(path)
    classes = _numbered(labels, path)
    return ImageDataset(ArrayPixels(pixels), labels, classes, name=path.parent.name, source=str(path), kind="idx")


def _open_folder(folder: Path, split: str) -> ImageDataset:
    entries = {name for name in os.listdir(folder) if not name.startswith(".")}
    folders = sorted(name for name in entries if (folder / name).is_dir())
    arrays = {name: folder / f"{name}.npz" for name in SPLITS if f"{name}.npz" in entries}
    idx = {name: path for name in ("train", "test") if (path := find_idx(folder, name)) is not None}
    has_metadata = "metadata.jsonl" in entries
    if idx and not has_metadata:
        return _open_idx(_pick(idx, split, folder))
    if arrays and not has_metadata:
        return _open_array(_pick(arrays, split, folder))
    if not has_metadata and "train" in folders and len(folders) > 1 and set(folders) <= set(SPLITS):
        chosen = _pick({name: folder / name for name in folders}, split, folder)
        dataset = _open_folder(chosen, "train")
        return dataset if chosen.name == "train" else _with_classes_of(dataset, folder / "train")
    if split != "train":
        raise ValueError(
            f"{folder} has no split {split!r}: it holds no train/ beside {', '.join(HELD_OUT)}/; "
            "leave split out, or give the folder of that split"
        )
    return _open_metadata(folder) if has_metadata else _open_files(folder, folders)


def _pick(splits: dict[str, Path], split: str, folder: Path) -> Path:
    held_out = [name for name in splits if name in HELD_OUT]
    if split in splits:
        return splits[split]
    if split in HELD_OUT and len(held_out) == 1:
        return splits[held_out[0]]
    raise ValueError(f"{folder} has no split {split!r}; it has {', '.join(splits)}")


def _with_classes_of(dataset: ImageDataset, train: Path) -> ImageDataset:
    """Give a held-out split the class ids of the training split, which may have more classes."""
    if dataset.kind == "class folders":
        classes = sorted(p.name for p in train.iterdir() if p.is_dir() and p.name[0] != ".")
    elif dataset.kind == "metadata.jsonl" and dataset.classes:
        classes = _open_folder(train, "train").classes
    else:
        return dataset
    position = {name: i for i, name in enumerate(classes)}
    if unknown := [name for name in dataset.classes if name not in position]:
        raise ValueError(
            f"{dataset.source} has classes that {train} lacks: {', '.join(unknown[:5])}; class ids would not agree"
        )
    ids = torch.tensor([position[name] for name in dataset.classes] + [-1], dtype=torch.int64)
    dataset.labels, dataset.classes = ids[dataset.labels], classes  # -1 finds the last entry
    return dataset


def _open_files(folder: Path, folders: list[str]) -> ImageDataset:
    loose, dropped = _image_files(folder, nested=False)
    by_class = {name: _image_files(folder / name, nested=True) for name in folders}
    warnings = []
    if any(files or empty for files, empty in by_class.values()):
        if loose:
            warnings.append(f"{len(loose)} images outside of the class folders are left out")
        paths = [path for files, _ in by_class.values() for path in files]
        labels = [i for i, (files, _) in enumerate(by_class.values()) for _ in files]
        dropped = [skipped for _, empty in by_class.values() for skipped in empty]
        empty_classes = [name for name, (files, _) in by_class.items() if not files]
        warnings += [f"class folder {name} holds no images" for name in empty_classes]
        if folders == ["train"]:
            warnings.append("its only class is called train; give the train folder if it is a split")
        classes, kind = folders, "class folders"
    else:
        paths, labels, classes, kind = loose, None, [], "flat folder"
    if not paths:
        found = sorted({Path(name).suffix or name for name in os.listdir(folder)})
        what = f"only {', '.join(found[:8])}" if found else "nothing"
        if dropped:
            what = f"only {len(dropped)} empty files"
        raise ValueError(f"{folder} holds no images but {what}; allowed endings: {', '.join(EXTENSIONS)}")
    return ImageDataset(
        FilePixels(paths),
        None if labels is None else torch.tensor(labels, dtype=torch.int64),
        classes,
        name=folder.resolve().name,
        source=str(folder),
        kind=kind,
        dropped=dropped,
        warnings=warnings,
    )


def _open_metadata(folder: Path) -> ImageDataset:
    paths: list[str] = []
    labels: list[int | str | None] = []
    texts: list[str | None] = []
    dropped: list[SkippedImage] = []
    for where, line in _json_lines(folder / "metadata.jsonl"):
        name, label, text = line.get("file_name"), line.get("label"), line.get("text")
        if not isinstance(name, str) or not name:
            raise ValueError(f"{where}: file_name is {name!r}; give the path of an image in {folder}")
        if isinstance(label, bool) or not isinstance(label, int | str | None):
            raise ValueError(f"{where}: label is {label!r}; give an int, a class name, or leave it out")
        if isinstance(label, int) and not 0 <= label < MAX_CLASSES:
            raise ValueError(f"{where}: label is {label}; class ids count from 0")
        if not isinstance(text, str | None):
            raise ValueError(f"{where}: text is {text!r}; give a string, or leave it out")
        path = str(folder / name)
        if reason := _unusable(path):
            dropped.append(SkippedImage(path, reason))
            continue
        paths.append(path)
        labels.append(label)
        texts.append(text)
    if not paths:
        some = f"; {dropped[0].path}: {dropped[0].reason}" if dropped else ""
        raise ValueError(f"{folder / 'metadata.jsonl'} lists no image that can be read{some}")
    listed = {os.path.normpath(path) for path in paths}
    others = [path for path in _image_files(folder)[0] if os.path.normpath(path) not in listed]
    unlisted = f"{len(others)} images are not listed in metadata.jsonl and left out: "
    unlisted += ", ".join(others[:5])
    ids, classes = _class_ids(labels, folder / "metadata.jsonl")
    return ImageDataset(
        FilePixels(paths),
        ids,
        classes,
        name=folder.resolve().name,
        source=str(folder),
        kind="metadata.jsonl",
        texts=[text or "" for text in texts] if any(texts) else None,
        dropped=dropped,
        warnings=[unlisted] if others else [],
    )


def _json_lines(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Each line of a JSON lines file as (file:line, object); empty lines are passed over."""
    with path.open("rb") as file:
        for number, raw in enumerate(file, start=1):
            where = f"{path}:{number}"
            if not raw.strip():
                continue
            try:
                line = json.loads(raw.decode("utf-8-sig"))
            except ValueError as error:
                raise ValueError(f"{where}: not JSON ({error}); each line is one object") from error
            if not isinstance(line, dict):
                raise ValueError(f"{where}: {type(line).__name__}; each line is one JSON object")
            yield where, line


def _class_ids(labels: list[int | str | None], where: Path) -> tuple[Tensor, list[str]]:
    """Labels by id or by name -> int64 (N,) with -1 where there is none, and the class names."""
    kinds = {type(label) for label in labels if label is not None}
    if len(kinds) > 1:
        raise ValueError(f"{where}: labels are ints in some lines and names in others; use one kind")
    if kinds == {str}:
        classes = sorted({label for label in labels if isinstance(label, str)})
        ids: dict[int | str | None, int] = {name: i for i, name in enumerate(classes)}
        return torch.tensor([ids.get(label, -1) for label in labels], dtype=torch.int64), classes
    numbers = np.array([label if isinstance(label, int) else -1 for label in labels], np.int64)
    return torch.from_numpy(numbers), _numbered(numbers, where)


def _numbered(labels: npt.NDArray[np.int64] | None, where: Path) -> list[str]:
    """Names for classes known by number only."""
    if labels is None or not len(labels):
        return []
    if labels.min() < -1 or labels.max() >= MAX_CLASSES:
        raise ValueError(
            f"{where}: labels from {labels.min()} to {labels.max()}; class ids count from 0, and -1 means no label"
        )
    return [str(i) for i in range(int(labels.max()) + 1)]


def _image_files(folder: Path, nested: bool = True) -> tuple[list[str], list[SkippedImage]]:
    """Image files of a folder, sorted by path, and the empty ones; hidden names are ignored."""
    files, dropped, todo = [], [], [str(folder)]
    while todo:
        with os.scandir(todo.pop()) as entries:
            for entry in entries:
                if entry.name.startswith("."):
                    continue
                if entry.is_dir():
                    todo += [entry.path] if nested else []
                elif entry.name.lower().endswith(EXTENSIONS):
                    if reason := _unusable(entry.path):
                        dropped.append(SkippedImage(entry.path, reason))
                    else:
                        files.append(entry.path)
    return sorted(files), sorted(dropped)


def _unusable(path: str) -> str:
    """Why a file cannot be an image, without opening it; empty if nothing speaks against it."""
    if not path.lower().endswith(EXTENSIONS):
        return f"not an image by its name; allowed endings: {', '.join(EXTENSIONS)}"
    try:
        return "" if os.stat(path).st_size else "empty file"
    except (OSError, ValueError) as error:
        return f"no such file ({reason_of(error)})" if os.path.islink(path) else "no such file"


@dataclass(frozen=True)
class DataReport:
    """What `check_images` found."""

    path: str
    kind: str
    """class folders, metadata.jsonl, flat folder, npz, npy, idx or fashion-mnist."""
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
            "  sizes    " + ", ".join(f"{size}: {n}" for size, n in self.sizes.items()),
            "  modes    " + ", ".join(f"{mode}: {n}" for mode, n in self.modes.items()),
        ]
        text += [f"  broken   {skipped.path}: {skipped.reason}" for skipped in self.broken[:20]]
        if len(self.broken) > 20:
            text.append(f"  broken   and {len(self.broken) - 20} more")
        return text + [f"  warning  {warning}" for warning in self.warnings]


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
        if workers == 0:
            yield from map(_look_at, pixels.paths)
        else:
            with ThreadPoolExecutor(workers) as pool:  # Pillow decodes outside of Python's lock
                for start in range(0, len(pixels), 1024):
                    yield from pool.map(_look_at, pixels.paths[start : start + 1024])


def _look_at(path: str) -> _Seen | SkippedImage:
    try:
        raw = Path(path).read_bytes()
        with Image.open(io.BytesIO(raw)) as image:
            mode, rgb = image.mode, to_rgb(image)
    except Exception as error:  # as in FilePixels.load
        return SkippedImage(path, reason_of(error))
    digest = hashlib.blake2b(raw, digest_size=16).digest()
    return _Seen(f"{rgb.height}x{rgb.width}", mode, digest)
