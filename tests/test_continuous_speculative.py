"""Continuous speculative decoding: laws of one verification, and what the sampler keeps of plain MAR."""

from __future__ import annotations

import importlib.util
import json
import re
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
import typer
from torch import Tensor
from typer.testing import CliRunner

from tests.test_mar import small, vae
from varkit import AutoPipeline, ClassToImagePipeline, Rng
from varkit.cli import app
from varkit.generators.mar import MAR
from varkit.interfaces import Cond
from varkit.samplers.continuous import ContinuousSampler
from varkit.samplers.continuous_speculative import (
    ContinuousSpeculativeSampler,
    LastStep,
    SpeculativeStep,
    acceptance_ratio,
    residual_weight,
    speculate,
)

COUNT = 40000


def run(
    model: MAR, draft: Any, batch: int = 3, known: Any = None, **settings: Any
) -> tuple[Any, list[SpeculativeStep]]:
    steps: list[SpeculativeStep] = []
    cond, null = Cond(torch.arange(batch) % 3), Cond(torch.full((batch,), 3))
    out = ContinuousSpeculativeSampler(**{"head_steps": 3, "num_steps": 8, **settings}).generate(
        vae(model.config.patch_size),
        model,
        cond,
        Rng.from_seed(0, batch),
        null=null,
        known=known,
        on_step=steps.append,
        draft=draft,
    )
    return out, steps


def plain(model: MAR, batch: int = 3, known: Any = None, **settings: Any) -> Tensor:
    cond, null = Cond(torch.arange(batch) % 3), Cond(torch.full((batch,), 3))
    sampler = ContinuousSampler(**{"head_steps": 3, "num_steps": 8, **settings})
    patch = model.config.patch_size
    return sampler.generate(vae(patch), model, cond, Rng.from_seed(0, batch), null=null, known=known).tokens


def worse(model: MAR, amount: float) -> MAR:
    """A copy with noise on its weights."""
    other = small(model.config.patch_size)
    torch.manual_seed(9)
    with torch.no_grad():
        for parameter, own in zip(other.parameters(), model.parameters(), strict=True):
            parameter.copy_(own + amount * torch.randn_like(own))
    return other


# ---- one verification -------------------------------------------------------------------------------------------


def normal(mean: float, std: float, log_std_sum: float = 0.0) -> LastStep:
    return LastStep(*(torch.full((COUNT, 1), value) for value in (mean, std, log_std_sum)))


def numbers(seed: int) -> Any:
    rng, every = Rng.from_seed(seed, 1), torch.arange(COUNT)

    def of_round(k: int) -> tuple[Tensor, Tensor]:
        return rng.normal(every, 1, step=k, count=1)[0], rng.uniform(every, 2, step=k)[0]

    return of_round


def distance(sample: Tensor, density: Tensor, grid: Tensor) -> float:
    """Kolmogorov's: the largest gap between the sample's and the law's distribution function."""
    law = (density.cumsum(0) / density.sum()).double()
    ours = torch.searchsorted(sample.double().sort().values, grid) / len(sample)
    return float((ours - law).abs().max())


CRITICAL = 1.95 / COUNT**0.5 + 1e-3  # significance 1e-3, and the grid's own width
GRID = torch.linspace(-8, 8, 20001, dtype=torch.float64)


def density(step: LastStep) -> Tensor:
    one = LastStep(*(part[:1].double() for part in step))
    return one.log_density(GRID[:, None]).exp()


@pytest.mark.parametrize("factor", [0.0, 0.4, -0.3])
def test_rejected_drafts_are_replaced_by_the_residual_law(factor: float) -> None:
    """max(0, S p - q), normalised, with S the factor of the steps before."""
    draft, target = normal(0.0, 1.0, factor), normal(0.7, 0.8)
    never = torch.full((COUNT,), torch.inf)
    x = torch.zeros(COUNT, 1)
    tokens, accepted, _, _ = speculate(x, draft, target, never, numbers(1), x + 99, max_rounds=300)
    assert not accepted.any() and (tokens < 50).all()
    wanted = (torch.tensor(factor).double().exp() * density(target) - density(draft)).clamp_min(0)
    assert distance(tokens[:, 0], wanted, GRID) < CRITICAL
    assert distance(tokens[:, 0], density(target), GRID) > 3 * CRITICAL  # the test can tell


