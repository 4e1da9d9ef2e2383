"""Token files: the same whatever the batch, the shard, the process or the interruption; and what reads them."""

from __future__ import annotations

import json
import pickle
import signal
import time
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader
from torchvision.transforms import v2
from typer.testing import CliRunner

from tests.test_models import tiny
from varkit.cli import app
from varkit.data.codes import CodeInfo, CodeSet, storage_dtype
from varkit.data.images import collate, open_images
from varkit.data.shards import shard_file
from varkit.data.transforms import ImageTransform
from varkit.layout import TokenLayout
from varkit.pipelines.extract_codes import Views, extract_codes
from varkit.pipelines.fingerprint import tokenizer_fingerprint

NUM = 11


@pytest.fixture(scope="module", name="tokenizer")
def _tokenizer() -> Any:
    return tiny("toy_vq")  # 2x3 patches of 4 pixels, 7 codes


@pytest.fixture(name="images")
def _images(tmp_path: Path) -> Path:
    """A folder of two classes, files of several sizes."""
    generator = np.random.default_rng(0)
    for i in range(NUM):
        folder = tmp_path / "images" / ("a" if i % 2 else "b")
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(generator.integers(0, 255, (20 + i, 30, 3), dtype=np.uint8)).save(folder / f"{i:02d}.png")
    return tmp_path / "images"


def make(tokenizer: Any, images: Path, out: Path, **choices: Any) -> CodeSet:
    extract_codes(tokenizer, str(images), out, **{"shard_size": 4, "batch_size": 3, **choices})
    return CodeSet(out, random_view=False)


def all_tokens(codes: CodeSet) -> Tensor:
    """N V L."""
    return torch.stack([torch.stack([codes.tokens(i, v) for v in range(len(codes.info.views))]) for i in range(NUM)])


def files(folder: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in sorted(folder.iterdir())}


def test_the_tokens_are_those_of_the_tokenizer(tokenizer: Any, images: Path, tmp_path: Path) -> None:
    codes = make(tokenizer, images, tmp_path / "codes", views=Views(flip=True))
    data = open_images(images, transform=ImageTransform(tokenizer.image_size, mode="center", enlarge=1.0))
    pixels = data.__getitems__(range(NUM))["images"]
    expected = torch.stack([tokenizer.encode(pixels), tokenizer.encode(pixels.flip(-1))], 1)
    assert torch.equal(all_tokens(codes).long(), expected) and len(expected.unique(dim=0)) == NUM
    assert torch.equal(codes.labels, data.labels) and codes.classes == ["a", "b"] and len(codes) == NUM
    assert torch.equal(codes.__getitems__(range(NUM))["tokens"], expected[:, 0])
    assert codes.layout == tokenizer.layout and codes.info.fingerprint == tokenizer_fingerprint(tokenizer)


def test_ten_crops_are_torchvisions(tokenizer: Any, images: Path, tmp_path: Path) -> None:
    views = Views(crops=10, enlarge=(1.5, 1.25))
    codes = make(tokenizer, images, tmp_path / "codes", views=views)
    assert len(codes.info.views) == 20 and codes.info.views[:2] == ["1.5x top left", "1.5x top right"]
    for k, size in enumerate([(12, 18), (10, 15)]):
        data = open_images(images, transform=ImageTransform(size, mode="center", enlarge=1.0))
        ten = torch.stack(v2.TenCrop(tokenizer.image_size)(data.__getitems__(range(NUM))["images"]), 1)
        expected = tokenizer.encode(ten.flatten(0, 1)).view(NUM, 10, -1)
        assert torch.equal(all_tokens(codes)[:, 10 * k : 10 * k + 10].long(), expected)


@pytest.mark.parametrize(
    "choices", [{"batch_size": 1}, {"shard_size": 3}, {"shard_size": 100}, {"workers": 1}], ids=str
)
def test_batches_shards_and_workers_change_nothing(
    tokenizer: Any, images: Path, tmp_path: Path, choices: dict[str, Any]
) -> None:
    first = make(tokenizer, images, tmp_path / "first", views=Views(flip=True))
    second = make(tokenizer, images, tmp_path / "second", views=Views(flip=True), **choices)
    assert torch.equal(all_tokens(first), all_tokens(second)) and torch.equal(first.index, second.index)


