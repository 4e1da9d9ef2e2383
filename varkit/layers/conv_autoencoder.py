"""The convolutional encoder and decoder of VQGAN (Esser et al., arXiv 2012.09841, section 3.1).

Source: FoundationVision/VAR: models/basic_vae.py, itself after CompVis/taming-transformers. Module names
are those of the released VAR file. Differences to taming: one fused qkv convolution in the attention.

Shapes: B batch, C channels, H W image or feature sides. Images in [-1, 1].
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn


def group_norm(channels: int) -> nn.GroupNorm:
    return nn.GroupNorm(32, channels, eps=1e-6)


class ResnetBlock(nn.Module):
    """norm, SiLU, conv 3x3, norm, SiLU, dropout, conv 3x3, plus the input (1x1 conv if widths differ)."""

    def __init__(self, in_channels: int, out_channels: int, dropout: float) -> None:
        super().__init__()
        self.norm1 = group_norm(in_channels)
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        self.norm2 = group_norm(out_channels)
        self.dropout = nn.Dropout(dropout)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1)
        self.nin_shortcut = nn.Conv2d(in_channels, out_channels, 1) if in_channels != out_channels else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv1(F.silu(self.norm1(x)))
        h = self.conv2(self.dropout(F.silu(self.norm2(h))))
        return self.nin_shortcut(x) + h


class AttnBlock(nn.Module):
    """Single-head self-attention over all positions of the feature map, plus the input."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = group_norm(channels)
        self.qkv = nn.Conv2d(channels, 3 * channels, 1)
        self.proj_out = nn.Conv2d(channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        b, c, h, w = x.shape
        q, k, v = self.qkv(self.norm(x)).flatten(2).transpose(1, 2).unsqueeze(1).chunk(3, -1)  # B 1 HW C
        out = F.scaled_dot_product_attention(q, k, v)
        return x + self.proj_out(out.squeeze(1).transpose(1, 2).view(b, c, h, w))


class Downsample(nn.Module):
    """Halve the sides: pad right and bottom by one zero, conv 3x3 with stride 2."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.pad(x, (0, 1, 0, 1)))


class Upsample(nn.Module):
    """Double the sides: nearest neighbour, conv 3x3."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))


def middle(channels: int, dropout: float, attention: bool) -> nn.Module:
    mid = nn.Module()
    mid.block_1 = ResnetBlock(channels, channels, dropout)
    mid.attn_1 = AttnBlock(channels) if attention else nn.Identity()
    mid.block_2 = ResnetBlock(channels, channels, dropout)
    return mid


def level(widths: Sequence[int], dropout: float, attention: bool) -> nn.Module:
    """Residual blocks from width to width, each followed by attention where asked for."""
    stage = nn.Module()
    stage.block = nn.ModuleList(ResnetBlock(i, o, dropout) for i, o in pairwise(widths))
    stage.attn = nn.ModuleList(AttnBlock(o) for o in widths[1:] if attention)
    return stage


def run_level(stage: Any, x: Tensor) -> Tensor:
    for i, block in enumerate(stage.block):
        x = block(x)
        if len(stage.attn):
            x = stage.attn[i](x)
    return x


class ConvEncoder(nn.Module):
    """(B, image_channels, H, W) -> (B, latent_dim, H / f, W / f) with f = 2 ** (len(multipliers) - 1).

    Args:
        base_channels: width before the multipliers; each width must be a multiple of 32.
        attention: self-attention at the coarsest level.   mid_attention: between the middle blocks.
    """

    def __init__(
        self,
        image_channels: int,
        latent_dim: int,
        base_channels: int,
        multipliers: Sequence[int],
        num_res_blocks: int,
        dropout: float,
        attention: bool,
        mid_attention: bool,
    ) -> None:
        super().__init__()
        widths = [base_channels * m for m in multipliers]
        self.conv_in = nn.Conv2d(image_channels, base_channels, 3, padding=1)
        self.down: Any = nn.ModuleList()
        for i, (before, width) in enumerate(zip([base_channels, *widths], widths, strict=False)):
            last = i == len(widths) - 1
            stage = level([before] + [width] * num_res_blocks, dropout, attention and last)
            if not last:
                stage.downsample = Downsample(width)
            self.down.append(stage)
        self.mid: Any = middle(widths[-1], dropout, mid_attention)
        self.norm_out = group_norm(widths[-1])
        self.conv_out = nn.Conv2d(widths[-1], latent_dim, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv_in(x)
        for i, stage in enumerate(self.down):
            h = run_level(stage, h)
            if i < len(self.down) - 1:
                h = stage.downsample(h)
        h = self.mid.block_2(self.mid.attn_1(self.mid.block_1(h)))
        return self.conv_out(F.silu(self.norm_out(h)))


class ConvDecoder(nn.Module):
    """The mirror of `ConvEncoder`, with one more residual block a level. Arguments as there."""

    def __init__(
        self,
        image_channels: int,
        latent_dim: int,
        base_channels: int,
        multipliers: Sequence[int],
        num_res_blocks: int,
        dropout: float,
        attention: bool,
        mid_attention: bool,
    ) -> None:
        super().__init__()
        widths = [base_channels * m for m in multipliers]
        self.conv_in = nn.Conv2d(latent_dim, widths[-1], 3, padding=1)
        self.mid: Any = middle(widths[-1], dropout, mid_attention)
        self.up: Any = nn.ModuleList()  # index 0 is the finest level, though the coarsest runs first
        for i, width in enumerate(widths):
            last = i == len(widths) - 1
            before = width if last else widths[i + 1]
            stage = level([before] + [width] * (num_res_blocks + 1), dropout, attention and last)
            if i > 0:
                stage.upsample = Upsample(width)
            self.up.append(stage)
        self.norm_out = group_norm(widths[0])
        self.conv_out = nn.Conv2d(widths[0], image_channels, 3, padding=1)

    def forward(self, z: Tensor) -> Tensor:
        h = self.conv_in(z)
        h = self.mid.block_2(self.mid.attn_1(self.mid.block_1(h)))
        for i in reversed(range(len(self.up))):
            h = run_level(self.up[i], h)
            if i > 0:
                h = self.up[i].upsample(h)
        return self.conv_out(F.silu(self.norm_out(h)))
