"""Linear layers whose float32 weights are kept in the order that oneDNN multiplies fastest on a CPU.

A decoding step multiplies a few rows by each weight matrix, and time goes into reading the weights. Repacked, they are
read in one sweep by all threads; benchmarks/decoding.py has the measured difference.
"""

from __future__ import annotations

from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def can_pack() -> bool:
    """Whether this build of torch has what packing needs."""
    return torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")


class PackedLinear(nn.Linear):
    """A `Linear` with a packed copy of its weights, which is used without gradients, in float32, on a CPU.

    Parameters are those of the original, under the same names. A change of the weights is seen, and packed again.
    """

    packed: Tensor | None
    version: int

    @classmethod
    def of(cls, linear: nn.Linear) -> Self:
        new = cls.__new__(cls)
        nn.Module.__init__(new)
        new.in_features, new.out_features = linear.in_features, linear.out_features
        new.weight, new.bias = linear.weight, linear.bias
        new.training = linear.training
        new.packed, new.version = None, -1
        return new

    def forward(self, x: Tensor) -> Tensor:
        """(..., in) -> (..., out)."""
        weight = self.weight
        plain = weight.dtype != torch.float32 or x.dtype != torch.float32 or x.device.type != "cpu"
        if plain or torch.is_grad_enabled() or torch.compiler.is_compiling():
            return F.linear(x, weight, self.bias)
        key = hash((weight.data_ptr(), weight._version))
        if self.packed is None or self.version != key:
            self.packed = torch.ops.mkldnn._reorder_linear_weight(weight.detach(), 1)
            self.version = key
        return torch.ops.mkldnn._linear_pointwise(x, self.packed, self.bias, "none", [], "")

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "packed": None}


def pack_linears(module: nn.Module) -> int:
    """Replace each plain `Linear` inside by a `PackedLinear` of the same parameters; returns how many.

    Twice the memory of those weights, from the first pass on.
    """
    count = 0
    for parent in list(module.modules()):
        for name, child in parent.named_children():
            if type(child) is nn.Linear:
                setattr(parent, name, PackedLinear.of(child))
                count += 1
    return count
