"""Released MAR files <-> varkit: `checkpoint-last.pth` of mar_base, mar_large and mar_huge. The keys are the same.

A file holds two sets of weights, `model` and their average `model_ema`; the average is taken.
"""

from __future__ import annotations

from collections.abc import Mapping
from math import isqrt
from typing import Any

from torch import Tensor

from varkit.checkpoints.formats import OfficialFormat, Release, register_format

_SIGN = "diffusion_pos_embed_learned"

_ARGUMENTS = {
    "class_num": "num_classes",
    "patch_size": "patch_size",
    "vae_embed_dim": "latent_dim",
    "encoder_embed_dim": "encoder_dim",
    "encoder_depth": "encoder_depth",
    "encoder_num_heads": "encoder_heads",
    "decoder_embed_dim": "decoder_dim",
    "decoder_depth": "decoder_depth",
    "decoder_num_heads": "decoder_heads",
    "mlp_ratio": "mlp_ratio",
    "buffer_size": "buffer_size",
    "norm_eps": "eps",
    "diffloss_w": "head_width",
    "diffloss_d": "head_depth",
    "proj_dropout": "dropout",
    "attn_dropout": "attention_dropout",
    "label_drop_prob": "cond_drop_rate",
    "mask_ratio_min": "mask_ratio_min",
    "diffusion_batch_mul": "diffusion_batch_mul",
}

_HEADS = {1024: 16, 1280: 16}  # of released widths; 64 channels each elsewhere
_README = {768: 2.9, 1024: 3.0, 1280: 3.2}  # guidance, by width


def mar_arguments(official: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments of the official `MAR` -> those of ours."""
    side = official["img_size"] // official["vae_stride"]
    return {**{ours: official[name] for name, ours in _ARGUMENTS.items() if name in official}, "grid": (side, side)}


def sampling_arguments(official: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments of the official `sample_tokens` and `num_sampling_steps` -> settings of `ContinuousSampler`.

    A scale of 1 is off in both; the official steps of the head are text.
    """
    steps = official["num_sampling_steps"]
    return {
        "num_steps": official["num_iter"],
        "guidance_scale": official["cfg"],
        "guidance_schedule": official["cfg_schedule"],
        "temperature": official["temperature"],
        "head_steps": int(steps) if steps.isdecimal() else steps,
    }


def readme_sampling(model: Any) -> dict[str, Any]:
    """What the README recommends for a model of this width."""
    return sampling_arguments(
        {
            "num_iter": min(256, model.length),
            "cfg": _README.get(model.config.encoder_dim, 3.0),
            "cfg_schedule": "linear",
            "temperature": 1.0,
            "num_sampling_steps": "100",
        }
    )


def read_mar_arguments(state: Mapping[str, Tensor]) -> dict[str, Any]:
    """`MAR` arguments from shapes. No key tells the patch (1 in the release) or the heads.

    Raises: ValueError when the tokens form no square.
    """
    _, length, decoder = state[_SIGN].shape
    side = isqrt(length)
    if side * side != length:
        raise ValueError(f"the file is for {length} tokens, which form no square; give grid=(h, w)")
    encoder, channels = state["z_proj.weight"].shape
    slots = state["encoder_pos_embed_learned"].shape[1]
    return {
        "num_classes": state["class_emb.weight"].shape[0],
        "grid": (side, side),
        "latent_dim": channels,
        "encoder_dim": encoder,
        "encoder_depth": _count(state, "encoder_blocks."),
        "encoder_heads": _HEADS.get(encoder, max(encoder // 64, 1)),
        "decoder_dim": decoder,
        "decoder_depth": _count(state, "decoder_blocks."),
        "decoder_heads": _HEADS.get(decoder, max(decoder // 64, 1)),
        "mlp_ratio": state["encoder_blocks.0.mlp.fc1.weight"].shape[0] / encoder,
        "buffer_size": slots - length,
        "head_width": state["diffloss.net.input_proj.weight"].shape[0],
        "head_depth": _count(state, "diffloss.net.res_blocks."),
        "num_steps": min(256, length),
    }


def _count(state: Mapping[str, Tensor], prefix: str) -> int:
    return 1 + max(int(k.removeprefix(prefix).split(".")[0]) for k in state if k.startswith(prefix))


register_format(
    OfficialFormat(
        "MAR transformer",
        _SIGN,
        "varkit.generators.mar:MAR",
        lambda state: _SIGN in state and "fake_latent" in state,
        read_mar_arguments,
        Release("LTH14/mar", "arXiv 2406.11838", "MIT (LTH14/mar)", "mit"),
        sampling=readme_sampling,
    )
)
