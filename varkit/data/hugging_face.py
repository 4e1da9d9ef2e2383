"""Data sets of Hugging Face's `datasets` library (extra `hf`): from the hub, or on this machine.

    open_images("hf:ylecun/fashion_mnist")                                  downloaded once, into its cache
    open_images("hf:/data/birds")                                           by save_to_disk, or a folder it reads
    open_images("hf:/data/birds.parquet?image=photo&label=species&text=caption")

Options after `?`, joined by `&`: `image`, `label`, `text` name columns, `config` a configuration, `split` the split
under the name it has there. Rows are read at random from memory-mapped Arrow files; nothing is streamed.
"""

from __future__ import annotations

import io
from pathlib import Path
from types import ModuleType
from typing import Any, BinaryIO
from urllib.parse import parse_qsl

import torch
from torch import Tensor

from varkit.config import nearest
from varkit.data.dataset import ImageDataset
from varkit.data.labels import Label, checked_label, class_ids
from varkit.data.splits import split_name, with_classes_of
from varkit.data.transforms import FilePixels, reason_of, refuse_large

PREFIX = "hf:"
OPTIONS = ("image", "label", "text", "config", "split")
IMAGE_COLUMNS = ("image", "img", "jpg", "png", "webp")
LABEL_COLUMNS = ("label", "labels", "cls")
TEXT_COLUMNS = ("text", "caption")
STRINGS = ("string", "large_string")


class RowPixels(FilePixels):
    """Encoded images in the rows of a `datasets.Dataset`, in one column that is not decoded there."""

    def __init__(self, rows: Any, column: str, name: str) -> None:
        super().__init__([f"{name}[{i}]" for i in range(len(rows))])
        self.rows, self.column = rows, column

    def open(self, index: int) -> BinaryIO:
        """The bytes of row `index`, or the file it names. Raises: OSError; ValueError if it has neither."""
        image = self.rows[index][self.column] or {}
        raw, path = image.get("bytes"), image.get("path")
        if raw is not None:
            refuse_large(len(raw))
            return io.BytesIO(raw)
        if path is None:
            raise ValueError("no image in this row")
        refuse_large(Path(path).stat().st_size)
        return Path(path).open("rb")


def open_hugging_face(source: str, split: str) -> ImageDataset:
    """The data set that `hf:NAME?options` means.

    Raises: ImportError without `datasets`; FileNotFoundError if nothing is there; ValueError for an option, a
        column or a split that is not there, or labels that are none.
    """
    name, options = parse_source(source)
    library = _library()
    splits = _load(library, name, options.get("config"))
    if isinstance(splits, library.Dataset):
        splits = {str(splits.split or "train"): splits}
    if (chosen := options.get("split")) is None:
        chosen = split_name(splits, split, f"{PREFIX}{name}")
    elif chosen not in splits:
        raise ValueError(f"{PREFIX}{name} has no split {chosen!r}{nearest(chosen, splits)}; it has {', '.join(splits)}")
    dataset = _open_rows(library, splits[chosen], options, f"{PREFIX}{name}/{chosen}")
    if chosen != "train" and "train" in splits and dataset.classes:
        _, classes = _labels(library, splits["train"], options, f"{PREFIX}{name}/train")
        with_classes_of(dataset, classes, f"{PREFIX}{name}/train")
    return dataset


def parse_source(source: str) -> tuple[str, dict[str, str]]:
    """`hf:NAME?label=fine&text=` -> (NAME, {"label": "fine", "text": ""}). Raises: ValueError for other options."""
    name, _, query = source.removeprefix(PREFIX).partition("?")
    try:
        options = dict(parse_qsl(query, keep_blank_values=True, strict_parsing=bool(query)))
    except ValueError:
        raise ValueError(
            f"{source}: options are written ?name=value&name=value; allowed: {', '.join(OPTIONS)}"
        ) from None
    for option in options:
        if option not in OPTIONS:
            raise ValueError(f"{source}: no option {option!r}{nearest(option, OPTIONS)}; allowed: {', '.join(OPTIONS)}")
    if not name:
        raise ValueError(f"{source} names no data set; write hf:NAME of the hub, or hf:PATH")
    return name, options


def _library() -> ModuleType:
    try:
        import datasets
    except ImportError as error:
        raise ImportError(f'hf: sources need `datasets`: pip install "varkit[hf]" ({error})') from None
    return datasets


