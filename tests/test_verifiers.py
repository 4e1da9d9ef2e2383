"""Verifiers: the law of what they emit, worked out in full; what they promise beyond it; what they refuse."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from scipy.stats import chi2
from torch import Tensor

from varkit.heads.categorical import pick
from varkit.samplers.speculative.interfaces import Proposal, Siblings, Verdict, Verifier
from varkit.samplers.speculative.proposals import Proposed, draw_without_replacement, gumbel_top_k, proposed
from varkit.samplers.speculative.verifiers import (
    VERIFIERS,
    Bounded,
    Exact,
    Greedy,
    Grouped,
    Judge,
    JudgeHead,
    KSeq,
    Lantern,
    Threshold,
    build_verifier,
    nearest_codes,
    train_judge,
    verifier_options,
)
from varkit.samplers.speculative.verifiers.laws import (
    acceptance_probabilities,
    all_drafts,
    block_efficiency,
    emitted_law,
)

ALPHA = 1e-4
SPLIT: Proposal = "without-replacement"


def laws(count: int, size: int, seed: int = 0, flat: float = 1.0) -> Tensor:
    """(count, size) float64: softmax of normal logits of various spreads, some entries 0, some rows one-hot."""
    random = torch.Generator().manual_seed(seed)
    spread = torch.rand(count, 1, generator=random, dtype=torch.float64) * 3 * flat
    logits = torch.randn(count, size, generator=random, dtype=torch.float64) * spread
    drop = torch.rand(count, size, generator=random) < 0.3 * (torch.arange(count) % 3 == 1)[:, None]
    drop[:, seed % size] = False
    one = torch.arange(count) % 17 == 5
    drop[one] = torch.arange(size) != seed % size
    return logits.masked_fill(drop, -torch.inf).softmax(-1)


def pairs(count: int, size: int) -> tuple[Tensor, Tensor]:
    """Random p and q, among them identical ones, disjoint ones, zeros and one-hot ones."""
    p, q = laws(count, size, 1), laws(count, size, 2)
    q[::20] = p[::20]
    half = torch.arange(size) < size // 2
    p[7::20] = (torch.rand(len(p[7::20]), size, dtype=torch.float64) * half).softmax(-1) * half
    q[7::20] = torch.rand(len(q[7::20]), size, dtype=torch.float64) * ~half
    return p / p.sum(-1, keepdim=True), q / q.sum(-1, keepdim=True)


def distance(a: Tensor, b: Tensor) -> Tensor:
    """Total variation of laws, (..., V) -> (...)."""
    return (a - b).abs().sum(-1) / 2


def some(tokens: list[list[int]], q: Tensor | None = None, proposal: Proposal = "iid") -> Siblings:
    ids = torch.tensor(tokens)
    every = torch.ones_like(ids, dtype=torch.bool)
    if q is not None:
        q = q.expand(len(ids), -1)[:, None].expand(-1, ids.shape[1], -1)
    return Siblings(ids, every, every if q is None else ~every, q, proposal)


def points(count: int, size: int, siblings: int, seed: int, drawn: float = 0.5) -> Tensor:
    """(count, siblings): chosen tokens, or -1 for a draw."""
    random = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, size, (count, siblings), generator=random)
    return torch.where(torch.rand(count, siblings, generator=random) < drawn, -1, ids)


# ---- what is emitted follows the target -----------------------------------------------------------------------


def off(verifier: Verifier, p: Tensor, siblings: Siblings, weight: Tensor) -> float:
    """How far the emitted law is from p, at most."""
    law, _ = emitted_law(verifier, p, siblings, weight)
    return float((law - p).abs().max())


@pytest.mark.parametrize("mixed", [False, True])
@pytest.mark.parametrize("proposal", ["iid", SPLIT])
@pytest.mark.parametrize(("count", "size"), [(1, 6), (2, 5), (3, 4)])
def test_exact_emits_the_target(count: int, size: int, proposal: Proposal, mixed: bool) -> None:
    p, q = pairs(200, size)
    chosen = points(200, size, count, 3) if mixed else None
    assert off(Exact(), p, *all_drafts(q, count, proposal, chosen)) < 1e-10


@pytest.mark.parametrize("options", [{}, {"gamma": 1.5}, {"gamma": 9.0}])
@pytest.mark.parametrize(("count", "size"), [(1, 5), (2, 4), (3, 3)])
def test_k_seq_emits_the_target(count: int, size: int, options: dict[str, float]) -> None:
    p, q = pairs(200, size)
    assert off(KSeq(**options), p, *all_drafts(q, count)) < 1e-10


@pytest.mark.parametrize("verifier", [Exact(), KSeq()])
def test_float32_is_enough(verifier: Verifier) -> None:
    p, q = (law.float() for law in pairs(60, 4))
    siblings, weight = all_drafts(q, 2)
    assert verifier.step(p[:1], some([[0, 1]], q[:1]), torch.rand(1, 2)).residual.dtype == torch.float32
    assert off(verifier, p, siblings, weight) < 1e-6


def test_more_siblings_than_tokens_that_can_be_drawn() -> None:
    """Draws from nothing are no siblings, even if the drafter says they are."""
    p, q = laws(50, 4, 3), torch.tensor([0.5, 0.5, 0, 0], dtype=torch.float64).expand(50, -1)
    siblings, weight = all_drafts(q, 3, SPLIT)
    assert not siblings.valid.all()
    assert off(Exact(), p, siblings, weight) < 1e-10
    assert off(Exact(), p, replace(siblings, valid=torch.ones_like(siblings.valid)), weight) < 1e-10


class LeavesP(Exact):
    def _left(self, target: Tensor, aimed: Tensor, draft: Proposed) -> Tensor:
        return aimed


class UniformQ(Exact):
    def step(self, p: Tensor, siblings: Siblings, uniform: Tensor, hidden: Tensor | None = None) -> Verdict:
        assert siblings.q is not None
        return super().step(p, replace(siblings, q=torch.full_like(siblings.q, 1 / p.shape[1])), uniform)


class SameQ(Exact):
    """Forgets that earlier siblings left q."""

    def step(self, p: Tensor, siblings: Siblings, uniform: Tensor, hidden: Tensor | None = None) -> Verdict:
        return super().step(p, replace(siblings, proposal="iid"), uniform)


def ordered(siblings: Siblings) -> Siblings:
    """The likeliest first: no longer the order of drawing."""
    assert siblings.q is not None
    order = siblings.q[:, 0].gather(1, siblings.tokens).argsort(-1, descending=True)
    return replace(siblings, tokens=siblings.tokens.gather(1, order), valid=siblings.valid.gather(1, order))


def called_drawn(siblings: Siblings) -> Siblings:
    """Chosen tokens that pass for draws from q."""
    return replace(siblings, point=torch.zeros_like(siblings.point))


@pytest.mark.parametrize(
    ("verifier", "change", "top"),
    [
        (LeavesP(), None, False),
        (UniformQ(), None, False),
        (SameQ(), None, False),
        (Exact(), ordered, False),
        (Exact(), called_drawn, True),
        (Exact(official_quirks=True, residual_top_p=0.8), None, False),
    ],
)
def test_planted_faults_are_seen(verifier: Verifier, change: Callable[[Siblings], Siblings] | None, top: bool) -> None:
    p, q = laws(60, 4, 4), laws(60, 4, 5)
    siblings, weight = all_drafts(q, 2, SPLIT, q.topk(2).indices if top else None)
    assert off(Exact(), p, siblings, weight) < 1e-10
    assert off(verifier, p, siblings if change is None else change(siblings), weight) > 0.05


def counts_fit(tokens: Tensor, law: Tensor) -> float:
    seen = torch.bincount(tokens, minlength=len(law)).double()
    expected = law.double() * len(tokens)
    big = expected >= 10
    statistic = ((seen - expected).square() / expected)[big].sum()
    rest, rest_seen = expected[~big].sum(), seen[~big].sum()
    if rest > 0:
        statistic = statistic + (rest_seen - rest).square() / rest
    return float(chi2.sf(statistic.item(), int(big.sum()) - int(rest == 0)))


@pytest.mark.parametrize(
    ("verifier", "proposal", "fits"),
    [(Exact(), "iid", True), (Exact(), SPLIT, True), (KSeq(gamma=2), "iid", True), (LeavesP(), "iid", False)],
)
def test_the_first_token_of_many_rows(verifier: Verifier, proposal: Proposal, fits: bool) -> None:
    rows, size, count = 100_000 if proposal == "iid" and fits else 30_000, 64, 3
    random = torch.Generator().manual_seed(7)
    p, q = (torch.randn(size, generator=random).softmax(-1).expand(rows, -1) for _ in range(2))
    uniform = torch.rand(rows, 2 * count + 1, generator=random).clamp(min=2**-24)
    if proposal == "iid":
        tokens = torch.stack([pick(q, uniform[:, k]) for k in range(count)], 1)
    else:
        tokens = draw_without_replacement(q, uniform[:, :count])[0]
    every = torch.ones_like(tokens, dtype=torch.bool)
    siblings = Siblings(tokens, every, ~every, q[:, None].expand(-1, count, -1), proposal)
    verdict = verifier.step(p, siblings, uniform[:, count : 2 * count])
    last = pick(verdict.residual, uniform[:, -1])
    emitted = torch.where(verdict.accepted < 0, last, tokens.gather(1, verdict.accepted.clamp(min=0)[:, None])[:, 0])
    assert (counts_fit(emitted, p[0]) > ALPHA) == fits


# ---- corner cases ---------------------------------------------------------------------------------------------


def test_corner_cases_of_one_draft() -> None:
    p = torch.tensor([[0.5, 0.5, 0.0]]).expand(4, -1)
    q = torch.tensor([[0.5, 0.0, 0.5], [0.5, 0.0, 0.5], [0.5, 0.5, 0.0], [0.0, 0.0, 1.0]])
    tokens = torch.tensor([[1], [2], [0], [1]])
    every = torch.ones_like(tokens, dtype=torch.bool)
    uniform = torch.tensor([[1 - 2**-24], [2**-24], [1 - 2**-24], [0.5]])
    verdict = Exact().step(p, Siblings(tokens, every, ~every, q[:, None], "iid"), uniform)
    # Unlikely under q alone, impossible under p, identical laws, unlikely under q alone.
    assert verdict.accepted.tolist() == [0, -1, 0, 0]
    assert verdict.residual[1].tolist() == [0, 1, 0]
    uncovered = Exact().step(p[:1], some([[2]], torch.tensor([[0.6, 0.6, 0.1]])), uniform[:1]).residual
    assert torch.equal(uncovered, p[:1])  # rounding left nothing


@pytest.mark.parametrize("name", [n for n in VERIFIERS if n != "grouped"])
def test_siblings_that_are_not_valid_change_nothing(name: str) -> None:
    """Whatever stands there; nor does a row see another."""
    p, q = (law.float() for law in (laws(12, 5, 1), laws(12, 5, 2)))
    verifier, states = ready(name), torch.randn(12, 3)
    tokens, uniform = torch.randint(0, 5, (12, 2)), torch.rand(12, 4)
    every = torch.ones_like(tokens, dtype=torch.bool)
    plain = verifier.step(
        p, Siblings(tokens, every, ~every, q[:, None].expand(-1, 2, -1), "iid"), uniform[:, ::2], states
    )
    none = torch.full((12, 1), -1)
    padded = torch.cat([tokens[:, :1], none, tokens[:, 1:], none], 1)
    law = torch.stack([q, torch.full_like(q, torch.nan), q, torch.full_like(q, torch.nan)], 1)
    siblings = Siblings(padded, padded >= 0, torch.zeros_like(padded, dtype=torch.bool), law, "iid")
    verdict = verifier.step(p, siblings, uniform, states)
    assert torch.equal(verdict.residual, plain.residual)
    assert torch.equal(verdict.accepted, torch.where(plain.accepted > 0, 2, plain.accepted))
    for row in range(3):
        one = slice(row, row + 1)
        alone = replace(siblings, tokens=padded[one], valid=siblings.valid[one], point=siblings.point[one], q=law[one])
        again = verifier.step(p[one], alone, uniform[one], states[one])
        assert torch.equal(again.accepted, verdict.accepted[one])
        assert torch.allclose(again.residual, verdict.residual[one], atol=1e-7)


def ready(name: str, **options: Any) -> Verifier:
    """With the codebook or head that it needs."""
    if name in ("bounded", "lantern"):
        options = {"k": 2, **options}
    verifier = build_verifier(name, **options)
    if isinstance(verifier, Bounded | Lantern | Grouped):
        verifier.use_codebook(torch.tensor([[0.0], [1.0], [2.1], [3.3], [4.6]]))
    if isinstance(verifier, Judge):
        verifier.use_head(JudgeHead(3))
    return verifier


# ---- published guarantees -------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [2, 3])
def test_k_seq_accepts_what_was_promised(count: int) -> None:
    p, q = pairs(200, 3)
    drafts = all_drafts(q, count)
    gamma, beta = KSeq().plan(p, q, torch.full((200,), count))
    rate, always = (emitted_law(v, p, *drafts)[1] for v in (KSeq(), KSeq(gamma=count)))
    assert torch.allclose(rate, 1 - (1 - beta) ** count, atol=1e-9)
    assert (gamma >= 1).all() and (gamma <= count).all()
    inside = (gamma > 1 + 1e-6) & (gamma < count - 1e-6)
    assert inside.sum() > 50
    assert torch.allclose((gamma * beta)[inside], rate[inside], atol=1e-9)  # the root that defines gamma
    assert (rate >= always - 1e-9).all() and (rate > always + 1e-3).any()
    most = torch.minimum(p, count * q).sum(-1)  # no exact rule accepts more often
    assert (always >= (1 - 1 / math.e) * most - 1e-9).all()


def test_acceptance_of_one_draft_is_the_overlap() -> None:
    p, q = pairs(200, 5)
    _, rate = emitted_law(Exact(), p, *all_drafts(q, 1))
    assert torch.allclose(rate, 1 - distance(p, q), atol=1e-10)


def test_without_replacement_as_many_drafts_as_tokens_are_always_enough() -> None:
    p, q = laws(60, 4, 1), laws(60, 4, 2, flat=0.3).clamp(min=0.01)
    siblings, weight = all_drafts(q / q.sum(-1, keepdim=True), 4, SPLIT)
    assert emitted_law(Exact(), p, siblings, weight)[1].min() > 1 - 1e-9


def test_block_efficiency() -> None:
    rate = torch.tensor([0.0, 0.5, 1.0])
    assert torch.allclose(block_efficiency(rate, torch.tensor(3)), torch.tensor([1.0, 1.875, 4.0]))


def test_both_ways_of_drawing_without_replacement_have_one_law() -> None:
    q = torch.tensor([0.5, 0.3, 0.2, 0.0])
    rows = 20_000
    random = torch.Generator().manual_seed(0)
    uniform = torch.rand(rows, 4, generator=random).clamp(min=2**-24)
    exact = torch.tensor([q[a] * q[b] / (1 - q[a]) if a != b else 0 for a in range(4) for b in range(4)])
    for tokens, conditional in (
        draw_without_replacement(q.expand(rows, -1), uniform[:, :2]),
        gumbel_top_k(q.expand(rows, -1), -(-uniform.log()).log(), 2),
    ):
        assert counts_fit(tokens[:, 0] * 4 + tokens[:, 1], exact) > ALPHA
        assert torch.allclose(conditional[:, 0], q[tokens[:, 0]])
        assert torch.allclose(conditional[:, 1], q[tokens[:, 1]] / (1 - q[tokens[:, 0]]))
    tokens, conditional = draw_without_replacement(q.expand(4, -1), uniform[:4])
    assert (tokens[:, 3] == 3).all() and (conditional[:, 3] == 0).all()  # nothing was left


# ---- the relaxation with a bound ------------------------------------------------------------------------------


def relaxed(options: dict[str, Any], size: int, seed: int, cls: type[Bounded | Lantern] = Bounded) -> Any:
    random = torch.Generator().manual_seed(seed)
    return cls(**options).use_codebook(torch.randn(size, 2, generator=random))


def excess(verifier: Verifier, p: Tensor, siblings: Siblings, weight: Tensor, bound: float) -> Tensor:
    """Of each row, how far the emitted law is beyond the bound; negative within."""
    return distance(emitted_law(verifier, p, siblings, weight)[0], p) - bound


@pytest.mark.parametrize("kind", ["iid", SPLIT, "mixed", "chosen"])
@pytest.mark.parametrize(("count", "size"), [(1, 6), (2, 4), (3, 3)])
def test_the_emitted_law_is_within_the_bound(count: int, size: int, kind: str) -> None:
    used = 0.0
    for seed, bound, k in ((1, 0.03, 1), (2, 0.1, 2), (3, 0.3, 2)):
        p, q = laws(70, size, seed), laws(70, size, seed + 1)
        chosen = None if kind in ("iid", SPLIT) else points(70, size, count, seed, 0.5 if kind == "mixed" else 0)
        drafts = all_drafts(q, count, "iid" if kind == "iid" else SPLIT, chosen)
        verifier = relaxed({"tv_bound": bound, "k": k}, size, seed)
        law, rate = emitted_law(verifier, p, *drafts)
        apart = distance(law, p)
        assert apart.max() < bound + 1e-9
        used = max(used, float(apart.max() / bound))
        assert (law[p == 0] == 0).all()  # what p does not allow
        if count == 1:
            assert (rate >= emitted_law(Exact(), p, *drafts)[1] - 1e-12).all()
    assert used > 0.99  # the bound is reached


def test_the_rule_of_the_docstring_breaks_the_bound_and_ours_does_not() -> None:
    p = torch.full((1, 4), 0.25, dtype=torch.float64)
    drafts = all_drafts(torch.tensor([[0.5, 0.5, 0, 0]], dtype=torch.float64), 1)
    table = torch.tensor([[2], [3], [0], [1]])
    law, rate = emitted_law(Lantern(tv_bound=0.25, k=1).use_neighbours(table), p, *drafts)
    assert torch.allclose(law, torch.tensor([[0.5, 0.5, 0, 0]], dtype=torch.float64)) and float(rate) > 1 - 1e-9
    law, rate = emitted_law(Bounded(tv_bound=0.25, k=1).use_neighbours(table), p, *drafts)
    assert torch.allclose(law, torch.tensor([[3, 3, 1, 1]], dtype=torch.float64) / 8)
    assert float(rate) == pytest.approx(0.75)  # 0.5 in the exact test


@pytest.mark.parametrize("options", [{}, {"official_quirks": True}, {"official_quirks": True, "left": "target"}])
def test_lanterns_rule_is_seen_to_break_the_bound(options: dict[str, Any]) -> None:
    """By the function that holds ours to it. Its delta bounds p', not what is emitted."""
    p, q = laws(40, 5, 1), laws(40, 5, 2)
    verifier = relaxed({"tv_bound": 0.1, "k": 3, **options}, 5, 0, Lantern)
    assert excess(verifier, p, *all_drafts(q, 2, SPLIT), 0.1).max() > 0.05


