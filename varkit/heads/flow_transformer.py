"""A transformer as the velocity of a flow, over the tokens of one scale: the head of FlowAR (arXiv 2412.15205).

Source: FlowAR: models/flowmodel.py (21835c0). What differs: several scales may lie side by side, each at its own time,
so that training takes one pass.

Shapes: R rows, n tokens, S scales, D width of the vectors it is conditioned on, W width, C latent channels.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from varkit.layers.llama import RMSNorm, Rotary
from varkit.layers.modulated import (
    EPS,
    Attention,
    GatedMLP,
    ModulatedBlock,
    TimeEmbedding,
    heads_of,
    modulate,
)


class CrossAttention(nn.Module):
    """Each token of the flow reads the vectors of the whole scale."""

    def __init__(self, dim: int, context: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.q = nn.Linear(dim, dim, bias=False)
        self.kv = nn.Linear(context, 2 * dim, bias=False)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor, context: Tensor, rotary: Rotary, where: Tensor, mask: Tensor | None) -> Tensor:
        q = rotary(self.q(x).unflatten(-1, (self.num_heads, -1)), where)  # R n H W/H
        k, v = self.kv(context).unflatten(-1, (2, self.num_heads, -1)).unbind(2)
        q, k, v = q.transpose(1, 2), rotary(k, where).transpose(1, 2), v.transpose(1, 2)
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        return self.proj(out.transpose(1, 2).flatten(2))


class CrossBlock(nn.Module):
    """Attention modulated by the time, cross-attention to the vectors, MLP modulated by both ("Attn-CrossAttn-MLP")."""

    def __init__(self, dim: int, context: int, num_heads: int) -> None:
        super().__init__()
        self.attn = Attention(dim, num_heads, bias=False, dropout=0.0, attention_dropout=0.0)
        self.crossattn = CrossAttention(dim, context, num_heads)
        self.norm2_1, self.norm2_2 = RMSNorm(dim, EPS), RMSNorm(context, EPS)
        self.mlp = GatedMLP(dim)
        self.ada_lin_attn, self.ada_lin_mlp = nn.Linear(dim, 3 * dim), nn.Linear(dim, 3 * dim)

    def forward(
        self,
        x: Tensor,
        cond: Tensor,
        rotary: Rotary,
        where: Tensor,
        mask: Tensor | None,
        time: Tensor,
        z: Tensor,
        group: Tensor | None,
    ) -> Tensor:
        """cond: (R, n, W), time and vectors.   time: (R, S, W), of token i number group[i].   z: (R, n, D)."""
        three = self.ada_lin_attn(F.silu(time))
        gamma, scale, shift = (three if group is None else three[:, group]).chunk(3, -1)
        x = x + gamma * self.attn(modulate(x, scale, shift), rotary, where, mask)
        x = x + self.crossattn(self.norm2_1(x), self.norm2_2(z), rotary, where, mask)
        gamma, scale, shift = self.ada_lin_mlp(F.silu(cond)).chunk(3, -1)
        return x + gamma * self.mlp(modulate(x, scale, shift))


class FinalLayer(nn.Module):
    def __init__(self, dim: int, channels: int) -> None:
        super().__init__()
        self.linear = nn.Linear(dim, channels)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(dim, 2 * dim))

    def forward(self, x: Tensor, cond: Tensor) -> Tensor:
        shift, scale = self.adaLN_modulation(cond).chunk(2, -1)
        return self.linear(modulate(x, scale, shift))


class FlowHead(nn.Module):
    """The velocity of the tokens of one scale, or of several side by side: a transformer with heads of 64 channels.

    Args:
        channels, context, width: C, D, W.   depth: of the blocks.
        cross: blocks with cross-attention (the released L and H), else attention and MLP alone (S).
        places: (L, 2), row and column of each token.
        outputs: numbers predicted a token; None is C, a velocity.
    Raises: ValueError when the width is no multiple of 64.
    """

    _gradient_checkpointing_func: Callable[..., Tensor]  # diffusers sets it

    def __init__(
        self,
        channels: int,
        context: int,
        width: int,
        depth: int,
        cross: bool,
        places: Tensor,
        outputs: int | None = None,
    ) -> None:
        super().__init__()
        if width % 64:
            raise ValueError(f"the flow head has heads of 64 channels: its width must be a multiple of it; got {width}")
        heads = width // 64
        self.gradient_checkpointing = False
        self.rotary = Rotary(places, heads_of(width, heads), prefix=0)
        self.time_embed = TimeEmbedding(width)
        self.cond_embed = nn.Linear(context, width)
        self.input_proj = nn.Linear(channels, width)
        self.res_blocks = nn.ModuleList(
            CrossBlock(width, context, heads) if cross else ModulatedBlock(width, heads, bias=False)
            for _ in range(depth)
        )
        self.final_layer = FinalLayer(width, channels if outputs is None else outputs)

    def forward(self, x: Tensor, t: Tensor, z: Tensor, where: Tensor, group: Tensor | None = None) -> Tensor:
        """States (R, n, C) -> velocity (R, n, C) float32, or other `outputs`.

        Args:
            t: (R,), of one scale; or (R, S) with `group` (n,): the scale of each token, which sees its own alone.
            z: (R, n, D), the vectors of the same tokens.   where: (n,), their positions in the layout.
        """
        time = self.time_embed(t[:, None] if group is None else t)  # R S W
        cond = self.cond_embed(z) + (time if group is None else time[:, group])
        mask = None if group is None else group[:, None] == group[None]
        x = self.input_proj(x.to(self.input_proj.weight.dtype))
        for block in self.res_blocks:
            more = (time, z, group) if isinstance(block, CrossBlock) else ()
            given = (x, cond, self.rotary, where, mask, *more)
            checkpointed = self.gradient_checkpointing and torch.is_grad_enabled()
            x = self._gradient_checkpointing_func(block, *given) if checkpointed else block(*given)
        return self.final_layer(x, cond).float()