def test_drafts_of_the_draft_law_become_the_target_law() -> None:
    draft, target = normal(0.0, 1.0), normal(0.7, 0.8)
    rng, every = Rng.from_seed(5, 1), torch.arange(COUNT)
    x = rng.normal(every, 3, count=1)[0]
    uniform = rng.uniform(every, 4)[0]
    tokens, accepted, ratio, _ = speculate(x, draft, target, uniform, numbers(2), x + 99, max_rounds=300)
    assert torch.equal(tokens[accepted], x[accepted])
    assert distance(tokens[:, 0], density(target), GRID) < CRITICAL
    overlap = float(torch.minimum(density(target), density(draft)).sum() * (GRID[1] - GRID[0]))
    assert float(accepted.float().mean()) == pytest.approx(overlap, abs=0.01)
    torch.testing.assert_close(ratio.log(), target.log_density(x) - draft.log_density(x), atol=1e-5, rtol=1e-4)


def test_where_nothing_is_kept_the_targets_own_token_stands() -> None:
    same = normal(0.2, 0.5)
    never, own = torch.full((COUNT,), torch.inf), torch.full((COUNT, 1), 7.0)
    tokens, _, ratio, rounds = speculate(own * 0, same, same, never, numbers(3), own, max_rounds=4)
    assert rounds == 4 and torch.equal(tokens, own) and torch.equal(ratio, torch.ones(COUNT))
    released = speculate(own * 0, same, same, never, numbers(3), own, max_rounds=4, official_quirks=True)
    assert not released[0].any()


def test_the_released_factor_is_the_reciprocal() -> None:
    draft, target, x = normal(0, 1, 0.3), normal(0.1, 1), torch.zeros(COUNT, 1)
    ours, released = (acceptance_ratio(x, draft, target, official_quirks=q)[0] for q in (False, True))
    assert float(ours / released) == pytest.approx(torch.tensor(0.6).exp().item(), rel=1e-4)
    far = torch.full((COUNT, 1), 40.0)  # densities vanish: the release keeps nothing, the logs still tell
    assert (residual_weight(far, normal(-1, 1), target) == 1).all()
    assert not (residual_weight(far, normal(-1, 1), target, True) > 0).any()


# ---- the sampler ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("patch", [1, 2])
@pytest.mark.parametrize("guidance", [1.0, 3.0])
def test_a_draft_like_the_target_is_accepted_and_gives_plain_mar(patch: int, guidance: float) -> None:
    model = small(patch)
    settings = {"guidance_scale": guidance}
    out, _ = run(model, model, num_draft=1, prefill=0.0, **settings)
    torch.testing.assert_close(out.tokens, plain(model, **settings), atol=1e-5, rtol=1e-4)
    assert out.accepted == out.drafted and out.drafted[0] == 15  # of 16 tokens, one was the target's own
    assert run(model, model, num_draft=4, prefill=0.0, **settings)[0].target_calls == 3  # 0, 4 and 7
    assert (out.target_calls, out.draft_calls) == (8, 7)


def test_the_target_alone_where_all_is_filled_before() -> None:
    model = small()
    out, steps = run(model, worse(model, 1.0), prefill=1.0)
    assert torch.equal(out.tokens, plain(model)) and out.draft_calls == 0 and out.drafted == [0, 0, 0]
    assert not any(info.verified for info in steps)


@pytest.mark.parametrize("quirks", [False, True])
def test_calls_blocks_and_tokens_are_counted(quirks: bool) -> None:
    model = small()
    out, steps = run(model, worse(model, 0.02), num_draft=3, prefill=0.25, official_quirks=quirks)
    checks = [(info.step, info.verified) for info in steps if info.verified is not None]
    assert [step for step, _ in checks] == [3, 6, 7]  # iterations 0, 1, 2 are the target's
    assert (out.target_calls, out.draft_calls, out.network_calls) == (6, 5, 6)
    own = sum(info.positions.shape[1] for info in steps[:3])
    assert out.drafted == [16 - own] * 3
    assert torch.tensor(out.accepted).equal(sum(check.accepted.sum(1) for _, check in checks))
    for _, check in checks:
        at = check.positions
        assert (at.diff(dim=1) > 0).all()
        assert torch.equal(check.tokens[check.accepted], check.draft[check.accepted])
        found = out.tokens.gather(1, at[..., None].expand(-1, -1, 4))
        assert torch.equal(found, check.tokens)  # what was verified is what comes out


def test_acceptance_falls_as_the_draft_gets_worse() -> None:
    model = small()
    shares = []
    for amount in (0.0, 3e-5, 1e-4, 1e-3):  # the steps near the data: those far from it magnify any difference
        out, _ = run(model, worse(model, amount), batch=8, num_draft=1, prefill=0.0, head_steps="20,0")
        shares.append(sum(out.accepted) / sum(out.drafted))
        assert out.tokens.isfinite().all()
    assert shares[0] == 1 and all(a > b for a, b in pairwise(shares)), shares


