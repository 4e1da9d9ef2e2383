"""CLIP score: how well an image and its text agree, from their embeddings.

The value depends on the model that embeds and on how images are resized before: a printed score names both.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
from torch import Tensor

from varkit.metrics.features import check_features


class ClipScore(NamedTuple):
    """The mean over samples, and each of them (N,) float64."""

    value: float
    per_sample: Tensor


def clip_score(
    image_embeddings: Tensor,
    text_embeddings: Tensor,
    scale: float = 100.0,
    clamp: Literal["none", "sample", "mean"] = "none",
) -> ClipScore:
    """`scale` times the cosine of the two embeddings, in float64, averaged over samples.

    Args:
        image_embeddings, text_embeddings: (N, D), not normalised; row i of one goes with row i of the other.
        scale: 1 is a plain cosine (LlamaGen, LANTERN), 100 torchmetrics, 2.5 Hessel et al. (arXiv 2104.08718).
        clamp: what is raised to 0 where negative: nothing, each sample (Hessel et al.), or the mean (torchmetrics).
    Raises: ValueError for other shapes, values that are not finite, or an embedding of length 0, naming the rows.
    """
    if clamp not in ("none", "sample", "mean"):
        raise ValueError(f"clamp must be none, sample or mean; got {clamp!r}")
    pair = {"image embeddings": image_embeddings, "text embeddings": text_embeddings}
    rows = [check_features(features, name, least=1).double() for name, features in pair.items()]
    if rows[0].shape != rows[1].shape:
        raise ValueError(f"as many texts as images, of one width: got {tuple(rows[0].shape)}, {tuple(rows[1].shape)}")
    for name, features in zip(pair, rows, strict=True):
        if empty := (features.norm(dim=1) == 0).nonzero().flatten().tolist():
            raise ValueError(f"{name} of length 0 have no direction: rows {empty[:8]} (from 0)")
    first, second = (features / features.norm(dim=1, keepdim=True) for features in rows)
    per_sample = scale * torch.linalg.vecdot(first, second)
    if clamp == "sample":
        per_sample = per_sample.clamp_min(0)
    mean = float(per_sample.mean())
    return ClipScore(max(mean, 0.0) if clamp == "mean" else mean, per_sample)
