"""The causal video tokenizer of NBP: 3-D convolutions that never look ahead, and finite scalar quantisation.

Source: RenShuhuai-Andy/NBP: nbp/magvit2.py, nbp/quantizers/fsq.py (421e936), which follows MAGVIT-v2 (Yu et al.,
"Language Model Beats Diffusion", arXiv 2310.05737); NBP's paper is arXiv 2502.07737. What differs: clips are in
[-1, 1] (the networks see [0, 1], as released); every size is an argument; parameter names are our own
(`varkit.checkpoints.nbp` maps them); how often codes are used is counted.

A latent of frame 0 depends on that frame alone, latent i on the frames up to i times the stride in time: 1 + 4m frames
make 1 + m latents, and the first frames of a clip determine its first tokens.

Shapes: B batch, C channels, T H W frames and sides of a clip, t h w of the latent, L = t h w tokens in raster order.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any, ClassVar, cast

import torch
import torch.nn.functional as F
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.modeling_utils import ModelMixin
from torch import Tensor, nn

from varkit.hub import HubMixin
from varkit.interfaces import Tokenizer
from varkit.layers.code_usage import CodeUsage
from varkit.layers.fsq import FSQ
from varkit.layout import TokenLayout
from varkit.registry import Checkpoint, ModelEntry, register_checkpoint, register_model
from varkit.rng import Rng
from varkit.tokenizers.multiscale_vq import Quantized


class ReleasedFSQ(FSQ):
    """The bound of this release: a margin inside the levels, and tan where the inverse of tanh was meant, so that z = 0
    is not quite the middle of an even number of levels. What differs from `FSQ` is this alone."""

    def bound(self, z: Tensor) -> Tensor:
        half = (self.steps - 1) * (1 - 1e-3) / 2
        offset = torch.where(self.steps % 2 == 0, 0.5, 0.0)
        return torch.tanh(z.float() + torch.tan(offset / half)) * half - offset


class Quantizer(CodeUsage):
    """FSQ of a latent video, which counts the codes in training; float32 whatever the module is cast to."""

    def __init__(self, levels: Sequence[int]) -> None:
        super().__init__(1, math.prod(levels))
        self.fsq = ReleasedFSQ(levels)

    def forward(self, features: Tensor) -> Quantized:
        """(B, C, t, h, w) -> straight-through values of the same shape, float32. There is no loss: `loss` is 0."""
        z = features.permute(0, 2, 3, 4, 1)  # B t h w C
        values = self.fsq(z)
        ids = self.fsq.ids(values.detach()).flatten(1)
        if self.training:
            self.record_usage([ids])
        residuals = z.detach().float().reshape(-1, z.shape[-1])
        return Quantized(values.permute(0, 4, 1, 2, 3), values.new_zeros(()), [ids], [residuals])


class CausalConv3d(nn.Conv3d):
    """Edges are repeated: half of the kernel on each side of height and width, all of it before the first frame."""

    def __init__(self, in_channels: int, out_channels: int, stride: Sequence[int] = (1, 1, 1)) -> None:
        super().__init__(in_channels, out_channels, 3, stride=tuple(stride))  # type: ignore[arg-type]

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(F.pad(x, (1, 1, 1, 1, 2, 0), mode="replicate"))


class FrameNorm(nn.GroupNorm):
    """GroupNorm of each frame by itself: over all frames it would look ahead."""

    def forward(self, x: Tensor) -> Tensor:
        frames = super().forward(x.transpose(1, 2).flatten(0, 1))  # BT C H W
        return frames.unflatten(0, (len(x), -1)).transpose(1, 2)


class Swish(nn.Module):
    """x sigmoid(beta x), with a beta a channel."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.beta = nn.Parameter(torch.ones(1, channels, 1, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.sigmoid(self.beta * x)


