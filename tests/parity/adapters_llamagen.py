"""Adapters of LlamaGen: tokenizer, losses, transformer, captions and crops. They join the table of `adapters.py`."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from tests.parity.adapters import Answers, adapter
from tests.parity.weights import Case
from varkit.checkpoints import llamagen as keys
from varkit.checkpoints.files import load_strictly
from varkit.conditioning.captions import clean_caption
from varkit.conditioning.text import left_padded
from varkit.data.crops import center_crop, random_crop, ten_crop
from varkit.generators.llamagen import LlamaGen
from varkit.heads.categorical import Categorical
from varkit.interfaces import Cond
from varkit.layers.llama import Rotary
from varkit.metrics.lpips import LPIPS
from varkit.rng import Draw, RecordedRng
from varkit.samplers.next_group import NextGroupSampler, StepInfo
from varkit.samplers.processors import build_processors
from varkit.tokenizers.vqgan import VQGAN
from varkit.training.losses import (
    PatchDiscriminator,
    StyleDiscriminator,
    discriminator_loss,
    from_step,
    generator_loss,
    tokenizer_loss,
)


def scalar(value: Tensor) -> Tensor:
    return value.reshape(1)


# ---- llamagen-vq: tokenizer -----------------------------------------------------------------------------------


def tokenizer_of(case: Case) -> VQGAN:
    constructor = case.fixture.meta["constructor"]
    if constructor["norm_type"] != "group":
        raise ValueError(f"only group normalisation; got {constructor['norm_type']}")
    model = VQGAN(**keys.tokenizer_arguments(constructor))
    load_strictly(model, keys.tokenizer_from_official(case.fixture.state, model.layout.codebook_size), "fixture")
    return model.train(case.settings["mode"] == "train")


def grid_of(features: Tensor) -> tuple[int, int]:
    return features.shape[2], features.shape[3]


@adapter("llamagen-vq", "tokenizer", "encode")
def _(case: Case) -> Answers:
    model = tokenizer_of(case)
    features = model.features(case.inputs["image"])
    ids = model.encode(case.inputs["image"], grid=grid_of(features))
    return {
        "pre_quant": features,
        "quant": model.latents(ids, grid_of(features)),
        "indices": ids.flatten(),
    }


@adapter("llamagen-vq", "tokenizer", "decode")
def _(case: Case) -> Answers:
    return {"image": tokenizer_of(case).decode_features(case.inputs["quant"])}


@adapter("llamagen-vq", "tokenizer", "decode_code")
def _(case: Case) -> Answers:
    if not case.settings["channels_first"]:
        raise ValueError("only channels first")
    model, (batch, _, *grid) = tokenizer_of(case), case.settings["shape"]
    entry = model.latents(case.inputs["indices"].view(batch, -1), grid)
    return {"entry": entry, "image": model.decode_features(entry)}


@adapter("llamagen-vq", "tokenizer", "loss")
def _(case: Case) -> Answers:
    model = tokenizer_of(case)
    if model.config.track_usage:
        model.quantize.codebook_used.fill_(case.settings["codebook_used_initial"])
    images = case.inputs["image"]
    reconstruction, quantized = model(images)
    losses = tokenizer_loss(images, reconstruction, quantized.loss, model.decoder.conv_out.weight)
    losses["loss"].backward()
    gradients = keys.tokenizer_to_official({k: p.grad for k, p in model.named_parameters() if p.grad is not None})
    answers = {
        "recon": reconstruction,
        "vq_loss": scalar(quantized.codebook_loss),
        "commit_loss": scalar(quantized.commitment_loss),
        "entropy_loss": scalar(quantized.entropy_loss),
        "codebook_usage": scalar(quantized.usage),
        "mse": scalar(losses["l2"]),
        "total": scalar(losses["loss"]),
        **{f"grad/{name}": gradients[name] for name in case.settings["gradients"]},
    }
    if model.config.track_usage:
        answers["codebook_used_tail"] = model.quantize.codebook_used[-case.settings["codebook_used_tail"] :]
    return answers


# ---- llamagen-vq: losses --------------------------------------------------------------------------------------


@adapter("llamagen-vq", "adversarial-loss", "discriminator_loss")
def _(case: Case) -> Answers:
    real, fake = (case.inputs[f"logits_{which}"].requires_grad_() for which in ("real", "fake"))
    loss = discriminator_loss(case.settings["kind"], real, fake, official_quirks=case.meta.get("quirk", False))
    loss.backward()
    gradients = {"grad_real": real.grad, "grad_fake": torch.zeros_like(fake) if fake.grad is None else fake.grad}
    return {"loss": scalar(loss), **gradients}


@adapter("llamagen-vq", "adversarial-loss", "generator_loss")
def _(case: Case) -> Answers:
    fake = case.inputs["logits_fake"].requires_grad_()
    loss = generator_loss(fake, case.settings["kind"], official_quirks=case.meta.get("quirk", False))
    loss.backward()
    return {"loss": scalar(loss), "grad_fake": fake.grad}


def judged(case: Case, model: Any) -> Answers:
    load_strictly(model, {k: v.clone() for k, v in case.fixture.state.items()}, "fixture")
    model.train(case.settings["mode"] == "train")
    image = case.inputs["image"].requires_grad_()
    logits = model(image)
    answers = {"logits": logits}
    if case.settings["gradient_of"] == "mean(logits)":
        logits.mean().backward()
        answers["grad_image"] = image.grad
    state = model.state_dict()
    return answers | {f"buffer/{name}": state[name] for name in case.settings["buffers"]}


@adapter("llamagen-vq", "patchgan-discriminator", "forward")
def _(case: Case) -> Answers:
    c = case.fixture.meta["constructor"]
    return judged(case, PatchDiscriminator(c["input_nc"], c["ndf"], c["n_layers"]))


@adapter("llamagen-vq", "stylegan-discriminator", "forward")
def _(case: Case) -> Answers:
    c = case.fixture.meta["constructor"]
    if c["channel_multiplier"] != 1:
        raise ValueError("only a channel multiplier of 1")
    return judged(case, StyleDiscriminator(c["input_nc"], c["image_size"]))


def lpips_of(case: Case) -> LPIPS:
    model = LPIPS("vgg")
    model.load_official(case.fixture.part("perceptual_loss."))
    return model.eval()


@adapter("llamagen-vq", "perceptual-loss", "distance")
def _(case: Case) -> Answers:
    return {"lpips": lpips_of(case)(case.inputs["image"], case.inputs["reconstruction"]).view(-1, 1, 1, 1)}


@adapter("llamagen-vq", "vq-loss", "loss")
def _(case: Case) -> Answers:
    c, s = case.fixture.meta["constructor"], case.settings
    if c["disc_type"] != "patchgan" or s["mode"] != "eval":
        raise ValueError("only the patch discriminator, in eval mode")
    discriminator = PatchDiscriminator(c["disc_in_channels"], c["disc_dim"], c["disc_num_layers"])
    load_strictly(discriminator, case.fixture.part("discriminator."), "fixture")
    discriminator.eval()
    images, last_layer = case.inputs["image"], case.inputs["last_layer"].requires_grad_()
    reconstruction = F.conv2d(case.inputs["hidden"], last_layer, padding=s["last_layer_padding"])
    quantizer = sum(s[f"codebook_{name}_loss"] for name in ("vq", "commit", "entropy"))
    kind = c["reconstruction_loss"]
    weight = from_step(c["disc_weight"], s["global_step"], c["disc_start"])
    losses = tokenizer_loss(
        images,
        reconstruction,
        torch.tensor(quantizer),
        last_layer,
        **{"l1_weight": 0.0, "l2_weight": 0.0, f"{kind}_weight": c["reconstruction_weight"]},
        perceptual=lpips_of(case),
        perceptual_weight=c["perceptual_weight"],
        discriminator=discriminator,
        adversarial_weight=weight,
        adversarial_loss=c["gen_adv_loss"],
        adaptive=c["disc_adaptive_weight"],
    )
    losses["loss"].backward()
    own = discriminator_loss(c["disc_loss"], discriminator(images), discriminator(reconstruction.detach()))
    return {
        "generator_loss": scalar(losses["loss"]),
        "rec_loss": scalar(losses[kind]),
        "perceptual_loss": scalar(losses["lpips"]),
        "generator_adv_loss": scalar(losses["adversarial"]),
        "adaptive_weight": scalar(losses["adaptive_weight"]),
        "grad_last_layer": last_layer.grad,
        "discriminator_loss": scalar(weight * own),  # the weight is the recorded step's
    }


# ---- llamagen: transformer ------------------------------------------------------------------------------------


def transformer_of(case: Case) -> LlamaGen:
    model = LlamaGen(**keys.transformer_arguments(case.fixture.meta["constructor"]))
    load_strictly(model, keys.transformer_from_official(case.fixture.state), "fixture")
    return model.train(case.settings.get("mode") == "train")


def cond_of(case: Case) -> Cond:
    if "labels" in case.inputs:
        return Cond(case.inputs["labels"])
    caption = case.inputs["caption"]
    mask = case.inputs.get("mask", torch.ones(caption.shape[:2]))
    return Cond(sequence=caption, mask=mask.bool())


def tokenizer_for(model: LlamaGen) -> VQGAN:
    """Any with the model's layout: only its ids are read."""
    layout = model.layout
    sizes = {"base_channels": 32, "channel_multipliers": (1,), "num_res_blocks": 1, "z_channels": 8}
    return VQGAN(layout.codebook_size, layout.dim, grid=layout.grids[0], **sizes)  # type: ignore[arg-type]


