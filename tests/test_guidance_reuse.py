"""Guidance whose unconditional branch runs in some steps only: on flows with known answers, and on real models."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from typer.testing import CliRunner

from tests.test_models import liven
from varkit import AutoPipeline, Rng
from varkit.cli import app
from varkit.heads.diffusion import Diffusion
from varkit.heads.flow import Flow
from varkit.pipelines.auto import assemble
from varkit.registry import model_entry
from varkit.samplers.branches import EveryKth
from varkit.samplers.continuous import ContinuousSampler
from varkit.samplers.ode import SOLVERS, guided, integrate

EVERY = torch.arange(3)
MEANS = torch.tensor([[2.0, 0.0], [-1.0, 1.7], [-1.0, -1.7]], dtype=torch.float64)


def mixture(means: Tensor, std: float = 0.4) -> Callable[[Tensor, Tensor], Tensor]:
    """The exact velocity of data from equally many of each of these normals."""

    def velocity(x: Tensor, t: Tensor) -> Tensor:
        t = t.view(-1, 1, 1)
        variance = (1 - t) ** 2 * std**2 + t**2
        away = x[:, None] - (1 - t) * means  # B K 2
        share = (-away.square().sum(-1, keepdim=True) / (2 * variance)).softmax(1)
        return (share * ((t - (1 - t) * std**2) / variance * away - means)).sum(1)

    return velocity


COND, UNCOND = mixture(MEANS[:1]), mixture(MEANS)
START = torch.randn(256, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def both(x: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
    return COND(x, t), UNCOND(x, t)


def noise(i: int) -> Tensor:
    return torch.randn(START.shape, generator=torch.Generator().manual_seed(i + 1), dtype=START.dtype)


class Held(EveryKth):
    """Instead: the last difference as it is."""

    def difference(self, t: Tensor) -> Tensor:
        return self.kept[-1][2]


class HeldAnswer(EveryKth):
    """Instead: the last unconditional velocity as it is."""

    def __call__(self, x: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        before = self.calls
        cond, uncond = super().__call__(x, t)
        self.last = uncond if self.calls > before else self.last
        return cond, self.last


def run(every: int, solver: str, steps: int = 50, kind: type[EveryKth] = EveryKth) -> tuple[Tensor, int]:
    """What is drawn at guidance 4, and the rows that were evaluated for each sample."""
    branches, count = kind(both, COND, every), 0
    velocity = guided(branches, 4.0)

    def stepping(x: Tensor, t: Tensor) -> Tensor:
        nonlocal count
        branches.step, count = count // SOLVERS[solver].calls, count + 1
        return velocity(x, t)

    return integrate(stepping, START, steps, solver, noise), count + branches.calls


def distance(a: Tensor, b: Tensor) -> float:
    return float((a - b).square().sum(1).mean().sqrt())


@pytest.mark.parametrize("solver", SOLVERS)
def test_the_error_grows_with_k_and_is_smaller_than_that_of_what_is_held(solver: str) -> None:
    exact = integrate(guided(both, 4.0), START, 50, solver, noise)
    assert torch.equal(run(1, solver)[0], exact)
    errors, held, answers = (
        [distance(run(k, solver, kind=kind)[0], exact) for k in (2, 3, 5)] for kind in (EveryKth, Held, HeldAnswer)
    )
    assert 0 < errors[0] < errors[1] < errors[2]
    assert all(a < 0.75 * b and b < 0.6 * c for a, b, c in zip(errors, held, answers, strict=True))
    assert errors[0] < 0.05 * distance(integrate(COND, START, 50, solver, noise), exact)


def test_at_equal_cost_it_beats_fewer_steps_and_what_is_held_does_not() -> None:
    """Euler's steps, against a thousand of them: what the docstring of `EveryKth` claims."""
    true = integrate(guided(both, 4.0), START, 1000)
    for every, fewer in ((2, 19), (3, 17)):
        (some, rows), (plain, as_many), (held, _) = (
            run(every, "euler", 25),
            run(1, "euler", fewer),
            run(every, "euler", 25, Held),
        )
        assert rows == as_many
        assert distance(some, true) < 0.75 * distance(plain, true) < 0.75 * distance(held, true)


