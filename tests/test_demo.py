"""The demo without a browser: what the handlers yield and refuse, what they print, and the page as gradio serves it."""

from __future__ import annotations

import base64
import json
import logging
import shlex
import socket
import struct
import sys
import threading
import time
import urllib.error
import urllib.request
import zlib
from collections.abc import Callable, Iterator
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

import varkit
from tests.test_models import liven
from varkit.cli import app as command_line
from varkit.demo import class_to_image, common, compare, edit, evaluate, painter, reconstruct, running, uploads
from varkit.demo.app import build_demo, launch
from varkit.demo.common import Models, enlarge
from varkit.demo.limits import Limits
from varkit.pipelines.auto import AutoPipeline, assemble
from varkit.pipelines.base import generate
from varkit.pipelines.edit import image_to_tensor, keep_pyramid
from varkit.registry import create_model, model_entry
from varkit.rng import Rng

gr = pytest.importorskip("gradio", reason='the demo needs gradio: pip install "varkit[app]"')

SIDE = 8  # of the tiny model's images
NAME = "tiny var"  # with a space: what is printed must be quoted
OWN = (2.0, 1.0, 0, 1.0, False, 21)  # the tiny model's own settings, in the order of the controls
OTHER = (1.5, 0.8, 12, 0.9, True, 21)
PLAIN = (edit.MARKS, False, 0.0)
"""Of the edit tab: what is marked is redrawn, nothing pasted back."""
LOWER = "0000/0000/1111/1111"
"""Marks on the tiny model's 4 x 4 cells."""
NAMES = ("guidance_scale", "temperature", "top_k", "top_p", "more_smooth")


def save_tiny(folder: Path) -> Path:
    from varkit.pipelines.class_to_image import ClassToImagePipeline
    from varkit.samplers.next_group import NextGroupSampler

    entry = model_entry("var_fashion")
    tokenizer = model_entry(str(entry.tokenizer)).build(**entry.tiny_tokenizer)
    names = {"0": "Boot", "1": "Coat", "2": "Bag"}
    pipeline = ClassToImagePipeline(
        entry.build(**entry.tiny).eval(), tokenizer.eval(), NextGroupSampler(guidance_scale=2.0), id2label=names
    )
    pipeline.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module", name="folder")
def _folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A saved tiny pipeline whose images depend on the class."""
    torch.manual_seed(0)
    folder = save_tiny(tmp_path_factory.mktemp("models") / NAME)
    pipeline = AutoPipeline.from_pretrained(folder)
    liven(pipeline.transformer)
    liven(pipeline.image_tokenizer, 0.05)
    pipeline.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module", name="models")
def _models(folder: Path) -> Models:
    return Models([folder])


@pytest.fixture(scope="module", name="pipeline")
def _pipeline(models: Models) -> Any:
    return models.open(NAME)


@pytest.fixture(scope="module", name="picture")
def _picture(pipeline: Any) -> Image.Image:
    """An image that the model drew."""
    return pipeline(1, seed=5).images[0]


def same(a: Image.Image, b: Image.Image) -> bool:
    return np.array_equal(np.asarray(a), np.asarray(b))


def refused(call: Callable[[], Any]) -> str:
    """What the visitor reads."""
    with pytest.raises(gr.Error) as caught:
        call()
    return caught.value.message


def upload(image: Image.Image, path: Path, **options: Any) -> dict[str, Any]:
    """The image as gradio hands over an upload."""
    image.save(path, **options)
    return {"path": str(path), "orig_name": path.name, "meta": {"_type": "gradio.FileData"}}


def redraw(models: Models, sent: Any, *, marks: Any = LOWER, label: str = edit.FOLLOW, how: Any = PLAIN) -> Any:
    """Everything that an edit with the model's own settings and seed 3 yields."""
    return list(edit.edit(models, NAME, sent, marks, label, *OWN, 3, *how))


# ---- models on offer ----------------------------------------------------------------------------------------------


def test_a_model_is_opened_once_and_known_by_its_short_name(models: Models, folder: Path) -> None:
    assert models.names == [NAME] and models.source(NAME) == str(folder)
    assert models.open(NAME) is models.open(NAME)


def test_two_models_with_one_name_are_told_apart(tmp_path: Path) -> None:
    a, b, c = (tmp_path / x / "model" for x in "abc")
    models = Models([a, b, str(a), c])
    assert models.names == ["model", "model (2)", "model (3)"]
    assert [models.source(n) for n in models.names] == [str(a), str(b), str(c)]
    with pytest.raises(ValueError, match="name a saved pipeline folder"):
        Models([])


