"""Entities of any kind and predictive trained by `next-entity`, and a hundred steps of every continuous generator in
bfloat16."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState
from typer.testing import CliRunner

from tests.test_clips import fashion_root as fashion_root
from tests.test_training import SLICE, lines, recipe
from tests.test_video_training import clips_recipe
from tests.test_xar_training import SMALL
from varkit import AutoPipeline
from varkit.cli import app
from varkit.config import ConfigError
from varkit.pipelines.extract_codes import Views, extract_codes
from varkit.registry import create_model, model_entry
from varkit.training.loop import train

HEAD = {"head_width": 64, "head_depth": 1}
VAE = {"block_out_channels": (8, 8), "layers_per_block": 1, "norm_num_groups": 4}


def tokenizer(folder: Path, kind: str) -> str:
    """Untrained, of 4x4 tokens: latents, ids, or ids at three scales."""
    torch.manual_seed(0)
    if kind == "latents":
        vae: Any = create_model("kl_vae_fashion", image_size=8, latent_channels=2, **VAE)
        with torch.no_grad():
            vae.vae.quant_conv.bias[2:] -= 2.0  # less noise than signal
        vae.save_pretrained(folder)
    else:
        name, more = ("vq_fashion", {"grid": 4}) if kind == "ids" else ("multiscale_vq_fashion", {"scales": (1, 2, 4)})
        sizes = {**model_entry(name).tiny, **more, "channel_multipliers": (1, 1)}
        create_model(name, **sizes).save_pretrained(folder)
    return str(folder)


def plan(folder: Path, kind: str, sampling: dict[str, Any] | None = None, **overrides: Any) -> dict[str, Any]:
    sizes = {k: v for k, v in SMALL.items() if "dropout" not in k}
    return {
        "name": "next-entity",
        "model": "entity_fashion",
        "tokenizer": tokenizer(folder, kind),
        "model_overrides": {**sizes, **HEAD, "entity_size": 2, **overrides},
        "sampling": sampling or {},
    }


@pytest.mark.parametrize(
    ("kind", "entity", "predictive"),
    [
        ("latents", "subsample", "flow"),
        ("latents", "scale", "diffusion"),
        ("ids", "cell", "categorical"),
        ("scales", "scale", "categorical"),
    ],
)
def test_a_run_learns_and_exports_what_draws(kind: str, entity: str, predictive: str, tmp_path: Path) -> None:
    noise = "clean" if kind == "scales" else "independent"
    sampling: dict[str, Any] = {"guidance_scale": 2.0} | ({"top_p": 0.9} if kind != "latents" else {"head_steps": 4})
    objective = plan(tmp_path / "t", kind, sampling, entity=entity, predictive=predictive, context_noise=noise)
    steps = ("loop.steps=60", "loop.validate_every=20", "loop.save_every=60", "loop.sample_every=60", "optim.lr=1e-2")
    run = train(recipe(tmp_path / "run", objective, *steps))
    logged = lines(run.folder)
    validated = [line for line in logged if "validation/loss" in line]
    assert validated[-1]["validation/loss"] < 0.8 * logged[0]["loss"]
    assert ("validation/accuracy" in validated[0]) == (kind != "latents")
    assert ("validation/mse" in validated[0]) == (predictive == "diffusion")
    pipeline = AutoPipeline.from_pretrained(run.folder / "model")
    out = pipeline(class_labels=[0, 1], seed=0, output_type="pt")
    assert out.images.isfinite().all() and out.images.shape == (2, 3, 8, 8)
    groups = len(pipeline.transformer.schedule())
    assert groups == (3 if entity == "scale" else 4)
    assert out.stats.get("head_calls", 0) == (4 * groups if kind == "latents" else 0)


@pytest.mark.parametrize(
    ("kind", "predictive", "head"),
    [("scales", "categorical", {}), ("latents", "flow", HEAD)],
    ids=["ids", "latents"],
)
def test_clips_are_learned_by_scales_from_a_tokenizer_of_images(
    kind: str, predictive: str, head: dict[str, Any], fashion_root: Path, tmp_path: Path
) -> None:
    """Each frame is coded by itself; a scale of all frames a step; first frames are known at every scale."""
    sampling: dict[str, Any] = {"guidance_scale": 2.0} | ({"head_steps": 4} if kind == "latents" else {})
    sizes = {"hidden_size": 32, "num_heads": 2, "depths": [1, 1], "entity": "scale", "entity_size": None, **head}
    overrides = {**sizes, "predictive": predictive, "context_noise": "clean"}
    objective = {
        "name": "next-entity",
        "model": "entity_moving_fashion",
        "tokenizer": tokenizer(tmp_path / "t", kind),
        "num_frames": 3,
        "model_overrides": overrides,
        "sampling": sampling,
    }
    settings = (
        "loop.steps=40",
        "loop.validate_every=20",
        "loop.sample_every=40",
        "loop.save_every=40",
        "optim.lr=1e-2",
    )
    run = train(clips_recipe(tmp_path / "run", objective, fashion_root, *settings)).folder
    validated = [line["validation/loss"] for line in lines(run) if "validation/loss" in line]
    assert validated[-1] < 0.9 * lines(run)[0]["loss"]
    pipeline = AutoPipeline.from_pretrained(run / "model")
    pipeline.set_progress_bar_config(disable=True)
    assert pipeline.transformer.layout.grids == ((3, 1, 1), (3, 2, 2), (3, 4, 4))
    assert pipeline.image_tokenizer.frame.layout.grids == ((1, 1), (2, 2), (4, 4))
    given = torch.rand(1, 3, 2, 8, 8) * 2 - 1
    out = pipeline([4, 7], frames=given, seed=0, output_type="pt")
    assert out.videos.shape == (2, 3, 3, 8, 8) and out.videos.isfinite().all() and out.stats["steps"] == 3
    torch.testing.assert_close(out.videos[:, :2], ((given + 1) / 2).transpose(1, 2).expand(2, -1, -1, -1, -1))
    tokens = pipeline([4, 7], frames=given, seed=0, output_type="latent").videos
    start = pipeline.image_tokenizer.encode_start(given)
    where = pipeline.image_tokenizer.start_positions(start.shape[1])
    torch.testing.assert_close(tokens[:, where], start.expand(2, *start.shape[1:]))
    if kind == "latents":  # ids of so short a training hardly differ
        other = pipeline([4, 7], frames=given.flip(-1), seed=0, output_type="latent").videos
        rest = torch.ones(tokens.shape[1], dtype=torch.bool)
        rest[where] = False
        assert not torch.equal(tokens[:, rest], other[:, rest])  # what is drawn depends on what is given


def test_token_files_of_clips_by_frame_train_as_the_clips_do(fashion_root: Path, tmp_path: Path) -> None:
    folder, codes, clips = tokenizer(tmp_path / "t", "ids"), tmp_path / "codes", tmp_path / "clips.npz"
    pixels = np.random.default_rng(0).integers(0, 256, (8, 3, 8, 8, 3), dtype=np.uint8)
    np.savez(clips, arr_0=pixels, arr_1=np.arange(8) % 2)
    told = CliRunner().invoke(app, ["tokenize", folder, str(clips), "--out", str(codes), "--frames", "3"])
    assert told.exit_code == 0, told.output
    objective = {
        "name": "next-entity",
        "model": "entity_moving_fashion",
        "tokenizer": folder,
        "num_frames": 3,
        "model_overrides": {"hidden_size": 32, "num_heads": 2, "depths": [1, 1]},
    }
    settings = ("data.flip=false", f"data.train={codes}", f"data.validation={codes}", "data.clips=null")
    found = lines(train(clips_recipe(tmp_path / "run", objective, fashion_root, *settings)).folder)
    assert np.isfinite([line["loss"] for line in found if "loss" in line]).all()
    objective["num_frames"] = 4
    with pytest.raises(ConfigError, match="is another"):
        train(clips_recipe(tmp_path / "other", objective, fashion_root, *settings))


def test_token_files_of_ids_train_as_the_images_do(tmp_path: Path) -> None:
    objective = plan(tmp_path / "t", "ids", entity="cell", predictive="categorical")
    codes = str(tmp_path / "codes")
    extract_codes(objective["tokenizer"], str(SLICE), Path(codes), views=Views(mode="squash"))
    changes = ("loop.steps=6", "loop.validate_every=3", "data.flip=false")
    pixels = train(recipe(tmp_path / "pixels", objective, *changes))
    tokens = train(recipe(tmp_path / "tokens", objective, *changes, f"data.train={codes}", f"data.validation={codes}"))
    for a, b in zip(lines(pixels.folder), lines(tokens.folder), strict=True):
        assert a.keys() == b.keys() and all(a[k] == pytest.approx(b[k], rel=1e-3, abs=1e-4) for k in a)


@pytest.mark.parametrize(
    ("kind", "overrides", "message"),
    [
        ("ids", {"predictive": "flow"}, "do not fit together"),
        ("latents", {"predictive": "categorical", "entity": "cell"}, "do not fit together"),
        ("ids", {"predictive": "categorical", "entity": "scale", "context_noise": "clean"}, "two scales or more"),
        ("scales", {"predictive": "categorical", "entity": "cell"}, "do not fit together"),
    ],
)
def test_a_tokenizer_of_another_kind_is_refused(
    kind: str, overrides: dict[str, Any], message: str, tmp_path: Path
) -> None:
    with pytest.raises((ValueError, ConfigError), match=message):
        train(recipe(tmp_path / "run", plan(tmp_path / "t", kind, **overrides), "loop.steps=1"))


# ---- half precision -----------------------------------------------------------------------------------------------

CONTINUOUS: dict[str, tuple[str, dict[str, Any]]] = {
    "mar": ("mar_fashion", {}),
    "xar": ("xar_fashion", {"entity_size": 2}),
    "flowar": ("flowar_fashion", {"scales": [1, 2, 4]}),
    "flowar-cross": ("flowar_fashion", {"scales": [1, 2, 4], "cross": True}),
    "entity-flow": ("entity_fashion", {"entity_size": 2}),
    "entity-diffusion": ("entity_fashion", {"entity_size": 2, "predictive": "diffusion", "head_network": "token"}),
}


@pytest.fixture(name="other_precision")
def _other_precision() -> Iterator[None]:
    """accelerate keeps one precision a process."""
    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.mark.usefixtures("other_precision")
@pytest.mark.parametrize("name", CONTINUOUS)
def test_a_hundred_steps_in_bfloat16_stay_finite(name: str, tmp_path: Path) -> None:
    model, overrides = CONTINUOUS[name]
    tiny = {
        k: v for k, v in model_entry(model).tiny.items() if k not in ("num_classes", "grid", "latent_dim", "scales")
    }
    tiny |= {"patch_size": 1} if name == "mar" else {}
    objective = {
        "name": "next-entity",
        "model": model,
        "tokenizer": tokenizer(tmp_path / "t", "latents"),
        "model_overrides": {**tiny, **overrides},
    }
    changes = (
        "loop.steps=100",
        "loop.precision=bf16",
        "optim.lr=1e-2",
        "loop.validate_every=50",
        "loop.sample_every=0",
    )
    run = train(recipe(tmp_path / "run", objective, *changes, "loop.save_every=100"))
    found = lines(run.folder)
    losses = [line["loss"] for line in found if "loss" in line]
    assert len(losses) == 100 and np.isfinite(losses).all() and np.mean(losses[-20:]) < np.mean(losses[:20])
    assert all(line.get("bad_steps", 0) == 0 for line in found)