class LooksAtTheDraft(Bounded):
    """Moves as much for each drafted token as if it were the only one that could be."""

    def _aim(self, whole: Tensor, target: Tensor, draft: Proposed, slack: Tensor) -> tuple[Tensor, Tensor]:
        here = torch.zeros_like(target).scatter(1, draft.token, 1)
        return self.move(target, here, slack, whole > 0)[0], slack


class SpendsTwice(Bounded):
    """The slack is not shared among siblings."""

    def _aim(self, whole: Tensor, target: Tensor, draft: Proposed, slack: Tensor) -> tuple[Tensor, Tensor]:
        return super()._aim(whole, target, draft, slack)[0], self._slack(target) * 9


@pytest.mark.parametrize(("cls", "count"), [(LooksAtTheDraft, 1), (SpendsTwice, 2)])
def test_faults_in_the_budget_are_seen(cls: type[Bounded], count: int) -> None:
    p, q = laws(60, 5, 1), laws(60, 5, 2)
    verifier = relaxed({"tv_bound": 0.05, "k": 4}, 5, 0, cls)
    assert excess(verifier, p, *all_drafts(q, count), 0.05).max() > 0.01


@pytest.mark.parametrize("options", [{"tv_bound": 0.0, "k": 3}, {"tv_bound": 0.2, "k": 0}])
@pytest.mark.parametrize("proposal", ["iid", SPLIT])
def test_without_bound_or_neighbours_it_is_exact_to_the_bit(options: dict[str, Any], proposal: Proposal) -> None:
    p, q = (law.float() for law in pairs(200, 6))
    verifier = Bounded(**options)  # and needs no codebook
    assert verifier.lossless
    tokens, uniform = torch.randint(0, 6, (200, 3)), torch.rand(200, 3)
    every = torch.ones_like(tokens, dtype=torch.bool)
    siblings = Siblings(tokens, every, ~every, q[:, None].expand(-1, 3, -1), proposal)
    ours, exact = verifier.step(p, siblings, uniform), Exact().step(p, siblings, uniform)
    assert torch.equal(ours.accepted, exact.accepted) and torch.equal(ours.residual, exact.residual)


