"""xAR: next-X prediction (Ren et al., "Beyond Next-Token: Next-X Prediction for Autoregressive Visual Generation",
arXiv 2502.20388).

Latents are cut into entities: tokens, cells, subsamples, scales, or the whole image. The transformer itself is the
velocity of a flow: it reads the noised state of an entity and the entities before it, which in training are noised too,
each at a time of its own (noisy context), and in sampling are clean.

Source: OliverRensu/xAR: models/xar.py (121e9c9), which has cells of 8x8 alone; the other entities are Algorithm 1 of
the paper. What differs: any grid and any batch, also of one; clean entities enter the cache by a pass of their own, so
that one step is enough and no state hides in the modules; nothing is computed for guidance that is off; labels are
dropped in training only.

Shapes: B batch, R rows (2 B with guidance), L tokens, E entities, n tokens of one entity, D width, C latent channels.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.modeling_utils import ModelMixin
from torch import Tensor, nn

from varkit.conditioning.control import NO_DECAY as CONTROL_NO_DECAY
from varkit.conditioning.control import Controlled, Fused, dropped_together, first_rows
from varkit.entities import ContextNoise, Entity, check_context_noise, entities, entity_losses, group_of, sorted_times
from varkit.heads.flow import Flow, SigmaKind, add_noise, draw_sigma
from varkit.hub import HubMixin
from varkit.interfaces import Cond, Generator, Losses, State, Tokenizer
from varkit.layers.cache import KVCache
from varkit.layers.modulated import TRUNK_LORA, TimeEmbedding, Trunk, block_mask, init_weights, places
from varkit.layout import TokenLayout
from varkit.registry import Checkpoint, ModelEntry, register_checkpoint, register_model
from varkit.rng import Draw, Rng
from varkit.tokenizers.kl_vae import KLVAE
from varkit.tokenizers.latent_pyramid import LatentPyramid


class XARState(State):
    """The clean entities in the cache, and the last one, which the next `predict` puts there.

    fused: what control images add, in the order of turns, or None.
    """

    def __init__(self, cache: KVCache, vectors: Tensor, guided: bool, fused: Fused | None = None) -> None:
        self.cache, self.vectors, self.guided, self.fused = cache, vectors, guided, fused
        self.pending: Tensor | None = None  # B n C

    @property
    def length(self) -> int:  # type: ignore[override]
        return self.cache.length + (0 if self.pending is None else self.pending.shape[1])

    def rewind(self, count: int) -> None:
        """Whole entities only. Raises ValueError when the last one would be cut."""
        if self.pending is not None and count > 0:
            if count < self.pending.shape[1]:
                raise ValueError(f"{count} tokens are less than the last entity, of {self.pending.shape[1]}")
            count, self.pending = count - self.pending.shape[1], None
        self.cache.rewind(count)

    def reset(self) -> None:
        self.pending = None
        self.cache.reset()


class XAR(Controlled, HubMixin, ModelMixin, ConfigMixin, Generator):
    """The class-conditional flow over entities. The defaults are the released xAR-B.

    Args:
        num_classes: not counting the null class.
        hidden_size, depths, num_heads: of the two stacks.
        grid: (h, w) of the latent.   latent_dim: C.
        entity, entity_size, scales: see `entities`.
        dropout, attention_dropout: in training, of what attention gives and of its weights.
        cond_drop_rate: how often a label becomes the null class in training.
        sigma: how the times of training are drawn, see `draw_sigma`.
        context_noise: see `ContextNoise`; with `clean` each entity learns from clean ones before it, at twice the
            length.
        control: arguments of `Control`, for a model that control images steer too.
        control_drop_rate: how often a control is left out in training while the class stays.
    Raises: ValueError on an impossible combination, or on a bad argument of `Control`.
    """

    _supports_gradient_checkpointing = True
    _no_split_modules = ("ModulatedBlock",)
    training_options = frozenset({"weight", "hidden_layer"})
    no_decay = ("pos_embed_learned", *CONTROL_NO_DECAY)
    class_embedding = "class_emb"
    lora_targets = TRUNK_LORA
    free_arguments = frozenset(
        {"dropout", "attention_dropout", "cond_drop_rate", "control_drop_rate", "sigma", "context_noise"}
    )
    """These: see `varkit.training.finetune.Tunable`."""
    sampler = "ContinuousSampler"

    order: Tensor
    turn: Tensor
    group: Tensor

    @register_to_config
    def __init__(
        self,
        num_classes: int = 1000,
        hidden_size: int = 768,
        depths: Sequence[int] = (8, 8),
        num_heads: int = 12,
        grid: Sequence[int] = (16, 16),
        latent_dim: int = 16,
        entity: Entity = "cell",
        entity_size: int | Sequence[int] | None = 8,
        scales: Sequence[int | Sequence[int]] | None = None,
        dropout: float = 0.1,
        attention_dropout: float = 0.1,
        cond_drop_rate: float = 0.1,
        sigma: SigmaKind = "logit-normal",
        context_noise: ContextNoise = "independent",
        control: dict[str, Any] | None = None,
        control_drop_rate: float = 0.0,
    ) -> None:
        super().__init__()
        check_context_noise(context_noise)
        height, width = grid
        grids, groups = entities((height, width), entity, entity_size, scales)
        self.layout = TokenLayout(grids, None, latent_dim)
        self.num_classes = num_classes
        self.sizes = [len(g) for g in groups]
        order = torch.cat(groups)
        self.register_buffer("order", order, persistent=False)  # the position of each turn
        self.register_buffer("turn", order.argsort(), persistent=False)  # the turn of each position
        self.register_buffer(
            "group", group_of(self.sizes).to(order.device), persistent=False
        )  # the entity of each turn
        self.class_emb = nn.Embedding(num_classes + 1, hidden_size)
        self.time_embed = TimeEmbedding(hidden_size)
        self.z_proj = nn.Linear(latent_dim, hidden_size)
        first, second = depths
        self.trunk = Trunk(hidden_size, (first, second), num_heads, places(grids)[order], dropout, attention_dropout)
        self.pred = nn.Linear(hidden_size, latent_dim)
        self.add_control(control)
        init_weights(self)
        if self.controller is not None:
            self.controller.init_weights()

    def tokenizer_for(self, tokenizer: Tokenizer) -> Tokenizer:
        """Around a VAE, the scales, where they are the entities."""
        if isinstance(tokenizer, KLVAE) and self.config.entity == "scale":
            return LatentPyramid.around(tokenizer, self.layout.grids, "nearest")
        return tokenizer

    # ---- the network --------------------------------------------------------------------------------------

    def condition_on(self, vectors: Tensor, t: Tensor) -> Tensor:
        """Class vectors (R, D) and times (R, E) -> (R, E, D)."""
        return vectors[:, None] + self.time_embed(t)

    def velocity(self, x: Tensor, cond: Tensor, where: Tensor, **context: Any) -> tuple[Tensor, Tensor]:
        """States (R, n, C) of the turns `where` (n,) -> velocity (R, n, C) float32, and a block's output (R, n, D).

        Args: cond: (R, 1, D) or (R, E, D).   context: see `Trunk.forward`.
        """
        h, hidden = self.trunk(self.z_proj(x.to(self.z_proj.weight.dtype)), cond, where, **context)
        return self.pred(h).float(), hidden

    def forward(
        self,
        noised: Tensor,
        t: Tensor,
        class_labels: Tensor,
        clean: Tensor | None = None,
        hidden_layer: int | None = None,
        control: Tensor | None = None,
        control_weight: Tensor | None = None,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """The velocity of every entity in one pass.

        Args:
            noised: (B, L, C), each entity at its time.   t: (B, E).
            class_labels: (B,) int64; `num_classes` is the null class.
            clean: (B, L, C) to be read in place of the noised entities before each, at time 0, as in sampling.
            hidden_layer: return also what this block gives, counted from 1: (B, L, D).
            control, control_weight: see `Cond`. Each token gets what is of its place, noised or clean.
        Returns: (B, L, C) float32, or a pair.
        """
        length, count = len(self.order), len(self.sizes)
        x, where, group = noised[:, self.order], torch.arange(length, device=noised.device), self.group
        mask = block_mask(self.sizes).to(x.device)
        if clean is not None:
            x = torch.cat([clean[:, self.order].to(x), x], 1)
            t = torch.cat([torch.zeros_like(t), t], 1)
            where, group = where.repeat(2), torch.cat([group, group + count])
            itself = self.group[:, None] == self.group[None]
            mask = torch.cat([torch.cat([mask, mask & ~itself]), torch.cat([torch.zeros_like(mask), itself])], 1)
        cond = self.condition_on(self.class_emb(class_labels), t)
        added = self.fuse(Cond(class_labels, control=control, control_weight=control_weight), self.order)
        v, hidden = self.velocity(x, cond, where, mask=mask, group=group, hidden_layer=hidden_layer, added=added)
        v, hidden = (y[:, -length:][:, self.turn] for y in (v, hidden))
        return v if hidden_layer is None else (v, hidden)

    # ---- sampling -----------------------------------------------------------------------------------------

    def schedule(self, num_steps: int | None = None) -> list[Tensor]:
        """One entity a step. Raises ValueError when asked for another number of steps."""
        if num_steps not in (None, len(self.sizes)):
            raise ValueError(f"xAR draws one entity a step, {len(self.sizes)} in all; got num_steps={num_steps}")
        return list(self.order.split(self.sizes))

    def start(self, cond: Cond, null: Cond | None = None) -> XARState:
        both = cond.beside(null)
        vectors = self.class_emb(both.labels)  # R D
        cache = self.trunk.new_cache(len(vectors), vectors)
        return XARState(cache, vectors, null is not None, self.fuse(both, self.order))

    def predict(self, state: State, inputs: Tensor, positions: Tensor) -> Flow:
        """The flow of the next entity. `inputs` are not read: the state knows the entities before it."""
        assert isinstance(state, XARState)
        cache, vectors, fused = state.cache, state.vectors, state.fused
        if state.pending is not None:
            clean, state.pending = state.pending, None
            self._run(torch.cat([clean, clean]) if state.guided else clean, None, vectors, cache, fused)
            cache.advance(clean.shape[1])
        batch = len(vectors) // 2 if state.guided else len(vectors)
        part, own = cache.rows(batch), first_rows(fused, batch)

        def alone(x: Tensor, t: Tensor) -> Tensor:
            return self._run(x, t, vectors[:batch], part, own)

        def both(x: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
            cond, uncond = self._run(torch.cat([x, x]), torch.cat([t, t]), vectors, cache, fused).chunk(2)
            return cond, uncond

        return Flow(alone, self.layout.dim, both if state.guided else None)

    def _run(self, x: Tensor, t: Tensor | None, vectors: Tensor, cache: KVCache, fused: Fused | None) -> Tensor:
        """One entity (R, n, C) behind those of the cache; clean without a time."""
        where = torch.arange(cache.length, cache.length + x.shape[1], device=x.device)
        times = torch.zeros(len(x), device=x.device) if t is None else t
        return self.velocity(x, self.condition_on(vectors, times[:, None]), where, cache=cache, added=fused)[0]

    def append(self, state: State, tokens: Tensor, positions: Tensor) -> None:
        """Note the clean entity: its keys are written when the next one is predicted."""
        assert isinstance(state, XARState)
        state.pending = tokens

    # ---- training -----------------------------------------------------------------------------------------

    def times(self, rng: Rng) -> Tensor:
        """The times of training, (B, E), in the order of the context's noise."""
        t = draw_sigma(rng, torch.arange(len(self.sizes)), kind=self.config.sigma)
        return sorted_times(t, self.config.context_noise)

    def loss_at(
        self,
        tokens: Tensor,
        noise: Tensor,
        t: Tensor,
        class_labels: Tensor,
        weight: Tensor | float | None = None,
        hidden_layer: int | None = None,
        control: Tensor | None = None,
        control_weight: Tensor | None = None,
    ) -> Losses:
        """The loss of given noise (B, L, C), times (B, E), labels (B,) and control images; see `training_loss`.

        Returns: loss, loss_first and loss_last of the first and last entity, velocity (B, L, C).
        """
        noised = add_noise(tokens, noise, t[:, self.group[self.turn]])
        clean = tokens if self.config.context_noise == "clean" else None
        out = self(noised, t, class_labels, clean, hidden_layer, control, control_weight)
        v, hidden = (out, None) if hidden_layer is None else out
        error = (v - (noise - tokens).float()).square().mean(-1)[:, self.order]  # B L
        weight = weight[:, self.order] if isinstance(weight, Tensor) else weight
        losses = {**entity_losses(error, self.sizes, weight), "velocity": v}
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
        """Mean squared error of the velocity, each token weighted 1 / L.

        Args: tokens: (B, L, C).   inputs: not read.   weight, hidden_layer: see `Generator.training_options`.
        Returns: loss, loss_first, loss_last.
        """
        noise = rng.normal(torch.arange(self.layout.length), Draw.NOISE, count=self.layout.dim).to(tokens)
        labels, weights = cond.labels, cond.control_weight
        if self.training:
            rates = self.config.cond_drop_rate, self.num_classes, self.config.control_drop_rate
            labels, weights = dropped_together(cond, rng, *rates)
        t = self.times(rng).to(tokens.device)
        losses = self.loss_at(tokens, noise, t, labels, weight, hidden_layer, cond.control, weights)
        del losses["velocity"]
        return losses


