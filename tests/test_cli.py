"""The commands, in-process, on tiny models and the data slice."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from click.testing import Result
from PIL import Image
from torch import Tensor, nn
from typer.testing import CliRunner

import varkit
from tests.test_demo import save_tiny
from tests.test_models import liven
from varkit.cli import app
from varkit.pictures import read_settings
from varkit.registry import create_model, model_entry

ROOT = Path(__file__).parents[1]
SLICE = ROOT / "tests" / "data" / "fashion_slice.npz"


def run(*words: Any, code: int = 0) -> Result:
    result = CliRunner().invoke(app, [str(w) for w in words])
    assert result.exit_code == code, result.output + repr(result.exception)
    return result


def refused(*words: Any) -> str:
    """The one line that a bad command is answered with."""
    result = run(*words, code=2)
    assert result.stdout == "" and result.stderr.startswith("error: ") and "Traceback" not in result.stderr
    return result.stderr


@pytest.fixture(scope="module", name="model")
def _model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("model"))


# ---- help ---------------------------------------------------------------------------------------------------------

PROBE = """
import sys
sys.argv = ["varkit", "--help"]
from varkit.cli import main
try:
    main()
except SystemExit:
    pass
print("heavy:", sorted({m.split(".")[0] for m in sys.modules} & {"torch", "diffusers", "numpy", "PIL", "gradio"}))
"""


def test_help_imports_nothing_heavy() -> None:
    env = {k: v for k, v in os.environ.items() if not k.startswith("PYTHON")}
    done = subprocess.run([sys.executable, "-c", PROBE], cwd=ROOT, env=env, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "heavy: []" in done.stdout
    for command in ("sample", "reconstruct", "data", "train", "features", "convert", "list", "info", "demo"):
        assert f" {command} " in done.stdout


@pytest.mark.parametrize(
    "command", ["sample", "reconstruct", "data check", "train", "features", "convert", "list", "info", "demo"]
)
def test_every_option_of_every_command_has_a_help_text(command: str) -> None:
    import typer

    node: Any = typer.main.get_command(app)
    for word in command.split():
        node = node.commands[word]
    bare = [p.name for p in node.params if not getattr(p, "help", None) and p.name not in ("help", "port")]
    assert not bare and node.help


def test_version() -> None:
    assert run("--version").stdout == f"varkit {varkit.__version__}\n"


# ---- list and info ------------------------------------------------------------------------------------------------


def test_list_names_models_checkpoints_architectures_and_recipes() -> None:
    found = json.loads(run("list", "--json").stdout)
    assert "fashion-var" in found["shipped models"] and "var_d36.in1k_512" in found["released checkpoints"]
    assert "var_d16" in found["architectures"] and "fashion_vq" in found["recipes"]
    assert all(text for section in found.values() for text in section.values())
    some = json.loads(run("list", "*fashion*", "--json").stdout)
    assert {"var_fashion", "multiscale_vq_fashion"} <= set(some["architectures"]) and not some["released checkpoints"]
    assert all("fashion" in name for name in some["architectures"])
    text = run("list", "nothing-like-it").stdout
    assert "none matches 'nothing-like-it'" in text


def test_info_describes_every_kind_of_name(model: Path) -> None:
    architecture = json.loads(run("info", "var_d16", "--json").stdout)
    assert architecture["parameters"] == 310_283_520 and architecture["tokenizer"] == "multiscale_vq_f16"
    checkpoint = run("info", "var_d30.in1k_256").stdout
    assert "MIT" in checkpoint and "FoundationVision/var" in checkpoint and "2404.02905" in checkpoint
    assert json.loads(run("info", "folder_var", "--json").stdout)["kind"] == "recipe"
    folder = json.loads(run("info", model, "--json").stdout)
    assert folder["classes"] == "Boot, Coat, Bag" and json.loads(folder["transformer"])["class"] == "VAR"
    assert "did you mean 'var_fashion'" in refused("info", "var_fashon")


# ---- sample -------------------------------------------------------------------------------------------------------


def test_a_grid_carries_its_settings_and_a_seed_names_it(model: Path, tmp_path: Path) -> None:
    options = ["--class", "Boot,2", "--num", 6, "--seed", 3, "--guidance", 1.5, "--top-k", 5]
    for name, batch in (("a.png", 6), ("b.png", 4), ("c.png", 1)):
        run("sample", model, *options, "--batch-size", batch, "--out", tmp_path / name)
    pixels = [np.asarray(Image.open(tmp_path / name)) for name in ("a.png", "b.png", "c.png")]
    assert np.array_equal(pixels[0], pixels[1]) and np.array_equal(pixels[0], pixels[2])
    assert pixels[0].shape == (3 * 10 + 2, 2 * 10 + 2, 3)  # a column a class, images of 8 pixels, 2 between
    settings = read_settings(tmp_path / "a.png")
    assert settings["seed"] == 3 and settings["guidance_scale"] == 1.5 and settings["top_k"] == 5
    assert settings["classes"] == [0, 2] and settings["model"] == str(model) and settings["version"]
    run("sample", model, *options, "--seed", 4, "--out", tmp_path / "d.png")
    assert not np.array_equal(pixels[0], np.asarray(Image.open(tmp_path / "d.png")))
    run("sample", model, *options, "--zoom", 2, "--out", tmp_path / "e.png")
    assert np.asarray(Image.open(tmp_path / "e.png")).shape == (3 * 18 + 2, 2 * 18 + 2, 3)


def test_a_folder_an_archive_and_a_grid_hold_the_same_images(model: Path, tmp_path: Path) -> None:
    told = json.loads(run("sample", model, "--num", 4, "--out", tmp_path / "images", "--json").stdout)
    assert told["classes"] == [0, 1, 2, 0] and len(told["files"]) == 4
    assert sorted(p.name for p in (tmp_path / "images").iterdir()) == [f"{i:06d}.png" for i in range(4)]
    assert read_settings(tmp_path / "images" / "000002.png")["class"] == 2
    run("sample", model, "--num", 4, "--out", tmp_path / "all.npz")
    with np.load(tmp_path / "all.npz", allow_pickle=False) as archive:
        images, labels = archive["arr_0"], archive["arr_1"]
    assert images.shape == (4, 8, 8, 3) and images.dtype == np.uint8 and labels.tolist() == [0, 1, 2, 0]
    single = np.stack([np.asarray(Image.open(p)) for p in sorted((tmp_path / "images").iterdir())])
    assert np.array_equal(single, images)


def test_bad_requests_are_refused_in_one_line(model: Path, tmp_path: Path) -> None:
    out = ["--out", tmp_path / "x.png"]
    assert "did you mean 'bag'" in refused("sample", model, "--class", "Bga", *out)
    assert "class 7 does not exist" in refused("sample", model, "--class", "7", *out)
    assert "must end in .png" in refused("sample", model, "--out", tmp_path / "x.jpg")
    assert "top_p must be in (0, 1]" in refused("sample", model, "--top-p", "1.5", *out)
    assert "temperature must be > 0" in refused("sample", model, "--temperature", "0", *out)
    assert "--dtype must be" in refused("sample", model, "--dtype", "int8", *out)
    assert "neither a shipped model" in refused("sample", "no-such-model", *out)
    assert "no guidance schedule" in refused("sample", model, "--schedule", "ramp", *out)
    assert not list(tmp_path.iterdir())
    assert run("sample", model, "--num", "0", code=2).stderr  # typer's own check


# ---- reconstruct, data ----------------------------------------------------------------------------------------------


def test_reconstruct_reports_and_draws(model: Path, tmp_path: Path) -> None:
    words = ["reconstruct", model, SLICE, "--mode", "squash", "--num", 20, "--out", tmp_path]
    result = json.loads(run(*words, "--json").stdout)
    assert result["images"] == 20 and result["codebook"] == 24 and len(result["scales"]) == 3
    assert result == json.loads((tmp_path / "metrics.json").read_text())
    first, second = (Image.open(tmp_path / f"{n}.png") for n in ("originals", "reconstructions"))
    assert first.size == second.size == (8 * 10 + 2, 3 * 10 + 2)
    assert f"PSNR {result['psnr']:.2f} dB" in run(*words).stdout
    assert "no tokenizer at 'nothing'" in refused("reconstruct", "nothing", SLICE, "--out", tmp_path)


class Distance(nn.Module):
    """In the place of LPIPS: the mean difference."""

    trunk, smallest, shift = "alex", 8, torch.zeros(1)

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        return (a - b).abs().flatten(1).mean(1)


def test_reconstruct_from_as_many_tokens_as_are_asked_for_or_needed(
    tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    entry = model_entry("flextok_fashion")
    tokenizer = liven(create_model("flextok_fashion", **entry.tiny), 0.05)
    tokenizer.save_pretrained(tmp_path / "flextok")
    words = ["reconstruct", tmp_path / "flextok", SLICE, "--mode", "squash", "--num", 20, "--out", tmp_path]
    fixed = json.loads(run(*words, "--tokens", 2, "--json").stdout)
    assert fixed["lengths"] == [2] * 20 and fixed["tokens"] == 40
    reachable = json.loads(run(*words, "--psnr", fixed["psnr"], "--json").stdout)
    assert set(reachable["lengths"]) <= {1, 2, 4, 8} and len(reachable["lengths"]) == 20
    assert len(set(reachable["lengths"])) > 1
    assert reachable["tokens"] == sum(reachable["lengths"])
    said = run(*words, "--psnr", 99).stdout
    assert "tokens      : 8.0 an image; 8 for 20" in said
    whole = json.loads(run(*words, "--json").stdout)
    assert "lengths" not in whole and whole["tokens"] == 160 and whole["psnr"] != fixed["psnr"]
    assert "in 1 .. 8" in refused(*words, "--tokens", 9)
    assert "give one of" in refused(*words, "--tokens", 2, "--psnr", 20)
    monkeypatch.setattr("varkit.metrics.reconstruction.find_lpips", lambda *args, **options: Distance())
    near = json.loads(run(*words, "--lpips", 9, "--json").stdout)
    assert near["lengths"] == [1] * 20 and near["lpips_alex"] < 9
    assert json.loads(run(*words, "--lpips", 0, "--json").stdout)["lengths"] == [8] * 20
    monkeypatch.setattr(Distance, "smallest", 32)
    assert "LPIPS needs 32 pixels" in refused(*words, "--lpips", 0.1)
    assert "always decodes all" in refused("reconstruct", model, *words[2:], "--tokens", 2)


def test_data_check_counts_and_names_what_is_broken(tmp_path: Path) -> None:
    assert json.loads(run("data", "check", SLICE, "--json").stdout)["readable"] == 300
    for name in ("cat", "dog"):
        (tmp_path / "set" / name).mkdir(parents=True)
        for i in range(2):
            Image.new("RGB", (9, 9), (i, i, i)).save(tmp_path / "set" / name / f"{i}.png")
    assert run("data", "check", tmp_path / "set").exit_code == 0
    (tmp_path / "set" / "cat" / "bad.png").write_bytes(b"not an image")
    text = run("data", "check", tmp_path / "set", code=1).stdout
    assert "4 readable of 5" in text and "bad.png" in text
    (tmp_path / "empty").mkdir()
    assert "empty" in refused("data", "check", tmp_path / "empty")
    assert "gone" in refused("data", "check", tmp_path / "gone")


def test_a_named_data_set_is_written_for_use_elsewhere(tmp_path: Path) -> None:
    idx = tmp_path / "idx"
    idx.mkdir()
    images = np.arange(2 * 28 * 28, dtype=np.uint8).reshape(2, 28, 28)
    for split in ("train", "t10k"):
        header = b"\x00\x00\x08\x03" + b"".join(n.to_bytes(4, "big") for n in images.shape)
        (idx / f"{split}-images-idx3-ubyte").write_bytes(header + images.tobytes())
        (idx / f"{split}-labels-idx1-ubyte").write_bytes(b"\x00\x00\x08\x01" + (2).to_bytes(4, "big") + b"\x03\x09")
    run("data", "fashion-mnist", "--out", tmp_path / "out", "--root", idx)
    with np.load(tmp_path / "out" / "train.npz", allow_pickle=False) as archive:
        assert archive["arr_1"].tolist() == [3, 9] and archive["arr_0"].shape == (2, 28, 28, 3)
        assert np.array_equal(archive["arr_0"][..., 1], images)


# ---- train --------------------------------------------------------------------------------------------------------

TINY = [
    f"data.train={SLICE}",
    "data.validation=null",
    "data.mode=squash",
    "data.workers=0",
    "loop.steps=2",
    "loop.batch_size=4",
    "loop.precision=no",
    "objective.model_overrides={base_channels: 32, channel_multipliers: [1, 1], num_res_blocks: 1, latent_dim: 4, "
    "codebook_size: 24, scales: [1, 2, 4]}",
]


def test_train_prints_its_whole_recipe() -> None:
    shown = yaml.safe_load(run("train", "fashion_var", "optim.lr=2e-4", "--print-config").stdout)
    assert shown["optim"]["lr"] == 2e-4 and shown["name"] == "fashion_var" and shown["loop"]["keep"] == 2


def test_the_three_commands_for_a_folder_of_ones_own(tmp_path: Path) -> None:
    """As the README has them, small: check, tokenizer, generator; then sample what was trained."""
    folder = tmp_path / "photos"
    with np.load(SLICE, allow_pickle=False) as archive:
        for i in range(0, 300, 15):
            (folder / f"kind{archive['arr_1'][i]}").mkdir(parents=True, exist_ok=True)
            picture = Image.fromarray(archive["arr_0"][i, ..., 0])
            picture.save(folder / f"kind{archive['arr_1'][i]}" / f"{i}.png")
    run("data", "check", folder)
    own = [f"data.train={folder}", *TINY[1:]]
    adversarial = [
        "objective.discriminator_width=8",
        "objective.discriminator_layers=1",
        "objective.adversarial_start=0.5",
        "objective.lpips=none",
    ]
    run("train", "folder_vq", *own, *adversarial, f"out={tmp_path}/vq")
    small = "objective.model_overrides={depth: 1, hidden_size: 32, num_heads: 2}"
    words = ["train", "folder_var", *own[:-1], small, f"objective.tokenizer={tmp_path}/vq/model", f"out={tmp_path}/var"]
    assert f"wrote {tmp_path}/var/model" in run(*words).stdout
    run("sample", tmp_path / "var" / "model", "--class", "kind3", "--num", 2, "--out", tmp_path / "x.png")
    assert read_settings(tmp_path / "x.png")["classes"] == [3]
    assert "already holds a run" in refused(*words)
    assert "wrote" in run(*words, "--resume").stdout  # nothing left to do: exports again


def test_bad_recipes_are_refused_before_any_work(tmp_path: Path) -> None:
    out = f"out={tmp_path}/run"
    assert "did you mean 'fashion_vq'" in refused("train", "fashion_qv", out)
    assert "unknown key optim.lrr (did you mean 'lr'?)" in refused("train", "fashion_vq", "optim.lrr=1", out)
    assert "loop.batch_size" in refused("train", "fashion_vq", "loop.batch_size=ten", out)
    assert "is not key=value" in refused("train", "fashion_vq", "fast", out)
    assert "nothing to resume" in refused("train", "fashion_vq", f"data.train={SLICE}", out, "--resume")
    assert "no tokenizer at" in refused("train", "fashion_var", f"data.train={SLICE}", "objective.tokenizer=gone", out)
    assert "gone" in refused("train", "fashion_vq", f"data.train={tmp_path}/gone", out)
    assert not (tmp_path / "run").exists()


# ---- convert, demo --------------------------------------------------------------------------------------------------


def test_convert_prints_the_licence(tmp_path: Path) -> None:
    from tests.test_checkpoints import small_tokenizer
    from varkit.checkpoints.files import write_official

    write_official(small_tokenizer(), tmp_path / "vae.pth")
    assert "licence of the weights: MIT" in run("convert", tmp_path / "vae.pth", "--to", tmp_path / "vae").stdout
    assert "which the official code loads" in run("convert", tmp_path / "vae", "--to", tmp_path / "b.pth").stdout
    assert "is not empty" in refused("convert", tmp_path / "vae.pth", "--to", tmp_path / "vae")


def test_demo_of_a_model_that_is_not_there() -> None:
    assert "neither a shipped model" in refused("demo", "--model", "no-such-model")
