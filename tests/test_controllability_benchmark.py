"""The script that measures how closely a model follows edges, at tiny size."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

from tests.test_control import tokenizer, var
from varkit.pipelines.auto import assemble

pytest.importorskip("cv2", reason="the extra control is not installed")

FILE = Path(__file__).parents[1] / "benchmarks" / "controllability.py"
SPEC = importlib.util.spec_from_file_location("controllability", FILE)
assert SPEC is not None and SPEC.loader is not None
script: Any = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(script)


@pytest.fixture(scope="module", name="made")
def _made(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    """A model that edges steer, and images of its three classes."""
    folder = tmp_path_factory.mktemp("controllability")
    assemble(var(), tokenizer(), {}).save_pretrained(folder / "model")
    for i in range(6):
        pixels = np.zeros((16, 24, 3), dtype=np.uint8)
        pixels[3 : 9 + i, 4 : 14 + i] = 255
        path = folder / "images" / str(i % 3) / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(path)
    return str(folder / "model"), str(folder / "images")


def run(*arguments: str) -> Any:
    return CliRunner().invoke(script.app, list(arguments))


def test_every_setting_has_a_row_and_strength_and_batches_mean_what_they_say(made: tuple[str, str]) -> None:
    model, images = made
    common = [model, "--data", images, "--split", "train", "--num", "6"]
    first = run(*common, "--strength", "0,1", "--guidance", "1,2", "--json")
    assert first.exit_code == 0, first.output
    found = json.loads(first.stdout)
    assert found["images"] == 6 and 0.01 < found["edge_share"] < 0.5
    assert [(r["what"], r.get("guidance"), r.get("strength")) for r in found["rows"]] == [
        ("reconstructions", None, None),
        *[("samples", w, s) for w in (1, 2) for s in (0, 1)],
    ]
    assert all(0 <= row["f1"] <= 1 and row["standard_error"] >= 0 for row in found["rows"])
    again = json.loads(run(*common, "--strength", "1", "--guidance", "2", "--batch-size", "4", "--json").stdout)
    assert again["rows"][1] == found["rows"][4]  # neither batches nor the other settings matter
    table = run(*common, "--strength", "1", "--guidance", "2").stdout
    assert f"| samples | 2 | 1 | {found['rows'][4]['f1']:.3f}" in table and "| reconstructions | - | - |" in table


def test_the_same_images_score_one_and_others_less() -> None:
    edges = script_edges()
    images = torch.full((2, 3, 16, 24), -1.0)
    images[:, :, 4:10, 4:12] = 1
    wanted = edges(script.pixels(images))
    assert script.score(edges, [images], wanted)["f1"] == 1
    moved = images.roll(5, 3)
    assert script.score(edges, [images[:1], moved[1:]], wanted)["f1"] < 0.8


def script_edges() -> Any:
    from varkit.conditioning.extractors import build_extractor

    return build_extractor("canny", low=100, high=200)


def test_what_cannot_be_measured_is_said(made: tuple[str, str]) -> None:
    model, images = made
    for arguments, message in (
        (["fashion-var"], "is conditioned on class"),
        ([model, "--strength", "-1"], "numbers from 0"),
        ([model, "--guidance", "x"], "numbers from 1"),
        ([model, "--data", images, "--split", "train", "--num", "7"], "has 6 images"),
        ([model, "--mode", "crop"], "pad, center or squash"),
    ):
        out = run(*arguments)
        assert out.exit_code == 2 and message in " ".join(out.output.replace("│", " ").split()), out.output
