"""Verifiers of speculative decoding: from a recorded call to our public classes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from tests.parity.adapters import Answers, adapter
from tests.parity.weights import Case
from varkit.heads.categorical import Categorical, pick
from varkit.interfaces import Processor
from varkit.samplers.processors import build_processors
from varkit.samplers.speculative.interfaces import Proposal, Siblings, Verdict, Verifier
from varkit.samplers.speculative.proposals import draw_without_replacement, gumbel_top_k, proposed
from varkit.samplers.speculative.verifiers import Exact, Greedy, Grouped, KSeq, Lantern, nearest_codes
from varkit.samplers.speculative.verifiers.exact import acceptance
from varkit.samplers.speculative.verifiers.laws import all_drafts, block_efficiency, emitted_law


def drawn(tokens: Tensor, q: Tensor | None, proposal: Proposal = "iid") -> Siblings:
    """Tokens (B, K) from one law (V,) or from laws (B, V); without one, chosen."""
    every = torch.ones_like(tokens, dtype=torch.bool)
    if q is None:
        return Siblings(tokens, every, every, None, proposal)
    laws = q.expand(len(tokens), -1)[:, None].expand(-1, tokens.shape[1], -1)
    return Siblings(tokens, every, ~every, laws, proposal)


def emitted(verdict: Verdict, tokens: Tensor, uniform: Tensor) -> Tensor:
    """The accepted sibling, else the draw of what is left."""
    last = pick(verdict.residual, uniform)
    return torch.where(verdict.accepted < 0, last, tokens.gather(1, verdict.accepted.clamp(min=0)[:, None])[:, 0])


# ---- published formulas ---------------------------------------------------------------------------------------


@adapter("speculative", "verifier", "one-draft")
def _(case: Case) -> Answers:
    tokens, p, q = case.inputs["draft"][:, None], case.inputs["p"], case.inputs["q"]
    laws = p.expand(len(tokens), -1)
    verdict = Exact().step(laws, drawn(tokens, q), case.inputs["uniform"][:, None])
    left = Exact().step(laws, drawn(tokens, q), torch.ones_like(case.inputs["uniform"])[:, None]).residual
    law, rate = emitted_law(Exact(), p[None], *all_drafts(q[None], 1))
    return {
        "ratio": acceptance(laws, q.expand_as(laws), tokens),
        "accept": verdict.accepted == 0,
        "residual": left[0],
        "token": emitted(verdict, tokens, case.inputs["residual_uniform"]),
        "law": law[0],
        "rate": rate,
    }


@adapter("speculative", "verifier", "chain")
def _(case: Case) -> Answers:
    p, q, draft, uniform = (case.inputs[k] for k in ("p", "q", "draft", "uniform"))
    tokens = torch.full((len(uniform), len(p)), case.settings["pad"])
    lengths = torch.zeros(len(uniform), dtype=torch.int64)
    for trial in range(len(uniform)):
        law = p[-1]
        for i in range(len(draft)):
            verdict = Exact().step(p[i][None], drawn(draft[i][None, None], q[i]), uniform[trial, i][None, None])
            if verdict.accepted < 0:
                law = verdict.residual[0]
                break
            tokens[trial, i] = draft[i]
            lengths[trial] += 1
        tokens[trial, lengths[trial]] = pick(law, case.inputs["final_uniform"][trial])
        lengths[trial] += 1
    return {"tokens": tokens, "lengths": lengths}


@adapter("speculative", "verifier", "k-seq")
def _(case: Case) -> Answers:
    assert case.settings["gamma"] == "optimal"
    p, q, trials, count = case.inputs["p"], case.inputs["q"], case.settings["trials"], case.settings["siblings"]
    verifier, tokens = KSeq(), case.inputs["drafts"].expand(trials, -1)
    verdict = verifier.step(p.expand(trials, -1), drawn(tokens, q), case.inputs["uniform"])
    gamma, beta = verifier.plan(p[None], q[None], torch.tensor([count]))
    law, rate = emitted_law(verifier, p[None], *all_drafts(q[None], count))
    return {
        "gamma": gamma,
        "beta": beta,
        "accept_probability": rate,
        "law": law[0],
        "residual": verdict.residual[0],
        "accepted_index": verdict.accepted,
        "token": emitted(verdict, tokens, case.inputs["residual_uniform"]),
    }


@adapter("speculative", "verifier", "recursive")
def _(case: Case) -> Answers:
    proposal: Proposal = "iid" if case.settings["replacement"] else "without-replacement"
    p, q, count = case.inputs["p"][None], case.inputs["q"], case.settings["siblings"]
    tokens = case.inputs["drafts"][None]
    more = drawn(torch.cat([tokens, tokens[:, :1]], 1), q, proposal)  # what one more would be drawn from
    laws = [draft.law[0] for draft in proposed(more, len(q))]
    answers: Answers = {}
    high = torch.full_like(case.inputs["uniform"], case.settings["high_uniform"])
    for suffix, uniform in (("", case.inputs["uniform"][None]), ("_high", high[None])):
        verdict = Exact().step(p, drawn(tokens, q, proposal), uniform)
        targets = [Exact().step(p, drawn(tokens[:, :k], q, proposal), uniform).residual[0] for k in range(count + 1)]
        tested = len(case.outputs[f"ratios{suffix}"])
        shown = len(case.outputs[f"targets{suffix}"])
        answers[f"drafts_q{suffix}"] = torch.stack(laws[:shown])
        answers[f"targets{suffix}"] = torch.stack(targets[:shown])
        answers[f"ratios{suffix}"] = torch.cat(
            [acceptance(targets[k][None], laws[k][None], tokens[:, k : k + 1]) for k in range(tested)]
        )
        answers[f"token{suffix}"] = emitted(verdict, tokens, case.inputs["residual_uniform"])
        answers[f"accepted_index{suffix}"] = verdict.accepted
    law, rate = emitted_law(Exact(), p, *all_drafts(q[None], count, proposal))
    return {**answers, "law": law[0], "accept_probability": rate}


@adapter("speculative", "proposer", "gumbel-top-k")
def _(case: Case) -> Answers:
    order, conditional = gumbel_top_k(case.inputs["q"], case.inputs["gumbel"], case.settings["draws"])
    return {"order": order, "conditional": conditional}


@adapter("speculative", "verifier", "relaxed")
def _(case: Case) -> Answers:
    p, q, token = case.inputs["p"][None], case.inputs["q"][None], case.inputs["draft"][None]
    rows: dict[str, list[Tensor]] = {"aggregated": [], "ratio": [], "residual": [], "set_size": []}
    for delta in case.settings["lantern_delta"]:
        table = case.inputs["neighbours"].expand(p.shape[1], -1)
        verifier = lantern(case, delta).use_neighbours(table)
        aggregated, size, _ = verifier.aggregate(p, token)
        rows["aggregated"].append(aggregated[0])
        rows["ratio"].append(acceptance(aggregated, q, token)[0])
        rows["residual"].append(verifier.step(p, drawn(token, q), torch.ones_like(q[:, :1])).residual[0])
        rows["set_size"].append(size[0])
    return {name: torch.stack(values) for name, values in rows.items()}


@adapter("speculative", "statistics", "block-efficiency")
def _(case: Case) -> Answers:
    return {"expected": block_efficiency(case.inputs["rate"][:, None], case.inputs["length"])}


# ---- SJD and GSD: a window of a chain -------------------------------------------------------------------------


def window(case: Case, verifier: Verifier) -> Answers:
    """Drafts of each row up to the first that is rejected, where the residual is drawn."""
    draft, draft_p, p = (case.inputs[k] for k in ("draft_tokens", "draft_prob", "advanced_prob"))
    rows, length = draft.shape
    tokens, scores, residual = case.inputs["advanced_tokens"].clone(), p.clone(), torch.zeros_like(p[:, 0])
    ratio, first = torch.full((rows, length), -1.0), torch.full((rows,), length)
    uniforms = iter(case.inputs["resample_uniform"])
    for row in range(rows):
        for i in range(1, length):
            law, token = p[row, i - 1][None], draft[row, i][None, None]
            ratio[row, i] = acceptance(law, draft_p[row, i][None], token).nan_to_num(-1)
            verdict = verifier.step(
                law, drawn(token, draft_p[row, i]), case.inputs["accept_uniform_used"][row, i][None, None]
            )
            if verdict.accepted < 0:
                first[row], residual[row] = i, verdict.residual[0]
                tokens[row, i - 1] = pick(verdict.residual[0], next(uniforms))
                break
            tokens[row, i - 1], scores[row, i - 1] = draft[row, i], draft_p[row, i]
    return {"accept_ratio": ratio, "first_misaligned": first, "residual": residual, "tokens": tokens, "scores": scores}


@adapter("sjd", "verifier", "verify")
def _(case: Case) -> Answers:
    assert case.settings["rule"] == "speculative"
    options = {k: case.settings[k] for k in ("residual_top_k", "residual_top_p")}
    answers = window(case, Exact(official_quirks=case.meta.get("quirk", False), **options))
    # Recorded split at the minimum of the batch; ours keeps each row's own length.
    assert case.settings["batch_advance"] == "minimum"
    shortest = answers["first_misaligned"].min()[None]
    return {
        **answers,
        "matched_num": shortest,
        "matched_tokens": answers["tokens"][:, :shortest],
        "unmatched_tokens": answers["tokens"][:, shortest:],
        "unmatched_scores": answers["scores"][:, shortest:],
    }


@adapter("sjd", "grouped-verifier", "verify")
def _(case: Case) -> Answers:
    assert case.settings["residual_top_k"] == 0 and case.settings["residual_top_p"] == 1
    verifier = Grouped(
        below=case.settings["slice_below"],
        above=case.settings["slice_above"],
        **{k: case.settings[k] for k in ("probability_gap", "squared_distance", "distance_token_limit")},
    ).use_codebook(case.inputs["embedding"])
    ratio, rank = verifier.ratio(
        case.inputs["advanced_prob"][0, :-1], case.inputs["draft_prob"][0, 1:], case.inputs["draft_tokens"][0, 1:, None]
    )
    return {**window(case, verifier), "ratio": ratio, "ascending_rank": rank}


# ---- LANTERN --------------------------------------------------------------------------------------------------


@adapter("lantern", "codebook", "neighbours")
def _(case: Case) -> Answers:
    assert case.settings["metric"] == "euclidean" and not case.settings["include_self"]
    return {"neighbours": nearest_codes(case.inputs["codebook"], case.settings["columns"], chunk=7)}


def lantern(case: Case, delta: float, **options: Any) -> Lantern:
    bound: dict[str, Any] = {{"absolute": "tv_bound", "ratio": "ratio_bound"}[case.settings["lantern_bound"]]: delta}
    quirks = case.meta.get("quirk", False)
    return Lantern(k=case.settings["lantern_k"], official_quirks=quirks, **bound, **options)


def verifier_of(case: Case) -> Verifier:
    greedy = case.settings["temperature"] == 0
    if not case.settings["lantern"]:
        return Greedy() if greedy else Exact()
    return lantern(case, case.settings["lantern_delta"], greedy=greedy).use_neighbours(case.inputs["neighbours"])


def processors_of(case: Case) -> Sequence[Processor]:
    """In the recorded order; none for argmax."""
    if case.settings["temperature"] == 0:
        return []
    return [p for name in case.settings["processor_order"] for p in build_processors(**{name: case.settings[name]})]


def walk(case: Case, candidates: Tensor, logits: Tensor, q: Tensor | None) -> Answers:
    """From the root down the paths (R, D), with the target's logits and the drafts' laws behind each of their nodes."""
    verifier, uniforms = verifier_of(case), case.inputs["uniforms"]
    path, used = candidates[0, :1], 0
    while True:
        depth = len(path)
        on = (candidates[:, :depth] == path).all(1)
        row = int(on.nonzero()[0])
        law = Categorical(logits[row, depth - 1][None]).probs(processors_of(case))
        below = candidates[on, depth].tolist() if depth < candidates.shape[1] else []
        children = [t for t in dict.fromkeys(below) if t >= 0]
        if not children:
            left = law
            break
        tokens = torch.tensor([children])
        uniform = torch.full(tokens.shape, 0.5, dtype=torch.float64)
        given = uniforms[used : used + len(children)]
        uniform[0, : len(given)] = given
        kind: Proposal = "iid" if q is None else "without-replacement"
        verdict = verifier.step(law, drawn(tokens, None if q is None else q[row, depth - 1], kind), uniform)
        if verdict.accepted < 0:
            left = verdict.residual
            break
        used += int(verdict.accepted) + 1
        path = torch.cat([path, tokens[0, verdict.accepted]])
    greedy = case.settings["temperature"] == 0
    token = left.argmax(-1) if greedy else pick(left, case.inputs["draw_uniform"])
    return {
        "accept_length": torch.tensor([len(path) - 1]),
        "best_candidate": torch.tensor([row]),
        "next_token": token,
        "sample_p": left[0],
        "next_logits": logits[row, len(path) - 1],
    }


@adapter("lantern", "verifier", "verify-dynamic")
def _(case: Case) -> Answers:
    assert case.settings["draft_law"] == "point"
    return walk(case, case.inputs["candidates"], case.inputs["path_logits"], None)


@adapter("lantern", "verifier", "draft-and-verify-static")
def _(case: Case) -> Answers:
    """The r-th child of a node is the r-th draw behind it; paths in the order of their ranks."""
    nodes = [(), *(tuple(path) for path in case.settings["tree"])]
    count = case.settings["draft_top_k"]
    expanded = [n for n in sorted(nodes, key=len) if any(m[:-1] == n for m in nodes[1:])]
    assert case.settings["exhausted_draws"] == "lowest-unused-id"
    law = Categorical(case.inputs["draft_logits"]).probs(processors_of(case))
    tokens, conditional = draw_without_replacement(law, case.inputs["draft_uniform"].view(-1, count))

    def of(path: tuple[int, ...], values: Tensor, root: Tensor) -> Tensor:
        return values[expanded.index(path[:-1]), path[-1]] if path else root

    leaves = sorted(n for n in nodes if n not in expanded)
    deepest = max(map(len, leaves)) + 1
    size = case.inputs["node_logits"].shape[1]
    candidates = torch.full((len(leaves), deepest), -1)
    chances = torch.ones(len(leaves), deepest)
    logits, laws = torch.zeros(len(leaves), deepest, size), torch.zeros(len(leaves), deepest, size)
    for row, leaf in enumerate(leaves):
        for depth in range(len(leaf) + 1):
            node = leaf[:depth]
            candidates[row, depth] = of(node, tokens, case.inputs["root_token"][0, 0])
            chances[row, depth] = of(node, conditional, torch.tensor(1.0))
            logits[row, depth] = case.inputs["node_logits"][nodes.index(node)]
            if node in expanded:
                laws[row, depth] = law[expanded.index(node)]
    return {
        **walk(case, candidates, logits, laws),
        "draft_prob": law,
        "draft_tokens": tokens,
        "draft_conditional_prob": conditional,
        "tree_tokens": torch.stack([of(n, tokens, case.inputs["root_token"][0, 0]) for n in nodes]),
        "candidates": candidates,
        "candidate_prob": chances,
    }