def test_a_difference_that_is_linear_in_time_is_foretold() -> None:
    def pair(x: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        return x.sin(), x.sin() - 0.5 + 0.8 * t.view(-1, 1, 1)

    branches, x = EveryKth(pair, lambda x, t: x.sin(), 3), torch.randn(2, 3, 4)
    for i, time in enumerate([1.0, 0.9, 0.85, 0.6, 0.5, 0.45, 0.2, 0.1, 0.0]):
        branches.step, t = i, torch.tensor([time, 0.9 * time])  # rows with times of their own
        _, uncond = branches(x + i, t)
        right = torch.allclose(uncond, pair(x + i, t)[1], atol=1e-5)
        assert right == (i not in (1, 2))  # one difference is known there, and held
    assert branches.calls == 3


def linear(away: float = 0.7) -> tuple[Any, Any]:
    """A conditional branch, and the pair; the difference is the same everywhere."""

    def cond(x: Tensor, t: Tensor) -> Tensor:
        return 0.3 * x + t.view(-1, *[1] * (x.dim() - 1))

    return cond, lambda x, t: (cond(x, t), cond(x, t) - away)


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("every", [2, 5, 100])
def test_where_the_difference_does_not_change_nothing_is_lost(solver: str, every: int) -> None:
    cond, pair = linear()
    flow, rng = Flow(cond, 2, pair), Rng.from_seed(0, 2)
    exact = flow.guide(3.0).sample(rng, EVERY, num_steps=7, solver=solver)
    assert float((exact - flow.sample(rng, EVERY, num_steps=7, solver=solver)).abs().min()) > 0.5
    some = flow.guide(3.0, every=every).sample(rng, EVERY, num_steps=7, solver=solver)
    torch.testing.assert_close(some, exact, rtol=0, atol=1e-5)
    each = flow.guide(torch.tensor([1.0, 2.0, 5.0]), every=every).sample(rng, EVERY, num_steps=7, solver=solver)
    torch.testing.assert_close(
        each, flow.guide(torch.tensor([1.0, 2.0, 5.0])).sample(rng, EVERY, num_steps=7, solver=solver)
    )


@pytest.mark.parametrize(
    ("solver", "every", "calls", "null_calls"),
    [
        ("euler", 1, 7, 7),
        ("euler", 3, 7, 3),  # steps 0, 3 and 6
        ("euler-jump", 2, 7, 4),
        ("sde", 7, 7, 1),
        ("sde", 50, 7, 1),  # more than there are: the first step
        ("heun", 1, 13, 13),
        ("heun", 3, 13, 5),  # both calls of steps 0 and 3, the one of step 6
    ],
)
def test_how_often_both_branches_are_asked_for(solver: str, every: int, calls: int, null_calls: int) -> None:
    cond, pair = linear()
    rows: list[int] = []

    def alone(x: Tensor, t: Tensor) -> Tensor:
        rows.append(len(x))
        return cond(x, t)

    def two(x: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        rows.append(2 * len(x))
        return pair(x, t)

    flow = Flow(alone, 2, two).guide(2.0, every=every)
    first = flow.sample(Rng.from_seed(0, 2), EVERY, num_steps=7, solver=solver)
    assert (flow.calls, flow.null_calls) == (calls, null_calls) and sum(rows) == 2 * (calls + null_calls)
    flow.sample(Rng.from_seed(1, 2), EVERY, num_steps=2, solver=solver)
    again = flow.sample(Rng.from_seed(0, 2), EVERY, num_steps=7, solver=solver)
    assert torch.equal(first, again) and flow.null_calls == null_calls  # nothing is left of another integration


def test_the_first_guided_step_of_an_interval_asks_for_both() -> None:
    cond, pair = linear()
    asked: list[float] = []

    def two(x: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        asked.append(float(t[0]))
        return pair(x, t)

    flow = Flow(cond, 2, two).guide(2.0, interval=(0.2, 0.7), every=2)
    flow.sample(Rng.from_seed(0, 2), EVERY, num_steps=10)
    assert asked == pytest.approx([0.7, 0.5, 0.3]) and (flow.calls, flow.null_calls) == (10, 3)


@pytest.mark.parametrize("solver", ["ancestral", "ddim"])
def test_a_diffusion_too(solver: str) -> None:
    def cond(x: Tensor, t: Tensor) -> Tensor:
        return torch.cat([0.2 * x, torch.zeros_like(x)], -1)

    def pair(x: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        return cond(x, t), cond(x, t) - 0.1

    def waving(x: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        return cond(x, t), cond(x, t) - 0.1 * torch.sin(t / 300)

    def draw(pair: Any, every: int) -> Tensor:
        diffusion = Diffusion(cond, 2, pair).guide(3.0, every=every)
        out = diffusion.sample(Rng.from_seed(0, 2), EVERY, num_steps=20, solver=solver)
        assert (diffusion.calls, diffusion.null_calls) == (20, -(-20 // every))
        return out

    for every in (2, 6, 99):
        torch.testing.assert_close(draw(pair, every), draw(pair, 1), rtol=1e-4, atol=1e-4)
    near, far = ((draw(waving, every) - draw(waving, 1)).abs().mean() for every in (2, 6))
    assert 0 < near < far


# ---- models -------------------------------------------------------------------------------------------------------

PART = {"xar_b": "z_proj", "flowar_s": "flownet.input_proj", "mar_b": "diffloss.net.input_proj"}


def parts(name: str) -> tuple[Any, Any]:
    entry = model_entry(name)
    torch.manual_seed(0)
    tokenizer: Any = model_entry(str(entry.tokenizer)).build(**entry.tiny_tokenizer)
    return liven(entry.build(**entry.tiny), 0.1), tokenizer.eval()


@pytest.mark.parametrize("name", PART)
def test_models_run_fewer_rows_and_read_those_of_the_condition(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, tokenizer = parts(name)
    pipe = assemble(model, tokenizer, {"head_steps": 5, "guidance_scale": 3.0, "guidance_schedule": "constant"})
    pipe.set_progress_bar_config(disable=True)
    rows: list[int] = []
    model.get_submodule(PART[name]).register_forward_pre_hook(lambda module, given: rows.append(len(given[0])))

    def draw(**settings: Any) -> tuple[Tensor, Any, int]:
        rows.clear()
        out = pipe([0, 2, 1], seed=4, output_type="latent", **settings)
        if name == "xar_b":  # its clean cells enter the cache by the same layer, once each but the last
            del rows[5::6]
        return out.images, out.stats, sum(rows)

    exact, stats, full = draw()
    groups = stats["steps"]
    assert (stats["head_calls"], stats["null_calls"], full) == (5 * groups, 5 * groups, 30 * groups)
    assert torch.equal(draw(guidance_every=1)[0], exact)
    some, stats, fewer = draw(guidance_every=2)
    assert (stats["head_calls"], stats["null_calls"], fewer) == (5 * groups, 3 * groups, 24 * groups)
    assert draw(guidance_every=9)[1]["null_calls"] == groups
    unguided = draw(guidance_scale=1.0)
    assert unguided[1]["null_calls"] == 0 and unguided[2] == 15 * groups
    assert not torch.equal(some, exact)
    real = type(model).predict

    def whole(self: Any, *given: Any) -> Any:
        """The conditional branch cut out of a pass of both."""
        out = real(self, *given)
        if isinstance(out, Flow):
            return Flow(lambda x, t: out.pair(x, t)[0], out.dim, out.pair)
        return Diffusion(lambda x, t: out.pair(x, t)[0], out.dim, out.pair)

    monkeypatch.setattr(type(model), "predict", whole)
    torch.testing.assert_close(draw(guidance_every=2)[0], some, rtol=0, atol=1e-3 * float(some.abs().max()))


def test_the_setting_is_checked_and_saved(tmp_path: Path) -> None:
    for wrong in (0, -1, 1.5, True, "2"):
        with pytest.raises(ValueError, match="guidance_every must be a whole number from 1"):
            ContinuousSampler(guidance_every=wrong)  # type: ignore[arg-type]
        with pytest.raises(ValueError, match="guidance_every must be a whole number from 1"):
            EveryKth(both, COND, wrong)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="solver must be one of euler, heun, euler-jump, sde, ancestral, ddim; got 'r"):
        ContinuousSampler(solver="rk4")
    ContinuousSampler(guidance_every=3).save_pretrained(tmp_path)
    assert ContinuousSampler.from_pretrained(tmp_path).settings()["guidance_every"] == 3


def test_the_command_has_the_settings_of_samplers_of_latents(tmp_path: Path) -> None:
    model, tokenizer = parts("flowar_s")
    assemble(model, tokenizer, {"head_steps": 2, "guidance_scale": 2.0}).save_pretrained(tmp_path / "model")

    def sample(*words: str, folder: Path | str = tmp_path / "model") -> Any:
        given = ["sample", str(folder), "--class", "1", "--num", "1", "--out", str(tmp_path / "a.png"), *words]
        return CliRunner().invoke(app, given)

    flags = {
        "--solver": ("heun", "heun"),
        "--guidance-times": ("0,0.9", [0.0, 0.9]),
        "--guidance-interval": ("0,5", [0, 5]),
        "--guidance-every": ("2", 2),
        "--head-steps": ("4", 4),
        "--head-steps-last": ("2", 2),
        "--guidance-schedule": ("power-cosine", "power-cosine"),
        "--guidance-power": ("0.5", 0.5),
    }
    result = sample("--json", *[word for flag, (text, _) in flags.items() for word in (flag, text)])
    assert result.exit_code == 0, result.output
    told = json.loads(result.stdout)["settings"]
    for flag, (_, value) in flags.items():
        assert told[flag[2:].replace("-", "_")] == value
    for words, message in (
        (["--solver", "rk4"], "solver must be one of"),
        (["--guidance-times", "0.9,0.1"], "times of guidance are the lowest and the highest"),
        (["--guidance-times", "soon"], "--guidance-times 'soon' must be numbers"),
        (["--guidance-interval", "3"], "guidance_interval must be the first and the last"),
        (["--head-steps", "4,2", "--head-steps-last", "3"], "leave --head-steps-last 3 out"),
        (["--top-k", "3"], "ContinuousSampler has no setting top_k; it has"),
    ):
        result = sample(*words)
        assert result.exit_code == 2 and message in result.stderr and result.stderr.count("\n") == 1, result.output
    result = sample("--solver", "euler", folder="fashion-var")
    assert result.exit_code == 2 and "NextGroupSampler has no setting solver; it has" in result.stderr
    again = AutoPipeline.from_pretrained(tmp_path / "model")
    assert again([1], seed=0, guidance_every=2, head_steps=4).stats["null_calls"] > 0