@pytest.mark.parametrize("name", ["nope", "", "../models/tiny var", "/", "user/name", None, 7, "FOLDER"])
def test_a_name_not_on_offer_never_reaches_the_disk(folder: Path, monkeypatch: pytest.MonkeyPatch, name: Any) -> None:
    opened: list[Any] = []
    monkeypatch.setattr(AutoPipeline, "from_pretrained", opened.append)
    fresh, name = Models([folder]), str(folder) if name == "FOLDER" else name
    for call in (
        lambda: next(class_to_image.generate(fresh, name, "all", 1, *OWN, 0)),
        lambda: next(edit.edit(fresh, name, {"path": str(folder)}, LOWER, edit.FOLLOW, *OWN, 0, *PLAIN)),
        lambda: edit.preview(fresh, name, {"path": str(folder)}),
        lambda: edit.refresh(fresh, name, None),
        lambda: class_to_image.refresh(fresh, name),
        lambda: uploads.show_examples(fresh, name, None),
        lambda: reconstruct.reconstruct(fresh, name, {"path": str(folder)}),
        lambda: next(compare.compare(fresh, "all", 1, 0, name, *OWN, name, *OWN)),
        lambda: next(evaluate.evaluate(fresh, "none", "", name, 16, 2, 0)),
        lambda: evaluate.refresh(fresh, name),
    ):
        assert refused(call) == f"That model is not on offer; choose one of {NAME}"
    assert not opened


def test_examples_are_the_models_own_and_made_once(models: Models, pipeline: Any) -> None:
    examples = models.examples(NAME)
    drawn = pipeline([0, 1, 2, 0, 1, 2], seed=0).images
    assert all(same(a, enlarge(b)) for a, b in zip(examples, drawn, strict=True))
    assert models.examples(NAME) is examples
    gallery, first = uploads.show_examples(models, NAME, None)
    assert gallery["visible"] and gallery["value"] is examples and first is examples[0]
    assert uploads.show_examples(models, NAME, {"path": "x"})[1] == gr.skip()  # an image is there already: it stays
    assert uploads.pick_example(models, NAME, 4) is examples[4]
    assert "one of the examples" in refused(lambda: uploads.pick_example(models, NAME, 6))


def test_another_model_brings_its_own_classes_and_limits(models: Models) -> None:
    picker, num, guidance, _, top_k, _, smooth, tokens = class_to_image.refresh(models, NAME)
    classes = [("0 · Boot", "0"), ("1 · Coat", "1"), ("2 · Bag", "2")]
    assert picker["choices"][2:] == classes and picker["value"] == class_to_image.ALL and num == 8
    assert (guidance["value"], top_k["maximum"], smooth["value"], tokens["visible"]) == (2.0, 24, False, False)
    _, picker, *settings = edit.refresh(models, NAME, None)
    assert picker["choices"][1:] == classes and picker["value"] == edit.FOLLOW and len(settings) == len(OWN)


# ---- generate -----------------------------------------------------------------------------------------------------

RUNS = [
    ("all", 5, OWN, 0, [0, 1, 2, 0, 1]),
    ("2", 3, OTHER, 41, [2, 2, 2]),
    ("Coat", 1, OWN, 2**31 - 1, [1]),
    ("random", 6, OTHER, 7, None),
]


@pytest.mark.parametrize(("choice", "num", "values", "seed", "labels"), RUNS)
def test_generate_shows_scale_by_scale_then_what_the_pipeline_draws(
    models: Models, pipeline: Any, choice: str, num: int, values: Any, seed: int, labels: Any
) -> None:
    events = list(class_to_image.generate(models, NAME, choice, num, *values, seed))
    start, steps, (images, scales, status, _) = events[0], events[1:-1], events[-1]
    assert start[1] == [] and start[2] == "Starting ..."
    assert [len(s[1]) for s in steps] == [1, 2, 3]
    assert [s[2] for s in steps] == [f"Step {i} of 3 ..." for i in (1, 2, 3)]
    assert [caption for _, caption in scales] == ["1 x 1", "2 x 2", "4 x 4"]
    assert same(scales[-1][0], images[0][0]) and not same(scales[0][0], images[0][0])
    assert len({e[3] for e in events}) == 1  # the command is there from the start
    if labels is None:
        labels = class_to_image.labels_for(pipeline, choice, Rng.from_seed(seed, num))
        assert len(set(labels)) > 1
    made = generate(pipeline, labels, num, seed, num, **dict(zip(NAMES, values, strict=False)))
    for (image, caption), (_, label, expected) in zip(images, made, strict=True):
        assert same(image, enlarge(expected)) and caption == pipeline.labels[label]
    assert status.startswith("**1 image**" if num == 1 else f"**{num} images**")
    assert "of 8 x 8 pixels" in status and "3 steps" in status


