"""Adapters of the systems `titok` and `rar`: they map names and call public classes."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from tests.parity.adapters import Answers, adapter
from tests.parity.weights import Case
from varkit.checkpoints import maskgit_vqgan as vqgan_keys
from varkit.checkpoints import rar as rar_keys
from varkit.checkpoints.files import load_strictly
from varkit.conditioning.label import LabelCondition
from varkit.generators.rar import RAR, random_ratio
from varkit.interfaces import Generator
from varkit.rng import Rng
from varkit.samplers.guidance import guidance_schedule
from varkit.samplers.next_group import NextGroupSampler
from varkit.tokenizers.maskgit_vqgan import MaskGitVQGAN


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


def decoder_of(model: Generator) -> MaskGitVQGAN:
    """Some tokenizer with the generator's layout, which is all that a sampler reads of it."""
    layout = model.layout
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
