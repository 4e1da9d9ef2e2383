"""The dry run says what the run then does; counting FLOPs changes nothing; trackers by name."""

from __future__ import annotations

import json
import shutil
import sqlite3
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from typer.testing import CliRunner

from tests.test_training import CLASSIFIER, GENERATOR, TOKENIZER, assert_same, lines, recipe, weights
from tests.test_training_trust import launch, poison
from varkit.cli import app
from varkit.config import ConfigError
from varkit.training import dry_run as dry_run_module
from varkit.training import flops, run_facts
from varkit.training.dry_run import dry_run
from varkit.training.dry_run_text import duration, size
from varkit.training.dry_run_text import lines as words
from varkit.training.flops import PEAKS, FlopMeter, count_flops, peak_flops
from varkit.training.logbook import require_tracker
from varkit.training.loop import train
from varkit.training.memory import memory_now, memory_peak, memory_total, reset_peak
from varkit.training.recipe import Recipe, make_recipe, recipe_values
from varkit.training.run_facts import events, slow_precision

CPU = torch.device("cpu")
FEW = ("loop.sample_every=0", "data.validation=null")


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dry_run_module, "STEPS", 1)


def weight_of(path: Path) -> int:
    return sum(f.stat().st_size for f in path.rglob("*") if f.is_file())


def snapshot(folder: Path) -> dict[Path, tuple[int, int]]:
    return {p: (p.stat().st_size, p.stat().st_mtime_ns) for p in [folder, *folder.rglob("*")]}


def changed(plan: Recipe, **loop: Any) -> Recipe:
    values = recipe_values(plan)
    return make_recipe({**values, "loop": {**values["loop"], **loop}})


@pytest.fixture(scope="module")
def tokenizer_run(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], Recipe]:
    """What a dry run said, and the run that came after it in the same folder."""
    folder = tmp_path_factory.mktemp("runs")
    plan = recipe(folder / "tokenizer", TOKENIZER, "loop.keep=2", "loop.save_every=2", "loop.validate_every=3")
    facts = dry_run(plan)
    assert list(folder.iterdir()) == []  # no folder, no file beside it
    train(plan)
    return facts, plan


# ---- what it says is what happens ---------------------------------------------------------------------------------


def test_what_will_be_written_is_what_is_written(tokenizer_run: tuple[dict[str, Any], Recipe]) -> None:
    facts, plan = tokenizer_run
    rows = {Path(row["path"]).name: row for row in facts["writes"]}
    assert rows.keys() == {p.name for p in plan.folder.iterdir()}
    for name in ("checkpoints", "model"):
        assert rows[name]["bytes"] == pytest.approx(weight_of(plan.folder / name), rel=0.06)  # names
    assert rows["checkpoints"]["count"] == len(list((plan.folder / "checkpoints").iterdir())) == 2
    assert rows["samples"]["count"] == len(list((plan.folder / "samples").iterdir())) == 2
    assert rows["samples"]["bytes"] == pytest.approx(weight_of(plan.folder / "samples"), rel=0.5)
    logged = lines(plan.folder)
    assert rows["metrics.jsonl"]["count"] == sum("lr" in line for line in logged)
    assert rows["metrics.jsonl"]["bytes"] == pytest.approx((plan.folder / "metrics.jsonl").stat().st_size, rel=0.3)
    assert facts["time"]["validations"] == sum("validation/l2" in line for line in logged) == 2
    assert facts["disk"]["need"] > sum(row["bytes"] for row in facts["writes"])


def test_steps_with_and_without_the_discriminator_are_told_apart(
    tokenizer_run: tuple[dict[str, Any], Recipe],
) -> None:
    facts, _ = tokenizer_run
    plain, adversarial = facts["step_kinds"]
    assert (plain["phases"], plain["steps"]) == (["main"], 2)
    assert (adversarial["phases"], adversarial["steps"]) == (["main", "discriminator"], 4)
    assert adversarial["flops"] > plain["flops"] > 0
    for kind in (plain, adversarial):
        assert kind["seconds"] > 0 and 0 <= kind["data_wait"] <= 1 and "mfu" not in kind
    parts = facts["time"]
    assert parts["steps"] == pytest.approx(2 * plain["seconds"] + 4 * adversarial["seconds"])
    assert parts["total"] == pytest.approx(sum(parts[k] for k in ("steps", "validation", "samples", "saves")))


