"""Sets of samples for evaluation: the same for any batch size, process count and interruption; and what keeps them."""

from __future__ import annotations

import csv
import json
import runpy
import shutil
import threading
import zipfile
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import Result
from PIL import Image
from torch import nn
from typer.testing import CliRunner

from tests.test_demo import save_tiny
from tests.test_models import tiny_pair
from varkit import ClassToImagePipeline, NextGroupSampler, Rng
from varkit.data.fashion import read_array
from varkit.data.images import open_images
from varkit.data.npz import map_npz, write_npz
from varkit.pictures import read_settings, to_uint8
from varkit.pipelines.fingerprint import fingerprint
from varkit.pipelines.sample_set import SampleSet, draw, labels_for, launched, sample_set

SCRIPT = Path(__file__).parents[1] / "sample" / "sample_npz.py"
NUM, BLOCK = 11, 4  # three blocks, the last one short


def build() -> ClassToImagePipeline:
    pipe = ClassToImagePipeline(*tiny_pair("var_fashion"), NextGroupSampler(guidance_scale=2.0, top_p=0.9))
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture(scope="module", name="pipe")
def _pipe() -> ClassToImagePipeline:
    return build()


def make(pipe: Any, out: Path, **choices: Any) -> tuple[np.ndarray, np.ndarray]:
    """arr_0 and arr_1 of a small set."""
    sample_set(pipe, out, **{"num": NUM, "seed": 5, "block_size": BLOCK, "batch_size": BLOCK, **choices})
    return load(out)


def load(path: Path) -> tuple[np.ndarray, np.ndarray]:
    with np.load(path, allow_pickle=False) as archive:
        assert archive.files == ["arr_0", "arr_1"]  # what readers of the ADM layout expect, and no more
        return archive["arr_0"], archive["arr_1"]


