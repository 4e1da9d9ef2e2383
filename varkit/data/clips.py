"""Clips to train on: `open_clips` opens any set of videos, with classes where it has some.

    dataset = open_clips("ucf101/", frames=17, size=128, fps=8)
    loader = DataLoader(dataset, batch_size=8, shuffle=True, collate_fn=collate)

Shapes: N videos in the set, B clips in a batch, T frames, h w size as stored, H W size after the transform.
"""

from __future__ import annotations

import logging
import operator
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor
from torch.utils.data import Dataset

from varkit.config import nearest
from varkit.data.clip_layouts import ALLOWED_CLIPS, FoundClips, find_clips
from varkit.data.clip_rules import ClipRule
from varkit.data.moving import MOVING_FASHION, MovingFashion
from varkit.data.splits import SPLITS
from varkit.data.transforms import MAX_FAILURES, ImageTransform, Mode, SkippedImage, reason_of
from varkit.data.video import ShortVideo

log = logging.getLogger("varkit.data")

CLIP_DATASETS = (MOVING_FASHION,)
_ELSEWHERE = "could not be read in a loader worker, whose log says why"


class ClipDataset(Dataset[dict[str, Any]]):
    """N videos with class ids, of each of which a clip is taken. Made by `open_clips`.

    An item is asked for by its index, or by `(index, key)`: the key chooses the first frame where `rule.start` is
    `random`, and the crop and flip, the same for all frames of the clip. So a sampler that gives a new key each epoch
    gets new clips, the same on every machine. A plain index is its own key.

    A video that cannot be read, or (where `rule.short` is `skip`) has too few frames, is logged once, listed in
    `skipped`, and the next one that serves is given in its place, with its own index and label. After 100 such in a
    row: ValueError.

    Attributes:
        rule: which frames; its stride counts where `fps` is None.
        fps: wanted frames a second: every n-th frame is taken, n the whole number nearest to rate / fps, at least 1.
        which: of the clips of a video, where `rule.per_video` has several.
        transform: applied to every frame; None gives the stored uint8 pixels.
        classes, labels, name, source, kind, warnings: as `ImageDataset`.   texts: None, as videos have none.
    """

    texts: None = None

    def __init__(
        self,
        found: FoundClips,
        *,
        name: str,
        source: str,
        rule: ClipRule,
        fps: float | None = None,
        transform: ImageTransform | None = None,
    ) -> None:
        self.videos, self.labels, self.classes = found.videos, found.labels, list(found.classes)
        self.kind, self.dropped, self.warnings = found.kind, list(found.dropped), list(found.warnings)
        self.name, self.source = name, source
        self.rule, self.fps, self.transform, self.which = rule, fps, transform, 0
        self.reasons: dict[int, str] = {}
        self.unreadable = torch.zeros(len(self.videos), dtype=torch.bool)
        with suppress(RuntimeError):  # no shared memory: then each worker keeps its own record
            self.unreadable.share_memory_()

    @property
    def num_classes(self) -> int:
        return len(self.classes)

    @property
    def skipped(self) -> list[SkippedImage]:
        """Left out so far: dropped on opening, or found unreadable or too short since by any loader worker."""
        where = self.unreadable.nonzero().flatten().tolist()
        return self.dropped + [SkippedImage(self.videos.names[i], self.reasons.get(i, _ELSEWHERE)) for i in where]

    def __len__(self) -> int:
        return len(self.videos)

    def set_clips(self, rule: ClipRule, fps: float | None, transform: ImageTransform | None) -> None:
        """Choose clips and size; a set that is computed is computed at that size, and not cut.

        Raises: ValueError for a size or rate that it cannot have, or where no video serves.
        """
        if fps is not None and rule.stride != 1:
            raise ValueError(f"stride={rule.stride} and fps={fps} both say which frames are taken: give one")
        if fps is not None and not fps > 0:
            raise ValueError(f"fps must be above 0; got {fps}")
        if isinstance(self.videos, MovingFashion):
            if fps is not None:
                raise ValueError(f"{MOVING_FASHION} has no frames a second: give stride, not fps={fps}")
            if transform is not None:
                self.videos = self.videos.resized(transform.height_width)
        self.rule, self.fps, self.transform = rule, fps, transform
        if not isinstance(self.videos, MovingFashion):
            self._load(0, 0)  # a probe

    def __getitem__(self, entry: int | tuple[int, int]) -> dict[str, Any]:
        """One clip: "image" (3, T, H, W), otherwise as that of `ImageDataset`."""
        batch = self.__getitems__([entry])
        item = {"image": batch["images"][0], "label": int(batch["labels"][0])}
        return item | {"index": int(batch["index"][0]), "key": int(batch["keys"][0])}

    def __getitems__(self, entries: Sequence[int | tuple[int, int]]) -> dict[str, Any]:
        """A whole batch, which is what a torch DataLoader with `collate_fn=collate` asks for.

        Returns: "images" float32 (B, 3, T, H, W) in [-1, 1] (uint8 (B, 3, T, h, w) without transform), "labels",
            "index" and "keys" int64 (B,).
        Raises: IndexError; ValueError if no video serves, or clips of several sizes meet without transform.
        """
        pairs = [self._pair(entry) for entry in entries]
        wanted, keys = [index for index, _ in pairs], torch.tensor([key for _, key in pairs], dtype=torch.int64)
        if isinstance(self.videos, MovingFashion):
            images, used = self._computed(self.videos, wanted, keys), wanted
        else:
            read = [self._load(index, key) for index, key in pairs]
            clips, used = [clip for clip, _ in read], [really for _, really in read]
            sizes = {tuple(clip.shape[-2:]) for clip in clips}
            if len(sizes) > 1:
                some = ", ".join(f"{h}x{w}" for h, w in sorted(sizes)[:4])
                raise ValueError(f"clips of sizes {some} in one batch; give a size")
            images = torch.stack(clips)
        index = torch.tensor(used, dtype=torch.int64)
        return {"images": images, "labels": self.labels[index], "index": index, "keys": keys}

    def _computed(self, videos: MovingFashion, indices: list[int], keys: Tensor) -> Tensor:
        starts = [s[self.which] for s in self.rule.starts(keys.tolist(), [videos.num_frames(i) for i in indices])]
        grey = torch.from_numpy(videos.clips(indices, self.rule.frames, self.rule.stride, starts))[:, None]
        if self.transform is None:
            return grey.expand(-1, 3, -1, -1, -1).contiguous()
        if self.transform.flip:
            mirrored = self.transform.uniforms(keys)[:, 2] < 0.5
            grey = torch.where(mirrored.view(-1, 1, 1, 1, 1), grey.flip(-1), grey)
        return grey.float().div_(127.5).sub_(1).repeat(1, 3, 1, 1, 1)

    def _load(self, wanted: int, key: int) -> tuple[Tensor, int]:
        """The clip of the first video at or after `wanted` that serves, wrapping round: (3, T, H, W), and its index."""
        tries = min(len(self.videos), MAX_FAILURES)
        for index in ((wanted + step) % len(self.videos) for step in range(tries)):
            if self.unreadable[index]:
                continue
            try:
                clip = self._clip(index, key)
            except ShortVideo as error:
                if self.rule.short == "refuse":
                    raise ValueError(f"{error}: give shorter clips, a smaller stride, or short=skip") from error
                self._skip(index, str(error).removeprefix(self.videos.names[index]).strip())
            except (ValueError, MemoryError) as error:  # what cannot be read names its file
                self._skip(index, reason_of(error).removeprefix(self.videos.names[index]).strip())
            else:
                return self._transformed(clip, index, key), index
        reason = self.reasons.get(wanted, _ELSEWHERE)
        raise ValueError(
            f"no clip could be taken of {tries} videos in a row from {self.videos.names[wanted]} on ({reason}); remove "
            "or replace damaged files, or ask for shorter clips"
        )

    def _skip(self, index: int, reason: str) -> None:
        self.unreadable[index] = True
        self.reasons[index] = reason
        log.warning("skipping %s: %s", self.videos.names[index], reason)

    def _clip(self, index: int, key: int) -> Tensor:
        """uint8 (T, h, w, 3). Raises: ShortVideo; ValueError for a file that cannot be read."""
        rule = replace(self.rule, stride=self.stride(index))
        for _ in range(2):  # the header may promise more frames than decode, and is then set right
            frames = self.videos.num_frames(index)
            starts = rule.starts([key], [frames])[0]
            if not starts:
                raise ShortVideo(self.videos.names[index], frames, rule.window)
            try:
                return self.videos.clip(index, rule.frames, rule.stride, starts[self.which])
            except ShortVideo as error:
                short = error
        raise short

    def stride(self, index: int) -> int:
        """Every which frame of a video is taken. Raises: ValueError where `fps` is asked of a video without a rate."""
        if self.fps is None:
            return self.rule.stride
        rate = self.videos.rate(index)
        if rate is None:
            raise ValueError(f"{self.videos.names[index]} has no frames a second, as frames in folders: give stride")
        return max(1, round(rate / self.fps))

    def _transformed(self, clip: Tensor, index: int, key: int) -> Tensor:
        frames = clip.permute(0, 3, 1, 2)  # T 3 h w
        if self.transform is not None:
            try:
                frames = self.transform(frames, torch.full((len(frames),), key))
            except ValueError as error:  # too large for mode `pad`
                raise ValueError(f"{self.videos.names[index]}: {error}") from error
        return frames.transpose(0, 1).contiguous()

    def _pair(self, entry: int | tuple[int, int]) -> tuple[int, int]:
        index, key = entry if isinstance(entry, tuple | list) else (entry, None)
        index = operator.index(index)
        if not -len(self) <= index < len(self):
            raise IndexError(f"index {index} is out of range for {len(self)} videos of {self.name}")
        index %= len(self)
        return index, index if key is None else operator.index(key)


