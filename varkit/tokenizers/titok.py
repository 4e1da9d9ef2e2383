"""TiTok and TA-TiTok: images as 32 to 256 tokens without a place (Yu et al., arXiv 2406.07550; Kim et al., 2501.07730).

Source: bytedance/1d-tokenizer: modeling/titok.py, tatitok.py, modules/blocks.py, quantizer/quantizer.py (942a96f).
Parameter names are those of the released files. What differs: images lie in [-1, 1] outside and in [0, 1] inside;
whatever the module is cast to, tokens are found in float32; the legacy models always hold the VQGAN that paints.

Shapes: B batch, N latent tokens, C latent_dim, D width, P patches (h w of them), V codebook, T text entries.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, cast

import torch
import torch.distributed as dist
import torch.nn.functional as F
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.modeling_utils import ModelMixin
from torch import Tensor, nn

from varkit.hub import HubMixin
from varkit.interfaces import Tokenizer
from varkit.layout import TokenLayout
from varkit.registry import Checkpoint, ModelEntry, register_checkpoint, register_model
from varkit.rng import Draw, Rng
from varkit.tokenizers.maskgit_vqgan import Codebook, Decoder

USAGE_DECAY = 0.99  # of the moving average by which a clustering codebook knows its dead codes


@dataclass
class Quantized:
    """vectors (B, N, C) float32, straight-through to the encoder; ids (B, N); losses of the codebook; the features
    (B, N, C) that were coded, without gradient."""

    vectors: Tensor
    ids: Tensor
    commitment_loss: Tensor
    codebook_loss: Tensor
    features: Tensor

    @property
    def loss(self) -> Tensor:
        return self.commitment_loss + self.codebook_loss


@dataclass
class Posterior:
    """The Gaussian of a KL model: mean and logvar (B, N, C) float32."""

    mean: Tensor
    logvar: Tensor

    def sample(self, noise: Tensor) -> Tensor:
        """noise: standard normal, (B, N, C)."""
        return self.mean + (self.logvar / 2).exp() * noise

    def kl(self) -> Tensor:
        """(B, N): the divergence from a standard normal, summed over channels."""
        return 0.5 * (self.mean.square() + self.logvar.exp() - 1 - self.logvar).sum(-1)


@dataclass
class Reconstruction:
    """What a training forward gives.

    images: (B, 3, H, W), not clamped.   proxy_logits: (B, codes, h, w) of a legacy model.
    code: what the bottleneck did.
    """

    images: Tensor
    proxy_logits: Tensor | None
    code: Quantized | Posterior


class Quantizer(Codebook):
    """Nearest of V codes.

    Args:
        normalize: compare and hand on unit vectors.
        clustering: in training, pull rarely used codes to the features nearest to them (CVQ-VAE): in each forward that
            takes a gradient, unless `defer_clustering` leaves it to whoever calls `revive`.
    """

    embed_prob: Tensor  # V: moving average of how often each code is used

    def __init__(self, size: int, dim: int, commitment_weight: float, normalize: bool, clustering: bool) -> None:
        super().__init__(size, dim)
        self.commitment_weight, self.normalize, self.clustering = commitment_weight, normalize, clustering
        self.defer_clustering = False
        if clustering:
            self.register_buffer("embed_prob", torch.zeros(size))

    @property
    def codebook(self) -> Tensor:
        """(V, C) float32, as they are handed on."""
        codes = self.embedding.weight
        return F.normalize(codes, dim=-1) if self.normalize else codes

    def distances(self, z: Tensor) -> Tensor:
        """(M, C) float32 -> (M, V): squared, up to |z|^2, which is the same for every code."""
        codes = self.codebook
        z = F.normalize(z, dim=-1) if self.normalize else z
        return torch.addmm(codes.square().sum(-1), z, codes.T, alpha=-2)

    def forward(self, z: Tensor) -> Quantized:
        """(B, N, C) -> what it becomes, and the losses."""
        with torch.autocast(z.device.type, enabled=False):
            z = z.float()
            ids = self.distances(z.detach().flatten(0, 1)).argmin(-1).view(z.shape[:-1])
            raw, codes = z, self.codebook[ids]
            if self.normalize:
                z = F.normalize(z, dim=-1)
            commitment = self.commitment_weight * F.mse_loss(z, codes.detach())
            codebook = F.mse_loss(codes, z.detach())
            if self.clustering and self.training and torch.is_grad_enabled() and not self.defer_clustering:
                self.revive(raw.detach().flatten(0, 1))
            return Quantized(z + (codes - z).detach(), ids, commitment, codebook, raw.detach())

    @torch.no_grad()
    def revive(self, z: Tensor) -> None:
        """Pull each code towards the one of the features (M, C) of all processes that lies nearest to it: fully where
        the code is never used, not at all where it is used as often as others."""
        if dist.is_available() and dist.is_initialized():
            parts = [torch.empty_like(z) for _ in range(dist.get_world_size())]
            dist.all_gather(parts, z.contiguous())
            z = torch.cat(parts)
        size = self.embedding.num_embeddings
        unit = F.normalize(z, dim=-1) if self.normalize else z
        distances = self.distances(z) + unit.square().sum(-1, keepdim=True)
        used = torch.bincount(distances.argmin(1), minlength=size).float() / len(z)
        self.embed_prob.lerp_(used, 1 - USAGE_DECAY)
        pull = torch.exp(-10 * size * self.embed_prob / (1 - USAGE_DECAY) - 1e-3)[:, None]
        self.embedding.weight.data.lerp_(z[distances.argmin(0)], pull)


class SelfAttention(nn.Module):
    """torch's MultiheadAttention by its parameter names."""

    def __init__(self, dim: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.in_proj_weight = nn.Parameter(torch.empty(3 * dim, dim))
        self.in_proj_bias = nn.Parameter(torch.zeros(3 * dim))
        self.out_proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        qkv = F.linear(x, self.in_proj_weight, self.in_proj_bias)
        q, k, v = qkv.unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)  # B H S D each
        return self.out_proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class FeedForward(nn.Module):
    def __init__(self, dim: int) -> None:
        super().__init__()
        self.c_fc = nn.Linear(dim, 4 * dim)
        self.c_proj = nn.Linear(4 * dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.c_proj(F.gelu(self.c_fc(x)))


class Block(nn.Module):
    def __init__(self, dim: int, num_heads: int) -> None:
        super().__init__()
        self.ln_1 = nn.LayerNorm(dim)
        self.attn = SelfAttention(dim, num_heads)
        self.ln_2 = nn.LayerNorm(dim)
        self.mlp = FeedForward(dim)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.ln_1(x))
        return x + self.mlp(self.ln_2(x))


