"""Speculative decoding emits the law of plain decoding: proven on models small enough to enumerate, with the real loop,
the real cache and the public sampler; and the same checks fail where a known mistake is planted.

The statistics are those of a chi-square test over whole sequences, cells of small expectation pooled, at 1e-3 for the
family of all tests in this file; seeds are fixed.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from itertools import product
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from typer.testing import CliRunner

from varkit import AutoPipeline, NextGroupSampler, Rng
from varkit.cli import app
from varkit.generators.one_token import OneToken
from varkit.heads.categorical import Categorical
from varkit.interfaces import Cond, Generator
from varkit.layers.cache import KVCache, TreeWindow
from varkit.layout import TokenLayout
from varkit.pipelines.auto import assemble
from varkit.registry import create_model, model_entry
from varkit.rng import Draw
from varkit.samplers.guidance import guidance_schedule
from varkit.samplers.processors import build_processors
from varkit.samplers.speculative import engine
from varkit.samplers.speculative.drafters import DRAFTERS
from varkit.samplers.speculative.drafters.jacobi import Jacobi
from varkit.samplers.speculative.drafters.neighbours import Neighbours
from varkit.samplers.speculative.drafters.starts import FirstDrafts
from varkit.samplers.speculative.interfaces import Outcome, Siblings, Verdict
from varkit.samplers.speculative.sampler import SpeculativeSampler
from varkit.samplers.speculative.verifiers import VERIFIERS, Exact

ROWS, SIGNIFICANCE, FAMILY = 16_000, 1e-3, 40
SHARP = 1.5
"""Of the random logits: some tokens are likely, all are possible."""


class Table(OneToken, nn.Module):
    """Random logits for every history. Its cache holds each token with its place, so that a key that should not be
    there, or not seen, or stands at another place, leads to the logits of another history.

    Args: parts: of factorised codes; 0 is plain ids.   layers: two, of which the first has logits of its own.
    """

    causal, num_classes = True, 1

    def __init__(self, values: int = 3, grid: tuple[int, ...] = (2, 2), parts: int = 0, seed: int = 0) -> None:
        super().__init__()
        length = torch.Size(grid).numel()
        self.layout = TokenLayout((grid,), (values,) * parts if parts else values, 1)
        self.parts, self.values = parts, values
        self.choices = values ** max(parts, 1)
        size = (self.choices + 1) ** length
        rng = torch.Generator().manual_seed(seed)
        self.register_buffer("table", SHARP * torch.randn(2, size, max(parts, 1), values, generator=rng))
        self.register_buffer("shallow", self.table + torch.randn(self.table.shape, generator=rng))

    def schedule(self, num_steps: int | None = None) -> list[Tensor]:
        return list(torch.arange(self.layout.length).split(1))

    def in_order(self, name: str, num_steps: int | None = None) -> list[Tensor]:
        raise ValueError("one order only")

    groups, groups_around = Generator.groups, Generator.groups_around

    def start(self, cond: Cond, null: Cond | None = None) -> Any:
        rows = len(cond.beside(null))
        cache = KVCache(2, rows, 1, self.layout.length, 2, torch.float32, torch.device("cpu"))
        return SimpleNamespace(cache=cache, guided=null is not None)

    def predict(self, state: Any, inputs: Tensor, positions: Tensor) -> Categorical:
        rows = len(state.cache.keys[0])
        for layer in range(2):
            state.cache.extend(layer, torch.zeros(rows, 1, 1, 2), torch.zeros(rows, 1, 1, 2))
        logits = self.output_of(self._said(self.table, torch.zeros(rows, 1, dtype=torch.int64), state.guided))
        return Categorical(*logits.chunk(2 if state.guided else 1))

    def append(self, state: Any, tokens: Tensor, positions: Tensor) -> None:
        state.cache.advance(1)

    def number(self, inputs: Tensor) -> Tensor:
        """(R, n) or (R, n, G) -> (R, n), one number for all parts."""
        if not self.parts:
            return inputs
        return (inputs * self.values ** torch.arange(self.parts)).sum(-1)

    def _said(self, table: Tensor, index: Tensor, guided: bool) -> Tensor:
        index = index % table.shape[1]
        halves = index.chunk(2) if guided else (index,)
        return torch.cat([table[i][half] for i, half in enumerate(halves)]).flatten(2)

    def extra(self, state: Any, before: Tensor, rows: Tensor | None = None) -> tuple[Any, ...]:
        return (state.guided,)

    def nodes(
        self, inputs: Tensor, slots: Any, positions: Tensor, extra: tuple[Any, ...], layers: int | None = None
    ) -> Tensor:
        places = slots.places.expand(len(inputs), -1)
        entry = torch.stack([places, self.number(inputs)], -1).float()[:, None]  # R 1 n 2
        for layer in range(2 if layers is None else layers):
            keys, _ = slots.extend(layer, entry, entry)
        mask = slots.visible()
        place, token = keys[:, 0].long().unbind(-1)  # R S
        weight = (token + 1) * (self.choices + 1) ** (place - 1).clamp(0, 12) * (place > 0)
        seen = torch.ones(len(inputs), 1, 1, len(place[0]), dtype=torch.bool) if mask is None else mask
        index = (seen[:, 0] * weight[:, None]).sum(-1)
        table = self.table if layers is None else self.shallow
        return self._said(table, index.expand(len(inputs), inputs.shape[1]), extra[0])

    def output_of(self, hidden: Tensor) -> Tensor:
        return hidden.unflatten(-1, (self.parts, self.values)) if self.parts else hidden

    def law(self, settings: dict[str, Any], known: dict[int, int] | None = None) -> Tensor:
        """The probability of every sequence, in the order of `product`: by multiplication, without any cache."""
        processors = build_processors(**{k: settings[k] for k in ("temperature", "top_k", "top_p") if k in settings})
        w, length = settings.get("guidance_scale", 1.0), self.layout.length
        schedule = guidance_schedule(settings.get("guidance_schedule", "linear"))
        first, last = settings.get("guidance_interval", (0, length))
        sequences = torch.tensor(list(product(range(self.choices), repeat=length)))
        total, index = torch.ones(len(sequences), dtype=torch.float64), torch.zeros(len(sequences), dtype=torch.int64)
        for t in range(length):
            cond, null = self.table[:, index]
            scale = schedule(w, t, length - 1) if first <= t <= last else 1.0
            logits = cond if w == 1 else null + scale * (cond - null)
            each = Categorical(logits).probs(processors).double()  # N G V
            p = each[:, 0]
            for g in range(1, self.parts):
                p = (each[:, g, :, None] * p[:, None, :]).flatten(1)  # the first part is the lowest digit
            if known and t in known:
                p = F.one_hot(torch.full((len(p),), known[t]), self.choices).double()
            total = total * p.gather(1, sequences[:, t : t + 1])[:, 0]
            index = index + (sequences[:, t] + 1) * (self.choices + 1) ** t
        assert abs(float(total.sum()) - 1) < 1e-5
        return total

    def cells(self, tokens: Tensor) -> Tensor:
        """(B, L) or (B, L, G) -> (B,), which sequence of `product`."""
        powers = self.choices ** torch.arange(self.layout.length).flip(0)
        return (self.number(tokens) * powers).sum(1)


def p_value(counts: Tensor, law: Tensor) -> float:
    """Of Pearson's chi-square; cells with an expectation below 10 are one cell. 0 where the impossible happened."""
    n = int(counts.sum())
    if bool((counts[law == 0] > 0).any()):
        return 0.0
    expected, counts = law * n, counts.double()
    rare = expected < 10
    observed = torch.cat([counts[~rare], counts[rare].sum()[None]])
    wanted = torch.cat([expected[~rare], expected[rare].sum()[None]])
    observed, wanted = observed[wanted > 0], wanted[wanted > 0]
    statistic = ((observed - wanted) ** 2 / wanted).sum()
    return float(torch.special.gammaincc(torch.tensor((len(wanted) - 1) / 2).double(), statistic / 2))