def test_flat_laws_with_neighbours_are_accepted_more_often() -> None:
    """By the whole bound, where there are neighbours to pay it."""
    size = 256
    random = torch.Generator().manual_seed(0)
    p, q = (torch.randn(20, size, generator=random).softmax(-1).double() for _ in range(2))
    verifier = relaxed({"tv_bound": 0.1, "k": 10}, size, 0)
    aimed, moved = verifier.move(p, q, torch.full((20,), 0.1, dtype=torch.float64), p > 0)
    assert torch.allclose(torch.minimum(aimed, q).sum(-1), torch.minimum(p, q).sum(-1) + 0.1)
    assert torch.allclose(moved, torch.full_like(moved, 0.1)) and (distance(aimed, p) <= 0.1 + 1e-12).all()
    tokens = torch.randint(0, size, (20, 1), generator=random)  # chosen ones too
    every = torch.ones_like(tokens, dtype=torch.bool)
    ours, exact = (
        acceptance_probabilities(v, p, Siblings(tokens, every, every, None, "iid"))[0] for v in (verifier, Exact())
    )
    # x takes all that its neighbours have, or the bound.
    near = p.gather(
        1, nearest_codes(torch.randn(size, 2, generator=torch.Generator().manual_seed(0)), 10)[tokens[:, 0]]
    )
    assert torch.allclose(ours, exact + near.sum(-1, keepdim=True).clamp(max=0.1), atol=1e-9)


