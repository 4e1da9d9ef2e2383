"""Official FlexTok files <-> varkit: `model.safetensors` of EPFL-VILAB/flextok_*.

Our modules carry the official parameter names, so no key changes. What a file's shapes cannot say, such as the scale
of time, stands in its configuration: nested dictionaries whose `_target_` names a class of the official code, in the
metadata of the file as Python literals, or in config.json beside it. It is read here against a list of the classes
whose meaning is known; nothing that it names is ever imported.

Source: apple/ml-flextok: flextok/ (87d00cc).
"""

from __future__ import annotations

import ast
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from varkit.checkpoints.formats import OfficialFormat, Release, StateDict, register_format
from varkit.tokenizers.kl_vae import arguments_of

LICENCE = "Apple research licence (apple/ml-flextok: LICENSE_WEIGHTS): research only"

KNOWN = {
    "StableDiffusionVAE",
    "SequentialModuleDictWrapper",
    "PerSampleOp",
    "channels_first_to_last",
    "channels_last_to_first",
    "PatchEmbedder",
    "PositionalEmbeddingAdder",
    "Registers1D",
    "BlockWiseSequencePacker",
    "FlexTransformer",
    "SequenceUnpacker",
    "LinearHead",
    "LinearLayer",
    "MaskedNestedDropout",
    "LearnedNullCond",
    "TimestepEmbedder",
    "ToPatchesLinearHead",
    "FSQ",
    "MinRFNoiseModule",
    "MinRFPipeline",
}
"""Last names of the `_target_` classes that varkit understands; all are of the package flextok."""

SECTIONS = ("vae", "encoder", "decoder", "regularizer", "flow_matching_noise_module", "pipeline")

FIXED = {
    ("encoder", "enc_posemb_module", "posemb_type"): "sincos",
    ("encoder", "enc_seq_packer", "mask_mode"): "causal_last",
    ("decoder", "dec_registers_posemb_module", "posemb_type"): "learnable_sum",
    ("decoder", "dec_patches_posemb_module", "posemb_type"): "sincos",
    ("decoder", "dec_seq_packer", "mask_mode"): "full",
    ("decoder", "dec_transformer", "adaLN_expansion"): 2,
    ("decoder", "dec_time_embedder", "frequency_embedding_size"): 256,
}
"""Settings that varkit has in one way only."""


def parse_settings(text: Any) -> Any:
    """Text that holds a Python literal as that literal, in mappings too; nothing is evaluated."""
    if isinstance(text, Mapping):
        return {k: parse_settings(v) for k, v in text.items()}
    if isinstance(text, str) and text[:1] in "{[(":
        try:
            return ast.literal_eval(text)
        except (ValueError, SyntaxError, MemoryError, RecursionError):
            raise ValueError(f"not a plain Python literal: {text[:60]!r}") from None
    return text


def check_targets(config: Any, where: str = "") -> None:
    """Raises ValueError naming the first `_target_` that is not on the list."""
    if isinstance(config, Mapping):
        target = config.get("_target_")
        if target is not None and not (str(target).startswith("flextok.") and str(target).split(".")[-1] in KNOWN):
            raise ValueError(f"{where or 'the configuration'} asks for {target!r}, which varkit does not know")
        for key, value in config.items():
            check_targets(value, f"{where}.{key}" if where else str(key))
    elif isinstance(config, list | tuple):
        for i, value in enumerate(config):
            check_targets(value, f"{where}[{i}]")


