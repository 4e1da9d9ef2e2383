"""VAR: next-scale prediction (Tian et al., "Visual Autoregressive Modeling", arXiv 2404.02905).

Source: FoundationVision/VAR: models/var.py, models/basic_var.py (78b9539). Parameter names are those of the
released files, so `word_embed` is the input projection, `lvl_embed` the scale embedding, `pos_1LC` the
position embedding, `mat_qkv` the fused projection, `head_nm` the modulated norm before the head.
What differs: labels are dropped in training only (the release drops them in eval mode too); the cache is
sized once and passed in; AdaLN is computed once an image instead of once a scale; no tokenizer inside.

Shapes: B batch, L tokens of all scales, n tokens of one scale, C width, H heads, D head width, V codebook.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, Self, cast

import torch
import torch.nn.functional as F
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.modeling_utils import ModelMixin
from torch import Tensor, nn

from varkit.conditioning.control import Controlled, Fused, dropped_together, inject
from varkit.heads.categorical import Categorical, weighted_cross_entropy, z_loss
from varkit.hub import HubMixin
from varkit.interfaces import Cond, Generator, Losses, State
from varkit.layers.cache import KVCache
from varkit.layers.drop_path import DropPath
from varkit.layers.share import sharing
from varkit.layout import TokenLayout, grids_for, square_grids
from varkit.registry import Checkpoint, ModelEntry, register_checkpoint, register_model
from varkit.rng import Rng
from varkit.tokenizers.multiscale_vq import SCALES_256, SCALES_512

Modulation = tuple[Tensor, ...]
"""gamma1, gamma2, 1 + scale1, 1 + scale2, shift1, shift2: (B, 1, C) each."""


class FeedForward(nn.Module):
    def __init__(self, dim: int, hidden: int, dropout: float) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden)
        self.fc2 = nn.Linear(hidden, dim)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        return self.dropout(self.fc2(F.gelu(self.fc1(x), approximate="tanh")))


class SelfAttention(nn.Module):
    """Multi-head attention with biases on q and v only and, optionally, unit-length q and k.

    With `l2_norm` the softmax sharpness is learned per head (exp of `scale_mul`, at most 100); without it
    the scale is 0.25 / sqrt(D), as released.
    """

    def __init__(self, dim: int, num_heads: int, l2_norm: bool, dropout: float, attention_dropout: float) -> None:
        super().__init__()
        self.num_heads, self.l2_norm = num_heads, l2_norm
        self.attention_dropout = attention_dropout
        self.scale = 1.0 if l2_norm else 0.25 / math.sqrt(dim // num_heads)
        if l2_norm:
            self.scale_mul_1H11 = nn.Parameter(torch.full((1, num_heads, 1, 1), math.log(4)))
        self.mat_qkv = nn.Linear(dim, 3 * dim, bias=False)
        self.q_bias = nn.Parameter(torch.zeros(dim))
        self.v_bias = nn.Parameter(torch.zeros(dim))
        self.proj = nn.Linear(dim, dim)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor, mask: Tensor | None, cache: KVCache | None, layer: int) -> Tensor:
        bias = torch.cat([self.q_bias, torch.zeros_like(self.q_bias), self.v_bias])
        if isinstance(self.mat_qkv, nn.Linear):
            qkv = F.linear(x, self.mat_qkv.weight, bias)
        else:  # an adapter around it, which adds to the product and not to the weight
            qkv = self.mat_qkv(x) + bias
        q, k, v = qkv.unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)  # B H n D each
        if self.l2_norm:
            sharpness = self.scale_mul_1H11.clamp_max(math.log(100)).exp()
            q = (F.normalize(q.float(), dim=-1) * sharpness).to(v.dtype)
            k = F.normalize(k.float(), dim=-1).to(v.dtype)
        if cache is not None:
            k, v = cache.extend(layer, k, v)
        dropout = self.attention_dropout if self.training else 0.0
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=dropout, scale=self.scale)
        return self.dropout(self.proj(out.transpose(1, 2).flatten(2)))


class Block(nn.Module):
    """A transformer block whose norms are modulated, and whose branches are gated, by the class."""

    sharded_methods = ("modulation",)  # reads weights, and is called for all blocks before the first forward

    def __init__(
        self,
        dim: int,
        num_heads: int,
        mlp_ratio: float,
        *,
        shared_adaln: bool,
        l2_norm: bool,
        norm_eps: float,
        dropout: float,
        attention_dropout: float,
        drop_path: float,
    ) -> None:
        super().__init__()
        self.attn = SelfAttention(dim, num_heads, l2_norm, dropout, attention_dropout)
        self.ffn = FeedForward(dim, round(dim * mlp_ratio), dropout)
        self.drop_path = DropPath(drop_path)
        self.norm = nn.LayerNorm(dim, norm_eps, elementwise_affine=False)
        if shared_adaln:
            self.ada_gss = nn.Parameter(torch.empty(1, 1, 6, dim))
        else:
            self.ada_lin = nn.Sequential(nn.SiLU(), nn.Linear(dim, 6 * dim))

    def modulation(self, cond: Tensor, shared: Tensor | None) -> Modulation:
        """cond: (B, C).   shared: (B, 1, 6, C) of the network's one AdaLN, if it has one."""
        six = self.ada_gss + shared if shared is not None else self.ada_lin(cond)[:, None].unflatten(-1, (6, -1))
        gamma1, gamma2, scale1, scale2, shift1, shift2 = six.unbind(2)  # B 1 C each
        return gamma1, gamma2, scale1 + 1, scale2 + 1, shift1, shift2

    def forward(
        self,
        x: Tensor,
        modulation: Modulation,
        mask: Tensor | None = None,
        cache: KVCache | None = None,
        layer: int = 0,
        between: Tensor | None = None,
    ) -> Tensor:
        """between: (B, n, C) that is added after attention and before the feed-forward network (`DistilledVAR`)."""
        gamma1, gamma2, scale1, scale2, shift1, shift2 = modulation
        h = torch.addcmul(shift1, self.norm(x), scale1)
        x = x + self.drop_path(self.attn(h, mask, cache, layer) * gamma1)
        if between is not None:
            x = x + between
        h = torch.addcmul(shift2, self.norm(x), scale2)
        return x + self.drop_path(self.ffn(h) * gamma2)


