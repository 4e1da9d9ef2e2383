"""Looking at every video of a set: what is there, and what is wrong with it."""

from __future__ import annotations

import hashlib
import os
import sys
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from varkit.data.check import TINY_CLASS, what_is_wrong
from varkit.data.clips import CLIP_DATASETS, open_clips
from varkit.data.npz import map_npz
from varkit.data.transforms import EXTENSIONS, SkippedImage, reason_of
from varkit.data.video import VIDEO_EXTENSIONS, ShortVideo, VideoSet

CHUNK = 64
"""Frames that are decoded at once."""


@dataclass(frozen=True)
class ClipReport:
    """What `check_clips` found.

    Attributes: total: videos found, readable or not.   classes: readable videos by class.   sizes: by "HxW".
        rates: by frames a second, "unknown" where nothing says.   frames: the fewest, the median and the most.
        seconds: of all videos of known rate.   duplicates: videos whose frames equal those of another one before.
    """

    path: str
    kind: str
    total: int
    readable: int
    classes: dict[str, int]
    sizes: dict[str, int]
    rates: dict[str, int]
    frames: tuple[int, int, int]
    seconds: float
    duplicates: int
    broken: list[SkippedImage] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON; `broken` as {"path", "reason"}."""
        return asdict(self) | {"frames": list(self.frames), "broken": [skipped._asdict() for skipped in self.broken]}

    def lines(self) -> list[str]:
        """The report as text, for people."""
        counts = self.classes.values()
        per_class = f", {min(counts)} to {max(counts)} videos each" if counts else ""
        text = [
            f"{self.path} ({self.kind})",
            f"  videos   {self.readable} readable of {self.total}",
            f"  classes  {len(self.classes)}{per_class}" if counts else "  classes  none",
            f"  frames   {self.frames[0]} to {self.frames[2]}, median {self.frames[1]}",
            "  sizes    " + ", ".join(f"{size}: {n}" for size, n in self.sizes.items()),
            "  rates    " + ", ".join(f"{rate}: {n}" for rate, n in self.rates.items()),
            *([f"  seconds  {self.seconds:.1f} in all"] if self.seconds else []),
        ]
        return text + what_is_wrong(self.broken, self.warnings)


class _Seen(NamedTuple):
    """One fully decoded video. promised: frames by its header."""

    frames: int
    promised: int
    size: str
    rate: float | None
    digest: bytes


def is_video_source(source: str | Path) -> bool:
    """Whether a source holds videos, by the names of its files, or by its number of axes. Folders with images do not:
    whether these are frames, nothing tells."""
    if isinstance(source, str) and source in CLIP_DATASETS:
        return True
    path = Path(source).expanduser()
    if path.is_dir():
        found = False
        for name in (name.lower() for _, _, names in os.walk(path) for name in names):
            if name.endswith(EXTENSIONS):
                return False
            found = found or name.endswith(VIDEO_EXTENSIONS)
        return found
    if path.suffix.lower() == ".npz":
        try:
            mapped = map_npz(path, "arr_0")
        except (OSError, KeyError, ValueError):  # whoever opens it says what is wrong
            return False
        return mapped is not None and mapped.ndim == 5
    if path.suffix.lower() == ".npy":
        try:
            return bool(np.load(path, mmap_mode="r", allow_pickle=False).ndim == 5)
        except (OSError, ValueError):
            return False
    return path.suffix.lower() in VIDEO_EXTENSIONS


def check_clips(
    source: str | Path,
    *,
    workers: int = 0,
    progress: bool = False,
    split: str = "train",
    root: str | Path | None = None,
) -> ClipReport:
    """Decode every frame of every video of a set and report what is there and what is wrong.

    Args: source, split, root: as `open_clips`.   workers: decoding threads; 0 decodes in the calling one.
    Raises: as `open_clips`; ValueError when no video is readable. Damaged videos are no error but are reported.
    """
    if workers < 0:
        raise ValueError(f"workers is {workers}; give 0 or a number of threads")
    dataset = open_clips(source, split=split, root=root, frames=1)
    look, everything = partial(_look, dataset.videos), range(len(dataset))
    readable: list[int] = []
    seen: list[_Seen] = []
    broken = list(dataset.dropped)
    with ThreadPoolExecutor(max(workers, 1)) as pool:
        for index, outcome in enumerate(pool.map(look, everything) if workers else map(look, everything)):
            if isinstance(outcome, SkippedImage):
                broken.append(outcome)
            else:
                readable.append(index)
                seen.append(outcome)
            if progress and ((index + 1) % 100 == 0 or index + 1 == len(dataset)):
                end = "\n" if index + 1 == len(dataset) else ""
                print(f"\rchecked {index + 1} of {len(dataset)}", end=end, file=sys.stderr, flush=True)
    if not seen:
        raise ValueError(f"{source}: none of {len(dataset)} videos is readable; {broken[0].path}: {broken[0].reason}")
    labels = dataset.labels[readable]
    counts = torch.bincount(labels[labels >= 0], minlength=dataset.num_classes).tolist()
    classes = dict(zip(dataset.classes, counts, strict=True))
    lengths = sorted(one.frames for one in seen)
    names = [dataset.videos.names[i] for i in readable]
    return ClipReport(
        path=dataset.source,
        kind=dataset.kind,
        total=len(dataset) + len(dataset.dropped),
        readable=len(seen),
        classes=classes,
        sizes=_commonest([one.size for one in seen]),
        rates=_commonest(["unknown" if one.rate is None else f"{one.rate:.4g}" for one in seen]),
        frames=(lengths[0], lengths[len(lengths) // 2], lengths[-1]),
        seconds=sum(one.frames / one.rate for one in seen if one.rate),
        duplicates=len(seen) - len({one.digest for one in seen}),
        broken=broken,
        warnings=dataset.warnings + _warnings(seen, names, classes),
    )


def _commonest(values: Sequence[str]) -> dict[str, int]:
    top = dict(Counter(values).most_common(10))
    others = len(values) - sum(top.values())
    return top | ({"other": others} if others else {})


def _warnings(seen: Sequence[_Seen], names: Sequence[str], classes: dict[str, int]) -> list[str]:
    found = []
    tiny = [f"{name} ({n})" for name, n in classes.items() if n < TINY_CLASS]
    if tiny:
        more = f" and {len(tiny) - 5} more" if len(tiny) > 5 else ""
        found.append(f"fewer than {TINY_CLASS} videos in class {', '.join(tiny[:5])}{more}")
    if single := [name for name, one in zip(names, seen, strict=True) if one.frames == 1]:
        found.append(f"{len(single)} videos have one frame alone: {single[0]}")
    if lying := [name for name, one in zip(names, seen, strict=True) if one.frames < one.promised]:
        found.append(f"{len(lying)} videos have fewer frames than their headers say: {lying[0]}")
    if len({one.size for one in seen}) > 1:
        found.append(f"{len({one.size for one in seen})} different sizes; training brings them to one")
    if len({one.rate for one in seen}) > 1:
        found.append("different frames a second; data.clips.fps makes them about equal in training")
    if same := len(seen) - len({one.digest for one in seen}):
        found.append(f"{same} videos equal another one")
    return found


def _look(videos: VideoSet, index: int) -> _Seen | SkippedImage:
    name = videos.names[index]
    try:
        promised = videos.num_frames(index)
        if not promised:
            return SkippedImage(name, "it holds no frames")
        digest, height, width = hashlib.blake2b(digest_size=16), *videos.size(index)
        start = 0
        while start < videos.num_frames(index):
            count = min(CHUNK, videos.num_frames(index) - start)
            try:
                digest.update(videos.clip(index, count, 1, start).numpy().tobytes())
            except ShortVideo as error:  # its length is now known
                if error.frames == 0:
                    return SkippedImage(name, "none of its frames decodes")
                continue
            start += count
        return _Seen(videos.num_frames(index), promised, f"{height}x{width}", videos.rate(index), digest.digest())
    except (ValueError, MemoryError) as error:
        return SkippedImage(name, reason_of(error).removeprefix(name).strip())
