"""Canny edges, OpenCV's, as the released models were trained with.

Source: hustvl/ControlAR: condition/canny.py (87e32e9), which calls cv2.Canny on the RGB image.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from varkit.conditioning.extractors.base import checked_images


class Canny:
    """White edges, one pixel wide, on black.

    At each pixel the channel of the largest gradient counts; gradients are 3x3 Sobel, |x| + |y|.

    Args: low, high: a gradient above `high` starts an edge, one above `low` goes on with it.
    Raises: ImportError without OpenCV; ValueError for other thresholds.
    """

    def __init__(self, low: float = 100, high: float = 200) -> None:
        if not (math.isfinite(high) and 0 <= low <= high):
            raise ValueError(f"thresholds must be 0 <= low <= high; got low={low}, high={high}")
        try:
            import cv2
        except ImportError:
            raise ImportError("Canny edges need OpenCV: pip install 'varkit[control]'") from None
        self.low, self.high, self._canny = low, high, cv2.Canny

    def __call__(self, images: Tensor) -> Tensor:
        """uint8 (B, H, W, 3) RGB, or grey (B, H, W) -> uint8 (B, H, W) of 0 and 255. Raises: ValueError."""
        pixels = checked_images(images).contiguous().cpu().numpy()
        edges = [torch.from_numpy(self._canny(image, self.low, self.high)) for image in pixels]
        return torch.stack(edges).to(images.device)
