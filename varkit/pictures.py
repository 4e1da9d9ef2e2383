"""Pictures for people: grids, and PNG files that carry their settings."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from PIL.PngImagePlugin import PngInfo
from torch import Tensor

METADATA_KEY = "varkit"
DESCRIPTION = 0x010E
"""EXIF's ImageDescription, where an animated WebP has its settings."""
VIDEO_TAGS = (".mp4", ".mov", ".mkv", ".avi", ".webm")
"""Files whose settings are in a tag, `comment`."""

TITLE = 10
"""Pixels of the letters over or under a clip."""

SHOWN_FRAMES = 8
"""Frames of a clip that are shown in a row."""

UInt8Rule = Literal["round", "llamagen", "mar", "titok_sample", "titok_eval", "adm", "var", "save_image"]


def to_uint8(images: Tensor, rule: UInt8Rule = "round") -> Tensor:
    """Floats in [-1, 1] of any shape -> uint8 of that shape; values outside are clamped. Computed in float32.

    Args:
        rule: `round` takes the nearest level, halves up. The others are what released code does, to the last bit:
            `llamagen` truncates 127.5 x + 128, `save_image` (torchvision) (x + 1) / 2 * 255 + 0.5; `mar` (MAR, xAR,
            FlowAR) and `titok_eval` round halves to even; `adm`, `var` and `titok_sample` truncate, which darkens by
            half a level on average.
    Raises: ValueError for another rule, or images that are not floats.
    Source: FoundationVision/LlamaGen, LTH14/mar, bytedance/1d-tokenizer, openai/guided-diffusion, FoundationVision/VAR,
        pytorch/vision: where each writes its samples.
    """
    if rule not in get_args(UInt8Rule):
        raise ValueError(f"rule must be one of {', '.join(get_args(UInt8Rule))}; got {rule!r}")
    if not images.is_floating_point():
        raise ValueError(f"images must be floats in [-1, 1]; got {images.dtype}")
    x = images.detach().float()
    if rule == "llamagen":
        levels = (127.5 * x + 128).clamp(0, 255)
    elif rule == "mar":
        levels = ((x + 1) / 2 * 255).clamp(0, 255).round()
    elif rule == "titok_eval":
        levels = (((x + 1) / 2).clamp(0, 1) * 255).round()
    elif rule == "titok_sample":
        levels = ((x + 1) / 2).clamp(0, 1) * 255
    elif rule == "adm":
        levels = ((x + 1) * 127.5).clamp(0, 255)
    elif rule == "var":
        levels = (x * 0.5 + 0.5).clamp(0, 1) * 255
    elif rule == "save_image":
        levels = ((x + 1) / 2 * 255 + 0.5).clamp(0, 255)
    else:
        levels = ((x.clamp(-1, 1) + 1) / 2 * 255 + 0.5).floor()
    return levels.byte()  # truncates


def to_pil(images: Tensor) -> list[Image.Image]:
    """(B, 3, H, W) in [-1, 1] -> PIL images; values outside are clamped."""
    return [Image.fromarray(a) for a in to_uint8(images).permute(0, 2, 3, 1).cpu().numpy()]


