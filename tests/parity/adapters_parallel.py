"""Parallel decoding: from recorded runs to our public classes. Recorded draws go to the positions that they decide."""

from __future__ import annotations

import torch

from tests.parity.adapters import Answers, adapter
from tests.parity.adapters_llamagen import scalar, tokenizer_for, transformer_of
from tests.parity.weights import Case
from varkit.interfaces import Cond
from varkit.orders import locality_groups
from varkit.rng import Draw, RecordedRng
from varkit.samplers.zipar import ZipARSampler


@adapter("parallel-decoding", "zipar", "generate")
def _(case: Case) -> Answers:
    s, model, cond = case.settings, transformer_of(case), Cond(case.inputs["cond"])
    if s["processor_order"] != ["temperature", "top_k", "top_p"] or s["guidance_interval"] != -1:
        raise ValueError("only temperature, top-k, top-p in this order, and guidance everywhere")
    quirks = {"attended-as-zero": True}[s["unfilled_cache"]]
    settings = {name: s[name] for name in ("window", "guidance_scale", "temperature", "top_k", "top_p")}
    sampler = ZipARSampler(**settings, official_quirks=quirks, guidance_schedule="constant")
    steps = sampler.steps(model)
    drawn = torch.cat([step.positions[step.drawn] for step in steps])
    uniform = torch.full((len(cond), s["new_tokens"]), 0.5, dtype=torch.float64)
    uniform[:, drawn] = case.inputs["draw_uniform"].view(-1, len(cond)).T
    rng = RecordedRng({Draw.TOKEN: uniform})
    out = sampler.generate(tokenizer_for(model), model, cond, rng, null=model.null(cond))
    return {
        "indices": out.tokens,
        "positions": torch.cat([step.positions for step in steps]),
        "positions_per_call": torch.tensor([len(step.positions) for step in steps]),
        "forward_calls": scalar(torch.tensor(out.network_calls)),
    }


@adapter("parallel-decoding", "lpd", "order")
def _(case: Case) -> Answers:
    s, (row, column) = case.settings, case.inputs["first"].tolist()
    groups = locality_groups(
        (s["grid"], s["grid"]),
        s["group_sizes"],
        first=row * s["grid"] + column,
        proximity_threshold=s["proximity_threshold"],
        repulsion_threshold=s["repulsion_threshold"],
        shuffle=s["shuffle"],
    )
    return {"order": torch.cat(groups)}
