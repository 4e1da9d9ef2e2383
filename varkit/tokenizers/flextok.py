"""FlexTok: images as 1 to 256 ordered tokens (Bachmann et al., "FlexTok: Resampling Images into 1D Token Sequences of
Flexible Length", arXiv 2502.13967).

Source: apple/ml-flextok: flextok/ (87d00cc). Parameter names are those of the released files. What differs: images of
one size are a plain batch (no packing to multiples of 128, no dictionaries of lists), attention is PyTorch's own,
nothing given is changed in place, and noise is keyed by image. The autoencoder below it is a `KLVAE`.

Shapes: B batch, P patches, R registers (tokens), n tokens given, D width, H heads, C latent channels, h w latent sides.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, cast

import torch
import torch.nn.functional as F
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.modeling_utils import ModelMixin
from torch import Tensor, nn

from varkit.heads.flow import Flow, SigmaKind, draw_sigma, flow_loss
from varkit.hub import HubMixin
from varkit.interfaces import Losses, Tokenizer
from varkit.layers.fsq import FSQ
from varkit.layout import TokenLayout
from varkit.registry import Checkpoint, ModelEntry, register_checkpoint, register_model
from varkit.rng import Draw, Rng
from varkit.samplers.ode import Guidance, ProjectedGuidance, Scale, classifier_free
from varkit.tokenizers.kl_vae import FASHION, KLVAE, unflatten

NestedDropout = Literal["pow2", "uniform_pow2", "uniform"]

Lengths = int | Sequence[int] | Tensor
"""How many tokens of each image are read: one number, or one an image."""


def attention_mask(patches: Sequence[int], registers: Sequence[int], causal: bool) -> Tensor:
    """Who may attend whom among the patches, then registers, of images laid end to end: (N, N) bool.

    Args: causal: register i sees all patches and the registers up to i, patches see patches only ("causal_last" in
        the release); else all of an image see each other.
    """
    parts = []
    for p, r in zip(patches, registers, strict=True):
        part = torch.ones(p + r, p + r, dtype=torch.bool)
        if causal:
            part[:p, p:] = False
            part[p:, p:] = part[p:, p:].tril()
        parts.append(part)
    return torch.block_diag(*parts).bool()


def sincos_table(dim: int, height: int, width: int) -> Tensor:
    """Fixed 2-D sine-cosine positions (1, D, height, width): sines and cosines of the row, then of the column."""
    if dim % 4:
        raise ValueError(f"a width with 2-D sine-cosine positions must be a multiple of 4; got {dim}")
    frequency = 10000 ** -(torch.arange(dim // 4) / (dim // 4))
    row, column = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    angles = [axis[None] * frequency[:, None, None] for axis in (row, column)]  # D/4 h w
    return torch.cat([f(a) for a in angles for f in (torch.sin, torch.cos)])[None]


def norm(x: Tensor) -> Tensor:
    """LayerNorm without parameters, in float32."""
    return F.layer_norm(x.float(), x.shape[-1:], eps=1e-5).to(x.dtype)


def modulate(x: Tensor, shift: Tensor, scale: Tensor, patches: int) -> Tensor:
    """x (1 + scale) + shift. Args: x: (B, P + R, D).   shift, scale: (B, 2, D), one for patches, one for registers."""
    parts = [
        torch.addcmul(shift[:, i, None], part, 1 + scale[:, i, None])
        for i, part in enumerate((x[:, :patches], x[:, patches:]))
    ]
    return torch.cat(parts, 1)


def gate(x: Tensor, by: Tensor, patches: int) -> Tensor:
    return torch.cat([x[:, :patches] * by[:, :1], x[:, patches:] * by[:, 1:]], 1)


class Attention(nn.Module):
    """q and k are normalised per head; the scale is 8 / head_dim (muP), not one over its root."""

    def __init__(self, dim: int, head_dim: int) -> None:
        super().__init__()
        self.head_dim = head_dim
        self.wq, self.wk, self.wv, self.proj = (nn.Linear(dim, dim, bias=False) for _ in range(4))

    def forward(self, x: Tensor, mask: Tensor | None) -> Tensor:
        q, k, v = (w(x).unflatten(-1, (-1, self.head_dim)).transpose(1, 2) for w in (self.wq, self.wk, self.wv))
        out = F.scaled_dot_product_attention(norm(q), norm(k), v, attn_mask=mask, scale=8 / self.head_dim)
        return self.proj(out.transpose(1, 2).flatten(2))


class FeedForward(nn.Module):
    def __init__(self, dim: int) -> None:
        super().__init__()
        hidden = int(2 * 4 * dim / 3)
        self.fc1, self.fc3 = (nn.Linear(dim, hidden, bias=False) for _ in range(2))
        self.fc2 = nn.Linear(hidden, dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.silu(self.fc1(x)) * self.fc3(x))


class Block(nn.Module):
    """A transformer block; with `modulated`, patches and registers are each modulated and gated by the time."""

    def __init__(self, dim: int, head_dim: int, modulated: bool) -> None:
        super().__init__()
        self.attn = Attention(dim, head_dim)
        self.mlp = FeedForward(dim)
        if modulated:
            self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(dim, 12 * dim))

    def forward(self, x: Tensor, mask: Tensor | None = None, time: Tensor | None = None, patches: int = 0) -> Tensor:
        if time is None:
            x = x + self.attn(norm(x), mask)
            return x + self.mlp(norm(x))
        six = self.adaLN_modulation(time).unflatten(-1, (2, 6, -1)).unbind(2)  # B 2 D each
        gate1, gate2, shift1, scale1, shift2, scale2 = six
        x = x + gate(self.attn(modulate(norm(x), shift1, scale1, patches), mask), gate1, patches)
        return x + gate(self.mlp(modulate(norm(x), shift2, scale2, patches)), gate2, patches)


class Trunk(nn.Module):
    def __init__(self, dim: int, depth: int, head_dim: int, modulated: bool) -> None:
        super().__init__()
        if dim % head_dim:
            raise ValueError(f"a width of {dim} cannot be shared by heads of {head_dim}")
        self.blocks = nn.ModuleList(Block(dim, head_dim, modulated) for _ in range(depth))

    def forward(self, x: Tensor, *context: Any, wanted: int | None = None) -> tuple[Tensor, Tensor | None]:
        """The output, and that of the block with the index `wanted`."""
        hidden = None
        for index, block in enumerate(self.blocks):
            x = block(x, *context)
            if index == wanted:
                hidden = x
        return x, hidden


class TimeEmbedder(nn.Module):
    """Times (B,) -> (B, D). The longest period is 256 times the shortest."""

    def __init__(self, dim: int, max_timestep: float, features: int = 256) -> None:
        super().__init__()
        self.max_timestep, self.num_features = max_timestep, features
        self.mlp: Any = nn.Sequential(nn.Linear(features, dim), nn.SiLU(), nn.Linear(dim, dim))

    def features(self, t: Tensor) -> Tensor:
        """(B,) -> (B, 256) float32: cosines, then sines."""
        half = self.num_features // 2
        frequency = 1000 / self.max_timestep * 256 ** -(torch.arange(half, device=t.device) / half)
        angles = t.float()[:, None] * frequency
        return torch.cat([angles.cos(), angles.sin()], -1)

    def forward(self, t: Tensor) -> Tensor:
        return self.mlp(self.features(t).to(self.mlp[0].weight.dtype))


def to_patches(maps: Tensor, patch: int) -> Tensor:
    """(B, C, h, w) -> (B, h/p, w/p, p p C)."""
    b, c, h, w = maps.shape
    maps = maps.view(b, c, h // patch, patch, w // patch, patch)
    return maps.permute(0, 2, 4, 3, 5, 1).flatten(3)


def from_patches(patches: Tensor, patch: int) -> Tensor:
    """(B, h/p, w/p, p p C) -> (B, C, h, w)."""
    x = patches.unflatten(3, (patch, patch, -1)).permute(0, 5, 1, 3, 2, 4)  # B C gh p gw p
    return x.flatten(4).flatten(2, 3)


def _table(**tensors: Tensor) -> nn.ParameterDict:
    return nn.ParameterDict({k: nn.Parameter(v, requires_grad=v.requires_grad) for k, v in tensors.items()})


class _Part(nn.Module):
    """What encoder and decoder share: the layout of the official key names, and positions of patches."""

    module_dict: Any

    def __init__(self, patch: int) -> None:
        super().__init__()
        self.patch = patch

    def embed_patches(self, maps: Tensor, embedder: str, positions: str) -> Tensor:
        """(B, C, h, w) -> (B, gh, gw, D); the table of positions is cropped to the grid."""
        x = self.module_dict[embedder]["patch_proj"](to_patches(maps, self.patch))
        table = self.module_dict[positions]["posembs"]
        _, height, width, _ = x.shape
        if height > table.shape[2] or width > table.shape[3]:
            raise ValueError(
                f"latents of {maps.shape[2]}x{maps.shape[3]} are too large: positions end at "
                f"{table.shape[2] * self.patch}x{table.shape[3] * self.patch}"
            )
        return x + table[:, :, :height, :width].permute(0, 2, 3, 1)


class RegisterEncoder(_Part):
    """Latents (B, C, h, w) -> what is quantised, (B, R, dim)."""

    def __init__(
        self, channels: int, width: int, depth: int, head_dim: int, patch: int, grid: int, registers: int, dim: int
    ) -> None:
        super().__init__(patch)
        self.module_dict = nn.ModuleDict(
            {
                "enc_patch_emb": nn.ModuleDict({"patch_proj": nn.Linear(channels * patch**2, width)}),
                "enc_posemb_module": _table(posembs=sincos_table(width, grid, grid)),
                "enc_register_module": _table(registers=torch.randn(registers, width).requires_grad_()),
                "enc_transformer": Trunk(width, depth, head_dim, modulated=False),
                "enc_to_latents": nn.ModuleDict({"proj": nn.Linear(width, dim)}),
            }
        )

    def forward(self, latents: Tensor) -> Tensor:
        parts = self.module_dict
        x = self.embed_patches(latents, "enc_patch_emb", "enc_posemb_module").flatten(1, 2)
        registers = parts["enc_register_module"]["registers"]
        patches = x.shape[1]
        mask = attention_mask([patches], [len(registers)], causal=True).to(x.device)
        x = torch.cat([x, registers.expand(len(x), -1, -1)], 1)
        x, _ = parts["enc_transformer"](x, mask)
        return parts["enc_to_latents"]["proj"](norm(x[:, patches:]))


class FlowDecoder(_Part):
    """Quantised registers and noised latents -> velocity."""

    def __init__(
        self,
        channels: int,
        width: int,
        depth: int,
        head_dim: int,
        patch: int,
        grid: int,
        registers: int,
        dim: int,
        max_timestep: float,
    ) -> None:
        super().__init__(patch)
        modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 2 * width))
        positions = width**-0.5 * torch.randn(1, 1, width, registers)
        self.module_dict = nn.ModuleDict(
            {
                "dec_from_latents": nn.ModuleDict({"proj": nn.Linear(dim, width)}),
                "dec_registers_posemb_module": _table(posembs=positions.requires_grad_()),
                "dec_nested_dropout": _table(dropout_mask_token=torch.randn(width).requires_grad_()),
                "dec_latent_dropout": _table(nullcond=torch.randn(width).requires_grad_()),
                "dec_noise_patch_emb": nn.ModuleDict({"patch_proj": nn.Linear(channels * patch**2, width)}),
                "dec_patches_posemb_module": _table(posembs=sincos_table(width, grid, grid)),
                "dec_time_embedder": TimeEmbedder(width, max_timestep),
                "dec_transformer": Trunk(width, depth, head_dim, modulated=True),
                "dec_to_patches": nn.ModuleDict(
                    {"adaLN_modulation": modulation, "proj": nn.Linear(width, channels * patch**2)}
                ),
            }
        )

    def condition(self, values: Tensor, lengths: Tensor, null: Tensor | None = None) -> Tensor:
        """What the registers hold: (B, R, D).

        Args:
            values: (B, R, dim) quantised.   lengths: (B,), registers from there on are masked.
            null: (B,) bool, images without a condition.
        """
        parts = self.module_dict
        projection = parts["dec_from_latents"]["proj"]
        x = projection(values.to(projection.weight.dtype))
        x = x + parts["dec_registers_posemb_module"]["posembs"][0, 0].T
        kept = torch.arange(x.shape[1], device=x.device) < lengths[:, None]
        x = torch.where(kept[..., None], x, parts["dec_nested_dropout"]["dropout_mask_token"])
        return x if null is None else torch.where(null[:, None, None], self.null(1, x.shape[1]), x)

    def null(self, batch: int, registers: int) -> Tensor:
        """The absence of a condition: one vector at all registers, without positions."""
        return self.module_dict["dec_latent_dropout"]["nullcond"].expand(batch, registers, -1)

    def forward(self, noised: Tensor, t: Tensor, registers: Tensor) -> Tensor:
        """Velocity (B, C, h, w). Args: noised: (B, C, h, w).   t: (B,) in [0, 1].   registers: see `condition`."""
        return self.with_hidden(noised, t, registers)[0]

    def with_hidden(
        self, noised: Tensor, t: Tensor, registers: Tensor, layer: int | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """As `forward`, and the patches after the block with the index `layer`, (B, D, h / patch, w / patch)."""
        parts, last = self.module_dict, self.module_dict["dec_to_patches"]
        x = self.embed_patches(noised.to(registers.dtype), "dec_noise_patch_emb", "dec_patches_posemb_module")
        grid, patches = x.shape[1:3], x.shape[1] * x.shape[2]
        time = parts["dec_time_embedder"](t)
        x = torch.cat([x.flatten(1, 2), registers], 1)
        x, hidden = parts["dec_transformer"](x, None, time, patches, wanted=layer)
        if hidden is not None:
            hidden = hidden[:, :patches].transpose(1, 2).unflatten(2, grid)
        shift, scale = last["adaLN_modulation"](time)[:, None].chunk(2, -1)  # B 1 D
        x = last["proj"](torch.addcmul(shift, norm(x[:, :patches]), 1 + scale))
        return from_patches(x.unflatten(1, grid), self.patch), hidden


@dataclass
class TokenCount:
    """What `FlexTok.tokens_for` found for each image."""

    lengths: Tensor  # (B,) int64
    achieved: Tensor  # (B,): the measure at that length
    reached: Tensor  # (B,) bool: False where even the longest misses the target


class FlexTok(HubMixin, ModelMixin, ConfigMixin, Tokenizer):
    """Images <-> up to R ordered tokens; any number of the first ones decodes. The defaults are flextok_d12_d12.

    Args:
        vae_config: arguments of the `KLVAE` below; its image_size is the tokenizer's.
        num_registers: R.   levels: of the FSQ.
        encoder_width, encoder_depth, decoder_width, decoder_depth, encoder_head_dim, decoder_head_dim, patch_size:
            of the transformers.
        max_timestep: scale of the time features, 1 or 1000; times are in [0, 1] either way.
        sample_posterior: `encode` with an rng, and training, draw latents instead of taking the mean.
        nested_dropout: tokens kept in training: a power of two (`pow2`), a uniform number rounded up to one
            (`uniform_pow2`), or a uniform number.
        null_rate: share of training images without a condition.
        sigma, mode_scale, stratified: noise levels in training, see `draw_sigma`.
        num_steps, guidance_scale, apg, apg_norm_threshold: defaults of `decode`; apg is projected guidance.
        drop_quant_p: share of training images whose values are not rounded.
        corrupt_tokens_p, min_corrupt_tokens_p: share of tokens that training replaces by random ones, a number for
            each image between these two; None: just the first.   apply_corrupt_tokens_p: share of images it is done to.
    Raises: ValueError on an impossible combination.
    """

    _no_split_modules = ("Block",)
    no_decay = ("registers", "posembs", "dropout_mask_token", "nullcond")

    @register_to_config
    def __init__(
        self,
        vae_config: Mapping[str, Any] | None = None,
        num_registers: int = 256,
        levels: Sequence[int] = (8, 8, 8, 5, 5, 5),
        encoder_width: int = 768,
        encoder_depth: int = 12,
        encoder_head_dim: int = 64,
        decoder_width: int = 768,
        decoder_depth: int = 12,
        decoder_head_dim: int = 64,
        patch_size: int = 2,
        max_timestep: float = 1.0,
        sample_posterior: bool = False,
        nested_dropout: NestedDropout = "pow2",
        null_rate: float = 0.2,
        sigma: SigmaKind = "mode",
        mode_scale: float = 0.25,
        stratified: bool = False,
        num_steps: int = 20,
        guidance_scale: float = 7.5,
        apg: bool = True,
        apg_norm_threshold: float = 2.5,
        drop_quant_p: float = 0.0,
        corrupt_tokens_p: float = 0.0,
        min_corrupt_tokens_p: float | None = None,
        apply_corrupt_tokens_p: float = 0.2,
    ) -> None:
        super().__init__()
        self.vae = KLVAE(**(vae_config or {}))
        side = self.vae.layout.grids[0][0]
        if side % patch_size:
            raise ValueError(f"latents of {side}x{side} cannot be cut into patches of {patch_size}")
        if nested_dropout not in ("pow2", "uniform_pow2", "uniform"):
            raise ValueError(f"nested_dropout must be pow2, uniform_pow2 or uniform; got {nested_dropout!r}")
        for name in ("drop_quant_p", "corrupt_tokens_p", "min_corrupt_tokens_p", "apply_corrupt_tokens_p"):
            if not 0 <= (self.config[name] or 0) <= 1:
                raise ValueError(f"{name} is a share, in [0, 1]; got {self.config[name]}")
        channels, grid = self.vae.layout.dim, side // patch_size
        self.regularizer = FSQ(levels)
        self.layout = TokenLayout(((num_registers,),), math.prod(levels), len(levels))
        shared = (patch_size, grid, num_registers, len(levels))
        self.encoder = RegisterEncoder(channels, encoder_width, encoder_depth, encoder_head_dim, *shared)
        self.decoder = FlowDecoder(channels, decoder_width, decoder_depth, decoder_head_dim, *shared, max_timestep)
        self.vae.requires_grad_(False)
        self.init_weights()

    @torch.no_grad()
    def init_weights(self) -> None:
        """Linear weights normal, std 1 / sqrt(inputs); biases, adaLN and the last projection zero."""
        for part in (self.encoder, self.decoder):
            for name, module in part.named_modules():
                if isinstance(module, nn.Linear):
                    nn.init.normal_(module.weight, std=module.in_features**-0.5)
                    if module.bias is not None:
                        nn.init.zeros_(module.bias)
                    if "adaLN_modulation" in name or "dec_to_patches" in name:
                        nn.init.zeros_(module.weight)

    @torch.no_grad()
    def init_weights_mup(self, base_width: int) -> None:
        """As the release starts (`init_weights_muP`), whose base shapes are not known: here widths of `base_width`.

        Linear weights Xavier-uniform at that width; from there on the variance of those that grow with the width on
        both sides falls as one over it, and that of others stays. Vectors are normal, std 0.02; biases, adaLN and
        both last projections zero.
        """
        fixed_inputs = ("patch_proj", "dec_from_latents", "dec_time_embedder.mlp.0")
        sizes = (self.config.encoder_width, self.config.decoder_width)
        for part, width in zip((self.encoder, self.decoder), sizes, strict=True):
            times = width / base_width
            for name, module in part.named_modules():
                if not isinstance(module, nn.Linear):
                    continue
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
                if any(n in name for n in ("adaLN_modulation", "dec_to_patches", "enc_to_latents")):
                    nn.init.zeros_(module.weight)
                    continue
                grows = not any(n in name for n in fixed_inputs)
                inputs, outputs = module.in_features / (times if grows else 1), module.out_features / times
                limit = math.sqrt(6 / (inputs + outputs) / (times if grows else 1))
                nn.init.uniform_(module.weight, -limit, limit)
            for name, parameter in part.named_parameters():
                if parameter.requires_grad and name.rpartition(".")[2] in self.no_decay:
                    nn.init.trunc_normal_(parameter, std=0.02)

    def train(self, mode: bool = True) -> Any:
        super().train(mode)
        self.vae.eval()  # it stays as it is
        return self

    @property
    def image_size(self) -> tuple[int, int]:
        return self.vae.image_size

    @property
    def codebook(self) -> Tensor:
        """(V, dim) float32, computed anew: FSQ has no table."""
        return self.vectors(torch.arange(math.prod(self.regularizer.levels), device=self.regularizer.basis.device))

    def vectors(self, ids: Tensor) -> Tensor:
        return self.regularizer.vectors(ids)

    # ---- encoding ---------------------------------------------------------------------------------------------

    def encode_latents(self, latents: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Scaled VAE latents (B, C, h, w) -> ids (B, R); values (B, R, dim); what was quantised, (B, R, dim)."""
        z = self.encoder(latents.to(self.dtype))
        values = self.regularizer(z)
        return self.regularizer.ids(values), values, z

    def encode(self, images: Tensor, rng: Rng | None = None) -> Tensor:
        """(B, 3, H, W) in [-1, 1] -> ids (B, R). Without `rng` the VAE's mean is coded, whatever the config says."""
        if images.dim() != 4 or tuple(images.shape[1:]) != (3, *self.image_size):
            raise ValueError(
                f"images must be (B, 3, {self.image_size[0]}, {self.image_size[1]}); got {tuple(images.shape)}"
            )
        return self.encode_latents(self.vae.latents(images, rng if self.config.sample_posterior else None))[0]

    # ---- decoding ---------------------------------------------------------------------------------------------

    def padded(self, tokens: Tensor, lengths: Lengths | None = None) -> tuple[Tensor, Tensor]:
        """Values of all R registers, zeros where none is given, and how many of each image count.

        Args: tokens: ids (B, n) or values (B, n, dim), n <= R.   lengths: None is n.
        Returns: (B, R, dim) float32; (B,) int64.
        Raises: ValueError on more tokens than there are registers, and lengths that are not in 1 .. n.
        """
        batch, given = tokens.shape[:2]
        if not 1 <= given <= self.layout.length:
            raise ValueError(f"got {given} tokens; this tokenizer reads 1 to {self.layout.length}")
        counts = torch.as_tensor(given if lengths is None else lengths, device=tokens.device)
        if counts.is_floating_point() or counts.dim() > 1 or (counts.dim() == 1 and len(counts) != batch):
            raise ValueError(f"lengths must be a whole number, or {batch}, one an image; got {lengths}")
        counts = counts.expand(batch)
        if counts.min() < 1 or counts.max() > given:
            raise ValueError(f"lengths must be in 1 .. {given}, the tokens given; got {counts.tolist()}")
        values = tokens.float() if tokens.is_floating_point() else self.vectors(tokens)
        return F.pad(values, (0, 0, 0, self.layout.length - given)), counts

    def flow(self, tokens: Tensor, lengths: Lengths | None, grid: Sequence[int]) -> Flow:
        """The flow of latents (B, h w, C) given tokens; see `decode`. Args: grid: h, w."""
        registers = self.decoder.condition(*self.padded(tokens, lengths))
        null = self.decoder.null(*registers.shape[:2])
        both = torch.cat([registers, null])

        def run(x: Tensor, t: Tensor, condition: Tensor) -> Tensor:
            return self.decoder(unflatten(x, grid), t, condition).flatten(2).transpose(1, 2).float()

        def pair(x: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
            cond, uncond = run(torch.cat([x, x]), torch.cat([t, t]), both).chunk(2)
            return cond, uncond

        return Flow(lambda x, t: run(x, t, registers), self.vae.layout.dim, pair)

    def guidance(self, apg: bool | None = None) -> Guidance:
        """The rule of `decode`, for one integration."""
        if self.config.apg if apg is None else apg:
            return ProjectedGuidance(norm_threshold=self.config.apg_norm_threshold)
        return classifier_free

    @torch.no_grad()
    def decode(
        self,
        tokens: Tensor,
        rng: Rng | None = None,
        *,
        lengths: Lengths | None = None,
        guidance_scale: Scale | None = None,
        num_steps: int | None = None,
        apg: bool | None = None,
        solver: str = "euler",
    ) -> Tensor:
        """The first tokens of each image -> images (B, 3, H, W) in [-1, 1].

        Args:
            tokens: ids (B, n) or values (B, n, dim), n <= R.
            rng: of the noise that the flow starts from; None is the same noise for every image, every time.
            lengths: how many of the n tokens count: a number, or (B,); None is all.
            guidance_scale: 1 is off; or a function of t (B,). Few tokens take a higher one.
            num_steps, solver: of the integration.   apg: projected guidance, else classifier-free.
                What is None is the config's default.
        Raises: ValueError on lengths or tokens that do not fit, a wrong solver, no step.
        """
        c = self.config
        if rng is None:
            rng = Rng.for_keys(0, torch.zeros(len(tokens), dtype=torch.int64, device=tokens.device))
        height, width = self.vae.layout.grids[0]
        scale = c.guidance_scale if guidance_scale is None else guidance_scale
        flow = self.flow(tokens, lengths, (height, width)).guide(scale, self.guidance(apg))
        positions = torch.arange(height * width, device=tokens.device)
        steps = c.num_steps if num_steps is None else num_steps
        latents = flow.sample(rng, positions, num_steps=steps, solver=solver)
        return self.vae.decode(latents)

    @torch.no_grad()
    def tokens_for(
        self,
        images: Tensor,
        *,
        target_psnr: float | None = None,
        target_lpips: float | None = None,
        lpips: Callable[[Tensor, Tensor], Tensor] | None = None,
        lengths: Sequence[int] | None = None,
        rng: Rng | None = None,
        **options: Any,
    ) -> TokenCount:
        """The smallest number of tokens with which each image comes back well enough.

        The lengths are tried in rising order on the images that have not reached the target, so the cost is at most
        one `decode` of the batch a length, mostly less. Quality need not rise with every token: that is why
        this is a scan and no bisection.

        Args:
            images: (B, 3, H, W) in [-1, 1].
            target_psnr: decibels to reach.   target_lpips: distance not to exceed, with `lpips`, a function of two
                batches that gives (B,), such as `varkit.metrics.lpips.find_lpips("auto")`. Exactly one of the two.
            lengths: to try; None is the powers of two up to R.
            rng, options: of `decode`.
        Raises: ValueError unless exactly one target is given, or on lengths outside 1 .. R.
        """
        if (target_psnr is None) == (target_lpips is None):
            raise ValueError("give exactly one of target_psnr= and target_lpips=")
        if target_lpips is not None and lpips is None:
            raise ValueError("target_lpips needs lpips=, a function of two batches of images that gives (B,)")
        tries = sorted(set(self.powers_of_two() if lengths is None else lengths))
        if not tries or tries[0] < 1 or tries[-1] > self.layout.length:
            raise ValueError(f"lengths must be in 1 .. {self.layout.length}; got {tries}")
        tokens = self.encode(images, rng)
        count = torch.full((len(images),), tries[-1], device=images.device)
        achieved = torch.full((len(images),), torch.nan, device=images.device)
        open_rows = torch.arange(len(images), device=images.device)
        for n in tries:
            some = None if rng is None else rng[open_rows]
            decoded, wanted = self.decode(tokens[open_rows], some, lengths=n, **options).float(), images[open_rows]
            if target_psnr is not None:
                value = 10 * torch.log10(4 / (decoded - wanted).square().flatten(1).mean(1))
                good = value >= target_psnr
            else:
                assert lpips is not None and target_lpips is not None
                value = lpips(decoded, wanted).flatten()
                good = value <= target_lpips
            achieved[open_rows] = value.to(achieved)
            count[open_rows[good]] = n
            open_rows = open_rows[~good]
            if not len(open_rows):
                break
        reached = torch.ones_like(count, dtype=torch.bool)
        reached[open_rows] = False
        return TokenCount(count, achieved, reached)

    def powers_of_two(self) -> list[int]:
        """1, 2, 4, ... and R itself."""
        powers = [2**i for i in range(self.layout.length.bit_length())]
        return sorted({*powers, self.layout.length})

    # ---- training ---------------------------------------------------------------------------------------------

    def draw_lengths(self, rng: Rng) -> Tensor:
        """How many tokens each training image keeps: (B,) int64."""
        longest = self.layout.length
        u = rng.uniform(torch.zeros(1, dtype=torch.int64), Draw.PREFIX)[:, 0]
        if self.config.nested_dropout == "pow2":
            powers = torch.tensor(self.powers_of_two(), device=u.device)
            return powers[(u * len(powers)).long()]
        count = 1 + (u * longest).long()
        if self.config.nested_dropout == "uniform_pow2":
            count = 2 ** torch.log2(count.double()).ceil().long()
        return count.clamp(max=longest)

    def disturbed(self, z: Tensor, values: Tensor, rng: Rng) -> Tensor:
        """Values (B, R, dim) as the decoder is trained with them, given what was quantised, z (B, R, dim).

        What is random is an image's own, as the release describes it (its code draws once for all that it packs
        together). The encoder learns from values that are not rounded as from others, from replaced ones nothing.
        Source: apple/ml-flextok: flextok/regularizers/quantize_fsq.py (87d00cc).
        """
        c, fsq = self.config, self.regularizer
        if c.drop_quant_p:
            kept = rng.uniform(torch.zeros(1, dtype=torch.int64), Draw.UNQUANTISED) >= c.drop_quant_p  # B 1
            values = torch.where(kept[..., None], values, fsq.unrounded(z))
        if c.corrupt_tokens_p:
            u = rng.uniform(torch.arange(self.layout.length + 1), Draw.CORRUPT, count=2)  # B R+1 2
            whether, how_much = u[:, -1:].unbind(-1)  # B 1
            least = c.min_corrupt_tokens_p or c.corrupt_tokens_p
            share = (least + (c.corrupt_tokens_p - least) * how_much) * (whether < c.apply_corrupt_tokens_p)
            which, other = u[:, :-1].unbind(-1)  # B R
            random = fsq.vectors((other * math.prod(fsq.levels)).long())
            values = torch.where((which < share)[..., None], random, values)
        return values

    def forward(self, images: Tensor, rng: Rng, hidden_layer: int | None = None) -> Losses:
        """Rectified-flow loss of images (B, 3, H, W) with nested dropout of tokens; the VAE is not trained.

        Args: hidden_layer: index of a block of the decoder.
        Returns: loss; loss_short and loss_long, of images that kept at most sqrt(R) tokens, or more; hidden, the
            patches after that block, (B, D, h / patch, w / patch), where one is asked for.
        """
        with torch.no_grad():
            latents = self.vae.latents(images, rng if self.config.sample_posterior else None).float()
        _, values, z = self.encode_latents(latents)
        if self.training:
            values = self.disturbed(z, values, rng)
        lengths = self.draw_lengths(rng)
        null = rng.uniform(torch.zeros(1, dtype=torch.int64), Draw.COND_DROP)[:, 0] < self.config.null_rate
        registers = self.decoder.condition(values, lengths, null)
        positions = torch.arange(latents.shape[2] * latents.shape[3], device=latents.device)
        noise = unflatten(rng.normal(positions, Draw.NOISE, count=latents.shape[1]), latents.shape[2:])
        c = self.config
        sigma = draw_sigma(rng, kind=c.sigma, mode_scale=c.mode_scale, stratified=c.stratified)
        hidden: dict[str, Tensor] = {}

        def velocity(x: Tensor, t: Tensor) -> Tensor:
            out, patches = self.decoder.with_hidden(x, t, registers, hidden_layer)
            if patches is not None:
                hidden["hidden"] = patches
            return out

        each = flow_loss(velocity, latents, noise, sigma)
        short = lengths <= math.isqrt(self.layout.length)
        log = {
            name: (each.detach() * which).sum() / which.sum().clamp_min(1)
            for name, which in (("loss_short", short & ~null), ("loss_long", ~short & ~null), ("loss_null", null))
        }
        return {"loss": each.mean(), **log, **hidden}


def _builder(**preset: Any) -> Callable[..., FlexTok]:
    return lambda **overrides: cast(FlexTok, FlexTok(**{**preset, **overrides}))


_TINY = {
    "vae_config": {
        "image_size": 16,
        "latent_channels": 4,
        "block_out_channels": (8, 8),
        "layers_per_block": 1,
        "norm_num_groups": 4,
    },
    "num_registers": 8,
    "levels": (4, 3, 3),
    "encoder_width": 16,
    "encoder_depth": 2,
    "encoder_head_dim": 8,
    "decoder_width": 16,
    "decoder_depth": 2,
    "decoder_head_dim": 8,
    "num_steps": 3,
    "guidance_scale": 2.0,
}
_FASHION = {
    "vae_config": FASHION,
    "num_registers": 32,
    "levels": (8, 5, 5, 5),
    "encoder_width": 128,
    "encoder_depth": 4,
    "encoder_head_dim": 32,
    "decoder_width": 160,
    "decoder_depth": 6,
    "decoder_head_dim": 32,
    "sigma": "logit-normal",
    "stratified": True,
    "null_rate": 0.1,
    "num_steps": 10,
    "guidance_scale": 1.5,
    "apg": False,
}
_SIZES = {
    name: {"encoder_width": 64 * e, "encoder_depth": e, "decoder_width": 64 * d, "decoder_depth": d}
    for name, e, d in (("d12_d12", 12, 12), ("d18_d18", 18, 18), ("d18_d28", 18, 28))
}
_PRESETS: dict[str, tuple[dict[str, Any], str]] = {
    **{
        f"flextok_{name}": (size, f"FlexTok {name}: 256x256 as 1 to 256 of 64000 codes, {total} parameters with VAE")
        for (name, size), total in zip(_SIZES.items(), ("342 M", "950 M", "2.54 B"), strict=True)
    },
    "flextok_fashion": (_FASHION, "Fashion-MNIST at 32x32 as 1 to 32 of 1000 codes"),
}
for _name, (_preset, _summary) in _PRESETS.items():
    register_model(ModelEntry(_name, "tokenizer", _builder(**_preset), _summary, tiny=_TINY))
for _name, _data in (("d12_d12", "in1k"), ("d18_d18", "in1k"), ("d18_d28", "in1k"), ("d18_d28", "dfn")):
    register_checkpoint(
        Checkpoint(
            name=f"flextok_{_name}.{_data}",
            repo_id=f"EPFL-VILAB/flextok_{_name}_{_data}",
            filename="model.safetensors",
            licence="Apple research licence (LICENSE_WEIGHTS)",
            paper="arXiv 2502.13967",
            resolution=256,
            official_score="rFID of the paper not verified here",
        )
    )
