"""Pictures for people: grids, and PNG files that carry their settings."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import torch
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from torch import Tensor

METADATA_KEY = "varkit"

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
    """The settings that `save_png` wrote. Raises ValueError when there are none."""
    with Image.open(path) as image:
        text = getattr(image, "text", {}).get(METADATA_KEY)
    if text is None:
        raise ValueError(f"{path} carries no varkit settings")
    return json.loads(text)


def save_npz(images: Sequence[Image.Image], labels: Sequence[int], path: Path) -> None:
    """The layout of the ADM evaluator: `arr_0` uint8 (N, H, W, 3); and `arr_1`, the classes. Atomic."""
    part = path.with_name(f".{path.name}.part")
    path.parent.mkdir(parents=True, exist_ok=True)
    with part.open("wb") as file:
        np.savez_compressed(file, arr_0=np.stack([np.asarray(i) for i in images]), arr_1=np.asarray(labels))
    os.replace(part, path)
