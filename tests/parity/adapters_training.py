"""Adapters of training objectives: masks and losses. They join the table of `adapters.py`."""

from __future__ import annotations

import torch

from tests.parity.adapters import Answers, adapter
from tests.parity.weights import Case
from varkit.checkpoints.files import load_strictly
from varkit.training.objectives.variants import arra, meap, tokenunify

# ---- meap -----------------------------------------------------------------------------------------------------


@adapter("meap", "masking", "pretrain")
def _(case: Case) -> Answers:
    s = case.settings
    if s["rng"] != "python random" or not s["shared_over_batch"]:
        raise ValueError("recorded positions are those of Python's random, one set a batch")
    positions = meap.shared_positions(
        s["block_size"],
        s["mask_ratio"],
        s["step"],
        seed_base=s["seed_base"],
        seed_cycle=s["seed_cycle"],
        minimum=s["minimum"],
        keep_last=s["keep_last"],
    )
    inputs, targets = meap.pretraining_pair(case.inputs["tokens"], positions, s["mask_id"])
    return {"input_ids": inputs, "targets": targets, "positions": positions}


@adapter("meap", "masking", "finetune")
def _(case: Case) -> Answers:
    s = case.settings
    names = ("mask_id", "eos_id", "seed", "minimum", "min_target_length", "ignore_index")
    copy = meap.finetuning_copy(
        case.inputs["sequence"], s["source_length"], s["mask_ratio"], **{name: s[name] for name in names}
    )
    if copy is None:
        raise ValueError("the target is too short for a masked copy")
    return dict(zip(("input_ids", "labels", "positions"), copy, strict=True))


# ---- arra -----------------------------------------------------------------------------------------------------


@adapter("arra", "alignment", "loss")
def _(case: Case) -> Answers:
    c = case.fixture.meta["constructor"]
    if c["projector_type"] != "mlp_gelu":
        raise ValueError(f"only the projector mlp_gelu; got {c['projector_type']}")
    projector = arra.Projector(c["input_dim"], c["n_embed"], c["depth"])
    load_strictly(projector, case.fixture.state, "fixture")
    projected = projector(case.inputs["hidden"][:, slice(*case.settings["positions"])])
    return {"projected": projected, "loss": arra.alignment_loss(projected, case.inputs["feature"]).reshape(1)}


@adapter("arra", "objective", "language_losses")
def _(case: Case) -> Answers:
    cross_entropy, z = arra.language_losses(case.inputs["logits"], case.inputs["labels"], **case.settings)
    return {"ce": cross_entropy.reshape(1), "z": z.reshape(1)}


# ---- tokenunify -----------------------------------------------------------------------------------------------


@adapter("tokenunify", "masking", "prefix")
def _(case: Case) -> Answers:
    noise = case.inputs["noise"] if case.settings["fill"] == "noise" else None
    size = tuple(case.settings["patch_size"])
    visible, following = tokenunify.show_prefix(case.inputs["volume"], size, case.settings["keep"], noise)
    return {"visible": visible, "next": following}


@adapter("tokenunify", "masking", "random")
def _(case: Case) -> Answers:
    size = tuple(case.settings["patch_size"])
    return {"visible": tokenunify.hide_patches(case.inputs["volume"], size, case.inputs["patches"])}


@adapter("tokenunify", "objective", "loss")
def _(case: Case) -> Answers:
    s = case.settings
    if (s["activation"], s["distance"]) != ("sigmoid", "mse"):
        raise ValueError(f"only sigmoid and mse; got {s['activation']} and {s['distance']}")
    names = ("volume_logits", "volume", "next_logits", "next")
    losses = tokenunify.regression_losses(*(case.inputs[name] for name in names))
    return {name: torch.as_tensor(value).reshape(1) for name, value in losses.items()}
