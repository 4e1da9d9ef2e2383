"""What generators share that read a prefix and then token after token, by LLaMA's blocks: LlamaGen, ELM, LARP.

Each token is predicted by the entry before it, the first by the end of the prefix.

Shapes: B batch, L tokens, T prefix entries, S = T + L - 1, C width, R rows of the cache (B, or 2 B under guidance).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, cast

import torch
from torch import Tensor, nn

from varkit.conditioning.control import Fused
from varkit.generators.one_token import OneToken
from varkit.heads.categorical import Categorical
from varkit.interfaces import Cond, State
from varkit.layers.cache import CacheSlots, KVCache
from varkit.layers.llama import causal
from varkit.layout import TokenLayout

LORA_TARGETS = (
    "layers.*.attention.wqkv",
    "layers.*.attention.wo",
    "layers.*.feed_forward.w1",
    "layers.*.feed_forward.w2",
    "layers.*.feed_forward.w3",
)
"""What LoRA adapts in LLaMA's blocks."""


class ClassPrefix(nn.Module):
    """One token a class; the last row stands for no class."""

    def __init__(self, num_classes: int, dim: int) -> None:
        super().__init__()
        self.embedding_table = nn.Embedding(num_classes + 1, dim)

    def forward(self, cond: Cond) -> Tensor:
        return self.embedding_table(cond.labels)[:, None]  # B 1 C

    def null(self, cond: Cond) -> Cond:
        return Cond(torch.full_like(cond.labels, self.embedding_table.num_embeddings - 1))


class PrefixState(State):
    """The cache, the prefix, which positions of the whole sequence may be seen, and what control images add.

    Attributes: official_padding: see `varkit.generators.llamagen.released_padding`.   phrase: (R, T), see `Cond`, or
        None.
    """

    official_padding = False
    phrase: Tensor | None = None

    def __init__(
        self,
        cache: KVCache,
        prefix: Tensor,
        guided: bool,
        visible: Tensor | None = None,
        fused: Fused | None = None,
    ) -> None:
        self.cache, self.prefix, self.visible, self.guided, self.fused = cache, prefix, visible, guided, fused
        self.length = 0

    def rewind(self, count: int) -> None:
        """Going back to the start forgets the prefix too: the next `predict` reads it again."""
        if not 0 <= count <= self.length:
            raise ValueError(f"cannot rewind {count} of {self.length} positions")
        self.length -= count
        if self.length:
            self.cache.rewind(count)
        else:
            self.cache.reset()

    def reset(self) -> None:
        self.rewind(self.length)


class Prefixed(OneToken, ABC):
    """For a generator, beside its other bases; its `layers` are `varkit.layers.llama.Block`s, its `norm` follows them.

    Attributes: prefix_length: T.   rotary: how queries and keys are turned, see `Block`.
    """

    layers: Any
    norm: Any
    config: Any
    layout: TokenLayout
    prefix_length = 1
    rotary: Any

    @property
    def blocks(self) -> Any:
        return self.layers

    @abstractmethod
    def prefix(self, cond: Cond) -> Tensor:
        """What stands before the tokens: (B, T, C)."""

    @abstractmethod
    def embed(self, ids: Tensor) -> Tensor:
        """(R, n) ids, or (R, n, G), -> (R, n, C)."""

    def placed(self, x: Tensor, places: Any) -> Tensor:
        """Entries of the sequence (R, n, C) told their places in it, a slice or (n,); rotated ones need no telling."""
        return x

    def steer(self, x: Tensor, fused: Fused | None, layer: int, where: slice) -> Tensor:
        """What control images add to what block `layer` reads, of entries that predict positions `where`; here none."""
        return x

    def schedule(self, num_steps: int | None = None) -> list[Tensor]:
        """One position a step, in turn. Raises ValueError when asked for another number of steps."""
        length = self.layout.length
        if num_steps not in (None, length):
            raise ValueError(
                f"{type(self).__name__} decides one token a step, {length} in all; got num_steps={num_steps}"
            )
        return list(torch.arange(length, device=next(cast(nn.Module, self).parameters()).device).split(1))

    def start(self, cond: Cond, null: Cond | None = None) -> PrefixState:
        prefix = self.prefix(cond.beside(null))  # R T C
        cache = self.new_cache(
            layers=len(self.layers),
            heads=self.config.get("kv_heads") or self.config.num_heads,
            length=self.prefix_length + self.layout.length - 1,
            like=prefix,
            head_dim=self.config.hidden_size // self.config.num_heads,
        )
        return PrefixState(cache, prefix, null is not None)

    def predict(self, state: State, inputs: Tensor, positions: Tensor) -> Categorical:
        """The next positions; several are predicted as if each input were right."""
        assert isinstance(state, PrefixState)
        compiled = self.run_compiled(state, inputs, positions, *self.extra(state, positions - 1))
        if compiled is not None:
            return Categorical(*compiled.chunk(2)) if state.guided else Categorical(compiled)
        if state.guided:
            inputs = torch.cat([inputs, inputs])
        first, count = state.cache.length, inputs.shape[1]
        if state.length == 0:
            x = torch.cat([state.prefix, self.embed(inputs[:, 1:])], 1)
        else:
            x = self.embed(inputs)
        end = first + x.shape[1]
        x, mask = self.placed(x, slice(first, end)), self.seen(state, first, end)
        where = slice(state.length, state.length + count)
        for i, block in enumerate(self.layers):
            x = block(self.steer(x, state.fused, i, where), self.rotary, mask, state.cache, i, first)
        hidden = self.norm(x)
        predictive = Categorical(*self.output_of(hidden[:, -count:]).chunk(2 if state.guided else 1))
        predictive.hidden = hidden
        return predictive

    def seen(self, state: PrefixState, first: int, end: int) -> Tensor | None:
        """What entries `first` to `end` of the sequence see, as `Block` takes it; None: all that is there and not
        later."""
        if first == 0 or end - first == 1:
            return None
        return causal(torch.ones(1, end, dtype=torch.bool, device=state.prefix.device))[:, :, first:]

    def nodes(
        self, inputs: Tensor, slots: CacheSlots, positions: Tensor, extra: tuple[Any, ...], layers: int | None = None
    ) -> Tensor:
        x, mask = self.placed(self.embed(inputs), slots.places), slots.visible()
        for i, block in enumerate(self.layers if layers is None else self.layers[:layers]):
            x = block(x, self.rotary, mask, slots, i, slots.places)
        return self.norm(x)

    def append(self, state: State, tokens: Tensor, positions: Tensor) -> None:
        """Keep the keys that `predict` wrote: they are of the inputs, not of these tokens."""
        assert isinstance(state, PrefixState)
        count = positions.shape[-1]
        state.cache.advance(count + (self.prefix_length - 1 if state.length == 0 else 0))
        state.length += count
