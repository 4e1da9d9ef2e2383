"""Next-token prediction over FlexTok's ordered tokens (arXiv 2502.13967, section 4): any number of first tokens is an
image, so generation may stop at any length.

Source of the sequence's facts: EPFL-VILAB/search-over-tokens: flextok_ar/ (e7564c5). The class is added to a learned
start token, and no class adds nothing. What differs: the released trunks come from another library and their
layout is not public here, so this is a transformer of our own (pre-norm without parameters, gated feed-forward), with
a key-value cache; released weights do not fit it, and the text-conditional variant is not here.

Shapes: B batch, R batch rows (2 B with guidance), L tokens, n tokens of one step, D width, V codebook.
"""

from __future__ import annotations

import math
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
from varkit.layout import TokenLayout
from varkit.registry import ModelEntry, register_model
from varkit.rng import Rng
from varkit.tokenizers.flextok import FeedForward, norm


class Block(nn.Module):
    def __init__(self, dim: int, num_heads: int, dropout: float) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(dim, 3 * dim, bias=False)
        self.proj = nn.Linear(dim, dim, bias=False)
        self.mlp = FeedForward(dim)
        self.dropout = nn.Dropout(dropout)

    def forward(
        self, x: Tensor, mask: Tensor | None, cache: KVCache | CacheSlots | None = None, layer: int = 0
    ) -> Tensor:
        q, k, v = self.qkv(norm(x)).unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)  # R H n D/H each
        q, k = norm(q), norm(k)
        if cache is not None:
            k, v = cache.extend(layer, k, v)
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        x = x + self.dropout(self.proj(out.transpose(1, 2).flatten(2)))
        return x + self.dropout(self.mlp(norm(x)))


class FlexTokARState(State):
    """The cache, and the start token with its class: computed once."""

    def __init__(self, cache: KVCache, start: Tensor, guided: bool) -> None:
        self.cache, self.start, self.guided = cache, start, guided

    @property
    def length(self) -> int:  # type: ignore[override]
        return self.cache.length

    def rewind(self, count: int) -> None:
        self.cache.rewind(count)

    def reset(self) -> None:
        self.cache.reset()