def generate(
    model: Any, rows: int = ROWS, seed: int = 0, known: Any = None, sampler: Any = None, **config: Any
) -> tuple[Tensor, Any]:
    cond, null = Cond(torch.zeros(rows, dtype=torch.int64)), Cond(torch.ones(rows, dtype=torch.int64))
    sampler = SpeculativeSampler(**config) if sampler is None else sampler
    out = sampler.generate(
        SimpleNamespace(layout=model.layout), model, cond, Rng.from_seed(seed, rows), null=null, known=known
    )
    return out.tokens, out


def score(model: Table, seed: int = 0, **config: Any) -> float:
    tokens, _ = generate(model, seed=seed, **config)
    law = model.law(config)
    return p_value(torch.bincount(model.cells(tokens), minlength=len(law)), law)


GUIDED = {"guidance_scale": 2.5}
PLAIN: dict[str, Any] = {}
SETTINGS = {
    "plain": PLAIN,
    "guided": GUIDED,
    "top-k": {**GUIDED, "top_k": 2},
    "top-p": {**GUIDED, "top_p": 0.8, "guidance_interval": (1, 2)},
    "warm": {"temperature": 1.7, "top_p": 0.9},
}
JACOBI: list[dict[str, Any]] = [
    {"window": 4},
    {"window": 4, "coupling": False},
    {"window": 3, "start": "repeat-left"},
    {"window": 3, "start": "repeat-above", "coupling": False},
    {"window": 4, "start": "resample"},
    {"window": 3, "interval": (1, 3)},
]


