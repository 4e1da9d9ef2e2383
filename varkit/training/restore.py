"""Loading a checkpoint into a run of another kind or size: N processes' into M, sharded into whole and back."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from accelerate import Accelerator
from accelerate.checkpointing import load_accelerator_state, load_custom_state
from accelerate.utils import set_seed
from diffusers.training_utils import EMAModel
from safetensors.torch import load_file
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)

from varkit.training.sharding import load_average

MODEL, OPTIMIZER = "pytorch_model_fsdp_0", "optimizer_0"
"""Folders that accelerate writes in a sharded checkpoint."""


def is_sharded(folder: Path) -> bool:
    return (folder / MODEL).is_dir()


def saved_processes(folder: Path) -> int:
    """How many processes wrote a checkpoint."""
    return len(list(folder.glob("random_states_*.pkl")))


def restore(accelerator: Accelerator, objective: nn.Module, average: EMAModel | None, folder: Path, seed: int) -> None:
    """Load a checkpoint, whatever number of processes wrote it and whether it is sharded.

    Exact when the run is of the kind and size that wrote it. Otherwise weights, optimiser, average, schedule and the
    order of the images go on, and processes that did not exist draw dropout from a new stream (of `seed`).
    """
    process = accelerator.process_index
    if not (folder / f"random_states_{process}.pkl").exists():
        set_seed(seed, device_specific=True)
    if is_sharded(folder) == accelerator.is_fsdp2:
        accelerator.load_state(str(folder))
    else:
        (_load_whole if accelerator.is_fsdp2 else _load_sharded)(objective, accelerator._optimizers, folder)
        for index, custom in enumerate(accelerator._custom_objects):
            load_custom_state(custom, str(folder), index)
        scaler = accelerator.scaler if (folder / "scaler.pt").exists() else None
        load_accelerator_state(str(folder), [], [], [], [], process, scaler)
    if average is not None and is_sharded(folder):
        load_average(average, folder)


def _load_sharded(objective: nn.Module, optimizers: list[Any], folder: Path) -> None:
    """A sharded checkpoint into a process that holds the whole model."""
    weights = {"model": get_model_state_dict(objective)}
    dcp.load(weights, storage_reader=dcp.FileSystemReader(folder / MODEL))
    set_model_state_dict(objective, weights["model"])
    (optimizer,) = (wrapped.optimizer for wrapped in optimizers)  # what can be sharded has one
    state = {"optimizer": get_optimizer_state_dict(objective, optimizer)}
    dcp.load(state, storage_reader=dcp.FileSystemReader(folder / OPTIMIZER))
    set_optimizer_state_dict(objective, optimizer, state["optimizer"])


def _load_whole(objective: nn.Module, optimizers: list[Any], folder: Path) -> None:
    """A whole checkpoint into sharded weights. Each process reads the files and keeps its part."""
    options = StateDictOptions(full_state_dict=True)
    weights: dict[str, Any] = dict(load_file(folder / "model.safetensors"))
    set_model_state_dict(objective, weights, options=options)
    (optimizer,) = (wrapped.optimizer for wrapped in optimizers)
    saved = torch.load(folder / "optimizer.bin", map_location="cpu", weights_only=True)
    names = {id(weight): name for name, weight in objective.named_parameters()}
    order = [names[id(weight)] for group in optimizer.param_groups for weight in group["params"]]
    state: dict[str, Any] = {
        "state": {order[i]: values for i, values in saved["state"].items()},
        "param_groups": [{**g, "params": [order[i] for i in g["params"]]} for g in saved["param_groups"]],
    }
    set_optimizer_state_dict(objective, optimizer, state, options=options)
