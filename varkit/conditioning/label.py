"""Class labels as a condition."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from varkit.interfaces import Cond, Condition
from varkit.rng import Draw, Rng


class LabelCondition(Condition):
    """Class ids; the null class is the row after the last class.

    Args: num_classes: classes, not counting the null class.
    """

    def __init__(self, num_classes: int) -> None:
        self.num_classes = num_classes

    def encode(self, *, class_labels: Sequence[int] | Tensor, **_: Any) -> Cond:  # type: ignore[override]
        """(B,) ids in [0, num_classes]. Raises ValueError naming the first id outside."""
        labels = torch.as_tensor(class_labels)
        if labels.dim() != 1 or labels.is_floating_point():
            raise ValueError(f"class_labels must be a list of whole numbers; got {class_labels!r}")
        bad = [int(v) for v in labels.tolist() if not 0 <= v <= self.num_classes]
        if bad:
            raise ValueError(
                f"class {bad[0]} does not exist: this model has classes 0 to {self.num_classes - 1} "
                f"({self.num_classes} stands for no class)"
            )
        return Cond(labels.to(torch.int64))

    def null(self, like: Cond) -> Cond:
        return Cond(torch.full_like(like.labels, self.num_classes))


def drop_labels(labels: Tensor, rng: Rng, rate: float, null: int) -> Tensor:
    """(B,) ids, some of them replaced by the null class: each with probability `rate`."""
    if rate == 0:
        return labels
    u = rng.uniform(torch.zeros(1, dtype=torch.int64), Draw.COND_DROP)[:, 0]
    return labels.masked_fill(u.to(labels.device) < rate, null)
