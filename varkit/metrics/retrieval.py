"""Does a model of texts draw what it was asked for? How often a matcher finds an image's caption among others.

The number means little alone: it depends on the matcher and on how many captions there are. So it stands beside that of
the real images of the same captions (what the matcher can do), of these through the image tokenizer, and of chance.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from varkit.data.images import ImageDataset, ImageTransform, open_images
from varkit.metrics.interval import bootstrap_interval
from varkit.rng import Rng

TOP = (1, 5)


@dataclass(frozen=True)
class Row:
    """One set of images. top1, top5: share whose caption is the likeliest, or among the five likeliest; the ends of
    95 % intervals, over images."""

    split: str
    images: str  # generated, reconstructed, real, or chance
    captions: int
    top1: float
    top5: float
    top1_interval: tuple[float, float] | None = None
    top5_interval: tuple[float, float] | None = None


def ranks(images: Tensor, texts: Tensor) -> Tensor:
    """For each image how many other captions are at least as near as its own: (N,) int64, 0 is the best.

    Args: images, texts: (N, D), row i of one goes with row i of the other.
    Raises: ValueError for other shapes, or values that are not finite.
    """
    if images.shape != texts.shape or images.dim() != 2 or not len(images):
        raise ValueError(f"as many texts as images, of one width: got {tuple(images.shape)}, {tuple(texts.shape)}")
    if not (images.isfinite().all() and texts.isfinite().all()):
        raise ValueError("embeddings hold values that are not finite")
    similar = images.double() @ texts.double().T
    own = similar.diagonal()[:, None]
    return (similar >= own).sum(1) - 1  # equals count against the image


def row(split: str, kind: str, found: Tensor) -> Row:
    """The scores of ranks (N,)."""
    hits = {k: (found < k).double() for k in TOP}
    means = {k: float(hit.mean()) for k, hit in hits.items()}
    ends = {k: tuple(bootstrap_interval(means[k], hits[k])) for k in TOP}
    return Row(split, kind, len(found), means[1], means[5], ends[1], ends[5])  # type: ignore[arg-type]


def chance(split: str, count: int) -> Row:
    return Row(split, "chance", count, 1 / count, min(5 / count, 1.0))


@torch.no_grad()
def retrieval(
    pipeline: Any,
    matcher: Any,
    data: str,
    *,
    splits: tuple[str, ...] = ("train", "test"),
    num: int = 128,
    seed: int = 0,
    batch_size: int = 32,
    announce: Callable[[str], None] = lambda text: None,
    **sampling: Any,
) -> list[Row]:
    """Draw the first `num` captions of each split, and let the matcher look for each image's caption among them.

    Args:
        pipeline: a `TextToImagePipeline`.   matcher: an `ImageTextMatcher` on the same device.
        data: captioned images; see `open_images`.   splits: of it, each by itself.
        sampling: settings of the pipeline's call; None is its default.
    Raises: ValueError where the pipeline takes no texts, a split has no captions, or sizes differ.
    """
    if pipeline.transformer.condition != "text":
        raise ValueError(
            f"the model is conditioned on a {pipeline.transformer.condition}; retrieval is for models of texts"
        )
    side, drawn = matcher.config.image_size, pipeline.image_tokenizer.image_size
    if tuple(drawn) != (side, side):
        raise ValueError(
            f"the model draws {drawn[0]}x{drawn[1]}, the matcher reads {side}x{side}; train one of that size"
        )
    opened = {split: _captioned(data, split, side, num) for split in splits}
    rows = []
    for split, (dataset, places) in opened.items():
        found = _found(pipeline, matcher, dataset, places, seed, batch_size, sampling, announce, split)
        rows += [*(row(split, kind, one) for kind, one in found.items()), chance(split, len(places))]
    return rows


def _captioned(data: str, split: str, side: int, num: int) -> tuple[ImageDataset, list[int]]:
    """The images of a split, and the places of the first `num` different captions."""
    dataset = open_images(data, split=split, transform=ImageTransform(side, mode="squash"))
    first: dict[str, int] = {}
    for place, text in enumerate(dataset.texts or []):
        if text.strip():
            first.setdefault(text, place)
    places = list(first.values())[:num]
    if len(places) < 2:
        raise ValueError(f"{dataset.source} has {len(places)} different captions; retrieval needs at least 2")
    return dataset, places


def _found(
    pipeline: Any, matcher: Any, dataset: ImageDataset, places: list[int], seed: int, batch_size: int,
    sampling: dict[str, Any], announce: Callable[[str], None], split: str
) -> dict[str, Tensor]:  # fmt: skip
    """Ranks of the images of each kind."""
    device, tokenizer = next(matcher.parameters()).device, pipeline.image_tokenizer
    kinds: dict[str, list[Tensor]] = {"generated": [], "reconstructed": [], "real": []}
    texts = []
    for first in range(0, len(places), batch_size):
        batch = dataset.__getitems__(places[first : first + batch_size])
        real = batch["images"].to(device)
        rng = Rng.from_seed(seed, len(real), first)
        drawn = pipeline(batch["texts"], rng=rng, output_type="pt", **sampling).images.to(device) * 2 - 1
        back = tokenizer.decode(tokenizer.encode(real)).float()
        for kind, images in zip(kinds, (drawn, back, real), strict=True):
            kinds[kind].append(matcher.embed_images(images.float()))
        texts.append(matcher.embed_texts(batch["texts"]))
        announce(f"{split}: {first + len(real)} of {len(places)} captions drawn")
    return {kind: ranks(torch.cat(some), torch.cat(texts)) for kind, some in kinds.items()}
