"""Released RAR files <-> varkit: `rar_b.bin`, `rar_l.bin`, `rar_xl.bin`, `rar_xxl.bin`. The keys are the same."""

from __future__ import annotations

from collections.abc import Mapping
from math import isqrt
from typing import Any

from torch import Tensor

from varkit.checkpoints.formats import OfficialFormat, Release, register_format

_SIGN = "target_aware_pos_embed"
_EXTRA_POSITIONS = 1024  # rows of the position table beyond the tokens

_ARGUMENTS = {
    "condition_num_classes": "num_classes",
    "num_hidden_layers": "depth",
    "hidden_size": "hidden_size",
    "num_attention_heads": "num_heads",
    "intermediate_size": "mlp_hidden",
    "dropout": "dropout",
    "attn_drop": "attention_dropout",
    "class_label_dropout": "cond_drop_rate",
}

# README: guidance_scale, guidance_scale_pow and temperature, by width
_README = {768: (16.0, 2.75, 1.0), 1024: (15.5, 2.5, 1.02), 1280: (6.9, 1.5, 1.02), 1408: (8.0, 1.2, 1.02)}


def rar_arguments(official: Mapping[str, Any], codebook_size: int) -> dict[str, Any]:
    """Official `model.generator` -> arguments of `RAR`, but for the tokenizer's latent_dim."""
    arguments = {ours: official[name] for name, ours in _ARGUMENTS.items() if name in official}
    return {**arguments, "codebook_size": codebook_size, "grid": _grid(official["image_seq_len"])}


def sampling_arguments(official: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments of the official `generate` -> settings of `NextGroupSampler`. Official scale 0 is 1 here: off."""
    return {
        "guidance_scale": official["guidance_scale"] or 1.0,
        "guidance_schedule": "power-cosine",
        "guidance_power": official["guidance_scale_pow"],
        "temperature": official["randomize_temperature"],
    }


def labels_from_official(condition: Tensor, codebook_size: int) -> Tensor:
    """Condition ids as rows of the embedding table -> class labels."""
    return condition - codebook_size - 1


def _grid(length: int) -> tuple[int, ...]:
    side = isqrt(length)
    return (side, side) if side * side == length else (length,)


def read_rar_arguments(state: Mapping[str, Tensor]) -> dict[str, Any]:
    """`RAR` arguments from shapes. No key tells the tokenizer's latent_dim: it is the MaskGIT VQGAN's."""
    size, width = state["lm_head.weight"].shape
    return {
        "num_classes": state["embeddings.weight"].shape[0] - size - 2,
        "depth": 1 + max(int(k.split(".")[1]) for k in state if k.startswith("blocks.")),
        "hidden_size": width,
        "num_heads": width // state["blocks.0.attn.q_norm.weight"].shape[0],
        "mlp_hidden": state["blocks.0.mlp.fc1.weight"].shape[0],
        "grid": _grid(state["pos_embed"].shape[1] - _EXTRA_POSITIONS),
        "codebook_size": size,
    }


def readme_sampling(model: Any) -> dict[str, Any]:
    """What the README recommends for a model of this width."""
    scale, power, temperature = _README.get(model.config.hidden_size, (4.0, 0.0, 1.0))
    return sampling_arguments(
        {"guidance_scale": scale, "guidance_scale_pow": power, "randomize_temperature": temperature}
    )


register_format(
    OfficialFormat(
        "RAR transformer",
        _SIGN,
        "varkit.generators.rar:RAR",
        lambda state: _SIGN in state and "lm_head.weight" in state,
        read_rar_arguments,
        Release("bytedance/1d-tokenizer", "arXiv 2411.00776", "Apache-2.0 (bytedance/1d-tokenizer)", "apache-2.0"),
        sampling=readme_sampling,
    )
)
