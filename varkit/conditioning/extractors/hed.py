"""HED edges: soft outlines, of a VGG that looks at five scales (Xie and Tu, 2015), as ControlNet retrained it.

Source: hustvl/ControlAR: condition/hed.py (87e32e9); lllyasviel/ControlNet: annotator/hed (the same network).
"""

from __future__ import annotations

from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from varkit.conditioning.extractors.base import as_floats, open_network, to_levels

SMALLEST = 16
"""Pixels a side: the coarsest of the five scales halves them four times."""


class Stage(nn.Module):
    """3x3 convolutions with ReLU, and a 1x1 one that reads an edge map off them."""

    def __init__(self, dim_in: int, dim: int, depth: int) -> None:
        super().__init__()
        self.convs = nn.ModuleList(nn.Conv2d(dim if i else dim_in, dim, 3, padding=1) for i in range(depth))
        self.projection = nn.Conv2d(dim, 1, 1)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        for conv in self.convs:
            x = F.relu(conv(x))
        return x, self.projection(x)


class HEDNetwork(nn.Module):
    """The network of ControlNetHED.pth, under its keys."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.Parameter(torch.zeros(1, 3, 1, 1))  # the mean colour
        self.block1 = Stage(3, 64, 2)
        self.block2 = Stage(64, 128, 2)
        self.block3 = Stage(128, 256, 3)
        self.block4 = Stage(256, 512, 3)
        self.block5 = Stage(512, 512, 3)

    def sides(self, images: Tensor) -> list[Tensor]:
        """(B, 3, H, W) in 0 .. 255, RGB -> five maps of logits (B, 1, h, w), fine to coarse, each half as large."""
        x, found = images - self.norm, []
        for i, block in enumerate((self.block1, self.block2, self.block3, self.block4, self.block5)):
            x, side = block(F.max_pool2d(x, 2) if i else x)
            found.append(side)
        return found

    def forward(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) in 0 .. 255, RGB -> edges (B, H, W) in 0 .. 255: the sigmoid of the mean of the five maps."""
        size = images.shape[-2:]
        sides = [F.interpolate(x, size=size, mode="bilinear", align_corners=False) for x in self.sides(images)]
        return 255 * torch.cat(sides, 1).mean(1).sigmoid()


class HED:
    """Light outlines on black.

    Args: weights: ControlNetHED.pth or its folder; None looks where `find_weights` does.   device: where it runs.
    Raises: as `open_network`.
    """

    def __init__(self, weights: str | Path | None = None, *, device: torch.device | str = "cpu") -> None:
        self.device = device
        self.network = open_network(HEDNetwork(), "hed", weights, device)

    @torch.inference_mode()
    def floats(self, images: Tensor) -> Tensor:
        """uint8 (B, H, W, 3) -> float32 (B, H, W) in 0 .. 255, not rounded. Raises: ValueError below 16 pixels."""
        return self.network(as_floats(images, self.device, SMALLEST)).to(images.device)

    def __call__(self, images: Tensor) -> Tensor:
        """uint8 (B, H, W, 3) -> uint8 (B, H, W)."""
        return to_levels(self.floats(images))
