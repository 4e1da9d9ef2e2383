"""Opening, transforming and checking image sets. Everything is written by the tests or shipped."""

import gzip
import json
import logging
import struct
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader, Subset

from varkit.data import (
    FASHION_CLASSES,
    ImageTransform,
    check_images,
    collate,
    fashion,
    open_images,
    prepare_fashion_mnist,
)
from varkit.data.transforms import MAX_FAILURES, Mode, to_rgb

SLICE = Path(__file__).parent / "data" / "fashion_slice.npz"
MODES = get_args(Mode)


def noise(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def save(path: Path, seed: int = 0, size: tuple[int, int] = (20, 24)) -> Path:
    """A PNG of noise, size (height, width)."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(noise(*size, 3, seed=seed)).save(path)
    return path


def idx_bytes(array: np.ndarray) -> bytes:
    return struct.pack(f">BBBB{array.ndim}I", 0, 0, 8, array.ndim, *array.shape) + array.tobytes()


def write_idx(folder: Path, counts: dict[str, int], gz: bool = False) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for prefix, n in counts.items():
        labels = (np.arange(n) % 10).astype(np.uint8)
        for kind, array in (("images-idx3", noise(n, 28, 28, seed=n)), ("labels-idx1", labels)):
            raw, name = idx_bytes(array), f"{prefix}-{kind}-ubyte"
            (folder / (f"{name}.gz" if gz else name)).write_bytes(gzip.compress(raw, mtime=0) if gz else raw)


@pytest.fixture
def classes(tmp_path: Path) -> Path:
    """Class folders b (nested), a, c: 3, 4 and 2 images."""
    for i in range(3):
        save(tmp_path / "b" / "nested" / f"{i}.png", i)
    for i in range(4):
        save(tmp_path / "a" / f"{i}.PNG", 10 + i)
    for i in range(2):
        save(tmp_path / "c" / f"{i}.bmp", 20 + i)
    return tmp_path


# --- the transform -------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("channels", [1, 3])
def test_every_mode_gives_the_size_the_range_and_three_channels(mode: Mode, channels: int) -> None:
    images = torch.from_numpy(noise(6, channels, 17, 23))
    images[0], images[1] = 0, 255
    out = ImageTransform((24, 32), mode, flip=True)(images)
    assert out.shape == (6, 3, 24, 32) and out.dtype == torch.float32 and out.is_contiguous()
    assert out.min() == -1 and out.max() == 1
    assert channels == 3 or (out == out[:, :1]).all()


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("shape", [(20, 24), (10, 40), (32, 32)])
def test_a_result_depends_on_seed_and_key_only(mode: Mode, shape: tuple[int, int]) -> None:
    images, keys = torch.from_numpy(noise(8, 3, *shape)), torch.arange(100, 108)
    transform = ImageTransform(40, mode, flip=True, seed=3)
    whole = transform(images, keys)
    order = torch.tensor([5, 0, 7])
    assert torch.equal(transform(images[order], keys[order]), whole[order])
    assert torch.equal(transform(images[2], 102), whole[2])
    pil = [Image.fromarray(image.permute(1, 2, 0).numpy()) for image in images]
    one = transform.apply_pil(pil[4], transform.uniforms(keys[4:5])[0])
    assert torch.equal(one, transform.apply_pil(pil[4], transform.uniforms(keys)[4]))


@pytest.mark.parametrize("mode", ["crop", "pad"])
def test_keys_and_seeds_change_what_is_random(mode: Mode) -> None:
    image = torch.from_numpy(noise(1, 3, 20, 20)).repeat(64, 1, 1, 1)
    transform = ImageTransform(20, mode, enlarge=1.3, flip=True)
    first = transform(image, torch.arange(64))
    assert not torch.equal(first, transform(image, torch.arange(64, 128)))
    other_seed = ImageTransform(20, mode, enlarge=1.3, flip=True, seed=1)
    assert not torch.equal(first, other_seed(image, torch.arange(64)))


def test_byte_values_map_exactly() -> None:
    ramp = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16)
    out = ImageTransform(16, "pad")(ramp)
    assert torch.equal(out[0, 1].flatten(), torch.arange(256) / 127.5 - 1)


@pytest.mark.parametrize("flip", [False, True])
def test_padding_is_minus_one_around_the_untouched_picture(flip: bool) -> None:
    image = torch.from_numpy(noise(1, 3, 28, 27)).repeat(32, 1, 1, 1)
    out = ImageTransform((32, 32), "pad", flip=flip)(image)
    inside = out[:, :, 2:30, 2:29]
    expected = image.float() / 127.5 - 1
    mirrored = (inside != expected).flatten(1).any(1)
    assert mirrored.any() == flip
    expected[mirrored] = expected[mirrored].flip(-1)
    torch.testing.assert_close(inside, expected, atol=1e-6, rtol=0)
    out[:, :, 2:30, 2:29] = -1
    assert (out == -1).all()


def test_crops_reach_every_offset_evenly() -> None:
    position = torch.arange(144, dtype=torch.uint8).view(1, 1, 12, 12)  # pixel value = its place
    images = position.repeat(5000, 1, 1, 1)
    out = ImageTransform(9, "crop", enlarge=12 / 9)(images)
    corner = ((out[:, 0, 0, 0] + 1) * 127.5).round().long()
    counts = torch.bincount(corner, minlength=144).view(12, 12)
    assert (counts[:4, :4] > 0).all() and counts[:4, :4].sum() == 5000
    assert (counts[:4, :4] - 5000 / 16).abs().max() < 5 * (5000 / 16) ** 0.5


def test_half_of_the_images_are_mirrored() -> None:
    images = torch.tensor([0, 255], dtype=torch.uint8).view(1, 1, 1, 2).repeat(4000, 1, 1, 1)
    flipped = ImageTransform((1, 2), "pad", flip=True)(images)[:, 0, 0, 0] == 1
    assert abs(flipped.float().mean() - 0.5) < 0.04


@pytest.mark.parametrize("height, width", [(333, 500), (500, 375), (300, 300), (100, 64)])
def test_center_is_vars_validation_rule(height: int, width: int) -> None:
    from torchvision.transforms import CenterCrop, InterpolationMode, Resize

    image = Image.fromarray(noise(height, width, 3))
    official = CenterCrop(256)(Resize(288, InterpolationMode.LANCZOS)(image))
    transform = ImageTransform(256, "center")
    ours = transform.apply_pil(image, torch.zeros(3))
    theirs = torch.from_numpy(np.array(official)).permute(2, 0, 1).float() / 127.5 - 1
    torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=0)


def test_squash_keeps_the_whole_picture() -> None:
    image = torch.zeros(1, 1, 10, 40, dtype=torch.uint8)
    image[..., 20:] = 255
    out = ImageTransform(10, "squash")(image)
    assert (out[..., :3] < -0.9).all() and (out[..., 7:] > 0.9).all()


@pytest.mark.parametrize(
    "wrong, word",
    [
        ({"size": 0}, "size"),
        ({"size": (8, 8, 8)}, "height"),
        ({"size": 8.0}, "size"),
        ({"size": 8, "mode": "stretch"}, "squash"),
        ({"size": 8, "enlarge": 0.9}, "enlarge"),
        ({"size": 8, "enlarge": float("nan")}, "enlarge"),
        ({"size": 8, "flip": 1}, "flip"),
        ({"size": 8, "seed": None}, "seed"),
    ],
)
def test_wrong_settings_are_named(wrong: dict, word: str) -> None:
    with pytest.raises(ValueError, match=word):
        ImageTransform(**wrong)


def test_wrong_inputs_are_named() -> None:
    transform = ImageTransform(8, "pad")
    with pytest.raises(ValueError, match="9x8 does not fit into pad size 8x8"):
        transform(torch.zeros(1, 3, 9, 8, dtype=torch.uint8))
    with pytest.raises(ValueError, match="float32"):
        transform(torch.zeros(1, 3, 8, 8))
    with pytest.raises(ValueError, match="channels"):
        transform(torch.zeros(1, 4, 8, 8, dtype=torch.uint8))
    with pytest.raises(ValueError, match="keys"):
        transform(torch.zeros(2, 3, 8, 8, dtype=torch.uint8), torch.arange(3))
    from_yaml: Any = [8, 9]
    assert ImageTransform(from_yaml) == ImageTransform((8, 9))


# --- pixel formats -------------------------------------------------------------------------------


def test_formats_become_the_rgb_a_viewer_shows() -> None:
    def pixel(image: Image.Image) -> list[Any]:
        rgb = to_rgb(image)
        assert rgb.mode == "RGB"
        return np.array(rgb)[0, 0].tolist()

    wide = np.array([[65535, 32896, 0]], np.uint16)
    assert np.array(to_rgb(Image.fromarray(wide)))[0, :, 0].tolist() == [255, 128, 0]
    assert np.array(to_rgb(Image.fromarray(wide.astype(np.int32))))[0, :, 0].tolist() == [
        255,
        128,
        0,
    ]
    assert pixel(Image.new("RGBA", (1, 1), (255, 0, 0, 0))) == [255, 255, 255]
    assert pixel(Image.new("RGBA", (1, 1), (255, 0, 0, 255))) == [255, 0, 0]
    assert pixel(Image.new("RGBA", (1, 1), (0, 0, 0, 51))) == [204, 204, 204]
    assert pixel(Image.new("LA", (1, 1), (0, 0))) == [255, 255, 255]
    assert pixel(Image.new("La", (1, 1), (0, 0))) == [255, 255, 255]
    assert pixel(Image.new("L", (1, 1), 77)) == [77, 77, 77]
    assert pixel(Image.new("1", (1, 1), 1)) == [255, 255, 255]
    assert pixel(Image.new("CMYK", (1, 1), (0, 255, 255, 0))) == [255, 0, 0]
    palette = Image.new("P", (1, 1), 1)
    palette.putpalette([0, 0, 0, 10, 20, 30])
    assert pixel(palette) == [10, 20, 30]
    palette.info["transparency"] = 1
    assert pixel(palette) == [255, 255, 255]
    with pytest.raises(ValueError, match="float"):
        to_rgb(Image.new("F", (1, 1)))


def test_formats_survive_their_files(tmp_path: Path) -> None:
    Image.fromarray(np.full((4, 4), 65535, np.uint16)).save(tmp_path / "a16.png")
    Image.new("CMYK", (4, 4), (0, 255, 255, 0)).save(tmp_path / "b_cmyk.jpg", quality=100)
    Image.new("RGB", (4, 4), (9, 8, 7)).quantize(4).save(tmp_path / "c_palette.png")
    Image.new("RGBA", (4, 4), (0, 0, 0, 0)).save(tmp_path / "d_alpha.webp", lossless=True)
    exif = Image.Exif()
    exif[0x0112] = 6  # rotate by 90 degrees clockwise to see it upright
    Image.fromarray(noise(4, 6, 3)).save(tmp_path / "e_turned.png", exif=exif)
    dataset = open_images(tmp_path)
    corners = [dataset[i]["image"][:, 0, 0].tolist() for i in range(4)]
    assert corners[0] == corners[3] == [255, 255, 255] and corners[2] == [9, 8, 7]
    assert corners[1][0] > 250 and max(corners[1][1:]) < 5
    upright = np.rot90(noise(4, 6, 3), k=-1)
    assert np.array_equal(dataset[4]["image"].permute(1, 2, 0), upright)
    assert not dataset.skipped


# --- the data set --------------------------------------------------------------------------------


def test_items_and_batches_agree(classes: Path) -> None:
    transform = ImageTransform(16, flip=True)
    for source in (classes, SLICE):
        dataset = open_images(source, transform=transform)
        entries: list[int | tuple[int, int]] = [3, (0, 77), (8, 2**40), -1]
        batch = dataset.__getitems__(entries)
        items = [dataset[entry] for entry in entries]
        stacked = collate(items)
        assert stacked.keys() == batch.keys()
        assert all(torch.equal(stacked[name], batch[name]) for name in batch)
        assert batch["images"].dtype == torch.float32 and batch["images"].shape == (4, 3, 16, 16)
        assert batch["index"].tolist() == [3, 0, 8, len(dataset) - 1]
        assert batch["keys"].tolist() == [3, 77, 2**40, len(dataset) - 1]
        assert batch["labels"].dtype == batch["index"].dtype == batch["keys"].dtype == torch.int64
        assert isinstance(items[0]["label"], int) and isinstance(items[0]["key"], int)
        assert collate(batch) is batch
        with pytest.raises(IndexError):
            dataset[len(dataset)]


def test_without_transform_pixels_come_as_stored(classes: Path) -> None:
    folder = open_images(classes)
    assert np.array_equal(folder[0]["image"].permute(1, 2, 0), noise(20, 24, 3, seed=10))
    array = open_images(SLICE)
    assert array[0]["image"].dtype == torch.uint8 and array[0]["image"].shape == (3, 28, 28)
    assert array.__getitems__([1, 2])["images"].shape == (2, 3, 28, 28)
    save(classes / "a" / "9.png", size=(8, 8))
    with pytest.raises(ValueError, match="ImageTransform"):
        open_images(classes).__getitems__([0, 4])
    with pytest.raises(ValueError, match=r"9.png.*pad size 4x4|0.PNG.*pad size 4x4"):
        _ = open_images(classes, transform=ImageTransform(4, "pad"))[0]


@pytest.mark.parametrize("workers", [0, 2])
def test_loader_workers_change_nothing(classes: Path, workers: int) -> None:
    dataset = open_images(classes, transform=ImageTransform(12, flip=True, seed=5))
    entries = [(i, 1000 + i) for i in [4, 2, 7, 0, 1, 8]]
    loader = DataLoader(dataset, batch_size=2, sampler=entries, num_workers=workers, collate_fn=collate)
    images = torch.cat([batch["images"] for batch in loader])
    assert torch.equal(images, torch.stack([dataset[entry]["image"] for entry in entries]))
    part = DataLoader(Subset(dataset, [1, 2, 3]), batch_size=3, collate_fn=collate)
    assert next(iter(part))["index"].tolist() == [1, 2, 3]


# --- sources -------------------------------------------------------------------------------------


def test_class_folders(classes: Path) -> None:
    (classes / ".hidden").mkdir()
    save(classes / "a" / "._junk.png")
    (classes / "a" / "notes.txt").write_text("not an image")
    dataset = open_images(classes)
    assert dataset.classes == ["a", "b", "c"] and dataset.num_classes == 3
    assert dataset.labels.tolist() == [0] * 4 + [1] * 3 + [2] * 2
    assert dataset.labels.dtype == torch.int64 and dataset.kind == "class folders"
    assert [dataset[i]["label"] for i in (0, 4, 8)] == [0, 1, 2]
    assert dataset.name == classes.name and dataset.source == str(classes)


def test_flat_folder(tmp_path: Path) -> None:
    for name in ("b.png", "a.png"):
        save(tmp_path / name, ord(name[0]))
    dataset = open_images(str(tmp_path))
    assert dataset.labels.tolist() == [-1, -1] and dataset.classes == []
    assert np.array_equal(dataset[0]["image"].permute(1, 2, 0), noise(20, 24, 3, seed=ord("a")))


@pytest.mark.parametrize("held_out", ["val", "test", "validation"])
def test_split_folders_share_the_class_ids_of_train(tmp_path: Path, held_out: str) -> None:
    for name in ("x", "y", "z"):
        save(tmp_path / "train" / name / "0.png")
    save(tmp_path / held_out / "z" / "0.png")
    assert len(open_images(tmp_path)) == 3
    for split in ("val", "test"):  # one held-out folder: any of its names finds it
        held = open_images(tmp_path, split=split)
        assert held.classes == ["x", "y", "z"] and held.labels.tolist() == [2]
    save(tmp_path / held_out / "new" / "0.png")
    with pytest.raises(ValueError, match="lacks: new"):
        open_images(tmp_path, split=held_out)


def test_split_folders_of_metadata_share_class_ids(tmp_path: Path) -> None:
    for split, names in (("train", "abc"), ("val", "c")):
        for name in names:
            save(tmp_path / split / f"{name}.png")
        lines = [json.dumps({"file_name": f"{name}.png", "label": name}) for name in names]
        lines.append(json.dumps({"file_name": f"{names[0]}.png"}))
        (tmp_path / split / "metadata.jsonl").write_text("\n".join(lines))
    held = open_images(tmp_path, split="val")
    assert held.classes == ["a", "b", "c"] and held.labels.tolist() == [2, -1]


def test_a_split_that_is_not_there_is_an_error(classes: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="did you mean 'train'"):
        open_images(classes, split="trian")
    with pytest.raises(ValueError, match="no split 'val'"):
        open_images(classes, split="val")
    with pytest.raises(ValueError, match="no split 'test'"):
        open_images(SLICE, split="test")


@pytest.mark.parametrize("shape", [(5, 8, 9, 3), (5, 8, 9, 1), (5, 8, 9)])
def test_arrays(tmp_path: Path, shape: tuple[int, ...]) -> None:
    images = noise(*shape)
    np.savez(tmp_path / "x.npz", images, np.array([2, 0, -1, 1, 2]))
    np.savez(tmp_path / "plain.npz", images)
    np.save(tmp_path / "x.npy", images)
    labelled, plain, npy = (open_images(tmp_path / n) for n in ("x.npz", "plain.npz", "x.npy"))
    assert labelled.labels.tolist() == [2, 0, -1, 1, 2] and labelled.classes == ["0", "1", "2"]
    assert plain.labels.tolist() == npy.labels.tolist() == [-1] * 5 and plain.classes == []
    expected = images if images.ndim == 4 else images[..., None]
    for dataset in (labelled, plain, npy):
        stored = dataset.__getitems__(range(5))["images"].permute(0, 2, 3, 1)
        assert np.array_equal(stored, np.broadcast_to(expected, (5, 8, 9, 3)))


@pytest.mark.parametrize(
    "arrays, message",
    [
        ({"images": noise(2, 8, 8, 3)}, "no arr_0"),
        ({"arr_0": noise(2, 8, 8, 3).astype(np.float32)}, "float32; expected uint8"),
        ({"arr_0": noise(2, 3, 8, 8)}, r"\(2, 3, 8, 8\); expected \(N, h, w, 3\)"),
        ({"arr_0": noise(8, 8, 3)}, r"\(8, 8, 3\); expected"),
        ({"arr_0": noise(2, 8, 8, 3), "arr_1": np.zeros(3, int)}, r"expected ints of shape \(2,\)"),
        ({"arr_0": noise(2, 8, 8, 3), "arr_1": np.zeros(2)}, "float64"),
        ({"arr_0": noise(2, 8, 8, 3), "arr_1": np.array([0, -5])}, "from -5 to 0"),
        ({"arr_0": noise(0, 8, 8, 3)}, "holds no images"),
        ({"arr_0": np.array([{}, []], dtype=object)}, "pickled objects are refused"),
    ],
)
def test_wrong_arrays_are_explained(tmp_path: Path, arrays: dict, message: str) -> None:
    np.savez(tmp_path / "x.npz", **arrays)
    with pytest.raises(ValueError, match=message):
        open_images(tmp_path / "x.npz")


def test_pickles_and_damaged_archives_are_refused(tmp_path: Path) -> None:
    class Trap:
        def __reduce__(self) -> tuple:
            return (Path.touch, (tmp_path / "sprung",))

    np.save(tmp_path / "x.npy", np.array([Trap()], dtype=object), allow_pickle=True)
    (tmp_path / "cut.npz").write_bytes(SLICE.read_bytes()[:1000])
    (tmp_path / "text.npy").write_text("hello")
    for name in ("x.npy", "cut.npz", "text.npy"):
        with pytest.raises(ValueError, match=f"{name} cannot be read"):
            open_images(tmp_path / name)
    assert not (tmp_path / "sprung").exists()


def test_shipped_slice() -> None:
    dataset = open_images(SLICE)
    assert torch.bincount(dataset.labels).tolist() == [30] * 10
    assert dataset.__getitems__(range(300))["images"].shape == (300, 3, 28, 28)
    assert SLICE.stat().st_size < 300_000


@pytest.mark.parametrize("gz", [False, True])
def test_idx(tmp_path: Path, gz: bool) -> None:
    write_idx(tmp_path, {"train": 12, "t10k": 11}, gz)
    train, test = open_images(tmp_path), open_images(tmp_path, split="test")
    assert (len(train), len(test)) == (12, 11) and train.classes == [str(i) for i in range(10)]
    assert np.array_equal(test[5]["image"][2], noise(11, 28, 28, seed=11)[5])
    suffix = ".gz" if gz else ""
    one = open_images(tmp_path / f"t10k-images-idx3-ubyte{suffix}")
    assert torch.equal(one.labels, test.labels)
    with pytest.raises(ValueError, match="labels file; give the images"):
        open_images(tmp_path / f"t10k-labels-idx1-ubyte{suffix}")
    (tmp_path / f"t10k-labels-idx1-ubyte{suffix}").unlink()
    with pytest.raises(FileNotFoundError, match="expected t10k-labels-idx1-ubyte"):
        open_images(tmp_path, split="test")


@pytest.mark.parametrize(
    "raw, message",
    [
        (b"\x89PNG" + bytes(20), "0x89504e47, not the magic"),
        (b"\0\0\x0d\x03" + bytes(20), "not the magic"),
        (b"", "not the magic"),
        (b"\0\0\x08\x03" + bytes(4), "inside its header"),
        (idx_bytes(noise(2, 4, 4))[:-1], "= 32 bytes but 31 follow"),
        (idx_bytes(noise(3, 4, 4)), r"\(3, 4, 4\).*\(2,\)"),
        (gzip.compress(idx_bytes(noise(2, 4, 4)), mtime=0)[:-9], "damaged gzip"),
    ],
)
def test_damaged_idx_is_explained(tmp_path: Path, raw: bytes, message: str) -> None:
    write_idx(tmp_path, {"train": 2})
    (tmp_path / "train-images-idx3-ubyte").write_bytes(raw)
    with pytest.raises(ValueError, match=message):
        open_images(tmp_path)


# --- metadata.jsonl ------------------------------------------------------------------------------


def metadata(folder: Path, *lines: object) -> Path:
    text = "\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines)
    (folder / "metadata.jsonl").write_text(text + "\n")
    return folder


def test_metadata_with_names_and_texts(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for name in ("sub/a.png", "b.png", "c.png", "unlisted.png"):
        save(tmp_path / name)
    metadata(
        tmp_path,
        {"file_name": "sub/a.png", "label": "zebra", "text": "a zebra"},
        {"file_name": "gone.png", "label": "ant"},
        "",
        {"file_name": "b.png", "label": "ant"},
        {"file_name": "notes.txt"},
        {"file_name": "c.png"},
    )
    dataset = open_images(tmp_path)
    assert dataset.classes == ["ant", "zebra"] and dataset.labels.tolist() == [1, 0, -1]
    assert dataset.texts == ["a zebra", "", ""]
    assert dataset[0]["text"] == "a zebra"
    assert collate([dataset[0], dataset[1]])["texts"] == ["a zebra", ""]
    assert dataset.__getitems__([1, 0])["texts"] == ["", "a zebra"]
    assert [Path(skipped.path).name for skipped in dataset.skipped] == ["gone.png", "notes.txt"]
    assert "gone.png" in caplog.text and "unlisted.png" in caplog.text


def test_metadata_with_numbers(tmp_path: Path) -> None:
    save(tmp_path / "a.png")
    metadata(tmp_path, {"file_name": "a.png", "label": 2}, {"file_name": "a.png", "label": 0})
    dataset = open_images(tmp_path)
    assert dataset.labels.tolist() == [2, 0] and dataset.classes == ["0", "1", "2"]
    assert dataset.texts is None and "text" not in dataset[0]


@pytest.mark.parametrize(
    "line, message",
    [
        ("{'file_name': 'a.png'}", "metadata.jsonl:2: not JSON"),
        ('["a.png"]', "metadata.jsonl:2: list"),
        ({"label": 1}, "metadata.jsonl:2: file_name is None"),
        ({"file_name": "a.png", "label": 1.5}, "metadata.jsonl:2: label is 1.5"),
        ({"file_name": "a.png", "label": True}, "metadata.jsonl:2: label is True"),
        ({"file_name": "a.png", "label": -1}, "count from 0"),
        ({"file_name": "a.png", "text": 3}, "text is 3"),
        ({"file_name": "a.png", "label": "name"}, "ints in some lines"),
    ],
)
def test_wrong_metadata_is_named_by_line(tmp_path: Path, line: object, message: str) -> None:
    save(tmp_path / "a.png")
    metadata(tmp_path, {"file_name": "a.png", "label": 0}, line)
    with pytest.raises(ValueError, match=message):
        open_images(tmp_path)


def test_metadata_without_any_file(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"gone.png: no such file"):
        open_images(metadata(tmp_path, {"file_name": "gone.png"}))


# --- what is wrong with a source -----------------------------------------------------------------


def test_missing_paths_and_misspelt_names(classes: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"did you mean 'fashion-mnist'.*Allowed: a folder"):
        open_images("fashion_mnist")
    (classes / "flowers").mkdir()
    with pytest.raises(FileNotFoundError, match="did you mean 'flowers'"):
        open_images(classes / "flower")
    with pytest.raises(FileNotFoundError, match="does not exist"):
        open_images("/nowhere/at/all")
    with pytest.raises(ValueError, match="root is only for named sets"):
        open_images(classes, root=classes)


def test_folders_without_images(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="holds no images but nothing"):
        open_images(tmp_path)
    (tmp_path / "a.txt").write_text("x")
    with pytest.raises(ValueError, match=r"only \.txt; allowed endings: \.jpg"):
        open_images(tmp_path)
    with pytest.raises(ValueError, match="no image data that can be read"):
        open_images(tmp_path / "a.txt")
    (tmp_path / "a.png").touch()
    with pytest.raises(ValueError, match="only 1 empty files"):
        open_images(tmp_path)
    (tmp_path / "a.png").write_text("no image")
    with pytest.raises(ValueError, match="no readable image"):
        open_images(tmp_path)
    with pytest.raises(ValueError, match="is one image; give the folder"):
        open_images(tmp_path / "a.png")


def damage(folder: Path) -> None:
    """Of class a: 0 is truncated, 1 is text, 3 is empty; 2 stays good."""
    whole = (folder / "a" / "0.PNG").read_bytes()
    (folder / "a" / "0.PNG").write_bytes(whole[: len(whole) // 2])
    (folder / "a" / "1.PNG").write_text("this is text")
    (folder / "a" / "3.PNG").write_bytes(b"")


def test_damaged_images_are_replaced_named_and_logged_once(classes: Path, caplog: pytest.LogCaptureFixture) -> None:
    damage(classes)
    dataset = open_images(classes, transform=ImageTransform(16))
    assert len(dataset) == 8
    batch = dataset.__getitems__([(0, 50), (1, 51), (2, 52), (3, 53)])
    assert batch["index"].tolist() == [2, 2, 2, 3]
    assert batch["labels"].tolist() == [0, 0, 0, 1] and batch["keys"].tolist() == [50, 51, 52, 53]
    assert dataset[0]["index"] == 2
    assert sorted(Path(s.path).name for s in dataset.skipped) == ["0.PNG", "1.PNG", "3.PNG"]
    assert all(s.reason for s in dataset.skipped)
    records = [r for r in caplog.records if r.name == "varkit.data" and r.levelno == logging.WARNING]
    for name in ("0.PNG", "1.PNG", "3.PNG"):
        assert sum(name in r.getMessage() for r in records) == 1


def test_the_last_image_is_replaced_by_the_first(classes: Path) -> None:
    (classes / "c" / "1.bmp").write_text("broken")
    dataset = open_images(classes)
    assert dataset[8]["index"] == 0 and dataset[8]["key"] == 8


def test_workers_report_what_they_skipped(classes: Path) -> None:
    (classes / "c" / "0.bmp").write_text("broken")
    dataset = open_images(classes, transform=ImageTransform(16))
    assert not dataset.skipped
    loader = DataLoader(dataset, batch_size=3, num_workers=1, collate_fn=collate)
    assert [i for batch in loader for i in batch["index"].tolist()] == [0, 1, 2, 3, 4, 5, 6, 8, 8]
    assert [Path(s.path).name for s in dataset.skipped] == ["0.bmp"]


def test_a_set_of_broken_images_is_given_up(tmp_path: Path) -> None:
    save(tmp_path / "000.png")
    for i in range(1, MAX_FAILURES + 3):
        (tmp_path / f"{i:03}.png").write_text("broken")
    dataset = open_images(tmp_path)
    with pytest.raises(ValueError, match="no readable image among 100 in a row"):
        dataset[1]
    assert dataset[0]["index"] == 0


# --- the report ----------------------------------------------------------------------------------


@pytest.mark.parametrize("workers", [0, 2])
def test_report_of_a_folder(classes: Path, workers: int) -> None:
    damage(classes)
    (classes / "empty").mkdir()
    (classes / "b" / "copy.png").write_bytes((classes / "b" / "nested" / "0.png").read_bytes())
    Image.new("L", (5, 6)).save(classes / "c" / "grey.png")
    save(classes / "loose.png")
    report = check_images(classes, workers=workers)
    assert (report.total, report.readable, report.duplicates) == (11, 8, 1)
    assert report.classes == {"a": 1, "b": 4, "c": 3, "empty": 0}
    assert report.sizes == {"20x24": 7, "6x5": 1} and report.modes == {"RGB": 7, "L": 1}
    assert sorted(Path(b.path).name for b in report.broken) == ["0.PNG", "1.PNG", "3.PNG"]
    warnings = "\n".join(report.warnings)
    for words in ("empty holds no images", "fewer than 10", "2 different sizes", "1 images equal"):
        assert words in warnings
    assert "1 images outside" in warnings
    plain = json.loads(json.dumps(report.to_dict()))
    assert plain["broken"][0].keys() == {"path", "reason"} and plain["kind"] == "class folders"
    text = "\n".join(report.lines())
    assert "8 readable of 11" in text and "1.PNG" in text and "warning" in text


def test_report_of_many_sizes_keeps_the_ten_commonest(tmp_path: Path) -> None:
    for i in range(13):
        save(tmp_path / f"{i}.png", i, (8, 8 + i))
    sizes = check_images(tmp_path).sizes
    assert len(sizes) == 11 and sizes["other"] == 3 and sum(sizes.values()) == 13


def test_report_of_an_array(capsys: pytest.CaptureFixture[str]) -> None:
    report = check_images(SLICE, progress=True)
    assert report.readable == report.total == 300 and not report.broken and not report.warnings
    assert report.sizes == {"28x28": 300} and report.modes == {"L": 300}
    assert "checked 300 of 300\n" in capsys.readouterr().err
    with pytest.raises(ValueError, match="workers"):
        check_images(SLICE, workers=-1)


# --- Fashion-MNIST by name -----------------------------------------------------------------------


@pytest.mark.parametrize("below", [".", "FashionMNIST/raw"])
def test_fashion_mnist_from_a_root(tmp_path: Path, below: str) -> None:
    write_idx(tmp_path / below, {"train": 20, "t10k": 10}, gz=True)
    train = open_images("fashion-mnist", root=tmp_path, transform=ImageTransform(32, "pad"))
    assert train.classes == list(FASHION_CLASSES) and train.num_classes == 10
    assert train.name == "fashion-mnist" and len(train) == 20
    assert train[0]["image"].shape == (3, 32, 32)
    for split in ("test", "val", "validation"):
        assert len(open_images("fashion-mnist", root=tmp_path, split=split)) == 10


def test_fashion_mnist_from_the_system(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_idx(tmp_path / "package", {"train": 20})
    monkeypatch.setattr(fashion, "SYSTEM_FOLDERS", (tmp_path / "none", tmp_path / "package"))
    assert len(open_images("fashion-mnist")) == 20


def test_fashion_mnist_by_download(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from torchvision import datasets

    def download(self: datasets.FashionMNIST) -> None:
        write_idx(Path(self.raw_folder), {"train": 20, "t10k": 10})

    monkeypatch.setattr(fashion, "SYSTEM_FOLDERS", ())
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(datasets.FashionMNIST, "download", download)
    dataset = open_images("fashion-mnist", split="test")
    assert len(dataset) == 10 and dataset.source.startswith(str(tmp_path / "varkit"))


@pytest.mark.parametrize("error", [RuntimeError("mirrors failed"), OSError("no network")])
def test_a_failed_download_says_how_to_get_the_data(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    from torchvision import datasets

    def download(self: datasets.FashionMNIST) -> None:
        raise error

    monkeypatch.setattr(fashion, "SYSTEM_FOLDERS", ())
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(datasets.FashionMNIST, "download", download)
    with pytest.raises(FileNotFoundError) as caught:
        open_images("fashion-mnist")
    for words in (str(error), "apt-get install dataset-fashion-mnist", "as root", "run again"):
        assert words in str(caught.value)


def test_fashion_mnist_root_without_it(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="holds no Fashion-MNIST train images"):
        open_images("fashion-mnist", root=tmp_path)


def test_prepared_fashion_mnist_opens_again(tmp_path: Path) -> None:
    write_idx(tmp_path / "raw", {"train": 20, "t10k": 10})
    out = tmp_path / "prepared"
    assert prepare_fashion_mnist(out, root=tmp_path / "raw") == {"train": 20, "test": 10}
    assert sorted(path.name for path in out.iterdir()) == ["test.npz", "train.npz"]
    original = open_images("fashion-mnist", root=tmp_path / "raw", split="test")
    again = open_images(out, split="test")
    with np.load(out / "test.npz") as stored:
        assert stored["arr_0"].shape == (10, 28, 28, 3) and stored["arr_0"].dtype == np.uint8
    assert torch.equal(original.labels, again.labels)
    assert torch.equal(original[3]["image"], again[3]["image"])


def test_a_failed_preparation_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> None:
        raise OSError("disk full")

    write_idx(tmp_path / "raw", {"train": 20, "t10k": 10})
    monkeypatch.setattr(np, "savez_compressed", fail)
    with pytest.raises(OSError, match="disk full"):
        prepare_fashion_mnist(tmp_path / "out", root=tmp_path / "raw")
    assert list((tmp_path / "out").iterdir()) == []
