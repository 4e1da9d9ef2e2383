"""Official LARP files <-> varkit: `model.safetensors` of hywang66/LARP-L-long-tokenizer, -AR and -AR-FP.

Our modules carry the official parameter names, so no key changes. A tokenizer's file may come with or without its
prior. What shapes cannot say, such as the number of heads, stands in config.json beside a file of the hub: the
constructor's arguments, plain JSON, of which only known values are taken.

Source: hywang66/LARP: models/larp_tokenizer.py, models/larp_ar.py (8aaed63).
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from varkit.checkpoints.formats import OfficialFormat, Release, register_format
from varkit.generators.larp import CLASS_SAMPLING, SIZES
from varkit.layers.llama import feed_forward_size

LICENCE = "MIT (hywang66/LARP)"
CLASS_KEY = "cls_embedding.embedding_table.weight"
QUERIES = "encoder_latent_query_embed"

_TOKENIZER_FIXED = {
    "in_channels": 3,
    "encoder_name": "none",
    "decoder_name": "none",
    "transformer_name": "transformer_encoder_parallel",
    "learned_encoder_patch_pe": False,
    "learned_encoder_latent_query_embed": True,
    "learned_decoder_latent_pe": False,
    "learned_decoder_patch_query_embed": False,
    "use_encoder_patch_token_type_embed": False,
    "use_encoder_latent_query_token_type_embed": False,
    "use_decoder_latent_token_type_embed": False,
    "use_decoder_patch_query_token_type_embed": True,
    "latent_pe_scale_factor": 10000,
}
_REGULARIZER_FIXED = {"l2_normalized": True, "stochastic": True, "entropy_loss_weight": 0.0}
_PRIOR_FIXED = {"n_rounds": 2, "use_mix_ss": True, "avg_loss_over_rounds": True, "no_grad_before_last_round": False}
"""Settings that varkit has in one way only."""

PRIOR_SIZES = {"gptc-S": (384, 12, 6)}
"""Width, layers and heads by the official name; others are told by their shapes, with heads of 64."""

_AR_ARGUMENTS = {
    "dim": "hidden_size",
    "n_layer": "depth",
    "n_head": "num_heads",
    "norm_eps": "norm_eps",
    "token_dropout_p": "token_dropout",
    "attn_dropout_p": "attention_dropout",
    "resid_dropout_p": "dropout",
    "ffn_dropout_p": "ffn_dropout",
    "class_dropout_prob": "cond_drop_rate",
    "vocab_size": "codebook_size",
    "max_seq_len": "num_tokens",
}


def _require(given: Mapping[str, Any], fixed: Mapping[str, Any], where: str) -> None:
    for name, value in fixed.items():
        if given.get(name, value) != value:
            raise ValueError(f"{where}.{name} is {given[name]!r}; varkit has {value!r} only")


def tokenizer_arguments(official: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments of the official LARPTokenizer -> arguments of `LARPTokenizer`, but for the prior's sizes.

    Raises: ValueError on a setting that varkit does not have.
    """
    bottleneck = official["bottleneck"]["args"]
    regularizer, prior = bottleneck["regularizer"]["args"], official.get("prior_model") or {}
    _require(official, _TOKENIZER_FIXED, "tokenizer")
    _require(regularizer, _REGULARIZER_FIXED, "regularizer")
    _require(prior, _PRIOR_FIXED, "prior_model")
    for coarse in ("patch_size", "temporal_patch_size"):
        _require(official, {f"decoder_{coarse}": official[coarse]}, "tokenizer")
    arguments = {
        "num_tokens": official["bottleneck_token_num"],
        "codebook_size": regularizer["codebook_size"],
        "latent_dim": bottleneck["bottleneck_dim"],
        "num_frames": official["frame_num"],
        "resolution": official["input_size"],
        "frame_patch": official["temporal_patch_size"],
        "patch": official["patch_size"],
        **{
            f"{side}_size": tuple(official[f"{side}_{k}"] for k in ("hidden_size", "depth", "num_heads"))
            for side in ("encoder", "decoder")
        },
        "temperature": regularizer["stochastic_temperature"],
        "commitment_weight": regularizer["commitment_loss_weight"],
        "codebook_weight": regularizer["codebook_loss_weight"],
    }
    if prior:
        arguments["prior_temperature"] = prior["latent_ce_temperature"]
        arguments["prior_dropout"] = 0.0 if prior["no_dropout"] else 0.1
    if prior.get("name") in PRIOR_SIZES:
        arguments["prior_size"] = PRIOR_SIZES[prior["name"]]
    return arguments