@adapter("llamagen", "rope", "apply")
def _(case: Case) -> Answers:
    s = case.settings
    rotary = Rotary((s["grid_size"], s["grid_size"]), s["head_dim"], s["base"], s["cls_token_num"])
    return {"table": rotary.table, "rotated": rotary(case.inputs["x"])}


@adapter("llamagen", "transformer", "loss")
def _(case: Case) -> Answers:
    model, cond, tokens = transformer_of(case), cond_of(case), case.inputs["tokens"]
    rng = RecordedRng(uniform={Draw.COND_DROP: case.inputs["drop_draw"][:, None]})
    inputs = tokenizer_for(model).embed(tokens)
    losses = model.training_loss(tokens, inputs, cond, rng, valid=case.inputs.get("valid"))
    losses["loss"].backward()
    parameters = dict(model.named_parameters())
    return {
        "logits": model.teacher_forced(inputs, model.drop_condition(cond, rng)).logits,
        "loss": scalar(losses["loss"]),
        **{f"grad/{name}": parameters[name].grad for name in case.settings["gradients"]},
    }


@adapter("llamagen", "transformer", "forward")
def _(case: Case) -> Answers:
    model = transformer_of(case)
    return {"logits": model.teacher_forced(tokenizer_for(model).embed(case.inputs["tokens"]), cond_of(case)).logits}


