"""Options of `varkit sample` that steer what is drawn by control images."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

ControlFiles = Annotated[
    list[str] | None,
    typer.Option("--control", help="Steer by this map; KIND=FILE, repeatable, of several kinds: see docs/control.md."),
]
ControlStrength = Annotated[
    list[str] | None,
    typer.Option(help="How strongly --control steers, from 0; 1 is as trained. Repeatable: KIND=0.5 of one kind."),
]
Extract = Annotated[
    list[str] | None,
    typer.Option(help="--control is a photo: make its map by this extractor (canny, hed, ...). Repeatable, of kinds."),
]


def by_kind(values: Sequence[str] | None, option: str) -> dict[str, str]:
    """`KIND=VALUE` or `VALUE`, whose kind is "" -> values by kind. Raises ValueError on one that is said twice."""
    found: dict[str, str] = {}
    for text in values or ():
        kind, sign, value = text.partition("=")
        if not sign or not re.fullmatch(r"[\w-]+", kind) or Path(text).is_file():
            kind, value = "", text
        if not value:
            raise ValueError(f"{option} {text} says nothing after the sign; give KIND=VALUE")
        if kind in found:
            which = f" for {kind}" if kind else ""
            raise ValueError(f"{option} is given twice{which}: of several kinds of control say KIND={value}")
        found[kind] = value
    return found


def strength_of(text: str) -> float:
    """Raises ValueError unless it is a number from 0."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not (math.isfinite(value) and value >= 0):
        raise ValueError(f"--control-strength {text} must be a number from 0; 1 is as trained, 0 is no control")
    return value


def open_still(path: Path) -> Any:
    """The image in a file, in its own mode; see `open_image`. Raises: as that; ValueError on a moving one."""
    from PIL import Image

    from varkit.pipelines.canvas import open_image

    image = open_image(path)
    with Image.open(path) as file:
        if (count := getattr(file, "n_frames", 1)) > 1:
            raise ValueError(f"{path} is a moving image of {count} pictures; a control is one: save that picture")
    return image


def alone(values: Mapping[str, Any]) -> Any:
    """What is said of controls by kind; of a single one, that."""
    return dict(values) if len(values) > 1 else next(iter(values.values()))


