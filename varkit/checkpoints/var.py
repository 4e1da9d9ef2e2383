"""Official VAR files <-> varkit: `vae_ch160v4096z32.pth`, `var_d16.pth` ... `var_d36.pth`.

Our modules carry the official parameter names, so the maps are short: buffers that hold no information are
dropped on the way in and written again on the way out.

Source: FoundationVision/VAR: models/vqvae.py, models/var.py, models/__init__.py (78b9539).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from varkit.checkpoints.formats import OfficialFormat, Release, StateDict, register_format
from varkit.layout import square_grids
from varkit.tokenizers.multiscale_vq import SCALES_256, SCALES_512, SCALES_1024

USAGE_KEY = "quantize.ema_vocab_hit_SV"
CONSTANT_BUFFERS = ("lvl_1L", "attn_bias_for_masking", "zero_k_bias")
LICENCE = "MIT (FoundationVision/VAR)"

_VQVAE_ARGUMENTS = {
    "vocab_size": "codebook_size",
    "z_channels": "latent_dim",
    "Cvae": "latent_dim",
    "ch": "base_channels",
    "ch_mult": "channel_multipliers",
    "num_res_blocks": "num_res_blocks",
    "dropout": "dropout",
    "in_channels": "image_channels",
    "using_sa": "attention",
    "using_mid_sa": "mid_attention",
    "quant_conv_ks": "quant_conv_kernel",
    "beta": "commitment_weight",
    "using_znorm": "normalize_codes",
    "quant_resi": "residual_ratio",
    "share_quant_resi": "residual_convs",
    "default_qresi_counts": "residual_conv_count",
    "v_patch_nums": "scales",
}
_VAR_ARGUMENTS = {
    "num_classes": "num_classes",
    "depth": "depth",
    "embed_dim": "hidden_size",
    "num_heads": "num_heads",
    "mlp_ratio": "mlp_ratio",
    "drop_rate": "dropout",
    "attn_drop_rate": "attention_dropout",
    "drop_path_rate": "drop_path_rate",
    "norm_eps": "norm_eps",
    "shared_aln": "shared_adaln",
    "cond_drop_rate": "cond_drop_rate",
    "attn_l2_norm": "attn_l2_norm",
    "patch_nums": "scales",
}
_WITHOUT_EFFECT = {"cls", "test_mode", "flash_if_available", "fused_if_available"}


def sampling_arguments(official: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments of `autoregressive_infer_cfg` -> settings of `NextGroupSampler`.

    Official cfg 1.5 is guidance_scale 2.5 at the last scale: w = 1 + cfg. Official top_p 0 is off.
    """
    return {
        "guidance_scale": 1 + official["cfg"],
        "guidance_schedule": "linear",
        "top_k": official["top_k"],
        "top_p": official["top_p"] or 1.0,
        "more_smooth": official["more_smooth"],
    }


def inputs_from_official(x: Tensor, first_size: int) -> Tensor:
    """Teacher-forcing input (B, L - first, C) -> (B, L, C): zeros where the first scale reads nothing."""
    return torch.nn.functional.pad(x, (0, 0, first_size, 0))


def inputs_to_official(inputs: Tensor, first_size: int) -> Tensor:
    return inputs[:, first_size:]


def _rename(arguments: Mapping[str, Any], names: Mapping[str, str]) -> dict[str, Any]:
    unknown = set(arguments) - set(names) - _WITHOUT_EFFECT
    if unknown:
        raise ValueError(f"unknown constructor arguments {sorted(unknown)}; known: {sorted(names)}")
    return {names[k]: v for k, v in arguments.items() if k in names}


