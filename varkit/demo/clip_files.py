"""Clips as files: those that a visitor sends, read with care, and those that the page plays and hands out."""

from __future__ import annotations

import math
import os
import tempfile
from collections.abc import Iterable, Sequence
from importlib.util import find_spec
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from varkit.data.video import WebPFile, one_by_one
from varkit.data.video_writing import write_video
from varkit.demo.common import factor
from varkit.demo.files import keep
from varkit.demo.limits import Limits
from varkit.demo.uploads import Upload
from varkit.pipelines.clips import read_frames

FORMATS = {"mp4": "MP4", "webm": "WEBM", "gif": "GIF", "webp": "WEBP"}
"""Clips that may be sent, by the ending that the printed commands give them."""
CONTAINERS = {"mp4": "mov", "webm": "matroska", "gif": "gif"}
"""What PyAV calls them."""
MOST_ZOOM = 16
"""As `varkit sample --zoom` takes it."""


def has_av() -> bool:
    """Whether this server reads and writes video files."""
    return find_spec("av") is not None


def readable() -> list[str]:
    """The keys of `FORMATS` that this server reads."""
    return [kind for kind in FORMATS if kind == "webp" or has_av()]


def written() -> tuple[str, ...]:
    """The endings that a clip is handed out with; the first of them is what the page plays."""
    if has_av():
        import av

        if "libx264" in av.codecs_available:  # browsers play no other mp4 that varkit writes
            return ("mp4", "gif")
    return ("webp",)


def kind_of(path: Path) -> str:
    """The key of `FORMATS` that a file's first bytes say; names are not believed. Raises ValueError."""
    with path.open("rb") as file:
        head = file.read(12)
    if head[4:8] == b"ftyp":
        return "mp4"
    if head[:4] == b"\x1a\x45\xdf\xa3":
        return "webm"
    if head[:6] in (b"GIF87a", b"GIF89a"):
        return "gif"
    if head[:4] == b"RIFF" and head[8:] == b"WEBP":
        return "webp"
    raise ValueError("the first bytes are those of no format that is read")


def read_clip(upload: Upload | None, size: tuple[int, int], limits: Limits, first: int | None) -> tuple[Tensor, str]:
    """First frames of a clip that a visitor sent, or all, as `read_frames` brings them to a size.

    Args: size: height and width.   first: how many frames; None is all that there are.
    Returns: float32 (1, 3, T, H, W) in [-1, 1], and which of `FORMATS` it is.
    Raises: ValueError, in words for the visitor: none, no clip, too large, too long, too few frames.
    """
    path = upload.get("path") if upload else None
    if not path:
        raise ValueError("upload a clip first")
    kinds = ", ".join(FORMATS[kind] for kind in readable())
    most = limits.frames if first is None else first
    try:
        if os.path.getsize(path) > limits.upload_mb * 2**20:
            raise TooMuch(f"the file is larger than {limits.upload_mb} MB; send a shorter or smaller clip")
        kind = kind_of(Path(path))
        if kind not in readable():
            raise ValueError(f"{kind} needs PyAV")
        read = _webp if kind == "webp" else _video
        frames = read(Path(path), kind, size, limits, most + (first is None))  # one more tells that there are more
    except TooMuch:
        raise
    except Image.DecompressionBombError:
        raise ValueError(f"the clip is far too large; send at most {limits.side} pixels a side") from None
    except Exception:  # decoders raise anything on damaged files, and their words name files of the server
        raise ValueError(f"this file is not a clip that can be read; send {kinds}") from None
    if len(frames) < (first or 1):
        there = "1 frame" if len(frames) == 1 else f"{len(frames)} frames"
        raise ValueError(f"the clip has {there} that can be read, but {first or 1} are to be given")
    if len(frames) > most:
        raise ValueError(f"the clip has more than {most} frames; cut it, or let its first frames be continued")
    return torch.cat(frames, 2), kind


class TooMuch(ValueError):
    """A limit is passed."""


def _video(path: Path, kind: str, size: tuple[int, int], limits: Limits, most: int) -> list[Tensor]:
    """At most so many frames, (1, 3, 1, H, W) each. The header is judged before anything is decoded."""
    with one_by_one(path, CONTAINERS[kind], limits.side**2) as (header, decoded):
        fits = max(header.height, header.width) <= limits.side
        fits = fits and (header.seconds is None or header.seconds <= limits.seconds)
        frames = _fitted(islice(decoded, most), size) if fits else []
    _check_side(header.height, header.width, limits)
    if not fits:
        raise TooMuch(f"the clip lasts {header.seconds:.0f} seconds; send at most {limits.seconds}")
    return frames


def _webp(path: Path, kind: str, size: tuple[int, int], limits: Limits, most: int) -> list[Tensor]:
    """As `_video`, of an animated WebP, which does not say how long it lasts until all is decoded."""
    with Image.open(path, formats=(FORMATS[kind],)) as image:
        count = getattr(image, "n_frames", 1)
        _check_side(image.height, image.width, limits)
    if count > limits.frames:
        raise TooMuch(f"the clip has {count} frames; send at most {limits.frames}")
    return _fitted(islice(WebPFile(path).one_by_one(), most), size)


def _check_side(height: int, width: int, limits: Limits) -> None:
    if max(height, width) > limits.side:
        raise TooMuch(f"the clip has {width} x {height} pixels; send at most {limits.side} a side")


def _fitted(frames: Iterable[np.ndarray], size: tuple[int, int]) -> list[Tensor]:
    """Each at the size of the model at once, so that few large ones are held."""
    return [read_frames(frame[None], size) for frame in frames]


def zoom_of(height: int, width: int) -> int:
    """How many times the pixels of a clip are enlarged to be seen well, each a square."""
    return min(MOST_ZOOM, factor(width, height))


def saved(frames: Sequence[Image.Image], zoom: int, fps: float, settings: dict[str, Any], folder: str) -> list[str]:
    """Paths of files of a clip, enlarged, one for each of `written()`, with its settings.   folder: gradio's."""
    paths = []
    pixels = np.stack([np.asarray(frame) for frame in frames]).repeat(zoom, 1).repeat(zoom, 2)
    with tempfile.TemporaryDirectory() as place:
        for ending in written():
            file = Path(place) / f"clip.{ending}"
            write_video(pixels, file, fps, settings)
            paths.append(keep(file.read_bytes(), f"varkit-clip.{ending}", folder))
    return paths


def lengths(window: int, context: int, most: int) -> tuple[int, int, int]:
    """Numbers of frames that whole windows have: the least, the most (one window at least), and the step.

    Args: context: frames that a later window begins with; 0 where none can.
    """
    step = window - context if context else 1
    more = max(0, math.floor((most - window) / step)) if context else 0
    return window, window + more * step, step
