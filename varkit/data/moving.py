"""Moving-Fashion: clips computed from Fashion-MNIST when they are asked for, and stored nowhere.

    clips = MovingFashion("train").clips([0, 1], frames=17)                # uint8 (2, 17, 32, 32)

Each clip shows one or two garments of one class, which move horizontally, vertically or diagonally at a steady speed
and bounce off the edges, as digits do in Moving MNIST (Srivastava et al., arXiv 1502.04681). 30 classes: a garment and
a motion. Clip `index` has image `index` of its split as its first garment. Everything else of it (motion, second
garment, places, speeds) is a function of split, index and seed alone, and any number of frames may be asked for.
"""

from __future__ import annotations

from collections.abc import Sequence
from copy import copy
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch

from varkit.data.fashion import FASHION_CLASSES, LabelArray, PixelArray, read_fashion_mnist
from varkit.data.video import Clip, VideoInfo, VideoSet
from varkit.rng import Draw, Rng

MOVING_FASHION = "moving-fashion"
MOTIONS = ("horizontal", "vertical", "diagonal")
MOVING_CLASSES = tuple(f"{garment.lower()}, {motion}" for garment in FASHION_CLASSES for motion in MOTIONS)
"""Names by id, which is garment * 3 + motion."""

LENGTH = 64
"""Frames of a clip as a video of a set: where training begins, at random, lies within these."""
SPEEDS = (1 / 48, 1 / 16)
"""Sides of the picture that a garment moves a frame, along each axis on which it moves."""
SIZES = (8, 128)

Numbers = npt.NDArray[np.float64]


class MovingFashion(VideoSet):
    """N videos of `LENGTH` frames, one for each image of a split of Fashion-MNIST: 60,000 or 10,000.

    Args:
        split: train, or test ("val" and "validation" mean the same).
        size: pixels of a side, even; garments are half as wide and high.
        seed: another one gives other clips of the same garments.   root: as `read_fashion_mnist`.
        num: only the first so many.
    Attributes: labels, int64 (N,).   classes: 30 names.
    Raises: FileNotFoundError as `read_fashion_mnist`; ValueError for a size or number that cannot be.
    """

    def __init__(
        self,
        split: str = "train",
        *,
        size: int = 32,
        seed: int = 0,
        root: str | Path | None = None,
        num: int | None = None,
    ) -> None:
        self.garments, garment_labels, path = read_fashion_mnist(split, root)
        if num is not None and not 0 < num <= len(self.garments):
            raise ValueError(f"{MOVING_FASHION} has 1 to {len(self.garments)} clips in {path.name}; got {num}")
        count = len(self.garments) if num is None else num
        self.seed, self.held_out = seed, split != "train"
        self.by_class = np.argsort(garment_labels, kind="stable")
        self.first_of_class = np.searchsorted(garment_labels[self.by_class], np.arange(len(FASHION_CLASSES) + 1))
        self.garment_labels: LabelArray = garment_labels
        self.motions = np.arange(count) % len(MOTIONS)  # the labels of Fashion-MNIST are in no order
        self.labels = garment_labels[:count] * len(MOTIONS) + self.motions
        self.classes = list(MOVING_CLASSES)
        self._set_side(size)
        names = [f"{MOVING_FASHION}[{i}]" for i in range(count)]
        super().__init__([_MovingVideo(self, i) for i in range(count)], names, str(path))

    def _set_side(self, side: int) -> None:
        if not SIZES[0] <= side <= SIZES[1] or side % 2:
            raise ValueError(f"{MOVING_FASHION} is computed at even sizes from {SIZES[0]} to {SIZES[1]}; got {side}")
        self.side, self.garment_side = side, side // 2
        self.overlap = area_weights(self.garments.shape[1], self.garment_side)

    def resized(self, size: tuple[int, int]) -> MovingFashion:
        """The same clips at another size, height and width. Raises: ValueError where they cannot have it."""
        if size[0] != size[1]:
            raise ValueError(f"{MOVING_FASHION} is square; got {size[0]}x{size[1]}")
        other = copy(self)
        other._set_side(size[0])
        other.videos = [_MovingVideo(other, i) for i in range(len(self))]
        return other

    def clips(
        self, indices: Sequence[int], frames: int, stride: int = 1, starts: Sequence[int] | int = 0
    ) -> PixelArray:
        """The frames start, start + stride, ... of these clips: uint8 (B, T, H, W), grey. T has no end.

        Raises: IndexError.
        """
        index = np.asarray(indices, np.int64)
        count = len(self.labels)
        if bad := index[(index < 0) | (index >= count)].tolist():
            raise IndexError(f"{MOVING_FASHION} has clips 0 to {count - 1} here; got {bad[0]}")
        first = np.broadcast_to(np.asarray(starts, np.int64), len(index))
        times = first[:, None] + np.arange(frames) * stride  # B T
        u = self._uniforms(index)  # B 8: two garments or one, which second one, three numbers of the way of each
        kind, motions = self.garment_labels[index], self.motions[index]
        begin, end = self.first_of_class[kind], self.first_of_class[kind + 1]
        second = self.by_class[begin + (u[:, 1] * (end - begin)).astype(np.int64)]
        out = np.zeros((len(index), frames, self.side, self.side), np.uint8)
        rows = np.arange(len(index))
        self._draw(out, rows, index, motions, u[:, 2:5], times)
        rows = np.nonzero(u[:, 0] < 0.5)[0]
        self._draw(out, rows, second[rows], motions[rows], u[rows, 5:], times[rows])
        return out

    def _uniforms(self, index: npt.NDArray[np.int64]) -> Numbers:
        """(B, 8) in (0, 1)."""
        keys = torch.from_numpy(index + (int(self.held_out) << 32))
        return Rng.for_keys(self.seed, keys).uniform(torch.arange(8), Draw.MOTION).double().numpy()

    def _draw(
        self,
        out: PixelArray,
        rows: npt.NDArray[np.int64],
        garments: npt.NDArray[np.int64],
        motions: npt.NDArray[np.int64],
        u: Numbers,
        times: npt.NDArray[np.int64],
    ) -> None:
        """Lay one garment over b rows of (B, T, H, W), the lighter pixel in front.

        Args: u: (b, 3), where on its way down and across it is at first, and how fast.   times: (b, T).
        """
        room = self.side - self.garment_side
        speed = self.side * (SPEEDS[0] + (SPEEDS[1] - SPEEDS[0]) * u[:, 2])
        down = np.where(motions == 0, 0.0, speed)[:, None] * times
        across = np.where(motions == 1, 0.0, speed)[:, None] * times
        top, left = bounce(2 * room * u[:, :1] + down, room), bounce(2 * room * u[:, 1:2] + across, room)  # b T
        steps = np.arange(self.garment_side)
        where = (
            rows[:, None, None, None],
            np.arange(times.shape[1])[:, None, None],
            top[:, :, None, None] + steps[:, None],
            left[:, :, None, None] + steps,
        )
        out[where] = np.maximum(out[where], shrink(self.garments[garments], self.overlap)[:, None])


