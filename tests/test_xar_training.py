"""xAR and FlowAR trained by `next-entity`: they learn, and what they export draws."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.test_training import lines, recipe
from varkit import AutoPipeline
from varkit.config import ConfigError
from varkit.registry import create_model
from varkit.tokenizers.latent_pyramid import LatentPyramid
from varkit.training.loop import train
from varkit.training.objectives import build_objective, objective_config

SMALL = {"hidden_size": 32, "depths": [1, 1], "num_heads": 2, "dropout": 0.0, "attention_dropout": 0.0}
MODELS: dict[str, tuple[str, dict[str, Any], str | None]] = {
    "xar": ("xar_fashion", {"entity_size": 2}, None),
    "xar-scales": ("xar_fashion", {"entity": "scale"}, "nearest"),
    "flowar": ("flowar_fashion", {"head_width": 64, "head_depth": 1}, "area"),
    "flowar-vae": ("flowar_fashion", {"head_width": 64, "head_depth": 1, "scales": [1, 2, 4]}, None),
}


def plan(folder: Path, name: str, **changes: Any) -> dict[str, Any]:
    """The objective on a VAE of lively latents, of standard deviation 1 or so, or on its scales."""
    model, sizes, resize = MODELS[name]
    if not folder.exists():
        torch.manual_seed(0)
        vae = create_model(
            "kl_vae_fashion",
            image_size=8,
            latent_channels=2,
            block_out_channels=(8, 8),
            layers_per_block=1,
            norm_num_groups=4,
        ).eval()
        with torch.no_grad():
            vae.vae.quant_conv.bias[2:] -= 2.0  # less noise than signal
        (vae if resize is None else LatentPyramid.around(vae, (1, 2, 4), resize)).save_pretrained(folder)  # type: ignore[arg-type]
    sampling = {"head_steps": 3, "guidance_scale": 2.0, "guidance_times": [0, 0.9], "solver": "sde"}
    objective = {"name": "next-entity", "model": model, "tokenizer": str(folder), "sampling": sampling}
    return {**objective, "model_overrides": {**SMALL, **sizes}, **changes}


@pytest.mark.parametrize("name", MODELS)
def test_a_run_learns_and_exports_what_draws(name: str, tmp_path: Path) -> None:
    changes = ("loop.steps=60", "loop.validate_every=20", "loop.save_every=30", "loop.sample_every=60", "optim.lr=1e-2")
    run = train(recipe(tmp_path / "run", plan(tmp_path / "tokenizer", name), *changes))
    logged = lines(run.folder)
    validated = [line["validation/loss"] for line in logged if "validation/loss" in line]
    assert validated[-1] < validated[0] and validated[-1] < 0.6 * logged[0]["loss"]
    pipeline = AutoPipeline.from_pretrained(run.folder / "model")
    out = pipeline(class_labels=[0, 1], seed=0, output_type="pt")
    groups = len(pipeline.transformer.schedule())
    assert out.images.isfinite().all() and out.images.shape == (2, 3, 8, 8)
    assert out.stats["head_calls"] == 3 * groups and groups == (4 if name == "xar" else 3)


def test_what_does_not_fit_is_refused(tmp_path: Path) -> None:
    """A model of scales on a VAE that has one, and one of cells on scales."""
    plan(tmp_path / "vae", "xar")
    plan(tmp_path / "scales", "flowar")
    for name, tokenizer, message in (
        ("flowar", "vae", "the last of the scales must be the whole latent, 4x4"),
        ("xar", "scales", "do not fit together"),
    ):
        objective = plan(tmp_path / tokenizer, name)
        with pytest.raises((ValueError, ConfigError), match=message):
            build_objective(objective_config(objective), ["a", "b"])
