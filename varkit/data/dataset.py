"""The one class of image data sets, and how its items become batches."""

import operator
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.utils.data import Dataset

from varkit.data.transforms import ImageTransform, Pixels, SkippedImage, stack_images


class ImageDataset(Dataset[dict[str, Any]]):
    """N images with class ids and, if there are any, texts (captions). Made by `varkit.data.open_images`.

    An item is asked for by its index, or by `(index, key)`: the key chooses the random crop and
    flip, so a sampler that gives a new key each epoch gets new crops, the same on every machine. A
    plain index is its own key.

    An image that does not decode is logged once, listed in `skipped`, and the next readable one is
    returned in its place with its own index and label. After 100 failures in a row: ValueError.

    Attributes:
        classes: class names, the position is the id; empty if there are no labels.
        labels: int64 (N,), -1 where unlabelled.
        texts: N captions, empty where an image has none; None if no image has one.
        name, source, kind: how the set is called, where it is, what was found there.
        warnings: what looked odd when it was opened.
        transform: applied to every image; None gives the stored uint8 pixels.
    """

    def __init__(
        self,
        pixels: Pixels,
        labels: Tensor | npt.NDArray[np.int64] | None = None,
        classes: Sequence[str] = (),
        *,
        name: str,
        source: str,
        kind: str,
        texts: list[str] | None = None,
        dropped: Sequence[SkippedImage] = (),
        warnings: Sequence[str] = (),
        transform: ImageTransform | None = None,
    ) -> None:
        self.pixels = pixels
        self.labels = torch.full((len(pixels),), -1) if labels is None else torch.as_tensor(labels)
        self.classes = list(classes)
        self.name, self.source, self.kind = name, source, kind
        self.texts = texts
        self.dropped = list(dropped)
        self.warnings = list(warnings)
        self.transform = transform

    @property
    def num_classes(self) -> int:
        return len(self.classes)

    @property
    def skipped(self) -> list[SkippedImage]:
        """Left out so far: dropped on opening, or found unreadable since by any loader worker."""
        return self.dropped + self.pixels.failures()

    def __len__(self) -> int:
        return len(self.pixels)

    def __getitem__(self, entry: int | tuple[int, int]) -> dict[str, Any]:
        """One image.

        Returns: "image" float32 (3, H, W) in [-1, 1] (uint8 (3, h, w) without transform), "label",
            "index" and "key" ints, "text" if the set has texts.
        Raises: IndexError; ValueError if no image is readable or a `pad` transform is too small.
        """
        batch = self.__getitems__([entry])
        item = {"image": batch["images"][0], "label": int(batch["labels"][0])}
        item |= {"index": int(batch["index"][0]), "key": int(batch["keys"][0])}
        return item | ({"text": batch["texts"][0]} if "texts" in batch else {})

    def __getitems__(self, entries: Sequence[int | tuple[int, int]]) -> dict[str, Any]:
        """A whole batch, which is what a torch DataLoader with `collate_fn=collate` asks for.

        Returns: "images" float32 (B, 3, H, W) in [-1, 1] (uint8 (B, 3, h, w) without transform),
            "labels", "index" and "keys" int64 (B,), "texts" list of B strings if the set has texts.
        Raises: as `__getitem__`; ValueError if there is no transform and the sizes differ.
        """
        pairs = [self._pair(entry) for entry in entries]
        keys = torch.tensor([key for _, key in pairs], dtype=torch.int64)
        images, used = self.pixels.read([index for index, _ in pairs], keys, self.transform)
        index = torch.tensor(used, dtype=torch.int64)
        batch = {"images": images, "labels": self.labels[index], "index": index, "keys": keys}
        return batch | ({"texts": [self.texts[i] for i in used]} if self.texts is not None else {})

    def _pair(self, entry: int | tuple[int, int]) -> tuple[int, int]:
        index, key = entry if isinstance(entry, (tuple, list)) else (entry, None)
        index = operator.index(index)
        if not -len(self) <= index < len(self):
            raise IndexError(f"index {index} is out of range for {len(self)} images of {self.name}")
        index %= len(self)
        return index, index if key is None else operator.index(key)


def collate(items: dict[str, Any] | Sequence[dict[str, Any]]) -> dict[str, Any]:
    """`collate_fn` of a DataLoader: passes the batch of `__getitems__` on, or stacks single items.

    Returns: the batch described at `ImageDataset.__getitems__`.
    Raises: ValueError if the images have different sizes.
    """
    if isinstance(items, dict):
        return items
    batch: dict[str, Any] = {"images": stack_images([item["image"] for item in items])}
    for name, one in (("labels", "label"), ("index", "index"), ("keys", "key")):
        batch[name] = torch.tensor([item[one] for item in items], dtype=torch.int64)
    return batch | ({"texts": [item["text"] for item in items]} if "text" in items[0] else {})