class ResidualUnit(nn.Module):
    """norm, Swish, conv, twice, plus the input (1x1x1 conv if widths differ)."""

    def __init__(self, in_channels: int, out_channels: int, groups: int) -> None:
        super().__init__()
        self.norm1, self.swish1 = FrameNorm(groups, in_channels), Swish(in_channels)
        self.conv1 = CausalConv3d(in_channels, out_channels)
        self.norm2, self.swish2 = FrameNorm(groups, out_channels), Swish(out_channels)
        self.conv2 = CausalConv3d(out_channels, out_channels)
        same = in_channels == out_channels
        self.shortcut = nn.Identity() if same else nn.Conv3d(in_channels, out_channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv1(self.swish1(self.norm1(x)))
        return self.shortcut(x) + self.conv2(self.swish2(self.norm2(h)))


class Upsample(CausalConv3d):
    """A conv to (t, h, w, C) channels, then these to places; what lies before the first frame is dropped, so that T
    frames become t (T - 1) + 1."""

    def __init__(self, in_channels: int, out_channels: int, stride: Sequence[int]) -> None:
        super().__init__(in_channels, out_channels * math.prod(stride))
        self.factor: tuple[int, ...] = tuple(stride)

    def forward(self, x: Tensor) -> Tensor:
        t, h, w = self.factor
        x = super().forward(x)
        batch, _, frames, height, width = x.shape
        x = x.view(batch, t, h, w, -1, frames, height, width).permute(0, 4, 5, 1, 6, 2, 7, 3)  # B C T t H h W w
        return x.reshape(batch, -1, frames * t, height * h, width * w)[:, :, t - 1 :]


def units(widths: Sequence[int], groups: int) -> nn.Sequential:
    """Residual units from width to width."""
    return nn.Sequential(*[ResidualUnit(i, o, groups) for i, o in pairwise(widths)])


def entry_width(before: int, width: int, count: int) -> int:
    """What the convolution into a stage gives: the first of its `count` units changes the width, if there is one."""
    return before if count else width


class Encoder(nn.Module):
    """(B, 3, T, H, W) in [0, 1] -> (B, C, t, h, w). Arguments: see `MagViT2`."""

    def __init__(
        self,
        latent_dim: int,
        base: int,
        widths: Sequence[int],
        num_units: Sequence[int],
        strides: Sequence[Sequence[int]],
        groups: int,
    ) -> None:
        super().__init__()
        before = entry_width(base, widths[0], num_units[0])
        self.conv_in = CausalConv3d(3, before)
        self.stages, self.down = nn.ModuleList(), nn.ModuleList()
        for i, (width, count) in enumerate(zip(widths, num_units, strict=True)):
            self.stages.append(units([before] + [width] * count, groups))
            if i < len(strides):
                before = entry_width(width, widths[i + 1], num_units[i + 1])
                self.down.append(CausalConv3d(width, before, strides[i]))
        self.norm_out, self.swish_out = FrameNorm(groups, widths[-1]), Swish(widths[-1])
        self.conv_out = nn.Conv3d(widths[-1], latent_dim, 1)

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv_in(x)
        for i, stage in enumerate(self.stages):
            h = stage(h)
            if i < len(self.down):
                h = self.down[i](h)
        return self.conv_out(self.swish_out(self.norm_out(h)))


class Decoder(nn.Module):
    """The mirror of `Encoder`: (B, C, t, h, w) -> (B, 3, T, H, W) in about [0, 1]. Index 0 of `stages` and `up` is the
    finest, though the coarsest runs first."""

    def __init__(
        self,
        latent_dim: int,
        widths: Sequence[int],
        num_units: Sequence[int],
        strides: Sequence[Sequence[int]],
        groups: int,
    ) -> None:
        super().__init__()
        self.conv_in = CausalConv3d(latent_dim, widths[-1])
        self.stages, self.up = nn.ModuleList(), nn.ModuleList()
        for i, (width, count) in enumerate(zip(widths, num_units, strict=True)):
            before = width
            if i < len(strides):
                before = entry_width(widths[i + 1], width, count)
                self.up.append(Upsample(widths[i + 1], before, strides[i]))
            self.stages.append(units([before] + [width] * count, groups))
        self.norm_out, self.swish_out = FrameNorm(groups, widths[0]), Swish(widths[0])
        self.conv_out = CausalConv3d(widths[0], 3)

    def forward(self, z: Tensor) -> Tensor:
        h = self.conv_in(z)
        for i in reversed(range(len(self.stages))):
            if i < len(self.up):
                h = self.up[i](h)
            h = self.stages[i](h)
        return self.conv_out(self.swish_out(self.norm_out(h)))


class MagViT2(HubMixin, ModelMixin, ConfigMixin, Tokenizer):
    """Clips <-> ids of one grid (t, h, w). The defaults are the released model: 17 frames of 128 x 128, 1280 tokens.

    Args:
        num_frames, image_size: of the clips that `layout` codes; image_size a side, or (height, width).
        base_channels: what the first convolution gives.
        widths, num_units: of each stage, finest first: channels, and residual units (0 is allowed: then the convolution
            that leads there changes the width).
        strides: (t, h, w) between each stage and the next.
        levels: of the quantiser; their product is the size of the codebook.
        norm_groups: of GroupNorm.
    Raises: ValueError on an impossible combination, naming both sides.
    """

    _no_split_modules = ("ResidualUnit",)
    _keep_in_fp32_modules: ClassVar[list[str]] = ["quantize"]  # as CodeUsage._apply, when opened with torch_dtype=
    free_arguments = frozenset({"num_frames", "image_size"})
    """Constructor arguments that weights do not depend on: what a run that starts from a model may change."""

    @register_to_config
    def __init__(
        self,
        num_frames: int = 17,
        image_size: int | Sequence[int] = 128,
        base_channels: int = 128,
        widths: Sequence[int] = (128, 256, 256, 512),
        num_units: Sequence[int] = (4, 4, 4, 8),
        strides: Sequence[Sequence[int]] = ((1, 2, 2), (2, 2, 2), (2, 2, 2)),
        levels: Sequence[int] = (8, 8, 8, 5, 5, 5),
        norm_groups: int = 32,
    ) -> None:
        super().__init__()
        if not len(widths) == len(num_units) == len(strides) + 1:
            raise ValueError(
                f"widths and num_units are of each stage, strides between them: one less; got {len(widths)}, "
                f"{len(num_units)} and {len(strides)}"
            )
        if min(num_units) < 0 or any(len(s) != 3 or min(s) < 1 for s in strides) or min(levels) < 2:
            raise ValueError(
                f"num_units must not be negative, strides be three numbers above 0 each, levels be at least 2; got "
                f"{tuple(num_units)}, {tuple(map(tuple, strides))} and {tuple(levels)}"
            )
        uneven = [w for w in (base_channels, *widths) if w % norm_groups]
        if uneven:
            raise ValueError(f"every width must be a multiple of norm_groups {norm_groups}; got {uneven[0]}")
        self.num_frames = num_frames
        self.frame_stride, *sides = (math.prod(axis) for axis in zip(*strides, strict=True)) if strides else (1, 1, 1)
        size = (image_size, image_size) if isinstance(image_size, int) else tuple(image_size)
        if len(size) != 2 or any(a % b or a < 1 for a, b in zip(size, sides, strict=True)):
            raise ValueError(f"image_size {size} must be a multiple of the strides, {sides[0]} and {sides[1]}")
        self._size = cast(tuple[int, int], size)
        grid = (self.latent_frames(num_frames), size[0] // sides[0], size[1] // sides[1])
        self.layout = TokenLayout((grid,), math.prod(levels), len(levels))
        sizes: dict[str, Any] = {"widths": widths, "num_units": num_units, "strides": strides, "groups": norm_groups}
        self.encoder = Encoder(len(levels), base_channels, **sizes)
        self.quantize = Quantizer(levels)
        self.decoder = Decoder(len(levels), **sizes)

    @property
    def image_size(self) -> tuple[int, int]:
        """Height and width of the clips that `layout` codes."""
        return self._size

    def latent_frames(self, frames: int) -> int:
        """Of so many frames. Raises ValueError where they are not 1 + m times the stride in time."""
        if frames < 1 or (frames - 1) % self.frame_stride:
            several = ", ".join(str(1 + m * self.frame_stride) for m in range(4))
            raise ValueError(f"{frames} frames: one, then {self.frame_stride} at a time are coded ({several}, ...)")
        return 1 + (frames - 1) // self.frame_stride

    @property
    def codebook(self) -> Tensor:
        """(V, C) float32: the values of all codes."""
        return self.vectors(torch.arange(self.quantize.fsq.steps.prod(), device=self.quantize.fsq.steps.device))

    def vectors(self, ids: Tensor) -> Tensor:
        return self.quantize.fsq.vectors(ids)

    def features(self, clips: Tensor) -> Tensor:
        """(B, 3, T, H, W) in [-1, 1] -> (B, C, t, h, w): the encoder's output, before quantisation.

        Raises: ValueError for another number of frames than 1 + m times the stride in time, or sides that it does not
            divide.
        """
        if clips.dim() != 5 or clips.shape[1] != 3:
            raise ValueError(f"clips must be (B, 3, T, H, W) in [-1, 1]; got shape {tuple(clips.shape)}")
        self.latent_frames(clips.shape[2])
        weight = self.encoder.conv_in.weight
        return self.encoder(((clips + 1) / 2).to(weight.dtype))

    def _encode(self, clips: Tensor) -> Tensor:
        if tuple(clips.shape[-2:]) != self._size:
            raise ValueError(
                f"clips are {clips.shape[-2]}x{clips.shape[-1]}, this tokenizer codes {self._size[0]}x{self._size[1]}; "
                f"resize them, or open it with image_size="
            )
        fsq = self.quantize.fsq
        return fsq.ids(fsq(self.features(clips).permute(0, 2, 3, 4, 1))).flatten(1)

    def encode(self, images: Tensor, rng: Rng | None = None) -> Tensor:
        """(B, 3, num_frames, H, W) in [-1, 1] -> ids (B, L). Raises ValueError on another size."""
        if images.dim() != 5 or images.shape[2] != self.num_frames:
            raise ValueError(
                f"clips must be (B, 3, {self.num_frames}, H, W); got shape {tuple(images.shape)}. Of fewer frames "
                f"encode_start gives the first tokens"
            )
        return self._encode(images)

    def encode_start(self, frames: Tensor) -> Tensor:
        """(B, 3, T, H, W) in [-1, 1], T at most num_frames -> the ids of their latent frames, (B, k).

        Raises: ValueError for another number of frames than 1 + m times the stride in time.
        """
        if frames.dim() == 5 and frames.shape[2] > cast(int, self.num_frames):
            raise ValueError(f"{frames.shape[2]} frames are more than the {self.num_frames} of a clip")
        return self._encode(frames)

    def decode_features(self, latents: Tensor) -> Tensor:
        """Quantised (B, C, t, h, w) -> clips (B, 3, T, H, W), not clamped."""
        return self.decoder(latents.to(self.decoder.conv_in.weight.dtype)) * 2 - 1

    def latents(self, tokens: Tensor) -> Tensor:
        """Ids (B, L) or vectors (B, L, C) -> (B, C, t, h, w). Raises ValueError when they do not fill the grid."""
        vectors = tokens.float() if tokens.is_floating_point() else self.vectors(tokens)
        self.layout.split(vectors)
        return vectors.transpose(1, 2).unflatten(2, self.layout.grids[0])

    def decode(self, tokens: Tensor, rng: Rng | None = None) -> Tensor:
        """Ids (B, L) or vectors (B, L, C) -> clips (B, 3, num_frames, H, W) in [-1, 1]."""
        return self.decode_features(self.latents(tokens)).clamp(-1, 1)

    def forward(self, images: Tensor) -> tuple[Tensor, Quantized]:
        """Training: clips of any size that the strides divide -> (reconstruction, not clamped; what the quantiser
        did)."""
        quantized = self.quantize(self.features(images))
        return self.decode_features(quantized.features), quantized


def _builder(**preset: Any) -> Callable[..., MagViT2]:
    return lambda **overrides: cast(MagViT2, MagViT2(**{**preset, **overrides}))


TINY: dict[str, Any] = {
    "num_frames": 5,
    "image_size": 8,
    "base_channels": 8,
    "widths": (8, 16, 16),
    "num_units": (0, 1, 1),
    "strides": ((1, 2, 2), (2, 2, 2)),
    "levels": (4, 3, 2),
    "norm_groups": 4,
}
"""Overrides that make any of these small enough for a test."""

register_model(
    ModelEntry(
        "magvit2_nbp",
        "tokenizer",
        _builder(),
        "NBP's causal video tokenizer: 17 frames of 128x128, 64000 codes, 1280 tokens",
        tiny=TINY,
    )
)
register_model(
    ModelEntry(
        "magvit2_moving_fashion",
        "tokenizer",
        _builder(
            image_size=32,
            base_channels=16,
            widths=(16, 32, 48, 64),
            norm_groups=8,
            num_units=(0, 1, 2, 2),
            strides=((1, 2, 2), (2, 2, 2), (2, 1, 1)),
            levels=(8, 5, 5, 5),
        ),
        "moving garments, 17 frames of 32x32: 1000 codes, 320 tokens, cheap enough for one CPU core",
        tiny=TINY,
    )
)
for _data, _score in (("ucf", "rFVD 15.50 on UCF-101 (paper)"), ("k600", "rFVD 6.73 on Kinetics-600 (paper)")):
    register_checkpoint(
        Checkpoint(
            name=f"magvit2_nbp.{_data}",
            repo_id=f"ShuhuaiRen/NBP-tokenizer-{_data}",
            filename=f"magvit2_{_data}.pt",
            licence="MIT",
            paper="arXiv 2502.07737",
            resolution=128,
            official_score=_score,
        )
    )
