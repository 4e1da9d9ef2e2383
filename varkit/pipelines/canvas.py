"""Where an image of any size lies on a model's canvas, and how what was redrawn comes back into the image.

Shapes: H W of the image, h w of the canvas. A window is a rectangle in pixels of the image, which may stand out of it.
"""

from __future__ import annotations

import struct
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps
from torch import Tensor

from varkit.data.transforms import to_rgb

Fit = Literal["stretch", "crop", "pad"]
Window = tuple[int, int, int, int]
"""Top, left, bottom, right."""

MAX_PIXELS = 36_000_000
"""Of an image that is edited: 6000 x 6000. Pasting back holds a few copies of it in float32."""
MAX_GROWTH = 2.0
"""Of out-painting: how much may be added on a side, in sides of the image."""
RAMP_SIDE = 512  # the ramp of a feather is computed at about this side: wide ones cost too much at that of a photo


def open_image(path: str | Path) -> Image.Image:
    """The image in a file, upright, in its own mode; of a moving one the first picture.

    Raises: FileNotFoundError; ValueError on what is no image, is damaged, or has more than `MAX_PIXELS`.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(path) as file:
                check_pixels(file.size, str(path))  # from the header: nothing is decoded yet
                return ImageOps.exif_transpose(file)
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):
        raise ValueError(
            f"{path} has far more than the {MAX_PIXELS:,} pixels that are edited; make it smaller"
        ) from None
    except FileNotFoundError:
        raise
    except (OSError, SyntaxError, EOFError, struct.error) as error:
        raise ValueError(f"{path} is not an image that can be read: {' '.join(str(error).split())}") from None


def check_pixels(size: tuple[int, int], what: str) -> None:
    """Raises ValueError on an image (width, height) that is too large to be edited, or empty."""
    width, height = size
    if not 0 < width * height <= MAX_PIXELS:
        raise ValueError(f"{what} has {width} x {height} pixels; 1 to {MAX_PIXELS:,} are edited: make it smaller")


@dataclass(frozen=True)
class Frame:
    """image: (H, W).   shown: what a result at the image's own size shows.   window: what the canvas covers."""

    image: tuple[int, int]
    shown: Window
    window: Window

    @property
    def whole(self) -> bool:
        """Whether canvas, result and image are the same rectangle."""
        return self.window == self.shown == (0, 0, *self.image)


def check_fit(fit: str) -> None:
    """Raises ValueError unless it is a `Fit`."""
    if fit not in get_args(Fit):
        raise ValueError(f"fit must be one of {', '.join(get_args(Fit))}; got {fit!r}")


def grown(image: tuple[int, int], extend: float | Sequence[float]) -> Window:
    """The image (H, W) with a border around it.

    Args: extend: of top, left, bottom and right, as shares of the image's height or width; one number is all four.
    Raises: ValueError on another number of shares, one outside [0, MAX_GROWTH], or none that adds a pixel.
    """
    shares = [float(extend)] * 4 if isinstance(extend, int | float) else [float(e) for e in extend]
    if len(shares) != 4 or not all(0 <= s <= MAX_GROWTH for s in shares):
        raise ValueError(
            f"extend must be one share or four (top, left, bottom, right), each from 0 to {MAX_GROWTH:g} of the "
            f"image's height or width; got {extend}"
        )
    height, width = image
    top, left, bottom, right = (round(s * side) for s, side in zip(shares, (height, width) * 2, strict=True))
    if not any((top, left, bottom, right)):
        raise ValueError(f"extend {extend} adds no pixel to an image of {height}x{width}; give larger shares")
    return -top, -left, height + bottom, width + right


