"""Masks for editing: which tokens of a pyramid are kept.

Source: FoundationVision/VAR: demo_zero_shot_edit.ipynb (78b9539).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from varkit.layout import TokenLayout
from varkit.pipelines.canvas import mask_values, on_canvas, place, read_image

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


def keep_pyramid(layout: TokenLayout, keep: Tensor, threshold: float = 0.5) -> Tensor:
    """(h, w) of the finest scale, 1 where tokens stay -> (L,) bool for all scales.

    A scale's token stays where the mask, resized to it, exceeds 1 - threshold: where less than the share `threshold` of
    it is to be redrawn. Of several scales, those of at most three tokens stay whole, so that an edit keeps the
    picture's overall tone.
    """
    masks = []
    for grid, size in zip(layout.grids, layout.sizes, strict=True):
        resized = F.interpolate(keep[None, None].float(), size=grid, mode="bilinear", align_corners=False)
        masks.append((resized > 1 - threshold).flatten() | (size <= 3 and len(layout.grids) > 1))
    return torch.cat(masks)


def keep_coarse(layout: TokenLayout, strength: float, ordered: bool) -> Tensor:
    """(L,) bool: the coarse scales, or first tokens, that stay in a variation of a whole image.

    Args:
        strength: the share of scales, or of tokens, that is drawn anew: 1 is all, 0 none.
        ordered: whether the tokens are ordered from coarse to fine, as those of FlexTok.
    Raises: ValueError on a strength outside [0, 1], or tokens none of which are coarse.
    """
    if not 0 <= strength <= 1:
        raise ValueError(f"strength must be in [0, 1], the share of scales that is drawn anew; got {strength}")
    units = layout.sizes if len(layout.grids) > 1 else (1,) * layout.length
    if len(layout.grids) == 1 and not ordered:
        raise ValueError(
            f"strength= keeps coarse scales and draws finer ones anew, but the {layout.length} tokens of this model "
            f"are all equally fine; give mask= or box=, or take a model of scales (VAR, FlowAR) or of ordered tokens "
            f"(FlexTok)"
        )
    kept = len(units) - math.ceil(strength * len(units) - 1e-9)
    return torch.arange(layout.length) < sum(units[:kept])


def image_to_tensor(image: Image.Image | Tensor | Sequence[Image.Image], size: tuple[int, int]) -> Tensor:
    """PIL images of any mode (resized to `size`, Lanczos) or a tensor (B, 3, H, W) in [-1, 1] -> such a tensor.

    Raises: ValueError on a tensor of another size or range, TypeError on anything else.
    """
    if isinstance(image, Tensor):
        if image.dim() != 4 or image.shape[1] != 3 or tuple(image.shape[-2:]) != size:
            raise ValueError(f"an image tensor must be (B, 3, {size[0]}, {size[1]}); got {tuple(image.shape)}")
        if image.min() < -1.001 or image.max() > 1.001:
            raise ValueError(f"an image tensor must lie in [-1, 1]; got [{image.min():.3g}, {image.max():.3g}]")
        return image.float()
    images = [image] if isinstance(image, Image.Image) else list(image)
    if not images:
        read_image(None)  # raises
    read = [read_image(one) for one in images]
    return torch.stack([on_canvas(one, place((one.height, one.width), size, "stretch"), size) for one in read])


def mask_to_tensor(mask: Image.Image | Tensor | None, grid: Sequence[int]) -> Tensor:
    """A mask, white or 1 where the image is redrawn, -> (h, w) float32 in [0, 1] at the token grid."""
    return to_grid(mask_values(mask), grid)  # type: ignore[arg-type]


def to_grid(values: Tensor, grid: Sequence[int]) -> Tensor:
    """(H, W) -> (h, w): the mean of what each token covers."""
    return F.interpolate(values[None, None], size=tuple(grid), mode="area")[0, 0]
