"""Splits of a source: their names, which one is meant, and the class ids that all of them share."""

from collections.abc import Iterable, Mapping
from typing import TypeVar

import torch

from varkit.data.dataset import ImageDataset

HELD_OUT = ("val", "validation", "test")
SPLITS = ("train", *HELD_OUT)

T = TypeVar("T")


def pick_split(splits: Mapping[str, T], split: str, where: object) -> T:
    """The split of that name; a held-out name means the only held-out split there is.

    Raises: ValueError naming the splits of `where`.
    """
    return splits[split_name(splits, split, where)]


def split_name(splits: Iterable[str], split: str, where: object) -> str:
    """As `pick_split`: the name under which the split is there."""
    names = list(splits)
    held_out = [name for name in names if name in HELD_OUT]
    if split in names:
        return split
    if split in HELD_OUT and len(held_out) == 1:
        return held_out[0]
    raise ValueError(f"{where} has no split {split!r}; it has {', '.join(names)}")


def with_classes_of(dataset: ImageDataset, classes: list[str], train: object) -> ImageDataset:
    """Give a held-out split the class ids of the training split, which may have more classes.

    Raises: ValueError if it has classes that the training split lacks.
    """
    position = {name: i for i, name in enumerate(classes)}
    if unknown := [name for name in dataset.classes if name not in position]:
        raise ValueError(
            f"{dataset.source} has classes that {train} lacks: {', '.join(unknown[:5])}; class ids would not agree"
        )
    ids = torch.tensor([position[name] for name in dataset.classes] + [-1], dtype=torch.int64)
    dataset.labels, dataset.classes = ids[dataset.labels], classes  # -1 finds the last entry
    return dataset
