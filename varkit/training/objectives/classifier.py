"""Training a small classifier that judges generated images of a data set."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from varkit.config import ConfigError, config
from varkit.interfaces import Losses, Objective
from varkit.metrics.classifier import ImageClassifier
from varkit.rng import Rng


@config
class Config:
    """A classifier with cross entropy."""

    name: Literal["classifier"] = "classifier"
    image_size: int = 32
    widths: tuple[int, ...] = (32, 64, 128)
    dropout: float = 0.2
    label_smoothing: float = 0.05


class Training(Objective):
    model: Any  # logits of a batch

    def __init__(self, config: Config, classes: list[str]) -> None:
        super().__init__()
        if len(classes) < 2:
            raise ConfigError(f"a classifier needs data with at least 2 classes; got {len(classes)}")
        self.config = config
        self.image_size = (config.image_size, config.image_size)
        self.model = self._build(len(classes))

    def _build(self, classes: int) -> nn.Module:
        return ImageClassifier(classes, self.config.image_size, self.config.widths, self.config.dropout)

    def trained(self, phase: str) -> nn.Module:
        return self.model

    def forward(self, batch: dict[str, Tensor], phase: str, step: int, max_steps: int, rng: Rng) -> Losses:
        loss = F.cross_entropy(
            self.model(batch["images"]), batch["labels"], label_smoothing=self.config.label_smoothing
        )
        return {"loss": loss}

    @torch.no_grad()
    def validate(self, batch: dict[str, Tensor], rng: Rng) -> Losses:
        logits = self.model(batch["images"])
        right = (logits.argmax(-1) == batch["labels"]).float().mean()
        return {"loss": F.cross_entropy(logits, batch["labels"]), "accuracy": right}

    def export(self, folder: Path) -> None:
        self.model.save_pretrained(folder)
