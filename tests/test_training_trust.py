"""What weeks of compute rest on: killed runs, several processes, steps that are not finite."""

from __future__ import annotations

import json
import math
import multiprocessing
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch import Tensor

from tests.test_training import CLASSIFIER, GENERATOR, SLICE, TOKENIZER, assert_same, exported, lines, recipe, weights
from varkit.compiler import require_compiler
from varkit.config import ConfigError
from varkit.data import ImageTransform, open_images
from varkit.training.checkpoint import Checkpoints
from varkit.training.logbook import drop_later_lines, require_tracker
from varkit.training.loop import train
from varkit.training.objectives import classifier
from varkit.training.recipe import Recipe, make_recipe, recipe_values

RUN = "import sys; from varkit.cli import app; app(['train', *sys.argv[1:]])"


def launch(plan: Recipe, *options: str, processes: int = 1) -> subprocess.Popen[bytes]:
    """A run in processes of its own, on the CPU."""
    file = plan.folder.with_suffix(".yaml")
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(yaml.safe_dump(recipe_values(plan)))
    script = file.with_suffix(".py")
    script.write_text(RUN)
    start = [sys.executable]
    if processes > 1:
        start += ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    root = str(Path(__file__).parents[1])
    env = {**os.environ, "ACCELERATE_USE_CPU": "1", "OMP_NUM_THREADS": "1", "PYTHONPATH": root}
    return subprocess.Popen([*start, str(script), str(file), *options], env=env, stderr=subprocess.PIPE)


def relative(first: dict[str, Tensor], second: dict[str, Tensor]) -> float:
    names = [n for n in first if first[n].is_floating_point()]
    one, two = (torch.cat([state[n].double().flatten() for n in names]) for state in (first, second))
    return float((one - two).norm() / one.norm())


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> str:
    plan = recipe(tmp_path_factory.mktemp("tokenizer") / "run", TOKENIZER, "loop.steps=2", "loop.sample_every=0")
    return str(train(plan).model)


# Two channels to a group: a bias before GroupNorm of one has no gradient but rounding, which Adam blows up.
WIDER = {**TOKENIZER, "model_overrides": {**TOKENIZER["model_overrides"], "base_channels": 64}}
PLAIN = ("loop.steps=20", "loop.save_every=20", "loop.validate_every=0", "loop.sample_every=0", "loop.ema_decay=0.5")


@pytest.mark.slow
@pytest.mark.parametrize("what", ["generator", "tokenizer", "ema codebook"])
def test_two_processes_equal_one(what: str, tokenizer: str, tmp_path: Path) -> None:
    """Losses and weights after 20 float32 steps of the same global batch."""
    objective: dict[str, Any] = {**GENERATOR, "tokenizer": tokenizer}
    if what == "generator":
        objective["model_overrides"] = {**GENERATOR["model_overrides"], "drop_path_rate": 0.0}
    else:
        objective = {**WIDER, "codebook": "gradient" if what == "tokenizer" else "ema"}
    plans = [recipe(tmp_path / name, objective, *PLAIN) for name in ("one", "two")]
    for processes, plan in enumerate(plans, start=1):
        run = launch(plan, processes=processes)
        error = run.communicate()[1]
        assert run.returncode == 0, error.decode()
    assert_alike(*plans)


def assert_alike(first: Recipe, second: Recipe) -> None:
    """Losses of each line and weights at step 20, within 1e-5."""
    losses = [0.0]
    for one, two in zip(lines(first.folder), lines(second.folder), strict=True):
        assert one.keys() == two.keys()
        losses += [abs(one[n] - two[n]) / abs(one[n]) for n in one.keys() & {"loss", "discriminator/loss"}]
    difference = relative(weights(first.folder, 20), weights(second.folder, 20))
    print(f"\nrelative differences: losses at most {max(losses):.1e}, weights {difference:.1e}")
    assert max(losses) < 1e-5 and difference < 1e-5


