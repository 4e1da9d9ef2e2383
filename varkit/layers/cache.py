"""The key-value cache of a transformer that predicts in groups."""

from __future__ import annotations

from collections.abc import Sequence
from copy import copy

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
        shape = (rows, heads, length, head_dim)
        self.keys, self.values = (
            [torch.zeros(shape, dtype=dtype, device=device) for _ in range(layers)] for _ in range(2)
        )
        self.length = 0  # positions that are final

    def extend(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Write (rows, heads, n, head_dim) behind the final positions; returns all keys and values.

        `advance` makes them final; until then another `extend` of the layer overwrites them.
        Raises: ValueError when the cache is too short.
        """
        end = self.length + k.shape[2]
        keys, values = self.keys[layer], self.values[layer]
        if end > keys.shape[2]:
            raise ValueError(f"the cache holds {keys.shape[2]} positions; {end} were asked for")
        keys[:, :, self.length : end] = k
        values[:, :, self.length : end] = v
        return keys[:, :, :end], values[:, :, :end]

    def rows(self, count: int) -> KVCache:
        """The first rows alone, in the same memory: for a batch that is run without its unconditional half."""
        part = copy(self)
        part.keys, part.values = ([t[:count] for t in tensors] for tensors in (self.keys, self.values))
        return part

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


class CacheSlots:
    """The memory of a `KVCache`, written where a tensor says and read whole: shapes never change.

    Args: keys, values: (rows, heads, length, head_dim), one a layer.   positions: (n,) int64, where `extend` writes.
    """

    def __init__(self, keys: Sequence[Tensor], values: Sequence[Tensor], positions: Tensor) -> None:
        self.keys, self.values, self.positions = keys, values, positions

    def extend(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """As that of `KVCache`, but what is behind the written positions comes too: `visible` hides it."""
        return (
            self.keys[layer].index_copy_(2, self.positions, k),
            self.values[layer].index_copy_(2, self.positions, v),
        )

    def visible(self) -> Tensor:
        """(1, 1, n, length) bool: each written position sees itself and those before it."""
        every = torch.arange(self.keys[0].shape[2], device=self.positions.device)
        return (every <= self.positions[:, None])[None, None]
