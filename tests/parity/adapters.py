"""From a recorded call to our public classes. Adapters map names; they hold no arithmetic.

An adapter is chosen by (system, component, op) alone, reads `constructor` and `settings`, and returns the
answers under their recorded names.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from tests.parity.weights import Case
from varkit.checkpoints import var as keys
from varkit.checkpoints.files import load_strictly
from varkit.conditioning.label import LabelCondition
from varkit.generators.var import VAR
from varkit.heads.categorical import Categorical, weighted_cross_entropy
from varkit.layout import TokenLayout, square_grids
from varkit.pipelines.class_to_image import ClassToImagePipeline
from varkit.pipelines.edit import box_mask, keep_pyramid
from varkit.rng import Draw, RecordedRng, Rng
from varkit.samplers.next_group import NextGroupSampler, StepInfo
from varkit.samplers.processors import build_processors
from varkit.tokenizers.multiscale_vq import MultiScaleQuantizer, MultiScaleVQ, RunningSum
from varkit.training.optim import lr_and_decay

Answers = dict[str, Tensor]
ADAPTERS: dict[tuple[str, str, str], Callable[[Case], Answers]] = {}


def adapter(system: str, component: str, op: str) -> Callable[[Any], Any]:
    def register(function: Callable[[Case], Answers]) -> Callable[[Case], Answers]:
        ADAPTERS[system, component, op] = function
        return function

    return register


def numbered(tensors: dict[str, Tensor], name: str) -> list[Tensor]:
    """`ids0`, `ids1`, ... in order."""
    return [tensors[f"{name}{k}"] for k in range(sum(t.startswith(name) for t in tensors))]


def by_scale(name: str, tensors: list[Tensor], recorded: list[int] | None = None) -> Answers:
    wanted = range(len(tensors)) if recorded is None else recorded
    return {f"{name}{k}": tensors[k] for k in wanted}


# ---- var-vqvae ------------------------------------------------------------------------------------------------


def tokenizer_of(constructor: dict[str, Any], state: dict[str, Tensor]) -> MultiScaleVQ:
    model = MultiScaleVQ(**keys.tokenizer_arguments(constructor))
    load_strictly(model, keys.tokenizer_from_official(state, len(model.grids)), "fixture")
    return model.eval()


def quantizer_of(case: Case) -> MultiScaleQuantizer:
    constructor = case.fixture.meta["constructor"]
    if constructor["cls"] == "VQVAE":
        return tokenizer_of(constructor, case.fixture.state).quantize
    arguments = keys.tokenizer_arguments(constructor)
    scales, size, dim = (arguments.pop(k) for k in ("scales", "codebook_size", "latent_dim"))
    quantizer = MultiScaleQuantizer(size, dim, square_grids(scales), **arguments)
    load_strictly(quantizer, case.fixture.state, "fixture")
    return quantizer.eval()


def grids_of(case: Case) -> Any:
    return square_grids(case.settings["patch_nums"])


@adapter("var-vqvae", "vqvae", "encode")
def _(case: Case) -> Answers:
    return {"f": tokenizer_of(case.fixture.meta["constructor"], case.fixture.state).features(case.inputs["img"])}


@adapter("var-vqvae", "vqvae", "img_to_ids")
def _(case: Case) -> Answers:
    model = tokenizer_of(case.fixture.meta["constructor"], case.fixture.state)
    ids = model.encode(case.inputs["img"], scales=case.settings["patch_nums"])
    return by_scale("ids", TokenLayout(grids_of(case), 1, 1).split(ids))


@adapter("var-vqvae", "vqvae", "fhat_to_img")
def _(case: Case) -> Answers:
    model = tokenizer_of(case.fixture.meta["constructor"], case.fixture.state)
    return {"img": model.decode_features(case.inputs["f_hat"]).clamp(*case.settings["clamp"])}


@adapter("var-vqvae", "vqvae", "ids_to_img")
def _(case: Case) -> Answers:
    if not (case.settings["same_shape"] and case.settings["last_one"]):
        raise ValueError("only same_shape=True, last_one=True: the other is experimental in the reference")
    model = tokenizer_of(case.fixture.meta["constructor"], case.fixture.state)
    ids = torch.cat(numbered(case.inputs, "ids"), 1)
    return {"img": model.decode(ids, scales=case.settings["patch_nums"])}


@adapter("var-vqvae", "quantizer", "f_to_ids")
def _(case: Case) -> Answers:
    ids = quantizer_of(case).encode(case.inputs["f"], grids_of(case))
    return by_scale("ids", TokenLayout(grids_of(case), 1, 1).split(ids))


@adapter("var-vqvae", "quantizer", "f_to_fhat")
def _(case: Case) -> Answers:
    steps = quantizer_of(case).walk(case.inputs["f"], grids_of(case))
    return by_scale("fhat", [f_hat for _, _, f_hat in steps], case.settings["recorded_scales"])


@adapter("var-vqvae", "quantizer", "ids_to_var_input")
def _(case: Case) -> Answers:
    ids = numbered(case.inputs, "ids")
    inputs = quantizer_of(case).embed(torch.cat(ids, 1), grids_of(case))
    return {"x": keys.inputs_to_official(inputs, ids[0].shape[1])}


@adapter("var-vqvae", "quantizer", "next_input")
def _(case: Case) -> Answers:
    running = RunningSum(quantizer_of(case), 1, grids_of(case))
    layout = TokenLayout(grids_of(case), 1, 1)
    maps = []
    for k, ids in enumerate(numbered(case.inputs, "ids")):
        running.record(ids, torch.arange(ids.shape[1]))
        if k + 1 < len(layout.grids):
            maps.append(MultiScaleQuantizer.maps(running.inputs(torch.arange(0)), layout.grids[k + 1]))
        else:
            maps.append(running.f_hat)
    return {"f_hat": running.f_hat, **by_scale("next", maps, case.settings["recorded_scales"])}


@adapter("var-vqvae", "quantizer", "train_forward")
def _(case: Case) -> Answers:
    quantizer = quantizer_of(case)
    features = case.inputs["f"].requires_grad_()
    out = quantizer(features)
    weights = case.settings["objective"]
    projection = (out.features * case.inputs["w"]).mean()  # the scalar that the fixture defines
    (weights["vq_loss"] * out.loss + weights["mean_f_hat_w"] * projection).backward()
    answers = {"f_hat": out.features, "vq_loss": out.loss.reshape(1), "grad_f": features.grad}
    parameters = dict(quantizer.named_parameters(prefix="quantize"))
    return answers | {f"grad_{k}": parameters[k].grad for k in case.settings["grad_parameters"]}


# ---- var ------------------------------------------------------------------------------------------------------


def parts_of(case: Case) -> tuple[MultiScaleVQ, VAR]:
    constructor = case.fixture.meta["constructor"]
    tokenizer = tokenizer_of(constructor["vae"], case.fixture.part("vae."))
    arguments = keys.var_arguments({**constructor["var"], "cond_drop_rate": case.settings.get("cond_drop_rate", 0.0)})
    model = VAR(**arguments, codebook_size=tokenizer.layout.codebook_size, latent_dim=tokenizer.layout.dim)
    load_strictly(model, keys.var_from_official(case.fixture.part("var.")), "fixture")
    return tokenizer, model.eval()


@adapter("var", "transformer", "forward")
def _(case: Case) -> Answers:
    _, model = parts_of(case)
    inputs = keys.inputs_from_official(case.inputs["x"], model.layout.sizes[0])
    last = case.settings["prog_si"]  # -1: all scales
    return {"logits": model(inputs[:, : model.layout.slices[last].stop], case.inputs["label"])}


@adapter("var", "transformer", "loss_grads")
def _(case: Case) -> Answers:
    _, model = parts_of(case)
    inputs = keys.inputs_from_official(case.inputs["x"], model.layout.sizes[0])
    cond = LabelCondition(model.num_classes).encode(class_labels=case.inputs["label"])
    losses = model.training_loss(
        case.inputs["target"],
        inputs,
        cond,
        Rng.from_seed(0, len(cond)),
        num_scales=len(model.layout.grids) if case.settings["prog_si"] < 0 else case.settings["prog_si"] + 1,
        label_smoothing=case.settings["label_smoothing"],
    )
    losses["loss"].backward()
    parameters = dict(model.named_parameters(prefix="var"))
    return {f"grad_{k}": parameters[k].grad for k in case.settings["grad_parameters"]}


@adapter("var", "loss", "cross_entropy")
def _(case: Case) -> Answers:
    loss = weighted_cross_entropy(
        case.inputs["logits"],
        case.inputs["target"],
        case.settings["position_weight"],
        case.settings["label_smoothing"],
    )
    return {"loss": loss.reshape(1)}


@adapter("var", "sampler", "filter")
def _(case: Case) -> Answers:
    settings = keys.sampling_arguments({"cfg": 0, "more_smooth": False, **case.settings})
    processors = build_processors(top_k=settings["top_k"], top_p=settings["top_p"])
    return {"probs": Categorical(case.inputs["logits"]).probs(processors)}


def sample(case: Case, **more: Any) -> tuple[list[StepInfo], Tensor]:
    tokenizer, model = parts_of(case)
    pipeline = ClassToImagePipeline(model, tokenizer, NextGroupSampler())
    condition = LabelCondition(model.num_classes)
    cond = condition.encode(class_labels=case.inputs["label"])
    noise = numbered(case.inputs, "gumbel")
    table = {Draw.GUMBEL: torch.cat(noise, 1)} if noise else {}
    ids = torch.full((len(cond), model.layout.length), 0.5)  # where ids are drawn, top_k is 1: any uniform does
    steps: list[StepInfo] = []
    out = pipeline.sampler.generate(
        tokenizer,
        model,
        cond,
        RecordedRng(uniform={Draw.TOKEN: ids}, gumbel=table),
        null=condition.null(cond),
        on_step=steps.append,
        **keys.sampling_arguments(case.settings),
        **more,
    )
    return steps, pipeline.to_images(out.tokens, "pt")


@adapter("var", "sampler", "generate")
def _(case: Case) -> Answers:
    steps, images = sample(case)
    logits = by_scale("logits", [s.logits for s in steps], case.settings["recorded_logits"])
    return {**by_scale("ids", [s.predicted for s in steps]), **logits, "img": images}


@adapter("var", "sampler", "edit")
def _(case: Case) -> Answers:
    _, model = parts_of(case)
    known = (torch.cat(numbered(case.inputs, "given"), 1), keep_pyramid(model.layout, case.inputs["keep"]))
    steps, images = sample(case, known=known)
    return {**by_scale("ids", [s.predicted for s in steps]), "img": images}


@adapter("var", "sampler", "edit_mask")
def _(case: Case) -> Answers:
    box = tuple(case.settings["box"][k] for k in ("y0", "x0", "y1", "x1"))
    keep = "outside" if case.settings["inpainting"] else "inside"
    return {"keep": box_mask(grids_of(case)[-1], box, keep)}


@adapter("var", "schedule", "lr_wd")
def _(case: Case) -> Answers:
    s = case.settings
    pairs = [
        lr_and_decay(
            s["sche_type"],
            step,
            peak_lr=s["peak_lr"],
            weight_decay=s["wd"],
            weight_decay_end=s["wd_end"],
            warmup_steps=s["wp_it"],
            max_steps=s["max_it"],
            warmup_from=s["wp0"],
            final=s["wpe"],
            lr_scale=s["lr_sc"],
            decay_scale=s["wd_sc"],
        )
        for step in case.inputs["iteration"].tolist()
    ]
    lr, decay = zip(*pairs, strict=True)
    return {"lr": torch.tensor(lr, dtype=torch.float64), "wd": torch.tensor(decay, dtype=torch.float64)}
