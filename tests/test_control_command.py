"""`varkit sample --control ...`: images steered by control images, from the command line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import Result
from PIL import Image
from typer.testing import CliRunner

from tests.test_control import SMALL, tokenizer, var
from tests.test_controlar import of_text
from tests.test_controlar import tokenizer as text_tokenizer
from varkit import AutoPipeline, Rng
from varkit.cli import app
from varkit.commands.steering import by_kind
from varkit.conditioning.extractors import build_extractor, map_of
from varkit.pictures import read_settings
from varkit.pipelines import canvas
from varkit.pipelines.auto import assemble

FAST = {"guidance_scale": 2.0}


def edges(size: tuple[int, int] = (24, 16), seed: int = 0) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 2, size[::-1]) * 255
    return Image.fromarray(pixels.astype(np.uint8))


@pytest.fixture(scope="module", name="folder")
def _folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Tiny models, saved: `one` and `two` kinds of control, `none`, and `sometimes`, which may be called without."""
    folder = tmp_path_factory.mktemp("control")
    models: dict[str, dict[str, Any]] = {
        "one": {},
        "two": {"control": {**SMALL, "kinds": ["canny", "depth"]}},
        "none": {"control": None},
        "sometimes": {"control_drop_rate": 0.1, "control": {**SMALL, "kinds": ["canny"]}},
    }
    for name, changes in models.items():
        assemble(var(**changes), tokenizer(), FAST).save_pretrained(folder / name)
    edges().save(folder / "map.png")
    edges(seed=1).save(folder / "other.png")
    photo = np.zeros((50, 90, 3), np.uint8)
    photo[10:40, 20:70] = (200, 40, 40)
    Image.fromarray(photo).save(folder / "photo.png")
    Image.fromarray(photo).save(folder / "photo.jpg")
    edges().save(folder / "moving.gif", save_all=True, append_images=[edges(seed=2)])
    edges().save(folder / "still.gif")
    (folder / "broken.png").write_text("no image")
    return folder


def run(folder: Path, model: str, *options: str, out: str = "out", code: int = 0) -> Result:
    """Files are named in `folder`, also those of a kind."""
    values = [str(folder / o) if o.endswith((".png", ".jpg", ".gif")) and "=" not in o else o for o in options]
    values = [v.replace("=", f"={folder}/", 1) if v.endswith(".png") and "=" in v else v for v in values]
    words = ["sample", str(folder / model), *values, "--out", str(folder / out), "--json"]
    result = CliRunner().invoke(app, words)
    assert result.exit_code == code, result.output + repr(result.exception)
    return result


def said(result: Result) -> dict[str, Any]:
    return json.loads(result.stdout.splitlines()[-1])


def drawn(result: Result) -> list[np.ndarray]:
    files = said(result)["files"]
    return [np.asarray(Image.open(path), int) for path in files]


def expected(folder: Path, model: str, labels: list[int], **settings: Any) -> list[np.ndarray]:
    pipe = AutoPipeline.from_pretrained(folder / model)
    pipe.set_progress_bar_config(disable=True)
    return [np.asarray(i, int) for i in pipe(labels, rng=Rng.from_seed(3, len(labels)), **settings).images]


def alike(a: list[np.ndarray], b: list[np.ndarray]) -> bool:
    return len(a) == len(b) and all(np.abs(x - y).max() <= 1 for x, y in zip(a, b, strict=True))


THREE = ["--class", "0,2", "--num", "3", "--seed", "3"]


def test_a_map_steers_as_in_the_pipeline(folder: Path) -> None:
    image = Image.open(folder / "map.png")
    result = run(folder, "one", "--control", "map.png", "--control-strength", "0.8", *THREE, "--batch-size", "2")
    ours = drawn(result)
    assert alike(ours, expected(folder, "one", [0, 2, 0], control=image, control_strength=0.8))
    assert not alike(ours, drawn(run(folder, "one", "--control", "other.png", *THREE, out="other")))
    settings = said(result)["settings"]
    assert settings["control"] == "map.png" and settings["control_strength"] == 0.8 and "extract" not in settings
    assert "controls" not in said(result)
    assert read_settings(Path(said(result)["files"][0]))["control"] == "map.png"
    assert str(folder) not in json.dumps({k: v for k, v in settings.items() if k != "model"})
    assert alike(drawn(run(folder, "one", "--control", "still.gif", *THREE)), drawn(run(folder, "one", "--control",
                 "map.png", *THREE)))  # fmt: skip


def test_no_strength_is_no_control(folder: Path) -> None:
    with_map = drawn(run(folder, "one", "--control", "map.png", "--control-strength", "0", *THREE))
    assert alike(with_map, drawn(run(folder, "one", "--control-strength", "0", *THREE)))
    assert alike(with_map, expected(folder, "one", [0, 2, 0], control_strength=0))
    assert len(drawn(run(folder, "sometimes", *THREE))) == 3  # a model that has seen absent ones needs none