def table(rows: int, dim: int) -> nn.Parameter:
    return nn.Parameter(torch.randn(rows, dim) * dim**-0.5)


class TiTokEncoder(nn.Module):
    """(B, channels, H, W) in [0, 1] and latent tokens (N, D) -> (B, out_dim, 1, N).

    Args:
        size: width, layers and heads.
        legacy: reshape the (N, D) outputs to (D, N) without transposing them, as the first releases do.
    """

    def __init__(
        self,
        channels: int,
        patch: int,
        patches: int,
        tokens: int,
        size: Sequence[int],
        out_dim: int,
        legacy: bool,
    ) -> None:
        super().__init__()
        width, depth, heads = size
        self.legacy = legacy
        self.patch_embed = nn.Conv2d(channels, width, patch, stride=patch)
        self.class_embedding = table(1, width)
        self.positional_embedding = table(patches + 1, width)
        self.latent_token_positional_embedding = table(tokens, width)
        self.ln_pre = nn.LayerNorm(width)
        self.transformer = nn.ModuleList(Block(width, heads) for _ in range(depth))
        self.ln_post = nn.LayerNorm(width)
        self.conv_out = nn.Conv2d(width, out_dim, 1)

    def forward(self, images: Tensor, latent_tokens: Tensor) -> Tensor:
        x = self.patch_embed(images).flatten(2).transpose(1, 2)  # B P D
        batch, count = len(x), len(latent_tokens)
        x = torch.cat([self.class_embedding.expand(batch, -1, -1), x], 1) + self.positional_embedding
        latents = (latent_tokens + self.latent_token_positional_embedding).expand(batch, -1, -1)
        x = self.ln_pre(torch.cat([x, latents], 1))
        for block in self.transformer:
            x = block(x)
        x = self.ln_post(x[:, -count:])  # B N D
        x = x.reshape(batch, -1, count) if self.legacy else x.transpose(1, 2)  # B D N
        return self.conv_out(x[..., None]).reshape(batch, -1, 1, count)