@pytest.mark.slow
@pytest.mark.parametrize("what", ["generator", "tokenizer"])
def test_micro_batches_equal_one_batch(what: str, tokenizer: str, tmp_path: Path) -> None:
    """Two micro-batches a step; the tokenizer without its discriminator, whose statistics are of a micro-batch."""
    objective: dict[str, Any] = {**GENERATOR, "tokenizer": tokenizer}
    if what == "generator":
        objective["model_overrides"] = {**GENERATOR["model_overrides"], "drop_path_rate": 0.0}
    else:
        objective = {**WIDER, "adversarial_weight": 0.0}
    plans = [recipe(tmp_path / str(n), objective, *PLAIN, f"loop.accumulation={n}") for n in (1, 2)]
    for plan in plans:
        train(plan)
    assert_alike(*plans)


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_compiled_steps_are_the_same_training(tokenizer: str, tmp_path: Path) -> None:
    try:
        require_compiler(torch.device("cpu"))
    except ConfigError as error:
        pytest.skip(str(error))
    objective = {**GENERATOR, "tokenizer": tokenizer}
    objective["model_overrides"] = {**GENERATOR["model_overrides"], "depth": 1, "drop_path_rate": 0.0}
    plans = [
        recipe(tmp_path / str(v), objective, f"loop.compile={v}", "loop.steps=3", "loop.validate_every=0")
        for v in (False, True)
    ]
    for plan in plans:
        train(plan)
    difference = relative(*(weights(plan.folder, 3) for plan in plans))
    print(f"\nrelative difference of the weights: {difference:.1e}")
    assert difference < 1e-4


def train_or_resume(values: dict[str, Any], resume: bool) -> None:
    train(make_recipe(values), resume=resume)


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_twenty_kills_change_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """SIGKILL at random moments, every other one while a checkpoint is written: every step saves one.

    Each run is a process of its own, forked from one that has imported everything.
    """
    monkeypatch.setenv("ACCELERATE_USE_CPU", "1")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    processes = multiprocessing.get_context("forkserver")
    processes.set_forkserver_preload([__name__])

    def start(plan: Recipe, resume: bool) -> Any:
        process = processes.Process(target=train_or_resume, args=(recipe_values(plan), resume))
        process.start()
        return process

    steps = ("loop.steps=100", "loop.keep=2", "loop.validate_every=0", "loop.sample_every=50")
    whole, plan = (recipe(tmp_path / name, TOKENIZER, *steps) for name in ("whole", "killed"))
    uninterrupted = start(whole, False)
    uninterrupted.join()
    assert uninterrupted.exitcode == 0
    checkpoints, chance, kills, saving = Checkpoints(plan.folder / "checkpoints", 2), random.Random(0), 0, 0

    def half_written(since: float) -> bool:
        try:
            names = [*checkpoints.folder.glob(".part-*"), *checkpoints.folder.glob(".old-*")]
            return any(name.stat().st_mtime > since for name in names)
        except FileNotFoundError:  # renamed meanwhile
            return False

    while not (plan.folder / "model").exists():
        before, began = checkpoints.latest(), time.time()
        run = start(plan, before is not None)
        if kills < 20:
            while checkpoints.latest() == before and run.is_alive():  # each run gets a step further
                time.sleep(0.002)
            if kills % 2:
                after = time.time()
                while not half_written(after) and run.is_alive():
                    time.sleep(0.002)
            time.sleep(chance.uniform(0, 0.02 if kills % 2 else 0.3))
            if run.is_alive():
                run.kill()
                kills += 1
                run.join()
                saving += half_written(began)
        run.join()
        assert run.exitcode in (0, -signal.SIGKILL)
    print(f"\n{kills} kills, {saving} of them left a checkpoint half written or half removed")
    assert kills == 20 and saving > 0
    assert_same(weights(plan.folder, 100), weights(whole.folder, 100))
    assert_same(exported(plan.folder), exported(whole.folder))
    assert lines(plan.folder) == lines(whole.folder)


