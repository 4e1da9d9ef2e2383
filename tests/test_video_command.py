"""`varkit sample` of models of clips: what is written, what is carried along, what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

from tests.test_models import tiny_pair
from tests.test_video_pipeline import NAMES, SIDE, clip, parts
from varkit import NextGroupSampler
from varkit.cli import app
from varkit.commands import common
from varkit.data.video import open_videos
from varkit.data.video_writing import write_video
from varkit.pictures import read_settings, titled_grids
from varkit.pipelines.auto import assemble
from varkit.pipelines.class_to_video import ClassToVideoPipeline
from varkit.pipelines.labels import Labelled

RUN = CliRunner()


@pytest.fixture(scope="module", name="pipe")
def _pipe() -> ClassToVideoPipeline:
    pipe = ClassToVideoPipeline(*parts(2), NextGroupSampler(guidance_scale=2.0), NAMES)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture(autouse=True)
def _opened(pipe: ClassToVideoPipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is opened, whatever the name: parts whose places are no file's."""
    monkeypatch.setattr("varkit.commands.sample.open_pipeline", lambda *_: pipe)


def sample(*words: Any) -> Any:
    return RUN.invoke(app, ["sample", "clips", *map(str, words)])


def said(result: Any) -> dict[str, Any]:
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)


def refused(*words: Any) -> str:
    result = sample(*words)
    assert result.exit_code == 2 and result.stderr.startswith("error: ") and result.stderr.count("\n") == 1
    return result.stderr


@pytest.mark.parametrize("ending", ["gif", "webp", "mp4"])
def test_one_clip_is_one_file_with_its_settings(ending: str, tmp_path: Path) -> None:
    pytest.importorskip("av", reason="the extra video is not installed")
    out = tmp_path / f"a.{ending}"
    told = said(sample("--class", "bag", "--seed", 3, "--out", out, "--fps", 4, "--zoom", 2, "--top-p", 0.8, "--json"))
    assert told["files"] == [str(out)] and told["classes"] == [2]
    videos = open_videos(out)
    assert videos.num_frames(0) == 2 and videos.size(0) == (2 * SIDE, 2 * SIDE)
    found = read_settings(out)
    assert found == told["settings"] | {"num": 1, "classes": [2]}
    assert found["seed"] == 3 and found["fps"] == 4 and found["top_p"] == 0.8 and found["model"] == "clips"


def test_an_archive_a_strip_and_files_hold_the_same_clips(tmp_path: Path, pipe: ClassToVideoPipeline) -> None:
    options = ("--class", "0,1", "--num", 3, "--seed", 5)
    said(sample(*options, "--out", tmp_path / "x.npz", "--json"))
    with np.load(tmp_path / "x.npz") as archive:
        clips, labels = archive["arr_0"], archive["arr_1"]
    assert clips.shape == (3, 2, SIDE, SIDE, 3) and clips.dtype == np.uint8 and labels.tolist() == [0, 1, 0]
    direct = pipe([0, 1, 0], seed=5, output_type="np").videos
    assert np.array_equal(clips, (direct * 255).round().astype(np.uint8))
    said(sample(*options, "--out", tmp_path / "strip.png", "--batch-size", 2, "--json"))
    with Image.open(tmp_path / "strip.png") as image:
        strip = np.asarray(image)
    step = SIDE + 2
    assert strip.shape == (3 * step + 2, 2 * step + 2, 3)  # a clip a row, a frame a column
    assert np.array_equal(strip[2 + step : 2 + step + SIDE, 2 + step : 2 + step + SIDE], clips[1, 1])
    assert read_settings(tmp_path / "strip.png")["classes"] == [0, 1]
    told = said(sample(*options, "--out", f"{tmp_path / 'many'}/", "--format", "webp", "--json"))
    names = [Path(f).name for f in told["files"]]
    assert names == ["000000.webp", "000001.webp", "000002.webp"]
    about = read_settings(tmp_path / "many" / names[1])
    assert about["index"] == 1 and about["class"] == 1 and about["seed"] == 5
    again = open_videos(tmp_path / "many" / names[1]).clip(0, 2).numpy()
    assert np.abs(again.astype(int) - clips[1]).mean() < 12  # what WebP loses of 8x8 pixels of noise


def test_several_clips_play_side_by_side_over_their_names(tmp_path: Path) -> None:
    out = tmp_path / "a.webp"
    told = said(sample("--num", 3, "--out", out, "--json"))
    assert told["classes"] == [0, 1, 2] and open_videos(out).num_frames(0) == 2
    height, width = open_videos(out).size(0)
    assert width >= 3 * SIDE and height > SIDE + 10 and height % 2 == width % 2 == 0
    white = Image.new("RGB", (40, 8), "white")
    sheets = list(titled_grids([[white] * 2] * 2, ["a pullover, diagonal", "b"], 2))
    pixels = np.asarray(sheets[0]).min(2)  # black letters alone
    half = pixels.shape[1] // 2
    assert len(sheets) == 2 and pixels[:12].min() == 255 and pixels[12:, :half].min() < 128 > pixels[12:, half:].min()
    assert pixels[12:24, :half].min() < 128 > pixels[24:36, :half].min() and pixels[24:, half:].min() == 255  # lines


