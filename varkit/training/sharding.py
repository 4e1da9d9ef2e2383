"""Sharded training: weights, gradients and optimiser state cut up over the processes (FSDP2, through accelerate).

accelerate shards when its configuration asks for it (`ACCELERATE_USE_FSDP`, which `accelerate launch` sets from a
configuration file). It does so on accelerators only; `start_sharding` makes it do the same on a CPU.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from accelerate import Accelerator, DistributedType, FullyShardedDataParallelPlugin, PartialState
from diffusers.training_utils import EMAModel
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.fsdp import (
    CPUOffloadPolicy,
    FSDPModule,
    MixedPrecisionPolicy,
    StateDictType,
    register_fsdp_forward_method,
)
from torch.distributed.tensor import DTensor, distribute_tensor

from varkit.config import ConfigError
from varkit.interfaces import Objective
from varkit.training.recipe import LoopConfig

AVERAGE = "average"
"""Folder of the averaged weights within a sharded checkpoint."""


def start_sharding(accelerator: Accelerator, objective: Objective, loop: LoopConfig) -> bool:
    """Whether this run shards; if so, accelerate is set up for it. To be called before `prepare`.

    Raises: ConfigError naming what FSDP cannot do here, before any work.
    """
    if os.environ.get("ACCELERATE_USE_FSDP", "false").lower() != "true" or accelerator.num_processes == 1:
        return False
    state = accelerator.state
    if state.distributed_type == DistributedType.MULTI_CPU:  # where accelerate 1.15 leaves the wish unheard
        # The second holds what every new look at the first starts from.
        state.distributed_type = PartialState._shared_state["distributed_type"] = DistributedType.FSDP
        state.fsdp_plugin = FullyShardedDataParallelPlugin()
    plugin = state.fsdp_plugin
    _require(plugin, objective, loop)
    # Weights are gathered as they are and autocast decides, as without sharding; gradients are summed in float32.
    plugin.mixed_precision_policy = MixedPrecisionPolicy()
    if plugin.transformer_cls_names_to_wrap is None:
        plugin.transformer_cls_names_to_wrap = list(getattr(objective.trained("main"), "_no_split_modules", None) or ())
    for network in objective.frozen_parts().values():  # whole on each process; fully_shard moves its own only
        network.to(accelerator.device)
    return True


def _require(plugin: FullyShardedDataParallelPlugin, objective: Objective, loop: LoopConfig) -> None:
    def refuse(what: str, instead: str) -> None:
        raise ConfigError(f"FSDP: {what}; {instead}")

    if plugin.fsdp_version != 2:
        refuse("fsdp_version 1 is not supported", "set fsdp_version: 2 in the accelerate configuration")
    if not objective.shards:
        refuse(
            f"{type(objective).__module__.rpartition('.')[2]} cannot be sharded: it has several networks with an "
            f"optimiser each, or writes into weights between steps, and accelerate's FSDP takes one of each",
            "launch it without FSDP (train/launch/gpus.yaml): every process then holds the whole model",
        )
    if plugin.state_dict_type != StateDictType.SHARDED_STATE_DICT:
        refuse("only sharded checkpoints are written", "set fsdp_state_dict_type: SHARDED_STATE_DICT")
    if plugin.cpu_ram_efficient_loading:
        refuse("fsdp_cpu_ram_efficient_loading empties the frozen networks too", "set it to false in the configuration")
    if isinstance(plugin.cpu_offload, CPUOffloadPolicy):
        refuse("weights on the host (fsdp_offload_params) are not supported", "set it to false in the configuration")
    if plugin.activation_checkpointing:
        refuse("fsdp_activation_checkpointing is not supported", "use objective.gradient_checkpointing=true")
    if loop.precision == "fp16":
        refuse("loop.precision=fp16 is not supported", "use bf16 or no")
    if loop.compile:
        refuse("loop.compile=true is not supported", "train with loop.compile=false")


def gather_for_methods(objective: Objective) -> None:
    """Have weights gathered for methods other than `forward`, too. To be called after `prepare`."""
    for module in objective.modules():
        if isinstance(module, FSDPModule):
            for name in getattr(module, "sharded_methods", ()):
                register_fsdp_forward_method(module, name)


def release(objective: nn.Module) -> None:
    """Drop gathered weights, which would hide a change of the shards (a forward without backward leaves some)."""
    for module in objective.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def local(tensor: Tensor) -> Tensor:
    """What this process holds of a tensor, to be changed in place."""
    with torch.no_grad():
        return tensor.to_local() if isinstance(tensor, DTensor) else tensor.detach()


def whole(tensor: Tensor) -> Tensor:
    """The full value of a number that was computed from shards."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


@contextmanager
def exchanged(weights: Sequence[Tensor], others: Sequence[Tensor]) -> Iterator[None]:
    """The values of `others` in the place of `weights`; these wait on the host."""
    kept = [local(w).cpu().clone() for w in weights]
    for weight, other in zip(weights, others, strict=True):
        local(weight).copy_(local(other))
    try:
        yield
    finally:
        for weight, value in zip(weights, kept, strict=True):
            local(weight).copy_(value)


class ShardedAverage(EMAModel):
    """Averaged weights of which each process holds its shards.

    accelerate writes registered objects on the main process only, so their state is here without the weights;
    `save_average` and `load_average` treat those. A whole average (of a run without sharding) is cut up when loaded.
    """

    def state_dict(self) -> dict[str, Any]:
        return {k: v for k, v in super().state_dict().items() if k != "shadow_params"}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        state = dict(state_dict)
        values = state.pop("shadow_params", None)
        super().load_state_dict(state)
        for mine, value in zip(self.shadow_params, values or self.shadow_params, strict=True):
            if mine is not value:
                part = distribute_tensor(value.to(mine.device), mine.device_mesh, mine.placements)
                mine.copy_(part)


def _named(average: EMAModel) -> dict[str, Tensor]:
    return {str(i): tensor for i, tensor in enumerate(average.shadow_params)}


def save_average(average: EMAModel, folder: Path) -> None:
    dcp.save({AVERAGE: _named(average)}, storage_writer=dcp.FileSystemWriter(folder / AVERAGE))


def load_average(average: EMAModel, folder: Path) -> None:
    """Into the tensors of `average`, sharded or whole, in place."""
    dcp.load({AVERAGE: _named(average)}, storage_reader=dcp.FileSystemReader(folder / AVERAGE))


def export_whole(objective: Objective, build: Callable[[], Objective], folder: Path, main: bool) -> None:
    """Gather the weights onto a copy in the main process's host memory, and export that."""
    state = get_model_state_dict(objective, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
    if main:
        copy = build().eval()
        copy.load_state_dict(state)
        copy.export(folder)
