"""Integrating a flow from noise (t = 1) to data (t = 0), and guiding its velocity.

Functions of tensors (B, ...) of any shape and of any callable that answers with a velocity; they know no model.
Guidance is uncond + w (cond - uncond), w = 1 is off, and w may depend on t.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from typing import Protocol

import torch
from torch import Tensor

Velocity = Callable[[Tensor, Tensor], Tensor]
"""x (B, ...) and t (B,) in [0, 1] -> dx/dt, of x's shape."""

Pair = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
"""x (B, ...) and t (B,) -> the velocity with the condition and the one without it."""

Scale = float | Tensor | Callable[[Tensor], Tensor]
"""w: a number; a tensor that broadcasts over x from its second axis, such as (n,) over (B, n, C); or a function of
t (B,) that gives (B,)."""


class Guidance(Protocol):
    """What becomes of the two velocities: (cond, uncond, w) -> guided, each (B, ...)."""

    def __call__(self, cond: Tensor, uncond: Tensor, scale: float | Tensor) -> Tensor: ...


def classifier_free(cond: Tensor, uncond: Tensor, scale: float | Tensor) -> Tensor:
    """uncond + scale * (cond - uncond) (Ho and Salimans, arXiv 2207.12598)."""
    return torch.lerp(uncond, cond, scale)


@dataclass
class ProjectedGuidance:
    """Adaptive projected guidance, APG (Sadat et al., arXiv 2410.02416): strong guidance without over-saturation.

    It keeps a running difference: one object serves one integration.

    Args:
        momentum: share of the running difference that is added to each new one; negative pushes away from it.
        eta: share kept of the part that is parallel to the conditional velocity.
        norm_threshold: the difference of an image is scaled down to at most this L2 norm; 0 is off.
    """

    momentum: float = -0.5
    eta: float = 0.0
    norm_threshold: float = 2.5

    def __post_init__(self) -> None:
        self.running: Tensor | None = None

    def __call__(self, cond: Tensor, uncond: Tensor, scale: float | Tensor) -> Tensor:
        difference = cond - uncond
        if self.running is not None:
            difference = difference + self.momentum * self.running
        self.running = difference
        axes = list(range(1, cond.dim()))
        if self.norm_threshold > 0:
            norm = difference.square().sum(axes, keepdim=True).sqrt()
            difference = difference * (self.norm_threshold / norm.clamp_min(1e-12)).clamp_max(1)
        # The projection needs float64 where the device has it: the two parts nearly cancel.
        exact = torch.float32 if cond.device.type == "mps" else torch.float64
        direction, d = cond.to(exact), difference.to(exact)
        square = direction.square().sum(axes, keepdim=True).clamp_min(1e-24)
        parallel = (d * direction).sum(axes, keepdim=True) / square * direction
        update = (d - parallel + self.eta * parallel).to(cond.dtype)
        return cond + (scale - 1) * update


def guided(pair: Pair, scale: Scale, guidance: Guidance = classifier_free) -> Velocity:
    """The guided velocity; `pair` is asked once for both branches."""

    def velocity(x: Tensor, t: Tensor) -> Tensor:
        cond, uncond = pair(x, t)
        if callable(scale):
            w = torch.as_tensor(scale(t), dtype=cond.dtype, device=cond.device).expand(len(x))
            return guidance(cond, uncond, w.view(-1, *[1] * (cond.dim() - 1)))
        if isinstance(scale, Tensor):
            return guidance(cond, uncond, scale.to(cond).view(*scale.shape, *[1] * (cond.dim() - 1 - scale.dim())))
        return guidance(cond, uncond, scale)

    return velocity


def times(num_steps: int) -> list[float]:
    """1, 1 - 1/T, ..., 0: T + 1 of them. Raises ValueError when T < 1."""
    if num_steps < 1:
        raise ValueError(f"num_steps must be at least 1; got {num_steps}")
    return [1 - i / num_steps for i in range(num_steps)] + [0.0]


def euler(velocity: Velocity, x: Tensor, grid: list[float]) -> Tensor:
    """Follow the velocity from grid[0] to grid[-1]: one call a step."""
    for t, after in pairwise(grid):
        x = x + (after - t) * velocity(x, x.new_full((len(x),), t))
    return x


def heun(velocity: Velocity, x: Tensor, grid: list[float]) -> Tensor:
    """As `euler`, with the mean of the velocities at both ends of a step: two calls a step, second order.

    The last step, into t = 0 where flows are not trained, is Euler's.
    """
    for t, after in pairwise(grid):
        v = velocity(x, x.new_full((len(x),), t))
        ahead = x + (after - t) * v
        if after > 0:
            v = (v + velocity(ahead, x.new_full((len(x),), after))) / 2
            ahead = x + (after - t) * v
        x = ahead
    return x


SOLVERS = {"euler": euler, "heun": heun}


def integrate(velocity: Velocity, noise: Tensor, num_steps: int, solver: str = "euler") -> Tensor:
    """From noise (B, ...) at t = 1 to data at t = 0, in equal steps.

    Raises: ValueError on another solver, or no step.
    """
    if solver not in SOLVERS:
        raise ValueError(f"solver must be one of {', '.join(SOLVERS)}; got {solver!r}")
    return SOLVERS[solver](velocity, noise, times(num_steps))
