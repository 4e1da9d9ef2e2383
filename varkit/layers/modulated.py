"""The modulated transformer of xAR and FlowAR: blocks whose norms are scaled, shifted and gated by a condition.

Source: OliverRensu/xAR: models/xar.py (121e9c9) and FlowAR's models/flowar.py, models/flowmodel.py (21835c0), whose
parameter names these are. What differs: masks are of bool, which no half precision breaks; keys and values live in a
cache that is passed in; places in the grid come as a table, so that any grid and any order will do.

Shapes: B batch, n tokens, D width, C width of the condition.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from varkit.entities import group_of
from varkit.layers.cache import KVCache
from varkit.layers.llama import RMSNorm, Rotary, turn
from varkit.layout import Grid

EPS = 1e-6

TRUNK_LORA = (
    "trunk.*_blocks.*.attn.qkv",
    "trunk.*_blocks.*.attn.proj",
    "trunk.*_blocks.*.mlp.fc1_g",
    "trunk.*_blocks.*.mlp.fc1_x",
    "trunk.*_blocks.*.mlp.fc2",
)
"""What LoRA adapts in a model whose `trunk` is a `Trunk`."""


def rms(x: Tensor) -> Tensor:
    """Divided by the root mean square, in float32."""
    return F.rms_norm(x.float(), x.shape[-1:], eps=EPS).type_as(x)


def modulate(x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    return torch.addcmul(shift, rms(x), 1 + scale)


def heads_of(dim: int, num_heads: int) -> int:
    """The width of a head. Raises ValueError unless it is a multiple of 4, as rows and columns of pairs need."""
    if dim % num_heads or dim // num_heads % 4:
        raise ValueError(f"a width of {dim} cannot be shared by {num_heads} heads of a multiple of 4 channels each")
    return dim // num_heads


def block_mask(sizes: Sequence[int]) -> Tensor:
    """(L, L) bool: each token sees its own group and all groups before it. Args: sizes: of the groups, in order."""
    group = group_of(sizes)
    return group[:, None] >= group[None]


def places(grids: Sequence[Grid]) -> Tensor:
    """(L, 2) float32, row and column of each token, in steps of the last grid: the grids lie over one another.

    Of grids (t, h, w) of clips (L, 3), the frame first.
    """
    whole = grids[-1]
    steps = [[torch.arange(n) * (last / n) for n, last in zip(grid, whole, strict=True)] for grid in grids]
    return torch.cat([torch.cartesian_prod(*sides) for sides in steps])


class TimeEmbedding(nn.Module):
    """Times (...) in [0, 1] -> (..., D).

    The network reads whole thousandths: a sinusoid of trunc(1000 t), t in float32 first.
    """

    def __init__(self, dim: int, features: int = 256) -> None:
        super().__init__()
        self.features = features
        self.mlp: Any = nn.Sequential(nn.Linear(features, dim), nn.SiLU(), nn.Linear(dim, dim))

    @staticmethod
    def index(t: Tensor) -> Tensor:
        """(...) -> (...) int64 in [0, 1000]."""
        return (t.float() * 1000).long()

    def forward(self, t: Tensor) -> Tensor:
        half = self.features // 2
        frequency = 10000 ** -(torch.arange(half, device=t.device) / half)
        angles = self.index(t)[..., None] * frequency
        table = torch.cat([angles.cos(), angles.sin()], -1)
        return self.mlp(table.to(self.mlp[0].weight.dtype))


class GatedMLP(nn.Module):
    """fc2(gelu(fc1_g x) * fc1_x x), two thirds of four times as wide inside."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        hidden = int(8 * dim / 3)
        self.fc1_g, self.fc1_x = nn.Linear(dim, hidden), nn.Linear(dim, hidden)
        self.fc2 = nn.Linear(hidden, dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1_g(x)) * self.fc1_x(x))


class Attention(nn.Module):
    def __init__(self, dim: int, num_heads: int, bias: bool, dropout: float, attention_dropout: float) -> None:
        super().__init__()
        self.num_heads, self.attention_dropout = num_heads, attention_dropout
        self.qkv = nn.Linear(dim, 3 * dim, bias=bias)
        self.proj = nn.Linear(dim, dim)
        self.dropout = nn.Dropout(dropout)

    def forward(
        self,
        x: Tensor,
        by: Tensor,
        mask: Tensor | None = None,
        cache: KVCache | None = None,
        layer: int = 0,
    ) -> Tensor:
        """by: what `Rotary.at` gave.   mask: bool, True is seen; None is everything."""
        qkv = self.qkv(x).unflatten(-1, (3 * self.num_heads, -1)).transpose(1, 2)  # B 3H n D/H
        qk, v = qkv.split((2 * self.num_heads, self.num_heads), 1)
        q, k = turn(qk.transpose(1, 2), by).transpose(1, 2).chunk(2, 1)
        if cache is not None:
            k, v = cache.extend(layer, k, v)
        dropout = self.attention_dropout if self.training else 0.0
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=dropout)
        return self.dropout(self.proj(out.transpose(1, 2).flatten(2)))