def test_mass_moves_between_codes_only() -> None:
    """Tokens outside the codebook, as of text, keep theirs."""
    p, q = laws(30, 6, 1), laws(30, 6, 2)
    verifier = Bounded(tv_bound=0.5, k=3).use_codebook(torch.randn(4, 2), first=1)
    aimed, moved = verifier.move(p, q, torch.full((30,), 0.5, dtype=torch.float64), p > 0)
    assert torch.equal(aimed[:, [0, 5]], p[:, [0, 5]]) and moved.max() > 0.1
    assert torch.allclose(aimed.sum(-1), torch.ones(30, dtype=torch.float64))


def test_the_joint_law_is_within_its_bound() -> None:
    """Three tokens, each with laws that depend on those before it: 1 - (1 - bound)^3."""
    size, length, bound, chains = 3, 3, 0.15, 10
    verifier = relaxed({"tv_bound": bound, "k": 2}, size, 0)
    ours, target = (torch.ones(chains, 1, dtype=torch.float64) for _ in range(2))
    for depth in range(length):
        prefixes = size**depth
        p, q = (laws(chains * prefixes, size, 10 * depth + s) for s in (1, 2))
        law, _ = emitted_law(verifier, p, *all_drafts(q, 2))
        ours = (ours[..., None] * law.view(chains, prefixes, size)).flatten(1)
        target = (target[..., None] * p.view(chains, prefixes, size)).flatten(1)
    apart = distance(ours, target)
    assert (apart <= 1 - (1 - bound) ** length).all()
    assert apart.max() > bound  # more than one token's


