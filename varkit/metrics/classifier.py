"""A small image classifier, and how a set of generated images looks to it.

On data for which Inception is meaningless (Fashion-MNIST, a small own set) a classifier trained on that data
judges better: does it agree with the class that was asked for, and are its features distributed alike? Such a
distance is printed as FD(classifier), never as FID.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch.nn.functional as F
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.modeling_utils import ModelMixin
from torch import Tensor, nn


class ImageClassifier(ModelMixin, ConfigMixin):
    """Convolutions with group norm, halving the sides at each stage; global average; one linear head.

    Args:
        num_classes: of the head.   image_size: side of the square images it was trained on.
        widths: channels of each stage; the last is the width of the features.
    """

    @register_to_config
    def __init__(
        self, num_classes: int = 10, image_size: int = 32, widths: Sequence[int] = (32, 64, 128), dropout: float = 0.2
    ) -> None:
        super().__init__()
        self.stages = nn.ModuleList()
        before = 3
        for width in widths:
            self.stages.append(
                nn.Sequential(
                    nn.Conv2d(before, width, 3, padding=1, bias=False),
                    nn.GroupNorm(8, width),
                    nn.SiLU(),
                    nn.Conv2d(width, width, 3, padding=1, bias=False),
                    nn.GroupNorm(8, width),
                    nn.SiLU(),
                )
            )
            before = width
        self.drop = nn.Dropout(dropout)
        self.head = nn.Linear(before, num_classes)

    def features(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) in [-1, 1] -> (B, widths[-1]): what FD(classifier) compares."""
        side = self.config.image_size
        if tuple(images.shape[1:]) != (3, side, side):
            raise ValueError(f"this classifier takes (B, 3, {side}, {side}) in [-1, 1]; got {tuple(images.shape)}")
        x = images
        for i, stage in enumerate(self.stages):
            x = stage(F.avg_pool2d(x, 2) if i else x)
        return x.mean((2, 3))

    def forward(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) in [-1, 1] -> (B, num_classes) logits."""
        return self.head(self.drop(self.features(images)))
