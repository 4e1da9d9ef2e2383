"""Which clips are taken of videos, by a named rule, and batches of them, decoded ahead.

    for batch, indices in clips(open_videos("samples/"), ClipRule(frames=16, start="random"), batch_size=8):
        ...

Shapes: N videos, B clips in a batch, T frames, H W pixels. Pixels are uint8 RGB, always with the channels last.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import islice
from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from varkit.data.video import ShortVideo, VideoSet
from varkit.rng import Draw, Rng

Start = Literal["first", "middle", "random", "even", "all"]
Quantize = Literal["none", "truncate"]


@dataclass(frozen=True)
class ClipRule:
    """Which clips are cut out of each video.

    A clip takes a window of frames * stride frames, the first of every `stride`, as the loaders of cd-fvd and
    StyleGAN-V count it; so the last stride - 1 frames of a window are looked at by no one, but must exist.
    """

    frames: int = 16
    stride: int = 1
    start: Start = "first"
    """first: the first window.  middle: the one in the middle, the earlier of two.  random: windows drawn uniformly
    from all there are.  even: windows from the first to the last, equally far apart.  all: windows side by side."""
    per_video: int = 1
    """Clips of each video; only with `random`, and with `even`, where one is that in the middle."""
    short: Literal["refuse", "skip"] = "refuse"
    """What becomes of a video shorter than a window: an error that names it, or it is left out and counted."""
    seed: int = 0
    """Of random starts. They depend on it and the number of the video alone, not on batches, threads or processes."""

    def __post_init__(self) -> None:
        if min(self.frames, self.stride, self.per_video) < 1:
            raise ValueError(
                f"frames, stride and per_video count from 1; got {self.frames}, {self.stride}, {self.per_video}"
            )
        if self.start not in get_args(Start):
            raise ValueError(f"start must be one of {', '.join(get_args(Start))}; got {self.start!r}")
        if self.short not in ("refuse", "skip"):
            raise ValueError(f"short must be refuse or skip; got {self.short!r}")
        if self.per_video > 1 and self.start not in ("random", "even"):
            raise ValueError(f"per_video={self.per_video} goes with start=random or even; got start={self.start}")

    @property
    def window(self) -> int:
        """Frames that a video needs."""
        return self.frames * self.stride

    def starts(self, indices: Sequence[int], num_frames: Sequence[int]) -> list[list[int]]:
        """For each video of these numbers and lengths the first frames of its clips; none where it is too short."""
        places = [max(n - self.window + 1, 0) for n in num_frames]
        if self.start == "first":
            return [[0] if n else [] for n in places]
        if self.start == "middle" or (self.start == "even" and self.per_video == 1):
            return [[(n - 1) // 2] if n else [] for n in places]
        if self.start == "even":
            last = self.per_video - 1
            return [[k * (n - 1) // last for k in range(last + 1)] if n else [] for n in places]
        if self.start == "all":
            return [list(range(0, n, self.window)) for n in places]
        rng = Rng.for_keys(self.seed, torch.tensor(indices))
        uniforms = rng.uniform(torch.arange(self.per_video), Draw.AUGMENT, step=1)  # step 0: crops and flips of images
        return [
            [min(int(u * n), n - 1) for u in us] if n else [] for us, n in zip(uniforms.tolist(), places, strict=True)
        ]


def cover_and_crop(frames: Tensor, size: int, *, interpolation: str = "bilinear", antialias: bool) -> Tensor:
    """Shorter side to `size`, the other rounded up, then the middle: floats (N, C, H, W) -> (N, C, size, size).

    Source: songweige/content-debiased-fvd: cdfvd/utils/data_utils.py (38d63c3), and TATS. The product is taken in
    floating point as there: a square of 49 pixels becomes 225 by 224 before it is cropped to 224.
    """
    height, width = frames.shape[-2:]
    scale = size / min(height, width)
    target = (size, math.ceil(width * scale)) if height < width else (math.ceil(height * scale), size)
    frames = F.interpolate(frames, target, mode=interpolation, align_corners=False, antialias=antialias)
    top, left = (target[0] - size) // 2, (target[1] - size) // 2
    return frames[..., top : top + size, left : left + size]


def to_bytes(values: Tensor) -> Tensor:
    """Floats in [0, 1] -> uint8, by truncation as cd-fvd and VideoGPT do; values outside are clamped."""
    return (values * 255).clamp(0, 255).to(torch.uint8)


def fit_clip(clip: Tensor, size: int, quantize: Quantize = "none") -> Tensor:
    """uint8 (T, H, W, 3) -> (T, size, size, 3) by `cover_and_crop` with antialias: float32 in [0, 1], or uint8.

    Args: quantize: `none` stays float (TATS, LARP); `truncate` gives uint8 (cd-fvd).
    """
    floats = cover_and_crop(clip.permute(0, 3, 1, 2).float() / 255, size, antialias=True).permute(0, 2, 3, 1)
    return (to_bytes(floats) if quantize == "truncate" else floats).contiguous()


@dataclass
class ClipBatches:
    """Batches of clips with the numbers of their videos, in order; made by `clips`.

    Iterating gives (clips, indices): clips uint8 (B, T, H, W, 3), or as `fit_clip` makes them; indices int64 (B,).
    Threads decode ahead; at most 2 B + workers clips are in memory. `len` is the number of batches planned.

    Attributes: plan, (video, which of its clips, first frame) of each clip.   skipped: names of videos left out as too
        short; decoding may add some whose header promised more.
    """

    videos: VideoSet
    rule: ClipRule
    batch_size: int
    workers: int
    resize: int | None
    quantize: Quantize
    plan: list[tuple[int, int, int]]
    skipped: list[str] = field(default_factory=list)

    def __len__(self) -> int:
        return math.ceil(len(self.plan) / self.batch_size)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        todo = iter(self.plan)
        batch: list[tuple[int, Tensor]] = []
        pool = ThreadPoolExecutor(self.workers, thread_name_prefix="varkit-clips")
        try:
            ahead: deque[tuple[int, Future[Tensor | None]]] = deque()
            for entry in islice(todo, self.batch_size + self.workers):
                ahead.append((entry[0], pool.submit(self._load, *entry)))
            while ahead:
                index, future = ahead.popleft()
                clip = future.result()
                for entry in islice(todo, 1):
                    ahead.append((entry[0], pool.submit(self._load, *entry)))
                if clip is not None:
                    batch.append((index, clip))
                if batch and (len(batch) == self.batch_size or not ahead):
                    _one_size([(self.videos.names[i], (c.shape[1], c.shape[2])) for i, c in batch])
                    yield torch.stack([c for _, c in batch]), torch.tensor([i for i, _ in batch])
                    batch = []
        finally:
            pool.shutdown(cancel_futures=True)

    def read(self, number: int) -> Tensor:
        """The clip `number` of the plan, (T, H, W, 3), in this thread.

        Raises: ValueError for a file that does not decode, or that turns out to have no such clip.
        """
        clip = self._load(*self.plan[number])
        if clip is None:
            name = self.videos.names[self.plan[number][0]]
            raise ValueError(f"{name} is shorter than its header says and has no such clip: remove it, or iterate")
        return clip

    def _load(self, index: int, which: int, start: int) -> Tensor | None:
        """One clip; None if the video turns out shorter than its header says and has no such clip."""
        try:
            clip = self.videos.clip(index, self.rule.frames, self.rule.stride, start)
        except ShortVideo as error:
            starts = self.rule.starts([index], [error.frames])[0]
            if not starts:
                self._too_short(index, error.frames)
            if which >= len(starts):
                return None
            clip = self.videos.clip(index, self.rule.frames, self.rule.stride, starts[which])
        return clip if self.resize is None else fit_clip(clip, self.resize, self.quantize)

    def _too_short(self, index: int, frames: int) -> None:
        name = self.videos.names[index]
        if self.rule.short == "refuse":
            raise ValueError(
                f"{name} has {frames} frames; clips of {self.rule.frames} frames at stride {self.rule.stride} need "
                f"{self.rule.window}: give longer videos, shorter clips, or short=skip"
            )
        if name not in self.skipped:
            self.skipped.append(name)


def clips(
    videos: VideoSet,
    rule: ClipRule,
    batch_size: int = 16,
    workers: int = 2,
    *,
    resize: int | None = None,
    quantize: Quantize = "none",
) -> ClipBatches:
    """Plan the clips of a set. Headers are read now, so that what cannot be is refused now; frames when iterated.

    Args:
        workers: decoding threads.
        resize: None gives clips as stored; a number brings each to that size by `fit_clip`, with `quantize`.
    Raises: ValueError for an unreadable file, a video shorter than a clip (unless `rule.short` is `skip`), videos of
        several sizes in one batch without `resize`, or no clip at all.
    """
    if batch_size < 1 or workers < 1 or (resize is not None and resize < 1):
        raise ValueError(f"batch_size, workers and resize count from 1; got {batch_size}, {workers}, {resize}")
    if quantize not in get_args(Quantize):
        raise ValueError(f"quantize must be one of {', '.join(get_args(Quantize))}; got {quantize!r}")
    if resize is None and quantize != "none":
        raise ValueError(f"quantize={quantize} goes with resize; clips as stored are uint8 already")
    batches = ClipBatches(videos, rule, batch_size, workers, resize, quantize, [])
    with ThreadPoolExecutor(workers) as pool:
        infos = list(pool.map(lambda video: video.info(), videos.videos))
    planned = rule.starts(range(len(infos)), [info.frames for info in infos])
    for index, (info, starts) in enumerate(zip(infos, planned, strict=True)):
        batches.plan += [(index, which, start) for which, start in enumerate(starts)]
        if not starts:
            batches._too_short(index, info.frames)
    if not batches.plan:
        raise ValueError(f"{videos.source}: all {len(videos)} videos are shorter than the {rule.window} frames needed")
    for first in range(0, len(batches.plan) if resize is None else 0, batch_size):
        rows = [index for index, _, _ in batches.plan[first : first + batch_size]]
        _one_size([(videos.names[i], infos[i][1:]) for i in rows])
    return batches


def _one_size(entries: list[tuple[str, tuple[int, int]]]) -> None:
    (first, size), *others = entries
    for name, other in others:
        if other != size:
            raise ValueError(
                f"{first} is {size[0]}x{size[1]} and {name} is {other[0]}x{other[1]} (height x width): clips of one "
                "batch must agree; give resize"
            )
