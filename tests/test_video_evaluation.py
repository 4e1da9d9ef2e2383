"""Models and tokenizers of clips are scored: sampled by a protocol, given first frames, judged by a small network."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from tests.test_models import liven
from tests.test_video_pipeline import FRAMES, NAMES, SIDE, parts
from varkit import NextGroupSampler, Rng
from varkit.config import ConfigError
from varkit.metrics.classifier import ClipClassifier
from varkit.metrics.evaluate import Options, evaluate, prepare
from varkit.metrics.protocol import load_protocol
from varkit.metrics.reconstruction import psnr
from varkit.metrics.video_sources import clip_set, model_clips
from varkit.pictures import save_npz, to_uint8
from varkit.pipelines.best_of import find_classifier
from varkit.pipelines.class_to_video import ClassToVideoPipeline
from varkit.pipelines.clips import generate_clips
from varkit.training.objectives import build_objective, objective_config, takes_clips
from varkit.training.recipe import load_recipe

CPU = torch.device("cpu")
SHORT = [f"clips.frames={FRAMES}", "clips.real=null", "interval.resamples=20"]


@pytest.fixture(scope="module", name="pipe")
def _pipe() -> ClassToVideoPipeline:
    pipe = ClassToVideoPipeline(*parts(), NextGroupSampler(), NAMES)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture(scope="module", name="judge")
def _judge(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A classifier of tiny clips, in its folder."""
    folder = tmp_path_factory.mktemp("judge")
    torch.manual_seed(0)
    model: Any = liven(ClipClassifier(3, SIDE, FRAMES, widths=(8, 8)), 0.3)
    model.save_pretrained(folder)
    return folder


def random_clips(count: int, seed: int = 0, frames: int = FRAMES, side: int = SIDE) -> Tensor:
    g = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (count, frames, side, side, 3), dtype=torch.uint8, generator=g)


def run(generated: Any, reference: Any, judge: Path, num: int, **more: Any) -> Any:
    options = {"protocol": "moving-fashion", "overrides": SHORT, "weights": judge, "device": "cpu", "cache": False}
    return evaluate(generated, reference, num=num, **{**options, **more})


# ---- the network --------------------------------------------------------------------------------------------------


def test_the_classifier_takes_any_number_of_frames(judge: Path) -> None:
    model = ClipClassifier.from_pretrained(judge).eval()
    for frames in (4, 5, 16, 17):
        assert model(torch.rand(2, 3, frames, SIDE, SIDE)).shape == (2, 3)
    clip = torch.rand(1, 3, 4, SIDE, SIDE)
    assert not torch.allclose(model.features(clip), model.features(clip.flip(2)), atol=1e-4)  # it sees time
    for shape in ((2, 3, 3, SIDE, SIDE), (2, 3, 4, SIDE, 9), (2, 4, 4, SIDE, SIDE), (2, 3, SIDE, SIDE)):
        with pytest.raises(ValueError, match=r"this classifier takes \(B, 3, T, 8, 8\)"):
            model(torch.rand(shape))
    assert find_classifier(judge, "ClipClassifier") == judge
    with pytest.raises(ValueError, match="holds a ClipClassifier, not a classifier of images"):
        find_classifier(judge)


def test_the_classifier_learns_classes_of_clips() -> None:
    config = objective_config({"name": "clip-classifier", "image_size": 8, "num_frames": 4, "widths": [8, 16]})
    assert takes_clips(config)
    torch.manual_seed(0)
    objective: Any = build_objective(config, ["still", "moving"])
    assert objective.num_frames == 4 and objective.image_size == (8, 8)
    clips = torch.rand(8, 3, 1, 8, 8).repeat(1, 1, 4, 1, 1)
    clips[4:] = torch.stack([clip.roll(t, -1) for clip in clips[4:, :, 0] for t in range(4)], 1).view(
        3, 4, 4, 8, 8
    ).transpose(0, 1)  # fmt: skip
    batch = {"images": clips * 2 - 1, "labels": torch.tensor([0] * 4 + [1] * 4)}
    optimiser = torch.optim.AdamW(objective.parameters(), 0.01)
    for step in range(60):
        loss = objective(batch, "main", step, 60, Rng.from_seed(0, 8))["loss"]
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    objective.eval()
    assert float(objective.validate(batch, Rng.from_seed(0, 8))["accuracy"]) == 1
    recipe = load_recipe("moving_fashion_classifier")
    assert takes_clips(recipe.objective) and recipe.data.train == "moving-fashion"


