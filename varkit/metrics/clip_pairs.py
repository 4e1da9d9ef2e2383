"""Original clips and what a tokenizer makes of them, for `varkit.metrics.evaluate_reconstructions`.

Shapes: B clips, T frames, H W pixels.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from varkit.metrics.protocol import Protocol
from varkit.metrics.sets import ImageSet
from varkit.metrics.video_sources import clip_set, first_clips, fitted
from varkit.pictures import to_uint8
from varkit.rng import Rng

SHOWN = 4
"""Frames of a clip in a picture of pairs."""

Back = Callable[[Tensor, Sequence[int]], Iterator[tuple[int | None, Tensor, Tensor | None]]]
"""uint8 originals, images (B, 3, H, W) or clips (B, T, H, W, 3), and their indices -> for each length: it, uint8
reconstructions, ids or None."""


def clip_pairs(
    generated: Any,
    tokenizer: Any | None,
    reference: Any,
    protocol: Protocol,
    device: torch.device,
    split: str | None,
    root: str | None,
) -> tuple[ImageSet, Back, str]:
    """The original clips, the first `sampling.num`; how to get what is compared with them; what that is called.

    A tokenizer of longer clips than the protocol scores is given clips of its own length; the first frames are scored.
    Raises: ValueError for a tokenizer of images, shorter clips, or originals of another size.
    """
    num, frames = protocol.sampling.num, protocol.clips.frames
    if tokenizer is None:
        originals = first_clips(clip_set(reference, protocol, generated=False, split=split, root=root), num)
        given = clip_set(generated, protocol, generated=True, root=root)
        if len(given) != len(originals) or given.size != originals.size:
            raise ValueError(
                f"{given.source} holds {len(given)} clips of {given.size}, the originals are {len(originals)} of "
                f"{originals.size} (frames, height, width); they must be the same clips in the same order"
            )

        def there(batch: Tensor, indices: Sequence[int]) -> Iterator[tuple[int | None, Tensor, Tensor | None]]:
            yield None, _bytes(given.read(indices)), None

        return _as_bytes(originals), there, given.name
    if tokenizer.num_frames is None:
        raise ValueError(f"{type(tokenizer).__name__} codes images; {protocol.name} scores clips")
    if tokenizer.num_frames < frames:
        raise ValueError(
            f"{type(tokenizer).__name__} codes clips of {tokenizer.num_frames} frames, {protocol.name} scores {frames} "
            f"(--set clips.frames={tokenizer.num_frames})"
        )
    size = tuple(tokenizer.image_size)
    opening: dict[str, Any] = {"generated": False, "split": split, "root": root, "size": size}
    whole = first_clips(clip_set(reference, protocol, frames=tokenizer.num_frames, scored=False, **opening), num)
    if whole.size[1:] != size:
        raise ValueError(
            f"{whole.source}: clips are {whole.size[1]}x{whole.size[2]}, {type(tokenizer).__name__} codes "
            f"{size[0]}x{size[1]} (--set clips.load_size={size[0]})"
        )
    tokenizer.to(device)

    def back(batch: Tensor, indices: Sequence[int]) -> Iterator[tuple[int | None, Tensor, Tensor | None]]:
        clips = whole.read(indices)
        pixels = clips.float() * 2 - 1 if clips.is_floating_point() else clips.float().div(127.5).sub(1)
        tokens = tokenizer.encode(pixels.permute(0, 4, 1, 2, 3).to(device))
        rng = Rng.for_keys(protocol.sampling.seed, torch.tensor(list(indices))).to(device)
        made = to_uint8(tokenizer.decode(tokens, rng).float(), protocol.images.quantise)[:, :, :frames]
        yield None, scored(made.permute(0, 2, 3, 4, 1).contiguous()), tokens

    rule = replace(protocol.clips, load_size=None)  # which clips have already

    def scored(clips: Tensor) -> Tensor:
        held = replace(whole, num=len(clips), size=(frames, *size), read=lambda rows: clips[list(rows)])
        return _bytes(fitted(held, rule, cover=False).read(range(len(clips))))

    cut = replace(whole, size=(frames, *size), read=lambda indices: whole.read(indices)[:, :frames])
    name = str(generated if isinstance(generated, str | Path) else type(tokenizer).__name__)
    return _as_bytes(fitted(cut, rule, cover=False)), back, name


def _as_bytes(clips_of: ImageSet) -> ImageSet:
    read = clips_of.read
    return replace(clips_of, read=lambda indices: _bytes(read(indices)))


def _bytes(clips: Tensor) -> Tensor:
    return to_uint8(clips * 2 - 1) if clips.is_floating_point() else clips


def channels_first(images: Tensor) -> Tensor:
    """Clips (B, T, H, W, 3) as (B, 3, T, H, W); images as they are."""
    return images if images.dim() == 4 else images.permute(0, 4, 1, 2, 3)


def pictured(image: Tensor) -> Tensor:
    """Some frames of a clip (T, H, W, 3) side by side, (3, H, n W); an image as it is."""
    if image.dim() == 3:
        return image
    which = torch.linspace(0, len(image) - 1, min(SHOWN, len(image))).round().long()
    return image[which].permute(3, 1, 0, 2).flatten(2)
