"""The tab Video of the demo, without a browser."""

from __future__ import annotations

import json
import shlex
import socket
import struct
import urllib.error
import urllib.request
import wave
from collections.abc import Iterator
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

from tests.test_demo import call, refused, save_tiny
from tests.test_models import tiny_pair
from varkit import NextGroupSampler, Rng
from varkit.cli import app as command_line
from varkit.data.video import open_videos
from varkit.data.video_writing import write_video
from varkit.demo import clip_files, clip_request, video
from varkit.demo.app import build_demo
from varkit.demo.common import Models, Takes
from varkit.demo.limits import Limits
from varkit.pictures import read_settings
from varkit.pipelines.class_to_video import ClassToVideoPipeline
from varkit.pipelines.clips import read_frames

av = pytest.importorskip("av", reason="the extra video is not installed")
pytest.importorskip("gradio", reason='the demo needs gradio: pip install "varkit[app]"')

FRAMES, SIDE, ZOOM, COUNTS = 5, 8, 16, [1, 3]
"""Of the tiny model of blocks: frames at once, pixels a side, how often it is enlarged, first frames it can read."""
OWN = (2.0, 1.0, 0, 1.0, False, 12)
OTHER = (1.5, 0.8, 12, 0.9, False, 12)
CHANGED = {"guidance_scale": 1.5, "temperature": 0.8, "top_k": 12, "top_p": 0.9}
UNGUIDED = (1.0, 1.0, 0, 1.0, False, 6)
NAMES = {"0": "boot, diagonal", "1": "coat, level", "2": "bag, level"}


def save_clips(folder: Path, name: str = "nbp_moving_fashion", guidance: float = 2.0) -> Path:
    """A tiny model of clips."""
    transformer, tokenizer = tiny_pair(name)
    names = NAMES if transformer.num_classes else None
    ClassToVideoPipeline(transformer, tokenizer, NextGroupSampler(guidance_scale=guidance), names).save_pretrained(
        folder
    )
    return folder


@pytest.fixture(scope="module", name="folder")
def _folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("clips")
    save_clips(folder / "blocks")
    save_clips(folder / "whole", "larp_moving_fashion")
    save_clips(folder / "frames", "larp_moving_fashion_frames", 1.0)
    save_tiny(folder / "plain")
    return folder


@pytest.fixture(scope="module", name="models")
def _models(folder: Path) -> Models:
    return Models([folder / name for name in ("blocks", "whole", "frames", "plain")])


@pytest.fixture(name="kept")
def _kept(tmp_path: Path) -> str:
    """Where the page keeps its files."""
    return str(tmp_path / "kept")


def moving(frames: int, side: int = 12, wide: int = 20) -> np.ndarray:
    """A square that moves: uint8 (T, H, W, 3)."""
    clip = np.full((frames, side, wide, 3), 40, np.uint8)
    for number in range(frames):
        clip[number, 3:8, 2 + number % 10 : 7 + number % 10] = (220, 90, 30)
    return clip


def sent(path: Path, frames: int = 7, fps: float = 8, **options: Any) -> dict[str, Any]:
    """A clip as gradio hands over an upload."""
    write_video(moving(frames), path, fps, **options)
    return as_upload(path)


def as_upload(path: Path) -> dict[str, Any]:
    return {"path": str(path), "orig_name": path.name, "meta": {"_type": "gradio.FileData"}}


def drawn(
    models: Models, kept: str, name: str = "blocks", upload: Any = None, *, where: Any = "first", read: Any = 1,
    choice: Any = "2", frames: Any = FRAMES, fps: Any = 8, settings: Any = OWN, seed: Any = 7,
) -> list[Any]:  # fmt: skip
    """All that the tab yields."""
    return list(video.generate(models, kept, name, upload, where, read, choice, frames, fps, *settings, seed))


def pixels_of(path: Any) -> np.ndarray:
    """uint8 (T, H, W, 3) of a file, small again."""
    videos = open_videos(path)
    return videos.clip(0, videos.num_frames(0)).numpy()