def _builder(**preset: Any) -> Callable[..., XAR]:
    return lambda **overrides: cast(XAR, XAR(**{**preset, **overrides}))


_TINY = {
    "num_classes": 3,
    "hidden_size": 16,
    "depths": (1, 1),
    "num_heads": 2,
    "grid": (8, 8),
    "latent_dim": 4,
    "entity": "cell",
    "entity_size": (8, 4),
    "dropout": 0.0,
    "attention_dropout": 0.0,
}
_TINY_VAE = {
    "image_size": 16,
    "latent_channels": 4,
    "block_out_channels": (8, 8),
    "layers_per_block": 1,
    "norm_num_groups": 4,
    "down_block_types": None,
}
_SIZES: dict[str, tuple[dict[str, Any], str]] = {
    "b": ({}, "172 M"),
    "l": ({"hidden_size": 1024, "depths": (16, 16), "num_heads": 16}, "608 M"),
    "h": ({"hidden_size": 1280, "depths": (20, 20), "num_heads": 16}, "1.2 B"),
}
_SCORES = {  # steps and guidance of the README; FID and IS of the paper
    "b": (40, 2.7, "FID 1.72, IS 280.4"),
    "l": (50, 2.3, "FID 1.28, IS 292.5"),
    "h": (50, 2.2, "FID 1.24, IS 301.6"),
}
for _name, (_sizes, _parameters) in _SIZES.items():
    register_model(
        ModelEntry(
            f"xar_{_name}",
            "generator",
            _builder(**_sizes),
            f"xAR-{_name.upper()}: cells of 8x8 latents at 256x256, {_parameters} parameters",
            tokenizer="kl16",
            tiny=_TINY,
            tiny_tokenizer=_TINY_VAE,
        )
    )
    _steps, _scale, _score = _SCORES[_name]
    register_checkpoint(
        Checkpoint(
            name=f"xar_{_name}.in1k_256",
            repo_id="OliverRen/xAR",
            filename=f"xAR-{_name.upper()}.pth",
            licence="none stated (OliverRensu/xAR)",
            paper="arXiv 2502.20388",
            resolution=256,
            official_score=f"{_score} (paper), 50,000 images",
            tokenizer="kl16.in1k",
            sampling={
                "guidance_scale": _scale,
                "guidance_schedule": "linear",
                "head_steps": _steps,
                "solver": "sde",
            },
        )
    )

_FASHION = {
    "num_classes": 10,
    "hidden_size": 160,
    "depths": (3, 3),
    "num_heads": 5,
    "grid": (8, 8),
    "latent_dim": 4,
    "entity_size": 4,
}
register_model(
    ModelEntry(
        "xar_fashion",
        "generator",
        _builder(**_FASHION),
        "xAR over latents of Fashion-MNIST, four cells of 4x4, 2.9 M parameters",
        tokenizer="kl_vae_fashion",
        tiny=_TINY,
        tiny_tokenizer=_TINY_VAE,
    )
)
