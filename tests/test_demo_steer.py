"""The tabs Control and Text of the demo, without a browser."""

from __future__ import annotations

import json
import shlex
import socket
import urllib.request
from collections.abc import Iterator
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

from tests.test_control import SMALL, tokenizer, var
from tests.test_controlar import of_text
from tests.test_controlar import tokenizer as text_tokenizer
from tests.test_demo import call, refused, same, save_tiny, send, upload
from tests.test_text import _encoder  # noqa: F401
from varkit import AutoPipeline, NextGroupSampler, Rng, TextToImagePipeline
from varkit.cli import app as command_line
from varkit.conditioning.extractors import build_extractor, map_of
from varkit.demo import class_to_image, control_map, steer, text
from varkit.demo.app import build_demo
from varkit.demo.common import MAX_PROMPT, Models, Takes, enlarge
from varkit.demo.limits import Limits
from varkit.pipelines.auto import assemble

transformers = pytest.importorskip("transformers", reason="the extra text is not installed")
pytest.importorskip("cv2", reason="the extra control is not installed")
pytest.importorskip("gradio", reason='the demo needs gradio: pip install "varkit[app]"')

OWN = (2.0, 1.0, 0, 1.0, False, 113)  # settings of the tiny models, in the order of the controls
OTHER = (1.5, 0.8, 12, 0.9, False, 113)
DRAWING = "/".join(["000000111111000000000000"] * 16)
"""Marks on the 16 x 24 cells of the tiny VAR."""
PROMPTS = [
    "a red cat on the mat",
    'it\'s a "red" cat; $(dog) `x`',
    "قطة حمراء على السجادة",
    "Ένας σκύλος, крот и कुत्ता 🦊",
    "--num 3\nsecond line",
]


def save_text(folder: Path, encoder: Path, **changes: Any) -> Path:
    """A tiny LlamaGen of texts, saved with its encoder."""
    pipe = TextToImagePipeline(
        of_text(**changes),
        text_tokenizer(),
        NextGroupSampler(guidance_scale=2.0),
        transformers.T5EncoderModel.from_pretrained(encoder),
        transformers.AutoTokenizer.from_pretrained(encoder),
    )
    pipe.save_pretrained(folder)
    return folder


def save_steered(folder: Path, **changes: Any) -> Path:
    """A tiny VAR that control images steer."""
    assemble(var(**changes), tokenizer(), {"guidance_scale": 2.0}).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module", name="folder")
def _folder(tmp_path_factory: pytest.TempPathFactory, encoder: Path) -> Path:
    folder = tmp_path_factory.mktemp("steer")
    save_tiny(folder / "plain")
    save_steered(folder / "steered")
    save_steered(folder / "kinds", control={**SMALL, "kinds": ["canny", "depth"]}, control_drop_rate=0.1)
    save_text(folder / "words", encoder, control=None)
    save_text(folder / "both", encoder)
    return folder


@pytest.fixture(scope="module", name="models")
def _models(folder: Path) -> Models:
    return Models([folder / name for name in ("plain", "steered", "kinds", "words", "both")])


@pytest.fixture(name="photo")
def _photo(tmp_path: Path) -> dict[str, Any]:
    """A photo in a file image.png, as it is called in printed commands."""
    pixels = np.zeros((50, 90, 3), np.uint8)
    pixels[10:40, 20:70] = (200, 40, 40)
    return upload(Image.fromarray(pixels), tmp_path / "image.png")


def steered(
    models: Models, name: str, sent: Any, source: str, *, marks: Any = "", kind: Any = None, strength: Any = 1.0,
    choice: Any = "2", prompt: Any = "", num: Any = 3, settings: Any = OWN, seed: Any = 7,
) -> list[Any]:  # fmt: skip
    """All that the tab yields."""
    values = (sent, source, marks, kind, strength, choice, prompt, num, *settings, seed)
    return list(steer.generate(models, name, *values))


