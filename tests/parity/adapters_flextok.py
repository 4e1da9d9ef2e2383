"""FlexTok: from a recorded call to our public classes."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from tests.parity.adapters import Answers, adapter
from tests.parity.weights import Case
from varkit.checkpoints import flextok as keys
from varkit.checkpoints.files import load_strictly
from varkit.heads.flow import add_noise, flow_loss
from varkit.samplers.ode import ProjectedGuidance, classifier_free, integrate
from varkit.tokenizers.flextok import FSQ, FlexTok, attention_mask
from varkit.tokenizers.kl_vae import flatten, unflatten


def tokenizer_of(case: Case) -> FlexTok:
    constructor = case.fixture.meta["constructor"]
    model = FlexTok(**keys.flextok_arguments(constructor["config"], constructor["vae_base"]))
    load_strictly(model, keys.from_official(case.fixture.state, model), "fixture")
    return model.eval()


@adapter("flextok", "tokenizer", "tokenize")
def _(case: Case) -> Answers:
    model = tokenizer_of(case)
    latents = model.vae.latents(case.inputs["image"])
    ids, values, z = model.encode_latents(latents)
    assert torch.equal(ids, model.encode(case.inputs["image"]))
    return {"vae_latents": latents, "register_latents": z, "quants": values, "tokens": ids}


@adapter("flextok", "fsq", "quantize")
def _(case: Case) -> Answers:
    fsq, z = FSQ(case.settings["levels"]), case.inputs["z"]
    values = fsq(z)
    ids = fsq.ids(values)
    return {"bound": fsq.bound(z), "quants": values, "ids": ids, "embedding": fsq.vectors(ids)}


@adapter("flextok", "decoder", "velocity")
def _(case: Case) -> Answers:
    model, given, settings = tokenizer_of(case), case.inputs, case.settings
    kept = settings["keep_k"] or model.layout.length
    null = None if settings["null_condition"] is None else torch.tensor(settings["null_condition"])
    values, lengths = model.padded(given["quants"], kept)
    registers = model.decoder.condition(values, lengths, null)

    def velocity(x: Tensor, t: Tensor) -> Tensor:
        return model.decoder(x, t, registers)

    data, noise, sigma = given["vae_latents"], given["noise"], given["sigma"]
    return {
        "velocity": velocity(add_noise(data, noise, sigma), sigma),
        "rf_loss": flow_loss(velocity, data, noise, sigma).mean().reshape(1),
    }


@adapter("flextok", "decoder", "time_embedding")
def _(case: Case) -> Answers:
    embedder = tokenizer_of(case).decoder.module_dict["dec_time_embedder"]
    return {"features": embedder.features(case.inputs["t"]), "embedding": embedder(case.inputs["t"])}


@adapter("flextok", "tokenizer", "encode_decode_packed")
def _(case: Case) -> Answers:
    model, answers = tokenizer_of(case), {}
    for i, sigma in enumerate(case.settings["sigma"]):
        latents = case.inputs[f"latent{i}"]
        ids, values, _ = model.encode_latents(latents)
        registers = model.decoder.condition(*model.padded(values))
        answers[f"tokens{i}"] = ids
        answers[f"velocity{i}"] = model.decoder(latents, torch.full((len(latents),), sigma), registers)
    return answers


@adapter("flextok", "attention-mask", "packed")
def _(case: Case) -> Answers:
    s = case.settings
    mask = attention_mask([h * w for h, w in s["patch_grids"]], s["registers"], s["mask_mode"] == "causal_last")
    space = s["crop"] - len(mask)
    return {"mask": F.pad(mask, (0, space, 0, space))}


@adapter("flextok", "tokenizer", "detokenize")
def _(case: Case) -> Answers:
    model, given, s = tokenizer_of(case), case.inputs, case.settings
    grid = (s["latent_size"], s["latent_size"])
    rule = classifier_free
    if s["perform_norm_guidance"]:
        rule = ProjectedGuidance(s["apg_momentum"], s["apg_eta"], s["apg_norm_threshold"])
    flow = model.flow(given["tokens"], given["lengths"], grid).guide(s["guidance_scale"], rule)
    latents = unflatten(integrate(flow.velocity, flatten(given["noise"]), s["timesteps"]), grid)
    return {"latents": latents, "image": model.vae.to_images(latents)}


@adapter("flextok", "guidance", "apg")
def _(case: Case) -> Answers:
    s = case.settings
    rule = ProjectedGuidance(s["momentum"], s["eta"], s["norm_threshold"])
    pairs = zip(case.inputs["cond"], case.inputs["uncond"], strict=True)
    return {"guided": torch.stack([rule(cond, uncond, s["guidance_scale"]) for cond, uncond in pairs])}
