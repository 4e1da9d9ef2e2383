"""Training a small classifier that judges generated clips of a data set."""

from __future__ import annotations

from typing import Literal

from torch import nn

from varkit.config import config
from varkit.metrics.classifier import ClipClassifier
from varkit.training.objectives import classifier

CLIPS = True


@config
class Config(classifier.Config):
    """As that of images."""

    name: Literal["clip-classifier"] = "clip-classifier"  # type: ignore[assignment]
    num_frames: int = 16
    widths: tuple[int, ...] = (16, 40, 64)


class Training(classifier.Training):
    """As that of images."""

    config: Config

    def __init__(self, config: Config, classes: list[str]) -> None:
        self.num_frames = config.num_frames
        super().__init__(config, classes)

    def _build(self, classes: int) -> nn.Module:
        c = self.config
        return ClipClassifier(classes, c.image_size, c.num_frames, c.widths, c.dropout)
