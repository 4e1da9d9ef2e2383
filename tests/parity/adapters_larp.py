"""Adapters of LARP: tokenizer, prior and generator. They join the table of `adapters.py`."""

from __future__ import annotations

import torch
from torch import Tensor

from tests.parity.adapters import Answers, adapter
from tests.parity.adapters_llamagen import scalar
from tests.parity.weights import Case
from varkit.checkpoints import larp as keys
from varkit.checkpoints.files import load_strictly
from varkit.generators.larp import LARP
from varkit.interfaces import Cond
from varkit.rng import Draw, RecordedRng, Rng
from varkit.samplers.next_group import NextGroupSampler
from varkit.samplers.processors import build_processors
from varkit.tokenizers.larp import LARPTokenizer
from varkit.tokenizers.larp_prior import own_token_ratio

# ---- larp-tokenizer -------------------------------------------------------------------------------------------


def tokenizer_of(case: Case) -> LARPTokenizer:
    constructor = case.fixture.meta["constructor"]
    prior = constructor["prior"]
    arguments = keys.tokenizer_arguments(constructor["args"])
    model = LARPTokenizer(
        **arguments,
        prior_size=(prior["n_embd"], prior["n_layer"], prior["n_head"]),
        prior_length=prior["max_seq_len"],
    )
    load_strictly(model, case.fixture.state, "fixture")
    return model.eval()


def clips_of(case: Case) -> Tensor:
    low, high = case.settings["video_range"]
    return case.inputs["video"].sub(low).div(high - low).mul(2).sub(1)


def in_unit_range(clips: Tensor) -> Tensor:
    """As the release gives clips: [-1, 1] -> [0, 1]."""
    return clips.add(1).div(2)


@adapter("larp", "tokenizer", "encode")
def _(case: Case) -> Answers:
    model, clips = tokenizer_of(case), clips_of(case)
    code = model.quantize(model.features(clips), None)
    return {
        "projected_z": model.project(clips),
        "unregularized_z": model.features(clips),
        "regularized_z": code.vectors,
        "encoded": model.bottleneck.out_linear(code.vectors),
        "ids": model.encode(clips),
        "loss_commit": scalar(code.commitment_loss),
        "loss_codebook": scalar(code.codebook_loss),
        "loss_q": scalar(code.loss),
    }


@adapter("larp", "tokenizer", "decode")
def _(case: Case) -> Answers:
    model = tokenizer_of(case)
    return {"video": in_unit_range(model.decode_vectors(model.vectors(case.inputs["ids"])))}


@adapter("larp", "tokenizer", "reconstruct")
def _(case: Case) -> Answers:
    model, clips = tokenizer_of(case), clips_of(case)
    if not case.settings["strict_video_size"]:
        model = model.shortened(clips.shape[2])
    ids = model.encode(clips)
    video = in_unit_range(model.decode_vectors(model.vectors(ids)))
    return {"ids": ids, "mean": video.mean((3, 4)), "std": video.std((3, 4))}


@adapter("larp", "quantizer", "probs")
def _(case: Case) -> Answers:
    model = tokenizer_of(case)
    return {"probs": model.quantize.probs(case.inputs["unregularized_z"]).flatten(0, 1)}


@adapter("larp", "prior", "loss")
def _(case: Case) -> Answers:
    model, s = tokenizer_of(case), case.settings
    assert model.prior_model is not None
    ratio = own_token_ratio(
        s["global_step"], s["max_steps"], most=s["mix_ss_max_ratio"], peak=s["mix_ss_peak_steps_ratio"]
    )
    rounds = model.prior_model.rounds(
        case.inputs["regularized_z"],
        case.inputs["ids"],
        model.codebook,
        case.inputs["u"][..., 0] < ratio,
        lambda logits: logits.argmax(-1),
    )
    return {"logits": rounds.logits, "last_input": rounds.inputs, "loss_latent_ce": scalar(rounds.loss)}


# ---- larp-ar, larp-ar-fp --------------------------------------------------------------------------------------


def transformer_of(case: Case) -> LARP:
    # The fixture's codes have no vectors: a channel stands for them.
    model = LARP(**keys.transformer_arguments(case.fixture.meta["constructor"]["config"]), latent_dim=1)
    load_strictly(model, case.fixture.state, "fixture")
    return model.eval()


def cond_of(model: LARP, case: Case) -> Cond:
    """Labels; or ids of given frames, recorded with the separator behind them, which the model adds itself."""
    given = case.inputs["cond"]
    return Cond(given[:, :-1] if model.condition == "frames" else keys.labels_from_official(given, model.num_classes))


def tokenizer_for(model: LARP) -> LARPTokenizer:
    """Any with the model's layout: only its ids are read."""
    layout = model.layout
    size = (8, 1, 1)
    return LARPTokenizer(
        layout.length, layout.codebook_size, layout.dim, 4, 8, encoder_size=size, decoder_size=size, prior_size=None
    )


@adapter("larp", "transformer", "forward")
def _(case: Case) -> Answers:
    model, tokens = transformer_of(case), case.inputs["tokens"]
    cond, inputs = cond_of(model, case), tokenizer_for(model).embed(tokens)
    losses = model.training_loss(tokens, inputs, cond, Rng.from_seed(0, len(cond)))
    return {"logits": model.teacher_forced(inputs, cond).logits, "loss": scalar(losses["loss"])}


@adapter("larp", "transformer", "generate")
def _(case: Case) -> Answers:
    model = transformer_of(case)
    if case.settings["max_new_tokens"] != model.layout.length or case.settings["sample"] != "argmax":
        raise ValueError("only whole clips, drawn greedily")
    cond = cond_of(model, case)
    settings = {**keys.sampling_arguments(case.settings), "top_k": 1}
    uniform = torch.full((len(cond), model.layout.length), 0.5)  # top_k is 1: any number does
    out = NextGroupSampler().generate(
        tokenizer_for(model),
        model,
        cond,
        RecordedRng(uniform={Draw.TOKEN: uniform}),
        null=None if model.condition == "frames" else model.null(cond),
        **settings,
    )
    return {"ids": out.tokens}


@adapter("larp", "sampler", "filter")
def _(case: Case) -> Answers:
    logits = case.inputs["logits"]
    for processor in build_processors(top_k=case.settings["top_k"], top_p=case.settings["top_p"]):
        logits = processor(logits)
    return {"keep": logits.isfinite()}
