"""What has to be the same on all processes, so that several equal one with the same global batch."""

from __future__ import annotations

import os

import torch
import torch.distributed as dist
from torch import Tensor, nn

from varkit.config import ConfigError


def place() -> tuple[int, int]:
    """Number of this process, and how many there are."""
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank(), dist.get_world_size()
    return 0, 1


def require_all_processes() -> None:
    """Raises ConfigError when a launcher started several processes that do not know of each other.

    Each would train the whole run, into the same folder.
    """
    started = int(os.environ.get("WORLD_SIZE", "1"))
    if started != place()[1]:
        raise ConfigError(
            f"{started} processes were started, but accelerate joined {place()[1]} (it sees no GPU); to train in "
            f"several processes on a CPU set the variable ACCELERATE_USE_CPU=1"
        )


def summed(tensor: Tensor) -> Tensor:
    """The sum over all processes, in place; without a process group the tensor itself. No gradient."""
    if place()[1] > 1:
        dist.all_reduce(tensor)
    return tensor


def anyone(flag: bool, device: torch.device) -> bool:
    """Whether the flag is set on any process: a signal reaches them at different moments."""
    return flag if place()[1] == 1 else bool(summed(torch.tensor(float(flag), device=device)))


class SyncedBatchNorm2d(nn.BatchNorm2d):
    """Batch normalisation with the statistics of all processes.

    `torch.nn.SyncBatchNorm` refuses tensors on a CPU; this one runs on any backend. Mean and variance are taken in
    two passes, each one differentiable all-reduce of C numbers. Processes must hold batches of equal size.
    """

    def forward(self, x: Tensor) -> Tensor:  # B C H W
        processes = place()[1]
        if not self.training or processes == 1:
            return super().forward(x)
        from torch.distributed.nn.functional import all_reduce

        with torch.autocast(x.device.type, enabled=False):
            wide = x.float()
            count = processes * wide.numel() // wide.shape[1]
            mean = all_reduce(wide.sum((0, 2, 3))) / count  # C
            centred = wide - mean[:, None, None]
            variance = all_reduce(centred.square().sum((0, 2, 3))) / count  # C
            scale = self.weight * torch.rsqrt(variance + self.eps)
            out = centred * scale[:, None, None] + self.bias[:, None, None]
        with torch.no_grad():
            assert self.running_mean is not None and self.running_var is not None and self.momentum is not None
            self.running_mean.lerp_(mean.detach(), self.momentum)
            self.running_var.lerp_(variance.detach() * count / max(count - 1, 1), self.momentum)
            assert self.num_batches_tracked is not None
            self.num_batches_tracked += 1
        return out.to(x.dtype)
