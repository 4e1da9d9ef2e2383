"""Adapters of ControlAR: its control encoder, its loss and its decoding. They join the table of `adapters.py`."""

from __future__ import annotations

import torch

from tests.parity.adapters import Answers, adapter
from tests.parity.adapters_llamagen import cond_of, scalar, tokenizer_for
from tests.parity.weights import Case
from varkit.checkpoints import controlar as keys
from varkit.checkpoints.files import load_strictly
from varkit.checkpoints.llamagen import sampling_arguments
from varkit.conditioning.control import ControlCondition
from varkit.generators.llamagen import LlamaGen
from varkit.interfaces import Cond
from varkit.rng import Draw, RecordedRng
from varkit.samplers.next_group import NextGroupSampler, StepInfo


def transformer_of(case: Case) -> LlamaGen:
    """For the size of the case's control image."""
    arguments = {**case.fixture.meta["constructor"], "condition_type": case.settings.get("condition_type")}
    model = LlamaGen(**keys.transformer_arguments(arguments))
    load_strictly(model, keys.from_official(case.fixture.state), "fixture")
    height, width = case.inputs["control"].shape[-2:]
    return model.resized((height // 16, width // 16)).train(case.settings.get("mode") == "train")


def control_of(case: Case) -> Cond:
    image, strength = case.inputs["control"], case.settings.get("control_strength", 1.0)
    if case.settings["control_range"] != [-1.0, 1.0]:
        raise ValueError("control images lie in [-1, 1]")
    return ControlCondition((image.shape[2], image.shape[3])).encode(control=image, strength=strength)


@adapter("controlar", "transformer", "encode_control")
def _(case: Case) -> Answers:
    model, images = transformer_of(case), control_of(case).control
    control = model.controller
    assert control is not None and images is not None
    features = control.features(images[:, 0], model.layout.grids)
    adapted = control.adapter_mlp(features)
    return {
        "resized_mean": scalar(control.encoder.resized(images[:, 0]).mean()),
        "features": features,
        "adapter": adapted,
        "condition": control.condition_mlp(adapted),
        **{f"fused_{i}": fused for i, fused in enumerate(control.project(features))},
    }


@adapter("controlar", "transformer", "loss")
def _(case: Case) -> Answers:
    model, tokens = transformer_of(case), case.inputs["tokens"]
    cond = cond_of(case) + control_of(case)
    rng = RecordedRng(uniform={Draw.COND_DROP: case.inputs["drop_draw"][:, None]})
    inputs = tokenizer_for(model).embed(tokens)
    losses = model.training_loss(tokens, inputs, cond, rng)
    losses["loss"].backward()
    own = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    gradients = keys.to_official(own, model)
    return {
        "logits": model.teacher_forced(inputs, model.drop_condition(cond, rng)).logits,
        "loss": scalar(losses["loss"]),
        **{f"grad/{name}": gradients[name] for name in case.settings["gradients"]},
    }


@adapter("controlar", "transformer", "generate")
def _(case: Case) -> Answers:
    model, cond = transformer_of(case), cond_of(case) + control_of(case)
    if case.settings["max_new_tokens"] != model.layout.length or case.settings["sample_logits"]:
        raise ValueError("only whole images, drawn greedily")
    steps: list[StepInfo] = []
    out = NextGroupSampler().generate(
        tokenizer_for(model),
        model,
        cond,
        RecordedRng(uniform={Draw.TOKEN: torch.full((len(cond), model.layout.length), 0.5)}),
        null=model.null(cond),
        on_step=steps.append,
        **sampling_arguments(case.settings),
    )
    return {"tokens": out.tokens, "step_logits": torch.cat([s.logits for s in steps], 1)}
