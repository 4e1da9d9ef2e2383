"""Structural similarity: SSIM (Wang et al., 2004) and MS-SSIM (Wang, Simoncelli and Bovik, 2003).

At least five definitions are in use; they differ in the window, in the covariance and at the border, by up to 0.05 on
one pair. So each of these is an argument, and a number means something only with them.

Every value is float64: variances are differences of large squares. Not one is a mean of scales: an image of RGB is
scored channel by channel and the channels are averaged, and MS-SSIM is a product of powers.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

Range = tuple[float, float]

SSIM_DEFAULT: dict[str, Any] = {
    "window": "gaussian",
    "window_size": 11,
    "sigma": 1.5,
    "covariance": "population",
    "border": "crop",
    "scale": (0.0, 1.0),
    "data_range": 1.0,
}
"""Wang et al.; scikit-image with gaussian_weights, pytorch-msssim, piq, the video papers' common_metrics."""

SSIM_LLAMAGEN: dict[str, Any] = {
    "window": "uniform",
    "window_size": 7,
    "sigma": None,
    "covariance": "sample",
    "border": "crop",
    "scale": (0.0, 1.0),
    "data_range": 2.0,
}
"""scikit-image's default window with the range of 2 that LlamaGen passes for images in [0, 1]. It raises the score.
Source: FoundationVision/LlamaGen: tokenizer/tokenizer_image/reconstruction_vq_ddp.py (ce98ec4)."""

SCALE_WEIGHTS = (0.0448, 0.2856, 0.3001, 0.2363, 0.1333)
"""Exponents of MS-SSIM, fine to coarse (Wang, Simoncelli and Bovik, section 3.2)."""

SMALLEST_MULTI_SCALE = 161
"""Pixels a side from which five scales are possible: at the coarsest one a window of 11 must fit."""


def to_scale(images: Tensor, scale: Range | None) -> Tensor:
    """Images as float64 with black and white where `scale` says.

    Args:
        images: uint8 in [0, 255], or floats in [-1, 1].   scale: (black, white); None takes the values as they are.
    """
    wide = (images.cpu() if images.device.type == "mps" else images).double()  # MPS has no float64
    if scale is None:
        return wide
    low, high = scale
    black, white = (0.0, 255.0) if images.dtype == torch.uint8 else (-1.0, 1.0)
    if (low, high) == (black, white):
        return wide
    return low + (wide - black) * ((high - low) / (white - black))


def check_images(first: Tensor, second: Tensor) -> None:
    """Raises: ValueError unless both are (B, C, H, W) or (B, C, T, H, W), of one shape, uint8 or floating."""
    for images in (first, second):
        if images.dtype != torch.uint8 and not images.is_floating_point():
            raise ValueError(f"images must be uint8, or floats in [-1, 1]; got {images.dtype}")
    if first.shape != second.shape or first.ndim not in (4, 5):
        raise ValueError(
            f"two equal shapes (B, C, H, W) or (B, C, T, H, W) are needed; "
            f"got {tuple(first.shape)} and {tuple(second.shape)}"
        )


def ssim(
    first: Tensor,
    second: Tensor,
    *,
    window: Literal["gaussian", "uniform"] = "gaussian",
    window_size: int = 11,
    sigma: float | None = 1.5,
    covariance: Literal["population", "sample"] = "population",
    border: Literal["crop", "reflect"] = "crop",
    k1: float = 0.01,
    k2: float = 0.03,
    scale: Range | None = (0.0, 1.0),
    data_range: float | None = None,
) -> Tensor:
    """Structural similarity of each pair, in [-1, 1]; 1 for equal images.

    Args:
        first, second: (B, C, H, W), uint8 in [0, 255] or floats in [-1, 1].
        window, window_size, sigma: weights of the pixels around a pixel; an odd number a side; `sigma` of the gaussian.
        covariance: divide by the number of pixels of a window, or (sample) by one less.
        border: `crop` counts only windows inside the image; `reflect` pads by half a window and counts every pixel.
        k1, k2: of the two stabilising constants.
        scale: where black and white are put before; None takes the values as they are. It matters where black is: the
            luminance term is not the same in [-1, 1].
        data_range: as the constants want it; None is the width of `scale`.
    Returns: (B,) float64.
    Raises: ValueError for other shapes or arguments, and for images smaller than the window (with `reflect`, where
        half a window does not fit).
    Source: scikit-image: skimage/metrics/_structural_similarity.py (0.26.0) for `crop`; Lightning-AI/torchmetrics:
        functional/image/ssim.py (1.9.0) for `reflect`.
    """
    check_images(first, second)
    if covariance not in ("population", "sample") or border not in ("crop", "reflect"):
        raise ValueError(f"covariance is population or sample, border crop or reflect; got {covariance!r}, {border!r}")
    taps = window_taps(window, window_size, sigma)
    a, b = (to_scale(x, scale) for x in (first, second))
    _require_window(a, window_size, border)
    pixels = window_size**2
    whole, _ = _similarity(
        *_bordered(a, b, window_size, border),
        taps,
        _constants(k1, k2, scale, data_range),
        pixels / (pixels - 1) if covariance == "sample" else 1.0,
    )
    return whole.mean((1, 2, 3))


