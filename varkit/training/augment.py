"""Changes of images that gradients pass through, so that a discriminator does not learn the few real ones by heart."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from varkit.rng import Draw, Rng

SHIFT = 1 / 8
"""Images move by up to this share of their sides."""


def diff_augment(images: Tensor, rng: Rng, step: int) -> Tensor:
    """Colour and translation of DiffAugment: brightness, saturation and contrast change, then the image moves and
    leaves grey (0) behind.

    Args:
        images: (B, C, H, W) in [-1, 1]; what comes back may lie outside.
        rng: one seed an image.   step: other numbers for the same images.
    Source: Zhao et al., arXiv 2006.10738, section 3.2.
    """
    u = rng.uniform(torch.arange(5), Draw.DISCRIMINATOR, step=step).to(images.device)  # B 5
    brightness, saturation, contrast = (u[:, i, None, None, None].to(images.dtype) for i in range(3))
    images = images + brightness - 0.5
    grey = images.mean(1, keepdim=True)
    images = grey + (images - grey) * 2 * saturation
    mean = images.mean((1, 2, 3), keepdim=True)
    images = mean + (images - mean) * (contrast + 0.5)
    for axis, share in ((2, u[:, 3]), (3, u[:, 4])):
        images = moved(images, axis, share)
    return images


def moved(images: Tensor, axis: int, share: Tensor) -> Tensor:
    """Each image moved along one side, by -SHIFT of it at `share` (B,) 0 to SHIFT at 1."""
    side = images.shape[axis]
    most = int(side * SHIFT + 0.5)
    shift = (share * (2 * most + 1)).long().clamp_max(2 * most)  # B, 0 .. 2 most
    places = torch.arange(side, device=images.device) + shift[:, None]  # B side, in the padded image
    padded = F.pad(images, (0, 0, most, most) if axis == 2 else (most, most))
    places = places[:, None, :, None] if axis == 2 else places[:, None, None, :]
    return padded.gather(axis, places.expand(images.shape))
