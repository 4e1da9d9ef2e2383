"""How well generated images keep to their controls: the control is extracted again and compared, image by image.

Source: hustvl/ControlAR: evaluations/*.py (87e32e9). What differs from there is said at `METRICS`.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from varkit.conditioning.extractors import build_extractor, extractor_entry
from varkit.conditioning.extractors.segmentation import Segmentation
from varkit.data.controls import Pairs, pair_files
from varkit.data.transforms import reason_of, refuse_large, to_rgb
from varkit.metrics.controllability import MeanIoU, canny_f1, depth_rmse, map_similarity, mean_iou

METRICS = {
    "canny": "canny-f1",
    "hed": "ms-ssim",
    "lineart": "ms-ssim",
    "lineart-white": "ms-ssim",
    "depth": "depth-rmse",
    "depth-midas": "depth-rmse",
    "seg": "miou",
}
"""The metric of each kind of control. MS-SSIM is the mean over images, the release's one over batches of 16; higher is
better but for depth-rmse. miou is of all pixels together, and per image for what an image is worth."""

LABELS: dict[str, dict[str, Any]] = {
    "ids": {},
    "ade20k": {"num_classes": 150, "ignore_label": 0, "prediction_offset": 1},
    "coco-stuff": {"num_classes": 171, "ignore_label": 255},
}
"""What stored label maps hold: classes from 0, or the data sets' own numbers, scored as the release does."""


@dataclass
class ControlScore:
    """mean: over images (miou: of all pixels).   per_image: by relative path without ending, in its order."""

    kind: str
    metric: str
    mean: float
    per_image: dict[str, float]
    settings: dict[str, Any] = field(default_factory=dict)
    missing: int = 0
    unused: int = 0

    def to_dict(self) -> dict[str, Any]:
        """As JSON; an image that has no score (miou of unlabelled pixels alone) is null."""
        scores = {k: None if np.isnan(v) else v for k, v in self.per_image.items()}
        head = {"kind": self.kind, "metric": self.metric, "mean": self.mean, "images": len(scores)}
        return {**head, "missing": self.missing, "unused": self.unused, "settings": self.settings, "per_image": scores}


def control_score(
    generated: str | Path,
    controls: str | Path,
    kind: str,
    *,
    labels: str = "ids",
    batch_size: int = 16,
    progress: bool = False,
    allow_missing: bool = False,
    **options: Any,
) -> ControlScore:
    """Compare the controls of generated images, extracted again, with those that they were made from.

    Args:
        generated, controls: folders of images of the same relative paths and sizes. Controls are maps as `varkit
            control` writes them; for `seg` grey label maps.
        kind: an extractor that METRICS lists.   labels: of `seg`: what the label maps hold; see LABELS.
        allow_missing: score those generated images that have a control, instead of refusing.
        options: of the extractor.
    Raises: ValueError for bad input, other sizes, and (unless allowed) missing controls; as `build_extractor`.
    """
    if kind not in METRICS:
        extractor_entry(kind)  # says so where there is none of that name
        raise ValueError(f"controls of kind {kind!r} have no metric; choose one of {', '.join(METRICS)}")
    if labels not in LABELS or (labels != "ids" and kind != "seg"):
        raise ValueError(f"labels ({', '.join(LABELS)}) are for seg alone; got {labels!r} for {kind}")
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1; got {batch_size}")
    pairs = pair_files(generated, controls)
    if not allow_missing:
        pairs.require_all(controls)
    extractor: Any = build_extractor(kind, **options, **({"palette": "ids"} if kind == "seg" else {}))
    rule = {"num_classes": extractor.num_classes, **LABELS[labels]} if isinstance(extractor, Segmentation) else {}
    total = MeanIoU(**rule) if rule else None
    scores: list[float] = []
    for images, maps in _batches(pairs, batch_size, kind, progress):
        scores += _scored(kind, extractor, images, maps, rule, total)
    mean = total.compute().miou if total is not None else float(np.mean(scores))
    settings = {k: str(v) if isinstance(v, Path | torch.device) else v for k, v in options.items()} | rule
    per_image = dict(zip(pairs.keys, scores, strict=True))
    return ControlScore(kind, METRICS[kind], mean, per_image, settings, len(pairs.missing), len(pairs.unused))


def _scored(
    kind: str, extractor: Any, images: Tensor, maps: Tensor, rule: dict[str, Any], total: MeanIoU | None
) -> list[float]:
    """The score of each image: uint8 (B, H, W, 3) against uint8 (B, H, W)."""
    if METRICS[kind] == "canny-f1":
        return canny_f1(extractor(images), maps).per_image.tolist()
    if METRICS[kind] == "depth-rmse":
        return depth_rmse(extractor.raw(images) if kind == "depth" else extractor(images), maps).per_image.tolist()
    if total is None:
        return map_similarity(extractor.floats(images)[:, None], maps[:, None]).per_image.tolist()
    found = extractor(images)
    total.update(found, maps)
    return [_one_miou(a[None], b[None], rule) for a, b in zip(found, maps, strict=True)]


def _one_miou(found: Tensor, wanted: Tensor, rule: dict[str, Any]) -> float:
    try:
        return mean_iou(found, wanted, **rule).miou
    except ValueError:  # no pixel of it counts; ids beyond the classes were refused for the whole batch
        return float("nan")


def _batches(pairs: Pairs, batch_size: int, kind: str, progress: bool) -> Any:
    """Neighbours of one size together: uint8 (B, H, W, 3) and (B, H, W)."""
    from tqdm import tqdm

    images: list[Tensor] = []
    maps: list[Tensor] = []
    for image_path, map_path in tqdm(
        list(zip(pairs.images, pairs.controls, strict=True)), unit="image", disable=not progress
    ):
        image, control = _opened(image_path, "RGB"), _opened(map_path, "ids" if kind == "seg" else "L")
        if image.shape[:2] != control.shape:
            (h, w), (ch, cw) = image.shape[:2], control.shape
            raise ValueError(f"{image_path} is {w}x{h}, its control {map_path} {cw}x{ch}: bring them to one size first")
        if images and (len(images) == batch_size or images[0].shape != image.shape):
            yield torch.stack(images), torch.stack(maps)
            images, maps = [], []
        images.append(image)
        maps.append(control)
    yield torch.stack(images), torch.stack(maps)


def _opened(path: str, form: str) -> Tensor:
    """uint8 (H, W, 3), one channel of a map (H, W), or ids (H, W). Raises: ValueError naming the file."""
    try:
        refuse_large(os.stat(path).st_size)
        with Image.open(path) as image:
            if form == "ids":
                if image.mode not in ("L", "P"):
                    raise ValueError(f"a label map is grey, a class a level; this is {image.mode}")
                return torch.from_numpy(np.array(image))  # of a palette, the entry and not its colour
            pixels = torch.from_numpy(np.array(to_rgb(image)))
            return pixels if form == "RGB" else pixels[..., 0]
    except Exception as error:  # Pillow's plugins raise anything on damaged files
        raise ValueError(f"{path} cannot be read: {reason_of(error)}") from None
