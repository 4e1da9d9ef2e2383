"""What one step of an autoregressive model over latents draws: the five entities of xAR (arXiv 2502.20388, Algorithm
1), for clips one more, and how they may be seen in training.

| entity | tokens |
|---|---|
| token | one position |
| cell | a block of neighbouring positions |
| subsample | positions evenly spaced over the whole grid |
| scale | the whole picture, or all frames of a clip, at one size, coarse to fine |
| frame | of a clip: one frame of the latent |
| image | everything at once, of a clip all frames |
"""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import Literal

import torch
from torch import Tensor

from varkit.layout import Grid, square_grids

Entity = Literal["token", "cell", "subsample", "scale", "frame", "image"]
ContextNoise = Literal["independent", "clean", "increasing", "decreasing"]
"""The times at which the entities before are noised in training: drawn independently, or sorted so that noise increases
or decreases with the order; or `clean`: none."""

CONTEXT_NOISES = ("independent", "clean", "increasing", "decreasing")


def halves(grid: Grid) -> tuple[Grid, ...]:
    """The grid and what halving leaves of it, coarse to fine."""
    grids = [tuple(grid)]
    while max(grids[0]) > 1:
        grids.insert(0, tuple(max(1, side // 2) for side in grids[0]))
    return tuple(grids)


def entities(
    grid: Grid,
    entity: Entity = "cell",
    size: int | Sequence[int] | None = None,
    scales: Sequence[int | Sequence[int]] | None = None,
) -> tuple[tuple[Grid, ...], list[Tensor]]:
    """How latents are cut: the grids of their tokens, and the positions (n,) of each entity, in order of prediction.

    Args:
        grid: (h, w) of the latent, or (t, h, w) of a clip's.
        size: of a cell, its side, (height, width) or (frames, height, width) in tokens, in one frame where the number
            is not given; of a subsample, how many tokens a side, and in time, else all frames.
        scales: of entity scale, the sides, of a clip those of all its frames, or grids; None halves again and again.
    Raises: ValueError when there is no such entity, or it does not divide the grid.
    """
    frames, height, width = grid if len(grid) == 3 else (1, *grid)
    shown = "x".join(map(str, grid))
    every = torch.arange(frames * height * width)
    if entity == "scale":
        grids = halves((height, width)) if scales is None else square_grids(scales)
        if len(grid) == 3:
            grids = tuple(g if len(g) == 3 else (frames, *g) for g in grids)
        if grids[-1] != tuple(grid) or any(len(g) != len(grid) or g[:-2] != grids[-1][:-2] for g in grids):
            all_frames = f", and each have its {frames} frames" if len(grid) == 3 else ""
            raise ValueError(f"the last of the scales must be the whole latent, {shown}{all_frames}; got {scales}")
        if len(grids) < 2:
            raise ValueError(
                f"entity scale needs two scales or more, such as those of a LatentPyramid; got {grids}. One scale is "
                f"entity image"
            )
        sizes = [prod(g) for g in grids]
        return grids, list(torch.arange(sum(sizes)).split(sizes))
    whole = (tuple(grid),)
    if entity == "token":
        return whole, list(every.split(1))
    if entity == "image":
        return whole, [every]
    if entity == "frame":
        if len(grid) != 3:
            raise ValueError(f"entity frame is for clips, with a latent of (t, h, w); got {shown}")
        return whole, list(every.split(height * width))
    if entity not in ("cell", "subsample"):
        raise ValueError(f"entity must be token, cell, subsample, scale, frame or image; got {entity!r}")
    if size is None:
        raise ValueError(f"a {entity} needs its size (entity_size)")
    sides = (size, size) if isinstance(size, int) else tuple(size)
    if not 2 <= len(sides) <= len(grid):
        raise ValueError(f"a {entity} of a latent of {shown} has 2 to {len(grid)} sides; got entity_size {list(sides)}")
    deep, down, across = sides if len(sides) == 3 else (1 if entity == "cell" else frames, *sides)
    if min(deep, down, across) < 1 or frames % deep or height % down or width % across:
        raise ValueError(f"a {entity} of {'x'.join(map(str, sides))} does not divide a latent of {shown}")
    if entity == "cell":
        cut = every.view(frames // deep, deep, height // down, down, width // across, across)
        cut = cut.permute(0, 2, 4, 1, 3, 5)
    else:
        cut = every.view(deep, frames // deep, down, height // down, across, width // across)
        cut = cut.permute(1, 3, 5, 0, 2, 4)
    return whole, list(cut.reshape(-1, deep * down * across))


def group_of(sizes: Sequence[int]) -> Tensor:
    """(L,) int64: the entity of each token, in the order of prediction. Args: sizes: tokens of each entity."""
    return torch.tensor([i for i, size in enumerate(sizes) for _ in range(size)], device="cpu")


def check_context_noise(name: str) -> None:
    """Raises ValueError unless it is a `ContextNoise`."""
    if name not in CONTEXT_NOISES:
        raise ValueError(
            f"context_noise must be {', '.join(CONTEXT_NOISES[:-1])} or {CONTEXT_NOISES[-1]}; got {name!r}"
        )


def sorted_times(t: Tensor, noise: ContextNoise) -> Tensor:
    """Times (B, E), 1 being noise, in the order that a `ContextNoise` asks for."""
    if noise in ("increasing", "decreasing"):
        return t.sort(1, descending=noise == "decreasing").values
    return t


def entity_losses(error: Tensor, sizes: Sequence[int], weight: Tensor | float | None = None) -> dict[str, Tensor]:
    """What a loss over entities reports.

    Args:
        error: (B, L), of each token in the order of prediction.   sizes: tokens of each entity, in order.
        weight: of each token, a number or (B, L) in that order; None is 1 / L.
    Returns: loss; loss_first and loss_last, the means over the first and the last entity.
    """
    loss = error.mean() if weight is None else (error * weight).sum(1).mean()
    error = error.detach()
    return {"loss": loss, "loss_first": error[:, : sizes[0]].mean(), "loss_last": error[:, -sizes[-1] :].mean()}
