"""Finite scalar quantisation (Mentzer et al., arXiv 2309.15505)."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn


class FSQ(nn.Module):
    """Each channel is rounded to a few levels. No weights.

    Args: levels: of each channel; their product is the size of the codebook.
    """

    steps: Tensor
    halves: Tensor
    basis: Tensor

    def __init__(self, levels: Sequence[int]) -> None:
        super().__init__()
        self.levels = tuple(levels)
        steps = torch.tensor(self.levels, device="cpu")
        self.register_buffer("steps", steps, persistent=False)
        self.register_buffer("halves", steps // 2, persistent=False)
        basis = [math.prod(self.levels[:i]) for i in range(len(self.levels))]
        self.register_buffer("basis", torch.tensor(basis, device="cpu"), persistent=False)

    def bound(self, z: Tensor) -> Tensor:
        """(..., C) -> float32 within the levels, before rounding."""
        half = (self.steps - 1) * (1 + 1e-3) / 2
        offset = torch.where(self.steps % 2 == 0, 0.5, 0.0)
        return torch.tanh(z.float() + torch.atanh(offset / half)) * half - offset

    def forward(self, z: Tensor) -> Tensor:
        """(..., C) -> values (..., C) float32 in [-1, 1]; the gradient goes straight through the rounding."""
        bound = self.bound(z)
        return (bound + (bound.round() - bound).detach()) / self.halves

    def unrounded(self, z: Tensor) -> Tensor:
        """(..., C) -> what `forward` rounds: values (..., C) float32 in about [-1, 1]."""
        return self.bound(z) / self.halves

    def ids(self, values: Tensor) -> Tensor:
        """Values (..., C) -> (...) int64."""
        return ((values * self.halves).round().long() + self.halves).mul(self.basis).sum(-1)

    def vectors(self, ids: Tensor) -> Tensor:
        """(...) int64 -> values (..., C) float32."""
        return (ids[..., None] // self.basis % self.steps - self.halves) / self.halves.float()