class TiTokDecoder(nn.Module):
    """Latents (B, C, 1, N), and a text's features (B, T, text_dim) -> (B, out, h, w) or (B, channels, H, W).

    Args:
        size: width, layers and heads.
        legacy: give logits over the codes of a VQGAN, `channels` of them a patch, instead of pixels.
        text_length, text_dim: of the features; length 0 is a decoder that reads none.
    """

    def __init__(
        self,
        channels: int,
        patch: int,
        grid: tuple[int, int],
        tokens: int,
        latent_dim: int,
        size: Sequence[int],
        legacy: bool,
        text_length: int = 0,
        text_dim: int = 768,
    ) -> None:
        super().__init__()
        width, depth, heads = size
        self.grid, self.patch, self.legacy = grid, patch, legacy
        patches = grid[0] * grid[1]
        self.decoder_embed = nn.Linear(latent_dim, width)
        self.class_embedding = table(1, width)
        self.positional_embedding = table(patches + 1, width)
        self.mask_token = nn.Parameter(torch.randn(1, 1, width) * width**-0.5)
        self.latent_token_positional_embedding = table(tokens, width)
        if text_length:
            self.text_guidance_proj = nn.Linear(text_dim, width)
            self.text_guidance_positional_embedding = table(text_length, width)
        self.ln_pre = nn.LayerNorm(width)
        self.transformer = nn.ModuleList(Block(width, heads) for _ in range(depth))
        self.ln_post = nn.LayerNorm(width)
        if legacy:
            self.ffn = nn.Sequential(nn.Conv2d(width, 2 * width, 1), nn.Tanh(), nn.Conv2d(2 * width, channels, 1))
        else:
            self.ffn = nn.Sequential(nn.Conv2d(width, patch * patch * channels, 1))
            self.conv_out = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, z: Tensor, text: Tensor | None = None) -> Tensor:
        latents = self.decoder_embed(z.flatten(2).transpose(1, 2)) + self.latent_token_positional_embedding
        batch, patches = len(latents), self.grid[0] * self.grid[1]
        masks = self.mask_token.expand(batch, patches, -1)
        x = torch.cat([self.class_embedding.expand(batch, -1, -1), masks], 1) + self.positional_embedding
        parts = [x, latents]
        if text is not None:
            parts.append(self.text_guidance_proj(text) + self.text_guidance_positional_embedding)
        x = self.ln_pre(torch.cat(parts, 1))
        for block in self.transformer:
            x = block(x)
        x = self.ln_post(x[:, 1 : 1 + patches])
        x = self.ffn(x.transpose(1, 2).unflatten(2, self.grid))
        if self.legacy:
            return x
        p, (h, w) = self.patch, self.grid
        pixels = x.view(batch, p, p, -1, h, w).permute(0, 3, 4, 1, 5, 2).reshape(batch, -1, h * p, w * p)
        return self.conv_out(pixels)