@pytest.mark.parametrize(
    ("options", "settings"),
    [(options, list(SETTINGS)[i % len(SETTINGS)]) for i, options in enumerate(JACOBI)]
    + [(JACOBI[0], name) for name in ("guided", "top-k", "top-p")]
    + [(JACOBI[4], "plain")],
)
def test_jacobi_emits_the_law_of_the_model(options: dict[str, Any], settings: str) -> None:
    config = {"drafter_options": options, **SETTINGS[settings]}
    assert score(Table(), **config) > SIGNIFICANCE / FAMILY


DRAFTED: list[tuple[str, dict[str, Any], str]] = [
    ("neighbour", {"count": 2}, "top-p"),
    ("neighbour", {"count": 3, "side": "above"}, "plain"),
    ("recycling", {"k": 3, "nodes": 8}, "guided"),
    ("recycling", {"k": 2, "tree": [[0], [1], [0, 0], [1, 0], [1, 1], [0, 0, 0]]}, "warm"),
    ("n-gram", {"k": 3, "nodes": 6, "depth": 3}, "plain"),
    ("self", {"layers": 1, "count": 3}, "guided"),
    ("little", {"count": 2}, "top-p"),
    ("little", {"count": 4}, "plain"),
    ("little", {"branches": [2, 2, 1]}, "guided"),
    ("little", {"branches": [3]}, "top-k"),
]


@pytest.mark.parametrize(("drafter", "options", "settings"), DRAFTED)
def test_every_drafter_leaves_the_law_as_it_is(drafter: str, options: dict[str, Any], settings: str) -> None:
    config = SETTINGS[settings]
    sampler = SpeculativeSampler(drafter=drafter, drafter_options=options, **config)
    sampler.draft_model = Table(seed=3)  # type: ignore[assignment]
    model = Table()
    tokens, out = generate(model, sampler=sampler)
    law = model.law(config)
    assert p_value(torch.bincount(model.cells(tokens), minlength=81), law) > SIGNIFICANCE / FAMILY
    assert sum(out.accepted) > 0.02 * sum(out.drafted)
    few, _ = generate(model, 3, sampler=sampler)
    assert torch.equal(few, tokens[:3])


@pytest.mark.parametrize("drafter", ["jacobi", "recycling"])
def test_matching_a_plain_draw_keeps_the_law(drafter: str) -> None:
    assert score(Table(), drafter=drafter, verifier="match", **SETTINGS["top-p"]) > SIGNIFICANCE / FAMILY


def test_factorised_codes_keep_their_law() -> None:
    model = Table(2, (3,), parts=2)
    assert score(model, drafter_options={"window": 3}, **SETTINGS["guided"]) > SIGNIFICANCE / FAMILY


def test_known_tokens_are_kept_and_the_others_follow_them() -> None:
    model, config = Table(), {"drafter_options": {"window": 4}, **GUIDED}
    given, keep = torch.full((ROWS, 4), 2), torch.tensor([False, True, False, False])
    tokens, _ = generate(model, known=(given, keep), **config)
    law = model.law(config, known={1: 2})
    assert p_value(torch.bincount(model.cells(tokens), minlength=81), law) > SIGNIFICANCE / FAMILY


