"""Official ControlAR files <-> varkit: `canny_MR.safetensors`, `hed.safetensors`, ..., and LlamaGen-B.pt, -L.pt.

They are LlamaGen's, with a control encoder under the names of transformers before version 5, which are mapped here
whatever version is installed. What is never read is named in `UNREAD`; it is written back as the official constructor
makes it, since the block size is checked there.

Source: hustvl/ControlAR: autoregressive/models/gpt_t2i.py, gpt.py, dinov2_adapter.py, vit_adapter.py (87e32e9).
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from varkit.checkpoints import llamagen
from varkit.checkpoints.formats import OfficialFormat, Release, StateDict, register_format
from varkit.conditioning.control import ENCODERS
from varkit.generators.controlar import CONTROL_SAMPLING

SIGN = "adapter_mlp.fc1.weight"
ENCODER = "adapter.model."
OURS = "controller."
LARGE = 48
"""Side of the grid of the models of any size."""

UNREAD = (
    "condition_embeddings.weight",
    "condition_mlp.uncond_embedding",
    "condition_norm.weight",
    "adapter.model.embeddings.mask_token",
    "adapter.model.pooler.dense.weight",
    "adapter.model.pooler.dense.bias",
)
"""Keys of official files that no computation reads: dropout makes features zero, and both encoders are used whole."""

_EMBEDDINGS = {
    "embeddings.cls_token": "cls_token",
    "embeddings.position_embeddings": "pos_embed",
    "embeddings.patch_embeddings.projection.weight": "patch_embed.proj.weight",
    "embeddings.patch_embeddings.projection.bias": "patch_embed.proj.bias",
    "layernorm.weight": "norm.weight",
    "layernorm.bias": "norm.bias",
}
_DINOV2 = {
    "norm1": "norm1",
    "norm2": "norm2",
    "attention.output.dense": "attn.proj",
    "layer_scale1.lambda1": "ls1.gamma",
    "layer_scale2.lambda1": "ls2.gamma",
    "mlp.fc1": "mlp.fc1",
    "mlp.fc2": "mlp.fc2",
}
_VIT = {
    "layernorm_before": "norm1",
    "layernorm_after": "norm2",
    "attention.output.dense": "attn.proj",
    "intermediate.dense": "mlp.fc1",
    "output.dense": "mlp.fc2",
}
_QKV = tuple(f"attention.attention.{part}" for part in ("query", "key", "value"))
_REST = {
    "adapter_mlp.": "controller.adapter_mlp.",
    "condition_mlp.cap_proj.": "controller.condition_mlp.",
    "condition_layers.": "controller.condition_layers.",
}


def _split(name: str, names: Mapping[str, str]) -> str:
    """A block's `name.weight` or parameter under its other name; as it is where it has none."""
    if name in names:
        return names[name]
    part, _, last = name.rpartition(".")
    return f"{names[part]}.{last}" if part in names else name


def encoder_from_official(state: Mapping[str, Tensor]) -> StateDict:
    """A Dinov2Model or ViTModel of transformers -> names of `ControlEncoder`. What is not read is left out."""
    result = StateDict()
    for key, value in state.items():
        if ENCODER + key in UNREAD:
            continue
        found = re.fullmatch(r"encoder\.layer\.(\d+)\.(.+)", key)
        if found is None:
            result[_EMBEDDINGS.get(key, key)] = value
            continue
        block, name = f"blocks.{found[1]}.", found[2]
        part, _, last = name.rpartition(".")
        if part == _QKV[0]:
            joined = [state[f"encoder.layer.{found[1]}.{one}.{last}"] for one in _QKV]
            result[f"{block}attn.qkv.{last}"] = torch.cat(joined)
        elif part not in _QKV:
            result[block + _split(name, {**_VIT, **_DINOV2})] = value
    return result


def encoder_to_official(state: Mapping[str, Tensor]) -> StateDict:
    """The other way; which of the two it is, LayerScale tells."""
    names = {ours: theirs for theirs, ours in (_DINOV2 if "blocks.0.ls1.gamma" in state else _VIT).items()}
    outer, result = {ours: theirs for theirs, ours in _EMBEDDINGS.items()}, StateDict()
    for key, value in state.items():
        found = re.fullmatch(r"blocks\.(\d+)\.(.+)", key)
        if found is None:
            result[outer.get(key, key)] = value
            continue
        layer, name = f"encoder.layer.{found[1]}.", found[2]
        part, _, last = name.rpartition(".")
        if part == "attn.qkv":
            for one, piece in zip(_QKV, value.chunk(3), strict=True):
                result[f"{layer}{one}.{last}"] = piece.contiguous()
        else:
            result[layer + _split(name, names)] = value
    return result