def multi_scale_ssim(
    first: Tensor,
    second: Tensor,
    *,
    variant: Literal["wang", "torchmetrics"] = "wang",
    k1: float = 0.01,
    k2: float = 0.03,
    scale: Range | None = (0.0, 1.0),
    data_range: float | None = None,
) -> Tensor:
    """Five scales, each half as large as the one before; gaussian window of 11, sigma 1.5. In [0, 1].

    Args:
        first, second, k1, k2, scale, data_range: as in `ssim`.
        variant: `wang` counts windows inside the image, keeps an odd last row, and averages the scores of the channels.
            `torchmetrics` pads the similarity of the coarsest scale by reflection (the contrasts are of windows
            inside), drops an odd last row, and averages the channels scale by scale. With both a negative contrast
            counts as 0.
    Returns: (B,) float64.
    Raises: ValueError for images of 160 pixels or fewer (175 for `torchmetrics`, as there) in height or width.
    Source: Wang, Simoncelli and Bovik; Lightning-AI/torchmetrics: functional/image/ssim.py (1.9.0).
    """
    if variant not in ("wang", "torchmetrics"):
        raise ValueError(f"variant must be wang or torchmetrics; got {variant!r}")
    check_images(first, second)
    size, padded = 11, variant == "torchmetrics"
    smallest = size * 16 if padded else SMALLEST_MULTI_SCALE
    if first.ndim != 4 or min(first.shape[-2:]) < smallest:
        raise ValueError(
            f"five scales need images (B, C, H, W) of at least {smallest} pixels a side; got {tuple(first.shape)}. "
            "Use ssim, or larger images"
        )
    taps, constants = window_taps("gaussian", size, 1.5), _constants(k1, k2, scale, data_range)
    a, b = (to_scale(x, scale) for x in (first, second))
    scores = torch.ones(())
    for i, weight in enumerate(SCALE_WEIGHTS, 1):
        whole, contrast = _similarity(*_bordered(a, b, size, "reflect" if padded else "crop"), taps, constants)
        if i == len(SCALE_WEIGHTS):
            contrast = whole
        elif padded:
            contrast = contrast[..., size // 2 : -(size // 2), size // 2 : -(size // 2)]
        scores = scores * contrast.mean((1, 2, 3) if padded else (2, 3)).relu() ** weight  # B, or B C
        a, b = (F.avg_pool2d(x, 2, ceil_mode=not padded) for x in (a, b))
    return scores if padded else scores.mean(1)


def window_taps(window: str, size: int, sigma: float | None) -> Tensor:
    """The weights of one row of a separable window, (size,) float64 that sum to 1."""
    if size < 3 or size % 2 == 0:
        raise ValueError(f"window_size must be odd and at least 3; got {size}")
    if window == "uniform":
        return torch.full((size,), 1 / size, dtype=torch.float64)
    if window != "gaussian" or not sigma or sigma < 0:
        raise ValueError(f"window must be uniform, or gaussian with a positive sigma; got {window!r}, sigma {sigma}")
    places = torch.arange(size, dtype=torch.float64) - size // 2
    return torch.softmax(-(places**2) / (2 * sigma**2), 0)


def _constants(k1: float, k2: float, scale: Range | None, data_range: float | None) -> Range:
    if data_range is None:
        if scale is None:
            raise ValueError("values that are taken as they are (scale=None) need a data_range")
        data_range = scale[1] - scale[0]
    return (k1 * data_range) ** 2, (k2 * data_range) ** 2


def _require_window(images: Tensor, size: int, border: str) -> None:
    smallest = size if border == "crop" else size // 2 + 1
    if images.ndim != 4 or min(images.shape[-2:]) < smallest:
        raise ValueError(
            f"a window of {size} (border {border}) needs images (B, C, H, W) of at least {smallest} pixels a side; "
            f"got {tuple(images.shape)}"
        )


def _bordered(a: Tensor, b: Tensor, size: int, border: str) -> tuple[Tensor, Tensor]:
    if border == "crop":
        return a, b
    return F.pad(a, (size // 2,) * 4, mode="reflect"), F.pad(b, (size // 2,) * 4, mode="reflect")


def _similarity(a: Tensor, b: Tensor, taps: Tensor, constants: Range, unbias: float = 1.0) -> tuple[Tensor, Tensor]:
    """The map of similarities and its contrast factor, one value for every window inside: (B, C, H', W') twice."""
    c1, c2 = constants
    mean_a, mean_b, squares, product = (_windowed(x, taps) for x in (a, b, a * a + b * b, a * b))
    squared_means, product_of_means = mean_a**2 + mean_b**2, mean_a * mean_b
    variances = unbias * (squares - squared_means).clamp_min(0)  # only their sum is needed
    contrast = (2 * unbias * (product - product_of_means) + c2) / (variances + c2)
    return (2 * product_of_means + c1) / (squared_means + c1) * contrast, contrast


def _windowed(x: Tensor, taps: Tensor) -> Tensor:
    """Weighted means over windows inside, first along height, then along width."""
    for dim in (2, 3):
        length = x.shape[dim] - len(taps) + 1
        total = x.narrow(dim, 0, length) * float(taps[0])
        for i, tap in enumerate(taps.tolist()[1:], 1):
            total.add_(x.narrow(dim, i, length), alpha=tap)  # shifted sums: convolutions of float64 are slow
        x = total
    return x