# ---- models -------------------------------------------------------------------------------------------------------


def test_a_model_scores_as_the_clips_that_it_writes(pipe: ClassToVideoPipeline, judge: Path, tmp_path: Path) -> None:
    real = random_clips(5)
    made = list(generate_clips(pipe, [0, 1, 2], 6, 0, 4, guidance_scale=2.0))
    clips = [np.stack([np.asarray(frame) for frame in frames]) for _, _, frames in made]
    save_npz(clips, [label for _, label, _ in made], tmp_path / "x.npz")
    stored = run(str(tmp_path / "x.npz"), real, judge, 6).results[0]
    report = run(pipe, real, judge, 6, guidance=[2.0, 1.0], batch_size=4)
    drawn = report.results[0]
    assert drawn.name == "ClassToVideoPipeline, guidance 2" and drawn.settings["labels"] == "cycled"
    assert [s.title for s in drawn.scores] == ["FD(moving-fashion)", "accuracy"]
    for metric in ("frechet", "accuracy"):
        assert drawn.score(metric).value == pytest.approx(stored.score(metric).value, rel=1e-6)
    assert drawn.score("frechet").value != report.results[1].score("frechet").value
    model = ClipClassifier.from_pretrained(judge).eval()
    pixels = torch.from_numpy(np.stack(clips)).permute(0, 4, 1, 2, 3).float() / 127.5 - 1
    right = (model(pixels).argmax(1) == torch.tensor([0, 1, 2, 0, 1, 2])).float().mean()
    assert drawn.score("accuracy").value == pytest.approx(float(right))
    assert drawn.per_class is not None and drawn.per_class.names == list(NAMES.values())
    assert any("biased upwards" in w for w in report.warnings)
    one_by_one = run(pipe, real, judge, 6, guidance=[2.0], batch_size=1).results[0]
    assert one_by_one.score("frechet").value == pytest.approx(drawn.score("frechet").value, rel=1e-5)


def test_equal_clips_are_at_no_distance_and_bounds_come_first(judge: Path) -> None:
    real = random_clips(6)
    report = run(real, real, judge, 6, bounds=random_clips(9, 1))
    bound, same = report.results
    assert same.score("frechet").value == pytest.approx(0, abs=1e-6) and bound.bound and bound.num == 6
    assert bound.score("frechet").value > 0 and "accuracy" not in {s.name for s in same.scores}
    assert any("no accuracy: no labels" in w for w in report.warnings)


def test_classes_and_first_frames_are_those_of_real_clips(pipe: ClassToVideoPipeline, tmp_path: Path) -> None:
    real = random_clips(3)
    save_npz(list(real.numpy()), [2, 0, 2], tmp_path / "real.npz")
    protocol = load_protocol("moving-fashion", [*SHORT, "sampling.labels=reference"], num=5)
    clips = clip_set(str(tmp_path / "real.npz"), protocol, generated=False)
    made = model_clips(pipe, "m", protocol, CPU, clips)
    assert made.labels is not None and made.labels.tolist() == [2, 0, 2, 2, 0] and made.size == (FRAMES, SIDE, SIDE)
    direct = pipe([0], rng=Rng.for_keys(0, torch.tensor([4])), output_type="pt").videos
    assert torch.equal(made.read([4])[0], to_uint8(direct[0].permute(0, 2, 3, 1) * 2 - 1))
    with pytest.raises(ValueError, match="draws the classes of the real clips, but these have none"):
        model_clips(pipe, "m", protocol, CPU, clip_set(real, protocol, generated=False))
    protocol = load_protocol("moving-fashion", [*SHORT, "clips.given=2"], num=5)
    clips = clip_set(real, protocol, generated=False)
    made = model_clips(pipe, "m", protocol, CPU, clips)
    assert made.labels is None and made.settings["given"] == 2
    start = pipe.image_tokenizer.encode_start(real[:2, :2].permute(0, 4, 1, 2, 3).float() / 127.5 - 1)
    back = to_uint8(pipe.image_tokenizer.decode(start)).permute(0, 2, 3, 4, 1)  # as the tokenizer gives them back
    assert torch.equal(made.read([3, 1])[:, :2], back[[0, 1]]) and not torch.equal(back, real[:2, :2])


