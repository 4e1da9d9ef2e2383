"""Released xAR files <-> varkit: `xAR-B.pth`, `xAR-L.pth`, `xAR-H.pth`.

Source: OliverRensu/xAR: models/xar.py, eval.py, README (121e9c9).
"""

from __future__ import annotations

from collections.abc import Mapping
from math import isqrt
from typing import Any

from torch import Tensor

from varkit import registry
from varkit.checkpoints.formats import OfficialFormat, Release, StateDict, register_format
from varkit.checkpoints.modulated import attentions, count, trunk_from_official, trunk_to_official
from varkit.layers.llama import rotary_frequencies

_SIGN = "time_embed.mlp.0.weight"
_CARDS = {768: "xar_b.in1k_256", 1024: "xar_l.in1k_256", 1280: "xar_h.in1k_256"}


def xar_arguments(official: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments of the official constructor -> those of `XAR`. Its clusters lie in a square."""
    side = official["img_size"] // official["vae_stride"] // official["patch_size"]
    for stack in ("embed_dim", "num_heads"):
        if official[f"encoder_{stack}"] != official[f"decoder_{stack}"]:
            raise ValueError(f"xAR's two stacks have one width and as many heads; encoder and decoder_{stack} differ")
    return {
        "num_classes": official["class_num"],
        "hidden_size": official["encoder_embed_dim"],
        "depths": (official["encoder_depth"], official["decoder_depth"]),
        "num_heads": official["encoder_num_heads"],
        "grid": (side, side),
        "latent_dim": official["vae_embed_dim"],
        "entity": "cell",
        "entity_size": side // isqrt(official["clusters"]),
        "dropout": official["proj_dropout"],
        "attention_dropout": official["attn_dropout"],
        "cond_drop_rate": official["label_drop_prob"],
    }


def sampling_arguments(official: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments of the official `sample_tokens` -> settings of `ContinuousSampler`. Its guidance is ours."""
    return {
        "guidance_scale": official["cfg"],
        "guidance_schedule": "linear",
        "guidance_times": (official.get("guidance_low", 0.0), official.get("guidance_high", 1.0)),
        "head_steps": official["num_steps"],
        "solver": {"sde": "sde", "ode": "euler"}[official.get("solver", "sde")],
    }


def from_official(state: StateDict) -> StateDict:
    return trunk_from_official(state)


def to_official(state: StateDict, model: Any) -> StateDict:
    """With the tables of each attention, so that the official strict load accepts the file."""
    result = trunk_to_official(state, model.sizes)
    table = model.trunk.rotary.table.repeat_interleave(2, 1)  # L D 2
    for name in attentions(result):
        result[f"{name}.rope.freqs"] = rotary_frequencies(table.shape[1])
        result[f"{name}.rope.freqs_cos"], result[f"{name}.rope.freqs_sin"] = (t.clone() for t in table.unbind(-1))
    return result


def read_arguments(state: Mapping[str, Tensor]) -> dict[str, Any]:
    """`XAR` arguments from shapes. No key's shape tells the cells: they are two by two, as in all files."""
    classes, width = state["class_emb.weight"].shape
    side = isqrt(state["encoder_pos_embed_learned"].shape[1])
    return {
        "num_classes": classes - 1,
        "hidden_size": width,
        "depths": (count(state, "encoder_blocks."), count(state, "decoder_blocks.")),
        "num_heads": width // (4 * state["encoder_blocks.0.attn.rope.freqs"].shape[0]),
        "grid": (side, side),
        "latent_dim": state["z_proj.weight"].shape[1],
        "entity_size": side // 2,
    }


def readme_sampling(model: Any) -> dict[str, Any]:
    """What the README recommends for a model of this width; of another width, what it does for xAR-B."""
    return dict(registry.checkpoint(_CARDS.get(model.config.hidden_size, _CARDS[768])).sampling)


register_format(
    OfficialFormat(
        "xAR transformer",
        _SIGN,
        "varkit.generators.xar:XAR",
        lambda state: _SIGN in state and "encoder_pos_embed_learned" in state and "pred.weight" in state,
        read_arguments,
        Release("OliverRensu/xAR", "arXiv 2502.20388", "none stated (OliverRensu/xAR)", "other"),
        from_official=lambda state, model: from_official(state),
        to_official=to_official,
        sampling=readme_sampling,
    )
)