def repeated(line: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> list[Image.Image]:
    """What the printed command line draws, enlarged, run where image.png and map.png lie."""
    monkeypatch.chdir(folder)
    *words, _ = shlex.split(line)[1:]
    done = CliRunner().invoke(command_line, [*words, "out"])
    assert done.exit_code == 0, done.output + repr(done.exception)
    return [enlarge(Image.open(path)) for path in sorted((folder / "out").iterdir())]


# ---- which model is offered where ---------------------------------------------------------------------------------


def test_models_say_what_they_take(models: Models) -> None:
    found = {name: models.takes(name) for name in models.names}
    assert found == {
        "plain": Takes(text=False, control=False, always=False),
        "steered": Takes(text=False, control=True, always=True),
        "kinds": Takes(text=False, control=True, always=False),
        "words": Takes(text=True, control=False, always=False),
        "both": Takes(text=True, control=True, always=True),
    }
    opened = models.open("both")
    assert "control" in opened.transformer.takes and opened.transformer.condition == "text"


def test_some_of_the_models_are_opened_and_run_with_the_others(models: Models) -> None:
    some = models.only(["kinds", "words"])
    assert some.names == ["kinds", "words"] and some.turns is models.turns
    assert some.open("words") is models.open("words") and some.limits is models.limits
    assert refused(lambda: next(class_to_image.generate(some, "plain", "all", 1, *OWN, 0))) == (
        "That model is not on offer; choose one of kinds, words"
    )


@pytest.mark.parametrize("name", ["nope", "", "../steer/plain", None])
def test_a_name_not_on_offer_never_reaches_the_disk(
    folder: Path, monkeypatch: pytest.MonkeyPatch, name: Any, photo: Any
) -> None:
    opened: list[Any] = []
    monkeypatch.setattr(AutoPipeline, "from_pretrained", opened.append)
    fresh = Models([folder / "steered"])
    for one in (
        lambda: steered(fresh, name, photo, "canny"),
        lambda: steer.preview(fresh, name, photo, "canny"),
        lambda: steer.refresh(fresh, name, "canny"),
        lambda: list(text.generate(fresh, name, "a cat", 1, *OWN, 0)),
        lambda: text.refresh(fresh, name),
    ):
        assert refused(one).startswith("That model is not on offer")
    assert not opened


# ---- text -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("prompt", PROMPTS, ids=["words", "quotes", "arabic", "scripts", "lines"])
def test_a_prompt_of_any_script_draws_what_the_pipeline_and_the_printed_command_draw(
    models: Models, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, prompt: str
) -> None:
    events = list(text.generate(models, "words", f"  {prompt}\n", 3, *OTHER, 5))
    images, told, line = events[-1]
    assert events[0][1] == "Starting ..." and told.startswith("**3 images** of 8 x 6 pixels")
    settings = {"guidance_scale": 1.5, "temperature": 0.8, "top_k": 12, "top_p": 0.9}
    ours = models.open("words")([prompt] * 3, rng=Rng.from_seed(5, 3), **settings).images
    assert all(same(a, enlarge(b)) for a, b in zip(images, ours, strict=True))
    again = repeated(line, tmp_path, monkeypatch)
    assert all(same(a, b) for a, b in zip(images, again, strict=True))


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ("", "the prompt is empty"),
        (" \n\t\u3000", "the prompt is empty"),
        (None, "the prompt is empty"),
        (7, "the prompt is empty"),
        (["a"], "the prompt is empty"),
        ("a" * (MAX_PROMPT + 1), f"has {MAX_PROMPT + 1} characters; write at most {MAX_PROMPT}"),
        ("日本語", "nothing is left of '日本語' when it is cleaned"),  # by T5's cleaning
    ],
    ids=["empty", "space", "none", "number", "list", "long", "cleaned"],
)
def test_prompts_that_say_nothing_are_refused_in_words(models: Models, prompt: Any, message: str) -> None:
    assert message in refused(lambda: list(text.generate(models, "words", prompt, 1, *OWN, 0)))
    assert message in refused(lambda: steered(models, "both", None, "canny", prompt=prompt)) or "日" in str(prompt)


