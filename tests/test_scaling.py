"""Scaling studies: the fit, the frontier, and a sweep whose members are skipped, resumed and trained in any order."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from varkit.config import ConfigError
from varkit.pipelines.auto import create_pipeline
from varkit.training.codes import CodeMemory
from varkit.training.scaling import Point, fit_power_law, frontier
from varkit.training.sweep import POINTS, forward_flops, load_sweep, run_sweep, shipped_sweeps

SLICE = Path(__file__).parent / "data" / "fashion_slice.npz"


@pytest.mark.parametrize(("alpha", "beta"), [(-0.05, 3e-12), (-0.3, 2.0), (0.5, 40.0)])
def test_a_power_law_is_found_again(alpha: float, beta: float) -> None:
    x = [0.01, 0.05, 0.3, 2.0, 7.0]
    found, log10_beta, error, pearson = fit_power_law(x, [(beta * v) ** alpha for v in x])
    assert found == pytest.approx(alpha) and 10**log10_beta == pytest.approx(beta, rel=1e-6)
    assert error == pytest.approx(0, abs=1e-8) and abs(pearson) == pytest.approx(1)


@pytest.mark.parametrize("y", [[1.0, 2.0], [1.0, 0.0, 2.0], [1.0, float("nan"), 2.0], [1.0, 1.0, 1.0]])
def test_what_is_no_power_law_is_refused(y: list[float]) -> None:
    with pytest.raises(ValueError):
        fit_power_law([1.0, 2.0, 3.0][: len(y)], y)


def test_the_frontier_holds_what_nothing_beats_for_less() -> None:
    generator = torch.Generator().manual_seed(1)
    values = torch.rand(60, 2, generator=generator).tolist()
    points = [Point("m", 1, i, i, c, False, y, y, y, y) for i, (c, y) in enumerate(values)]
    best = frontier(points, "loss")
    for p in points:
        beaten = any(q.compute <= p.compute and q.loss < p.loss for q in points)
        assert (p in best) == (not beaten)
    assert best == sorted(best, key=lambda p: p.compute)


def test_codes_are_those_of_the_tokenizer_and_made_once() -> None:
    seen: list[int] = []

    def encode(images: torch.Tensor) -> torch.Tensor:
        seen.extend(images[:, 0, 0, 0].long().tolist())
        return images[:, 0, 0, :2].long()

    memory = CodeMemory(6, 2)
    images = torch.arange(6.0)[:, None, None, None].expand(6, 3, 2, 2)
    for index in ([0, 3], [3, 5, 0], [5]):
        tokens = memory.tokens({"images": images[index], "index": torch.tensor(index)}, encode)
        assert tokens.tolist() == [[i, i] for i in index]
    assert seen == [0, 3, 5]


@pytest.mark.parametrize("name", shipped_sweeps())
def test_every_member_of_a_shipped_sweep_is_a_recipe(name: str) -> None:
    sweep = load_sweep(name)
    assert len({str(sweep.member(m).folder) for m in sweep.members}) == len(sweep.members) >= 3


@pytest.fixture(name="ladder")
def _ladder(tmp_path: Path) -> tuple[str, list[str]]:
    values: dict[str, Any] = {
        "recipe": "fashion_var",
        "common": ["objective.tokenizer=fashion-var", "loop.ema_decay=0", "loop.sample_every=0"],
        "members": {f"d{d}": [f"objective.model_overrides={{depth: {d}, hidden_size: 16}}"] for d in (1, 2, 3)},
    }
    for name in values["members"]:
        values["members"][name].append("objective.model_overrides.num_heads=1")
    (tmp_path / "ladder.yaml").write_text(yaml.safe_dump(values))
    data = [f"data.train={SLICE}", f"data.validation={SLICE}", "data.validation_split=train"]
    loop = ["loop.steps=4", "loop.batch_size=2", "loop.validate_every=1", "loop.validate_images=4", "loop.save_every=1"]
    return str(tmp_path / "ladder.yaml"), [*data, *loop, "optim.warmup_steps=1", f"out={tmp_path / 'out'}"]


def test_a_sweep_in_any_order_skips_what_is_finished_and_goes_on_with_what_was_killed(
    ladder: tuple[str, list[str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sweep = load_sweep(*ladder)
    first = run_sweep(sweep, ["d2"])
    assert (first.finished, first.waiting, first.fits) == (["d2"], ["d1", "d3"], [])
    untouched = (tmp_path / "out/d2" / POINTS).stat().st_mtime_ns
    from varkit.training.loop import Trainer

    whole = Trainer.step

    def dies(self: Trainer, step: int, micros: Any) -> Any:
        if step == 2:
            raise KeyboardInterrupt
        return whole(self, step, micros)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Trainer, "step", dies)
        run_sweep(sweep, ["d3"])
    steps: list[int] = []
    monkeypatch.setattr(Trainer, "step", lambda self, step, micros: (steps.append(step), whole(self, step, micros))[1])
    result = run_sweep(sweep, ["d3", "d1", "d2"])
    assert steps == [2, 3, 0, 1, 2, 3]  # d3 goes on where it was saved, d1 is new, d2 is left alone
    assert (tmp_path / "out/d2" / POINTS).stat().st_mtime_ns == untouched
    assert result.finished == ["d1", "d2", "d3"] and not result.waiting and not result.stopped
    assert [p.step for p in result.points if p.member == "d3"] == [1, 2, 3, 4]
    assert {p.member for p in result.points if p.final} == {"d1", "d2", "d3"}
    data = json.loads((tmp_path / "out/scaling.json").read_text())
    assert len(data["points"]) == 12 and len(data["fits"]) == len(result.fits) > 0
    assert {p.name for p in result.files} == {f"scaling.{s}" for s in ("json", "csv", "png", "svg")}
    with pytest.raises(ConfigError, match=r"loop\.steps was 4, is 5"):
        run_sweep(load_sweep(ladder[0], [*ladder[1], "loop.steps=5"]), [])


def test_a_sweep_names_what_it_does_not_know(ladder: tuple[str, list[str]]) -> None:
    with pytest.raises(ConfigError, match="did you mean 'fashion_ladder'"):
        load_sweep("fashion_lader")
    with pytest.raises(ConfigError, match="no member 'd9'"):
        run_sweep(load_sweep(*ladder), ["d9"])
    with pytest.raises(ConfigError, match="validation"):
        load_sweep(ladder[0], [*ladder[1], "data.validation=null"])


def test_operations_are_those_of_the_matrix_products() -> None:
    from varkit.training.objectives import build_objective, objective_config

    model = {"depth": 2, "hidden_size": 16, "num_heads": 2}
    values = {"name": "next-scale", "model": "var_fashion", "tokenizer": "fashion-var", "model_overrides": model}
    objective = build_objective(objective_config(values), [str(i) for i in range(10)])
    images = torch.zeros(1, 3, *objective.image_size)
    zero = torch.zeros(1, dtype=torch.int64)
    found = forward_flops(objective, {"images": images, "labels": zero, "index": zero, "keys": zero})
    tokens, width, codes = objective.trained("main").layout.length, 16, 512  # type: ignore[union-attr]
    blocks = 2 * (2 * tokens * 12 * width**2 + 4 * tokens**2 * width)  # linear layers, then scores and weighted values
    rest = 2 * (tokens - 1) * 16 * width + 2 * tokens * width * codes + 2 * width * (6 + 2) * width
    assert found == blocks + rest
    assert create_pipeline("var_fashion", **model).transformer.layout.length == tokens
