"""The script of the grid: equal parameters, a table titled with its budget, and what it says of pairs that fail."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import typer

from varkit.pipelines.auto import open_tokenizer
from varkit.registry import create_model
from varkit.training.objectives import build_objective, objective_config

FILE = Path(__file__).parents[1] / "benchmarks" / "entity_grid.py"
SPEC = importlib.util.spec_from_file_location("entity_grid", FILE)
assert SPEC is not None and SPEC.loader is not None
grid: Any = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(grid)


@pytest.fixture(name="tokenizers", scope="module")
def _tokenizers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("vae")
    torch.manual_seed(0)
    create_model("kl_vae_fashion").save_pretrained(folder)
    return {"latents": str(folder), "ids": "fashion-llamagen", "scales": "fashion-var"}


@pytest.mark.parametrize("name", grid.names())
def test_every_pair_can_be_trained_and_has_as_many_parameters(name: str, tokenizers: dict[str, str]) -> None:
    kind = "latents" if not name.endswith("categorical") else "scales" if name.startswith("scale") else "ids"
    overrides = grid.overrides_of(name, open_tokenizer(tokenizers[kind]))
    objective = {
        "name": "next-entity",
        "model": "entity_fashion",
        "tokenizer": tokenizers[kind],
        "model_overrides": overrides,
        "sampling": grid.sampling_of(name),
    }
    training = build_objective(objective_config(objective), [str(i) for i in range(10)])
    count = sum(p.numel() for p in training.trained("main").parameters())
    wanted = grid.parameters(**grid.SIZES, **grid.ENTITIES["cell"])
    assert abs(count / wanted - 1) < 0.07  # whole blocks come no nearer


def result(fd: float, accuracy: float, **changes: Any) -> dict[str, Any]:
    scores = [{"frechet": fd, "accuracy": accuracy}, {"frechet": fd / 2, "accuracy": accuracy}]
    facts = {"steps": 1000, "batch": 32, "num": 1000, "protocol": "fashion", "title": "FD(classifier)"}
    return {**facts, "parameters": 550_000, "validation_loss": 1.0, "scores": scores, **changes}


def row(name: str, *runs: dict[str, Any]) -> dict[str, Any]:
    return {"name": name, "runs": list(runs), "backbone": 4, "head": 100, "ms_alone": 50.0, "ms": 5.0}


def test_the_table_says_its_budget_its_spread_and_what_failed() -> None:
    rows = [
        row("cell-flow", result(1.0, 0.8), result(2.0, 0.7)),
        row("image-categorical", result(9.0, 0.1), result(9.0, 0.5)),
        row("token-flow", result(1.0, 0.8, validation_loss=float("nan")), result(1.0, 0.8)),
    ]
    text = grid.markdown(rows, batch=32, threads=1)
    assert "1,000 steps of 32 images" in text and "0.55 to 0.55 M parameters" in text
    assert "| cell | flow | 1.50 (1.00 to 2.00) | 0.75 (0.50 to 1.00) | 75.0 (70.0 to 80.0) % | 4 + 100 |" in text
    failed = next(line for line in text.splitlines() if line.startswith("Did not train"))
    assert "image-categorical" in failed and "token-flow" in failed and "cell-flow" not in failed
    assert "scale-diffusion" in next(line for line in text.splitlines() if line.startswith("Not run"))


def test_runs_of_several_budgets_are_no_table() -> None:
    with pytest.raises(typer.BadParameter, match="several budgets"):
        grid.markdown([row("cell-flow", result(1.0, 0.8), result(1.0, 0.8, steps=500))], batch=1, threads=1)


def test_an_unknown_pair_and_an_empty_folder_are_refused(tmp_path: Path) -> None:
    with pytest.raises(typer.BadParameter, match="word-flow"):
        grid.train(only=["word-flow"], out=tmp_path)
    with pytest.raises(typer.BadParameter, match="no finished pair"):
        grid.table(out=tmp_path)


def test_finished_runs_are_read_and_not_trained_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "cell-flow-0" / "model").mkdir(parents=True)
    (tmp_path / "cell-flow-0" / "result.json").write_text(json.dumps(result(1.0, 0.8)))
    monkeypatch.setattr(grid, "train_one", lambda *_: pytest.fail("it was finished"))
    grid.train(only=["cell-flow"], seeds="0", out=tmp_path)
    monkeypatch.setattr(grid, "cost", lambda *_: {"backbone": 4, "head": 100, "ms_alone": 50.0, "ms": 5.0})
    grid.table(out=tmp_path)
    assert "| cell | flow |" in (tmp_path / "table.md").read_text()
