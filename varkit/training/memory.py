"""How much memory a process holds, and held at most: of its GPU, or without one its own."""

from __future__ import annotations

import os
import sys
from contextlib import suppress
from pathlib import Path

import torch

STATUS, REFERENCES = Path("/proc/self/status"), Path("/proc/self/clear_refs")


def memory_now(device: torch.device) -> int:
    """Bytes in tensors on a GPU; without one, bytes of the process (0 where the system does not say)."""
    if device.type == "cuda":
        return torch.cuda.memory_allocated(device)
    return _status("VmRSS") if STATUS.exists() else _most()


def reset_peak(device: torch.device) -> None:
    """Let `memory_peak` begin anew. Off Linux and without a GPU it goes on from the start of the process."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    elif REFERENCES.exists():
        with suppress(OSError):  # some containers forbid it
            REFERENCES.write_text("5")


def memory_peak(device: torch.device) -> int:
    """The most bytes since `reset_peak`."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return _status("VmHWM") if STATUS.exists() else _most()


def memory_total(device: torch.device) -> int:
    """Bytes of the GPU, or of the machine (0 where the system does not say)."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):
        return 0


def _status(name: str) -> int:
    for line in STATUS.read_text().splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1]) * 1024
    return 0


def _most() -> int:
    try:
        import resource
    except ImportError:
        return 0
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most if sys.platform == "darwin" else most * 1024