def test_processes_share_the_shards(tokenizer: Any, images: Path, tmp_path: Path) -> None:
    make(tokenizer, images, tmp_path / "one")
    for process in (1, 0):
        done = extract_codes(
            tokenizer,
            str(images),
            tmp_path / "two",
            shard_size=4,
            batch_size=3,
            process_index=process,
            num_processes=2,
        )
        assert done.made == (4 if process else 7)
        if process:
            with pytest.raises(ValueError, match=r"2 of 3 shards are missing .* 00000.safetensors"):
                CodeSet(tmp_path / "two")
    assert files(tmp_path / "one") == files(tmp_path / "two")


def test_a_stopped_run_goes_on_and_ends_alike(tokenizer: Any, images: Path, tmp_path: Path) -> None:
    whole = make(tokenizer, images, tmp_path / "whole", shard_size=2)
    encode, calls = tokenizer.encode, 0

    def stop(*arguments: Any) -> Tensor:
        nonlocal calls
        calls += 1
        if calls == 4:
            raise KeyboardInterrupt
        return encode(*arguments)

    tokenizer.encode = stop
    with pytest.raises(KeyboardInterrupt):
        make(tokenizer, images, tmp_path / "stopped", shard_size=2)
    del tokenizer.encode
    shard_file(tmp_path / "stopped", 1).write_bytes(b"half a shard")  # as a full disk may leave it
    said: list[str] = []
    done = extract_codes(tokenizer, str(images), tmp_path / "stopped", shard_size=2, batch_size=3, announce=said.append)
    assert (done.there, done.made, said) == (4, 7, ["4 images are there already"])
    assert files(tmp_path / "stopped") == files(whole.folder)


def test_killed_at_any_moment_nothing_is_lost_or_half_written(tokenizer: Any, tmp_path: Path) -> None:
    """SIGKILL, twelve times at growing distances; then the folder is that of a run nobody disturbed."""
    pixels = np.random.default_rng(0).integers(0, 255, (3000, 8, 12, 3), dtype=np.uint8)
    np.savez(tmp_path / "data.npz", arr_0=pixels)

    def run(out: str) -> None:
        torch.set_num_threads(1)  # as torch's own workers do after a fork
        extract_codes(tokenizer, str(tmp_path / "data.npz"), tmp_path / out, shard_size=20)

    def shards() -> int:
        return len(list((tmp_path / "codes").glob("*.safetensors")))

    counts = [0]
    for k in range(12):
        child = get_context("fork").Process(target=run, args=("codes",))
        child.start()
        while child.is_alive() and shards() < counts[-1] + 1 + k:
            time.sleep(0.0003)
        child.kill()
        child.join()
        assert child.exitcode == -signal.SIGKILL
        counts.append(shards())
    assert counts == sorted(set(counts)) and counts[-1] < 150
    run("codes")
    run("whole")
    assert files(tmp_path / "codes") == files(tmp_path / "whole")  # no half-written file is left behind


def test_damaged_images_are_left_out_and_counted(tokenizer: Any, images: Path, tmp_path: Path) -> None:
    (images / "a" / "03.png").write_bytes(b"no image")
    done = extract_codes(tokenizer, str(images), tmp_path / "codes", shard_size=4)
    codes = CodeSet(tmp_path / "codes")
    assert (done.made, done.skipped) == (NUM - 1, 1) and len(codes) == NUM - 1
    gone = [i for i in range(NUM) if i not in codes.index.tolist()]
    assert len(gone) == 1 and codes.labels.tolist() == open_images(images).labels[codes.index].tolist()


def test_the_key_chooses_the_view(tokenizer: Any, images: Path, tmp_path: Path) -> None:
    make(tokenizer, images, tmp_path / "codes", views=Views(crops=10, enlarge=(1.5,)))
    codes = CodeSet(tmp_path / "codes", seed=1)
    entries = [(i % NUM, 1000 + i) for i in range(400)]
    batch = codes.__getitems__(entries)
    views = [
        next(v for v in range(10) if torch.equal(codes.tokens(i, v).long(), t))
        for (i, _), t in zip(entries, batch["tokens"], strict=True)
    ]
    counts = torch.bincount(torch.tensor(views), minlength=10)
    assert counts.min() > 15  # views that look alike to the tokenizer count for the first of them
    assert torch.equal(codes[entries[7]]["tokens"], batch["tokens"][7]) and codes[entries[7]]["key"] == 1007
    assert torch.equal(batch["index"], torch.tensor([i for i, _ in entries]))
    assert not torch.equal(CodeSet(tmp_path / "codes", seed=2).__getitems__(entries)["tokens"], batch["tokens"])
    again = pickle.loads(pickle.dumps(codes))
    assert torch.equal(again.__getitems__(entries)["tokens"], batch["tokens"])
    loader = DataLoader(codes, 4, num_workers=1, collate_fn=collate)
    assert torch.equal(torch.cat([b["tokens"] for b in loader]), codes.__getitems__(range(NUM))["tokens"])


