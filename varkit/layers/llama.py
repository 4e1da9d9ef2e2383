"""The Llama blocks of image generators: RMS norms, SwiGLU, rotary tables of a grid, no biases.

Source: FoundationVision/LlamaGen: autoregressive/models/gpt.py (ce98ec4), whose parameter names these are.

Shapes: B batch, C width, D head width, L image tokens, T prefix tokens.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from varkit.layers.cache import CacheSlots, KVCache
from varkit.layers.drop_path import DropPath
from varkit.layout import Grid


def rotary_frequencies(head_dim: int, base: float = 10000.0) -> Tensor:
    """(D / 4,) float32, of the pairs of one axis."""
    half = head_dim // 2
    return 1.0 / base ** (torch.arange(0, half, 2)[: half // 2].float() / half)


class Rotary(nn.Module):
    """Rotates queries and keys by their place in the grid: half of each head by the row, half by the column; of clips
    a third each by the frame (and what is left over), the row and the column.

    Adjacent numbers are a pair. The first `prefix` positions have cosine and sine 0, so they become zero vectors.
    Each position has `repeats` entries of the sequence, one after the other.

    Args: grid: (h, w), in raster order; or the places themselves, (L, 2) rows and columns, whole or not, or (L, 3)
        frames, rows and columns.
    """

    cos: Tensor  # T+L 1 D/2 1
    sin: Tensor  # T+L 1 D/2 2, the first of a pair negated

    def __init__(
        self, grid: Grid | Tensor, head_dim: int, base: float = 10000.0, prefix: int = 1, repeats: int = 1
    ) -> None:
        super().__init__()
        if not isinstance(grid, Tensor):
            height, width = grid
            grid = torch.stack([torch.arange(height).repeat_interleave(width), torch.arange(width).repeat(height)], 1)
        axes, pairs = grid.shape[1], head_dim // 2
        shares = [pairs // axes + (pairs % axes if axis == 0 else 0) for axis in range(axes)]
        each = [rotary_frequencies(4 * share, base) for share in shares]
        angles = torch.cat([grid[:, i, None] * each[i] for i in range(axes)], 1)  # L D/2
        table = F.pad(torch.stack([angles.cos(), angles.sin()], -1), (0, 0, 0, 0, prefix, 0))
        table = table.repeat_interleave(repeats, 0)
        self.register_buffer("cos", table[:, None, :, :1].clone(), persistent=False)
        sin = table[:, None, :, 1:] * torch.tensor([-1.0, 1.0])
        self.register_buffer("sin", sin, persistent=False)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """Move with the module, but stay float32."""

        def keep_dtype(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            return moved if moved.dtype == tensor.dtype else tensor.to(moved.device)

        return super()._apply(keep_dtype, recurse)

    @property
    def table(self) -> Tensor:
        """(T + L, D / 2, 2): cosine and sine."""
        return torch.cat([self.cos, self.sin[..., 1:]], -1)[:, 0]

    def forward(self, x: Tensor, start: int | Tensor = 0) -> Tensor:
        """(B, n, heads, D) of sequence positions `start` onward, or of the positions (n,) given; float32 inside."""
        pairs = x.float().unflatten(-1, (-1, 2))
        where = start if isinstance(start, Tensor) else slice(start, start + x.shape[1])
        turned = torch.addcmul(pairs * self.cos[where], pairs.flip(-1), self.sin[where])
        return turned.flatten(-2).type_as(x)

    def at(self, where: Tensor) -> Tensor:
        """(n, 1, D / 2, 2), cosine and sine of the positions (n,), for `turn`: looked up once for all layers."""
        return torch.cat([self.cos[where], self.sin[where, ..., 1:]], -1)


def turn(x: Tensor, by: Tensor) -> Tensor:
    """As `Rotary.forward`, (B, n, heads, D) turned by what `Rotary.at` gave.

    Pairs are multiplied as complex numbers: one pass over memory, where `forward`, not compiled, takes several.
    """
    pairs = x.float().unflatten(-1, (-1, 2))
    if torch.compiler.is_compiling():  # fuses real numbers, not complex ones
        (a, b), (cos, sin) = pairs.unbind(-1), by.unbind(-1)
        turned = torch.stack([a * cos - b * sin, b * cos + a * sin], -1)
    else:
        turned = torch.view_as_real(torch.view_as_complex(pairs) * torch.view_as_complex(by))
    return turned.flatten(-2).type_as(x)


Rotate = Callable[[Tensor, int | Tensor], Tensor]
"""(B, n, heads, D) and where in the sequence they stand -> the same, turned: a `Rotary`, or what stands for one."""


class RMSNorm(nn.Module):
    """Divides by the root mean square in float32, then multiplies by a learned weight."""

    def __init__(self, dim: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x.float(), x.shape[-1:], eps=self.eps).type_as(x) * self.weight


class Attention(nn.Module):
    """Multi-head attention without biases; G < H key-value heads serve H / G queries each."""

    def __init__(
        self,
        dim: int,
        num_heads: int,
        kv_heads: int,
        dropout: float,
        attention_dropout: float,
        causal: bool = True,
    ) -> None:
        super().__init__()
        self.num_heads, self.kv_heads, self.attention_dropout = num_heads, kv_heads, attention_dropout
        self.causal = causal
        head_dim = dim // num_heads
        self.wqkv = nn.Linear(dim, (num_heads + 2 * kv_heads) * head_dim, bias=False)
        self.wo = nn.Linear(dim, dim, bias=False)
        self.dropout = nn.Dropout(dropout)

    def forward(
        self,
        x: Tensor,
        rotary: Rotate,
        mask: Tensor | None,
        cache: KVCache | CacheSlots | None,
        layer: int,
        start: int | Tensor,
    ) -> Tensor:
        """mask: bool, True is seen; None is everything, or, if this attention is causal, what is not later: where
        there is one query, that is everything too."""
        heads = self.num_heads + self.kv_heads
        qkv = self.wqkv(x).unflatten(-1, (heads + self.kv_heads, -1))  # B n H+2G D
        qk, v = rotary(qkv[:, :, :heads], start).transpose(1, 2), qkv[:, :, heads:].transpose(1, 2)  # B . n D
        q, k = qk[:, : self.num_heads], qk[:, self.num_heads :]
        if cache is not None:
            k, v = cache.extend(layer, k, v)
        out = F.scaled_dot_product_attention(
            q,
            k,
            v,
            attn_mask=mask,
            dropout_p=self.attention_dropout if self.training else 0.0,
            is_causal=self.causal and mask is None and x.shape[1] > 1,
            enable_gqa=self.kv_heads < self.num_heads,
        )
        return self.dropout(self.wo(out.transpose(1, 2).flatten(2)))


class FeedForward(nn.Module):
    """SwiGLU: w2(silu(w1 x) * w3 x)."""

    def __init__(self, dim: int, hidden: int, dropout: float) -> None:
        super().__init__()
        self.w1 = nn.Linear(dim, hidden, bias=False)
        self.w3 = nn.Linear(dim, hidden, bias=False)
        self.w2 = nn.Linear(hidden, dim, bias=False)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        return self.dropout(self.w2(F.silu(self.w1(x)) * self.w3(x)))


class Block(nn.Module):
    def __init__(
        self,
        dim: int,
        num_heads: int,
        kv_heads: int,
        hidden: int,
        *,
        norm_eps: float,
        dropout: float,
        attention_dropout: float,
        ffn_dropout: float,
        drop_path: float,
        causal: bool = True,
    ) -> None:
        super().__init__()
        self.attention = Attention(dim, num_heads, kv_heads, dropout, attention_dropout, causal)
        self.feed_forward = FeedForward(dim, hidden, ffn_dropout)
        self.attention_norm = RMSNorm(dim, norm_eps)
        self.ffn_norm = RMSNorm(dim, norm_eps)
        self.drop_path = DropPath(drop_path)

    def forward(
        self,
        x: Tensor,
        rotary: Rotate,
        mask: Tensor | None = None,
        cache: KVCache | CacheSlots | None = None,
        layer: int = 0,
        start: int | Tensor = 0,
    ) -> Tensor:
        x = x + self.drop_path(self.attention(self.attention_norm(x), rotary, mask, cache, layer, start))
        return x + self.drop_path(self.feed_forward(self.ffn_norm(x)))


def feed_forward_size(dim: int, multiple: int = 256, multiplier: float | None = None) -> int:
    """The release's rule: two thirds of four times the width, times `multiplier`, up to the next multiple."""
    hidden = int(2 * 4 * dim / 3)
    return math.ceil((hidden if multiplier is None else int(multiplier * hidden)) / multiple) * multiple