@pytest.fixture(scope="module", name="whole")
def _whole(pipe: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A set made in one go."""
    out = tmp_path_factory.mktemp("whole") / "x.npz"
    make(pipe, out)
    return out


class Dies(RuntimeError):
    """What kills a run in these tests."""


@pytest.fixture(name="made")
def _made(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Indices of the images that were made, in order."""
    indices: list[int] = []
    real = SampleSet.images

    def count(self: SampleSet, wanted: range) -> np.ndarray:
        indices.extend(wanted)
        return real(self, wanted)

    monkeypatch.setattr(SampleSet, "images", count)
    return indices


def stop_at(index: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """From now on, making that image kills the run."""
    real = SampleSet.images

    def images(self: SampleSet, wanted: range) -> np.ndarray:
        if index in wanted:
            raise Dies
        return real(self, wanted)

    monkeypatch.setattr(SampleSet, "images", images)


# ---- labels -------------------------------------------------------------------------------------------------------


def test_cycled_and_balanced_sets_hold_every_class_equally_often() -> None:
    assert labels_for(7, 3, "cycled", 0) == [0, 1, 2, 0, 1, 2, 0]
    assert labels_for(6, 3, "balanced", 0) == [0, 0, 1, 1, 2, 2]
    for rule in ("cycled", "balanced"):
        assert set(Counter(labels_for(5000, 100, rule, 0)).values()) == {50}


def test_random_labels_belong_to_the_image_and_the_seed() -> None:
    drawn = labels_for(3000, 10, "random", 1)
    assert labels_for(40, 10, "random", 1) == drawn[:40] and labels_for(40, 10, "random", 2) != drawn[:40]
    counts = Counter(drawn)
    assert set(counts) == set(range(10)) and all(abs(n - 300) < 5 * 300**0.5 for n in counts.values())
    assert len(set(counts.values())) > 1  # drawn, not dealt


def test_a_random_label_is_the_one_that_the_pipeline_draws(pipe: Any) -> None:
    expected = labels_for(20, 3, "random", 8)
    assert [pipe(rng=Rng.from_seed(8, 1, i), output_type="latent").class_labels[0] for i in range(20)] == expected


def test_labels_that_cannot_be_are_refused() -> None:
    with pytest.raises(ValueError, match="50 images cannot be balanced over 20 classes; make 40 or 60, or use"):
        labels_for(50, 20, "balanced", 0)
    with pytest.raises(ValueError, match="make 20, or use labels cycled"):
        labels_for(5, 20, "balanced", 0)
    with pytest.raises(ValueError, match="labels must be one of cycled, balanced, random; got 'uniform'"):
        labels_for(50, 20, "uniform", 0)
    with pytest.raises(ValueError, match="num must be at least 1"):
        labels_for(0, 20, "cycled", 0)


# ---- the images ---------------------------------------------------------------------------------------------------


def test_the_set_is_what_the_pipeline_makes_one_by_one(pipe: Any, whole: Path) -> None:
    images, labels = load(whole)
    assert images.dtype == np.uint8 and labels.dtype == np.int64 and images.shape == (NUM, 8, 8, 3)
    order = np.random.RandomState(0).permutation(NUM)
    assert sorted(order) == list(range(NUM)) and labels.tolist() == [int(i) % 3 for i in order]
    assert len({image.tobytes() for image in images}) == NUM
    for row, index in enumerate(order.tolist()):
        one = pipe(class_labels=[index % 3], rng=Rng.from_seed(5, 1, index), output_type="pt").images * 2 - 1
        assert np.array_equal(images[row], to_uint8(one)[0].permute(1, 2, 0).numpy())


def test_any_images_of_a_set_can_be_drawn_alone(pipe: Any, tmp_path: Path) -> None:
    images, labels = make(pipe, tmp_path / "x.npz", shuffle_seed=None, labels="random", rule="adm")
    some = [9, 2, 4]
    drawn = draw(pipe, some, labels[some].tolist(), seed=5, rule="adm")
    assert drawn.dtype == torch.uint8 and np.array_equal(drawn.permute(0, 2, 3, 1), images[some])
    assert not torch.equal(drawn, draw(pipe, some, labels[some].tolist(), seed=5, rule="adm", guidance_scale=9.0))


@pytest.mark.parametrize(("batch_size", "block_size"), [(1, BLOCK), (3, BLOCK), (8, 8), (11, 11), (4, 100)])
def test_batches_and_blocks_leave_no_trace(
    pipe: Any, whole: Path, tmp_path: Path, batch_size: int, block_size: int
) -> None:
    make(pipe, tmp_path / "x.npz", batch_size=batch_size, block_size=block_size)
    assert (tmp_path / "x.npz").read_bytes() == whole.read_bytes()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["x.npz", "x.npz.json"]


@pytest.mark.parametrize("processes", [2, 5])
def test_several_processes_make_the_same_set(
    pipe: Any, whole: Path, tmp_path: Path, made: list[int], processes: int
) -> None:
    work = SampleSet(pipe, tmp_path / "x.npz", num=NUM, seed=5, block_size=BLOCK, batch_size=2)
    missing = work.store.missing()
    work.store.begin(missing, {})
    for process in reversed(range(processes)):
        work.make_blocks(missing[process::processes])
    assert sorted(made) == list(range(NUM))  # each once
    work.store.merge({})
    assert (tmp_path / "x.npz").read_bytes() == whole.read_bytes()


def test_processes_of_a_launch_share_what_is_missing(whole: Path, tmp_path: Path, made: list[int]) -> None:
    """The whole call, in two threads with a real barrier instead of two processes."""
    out, barrier, lines = tmp_path / "x.npz", threading.Barrier(2, timeout=60), list[str]()
    pipes = [build(), build()]  # one each, as processes have
    half = SampleSet(pipes[0], out, num=NUM, seed=5, block_size=BLOCK, batch_size=BLOCK)
    half.store.begin([], {})
    half.make_blocks([1])
    made.clear()

    def process(index: int) -> Any:
        choices = {"num": NUM, "seed": 5, "block_size": BLOCK, "batch_size": 2, "announce": lines.append}
        return sample_set(
            pipes[index], out, process_index=index, num_processes=2, wait=barrier.wait, progress=True, **choices
        )

    with ThreadPoolExecutor(2) as pool:
        results = list(pool.map(process, range(2)))
    assert results == [(out, NUM - BLOCK, False)] * 2 and out.read_bytes() == whole.read_bytes()
    assert sorted(made) == [0, 1, 2, 3, 8, 9, 10]
    assert len(lines) == 1 and f"7 of 11 images to make on cpu x 2, into {out}" in lines[0]


def test_the_bar_counts_what_was_there_and_what_others_made(
    pipe: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    work = SampleSet(pipe, tmp_path / "x.npz", num=NUM, block_size=BLOCK, batch_size=2)
    work.store.begin([], {})
    work.make_blocks([2])
    assert capsys.readouterr().err == ""
    work.make_blocks([0], progress=True)
    first = capsys.readouterr().err
    assert "| 3/11 [" in first and "| 7/11 [" in first
    work.make_blocks([1], progress=True)
    assert "| 11/11 [" in capsys.readouterr().err


def test_a_process_that_cannot_wait_for_the_others_is_refused(pipe: Any, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="2 processes have to wait for each other"):
        sample_set(pipe, tmp_path / "x.npz", num=NUM, num_processes=2)


def test_without_shuffling_rows_are_numbered_as_the_images(pipe: Any, whole: Path, tmp_path: Path) -> None:
    images, labels = make(pipe, tmp_path / "x.npz", shuffle_seed=None)
    shuffled, _ = load(whole)
    assert labels.tolist() == [i % 3 for i in range(NUM)]
    assert np.array_equal(images[np.random.RandomState(0).permutation(NUM)], shuffled)
    other, other_labels = make(pipe, tmp_path / "y.npz", shuffle_seed=1)
    assert np.array_equal(images[np.random.RandomState(1).permutation(NUM)], other)
    assert sorted(other_labels) == sorted(labels) and not np.array_equal(other, shuffled)


def test_a_longer_set_begins_with_the_shorter_one(pipe: Any, tmp_path: Path) -> None:
    short, _ = make(pipe, tmp_path / "a.npz", num=5, shuffle_seed=None)
    longer, _ = make(pipe, tmp_path / "b.npz", shuffle_seed=None)
    assert np.array_equal(longer[:5], short)


def test_seed_settings_labels_and_rule_reach_the_images(pipe: Any, whole: Path, tmp_path: Path) -> None:
    images, _ = load(whole)
    for number, choice in enumerate(({"seed": 6}, {"guidance_scale": 8.0}, {"top_k": 1}, {"labels": "random"})):
        assert not np.array_equal(make(pipe, tmp_path / f"{number}.npz", **choice)[0], images)
    darker, _ = make(pipe, tmp_path / "adm.npz", rule="adm")  # truncates
    lost = images.astype(int) - darker
    assert lost.min() == 0 and lost.max() == 1 and 0.3 < lost.mean() < 0.7
    same, _ = make(pipe, tmp_path / "own.npz", guidance_scale=2.0, top_p=None)  # the model's own settings
    assert np.array_equal(same, images)


# ---- stops and resumption -------------------------------------------------------------------------------------------


def test_a_killed_run_goes_on_where_it_was(
    pipe: Any, whole: Path, tmp_path: Path, made: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "x.npz"
    with monkeypatch.context() as patch:
        stop_at(7, patch)
        with pytest.raises(Dies):
            make(pipe, out, batch_size=2)
    assert made == [0, 1, 2, 3, 4, 5] and not out.exists()
    assert sorted(p.name for p in (tmp_path / "x.npz.parts").iterdir()) == ["block-000000.npy", "settings.json"]
    made.clear()
    result = sample_set(pipe, out, num=NUM, seed=5, block_size=BLOCK, batch_size=3)
    assert made == list(range(BLOCK, NUM)) and result == (out, NUM - BLOCK, False)
    assert out.read_bytes() == whole.read_bytes() and not (tmp_path / "x.npz.parts").exists()


def test_a_run_killed_while_it_was_put_together_makes_no_image_again(
    pipe: Any, whole: Path, tmp_path: Path, made: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    def die(*_: Any) -> None:
        raise Dies

    for name in ("write_npz", "_write_json", "shutil.rmtree"):  # before, between and after the two files
        out = tmp_path / name / "x.npz"
        with monkeypatch.context() as patch:
            if name == "_write_json":
                work = SampleSet(pipe, out, num=NUM, seed=5, block_size=BLOCK, batch_size=BLOCK)
                work.store.begin(work.store.missing(), {})
                work.make_blocks(work.store.missing())
            patch.setattr(f"varkit.pipelines.sample_store.{name}", die)
            with pytest.raises(Dies):
                work.store.merge({}) if name == "_write_json" else make(pipe, out)
        made.clear()
        make(pipe, out)
        assert made == [] and out.read_bytes() == whole.read_bytes() and (out.parent / "x.npz.json").exists()


def test_a_replacement_that_was_killed_is_not_taken_for_the_set_before(
    pipe: Any, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for file in whole.parent.iterdir():
        shutil.copy(file, tmp_path)
    work = SampleSet(pipe, tmp_path / "x.npz", num=NUM, seed=6, block_size=BLOCK, batch_size=BLOCK)
    work.store.begin(work.store.missing(), {})
    work.make_blocks(work.store.missing())
    with monkeypatch.context() as patch:  # the images are new, their record is not written yet
        patch.setattr("varkit.pipelines.sample_store._write_json", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            work.store.merge({})
    with pytest.raises(ValueError, match="seed was 6, is now 5"):
        make(pipe, tmp_path / "x.npz")
    assert (tmp_path / "x.npz").read_bytes() != whole.read_bytes()


@pytest.mark.parametrize("damage", ["cut", "emptied", "other shape", "other dtype", "no array", "gone"])
def test_a_block_that_is_not_whole_is_made_again(
    pipe: Any, whole: Path, tmp_path: Path, made: list[int], monkeypatch: pytest.MonkeyPatch, damage: str
) -> None:
    out = tmp_path / "x.npz"
    with monkeypatch.context() as patch:
        stop_at(NUM - 1, patch)
        with pytest.raises(Dies):
            make(pipe, out)
    block = tmp_path / "x.npz.parts" / "block-000001.npy"
    good = np.load(block)
    if damage == "cut":
        block.write_bytes(block.read_bytes()[:-1])
    elif damage == "emptied":
        block.write_bytes(b"")
    elif damage == "other shape":
        np.save(block, good[:2])
    elif damage == "other dtype":
        np.save(block, good.astype(np.int8))
    elif damage == "no array":
        block.write_bytes(b"PK\x03\x04 not an array")
    else:
        block.unlink()
    made.clear()
    choices = {"num": NUM, "seed": 5, "block_size": BLOCK, "batch_size": BLOCK}
    store = SampleSet(pipe, out, **choices).store
    store.begin(store.missing(), {})
    assert store.done() == BLOCK  # what is to be made again is not counted as done
    make(pipe, out)
    assert made == list(range(BLOCK, NUM)) and out.read_bytes() == whole.read_bytes()


def test_other_settings_do_not_go_on_with_a_run(pipe: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out, parts = tmp_path / "x.npz", tmp_path / "x.npz.parts"
    with monkeypatch.context() as patch:
        stop_at(7, patch)
        with pytest.raises(Dies):
            make(pipe, out)
    for choice, message in (
        ({"seed": 6}, "seed was 5, is now 6"),
        ({"guidance_scale": 1.5}, "guidance_scale was 2.0, is now 1.5"),
        ({"num": 12}, "num was 11, is now 12"),
        ({"labels": "random"}, "labels was cycled, is now random"),
        ({"rule": "mar"}, "rule was round, is now mar"),
        ({"block_size": 5}, "block_size was 4, is now 5"),
        ({"shuffle_seed": None}, "shuffle_seed was 0, is now None"),
        ({"seed": 6, "overwrite": True}, "seed was 5, is now 6"),  # blocks are never mixed
    ):
        with pytest.raises(ValueError, match=rf"begun with other settings \({message}\); go on with those, remove"):
            make(pipe, out, **choice)
    other = build()
    with torch.no_grad():
        next(iter(other.image_tokenizer.parameters())).add_(1)
    with pytest.raises(ValueError, match="weights was"):
        make(other, out)
    assert (parts / "block-000000.npy").exists()
    (parts / "settings.json").write_text("{")
    with pytest.raises(ValueError, match=r"holds no readable settings.json; remove it"):
        make(pipe, out)


def test_a_run_killed_before_its_first_file_begins_anew(pipe: Any, whole: Path, tmp_path: Path) -> None:
    (tmp_path / "x.npz.parts").mkdir()
    (tmp_path / "x.npz.parts" / ".settings.json.17.part").write_text("{")
    make(pipe, tmp_path / "x.npz")
    assert (tmp_path / "x.npz").read_bytes() == whole.read_bytes()


def test_missing_blocks_are_not_put_together(pipe: Any, tmp_path: Path) -> None:
    work = SampleSet(pipe, tmp_path / "x.npz", num=NUM, block_size=BLOCK, batch_size=BLOCK)
    work.store.begin(work.store.missing(), {})
    work.make_blocks([0, 2])
    with pytest.raises(ValueError, match=r"1 blocks are missing in .*, from block-000001.npy on; run the same command"):
        work.store.merge({})
    assert not (tmp_path / "x.npz").exists() and (tmp_path / "x.npz.parts" / "block-000000.npy").exists()


def test_a_set_that_is_there_stays(pipe: Any, whole: Path, tmp_path: Path, made: list[int]) -> None:
    for file in whole.parent.iterdir():
        shutil.copy(file, tmp_path)
    out, before = tmp_path / "x.npz", whole.read_bytes()
    same = {"num": NUM, "seed": 5, "block_size": BLOCK}
    assert sample_set(pipe, out, batch_size=1, name="elsewhere", **same) == (out, 0, True)
    with pytest.raises(ValueError, match=r"exists \(seed was 5, is now 6\); --overwrite replaces it, or choose"):
        make(pipe, out, seed=6)
    assert made == [] and out.read_bytes() == before
    make(pipe, out, overwrite=True)
    assert made == list(range(NUM)) and out.read_bytes() == before
    make(pipe, out, seed=6, overwrite=True)
    assert out.read_bytes() != before and json.loads((tmp_path / "x.npz.json").read_text())["seed"] == 6
    (tmp_path / "x.npz.json").unlink()
    with pytest.raises(ValueError, match=r"exists \(nothing says how it was made\); --overwrite"):
        make(pipe, out, seed=6)


def test_the_record_says_how_the_set_was_made(pipe: Any, whole: Path) -> None:
    record = json.loads((whole.parent / "x.npz.json").read_text())
    expected = {"num": NUM, "seed": 5, "labels": "cycled", "rule": "round", "shuffle_seed": 0, "block_size": BLOCK}
    expected |= {"guidance_scale": 2.0, "top_p": 0.9, "dtype": "float32", "weights": fingerprint(pipe.components)}
    expected |= {"device": "cpu", "batch_size": BLOCK, "processes": 1}
    assert expected.items() <= record.items() and {"model", "version", "temperature"} <= record.keys()


def test_the_fingerprint_is_of_weights_and_architecture(pipe: Any) -> None:
    assert fingerprint(build().components) == fingerprint(pipe.components)
    seen = {fingerprint(pipe.components)}
    for part in ("transformer", "image_tokenizer"):
        other = build()
        with torch.no_grad():
            list(getattr(other, part).parameters())[-1].flatten()[0] += 1e-3
        seen.add(fingerprint(other.components))
    other = build()
    other.transformer.register_to_config(num_heads=1)
    seen.add(fingerprint(other.components))
    assert len(seen) == 4


# ---- a folder of pictures -------------------------------------------------------------------------------------------


def test_a_folder_holds_the_same_set_in_the_same_order(
    pipe: Any, whole: Path, tmp_path: Path, made: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "pictures"
    choices = {"num": NUM, "seed": 5, "block_size": BLOCK, "batch_size": BLOCK}
    with monkeypatch.context() as patch:
        patch.setattr("varkit.pipelines.sample_store.CHUNK", 3)
        sample_set(pipe, out, **choices)
    names = [f"{i:06d}.png" for i in range(NUM)]
    assert sorted(p.name for p in out.iterdir()) == [*names, "labels.csv", "settings.json"]
    images, labels = load(whole)
    assert np.array_equal(np.stack([np.asarray(Image.open(out / n)) for n in names]), images)
    with (out / "labels.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [r["file"] for r in rows] == names and [int(r["class"]) for r in rows] == labels.tolist()
    assert [int(r["index"]) for r in rows] == np.random.RandomState(0).permutation(NUM).tolist()
    about = read_settings(out / names[3])
    assert about["index"] == int(rows[3]["index"]) and about["class"] == labels[3] and about["seed"] == 5
    assert len(open_images(out)) == NUM  # the other files are in nobody's way
    made.clear()
    assert sample_set(pipe, out, **choices).there and made == []
    with pytest.raises(ValueError, match="seed was 5, is now 6"):
        sample_set(pipe, out, **{**choices, "seed": 6})
    sample_set(pipe, out, **{**choices, "seed": 6, "num": 4, "overwrite": True})
    assert len(list(out.glob("*.png"))) == 4 and not (tmp_path / "pictures.parts").exists()


def test_a_folder_of_other_files_is_never_replaced(pipe: Any, tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("x")
    for overwrite in (False, True):
        with pytest.raises(ValueError, match="holds files that are no sampled set; choose another --out"):
            sample_set(pipe, tmp_path / "mine", num=3, overwrite=overwrite)
    (tmp_path / "a.npz").mkdir()
    (tmp_path / "b").write_text("x")
    for name, kind in (("a.npz", "folder"), ("b", "file")):
        with pytest.raises(ValueError, match=f"{name} is a {kind}; choose another --out"):
            sample_set(pipe, tmp_path / name, num=3)
    (tmp_path / "new").mkdir()  # an empty one is taken
    sample_set(pipe, tmp_path / "new", num=3)
    assert len(list((tmp_path / "new").glob("*.png"))) == 3


# ---- what goes wrong ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("choices", "message"),
    [
        ({"guidence_scale": 2.0}, r"no setting is called 'guidence_scale' \(did you mean 'guidance_scale'\?\)"),
        ({"top_p": 1.5}, r"top_p must be in \(0, 1\]"),
        ({"rule": "floor"}, "rule must be one of round, llamagen"),
        ({"labels": "all"}, "labels must be one of"),
        ({"batch_size": 5}, "batch_size must be 1 to 4, the size of a block; got 5"),
        ({"batch_size": 0}, "batch_size must be 1 to 4"),
        ({"num": 0}, "num must be at least 1"),
    ],
)
def test_bad_choices_are_refused_before_any_work(
    pipe: Any, tmp_path: Path, choices: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        make(pipe, tmp_path / "sub" / "x.npz", **choices)
    with pytest.raises(ValueError, match=r"x.zip must end in .npz, or be a folder without a dot"):
        make(pipe, tmp_path / "x.zip")
    assert not list(tmp_path.iterdir())


def test_images_that_are_no_numbers_stop_the_run(tmp_path: Path) -> None:
    pipe = build()
    for module in pipe.image_tokenizer.decoder.modules():
        if isinstance(module, nn.Conv2d) and module.bias is not None:
            nn.init.constant_(module.bias, torch.nan)
    with pytest.raises(ValueError, match="image 0 holds NaN or infinity, in float32"):
        make(pipe, tmp_path / "x.npz")
    assert not list((tmp_path / "x.npz.parts").glob("*.npy"))


def test_too_large_a_batch_is_an_error_in_words(
    pipe: Any, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = type(pipe).__call__

    def small(self: Any, class_labels: list[int], **settings: Any) -> Any:
        if len(class_labels) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return real(self, class_labels, **settings)

    monkeypatch.setattr(type(pipe), "__call__", small)
    with pytest.raises(ValueError, match="4 images at once do not fit into memory; run the same command with a small"):
        make(pipe, tmp_path / "x.npz")
    make(pipe, tmp_path / "x.npz", batch_size=2)
    assert (tmp_path / "x.npz").read_bytes() == whole.read_bytes()


# ---- large .npz files -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("save", [np.savez, "write_npz"])
@pytest.mark.parametrize("dtype", [np.uint8, np.int64, np.float32])
def test_a_stored_array_is_mapped_as_numpy_reads_it(tmp_path: Path, save: Any, dtype: Any) -> None:
    values = np.random.default_rng(0).integers(0, 200, (7, 5, 3, 3)).astype(dtype)
    arrays = {"first": np.arange(3), "arr_0": values, "turned": np.asfortranarray(values[..., 0])}
    path = tmp_path / "x.npz"
    if save == "write_npz":
        arrays.pop("turned")
        write_npz(path, {k: (a.shape, a.dtype, np.array_split(a, 3)) for k, a in arrays.items()})
    else:
        save(path, **arrays)
    with np.load(path, allow_pickle=False) as archive:
        assert archive.files == list(arrays)
        for name, array in arrays.items():
            mapped = map_npz(path, name)
            assert isinstance(mapped, np.memmap) and not mapped.flags.writeable
            assert mapped.dtype == array.dtype and np.array_equal(mapped, array)
            assert np.array_equal(archive[name], array)  # numpy checks the checksum too


def test_what_cannot_be_mapped_is_said(tmp_path: Path) -> None:
    np.savez_compressed(tmp_path / "small.npz", arr_0=np.zeros((4, 4)))
    np.savez(tmp_path / "empty.npz", arr_0=np.zeros((0, 4)))
    assert map_npz(tmp_path / "small.npz", "arr_0") is None and map_npz(tmp_path / "empty.npz", "arr_0") is None
    with pytest.raises(KeyError):
        map_npz(tmp_path / "small.npz", "arr_1")
    np.savez(tmp_path / "objects.npz", arr_0=np.array([{}], dtype=object))
    with pytest.raises(ValueError, match="holds pickled objects"):
        map_npz(tmp_path / "objects.npz", "arr_0")
    with zipfile.ZipFile(tmp_path / "short.npz", "w") as archive:
        np.save(tmp_path / "a.npy", np.zeros((9, 9)))
        archive.writestr("arr_0.npy", (tmp_path / "a.npy").read_bytes()[:-8])
    with pytest.raises(ValueError, match=r"says float64 \(9, 9\), 648 bytes, but holds 640; the file is damaged"):
        map_npz(tmp_path / "short.npz", "arr_0")
    np.savez(tmp_path / "moved.npz", arr_0=np.zeros(99))
    content = bytearray((tmp_path / "moved.npz").read_bytes())
    content[:4] = b"\0\0\0\0"
    (tmp_path / "moved.npz").write_bytes(content)
    with pytest.raises(ValueError, match="is not where the directory of the zip says"):
        map_npz(tmp_path / "moved.npz", "arr_0")


def test_an_image_set_is_not_read_before_it_is_looked_at(tmp_path: Path) -> None:
    images = np.random.default_rng(0).integers(0, 256, (6, 5, 4, 3), dtype=np.uint8)
    labels = np.arange(6)
    np.savez(tmp_path / "stored.npz", arr_0=images, arr_1=labels)
    np.savez_compressed(tmp_path / "packed.npz", arr_0=images, arr_1=labels)
    (stored, one), (packed, other) = (read_array(tmp_path / f"{n}.npz") for n in ("stored", "packed"))
    assert isinstance(stored, np.memmap) and not isinstance(packed, np.memmap)
    assert np.array_equal(stored, packed) and np.array_equal(stored, images)
    assert one is not None and other is not None and one.tolist() == other.tolist() == labels.tolist()
    batches = [open_images(tmp_path / f"{n}.npz").__getitems__([4, 0, 4]) for n in ("stored", "packed")]
    assert torch.equal(batches[0]["images"], batches[1]["images"])


def test_blocks_are_asked_for_one_at_a_time(tmp_path: Path) -> None:
    alive: set[int] = set()
    most = 0

    class Block(np.ndarray):
        def __del__(self) -> None:
            alive.discard(id(self))

    def blocks() -> Any:
        nonlocal most
        for _ in range(20):
            block = np.zeros((5, 3), np.uint8).view(Block)
            alive.add(id(block))
            most = max(most, len(alive))
            yield block

    write_npz(tmp_path / "x.npz", {"arr_0": ((100, 3), np.uint8, blocks())})
    assert most <= 3 and np.load(tmp_path / "x.npz")["arr_0"].shape == (100, 3)


@pytest.mark.parametrize(
    ("shape", "blocks", "message"),
    [
        ((4, 2), [np.zeros((3, 2), np.uint8)], "its blocks hold 3 rows; expected 4"),
        ((4, 2), [np.zeros((5, 2), np.uint8)], "its blocks hold 5 rows; expected 4"),
        ((4, 2), [np.zeros((4, 3), np.uint8)], r"a block is uint8 \(4, 3\); expected uint8 \(n, 2\)"),
        ((4, 2), [np.zeros((4, 2))], r"a block is float64 \(4, 2\); expected uint8 \(n, 2\)"),
    ],
)
def test_blocks_that_do_not_make_the_array_leave_no_file(
    tmp_path: Path, shape: tuple[int, ...], blocks: list[np.ndarray], message: str
) -> None:
    (tmp_path / "x.npz").write_bytes(b"before")
    with pytest.raises(ValueError, match=message):
        write_npz(tmp_path / "x.npz", {"arr_0": (shape, np.uint8, blocks)})
    with pytest.raises(ValueError, match="only plain numbers"):
        write_npz(tmp_path / "x.npz", {"arr_0": ((1,), object, [np.array([{}])])})
    assert (tmp_path / "x.npz").read_bytes() == b"before" and len(list(tmp_path.iterdir())) == 1


# ---- the command ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module", name="model")
def _model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("model"))


@pytest.fixture(name="alone")
def _alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """accelerate keeps its state for the whole interpreter: here it has one of its own."""
    monkeypatch.setattr("accelerate.PartialState._shared_state", {})
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)


def run(*words: Any, code: int = 0) -> Result:
    app = runpy.run_path(str(SCRIPT))["app"]
    result = CliRunner().invoke(app, [str(w) for w in (*words, "--device", "cpu")])
    assert result.exit_code == code, result.output + repr(result.exception)
    return result


def refused(*words: Any) -> str:
    result = run(*words, code=2)
    errors = [line for line in result.stderr.splitlines() if "Warning" not in line and "deprecate" not in line]
    assert result.stdout == "" and len(errors) == 1 and errors[0].startswith("error: ")
    return errors[0]


@pytest.mark.usefixtures("alone")
def test_the_command_says_what_it_makes_and_what_it_wrote(model: Path, tmp_path: Path) -> None:
    out = tmp_path / "x.npz"
    words = [model, "--num", 10, "--out", out, "--guidance", 1.5, "--labels", "random", "--seed", 3]
    result = run(*words, "--batch-size", 4)
    assert f"10 of 10 images to make on cpu x 1, into {out}" in result.stderr and "guidance_scale 1.5" in result.stderr
    assert f"wrote {out}: 10 images (10 new" in result.stdout
    record, (images, labels) = json.loads((tmp_path / "x.npz.json").read_text()), load(out)
    assert record["model"] == str(model) and record["guidance_scale"] == 1.5 and record["batch_size"] == 4
    order = np.random.RandomState(0).permutation(10)
    assert labels.tolist() == np.array(labels_for(10, 3, "random", 3))[order].tolist() and len(images) == 10
    assert "there already" in run(*words).stdout
    assert "top_k was 0, is now 3" in refused(*words, "--top-k", 3)
    assert "(10 new" in run(*words, "--top-k", 3, "--no-shuffle", "--overwrite").stdout
    assert load(out)[1].tolist() == labels_for(10, 3, "random", 3)


@pytest.mark.usefixtures("alone")
def test_bad_commands_are_answered_in_one_line(model: Path, tmp_path: Path) -> None:
    out = ("--out", tmp_path / "x.npz")
    assert "make 9 or 12, or use labels cycled" in refused(model, *out, "--num", 10, "--labels", "balanced")
    assert "rule must be one of" in refused(model, *out, "--rule", "floor")
    assert "must end in .npz" in refused(model, "--out", tmp_path / "x.png")
    assert "batch_size must be 1 to 8" in refused(model, *out, "--batch-size", 9, "--block-size", 8)
    assert "neither a shipped model" in refused("no-such-model", *out)
    assert "--dtype must be" in refused(model, *out, "--dtype", "int8")
    assert run(model, "--num", 0, code=2).stderr  # typer's own check
    assert not list(tmp_path.iterdir())


@pytest.mark.usefixtures("alone")
def test_a_device_or_launch_that_cannot_be_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("varkit.pipelines.sample_set.best_device", lambda: torch.device("cpu"))
    assert launched("auto").device.type == "cpu" and launched("cpu").num_processes == 1
    with pytest.raises(ValueError, match="device 'cuda' is not on this machine, which has cpu; auto takes the best"):
        launched("cuda")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match="WORLD_SIZE is 2, but accelerate finds 1 process on cpu; start with"):
        launched("auto")


def test_every_option_of_the_command_has_a_help_text() -> None:
    import typer

    command = typer.main.get_command(runpy.run_path(str(SCRIPT))["app"])
    assert command.help and all(getattr(p, "help", None) for p in command.params if p.name != "help")