def repeated(line: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The file that the printed command writes, run where the clip lies that was sent."""
    monkeypatch.chdir(folder)
    words = shlex.split(line)[1:]
    done = CliRunner().invoke(command_line, words)
    assert done.exit_code == 0, done.output + repr(done.exception)
    return folder / words[words.index("--out") + 1]


def check_repeats(events: list[Any], folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The printed command and the printed Python write what the page plays, with the same settings in it."""
    played, _, _, _, line, python = events[-1]
    again = repeated(line, folder, monkeypatch)
    assert np.array_equal(pixels_of(again), pixels_of(played))
    assert read_settings(again) == read_settings(played)
    again.unlink()
    exec(python, {})
    assert np.array_equal(pixels_of(again), pixels_of(played))


def near(played: np.ndarray, frames: Any) -> bool:
    """Whether a file shows these small frames, but for what its format loses."""
    small = np.stack([np.asarray(frame) for frame in frames])
    shown = played.reshape(len(played), SIDE, ZOOM, SIDE, ZOOM, 3).mean((2, 4))
    return shown.shape == small.shape and bool(np.abs(shown - small).mean() < 6)


# ---- clips of classes ---------------------------------------------------------------------------------------------


def test_models_of_clips_are_told_from_those_of_images(models: Models) -> None:
    clips = Takes(text=False, control=False, always=False, clips=True)
    assert [models.takes(name) for name in ("blocks", "whole", "frames")] == [clips] * 3
    assert not models.takes("plain").clips


@pytest.mark.parametrize(("frames", "choice", "settings"), [(FRAMES, "2", OWN), (9, "boot, diagonal", OTHER)])
def test_a_clip_is_what_the_pipeline_and_the_printed_lines_draw(
    models: Models, kept: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, frames: int, choice: str, settings: Any
) -> None:
    events = drawn(models, kept, choice=choice, frames=frames, settings=settings, fps=5)
    played, mp4, gif, told, line, _ = events[-1]
    windows = (frames - 1) // 4
    assert told.startswith(f"**{frames} frames** of 8 x 8 pixels") and f"{6 + 4 * (windows - 1)} blocks" in told
    assert mp4["value"] == played and played.endswith("/varkit-clip.mp4") and gif["value"].endswith("/varkit-clip.gif")
    label = 2 if choice == "2" else 0
    changed = {} if settings == OWN else CHANGED
    ours = models.open("blocks")([label], num_frames=frames, rng=Rng.from_seed(7, 1), **changed).videos[0]
    assert near(pixels_of(played), ours) and near(pixels_of(gif["value"]), ours)
    for path in (played, gif["value"]):
        found = read_settings(path)
        assert {"seed": 7, "fps": 5, "classes": [label], "num": 1}.items() <= found.items()
        assert found["guidance_scale"] == settings[0] and found.get("num_frames") == (None if frames == FRAMES else 9)
    assert open_videos(played).rate(0) == 5
    assert f"--class {label} " in line and ("--frames 9" in line) == (frames == 9) and "--fps 5 --zoom 16" in line
    check_repeats(events, tmp_path, monkeypatch)


def test_blocks_are_told_one_by_one_and_the_last_clip_goes_away(models: Models, kept: str) -> None:
    first, *steps, last = drawn(models, kept, frames=9)
    assert first[0] is None and first[3] == "Starting ..." and not first[1]["interactive"] and first[1]["value"] is None
    assert [event[3] for event in steps] == [f"Block {i} of 10 ..." for i in range(1, 11)]
    assert last[1]["interactive"] and all(event[4:] == last[4:] for event in steps)


def test_any_class_is_the_seeds_and_is_named(
    models: Models, kept: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    labels = set()
    for seed in range(4):
        events = drawn(models, kept, choice="random", seed=seed)
        (label,) = models.open("blocks")(seed=seed).class_labels
        assert f"--class {label} " in events[-1][4]
        labels.add(label)
    assert len(labels) > 1
    check_repeats(events, tmp_path, monkeypatch)


def test_a_run_that_is_left_stops_between_blocks_and_gives_its_turn_back(models: Models, kept: str) -> None:
    events = video.generate(models, kept, "blocks", None, "first", 1, "2", 125, 8, *OWN, 7)
    next(events)
    assert next(events)[3] == "Block 1 of 126 ..."  # 6, then 30 windows of 4, as two are known
    events.close()
    assert drawn(models, kept)[-1][3].startswith("**5 frames**")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"choice": "3"}, "Class must be"),
        ({"choice": "Boott"}, "No class is called 'Boott'"),
        ({"choice": None}, "No class is called 'None'"),
        ({"frames": 4}, "Frames must be a whole number from 5 to 125; got 4"),
        ({"frames": 126}, "Frames must be a whole number from 5 to 125; got 126"),
        ({"frames": "9"}, "Frames must be a whole number"),
        ({"frames": 6.5}, "Frames must be a whole number"),
        ({"fps": 0}, "Frames a second must be a number from 1 to 50; got 0"),
        ({"fps": float("nan")}, "Frames a second must be"),
        ({"seed": -1}, "Seed must be"),
        ({"settings": (2.0, 0, 0, 1.0, False, 12)}, "Temperature must be"),
        ({"name": "../blocks"}, "That model is not on offer"),
        ({"name": "frames", "frames": 4, "settings": UNGUIDED}, "This model predicts what follows first frames"),
        ({"name": "whole", "frames": 8}, "Frames must be a whole number from 4 to 4; got 8"),
    ],
)
def test_what_cannot_be_is_refused_in_words(models: Models, kept: str, changes: dict[str, Any], message: str) -> None:
    told = refused(lambda: drawn(models, kept, **changes))
    assert told.startswith(message), told