def test_networks_and_tokens_of_a_tokenizer(tokenizer_run: tuple[dict[str, Any], Recipe]) -> None:
    facts, plan = tokenizer_run
    main, discriminator = facts["networks"]
    state = weights(plan.folder, 6)
    learned = sum(v.numel() for n, v in state.items() if n.startswith("tokenizer.") and "ema_vocab" not in n)
    assert (main["name"], main["trained"], main["frozen"]) == ("main", learned, 0)
    assert sum(part["trained"] for part in main["parts"].values()) == learned
    assert discriminator["name"] == "discriminator" and discriminator["trained"] > 0
    assert facts["tokens"]["length"] == 21 and facts["tokens"]["groups"] is None
    memory = facts["memory"]
    assert memory["gradients"] == 4 * learned and memory["optimizer"] >= 8 * learned
    assert memory["peak"] >= memory["parameters"] + memory["gradients"] + memory["optimizer"] + memory["average"]
    assert memory["total"] > memory["peak"] == max(memory["peak_steps"], memory["peak_pauses"])


def test_a_generator_has_a_frozen_tokenizer_and_groups(
    tokenizer_run: tuple[dict[str, Any], Recipe], tmp_path: Path
) -> None:
    plan = recipe(tmp_path / "run", {**GENERATOR, "tokenizer": str(tokenizer_run[1].folder / "model")})
    facts = dry_run(plan)
    main, tokenizer = facts["networks"]
    assert main["frozen"] == tokenizer["trained"] == 0 and main["trained"] > 0 and tokenizer["frozen"] > 0
    assert (facts["tokens"]["length"], facts["tokens"]["groups"]) == (21, 3)
    model = next(row["bytes"] for row in facts["writes"] if row["path"].endswith("model"))
    assert model > 4 * (main["trained"] + tokenizer["frozen"])  # a pipeline holds both
    assert not plan.folder.exists()
    text = "\n".join(words(facts))
    assert "21 an image, predicted in 3 groups: grids 1x1 2x2 4x4, codebook 24" in text
    assert "6 that train main" in text and "2 kept" not in text and "6 kept" in text


def test_resuming_is_rehearsed_from_the_checkpoint_and_touches_nothing(
    tokenizer_run: tuple[dict[str, Any], Recipe],
) -> None:
    plan = tokenizer_run[1]
    before = snapshot(plan.folder)
    facts = dry_run(changed(plan, steps=10), resume=True)
    assert (facts["run"]["from_step"], facts["run"]["steps_left"]) == (6, 4)
    assert [(k["phases"], k["steps"]) for k in facts["step_kinds"]] == [(["main", "discriminator"], 4)]
    assert facts["run"]["seconds_so_far"] > 0
    assert any("resumed at step 6" in line for line in words(facts))
    finished = dry_run(plan, resume=True)
    assert finished["step_kinds"] == [] and finished["time"]["total"] == 0
    assert any("none is left" in line for line in words(finished))
    assert snapshot(plan.folder) == before


def test_errors_are_those_of_a_run(tokenizer_run: tuple[dict[str, Any], Recipe], tmp_path: Path) -> None:
    plan = tokenizer_run[1]
    with pytest.raises(ConfigError, match="already holds a run"):
        dry_run(plan)
    with pytest.raises(ConfigError, match="nothing to resume"):
        dry_run(recipe(tmp_path / "run", CLASSIFIER), resume=True)
    (tmp_path / "file").write_text("")
    for out in ("file", "file/run"):
        with pytest.raises(NotADirectoryError, match="file is a file; choose another folder"):
            dry_run(recipe(tmp_path / out, CLASSIFIER))
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


