"""How sets of videos lie on the disk: by class, plain, folders of frames, UCF-101, Kinetics, arrays.

Class ids are positions in the sorted names of the training split, whatever the layout.
"""

from __future__ import annotations

import csv
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from varkit.data.labels import numbered
from varkit.data.splits import HELD_OUT, SPLITS, pick_split, split_name
from varkit.data.transforms import SkippedImage
from varkit.data.video import ALLOWED, VIDEO_EXTENSIONS, VideoFile, VideoSet, open_videos

ALLOWED_CLIPS = f"moving-fashion, {ALLOWED}; by class, UCF-101 and Kinetics as docs/video-data.md tells"

UCF_LISTS = ("ucfTrainTestlist", "ucfTrainTestlist-recognition", ".")
"""Where, below the folder of the set, the lists of UCF-101 may be."""
KINETICS_COLUMNS = ("label", "youtube_id", "time_start", "time_end", "split")
KINETICS_SPLITS = {"train": "train", "val": "val", "validate": "val", "validation": "val", "test": "test"}


@dataclass
class FoundClips:
    """Videos with class ids: int64 (N,), -1 where there is none.   dropped: what is left out, and why."""

    videos: VideoSet
    labels: Tensor
    classes: Sequence[str]
    kind: str
    dropped: list[SkippedImage] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)


def find_clips(source: str | Path, split: str = "train", fold: int = 1) -> FoundClips:
    """The videos of a source, and their classes. No video is opened.

    Args:
        source: one of
            - UCF-101: a folder with `ucfTrainTestlist/` (classInd.txt, trainlist01.txt, testlist01.txt, ...) and the
              videos, in folders by class at any depth;
            - Kinetics: a folder with .csv files of the columns label, youtube_id, time_start, time_end, split, and
              videos called `ID_START_END.mp4`, times of six digits, at any depth;
            - a folder of train/ and val|validation|test/, each one of the following;
            - a folder with one sub-folder per class, of videos or of folders of frames;
            - whatever `open_videos` takes, without classes; of an .npz `arr_1` are class ids.
        split: of sources that have splits.   fold: of UCF-101, 1 to 3.
    Raises: as `open_videos`; ValueError naming the splits there are.
    """
    path = Path(source).expanduser()
    if not path.is_dir():
        if split != "train":
            raise ValueError(f"{source} is no folder and has no split {split!r}; leave split out")
        videos = open_videos(source)
        labels = _array_labels(path, len(videos)) if path.suffix.lower() == ".npz" else None
        return _found(videos, labels, numbered(labels, path), path.suffix[1:] or "video")
    if (lists := _ucf_lists(path)) is not None:
        return _ucf(path, lists, split, fold)
    if tables := _kinetics_tables(path):
        return _kinetics(path, tables, split)
    folders = sorted(p.name for p in path.iterdir() if p.is_dir() and not p.name.startswith("."))
    if "train" in folders and len(folders) > 1 and set(folders) <= set(SPLITS):
        chosen = pick_split({name: path / name for name in folders}, split, path)
        found = find_clips(chosen)
        return found if chosen.name == "train" else _with_classes_of(found, find_clips(path / "train"), chosen)
    if split != "train":
        raise ValueError(
            f"{path} has no split {split!r}: it holds no train/ beside {', '.join(HELD_OUT)}/; leave split out, or "
            "give the folder of that split"
        )
    return _by_folder(path)


def _found(videos: VideoSet, labels: Any, classes: Sequence[str], kind: str) -> FoundClips:
    ids = torch.full((len(videos),), -1) if labels is None else torch.as_tensor(labels, dtype=torch.int64)
    return FoundClips(videos, ids, classes, kind)


def _array_labels(path: Path, count: int) -> np.ndarray | None:
    with np.load(path, allow_pickle=False) as loaded:
        if "arr_1" not in loaded:
            return None
        labels = loaded["arr_1"]
    if labels.shape != (count,) or not np.issubdtype(labels.dtype, np.integer):
        raise ValueError(f"{path}: labels (arr_1) are {labels.dtype} {labels.shape}; expected ints of shape ({count},)")
    return labels.astype(np.int64)


