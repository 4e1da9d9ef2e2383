"""How strong classifier-free guidance is at each step.

`guidance_scale` w always means uncond + w (cond - uncond): 1 is off. A schedule is a function of the steps
decided and the last step's index, so it can be printed and plotted.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial

from varkit.config import nearest

GuidanceSchedule = Callable[[float, int, int], float]
"""(w, decided, last) -> the scale of the step before which `decided` of `last` + 1 steps were taken."""


def constant(w: float, decided: int, last: int) -> float:
    return w


def linear(w: float, decided: int, last: int) -> float:
    """From 1 (off) at the first step to w at the last. Source: FoundationVision/VAR: models/var.py."""
    return 1 + (w - 1) * (decided / last if last else 0.0)


def linear_open(w: float, decided: int, last: int) -> float:
    """From 1 at the first step towards w, which a step after the last would have.

    Source: bytedance/1d-tokenizer: modeling/maskgit.py, whose ramp lags one step behind.
    """
    return 1 + (w - 1) * decided / (last + 1)


def linear_next(w: float, decided: int, last: int) -> float:
    """From a first step towards w to w itself at the last: the share of steps done with this one.

    Source: Pepper-lll/LMforImageGeneration (ELM, arXiv 2410.16257), whose `linear` it is.
    """
    return 1 + (w - 1) * (decided + 1) / (last + 1)


def sine(w: float, decided: int, last: int) -> float:
    """As `linear_next` along a quarter of a sine: fast at first, flat at the end. ELM's `cos`."""
    return 1 + (w - 1) * math.sin(math.pi / 2 * (decided + 1) / (last + 1))


def power_cosine(w: float, decided: int, last: int, power: float = 1.0) -> float:
    """From 1 towards w along half a cosine of (decided / steps) ^ power, as `linear_open` never quite there.

    The larger `power`, the later guidance sets in; 0 is constant. Source: RAR (arXiv 2411.00776), modeling/rar.py.
    """
    return 1 + (w - 1) * (1 - math.cos(math.pi * (decided / (last + 1)) ** power)) / 2


def cosine(w: float, decided: int, last: int) -> float:
    """From 1 to w along half a cosine: flat at both ends."""
    return 1 + (w - 1) * (1 - math.cos(math.pi * (decided / last if last else 0.0))) / 2


def late(w: float, decided: int, last: int) -> float:
    """Off in the first half of the steps, w in the second."""
    return w if 2 * decided >= last else 1.0


SCHEDULES: dict[str, GuidanceSchedule] = {
    "constant": constant,
    "linear": linear,
    "cosine": cosine,
    "late": late,
    "linear-open": linear_open,
    "linear-next": linear_next,
    "sine": sine,
    "power-cosine": power_cosine,
}


def guidance_schedule(name: str, power: float = 1.0) -> GuidanceSchedule:
    """The schedule of that name; `power` is read by power-cosine alone.

    Raises: ValueError naming the nearest schedule when `name` is none, or on a negative power.
    """
    if name not in SCHEDULES:
        raise ValueError(
            f"no guidance schedule is called {name!r}{nearest(name, SCHEDULES)}; choose one of {', '.join(SCHEDULES)}"
        )
    if power < 0:
        raise ValueError(f"guidance_power must be >= 0 (0 is constant guidance); got {power}")
    return partial(power_cosine, power=power) if name == "power-cosine" else SCHEDULES[name]


def guidance_interval(interval: Sequence[int] | None) -> tuple[int, int] | None:
    """The first and the last step that are guided, counted from 0; None for all.

    Raises: ValueError unless they are two whole numbers, 0 <= first <= last.
    """
    if interval is None:
        return None
    steps = tuple(interval)
    if len(steps) != 2 or not all(type(step) is int for step in steps) or not 0 <= steps[0] <= steps[1]:
        raise ValueError(
            f"guidance_interval must be the first and the last guided step, counted from 0, such as (0, 5); got {steps}"
        )
    return steps[0], steps[1]
