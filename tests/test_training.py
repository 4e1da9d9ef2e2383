"""Training: which images a step sees, what a run writes, that stopping changes nothing, and each objective's own."""

from __future__ import annotations

import json
import math
import os
import signal
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import yaml
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor, nn

from varkit import MultiScaleVQ, Rng
from varkit.config import ConfigError, override
from varkit.data import ImageTransform, open_images
from varkit.eight_bit import FILE, pack_tensors, unpack_tensors
from varkit.generators.var import VAR
from varkit.metrics.classifier import ImageClassifier
from varkit.metrics.reconstruction import psnr
from varkit.pictures import read_settings, to_pil
from varkit.pipelines.auto import AutoPipeline
from varkit.tokenizers.multiscale_vq import Quantized
from varkit.training.batches import Entry, StepBatches
from varkit.training.checkpoint import Checkpoints
from varkit.training.loop import StopSignal, Trainer, TrainResult, train
from varkit.training.losses import PatchDiscriminator, adaptive_weight, discriminator_loss, generator_loss
from varkit.training.objectives import build_objective, classifier, objective_config
from varkit.training.objectives.next_scale import progressive_stage
from varkit.training.optim import (
    OptimConfig,
    lr_and_decay,
    lr_factor,
    make_optimizer,
    parameter_groups,
    set_schedule,
)
from varkit.training.recipe import Recipe, find_recipe, load_recipe, make_recipe, recipe_values, shipped_recipes

SLICE = Path(__file__).parent / "data" / "fashion_slice.npz"
CLASSES = [str(i) for i in range(10)]
STEPS, SIDE, CODES = 6, 8, 24

TOKENIZER: dict[str, Any] = {
    "name": "multiscale-vq",
    "model": "multiscale_vq_fashion",
    "model_overrides": {
        "codebook_size": CODES,
        "latent_dim": 4,
        "base_channels": 32,
        "channel_multipliers": [1, 1],
        "scales": [1, 2, 4],
    },
    "adversarial_weight": 0.4,
    "discriminator_width": 8,
    "discriminator_layers": 1,
    "restart_every": 2,
}
GENERATOR: dict[str, Any] = {
    "name": "next-scale",
    "model": "var_fashion",
    "model_overrides": {"depth": 2, "hidden_size": 32, "num_heads": 2, "drop_path_rate": 0.1},
    "sampling": {"guidance_scale": 2.0, "top_p": 0.9},
}
CLASSIFIER: dict[str, Any] = {"name": "classifier", "image_size": SIDE, "widths": [8, 16]}


def recipe(out: Path, objective: dict[str, Any], *overrides: str) -> Recipe:
    """A run of seconds on the shipped images."""
    values = {
        "name": "tiny",
        "out": str(out),
        "objective": objective,
        "data": {
            "train": str(SLICE),
            "validation": str(SLICE),
            "validation_split": "train",
            "mode": "squash",
            "flip": True,
            "workers": 0,
        },
        "optim": {"lr": 1e-3, "warmup_steps": 2},
        "loop": {
            "steps": STEPS,
            "batch_size": 8,
            "precision": "no",
            "ema_decay": 0.25,
            "log_every": 1,
            "validate_every": 4,
            "validate_images": 32,
            "sample_every": 4,
            "save_every": 1,
            "keep": STEPS,
        },
    }
    return make_recipe(override(values, overrides))


@dataclass(frozen=True)
class Run:
    recipe: Recipe
    result: TrainResult

    @property
    def folder(self) -> Path:
        return self.recipe.folder


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Run]:
    """A tokenizer with its discriminator, a generator on it, a classifier: each trained once."""
    folder = tmp_path_factory.mktemp("runs")
    done: dict[str, Run] = {}
    for name, objective in (
        ("tokenizer", TOKENIZER),
        ("generator", {**GENERATOR, "tokenizer": str(folder / "tokenizer" / "model")}),
        ("classifier", CLASSIFIER),
    ):
        plan = recipe(folder / name, objective)
        done[name] = Run(plan, train(plan))
    return done


def lines(folder: Path) -> list[dict[str, float]]:
    """metrics.jsonl without what a clock says."""
    read = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    clock = ("seconds", "images_per_second", "data_wait", "tflops", "mfu")
    return [{k: v for k, v in line.items() if k not in clock} for line in read]


def weights(folder: Path, step: int) -> dict[str, Tensor]:
    """Everything the objective holds at a checkpoint."""
    return load_file(folder / "checkpoints" / f"step-{step:08d}" / "model.safetensors")


def exported(folder: Path) -> dict[str, Tensor]:
    files = sorted((folder / "model").rglob("*.safetensors"))
    return {f"{file.parent.name}/{name}": value for file in files for name, value in load_file(file).items()}


def assert_same(first: dict[str, Tensor], second: dict[str, Tensor]) -> None:
    assert first.keys() == second.keys() and len(first) > 0
    assert [name for name in first if not torch.equal(first[name], second[name])] == []


def held_out(count: int) -> dict[str, Tensor]:
    data = open_images(SLICE, transform=ImageTransform(SIDE, "squash"))
    return data.__getitems__(list(range(count)))


# ---- which images make up a step ------------------------------------------------------------------------------


def steps_of(batches: list[StepBatches]) -> Iterator[list[Entry]]:
    """All entries of each step, over micro-batches and processes, by sample number."""
    streams = [iter(b) for b in batches]
    for _ in range(batches[0].start, batches[0].stop):
        step = [entry for _ in range(batches[0].accumulation) for stream in streams for entry in next(stream)]
        yield sorted(step, key=lambda entry: entry[1])