def place(
    image: tuple[int, int], canvas: tuple[int, int], fit: Fit, extend: float | Sequence[float] | None = None
) -> Frame:
    """Where the canvas (h, w) lies on an image (H, W), grown by `extend` or not.

    stretch: on all of it; the aspect ratio is not kept.   crop: on its middle, as much as the canvas' aspect ratio
    allows.   pad: around it; what stands out repeats the image's edge.
    Raises: ValueError on another fit, a bad `extend`, or one with crop, which would cut the border off.
    """
    check_fit(fit)
    shown = (0, 0, *image) if extend is None else grown(image, extend)
    if extend is not None and fit == "crop":
        raise ValueError("fit='crop' would cut off what extend= adds: take 'pad' or 'stretch'")
    if fit == "stretch":
        return Frame(image, shown, shown)
    top, left, bottom, right = shown
    height, width = bottom - top, right - left
    aspect = canvas[0] / canvas[1]
    taller = height / width > aspect
    if taller == (fit == "crop"):
        new = (max(1, round(width * aspect)), width)
    else:
        new = (height, max(1, round(height / aspect)))
    top, left = top + (height - new[0]) // 2, left + (width - new[1]) // 2
    return Frame(image, shown, (top, left, top + new[0], left + new[1]))


def look(values: Any, window: Window) -> Any:
    """What a window shows of an array or tensor (..., H, W): beyond the edge, the edge again."""
    top, left, bottom, right = window
    rows = np.arange(top, bottom).clip(0, values.shape[-2] - 1)
    columns = np.arange(left, right).clip(0, values.shape[-1] - 1)
    if isinstance(values, Tensor):
        return values[..., torch.from_numpy(rows)[:, None], torch.from_numpy(columns)]
    return values[..., rows[:, None], columns]


def on_canvas(image: Image.Image | Tensor, frame: Frame, canvas: tuple[int, int]) -> Tensor:
    """An image, PIL in RGB or (3, H, W) in [-1, 1], as the canvas shows it: (3, h, w) in [-1, 1]."""
    if isinstance(image, Tensor):
        part = image if frame.whole else look(image, frame.window)
        return part if tuple(part.shape[-2:]) == canvas else resized(part, canvas).clamp(-1, 1)
    if not frame.whole:
        part = look(np.asarray(image).transpose(2, 0, 1), frame.window)
        image = Image.fromarray(np.ascontiguousarray(part.transpose(1, 2, 0)))
    image = image.resize((canvas[1], canvas[0]), Image.Resampling.LANCZOS)
    return torch.from_numpy(np.asarray(image, np.float32)).permute(2, 0, 1).div(127.5).sub(1)


def resized(values: Tensor, size: tuple[int, int]) -> Tensor:
    """(C, H, W) -> (C, *size), bicubic, what is made smaller averaged."""
    return F.interpolate(values[None].float(), size=size, mode="bicubic", antialias=True)[0]


def read_image(image: Any) -> Image.Image:
    """Any still PIL image as RGB, upright, as training reads it (`to_rgb`).

    Raises: TypeError on anything else; ValueError on one that is too large, damaged, or of a mode without a range.
    """
    if not isinstance(image, Image.Image):
        raise TypeError("image must be a PIL image, a non-empty list of them, or a tensor (B, 3, H, W) in [-1, 1]")
    check_pixels(image.size, "the image")
    try:
        return to_rgb(image)
    except OSError as error:
        raise ValueError(f"the image cannot be read: {' '.join(str(error).split())}") from None


def mask_values(mask: Image.Image | Tensor) -> Tensor:
    """A mask, white or 1 where the image is redrawn, -> (H, W) float32 in [0, 1].

    Of a PIL image of any mode: its lightness; what is transparent is kept; 16 bits are scaled. A tensor is (H, W), or
    that with axes of one before it.
    Raises: TypeError on anything else, ValueError on values outside [0, 1].
    """
    if isinstance(mask, Tensor):
        if mask.numel() == 0 or mask.numel() != mask.shape[-2:].numel():
            raise ValueError(f"a mask tensor must be (H, W); got {tuple(mask.shape)}")
        values = mask.float().reshape(mask.shape[-2:]).cpu()
    elif isinstance(mask, Image.Image):
        check_pixels(mask.size, "the mask")
        values = torch.from_numpy(_lightness(ImageOps.exif_transpose(mask)))
    else:
        raise TypeError(f"mask must be a PIL image or a tensor; got {type(mask).__name__}")
    if not (values.min() >= 0 and values.max() <= 1):
        raise ValueError(f"a mask must lie in [0, 1]; got [{values.min():.3g}, {values.max():.3g}]")
    return values


