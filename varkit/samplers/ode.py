"""Integrating a flow from noise (t = 1) to data (t = 0), and guiding its velocity.

Functions of tensors (B, ...) of any shape and of any callable that answers with a velocity; they know no model.
Guidance is uncond + w (cond - uncond), w = 1 is off, and w may depend on t.

A solver is a way to step and a grid of times; `SOLVERS` names them:

| name | steps | times |
|---|---|---|
| euler, heun | along the velocity, first and second order | equal steps from 1 to 0 |
| euler-jump | as euler | denser near the data: half of the steps for t in [0.3, 1], half for [0, 0.25] (FlowAR) |
| sde | Euler-Maruyama: a drift of its own and fresh noise in each step but the last (xAR) | 1 to 0.04, then 0 |
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Protocol

import torch
from torch import Tensor

Velocity = Callable[[Tensor, Tensor], Tensor]
"""x (B, ...) and t (B,) in [0, 1] -> dx/dt, of x's shape."""

Pair = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
"""x (B, ...) and t (B,) -> the velocity with the condition and the one without it."""

Noise = Callable[[int], Tensor]
"""Number of a step -> fresh standard normal noise of x's shape, for solvers that add some."""

Interval = tuple[float, float]
"""Lowest and highest time, both included."""

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


def guided(
    pair: Pair,
    scale: Scale,
    guidance: Guidance = classifier_free,
    interval: Interval | None = None,
    alone: Velocity | None = None,
) -> Velocity:
    """The guided velocity; `pair` is asked once for both branches.

    Args: interval: the times at which guidance is on, None for all; at the others the answer is that of `alone`, the
        conditional branch by itself.
    """

    def everywhere(x: Tensor, t: Tensor) -> Tensor:
        cond, uncond = pair(x, t)
        if callable(scale):
            w = torch.as_tensor(scale(t), dtype=cond.dtype, device=cond.device).expand(len(x))
            return guidance(cond, uncond, w.view(-1, *[1] * (cond.dim() - 1)))
        if isinstance(scale, Tensor):
            return guidance(cond, uncond, scale.to(cond).view(*scale.shape, *[1] * (cond.dim() - 1 - scale.dim())))
        return guidance(cond, uncond, scale)

    if interval is None:
        return everywhere
    low, high = time_interval(interval)
    if alone is None:
        raise ValueError("guidance on an interval needs the conditional branch by itself (alone=)")

    def inside(x: Tensor, t: Tensor) -> Tensor:
        on = (t > low - 1e-6) & (t < high + 1e-6)  # a bound is a decimal number; t may be float32
        if not on.any():
            return alone(x, t)
        if on.all():
            return everywhere(x, t)
        return torch.where(on.view(-1, *[1] * (x.dim() - 1)), everywhere(x, t), alone(x, t))

    return inside


def time_interval(interval: Sequence[float]) -> Interval:
    """Raises ValueError unless they are two numbers, 0 <= low <= high <= 1."""
    bounds = tuple(float(t) for t in interval)
    if len(bounds) != 2 or not 0 <= bounds[0] <= bounds[1] <= 1:
        raise ValueError(
            f"times of guidance are the lowest and the highest t, in [0, 1] where 1 is noise, such as (0, 0.9); "
            f"got {bounds}"
        )
    return bounds[0], bounds[1]


def times(num_steps: int) -> list[float]:
    """1, 1 - 1/T, ..., 0: T + 1 of them. Raises ValueError when T < 1."""
    if num_steps < 1:
        raise ValueError(f"num_steps must be at least 1; got {num_steps}")
    return [1 - i / num_steps for i in range(num_steps)] + [0.0]


def _line(first: float, last: float, count: int) -> list[float]:
    """`count` numbers at equal distances, both ends included; of one number, the first."""
    return [first + (last - first) * i / max(count - 1, 1) for i in range(count)]


def jump_times(num_steps: int) -> list[float]:
    """T + 1 times: half of them from 1 to 0.3, the others from 0.25 to 0. An odd T has one more in the first half.

    Source: FlowAR: models/sampler.py, which for an odd T gives the grid of T - 1.
    Raises: ValueError when T < 1.
    """
    if num_steps <= 1:
        return times(num_steps)  # one step has no half
    late = num_steps // 2
    return _line(1.0, 0.3, num_steps - late) + _line(0.25, 0.0, late + 1)


def sde_times(num_steps: int, last_time: float = 0.04) -> list[float]:
    """T + 1 times: T from 1 to `last_time` at equal distances, then 0. Raises ValueError when T < 1."""
    if num_steps <= 1:
        return times(num_steps)
    return [*_line(1.0, last_time, num_steps), 0.0]


def euler(velocity: Velocity, x: Tensor, grid: list[float], noise: Noise | None = None) -> Tensor:
    """Follow the velocity from grid[0] to grid[-1]: one call a step."""
    for t, after in pairwise(grid):
        x = x + (after - t) * velocity(x, x.new_full((len(x),), t))
    return x


def heun(velocity: Velocity, x: Tensor, grid: list[float], noise: Noise | None = None) -> Tensor:
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


def euler_maruyama(velocity: Velocity, x: Tensor, grid: list[float], noise: Noise | None = None) -> Tensor:
    """The stochastic equation with the same marginals as the flow, diffusion 2 t, run from noise to data.

    On the path x_t = (1 - t) data + t noise the score is (-(1 - t) v - x) / t, so the drift v - t score is
    (2 - t) v + x. Each step but the last adds sqrt(2 t dt) of fresh noise. The state is float64 where the device has
    it. A single step, from pure noise, is Euler's: nothing of this drift is right at t = 1 for a step so long.

    Source: xAR: models/sampler.py.
    Raises: ValueError without a source of noise.
    """
    if len(grid) == 2:
        return euler(velocity, x, grid)
    if noise is None:
        raise ValueError("solver sde adds noise in its steps: give a source of it (noise=)")
    state = x if x.device.type == "mps" else x.double()
    for i, (t, after) in enumerate(pairwise(grid)):
        v = velocity(state, state.new_full((len(x),), t)).to(state)
        state = state + (after - t) * ((2 - t) * v + state)
        if i < len(grid) - 2:
            state = state + math.sqrt(2 * t * (t - after)) * noise(i).to(state)
    return state.to(x.dtype)


@dataclass(frozen=True)
class Solver:
    """`calls`: of the velocity, in each step but the last, which may take fewer."""

    step: Callable[[Velocity, Tensor, list[float], Noise | None], Tensor]
    grid: Callable[[int], list[float]]
    calls: int = 1


SOLVERS = {
    "euler": Solver(euler, times),
    "heun": Solver(heun, times, calls=2),
    "euler-jump": Solver(euler, jump_times),
    "sde": Solver(euler_maruyama, sde_times),
}


def find_solver(name: str) -> Solver:
    """Raises ValueError naming the solvers that there are."""
    if name not in SOLVERS:
        raise ValueError(f"solver must be one of {', '.join(SOLVERS)}; got {name!r}")
    return SOLVERS[name]


def integrate(
    velocity: Velocity, start: Tensor, num_steps: int, solver: str = "euler", noise: Noise | None = None
) -> Tensor:
    """From noise (B, ...) at t = 1 to data at t = 0.

    Args: solver: a name of `SOLVERS`.   noise: of the steps, for solvers that add some.
    Raises: ValueError on another solver, no step, or no noise where it is needed.
    """
    chosen = find_solver(solver)
    return chosen.step(velocity, start, chosen.grid(num_steps), noise)
