"""Released NBP files <-> varkit: `magvit2_ucf.pt`, `ucf_base_nbp16_hybrid.ckpt` and the others.

Source: RenShuhuai-Andy/NBP: nbp/magvit2.py, nbp/lm_transformer.py, nbp/download.py (421e936). The tokenizer's file is a
mapping with the entry `model_state_dict`, whose keys begin with `module.`; its layers are numbered through, and no key
tells the strides, which follow from the widths before depth becomes places. The generators' are Lightning's.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from varkit.checkpoints.formats import OfficialFormat, Release, StateDict, register_format
from varkit.generators.nbp import GIVEN, HYBRID, SAMPLING, SIZES

LICENCE = "MIT (RenShuhuai-Andy/NBP)"
HITS_KEY = "quantize.ema_vocab_hit_SV"  # ours alone: a moving average for training
RELEASED_STRIDES = {4: (1, 2, 2), 8: (2, 2, 2)}
"""By how many places a pixel of the coarser stage becomes."""
_TOKENIZER_SIGN = "encoder_layers.0.conv.weight"
_UNIT = {
    "fn.0": "norm1",
    "fn.1": "swish1",
    "fn.2.conv": "conv1",
    "fn.3": "norm2",
    "fn.4": "swish2",
    "fn.5.conv": "conv2",
    "residual_fn.0.conv": "shortcut",
}

# ---- tokenizer ----------------------------------------------------------------------------------------------------


def _layers(num_units: list[int]) -> Iterator[tuple[str, str]]:
    """Official names of modules and ours, for so many units a stage."""
    last = len(num_units) - 1
    for half, order in (("encoder", range(last + 1)), ("decoder", range(last, -1, -1))):
        official = f"{half}_layers"
        yield f"{official}.0.conv", f"{half}.conv_in"
        count = 1
        for stage in order:
            if half == "decoder" and stage < last:
                yield f"{official}.{count}.conv", f"decoder.up.{stage}"
                count += 2  # the second has no weights
            for unit in range(num_units[stage]):
                for theirs, ours in _UNIT.items():
                    yield f"{official}.{count}.{theirs}", f"{half}.stages.{stage}.{unit}.{ours}"
                count += 1
            if half == "encoder" and stage < last:
                yield f"{official}.{count}.conv", f"encoder.down.{stage}"
                count += 1
        yield f"{official}.{count}", f"{half}.norm_out"
        yield f"{official}.{count + 1}", f"{half}.swish_out"
        yield f"{official}.{count + 2}" + ("" if half == "encoder" else ".conv"), f"{half}.conv_out"


def _renamed(state: StateDict, names: dict[str, str]) -> StateDict:
    """Keys whose module is among `names` get the new name; others stay, for strict loading to name them."""
    renamed = {}
    for key, tensor in state.items():
        module, _, leaf = key.rpartition(".")
        renamed[f"{names[module]}.{leaf}" if module in names else key] = tensor
    return renamed


def tokenizer_from_official(state: StateDict, model: Any) -> StateDict:
    config = model.config
    hits = torch.zeros(1, model.layout.codebook_size, device=state[_TOKENIZER_SIGN].device)
    return {**_renamed(state, dict(_layers(list(config.num_units)))), HITS_KEY: hits}


def tokenizer_to_official(state: StateDict, model: Any) -> StateDict:
    names = {ours: theirs for theirs, ours in _layers(list(model.config.num_units))}
    return _renamed({k: v for k, v in state.items() if k != HITS_KEY}, names)


def tokenizer_arguments(official: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments of the official VideoTokenizer -> arguments of `MagViT2`; `channel_map` may change its widths."""
    changed = official.get("channel_map", {})
    widths = [changed.get(str(w), w) for w in (128, 256, 256, 512)]
    return {
        "image_size": official["image_size"],
        "base_channels": widths[0],
        "widths": widths,
        "levels": official["fsq_levels"],
    }


def read_tokenizer_arguments(state: Mapping[str, Tensor]) -> dict[str, Any]:
    """`MagViT2` arguments from shapes. No key tells the levels, which are those of the release, nor the size of clips,
    which is 17 frames of 128x128; strides are looked up by how many places they make."""

    def kinds(half: str) -> list[tuple[bool, tuple[int, ...]]]:
        """In order, of layers with a 3x3x3 convolution: whether it is a unit, and that convolution's shape."""
        found = {}
        for key, tensor in state.items():
            match = re.fullmatch(rf"{half}_layers\.(\d+)\.(fn\.2\.)?conv\.weight", key)
            if match:
                found[int(match[1])] = (match[2] is not None, tuple(tensor.shape))
        return [found[i] for i in sorted(found)]

    base = state[_TOKENIZER_SIGN].shape[0]
    widths, num_units = [base], [0]
    for is_unit, shape in kinds("encoder")[1:]:
        if not is_unit:
            num_units.append(0)
            widths.append(shape[0])
        else:
            num_units[-1] += 1
            widths[-1] = shape[0]
    ups = [shape for is_unit, shape in kinds("decoder")[1:-1] if not is_unit][::-1]
    strides = []
    for shape, width, coarser, count in zip(ups, widths, widths[1:], num_units, strict=False):
        places = shape[0] // (coarser if count else width)
        if places not in RELEASED_STRIDES:
            raise ValueError(f"the decoder makes {places} places of one; known are {sorted(RELEASED_STRIDES)}")
        strides.append(RELEASED_STRIDES[places])
    return {"base_channels": base, "widths": widths, "num_units": num_units, "strides": strides}


