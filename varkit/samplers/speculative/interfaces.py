"""What drafters, verifiers and the engine promise each other.

A round: the drafter proposes a `DraftBlock`, a tree of tokens below the newest decided token of each row; the target
says its law at every node in one pass; the engine walks down from the root, asks the verifier at each node which child
is accepted, and where none is draws from the law that the verifier leaves. Laws are processed already: guidance,
temperature, top-k and top-p are in p and in q alike, and nothing processes them again.

Shapes: B rows (images), N drafted nodes, K children of a node, V codebook size, D deepest node, T tokens in all. Of
factorised codes (G parts of V values) tokens have a last dimension G and laws (..., G, V); drafts are then chains, and
verifiers see each part as a row of its own.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from varkit.rng import Rng

if TYPE_CHECKING:
    from varkit.samplers.speculative.target import Target

Proposal = Literal["iid", "without-replacement"]
"""How siblings were drawn: each from q, independently (a chain is this with one child), or each from q without the
siblings before it, renormalised. Nodes that were not drawn at all, such as a copied token, are `point` nodes."""


@dataclass(frozen=True)
class DraftBlock:
    """Drafted nodes 1 .. N of each row; node 0 is the newest decided token. Siblings stand in the order of drawing.

    tokens: (B, N) int64.   parents: (B, N) int64, smaller than the node's own number.
    valid: (B, N) bool; a node that is not valid has no valid child.
    point: (B, N) bool: chosen, not drawn: its proposal is one-hot.
    q: (B, N, V) float32, the law that each node's siblings were drawn from (one-hot or anything where `point`); None
        when all are points.
    """

    tokens: Tensor
    parents: Tensor
    valid: Tensor
    point: Tensor
    q: Tensor | None = None
    proposal: Proposal = "iid"

    @cached_property
    def depth(self) -> Tensor:
        """(B, N) int64, 1 for children of the root."""
        above = F.pad(self.parents, (1, 0))  # the root is its own parent
        depth = (torch.arange(above.shape[1], device=above.device) > 0).long().expand_as(above)
        for _ in range(above.shape[1].bit_length()):  # each time twice as far up
            depth, above = depth + depth.gather(1, above), above.gather(1, above)
        return depth[:, 1:]


@dataclass(frozen=True)
class Siblings:
    """The children of one node of each row, in the order of drawing.

    tokens: (B, K).   valid, point: (B, K) bool.   q: (B, K, V) or None, as in `DraftBlock`.
    """

    tokens: Tensor
    valid: Tensor
    point: Tensor
    q: Tensor | None
    proposal: Proposal


@dataclass(frozen=True)
class Verdict:
    """accepted: (B,) int64, the child that is accepted, or -1.   residual: (B, V) float32, summing to 1: the law to
    draw from where none is."""

    accepted: Tensor
    residual: Tensor


@dataclass(frozen=True)
class Outcome:
    """What a round came to, for the drafter to learn from.

    block: that was looked at.   laws: (B, N + 1, V), of the target at every node, processed.
    path: (B, D + 1) int64, nodes from the root down that are kept, -1 behind the last.
    emitted: (B, D + 1) int64, the tokens that are new: those of path[1:], then the drawn one; -1 behind the last.
    count: (B,) int64, how many are new; 0 for rows that were finished.
    hidden: (B, N + 1, C), the target's last hidden state at every node, without and with guidance (2 B rows, those
        without a condition below); None unless the drafter asks for it.
    """

    block: DraftBlock
    laws: Tensor
    path: Tensor
    emitted: Tensor
    count: Tensor
    hidden: Tensor | None = None


@dataclass(frozen=True)
class Progress:
    """How far the rows are.

    tokens: (B, T) int64, decided ones in the order of prediction; what is behind them means nothing.
    turns: (B,) int64, how many are decided, which is the turn of the next.
    room: (B,) int64, the deepest node worth drafting: one less than the tokens that are missing.
    """

    tokens: Tensor
    turns: Tensor
    room: Tensor

    @property
    def newest(self) -> Tensor:
        """(B,) int64, the token decided last; (B, G) of factorised codes."""
        return self.tokens[torch.arange(len(self.turns), device=self.turns.device), self.turns - 1]


class Drafter(ABC):
    """Proposes tokens. One object serves one batch: `begin`, then `propose` and `observe` in turn.

    So that an image does not depend on its batch, what is learnt from one row is never used for another.
    """

    proposals: frozenset[str]
    """Which of "iid", "without-replacement" and "point" its nodes are."""

    many: bool = False
    """Whether a node may have several children. If not, blocks are chains: the parent of node i + 1 is node i."""

    nodes: int
    """The most nodes of a block."""

    wants_hidden: bool = False
    """Whether `Outcome.hidden` is needed."""

    factorised: bool = False
    """Whether it can draft factorised codes."""

    def check(self, target: Target) -> None:  # noqa: B027  (most have nothing to check)
        """Before any work. Raises ValueError where it cannot draft for this model."""

    @abstractmethod
    def begin(self, target: Target, rng: Rng) -> None:
        """A batch whose first token is decided; the target has seen the prefix."""

    @abstractmethod
    def propose(self, progress: Progress) -> DraftBlock:
        """Nodes for the rows that are left."""

    @abstractmethod
    def observe(self, outcome: Outcome) -> None:
        """What became of the last block, in which nodes without any use (`room`) are not valid."""

    @abstractmethod
    def keep(self, rows: Tensor) -> None:
        """The other rows are finished: go on with these, numbers (b,) int64 in ascending order."""


class Verifier(ABC):
    """Accepts one of several siblings, or none. A pure function of tensors, vectorised over rows."""

    lossless: bool
    """Whether what is emitted follows the target's law, for every proposal in `proposals`."""

    proposals: frozenset[str]
    """Of "iid", "without-replacement" and "point": the kinds that it can treat. The engine refuses others."""

    many: bool = True
    """Whether a node may have several children."""

    @abstractmethod
    def step(self, p: Tensor, siblings: Siblings, uniform: Tensor, hidden: Tensor | None = None) -> Verdict:
        """Args: p: (B, V) float32, the target's law, summing to 1.   uniform: (B, K) in (0, 1), one a sibling.
        hidden: (B, C), the target's state there, for verifiers that read it."""


def as_point(tokens: Tensor) -> DraftBlock:
    """A chain of chosen tokens (B, N), or (B, N, G)."""
    batch, count = tokens.shape[:2]
    every = torch.arange(count, device=tokens.device).expand(batch, -1)
    yes = torch.ones_like(every, dtype=torch.bool)
    return DraftBlock(tokens, every, yes, yes)
