"""How well a generated image keeps to its control: the control is extracted from it again and compared.

Only the comparison is here; maps come in as an extractor gives them. As ControlAR and ControlNet++ report it.
Source: hustvl/ControlAR: evaluations/{canny_f1score,hed_ssim,lineart_ssim,depth_rmse,ade20k_mIoU,cocostuff_mIoU}.py
(87e32e9).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from varkit.metrics.structural import multi_scale_ssim


class PerImage(NamedTuple):
    """The mean over images, and the score of each (B,) float64."""

    mean: float
    per_image: Tensor


def canny_f1(prediction: Tensor, label: Tensor, *, positive_value: int = 255, zero_division: float = 0.0) -> PerImage:
    """F1 of the edge pixels of each image, and the mean over images.

    Args:
        prediction, label: (B, H, W), integers; pixels equal to `positive_value` are edges.
        zero_division: the score of an image without an edge in either map.
    Raises: ValueError for different shapes.
    """
    _check_maps(prediction, label)
    found, wanted = ((x == positive_value).flatten(1) for x in (prediction, label))
    both, either = (found & wanted).sum(1).double(), found.sum(1).double() + wanted.sum(1)
    scores = torch.where(either > 0, 2 * both / either.clamp_min(1), zero_division)
    return PerImage(float(scores.mean()), scores)


def depth_rmse(prediction: Tensor, label: Tensor, *, prediction_max: float = 255.0) -> PerImage:
    """Root of the mean squared error of each depth map, and the mean over images.

    Args:
        prediction: (B, H, W), any scale: each is multiplied so that its largest value is `prediction_max`.
        label: (B, H, W) in [0, 255], as stored.
    Raises: ValueError for different shapes, or a prediction without a positive value, naming the images.
    """
    _check_maps(prediction, label)
    wide = _float64(prediction).flatten(1)
    largest = wide.amax(1, keepdim=True)
    if flat := (~(largest > 0)).flatten().nonzero().flatten().tolist():
        raise ValueError(
            f"a depth map must have a positive value to be scaled by: images {flat[:8]} (from 0) have none"
        )
    errors = (wide * prediction_max / largest - _float64(label).flatten(1)).square().mean(1).sqrt()
    return PerImage(float(errors.mean()), errors)


def map_similarity(
    prediction: Tensor, label: Tensor, *, input_divisor: float = 255.0, data_range: float = 1.0
) -> PerImage:
    """Multi-scale SSIM of HED or line-art maps, with torchmetrics' borders, and the mean over images.

    The mean is over images; the reference's is over means of batches of 16, which differs where the last is smaller.

    Args:
        prediction, label: (B, 1, H, W) in [0, `input_divisor`], at least 176 pixels a side.
        data_range: of the divided maps.
    Raises: ValueError for different shapes and smaller maps.
    """
    first, second = ((_float64(x) / input_divisor).clamp(0, 1) for x in (prediction, label))
    scores = multi_scale_ssim(first, second, variant="torchmetrics", scale=None, data_range=data_range)
    return PerImage(float(scores.mean()), scores)


class Overlap(NamedTuple):
    """Mean intersection over union, and that of each class (K,) float64: NaN where the labels lack the class."""

    miou: float
    iou: Tensor


class MeanIoU:
    """One confusion matrix of all pixels, filled in batches; two can be merged.

    The mean is over the classes that labels or predictions contain: a class that is only predicted counts as 0.

    Args:
        num_classes: ids (after the offset) are 0 .. num_classes - 1. A pixel whose label or prediction is num_classes
            is left out wholly.
        ignore_label: pixels of this label are left out.
        prediction_offset: added to predictions.

    As released: ADE20K is scored with 150 classes, offset 1 and label 0 ignored, so ids run 1 .. 150 and class 150 is
    left out of the score. `num_classes=151` counts it.
    """

    def __init__(self, num_classes: int, *, ignore_label: int | None = None, prediction_offset: int = 0) -> None:
        if num_classes < 1:
            raise ValueError(f"num_classes must be at least 1; got {num_classes}")
        self.num_classes, self.ignore_label, self.prediction_offset = num_classes, ignore_label, prediction_offset
        self.confusion = torch.zeros(num_classes + 1, num_classes + 1, dtype=torch.int64)  # prediction, label

    def update(self, prediction: Tensor, label: Tensor) -> None:
        """(B, H, W) integers each. Raises: ValueError for different shapes, or ids beyond the classes."""
        _check_maps(prediction, label)
        found, wanted = (x.flatten().cpu().long() for x in (prediction, label))
        found = found + self.prediction_offset
        if self.ignore_label is not None:
            wanted = torch.where(wanted == self.ignore_label, self.num_classes, wanted)
        for name, ids in (("predictions (after the offset)", found), ("labels", wanted)):
            if ids.numel() and not 0 <= int(ids.min()) <= int(ids.max()) <= self.num_classes:
                raise ValueError(
                    f"{name} must be in 0 .. {self.num_classes}, the last meaning: leave out; "
                    f"got {int(ids.min())} .. {int(ids.max())}"
                )
        cells = torch.bincount((self.num_classes + 1) * found + wanted, minlength=self.confusion.numel())
        self.confusion += cells.view_as(self.confusion)

    def merge(self, other: MeanIoU) -> None:
        """Add what another one saw. Raises: ValueError where the settings differ."""
        mine, theirs = ((m.num_classes, m.ignore_label, m.prediction_offset) for m in (self, other))
        if mine != theirs:
            raise ValueError(f"(num_classes, ignore_label, prediction_offset) differ: {mine} and {theirs}")
        self.confusion += other.confusion

    def compute(self) -> Overlap:
        """Raises: ValueError where every pixel so far was left out."""
        counted = self.confusion[:-1, :-1].double()
        both, found, wanted = counted.diagonal(), counted.sum(1), counted.sum(0)
        if not counted.any():
            raise ValueError("no pixel counts: all are left out, or there was no update")
        union = found + wanted - both
        iou = torch.where(wanted > 0, both / union, torch.nan)
        return Overlap(float(iou.nansum() / (union > 0).sum()), iou)


def mean_iou(
    prediction: Tensor,
    label: Tensor,
    num_classes: int,
    *,
    ignore_label: int | None = None,
    prediction_offset: int = 0,
) -> Overlap:
    """`MeanIoU` of one batch (B, H, W)."""
    metric = MeanIoU(num_classes, ignore_label=ignore_label, prediction_offset=prediction_offset)
    metric.update(prediction, label)
    return metric.compute()


def _check_maps(prediction: Tensor, label: Tensor) -> None:
    if prediction.shape != label.shape or prediction.ndim != 3 or not len(label):
        raise ValueError(f"two equal shapes (B, H, W) are needed; got {tuple(prediction.shape)}, {tuple(label.shape)}")


def _float64(x: Tensor) -> Tensor:
    return (x.cpu() if x.device.type == "mps" else x).double()