@pytest.mark.parametrize("options", [JACOBI[0], JACOBI[1], JACOBI[4]])
def test_an_image_does_not_depend_on_its_batch(options: dict[str, Any]) -> None:
    """So what is true of a large batch is true of batch 1 and 3."""
    model, config = Table(), {"drafter_options": options, **SETTINGS["top-p"]}
    many, out = generate(model, 64, **config)
    assert len(set(out.target_calls)) > 1  # rows did advance at speeds of their own
    three, _ = generate(model, 3, **config)
    one, few = generate(model, 1, **config)
    assert torch.equal(many[:3], three) and torch.equal(many[:1], one)
    assert few.target_calls[0] == out.target_calls[0] and few.steps == few.target_calls[0]


def test_the_counters_add_up() -> None:
    _, out = generate(Table(), 50, drafter_options={"window": 4})
    assert out.steps == max(out.target_calls) and out.lossless
    for calls, accepted, drafted, each in zip(
        out.target_calls, out.accepted, out.drafted, out.tokens_per_call, strict=True
    ):
        assert calls + accepted == 4 and accepted <= drafted and each == 4 / calls


# ---- planted mistakes --------------------------------------------------------------------------------


class ResidualIsP(Exact):
    def step(self, p: Tensor, siblings: Siblings, uniform: Tensor, hidden: Tensor | None = None) -> Verdict:
        return Verdict(super().step(p, siblings, uniform).accepted, p)


class WarpedAgain(Exact):
    def step(self, p: Tensor, siblings: Siblings, uniform: Tensor, hidden: Tensor | None = None) -> Verdict:
        verdict = super().step(p, siblings, uniform)
        (warp,) = build_processors(top_p=0.8)
        return Verdict(verdict.accepted, warp(verdict.residual.log()).softmax(-1))


class UniformQ(Exact):
    def step(self, p: Tensor, siblings: Siblings, uniform: Tensor, hidden: Tensor | None = None) -> Verdict:
        q = torch.full_like(siblings.q, 1 / p.shape[1])  # type: ignore[arg-type]
        return super().step(p, Siblings(siblings.tokens, siblings.valid, siblings.point, q, siblings.proposal), uniform)


@pytest.mark.parametrize(
    ("wrong", "model", "config"),
    [
        (ResidualIsP, Table(), {"drafter_options": {"window": 4}, **GUIDED}),
        (UniformQ, Table(), {"drafter_options": {"window": 4}, **GUIDED}),
        # of three tokens top-p leaves too few to be wrong about
        (WarpedAgain, Table(6, (3,)), {"drafter_options": {"window": 3}, "top_p": 0.8, "temperature": 2.0}),
    ],
)
def test_a_wrong_verifier_is_caught(
    monkeypatch: pytest.MonkeyPatch, wrong: type[Exact], model: Table, config: dict[str, Any]
) -> None:
    monkeypatch.setitem(VERIFIERS, "wrong", wrong)
    assert score(model, verifier="wrong", **config) < 1e-9


def forgets_one(self: TreeWindow, nodes: Tensor, counts: Tensor) -> None:
    right(self, nodes, (counts - 1).clamp_min(0))


def keeps_rejected(self: TreeWindow, nodes: Tensor, counts: Tensor) -> None:
    right(self, nodes, torch.full_like(counts, self.positions.shape[1]))


right = TreeWindow.commit


def gathers_nothing(self: TreeWindow, nodes: Tensor, counts: Tensor) -> None:
    right(self, torch.arange(nodes.shape[1]).expand_as(nodes), counts)


def tree_score() -> float:
    sampler = SpeculativeSampler(drafter="little", drafter_options={"branches": [2, 2]}, verifier="exact")
    model, sampler.draft_model = Table(), Table(seed=3)  # type: ignore[assignment]
    tokens, _ = generate(model, sampler=sampler)
    return p_value(torch.bincount(model.cells(tokens), minlength=81), model.law({}))


def test_keys_of_another_branch_are_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(TreeWindow, "commit", gathers_nothing)
    assert tree_score() < 1e-9