@pytest.mark.parametrize(("num", "seed"), [(0, 0), (17, 0), (1.5, 0), (1, -1), (1, None)])
def test_numbers_of_the_text_tab_are_checked(models: Models, num: Any, seed: Any) -> None:
    assert "must be a whole number" in refused(lambda: list(text.generate(models, "words", "a cat", num, *OWN, seed)))


def test_an_encoder_that_cannot_be_opened_tells_no_path(tmp_path: Path, folder: Path) -> None:
    part = AutoPipeline.from_pretrained(folder / "words")
    parts = (part.transformer, part.image_tokenizer, part.sampler)
    TextToImagePipeline(*parts, text_encoder_name=str(tmp_path / "gone")).save_pretrained(tmp_path / "m")
    told = refused(lambda: list(text.generate(Models([tmp_path / "m"]), "m", "a cat", 1, *OWN, 0)))
    assert told.startswith("This request failed on the server") and str(tmp_path) not in told


# ---- control --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("source", ["canny", "map", "drawn"])
@pytest.mark.parametrize("strength", [1.0, 0.35])
def test_control_draws_what_the_pipeline_and_the_printed_command_draw(
    models: Models, photo: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, source: str, strength: float
) -> None:
    events = steered(models, "steered", photo, source, marks=DRAWING, strength=strength, settings=OTHER)
    made, images, scales, told, line = events[-1]
    pipe = models.open("steered")
    if source == "canny":
        assert same(made, map_of(build_extractor("canny"), Image.open(photo["path"]), (16, 24)))
    elif source == "drawn":
        assert set(np.flatnonzero(np.asarray(made).any(0))) == set(range(6, 12)) and np.asarray(made).max() == 255
    assert made.size == (24, 16) and all(same(event[0], made) for event in events)
    assert [caption for _, caption in scales] == ["1 x 1", "2 x 2", "3 x 4", "8 x 12"] and "**3 images**" in told
    settings = {"guidance_scale": 1.5, "temperature": 0.8, "top_k": 12, "top_p": 0.9}
    given = {"control": made, "control_strength": strength, "rng": Rng.from_seed(7, 3)}
    ours = pipe([2, 2, 2], **given, **settings).images
    assert [caption for _, caption in images] == ["class 2"] * 3
    assert all(same(a, enlarge(b)) for (a, _), b in zip(images, ours, strict=True))
    free = pipe([2, 2, 2], control_strength=0, rng=Rng.from_seed(7, 3), **settings).images
    assert not all(same(enlarge(a), enlarge(b)) for a, b in zip(ours, free, strict=True))
    made.save(tmp_path / "map.png")
    again = repeated(line, tmp_path, monkeypatch)
    assert all(same(a, b) for (a, _), b in zip(images, again, strict=True))


def test_of_several_kinds_the_chosen_one_steers(models: Models, photo: Any, tmp_path: Path) -> None:
    made, images, *_, line = steered(models, "kinds", photo, "canny", kind="depth")[-1]
    ours = models.open("kinds")([2] * 3, control={"depth": made}, rng=Rng.from_seed(7, 3), guidance_scale=2.0).images
    assert all(same(a, enlarge(b)) for (a, _), b in zip(images, ours, strict=True))
    assert "--control depth=image.png --extract canny" in line
    for kind in (None, "hed", ["depth"]):
        told = refused(lambda kind=kind: steered(models, "kinds", photo, "canny", kind=kind))  # type: ignore[misc]
        assert told.startswith("The kind of control must be one of canny, depth")


