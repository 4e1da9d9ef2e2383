"""The vision transformer that reads control images: DINOv2's or the plain ViT's, of any size.

Parameters carry timm's names, so its weights load as they are. Positions are interpolated as transformers does, bicubic
and to the exact size, which is neither timm's nor the first DINOv2 release's way.

Source: hustvl/ControlAR: autoregressive/models/dinov2_adapter.py, vit_adapter.py (87e32e9); huggingface/transformers
4.46.3: models/dinov2/modeling_dinov2.py, models/vit/modeling_vit.py.

Shapes: B images, E width, h x w patches.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from varkit.layers.mlp import FeedForward


class Attention(nn.Module):
    def __init__(self, dim: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)  # B H n D each
        return self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class Scale(nn.Module):
    """A learned factor a channel (LayerScale)."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gamma


class EncoderBlock(nn.Module):
    def __init__(self, dim: int, num_heads: int, hidden: int, eps: float, layer_scale: bool) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(dim, eps), nn.LayerNorm(dim, eps)
        self.attn = Attention(dim, num_heads)
        self.mlp = FeedForward(dim, hidden, 0.0)
        self.ls1: nn.Module = Scale(dim) if layer_scale else nn.Identity()
        self.ls2: nn.Module = Scale(dim) if layer_scale else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.ls1(self.attn(self.norm1(x)))
        return x + self.ls2(self.mlp(self.norm2(x)))


def interpolated(table: Tensor, grid: tuple[int, int]) -> Tensor:
    """Position embeddings (1, 1 + n * n, E), the class token's first, for a grid (h, w): bicubic, as trained at n."""
    side = math.isqrt(table.shape[1] - 1)
    if grid == (side, side):
        return table
    patches = table[:, 1:].float().reshape(1, side, side, -1).permute(0, 3, 1, 2)  # 1 E n n
    patches = F.interpolate(patches, size=grid, mode="bicubic", align_corners=False)
    return torch.cat([table[:, :1], patches.flatten(2).transpose(1, 2).to(table.dtype)], 1)


class ControlEncoder(nn.Module):
    """Control images -> a map of features.

    Args:
        width, depth, heads, mlp_ratio, norm_eps, layer_scale: of the transformer.
        patch: pixels a side of a patch.
        grid: patches a side that the position embeddings are for; others are interpolated.
        stride: image pixels for each patch; None is `patch`. Images are resized by patch / stride first: DINOv2's 14
            pixels stand for 16.
        resize: how; `nearest` keeps the values of lines and colour-coded maps, `bicubic` is for all else.
    """

    def __init__(
        self,
        width: int,
        depth: int,
        heads: int,
        patch: int,
        grid: int,
        mlp_ratio: float = 4.0,
        norm_eps: float = 1e-6,
        layer_scale: bool = False,
        stride: int | None = None,
        resize: str = "bicubic",
    ) -> None:
        super().__init__()
        if width % heads:
            raise ValueError(f"the control encoder's width {width} must be a multiple of its heads {heads}")
        if resize not in ("nearest", "bicubic"):
            raise ValueError(f"the control encoder's resize is nearest or bicubic; got {resize!r}")
        self.patch, self.stride, self.resize = patch, stride or patch, resize
        self.cls_token = nn.Parameter(torch.zeros(1, 1, width))
        self.pos_embed = nn.Parameter(torch.zeros(1, 1 + grid * grid, width))
        self.patch_embed: Any = nn.Module()
        self.patch_embed.proj = nn.Conv2d(3, width, patch, patch)
        self.blocks: Any = nn.ModuleList(
            EncoderBlock(width, heads, round(width * mlp_ratio), norm_eps, layer_scale) for _ in range(depth)
        )
        self.norm = nn.LayerNorm(width, norm_eps)

    @torch.no_grad()
    def init_weights(self) -> None:
        """As a ViT: linear weights, positions and class token truncated normal, std 0.02; biases zero."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                nn.init.zeros_(module.bias)
        nn.init.trunc_normal_(self.pos_embed, std=0.02)
        nn.init.trunc_normal_(self.cls_token, std=0.02)
        self.patch_embed.proj.reset_parameters()

    def resized(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) -> (B, 3, H / stride * patch, W / stride * patch). Raises ValueError where it is no multiple."""
        height, width = images.shape[-2:]
        if height % self.stride or width % self.stride:
            raise ValueError(f"sides of control images must be multiples of {self.stride}; got {height}x{width}")
        if self.patch == self.stride:
            return images
        size = (height // self.stride * self.patch, width // self.stride * self.patch)
        if self.resize == "nearest":
            return F.interpolate(images, size=size, mode="nearest")
        return F.interpolate(images, size=size, mode="bicubic", align_corners=True)

    def forward(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) in [-1, 1] -> (B, E, h, w), after the last norm and without the class token."""
        x = self.patch_embed.proj(self.resized(images).to(self.patch_embed.proj.weight.dtype))
        grid = (x.shape[2], x.shape[3])
        x = torch.cat([self.cls_token.expand(len(x), -1, -1), x.flatten(2).transpose(1, 2)], 1)
        x = x + interpolated(self.pos_embed, grid)
        for block in self.blocks:
            x = block(x)
        return self.norm(x)[:, 1:].transpose(1, 2).unflatten(2, grid)
