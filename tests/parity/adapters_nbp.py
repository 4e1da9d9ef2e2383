"""NBP: from a recorded call to our public classes."""

from __future__ import annotations

import torch
from torch import Tensor

from tests.parity.adapters import Answers, adapter
from tests.parity.weights import Case
from varkit import NextGroupSampler, Rng
from varkit.checkpoints import nbp as keys
from varkit.checkpoints.files import load_strictly
from varkit.generators.nbp import NBP
from varkit.interfaces import Cond
from varkit.tokenizers.magvit2 import TINY, MagViT2, ReleasedFSQ


def tokenizer_of(case: Case, frames: int) -> MagViT2:
    model = MagViT2(num_frames=frames, **keys.tokenizer_arguments(case.fixture.meta["constructor"]))
    load_strictly(model, keys.tokenizer_from_official(case.fixture.state, model), "fixture")
    return model.eval()


@adapter("nbp", "tokenizer", "encode")
def _(case: Case) -> Answers:
    assert case.settings["video_range"] == [0, 1]
    clips = case.inputs["video"] * 2 - 1
    model = tokenizer_of(case, clips.shape[2])
    latent = model.features(clips)
    quantized = model.quantize(latent)
    ids = model.encode(clips)
    return {"latent": latent, "quantized": quantized.features, "ids": ids.view(len(ids), *model.layout.grids[0])}


@adapter("nbp", "tokenizer", "decode")
def _(case: Case) -> Answers:
    assert not case.settings["clamp"]
    ids: Tensor = case.inputs["ids"]
    model = tokenizer_of(case, 1 + 4 * (ids.shape[1] - 1))
    return {"video": (model.decode_features(model.latents(ids.flatten(1))) + 1) / 2}


@adapter("nbp", "fsq", "quantize")
def _(case: Case) -> Answers:
    fsq, z = ReleasedFSQ(case.settings["levels"]), case.inputs["z"]
    values = fsq(z)
    return {"bound": fsq.bound(z), "quantized": values, "ids": fsq.ids(values)}


# ---- transformer --------------------------------------------------------------------------------------------------


def generator_of(case: Case) -> tuple[NBP, Tensor]:
    """The model, whose classes are the texts of the case's batch, and those classes."""
    assert not case.settings.get("pad_masked")
    texts, grid = case.inputs.get("cond"), case.settings.get("grid", [3, 4, 4])
    arguments = keys.generator_arguments(case.fixture.meta["constructor"], grid)
    model = NBP(**arguments, latent_dim=2, class_texts=None if texts is None else texts.tolist())
    load_strictly(model, keys.generator_from_official(case.fixture.state), "fixture")
    return model.eval(), torch.arange(2) if texts is not None else torch.zeros(2, dtype=torch.int64)


def tokenizer_for(model: NBP) -> MagViT2:
    """One of the same layout."""
    (t, h, w), strides = model.layout.grids[0], TINY["strides"]
    tokenizer = MagViT2(**{**TINY, "num_frames": 2 * t - 1, "image_size": (4 * h, 4 * w), "levels": (8, 5)})
    assert strides == ((1, 2, 2), (2, 2, 2)) and tokenizer.layout == model.layout
    return tokenizer


@adapter("nbp", "transformer", "loss")
def _(case: Case) -> Answers:
    model, labels = generator_of(case)
    tokens = case.inputs["tokens"]
    inputs = tokenizer_for(model).embed(tokens)
    logits, _ = model.joint_logits(inputs, labels)
    loss = model.training_loss(tokens, inputs, Cond(labels), Rng.from_seed(0, 2))["loss"]
    answers = {"logits": logits, "targets": model.joint_ids(tokens)[:, model.skip :], "loss": loss.reshape(1)}
    if case.settings["hybrid"]:
        read = model.read_ids(model.joint_ids(tokens))
        answers["gpt_input"] = torch.cat([model.text_ids(labels), read], 1)
    return answers


@adapter("nbp", "transformer", "attention_mask")
def _(case: Case) -> Answers:
    model, _ = generator_of(case)
    mask = model.mask()
    assert len(mask) == case.settings["seq_len"] and model.prefix_length == case.settings["condition_length"]
    return {"mask": mask.to(torch.uint8)}


@adapter("nbp", "transformer", "generate")
def _(case: Case) -> Answers:
    assert not case.settings["sample_logits"]
    model, labels = generator_of(case)
    return joint_generation(case, model, labels) if case.settings["hybrid"] else frame_prediction(case, model)


def frame_prediction(case: Case, model: NBP) -> Answers:
    given = case.inputs["prefix"]
    tokens = torch.zeros(len(given), model.layout.length, dtype=torch.int64)
    tokens[:, : given.shape[1]] = given
    known = tokens, torch.arange(model.layout.length) < given.shape[1]
    cond, rng, tokenizer = Cond(torch.zeros(len(given), dtype=torch.int64)), Rng.from_seed(0, 2), tokenizer_for(model)
    out = NextGroupSampler(top_k=1).generate(tokenizer, model, cond, rng, known=known)
    assert out.steps == case.settings["steps"]
    return {"tokens": out.tokens[:, given.shape[1] :]}


def joint_generation(case: Case, model: NBP, labels: Tensor) -> Answers:
    """The likeliest of all joint ids, which is read whatever it stands for."""
    ratio, ramp = case.settings["cfg_ratio"], case.settings["scale_cfg"]
    null = Cond(torch.full_like(labels, model.num_classes)) if ratio else None
    state, groups, ids = model.start(Cond(labels), null), model.schedule(), []
    assert len(groups) == case.settings["steps"]
    for step, positions in enumerate(groups):
        predictive = model.predict_joint(state, torch.zeros(2, len(positions), dtype=torch.int64), positions)
        drawn = (
            predictive.guide(1 + ratio * (step if ramp else 1)).logits.argmax(-1)
            if ratio
            else predictive.logits.argmax(-1)
        )
        model.append_joint(state, drawn, positions)
        ids.append(drawn)
    joint = torch.cat(ids, 1)
    return {"joint_ids": joint, "tokens": model.video_ids(joint)}
