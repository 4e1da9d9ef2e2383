"""Official Distilled Decoding files <-> varkit: `VAR-DD/var-d16.pth` ... `LlamaGen-DD/llamagen-L.pt`.

Our students carry the official parameter names. VAR's files hold constant buffers, which are dropped on the way in
(averaged weights may lack them) and written again on the way out; LlamaGen's are taken as they are. A file holds raw
weights and their average; the average is read, as the official commands do.

Source: microsoft/distilled_decoding: VAR/models/dd.py, LlamaGen/autoregressive/models/dd.py (3b95d33).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from varkit.checkpoints import llamagen, var
from varkit.checkpoints.formats import OfficialFormat, Release, StateDict, register_format
from varkit.generators import distilled_llamagen, distilled_var

VAR_KEY, LLAMAGEN_KEY = "layerwise_n_d_embed.0.weight", "final_layer_conti.linear.weight"
_WITHOUT_EFFECT = {"n_d_embed_enable", "layerwise_n_d_embed", "cond_drop_rate"}
"""Arguments of the official class: the first two work only when on, and no label is dropped."""


def student_arguments(official: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments of the official DD_Model -> arguments of `DistilledVAR`, but for the tokenizer's sizes.

    Raises: ValueError where the embeddings of noise and data are off, which the official forward cannot compute.
    """
    if not (official.get("n_d_embed_enable", True) and official.get("layerwise_n_d_embed", True)):
        raise ValueError("a student needs its embeddings of noise and data: n_d_embed_enable and layerwise_n_d_embed")
    return var.var_arguments({k: v for k, v in official.items() if k not in _WITHOUT_EFFECT})


def llamagen_student_arguments(official: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments of the official DDTransformer -> arguments of `DistilledLlamaGen`."""
    unused = ("text_length", "text_dim", "token_dropout", "cond_drop_rate")
    arguments = {k: v for k, v in llamagen.transformer_arguments(official).items() if k not in unused}
    return {**arguments, "latent_dim": official["codebook_dim"]}


def teacher_sampling(official: Mapping[str, Any]) -> dict[str, Any]:
    """Settings of the official combine_sample.py of VAR -> settings of `DistilledSampler`."""
    settings = var.sampling_arguments({**official, "more_smooth": False})
    return {k: v for k, v in settings.items() if k != "more_smooth"}


def _is_var(state: Mapping[str, Tensor]) -> bool:
    return VAR_KEY in state and "pos_1LC" in state


def _is_llamagen(state: Mapping[str, Tensor]) -> bool:
    return LLAMAGEN_KEY in state and "layers.0.attention.wqkv.weight" in state and "n_d_embed.weight" in state


def read_var_arguments(state: Mapping[str, Tensor]) -> dict[str, Any]:
    """`DistilledVAR` arguments from the shapes of an official file: those of the teacher, one position less."""
    return var.read_var_arguments({**state, "pos_1LC": state["pos_1LC"][:, 1:]})


def read_llamagen_arguments(state: Mapping[str, Tensor]) -> dict[str, Any]:
    """`DistilledLlamaGen` arguments from the shapes of an official file; images are taken to be 256 px."""
    arguments = llamagen.read_transformer_arguments({**state, "tok_embeddings.weight": state["output.weight"]})
    return {**arguments, "latent_dim": state["tok_embeddings.weight"].shape[1]}


def var_to_official(state: StateDict, model: Any) -> StateDict:
    """Write the constant buffers again: levels, the mask, and the bias of keys."""
    result = dict(state)
    result["lvl_1L"] = model.levels[None].cpu()
    seen = model.seen.cpu()
    result["attn_bias_for_masking"] = torch.zeros(seen.shape).masked_fill(~seen, -torch.inf)[None, None]
    for key, value in state.items():
        if key.endswith("attn.q_bias"):
            result[key.replace("q_bias", "zero_k_bias")] = torch.zeros_like(value)
    return result


_RELEASE = Release("microsoft/distilled_decoding", "arXiv 2412.17153", "not stated with the files", "other")
register_format(
    OfficialFormat(
        "Distilled Decoding student of VAR",
        VAR_KEY,
        "varkit.generators.distilled_var:DistilledVAR",
        _is_var,
        read_var_arguments,
        _RELEASE,
        from_official=lambda state, model: var.var_from_official(state),
        to_official=var_to_official,
        sampling=lambda model: {
            **distilled_var.SAMPLING.get(model.config.depth, {"times": (0,)}),
            **distilled_var.TEACHER,
        },
    )
)
register_format(
    OfficialFormat(
        "Distilled Decoding student of LlamaGen",
        LLAMAGEN_KEY,
        "varkit.generators.distilled_llamagen:DistilledLlamaGen",
        _is_llamagen,
        read_llamagen_arguments,
        _RELEASE,
        from_official=lambda state, model: llamagen.transformer_from_official(state),
        sampling=lambda model: {
            **distilled_llamagen.SAMPLING.get(model.config.depth, {"times": (0,)}),
            **distilled_llamagen.TEACHER,
        },
    )
)