def tokenizer_file(state: StateDict) -> dict[str, Any]:
    """What the official loader opens: it drops the first seven characters of every key."""
    return {"model_state_dict": {f"module.{k}": v for k, v in state.items()}}


# ---- generator ----------------------------------------------------------------------------------------------------

_SIGN = "transformer.pos_emb"
_PART, _TOKENIZER_PART = "transformer.", "first_stage_model."
_NULL = "uncond_embedding"
RELEASED_BLOCK = 16
"""A latent row: also the number of ids of learned tokens."""


def generator_from_official(state: StateDict) -> StateDict:
    """Without the tokenizer and what is a mask, which the official loader skips too, and without an empty buffer."""
    ours = {k.removeprefix(_PART): v for k, v in state.items() if not k.startswith(_TOKENIZER_PART) and "mask" not in k}
    return {k: v for k, v in ours.items() if k != _NULL or len(v)}


def generator_to_official(state: StateDict, model: Any) -> StateDict:
    """Raises ValueError for a model that the official code has no place for."""
    if "class_emb.weight" in state or (model.config.first == "begin"):
        raise ValueError(
            "the official code knows models of texts (first=hybrid) and of given frames (first=given) alone; this one "
            f"has first={model.config.first} and {model.num_classes} classes"
        )
    if _NULL not in state:
        state = {**state, _NULL: state["pos_emb"].new_zeros(0, state["pos_emb"].shape[-1])}
    return {f"{_PART}{k}": v for k, v in state.items()}


def generator_arguments(official: Mapping[str, Any], grid: Sequence[int]) -> dict[str, Any]:
    """Options of the official training, and its vocabularies, -> arguments of `NBP`.

    Args: official: `args`, `first_stage_vocab_size` and `cond_stage_vocab_size`.   grid: (t, h, w) of the tokens.
    """
    args = official["args"]
    return {
        "num_classes": 0,
        "depth": args["n_layer"],
        "hidden_size": args["n_embd"],
        "num_heads": args["n_head"],
        "grid": grid,
        "codebook_size": official["first_stage_vocab_size"],
        "block": args["token_number_per_step"],
        "first": "hybrid" if args["hybrid"] else "given",
        "text_length": args["cond_token_num"],
        "text_vocab": official["cond_stage_vocab_size"],
        "max_positions": args["block_size"],
        "dropout": args["transformer_dropout"],
    }


def read_generator_arguments(state: Mapping[str, Tensor]) -> dict[str, Any]:
    """`NBP` arguments from shapes. No key tells the heads, which are those of the released size with this width and
    depth, nor the grid and the codebook, which are the released ones, nor the block, which is a row of 16."""
    rows, width = state[f"{_PART}tok_emb.weight"].shape
    depth = 1 + max(int(k.split(".")[2]) for k in state if k.startswith(f"{_PART}blocks."))
    heads = {(d, w): h for d, w, h, _ in SIZES.values()}.get((depth, width), max(width // 96, 1))
    length = state[f"{_PART}{_NULL}"].shape[0]
    common = {"depth": depth, "hidden_size": width, "num_heads": heads, "max_positions": state[_SIGN].shape[1]}
    if not length:
        return {**GIVEN, **common, "codebook_size": rows}
    return {**HYBRID, **common, "text_length": length, "text_vocab": rows - 64000 - RELEASED_BLOCK}


def generator_file(state: StateDict) -> dict[str, Any]:
    """What the official loader opens, as Lightning writes it."""
    return {"state_dict": state}


_RELEASE = Release("RenShuhuai-Andy/NBP", "arXiv 2502.07737", LICENCE, "mit")
register_format(
    OfficialFormat(
        "NBP tokenizer",
        _TOKENIZER_SIGN,
        "varkit.tokenizers.magvit2:MagViT2",
        lambda state: _TOKENIZER_SIGN in state and "decoder_layers.0.conv.weight" in state,
        read_tokenizer_arguments,
        _RELEASE,
        from_official=tokenizer_from_official,
        to_official=tokenizer_to_official,
        wrapped=tokenizer_file,
    )
)
register_format(
    OfficialFormat(
        "NBP transformer",
        _SIGN,
        "varkit.generators.nbp:NBP",
        lambda state: _SIGN in state and f"{_PART}tok_emb.weight" in state,
        read_generator_arguments,
        _RELEASE,
        from_official=lambda state, model: generator_from_official(state),
        to_official=generator_to_official,
        wrapped=generator_file,
        sampling=SAMPLING,
    )
)