# ---- a clip goes on -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["mp4", "webm", "gif", "webp"])
@pytest.mark.parametrize("where", ["first", "last"])
def test_an_upload_goes_on_as_in_the_pipeline_and_the_printed_lines(
    models: Models, kept: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, where: str
) -> None:
    upload = sent(tmp_path / f"clip.{kind}")
    frames, choice = (FRAMES, "random") if where == "first" else (9, "1")
    events = drawn(models, kept, upload=upload, where=where, read=3, choice=choice, frames=frames, settings=OTHER)
    given = pixels_of(upload["path"])[: 3 if where == "first" else None]
    small = (read_frames(given, (SIDE, SIDE))[0].permute(1, 2, 3, 0) * 127.5 + 127.5).round().byte().numpy()
    played = pixels_of(events[-1][0])
    assert len(played) == (5 if where == "first" else 7 - 3 + 9) and near(played[: len(small)], small)
    how = {} if where == "first" else {"context_frames": 3, "num_frames": 13, "class_labels": [1]}
    ours = models.open("blocks")(frames=given, rng=Rng.from_seed(7, 1), **how, **CHANGED).videos[0]
    assert near(played, ours)
    found = read_settings(events[-1][0])
    assert found["continue"] == f"clip.{kind}" and found["given"] == len(given)
    assert found["classes"] == ([] if where == "first" else [1])
    check_repeats(events, tmp_path, monkeypatch)


