"""Token files of latents: as drawn or as moments, the same after any stop, and drawn again by each image's numbers."""

from __future__ import annotations

import json
import signal
import time
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from typer.testing import CliRunner

from tests.test_models import tiny
from varkit.cli import app
from varkit.data.codes import CodeSet
from varkit.data.images import open_images
from varkit.data.shards import shard_file
from varkit.data.transforms import ImageTransform
from varkit.interfaces import Tokenizer
from varkit.pipelines.extract_codes import Views, extract_codes
from varkit.registry import model_entry
from varkit.rng import Rng
from varkit.tokenizers.kl_vae import KLVAE

NUM = 11


class Pointed(KLVAE):
    """Latents that have no moments, as those of several grids made of one."""

    moments = Tokenizer.moments


@pytest.fixture(name="source")
def _source(tmp_path: Path) -> str:
    pixels = np.random.default_rng(0).integers(0, 255, (NUM, 16, 16, 3), dtype=np.uint8)
    np.savez(tmp_path / "data.npz", arr_0=pixels)
    return str(tmp_path / "data.npz")


def make(name: str, source: str, out: Path, **choices: Any) -> CodeSet:
    extract_codes(tiny(name), source, out, **{"shard_size": 4, "batch_size": 3, **choices})
    return CodeSet(out, random_view=False)


@pytest.mark.parametrize("name", ["kl_vae_f8", "titok_bl64_vae_c16"])
def test_moments_give_what_the_tokenizer_draws(name: str, tmp_path: Path) -> None:
    tokenizer = tiny(name)
    pixels = np.random.default_rng(0).integers(0, 255, (NUM, *tokenizer.image_size, 3), dtype=np.uint8)
    np.savez(tmp_path / "data.npz", arr_0=pixels)
    source = str(tmp_path / "data.npz")
    make(name, source, tmp_path / "codes", moments=True, views=Views(flip=True))
    codes = CodeSet(tmp_path / "codes", random_view=False, seed=3)
    data = open_images(source, transform=ImageTransform(tokenizer.image_size, mode="center", enlarge=1.0))
    images = data.__getitems__(range(NUM))["images"]
    keys = torch.arange(100, 100 + NUM)
    with torch.no_grad():
        mean, std = tokenizer.moments(images)
        expected = tokenizer.encode(images, Rng.for_keys(3, keys))
    got = codes.__getitems__([(i, 100 + i) for i in range(NUM)])["tokens"]
    assert got.dtype == torch.float32 and got.shape == expected.shape
    torch.testing.assert_close(got, expected, atol=2e-3, rtol=2e-3)  # float16
    assert not torch.equal(got, codes.__getitems__([(i, 900 + i) for i in range(NUM)])["tokens"])
    assert torch.equal(codes[4, 104]["tokens"], got[4])  # whatever the batch
    torch.testing.assert_close(codes.tokens(2, 0), torch.cat([mean[2], std[2]], -1).half(), atol=1e-3, rtol=1e-3)
    mirrored = tokenizer.moments(images.flip(-1))[0]
    torch.testing.assert_close(codes.tokens(2, 1).chunk(2, -1)[0], mirrored[2].half(), atol=2e-3, rtol=2e-3)
    views = {i: torch.stack([codes.tokens(i, v).float() for v in (0, 1)]) for i in range(NUM)}
    seen = CodeSet(tmp_path / "codes", seed=3)
    near = [
        int((seen[i, k]["tokens"] - views[i].chunk(2, -1)[0]).abs().mean((1, 2)).argmin())
        for i in range(NUM)
        for k in range(20)
    ]
    assert 0.3 < sum(near) / len(near) < 0.7  # both views come


@pytest.mark.parametrize("moments", [False, True])
def test_statistics_are_those_of_what_is_stored(moments: bool, source: str, tmp_path: Path) -> None:
    codes = make("kl_vae_f8", source, tmp_path / "codes", moments=moments, views=Views(flip=True))
    stored = torch.cat([load_file(shard_file(codes.folder, k))["tokens"] for k in range(3)]).float().flatten(0, 2)
    dim = codes.layout.dim
    mean, variance = stored[:, :dim].mean(0), stored[:, :dim].var(0, correction=0)
    if moments:
        variance = variance + stored[:, dim:].square().mean(0)
    found = codes.statistics
    assert found is not None and found.count == len(stored)
    torch.testing.assert_close(torch.tensor(found.mean), mean)
    torch.testing.assert_close(torch.tensor(found.std), variance.sqrt())


