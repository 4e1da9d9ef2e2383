"""Clips to train on: Moving-Fashion, the layouts of sets of videos, which frames a clip has, what cannot be read."""

from __future__ import annotations

import csv
import json
import logging
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader
from typer.testing import CliRunner

from varkit.cli import app
from varkit.data.check_clips import check_clips, is_video_source
from varkit.data.clip_rules import ClipRule
from varkit.data.clips import ClipDataset, open_clips
from varkit.data.dataset import collate
from varkit.data.fashion import FASHION_CLASSES
from varkit.data.moving import LENGTH, MOTIONS, MOVING_CLASSES, MovingFashion, area_weights, bounce, shrink
from varkit.data.transforms import MAX_FAILURES
from varkit.data.video import ShortVideo, VideoFile, VideoInfo, open_videos
from varkit.data.video_writing import write_video

SLICE = Path(__file__).parent / "data" / "fashion_slice.npz"


@pytest.fixture(scope="module")
def fashion_root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Fashion-MNIST of 240 and 60 images, in its own files."""
    folder = tmp_path_factory.mktemp("fashion")
    with np.load(SLICE) as found:
        images, labels = found["arr_0"][..., 0], found["arr_1"].astype(np.uint8)
    order = np.random.default_rng(0).permutation(len(images))
    for prefix, rows in (("train", order[:240]), ("t10k", order[240:])):
        for kind, array in (("images-idx3", images[rows]), ("labels-idx1", labels[rows])):
            head = struct.pack(f">2xBB{array.ndim}I", 8, array.ndim, *array.shape)
            (folder / f"{prefix}-{kind}-ubyte").write_bytes(head + array.tobytes())
    return folder


# ---- moving-fashion -----------------------------------------------------------------------------------------------


def test_a_clip_depends_on_split_index_and_seed_alone(fashion_root: Path) -> None:
    videos = MovingFashion("train", root=fashion_root)
    together = videos.clips([3, 4, 200], 12)
    assert together.dtype == np.uint8 and together.shape == (3, 12, 32, 32)
    for row, index in enumerate([3, 4, 200]):
        np.testing.assert_array_equal(videos.clips([index], 12)[0], together[row])
    late = videos.clips([200, 3], 3, 4, [100, 1])  # frames without end, and other starts beside each other
    np.testing.assert_array_equal(late[1], together[0][1::4])
    np.testing.assert_array_equal(late[0], videos.clips([200], 109)[0][100::4])
    np.testing.assert_array_equal(videos.clip(4, 3, 2, 1)[..., 1].numpy(), together[1][1:6:2])
    again, other = MovingFashion("train", root=fashion_root), MovingFashion("train", root=fashion_root, seed=1)
    np.testing.assert_array_equal(again.clips([3, 4, 200], 12), together)
    assert all((a != b).any() for a, b in zip(other.clips([3, 4, 200], 12), together, strict=True))
    held_out = MovingFashion("test", root=fashion_root)
    assert len(held_out) == 60 and (held_out._uniforms(np.arange(60)) != videos._uniforms(np.arange(60))).all()


def places(clip: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Of each frame: the first row and column that is not black."""
    return (clip.max(2) > 0).argmax(1), (clip.max(1) > 0).argmax(1)


