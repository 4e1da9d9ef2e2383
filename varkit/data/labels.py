"""Class labels and captions as data sets write them: numbers or names, made class ids."""

from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

Label = int | str | None
"""By id, by name, or none."""

MAX_CLASSES = 1_000_000


def label_and_text(values: dict[str, Any], where: object) -> tuple[Label, str | None]:
    """`label`, and `text` or `caption`, of the JSON object that describes an image.

    Raises: ValueError, beginning with `where`, for values that are no label or no text.
    """
    label = checked_label(values.get("label"), where)
    name = "caption" if values.get("text") is None else "text"
    if not isinstance(text := values.get(name), str | None):
        raise ValueError(f"{where}: {name} is {text!r}; give a string, or leave it out")
    return label, text


def checked_label(label: Any, where: object) -> Label:
    """`label` if it is one. Raises: ValueError, beginning with `where`."""
    if isinstance(label, bool) or not isinstance(label, int | str | None):
        raise ValueError(f"{where}: label is {label!r}; give an int, a class name, or leave it out")
    if isinstance(label, int) and not 0 <= label < MAX_CLASSES:
        raise ValueError(f"{where}: label is {label}; class ids count from 0")
    return label


def class_ids(labels: list[Label], where: object) -> tuple[Tensor, list[str]]:
    """Labels by id or by name -> int64 (N,) with -1 where there is none, and the class names."""
    kinds = {type(label) for label in labels if label is not None}
    if len(kinds) > 1:
        raise ValueError(f"{where}: labels are ints in some lines and names in others; use one kind")
    if kinds == {str}:
        classes = sorted({label for label in labels if isinstance(label, str)})
        ids: dict[Label, int] = {name: i for i, name in enumerate(classes)}
        return torch.tensor([ids.get(label, -1) for label in labels], dtype=torch.int64), classes
    numbers = np.array([label if isinstance(label, int) else -1 for label in labels], np.int64)
    return torch.from_numpy(numbers), numbered(numbers, where)


def numbered(labels: npt.NDArray[np.int64] | None, where: object) -> list[str]:
    """Names for classes known by number only."""
    if labels is None or not len(labels):
        return []
    if labels.min() < -1 or labels.max() >= MAX_CLASSES:
        raise ValueError(
            f"{where}: labels from {labels.min()} to {labels.max()}; class ids count from 0, and -1 means no label"
        )
    return [str(i) for i in range(int(labels.max()) + 1)]