class ControlCommand:
    """The control images that steer, and how strongly.

    Args:
        name: of the model, for people.
        control, strength, extract: the options, as the command line has them.
        sized: height and width, where they are asked for.
        editing: an image is edited: controls lie on the model's canvas.
    Attributes: given: arguments of the pipeline's call.   record: what is written into files.   maps: what was
        extracted, by kind.
    Raises: ValueError on options that do not fit the model or each other, or files that are no image;
        FileNotFoundError; ImportError naming what an extractor lacks. All before anything is drawn.
    """

    def __init__(
        self,
        pipeline: Any,
        name: str,
        control: Sequence[str] | None,
        strength: Sequence[str] | None,
        extract: Sequence[str] | None,
        sized: Mapping[str, int],
        editing: bool = False,
    ) -> None:
        self.given, self.record, self.maps = dict[str, Any](), dict[str, Any](), dict[str, Any]()
        self.takes = "control" in pipeline.transformer.takes
        self.kinds = tuple(pipeline.transformer.controller.kinds) if self.takes else ()
        files = by_kind(control, "--control")
        strengths = {kind: strength_of(text) for kind, text in by_kind(strength, "--control-strength").items()}
        if not files:
            self._without(pipeline, name, strengths, extract)
            return
        files = self._checked(name, files)
        self.extractors = self._extractors(by_kind(extract, "--extract"), files)
        weights = self._weights(strengths, files)
        images = {kind: self._open(Path(file), kind) for kind, file in files.items()}
        if editing:
            size = dict(zip(("height", "width"), pipeline.at_size(**sized).image_tokenizer.image_size, strict=True))
        else:
            size = pipeline.size_for(images, sized.get("height"), sized.get("width"))
            pipeline.at_size(**size)
        self._extract(pipeline, images, (size["height"], size["width"]))
        self.given = {"control": {**images, **self.maps}, "control_strength": weights}
        pipeline.encode_control(*self.given.values(), 1, **size)  # refused before anything is announced
        self.record = {
            "control": alone({k: Path(f).name for k, f in files.items()}),
            "control_strength": alone(weights),
        }
        if self.extractors:
            self.record["extract"] = alone(self.extractors)

    def _without(self, pipeline: Any, name: str, strengths: Mapping[str, float], extract: Any) -> None:
        if extract:
            raise ValueError("--extract makes the map of a photo: give --control PHOTO too")
        none = bool(strengths) and not any(strengths.values())
        if strengths and not (none and self.takes):
            raise ValueError("--control-strength says how strongly --control steers: give --control FILE too")
        if none:
            self.given = self.record = {"control_strength": 0.0}
        elif self.takes and not pipeline.transformer.config.control_drop_rate:
            kinds = ", ".join(self.kinds) or "one kind"
            raise ValueError(
                f"{name} is steered by control images ({kinds}): give --control FILE, or --control-strength 0 to draw "
                f"without any, which it was not trained for"
            )

    def _checked(self, name: str, files: Mapping[str, str]) -> dict[str, str]:
        """The files by the model's own kinds."""
        if not self.takes:
            raise ValueError(
                f"{name} takes no control images: leave --control out, or take a model that was trained with them "
                f"(docs/control.md)"
            )
        if len(self.kinds) > 1 and "" in files:
            raise ValueError(
                f"{name} knows several controls, {', '.join(self.kinds)}: say which, as in "
                f"--control {self.kinds[0]}={files['']}"
            )
        if len(self.kinds) < 2 and len(files) > 1:
            raise ValueError(f"{name} knows one control, but --control is given {len(files)} times")
        if self.kinds and (unknown := [kind for kind in files if kind and kind not in self.kinds]):
            raise ValueError(f"{name} knows no control {unknown[0]!r}; it knows {', '.join(self.kinds)}")
        if len(self.kinds) < 2:
            (file,) = files.values()
            return {(self.kinds or ("",))[0]: file}
        return dict(files)

    def _extractors(self, asked: Mapping[str, str], files: Mapping[str, str]) -> dict[str, str]:
        """Names of extractors by the kind of control that they make."""
        from varkit.conditioning.extractors import extractor_entry

        found = {}
        for kind, name in asked.items():
            extractor_entry(name)
            if name == "map":
                raise ValueError("--extract map: maps are taken as they are; leave --extract out")
            target = kind or (next(iter(files)) if len(files) == 1 else name)
            if target not in files:
                raise ValueError(f"--extract {name}: there is no --control {target}=PHOTO to make a map of")
            found[target] = name
        return found

    def _weights(self, strengths: Mapping[str, float], files: Mapping[str, str]) -> dict[str, float]:
        if odd := [kind for kind in strengths if kind and kind not in files]:
            raise ValueError(f"--control-strength {odd[0]}={strengths[odd[0]]:g}: there is no --control {odd[0]}=FILE")
        return {kind: strengths.get(kind, strengths.get("", 1.0)) for kind in files}

    def _open(self, path: Path, kind: str) -> Any:
        from varkit.pipelines.canvas import read_image

        image = open_still(path)
        return read_image(image) if kind in self.extractors else image

    def _extract(self, pipeline: Any, images: Mapping[str, Any], size: tuple[int, int]) -> None:
        from varkit.conditioning.extractors import build_extractor, extractor_entry, map_of

        for kind, name in self.extractors.items():
            where = {"device": pipeline.device} if extractor_entry(name).network else {}
            self.maps[kind] = map_of(build_extractor(name, **where), images[kind], size)

    def save(self, out: Path) -> list[Path]:
        """Write the maps that were extracted, beside what `out` will hold: grid.control.png; of a folder, into one
        beside it, so that nobody takes them for samples."""
        from varkit.pictures import save_png

        out, files = out if out.name.strip(".") else out.resolve(), []
        for kind, image in self.maps.items():
            name = f".{kind}" if len(self.maps) > 1 else ""
            if out.suffix:
                path = out.with_name(f"{out.stem}.control{name}.png")
            else:
                path = out.with_name(f"{out.name}.control") / f"{kind or self.extractors[kind]}.png"
            save_png(image, path, {"extract": self.extractors[kind]})
            files.append(path)
        return files