class TiTok(HubMixin, ModelMixin, ConfigMixin, Tokenizer):
    """Images <-> a short sequence of codes, or of latents. The defaults are the released TiTok-BL-64 with 8192 codes.

    Args:
        num_tokens: N.
        codebook_size, latent_dim: V and C; codebook_size None is the KL model, whose tokens are latents.
        resolution, patch: sides of image and patch.   image_channels: 3, or 1 for grey images.
        encoder_size, decoder_size: width, layers and heads of the two transformers.
        normalize_codes, clustering, commitment_weight: see `Quantizer`.
        legacy: the two-stage models, which reshape without transposing and decode through a MaskGIT VQGAN's codes.
        proxy_codes, proxy_dim, proxy_channels, proxy_multipliers, proxy_blocks: of that VQGAN.
        text_length, text_dim: of the features that a text-aware decoder reads; length 0 is one that reads none.
    Raises: ValueError on an impossible combination.
    """

    _no_split_modules = ("Block",)
    _keep_in_fp32_modules: ClassVar[list[str]] = ["quantize"]  # as Codebook._apply, when opened with torch_dtype=
    free_arguments = frozenset({"commitment_weight"})
    """Constructor arguments that no weight depends on."""

    @register_to_config
    def __init__(
        self,
        num_tokens: int = 64,
        codebook_size: int | None = 8192,
        latent_dim: int = 64,
        resolution: int = 256,
        patch: int = 16,
        image_channels: int = 3,
        encoder_size: Sequence[int] = (768, 12, 12),
        decoder_size: Sequence[int] = (1024, 24, 16),
        normalize_codes: bool = False,
        clustering: bool = False,
        commitment_weight: float = 0.25,
        legacy: bool = False,
        proxy_codes: int = 1024,
        proxy_dim: int = 256,
        proxy_channels: int = 128,
        proxy_multipliers: Sequence[int] = (1, 1, 2, 2, 4),
        proxy_blocks: int = 2,
        text_length: int = 0,
        text_dim: int = 768,
    ) -> None:
        super().__init__()
        if resolution % patch:
            raise ValueError(f"resolution {resolution} must be a multiple of patch {patch}")
        for name, (width, _, heads) in (("encoder", encoder_size), ("decoder", decoder_size)):
            if width % heads:
                raise ValueError(f"the width of the {name}, {width}, must be a multiple of its {heads} heads")
        if legacy and (codebook_size is None or image_channels != 3 or 2 ** (len(proxy_multipliers) - 1) != patch):
            raise ValueError(
                f"a legacy model codes RGB images, and its VQGAN makes patches of 2 ** (levels - 1) pixels; got "
                f"codebook_size {codebook_size}, image_channels {image_channels}, patch {patch}, "
                f"{len(proxy_multipliers)} levels"
            )
        if image_channels not in (1, 3):
            raise ValueError(f"image_channels must be 1 (grey) or 3; got {image_channels}")
        self.layout = TokenLayout(((num_tokens,),), codebook_size, latent_dim)
        side = resolution // patch
        out_dim = latent_dim if codebook_size else 2 * latent_dim
        self.latent_tokens = table(num_tokens, encoder_size[0])
        self.encoder = TiTokEncoder(image_channels, patch, side * side, num_tokens, encoder_size, out_dim, legacy)
        if codebook_size is not None:
            self.quantize = Quantizer(codebook_size, latent_dim, commitment_weight, normalize_codes, clustering)
        channels = proxy_codes if legacy else image_channels
        grid = (side, side)
        self.decoder = TiTokDecoder(
            channels, patch, grid, num_tokens, latent_dim, decoder_size, legacy, text_length, text_dim
        )
        if legacy:
            widths = [proxy_channels * m for m in proxy_multipliers]
            self.pixel_quantize = Codebook(proxy_codes, proxy_dim)
            self.pixel_decoder = Decoder(3, proxy_dim, widths, proxy_blocks, 0.0)
        self.init_weights()

    @torch.no_grad()
    def init_weights(self) -> None:
        """Linear layers and convolutions of the transformers: truncated normal of std 0.02, biases 0."""
        for part in (self.encoder, self.decoder):
            for name, parameter in part.named_parameters():
                if name.endswith("in_proj_weight"):
                    nn.init.trunc_normal_(parameter, std=0.02)
            for module in part.modules():
                if isinstance(module, nn.Linear | nn.Conv2d):
                    nn.init.trunc_normal_(module.weight, std=0.02)
                    if module.bias is not None:
                        nn.init.zeros_(module.bias)

    @property
    def image_size(self) -> tuple[int, int]:
        return self.config.resolution, self.config.resolution

    @property
    def codebook(self) -> Tensor:
        """(V, C) float32. Raises ValueError for a KL model, which has none."""
        if self.layout.codebook_size is None:
            raise ValueError("this TiTok's tokens are latents, which no codebook lists")
        return self.quantize.codebook

    # ---- encoding -----------------------------------------------------------------------------------------

    def features(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) in [-1, 1] -> (B, N, C) float32, or (B, N, 2 C) of a KL model: what the bottleneck is given."""
        side = self.config.resolution
        if images.dim() != 4 or tuple(images.shape[1:]) != (3, side, side):
            raise ValueError(f"images must be (B, 3, {side}, {side}) in [-1, 1]; got shape {tuple(images.shape)}")
        if self.config.image_channels == 1:
            images = images.mean(1, keepdim=True)
        images = images.mul(0.5).add(0.5).to(self.latent_tokens.dtype)
        return self.encoder(images, self.latent_tokens).squeeze(2).transpose(1, 2).float()

    def posterior(self, images: Tensor) -> Posterior:
        """Of a KL model."""
        mean, logvar = self.features(images).chunk(2, -1)
        return Posterior(mean, logvar.clamp(-30, 20))

    def encode(self, images: Tensor, rng: Rng | None = None) -> Tensor:
        """-> ids (B, N); of a KL model latents (B, N, C): drawn with `rng`, the mean without it."""
        if self.layout.codebook_size is not None:
            z = self.features(images)
            return self.quantize.distances(z.flatten(0, 1)).argmin(-1).view(z.shape[:-1])
        posterior = self.posterior(images)
        return posterior.mean if rng is None else posterior.sample(self.noise(rng))

    def moments(self, images: Tensor) -> tuple[Tensor, Tensor]:
        if self.layout.codebook_size is not None:
            return super().moments(images)
        posterior = self.posterior(images)
        return posterior.mean, (posterior.logvar / 2).exp()

    def noise(self, rng: Rng) -> Tensor:
        """(B, N, C) standard normal."""
        device = self.latent_tokens.device
        every = torch.arange(self.layout.length, device=device)
        return rng.to(device).normal(every, Draw.LATENT, count=self.layout.dim)

    # ---- decoding -----------------------------------------------------------------------------------------

    def vectors(self, ids: Tensor) -> Tensor:
        return self.codebook[ids]

    def latents(self, tokens: Tensor) -> Tensor:
        """Ids (B, N) or vectors (B, N, C) -> (B, C, 1, N), as the decoder reads them."""
        if tokens.shape[1] != self.layout.length:
            raise ValueError(f"got {tokens.shape[1]} tokens; an image has {self.layout.length}")
        vectors = tokens if tokens.is_floating_point() else self.vectors(tokens)
        return vectors.to(self.latent_tokens.dtype).transpose(1, 2)[:, :, None]

    def proxy_logits(self, z: Tensor) -> Tensor:
        """Of a legacy model: latents (B, C, 1, N) -> logits over the VQGAN's codes (B, codes, h, w)."""
        return self.decoder(z)

    def paint(self, proxy_logits: Tensor) -> Tensor:
        """Images (B, 3, H, W), not clamped, of the mixtures of codes that the logits give."""
        weights = proxy_logits.float().softmax(1)
        maps = torch.einsum("bkhw,kc->bchw", weights, self.pixel_quantize.embedding.weight)
        return self.pixel_decoder(maps.to(self.latent_tokens.dtype)).mul(2).sub(1)

    def decode_latents(self, z: Tensor, text: Tensor | None = None) -> Tensor:
        """(B, C, 1, N), and text features (B, T, text_dim) -> images (B, 3, H, W), not clamped.

        A text-aware decoder without a text reads zeros; the released weights were never trained so.
        Raises: ValueError when the features do not fit.
        """
        if self.config.legacy:
            return self.paint(self.proxy_logits(z))
        expected = (len(z), self.config.text_length, self.config.text_dim)
        if self.config.text_length:
            text = z.new_zeros(expected) if text is None else text.to(z)
        if text is not None and (not self.config.text_length or tuple(text.shape) != expected):
            wanted = f"of shape {expected}" if self.config.text_length else "none: it is not text-aware"
            raise ValueError(f"text features of shape {tuple(text.shape)} were given; this decoder reads {wanted}")
        images = self.decoder(z, text).mul(2).sub(1)
        return images.expand(-1, 3, -1, -1) if self.config.image_channels == 1 else images

    def decode(self, tokens: Tensor, rng: Rng | None = None, *, text: Tensor | None = None) -> Tensor:
        """Ids (B, N) or vectors (B, N, C) -> images in [-1, 1]. `text`: features, see `text_features`."""
        return self.decode_latents(self.latents(tokens), text).clamp(-1, 1)

    # ---- training -----------------------------------------------------------------------------------------

    def code(self, images: Tensor, rng: Rng | None = None, *, frozen: bool = False) -> tuple[Tensor, Any]:
        """Images -> vectors (B, N, C), straight-through to the encoder, and a `Quantized` or a `Posterior`.

        Args: frozen: the second stage, in which encoder and codebook are not trained: no gradient, losses of 0.
        """
        with torch.set_grad_enabled(torch.is_grad_enabled() and not frozen):
            if self.layout.codebook_size is None:
                posterior = self.posterior(images)
                return posterior.mean if rng is None else posterior.sample(self.noise(rng)), posterior
            quantized = self.quantize(self.features(images))
        if frozen:
            zero = torch.zeros_like(quantized.loss)
            quantized = replace(quantized, commitment_loss=zero, codebook_loss=zero)
        return quantized.vectors, quantized

    def forward(
        self, images: Tensor, rng: Rng | None = None, *, text: Tensor | None = None, frozen: bool = False
    ) -> Reconstruction:
        """Training: images there and back. `rng`: of the latents of a KL model.   text, frozen: see above."""
        vectors, code = self.code(images, rng, frozen=frozen)
        z = self.latents(vectors)
        if self.config.legacy:
            logits = self.proxy_logits(z)
            return Reconstruction(self.paint(logits), logits, code)
        return Reconstruction(self.decode_latents(z, text), None, code)


