"""Released generators of TiTok <-> varkit: `generator_titok_{l32,b64,s128}.bin`.

The UViT's keys are the same. The ViT is transformers' BERT, whose three projections are one here.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from varkit.checkpoints.formats import OfficialFormat, Release, StateDict, register_format

_VIT_SIGN = "model.embeddings.token_type_embeddings.weight"
_UVIT_SIGN = "mid_block.attn.qkv.weight"
_BUFFER = "model.embeddings.position_ids"  # of older transformers releases; holds no information

_TOP = {
    "model.embeddings.word_embeddings.weight": "embeddings.weight",
    "model.embeddings.token_type_embeddings.weight": "type_embed",
    "model.embeddings.LayerNorm.weight": "norm.weight",
    "model.embeddings.LayerNorm.bias": "norm.bias",
    "model.lm_head.weight": "lm_head.weight",
    "model.lm_head.bias": "lm_head.bias",
}
_POSITIONS = "model.embeddings.position_embeddings.weight"
_LAYER = {
    "attention.output.dense": "attn.proj",
    "attention.output.LayerNorm": "norm1",
    "intermediate.dense": "mlp.fc1",
    "output.dense": "mlp.fc2",
    "output.LayerNorm": "norm2",
}
_QKV = tuple(f"attention.self.{part}" for part in ("query", "key", "value"))

_ARGUMENTS = {
    "condition_num_classes": "num_classes",
    "num_hidden_layers": "depth",
    "hidden_size": "hidden_size",
    "num_attention_heads": "num_heads",
    "intermediate_size": "mlp_hidden",
    "dropout": "dropout",
    "attn_drop": "attention_dropout",
    "class_label_dropout": "cond_drop_rate",
    "num_steps": "num_steps",
}


def maskgit_arguments(official: Mapping[str, Any], codebook_size: int) -> dict[str, Any]:
    """Official `model.generator` -> arguments of `MaskGIT`, but for the tokenizer's latent_dim."""
    arguments = {ours: official[name] for name, ours in _ARGUMENTS.items() if name in official}
    backbone = official["model_type"].lower()
    return {**arguments, "backbone": backbone, "codebook_size": codebook_size, "grid": (official["image_seq_len"],)}


