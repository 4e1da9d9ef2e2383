"""The Gaussian diffusion of IDDPM: cosine schedule, noise prediction, learned range of the variance.

Sources: Nichol and Dhariwal, arXiv 2102.09672; LTH14/mar: diffusion/ (fe470ac). What differs: the coefficients of a
step are numbers, not tables gathered for every row; the likelihood at t = 0 has a finite gradient far from the data
too.

Shapes: N rows, C channels.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cache
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

STEPS = 1000
"""Steps of the process that heads are trained on."""

Spacing = int | str
"""Which of these steps sampling takes: a number; `ddim50`, every 20th from the first; `4,0`, so many of each part."""


def spaced(spacing: Spacing, total: int = STEPS) -> list[int]:
    """The indices, rising, that a `Spacing` takes of `total`. Raises ValueError when it cannot."""
    text = str(spacing)
    try:
        if text.startswith("ddim"):
            wanted = int(text.removeprefix("ddim"))
            return next(list(range(0, total, s)) for s in range(1, total) if len(range(0, total, s)) == wanted)
        counts = [int(part) for part in text.split(",")]
    except (ValueError, StopIteration):
        raise ValueError(
            f"steps of a diffusion are a number, a list such as 10,20 or ddimN with a whole stride; got {spacing!r}"
        ) from None
    indices, start = [], 0
    for i, count in enumerate(counts):
        size = total // len(counts) + (i < total % len(counts))
        if not 0 <= count <= size:
            raise ValueError(f"a diffusion of {total} steps has {size} in part {i}: cannot take {count} of them")
        stride = (size - 1) / (count - 1) if count > 1 else 1.0
        place = 0.0
        for _ in range(count):
            indices.append(start + round(place))
            place += stride
        start += size
    return indices


class Coefficients(NamedTuple):
    """Of one step: numbers, or (N, 1) float32 for steps of each row's own."""

    signal: Any  # x = signal * data + sigma * noise
    sigma: Any
    signal_before: Any  # of the step that is reached
    sigma_before: Any
    from_x: Any  # of x and of x0 in the posterior's mean
    from_x0: Any
    log_beta: Any  # the largest log variance
    log_posterior: Any  # the smallest


class Process:
    """The Gaussian process on some of the trained steps; arrays (T,) float64 on the CPU.

    Args: indices: of the trained process, rising. Raises ValueError on fewer than two.
    """

    def __init__(self, indices: Sequence[int]) -> None:
        if len(indices) < 2:
            raise ValueError(f"a diffusion takes at least 2 steps; got {len(indices)}")
        f = np.cos((np.arange(STEPS + 1) / STEPS + 0.008) / 1.008 * np.pi / 2) ** 2
        every = np.cumprod(1 - np.minimum(1 - f[1:] / f[:-1], 0.999))
        self.indices = np.array(indices)
        kept = every[self.indices]
        self.betas = 1 - kept / np.append(1.0, kept[:-1])
        self.alphas_cumprod = np.cumprod(1 - self.betas)
        before = np.append(1.0, self.alphas_cumprod[:-1])
        rest, rest_before = 1 - self.alphas_cumprod, 1 - before
        variance = self.betas * rest_before / rest
        self.posterior_log_variance = np.log(np.append(variance[1], variance[1:]))  # the first is 0: the second's
        self.from_x = rest_before * np.sqrt(1 - self.betas) / rest
        self.from_x0 = self.betas * np.sqrt(before) / rest
        roots = [np.sqrt(table) for table in (self.alphas_cumprod, rest, before, rest_before)]
        logs = [np.log(self.betas), self.posterior_log_variance]
        self.tables = np.stack([*roots, self.from_x, self.from_x0, *logs], 1)  # T 8: the fields of Coefficients

    def __len__(self) -> int:
        return len(self.indices)

    def at(self, index: int | Tensor) -> Coefficients:
        """Args: index: into this process; (N,) int64 for rows of their own."""
        if isinstance(index, int):
            return Coefficients(*self.tables[index].tolist())
        rows = torch.from_numpy(self.tables).float().to(index.device)[index]  # N 8
        return Coefficients(*rows.split(1, -1))


@cache
def process(spacing: Spacing = STEPS) -> Process:
    """The process with so many steps; by default that of training."""
    return Process(spaced(spacing))


class Backward(NamedTuple):
    """What the network says about the token a step before, (..., C) float32 each."""

    mean: Tensor
    log_variance: Tensor
    x0: Tensor
    noise: Tensor


def backward(c: Coefficients, x: Tensor, out: Tensor) -> Backward:
    """Args: x: (..., C) float32.   out: (..., 2C), the network's answer at x."""
    noise, share = out.float().chunk(2, -1)
    x0 = (x - c.sigma * noise) / c.signal
    share = (share + 1) / 2
    log_variance = share * c.log_beta + (1 - share) * c.log_posterior
    return Backward(c.from_x0 * x0 + c.from_x * x, log_variance, x0, noise)


def diffuse(c: Coefficients, data: Tensor, noise: Tensor) -> Tensor:
    """x_t (..., C) of data and noise."""
    return c.signal * data + c.sigma * noise


def ancestral(at: Backward, noise: Tensor | None, temperature: float = 1.0) -> Tensor:
    """A sample (..., C) of the token a step before. Args: noise: standard normal; None at the last step, the mean."""
    return at.mean if noise is None else at.mean + (0.5 * at.log_variance).exp() * noise * temperature


def variational_bound(c: Coefficients, x: Tensor, data: Tensor, step: Backward, t: Tensor) -> Tensor:
    """The term of the bound at each row, in bits a channel: (N,).

    A Kullback-Leibler divergence, but at t = 0 the likelihood of data in [-1, 1] cut into 255 bins. Latents are not
    bounded and make the latter large; the release has it so.
    """
    mean = c.from_x0 * data + c.from_x * x
    ratio = c.log_posterior - step.log_variance
    divergence = 0.5 * (-1.0 - ratio + ratio.exp() + (mean - step.mean).square() * (-step.log_variance).exp())
    likelihood = -discretised_log_likelihood(data, step.mean, 0.5 * step.log_variance)
    return torch.where(t == 0, likelihood.mean(-1), divergence.mean(-1)) / math.log(2.0)


def discretised_log_likelihood(x: Tensor, mean: Tensor, log_std: Tensor) -> Tensor:
    """Log probability (...) of the bin of width 2 / 255 around x under a normal; the outermost bins are open."""

    def below(value: Tensor) -> Tensor:  # the usual approximation of the normal's distribution function
        value = value.clamp(-20, 20)  # nothing changes out there, but a cube may overflow, and its gradient be NaN
        return 0.5 * (1 + torch.tanh(math.sqrt(2 / math.pi) * (value + 0.044715 * value**3)))

    upper, lower = (below((x - mean + side / 255) * (-log_std).exp()) for side in (1, -1))
    inside = torch.where(x > 0.999, 1 - lower, upper - lower)
    return torch.where(x < -0.999, upper, inside).clamp_min(1e-12).log()
