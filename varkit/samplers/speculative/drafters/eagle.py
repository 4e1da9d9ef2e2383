"""Drafting with an EAGLE network: a tree of tokens from the states that the target gave, by a dynamic or fixed tree.

Sources: Li et al., arXiv 2401.15077 (EAGLE), 2406.16858 (EAGLE-2); SafeAILab/EAGLE: eagle/model/cnets1.py (cb7e084);
jadohu/LANTERN: models/drafters/cnets_llamagen.py (3a56e45). What differs: any number of images, each at its own length;
random numbers are keyed by image and place.

A dynamic tree is chosen, so all its nodes are points: whatever its scores were, the target's law alone accepts. In a
fixed tree siblings are drawn without replacement from the drafter's law, processed as the target's is.

Shapes: B images, R rows (B, or 2 B under guidance), N nodes, K children, V codebook, C width, E expanded nodes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from varkit.generators.eagle import Eagle, EagleState
from varkit.interfaces import Processor
from varkit.rng import Draw, Rng
from varkit.samplers.speculative.drafters.eagle_trees import DynamicTree, StaticTree, parse_tree
from varkit.samplers.speculative.interfaces import DraftBlock, Drafter, Outcome, Progress
from varkit.samplers.speculative.proposals import draw_without_replacement
from varkit.samplers.speculative.target import Target

Guide = Callable[[Tensor, Tensor], Tensor]
"""Logits (R, n, V) and the positions (B, n) that they are about -> guided logits (B, n, V)."""


class EagleDrafter(Drafter):
    """Proposes by an `Eagle` network, which reads the target's last hidden states.

    Args:
        network: made for the target; None until there is one.
        tree: `dynamic`, a `DynamicTree`, or a fixed tree: its name in `TREES`, its paths, or a `StaticTree`.
        nodes, depth, width: of a tree that is `dynamic`, instead of those of `DynamicTree`.
    Raises: ValueError on an unknown tree, or one with more draws of a node than there are tokens.
    """

    root: Tensor
    first: Tensor | None
    many = True
    wants_hidden = True
    factorised = False

    def __init__(
        self,
        network: Eagle | None = None,
        tree: str | Sequence[Sequence[int]] | StaticTree | DynamicTree = "dynamic",
        nodes: int | None = None,
        depth: int | None = None,
        width: int | None = None,
    ) -> None:
        sizes = {k: v for k, v in (("nodes", nodes), ("depth", depth), ("width", width)) if v is not None}
        if sizes and tree != "dynamic":
            raise ValueError(f"{', '.join(sizes)} are of the tree `dynamic`; a fixed tree has its own. Leave them out")
        self.tree = DynamicTree(**sizes) if sizes else parse_tree(tree)
        if network is None:
            return
        self.network = network
        size = network.config.codebook_size
        if isinstance(self.tree, StaticTree) and self.tree.width > size:
            raise ValueError(f"a node of this tree has {self.tree.width} draws, the codebook has {size} entries")

    @property
    def nodes(self) -> int:  # type: ignore[override]
        """The most nodes of a block."""
        return self.tree.nodes if isinstance(self.tree, DynamicTree) else len(self.tree.paths)

    @property
    def proposals(self) -> frozenset[str]:  # type: ignore[override]
        """A fixed tree is drawn, but chosen where the target is greedy; a dynamic tree is always chosen."""
        return frozenset({"point"} if isinstance(self.tree, DynamicTree) else {"point", "without-replacement"})

    # ---- the loop -------------------------------------------------------------------------------------------------

    def check(self, target: Target) -> None:
        """Raises ValueError without a network, or when it was made for another target, or tokens do not come in raster
        order."""
        if not hasattr(self, "network"):
            raise ValueError("the drafter `eagle` needs the network that was trained for the model: network=FOLDER")
        self.network.require(target.model)
        order = target.order
        if not torch.equal(order, torch.arange(len(order), device=order.device)):
            raise ValueError("an EAGLE drafter is trained on one order of the tokens, raster; leave out order=")
        if self.network.config.official_quirks:
            target.state.official_padding = True

    def begin(self, target: Target, rng: Rng) -> None:
        """A batch whose first token is decided; the target has seen its prefix, and kept the states in `hidden`."""
        scales, guided, hidden = target.scales, target.null is not None, target.hidden
        if hidden is None:
            raise ValueError(f"an EAGLE drafter reads hidden states, which {type(target.model).__name__} does not keep")

        def guide(logits: Tensor, turns: Tensor) -> Tensor:
            if not guided:
                return logits
            cond, null = logits.chunk(2)
            return torch.lerp(null, cond, scales[turns.clamp_max(len(scales) - 1)][..., None].to(logits))

        size = self.network.config.codebook_size
        probe = torch.linspace(0, 1e-3, size, device=scales.device)[None, None]
        for processor in target.processors:
            probe = processor(probe)
        greedy = int((probe > -torch.inf).sum()) == 1
        self.rng, self.first = rng, hidden[:, -1:]
        self.start(
            len(target.turns),
            target.model.output_of,
            guide,
            target.processors,
            guided=guided,
            greedy=greedy,
            prefix=hidden[:, :-1],
        )

    def propose(self, progress: Progress) -> DraftBlock:
        """A tree below the newest token of each row that is left."""
        if self.first is not None:
            self.feed(progress.newest[:, None], self.first, torch.ones_like(progress.turns))
            self.first = None
        return self.draft(self.rng)

    def observe(self, outcome: Outcome) -> None:
        """Learn what a round came to. Raises ValueError when the target's states are not there."""
        if outcome.hidden is None:
            raise ValueError("the EAGLE drafter reads the target's hidden states, and this round has none")
        width = int(outcome.count.max())
        path = self.state.rows(outcome.path[:, :width].clamp_min(0))[..., None]
        hidden = outcome.hidden.gather(1, path.expand(-1, -1, outcome.hidden.shape[2]))
        self.feed(outcome.emitted[:, :width].clamp_min(0), hidden, outcome.count)

    def keep(self, rows: Tensor) -> None:
        """Go on with these rows, (b,) int64."""
        batch = len(self.state.lengths)
        both = torch.cat([rows, rows + batch]) if self.state.guided else rows
        self.state.keep(rows, both)
        self.root, self.rng = self.root[both], self.rng[rows]

    # ---- states ---------------------------------------------------------------------------------------------------

    def start(
        self,
        batch: int,
        head: Callable[[Tensor], Tensor],
        guide: Guide,
        processors: Sequence[Processor] = (),
        *,
        guided: bool = False,
        greedy: bool = False,
        prefix: Tensor | None = None,
    ) -> None:
        """Begin a batch.

        Args:
            head: the target's, states (R, n, C) -> logits (R, n, V).
            guide: the target's guidance.   processors: the target's. `greedy` leaves them out: then the best entries
                are chosen, whatever the filters leave of them.
            prefix: the target's last states at all entries of its prefix but the last, (R, P, C); of a class none.
        Raises: ValueError when it has another number of entries than the network was made for.
        """
        entries = 0 if prefix is None else prefix.shape[1]
        if entries != self.network.prefix_length:
            raise ValueError(
                f"the drafter reads {self.network.prefix_length} states of the target's prefix (all but the last); "
                f"got {entries}"
            )
        self.head, self.guide = head, guide
        self.processors, self.greedy = () if greedy else tuple(processors), greedy
        longest = int(self.tree.depth.max()) if isinstance(self.tree, StaticTree) else self.tree.depth + 1
        room = max(self.tree.room, longest + 1)
        self.state: EagleState = self.network.start(batch, guided, room)
        self.root = self.network.fc.weight.new_empty(0)  # R C, the state after the newest token, as it is continued
        if prefix is not None and entries:
            ids = torch.zeros(batch, entries, dtype=torch.int64, device=prefix.device)
            with torch.no_grad():
                self.network.extend(self.state, ids, prefix, torch.full_like(self.state.lengths, entries))

    @torch.no_grad()
    def feed(self, tokens: Tensor, hidden: Tensor, count: Tensor) -> None:
        """Add decided tokens, each with the state that it was predicted from.

        Args: tokens: (B, n).   hidden: (R, n, C).   count: (B,), how many are real, the first ones; may be 0.
        """
        out = self.network.extend(self.state, tokens, hidden, count)
        last = self.state.rows((count - 1).clamp_min(0))[:, None, None].expand(-1, 1, out.shape[2])
        newest = out.gather(1, last)[:, 0]
        moved = self.state.rows(count > 0)[:, None]
        self.root = torch.where(moved, newest, self.root) if self.root.numel() else newest

    @torch.no_grad()
    def draft(self, rng: Rng) -> DraftBlock:
        """A tree below each image's newest token."""
        return self.grow(self.tree) if isinstance(self.tree, DynamicTree) else self.fill(self.tree, rng)

    def logits(self, hidden: Tensor, depth: int) -> Tensor:
        """(R, n, C) -> (B, n, V), guided and processed: of the children of nodes at this depth."""
        where = (self.state.lengths - self.network.prefix_length + depth).clamp_max(self.network.layout.length - 1)
        logits = self.guide(self.head(hidden).float(), where[:, None].expand(-1, hidden.shape[1]))
        for processor in self.processors:
            logits = processor(logits)
        return logits

    def grow(self, tree: DynamicTree) -> DraftBlock:
        """The nodes with the likeliest paths, of those that `tree` looks at."""
        state, width = self.state, min(tree.width, self.network.config.codebook_size)
        best = self.logits(self.root[:, None], 0)[:, 0].log_softmax(-1).topk(width)
        tokens, scores = [best.indices], [best.values]  # B K, then B K^2 each
        above = [torch.full_like(best.indices, -1)]
        ids, score, hidden = best.indices, best.values, self.root[:, None].expand(-1, width, -1)
        batch, first = len(ids), 0
        itself = torch.eye(width, dtype=torch.bool, device=ids.device).expand(batch, -1, -1)
        expanded = torch.arange(width, device=ids.device).expand(batch, -1)
        seen = itself
        for level in range(1, tree.depth + 1):
            out = self.network.branch(state, ids, hidden, seen, level)
            best = self.logits(out, level).log_softmax(-1).topk(width)  # B K K
            first += tokens[-1].shape[1]
            tokens.append(best.indices.flatten(1))
            scores.append((score[..., None] + best.values).flatten(1))
            above.append(expanded.repeat_interleave(width, 1))
            score, chosen = scores[-1].topk(width)
            ids, parent, expanded = tokens[-1].gather(1, chosen), chosen // width, first + chosen
            hidden = out.gather(1, state.rows(parent)[..., None].expand(-1, -1, out.shape[2]))
            seen = torch.cat([seen.gather(1, parent[..., None].expand(-1, -1, seen.shape[2])), itself], 2)
        return self._best(tree.nodes, torch.cat(tokens, 1), torch.cat(scores, 1), torch.cat(above, 1))

    def _best(self, nodes: int, tokens: Tensor, scores: Tensor, above: Tensor) -> DraftBlock:
        """The best `nodes` of all candidates (B, M), in their order. A parent is never below its child, and stands
        before it: where scores tie, the stable sort keeps it."""
        kept = scores.sort(stable=True, dim=1, descending=True).indices[:, :nodes].sort(1).values
        parent = above.gather(1, kept)
        parents = torch.where(parent < 0, 0, torch.searchsorted(kept, parent) + 1)
        possible = scores.gather(1, kept) > -torch.inf
        parents = parents.masked_fill(~possible, 0)
        return DraftBlock(tokens.gather(1, kept), parents, possible, torch.ones_like(possible))

    def fill(self, tree: StaticTree, rng: Rng) -> DraftBlock:
        """The tree with drawn tokens; when greedy, with the best ones instead."""
        laws, tokens, shares = self.draws(tree, rng)
        batch, device = len(tokens), tokens.device
        parents, indices = tree.parents.to(device).expand(batch, -1), tree.indices.to(device)
        valid = torch.ones_like(parents, dtype=torch.bool)
        if not self.greedy:
            drawn = shares.flatten(1)[:, indices] > 0
            valid = ~(tree.above.to(device) & ~drawn[:, None]).any(2)
        chosen = torch.full_like(valid, self.greedy)
        q = None if self.greedy else laws[:, indices // tree.width]
        return DraftBlock(tokens.flatten(1)[:, indices], parents, valid, chosen, q, "without-replacement")

    def draws(self, tree: StaticTree, rng: Rng) -> tuple[Tensor, Tensor, Tensor]:
        """What is drawn below each expanded node.

        Returns: laws (B, E, V); tokens (B, E, K); and (B, E, K) how likely each was when it was drawn, or its logit
            when greedy.
        """
        state, newest = self.state, self.state.lengths - 1
        out = self.root[:, None]
        laws, tokens, shares = list[Tensor](), list[Tensor](), list[Tensor]()
        seen = torch.zeros(len(newest), 1, 0, dtype=torch.bool, device=newest.device)
        for level in range(len(tree.levels) + 1):
            if level:
                where, repeats = (t.to(newest.device) for t in tree.levels[level - 1])
                itself = torch.eye(len(where), dtype=torch.bool, device=newest.device).expand(len(newest), -1, -1)
                seen = torch.cat([seen.repeat_interleave(repeats, 1), itself], 2)
                ids = tokens[-1].flatten(1)[:, where]
                out = self.network.branch(state, ids, out.repeat_interleave(repeats, 1), seen, level)
            logits = self.logits(out, level)
            laws.append(logits.softmax(-1))
            if self.greedy:
                best = logits.topk(tree.width)
                drawn = (best.indices, best.values)
            else:
                numbers = rng.uniform(newest[:, None], Draw.TREE, step=level, count=out.shape[1] * tree.width)
                drawn = draw_without_replacement(laws[-1], numbers.view(*laws[-1].shape[:2], tree.width))
            tokens.append(drawn[0])
            shares.append(drawn[1])
        return torch.cat(laws, 1), torch.cat(tokens, 1), torch.cat(shares, 1)