@pytest.mark.parametrize(("processes", "accumulation"), [(1, 2), (2, 1), (3, 2), (4, 3)])
def test_a_step_is_the_same_set_however_it_is_divided(processes: int, accumulation: int) -> None:
    whole = list(StepBatches(31, 12, start=0, stop=7, seed=5))
    parts = [
        StepBatches(31, 12, start=0, stop=7, seed=5, accumulation=accumulation, process=p, processes=processes)
        for p in range(processes)
    ]
    assert list(steps_of(parts)) == whole
    assert all(len(b) == len(list(b)) == 7 * accumulation for b in parts)
    assert {len(micro) for b in parts for micro in b} == {12 // (processes * accumulation)}


@pytest.mark.parametrize("batch_size", [3, 10, 25])
def test_each_epoch_is_a_new_permutation(batch_size: int) -> None:
    entries = [e for step in StepBatches(10, batch_size, start=0, stop=15, seed=0) for e in step]
    assert [sample for _, sample in entries] == list(range(15 * batch_size))
    epochs = [[index for index, _ in entries[i : i + 10]] for i in range(0, 40, 10)]
    assert all(sorted(epoch) == list(range(10)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 4
    other = [e for step in StepBatches(10, batch_size, start=0, stop=15, seed=1) for e in step]
    assert other != entries


@pytest.mark.parametrize("start", [1, 4, 8])
def test_starting_later_continues_the_same_list(start: int) -> None:
    whole = list(StepBatches(11, 6, start=0, stop=9, seed=3, accumulation=2))
    rest = StepBatches(11, 6, start=start, stop=9, seed=3, accumulation=2)
    assert list(rest) == whole[2 * start :] and len(rest) == 2 * (9 - start)


def test_a_batch_that_cannot_be_shared_evenly_is_refused() -> None:
    with pytest.raises(ValueError, match=r"batch_size 10 cannot be shared evenly by 2 processes.*multiple of 6"):
        StepBatches(100, 10, start=0, stop=1, seed=0, accumulation=3, processes=2)
    with pytest.raises(ValueError, match="cannot be shared"):
        StepBatches(100, 0, start=0, stop=1, seed=0)


# ---- checkpoints ----------------------------------------------------------------------------------------------


def save(checkpoints: Checkpoints, step: int, text: str = "whole") -> Path:
    return checkpoints.save(step, lambda part: write_text(part, text), main=True, wait=lambda: None)


def write_text(part: Path, text: str) -> None:
    (part / "inner").mkdir()
    (part / "inner" / "state").write_text(text)


def names(folder: Path) -> set[str]:
    return {p.name for p in folder.iterdir()}


@pytest.mark.parametrize("keep", [1, 3])
def test_the_newest_checkpoints_are_kept(tmp_path: Path, keep: int) -> None:
    checkpoints = Checkpoints(tmp_path / "checkpoints", keep)
    assert checkpoints.latest() is None and checkpoints.steps() == []
    for step in (5, 10, 100, 2000):
        path = save(checkpoints, step)
        assert checkpoints.latest() == path == checkpoints.path(step)
        assert (path / "inner" / "state").read_text() == "whole"
    assert checkpoints.steps() == [5, 10, 100, 2000][-keep:]
    assert names(checkpoints.folder) == {f"step-{s:08d}" for s in checkpoints.steps()}


def test_a_step_saved_twice_is_the_later_one(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path, 2)
    save(checkpoints, 1)
    assert (save(checkpoints, 1, "again") / "inner" / "state").read_text() == "again"


def test_a_write_that_fails_half_way_leaves_no_checkpoint(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path, 2)
    older = save(checkpoints, 1)

    def fails(part: Path) -> None:
        write_text(part, "half")
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        checkpoints.save(2, fails, main=True, wait=lambda: None)
    assert checkpoints.latest() == older and not checkpoints.path(2).exists()
    assert names(tmp_path) - {".part-00000002"} == {"step-00000001"}
    save(checkpoints, 3)
    assert names(tmp_path) == {"step-00000001", "step-00000003"}  # the leftover went


def test_foreign_names_are_ignored_and_stay(tmp_path: Path) -> None:
    for name in ("step-99.bak", "step-best", "step-7", "notes", "step-"):
        (tmp_path / name).mkdir()
    (tmp_path / "step-00000050").write_text("a file")
    foreign = names(tmp_path)
    checkpoints = Checkpoints(tmp_path, 1)
    assert checkpoints.latest() is None
    for step in (1, 2, 3):
        save(checkpoints, step)
    assert checkpoints.steps() == [3]
    assert names(tmp_path) == foreign | {"step-00000003"}


# ---- recipes --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", shipped_recipes())
def test_a_shipped_recipe_loads_and_survives_a_round_trip(name: str) -> None:
    loaded = load_recipe(name)
    assert loaded.name == name and loaded.folder == Path("runs") / name
    values = recipe_values(loaded)
    assert make_recipe(values) == loaded
    assert make_recipe(yaml.safe_load(yaml.safe_dump(values))) == loaded
    assert load_recipe(find_recipe(name)) == loaded  # by its path


def test_numbers_and_words_of_the_command_line_are_read_as_meant() -> None:
    changed = load_recipe("fashion_vq", ["optim.lr=2e-4", "loop.precision=no", "out=elsewhere", "loop.steps=7"])
    assert changed.optim.lr == 2e-4 and isinstance(changed.optim.lr, float)
    assert (changed.loop.precision, changed.folder, changed.loop.steps) == ("no", Path("elsewhere"), 7)


@pytest.mark.parametrize(
    ("assignment", "message"),
    [
        ("optim.lrr=1", "unknown key optim.lrr .*did you mean 'lr'"),
        ("objective.l1_wieght=1", "unknown key objective.l1_wieght .*did you mean 'l1_weight'"),
        ("loop.step=1", "unknown key loop.step .*did you mean 'steps'"),
        ("dat.train=x", "unknown key dat .*did you mean 'data'"),
        ("objective.name=multiscale_vq", "got 'multiscale_vq' .*did you mean 'multiscale-vq'"),
        ("objective=", "objective must be a section with a name"),
        ("objective.perceptual_weight=-1", "weights must not be negative"),
        ("objective.quantizer_weight=-0.5", "weights must not be negative"),
        ("objective.adversarial_loss=soft", "hinge.*got 'soft'"),
        ("objective.discriminator_optim.schedule=cosine", "unknown lr schedule 'cosine'"),
        ("optim.lr=0", "lr must be > 0; got 0"),
        ("optim.schedule=lin2", "unknown lr schedule 'lin2'; choose .*lin0.8"),
        ("loop.steps=0", "loop.steps must be at least 1; got 0"),
        ("loop.save_every=-1", "loop.save_every must not be negative .*got -1"),
        ("loop.accumulation=5", "loop.batch_size 64 must be a multiple of loop.accumulation 5"),
        ("loop.ema_decay=1", r"loop.ema_decay must be in \[0, 1\); got 1"),
        ("data.mode=stretch", "got 'stretch'"),
    ],
)
def test_a_bad_recipe_is_refused_with_the_key_and_the_way_out(assignment: str, message: str) -> None:
    with pytest.raises(ConfigError, match=f"(?s){message}"):
        load_recipe("fashion_vq", [assignment])


def test_a_recipe_that_does_not_exist_is_answered_with_the_nearest(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"no recipe is called 'fashion_vqq' .*did you mean 'fashion_vq'.*shipped: "):
        find_recipe("fashion_vqq")
    with pytest.raises(ConfigError, match=r"no such file: .*mine.yaml"):
        load_recipe(tmp_path / "mine.yaml")


# ---- optimisers -----------------------------------------------------------------------------------------------

SCHEDULES = ("cos", "exp", "lin", "lin0", "lin00", "lin0.3", "lin0.8")


@pytest.mark.parametrize("final", [0.01, 0.5])
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_a_schedule_falls_from_one_to_final(schedule: str, final: float) -> None:
    curve = [lr_factor(schedule, i / 1000, final) for i in range(1001)]
    assert curve[0] == pytest.approx(1) and curve[-1] == pytest.approx(final)
    assert all(b <= a + 1e-12 for a, b in pairwise(curve))
    assert max(a - b for a, b in pairwise(curve)) < 0.02  # no jumps, at the knees neither


def test_schedules_by_value() -> None:
    assert [lr_factor("constant", d, 0.1) for d in (0, 0.5, 1)] == [1, 1, 1]
    assert lr_factor("cos", 0.5, 0.2) == pytest.approx(0.6)
    assert [lr_factor("lin00", d, 0) for d in (0.25, 0.5)] == [0.75, 0.5]
    assert lr_factor("lin", 0.14, 0.1) == 1 and lr_factor("lin", 0.575, 0) == pytest.approx(0.5)
    assert lr_factor("lin0", 0.04, 0.1) == 1 and lr_factor("lin0", 0.06, 0.1) < 1
    assert lr_factor("exp", 0.575, 0.01) == pytest.approx(0.1)
    assert lr_factor("lin0.8", 0.8, 0.0) == pytest.approx(0.6)


@pytest.mark.parametrize("schedule", ["cosine", "lin1.5", "lin0.0", "linx", "linnan", "0.5", ""])
def test_an_unknown_schedule_is_refused_where_it_is_written(schedule: str) -> None:
    with pytest.raises(ConfigError, match=f"unknown lr schedule {schedule!r}; choose constant, cos"):
        OptimConfig(schedule=schedule)


def test_an_exponential_to_nothing_is_refused() -> None:
    with pytest.raises(ConfigError, match="exp schedule needs final > 0; got 0"):
        OptimConfig(schedule="exp", final=0.0)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_the_learning_rate_warms_up_and_both_end_where_they_should(schedule: str) -> None:
    rates, decays = zip(
        *[
            lr_and_decay(
                schedule,
                step,
                peak_lr=2.0,
                weight_decay=0.1,
                weight_decay_end=0.3,
                warmup_steps=20,
                max_steps=200,
                warmup_from=0.05,
                final=0.1,
            )
            for step in range(200)
        ],
        strict=True,
    )
    assert rates[0] == pytest.approx(0.1) and rates[10] == pytest.approx(1.05) and rates[20] == pytest.approx(2)
    assert all(a < b for a, b in pairwise(rates[:21])) and all(a >= b for a, b in pairwise(rates[20:]))
    assert rates[-1] == pytest.approx(0.2)
    assert decays[0] == pytest.approx(0.1) and decays[-1] == pytest.approx(0.3)
    assert all(a <= b for a, b in pairwise(decays))


def test_a_run_shorter_than_its_warm_up_still_has_a_learning_rate() -> None:
    for max_steps in (1, 2, 5):
        config = OptimConfig(warmup_steps=100)
        optimizer = make_optimizer(nn.Linear(2, 2), config)
        for step in range(max_steps):
            assert 0 < set_schedule(optimizer, config, step, max_steps) <= config.lr


def test_biases_vectors_and_named_parameters_do_not_decay() -> None:
    model = VAR(num_classes=3, depth=1, hidden_size=32, num_heads=2, scales=(1, 2), codebook_size=5, latent_dim=4)
    model.head.weight.requires_grad_(False)
    groups = {g["decay_scale"]: {id(p) for p in g["params"]} for g in parameter_groups(model)}
    own = {name: id(p) for name, p in model.named_parameters()}
    assert groups[1.0] | groups[0.0] == set(own.values()) - {own["head.weight"]}
    assert not groups[1.0] & groups[0.0]
    plain = {name for name, one in own.items() if one in groups[0.0]}
    assert {"head.bias", "blocks.0.attn.q_bias", "pos_start", "pos_1LC", "lvl_embed.weight"} <= plain
    assert {"word_embed.weight", "class_emb.weight", "blocks.0.attn.mat_qkv.weight"} <= own.keys() - plain
    matrices = {name for name, p in model.named_parameters() if p.dim() > 1}
    assert all(any(part in name for part in model.no_decay) for name in plain & matrices)
    assert len(parameter_groups(nn.Linear(3, 3, bias=False))) == 1  # no empty group


def test_the_schedule_is_written_into_the_groups() -> None:
    config = OptimConfig(lr=0.5, weight_decay=0.2, weight_decay_end=0.4, warmup_steps=0, schedule="lin00", final=0.0)
    optimizer = make_optimizer(nn.Linear(3, 3), config)
    assert optimizer.defaults["betas"] == config.betas
    for step, lr, decay in ((0, 0.5, 0.2), (5, 0.25, 0.3), (10, 0.0, 0.4)):
        assert set_schedule(optimizer, config, step, 11) == pytest.approx(lr)
        assert [g["lr"] for g in optimizer.param_groups] == pytest.approx([lr, lr])
        assert [g["weight_decay"] for g in optimizer.param_groups] == pytest.approx([decay, 0])
    stays = OptimConfig(weight_decay=0.2)
    set_schedule(optimizer, stays, 7, 11)
    assert optimizer.param_groups[0]["weight_decay"] == pytest.approx(0.2)


# ---- adversarial losses ---------------------------------------------------------------------------------------


def test_discriminator_losses_by_value() -> None:
    real, fake = torch.tensor([2.0, 0.5]), torch.tensor([-2.0, 0.5])
    assert discriminator_loss("hinge", real, fake).item() == pytest.approx(0.5 * (0.5 / 2 + 1.5 / 2))
    expected = sum(math.log1p(math.exp(v)) for v in (-2, -0.5, -2, 0.5)) / 4
    assert discriminator_loss("vanilla", real, fake).item() == pytest.approx(expected)
    assert generator_loss(fake).item() == pytest.approx(0.75)
    assert discriminator_loss("hinge", torch.tensor([1.0, 3.0]), torch.tensor([-1.0, -9.0])).item() == 0


@pytest.mark.parametrize("kind", ["hinge", "vanilla", "non_saturating"])
def test_the_discriminator_pulls_real_up_and_fake_down(kind: Any) -> None:
    real, fake = torch.zeros(3, requires_grad=True), torch.zeros(3, requires_grad=True)
    discriminator_loss(kind, real, fake).backward()
    assert real.grad is not None and fake.grad is not None
    assert (real.grad < 0).all() and (fake.grad > 0).all()
    fake.grad = None
    generator_loss(fake, kind).backward()
    assert (fake.grad < 0).all()  # the tokenizer wants the opposite


def test_the_adaptive_weight_is_the_ratio_of_gradient_norms() -> None:
    weight = torch.randn(4, 3, requires_grad=True)
    a, b = torch.randn(4, 3), torch.randn(4, 3)
    reconstruction, adversarial = (a * weight).sum(), (b * weight).sum()
    ratio = adaptive_weight(reconstruction, adversarial, weight)
    assert ratio.item() == pytest.approx((a.norm() / b.norm()).item(), rel=1e-4)
    assert not ratio.requires_grad and weight.grad is None
    tenth = adaptive_weight(reconstruction, 10 * adversarial, weight)
    assert tenth.item() == pytest.approx(ratio.item() / 10, rel=1e-4)
    assert adaptive_weight(reconstruction, 1e6 * adversarial, weight, low=0.5).item() == 0.5
    assert adaptive_weight(reconstruction, 0 * adversarial, weight, high=7.0).item() == 7.0
    (reconstruction + ratio * adversarial).backward()  # the graphs are still there
    torch.testing.assert_close(weight.grad, a + ratio * b)


def test_a_logit_of_the_discriminator_sees_seventy_pixels() -> None:
    images = torch.randn(1, 3, 140, 140, requires_grad=True)
    logits = PatchDiscriminator(width=4).eval()(images)
    assert logits.shape == (1, 1, 15, 15)
    logits[0, 0, 7, 7].backward()
    assert images.grad is not None
    seen = images.grad[0].abs().sum(0) > 0
    assert (int(seen.any(0).sum()), int(seen.any(1).sum())) == (70, 70)


# ---- what a run writes ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["tokenizer", "generator", "classifier"])
def test_a_run_writes_its_recipe_its_numbers_and_its_checkpoints(runs: dict[str, Run], name: str) -> None:
    run = runs[name]
    assert run.result.finished and run.result.step == STEPS and run.result.folder == run.folder
    assert run.result.model == run.folder / "model" and run.result.seconds > 0
    assert make_recipe(yaml.safe_load((run.folder / "recipe.yaml").read_text())) == run.recipe
    assert names(run.folder / "checkpoints") == {f"step-{s:08d}" for s in range(1, STEPS + 1)}
    written = lines(run.folder)
    assert all(math.isfinite(value) for line in written for value in line.values())
    training = [line for line in written if "loss" in line]
    assert [line["step"] for line in training] == list(range(1, STEPS + 1))
    assert training[0]["lr"] < training[1]["lr"] < training[2]["lr"] == pytest.approx(run.recipe.optim.lr)
    validation = [line for line in written if any(k.startswith("validation/") for k in line)]
    assert [line["step"] for line in validation] == [4, STEPS]
    raw = [json.loads(line) for line in (run.folder / "metrics.jsonl").read_text().splitlines()]
    seconds = [line["seconds"] for line in raw if "loss" in line]
    assert seconds == sorted(seconds) and all(line["images_per_second"] > 0 for line in raw if "loss" in line)


def test_a_tokenizer_run_logs_every_scale_and_both_sides_of_the_game(runs: dict[str, Run]) -> None:
    training = [line for line in lines(runs["tokenizer"].folder) if "loss" in line]
    for line in training:
        for scale in ("scale0", "scale1", "scale2", "all"):
            assert 0 < line[f"usage/{scale}"] <= 1 and 1 <= line[f"perplexity/{scale}"] <= CODES + 1e-3
    game = {"adversarial", "adaptive_weight", "discriminator/loss", "discriminator/grad_norm"}
    assert all(game <= line.keys() if line["step"] > 2 else not game & line.keys() for line in training)


def test_a_tokenizer_run_shows_originals_above_reconstructions(runs: dict[str, Run]) -> None:
    folder = runs["tokenizer"].folder / "samples"
    assert names(folder) == {"step-00000004.png", f"step-{STEPS:08d}.png"}
    path = folder / f"step-{STEPS:08d}.png"
    assert read_settings(path) == {"step": STEPS}
    images = held_out(16)["images"]
    tokenizer = MultiScaleVQ.from_pretrained(runs["tokenizer"].folder / "model")
    with torch.no_grad():
        back = tokenizer.decode(tokenizer.encode(images))
    with Image.open(path) as sheet:
        assert sheet.size == (8 * (SIDE + 2) + 2, 4 * (SIDE + 2) + 2)
        for row, expected in enumerate((images[:8], back[:8], images[8:], back[8:])):
            for column, image in enumerate(to_pil(expected)):
                left, top = 2 + column * (SIDE + 2), 2 + row * (SIDE + 2)
                shown = np.asarray(sheet.crop((left, top, left + SIDE, top + SIDE)), dtype=int)
                assert abs(shown - np.asarray(image, dtype=int)).max() <= 1


def test_the_last_validation_line_is_that_of_the_exported_model(runs: dict[str, Run]) -> None:
    batch = held_out(32)
    tokenizer = MultiScaleVQ.from_pretrained(runs["tokenizer"].folder / "model")
    judge = ImageClassifier.from_pretrained(runs["classifier"].folder / "model")
    assert not tokenizer.training and not judge.training
    with torch.no_grad():
        decibels = psnr(tokenizer.decode(tokenizer.encode(batch["images"])), batch["images"]).mean().item()
        right = (judge(batch["images"]).argmax(-1) == batch["labels"]).float().mean().item()
    assert lines(runs["tokenizer"].folder)[-1]["validation/psnr"] == pytest.approx(decibels, abs=1e-3)
    assert lines(runs["classifier"].folder)[-1]["validation/accuracy"] == pytest.approx(right, abs=1e-6)
    assert judge.config.num_classes == 10
    assert not (runs["classifier"].folder / "samples").exists()  # it has nothing to show


def test_a_generator_run_leaves_a_pipeline_that_draws(runs: dict[str, Run]) -> None:
    folder = runs["generator"].folder
    pipeline = AutoPipeline.from_pretrained(folder / "model")
    pipeline.set_progress_bar_config(disable=True)
    assert pipeline.labels == dict(enumerate(CLASSES))
    assert pipeline.sampler.settings()["guidance_scale"] == 2.0 and pipeline.sampler.settings()["top_p"] == 0.9
    assert [image.size for image in pipeline(class_labels=[0, "9"], seed=0).images] == [(SIDE, SIDE)] * 2
    assert_same(
        dict(pipeline.image_tokenizer.state_dict()),
        dict(MultiScaleVQ.from_pretrained(runs["tokenizer"].folder / "model").state_dict()),
    )
    assert not any("tokenizer" in name for name in weights(folder, STEPS))  # frozen: not in the checkpoints
    with Image.open(folder / "samples" / f"step-{STEPS:08d}.png") as sheet:
        assert sheet.size == (10 * (SIDE + 2) + 2, 5 * (SIDE + 2) + 2)


@pytest.mark.parametrize("name", ["tokenizer", "generator", "classifier"])
def test_the_exported_weights_are_the_moving_average(runs: dict[str, Run], name: str) -> None:
    """e <- d e + (1 - d) w with d = min((1 + n) / (10 + n), ema_decay), from the first step's weights."""
    history = [weights(runs[name].folder, step) for step in range(1, STEPS + 1)]
    model, part = exported(runs[name].folder), "tokenizer" if name == "tokenizer" else "model"
    objective = build_objective(runs[name].recipe.objective, CLASSES)
    moved = 0
    for key, _ in objective.trained("main").named_parameters():
        average = history[0][f"{part}.{key}"].double()
        for n, state in enumerate(history[1:], start=1):
            d = min((1 + n) / (10 + n), 0.25)
            average = d * average + (1 - d) * state[f"{part}.{key}"].double()
        (value,) = (v for k, v in model.items() if k.partition("/")[2] == key and "image_tokenizer" not in k)
        torch.testing.assert_close(value.double(), average, atol=1e-6, rtol=1e-5)
        moved += not torch.allclose(value, history[-1][f"{part}.{key}"], atol=1e-5)
    assert moved > 5


# ---- stopping and going on ------------------------------------------------------------------------------------


def signal_at(patch: pytest.MonkeyPatch, step: int, number: int) -> None:
    """Send this process a signal once step `step` is logged."""
    log = Trainer._log

    def log_and_signal(self: Trainer, done: int, window: Any, bar: Any) -> None:
        log(self, done, window, bar)
        if done == step:
            os.kill(os.getpid(), number)

    patch.setattr(Trainer, "_log", log_and_signal)


@pytest.mark.parametrize(
    ("name", "number"),
    [("tokenizer", signal.SIGTERM), ("generator", signal.SIGINT), ("classifier", signal.SIGTERM)],
)
def test_a_stopped_and_resumed_run_is_the_uninterrupted_one(
    runs: dict[str, Run], name: str, number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, plan = runs[name], replace(runs[name].recipe, out=str(tmp_path / "run"))
    handler = signal.getsignal(number)
    with monkeypatch.context() as patch:
        signal_at(patch, 3, number)
        stopped = train(plan)
    assert (stopped.finished, stopped.step, stopped.model) == (False, 3, None)
    assert signal.getsignal(number) is handler
    assert not (plan.folder / "model").exists()
    assert_same(weights(plan.folder, 3), weights(whole.folder, 3))
    torch.manual_seed(123)  # whatever happened in between
    resumed = train(plan, resume=True)
    assert resumed.finished and resumed.step == STEPS and resumed.seconds > stopped.seconds
    assert_same(weights(plan.folder, STEPS), weights(whole.folder, STEPS))
    assert_same(exported(plan.folder), exported(whole.folder))
    assert lines(plan.folder) == lines(whole.folder)


def test_a_discriminator_too_large_for_the_images_is_refused(tmp_path: Path) -> None:
    plan = recipe(tmp_path / "run", TOKENIZER, "objective.discriminator_layers=3")
    with pytest.raises(ConfigError, match=r"discriminator_layers 3 needs images of at least 24 pixels .* have 8"):
        train(plan)
    assert not (tmp_path / "run").exists()


def test_a_second_signal_ends_at_once_and_the_old_handlers_come_back() -> None:
    before = [signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)]
    stop = StopSignal()
    with pytest.raises(KeyboardInterrupt):
        with stop.listening():
            assert stop.received is None
            os.kill(os.getpid(), signal.SIGTERM)
            assert stop.received == "SIGTERM"
            os.kill(os.getpid(), signal.SIGINT)
    assert [signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)] == before


def test_resuming_nothing_and_running_over_a_run_are_refused(runs: dict[str, Run], tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"nothing to resume: .*checkpoints holds no checkpoint"):
        train(recipe(tmp_path / "new", CLASSIFIER), resume=True)
    assert not (tmp_path / "new").exists()
    numbers = (runs["classifier"].folder / "metrics.jsonl").read_text()
    with pytest.raises(ConfigError, match=r"already holds a run \(step-00000006\); continue it with --resume.*out="):
        train(runs["classifier"].recipe)
    assert (runs["classifier"].folder / "metrics.jsonl").read_text() == numbers


def test_a_loss_that_is_no_number_ends_the_run_at_the_last_good_checkpoint(
    runs: dict[str, Run], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = recipe(tmp_path / "run", CLASSIFIER, "loop.max_bad_steps=1")
    forward = classifier.Training.forward

    def poisoned(self: Any, batch: Any, phase: str, step: int, max_steps: int, rng: Rng) -> dict[str, Tensor]:
        losses = forward(self, batch, phase, step, max_steps, rng)
        return {"loss": losses["loss"] * (math.nan if step == 2 else 1)}

    with monkeypatch.context() as patch:
        patch.setattr(classifier.Training, "forward", poisoned)
        with pytest.raises(
            FloatingPointError, match=r"step 3, phase main: not finite: grad_norm, loss; .*is .*step-00000002"
        ):
            train(plan)
    assert Checkpoints(plan.folder / "checkpoints", 1).steps() == [1, 2]
    assert train(plan, resume=True).finished  # and from there it goes on
    assert_same(exported(plan.folder), exported(runs["classifier"].folder))
    again = train(plan, resume=True)  # a finished run has nothing left to do
    assert again.finished and again.step == STEPS
    assert_same(exported(plan.folder), exported(runs["classifier"].folder))


def test_no_checkpoint_is_written_of_a_loss_that_is_no_number(
    runs: dict[str, Run], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also between two log lines."""
    plan = recipe(tmp_path / "run", CLASSIFIER, "loop.log_every=5", "loop.validate_every=0", "loop.max_bad_steps=1")
    forward = classifier.Training.forward

    def poisoned(self: Any, batch: Any, phase: str, step: int, max_steps: int, rng: Rng) -> dict[str, Tensor]:
        losses = forward(self, batch, phase, step, max_steps, rng)
        return {"loss": losses["loss"] * (math.nan if step == 2 else 1)}

    monkeypatch.setattr(classifier.Training, "forward", poisoned)
    with pytest.raises(FloatingPointError, match=r"step 3, phase main: .*step-00000002"):
        train(plan)
    assert Checkpoints(plan.folder / "checkpoints", 1).steps() == [1, 2]


def test_a_tracker_is_chosen_by_name(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard", reason="the tracker under test")
    plan = recipe(tmp_path / "run", CLASSIFIER, "loop.tracker=tensorboard", "loop.steps=2", "loop.sample_every=0")
    train(plan)
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    (events,) = {p.parent for p in plan.folder.rglob("events.out.tfevents.*") if "loss" in tags(p.parent)}
    read = EventAccumulator(str(events)).Reload()
    logged = [line["loss"] for line in lines(plan.folder) if "loss" in line]
    assert [e.value for e in read.Scalars("loss")] == pytest.approx(logged, abs=1e-5)


def tags(folder: Path) -> list[str]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    return EventAccumulator(str(folder)).Reload().Tags()["scalars"]


def test_accumulated_micro_batches_are_one_batch(runs: dict[str, Run], tmp_path: Path) -> None:
    objective = {**GENERATOR, "tokenizer": str(runs["tokenizer"].folder / "model")}
    less = ["objective.model_overrides.drop_path_rate=0", "loop.steps=3", "loop.ema_decay=0", "loop.sample_every=0"]
    folders = []
    for parts in (1, 2):
        folders.append(tmp_path / str(parts))
        train(recipe(folders[-1], objective, *less, f"loop.accumulation={parts}", "data.validation=null"))
    for one, two in zip(*map(lines, folders), strict=True):
        assert one == pytest.approx(two, rel=1e-5, abs=2e-6)
    first, second = (weights(folder, 3) for folder in folders)
    start = weights(folders[0], 1)
    flat = [torch.cat([state[name].flatten() for name in start]) for state in (first, second, start)]
    assert (flat[0] - flat[1]).norm() < 1e-5 * flat[0].norm() < 1e-2 * (flat[0] - flat[2]).norm()


# ---- the tokenizer's objective --------------------------------------------------------------------------------


def tokenizer_objective(**changes: Any) -> Any:
    torch.manual_seed(0)
    objective = build_objective(objective_config({**TOKENIZER, **changes}), CLASSES).train()
    objective.max_steps = 10
    return objective


def keyed(count: int = 8) -> tuple[dict[str, Tensor], Rng]:
    batch = held_out(count)
    return batch, Rng.for_keys(0, batch["keys"])


def test_the_discriminator_joins_at_its_share_of_the_steps() -> None:
    objective = tokenizer_objective(adversarial_start=0.3)
    assert [objective.phases(step) for step in (0, 2)] == [["main"]] * 2
    assert [objective.phases(step) for step in (3, 9)] == [["main", "discriminator"]] * 2
    assert objective.all_phases() == ["main", "discriminator"]
    assert objective.trained("main") is objective.tokenizer
    assert objective.trained("discriminator") is objective.discriminator
    default = OptimConfig(lr=5.0)
    assert objective.optim("main", default) is default
    assert objective.optim("discriminator", default) == objective.config.discriminator_optim
    batch, rng = keyed()
    assert "adversarial" not in objective(batch, "main", 2, 10, rng) and not objective.fakes
    losses = objective(batch, "main", 3, 10, rng)
    assert losses["adaptive_weight"] >= objective.config.adaptive_low
    expected = 0.2 * losses["l1"] + losses["l2"] + losses["quantizer"]
    expected = expected + 0.4 * losses["adaptive_weight"] * losses["adversarial"]
    torch.testing.assert_close(losses["loss"], expected)
    without = tokenizer_objective(adversarial_weight=0)
    assert without.discriminator is None and without.all_phases() == without.phases(9) == ["main"]


@pytest.mark.parametrize(("phase", "other"), [("main", "discriminator"), ("discriminator", "main")])
def test_a_phase_changes_its_own_network_only(
    phase: str, other: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = recipe(tmp_path, TOKENIZER, "objective.adversarial_start=0", "objective.restart_every=0")
    trainer = Trainer(plan, resume=False)
    monkeypatch.setattr(trainer.optimizers[other], "step", lambda: None)  # the other phase runs, but takes no step
    before = {p: [w.detach().clone() for w in trainer.objective.trained(p).parameters()] for p in (phase, other)}
    numbers = trainer.step(0, [keyed()[0]])
    assert numbers["loss"].isfinite() and numbers["discriminator/loss"].isfinite()
    after = {p: list(trainer.objective.trained(p).parameters()) for p in (phase, other)}
    changed = {p: [not torch.equal(a, b) for a, b in zip(before[p], after[p], strict=True)] for p in before}
    assert any(changed[phase]) and sum(changed[phase]) > len(changed[phase]) / 2
    assert not any(changed[other])


def quantized(ids: list[list[int]], residuals: list[Tensor]) -> Quantized:
    return Quantized(torch.zeros(1), torch.zeros(()), [torch.tensor(i)[None] for i in ids], residuals)


@pytest.mark.parametrize("decay", [0.0, 0.5, 0.99])
def test_an_ema_code_moves_to_the_mean_of_what_it_codes(decay: float) -> None:
    objective = tokenizer_objective(codebook="ema", codebook_decay=decay, restart_every=0)
    codes = objective.tokenizer.codebook
    assert not codes.requires_grad
    before = codes.detach().clone()
    rows = torch.randn(5, 4)
    objective.coded = [quantized([[3], [3, 7, 3, 7]], [rows[:1], rows[1:]])]
    objective.after_step(1, Rng.from_seed(0, 1))
    for code, coded in ((3, rows[[0, 1, 3]]), (7, rows[[2, 4]])):
        mean = (decay * before[code] + (1 - decay) * coded.sum(0)) / (decay + (1 - decay) * len(coded))
        torch.testing.assert_close(codes[code], mean)
    others = [i for i in range(CODES) if i not in (3, 7)]
    torch.testing.assert_close(codes[others], before[others])  # nothing to code: it keeps its place
    assert objective.coded == []


def hit_table(dead: list[int]) -> Tensor:
    hits = torch.rand(3, CODES) + 0.5
    hits[:, dead] = 0.001
    return hits


@pytest.mark.parametrize("codebook", ["gradient", "ema"])
def test_dead_codes_and_only_they_move_onto_residuals(codebook: str) -> None:
    objective = tokenizer_objective(codebook=codebook, restart_every=3, codebook_decay=0.999999)
    quantizer, dead = objective.tokenizer.quantize, [2, 11, 23]
    quantizer.ema_vocab_hit_SV.copy_(hit_table(dead))
    before, use = quantizer.codebook.detach().clone(), quantizer.ema_vocab_hit_SV.sum(0).mean()
    residuals = [torch.randn(n, 4) + 5 for n in (2, 8, 32)]
    objective.coded = [quantized([[0] * len(r) for r in residuals], residuals)]
    objective.after_step(3, Rng.from_seed(0, 1))
    alive = [i for i in range(CODES) if i not in dead]
    torch.testing.assert_close(quantizer.codebook[alive].detach(), before[alive], atol=1e-2, rtol=0)
    rows = torch.cat(residuals)
    assert all((rows == code).all(-1).any() for code in quantizer.codebook[dead].detach())
    torch.testing.assert_close(quantizer.ema_vocab_hit_SV.sum(0)[dead], use.expand(3))  # of average use: alive
    if codebook == "ema":
        assert torch.equal(objective.cluster_sum[dead], quantizer.codebook[dead].detach())
        assert torch.equal(objective.cluster_size[dead], torch.ones(3))
    placed = quantizer.codebook.detach().clone()
    objective.coded = [quantized([[0] * len(r) for r in residuals], residuals)]
    objective.after_step(6, Rng.from_seed(0, 1))
    torch.testing.assert_close(quantizer.codebook.detach(), placed, atol=1e-2, rtol=0)  # none is dead any more


@pytest.mark.parametrize("step", [4, 9], ids=["between restarts", "after the last"])
def test_codes_are_left_alone_at_other_times(step: int) -> None:
    objective = tokenizer_objective(restart_every=3, restart_until=0.7)
    quantizer = objective.tokenizer.quantize
    quantizer.ema_vocab_hit_SV.copy_(hit_table([1, 2]))
    before = quantizer.codebook.detach().clone()
    objective.coded = [quantized([[0] * 4], [torch.randn(4, 4)])]
    objective.after_step(step, Rng.from_seed(0, 1))
    assert torch.equal(quantizer.codebook, before)


def test_usage_and_perplexity_by_value() -> None:
    objective = tokenizer_objective()
    hits = torch.zeros(3, CODES)
    hits[0, 5] = 10  # one code for everything
    hits[1] = 4  # all alike
    hits[2, :12], hits[2, 12:] = 1, 0.01  # half of them, the others too rarely to count
    objective.tokenizer.quantize.ema_vocab_hit_SV.copy_(hits)
    numbers = objective.statistics()
    assert numbers["usage/scale0"] == pytest.approx(1 / CODES) and numbers["perplexity/scale0"] == pytest.approx(1)
    assert numbers["usage/scale1"] == 1 and numbers["perplexity/scale1"] == pytest.approx(CODES)
    assert numbers["usage/scale2"] == 0.5 and 12 < numbers["perplexity/scale2"] < 13
    p = (hits.sum(0) / hits.sum()).tolist()
    assert numbers["perplexity/all"] == pytest.approx(math.exp(-sum(x * math.log(x) for x in p)), rel=1e-5)
    assert numbers["usage/all"] == 1


def test_lpips_can_be_left_out_and_is_at_small_sizes() -> None:
    large = {**TOKENIZER["model_overrides"], "channel_multipliers": [1, 1, 1, 1, 1]}
    objective = tokenizer_objective(model_overrides=large, lpips="none")
    assert objective.image_size == (64, 64) and not objective.perceptual
    small = tokenizer_objective(lpips="no/such/folder")  # at 8 pixels nothing is looked for
    assert not small.perceptual
    batch, rng = keyed(2)
    assert "lpips" not in small(batch, "main", 0, 10, rng)


def test_a_tokenizer_starts_from_a_saved_one(runs: dict[str, Run]) -> None:
    folder = runs["tokenizer"].folder / "model"
    objective = tokenizer_objective(init_from=str(folder))
    assert_same(dict(objective.tokenizer.state_dict()), dict(MultiScaleVQ.from_pretrained(folder).state_dict()))
    assert objective.tokenizer.training and all(p.requires_grad for p in objective.tokenizer.parameters())


# ---- the generator's objective --------------------------------------------------------------------------------


@pytest.mark.parametrize("share", [0.3, 0.8, 1.0])
@pytest.mark.parametrize("max_steps", [60, 900, 6000])
def test_progressive_stages_only_go_forward_and_end_with_all(max_steps: int, share: float) -> None:
    warmup, first, last = 12, 1, 5
    stages = [progressive_stage(s, max_steps, warmup, share, first, last) for s in range(max_steps)]
    scales = [scale for scale, _ in stages]
    assert scales[: warmup + 1] == [first] * (warmup + 1) and scales[-1] == last
    assert all(b - a in (0, 1) for a, b in pairwise(scales))
    assert all(scale == last for s, scale in enumerate(scales) if s >= share * max_steps)
    assert all(0 < weight <= 1 for _, weight in stages)
    assert all(b >= a for (k, a), (j, b) in pairwise(stages) if j == k)  # within a stage it only grows
    assert all(weight == 1 for scale, weight in stages if scale in (first, last))
    if max_steps == 6000:  # the newest scale is let in over 20 steps
        begin = scales.index(2)
        assert stages[begin][1] == pytest.approx(0.05) and stages[begin + 19][1] == 1


def generator_objective(runs: dict[str, Run], **changes: Any) -> Any:
    torch.manual_seed(0)
    values = {**GENERATOR, "tokenizer": str(runs["tokenizer"].folder / "model"), **changes}
    objective = build_objective(objective_config(values), CLASSES).train()
    objective.optim("main", OptimConfig(warmup_steps=2))
    return objective


def test_a_progressive_run_trains_the_first_scales_first(runs: dict[str, Run]) -> None:
    """Position embeddings of a scale have a gradient exactly when the scale is trained."""
    objective = generator_objective(runs, progressive=1.0, progressive_from=0)
    batch, rng = keyed()
    trained = []
    for step in (0, 10, 19):
        objective.zero_grad()
        objective(batch, "main", step, 20, rng)["loss"].backward()
        moved = objective.model.pos_1LC.grad[0].abs().sum(-1) > 0
        trained.append([bool(part.all()) for part in moved.split(objective.model.layout.sizes)])
        assert all(bool(part.all()) == bool(part.any()) for part in moved.split(objective.model.layout.sizes))
    assert trained == [[True, False, False], [True, True, False], [True, True, True]]
    always = generator_objective(runs)
    always(batch, "main", 0, 20, rng)["loss"].backward()
    assert (always.model.pos_1LC.grad[0].abs().sum(-1) > 0).all()


@pytest.mark.parametrize("which", ["model", "model/transformer"])
def test_a_generator_starts_from_a_saved_one(runs: dict[str, Run], which: str) -> None:
    folder = runs["generator"].folder
    objective = generator_objective(runs, init_from=str(folder / which))
    assert_same(
        dict(objective.model.state_dict()), dict(VAR.from_pretrained(folder / "model/transformer").state_dict())
    )
    assert objective.model.training and all(p.requires_grad for p in objective.model.parameters())
    assert not any(p.requires_grad for p in objective.frozen("tokenizer").parameters())


@pytest.mark.parametrize(
    ("assignment", "message"),
    [
        ("objective.model_overrides.codebook_size=25", "do not fit together"),
        ("objective.model_overrides.scales=[1, 2, 3, 4]", "do not fit together"),
        ("objective.model_overrides.num_classes=4", "the model has 4 classes, the data 10; set .*num_classes"),
        ("objective.tokenizer=no/such/folder", "no tokenizer at 'no/such/folder'"),
        ("objective.sampling.top_p=2", r"top_p must be in \(0, 1\]"),
        ("objective.model=var_fashon", "did you mean 'var_fashion'"),
        ("data.train=no/such/images", "no/such/images does not exist"),
    ],
)
def test_what_does_not_fit_is_an_error_before_anything_is_written(
    runs: dict[str, Run], assignment: str, message: str, tmp_path: Path
) -> None:
    objective = {**GENERATOR, "tokenizer": str(runs["tokenizer"].folder / "model")}
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        train(recipe(tmp_path / "run", objective, assignment))
    assert not (tmp_path / "run").exists()


def test_a_classifier_needs_two_classes() -> None:
    with pytest.raises(ConfigError, match="at least 2 classes; got 1"):
        build_objective(objective_config(CLASSIFIER), ["only"])


# ---- the card of a finished model -----------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float32", "float16", "int8"])
def test_a_card_holds_what_the_runs_and_the_judge_wrote(runs: dict[str, Run], dtype: str, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="draws the curves")
    from varkit.metrics.evaluate import evaluate
    from varkit.metrics.report import Report
    from varkit.training.card import load_text, pack_model, write_card

    pipeline = AutoPipeline.from_pretrained(runs["generator"].folder / "model")
    changes = [f"images.sizes=[[{SIDE}, {SIDE}]]", "images.fit=squash", "interval.resamples=10", "manifold.real=50"]
    options = {"num": 40, "overrides": changes, "weights": runs["classifier"].folder / "model", "cache": False}
    some = torch.from_numpy(np.load(SLICE)["arr_0"][::7][:40]).permute(0, 3, 1, 2).expand(-1, 3, -1, -1).float()
    images = F.interpolate(some, (SIDE, SIDE)).to(torch.uint8)
    made = evaluate(pipeline, images, protocol="fashion", metrics=["frechet", "recall"], guidance=[1, 2], **options)
    back = evaluate(pipeline, images, protocol="fashion-rec", metrics=["frechet", "psnr", "codebook"], **options)
    made.write(tmp_path / "generation.json")
    back.write(tmp_path / "reconstruction.json")
    values = {
        "name": "tiny-var",
        "introduction": "An introduction.",
        "limits": "- A limit.",
        "commands": ["varkit eval tiny"],
        "runs": {
            "tokenizer": {"folder": str(runs["tokenizer"].folder), "part": "image_tokenizer"},
            "transformer": {"folder": str(runs["generator"].folder)},
            "classifier": {"folder": str(runs["classifier"].folder), "part": "classifier"},
        },
        "classifier": str(runs["classifier"].folder / "model"),
        "dtype": dtype,
        "curves": [["tokenizer", "l2"], ["transformer", "loss"]],
        "data": str(SLICE),
        "split": "train",
        "mode": "squash",
    }
    (tmp_path / "card.yaml").write_text(yaml.safe_dump(values))
    text = load_text(tmp_path / "card.yaml")
    pack_model(text, tmp_path / "ship")
    write_card(
        text,
        tmp_path / "ship",
        tmp_path / "generation.json",
        tmp_path / "reconstruction.json",
        machine="a test machine",
    )
    card = (tmp_path / "ship" / "README.md").read_text()
    score = made.results[1].score("frechet")
    shown = ("# tiny-var", "library_name: varkit", "a test machine", "varkit eval tiny", "6 of 8", made.fingerprint)
    for words in (*shown, score.text().replace(" [", "<br>["), score.how, back.results[0].score("psnr").text()[:5]):
        assert words in card
    assert Report.read(tmp_path / "ship" / "card" / "generation.json").to_dict() == made.to_dict()
    for picture in ("samples", "reconstructions", "curves"):
        assert Image.open(tmp_path / "ship" / "card" / f"{picture}.png").width > 10
    again = AutoPipeline.from_pretrained(tmp_path / "ship")
    assert again.transformer.dtype == again.image_tokenizer.dtype == torch.float32
    if dtype == "int8":
        packed = unpack_tensors(pack_tensors(pipeline.transformer.state_dict()))
        pipeline.transformer.load_state_dict(packed)
        assert (tmp_path / "ship" / "image_tokenizer" / FILE).is_file()
    rounded = pipeline if dtype == "int8" else pipeline.to(getattr(torch, dtype)).to(torch.float32)
    assert_same(again.transformer.state_dict(), rounded.transformer.state_dict())
    (file,) = (tmp_path / "ship" / "transformer").glob("*.safetensors")
    stored = file.stat().st_size
    assert stored < 1.3 * rounded.transformer.num_parameters() * getattr(torch, dtype).itemsize + 20_000
    assert ImageClassifier.from_pretrained(tmp_path / "ship" / "classifier").config.image_size == SIDE