def flextok_arguments(config: Mapping[str, Any], vae: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """The official configuration -> arguments of `FlexTok`.

    Args: vae: the diffusers configuration of the VAE, where it is known; else it must come from the shapes.
    Raises: ValueError on a class or a setting that varkit does not have.
    """
    check_targets({k: config.get(k) for k in SECTIONS})
    encoder, decoder = (config[k]["module_dict"] for k in ("encoder", "decoder"))
    for (part, module, name), value in FIXED.items():
        given = config[part]["module_dict"][module].get(name, value)
        if given != value:
            raise ValueError(f"{part}.{module}.{name} is {given!r}; varkit has {value!r} only")
    patches = encoder["enc_patch_emb"]["patch_sizes"]
    if len(set(patches)) != 1:
        raise ValueError(f"patches must be square; the configuration has {list(patches)}")
    noise = config.get("flow_matching_noise_module") or {}
    arguments = {
        "num_registers": encoder["enc_register_module"]["n_max"],
        "levels": tuple(config["regularizer"]["levels"]),
        "encoder_width": encoder["enc_transformer"]["dim"],
        "encoder_depth": encoder["enc_transformer"]["depth"],
        "encoder_head_dim": encoder["enc_transformer"].get("head_dim", 64),
        "decoder_width": decoder["dec_transformer"]["dim"],
        "decoder_depth": decoder["dec_transformer"]["depth"],
        "decoder_head_dim": decoder["dec_transformer"].get("head_dim", 64),
        "patch_size": patches[0],
        "max_timestep": float(decoder["dec_time_embedder"].get("max_timestep", 1.0)),
        "sample_posterior": bool(config["vae"].get("sample_posterior", False)),
        "nested_dropout": decoder["dec_nested_dropout"].get("size_sampling_mode", "pow2"),
        "null_rate": float(decoder["dec_latent_dropout"].get("dropout_prob", 0.2)),
        "sigma": _sigma(noise),
        "mode_scale": float(noise.get("mode_scale") or 0.0),
        "stratified": bool(noise.get("stratisfied", False)),  # as spelled in the release
        "drop_quant_p": float(config["regularizer"].get("drop_quant_p", 0.0)),
        "corrupt_tokens_p": float(config["regularizer"].get("corrupt_tokens_p", 0.0)),
        "min_corrupt_tokens_p": config["regularizer"].get("min_corrupt_tokens_p"),
        "apply_corrupt_tokens_p": float(config["regularizer"].get("apply_corrupt_tokens_p", 0.2)),
    }
    scale = config["vae"].get("scaling_factor")
    if vae is not None:
        side = encoder["enc_posemb_module"]["max_sizes"][0] * patches[0]
        size = side * 2 ** (len(vae["block_out_channels"]) - 1)
        arguments["vae_config"] = arguments_of({**vae, **({} if scale is None else {"scaling_factor": scale})}, size)
    elif scale is not None:
        arguments["vae_config"] = {"scaling_factor": scale}
    return arguments


def _sigma(noise: Mapping[str, Any]) -> str:
    if noise.get("ln", False):
        return "logit-normal"
    return "mode" if noise.get("mode_scale") else "uniform"


def is_flextok(state: Mapping[str, Tensor]) -> bool:
    return "encoder.module_dict.enc_register_module.registers" in state


def read_arguments(state: Mapping[str, Tensor]) -> dict[str, Any]:
    """`FlexTok` arguments from the shapes of a file: heads of 64, the release's levels, and diffusers' defaults."""
    encoder, decoder = "encoder.module_dict.", "decoder.module_dict."
    registers, width = state[f"{encoder}enc_register_module.registers"].shape
    dim = state[f"{encoder}enc_to_latents.proj.weight"].shape[0]
    levels = (8, 8, 8, 5, 5, 5)
    if dim != len(levels):
        raise ValueError(f"the file quantises {dim} channels and does not say to how many levels: config.json must")
    vae = _vae_arguments(state)
    side = state[f"{encoder}enc_posemb_module.posembs"].shape[-1]
    patch = math.isqrt(state[f"{encoder}enc_patch_emb.patch_proj.weight"].shape[1] // vae["latent_channels"])
    return {
        "vae_config": {**vae, "image_size": side * patch * 2 ** (len(vae["block_out_channels"]) - 1)},
        "num_registers": registers,
        "levels": levels,
        "encoder_width": width,
        "encoder_depth": _count(state, f"{encoder}enc_transformer.blocks."),
        "decoder_width": state[f"{decoder}dec_from_latents.proj.weight"].shape[0],
        "decoder_depth": _count(state, f"{decoder}dec_transformer.blocks."),
        "patch_size": patch,
    }


def _count(state: Mapping[str, Tensor], prefix: str) -> int:
    return 1 + max(int(k.removeprefix(prefix).split(".")[0]) for k in state if k.startswith(prefix))


def _vae_arguments(state: Mapping[str, Tensor]) -> dict[str, Any]:
    root = "vae.vae.encoder."
    levels = _count(state, f"{root}down_blocks.")
    first = state[f"{root}conv_in.weight"]
    widths = tuple(state[f"{root}down_blocks.{i}.resnets.0.conv1.weight"].shape[0] for i in range(levels))
    return {
        "image_channels": first.shape[1],
        "latent_channels": state[f"{root}conv_out.weight"].shape[0] // 2,
        "block_out_channels": widths,
        "layers_per_block": _count(state, f"{root}down_blocks.0.resnets."),
        "mid_attention": f"{root}mid_block.attentions.0.to_q.weight" in state,
        "quant_convs": "vae.vae.quant_conv.weight" in state,
    }


def read_settings(path: Path) -> dict[str, Any]:
    """`FlexTok` arguments from the metadata of a .safetensors file, or else from config.json beside it; {} without.

    Raises: ValueError when they hold what varkit does not know.
    """
    config: Any = {}
    if path.suffix == ".safetensors":
        from safetensors import safe_open

        with safe_open(path, "pt") as file:
            config = file.metadata() or {}
    beside = path.with_name("config.json")
    if "encoder" not in config and beside.is_file():
        config = json.loads(beside.read_text())
    config = parse_settings(config)
    if not isinstance(config, Mapping) or not {"encoder", "decoder", "regularizer", "vae"} <= config.keys():
        return {}
    try:
        return flextok_arguments(config)
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"the configuration of {path} is not laid out as a FlexTok's: {error!r}") from None


def from_official(state: StateDict, model: Any) -> StateDict:
    """Drop the projection to features that some training runs keep beside the decoder (REPA): nothing reads it."""
    return {k: v for k, v in state.items() if not k.startswith("decoder.module_dict.dec_repa")}


register_format(
    OfficialFormat(
        "FlexTok tokenizer",
        "encoder.module_dict.enc_register_module.registers",
        "varkit.tokenizers.flextok:FlexTok",
        is_flextok,
        read_arguments,
        Release("apple/ml-flextok", "arXiv 2502.13967", LICENCE, "other"),
        from_official=from_official,
        settings=read_settings,
    )
)
