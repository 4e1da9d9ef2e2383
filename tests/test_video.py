"""Videos: the networks of the Frechet video distance, what they are given, and reading, cutting and writing clips."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from fractions import Fraction
from functools import cache
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from varkit.data import video
from varkit.data.clip_rules import ClipRule, clips, cover_and_crop, fit_clip
from varkit.data.video import ArrayVideo, VideoSet, open_videos
from varkit.data.video_writing import WRITERS, write_video
from varkit.metrics.fvd import I3DFeatures, VideoMAEFeatures, preprocess_clips
from varkit.metrics.i3d import I3D, max_pool_same, pad_same, same_padding
from varkit.metrics.videomae import VideoMAE, sine_cosine_table

CHECKPOINTS = Path(__file__).parent / "checkpoints"
TINY: dict[str, Any] = {"img_size": 28, "embed_dim": 12, "depth": 1, "num_heads": 2, "num_classes": 5}
Frames = npt.NDArray[np.uint8]


def manifest(name: str) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """A published list of keys and shapes, and such a file on the meta device."""
    meta = json.loads((CHECKPOINTS / f"{name}.json").read_text())
    return meta, {k: torch.empty(s, device="meta") for k, s in meta["keys"].items()}


def random_clips(*shape: int) -> Tensor:
    return torch.randint(0, 256, shape, dtype=torch.uint8)


@cache
def i3d_with_scale() -> I3D:
    """I3D with weights under which the activations keep their size."""
    network = I3D()
    for p in network.parameters():
        if p.ndim == 5:
            torch.nn.init.kaiming_normal_(p)
    return network


# ---- i3d ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("counts", [True, False])
def test_i3d_has_the_keys_of_the_released_file_with_or_without_batch_counts(counts: bool) -> None:
    meta, state = manifest("i3d-kinetics400")
    given = {k: v for k, v in state.items() if counts or not k.endswith("num_batches_tracked")}
    assert len(given) == (344 if counts else 287)
    network = I3D.from_official(given)
    assert {k: list(v.shape) for k, v in network.state_dict().items()} == meta["keys"]
    assert sum(p.numel() for p in network.parameters()) == meta["parameters"]
    assert not network.training and not any(p.requires_grad for p in network.parameters())


def test_i3d_refuses_files_with_a_key_more_less_or_reshaped() -> None:
    _, state = manifest("i3d-kinetics400")
    key = "Mixed_4c.b2b.conv3d.weight"
    with pytest.raises(ValueError, match=f"missing in the file: {key}"):
        I3D.from_official({k: v for k, v in state.items() if k != key})
    with pytest.raises(ValueError, match="not in the model: surprise"):
        I3D.from_official({**state, "surprise": state[key]})
    with pytest.raises(ValueError, match=rf"other shapes: {key}: file \(1, 2\)"):
        I3D.from_official({**state, key: torch.empty(1, 2, device="meta")})


def test_same_padding_gives_ceil_outputs_with_the_odd_zero_behind() -> None:
    for n, k, s in product(range(1, 40), (1, 2, 3, 7), (1, 2, 3)):
        if k < s:
            continue
        ((front, behind), *_) = same_padding((n, n, n), (k,) * 3, (s,) * 3)
        assert (n + front + behind - k) // s + 1 == -(-n // s)
        assert front + behind == max((-(-n // s) - 1) * s + k - n, 0)  # no more than that needs
        assert behind - front in (0, 1)


@pytest.mark.parametrize("kernel, stride", [((1, 3, 3), (1, 2, 2)), ((3, 3, 3), (1, 1, 1)), ((2, 2, 2), (2, 2, 2))])
def test_pooling_by_axes_is_pooling_by_boxes(kernel: Any, stride: Any) -> None:
    x = torch.rand(2, 3, 5, 8, 7)
    assert torch.equal(max_pool_same(x, kernel, stride), F.max_pool3d(pad_same(x, kernel, stride), kernel, stride))


def test_i3d_averages_its_logits_over_time() -> None:
    network = i3d_with_scale()
    x = torch.rand(1, 3, 17, 224, 224) * 2 - 1
    answers = network(x, outputs=("features", "logits"))
    assert answers["features"].shape == (1, 1024, 2) and answers["logits"].shape == (1, 400)
    head = network.logits.conv3d
    by_step = torch.einsum("bct,oc->bot", answers["features"], head.weight[..., 0, 0, 0]) + head.bias[:, None]
    torch.testing.assert_close(answers["logits"], by_step.mean(2), atol=1e-4, rtol=1e-4)
    assert (by_step[..., 0] - by_step[..., 1]).abs().max() > 1e-2
    short = network(x[:, :, :9], time_average=False)
    assert list(short) == ["logits"] and short["logits"].shape == (1, 400, 1)


@pytest.mark.parametrize(
    "shape, message",
    [
        ((1, 3, 8, 224, 224), "at least 9 frames, usually 16; got 8"),
        ((1, 3, 16, 224, 128), "224x224 pixels; got 224x128"),
        ((1, 16, 3, 224, 224), r"takes floats \(B, 3, T, 224, 224\)"),
        ((3, 16, 224, 224), r"takes floats \(B, 3, T, 224, 224\)"),
    ],
)
def test_i3d_says_what_clips_it_takes(shape: tuple[int, ...], message: str) -> None:
    with torch.device("meta"):
        network = I3D()
    with pytest.raises(ValueError, match=message):
        network(torch.empty(shape, device="meta"))
    with pytest.raises(ValueError, match="no output pool; it has logits and features"):
        network(torch.empty(1, 3, 16, 224, 224, device="meta"), outputs=("pool",))


# ---- videomae -----------------------------------------------------------------------------------------------------


def test_the_giant_has_the_keys_of_the_released_file_and_needs_no_memory_on_meta() -> None:
    meta, state = manifest("videomae-v2-giant-ssv2")
    network = VideoMAE.from_official(state)
    assert {k: list(v.shape) for k, v in network.state_dict().items()} == meta["keys"]
    assert sum(p.numel() for p in network.parameters()) == meta["parameters"]
    assert all(p.is_meta for p in network.parameters()) and not list(network.buffers())


def test_videomae_refuses_files_that_do_not_fit() -> None:
    state = VideoMAE(**TINY).state_dict()
    VideoMAE.from_official(state, **TINY)
    with pytest.raises(ValueError, match=r"missing in the file: fc_norm.weight"):
        VideoMAE.from_official({k: v for k, v in state.items() if k != "fc_norm.weight"}, **TINY)
    with pytest.raises(ValueError, match=r"not in the model: blocks.0"):
        VideoMAE.from_official(state, **{**TINY, "depth": 0})
    with pytest.raises(ValueError, match="img_size 30 must be a multiple of patch_size 14"):
        VideoMAE(**{**TINY, "img_size": 30})


def test_positions_are_one_row_of_sines_and_cosines() -> None:
    table = sine_cosine_table(50, 6)
    for row, place in product((0, 7, 49), range(6)):
        angle = torch.tensor(row / 10000 ** (2 * (place // 2) / 6))
        torch.testing.assert_close(table[row, place], angle.sin() if place % 2 == 0 else angle.cos())
    network = VideoMAE(**TINY)
    assert torch.equal(network.positions(16), sine_cosine_table(8 * 2 * 2, 12))


@pytest.mark.parametrize("frames", [8, 32])
def test_positions_of_other_lengths_lie_between_those_of_16_frames(frames: int) -> None:
    network = VideoMAE(**TINY)
    steps = frames // 2
    usual, ours = network.positions(16).view(8, 4, 12), network.positions(frames).view(steps, 4, 12)
    for step in range(steps):
        place = min(max((step + 0.5) * 8 / (steps + 0.1) - 0.5, 0), 7)  # the scale as released
        low = int(place)
        expected = torch.lerp(usual[low], usual[min(low + 1, 7)], place - low)
        torch.testing.assert_close(ours[step], expected, atol=1e-5, rtol=0)


def test_videomae_features_do_not_depend_on_the_batch() -> None:
    network = VideoMAE(**TINY)
    x = torch.rand(3, 3, 8, 28, 28)
    together, logits = network(x, outputs=("features", "logits")).values()
    assert together.shape == (3, 12) and logits.shape == (3, 5)
    torch.testing.assert_close(network(x[1:2])["features"], together[1:2])
    assert (together[0] - together[1]).abs().max() > 1e-3


def test_videomae_says_what_clips_it_takes() -> None:
    network = VideoMAE(**TINY)
    with pytest.raises(ValueError, match=r"\(B, 3, T, 28, 28\) in \[0, 1\]; got"):
        network(torch.rand(1, 3, 16, 28, 14))
    with pytest.raises(ValueError, match="frames by the 2; got 17"):
        network(torch.rand(1, 3, 17, 28, 28))
    with pytest.raises(ValueError, match="no output pool"):
        network(torch.rand(1, 3, 16, 28, 28), outputs=("pool",))


# ---- preprocessing ------------------------------------------------------------------------------------------------


def test_every_layout_of_the_same_clips_gives_the_same_input() -> None:
    x = random_clips(2, 3, 10, 12, 3)  # b t h w c
    wanted = preprocess_clips(x, size=6)
    assert wanted.shape == (2, 3, 3, 6, 6) and wanted.dtype == torch.float32
    for layout in ("bcthw", "btchw", "cwhtb"):
        turned = x.permute(*("bthwc".index(axis) for axis in layout))
        assert torch.equal(preprocess_clips(turned, layout=layout, size=6), wanted)
    one = preprocess_clips(x[1].permute(3, 0, 1, 2), layout="cthw", size=6)
    assert torch.equal(one, wanted[1])


def test_at_its_own_size_a_clip_is_only_scaled() -> None:
    x = random_clips(1, 2, 7, 7, 3)
    for method in ("direct", "short_side_crop"):
        ours = preprocess_clips(x, size=7, method=method)
        torch.testing.assert_close(ours, x.permute(0, 4, 1, 2, 3) / 127.5 - 1, atol=1e-6, rtol=0)
    floats = x / 255
    for given, low, high in ((x, 0, 255), (floats, 0, 1), (floats * 2 - 1, -1, 1)):
        ours = preprocess_clips(given, size=7, input_range=(low, high), output_range=(0, 1))
        torch.testing.assert_close(ours, floats.permute(0, 4, 1, 2, 3), atol=1e-6, rtol=0)


def test_the_short_side_is_fitted_and_the_middle_kept() -> None:
    x = random_clips(1, 1, 8, 17, 3)
    kept = preprocess_clips(x, size=8, method="short_side_crop", output_range=(0, 255))
    torch.testing.assert_close(kept, x[:, :, :, 4:12].permute(0, 4, 1, 2, 3).float(), atol=1e-4, rtol=0)
    upright = preprocess_clips(x.transpose(2, 3), size=8, method="short_side_crop", output_range=(0, 255))
    torch.testing.assert_close(upright.transpose(3, 4), kept)
    squashed = preprocess_clips(x, size=8, output_range=(0, 255))
    assert (squashed - kept).abs().max() > 10
    for side in (49, 30, 225):  # 49 * (224 / 49) is a little more than 224
        assert cover_and_crop(torch.rand(1, 3, side, side), 224, antialias=False).shape == (1, 3, 224, 224)


def test_antialias_changes_shrinking_alone() -> None:
    x = random_clips(1, 1, 20, 20, 3)
    smaller = [preprocess_clips(x, size=7, antialias=a) for a in (False, True)]
    larger = [preprocess_clips(x, size=31, antialias=a) for a in (False, True)]
    assert (smaller[0] - smaller[1]).abs().max() > 0.1
    torch.testing.assert_close(larger[0], larger[1], atol=1e-5, rtol=0)


def test_frames_are_cut_off_before_they_are_thinned() -> None:
    x = random_clips(2, 9, 6, 6, 3)
    ours = preprocess_clips(x, size=6, sequence_length=8, frame_stride=3)
    assert torch.equal(ours, preprocess_clips(x[:, [0, 3, 6]], size=6))
    with pytest.raises(ValueError, match="sequence_length is 10, but the clips have 9 frames"):
        preprocess_clips(x, size=6, sequence_length=10)


def test_truncation_makes_bytes_before_the_resize() -> None:
    x = torch.tensor([0.0, 0.999 / 255, 1 / 255, 200.7 / 255, 1.0, 1.2, -0.2]).view(1, 7, 1, 1, 1).expand(1, 7, 1, 1, 3)
    settings: dict[str, Any] = {"size": 1, "input_range": (0, 1), "output_range": (0, 255)}
    ours = preprocess_clips(x, quantize="truncate", **settings)[0, 0, :, 0, 0]
    assert ours.tolist() == [0, 0, 1, 200, 255, 255, 0]
    assert preprocess_clips(x, **settings)[0, 0, 3, 0, 0] == pytest.approx(200.7)
    every = torch.arange(256, dtype=torch.uint8).view(1, 256, 1, 1, 1).expand(1, 256, 1, 1, 3)
    bytes_again = preprocess_clips(every, size=1, output_range=(0, 255), quantize="truncate")
    assert bytes_again[0, 0, :, 0, 0].tolist() == list(range(256))


def test_mean_and_std_are_taken_by_channel_after_the_range() -> None:
    x = torch.full((1, 1, 2, 2, 3), 255, dtype=torch.uint8)
    ours = preprocess_clips(x, size=2, output_range=(0, 1), mean=(0.5, 0.25, 0), std=(0.5, 1, 2))
    assert ours[0, :, 0, 0, 0].tolist() == [1.0, 0.75, 0.5]


@pytest.mark.parametrize(
    "given, message",
    [
        ({"layout": "bhwc"}, "layout must be a permutation of bcthw"),
        ({"layout": "bcthw"}, "clips need 3 channels"),
        ({"input_range": (0, 1)}, "uint8 clips are in 0 to 255"),
        ({"output_range": (1, 1)}, "output_range must be two rising numbers"),
        ({"method": "crop"}, "method must be one of direct, short_side_crop; got 'crop'"),
        ({"interpolation": "lanczos"}, "interpolation must be one of"),
        ({"quantize": "round"}, "quantize must be one of none, truncate"),
        ({"size": 0}, "count from 1"),
        ({"frame_stride": 0}, "count from 1"),
    ],
)
def test_wrong_settings_are_refused(given: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        preprocess_clips(random_clips(1, 4, 6, 6, 3), **given)


def test_values_of_another_range_are_refused_and_an_overshoot_is_not() -> None:
    x = torch.rand(1, 2, 4, 4, 3)
    preprocess_clips(x * 1.2 - 0.1, input_range=(0, 1), size=4)
    for wrong in (x * 255, x * float("nan"), x * 10 - 5):
        with pytest.raises(ValueError, match="input_range is 0 to 1"):
            preprocess_clips(wrong, input_range=(0, 1), size=4)


def test_feature_wrappers_are_preprocessing_and_network() -> None:
    x = random_clips(2, 4, 20, 30, 3)
    network = VideoMAE(**TINY)
    wrapped = VideoMAEFeatures(network, method="short_side_crop")
    features = wrapped(x)["features"]
    inputs = preprocess_clips(x, size=28, method="short_side_crop", output_range=(0, 1))
    assert torch.equal(features, network(inputs)["features"]) and features.shape == (2, wrapped.dim)
    torch.testing.assert_close(wrapped(x / 255)["features"], features)
    assert (VideoMAEFeatures(network)(x)["features"] - features).abs().max() > 1e-4
    network_i3d = i3d_with_scale()
    wrapped_i3d, y = I3DFeatures(network_i3d), random_clips(1, 9, 12, 16, 3)
    expected = network_i3d(preprocess_clips(y))["logits"]
    assert torch.equal(wrapped_i3d(y)["features"], expected) and wrapped_i3d.dim == 400
    with pytest.raises(ValueError, match="at least 9 frames"):
        wrapped_i3d(y[:, :5])


@pytest.mark.parametrize("wrong", [{"method": "crop"}, {"size": 5}, {"colour": 1}, {"sequence_length": 0}])
def test_feature_wrappers_refuse_settings_before_any_clip(wrong: dict[str, Any]) -> None:
    with pytest.raises((ValueError, TypeError), match=r"method|size|colour|sequence_length"):
        VideoMAEFeatures(VideoMAE(**TINY), **wrong)


# ---- sets ---------------------------------------------------------------------------------------------------------


def numbered(frames: int, height: int = 32, width: int = 64) -> Frames:
    """Frames that show their number in eight black or white fields, which survive any codec."""
    bits = (np.arange(frames)[:, None] >> np.arange(8)) & 1
    fields = bits.reshape(frames, 2, 4).astype(np.uint8) * 255
    return np.repeat(fields.repeat(height // 2, 1).repeat(width // 4, 2)[..., None], 3, axis=-1)


def numbers(clip: Tensor) -> list[int]:
    """What `numbered` frames show."""
    t, h, w, _ = clip.shape
    fields = clip.float().view(t, 2, h // 2, 4, w // 4, 3).mean((2, 4, 5)) > 127
    return (fields.view(t, 8).long() << torch.arange(8)).sum(1).tolist()


def save_frames(folder: Path, frames: Frames, name: str = "frame_{}.png") -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for i, frame in enumerate(frames):
        Image.fromarray(frame).save(folder / name.format(i))


def test_every_folder_of_images_is_a_video_with_its_frames_in_order(tmp_path: Path) -> None:
    save_frames(tmp_path / "b", numbered(12))
    save_frames(tmp_path / "a" / "deep", numbered(3), "{:03}.png")
    (tmp_path / "a" / "notes.txt").touch()
    (tmp_path / ".hidden").mkdir()
    Image.new("RGB", (4, 4)).save(tmp_path / ".hidden" / "x.png")
    videos = open_videos(tmp_path)
    assert videos.names == [str(tmp_path / "a" / "deep"), str(tmp_path / "b")]
    assert [videos.num_frames(i) for i in range(len(videos))] == [3, 12] and videos.size(1) == (32, 64)
    assert numbers(videos.clip(1, 12)) == list(range(12))  # 10 after 9, not after 1
    assert numbers(videos.clip(1, 3, stride=4, start=2)) == [2, 6, 10]


def test_bad_frames_are_named(tmp_path: Path) -> None:
    save_frames(tmp_path / "v", numbered(4))
    Image.new("RGB", (8, 6)).save(tmp_path / "v" / "frame_2.png")
    with pytest.raises(ValueError, match=r"frame_2.png is 6x8, but frame_0.png is 32x64"):
        open_videos(tmp_path).clip(0, 4)
    (tmp_path / "v" / "frame_2.png").write_bytes(b"no picture")
    with pytest.raises(ValueError, match=r"frame_2.png cannot be read as a frame"):
        open_videos(tmp_path).clip(0, 4)


def test_grey_becomes_rgb(tmp_path: Path) -> None:
    grey = numbered(5)[..., :1]
    (tmp_path / "v").mkdir()
    for i, frame in enumerate(grey):
        Image.fromarray(frame[..., 0]).save(tmp_path / "v" / f"{i}.png")
    for source in (tmp_path, grey[None]):
        clip = open_videos(source).clip(0, 5)
        assert clip.shape == (5, 32, 64, 3) and numbers(clip) == list(range(5))


def test_arrays_are_opened_by_key_or_as_the_only_one(tmp_path: Path) -> None:
    array = np.stack([numbered(4), numbered(4)[::-1]])
    np.savez(tmp_path / "adm.npz", arr_0=array, arr_1=np.arange(2))
    np.savez_compressed(tmp_path / "one.npz", videos=array)
    np.save(tmp_path / "plain.npy", array)
    for source in (tmp_path / "adm.npz", tmp_path / "one.npz", tmp_path / "plain.npy", array, torch.tensor(array)):
        videos = open_videos(source)
        assert len(videos) == 2 and videos.size(0) == (32, 64) and videos.num_frames(1) == 4
        assert numbers(videos.clip(1, 2, stride=2, start=1)) == [2, 0] and videos.names[1].endswith("[1]")


def test_arrays_that_are_no_videos_are_refused(tmp_path: Path) -> None:
    np.savez(tmp_path / "two.npz", real=np.zeros(1), fake=np.zeros(1))
    with pytest.raises(ValueError, match=r"two.npz cannot be read: it holds real, fake, but no arr_0"):
        open_videos(tmp_path / "two.npz")
    np.save(tmp_path / "pickled.npy", np.array([{}]), allow_pickle=True)
    with pytest.raises(ValueError, match=r"pickled.npy cannot be read"):
        open_videos(tmp_path / "pickled.npy")
    (tmp_path / "torn.npz").write_bytes(b"PK")
    with pytest.raises(ValueError, match=r"torn.npz cannot be read"):
        open_videos(tmp_path / "torn.npz")
    for wrong in (torch.rand(1, 2, 4, 4, 3), torch.zeros(2, 4, 4, 3).byte(), torch.zeros(0, 2, 4, 4, 3).byte()):
        with pytest.raises(ValueError, match=r"videos are uint8 \(N, T, H, W, 3\) in 0..255"):
            open_videos(wrong)


def test_sources_without_videos_are_refused_with_what_is_allowed(tmp_path: Path) -> None:
    (tmp_path / "text").mkdir()
    (tmp_path / "text" / "a.txt").touch()
    (tmp_path / "empty").mkdir()
    save_frames(tmp_path / "images", numbered(2))
    wrong = {
        "text": r"holds no videos but only .txt; allowed: .*\.mp4, \.avi, \.mov, \.webm, \.mkv, \.gif",
        "empty": "holds no videos but nothing",
        "images": "holds 2 images, but no videos and no folders of frames",
        "text/a.txt": "is no video by its name",
    }
    for name, message in wrong.items():
        with pytest.raises(ValueError, match=message):
            open_videos(tmp_path / name)
    with pytest.raises(FileNotFoundError, match=r"imagse does not exist.*images"):
        open_videos(tmp_path / "imagse")


def test_clips_beyond_the_end_are_refused() -> None:
    videos = open_videos(numbered(10)[None])
    assert numbers(videos.clip(0, 3, stride=4, start=1)) == [1, 5, 9]
    with pytest.raises(ValueError, match=r"\[0\] has 10 frames; the clip needs 11"):
        videos.clip(0, 3, stride=4, start=2)
    with pytest.raises(ValueError, match="count from 1"):
        videos.clip(0, 0)


def test_without_pyav_only_video_files_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "av", None)
    (tmp_path / "a.mp4").touch()
    with pytest.raises(ImportError, match=r'pip install "varkit\[video\]"'):
        open_videos(tmp_path)
    with pytest.raises(ImportError, match=r'pip install "varkit\[video\]"'):
        write_video(numbered(2), tmp_path / "b.mp4")
    assert len(open_videos(numbered(2)[None])) == 1


# ---- clips --------------------------------------------------------------------------------------------------------


def test_a_window_is_frames_times_stride() -> None:
    rule = ClipRule(frames=4, stride=3)
    assert rule.window == 12 and rule.starts([0, 1], [11, 12]) == [[], [0]]
    assert ClipRule(frames=4, stride=3, start="all").starts([0, 1], [40, 11]) == [[0, 12, 24], []]
    assert ClipRule(frames=4, stride=3, start="random").starts([5, 6], [12, 11]) == [[0], []]


def test_random_starts_are_uniform_over_all_there_are() -> None:
    rule, videos = ClipRule(frames=2, stride=2, start="random", per_video=3), range(2000)
    starts = rule.starts(videos, [13] * 2000)
    counts = np.bincount(np.ravel(starts), minlength=10)
    assert len(counts) == 10  # 0 to 9
    assert ((counts - 600) ** 2 / 600).sum() < 27.9  # chi-square of 9 degrees of freedom, p = 0.001
    assert len({tuple(s) for s in starts}) > 800  # the draws of one video are not tied to each other
    assert rule.starts([1234], [13]) == [starts[1234]]
    assert starts != replace(rule, seed=1).starts(videos, [13] * 2000)


@pytest.mark.parametrize(
    "wrong, message",
    [
        ({"frames": 0}, "count from 1"),
        ({"stride": 0}, "count from 1"),
        ({"start": "last"}, "start must be one of first, middle, random, even, all; got 'last'"),
        ({"short": "loop"}, "short must be refuse or skip"),
        ({"per_video": 2}, "per_video=2 goes with start=random or even; got start=first"),
    ],
)
def test_rules_that_make_no_sense_are_refused(wrong: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ClipRule(**wrong)


def several(*lengths: int) -> VideoSet:
    return VideoSet([ArrayVideo(numbered(n)) for n in lengths], [f"v{i}" for i in range(len(lengths))], "set")


@pytest.mark.parametrize("start", ["first", "random", "all"])
def test_clips_are_the_same_in_any_batch_and_with_any_threads(start: Any) -> None:
    videos, rule = several(9, 4, 20, 5, 6), ClipRule(frames=2, stride=2, start=start)
    found = []
    for batch_size, workers in ((1, 1), (3, 2), (50, 5)):
        batches = clips(videos, rule, batch_size, workers)
        parts = list(batches)
        assert len(parts) == len(batches) and {len(x) for x, _ in parts[:-1]} <= {batch_size}
        assert all(x.dtype == torch.uint8 and x.shape[1:] == (2, 32, 64, 3) for x, _ in parts)
        found.append([(int(i), numbers(clip)) for x, indices in parts for clip, i in zip(x, indices, strict=True)])
    assert found[0] == found[1] == found[2]
    starts = rule.starts(range(5), [9, 4, 20, 5, 6])
    assert found[0] == [(i, [s, s + 2]) for i in range(5) for s in starts[i]]
    assert [numbers(batches.read(k)) for k in range(len(batches.plan))] == [shown for _, shown in found[0]]


def test_short_videos_are_refused_by_name_or_left_out_and_counted() -> None:
    videos = several(20, 7, 8, 3)
    with pytest.raises(ValueError, match="v1 has 7 frames; clips of 4 frames at stride 2 need 8"):
        clips(videos, ClipRule(frames=4, stride=2))
    batches = clips(videos, ClipRule(frames=4, stride=2, short="skip"), batch_size=4)
    assert batches.skipped == ["v1", "v3"]
    assert [indices.tolist() for _, indices in batches] == [[0, 2]]
    with pytest.raises(ValueError, match="all 4 videos are shorter than the 32 frames needed"):
        clips(videos, ClipRule(frames=16, stride=2, short="skip"))


def test_sizes_that_do_not_agree_are_named_unless_clips_are_resized() -> None:
    sizes = [(32, 64), (32, 64), (16, 32)]
    videos = VideoSet([ArrayVideo(numbered(4, *s)) for s in sizes], ["a", "b", "c"], "set")
    rule = ClipRule(frames=4)
    with pytest.raises(ValueError, match="a is 32x64 and c is 16x32"):
        clips(videos, rule, batch_size=3)
    assert len(list(clips(videos, rule, batch_size=2))) == 2
    ((batch, _),) = clips(videos, rule, batch_size=3, resize=8)
    assert batch.shape == (3, 4, 8, 8, 3) and batch.dtype == torch.float32
    assert torch.equal(batch[2], fit_clip(videos.clip(2, 4), 8))


def test_resized_clips_are_fitted_with_antialias_and_cut_to_bytes_where_asked() -> None:
    clip = random_clips(3, 12, 20, 3)
    floats = fit_clip(clip, 6)
    expected = preprocess_clips(
        clip, layout="thwc", size=6, method="short_side_crop", antialias=True, output_range=(0, 1)
    )
    torch.testing.assert_close(floats, expected.permute(1, 2, 3, 0), atol=1e-6, rtol=0)
    assert floats.min() >= 0 and floats.max() <= 1
    cut = fit_clip(clip, 6, "truncate")
    assert cut.dtype == torch.uint8 and torch.equal(cut, (floats * 255).floor().byte())
    videos = open_videos(clip[None])
    ((batch, _),) = clips(videos, ClipRule(frames=3), resize=6, quantize="truncate")
    assert torch.equal(batch[0], cut)


def test_reading_ahead_is_bounded_and_stops_with_the_reader() -> None:
    reads = []

    class Counting(ArrayVideo):
        def read(self, frames: int, stride: int, start: int) -> Frames:
            reads.append(start)
            return super().read(frames, stride, start)

    videos = VideoSet([Counting(numbered(200))], ["v"], "set")
    stream = iter(clips(videos, ClipRule(frames=2, start="all"), batch_size=4, workers=3))
    next(stream)
    stream.close()
    assert 4 <= len(reads) <= 2 * 4 + 3
    assert sorted(reads) == [2 * i for i in range(len(reads))]


@pytest.mark.parametrize(
    "wrong, message",
    [
        ({"batch_size": 0}, "count from 1"),
        ({"workers": 0}, "count from 1"),
        ({"resize": 0}, "count from 1"),
        ({"resize": 8, "quantize": "round"}, "quantize must be one of none, truncate"),
        ({"quantize": "truncate"}, "goes with resize"),
    ],
)
def test_batches_that_make_no_sense_are_refused(wrong: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        clips(several(4), ClipRule(frames=2), **wrong)


# ---- files --------------------------------------------------------------------------------------------------------


def encode(path: Path, codec: str, options: dict[str, str], times: list[int], pix_fmt: str = "yuv420p") -> None:
    """A file of `numbered` frames shown at the given times, in 25ths of a second."""
    av = pytest.importorskip("av", reason="the extra video is not installed")
    if codec not in av.codecs_available:
        pytest.skip(f"this build of PyAV has no {codec}")
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=25, options=options)
        stream.width, stream.height, stream.pix_fmt = 64, 32, pix_fmt
        for time, array in zip(times, numbered(len(times)), strict=True):
            frame = av.VideoFrame.from_ndarray(array, format="rgb24")
            frame.pts, frame.time_base = time, Fraction(1, 25)
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))


def decoded(path: Path) -> Tensor:
    """Every frame, from the beginning."""
    av = pytest.importorskip("av", reason="the extra video is not installed")
    with av.open(str(path)) as container:
        return torch.from_numpy(np.stack([f.to_ndarray(format="rgb24") for f in container.decode(video=0)]))


EVEN, UNEVEN = list(range(50)), list(np.cumsum([1 + i % 4 for i in range(50)]).tolist())


@pytest.mark.parametrize(
    "name, codec, options, times, seeks",
    [
        ("closed.mp4", "libx264", {"g": "12", "bf": "3"}, EVEN, True),
        ("open.mp4", "libx264", {"x264-params": "keyint=12:open-gop=1:bframes=3:scenecut=0"}, EVEN, True),
        ("uneven.mkv", "libx264", {"g": "10", "bf": "2"}, UNEVEN, True),
        ("old.mp4", "mpeg4", {"g": "10", "bf": "2"}, UNEVEN, True),
        ("old.avi", "mpeg4", {"g": "10", "bf": "2"}, EVEN, False),
        ("hidden.webm", "libvpx", {"g": "10", "auto-alt-ref": "1", "lag-in-frames": "16"}, EVEN, False),
        ("new.webm", "libvpx-vp9", {"g": "20", "cpu-used": "8"}, EVEN, True),
    ],
)
def test_clips_from_the_middle_are_those_of_decoding_from_the_beginning(
    name: str, codec: str, options: dict[str, str], times: list[int], seeks: bool, tmp_path: Path
) -> None:
    encode(tmp_path / name, codec, options, times)
    videos, whole = open_videos(tmp_path / name), decoded(tmp_path / name)
    assert videos.num_frames(0) == len(whole) == 50 and videos.size(0) == (32, 64)
    assert numbers(whole) == list(range(50))
    file = videos.videos[0]
    assert isinstance(file, video.VideoFile) and (file._place(45) is not None) == seeks
    for start in range(45):
        assert torch.equal(videos.clip(0, 3, 2, start), whole[start : start + 5 : 2]), start


def test_a_keyframe_is_really_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    encode(tmp_path / "a.mp4", "libx264", {"g": "10", "bf": "2"}, EVEN)
    file = open_videos(tmp_path / "a.mp4").videos[0]
    skipped = []
    decode = video.VideoFile._decode

    def watched(self: Any, frames: int, stride: int, skip: int, place: Any) -> Any:
        skipped.append((skip, place is not None))
        return decode(self, frames, stride, skip, place)

    monkeypatch.setattr(video.VideoFile, "_decode", watched)
    file.read(2, 1, 33)
    file.read(2, 1, 3)
    assert skipped == [(0, True), (3, False)]


def cut_at_the_front(path: Path, out: Path, frames: int) -> None:
    """The same packets, of which the first `frames` lie before the time at which the video begins."""
    av = pytest.importorskip("av", reason="the extra video is not installed")
    with av.open(str(path)) as source, av.open(str(out), "w", options={"avoid_negative_ts": "disabled"}) as target:
        old = source.streams.video[0]
        new = target.add_stream_from_template(old)
        for packet in source.demux(old):
            if packet.size:
                packet.pts, packet.dts = packet.pts - frames * 512, packet.dts - frames * 512  # 1/25 s of 1/12800
                packet.stream = new
                target.mux(packet)


def test_frames_that_a_container_hides_are_not_counted_as_frames(tmp_path: Path) -> None:
    encode(tmp_path / "a.mp4", "libx264", {"g": "12", "bf": "2"}, EVEN)
    cut_at_the_front(tmp_path / "a.mp4", tmp_path / "cut.mp4", 5)
    videos, whole = open_videos(tmp_path / "cut.mp4"), decoded(tmp_path / "cut.mp4")
    assert numbers(whole) == list(range(5, 50))
    for start in (1, 20, 40):
        assert torch.equal(videos.clip(0, 2, 1, start), whole[start : start + 2])
    with pytest.raises(ValueError, match=r"cut.mp4 has 45 frames; the clip needs 48"):
        videos.clip(0, 48)
    assert videos.num_frames(0) == 45


def boastful(path: Path, frames: int, said: int) -> None:
    """An .avi whose header says more frames than it has."""
    write_video(numbered(frames), path)
    raw = bytearray(path.read_bytes())
    place = raw.index(b"strh") + 8 + 32
    assert int.from_bytes(raw[place : place + 4], "little") == frames
    raw[place : place + 4] = said.to_bytes(4, "little")
    path.write_bytes(raw)


@pytest.mark.parametrize("workers", [1, 4])
@pytest.mark.parametrize("start", ["first", "random", "all"])
def test_clips_that_only_a_header_promises_are_replaced(start: Any, workers: int, tmp_path: Path) -> None:
    pytest.importorskip("av", reason="the extra video is not installed")
    boastful(tmp_path / "a.avi", 20, 60)
    write_video(numbered(40), tmp_path / "b.avi")
    rule = ClipRule(frames=8, start=start, per_video=5 if start == "random" else 1)
    (promised, there), (whole,) = rule.starts([0, 0], [60, 20]), rule.starts([1], [40])
    first = [p if p <= 12 else t for p, t in zip(promised, there, strict=False)]
    if start == "random":
        assert first != promised and first != there  # some promises are kept
    batches = clips(open_videos(tmp_path), rule, batch_size=1, workers=workers)
    found = [(int(i), numbers(c[0])[0]) for c, i in batches]
    assert found == [(0, s) for s in first] + [(1, s) for s in whole]


def test_a_video_that_turns_out_too_short_is_refused_or_left_out(tmp_path: Path) -> None:
    pytest.importorskip("av", reason="the extra video is not installed")
    boastful(tmp_path / "a.avi", 12, 60)
    write_video(numbered(40), tmp_path / "b.avi")
    batches = clips(open_videos(tmp_path), ClipRule(frames=16, short="skip"), batch_size=2)
    assert batches.skipped == []
    assert [i.tolist() for _, i in batches] == [[1]] and batches.skipped == [str(tmp_path / "a.avi")]
    with pytest.raises(ValueError, match=r"a.avi is shorter than its header says"):
        batches.read(0)
    with pytest.raises(ValueError, match=r"a.avi has 12 frames; clips of 16 frames at stride 1 need 16"):
        list(clips(open_videos(tmp_path), ClipRule(frames=16)))


def test_folders_of_videos_are_read_at_any_depth_and_images_beside_them_left_out(tmp_path: Path) -> None:
    pytest.importorskip("av", reason="the extra video is not installed")
    for name in ("b/x.MP4", "b/a.gif", "a/deep/y.mkv"):
        write_video(numbered(3), (tmp_path / name).with_suffix(Path(name).suffix.lower()))
    (tmp_path / "b" / "x.mp4").rename(tmp_path / "b" / "x.MP4")
    save_frames(tmp_path / "thumbnails", numbered(1))
    (tmp_path / "b" / ".a.mp4").touch()
    videos = open_videos(tmp_path)
    assert [Path(n).relative_to(tmp_path).as_posix() for n in videos.names] == ["a/deep/y.mkv", "b/a.gif", "b/x.MP4"]
    ((batch, indices),) = clips(videos, ClipRule(frames=3))
    assert indices.tolist() == [0, 1, 2] and all(numbers(c) == [0, 1, 2] for c in batch)


@pytest.mark.parametrize("content", [b"", b"no video at all " * 50, None])
def test_unreadable_files_are_named_before_anything_is_decoded(content: bytes | None, tmp_path: Path) -> None:
    pytest.importorskip("av", reason="the extra video is not installed")
    write_video(numbered(8), tmp_path / "a.mp4")
    whole = (tmp_path / "a.mp4").read_bytes()
    (tmp_path / "bad.mp4").write_bytes(whole[: len(whole) // 2] if content is None else content)
    with pytest.raises(ValueError, match=r"bad.mp4 cannot be read as a video"):
        clips(open_videos(tmp_path), ClipRule(frames=8))


@pytest.mark.parametrize("ending", sorted(WRITERS))
def test_what_is_written_is_read_again(ending: str, tmp_path: Path) -> None:
    pytest.importorskip("av", reason="the extra video is not installed")
    for height, width in ((32, 64), (34, 60)):
        path = tmp_path / "new" / f"{height}{ending}"
        write_video(torch.from_numpy(numbered(20, height, width)), path, fps=12.5)
        videos = open_videos(path)
        assert videos.num_frames(0) == 20 and videos.size(0) == (height, width)
        assert numbers(videos.clip(0, 20)) == list(range(20))
        assert numbers(videos.clip(0, 3, 4, 9)) == [9, 13, 17]
    write_video(random_clips(3, 33, 47, 3), tmp_path / f"odd{ending}")
    assert open_videos(tmp_path / f"odd{ending}").size(0) == (33, 47)
    assert {p.name for p in tmp_path.rglob("*")} == {"new", f"32{ending}", f"34{ending}", f"odd{ending}"}


def test_colours_survive_writing(tmp_path: Path) -> None:
    pytest.importorskip("av", reason="the extra video is not installed")
    colours = torch.tensor([[200, 30, 40], [20, 180, 60], [30, 50, 220]], dtype=torch.uint8)
    frames = colours[:, None, None].expand(3, 32, 32, 3).contiguous()
    for ending in WRITERS:
        write_video(frames, tmp_path / f"a{ending}")
        again = open_videos(tmp_path / f"a{ending}").clip(0, 3)
        assert (again.int() - frames.int()).abs().float().mean() < 4, ending


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    av = pytest.importorskip("av", reason="the extra video is not installed")
    path = tmp_path / "a.avi"  # its codec writes every frame at once
    write_video(numbered(4), path)
    before, convert, half_way = path.read_bytes(), av.VideoFrame.from_ndarray, []

    def broken(array: Frames, **kwargs: Any) -> Any:
        half_way.append([p.name for p in tmp_path.iterdir()])
        if len(half_way) == 6:
            raise RuntimeError("disk full")
        return convert(array, **kwargs)

    monkeypatch.setattr(av.VideoFrame, "from_ndarray", broken)
    with pytest.raises(RuntimeError, match="disk full"):
        write_video(numbered(9), path)
    assert len(half_way[-1]) == 2  # something was being written
    assert path.read_bytes() == before and [p.name for p in tmp_path.iterdir()] == ["a.avi"]


def test_what_cannot_be_written_is_refused(tmp_path: Path) -> None:
    wrong: list[tuple[Any, str, float, str]] = [
        (numbered(2), "a.wmv", 8, r"a.wmv has no ending that can be written; allowed: .mp4"),
        (numbered(2) / 255, "a.mp4", 8, r"a video is uint8 \(T, H, W, 3\); got float64"),
        (numbered(2)[..., 0], "a.mp4", 8, r"a video is uint8 \(T, H, W, 3\)"),
        (numbered(0), "a.mp4", 8, r"a video is uint8 \(T, H, W, 3\)"),
        (numbered(2), "a.mp4", 0, "fps must be in"),
        (numbered(2), "a.gif", 60, r"for .gif in \(0, 50\]; got 60"),
    ]
    for frames, name, fps, message in wrong:
        with pytest.raises(ValueError, match=message):
            write_video(frames, tmp_path / name, fps)
    assert not list(tmp_path.iterdir())