def text_features(
    texts: Sequence[str], encoder: str = "openai/clip-vit-large-patch14-336", device: torch.device | str = "cpu"
) -> Tensor:
    """What TA-TiTok's decoder reads of captions: CLIP's features of all 77 tokens, (B, 77, 768) float32.

    Args: encoder: a CLIP text model of transformers, by hub name or folder; the default is the released models'.
    Raises: ImportError without transformers; ValueError when the encoder cannot be opened.
    """
    try:
        from transformers import CLIPTextModel, CLIPTokenizer
    except ImportError as error:
        raise ImportError("text features need transformers: pip install transformers") from error
    try:
        tokenizer = CLIPTokenizer.from_pretrained(encoder)
        model: Any = CLIPTextModel.from_pretrained(encoder)
        model.to(device).eval()
    except (OSError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"the CLIP text encoder {encoder!r} cannot be opened by transformers: {reason}") from None
    length = model.config.max_position_embeddings
    batch = tokenizer(list(texts), padding="max_length", max_length=length, truncation=True, return_tensors="pt")
    ends = (batch.input_ids == tokenizer.eos_token_id).int()
    ids = batch.input_ids.masked_fill((ends.cumsum(1) - ends) > 0, 0)  # behind the end 0, as the training had it
    with torch.no_grad():
        return model(ids.to(device)).last_hidden_state.float()


