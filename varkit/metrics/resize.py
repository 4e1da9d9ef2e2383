"""Images to a network's size and to its range of values, each tool's way.

The published distances differ by several points from this step alone. All of it is torch's own interpolation: it is
faster than a gather or a product with weight matrices, and an image never depends on the others of its batch.

Sources: tensorflow/tensorflow: core/kernels/image_resizer_state.h, as torch-fidelity repeats it
(toshas/torch-fidelity: torch_fidelity/interpolate_compat_tensorflow.py, 5e211a9); python-pillow/Pillow:
src/libImaging/Resample.c, which pytorch/pytorch: aten/src/ATen/native/cpu/UpSampleKernel.cpp follows where antialiased.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Literal, get_args

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

Method = Literal["bilinear", "bicubic"]
Sampling = Literal["tf1", "half_pixel", "pil"]
Scaling = Literal["(x-128)/128", "x/127.5-1", "x/255", "(x-127)/128"]


@contextmanager
def exact_matmul(device: torch.device | str = "cpu") -> Iterator[None]:
    """Inside, float32 products and convolutions on `device` are float32: no TF32, no bfloat16, no autocast.

    The settings of precision are torch's own and global; they are put back afterwards.
    """
    backends: Any = torch.backends
    with torch.autocast(torch.device(device).type, enabled=False):
        if hasattr(backends.cudnn, "conv"):  # torch >= 2.9: reading its older settings may be an error
            parts = (backends.cuda.matmul, backends.cudnn.conv, backends.mkldnn.matmul, backends.mkldnn.conv)
            before = [part.fp32_precision for part in parts]
            try:
                for part in parts:
                    part.fp32_precision = "ieee"
                yield
            finally:
                for part, value in zip(parts, before, strict=True):
                    part.fp32_precision = value
            return
        matmul, convolution = torch.get_float32_matmul_precision(), backends.cudnn.allow_tf32
        try:
            torch.set_float32_matmul_precision("highest")
            backends.cudnn.allow_tf32 = False
            yield
        finally:
            torch.set_float32_matmul_precision(matmul)
            backends.cudnn.allow_tf32 = convolution


def check_images(images: Tensor) -> Tensor:
    """The images themselves. Raises ValueError unless they are uint8 (B, 3, H, W)."""
    if images.ndim != 4 or images.shape[1] != 3 or images.dtype != torch.uint8:
        raise ValueError(
            f"images must be uint8 (B, 3, H, W) in [0, 255]; got {images.dtype} {tuple(images.shape)}. Floats become "
            "uint8 by the rule of the protocol (varkit.pictures.to_uint8), grey images RGB by repeating the channel"
        )
    return images


def resize(
    images: Tensor,
    size: Sequence[int],
    *,
    method: Method = "bilinear",
    sampling: Sampling = "tf1",
    antialias: bool = False,
    dtype: Literal["float32", "uint8"] = "float32",
    clip: Sequence[float] | None = None,
) -> Tensor:
    """Images at another size; images that have it keep their values.

    Args:
        images: (B, C, h, w) uint8 or float, in any range.   size: (H, W).
        method: `bilinear` or `bicubic`; the cubic kernel has a = -0.5 where antialiased, else -0.75, as in torch.
        sampling: where an output pixel lies. `tf1`: at i * in / out (TensorFlow 1, bilinear only). `half_pixel`:
            pixel centres agree (torch, align_corners=False). `pil`: the same as Pillow computes it, always antialiased.
        antialias: widen the kernel where the image shrinks.
        dtype: `uint8` lets Pillow round to 8 bits after each axis: for `pil` and uint8 images alone.
        clip: (low, high) to clamp the result to: a cubic kernel overshoots.
    Returns: (B, C, H, W) float32 on the device of the images.
    Raises: ValueError for other shapes, names, or combinations that no tool has.
    """
    _check_rule(images, size, method, sampling, antialias, dtype)
    target = (int(size[0]), int(size[1]))
    if target == tuple(images.shape[2:]):
        x = images.float()
    elif dtype == "uint8":
        x = _resized_by_pillow(images, target, method)
    elif sampling == "tf1":
        x = _resized_as_tensorflow(images.float(), target)
    elif sampling == "half_pixel":
        x = F.interpolate(images.float(), target, mode=method, align_corners=False, antialias=antialias)
    else:  # the same sums, with weights in double precision, which Apple's devices lack
        x = (images.cpu() if images.device.type == "mps" else images).double()
        x = F.interpolate(x, target, mode=method, align_corners=False, antialias=True).to(images.device, torch.float32)
    return x if clip is None else x.clamp(*clip)


def scale_pixels(x: Tensor, rule: Scaling | None) -> Tensor:
    """Pixels of [0, 255] to the range of a network; None leaves them. (x-128)/128 takes 255 to 0.9922.

    Args: x: any shape, uint8 or float; the result is a float.
    Raises: ValueError for another rule.
    """
    x = x if x.is_floating_point() else x.float()
    if rule is None:
        return x
    if rule == "(x-128)/128":
        return (x - 128) / 128
    if rule == "x/127.5-1":
        return x / 127.5 - 1
    if rule == "x/255":
        return x / 255
    if rule == "(x-127)/128":
        return (x - 127) / 128
    raise ValueError(f"scaling must be one of {', '.join(get_args(Scaling))} or None; got {rule!r}")


def _check_rule(images: Tensor, size: Sequence[int], method: str, sampling: str, antialias: bool, dtype: str) -> None:
    """Raises ValueError as `resize` does."""
    if images.ndim != 4 or 0 in images.shape or not (images.dtype == torch.uint8 or images.is_floating_point()):
        raise ValueError(f"images must be uint8 or float (B, C, H, W); got {images.dtype} {tuple(images.shape)}")
    if len(size) != 2 or min(size) < 1:
        raise ValueError(f"size must be (height, width), both at least 1; got {tuple(size)}")
    for name, value, allowed in (
        ("method", method, get_args(Method)),
        ("sampling", sampling, get_args(Sampling)),
        ("dtype", dtype, ("float32", "uint8")),
    ):
        if value not in allowed:
            raise ValueError(f"{name} must be one of {', '.join(allowed)}; got {value!r}")
    if sampling == "tf1" and (method != "bilinear" or antialias):
        raise ValueError(f"tf1 is bilinear without antialias; got {method}, antialias={antialias}. Take half_pixel")
    if sampling == "pil" and not antialias:
        raise ValueError("Pillow always antialiases: sampling pil needs antialias=True. Without it take half_pixel")
    if dtype == "uint8" and (sampling != "pil" or images.dtype != torch.uint8):
        raise ValueError(
            f"dtype uint8 is Pillow's rounding: it needs sampling pil and uint8 images; got {sampling}, {images.dtype}"
        )


def _resized_by_pillow(images: Tensor, size: tuple[int, int], method: str) -> Tensor:
    """uint8 (B, C, h, w) -> float32 (B, C, H, W) of whole numbers."""
    planes = images.flatten(0, 1).cpu().numpy()
    kernel = Image.Resampling[method.upper()]
    made = [np.asarray(Image.fromarray(plane).resize((size[1], size[0]), kernel)) for plane in planes]
    return torch.from_numpy(np.stack(made)).unflatten(0, images.shape[:2]).to(images.device, torch.float32)


def _resized_as_tensorflow(x: Tensor, size: tuple[int, int]) -> Tensor:
    """float32 (B, C, h, w) -> (B, C, H, W), bilinear, the source of pixel i at i * in / out.

    That is where corner-aligned pixels lie, (in + 1 - 1) / (out + 1 - 1) apart, if each axis has one pixel more on both
    sides: the last one repeated going in, cut off coming out.
    """
    longer = F.pad(x, (0, 1, 0, 1), mode="replicate")
    return F.interpolate(longer, (size[0] + 1, size[1] + 1), mode="bilinear", align_corners=True)[..., :-1, :-1]
