"""Released ELM files <-> varkit: `binaryae_ema.th`, `L-2-12.pth`, `mlmL-1-16.pth` and alike.

The names of weights are the same. An autoencoder's file holds its discriminator and LPIPS too: the keys that begin
with `ae.` are taken, without that, and the others left.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from varkit.checkpoints.formats import OfficialFormat, Release, StateDict, register_format
from varkit.generators.elm import AR_SAMPLING, SIZES
from varkit.generators.elm_masked import MASKED_SAMPLING, ELMMasked
from varkit.layers.llama import feed_forward_size

_RELEASE = Release("Pepper-lll/LMforImageGeneration", "arXiv 2410.16257", "not stated with the files", "other")
_PREFIX = "ae."
_BITS = "quantize.embed.weight"


# ---- binary autoencoder -------------------------------------------------------------------------------------------


def autoencoder_arguments(official: Mapping[str, Any], sub_codes: int = 2) -> dict[str, Any]:
    """Official constructor arguments -> those of `BinaryAutoencoder`."""
    if not official["norm_first"] or official["use_tanh"] or official["quantizer"] != "binary":
        raise ValueError("only binary autoencoders with norm_first and without use_tanh, as released")
    return {
        "bits": official["codebook_size"],
        "sub_codes": sub_codes,
        "latent_dim": official["emb_dim"],
        "base_channels": official["nf"],
        "channel_multipliers": tuple(official["ch_mult"]),
        "num_res_blocks": official["res_blocks"],
        "image_channels": official["n_channels"],
        "grid": official["img_size"] // 2 ** (len(official["ch_mult"]) - 1),
    }


def images_from_official(images: Tensor) -> Tensor:
    """[0, 1] -> [-1, 1], where varkit's images lie."""
    return images * 2 - 1


def images_to_official(images: Tensor) -> Tensor:
    return (images + 1) / 2


def autoencoder_from_official(state: StateDict) -> StateDict:
    """Without the training's other networks, if the file has them."""
    if _PREFIX + _BITS not in state:
        return state
    return {k.removeprefix(_PREFIX): v for k, v in state.items() if k.startswith(_PREFIX)}


def is_autoencoder(state: Mapping[str, Tensor]) -> bool:
    return _BITS in state or _PREFIX + _BITS in state


def read_autoencoder_arguments(state: Mapping[str, Tensor]) -> dict[str, Any]:
    """`BinaryAutoencoder` arguments from shapes.

    No key tells the grid, which is that of 256 x 256, nor the number of sub-codes: two, as most generators have.
    """
    own = autoencoder_from_official(dict(state))
    width, channels = own["encoder.blocks.0.weight"].shape[:2]
    bits, dim = own[_BITS].shape
    downs = sorted(
        int(k.split(".")[2]) for k in own if k.startswith("encoder.blocks.") and k.split(".")[3:] == ["conv", "weight"]
    )
    first_of_level = [1, *(i + 1 for i in downs)]
    return {
        "bits": bits,
        "sub_codes": 2,
        "latent_dim": dim,
        "base_channels": width,
        "channel_multipliers": tuple(own[f"encoder.blocks.{i}.conv1.weight"].shape[0] // width for i in first_of_level),
        "num_res_blocks": first_of_level[1] - 2,
        "image_channels": channels,
        "grid": 256 // 2 ** len(downs),
    }


# ---- transformers -------------------------------------------------------------------------------------------------

GUIDANCE = {"linear": "linear-next", "constant": "constant", "cos": "sine"}
"""Official names of guidance schedules -> ours."""


def transformer_arguments(official: Mapping[str, Any]) -> dict[str, Any]:
    """Official constructor arguments -> those of `ELM` and `ELMMasked`; `block_size` becomes a square grid."""
    if official["use_adaLN"] or official["pos_type"] != "rope2d" or official["cls_row"] or official["pause"]:
        raise ValueError("only transformers with rope2d, and without adaLN, class row or pause tokens, as released")
    width = official["dim"]
    return {
        "num_classes": official["num_classes"],
        "depth": official["n_layer"],
        "hidden_size": width,
        "num_heads": official["n_head"],
        "ffn_size": feed_forward_size(width, official["multiple_of"], official["ffn_dim_multiplier"]),
        "token_dropout": official["token_dropout_p"],
        "dropout": official["resid_dropout_p"],
        "ffn_dropout": official["ffn_dropout_p"],
        "norm_eps": official["norm_eps"],
        "rope_base": float(official["rope_base"]),
        "cond_drop_rate": official["class_dropout_prob"],
        "grid": int(official["block_size"] ** 0.5),
        "sub_codes": official["token_each"],
        "code_bits": official["code_dim"],
    }


def _tables(state: Mapping[str, Tensor]) -> Tensor | None:
    return state.get("tok_embedder.weight", state.get("tok_embedder.0.weight"))


def is_transformer(state: Mapping[str, Tensor]) -> bool:
    return _tables(state) is not None and "layers.0.attention.wqkv.weight" in state and "mlm_layer.bias" not in state


def read_transformer_arguments(state: Mapping[str, Tensor]) -> dict[str, Any]:
    """Arguments from shapes. No key tells the heads: those of the released size with this width, or else 64 channels
    each. Images are taken to be 256 px.
    """
    table = _tables(state)
    assert table is not None
    rows, width = table.shape
    return {
        "num_classes": state["cls_embedding.embedding_table.weight"].shape[0] - 1,
        "depth": 1 + max(int(k.split(".")[1]) for k in state if k.startswith("layers.")),
        "hidden_size": width,
        "num_heads": {w: h for _, w, h in SIZES.values()}.get(width, max(width // 64, 1)),
        "ffn_size": state["layers.0.feed_forward.w1.weight"].shape[0],
        "sub_codes": 1 if "proj.weight" not in state else state["proj.weight"].shape[1] // width,
        "code_bits": rows.bit_length() - 1,  # of 2 ** bits rows, or one more with a mask
    }


register_format(
    OfficialFormat(
        "ELM transformer",
        "tok_embedder.0.weight",
        "varkit.generators.elm:ELM",
        is_transformer,
        read_transformer_arguments,
        _RELEASE,
        sampling=AR_SAMPLING,
    )
)


def is_masked(state: Mapping[str, Tensor]) -> bool:
    return "mlm_layer.bias" in state and "tok_embedder.weight" in state


def masked_from_official(state: StateDict, model: ELMMasked) -> StateDict:
    """Released files most probably lack the heads that are not read, though the official class has them: zeros."""
    heads = {k: torch.zeros(v.shape) for k, v in model.state_dict().items() if k.startswith("output.")}
    return {**heads, **state}


register_format(
    OfficialFormat(
        "ELM masked transformer",
        "mlm_layer.bias",
        "varkit.generators.elm_masked:ELMMasked",
        is_masked,
        read_transformer_arguments,
        _RELEASE,
        from_official=masked_from_official,
        sampling=MASKED_SAMPLING,
    )
)
register_format(
    OfficialFormat(
        "ELM binary autoencoder",
        _BITS,
        "varkit.tokenizers.binary_autoencoder:BinaryAutoencoder",
        is_autoencoder,
        read_autoencoder_arguments,
        _RELEASE,
        from_official=lambda state, model: autoencoder_from_official(state),
    )
)