def test_long_clips_are_drawn_in_windows_and_cut(pipe: ClassToVideoPipeline) -> None:
    protocol = load_protocol("moving-fashion", ["clips.frames=5", "clips.real=null"], num=2)
    made = model_clips(pipe, "m", protocol, CPU, None).read([1])
    direct = pipe([1], rng=Rng.for_keys(0, torch.tensor([1])), num_frames=5, output_type="pt").videos
    assert torch.equal(made[0], to_uint8(direct[0].permute(0, 2, 3, 1) * 2 - 1))
    cut = load_protocol("moving-fashion", ["clips.frames=3", "clips.real=null"], num=2)
    assert torch.equal(model_clips(pipe, "m", cut, CPU, None).read([1])[0], made[0, :3])


def test_what_cannot_be_scored_is_refused(pipe: ClassToVideoPipeline, judge: Path, tmp_path: Path) -> None:
    real = random_clips(4)
    predict = ClassToVideoPipeline(*parts(), NextGroupSampler())
    predict.transformer.condition = "frames"
    stored = tmp_path / "real.npz"
    assert prepare(real.numpy(), "moving-fashion", stored, Options(judge, device="cpu"), SHORT) == 4
    given = [*SHORT, "clips.given=2"]
    prepare(real.numpy(), "moving-fashion", tmp_path / "given.npz", Options(judge, device="cpu"), given)
    for call, message in (
        (("fashion-llamagen", real, {}), "fashion-llamagen draws images; moving-fashion scores videos"),
        ((real, real, {"guidance": [2.0]}), "is no model of clips: there is nothing to sample"),
        ((predict, real, {}), "take a protocol with clips.given, such as 5"),
        ((pipe, str(tmp_path / "given.npz"), {"overrides": given}), "give videos, no file of statistics"),
        ((pipe, real, {"sampling": {"solver": "heun"}}), "has no setting solver"),
        ((real, random_clips(4, side=16), {}), "scores of two sizes say little"),
    ):
        with pytest.raises(ValueError, match=message):
            run(call[0], call[1], judge, 4, **call[2])
    assert run(pipe, str(stored), judge, 4).results[0].score("frechet").value > 0
    with pytest.raises(ConfigError, match=r"clips.given must be below clips.frames, 4; got 4"):
        load_protocol("moving-fashion", [*SHORT, "clips.given=4"])
    with pytest.raises(ConfigError, match="accuracy asks a classifier of clips, the network moving-fashion; i3d"):
        load_protocol("fvd-tats", metrics=["fvd", "accuracy"])
    with pytest.raises(ConfigError, match=r"network.name: classifier does not score videos"):
        load_protocol("moving-fashion", ["network.name=classifier"])