class _MovingVideo:
    """One clip as a `Video`."""

    def __init__(self, clips: MovingFashion, index: int) -> None:
        self.clips, self.index = clips, index

    def info(self) -> VideoInfo:
        return VideoInfo(LENGTH, self.clips.side, self.clips.side)

    def rate(self) -> float | None:
        return None

    def read(self, frames: int, stride: int, start: int) -> Clip:
        grey = self.clips.clips([self.index], frames, stride, start)[0]
        return np.repeat(grey[..., None], 3, -1)


def bounce(place: Numbers, room: int) -> npt.NDArray[np.int64]:
    """Places on an endless line -> whole pixels in 0 .. room, folded at both ends: half of the line leads back."""
    return np.rint(room - np.abs(np.mod(place, 2 * room) - room)).astype(np.int64)


def area_weights(old: int, new: int) -> npt.NDArray[np.int64]:
    """(new, old): how much of each old pixel lies in each new one, in parts of 1 / new; rows sum to `old`."""
    ends = np.minimum((np.arange(new)[:, None] + 1) * old, (np.arange(old) + 1) * new)
    starts = np.maximum(np.arange(new)[:, None] * old, np.arange(old) * new)
    return np.maximum(ends - starts, 0)


def shrink(images: PixelArray, overlap: npt.NDArray[np.int64]) -> PixelArray:
    """uint8 (B, h, h) by area to (B, H, H), in whole numbers: the same bytes on every machine."""
    whole = images.shape[-1] ** 2
    sums = overlap @ images.astype(np.int64) @ overlap.T
    return ((sums + whole // 2) // whole).astype(np.uint8)