def test_texts_travel_with_the_tokens(tokenizer: Any, images: Path, tmp_path: Path) -> None:
    names = sorted(p.relative_to(images).as_posix() for p in images.rglob("*.png"))
    lines = [json.dumps({"file_name": n, "text": f"picture {n}, 絵"}) for n in names]
    (images / "metadata.jsonl").write_text("\n".join(lines))
    codes = make(tokenizer, images, tmp_path / "codes")
    texts = open_images(images).texts
    assert texts is not None and codes.texts == texts and codes[3]["text"] == texts[3]
    assert codes.__getitems__([5, 2])["texts"] == [texts[5], texts[2]]


def test_small_ids_are_stored_small() -> None:
    for size, dtype in (
        (65536, torch.uint16),
        (65537, torch.int32),
        ((4096, 70_000), torch.int32),
        (None, torch.float16),
    ):
        assert storage_dtype(TokenLayout(((2, 2),), size, 4)) == dtype


def test_what_does_not_go_together_is_refused(tokenizer: Any, images: Path, tmp_path: Path) -> None:
    codes = make(tokenizer, images, tmp_path / "codes")
    with pytest.raises(ValueError, match=r"made otherwise \(.*views.*\)"):
        make(tokenizer, images, tmp_path / "codes", views=Views(flip=True))
    other = tiny("toy_vq")
    with torch.no_grad():
        other.codes.weight[0, 0] += 1
    with pytest.raises(ValueError, match="fingerprint"):
        make(other, images, tmp_path / "codes")
    with pytest.raises(ValueError, match=r"is not empty and holds no layout\.json"):
        codes.info.begin(images)
    with pytest.raises(IndexError, match=r"out of range for 11 images"):
        codes[11]
    (tmp_path / "codes" / "layout.json").write_text("{")
    with pytest.raises(ValueError, match="damaged"):
        CodeInfo.read(tmp_path / "codes")
    with pytest.raises(FileNotFoundError, match="varkit tokenize"):
        CodeSet(images)
    for wrong, message in (
        ({"mode": "crop"}, "random"),
        ({"crops": 5}, "1 or 10"),
        ({"crops": 10}, "enlarge 1.1"),
        ({"crops": 10, "enlarge": (1.1,), "flip": True}, "no flip"),
        ({"enlarge": (1.1, 1.2)}, "ten crops"),
        ({"enlarge": (0.5,)}, "at least 1"),
    ):
        with pytest.raises(ValueError, match=message):
            Views(**wrong)


def test_the_command_says_what_it_did(tokenizer: Any, images: Path, tmp_path: Path) -> None:
    tokenizer.save_pretrained(tmp_path / "tok")
    command = ["tokenize", str(tmp_path / "tok"), str(images), "--out", str(tmp_path / "codes"), "--flip"]
    first = CliRunner().invoke(app, command)
    assert first.exit_code == 0 and f"{NUM} images in" in first.output and "2 views each" in first.output
    again = CliRunner().invoke(app, [*command, "--json"])
    told = json.loads(again.stdout)
    assert told["made"] == 0 and told["there"] == NUM and told["views"] == ["center 1x", "center 1x mirrored"]
    wrong = CliRunner().invoke(app, [*command, "--crops", "10"])
    assert wrong.exit_code == 2 and "no flip" in wrong.output
    nothing = CliRunner().invoke(app, ["tokenize", "nowhere", str(images), "--out", str(tmp_path / "x")])
    assert nothing.exit_code == 2 and "no tokenizer at 'nowhere'" in nothing.output and not (tmp_path / "x").exists()