def test_lines_after_the_checkpoint_and_torn_lines_go(tmp_path: Path) -> None:
    file = tmp_path / "metrics.jsonl"
    assert drop_later_lines(file, 0) == 0 and not file.exists()
    file.write_text("".join(json.dumps({"step": s}) + "\n" for s in (1, 2, 2, 3)) + '{"step": 2, "lo')
    assert drop_later_lines(file, 2) == 2
    assert [json.loads(line)["step"] for line in file.read_text().splitlines()] == [1, 2, 2]
    assert drop_later_lines(file, 2) == 0


def poison(patch: pytest.MonkeyPatch, steps: set[int]) -> None:
    forward = classifier.Training.forward

    def poisoned(self: Any, batch: Any, phase: str, step: int, max_steps: int, rng: Any) -> dict[str, Tensor]:
        losses = forward(self, batch, phase, step, max_steps, rng)
        return {"loss": losses["loss"] * (math.nan if step in steps else 1)}

    patch.setattr(classifier.Training, "forward", poisoned)


def test_a_bad_step_is_skipped_counted_and_reported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    poison(monkeypatch, {2})
    plan = recipe(tmp_path / "run", CLASSIFIER)
    assert train(plan).finished
    assert "step 3, phase main: not finite: grad_norm, loss; the step is skipped" in capsys.readouterr().err
    trained = [line for line in lines(plan.folder) if "bad_steps" in line]
    assert [line["bad_steps"] for line in trained] == [0, 0, 1, 1, 1, 1]
    assert "loss" not in trained[2]
    before, after = weights(plan.folder, 2), weights(plan.folder, 3)
    learned = [n for n in before if "running" not in n and "num_batches" not in n]
    assert_same({n: before[n] for n in learned}, {n: after[n] for n in learned})


def test_too_many_bad_steps_in_a_row_end_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    poison(monkeypatch, {0, 2, 3, 4, 5})
    plan = recipe(tmp_path / "run", CLASSIFIER, "loop.max_bad_steps=3", "loop.save_every=2")
    with pytest.raises(FloatingPointError, match=r"step 5, .*3 such steps in a row .*checkpoint is .*step-00000004"):
        train(plan)


def test_channels_last_is_the_same_training(tmp_path: Path) -> None:
    plans = [recipe(tmp_path / str(v), TOKENIZER, f"loop.channels_last={v}", "loop.steps=3") for v in (False, True)]
    for plan in plans:
        train(plan)
    assert relative(*(weights(plan.folder, 3) for plan in plans)) < 1e-4


def test_crops_do_not_depend_on_the_number_of_workers() -> None:
    from torch.utils.data import DataLoader

    from varkit.data.images import collate
    from varkit.training.batches import StepBatches

    seen = []
    for workers in (0, 1, 2):
        data = open_images(SLICE, transform=ImageTransform(20, "crop", flip=True, seed=3))
        batches = StepBatches(len(data), 4, start=0, stop=3, seed=0)
        loader = DataLoader(data, batch_sampler=batches, collate_fn=collate, num_workers=workers)
        seen.append(torch.cat([batch["images"] for batch in loader]))
    assert torch.equal(seen[0], seen[1]) and torch.equal(seen[0], seen[2])


def test_what_is_missing_is_said_before_work(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match="did you mean 'tensorboard'"):
        require_tracker("tensorbord")
    monkeypatch.setattr("varkit.training.logbook.find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r"loop.tracker=wandb needs the package wandb: pip install wandb"):
        require_tracker("wandb")
    require_tracker("none")
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(ConfigError, match="needs a C\\+\\+ compiler, and 'no-such-compiler' is not there"):
        require_compiler(torch.device("cpu"))
    require_compiler(torch.device("cuda"))
