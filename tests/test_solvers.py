"""Solvers of flows: their grids of times, the stochastic one, and guidance that is on at some times only."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor

from varkit import Rng
from varkit.heads.flow import Flow
from varkit.rng import Draw
from varkit.samplers.ode import SOLVERS, find_solver, guided, integrate, jump_times, sde_times


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("steps", [1, 2, 3, 4, 7, 20, 25, 50])
def test_any_number_of_steps_is_taken_and_falls_from_noise_to_data(solver: str, steps: int) -> None:
    grid = find_solver(solver).grid(steps)
    assert len(grid) == steps + 1 and (grid[0], grid[-1]) == (1.0, 0.0)
    assert all(a > b for a, b in pairwise(grid))
    with pytest.raises(ValueError, match="num_steps must be at least 1; got 0"):
        find_solver(solver).grid(0)


@pytest.mark.parametrize("steps", [2, 5, 24, 25])
def test_where_the_grids_are_dense(steps: int) -> None:
    jump = jump_times(steps)
    early, late = [t for t in jump if t >= 0.3 - 1e-9], [t for t in jump if t <= 0.25]
    assert len(early) + len(late) == len(jump) and len(early) - (len(late) - 1) == steps % 2
    assert late[0] == 0.25 and (steps < 4 or early[-1] == pytest.approx(0.3))
    assert sde_times(steps)[-2] == pytest.approx(0.04)
    assert sde_times(steps, last_time=0.1)[-2] == pytest.approx(0.1)


def normal_flow(mean: float, std: float) -> Any:
    """The exact velocity of data that is normal: E[noise - data | x_t]."""

    def velocity(x: Tensor, t: Tensor) -> Tensor:
        t = t.view(-1, 1)
        variance = (1 - t) ** 2 * std**2 + t**2
        return (t - (1 - t) * std**2) / variance * (x - (1 - t) * mean) - mean

    return velocity


def test_the_stochastic_solver_draws_from_the_data() -> None:
    generator = torch.Generator().manual_seed(0)
    start = torch.randn(20_000, 1, generator=generator)
    noise: Any = lambda i: torch.randn(start.shape, generator=generator)  # noqa: E731
    out = integrate(normal_flow(2.0, 0.5), start, 100, "sde", noise)
    assert float(out.mean()) == pytest.approx(2.0, abs=0.02) and float(out.std()) == pytest.approx(0.5, abs=0.02)
    along = integrate(normal_flow(2.0, 0.5), start, 100, "euler")
    assert float(torch.corrcoef(torch.cat([start, along], 1).T)[0, 1]) > 0.99
    # The noise of the start is forgotten.
    assert abs(float(torch.corrcoef(torch.cat([start, out], 1).T)[0, 1])) < 0.5


def test_one_stochastic_step_is_eulers_and_two_add_noise_once() -> None:
    start, velocity = torch.randn(4, 3), normal_flow(1.0, 0.5)
    assert torch.equal(integrate(velocity, start, 1, "sde"), integrate(velocity, start, 1, "euler"))
    asked: list[int] = []

    def noise(i: int) -> Tensor:
        asked.append(i)
        return torch.zeros_like(start)

    assert integrate(velocity, start, 2, "sde", noise).isfinite().all() and asked == [0]
    with pytest.raises(ValueError, match="solver sde adds noise"):
        integrate(velocity, start, 2, "sde")
    with pytest.raises(ValueError, match="solver must be one of euler, heun, euler-jump, sde; got 'rk4'"):
        integrate(velocity, start, 2, "rk4")


def test_the_stochastic_state_is_float64_and_the_answer_is_as_given() -> None:
    seen: list[torch.dtype] = []

    def velocity(x: Tensor, t: Tensor) -> Tensor:
        seen.append(x.dtype)
        return normal_flow(0.0, 1.0)(x, t).float()

    start = torch.randn(2, 3)
    assert integrate(velocity, start, 3, "sde", lambda i: torch.randn(2, 3)).dtype == torch.float32
    assert seen == [torch.float64] * 3


def test_noise_of_the_steps_belongs_to_the_image() -> None:
    def velocity(x: Tensor, t: Tensor) -> Tensor:
        return x * t.view(-1, 1, 1)

    def draw(rng: Rng, positions: list[int], step: int = 0) -> Tensor:
        return Flow(velocity, 2).sample(rng, torch.tensor(positions), num_steps=4, solver="sde", step=step)

    three = draw(Rng.from_seed(5, 3), [0, 1, 2])
    torch.testing.assert_close(three[1:2, 2:], draw(Rng.from_seed(5, 1, first=1), [2]))
    assert not torch.allclose(three, draw(Rng.from_seed(5, 3), [0, 1, 2], step=1))
    keys = []

    class Watched(Rng):
        def normal(self, positions: Tensor, kind: int, step: int = 0, count: int | None = None) -> Tensor:
            keys.append((int(kind), step))
            return super().normal(positions, kind, step, count)

    for step in (0, 1):
        draw(Watched(torch.arange(2)), [0], step)
    assert len(set(keys)) == len(keys) == 2 * (1 + 3) and {kind for kind, _ in keys} == {Draw.NOISE, Draw.SOLVER_NOISE}


def test_guidance_on_an_interval_asks_the_null_branch_there_alone() -> None:
    asked: list[str] = []

    def alone(x: Tensor, t: Tensor) -> Tensor:
        asked.append("alone")
        return torch.ones_like(x)

    def pair(x: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        asked.append("pair")
        return torch.ones_like(x), torch.zeros_like(x)

    flow = Flow(alone, 1, pair).guide(3.0, interval=(0.2, 0.7))
    x = torch.zeros(2, 1)
    for t, expected in ((0.8, 1.0), (0.7, 3.0), (0.5, 3.0), (0.2, 3.0), (0.1, 1.0)):
        asked.clear()
        assert torch.equal(flow.velocity(x, torch.full((2,), t)), torch.full((2, 1), expected)), t
        assert asked == (["pair"] if expected == 3 else ["alone"])
    mixed = flow.velocity(x, torch.tensor([0.9, 0.5]))
    assert mixed.flatten().tolist() == [1.0, 3.0]
    assert flow.velocity(x.double(), torch.full((2,), 0.7, dtype=torch.float64))[0].item() == 3.0
    for bad in ((0.7, 0.2), (-0.1, 1.0), (0.0, 1.5)):
        with pytest.raises(ValueError, match="times of guidance are"):
            Flow(alone, 1, pair).guide(3.0, interval=bad)
    with pytest.raises(ValueError, match="alone="):
        guided(pair, 3.0, interval=(0.0, 0.5))