def llama_blocks(
    depth: int,
    dim: int,
    num_heads: int,
    *,
    kv_heads: int | None = None,
    ffn_size: int | None = None,
    norm_eps: float,
    dropout: float,
    attention_dropout: float = 0.0,
    ffn_dropout: float,
    drop_path_rate: float = 0.0,
    causal: bool = True,
) -> nn.ModuleList:
    """A stack of `Block`s; the rate of drop path grows along it, from zero.

    Args: kv_heads: None is num_heads.   ffn_size: None is `feed_forward_size(dim)`.   drop_path_rate: of the last.
    """
    return nn.ModuleList(
        Block(
            dim,
            num_heads,
            kv_heads or num_heads,
            ffn_size or feed_forward_size(dim),
            norm_eps=norm_eps,
            dropout=dropout,
            attention_dropout=attention_dropout,
            ffn_dropout=ffn_dropout,
            drop_path=drop_path_rate * i / max(depth - 1, 1),
            causal=causal,
        )
        for i in range(depth)
    )


def causal(visible: Tensor) -> Tensor:
    """(B, n) bool -> (B, 1, n, n) bool: what is visible and not later; each sees itself, visible or not."""
    n = visible.shape[1]
    lower = torch.ones(n, n, dtype=torch.bool, device=visible.device).tril()
    itself = torch.eye(n, dtype=torch.bool, device=visible.device)
    return (lower & visible[:, None, None, :]) | itself
