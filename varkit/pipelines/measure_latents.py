"""How the latents of a tokenizer are distributed over a set of images, as generators see them."""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch.utils.data import DataLoader, Subset
from tqdm.auto import tqdm

from varkit.data.images import collate, open_images
from varkit.data.latents import LatentStatistics, latent_sums
from varkit.data.transforms import ImageTransform, Mode


@torch.no_grad()
def measure_latents(
    tokenizer: Any,
    source: str,
    *,
    num: int = 10_000,
    split: str = "train",
    root: str | None = None,
    mode: Mode = "center",
    batch_size: int = 64,
    workers: int = 0,
    progress: bool = False,
) -> LatentStatistics:
    """Mean and standard deviation of each channel of the scaled latents, posterior noise included.

    Args:
        tokenizer: one with a posterior, on its device.
        source, split, root: as `varkit.data.open_images` takes them.   mode: how images get the tokenizer's size.
        num: images, evenly spaced over the set; all when there are fewer.
    Raises: ValueError before any work when tokens are ids.
    """
    if tokenizer.layout.codebook_size is not None:
        raise ValueError(f"{type(tokenizer).__name__} has {tokenizer.layout.describe()}: ids, not latents")
    if num < 1:
        raise ValueError(f"num must be at least 1; got {num}")
    dataset = open_images(source, split=split, root=root)
    dataset.transform = ImageTransform(tokenizer.image_size, mode=mode, enlarge=1.0)
    chosen = torch.linspace(0, len(dataset) - 1, min(num, len(dataset))).round().long().tolist()
    loader = DataLoader(Subset(dataset, chosen), batch_size, num_workers=workers, collate_fn=collate)
    device, dim = next(tokenizer.parameters()).device, tokenizer.layout.dim
    sums, count = torch.zeros(2, dim, dtype=torch.float64), 0
    for batch in tqdm(loader, disable=not progress, file=sys.stderr):
        mean, std = tokenizer.moments(batch["images"].to(device))
        sums += latent_sums(mean, std)
        count += mean.shape[0] * mean.shape[1]
    return LatentStatistics.of(sums, count)