def test_several_kinds_have_files_and_strengths_of_their_own(folder: Path) -> None:
    images = {"canny": Image.open(folder / "map.png"), "depth": Image.open(folder / "other.png")}
    files = ["--control", "canny=map.png", "--control", "depth=other.png"]
    result = run(folder, "two", *files, "--control-strength", "0.5", "--control-strength", "depth=1.5", *THREE)
    strengths = {"canny": 0.5, "depth": 1.5}
    assert alike(drawn(result), expected(folder, "two", [0, 2, 0], control=images, control_strength=strengths))
    assert said(result)["settings"]["control_strength"] == strengths
    assert said(result)["settings"]["control"] == {"canny": "map.png", "depth": "other.png"}
    one = drawn(run(folder, "two", *files[2:], *THREE))
    assert alike(one, expected(folder, "two", [0, 2, 0], control={"depth": images["depth"]}))


@pytest.mark.parametrize(("out", "where"), [("grid.png", "grid.control.png"), ("many", "many.control/canny.png")])
def test_a_map_is_extracted_at_the_size_drawn_and_kept_beside_the_samples(folder: Path, out: str, where: str) -> None:
    pytest.importorskip("cv2", reason="the extra control is not installed")
    result = run(folder, "one", "--control", "photo.png", "--extract", "canny", *THREE, out=out)
    assert said(result)["controls"] == [str(folder / where)] and said(result)["settings"]["extract"] == "canny"
    made = Image.open(folder / where)
    photo = Image.open(folder / "photo.png")
    assert made.size == (24, 16) and made.tobytes() == map_of(build_extractor("canny"), photo, (16, 24)).tobytes()
    assert set(np.unique(made)) == {0, 255} and read_settings(folder / where) == {"extract": "canny"}
    again = run(folder, "one", "--control", str(where), *THREE, out=f"again-{out}")  # the map stands for the photo
    assert alike(drawn(result), drawn(again))
    if out == "many":
        assert len(list((folder / out).rglob("*.png"))) == 3  # no map among the samples


def test_of_several_kinds_one_is_extracted(folder: Path) -> None:
    pytest.importorskip("cv2", reason="the extra control is not installed")
    files = ["--control", "canny=photo.png", "--control", "depth=other.png"]
    result = run(folder, "two", *files, "--extract", "canny", *THREE, out="kinds.png")
    assert said(result)["controls"] == [str(folder / "kinds.control.png")]
    assert said(result)["settings"]["extract"] == "canny"
    both = run(folder, "two", *files[:1], "canny=photo.png", "--control", "depth=photo.png", "--extract", "canny",
               "--extract", "depth=canny", *THREE, out="kinds.png")  # fmt: skip
    names = ["kinds.control.canny.png", "kinds.control.depth.png"]
    assert [Path(p).name for p in said(both)["controls"]] == names


def test_an_edit_is_steered_too(folder: Path) -> None:
    image, control = Image.open(folder / "photo.png"), Image.open(folder / "map.png")
    options = ["--image", "photo.png", "--box", "0.5,0,1,1", "--class", "1", "--seed", "3", "--control", "map.png"]
    result = run(folder, "one", *options, out="edited")
    pipe = AutoPipeline.from_pretrained(folder / "one")
    about = {"box": (0.5, 0, 1, 1), "class_labels": [1], "rng": Rng.from_seed(3, 1)}
    ours = [np.asarray(i, int) for i in pipe.edit([image], control=control, **about).images]
    free = [np.asarray(i, int) for i in pipe.edit([image], control_strength=0, **about).images]
    assert alike(drawn(result), ours) and not alike(ours, free)
    assert "is steered by control images" in run(folder, "one", *options[:-2], code=2).stderr


def test_texts_are_steered_and_an_edit_keeps_the_canvas(tmp_path: Path) -> None:
    """A model of any size draws that of the control image; an edit has the model's canvas whatever the control's."""
    pipe = assemble(of_text(rope_grid=(4, 4)), text_tokenizer(), FAST)
    pipe.set_progress_bar_config(disable=True)
    pipe.save_pretrained(tmp_path / "m")
    edges((6, 8)).save(tmp_path / "tall.png")
    np.save(tmp_path / "words.npy", np.random.default_rng(0).normal(size=(3, 12)).astype(np.float32))
    words = ["sample", str(tmp_path / "m"), "--control", str(tmp_path / "tall.png"), "--out", str(tmp_path / "out")]
    done = CliRunner().invoke(app, [*words, "--features", str(tmp_path / "words.npy"), "--json"])
    assert done.exit_code == 0, done.output + repr(done.exception)
    with Image.open(said(done)["files"][0]) as made:
        assert made.size == (6, 8)
    wide = Image.new("RGB", (8, 6), "red")
    edited = pipe.edit(wide, box=(0, 0, 0.5, 1), control=edges((6, 8)), seed=0).images[0]
    assert edited.size == (8, 6)


