"""Videos for evaluation and training: open a set, choose clips by a named rule, decode ahead, write.

    videos = open_videos("samples/")
    for clips_batch, indices in clips(videos, ClipRule(frames=16, start="random"), batch_size=8):
        ...

Files are decoded by PyAV (`pip install "varkit[video]"`); frames as images and arrays need nothing more.
Shapes: N videos, B clips in a batch, T frames, H W pixels. Pixels are uint8 RGB, always with the channels last.
"""

from __future__ import annotations

import logging
import math
import os
import re
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from fractions import Fraction
from itertools import islice
from pathlib import Path
from typing import Any, Literal, NamedTuple, Protocol, get_args

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from varkit.config import nearest
from varkit.data.images import EXTENSIONS
from varkit.data.npz import map_npz
from varkit.data.transforms import reason_of, to_rgb
from varkit.data.video_tags import WebPVideo, add_gif_comment, as_text, write_webp
from varkit.rng import Draw, Rng

log = logging.getLogger("varkit.data")

VIDEO_EXTENSIONS = (".mp4", ".avi", ".mov", ".webm", ".mkv", ".gif")
ALLOWED = (
    f"a folder of videos ({', '.join(VIDEO_EXTENSIONS)}), a folder of folders of frames ({', '.join(EXTENSIONS)}), "
    "one video (also an animated .webp), or a .npz or .npy of uint8 (N, T, H, W, 3)"
)

Clip = npt.NDArray[np.uint8]  # T H W 3
Start = Literal["first", "middle", "random", "even", "all"]
Quantize = Literal["none", "truncate"]

INDEXED_FORMATS = ("mov", "matroska")
INDEXED_CODECS = ("h264", "hevc", "mpeg4", "vp9", "libvpx-vp9", "av1", "libdav1d")
"""Where a packet is a frame, and packets carry the times at which their frames are shown."""

REORDERED = 32
"""Packets beyond a frame within which every earlier frame's packet has come; the standards allow 16."""


class VideoInfo(NamedTuple):
    """What is known of a video without decoding it."""

    frames: int
    height: int
    width: int


class ShortVideo(ValueError):
    """A clip reaches beyond the end of its video, which has only `frames` frames."""

    def __init__(self, name: str, frames: int, needed: int) -> None:
        super().__init__(f"{name} has {frames} frames; the clip needs {needed}")
        self.frames = frames


class Video(Protocol):
    """One video of a set."""

    def info(self) -> VideoInfo: ...

    def rate(self) -> float | None:
        """Frames a second; None where nothing says."""
        ...

    def read(self, frames: int, stride: int, start: int) -> Clip:
        """The frames start, start + stride, ...; the caller has checked that they exist by `info`."""
        ...


# ---- files --------------------------------------------------------------------------------------------------------


def _av() -> Any:
    try:
        import av
    except ImportError as error:
        raise ImportError('reading and writing video files needs PyAV: pip install "varkit[video]"') from error
    return av


