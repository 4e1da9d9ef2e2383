"""Data sets of arrays and IDX files."""

from pathlib import Path

from varkit.data.dataset import ImageDataset
from varkit.data.fashion import read_array, read_idx_pair
from varkit.data.labels import numbered
from varkit.data.transforms import ArrayPixels


def open_array(path: Path) -> ImageDataset:
    """.npz in ADM layout, or .npy. Raises: as `read_array`; ValueError for labels that are no class ids."""
    pixels, labels = read_array(path)
    classes = numbered(labels, path)
    kind = path.suffix[1:]
    return ImageDataset(ArrayPixels(pixels), labels, classes, name=path.stem, source=str(path), kind=kind)


def open_idx(path: Path) -> ImageDataset:
    """The IDX file of images and the labels beside it. Raises: as `read_idx_pair`."""
    pixels, labels = read_idx_pair(path)
    classes = numbered(labels, path)
    return ImageDataset(ArrayPixels(pixels), labels, classes, name=path.parent.name, source=str(path), kind="idx")
