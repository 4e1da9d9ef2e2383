"""Options of `varkit sample` that edit an image, or change its size."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from varkit.commands.common import numbers

ImageFile = Annotated[Path | None, typer.Option("--image", help="Edit this image: see docs/editing.md.")]
MaskFile = Annotated[Path | None, typer.Option("--mask", help="White where --image is redrawn; any size.")]
BoxText = Annotated[
    str | None,
    typer.Option("--box", help="Instead of --mask: top,left,bottom,right as shares of the image: 0.5,0,1,1."),
]
Keep = Annotated[str, typer.Option(help="With --box: outside redraws the box, inside all else.")]
Extend = Annotated[
    str | None,
    typer.Option(help="Out-painting: what is added on all sides, or at top,left,bottom,right: 0.25 or 0,0.5,0,0.5."),
]
Strength = Annotated[
    float | None, typer.Option(help="Variations: the share of scales or ordered tokens that is drawn anew, in [0, 1].")
]
Threshold = Annotated[
    float | None, typer.Option(help="A token is redrawn where this share of it is marked. Default 0.5.")
]
FitName = Annotated[str | None, typer.Option("--fit", help="Of another aspect ratio: stretch, crop or pad.")]
PasteBack = Annotated[
    bool, typer.Option("--paste-back", help="Put what was drawn into --image at its own size; the rest stays exact.")
]
Feather = Annotated[
    float | None, typer.Option(help="With --paste-back: fade over this share of the shorter side, such as 0.05.")
]
Size = Annotated[str | None, typer.Option("--size", help="HxW in pixels, where the model can: 256x384.")]


def size_of(text: str | None) -> dict[str, int]:
    """`256x384` -> height and width. Raises ValueError on anything else."""
    if text is None:
        return {}
    found = re.fullmatch(r"([0-9]{1,5})[x*]([0-9]{1,5})", text.strip().lower())
    if found is None:
        raise ValueError(f"--size must be HEIGHTxWIDTH in pixels, such as 256x384; got {text!r}")
    return {"height": int(found[1]), "width": int(found[2])}


class EditCommand:
    """The image that is edited and how.

    Args: options: those of `pipeline.edit` as the command line has them; None is not given.
    Raises: ValueError on options without an image, or files that are none; FileNotFoundError.
    """

    def __init__(self, pipeline: Any, image: Path | None, mask: Path | None, options: dict[str, Any]) -> None:
        from varkit.pipelines.canvas import open_image

        given = {k: v for k, v in options.items() if v not in (None, False)}
        self.on, self.record = image is not None, dict[str, Any]()
        if image is None:
            named = ["--mask"] * (mask is not None) + [f"--{k.replace('_', '-')}" for k in given if k != "keep"]
            if named:
                raise ValueError(f"{', '.join(named)} edit an image: give --image too")
            return
        self.record = {"image": image.name, **({} if mask is None else {"mask": mask.name}), **given}
        self.pipeline, self.image = pipeline, open_image(image)
        for name, count in (("box", (4,)), ("extend", (1, 4))):
            if name in given:
                values = numbers(given[name], f"--{name}", float)
                if len(values) not in count:
                    wanted = " or ".join(map(str, count))
                    raise ValueError(f"--{name} {given[name]} must be {wanted} numbers: top,left,bottom,right")
                given[name] = values[0] if len(values) == 1 else tuple(values)
        self.given = given if mask is None else {**given, "mask": open_image(mask)}

    def draw(self, asked: Sequence[Any], **more: Any) -> Any:
        """One edit for each class or prompt."""
        what = "prompt" if self.pipeline.transformer.condition == "text" else "class_labels"
        return self.pipeline.edit([self.image] * len(asked), **{what: list(asked)}, **self.given, **more)

    def instead_of(self, draw: Callable[..., Any]) -> Callable[..., Any]:
        return self.draw if self.on else draw
