"""Drafts of a network: a smaller model of the same tokens, or the first layers of the model itself.

Shapes: B rows, N drafted nodes, V codebook.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from varkit.heads.categorical import pick
from varkit.interfaces import Generator
from varkit.rng import Draw, Rng
from varkit.samplers.speculative.interfaces import DraftBlock, Drafter, Outcome, Progress
from varkit.samplers.speculative.target import Target, check_target


class Early(Drafter):
    """The first layers of the model draft a chain, read out by its own last norm and head (layer skipping; Sorted's
    sub-models). Their keys are those of the model itself, so that decided tokens need no second pass.

    Args: layers: how many.   count: drafts a pass.
    """

    proposals = frozenset({"iid"})
    factorised = True

    def __init__(self, layers: int = 2, count: int = 4) -> None:
        if layers < 1 or count < 1:
            raise ValueError(f"layers and count must be at least 1; got {layers} and {count}")
        self.layers, self.nodes = layers, count

    def check(self, target: Target) -> None:
        depth = len(target.state.cache.keys)
        if self.layers >= depth:
            raise ValueError(f"layers must be fewer than the {depth} of the model; got {self.layers}")

    def begin(self, target: Target, rng: Rng) -> None:
        self.target = target
        self.numbers = rng.uniform(target.order, Draw.DRAFT, count=target.factors[0] if target.factors else None)

    def propose(self, progress: Progress) -> DraftBlock:
        return chain(self.target, progress.newest[:, None], progress.turns, self.numbers, self.nodes, self.layers)

    def observe(self, outcome: Outcome) -> None:
        """Nothing is learnt."""

    def keep(self, rows: Tensor) -> None:
        self.numbers = self.numbers[rows]


def chain(
    model: Target, start: Tensor, turns: Tensor, numbers: Tensor, count: int, layers: int | None = None
) -> DraftBlock:
    """Drafts one after the other, each from the law behind those before.

    A position is drafted by the same number in every round; that this is exact, `varkit...drafters.jacobi` shows.

    Args: start: (B, m), what the model has not read yet.   turns: (B,), of the first draft.   numbers: (B, T, ...).
    """
    rows, last = torch.arange(len(start), device=start.device), numbers.shape[1] - 1
    tokens, laws, inputs, read = list[Tensor](), list[Tensor](), start, 0
    for node in range(count):
        law = model.look(inputs, first=read, layers=layers)[0][:, -1]
        read += inputs.shape[1]
        uniform = numbers[rows, (turns + node).clamp(max=last)]
        tokens.append(pick(law.flatten(0, -2), uniform.flatten()).view_as(uniform))
        laws.append(law)
        inputs = tokens[-1][:, None]
    every = torch.arange(count, device=start.device).expand(len(start), -1)
    yes = torch.ones_like(every, dtype=torch.bool)
    return DraftBlock(torch.stack(tokens, 1), every, yes, torch.zeros_like(yes), torch.stack(laws, 1))


class Little(Drafter):
    """A smaller model of the same tokens, under the same guidance and processors: a chain, or a tree whose siblings are
    drawn without replacement (RSD's constant branching, arXiv 2402.14160) by the largest of log q + Gumbel noise.

    The noise of a position is the same for all nodes that stand there, and in every round: one way down alone is
    tested, and which one does not depend on it.

    Args:
        model: a generator with the same grid and codebook.   count: drafts of a chain.
        branches: children of each node, level by level, such as (4, 2, 1); None is a chain.
    """

    def __init__(self, model: Generator | None = None, count: int = 4, branches: Sequence[int] | None = None) -> None:
        if count < 1 or (branches is not None and (not branches or min(branches) < 1)):
            raise ValueError(f"count and branches must be at least 1; got {count} and {branches}")
        self.model, self.branches = model, None if branches is None else tuple(branches)
        self.many = self.branches is not None
        self.proposals = frozenset({"without-replacement" if self.many else "iid"})
        self.nodes, level = (0, 1) if self.many else (count, 0)
        for width in self.branches or ():
            level *= width
            self.nodes += level
        self.factorised = not self.many

    def check(self, target: Target) -> None:
        if self.model is None:
            raise ValueError("the drafter `little` needs a smaller model: give draft_model, or its option model")
        check_target(self.model, "drafting")
        mine, others = self.model.layout, target.model.layout
        if (mine.grids, mine.codebook_size) != (others.grids, others.codebook_size):
            raise ValueError(
                f"the drafting model has {mine.describe()}, the model {others.describe()}; they must share the tokens"
            )
        if self.branches and max(self.branches) > target.vocabulary:
            raise ValueError(f"branches {self.branches} are more than the {target.vocabulary} tokens there are")

    def begin(self, target: Target, rng: Rng) -> None:
        assert self.model is not None
        self.little, self.rng = target.beside(self.model), rng
        self.little.first()
        shape = (len(target.turns), *target.factors)
        self.little.begin(target.turns.new_zeros(shape), self.nodes + 2)
        parts = target.factors[0] if target.factors else None
        self.numbers = rng.uniform(target.order, Draw.DRAFT, count=parts)

    def propose(self, progress: Progress) -> DraftBlock:
        """The model has read all but the newest token, or all but the two newest: of a draft that was the last one."""
        rows = torch.arange(len(progress.turns), device=progress.turns.device)[:, None]
        self.behind = int((progress.turns - self.little.turns)[0]) + 1  # the same for all: see observe
        unread = self.little.turns[:, None] - 1 + torch.arange(self.behind, device=rows.device)
        start = progress.tokens[rows, unread]
        if self.branches is None:
            return chain(self.little, start, progress.turns, self.numbers, self.nodes)
        return self._tree(start, progress.turns)

    def _tree(self, start: Tensor, turns: Tensor) -> DraftBlock:
        assert self.branches is not None
        batch, behind = start.shape
        order = self.little.order
        tokens, parents, laws = start, list[int](range(behind - 1)), list[Tensor]()
        edge = [behind - 1]  # nodes of the last level, as the drafting model counts them
        for level, width in enumerate(self.branches):
            above = (
                torch.tensor(parents, device=start.device).expand(batch, -1) if parents else start.new_zeros(batch, 0)
            )
            law = self.little.look(tokens, above)[0][:, edge]  # B n V
            place = order[(turns + level).clamp(max=len(order) - 1)][:, None]
            noise = self.rng.gumbel(place, Draw.DRAFT_NOISE, count=law.shape[2])  # B 1 V
            drawn = (law.log() + noise).topk(width, dim=2)
            tokens = torch.cat([tokens, drawn.indices.flatten(1)], 1)
            laws.append(law.repeat_interleave(width, 1))
            edge, fresh = list(range(len(parents) + 1, len(parents) + 1 + width * len(edge))), edge
            parents += [node for node in fresh for _ in range(width)]
        parent = torch.tensor(parents[behind - 1 :], device=start.device) - (behind - 1)
        q, drafts = torch.cat(laws, 1), tokens[:, behind:]
        valid = q.gather(2, drafts[..., None])[..., 0] > 0  # fewer tokens are possible than branches
        for node in range(len(parent)):
            if parent[node] > 0:
                valid[:, node] &= valid[:, parent[node] - 1]
        return DraftBlock(drafts, parent.expand(batch, -1), valid, torch.zeros_like(valid), q, "without-replacement")

    def observe(self, outcome: Outcome) -> None:
        """Keep the keys of decided tokens but the two newest, which are read again: so all rows are equally behind."""
        path, skip = outcome.path, self.behind - 1
        lead = torch.arange(skip, device=path.device).expand(len(path), -1)
        nodes = torch.cat([lead, torch.where(path < 0, path, path + skip)], 1)
        self.little.commit(nodes.clamp_min(0), outcome.count + skip - 1)

    def keep(self, rows: Tensor) -> None:
        self.little.keep(rows)
        self.rng, self.numbers = self.rng[rows], self.numbers[rows]
