"""Depth maps by a DPT (Ranftl et al., 2021) of transformers, scaled as ControlAR's models were trained with.

Source: hustvl/ControlAR: evaluations/depth_rmse.py, condition/midas/depth.py, autoregressive/sample (87e32e9).
"""

from __future__ import annotations

from pathlib import Path
from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from varkit.conditioning.extractors.base import as_floats, to_levels
from varkit.conditioning.extractors.hugging_face import open_transformers

DPT_LARGE = "Intel/dpt-large"
DPT_HYBRID = "Intel/dpt-hybrid-midas"

Scaling = Literal["max", "min-max"]


class Depth:
    """Nearer is lighter.

    The network sees an image at its own size, sides rounded up to a multiple of `multiple`; its map is brought back.
    transformers' DPT takes squares alone: DPT-large sees one of the longer side (at 512x512 what ControlAR sees), a
    hybrid one of its `image_size`, where the release runs MiDaS' own code at the image's shape: those maps differ.

    Args:
        model: a depth network of transformers: hub name or folder. It should give inverse depth, as DPT does.
        scaling: `max` divides a map by its own maximum, to the nearest level (DPT-large); `min-max` puts its minimum at
            0 and its maximum at 255, and truncates (MiDaS).
        size: pixels a side at which the network sees every image instead, such as 512.
        multiple: of the sides; 32 for DPT, 14 for networks on DINOv2.
        device: where it runs.
    Raises: ValueError for other arguments; as `open_transformers`.
    """

    def __init__(
        self,
        model: str | Path = DPT_LARGE,
        *,
        scaling: Scaling = "max",
        size: int | None = None,
        multiple: int = 32,
        device: torch.device | str = "cpu",
    ) -> None:
        if scaling not in get_args(Scaling):
            raise ValueError(f"scaling must be max or min-max; got {scaling!r}")
        if multiple < 1 or (size is not None and (size < 1 or size % multiple)):
            raise ValueError(f"size must be a positive multiple of {multiple}; got {size}")
        self.scaling, self.size, self.multiple, self.device = scaling, size, multiple, device
        self.network, processor = open_transformers(model, ("AutoModelForDepthEstimation",), device, "depth")
        mean, std = (torch.tensor(getattr(processor, k), device=device) for k in ("image_mean", "image_std"))
        self.mean, self.std = 255 * mean[:, None, None], 255 * std[:, None, None]

    @torch.inference_mode()
    def raw(self, images: Tensor) -> Tensor:
        """uint8 (B, H, W, 3) -> what the network says (B, H, W), any scale. Raises: ValueError for another input."""
        x = as_floats(images, self.device)
        size = tuple(x.shape[-2:])
        seen = self._seen(size)
        if seen != size:
            x = F.interpolate(x, size=seen, mode="bicubic", align_corners=False, antialias=True).clamp(0, 255)
        depth = self.network(pixel_values=(x - self.mean) / self.std).predicted_depth
        if tuple(depth.shape[-2:]) != size:
            depth = F.interpolate(depth[:, None], size=size, mode="bicubic", align_corners=False)[:, 0]
        return depth.float().to(images.device)

    def _seen(self, size: tuple[int, ...]) -> tuple[int, ...]:
        """(H, W) of an image -> as the network sees it."""
        config = self.network.config
        if self.size:
            return self.size, self.size
        if getattr(config, "is_hybrid", False):
            return config.image_size, config.image_size
        height, width = (-(-n // self.multiple) * self.multiple for n in size)
        square = config.model_type == "dpt" and getattr(config, "backbone_config", None) is None
        return (max(height, width),) * 2 if square else (height, width)

    def floats(self, images: Tensor) -> Tensor:
        """uint8 (B, H, W, 3) -> float32 (B, H, W) in 0 .. 255, not rounded; a flat map is black."""
        depth = self.raw(images)
        low = depth.amin((1, 2), keepdim=True) if self.scaling == "min-max" else depth.new_zeros(())
        spread = depth.amax((1, 2), keepdim=True) - low
        return torch.where(spread > 0, 255 * (depth - low) / spread, 0.0).clamp(0, 255)

    def __call__(self, images: Tensor) -> Tensor:
        """uint8 (B, H, W, 3) -> uint8 (B, H, W)."""
        floats = self.floats(images)
        return floats.byte() if self.scaling == "min-max" else to_levels(floats)