_SIZES = {"s": (512, 8, 8), "b": (768, 12, 12), "l": (1024, 24, 16)}


def _sized(sizes: str, num_tokens: int, kind: str, text: bool = False) -> dict[str, Any]:
    """sizes: of encoder and decoder, a letter each.   kind: legacy, vq or vae."""
    kinds: dict[str, dict[str, Any]] = {
        "legacy": {"codebook_size": 4096, "latent_dim": 12, "normalize_codes": True, "legacy": True},
        "vq": {"codebook_size": 8192, "latent_dim": 64},
        "vae": {"codebook_size": None, "latent_dim": 16},
    }
    both = {"encoder_size": _SIZES[sizes[0]], "decoder_size": _SIZES[sizes[1]], "num_tokens": num_tokens}
    return {**both, **kinds[kind], **({"text_length": 77} if text else {})}


def _builder(**preset: Any) -> Callable[..., TiTok]:
    return lambda **overrides: cast(TiTok, TiTok(**{**preset, **overrides}))


_TINY: dict[str, Any] = {
    "num_tokens": 6,
    "codebook_size": 24,
    "latent_dim": 4,
    "resolution": 16,
    "patch": 4,
    "encoder_size": (32, 1, 2),
    "decoder_size": (32, 1, 2),
}
_TINY_KIND: dict[str, dict[str, Any]] = {
    "legacy": {"proxy_codes": 12, "proxy_dim": 8, "proxy_channels": 32, "proxy_multipliers": (1, 1, 1)},
    "vq": {},
    "vae": {"codebook_size": None},
}
_FASHION = {
    "num_tokens": 32,
    "codebook_size": 512,
    "latent_dim": 16,
    "resolution": 32,
    "patch": 4,
    "image_channels": 1,
    "encoder_size": (192, 4, 4),
    "decoder_size": (192, 4, 4),
    "clustering": True,
}
# name, sizes of encoder and decoder, tokens, kind, text-aware, rFID
_RELEASED: tuple[tuple[str, str, int, str, bool, str], ...] = (
    ("titok_l32", "ll", 32, "legacy", False, "2.21"),
    ("titok_b64", "bb", 64, "legacy", False, "1.70"),
    ("titok_s128", "ss", 128, "legacy", False, "1.71"),
    ("titok_bl64_vq8k", "bl", 64, "vq", False, "2.06"),
    ("titok_bl128_vq8k", "bl", 128, "vq", False, "1.49"),
    ("titok_sl256_vq8k", "sl", 256, "vq", False, "1.03"),
    ("titok_ll32_vae_c16", "ll", 32, "vae", False, "1.61"),
    ("titok_bl64_vae_c16", "bl", 64, "vae", False, "1.25"),
    ("titok_bl128_vae_c16", "bl", 128, "vae", False, "0.84"),
    ("tatitok_bl32_vq", "bl", 32, "vq", True, "3.95"),
    ("tatitok_bl64_vq", "bl", 64, "vq", True, "2.43"),
    ("tatitok_bl128_vq", "bl", 128, "vq", True, "1.53"),
    ("tatitok_bl32_vae", "bl", 32, "vae", True, "1.53"),
    ("tatitok_bl64_vae", "bl", 64, "vae", True, "1.47"),
    ("tatitok_sl128_vae", "sl", 128, "vae", True, "0.90"),
)
_TA = "trained on DataComp; its decoder reads a caption"
for _name, _letters, _n, _kind, _text, _rfid in _RELEASED:
    _what = {"legacy": "4096 codes, two-stage", "vq": "8192 codes", "vae": "KL, 16 channels"}[_kind]
    register_model(
        ModelEntry(
            _name,
            "tokenizer",
            _builder(**_sized(_letters, _n, _kind, _text)),
            f"{'TA-TiTok' if _text else 'TiTok'} at 256x256: {_n} tokens, {_what}",
            tiny={**_TINY, **_TINY_KIND[_kind], **({"text_length": 5, "text_dim": 6} if _text else {})},
        )
    )
    _file = f"tokenizer_{_name}.bin" if _kind != "vae" else f"{_name}.bin"
    register_checkpoint(
        Checkpoint(
            name=f"{_name}.{'datacomp_256' if _text else 'in1k_256'}",
            repo_id=f"turkeyju/tokenizer_{_name}" if _text else "fun-research/TiTok",
            filename="model.safetensors" if _text else _file,
            licence="Apache-2.0",
            paper="arXiv 2501.07730" if _text else "arXiv 2406.07550",
            resolution=256,
            official_score=f"rFID {_rfid} (README), 50,000 ImageNet validation images{'; ' + _TA if _text else ''}",
        )
    )
register_model(
    ModelEntry(
        "titok_fashion",
        "tokenizer",
        _builder(**_FASHION),
        "Fashion-MNIST at 32x32: 32 tokens, 512 codes",
        tiny={**_TINY, "image_channels": 1, "clustering": True},
    )
)