def from_official(state: StateDict) -> StateDict:
    """All keys, but those of `UNREAD` and the rotary table that old files carry."""
    encoder = {k.removeprefix(ENCODER): v for k, v in state.items() if k.startswith(ENCODER)}
    result = StateDict({f"{OURS}encoder.{k}": v for k, v in encoder_from_official(encoder).items()})
    for key, value in llamagen.transformer_from_official(state).items():
        if key not in UNREAD and not key.startswith(ENCODER):
            start = next((s for s in _REST if key.startswith(s)), "")
            result[_REST.get(start, "") + key.removeprefix(start)] = value
    return result


def to_official(state: StateDict, model: Any) -> StateDict:
    """The other way, with what is never read as it is made there."""
    encoder = {k.removeprefix(f"{OURS}encoder."): v for k, v in state.items() if k.startswith(f"{OURS}encoder.")}
    result = StateDict({ENCODER + k: v for k, v in encoder_to_official(encoder).items()})
    for key, value in state.items():
        if not key.startswith(f"{OURS}encoder."):
            start = next((ours for ours in _REST.values() if key.startswith(ours)), "")
            back = {ours: theirs for theirs, ours in _REST.items()}
            result[back.get(start, "") + key.removeprefix(start)] = value
    return result | unread_of(model)


def unread_of(model: Any) -> StateDict:
    """The tensors of `UNREAD` that an official file of this model has."""
    config, encoder = model.config, model.controller.encoder
    like, width = encoder.cls_token.detach(), encoder.cls_token.shape[-1]
    length = model.layout.length if config.rope_grid is None else math.prod(config.rope_grid)
    zeros: dict[str, tuple[int, ...]] = {
        "condition_embeddings.weight": (config.codebook_size, config.hidden_size),
        "condition_mlp.uncond_embedding": (length, config.hidden_size),
    }
    if "blocks.0.ls1.gamma" in encoder.state_dict():
        zeros["adapter.model.embeddings.mask_token"] = (1, width)
    else:
        zeros["adapter.model.pooler.dense.weight"] = (width, width)
        zeros["adapter.model.pooler.dense.bias"] = (width,)
    result = StateDict({name: like.new_zeros(shape) for name, shape in zeros.items()})
    if model.condition == "class":
        result["condition_norm.weight"] = like.new_ones(config.hidden_size)
    return result


def encoder_arguments(official: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments of transformers' Dinov2Config or ViTConfig -> arguments of `ControlEncoder`."""
    dinov2 = official["model"] == "dinov2"
    width, patch = official["hidden_size"], official["patch_size"]
    return {
        "width": width,
        "depth": official["num_hidden_layers"],
        "heads": official["num_attention_heads"],
        "patch": patch,
        "stride": 16,
        "grid": official["image_size"] // patch,
        "mlp_ratio": official["mlp_ratio"] if dinov2 else official["intermediate_size"] / width,
        "norm_eps": official["layer_norm_eps"],
        "layer_scale": dinov2,
    }


def transformer_arguments(official: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments of the official Transformer -> arguments of `LlamaGen`.

    How control images are resized goes by the kind of control: `canny` and `seg` nearest, all others bicubic.
    """
    nearest = official.get("condition_type") in ("canny", "seg")
    side = round(official["block_size"] ** 0.5)
    return {
        **llamagen.transformer_arguments(official),
        "rope_grid": (side, side) if official["model_type"] == "t2i" else None,
        "control": {
            "encoder": encoder_arguments(official["control_encoder"]),
            "resize": "nearest" if nearest else "bicubic",
        },
    }


def read_arguments(state: Mapping[str, Tensor]) -> dict[str, Any]:
    """`LlamaGen` arguments from the shapes of an official file.

    No key tells the kind of control, nor how its images are resized: the card of the file's name does, or `control=`.
    """
    width = state["adapter.model.embeddings.cls_token"].shape[-1]
    patch = state["adapter.model.embeddings.patch_embeddings.projection.weight"].shape[-1]
    names = {(sizes["width"], sizes["patch"]): name for name, sizes in ENCODERS.items()}
    if (width, patch) not in names:
        raise ValueError(f"a control encoder of width {width} and patch {patch}: none of {', '.join(ENCODERS)}")
    side = round(len(state["condition_mlp.uncond_embedding"]) ** 0.5)
    return {
        **llamagen.read_transformer_arguments(state),
        "grid": side,
        "rope_grid": (side, side) if side == LARGE else None,
        "control": {"encoder": names[width, patch]},
    }


def _is_it(key: str) -> Callable[[Mapping[str, Tensor]], bool]:
    return lambda state: SIGN in state and key in state


_RELEASE = Release("hustvl/ControlAR", "arXiv 2410.02705", "not stated with the files (hustvl/ControlAR)", "other")
for _condition, _key in (("class", llamagen.CLASS_KEY), ("text", llamagen.TEXT_KEY)):
    register_format(
        OfficialFormat(
            f"ControlAR from {_condition}",
            SIGN,
            "varkit.generators.llamagen:LlamaGen",
            _is_it(_key),
            read_arguments,
            _RELEASE,
            from_official=lambda state, model: from_official(state),
            to_official=to_official,
            sampling=CONTROL_SAMPLING,
            condition=_condition,
            control=True,
        )
    )