@pytest.mark.parametrize(
    ("model", "options", "message"),
    [
        ("none", ["--control", "map.png"], "takes no control images: leave --control out"),
        ("none", ["--control-strength", "0"], "give --control FILE too"),
        ("one", [], "is steered by control images (one kind): give --control FILE"),
        ("two", [], "is steered by control images (canny, depth)"),
        ("one", ["--control-strength", "0.5"], "give --control FILE too"),
        ("one", ["--extract", "canny"], "give --control PHOTO too"),
        ("one", ["--control", "gone.png"], "No such file"),
        ("one", ["--control", "broken.png"], "broken.png is not an image that can be read"),
        ("one", ["--control", "moving.gif"], "moving.gif is a moving image of 2 pictures"),
        ("one", ["--control", "moving.gif", "--extract", "canny"], "is a moving image"),
        ("one", ["--control", "map.png", "--control", "other.png"], "--control is given twice"),
        ("one", ["--control", "a=map.png", "--control", "b=other.png"], "knows one control, but --control is given 2"),
        ("one", ["--control", "map.png", "--control-strength", "-0.1"], "-0.1 must be a number from 0"),
        ("one", ["--control", "map.png", "--control-strength", "nan"], "nan must be a number from 0"),
        ("one", ["--control", "map.png", "--control-strength", "inf"], "inf must be a number from 0"),
        ("one", ["--control", "map.png", "--control-strength", "much"], "much must be a number from 0"),
        ("one", ["--control", "map.png", "--control-strength", "depth=1"], "there is no --control depth=FILE"),
        ("one", ["--control", "map.png", "--control-strength", "depth="], "says nothing after the sign"),
        (
            "one",
            ["--control", "photo.png", "--extract", "cany"],
            "no extractor is called 'cany' (did you mean 'canny'?)",
        ),
        ("one", ["--control", "map.png", "--extract", "map"], "leave --extract out"),
        ("two", ["--control", "map.png"], "knows several controls, canny, depth: say which"),
        ("two", ["--control", "hed=map.png"], "knows no control 'hed'; it knows canny, depth"),
        ("two", ["--control", "canny=map.png", "--control", "canny=map.png"], "given twice for canny"),
        ("two", ["--control", "canny=map.png", "--control", "depth=map.png", "--extract", "hed"], "no --control hed="),
        ("sometimes", ["--control", "depth=map.png"], "knows no control 'depth'; it knows canny"),
        ("one", ["--control", "map.png", "--size", "17x24"], "multiples of"),
    ],
)
def test_bad_controls_end_in_one_line(folder: Path, model: str, options: list[str], message: str) -> None:
    result = run(folder, model, *options, out="never", code=2)
    assert message in result.stderr and result.stderr.startswith("error: ") and result.stderr.count("\n") == 1
    assert result.stdout == "" and not (folder / "never").exists()


def test_missing_weights_of_an_extractor_are_named(
    folder: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("VARKIT_WEIGHTS", str(tmp_path))
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    result = run(folder, "one", "--control", "photo.png", "--extract", "hed", out="never", code=2)
    assert "ControlNetHED.pth" in result.stderr and not (folder / "never").exists()


def test_huge_images_are_refused_before_they_are_decoded(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(canvas, "MAX_PIXELS", 24 * 16)
    run(folder, "one", "--control", "map.png", "--class", "0")
    monkeypatch.setattr(canvas, "MAX_PIXELS", 24 * 16 - 1)
    assert "24 x 16 pixels; 1 to 383 are" in run(folder, "one", "--control", "map.png", code=2).stderr


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "I;16", "I", "F"])
def test_maps_of_every_mode_and_size(folder: Path, mode: str) -> None:
    """The same map, made larger and in another mode, draws the same; of two modes the range is not known."""
    large = edges().resize((72, 48), Image.Resampling.NEAREST)
    ending = "tif" if mode in ("CMYK", "I", "F", "I;16") else "png"
    if mode in ("I", "I;16", "F"):
        values = np.asarray(large).astype({"I": np.int32, "I;16": np.uint16, "F": np.float32}[mode])
        image = Image.fromarray(values * 257 if mode == "I;16" else values)
    else:
        image = large.convert("RGB").convert(mode) if mode in ("P", "CMYK") else large.convert(mode)
    path = folder / f"mode.{ending}"
    image.save(path)
    if mode in ("I", "F"):
        assert f"mode {mode}" in run(folder, "one", "--control", str(path), code=2).stderr
        return
    made = drawn(run(folder, "one", "--control", str(path), *THREE, out="mode"))
    assert len(made) == 3 and made[0].shape == (16, 24, 3)
    if mode == "P":  # palettes are resized by the nearest pixel: the very map
        assert alike(made, drawn(run(folder, "one", "--control", "map.png", *THREE)))


def test_a_file_with_a_sign_in_its_name_is_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    edges().save("a=b.png")
    assert by_kind(["a=b.png"], "--control") == {"": "a=b.png"}
    assert by_kind(["c=a=b.png", "x/y=z.png"], "--control") == {"c": "a=b.png", "": "x/y=z.png"}