def _by_folder(folder: Path) -> FoundClips:
    """A class is the first folder on the way to a video, unless frames lie right in it, or videos right in `folder`."""
    videos = open_videos(folder)
    parts = [Path(name).relative_to(folder).parts for name in videos.names]
    classes = sorted({p[0] for p in parts if len(p) > 1})
    if not classes or any(len(p) == 1 for p in parts):
        found = _found(videos, None, (), "folder of videos")
        if classes:
            found.warnings.append(
                f"{sum(len(p) == 1 for p in parts)} videos lie outside of the class folders {', '.join(classes[:5])}, "
                "so no video has a class"
            )
        return _without_empty(found)
    position = {name: i for i, name in enumerate(classes)}
    return _without_empty(_found(videos, [position[p[0]] for p in parts], classes, "class folders"))


def _without_empty(found: FoundClips) -> FoundClips:
    """Leave out files without a byte, as they come from broken downloads. Raises: ValueError when no other is there."""
    bad = {i for i, v in enumerate(found.videos.videos) if isinstance(v, VideoFile) and not os.path.getsize(v.path)}
    if not bad:
        return found
    keep = [i for i in range(len(found.videos)) if i not in bad]
    if not keep:
        raise ValueError(f"{found.videos.source} holds only {len(bad)} empty files; allowed: {ALLOWED}")
    names = found.videos.names
    found.dropped += [SkippedImage(names[i], "empty file") for i in sorted(bad)]
    videos = [found.videos.videos[i] for i in keep]
    found.videos = VideoSet(videos, [names[i] for i in keep], found.videos.source)
    found.labels = found.labels[keep]
    return found


def _with_classes_of(found: FoundClips, train: FoundClips, where: Path) -> FoundClips:
    position = {name: i for i, name in enumerate(train.classes)}
    if unknown := [name for name in found.classes if name not in position]:
        raise ValueError(f"{where} has classes that train lacks: {', '.join(unknown[:5])}; class ids would not agree")
    ids = torch.tensor([position[name] for name in found.classes] + [-1], dtype=torch.int64)
    found.labels, found.classes = ids[found.labels], train.classes  # -1 finds the last entry
    return found


def _files_by_name(folder: Path) -> dict[str, Path]:
    """Every video below a folder, by its name without the ending."""
    found: dict[str, Path] = {}
    for where, folders, names in os.walk(folder, followlinks=True):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in sorted(names):
            if Path(name).suffix.lower() in VIDEO_EXTENSIONS and not name.startswith("."):
                found.setdefault(Path(name).stem, Path(where, name))
    return found


def _listed(
    folder: Path, wanted: Iterable[tuple[str, str]], classes: Sequence[str], kind: str, split: str
) -> FoundClips:
    """The videos of a list of (name without ending, class or "") that are there; what is missing is counted and named.

    Raises: ValueError when none is.
    """
    files, position = _files_by_name(folder), {name: i for i, name in enumerate(classes)}
    entries = list(wanted)
    there = [(files[stem], position.get(label, -1)) for stem, label in entries if stem in files]
    missing = [stem for stem, _ in entries if stem not in files]
    if not there:
        some = f", such as {missing[0]}" if missing else ""
        raise ValueError(f"{folder} ({kind}) lists {len(entries)} videos for {split}, but none of them is there{some}")
    videos = VideoSet([VideoFile(p) for p, _ in there], [str(p) for p, _ in there], str(folder))
    found = _found(videos, [label for _, label in there], classes, kind)
    if missing:
        found.warnings.append(
            f"{len(missing)} of {len(entries)} listed videos are not there: {', '.join(missing[:3])}"
            + (", ..." if len(missing) > 3 else "")
        )
    return _without_empty(found)


# ---- UCF-101 --------------------------------------------------------------------------------------------------


