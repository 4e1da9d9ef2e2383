"""`varkit sample --image ...`: edits from the command line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

from tests.test_models import tiny_pair
from varkit import AutoPipeline, ClassToImagePipeline, NextGroupSampler, Rng
from varkit.cli import app
from varkit.pictures import read_settings


@pytest.fixture(scope="module", name="folder")
def _folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("edit")
    pipe = ClassToImagePipeline(*tiny_pair("var_fashion"), NextGroupSampler(), {"0": "Boot", "1": "Coat", "2": "Bag"})
    pipe.save_pretrained(folder / "m")
    pixels = np.random.default_rng(0).integers(0, 256, (20, 30, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(folder / "photo.png")
    mask = np.zeros((10, 15), np.uint8)
    mask[:5] = 255
    Image.fromarray(mask).convert("1").save(folder / "mask.png")
    (folder / "broken.png").write_text("no image")
    return folder


def run(folder: Path, *options: str) -> Any:
    values = [str(folder / o) if o.endswith(".png") else o for o in options]
    return CliRunner().invoke(app, ["sample", str(folder / "m"), *values, "--out", str(folder / "out"), "--json"])


def test_an_edit_is_the_pipelines(folder: Path) -> None:
    options = ["--image", "photo.png", "--mask", "mask.png", "--fit", "pad", "--paste-back", "--feather", "0.1"]
    result = run(folder, *options, "--class", "Bag,0", "--num", "3", "--seed", "5", "--batch-size", "2")
    assert result.exit_code == 0, result.output
    said = json.loads(result.output.splitlines()[-1])
    assert said["classes"] == [2, 0, 2] and "note" not in said
    assert {"image": "photo.png", "mask": "mask.png", "fit": "pad", "feather": 0.1, "paste_back": True}.items() <= (
        said["settings"].items()
    )
    pipe = AutoPipeline.from_pretrained(folder / "m")
    arguments: dict[str, Any] = {"fit": "pad", "paste_back": True, "feather": 0.1, "rng": Rng.from_seed(5, 3)}
    image, mask = Image.open(folder / "photo.png"), Image.open(folder / "mask.png")
    expected = pipe.edit([image] * 3, mask=mask, class_labels=[2, 0, 2], **arguments).images
    for path, ours in zip(said["files"], expected, strict=True):
        with Image.open(path) as made:
            assert made.size == (30, 20) and np.abs(np.asarray(made, int) - np.asarray(ours, int)).max() <= 1
        assert read_settings(Path(path))["mask"] == "mask.png"


@pytest.mark.parametrize(
    ("options", "size"),
    [
        (["--box", "0.5,0,1,1"], (8, 8)),
        (["--box", "0.2,0.2,0.8,0.8", "--keep", "inside", "--paste-back"], (30, 20)),
        (["--extend", "0.25", "--paste-back"], (46, 30)),
        (["--extend", "0,0.5,0,0", "--fit", "stretch", "--paste-back"], (45, 20)),
        (["--strength", "0.4", "--class", "1"], (8, 8)),
        (["--mask", "mask.png", "--size", "8x12", "--threshold", "0.1"], (12, 8)),
    ],
)
def test_every_kind_of_edit_has_its_size(folder: Path, options: list[str], size: tuple[int, int]) -> None:
    result = run(folder, "--image", "photo.png", *options)
    assert result.exit_code == 0, result.output
    said = json.loads(result.output.splitlines()[-1])
    assert len(said["files"]) == 1 and said["classes"] == [1 if "--class" in options else 3]  # 3 is the null class
    with Image.open(said["files"][0]) as made:
        assert made.size == size


def test_a_mask_of_nothing_is_noted(folder: Path) -> None:
    Image.new("L", (4, 4)).save(folder / "black.png")
    result = run(folder, "--image", "photo.png", "--mask", "black.png", "--paste-back")
    said = json.loads(result.output.splitlines()[-1])
    assert said["note"].startswith("nothing is marked")
    with Image.open(said["files"][0]) as made, Image.open(folder / "photo.png") as given:
        assert np.array_equal(np.asarray(made), np.asarray(given))


def test_a_mask_of_everything_is_noted(folder: Path) -> None:
    Image.new("1", (4, 4), 1).save(folder / "white.png")
    result = run(folder, "--image", "photo.png", "--mask", "white.png", "--class", "1", "--seed", "5")
    said = json.loads(result.output.splitlines()[-1])
    assert said["note"].startswith("everything is marked")
    (plain,) = AutoPipeline.from_pretrained(folder / "m")([1], rng=Rng.from_seed(5, 1)).images
    with Image.open(said["files"][0]) as made:
        assert np.abs(np.asarray(made, int) - np.asarray(plain, int)).max() <= 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--mask", "mask.png"], "--mask edit an image: give --image too"),
        (["--extend", "0.5", "--paste-back"], "--extend, --paste-back edit an image"),
        (["--image", "photo.png"], "give exactly one of mask= and box="),
        (["--image", "nothing.png", "--box", "0,0,1,1"], "No such file"),
        (["--image", "broken.png", "--box", "0,0,1,1"], "broken.png is not an image that can be read"),
        (["--image", "photo.png", "--box", "0,0,1"], "--box 0,0,1 must be 4 numbers"),
        (["--image", "photo.png", "--extend", "1,2"], "--extend 1,2 must be 1 or 4 numbers"),
        (["--image", "photo.png", "--extend", "x"], "--extend 'x' must be numbers"),
        (["--image", "photo.png", "--box", "0,0,1,1", "--keep", "all"], "keep must be 'outside'"),
        (["--image", "photo.png", "--box", "0,0,1,1", "--feather", "0.1"], "goes with paste_back=True"),
        (["--image", "photo.png", "--box", "0,0,1,1", "--fit", "cover"], "fit must be one of"),
    ],
)
def test_bad_edits_end_in_one_line(folder: Path, options: list[str], message: str) -> None:
    result = run(folder, *options)
    assert result.exit_code == 2 and message in result.output and "Traceback" not in result.output
