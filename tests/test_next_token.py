"""Training generators of single ids: each of the registry's kinds learns, resumes exactly and exports what draws."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests.test_training import GENERATOR, SLICE, TOKENIZER, lines, recipe
from varkit import MultiScaleVQ, Rng, registry
from varkit.config import ConfigError
from varkit.pipelines.auto import AutoPipeline, open_tokenizer
from varkit.pipelines.extract_codes import Views, extract_codes
from varkit.training.loop import train
from varkit.training.objectives import build_objective, objective_config

MODELS = ("llamagen_fashion", "rar_fashion", "maskgit_titok_fashion", "flextok_ar_fashion")
CLASSES = [str(i) for i in range(10)]


def tiny_tokenizer(model: str, folder: Path) -> str:
    """A folder with the tiny tokenizer of a registered generator."""
    entry = registry.model_entry(model)
    torch.manual_seed(0)
    registry.create_model(entry.tokenizer, **entry.tiny_tokenizer).save_pretrained(folder)
    return str(folder)


def objective(model: str, folder: Path, **changes: Any) -> dict[str, Any]:
    entry = registry.model_entry(model)
    sized = {"num_classes", "grid", "codebook_size", "latent_dim", "num_tokens", "levels"}
    shape = {k: v for k, v in entry.tiny.items() if k not in sized}
    values = {"name": "next-token", "model": model, "model_overrides": shape, "sampling": {"guidance_scale": 2.0}}
    return {**values, "tokenizer": tiny_tokenizer(model, folder)} | changes


@pytest.mark.parametrize("model", MODELS)
def test_a_run_learns_resumes_exactly_and_exports_what_draws(model: str, tmp_path: Path) -> None:
    plan = objective(model, tmp_path / "tokenizer")
    changes = ("loop.steps=24", "loop.validate_every=6", "loop.save_every=12", "optim.lr=5e-3", "loop.log_every=6")
    whole = train(recipe(tmp_path / "whole", plan, *changes))
    validated = [line["validation/loss"] for line in lines(whole.folder) if "validation/loss" in line]
    assert validated[-1] < validated[0]
    again = recipe(tmp_path / "again", plan, *changes)
    (tmp_path / "again" / "checkpoints").mkdir(parents=True)
    (whole.folder / "checkpoints" / "step-00000012").rename(tmp_path / "again" / "checkpoints" / "step-00000012")
    resumed = train(again, resume=True)
    for part in ("transformer", "image_tokenizer"):
        files = [next((r.folder / "model" / part).glob("*.safetensors")) for r in (whole, resumed)]
        one, other = (load_file(f) for f in files)
        assert all(torch.equal(one[k], other[k]) for k in one)
    pipeline = AutoPipeline.from_pretrained(resumed.folder / "model")
    assert type(pipeline.sampler).__name__ == pipeline.transformer.sampler
    assert pipeline.sampler.config.guidance_scale == 2.0
    images = pipeline(class_labels=[0, 1], seed=0, output_type="pt").images
    assert images.shape[0] == 2 and images.isfinite().all()


def test_sizes_come_from_the_tokenizer_and_orders_fall_over_the_run(tmp_path: Path) -> None:
    plan = objective("rar_fashion", tmp_path / "tokenizer", random_orders=[0.5, 1.0])
    built: Any = build_objective(objective_config(plan), CLASSES)
    assert built.model.layout == built.frozen("tokenizer").layout and built.model.num_classes == 10
    assert [built.options(step, 8)["random_ratio"] for step in range(4, 9)] == [1.0, 0.75, 0.5, 0.25, 0.0]
    assert "label_smoothing" not in built.options(0, 8)  # the paper's own


@pytest.mark.parametrize("model", MODELS)
def test_a_trained_generator_takes_other_classes(model: str, tmp_path: Path) -> None:
    plan = objective(model, tmp_path / "tokenizer")
    first: Any = build_objective(objective_config(plan), ["a", "b", "c"])
    first.export(tmp_path / "model")
    plan |= {"init_from": str(tmp_path / "model"), "model_overrides": {}}
    second: Any = build_objective(objective_config(plan), ["c", "new"])
    assert "3 -> 2 classes; 1 rows kept by name, 1 new" in second.notes[0]
    network, other = first.model.eval(), second.model.eval()
    tokens = torch.zeros(2, network.layout.length, dtype=torch.int64)

    def answer(module: Any, *labels: int) -> torch.Tensor:
        return module(tokens, torch.tensor(labels)).detach()

    torch.testing.assert_close(answer(other, 0, 2), answer(network, 2, 3))  # "c", and no class
    torch.testing.assert_close(answer(other, 1, 1), answer(network, 3, 3))  # a new class begins as none


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"random_orders": [0.5, 1.0]}, "random_orders is for RAR; MaskGIT has one order"),
        ({"random_orders": [0.9, 0.1]}, "two shares of the run"),
        ({"model": "toy_raster", "gradient_checkpointing": True}, "ToyRaster has none"),
        ({"model": "llamagen_t2i_xl"}, "conditioned on text"),
        ({"model": "vq_fashion"}, "vq_fashion is a tokenizer"),
        ({"model": "flextok_ar_fashion"}, "for tokenizers of quantised levels"),
        ({"label_smoothing": 1.0}, r"label_smoothing must be in \[0, 1\)"),
    ],
)
def test_what_does_not_go_together_is_refused(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    plan = objective("maskgit_titok_fashion", tmp_path / "tokenizer", model_overrides={}) | changes
    with pytest.raises(ConfigError, match=message):
        build_objective(objective_config(plan), CLASSES)


# ---- the tokenizer that they stand on ----------------------------------------------------------------------------

VQ: dict[str, Any] = {
    "name": "vq",
    "model": "vq_fashion",
    "model_overrides": {
        "codebook_size": 24,
        "latent_dim": 4,
        "z_channels": 8,
        "channel_multipliers": [1, 1],
        "grid": 4,
        "track_usage": False,
        "entropy_weight": 0.05,
    },
    "discriminator": "style",
    "adversarial_start": 0.25,
    "adaptive": True,
    "restart_every": 3,
}


@pytest.mark.parametrize("codebook", ["gradient", "ema"])
def test_the_vq_tokenizer_learns_with_the_same_objective(codebook: str, tmp_path: Path) -> None:
    plan = VQ | {"codebook": codebook, "model_overrides": VQ["model_overrides"] | {"entropy_weight": 0.0}}
    steps = ("loop.steps=8", "loop.validate_every=2", "optim.lr=3e-3", "loop.sample_every=0")
    plan = plan | ({"discriminator": "patch", "discriminator_layers": 1} if codebook == "ema" else {})
    run = train(recipe(tmp_path / "run", plan, *steps))
    found = lines(run.folder)
    validated = [line["validation/l2"] for line in found if "validation/l2" in line]
    assert validated[-1] < validated[0]
    assert {"usage/all", "adversarial", "discriminator/loss"} <= set().union(*found)
    assert open_tokenizer(str(run.model)).image_size == (8, 8)


def test_the_following_codebook_writes_the_parameter_not_its_normalised_copy() -> None:
    training: Any = build_objective(objective_config(VQ | {"codebook": "ema", "adversarial_weight": 0}), CLASSES)
    before = training.tokenizer.quantize.codebook.detach().clone()
    batch = {"images": torch.rand(4, 3, 8, 8, generator=torch.Generator().manual_seed(0)) * 2 - 1}
    training(batch, "main", 0, 10, Rng.from_seed(0, 4))
    training.after_step(0, Rng.from_seed(0, 1))
    assert not torch.equal(training.tokenizer.quantize.codebook, before)


# ---- from token files ---------------------------------------------------------------------------------------------


def coded(tokenizer: str, folder: Path, flip: bool = False) -> str:
    extract_codes(tokenizer, str(SLICE), folder, views=Views(mode="squash", flip=flip))
    return str(folder)


def test_token_files_train_as_the_images_do(tmp_path: Path) -> None:
    plan = objective("llamagen_fashion", tmp_path / "tokenizer")
    codes = coded(plan["tokenizer"], tmp_path / "codes")
    changes = ("loop.steps=3", "loop.validate_every=3", "data.flip=false")
    pixels = train(recipe(tmp_path / "pixels", plan, *changes))
    tokens = train(recipe(tmp_path / "tokens", plan, *changes, f"data.train={codes}", f"data.validation={codes}"))
    assert lines(pixels.folder) == lines(tokens.folder)


def test_views_change_and_other_predictions_go_with_token_files(tmp_path: Path) -> None:
    MultiScaleVQ(**TOKENIZER["model_overrides"], image_channels=1).save_pretrained(tmp_path / "tokenizer")
    plan = GENERATOR | {"tokenizer": str(tmp_path / "tokenizer"), "input_masking": {}}
    codes = coded(plan["tokenizer"], tmp_path / "codes", flip=True)
    run = train(recipe(tmp_path / "run", plan, "loop.steps=2", "data.flip=false", f"data.train={codes}"))
    assert (run.folder / "model" / "model_index.json").is_file()


def test_wrong_token_files_are_refused_before_work(tmp_path: Path) -> None:
    plan = objective("llamagen_fashion", tmp_path / "tokenizer")
    torch.manual_seed(1)
    entry = registry.model_entry("llamagen_fashion")
    registry.create_model(entry.tokenizer, **entry.tiny_tokenizer).save_pretrained(tmp_path / "other")
    codes = coded(str(tmp_path / "other"), tmp_path / "codes")
    fit, out = coded(plan["tokenizer"], tmp_path / "fit"), tmp_path / "run"
    for objective_, message, *more in (
        (plan, rf"made by {tmp_path}/other \(fingerprint .*tokenizer {tmp_path}/tokenizer is another", codes),
        (VQ, "this objective reads images", codes),
        (plan, "data.flip mirrors images", fit, "data.flip=true"),
        (plan | {"self_generated": {}}, "self_generated reads the images", fit),
    ):
        changes = ("data.flip=false", *more[1:], f"data.train={more[0]}")
        with pytest.raises(ValueError, match=message):
            train(recipe(out, objective_, *changes))
        assert not out.exists()