def open_clips(
    source: str | Path,
    *,
    split: str = "train",
    frames: int = 16,
    stride: int = 1,
    fps: float | None = None,
    size: int | tuple[int, int] | None = None,
    start: Literal["first", "middle", "random"] = "first",
    short: Literal["refuse", "skip"] = "skip",
    mode: Mode = "center",
    enlarge: float = 1.0,
    flip: bool = False,
    seed: int = 0,
    root: str | Path | None = None,
    fold: int = 1,
) -> ClipDataset:
    """Open a set of clips, whatever form its videos are in. Nothing is decoded but one clip, as a probe.

    Args:
        source: "moving-fashion", computed from Fashion-MNIST (`root`: where that lies), or what `find_clips` takes:
            folders by class, plain folders, folders of frames, UCF-101, Kinetics, arrays, one video.
        split: train, val, validation or test, as `open_images`.
        frames, stride, start, short, seed: as `ClipRule`; the start is drawn anew for each key.
        fps: instead of stride, wanted frames a second; see `ClipDataset`.
        size, mode, enlarge, flip: as `ImageTransform`, alike for all frames. None gives frames as they are stored
            (computed ones at 32).
        fold: of UCF-101, which of its three lists.
    Raises: FileNotFoundError if it does not exist; ValueError if no video of it serves, or it has no such split.
    """
    if split not in SPLITS:
        raise ValueError(f"split is {split!r}; choose one of {', '.join(SPLITS)}{nearest(split, SPLITS)}")
    rule = ClipRule(frames=frames, stride=stride, start=start, short=short, seed=seed)
    if isinstance(source, str) and source in CLIP_DATASETS:
        videos = MovingFashion(split, root=root)
        found = FoundClips(videos, torch.from_numpy(videos.labels), videos.classes, source)
        name, where = source, videos.source
    else:
        if root is not None:
            raise ValueError(f"root is only for named sets ({', '.join(CLIP_DATASETS)}), not for {source}")
        if not Path(source).expanduser().exists() and (hint := nearest(str(source), CLIP_DATASETS)):
            raise FileNotFoundError(f"{source} does not exist{hint} Allowed: {ALLOWED_CLIPS}.")
        found = find_clips(source, split, fold)
        name, where = Path(source).expanduser().resolve().name, str(source)
    dataset = ClipDataset(found, name=name, source=where, rule=rule, fps=fps)
    transform = None if size is None else ImageTransform(size, mode=mode, enlarge=enlarge, flip=flip, seed=seed)
    dataset.set_clips(rule, fps, transform)
    for warning in dataset.warnings:
        log.warning("%s: %s", dataset.source, warning)
    for skipped in dataset.dropped[:MAX_FAILURES]:
        log.warning("skipping %s: %s", *skipped)
    return dataset
