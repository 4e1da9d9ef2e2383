"""The two branches of classifier-free guidance, of which one may be asked for more rarely."""

from __future__ import annotations

from torch import Tensor

from varkit.samplers.ode import Pair, Velocity


class EveryKth:
    """Both branches of one integration, of which the unconditional one is asked for in every k-th step alone.

    It is a `Pair`. In the steps between the conditional branch runs by itself, and

        uncond(x, t) = cond(x, t) - d    with d = cond - uncond where both were asked for last,

    so that classifier-free guidance is cond + (w - 1) d there. Where the difference does not change in time this is
    exact. Of the two things that could be kept, the difference and the unconditional answer itself, both err by (w - 1)
    times what the kept one has changed by since. The difference changes less: along a flow of a mixture of normals,
    whose velocities are known, at w = 4 its error was a half to a tenth (`tests/test_guidance_reuse.py`).

    That an unconditional answer can be had from the conditional one of the same step is the idea of CFG-Cache in
    FasterCache (Lv et al., arXiv 2410.19355); that past answers can stand for it, of LinearAG (Castillo et al., arXiv
    2312.12487). The rule here is simpler than theirs.

    Args:
        every: k; 1 asks for both always.
    Raises: ValueError unless `every` is a whole number from 1.
    Attributes:
        step: the step that an integration is in, set by whoever integrates. The first guided step asks for both; so
            does each k-th after it, in all calls of that step (Heun's two, too).
        calls: how often both were asked for since `begin`.
    """

    def __init__(self, pair: Pair, alone: Velocity, every: int = 1) -> None:
        check_guidance_every(every)
        self.pair, self.alone, self.every = pair, alone, every
        self.begin()

    def begin(self) -> None:
        """Forget what was kept: a new integration starts."""
        self.step, self.calls = 0, 0
        self.first: int | None = None
        self.difference: Tensor | None = None

    def __call__(self, x: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        if self.first is None:
            self.first = self.step
        if self.difference is not None and (self.step - self.first) % self.every:
            cond = self.alone(x, t)
            return cond, cond - self.difference
        self.calls += 1
        cond, uncond = self.pair(x, t)
        if self.every > 1:
            self.difference = cond - uncond
        return cond, uncond


def check_guidance_every(every: int) -> None:
    """Raises ValueError unless it is a whole number from 1."""
    if type(every) is not int or every < 1:
        raise ValueError(
            f"guidance_every must be a whole number from 1 (every step, exact), such as 2: the unconditional branch in "
            f"each second step of the head; got {every!r}"
        )
