"""LARP: a clip as 1024 tokens without a place, which a prior made easy to predict in turn (Wang et al., arXiv
2410.21264).

Source: hywang66/LARP: models/larp_tokenizer.py, models/bottleneck.py, models/embed.py (8aaed63). Parameter names are
those of the released files. What differs: clips lie in [-1, 1] outside and in [0, 1] inside; codes are drawn by keyed
random numbers, and only where an rng is given; whatever the module is cast to, codes are compared in float32.

Shapes: B batch, T frames, n latent tokens, P patches of a clip (t h w of them), C latent_dim, D width, V codebook.
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
from varkit.layers.share import sharing
from varkit.layers.vit import Block
from varkit.layout import TokenLayout
from varkit.registry import Checkpoint, ModelEntry, register_checkpoint, register_model
from varkit.rng import Draw, Rng, pick
from varkit.tokenizers.larp_prior import LARPPrior, PriorRounds
from varkit.tokenizers.maskgit_vqgan import Codebook

BLOCK_EPS = 1e-5
"""Of the blocks' norms: what timm had when the weights were made."""


def sincos(positions: Tensor, dim: int) -> Tensor:
    """(n,) -> (n, dim) float32: sines, then cosines, of dim / 2 frequencies from 1 down to 1 / 10000."""
    frequencies = 10000.0 ** -(torch.arange(dim // 2, dtype=torch.float64) / (dim / 2))
    angles = positions.double()[:, None] * frequencies
    return torch.cat([angles.sin(), angles.cos()], 1).float()


def clip_positions(grid: Sequence[int], dim: int) -> Tensor:
    """(1, P, dim) of a grid (t, h, w): half for the column, half for the row, plus the frame over all of them."""
    t, h, w = grid
    space = torch.cat(
        [sincos(torch.arange(w).repeat(h), dim // 2), sincos(torch.arange(h).repeat_interleave(w), dim // 2)], 1
    )
    return (sincos(torch.arange(t), dim)[:, None] + space).reshape(1, -1, dim)


@dataclass
class Quantized:
    """vectors (B, n, C) float32, straight-through to the encoder; ids (B, n); both losses without their weights, and
    `loss` with them; the unit features (B, n, C) that were coded, without gradient."""

    vectors: Tensor
    ids: Tensor
    commitment_loss: Tensor
    codebook_loss: Tensor
    loss: Tensor
    features: Tensor


@dataclass
class Reconstruction:
    """What a training forward gives: clips (B, 3, T, H, W) in [-1, 1], not clamped; what the quantiser did."""

    clips: Tensor
    code: Quantized


class StochasticQuantizer(Codebook):
    """One of V unit vectors: drawn with probability softmax(cosine / temperature), or the nearest (SVQ).

    Args: temperature: of the draw.   commitment_weight, codebook_weight: of the two losses.
    """

    def __init__(
        self, size: int, dim: int, temperature: float, commitment_weight: float, codebook_weight: float
    ) -> None:
        super().__init__(size, dim)
        nn.init.normal_(self.embedding.weight)
        self.temperature = temperature
        self.commitment_weight, self.codebook_weight = commitment_weight, codebook_weight

    @property
    def codebook(self) -> Tensor:
        """(V, C) float32 unit vectors."""
        return F.normalize(self.embedding.weight, dim=-1)

    def cosines(self, z: Tensor) -> Tensor:
        """Unit vectors (B, n, C) float32 -> (B, n, V)."""
        with torch.autocast(z.device.type, enabled=False):
            return z @ self.codebook.T

    def probs(self, z: Tensor) -> Tensor:
        """Unit vectors (B, n, C) -> (B, n, V): how likely each code is drawn."""
        return (self.cosines(z) / self.temperature).softmax(-1)

    @torch.no_grad()
    def ids(self, z: Tensor, rng: Rng | None) -> Tensor:
        """Unit vectors (B, n, C) -> (B, n): drawn with `rng` (`Draw.CODE`), the nearest without."""
        if rng is None:
            return self.cosines(z).argmax(-1)
        places = torch.arange(z.shape[1], device=z.device)
        return pick(self.probs(z), rng.to(z.device).uniform(places, Draw.CODE))

    def forward(self, z: Tensor, rng: Rng | None) -> Quantized:
        """Unit vectors (B, n, C) float32 -> what they become, and the losses."""
        ids = self.ids(z, rng)
        codes = F.embedding(ids, self.codebook)
        commitment, codebook = F.mse_loss(z, codes.detach()), F.mse_loss(codes, z.detach())
        loss = self.commitment_weight * commitment + self.codebook_weight * codebook
        return Quantized(z + (codes - z).detach(), ids, commitment, codebook, loss, z.detach())


class Bottleneck(nn.Module):
    """Linear layers around the quantiser."""

    def __init__(self, in_dim: int, out_dim: int, quantizer: StochasticQuantizer) -> None:
        super().__init__()
        dim = quantizer.embedding.embedding_dim
        self.in_linear, self.out_linear = nn.Linear(in_dim, dim), nn.Linear(dim, out_dim)
        self.regularizer = quantizer


class Trunk(nn.Module):
    """`depth` ViT blocks without a bias at queries, keys and values."""

    def __init__(self, width: int, depth: int, num_heads: int) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(
            Block(width, num_heads, 4 * width, 0.0, 0.0, BLOCK_EPS, qkv_bias=False) for _ in range(depth)
        )

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return x


class FinalLayer(nn.Module):
    """To the pixels of a patch; its linear layer starts at zero."""

    def __init__(self, width: int, out: int) -> None:
        super().__init__()
        self.norm_final = nn.LayerNorm(width, 1e-6)
        self.linear = nn.Linear(width, out)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(self.norm_final(x))


class LARPTokenizer(HubMixin, ModelMixin, ConfigMixin, Tokenizer):
    """Clips <-> tokens that each see the whole clip. The defaults are the released LARP-L-long.

    Without an rng `encode` takes the nearest codes, as the generators were trained; with one it draws them.

    Args:
        num_tokens: n.   codebook_size, latent_dim: V and C.
        num_frames, resolution: of a clip: frames, and pixels a side.   frame_patch, patch: what one patch covers.
        encoder_size, decoder_size: width, layers and heads of the two transformers.
        temperature, commitment_weight, codebook_weight: see `StochasticQuantizer`.
        prior_size: width, layers and heads of the prior; None is a tokenizer without one, which cannot be trained on.
        prior_length, prior_dropout, prior_temperature: see `LARPPrior`.
        official_quirks: the prior drops attention weights in eval mode too, as in the release.
    Raises: ValueError on an impossible combination.
    Attributes: lr_scales: factors of the learning rate by name of a part, which an objective may set.
    """

    _no_split_modules = ("Block", "PriorBlock")
    _keep_in_fp32_modules: ClassVar[list[str]] = ["regularizer"]  # as Codebook._apply, when opened with torch_dtype=
    free_arguments = frozenset(
        {"temperature", "commitment_weight", "codebook_weight", "prior_dropout", "prior_temperature", "official_quirks"}
    )
    """Constructor arguments that no weight depends on."""

    encoder_patch_pe: Tensor  # 1 P D
    decoder_latent_pe: Tensor  # 1 n D
    decoder_patch_query_embed: Tensor  # 1 P D

    @register_to_config
    def __init__(
        self,
        num_tokens: int = 1024,
        codebook_size: int = 8192,
        latent_dim: int = 16,
        num_frames: int = 16,
        resolution: int = 128,
        frame_patch: int = 4,
        patch: int = 8,
        encoder_size: Sequence[int] = (768, 12, 12),
        decoder_size: Sequence[int] = (768, 12, 12),
        temperature: float = 0.03,
        commitment_weight: float = 0.25,
        codebook_weight: float = 1.0,
        prior_size: Sequence[int] | None = (384, 12, 6),
        prior_length: int = 1024,
        prior_dropout: float = 0.1,
        prior_temperature: float = 1.0,
        official_quirks: bool = False,
    ) -> None:
        super().__init__()
        if resolution % patch or num_frames % frame_patch:
            raise ValueError(
                f"patches of {frame_patch} frames and {patch} pixels must fill a clip of {num_frames} frames and "
                f"{resolution} pixels a side"
            )
        sizes = {"encoder_size": encoder_size, "decoder_size": decoder_size, "prior_size": prior_size}
        for name, size in sizes.items():
            if size is not None and (size[0] % size[2] or size[0] % 4):
                raise ValueError(f"{name}: the width {size[0]} must be a multiple of its {size[2]} heads and of 4")
        if prior_size is not None and prior_length < num_tokens:
            raise ValueError(f"the prior has positions for {prior_length} tokens; a clip has {num_tokens}")
        self.layout = TokenLayout(((num_tokens,),), codebook_size, latent_dim)
        self.num_frames = num_frames
        self.lr_scales: dict[str, float] = {}
        self.grid = (num_frames // frame_patch, resolution // patch, resolution // patch)
        width, out_width = encoder_size[0], decoder_size[0]
        kernel = (frame_patch, patch, patch)
        self.x_embedder: Any = nn.Module()
        self.x_embedder.proj = nn.Conv3d(3, width, kernel, stride=kernel)
        self.register_buffer("encoder_patch_pe", clip_positions(self.grid, width))
        self.encoder_latent_query_embed = nn.Parameter(torch.empty(num_tokens, width))
        self.encoder = Trunk(*encoder_size)
        quantizer = StochasticQuantizer(codebook_size, latent_dim, temperature, commitment_weight, codebook_weight)
        self.bottleneck = Bottleneck(width, out_width, quantizer)
        self.register_buffer("decoder_latent_pe", sincos(torch.arange(num_tokens), out_width)[None])
        self.register_buffer("decoder_patch_query_embed", clip_positions(self.grid, out_width))
        self.decoder_patch_query_token_type_embed = nn.Parameter(torch.empty(1, 1, out_width))
        self.decoder = Trunk(*decoder_size)
        self.final_layer = FinalLayer(out_width, 3 * frame_patch * patch**2)
        self.prior_model = None
        if prior_size is not None:
            rest = (prior_length, prior_dropout, prior_temperature, official_quirks)
            self.prior_model = LARPPrior(latent_dim, *prior_size, *rest)
        self.init_weights()

    @torch.no_grad()
    def init_weights(self) -> None:
        """Queries normal of std 0.02; linear layers outside the prior Xavier-uniform with biases 0, the last one 0."""
        nn.init.normal_(self.encoder_latent_query_embed, std=0.02)
        nn.init.normal_(self.decoder_patch_query_token_type_embed, std=0.02)
        linears = [m for part in (self.encoder, self.decoder, self.bottleneck) for m in part.modules()]
        for module in [*linears, self.x_embedder.proj]:
            if isinstance(module, nn.Linear | nn.Conv3d):
                nn.init.xavier_uniform_(module.weight.view(len(module.weight), -1))
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        nn.init.zeros_(self.final_layer.linear.weight)
        nn.init.zeros_(self.final_layer.linear.bias)

    @property
    def image_size(self) -> tuple[int, int]:
        return self.config.resolution, self.config.resolution

    @property
    def quantize(self) -> StochasticQuantizer:
        return self.bottleneck.regularizer

    @property
    def codebook(self) -> Tensor:
        """(V, C) float32 unit vectors."""
        return self.quantize.codebook

    def shortened(self, num_frames: int) -> Self:
        """The same network, with the same weights, for clips of fewer frames, which take as many tokens.

        Raises: ValueError unless the frames are whole patches, at most those of the config.
        """
        step, most = self.config.frame_patch, self.config.num_frames
        if num_frames % step or not 0 < num_frames <= most:
            raise ValueError(
                f"this model codes clips of {step} to {most} frames, a multiple of {step}; got {num_frames}"
            )
        made = sharing(self)
        made.num_frames, made.grid = num_frames, (num_frames // step, *self.grid[1:])
        return made

    # ---- encoding -----------------------------------------------------------------------------------------

    def project(self, clips: Tensor) -> Tensor:
        """(B, 3, T, H, W) in [-1, 1] -> (B, n, C) float32. Raises ValueError on another size."""
        expected = (3, self.num_frames, *self.image_size)
        if clips.dim() != 5 or tuple(clips.shape[1:]) != expected:
            raise ValueError(
                f"clips must be (B, {', '.join(map(str, expected))}) in [-1, 1], {self.num_frames} frames; got "
                f"{tuple(clips.shape)}"
            )
        clips = clips.mul(0.5).add(0.5).to(self.encoder_latent_query_embed.dtype)
        x = self.x_embedder.proj(clips).flatten(2).transpose(1, 2)  # B P D
        x = x + self.encoder_patch_pe[:, : x.shape[1]]
        queries = self.encoder_latent_query_embed.expand(len(x), -1, -1)
        x = self.encoder(torch.cat([x, queries], 1))[:, -queries.shape[1] :]
        return self.bottleneck.in_linear(x).float()

    def features(self, clips: Tensor) -> Tensor:
        """As `project`, unit vectors, as they are compared with the codes."""
        return F.normalize(self.project(clips), dim=-1)

    def encode(self, images: Tensor, rng: Rng | None = None) -> Tensor:
        """Clips (B, 3, T, H, W) in [-1, 1] -> ids (B, n): the nearest, or, with an rng, drawn. Raises ValueError on
        another size."""
        return self.quantize.ids(self.features(images), rng)

    # ---- decoding -----------------------------------------------------------------------------------------

    def vectors(self, ids: Tensor) -> Tensor:
        return F.embedding(ids, self.codebook)

    def decode_vectors(self, vectors: Tensor) -> Tensor:
        """(B, n, C) -> clips (B, 3, T, H, W) in [-1, 1], not clamped."""
        if vectors.shape[1] != self.layout.length:
            raise ValueError(
                f"got {vectors.shape[1]} tokens; a clip has {self.layout.length}, and all of them are needed"
            )
        latents = self.bottleneck.out_linear(vectors.to(self.encoder_latent_query_embed.dtype))
        latents = latents + self.decoder_latent_pe
        t, h, w = self.grid
        queries = self.decoder_patch_query_embed[:, : t * h * w] + self.decoder_patch_query_token_type_embed
        x = self.decoder(torch.cat([latents, queries.expand(len(latents), -1, -1)], 1))[:, -t * h * w :]
        x = self.final_layer(x)
        x = x.unflatten(2, (self.config.frame_patch, self.config.patch, self.config.patch, 3)).unflatten(1, (t, h, w))
        return x.permute(0, 7, 1, 4, 2, 5, 3, 6).reshape(len(x), 3, self.num_frames, *self.image_size).mul(2).sub(1)

    def decode(self, tokens: Tensor, rng: Rng | None = None) -> Tensor:
        """Ids (B, n) or vectors (B, n, C) -> clips (B, 3, T, H, W) in [-1, 1]."""
        return self.decode_vectors(tokens if tokens.is_floating_point() else self.vectors(tokens)).clamp(-1, 1)

    # ---- training -----------------------------------------------------------------------------------------

    def forward(self, clips: Tensor, rng: Rng | None = None) -> Reconstruction:
        """Args: rng: by which codes are drawn; None takes the nearest."""
        code = self.quantize(self.features(clips), rng)
        return Reconstruction(self.decode_vectors(code.vectors), code)

    def prior_rounds(self, code: Quantized, ratio: float, rng: Rng) -> PriorRounds:
        """What the prior says of the tokens; its loss has a gradient to the encoder through the vectors that it reads.

        Args: ratio: how often the second round reads the prior's own token; see `own_token_ratio`.
        Raises: ValueError for a tokenizer without a prior.
        """
        if self.prior_model is None:
            raise ValueError("this tokenizer has no prior (prior_size=None): the release's file may hold none")
        rng, places = rng.to(code.ids.device), torch.arange(1, self.layout.length, device=code.ids.device)
        u = rng.uniform(places, Draw.TOKEN)

        def draw(logits: Tensor) -> Tensor:
            return pick(logits.softmax(-1), u)

        replaced = rng.uniform(places, Draw.OWN_TOKEN) < ratio
        return self.prior_model.rounds(code.vectors, code.ids, self.codebook, replaced, draw)


def _builder(**preset: Any) -> Callable[..., LARPTokenizer]:
    return lambda **overrides: cast(LARPTokenizer, LARPTokenizer(**{**preset, **overrides}))


TINY: dict[str, Any] = {
    "num_tokens": 6,
    "codebook_size": 24,
    "latent_dim": 4,
    "num_frames": 4,
    "resolution": 16,
    "frame_patch": 2,
    "encoder_size": (32, 2, 2),
    "decoder_size": (32, 2, 2),
    "prior_size": (16, 1, 2),
    "prior_length": 6,
}
"""Overrides that make any of these small enough for a test."""

_PRESETS: dict[str, tuple[dict[str, Any], str]] = {
    "larp_tokenizer_l_long": (
        {},
        "LARP-L-long: clips of 16 frames at 128x128 as 1024 tokens of 8192 codes, 172 M parameters and a prior of 22 M",
    ),
    "larp_tokenizer_moving_fashion": (
        {
            "num_tokens": 64,
            "codebook_size": 512,
            "latent_dim": 8,
            "resolution": 32,
            "encoder_size": (192, 4, 6),
            "decoder_size": (192, 4, 6),
            "prior_size": (96, 2, 3),
            "prior_length": 64,
        },
        "a small one for clips of 16 frames at 32x32: 64 tokens of 512 codes, 3.9 M parameters and a prior of 0.2 M",
    ),
}
for _name, (_preset, _summary) in _PRESETS.items():
    register_model(ModelEntry(_name, "tokenizer", _builder(**_preset), _summary, tiny=TINY))

register_checkpoint(
    Checkpoint(
        name="larp_tokenizer_l_long.k600_ucf101",
        repo_id="hywang66/LARP-L-long-tokenizer",
        filename="model.safetensors",
        licence="MIT",
        paper="arXiv 2410.21264",
        resolution=128,
        official_score="rFVD 20 on UCF-101, 16 frames (README)",
    )
)
