"""RAR: randomised autoregressive generation (Yu et al., arXiv 2411.00776): raster at last, any order on the way.

Source: bytedance/1d-tokenizer: modeling/rar.py (942a96f). Parameter names are those of the released `rar_*.bin`.
What differs: labels are dropped by keyed random numbers, the cache is sized once, and any order can be sampled.

The sequence is [cls, condition, token, token, ...] in the order of prediction. A token carries the embedding of its
own position and, "target-aware", that of the position to be predicted next; the condition carries that of the first.
Embedding rows: V codes, a mask row (never read), the classes, the dropped class.

Shapes: B batch, L tokens, n of them at once, S sequence entries, C width, H heads, V codebook.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
import torch.nn.functional as F
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.modeling_utils import ModelMixin
from torch import Tensor, nn

from varkit.conditioning.label import drop_labels
from varkit.generators.one_token import OneToken
from varkit.heads.categorical import Categorical, weighted_cross_entropy
from varkit.hub import HubMixin
from varkit.interfaces import Cond, Generator, Losses, State
from varkit.layers.cache import CacheSlots, KVCache
from varkit.layers.mlp import FeedForward
from varkit.layout import TokenLayout
from varkit.orders import random_orders, token_order
from varkit.registry import Checkpoint, ModelEntry, register_checkpoint, register_model
from varkit.rng import Draw, Rng


def random_ratio(step: int, start: int, end: int) -> float:
    """How often a training sample gets a random order: 1 until step `start`, falling to 0 at `end`, 0 afterwards."""
    if step <= start:
        return 1.0
    return max(0.0, 1 - (step - start) / (end - start)) if end > start else 0.0


class Attention(nn.Module):
    """Multi-head attention whose queries and keys are normalised head by head."""

    def __init__(self, dim: int, num_heads: int, dropout: float, attention_dropout: float, eps: float) -> None:
        super().__init__()
        self.num_heads, self.attention_dropout = num_heads, attention_dropout
        self.qkv = nn.Linear(dim, 3 * dim)
        self.q_norm = nn.LayerNorm(dim // num_heads, eps)
        self.k_norm = nn.LayerNorm(dim // num_heads, eps)
        self.proj = nn.Linear(dim, dim)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor, mask: Tensor | None, cache: KVCache | CacheSlots | None, layer: int) -> Tensor:
        """mask: (S, S) bool over a cached sequence; None is causal without a cache, all keys with one."""
        q, k, v = self.qkv(x).unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)  # B H S D each
        q, k = self.q_norm(q), self.k_norm(k)
        if cache is not None:
            k, v = cache.extend(layer, k, v)
        dropout = self.attention_dropout if self.training else 0.0
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=dropout, is_causal=cache is None)
        return self.dropout(self.proj(out.transpose(1, 2).flatten(2)))


class Block(nn.Module):
    """A transformer block whose norms are modulated, and whose branches are gated, entry by entry."""

    def __init__(
        self, dim: int, num_heads: int, hidden: int, dropout: float, attention_dropout: float, eps: float
    ) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps)
        self.attn = Attention(dim, num_heads, dropout, attention_dropout, eps)
        self.norm2 = nn.LayerNorm(dim, eps)
        self.mlp = FeedForward(dim, hidden, dropout)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(dim, 6 * dim))

    def forward(
        self,
        x: Tensor,
        cond: Tensor,
        mask: Tensor | None = None,
        cache: KVCache | CacheSlots | None = None,
        layer: int = 0,
    ) -> Tensor:
        """x, cond: (B, S, C)."""
        shift1, scale1, gate1, shift2, scale2, gate2 = self.adaLN_modulation(cond).chunk(6, -1)
        x = x + gate1 * self.attn(torch.addcmul(shift1, self.norm1(x), scale1 + 1), mask, cache, layer)
        return x + gate2 * self.mlp(torch.addcmul(shift2, self.norm2(x), scale2 + 1))


class ModulatedNorm(nn.Module):
    """LayerNorm, scaled and shifted. As released, the scale comes first here and second in the blocks."""

    def __init__(self, dim: int, eps: float) -> None:
        super().__init__()
        self.norm_final = nn.LayerNorm(dim, eps, elementwise_affine=False)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(dim, 2 * dim))

    def forward(self, x: Tensor, cond: Tensor) -> Tensor:
        scale, shift = self.adaLN_modulation(cond).chunk(2, -1)
        return torch.addcmul(shift, self.norm_final(x), scale + 1)


class RARState(State):
    """Cache, condition, and the positions in the order in which they were decided."""

    def __init__(self, cache: KVCache, cond: Tensor, guided: bool, length: int) -> None:
        self.cache, self.cond, self.guided = cache, cond, guided  # cond: R C
        self.order = torch.empty(length, dtype=torch.int64, device=cond.device)
        self.length = 0

    def rewind(self, count: int) -> None:
        if not 0 <= count <= self.length:
            raise ValueError(f"cannot rewind {count} of {self.length} positions")
        self.length -= count
        # cls and condition stand before the first token's entry, which is read for the second
        self.cache.rewind(self.cache.length - (self.length + 1 if self.length else 0))

    def reset(self) -> None:
        self.rewind(self.length)


class RAR(OneToken, HubMixin, ModelMixin, ConfigMixin, Generator):
    """The class-conditional randomised autoregressive transformer. The defaults are the released RAR-B.

    Args:
        num_classes: not counting the null class.
        depth, hidden_size, num_heads, mlp_hidden: of the transformer.
        dropout, attention_dropout: in training.
        cond_drop_rate: how often a label becomes the null class in training.
        grid, codebook_size, latent_dim: of the tokenizer; a grid (n,) is a sequence.
    Raises: ValueError when hidden_size is no multiple of num_heads.
    """

    _supports_gradient_checkpointing = True
    _no_split_modules = ("Block",)
    training_options = frozenset({"random_ratio", "orders", "label_smoothing", "weight", "hidden_layer"})
    no_decay = ("cls_token", "pos_embed", "timesteps_embeddings", "embeddings")
    """Name parts of parameters trained without weight decay, besides biases and 1-D tensors."""
    class_embedding = "embeddings"
    lora_targets = ("blocks.*.attn.qkv", "blocks.*.attn.proj", "blocks.*.mlp.fc1", "blocks.*.mlp.fc2")
    free_arguments = frozenset({"dropout", "attention_dropout", "cond_drop_rate"})
    """These three: see `varkit.training.finetune.Tunable`."""

    @register_to_config
    def __init__(
        self,
        num_classes: int = 1000,
        depth: int = 24,
        hidden_size: int = 768,
        num_heads: int = 16,
        mlp_hidden: int = 3072,
        dropout: float = 0.1,
        attention_dropout: float = 0.1,
        norm_eps: float = 1e-6,
        cond_drop_rate: float = 0.1,
        grid: Sequence[int] = (16, 16),
        codebook_size: int = 1024,
        latent_dim: int = 256,
    ) -> None:
        super().__init__()
        if hidden_size % num_heads:
            raise ValueError(f"hidden_size {hidden_size} must be a multiple of num_heads {num_heads}")
        self.layout = TokenLayout((tuple(grid),), codebook_size, latent_dim)
        self.num_classes, self.first_class = num_classes, codebook_size + 1  # a row of `embeddings`
        self.gradient_checkpointing = False
        length = self.layout.length

        self.cls_token = nn.Parameter(torch.zeros(1, 1, hidden_size))
        # Rows: cls, condition, positions; as released, many more rows than are read.
        self.pos_embed = nn.Parameter(torch.zeros(1, length + 1024, hidden_size))
        self.target_aware_pos_embed = nn.Parameter(torch.zeros(1, length + 1024, hidden_size))
        self.timesteps_embeddings = nn.Parameter(torch.zeros(1, length + 100, hidden_size))
        self.embeddings = nn.Embedding(codebook_size + 1 + num_classes + 1, hidden_size)
        self.blocks: Any = nn.ModuleList(
            Block(hidden_size, num_heads, mlp_hidden, dropout, attention_dropout, norm_eps) for _ in range(depth)
        )
        self.adaln_before_head: Any = ModulatedNorm(hidden_size, norm_eps)
        self.lm_head = nn.Linear(hidden_size, codebook_size)
        earlier = torch.ones(length + 1, length + 1, dtype=torch.bool).tril()
        self.register_buffer("earlier", earlier, persistent=False)  # of cls, condition and all tokens but the last
        self.register_buffer("raster", torch.arange(length)[None], persistent=False)  # 1 L
        self.init_weights()

    @torch.no_grad()
    def init_weights(self) -> None:
        """Truncated normal of std 0.02; biases, and all that modulates, 0. A second call starts afresh."""
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Embedding):
                nn.init.trunc_normal_(module.weight, std=0.02)
            if isinstance(module, nn.Linear):
                nn.init.zeros_(module.bias)
        for table in (self.cls_token, self.pos_embed, self.target_aware_pos_embed, self.timesteps_embeddings):
            nn.init.trunc_normal_(table, std=0.02)
        for block in (*self.blocks, self.adaln_before_head):
            nn.init.zeros_(block.adaLN_modulation[1].weight)

    # ---- the network --------------------------------------------------------------------------------------

    def embed_classes(self, labels: Tensor) -> Tensor:
        """(B,) -> (B, C); `num_classes` is the null class."""
        return self.embeddings(labels + self.first_class)

    def embed_sequence(self, cond: Tensor, ids: Tensor, orders: Tensor) -> Tensor:
        """cls, condition (B, C) and n ids (B, n) in the order of prediction, (B|1, L) -> (B, n + 2, C)."""
        n = ids.shape[1]
        x = torch.cat([self.cls_token.expand(len(ids), -1, -1), cond[:, None], self.embeddings(ids)], 1)
        rows = F.pad(orders[:, :n] + 2, (2, 0))  # 1|B n+2
        rows[:, 1] = 1
        target = F.pad(self.target_aware_pos_embed[0, orders[:, : n + 1] + 2], (0, 0, 1, 0))  # cls looks for nothing
        if target.shape[1] < x.shape[1]:  # nor does the last token
            target = F.pad(target, (0, 0, 0, 1))
        return x + self.pos_embed[0, rows] + target

    def sequence_logits(
        self, ids: Tensor, class_labels: Tensor, orders: Tensor | None = None, hidden_layer: int | None = None
    ) -> tuple[Tensor, Tensor]:
        """Logits of a teacher-forced sequence.

        Args:
            ids: (B, n) true tokens in the order of prediction, n <= L.
            class_labels: (B,).   orders: (B, L) permutations; None is raster.
            hidden_layer: the block, from 1, whose output is returned too; None is the last.
        Returns: (B, n + 1, V) float32, row i of the token predicted i-th, and (B, n + 1, C).
        """
        orders = self.raster if orders is None else orders
        cond = self.embed_classes(class_labels)
        x = self.embed_sequence(cond, ids, orders)
        each = cond[:, None] + self.timesteps_embeddings[:, : x.shape[1]]  # B S C
        hidden = x
        for i, block in enumerate(self.blocks, 1):
            if self.gradient_checkpointing and torch.is_grad_enabled():
                x = self._gradient_checkpointing_func(block, x, each)
            else:
                x = block(x, each)
            hidden = x if i == hidden_layer or hidden_layer is None else hidden
        return self.lm_head(self.adaln_before_head(x[:, 1:], each[:, 1:])).float(), hidden[:, 1:]

    def forward(self, inputs: Tensor, class_labels: Tensor) -> Tensor:
        """Teacher-forced raster logits.

        Args: inputs: (B, n) ids, each the one before its position (the first is not read).   class_labels: (B,).
        Returns: (B, n, V) float32.
        """
        return self.sequence_logits(inputs[:, 1:], class_labels)[0]

    def teacher_forced(self, inputs: Tensor, cond: Cond) -> Categorical:
        """What is predicted everywhere at once in raster order, given true inputs. No label is dropped."""
        return Categorical(self(inputs, cond.labels))

    # ---- sampling -----------------------------------------------------------------------------------------

    def schedule(self, num_steps: int | None = None) -> list[Tensor]:
        """Raster order, one token a step. Raises ValueError when asked for another number of steps."""
        if num_steps not in (None, self.layout.length):
            raise ValueError(f"RAR decides one token a step, {self.layout.length} in all; got num_steps={num_steps}")
        return list(self.raster[0].split(1))

    def in_order(self, name: str, num_steps: int | None = None) -> list[Tensor]:
        self.schedule(num_steps)  # refuses another number of steps
        return list(token_order(name, self.layout.grids[0]).to(self.raster.device).split(1))

    def groups_around(
        self, keep: Tensor, rng: Rng, num_steps: int | None = None, order: str | None = None
    ) -> tuple[Tensor, list[Tensor]]:
        """Known tokens come first, so that all others see them; then these. Both are in raster order, or in that of the
        name.

        Raises: ValueError when images of a batch have different masks: the order is one for all.
        """
        if (keep != keep[:1]).any():
            raise ValueError(
                "RAR decides tokens in one order for all images: draw images with other masks in another call"
            )
        turns = torch.cat(self.schedule(num_steps) if order is None else self.in_order(order, num_steps))
        kept = keep[0].to(turns.device)[turns]
        return turns[kept].expand(len(keep), -1), list(turns[~kept][:, None])

    def start(self, cond: Cond, null: Cond | None = None) -> RARState:
        vector = self.embed_classes(cond.beside(null).labels)  # R C, R = B or 2 B
        cache = self.new_cache(
            layers=len(self.blocks),
            heads=self.config.num_heads,
            length=self.layout.length + 1,
            like=vector,
            head_dim=self.config.hidden_size // self.config.num_heads,
        )
        return RARState(cache, vector, null is not None, self.layout.length)

    def predict(self, state: State, inputs: Tensor, positions: Tensor) -> Categorical:
        """The next positions (n,): `inputs[:, i]` is the token that was decided before `positions[i]`."""
        assert isinstance(state, RARState)
        before = state.order[state.length - 1 : state.length]  # of the token that is read
        compiled = self.run_compiled(state, inputs, positions, before, state.cond)
        if compiled is not None:
            return Categorical(*compiled.chunk(2)) if state.guided else Categorical(compiled)
        if state.guided:
            inputs = torch.cat([inputs, inputs])
        start, first = state.cache.length, state.length == 0
        target = self.target_aware_pos_embed[0, positions + 2]  # n C
        if first:
            x = self.embed_sequence(state.cond, inputs[:, 1:], positions[None])
        else:
            before = torch.cat([before, positions[:-1]])
            x = self.embeddings(inputs) + self.pos_embed[0, before + 2] + target
        end = start + x.shape[1]
        each = state.cond[:, None] + self.timesteps_embeddings[:, start:end]
        mask = self.earlier[start:end, :end] if x.shape[1] > 1 else None
        for i, block in enumerate(self.blocks):
            x = block(x, each, mask, state.cache, i)
        if first:
            x, each = x[:, 1:], each[:, 1:]
        logits = self.lm_head(self.adaln_before_head(x, each)).float()
        return Categorical(*logits.chunk(2)) if state.guided else Categorical(logits)

    def nodes(
        self, inputs: Tensor, slots: CacheSlots, positions: Tensor, extra: tuple[Any, ...], layers: int | None = None
    ) -> Tensor:
        before, cond = extra
        x = self.embeddings(inputs) + self.pos_embed[0, before + 2] + self.target_aware_pos_embed[0, positions + 2]
        each = cond[:, None] + self.timesteps_embeddings[0, slots.places]
        mask = slots.visible()
        for i, block in enumerate(self.blocks if layers is None else self.blocks[:layers]):
            x = block(x, each, mask, slots, i)
        return self.adaln_before_head(x, each)

    def output_of(self, hidden: Tensor) -> Tensor:
        return self.lm_head(hidden).float()

    def extra(self, state: Any, before: Tensor, rows: Tensor | None = None) -> tuple[Any, ...]:
        return before, state.cond if rows is None else state.cond[rows]

    def append(self, state: State, tokens: Tensor, positions: Tensor) -> None:
        assert isinstance(state, RARState)
        n = positions.shape[-1]
        state.order[state.length : state.length + n] = positions
        state.cache.advance(n if state.length else n + 1)
        state.length += n

    # ---- training -----------------------------------------------------------------------------------------

    def draw_orders(self, rng: Rng, ratio: float) -> Tensor:
        """(B, L): a random order for the share `ratio` of the images, raster for the others."""
        rng = rng.to(self.raster.device)
        u = rng.uniform(torch.zeros(1, dtype=torch.int64), Draw.ORDER, step=1)  # B 1
        return torch.where(u < ratio, random_orders(rng, self.layout.length), self.raster)

    def training_loss(  # type: ignore[override]
        self,
        tokens: Tensor,
        inputs: Tensor,
        cond: Cond,
        rng: Rng,
        *,
        random_ratio: float = 1.0,
        orders: Tensor | None = None,
        label_smoothing: float = 0.0,
        weight: Tensor | None = None,
        hidden_layer: int | None = None,
    ) -> Losses:
        """Cross entropy of every token in the order of its image. In eval mode no label is dropped and all is raster.

        Args:
            tokens, inputs: (B, L) ids; `inputs` are those before, in raster order.   cond: class ids.
            random_ratio: how often an image gets a random order; see the function of that name.
            orders: (B, L) permutations to use instead, in eval mode too.
            label_smoothing: in [0, 1).   weight: (B, L) to use instead of 1 / L.
            hidden_layer: see `Generator.training_options`.
        Returns: loss; accuracy.
        """
        labels = cond.labels
        if orders is None:
            orders = self.draw_orders(rng, random_ratio if self.training else 0.0)
        if self.training:
            labels = drop_labels(labels, rng, self.config.cond_drop_rate, self.num_classes)
        # A token is read as the input of the position behind it; the last one of the raster as it is.
        read = torch.cat([inputs[:, 1:], tokens[:, -1:]], 1).gather(1, orders)
        logits, hidden = self.sequence_logits(read[:, :-1], labels, orders, hidden_layer)
        target = tokens.gather(1, orders)
        each = 1 / self.layout.length if weight is None else weight.gather(1, orders)
        losses = {
            "loss": weighted_cross_entropy(logits, target, each, label_smoothing),
            "accuracy": (logits.detach().argmax(-1) == target).float().mean(),
        }
        if hidden_layer is not None:
            places = orders.argsort(1)[..., None].expand(-1, -1, hidden.shape[-1])
            losses["hidden"] = hidden.gather(1, places)
        return losses


def _builder(**preset: Any) -> Callable[..., RAR]:
    return lambda **overrides: cast(RAR, RAR(**{**preset, **overrides}))


_TINY_TOKENIZER = {
    "codebook_size": 24,
    "latent_dim": 4,
    "base_channels": 32,
    "channel_multipliers": (1, 2),
    "num_res_blocks": 1,
    "grid": (3, 4),
}
_TINY = {
    "num_classes": 3,
    "depth": 2,
    "hidden_size": 32,
    "num_heads": 2,
    "mlp_hidden": 48,
    "grid": (3, 4),
    "codebook_size": 24,
    "latent_dim": 4,
}
_FASHION = {
    "num_classes": 10,
    "depth": 6,
    "hidden_size": 160,
    "num_heads": 5,
    "mlp_hidden": 640,
    "grid": (8, 8),
    "codebook_size": 512,
    "latent_dim": 16,
}


def _sized(hidden_size: int, depth: int, mlp_hidden: int) -> dict[str, Any]:
    return {"hidden_size": hidden_size, "depth": depth, "mlp_hidden": mlp_hidden}


_PRESETS: dict[str, tuple[dict[str, Any], str, str]] = {
    "rar_b": (_sized(768, 24, 3072), "maskgit_vqgan_f16", "RAR-B: ImageNet 256x256, 261 M parameters"),
    "rar_l": (_sized(1024, 24, 4096), "maskgit_vqgan_f16", "RAR-L: ImageNet 256x256, 462 M parameters"),
    "rar_xl": (_sized(1280, 32, 5120), "maskgit_vqgan_f16", "RAR-XL: ImageNet 256x256, 955 M parameters"),
    "rar_xxl": (_sized(1408, 40, 6144), "maskgit_vqgan_f16", "RAR-XXL: ImageNet 256x256, 1.50 B parameters"),
    "rar_fashion": (_FASHION, "maskgit_vqgan_fashion", "Fashion-MNIST at 32x32, 3.6 M parameters"),
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
for _name, _scale, _power, _temperature, _fid in (
    ("rar_b", 16.0, 2.75, 1.0, "1.95"),
    ("rar_l", 15.5, 2.5, 1.02, "1.70"),
    ("rar_xl", 6.9, 1.5, 1.02, "1.50"),
    ("rar_xxl", 8.0, 1.2, 1.02, "1.48"),
):
    register_checkpoint(
        Checkpoint(
            name=f"{_name}.in1k_256",
            repo_id="yucornetto/RAR",
            filename=f"{_name}.bin",
            licence="Apache-2.0",
            paper="arXiv 2411.00776",
            resolution=256,
            official_score=f"FID {_fid} (README), ADM evaluator, 50,000 images with these settings",
            tokenizer="maskgit_vqgan_f16.in1k_256",
            sampling={
                "guidance_scale": _scale,
                "guidance_schedule": "power-cosine",
                "guidance_power": _power,
                "temperature": _temperature,
            },
        )
    )
