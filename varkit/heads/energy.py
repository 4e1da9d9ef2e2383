"""Energies: a network scores candidates, and what it predicts lies downhill (Gladstone et al., arXiv 2406.08862 and
2507.02092). Experimental: no weights were ever released.

A candidate with a low energy goes well with its context. Prediction is gradient descent on the candidate from noise,
p <- p - alpha dE/dp; training puts a loss on what the descent reaches and differentiates through it, twice.

Source: alexiglad/EBT: model/vid/ebt.py (0ad3628). What differs: noise is keyed; several candidates of a frame are
refined at once and the best by energy is kept, which the release has for texts alone.

Shapes: B clips, m or N candidates, n tokens of one, C channels, V = n C numbers, D width of the network.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from varkit.heads.diffusion import fold, unfold
from varkit.interfaces import Predictive, Processor
from varkit.rng import Draw, Rng

Score = Callable[[Tensor, int, Tensor | None], Tensor]
"""Candidates (B, m, V), the landscape, noise (B, m, D) on their embeddings or None -> energies (B, m)."""

Initial = Literal["noise", "zeros", "recent"]
"""Where a descent starts: standard normal noise, zeros, or the frame before."""

SELECT = ("min_energy", "largest_drop")
"""Which of several candidates is kept: that of the lowest energy in the end, or whose energy fell the most."""


class Descent(NamedTuple):
    """Of each step: candidates (B, m, V) after it, energies (B, m) before it, detached."""

    candidates: list[Tensor]
    energies: list[Tensor]


class Refined(NamedTuple):
    """best (B, V); candidates (B, N, V) and their energies (B, N), both in the end; the descent."""

    best: Tensor
    candidates: Tensor
    energies: Tensor
    descent: Descent


def descend(
    score: Callable[[Tensor, int, int], Tensor],
    start: Tensor,
    landscapes: Sequence[int],
    alpha: Tensor,
    *,
    learn: bool = False,
    detach: bool = True,
    truncate: bool = False,
) -> Descent:
    """Gradient descent on candidates, also where gradients are off.

    Candidates must not influence each other: one gradient of the sum of energies is that of each.

    Args:
        score: candidates (B, m, V), landscape and number of the step -> energies (B, m).
        landscapes: of each step.   alpha: how far a step goes, () or (B, m, 1).
        learn: keep the graph of each step, for a loss on candidates.
        detach: each step's graph begins at its own candidates.   truncate: keep the graph of the last step alone.
    """
    x, candidates, energies = start, list[Tensor](), list[Tensor]()
    alpha = alpha if learn else alpha.detach()
    with torch.enable_grad():
        for i, landscape in enumerate(landscapes):
            if detach or not learn or not x.requires_grad:
                x = x.detach().requires_grad_()
            energy = score(x, landscape, i)
            keep = learn and (not truncate or i == len(landscapes) - 1)
            (slope,) = torch.autograd.grad(energy.sum(), x, create_graph=keep)
            x = x - alpha * slope
            candidates.append(x if learn else x.detach())
            energies.append(energy.detach())
    return Descent(candidates, energies)


def check_refinement(
    num_steps: int | None, candidates: int, alpha: float | None, noise: float | None, select: str
) -> None:
    """Raises ValueError on what no refinement can be."""
    for name, count in (("the number of steps", num_steps), ("the number of candidates", candidates)):
        if count is not None and count < 1:
            raise ValueError(f"{name} must be at least 1; got {count}")
    if alpha is not None and not alpha > 0:
        raise ValueError(f"alpha must be > 0 (None is the one that was learned); got {alpha}")
    if noise is not None and not noise >= 0:
        raise ValueError(f"noise must not be negative (None is that of training); got {noise}")
    if select not in SELECT:
        raise ValueError(f"select must be one of {', '.join(SELECT)}; got {select!r}")


class Energy(Predictive):
    """The energies of candidates for one frame.

    Args:
        score: see `Score`.
        landscapes: a number of steps, or None for that of the model -> the landscape of each.
        alpha: () how far a step goes.
        places, dim: n and C.   width: D, of the noise.
        noise: its standard deviation, unless `sample` is told another.
        initial: see `Initial`.   recent: (B, V), the frame before.
    Attributes, of the last `sample`: calls, how often candidates were scored; refined.
    """

    refined: Refined

    def __init__(
        self,
        score: Score,
        landscapes: Callable[[int | None], list[int]],
        alpha: Tensor,
        *,
        places: int,
        dim: int,
        width: int,
        noise: float,
        initial: Initial,
        recent: Tensor,
    ) -> None:
        self.score, self.landscapes, self.alpha = score, landscapes, alpha
        self.places, self.dim, self.width = places, dim, width
        self.noise, self.initial, self.recent = noise, initial, recent
        self.calls = 0

    def guide(self, scale: float | Tensor) -> Energy:
        """Raises ValueError unless the scale is 1: there is nothing to lead away from."""
        if isinstance(scale, Tensor) or scale != 1:
            raise ValueError(f"energies have no unconditional branch: guidance_scale must be 1; got {scale}")
        return self

    def refine(
        self,
        start: Tensor,
        *,
        num_steps: int | None = None,
        alpha: float | None = None,
        noise: Callable[[int], Tensor] | None = None,
        select: str = "min_energy",
    ) -> Refined:
        """Refine candidates and pick one of each clip.

        Args:
            start: (B, N, V).   noise: of step i, (B, N, D).
            num_steps: more than the model's own are taken in its last landscape.   alpha, select: see `sample`.
        Raises: ValueError on a bad setting, or where the descent ran away.
        """
        check_refinement(num_steps, start.shape[1], alpha, None, select)
        steps = self.landscapes(num_steps)
        far = self.alpha if alpha is None else torch.full_like(self.alpha, alpha)
        descent = descend(lambda x, k, i: self.score(x, k, None if noise is None else noise(i)), start, steps, far)
        last = descent.candidates[-1]
        with torch.no_grad():
            energies = self.score(last, steps[-1], None)
        self.calls = len(steps) + 1
        value = energies if select == "min_energy" else energies - descent.energies[0]
        usable = value.isfinite() & last.isfinite().all(-1)
        if not usable.any(1).all():
            raise ValueError(
                f"the descent ran away in {len(steps)} steps of alpha {float(far):g}: take a smaller alpha, fewer steps"
            )
        chosen = value.masked_fill(~usable, torch.inf).argmin(1)
        best = last[torch.arange(len(last), device=last.device), chosen]
        return Refined(best, last, energies, descent)

    def start(self, rng: Rng, positions: Tensor, candidates: int) -> Tensor:
        """Where N candidates begin, (B, N, V): the first as if it were the only one."""
        if self.initial == "noise":
            drawn = [rng.candidate(i).normal(positions, Draw.NOISE, count=self.dim) for i in range(candidates)]
            return torch.cat([fold(z, self.places) for z in drawn], 1).to(self.recent)
        begin = self.recent if self.initial == "recent" else torch.zeros_like(self.recent)
        return begin[:, None].expand(-1, candidates, -1)

    def sample(
        self,
        rng: Rng,
        positions: Tensor,
        processors: Sequence[Processor] = (),
        *,
        num_steps: int | None = None,
        candidates: int = 1,
        alpha: float | None = None,
        noise: float | None = None,
        select: str = "min_energy",
    ) -> Tensor:
        """Latents (B, n, C) of the frame at `positions` (n,) or (B, n).

        Args:
            num_steps: of the descent; None is the model's own, more think longer.
            candidates: N, of which one is kept.   select: how, see SELECT.
            alpha: how far a step goes; None is as learned.
            noise: standard deviation of what each step adds to the embedded candidates (Langevin); None is as trained.
        Raises: ValueError for logit processors, on a bad setting, or where the descent ran away.
        """
        if processors:
            raise ValueError("energies have no logits to process")
        check_refinement(num_steps, candidates, alpha, noise, select)
        std = self.noise if noise is None else noise
        if candidates > 1 and self.initial != "noise" and std == 0:
            raise ValueError(
                f"all candidates start from {self.initial} and meet no noise: they would be one. Give noise > 0, or "
                f"ask for one candidate"
            )
        first, rngs = positions[..., :1], [rng.candidate(i) for i in range(candidates)]

        def langevin(step: int) -> Tensor:
            drawn = [r.normal(first, Draw.SOLVER_NOISE, step=step, count=self.width) for r in rngs]
            return std * torch.cat(drawn, 1).to(self.recent)

        self.refined = self.refine(
            self.start(rng, positions, candidates),
            num_steps=num_steps,
            alpha=alpha,
            noise=langevin if std else None,
            select=select,
        )
        return unfold(self.refined.best[:, None], self.places)
