"""What latents look like to a generator: mean and spread of each channel.

Spread is that of what is drawn: the variance of a posterior's mean, and the mean of its variance.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor


@dataclass(frozen=True)
class LatentStatistics:
    """Mean and standard deviation of each of C channels, over `count` latents (images x views x positions)."""

    count: int
    mean: list[float]
    std: list[float]

    @classmethod
    def of(cls, sums: Tensor, count: int) -> Self:
        """Args: sums: (2, C) float64, those of `latent_sums` over `count` latents in all."""
        mean, square = (sums / count).unbind(0)
        return cls(count, mean.tolist(), (square - mean.square()).clamp_min(0).sqrt().tolist())

    @property
    def overall(self) -> tuple[float, float]:
        """Mean and standard deviation of all channels together."""
        mean = sum(self.mean) / len(self.mean)
        square = sum(s * s + m * m for m, s in zip(self.mean, self.std, strict=True)) / len(self.mean)
        return mean, max(square - mean * mean, 0.0) ** 0.5

    def __str__(self) -> str:
        mean, std = self.overall
        return (
            f"mean {mean:.3f} (channels {min(self.mean):.3f} to {max(self.mean):.3f}), "
            f"std {std:.3f} ({min(self.std):.3f} to {max(self.std):.3f}), of {self.count:,} latents"
        )


def latent_sums(latents: Tensor, std: Tensor | None = None) -> Tensor:
    """Sums of latents and of their squares over all but the last axis: (..., C) -> (2, C) float64, on the CPU.

    Args: std: of the posterior, (..., C), where `latents` are its means: squares then include the variance.
    The sum is numpy's, the same for any number of threads.
    """
    values = latents.detach().cpu().double().flatten(0, -2).numpy()
    squares = (values * values).sum(0)
    if std is not None:
        spread = std.detach().cpu().double().flatten(0, -2).numpy()
        squares = squares + (spread * spread).sum(0)
    return torch.stack([torch.from_numpy(values.sum(0)), torch.from_numpy(squares)])
