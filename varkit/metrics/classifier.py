"""Small classifiers of images and of clips, and how a set of generated ones looks to them.

On data for which Inception or I3D is meaningless (Fashion-MNIST, a small own set) a classifier trained on that data
judges better: does it agree with the class that was asked for, and are its features distributed alike? Such a
distance is printed as FD(classifier) or FD(moving-fashion), never as FID or FVD.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch.nn.functional as F
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.modeling_utils import ModelMixin
from torch import Tensor, nn


def _stage(*convolutions: nn.Conv2d | nn.Conv3d) -> nn.Sequential:
    """Each followed by a norm of eight groups and SiLU."""
    each = ((conv, nn.GroupNorm(8, conv.out_channels), nn.SiLU()) for conv in convolutions)
    return nn.Sequential(*[module for three in each for module in three])


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
            first = nn.Conv2d(before, width, 3, padding=1, bias=False)
            self.stages.append(_stage(first, nn.Conv2d(width, width, 3, padding=1, bias=False)))
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


class ClipClassifier(ModelMixin, ConfigMixin):
    """3-D convolutions with group norm, halving sides and frames at each stage; one linear head on the mean over all.

    The first stage sees blocks of 1x4x4 pixels, two pixels apart: it costs a fraction of one at full size.

    Args:
        num_classes: of the head.   image_size: side of the square frames it was trained on.
        num_frames: it was trained on; any number from 4 on is taken.
        widths: channels of each stage; the last is the width of the features.
    """

    @register_to_config
    def __init__(
        self,
        num_classes: int = 30,
        image_size: int = 32,
        num_frames: int = 16,
        widths: Sequence[int] = (16, 40, 64),
        dropout: float = 0.2,
    ) -> None:
        super().__init__()
        self.stages = nn.ModuleList()
        before = 3
        for i, width in enumerate(widths):
            first = (
                nn.Conv3d(before, width, 3, 2, 1, bias=False)
                if i
                else nn.Conv3d(3, width, (1, 4, 4), (1, 2, 2), (0, 1, 1), bias=False)
            )
            self.stages.append(_stage(first, nn.Conv3d(width, width, 3, padding=1, bias=False)))
            before = width
        self.drop = nn.Dropout(dropout)
        self.head = nn.Linear(before, num_classes)

    def features(self, clips: Tensor) -> Tensor:
        """(B, 3, T, H, W) in [-1, 1] -> (B, widths[-1]), means over places and time: what FD(moving-fashion) compares.

        Raises: ValueError for another size, or fewer than 4 frames.
        """
        side = self.config.image_size
        if clips.dim() != 5 or clips.shape[1] != 3 or clips.shape[2] < 4 or tuple(clips.shape[3:]) != (side, side):
            raise ValueError(
                f"this classifier takes (B, 3, T, {side}, {side}) in [-1, 1], T at least 4; got {tuple(clips.shape)}"
            )
        x = clips
        for stage in self.stages:
            x = stage(x)
        return x.mean((2, 3, 4))

    def forward(self, clips: Tensor) -> Tensor:
        """(B, 3, T, H, W) in [-1, 1] -> (B, num_classes) logits."""
        return self.head(self.drop(self.features(clips)))