def test_nearest_codes() -> None:
    codebook = torch.randn(40, 3)
    table = nearest_codes(codebook, 39, chunk=9)
    for row in range(40):
        far = (codebook - codebook[row]).norm(dim=-1)
        assert sorted([*table[row].tolist(), row]) == list(range(40))
        assert (far[table[row]].diff() >= -1e-6).all()
    assert torch.equal(nearest_codes(codebook, 5), table[:, :5])
    with pytest.raises(ValueError, match="from 0 to V - 1; got k 40"):
        nearest_codes(codebook, 40)


# ---- lossy ones -----------------------------------------------------------------------------------------------


def test_greedy_emits_the_best_token() -> None:
    p = laws(30, 5, 1)
    tokens = torch.randint(0, 5, (30, 3))
    every = torch.ones_like(tokens, dtype=torch.bool)
    verdict = Greedy().step(p, Siblings(tokens, every, every, None, "iid"), torch.rand(30, 3))
    for row in range(30):
        best = int(p[row].argmax())
        found = tokens[row].tolist().index(best) if best in tokens[row] else -1
        assert verdict.accepted[row] == found and int(verdict.residual[row].argmax()) == best
        assert verdict.residual[row].max() == 1


def test_threshold_keeps_what_is_likely_enough() -> None:
    p = torch.tensor([[0.7, 0.29, 0.01], [0.98, 0.015, 0.005]])
    rule = Threshold(rollback=-math.log(0.02))
    assert rule.step(p, some([[2, 1], [2, 1]]), torch.rand(2, 2)).accepted.tolist() == [1, -1]
    assert rule.step(p, some([[2, 1], [2, 1]]), torch.rand(2, 2)).residual[1].tolist() == [1, 0, 0]
    assert Threshold(rollback=0).step(p, some([[0], [1]]), torch.rand(2, 1)).accepted.tolist() == [0, -1]