def _lightness(mask: Image.Image) -> np.ndarray:
    """(H, W) float32: 0 black or transparent, 1 white."""
    if mask.mode == "F":
        return np.array(mask, np.float32)
    if mask.mode == "I" or mask.mode.startswith("I;16"):
        return np.asarray(mask).astype(np.float32).clip(0, 65535) / 65535
    if mask.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in mask.info:
        if mask.mode == "La":  # Pillow has no direct way from premultiplied grey to RGBA
            mask = mask.convert("LA")
        colour = mask.convert("RGBA")
        grey, alpha = (
            np.asarray(c, np.float32) / 255 for c in (colour.convert("RGB").convert("L"), colour.getchannel("A"))
        )
        return grey * alpha
    return np.asarray(mask.convert("L"), np.float32) / 255


def on_window(values: Tensor, frame: Frame, window: Window) -> Tensor:
    """A mask (H, W) as a window shows it: what extend added is redrawn (1), what pads repeats the edge."""
    if frame.shown == (0, 0, *frame.image):
        return values if window == frame.shown else look(values, window)
    beyond = look(F.pad(torch.zeros(frame.image), (1, 1, 1, 1), value=1.0), tuple(side + 1 for side in window))
    return torch.maximum(look(values, window), beyond)


def feathered(alpha: Tensor, width: int) -> Tensor:
    """A mask (H, W) that fades out over `width` pixels around what it marks, and is as it was there."""
    if width < 1:
        return alpha
    k = max(1, min(alpha.shape) // RAMP_SIDE)
    ramp = F.max_pool2d(alpha[None, None], k, ceil_mode=True)
    r = max(1, round(width / k / 2))
    for kernel, padding in (((2 * r + 1, 1), (r, 0)), ((1, 2 * r + 1), (0, r))):
        ramp = F.max_pool2d(ramp, kernel, stride=1, padding=padding)  # reaches r further ...
    for kernel, padding in (((2 * r + 1, 1), (0, 0, r, r)), ((1, 2 * r + 1), (r, r, 0, 0))):
        ramp = F.avg_pool2d(F.pad(ramp, padding, mode="replicate"), kernel, stride=1)  # ... and falls over 2 r
    ramp = (
        F.interpolate(ramp, size=tuple(alpha.shape), mode="bilinear", align_corners=False)[0, 0]
        if k > 1
        else ramp[0, 0]
    )
    return torch.maximum(alpha, ramp)


def paste_back(drawn: Tensor, original: Tensor, frame: Frame, alpha: Tensor) -> Tensor:
    """The image with what was drawn in its place.

    Args:
        drawn: (3, h, w), the canvas.   original: (3, H, W), in the same range [0, 1].
        alpha: of `frame.shown`: 1 where the drawn image is taken, 0 where the original stays as it is.
    Returns: (3, H', W'), of the size of `frame.shown`.
    """
    top, left, bottom, right = frame.window
    size = (bottom - top, right - left)
    if tuple(drawn.shape[-2:]) != size:
        drawn = resized(drawn, size).clamp(0, 1)
    y, x = frame.shown[:2]
    out = (original if frame.shown == (0, 0, *frame.image) else look(original, frame.shown)).clone()
    inner = (max(top, y), max(left, x), min(bottom, frame.shown[2]), min(right, frame.shown[3]))
    to = (slice(None), slice(inner[0] - y, inner[2] - y), slice(inner[1] - x, inner[3] - x))
    source = drawn[:, inner[0] - top : inner[2] - top, inner[1] - left : inner[3] - left]
    weight = alpha[to[1:]]
    # lerp(a, b, 0) is a to the bit: what is kept is kept exactly.
    out[to] = torch.lerp(out[to], source.to(out), weight.to(out).expand_as(source))
    return out