class Sorted(Exact):
    """Looks at siblings by their probability instead of in the order of drawing."""

    def step(self, p: Tensor, siblings: Siblings, uniform: Tensor, hidden: Tensor | None = None) -> Verdict:
        assert siblings.q is not None
        order = siblings.q.gather(2, siblings.tokens[..., None])[..., 0].argsort(1, descending=True)
        tokens, valid, point = (x.gather(1, order) for x in (siblings.tokens, siblings.valid, siblings.point))
        verdict = super().step(p, Siblings(tokens, valid, point, siblings.q, siblings.proposal), uniform)
        back = order.gather(1, verdict.accepted.clamp_min(0)[:, None])[:, 0]
        return Verdict(torch.where(verdict.accepted < 0, -1, back), verdict.residual)


def test_sorted_siblings_are_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(VERIFIERS, "exact", Sorted)
    assert tree_score() < 1e-9


@pytest.mark.parametrize("wrong", [forgets_one, keeps_rejected])
def test_a_wrong_rewind_is_caught(monkeypatch: pytest.MonkeyPatch, wrong: Callable[..., None]) -> None:
    reserve = KVCache.reserve
    monkeypatch.setattr(KVCache, "reserve", lambda self, count: reserve(self, count + 30))
    monkeypatch.setattr(TreeWindow, "commit", wrong)
    assert score(Table(), drafter_options={"window": 4}) < 1e-9


class Uniform(Jacobi):
    """A window of drafts from the uniform law, anew in every round: poor, which shows best what is done wrongly."""

    def observe(self, outcome: Outcome) -> None:
        super().observe(outcome)
        self.q = torch.full_like(self.q, 1 / self.vocabulary)
        number = self.rng.uniform(self.order[: self.nodes], Draw.DRAFT, step=100 + self.round)
        self.tokens = (number * self.vocabulary).long()


class Retesting(Uniform):
    """As released in a batch: rows advance by the least that any row accepted, and what others accepted is kept with
    its old q, to be tested again by a new number."""

    full: engine.Walk

    def observe(self, outcome: Outcome) -> None:
        super().observe(outcome)
        block, done = outcome.block, int(outcome.count[0])
        for node in range(min(self.nodes, block.tokens.shape[1] - done)):
            old = node + done  # the column of the same position in the last block
            accepted = (old + 1 < self.full.count) & ~block.point[:, old]
            self.tokens[:, node] = torch.where(accepted, block.tokens[:, old], self.tokens[:, node])


def test_a_batch_minimum_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    walk, round_ = engine.walk, engine.Loop.round

    def least(*args: Any) -> engine.Walk:
        done = Retesting.full = walk(*args)
        n = int(done.count.min())
        return engine.Walk(done.path[:, :n], done.emitted[:, :n], done.count.clamp(max=n))

    def fresh(self: engine.Loop) -> int:
        numbers, order = self.numbers, self.target.order
        numbers.accept = Rng.from_seed(5, ROWS).uniform(order, Draw.ACCEPT, step=self.counts.passes, count=1)
        numbers.residual = Rng.from_seed(5, ROWS).uniform(order, Draw.RESIDUAL, step=self.counts.passes)
        return round_(self)

    config = {"drafter": "wrong", "drafter_options": {"window": 5, "coupling": False}}
    monkeypatch.setitem(DRAFTERS, "wrong", Uniform)
    assert score(Table(3, (5,)), **config) > SIGNIFICANCE / FAMILY
    monkeypatch.setitem(DRAFTERS, "wrong", Retesting)
    monkeypatch.setattr(engine, "walk", least)
    monkeypatch.setattr(engine.Loop, "round", fresh)
    assert score(Table(3, (5,)), **config) < 1e-9


# ---- greedy decoding of real networks ----------------------------------------------------------------

REAL = ["llamagen_b", "rar_b", "elm_ar_l_2_12", "flextok_ar_fashion"]


def real(name: str, spread: float = 0.3) -> tuple[Any, Any]:
    entry = model_entry(name)
    model, rng = entry.build(**entry.tiny).eval(), torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(spread * torch.randn(parameter.shape, generator=rng))
    return model, create_model(entry.tokenizer, **entry.tiny_tokenizer).eval()


