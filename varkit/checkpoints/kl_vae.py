"""The KL-VAE of MAR, FlowAR, xAR and CSpD <-> varkit: `kl16.ckpt`, in the layout of latent diffusion.

`KLVAE` holds the names of diffusers. They count the decoder's levels in the order in which they run, the file from the
finest, and an attention's projections are linear layers there and 1x1 convolutions in the file.

Source: LTH14/mar: models/vae.py (fe470ac).
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from varkit.checkpoints.formats import OfficialFormat, Release, StateDict, register_format
from varkit.tokenizers.kl_vae import KL16

_SIGN = "encoder.down.0.block.0.norm1.weight"
_ROOTS = ("encoder.", "decoder.", "quant_conv.", "post_quant_conv.")
_PREFIX = "vae."  # where a KLVAE keeps the network

_RENAMED = (
    (r"mid_block\.resnets\.0\.", "mid.block_1."),
    (r"mid_block\.resnets\.1\.", "mid.block_2."),
    (r"mid_block\.attentions\.0\.", "mid.attn_1."),
    (r"\.resnets\.", ".block."),
    (r"\.attentions\.", ".attn."),
    (r"\.conv_shortcut\.", ".nin_shortcut."),
    (r"\.downsamplers\.0\.", ".downsample."),
    (r"\.upsamplers\.0\.", ".upsample."),
    (r"\.conv_norm_out\.", ".norm_out."),
    (r"\.group_norm\.", ".norm."),
    (r"\.to_([qkv])\.", r".\1."),
    (r"\.to_out\.0\.", ".proj_out."),
    (r"\.down_blocks\.", ".down."),
)


def official_name(name: str, levels: int) -> str:
    """The file's name of a parameter of `KLVAE`."""
    name = name.removeprefix(_PREFIX)
    for pattern, official in _RENAMED:
        name = re.sub(pattern, official, name)
    return re.sub(r"\.up_blocks\.(\d+)\.", lambda m: f".up.{levels - 1 - int(m[1])}.", name)


def _names(model: Any) -> dict[str, str]:
    """The file's names -> ours."""
    levels = len(model.config.block_out_channels)
    return {official_name(k, levels): k for k in model.state_dict()}


def from_official(state: StateDict, model: Any) -> StateDict:
    """What is no part of the autoencoder (the networks of its losses, which a training checkpoint may hold) is left."""
    names, own = _names(model), model.state_dict()
    found = {}
    for key, value in state.items():
        if key.startswith(_ROOTS):
            name = names.get(key, key)
            linear = name in own and own[name].dim() == 2 and value.shape[2:] == (1, 1)
            found[name] = value.flatten(1) if linear else value
    return found


def to_official(state: StateDict, model: Any) -> StateDict:
    """Raises ValueError when the official code, which knows one VAE and one scale, would misread the file."""
    c = model.config
    if c.latents_mean is not None or c.shift_factor or c.scaling_factor != KL16["scaling_factor"]:
        raise ValueError(
            f"the official file does not say how latents are scaled, its readers multiply them by "
            f"{KL16['scaling_factor']}; this VAE's scaling_factor is {c.scaling_factor:g}, shift_factor "
            f"{c.shift_factor}, latents_mean {'none' if c.latents_mean is None else 'set'}: keep it as a folder"
        )
    _require_kl16(len(c.block_out_channels), c.latent_channels, c.up_block_types or ())
    if not (c.quant_convs and c.mid_attention):
        raise ValueError("the official file has 1x1 convolutions around the latents and attention in the middle")
    names = {ours: official for official, ours in _names(model).items()}
    return {names[k]: v[..., None, None] if v.dim() == 2 else v for k, v in state.items()}


def _require_kl16(levels: int, channels: int, up: Sequence[str]) -> None:
    """Raises ValueError on another VAE in this layout, of which no key tells the scale of the latents."""
    attention = any("Attn" in kind for kind in up)
    if levels != 5 or channels != 16 or attention:
        raise ValueError(
            f"a VAE of {channels} channels and {levels} levels with{'' if attention else 'out'} attention in the "
            f"decoder's levels is not MAR's kl16.ckpt (16 channels, 5 levels, without), and no key tells how its "
            f"latents are scaled. Open the folder of the same VAE in diffusers' format (AutoencoderKL), which does"
        )


def is_kl_vae(state: Mapping[str, Tensor]) -> bool:
    own = _SIGN in state and "quant_conv.weight" in state and "post_quant_conv.weight" in state
    return own and not any(k.startswith("quantize.") for k in state)


def _blocks(attention: Sequence[bool], direction: str) -> tuple[str, ...]:
    plain, attending = {
        "down": ("DownEncoderBlock2D", "AttnDownEncoderBlock2D"),
        "up": ("UpDecoderBlock2D", "AttnUpDecoderBlock2D"),
    }[direction]
    return tuple(attending if level else plain for level in attention)


def kl_vae_arguments(official: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments of the official class -> those of `KLVAE`. The nominal resolution says where attention sits."""
    levels = len(official["ch_mult"])
    sides = [official["resolution"] // 2**i for i in range(levels)]
    up = [side in official["decoder_attn_resolutions"] for side in reversed(sides)]
    return {
        "image_size": official["resolution"],
        "image_channels": official.get("in_channels", 3),
        "latent_channels": official["embed_dim"],
        "block_out_channels": tuple(official["ch"] * m for m in official["ch_mult"]),
        "layers_per_block": official["num_res_blocks"],
        "down_block_types": _blocks([side in official["encoder_attn_resolutions"] for side in sides], "down"),
        "up_block_types": _blocks(up, "up"),
        "scaling_factor": official.get("scaling_factor", KL16["scaling_factor"]),
    }


def _count(state: Mapping[str, Tensor], prefix: str) -> int:
    return 1 + max(int(k.removeprefix(prefix).split(".")[0]) for k in state if k.startswith(prefix))


def read_arguments(state: Mapping[str, Tensor]) -> dict[str, Any]:
    """`KLVAE` arguments from shapes. No key tells the size of the images: 256.

    Raises: ValueError on a VAE in this layout whose scale is not known, or without variances.
    """
    levels = _count(state, "encoder.down.")
    moments, channels = state["quant_conv.weight"].shape[0], state["post_quant_conv.weight"].shape[1]
    if moments != 2 * channels:
        raise ValueError(
            f"quant_conv gives {moments} numbers for latents of {channels}: a VAE without variances "
            f"(use_variational=False), which no generator was released with"
        )
    down, up = (
        [f"{part}.{i}.attn.0.q.weight" in state for i in range(levels)] for part in ("encoder.down", "decoder.up")
    )
    arguments = {
        "image_channels": state["encoder.conv_in.weight"].shape[1],
        "latent_channels": channels,
        "block_out_channels": tuple(state[f"encoder.down.{i}.block.0.conv2.weight"].shape[0] for i in range(levels)),
        "layers_per_block": _count(state, "encoder.down.0.block."),
        "down_block_types": _blocks(down, "down"),
        "up_block_types": _blocks(up[::-1], "up"),
        "scaling_factor": KL16["scaling_factor"],
    }
    _require_kl16(levels, channels, arguments["up_block_types"])
    return arguments


register_format(
    OfficialFormat(
        "KL-VAE (kl16)",
        _SIGN,
        "varkit.tokenizers.kl_vae:KLVAE",
        is_kl_vae,
        read_arguments,
        Release("LTH14/mar", "arXiv 2406.11838", "MIT (LTH14/mar)", "mit"),
        from_official=from_official,
        to_official=to_official,
    )
)
