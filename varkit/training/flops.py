"""How fast a run computes: FLOPs of a step, and their share of what the device can do (MFU)."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

T = TypeVar("T")

FORMULAS = {
    **flop_registry,  # attention on a CPU is not in it
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: flop_registry[
        torch.ops.aten._scaled_dot_product_flash_attention
    ],
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: flop_registry[
        torch.ops.aten._scaled_dot_product_flash_attention_backward
    ],
}

RECOUNT = 500
"""Steps after which a step is counted again: progressive training makes them larger."""

PEAKS: tuple[tuple[str, float, float, float, float], ...] = (
    ("B200", 75, 1125, 2250, 2250),
    ("H200 NVL", 60, 417.5, 835, 835),
    ("H100 NVL", 60, 417.5, 835, 835),
    ("H100 PCIe", 51, 378, 756, 756),
    ("GH200", 67, 494.7, 989.4, 989.4),
    ("H200", 67, 494.7, 989.4, 989.4),
    ("H100", 67, 494.7, 989.4, 989.4),
    ("H800", 67, 494.7, 989.4, 989.4),
    ("H20", 44, 74, 148, 148),
    ("A100", 19.5, 156, 312, 312),
    ("A800", 19.5, 156, 312, 312),
    ("A40", 37.4, 74.8, 149.7, 149.7),
    ("A30", 10.3, 82, 165, 165),
    ("A10", 31.2, 62.5, 125, 125),
    ("A6000", 38.7, 77.4, 154.8, 154.8),
    ("L40S", 91.6, 183, 362, 362),
    ("L40", 90.5, 90.5, 181, 181),
    ("L4", 30.3, 60, 121, 121),
    ("RTX 6000 Ada", 91.1, 182.1, 364.2, 364.2),
    ("RTX 5090", 104.8, 104.8, 209.5, 209.5),
    ("RTX 4090", 82.6, 82.6, 165.2, 165.2),
    ("RTX 3090", 35.6, 35.6, 71, 71),
    ("V100-SXM2", 15.7, 15.7, 0, 125),
    ("V100-PCIE", 14, 14, 0, 112),
    ("T4", 8.1, 8.1, 0, 65),
    ("MI300X", 163.4, 653.7, 1307.4, 1307.4),
)
"""Part of `torch.cuda.get_device_name()`, then dense TFLOP/s in float32, TF32, bf16 and fp16 (0: not in hardware),
summed in float32. Without TF32 the float32 figure stands in its column.

Source: the makers' data sheets and architecture papers (NVIDIA H100, H200, B200, A100, A40, A30, A10, L4, L40, L40S,
V100 and T4 data sheets; the Ada, Blackwell and GA102 papers for RTX and A6000; AMD's of MI300X); figures given with
sparsity are halved.
"""


def peak_flops(name: str, precision: str, tf32: bool) -> float | None:
    """Dense FLOP/s of a device, None when the table does not know it or the hardware lacks the number format.

    Args: name: as `torch.cuda.get_device_name` gives it.   precision: no, bf16 or fp16.   tf32: whether float32
        products may use it.
    """
    if re.search(r"laptop|max-q|MIG |4090 D\b|5090 D\b", name, re.IGNORECASE):  # slower, or a part of the device
        return None
    for part, single, tensor, bfloat, half in PEAKS:
        if re.search(rf"\b{part}\b", name, re.IGNORECASE):
            return {"no": tensor if tf32 else single, "bf16": bfloat, "fp16": half}[precision] * 1e12 or None
    return None


class _Counting(TorchDispatchMode):
    """Sums torch's own FLOP formulas over what runs, backward too.

    Not `FlopCounterMode`, which takes some operations apart and hooks into every module: the step that it watches ends
    with other last digits, and a run that resumes (and so counts another step) would not be the uninterrupted one.
    """

    def __init__(self) -> None:
        super().__init__()
        self.flops = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        formula = FORMULAS.get(getattr(func, "overloadpacket", None))
        if formula is not None:
            self.flops += formula(*args, **kwargs, out_val=out)
        return out


def count_flops(function: Callable[[], T]) -> tuple[T, int]:
    """Run `function`; its result, and the FLOPs of matrix products, convolutions and attention, backward too."""
    with _Counting() as counter:
        result = function()
    return result, counter.flops


class FlopMeter:
    """FLOPs of this process's steps: some are counted, the others taken to be as large.

    Args: enabled: False counts nothing (a compiled network hides its operations).
    """

    def __init__(self, device: torch.device, precision: str, enabled: bool) -> None:
        self.enabled = enabled
        self.peak: float | None = None
        if device.type == "cuda":
            tf32 = torch.get_float32_matmul_precision() != "highest"
            self.peak = peak_flops(torch.cuda.get_device_name(device), precision, tf32)
        self._phases: list[str] | None = None  # of the step that was counted last
        self._step, self._sum = 0, 0

    def watch(self, step: int, phases: list[str], function: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """Take a step, and count it if it is the first of its kind or the last count is old."""
        if not self.enabled:
            return function()
        if phases == self._phases and step % RECOUNT:
            self._sum += self._step
            return function()
        numbers, flops = count_flops(function)
        if numbers:  # a skipped step ends half-way
            self._phases, self._step = phases, flops
        self._sum += flops
        return numbers

    def speed(self, seconds: float) -> dict[str, float]:
        """`tflops` (10^12 a second on this device) since the last call, and `mfu` where the peak is known."""
        done, self._sum = self._sum, 0
        if not self.enabled:
            return {}
        return speed(done, seconds, self.peak)


def speed(flops: float, seconds: float, peak: float | None) -> dict[str, float]:
    numbers = {"tflops": flops / seconds / 1e12}
    return numbers | ({"mfu": flops / seconds / peak} if peak else {})
