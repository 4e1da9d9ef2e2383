"""Released TiTok and TA-TiTok tokenizers <-> varkit. The keys are the same; no key tells the image's size in the legacy
models' VQGAN, the patch does."""

from __future__ import annotations

from collections.abc import Mapping
from math import isqrt
from typing import Any

from torch import Tensor

from varkit.checkpoints.formats import OfficialFormat, Release, register_format
from varkit.checkpoints.maskgit_vqgan import decoder_shape

_SIGN = "encoder.latent_token_positional_embedding"
_SIZES = {"small": (512, 8, 8), "base": (768, 12, 12), "large": (1024, 24, 16)}


def titok_arguments(official: Mapping[str, Any], text_aware: bool = False) -> dict[str, Any]:
    """Official configuration (`model.vq_model`, `dataset.preprocessing`) -> arguments of `TiTok`.

    Args: official: as the released YAML files; `tiny` and `pixel_decoder` may describe other sizes.
    """
    vq = official["model"]["vq_model"]
    tiny = official.get("tiny", {})
    sizes = {**_SIZES, "tiny": (tiny.get("width"), tiny.get("layers"), tiny.get("heads"))}
    if vq["vit_enc_patch_size"] != vq["vit_dec_patch_size"]:
        raise ValueError(f"encoder and decoder patches differ: {vq['vit_enc_patch_size']}, {vq['vit_dec_patch_size']}")
    arguments = {
        "num_tokens": vq["num_latent_tokens"],
        "codebook_size": vq["codebook_size"] if vq.get("quantize_mode", "vq") == "vq" else None,
        "latent_dim": vq["token_size"],
        "resolution": official["dataset"]["preprocessing"]["crop_size"],
        "patch": vq["vit_enc_patch_size"],
        "encoder_size": sizes[vq["vit_enc_model_size"]],
        "decoder_size": sizes[vq["vit_dec_model_size"]],
        "normalize_codes": vq.get("use_l2_norm", False),
        "clustering": vq.get("clustering_vq", False),
        "commitment_weight": vq.get("commitment_cost", 0.25),
        "legacy": vq.get("is_legacy", True),
    }
    if text_aware:
        arguments |= {"text_length": vq["text_context_length"], "text_dim": vq["text_embed_dim"]}
    if arguments["legacy"] and "pixel_decoder" in official:
        proxy = official["pixel_decoder"]
        arguments |= {
            "proxy_codes": proxy["num_embeddings"],
            "proxy_dim": proxy["z_channels"],
            "proxy_channels": proxy["hidden_channels"],
            "proxy_multipliers": proxy["channel_mult"],
            "proxy_blocks": proxy["num_res_blocks"],
        }
    return arguments


def read_titok_arguments(state: Mapping[str, Tensor]) -> dict[str, Any]:
    """`TiTok` arguments from shapes. No key tells the heads, which are those of the released sizes, or 64 channels
    each; nor whether codes are normalised, which those of the legacy models are."""

    def size(part: str) -> tuple[int, int, int]:
        width = state[f"{part}.ln_pre.weight"].shape[0]
        depth = 1 + max(int(k.split(".")[2]) for k in state if k.startswith(f"{part}.transformer."))
        return width, depth, max(width // 64, 1)

    legacy = "decoder.ffn.2.weight" in state
    patch = state["encoder.patch_embed.weight"].shape[-1]
    codes = state.get("quantize.embedding.weight")
    arguments: dict[str, Any] = {
        "num_tokens": state["latent_tokens"].shape[0],
        "codebook_size": None if codes is None else codes.shape[0],
        "latent_dim": state["decoder.decoder_embed.weight"].shape[1],
        "resolution": isqrt(state["encoder.positional_embedding"].shape[0] - 1) * patch,
        "patch": patch,
        "image_channels": state["encoder.patch_embed.weight"].shape[1],
        "encoder_size": size("encoder"),
        "decoder_size": size("decoder"),
        "normalize_codes": legacy,
        "clustering": "quantize.embed_prob" in state,
        "legacy": legacy,
    }
    if "decoder.text_guidance_proj.weight" in state:
        arguments["text_length"] = state["decoder.text_guidance_positional_embedding"].shape[0]
        arguments["text_dim"] = state["decoder.text_guidance_proj.weight"].shape[1]
    if legacy:
        width, multipliers, blocks = decoder_shape(state, "pixel_decoder.")
        arguments["proxy_codes"], arguments["proxy_dim"] = state["pixel_quantize.embedding.weight"].shape
        arguments |= {"proxy_channels": width, "proxy_multipliers": multipliers, "proxy_blocks": blocks}
    return arguments


def tokens_to_official(tokens: Tensor) -> Tensor:
    """Ids (B, N) -> (B, 1, N); vectors (B, N, C) -> (B, C, 1, N)."""
    return tokens[:, None] if tokens.dim() == 2 else tokens.transpose(1, 2)[:, :, None]


def vectors_from_official(z: Tensor) -> Tensor:
    """(B, C, 1, N) -> (B, N, C)."""
    return z.squeeze(2).transpose(1, 2)


register_format(
    OfficialFormat(
        "TiTok tokenizer",
        _SIGN,
        "varkit.tokenizers.titok:TiTok",
        lambda state: _SIGN in state and "decoder.decoder_embed.weight" in state and "latent_tokens" in state,
        read_titok_arguments,
        Release("bytedance/1d-tokenizer", "arXiv 2406.07550", "Apache-2.0 (bytedance/1d-tokenizer)", "apache-2.0"),
    )
)
