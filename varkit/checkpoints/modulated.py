"""What the key maps of xAR's and FlowAR's files share: their trunk, and the tables that every file repeats.

Source: OliverRensu/xAR: models/xar.py (121e9c9), FlowAR: models/flowar.py (21835c0).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from varkit.checkpoints.formats import StateDict
from varkit.layers.modulated import block_mask

_TRUNK = ("encoder_", "decoder_", "z_proj_ln.")
"""How the keys of a trunk begin; in a file they stand among the others."""


def trunk_from_official(state: StateDict) -> StateDict:
    """Keys of the trunk under a name of their own; computed tables dropped."""
    kept = {k: v for k, v in state.items() if k != "mask" and ".rope.freqs" not in k}
    return {f"trunk.{k}" if k.startswith(_TRUNK) else k: v for k, v in kept.items()}


def trunk_to_official(state: StateDict, sizes: Sequence[int]) -> StateDict:
    """The other way, with the mask of groups of these sizes: 0 where a token is seen, else -inf."""
    seen = block_mask(sizes)
    mask = torch.zeros(seen.shape).masked_fill(~seen, -torch.inf)[None, None]
    return {"mask": mask, **{k.removeprefix("trunk."): v for k, v in state.items()}}


def count(state: Mapping[str, Tensor], prefix: str) -> int:
    """Entries of a list of modules."""
    return 1 + max(int(k.removeprefix(prefix).split(".")[0]) for k in state if k.startswith(prefix))


def attentions(state: Mapping[str, Tensor]) -> list[str]:
    """The prefixes of all attentions that have a rotary table, such as `encoder_blocks.0.attn`."""
    ends = (".attn.proj.weight", ".crossattn.proj.weight")
    return [k.removesuffix(".proj.weight") for k in state if k.endswith(ends)]
