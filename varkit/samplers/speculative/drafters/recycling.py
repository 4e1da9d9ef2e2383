"""Tables of what followed a token lately: Token Recycling's static tree, and a tree that grows where the table is sure.

Sources: Luowaterbi/TokenRecycling (1b4c05c), arXiv 2408.08696: row t of a matrix holds the likeliest tokens after t, as
of the last look at any node that held t, and a fixed tree is filled from it. ADED (arXiv 2406.18763, without code): a
table with frequencies, updated while decoding, from which trees are as large as the table is sure. Here the matrix
holds the laws' probabilities beside the tokens; a node is worth the product of those on its way, and the best nodes
above a threshold are drafted.

All drafts are points, and a tree depends on earlier looks alone, so exact verification keeps the law.

Shapes: B rows, N nodes, V codebook, k entries of a row of the table.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from varkit.rng import Rng
from varkit.samplers.speculative.interfaces import DraftBlock, Drafter, Outcome, Progress
from varkit.samplers.speculative.target import Target


class Matrix:
    """The likeliest k tokens after each token, of each row of the batch on its own.

    tokens: (B, V, k) int64, -1 where nothing is known.   probs: (B, V, k) float32, of the law they were seen in.
    """

    def __init__(self, tokens: Tensor) -> None:
        self.tokens, self.probs = tokens, torch.zeros(tokens.shape, device=tokens.device)

    @classmethod
    def empty(cls, batch: int, vocabulary: int, k: int, device: torch.device) -> Matrix:
        return cls(torch.full((batch, vocabulary, min(k, vocabulary)), -1, device=device))

    def after(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """(B, n) -> ids and probabilities (B, n, k)."""
        rows = torch.arange(len(tokens), device=tokens.device)[:, None]
        return self.tokens[rows, tokens], self.probs[rows, tokens]

    def update(self, seen: Tensor, laws: Tensor, valid: Tensor) -> None:
        """Tokens (B, n) that were read, and the laws behind them (B, n, V). Of equal tokens the last counts."""
        best = laws.topk(self.tokens.shape[2], dim=-1)
        ids = best.indices.masked_fill(best.values <= 0, -1)
        n = seen.shape[1]
        later = torch.ones(n, n, dtype=torch.bool, device=seen.device).triu(1)
        again = ((seen[:, :, None] == seen[:, None]) & valid[:, None] & later).any(2)
        rows, nodes = (valid & ~again).nonzero(as_tuple=True)
        self.tokens[rows, seen[rows, nodes]] = ids[rows, nodes]
        self.probs[rows, seen[rows, nodes]] = best.values[rows, nodes]

    def read(self, newest: Tensor, outcome: Outcome) -> None:
        """Learn from all nodes, those that were not kept too."""
        block, newest = outcome.block, newest[:, None]
        valid = torch.cat([torch.ones_like(newest, dtype=torch.bool), block.valid], 1)
        self.update(torch.cat([newest, block.tokens], 1), outcome.laws, valid)

    def keep(self, rows: Tensor) -> None:
        self.tokens, self.probs = self.tokens[rows], self.probs[rows]


def default_tree(width: int, nodes: int) -> list[list[int]]:
    """The `nodes` likeliest ways down a tree if entry j of a table is right with probability ~ 0.4 / (j + 1)."""
    best, edge = list[tuple[float, list[int]]](), [(1.0, list[int]())]
    while edge and len(best) < nodes:
        edge.sort(key=lambda way: (-way[0], way[1]))
        worth, way = edge.pop(0)
        if way:
            best.append((worth, way))
        edge += [(worth * 0.4 / (j + 1), [*way, j]) for j in range(width)]
    return sorted((way for _, way in best), key=lambda way: (len(way), way))


class Recycling(Drafter):
    """Token Recycling: a static tree, filled from the matrix.

    Args:
        k: entries of a row.   nodes: of the tree, where `tree` is None.
        tree: ways down from the root, as in the release: [0, 2] is the third entry after the first of the root's.
            Parents come before their children.
    """

    proposals, many = frozenset({"point"}), True

    def __init__(self, k: int = 8, nodes: int = 24, tree: Sequence[Sequence[int]] | None = None) -> None:
        if k < 1 or nodes < 1:
            raise ValueError(f"k and nodes must be at least 1; got {k} and {nodes}")
        self.k = k
        ways = [tuple(way) for way in (tree or default_tree(k, nodes))]
        number = {(): 0} | {way: i for i, way in enumerate(ways, 1)}
        for i, way in enumerate(ways, 1):
            if number.get(way[:-1], i) >= i or not 0 <= way[-1] < k:
                raise ValueError(f"node {list(way)} of the tree needs its parent before it, and entries 0 to {k - 1}")
        self.parents, self.entries = [number[way[:-1]] for way in ways], [way[-1] for way in ways]
        self.depths, self.nodes = [len(way) for way in ways], len(ways)

    def begin(self, target: Target, rng: Rng) -> None:
        batch, device = len(target.turns), target.order.device
        self.matrix = Matrix.empty(batch, target.vocabulary, self.k, device)
        self.parent, self.entry = (torch.tensor(x, device=device) for x in (self.parents, self.entries))
        self.levels = [
            torch.tensor([i for i, d in enumerate(self.depths) if d == depth], device=device)
            for depth in range(1, max(self.depths) + 1)
        ]

    def propose(self, progress: Progress) -> DraftBlock:
        batch = len(progress.turns)
        tokens = progress.turns.new_zeros(batch, self.nodes + 1)
        tokens[:, 0] = self.newest = progress.newest
        valid = torch.ones(batch, self.nodes + 1, dtype=torch.bool, device=tokens.device)
        for level in self.levels:
            parent, entry = self.parent[level], self.entry[level].expand(batch, -1)
            ids = self.matrix.after(tokens[:, parent])[0]  # B n k
            found = ids.gather(2, entry.clamp(max=ids.shape[2] - 1)[..., None])[..., 0]
            valid[:, level + 1] = (found >= 0) & (entry < ids.shape[2]) & valid[:, parent]
            tokens[:, level + 1] = found.clamp_min(0)
        parents = self.parent.expand(batch, -1)
        return DraftBlock(tokens[:, 1:], parents, valid[:, 1:], torch.ones_like(valid[:, 1:]))

    def observe(self, outcome: Outcome) -> None:
        self.matrix.read(self.newest, outcome)

    def keep(self, rows: Tensor) -> None:
        self.matrix.keep(rows)


class NGram(Drafter):
    """A tree that is as large as the table is sure: the best nodes by the product of their probabilities.

    Args:
        k: entries of a row.   nodes: the most of a tree.   depth: of its deepest node.
        threshold: what a node must be worth, in [0, 1).
    """

    proposals, many = frozenset({"point"}), True

    def __init__(self, k: int = 4, nodes: int = 16, depth: int = 4, threshold: float = 0.02) -> None:
        if k < 1 or nodes < 1 or depth < 1 or not 0 <= threshold < 1:
            raise ValueError(
                f"k, nodes and depth must be at least 1 and threshold in [0, 1); got {k}, {nodes}, {depth}, {threshold}"
            )
        self.k, self.nodes, self.depth, self.threshold = k, nodes, depth, threshold

    def begin(self, target: Target, rng: Rng) -> None:
        self.matrix = Matrix.empty(len(target.turns), target.vocabulary, self.k, target.order.device)

    def propose(self, progress: Progress) -> DraftBlock:
        batch, device = len(progress.turns), progress.turns.device
        self.newest = progress.newest
        tokens, parents = [self.newest[:, None]], list[Tensor]()
        worth = [torch.ones(batch, 1, device=device)]
        number = torch.zeros(batch, 1, dtype=torch.int64, device=device)
        made = 1
        for _ in range(self.depth):  # a level: the best `nodes` children of the last one
            ids, probs = self.matrix.after(tokens[-1])
            score = (worth[-1][..., None] * probs).masked_fill(ids < 0, 0.0).flatten(1)
            score = score.masked_fill(score <= self.threshold, 0.0)
            best = score.topk(min(self.nodes, score.shape[1]), dim=1)
            tokens.append(ids.flatten(1).gather(1, best.indices).clamp_min(0))
            parents.append(number.repeat_interleave(ids.shape[2], 1).gather(1, best.indices))
            worth.append(best.values)
            number = torch.arange(made, made + best.values.shape[1], device=device).expand(batch, -1)
            made += best.values.shape[1]
        return best_nodes(torch.cat(tokens[1:], 1), torch.cat(parents, 1), torch.cat(worth[1:], 1), self.nodes)

    def observe(self, outcome: Outcome) -> None:
        self.matrix.read(self.newest, outcome)

    def keep(self, rows: Tensor) -> None:
        self.matrix.keep(rows)


def best_nodes(tokens: Tensor, parents: Tensor, worth: Tensor, count: int) -> DraftBlock:
    """The `count` nodes (B, M) that are worth most, in their old order; worth 0 is no node, and a child is never worth
    more than its parent. Equal ones: the earlier, so that a parent is there before its child."""
    top = worth.sort(dim=1, descending=True, stable=True).indices[:, :count].sort(dim=1).values  # B N
    new = torch.zeros(len(worth), worth.shape[1] + 1, dtype=torch.int64, device=worth.device)
    new.scatter_(1, top + 1, torch.arange(1, top.shape[1] + 1, device=worth.device).expand_as(top))
    valid = worth.gather(1, top) > 0
    parent = new.gather(1, parents.gather(1, top)).masked_fill(~valid, 0)
    return DraftBlock(tokens.gather(1, top), parent, valid, torch.ones_like(valid))
