"""The flow predictive and rectified-flow training (Liu et al., arXiv 2209.03003; Esser et al., arXiv 2403.03206).

x_t = t * noise + (1 - t) * data for t in [0, 1]; the network learns the velocity noise - data.
Shapes: B images, n positions, C channels; data may be (B, ...) of any shape.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from varkit.interfaces import Predictive, Processor
from varkit.rng import Draw, Rng
from varkit.samplers.branches import EveryKth
from varkit.samplers.ode import (
    Guidance,
    Interval,
    Pair,
    Scale,
    Velocity,
    classifier_free,
    find_solver,
    guided,
    integrate,
)

SigmaKind = Literal["uniform", "logit-normal", "mode"]


def draw_sigma(
    rng: Rng,
    positions: Tensor | None = None,
    *,
    kind: SigmaKind = "logit-normal",
    mode_scale: float = 0.25,
    stratified: bool = False,
    step: int = 0,
) -> Tensor:
    """How much noise each image, or each position of it, is trained with: in (0, 1).

    Args:
        positions: None for one number an image, (B,); else (n,) or (B, n), for (B, n).
        kind: uniform; logit-normal, the sigmoid of a standard normal; or mode, the uniform u shifted to
            1 - u - mode_scale * (cos^2(pi u / 2) - 1 + u) (Esser et al., section 3.1).
        stratified: image i of the batch draws from the i-th of B equal parts of (0, 1), so that a batch covers all.
        step: a word of the random numbers' key, for several draws.
    Raises: ValueError on another kind.
    """
    where = torch.zeros(1, dtype=torch.int64) if positions is None else positions
    u = rng.uniform(where, Draw.SIGMA, step=step)  # B n
    if stratified:
        u = (torch.arange(len(u), device=u.device)[:, None] + u) / len(u)
    if kind == "logit-normal":
        u = torch.sigmoid(torch.special.ndtri(u))
    elif kind == "mode":
        u = 1 - u - mode_scale * (torch.cos(math.pi / 2 * u).square() - 1 + u)
    elif kind != "uniform":
        raise ValueError(f"kind must be uniform, logit-normal or mode; got {kind!r}")
    return u[:, 0] if positions is None else u


def add_noise(data: Tensor, noise: Tensor, sigma: Tensor) -> Tensor:
    """x_t (B, ...). Args: sigma: (B,), or (B, n) for a level of its own at each index of the second axis."""
    sigma = sigma.to(data).view(*sigma.shape, *[1] * (data.dim() - sigma.dim()))
    return torch.lerp(data, noise, sigma)


def flow_loss(velocity: Velocity, data: Tensor, noise: Tensor, sigma: Tensor) -> Tensor:
    """Mean squared error of the velocity at x_t, of each image: (B,) float32."""
    predicted = velocity(add_noise(data, noise, sigma), sigma)
    return (predicted.float() - (noise - data).float()).square().flatten(1).mean(1)


class Flow(Predictive):
    """velocity(x, t) of tokens x (B, n, C) at times t (B,), from noise at 1 to data at 0.

    Args:
        velocity: of the conditional branch alone.
        dim: C.
        pair: both branches in one call; needed for guidance.
        branches: of a guided flow, what `velocity` asks for both branches.
    Attributes:
        calls: how often the last `sample` asked the network.
        known: latents (B, n, C) and where they are known, (B, n) bool. At these the network is shown the known latent
            with as much noise as the time says, so that what is drawn beside it fits; what `sample` gives there is
            not used. (As in RePaint, Lugmayr et al., arXiv 2201.09865, without going back in time.)
    """

    known: tuple[Tensor, Tensor] | None = None

    def __init__(
        self, velocity: Velocity, dim: int, pair: Pair | None = None, branches: EveryKth | None = None
    ) -> None:
        self.velocity, self.dim, self.pair, self.branches = velocity, dim, pair, branches
        self.calls = 0

    @property
    def null_calls(self) -> int:
        """How many of the `calls` were for the branch without a condition too."""
        return 0 if self.branches is None else self.branches.calls

    def guide(  # type: ignore[override]
        self,
        scale: Scale,
        guidance: Guidance = classifier_free,
        interval: Interval | None = None,
        every: int = 1,
    ) -> Flow:
        """Args: scale: 1 is off; (n,), or a function of t, see `Scale`.   guidance: the rule, such as APG.   interval:
            the times t at which it is on, None for all; at the others the conditional branch runs alone.   every: k,
            the unconditional branch runs in each k-th of these steps, see `EveryKth`.

        Raises: ValueError when there is no unconditional branch, or on a bad interval.
        """
        if isinstance(scale, int | float) and scale == 1:
            return Flow(self.velocity, self.dim)
        if self.pair is None:
            raise ValueError("guidance needs an unconditional branch")
        branches = EveryKth(self.pair, self.velocity, every)
        return Flow(guided(branches, scale, guidance, interval, self.velocity), self.dim, branches=branches)

    def sample(
        self,
        rng: Rng,
        positions: Tensor,
        processors: Sequence[Processor] = (),
        *,
        num_steps: int = 25,
        solver: str = "euler",
        temperature: float = 1.0,
        step: int = 0,
    ) -> Tensor:
        """Latents (B, n, C) float32.

        Args:
            num_steps, solver: see `integrate`.   step: a word of the random numbers' key, for flows drawn anew.
        Raises: ValueError for logit processors or a temperature, which a flow cannot obey; on another solver, no step.
        """
        if processors:
            raise ValueError("a flow has no logits to process")
        if temperature != 1:
            raise ValueError(f"a flow has no temperature (1 is neutral); got {temperature:g}")
        self.calls, calls_a_step = 0, find_solver(solver).calls
        if self.branches is not None:
            self.branches.begin()

        def velocity(x: Tensor, t: Tensor) -> Tensor:
            if self.branches is not None:
                self.branches.step = self.calls // calls_a_step
            self.calls += 1
            if self.known is not None:
                given, keep = self.known
                x = torch.where(keep[..., None], add_noise(given.to(x), noise.to(x), t), x)
            return self.velocity(x, t)

        noise = rng.normal(positions, Draw.NOISE, step=step, count=self.dim)  # B n C
        return integrate(
            velocity,
            noise,
            num_steps,
            solver,
            lambda i: rng.normal(positions, Draw.SOLVER_NOISE, step=(step << 16) + i, count=self.dim),
        )