def test_killed_at_any_moment_the_bytes_are_those_of_a_whole_run(tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 255, (600, 16, 16, 3), dtype=np.uint8)
    np.savez(tmp_path / "data.npz", arr_0=pixels)
    tokenizer = tiny("kl_vae_f8")

    def run(out: str) -> None:
        torch.set_num_threads(1)
        extract_codes(
            tokenizer, str(tmp_path / "data.npz"), tmp_path / out, shard_size=20, moments=True, views=Views(flip=True)
        )

    def shards() -> int:
        return len(list((tmp_path / "codes").glob("*.safetensors")))

    counts = [0]
    for k in range(4):
        child = get_context("fork").Process(target=run, args=("codes",))
        child.start()
        while child.is_alive() and shards() < counts[-1] + 1 + k:
            time.sleep(0.0003)
        child.kill()
        child.join()
        assert child.exitcode == -signal.SIGKILL
        counts.append(shards())
    assert counts == sorted(set(counts)) and counts[-1] < 30
    run("codes")
    run("whole")
    first, second = ({p.name: p.read_bytes() for p in (tmp_path / f).iterdir()} for f in ("codes", "whole"))
    assert first == second


def test_what_does_not_go_together_is_refused(source: str, tmp_path: Path) -> None:
    make("kl_vae_f8", source, tmp_path / "codes")
    with pytest.raises(ValueError, match=r"made otherwise \(moments: False there, True now\)"):
        make("kl_vae_f8", source, tmp_path / "codes", moments=True)
    with pytest.raises(ValueError, match="moments are those of latents; ToyVQ has"):
        make("toy_vq", source, tmp_path / "ids", moments=True)
    with pytest.raises(ValueError, match="Pointed has no posterior over its tokens"):
        extract_codes(Pointed(**model_entry("kl_vae_f8").tiny), source, tmp_path / "points", moments=True)
    assert not (tmp_path / "points").exists()
    huge = tiny("kl_vae_f8")
    huge.register_to_config(scaling_factor=1e7)
    with pytest.raises(ValueError, match="too large for float16"):
        extract_codes(huge, source, tmp_path / "huge")
    assert make("toy_vq", source, tmp_path / "plain").statistics is None


def test_files_of_before_there_were_moments_open(source: str, tmp_path: Path) -> None:
    codes = make("kl_vae_f8", source, tmp_path / "codes")
    layout = json.loads((codes.folder / "layout.json").read_text())
    del layout["moments"]
    (codes.folder / "layout.json").write_text(json.dumps(layout))
    assert not CodeSet(codes.folder).info.moments


def test_the_command_tells_the_statistics(source: str, tmp_path: Path) -> None:
    tiny("kl_vae_f8").save_pretrained(tmp_path / "vae")
    command = ["tokenize", str(tmp_path / "vae"), source, "--out", str(tmp_path / "codes"), "--moments", "--flip"]
    first = CliRunner().invoke(app, [*command, "--image-size", "8"])
    assert first.exit_code == 0 and "latents: mean" in first.output and "2 views each" in first.output, first.output
    codes = CodeSet(tmp_path / "codes")
    assert codes.info.moments and codes.layout.length == 16
    told = json.loads(CliRunner().invoke(app, [*command, "--image-size", "8", "--json"]).stdout)
    assert told["made"] == 0 and codes.statistics is not None and told["latents"]["std"] == codes.statistics.std
    tiny("toy_vq").save_pretrained(tmp_path / "toy")
    ids = CliRunner().invoke(
        app, ["tokenize", str(tmp_path / "toy"), source, "--out", str(tmp_path / "x"), "--moments"]
    )
    assert ids.exit_code == 2 and "moments are those of latents" in ids.output and not (tmp_path / "x").exists()
