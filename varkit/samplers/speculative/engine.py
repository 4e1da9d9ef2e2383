"""The loop of speculative decoding: propose, look, walk the tree with the verifier, keep what was accepted, learn.

Every row advances at its own speed, and a finished row leaves the batch. Each random number is keyed by the image, the
position and what it is for, and each position is decided once, so an image does not depend on its batch.

Shapes: B rows left, N drafted nodes, D deepest node, K siblings, V codebook, G parts of factorised codes, T tokens.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from varkit.heads.categorical import pick
from varkit.rng import Draw, Rng
from varkit.samplers.speculative.interfaces import DraftBlock, Drafter, Outcome, Progress, Siblings, Verifier
from varkit.samplers.speculative.target import Target


@dataclass
class Counts:
    """What decoding took. Lists have one number an image.

    tokens: (B, T) or (B, T, G) int64, in the order of turns.   passes: of the target, for the whole batch.
    target_calls: passes that an image took part in.   drafted: nodes.   accepted: of them.
    """

    tokens: Tensor
    passes: int
    target_calls: list[int]
    drafted: list[int]
    accepted: list[int]


@dataclass
class Numbers:
    """The random numbers of the rows, by turn: accept (B, T, K G), the others (B, T) or (B, T, G)."""

    token: Tensor
    accept: Tensor
    residual: Tensor

    @classmethod
    def of(cls, rng: Rng, order: Tensor, factors: tuple[int, ...], siblings: int) -> Numbers:
        count = factors[0] if factors else None
        return cls(
            rng.uniform(order, Draw.TOKEN, count=count),
            rng.uniform(order, Draw.ACCEPT, count=count or siblings),
            rng.uniform(order, Draw.RESIDUAL, count=count),
        )

    def keep(self, rows: Tensor) -> Numbers:
        return Numbers(self.token[rows], self.accept[rows], self.residual[rows])


def check_pair(drafter: Drafter, verifier: Verifier) -> None:
    """Raises ValueError where the verifier cannot treat what the drafter proposes."""
    kinds = ", ".join(sorted(verifier.proposals))
    if odd := sorted(drafter.proposals - verifier.proposals):
        raise ValueError(
            f"{type(drafter).__name__} proposes {', '.join(odd)} drafts, which {type(verifier).__name__} cannot treat "
            f"(it treats {kinds}); take another verifier, such as exact"
        )
    if drafter.many and not verifier.many:
        raise ValueError(
            f"{type(drafter).__name__} drafts trees, and {type(verifier).__name__} treats chains; take another "
            f"verifier, such as exact, or options of the drafter that give a chain"
        )


def children_of(block: DraftBlock, at: Tensor, many: bool, depth: int) -> tuple[Tensor, Tensor]:
    """Numbers of the children of nodes `at` (B,), in the order of drawing, (B, K) int64, and which there are, bool.

    Args: many: whether the block is a tree; if not, the child of the node at `depth` is the next.
    """
    if not many:
        return at.new_full((len(at), 1), depth + 1), block.valid[:, depth : depth + 1]
    child = (block.parents == at[:, None]) & block.valid
    order = child.int().argsort(dim=1, descending=True, stable=True)[:, : max(1, int(child.sum(1).max()))]
    return order + 1, child.gather(1, order)


@dataclass
class Walk:
    """path (B, D + 1), emitted (B, D + 1) or (B, D + 1, G), count (B,); see `Outcome`."""

    path: Tensor
    emitted: Tensor
    count: Tensor


def step(
    block: DraftBlock,
    kids: Tensor,
    there: Tensor,
    p: Tensor,
    uniform: Tensor,
    verifier: Verifier,
    hidden: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """One node of each row: of its children kids (B, K), which is accepted, -1 where none, (B,) or (B, G); their tokens
    there, likewise; and the law that is left, (B, V) or (B G, V), `p` where no child is.

    Each part of factorised codes is a row of its own: (B G, 1) siblings.
    """
    rows, index = torch.arange(len(kids), device=kids.device)[:, None], kids - 1
    tokens, point = block.tokens[rows, index], block.point[rows, index]
    q = None if block.q is None else block.q[rows, index]
    shape = tokens[:, 0].shape
    if tokens.dim() == 3:
        parts = tokens.shape[2]
        tokens, uniform = tokens.transpose(1, 2).flatten(0, 1), uniform.reshape(-1, 1)
        q = None if q is None else q.transpose(1, 2).flatten(0, 1)
        there, point = there.repeat_interleave(parts, 0), point.repeat_interleave(parts, 0)
        hidden = None if hidden is None else hidden.repeat_interleave(parts, 0)
    verdict = verifier.step(p, Siblings(tokens, there, point, q, block.proposal), uniform[:, : kids.shape[1]], hidden)
    accepted = verdict.accepted.masked_fill(~there.any(1), -1)
    chosen = tokens.gather(1, accepted[:, None].clamp_min(0))[:, 0]
    left = torch.where(there.any(1)[:, None], verdict.residual, p)
    return accepted.view(shape), chosen.view(shape), left


def walk(
    block: DraftBlock,
    laws: Tensor,
    turns: Tensor,
    numbers: Numbers,
    verifier: Verifier,
    many: bool,
    hidden: Tensor | None = None,
) -> Walk:
    """From the root down: which child is accepted, and where none is, a token of the law that is left.

    Args: laws: (B, N + 1, V) or (B, N + 1, G, V).   turns: (B,), the next of each row.   hidden: (B, N + 1, C).
    """
    rows = torch.arange(len(turns), device=turns.device)
    at, going = torch.zeros_like(turns), torch.ones_like(turns, dtype=torch.bool)
    path, emitted, depth = [at], list[Tensor](), 0
    last, of_parts = numbers.token.shape[1] - 1, numbers.token.dim() == 3
    law, fixed, uniform = (
        laws[:, 0].flatten(0, -2),
        torch.full_like(numbers.token[:, 0], -1).long(),
        numbers.token[:, 0],
    )
    while True:
        turn = (turns + depth).clamp(max=last)
        left, number, accepted = (
            laws[rows, at].flatten(0, -2),
            numbers.token[rows, turn],
            fixed.new_full(fixed.shape, -1),
        )
        chosen, child, taken = accepted, at, torch.zeros_like(going)
        if depth < block.tokens.shape[1]:
            kids, there = children_of(block, at, many, depth)
            state = None if hidden is None else hidden[rows, at]
            accepted, chosen, left = step(block, kids, there, left, numbers.accept[rows, turn], verifier, state)
            tried = there.any(1)[:, None] if of_parts else there.any(1)
            number = torch.where(tried, numbers.residual[rows, turn], number)
            index = accepted[:, 0] if of_parts else accepted
            taken = going & ((accepted >= 0).all(1) if of_parts else accepted >= 0)
            child = kids.gather(1, index[:, None].clamp_min(0))[:, 0]
        stops = going & ~taken
        flat = stops.repeat_interleave(len(law) // len(stops))[:, None]
        wide = stops[:, None] if of_parts else stops
        law, uniform = torch.where(flat, left, law), torch.where(wide, number, uniform)
        fixed = torch.where(wide & (accepted >= 0), chosen, fixed)
        emitted.append(torch.where(taken[:, None] if of_parts else taken, chosen, -1))
        at, going, depth = torch.where(taken, child, at), taken, depth + 1
        if not bool(going.any()):
            break
        path.append(torch.where(taken, child, -1))
    drawn = torch.where(fixed >= 0, fixed, pick(law, uniform.flatten()).view_as(fixed))
    route, tokens = torch.stack(path, 1), torch.stack(emitted, 1)
    count = (route >= 0).sum(1)
    tokens[rows, count - 1] = drawn
    return Walk(route, tokens, count)


def keep_known(block: DraftBlock, given: Tensor, keep: Tensor) -> DraftBlock:
    """The block with known tokens where nodes stand for known ones: given (B, N) or (B, N, G), keep (B, N) bool."""
    wide = keep[..., None] if given.dim() == 3 else keep
    return replace(block, tokens=torch.where(wide, given, block.tokens), point=block.point | keep)


def crop(block: DraftBlock, room: Tensor) -> DraftBlock:
    """Without nodes deeper than `room` (B,), and without the last ones that no row needs."""
    valid = block.valid & (block.depth <= room[:, None])
    used = valid.any(0).nonzero()
    count = int(used[-1]) + 1 if len(used) else 0
    q = None if block.q is None else block.q[:, :count]
    return DraftBlock(
        block.tokens[:, :count], block.parents[:, :count], valid[:, :count], block.point[:, :count], q, block.proposal
    )


class Loop:
    """One batch on its way. `target` must be fresh.

    Args:
        known: (B, T) or (B, T, G) tokens and (B, T) bool, by turn: where it is True the given token is kept.
    """

    def __init__(
        self,
        target: Target,
        drafter: Drafter,
        verifier: Verifier,
        rng: Rng,
        known: tuple[Tensor, Tensor] | None = None,
    ) -> None:
        self.target, self.drafter, self.verifier, self.known = target, drafter, verifier, known
        batch, total = len(target.turns), len(target.order)
        siblings = drafter.nodes if drafter.many else 1
        self.numbers = Numbers.of(rng, target.order, target.factors, siblings)
        self.tokens = torch.zeros(batch, total, *target.factors, dtype=torch.int64, device=target.order.device)
        self.done = total == 1
        self.counts = Counts(self.tokens, 1, [1] * batch, [0] * batch, [0] * batch)
        first = self._known_law(target.first()[:, None], target.turns[:, None])[:, 0]
        token = self.numbers.token[:, 0]
        self.tokens[:, 0] = pick(first.flatten(0, -2), token.flatten()).view_as(token)
        target.begin(self.tokens[:, 0], drafter.nodes)
        drafter.begin(target, rng)

    def _given(self, turns: Tensor) -> tuple[Tensor, Tensor] | None:
        """Known tokens at turns (B, n) of the rows that are left."""
        if self.known is None:
            return None
        tokens, keep = self.known
        rows, turns = self.target.rows[:, None], turns.clamp(max=tokens.shape[1] - 1)
        return tokens[rows, turns], keep[rows, turns]

    def _known_law(self, laws: Tensor, turns: Tensor) -> Tensor:
        """Laws (B, n, V) or (B, n, G, V) at turns (B, n), certain where the token is known."""
        given = self._given(turns)
        if given is None:
            return laws
        keep = given[1].view(*given[1].shape, *[1] * (laws.dim() - 2))
        return torch.where(keep, F.one_hot(given[0], laws.shape[-1]).to(laws), laws)

    def progress(self) -> Progress:
        turns = self.target.turns
        return Progress(self.tokens[self.target.rows], turns, len(self.target.order) - 1 - turns)

    def round(self) -> int:
        """One pass of the target. Returns how many tokens every image has then."""
        target, drafter = self.target, self.drafter
        progress = self.progress()
        block = crop(drafter.propose(progress), progress.room)
        turns = target.turns[:, None] + F.pad(block.depth, (1, 0))
        given = self._given(turns[:, 1:] - 1)
        if given is not None:
            block = keep_known(block, *given)
        inputs = torch.cat([progress.newest[:, None], block.tokens], 1)
        laws, hidden = target.look(inputs, block.parents if drafter.many else None)
        laws = self._known_law(laws, turns)
        done = walk(block, laws, target.turns, self.numbers, self.verifier, drafter.many, hidden[: len(inputs)])
        self._write(block, done)
        target.commit(done.path, done.count)
        drafter.observe(
            Outcome(block, laws, done.path, done.emitted, done.count, hidden if drafter.wants_hidden else None)
        )
        return self._drop()

    def _write(self, block: DraftBlock, done: Walk) -> None:
        rows, turns = self.target.rows, self.target.turns
        for depth in range(done.emitted.shape[1]):
            new = depth < done.count
            self.tokens[rows[new], turns[new] + depth] = done.emitted[new, depth]
        drafted = block.valid.sum(1)
        for row, nodes, count in torch.stack([rows, drafted, done.count], 1).tolist():
            self.counts.target_calls[row] += 1
            self.counts.drafted[row] += nodes
            self.counts.accepted[row] += count - 1
        self.counts.passes += 1

    def _drop(self) -> int:
        target, total = self.target, len(self.target.order)
        left = (target.turns < total).nonzero()[:, 0]
        self.done = not len(left)
        if self.done:
            return total
        if len(left) < len(target.turns):
            target.keep(left)
            self.drafter.keep(left)
            self.numbers = self.numbers.keep(left)
        return int(target.turns.min())


def decode(
    target: Target,
    drafter: Drafter,
    verifier: Verifier,
    rng: Rng,
    known: tuple[Tensor, Tensor] | None = None,
    on_round: Callable[[int, Tensor], None] | None = None,
) -> Counts:
    """All tokens of a batch.

    Args: on_round: called with how many tokens every image has, and all tokens (B, T), in the order of turns.
    Raises: ValueError where drafter, verifier and target do not go together.
    """
    check_pair(drafter, verifier)
    if target.factors and not drafter.factorised:
        raise ValueError(
            f"{type(drafter).__name__} cannot draft factorised codes, {target.factors[0]} parts a token; take jacobi"
        )
    drafter.check(target)
    loop = Loop(target, drafter, verifier, rng, known)
    if on_round is not None:
        on_round(1, loop.tokens)
    while not loop.done:
        finished = loop.round()
        if on_round is not None:
            on_round(finished, loop.tokens)
    return loop.counts
