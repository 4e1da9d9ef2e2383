"""The Frechet video distance: how clips become features (Unterthiner et al., arXiv 1812.01717).

The distance itself is that of any features: `varkit.metrics.fid`. What differs between published numbers is how clips
get the network's size and range, which covariance is taken (`ddof`), and which clips there are: see
`varkit.data.clip_rules`.

Shapes: B clips, T frames, H W pixels as given, S side of the network's input, D width of the features.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from varkit.data.clip_rules import Quantize, cover_and_crop, to_bytes
from varkit.metrics.i3d import I3D, SIDE
from varkit.metrics.videomae import VideoMAE

Method = Literal["direct", "short_side_crop"]
Interpolation = Literal["bilinear", "bicubic"]
Range = Sequence[float]

OUT_OF_RANGE = 1.0
"""Values further outside `input_range` than this many times its width are a mistake, not a generator's overshoot."""


def preprocess_clips(
    clips: Tensor,
    *,
    layout: str = "bthwc",
    input_range: Range = (0, 255),
    output_range: Range = (-1, 1),
    size: int = SIDE,
    method: Method = "direct",
    interpolation: Interpolation = "bilinear",
    antialias: bool = False,
    quantize: Quantize = "none",
    sequence_length: int | None = None,
    frame_stride: int = 1,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
) -> Tensor:
    """Clips as a network takes them: float32 (B, 3, T', size, size), or (3, T', size, size) for a layout without b.

    Args:
        clips: uint8 or floats, in the order of `layout`.
        layout: a permutation of `bcthw`, or of `cthw` for one clip.
        input_range, output_range: what the two ends of the values are, and become. uint8 is 0 to 255.
        method: `direct` resizes each frame, its aspect ratio not kept (TATS, cd-fvd, NBP's rFVD); `short_side_crop`
            brings the shorter side to `size` and crops the middle (common_metrics, NBP's gFVD; with antialias the
            loaders of TATS and cd-fvd).
        interpolation, antialias: as `torch.nn.functional.interpolate`, half-pixel centres.
        quantize: `truncate` makes the values 8 bits before the resize, cutting off what is between (VideoGPT).
        sequence_length, frame_stride: keep that many frames, then every `frame_stride`-th of them.
        mean, std: subtracted and divided by channel after the output range, where given.
    Raises: ValueError for another layout, dtype, setting or number of channels, too few frames, or values that are far
        outside `input_range`.
    Source: songweige/content-debiased-fvd: cdfvd/third_party/i3d/utils.py, cdfvd/utils/data_utils.py (a1e037a);
        JunyaoHu/common_metrics_on_video_quality: fvd/styleganv/fvd.py, fvd/videogpt/fvd.py (5f75173).
    """
    _check_settings(method, interpolation, quantize, size, frame_stride, sequence_length)
    clips = _ordered(clips, layout)  # B T C H W
    if sequence_length is not None and clips.shape[1] < sequence_length:
        raise ValueError(f"sequence_length is {sequence_length}, but the clips have {clips.shape[1]} frames")
    clips = clips[:, :sequence_length:frame_stride]
    low, high = _range("input_range", input_range)
    if clips.dtype == torch.uint8 and (low, high) != (0, 255):
        raise ValueError(f"uint8 clips are in 0 to 255; got input_range {tuple(input_range)}")
    frames = clips.flatten(0, 1).float()
    _check_values(frames, low, high)
    if quantize == "truncate":
        frames, low, high = to_bytes((frames - low) / (high - low)).float(), 0.0, 255.0
    if method == "direct":
        frames = F.interpolate(frames, (size, size), mode=interpolation, align_corners=False, antialias=antialias)
    else:
        frames = cover_and_crop(frames, size, interpolation=interpolation, antialias=antialias)
    to_low, to_high = _range("output_range", output_range)
    frames = (frames - low) * ((to_high - to_low) / (high - low)) + to_low
    if mean is not None:
        frames = frames - frames.new_tensor(mean).view(1, 3, 1, 1)
    if std is not None:
        frames = frames / frames.new_tensor(std).view(1, 3, 1, 1)
    result = frames.unflatten(0, clips.shape[:2]).transpose(1, 2).contiguous()
    return result if "b" in layout else result[0]