def transformer_arguments(official: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments of the official LARP_AR (its ModelArgs) -> arguments of `LARP`.

    Raises: ValueError on a setting that varkit does not have.
    """
    fixed = {"use_fixed_pe": False, "model_type": "class_cond", "n_kv_head": None, "drop_path_rate": 0.0}
    _require(official, fixed, "config")
    frames = official["frame_prediction"]
    _require(official, {"cls_token_num": official["max_seq_len"] + 1 if frames else 1}, "config")
    return {
        **{ours: official[name] for name, ours in _AR_ARGUMENTS.items() if name in official},
        "condition": "frames" if frames else "class",
        "num_classes": 0 if frames else official["num_classes"],
        "ffn_size": feed_forward_size(official["dim"], official["multiple_of"], official.get("ffn_dim_multiplier")),
    }


def labels_from_official(labels: Tensor, num_classes: int) -> Tensor:
    """(B,) ids of which negative ones stand for no class -> ids of which `num_classes` does."""
    return labels.masked_fill(labels < 0, num_classes)


def sampling_arguments(official: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments of the official `generate` -> settings of `NextGroupSampler`.

    cfg_interval i >= 0 guides the tokens 0 to i + 1, -1 all.
    """
    interval = official.get("cfg_interval", -1)
    return {
        "guidance_scale": official["cfg_scale"],
        "guidance_schedule": "constant",
        "guidance_interval": None if interval < 0 else (0, interval + 1),
        "temperature": official["temperature"],
        "top_k": official["top_k"],
        "top_p": official["top_p"],
    }


# ---- from shapes --------------------------------------------------------------------------------------------------


def _depth(state: Mapping[str, Tensor], prefix: str) -> int:
    return 1 + max(int(k.removeprefix(prefix).split(".")[0]) for k in state if k.startswith(prefix))


def _heads(width: int) -> int:
    return max(width // 64, 1)


def read_tokenizer_arguments(state: Mapping[str, Tensor]) -> dict[str, Any]:
    """`LARPTokenizer` arguments from the shapes of a file: clips of 16 square frames, heads of 64."""
    num_tokens, width = state[QUERIES].shape
    size, dim = state["bottleneck.regularizer.embedding.weight"].shape
    frame_patch, patch = state["x_embedder.proj.weight"].shape[2:4]
    out_width, frames = state["decoder_patch_query_token_type_embed"].shape[2], 16
    patches = state["encoder_patch_pe"].shape[1]
    arguments: dict[str, Any] = {
        "num_tokens": num_tokens,
        "codebook_size": size,
        "latent_dim": dim,
        "num_frames": frames,
        "resolution": patch * math.isqrt(patches * frame_patch // frames),
        "frame_patch": frame_patch,
        "patch": patch,
        "encoder_size": (width, _depth(state, "encoder.blocks."), _heads(width)),
        "decoder_size": (out_width, _depth(state, "decoder.blocks."), _heads(out_width)),
        "prior_size": None,
    }
    if "prior_model.pos_emb" in state:
        length, prior_width = state["prior_model.pos_emb"].shape[1:]
        arguments["prior_size"] = (prior_width, _depth(state, "prior_model.blocks."), _heads(prior_width))
        arguments["prior_length"] = length
    return arguments


def read_transformer_arguments(state: Mapping[str, Tensor]) -> dict[str, Any]:
    """`LARP` arguments from the shapes of a file: the heads of the official size of this width, or else of 64."""
    size, width = state["output.weight"].shape
    length = state["abs_pe"].shape[1]
    return {
        "condition": "class" if CLASS_KEY in state else "frames",
        "num_classes": state[CLASS_KEY].shape[0] - 1 if CLASS_KEY in state else 0,
        "depth": _depth(state, "layers."),
        "hidden_size": width,
        "num_heads": {w: h for _, w, h, _ in SIZES.values()}.get(width, _heads(width)),
        "ffn_size": state["layers.0.feed_forward.w1.weight"].shape[0],
        "num_tokens": length if CLASS_KEY in state else length // 2,
        "codebook_size": size,
    }


# ---- config.json --------------------------------------------------------------------------------------------------


def _beside(path: Path, sign: str) -> dict[str, Any]:
    """config.json beside a released file, if it is one of the official code with this key; else {}."""
    file = path.with_name("config.json")
    if not file.is_file():
        return {}
    config = json.loads(file.read_text())
    for wrapper in ("args", "config"):
        if isinstance(config, Mapping) and isinstance(config.get(wrapper), Mapping):
            config = config[wrapper]
    return dict(config) if isinstance(config, Mapping) and sign in config else {}


def tokenizer_settings(path: Path) -> dict[str, Any]:
    """`LARPTokenizer` arguments from config.json beside the file, {} without: the prior's are those of its shapes."""
    config = _beside(path, "bottleneck_token_num")
    arguments = tokenizer_arguments(config) if config else {}
    arguments.pop("prior_size", None)  # a file may hold no prior, whatever its configuration says
    return arguments


def transformer_settings(path: Path) -> dict[str, Any]:
    """`LARP` arguments from config.json beside the file, {} without."""
    config = _beside(path, "cls_token_num")
    return transformer_arguments(config) if config else {}


def _is_generator(of_classes: bool) -> Any:
    def is_it(state: Mapping[str, Tensor]) -> bool:
        keys = ("abs_pe", "layers.0.attention.wqkv.weight", "tok_embeddings.weight")
        return all(k in state for k in keys) and (CLASS_KEY in state) == of_classes

    return is_it


_RELEASE = Release("hywang66/LARP", "arXiv 2410.21264", LICENCE, "mit")
register_format(
    OfficialFormat(
        "LARP tokenizer",
        QUERIES,
        "varkit.tokenizers.larp:LARPTokenizer",
        lambda state: QUERIES in state and "bottleneck.regularizer.embedding.weight" in state,
        read_tokenizer_arguments,
        _RELEASE,
        settings=tokenizer_settings,
    )
)
for _condition, _sampling in (("class", CLASS_SAMPLING), ("frames", {})):
    register_format(
        OfficialFormat(
            f"LARP from {_condition}",
            f"abs_pe {'with' if _condition == 'class' else 'without'} {CLASS_KEY}",
            "varkit.generators.larp:LARP",
            _is_generator(_condition == "class"),
            read_transformer_arguments,
            _RELEASE,
            sampling=_sampling,
            condition=_condition,
            settings=transformer_settings,
        )
    )
