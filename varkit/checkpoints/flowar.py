"""Released FlowAR files <-> varkit: `FlowAR-S.pth`, `FlowAR-L.pth`, `FlowAR-H.pth`.

Source: FlowAR: models/flowar.py, models/flowmodel.py, models/sampler.py, README (21835c0).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from varkit import registry
from varkit.checkpoints.formats import OfficialFormat, Release, StateDict, register_format
from varkit.checkpoints.modulated import attentions, count, trunk_from_official, trunk_to_official
from varkit.layers.llama import rotary_frequencies
from varkit.tokenizers.latent_pyramid import SCALES

_SIGN = "flownet.input_proj.weight"
_CARDS = {768: "flowar_s.in1k_256", 1024: "flowar_l.in1k_256", 1536: "flowar_h.in1k_256"}


def flowar_arguments(official: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments of the official constructor -> those of `FlowAR`."""
    for stack in ("embed_dim", "num_heads"):
        if official[f"encoder_{stack}"] != official[f"decoder_{stack}"]:
            raise ValueError(
                f"FlowAR's two stacks have one width and as many heads; encoder and decoder_{stack} differ"
            )
    return {
        "num_classes": official["class_num"],
        "hidden_size": official["encoder_embed_dim"],
        "depths": (official["encoder_depth"], official["decoder_depth"]),
        "num_heads": official["encoder_num_heads"],
        "head_width": official["diffloss_w"],
        "head_depth": official["diffloss_d"],
        "cross": official["cross"],
        "scales": tuple(official["scale"]),
        "latent_dim": official["vae_embed_dim"],
        "dropout": official["proj_dropout"],
        "attention_dropout": official["attn_dropout"],
        "cond_drop_rate": official["label_drop_prob"],
    }


def head_arguments(official: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments of the official head -> those of `FlowHead`, but for the places of its tokens."""
    return {
        "channels": official["in_channels"],
        "context": official["z_channels"],
        "width": official["model_channels"],
        "depth": official["num_res_blocks"],
        "cross": official["cross"],
    }


def solver_arguments(num_steps: int) -> dict[str, Any]:
    """The official number of steps -> steps and solver: 50 are equal, any others jump, and one of an odd number of
    them is never taken."""
    if num_steps == 50:
        return {"head_steps": 50, "solver": "euler"}
    return {"head_steps": num_steps - num_steps % 2, "solver": "euler-jump"}


def sampling_arguments(official: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments of the official `sample_tokens` -> settings of `ContinuousSampler`. Its guidance is ours."""
    return {
        "guidance_scale": official["cfg"],
        "guidance_schedule": "linear",
        "guidance_times": (official.get("guidance_low", 0.0), official["guidance_high"]),
        **solver_arguments(official["num_steps"]),
    }


def head_from_official(state: StateDict) -> StateDict:
    """The keys of a head alone; its modulation is a pair of layers here, as that of the transformer is in the file."""
    kept = {k: v for k, v in state.items() if ".rope.freqs" not in k}
    return {re.sub(r"(res_blocks\.\d+\.ada_lin)\.(weight|bias)$", r"\1.1.\2", k): v for k, v in kept.items()}


def from_official(state: StateDict) -> StateDict:
    return head_from_official(trunk_from_official(state))


def to_official(state: StateDict, model: Any) -> StateDict:
    """With the tables of each attention, so that the official strict load accepts the file."""
    result = trunk_to_official(state, model.layout.sizes)
    result = {re.sub(r"(res_blocks\.\d+\.ada_lin)\.1\.", r"\1.", k): v for k, v in result.items()}
    for name in attentions(result):
        head_dim = 64 if name.startswith("flownet.") else model.config.hidden_size // model.config.num_heads
        result[f"{name}.rope.freqs"] = rotary_frequencies(head_dim)
    return result


def read_arguments(state: Mapping[str, Tensor]) -> dict[str, Any]:
    """`FlowAR` arguments from shapes.

    Raises: ValueError when the number of tokens is not that of scales which double from 1.
    """
    classes, width = state["class_emb.weight"].shape
    length = state["encoder_pos_embed_learned"].shape[1]
    lists = {sum(s * s for s in scales): scales for scales in (SCALES[:n] for n in range(1, len(SCALES) + 1))}
    if length not in lists:
        raise ValueError(f"the file has {length} positions; scales that double from 1 have {sorted(lists)}")
    return {
        "num_classes": classes - 1,
        "hidden_size": width,
        "depths": (count(state, "encoder_blocks."), count(state, "decoder_blocks.")),
        "num_heads": width // (4 * state["encoder_blocks.0.attn.rope.freqs"].shape[0]),
        "head_width": state[_SIGN].shape[0],
        "head_depth": count(state, "flownet.res_blocks."),
        "cross": "flownet.res_blocks.0.crossattn.q.weight" in state,
        "scales": lists[length],
        "latent_dim": state[_SIGN].shape[1],
    }


def readme_sampling(model: Any) -> dict[str, Any]:
    """What the README recommends for a model of this width; of another width, what it does for FlowAR-S."""
    return dict(registry.checkpoint(_CARDS.get(model.config.hidden_size, _CARDS[768])).sampling)


register_format(
    OfficialFormat(
        "FlowAR transformer",
        _SIGN,
        "varkit.generators.flowar:FlowAR",
        lambda state: _SIGN in state,
        read_arguments,
        Release("OliverRensu/FlowAR", "arXiv 2412.15205", "none stated (OliverRensu/FlowAR)", "other"),
        from_official=lambda state, model: from_official(state),
        to_official=to_official,
        sampling=readme_sampling,
    )
)