@pytest.mark.parametrize(("choice", "num", "values", "seed", "labels"), RUNS)
def test_the_printed_command_makes_the_same_pixels(
    models: Models, tmp_path: Path, choice: str, num: int, values: Any, seed: int, labels: Any
) -> None:
    *_, (images, _, _, line) = class_to_image.generate(models, NAME, choice, num, *values, seed)
    program, *words, out = shlex.split(line)
    assert program == "varkit" and out == "grid.png" and words[-1] == "--out"
    done = CliRunner().invoke(command_line, [*words, str(tmp_path / "out")])
    assert done.exit_code == 0, done.output
    files = sorted((tmp_path / "out").iterdir())
    assert all(same(enlarge(Image.open(f)), image) for f, (image, _) in zip(files, images, strict=True))


def test_the_command_names_only_what_is_not_the_models_own(models: Models) -> None:
    line = next(class_to_image.generate(models, NAME, "all", 6, *OWN, 4))[3]
    assert line.endswith(" --class 0,1,2 --num 6 --seed 4 --guidance 2 --out grid.png")
    line = next(class_to_image.generate(models, NAME, "1", 2, *OTHER, 4))[3]
    assert " --class 1 --num 2 " in line
    assert line.endswith(" --guidance 1.5 --temperature 0.8 --top-k 12 --top-p 0.9 --more-smooth --out grid.png")


def test_random_classes_belong_to_the_seed_not_to_the_number(pipeline: Any) -> None:
    few, many = (class_to_image.labels_for(pipeline, "random", Rng.from_seed(3, n)) for n in (4, 16))
    assert many[:4] == few and set(many) == {0, 1, 2}


# ---- refusals -----------------------------------------------------------------------------------------------------

NAN = float("nan")


@pytest.mark.parametrize(
    ("place", "value", "message"),
    [
        *[(0, c, "No class is called") for c in ("shoe", "", None, 1.5, "a" * 500)],
        (0, "boots", "did you mean 'boot'?"),
        (0, "3", "Class must be a whole number from 0 to 2; got 3"),
        (0, "-1", "Class must be a whole number from 0 to 2; got -1"),
        *[(1, n, "Number of images must be a whole number from 1 to 16") for n in (0, 17, 2.5, None, "4", True, NAN)],
        *[(2, g, "Guidance must be a number from 0 to 100") for g in (-0.1, 101, None, "2", NAN)],
        *[(3, t, "Temperature must be a number from 0.01 to 5") for t in (0, 5.1, None, True, NAN)],
        *[(4, k, "Top-k must be a whole number from 0 to 24") for k in (-1, 25, 1.5, None)],
        *[(5, p, "Top-p must be a number from 0.01 to 1") for p in (0, 1.01, None, [])],
        *[(8, s, "Seed must be a whole number from 0 to 2147483647") for s in (-1, 2**31, 0.5, None, "7", False, NAN)],
    ],
)
def test_bad_input_is_refused_in_words(models: Models, place: int, value: Any, message: str) -> None:
    values: list[Any] = ["1", 2, *OWN, 0]
    values[place] = value
    text = refused(lambda: next(class_to_image.generate(models, NAME, *values)))
    assert message in text and len(text) < 200


def test_a_surprise_is_logged_and_not_shown(caplog: pytest.LogCaptureFixture) -> None:
    def fail() -> None:
        with common.readable_errors():
            raise RuntimeError("CUDA out of memory")

    with caplog.at_level(logging.ERROR):
        text = refused(fail)
    assert "failed on the server" in text and "CUDA" not in text
    assert "CUDA out of memory" in caplog.text


def test_without_gradio_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "gradio", None)
    with pytest.raises(ImportError, match=r'pip install "varkit\[app\]"'):
        launch()


def test_a_new_seed_is_a_seed() -> None:
    seeds = {common.new_seed() for _ in range(50)}
    assert len(seeds) > 40 and {common.check_seed(s) for s in seeds} == seeds


# ---- tokens in any number -----------------------------------------------------------------------------------------