def test_garments_move_as_their_class_says_and_stay_inside(fashion_root: Path) -> None:
    videos = MovingFashion("train", root=fashion_root)
    clips = videos.clips(range(120), LENGTH)
    one = videos._uniforms(np.arange(120))[:, 0] >= 0.5
    assert 40 < one.sum() < 80
    assert (videos.labels // 3 == videos.garment_labels).all()
    for clip, label in zip(clips[one], videos.labels[:120][one], strict=True):
        down, across = (np.unique(p) for p in places(clip))
        motion = MOTIONS[label % 3]
        assert (len(down) > 5, len(across) > 5) == (motion != "horizontal", motion != "vertical")
        lit = (clip > 0).sum((1, 2))
        assert lit.min() == lit.max()  # nothing leaves the picture: it bounces
        steps = np.abs(np.diff(np.stack(places(clip)), axis=1))
        assert steps.max() <= 2
    for clip, label in zip(clips[~one], videos.labels[:120][~one], strict=True):
        still = places(clip)[label % 3] if label % 3 < 2 else np.zeros(1)
        assert len(np.unique(still)) == 1


def test_the_first_garment_is_the_image_of_that_number_and_the_second_of_its_class(fashion_root: Path) -> None:
    videos = MovingFashion("train", root=fashion_root)
    u = videos._uniforms(np.arange(60))
    small = shrink(videos.garments, videos.overlap)
    for index in np.nonzero(u[:, 0] < 0.5)[0][:12]:
        clip = videos.clips([index], 1)[0, 0].astype(int)
        found = []
        for candidate in np.nonzero(videos.garment_labels == videos.garment_labels[index])[0]:
            windows = np.lib.stride_tricks.sliding_window_view(clip, (16, 16))
            if ((windows >= small[candidate]).all((-1, -2)) & (windows == small[candidate]).any((-1, -2))).any():
                found.append(candidate)
        assert index in found and len(found) > 1  # its own image, and another of the class


def test_classes_sizes_and_what_is_refused(fashion_root: Path) -> None:
    assert len(MOVING_CLASSES) == 30 and MOVING_CLASSES[29] == "ankle boot, diagonal"
    assert MOVING_CLASSES[3 * 1 + 1] == "trouser, vertical" and len(FASHION_CLASSES) == 10
    videos = MovingFashion("test", root=fashion_root, num=7)
    assert len(videos) == 7 and videos.size(0) == (32, 32) and videos.rate(0) is None
    large = videos.resized((64, 64))
    assert large.clips([6], 2).shape == (1, 2, 64, 64) and videos.clips([6], 2).shape == (1, 2, 32, 32)
    with pytest.raises(ValueError, match="even sizes from 8 to 128; got 33"):
        MovingFashion("test", root=fashion_root, size=33)
    with pytest.raises(ValueError, match="is square; got 32x48"):
        videos.resized((32, 48))
    with pytest.raises(ValueError, match=r"1 to 60 clips .* got 61"):
        MovingFashion("test", root=fashion_root, num=61)
    with pytest.raises(IndexError, match="clips 0 to 6 here; got 7"):
        videos.clips([0, 7], 2)


def test_shrinking_keeps_the_mean_of_areas_and_walls_reflect() -> None:
    weights = area_weights(28, 16)
    assert (
        (weights.sum(1) == 28).all()
        and (weights.sum(0) == 16).all()
        and (area_weights(4, 2) == [[2, 2, 0, 0], [0, 0, 2, 2]]).all()
    )
    image = np.random.default_rng(0).integers(0, 256, (1, 28, 28)).astype(np.uint8)
    halves = shrink(image, area_weights(28, 14))[0]
    means = image[0].reshape(14, 2, 14, 2).mean((1, 3))
    assert np.abs(halves - means).max() <= 0.5
    assert bounce(np.arange(-2.0, 9.0), 3).tolist() == [2, 1, 0, 1, 2, 3, 2, 1, 0, 1, 2]


def test_moving_fashion_as_training_data(fashion_root: Path) -> None:
    dataset = open_clips("moving-fashion", frames=5, start="random", root=fashion_root, size=16, seed=3)
    assert dataset.classes == list(MOVING_CLASSES) and dataset.num_classes == 30 and len(dataset) == 240
    batch = dataset.__getitems__([(2, 2), (2, 900), (7, 7)])
    images = batch["images"]
    assert images.shape == (3, 3, 5, 16, 16) and images.dtype == torch.float32
    assert images.min() == -1 and images.max() <= 1 and (images[:, 0] == images[:, 2]).all()
    assert (images[0] != images[1]).any() and batch["labels"][0] == batch["labels"][1] == dataset.labels[2]
    assert torch.equal(dataset.__getitems__([(2, 900)])["images"][0], images[1])
    first = open_clips("moving-fashion", frames=5, root=fashion_root, size=16)
    grey = first.videos.clips([2], 5)  # type: ignore[attr-defined]
    assert torch.equal(first[2]["image"][0], torch.from_numpy(grey[0]).float() / 127.5 - 1)
    mirrored = open_clips("moving-fashion", frames=5, root=fashion_root, size=16, flip=True)
    plain, turned = first.__getitems__(range(8))["images"], mirrored.__getitems__(range(8))["images"]
    ways = [(torch.equal(a, b), torch.equal(a.flip(-1), b)) for a, b in zip(plain, turned, strict=True)]
    assert all(any(way) for way in ways) and {way[1] for way in ways} == {True, False}
    with pytest.raises(ValueError, match="no frames a second"):
        open_clips("moving-fashion", frames=5, root=fashion_root, fps=8)
    with pytest.raises(FileNotFoundError, match="moving-fashion"):
        open_clips("moving-fasion")


def test_the_command_writes_the_clips_that_are_computed(fashion_root: Path, tmp_path: Path) -> None:
    args = ["data", "moving-fashion", str(tmp_path / "m"), "--num", "50", "--frames", "4", "--root", str(fashion_root)]
    done = CliRunner().invoke(app, [*args, "--size", "16", "--json"])
    assert done.exit_code == 0, done.output
    told = json.loads(done.output)
    assert told["shape"] == [50, 4, 16, 16, 3] and len(told["classes"]) == 30
    videos = MovingFashion("test", size=16, root=fashion_root)
    with np.load(told["file"]) as found:
        assert (found["arr_0"] == videos.clips(range(50), 4)[..., None]).all()
        assert (found["arr_1"] == videos.labels[:50]).all()
    opened = open_clips(told["file"], frames=4)
    assert opened.labels.tolist() == videos.labels[:50].tolist()
    refused = CliRunner().invoke(app, [*args, "--split", "val"])
    assert refused.exit_code == 2 and "--split must be train or test" in refused.output


# ---- layouts ------------------------------------------------------------------------------------------------------


def video(path: Path, frames: int = 6, fps: float = 8, size: tuple[int, int] = (16, 24), shade: int = 0) -> Path:
    clip = np.full((frames, *size, 3), shade, np.uint8)
    clip += (np.arange(frames, dtype=np.uint8) * 20)[:, None, None, None]
    write_video(clip, path, fps)
    return path


def frame_folder(path: Path, frames: int = 6, size: tuple[int, int] = (4, 6)) -> Path:
    """Frame k is k all over."""
    path.mkdir(parents=True)
    for k in range(frames):
        Image.fromarray(np.full((*size, 3), k, np.uint8)).save(path / f"{k}.png")
    return path


def names(dataset: ClipDataset) -> list[str]:
    return [Path(name).name for name in dataset.videos.names]


def test_class_folders_plain_folders_and_folders_of_frames(tmp_path: Path) -> None:
    for name in ("b/y.mp4", "b/deep/x.mp4", "a/z.gif"):
        video(tmp_path / "classes" / name)
    dataset = open_clips(tmp_path / "classes", frames=2)
    assert dataset.classes == ["a", "b"] and dataset.labels.tolist() == [0, 1, 1]
    assert dataset.kind == "class folders" and dataset[1]["image"].shape == (3, 2, 16, 24)
    for name in ("y.mp4", "x.webm"):
        video(tmp_path / "plain" / name)
    plain = open_clips(tmp_path / "plain", frames=2)
    assert plain.classes == [] and plain.labels.tolist() == [-1, -1] and names(plain) == ["x.webm", "y.mp4"]
    for name in ("one", "two"):
        frame_folder(tmp_path / "frames" / name)
        frame_folder(tmp_path / "both" / "c" / name)
    assert open_clips(tmp_path / "frames", frames=2).classes == []
    both = open_clips(tmp_path / "both", frames=2)
    assert both.classes == ["c"] and both.labels.tolist() == [0, 0]
    video(tmp_path / "classes" / "loose.mp4")
    loose = open_clips(tmp_path / "classes", frames=2)
    assert loose.classes == [] and "1 videos lie outside of the class folders a, b" in loose.warnings[0]


def test_splits_share_the_class_ids_of_training(tmp_path: Path) -> None:
    for name in ("train/a/1.mp4", "train/b/1.mp4", "train/c/1.mp4", "val/c/1.mp4", "val/b/2.mp4"):
        video(tmp_path / name)
    held_out = open_clips(tmp_path, split="test", frames=2)
    assert held_out.classes == ["a", "b", "c"] and held_out.labels.tolist() == [1, 2]
    assert open_clips(tmp_path, frames=2).labels.tolist() == [0, 1, 2]
    video(tmp_path / "val" / "new" / "1.mp4")
    with pytest.raises(ValueError, match="has classes that train lacks: new"):
        open_clips(tmp_path, split="val", frames=2)
    with pytest.raises(ValueError, match="has no split 'val'"):
        open_clips(tmp_path / "train", split="val", frames=2)
    with pytest.raises(ValueError, match="choose one of train"):
        open_clips(tmp_path, split="dev", frames=2)


def test_ucf101(tmp_path: Path) -> None:
    lists = tmp_path / "ucfTrainTestlist"
    lists.mkdir()
    (lists / "classInd.txt").write_text("1 ApplyLipstick\r\n2 Archery\r\n")
    (lists / "trainlist01.txt").write_text("Archery/v_Archery_g01_c01.avi 2\nApplyLipstick/v_Lip_g08_c01.avi 1\n")
    (lists / "testlist01.txt").write_text("Archery/v_Archery_g02_c01.avi\nArchery/v_gone.avi\n")
    (lists / "trainlist02.txt").write_text("Archery/v_Archery_g02_c01.avi 2\n")
    for name in ("Archery/v_Archery_g01_c01", "Archery/v_Archery_g02_c01", "ApplyLipstick/v_Lip_g08_c01"):
        video(tmp_path / "UCF-101" / f"{name}.avi")
    train = open_clips(tmp_path, frames=2)
    assert train.classes == ["ApplyLipstick", "Archery"] and train.labels.tolist() == [1, 0]
    assert names(train) == ["v_Archery_g01_c01.avi", "v_Lip_g08_c01.avi"] and train.kind == "UCF-101, list 1"
    test = open_clips(tmp_path, split="test", frames=2)
    assert test.labels.tolist() == [1] and "1 of 2 listed videos are not there: v_gone" in test.warnings[0]
    assert names(open_clips(tmp_path, fold=2, frames=2)) == ["v_Archery_g02_c01.avi"]
    with pytest.raises(ValueError, match=r"no list 4 \(trainlist04.txt\); UCF-101 has lists 1 to 3"):
        open_clips(tmp_path, fold=4, frames=2)
    (lists / "trainlist03.txt").write_text("Bowling/v_x.avi 3\n")
    with pytest.raises(ValueError, match=r"class 'Bowling' .* is not in classInd.txt"):
        open_clips(tmp_path, fold=3, frames=2)


def kinetics(path: Path, rows: list[tuple[Any, ...]]) -> None:
    with path.open("w", newline="") as file:
        csv.writer(file).writerows([("label", "youtube_id", "time_start", "time_end", "split"), *rows])


def test_kinetics(tmp_path: Path) -> None:
    kinetics(
        tmp_path / "train.csv",
        [
            ("zumba", "-a_b", 5, 15, "train"),
            ("abseiling", "cdef", 10, 20, "train"),
            ("abseiling", "gone", 1, 11, "train"),
        ],
    )
    kinetics(tmp_path / "validate.csv", [("zumba", "xyz", 0, 10, "validate")])
    video(tmp_path / "train" / "zumba" / "-a_b_000005_000015.mp4")
    video(tmp_path / "train" / "cdef_000010_000020.mkv")
    video(tmp_path / "val" / "xyz_000000_000010.mp4")
    train = open_clips(tmp_path, frames=2)
    assert train.classes == ["abseiling", "zumba"] and train.labels.tolist() == [1, 0] and train.kind == "Kinetics"
    assert "1 of 3 listed videos are not there: gone_000001_000011" in train.warnings[0]
    held_out = open_clips(tmp_path, split="val", frames=2)
    assert held_out.labels.tolist() == [1] and held_out.classes == train.classes
    kinetics(tmp_path / "test.csv", [("", "nope", 0, 10, "test")])
    with pytest.raises(
        ValueError, match="lists 1 videos for test, but none of them is there, such as nope_000000_000010"
    ):
        open_clips(tmp_path, split="test", frames=2)
    kinetics(tmp_path / "test.csv", [("", "nope", "soon", 10, "test")])
    with pytest.raises(ValueError, match=r"test.csv:2: youtube_id 'nope', time_start 'soon'"):
        open_clips(tmp_path, frames=2)


def test_arrays_with_labels_and_what_is_no_clip_data(tmp_path: Path) -> None:
    clips = np.zeros((3, 4, 6, 8, 3), np.uint8)
    np.savez(tmp_path / "clips.npz", arr_0=clips, arr_1=np.array([1, 0, 1]))
    dataset = open_clips(tmp_path / "clips.npz", frames=4)
    assert dataset.classes == ["0", "1"] and dataset.labels.tolist() == [1, 0, 1] and dataset.kind == "npz"
    np.savez(tmp_path / "odd.npz", arr_0=clips, arr_1=np.array([1, 0]))
    with pytest.raises(ValueError, match=r"labels \(arr_1\) are int64 \(2,\)"):
        open_clips(tmp_path / "odd.npz", frames=4)
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="holds no videos but nothing"):
        open_clips(tmp_path / "empty")
    with pytest.raises(FileNotFoundError, match="does not exist"):
        open_clips(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="is no folder and has no split 'val'"):
        open_clips(tmp_path / "clips.npz", split="val")
    with pytest.raises(ValueError, match="root is only for named sets"):
        open_clips(tmp_path / "clips.npz", root=tmp_path)