def test_the_named_set_is_a_reference_with_classes(pipe: ClassToVideoPipeline, judge: Path, tmp_path: Path) -> None:
    g = np.random.RandomState(0)
    for split, count in (("train", 40), ("t10k", 20)):
        images, labels = g.randint(0, 256, (count, 28, 28), np.uint8), (np.arange(count) % 10).astype(np.uint8)
        for kind, array in (("images-idx3", images), ("labels-idx1", labels)):
            head = np.array([0x0800 + array.ndim, *array.shape], ">i4").tobytes()
            (tmp_path / f"{split}-{kind}-ubyte").write_bytes(head + array.tobytes())
    protocol = load_protocol("moving-fashion", SHORT, num=6)
    opening: dict[str, Any] = {"root": str(tmp_path), "size": (16, 16)}
    held = clip_set("moving-fashion:test", protocol, generated=True, **opening)
    assert held.num == 20 and held.size == (FRAMES, 16, 16) and held.labels is not None
    assert held.labels.tolist() == [i % 10 * 3 + i % 3 for i in range(20)] and len(held.class_names) == 30
    real = clip_set("moving-fashion", protocol, generated=False, **opening)
    small = clip_set("moving-fashion", protocol, generated=False, root=str(tmp_path), size=(8, 8))
    assert real.num == 40 and len({held.hash(), real.hash(), small.hash()}) == 3
    with pytest.raises(ValueError, match="has class 17, but the classifier of clips in judge0 knows 3 classes"):
        run(pipe, "moving-fashion", judge, 6, root=str(tmp_path), bounds="moving-fashion:test")
    asked: dict[str, Any] = {"root": str(tmp_path), "metrics": ["fvd"]}
    report = run(pipe, "moving-fashion", judge, 6, bounds="moving-fashion:test", **asked)
    bound, drawn = report.results
    assert bound.name == "moving-fashion:test: real clips" and bound.num == drawn.num == 6
    assert drawn.score("frechet").value != bound.score("frechet").value > 0


# ---- sizes --------------------------------------------------------------------------------------------------------


def test_clips_come_to_the_sizes_of_a_protocol() -> None:
    wide = torch.zeros(2, FRAMES, 8, 24, 3, dtype=torch.uint8)
    wide[:, :, :, 12:] = 255
    base = [f"clips.frames={FRAMES}", "clips.real=null"]
    covered = clip_set(wide, load_protocol("fvd-tats", [*base, "clips.load_size=8"]), generated=False)
    squashed = clip_set(
        wide, load_protocol("fvd-tats", [*base, "clips.load_size=8", "clips.load=squash"]), generated=True
    )
    for clips in (covered, squashed):
        assert clips.size == (FRAMES, 8, 8) and clips.read([1]).shape == (1, FRAMES, 8, 8, 3)
    one, other = covered.read([0])[0, 0, 0, :, 0], squashed.read([0])[0, 0, 0, :, 0]
    assert one.tolist() == [0] * 4 + [1] * 4 and other[0] == 0 and other[-1] == 1 and one.dtype == torch.float32
    small = load_protocol("fvd-tats", [*base, "clips.load_size=8", "clips.score_size=4"])
    scored = clip_set(wide, small, generated=False)
    assert scored.size == (FRAMES, 4, 4) and scored.read([0, 1]).shape == (2, FRAMES, 4, 4, 3)
    assert clip_set(wide, small, generated=False, scored=False).size == (FRAMES, 8, 8)
    assert len({clips.hash() for clips in (covered, squashed, scored)}) == 3


def test_a_model_of_another_size_is_brought_to_that_of_the_protocol(pipe: ClassToVideoPipeline) -> None:
    base = [f"clips.frames={FRAMES}", "clips.real=null", "clips.load_size=16", "clips.score_size=12", "clips.given=2"]
    protocol = load_protocol("fvd-tats", base, num=2)
    real = clip_set(random_clips(2, side=20), protocol, generated=False, scored=False)
    made = model_clips(pipe, "m", protocol, CPU, real)
    clips = made.read([0, 1])
    assert made.size == (FRAMES, 12, 12) and clips.shape == (2, FRAMES, 12, 12, 3) and clips.is_floating_point()
    assert 0 <= float(clips.min()) < float(clips.max()) <= 1


# ---- reconstructions ----------------------------------------------------------------------------------------------


