"""What the students of Distilled Decoding have in common (Liu et al., arXiv 2412.17153).

A student reads a vector for every position, data or noise, and predicts all vectors at once: where it reads noise, what
the teacher's map makes of that noise (`varkit.samplers.flow_map`), given the data before. Positions come in units, the
teacher's steps: scales of VAR, tokens of LlamaGen. The first t units are data, the others hold their noise.

It is no `Generator`: nothing is decided step by step. `varkit.samplers.distilled` draws with it.

Shapes: B batch, L tokens, C channels of the codebook, W width, V codebook.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, NamedTuple, Self

import torch
from torch import Tensor, nn

from varkit.layout import TokenLayout


class Prediction(NamedTuple):
    """Two heads' answers for every position: vectors (B, L, C) and logits (B, L, V), float32."""

    vectors: Tensor
    logits: Tensor


class Student(ABC):
    """A network that draws all units at once.

    Attributes:
        layout, num_classes: the teacher's.
        units: (L,) int64, of each position.   unit: what a unit is called.   num_units: how many.
        condition, takes, sampler: as those of `Generator`.
    """

    layout: TokenLayout
    num_classes: int
    units: Tensor
    unit: str
    num_units: int
    condition = "class"
    takes = frozenset({"class"})
    sampler = "DistilledSampler"

    @classmethod
    @abstractmethod
    def of_teacher(cls, teacher: Any, **overrides: Any) -> Any:
        """A student with the teacher's sizes and what of its weights both have.

        Args: overrides: constructor arguments that no weight depends on.
        Raises: ValueError when this teacher can have no such student.
        """

    @abstractmethod
    def forward(self, x: Tensor, class_labels: Tensor, known: Tensor) -> Prediction:
        """Predict all positions.

        Args:
            x: (B, L, C), vectors of data or noise.   class_labels: (B,).
            known: (B, L) or (1, L) bool: which of them are data.
        """

    def resized(self, grid: tuple[int, int]) -> Self:
        """Raises ValueError: the map from noise to tokens was learned at one size."""
        raise ValueError(
            f"a distilled student draws {self.layout.grids[-1]} tokens alone, as it learned; ask its teacher"
        )

    def known(self, t: int | Tensor) -> Tensor:
        """Which positions are data when the first t units are, (1, L); of t (B,) one row each."""
        return self.units < torch.as_tensor(t, device=self.units.device).view(-1, 1)

    def mix(self, data: Tensor, noise: Tensor, t: int | Tensor) -> Tensor:
        """(B, L, C): `data` in the first t units, `noise` in the others."""
        return torch.where(self.known(t)[..., None], data, noise)

    def tokenizer_for(self, tokenizer: Any) -> Any:
        """See `Generator.tokenizer_for`."""
        return tokenizer


class ContinuousHead(nn.Module):
    """A norm that the class shifts and scales, then a linear layer to vectors (official `final_layer_conti`)."""

    def __init__(self, dim: int, channels: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(dim, 1e-6, elementwise_affine=False)
        self.scale_shift_table = nn.Parameter(torch.randn(2, dim) / dim**0.5)
        self.linear = nn.Linear(dim, channels)

    def forward(self, x: Tensor, cond: Tensor) -> Tensor:
        """(B, L, W) and the class's embedding (B, W) -> (B, L, C)."""
        shift, scale = (self.scale_shift_table + cond[:, None]).split(1, 1)  # B 1 W each
        return self.linear(torch.addcmul(shift, self.norm(x), scale + 1))


def require_class_teacher(teacher: Any, kind: type[Any]) -> None:
    """Raises ValueError unless `teacher` is a `kind` that is conditioned on classes."""
    if not isinstance(teacher, kind) or teacher.condition != "class":
        raise ValueError(
            f"this student learns from a {kind.__name__} of classes; the teacher is a {type(teacher).__name__} "
            f"conditioned on {getattr(teacher, 'condition', 'nothing')}"
        )
    if "control" in teacher.takes:
        raise ValueError(
            f"this {type(teacher).__name__} is steered by control images, which no student reads; take one that is not"
        )


def flags(known: Tensor, batch: int) -> Tensor:
    """(B|1, L) bool -> (B, 1 + L) int64: 1 is data, 0 noise; the class in front is data."""
    return nn.functional.pad(known.expand(batch, -1).long(), (1, 0), value=1)