def test_a_judge_learns_and_overrules_rejections_only(tmp_path: Path) -> None:
    random = torch.Generator().manual_seed(0)
    states = torch.randn(400, 6, generator=random) * torch.tensor([1, 5, 0.1, 1, 1, 1]) + 3
    right = states[:, 0] - 20 * states[:, 2] > 3 - 60
    head = train_judge(states, right)
    assert ((head(states) > 0) == right).float().mean() > 0.97
    careful = train_judge(states, right, wrong_weight=30)
    assert ((careful(states) > 0) & ~right).sum() < ((head(states) > 0) & ~right).sum() + 1
    head.save(tmp_path / "head.safetensors")
    judge = build_verifier("judge", head=str(tmp_path / "head.safetensors"))
    assert torch.equal(judge._head(states), head(states))  # type: ignore[attr-defined]
    p, q = laws(400, 4, 1), laws(400, 4, 2)
    tokens, uniform = torch.randint(0, 4, (400, 2)), torch.rand(400, 2)
    every = torch.ones_like(tokens, dtype=torch.bool)
    siblings = Siblings(tokens, every, ~every, q[:, None].expand(-1, 2, -1), "iid")
    each = torch.stack([states, states.flip(0)], 1)  # one a sibling
    verdict, exact = judge.step(p, siblings, uniform, each), Exact().step(p, siblings, uniform)
    says = head(each) > 0
    first = torch.where(exact.accepted == 0, 0, torch.where(says[:, 0], 0, torch.where(says[:, 1], 1, exact.accepted)))
    assert torch.equal(verdict.accepted, first)
    quiet = build_verifier("judge", threshold=1 - 1e-9)
    assert isinstance(quiet, Judge)
    same = quiet.use_head(JudgeHead(6)).step(p, siblings, uniform, states)
    assert torch.equal(same.accepted, exact.accepted) and torch.equal(same.residual, exact.residual)


