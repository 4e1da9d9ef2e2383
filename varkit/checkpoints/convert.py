"""`varkit convert`: released files to folders, and back."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from varkit.checkpoints.files import load_official, write_official
from varkit.checkpoints.formats import format_of_model
from varkit.generators.distilled import Student
from varkit.interfaces import Generator
from varkit.registry import model_class

CARD = """---
library_name: varkit
license: {spdx}
pipeline_tag: unconditional-image-generation
---

# {title}

Converted by `varkit convert` from the official file `{source}` of
[{repository}](https://github.com/{repository}) ({paper}).

Licence of the weights: {licence}. {parameters:,} parameters. {layout}
"""


def convert(
    source: Path,
    to: Path,
    *,
    tokenizer: Path | None = None,
    part: str = "transformer",
    dtype: str = "float32",
    grid: int | None = None,
    class_texts: Path | None = None,
) -> list[str]:
    """Convert and return what to tell the user.

    Args:
        source: a released file; or a folder (a pipeline, or one part) to convert back.
        to: the folder to write; back, the file.
        tokenizer: with a generator's file: its tokenizer's, so that a whole pipeline is written.
        part: back, from a pipeline: `transformer` or `image_tokenizer`.
        dtype: of the folder's weights.
        grid: tokens a side, of a file whose name and keys do not tell it (LlamaGen's; 24 for 384 px).
        class_texts: JSON, a list of ids for each class: of a model that reads texts of classes (NBP of UCF-101).
    Raises: ValueError or FileNotFoundError before anything is written.
    """
    if dtype not in ("float32", "bfloat16", "float16"):
        raise ValueError(f"dtype must be float32, bfloat16 or float16; got {dtype!r}")
    if source.is_dir():
        return _to_file(source, to, part)
    if to.suffix in (".pth", ".safetensors"):
        raise ValueError(f"{source} is a file already; --to must be a folder, got {to}")
    if to.exists() and any(to.iterdir()):
        raise ValueError(f"{to} is not empty; choose a new folder")
    options: dict[str, Any] = {} if grid is None else {"grid": grid}
    if class_texts is not None:
        options["class_texts"] = _read_texts(class_texts)
    model = load_official(source, **options).to(getattr(torch, dtype))
    licence = format_of_model(model).release.licence
    if isinstance(model, Generator | Student) and tokenizer is not None:
        from varkit.pipelines.auto import assemble, load_official_tokenizer

        image_tokenizer = load_official_tokenizer(tokenizer, model).to(getattr(torch, dtype))
        assemble(model, image_tokenizer, format_of_model(model).sampling_for(model)).save_pretrained(to)
        lines = [f"wrote the pipeline {to}: varkit sample {to} {example(model, image_tokenizer)}"]
    else:
        if tokenizer is not None:
            raise ValueError("--tokenizer goes with a generator's file; this one is a tokenizer itself")
        model.save_pretrained(to)  # type: ignore[operator]
        lines = [f"wrote {type(model).__name__} into {to}"]
    _write_card(to, source, model)
    return [*lines, f"licence of the weights: {licence}"]


def example(model: Any, tokenizer: Any) -> str:
    """Options of `varkit sample` with which anyone can try the model."""
    if tokenizer.num_frames is None:
        return '--prompt "a photo of a lighthouse"' if model.condition == "text" else "--class 207"
    begun = model.condition == "frames" or model.num_classes == 0
    return "--continue walk.mp4 --out on.mp4" if begun else "--class 5 --out clip.mp4"


def _read_texts(path: Path) -> list[list[int]]:
    """Raises: ValueError unless the file holds a JSON list of lists of whole numbers."""
    try:
        texts = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} cannot be read as JSON: {error}") from None
    if not isinstance(texts, list) or not all(isinstance(t, list) and all(type(i) is int for i in t) for t in texts):
        raise ValueError(
            f"{path} must hold a list of lists, the ids of each class's text, such as [[2, 1, 15, 7], ...]"
        )
    return texts


def _write_card(folder: Path, source: Path, model: Any) -> None:
    kind = format_of_model(model)
    text = CARD.format(
        title=folder.name,
        source=source.name,
        spdx=kind.release.spdx,
        repository=kind.release.repository,
        paper=kind.release.paper,
        licence=kind.release.licence,
        parameters=sum(p.numel() for p in model.parameters()),
        layout=f"{model.layout.length} tokens an image ({model.layout.describe()}).",
    )
    (folder / "README.md").write_text(text)


def _to_file(source: Path, to: Path, part: str) -> list[str]:
    if to.suffix not in (".pth", ".safetensors"):
        raise ValueError(f"to convert a folder back, --to must end in .pth or .safetensors; got {to}")
    if part not in ("transformer", "image_tokenizer"):
        raise ValueError(f"--part must be transformer or image_tokenizer; got {part!r}")
    folder = source / part if (source / "model_index.json").is_file() else source
    if not (folder / "config.json").is_file():
        raise ValueError(f"{folder} holds no config.json; give a pipeline's folder, or one part of it")
    kind = json.loads((folder / "config.json").read_text()).get("_class_name")
    model = model_class(kind).from_pretrained(folder)
    write_official(model, to)
    return [f"wrote {to}, which the official code loads strictly", f"licence of the weights: see {source}/README.md"]
