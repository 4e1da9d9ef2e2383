"""TokenUnify: random, next and next-all token prediction, mixed (ICCV 2025, arXiv 2405.16847).

Source: ydchen0806/TokenUnify (221674f): dataloader/data_provider_pretraining_autoregress.py, src/segmamba_ar.py. The
paper is on microscopy volumes. For a discrete generator the unit is a group of its schedule: a token, or VAR's scale.

next      the generator's usual loss.
next_all  from a prefix of k groups, k uniform, every later token. The generator reads the prefix only: inputs of the
          groups after the next are filled. In a causal model this needs no other attention: what a later group sees
          besides the prefix are fills.
random    of a pyramid only: tokens hidden here and there add nothing to the map that finer scales read, and are
          predicted from the visible coarser ones. A raster generator cannot look past a hidden token: refused.
"""

from __future__ import annotations

import math
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from varkit.config import ConfigError, config
from varkit.rng import Draw, Rng
from varkit.training.objectives.variants.masks import random_subset


@config
class MixedPrediction:
    """Weights of the three predictions; each is a mean over the tokens it predicts."""

    next: float = 1.0
    next_all: float = 1.0
    random: float = 1.0
    schedule: Literal["joint", "alternate"] = "joint"  # all in every step, or one after the other
    period: int = 100  # alternate: steps of each before the next
    fill: Literal["mask", "zero", "noise"] = "mask"  # next_all: a learned input, zeros or normal noise after the prefix
    next_all_positions: Literal["rest", "all"] = "rest"  # all: the loss also of the prefix, as released
    random_ratio: float | None = None  # share of hidden tokens; None: cos(pi u / 2), as MaskGIT. Released: 0.1

    def __post_init__(self) -> None:
        if min(self.weights.values()) < 0 or not any(self.weights.values()):
            raise ConfigError(
                f"objective.mixed_prediction: weights must not be negative, and one of next, next_all, random must be "
                f"positive; got {self.weights}"
            )
        if self.period < 1:
            raise ConfigError(f"objective.mixed_prediction.period must be at least 1; got {self.period}")
        if self.random_ratio is not None and not 0 < self.random_ratio < 1:
            raise ConfigError(f"objective.mixed_prediction.random_ratio must be in (0, 1); got {self.random_ratio}")

    @property
    def weights(self) -> dict[str, float]:
        return {"next": self.next, "next_all": self.next_all, "random": self.random}


def active(options: MixedPrediction, step: int) -> dict[str, float]:
    """Name -> weight of the predictions that optimiser step `step` trains."""
    used = {name: weight for name, weight in options.weights.items() if weight}
    if options.schedule == "joint":
        return used
    name = list(used)[step // options.period % len(used)]
    return {name: used[name]}


def prefix_lengths(rng: Rng, groups: int) -> Tensor:
    """(B,) int64, uniform in 1 .. groups - 1."""
    u = rng.uniform(torch.zeros(1, dtype=torch.int64), Draw.PREFIX)[:, 0]
    return 1 + (u * (groups - 1)).long().clamp_max(groups - 2)


def hidden_tokens(options: MixedPrediction, rng: Rng, length: int) -> Tensor:
    """(B, L) bool: at least one token of each image."""
    ratio = torch.full((len(rng),), options.random_ratio or 0.0)
    if options.random_ratio is None:
        u = rng.uniform(torch.full((1,), length), Draw.HIDDEN)[:, 0]  # after the positions that the subset draws
        ratio = torch.cos(math.pi / 2 * u.cpu())
    counts = (ratio * length).long().clamp_min(1)
    return random_subset(rng, torch.ones(length, dtype=torch.bool), counts, Draw.HIDDEN)


def mean_weight(predicted: Tensor) -> Tensor:
    """(B, L) bool -> the weight of each token in a mean over the predicted ones of its image."""
    return predicted / predicted.sum(1, keepdim=True)


# ---- as released: volumes of continuous voxels -----------------------------------------------------------------


def to_patches(volume: Tensor, size: tuple[int, ...]) -> Tensor:
    """(D, H, W) -> (K, d, h, w), the first axis slowest."""
    for i, side in enumerate(size):
        volume = volume.unfold(i, side, side)
    return volume.reshape(-1, *size)


def from_patches(patches: Tensor, shape: tuple[int, ...]) -> Tensor:
    """The inverse of `to_patches`."""
    size = patches.shape[1:]
    counts = [n // s for n, s in zip(shape, size, strict=True)]
    return patches.reshape(*counts, *size).permute(0, 3, 1, 4, 2, 5).reshape(shape)


def show_prefix(volume: Tensor, size: tuple[int, ...], keep: int, noise: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """The first `keep` patches of a volume, the rest zero or `noise` (K - keep, d, h, w); and the next patch.

    Raises: ValueError when keep is not in 1 .. K - 1.
    """
    patches = to_patches(volume, size)
    if not 0 < keep < len(patches):
        raise ValueError(f"keep must be in 1 .. {len(patches) - 1}; got {keep}")
    shown = patches.clone()
    shown[keep:] = 0 if noise is None else noise
    return from_patches(shown, tuple(volume.shape)), patches[keep]


def hide_patches(volume: Tensor, size: tuple[int, ...], hidden: Tensor) -> Tensor:
    """The volume with the patches numbered `hidden` set to zero."""
    patches = to_patches(volume, size).clone()
    patches[hidden] = 0
    return from_patches(patches, tuple(volume.shape))


def regression_losses(volume_logits: Tensor, volume: Tensor, next_logits: Tensor, following: Tensor) -> dict[str, Any]:
    """Squared errors after a sigmoid: `next_all` of the whole volume, `next` of one patch, `joint` their sum."""
    losses = {
        "next_all": F.mse_loss(volume_logits.sigmoid(), volume),
        "next": F.mse_loss(next_logits.sigmoid(), following),
    }
    return {**losses, "joint": losses["next_all"] + losses["next"]}
