"""What all extractors share: how an image comes in, and what an entry of the table says."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

Extractor = Callable[[Tensor], Tensor]
"""uint8 images (B, H, W, 3) RGB, or grey (B, H, W) -> uint8 maps (B, H, W), or (B, H, W, 3) where they are colours."""


@dataclass(frozen=True)
class ExtractorEntry:
    """A way to make control maps of images.

    Args:
        build: called with the extractor's options; opens what it needs, or says what is missing.
        channels: of a map: 1, 3 (RGB), or None where it is that of the input.
        meaning: what a pixel says, and its polarity.
        resize: how maps are brought to another size: nearest where a value between two means nothing.
        needs: the file, hub repository or package, for people.
        licence: of that.
    """

    build: Callable[..., Any]
    channels: Literal[1, 3] | None
    meaning: str
    resize: Literal["nearest", "bicubic"]
    needs: str
    licence: str


def checked_images(images: Tensor) -> Tensor:
    """uint8 (B, H, W, 3), grey images repeated. Raises: ValueError for another dtype or shape."""
    shape = tuple(images.shape)
    grey = len(shape) == 3
    if images.dtype != torch.uint8 or not (grey or (len(shape) == 4 and shape[-1] == 3)) or not images.numel():
        raise ValueError(
            "images must be uint8 (B, H, W, 3) in RGB order, or grey (B, H, W), at least one; "
            f"got {images.dtype} {shape}"
        )
    return images[..., None].expand(*shape, 3) if grey else images
