"""The binary autoencoder of ELM (Xuantong Liu et al., arXiv 2410.16257, section 3.2): a token is a handful of bits.

Source: Pepper-lll/LMforImageGeneration: bae/binaryae.py (c2f29f0). Parameter names are those of the released files,
with the weights that no forward pass reads (`conv_out` of blocks that keep their width, `logsigma`), so that a file
converts back whole. What differs: images are in [-1, 1] here ([0, 1] inside), and whether bits are drawn or cut at a
threshold is said by the caller, not by the module.

The bits of a position are cut into G chunks, each read as a number with its first bit the highest: a factorised
id of G sub-codes. G = 1 keeps that last dimension, so ids are always (B, L, G).

Shapes: B batch, K bits, C latent_dim, h w the token grid, L = h w tokens, G sub-codes, V = 2 ** (K / G).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.nn.functional as F
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.modeling_utils import ModelMixin
from torch import Tensor, nn

from varkit.hub import HubMixin
from varkit.interfaces import Tokenizer
from varkit.layers.conv_autoencoder import Downsample, Upsample, group_norm
from varkit.layout import TokenLayout, square_grids
from varkit.registry import Checkpoint, ModelEntry, register_checkpoint, register_model
from varkit.rng import Draw, Rng
from varkit.tokenizers.multiscale_vq import Quantized


def pack_bits(bits: Tensor, sub_codes: int) -> Tensor:
    """Bits (..., K) of 0 and 1 -> numbers (..., G) int64; the first bit of each chunk is the highest."""
    chunks = bits.to(torch.int64).unflatten(-1, (sub_codes, -1))  # ... G K/G
    powers = 2 ** torch.arange(chunks.shape[-1] - 1, -1, -1, device=bits.device)
    return (chunks * powers).sum(-1)


def unpack_bits(ids: Tensor, bits: int) -> Tensor:
    """Numbers (..., G) -> bits (..., K) float32; the inverse of `pack_bits`."""
    shifts = torch.arange(bits // ids.shape[-1] - 1, -1, -1, device=ids.device)
    return ((ids[..., None] >> shifts) & 1).flatten(-2).float()


class ResBlock(nn.Module):
    """Two convolutions, each after a norm and SiLU, plus the input. `conv_out` is read where the width changes."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.norm1 = group_norm(in_channels)
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        self.norm2 = group_norm(out_channels)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1)
        self.conv_out = nn.Conv2d(in_channels, out_channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv2(F.silu(self.norm2(self.conv1(F.silu(self.norm1(x))))))
        return h + (x if h.shape[1] == x.shape[1] else self.conv_out(x))


class AttnBlock(nn.Module):
    """Single-head self-attention over all positions of the feature map, plus the input."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = group_norm(channels)
        self.q = nn.Conv2d(channels, channels, 1)
        self.k = nn.Conv2d(channels, channels, 1)
        self.v = nn.Conv2d(channels, channels, 1)
        self.proj_out = nn.Conv2d(channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(x)
        q, k, v = (layer(h).flatten(2).transpose(1, 2)[:, None] for layer in (self.q, self.k, self.v))  # B 1 hw C
        out = F.scaled_dot_product_attention(q, k, v)
        return x + self.proj_out(out[:, 0].transpose(1, 2).view_as(x))


def middle(width: int) -> list[nn.Module]:
    return [ResBlock(width, width), AttnBlock(width), ResBlock(width, width)]


class Stack(nn.Module):
    """Blocks in a row; their indices are the key names."""

    def __init__(self, blocks: Sequence[nn.Module]) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(blocks)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return x


def encoder(image_channels: int, latent_dim: int, widths: Sequence[int], base: int, num_res_blocks: int) -> Stack:
    """(B, image_channels, H, W) -> (B, C, h, w), the sides halved between levels; attention at the coarsest."""
    blocks: list[nn.Module] = [nn.Conv2d(image_channels, base, 3, padding=1)]
    before = base
    for i, width in enumerate(widths):
        last = i == len(widths) - 1
        for _ in range(num_res_blocks):
            blocks += [ResBlock(before, width), *([AttnBlock(width)] if last else [])]
            before = width
        if not last:
            blocks.append(Downsample(width))
    return Stack([*blocks, *middle(before), group_norm(before), nn.Conv2d(before, latent_dim, 3, padding=1)])


class BinaryGenerator(Stack):
    """The mirror of `encoder`, its input normed first. `logsigma` comes with released files and is never read."""

    def __init__(
        self, image_channels: int, latent_dim: int, widths: Sequence[int], base: int, num_res_blocks: int
    ) -> None:
        before = widths[-1]
        blocks: list[nn.Module] = [group_norm(latent_dim), nn.Conv2d(latent_dim, before, 3, padding=1)]
        blocks += middle(before)
        for i, width in reversed(list(enumerate(widths))):
            for _ in range(num_res_blocks):
                blocks += [ResBlock(before, width), *([AttnBlock(width)] if i == len(widths) - 1 else [])]
                before = width
            if i > 0:
                blocks.append(Upsample(width))
        super().__init__([*blocks, group_norm(before), nn.Conv2d(before, image_channels, 3, padding=1)])
        self.logsigma = nn.Sequential(
            nn.Conv2d(before, base, 3, padding=1), nn.ReLU(), nn.Conv2d(base, image_channels, 1)
        ).requires_grad_(False)


class BinaryQuantizer(nn.Module):
    """The probability of each bit, and the sum of the vectors of the bits that are 1."""

    def __init__(self, bits: int, dim: int) -> None:
        super().__init__()
        self.proj = nn.Sequential(nn.Conv2d(dim, bits, 1), nn.Sigmoid())
        self.embed = nn.Embedding(bits, dim)

    def probability(self, features: Tensor) -> Tensor:
        """(B, C, h, w) -> (B, K, h, w) float32 in (0, 1)."""
        return self.proj(features).float()

    def dequantize(self, bits: Tensor) -> Tensor:
        """(B, K, h, w) -> (B, C, h, w) float32."""
        with torch.autocast(bits.device.type, enabled=False):
            return torch.einsum("bkhw,kc->bchw", bits.float(), self.embed.weight.float())


@dataclass
class BinaryQuantized(Quantized):
    """What `forward` returns beside the picture; `residuals` holds the probabilities, `loss` what to add to others."""

    bits: Tensor  # (B, K, h, w) of 0 and 1
    code_loss: Tensor  # mean s (1 - s) of s = sigmoid(probability): the release's second sigmoid is kept


class BinaryAutoencoder(HubMixin, ModelMixin, ConfigMixin, Tokenizer):
    """Images <-> one grid of factorised ids (B, L, G). The defaults are the released 16 bits, in two sub-codes.

    Args:
        bits, sub_codes: K and G; no weight depends on G.
        latent_dim, base_channels, channel_multipliers, num_res_blocks: of encoder and decoder; the downsampling factor
            is 2 ** (len(channel_multipliers) - 1).
        image_channels: 3, or 1 for grey images (then `encode` averages the channels and `decode` repeats).
        threshold: above this probability a bit is 1, unless bits are drawn.
        code_weight: of the loss that pushes probabilities away from 1/2.
        grid: tokens a side, or (height, width).
    Raises: ValueError on an impossible combination, naming both sides.
    """

    _no_split_modules = ("ResBlock",)
    free_arguments = frozenset({"sub_codes", "threshold", "code_weight", "grid"})
    """Constructor arguments that no weight depends on."""

    @register_to_config
    def __init__(
        self,
        bits: int = 16,
        sub_codes: int = 2,
        latent_dim: int = 256,
        base_channels: int = 128,
        channel_multipliers: Sequence[int] = (1, 1, 2, 2, 4),
        num_res_blocks: int = 2,
        image_channels: int = 3,
        threshold: float = 0.5,
        code_weight: float = 0.0,
        grid: int | Sequence[int] = 16,
    ) -> None:
        super().__init__()
        widths = [base_channels * m for m in channel_multipliers]
        if any(width % 32 for width in (latent_dim, base_channels, *widths)):
            raise ValueError(
                f"latent_dim {latent_dim} and every width {base_channels} * {tuple(channel_multipliers)} must be "
                f"multiples of 32 (GroupNorm has 32 groups)"
            )
        if sub_codes < 1 or bits % sub_codes:
            raise ValueError(f"bits {bits} must be a multiple of sub_codes {sub_codes}")
        if not 0 < threshold < 1:
            raise ValueError(f"threshold must lie between 0 and 1; got {threshold}")
        if image_channels not in (1, 3):
            raise ValueError(f"image_channels must be 1 (grey) or 3; got {image_channels}")
        codebook = (2 ** (bits // sub_codes),) * sub_codes
        self.layout = TokenLayout(square_grids([grid]), codebook, latent_dim)
        self.downsampling = 2 ** (len(channel_multipliers) - 1)
        sizes = (image_channels, latent_dim, widths, base_channels, num_res_blocks)
        self.encoder = encoder(*sizes)
        self.quantize = BinaryQuantizer(bits, latent_dim)
        self.generator = BinaryGenerator(*sizes)

    @property
    def image_size(self) -> tuple[int, int]:
        """Height and width of the images that `layout` codes."""
        height, width = self.layout.grids[0]
        return height * self.downsampling, width * self.downsampling

    @property
    def codebook(self) -> Tensor:
        """(K, C) float32: the vector that each bit adds."""
        return self.quantize.embed.weight.float()

    def features(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) in [-1, 1] -> (B, C, h, w): the encoder's output."""
        if images.dim() != 4 or images.shape[1] != 3:
            raise ValueError(f"images must be (B, 3, H, W) in [-1, 1]; got shape {tuple(images.shape)}")
        if self.config.image_channels == 1:
            images = images.mean(1, keepdim=True)
        images = (images + 1) / 2
        return self.encoder(images.to(self.quantize.embed.weight.dtype, memory_format=torch.channels_last))

    def draw(self, probability: Tensor, rng: Rng) -> Tensor:
        """Bits drawn with these probabilities (B, K, h, w); a number a bit, by image and position."""
        places = torch.arange(probability.shape[2] * probability.shape[3])
        u = rng.uniform(places, Draw.LATENT, count=probability.shape[1])  # B L K
        return (u.transpose(1, 2).view_as(probability).to(probability) < probability).to(probability)

    def encode(self, images: Tensor, rng: Rng | None = None, *, stochastic: bool = False) -> Tensor:
        """(B, 3, H, W) in [-1, 1] -> ids (B, L, G).

        Args:
            stochastic: draw the bits, as ELM does in training (fresh tokens every epoch); else they are cut at
                `threshold` and `rng` is not read.
        Raises: ValueError on another size, or when bits are to be drawn without `rng`.
        """
        if tuple(images.shape[-2:]) != self.image_size:
            raise ValueError(
                f"images are {images.shape[-2]}x{images.shape[-1]}; this tokenizer takes {self.image_size}"
            )
        if stochastic and rng is None:
            raise ValueError("stochastic=True draws the bits: pass rng=")
        p = self.quantize.probability(self.features(images))
        bits = self.draw(p, rng) if stochastic and rng is not None else p > self.config.threshold
        return self.ids(bits)

    def ids(self, bits: Tensor) -> Tensor:
        """(B, K, h, w) -> (B, L, G)."""
        return pack_bits(bits.flatten(2).transpose(1, 2), self.config.sub_codes)

    def vectors(self, ids: Tensor) -> Tensor:
        return unpack_bits(ids, self.config.bits) @ self.codebook

    def decode_features(self, latents: Tensor) -> Tensor:
        """(B, C, h, w) -> images (B, 3, H, W) in about [-1, 1], not clamped."""
        weight = self.quantize.embed.weight
        images = self.generator(latents.to(weight.dtype, memory_format=torch.channels_last)) * 2 - 1
        return images.expand(-1, 3, -1, -1) if self.config.image_channels == 1 else images

    def latents(self, tokens: Tensor) -> Tensor:
        """Ids (B, L, G) or vectors (B, L, C) -> (B, C, h, w)."""
        height, width = self.layout.grids[0]
        if tokens.shape[1] != height * width:
            raise ValueError(f"{tokens.shape[1]} tokens do not fill the grid {height}x{width}")
        vectors = tokens.float() if tokens.is_floating_point() else self.vectors(tokens)
        return vectors.transpose(1, 2).unflatten(2, (height, width))

    def decode(self, tokens: Tensor, rng: Rng | None = None) -> Tensor:
        """Ids (B, L, G) or vectors (B, L, C) -> images (B, 3, H, W) in [-1, 1]."""
        return self.decode_features(self.latents(tokens)).clamp(-1, 1)

    def forward(self, images: Tensor, rng: Rng | None = None) -> tuple[Tensor, BinaryQuantized]:
        """Straight through the bits: (reconstruction, not clamped; what the quantiser did).

        Args: rng: draws the bits, as in the release; None cuts at `threshold`.
        """
        p = self.quantize.probability(self.features(images))
        bits = (p > self.config.threshold).to(p) if rng is None else self.draw(p.detach(), rng)
        latents = self.quantize.dequantize(bits + p - p.detach())
        s = p.sigmoid()
        code_loss = (s * (1 - s)).mean()
        loss = self.config.code_weight * code_loss
        quantized = BinaryQuantized(latents, loss, [self.ids(bits)], [p.detach()], bits, code_loss)
        return self.decode_features(latents), quantized


def _builder(**preset: Any) -> Callable[..., BinaryAutoencoder]:
    return lambda **overrides: cast(BinaryAutoencoder, BinaryAutoencoder(**{**preset, **overrides}))


TINY: dict[str, Any] = {
    "bits": 6,
    "sub_codes": 2,
    "latent_dim": 32,
    "base_channels": 32,
    "channel_multipliers": (1, 1),
    "num_res_blocks": 1,
    "grid": 4,
}
"""Overrides that make any of these small enough for a test."""

VOCABULARIES: dict[str, tuple[int, int]] = {"1_16": (16, 1), "2_8": (16, 2), "2_10": (20, 2), "2_12": (24, 2)}
"""Bits and sub-codes of the release's names, sub-codes first."""

_FASHION = {
    "bits": 12,
    "latent_dim": 64,
    "base_channels": 32,
    "channel_multipliers": (1, 1, 2),
    "num_res_blocks": 1,
    "image_channels": 1,
    "grid": 8,
}
_PRESETS: dict[str, tuple[dict[str, Any], str]] = {
    **{
        f"bae_{name}": (
            {"bits": bits, "sub_codes": parts},
            f"ELM's binary autoencoder at 256x256: f16, 256 tokens of {bits} bits in {parts} sub-code"
            f"{'s' if parts > 1 else ''}",
        )
        for name, (bits, parts) in VOCABULARIES.items()
    },
    "bae_fashion": (_FASHION, "Fashion-MNIST at 32x32: f4, 64 tokens of 12 bits in 2 sub-codes"),
}
for _name, (_preset, _summary) in _PRESETS.items():
    _tiny = {**TINY, "sub_codes": _preset.get("sub_codes", 2)}
    register_model(ModelEntry(_name, "tokenizer", _builder(**_preset), _summary, tiny=_tiny))
for _tag, _folder, _names in (
    ("in1k_256", "bae_16", ("1_16", "2_8")),
    ("in1k_256_deterministic", "bae_16_deter", ("1_16", "2_8")),  # trained without drawing bits
    ("in1k_256", "bae_20", ("2_10",)),
    ("in1k_256", "bae_24", ("2_12",)),
):
    for _name in _names:
        register_checkpoint(
            Checkpoint(
                name=f"bae_{_name}.{_tag}",
                repo_id="xuantonglll/ELM",
                filename=f"bae/{_folder}/binaryae_ema.th",
                licence="not stated with the files",
                paper="arXiv 2410.16257",
                resolution=256,
                official_score="none noted here",
            )
        )
