"""What all extractors share: how an image comes in, how a map goes out, and what an entry of the table says."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from varkit.metrics.weights import find_weights

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
        network: whether it runs one, and takes `device`.
    """

    build: Callable[..., Any]
    channels: Literal[1, 3] | None
    meaning: str
    resize: Literal["nearest", "bicubic"]
    needs: str
    licence: str
    network: bool = False


def checked_images(images: Tensor, smallest: int = 1) -> Tensor:
    """uint8 (B, H, W, 3), grey images repeated. Raises: ValueError for another dtype or shape, or a smaller side."""
    shape = tuple(images.shape)
    grey = len(shape) == 3
    if images.dtype != torch.uint8 or not (grey or (len(shape) == 4 and shape[-1] == 3)) or not images.numel():
        raise ValueError(
            "images must be uint8 (B, H, W, 3) in RGB order, or grey (B, H, W), at least one; "
            f"got {images.dtype} {shape}"
        )
    if min(shape[1:3]) < smallest:
        raise ValueError(f"this network needs at least {smallest} pixels a side; got {shape[1]}x{shape[2]} (H x W)")
    return images[..., None].expand(*shape, 3) if grey else images


def as_floats(images: Tensor, device: torch.device | str, smallest: int = 1) -> Tensor:
    """uint8 (B, H, W, 3), or grey -> float32 (B, 3, H, W) in 0 .. 255, on `device`."""
    return checked_images(images, smallest).to(device).permute(0, 3, 1, 2).float()


def to_levels(maps: Tensor) -> Tensor:
    """Floats in 0 .. 255 -> uint8, to the nearest level."""
    return maps.clamp(0, 255).round().byte()


def map_of(extractor: Extractor, photo: Image.Image, size: tuple[int, int]) -> Image.Image:
    """The control map, grey or RGB, of an RGB image that is brought to (height, width) first, as in training: of a
    photo made smaller, not of a large photo's map, whose lines would fade."""
    shown = photo.resize(size[::-1], Image.Resampling.LANCZOS)
    return Image.fromarray(extractor(torch.from_numpy(np.array(shown))[None])[0].cpu().numpy())


def open_network(network: nn.Module, name: str, weights: str | Path | None, device: torch.device | str) -> nn.Module:
    """`network` with the released weights called `name`, frozen, in eval mode, on `device`.

    Raises: FileNotFoundError as `find_weights`; ValueError for a file that needs code to be read, or does not fit.
    """
    path = find_weights(name, weights)
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, KeyError) as error:
        first = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ValueError(f"{path} cannot be read as a file of plain tensors: {first}") from None
    try:
        network.load_state_dict(state, strict=True)
    except (RuntimeError, TypeError, AttributeError) as error:
        told = " ".join(str(error).split())
        raise ValueError(f"{path} holds no weights of {name}: {told[:400]}") from None
    return network.requires_grad_(False).eval().to(device)
