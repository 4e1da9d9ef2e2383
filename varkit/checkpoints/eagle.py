"""Released EAGLE drafters of LANTERN <-> varkit: `pytorch_model.bin` of the repositories jadohu/*_drafter.

The keys are the same. They do not tell the grid of the image tokens, nor the length of the prefix: `config.json` beside
the file does; without one the text-conditional LlamaGen at 256 px is taken, or the line of Chameleon. Those of LlamaGen
were trained on the states of LANTERN's own LlamaGen, so they get `official_quirks`.

Source: jadohu/LANTERN: models/drafters/cnets_llamagen.py, cnets_anole.py (3a56e45).
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from varkit.checkpoints.formats import OfficialFormat, Release, register_format
from varkit.generators.eagle import CHAMELEON

_SIGN = "layers.0.self_attn.q_proj.weight with fc.weight"
_HEADS = "layers.0.self_attn.q_norm.weight"

_ARGUMENTS = {
    "vocab_size": "codebook_size",
    "hidden_size": "hidden_size",
    "num_attention_heads": "num_heads",
    "intermediate_size": "ffn_size",
    "rms_norm_eps": "norm_eps",
    "bias": "bias",
}


def eagle_arguments(official: Mapping[str, Any]) -> dict[str, Any]:
    """A drafter's official configuration -> arguments of `Eagle`.

    Raises: ValueError on more layers than one, or grouped key-value heads, which no release has.
    """
    heads = official["num_attention_heads"]
    if official.get("num_hidden_layers", 1) != 1 or official.get("num_key_value_heads", heads) != heads:
        raise ValueError(
            f"a drafter has one layer and as many key-value heads as heads; the configuration says "
            f"{official.get('num_hidden_layers')} and {official.get('num_key_value_heads')} of {heads}"
        )
    arguments = {ours: official[name] for name, ours in _ARGUMENTS.items() if name in official}
    if official.get("model_type") == "chameleon":
        return {
            **CHAMELEON,
            **arguments,
            "line_length": official["max_position_embeddings"],
            "rope_base": official["rope_theta"],
        }
    return {
        **arguments,
        "prefix_length": official["cls_token_num"],
        "grid": round(official["block_size"] ** 0.5),
        "rope_base": official["rope_base"],
        "official_quirks": True,
    }


def read_eagle_arguments(state: Mapping[str, Tensor]) -> dict[str, Any]:
    """`Eagle` arguments from shapes; heads of 64 channels where no norm tells them."""
    size, width = state["embed_tokens.weight"].shape
    arguments = {
        "codebook_size": size,
        "hidden_size": width,
        "ffn_size": state["layers.0.mlp.gate_proj.weight"].shape[0],
        "bias": "fc.bias" in state,
        "norm_input": "layers.0.input_layernorm.weight" in state,
        "num_heads": max(width // 64, 1),
    }
    if _HEADS in state:
        return {**CHAMELEON, **arguments, "num_heads": state[_HEADS].shape[0]}
    return {**arguments, "official_quirks": True}


def read_settings(path: Path) -> dict[str, Any]:
    """The constructor arguments that a `config.json` beside a file tells; none without one, or one of ours."""
    beside = path.parent / "config.json"
    if not beside.is_file():
        return {}
    official = json.loads(beside.read_text(encoding="utf-8"))
    return eagle_arguments(official) if "num_attention_heads" in official else {}


register_format(
    OfficialFormat(
        "LANTERN drafter",
        _SIGN,
        "varkit.generators.eagle:Eagle",
        lambda state: "fc.weight" in state and "layers.0.self_attn.q_proj.weight" in state,
        read_eagle_arguments,
        Release("jadohu/LANTERN", "arXiv 2410.03355", "Chameleon licence (jadohu/LANTERN): research only", "other"),
        settings=read_settings,
    )
)
