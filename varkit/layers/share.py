"""A module beside another with the same weights, of which some parts are replaced."""

from __future__ import annotations

import copy
from typing import TypeVar

from torch import nn

M = TypeVar("M", bound=nn.Module)


def sharing(module: M) -> M:
    """A copy that holds the same parameters, buffers and submodules; what is set on it does not show in `module`."""
    made = copy.copy(module)
    for name in ("_parameters", "_buffers", "_modules", "_non_persistent_buffers_set"):
        made.__dict__[name] = copy.copy(module.__dict__[name])
    return made
