"""FlowAR: next-scale prediction of latents with a flow-matching head (Ren et al., "FlowAR: Scale-wise Autoregressive
Image Generation Meets Flow Matching", arXiv 2412.15205).

A transformer reads the scales before and says a vector for each token of the next scale; a smaller transformer over the
tokens of that scale is the velocity of a flow, conditioned position by position on those vectors.

Source: FlowAR: models/flowar.py, models/flowmodel.py (21835c0, kept in the fork wangqiang9/FlowAR). What differs: any
scales, any batch; guidance of 1 is off and costs nothing; the cache is passed in; labels are dropped in training only.

Shapes: B batch, R rows (2 B with guidance), L tokens, S scales, n tokens of one scale, D width, C latent channels.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.modeling_utils import ModelMixin
from torch import Tensor, nn

from varkit.conditioning.control import NO_DECAY as CONTROL_NO_DECAY
from varkit.conditioning.control import Controlled, Fused, dropped_together
from varkit.entities import entity_losses, group_of
from varkit.heads.flow import Flow, add_noise, draw_sigma
from varkit.heads.flow_transformer import FlowHead
from varkit.hub import HubMixin
from varkit.interfaces import Cond, Generator, Losses, State, Tokenizer
from varkit.layers.cache import KVCache
from varkit.layers.modulated import TRUNK_LORA, Trunk, block_mask, init_weights, places
from varkit.layout import TokenLayout, square_grids
from varkit.registry import Checkpoint, ModelEntry, register_checkpoint, register_model
from varkit.rng import Draw, Rng
from varkit.tokenizers.kl_vae import KLVAE
from varkit.tokenizers.latent_pyramid import SCALES, LatentPyramid


class FlowARState(State):
    """The cache, the class vectors, and what control images add, or None."""

    def __init__(self, cache: KVCache, vectors: Tensor, guided: bool, fused: Fused | None = None) -> None:
        self.cache, self.vectors, self.guided, self.fused = cache, vectors, guided, fused

    @property
    def length(self) -> int:  # type: ignore[override]
        return self.cache.length

    def rewind(self, count: int) -> None:
        self.cache.rewind(count)

    def reset(self) -> None:
        self.cache.reset()


class FlowAR(Controlled, HubMixin, ModelMixin, ConfigMixin, Generator):
    """The class-conditional next-scale transformer and its flow head. The defaults are the released FlowAR-S.

    Args:
        num_classes: not counting the null class.
        hidden_size, depths, num_heads: of the two stacks of the transformer.
        head_width, head_depth, cross: of the flow head, see `FlowHead`.
        scales, latent_dim: of the tokenizer, a `LatentPyramid`.
        dropout, attention_dropout: in training, of what the transformer's attention gives and of its weights.
        cond_drop_rate: how often a label becomes the null class in training.
        control: arguments of `Control`, for a model that control images steer too.
        control_drop_rate: how often a control is left out in training while the class stays.
    Raises: ValueError on an impossible combination, or on a bad argument of `Control`.
    """

    _supports_gradient_checkpointing = True
    _no_split_modules = ("ModulatedBlock", "CrossBlock")
    training_options = frozenset({"weight", "hidden_layer"})
    no_decay = ("pos_embed_learned", *CONTROL_NO_DECAY)
    class_embedding = "class_emb"
    lora_targets = TRUNK_LORA
    free_arguments = frozenset({"dropout", "attention_dropout", "cond_drop_rate", "control_drop_rate"})
    """These: see `varkit.training.finetune.Tunable`."""
    sampler = "ContinuousSampler"

    scale_of: Tensor

    @register_to_config
    def __init__(
        self,
        num_classes: int = 1000,
        hidden_size: int = 768,
        depths: Sequence[int] = (6, 6),
        num_heads: int = 12,
        head_width: int = 1024,
        head_depth: int = 2,
        cross: bool = False,
        scales: Sequence[int | Sequence[int]] = SCALES,
        latent_dim: int = 16,
        dropout: float = 0.1,
        attention_dropout: float = 0.1,
        cond_drop_rate: float = 0.1,
        control: dict[str, Any] | None = None,
        control_drop_rate: float = 0.0,
    ) -> None:
        super().__init__()
        self.layout = TokenLayout(square_grids(scales), None, latent_dim)
        if len(self.layout.grids) < 2:
            raise ValueError(
                f"FlowAR predicts scale by scale: it needs two or more, those of a LatentPyramid; got {list(scales)}. "
                f"LatentPyramid.around(vae, scales) makes one of a VAE"
            )
        self.num_classes = num_classes
        where = places(self.layout.grids)
        self.register_buffer("scale_of", group_of(self.layout.sizes).to(where.device), persistent=False)  # L
        self.class_emb = nn.Embedding(num_classes + 1, hidden_size)
        self.z_proj = nn.Linear(latent_dim, hidden_size)
        first, second = depths
        self.trunk = Trunk(hidden_size, (first, second), num_heads, where, dropout, attention_dropout)
        self.diffusion_pos_embed_learned = nn.Parameter(torch.empty(1, self.layout.length, hidden_size))
        self.flownet = FlowHead(latent_dim, hidden_size, head_width, head_depth, cross, where)
        self.add_control(control)
        init_weights(self)
        if self.controller is not None:
            self.controller.init_weights()

    def tokenizer_for(self, tokenizer: Tokenizer) -> Tokenizer:
        """Around a VAE, its scales."""
        return LatentPyramid.around(tokenizer, self.layout.grids) if isinstance(tokenizer, KLVAE) else tokenizer

    # ---- the network --------------------------------------------------------------------------------------

    def vectors_of(
        self, inputs: Tensor, cond: Tensor, where: Tensor, hidden_layer: int | None = None, **context: Any
    ) -> tuple[Tensor, Tensor]:
        """What the transformer says of the tokens `where` (n,): (R, n, D), and a block's output (R, n, D).

        Args:
            inputs: (R, n, C), what is read there; the first scale reads the class instead.
            cond: (R, D) class vectors.   context: see `Trunk.forward`.
        """
        first = self.layout.sizes[0]
        x = self.z_proj(inputs.to(self.z_proj.weight.dtype))
        x = torch.where((where < first)[:, None], cond[:, None].to(x), x)
        out, hidden = self.trunk(x, cond[:, None], where, hidden_layer=hidden_layer, **context)
        return out + self.diffusion_pos_embed_learned[:, where], hidden

    def forward(
        self,
        inputs: Tensor,
        class_labels: Tensor,
        hidden_layer: int | None = None,
        control: Tensor | None = None,
        control_weight: Tensor | None = None,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Teacher-forced vectors of the first n positions, the condition of the flow head.

        Args:
            inputs: (B, n, C), what `LatentPyramid.embed` gives, cut after any scale.
            class_labels: (B,) int64; `num_classes` is the null class.
            hidden_layer: return also what this block gives, counted from 1: (B, n, D).
            control, control_weight: see `Cond`.
        Returns: (B, n, D), or a pair.
        """
        where = torch.arange(inputs.shape[1], device=inputs.device)
        mask = block_mask(self.layout.sizes).to(inputs.device)[: len(where), : len(where)]
        added = self.fuse(Cond(class_labels, control=control, control_weight=control_weight))
        z, hidden = self.vectors_of(inputs, self.class_emb(class_labels), where, hidden_layer, mask=mask, added=added)
        return z if hidden_layer is None else (z, hidden)

    # ---- sampling -----------------------------------------------------------------------------------------

    def schedule(self, num_steps: int | None = None) -> list[Tensor]:
        """One group a scale. Raises ValueError when asked for another number of steps."""
        if num_steps not in (None, len(self.layout.grids)):
            raise ValueError(
                f"FlowAR draws one scale a step, {len(self.layout.grids)} in all; got num_steps={num_steps}"
            )
        device = self.class_emb.weight.device
        return [torch.arange(s.start, s.stop, device=device) for s in self.layout.slices]

    def start(self, cond: Cond, null: Cond | None = None) -> FlowARState:
        both = cond.beside(null)
        vectors = self.class_emb(both.labels)  # R D
        cache = self.trunk.new_cache(len(vectors), vectors)
        return FlowARState(cache, vectors, null is not None, self.fuse(both))

    def predict(self, state: State, inputs: Tensor, positions: Tensor) -> Flow:
        """The flow of the next scale. No mask is needed: the cache holds coarser scales only."""
        assert isinstance(state, FlowARState)
        if state.guided:
            inputs = torch.cat([inputs, inputs])
        where = torch.arange(state.length, state.length + inputs.shape[1], device=inputs.device)
        z, _ = self.vectors_of(inputs, state.vectors, where, cache=state.cache, added=state.fused)
        batch = len(z) // 2 if state.guided else len(z)
        context = self.flownet.context(z, where)
        part = context.rows(batch)

        def alone(x: Tensor, t: Tensor) -> Tensor:
            return self.flownet(x, t, z[:batch], where, context=part)

        def both(x: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
            cond, uncond = self.flownet(torch.cat([x, x]), torch.cat([t, t]), z, where, context=context).chunk(2)
            return cond, uncond

        return Flow(alone, self.layout.dim, both if state.guided else None)

    def append(self, state: State, tokens: Tensor, positions: Tensor) -> None:
        """Keep the keys that `predict` wrote: they are of the scale's inputs, not of its tokens."""
        assert isinstance(state, FlowARState)
        state.cache.advance(positions.shape[-1])

    # ---- training -----------------------------------------------------------------------------------------

    def loss_at(
        self,
        tokens: Tensor,
        inputs: Tensor,
        noise: Tensor,
        t: Tensor,
        class_labels: Tensor,
        weight: Tensor | float | None = None,
        hidden_layer: int | None = None,
        control: Tensor | None = None,
        control_weight: Tensor | None = None,
    ) -> Losses:
        """The loss of given noise (B, L, C), times (B, S), labels (B,) and control images; see `training_loss`.

        Returns: loss; loss_first and loss_last; scale_losses (B, S); vectors (B, L, D).
        """
        out = self(inputs, class_labels, hidden_layer, control, control_weight)
        z, hidden = (out, None) if hidden_layer is None else out
        where, group = torch.arange(self.layout.length, device=tokens.device), self.scale_of
        v = self.flownet(add_noise(tokens, noise, t[:, group]), t, z, where, group)
        error = (v - (noise - tokens).float()).square().mean(-1)  # B L
        scale_losses = torch.stack([e.mean(1) for e in self.layout.split(error)], 1)
        weight = 1 / self.layout.sizes[-1] if weight is None else weight
        losses = {
            **entity_losses(error, self.layout.sizes, weight),
            "scale_losses": scale_losses,
            "vectors": z,
        }
        return losses if hidden is None else {**losses, "hidden": hidden}

    def training_loss(  # type: ignore[override]
        self,
        tokens: Tensor,
        inputs: Tensor,
        cond: Cond,
        rng: Rng,
        *,
        weight: Tensor | None = None,
        hidden_layer: int | None = None,
    ) -> Losses:
        """Mean squared error of the velocity, each token weighted one over the tokens of the last scale.

        Each scale of an image has one time of its own, uniform in (0, 1).

        Args: tokens, inputs: (B, L, C).   weight, hidden_layer: see `Generator.training_options`.
        Returns: loss; loss_first and loss_last of the coarsest and the finest scale.
        """
        noise = rng.normal(torch.arange(self.layout.length), Draw.NOISE, count=self.layout.dim).to(tokens)
        t = draw_sigma(rng, torch.arange(len(self.layout.grids)), kind="uniform").to(tokens.device)
        labels, weights = cond.labels, cond.control_weight
        if self.training:
            rates = self.config.cond_drop_rate, self.num_classes, self.config.control_drop_rate
            labels, weights = dropped_together(cond, rng, *rates)
        losses = self.loss_at(tokens, inputs, noise, t, labels, weight, hidden_layer, cond.control, weights)
        return {k: v for k, v in losses.items() if k not in ("scale_losses", "vectors")}


def _builder(**preset: Any) -> Callable[..., FlowAR]:
    return lambda **overrides: cast(FlowAR, FlowAR(**{**preset, **overrides}))


_TINY = {
    "num_classes": 3,
    "hidden_size": 32,
    "depths": (1, 1),
    "num_heads": 2,
    "head_width": 64,
    "head_depth": 1,
    "scales": (1, 4),
    "latent_dim": 4,
    "dropout": 0.0,
    "attention_dropout": 0.0,
}
_TINY_TOKENIZER = {
    "vae_config": {
        "image_size": 8,
        "latent_channels": 4,
        "block_out_channels": (8, 8),
        "layers_per_block": 1,
        "norm_num_groups": 4,
    },
    "scales": (1, 4),
}
_CROSS = {"cross": True, "head_depth": 12}
_SIZES: dict[str, tuple[dict[str, Any], str]] = {
    "s": ({}, "172 M"),
    "l": ({"hidden_size": 1024, "depths": (8, 8), "num_heads": 16, **_CROSS}, "587 M"),
    "h": ({"hidden_size": 1536, "depths": (15, 15), "num_heads": 16, "head_width": 1536, **_CROSS}, "1.9 B"),
}
_SCORES = {
    "s": "FID 3.70 (third-party measurement; the paper's is about 3.61)",
    "l": "FID 1.90 (README)",
    "h": "FID 1.65 (README)",
}
# What the README's arguments are here: see `varkit.checkpoints.flowar.sampling_arguments`.
_SAMPLING: dict[str, dict[str, Any]] = {
    "s": {"guidance_scale": 4.3, "guidance_times": (0.0, 0.9), "head_steps": 24, "solver": "euler-jump"},
    "l": {"guidance_scale": 2.4, "guidance_times": (0.0, 0.9), "head_steps": 24, "solver": "euler-jump"},
    "h": {"guidance_scale": 2.4, "guidance_times": (0.0, 0.7), "head_steps": 50, "solver": "euler"},
}
for _name, (_sizes, _parameters) in _SIZES.items():
    register_model(
        ModelEntry(
            f"flowar_{_name}",
            "generator",
            _builder(**_sizes),
            f"FlowAR-{_name.upper()}: latents at 1 to 16 for 256x256, {_parameters} parameters",
            tokenizer="latent_pyramid_f16",
            tiny={**_TINY, "cross": _name != "s"},
            tiny_tokenizer=_TINY_TOKENIZER,
        )
    )
    register_checkpoint(
        Checkpoint(
            name=f"flowar_{_name}.in1k_256",
            repo_id="OliverRen/FlowAR",
            filename=f"FlowAR-{_name.upper()}.pth",
            licence="none stated (OliverRensu/FlowAR)",
            paper="arXiv 2412.15205",
            resolution=256,
            official_score=f"{_SCORES[_name]}, 50,000 images",
            tokenizer="kl16.in1k",
            sampling={"guidance_schedule": "linear", **_SAMPLING[_name]},
        )
    )

_FASHION = {
    "num_classes": 10,
    "hidden_size": 128,
    "depths": (3, 3),
    "num_heads": 4,
    "head_width": 128,
    "head_depth": 2,
    "scales": (1, 2, 4, 8),
    "latent_dim": 4,
}
register_model(
    ModelEntry(
        "flowar_fashion",
        "generator",
        _builder(**_FASHION),
        "FlowAR over latents of Fashion-MNIST at 1 to 8, 2.5 M parameters",
        tokenizer="latent_pyramid_fashion",
        tiny=_TINY,
        tiny_tokenizer=_TINY_TOKENIZER,
    )
)
