"""Reading released files safely, and converting them to the diffusers folder format and back."""

from __future__ import annotations

import argparse
import os
import pickle
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from torch import Tensor, nn

from varkit.checkpoints.formats import StateDict, format_of_model, format_of_state
from varkit.registry import checkpoint, list_checkpoints

WRAPPERS = (
    "ema",
    "model_ema",
    "model",
    "module",
    "model_state_dict",
    "state_dict",
    "trainer",
    "ema_parameters",
    "var_wo_ddp",
    "sd",
)


def read_state_dict(path: str | Path) -> StateDict:
    """The tensors of a `.pth`, `.pt`, `.bin`, `.ckpt` or `.safetensors` file, on the CPU.

    Raises: FileNotFoundError; ValueError when the file holds no state dict, or needs code to be unpickled
    (it is never run).
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no such file: {path}")
    if path.suffix == ".safetensors":
        from safetensors.torch import load_file

        return load_file(path)
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):
            data = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except (pickle.UnpicklingError, RuntimeError, EOFError, KeyError) as error:
        first = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ValueError(f"{path} cannot be read as a file of plain tensors: {first}") from None
    # Wrappers that training scripts put around the weights; an average is what a release is judged by.
    for key in WRAPPERS:
        if isinstance(data, Mapping) and isinstance(data.get(key), Mapping):
            data = data[key]
    if not isinstance(data, Mapping) or not all(isinstance(v, Tensor) for v in data.values()):
        raise ValueError(f"{path} holds no state dict (a mapping of names to tensors)")
    parallel = bool(data) and all(
        key.startswith("module.") for key in data
    )  # saved from within DistributedDataParallel
    return {key.removeprefix("module."): value for key, value in data.items()} if parallel else dict(data)


def load_strictly(model: nn.Module, state: StateDict, what: str) -> None:
    """Assign every tensor of `state` to `model`, which may be on the meta device.

    Raises: ValueError listing missing keys, unexpected keys and other shapes.
    """
    own = model.state_dict()
    missing, unexpected = sorted(own.keys() - state.keys()), sorted(state.keys() - own.keys())
    shapes = [
        f"{k}: file {tuple(state[k].shape)}, model {tuple(own[k].shape)}"
        for k in sorted(own.keys() & state.keys())
        if state[k].shape != own[k].shape
    ]
    if missing or unexpected or shapes:

        def show(names: list[str]) -> str:
            return ", ".join(names[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "") or "none"

        raise ValueError(
            f"{what} does not fit {type(model).__name__}.\n  missing in the file: {show(missing)}\n"
            f"  not in the model: {show(unexpected)}\n  other shapes: {show(shapes)}"
        )
    model.load_state_dict(state, strict=True, assign=True)


def load_official(path: str | Path, **overrides: Any) -> nn.Module:
    """A released file as the model that it holds, in eval mode; which one, its keys tell.

    What no key tells, such as the size of the images, the card of a file with this name does.

    Args: overrides: constructor arguments to use instead of those read from the file (`scales=` for 512 px).
    Raises: ValueError when no release has such keys, or the file does not fit.
    """
    state = read_state_dict(path)
    kind = format_of_state(state, str(path))
    arguments = kind.arguments(state)
    cards = [checkpoint(name) for name in list_checkpoints()]
    arguments |= next((card.overrides for card in cards if card.filename == Path(path).name), {})
    for name, value in kind.settings(Path(path)).items():
        nested = isinstance(value, Mapping) and isinstance(arguments.get(name), Mapping)
        arguments[name] = {**arguments[name], **value} if nested else value
    return build_official(state, str(path), **{**arguments, **overrides})


def build_official(state: StateDict, what: str, **overrides: Any) -> nn.Module:
    """As `load_official`, from tensors; on the meta device they stay there."""
    kind = format_of_state(state, what)
    arguments = {**kind.arguments(state), **overrides}
    with init_empty_weights(include_buffers=False):  # buffers that no file holds are real
        model = kind.model_class()(**arguments)
    load_strictly(model, kind.from_official(state, model), what)
    return model.eval().requires_grad_(False)


def to_official(model: nn.Module) -> StateDict:
    """The state dict that the official code loads strictly."""
    state = {k: v.detach().contiguous() for k, v in model.state_dict().items()}
    return format_of_model(model).to_official(state, model)


def write_official(model: nn.Module, path: Path) -> None:
    """Write `to_official(model)` as `.pth` or `.safetensors`, atomically."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.part")
    if path.suffix == ".safetensors":
        from safetensors.torch import save_file

        save_file(to_official(model), part)
    else:
        torch.save(format_of_model(model).wrapped(to_official(model)), part)
    os.replace(part, path)
