"""Adapters of speculative Jacobi decoding and token recycling. They join the table of `adapters.py`.

Recorded random numbers are handed out by what they are for: the number of a window's position goes to the turn that it
decides, which the recorded lengths of windows and of what was accepted tell.
"""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.parity.adapters import Answers, adapter
from tests.parity.adapters_llamagen import scalar, tokenizer_for, transformer_of
from tests.parity.weights import Case
from varkit.generators.one_token import OneToken
from varkit.heads.categorical import Categorical, pick
from varkit.interfaces import Cond
from varkit.layers.cache import KVCache
from varkit.layout import TokenLayout
from varkit.rng import Draw, Rng
from varkit.samplers.processors import build_processors
from varkit.samplers.speculative.drafters.jacobi import Jacobi
from varkit.samplers.speculative.drafters.neighbours import Neighbours
from varkit.samplers.speculative.drafters.recycling import Recycling
from varkit.samplers.speculative.drafters.starts import SIDES, FirstDrafts
from varkit.samplers.speculative.engine import Loop, decode
from varkit.samplers.speculative.interfaces import DraftBlock, Outcome, Progress
from varkit.samplers.speculative.sampler import SpeculativeSampler
from varkit.samplers.speculative.verifiers import VERIFIERS


class Replay(Rng):
    """Numbers by kind, step and turn; 0.5 where nothing was recorded."""

    def __init__(self, length: int) -> None:
        super().__init__(torch.zeros(1, dtype=torch.int64))
        self.length, self.tables = length, dict[tuple[int, int], Tensor]()

    def put(self, kind: int, step: int, turn: int, value: float) -> None:
        table = self.tables.setdefault((kind, step), torch.full((self.length,), 0.5))
        if turn < self.length:
            table[turn] = value

    def __getitem__(self, rows: Any) -> Replay:  # type: ignore[override]
        return self

    def uniform(self, positions: Tensor, kind: int, step: int = 0, count: int | None = None) -> Tensor:
        table = self.tables.get((kind, step), torch.full((self.length,), 0.5))
        numbers = table[positions].view(1, -1)
        return numbers if count is None else numbers[..., None].expand(-1, -1, count)


def recorded(case: Case, length: int, values: int) -> Replay:
    """The numbers of a recorded loop. Those of a window's acceptance are rows of a table, or one a position."""
    inputs, outputs, rng = case.inputs, case.outputs, Replay(length)
    fills, draws = iter(inputs["randint_values"].tolist()), iter(inputs["multinomial_uniform"].tolist())
    windows = list(outputs["windows"].flatten().split(outputs["window_lengths"].tolist()))
    tests = inputs.get("accept_uniform", inputs.get("accept_uniform_table")).tolist()  # type: ignore[union-attr]
    width = values if "accept_uniform_table" in inputs else 1
    turn, kept = 1, 0
    if "start" not in inputs:
        rng.put(Draw.TOKEN, 0, 0, next(draws))
    for call, (window, count) in enumerate(zip(windows, outputs["accepted_per_call"].tolist(), strict=True), 1):
        size = len(window)
        for node in range(min(kept, size - 1), size - 1):
            rng.put(Draw.FILL, 0, turn + node, (next(fills) + 0.5) / values)
        drawn = [next(draws) for _ in range(size)]
        for node, number in enumerate(drawn):
            rng.put(Draw.DRAFT, call, turn + node, number)
            if case.settings["rule"] == "jacobi":
                rng.put(Draw.ACCEPT, 0, turn + node, number)
        if count == size:
            rng.put(Draw.TOKEN, 0, turn + size - 1, drawn[-1])
        if size > 1 and case.settings["rule"] == "speculative":
            table, tests = tests[: size * width], tests[size * width :]
            for node in range(1, min(count + 1, size)):
                column = int(window[node]) if width > 1 else 0
                rng.put(Draw.ACCEPT, 0, turn + node - 1, table[node * width + column])
            if count < size:
                rng.put(Draw.RESIDUAL, 0, turn + count - 1, next(draws))
        turn, kept = turn + count, size - count
    return rng


class Watched(Jacobi):
    """Writes down what it proposed and what became of it."""

    def begin(self, target: Any, rng: Rng) -> None:
        super().begin(target, rng)
        self.windows, self.chances, self.lengths = list[Tensor](), list[Tensor](), list[int]()
        self.counts, self.emitted, self.rest = list[int](), list[Tensor](), list[Tensor]()
        self.newest_chance = torch.ones(1)

    def propose(self, progress: Progress) -> DraftBlock:
        self.newest = progress.newest
        return super().propose(progress)

    def observe(self, outcome: Outcome) -> None:
        super().observe(outcome)
        block, count = outcome.block, int(outcome.count)
        number = int(block.valid.sum())
        tokens = block.tokens[0, :number]
        self.windows.append(torch.cat([self.newest, tokens]))
        chance = torch.ones(number)
        if block.q is not None:
            chance = torch.where(block.point[0, :number], 1.0, block.q[0, :number].gather(1, tokens[:, None])[:, 0])
        self.chances.append(torch.cat([self.newest_chance, chance]))
        self.lengths.append(number + 1)
        self.counts.append(count)
        self.emitted.append(outcome.emitted[0, :count])
        self.newest_chance = outcome.laws[0, count - 1][outcome.emitted[0, count - 1]][None]
        self.rest.append(self.tokens[0, : int(self.kept)])


