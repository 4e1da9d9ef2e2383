"""Adapters of ELM: they map names and call public classes."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tests.parity.adapters import Answers, adapter
from tests.parity.weights import Case
from varkit.checkpoints import elm as keys
from varkit.checkpoints.files import load_strictly
from varkit.conditioning.label import LabelCondition
from varkit.generators.elm import ELM
from varkit.generators.elm_masked import ELMMasked, mask_count
from varkit.rng import Rng
from varkit.samplers.next_group import NextGroupSampler
from varkit.tokenizers.binary_autoencoder import BinaryAutoencoder


def autoencoder_of(case: Case) -> BinaryAutoencoder:
    arguments = keys.autoencoder_arguments(case.fixture.meta["constructor"], case.settings.get("token_each", 2))
    model = BinaryAutoencoder(**arguments, threshold=case.settings.get("threshold", 0.5))
    load_strictly(model, keys.autoencoder_from_official(case.fixture.state), "fixture")
    return model.eval()


@adapter("elm", "autoencoder", "encode")
def _(case: Case) -> Answers:
    model = autoencoder_of(case)
    hidden = model.features(keys.images_from_official(case.inputs["image"]))
    _, quantized = model(keys.images_from_official(case.inputs["image"]))
    return {
        "hidden": hidden,
        "bit_prob": quantized.residuals[0],
        "bits": quantized.bits,
        "quant": quantized.features,
    }


@adapter("elm", "autoencoder", "bits_to_indices")
def _(case: Case) -> Answers:
    if case.settings["bit_order"] != "msb_first":
        raise ValueError("only the highest bit first")
    return {"indices": autoencoder_of(case).ids(case.inputs["bits"])}


@adapter("elm", "autoencoder", "decode")
def _(case: Case) -> Answers:
    model = autoencoder_of(case)
    latents = model.latents(model.ids(case.inputs["bits"]))
    return {"image": keys.images_to_official(model.decode_features(latents))}


@adapter("elm", "autoencoder", "forward")
def _(case: Case) -> Answers:
    image, quantized = autoencoder_of(case)(keys.images_from_official(case.inputs["image"]))
    return {"image": keys.images_to_official(image), "codebook_loss": quantized.code_loss.reshape(1)}


# ---- transformers ---------------------------------------------------------------------------------------------


def transformer_of(case: Case, kind: type[Any]) -> Any:
    model = kind(**keys.transformer_arguments(case.fixture.meta["constructor"]), latent_dim=32)
    load_strictly(model, case.fixture.state, "fixture")
    return model.eval()


def tokenizer_of(model: Any) -> BinaryAutoencoder:
    """Some tokenizer with the generator's layout, which is all that a sampler reads of it."""
    parts, bits = model.config.sub_codes, model.config.code_bits
    return BinaryAutoencoder(parts * bits, parts, 32, 32, (1,), 1, grid=model.layout.grids[0])


@adapter("elm", "ar", "forward")
def _(case: Case) -> Answers:
    model = transformer_of(case, ELM)
    rows = len(next(iter(case.inputs.values())))
    labels = case.inputs.get("labels", torch.full((rows,), model.num_classes))  # else every label is null
    tokens: Tensor = case.inputs.get("indices", torch.zeros(rows, 1, model.config.sub_codes, dtype=torch.int64))
    inputs = tokenizer_of(model).embed(tokens)
    answers = {"logits": model(inputs, labels).flatten(1, 2)}
    if case.settings["targets"]:
        cond = LabelCondition(model.num_classes).encode(class_labels=labels)
        answers["loss"] = model.training_loss(tokens, inputs, cond, Rng.from_seed(0, rows))["loss"].reshape(1)
    return answers


@adapter("elm", "ar", "generate")
def _(case: Case) -> Answers:
    s, model = case.settings, transformer_of(case, ELM)
    if s["remask"] or s["scale_pow"] != 1:
        raise ValueError("only without remasking, and schedules of power 1")
    condition = LabelCondition(model.num_classes)
    cond = condition.encode(class_labels=case.inputs["labels"])
    output = NextGroupSampler().generate(
        tokenizer_of(model),
        model,
        cond,
        Rng.from_seed(0, len(cond)),
        null=condition.null(cond),
        guidance_scale=s["cfg_scale"],
        guidance_schedule=keys.GUIDANCE[s["cfg_schedule"]],
        temperature=s["temperature"],
        top_k=s["top_k"],
    )
    return {"indices": output.tokens}


@adapter("elm", "mlm", "masked_forward")
def _(case: Case) -> Answers:
    s, model = case.settings, transformer_of(case, ELMMasked)
    if s["mask_id"] != model.mask_id or s["loss_on"] != "masked":
        raise ValueError("only the last id is the mask, and losses are of masked positions")
    tokens, mask, labels = case.inputs["indices"], case.inputs["mask"].bool(), case.inputs["labels"]
    loss = model.masked_loss(tokens, mask, labels, s["label_smoothing"])["loss"].reshape(1)
    return {"logits": model(tokens.masked_fill(mask[..., None], model.mask_id), labels).flatten(1, 2), "loss": loss}


@adapter("elm", "mlm", "mask_counts")
def _(case: Case) -> Answers:
    s = case.settings
    if s["schedule"] != "cos" or s["minimum"] != 1:
        raise ValueError("only the cosine, and at least one")
    return {"count": mask_count(case.inputs["step"], s["num_steps"], s["sequence_length"])}
