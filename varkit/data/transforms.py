"""From stored pixels to what a model reads: decoding to RGB, resizing, cropping, padding, flipping.

Shapes: N stored images, B in a batch, C channels (1 or 3), h w size as stored, H W of the output.
"""

import logging
import math
import os
from contextlib import suppress
from dataclasses import dataclass
from typing import BinaryIO, Literal, NamedTuple, Protocol, get_args

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image, ImageOps
from torch import Tensor
from torch.nn import functional as F

from varkit.rng import Draw, Rng

log = logging.getLogger("varkit.data")

Mode = Literal["crop", "center", "pad", "squash", "shift"]

RANDOM_MODES = ("crop", "shift")
SHIFT = 1 / 32
"""Images of mode `shift` move by up to this share of their sides."""

EXTENSIONS = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp")
MAX_FAILURES = 100  # consecutive unreadable images after which a set is given up
MAX_BYTES = 2**30  # of one encoded image; more than Pillow agrees to decode, whatever the format


def to_rgb(image: Image.Image) -> Image.Image:
    """Any still image as 8-bit RGB: EXIF orientation applied, alpha laid on white, grey repeated.

    16-bit grey is scaled by 1/257 (65535 becomes 255); 32-bit integers count as 16-bit.

    Raises: ValueError for modes without a fixed range (float) or a conversion (LAB).
    """
    image = ImageOps.exif_transpose(image)
    if image.mode == "I" or image.mode.startswith("I;16"):
        wide = np.clip(np.asarray(image).astype(np.int64), 0, 65535)
        image = Image.fromarray(((wide + 128) // 257).astype(np.uint8))
    elif image.mode == "F":
        raise ValueError("float images have no fixed range; save them with 8 or 16 bits a channel")
    if image.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in image.info:
        if image.mode == "La":  # Pillow has no direct way from premultiplied grey to RGBA
            image = image.convert("LA")
        colour = image.convert("RGBA")
        white = Image.new("RGBA", colour.size, (255, 255, 255, 255))
        image = Image.alpha_composite(white, colour)
    return image.convert("RGB")


def to_pixels(image: Image.Image) -> Tensor:
    """RGB image -> uint8 (3, h, w)."""
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous()


@dataclass(frozen=True)
class ImageTransform:
    """uint8 images -> float32 images of one size in [-1, 1] (0 becomes -1, 255 becomes 1, exactly).

    What is random depends only on (`seed`, key of the image): not on the batch, the worker or the
    process. Whoever wants another crop in the next epoch gives another key (see `ImageDataset`).

    Source of the crop and center rules: FoundationVision/VAR: utils/data.py (Lanczos resize of the
    shorter side to round(1.125 size), then RandomCrop in training and CenterCrop in validation).
    """

    size: int | tuple[int, int]
    """Pixels of the output: one number for a square, or (height, width)."""
    mode: Mode = "crop"
    """crop: resize to cover `enlarge` * size, cut a random window.  center: cut the middle instead.
    pad: no resizing, centred on black (-1).  squash: resize to `size`, aspect ratio not kept.
    shift: the same, then moved by up to 1/32 of the sides at random; what comes in repeats the edge."""
    enlarge: float = 1.125
    """crop and center only: the shorter side becomes round(enlarge * size); at least 1."""
    flip: bool = False
    """Mirror left-right with probability 1/2."""
    seed: int = 0
    """Seed of crop windows, shifts and flips."""

    def __post_init__(self) -> None:
        if isinstance(self.size, list):  # how YAML and JSON write a pair
            object.__setattr__(self, "size", tuple(self.size))
        sides = self.size if isinstance(self.size, tuple) else (self.size, self.size)
        if len(sides) != 2 or not all(type(side) is int and side > 0 for side in sides):
            raise ValueError(f"size is {self.size!r}; give a positive int or (height, width)")
        if self.mode not in get_args(Mode):
            raise ValueError(f"mode is {self.mode!r}; choose one of {', '.join(get_args(Mode))}")
        if not (math.isfinite(self.enlarge) and self.enlarge >= 1):
            raise ValueError(f"enlarge is {self.enlarge}; it multiplies size before cropping and must be >= 1")
        if type(self.flip) is not bool:
            raise ValueError(f"flip is {self.flip!r}; give true or false")
        if type(self.seed) is not int:
            raise ValueError(f"seed is {self.seed!r}; give an int")

    @property
    def height_width(self) -> tuple[int, int]:
        """Size of the output in pixels."""
        return self.size if isinstance(self.size, tuple) else (self.size, self.size)

    def __call__(self, images: Tensor, keys: Tensor | int | None = None) -> Tensor:
        """Transform a batch, or one image.

        Args:
            images: uint8 (B, C, h, w) or (C, h, w) with C = 1 or 3; resized by antialiased bicubic.
            keys: int64 (B,), or an int for one image; None counts from 0.
        Returns: float32 (B, 3, H, W) or (3, H, W) in [-1, 1].
        Raises: ValueError for another dtype or shape, or an image larger than a `pad` size.
        """
        if images.dtype != torch.uint8 or images.ndim not in (3, 4) or images.shape[-3] not in (1, 3):
            raise ValueError(
                f"images are {images.dtype} {tuple(images.shape)}; "
                "expected uint8 (B, C, h, w) or (C, h, w) with 1 or 3 channels"
            )
        if images.ndim == 3:
            return self(images[None], torch.tensor([0 if keys is None else int(keys)]))[0]
        keys = torch.arange(len(images)) if keys is None else torch.as_tensor(keys)
        if keys.shape != (len(images),):
            raise ValueError(f"{len(images)} images but keys of shape {tuple(keys.shape)}")
        target = self.resized(*images.shape[-2:])
        if target != tuple(images.shape[-2:]):
            from torchvision.transforms import InterpolationMode
            from torchvision.transforms.v2 import functional as TF

            images = TF.resize(images, list(target), InterpolationMode.BICUBIC, antialias=True)
        return self._place(images, self.uniforms(keys).to(images.device))

    def apply_pil(
        self, image: Image.Image, uniforms: Tensor, resample: Image.Resampling = Image.Resampling.LANCZOS
    ) -> Tensor:
        """One RGB image -> float32 (3, H, W) in [-1, 1], resized by Pillow.

        Args:
            uniforms: (3,), this image's row of `uniforms(keys)`.
            resample: the filter of images is Lanczos; that of maps may be another.
        Raises: ValueError if the image is larger than a `pad` size.
        """
        height, width = self.resized(image.height, image.width)
        if (width, height) != image.size:
            image = image.resize((width, height), resample)
        return self._place(to_pixels(image)[None], uniforms[None])[0]

    def uniforms(self, keys: Tensor) -> Tensor:
        """The random numbers of each image: int64 keys (B,) -> float32 (B, 3): top, left, flip."""
        if self.mode not in RANDOM_MODES and not self.flip:
            return torch.zeros(len(keys), 3)
        return Rng.for_keys(self.seed, keys).uniform(torch.arange(3), Draw.AUGMENT)

    def resized(self, height: int, width: int) -> tuple[int, int]:
        """Size to which an image of (height, width) is resized before it is cropped or padded."""
        out_height, out_width = self.height_width
        if self.mode in ("squash", "shift"):
            return out_height, out_width
        if self.mode == "pad":
            if height > out_height or width > out_width:
                raise ValueError(
                    f"an image of {height}x{width} does not fit into pad size "
                    f"{out_height}x{out_width}; use a larger size, or mode crop, center or squash"
                )
            return height, width
        cover_height, cover_width = (
            round(self.enlarge * out_height),
            round(self.enlarge * out_width),
        )
        if cover_height * width >= cover_width * height:
            return cover_height, int(cover_height * width / height)
        return int(cover_width * height / width), cover_width

    def _place(self, images: Tensor, uniforms: Tensor) -> Tensor:
        """Resized uint8 (B, C, h, w) -> cropped or padded float32 (B, 3, H, W)."""
        height, width = self.height_width
        down, right = images.shape[-2] - height, images.shape[-1] - width
        if self.mode == "crop":
            windows = images.unfold(2, height, 1).unfold(3, width, 1)  # a view: no copy is made
            rows, columns = _offsets(uniforms[:, 0], down), _offsets(uniforms[:, 1], right)
            images = windows[torch.arange(len(images), device=images.device), :, rows, columns]
        elif self.mode == "center":
            top, left = round(down / 2), round(right / 2)
            images = images[..., top : top + height, left : left + width]
        elif self.mode == "shift":
            rows = _moved(uniforms[:, 0], height)[:, :, None]  # B H 1
            columns = _moved(uniforms[:, 1], width)[:, None]  # B 1 W
            which = torch.arange(len(images), device=images.device)[:, None, None]
            images = images[which, :, rows, columns].permute(0, 3, 1, 2)
        if self.flip:  # before padding: the picture keeps its place
            mirrored = (uniforms[:, 2] < 0.5)[:, None, None, None]
            images = torch.where(mirrored, images.flip(-1), images)
        if self.mode == "pad":
            top, left = -down // 2, -right // 2
            images = F.pad(images, (left, -right - left, top, -down - top))
        floats = images.to(torch.float32).div_(127.5).sub_(1)
        return floats.repeat(1, 3, 1, 1) if floats.shape[1] == 1 else floats.contiguous()


def _offsets(uniforms: Tensor, room: int) -> Tensor:
    """Uniforms in (0, 1) -> int64 in [0, room]; clamped because a product may round up."""
    return (uniforms * (room + 1)).long().clamp_(max=room)


def _moved(uniforms: Tensor, side: int) -> Tensor:
    """Uniforms (B,) -> which row or column of the image comes where, (B, side)."""
    most = round(side * SHIFT)
    start = _offsets(uniforms, 2 * most) - most
    return (torch.arange(side, device=uniforms.device) + start[:, None]).clamp_(0, side - 1)


_ELSEWHERE = "could not be decoded in a loader worker, whose log says why"


class SkippedImage(NamedTuple):
    """An image that is left out, and why."""

    path: str
    reason: str


class Pixels(Protocol):
    """Where the pixels of a set are; reads whole batches."""

    def __len__(self) -> int: ...

    def read(self, indices: list[int], keys: Tensor, transform: ImageTransform | None) -> tuple[Tensor, list[int]]:
        """Images (B, 3, H, W), and the indices of the images that were really read."""
        ...

    def failures(self) -> list[SkippedImage]: ...


class ArrayPixels:
    """uint8 (N, h, w), (N, h, w, 1) or (N, h, w, 3); may be a memory map."""

    def __init__(self, array: npt.NDArray[np.uint8]) -> None:
        self.array = array if array.ndim == 4 else array[..., None]

    def __len__(self) -> int:
        return len(self.array)

    def read(self, indices: list[int], keys: Tensor, transform: ImageTransform | None) -> tuple[Tensor, list[int]]:
        images = torch.from_numpy(np.asarray(self.array[indices])).permute(0, 3, 1, 2)
        if transform is not None:
            return transform(images, keys), indices
        return images.expand(-1, 3, -1, -1).contiguous(), indices

    def failures(self) -> list[SkippedImage]:
        return []


class FilePixels:
    """Image files, decoded when asked for; for an unreadable one the next readable one is given.

    Images that are encoded but no files of their own are a subclass with another `open`; `paths` then name them.
    """

    def __init__(self, paths: list[str]) -> None:
        self.paths = paths
        self.reasons: dict[int, str] = {}
        self.unreadable = torch.zeros(len(paths), dtype=torch.bool)
        with suppress(RuntimeError):  # no shared memory: then each worker keeps its own record
            self.unreadable.share_memory_()

    def __len__(self) -> int:
        return len(self.paths)

    def open(self, index: int) -> BinaryIO:
        """Image `index` as it is stored, encoded; to be closed. Raises: OSError or ValueError if it cannot be had."""
        refuse_large(os.stat(self.paths[index]).st_size)
        return open(self.paths[index], "rb")

    def read(self, indices: list[int], keys: Tensor, transform: ImageTransform | None) -> tuple[Tensor, list[int]]:
        uniforms = None if transform is None else transform.uniforms(keys)
        images, used = [], []
        for row, wanted in enumerate(indices):
            image, index = self.load(wanted)
            used.append(index)
            if transform is None or uniforms is None:
                images.append(to_pixels(image))
                continue
            try:
                images.append(transform.apply_pil(image, uniforms[row]))
            except ValueError as error:
                raise ValueError(f"{self.paths[index]}: {error}") from error
        return stack_images(images), used

    def load(self, wanted: int) -> tuple[Image.Image, int]:
        """The first readable image at or after `wanted`, wrapping round, as RGB, and its index."""
        tries = min(len(self.paths), MAX_FAILURES)
        for index in ((wanted + step) % len(self.paths) for step in range(tries)):
            if self.unreadable[index]:
                continue
            try:
                with self.open(index) as file, Image.open(file) as image:
                    return to_rgb(image), index
            except Exception as error:  # Pillow's plugins raise anything on damaged files
                self.unreadable[index] = True
                self.reasons[index] = reason_of(error)
                log.warning("skipping %s: %s", self.paths[index], self.reasons[index])
        reason = self.reasons.get(wanted, _ELSEWHERE)
        raise ValueError(
            f"no readable image among {tries} in a row from {self.paths[wanted]} on ({reason}); "
            "remove or replace the damaged files"
        )

    def failures(self) -> list[SkippedImage]:
        where = self.unreadable.nonzero().flatten().tolist()
        return [SkippedImage(self.paths[i], self.reasons.get(i, _ELSEWHERE)) for i in where]


def stack_images(images: list[Tensor]) -> Tensor:
    """(3, h, w) tensors -> (B, 3, h, w). Raises ValueError if their sizes differ."""
    sizes = {tuple(image.shape[-2:]) for image in images}
    if len(sizes) > 1:
        some = ", ".join(f"{h}x{w}" for h, w in sorted(sizes)[:4])
        raise ValueError(f"images of sizes {some} in one batch; give an ImageTransform")
    return torch.stack(images)


def refuse_large(size: int) -> None:
    """Raises ValueError for more bytes than an encoded image can have."""
    if size > MAX_BYTES:
        raise ValueError(f"{size:,} bytes; an image may have {MAX_BYTES:,} at most")


def reason_of(error: Exception) -> str:
    """An exception as one line of text."""
    text = " ".join(str(error).split())
    return text if type(error) in (ValueError, OSError) and text else f"{type(error).__name__}: {text}"
