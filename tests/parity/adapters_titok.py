"""Adapters of the systems `titok` and `rar`: they map names and call public classes."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from tests.parity.adapters import Answers, adapter
from tests.parity.weights import Case
from varkit.checkpoints import maskgit as maskgit_keys
from varkit.checkpoints import maskgit_vqgan as vqgan_keys
from varkit.checkpoints import rar as rar_keys
from varkit.checkpoints import titok as titok_keys
from varkit.checkpoints.files import load_strictly
from varkit.conditioning.label import LabelCondition
from varkit.generators.maskgit import MaskGIT, masked_cross_entropy
from varkit.generators.rar import RAR, random_ratio
from varkit.interfaces import Generator
from varkit.rng import Rng
from varkit.samplers.guidance import guidance_schedule
from varkit.samplers.masked import MaskedSampler
from varkit.samplers.next_group import NextGroupSampler
from varkit.tokenizers.maskgit_vqgan import MaskGitVQGAN
from varkit.tokenizers.titok import Quantized, TiTok
from varkit.training.losses import discriminator_loss, lecam_loss, proxy_code_loss


def vqgan_of(case: Case) -> MaskGitVQGAN:
    model = MaskGitVQGAN(**vqgan_keys.vqgan_arguments(case.fixture.meta["constructor"]))
    load_strictly(model, case.fixture.state, "fixture")
    return model.eval()


@adapter("titok", "vqgan", "encode")
def _(case: Case) -> Answers:
    model = vqgan_of(case)
    images = vqgan_keys.images_from_official(case.inputs["image"])
    return {"hidden": model.features(images), "ids": model.encode(images)}


@adapter("titok", "vqgan", "decode")
def _(case: Case) -> Answers:
    model = vqgan_of(case)
    return {"image": vqgan_keys.images_to_official(model.decode_features(model.maps(case.inputs["ids"])))}


def decoder_of(model: Generator) -> MaskGitVQGAN | TiTok:
    """Some tokenizer with the generator's layout, which is all that a sampler reads of it."""
    layout = model.layout
    if len(layout.grids[0]) == 1:
        return TiTok(
            layout.length, layout.codebook_size, layout.dim, 16, 16, encoder_size=(8, 1, 1), decoder_size=(8, 1, 1)
        )
    return MaskGitVQGAN(layout.codebook_size, layout.dim, 32, (1,), 1, grid=layout.grids[0])


# ---- rar ------------------------------------------------------------------------------------------------------


def rar_of(case: Case) -> RAR:
    sizes = case.fixture.meta["constructor"]["model"]
    arguments = rar_keys.rar_arguments(sizes["generator"], sizes["vq_model"]["codebook_size"])
    model = RAR(**arguments, latent_dim=1)
    load_strictly(model, case.fixture.state, "fixture")
    return model.eval()


@adapter("rar", "generator", "forward")
def _(case: Case) -> Answers:
    model = rar_of(case)
    ids, orders = case.inputs["ids"], case.inputs.get("orders", model.raster.expand(len(case.inputs["ids"]), -1))
    labels = rar_keys.labels_from_official(case.inputs["condition"], model.layout.codebook_size)
    logits, _ = model.sequence_logits(ids.gather(1, orders), labels, orders)
    cond = LabelCondition(model.num_classes).encode(class_labels=labels)
    losses = model.training_loss(ids, F.pad(ids[:, :-1], (1, 0)), cond, Rng.from_seed(0, len(ids)), orders=orders)
    answers = {"logits": logits, "labels": ids.gather(1, orders)}
    return answers | {name: losses[name].reshape(1) for name in ("loss", "accuracy")}


def greedy(case: Case, model: Generator, sampler: Any, settings: dict[str, Any]) -> Tensor:
    condition = LabelCondition(model.num_classes)
    cond = condition.encode(class_labels=case.inputs["class"])
    rng, null = Rng.from_seed(0, len(cond)), condition.null(cond)
    return sampler.generate(decoder_of(model), model, cond, rng, null=null, **settings).tokens


@adapter("rar", "generator", "generate")
def _(case: Case) -> Answers:
    settings = rar_keys.sampling_arguments(case.settings)
    order = case.settings["order"]
    return {"ids": greedy(case, rar_of(case), NextGroupSampler(), {**settings, "order": order, "top_k": 1})}


@adapter("rar", "schedule", "guidance")
def _(case: Case) -> Answers:
    s = case.settings
    settings = rar_keys.sampling_arguments({**s, "randomize_temperature": 1.0})
    schedule = guidance_schedule(settings["guidance_schedule"], settings["guidance_power"])
    steps = range(s["start"], s["start"] + s["steps"])
    return {"cfg": torch.tensor([schedule(settings["guidance_scale"], step, s["steps"] - 1) for step in steps])}


@adapter("rar", "schedule", "random_ratio")
def _(case: Case) -> Answers:
    start, end = case.settings["randomness_anneal_start"], case.settings["randomness_anneal_end"]
    return {"ratio": torch.tensor([random_ratio(step, start, end) for step in case.inputs["step"].tolist()])}


# ---- titok: tokenizers ----------------------------------------------------------------------------------------


def titok_of(case: Case) -> TiTok:
    model = TiTok(**titok_keys.titok_arguments(case.fixture.meta["constructor"]))
    load_strictly(model, case.fixture.state, "fixture")
    return model.eval()


def losses_of(code: Quantized) -> Answers:
    return {
        "quantizer_loss": code.loss.reshape(1),
        "commitment_loss": code.commitment_loss.reshape(1),
        "codebook_loss": code.codebook_loss.reshape(1),
        "indices": titok_keys.tokens_to_official(code.ids),
    }


