"""Settings in the comments of video files, and animated WebP.

mp4, mov, mkv, webm and avi have a tag `comment`, GIF a comment extension (CompuServe, GIF89a, section 24), WebP EXIF.
`varkit.pictures.read_settings` reads them all.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from varkit.pictures import DESCRIPTION, METADATA_KEY

BLOCK = 255
"""Bytes of one sub-block of a GIF."""
MOST_NOTED = 100_000
"""Frames that an animated WebP may be said to have, beyond the pictures that it holds."""


def as_text(settings: dict[str, Any], **more: Any) -> str:
    """ASCII JSON."""
    return json.dumps({METADATA_KEY: settings, **more})


def add_gif_comment(path: Path, text: str) -> None:
    """Put a comment before the first picture of a GIF. Not atomic."""
    data, comment = path.read_bytes(), text.encode("ascii")
    packed = data[10]
    header = 13 + (3 << (packed & 7) + 1 if packed & 0x80 else 0)  # with the global colours
    blocks = [comment[i : i + BLOCK] for i in range(0, len(comment), BLOCK)]
    extension = b"\x21\xfe" + b"".join(bytes([len(block)]) + block for block in blocks) + b"\0"
    path.write_bytes(data[:header] + extension + data[header:])


def write_webp(frames: np.ndarray, path: Path, fps: float, settings: dict[str, Any] | None, lossless: bool) -> None:
    """An animation, uint8 (T, H, W, 3); it repeats. Equal frames in a row are stored once, so their number is noted."""
    pictures = [Image.fromarray(frame) for frame in frames]
    times = np.round(np.arange(len(frames) + 1) * 1000 / fps).astype(int)
    exif = Image.Exif()
    exif[DESCRIPTION] = as_text(settings or {}, frames=len(frames), fps=fps)
    pictures[0].save(
        path,
        format="WEBP",
        save_all=True,
        append_images=pictures[1:],
        duration=np.diff(times).tolist(),
        loop=0,
        lossless=lossless,
        quality=90,
        exif=exif,
    )


class WebPVideo:
    """An animated WebP, opened for each call. Frames that varkit wrote are counted as they were written."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def info(self) -> tuple[int, int, int]:
        """Frames, height, width."""
        with self._opened() as image:
            return len(self._order(image)), image.height, image.width

    def rate(self) -> float | None:
        """Frames a second, as varkit noted them; None for other files, whose pictures may last differently."""
        with self._opened() as image:
            noted = self._noted(image)
        return None if noted is None else noted[1]

    def read(self, frames: int, stride: int, start: int) -> np.ndarray:
        """uint8 (T, H, W, 3)."""
        return np.stack(list(islice(self.one_by_one(), start, start + (frames - 1) * stride + 1, stride)))

    def one_by_one(self) -> Iterator[np.ndarray]:
        """The frames, uint8 (H, W, 3), each decoded when it is asked for."""
        with self._opened() as image:
            shown = -1
            for number in self._order(image):
                if number != shown:
                    image.seek(number)
                    frame, shown = np.array(image.convert("RGB")), number
                yield frame

    def _opened(self) -> Any:
        try:
            return Image.open(self.path)
        except OSError as error:
            raise ValueError(f"{self.path} cannot be read as a video: {' '.join(str(error).split())}") from error

    @staticmethod
    def _noted(image: Any) -> tuple[int, float] | None:
        """Frames, and how many a second, as varkit wrote them."""
        try:
            about = json.loads(image.getexif().get(DESCRIPTION) or "")
            frames, fps = int(about["frames"]), float(about["fps"])
        except (ValueError, KeyError, TypeError, OverflowError):
            return None
        return (frames, fps) if 1 <= frames <= MOST_NOTED and 0 < fps <= 1000 else None  # others may note anything

    def _order(self, image: Any) -> Sequence[int]:
        """Which stored picture each frame is."""
        count, noted = getattr(image, "n_frames", 1), self._noted(image)
        if noted is None:
            return range(count)
        ends = []
        for number in range(count):
            image.seek(number)
            image.load()
            ends.append(image.info["timestamp"] + image.info["duration"])
        middles = [(k + 0.5) * 1000 / noted[1] for k in range(noted[0])]
        return [next((n for n, end in enumerate(ends) if middle < end), count - 1) for middle in middles]