def _load(library: ModuleType, name: str, config: str | None) -> Any:
    """A `Dataset`, or a `DatasetDict` of splits."""
    path = Path(name).expanduser()
    if not path.exists() and name.startswith((".", "/", "~")):
        raise FileNotFoundError(f"{PREFIX}{name}: no such file or folder")
    try:
        if (path / "dataset_dict.json").is_file() or (path / "state.json").is_file():
            return library.load_from_disk(str(path))
        if path.suffix in (".parquet", ".arrow") and path.is_file():
            return library.load_dataset(path.suffix[1:], data_files=str(path))
        return library.load_dataset(str(path) if path.exists() else name, config)
    except Exception as error:  # its builders raise anything
        kind = FileNotFoundError if isinstance(error, FileNotFoundError) else ValueError
        raise kind(f"{PREFIX}{name} cannot be opened: {reason_of(error)}") from error


def _open_rows(library: ModuleType, rows: Any, options: dict[str, str], where: str) -> ImageDataset:
    image = _image_column(library, rows, options.get("image"), where)
    labels, classes = _labels(library, rows, options, where)
    texts = _texts(rows, options.get("text"), where)
    try:
        images = rows.with_format(None).select_columns([image]).cast_column(image, library.Image(decode=False))
    except Exception as error:  # Arrow's casts raise anything
        raise ValueError(f"{where}: column {image!r} holds no images ({reason_of(error)})") from error
    return ImageDataset(
        RowPixels(images, image, where),
        labels,
        classes,
        name=where.removeprefix(PREFIX).rpartition("/")[0],
        source=where,
        kind="hugging face",
        texts=[text or "" for text in texts] if any(texts) else None,
    )


def _column(rows: Any, named: str, option: str, where: str) -> str:
    if named not in rows.features:
        raise ValueError(
            f"{where} has no column {named!r}{nearest(named, rows.features)} for {option}=; "
            f"it has {', '.join(rows.features)}"
        )
    return named


def _image_column(library: ModuleType, rows: Any, named: str | None, where: str) -> str:
    if named is not None:
        return _column(rows, named, "image", where)
    images = [name for name, feature in rows.features.items() if isinstance(feature, library.Image)]
    usual = [name for name in IMAGE_COLUMNS if name in (images or rows.features)]
    if len(images) == 1 or usual:
        return images[0] if len(images) == 1 else usual[0]
    found = f"columns {', '.join(images)} hold images" if images else "no column holds images"
    raise ValueError(f"{where}: {found}; choose one with ?image=, of {', '.join(rows.features)}")


def _labels(library: ModuleType, rows: Any, options: dict[str, str], where: str) -> tuple[Tensor | None, list[str]]:
    """Class ids (N,), -1 where there is none, and the class names."""
    named = options.get("label")
    if named == "":
        return None, []
    kinds = {name: feature for name, feature in rows.features.items() if isinstance(feature, library.ClassLabel)}
    usual = [name for name in LABEL_COLUMNS if name in rows.features]
    if named is None and len(kinds) > 1 and not set(usual) & kinds.keys():
        raise ValueError(
            f"{where}: columns {', '.join(kinds)} hold classes; choose one with ?label=, or none with ?label="
        )
    column = _column(rows, named, "label", where) if named else next(iter([*usual, *kinds]), None)
    if column is None:
        return None, []
    values = _values(rows, column)
    if column in kinds:
        classes = list(kinds[column].names)
        ids = torch.tensor([-1 if value is None else value for value in values], dtype=torch.int64)
        if len(ids) and not -1 <= int(ids.min()) <= int(ids.max()) < len(classes):
            raise ValueError(
                f"{where}: {column} runs from {ids.min()} to {ids.max()}, but names {len(classes)} classes"
            )
        return ids, classes
    labels: list[Label] = [
        None if value == -1 else checked_label(value, f"{where}[{i}].{column}") for i, value in enumerate(values)
    ]
    return class_ids(labels, f"{where}, column {column}")


def _texts(rows: Any, named: str | None, where: str) -> list[str | None]:
    """Captions (N,), or nothing; a column found by its usual name counts only if it holds strings."""
    strings = [name for name, feature in rows.features.items() if getattr(feature, "dtype", "") in STRINGS]
    if named:
        column = _column(rows, named, "text", where)
        if column not in strings:
            raise ValueError(f"{where}: column {column!r} holds {rows.features[column]}; a text is one string an image")
        return _values(rows, column)
    found = [name for name in TEXT_COLUMNS if name in strings and named is None]
    return _values(rows, found[0]) if found else []


def _values(rows: Any, column: str) -> list[Any]:
    return list(rows.with_format(None).select_columns([column])[:][column])
