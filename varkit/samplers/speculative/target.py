"""A generator that looks at drafts: guidance and processors inside, each row at its own turn.

Turn t of T is the t-th prediction, of position order[t]; the entry of the sequence that makes it reads the token of
turn t - 1. A row whose next turn is t has all keys but that of its newest token, so a look reads this token as node 0.

Shapes: B images, R rows (B, or 2 B under guidance, those without condition below), N drafted nodes, V codebook, G parts
of factorised codes, T tokens, C width.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Self

import torch
from torch import Tensor

from varkit.generators.one_token import OneToken
from varkit.heads.categorical import Categorical
from varkit.interfaces import Cond, Generator, Processor
from varkit.layers.cache import TreeWindow
from varkit.samplers.guidance import guidance_interval, guidance_schedule
from varkit.samplers.processors import build_processors


def can_draft(model: Any) -> bool:
    """Whether the model decides one token a step, each from those before."""
    return isinstance(model, OneToken) and getattr(model, "causal", True)


def check_target(model: Any, what: str = "speculative decoding") -> None:
    """Raises ValueError unless the model decides one token a step."""
    if not can_draft(model):
        raise ValueError(
            f"{type(model).__name__} does not decide one token a step from those before, so {what} has nothing to "
            f"draft; it goes with LlamaGen, RAR, ELM, FlexTok's GPT and alike. Leave the sampler out"
        )


def target_of(
    transformer: Any, cond: Cond, null: Cond | None, settings: dict[str, Any], groups: Sequence[Tensor]
) -> Target:
    """What is decoded, under settings of `NextGroupSampler`. Args: groups: (1,) positions in the order of their turns.

    Raises: ValueError unless the model decides one token a step, or where guidance lacks `null`.
    """
    check_target(transformer)
    w = float(settings["guidance_scale"])
    if w != 1 and null is None:
        raise ValueError(f"guidance_scale {w:g} needs the unconditional branch (null=)")
    schedule = guidance_schedule(settings["guidance_schedule"], settings["guidance_power"])
    first, last = guidance_interval(settings["guidance_interval"]) or (0, len(groups))
    scales = [schedule(w, t, len(groups) - 1) if first <= t <= last else 1.0 for t in range(len(groups))]
    return Target(
        transformer,
        cond,
        null if w != 1 else None,
        torch.cat(list(groups)),
        torch.tensor(scales, device=groups[0].device),
        build_processors(**{k: settings[k] for k in ("temperature", "top_k", "top_p", "min_p")}),
    )


def ancestors_of(parents: Tensor) -> Tensor:
    """(B, N) parents of nodes 1 .. N -> (B, N + 1, N + 1) bool: [i, j] whether node j is i or above it."""
    batch, count = parents.shape
    up = torch.eye(count + 1, device=parents.device).repeat(batch, 1, 1)
    up[:, 1:].scatter_(2, parents[..., None], 1.0)
    reach = 1
    while reach < count:
        up, reach = ((up @ up) > 0).float(), 2 * reach
    return up > 0


class Target:
    """A model and the state of one batch.

    Args:
        cond, null: of the batch; `null` None is without guidance.
        order: (T,) int64, the positions in the order of their turns.
        scales: (T,) float32, guidance at each turn; not read without `null`.
        processors: of logits, after guidance.
    Attributes:
        state: of the model.   window: over its cache, after `begin`.   base: entries of the prefix.
        turns: (B,) int64, the next of each row.   rows: (B,) int64, which images of the batch they are.
        hidden: (R, base, C) what the output head read at the prefix, where the model keeps it.
    """

    def __init__(
        self,
        model: Any,
        cond: Cond,
        null: Cond | None,
        order: Tensor,
        scales: Tensor,
        processors: Sequence[Processor],
    ) -> None:
        check_target(model)
        self.model, self.cond, self.null = model, cond, null
        self.order, self.scales, self.processors = order, scales, processors
        self.state = model.start(cond, null)
        self.turns = torch.zeros(len(cond), dtype=torch.int64, device=order.device)
        self.rows = torch.arange(len(cond), device=order.device)
        self.hidden: Tensor | None = None
        self.whole = True

    @property
    def factors(self) -> tuple[int, ...]:
        """(G,) of factorised codes, else ()."""
        size = self.model.layout.codebook_size
        return (len(size),) if isinstance(size, tuple) else ()

    @property
    def vocabulary(self) -> int:
        """V."""
        size = self.model.layout.codebook_size
        return size[0] if isinstance(size, tuple) else size

    def beside(self, model: Generator) -> Self:
        """Another model for the same batch, under the same guidance and processors. It has seen nothing yet."""
        return type(self)(model, self.cond, self.null, self.order, self.scales, self.processors)

    def law(self, predictive: Categorical, turns: Tensor) -> Tensor:
        """Probabilities at turns (B, n), guided and processed: (B, n, V) or (B, n, G, V) float32."""
        if predictive.null_logits is not None:
            predictive = predictive.guide(self.scales[turns.clamp(max=len(self.order) - 1)])
        return predictive.probs(self.processors)

    def first(self) -> Tensor:
        """The law of turn 0, (B, V) or (B, G, V): a plain prediction."""
        ids = self.turns.new_zeros(len(self.turns), 1, *self.factors)
        predictive = self.model.predict(self.state, ids, self.order[:1])
        self.hidden = predictive.hidden
        return self.law(predictive, self.turns[:, None])[:, 0]

    def begin(self, tokens: Tensor, nodes: int) -> None:
        """The first tokens, (B,) or (B, G), are decided; looks will have at most `nodes` drafts."""
        self.model.append(self.state, tokens[:, None], self.order[:1])
        self.state.cache.reserve(nodes + 1)
        self.base, self.window = self.state.cache.length, TreeWindow(self.state.cache)
        self.turns = self.turns + 1

    def _twice(self, x: Tensor) -> Tensor:
        return x if self.null is None else torch.cat([x, x])

    def look(
        self, tokens: Tensor, parents: Tensor | None = None, first: int = 0, layers: int | None = None
    ) -> tuple[Tensor, Tensor]:
        """Laws and hidden states at nodes.

        Args:
            tokens: (B, n) of node 0, the newest token, and the drafts below it; (B, n, G) of factorised codes.
            parents: (B, n - 1) of the drafts; None is a chain.
            first: of a chain, how many nodes earlier looks have read since the last `commit`.
            layers: ask the first so many layers alone.
        Returns: (B, n, V), or (B, n, G, V), float32; and (R, n, C).
        """
        count = tokens.shape[1]
        if parents is None:
            ancestors, depth = None, torch.arange(first, first + count, device=tokens.device).expand(len(tokens), -1)
        else:
            ancestors = ancestors_of(parents)
            depth = ancestors.sum(2) - 1
            ancestors = self._twice(ancestors)
        last = len(self.order) - 1
        turns = torch.minimum(self.turns[:, None] + depth, torch.full_like(depth, last))
        self.window.open(self._twice(turns - self.turns[:, None]), ancestors, first)
        rows = None if self.whole else self._twice_rows()
        extra = self.model.extra(self.state, self._twice(self.order[turns - 1]), rows)
        hidden = self.model.nodes(self._twice(tokens), self.window, self._twice(self.order[turns]), extra, layers)
        logits = self.model.output_of(hidden).chunk(1 if self.null is None else 2)
        return self.law(Categorical(*logits), turns), hidden

    def _twice_rows(self) -> Tensor:
        return self.rows if self.null is None else torch.cat([self.rows, self.rows + len(self.cond)])

    def commit(self, nodes: Tensor, counts: Tensor) -> None:
        """Nodes (B, m) from 0 down are decided, counts (B,) of them; so many turns are over."""
        self.window.commit(self._twice(nodes), self._twice(counts))
        self.turns = self.turns + counts

    def keep(self, rows: Tensor) -> None:
        """Go on with these of the rows that are left, (b,) int64."""
        batch = len(self.turns)
        self.window.keep(rows if self.null is None else torch.cat([rows, rows + batch]))
        self.turns, self.rows, self.whole = self.turns[rows], self.rows[rows], False