class ModulatedNorm(nn.Module):
    """LayerNorm, scaled and shifted by the class."""

    def __init__(self, dim: int, norm_eps: float) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(dim, norm_eps, elementwise_affine=False)
        self.ada_lin = nn.Sequential(nn.SiLU(), nn.Linear(dim, 2 * dim))

    def forward(self, x: Tensor, cond: Tensor) -> Tensor:
        scale, shift = self.ada_lin(cond)[:, None].chunk(2, -1)  # B 1 C
        return torch.addcmul(shift, self.norm(x), scale + 1)


@torch.no_grad()
def initialise(model: Any, adaln_gain: float = 0.5, gamma_gain: float = 1e-3, head_gain: float = 0.02) -> None:
    """Initialise a transformer of these blocks as the reference does; a second call starts afresh.

    | what | value |
    |---|---|
    | Linear and Embedding weights, pos_start, pos_1LC | truncated normal, std sqrt(1 / (3 C)) |
    | biases | 0 |
    | head.weight | times head_gain |
    | head_nm's Linear | times adaln_gain |
    | ada_gss | normal, std sqrt(1 / C) |
    | ada_lin rows (or ada_gss) | gammas times gamma_gain, scales and shifts times adaln_gain |
    | attn.proj, ffn.fc2 | divided by sqrt(2 depth) |
    """
    std = math.sqrt(1 / model.config.hidden_size / 3)
    for module in model.modules():
        if isinstance(module, nn.Linear | nn.Embedding):
            nn.init.trunc_normal_(module.weight, std=std)
        if isinstance(module, nn.Linear) and module.bias is not None:
            nn.init.zeros_(module.bias)
    nn.init.trunc_normal_(model.pos_start, std=std)
    nn.init.trunc_normal_(model.pos_1LC, std=std)
    model.head.weight.mul_(head_gain)
    model.head_nm.ada_lin[1].weight.mul_(adaln_gain)
    width = model.config.hidden_size
    for block in model.blocks:
        block.attn.proj.weight.div_(math.sqrt(2 * len(model.blocks)))
        block.ffn.fc2.weight.div_(math.sqrt(2 * len(model.blocks)))
        if model.config.shared_adaln:
            nn.init.normal_(block.ada_gss, std=width**-0.5)
            block.ada_gss[:, :, 2:].mul_(adaln_gain)
            block.ada_gss[:, :, :2].mul_(gamma_gain)
        else:
            block.ada_lin[1].weight[2 * width :].mul_(adaln_gain)
            block.ada_lin[1].weight[: 2 * width].mul_(gamma_gain)


