"""The two branches of classifier-free guidance, of which one may be asked for more rarely."""

from __future__ import annotations

from torch import Tensor

from varkit.samplers.ode import Pair, Velocity


class EveryKth:
    """Both branches of one integration, of which the unconditional one is asked for in every k-th step alone.

    It is a `Pair`. In the steps between, the conditional branch runs by itself, and

        uncond(x, t) = cond(x, t) - d(t),
        d(t) = d_b + (d_b - d_a) (t - b) / (b - a)    with d = cond - uncond at a and b, the last two asked for;

    with only one known so far, d is that one. Classifier-free guidance then is cond + (w - 1) d. Where the difference
    is linear in t, nothing is lost from the second full step on; where it is constant, nothing at all.

    Why so: the error is (w - 1) times what was missed of the quantity that is kept. The difference changes less than
    the unconditional answer does, and most of its change is along a line. Measured on a mixture of normals, whose
    velocities are known (`tests/test_guidance_reuse.py`): with Euler's steps and k of 2 or 3 it came nearer to the true
    answer than fewer steps with both branches at the cost of equally many rows. A difference held as it was did not, an
    unconditional answer that is held still less. With Heun's steps, or a k of 10, nothing was gained.

    The idea that an unconditional answer can be had from the conditional one of the same step is that of CFG-Cache in
    FasterCache (Lv et al., arXiv 2410.19355); that it can be had from past answers by an affine rule, that of LinearAG
    (Castillo et al., arXiv 2312.12487), whose rule is fitted; this one is not.

    Args:
        every: k; 1 asks for both always.
    Raises: ValueError unless `every` is a whole number from 1.
    Attributes:
        step: the step that an integration is in, set by whoever integrates. The first guided step asks for both; so
            does each k-th after it, in all calls of that step (Heun's two; the last of them is what is kept).
        calls: how often both were asked for since `begin`.
    """

    def __init__(self, pair: Pair, alone: Velocity, every: int = 1) -> None:
        check_guidance_every(every)
        self.pair, self.alone, self.every = pair, alone, every
        self.begin()

    def begin(self) -> None:
        """Forget what was kept: a new integration starts."""
        self.step, self.calls = 0, 0
        self.kept: list[tuple[int, Tensor, Tensor]] = []  # step, time and difference: of two steps at most
        self.first: int | None = None

    def __call__(self, x: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        if self.first is None:
            self.first = self.step
        if (self.step - self.first) % self.every:
            cond = self.alone(x, t)
            return cond, cond - self.difference(t)
        self.calls += 1
        cond, uncond = self.pair(x, t)
        if self.every > 1:
            before = [one for one in self.kept if one[0] != self.step][-1:]
            self.kept = [*before, (self.step, t, cond - uncond)]
        return cond, uncond

    def difference(self, t: Tensor) -> Tensor:
        """What cond - uncond is taken for at time t."""
        *before, (_, b, d) = self.kept
        if not before:
            return d
        _, a, earlier = before[0]
        ahead = ((t - b) / (b - a)).to(d)
        return d + (d - earlier) * ahead.view(*ahead.shape, *[1] * (d.dim() - ahead.dim()))


def check_guidance_every(every: int) -> None:
    """Raises ValueError unless it is a whole number from 1."""
    if type(every) is not int or every < 1:
        raise ValueError(
            f"guidance_every must be a whole number from 1 (every step, exact), such as 2: the unconditional branch in "
            f"each second step of the head; got {every!r}"
        )