def test_models_of_frame_prediction_go_on_too(
    models: Models, kept: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    upload = sent(tmp_path / "clip.gif")
    asked: dict[str, Any] = {"read": 2, "frames": 6, "settings": UNGUIDED, "choice": None}
    events = drawn(models, kept, "frames", upload, where="last", **asked)
    assert "**11 frames**" in events[-1][3] and "--class" not in events[-1][4]
    check_repeats(events, tmp_path, monkeypatch)


def test_the_frames_that_are_read_are_shown_as_the_model_sees_them(models: Models, tmp_path: Path) -> None:
    upload = sent(tmp_path / "clip.webp", lossless=True)
    expected = read_frames(moving(7), (SIDE, SIDE))[0].permute(1, 2, 3, 0) * 127.5 + 127.5
    for where, part in (("first", expected[:3]), ("last", expected[-3:])):
        shown = video.preview(models, "blocks", upload, where, 3)
        small = [image.resize((SIDE, SIDE), Image.Resampling.NEAREST) for image in shown]
        assert shown[0].size == (384, 384)
        assert np.array_equal(np.stack([np.asarray(s) for s in small]), part.round().byte().numpy())
    assert video.preview(models, "blocks", None, "first", 3) == []


@pytest.mark.parametrize("name", ["film.MP4", "clip.exe", "ταινία 🎬.png", "a" * 200, ".mp4", "x.mp4.webp"])
def test_names_of_files_say_nothing(models: Models, tmp_path: Path, name: str) -> None:
    write_video(moving(4), tmp_path / "real.mp4")
    (tmp_path / "real.mp4").rename(tmp_path / name)
    frames, kind = clip_files.read_clip(as_upload(tmp_path / name), (SIDE, SIDE), Limits(), 3)
    assert kind == "mp4" and frames.shape == (1, 3, 3, SIDE, SIDE)


def data_of(kind: str, frames: int = 7, **options: Any) -> bytes:
    buffer = BytesIO()
    pictures = [Image.fromarray(frame) for frame in moving(frames)]
    pictures[0].save(buffer, kind, save_all=True, append_images=pictures[1:], **options)
    return buffer.getvalue()


def encoded(kind: str, frames: int, fps: float = 8) -> bytes:
    """A video file in memory."""
    buffer = BytesIO()
    with av.open(buffer, "w", format=kind) as container:
        stream = container.add_stream("libx264" if kind == "mp4" else "libvpx-vp9", rate=round(fps))
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        noise = np.random.default_rng(0).integers(0, 256, (frames, 48, 64, 3), np.uint8)
        for frame in noise:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode(None))
    return buffer.getvalue()


def sound(kind: str) -> bytes:
    """A file of sound alone."""
    buffer = BytesIO()
    if kind == "wav":
        with wave.open(buffer, "wb") as file:
            file.setparams((1, 2, 8000, 0, "NONE", ""))
            file.writeframes(bytes(16000))
        return buffer.getvalue()
    with av.open(buffer, "w", format="mp4") as container:
        stream = container.add_stream("aac", rate=8000)
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
        frame.rate = 8000
        container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return buffer.getvalue()


def claiming(width: int, height: int) -> bytes:
    """A small GIF whose header says otherwise."""
    data = bytearray(data_of("GIF", 2))
    data[6:10] = struct.pack("<HH", width, height)
    return bytes(data)


