"""Image sets kept as arrays: .npz and .npy, IDX (the format of MNIST), and Fashion-MNIST by name.

Fashion-MNIST: Xiao, Rasul, Vollgraf, arXiv 1708.07747; 60,000 + 10,000 grey images of 28x28, MIT.
"""

import gzip
import logging
import os
import struct
import zlib
from pathlib import Path

import numpy as np
import numpy.typing as npt

from varkit.data.npz import map_npz

log = logging.getLogger("varkit.data")

PixelArray = npt.NDArray[np.uint8]
LabelArray = npt.NDArray[np.int64]

FASHION_CLASSES = (
    "T-shirt/top",
    "Trouser",
    "Pullover",
    "Dress",
    "Coat",
    "Sandal",
    "Shirt",
    "Sneaker",
    "Bag",
    "Ankle boot",
)

SYSTEM_FOLDERS = (  # of the Debian and Ubuntu package dataset-fashion-mnist
    Path("/usr/share/datasets/fashion-mnist"),
    Path("/usr/share/dataset-fashion-mnist"),
)

_PREFIXES = {"train": ("train",), "test": ("t10k", "test")}


def read_array(path: Path) -> tuple[PixelArray, LabelArray | None]:
    """A .npz in ADM layout (arr_0 images, optional arr_1 labels) or a .npy of images.

    Returns: uint8 (N, h, w, 3), (N, h, w, 1) or (N, h, w), memory-mapped unless compressed; int64 (N,)
        or None.
    Raises: ValueError if the file is damaged, pickled, or of another dtype or shape.
    """
    try:
        loaded = np.load(path, allow_pickle=False, mmap_mode="r" if path.suffix == ".npy" else None)
        if isinstance(loaded, np.ndarray):
            images, labels = loaded, None
        else:
            with loaded:
                if "arr_0" not in loaded:
                    raise ValueError(f"it holds {', '.join(loaded) or 'nothing'}, but no arr_0")
                mapped = map_npz(path, "arr_0")
                images = loaded["arr_0"] if mapped is None else mapped
                labels = loaded.get("arr_1")
    except Exception as error:  # a damaged archive raises all kinds of things
        if isinstance(error, OSError) and error.errno is not None:
            raise
        raise ValueError(
            f"{path} cannot be read: {error} (needed: images as a plain uint8 array, named arr_0 "
            "in a .npz; pickled objects are refused)"
        ) from error
    if images.dtype != np.uint8:
        raise ValueError(f"{path}: images are {images.dtype}; expected uint8 in [0, 255]")
    grey = images.ndim == 3 and images.shape[-1] > 3  # (h, w, 3) is one image, not h grey ones
    if not grey and not (images.ndim == 4 and images.shape[-1] in (1, 3)):
        raise ValueError(f"{path}: images have shape {images.shape}; expected (N, h, w, 3), (N, h, w, 1) or (N, h, w)")
    if labels is None:
        return images, None
    if labels.shape != images.shape[:1] or not np.issubdtype(labels.dtype, np.integer):
        raise ValueError(
            f"{path}: labels (arr_1) are {labels.dtype} {labels.shape}; expected ints of shape ({len(images)},)"
        )
    return images, labels.astype(np.int64)


def read_idx(path: Path) -> PixelArray:
    """An IDX file of unsigned bytes, gzipped or not -> uint8 array of the shape in its header.

    Raises: ValueError naming the file if the magic number, the type or the length is wrong.
    """
    try:
        raw = path.read_bytes()
        if raw[:2] == b"\x1f\x8b":
            raw = gzip.decompress(raw)
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise ValueError(f"{path}: damaged gzip file ({error}); fetch it again") from error
    if len(raw) < 4 or raw[:2] != b"\0\0" or raw[2] != 8:
        raise ValueError(
            f"{path}: starts with 0x{raw[:4].hex()}, not the magic number of an IDX file of "
            "unsigned bytes (0x00000803 for images, 0x00000801 for labels)"
        )
    dims = raw[3]
    if len(raw) < 4 + 4 * dims:
        raise ValueError(f"{path}: cut off inside its header; fetch it again")
    shape = struct.unpack(f">{dims}I", raw[4 : 4 + 4 * dims])
    body, expected = len(raw) - 4 - 4 * dims, int(np.prod(shape, dtype=object))
    if body != expected:
        raise ValueError(f"{path}: header says shape {shape} = {expected} bytes but {body} follow; fetch it again")
    return np.frombuffer(raw, np.uint8, offset=4 + 4 * dims).reshape(shape)


def find_idx(folder: Path, split: str) -> Path | None:
    """The images file of `split` (train, or test under any of its names) in a folder, or None."""
    for prefix in _PREFIXES["train" if split == "train" else "test"]:
        for stem in (f"{prefix}-images-idx3-ubyte", f"{prefix}-images.idx3-ubyte"):
            for path in (folder / stem, folder / f"{stem}.gz"):
                if path.is_file():
                    return path
    return None


