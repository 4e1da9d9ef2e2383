"""LARP's prior: a small GPT over a tokenizer's code vectors, trained along with the tokenizer so that its tokens become
easy to predict one after another (Wang et al., arXiv 2410.21264, section 3.3).

Source: hywang66/LARP: models/gptc.py (8aaed63), whose parameter names these are. What differs: random numbers are keyed
by clip and position; attention dropout is for training alone, unless `official_quirks`.

Shapes: B batch, n tokens, C channels of a code, D width, V codes.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

EPS = 1e-5


@dataclass
class PriorRounds:
    """logits: (2, B, n - 1, V) float32, what each round says of tokens 1 .. n - 1.   inputs: (B, n, C) of the last
    round.   loss: cross entropy, mean over both."""

    logits: Tensor
    inputs: Tensor
    loss: Tensor


class PriorAttention(nn.Module):
    """Causal. Args: dropout_always: attention dropout in eval mode too, as released."""

    def __init__(self, dim: int, num_heads: int, dropout: float, dropout_always: bool) -> None:
        super().__init__()
        self.num_heads, self.rate, self.dropout_always = num_heads, dropout, dropout_always
        self.key, self.query, self.value = nn.Linear(dim, dim), nn.Linear(dim, dim), nn.Linear(dim, dim)
        self.proj = nn.Linear(dim, dim)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (
            part(x).unflatten(-1, (self.num_heads, -1)).transpose(1, 2) for part in (self.query, self.key, self.value)
        )
        rate = self.rate if self.training or self.dropout_always else 0.0
        out = F.scaled_dot_product_attention(q, k, v, dropout_p=rate, is_causal=True)
        return self.dropout(self.proj(out.transpose(1, 2).flatten(2)))


class PriorBlock(nn.Module):
    def __init__(self, dim: int, num_heads: int, dropout: float, dropout_always: bool) -> None:
        super().__init__()
        self.ln1, self.ln2 = nn.LayerNorm(dim, EPS), nn.LayerNorm(dim, EPS)
        self.attn = PriorAttention(dim, num_heads, dropout, dropout_always)
        self.mlp = nn.Sequential(nn.Linear(dim, 4 * dim), nn.GELU(), nn.Linear(4 * dim, dim), nn.Dropout(dropout))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.ln1(x))
        return x + self.mlp(self.ln2(x))


class LARPPrior(nn.Module):
    """Reads the code vectors of tokens 0 .. n - 2, says in which direction each next one lies.

    Args:
        dim: C.   width, depth, num_heads: of the transformer.   length: tokens that it has positions for.
        temperature: by which cosines are divided to become logits.
        official_quirks: attention dropout in eval mode too.
    """

    def __init__(
        self,
        dim: int,
        width: int,
        depth: int,
        num_heads: int,
        length: int,
        dropout: float,
        temperature: float,
        official_quirks: bool,
    ) -> None:
        super().__init__()
        self.temperature = temperature
        self.pos_emb = nn.Parameter(torch.zeros(1, length, width))
        self.input_proj = nn.Linear(dim, width)
        self.drop = nn.Dropout(dropout)
        self.blocks: Any = nn.ModuleList(PriorBlock(width, num_heads, dropout, official_quirks) for _ in range(depth))
        self.ln_f = nn.LayerNorm(width, EPS)
        self.head = nn.Linear(width, dim)
        self.init_weights()

    @torch.no_grad()
    def init_weights(self) -> None:
        """Weights normal of std 0.02, biases 0."""
        nn.init.normal_(self.pos_emb, std=0.02)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, std=0.02)
                nn.init.zeros_(module.bias)

    def forward(self, vectors: Tensor) -> Tensor:
        """(B, n, C) -> (B, n - 1, C) float32 unit vectors: where tokens 1 .. n - 1 are expected."""
        vectors = vectors[:, :-1].to(self.pos_emb.dtype)
        x = self.drop(self.input_proj(vectors) + self.pos_emb[:, : vectors.shape[1]])
        for block in self.blocks:
            x = block(x)
        return F.normalize(self.head(self.ln_f(x)).float(), dim=-1)

    def rounds(
        self, vectors: Tensor, ids: Tensor, codes: Tensor, replaced: Tensor, draw: Callable[[Tensor], Tensor]
    ) -> PriorRounds:
        """Two rounds of scheduled sampling: the first reads what is true, the second what the first would have drawn at
        the places `replaced`. Gradients reach `vectors` where they are read, never labels or codes.

        Args:
            vectors: (B, n, C) unit vectors of `ids` (B, n).   codes: (V, C) unit vectors.
            replaced: (B, n - 1) bool, of tokens 1 .. n - 1.   draw: logits (B, n - 1, V) -> ids (B, n - 1).
        """
        codes = codes.detach()

        def logits_of(inputs: Tensor) -> Tensor:
            expected = self(inputs)
            with torch.autocast(expected.device.type, enabled=False):
                return expected @ codes.T / self.temperature  # B n-1 V

        first = logits_of(vectors)
        own = codes[draw(first.detach())]  # B n-1 C
        mixed = torch.where(replaced[..., None], own.to(vectors.dtype), vectors[:, 1:])
        inputs = torch.cat([vectors[:, :1], mixed], 1)
        logits = torch.stack([first, logits_of(inputs)])
        target = ids[:, 1:].expand(2, -1, -1)
        return PriorRounds(logits, inputs, F.cross_entropy(logits.flatten(0, 2), target.flatten()))


def own_token_ratio(step: int, max_steps: int, most: float = 0.5, peak: float = 0.3) -> float:
    """How often the second round reads the prior's own token: rises linearly to `most` at the share `peak` of a run."""
    return most * min(step / (max_steps * peak), 1.0)
