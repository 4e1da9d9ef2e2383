"""Weights in eight bits on disk: half the size of float16, opened as float32.

Each matrix row, filter or embedding has a scale of its own, so that its largest weight is 127 and each is off by at
most 1 / 254 of that. Vectors (biases, norms) and small tensors stay float16. It is for files that must be small, such
as models that ship with the package; it makes nothing faster.
"""

from __future__ import annotations

from collections.abc import Mapping
from inspect import signature
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

FILE = "diffusion_pytorch_model.int8.safetensors"
SCALE = ".int8_scale"
SMALLEST = 1024
"""Tensors of fewer numbers are not worth a scale."""


def _row_dim(x: Tensor) -> int:
    """The dimension whose entries have a scale each: the first that is longer than one."""
    return next((d for d, size in enumerate(x.shape) if size > 1), 0)


def pack_tensors(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Weights -> int8 with scales (float32) under NAME + SCALE, others float16; integers stay as they are.

    Raises: ValueError for a weight that is not finite, or too large for float16, naming it.
    """
    packed: dict[str, Tensor] = {}
    for name, x in state.items():
        x = x.detach().cpu()
        if x.is_floating_point() and not x.half().isfinite().all():
            raise ValueError(f"{name} holds numbers that are not finite, or too large for float16: it cannot be packed")
        if x.is_floating_point() and x.dim() > 1 and x.numel() >= SMALLEST:
            others = [d for d in range(x.dim()) if d != _row_dim(x)]
            scale = x.float().abs().amax(others, keepdim=True) / 127
            packed[name] = (x.float() / scale.clamp_min(1e-30)).round().to(torch.int8)
            packed[name + SCALE] = scale
        else:
            packed[name] = x.half().contiguous() if x.is_floating_point() else x.contiguous()
    return packed


def unpack_tensors(packed: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The weights that `pack_tensors` rounded, float32."""
    scales = {name: x for name, x in packed.items() if name.endswith(SCALE)}
    weights = {}
    for name, x in packed.items():
        if name + SCALE in scales:
            weights[name] = x.float() * scales[name + SCALE]
        elif name not in scales:
            weights[name] = x.float() if x.is_floating_point() else x
    return weights


def write_packed(packed: dict[str, Tensor], folder: str | Path) -> Path:
    """Write what `pack_tensors` gave beside the config of a saved model, in place of its weights."""
    folder = Path(folder)
    save_file(packed, folder / FILE, metadata={"format": "pt"})
    for other in folder.glob("diffusion_pytorch_model*.safetensors"):
        if other.name != FILE:
            other.unlink()
    return folder / FILE


def packed_folder(name: Any, subfolder: str | None = None) -> Path | None:
    """The folder of a model that is stored so, or None."""
    if not isinstance(name, str | Path):
        return None
    folder = Path(name) / (subfolder or "")
    return folder if (folder / FILE).is_file() else None


def open_packed(cls: type[Any], folder: Path, **options: Any) -> Any:
    """The model of a folder, in eval mode; strict.

    Args: options: constructor arguments that change the config, and `dtype` or `torch_dtype`; others are those of
        `ModelMixin.from_pretrained` that mean nothing here.
    Raises: RuntimeError of `load_state_dict` where weights do not fit.
    """
    known = signature(cls.__init__).parameters
    model: nn.Module = cls.from_config(cls.load_config(folder), **{k: v for k, v in options.items() if k in known})
    model.load_state_dict(unpack_tensors(load_file(folder / FILE)))
    dtype = options.get("dtype") or options.get("torch_dtype")
    return (model if dtype is None else nn.Module.to(model, dtype)).eval()
