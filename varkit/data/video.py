"""Videos for evaluation and training, opened as a set: files, folders of frames, arrays.

    videos = open_videos("samples/")
    videos.clip(0, frames=16, stride=2)

`varkit.data.clip_rules` chooses clips and decodes ahead, `varkit.data.video_writing` writes.

Files are decoded by PyAV (`pip install "varkit[video]"`); frames as images and arrays need nothing more.
Shapes: N videos, B clips in a batch, T frames, H W pixels. Pixels are uint8 RGB, always with the channels last.
"""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from torch import Tensor

from varkit.config import nearest
from varkit.data.images import EXTENSIONS
from varkit.data.npz import map_npz
from varkit.data.transforms import reason_of, to_rgb
from varkit.data.video_tags import WebPVideo

log = logging.getLogger("varkit.data")

VIDEO_EXTENSIONS = (".mp4", ".avi", ".mov", ".webm", ".mkv", ".gif")
ALLOWED = (
    f"a folder of videos ({', '.join(VIDEO_EXTENSIONS)}), a folder of folders of frames ({', '.join(EXTENSIONS)}), "
    "one video (also an animated .webp), or a .npz or .npy of uint8 (N, T, H, W, 3)"
)

Clip = npt.NDArray[np.uint8]  # T H W 3

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


def pyav() -> Any:
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
    av = pyav()
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
        seconds = container.duration / pyav().time_base if container.duration else None
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
    pyav()
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
        pyav()
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
