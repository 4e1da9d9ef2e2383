"""Training generators of latents: a toy of one file learns, resumes exactly and exports what draws, from images and
from token files; no real model of continuous tokens is named."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.modeling_utils import ModelMixin
from safetensors.torch import load_file
from torch import Tensor, nn
from typer.testing import CliRunner

from tests.test_training import SLICE, lines, recipe
from varkit import Rng, registry
from varkit.cli import app
from varkit.config import ConfigError
from varkit.data.codes import CodeSet
from varkit.heads.flow import Flow, add_noise, draw_sigma
from varkit.interfaces import Cond, Generator, Losses, State
from varkit.layout import TokenLayout
from varkit.pipelines.auto import AutoPipeline, open_tokenizer
from varkit.pipelines.extract_codes import Views, extract_codes
from varkit.registry import ModelEntry
from varkit.rng import Draw
from varkit.training.dry_run import dry_run
from varkit.training.loop import train
from varkit.training.objectives import build_objective, objective_config

CLASSES = [str(i) for i in range(10)]
VAE = {"image_size": 8, "latent_channels": 2, "block_out_channels": (8, 8), "layers_per_block": 1, "norm_num_groups": 4}


class ToyState(State):
    def __init__(self, labels: Tensor) -> None:
        self.labels, self.length = labels, 0

    def rewind(self, count: int) -> None:
        self.length -= count

    def reset(self) -> None:
        self.length = 0


class ToyFlow(ModelMixin, ConfigMixin, Generator):
    """One position after another, each by a flow MLP that sees the latent before it, its place and the class."""

    sampler = "ContinuousSampler"

    @register_to_config
    def __init__(
        self,
        num_classes: int = 10,
        grid: tuple[int, int] = (4, 4),
        latent_dim: int = 2,
        width: int = 48,
        cond_drop_rate: float = 0.1,
    ) -> None:
        super().__init__()
        self.layout = TokenLayout((tuple(grid),), None, latent_dim)
        self.num_classes = num_classes
        self.classes = nn.Embedding(num_classes + 1, width)
        self.places = nn.Parameter(torch.randn(self.layout.length, width) * 0.2)
        self.read = nn.Linear(latent_dim, width)
        self.mlp = nn.Sequential(nn.Linear(latent_dim + 1 + width, width), nn.SiLU(), nn.Linear(width, latent_dim))

    def schedule(self, num_steps: int | None = None) -> list[Tensor]:
        return list(torch.arange(self.layout.length).split(1))

    def start(self, cond: Cond, null: Cond | None = None) -> ToyState:
        return ToyState(cond.beside(null).labels)

    def context(self, inputs: Tensor, labels: Tensor, positions: Tensor) -> Tensor:
        return self.read(inputs) + self.places[positions] + self.classes(labels)[:, None]

    def velocity(self, context: Tensor, x: Tensor, t: Tensor) -> Tensor:
        """x (B, n, C) at times t (B,) or (B, n)."""
        t = (t if t.dim() == 2 else t[:, None].expand(x.shape[:2]))[..., None]
        return self.mlp(torch.cat([x, t, context], -1).to(self.dtype))

    def predict(self, state: Any, inputs: Tensor, positions: Tensor) -> Flow:
        branches = len(state.labels) // len(inputs)
        parts = self.context(inputs.repeat(branches, 1, 1), state.labels, positions).chunk(branches)
        pair = (lambda x, t: tuple(self.velocity(c, x, t) for c in parts)) if branches == 2 else None
        return Flow(lambda x, t: self.velocity(parts[0], x, t), self.layout.dim, pair)  # type: ignore[arg-type]

    def append(self, state: Any, tokens: Tensor, positions: Tensor) -> None:
        state.length += positions.shape[-1]

    def training_loss(self, tokens: Tensor, inputs: Tensor, cond: Cond, rng: Rng, **options: Any) -> Losses:
        labels, every = cond.labels, torch.arange(self.layout.length)
        if self.training:
            drop = rng.uniform(torch.zeros(1, dtype=torch.int64), Draw.COND_DROP)[:, 0] < self.config.cond_drop_rate
            labels = labels.masked_fill(drop, self.num_classes)
        noise, sigma = rng.normal(every, Draw.NOISE, count=self.layout.dim), draw_sigma(rng, every)
        predicted = self.velocity(self.context(inputs, labels, every), add_noise(tokens, noise, sigma), sigma)
        return {"loss": (predicted - (noise - tokens)).square().mean()}


@pytest.fixture(autouse=True)
def _registered(monkeypatch: pytest.MonkeyPatch) -> None:
    """For these tests alone: the tests of all registered models know no toy without logits."""
    registry.list_models()
    entry = ModelEntry("toy_flow", "generator", lambda **o: ToyFlow(**o), "a toy", tokenizer="kl_vae_fashion")
    monkeypatch.setitem(registry._models, "toy_flow", entry)


def plan(folder: Path, **changes: Any) -> dict[str, Any]:
    """The objective on a VAE of lively latents, of standard deviation 1 or so."""
    if not folder.exists():
        torch.manual_seed(0)
        vae = registry.create_model("kl_vae_fashion", **VAE)
        with torch.no_grad():
            vae.vae.quant_conv.bias[2:] -= 2.0  # less noise than signal
        vae.save_pretrained(folder)
    sampling = {"head_steps": 4, "guidance_scale": 2.0}
    return {"name": "next-entity", "model": "toy_flow", "tokenizer": str(folder), "sampling": sampling} | changes


def coded(tokenizer: str, folder: Path, **choices: Any) -> str:
    extract_codes(tokenizer, str(SLICE), folder, **{"views": Views(mode="squash"), "moments": True, **choices})
    return str(folder)


def test_a_run_learns_resumes_exactly_and_exports_what_draws(tmp_path: Path) -> None:
    changes = ("loop.steps=40", "loop.validate_every=10", "loop.save_every=20", "optim.lr=2e-2", "loop.log_every=10")
    whole = train(recipe(tmp_path / "whole", plan(tmp_path / "vae"), *changes))
    validated = [line["validation/loss"] for line in lines(whole.folder) if "validation/loss" in line]
    assert validated[-1] < 0.8 * validated[0]
    assert len(list((whole.folder / "samples").iterdir())) > 1
    again = recipe(tmp_path / "again", plan(tmp_path / "vae"), *changes)
    (tmp_path / "again" / "checkpoints").mkdir(parents=True)
    (whole.folder / "checkpoints" / "step-00000020").rename(tmp_path / "again" / "checkpoints" / "step-00000020")
    resumed = train(again, resume=True)
    for part in ("transformer", "image_tokenizer"):
        one, other = (load_file(next((r.folder / "model" / part).glob("*.safetensors"))) for r in (whole, resumed))
        assert all(torch.equal(one[k], other[k]) for k in one)
    pipeline = AutoPipeline.from_pretrained(resumed.folder / "model")
    assert type(pipeline.sampler).__name__ == "ContinuousSampler" and pipeline.sampler.config.head_steps == 4
    out = pipeline(class_labels=[0, 1], seed=0, output_type="pt")
    assert out.images.isfinite().all() and out.images.shape == (2, 3, 8, 8) and out.stats["head_calls"] == 4 * 16
    command = ["sample", str(resumed.model), "--num", "2", "--guidance", "1.5", "--out", str(tmp_path / "grid.png")]
    made = CliRunner().invoke(app, [*command, "--device", "cpu"])
    assert made.exit_code == 0 and (tmp_path / "grid.png").is_file(), made.output


def test_latents_are_drawn_anew_by_each_images_numbers_in_float32(tmp_path: Path) -> None:
    training: Any = build_objective(objective_config(plan(tmp_path / "vae")), CLASSES)
    tokenizer = training.frozen("tokenizer")
    images = torch.rand(4, 3, 8, 8, generator=torch.Generator().manual_seed(0)) * 2 - 1
    first, other = Rng.from_seed(0, 4), Rng.from_seed(1, 4)
    with torch.autocast("cpu", torch.bfloat16):
        tokens = training.tokens({"images": images}, first)
        loss = training({"images": images, "labels": torch.zeros(4, dtype=torch.int64)}, "main", 0, 1, first)["loss"]
    assert torch.equal(tokens, tokenizer.encode(images, first)) and tokens.dtype == torch.float32
    assert not torch.equal(tokens, tokenizer.encode(images)) and loss.dtype == torch.float32
    assert not torch.equal(tokens, training.tokens({"images": images}, other))


def test_moments_train_as_the_images_do(tmp_path: Path) -> None:
    """The same keys draw the same latents, but for float16; and another epoch draws others."""
    objective = plan(tmp_path / "vae")
    codes = coded(objective["tokenizer"], tmp_path / "codes")
    changes = ("loop.steps=12", "loop.validate_every=6", "data.flip=false")
    pixels = train(recipe(tmp_path / "pixels", objective, *changes))
    tokens = train(recipe(tmp_path / "tokens", objective, *changes, f"data.train={codes}", f"data.validation={codes}"))
    for a, b in zip(lines(pixels.folder), lines(tokens.folder), strict=True):
        assert a.keys() == b.keys() and all(a[k] == pytest.approx(b[k], rel=0.02, abs=1e-3) for k in a)
    data = CodeSet(codes, seed=0)
    assert not torch.equal(data[3, 3]["tokens"], data[3, 3 + len(data)]["tokens"])


def test_latents_drawn_once_train_too_and_the_log_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    objective = plan(tmp_path / "vae")
    codes = coded(objective["tokenizer"], tmp_path / "codes", moments=False)
    train(recipe(tmp_path / "run", objective, "loop.steps=2", "data.flip=false", f"data.train={codes}"))
    assert "each latent was drawn once" in capsys.readouterr().err


def test_a_normalised_tokenizer_is_exported_and_other_files_are_refused(tmp_path: Path) -> None:
    objective = plan(tmp_path / "vae")
    codes = coded(objective["tokenizer"], tmp_path / "codes")
    found = CodeSet(codes).statistics
    assert found is not None
    open_tokenizer(objective["tokenizer"]).normalise(found.mean, found.std).save_pretrained(tmp_path / "normal")
    normal = objective | {"tokenizer": str(tmp_path / "normal")}
    with pytest.raises(ConfigError, match="fingerprint"):
        train(recipe(tmp_path / "run", normal, "data.flip=false", f"data.train={codes}"))
    run = train(recipe(tmp_path / "run", normal, "loop.steps=2"))
    exported = AutoPipeline.from_pretrained(run.folder / "model").image_tokenizer
    assert exported.config.latents_std == pytest.approx(found.std)


@pytest.fixture(name="other_precision")
def _other_precision() -> Iterator[None]:
    """accelerate keeps one precision a process."""
    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.mark.usefixtures("other_precision")
def test_a_hundred_steps_in_bfloat16_stay_finite(tmp_path: Path) -> None:
    steps = ("loop.steps=100", "loop.precision=bf16", "optim.lr=1e-2", "loop.validate_every=50", "loop.sample_every=0")
    run = train(recipe(tmp_path / "run", plan(tmp_path / "vae"), *steps, "loop.save_every=100"))
    found = lines(run.folder)
    losses = [line["loss"] for line in found if "loss" in line]
    assert len(losses) == 100 and np.isfinite(losses).all() and np.mean(losses[-20:]) < np.mean(losses[:20])
    assert all(line.get("bad_steps", 0) == 0 for line in found)


def test_a_dry_run_knows_latents(tmp_path: Path) -> None:
    facts = dry_run(recipe(tmp_path / "run", plan(tmp_path / "vae")))
    assert facts["tokens"]["dim"] == 2 and facts["tokens"]["codebook_size"] is None


def test_images_of_another_size_where_the_tokenizer_can(tmp_path: Path) -> None:
    training: Any = build_objective(objective_config(plan(tmp_path / "vae", image_size=16)), CLASSES)
    assert training.image_size == (16, 16) and training.model.layout.grids == ((8, 8),)
    with pytest.raises(ValueError, match="must be a multiple of the downsampling, 2"):
        build_objective(objective_config(plan(tmp_path / "vae", image_size=9)), CLASSES)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": "kl16"}, "kl16 is a tokenizer; next-entity trains a generator"),
        ({"model": "var_fashion"}, "predicts ids; next-entity trains generators of latents"),
        ({"tokenizer": "fashion-var"}, "toy_flow is trained on latents, such as those of kl16.in1k"),
        ({"gradient_checkpointing": True}, "ToyFlow has none"),
        ({"input_masking": {}}, "input_masking is for next-token and next-scale"),
        ({"sampling": {"head_steps": 0}}, "head_steps must be at least 1"),
        ({"model_overrides": {"grid": [2, 2]}}, "do not fit together"),
        ({"name": "next-token"}, "next-entity those of latents"),
    ],
)
def test_what_does_not_go_together_is_refused(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        build_objective(objective_config(plan(tmp_path / "vae", **changes)), CLASSES)


def test_a_generator_of_texts_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    entry = registry.model_entry("toy_flow")

    def build(**overrides: Any) -> ToyFlow:
        model = ToyFlow(**overrides)
        model.condition = "text"
        return model

    monkeypatch.setitem(registry._models, "toy_text", replace(entry, name="toy_text", build=build))
    with pytest.raises(ConfigError, match="conditioned on text; next-entity"):
        build_objective(objective_config(plan(tmp_path / "vae", model="toy_text")), CLASSES)
