"""Tokens of images seen before, so that several runs over the same images encode each of them once."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


class CodeMemory:
    """A row of token ids for every image of a set, filled as images come by.

    It is right only where an image always looks the same: no random crop, no flip.

    Args: count: images in the set.   length: tokens of one.
    """

    def __init__(self, count: int, length: int) -> None:
        self.ids = torch.full((count, length), -1, dtype=torch.int32)  # N L; -1: not seen yet

    def tokens(self, batch: dict[str, Tensor], encode: Callable[[Tensor], Tensor]) -> Tensor:
        """Tokens of a batch; `encode` is asked for those of new images alone.

        Args: batch: `images` (B, 3, H, W) and `index` (B,), as `varkit.data.images.ImageDataset` gives them.
        Returns: (B, L) int64, on the device of the images.
        """
        images, index = batch["images"], batch["index"].cpu()
        new = self.ids[index, 0] < 0
        if new.any():
            self.ids[index[new]] = encode(images[new.to(images.device)]).to("cpu", torch.int32)
        return self.ids[index].to(images.device, torch.int64)
