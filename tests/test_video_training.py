"""Training on clips: tokenizers causal and frame by frame, generators on them, what is only for images."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import av
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import load_file
from typer.testing import CliRunner

from tests.test_clips import fashion_root as fashion_root
from tests.test_training import SLICE, TOKENIZER, lines
from varkit import Rng, registry
from varkit.cli import app
from varkit.config import ConfigError, override
from varkit.data.clips import ClipDataset
from varkit.data.codes import CodeSet
from varkit.data.transforms import ImageTransform
from varkit.data.video import open_videos
from varkit.data.video_writing import write_video
from varkit.pipelines.auto import AutoPipeline, open_tokenizer, tokenizer_frames
from varkit.tokenizers.frames import FrameTokenizer
from varkit.training.dry_run import dry_run
from varkit.training.loop import Trainer, train
from varkit.training.objectives import build_objective, objective_config, takes_clips
from varkit.training.recipe import Recipe, make_recipe

CLASSES = [str(i) for i in range(30)]
CAUSAL: dict[str, Any] = {
    "name": "video-vq",
    "model": "magvit2_moving_fashion",
    "model_overrides": registry.model_entry("magvit2_moving_fashion").tiny,
    "adversarial_weight": 0,
}
FRAMES: dict[str, Any] = {
    "name": "video-vq",
    "model": "frames_vq_fashion",
    "model_overrides": {
        "frame_config": {
            "codebook_size": 24,
            "latent_dim": 4,
            "z_channels": 8,
            "base_channels": 32,
            "channel_multipliers": [1, 1],
            "grid": 4,
            "track_usage": True,
        },
        "num_frames": 3,
    },
    "adversarial_start": 0.25,
    "discriminator_width": 8,
    "discriminator_layers": 1,
    "augment": True,
    "restart_every": 2,
}
OF_SCALES = {
    "frame_class": "MultiScaleVQ",
    "frame_config": registry.model_entry("multiscale_vq_fashion").tiny,
    "num_frames": 2,
}
RASTER: dict[str, Any] = {
    "name": "next-token",
    "model": "toy_raster",
    "model_overrides": {"hidden_size": 24},
    "sampling": {"guidance_scale": 2.0},
}


def clips_recipe(out: Path, objective: dict[str, Any], root: Path, *overrides: str) -> Recipe:
    values = {
        "name": "tiny",
        "out": str(out),
        "objective": objective,
        "data": {
            "train": "moving-fashion",
            "validation": "moving-fashion",
            "root": str(root),
            "clips": {"stride": 2, "held_out": "first"},
            "flip": True,
            "workers": 0,
        },
        "optim": {"lr": 3e-3, "warmup_steps": 2},
        "loop": {
            "steps": 8,
            "batch_size": 4,
            "precision": "no",
            "ema_decay": 0.25,
            "log_every": 1,
            "validate_every": 4,
            "validate_images": 50,
            "sample_every": 4,
            "save_every": 4,
        },
    }
    return make_recipe(override(values, overrides))


def resumed(whole: Path, plan: Recipe, step: int) -> Path:
    """The folder of a run that goes on from a checkpoint of another."""
    (plan.folder / "checkpoints").mkdir(parents=True)
    (whole / "checkpoints" / f"step-{step:08d}").rename(plan.folder / "checkpoints" / f"step-{step:08d}")
    return train(plan, resume=True).folder


def same_weights(one: Path, other: Path) -> bool:
    files = sorted(p.relative_to(one) for p in one.rglob("*.safetensors"))
    loaded = [(load_file(one / f), load_file(other / f)) for f in files]
    return bool(files) and all(torch.equal(a[k], b[k]) for a, b in loaded for k in a)


# ---- tokenizers ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("objective", "frames"), [(CAUSAL, 5), (FRAMES, 3)], ids=["causal", "frames"])
def test_a_tokenizer_of_clips_learns_resumes_exactly_and_exports(
    objective: dict[str, Any], frames: int, fashion_root: Path, tmp_path: Path
) -> None:
    whole = train(
        clips_recipe(tmp_path / "whole", objective, fashion_root, "loop.steps=12", "loop.save_every=6")
    ).folder
    log = lines(whole)
    validated = [line["validation/psnr"] for line in log if "validation/psnr" in line]
    assert validated[-1] > validated[0] and any("perplexity/all" in line for line in log)
    assert any("discriminator/loss" in line for line in log) == bool(objective.get("augment"))
    again = resumed(whole, clips_recipe(tmp_path / "again", objective, fashion_root, "loop.steps=12"), 6)
    assert same_weights(whole / "model", again / "model")
    tokenizer = open_tokenizer(str(whole / "model"))
    assert tokenizer.num_frames == frames == tokenizer_frames(str(whole / "model"))
    clip = torch.rand(2, 3, frames, 8, 8) * 2 - 1
    assert tokenizer.decode(tokenizer.encode(clip)).shape == clip.shape
    with Image.open(whole / "samples" / "step-00000012.png") as sheet:  # four clips, original and reconstruction
        assert sheet.size == (frames * 10 + 2, 8 * 10 + 2)


def test_losses_are_means_over_all_frames() -> None:
    built: Any = build_objective(objective_config(CAUSAL | {"l1_weight": 0.5, "l2_weight": 2.0}), CLASSES)
    clips = torch.rand(2, 3, 5, 8, 8) * 2 - 1
    losses = built({"images": clips}, "main", 0, 10, Rng.from_seed(0, 2))
    back = built.tokenizer(clips)[0]
    torch.testing.assert_close(losses["loss"], 0.5 * F.l1_loss(back, clips) + 2 * F.mse_loss(back, clips))
    built.eval()
    with torch.no_grad():
        back = built.tokenizer.decode(built.tokenizer.encode(clips))
        each = 10 * torch.log10(4 / (back - clips).square().mean((1, 3, 4)))  # B T
        torch.testing.assert_close(built.validate({"images": clips}, Rng.from_seed(0, 2))["psnr"], each.mean())


def test_the_discriminator_judges_frames_and_changes_those_of_a_clip_alike() -> None:
    built: Any = build_objective(objective_config(FRAMES | {"adversarial_start": 0.0}), CLASSES)
    built.max_steps = 4
    seen: list[torch.Tensor] = []
    built.discriminator.register_forward_pre_hook(lambda _, args: seen.append(args[0].detach()))
    still = (torch.rand(2, 3, 1, 8, 8) * 2 - 1).expand(-1, -1, 3, -1, -1)
    built({"images": still}, "main", 0, 4, Rng.from_seed(0, 2))
    built({"images": still}, "discriminator", 0, 4, Rng.from_seed(0, 2))
    assert seen[0].shape == (6, 3, 8, 8) and seen[1].shape == (12, 3, 8, 8)
    real = seen[1][:6].unflatten(0, (2, 3))
    torch.testing.assert_close(real[:, :1].expand(-1, 3, -1, -1, -1), real)
    assert not torch.allclose(real[0], still.transpose(1, 2)[0])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"restart_every": 5}, "levels of magvit2_moving_fashion are fixed"),
        ({"codebook": "ema"}, "levels of magvit2_moving_fashion are fixed"),
        ({"model": "vq_fashion", "model_overrides": {}}, r"vq_fashion \(grids .*\) is a VQGAN"),
        ({"model": "frames_vq_fashion", "model_overrides": OF_SCALES}, r"\(grids 2x1x1\+2x.*\) is a FrameTokenizer"),
        ({"discriminator": "style", "adversarial_weight": 0.1, "model_overrides": {}, "adaptive": False}, None),
    ],
)
def test_tokenizers_that_do_not_fit_are_refused(changes: dict[str, Any], message: str | None) -> None:
    plan = objective_config(CAUSAL | changes)
    if message is None:
        assert build_objective(plan, CLASSES).all_phases() == ["main", "discriminator"]
        return
    with pytest.raises(ConfigError, match=message):
        build_objective(plan, CLASSES)


# ---- generators ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("tokenizer")
    torch.manual_seed(0)
    registry.create_model("magvit2_moving_fashion", **CAUSAL["model_overrides"]).save_pretrained(folder)
    return str(folder)


def test_a_generator_of_clips_learns_resumes_exactly_and_shows_frames(
    tokenizer: str, fashion_root: Path, tmp_path: Path
) -> None:
    plan = RASTER | {"tokenizer": tokenizer}
    changes = ("loop.steps=12", "loop.save_every=6")
    whole = train(clips_recipe(tmp_path / "whole", plan, fashion_root, *changes)).folder
    validated = [line["validation/loss"] for line in lines(whole) if "validation/loss" in line]
    assert validated[-1] < validated[0]
    again = resumed(whole, clips_recipe(tmp_path / "again", plan, fashion_root, *changes), 6)
    assert same_weights(whole / "model", again / "model")
    assert open_tokenizer(str(again / "model")).num_frames == 5
    pipeline = AutoPipeline.from_pretrained(again / "model")
    assert pipeline.labels[29] == "ankle boot, diagonal" and pipeline.sampler.config.guidance_scale == 2.0
    videos = pipeline(["bag, vertical", 3], seed=0, output_type="pt").videos
    assert videos.shape == (2, 5, 3, 8, 8) and videos.isfinite().all()
    with Image.open(whole / "samples" / "step-00000012.png") as sheet:  # eight clips, five frames each
        assert sheet.size == (5 * 10 + 2, 8 * 10 + 2)


def test_sizes_come_from_the_tokenizer_of_clips(tokenizer: str) -> None:
    built: Any = build_objective(objective_config(RASTER | {"tokenizer": tokenizer}), CLASSES)
    assert built.num_frames == 5 and built.image_size == (8, 8) and built.columns == 5
    assert built.model.layout.grids == ((3, 2, 2),) and built.model.num_classes == 30
    batch = {"images": torch.rand(2, 3, 5, 8, 8) * 2 - 1, "labels": torch.tensor([29, -1])}
    assert built.tokens(batch, Rng.from_seed(0, 2)).shape == (2, 12)
    assert built.cond(batch).labels.tolist() == [29, 0]
    free: Any = build_objective(
        objective_config(RASTER | {"tokenizer": tokenizer, "model_overrides": {"num_classes": 0}}), CLASSES
    )
    assert free.model.num_classes == 0 and free.cond(batch).labels.tolist() == [0, 0]
    assert free.eval().pictures(batch, Rng.from_seed(0, 2)).shape == (8 * 5, 3, 8, 8)


def test_a_generator_goes_on_with_the_first_frames_of_clips(fashion_root: Path, tmp_path: Path) -> None:
    entry = registry.model_entry("larp_moving_fashion_frames")
    size = registry.create_model(entry.tokenizer, **entry.tiny_tokenizer)
    size.save_pretrained(tmp_path / "tokenizer")
    shape = {k: v for k, v in entry.tiny.items() if k not in ("num_tokens", "codebook_size", "latent_dim")}
    plan = {"name": "next-token", "model": entry.name, "model_overrides": shape, "given_frames": 1}
    plan |= {"tokenizer": str(tmp_path / "tokenizer")}
    built: Any = build_objective(objective_config(plan), CLASSES)
    clips = torch.rand(2, 3, size.num_frames, *size.image_size) * 2 - 1
    given = built.cond({"images": clips, "labels": torch.tensor([3, 4])}, None)
    held = clips[:, :, :1].expand_as(clips)
    assert built.from_frames and built.model.num_classes == 0
    assert torch.equal(given.vector, built.frozen("tokenizer").encode(held))
    folder = train(clips_recipe(tmp_path / "run", plan, fashion_root, "loop.steps=8")).folder
    validated = [line["validation/loss"] for line in lines(folder) if "validation/loss" in line]
    assert len(validated) == 2 and validated[-1] < validated[0]
    videos = AutoPipeline.from_pretrained(folder / "model")(frames=clips[:, :, :1], seed=0, output_type="pt").videos
    assert videos.shape == (2, size.num_frames, 3, *size.image_size)
    with pytest.raises(ConfigError, match=f"given_frames must be 1 to {size.num_frames - 1}"):
        build_objective(objective_config(plan | {"given_frames": size.num_frames}), CLASSES)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"control": {"kinds": ["canny"]}}, "objective.control is for images"),
        ({"self_generated": {}}, "objective.self_generated is for images"),
        ({"sizes": {"smallest": 16, "largest": 32}}, "objective.sizes is for images"),
        ({"given_frames": 2}, "given_frames is for generators that go on with given frames"),
        ({"model": "llamagen_fashion", "model_overrides": {}}, "llamagen_fashion cannot be made for clips"),
    ],
)
def test_what_is_for_images_is_refused(changes: dict[str, Any], message: str, tokenizer: str) -> None:
    with pytest.raises(ValueError, match=message):
        build_objective(objective_config(RASTER | {"tokenizer": tokenizer} | changes), CLASSES)


# ---- the loop -----------------------------------------------------------------------------------------------------


def test_the_loop_opens_clips_of_the_objectives_size(tokenizer: str, fashion_root: Path, tmp_path: Path) -> None:
    plan = clips_recipe(tmp_path / "run", RASTER | {"tokenizer": tokenizer}, fashion_root)
    trainer = Trainer(plan, resume=False)
    train_set, held = trainer.dataset, trainer.validation
    assert isinstance(train_set, ClipDataset) and isinstance(held, ClipDataset)
    assert (train_set.rule.frames, train_set.rule.stride, train_set.rule.start) == (5, 2, "random")
    assert (len(train_set), len(held), held.rule.start) == (240, 60, "first") and held.transform is not None
    assert not held.transform.flip and trainer.held_out_batch == 25
    batch = next(iter(trainer._loader()))
    assert batch["images"].shape == (4, 3, 5, 8, 8)
    facts = dry_run(plan)
    assert facts["run"]["classes"] == 30 and facts["run"]["images"] == 240 and not plan.folder.exists()


def test_clips_and_images_are_not_mixed_up(tokenizer: str, fashion_root: Path, tmp_path: Path) -> None:
    raster = RASTER | {"tokenizer": tokenizer}
    assert takes_clips(objective_config(CAUSAL)) and takes_clips(objective_config(raster))
    assert not takes_clips(objective_config(TOKENIZER))
    for objective, changes, message in (
        (TOKENIZER, ("data.clips=null",), "moving-fashion is a set of clips; multiscale-vq takes images"),
        (TOKENIZER, (f"data.train={SLICE}", "data.validation=null"), "data.clips is for objectives of clips"),
        (raster, ("loop.channels_last=true",), "channels_last is for images"),
        (raster, ("data.clips.fps=8", "data.clips.stride=1"), "no frames a second"),
        (raster, (f"data.train={SLICE}", "data.root=null"), r"videos are uint8 \(N, T, H, W, 3\)"),
    ):
        with pytest.raises(ValueError, match=message):
            Trainer(clips_recipe(tmp_path / "run", objective, fashion_root, *changes), resume=False)
    with pytest.raises(ConfigError, match="stands instead of stride"):
        clips_recipe(tmp_path / "run", raster, fashion_root, "data.clips.fps=8")


# ---- token files and reconstructions ------------------------------------------------------------------------------


def test_token_files_of_clips_are_those_of_the_clips_and_train(tokenizer: str, tmp_path: Path) -> None:
    videos = np.random.default_rng(0).integers(0, 256, (6, 12, 8, 8, 3)).astype(np.uint8)
    np.savez(tmp_path / "videos.npz", arr_0=videos, arr_1=np.arange(6) % 2)
    args = ["tokenize", tokenizer, str(tmp_path / "videos.npz"), "--out", str(tmp_path / "codes"), "--device", "cpu"]
    done = CliRunner().invoke(app, [*args, "--clips", "3", "--stride", "2", "--flip", "--shard-size", "4", "--json"])
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout)["views"][2] == "clip 2 of 3, 5 frames, every 2, center 1x"
    codes = CodeSet(tmp_path / "codes", random_view=False)
    model = open_tokenizer(tokenizer)
    for view, (start, mirrored) in enumerate([(0, False), (0, True), (1, False), (1, True), (2, False), (2, True)]):
        clips = torch.from_numpy(videos[:, start : start + 9 : 2]).permute(0, 4, 1, 2, 3).float() / 127.5 - 1
        expected = model.encode(clips.flip(-1) if mirrored else clips)
        assert torch.equal(torch.stack([codes.tokens(i, view) for i in range(6)]).long(), expected)
    plan = clips_recipe(tmp_path / "run", RASTER | {"tokenizer": tokenizer}, tmp_path, "data.root=null")
    data = {"train": str(codes.folder), "validation": str(codes.folder), "clips": None, "flip": False}
    run = train(replace(plan, data=replace(plan.data, **data)))
    assert run.model is not None and any("validation/loss" in line for line in lines(run.folder))
    refused = CliRunner().invoke(app, [*args, "--crops", "10", "--out", str(tmp_path / "more")])
    assert refused.exit_code == 2 and "ten crops are of images" in refused.output


def test_reconstructions_go_window_by_window_and_are_told(tokenizer: str, tmp_path: Path) -> None:
    folder = tmp_path / "videos"
    for name, frames, size in (("long.mp4", 12, (9, 15)), ("one.gif", 1, (8, 8)), ("whole.mp4", 5, (16, 16))):
        clip = np.random.default_rng(frames).integers(0, 256, (frames, *size, 3)).astype(np.uint8)
        write_video(clip, folder / name, 10)
    args = ["reconstruct", tokenizer, str(folder), "--out", str(tmp_path / "out"), "--device", "cpu"]
    done = CliRunner().invoke(app, args)
    assert done.exit_code == 0, done.output
    assert "long.mp4: 12 frames in 3 windows of 5, the last padded by 3 repeated frames, cut off again" in done.stdout
    assert "one.gif: 1 frames in 1 window of 5, the last padded by 4" in done.stdout
    result = json.loads((tmp_path / "out" / "metrics.json").read_text())
    assert [len(one["per_frame"]["psnr"]) for one in result["videos"]] == [12, 1, 5] and result["frames"] == 18
    each = [value for one in result["videos"] for value in one["per_frame"]["psnr"]]
    assert result["psnr"] == pytest.approx(sum(each) / 18, abs=1e-3)
    written = open_videos(tmp_path / "out" / result["videos"][0]["file"])
    assert written.num_frames(0) == 12 and written.size(0) == (8, 16) and written.rate(0) == pytest.approx(10, abs=0.1)
    # the second window is coded by itself
    model, source = open_tokenizer(tokenizer), open_videos(folder / "long.mp4")
    frames = ImageTransform(8, mode="center", enlarge=1.0)(source.clip(0, 5, 1, 5).permute(0, 3, 1, 2))
    clip = frames.transpose(0, 1)[None]
    back = model.decode(model.encode(clip))[0]
    expected = 10 * torch.log10(4 / (back - clip[0]).square().mean((0, 2, 3)))
    torch.testing.assert_close(
        torch.tensor(result["videos"][0]["per_frame"]["psnr"][5:10]), expected, atol=2e-2, rtol=0
    )
    few = CliRunner().invoke(app, [*args, "--frames", "3", "--num", "1", "--stride", "2", "--format", "gif", "--json"])
    assert few.exit_code == 0 and json.loads(few.stdout)["videos"][0]["file"] == "000-long.gif"
    assert open_videos(tmp_path / "out" / "000-long.gif").num_frames(0) == 3


def test_a_tokenizer_of_images_reconstructs_videos_frame_by_frame(tokenizer: str, tmp_path: Path) -> None:
    image = FrameTokenizer("VQGAN", FRAMES["model_overrides"]["frame_config"], 1).eval().frame
    cast(Any, image).save_pretrained(tmp_path / "image")
    clip = np.random.default_rng(0).integers(0, 256, (18, 8, 8, 3)).astype(np.uint8)
    write_video(clip, tmp_path / "videos" / "v.gif", 10)
    args = ["reconstruct", str(tmp_path / "image"), str(tmp_path / "videos"), "--out", str(tmp_path / "out")]
    done = CliRunner().invoke(app, [*args, "--by-frame", "--format", "gif", "--json"])
    assert done.exit_code == 0, done.output
    result = json.loads(done.stdout)
    pixels = open_videos(tmp_path / "videos").clip(0, 18, 1, 0).permute(0, 3, 1, 2)
    frames = pixels.float() / 127.5 - 1
    back = image.decode(image.encode(frames)).clamp(-1, 1)
    expected = 10 * torch.log10(4 / (back - frames).square().mean((1, 2, 3)))
    found = torch.tensor(result["videos"][0]["per_frame"]["psnr"])
    torch.testing.assert_close(found, expected, atol=2e-2, rtol=0)
    for wrong, message in (
        ([str(tmp_path / "image"), "--frames", "3"], "(see --by-frame)"),
        ([tokenizer, "--by-frame"], "--by-frame is for tokenizers of images"),
    ):
        refused = CliRunner().invoke(app, ["reconstruct", wrong[0], *args[2:], *wrong[1:]])
        assert refused.exit_code == 2 and message in " ".join(refused.output.split())


def test_a_generator_learns_clips_on_a_tokenizer_of_images(fashion_root: Path, tmp_path: Path) -> None:
    image = FrameTokenizer("VQGAN", FRAMES["model_overrides"]["frame_config"], 1).eval().frame
    cast(Any, image).save_pretrained(tmp_path / "image")
    plan = RASTER | {"tokenizer": str(tmp_path / "image"), "num_frames": 3}
    run = train(clips_recipe(tmp_path / "run", plan, fashion_root))
    pipeline = AutoPipeline.from_pretrained(run.folder / "model")
    pipeline.set_progress_bar_config(disable=True)
    assert pipeline(3, seed=0, output_type="np").videos.shape == (1, 3, 8, 8, 3)
    with pytest.raises(ConfigError, match="num_frames must be at least 1"):
        objective_config(plan | {"num_frames": 0})
    with pytest.raises(ConfigError, match=r"num_frames=6: .* cannot code clips of 6 frames"):
        causal = registry.create_model("magvit2_moving_fashion", **CAUSAL["model_overrides"])
        causal.save_pretrained(tmp_path / "causal")
        wrong = RASTER | {"tokenizer": str(tmp_path / "causal"), "num_frames": 6}
        train(clips_recipe(tmp_path / "other", wrong, fashion_root))


def test_videos_that_cannot_be_read_are_named(tokenizer: str, tmp_path: Path) -> None:
    write_video(np.zeros((6, 8, 8, 3), np.uint8), tmp_path / "v.mp4", 8)
    torn = tmp_path / "torn.mp4"
    torn.write_bytes((tmp_path / "v.mp4").read_bytes()[:600])
    nothing = tmp_path / "nothing.mp4"
    nothing.touch()
    with av.open(str(tmp_path / "frameless.mkv"), "w") as container:  # a stream of no frames
        stream = container.add_stream("mpeg4", rate=8)
        stream.width = stream.height = 8
        stream.pix_fmt = "yuv420p"
        container.start_encoding()
    for name, message in (
        ("torn.mp4", "torn.mp4"),
        ("nothing.mp4", "nothing.mp4"),
        ("frameless.mkv", "frameless.mkv"),
        ("gone.mp4", "does not exist"),
    ):
        done = CliRunner().invoke(app, ["reconstruct", tokenizer, str(tmp_path / name), "--out", str(tmp_path / "out")])
        assert done.exit_code == 2 and message in done.output and "Traceback" not in done.output, done.output
    bad = CliRunner().invoke(app, ["reconstruct", tokenizer, str(tmp_path), "--out", str(tmp_path), "--psnr", "20"])
    assert bad.exit_code == 2 and "are of images" in bad.output