def test_a_model_of_flexible_length_shows_and_takes_numbers_of_tokens(tmp_path: Path, picture: Image.Image) -> None:
    entry = model_entry("flextok_ar_fashion")
    tokenizer = model_entry(str(entry.tokenizer)).build(**entry.tiny_tokenizer)
    assemble(liven(entry.build(**entry.tiny)).eval(), liven(tokenizer).eval(), {}).save_pretrained(
        tmp_path / "flexible"
    )
    models = Models([tmp_path / "flexible"])
    *_, tokens = class_to_image.refresh(models, "flexible")
    assert (tokens["visible"], tokens["value"], tokens["maximum"]) == (True, 6, 6)
    own = (1.5, 1.0, 0, 1.0, False)
    for count, captions in ((6, ["1 token", "2 tokens", "4 tokens", "6 tokens"]), (3, ["1 token", "2 tokens"])):
        *_, (images, scales, status, line) = class_to_image.generate(models, "flexible", "all", 2, *own, count, 5)
        assert [caption for _, caption in scales] == captions and f"{count} steps" in status
        assert ("--tokens 3" in line) == (count == 3)
        drawn = models.open("flexible")([0, 1], seed=5, guidance_scale=1.5, num_tokens=count).images
        assert all(same(a, enlarge(b)) for (a, _), b in zip(images, drawn, strict=True))
    assert "Tokens must be" in refused(lambda: next(class_to_image.generate(models, "flexible", "0", 1, *own, 7, 5)))
    sent = upload(picture, tmp_path / "x.png")
    assert build_demo([tmp_path / "flexible"]) is not None
    edit.refresh(models, "flexible", sent)
    told = refused(lambda: next(edit.edit(models, "flexible", sent, "1", edit.FOLLOW, *own, 6, 5, *PLAIN)))
    assert told.startswith("The tokens of this model have no places in the image")
    _, scales, _, _ = reconstruct.reconstruct(models, "flexible", sent)
    assert [caption for _, caption in scales] == ["1 token", "2 tokens", "4 tokens", "6 tokens"]


def test_a_model_that_can_show_nothing_on_the_way_still_draws(tmp_path: Path) -> None:
    for name in ("llamagen_fashion", "maskgit_titok_fashion"):
        entry = model_entry(name)
        tokenizer = create_model(str(entry.tokenizer), **entry.tiny_tokenizer)
        assemble(entry.build(**entry.tiny).eval(), tokenizer.eval(), {}).save_pretrained(tmp_path / name)
        models = Models([tmp_path / name])
        *_, (images, scales, _, line) = class_to_image.generate(models, name, "0", 2, *OWN, 5)
        assert len(images) == 2 and scales == [] and "--tokens" not in line


# ---- streaming ----------------------------------------------------------------------------------------------------


def test_a_run_stops_between_steps_when_nobody_looks_any_more(pipeline: Any) -> None:
    seen: list[int] = []

    def endless(callback_on_step_end: Callable[..., Any]) -> None:
        for step in range(10_000):
            callback_on_step_end(pipeline, step, 0, {"num_steps": 10_000, "tokens": torch.zeros(1, 1)})
            seen.append(step)
            time.sleep(0.001)

    turns = running.Turns()
    events = running.run(turns, endless, stages={})
    assert next(events) == running.Step(1, 10_000, None)
    events.close()  # returns when the thread has ended
    count = len(seen)
    time.sleep(0.02)
    assert count == len(seen) < 5_000
    with turns.take():  # the turn was given back
        pass
    assert not [t for t in threading.enumerate() if t.name == "varkit-demo-run"]


def test_an_error_in_a_run_reaches_its_reader_and_ends_its_turn(pipeline: Any) -> None:
    def broken(callback_on_step_end: Callable[..., Any]) -> None:
        callback_on_step_end(pipeline, 0, 0, {"num_steps": 2, "tokens": torch.zeros(1, 1)})
        raise ValueError("half way")

    turns = running.Turns()
    events = running.run(turns, broken, stages={})
    next(events)
    with pytest.raises(ValueError, match="half way"):
        next(events)
    with turns.take():
        pass


def test_turns_are_given_one_at_a_time_in_the_order_of_asking() -> None:
    turns, order, inside = running.Turns(), list[int](), list[int]()

    def visitor(number: int) -> None:
        with turns.take():
            inside.append(number)
            assert len(inside) == 1
            order.append(number)
            inside.remove(number)

    threads = []
    with turns.take():
        for number in range(6):
            threads.append(threading.Thread(target=visitor, args=(number,)))
            threads[-1].start()
            while turns._last < number + 2:
                time.sleep(0.001)
    for thread in threads:
        thread.join()
    assert order == [0, 1, 2, 3, 4, 5]


