"""Official LlamaGen files <-> varkit: `vq_ds16_c2i.pt`, `c2i_B_256.pt` ... `t2i_XL_stage2_512.pt`.

The transformer carries the official parameter names; the tokenizer those of this project's one convolutional
autoencoder, with q, k and v of an attention as one convolution. A released file says nothing about the size of its
images: the card of a file's name does (`load_official`), or `grid=`.

Source: FoundationVision/LlamaGen: tokenizer/tokenizer_image/vq_model.py, autoregressive/models/gpt.py (ce98ec4).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from varkit.checkpoints.formats import OfficialFormat, Release, StateDict, register_format
from varkit.generators.llamagen import CLASS_SAMPLING, SIZES, TEXT_SAMPLING
from varkit.layers.llama import feed_forward_size

LICENCE = "MIT (FoundationVision/LlamaGen)"
HITS_KEY = "quantize.ema_vocab_hit_SV"  # ours alone: a moving average for training

_TOKENIZER_ARGUMENTS = {
    "codebook_size": "codebook_size",
    "codebook_embed_dim": "latent_dim",
    "codebook_l2_norm": "normalize_codes",
    "codebook_show_usage": "track_usage",
    "commit_loss_beta": "commitment_weight",
    "entropy_loss_ratio": "entropy_weight",
    "encoder_ch_mult": "channel_multipliers",
    "z_channels": "z_channels",
    "ch": "base_channels",
    "num_res_blocks": "num_res_blocks",
    "dropout_p": "dropout",
}
_GPT_ARGUMENTS = {
    "dim": "hidden_size",
    "n_layer": "depth",
    "n_head": "num_heads",
    "n_kv_head": "kv_heads",
    "rope_base": "rope_base",
    "norm_eps": "norm_eps",
    "token_dropout_p": "token_dropout",
    "attn_dropout_p": "attention_dropout",
    "resid_dropout_p": "dropout",
    "ffn_dropout_p": "ffn_dropout",
    "drop_path_rate": "drop_path_rate",
    "class_dropout_prob": "cond_drop_rate",
    "vocab_size": "codebook_size",
}


def tokenizer_arguments(official: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments of the official VQModel -> arguments of `VQGAN`. Raises ValueError where the two halves differ."""
    if official["encoder_ch_mult"] != official["decoder_ch_mult"]:
        raise ValueError("encoder and decoder must have the same multipliers; VQGAN has one list")
    return {ours: official[name] for name, ours in _TOKENIZER_ARGUMENTS.items() if name in official}