@adapter("titok", "encoder", "forward")
def _(case: Case) -> Answers:
    features = titok_of(case).features(vqgan_keys.images_from_official(case.inputs["image"]))
    return {"z": titok_keys.tokens_to_official(features)}


@adapter("titok", "tokenizer", "encode")
def _(case: Case) -> Answers:
    images = vqgan_keys.images_from_official(case.inputs["image"])
    frozen = case.fixture.meta["constructor"]["model"]["vq_model"]["finetune_decoder"]
    model = titok_of(case)
    vectors, code = model.code(images, frozen=frozen)
    assert torch.equal(model.encode(images), code.ids)
    return {"z_quantized": titok_keys.tokens_to_official(vectors), **losses_of(code)}


@adapter("titok", "quantizer", "loss")
def _(case: Case) -> Answers:
    return losses_of(titok_of(case).quantize(titok_keys.vectors_from_official(case.inputs["z"])))


@adapter("titok", "tokenizer", "encode_posterior")
def _(case: Case) -> Answers:
    posterior = titok_of(case).posterior(vqgan_keys.images_from_official(case.inputs["image"]))
    latent = posterior.sample(titok_keys.vectors_from_official(case.inputs["eps"]))
    named = {"mean": posterior.mean, "logvar": posterior.logvar, "latent": latent}
    return {**{k: titok_keys.tokens_to_official(v) for k, v in named.items()}, "kl": posterior.kl()}


@adapter("titok", "tokenizer", "decode")
def _(case: Case) -> Answers:
    model = titok_of(case)
    given = case.inputs["ids"] if case.settings["input"] == "tokens" else case.inputs["latent"]
    z = model.latents(given if given.dim() == 2 else titok_keys.vectors_from_official(given))
    answers = {"image": vqgan_keys.images_to_official(model.decode_latents(z))}
    if model.config.legacy:
        logits = model.proxy_logits(z)
        answers |= {"proxy_argmax": logits.argmax(1), "proxy_logits_mean": logits.mean((2, 3))}
    return answers


@adapter("titok", "tokenizer", "reconstruct")
def _(case: Case) -> Answers:
    model = titok_of(case)
    ids = model.encode(vqgan_keys.images_from_official(case.inputs["image"]))
    images = vqgan_keys.images_to_official(model.decode_latents(model.latents(ids)))
    unbiased = case.settings["std_unbiased"]
    return {"mean": images.mean((2, 3)), "std": images.std((2, 3), unbiased=unbiased)}


@adapter("titok", "ta-decoder", "forward")
def _(case: Case) -> Answers:
    model = TiTok(**titok_keys.titok_arguments(case.fixture.meta["constructor"], text_aware=True)).eval()
    load_strictly(model.decoder, case.fixture.state, "fixture")
    return {"image": vqgan_keys.images_to_official(model.decode_latents(case.inputs["z"], case.inputs["text"]))}


# ---- titok: generators and losses -----------------------------------------------------------------------------


def maskgit_of(case: Case) -> MaskGIT:
    sizes = case.fixture.meta["constructor"]["model"]
    arguments = maskgit_keys.maskgit_arguments(sizes["generator"], sizes["vq_model"]["codebook_size"])
    model = MaskGIT(**arguments, latent_dim=1)
    state = case.fixture.state
    load_strictly(model, maskgit_keys.vit_from_official(state) if model.config.backbone == "vit" else state, "fixture")
    return model.eval()


@adapter("titok", "generator", "forward")
def _(case: Case) -> Answers:
    model = maskgit_of(case)
    assert case.settings["mask_token_id"] == model.mask_id
    condition = LabelCondition(model.num_classes)
    cond = condition.encode(class_labels=case.inputs["class"])
    cond = condition.null(cond) if case.settings["cond_drop_prob"] == 1 else cond
    return {"logits": model(case.inputs["ids"], cond.labels)}


@adapter("titok", "generator", "generate")
def _(case: Case) -> Answers:
    settings = maskgit_keys.sampling_arguments(case.settings)
    return {"ids": greedy(case, maskgit_of(case), MaskedSampler(), settings)}


@adapter("titok", "loss", "mlm")
def _(case: Case) -> Answers:
    s, given = case.settings, case.inputs
    smoothing, unmasked = s["label_smoothing"], s["loss_weight_unmasked_token"]
    loss, right = masked_cross_entropy(given["logits"], given["targets"], given["mask"], smoothing, unmasked)
    return {"loss": loss.reshape(1), "correct_tokens": right.reshape(1)}


@adapter("titok", "loss", "stage1")
def _(case: Case) -> Answers:
    quantizer, weight = torch.tensor(case.settings["quantizer_loss"]), case.settings["quantizer_weight"]
    return {"loss": proxy_code_loss(case.inputs["logits"], case.inputs["codes"], quantizer, weight).reshape(1)}


@adapter("titok", "loss", "hinge_discriminator")
def _(case: Case) -> Answers:
    return {"loss": discriminator_loss("hinge", case.inputs["real"], case.inputs["fake"]).reshape(1)}


@adapter("titok", "loss", "lecam")
def _(case: Case) -> Answers:
    averages = (torch.tensor(case.settings["ema_real_mean"]), torch.tensor(case.settings["ema_fake_mean"]))
    return {"loss": lecam_loss(case.inputs["real"], case.inputs["fake"], *averages).reshape(1)}
