"""What torch.compile needs."""

from __future__ import annotations

import os
import shutil
import sys

import torch

from varkit.config import ConfigError


def require_compiler(device: torch.device, setting: str = "loop.compile=true") -> None:
    """Raises ConfigError when torch.compile would fail for want of a C++ compiler (CPU only).

    Args: setting: that asks for it, as the user wrote it.
    """
    name = os.environ.get("CXX", "clang++" if sys.platform == "darwin" else "g++")
    if device.type == "cpu" and shutil.which(name) is None:
        raise ConfigError(
            f"{setting} on a CPU needs a C++ compiler, and {name!r} is not there; install one, name one in the "
            f"variable CXX, or leave {setting.split('=')[0]} out"
        )
