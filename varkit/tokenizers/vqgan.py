"""The VQ tokenizer of LlamaGen (Sun et al., "Autoregressive Model Beats Diffusion", arXiv 2406.06525, section 3.1).

Source: FoundationVision/LlamaGen: tokenizer/tokenizer_image/vq_model.py (ce98ec4), a VQGAN (arXiv 2012.09841) whose
codes are few-dimensional unit vectors. What differs: encoder and decoder carry the key names of
`varkit.layers.conv_autoencoder` (`varkit.checkpoints.llamagen` maps them); any grid, square or not, may be given per
call; the entropy term is computed only when it counts; the quantiser stays float32 whatever the module is cast to.

Shapes: B batch, C latent_dim, h w the token grid, L = h w tokens, V codebook entries, N = B L.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Self, cast

import torch
import torch.nn.functional as F
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.modeling_utils import ModelMixin
from torch import Tensor, nn

from varkit.hub import HubMixin
from varkit.interfaces import Tokenizer
from varkit.layers.code_usage import CodeUsage
from varkit.layers.conv_autoencoder import ConvDecoder, ConvEncoder
from varkit.layers.share import sharing
from varkit.layout import TokenLayout, square_grids
from varkit.registry import Checkpoint, ModelEntry, register_checkpoint, register_model
from varkit.rng import Rng
from varkit.tokenizers.multiscale_vq import Quantized

USAGE_WINDOW = 65536
"""Of how many of the last tokens the released code reports the share of codes used."""


def entropy_loss(affinity: Tensor, temperature: float = 0.01) -> Tensor:
    """Mean entropy of each token's soft choice minus the entropy of the mean choice: low when each token is sure of
    its code and all codes are used (MaskGIT's regulariser).

    Args: affinity: (N, V), higher is nearer.
    """
    scaled = affinity / temperature
    log_p = F.log_softmax(scaled, -1)
    p = log_p.exp()
    mean = p.mean(0)
    return -(p * log_p).sum(-1).mean() + (mean * (mean + 1e-5).log()).sum()


@dataclass
class VQuantized(Quantized):
    """What the quantiser's training forward returns; `loss` is the sum of the three losses."""

    codebook_loss: Tensor
    commitment_loss: Tensor
    entropy_loss: Tensor
    usage: Tensor  # share of the codes among the last 65536 tokens; 0 where it is not tracked


class VectorQuantizer(CodeUsage):
    """The nearest code of each position, by cosine or by Euclidean distance.

    Args:
        normalize_codes: positions and codes are unit vectors (official `codebook_l2_norm`).
        commitment_weight, entropy_weight: of the losses; the codebook loss has weight 1.
        track_usage: keep the last 65536 ids (official `codebook_show_usage`).
    """

    codebook_used: Tensor  # 65536 ids as floats, the latest last; zeros at first, so id 0 counts as used

    def __init__(
        self,
        codebook_size: int,
        dim: int,
        *,
        normalize_codes: bool = True,
        commitment_weight: float = 0.25,
        entropy_weight: float = 0.0,
        track_usage: bool = True,
    ) -> None:
        super().__init__(1, codebook_size)
        self.normalize_codes = normalize_codes
        self.commitment_weight, self.entropy_weight = commitment_weight, entropy_weight
        self.track_usage = track_usage
        self.embedding = nn.Embedding(codebook_size, dim)
        nn.init.uniform_(self.embedding.weight, -1 / codebook_size, 1 / codebook_size)
        if normalize_codes:
            with torch.no_grad():
                self.embedding.weight.copy_(F.normalize(self.embedding.weight, dim=-1))
        if track_usage:
            self.register_buffer("codebook_used", torch.zeros(USAGE_WINDOW))

    @property
    def codes(self) -> Tensor:
        """(V, C): the codes as they are compared and handed on."""
        weight = self.embedding.weight
        return F.normalize(weight, dim=-1) if self.normalize_codes else weight

    @property
    def codebook(self) -> Tensor:
        """(V, C): the trained parameter, not normalised."""
        return self.embedding.weight

    def positions(self, features: Tensor) -> Tensor:
        """(B, C, h, w) -> (N, C) float32, as they are compared with the codes."""
        z = features.float().permute(0, 2, 3, 1).reshape(-1, features.shape[1])
        return F.normalize(z, dim=-1) if self.normalize_codes else z

    def distances(self, z: Tensor) -> Tensor:
        """(N, C) -> (N, V): squared distances."""
        codes = self.codes
        with torch.autocast(z.device.type, enabled=False):
            return z.square().sum(-1, keepdim=True) + codes.square().sum(-1) - 2 * z @ codes.T

    def nearest(self, z: Tensor) -> Tensor:
        """(N, C) -> (N,) ids of the nearest codes; the first of equals."""
        codes = self.codes
        with torch.autocast(z.device.type, enabled=False):
            # |z|^2 is the same for every code, so it plays no part in the minimum.
            return torch.addmm(codes.square().sum(-1), z, codes.T, alpha=-2).argmin(-1)

    def forward(self, features: Tensor) -> VQuantized:
        """Straight-through quantisation of (B, C, h, w) with its losses; float32 inside."""
        z = self.positions(features)
        zero = torch.zeros((), device=z.device)
        entropy = zero
        if self.entropy_weight:
            distances = self.distances(z)
            ids = distances.argmin(-1)
            entropy = self.entropy_weight * entropy_loss(-distances)
        else:
            ids = self.nearest(z)
        codes = F.embedding(ids, self.codes)  # N C
        codebook = F.mse_loss(codes, z.detach())
        commitment = self.commitment_weight * F.mse_loss(z, codes.detach())
        batch, _, height, width = features.shape
        through = (z + (codes - z).detach()).view(batch, height, width, -1).permute(0, 3, 1, 2)  # B C h w
        by_image = ids.view(batch, -1)
        usage = zero
        if self.training:
            self.record_usage([by_image])
            if self.track_usage:
                usage = self.record_window(ids)
        loss = codebook + commitment + entropy
        return VQuantized(through, loss, [by_image], [z.detach()], codebook, commitment, entropy, usage)

    @torch.no_grad()
    def record_window(self, ids: Tensor) -> Tensor:
        """Note the latest ids (N,); returns the share of the codes that are among the last 65536."""
        latest = torch.cat([self.codebook_used, ids.to(self.codebook_used)])[-USAGE_WINDOW:]
        self.codebook_used.copy_(latest)
        return latest.new_tensor(len(latest.unique()) / self.embedding.num_embeddings)


class VQGAN(HubMixin, ModelMixin, ConfigMixin, Tokenizer):
    """Images <-> one grid of ids. The defaults are the released VQ-16 at 256 x 256.

    Args:
        codebook_size, latent_dim: V and C.
        base_channels, channel_multipliers, num_res_blocks, z_channels, dropout: of encoder and decoder; the
            downsampling factor is 2 ** (len(channel_multipliers) - 1).
        image_channels: 3, or 1 for grey images (then `encode` averages the channels and `decode` repeats).
        attention, mid_attention: self-attention at the coarsest level and between the middle blocks.
        patch_size: encoder and decoder see the pixels of each patch of so many a side as channels of one place: their
            finest, dearest level has so much smaller sides, and the downsampling factor is as much larger.
        grid: tokens a side, or (height, width).
        Others: see `VectorQuantizer`.
    Raises: ValueError on an impossible combination, naming both sides.
    """

    _no_split_modules = ("ResnetBlock",)
    _keep_in_fp32_modules: ClassVar[list[str]] = ["quantize"]  # as CodeUsage._apply, when opened with torch_dtype=
    free_arguments = frozenset({"dropout", "commitment_weight", "entropy_weight", "grid"})
    """Constructor arguments that weights do not depend on: what a run that starts from a model may change."""

    @register_to_config
    def __init__(
        self,
        codebook_size: int = 16384,
        latent_dim: int = 8,
        base_channels: int = 128,
        channel_multipliers: Sequence[int] = (1, 1, 2, 2, 4),
        num_res_blocks: int = 2,
        z_channels: int = 256,
        dropout: float = 0.0,
        image_channels: int = 3,
        attention: bool = True,
        mid_attention: bool = True,
        normalize_codes: bool = True,
        commitment_weight: float = 0.25,
        entropy_weight: float = 0.0,
        track_usage: bool = True,
        grid: int | Sequence[int] = 16,
        patch_size: int = 1,
    ) -> None:
        super().__init__()
        if patch_size < 1:
            raise ValueError(f"patch_size must be at least 1; got {patch_size}")
        if any((base_channels * m) % 32 for m in channel_multipliers):
            raise ValueError(
                f"every width base_channels * multiplier must be a multiple of 32 (GroupNorm has 32 groups); "
                f"got {base_channels} * {tuple(channel_multipliers)}"
            )
        if image_channels not in (1, 3):
            raise ValueError(f"image_channels must be 1 (grey) or 3; got {image_channels}")
        self.layout = TokenLayout(square_grids([grid]), codebook_size, latent_dim)
        self.downsampling = patch_size * 2 ** (len(channel_multipliers) - 1)
        backbone: dict[str, Any] = {
            "image_channels": image_channels * patch_size**2,
            "latent_dim": z_channels,
            "base_channels": base_channels,
            "multipliers": tuple(channel_multipliers),
            "num_res_blocks": num_res_blocks,
            "dropout": dropout,
            "attention": attention,
            "mid_attention": mid_attention,
        }
        self.encoder = ConvEncoder(**backbone)
        self.quant_conv = nn.Conv2d(z_channels, latent_dim, 1)
        self.quantize = VectorQuantizer(
            codebook_size,
            latent_dim,
            normalize_codes=normalize_codes,
            commitment_weight=commitment_weight,
            entropy_weight=entropy_weight,
            track_usage=track_usage,
        )
        self.post_quant_conv = nn.Conv2d(latent_dim, z_channels, 1)
        self.decoder = ConvDecoder(**backbone)

    @property
    def image_size(self) -> tuple[int, int]:
        """Height and width of the images that `layout` codes."""
        height, width = self.layout.grids[0]
        return height * self.downsampling, width * self.downsampling

    @property
    def codebook(self) -> Tensor:
        """(V, C) float32; unit vectors where the codes are normalised."""
        return self.quantize.codes

    def features(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) in [-1, 1] -> (B, C, h, w): the encoder's output, before quantisation."""
        if images.dim() != 4 or images.shape[1] != 3:
            raise ValueError(f"images must be (B, 3, H, W) in [-1, 1]; got shape {tuple(images.shape)}")
        if self.config.image_channels == 1:
            images = images.mean(1, keepdim=True)
        if self.config.patch_size > 1:
            images = F.pixel_unshuffle(images, self.config.patch_size)
        images = images.to(self.quant_conv.weight.dtype, memory_format=torch.channels_last)
        return self.quant_conv(self.encoder(images))

    def _grid(self, grid: int | Sequence[int] | None) -> tuple[int, ...]:
        return self.layout.grids[0] if grid is None else square_grids([grid])[0]

    def encode(self, images: Tensor, rng: Rng | None = None, *, grid: int | Sequence[int] | None = None) -> Tensor:
        """(B, 3, H, W) in [-1, 1] -> ids (B, L). `grid` replaces the module's own for other sizes."""
        used = self._grid(grid)
        expected = tuple(side * self.downsampling for side in used)
        if tuple(images.shape[-2:]) != expected:
            raise ValueError(
                f"images are {images.shape[-2]}x{images.shape[-1]} but the grid {used} needs "
                f"{expected[0]}x{expected[1]}; resize the images, or give grid= as their size / {self.downsampling}"
            )
        z = self.quantize.positions(self.features(images))
        return self.quantize.nearest(z).view(len(images), -1)

    def vectors(self, ids: Tensor) -> Tensor:
        return F.embedding(ids, self.codebook)

    def resized(self, grid: tuple[int, int]) -> Self:
        """The same weights at another grid."""
        if tuple(grid) == self.layout.grids[0]:
            return self
        made = sharing(self)
        made.layout = TokenLayout((tuple(grid),), self.layout.codebook_size, self.layout.dim)
        made.register_to_config(grid=tuple(grid))
        return made

    def decode_features(self, latents: Tensor) -> Tensor:
        """Quantised (B, C, h, w) -> images (B, 3, H, W), not clamped."""
        latents = latents.to(self.quant_conv.weight.dtype, memory_format=torch.channels_last)
        images = self.decoder(self.post_quant_conv(latents))
        if self.config.patch_size > 1:
            images = F.pixel_shuffle(images, self.config.patch_size)
        return images.expand(-1, 3, -1, -1) if self.config.image_channels == 1 else images

    def latents(self, tokens: Tensor, grid: int | Sequence[int] | None = None) -> Tensor:
        """Ids (B, L) or vectors (B, L, C) -> (B, C, h, w). Raises ValueError when they do not fill the grid."""
        height, width = self._grid(grid)
        if tokens.shape[1] != height * width:
            raise ValueError(f"{tokens.shape[1]} tokens do not fill the grid {height}x{width}; give grid=")
        vectors = tokens.float() if tokens.is_floating_point() else self.vectors(tokens)
        return vectors.transpose(1, 2).unflatten(2, (height, width))

    def decode(self, tokens: Tensor, rng: Rng | None = None, *, grid: int | Sequence[int] | None = None) -> Tensor:
        """Ids (B, L) or vectors (B, L, C) -> images (B, 3, H, W) in [-1, 1]."""
        return self.decode_features(self.latents(tokens, grid)).clamp(-1, 1)

    def forward(self, images: Tensor) -> tuple[Tensor, VQuantized]:
        """Training: images of any size that the factor divides -> (reconstruction, not clamped; what the quantiser
        did)."""
        quantized = self.quantize(self.features(images))
        return self.decode_features(quantized.features), quantized


def _builder(**preset: Any) -> Callable[..., VQGAN]:
    return lambda **overrides: cast(VQGAN, VQGAN(**{**preset, **overrides}))


TINY = {
    "codebook_size": 24,
    "latent_dim": 4,
    "base_channels": 32,
    "channel_multipliers": (1, 1),
    "num_res_blocks": 1,
    "z_channels": 8,
    "grid": 4,
}
"""Overrides that make any of these small enough for a test."""

_SMALL: dict[str, Any] = {"num_res_blocks": 1, "z_channels": 64, "grid": 8}
PRESETS: dict[str, tuple[dict[str, Any], str]] = {
    "vq_ds16": ({}, "LlamaGen's tokenizer at 256x256: f16, 16384 codes of 8 numbers, 256 tokens"),
    "vq_ds8": (
        {"channel_multipliers": (1, 2, 2, 4), "grid": 32},
        "LlamaGen's finer tokenizer at 256x256: f8, 16384 codes of 8 numbers, 1024 tokens",
    ),
    "vq_f8_64": (
        {"codebook_size": 1024, "base_channels": 64, "channel_multipliers": (1, 2, 2, 4), **_SMALL},
        "a small one for 64x64 images: f8, 1024 codes, 64 tokens",
    ),
    "vq_emoji": (
        {
            "codebook_size": 1024,
            "base_channels": 32,
            "channel_multipliers": (1, 2, 3),
            "num_res_blocks": 1,
            "z_channels": 64,
            "attention": False,
            "grid": 8,
            "patch_size": 2,
        },
        "drawings of 64x64 pixels: f8, 1024 codes, 64 tokens, cheap enough for one CPU core",
    ),
    "vq_fashion": (
        {
            "codebook_size": 512,
            "base_channels": 32,
            "channel_multipliers": (1, 1, 2),
            "image_channels": 1,
            "attention": False,
            "mid_attention": False,
            **_SMALL,
        },
        "Fashion-MNIST at 32x32: f4, 512 codes, 64 tokens",
    ),
}
for _name, (_preset, _summary) in PRESETS.items():
    register_model(ModelEntry(_name, "tokenizer", _builder(**_preset), _summary, tiny=TINY))

for _name, _repo, _file, _score in (
    ("vq_ds16.in1k", "FoundationVision/LlamaGen", "vq_ds16_c2i.pt", "rFID 2.19 at 256x256 on ImageNet val (README)"),
    ("vq_ds8.in1k", "FoundationVision/LlamaGen", "vq_ds8_c2i.pt", "rFID 0.59 at 256x256 on ImageNet val (README)"),
    ("vq_ds16.t2i", "peizesun/llamagen_t2i", "vq_ds16_t2i.pt", "none published"),
):
    register_checkpoint(
        Checkpoint(
            name=_name,
            repo_id=_repo,
            filename=_file,
            licence="MIT",
            paper="arXiv 2406.06525",
            resolution=256,
            official_score=_score,
        )
    )
