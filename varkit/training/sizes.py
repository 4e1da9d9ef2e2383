"""Training at sizes that vary: one is drawn for each batch, and its images are brought to it.

ControlAR's multi-scale training (arXiv 2410.02705). The release means to draw sizes of at most the area of 768x768, but
adds the sides where it should multiply them, so that every batch has 1024x1024; here they vary.

Source: hustvl/ControlAR: dataset/t2i_control.py (87e32e9).
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from varkit.config import ConfigError, config
from varkit.rng import Draw, Rng


@config
class Sizes:
    """Images of all sides from `smallest` to `largest` in steps, of at most `area` pixels."""

    smallest: int = 384
    largest: int = 1024
    area: int = 768 * 768
    step: int = 16

    def __post_init__(self) -> None:
        if not 0 < self.smallest <= self.largest or self.step < 1 or self.smallest % self.step:
            raise ConfigError(
                f"objective.sizes: 0 < smallest <= largest, and smallest a multiple of step; got {self.smallest}, "
                f"{self.largest} and {self.step}"
            )
        if self.area < self.smallest**2:
            raise ConfigError(f"objective.sizes.area {self.area} is less than that of {self.smallest}x{self.smallest}")

    def all(self) -> list[tuple[int, int]]:
        """Every (height, width)."""
        sides = range(self.smallest, self.largest + 1, self.step)
        return [(h, w) for h in sides for w in sides if h * w <= self.area]

    def check(self, model: Any, tokenizer: Any) -> None:
        """Raises ConfigError where tokens do not divide a size, or the model cannot draw one."""
        (height, width), grid = tokenizer.image_size, tokenizer.layout.grids[-1]
        patch = height // grid[0]
        if self.step % patch or (height // grid[0], width // grid[1]) != (patch, patch):
            raise ConfigError(f"objective.sizes.step {self.step} must be a multiple of {patch}, what a token covers")
        try:
            for size in self.all():
                model.resized((size[0] // patch, size[1] // patch))
        except ValueError as error:
            raise ConfigError(f"objective.sizes: {error}") from None

    def draw(self, rng: Rng) -> tuple[int, int]:
        """The size of a batch: by the numbers of its first image, all equally likely."""
        sizes = self.all()
        u = float(rng.uniform(torch.zeros(1, dtype=torch.int64), Draw.SIZE)[0, 0])
        return sizes[min(int(u * len(sizes)), len(sizes) - 1)]


def brought_to(images: Tensor, size: tuple[int, int]) -> Tensor:
    """(B, 3, H, W) in [-1, 1] -> (B, 3, *size), bilinear, what is made smaller averaged."""
    return F.interpolate(images, size=size, mode="bilinear", antialias=True).clamp(-1, 1)