def transformer_arguments(official: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments of the official Transformer -> arguments of `LlamaGen`."""
    text = official["model_type"] == "t2i"
    return {
        **{ours: official[name] for name, ours in _GPT_ARGUMENTS.items() if name in official},
        "num_classes": None if text else official["num_classes"],
        "text_length": official["cls_token_num"] if text else 120,
        "text_dim": official.get("caption_dim", 2048),
        "ffn_size": feed_forward_size(official["dim"], official["multiple_of"], official.get("ffn_dim_multiplier")),
        "grid": round(official["block_size"] ** 0.5),
    }


def sampling_arguments(official: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments of the official `generate` -> settings of `NextGroupSampler`.

    cfg_scale is guidance_scale, and off up to 1. cfg_interval i >= 0 guides the tokens 0 to i + 1, -1 all.
    """
    interval = official.get("cfg_interval", -1)
    return {
        "guidance_scale": max(1.0, official["cfg_scale"]),
        "guidance_schedule": "constant",
        "guidance_interval": None if interval < 0 else (0, interval + 1),
        "temperature": max(official["temperature"], 1e-5),
        "top_k": official["top_k"] if official.get("sample_logits", True) else 1,
        "top_p": official["top_p"],
    }


# ---- tokenizer ----------------------------------------------------------------------------------------------------

_MIDDLE = ("block_1", "attn_1", "block_2")


def _levels(state: Mapping[str, Tensor]) -> int:
    found = [re.match(r"decoder\.(?:conv_blocks|up)\.(\d+)\.", key) for key in state]
    return 1 + max(int(m[1]) for m in found if m)


def _renamed(key: str, levels: int, to_ours: bool) -> str:
    """The name of a tensor of encoder or decoder; the official decoder counts levels from the coarsest."""
    half, _, rest = key.partition(".")
    part, _, tail = rest.partition(".")
    number, _, name = tail.partition(".")
    if part == "mid":
        where = _MIDDLE[int(number)] if to_ours else str(_MIDDLE.index(number))
        return f"{half}.mid.{where}.{name}"
    if part not in ("conv_blocks", "down", "up"):
        return key
    level = int(number) if half == "encoder" else levels - 1 - int(number)
    kind, _, last = name.partition(".")
    if to_ours:
        kind = "block" if kind == "res" else kind
        return f"{half}.{'down' if half == 'encoder' else 'up'}.{level}.{kind}.{last}"
    return f"{half}.conv_blocks.{level}.{'res' if kind == 'block' else kind}.{last}"


def tokenizer_from_official(state: StateDict, codebook_size: int) -> StateDict:
    """Rename, and join q, k and v. What `VQGAN` counts in training starts at zero."""
    levels, result = _levels(state), StateDict()
    for key, value in state.items():
        base, _, last = key.rpartition(".")
        if base.endswith(".q"):
            joined = torch.cat([state[f"{base[:-1]}{part}.{last}"] for part in "qkv"])
            result[_renamed(f"{base[:-1]}qkv.{last}", levels, True)] = joined
        elif not base.endswith((".k", ".v")):
            result[_renamed(key, levels, True)] = value
    weight = state["quantize.embedding.weight"]
    result[HITS_KEY] = torch.zeros(1, codebook_size, device=weight.device)
    return result


def tokenizer_to_official(state: StateDict) -> StateDict:
    levels, result = _levels(state), StateDict()
    for key, value in state.items():
        base, _, last = key.rpartition(".")
        if base.endswith(".qkv"):
            for part, piece in zip("qkv", value.chunk(3), strict=True):
                result[_renamed(f"{base[:-3]}{part}.{last}", levels, False)] = piece.contiguous()
        elif key != HITS_KEY:
            result[_renamed(key, levels, False)] = value
    return result


def is_tokenizer(state: Mapping[str, Tensor]) -> bool:
    return "encoder.conv_blocks.0.res.0.conv1.weight" in state and "quantize.embedding.weight" in state


def read_tokenizer_arguments(state: Mapping[str, Tensor]) -> dict[str, Any]:
    """`VQGAN` arguments from the shapes of an official file; codes are taken to be normalised, images to be 256 px."""
    levels = _levels(state)
    width, channels = state["encoder.conv_in.weight"].shape[:2]
    size, dim = state["quantize.embedding.weight"].shape
    blocks = 1 + max(int(k.split(".")[4]) for k in state if k.startswith("encoder.conv_blocks.0.res."))
    return {
        "codebook_size": size,
        "latent_dim": dim,
        "base_channels": width,
        "channel_multipliers": tuple(
            state[f"encoder.conv_blocks.{i}.res.0.conv1.weight"].shape[0] // width for i in range(levels)
        ),
        "num_res_blocks": blocks,
        "z_channels": state["quant_conv.weight"].shape[1],
        "image_channels": channels,
        "attention": f"encoder.conv_blocks.{levels - 1}.attn.0.norm.weight" in state,
        "mid_attention": "encoder.mid.1.norm.weight" in state,
        "track_usage": "quantize.codebook_used" in state,
        "grid": 256 // 2 ** (levels - 1),
    }


# ---- transformer --------------------------------------------------------------------------------------------------

CLASS_KEY = "cls_embedding.embedding_table.weight"
TEXT_KEY = "cls_embedding.uncond_embedding"


def transformer_from_official(state: StateDict) -> StateDict:
    """As released, but for the rotary table that old files carry."""
    return {k: v for k, v in state.items() if k != "freqs_cis"}


def _is_transformer(key: str) -> Callable[[Mapping[str, Tensor]], bool]:
    def is_it(state: Mapping[str, Tensor]) -> bool:
        keys = (key, "layers.0.attention.wqkv.weight", "tok_embeddings.weight")
        others = ("n_d_embed.weight", "adapter_mlp.fc1.weight", "abs_pe")  # a student's, ControlAR's, LARP's
        return all(k in state for k in keys) and not any(k in state for k in others)

    return is_it


def read_transformer_arguments(state: Mapping[str, Tensor]) -> dict[str, Any]:
    """`LlamaGen` arguments from the shapes of an official file.

    No key tells the heads: those of the released size with this width, or else 64 channels each. Images are taken to
    be 256 px.
    """
    size, width = state["tok_embeddings.weight"].shape
    heads = {w: h for _, w, h, _ in SIZES.values()}.get(width, max(width // 64, 1))
    joined = state["layers.0.attention.wqkv.weight"].shape[0]
    arguments: dict[str, Any] = {
        "depth": 1 + max(int(k.split(".")[1]) for k in state if k.startswith("layers.")),
        "hidden_size": width,
        "num_heads": heads,
        "kv_heads": None if joined == 3 * width else (joined // (width // heads) - heads) // 2,
        "ffn_size": state["layers.0.feed_forward.w1.weight"].shape[0],
        "codebook_size": size,
        "num_classes": state[CLASS_KEY].shape[0] - 1 if CLASS_KEY in state else None,
    }
    if TEXT_KEY in state:
        arguments["text_length"], arguments["text_dim"] = state[TEXT_KEY].shape
    return arguments


_RELEASE = Release("FoundationVision/LlamaGen", "arXiv 2406.06525", LICENCE, "mit")
register_format(
    OfficialFormat(
        "LlamaGen tokenizer",
        "encoder.conv_blocks.0.res.0.conv1.weight",
        "varkit.tokenizers.vqgan:VQGAN",
        is_tokenizer,
        read_tokenizer_arguments,
        _RELEASE,
        from_official=lambda state, model: tokenizer_from_official(state, model.config.codebook_size),
        to_official=lambda state, model: tokenizer_to_official(state),
    )
)
for _condition, _key, _sampling in (("class", CLASS_KEY, CLASS_SAMPLING), ("text", TEXT_KEY, TEXT_SAMPLING)):
    register_format(
        OfficialFormat(
            f"LlamaGen from {_condition}",
            _key,
            "varkit.generators.llamagen:LlamaGen",
            _is_transformer(_key),
            read_transformer_arguments,
            _RELEASE,
            from_official=lambda state, model: transformer_from_official(state),
            sampling=_sampling,
            condition=_condition,
        )
    )