class FlexTokAR(OneToken, HubMixin, ModelMixin, ConfigMixin, Generator):
    """The class-conditional GPT over ordered tokens.

    Args:
        num_classes: not counting the null class, which has no parameters.
        depth, hidden_size, num_heads, dropout: of the transformer.
        cond_drop_rate: how often a label becomes the null class in training.
        num_tokens, levels: of the tokenizer.
    Raises: ValueError when hidden_size is no multiple of num_heads.
    """

    _supports_gradient_checkpointing = True
    _no_split_modules = ("Block",)
    training_options = frozenset({"weight", "label_smoothing", "hidden_layer"})
    no_decay = ("start", "positions")
    lora_targets = ("blocks.*.qkv", "blocks.*.proj", "blocks.*.mlp.fc1", "blocks.*.mlp.fc2", "blocks.*.mlp.fc3")
    free_arguments = frozenset({"dropout", "cond_drop_rate"})
    """These two: see `varkit.training.finetune.Tunable`."""

    @register_to_config
    def __init__(
        self,
        num_classes: int = 1000,
        depth: int = 24,
        hidden_size: int = 1536,
        num_heads: int = 24,
        dropout: float = 0.0,
        cond_drop_rate: float = 0.1,
        num_tokens: int = 256,
        levels: Sequence[int] = (8, 8, 8, 5, 5, 5),
    ) -> None:
        super().__init__()
        if hidden_size % num_heads:
            raise ValueError(f"hidden_size {hidden_size} must be a multiple of num_heads {num_heads}")
        size = math.prod(levels)
        self.layout = TokenLayout(((num_tokens,),), size, len(levels))
        self.num_classes = num_classes
        self.gradient_checkpointing = False
        self.start_token = nn.Parameter(torch.empty(1, hidden_size))
        self.class_embedding = nn.Embedding(num_classes, hidden_size)
        self.token_embedding = nn.Embedding(size, hidden_size)
        self.positions = nn.Parameter(torch.empty(num_tokens, hidden_size))
        self.blocks: Any = nn.ModuleList(Block(hidden_size, num_heads, dropout) for _ in range(depth))
        self.head = nn.Linear(hidden_size, size)
        self.init_weights()

    @torch.no_grad()
    def init_weights(self) -> None:
        """Embeddings and positions normal, std 0.02; linear weights std 1 / sqrt(inputs), those that end a branch
        divided by sqrt(2 depth), the head's by 10; biases zero."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, std=module.in_features**-0.5)
            elif isinstance(module, nn.Embedding):
                nn.init.normal_(module.weight, std=0.02)
        for parameter in (self.start_token, self.positions):
            nn.init.normal_(parameter, std=0.02)
        for block in self.blocks:
            for last in (block.proj, block.mlp.fc2):
                last.weight.div_(math.sqrt(2 * len(self.blocks)))
        self.head.weight.div_(10)
        nn.init.zeros_(self.head.bias)

    def start_of(self, class_labels: Tensor) -> Tensor:
        """(R,) ids, `num_classes` for none -> (R, D)."""
        vectors = self.class_embedding(class_labels.clamp(max=self.num_classes - 1))
        return self.start_token + vectors * (class_labels < self.num_classes)[:, None]

    def embed_inputs(self, inputs: Tensor, start: Tensor, first: int) -> Tensor:
        """Ids (R, n) read from position `first` on -> (R, n, D); position 0 reads the start token instead."""
        x = self.token_embedding(inputs[:, 1:] if first == 0 else inputs)
        if first == 0:
            x = torch.cat([start[:, None], x], 1)
        return x + self.positions[first : first + x.shape[1]]

    def forward(
        self, inputs: Tensor, class_labels: Tensor, hidden_layer: int | None = None
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Teacher-forced logits of the first n positions.

        Args:
            inputs: (B, n) int64, the id before each position.
            class_labels: (B,) int64; `num_classes` is the null class.
            hidden_layer: return also what this block gives, counted from 1: (B, n, D).
        Returns: (B, n, V) float32, or a pair.
        """
        x = self.embed_inputs(inputs, self.start_of(class_labels), 0)
        mask = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool, device=x.device).tril()
        hidden = x
        for i, block in enumerate(self.blocks, 1):
            if self.gradient_checkpointing and torch.is_grad_enabled():
                x = self._gradient_checkpointing_func(block, x, mask)
            else:
                x = block(x, mask)
            hidden = x if i == hidden_layer else hidden
        logits = self.head(norm(x)).float()
        return logits if hidden_layer is None else (logits, hidden)

    def teacher_forced(self, inputs: Tensor, cond: Cond) -> Categorical:
        """What is predicted everywhere at once, given true inputs: one pass. No label is dropped."""
        return Categorical(self(inputs, cond.labels))

    # ---- sampling -----------------------------------------------------------------------------------------

    def schedule(self, num_steps: int | None = None) -> list[Tensor]:
        """One token a step. Raises ValueError when asked for another number of steps."""
        if num_steps not in (None, self.layout.length):
            raise ValueError(f"one token a step, {self.layout.length} in all; got num_steps={num_steps}")
        return list(torch.arange(self.layout.length, device=self.positions.device).split(1))

    def start(self, cond: Cond, null: Cond | None = None) -> FlexTokARState:
        start = self.start_of(cond.beside(null).labels)
        cache = self.new_cache(
            layers=len(self.blocks),
            heads=self.config.num_heads,
            length=self.layout.length,
            like=start,
            head_dim=self.config.hidden_size // self.config.num_heads,
        )
        return FlexTokARState(cache, start, guided=null is not None)

    def predict(self, state: State, inputs: Tensor, positions: Tensor) -> Categorical:
        """The next token; or several, each of which sees those before it."""
        assert isinstance(state, FlexTokARState)
        compiled = self.run_compiled(state, inputs, positions)
        if compiled is not None:
            return Categorical(*compiled.chunk(2)) if state.guided else Categorical(compiled)
        if state.guided:
            inputs = torch.cat([inputs, inputs])
        n, first = inputs.shape[1], state.length
        x = self.embed_inputs(inputs, state.start, first)
        mask = None if n == 1 else torch.ones(n, first + n, dtype=torch.bool, device=x.device).tril(first)
        for i, block in enumerate(self.blocks):
            x = block(x, mask, state.cache, i)
        logits = self.head(norm(x)).float()
        return Categorical(*logits.chunk(2)) if state.guided else Categorical(logits)

    def nodes(
        self, inputs: Tensor, slots: CacheSlots, positions: Tensor, extra: tuple[Any, ...], layers: int | None = None
    ) -> Tensor:
        x, mask = self.token_embedding(inputs) + self.positions[slots.places], slots.visible()
        for i, block in enumerate(self.blocks if layers is None else self.blocks[:layers]):
            x = block(x, mask, slots, i)
        return norm(x)

    def output_of(self, hidden: Tensor) -> Tensor:
        return self.head(hidden).float()

    def append(self, state: State, tokens: Tensor, positions: Tensor) -> None:
        """Keep the keys that `predict` wrote: they are of what was read, not of what was decided."""
        assert isinstance(state, FlexTokARState)
        state.cache.advance(positions.shape[-1])

    # ---- training -----------------------------------------------------------------------------------------

    def training_loss(  # type: ignore[override]
        self,
        tokens: Tensor,
        inputs: Tensor,
        cond: Cond,
        rng: Rng,
        *,
        weight: Tensor | None = None,
        label_smoothing: float = 0.0,
        hidden_layer: int | None = None,
    ) -> Losses:
        """Cross entropy, each token weighted 1 / L.

        Args: as those of `Generator.training_options`; label_smoothing in [0, 1).
        Returns: loss; accuracy.
        """
        labels = cond.labels
        if self.training:
            labels = drop_labels(labels, rng, self.config.cond_drop_rate, self.num_classes)
        out = self(inputs, labels, hidden_layer)
        logits, hidden = (out, None) if hidden_layer is None else out
        loss = weighted_cross_entropy(
            logits, tokens, 1 / self.layout.length if weight is None else weight, label_smoothing
        )
        losses = {"loss": loss, "accuracy": (logits.detach().argmax(-1) == tokens).float().mean()}
        return losses if hidden is None else {**losses, "hidden": hidden}