def grid(images: Sequence[Image.Image], columns: int, zoom: int = 1) -> Image.Image:
    """Images of one size in rows, two pixels apart, each pixel drawn `zoom` times."""
    width, height = (side * zoom for side in images[0].size)
    rows = -(-len(images) // columns)
    sheet = Image.new("RGB", (columns * (width + 2) + 2, rows * (height + 2) + 2), "white")
    for i, image in enumerate(images):
        place = (2 + i % columns * (width + 2), 2 + i // columns * (height + 2))
        sheet.paste(image.resize((width, height), Image.Resampling.NEAREST), place)
    return sheet


def titled_grids(
    clips: Sequence[Sequence[Image.Image]], titles: Sequence[str], columns: int, zoom: int = 1
) -> Iterator[Image.Image]:
    """Clips of one size and length in rows, each over its title: one picture a frame, of even sides, as codecs want.

    Titles are broken between words where a clip is too narrow for them.
    """
    font = ImageFont.load_default(TITLE)
    width, height = (side * zoom for side in clips[0][0].size)
    words = [word for title in titles for word in title.split()]
    cell = max(width, *(math.ceil(font.getlength(word)) for word in words))
    lines = [_broken(title, cell, font) for title in titles]
    below = max(map(len, lines)) * (TITLE + 2) + 2
    rows = -(-len(clips) // columns)
    size = (columns * (cell + 4) + 4, rows * (height + below + 4) + 4)
    empty = Image.new("RGB", (size[0] + size[0] % 2, size[1] + size[1] % 2), "white")
    draw = ImageDraw.Draw(empty)
    corners = [(4 + i % columns * (cell + 4), 4 + i // columns * (height + below + 4)) for i in range(len(clips))]
    for (left, top), title in zip(corners, lines, strict=True):
        for k, line in enumerate(title):
            middle = left + cell / 2
            draw.text((middle, top + height + 2 + k * (TITLE + 2)), line, "black", font, anchor="ma")
    for frames in zip(*clips, strict=True):
        sheet = empty.copy()
        for (left, top), frame in zip(corners, frames, strict=True):
            shown = frame.resize((width, height), Image.Resampling.NEAREST)
            sheet.paste(shown, (left + (cell - width) // 2, top))
        yield sheet


def _broken(title: str, width: int, font: Any) -> list[str]:
    """A title in lines that are no wider, but for single words."""
    lines = [""]
    for word in title.split():
        longer = f"{lines[-1]} {word}".strip()
        if lines[-1] and font.getlength(longer) > width:
            lines.append(word)
        else:
            lines[-1] = longer
    return lines


def rows_of_frames(clips: Tensor, count: int) -> Tensor:
    """(B, 3, T, H, W) -> (B * count, 3, H, W): of each clip the first frame, the last, and others evenly between."""
    which = torch.linspace(0, clips.shape[2] - 1, count).round().long().to(clips.device)
    return clips[:, :, which].transpose(1, 2).flatten(0, 1)


def columns_for(num: int, classes: int) -> int:
    """One column a class where that makes full rows of at most 16, else about a square."""
    return classes if 1 < classes <= 16 and num >= classes else min(num, max(1, round(num**0.5)), 16)


def save_png(image: Image.Image, path: Path, settings: dict[str, Any] | None = None) -> None:
    """Write atomically; `settings` go into the text chunk `varkit` as JSON."""
    info = PngInfo()
    if settings is not None:
        info.add_text(METADATA_KEY, json.dumps(settings))
    part = path.with_name(f".{path.name}.part")
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save(part, format="PNG", pnginfo=info)
    os.replace(part, path)


def read_settings(path: Path) -> dict[str, Any]:
    """The settings that `save_png`, or `varkit.data.video_writing.write_video`, wrote.

    Raises: ValueError when there are none; ImportError without PyAV, for a video that Pillow does not open.
    """
    path = Path(path)
    if path.suffix.lower() in VIDEO_TAGS:
        settings = _settings_of(_video_comment(path))
    else:
        with Image.open(path) as image:
            if image.format in ("GIF", "WEBP"):
                found = image.info.get("comment") if image.format == "GIF" else image.getexif().get(DESCRIPTION)
                settings = _settings_of(found)
            else:
                text = getattr(image, "text", {}).get(METADATA_KEY)
                settings = None if text is None else json.loads(text)
    if not settings:
        raise ValueError(f"{path} carries no varkit settings")
    return settings


def _settings_of(comment: str | bytes | None) -> dict[str, Any] | None:
    """The settings in a comment; None where it is another program's, or there is none."""
    try:
        found = json.loads(comment or "")
    except ValueError:
        return None
    settings = found.get(METADATA_KEY) if isinstance(found, dict) else None
    return settings if isinstance(settings, dict) else None


def _video_comment(path: Path) -> str | None:
    try:
        import av
    except ImportError as error:
        raise ImportError('reading video files needs PyAV: pip install "varkit[video]"') from error
    try:
        with av.open(str(path)) as container:
            return {key.lower(): value for key, value in container.metadata.items()}.get("comment")
    except av.FFmpegError as error:
        raise ValueError(f"{path} cannot be read as a video: {error.strerror}") from error


def save_npz(images: Sequence[Image.Image | np.ndarray], labels: Sequence[int], path: Path) -> None:
    """The layout of the ADM evaluator: `arr_0` uint8 (N, H, W, 3), of clips (N, T, H, W, 3); and `arr_1`, the classes.

    Atomic.
    """
    part = path.with_name(f".{path.name}.part")
    path.parent.mkdir(parents=True, exist_ok=True)
    with part.open("wb") as file:
        np.savez_compressed(file, arr_0=np.stack([np.asarray(i) for i in images]), arr_1=np.asarray(labels))
    os.replace(part, path)
