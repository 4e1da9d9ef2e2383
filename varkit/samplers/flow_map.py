"""The map from noise to tokens of Distilled Decoding: a deterministic draw from a categorical (arXiv 2412.17153, 3.2).

A codebook vector c_j with probability p_j is the target of a flow that starts at normal noise e, along straight paths
x_t = (1 - t) e + t c_j, t = 0 being noise. Given x at time t, Bayes' rule says which code the path leads to:

    w_j(x, t) = softmax_j( log p_j - |x - t c_j|^2 / (2 (1 - t)^2) )

and the velocity that carries the marginals along is the mean of the paths' own,

    v(x, t) = sum_j w_j (c_j - x) / (1 - t).

Integrated from e at t = 0 towards t = 1, x ends at a code: noise space is cut into cells, cell j of probability p_j. So
a teacher whose tokens are drawn this way has the law it had, and its sequence is a function of the noise.

`|x|^2` is the same for all codes and falls out of the softmax; what is left is computed as one matrix product. Close to
t = 1 the posterior has long chosen: integration stops before, at `stop`, and the likeliest code is the token.

Source: the paper; the authors released no code of it. DD2 (arXiv 2510.21003) writes it with t reversed.
Shapes: (...) positions, C channels, V codebook, K codes of probability above 0.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from varkit.heads.categorical import Categorical
from varkit.layout import TokenLayout
from varkit.rng import Draw, Rng

SOLVERS = ("euler", "heun")


def posterior(x: Tensor, t: float | Tensor, log_probs: Tensor, codes: Tensor) -> Tensor:
    """How likely each code is the end of the path through x at time t: (..., K).

    Args:
        x: (..., C).   t: a number, or (...), in [0, 1).
        log_probs: (..., K), or (K,); -inf is never chosen.   codes: (K, C), or (..., K, C) of each position's own.
    """
    if isinstance(t, Tensor):
        t = t[..., None]
    product = x @ codes.T if codes.dim() == 2 else (codes @ x[..., None])[..., 0]
    half_squares = codes.square().sum(-1) / 2
    return torch.softmax(log_probs + (product - t * half_squares) * (t / (1 - t) ** 2), -1)


def velocity(x: Tensor, t: float | Tensor, log_probs: Tensor, codes: Tensor) -> tuple[Tensor, Tensor]:
    """dx/dt (..., C), and the posterior that it is the mean of. Arguments as those of `posterior`."""
    w = posterior(x, t, log_probs, codes)
    mean = w @ codes if codes.dim() == 2 else (w[..., None, :] @ codes)[..., 0, :]
    return (mean - x) / (1 - (t[..., None] if isinstance(t, Tensor) else t)), w


def integrate(x: Tensor, log_probs: Tensor, codes: Tensor, times: Sequence[float], solver: str = "heun") -> Tensor:
    """Carry x (..., C) from the first of `times` to the last, a step between neighbours.

    Raises: ValueError on an unknown solver.
    """
    if solver not in SOLVERS:
        raise ValueError(f"solver must be one of {', '.join(SOLVERS)}; got {solver!r}")
    for now, then in pairwise(times):
        v, _ = velocity(x, now, log_probs, codes)
        ahead = x + (then - now) * v
        if solver == "heun":
            ahead = x + (then - now) / 2 * (v + velocity(ahead, then, log_probs, codes)[0])
        x = ahead
    return x


def uniform_times(start: float, end: float, steps: int) -> list[float]:
    return torch.linspace(start, end, steps + 1, dtype=torch.float64).tolist()


def possible_codes(log_probs: Tensor, codebook: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
    """What is left after top-k and its like: log probabilities (..., K), vectors (..., K, C) and ids (..., K).

    Where most codes are possible all are kept, (..., V) and (V, C), and no ids: one matrix for all positions is faster.
    """
    count = int((log_probs > -torch.inf).sum(-1).max())
    if 16 * count > log_probs.shape[-1]:
        return log_probs, codebook, None
    kept, ids = log_probs.topk(count, dim=-1)
    return kept, codebook[ids], ids


def start_noise(rng: Rng, layout: TokenLayout, kind: Draw = Draw.NOISE) -> Tensor:
    """The noise (B, L, C) that a sequence is a function of. Its numbers are those of each image's seed alone.

    Args: kind: of the draw. Trajectories and samples have different ones, so that the same seed gives them other noise.
    """
    return rng.normal(torch.arange(layout.length), kind, count=layout.dim)


@dataclass(frozen=True)
class FlowMap:
    """The map at a number of steps.

    Args: steps: of the solver, on equal times from 0 to `stop` < 1.   solver: `euler` or `heun`.
    Raises: ValueError on a value out of range.
    """

    steps: int = 50
    solver: str = "heun"
    stop: float = 0.999

    def __post_init__(self) -> None:
        if self.steps < 1 or not 0 < self.stop < 1 or self.solver not in SOLVERS:
            raise ValueError(
                f"the map takes at least 1 step, a solver of {', '.join(SOLVERS)} and a stop in (0, 1); got "
                f"steps={self.steps}, solver={self.solver!r}, stop={self.stop}"
            )

    def __call__(self, noise: Tensor, log_probs: Tensor, codebook: Tensor) -> Tensor:
        """noise (..., C), log_probs (..., V) normalised, codebook (V, C) -> ids (...). float32 or float64 inside."""
        kept, codes, ids = possible_codes(log_probs, codebook)
        x = integrate(noise, kept, codes, uniform_times(0.0, self.stop, self.steps), self.solver)
        chosen = posterior(x, self.stop, kept, codes).argmax(-1)
        return chosen if ids is None else ids.gather(-1, chosen[..., None])[..., 0]

    def drawing(self, noise: Tensor, codebook: Tensor) -> Callable[[Categorical, Tensor], Tensor]:
        """As the `draw` of `NextGroupSampler.generate`, of noise (B, L, C) for all positions."""

        def draw(predictive: Categorical, positions: Tensor) -> Tensor:
            return self(noise[:, positions], predictive.logits.log_softmax(-1), codebook.to(noise))

        return draw


def nearest_codes(vectors: Tensor, codebook: Tensor) -> Tensor:
    """(B, n, C) -> ids (B, n) of the codebook's (V, C) nearest vectors."""
    return torch.cdist(vectors, codebook.to(vectors)).argmin(-1)