def _builder(**preset: Any) -> Callable[..., FlexTokAR]:
    return lambda **overrides: cast(FlexTokAR, FlexTokAR(**{**preset, **overrides}))


_TINY = {
    "num_classes": 3,
    "depth": 2,
    "hidden_size": 32,
    "num_heads": 2,
    "num_tokens": 6,
    "levels": (4, 3, 2),
}
_TINY_TOKENIZER = {
    "vae_config": {
        "image_size": 16,
        "latent_channels": 4,
        "block_out_channels": (8, 8),
        "layers_per_block": 1,
        "norm_num_groups": 4,
    },
    "num_registers": 6,
    "levels": (4, 3, 2),
    "encoder_width": 16,
    "encoder_depth": 1,
    "encoder_head_dim": 8,
    "decoder_width": 16,
    "decoder_depth": 1,
    "decoder_head_dim": 8,
    "num_steps": 2,
}
_FASHION = {
    "num_classes": 10,
    "depth": 6,
    "hidden_size": 160,
    "num_heads": 5,
    "dropout": 0.1,
    "num_tokens": 32,
    "levels": (8, 5, 5, 5),
}
register_model(
    ModelEntry(
        "flextok_ar_fashion",
        "generator",
        _builder(**_FASHION),
        "next token over FlexTok's 32 ordered tokens of Fashion-MNIST, 2.2 M parameters",
        tokenizer="flextok_fashion",
        tiny=_TINY,
        tiny_tokenizer=_TINY_TOKENIZER,
    )
)