def tokenizer_arguments(official: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments of the official VQVAE (or VectorQuantizer2) -> arguments of `MultiScaleVQ`."""
    return _rename(official, _VQVAE_ARGUMENTS)


def var_arguments(official: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments of the official VAR -> arguments of `VAR`, but for the tokenizer's sizes.

    The official class switches attn_l2_norm off unless told otherwise.
    """
    return {"attn_l2_norm": False, **_rename(official, _VAR_ARGUMENTS)}


def tokenizer_from_official(state: StateDict, num_scales: int) -> StateDict:
    """As released; usage statistics of another number of scales are replaced by zeros, as the reference does."""
    state = dict(state)
    hits = state.get(USAGE_KEY)
    if hits is not None and hits.shape[0] != num_scales:
        state[USAGE_KEY] = hits.new_zeros(num_scales, hits.shape[1])
    return state


def tokenizer_to_official(state: StateDict) -> StateDict:
    return dict(state)


def var_from_official(state: StateDict) -> StateDict:
    """Drop the buffers that hold no information. Raises ValueError if zero_k_bias is not zero."""
    kept: StateDict = {}
    for key, value in state.items():
        if not key.endswith(CONSTANT_BUFFERS):
            kept[key] = value
        elif key.endswith("zero_k_bias") and value.device.type != "meta" and value.count_nonzero():
            raise ValueError(f"{key} is not zero; VAR has no bias on keys")
    return kept


def var_to_official(state: StateDict, scales: Any) -> StateDict:
    """Write the constant buffers again, so that the official strict load accepts the file."""
    sizes = [h * w for h, w in square_grids(scales)]
    levels = torch.repeat_interleave(torch.arange(len(sizes)), torch.tensor(sizes))
    seen = levels[:, None] >= levels[None, :]
    result = dict(state)
    result["lvl_1L"] = levels[None]
    result["attn_bias_for_masking"] = torch.zeros(seen.shape).masked_fill(~seen, -torch.inf)[None, None]
    for key, value in state.items():
        if key.endswith("attn.q_bias"):
            result[key.replace("q_bias", "zero_k_bias")] = torch.zeros_like(value)
    return result


def is_tokenizer(state: Mapping[str, Tensor]) -> bool:
    return USAGE_KEY in state and "encoder.conv_in.weight" in state


def is_var(state: Mapping[str, Tensor]) -> bool:
    return "pos_1LC" in state and "word_embed.weight" in state and "n_d_embed.weight" not in state


def read_tokenizer_arguments(state: Mapping[str, Tensor]) -> dict[str, Any]:
    """`MultiScaleVQ` arguments from the shapes of an official file (scales: the 256 px list, or by count)."""
    width = state["encoder.conv_in.weight"].shape[0]
    levels = 1 + max(int(k.split(".")[2]) for k in state if k.startswith("encoder.down."))
    blocks = [
        max(int(k.split(".")[4]) for k in state if k.startswith(f"encoder.down.{i}.block.")) for i in range(levels)
    ]
    last = [state[f"encoder.down.{i}.block.{blocks[i]}.conv2.weight"].shape[0] // width for i in range(levels)]
    size, dim = state["quantize.embedding.weight"].shape
    convs = len({k.split(".")[3] for k in state if k.startswith("quantize.quant_resi.qresi_ls.")})
    alone = any(k.startswith("quantize.quant_resi.qresi.") for k in state)
    scales = {10: SCALES_256, 14: SCALES_1024}.get(state[USAGE_KEY].shape[0])
    if scales is None:
        raise ValueError(
            f"the file counts {state[USAGE_KEY].shape[0]} scales, which no release has; load it through "
            f"MultiScaleVQ(scales=...) and its state dict"
        )
    return {
        "codebook_size": size,
        "latent_dim": dim,
        "base_channels": width,
        "channel_multipliers": tuple(last),
        "num_res_blocks": blocks[0] + 1,
        "image_channels": state["encoder.conv_in.weight"].shape[1],
        "attention": any(f"encoder.down.{levels - 1}.attn." in k for k in state),
        "mid_attention": any(k.startswith("encoder.mid.attn_1.") for k in state),
        "quant_conv_kernel": state["quant_conv.weight"].shape[-1],
        "residual_convs": convs or int(alone),
        "scales": scales,
    }


def read_var_arguments(state: Mapping[str, Tensor]) -> dict[str, Any]:
    """`VAR` arguments from the shapes of an official file.

    Raises: ValueError when its number of tokens fits no released list of scales.
    """
    depth = 1 + max(int(k.split(".")[1]) for k in state if k.startswith("blocks."))
    classes, width = state["class_emb.weight"].shape
    length = state["pos_1LC"].shape[1]
    lists = {sum(s * s for s in scales): scales for scales in (SCALES_256, SCALES_512, SCALES_1024)}
    if length not in lists:
        raise ValueError(f"the file has {length} positions; released lists of scales have {sorted(lists)}")
    sharpness = state.get("blocks.0.attn.scale_mul_1H11")
    return {
        "num_classes": classes - 1,
        "depth": depth,
        "hidden_size": width,
        # Without q/k normalisation no key tells the heads; the paper's rule does: 64 channels each.
        "num_heads": sharpness.shape[1] if sharpness is not None else math.ceil(width / 64),
        "mlp_ratio": state["blocks.0.ffn.fc1.weight"].shape[0] / width,
        "drop_path_rate": 0.1 * depth / 24,
        "shared_adaln": "shared_ada_lin.1.weight" in state,
        "attn_l2_norm": sharpness is not None,
        "scales": lists[length],
        "codebook_size": state["head.weight"].shape[0],
        "latent_dim": state["word_embed.weight"].shape[1],
    }


_RELEASE = Release("FoundationVision/VAR", "arXiv 2404.02905", LICENCE, "mit")
register_format(
    OfficialFormat(
        "VAR tokenizer",
        USAGE_KEY,
        "varkit.tokenizers.multiscale_vq:MultiScaleVQ",
        is_tokenizer,
        read_tokenizer_arguments,
        _RELEASE,
        from_official=lambda state, model: tokenizer_from_official(state, len(model.grids)),
    )
)
register_format(
    OfficialFormat(
        "VAR transformer",
        "pos_1LC",
        "varkit.generators.var:VAR",
        is_var,
        read_var_arguments,
        _RELEASE,
        from_official=lambda state, model: var_from_official(state),
        to_official=lambda state, model: var_to_official(state, model.config.scales),
        sampling=sampling_arguments({"cfg": 1.5, "top_k": 900, "top_p": 0.96, "more_smooth": False}),  # README
    )
)