def test_limits_are_checked_and_kept(folder: Path) -> None:
    with pytest.raises(ValueError, match="the limit side must be at least 1; got 0"):
        Limits(side=0)
    with pytest.raises(ValueError, match="the limit evaluated must be at least 16; got 15"):
        Limits(evaluated=15)
    small = Models([folder], Limits(images=2))
    assert "from 1 to 2; got 3" in refused(lambda: next(class_to_image.generate(small, NAME, "all", 3, *OWN, 0)))
    assert "from 1 to 2; got 3" in refused(lambda: next(compare.compare(small, "all", 3, 0, NAME, *OWN, NAME, *OWN)))


@pytest.mark.parametrize("text", ["/srv/models/x is broken", "cannot read '~/m/a.bin'", r"no C:\models\a", "(/etc/x)"])
def test_no_message_tells_a_path_of_the_server(text: str, caplog: pytest.LogCaptureFixture) -> None:
    def fail() -> None:
        with common.readable_errors():
            raise ValueError(text)

    assert refused(fail).startswith("This request failed on the server") and text in caplog.text
    assert common.PATH.search("no class is called 'T-shirt/top'; 2 / 3 and/or 1/2") is None


# ---- uploads ------------------------------------------------------------------------------------------------------


def png(image: Image.Image) -> bytes:
    buffer = BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


def claiming(width: int, height: int) -> bytes:
    """A small PNG file whose header says otherwise."""
    data = bytearray(png(Image.new("L", (4, 4))))
    data[16:24] = struct.pack(">II", width, height)
    data[29:33] = struct.pack(">I", zlib.crc32(data[12:29]))
    return bytes(data)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "not an image that can be read; send PNG, JPEG"),
        (b"hello", "not an image that can be read; send PNG, JPEG"),
        (b"<svg xmlns='http://www.w3.org/2000/svg'/>", "not an image that can be read"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "not an image that can be read"),
        (png(Image.effect_noise((64, 64), 50))[:900], "not an image that can be read"),
        (claiming(4097, 2), "has 4097 x 2 pixels; send at most 4096 a side"),
        (claiming(2, 5000), "has 2 x 5000 pixels; send at most 4096 a side"),
        (claiming(60_000, 60_000), "far too large; send at most 4096 a side"),
    ],
)
def test_what_is_no_image_or_too_large_is_refused(tmp_path: Path, data: bytes, message: str) -> None:
    (tmp_path / "x.png").write_bytes(data)
    with pytest.raises(ValueError, match=message):
        uploads.read_upload({"path": str(tmp_path / "x.png")}, 4096)


@pytest.mark.parametrize("nothing", [None, {}, {"path": None, "url": "data:image/png;base64,AAAA"}])
def test_no_upload_is_asked_for(nothing: Any) -> None:
    with pytest.raises(ValueError, match="upload an image or choose an example first"):
        uploads.read_upload(nothing, 4096)


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "L", "P", "1", "I;16"])
def test_any_kind_of_pixels_becomes_rgb(tmp_path: Path, mode: str) -> None:
    image = Image.fromarray(np.zeros((9, 7), np.uint16)) if mode == "I;16" else Image.new("RGB", (7, 9)).convert(mode)
    read = uploads.read_upload(upload(image, tmp_path / "x.png"), 4096)
    assert read.mode == "RGB" and read.size == (7, 9)


def test_a_photo_taken_sideways_is_read_upright(tmp_path: Path) -> None:
    upright = Image.effect_noise((24, 16), 60)
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was turned: rotate by 90 degrees clockwise to see it upright
    sent = upload(upright.transpose(Image.Transpose.ROTATE_90), tmp_path / "x.png", exif=exif)
    assert same(uploads.read_upload(sent, 4096), upright.convert("RGB"))


def test_an_enlarged_image_of_the_model_is_recognised_exactly(picture: Image.Image) -> None:
    shown = enlarge(picture)
    assert shown.size == (384, 384)
    small, exact = uploads.to_model_size(shown, (SIDE, SIDE))
    assert exact and same(small, picture)
    touched = shown.copy()
    touched.putpixel((100, 100), (1, 2, 3))
    for other in (touched, picture, shown.crop((0, 0, 384, 376)), shown.resize((100, 100))):
        small, exact = uploads.to_model_size(other, (SIDE, SIDE))
        assert not exact and small.size == (SIDE, SIDE)
    assert same(uploads.to_model_size(picture, (SIDE, SIDE))[0], picture)


# ---- the part to redraw -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "marks", [None, 7, "", "0000", LOWER + "/1111", "0000/0000/1111/111", "0000/0000/1111/112x", LOWER + "\n"]
)
def test_marks_of_another_shape_are_refused(models: Models, picture: Image.Image, tmp_path: Path, marks: Any) -> None:
    sent = upload(picture, tmp_path / "x.png")
    assert "The marks must be 4 rows of 4 cells" in refused(lambda: redraw(models, sent, marks=marks))


