"""What generators share that decide one token a step: their cache, and that step compiled.

`predict` reads a cache that grows, so each step has other shapes. The compiled step has always the same ones: it writes
into the whole cache at a place that a tensor names, and masks what is not there yet. On CUDA it is recorded as a CUDA
graph, so that a step costs one launch.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any, Protocol, Self

import torch
from torch import Tensor

from varkit.compiler import require_compiler
from varkit.layers.cache import CacheSlots, KVCache


class CachedState(Protocol):
    """What the compiled step needs of a state."""

    cache: KVCache
    guided: bool


class OneToken:
    """For a generator, beside its other bases; `one_token` is its `predict` for a single position, or for the nodes of
    a tree below the tokens of the cache (`varkit.layers.cache.TreeWindow`).

    Attributes: compiled: the compiled `one_token`, or None.
    """

    compiled: Callable[..., Tensor] | None = None
    _lent: tuple[weakref.ref[KVCache], list[Tensor], list[Tensor]] | None = None

    def nodes(
        self, inputs: Tensor, slots: CacheSlots, positions: Tensor, extra: tuple[Any, ...], layers: int | None = None
    ) -> Tensor:
        """What the output head reads, (R, n, C), at entries of the sequence that are not its first.

        Args:
            inputs: (R, n) ids, or (R, n, G); R rows, those without condition behind the others.
            slots: the cache, to be written at the places of these entries.
            positions: (n,) or (R, n), the predicted ones.   extra: what `extra` gives.
            layers: run the first so many alone; None is all.
        """
        raise TypeError(f"{type(self).__name__} has no step of one token")

    def output_of(self, hidden: Tensor) -> Tensor:
        """(R, n, C) of `nodes` -> logits (R, n, V) float32, or (R, n, G, V)."""
        raise TypeError(f"{type(self).__name__} has no step of one token")

    def extra(self, state: Any, before: Tensor, rows: Tensor | None = None) -> tuple[Any, ...]:
        """What `nodes` needs of the state.

        Args: before: (n,) or (R, n), positions of the tokens that are read.   rows: (R,) of the state; None is all.
        """
        return ()

    def one_token(self, inputs: Tensor, slots: CacheSlots, positions: Tensor, extra: tuple[Any, ...]) -> Tensor:
        """Logits (R, n, V) float32, or (R, n, G, V); see `nodes`."""
        return self.output_of(self.nodes(inputs, slots, positions, extra))

    def compile_decoding(self, **settings: Any) -> Self:
        """Compile the step of one token. The first images of each batch size then take some time.

        Args: settings: of torch.compile; without any, on CUDA `mode="reduce-overhead"`: CUDA graphs.
        Raises: ConfigError without a C++ compiler on a CPU.
        """
        device = next(self.parameters()).device  # type: ignore[attr-defined]
        require_compiler(device, "compile_decoding")
        if device.type == "cuda" and not settings.keys() & {"mode", "options", "backend"}:
            settings["mode"] = "reduce-overhead"

        def step(
            inputs: Tensor, guided: bool, keys: Any, values: Any, positions: Tensor, at: Tensor, extra: Any
        ) -> Any:
            inputs = torch.cat([inputs, inputs]) if guided else inputs
            return self.one_token(inputs, CacheSlots(keys, values, at), positions, extra)

        self.compiled = torch.compile(step, fullgraph=True, dynamic=False, **settings)
        self._lent = None
        return self

    def new_cache(self, layers: int, heads: int, length: int, like: Tensor, head_dim: int) -> KVCache:
        """A cache for (R, ...) rows of the dtype and device of `like`.

        A compiled step gets the same memory each time, unless a batch before is still there: its graph writes there.
        """
        shape = (len(like), heads, length, head_dim)
        if self.compiled is not None and self._lent is not None:
            owner, keys, values = self._lent
            fits = keys[0].shape == shape and keys[0].dtype == like.dtype and keys[0].device == like.device
            if owner() is None and fits and len(keys) == layers:
                cache = KVCache(0, *shape, like.dtype, like.device)
                cache.keys, cache.values = keys, values
                self._lent = (weakref.ref(cache), keys, values)
                return cache
        cache = KVCache(layers, *shape, like.dtype, like.device)
        if self.compiled is not None:
            for memory in (*cache.keys, *cache.values):
                torch._dynamo.mark_static_address(memory)
            self._lent = (weakref.ref(cache), cache.keys, cache.values)
        return cache

    def run_compiled(self, state: CachedState, inputs: Tensor, positions: Tensor, *extra: Any) -> Tensor | None:
        """The logits by the compiled step; None where it cannot be taken: not compiled, or not one later position."""
        if self.compiled is None or inputs.shape[1] != 1 or state.cache.length == 0 or torch.is_grad_enabled():
            return None
        at = torch.full((1,), state.cache.length, device=positions.device)
        if inputs.device.type == "cuda":
            torch.compiler.cudagraph_mark_step_begin()
        cache = state.cache
        logits = self.compiled(inputs, state.guided, cache.keys, cache.values, positions, at, extra)
        return logits.clone() if inputs.device.type == "cuda" else logits  # the next step overwrites a graph's output
