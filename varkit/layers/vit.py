"""The block of timm's ViT, under its parameter names: norms before the branches, attention of all to all."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from varkit.layers.mlp import FeedForward


class Attention(nn.Module):
    """Multi-head attention of all entries to all. Args: bias: of queries, keys and values."""

    def __init__(self, dim: int, num_heads: int, bias: bool, dropout: float, attention_dropout: float) -> None:
        super().__init__()
        self.num_heads, self.attention_dropout = num_heads, attention_dropout
        self.qkv = nn.Linear(dim, 3 * dim, bias=bias)
        self.proj = nn.Linear(dim, dim)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)  # B H S D each
        dropout = self.attention_dropout if self.training else 0.0
        out = F.scaled_dot_product_attention(q, k, v, dropout_p=dropout)
        return self.dropout(self.proj(out.transpose(1, 2).flatten(2)))


class Block(nn.Module):
    """(B, S, D) -> (B, S, D)."""

    def __init__(
        self,
        dim: int,
        num_heads: int,
        hidden: int,
        dropout: float,
        attention_dropout: float,
        eps: float,
        qkv_bias: bool = True,
    ) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps)
        self.attn = Attention(dim, num_heads, qkv_bias, dropout, attention_dropout)
        self.norm2 = nn.LayerNorm(dim, eps)
        self.mlp = FeedForward(dim, hidden, dropout)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))
