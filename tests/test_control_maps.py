"""Control maps on disk: made of folders, paired with images, scored."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader
from typer.testing import CliRunner

from varkit.cli import app
from varkit.conditioning.extractors import EXTRACTORS, ExtractorEntry, build_extractor
from varkit.data import ImageTransform, collate, open_images
from varkit.data.controls import ControlledImages, pair_files
from varkit.metrics.control_score import METRICS, control_score
from varkit.metrics.controllability import canny_f1, depth_rmse, map_similarity, mean_iou
from varkit.pipelines.extract_controls import extract_controls


def save(path: Path, seed: int, height: int = 40, width: int = 48) -> Path:
    """Blocks of 8 pixels, so that there are edges."""
    path.parent.mkdir(parents=True, exist_ok=True)
    blocks = np.random.default_rng(seed).integers(0, 256, (height // 8 + 1, width // 8 + 1, 3), dtype=np.uint8)
    Image.fromarray(blocks.repeat(8, 0).repeat(8, 1)[:height, :width]).save(path)
    return path


def pixels(path: Path) -> Tensor:
    return torch.from_numpy(np.array(Image.open(path)))


def run(*words: object, code: int = 0) -> Any:
    result = CliRunner().invoke(app, [str(word) for word in words])
    assert result.exit_code == code, result.output
    return result


@pytest.fixture(name="images")
def _images(tmp_path: Path) -> Path:
    """Three sizes, two folders, five images."""
    folder = tmp_path / "images"
    for i in range(3):
        save(folder / "rose" / f"{i}.png", i)
    save(folder / "rose" / "wide.jpg", 7, 24, 64)
    save(folder / "tulip" / "deep" / "x.png", 9, 33, 31)
    return folder


@pytest.fixture(autouse=True)
def _cv2() -> None:
    pytest.importorskip("cv2", reason="the extra control is not installed")


# ---- varkit control ---------------------------------------------------------------------------------------------


def test_maps_have_the_paths_of_their_images(images: Path, tmp_path: Path) -> None:
    told = json.loads(run("control", "canny", images, "--out", tmp_path / "maps", "--batch-size", 2, "--json").stdout)
    assert (told["made"], told["there"], told["skipped"]) == (5, 0, 0)
    canny = build_extractor("canny")
    for path in images.rglob("*.*"):
        made = pixels((tmp_path / "maps" / path.relative_to(images)).with_suffix(".png"))
        assert torch.equal(made, canny(pixels(path)[None])[0])
    assert not list(tmp_path.rglob("*.part"))


def test_what_is_there_is_kept(images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "maps"
    run("control", "canny", images, "--out", out)
    kept, lost = out / "rose" / "0.png", out / "rose" / "1.png"
    kept.write_bytes(b"mine")
    lost.unlink()
    told = json.loads(run("control", "canny", images, "--out", out, "--json").stdout)
    assert (told["made"], told["there"]) == (1, 4)
    assert kept.read_bytes() == b"mine" and lost.is_file()
    monkeypatch.setitem(EXTRACTORS, "canny", ExtractorEntry(pytest.fail, 1, "-", "nearest", "-", "-"))
    run("control", "canny", images, "--out", out)  # nothing to do: nothing is opened
    error = run("control", "canny", images, "--out", out, "--low", 50, code=2).stderr
    assert "choose another folder" in error and error.count("\n") == 1


def test_one_image_and_unreadable_ones(images: Path, tmp_path: Path) -> None:
    run("control", "canny", images / "rose" / "0.png", "--out", tmp_path / "one")
    assert pixels(tmp_path / "one" / "0.png").shape == (40, 48)
    (images / "rose" / "bad.png").write_bytes(b"no image")
    result = run("control", "canny", images, "--out", tmp_path / "maps")
    assert "bad.png" in result.stderr and "1 unreadable" in result.stdout and "5 maps" in result.stdout


def test_processes_share_the_files(images: Path, tmp_path: Path) -> None:
    made = [
        extract_controls(
            lambda: build_extractor("canny"), images, tmp_path / "maps", record={}, process_index=i, num_processes=2
        ).made
        for i in range(2)
    ]
    assert sum(made) == 5 and min(made) > 0 and len(list((tmp_path / "maps").rglob("*.png"))) == 5


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["cany", "images", "--out", "maps"], "canny"),
        (["map", "images", "--out", "maps"], "nothing to make"),
        (["canny", "nowhere", "--out", "maps"], "does not exist"),
        (["canny", "images", "--out", "images/maps"], "beside it"),
        (["canny", "images", "--out", "others"], "no control.json"),
        (["canny", "images", "--out", "maps", "--low", "300"], "0 <= low <= high"),
        (["canny", "images", "--out", "maps", "--palette", "ids"], "no option palette"),
        (["hed", "images", "--out", "maps", "--weights", "nowhere.pth"], "ControlNetHED.pth"),
        (["canny", "twins", "--out", "maps"], "ending alone"),
    ],
    ids=["kind", "map", "source", "inside", "others", "thresholds", "option", "weights", "twins"],
)
def test_bad_input_is_one_line(
    words: list[str], message: str, images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save(tmp_path / "others" / "a.png", 1)
    for ending in ("png", "jpg"):
        save(tmp_path / "twins" / f"a.{ending}", 1)
    monkeypatch.chdir(tmp_path)
    error = run("control", *words, code=2).stderr
    assert message in error and error.startswith("error: ") and error.count("\n") == 1
    assert not (tmp_path / "maps").exists()  # nothing is begun


# ---- images with their controls ---------------------------------------------------------------------------------


@pytest.fixture(name="maps")
def _maps(images: Path, tmp_path: Path) -> Path:
    run("control", "canny", images, "--out", tmp_path / "maps")
    return tmp_path / "maps"


def test_pairs_are_found_and_what_lacks_is_named(images: Path, maps: Path) -> None:
    pairs = pair_files(images, maps)
    assert pairs.keys == ["rose/0", "rose/1", "rose/2", "rose/wide", "tulip/deep/x"]
    assert not pairs.missing and not pairs.unused
    pairs.require_all(maps)
    (maps / "rose" / "1.png").rename(maps / "rose" / "other.png")
    pairs = pair_files(images, maps)
    assert pairs.missing == ["rose/1"] and pairs.unused == ["rose/other"]
    assert all(Path(a).stem == Path(b).stem for a, b in zip(pairs.images, pairs.controls, strict=True))
    with pytest.raises(ValueError, match=r"1 of 5 images have no control in .*rose/1"):
        pairs.require_all(maps)


@pytest.mark.parametrize("mode", ["crop", "center"])
def test_a_control_is_cut_and_flipped_as_its_image(mode: Any, tmp_path: Path) -> None:
    """With the image itself as its control, both come out equal: same window, same mirror."""
    for i in range(6):
        save(tmp_path / "a" / "c" / f"{i}.png", i, 48, 56)
        save(tmp_path / "b" / "c" / f"{i}.png", i, 48, 56)
    transform = ImageTransform((40, 32), mode=mode, enlarge=1.2, flip=True)  # 48 pixels high: nothing is resized
    data = ControlledImages(open_images(tmp_path / "a", transform=transform), tmp_path / "b")
    assert len(data) == 6
    for batch in DataLoader(data, batch_size=3, collate_fn=collate, shuffle=False):
        assert batch["controls"].shape == (3, 3, 40, 32) and torch.equal(batch["images"], batch["controls"])
    first, other = data[(0, 0)], data[(0, 5)]
    assert torch.equal(first["image"], first["control"]) and torch.equal(other["image"], other["control"])
    assert not torch.equal(first["control"], other["control"]) or mode == "center"


def test_edges_stay_black_and_white(images: Path, maps: Path) -> None:
    data = open_images(images, transform=ImageTransform(32, mode="center"))
    batch = ControlledImages(data, maps).__getitems__([0, 3])
    assert set(batch["controls"].unique().tolist()) == {-1.0, 1.0}
    assert batch["labels"].tolist() == [0, 0] and batch["images"].shape == batch["controls"].shape
    soft = ControlledImages(data, maps, resize="bicubic").__getitems__([0])["controls"]
    assert len(soft.unique()) > 2


def test_missing_controls_are_refused_or_left_out(images: Path, maps: Path) -> None:
    (maps / "rose" / "0.png").unlink()
    data = open_images(images, transform=ImageTransform(32))
    with pytest.raises(ValueError, match=r"1 of 5 .*rose/0"):
        ControlledImages(data, maps)
    some = ControlledImages(data, maps, allow_missing=True)
    assert len(some) == 4 and [Path(path).name for path in some.missing] == ["0.png"]
    assert some.__getitems__([0])["index"].tolist() == [1]  # of the set below
    assert some[-1]["label"] == 1
    with pytest.raises(IndexError):
        some[4]


def test_a_control_of_another_size_is_refused(images: Path, maps: Path) -> None:
    save(maps / "rose" / "0.png", 1, 8, 8)
    data = ControlledImages(open_images(images, transform=ImageTransform(32)), maps)
    with pytest.raises(ValueError, match=r"is 8x8 .* 48x40"):
        data[0]
    (maps / "rose" / "1.png").write_bytes(b"no image")
    with pytest.raises(ValueError, match=r"1\.png cannot be read"):
        data[1]


def test_the_folders_of_controlar_are_read(tmp_path: Path) -> None:
    for i in range(3):
        save(tmp_path / "image" / f"{i}.png", i)
        save(tmp_path / "control_depth" / f"{i}.png", i + 5)
    data = ControlledImages(open_images(tmp_path / "image"), tmp_path / "control_depth")
    assert torch.equal(data[2]["control"], pixels(tmp_path / "control_depth" / "2.png").permute(2, 0, 1))


# ---- varkit control-score ---------------------------------------------------------------------------------------


def test_an_image_scores_full_against_its_own_control(images: Path, maps: Path, tmp_path: Path) -> None:
    told = json.loads(run("control-score", "canny", images, maps, "--json", "--out", tmp_path / "score.json").stdout)
    assert told["metric"] == "canny-f1" and told["mean"] == 1 and told["images"] == 5
    assert list(told["per_image"]) == pair_files(images, maps).keys
    assert json.loads((tmp_path / "score.json").read_text()) == told
    assert "canny-f1 1.0000 over 5 images" in run("control-score", "canny", images, maps).stdout


def test_the_mean_is_that_of_the_metric(images: Path, maps: Path, tmp_path: Path) -> None:
    for i, path in enumerate(sorted(images.rglob("*.*"))):
        with Image.open(path) as image:
            size = image.size
        save(tmp_path / "drawn" / path.relative_to(images).with_suffix(".png"), 50 + i, size[1], size[0])
    result = control_score(tmp_path / "drawn", maps, "canny", batch_size=2)
    canny = build_extractor("canny")
    for key, score in result.per_image.items():
        found = canny(pixels(tmp_path / "drawn" / f"{key}.png")[None])
        assert score == canny_f1(found, pixels(maps / f"{key}.png")[None]).mean
    assert 0 < result.mean < 1 and result.mean == pytest.approx(np.mean(list(result.per_image.values())))


class Scripted:
    """An extractor whose maps are known: the red channel."""

    num_classes = 4

    def raw(self, images: Tensor) -> Tensor:
        return images[..., 0].float() + 1

    def floats(self, images: Tensor) -> Tensor:
        return images[..., 0].float()

    def __call__(self, images: Tensor) -> Tensor:
        return images[..., 0]


@pytest.mark.parametrize("kind", ["hed", "lineart", "depth", "depth-midas"])
def test_each_kind_has_its_metric(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("varkit.metrics.control_score.build_extractor", lambda *_, **__: Scripted())
    for i in range(3):
        save(tmp_path / "drawn" / f"{i}.png", i, 180, 184)
        save(tmp_path / "maps" / f"{i}.png", i + 10, 180, 184)
    result = control_score(tmp_path / "drawn", tmp_path / "maps", kind, batch_size=2)
    for i in range(3):
        found, wanted = (
            pixels(tmp_path / "drawn" / f"{i}.png")[None],
            pixels(tmp_path / "maps" / f"{i}.png")[None, ..., 0],
        )
        expected = {
            "ms-ssim": lambda f, w: map_similarity(f[:, None, ..., 0].float(), w[:, None]),
            "depth-rmse": lambda f, w: depth_rmse(f[..., 0].float() + (kind == "depth"), w),
        }[METRICS[kind]](found, wanted)
        assert result.per_image[str(i)] == pytest.approx(expected.mean)


def test_classes_are_scored_over_all_pixels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Known(Scripted):
        pass

    monkeypatch.setattr("varkit.metrics.control_score.Segmentation", Known)
    monkeypatch.setattr("varkit.metrics.control_score.build_extractor", lambda *_, **__: Known())
    draw = np.random.default_rng(0)
    found, wanted = (draw.integers(0, 4, (3, 8, 8), dtype=np.uint8) for _ in range(2))
    for folder, maps in (("drawn", found), ("labels", wanted)):
        (tmp_path / folder).mkdir()
        for i, one in enumerate(maps):
            Image.fromarray(one if folder == "labels" else one[..., None].repeat(3, -1)).save(
                tmp_path / folder / f"{i}.png"
            )
    result = control_score(tmp_path / "drawn", tmp_path / "labels", "seg", batch_size=2)
    first, second = torch.from_numpy(found), torch.from_numpy(wanted)
    assert result.mean == pytest.approx(mean_iou(first, second, 4).miou)
    assert result.per_image["1"] == pytest.approx(mean_iou(first[1:2], second[1:2], 4).miou)
    save(tmp_path / "labels" / "0.png", 1, 8, 8)
    with pytest.raises(ValueError, match="a label map is grey"):
        control_score(tmp_path / "drawn", tmp_path / "labels", "seg")


def test_scores_refuse_what_does_not_fit(images: Path, maps: Path) -> None:
    assert "no metric" in run("control-score", "map", images, maps, code=2).stderr
    assert "for seg alone" in run("control-score", "canny", images, maps, "--labels", "ade20k", code=2).stderr
    (maps / "rose" / "1.png").unlink()
    assert "1 of 5" in run("control-score", "canny", images, maps, code=2).stderr
    told = json.loads(run("control-score", "canny", images, maps, "--allow-missing", "--json").stdout)
    assert told["missing"] == 1 and told["images"] == 4
    save(maps / "rose" / "0.png", 3, 8, 8)
    error = run("control-score", "canny", images, maps, "--allow-missing", code=2).stderr
    assert "bring them to one size" in error and error.count("\n") == 1