@pytest.mark.parametrize("name", REAL)
@pytest.mark.parametrize("w", [1.0, 2.5])
def test_greedy_decoding_is_plain_greedy_decoding(name: str, w: float) -> None:
    """What differs is the cache: rows of different lengths, several positions at once, going back, rows that leave."""
    model, tokenizer = real(name)
    cond, null = Cond(torch.tensor([0, 1, 2, 1])), Cond(torch.full((4,), model.num_classes))
    settings = {"guidance_scale": w, "top_k": 1}
    plain = NextGroupSampler(**settings).generate(tokenizer, model, cond, Rng.from_seed(0, 4), null=null)
    tree = {} if name.startswith("elm") else {"recycling": {"nodes": 9}, "n-gram": {}, "little": {"branches": [3, 2]}}
    drafters = {"jacobi": {"window": 5}, "neighbour": {}, "self": {"layers": 1}, **tree}
    for drafter, options in drafters.items():
        sampler = SpeculativeSampler(**settings, drafter=drafter, drafter_options=options)
        sampler.draft_model = real(name, 0.31)[0]
        out = sampler.generate(tokenizer, model, cond, Rng.from_seed(0, 4), null=null)
        assert torch.equal(out.tokens, plain.tokens)


# ---- pipelines and the command ----------------------------------------------------------------------


def pipeline_of(name: str) -> Any:
    return assemble(*real(name), {"guidance_scale": 2.0, "guidance_schedule": "constant"})


def test_a_pipeline_takes_a_sampler_by_name_or_as_an_object_and_keeps_it(tmp_path: Path) -> None:
    pipe = pipeline_of("llamagen_b")
    call: dict[str, Any] = {"class_labels": [0, 1], "seed": 3, "output_type": "latent"}
    named = pipe(**call, sampler="sjd:window=4,coupling=false")
    assert named.stats["lossless"] and len(named.stats["target_calls"]) == 2
    sampler = SpeculativeSampler(drafter_options={"window": 4, "coupling": False}, **pipe.sampler.settings())
    assert torch.equal(pipe(**call, sampler=sampler).images, named.images)
    assert torch.equal(pipe(**call, sampler="plain").images, pipe(**call).images)
    assert "drafted" in pipe(**{**call, "class_labels": [0]}, sampler="auto").stats
    greedy = pipe(**call, top_k=1).images
    for name in ("auto", "recycling:nodes=6,k=3", "self+exact:layers=1", "sjd:start=repeat-left"):
        assert torch.equal(pipe(**call, top_k=1, sampler=name).images, greedy)
    pipe.register_modules(sampler=sampler)
    pipe.save_pretrained(tmp_path / "saved")
    saved = AutoPipeline.from_pretrained(tmp_path / "saved")
    assert torch.equal(saved(**call).images, named.images)
    little = f"little:model={tmp_path / 'saved'},branches=[2,2]"
    assert torch.equal(saved(**call, top_k=1, sampler=little).images, greedy)
    assert torch.equal(saved(**call, top_k=1, sampler="plain").images, greedy)


def test_what_cannot_be_is_refused_in_a_sentence() -> None:
    pipe, var = pipeline_of("llamagen_b"), pipeline_of("var_d16")
    call: dict[str, Any] = {"class_labels": [0], "seed": 0, "output_type": "latent"}
    assert "drafted" not in var(**call, sampler="auto").stats
    for model, sampler, why in (
        (var, "sjd", "does not decide one token a step"),
        (pipe, "sjb", "did you mean"),
        (pipe, "sjd:windw=3", "has no option windw"),
        (pipe, "sjd:window=1", "window must be at least 2"),
        (pipe, "sjd:start=up", "start must be one of"),
        (pipe, "sjd:fast", "key=value"),
        (pipe, "jacobi+exat", "no verifier is called 'exat'"),
        (pipe, "auto:window=3", "has no options"),
        (pipe, "little", "needs a smaller model"),
        (pipe, "self:layers=2", "fewer than the 2"),
        (pipe, "recycling:tree=[[0,1]]", "needs its parent"),
        (pipeline_of("flextok_ar_fashion"), "neighbour:side=above", "no neighbours above"),
        (pipeline_of("elm_ar_l_2_12"), "recycling", "cannot draft factorised codes"),
    ):
        with pytest.raises(ValueError, match=re.escape(why)):
            model(**call, sampler=sampler)
    with pytest.raises(ValueError, match="more_smooth"):
        SpeculativeSampler(more_smooth=True)


