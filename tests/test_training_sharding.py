"""Weights sharded over processes, and checkpoints that load on another number of them."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
import torch
import yaml
from accelerate import FullyShardedDataParallelPlugin
from torch import Tensor, nn

from tests.test_training import CLASSIFIER, GENERATOR, TOKENIZER, assert_same, exported, lines, recipe
from tests.test_training_trust import RUN, relative
from varkit.config import ConfigError
from varkit.training.checkpoint import Checkpoints
from varkit.training.loop import train
from varkit.training.objectives import build_objective
from varkit.training.recipe import Recipe, recipe_values
from varkit.training.restore import is_sharded, saved_processes
from varkit.training.sharding import exchanged, start_sharding
from varkit.training.sync import require_all_processes

ROOT = Path(__file__).parents[1]
LAUNCH = ROOT / "train" / "launch"
Kind = str  # one, ddp or fsdp


def launch(plan: Recipe, kind: Kind, *options: str) -> subprocess.Popen[str]:
    """A run on the CPU, by the shipped configuration files."""
    file = plan.folder.with_suffix(".yaml")
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(yaml.safe_dump(recipe_values(plan)))
    script = file.with_suffix(".py")
    script.write_text(RUN)
    start = [sys.executable]
    if kind != "one":
        config = LAUNCH / {"ddp": "two_cpus.yaml", "fsdp": "fsdp_cpus.yaml"}[kind]
        start += ["-m", "accelerate.commands.launch", "--config_file", str(config), "--main_process_port", "0"]
    env = {
        **os.environ,
        "ACCELERATE_USE_CPU": "1",
        "CUDA_VISIBLE_DEVICES": "",
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": str(ROOT),
    }
    return subprocess.Popen([*start, str(script), str(file), *options], env=env, stderr=subprocess.PIPE, text=True)


def run(plan: Recipe, kind: Kind, *options: str) -> str:
    """A run to its end; what it said."""
    process = launch(plan, kind, *options)
    said = process.communicate()[1]
    assert process.returncode == 0, said
    return said


@pytest.fixture(scope="module", name="plan")
def _plan(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Recipe]:
    """Recipes of 20 float32 steps of a small VAR, without dropout, saved half-way."""
    folder = tmp_path_factory.mktemp("sharding")
    tokenizer = train(recipe(folder / "tokenizer", TOKENIZER, "loop.steps=2", "loop.sample_every=0")).model
    overrides = {**GENERATOR["model_overrides"], "drop_path_rate": 0.0}
    objective = {**GENERATOR, "tokenizer": str(tokenizer), "model_overrides": overrides}
    every = ("loop.steps=20", "loop.save_every=10", "loop.validate_every=10", "loop.sample_every=10", "loop.keep=2")

    def make(name: str, *more: str) -> Recipe:
        return recipe(folder / name, objective, *every, "loop.ema_decay=0.5", *more)

    return make


@pytest.fixture(scope="module", name="runs")
def _runs(plan: Callable[..., Recipe]) -> dict[Kind, Recipe]:
    """The same 20 steps in one process, in two with whole weights, and in two with sharded ones."""
    plans = {kind: plan(kind) for kind in ("one", "ddp", "fsdp")}
    for kind, made in plans.items():
        run(made, kind)
    return plans


def transformer(folder: Path) -> dict[str, Tensor]:
    """What was trained of the exported pipeline."""
    return {name: value for name, value in exported(folder).items() if name.startswith("transformer/")}


def assert_alike(first: Path, second: Path) -> None:
    for one, two in zip(lines(first), lines(second), strict=True):
        assert one.keys() == two.keys()
        for name in one.keys() & {"loss", "grad_norm", "validation/loss"}:
            assert one[name] == pytest.approx(two[name], rel=1e-5)
    difference = relative(*(transformer(folder) for folder in (first, second)))
    print(f"\nrelative difference of the averaged weights: {difference:.1e}")
    assert difference < 1e-5


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
def test_two_processes_train_as_one(runs: dict[Kind, Recipe], kind: Kind) -> None:
    """Losses, gradient norms, validation and averaged weights; and the sharded run wrote shards."""
    folder = runs[kind].folder
    assert_alike(runs["one"].folder, folder)
    latest = folder / "checkpoints" / "step-00000020"
    assert is_sharded(latest) == (kind == "fsdp") and saved_processes(latest) == 2
    if kind == "fsdp":
        assert len(list((latest / "average").glob("*.distcp"))) == 2
    for step in (10, 20):
        names = [runs[k].folder / "samples" / f"step-{step:08d}.png" for k in ("one", kind)]
        assert all(name.exists() for name in names)


PAIRS = [("ddp", "one"), ("one", "ddp"), ("fsdp", "fsdp"), ("fsdp", "one"), ("one", "fsdp"), ("fsdp", "ddp")]


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize(("saved", "loaded"), PAIRS)
def test_a_checkpoint_loads_on_another_number_of_processes(
    runs: dict[Kind, Recipe], plan: Callable[..., Recipe], saved: Kind, loaded: Kind
) -> None:
    """From step 10 on, the run ends where the run without a stop does."""
    changed = plan(f"{saved}-to-{loaded}")
    shutil.copytree(runs[saved].folder, changed.folder)
    for gone in ("checkpoints/step-00000020", "model"):
        shutil.rmtree(changed.folder / gone)
    said = run(changed, loaded, "--resume")
    assert "resumed from" in said
    assert ("processes, now" in said) == ((saved == "one") != (loaded == "one"))
    assert_alike(runs["one"].folder, changed.folder)
    if saved == loaded:
        assert_same(exported(runs[saved].folder), exported(changed.folder))


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_sharded_accumulation_recomputation_and_options(plan: Callable[..., Recipe]) -> None:
    """What calls the blocks more than once a step."""
    more = (
        "loop.accumulation=2",
        "loop.steps=4",
        "objective.gradient_checkpointing=true",
        "objective.mixed_prediction={next_all: 0.3, random: 0.2}",
        "objective.input_masking={}",
    )
    plans = [plan(f"accumulated-{kind}", *more) for kind in ("one", "fsdp")]
    for made, kind in zip(plans, ("one", "fsdp"), strict=True):
        run(made, kind)
    assert_alike(*(made.folder for made in plans))


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("how", ["freeze", "lora"])
def test_a_sharded_fine_tuning_is_that_of_one_process(
    runs: dict[Kind, Recipe], plan: Callable[..., Recipe], how: str
) -> None:
    """Frozen parts, or adapters that are merged at the end, from the model of another run."""
    options = {"freeze": 'objective.freeze=["blocks.0.*", "word_embed*"]', "lora": "objective.lora={rank: 2}"}
    start = f"objective.init_from={runs['one'].folder / 'model'}"
    overrides = "objective.model_overrides={drop_path_rate: 0.0}"
    plans = [plan(f"{how}-{kind}", start, overrides, options[how], "optim.layer_decay=0.8") for kind in ("one", "fsdp")]
    for made, kind in zip(plans, ("one", "fsdp"), strict=True):
        run(made, kind)
    assert_alike(*(made.folder for made in plans))
    assert relative(*(transformer(p.folder) for p in (runs["one"], plans[1]))) > 1e-4


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_signal_to_one_process_ends_all_at_the_same_step(plan: Callable[..., Recipe]) -> None:
    stopped = plan("stopped", "loop.steps=5000", "loop.save_every=1")
    process = launch(stopped, "ddp")
    checkpoints = Checkpoints(stopped.folder / "checkpoints", 2)
    while checkpoints.latest() is None and process.poll() is None:
        time.sleep(0.05)
    workers = [
        p for p in psutil.Process(process.pid).children(recursive=True) if str(stopped.folder) in str(p.cmdline())
    ]
    assert len(workers) == 2
    workers[1].terminate()
    said = process.communicate(timeout=300)[1]
    assert process.returncode == 0, said
    assert f"saved step {checkpoints.steps()[-1]} of 5000; continue with --resume" in said


# ---- what is refused ------------------------------------------------------------------------------------------


def accelerator(**options: Any) -> Any:
    plugin = FullyShardedDataParallelPlugin(**{"fsdp_version": 2, "reshard_after_forward": True, **options})
    state = SimpleNamespace(distributed_type="FSDP", fsdp_plugin=plugin)
    return SimpleNamespace(num_processes=2, state=state, device=torch.device("cpu"))


@pytest.fixture(name="asked")
def _asked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    monkeypatch.setenv("FSDP_CPU_RAM_EFFICIENT_LOADING", "false")  # the plugin writes there


class Shardable(nn.Module):
    shards = True


@pytest.mark.usefixtures("asked")
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"state_dict_type": "FULL_STATE_DICT"}, "set fsdp_state_dict_type: SHARDED_STATE_DICT"),
        ({"cpu_ram_efficient_loading": True}, "fsdp_cpu_ram_efficient_loading empties"),
        ({"cpu_offload": True}, r"fsdp_offload_params\) are not supported"),
        ({"activation_checkpointing": True}, "use objective.gradient_checkpointing=true"),
        ({"fsdp_version": 1, "reshard_after_forward": "FULL_SHARD"}, "set fsdp_version: 2"),
    ],
)
def test_configurations_that_are_not_supported_are_refused(options: dict[str, Any], message: str) -> None:
    loop = recipe(Path("unused"), CLASSIFIER).loop
    with pytest.raises(ConfigError, match=message):
        start_sharding(accelerator(**options), Shardable(), loop)  # type: ignore[arg-type]


@pytest.mark.usefixtures("asked")
@pytest.mark.parametrize(("key", "value"), [("precision", "fp16"), ("compile", True)])
def test_settings_that_cannot_be_sharded_are_refused(key: str, value: Any) -> None:
    loop = replace(recipe(Path("unused"), CLASSIFIER).loop, **{key: value})
    with pytest.raises(ConfigError, match=f"loop.{key}="):
        start_sharding(accelerator(), Shardable(), loop)  # type: ignore[arg-type]


@pytest.mark.usefixtures("asked")
def test_objectives_of_several_networks_are_refused() -> None:
    plan = recipe(Path("unused"), TOKENIZER)
    with pytest.raises(ConfigError, match=r"FSDP: multiscale_vq cannot be sharded: .*train/launch/gpus.yaml"):
        start_sharding(accelerator(), build_objective(plan.objective, []), plan.loop)


def test_without_the_wish_or_with_one_process_nothing_is_sharded(monkeypatch: pytest.MonkeyPatch) -> None:
    plan = recipe(Path("unused"), TOKENIZER)
    assert not start_sharding(accelerator(), Shardable(), plan.loop)  # type: ignore[arg-type]
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    one = SimpleNamespace(**{**vars(accelerator()), "num_processes": 1})
    assert not start_sharding(one, Shardable(), plan.loop)  # type: ignore[arg-type]


def test_processes_that_do_not_know_of_each_other_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    require_all_processes()
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ConfigError, match=r"2 processes were started, but accelerate joined 1 .*ACCELERATE_USE_CPU=1"):
        require_all_processes()


# ---- pieces ---------------------------------------------------------------------------------------------------


def test_exchanged_weights_come_back_also_after_an_error() -> None:
    weights = [nn.Parameter(torch.randn(3)) for _ in range(2)]
    before = [w.detach().clone() for w in weights]
    others: list[Tensor] = [torch.zeros(3), torch.ones(3)]
    with pytest.raises(KeyError), exchanged(weights, others):
        assert [w.tolist() for w in weights] == [o.tolist() for o in others]
        raise KeyError
    assert all(torch.equal(w, b) for w, b in zip(weights, before, strict=True))


def test_launch_configurations_are_read_by_accelerate() -> None:
    from accelerate.commands.config.config_args import load_config_from_file

    found = {file.stem: load_config_from_file(str(file)) for file in LAUNCH.glob("*.yaml")}
    assert len(found) == 7
    for name, config in found.items():
        assert (config.fsdp_config != {}) == name.startswith("fsdp")
        if config.fsdp_config:
            assert config.fsdp_config["fsdp_version"] == 2
            assert config.fsdp_config["fsdp_state_dict_type"] == "SHARDED_STATE_DICT"
