"""The VQGAN of MaskGIT (Chang et al., arXiv 2202.04200): f16, 1024 codes; RAR's tokenizer and TiTok's teacher.

Source: bytedance/1d-tokenizer: modeling/modules/maskgit_vqgan.py, modeling/titok.py (942a96f). Parameter names are
those of the released `maskgit-vqgan-imagenet-f16-256.bin`. What differs: images lie in [-1, 1] outside and in [0, 1]
inside; the nearest code is found in float32 whatever the module is cast to.

Shapes: B batch, C latent_dim, h w grid, L = h * w tokens, V codebook entries.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any, ClassVar, Self, cast

import torch
import torch.nn.functional as F
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.modeling_utils import ModelMixin
from torch import Tensor, nn

from varkit.hub import HubMixin
from varkit.interfaces import Tokenizer
from varkit.layers.conv_autoencoder import group_norm
from varkit.layout import TokenLayout
from varkit.registry import Checkpoint, ModelEntry, register_checkpoint, register_model
from varkit.rng import Rng


class ResBlock(nn.Module):
    """norm, SiLU, conv 3x3, twice, plus the input.

    As released, where the widths differ the input plays no part: the 1x1 shortcut reads the block's own output. The
    weights were trained so.
    """

    def __init__(self, in_channels: int, out_channels: int, dropout: float) -> None:
        super().__init__()
        self.norm1 = group_norm(in_channels)
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, padding=1, bias=False)
        self.norm2 = group_norm(out_channels)
        self.dropout = nn.Dropout(dropout)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1, bias=False)
        if in_channels != out_channels:
            self.nin_shortcut = nn.Conv2d(out_channels, out_channels, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv1(F.silu(self.norm1(x)))
        h = self.conv2(self.dropout(F.silu(self.norm2(h))))
        return h + (self.nin_shortcut(h) if hasattr(self, "nin_shortcut") else x)


def res_blocks(widths: Sequence[int], dropout: float) -> nn.ModuleList:
    return nn.ModuleList(ResBlock(i, o, dropout) for i, o in pairwise(widths))


class Encoder(nn.Module):
    """(B, image_channels, H, W) -> (B, latent_dim, H / f, W / f) with f = 2 ** (len(widths) - 1).

    Args: widths: of the levels, fine to coarse; `blocks` residual blocks each, and as many in the middle.
    """

    def __init__(self, image_channels: int, latent_dim: int, widths: Sequence[int], blocks: int, dropout: float):
        super().__init__()
        self.conv_in = nn.Conv2d(image_channels, widths[0], 3, padding=1, bias=False)
        self.down: Any = nn.ModuleList()
        for before, width in zip([widths[0], *widths], widths, strict=False):
            level = nn.Module()
            level.block = res_blocks([before] + [width] * blocks, dropout)
            self.down.append(level)
        self.mid = res_blocks([widths[-1]] * (blocks + 1), dropout)
        self.norm_out = group_norm(widths[-1])
        self.conv_out = nn.Conv2d(widths[-1], latent_dim, 1)

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv_in(x)
        for i, level in enumerate(self.down):
            for block in level.block:
                h = block(h)
            if i < len(self.down) - 1:
                h = F.avg_pool2d(h, 2)
        for block in self.mid:
            h = block(h)
        return self.conv_out(F.silu(self.norm_out(h)))


class Decoder(nn.Module):
    """The mirror of `Encoder`: each level but the finest ends with nearest-neighbour doubling and a conv 3x3."""

    def __init__(self, image_channels: int, latent_dim: int, widths: Sequence[int], blocks: int, dropout: float):
        super().__init__()
        self.conv_in = nn.Conv2d(latent_dim, widths[-1], 3, padding=1)
        self.mid = res_blocks([widths[-1]] * (blocks + 1), dropout)
        self.up: Any = nn.ModuleList()  # index 0 is the finest level, though the coarsest runs first
        for i, (width, before) in enumerate(zip(widths, [*widths[1:], widths[-1]], strict=True)):
            level = nn.Module()
            level.block = res_blocks([before] + [width] * blocks, dropout)
            if i > 0:
                level.upsample_conv = nn.Conv2d(width, width, 3, padding=1)
            self.up.append(level)
        self.norm_out = group_norm(widths[0])
        self.conv_out = nn.Conv2d(widths[0], image_channels, 3, padding=1)

    def forward(self, z: Tensor) -> Tensor:
        h = self.conv_in(z)
        for block in self.mid:
            h = block(h)
        for i in reversed(range(len(self.up))):
            for block in self.up[i].block:
                h = block(h)
            if i > 0:
                h = self.up[i].upsample_conv(F.interpolate(h, scale_factor=2.0, mode="nearest"))
        return self.conv_out(F.silu(self.norm_out(h)))


class Codebook(nn.Module):
    """V vectors of C channels; stays float32 whatever the module around it is cast to."""

    def __init__(self, size: int, dim: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(size, dim)
        nn.init.uniform_(self.embedding.weight, -1 / size, 1 / size)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        def keep_dtype(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            return moved if moved.dtype == tensor.dtype else tensor.to(moved.device)

        return super()._apply(keep_dtype, recurse)

    def nearest(self, z: Tensor) -> Tensor:
        """(..., C) -> (...) ids of the nearest codes."""
        codes = self.embedding.weight
        with torch.autocast(z.device.type, enabled=False):
            distances = torch.addmm(codes.square().sum(-1), z.float().flatten(0, -2), codes.T, alpha=-2)
        return distances.argmin(-1).view(z.shape[:-1])


class MaskGitVQGAN(HubMixin, ModelMixin, ConfigMixin, Tokenizer):
    """Images <-> a grid of codes. The defaults are the released model, at 256 x 256.

    Args:
        codebook_size, latent_dim: V and C.
        base_channels, channel_multipliers, num_res_blocks, dropout: of encoder and decoder; the downsampling factor is
            2 ** (len(channel_multipliers) - 1).
        image_channels: 3, or 1 for grey images (then `encode` averages the channels and `decode` repeats).
        commitment_weight: of the loss in `forward`.
        grid: (h, w) of the tokens.
    Raises: ValueError on an impossible combination, naming both sides.
    """

    _no_split_modules = ("ResBlock",)
    _keep_in_fp32_modules: ClassVar[list[str]] = ["quantize"]  # as Codebook._apply, when opened with torch_dtype=

    @register_to_config
    def __init__(
        self,
        codebook_size: int = 1024,
        latent_dim: int = 256,
        base_channels: int = 128,
        channel_multipliers: Sequence[int] = (1, 1, 2, 2, 4),
        num_res_blocks: int = 2,
        dropout: float = 0.0,
        image_channels: int = 3,
        commitment_weight: float = 0.25,
        grid: Sequence[int] = (16, 16),
    ) -> None:
        super().__init__()
        widths = [base_channels * m for m in channel_multipliers]
        if any(width % 32 for width in widths):
            raise ValueError(
                f"every width base_channels * multiplier must be a multiple of 32 (GroupNorm has 32 groups); "
                f"got {widths}"
            )
        if image_channels not in (1, 3):
            raise ValueError(f"image_channels must be 1 (grey) or 3; got {image_channels}")
        if len(grid) != 2:
            raise ValueError(f"grid must be (h, w); got {tuple(grid)}")
        self.layout = TokenLayout((tuple(grid),), codebook_size, latent_dim)
        self.downsampling = 2 ** (len(widths) - 1)
        self.encoder = Encoder(image_channels, latent_dim, widths, num_res_blocks, dropout)
        self.quantize = Codebook(codebook_size, latent_dim)
        self.decoder = Decoder(image_channels, latent_dim, widths, num_res_blocks, dropout)

    @property
    def image_size(self) -> tuple[int, int]:
        height, width = self.layout.grids[0]
        return height * self.downsampling, width * self.downsampling

    @property
    def codebook(self) -> Tensor:
        return self.quantize.embedding.weight

    def features(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) in [-1, 1] -> (B, C, h, w): the encoder's output, before quantisation."""
        if images.dim() != 4 or images.shape[1] != 3 or tuple(images.shape[-2:]) != self.image_size:
            height, width = self.image_size
            raise ValueError(f"images must be (B, 3, {height}, {width}) in [-1, 1]; got shape {tuple(images.shape)}")
        if self.config.image_channels == 1:
            images = images.mean(1, keepdim=True)
        dtype = self.encoder.conv_in.weight.dtype
        return self.encoder(images.mul(0.5).add(0.5).to(dtype, memory_format=torch.channels_last))

    def encode(self, images: Tensor, rng: Rng | None = None) -> Tensor:
        return self.quantize.nearest(self.features(images).permute(0, 2, 3, 1)).flatten(1)

    def vectors(self, ids: Tensor) -> Tensor:
        return self.quantize.embedding(ids)

    def decode_features(self, features: Tensor) -> Tensor:
        """(B, C, h, w) -> images (B, 3, H, W) with [-1, 1] for the range, not clamped."""
        dtype = self.decoder.conv_in.weight.dtype
        images = self.decoder(features.to(dtype, memory_format=torch.channels_last)).mul(2).sub(1)
        return images.expand(-1, 3, -1, -1) if self.config.image_channels == 1 else images

    def maps(self, tokens: Tensor) -> Tensor:
        """Ids (B, L) or vectors (B, L, C) -> (B, C, h, w)."""
        if tokens.shape[1] != self.layout.length:
            raise ValueError(f"got {tokens.shape[1]} tokens; an image has {self.layout.length}")
        vectors = tokens.float() if tokens.is_floating_point() else self.vectors(tokens)
        return vectors.transpose(1, 2).unflatten(2, self.layout.grids[0])

    def decode(self, tokens: Tensor, rng: Rng | None = None) -> Tensor:
        return self.decode_features(self.maps(tokens)).clamp(-1, 1)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Training: images -> (reconstruction, not clamped; codebook and commitment loss)."""
        features = self.features(images).float()
        codes = self.maps(self.quantize.nearest(features.detach().permute(0, 2, 3, 1)).flatten(1))
        loss = F.mse_loss(codes, features.detach())
        loss = loss + self.config.commitment_weight * F.mse_loss(features, codes.detach())
        return self.decode_features(features + (codes - features).detach()), loss


def _builder(**preset: Any) -> Callable[..., MaskGitVQGAN]:
    return lambda **overrides: cast(MaskGitVQGAN, MaskGitVQGAN(**{**preset, **overrides}))


_TINY = {
    "codebook_size": 24,
    "latent_dim": 4,
    "base_channels": 32,
    "channel_multipliers": (1, 2),
    "num_res_blocks": 1,
    "grid": (3, 4),
}
_FASHION = {
    "codebook_size": 512,
    "latent_dim": 16,
    "base_channels": 32,
    "channel_multipliers": (1, 1, 2),
    "num_res_blocks": 1,
    "image_channels": 1,
    "grid": (8, 8),
}
for _name, _preset, _summary in (
    ("maskgit_vqgan_f16", {}, "MaskGIT's VQGAN at 256x256: f16, 1024 codes, 256 tokens"),
    ("maskgit_vqgan_fashion", _FASHION, "Fashion-MNIST at 32x32: f4, 512 codes, 64 tokens"),
):
    register_model(ModelEntry(_name, "tokenizer", _builder(**_preset), _summary, tiny=_TINY))

register_checkpoint(
    Checkpoint(
        name="maskgit_vqgan_f16.in1k_256",
        repo_id="fun-research/TiTok",
        filename="maskgit-vqgan-imagenet-f16-256.bin",
        licence="Apache-2.0",
        paper="arXiv 2202.04200",
        resolution=256,
        official_score="rFID 2.28 (README), 50,000 ImageNet validation images",
    )
)