@pytest.mark.parametrize("kind", ["webp", "png", "folder"])
def test_a_clip_is_continued(kind: str, tmp_path: Path, pipe: ClassToVideoPipeline) -> None:
    given = clip(pipe, 3)[0]
    source, count = tmp_path / f"given.{kind}", 3
    if kind == "webp":
        write_video(given, source, lossless=True)
    elif kind == "png":
        Image.fromarray(given[0].numpy()).save(source)
        count = 1
    else:
        source.mkdir()
        for number, frame in enumerate(given.numpy()):
            Image.fromarray(frame).save(source / f"{number}.png")
    out = tmp_path / "x.npz"
    told = said(sample("--continue", source, "--context", 1, "--frames", 5, "--out", out, "--json"))
    with np.load(out) as archive:
        made, labels = archive["arr_0"], archive["arr_1"]
    assert made.shape[:2] == (1, 5) and np.array_equal(made[0, :count], given[:count]) and labels.tolist() == [-1]
    expected = {"continue": source.name, "given": count, "context_frames": 1, "num_frames": 5}
    assert expected.items() <= told["settings"].items() and told["classes"] == [None]
    if kind == "webp":
        said(sample("--continue", source, "--given", 1, "--num", 2, "--class", 1, "--out", out, "--json"))
        with np.load(out) as archive:
            assert archive["arr_0"].shape[:2] == (2, 2) and (archive["arr_0"][:, 0] == given[0].numpy()).all()


def test_what_cannot_be_is_one_line(tmp_path: Path, pipe: ClassToVideoPipeline) -> None:
    for words, message in (
        (("--prompt", "a boot"), "--prompt is of images; clips draws clips"),
        (("--best-of", 4, "--classifier", "x"), "--best-of is of images"),
        (("--image", "a.png"), "--image is of images"),
        (("--out", "a.wmv"), "must end in .png (a grid), .npz, or be a folder; of clips .mp4"),
        (("--out", "a.gif", "--fps", 60), "for .gif in (0, 50]; got 60"),
        (("--out", "a.gif", "--format", "webp"), "--format is of the files in a folder"),
        (("--out", "d/", "--format", "wmv"), "--format must be one of mp4"),
        (("--given", 2), "--given goes with --continue"),
        (("--continue", tmp_path / "none.mp4"), "none.mp4 does not exist"),
        (("--frames", 9, "--context", 2), "1 to 1 frames can be read of a clip of 2; got 2"),
        (("--class", "Boott"), "did you mean 'boot'"),
        (("--class", 4), "class 4 does not exist"),
        (("--solver", "heun"), "has no setting solver"),
    ):
        assert message in refused("--out", tmp_path / "x.npz", *words), words
    write_video(clip(pipe, 3)[0], tmp_path / "a.webp")
    assert "--given 4: " in refused("--continue", tmp_path / "a.webp", "--given", 4)
    assert "more than 3 are needed" in refused("--continue", tmp_path / "a.webp", "--frames", 3)
    assert not (tmp_path / "x.npz").exists()


def test_a_saved_model_is_opened_by_its_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("varkit.commands.sample.open_pipeline", common.open_pipeline)
    assemble(*tiny_pair("nbp_moving_fashion"), {}).save_pretrained(tmp_path / "model")
    words = ["sample", str(tmp_path / "model"), "--num", "2", "--out", str(tmp_path / "x.npz"), "--json"]
    assert said(RUN.invoke(app, words))["classes"] == [0, 1]
    with np.load(tmp_path / "x.npz") as archive:
        assert archive["arr_0"].shape == (2, 5, 8, 8, 3)
    predict = tmp_path / "predict"
    assemble(*tiny_pair("larp_moving_fashion_frames"), {}).save_pretrained(predict)
    assert "predicts what follows first frames: give --continue CLIP" in refused_by(predict)
    Image.new("RGB", (30, 20), "red").save(tmp_path / "a.png")
    assert "knows no classes: leave --class out" in refused_by(
        predict, "--continue", tmp_path / "a.png", "--class", "0"
    )


def refused_by(folder: Path, *words: Any) -> str:
    result = RUN.invoke(app, ["sample", str(folder), "--out", str(folder / "x.npz"), *map(str, words)])
    assert result.exit_code == 2
    return result.stderr


def test_models_of_images_take_no_options_of_clips(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("varkit.commands.sample.open_pipeline", common.open_pipeline)
    for words, message in (
        (("--frames", 9), "--frames is of clips; fashion-llamagen draws images"),
        (("--continue", "a.mp4"), "--continue is of clips"),
        (("--out", tmp_path / "a.gif"), "a.gif is a clip; fashion-llamagen draws images"),
    ):
        result = RUN.invoke(app, ["sample", "fashion-llamagen", *map(str, words)])
        assert result.exit_code == 2 and message in result.stderr


def test_steps_are_shown_on_a_terminal(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Any] = []

    class Bar:
        def __init__(self, **_: Any) -> None:
            self.total, self.count = None, 0
            seen.append(self)

        def __enter__(self) -> Bar:
            return self

        def __exit__(self, *_: Any) -> None: ...

        def set_postfix(self, **_: Any) -> None: ...

        def update(self) -> None:
            self.count += 1

    monkeypatch.setattr("tqdm.tqdm", Bar)
    said(sample("--class", 0, "--num", 3, "--batch-size", 2, "--frames", 3, "--out", tmp_path / "x.npz", "--json"))
    assert seen[-1].count == seen[-1].total == 2 * 2 * 32  # batches, windows, tokens


@pytest.mark.parametrize(
    ("text", "names"),
    [
        ("bag, diagonal", ["bag, diagonal"]),
        ("Bag, Diagonal,2,bag", ["Bag, Diagonal", "2", "bag"]),
        ("bag,bag, diagonal , a, b, c", ["bag", "bag, diagonal", "a, b, c"]),
        ("bag, vertical", ["bag", "vertical"]),
    ],
)
def test_commas_within_names_of_classes_separate_nothing(text: str, names: list[str]) -> None:
    pipe = Labelled()
    pipe.config = SimpleNamespace(id2label={"0": "bag", "1": "bag, diagonal", "2": "a, b, c", "3": "a"})  # type: ignore[attr-defined]
    assert pipe.split_labels(text) == names
