"""The key-value cache of a transformer that predicts in groups."""

from __future__ import annotations

from collections.abc import Sequence
from copy import copy

import torch
import torch.nn.functional as F
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

    def reserve(self, count: int) -> None:
        """Move to memory that holds `count` positions more than now."""
        for tensors in (self.keys, self.values):
            tensors[:] = [torch.cat([t, t.new_zeros(*t.shape[:2], count, t.shape[3])], 2) for t in tensors]


class CacheSlots:
    """The memory of a `KVCache`, written where a tensor says and read whole: shapes never change.

    Args: keys, values: (rows, heads, length, head_dim), one a layer.   positions: (n,) int64, where `extend` writes.
    Attributes: places: of those entries in the sequence, which learned and rotary positions go by: the same here.
    """

    def __init__(self, keys: Sequence[Tensor], values: Sequence[Tensor], positions: Tensor) -> None:
        self.keys, self.values, self.positions = keys, values, positions
        self.places = positions

    def extend(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """As that of `KVCache`, but what is behind the written positions comes too: `visible` hides it."""
        return (
            self.keys[layer].index_copy_(2, self.positions, k),
            self.values[layer].index_copy_(2, self.positions, v),
        )

    def visible(self, seen: Tensor | None = None) -> Tensor | None:
        """(1 or rows, 1, n, length) bool: each written position sees itself and those before it; None is all.

        Args: seen: (rows, S) bool, False at first positions that nobody sees.
        """
        every = torch.arange(self.keys[0].shape[2], device=self.positions.device)
        mask = (every <= self.positions[:, None])[None, None]
        return mask if seen is None else mask & seen[:, None, None]


class TreeWindow(CacheSlots):
    """Rows of different lengths, behind each of which nodes of a tree are tried; those that are kept come to the front.

    `open` says which nodes; the network then writes them behind the final positions of each row, and each sees the
    final positions, its ancestors and itself. `commit` makes a path of them final, and the next `open` overwrites the
    rest. Where all rows are equally long, nodes form a chain and a chain's first nodes are kept, nothing is gathered.

    Args: cache: whose final positions are those of every row. It must hold the longest row and all nodes.
    Attributes: lengths: (rows,) int64, final positions.
    """

    def __init__(self, cache: KVCache) -> None:
        self.cache = cache
        rows, device = len(cache.keys[0]), cache.keys[0].device
        self.lengths = torch.full((rows,), cache.length, device=device)
        self.longest, self.shortest = cache.length, cache.length
        self.open(torch.zeros(rows, 1, dtype=torch.int64, device=device))

    def open(self, depth: Tensor, ancestors: Tensor | None = None, first: int = 0) -> None:
        """The nodes that are read next.

        Args:
            depth: (rows, n) int64: of each node below the final positions, from 0.
            ancestors: (rows, n, n) bool, [i, j] whether j is i or above it; None: of a chain.
            first: of a chain, how many of its nodes were written since the last `commit` and stay.
        Raises: ValueError when the cache is too short.
        """
        count = depth.shape[1]
        self.end = self.longest + first + count
        if self.end > self.cache.keys[0].shape[2]:
            raise ValueError(f"the cache holds {self.cache.keys[0].shape[2]} positions; {self.end} were asked for")
        self.ancestors, self.first = ancestors, first
        self.keys, self.values = self.cache.keys, self.cache.values
        nodes = torch.arange(first, first + count, device=depth.device)
        self.positions = self.lengths[:, None] + nodes  # rows n
        self.places = self.lengths[:, None] + depth

    def extend(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Write (rows, heads, n, head_dim) behind the final positions; returns all up to the last written one."""
        for memory, new in ((self.keys[layer], k), (self.values[layer], v)):
            if self.shortest == self.longest:
                memory[:, :, self.end - new.shape[2] : self.end] = new
            else:
                index = self.positions[:, None, :, None].expand_as(new)
                memory.scatter_(2, index, new)
        return self.keys[layer][:, :, : self.end], self.values[layer][:, :, : self.end]

    def visible(self, seen: Tensor | None = None) -> Tensor | None:
        every = torch.arange(self.end, device=self.positions.device)
        equal, count = self.shortest == self.longest, self.positions.shape[1]
        if seen is None and equal and count == 1:
            return None
        at = self.positions[:1] if equal else self.positions  # 1|rows n
        if self.ancestors is None:
            mask = every <= at[..., None]
        else:
            mask = (every < self.lengths[:, None, None]).expand(-1, count, -1)
            mask = mask.scatter(2, self.positions[:, None].expand(-1, count, -1), self.ancestors)
        if seen is not None:
            short = self.end - seen.shape[1]
            mask = mask & F.pad(seen, (0, short), value=True)[:, None]  # a negative pad crops
        return mask[:, None]

    def commit(self, nodes: Tensor, counts: Tensor) -> None:
        """Make nodes final.

        Args: nodes: (rows, m) int64, from the root down; what is behind a row's count is not read.   counts: (rows,).
        """
        m = nodes.shape[1]
        chain = torch.arange(m, device=nodes.device)
        if not bool(((nodes == chain) | (chain >= counts[:, None])).all()):
            source = self.lengths[:, None] + torch.where(chain < counts[:, None], nodes, chain)
            for memory in (*self.cache.keys, *self.cache.values):
                shape = (-1, memory.shape[1], -1, memory.shape[3])
                kept = memory.gather(2, source[:, None, :, None].expand(shape))
                memory.scatter_(2, (self.lengths[:, None] + chain)[:, None, :, None].expand(shape), kept)
        self._set(self.lengths + counts)

    def rewind(self, counts: Tensor) -> None:
        """Forget the last (rows,) final positions. Raises ValueError when there are fewer."""
        if bool(((counts < 0) | (counts > self.lengths)).any()):
            raise ValueError(f"cannot rewind {counts.tolist()} of {self.lengths.tolist()} positions")
        self._set(self.lengths - counts)

    def keep(self, rows: Tensor) -> None:
        """Go on with these rows alone, (r,) int64; the memory of the others is given back."""
        for tensors in (self.cache.keys, self.cache.values):
            tensors[:] = [t[rows] for t in tensors]
        self._set(self.lengths[rows])

    def _set(self, lengths: Tensor) -> None:
        self.lengths = lengths
        self.shortest, self.longest = (int(x) for x in torch.stack(torch.aminmax(lengths)).tolist())