def test_texts_are_steered_too(models: Models, photo: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    prompt = "قطة red"
    made, images, _, _, line = steered(models, "both", photo, "canny", prompt=prompt, choice=None)[-1]
    ours = models.open("both")([prompt] * 3, control=made, rng=Rng.from_seed(7, 3), guidance_scale=2.0).images
    assert all(same(a, enlarge(b)) for a, b in zip(images, ours, strict=True))
    assert all(same(a, b) for a, b in zip(images, repeated(line, tmp_path, monkeypatch), strict=True))


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "I;16"])
@pytest.mark.parametrize("size", [(24, 16), (7, 90), (600, 400)])
def test_maps_of_every_size_and_mode_are_taken(models: Models, tmp_path: Path, mode: str, size: Any) -> None:
    values = np.random.default_rng(0).integers(0, 2, size[::-1]).astype(np.uint8) * 255
    image = Image.fromarray(values.astype(np.uint16) * 257) if mode == "I;16" else Image.fromarray(values).convert(mode)
    sent = upload(image, tmp_path / "map.png")
    made = steer.preview(models, "steered", sent, "map")
    assert made.size == (24, 16) and made.mode == "RGB"
    if size == (24, 16):
        assert np.array_equal(np.asarray(made.convert("L")), values)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"source": "seg"}, "Where the control comes from must be one of canny"),
        ({"source": None}, "Where the control comes from must be one of canny"),
        ({"source": "/etc/passwd"}, "This request failed on the server"),
        ({"sent": None}, "Upload an image"),
        ({"sent": None, "source": "map"}, "Upload an image"),
        ({"source": "drawn", "marks": DRAWING.replace("1", "0")}, "Nothing is drawn yet"),
        ({"source": "drawn", "marks": "01/10"}, "The marks must be 16 rows of 24 cells"),
        ({"source": "drawn", "marks": None}, "The marks must be 16 rows of 24 cells"),
        ({"strength": -0.1}, "Strength must be a number from 0 to 2"),
        ({"strength": 2.1}, "Strength must be a number from 0 to 2"),
        ({"strength": float("nan")}, "Strength must be a number from 0 to 2"),
        ({"strength": "1"}, "Strength must be a number from 0 to 2"),
        ({"num": 17}, "Number of images must be"),
        ({"choice": "3"}, "Class must be"),
        ({"choice": None}, "No class is called 'None'"),
        ({"seed": -1}, "Seed must be"),
        ({"settings": (2.0, 0, 0, 1.0, False, 113)}, "Temperature must be"),
    ],
)
def test_what_cannot_steer_is_refused_in_words(
    models: Models, photo: Any, changes: dict[str, Any], message: str
) -> None:
    given = {"sent": photo, "source": "canny", **changes}
    told = refused(lambda: steered(models, "steered", given.pop("sent"), given.pop("source"), **given))
    assert told.startswith(message), told


def test_a_drawing_of_everything_is_a_map_like_another(models: Models) -> None:
    made = steered(models, "steered", None, "drawn", marks=DRAWING.replace("0", "1"))[-1][0]
    assert np.asarray(made).min() == 255


def test_uploads_of_control_have_the_limits_of_the_page(folder: Path, tmp_path: Path) -> None:
    small = Models([folder / "steered"], Limits(side=40))
    wide, broken = upload(Image.new("L", (41, 9)), tmp_path / "wide.png"), {"path": str(tmp_path / "broken.png")}
    (tmp_path / "broken.png").write_text("no image")
    for source in ("canny", "map"):
        for look in (steer.preview, lambda *values: steered(values[0], *values[1:])):
            assert "41 x 9 pixels; send at most 40" in refused(lambda: look(small, "steered", wide, source))  # noqa: B023
            assert "not an image that can be read" in refused(lambda: look(small, "steered", broken, source))  # noqa: B023


