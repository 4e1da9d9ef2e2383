"""Training a matcher of images and captions, which judges generators of texts."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from varkit.config import ConfigError, config
from varkit.interfaces import Losses, Objective
from varkit.metrics.matcher import ImageTextMatcher
from varkit.rng import Rng


@config
class Config:
    """Both towers; see `ImageTextMatcher`. Each image is told from the others of its micro-batch."""

    name: Literal["matcher"] = "matcher"
    image_size: int = 64
    widths: tuple[int, ...] = (32, 64, 128)
    text_width: int = 128
    text_depth: int = 2
    text_heads: int = 4
    text_length: int = 96  # bytes
    text_stride: int = 3  # bytes that become one token
    dim: int = 128
    dropout: float = 0.1


class Training(Objective):
    """Owns the matcher."""

    def __init__(self, config: Config, classes: list[str]) -> None:
        super().__init__()
        self.config = config
        self.image_size = (config.image_size, config.image_size)
        sizes = {name: value for name, value in vars(config).items() if name != "name"}
        try:
            self.model = ImageTextMatcher(**sizes)
        except (ValueError, AssertionError) as error:
            raise ConfigError(f"objective: {error}") from None

    def check_texts(self, name: str, texts: Sequence[str] | None) -> None:
        """Raises ConfigError when images have no captions."""
        empty = len([text for text in texts if not text.strip()]) if texts else 0
        if not texts or empty:
            what = f"{empty} of {len(texts)} images have no caption" if texts else "it has no captions"
            raise ConfigError(f"{name}: {what}; a matcher learns from captioned images (docs/data.md, Captions)")

    def trained(self, phase: str) -> nn.Module:
        return self.model

    def forward(self, batch: dict[str, Any], phase: str, step: int, max_steps: int, rng: Rng) -> Losses:
        losses: Losses = self.model(batch["images"], batch["texts"])
        return losses

    @torch.no_grad()
    def validate(self, batch: dict[str, Any], rng: Rng) -> Losses:
        """Within batches of the validation, 128 images or fewer."""
        losses: dict[str, Tensor] = self.model(batch["images"], batch["texts"])
        return losses

    def export(self, folder: Path) -> None:
        self.model.save_pretrained(folder)
