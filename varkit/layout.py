"""What a token sequence is: which grids it concatenates, and what one token can be."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from math import prod
from typing import Any, Self

from torch import Tensor

Grid = tuple[int, ...]


@dataclass(frozen=True)
class TokenLayout:
    """One flat token sequence as the concatenation of grids, each in raster order.

    Args:
        grids: `(n,)`, `(h, w)` or `(t, h, w)` each; a pyramid lists its scales, coarse to fine.
        codebook_size: entries of the codebook, a tuple for factorised codes, None for latents.
        dim: channels of one token's vector.
    Raises: ValueError on an empty list, a non-positive side or size.
    """

    grids: tuple[Grid, ...]
    codebook_size: int | tuple[int, ...] | None
    dim: int

    def __post_init__(self) -> None:
        object.__setattr__(self, "grids", tuple(tuple(int(s) for s in g) for g in self.grids))
        if not self.grids or any(len(g) not in (1, 2, 3) or min(g) < 1 for g in self.grids):
            raise ValueError(
                f"grids must be a non-empty list of (n,), (h, w) or (t, h, w) with positive sides; got {self.grids}"
            )
        if isinstance(self.codebook_size, list):
            object.__setattr__(self, "codebook_size", tuple(self.codebook_size))
        sizes = self.codebook_size if isinstance(self.codebook_size, tuple) else (self.codebook_size,)
        if not sizes or any(s is not None and s < 1 for s in sizes) or self.dim < 1:
            raise ValueError(f"codebook_size and dim must be positive; got {self.codebook_size} and {self.dim}")

    @cached_property
    def sizes(self) -> tuple[int, ...]:
        """Tokens of each grid."""
        return tuple(prod(g) for g in self.grids)

    @cached_property
    def length(self) -> int:
        """Tokens of the whole sequence, L."""
        return sum(self.sizes)

    @cached_property
    def slices(self) -> tuple[slice, ...]:
        """Where each grid lies in the flat sequence."""
        ends = [sum(self.sizes[: i + 1]) for i in range(len(self.sizes))]
        return tuple(slice(e - s, e) for e, s in zip(ends, self.sizes, strict=True))

    def split(self, tokens: Tensor) -> list[Tensor]:
        """(B, L, ...) -> one (B, n_k, ...) view a grid. Raises ValueError on another length."""
        if tokens.shape[1] != self.length:
            raise ValueError(f"got {tokens.shape[1]} tokens; this layout has {self.length} ({self.describe()})")
        return [tokens[:, s] for s in self.slices]

    def describe(self) -> str:
        grids = "+".join("x".join(map(str, g)) for g in self.grids)
        return f"grids {grids}, codebook {self.codebook_size}, dim {self.dim}"

    def to_dict(self) -> dict[str, Any]:
        return {"grids": [list(g) for g in self.grids], "codebook_size": self.codebook_size, "dim": self.dim}

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Self:
        size = data["codebook_size"]
        return cls(tuple(tuple(g) for g in data["grids"]), tuple(size) if isinstance(size, list) else size, data["dim"])

    def fingerprint(self) -> str:
        """16 hex digits that change whenever the layout does."""
        return hashlib.sha256(json.dumps(self.to_dict()).encode()).hexdigest()[:16]

    def require(self, other: TokenLayout, mine: str, theirs: str) -> None:
        """Raise ValueError, showing both sides, unless the two layouts are the same."""
        if self != other:
            raise ValueError(
                f"{mine} and {theirs} do not fit together: {mine} has {self.describe()}; "
                f"{theirs} has {other.describe()}. Choose parts made for each other."
            )


def square_grids(scales: Sequence[int | Sequence[int]]) -> tuple[Grid, ...]:
    """A list of scales, each a side or an (h, w) pair, as grids: `[1, 2, (2, 3)]` -> `((1,1),(2,2),(2,3))`."""
    return tuple((int(s), int(s)) if isinstance(s, int) else tuple(int(v) for v in s) for s in scales)


def grids_for(trained: Sequence[Grid], finest: tuple[int, int]) -> tuple[Grid, ...]:
    """Scales for another finest grid (h, w): each side in the proportion of the finest ones, rounded, at least 1.

    The first scale stays as it is. With about the trained area every scale then has about the trained number of tokens.
    """
    height, width = trained[-1]
    scaled = [(max(1, round(h * finest[0] / height)), max(1, round(w * finest[1] / width))) for h, w in trained]
    return (tuple(trained[0]), *scaled[1:]) if len(trained) > 1 else (finest,)