class ModulatedBlock(nn.Module):
    """Attention and MLP, each scaled, shifted and gated by the condition."""

    def __init__(
        self, dim: int, num_heads: int, *, bias: bool = True, dropout: float = 0.0, attention_dropout: float = 0.0
    ) -> None:
        super().__init__()
        self.attn = Attention(dim, num_heads, bias, dropout, attention_dropout)
        self.mlp = GatedMLP(dim)
        self.ada_lin = nn.Sequential(nn.SiLU(), nn.Linear(dim, 6 * dim))

    def forward(
        self,
        x: Tensor,
        cond: Tensor,
        by: Tensor,
        mask: Tensor | None = None,
        cache: KVCache | None = None,
        layer: int = 0,
        group: Tensor | None = None,
    ) -> Tensor:
        """x: (B, n, D).   by: see `Attention`.

        cond: (B, n, D), (B, 1, D) for all tokens, or (B, E, D) with `group` (n,): whose is whose.
        """
        six = self.ada_lin(cond)  # of E vectors, before they are spread over the tokens
        six = six if group is None else six[:, group]
        gamma1, gamma2, scale1, scale2, shift1, shift2 = six.chunk(6, -1)
        x = x + gamma1 * self.attn(modulate(x, scale1, shift1), by, mask, cache, layer)
        return x + gamma2 * self.mlp(modulate(x, scale2, shift2))


class Trunk(nn.Module):
    """Two stacks of modulated blocks, each with positions learned token by token in the order of prediction.

    Args: depths: of the two.   places: (L, 2), row and column of each token in the order of prediction, or (L, 3),
        frame first.
    """

    _gradient_checkpointing_func: Callable[..., Tensor]  # diffusers sets it

    def __init__(
        self,
        dim: int,
        depths: tuple[int, int],
        num_heads: int,
        places: Tensor,
        dropout: float,
        attention_dropout: float,
    ) -> None:
        super().__init__()
        self.rotary = Rotary(places, heads_of(dim, num_heads), prefix=0)
        self.num_heads, self.depth = num_heads, sum(depths)
        self.gradient_checkpointing = False
        self.encoder_pos_embed_learned, self.decoder_pos_embed_learned = (
            nn.Parameter(torch.empty(1, len(places), dim)) for _ in range(2)
        )
        self.encoder_blocks, self.decoder_blocks = (
            nn.ModuleList(
                ModulatedBlock(dim, num_heads, dropout=dropout, attention_dropout=attention_dropout)
                for _ in range(depth)
            )
            for depth in depths
        )
        self.z_proj_ln, self.encoder_norm, self.decoder_norm = (RMSNorm(dim, EPS) for _ in range(3))
        self.decoder_embed = nn.Linear(dim, dim)

    def forward(
        self,
        x: Tensor,
        cond: Tensor,
        where: Tensor,
        mask: Tensor | None = None,
        cache: KVCache | None = None,
        group: Tensor | None = None,
        hidden_layer: int | None = None,
        added: Mapping[int, Tensor] | None = None,
    ) -> tuple[Tensor, Tensor]:
        """The output and what block `hidden_layer`, from 1 over both stacks, gives: (B, n, D) each.

        Args:
            x: (B, n, D).   cond, mask, cache, group: see `ModulatedBlock`.   where: (n,), turns of the tokens.
            added: by block, counted from 0 over both stacks: (B, L, D) that is added to what it reads, of all turns.
        """
        hidden, layer, by = x, 0, self.rotary.at(where)
        x = self.z_proj_ln(x + self.encoder_pos_embed_learned[:, where])
        for stack in (self.encoder_blocks, self.decoder_blocks):
            if stack is self.decoder_blocks:
                x = self.decoder_embed(self.encoder_norm(x)) + self.decoder_pos_embed_learned[:, where]
            for block in stack:
                if added is not None and layer in added:
                    x = x + added[layer][:, where].to(x.dtype)
                given = (x, cond, by, mask, cache, layer, group)
                checkpointed = self.gradient_checkpointing and torch.is_grad_enabled()
                x = self._gradient_checkpointing_func(block, *given) if checkpointed else block(*given)
                layer += 1
                hidden = x if layer == hidden_layer else hidden
        return self.decoder_norm(x), hidden

    def new_cache(self, rows: int, like: Tensor) -> KVCache:
        """For all tokens of `rows` images, of the dtype and on the device of `like`."""
        dim = self.decoder_embed.in_features
        return KVCache(
            layers=self.depth,
            rows=rows,
            heads=self.num_heads,
            length=self.encoder_pos_embed_learned.shape[1],
            head_dim=dim // self.num_heads,
            dtype=like.dtype,
            device=like.device,
        )


@torch.no_grad()
def init_weights(model: nn.Module) -> None:
    """Linear weights uniform (Xavier), those of the modulation too; biases zero; norms one; the rest normal, std 0.02.

    Source: as the releases, which zero nothing in the end.
    """
    for module in model.modules():
        if isinstance(module, nn.Linear):
            nn.init.xavier_uniform_(module.weight)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
        elif isinstance(module, nn.Embedding):
            nn.init.normal_(module.weight, std=0.02)
    for name, parameter in model.named_parameters():
        if "pos_embed_learned" in name:
            nn.init.normal_(parameter, std=0.02)