class Markov(OneToken, nn.Module):
    """Logits of the last one or two tokens, from tables (of the condition, and without it)."""

    causal = True

    def __init__(self, tables: list[Tensor], length: int, virtual: int = 0) -> None:
        super().__init__()
        self.tables, self.virtual = tables, virtual
        self.layout = TokenLayout(((length,),), tables[0].shape[-1], 1)

    def start(self, cond: Cond, null: Cond | None = None) -> Any:
        rows = len(cond.beside(null))
        return SimpleNamespace(
            cache=KVCache(1, rows, 1, self.layout.length, 2, torch.float32, torch.device("cpu")),
            guided=null is not None,
        )

    def predict(self, state: Any, inputs: Tensor, positions: Tensor) -> Categorical:
        entry = torch.zeros(len(state.cache.keys[0]), 1, 1, 2)
        entry[..., 1] = self.virtual
        state.cache.extend(0, entry, entry)
        return Categorical(*torch.zeros(len(entry), 1, self.layout.codebook_size).chunk(2 if state.guided else 1))  # type: ignore[arg-type]

    def append(self, state: Any, tokens: Tensor, positions: Tensor) -> None:
        state.cache.advance(1)

    def nodes(
        self, inputs: Tensor, slots: Any, positions: Tensor, extra: tuple[Any, ...], layers: int | None = None
    ) -> Tensor:
        places = slots.places.expand(len(inputs), -1)
        entry = torch.stack([places, inputs], -1).float()[:, None]
        place, token = slots.extend(0, entry, entry)[0][:, 0].long().unbind(-1)
        mask = slots.visible()
        seen = torch.ones(1, 1, 1, len(place[0]), dtype=torch.bool) if mask is None else mask
        found = seen[:, 0] & (place[:, None] == places[..., None] - 1)  # of each node, the token before
        before = (found * token[:, None]).sum(-1)
        rows = [table.expand(len(inputs) // len(self.tables), *table.shape) for table in self.tables]
        index = (before, inputs) if self.tables[0].dim() == 3 else (inputs,)
        return torch.cat(
            [
                t[0][tuple(part)]
                for t, part in zip(rows, zip(*[i.chunk(len(rows)) for i in index], strict=True), strict=True)
            ]
        )

    def output_of(self, hidden: Tensor) -> Tensor:
        return hidden


def looped(case: Case, model: Any, cond: Cond, null: Cond | None, length: int, known: Any = None) -> tuple[Any, Any]:
    s, groups = case.settings, list(torch.arange(length).split(1))
    if s["processor_order"] != ["temperature", "top_k", "top_p"] or s["window_schedule"] != "previous-length":
        raise ValueError("only temperature, top-k, top-p in this order, and windows that end one round late")
    settings = {name: s[name] for name in ("guidance_scale", "temperature", "top_k", "top_p")}
    sampler = SpeculativeSampler(**settings, guidance_schedule="constant")
    target = sampler.target(model, cond, null, sampler.settings(), groups)
    start = {"random": "random"}[s["init_scheme"]]
    drafter = Watched(s["window"], start, coupling=False, interval=s["interval"], official_quirks=True)
    verifier = VERIFIERS[{"speculative": "exact", "jacobi": "match"}[s["rule"]]]()
    counts = decode(target, drafter, verifier, recorded(case, length, target.vocabulary), known)
    return counts, drafter


@adapter("sjd", "sampler", "decode-table")
def _(case: Case) -> Answers:
    length = case.settings["max_length"]
    tables = [case.inputs[name] for name in ("table_cond", "table_uncond") if name in case.inputs]
    model = Markov(tables, length, case.settings["virtual_token"])
    null = Cond(torch.ones(1, dtype=torch.int64)) if len(tables) > 1 else None
    given = F.pad(case.inputs["start"][None], (0, length - 1))
    known = (given, torch.arange(length)[None] == 0)
    counts, watched = looped(case, model, Cond(torch.zeros(1, dtype=torch.int64)), null, length, known)
    return {
        "sequence": counts.tokens,
        "windows": torch.cat(watched.windows),
        "window_lengths": torch.tensor(watched.lengths),
        "accepted_per_call": torch.tensor(watched.counts),
        "emitted": torch.cat(watched.emitted),
        "kept": torch.cat(watched.rest),
        "draft_prob_of_window": torch.cat(watched.chances),
        "forward_calls": scalar(torch.tensor(len(watched.counts))),
    }


@adapter("sjd", "sampler", "generate")
def _(case: Case) -> Answers:
    model, cond = transformer_of(case), Cond(case.inputs["cond"])
    if "emb_masks" in case.inputs:
        cond = Cond(sequence=case.inputs["cond"], mask=case.inputs["emb_masks"].bool())
    model.layout.require(tokenizer_for(model).layout, "the generator", "the tokenizer")
    with torch.no_grad():
        counts, watched = looped(case, model, cond, model.null(cond), case.settings["new_tokens"])
    return {
        "indices": counts.tokens,
        "windows": torch.cat(watched.windows),
        "window_lengths": torch.tensor(watched.lengths),
        "accepted_per_call": torch.tensor(watched.counts),
        "forward_calls": scalar(torch.tensor(len(watched.counts))),
    }


@adapter("sjd", "target", "probabilities")
def _(case: Case) -> Answers:
    s = case.settings
    guided = s["guidance_scale"] != 1
    predictive = Categorical(*case.inputs["logits"][:, -s["positions"] :].chunk(2 if guided else 1))
    if guided:
        predictive = predictive.guide(1.0 if s["conditional_only"] else s["guidance_scale"])
    probs = predictive.probs(build_processors(**{name: s[name] for name in ("temperature", "top_k", "top_p")}))
    return {"probs": probs, "tokens": pick(probs, case.inputs["draw_uniform"].view(probs.shape[:2]))}


@adapter("sjd", "initializer", "fill")
def _(case: Case) -> Answers:
    s, given = case.settings, case.inputs
    accepted, count = given["input_ids"], s["new_tokens"]
    kept = given.get("kept_tokens", accepted[:, :0])
    laws = given.get("kept_scores", given["scores"][:, :0])
    start = {"random": "random", "repeat_horizon": "repeat-left", "sample_horizon": "resample"}[s["init_scheme"]]
    if s["image_width"] is None:  # as released, without a width nothing is to the left
        start = "random"
    held, nodes = accepted.shape[1], kept.shape[1] + count
    before, length = s["prefill_tokens"] + s["header_tokens"], held + nodes
    neighbours = None
    if start in SIDES:
        order, grid = torch.arange(length), (length, s["image_width"])
        neighbours = Neighbours.of_grid(grid, order, SIDES[start], s["end_of_line_tokens"], before).turn
    vocabulary = given["image_vocab"]
    random = F.pad(vocabulary[given["random_indices"]], (length - count, 0))
    first = FirstDrafts(start, neighbours, random, torch.zeros(1, length), case.meta.get("quirk", False), before)
    tokens, point, _ = first.fill(
        F.pad(accepted, (0, nodes)),
        torch.tensor([held]),
        F.pad(kept, (0, count)),
        F.pad(laws, (0, 0, 0, count)),
        torch.tensor([kept.shape[1]]),
        given["scores"][:, -1],
    )
    assert bool(point[:, kept.shape[1] :].all())
    new = tokens[:, kept.shape[1] :]
    return {"tokens": new, "scores": F.one_hot(new, given["scores"].shape[-1]).float()}


class WatchedTree(Recycling):
    """Keeps its trees; learns from unfiltered laws while decoding is greedy, as the release does."""

    table: Tensor
    trees: list[Tensor]

    def propose(self, progress: Progress) -> DraftBlock:
        block = super().propose(progress)
        self.trees.append(torch.cat([progress.newest[:, None], block.tokens], 1))
        return block

    def observe(self, outcome: Outcome) -> None:
        super().observe(replace(outcome, laws=self.table[self.trees[-1]].softmax(-1)))


@adapter("parallel-decoding", "token-recycling", "generate")
def _(case: Case) -> Answers:
    s, prompt = case.settings, case.inputs["prompt"]
    if s["temperature"] != 0 or s["target"] != "markov-1":
        raise ValueError("only greedy decoding of a table of the last token")
    length = s["max_new_tokens"] + 2 * max(map(len, s["tree"])) + 4  # room, so that no tree is cut
    model = Markov([case.inputs["table"]], length)
    sampler = SpeculativeSampler(top_k=1)
    target = sampler.target(
        model, Cond(torch.zeros(1, dtype=torch.int64)), None, sampler.settings(), list(torch.arange(length).split(1))
    )
    drafter = WatchedTree(s["draft_top_k"], tree=s["tree"])
    drafter.trees, drafter.table = [], case.inputs["table"]
    known = (F.pad(prompt[:, -1:], (0, length - 1)), torch.arange(length)[None] == 0)
    loop, lengths = Loop(target, drafter, VERIFIERS["exact"](), Rng.from_seed(0, 1), known), list[int]()
    drafter.matrix.tokens = case.inputs["adjacency"][None].clone()
    while sum(lengths) <= s["max_new_tokens"] + 1:
        loop.round()
        lengths.append(int(target.turns) - 1 - sum(lengths))
    return {
        "accept_lengths": torch.tensor(lengths),
        "adjacency": drafter.matrix.tokens[0],
        "sequence": torch.cat([prompt[:, :-1], loop.tokens[:, : sum(lengths)]], 1),
        "trees": torch.cat(drafter.trees),
    }