def test_reconstructed_clips_are_compared_with_their_originals(pipe: ClassToVideoPipeline, judge: Path) -> None:
    real, tokenizer = random_clips(5, side=SIDE), pipe.image_tokenizer
    options = {"protocol": "moving-fashion-rec", "metrics": ["frechet", "psnr", "codebook"]}
    result = run(tokenizer, real, judge, 3, **options).results[0]
    pixels = real[:3].permute(0, 4, 1, 2, 3).float() / 127.5 - 1
    back = to_uint8(tokenizer.decode(tokenizer.encode(pixels)))
    expected = psnr(back, real[:3].permute(0, 4, 1, 2, 3))
    assert result.score("psnr").value == pytest.approx(float(expected.mean()), rel=1e-6)
    assert result.num == 3 and result.size == (FRAMES, SIDE, SIDE) and "whole clip" in result.score("psnr").how
    assert result.score("frechet").title == "rFD(moving-fashion)" and result.score("codebook").value > 0
    picture = next(iter(result.pictures.values()))
    assert isinstance(picture, Image.Image) and picture.width > 8 * SIDE  # four frames of each
    stored = run(back.permute(0, 2, 3, 4, 1), real[:3], judge, 3, **options).results[0]
    assert stored.score("psnr").value == pytest.approx(result.score("psnr").value, rel=1e-6)
    assert stored.score("frechet").value == pytest.approx(result.score("frechet").value, rel=1e-4)


def test_longer_clips_than_are_scored_are_given_to_the_tokenizer(pipe: ClassToVideoPipeline, judge: Path) -> None:
    real, tokenizer = random_clips(3), pipe.image_tokenizer
    options: dict[str, Any] = {"protocol": "moving-fashion-rec", "metrics": ["psnr"]}
    short = run(tokenizer, real, judge, 3, **options, overrides=["clips.frames=3", *SHORT[2:]]).results[0]
    pixels = real.permute(0, 4, 1, 2, 3)
    back = to_uint8(tokenizer.decode(tokenizer.encode(pixels.float() / 127.5 - 1)))[:, :, :3]
    assert short.size == (3, SIDE, SIDE)
    assert short.score("psnr").value == pytest.approx(float(psnr(back, pixels[:, :, :3]).mean()), rel=1e-6)
    for source, reference, more, message in (
        (tokenizer, real, {"overrides": ["clips.frames=9"]}, "codes clips of 4 frames, moving-fashion-rec scores 9"),
        (tokenizer.frame, real, {}, "VQGAN codes images; moving-fashion-rec scores clips"),
        (tokenizer, random_clips(3, side=16), {}, "clips are 16x16, FrameTokenizer codes 8x8"),
        (random_clips(2), real, {}, "they must be the same clips in the same order"),
        (tokenizer, real, {"metrics": ["ssim"]}, "ssim needs 11 pixels a side; images are 8x8"),
    ):
        with pytest.raises(ValueError, match=message):
            run(source, reference, judge, 3, **{**options, **more})
    with pytest.raises(ValueError, match="FrameTokenizer codes clips; fashion-rec scores images"):
        evaluate(tokenizer, torch.zeros(3, 3, 8, 8, dtype=torch.uint8), protocol="fashion-rec", metrics=["psnr"], num=3)


# ---- protocols of the papers --------------------------------------------------------------------------------------


def test_protocols_say_what_the_papers_do() -> None:
    rules = {n: load_protocol(n) for n in ("fvd-larp-ucf101", "fvd-larp-k600", "fvd-nbp-ucf101", "fvd-nbp-k600")}
    larp, larp_k600, nbp, nbp_k600 = rules.values()
    assert larp.sampling.num == nbp.sampling.num == larp.clips.real == 10000
    assert larp_k600.sampling.num == nbp_k600.sampling.num == 50000
    assert larp.sampling.labels == nbp.sampling.labels == "reference" and larp.clips.start_real == "all"
    assert larp_k600.clips.given == nbp_k600.clips.given == 5
    assert larp_k600.clips.score_size == nbp_k600.clips.score_size == 64
    assert [r.frechet.ddof for r in rules.values()] == [0, 0, 1, 1]
    assert {r.clips.frames for r in rules.values()} == {16} and {r.clips.load_size for r in rules.values()} == {128}
    assert (nbp.clips.stride_real, nbp.clips.start_real, nbp.clips.load) == (3, "middle", "squash")
    assert load_protocol("fvd-tats").sampling.num == load_protocol("fvd-tats").clips.real == 2048
    assert load_protocol("rfvd-larp").network.name == "i3d" and math.isclose(load_protocol("rfvd-nbp").clips.frames, 17)