@adapter("llamagen", "transformer", "embed_label")
def _(case: Case) -> Answers:
    model = transformer_of(case)
    return {"embedding": model.prefix(model.replace_by_null(cond_of(case), case.inputs["drop"].bool()))}


@adapter("llamagen", "transformer", "generate")
def _(case: Case) -> Answers:
    model, cond = transformer_of(case), cond_of(case)
    if case.settings["max_new_tokens"] != model.layout.length or case.settings["sample_logits"]:
        raise ValueError("only whole images, drawn greedily")
    steps: list[StepInfo] = []
    uniform = torch.full((len(cond), model.layout.length), 0.5)  # top_k is 1: any number does
    out = NextGroupSampler().generate(
        tokenizer_for(model),
        model,
        cond,
        RecordedRng(uniform={Draw.TOKEN: uniform}),
        null=model.null(cond),
        on_step=steps.append,
        **keys.sampling_arguments(case.settings),
    )
    return {"tokens": out.tokens, "step_logits": torch.cat([s.logits for s in steps], 1)}


@adapter("llamagen", "sampler", "probs")
def _(case: Case) -> Answers:
    settings = keys.sampling_arguments({"cfg_scale": 1.0, **case.settings, "sample_logits": True})
    processors = build_processors(**{name: settings[name] for name in ("temperature", "top_k", "top_p")})
    probs = Categorical(case.inputs["logits"][:, case.settings["position"]]).probs(processors)
    return {"probs": probs, "argmax": probs.argmax(-1, keepdim=True)}


# ---- llamagen: captions and crops -----------------------------------------------------------------------------


@adapter("llamagen", "caption", "left_pad")
def _(case: Case) -> Answers:
    if case.settings["padding_value"] != 0:
        raise ValueError("padding is zero")
    cond = left_padded(case.inputs["raw_embedding"], case.inputs["raw_mask"])
    caption, mask = cond.text
    return {"caption": caption, "mask": mask}


@adapter("llamagen", "caption", "clean")
def _(case: Case) -> dict[str, list[str]]:
    return {"texts": [clean_caption(text, passes=case.settings["passes"]) for text in case.settings["texts"]]}


def image_of(case: Case) -> Image.Image:
    return Image.fromarray(case.inputs["image"].numpy())


def array_of(image: Image.Image) -> Tensor:
    from varkit.data.transforms import to_pixels

    return to_pixels(image).permute(1, 2, 0)


@adapter("llamagen", "crops", "center_crop")
def _(case: Case) -> Answers:
    return {"image": array_of(center_crop(image_of(case), case.settings["image_size"]))}


@adapter("llamagen", "crops", "ten_crop")
def _(case: Case) -> Answers:
    s = case.settings
    crops = ten_crop(image_of(case), s["image_size"], s["crop_range"])
    return {"images": torch.stack([array_of(crop) for crop in crops])}


@adapter("llamagen", "crops", "random_crop")
def _(case: Case) -> Answers:
    drawn = {name: int(case.inputs[name]) for name in ("short_side", "crop_y", "crop_x")}
    return {"image": array_of(random_crop(image_of(case), case.settings["image_size"], **drawn))}
