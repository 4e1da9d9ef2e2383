"""Folders of images: by class, with metadata.jsonl, without classes, of splits, of tars."""

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from varkit.data.arrays import open_array, open_idx
from varkit.data.dataset import ImageDataset
from varkit.data.fashion import find_idx
from varkit.data.labels import Label, class_ids, label_and_text
from varkit.data.splits import HELD_OUT, SPLITS, pick_split, split_name, with_classes_of
from varkit.data.tars import TARS, open_tars, tars_by_split
from varkit.data.transforms import EXTENSIONS, FilePixels, SkippedImage, reason_of


def open_folder(folder: Path, split: str) -> ImageDataset:
    """Whatever a folder holds; see `varkit.data.images.open_images`."""
    entries = {name for name in os.listdir(folder) if not name.startswith(".")}
    folders = sorted(name for name in entries if (folder / name).is_dir())
    arrays = {name: folder / f"{name}.npz" for name in SPLITS if f"{name}.npz" in entries}
    idx = {name: path for name in ("train", "test") if (path := find_idx(folder, name)) is not None}
    has_metadata = "metadata.jsonl" in entries
    if idx and not has_metadata:
        return open_idx(pick_split(idx, split, folder))
    if arrays and not has_metadata:
        return open_array(pick_split(arrays, split, folder))
    if not has_metadata and "train" in folders and len(folders) > 1 and set(folders) <= set(SPLITS):
        chosen = pick_split({name: folder / name for name in folders}, split, folder)
        dataset = open_folder(chosen, "train")
        return dataset if chosen.name == "train" else _with_classes_of_folder(dataset, folder / "train")
    tars = sorted(folder / name for name in entries if name.endswith(".tar"))
    if tars and not folders and not has_metadata and not any(name.lower().endswith(EXTENSIONS) for name in entries):
        return _open_tars(folder, tars, split)
    if split != "train":
        raise ValueError(
            f"{folder} has no split {split!r}: it holds no train/ beside {', '.join(HELD_OUT)}/; "
            "leave split out, or give the folder of that split"
        )
    dataset = _open_metadata(folder) if has_metadata else _open_files(folder, folders)
    if tars:
        dataset.warnings.append(f"{len(tars)} tars beside the images are left out: {tars[0]}")
    return dataset


def _open_tars(folder: Path, tars: list[Path], split: str) -> ImageDataset:
    """All tars of a folder, or those of a split where their names tell: train-0000.tar beside val-0000.tar."""
    splits = tars_by_split(tars)
    chosen = split if len(splits) == 1 and split == "train" else split_name(splits, split, folder)
    dataset = open_tars(splits.get(chosen, tars), folder.resolve().name, str(folder))
    if chosen != "train" and "train" in splits and dataset.classes:
        return with_classes_of(
            dataset, open_tars(splits["train"], folder.name, str(folder)).classes, splits["train"][0]
        )
    return dataset


def _with_classes_of_folder(dataset: ImageDataset, train: Path) -> ImageDataset:
    if dataset.kind == "class folders":
        classes = sorted(p.name for p in train.iterdir() if p.is_dir() and p.name[0] != ".")
    elif dataset.kind in ("metadata.jsonl", TARS) and dataset.classes:
        classes = open_folder(train, "train").classes
    else:
        return dataset
    return with_classes_of(dataset, classes, train)


def _open_files(folder: Path, folders: list[str]) -> ImageDataset:
    loose, dropped = image_files(folder, nested=False)
    by_class = {name: image_files(folder / name, nested=True) for name in folders}
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
    labels: list[Label] = []
    texts: list[str | None] = []
    dropped: list[SkippedImage] = []
    for where, line in _json_lines(folder / "metadata.jsonl"):
        name = line.get("file_name")
        if not isinstance(name, str) or not name:
            raise ValueError(f"{where}: file_name is {name!r}; give the path of an image in {folder}")
        label, text = label_and_text(line, where)
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
    others = [path for path in image_files(folder)[0] if os.path.normpath(path) not in listed]
    unlisted = f"{len(others)} images are not listed in metadata.jsonl and left out: "
    unlisted += ", ".join(others[:5])
    ids, classes = class_ids(labels, folder / "metadata.jsonl")
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


def image_files(folder: Path, nested: bool = True) -> tuple[list[str], list[SkippedImage]]:
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
