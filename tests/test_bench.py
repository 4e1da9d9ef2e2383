"""`varkit bench`: rows beside plain decoding, counts and scores, and what it refuses."""

from __future__ import annotations

import json

import pytest
from typer.testing import CliRunner

from tests.test_training import SLICE
from varkit.cli import app


def run(*args: str) -> list[dict[str, object]]:
    done = CliRunner().invoke(app, ["bench", *args, "--json", "--device", "cpu", "--repeats", "1"])
    assert done.exit_code == 0, done.output
    rows: list[dict[str, object]] = json.loads(done.stdout.splitlines()[-1])["rows"]
    return rows


def test_samplers_are_timed_and_counted_beside_plain_decoding() -> None:
    rows = run("fashion-llamagen", "--sampler", "sjd", "--sampler", "jacobi+bounded:tv_bound=0.2", "--batches", "1,2")
    assert [(r["sampler"], r["batch"]) for r in rows] == [
        (name, size) for name in ("plain", "sjd", "jacobi+bounded:tv_bound=0.2") for size in (1, 2)
    ]
    plain, _, sjd, *_, relaxed = rows
    assert plain["speedup"] == 1 and plain["network_calls"] == 64 and "drafted" not in plain
    assert sjd["tokens_per_call"] * sjd["target_calls"] == pytest.approx(64, rel=0.01)  # type: ignore[operator]
    assert sjd["speedup"] == pytest.approx(plain["ms_per_image"] / sjd["ms_per_image"])  # type: ignore[operator]
    assert 0 < sjd["acceptance"] < 1 and sjd["lossless"] and not relaxed["lossless"]  # type: ignore[operator]


def test_images_are_scored_by_a_protocol() -> None:
    rows = run("fashion-var", "--reference", str(SLICE), "--num", "40", "--batches", "1")
    assert [s["title"] for s in rows[0]["scores"]] == ["FD(classifier)", "accuracy"]  # type: ignore[attr-defined]
    done = CliRunner().invoke(
        app, ["bench", "fashion-var", "--repeats", "1", "--batches", "1", "--reference", str(SLICE), "--num", "40"]
    )
    assert done.exit_code == 0 and "FD(classifier)" in done.output and "40 images" in done.output


def test_several_samplers_are_scored_in_one_table() -> None:
    names = ["jacobi+lantern:k=8,tv_bound=0.1", "gsd:window=4"]
    args = ["bench", "fashion-llamagen", "--repeats", "1", "--batches", "1", "--device", "cpu", "--markdown"]
    args += ["--reference", str(SLICE), "--num", "4", *(x for name in names for x in ("--sampler", name))]
    done = CliRunner().invoke(app, args)
    assert done.exit_code == 0, done.output
    head, line, *rows = [text for text in done.stdout.splitlines() if text.startswith("|")]
    assert "FD(classifier)" in head and set(line) <= set("|- ")
    assert [row.split(" | ")[0].strip("| ") for row in rows] == ["plain", *names]
    assert len({row.count("|") for row in (head, line, *rows)}) == 1


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["fashion-llamagen", "--sampler", "sjb"], "no sampler is called 'sjb'"),
        (["fashion-var", "--sampler", "sjd"], "one token a step"),
        (["fashion-llamagen", "--batches", "0,1"], "numbers from 1"),
        (["var_d16", "--reference", "fashion-mnist"], "its weights are random"),
        (["no-such-model"], "no-such-model"),
    ],
)
def test_bad_input_ends_in_one_line(args: list[str], message: str) -> None:
    done = CliRunner().invoke(app, ["bench", *args, "--device", "cpu"])
    assert done.exit_code == 2 and message in done.stderr, done.output
    assert len([line for line in done.stderr.splitlines() if line.startswith("error:")]) == 1
