"""Clips as video files that carry their settings: mp4, mov, mkv, avi and webm by PyAV, GIF, animated WebP."""

from __future__ import annotations

import os
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from varkit.data.video import Clip, pyav
from varkit.data.video_tags import add_gif_comment, as_text, write_webp

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
        pyav()


def _encode(array: Clip, part: Path, ending: str, fps: float, comment: str | None) -> None:
    av = pyav()
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
    graph = pyav().filter.Graph()
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