def test_lantern_treats_syntax_and_bounds_as_it_says() -> None:
    p = torch.tensor([[0.1, 0.2, 0.3, 0.3, 0.1]])
    table = torch.tensor([[1, 2], [0, 2], [1, 0]])  # codes are tokens 1 to 3
    verifier = Lantern(k=2, tv_bound=0.35, syntax=[4]).use_neighbours(table, first=1)
    aggregated, size, _ = verifier.aggregate(p, torch.tensor([[1]]))  # neighbours 2 and 3 have 0.3 and 0.3
    assert torch.allclose(aggregated, torch.tensor([[0.1, 0.5, 0, 0.3, 0.1]])) and size.tolist() == [1]
    ratio = Lantern(k=2, ratio_bound=4.5).use_neighbours(table, first=1)  # 3.5 x 0.2 is enough for both
    assert torch.allclose(ratio.aggregate(p, torch.tensor([[1]]))[0], torch.tensor([[0.1, 0.8, 0, 0, 0.1]]))
    high, low = torch.full((1, 1), 0.999), torch.full((1, 1), 1e-6)
    assert verifier.step(p, some([[4]]), high).accepted.tolist() == [0]  # syntax: always
    assert verifier.step(p, some([[0]]), low).accepted.tolist() == [-1]  # neither a code nor syntax: never


@pytest.mark.parametrize("proposal", ["iid", SPLIT])
def test_lantern_without_a_bound_is_exact(proposal: Proposal) -> None:
    p, q = pairs(40, 4)
    assert off(relaxed({"tv_bound": 0.0, "k": 3}, 4, 0, Lantern), p, *all_drafts(q, 2, proposal)) < 1e-10


# ---- names, options, refusals ---------------------------------------------------------------------------------


def test_every_verifier_says_what_it_is() -> None:
    assert {n for n, v in VERIFIERS.items() if v.lossless} == {"exact", "match", "k-seq"}
    for name, cls in VERIFIERS.items():
        assert cls.proposals <= {"iid", SPLIT, "point"} and cls.many == (name != "grouped")
        assert cls.proposals == ({"iid"} if name == "k-seq" else {"iid", SPLIT, "point"})
    assert not Exact(official_quirks=True, residual_top_p=0.9).lossless


