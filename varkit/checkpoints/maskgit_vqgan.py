"""The released MaskGIT VQGAN <-> varkit: `maskgit-vqgan-imagenet-f16-256.bin`. The keys are the same."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from varkit.checkpoints.formats import OfficialFormat, Release, register_format

_SIGN = "decoder.up.1.upsample_conv.weight"
_ARGUMENTS = {
    "num_embeddings": "codebook_size",
    "z_channels": "latent_dim",
    "hidden_channels": "base_channels",
    "channel_mult": "channel_multipliers",
    "num_res_blocks": "num_res_blocks",
    "num_channels": "image_channels",
    "dropout": "dropout",
    "commitment_cost": "commitment_weight",
}


def vqgan_arguments(official: Mapping[str, Any]) -> dict[str, Any]:
    """Official configuration -> arguments of `MaskGitVQGAN`; `resolution` becomes its grid."""
    side = official["resolution"] // 2 ** (len(official["channel_mult"]) - 1)
    return {**{ours: official[name] for name, ours in _ARGUMENTS.items() if name in official}, "grid": (side, side)}


def images_from_official(images: Tensor) -> Tensor:
    """[0, 1] -> [-1, 1], where varkit's images lie."""
    return images * 2 - 1


def images_to_official(images: Tensor) -> Tensor:
    return (images + 1) / 2


def is_vqgan(state: Mapping[str, Tensor]) -> bool:
    return _SIGN in state and "encoder.conv_in.weight" in state and "quantize.embedding.weight" in state


def decoder_shape(state: Mapping[str, Tensor], prefix: str) -> tuple[int, tuple[int, ...], int]:
    """Base width, multipliers and residual blocks of a decoder whose keys begin with `prefix`."""
    up = [k.removeprefix(f"{prefix}up.").split(".") for k in state if k.startswith(f"{prefix}up.")]
    levels = 1 + max(int(parts[0]) for parts in up)
    blocks = 1 + max(int(parts[2]) for parts in up if parts[1] == "block")
    widths = [state[f"{prefix}up.{i}.block.0.conv2.weight"].shape[0] for i in range(levels)]
    return widths[0], tuple(w // widths[0] for w in widths), blocks


def read_vqgan_arguments(state: Mapping[str, Tensor]) -> dict[str, Any]:
    """`MaskGitVQGAN` arguments from shapes. No key tells the grid: it is that of 256 x 256."""
    size, dim = state["quantize.embedding.weight"].shape
    width, multipliers, blocks = decoder_shape(state, "decoder.")
    side = 256 // 2 ** (len(multipliers) - 1)
    return {
        "codebook_size": size,
        "latent_dim": dim,
        "base_channels": width,
        "channel_multipliers": multipliers,
        "num_res_blocks": blocks,
        "image_channels": state["encoder.conv_in.weight"].shape[1],
        "grid": (side, side),
    }


ONE_D = Release("bytedance/1d-tokenizer", "arXiv 2406.07550", "Apache-2.0 (bytedance/1d-tokenizer)", "apache-2.0")
register_format(
    OfficialFormat(
        "MaskGIT VQGAN",
        _SIGN,
        "varkit.tokenizers.maskgit_vqgan:MaskGitVQGAN",
        is_vqgan,
        read_vqgan_arguments,
        ONE_D,
    )
)