class ChainsOfDraws(Exact):
    proposals, many = frozenset({"iid"}), False


@pytest.mark.parametrize(("drafter", "why"), [("neighbour", "proposes point"), ("little", "drafts trees")])
def test_pairs_that_do_not_go_together_are_refused(monkeypatch: pytest.MonkeyPatch, drafter: str, why: str) -> None:
    monkeypatch.setitem(VERIFIERS, "narrow", ChainsOfDraws)
    if drafter == "little":
        monkeypatch.setattr(ChainsOfDraws, "proposals", Exact.proposals)
    options = {"branches": [2]} if drafter == "little" else {}
    with pytest.raises(ValueError, match=why):
        SpeculativeSampler(drafter, "narrow", options)


def test_the_command_shows_what_drafts_brought(tmp_path: Path) -> None:
    pipe = pipeline_of("llamagen_b")
    pipe.save_pretrained(tmp_path / "model")
    out = ["--out", str(tmp_path / "x.png"), "--class", "0,1", "--sampler", "sjd:window=3"]
    told = CliRunner().invoke(app, ["sample", str(tmp_path / "model"), *out, "--json"])
    assert told.exit_code == 0, told.output
    stats = json.loads(told.stdout.splitlines()[-1])
    assert stats["law"] == "lossless" and stats["tokens_per_call"] >= 1 and stats["accepted"] <= stats["drafted"]
    assert stats["settings"]["sampler"] == "sjd:window=3"
    told = CliRunner().invoke(app, ["sample", str(tmp_path / "model"), *out])
    assert "tokens a pass" in told.output and "lossless" in told.output


# ---- first drafts -------------------------------------------------------------------------------------------------


def test_line_ends_widen_a_row_and_are_never_copied_from() -> None:
    order = torch.arange(2 + 3 * 5)  # two tokens before the image, then rows of four and a line end
    left = Neighbours.of_grid((3, 4), order, "left", line_end=1, before=2).turn.tolist()
    assert left[:3] == [-1, -1, -1] and left[3:7] == [2, 3, 4, 5] and left[7] == -1 and left[8] == 7
    above = Neighbours.of_grid((3, 4), order, "above", line_end=1, before=2).turn.tolist()
    assert above[:7] == [-1] * 7 and above[7:] == list(range(2, 12))
    ends = {2 + 5 * row + 4 for row in range(3)}
    assert not ends & set(left) and {above[end] for end in ends} <= ends | {-1}
    for side in ("left", "above"):  # a layout without them is what it was
        model, every = Table(grid=(2, 3)), torch.arange(6)
        assert Neighbours.of(model, every, side).turn.equal(Neighbours.of_grid((2, 3), every, side).turn)
        assert (
            Neighbours.of(model, every, side).turn.tolist()
            == {
                "left": [-1, 0, 1, -1, 3, 4],
                "above": [-1, -1, -1, 0, 1, 2],
            }[side]
        )


def test_new_positions_copy_their_neighbour_or_as_released_the_newest_token() -> None:
    """Row two begins inside the window: 9 is decided, 8 kept, then a row end, 5 at random, and two copies."""
    length, random = 12, torch.full((1, 12), 5)
    neighbours = Neighbours.of_grid((3, 4), torch.arange(length), "left").turn
    board = torch.tensor([[1, 2, 9] + [0] * 9])
    q = torch.zeros(1, 5, 10)
    q[0, 0, 7] = 1.0
    for start, quirks, wanted in (
        ("repeat-left", False, [8, 5, 5, 5, 5]),
        ("repeat-left", True, [8, 5, 8, 8, 8]),
        ("resample", False, [8, 5, 5, 5, 5]),
        ("resample", True, [8, 5, 7, 7, 7]),
    ):
        first = FirstDrafts(start, neighbours, random, torch.full((1, length), 0.5), quirks)
        kept = torch.tensor([[8, 0, 0, 0, 0]])
        tokens, point, _ = first.fill(board, torch.tensor([3]), kept, q.clone(), torch.tensor([1]), q[:, 0])
        assert tokens.tolist() == [wanted], (start, quirks)
        assert point.tolist() == [[False, True, True, True, True]]
