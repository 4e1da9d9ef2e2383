"""The tabs Reconstruct, Compare and Evaluate of the demo, without a browser."""

from __future__ import annotations

import json
import shlex
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

from tests.test_demo import NAME, OTHER, OWN, _folder, _models, _picture, _pipeline, refused, same, upload  # noqa: F401
from varkit.cli import app as command_line
from varkit.demo import compare, evaluate, reconstruct
from varkit.demo.common import Models, enlarge
from varkit.demo.limits import Limits
from varkit.demo.running import Step, stream
from varkit.metrics.reconstruction import psnr
from varkit.pipelines.edit import image_to_tensor

pytest.importorskip("gradio", reason='the demo needs gradio: pip install "varkit[app]"')
SLICE = Path(__file__).parent / "data" / "fashion_slice.npz"


# ---- reconstruct ----------------------------------------------------------------------------------------------------


def test_a_reconstruction_is_the_tokenizers_and_its_psnr_is_true(
    models: Models, pipeline: Any, picture: Image.Image, tmp_path: Path
) -> None:
    sent = upload(enlarge(picture), tmp_path / "x.png")
    (before, after), scales, line, _ = reconstruct.reconstruct(models, NAME, sent)
    pixels = image_to_tensor(picture, (8, 8)).to(pipeline.device)
    with torch.no_grad():
        tokens = pipeline.image_tokenizer.encode(pixels)
        back = pipeline.to_images(tokens)[0]
    assert same(before, enlarge(picture)) and same(after, enlarge(back))
    assert [caption for _, caption in scales] == ["1 x 1", "2 x 2", "4 x 4"] and same(scales[-1][0], after)
    decibels = float(psnr(image_to_tensor(back, (8, 8)), image_to_tensor(picture, (8, 8)))[0])
    used = len(tokens.unique())
    assert line.startswith(f"**21 tokens**, {used} different codes of 24 · PSNR **{decibels:.2f} dB**")
    assert "too small for SSIM" in line and "8 x 8 pixels" in line


@pytest.mark.parametrize("kind", ["own", "photo"])
def test_the_printed_python_makes_the_same_reconstruction(
    models: Models, picture: Image.Image, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (30, 50, 3), dtype=np.uint8)
    image = enlarge(picture) if kind == "own" else Image.fromarray(noise)
    (_, after), _, _, text = reconstruct.reconstruct(models, NAME, upload(image, tmp_path / "image.png"))
    monkeypatch.chdir(tmp_path)
    exec(compile(text, "printed", "exec"), {})
    assert same(enlarge(Image.open("reconstruction.png")), after)


def test_a_reconstruction_needs_an_image_within_the_limit(folder: Path, tmp_path: Path) -> None:
    small = Models([folder], Limits(side=40))
    assert "Upload an image" in refused(lambda: reconstruct.reconstruct(small, NAME, None))
    sent = upload(Image.new("RGB", (41, 9)), tmp_path / "x.png")
    assert "41 x 9 pixels; send at most 40" in refused(lambda: reconstruct.reconstruct(small, NAME, sent))


# ---- compare --------------------------------------------------------------------------------------------------------


def test_both_sides_are_what_their_commands_draw(models: Models, tmp_path: Path) -> None:
    events = list(compare.compare(models, "all", 4, 9, NAME, *OWN, NAME, *OTHER))
    first, _, second, _, line, text = events[-1]
    assert "0 of 4 images are the same" in line and not events[0][0]
    for number, (side, command) in enumerate(zip((first, second), text.split("\n"), strict=True)):
        *words, _ = shlex.split(command)[1:]
        out = tmp_path / str(number)
        done = CliRunner().invoke(command_line, [*words, str(out)])
        assert done.exit_code == 0, done.output
        files = sorted(out.iterdir())
        assert all(same(enlarge(Image.open(f)), image) for f, (image, _) in zip(files, side, strict=True))