# ---- warnings -----------------------------------------------------------------------------------------------------


def test_what_will_not_go_well_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(run_facts.shutil, "disk_usage", lambda path: usage)
    monkeypatch.setattr(dry_run_module, "memory_total", lambda device: 1 << 20)
    poison(monkeypatch, {4, 5})
    facts = dry_run(recipe(tmp_path / "run", CLASSIFIER))
    text = "\n".join(words(facts))
    assert "warning   the run will not fit on the disk" in text and "1 kB are free" in text
    assert "the peak is over 90 % of the memory" in text
    assert "3 of the steps taken were not finite" in text
    assert facts["tokens"] is None and len(facts["networks"]) == 1


def test_slow_precision_is_warned_of(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run_facts.platform, "machine", lambda: "x86_64")
    for fast in ("_is_amx_tile_supported", "_is_avx512_bf16_supported"):
        for name in ("_is_amx_tile_supported", "_is_avx512_bf16_supported"):
            monkeypatch.setattr(torch.cpu, name, lambda yes=name == fast: yes)
        assert slow_precision(CPU, "bf16") is None
        monkeypatch.setattr(torch.cpu, fast, lambda: False)
        assert "loop.precision=no" in str(slow_precision(CPU, "bf16"))
        assert slow_precision(CPU, "no") is None


@pytest.mark.parametrize("every", [0, 1, 3, 4, 50])
@pytest.mark.parametrize(("first", "last"), [(0, 12), (5, 12), (12, 12), (0, 1)])
def test_events_are_counted_as_the_loop_has_them(first: int, last: int, every: int) -> None:
    happened = [s for s in range(first + 1, last + 1) if s == last or (every and s % every == 0)]
    assert events(first, last, every) == len(happened)


def test_sizes_and_durations_in_words() -> None:
    assert [size(n) for n in (0, 999, 1000, 1.5e9, 2e12)] == ["0 bytes", "999 bytes", "1 kB", "1.5 GB", "2 TB"]
    assert [duration(s) for s in (5, 120, 7200, 1e6)] == ["5.0 s", "2.0 min", "2.0 h", "11.6 days"]


# ---- the command --------------------------------------------------------------------------------------------------


def test_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "tiny.yaml"
    file.write_text(json.dumps(recipe_values(recipe(tmp_path / "run", CLASSIFIER))))
    shown = CliRunner().invoke(app, ["train", str(file), "--dry-run"])
    assert shown.exit_code == 0 and "nothing was written" in shown.stdout
    for title in ("run ", "data ", "networks ", "tokens ", "steps ", "memory ", "time ", "writes "):
        assert f"\n{title}" in f"\n{shown.stdout}"
    facts = json.loads(CliRunner().invoke(app, ["train", str(file), "--dry-run", "--json"]).stdout)
    assert facts["run"]["steps"] == 6 and facts["memory"]["peak"] > 0
    alone = CliRunner().invoke(app, ["train", str(file), "--json"])
    assert alone.exit_code == 2 and "--json goes with --dry-run" in alone.stderr
    poison(monkeypatch, set(range(6)))
    bad = CliRunner().invoke(app, ["train", str(file), "loop.max_bad_steps=1", "--dry-run"])
    assert bad.exit_code == 1 and "not finite" in bad.stderr
    assert [p.name for p in tmp_path.iterdir()] == ["tiny.yaml"]


@pytest.mark.slow
def test_two_processes_rehearse_together(tmp_path: Path) -> None:
    plan = recipe(tmp_path / "run", TOKENIZER, "data.workers=1")
    process = launch(plan, "--dry-run", processes=2)
    error = process.communicate()[1]
    assert process.returncode == 0, error.decode()
    assert not plan.folder.exists()


