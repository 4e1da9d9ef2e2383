"""The key-value cache of a transformer that predicts in groups."""

from __future__ import annotations

import torch
from torch import Tensor


class KVCache:
    """Keys and values of all layers, sized once: no concatenation, no growth while sampling.

    Args:
        rows: batch rows (twice the images under guidance).   length: positions it can hold.
    """

    def __init__(
        self,
        layers: int,
        rows: int,
        heads: int,
        length: int,
        head_dim: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        shape = (layers, rows, heads, length, head_dim)
        self.keys = torch.empty(shape, dtype=dtype, device=device)
        self.values = torch.empty(shape, dtype=dtype, device=device)
        self.length = 0  # positions that are final

    def extend(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Write (rows, heads, n, head_dim) behind the final positions; returns all keys and values.

        `advance` makes them final; until then another `extend` of the layer overwrites them.
        Raises: ValueError when the cache is too short.
        """
        end = self.length + k.shape[2]
        if end > self.keys.shape[3]:
            raise ValueError(f"the cache holds {self.keys.shape[3]} positions; {end} were asked for")
        self.keys[layer, :, :, self.length : end] = k
        self.values[layer, :, :, self.length : end] = v
        return self.keys[layer, :, :, :end], self.values[layer, :, :, :end]

    def advance(self, count: int) -> None:
        """Make the last `count` written positions final."""
        self.length += count

    def rewind(self, count: int) -> None:
        """Forget the last `count` final positions. Raises ValueError when there are fewer."""
        if not 0 <= count <= self.length:
            raise ValueError(f"cannot rewind {count} of {self.length} positions")
        self.length -= count

    def reset(self) -> None:
        self.length = 0