def test_no_marks_are_asked_for(models: Models, picture: Image.Image, tmp_path: Path) -> None:
    sent = upload(picture, tmp_path / "x.png")
    assert "Nothing would be redrawn" in refused(lambda: redraw(models, sent, marks="0000/0000/0000/0000"))


def test_the_first_marks_are_the_lower_half_and_can_be_read() -> None:
    assert painter.lower_half((4, 4)) == LOWER
    assert painter.read_cells(painter.lower_half((3, 2)), (3, 2)).tolist() == [[False] * 2, [False] * 2, [True] * 2]


def test_the_painter_shows_the_image_as_the_model_sees_it(models: Models, picture: Image.Image, tmp_path: Path) -> None:
    shown = edit.preview(models, NAME, upload(enlarge(picture), tmp_path / "x.png"))
    data = base64.b64decode(shown["image"].partition("base64,")[2])
    assert same(Image.open(BytesIO(data)), enlarge(picture)) and (shown["rows"], shown["columns"]) == (4, 4)
    assert edit.preview(models, NAME, None)["image"] == ""


# ---- edit ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("marks", [LOWER, "1001/0000/0110/1001", "1111/1001/1001/1111"])
def test_an_edit_is_the_pipelines_and_keeps_the_tokens_around_it(
    models: Models, pipeline: Any, picture: Image.Image, tmp_path: Path, marks: str
) -> None:
    events = redraw(models, upload(enlarge(picture), tmp_path / "x.png"), marks=marks, label="2")
    assert [e[1] for e in events[1:-1]] == [f"Step {i} of 3 ..." for i in (1, 2, 3)]
    (before, after), note, _ = events[-1]
    assert note.startswith("Redrawn ") and same(before, enlarge(picture)) and not same(before, after)
    mask = torch.from_numpy(painter.read_cells(marks, (4, 4)))
    arguments: dict[str, Any] = {"mask": mask, "class_labels": 2, "seed": 3}
    assert same(after, enlarge(pipeline.edit(picture, **arguments).images[0]))
    tokens = pipeline.edit(picture, output_type="latent", **arguments).images
    with torch.no_grad():
        given = pipeline.image_tokenizer.encode(image_to_tensor(picture, (SIDE, SIDE)).to(pipeline.device))
    layout = pipeline.image_tokenizer.layout
    kept = keep_pyramid(layout, 1 - mask.float()).to(given.device)
    assert torch.equal(tokens[:, kept], given[:, kept]) and not torch.equal(tokens[:, ~kept], given[:, ~kept])


@pytest.mark.parametrize("kind", ["own", "photo", "sideways", "palette"])
def test_the_printed_python_makes_the_same_edit(
    models: Models, picture: Image.Image, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    options: dict[str, Any] = {}
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (30, 50, 3), dtype=np.uint8))
    if kind == "own":
        image = enlarge(picture)
    elif kind == "sideways":
        options["exif"] = Image.Exif()
        options["exif"][0x0112] = 8
    elif kind == "palette":
        image = image.quantize(16)
    sent = upload(image, tmp_path / "image.png", **options)
    *_, ((_, after), _, text) = edit.edit(models, NAME, sent, "0110/1111/0000/1000", "Bag", *OTHER, 12, *PLAIN)
    assert ("NEAREST" in text) == (kind == "own")
    monkeypatch.chdir(tmp_path)
    exec(compile(text, "printed", "exec"), {})
    assert same(enlarge(Image.open("edited.png")), after)


def test_the_printed_python_names_only_what_is_not_the_models_own(
    models: Models, folder: Path, picture: Image.Image, tmp_path: Path
) -> None:
    text = redraw(models, upload(enlarge(picture), tmp_path / "x.png"))[-1][2]
    assert repr(str(folder)) in text and ".resize((8, 8), Image.Resampling.NEAREST)" in text
    assert "pipeline.edit(image, mask=mask, class_labels=None, seed=3)" in text and LOWER in text