# ---- memory -------------------------------------------------------------------------------------------------------


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="the peak begins anew on Linux alone")
def test_the_peak_sees_what_came_and_went() -> None:
    reset_peak(CPU)
    before = memory_peak(CPU)
    torch.ones(20_000_000).sum()
    assert memory_peak(CPU) - before > 60_000_000
    assert memory_now(CPU) < memory_peak(CPU) < memory_total(CPU)
    reset_peak(CPU)
    assert memory_peak(CPU) - before < 40_000_000


# ---- FLOPs --------------------------------------------------------------------------------------------------------


def test_flops_by_hand() -> None:
    layer, x = nn.Linear(5, 7), torch.randn(3, 5, requires_grad=True)
    result, forward = count_flops(lambda: layer(x))
    assert result.shape == (3, 7) and forward == 2 * 3 * 5 * 7
    assert count_flops(lambda: layer(x).sum().backward())[1] == 3 * forward  # two products more: to x and to the weight
    q = torch.randn(2, 4, 16, 8, requires_grad=True)  # B H L C
    product = 2 * (2 * 4) * 16 * 16 * 8
    assert count_flops(lambda: F.scaled_dot_product_attention(q, q, q))[1] == 2 * product
    assert count_flops(lambda: F.scaled_dot_product_attention(q, q, q).sum().backward())[1] == 7 * product


def test_counting_changes_no_bit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plans = [recipe(tmp_path / name, TOKENIZER, *FEW, "loop.steps=3") for name in ("all", "none")]
    monkeypatch.setattr(flops, "RECOUNT", 1)
    train(plans[0])
    monkeypatch.setattr(FlopMeter, "watch", lambda self, step, phases, function: function())
    train(plans[1])
    assert_same(*(weights(plan.folder, 3) for plan in plans))
    assert lines(plans[0].folder) == lines(plans[1].folder)


def test_a_run_logs_how_fast_it_computes(tokenizer_run: tuple[dict[str, Any], Recipe]) -> None:
    facts, plan = tokenizer_run
    rows = [json.loads(line) for line in (plan.folder / "metrics.jsonl").read_text().splitlines()]
    rows = [row for row in rows if "lr" in row]
    for step, row in enumerate(rows):
        assert row["images_per_second"] > 0 and 0 <= row["data_wait"] <= 1 and row["grad_norm"] > 0
        assert ("discriminator/grad_norm" in row) == (step >= 2)
        kind = facts["step_kinds"][step >= 2]
        assert row["tflops"] * 1e12 == pytest.approx(kind["flops"] * row["images_per_second"] / 8, rel=1e-4)
        assert "mfu" not in row  # nobody knows the peak of a CPU


def test_a_step_stands_for_those_like_it_until_it_is_old(monkeypatch: pytest.MonkeyPatch) -> None:
    meter, layer = FlopMeter(CPU, "no", enabled=True), nn.Linear(4, 4)
    meter.peak = 1e6

    def work(rows: int) -> dict[str, Any]:
        return {"loss": layer(torch.ones(rows, 4)).sum()}

    once = 2 * 4 * 4
    for step, phases, rows, counted in [
        (7, ["main"], 1, 1),  # the first
        (8, ["main"], 100, 1),  # taken to be as large
        (9, ["main", "other"], 5, 5),  # another kind
        (499, ["main", "other"], 9, 5),
        (500, ["main", "other"], 3, 3),  # long ago
        (501, ["main", "other"], 1, 3),
    ]:
        meter.watch(step, phases, lambda rows=rows: work(rows))  # type: ignore[misc]
        assert meter.speed(2.0) == pytest.approx({"tflops": counted * once / 2e12, "mfu": counted * once / 2e6})
    assert meter.watch(502, ["main"], dict) == {}  # skipped: the next one is counted
    meter.watch(503, ["main"], lambda: work(2))
    assert meter.speed(1.0)["tflops"] == pytest.approx(2 * once / 1e12)
    off = FlopMeter(CPU, "no", enabled=False)
    assert "loss" in off.watch(0, ["main"], lambda: work(1)) and off.speed(1.0) == {}


