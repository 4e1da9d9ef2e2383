"""Adapters of Distilled Decoding: the map, the students and their sampler. They join the table of `adapters.py`."""

from __future__ import annotations

from typing import Any

import torch

from tests.parity.adapters import Answers, adapter, tokenizer_of
from tests.parity.adapters_llamagen import tokenizer_for
from tests.parity.weights import Case
from varkit.checkpoints import distilled as keys
from varkit.checkpoints import llamagen as llamagen_keys
from varkit.checkpoints import var as var_keys
from varkit.checkpoints.files import load_strictly
from varkit.conditioning.label import LabelCondition
from varkit.generators.distilled_llamagen import DistilledLlamaGen
from varkit.generators.distilled_var import DistilledVAR
from varkit.generators.var import VAR
from varkit.pipelines.distilled import DistilledPipeline
from varkit.rng import Draw, RecordedRng
from varkit.samplers.distilled import DistilledSampler, DistilledStep, finish
from varkit.samplers.flow_map import integrate, nearest_codes, posterior, uniform_times, velocity

# ---- the map --------------------------------------------------------------------------------------------------


def map_inputs(case: Case) -> Any:
    """float64, as the fixture was computed: states, log probabilities, codes."""
    if (case.settings["t_noise"], case.settings["t_data"]) != (0.0, 1.0):
        raise ValueError("only t = 0 for noise and 1 for data")
    x = case.inputs["x" if "x" in case.inputs else "noise"]
    return x.double(), case.inputs["probs"].double().log(), case.inputs["codebook"].double()


@adapter("distilled-decoding", "flow_map", "velocity")
def _(case: Case) -> Answers:
    x, log_probs, codes = map_inputs(case)
    v, w = velocity(x, case.inputs["t"].double(), log_probs, codes)
    return {"velocity": v, "posterior": w}


@adapter("distilled-decoding", "flow_map", "map")
def _(case: Case) -> Answers:
    s, (x, log_probs, codes) = case.settings, map_inputs(case)
    if "steps" in s:
        times = uniform_times(s["t_start"], s["t_end"], s["steps"])
        parts, solver = (times[: s["mid_step"] + 1], times[s["mid_step"] :]), s["solver"]
    else:  # an adaptive solver of high order: many small steps stand for it
        parts = (uniform_times(s["t_start"], s["t_mid"], 1000), uniform_times(s["t_mid"], s["t_end"], 1000))
        solver = "heun"
    middle = integrate(x, log_probs, codes, parts[0], solver)
    end = integrate(middle, log_probs, codes, parts[1], solver)
    return {"x_mid": middle, "x_end": end, "index": posterior(end, s["t_end"], log_probs, codes).argmax(-1)}


# ---- students -------------------------------------------------------------------------------------------------


def parts_of(case: Case) -> tuple[Any, Any]:
    """Student and tokenizer; of LlamaGen the codebook alone is recorded, and any tokenizer around it does."""
    constructor, state = case.fixture.meta["constructor"], case.fixture.state
    if case.settings["t_unit"] == "token":
        model: Any = DistilledLlamaGen(**keys.llamagen_student_arguments(constructor))
        load_strictly(model, llamagen_keys.transformer_from_official(state), "fixture")
        tokenizer: Any = tokenizer_for(model)
        tokenizer.quantize.embedding.weight.data = case.inputs["codebook"]
        return model.eval(), tokenizer.eval()
    tokenizer = tokenizer_of(constructor["vae"], case.fixture.part("vae."))
    sizes = {"codebook_size": tokenizer.layout.codebook_size, "latent_dim": tokenizer.layout.dim}
    model = DistilledVAR(**keys.student_arguments(constructor["dd"]), **sizes)
    load_strictly(model, var_keys.var_from_official(case.fixture.part("dd.")), "fixture")
    return model.eval(), tokenizer


@adapter("distilled-decoding", "student", "forward")
def _(case: Case) -> Answers:
    model, _ = parts_of(case)
    out = model(case.inputs["x"], case.inputs["label"], model.known(case.inputs["t"]))
    return {"conti": out.vectors, "logits": out.logits}


@adapter("distilled-decoding", "student", "perturb")
def _(case: Case) -> Answers:
    return {"x_t": parts_of(case)[0].mix(case.inputs["x"], case.inputs["noise"], case.inputs["t"])}


@adapter("distilled-decoding", "student", "final_predict")
def _(case: Case) -> Answers:
    model, tokenizer = parts_of(case)
    i = case.inputs
    out = finish(model, i["x"], i["label"], i["t"], case.settings["split_t"], tokenizer.codebook)
    return {"argmax": out.ids, "conti": out.vectors, "sequence": out.sequence}


# ---- sampler --------------------------------------------------------------------------------------------------


def generate(case: Case, **more: Any) -> tuple[Any, list[DistilledStep], Answers]:
    model, tokenizer = parts_of(case)
    condition = LabelCondition(model.num_classes)
    cond = condition.encode(class_labels=case.inputs["label"])
    uniform = torch.full((len(cond), model.layout.length), 0.5)  # the teacher's top_k is 1: any number does
    rng = RecordedRng(normal={Draw.STUDENT_NOISE: case.inputs["noise"]}, uniform={Draw.TOKEN: uniform})
    steps: list[DistilledStep] = []
    pipeline = DistilledPipeline(model, tokenizer, DistilledSampler())
    settings = {"times": case.settings["t_list"], "split": case.settings["split_t"], **more}
    null = condition.null(cond)
    out = pipeline.sampler.generate(tokenizer, model, cond, rng, null=null, on_step=steps.append, **settings)
    images = {"img": pipeline.to_images(out.tokens, "pt")} if "image_range" in case.settings else {}
    return tokenizer, steps, {"sequence": out.tokens, **images}


@adapter("distilled-decoding", "sampler", "generate_few_step")
def _(case: Case) -> Answers:
    return generate(case)[2]


@adapter("distilled-decoding", "sampler", "generate_with_teacher")
def _(case: Case) -> Answers:
    constructor = case.fixture.meta["constructor"]
    sizes = {"codebook_size": constructor["vae"]["vocab_size"], "latent_dim": constructor["vae"]["z_channels"]}
    teacher = VAR(**var_keys.var_arguments(constructor["teacher"]), **sizes)
    load_strictly(teacher, var_keys.var_from_official(case.fixture.part("teacher.")), "fixture")
    quirks = {"block_causal": False, "none": True}[case.settings["prefill_mask"]]
    if quirks != case.meta.get("quirk", False):
        raise ValueError("the prefill without a mask is the quirk")
    tokenizer, steps, answers = generate(
        case,
        teacher=teacher.eval(),
        teacher_start=case.settings["t_teacher_start"],
        official_quirks=quirks,
        **keys.teacher_sampling(case.settings),
    )
    prefix = tokenizer.vectors(nearest_codes(steps[0].tokens, tokenizer.codebook))
    drawn = [s.tokens for s in steps if s.by == "teacher"]
    return {**answers, "prefix_q": prefix, "teacher_seq": drawn[-1]}