@pytest.mark.parametrize("name", VERIFIERS)
def test_options_build_the_same_verifier_again(name: str) -> None:
    changed: dict[str, dict[str, Any]] = {
        "k-seq": {"gamma": 2.0},
        "bounded": {"tv_bound": 0.2, "k": 3},
        "lantern": {"ratio_bound": 5.0, "k": 7, "syntax": (3,), "official_quirks": True, "left": "target"},
        "grouped": {"below": 3, "squared_distance": 0.2},
        "judge": {"threshold": 0.7},
        "threshold": {"rollback": 7.0},
        "exact": {"official_quirks": True, "residual_top_k": 5},
    }
    first = build_verifier(name, **changed.get(name, {}))
    options = verifier_options(first)
    assert changed.get(name, {}).items() <= options.items()
    assert verifier_options(build_verifier(name, **options)) == options


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("exakt", {}, "no verifier is called 'exakt' .did you mean 'exact'"),
        ("bounded", {"tv_bond": 0.1}, "no option 'tv_bond' .did you mean 'tv_bound'.*it has tv_bound, k"),
        ("greedy", {"k": 1}, "no option 'k'; it has none"),
        ("bounded", {"tv_bound": 1.5}, "in .0, 1., 0 is exact; got 1.5"),
        ("bounded", {"k": -1}, "got -1"),
        ("k-seq", {"gamma": 0.5}, "at least 1"),
        ("lantern", {"tv_bound": 0.1, "ratio_bound": 2.0}, "not both"),
        ("lantern", {"tv_bound": 5.0}, "lambda is ratio_bound"),
        ("lantern", {"ratio_bound": 0.5}, "at least 1"),
        ("lantern", {"left": "right"}, "'drafts' or 'target'"),
        ("exact", {"residual_top_p": 0.9}, "official_quirks=True only"),
        ("threshold", {"rollback": -1.0}, "must be >= 0"),
        ("judge", {"threshold": 1.0}, "probability in .0, 1."),
        ("judge", {"head": "/nowhere/head.safetensors"}, "holds no head of a judge"),
        ("grouped", {"above": 0}, "above >= 1"),
    ],
)
def test_wrong_names_and_options_are_refused(name: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build_verifier(name, **options)


def test_proposals_that_cannot_be_treated_are_refused() -> None:
    p, q = laws(1, 4, 1), laws(1, 4, 2)
    one = torch.rand(1, 2)
    drawn = some([[0, 1]], q)
    assert drawn.q is not None
    mixed = replace(drawn, point=torch.tensor([[False, True]]))
    for siblings, kind in ((some([[0, 1]], q, SPLIT), SPLIT), (some([[0, 1]]), "point"), (mixed, "point")):
        with pytest.raises(ValueError, match=f"cannot treat siblings of kind '{kind}'; it takes iid"):
            KSeq().step(p, siblings, one)
    with pytest.raises(ValueError, match="one draft a node; got 2"):
        ready("grouped").step(p, drawn, one)


def test_what_is_missing_is_said() -> None:
    p, q = laws(1, 4, 1), laws(1, 4, 2)
    one, draft = torch.rand(1, 1), some([[0]], q)
    for verifier, message in (
        (Bounded(), "use_codebook"),
        (Lantern(), "use_codebook"),
        (Grouped(), "use_codebook"),
        (Judge(), "use_head"),
        (Judge().use_head(JudgeHead(3)), "gives none"),
        (ready("bounded"), "the model's law 4 tokens"),
    ):
        with pytest.raises(ValueError, match=message):
            verifier.step(p, draft, one)
    with pytest.raises(ValueError, match="2 neighbours is needed"):
        Bounded(k=2).use_neighbours(torch.zeros(9, 1, dtype=torch.int64))
    with pytest.raises(ValueError, match="right and wrong"):
        train_judge(torch.randn(4, 2), torch.ones(4, dtype=torch.bool))
    with pytest.raises(ValueError, match=r"must be \(N, C\)"):
        train_judge(torch.randn(4, 2), torch.ones(3, dtype=torch.bool))


def test_the_laws_of_siblings() -> None:
    """Each earlier one leaves q, chosen ones too; a draw from nothing is none."""
    q = torch.tensor([[0.5, 0.3, 0.2, 0.0]])
    siblings = replace(some([[1, 3, 0, 2, 1]], q, SPLIT), point=torch.tensor([[False, True, False, False, False]]))
    found = list(proposed(siblings, 4))
    wanted = [[0.5, 0.3, 0.2, 0], [0, 0, 0, 1], [5 / 7, 0, 2 / 7, 0], [0, 0, 1, 0]]
    for draft, law in zip(found, wanted, strict=False):
        assert torch.allclose(draft.law, torch.tensor([law], dtype=torch.float64), atol=1e-7) and draft.live.all()
    assert not found[4].live.any()
    everything = [draft.law for draft in proposed(some([[1, 1]], q), 4)]
    assert torch.equal(everything[0], everything[1])  # with replacement


def test_all_drafts_are_one_law() -> None:
    q, chosen = laws(20, 4, 1), points(20, 4, 3, 2)
    for proposal, fixed in itertools.product(("iid", SPLIT), (None, chosen)):
        _, weight = all_drafts(q, 3, proposal, fixed)  # type: ignore[arg-type]
        assert torch.allclose(weight.view(20, -1).sum(1), torch.ones(20, dtype=torch.float64))
