"""Images and their control maps, paired by relative path: images/rose/1.jpg with controls/rose/1.png.

ControlAR's folders are of this form too: image/0.png beside control/0.png or control_depth/0.png.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from varkit.data.dataset import ImageDataset
from varkit.data.folders import image_files
from varkit.data.transforms import FilePixels, ImageTransform, reason_of, refuse_large, stack_images, to_pixels, to_rgb

Resize = Literal["nearest", "bicubic"]
FILTERS = {"nearest": Image.Resampling.NEAREST, "bicubic": Image.Resampling.BICUBIC}


def keyed_files(folder: Path) -> dict[str, str]:
    """Image files of a folder by their path in it, without ending.

    Raises: FileNotFoundError; ValueError where there is none, or where two differ in their ending alone.
    """
    if not folder.is_dir():
        raise FileNotFoundError(f"no such folder: {folder}")
    found: dict[str, str] = {}
    for path in image_files(folder)[0]:
        key = key_of(path, folder)
        if key in found:
            raise ValueError(f"{found[key]} and {path} differ in their ending alone, so both would be {key}")
        found[key] = path
    if not found:
        raise ValueError(f"{folder} holds no images")
    return found


def key_of(path: str | Path, folder: str | Path) -> str:
    """The path of a file in a folder, without ending, with /."""
    return os.path.splitext(os.path.relpath(path, folder))[0].replace(os.sep, "/")


@dataclass(frozen=True)
class Pairs:
    """What `pair_files` found.

    keys: relative paths without ending, of both.   images, controls: their files.
    missing: keys of images that have no control.   unused: keys of controls that have no image.
    """

    keys: list[str]
    images: list[str]
    controls: list[str]
    missing: list[str]
    unused: list[str]

    def require_all(self, controls: str | Path) -> None:
        """Raises: ValueError counting and naming the images that have no control."""
        if self.missing:
            named = ", ".join(self.missing[:5]) + (", ..." if len(self.missing) > 5 else "")
            raise ValueError(
                f"{len(self.missing)} of {len(self.missing) + len(self.keys)} images have no control in {controls}: "
                f"{named}. Make them (`varkit control`), or take these images away"
            )


def pair_files(images: str | Path, controls: str | Path) -> Pairs:
    """The images of a folder and the maps of another, by relative path without ending.

    Raises: as `keyed_files`; ValueError where no image has a control.
    """
    by_key, maps = keyed_files(Path(images)), keyed_files(Path(controls))
    keys = sorted(by_key.keys() & maps.keys())
    if not keys:
        raise ValueError(
            f"no image of {images} ({min(by_key)}, ...) has a control in {controls} ({min(maps)}, ...): both need the "
            "same paths, but for the ending"
        )
    return Pairs(
        keys,
        [by_key[k] for k in keys],
        [maps[k] for k in keys],
        sorted(by_key.keys() - maps.keys()),
        sorted(maps.keys() - by_key.keys()),
    )


def read_map(path: str) -> Image.Image:
    """A stored map as RGB. Raises: ValueError naming a file that cannot be read."""
    try:
        refuse_large(os.stat(path).st_size)
        with Image.open(path) as image:
            return to_rgb(image)
    except Exception as error:  # Pillow's plugins raise anything on damaged files
        raise ValueError(f"control {path} cannot be read: {reason_of(error)}") from None


class ControlledImages(Dataset[dict[str, Any]]):
    """An image set whose batches also hold "controls", cut and flipped as their images are.

    Args:
        dataset: of image files, as `open_images` gives it.
        folder: of maps: the path of an image in the set's source, with any image ending.
        resize: nearest for edges and colours of classes, bicubic for soft maps (`EXTRACTORS` says which).
        allow_missing: leave images out that have no control, instead of refusing.
    Attributes:
        missing: paths of the images without a control.   kept: indices of those that have one.
    Raises: ValueError for a set that is no files, and (unless allowed) counting and naming missing controls;
        FileNotFoundError.
    """

    def __init__(
        self, dataset: ImageDataset, folder: str | Path, *, resize: Resize = "nearest", allow_missing: bool = False
    ) -> None:
        if type(dataset.pixels) is not FilePixels:
            raise ValueError(f"controls belong to image files; {dataset.source} is {dataset.kind}")
        if resize not in get_args(Resize):
            raise ValueError(f"resize must be nearest or bicubic; got {resize!r}")
        self.dataset, self.folder, self.resize = dataset, str(folder), resize
        maps, paths = keyed_files(Path(folder)), dataset.pixels.paths
        keys = [key_of(path, dataset.source) for path in paths]
        self.maps = {i: maps[key] for i, key in enumerate(keys) if key in maps}
        self.kept = list(self.maps)
        self.missing = [path for i, path in enumerate(paths) if i not in self.maps]
        if not allow_missing or not self.kept:
            absent = [key for i, key in enumerate(keys) if i not in self.maps]
            Pairs([keys[i] for i in self.kept], [], [], absent, []).require_all(folder)

    def __len__(self) -> int:
        return len(self.kept)

    def __getitem__(self, entry: int | tuple[int, int]) -> dict[str, Any]:
        """As `ImageDataset`, and "control" float32 (3, H, W) in [-1, 1]."""
        batch = self.__getitems__([entry])
        item = {"image": batch["images"][0], "control": batch["controls"][0], "label": int(batch["labels"][0])}
        item |= {"index": int(batch["index"][0]), "key": int(batch["keys"][0])}
        return item | ({"text": batch["texts"][0]} if "texts" in batch else {})

    def __getitems__(self, entries: Sequence[int | tuple[int, int]]) -> dict[str, Any]:
        """As `ImageDataset`, and "controls" float32 (B, 3, H, W) in [-1, 1], uint8 without transform.

        "index" is that of the underlying set.
        Raises: IndexError; ValueError for a control that cannot be read, or whose size is not that of its image.
        """
        pairs = [entry if isinstance(entry, (tuple, list)) else (entry, None) for entry in entries]
        chosen = [(self.kept[i], self.kept[i] if key is None else key) for i, key in pairs]
        batch = self.dataset.__getitems__(chosen)
        return batch | {"controls": self._controls(batch["index"].tolist(), batch["keys"], self.dataset.transform)}

    def _controls(self, indices: list[int], keys: Tensor, transform: ImageTransform | None) -> Tensor:
        uniforms = None if transform is None else transform.uniforms(keys)
        found = []
        for row, index in enumerate(indices):
            if index not in self.maps:  # the image that stands in for a damaged one
                raise ValueError(f"{self.dataset.pixels.paths[index]} has no control in {self.folder}")  # type: ignore[attr-defined]
            image = self._checked(index)
            if transform is None or uniforms is None:
                found.append(to_pixels(image))
            else:
                found.append(transform.apply_pil(image, uniforms[row], FILTERS[self.resize]))
        return stack_images(found)

    def _checked(self, index: int) -> Image.Image:
        control = read_map(self.maps[index])
        path = self.dataset.pixels.paths[index]  # type: ignore[attr-defined]
        with Image.open(path) as image:  # reads the header alone
            turned = image.getexif().get(0x0112, 1) in (5, 6, 7, 8)
            size = image.size[::-1] if turned else image.size
        if size != control.size:
            raise ValueError(
                f"{self.maps[index]} is {control.width}x{control.height} (width x height), its image {path} "
                f"{size[0]}x{size[1]}: a control has the size of its image"
            )
        return control