# ---- which frames -------------------------------------------------------------------------------------------------


def shown(dataset: ClipDataset, index: int, key: int) -> list[int]:
    """The numbers of the frames of a clip of `frame_folder`."""
    return dataset[index, key]["image"][0, :, 0, 0].tolist()  # type: ignore[index]


def test_starts_are_first_middle_or_drawn_by_the_key(tmp_path: Path) -> None:
    frame_folder(tmp_path / "v", frames=12)
    assert shown(open_clips(tmp_path, frames=3, stride=2), 0, 5) == [0, 2, 4]
    assert shown(open_clips(tmp_path, frames=3, stride=2, start="middle"), 0, 5) == [3, 5, 7]
    assert ClipRule(frames=12, start="middle").starts([0, 1], [12, 11]) == [[0], []]
    assert ClipRule(frames=3, stride=2, start="even", per_video=3).starts([0], [12]) == [[0, 3, 6]]
    assert ClipRule(frames=3, stride=2, start="even").starts([0], [12]) == [[3]]
    drawn = open_clips(tmp_path, frames=3, stride=2, start="random", seed=4)
    clips = {key: shown(drawn, 0, key) for key in range(60)}
    assert {c[0] for c in clips.values()} == set(range(7)) and all(
        c == [c[0], c[0] + 2, c[0] + 4] for c in clips.values()
    )
    assert [shown(drawn, 0, key) for key in (3, 1, 3)] == [clips[3], clips[1], clips[3]]
    loader = DataLoader(drawn, batch_size=4, num_workers=2, collate_fn=collate, sampler=[(0, k) for k in range(8)])
    read = torch.cat([batch["images"][:, 0, :, 0, 0] for batch in loader])
    assert read.tolist() == [clips[k] for k in range(8)]


