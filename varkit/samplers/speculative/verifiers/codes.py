"""Nearest entries of a codebook, and verifiers that read them."""

from __future__ import annotations

from typing import Self

import torch
from torch import Tensor


def nearest_codes(codebook: Tensor, k: int, chunk: int = 1024) -> Tensor:
    """The `k` nearest other entries of each, by Euclidean distance, nearest first, the lower id first in ties.

    It takes a while for a large codebook: keep the table. Of codes that are compared by direction, pass unit vectors.

    Args: codebook: (V, C).   k: below V.   chunk: rows at a time; each needs V distances.
    Returns: (V, k) int64.   Raises: ValueError where there are not that many others.
    Source: jadohu/LANTERN: models/ea_model_llamagen.py, which stores all V - 1.
    """
    size = len(codebook)
    if codebook.dim() != 2 or not 0 <= k < size:
        raise ValueError(
            f"of a codebook (V, C), k must be from 0 to V - 1; got k {k} and shape {tuple(codebook.shape)}"
        )
    rows = []
    for start in range(0, size, chunk):
        part = codebook[start : start + chunk].float()
        # Not by products of matrices: rounding would tell equal entries apart.
        far = torch.cdist(part, codebook.float(), compute_mode="donot_use_mm_for_euclid_dist")
        own = torch.arange(start, start + len(part), device=far.device)
        far[own - start, own] = torch.inf
        rows.append(far.sort(dim=-1, stable=True).indices[:, :k])
    return torch.cat(rows)


class OverCodes:
    """For a verifier that knows neighbours: `use_codebook` or `use_neighbours` before the first step."""

    k: int
    _extra = 0
    """Columns that it reads beyond k."""
    _table: Tensor | None = None
    _first = 0

    def use_codebook(self, codebook: Tensor, first: int = 0) -> Self:
        """Args: codebook: (V', C).   first: the token that is entry 0; tokens outside have no neighbours."""
        if self.k:
            self.use_neighbours(nearest_codes(codebook, min(self.k + self._extra, len(codebook) - 1)), first)
        return self

    def use_neighbours(self, table: Tensor, first: int = 0) -> Self:
        """Args: table: (V', k or more) of `nearest_codes`.   first: as in `use_codebook`."""
        if table.dim() != 2 or table.shape[1] < min(self.k, len(table) - 1):
            raise ValueError(
                f"a table of {self.k} neighbours is needed, (V, {self.k}); got shape {tuple(table.shape)}. "
                f"Make one with nearest_codes(codebook, {self.k})."
            )
        self._table, self._first = table[:, : self.k + self._extra].to(torch.int64), first
        return self

    def table(self, like: Tensor) -> Tensor:
        """(V', k) on the device of the laws `like` (B, V).

        Raises: ValueError before there is one, and where it is of a larger vocabulary.
        """
        if self._table is None:
            raise ValueError(
                f"{type(self).__name__} moves mass between neighbours in the codebook: give it one with "
                "use_codebook(tokenizer.codebook), or k=0"
            )
        if self._first + len(self._table) > like.shape[1]:
            raise ValueError(
                f"the codebook has entries {self._first} to {self._first + len(self._table) - 1}, the model's law "
                f"{like.shape[1]} tokens: give the codebook of the tokenizer that the model was trained on"
            )
        if self._table.device != like.device:
            self._table = self._table.to(like.device)
        return self._table
