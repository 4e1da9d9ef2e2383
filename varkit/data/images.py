"""Image data sets: one class, one function that opens anything, one that checks it.

    dataset = open_images("flowers/", transform=ImageTransform(256, flip=True))
    loader = DataLoader(dataset, batch_size=64, shuffle=True, collate_fn=collate)

Shapes: N images in the set, B in a batch, h w size as stored, H W size after the transform.
"""

import logging
import os
import re
from pathlib import Path

from varkit.config import nearest
from varkit.data.arrays import open_array, open_idx
from varkit.data.dataset import ImageDataset, collate
from varkit.data.fashion import FASHION_CLASSES, prepare_fashion_mnist, read_fashion_mnist
from varkit.data.folders import open_folder
from varkit.data.hugging_face import PREFIX, open_hugging_face
from varkit.data.splits import SPLITS
from varkit.data.tars import is_tars, open_tars, tar_paths
from varkit.data.transforms import EXTENSIONS, MAX_FAILURES, ArrayPixels, FilePixels, ImageTransform, SkippedImage

__all__ = [
    "DATASETS",
    "ImageDataset",
    "ImageTransform",
    "SkippedImage",
    "collate",
    "open_images",
    "prepare_fashion_mnist",
]

log = logging.getLogger("varkit.data")

DATASETS = ("fashion-mnist",)
ALLOWED = (
    "a folder with one sub-folder per class, a folder with metadata.jsonl, a folder of images, "
    "webdataset tars (a folder, a file, or a pattern such as train-{000..009}.tar), hf:NAME or hf:PATH, "
    f"a .npz or .npy array, IDX files, or a name ({', '.join(DATASETS)})"
)


def open_images(
    source: str | Path,
    *,
    split: str = "train",
    transform: ImageTransform | None = None,
    root: str | Path | None = None,
) -> ImageDataset:
    """Open a set of images, whatever form it is in. Nothing is decoded but one image, as a probe.

    Args:
        source: one of
            - a folder with one sub-folder per class (sorted names are the ids, files may be
              nested);
            - a folder with metadata.jsonl: lines of `file_name`, optional `label` (all ints, or all
              names) and `text` or `caption`;
            - a folder of images without classes;
            - a folder of train/ and val|validation|test/, each one of the above (class ids are
              those of train/), or of train.npz and so on;
            - .npz in ADM layout (arr_0 images, optional arr_1 labels) or .npy: uint8 (N, h, w, 3),
              (N, h, w, 1) or (N, h, w);
            - IDX files, gzipped or not: their folder, or the images file, labels beside it;
            - webdataset tars: a folder of them, one, or a pattern; see `varkit.data.tars`;
            - `hf:NAME` or `hf:PATH`, for Hugging Face's `datasets`; see `varkit.data.hugging_face`;
            - "fashion-mnist".
        split: train, val, validation or test, where the source has splits; a held-out name means
            the only held-out split there is. A source without splits takes only "train": itself.
        root: where a named set lies; see `varkit.data.fashion.read_fashion_mnist`.
    Raises: FileNotFoundError if it does not exist; ValueError if it holds no readable image, is
        damaged, or has no such split. Both say what is allowed.
    """
    if split not in SPLITS:
        raise ValueError(f"split is {split!r}; choose one of {', '.join(SPLITS)}{nearest(split, SPLITS)}")
    if isinstance(source, str) and source in DATASETS:
        pixels, labels, path = read_fashion_mnist(split, root)
        dataset = ImageDataset(ArrayPixels(pixels), labels, FASHION_CLASSES, name=source, source=str(path), kind=source)
    elif root is not None:
        raise ValueError(f"root is only for named sets ({', '.join(DATASETS)}), not for {source}")
    elif str(source).startswith(PREFIX):
        dataset = open_hugging_face(str(source), split)
    else:
        dataset = _open_path(source, split)
    if len(dataset) == 0:
        raise ValueError(f"{source} holds no images; allowed: {ALLOWED}")
    if isinstance(dataset.pixels, FilePixels):
        dataset.pixels.load(0)
    for warning in dataset.warnings:
        log.warning("%s: %s", dataset.source, warning)
    for skipped in dataset.dropped[:MAX_FAILURES]:
        log.warning("skipping %s: %s", *skipped)
    dataset.transform = transform
    return dataset


def _open_path(source: str | Path, split: str) -> ImageDataset:
    path = Path(source).expanduser()
    if path.is_dir():
        return open_folder(path, split)
    if is_tars(path):
        if split != "train":
            raise ValueError(f"{source} is one set of tars and has no split {split!r}; leave split out")
        return open_tars(tar_paths(path), path.name, str(path))
    if not os.path.exists(path):
        beside = os.listdir(path.parent) if path.parent.is_dir() else []
        hint = nearest(str(source), DATASETS) or nearest(path.name, beside)
        raise FileNotFoundError(f"{source} does not exist{hint or '.'} Allowed: {ALLOWED}.")
    return _open_file(path, split)


def _open_file(path: Path, split: str) -> ImageDataset:
    if split != "train":
        raise ValueError(f"{path} is one file and has no split {split!r}; leave split out")
    if path.suffix in (".npz", ".npy"):
        return open_array(path)
    if re.search(r"\.(tar\.\w+|tgz)$", path.name.lower()):
        raise ValueError(f"{path} is compressed, so no image in it can be found without reading all; give the .tar")
    if "labels" in path.name and "idx1" in path.name:
        raise ValueError(f"{path} is a labels file; give the images file (images-idx3) beside it")
    if "idx3" in path.name:
        return open_idx(path)
    if path.suffix.lower() in EXTENSIONS:
        raise ValueError(f"{path} is one image; give the folder that holds it")
    raise ValueError(f"{path} is no image data that can be read; allowed: {ALLOWED}")