@pytest.mark.parametrize(
    ("name", "precision", "tera"),
    [
        ("NVIDIA H100 80GB HBM3", "bf16", 989.4),
        ("NVIDIA H100 PCIe", "bf16", 756),
        ("NVIDIA A100-SXM4-80GB", "no", 19.5),
        ("NVIDIA A10", "fp16", 125),
        ("NVIDIA L4", "bf16", 121),
        ("NVIDIA L40S", "bf16", 362),
        ("NVIDIA RTX A6000", "bf16", 154.8),
        ("NVIDIA GeForce RTX 4090", "bf16", 165.2),
        ("Tesla V100-SXM2-32GB", "fp16", 125),
        ("Tesla V100-SXM2-32GB", "bf16", None),
        ("Tesla T4", "fp16", 65),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", "bf16", None),
        ("NVIDIA GeForce RTX 4090 D", "bf16", None),
        ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", "bf16", None),
        ("Some Other GPU", "fp16", None),
    ],
)
def test_the_peak_of_a_device_by_its_name(name: str, precision: str, tera: float | None) -> None:
    peak = peak_flops(name, precision, tf32=False)
    assert peak == (None if tera is None else pytest.approx(tera * 1e12))


def test_every_row_of_the_table_is_reached() -> None:
    for part, single, tensor, bfloat, half in PEAKS:
        found = [peak_flops(f"NVIDIA {part}", p, t) for p, t in (("no", False), ("no", True), ("bf16", True))]
        assert found == [single * 1e12, tensor * 1e12, bfloat * 1e12 or None]
        assert single <= tensor <= half and bfloat in (0, half)


# ---- trackers -----------------------------------------------------------------------------------------------------


def test_a_folder_of_runs_is_no_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """wandb writes its runs into ./wandb, which Python takes for a package without code."""
    (tmp_path / "swanlab").mkdir()
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ImportError, match="needs the package swanlab"):
        require_tracker("swanlab")


def tracked(name: str, folder: Path) -> Recipe:
    plan = recipe(folder / "run", CLASSIFIER, f"loop.tracker={name}", *FEW)
    train(changed(plan, steps=3))
    train(changed(plan, steps=6), resume=True)
    return plan


def test_tensorboard_continues_a_resumed_run(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard", reason="the tracker under test")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    plan = tracked("tensorboard", tmp_path)
    losses = EventAccumulator(str(plan.folder / "tiny")).Reload().Scalars("loss")
    assert [event.step for event in losses] == list(range(1, 7))
    assert [event.value for event in losses] == pytest.approx([row["loss"] for row in lines(plan.folder)])


def test_trackio_continues_a_resumed_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("trackio", reason="the tracker under test")
    monkeypatch.setattr("trackio.utils.TRACKIO_DIR", tmp_path / "trackio", raising=True)
    monkeypatch.setattr("trackio.sqlite_storage.TRACKIO_DIR", tmp_path / "trackio", raising=True)
    plan = tracked("trackio", tmp_path)
    with sqlite3.connect(tmp_path / "trackio" / "tiny.db") as base:
        rows = base.execute("select run_name, step, metrics from metrics order by step").fetchall()
    assert [row[1] for row in rows] == list(range(1, 7)) and len({row[0] for row in rows}) == 1
    assert [json.loads(row[2])["loss"] for row in rows] == pytest.approx([x["loss"] for x in lines(plan.folder)])


def test_wandb_keeps_a_run_offline(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("wandb.sdk", reason="the tracker under test")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_DIR", str(tmp_path))
    tracked("wandb", tmp_path)
    files = sorted((tmp_path / "wandb").glob("offline-run-*/run-*.wandb"))
    assert len(files) == 2 and len({file.name for file in files}) == 1  # both parts are one run to the server
    assert capsys.readouterr().err.count("images_per_second") >= 2  # its own summary at the end of each
