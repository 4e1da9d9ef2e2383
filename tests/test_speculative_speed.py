"""The arithmetic of `benchmarks/speculative.py`, at tiny size."""

from __future__ import annotations

import json
import runpy
from pathlib import Path
from typing import Any

import pytest
import torch
import typer
from typer.testing import CliRunner

from varkit.samplers.speculative.verifiers.laws import block_efficiency

MODULE = runpy.run_path(str(Path(__file__).parents[1] / "benchmarks" / "speculative.py"))


def bench(*arguments: str) -> Any:
    app = typer.Typer()
    app.command()(MODULE["main"])
    return CliRunner().invoke(app, ["--tiny", "--repeats", "1", "--rounds", "2", *arguments])


@pytest.mark.parametrize("drafts", [1, 7, 31])
def test_the_needed_rate_brings_what_is_needed(drafts: int) -> None:
    for tokens in (1.01, 1.5, drafts + 0.9):
        rate = torch.tensor(MODULE["needed_rate"](tokens, drafts), dtype=torch.float64)
        assert float(block_efficiency(rate, torch.tensor(drafts))) == pytest.approx(tokens, rel=1e-6)
    assert MODULE["needed_rate"](0.9, drafts) == 0 and MODULE["needed_rate"](1.0, drafts) == 0
    assert MODULE["needed_rate"](drafts + 1.1, drafts) is None
    assert MODULE["needed_rate"](2.0, 1) == pytest.approx(1)


def test_rows_are_beside_the_plain_call_of_their_batch() -> None:
    done = bench("--batches", "1,2", "--json")
    assert done.exit_code == 0, done.output
    rows = json.loads(done.stdout.splitlines()[-1])
    llama, var = [r for r in rows if "scale" not in r["what"]], [r for r in rows if "scale" in r["what"]]
    assert len(llama) == 2 * (1 + 6 + 3 + 9) and var and var[0]["ratio"] == 1 and var[0]["what"].endswith(" 1")
    for row in llama:
        plain = next(r for r in llama if r["batch"] == row["batch"])
        assert plain["what"] == "plain: one token" and row["ratio"] == pytest.approx(row["ms"] / plain["ms"])
        if "drafter" in row:
            assert row["target"] + row["drafter"] + row["verifier"] < row["ms"]
    assert max(row.get("levels", 0) for row in llama) >= 1  # a tiny image may end in the first round
    assert [r["drafts"] for r in llama if r["batch"] == 2 and "drafts" in r] == [0, 1, 3, 7, 15, 31]


def test_one_table_is_printed() -> None:
    done = bench("--quick", "--no-var", "--no-guidance", "--threads", str(torch.get_num_threads()))
    assert done.exit_code == 0, done.output
    table = [line for line in done.stdout.splitlines() if line.startswith("|")]
    assert len({line.count("|") for line in table}) == 1 and "plain: one token | 1 |" in table[2]
    assert sum("recycling, lantern" in line for line in table) == 1 and "one branch" in done.stdout
    rows = [{"what": "window of 2", "batch": 1, "ms": 30.0, "ratio": 1.5, "drafts": 1}]
    rows.append({"what": "window of 2", "batch": 4, "ms": 30.0, "ratio": 2.5, "drafts": 1})
    rows.append({"what": "x", "batch": 1, "ms": 3, "ratio": 2, "drafter": 1, "verifier": 0.5, "target": 2, "levels": 1})
    text = MODULE["markdown"](rows)
    assert "| 1.50 |  |  |  | 50% |" in text and "never" in text and "| 50% | 25% | 1.0 |" in text


@pytest.mark.parametrize(
    ("arguments", "told"), [(["--model", "var_d16"], "one token a step"), (["--dtype", "int8"], "float32")]
)
def test_it_refuses(arguments: list[str], told: str) -> None:
    done = bench(*arguments)
    assert done.exit_code == 2 and told in " ".join(done.output.replace("│", " ").split())
