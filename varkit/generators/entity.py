"""Any entity, any predictive: what a step draws and what it is drawn by are two independent choices.

The entities are those of xAR (token, cell, subsample, scale, image; Ren et al., arXiv 2502.20388) and, of clips, a
frame; the predictives a categorical over ids, a flow, or a diffusion of latents. A transformer that is causal over
entities reads those before and says a vector for each token of the next, as VAR and FlowAR do over scales; a head draws
the tokens from these vectors. No paper has the whole grid, so no released weights fit.

What is read to predict an entity: the one before it, token by token (as next-block prediction does, Ren et al.,
arXiv 2502.07737), the class for the first, and at scales what the tokenizer makes of the coarser ones. In training it
may be noised, each entity at a time of its own which the transformer is told (xAR's noisy context); of ids, as many as
the time says are replaced by random ones. In sampling it is clean. Keys and values are cached: one pass an entity.

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
from varkit.conditioning.control import Controlled, Fused, dropped_together
from varkit.entities import (
    ContextNoise,
    Entity,
    check_context_noise,
    entities,
    entity_losses,
    group_of,
    sorted_times,
)
from varkit.heads.categorical import Categorical
from varkit.heads.entity import CategoricalHead, EntityDiffusion, EntityFlow, Network, PredictiveKind
from varkit.heads.flow import SigmaKind, add_noise
from varkit.hub import HubMixin
from varkit.interfaces import Cond, Generator, Losses, Predictive, State, Tokenizer
from varkit.layers.cache import KVCache
from varkit.layers.modulated import TRUNK_LORA, TimeEmbedding, Trunk, block_mask, init_weights, places
from varkit.layout import TokenLayout
from varkit.registry import ModelEntry, register_model
from varkit.rng import Draw, Rng
from varkit.tokenizers.frames import FrameTokenizer
from varkit.tokenizers.kl_vae import KLVAE
from varkit.tokenizers.latent_pyramid import LatentPyramid
from varkit.tokenizers.magvit2 import TINY as MAGVIT2_TINY


class EntityState(State):
    """The cache, the class vectors, and the entities drawn so far.

    fused: what control images add, in the order of turns, or None.
    """

    def __init__(self, cache: KVCache, vectors: Tensor, guided: bool, fused: Fused | None = None) -> None:
        self.cache, self.vectors, self.guided, self.fused = cache, vectors, guided, fused
        self.drawn: list[Tensor] = []  # (B, n) or (B, n, C) each

    @property
    def length(self) -> int:  # type: ignore[override]
        return self.cache.length

    def rewind(self, count: int) -> None:
        """Whole entities only. Raises ValueError when one would be cut."""
        left, drawn = count, list(self.drawn)
        while left > 0 and drawn:
            left -= drawn.pop().shape[1]
        if left:
            raise ValueError(f"{count} tokens are no whole entities of those drawn last")
        self.drawn = drawn
        self.cache.rewind(count)

    def reset(self) -> None:
        self.drawn = []
        self.cache.reset()


class EntityAR(Controlled, HubMixin, ModelMixin, ConfigMixin, Generator):
    """The class-conditional transformer over entities, and the head that draws them.

    Args:
        num_classes: not counting the null class.
        hidden_size, depths, num_heads: of the two stacks of the transformer.
        grid: (h, w) of the latent, or of the ids; (t, h, w) of those of clips.
        latent_dim: C of the latents; of ids at scales, that of the vectors which the tokenizer hands on.
        entity, entity_size, scales: see `varkit.entities.entities`.
        predictive: `categorical`, over `codebook_size` ids; or `flow` or `diffusion`, of latents.
        head_network, head_width, head_depth, head_repeats: of flow and diffusion, see `varkit.heads.entity.LatentHead`.
        sigma: how the times of a flow's training are drawn, see `draw_sigma`.
        context_noise: how what is read is noised in training, see `ContextNoise`.
        dropout, attention_dropout: in training, of what attention gives and of its weights.
        cond_drop_rate: how often a label becomes the null class in training.
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
        {
            "dropout",
            "attention_dropout",
            "cond_drop_rate",
            "control_drop_rate",
            "sigma",
            "context_noise",
            "head_repeats",
        }
    )
    """These: see `varkit.training.finetune.Tunable`."""

    order: Tensor
    group: Tensor

    @register_to_config
    def __init__(
        self,
        num_classes: int = 1000,
        hidden_size: int = 768,
        depths: Sequence[int] = (6, 6),
        num_heads: int = 12,
        grid: Sequence[int] = (16, 16),
        latent_dim: int = 16,
        entity: Entity = "cell",
        entity_size: int | Sequence[int] | None = 4,
        scales: Sequence[int | Sequence[int]] | None = None,
        predictive: PredictiveKind = "flow",
        codebook_size: int = 16384,
        head_network: Network = "entity",
        head_width: int = 768,
        head_depth: int = 4,
        head_repeats: int = 1,
        sigma: SigmaKind = "logit-normal",
        context_noise: ContextNoise = "independent",
        dropout: float = 0.0,
        attention_dropout: float = 0.0,
        cond_drop_rate: float = 0.1,
        control: dict[str, Any] | None = None,
        control_drop_rate: float = 0.0,
    ) -> None:
        super().__init__()
        check_context_noise(context_noise)
        if predictive not in ("categorical", "flow", "diffusion"):
            raise ValueError(f"predictive must be categorical, flow or diffusion; got {predictive!r}")
        self.discrete, self.by_scale = predictive == "categorical", entity == "scale"
        if self.discrete and self.by_scale and context_noise != "clean":
            raise ValueError(
                f"ids at scales are read as sums of codes, which only the tokenizer can make of other ids: "
                f"context_noise must be clean; got {context_noise}"
            )
        grids, groups = entities(tuple(grid), entity, entity_size, scales)
        self.layout = TokenLayout(grids, codebook_size if self.discrete else None, latent_dim)
        self.sampler = "NextGroupSampler" if self.discrete else "ContinuousSampler"
        self.num_classes, self.sizes = num_classes, [len(g) for g in groups]
        order = torch.cat(groups)
        self.register_buffer("order", order, persistent=False)  # the position of each turn
        self.register_buffer(
            "group", group_of(self.sizes).to(order.device), persistent=False
        )  # the entity of each turn
        where = places(grids)[order]
        self.class_emb = nn.Embedding(num_classes + 1, hidden_size)
        if self.discrete and not self.by_scale:
            self.tok_embeddings = nn.Embedding(codebook_size, hidden_size)
        else:
            self.z_proj = nn.Linear(latent_dim, hidden_size)
        if context_noise != "clean":
            self.time_embed = TimeEmbedding(hidden_size)
        first, second = depths
        self.trunk = Trunk(hidden_size, (first, second), num_heads, where, dropout, attention_dropout)
        network: dict[str, Any] = {
            "width": head_width,
            "depth": head_depth,
            "network": head_network,
            "places": where,
            "sizes": self.sizes,
            "repeats": head_repeats,
        }
        self.head: CategoricalHead | EntityFlow | EntityDiffusion
        if predictive == "categorical":
            self.head = CategoricalHead(hidden_size, codebook_size)
        elif predictive == "flow":
            self.head = EntityFlow(latent_dim, hidden_size, sigma, **network)
        else:
            self.head = EntityDiffusion(latent_dim, hidden_size, **network)
        self.add_control(control)
        self.init_weights()

    @torch.no_grad()
    def init_weights(self) -> None:
        """As xAR's, but gates, modulations and the output of the head are zero, so that blocks start as identities
        (Peebles and Xie, arXiv 2212.09748)."""
        init_weights(self)
        for name, module in self.named_modules():
            last_of_gate = name.endswith(("ada_lin.1", "adaLN_modulation.1"))
            if isinstance(module, nn.Linear) and (last_of_gate or name.endswith("final_layer.linear")):
                nn.init.zeros_(module.weight)
        if self.controller is not None:
            self.controller.init_weights()

    def tokenizer_for(self, tokenizer: Tokenizer) -> Tokenizer:
        """Around a VAE, of images or of each frame of clips, the scales, where they are the entities."""
        if not self.by_scale:
            return tokenizer
        if isinstance(tokenizer, FrameTokenizer) and isinstance(tokenizer.frame, KLVAE):
            each = LatentPyramid.around(tokenizer.frame, [grid[1:] for grid in self.layout.grids])
            return FrameTokenizer.around(each, tokenizer.num_frames)
        return LatentPyramid.around(tokenizer, self.layout.grids) if isinstance(tokenizer, KLVAE) else tokenizer

    # ---- the network --------------------------------------------------------------------------------------

    def first(self, class_vectors: Tensor) -> Tensor:
        """What the first entity reads: (R, D) -> (R, n, D)."""
        return class_vectors[:, None].expand(-1, self.sizes[0], -1)

    def embed(self, read: Tensor) -> Tensor:
        """What the others read: ids (R, n), or vectors (R, n, C), -> (R, n, D)."""
        if self.discrete and not self.by_scale:
            return self.tok_embeddings(read)
        return self.z_proj(read.to(self.z_proj.weight.dtype))

    def condition_on(self, vectors: Tensor, t: Tensor) -> Tensor:
        """Class vectors (R, D) and times of what is read (R, E) -> (R, E, D); without noise, (R, 1, D)."""
        if self.config.context_noise == "clean":
            return vectors[:, None]
        return vectors[:, None] + self.time_embed(t)

    def shifted(self, tokens: Tensor, inputs: Tensor) -> Tensor:
        """What is read in place of each turn but those of the first entity: (B, L - n, ...), in the order of turns.

        Args: tokens: (B, L) or (B, L, C).   inputs: of the tokenizer, (B, L, C), read at scales.
        """
        if self.by_scale:
            return inputs[:, self.sizes[0] :]
        return tokens[:, self.order][:, : len(self.order) - self.sizes[-1]]  # entities are equally large

    def forward(
        self,
        read: Tensor,
        t: Tensor,
        class_labels: Tensor,
        hidden_layer: int | None = None,
        control: Tensor | None = None,
        control_weight: Tensor | None = None,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Teacher-forced vectors for the head, in the order of turns.

        Args:
            read: what `shifted` gives, noised or not.   t: (B, E), how much; 0 is clean.
            class_labels: (B,) int64; `num_classes` is the null class.
            hidden_layer: return also what this block gives, counted from 1: (B, L, D).
            control, control_weight: see `Cond`. A turn gets what is of the token that it predicts.
        Returns: (B, L, D), or a pair.
        """
        vectors = self.class_emb(class_labels)
        first = self.first(vectors)
        x = torch.cat([first, self.embed(read).to(first)], 1)
        cond, noisy = self.condition_on(vectors, t), self.config.context_noise != "clean"
        where, mask = torch.arange(len(self.order), device=x.device), block_mask(self.sizes).to(x.device)
        group = self.group if noisy else None
        added = self.fuse(Cond(class_labels, control=control, control_weight=control_weight), self.order)
        z, hidden = self.trunk(x, cond, where, mask=mask, group=group, hidden_layer=hidden_layer, added=added)
        return z if hidden_layer is None else (z, hidden)

    def teacher_forced(self, inputs: Tensor, cond: Cond) -> Categorical:
        """What is predicted everywhere at once, given true inputs that are clean: one pass. No condition is dropped.

        Args: inputs: (B, L) ids, each the token before; the first is not read, and the last token nothing reads.
        Raises: ValueError of latents, and at scales.
        """
        if not isinstance(self.head, CategoricalHead) or self.by_scale:
            raise ValueError("teacher_forced is of ids that are no scales: a flow or a diffusion has no logits")
        tokens = torch.cat([inputs[:, 1:], inputs[:, :1]], 1)
        times = torch.zeros(len(inputs), len(self.sizes), device=inputs.device)
        z = self(self.shifted(tokens, inputs), times, cond.labels, None, cond.control, cond.control_weight)
        return Categorical(self.head.linear(z).float()[:, self.order.argsort()])

    # ---- sampling -----------------------------------------------------------------------------------------

    def schedule(self, num_steps: int | None = None) -> list[Tensor]:
        """One entity a step. Raises ValueError when asked for another number of steps."""
        if num_steps not in (None, len(self.sizes)):
            raise ValueError(f"one entity a step is drawn, {len(self.sizes)} in all; got num_steps={num_steps}")
        return list(self.order.split(self.sizes))

    def start(self, cond: Cond, null: Cond | None = None) -> EntityState:
        both = cond.beside(null)
        vectors = self.class_emb(both.labels)  # R D
        cache = self.trunk.new_cache(len(vectors), vectors)
        return EntityState(cache, vectors, null is not None, self.fuse(both, self.order))

    def predict(self, state: State, inputs: Tensor, positions: Tensor) -> Predictive:
        """The next entity. `inputs` are read at scales; else the state knows the entity before."""
        assert isinstance(state, EntityState)
        if state.drawn:
            read = inputs if self.by_scale else state.drawn[-1]
            x = self.embed(torch.cat([read, read]) if state.guided else read)
        else:
            x = self.first(state.vectors)
        where = torch.arange(state.length, state.length + positions.shape[-1], device=positions.device)
        times = torch.zeros(len(state.vectors), 1, device=positions.device)
        cond = self.condition_on(state.vectors, times)
        z, _ = self.trunk(x, cond, where, cache=state.cache, added=state.fused)
        return self.head.predictive(z, where, state.guided)

    def append(self, state: State, tokens: Tensor, positions: Tensor) -> None:
        """Keep the keys that `predict` wrote, and the tokens that are read next. Raises ValueError on mixed codes."""
        assert isinstance(state, EntityState)
        if self.discrete and not self.by_scale and tokens.is_floating_point():
            raise ValueError("more_smooth hands on mixtures of codes, but this model reads ids: leave it off")
        state.cache.advance(positions.shape[-1])
        state.drawn.append(tokens)

    # ---- training -----------------------------------------------------------------------------------------

    def noised(self, read: Tensor, rng: Rng) -> tuple[Tensor, Tensor]:
        """What is read, and the times at which it is noised, (B, E); the class, read first, is at time 0."""
        count = len(self.sizes)
        t = torch.zeros(len(read), count, device=read.device)
        if self.config.context_noise == "clean" or count == 1:
            return read, t
        u = rng.uniform(torch.arange(count - 1), Draw.FILL_NOISE).to(read.device)
        t[:, 1:] = sorted_times(u, self.config.context_noise)
        each, where = t[:, self.group[self.sizes[0] :]], torch.arange(read.shape[1])  # of what is read, B L-n
        if self.discrete:
            replaced = rng.uniform(where, Draw.CORRUPT).to(read.device) < each
            other = rng.uniform(where, Draw.CORRUPT, step=1).to(read.device) * self.config.codebook_size
            return torch.where(replaced, other.long(), read), t
        noise = rng.normal(where, Draw.FILL_NOISE, step=1, count=self.layout.dim).to(read)
        return add_noise(read, noise, each), t

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
        """The head's loss, each token weighted 1 / L.

        Args: tokens: (B, L) ids or (B, L, C).   inputs: of the tokenizer.   weight, hidden_layer: see
            `Generator.training_options`.
        Returns: loss; loss_first and loss_last of the first and the last entity; of ids accuracy and accuracy_last, of
            a diffusion mse, that of the velocity.
        """
        labels, weights = cond.labels, cond.control_weight
        if self.training:
            rates = self.config.cond_drop_rate, self.num_classes, self.config.control_drop_rate
            labels, weights = dropped_together(cond, rng, *rates)
        read, t = self.noised(self.shifted(tokens, inputs), rng)
        out = self(read, t, labels, hidden_layer, cond.control, weights)
        z, hidden = (out, None) if hidden_layer is None else out
        of_head = self.head.losses(z, tokens[:, self.order], self.order, rng.to(tokens.device))
        losses = entity_losses(of_head["error"], self.sizes, None if weight is None else weight[:, self.order])
        if "hit" in of_head:
            losses["accuracy"] = of_head["hit"].mean()
            losses["accuracy_last"] = of_head["hit"][:, -self.sizes[-1] :].mean()
        if "mse" in of_head:
            losses["mse"] = of_head["mse"].mean()
        return losses if hidden is None else {**losses, "hidden": hidden[:, self.order.argsort()]}


def _builder(**preset: Any) -> Callable[..., EntityAR]:
    return lambda **overrides: cast(EntityAR, EntityAR(**{**preset, **overrides}))


_TINY: dict[str, Any] = {
    "num_classes": 3,
    "hidden_size": 32,
    "depths": (1, 1),
    "num_heads": 2,
    "grid": (4, 4),
    "latent_dim": 4,
    "entity_size": (4, 2),
    "head_width": 64,
    "head_depth": 1,
}
_TINY_CLIPS = {"grid": (3, 2, 2), "latent_dim": 3, "codebook_size": 24}
_FASHION: dict[str, Any] = {
    "num_classes": 10,
    "hidden_size": 128,
    "depths": (3, 3),
    "num_heads": 4,
    "grid": (8, 8),
    "latent_dim": 4,
    "entity_size": 4,
    "codebook_size": 512,
    "head_width": 128,
    "head_depth": 2,
}
register_model(
    ModelEntry(
        "entity_moving_fashion",
        "generator",
        _builder(
            **{
                **_FASHION,
                "num_classes": 30,
                "grid": (5, 8, 8),
                "entity": "frame",
                "entity_size": None,
                "predictive": "categorical",
                "codebook_size": 1000,
                "context_noise": "clean",
            }
        ),
        "any entity of moving garments, 17 frames of 32x32; latent frames of ids, 2.1 M parameters",
        tokenizer="magvit2_moving_fashion",
        tiny={**_TINY, "entity": "frame", "entity_size": None, **_TINY_CLIPS},
        tiny_tokenizer=MAGVIT2_TINY,
    )
)
register_model(
    ModelEntry(
        "entity_fashion",
        "generator",
        _builder(**_FASHION),
        "any entity and predictive on Fashion-MNIST; four cells of 4x4 latents by a flow, 2.6 M parameters",
        tokenizer="kl_vae_fashion",
        tiny=_TINY,
        tiny_tokenizer={
            "image_size": 8,
            "latent_channels": 4,
            "block_out_channels": (8, 8),
            "layers_per_block": 1,
            "norm_num_groups": 4,
            "down_block_types": None,
        },
    )
)