def read_idx_pair(images: Path) -> tuple[PixelArray, LabelArray]:
    """An images-idx3 file and the labels-idx1 file beside it -> uint8 (N, h, w), int64 (N,).

    Raises: FileNotFoundError if there is no labels file; ValueError if one is damaged or their
    lengths differ.
    """
    stem = images.name.removesuffix(".gz").replace("images", "labels").replace("idx3", "idx1")
    candidates = [images.with_name(stem), images.with_name(f"{stem}.gz")]
    if images.suffix == ".gz":
        candidates.reverse()
    labels = next((path for path in candidates if path.is_file() and path != images), None)
    if labels is None:
        raise FileNotFoundError(f"{images}: no labels file beside it; expected {stem} or {stem}.gz in {images.parent}")
    pixels, ids = read_idx(images), read_idx(labels)
    if pixels.ndim != 3 or ids.ndim != 1 or len(pixels) != len(ids):
        raise ValueError(
            f"{images.name} has shape {pixels.shape} and {labels.name} {ids.shape}; "
            "expected (N, height, width) and (N,) with one N"
        )
    return pixels, ids.astype(np.int64)


def read_fashion_mnist(split: str, root: str | Path | None = None) -> tuple[PixelArray, LabelArray, Path]:
    """Fashion-MNIST -> uint8 (N, 28, 28), int64 (N,) in [0, 10), and the file that was read.

    Args:
        split: "train", or "test" ("val" and "validation" mean the same 10,000 images).
        root: folder with the IDX files, or with torchvision's FashionMNIST/raw. None looks where
            Debian's package puts them, then into the cache, then downloads.
    Raises: FileNotFoundError with the ways to get the data if it is not there.
    """
    path = _locate(split, root)
    pixels, labels = read_idx_pair(path)
    if len(labels) and labels.max() >= len(FASHION_CLASSES):
        raise ValueError(f"{path}: label {labels.max()} found; Fashion-MNIST has classes 0 to 9")
    return pixels, labels, path


def prepare_fashion_mnist(out: Path, root: str | Path | None = None) -> dict[str, int]:
    """Write Fashion-MNIST as `out`/train.npz and `out`/test.npz, which `open_images(out)` reads.

    ADM layout: arr_0 uint8 (N, 28, 28, 3), arr_1 int64 (N,). A file appears whole or not at all.

    Args:
        root: see `read_fashion_mnist`.
    Returns: number of images written by split.
    Raises: FileNotFoundError as `read_fashion_mnist`.
    """
    read = {split: read_fashion_mnist(split, root)[:2] for split in ("train", "test")}
    out = Path(out)
    out.mkdir(parents=True, exist_ok=True)
    for split, (pixels, labels) in read.items():
        part = out / f".{split}.npz.{os.getpid()}.part"
        try:
            with part.open("wb") as file:
                np.savez_compressed(file, arr_0=np.stack([pixels] * 3, axis=-1), arr_1=labels)
            part.replace(out / f"{split}.npz")
        finally:
            part.unlink(missing_ok=True)
    return {split: len(labels) for split, (_, labels) in read.items()}


def cache_folder() -> Path:
    """Where downloads are kept: $XDG_CACHE_HOME/varkit, by default ~/.cache/varkit."""
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "varkit"


def _locate(split: str, root: str | Path | None) -> Path:
    given = None if root is None else Path(root).expanduser()
    own = () if given is None else (given, given / "FashionMNIST" / "raw", given / "raw")
    for folder in own or SYSTEM_FOLDERS:
        if (path := find_idx(folder, split)) is not None:
            return path
    if given is not None:
        raise FileNotFoundError(
            f"root {given} holds no Fashion-MNIST {split} images; expected "
            "train-images-idx3-ubyte[.gz], t10k-images-idx3-ubyte[.gz] and their labels there or "
            "in FashionMNIST/raw below it"
        )
    return _download(split)


def _download(split: str) -> Path:
    from torchvision.datasets import FashionMNIST

    cache = cache_folder()
    log.info("fashion-mnist: reading from %s, downloading into it what is missing", cache)
    try:
        # torchvision downloads only what it does not find, and checks it before unpacking
        FashionMNIST(str(cache), train=split == "train", download=True)
    except (OSError, RuntimeError) as error:
        raise FileNotFoundError(
            f"fashion-mnist is not on this machine and the download failed ({error}). Get it in "
            "one of three ways: (1) apt-get install dataset-fashion-mnist; (2) put the four "
            "*-ubyte.gz files of https://github.com/zalandoresearch/fashion-mnist into a folder "
            f"and give it as root; (3) with network, run again: it is downloaded into {cache}"
        ) from error
    path = find_idx(cache / "FashionMNIST" / "raw", split)
    if path is None:
        raise FileNotFoundError(f"torchvision left no Fashion-MNIST {split} images in {cache}")
    return path
