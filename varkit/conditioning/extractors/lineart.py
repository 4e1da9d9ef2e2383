"""Line drawings, by the generator of "Learning to generate line drawings that convey geometry and semantics" (2022).

Source: hustvl/ControlAR: condition/lineart.py (87e32e9); carolineec/informative-drawings (the same network).
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn

from varkit.conditioning.extractors.base import as_floats, open_network, to_levels

SMALLEST = 8
"""Pixels a side: reflection by one pixel after halving twice."""


class Residual(nn.Module):
    def __init__(self, dim: int) -> None:
        super().__init__()
        self.conv_block = nn.Sequential(
            nn.ReflectionPad2d(1),
            nn.Conv2d(dim, dim, 3),
            nn.InstanceNorm2d(dim),
            nn.ReLU(),
            nn.ReflectionPad2d(1),
            nn.Conv2d(dim, dim, 3),
            nn.InstanceNorm2d(dim),
        )

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv_block(x)


def _normed(convolution: nn.Module, dim: int) -> list[nn.Module]:
    return [convolution, nn.InstanceNorm2d(dim), nn.ReLU()]


class LineArtNetwork(nn.Module):
    """Halves the image twice, residual blocks, doubles it twice; under the keys of the released file.

    Args: input_nc, output_nc: channels.   n_residual_blocks: in the middle.   sigmoid: lines in 0 .. 1.
    """

    def __init__(self, input_nc: int = 3, output_nc: int = 1, n_residual_blocks: int = 3, sigmoid: bool = True) -> None:
        super().__init__()
        dim = 64
        self.model0 = nn.Sequential(nn.ReflectionPad2d(3), *_normed(nn.Conv2d(input_nc, dim, 7), dim))
        self.model1 = nn.Sequential(
            *_normed(nn.Conv2d(dim, 2 * dim, 3, stride=2, padding=1), 2 * dim),
            *_normed(nn.Conv2d(2 * dim, 4 * dim, 3, stride=2, padding=1), 4 * dim),
        )
        self.model2 = nn.Sequential(*(Residual(4 * dim) for _ in range(n_residual_blocks)))
        self.model3 = nn.Sequential(
            *_normed(nn.ConvTranspose2d(4 * dim, 2 * dim, 3, stride=2, padding=1, output_padding=1), 2 * dim),
            *_normed(nn.ConvTranspose2d(2 * dim, dim, 3, stride=2, padding=1, output_padding=1), dim),
        )
        last = [nn.Sigmoid()] if sigmoid else []
        self.model4 = nn.Sequential(nn.ReflectionPad2d(3), nn.Conv2d(dim, output_nc, 7), *last)

    def forward(self, images: Tensor, input_divisor: float = 1.0) -> Tensor:
        """(B, 3, H, W) in 0 .. 255, RGB -> lines (B, 1, H, W) in 0 .. 1, black on white.

        Args: input_divisor: 1 gives the network 0 .. 255, as ControlAR does; 255 gives it 0 .. 1, as it was trained.
        """
        height, width = images.shape[-2:]
        x = self.model1(self.model0(images / input_divisor))
        x = self.model4(self.model3(self.model2(x)))
        return x[..., :height, :width]  # sides come out as multiples of 4


class LineArt:
    """Lines, black on white as the network draws them, or white on black.

    Args:
        weights: model.pth or its folder; None looks where `find_weights` does.
        white_lines: white on black, as ControlAR's edge_base files read them.
        input_divisor: see `LineArtNetwork.forward`; the released models saw lines made with 1.
        device: where it runs.
    Raises: ValueError for a divisor of 0 or less; as `open_network`.
    """

    def __init__(
        self,
        weights: str | Path | None = None,
        *,
        white_lines: bool = False,
        input_divisor: float = 1.0,
        device: torch.device | str = "cpu",
    ) -> None:
        if not input_divisor > 0:
            raise ValueError(f"input_divisor must be positive, 1 or 255; got {input_divisor}")
        self.white_lines, self.input_divisor, self.device = white_lines, input_divisor, device
        self.network = open_network(LineArtNetwork(), "lineart", weights, device)

    @torch.inference_mode()
    def floats(self, images: Tensor) -> Tensor:
        """uint8 (B, H, W, 3) -> float32 (B, H, W) in 0 .. 255, not rounded. Raises: ValueError below 8 pixels."""
        lines = self.network(as_floats(images, self.device, SMALLEST), self.input_divisor)[:, 0]
        return (255 * (1 - lines if self.white_lines else lines)).to(images.device)

    def __call__(self, images: Tensor) -> Tensor:
        """uint8 (B, H, W, 3) -> uint8 (B, H, W)."""
        return to_levels(self.floats(images))
