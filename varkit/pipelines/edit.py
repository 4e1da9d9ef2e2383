"""Masks for editing: which tokens of a pyramid are kept.

Source: FoundationVision/VAR: demo_zero_shot_edit.ipynb (78b9539).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from varkit.layout import TokenLayout

Box = tuple[float, float, float, float]
"""Top, left, bottom, right as fractions of the image, in [0, 1]."""


def box_mask(grid: Sequence[int], box: Box, keep: str = "outside") -> Tensor:
    """(h, w) float32, 1 where tokens stay. Raises ValueError on a box that is empty or leaves the image."""
    top, left, bottom, right = box
    if not (0 <= top < bottom <= 1 and 0 <= left < right <= 1):
        raise ValueError(
            f"box must be (top, left, bottom, right) with 0 <= top < bottom <= 1 and 0 <= left < right <= 1; got {box}"
        )
    if keep not in ("outside", "inside"):
        raise ValueError(f"keep must be 'outside' (redraw the box) or 'inside'; got {keep!r}")
    height, width = grid
    inside = torch.zeros(height, width)
    inside[round(top * height) : round(bottom * height), round(left * width) : round(right * width)] = 1
    return inside if keep == "inside" else 1 - inside


def keep_pyramid(layout: TokenLayout, keep: Tensor) -> Tensor:
    """(h, w) of the finest scale, 1 where tokens stay -> (L,) bool for all scales.

    A scale's token stays where the mask, resized to it, exceeds one half; scales of at most three tokens
    stay whole, so that an edit keeps the picture's overall tone.
    """
    masks = []
    for grid, size in zip(layout.grids, layout.sizes, strict=True):
        resized = F.interpolate(keep[None, None].float(), size=grid, mode="bilinear", align_corners=False)
        masks.append((resized > 0.5).flatten() | (size <= 3))
    return torch.cat(masks)


def image_to_tensor(image: Image.Image | Tensor | Sequence[Image.Image], size: tuple[int, int]) -> Tensor:
    """PIL images (resized to `size`, Lanczos) or a tensor (B, 3, H, W) in [-1, 1] -> such a tensor.

    Raises: ValueError on a tensor of another size or range, TypeError on anything else.
    """
    if isinstance(image, Tensor):
        if image.dim() != 4 or image.shape[1] != 3 or tuple(image.shape[-2:]) != size:
            raise ValueError(f"an image tensor must be (B, 3, {size[0]}, {size[1]}); got {tuple(image.shape)}")
        if image.min() < -1.001 or image.max() > 1.001:
            raise ValueError(f"an image tensor must lie in [-1, 1]; got [{image.min():.3g}, {image.max():.3g}]")
        return image.float()
    images = [image] if isinstance(image, Image.Image) else list(image)
    if not images or not all(isinstance(i, Image.Image) for i in images):
        raise TypeError("image must be a PIL image, a non-empty list of them, or a tensor (B, 3, H, W) in [-1, 1]")
    arrays = [
        np.asarray(i.convert("RGB").resize((size[1], size[0]), Image.Resampling.LANCZOS), np.float32) for i in images
    ]
    return torch.from_numpy(np.stack(arrays)).permute(0, 3, 1, 2).div(127.5).sub(1)


def mask_to_tensor(mask: Image.Image | Tensor | None, grid: Sequence[int]) -> Tensor:
    """A mask, white or 1 where the image is redrawn, -> (h, w) float32 in [0, 1] at the token grid."""
    if isinstance(mask, Tensor):
        values = mask.float().reshape(1, 1, *mask.shape[-2:])
    elif isinstance(mask, Image.Image):
        values = torch.from_numpy(np.asarray(mask.convert("L"), np.float32) / 255)[None, None]
    else:
        raise TypeError(f"mask must be a PIL image or a tensor; got {type(mask).__name__}")
    if values.min() < 0 or values.max() > 1:
        raise ValueError(f"a mask must lie in [0, 1]; got [{values.min():.3g}, {values.max():.3g}]")
    return F.interpolate(values, size=tuple(grid), mode="area")[0, 0]
