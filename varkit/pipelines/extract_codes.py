"""Coding a set of images, or of clips of videos, once: sharded, resumable, by any number of processes.

    extract_codes("fashion-vq-tokenizer", "photos/", Path("codes"), views=Views(flip=True))

The official trainers of LlamaGen and RAR read such files: ten crops and mirror images of each image, coded beforehand.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from copy import copy
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Subset
from tqdm.auto import tqdm

from varkit.data.clip_rules import ClipRule
from varkit.data.clips import ClipDataset, open_clips
from varkit.data.codes import (
    CodeInfo,
    shard_is_whole,
    storage_dtype,
    write_shard,
)
from varkit.data.images import ImageDataset, collate, open_images
from varkit.data.latents import latent_sums
from varkit.data.transforms import RANDOM_MODES, ImageTransform, Mode
from varkit.interfaces import Tokenizer
from varkit.pipelines.auto import open_tokenizer
from varkit.pipelines.fingerprint import tokenizer_fingerprint
from varkit.rng import Rng


@dataclass(frozen=True)
class Views:
    """Which fixed views of each image are coded.

    Args:
        mode, enlarge: as `ImageTransform`, but for `crop`, which is random: `center`, `pad` or `squash`.
        crops: 1, or 10: four corners, the middle, and their mirror images (torchvision's TenCrop) of a centre crop.
        enlarge: size of what is cut from, in image sizes; of ten crops there may be several, such as LlamaGen's
            (1.1, 1.05): ten views each.
        flip: each view and its mirror image; ten crops have theirs already.
        clips: of videos: how many clips, evenly from the first to the last; one is that in the middle.
        stride, fps: of videos: as `varkit.data.clips.ClipDataset`.
    Raises: ValueError when they do not go together.
    """

    mode: Mode = "center"
    enlarge: tuple[float, ...] = (1.0,)
    crops: int = 1
    flip: bool = False
    clips: int = 1
    stride: int = 1
    fps: float | None = None

    def __post_init__(self) -> None:
        if min(self.clips, self.stride) < 1 or (self.fps is not None and (self.fps <= 0 or self.stride > 1)):
            raise ValueError(
                f"clips and stride count from 1, fps is above 0 and stands instead of stride; got {self.clips}, "
                f"{self.stride} and {self.fps}"
            )
        if self.mode in RANDOM_MODES:
            raise ValueError(f"mode {self.mode} is random; tokens are made of fixed views: center, pad or squash")
        if self.crops not in (1, 10):
            raise ValueError(f"crops must be 1 or 10; got {self.crops}")
        if not self.enlarge or min(self.enlarge) < 1:
            raise ValueError(f"enlarge must be at least 1; got {self.enlarge}")
        if self.crops == 10 and (self.mode != "center" or self.flip):
            raise ValueError("ten crops are cut from a centre crop and hold their mirror images: mode center, no flip")
        if self.crops == 10 and min(self.enlarge) == 1:
            raise ValueError("ten crops of an image that is no larger than a crop are all alike; use enlarge 1.1")
        if self.crops == 1 and len(self.enlarge) > 1:
            raise ValueError("several enlarge values are for ten crops")

    @property
    def names(self) -> list[str]:
        """One name a view, in order."""
        if self.crops == 10:
            places = ("top left", "top right", "bottom left", "bottom right", "middle")
            return [f"{e:g}x {p}{m}" for e in self.enlarge for m in ("", " mirrored") for p in places]
        plain = f"{self.mode} {self.enlarge[0]:g}x" if self.mode == "center" else self.mode
        return [plain, f"{plain} mirrored"] if self.flip else [plain]

    @property
    def of_videos(self) -> bool:
        """Whether they are of videos alone."""
        return (self.clips, self.stride, self.fps) != (1, 1, None)

    def clip_names(self, frames: int) -> list[str]:
        """As `names`, of clips of so many frames."""
        step = f"{self.fps:g} a second" if self.fps is not None else f"every {self.stride}"
        places = [f"clip {k + 1} of {self.clips}" for k in range(self.clips)] if self.clips > 1 else ["middle"]
        return [f"{place}, {frames} frames, {step}, {name}" for place in places for name in self.names]

    def readers(self, dataset: ImageDataset | ClipDataset, tokenizer: Tokenizer) -> list[ImageDataset | ClipDataset]:
        """The set as it is read, once for each; `cut` makes views of what comes. Raises: as `ClipDataset.set_clips`."""
        found: list[ImageDataset | ClipDataset] = []
        for transform in self.transforms(tokenizer.image_size):
            if isinstance(dataset, ImageDataset):
                found.append(copy(dataset))
                found[-1].transform = transform
                continue
            rule = ClipRule(tokenizer.num_frames or 1, self.stride, "even", self.clips, short="skip")
            for which in range(self.clips):
                found.append(clips := copy(dataset))
                clips.set_clips(rule, self.fps, transform)
                clips.which = which
        return found

    def transforms(self, size: tuple[int, int]) -> list[ImageTransform]:
        """How images are read, once for each; `cut` makes views of what comes."""
        height, width = size
        if self.crops == 10:
            return [ImageTransform((int(height * e), int(width * e)), mode="center", enlarge=1.0) for e in self.enlarge]
        return [ImageTransform(size, mode=self.mode, enlarge=self.enlarge[0])]

    def cut(self, images: Tensor, size: tuple[int, int]) -> Tensor:
        """(B, 3, H', W') as one of `readers` gives them, or clips (B, 3, T, H', W') -> (B, v, ...)."""
        if self.crops == 1:
            return torch.stack([images, images.flip(-1)] if self.flip else [images], 1)
        (height, width), down, right = size, images.shape[-2] - size[0], images.shape[-1] - size[1]
        places = [(0, 0), (0, right), (down, 0), (down, right), (round(down / 2), round(right / 2))]
        return torch.stack(
            [
                side[..., top : top + height, left : left + width]
                for side in (images, images.flip(-1))
                for top, left in places
            ],
            1,
        )


class Extracted(NamedTuple):
    """What `extract_codes` did. skipped: images that could not be read, of the shards made now."""

    folder: Path
    images: int
    made: int
    there: int  # images of shards that were there already
    skipped: int


def extract_codes(
    tokenizer: Any,
    source: str,
    out: Path,
    *,
    name: str | None = None,
    split: str = "train",
    root: str | Path | None = None,
    views: Views | None = None,
    batch_size: int = 64,
    shard_size: int = 2048,
    workers: int = 0,
    seed: int = 0,
    moments: bool = False,
    process_index: int = 0,
    num_processes: int = 1,
    announce: Callable[[str], None] | None = None,
    progress: bool = False,
) -> Extracted:
    """Write the tokens of a set of images; what is there already is kept, so a stopped run goes on.

    An image's tokens do not depend on batch, shard or process. Shards go to processes in turn.

    Args:
        tokenizer: a `Tokenizer` on its device, or a name that `open_tokenizer` takes.
        source, split, root: as `varkit.data.open_images` takes them, of a tokenizer of clips `open_clips`.
        name: what the record calls the tokenizer.
        views: of each image; one centre crop unless given.
        batch_size: images encoded at once (V views each).   shard_size: images a file, lost together at a stop.
        workers: processes that read images.   seed: of tokenizers that draw (posterior samples, stochastic bits).
        moments: of a tokenizer with a posterior, store its mean and standard deviation instead of one draw.
    Raises: ValueError before any work on a folder with other tokens, bad sizes, or moments of ids; and on latents that
        float16 cannot hold.
    """
    if min(batch_size, shard_size) < 1:
        raise ValueError(f"batch_size and shard_size must be at least 1; got {batch_size} and {shard_size}")
    views = Views() if views is None else views
    if isinstance(tokenizer, str):
        name, tokenizer = name or tokenizer, open_tokenizer(tokenizer).eval()
    if moments and tokenizer.layout.codebook_size is not None:
        raise ValueError(f"moments are those of latents; {type(tokenizer).__name__} has {tokenizer.layout.describe()}")
    if moments and type(tokenizer).moments is Tokenizer.moments:
        raise ValueError(f"{type(tokenizer).__name__} has no posterior over its tokens; code it without moments")
    frames = tokenizer.num_frames
    if frames is None and views.of_videos:
        raise ValueError(f"clips, stride and fps are of videos; {type(tokenizer).__name__} codes images")
    if frames is not None and views.crops > 1:
        raise ValueError(f"ten crops are of images; {type(tokenizer).__name__} codes clips: use clips= for several")
    dataset: ImageDataset | ClipDataset
    if frames is None:
        dataset = open_images(source, split=split, root=root)
    else:
        dataset = open_clips(source, split=split, root=root, frames=1)
    readers = views.readers(dataset, tokenizer)
    storage = storage_dtype(tokenizer.layout)
    info = CodeInfo(
        layout=tokenizer.layout.to_dict(),
        tokenizer=name or type(tokenizer).__name__,
        fingerprint=tokenizer_fingerprint(tokenizer),
        source=str(source),
        split=split,
        count=len(dataset),
        shard_size=shard_size,
        classes=list(dataset.classes),
        views=views.names if frames is None else views.clip_names(frames),
        dtype=str(storage).removeprefix("torch."),
        texts=dataset.texts is not None,
        moments=moments,
    )
    encode = partial(_latents, tokenizer, moments, seed)
    info.begin(out)  # processes that start together write the same
    mine = range(process_index, info.shards, num_processes)
    wanted = [k for k in mine if not shard_is_whole(out, info, k)]
    there = sum(len(info.entries(k)) for k in mine) - sum(len(info.entries(k)) for k in wanted)
    if there and announce is not None:
        announce(f"{there} images are there already")
    made = skipped = 0
    total = sum(len(info.entries(k)) for k in wanted)
    with tqdm(total=total, unit="image", disable=not progress, file=sys.stderr) as bar:
        for shard in wanted:
            parts = list(_shard(tokenizer, encode, readers, list(info.entries(shard)), views, batch_size, workers, bar))
            index = torch.cat([i for i, _ in parts])
            tokens = torch.cat([t for _, t in parts]).to(storage)
            texts = None if dataset.texts is None else [dataset.texts[i] for i in index.tolist()]
            write_shard(out, shard, tokens, dataset.labels[index], index, texts, _sums(tokens, moments))
            made += len(index)
            skipped += len(info.entries(shard)) - len(index)
    return Extracted(out, len(dataset), made, there, skipped)


def _latents(tokenizer: Any, moments: bool, seed: int, images: Tensor, keys: Tensor) -> Tensor:
    """Tokens of images, or their moments side by side. Args: keys: (B,), of each image's random numbers."""
    if moments:
        return torch.cat(tokenizer.moments(images), -1)
    return tokenizer.encode(images, Rng.for_keys(seed, keys).to(images.device))


def _sums(tokens: Tensor, moments: bool) -> Tensor | None:
    """Of latents as they are stored; None of ids. Raises ValueError when their type is too small for them."""
    if not tokens.is_floating_point():
        return None
    if not tokens.isfinite().all():
        raise ValueError("latents are too large for float16, in which they are stored: use a smaller scaling_factor")
    return latent_sums(*tokens.chunk(2, -1)) if moments else latent_sums(tokens)


@torch.no_grad()
def _shard(
    tokenizer: Any,
    encode: Callable[[Tensor, Tensor], Tensor],
    readers: Sequence[ImageDataset | ClipDataset],
    indices: list[int],
    views: Views,
    batch_size: int,
    workers: int,
    bar: Any,
) -> Iterator[tuple[Tensor, Tensor]]:
    """The images of a shard in batches: their numbers (b,) and tokens (b, V, ...), without those that do not decode."""
    size, device = tokenizer.image_size, next(tokenizer.parameters()).device
    loaders = []
    for reader in readers:
        subset = Subset(reader, indices)
        loaders.append(DataLoader(subset, batch_size, num_workers=workers, collate_fn=collate))
    for batches in zip(*loaders, strict=True):
        first = batches[0]["index"]
        cut = torch.cat([views.cut(batch["images"], size) for batch in batches], 1)  # b V 3 H W
        keys = first[:, None] * cut.shape[1] + torch.arange(cut.shape[1])  # each view has random numbers of its own
        tokens = encode(cut.flatten(0, 1).to(device), keys.flatten())
        real = first == batches[0]["keys"]  # in place of a damaged image the next one is given
        bar.update(len(first))
        yield first[real], tokens.unflatten(0, cut.shape[:2])[real.to(device)].cpu()