def _ucf_lists(folder: Path) -> Path | None:
    return next((folder / name for name in UCF_LISTS if (folder / name / "classInd.txt").is_file()), None)


def _ucf(folder: Path, lists: Path, split: str, fold: int) -> FoundClips:
    """Source: the archive UCF101TrainTestSplits-RecognitionTask of the data set's page (Soomro et al., arXiv
    1212.0402).

    Numbers of classInd.txt count from 1, in the order of the names; ours from 0.
    """
    files = {"train": lists / f"trainlist{fold:02d}.txt", "test": lists / f"testlist{fold:02d}.txt"}
    there = {name: path for name, path in files.items() if path.is_file()}
    if not there:
        raise ValueError(f"{lists} has no list {fold} ({files['train'].name}); UCF-101 has lists 1 to 3")
    chosen = split_name(there, split, folder)
    classes = sorted(line.split()[1] for line in _lines(lists / "classInd.txt") if len(line.split()) == 2)
    wanted = []
    for line in _lines(there[chosen]):
        path = Path(line.split()[0])
        if path.parent.name not in classes:
            raise ValueError(f"{there[chosen]}: class {path.parent.name!r} of {line!r} is not in classInd.txt")
        wanted.append((path.stem, path.parent.name))
    return _listed(folder, wanted, classes, f"UCF-101, list {fold}", chosen)


def _lines(path: Path) -> list[str]:
    return [line.strip() for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]


# ---- Kinetics -------------------------------------------------------------------------------------------------


def _kinetics_tables(folder: Path) -> list[Path]:
    """The .csv files, here or one folder down, that have Kinetics' columns."""
    found = []
    for path in sorted([*folder.glob("*.csv"), *folder.glob("*/*.csv")]):
        with path.open(encoding="utf-8-sig", newline="") as file:
            header = next(csv.reader(file), [])
        if set(KINETICS_COLUMNS) <= {name.strip() for name in header}:
            found.append(path)
    return found


def _kinetics(folder: Path, tables: Sequence[Path], split: str) -> FoundClips:
    """Source: the annotations of Kinetics-400/600/700 (Carreira et al., arXiv 1808.01340), as cvdf and DeepMind hand
    them out; names of files as ActivityNet's crawler gives them, `%s_%06d_%06d.mp4`."""
    rows: dict[str, list[tuple[str, str]]] = {}
    for path in tables:
        with path.open(encoding="utf-8-sig", newline="") as file:
            for number, row in enumerate(csv.DictReader(file, skipinitialspace=True), start=2):
                name, part = _kinetics_name(row, f"{path}:{number}")
                rows.setdefault(part, []).append((name, row["label"].strip()))
    chosen = split_name(rows, split, folder)
    names = {label for _, label in rows.get("train", rows[chosen]) if label}
    if unknown := sorted({label for _, label in rows[chosen] if label} - names):
        raise ValueError(f"{folder}: {chosen} has classes that train lacks: {', '.join(unknown[:5])}")
    return _listed(folder, dict(rows[chosen]).items(), sorted(names), "Kinetics", chosen)


def _kinetics_name(row: Mapping[str, str | None], where: str) -> tuple[str, str]:
    """Name without ending, and split. Raises: ValueError, beginning with `where`."""
    values = [(row.get(name) or "").strip() for name in KINETICS_COLUMNS]
    _, key, start, end, part = values
    if not key or not re.fullmatch(r"\d+(\.\d+)?", start) or not re.fullmatch(r"\d+(\.\d+)?", end):
        raise ValueError(
            f"{where}: youtube_id {key!r}, time_start {start!r}, time_end {end!r}; expected an id and seconds"
        )
    if part not in KINETICS_SPLITS:
        raise ValueError(f"{where}: split is {part!r}; expected one of {', '.join(KINETICS_SPLITS)}")
    return f"{key}_{int(float(start)):06d}_{int(float(end)):06d}", KINETICS_SPLITS[part]