def test_one_crop_and_one_flip_for_all_frames_of_a_clip(tmp_path: Path) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (1, 12, 20, 3)).astype(np.uint8)
    still = np.repeat(noise, 5, 0)[None]
    np.save(tmp_path / "still.npy", still)
    dataset = open_clips(tmp_path / "still.npy", frames=5, size=8, mode="crop", enlarge=1.25, flip=True, start="random")
    batch = dataset.__getitems__([(0, key) for key in range(12)])["images"]
    assert batch.shape == (12, 3, 5, 8, 8) and (batch == batch[:, :, :1]).all()
    assert len({clip.numpy().tobytes() for clip in batch}) > 6
    with pytest.raises(ValueError, match=r"an image of 12x20 does not fit into pad size"):
        open_clips(tmp_path / "still.npy", frames=5, size=8, mode="pad")


def test_a_wanted_rate_is_the_nearest_whole_stride(tmp_path: Path) -> None:
    for name, fps in (("a", 30), ("b", 25), ("c", 8), ("d", 5)):
        video(tmp_path / f"{name}.mp4", frames=12, fps=fps)
    dataset = open_clips(tmp_path, frames=2, fps=8)
    assert [dataset.stride(i) for i in range(4)] == [4, 3, 1, 1]
    clip = dataset[0]["image"].float()
    assert abs((clip[:, 1] - clip[:, 0]).mean() - 80) < 6
    frame_folder(tmp_path / "frames" / "v")
    with pytest.raises(ValueError, match="has no frames a second, as frames in folders: give stride"):
        open_clips(tmp_path / "frames", frames=2, fps=8)
    with pytest.raises(ValueError, match="both say which frames"):
        open_clips(tmp_path, frames=2, fps=8, stride=2)