def test_only_what_the_server_has_is_offered(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("VARKIT_WEIGHTS", str(tmp_path))
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    assert control_map.sources() == ["canny", "map", "drawn"]
    (tmp_path / "ControlNetHED.pth").touch()
    assert control_map.sources() == ["canny", "hed", "map", "drawn"]
    monkeypatch.setattr(control_map, "find_spec", lambda name: None)
    assert control_map.sources() == ["hed", "map", "drawn"]


def test_another_model_brings_its_own_boxes(models: Models) -> None:
    board, kind, picker, prompt, num, *settings = steer.refresh(models, "kinds", "drawn")
    assert (board["rows"], board["columns"], board["visible"]) == (16, 24, True) and "1" not in board["value"]
    assert kind["choices"] == ["canny", "depth"] and kind["visible"] and len(settings) == len(OWN)
    assert picker["visible"] and not prompt["visible"] and num == 8
    board, kind, picker, prompt, num, *_ = steer.refresh(models, "both", "canny")
    assert (
        board["visible"] == "hidden" and not (kind["visible"] or picker["visible"]) and prompt["visible"] and num == 4
    )
    assert steer.boxes("drawn") == ({"visible": False, "__type__": "update"}, {"visible": True, "__type__": "update"})
    assert steer.preview(models, "both", None, "canny") is None
    number, guidance, *_ = text.refresh(models, "words")
    assert number == 4 and guidance["value"] == 2.0


# ---- the page -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module", name="demo")
def _demo(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GRADIO_TEMP_DIR", str(tmp_path_factory.mktemp("gradio")))
        yield build_demo([folder / name for name in ("words", "steered", "kinds", "both", "plain")])


def blocks(demo: Any) -> dict[str, Any]:
    return {b.elem_id: b for b in demo.blocks.values() if getattr(b, "elem_id", None)}


def test_each_tab_offers_the_models_that_it_can_ask(demo: Any) -> None:
    assert {"/control", "/text", "/generate"} <= set(demo.get_api_info()["named_endpoints"])
    found = {name: [value for _, value in block.choices] for name, block in blocks(demo).items() if "model" in name}
    assert found["model"][:2] == ["kinds", "plain"] and not {"words", "steered", "both"} & set(found["model"])
    assert found["text-model"][0] == "words" and not {"plain", "steered", "both"} & set(found["text-model"])
    assert found["control-model"] == ["steered", "kinds", "both"]
    assert next(b for b in demo.blocks.values() if b.get_block_name() == "tabs").selected == "text"
    lanes = {f.api_name: (f.concurrency_id, f.concurrency_limit) for f in demo.fns.values()}
    assert lanes["control"] == lanes["text"] == ("network", 1)
    readers = [f for f in demo.fns.values() if blocks(demo)["control-upload"] in f.inputs]
    assert len(readers) == 4 and not any(f.preprocess for f in readers)


def test_without_such_models_there_is_no_such_tab_and_without_classes_no_other(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("varkit.pipelines.auto.zoo_models", list)
    plain = build_demo([folder / "plain"])
    assert not {"/control", "/text"} & set(plain.get_api_info()["named_endpoints"])
    only = build_demo([folder / "both"])
    assert set(only.get_api_info()["named_endpoints"]) == {"/control"}


def test_the_served_page_steers_and_writes(demo: Any, models: Models, photo: Any, folder: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    _, address, _ = demo.launch(server_name="127.0.0.1", server_port=port, prevent_thread_lock=True, quiet=True)
    address = address.rstrip("/")
    try:
        sent = send(address, Path(photo["path"]).read_bytes())
        rest = ["canny", "", None, 1.0, "2", "", 3, *OWN, 7]
        answer = call(address, "control", ["steered", sent, *rest])
        assert answer.startswith("event: complete"), answer
        made, images, _, told, line = json.loads(answer.split("data: ")[1])
        ours = steered(models, "steered", photo, "canny")[-1]
        assert line == ours[-1] and len(images) == 3 and "**3 images**" in told
        for url, image in ((made["url"], ours[0]), (images[0]["image"]["url"], ours[1][0][0])):
            with urllib.request.urlopen(url, timeout=60) as reply:
                assert same(Image.open(BytesIO(reply.read())).convert(image.mode), image)
        answer = call(address, "control", ["steered", send(address, b"no image"), *rest])
        assert answer.startswith("event: error") and "not an image that can be read" in answer
        answer = call(address, "control", ["steered", photo, *rest])  # a file that was not sent
        assert answer.startswith("event: error") and "images**" not in answer
        settings = [*OWN[:-1], 12]
        answer = call(address, "text", ["words", PROMPTS[2], 2, *settings, 1])
        assert answer.startswith("event: complete") and len(json.loads(answer.split("data: ")[1])[0]) == 2
        answer = call(address, "text", ["words", "  ", 2, *settings, 1])
        assert answer.startswith("event: error") and "the prompt is empty" in answer and str(folder) not in answer
    finally:
        demo.close(verbose=False)