@pytest.mark.parametrize("what", [edit.MARKS, *edit.GROWTH])
@pytest.mark.parametrize("paste", [False, True])
@pytest.mark.parametrize("kind", ["own", "photo"])
def test_out_painting_and_pasting_are_the_pipelines_and_their_python_does_the_same(
    models: Models,
    picture: Image.Image,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    what: str,
    paste: bool,
    kind: str,
) -> None:
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (300, 600, 3), dtype=np.uint8))
    sent = upload(enlarge(picture) if kind == "own" else image, tmp_path / "image.png")
    *_, ((before, after), told, text) = redraw(models, sent, how=(what, paste, 0.1))
    assert before.size == after.size and not same(before, after)
    assert told.startswith("Redrawn 50% in" if what == edit.MARKS else "Grown in")
    assert (LOWER in text, "paste_back=True, feather=0.1" in text) == (what == edit.MARKS, paste)
    if paste and kind == "photo":
        assert after.size == {"marks": (600, 300), "around": (900, 450), "above": (600, 450)}.get(what, after.size)
    monkeypatch.chdir(tmp_path)
    exec(compile(text, "printed", "exec"), {})
    assert same(enlarge(Image.open("edited.png")), after)


def test_the_page_edits_models_of_latents_too(tmp_path: Path) -> None:
    entry = model_entry("xar_fashion")
    tokenizer = create_model(str(entry.tokenizer), **entry.tiny_tokenizer)
    assemble(entry.build(**entry.tiny).eval(), tokenizer.eval(), {"head_steps": 3}).save_pretrained(tmp_path / "xar")
    models, side = Models([tmp_path / "xar"]), 16
    rows = "/".join(["1" * 8] * 4 + ["0" * 8] * 4)
    sent = upload(Image.new("RGB", (3 * side, 2 * side), "red"), tmp_path / "x.png")
    for what, size in ((edit.MARKS, (48, 32)), ("left", (72, 32))):
        *_, ((_, after), _, _) = edit.edit(models, "xar", sent, rows, "1", *OWN, 3, what, True, 0.0)
        assert after.size == enlarge(Image.new("RGB", size)).size


def test_an_edit_refuses_bad_input_in_words(models: Models, picture: Image.Image, tmp_path: Path) -> None:
    sent = upload(picture, tmp_path / "x.png")
    assert "Upload an image or choose an example first" in refused(lambda: redraw(models, None))
    assert "No class is called 'hat'" in refused(lambda: redraw(models, sent, label="hat"))
    assert "What is drawn must be one of marks, around" in refused(lambda: redraw(models, sent, how=("all", False, 0)))
    assert "Feather must be a number" in refused(lambda: redraw(models, sent, how=(edit.MARKS, True, 2)))
    assert "Seed must be" in refused(
        lambda: list(edit.edit(models, NAME, sent, LOWER, edit.FOLLOW, *OWN, None, *PLAIN))
    )