def test_equal_sides_give_equal_images(models: Models) -> None:
    *_, (first, note, second, _, line, _) = compare.compare(models, "2", 3, 9, NAME, *OWN, NAME, *OWN)
    assert "3 of 3 images are the same" in line and "3 steps" in note and "network passes" in note
    assert all(same(a, b) and x == y == "Bag" for (a, x), (b, y) in zip(first, second, strict=True))


def test_a_side_with_a_bad_setting_is_refused_before_any_work(models: Models) -> None:
    bad = (2.0, 0, 0, 1.0, False, 21)
    assert "Temperature must be" in refused(lambda: next(compare.compare(models, "all", 1, 0, NAME, *OWN, NAME, *bad)))


# ---- evaluate -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module", name="shipped")
def _shipped() -> Models:
    return Models(["fashion-var"])


@pytest.fixture(scope="module", name="real")
def _real(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Real images in colour, as models draw."""
    path = tmp_path_factory.mktemp("real") / "slice.npz"
    with np.load(SLICE) as file:
        grey = file["arr_0"]
        np.savez(path, arr_0=np.repeat(grey.reshape(*grey.shape[:3], 1), 3, 3), arr_1=file["arr_1"])
    return str(path)


def test_the_scores_are_those_of_the_printed_command(
    shipped: Models, real: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    events = list(evaluate.evaluate(shipped, real, str(tmp_path), "fashion-var", 16, 2.0, 5))
    status, pictures, table, file, line = events[-1]
    assert status.startswith("**16 images** drawn and scored in") and "not a published number" in status
    assert "FD(classifier)" in table and "95% interval" in table and "| FID" not in table
    assert len(pictures) == 2 and pictures[0][1].startswith("Contact sheet")
    assert events[1][0] == "Scoring ..."
    page = Path(file["value"]).read_text(encoding="utf-8")
    assert "FD(classifier)" in page and str(Path(real).parent) not in page and "slice.npz" in page
    words = shlex.split(line)[1 : shlex.split(line).index("--html")]
    done = CliRunner().invoke(command_line, [*words, "--json"])
    assert done.exit_code == 0, done.output
    values = [s["value"] for s in json.loads(done.stdout)["results"][0]["scores"]]
    assert [row.split(" | ")[1] for row in table.split("\n")[2:6]] == [evaluate.digits(v) for v in values]


def test_an_evaluation_takes_a_turn_a_batch_and_stops_between_them(
    shipped: Models, real: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    events = evaluate.evaluate(shipped, real, str(tmp_path), "fashion-var", 200, 2.0, 0)
    assert next(events)[0] == "Waiting for a turn ..."
    assert next(events)[0] == "16 of 200 images drawn ..."
    with shipped.turns.take():  # another visitor comes in between
        pass
    events.close()
    assert not [t for t in threading.enumerate() if t.name == "varkit-demo-run"]


def test_models_that_the_protocol_does_not_score_are_refused(models: Models) -> None:
    text = refused(lambda: next(evaluate.evaluate(models, "none", "", NAME, 16, 2.0, 0)))
    assert "this one draws 3 classes at 8 x 8" in text and "varkit eval" in text


@pytest.mark.parametrize(
    ("num", "guidance", "message"), [(15, 2, "from 16 to 256"), (257, 2, "from 16"), (16, 0, "Guid")]
)
def test_numbers_out_of_range_are_refused(models: Models, num: int, guidance: float, message: str) -> None:
    assert message in refused(lambda: next(evaluate.evaluate(models, "none", "", NAME, num, guidance, 0)))


def test_without_matplotlib_the_report_is_left_out_and_that_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(report: Any) -> str:
        raise ImportError

    monkeypatch.setattr("varkit.metrics.html.html", missing)
    assert evaluate.save(None, "") == (None, " The report needs `varkit[eval]` on the server.")  # type: ignore[arg-type]


def test_a_stream_ends_with_what_its_work_returned() -> None:
    def work(tell: Any) -> str:
        tell(Step(1, 1, None))
        return "all"

    first, last = stream(work)
    assert first == Step(1, 1, None) and last.result == "all" and last.seconds >= 0
