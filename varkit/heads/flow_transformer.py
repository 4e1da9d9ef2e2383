"""A transformer as the velocity of a flow, over the tokens of one scale: the head of FlowAR (arXiv 2412.15205).

Source: FlowAR: models/flowmodel.py (21835c0). What differs: several scales may lie side by side, each at its own time,
so that training takes one pass.

Shapes: R rows, n tokens, S scales, D width of the vectors it is conditioned on, W width, C latent channels.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from varkit.layers.llama import RMSNorm, Rotary, turn
from varkit.layers.modulated import (
    EPS,
    Attention,
    GatedMLP,
    ModulatedBlock,
    TimeEmbedding,
    heads_of,
    modulate,
)

Memory = tuple[Tensor, Tensor]
"""Keys and values of the vectors, (R, H, n, W / H) each."""


class CrossAttention(nn.Module):
    """Each token of the flow reads the vectors of the whole scale."""

    def __init__(self, dim: int, context: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.q = nn.Linear(dim, dim, bias=False)
        self.kv = nn.Linear(context, 2 * dim, bias=False)
        self.proj = nn.Linear(dim, dim)

    def memory(self, context: Tensor, by: Tensor) -> Memory:
        k, v = self.kv(context).unflatten(-1, (2, self.num_heads, -1)).unbind(2)  # R n H W/H each
        return turn(k, by).transpose(1, 2), v.transpose(1, 2)

    def forward(self, x: Tensor, memory: Memory, by: Tensor, mask: Tensor | None) -> Tensor:
        q = turn(self.q(x).unflatten(-1, (self.num_heads, -1)), by).transpose(1, 2)
        out = F.scaled_dot_product_attention(q, *memory, attn_mask=mask)
        return self.proj(out.transpose(1, 2).flatten(2))


class CrossBlock(nn.Module):
    """Attention modulated by the time, cross-attention to the vectors, MLP modulated by both ("Attn-CrossAttn-MLP")."""

    sharded_methods = ("memory",)

    def __init__(self, dim: int, context: int, num_heads: int) -> None:
        super().__init__()
        self.attn = Attention(dim, num_heads, bias=False, dropout=0.0, attention_dropout=0.0)
        self.crossattn = CrossAttention(dim, context, num_heads)
        self.norm2_1, self.norm2_2 = RMSNorm(dim, EPS), RMSNorm(context, EPS)
        self.mlp = GatedMLP(dim)
        self.ada_lin_attn, self.ada_lin_mlp = nn.Linear(dim, 3 * dim), nn.Linear(dim, 3 * dim)

    def memory(self, z: Tensor, by: Tensor) -> Memory:
        """Of the vectors z (R, n, D), which no time changes."""
        return self.crossattn.memory(self.norm2_2(z), by)

    def forward(
        self,
        x: Tensor,
        cond: Tensor,
        by: Tensor,
        mask: Tensor | None,
        time: Tensor,
        z: Tensor,
        group: Tensor | None,
        memory: Memory | None = None,
    ) -> Tensor:
        """cond: (R, n, W), time and vectors.   by: see `Attention`.   time: (R, S, W), of token i number group[i].
        z: (R, n, D).   memory: what `memory` gives for them, where it is there already."""
        three = self.ada_lin_attn(F.silu(time))
        gamma, scale, shift = (three if group is None else three[:, group]).chunk(3, -1)
        x = x + gamma * self.attn(modulate(x, scale, shift), by, mask)
        x = x + self.crossattn(self.norm2_1(x), self.memory(z, by) if memory is None else memory, by, mask)
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


class Context(NamedTuple):
    """What a velocity takes from the vectors of its tokens, the same at all times."""

    cond: Tensor  # R n W
    by: Tensor  # of their places, see `Rotary.at`
    memories: list[Memory | None]  # of each block; None where it has none, or computes its own

    def rows(self, count: int) -> Context:
        """Those of the first rows."""
        memories = [None if m is None else (m[0][:count], m[1][:count]) for m in self.memories]
        return Context(self.cond[:count], self.by, memories)


class FlowHead(nn.Module):
    """The velocity of the tokens of one scale, or of several side by side: a transformer with heads of 64 channels.

    Args:
        channels, context, width: C, D, W.   depth: of the blocks.
        cross: blocks with cross-attention (the released L and H), else attention and MLP alone (S).
        places: (L, 2), row and column of each token, or (L, 3), frame first.
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

    def context(self, z: Tensor, where: Tensor) -> Context:
        """For many times of the same vectors: computed once. Args: see `forward`."""
        by = self.rotary.at(where)
        memories = [block.memory(z, by) if isinstance(block, CrossBlock) else None for block in self.res_blocks]
        return Context(self.cond_embed(z), by, memories)

    def forward(
        self,
        x: Tensor,
        t: Tensor,
        z: Tensor,
        where: Tensor,
        group: Tensor | None = None,
        context: Context | None = None,
    ) -> Tensor:
        """States (R, n, C) -> velocity (R, n, C) float32, or other `outputs`.

        Args:
            t: (R,), of one scale; or (R, S) with `group` (n,): the scale of each token, which sees its own alone.
            z: (R, n, D), the vectors of the same tokens.   where: (n,), their positions in the layout.
            context: what `context` gave for them.
        """
        if context is None:  # blocks compute their memories, so that checkpointing need not keep them
            context = Context(self.cond_embed(z), self.rotary.at(where), [None] * len(self.res_blocks))
        time = self.time_embed(t[:, None] if group is None else t)  # R S W
        cond = context.cond + (time if group is None else time[:, group])
        mask = None if group is None else group[:, None] == group[None]
        x = self.input_proj(x.to(self.input_proj.weight.dtype))
        for block, memory in zip(self.res_blocks, context.memories, strict=True):
            more = (time, z, group, memory) if isinstance(block, CrossBlock) else ()
            given = (x, cond, context.by, mask, *more)
            checkpointed = self.gradient_checkpointing and torch.is_grad_enabled()
            x = self._gradient_checkpointing_func(block, *given) if checkpointed else block(*given)
        return self.final_layer(x, cond).float()
