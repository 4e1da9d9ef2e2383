"""How often a quantiser uses each code: counted over all processes, kept as a moving average."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Self

import torch
import torch.distributed as dist
from torch import Tensor, nn


class CodeUsage(nn.Module):
    """A quantiser's base: counts codes by scale, and stays float32 whatever the module is cast to.

    Args: scales: K, sequences counted apart.   codebook_size: V.
    """

    ema_vocab_hit_SV: Tensor  # K V: moving average of how often each scale uses each code

    def __init__(self, scales: int, codebook_size: int) -> None:
        super().__init__()
        self.register_buffer("ema_vocab_hit_SV", torch.zeros(scales, codebook_size))
        self.records = 0
        self.defer_usage = False  # True: forward only adds up; `commit_usage` closes the step
        self.pending: Tensor | None = None  # K V

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """Move with the module, but stay float32: sums over scales and nearest codes need it."""

        def keep_dtype(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            return moved if moved.dtype == tensor.dtype else tensor.to(moved.device)

        return super()._apply(keep_dtype, recurse)

    @torch.no_grad()
    def record_usage(self, ids: Sequence[Tensor]) -> None:
        """Moving average of how often each code is used at each scale, over all processes."""
        size = self.ema_vocab_hit_SV.shape[1]
        hits = torch.stack([torch.bincount(i.flatten(), minlength=size) for i in ids]).float()
        self.pending = hits if self.pending is None else self.pending + hits
        if not self.defer_usage:
            self.commit_usage()

    @torch.no_grad()
    def commit_usage(self) -> None:
        """Take what was counted since the last time, over all processes, into the moving average."""
        hits, self.pending = self.pending, None
        if hits is None:
            return
        if dist.is_available() and dist.is_initialized():
            dist.all_reduce(hits)
        decay = 0.0 if self.records == 0 else 0.9 if self.records < 100 else 0.99
        self.ema_vocab_hit_SV.lerp_(hits, 1 - decay)
        self.records += 1
