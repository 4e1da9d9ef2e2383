"""Captions, webdataset tars and Hugging Face data sets: the same pictures give the same tensors from any of them."""

from __future__ import annotations

import io
import json
import os
import sys
import tarfile
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader
from typer.testing import CliRunner

from tests.test_training import CLASSIFIER, recipe
from varkit.cli import app
from varkit.config import ConfigError
from varkit.data import ImageTransform, check_images, collate, open_images, tar_index, tars
from varkit.data.hugging_face import parse_source
from varkit.data.tar_index import index_tar, scan_tar
from varkit.data.tars import TarPixels, expand_braces
from varkit.data.transforms import FilePixels
from varkit.metrics.sets import stored_set
from varkit.training.batches import StepBatches
from varkit.training.loop import train

SIDE, COUNT, NAMES = 32, 12, ("ant", "bee", "cat")


@pytest.fixture(autouse=True)
def _own_caches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    if find_spec("datasets") is not None:
        monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "hf")
        monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)


def png(i: int, side: int = SIDE) -> bytes:
    pixels = np.random.default_rng(i).integers(0, 256, (side, side, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, format="png")
    return buffer.getvalue()


def label(i: int) -> int:
    return i * len(NAMES) // COUNT


def caption(i: int) -> str:
    return f"{NAMES[label(i)]} number {i}"


def write_tar(path: Path, members: list[tuple[str, bytes]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


def sample(i: int, how: str = "cls") -> list[tuple[str, bytes]]:
    """The members of picture i, with label and caption as files of their own or as JSON."""
    if how == "json":
        beside = json.dumps({"label": NAMES[label(i)], "caption": caption(i), "width": SIDE})
        return [(f"{i:03}.json", beside.encode()), (f"{i:03}.png", png(i))]
    files = [(f"{i:03}.cls", str(label(i)).encode()), (f"{i:03}.txt", caption(i).encode() + b"\n")]
    return [(f"{i:03}.png", png(i)), *files]


def write_shards(folder: Path, how: str = "cls", name: str = "train") -> str:
    """Three tars of four pictures; the pattern that means them."""
    for shard in range(3):
        members = [member for i in range(4 * shard, 4 * shard + 4) for member in sample(i, how)]
        write_tar(folder / f"{name}-{shard:02}.tar", members)
    return str(folder / f"{name}-{{00..02}}.tar")


def class_folders(folder: Path) -> str:
    for i in range(COUNT):
        (folder / NAMES[label(i)]).mkdir(parents=True, exist_ok=True)
        (folder / NAMES[label(i)] / f"{i:03}.png").write_bytes(png(i))
    return str(folder)


def metadata(folder: Path) -> str:
    folder.mkdir(parents=True)
    lines = []
    for i in range(COUNT):
        (folder / f"{i}.png").write_bytes(png(i))
        text = {"text": caption(i)} if i % 2 else {"caption": caption(i)}
        lines.append(json.dumps({"file_name": f"{i}.png", "label": NAMES[label(i)], **text}))
    (folder / "metadata.jsonl").write_text("\n".join(lines))
    return str(folder)


def array(folder: Path) -> str:
    folder.mkdir(parents=True)
    pixels = np.stack([np.asarray(Image.open(io.BytesIO(png(i)))) for i in range(COUNT)])
    np.savez(folder / "set.npz", pixels, np.array([label(i) for i in range(COUNT)]))
    return str(folder / "set.npz")


def table(values: dict[str, list[Any]], features: dict[str, Any]) -> Any:
    """A `datasets.Dataset` with a fingerprint: `from_dict` pickles the table for one, which some versions cannot."""
    import datasets
    import pyarrow

    arrow = pyarrow.Table.from_pydict(values, schema=datasets.Features(features).arrow_schema)
    return datasets.Dataset(datasets.table.InMemoryTable(arrow), fingerprint="of-a-test")


def rows(**columns: Any) -> Any:
    """A `datasets.Dataset` of all pictures."""
    datasets = pytest.importorskip("datasets", reason="the extra hf is not installed")
    features = {
        "image": datasets.Image(),
        "label": datasets.ClassLabel(names=list(NAMES)),
        "text": datasets.Value("string"),
    }
    values = {
        "image": [{"bytes": png(i), "path": None} for i in range(COUNT)],
        "label": [label(i) for i in range(COUNT)],
        "text": [caption(i) for i in range(COUNT)],
    }
    for name in columns:
        features[name] = columns[name][0]
        values[name] = columns[name][1]
    return table(values, features)


def on_disk(folder: Path) -> str:
    rows().save_to_disk(folder)
    return f"hf:{folder}"


def split_on_disk(folder: Path) -> str:
    import_datasets = pytest.importorskip("datasets", reason="the extra hf is not installed")
    import_datasets.DatasetDict(train=rows(), test=rows().select([5, 1])).save_to_disk(folder)
    return f"hf:{folder}"


def parquet(folder: Path) -> str:
    folder.mkdir()
    renamed = rows().rename_columns({"image": "photo", "label": "species", "text": "said"})
    renamed.to_parquet(folder / "set.parquet")
    return f"hf:{folder / 'set.parquet'}?image=photo&label=species&text=said"


def image_folder(folder: Path) -> str:
    pytest.importorskip("datasets", reason="the extra hf is not installed")
    for i in range(COUNT):
        (folder / "train").mkdir(parents=True, exist_ok=True)
        (folder / "train" / f"{i:03}.png").write_bytes(png(i))
    lines = [{"file_name": f"{i:03}.png", "label": NAMES[label(i)], "caption": caption(i)} for i in range(COUNT)]
    (folder / "train" / "metadata.jsonl").write_text("\n".join(map(json.dumps, lines)))
    return f"hf:{folder}"


KINDS: dict[str, Callable[[Path], str]] = {
    "class folders": class_folders,
    "metadata.jsonl": metadata,
    "npz": array,
    "tars, pattern": write_shards,
    "tars, folder": lambda folder: str(Path(write_shards(folder)).parent),
    "tars, json": lambda folder: write_shards(folder, "json").replace("{00..02}", "*"),
    "hf, save_to_disk": on_disk,
    "hf, splits": split_on_disk,
    "hf, parquet": parquet,
    "hf, imagefolder": image_folder,
}
WITH_TEXTS = [kind for kind in KINDS if kind not in ("class folders", "npz")]


# ---- every kind of source ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_the_same_pictures_are_the_same_tensors(kind: str, tmp_path: Path) -> None:
    transform = ImageTransform(16, "crop", enlarge=SIDE / 16, flip=True, seed=3)  # a crop without resizing
    expected = open_images(class_folders(tmp_path / "expected"), transform=transform)
    found = open_images(KINDS[kind](tmp_path / "set"), transform=transform)
    entries = [(i, 100 + i) for i in (7, 0, 11, 3, 3)]
    ours, theirs = found.__getitems__(entries), expected.__getitems__(entries)
    assert torch.equal(ours["images"], theirs["images"]) and torch.equal(ours["labels"], theirs["labels"])
    assert len(found) == COUNT and found.classes in (list(NAMES), ["0", "1", "2"])
    if kind in WITH_TEXTS:
        assert ours["texts"] == [caption(i) for i, _ in entries] and found[4]["text"] == caption(4)
    else:
        assert "texts" not in ours and found.texts is None


@pytest.mark.parametrize("kind", KINDS)
def test_crops_and_flips_do_not_depend_on_the_number_of_workers(kind: str, tmp_path: Path) -> None:
    source = KINDS[kind](tmp_path / "set")
    seen = []
    for workers in (0, 1, 2):
        data = open_images(source, transform=ImageTransform(12, "crop", flip=True, seed=3))
        batches = StepBatches(len(data), 4, start=0, stop=6, seed=0)  # two epochs
        loader = DataLoader(data, batch_sampler=batches, collate_fn=collate, num_workers=workers)
        seen.append({batch["keys"][i].item(): batch["images"][i] for batch in loader for i in range(4)})
    assert len(seen[0]) == 24 and all(one.keys() == seen[0].keys() for one in seen)
    assert all(torch.equal(one[key], seen[0][key]) for one in seen for key in one)
    order = [index for step in StepBatches(COUNT, 4, start=0, stop=6, seed=0) for index, _ in step]
    again = order.index(order[0], 1)
    assert not torch.equal(seen[0][0], seen[0][again])  # another epoch, another crop


@pytest.mark.parametrize("kind", KINDS)
def test_commands_and_scores_take_it(kind: str, tmp_path: Path) -> None:
    source = KINDS[kind](tmp_path / "set")
    result = CliRunner().invoke(app, ["data", "check", source, "--json"])
    report = json.loads(result.stdout)
    assert result.exit_code == 0 and report["readable"] == COUNT and list(report["classes"].values()) == [4, 4, 4]
    assert report["texts"] == (COUNT if kind in WITH_TEXTS else 0) and report["sizes"] == {f"{SIDE}x{SIDE}": COUNT}
    scored, expected = stored_set(source), stored_set(class_folders(tmp_path / "expected"))
    assert torch.equal(scored.read(range(COUNT)), expected.read(range(COUNT))) and scored.size == (SIDE, SIDE)
    assert kind == "npz" or scored.hash() == expected.hash()  # the files are the same, wherever they lie
    data = [f"data.{name}={source}" for name in ("train", "validation")]
    words = (
        *data,
        "data.mode=crop",
        f"data.enlarge={SIDE / CLASSIFIER['image_size']}",
        "loop.steps=2",
        "loop.batch_size=4",
        "loop.save_every=0",
    )
    done = [train(recipe(tmp_path / "run", CLASSIFIER, *words))]
    data = [f"data.{name}={tmp_path / 'expected'}" for name in ("train", "validation")]
    done.append(train(recipe(tmp_path / "run2", CLASSIFIER, *data, *words[2:])))
    ours, theirs = ([json.loads(line) for line in (one.folder / "metrics.jsonl").open()] for one in done)
    assert [row.get("loss") for row in ours] == [row.get("loss") for row in theirs]


@pytest.mark.parametrize("kind", ["tars, pattern", "hf, splits"])
def test_reconstruct_and_eval_take_it(kind: str, tmp_path: Path) -> None:
    source = KINDS[kind](tmp_path / "set")
    run = CliRunner().invoke
    result = run(app, ["reconstruct", "fashion-var", source, "--mode", "squash", "--num", "3", "--out", str(tmp_path)])
    assert result.exit_code == 0, result.output
    words = [
        "eval",
        source,
        class_folders(tmp_path / "b"),
        "-p",
        "fashion",
        "--num",
        str(COUNT),
        "--metrics",
        "frechet",
    ]
    words += ["--device", "cpu", "--json"]
    result = run(app, words)
    assert result.exit_code == 0, result.output + repr(result.exception)
    (score,) = json.loads(result.stdout)["results"][0]["scores"]
    assert score["value"] == pytest.approx(0, abs=1e-3)


def test_classes_of_validation_must_stand_where_those_of_training_stand(tmp_path: Path) -> None:
    train_set, other = class_folders(tmp_path / "a"), class_folders(tmp_path / "b")
    os.rename(Path(other) / "ant", Path(other) / "dog")
    with pytest.raises(ConfigError, match=r"class 0 is 'bee' there and 'ant' in data.train"):
        train(recipe(tmp_path / "run", CLASSIFIER, f"data.train={train_set}", f"data.validation={other}"))


# ---- captions ----------------------------------------------------------------------------------------------------


def test_a_text_goes_before_a_caption_and_both_must_be_strings(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(png(0))
    file = tmp_path / "metadata.jsonl"
    file.write_text(json.dumps({"file_name": "a.png", "text": "one", "caption": "two"}))
    assert open_images(tmp_path).texts == ["one"]
    file.write_text(json.dumps({"file_name": "a.png", "caption": ["two"]}))
    with pytest.raises(ValueError, match=r"metadata.jsonl:1: caption is \['two'\]"):
        open_images(tmp_path)


def test_missing_captions_are_counted(tmp_path: Path) -> None:
    members = [("a.png", png(0)), ("a.txt", b"one"), ("b.png", png(1)), ("c.png", png(2)), ("c.txt", b" \n")]
    report = check_images(write_tar(tmp_path / "set.tar", members))
    assert report.texts == 1 and "2 images have no text, or an empty one" in report.warnings


# ---- tars --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("pattern", "names"),
    [
        ("a.tar", ["a.tar"]),
        ("a-{08..10}.tar", ["a-08.tar", "a-09.tar", "a-10.tar"]),
        ("{8..10}", ["8", "9", "10"]),
        ("{x,y}-{0..1}.tar", ["x-0.tar", "x-1.tar", "y-0.tar", "y-1.tar"]),
        ("{a..b}", ["a..b"]),
    ],
)
def test_braces_expand_as_in_a_shell(pattern: str, names: list[str]) -> None:
    assert expand_braces(pattern) == names


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        ("{5..3}.tar", "counts down"),
        ("{0..99999999999}.tar", "counts too far"),
        ("{0..9999}{0..9999}.tar", "more than 1,000,000"),
    ],
)
def test_endless_patterns_are_refused(pattern: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        open_images(pattern)


def test_missing_shards_are_named(tmp_path: Path) -> None:
    write_shards(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"2 of 5 tars do not exist: .*train-03.tar, .*train-04.tar"):
        open_images(tmp_path / "train-{00..04}.tar")
    with pytest.raises(FileNotFoundError, match="0 of 0 tars"):
        open_images(tmp_path / "val-*.tar")
    with pytest.raises(ValueError, match="no split 'val'; leave split out"):
        open_images(tmp_path / "train-*.tar", split="val")


def test_splits_by_name_share_the_class_ids_of_train(tmp_path: Path) -> None:
    write_shards(tmp_path, "json")
    write_tar(tmp_path / "val-00.tar", sample(11, "json"))
    held = open_images(tmp_path, split="test")
    assert len(open_images(tmp_path)) == COUNT and held.classes == list(NAMES) and held.labels.tolist() == [2]
    write_tar(tmp_path / "more.tar", sample(1))
    with pytest.raises(ValueError, match=r"not more.tar; give a pattern"):
        open_images(tmp_path)


def test_split_folders_of_tars(tmp_path: Path) -> None:
    write_shards(tmp_path / "train", "json")
    write_shards(tmp_path / "val", "json", name="val")  # its name says so twice
    assert len(open_images(tmp_path)) == COUNT and len(open_images(tmp_path, split="val")) == COUNT


def test_class_folders_beside_tars_are_what_is_meant(tmp_path: Path) -> None:
    write_tar(tmp_path / "ant.tar", sample(0))
    dataset = open_images(class_folders(tmp_path))
    assert dataset.kind == "class folders" and any("1 tars beside" in warning for warning in dataset.warnings)


def test_an_index_is_kept_used_and_renewed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_tar(tmp_path / "set.tar", sample(0))
    first = index_tar(path)
    (kept,) = tmp_path.glob(".set.tar.index.json")
    monkeypatch.setattr(tar_index, "scan_tar", lambda _: pytest.fail("it is kept"))
    assert index_tar(path) == first and list(tmp_path.glob("*.part")) == list(tmp_path.glob(".*.part")) == []
    monkeypatch.undo()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    whole = kept.read_bytes()
    elsewhere = whole.replace(b'"000.png", 512,', b'"000.png", 51200000,')  # beyond the end of the tar
    assert elsewhere != whole
    for broken in (b"", b"[]", b"{}", b'{"version": 1', whole.replace(b'"samples"', b'"sample"'), elsewhere):
        kept.write_bytes(broken)
        assert index_tar(path) == first
    write_tar(path, [*sample(0), *sample(1)])
    assert len(index_tar(path).samples) == 2


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_an_index_of_a_read_only_folder_is_kept_in_the_cache(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "data" / "set.tar", sample(0))
    path.parent.chmod(0o500)
    try:
        index_tar(path)
    finally:
        path.parent.chmod(0o700)
    assert len(list((tmp_path / "cache" / "varkit" / "tars").glob("*.json"))) == 1


def test_an_index_that_cannot_be_kept_beside_goes_to_the_cache_or_nowhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_tar(tmp_path / "set.tar", sample(0))
    (tmp_path / ".set.tar.index.json").mkdir()  # nothing can replace it
    index = index_tar(path)
    assert len(list((tmp_path / "cache" / "varkit" / "tars").glob("*.json"))) == 1
    monkeypatch.setattr(tar_index, "cache_folder", lambda: tmp_path / "set.tar")
    assert index_tar(path) == index


def test_what_is_wrong_in_a_tar_is_named(tmp_path: Path) -> None:
    path = tmp_path / "set.tar"
    members = [
        *sample(0),
        ("000.png", png(5)),  # a second member of this name
        ("000.jpg", png(5)),  # a second image of the sample
        ("broken.png", b"no picture"),
        ("empty.png", b""),
        ("lonely.txt", b"a text without a picture"),
        ("bad.png", png(1)),
        ("bad.cls", b"-7"),
        ("odd.png", png(2)),
        ("odd.json", b"{"),
        ("latin.png", png(3)),
        ("latin.txt", b"\xff\xfe\xff"),
        ("001.png", png(6)),
        ("._001.png", b"what a Mac leaves"),
        ("001.seg.png", png(7)),  # another ending, not an image of the sample
        ("000.txt.bak", b""),
        ("002.png", png(8)),
        ("001.cls", b"1"),  # apart from its picture
    ]
    write_tar(path, members)
    result = CliRunner().invoke(app, ["data", "check", str(path), "--json"])
    report = json.loads(result.stdout)
    assert result.exit_code == 1 and report["readable"] == 3
    reasons = {broken["path"].removeprefix(f"{path}/"): broken["reason"] for broken in report["broken"]}
    for member, reason in {
        "000.png": "a second member of this name; the first is used",
        "000.jpg": "a second image of its sample, beside 000.png",
        "broken.png": "UnidentifiedImageError",
        "empty.png": "empty file",
        "bad.png": "bad.cls: label is -7",
        "odd.png": "odd.json: not JSON",
        "latin.png": "latin.txt: no UTF-8",
    }.items():
        assert reason in reasons.pop(member)
    assert not reasons
    warnings = "\n".join(report["warnings"])
    assert f"1 samples have no image and are left out: {path}/lonely.txt" in warnings
    assert f"{path}/001.cls" in warnings and "do not stand beside" in warnings
    assert open_images(path).labels.tolist() == [0, -1, 1, -1]  # with broken.png, which only reading shows


def test_links_and_devices_are_not_followed(tmp_path: Path) -> None:
    (tmp_path / "outside.png").write_bytes(png(9))
    with tarfile.open(tmp_path / "set.tar", "w") as tar:
        for name, kind in (("a.png", tarfile.SYMTYPE), ("b.png", tarfile.LNKTYPE), ("c.png", tarfile.CHRTYPE)):
            info = tarfile.TarInfo(name)
            info.type, info.linkname = kind, str(tmp_path / "outside.png")
            tar.addfile(info)
    with pytest.raises(ValueError, match=r"holds no images.*a.png: a link; links are not followed"):
        open_images(tmp_path / "set.tar")
    before = set(tmp_path.rglob("*"))
    write_tar(tmp_path / "up.tar", [("../../up.png", png(1)), ("/abs.png", png(2))])
    assert len(open_images(tmp_path / "up.tar")) == 2
    assert {path.name for path in set(tmp_path.rglob("*")) - before} == {"up.tar", ".up.tar.index.json"}


@pytest.mark.parametrize("share", [0.2, 0.5, 0.8, 0.95])
def test_a_tar_that_was_cut_short_is_reported_and_read_as_far_as_it_goes(share: float, tmp_path: Path) -> None:
    whole = write_tar(tmp_path / "set.tar", [member for i in range(COUNT) for member in sample(i)])
    members = len(scan_tar(whole).samples)
    end = sum(512 + -(-len(data) // 512) * 512 for i in range(COUNT) for _, data in sample(i))
    whole.write_bytes(whole.read_bytes()[: int(share * end) + 100])
    report = check_images(whole)
    assert 0 < report.readable < members and report.broken[-1].path.startswith(str(whole))
    assert any(word in report.broken[-1].reason for word in ("cut short", "lost"))


def test_damage_in_the_middle_does_not_end_a_tar_in_silence(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "set.tar", [(f"{i}.png", png(i)) for i in range(4)])
    raw = bytearray(path.read_bytes())
    raw[raw.index(b"2.png")] ^= 0xFF  # its checksum is wrong now
    path.write_bytes(raw)
    assert [s.name for s in scan_tar(path).samples] == ["0.png", "1.png"]
    assert "damaged at byte" in check_images(path).broken[0].reason


def test_tars_without_their_closing_blocks_are_warned_of(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "set.tar", [("a.png", png(0))])
    data = path.read_bytes()
    path.write_bytes(data[: 512 + -(-len(png(0)) // 512) * 512])
    dataset = open_images(path)
    assert len(dataset) == 1 and "may be cut short" in dataset.warnings[0]


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "no uncompressed tar"),
        (b"hello" * 1000, "no uncompressed tar"),
        (b"\x1f\x8b" + bytes(2000), "no uncompressed tar"),
        (bytes(10240), "holds no images"),
    ],
)
def test_what_is_no_tar_is_refused(data: bytes, message: str, tmp_path: Path) -> None:
    (tmp_path / "a.tar").write_bytes(data)
    with pytest.raises(ValueError, match=message):
        open_images(tmp_path / "a.tar")


def test_sizes_are_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    members = [("a.png", png(0)), ("b.png", png(1)), ("b.txt", b"x" * 5000), ("c.png", png(2, side=80))]
    path = write_tar(tmp_path / "set.tar", members)
    monkeypatch.setattr(tar_index, "MAX_TEXT", 4096)
    monkeypatch.setattr("varkit.data.transforms.MAX_BYTES", 5000)
    index = scan_tar(path)
    assert [one.name for one in index.samples] == ["a.png"]
    assert [one.path for one in index.skipped] == ["c.png", "b.png"]
    assert [one.reason.split(";")[1] for one in index.skipped] == [
        " an image may have 5,000 at most",
        " a label or text may have 4,096 at most",
    ]
    header = tarfile.TarInfo("x")
    header.type, header.size = tarfile.GNUTYPE_LONGNAME, 2**20  # a name of a megabyte
    path.write_bytes(header.tobuf() + bytes(2**20) + path.read_bytes())
    with pytest.raises(ValueError, match="no uncompressed tar"):
        scan_tar(path)
    (tmp_path / "flat").mkdir()
    (tmp_path / "flat" / "c.png").write_bytes(png(2, side=80))
    with pytest.raises(ValueError, match="may have 5,000 at most"):
        open_images(tmp_path / "flat")


def test_a_bomb_in_a_tar_is_refused_as_in_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_tar(tmp_path / "set.tar", [("a.png", png(0)), ("big.png", png(1, side=60))])
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    (broken,) = check_images(path).broken
    assert broken.path == f"{path}/big.png" and "DecompressionBombError" in broken.reason


def test_a_tar_that_became_shorter_is_noticed(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "set.tar", [*sample(0), *sample(1)])
    dataset = open_images(path)
    assert isinstance(dataset.pixels, TarPixels)
    os.truncate(path, int(dataset.pixels.offset[1]) + 10)
    assert dataset[1]["index"] == 0 and "has changed since" in dataset.skipped[0].reason


def test_a_compressed_tar_is_refused_with_the_way_out(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "set.tar.gz", "w:gz"):
        pass
    with pytest.raises(ValueError, match=r"set.tar.gz is compressed.*give the \.tar"):
        open_images(tmp_path / "set.tar.gz")


def test_names_that_tell_no_key_are_explained(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "set.tar", [("photo.v2.png", png(0))])
    with pytest.raises(ValueError, match=r"its members end in v2.png.*a KEY has no dot"):
        open_images(path)


# ---- hf: ---------------------------------------------------------------------------------------------------------


def test_options_of_hf() -> None:
    assert parse_source("hf:user/name") == ("user/name", {})
    options = {"image": "a b", "label": "", "text": "c", "config": "d", "split": "e"}
    assert parse_source("hf:/x/y.parquet?image=a%20b&label=&text=c&config=d&split=e") == ("/x/y.parquet", options)
    for wrong, message in (("hf:x?labels=y", "did you mean 'label'"), ("hf:x?label", "written"), ("hf:", "names no")):
        with pytest.raises(ValueError, match=message):
            parse_source(wrong)


def test_without_the_library_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ImportError, match=r'pip install "varkit\[hf\]"'):
        open_images("hf:user/name")


def test_splits_of_hf(tmp_path: Path) -> None:
    source = split_on_disk(tmp_path / "set")
    for name, split in ((source, "test"), (source, "val"), (f"{source}?split=test", "train")):
        held = open_images(name, split=split)
        assert held.texts == [caption(5), caption(1)] and held.labels.tolist() == [1, 0]
    with pytest.raises(ValueError, match=r"no split 'tset' \(did you mean 'test'\?\); it has train, test"):
        open_images(f"{source}?split=tset")
    assert len(stored_set(source, split="test")) == 2


def test_columns_of_hf(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets", reason="the extra hf is not installed")
    names = (datasets.Value("string"), [NAMES[label(i)] if i else None for i in range(COUNT)])
    lists = (datasets.Sequence(datasets.Value("string")), [["a", "b"]] * COUNT)
    rows(species=names, captions=lists).save_to_disk(tmp_path / "set")
    source = f"hf:{tmp_path / 'set'}"
    by_name = open_images(f"{source}?label=species")
    assert by_name.classes == list(NAMES) and by_name.labels.tolist()[:2] == [-1, 0]
    plain = open_images(f"{source}?label=&text=")
    assert plain.classes == [] and plain.texts is None and plain.labels.tolist() == [-1] * COUNT
    for query, message in (
        ("label=lable", r"no column 'lable' \(did you mean 'label'\?\) for label="),
        ("text=captions", "one string an image"),
        ("image=text", "holds no images|no readable image"),
        ("label=text&text=caption", "no column 'caption'"),
    ):
        with pytest.raises(ValueError, match=message):
            open_images(f"{source}?{query}")


def test_broken_rows_of_hf_are_named(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets", reason="the extra hf is not installed")
    images = [{"bytes": png(0), "path": None}, {"bytes": b"no picture", "path": None}, None]
    table({"img": images}, {"img": datasets.Image()}).save_to_disk(tmp_path / "set")
    report = check_images(f"hf:{tmp_path / 'set'}")
    assert report.readable == 1 and [broken.path[-3:] for broken in report.broken] == ["[1]", "[2]"]
    assert "no image in this row" in report.broken[1].reason


def test_what_hf_cannot_open_is_one_line(tmp_path: Path) -> None:
    pytest.importorskip("datasets", reason="the extra hf is not installed")
    (tmp_path / "empty").mkdir()
    for source in (f"hf:{tmp_path / 'nowhere'}", f"hf:{tmp_path / 'empty'}", "hf:nobody/nothing"):
        result = CliRunner().invoke(app, ["data", "check", source])
        assert result.exit_code == 2 and result.stderr.startswith("error: hf:") and result.stderr.count("\n") == 1


def test_encoded_images_have_one_reader() -> None:
    """Whoever reads files reads tars and rows as well, for they differ in `open` alone."""
    from varkit.data.hugging_face import RowPixels

    for kind in (TarPixels, RowPixels):
        assert issubclass(kind, FilePixels) and set(vars(kind)) & set(vars(FilePixels)) <= {
            "__init__", "open", "__doc__", "__module__", "__firstlineno__", "__static_attributes__"
        }  # fmt: skip
    assert tars.TARS == "webdataset"