def test_an_image_is_the_same_in_any_batch() -> None:
    model = small()
    draft = worse(model, 0.1)
    alone, _ = run(model, draft, batch=1, num_draft=3, guidance_scale=2.0)
    many, _ = run(model, draft, batch=5, num_draft=3, guidance_scale=2.0)
    torch.testing.assert_close(many.tokens[:1], alone.tokens, atol=1e-5, rtol=1e-4)
    assert many.accepted[0] == alone.accepted[0]


@pytest.mark.parametrize("patch", [1, 2])
def test_known_tokens_stay(patch: int) -> None:
    model = small(patch)
    given = torch.full((3, model.layout.length, 4), 5.0)
    keep = torch.zeros(3, model.layout.length, dtype=torch.bool)
    keep[:, model.positions[:6].flatten()] = True
    out, _ = run(model, worse(model, 0.1), known=(given, keep), num_draft=2, num_steps=5)
    assert torch.equal(out.tokens[keep], given[keep]) and not torch.equal(out.tokens[~keep], given[~keep])
    assert all(0 < n <= 10 for n in out.drafted)


def test_a_pipeline_draws_with_a_draft_and_opens_again(tmp_path: Path) -> None:
    model = small()
    pipe: Any = ClassToImagePipeline(model, vae(), ContinuousSpeculativeSampler(num_draft=2, num_steps=4, head_steps=3))
    pipe.set_progress_bar_config(disable=True)
    call: dict[str, Any] = {"class_labels": [0, 1], "seed": 0, "output_type": "pt"}
    with pytest.raises(ValueError, match="needs a second, smaller MAR: draft="):
        pipe(**call)
    out = pipe(**call, draft=worse(model, 0.1))
    assert out.images.isfinite().all() and sum(out.stats["drafted"]) > 0
    pipe.save_pretrained(tmp_path)
    again = AutoPipeline.from_pretrained(tmp_path)
    again.set_progress_bar_config(disable=True)
    assert type(again.sampler) is ContinuousSpeculativeSampler and again.sampler.config.num_draft == 2
    again.sampler.draft_model = worse(model, 0.1)
    torch.testing.assert_close(again(**call).images, out.images, atol=1e-5, rtol=1e-4)


def test_refusals() -> None:
    model = small()
    for draft, message in (
        (None, "needs a second"),
        (torch.nn.Linear(1, 1), "the draft is a Linear: draw with its own sampler"),
        (small(grid=(2, 2), num_steps=2), "do not fit together"),
        (small(num_classes=5), "3 and 5 classes"),
    ):
        with pytest.raises(ValueError, match=message):
            run(model, draft)
    for settings, message in (
        ({"num_draft": 0}, "num_draft must be at least 1; got 0"),
        ({"prefill": 1.5}, "prefill is a share"),
        ({"inner_temperature": 0}, "inner_temperature must be > 0"),
        ({"head_steps_last": 5}, "must take the same steps of a token"),
    ):
        with pytest.raises(ValueError, match=message):
            ContinuousSpeculativeSampler(**settings)


# ---- by name ------------------------------------------------------------------------------------------------------


def saved(folder: Path, draft: MAR | None = None, labels: dict[str, str] | None = None, seed: int = 1) -> str:
    """A pipeline of a tiny MAR; those of the same seed share their tokenizer."""
    tokenizer = vae()
    with torch.no_grad():
        for parameter in tokenizer.parameters():
            parameter.add_(0.01 * (seed - 1))
    sampler = ContinuousSampler(head_steps=3, num_steps=8, guidance_scale=2.0)
    ClassToImagePipeline(draft or small(), tokenizer, sampler, id2label=labels).save_pretrained(folder)
    return str(folder)