# ---- the page -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module", name="demo")
def _demo(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """The page; what gradio stores goes to a folder of the test's."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GRADIO_TEMP_DIR", str(tmp_path_factory.mktemp("gradio")))
        yield build_demo([folder])


@pytest.fixture(scope="module", name="address")
def _address(demo: Any) -> Iterator[str]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    _, address, _ = demo.launch(server_name="127.0.0.1", server_port=port, prevent_thread_lock=True, quiet=True)
    yield address.rstrip("/")
    demo.close(verbose=False)


def test_the_page_builds_and_offers_a_call_a_tab(demo: Any) -> None:
    assert set(demo.get_api_info()["named_endpoints"]) == {
        "/generate",
        "/text",  # of shipped models, as is the next
        "/video",
        "/reconstruct",
        "/edit",
        "/compare",
        "/evaluate",
    }
    dropdown = next(b for b in demo.blocks.values() if getattr(b, "elem_id", None) == "model")
    assert dropdown.value == NAME and dropdown.choices[0] == (NAME, NAME)


def test_building_the_page_writes_nothing_into_the_package(demo: Any) -> None:
    assert not list(Path(varkit.__file__).parent.rglob("*.pyi"))


def test_no_box_of_the_page_opens_uploads_by_itself(demo: Any) -> None:
    """gradio would open a broken file before the handler, and answer with a traceback."""
    boxes = [b for b in demo.blocks.values() if getattr(b, "elem_id", None) in ("edit-upload", "reconstruct-upload")]
    for box, count in zip(boxes, (3, 5), strict=True):
        readers = [f for f in demo.fns.values() if box in f.inputs]
        assert len(readers) == count and not any(f.preprocess for f in readers)


def test_short_and_long_requests_wait_in_two_lines_of_one_at_a_time(demo: Any) -> None:
    lanes = {f.api_name: f.concurrency_id for f in demo.fns.values()}
    assert [lanes[n] for n in ("generate", "reconstruct", "edit")] == ["network"] * 3
    assert [lanes[n] for n in ("compare", "evaluate")] == ["long"] * 2
    assert {f.concurrency_limit for f in demo.fns.values() if f.concurrency_id in ("network", "long")} == {1}


def call(address: str, name: str, data: list[Any]) -> str:
    """The last event of a call over HTTP, as gradio words it."""
    body = json.dumps({"data": data}).encode()
    request = urllib.request.Request(f"{address}/gradio_api/call/{name}", body, {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=60) as reply:
        event = json.load(reply)["event_id"]
    with urllib.request.urlopen(f"{address}/gradio_api/call/{name}/{event}", timeout=60) as reply:
        return reply.read().decode().strip().split("\n\n")[-1]


def send(address: str, data: bytes) -> dict[str, Any]:
    """Upload a file as the browser does."""
    head = b'--x\r\nContent-Disposition: form-data; name="files"; filename="x.png"\r\nContent-Type: image/png\r\n\r\n'
    kind = {"Content-Type": "multipart/form-data; boundary=x"}
    request = urllib.request.Request(f"{address}/gradio_api/upload", head + data + b"\r\n--x--\r\n", kind)
    with urllib.request.urlopen(request, timeout=60) as reply:
        return {"path": json.load(reply)[0], "meta": {"_type": "gradio.FileData"}}


def test_the_served_page_generates(models: Models, address: str) -> None:
    kind, data = call(address, "generate", [NAME, "all", 2, *OWN, 6]).split("\n")
    assert kind == "event: complete"
    images, scales, _, line = json.loads(data.removeprefix("data: "))
    *_, (expected, _, _, expected_line) = class_to_image.generate(models, NAME, "all", 2, *OWN, 6)
    assert line == expected_line and len(scales) == 3
    for entry, (image, caption) in zip(images, expected, strict=True):
        assert entry["caption"] == caption
        with urllib.request.urlopen(entry["image"]["url"], timeout=60) as reply:
            assert same(Image.open(BytesIO(reply.read())), image)


def test_the_served_page_edits_an_upload(models: Models, address: str, picture: Image.Image, tmp_path: Path) -> None:
    values = [LOWER, edit.FOLLOW, *OWN, 3, *PLAIN]
    answer = call(address, "edit", [NAME, send(address, png(enlarge(picture))), *values])
    assert answer.startswith("event: complete"), answer
    (_, after), note, _ = json.loads(answer.split("data: ")[1])
    assert note.startswith("Redrawn 50% in ")
    with urllib.request.urlopen(after["url"], timeout=60) as reply:
        shown = Image.open(BytesIO(reply.read()))
    assert same(shown, redraw(models, upload(enlarge(picture), tmp_path / "x.png"))[-1][0][1])


def test_the_served_page_answers_a_broken_upload_with_a_sentence(
    address: str, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    values = [LOWER, edit.FOLLOW, *OWN, 3, *PLAIN]
    answer = call(address, "edit", [NAME, send(address, b"no image at all"), *values])
    assert answer.startswith("event: error") and "This file is not an image that can be read" in answer
    assert "Traceback" not in caplog.text + "".join(capfd.readouterr())


def test_the_served_page_takes_no_file_above_its_limit(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import gradio

    serve, served = gradio.Blocks.launch, []

    def without_waiting(demo: Any, **options: Any) -> None:
        served.append((demo, serve(demo, **options, prevent_thread_lock=True, quiet=True)[1].rstrip("/")))

    monkeypatch.setattr(gradio.Blocks, "launch", without_waiting)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    launch(port=port, model=folder, limits=Limits(upload_mb=1))
    ((demo, address),) = served
    with pytest.raises(urllib.error.HTTPError) as refused:
        send(address, bytes(2**20 + 1))
    said = refused.value.read().decode()
    assert refused.value.code == 413 and "maximum" in said.lower() and "/" not in said
    assert send(address, bytes(2**20 - 4096))["path"]
    demo.close(verbose=False)


def test_the_served_page_reads_no_file_that_was_not_uploaded(
    address: str, picture: Image.Image, tmp_path: Path
) -> None:
    values = [LOWER, edit.FOLLOW, *OWN, 3, *PLAIN]
    answer = call(address, "edit", [NAME, upload(picture, tmp_path / "secret.png"), *values])
    assert answer.startswith("event: error") and "Redrawn" not in answer


def test_a_taken_port_is_said_in_words(folder: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(ValueError, match=f"cannot listen at 127.0.0.1:{port}: the port is taken"):
            launch(port=port, model=folder)


def test_a_model_that_is_not_there_is_said_in_words(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="neither a shipped model, nor a folder"):
        launch(model=tmp_path / "nothing")