# ---- what cannot be read ------------------------------------------------------------------------------------------


def test_damaged_and_short_videos_are_skipped_counted_and_named(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for name in ("a", "d"):
        video(tmp_path / f"{name}.mp4", frames=6)
    whole = video(tmp_path / "b.mp4", frames=6).read_bytes()
    (tmp_path / "b.mp4").write_bytes(whole[: len(whole) // 2])
    video(tmp_path / "c.gif", frames=1)
    (tmp_path / "e.mp4").touch()
    with caplog.at_level(logging.WARNING):
        dataset = open_clips(tmp_path, frames=4)
    assert names(dataset) == ["a.mp4", "b.mp4", "c.gif", "d.mp4"] and "e.mp4: empty file" in caplog.text
    batch = dataset.__getitems__([0, 1, 2, 3])
    assert batch["index"].tolist() == [0, 3, 3, 3] and batch["keys"].tolist() == [0, 1, 2, 3]
    reasons = {Path(path).name: reason for path, reason in dataset.skipped}
    assert set(reasons) == {"b.mp4", "c.gif", "e.mp4"}
    assert "has 1 frames; the clip needs 4" in reasons["c.gif"] and "cannot be read as a video" in reasons["b.mp4"]
    strict = open_clips(tmp_path, frames=4, short="refuse")
    with pytest.raises(ValueError, match=r"c.gif has 1 frames; the clip needs 4: give shorter clips"):
        strict[2]


def test_a_set_of_which_nothing_serves_is_refused_before_work(tmp_path: Path) -> None:
    for k in range(3):
        video(tmp_path / f"{k}.mp4", frames=3)
    with pytest.raises(ValueError, match=r"no clip could be taken of 3 videos in a row from .*0.mp4 on \(has 3 frames"):
        open_clips(tmp_path, frames=4)
    assert MAX_FAILURES == 100
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "a.mp4").touch()
    with pytest.raises(ValueError, match="holds only 1 empty files"):
        open_clips(tmp_path / "empty")


def test_videos_say_how_many_frames_a_second(tmp_path: Path) -> None:
    video(tmp_path / "v.mp4", fps=12.5)
    assert open_videos(tmp_path / "v.mp4").rate(0) == pytest.approx(12.5, abs=0.01)
    assert open_videos(np.zeros((1, 2, 4, 4, 3), np.uint8)).rate(0) is None


def test_checking_a_set_of_videos(tmp_path: Path) -> None:
    for name, frames, fps in (("a/1", 6, 8), ("a/2", 6, 8), ("b/1", 9, 12.5)):
        video(tmp_path / f"{name}.mp4", frames=frames, fps=fps)
    video(tmp_path / "b" / "one.gif", frames=1, size=(15, 17))  # odd sides
    (tmp_path / "b" / "torn.mp4").write_bytes((tmp_path / "b" / "1.mp4").read_bytes()[:700])
    (tmp_path / "a" / "empty.mp4").touch()
    assert is_video_source(tmp_path)
    done = CliRunner().invoke(app, ["data", "check", str(tmp_path), "--json", "--workers", "2"])
    assert done.exit_code == 1, done.output
    report = json.loads(done.stdout)
    assert (report["total"], report["readable"], report["frames"]) == (6, 4, [1, 6, 9])
    assert report["classes"] == {"a": 2, "b": 2} and report["sizes"] == {"16x24": 3, "15x17": 1}
    assert report["duplicates"] == 1 and abs(report["seconds"] - (12 / 8 + 9 / 12.5)) < 0.2
    assert sorted(Path(b["path"]).name for b in report["broken"]) == ["empty.mp4", "torn.mp4"]
    text = CliRunner().invoke(app, ["data", "check", str(tmp_path)]).stdout
    assert "videos   4 readable of 6" in text and "1 videos have one frame alone" in text and "torn.mp4" in text
    (tmp_path / "c").mkdir()
    Image.new("RGB", (4, 4)).save(tmp_path / "c" / "0.png")
    assert not is_video_source(tmp_path)  # a folder of images that has videos beside them
    assert check_clips(tmp_path).readable == 4


def test_a_header_that_promises_more_frames_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    video(tmp_path / "v.mp4", frames=6)
    info = VideoFile.info

    def lying(self: VideoFile) -> VideoInfo:
        found = info(self)
        return found if self._told else found._replace(frames=70)  # type: ignore[attr-defined]

    def read(self: VideoFile, *args: int) -> Any:
        try:
            return whole(self, *args)
        except ShortVideo:
            self._told = True  # type: ignore[attr-defined]
            raise

    whole = VideoFile.read
    monkeypatch.setattr(VideoFile, "_told", False, raising=False)
    monkeypatch.setattr(VideoFile, "info", lying)
    monkeypatch.setattr(VideoFile, "read", read)
    report = check_clips(tmp_path)
    assert report.frames == (6, 6, 6) and "1 videos have fewer frames than their headers say" in report.warnings[0]