def sampling_arguments(official: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments of the official `generate` -> settings of `MaskedSampler`.

    Official constant and linear guidance s is cond + s (cond - uncond), so w = 1 + s; power-cosine is w already.
    """
    decay, scale = official["guidance_decay"], official["guidance_scale"]
    return {
        "guidance_scale": scale if decay == "power-cosine" else 1 + scale,
        "guidance_schedule": {"linear": "linear-open"}.get(decay, decay),
        "guidance_power": official.get("guidance_scale_pow", 3.0),
        "num_steps": official["num_sample_steps"],
        "choice_temperature": official["randomize_temperature"],
        "softmax_annealing": official["softmax_temperature_annealing"],
    }


def vit_from_official(state: StateDict) -> StateDict:
    result = {_TOP[k]: v for k, v in state.items() if k in _TOP}
    result["pos_embed"] = state[_POSITIONS][None]
    for key, value in state.items():
        match = re.fullmatch(r"model\.encoder\.layer\.(\d+)\.(.+)\.(weight|bias)", key)
        if match is None:
            if key not in _TOP and key not in (_POSITIONS, _BUFFER):
                result[key] = value  # strict loading names it
            continue
        layer, name, kind = match.groups()
        if name in _LAYER:
            result[f"blocks.{layer}.{_LAYER[name]}.{kind}"] = value
        elif name == _QKV[0]:
            parts = [state[f"model.encoder.layer.{layer}.{part}.{kind}"] for part in _QKV]
            result[f"blocks.{layer}.attn.qkv.{kind}"] = torch.cat(parts)
        elif name not in _QKV:
            result[key] = value
    return result


def vit_to_official(state: StateDict) -> StateDict:
    result = {official: state[ours] for official, ours in _TOP.items()}
    result[_POSITIONS] = state["pos_embed"][0]
    names = {ours: official for official, ours in _LAYER.items()}
    for key, value in state.items():
        match = re.fullmatch(r"blocks\.(\d+)\.(.+)\.(weight|bias)", key)
        if match is None:
            continue
        layer, name, kind = match.groups()
        prefix = f"model.encoder.layer.{layer}"
        if name == "attn.qkv":
            parts = zip(_QKV, value.chunk(3), strict=True)
            result |= {f"{prefix}.{part}.{kind}": v.contiguous() for part, v in parts}
        else:
            result[f"{prefix}.{names[name]}.{kind}"] = value
    return result


def _read(state: Mapping[str, Tensor], **more: Any) -> dict[str, Any]:
    size, width = state["lm_head.weight"].shape
    return {
        "num_classes": state["embeddings.weight"].shape[0] - size - 2,
        "hidden_size": width,
        "num_heads": 16,  # no key tells; all released models have 16
        "grid": (state["pos_embed"].shape[1] - 1,),
        "codebook_size": size,
        **more,
    }


def read_vit_arguments(state: Mapping[str, Tensor]) -> dict[str, Any]:
    """`MaskGIT` arguments from shapes. No key tells the tokenizer's latent_dim: it is the released 12."""
    ours = vit_from_official(dict(state))
    depth = 1 + max(int(k.split(".")[1]) for k in ours if k.startswith("blocks."))
    return _read(ours, backbone="vit", depth=depth, mlp_hidden=ours["blocks.0.mlp.fc1.weight"].shape[0], num_steps=8)


def read_uvit_arguments(state: Mapping[str, Tensor]) -> dict[str, Any]:
    depth = 2 * (1 + max(int(k.split(".")[1]) for k in state if k.startswith("in_blocks.")))
    hidden = state["mid_block.mlp.fc1.weight"].shape[0]
    return _read(state, backbone="uvit", depth=depth, mlp_hidden=hidden, num_steps=64)


def readme_sampling(model: Any) -> dict[str, Any]:
    """What the README recommends for a model of this length; the shortest's settings for others."""
    scale, decay, temperature, steps = {
        64: (3.0, "linear", 11.0, 8),
        128: (6.9, "power-cosine", 2.8, 64),
    }.get(model.layout.length, (4.5, "linear", 9.5, 8))
    return sampling_arguments(
        {
            "guidance_scale": scale,
            "guidance_decay": decay,
            "randomize_temperature": temperature,
            "num_sample_steps": steps,
            "softmax_temperature_annealing": True,  # of the benchmark script; the demo has it off and scores far worse
        }
    )


_RELEASE = Release("bytedance/1d-tokenizer", "arXiv 2406.07550", "Apache-2.0 (bytedance/1d-tokenizer)", "apache-2.0")


def to_official(state: StateDict, model: Any) -> StateDict:
    """Of either backbone: a model's class alone does not tell its format."""
    return vit_to_official(state) if model.config.backbone == "vit" else dict(state)


register_format(
    OfficialFormat(
        "TiTok generator (ViT)",
        _VIT_SIGN,
        "varkit.generators.maskgit:MaskGIT",
        lambda state: _VIT_SIGN in state and "model.lm_head.weight" in state,
        read_vit_arguments,
        _RELEASE,
        from_official=lambda state, model: vit_from_official(state),
        to_official=to_official,
        sampling=readme_sampling,
    )
)
register_format(
    OfficialFormat(
        "TiTok generator (UViT)",
        _UVIT_SIGN,
        "varkit.generators.maskgit:MaskGIT",
        lambda state: _UVIT_SIGN in state and "lm_head.weight" in state,
        read_uvit_arguments,
        _RELEASE,
        to_official=to_official,
        sampling=readme_sampling,
    )
)