class VARState(State):
    """Cache, and all that depends on the class alone: computed once, read at every scale.

    block_causal: whether scales that are predicted at once see only coarser ones and themselves, as in training.
    fused: what control images add, or None.
    """

    block_causal = True

    def __init__(
        self, cache: KVCache, cond: Tensor, modulations: list[Modulation], guided: bool, fused: Fused | None = None
    ) -> None:
        self.cache, self.cond, self.modulations, self.guided = cache, cond, modulations, guided
        self.fused = fused

    @property
    def length(self) -> int:  # type: ignore[override]
        return self.cache.length

    def rewind(self, count: int) -> None:
        self.cache.rewind(count)

    def reset(self) -> None:
        self.cache.reset()


def var_blocks(
    depth: int, hidden_size: int, num_heads: int, mlp_ratio: float, *, drop_path_rate: float, **options: Any
) -> nn.ModuleList:
    """A stack of `Block`s; the rate of drop path grows along it, from zero. Args: options: of `Block`."""
    rates = (drop_path_rate * i / max(depth - 1, 1) for i in range(depth))
    return nn.ModuleList(Block(hidden_size, num_heads, mlp_ratio, drop_path=rate, **options) for rate in rates)


class VAR(Controlled, HubMixin, ModelMixin, ConfigMixin, Generator):
    """The class-conditional next-scale transformer. The defaults are the released VAR-d16.

    Args:
        num_classes: not counting the null class.
        depth, hidden_size, num_heads, mlp_ratio: of the transformer.
        dropout, attention_dropout, drop_path_rate: the last rises linearly over the blocks.
        shared_adaln: one AdaLN for all blocks (the 512 px release).
        attn_l2_norm: unit-length q and k.
        cond_drop_rate: how often a label becomes the null class in training.
        scales, codebook_size, latent_dim: of the tokenizer.
        official_quirks: drop labels in eval mode too, as the release does: only so is a validation loss the official
            one. Weights and samples do not depend on it.
        control: arguments of `Control`, for a model that control images steer too.
        control_drop_rate: how often a control is left out in training while the class stays.
    Raises: ValueError when hidden_size is no multiple of num_heads, or on a bad argument of `Control`.
    """

    _supports_gradient_checkpointing = True
    _no_split_modules = ("Block",)
    training_options = frozenset(
        {"num_scales", "newest_weight", "label_smoothing", "weight", "hidden_layer", "z_weight"}
    )
    no_decay = ("pos_start", "pos_1LC", "lvl_embed", "scale_mul", "ada_gss", "cls_token", "pos_embed", "kind_embed")
    """Name parts of parameters trained without weight decay, besides biases and 1-D tensors."""
    class_embedding = "class_emb"
    lora_targets = ("blocks.*.attn.mat_qkv", "blocks.*.attn.proj", "blocks.*.ffn.fc1", "blocks.*.ffn.fc2")
    free_arguments = frozenset(
        {"dropout", "attention_dropout", "drop_path_rate", "cond_drop_rate", "official_quirks", "control_drop_rate"}
    )
    """These three: see `varkit.training.finetune.Tunable`."""

    @register_to_config
    def __init__(
        self,
        num_classes: int = 1000,
        depth: int = 16,
        hidden_size: int = 1024,
        num_heads: int = 16,
        mlp_ratio: float = 4.0,
        dropout: float = 0.0,
        attention_dropout: float = 0.0,
        drop_path_rate: float = 0.0,
        norm_eps: float = 1e-6,
        shared_adaln: bool = False,
        cond_drop_rate: float = 0.1,
        attn_l2_norm: bool = True,
        scales: Sequence[int | Sequence[int]] = SCALES_256,
        codebook_size: int = 4096,
        latent_dim: int = 32,
        official_quirks: bool = False,
        control: dict[str, Any] | None = None,
        control_drop_rate: float = 0.0,
    ) -> None:
        super().__init__()
        if hidden_size % num_heads:
            raise ValueError(f"hidden_size {hidden_size} must be a multiple of num_heads {num_heads}")
        self.layout = TokenLayout(square_grids(scales), codebook_size, latent_dim)
        self.num_classes = num_classes
        self.gradient_checkpointing = False
        first, length = self.layout.sizes[0], self.layout.length

        self.word_embed = nn.Linear(latent_dim, hidden_size)
        self.class_emb = nn.Embedding(num_classes + 1, hidden_size)
        self.pos_start = nn.Parameter(torch.empty(1, first, hidden_size))
        self.pos_1LC = nn.Parameter(torch.empty(1, length, hidden_size))
        self.lvl_embed = nn.Embedding(len(self.layout.grids), hidden_size)
        levels = torch.repeat_interleave(
            torch.arange(len(self.layout.sizes)), torch.tensor(self.layout.sizes), output_size=length
        )
        self.register_buffer("levels", levels, persistent=False)  # L

        self.shared_ada_lin = (
            nn.Sequential(nn.SiLU(), nn.Linear(hidden_size, 6 * hidden_size)) if shared_adaln else nn.Identity()
        )
        self.blocks: Any = var_blocks(
            depth,
            hidden_size,
            num_heads,
            mlp_ratio,
            shared_adaln=shared_adaln,
            l2_norm=attn_l2_norm,
            norm_eps=norm_eps,
            dropout=dropout,
            attention_dropout=attention_dropout,
            drop_path_rate=drop_path_rate,
        )
        self.head_nm: Any = ModulatedNorm(hidden_size, norm_eps)
        self.head = nn.Linear(hidden_size, codebook_size)
        self.add_control(control)
        self.init_weights()

    def init_weights(self, adaln_gain: float = 0.5, gamma_gain: float = 1e-3, head_gain: float = 0.02) -> None:
        """Initialise as the reference does; a second call starts afresh. See `initialise`."""
        initialise(self, adaln_gain, gamma_gain, head_gain)
        if self.controller is not None:
            self.controller.init_weights()

    # ---- the network --------------------------------------------------------------------------------------

    def modulations(self, cond: Tensor) -> list[Modulation]:
        """(B, C) -> one modulation a block."""
        shared = None
        if self.config.shared_adaln:
            shared = self.shared_ada_lin(cond)[:, None].unflatten(-1, (6, -1))  # B 1 6 C
        return [block.modulation(cond, shared) for block in self.blocks]

    def embed_inputs(self, inputs: Tensor, cond: Tensor, start: int) -> Tensor:
        """Inputs (B, n, latent_dim) that begin at position `start`, as the blocks read them: (B, n, C).

        The first scale reads no tokens: its input is the class itself.
        """
        first = self.layout.sizes[0]
        end = start + inputs.shape[1]
        x = self.word_embed(inputs[:, max(first - start, 0) :].to(self.word_embed.weight.dtype))
        if start == 0:
            x = torch.cat([cond[:, None] + self.pos_start, x], 1)
        return x + self.lvl_embed(self.levels[start:end]) + self.pos_1LC[:, start:end]

    def logits(self, x: Tensor, cond: Tensor) -> Tensor:
        """(B, n, C) -> (B, n, V) float32."""
        return self.head(self.head_nm(x, cond)).float()

    def forward(
        self,
        inputs: Tensor,
        class_labels: Tensor,
        hidden_layer: int | None = None,
        control: Tensor | None = None,
        control_weight: Tensor | None = None,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Teacher-forced logits of the first n positions.

        Args:
            inputs: (B, n, latent_dim), what `MultiScaleVQ.embed` gives, cut after any scale.
            class_labels: (B,) int64; `num_classes` is the null class.
            hidden_layer: return also what this block gives, counted from 1: (B, n, C).
            control, control_weight: see `Cond`.
        Returns: (B, n, V) float32, or a pair.
        """
        fused = self.fuse(Cond(class_labels, control=control, control_weight=control_weight))
        cond = self.class_emb(class_labels)  # B C
        x = self.embed_inputs(inputs, cond, 0)
        levels = self.levels[: x.shape[1]]
        mask = levels[:, None] >= levels[None, :]  # a scale sees itself and all coarser ones
        hidden = x
        for i, (block, modulation) in enumerate(zip(self.blocks, self.modulations(cond), strict=True), 1):
            x = inject(x, fused, i - 1, slice(x.shape[1]))
            if self.gradient_checkpointing and torch.is_grad_enabled():
                x = self._gradient_checkpointing_func(block, x, modulation, mask)
            else:
                x = block(x, modulation, mask)
            hidden = x if i == hidden_layer else hidden
        logits = self.logits(x, cond)
        return logits if hidden_layer is None else (logits, hidden)

    def teacher_forced(self, inputs: Tensor, cond: Cond) -> Categorical:
        """What is predicted everywhere at once, given true inputs: one pass. No label is dropped."""
        return Categorical(self(inputs, cond.labels, None, cond.control, cond.control_weight))

    # ---- other sizes --------------------------------------------------------------------------------------

    def resized(self, grid: tuple[int, int]) -> Self:
        """The same weights at other scales: those of `grids_for`, the position embedding of each one interpolated
        (bicubic). The network was not trained so."""
        own, grids = self.layout, grids_for(self.layout.grids, grid)
        if grids == own.grids:
            return self
        made = sharing(self)
        made.layout = TokenLayout(grids, own.codebook_size, own.dim)
        tables = []
        for table, old, new in zip(own.split(self.pos_1LC.detach()), own.grids, grids, strict=True):
            if new != old:
                maps = table.transpose(1, 2).unflatten(2, old).float()  # 1 C h w
                maps = F.interpolate(maps, size=new, mode="bicubic", align_corners=False)
                table = maps.flatten(2).transpose(1, 2).to(table)
            tables.append(table)
        made.pos_1LC = nn.Parameter(torch.cat(tables, 1), requires_grad=False)
        levels = torch.arange(len(grids), device=self.levels.device)
        made.levels = levels.repeat_interleave(torch.tensor(made.layout.sizes, device=levels.device))
        made.register_to_config(scales=grids)
        return made

    # ---- sampling -----------------------------------------------------------------------------------------

    def schedule(self, num_steps: int | None = None) -> list[Tensor]:
        """One group a scale. Raises ValueError when asked for another number of steps."""
        if num_steps not in (None, len(self.layout.grids)):
            raise ValueError(
                f"VAR decides one scale a step, {len(self.layout.grids)} in all; got num_steps={num_steps}"
            )
        return [torch.arange(s.start, s.stop, device=self.levels.device) for s in self.layout.slices]

    def start(self, cond: Cond, null: Cond | None = None) -> VARState:
        both = cond.beside(null)
        vector = self.class_emb(both.labels)  # R C, R = B or 2 B
        cache = KVCache(
            layers=len(self.blocks),
            rows=vector.shape[0],
            heads=self.config.num_heads,
            length=self.layout.length,
            head_dim=self.config.hidden_size // self.config.num_heads,
            dtype=vector.dtype,
            device=vector.device,
        )
        return VARState(cache, vector, self.modulations(vector), null is not None, self.fuse(both))

    def predict(self, state: State, inputs: Tensor, positions: Tensor) -> Categorical:
        """The next scale, all at once; several are predicted as if each input were right.

        For one no mask is needed: the cache holds coarser scales only.
        """
        assert isinstance(state, VARState)
        if state.guided:
            inputs = torch.cat([inputs, inputs])
        first, end = state.length, state.length + inputs.shape[1]
        x, mask = self.embed_inputs(inputs, state.cond, first), None
        one_scale = any(s.start <= first and end <= s.stop for s in self.layout.slices)
        if state.block_causal and not one_scale:
            mask = self.levels[first:end, None] >= self.levels[:end]
        for i, (block, modulation) in enumerate(zip(self.blocks, state.modulations, strict=True)):
            x = block(inject(x, state.fused, i, slice(first, end)), modulation, mask, state.cache, i)
        logits = self.logits(x, state.cond)
        return Categorical(*logits.chunk(2)) if state.guided else Categorical(logits)

    def append(self, state: State, tokens: Tensor, positions: Tensor) -> None:
        """Keep the keys that `predict` wrote: they are of the scale's inputs, not of its tokens."""
        assert isinstance(state, VARState)
        state.cache.advance(positions.shape[-1])

    # ---- training -----------------------------------------------------------------------------------------

    def training_loss(  # type: ignore[override]
        self,
        tokens: Tensor,
        inputs: Tensor,
        cond: Cond,
        rng: Rng,
        *,
        num_scales: int | None = None,
        newest_weight: float = 1.0,
        label_smoothing: float = 0.0,
        weight: Tensor | None = None,
        hidden_layer: int | None = None,
        z_weight: float = 0.0,
    ) -> Losses:
        """Cross entropy, each token weighted 1 / L, plus what the reference logs.

        Args:
            tokens, inputs: (B, L) and (B, L, latent_dim).   cond: class ids, and control images.
            num_scales: progressive training, the first scales only (official `prog_si`).
            newest_weight: weight of the last of them.
            label_smoothing: in [0, 1).
            weight: (B, L) to use instead of 1 / L.   hidden_layer: see `Generator.training_options`.
            z_weight: of the mean squared logarithm of the softmax's denominator, which keeps logits small.
        Returns: loss; accuracy; loss_last and accuracy_last of the finest scale trained.
        """
        labels, weights = cond.labels, cond.control_weight
        if self.training or self.config.official_quirks:
            rates = self.config.cond_drop_rate, self.num_classes, self.config.control_drop_rate
            labels, weights = dropped_together(cond, rng, *rates)
        last = self.layout.slices[(num_scales or len(self.layout.grids)) - 1]
        target = tokens[:, : last.stop]
        out = self(inputs[:, : last.stop], labels, hidden_layer, cond.control, weights)
        logits, hidden = (out, None) if hidden_layer is None else out
        if weight is None:
            weight = torch.full((last.stop,), 1 / self.layout.length, device=logits.device)
            weight[last] *= newest_weight
        else:
            weight = weight[:, : last.stop]
        loss = weighted_cross_entropy(logits, target, weight, label_smoothing)
        with torch.no_grad():
            right = (logits.argmax(-1) == target).float()
            log = {
                "accuracy": right.mean(),
                "loss_last": F.cross_entropy(logits[:, last].flatten(0, 1), target[:, last].flatten()),
                "accuracy_last": right[:, last].mean(),
            }
        if z_weight:
            log["z"] = z_loss(logits)
            loss = loss + z_weight * log["z"]
        if hidden is not None:
            log["hidden"] = hidden
        return {"loss": loss, **log}


def _builder(**preset: Any) -> Callable[..., VAR]:
    return lambda **overrides: cast(VAR, VAR(**{**preset, **overrides}))


def _sized(depth: int, **more: Any) -> dict[str, Any]:
    """The paper's rule (section 3.2): width 64 d, d heads, stochastic depth 0.1 d / 24."""
    return {
        "depth": depth,
        "hidden_size": 64 * depth,
        "num_heads": depth,
        "drop_path_rate": 0.1 * depth / 24,
        **more,
    }


_TINY = {
    "num_classes": 3,
    "depth": 2,
    "hidden_size": 32,
    "num_heads": 2,
    "scales": (1, 2, 4),
    "codebook_size": 24,
    "latent_dim": 4,
}
_TINY_TOKENIZER = {
    "codebook_size": 24,
    "latent_dim": 4,
    "base_channels": 32,
    "channel_multipliers": (1, 1),
    "num_res_blocks": 1,
    "scales": (1, 2, 4),
}
_PRESETS: dict[str, tuple[dict[str, Any], str, str]] = {
    **{
        f"var_d{depth}": (_sized(depth), "multiscale_vq_f16", f"VAR-d{depth}: ImageNet 256x256, {size} parameters")
        for depth, size in ((12, "132 M"), (16, "310 M"), (20, "601 M"), (24, "1.03 B"), (30, "2.01 B"))
    },
    "var_d36": (
        _sized(36, shared_adaln=True, scales=SCALES_512),
        "multiscale_vq_f16_512",
        "VAR-d36: ImageNet 512x512, 2.35 B parameters, one AdaLN for all blocks",
    ),
    "var_small_64": (
        {
            "num_classes": 10,
            "depth": 8,
            "hidden_size": 384,
            "num_heads": 6,
            "drop_path_rate": 0.03,
            "shared_adaln": True,
            "scales": (1, 2, 3, 4, 6, 8),
            "codebook_size": 1024,
            "latent_dim": 16,
        },
        "multiscale_vq_f8_64",
        "a small one for folders of 64x64 images, 15 M parameters",
    ),
    "var_fashion": (
        {
            "num_classes": 10,
            "depth": 6,
            "hidden_size": 160,
            "num_heads": 5,
            "shared_adaln": True,
            "scales": (1, 2, 3, 4, 6, 8),
            "codebook_size": 512,
            "latent_dim": 16,
        },
        "multiscale_vq_fashion",
        "Fashion-MNIST at 32x32, 2.2 M parameters",
    ),
}
for _name, (_preset, _tokenizer, _summary) in _PRESETS.items():
    register_model(
        ModelEntry(
            _name,
            "generator",
            _builder(**_preset),
            _summary,
            tokenizer=_tokenizer,
            tiny=_TINY,
            tiny_tokenizer=_TINY_TOKENIZER,
        )
    )
for _depth, _tag, _score in (
    (16, "in1k_256", "FID 3.55 (README), ADM evaluator, cfg 1.5, top_k 900, top_p 0.96"),
    (20, "in1k_256", "FID 2.95 (README), ADM evaluator, cfg 1.5, top_k 900, top_p 0.96"),
    (24, "in1k_256", "FID 2.33 (README), ADM evaluator, cfg 1.5, top_k 900, top_p 0.96"),
    (30, "in1k_256", "FID 1.97 (README), ADM evaluator, cfg 1.5, top_k 900, top_p 0.96"),
    (36, "in1k_512", "FID 2.63, ADM evaluator"),
):
    register_checkpoint(
        Checkpoint(
            name=f"var_d{_depth}.{_tag}",
            repo_id="FoundationVision/var",
            filename=f"var_d{_depth}.pth",
            licence="MIT",
            paper="arXiv 2404.02905",
            resolution=512 if _depth == 36 else 256,
            official_score=_score,
            tokenizer="multiscale_vq_f16.openimages",
            # Official cfg 1.5 is guidance_scale 2.5 here: w = 1 + cfg.
            sampling={"guidance_scale": 2.5, "guidance_schedule": "linear", "top_k": 900, "top_p": 0.96},
        )
    )