UNREADABLE = "This file is not a clip that can be read; send MP4, WEBM, GIF, WEBP"
BROKEN = {
    "nothing": (b"", UNREADABLE),
    "text": (b"hello, world, this is no clip", UNREADABLE),
    "image": (data_of("PNG", 1), UNREADABLE),
    "end of an mp4 missing": (encoded("mp4", 6)[:-400], UNREADABLE),
    "half a webm": (encoded("webm", 6)[:90], UNREADABLE),
    "half a gif": (data_of("GIF")[:60], "The clip has 1 frame that can be read, but 3 are to be given"),
    "half a webp": (data_of("WEBP")[:120], UNREADABLE),
    "one frame": (data_of("GIF", 1), "The clip has 1 frame that can be read, but 3 are to be given"),
    "one picture": (data_of("WEBP", 1), "The clip has 1 frame that can be read, but 3 are to be given"),
    "wav": (sound("wav"), UNREADABLE),
    "sound in an mp4": (sound("m4a"), UNREADABLE),
    "a list of other files": (b"#EXTM3U\n#EXTINF:1,\n/etc/passwd\n#EXT-X-ENDLIST\n", UNREADABLE),
    "a list of clips": (b"ffconcat version 1.0\nfile real.mp4\n", UNREADABLE),
    "another container": (b"\x1a\x45\xdf\xa3" + encoded("mp4", 4), UNREADABLE),
    "a wide gif": (claiming(5000, 12), "The clip has 5000 x 12 pixels; send at most 4096 a side"),
    "a huge gif": (claiming(65535, 65535), UNREADABLE),
    "a long one": (encoded("mp4", 70, 1), "The clip lasts 70 seconds; send at most 60"),
    "too many pictures": (data_of("WEBP", 129), "The clip has 129 frames; send at most 128"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_what_is_no_clip_or_too_much_is_refused_in_words(
    models: Models, kept: str, tmp_path: Path, name: str, caplog: pytest.LogCaptureFixture
) -> None:
    data, message = BROKEN[name]
    write_video(moving(4), tmp_path / "real.mp4")
    (tmp_path / "x.mp4").write_bytes(data)
    upload = as_upload(tmp_path / "x.mp4")
    assert refused(lambda: drawn(models, kept, upload=upload, read=3)) == message
    assert refused(lambda: video.preview(models, "blocks", upload, "first", 3)) == message
    assert not caplog.records and not Path(kept).exists()


def test_limits_of_frames_bytes_and_sides_are_the_servers(folder: Path, kept: str, tmp_path: Path) -> None:
    small = Models([folder / "blocks"], Limits(frames=6, side=16))
    long = sent(tmp_path / "long.gif", 7)
    assert "20 x 12 pixels; send at most 16" in refused(lambda: drawn(small, kept, upload=long))
    small = Models([folder / "blocks"], Limits(frames=6))
    assert refused(lambda: drawn(small, kept, upload=long, where="last")).startswith(
        "The clip has more than 6 frames; cut it, or let its first frames"
    )
    assert drawn(small, kept, upload=long, read=3)[-1][3].startswith("**5 frames**")  # the first need no more
    assert "from 5 to 5" in refused(lambda: drawn(small, kept, frames=9))  # what is drawn at once is always allowed
    assert drawn(Models([folder / "blocks"], Limits(frames=1)), kept)[-1][3].startswith("**5 frames**")
    (tmp_path / "large.mp4").write_bytes(encoded("mp4", 4) + bytes(2**20))
    tight = Models([folder / "blocks"], Limits(upload_mb=1))
    told = refused(lambda: drawn(tight, kept, upload=as_upload(tmp_path / "large.mp4")))
    assert told.startswith("The file is larger than 1 MB")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"read": 2}, "2 frames are no whole tokens of this model; it reads 1, 3"),
        ({"read": 5}, "Frames that are read must be a whole number from 1 to 3"),
        ({"read": None}, "Frames that are read must be a whole number from 1 to 3"),
        ({"where": "middle"}, "The frames that are read must be the first or the last; got middle"),
        ({"name": "whole", "frames": 4}, "The tokens of this model are of whole clips, so none can be continued"),
        ({"upload": {"path": None}}, "Upload a clip first"),
    ],
)
def test_what_cannot_go_on_is_refused_in_words(
    models: Models, kept: str, tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    upload = changes.pop("upload", None) or sent(tmp_path / "clip.gif")
    told = refused(lambda: drawn(models, kept, upload=upload, **changes))
    assert told.startswith(message), told


@pytest.mark.parametrize("noted", [10**9, "Infinity", -1, 0])
def test_a_webp_that_lies_about_its_frames_is_read_as_it_is(tmp_path: Path, noted: Any) -> None:
    exif = Image.Exif()
    exif[0x010E] = f'{{"varkit": {{}}, "frames": {noted}, "fps": 8}}'
    for count in (1, 4):
        (tmp_path / "x.webp").write_bytes(data_of("WEBP", count, exif=exif, lossless=True))
        frames, _ = clip_files.read_clip(as_upload(tmp_path / "x.webp"), (12, 20), Limits(), None)
        expected = read_frames(moving(count), (12, 20))
        assert torch.equal(frames, expected)


# ---- a server without PyAV ----------------------------------------------------------------------------------------


def test_without_pyav_clips_are_animated_webp(
    models: Models, kept: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mp4, webp = sent(tmp_path / "clip.mp4"), sent(tmp_path / "clip.webp", lossless=True)
    monkeypatch.setattr(clip_files, "find_spec", lambda name: None)
    assert clip_files.written() == ("webp",) and clip_files.readable() == ["webp"]
    events = drawn(models, kept, upload=webp, read=3)
    played, download, *_, line, _ = events[-1]
    assert played == download["value"] and played.endswith(".webp") and line.endswith("--out out.webp")
    with Image.open(played) as image:
        assert image.format == "WEBP" and image.n_frames == FRAMES and image.size == (128, 128)
    assert read_settings(played)["given"] == 3
    assert refused(lambda: drawn(models, kept, upload=mp4, read=3)) == UNREADABLE.replace("MP4, WEBM, GIF, ", "")
    page = build_demo([models.source("blocks")])
    found = {b.elem_id: b for b in page.blocks.values() if getattr(b, "elem_id", None)}
    assert found["video-clip"].get_block_name() == "image" and "video-download-webp" in found
    assert found["video-upload"].file_types == [".webp"]


# ---- the page -----------------------------------------------------------------------------------------------------


def test_another_model_brings_its_own_boxes_and_facts(models: Models, tmp_path: Path) -> None:
    upload = sent(tmp_path / "clip.webp", lossless=True)
    facts, picker, frames, box, _, read, shown, *settings = video.refresh(models, "blocks", upload, "first")
    assert facts["value"] == (
        "5 frames of 8 x 8 pixels at once, in 6 blocks of 2 tokens (a row). Longer clips go on from the last frame."
    )
    assert [value for _, value in picker["choices"]] == ["random", "0", "1", "2"] and picker["visible"]
    assert (frames["minimum"], frames["maximum"], frames["step"], frames["value"]) == (5, 125, 4, 5)
    assert box["visible"] and not box["open"] and read["choices"] == COUNTS and len(shown) == 1
    assert [s.get("visible", True) for s in settings] == [True, True, True, True, False, False]
    facts, picker, frames, box, sent_now, read, shown, *settings = video.refresh(models, "whole", upload, "first")
    assert facts["value"].endswith(
        "in 6 tokens, one after another. Its tokens are of whole clips, so none can be continued."
    )
    assert frames["minimum"] < frames["maximum"]  # as gradio wants it
    assert not frames["visible"] and not box["visible"] and sent_now is None and shown == [] and settings[0]["visible"]
    _, picker, frames, box, _, read, shown, *settings = video.refresh(models, "frames", upload, "first")
    assert not picker["visible"] and box["open"] and read["choices"] == [1, 2, 3] and not settings[0]["visible"]
    assert (frames["minimum"], frames["step"], len(shown)) == (4, 2, 2)
    broken = as_upload(tmp_path / "gone.webp")
    assert video.refresh(models, "blocks", broken, "first")[6] == []


def test_blocks_are_told_as_they_are() -> None:
    def of(sizes: list[int], grid: tuple[int, ...]) -> str:
        class Parts:
            num_frames, condition = 3, "class"
            image_size, grids = (4, 6), (grid,)
            layout = property(lambda self: self)
            image_tokenizer = transformer = property(lambda self: self)

            def schedule(self) -> list[torch.Tensor]:
                return list(torch.arange(sum(sizes)).split(sizes))

            def known_tokens(self, count: int) -> int:
                raise ValueError

        return clip_request.facts(Parts()).split(", in ")[1].split(".")[0]

    assert of([1] * 8, (2, 2, 2)) == of([1] * 8, (8,)) == "8 tokens, one after another"
    assert of([4, 4], (2, 2, 2)) == "2 blocks of 4 tokens (a frame)"
    assert of([2] * 4, (2, 2, 2)) == "4 blocks of 2 tokens (a row)"
    assert of([3, 3, 2], (2, 2, 2)) == "3 blocks of 2 to 3 tokens"
    assert of([4, 4], (8,)) == "2 blocks of 4 tokens"


@pytest.fixture(scope="module", name="demo")
def _demo(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GRADIO_TEMP_DIR", str(tmp_path_factory.mktemp("gradio")))
        yield build_demo([folder / name for name in ("blocks", "plain", "frames", "whole")])


def test_the_tab_offers_the_models_of_clips_and_the_others_those_of_images(demo: Any) -> None:
    found = {b.elem_id: b for b in demo.blocks.values() if getattr(b, "elem_id", None)}
    clips = [value for _, value in found["video-model"].choices]
    assert clips[:3] == ["blocks", "frames", "whole"] and "moving-fashion-nbp" in clips and "plain" not in clips
    assert not {"blocks", "frames", "whole"} & {value for _, value in found["model"].choices}
    assert next(b for b in demo.blocks.values() if b.get_block_name() == "tabs").selected == "video"
    lanes = {f.api_name: (f.concurrency_id, f.concurrency_limit) for f in demo.fns.values()}
    assert lanes["video"] == ("network", 1)
    readers = [f for f in demo.fns.values() if found["video-upload"] in f.inputs]
    assert len(readers) == 5 and not any(f.preprocess for f in readers)
    assert found["video-clip"].get_block_name() == "video"


def test_without_models_of_clips_there_is_no_such_tab_and_without_others_no_other(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("varkit.pipelines.auto.zoo_models", list)
    assert "/video" not in build_demo([folder / "plain"]).get_api_info()["named_endpoints"]
    only = build_demo([folder / "blocks"])
    assert set(only.get_api_info()["named_endpoints"]) == {"/video"}
    shown = {getattr(b, "label", None): getattr(b, "visible", True) for b in only.blocks.values()}
    assert shown["Guidance"] and shown["Top-p"] and not shown["Smoother pictures"] and not shown["Tokens"]
    for name, boxes in {"whole": (True, False, True), "frames": (False, True, False)}.items():
        page = build_demo([folder / name])
        found = {getattr(b, "elem_id", None) or getattr(b, "label", None): b for b in page.blocks.values()}
        assert tuple(found[x].visible for x in ("video-class", "video-box", "Guidance")) == boxes


def upload_over_http(address: str, data: bytes, name: str) -> dict[str, Any]:
    head = f'--x\r\nContent-Disposition: form-data; name="files"; filename="{name}"\r\n\r\n'.encode()
    kind = {"Content-Type": "multipart/form-data; boundary=x"}
    request = urllib.request.Request(f"{address}/gradio_api/upload", head + data + b"\r\n--x--\r\n", kind)
    with urllib.request.urlopen(request, timeout=60) as reply:
        return {"path": json.load(reply)[0], "meta": {"_type": "gradio.FileData"}}


def test_the_served_page_draws_continues_and_refuses(
    demo: Any, models: Models, kept: str, folder: Path, tmp_path: Path
) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    _, address, _ = demo.launch(server_name="127.0.0.1", server_port=port, prevent_thread_lock=True, quiet=True)
    address = address.rstrip("/")
    rest = ["2", FRAMES, 8, *OWN, 7]
    try:
        answer = call(address, "video", ["blocks", None, "first", 1, *rest])
        assert answer.startswith("event: complete"), answer
        played, mp4, gif, told, line, _ = json.loads(answer.split("data: ")[1])
        ours = drawn(models, kept)[-1]
        assert "**5 frames**" in told and line == ours[4]
        for found, path in ((played, ours[0]), (mp4, ours[0]), (gif, ours[2]["value"])):
            url = (found.get("value") or found).get("url") or found["video"]["url"]
            with urllib.request.urlopen(url, timeout=60) as reply:
                assert reply.read() == Path(path).read_bytes()
        source = Path(sent(tmp_path / "clip.gif")["path"])
        upload = upload_over_http(address, source.read_bytes(), "a b.gif")
        on = call(address, "video", ["blocks", upload, "first", 3, *rest])
        assert on.startswith("event: complete") and "--continue clip.gif --given 3" in on
        for data in (b"no clip", BROKEN["sound in an mp4"][0]):
            upload = upload_over_http(address, data, "x.mp4")
            answer = call(address, "video", ["blocks", upload, "first", 3, *rest])
            assert answer.startswith("event: error") and "not a clip that can be read" in answer
            assert str(folder) not in answer
        answer = call(address, "video", ["blocks", as_upload(source), "first", 3, *rest])  # a file that was not sent
        assert answer.startswith("event: error") and "frames**" not in answer
    finally:
        demo.close(verbose=False)
