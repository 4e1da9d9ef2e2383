"""What `loop.compile` needs."""

from __future__ import annotations

import os
import shutil
import sys

import torch

from varkit.config import ConfigError


def require_compiler(device: torch.device) -> None:
    """Raises ConfigError when torch.compile would fail for want of a C++ compiler (CPU only)."""
    name = os.environ.get("CXX", "clang++" if sys.platform == "darwin" else "g++")
    if device.type == "cpu" and shutil.which(name) is None:
        raise ConfigError(
            f"loop.compile=true on a CPU needs a C++ compiler, and {name!r} is not there; install one, name one in "
            f"the variable CXX, or train with loop.compile=false"
        )
