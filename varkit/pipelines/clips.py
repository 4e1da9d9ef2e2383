"""What pipelines of clips take and give: first frames, outputs, sums of what windows took.

Shapes: B clips, T frames, H W pixels.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from diffusers.utils import BaseOutput
from PIL import Image
from torch import Tensor

from varkit.data.transforms import ImageTransform, to_rgb
from varkit.rng import Rng

Frames = Sequence[Any] | np.ndarray | Tensor
"""First frames: of one clip a list of PIL images, or uint8 (T, H, W, 3), or floats (3, T, H, W) in [-1, 1]; of several
a list of lists, or an array or tensor with B in front."""


@dataclass
class VideoOutput(BaseOutput):
    """`videos`: B lists of T PIL images; (B, T, H, W, 3) float in [0, 1]; (B, T, 3, H, W) in [0, 1]; or tokens (B, L).

    `class_labels`: one a clip; None where the model has no classes, or frames alone said what to draw.
    `stats`: sums over the windows, and their number, `windows`.
    """

    videos: list[list[Image.Image]] | np.ndarray | Tensor
    class_labels: list[int] | None
    stats: dict[str, Any]


def read_frames(frames: Frames, size: tuple[int, int]) -> Tensor:
    """First frames as networks take them: float32 (B, 3, T, H, W) in [-1, 1], B = 1 for those of one clip.

    PIL images and uint8 arrays of another size are brought to `size`: shorter side first, then the middle is cut out.
    Raises: ValueError for no frames, frames or clips of several sizes, and floats of another size or range; TypeError.
    """
    if isinstance(frames, Tensor) and frames.is_floating_point():
        clips = frames if frames.dim() == 5 else frames[None]
        if clips.dim() != 5 or clips.shape[1] != 3 or tuple(clips.shape[-2:]) != size or not clips.numel():
            raise ValueError(
                f"frames as floats must be (B, 3, T, {size[0]}, {size[1]}) or (3, T, {size[0]}, {size[1]}); got "
                f"{tuple(frames.shape)}"
            )
        if not (clips.min() >= -1.001 and clips.max() <= 1.001):
            raise ValueError(f"frames must lie in [-1, 1]; got [{clips.min():.3g}, {clips.max():.3g}]")
        return clips.float()
    pixels = _as_bytes(frames)
    if pixels.ndim == 4:
        pixels = pixels[None]
    if pixels.dtype != np.uint8 or pixels.ndim != 5 or pixels.shape[-1] != 3 or not pixels.size:
        raise ValueError(
            f"frames must be uint8 (T, H, W, 3) or (B, T, H, W, 3), floats in [-1, 1], or lists of PIL images; got "
            f"{pixels.dtype} {pixels.shape}"
        )
    flat = torch.tensor(pixels).flatten(0, 1).permute(0, 3, 1, 2)  # B*T 3 H W
    fitted = ImageTransform(size, mode="center", enlarge=1.0)(flat)
    return fitted.unflatten(0, pixels.shape[:2]).transpose(1, 2).contiguous()


def _as_bytes(frames: Frames) -> np.ndarray:
    """Arrays as they are; lists of PIL images, or of lists of them, as one array."""
    if isinstance(frames, Tensor):
        return frames.cpu().numpy()
    if isinstance(frames, np.ndarray):
        return frames
    if isinstance(frames, str) or not isinstance(frames, Sequence):
        raise TypeError(f"frames must be PIL images, an array or a tensor; got {type(frames).__name__}")
    if not frames:
        raise ValueError("frames is empty; give at least one, or leave it out")
    if isinstance(frames[0], Image.Image):
        parts = [np.asarray(to_rgb(one)) for one in frames]
    else:
        parts = [_as_bytes(one) for one in frames]
    if len({one.shape for one in parts}) > 1:
        found = ", ".join(dict.fromkeys("x".join(map(str, one.shape)) for one in parts))
        raise ValueError(f"frames must have one size, and clips one number of frames; got {found}")
    return np.stack(parts)


def clips_as_output(clips: Tensor, output_type: str) -> Any:
    """(B, 3, T, H, W) in [0, 1] as "pt", "np" or "pil"; see `VideoOutput`."""
    if output_type == "pt":
        return clips.transpose(1, 2)
    array = clips.permute(0, 2, 3, 4, 1).cpu().numpy()
    if output_type == "np":
        return array
    return [[Image.fromarray(frame) for frame in clip] for clip in (array * 255).round().astype(np.uint8)]


def summed(parts: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """What windows took, together: numbers added, also those of lists; rates averaged; `lossless` if all were."""
    total: dict[str, Any] = {}
    for name in parts[0]:
        values = [part[name] for part in parts]
        if isinstance(values[0], bool):
            total[name] = all(values)
        elif isinstance(values[0], list):
            sums = [sum(each) for each in zip(*values, strict=True)]
            total[name] = [each / len(parts) for each in sums] if name == "tokens_per_call" else sums
        else:
            total[name] = None if values[0] is None else sum(values)
    return {**total, "windows": len(parts)}


def generate_clips(
    pipeline: Any,
    conditions: Sequence[Any],
    num: int,
    seed: int,
    batch_size: int,
    took: list[dict[str, Any]] | None = None,
    **settings: Any,
) -> Iterator[tuple[int, Any, list[Image.Image]]]:
    """Clip 0 .. num - 1 of the set that `seed` names: (index, its class or None, frames).

    As `varkit.pipelines.base.generate`: a clip depends on its index, its condition and the settings, not on
    `batch_size`. Conditions are cycled; of models without classes they are [None].
    """
    for first in range(0, num, batch_size):
        indices = range(first, min(first + batch_size, num))
        wanted = [conditions[i % len(conditions)] for i in indices]
        rng = Rng.from_seed(seed, len(indices), first)
        asked = {"num_videos_per_prompt": len(indices)} if None in wanted else {"class_labels": wanted}
        out = pipeline(rng=rng, **asked, **settings)
        if took is not None:
            took.append(out.stats)
        yield from zip(indices, wanted, out.videos, strict=True)