def _check_settings(method: str, interpolation: str, quantize: str, size: int, stride: int, length: int | None) -> None:
    given = {"method": (method, Method), "interpolation": (interpolation, Interpolation)}
    for name, (value, allowed) in {**given, "quantize": (quantize, Quantize)}.items():
        if value not in get_args(allowed):
            raise ValueError(f"{name} must be one of {', '.join(get_args(allowed))}; got {value!r}")
    if size < 1 or stride < 1 or (length is not None and length < 1):
        raise ValueError(f"size, frame_stride and sequence_length count from 1; got {size}, {stride}, {length}")


def _ordered(clips: Tensor, layout: str) -> Tensor:
    """(B, T, C, H, W), a view."""
    if sorted(layout) not in (sorted("bcthw"), sorted("cthw")):
        raise ValueError(f"layout must be a permutation of bcthw, or of cthw for one clip; got {layout!r}")
    if clips.ndim != len(layout) or not (clips.dtype == torch.uint8 or clips.is_floating_point()):
        raise ValueError(f"clips must be uint8 or floats in the order {layout}; got {clips.dtype} {tuple(clips.shape)}")
    if "b" not in layout:
        clips, layout = clips[None], f"b{layout}"
    clips = clips.permute(*(layout.index(axis) for axis in "btchw"))
    if clips.shape[2] != 3:
        raise ValueError(
            f"clips need 3 channels; {layout} {tuple(clips.shape)} has {clips.shape[2]}: is the order right?"
        )
    return clips


def _range(name: str, given: Range) -> tuple[float, float]:
    if len(given) != 2 or not given[0] < given[1]:
        raise ValueError(f"{name} must be two rising numbers; got {given!r}")
    return float(given[0]), float(given[1])


def _check_values(frames: Tensor, low: float, high: float) -> None:
    least, most = (float(end) for end in frames.aminmax()) if frames.numel() else (low, high)
    slack = OUT_OF_RANGE * (high - low)
    if not (low - slack <= least and most <= high + slack):  # NaN is refused too
        raise ValueError(f"the clips have values from {least:g} to {most:g}, but input_range is {low:g} to {high:g}")


class _ClipFeatures(nn.Module):
    """Clips (B, T, H, W, 3) of any size -> {"features": (B, dim)}, on the network's device, without gradients."""

    def __init__(
        self, network: nn.Module, output: str, dim: int, size: int, output_range: Range, settings: dict[str, Any]
    ) -> None:
        super().__init__()
        self.network, self.output, self.dim = network, output, dim
        self.settings: dict[str, Any] = dict(layout="bthwc", size=size, output_range=output_range, **settings)
        trial = torch.zeros(1, max(self.settings.get("sequence_length") or 1, 1), 1, 1, 3, dtype=torch.uint8)
        preprocess_clips(trial, **self.settings)  # refuses wrong settings now

    @torch.no_grad()
    def forward(self, clips: Tensor) -> dict[str, Tensor]:
        """
        Args: clips: (B, T, H, W, 3), uint8, or floats in [0, 1]. All at once: the caller chooses B.
        Returns: `features` (B, dim) float32.
        Raises: ValueError as `preprocess_clips` and the network, such as for too few frames.
        """
        clips = clips.to(next(self.network.parameters()).device)
        ends = (0, 255) if clips.dtype == torch.uint8 else (0, 1)
        inputs = preprocess_clips(clips, input_range=ends, **self.settings)
        return {"features": self.network(inputs, outputs=(self.output,))[self.output]}


class I3DFeatures(_ClipFeatures):
    """The features of FVD: I3D's logits of 400 classes, averaged over time.

    Args:
        network: with `norm_eps` 1e-5 and the weights of `i3d_pretrained_400.pt`.
        settings: of `preprocess_clips`: method, interpolation, antialias, quantize, sequence_length, frame_stride.
    Raises: ValueError or TypeError for a wrong setting.
    """

    def __init__(self, network: I3D, **settings: Any) -> None:
        super().__init__(network, "logits", network.num_classes, SIDE, (-1, 1), settings)


class VideoMAEFeatures(_ClipFeatures):
    """The features of the content-debiased FVD: VideoMAE's normed mean of tokens. Pixels are scaled to [0, 1] alone.

    Args:
        network: with the weights of `vit_g_hybrid_pt_1200e_ssv2_ft.pth`.   settings: as those of `I3DFeatures`.
    Raises: ValueError or TypeError for a wrong setting.
    """

    def __init__(self, network: VideoMAE, **settings: Any) -> None:
        super().__init__(network, "features", network.embed_dim, network.img_size, (0, 1), settings)
