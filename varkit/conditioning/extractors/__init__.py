"""Images -> control maps, by name: `build_extractor("canny")(images)`.

Maps are what ControlAR's released models were trained with; each entry of `EXTRACTORS` says what its map means, what it
needs and under which licence. Nothing is downloaded at import, and packages are imported when an extractor is built.
"""

from __future__ import annotations

import inspect
from functools import partial
from typing import Any

from torch import Tensor

from varkit.conditioning.extractors.base import Extractor, ExtractorEntry, checked_images, map_of
from varkit.conditioning.extractors.canny import Canny
from varkit.conditioning.extractors.depth import DPT_HYBRID, DPT_LARGE, Depth
from varkit.conditioning.extractors.hed import HED
from varkit.conditioning.extractors.lineart import LineArt
from varkit.conditioning.extractors.segmentation import MASK2FORMER_ADE20K, Segmentation
from varkit.config import nearest

__all__ = ["EXTRACTORS", "Extractor", "ExtractorEntry", "build_extractor", "extractor_entry", "map_of"]


class AsGiven:
    """Maps that were made before: checked, and handed on as they are."""

    def __call__(self, images: Tensor) -> Tensor:
        """uint8 (B, H, W) or (B, H, W, 3), as given. Raises: ValueError for anything else."""
        checked_images(images)
        return images


_LINES: dict[str, Any] = {
    "channels": 1,
    "resize": "bicubic",
    "needs": "model.pth of the Space awacke1/Image-to-Line-Drawings (ControlNet calls its copy sk_model.pth)",
    "licence": "MIT (code of informative-drawings); of the weights: not verified",
    "network": True,
}

EXTRACTORS: dict[str, ExtractorEntry] = {
    "canny": ExtractorEntry(
        Canny,
        channels=1,
        meaning="edges one pixel wide: 255 on an edge, 0 elsewhere",
        resize="nearest",
        needs="the extra `control` (opencv-python-headless)",
        licence="Apache-2.0 (OpenCV)",
    ),
    "hed": ExtractorEntry(
        HED,
        channels=1,
        meaning="soft outlines: light on black",
        resize="bicubic",
        needs="ControlNetHED.pth of lllyasviel/Annotators",
        licence="Apache-2.0 (as ControlNet's source says of network and file)",
        network=True,
    ),
    "lineart": ExtractorEntry(
        LineArt, meaning="lines: black on white; what ControlAR's line-art models were trained with", **_LINES
    ),
    "lineart-white": ExtractorEntry(
        partial(LineArt, white_lines=True), meaning="lines: white on black; for ControlAR's edge_base", **_LINES
    ),
    "depth": ExtractorEntry(
        Depth,
        channels=1,
        meaning="inverse depth: nearer is lighter, the nearest pixel 255; for square images, as ControlAR's scores",
        resize="bicubic",
        needs=f"{DPT_LARGE}, and the extra `text` (transformers)",
        licence="Apache-2.0 by its card (not verified)",
        network=True,
    ),
    "depth-midas": ExtractorEntry(
        partial(Depth, model=DPT_HYBRID, scaling="min-max"),
        channels=1,
        meaning="inverse depth: nearer is lighter, from 0 to 255; for other shapes and ImageNet, as ControlAR does",
        resize="bicubic",
        needs=f"{DPT_HYBRID} (MiDaS' hybrid converted), and the extra `text` (transformers)",
        licence="Apache-2.0 by its card (not verified); MIT (MiDaS)",
        network=True,
    ),
    "seg": ExtractorEntry(
        Segmentation,
        channels=3,
        meaning="colours of classes: palette ade20k or coco-stuff; palette ids gives grey levels instead",
        resize="nearest",
        needs=f"{MASK2FORMER_ADE20K} for ADE20K, a network that you name otherwise; the extra `text` (transformers)",
        licence="not verified",
        network=True,
    ),
    "map": ExtractorEntry(
        AsGiven,
        channels=None,
        meaning="a map that was made before, as it is",
        resize="bicubic",
        needs="nothing",
        licence="none",
    ),
}


def extractor_entry(name: str) -> ExtractorEntry:
    """Raises: ValueError naming the nearest extractor when there is none of that name."""
    if name not in EXTRACTORS:
        raise ValueError(
            f"no extractor is called {name!r}{nearest(name, EXTRACTORS)}; there are {', '.join(EXTRACTORS)}"
        )
    return EXTRACTORS[name]


def build_extractor(name: str | None, **options: Any) -> Extractor:
    """An extractor that is ready to use: uint8 (B, H, W, 3) -> uint8 (B, H, W), or (B, H, W, 3) for colours.

    Args: name: of `EXTRACTORS`; None is `map`.   options: of that extractor's class.
    Raises: ValueError for an unknown name or option; ImportError or FileNotFoundError saying what is missing.
    """
    name = name or "map"
    entry = extractor_entry(name)
    allowed = inspect.signature(entry.build).parameters
    if unknown := sorted(options.keys() - allowed.keys()):
        raise ValueError(
            f"extractor {name!r} has no option {', '.join(unknown)}; it has {', '.join(allowed) or 'none'}"
        )
    return entry.build(**options)