def test_the_commands_take_a_draft(tmp_path: Path) -> None:
    large, little = saved(tmp_path / "large"), saved(tmp_path / "small", worse(small(), 0.02))
    chosen = ["--sampler", "cspd:num_draft=3,prefill=0.25", "--draft", little, "--device", "cpu"]
    out = ["--num", "2", "--json", "--out", str(tmp_path / "a.png")]
    done = CliRunner().invoke(app, ["sample", large, *chosen, *out])
    assert done.exit_code == 0, done.output
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["tokens_per_call"] == pytest.approx(16 / 6) and found["law"] == "not lossless"
    assert found["settings"]["sampler"].endswith(f",model={little}") and found["settings"]["num_draft"] == 3
    again = AutoPipeline.from_pretrained(large)
    again.set_progress_bar_config(disable=True)
    images = again([0, 1], rng=Rng.from_seed(0, 2), sampler=f"cspd:num_draft=3,prefill=0.25,model={little}").stats
    assert sum(images["drafted"]) == found["drafted"] and sum(images["accepted"]) == found["accepted"]
    assert type(again.sampler) is ContinuousSampler
    done = CliRunner().invoke(app, ["bench", large, *chosen, "--batches", "2", "--repeats", "1", "--json"])
    assert done.exit_code == 0, done.output
    plain_row, row = json.loads(done.stdout.splitlines()[-1])["rows"]
    assert (plain_row["network_calls"], row["target_calls"], row["lossless"]) == (8, 6, False)
    assert row["tokens_per_call"] == pytest.approx(16 / 6) and 0 <= row["acceptance"] <= 1


def test_a_saved_sampler_opens_its_draft_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    large, little = saved(tmp_path / "large"), saved(tmp_path / "small", worse(small(), 0.02))
    pipe = AutoPipeline.from_pretrained(large)
    pipe.set_progress_bar_config(disable=True)
    pipe.register_modules(sampler=ContinuousSpeculativeSampler(model=little, head_steps=2, num_steps=4))
    pipe.save_pretrained(tmp_path / "both")
    again = AutoPipeline.from_pretrained(tmp_path / "both")
    again.set_progress_bar_config(disable=True)
    assert again([0], seed=0, output_type="latent").stats["draft_calls"] > 0
    plainly = again.choose_sampler("plain", 1)
    assert type(plainly) is ContinuousSampler and plainly.config.num_steps == 4
    monkeypatch.setattr("varkit.pipelines.base.open_transformer", None)
    again([0], seed=0, sampler=f"cspd:model={little}", output_type="latent")


def test_drafts_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    named = {"0": "a", "1": "b", "2": "c"}
    large = saved(tmp_path / "large", labels=named)
    others = {
        "tokens of another tokenizer": saved(tmp_path / "tokens", seed=2),
        "other classes than this model": saved(tmp_path / "names", labels={**named, "2": "d"}),
        "same patches and classes": saved(tmp_path / "classes", small(num_classes=4)),
    }
    pipe = AutoPipeline.from_pretrained(large)
    for message, folder in others.items():
        with pytest.raises(ValueError, match=message):
            pipe.choose_sampler(f"cspd:model={folder}", 1)
    with pytest.raises(ValueError, match=r"second, smaller MAR.*--draft"):
        pipe.choose_sampler("cspd", 1)
    with pytest.raises(ValueError, match="has no option drafts"):
        pipe.choose_sampler("cspd:drafts=3", 1)
    for args, message in (
        ([large, "--draft", large], "a draft model is asked by"),
        (["fashion-var", "--sampler", "cspd", "--draft", large], "the transformer is a VAR"),
        ([large, "--sampler", "cspd", "--draft", "fashion-llamagen"], "other classes"),
    ):
        done = CliRunner().invoke(app, ["sample", *args, "--device", "cpu", "--out", str(tmp_path / "a.png")])
        assert done.exit_code == 2 and re.search(message, done.stderr), done.output


def test_the_benchmark_compares_in_one_run(tmp_path: Path) -> None:
    file = Path(__file__).parents[1] / "benchmarks" / "cspd.py"
    spec: Any = importlib.util.spec_from_file_location("cspd_benchmark", file)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    command = typer.Typer()
    command.command()(module.main)
    sizes = ["--width", "64", "--depth", "1", "--draft-width", "64", "--draft-depth", "1", "--grid", "4"]
    trained = ["--target", saved(tmp_path / "large"), "--draft", saved(tmp_path / "small", worse(small(), 0.02))]
    more = ["--steps", "8", "--head-steps", "2", "--num-draft", "3", "--prefill", "0.25"]
    done = CliRunner().invoke(command, [*sizes, *more])
    assert done.exit_code == 0 and "plain MAR, 6 iterations" in done.stdout and "random weights" in done.stdout
    done = CliRunner().invoke(command, [*trained, *more, "--json"])
    assert done.exit_code == 0, done.output
    rows = json.loads(done.stdout)
    assert [r["target_calls"] for r in rows] == [8, 6, 6] and [r["draft_calls"] for r in rows] == [0, 5, 0]
    assert rows[0]["speed"] == 1 and rows[1]["acceptance"] is not None
    assert CliRunner().invoke(command, trained[:2]).exit_code == 2