@contextmanager
def _opened(path: Path, container_format: str | None = None) -> Iterator[tuple[Any, Any]]:
    """The container and its first video stream. What PyAV raises inside becomes a ValueError that names the file.

    Args: container_format: what the file must be; None finds it out.
    """
    av = _av()
    try:
        with av.open(str(path), format=container_format) as container:
            if not container.streams.video:
                raise ValueError("it holds no video stream")
            stream = container.streams.video[0]
            stream.thread_type = "AUTO"
            yield container, stream
    except (av.FFmpegError, OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or reason_of(error)
        raise ValueError(f"{path} cannot be read as a video: {reason}") from error


class VideoHeader(NamedTuple):
    """What a container says of its video before anything is decoded.   seconds: None where it does not say."""

    height: int
    width: int
    seconds: float | None


@contextmanager
def one_by_one(path: Path, container_format: str, max_pixels: int) -> Iterator[tuple[VideoHeader, Iterator[Clip]]]:
    """The header of a file, and its frames, uint8 (H, W, 3), each decoded when it is asked for.

    For files of strangers: no other format is tried, and a frame of more than `max_pixels` is not decoded.
    Raises: ValueError for a file that is no video of that format; ImportError without PyAV.
    """
    with _opened(path, container_format) as (container, stream):
        context = stream.codec_context
        context.options = {"max_pixels": str(max_pixels)}
        seconds = container.duration / _av().time_base if container.duration else None
        frames = (frame.to_ndarray(format="rgb24") for frame in container.decode(stream))
        yield VideoHeader(context.height, context.width, seconds), frames


class VideoFile:
    """A file that PyAV decodes. Opened for each call: nothing stays open, and threads do not share a decoder."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._info: VideoInfo | None = None

    def info(self) -> VideoInfo:
        """From the header; where that does not say, packets are counted, or frames where packets are no frames."""
        if self._info is None:
            with _opened(self.path) as (container, stream):
                context, frames = stream.codec_context, stream.frames
                if not frames and context.name in INDEXED_CODECS:
                    frames = sum(1 for packet in container.demux(stream) if packet.size)
                elif not frames:
                    frames = sum(1 for _ in container.decode(stream))
                self._info = VideoInfo(frames, context.height, context.width)
        return self._info

    def rate(self) -> float | None:
        """As the container gives it, or else as its first times are apart."""
        with _opened(self.path) as (_, stream):
            rate = stream.average_rate or stream.guessed_rate
        return float(rate) if rate else None

    def read(self, frames: int, stride: int, start: int) -> Clip:
        """The same frames as decoding from the beginning gives; a keyframe before `start` is used where it is safe.

        Raises: ShortVideo where the header said too much, and then `info` is right; ValueError for a file that does
            not decode.
        """
        place = self._place(start) if start else None
        clip = None if place is None else self._decode(frames, stride, 0, place)
        if clip is None:
            clip = self._decode(frames, stride, start, None)
        if clip is None:
            said = self.info()
            with _opened(self.path) as (container, stream):
                found = sum(1 for _ in container.decode(stream))
            if found < said.frames:
                log.warning("%s: its header says %d frames, but only %d decode", self.path, said.frames, found)
                self._info = said._replace(frames=found)
            raise ShortVideo(str(self.path), found, start + (frames - 1) * stride + 1)
        return clip

    def _decode(self, frames: int, stride: int, skip: int, place: tuple[int, int] | None) -> Clip | None:
        """Frames skip, skip + stride, ... from the beginning or from a place; None if there are not so many."""
        with _opened(self.path) as (container, stream):
            decoded = container.decode(stream) if place is None else self._from_place(container, stream, *place)
            shown = islice(decoded, skip, skip + (frames - 1) * stride + 1, stride)
            pixels = [frame.to_ndarray(format="rgb24") for frame in shown]
        return np.stack(pixels) if len(pixels) == frames else None

    def _from_place(self, container: Any, stream: Any, keyframe: int, target: int) -> Iterator[Any]:
        """Frames from the one shown at `target` on; none if decoding from the keyframe does not come by it."""
        container.seek(keyframe, stream=stream, backward=True)
        met = False
        for frame in container.decode(stream):
            met = met or frame.pts == target
            if frame.interlaced_frame or frame.pts is None or (not met and frame.pts > target):
                return
            if met:
                yield frame

    def _place(self, start: int) -> tuple[int, int] | None:
        """Times of the last keyframe shown before frame `start`, and of that frame. None: decode from the beginning.

        Read from the packets without decoding. A file that begins in the middle, leaves packets out, or does not say
        when each is shown has frames that cannot be counted this way.
        """
        with _opened(self.path) as (container, stream):
            if container.format.name.split(",")[0] not in INDEXED_FORMATS:
                return None
            if stream.codec_context.name not in INDEXED_CODECS:
                return None
            packets = ((p.pts, p.dts, p.is_keyframe, p.is_discard) for p in container.demux(stream) if p.size)
            begun = list(islice(packets, start + 1 + REORDERED))
        shown = [pts for pts, _, _, _ in begun]
        keyframes = [(pts, dts) for pts, dts, is_keyframe, _ in begun if is_keyframe]
        if len(begun) <= start or None in shown or any(is_discard for _, _, _, is_discard in begun):
            return None
        if len(set(shown)) < len(shown) or not keyframes or not min(shown) == shown[0] == keyframes[0][0]:
            return None
        target = sorted(shown)[start]
        pts, dts = max(k for k in keyframes if k[0] <= target)
        return None if pts == shown[0] else (pts if dts is None else dts, target)


class WebPFile(WebPVideo):
    """An animated WebP as a `Video`."""

    def info(self) -> VideoInfo:
        return VideoInfo(*super().info())


class FrameFolder:
    """A folder of images, one a frame, in the order of their names; numbers in names count as numbers."""

    def __init__(self, path: Path, files: Sequence[str]) -> None:
        self.path = path
        self._info: VideoInfo | None = None
        self.files = sorted(files, key=lambda f: [int(p) if p.isdecimal() else p for p in re.split(r"(\d+)", f)])

    def info(self) -> VideoInfo:
        if self._info is None:
            self._info = VideoInfo(len(self.files), *self._frame(0).shape[:2])
        return self._info

    def rate(self) -> float | None:
        return None

    def read(self, frames: int, stride: int, start: int) -> Clip:
        pixels = [self._frame(start + k * stride) for k in range(frames)]
        for k, frame in enumerate(pixels):
            if frame.shape != pixels[0].shape:
                raise ValueError(
                    f"{self.path}: {self.files[start + k * stride]} is {frame.shape[0]}x{frame.shape[1]}, but "
                    f"{self.files[start]} is {pixels[0].shape[0]}x{pixels[0].shape[1]}; frames of a video have one size"
                )
        return np.stack(pixels)

    def _frame(self, number: int) -> Clip:
        path = self.path / self.files[number]
        try:
            with Image.open(path) as file:
                return np.asarray(to_rgb(file))
        except Exception as error:  # Pillow's plugins raise anything on damaged files
            raise ValueError(f"{path} cannot be read as a frame: {reason_of(error)}") from error


class ArrayVideo:
    """uint8 (T, H, W, 3), or (T, H, W, 1) for grey; may be part of a memory map."""

    def __init__(self, array: Clip) -> None:
        self.array = array

    def info(self) -> VideoInfo:
        return VideoInfo(*self.array.shape[:3])

    def rate(self) -> float | None:
        return None

    def read(self, frames: int, stride: int, start: int) -> Clip:
        cut = self.array[start : start + (frames - 1) * stride + 1 : stride]
        return np.array(np.broadcast_to(cut, (*cut.shape[:3], 3)))


# ---- sets ---------------------------------------------------------------------------------------------------------


class VideoSet:
    """N videos, opened by `open_videos`. Attributes: names, N strings; source."""

    def __init__(self, videos: Sequence[Video], names: Sequence[str], source: str) -> None:
        self.videos, self.names, self.source = list(videos), list(names), source

    def __len__(self) -> int:
        return len(self.videos)

    def num_frames(self, index: int) -> int:
        """Frames of a video, by its header where that says. Raises: ValueError for a file that cannot be read."""
        return self.videos[index].info().frames

    def size(self, index: int) -> tuple[int, int]:
        """Height and width of a video. Raises: as `num_frames`."""
        return self.videos[index].info()[1:]

    def rate(self, index: int) -> float | None:
        """Frames a second of a video; None where nothing says. Raises: as `num_frames`."""
        return self.videos[index].rate()

    def clip(self, index: int, frames: int, stride: int = 1, start: int = 0) -> Tensor:
        """The frames start, start + stride, ... of a video: uint8 (T, H, W, 3).

        Raises: ShortVideo, a ValueError, for a video that has not so many; ValueError for one that does not decode;
            IndexError.
        """
        if frames < 1 or stride < 1 or start < 0:
            raise ValueError(f"frames and stride count from 1, start from 0; got {frames}, {stride}, {start}")
        needed, there = start + (frames - 1) * stride + 1, self.num_frames(index)
        if needed > there:
            raise ShortVideo(self.names[index], there, needed)
        return torch.from_numpy(self.videos[index].read(frames, stride, start))


def open_videos(source: str | Path | Tensor | npt.NDArray[np.uint8]) -> VideoSet:
    """Open a set of videos. Nothing is decoded yet.

    Args:
        source: one of
            - a folder of video files, at any depth, in the order of their paths; images beside them are left out;
            - a folder of folders of frames: every folder that holds images is a video;
            - one video file, or an animated .webp (in folders .webp files are images);
            - .npz (arr_0, or its only array) or .npy: uint8 (N, T, H, W, 3), or with one channel for grey;
            - such an array or tensor.
    Raises: FileNotFoundError; ValueError that says what was found and what is allowed; ImportError without PyAV.
    """
    if isinstance(source, Tensor):
        source = source.detach().cpu().numpy()
    if isinstance(source, np.ndarray):
        return _array_set(source, "the array")
    path = Path(source).expanduser()
    if not path.exists():
        beside = os.listdir(path.parent) if path.parent.is_dir() else []
        raise FileNotFoundError(f"{source} does not exist{nearest(path.name, beside) or '.'} Allowed: {ALLOWED}.")
    if path.is_dir():
        return _folder_set(path)
    if path.suffix.lower() in (".npz", ".npy"):
        return _array_set(_read_array(path), str(path))
    if path.suffix.lower() == ".webp":
        return VideoSet([WebPFile(path)], [str(path)], str(source))
    if path.suffix.lower() not in VIDEO_EXTENSIONS:
        raise ValueError(f"{source} is no video by its name; allowed: {ALLOWED}")
    _av()
    return VideoSet([VideoFile(path)], [str(path)], str(source))


def _folder_set(folder: Path) -> VideoSet:
    files: list[Path] = []
    frames: dict[Path, list[str]] = {}
    endings = set()
    for where, folders, names in os.walk(folder, followlinks=True):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in (name for name in names if not name.startswith(".")):
            ending = Path(name).suffix.lower()
            endings.add(ending or name)
            if ending in VIDEO_EXTENSIONS:
                files.append(Path(where, name))
            elif ending in EXTENSIONS:
                frames.setdefault(Path(where), []).append(name)
    if files:
        _av()
        files.sort()
        return VideoSet([VideoFile(f) for f in files], [str(f) for f in files], str(folder))
    if folder in frames:
        raise ValueError(
            f"{folder} holds {len(frames[folder])} images, but no videos and no folders of frames: put the frames of "
            f"each video into a folder of its own. Allowed: {ALLOWED}"
        )
    if not frames:
        found = f"only {', '.join(sorted(endings)[:8])}" if endings else "nothing"
        raise ValueError(f"{folder} holds no videos but {found}; allowed: {ALLOWED}")
    paths = sorted(frames)
    return VideoSet([FrameFolder(p, frames[p]) for p in paths], [str(p) for p in paths], str(folder))


def _read_array(path: Path) -> npt.NDArray[Any]:
    try:
        loaded = np.load(path, allow_pickle=False, mmap_mode="r" if path.suffix.lower() == ".npy" else None)
        if isinstance(loaded, np.ndarray):
            return loaded
        with loaded:
            names = list(loaded)
            if "arr_0" not in names and len(names) != 1:
                raise ValueError(f"it holds {', '.join(names) or 'nothing'}, but no arr_0")
            key = "arr_0" if "arr_0" in names else names[0]
            mapped = map_npz(path, key)  # a set may be larger than the memory
            return loaded[key] if mapped is None else mapped
    except Exception as error:  # a damaged archive raises all kinds of things
        if isinstance(error, OSError) and error.errno is not None:
            raise
        raise ValueError(f"{path} cannot be read: {reason_of(error)}. Allowed: {ALLOWED}") from error


def _array_set(array: npt.NDArray[Any], name: str) -> VideoSet:
    if array.dtype != np.uint8 or array.ndim != 5 or array.shape[-1] not in (1, 3) or not array.size:
        raise ValueError(f"{name} is {array.dtype} {array.shape}; videos are uint8 (N, T, H, W, 3) in 0..255")
    return VideoSet([ArrayVideo(a) for a in array], [f"{name}[{i}]" for i in range(len(array))], name)


# ---- clips --------------------------------------------------------------------------------------------------------


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


# ---- writing ------------------------------------------------------------------------------------------------------

WRITERS: dict[str, tuple[str, tuple[tuple[str, dict[str, str]], ...]]] = {
    ".mp4": ("mp4", (("libx264", {"crf": "17"}), ("mpeg4", {"qmin": "1", "qmax": "3"}))),
    ".mov": ("mov", (("libx264", {"crf": "17"}), ("mpeg4", {"qmin": "1", "qmax": "3"}))),
    ".mkv": ("matroska", (("libx264", {"crf": "17"}), ("mpeg4", {"qmin": "1", "qmax": "3"}))),
    ".avi": ("avi", (("mpeg4", {"qmin": "1", "qmax": "3"}),)),
    ".webm": ("webm", (("libvpx-vp9", {"crf": "20", "b": "0"}), ("libvpx", {"crf": "8", "b": "4M"}))),
    ".gif": ("gif", (("gif", {}),)),
}
"""Ending -> container, and codecs with their settings, best first; which of them there are, PyAV's build decides."""


def write_video(
    frames: Tensor | Clip,
    path: str | Path,
    fps: float = 8,
    settings: dict[str, Any] | None = None,
    lossless: bool = False,
) -> None:
    """Write a clip, atomically. All formats but lossless .webp lose something, which raises an FVD: score arrays.

    Args:
        frames: uint8 (T, H, W, 3).
        path: ending in .mp4, .mov, .mkv, .avi, .webm, .gif or .webp (an animation). Folders are made.
        fps: frames a second; at most 50 for .gif, whose clock counts hundredths of a second.
        settings: plain data that the file carries, as a comment; `varkit.pictures.read_settings` gives them back.
        lossless: of .webp: every pixel is kept.
    Raises: ValueError for another ending, dtype, shape or rate; ImportError without PyAV.
    """
    path, array = Path(path), np.asarray(frames)
    check_video(array, path, fps, lossless)
    ending = path.suffix.lower()
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        if ending == ".webp":
            write_webp(array, part, fps, settings, lossless)
        else:
            _encode(array, part, ending, fps, None if settings is None else as_text(settings))
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


def check_video(array: Clip, path: Path, fps: float, lossless: bool = False) -> None:
    """What `write_video` refuses, without writing. Raises as it does."""
    ending = path.suffix.lower()
    if array.dtype != np.uint8 or array.ndim != 4 or array.shape[-1] != 3 or not array.size:
        raise ValueError(f"a video is uint8 (T, H, W, 3); got {array.dtype} {array.shape}")
    if ending != ".webp" and ending not in WRITERS:
        raise ValueError(f"{path} has no ending that can be written; allowed: {', '.join(WRITERS)}, .webp")
    if lossless and ending != ".webp":
        raise ValueError(f"lossless goes with .webp; got {path.name}. Arrays (.npy, .npz) lose nothing either")
    if not 0 < fps <= (50 if ending == ".gif" else 1000):
        raise ValueError(f"fps must be in (0, 1000], for .gif in (0, 50]; got {fps}")
    if ending != ".webp":
        _av()


def _encode(array: Clip, part: Path, ending: str, fps: float, comment: str | None) -> None:
    av = _av()
    container_format, codecs = WRITERS[ending]
    codec, options = next((c for c in codecs if c[0] in av.codecs_available), codecs[0])
    rate = Fraction(fps).limit_denominator(1001)
    with av.open(str(part), "w", format=container_format) as container:
        if comment is not None and codec != "gif":
            container.metadata["comment"] = comment
        stream = container.add_stream(codec, rate=rate, options=options)
        stream.height, stream.width = array.shape[1:3]
        odd = codec == "libx264" and (stream.height % 2 or stream.width % 2)
        stream.pix_fmt = "pal8" if codec == "gif" else "yuv444p" if odd else "yuv420p"
        pictures = (av.VideoFrame.from_ndarray(np.ascontiguousarray(a), format="rgb24") for a in array)
        for number, picture in enumerate(pictures if codec != "gif" else _with_palette(pictures, array.shape)):
            picture.pts, picture.time_base = number, 1 / rate
            container.mux(stream.encode(picture))
        container.mux(stream.encode(None))
    if comment is not None and codec == "gif":
        add_gif_comment(part, comment)


def _with_palette(pictures: Iterator[Any], shape: tuple[int, ...]) -> Iterator[Any]:
    """RGB frames of a clip (T, H, W, 3) in the 256 colours that suit it best."""
    graph = _av().filter.Graph()
    source = graph.add_buffer(width=shape[2], height=shape[1], format="rgb24", time_base=Fraction(1, 100))
    split, find, use, sink = (graph.add(name) for name in ("split", "palettegen", "paletteuse", "buffersink"))
    source.link_to(split)
    split.link_to(find, 0, 0)
    split.link_to(use, 1, 0)
    find.link_to(use, 0, 1)
    use.link_to(sink)
    graph.configure()
    for number, picture in enumerate(pictures):
        picture.pts = number
        graph.push(picture)
    graph.push(None)
    for _ in range(shape[0]):
        yield graph.pull()
