"""The trees of EAGLE: fixed ones, listed as paths of ranks, and those that grow where the drafter is sure.

Sources: SafeAILab/EAGLE (cb7e084) and jadohu/LANTERN (3a56e45): models/drafters/choices.py, utils.py.

Shapes: N nodes below the root, which is number 0; E expanded ones, the root first; K draws of each.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from varkit.config import nearest

_PATHS = {
    "mc_sim_7b_63": ("0 1 2 3 00 01 02 10 11 20 21 30 000 001 002 010 011 020 021 100 0000 0001 0002 00000 00001"),
    "mc_sim_7b_63_balanced": (
        "0 1 2 00 01 02 10 11 12 20 21 000 001 002 010 011 100 101 110 111 0000 0001 0002 00000 00001"
    ),
    "naive_extend_57": (
        "0 1 2 3 4 00 01 02 03 10 11 12 20 21 22 30 31 40 000 001 002 003 010 011 012 020 021 022 030 031 100 "
        "101 110 200 0000 0001 0002 0003 0010 0011 0012 0020 0021 0030 0100 0101 0110 0200 00000 00001 00002 "
        "00010 00011 00100 00101 00110 00200"
    ),
    "medusa_2_7b_63": (
        "0 1 2 3 4 5 6 7 8 9 00 01 02 03 04 05 06 07 08 09 10 11 12 13 14 20 21 30 31 40 50 60 70 000 001 002 "
        "003 004 005 006 007 008 010 011 012 013 020 021 030 040 050 100 101 102 110 200 0000 0001 0002 0003 "
        "0010 0020 0100"
    ),
    "reverse_balanced_25": (
        "0 1 2 00 01 10 20 000 001 002 010 011 100 0000 0001 0002 0010 0011 00000 00001 00002 00003 00010 00011 00012"
    ),
    "chain": ("0 00 000 0000 00000"),
}
"""The released trees by their names there: each word is a path from the root, its digits ranks among siblings."""

TREES = {name: tuple(tuple(map(int, word)) for word in text.split()) for name, text in _PATHS.items()}
"""Name -> paths. `naive_extend_57` is the default; not all names tell the number of nodes."""


@dataclass(frozen=True)
class DynamicTree:
    """EAGLE-2: at each level the best nodes so far are expanded, and of all that was scored the best are kept.

    Args: nodes: kept, without the root.   depth: expansions after the first.   width: children of a node, and nodes
        expanded a level.
    Raises: ValueError on one below 1.
    """

    nodes: int = 58
    depth: int = 4
    width: int = 10

    def __post_init__(self) -> None:
        for name in ("nodes", "depth", "width"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} of a dynamic tree must be at least 1; got {getattr(self, name)}")

    @property
    def room(self) -> int:
        """Drafted nodes that are expanded."""
        return self.depth * self.width


class StaticTree:
    """EAGLE-1: the same tree in every round.

    Args:
        paths: of each node the ranks from the root, such as (0, 2, 1); in any order. Or one of `TREES`' names.
        width: K; None is the largest number of siblings.
    Attributes:
        paths: sorted by length, then by rank: node i + 1 is paths[i].
        parents, depth: (N,) int64.   above: (N, N) bool, [i, j] whether node j + 1 is node i + 1 or above it.
        indices: (N,): where the node's token stands among the draws (E K,) of all expanded nodes.
        levels: of each depth at which nodes are expanded: where their tokens stand among the draws of the depth
            before, and how many children of each node expanded there they are.
    Raises: ValueError on another name, a path without its parent, or ranks that leave one out.
    """

    def __init__(self, paths: str | Sequence[Sequence[int]], width: int | None = None) -> None:
        if isinstance(paths, str):
            if paths not in TREES:
                raise ValueError(
                    f"no tree is called {paths!r}{nearest(paths, TREES)}; choose one of {', '.join(TREES)}"
                )
            paths = TREES[paths]
        self.paths = sorted({tuple(p) for p in paths}, key=lambda p: (len(p), p))
        number = {(): 0, **{p: i for i, p in enumerate(self.paths, 1)}}
        if not self.paths or () in self.paths:
            raise ValueError("a tree needs at least one path, and none of them empty: the root is there always")
        for path in self.paths:
            before = path[:-1] if path[-1] == 0 else (*path[:-1], path[-1] - 1)
            if before not in number:
                raise ValueError(f"the tree has the path {path} without {before}: siblings are ranked 0, 1, ...")
        most = 1 + max(max(p) for p in self.paths)
        self.width = most if width is None else width
        if self.width < most:
            raise ValueError(f"this tree has up to {most} siblings; width must be at least that, got {width}")
        self.parents = torch.tensor([number[p[:-1]] for p in self.paths])
        self.depth = torch.tensor([len(p) for p in self.paths])
        ways = [[path[: len(p)] == p for p in self.paths] for path in self.paths]
        self.above = torch.tensor(ways)
        expanded = sorted(set(self.parents.tolist()))  # numbers, the root first, as the paths are sorted
        place = {n: i for i, n in enumerate(expanded)}
        self.indices = torch.tensor([place[number[p[:-1]]] * self.width + p[-1] for p in self.paths])
        self.levels: list[tuple[Tensor, Tensor]] = []
        above: list[tuple[int, ...]] = [()]
        for depth in range(1, int(self.depth.max())):
            nodes = [p for p in self.paths if len(p) == depth and number[p] in place]
            where = [above.index(p[:-1]) * self.width + p[-1] for p in nodes]
            repeats = [sum(p[:-1] == parent for p in nodes) for parent in above]
            self.levels.append((torch.tensor(where), torch.tensor(repeats)))
            above = nodes

    @property
    def room(self) -> int:
        """Drafted nodes that are expanded."""
        return sum(len(where) for where, _ in self.levels)

    @property
    def sibling_groups(self) -> Tensor:
        """(N,): of each node, how many of its depth's groups of siblings stand before its own."""
        groups = []
        for depth in range(1, int(self.depth.max()) + 1):
            groups.append(torch.unique(self.parents[self.depth == depth], return_inverse=True)[1])
        return torch.cat(groups)


def parse_tree(tree: str | Sequence[Sequence[int]] | StaticTree | DynamicTree) -> StaticTree | DynamicTree:
    """A tree by its name (`dynamic`, or one of `TREES`), by its paths, or as it is. Raises ValueError."""
    if isinstance(tree, StaticTree | DynamicTree):
        return tree
    if tree == "dynamic":
        return DynamicTree()
    if isinstance(tree, str) and tree not in TREES:
        names = ("dynamic", *TREES)
        raise ValueError(f"no tree is called {tree!r}{nearest(tree, names)}; choose one of {', '.join(names)}")
    return StaticTree(tree)


def leaf_paths(parents: Tensor, by_number: bool = True) -> Tensor:
    """All paths from the root to a leaf.

    Args: parents: (N,) of one tree.   by_number: sorted node by node, longer paths first where one begins another;
        else in the order of their leaves.
    Returns: (leaves, D + 1) node numbers, -1 behind the leaf.
    """
    above = [-1, *parents.tolist()]
    found = []
    for leaf in sorted(set(range(len(above))) - set(above)):
        path = [leaf]
        while path[-1]:
            path.append(above[path[-1]])
        found.append(path[::-1])
    if by_number:
        found.sort(key=lambda p: [*p, len(above)])
    most = max(map(len, found))
    return torch.tensor([p + [-1] * (most - len(p)) for p in found])
