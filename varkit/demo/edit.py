"""The tab "Edit": redraw what a brush has marked, or a border around the image: in-painting, out-painting, another
class."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import numpy as np
import torch
from PIL import Image

from varkit.demo.common import (
    Models,
    check_class,
    check_seed,
    check_settings,
    class_choices,
    defaults,
    enlarge,
    need_gradio,
    number,
    readable_errors,
    setting_updates,
    stages,
)
from varkit.demo.controls import (
    HIDDEN,
    RAW,
    buttons,
    code,
    note,
    seed_controls,
    setting_controls,
    slider_of_two,
    wire,
    wire_model,
)
from varkit.demo.painter import lower_half, painter, read_cells, showing
from varkit.demo.running import Step, run
from varkit.demo.uploads import Upload, opening, read_upload, to_model_size, upload_controls, wire_examples
from varkit.pictures import to_pil
from varkit.pipelines.canvas import look, on_canvas, place
from varkit.rng import Rng

FOLLOW = "follow"
MARKS = "marks"
GROWTH: dict[str, tuple[str, tuple[float, float, float, float]]] = {
    "around": ("Out-paint on all sides", (0.25, 0.25, 0.25, 0.25)),
    "above": ("Out-paint above", (0.5, 0, 0, 0)),
    "left": ("Out-paint to the left", (0, 0.5, 0, 0)),
    "below": ("Out-paint below", (0, 0, 0.5, 0)),
    "right": ("Out-paint to the right", (0, 0, 0, 0.5)),
}
"""What may be drawn besides the marked cells: a border, top, left, bottom and right, in sides of the image."""


def finest_grid(pipeline: Any) -> tuple[int, ...]:
    """Rows and columns of cells; one cell for a model whose tokens have no places, which `edit` refuses."""
    grid = pipeline.image_tokenizer.layout.grids[-1]
    return grid if len(grid) == 2 else (1, 1)


def check_places(pipeline: Any) -> None:
    """Raises ValueError for a model whose tokens form no grid."""
    if len(pipeline.image_tokenizer.layout.grids[-1]) != 2:
        raise ValueError(
            "The tokens of this model have no places in the image, so no part of it can be redrawn; choose a model "
            "whose tokens form a grid"
        )


def preview(models: Models, name: str, upload: Upload | None) -> Any:
    """Update of the painter: the image as the model sees it."""
    with readable_errors():
        gr = need_gradio()
        if upload is None:
            return gr.update(image="")
        pipeline = models.open(name)
        image, _ = to_model_size(read_upload(upload, models.limits.side), pipeline.image_tokenizer.image_size)
        return gr.update(**showing(enlarge(image), finest_grid(pipeline)))


def edit(
    models: Models, name: str, upload: Upload | None, marks: Any, choice: Any, *rest: Any
) -> Iterator[tuple[Any, str, str]]:
    """Yields ((before, after), status, Python lines) as the run proceeds.

    Args:
        marks: cells as text; see `painter`.
        rest: the six sampling settings, seed; what is drawn, `MARKS` or one of `GROWTH`; paste back; feather.
    """
    with readable_errors():
        pipeline = models.open(name)
        check_places(pipeline)
        size = pipeline.image_tokenizer.image_size
        given = read_upload(upload, models.limits.side)
        image, exact = to_model_size(given, size)
        *sampling, seed, what, paste, feather = rest
        how = check_how(what, paste, feather)
        grown = "extend" in how
        cells = read_cells(marks, finest_grid(pipeline)) if not grown else None
        label = None if choice == FOLLOW else check_class(pipeline, choice)
        settings, seed = check_settings(pipeline, sampling), check_seed(seed)
        before = shown_before(image if exact or not (paste or grown) else given, size, how)
        lines = snippet(
            models.source(name), image.size if exact else None, None if grown else marks, label, seed,
            {**how, **changed(pipeline, settings)},
        )  # fmt: skip
        mask, rng = None if cells is None else torch.from_numpy(cells), Rng.from_seed(seed, 1)
        about = {"mask": mask, "class_labels": label, "rng": rng, **how, **settings}
        call = partial(pipeline.edit, image if exact else given, **about)
        share = "A border" if cells is None else f"{cells.mean():.0%}"
        started = "A border is drawn ..." if cells is None else f"{share} of the image will be redrawn ..."
        yield (before, before), started, lines
        for event in run(models.turns, call, stages(pipeline)):
            if isinstance(event, Step):
                after = before if event.image is None else enlarge(event.image)
                yield (before, after), f"Step {event.number} of {event.total} ...", lines
                continue
            steps, where = event.result.stats["steps"], pipeline.device.type
            done = "Grown" if cells is None else f"Redrawn {share}"
            yield (
                (before, enlarge(event.result.images[0])),
                f"{done} in **{event.seconds:.2f} s** · {steps} steps · {where}",
                lines,
            )


def check_how(what: Any, paste: Any, feather: Any) -> dict[str, Any]:
    """The arguments of `pipeline.edit` that the three controls stand for. Raises ValueError on a bad one."""
    if what != MARKS and what not in GROWTH:
        raise ValueError(f"what is drawn must be one of {', '.join([MARKS, *GROWTH])}; got {str(what)[:40]}")
    how: dict[str, Any] = {} if what == MARKS else {"extend": GROWTH[what][1]}
    if paste:
        how["paste_back"] = True
        if soft := number("Feather", feather, 0, 0.5):
            how["feather"] = soft
    return how


def shown_before(image: Any, size: tuple[int, int], how: dict[str, Any]) -> Any:
    """The image as the result will show it, where nothing is drawn yet: a border repeats its edge."""
    if "extend" in how:
        frame = place((image.height, image.width), size, "pad", how["extend"])
        if "paste_back" in how:
            image = Image.fromarray(look(np.asarray(image).transpose(2, 0, 1), frame.shown).transpose(1, 2, 0).copy())
        else:
            (image,) = to_pil(on_canvas(image, frame, size)[None])
    return enlarge(image)


def changed(pipeline: Any, settings: dict[str, Any]) -> dict[str, Any]:
    """The settings that are not the model's own."""
    default = defaults(pipeline)
    return {k: v for k, v in settings.items() if v != default[k]}


def snippet(
    source: str,
    exact: tuple[int, int] | None,
    marks: str | None,
    label: int | None,
    seed: int,
    settings: dict[str, Any],
) -> str:
    """Python that makes the same edit.

    Args: exact: (width, height) when the image was enlarged from that size.   marks: None where a border is drawn.
    """
    arguments = ["mask=mask"] if marks else []
    arguments += [f"class_labels={label}", f"seed={seed}", *(f"{k}={v!r}" for k, v in settings.items())]
    of_marks = f'mask = torch.tensor([[int(cell) for cell in row] for row in "{marks}".split("/")])\n' if marks else ""
    return (
        ("import torch\n" if marks else "") + "from PIL import Image\n"
        "from varkit import AutoPipeline\n"
        "from varkit.data.transforms import to_rgb\n\n"
        f"{opening(source, exact)}{of_marks}"
        f"result = pipeline.edit(image, {', '.join(arguments)})\n"
        'result.images[0].save("edited.png")'
    )


def choices(pipeline: Any) -> list[tuple[str, str]]:
    return [("Follow the surroundings", FOLLOW), *class_choices(pipeline)]


def refresh(models: Models, name: str, upload: Upload | None) -> list[Any]:
    """Updates of painter, class picker and sampling controls for another model."""
    with readable_errors():
        gr = need_gradio()
        pipeline = models.open(name)
        grid = finest_grid(pipeline)
        board = {"value": lower_half(grid), "rows": grid[0], "columns": grid[1], "image": ""}
        if upload is not None:
            image, _ = to_model_size(read_upload(upload, models.limits.side), pipeline.image_tokenizer.image_size)
            board |= showing(enlarge(image), grid)
        picker = gr.update(choices=choices(pipeline), value=FOLLOW)
        return [gr.update(**board), picker, *(gr.update(**u) for u in setting_updates(pipeline))]


def how_controls() -> list[Any]:
    """What is drawn, whether it is pasted back, and the feather."""
    gr = need_gradio()
    kinds = [("Redraw the marked cells", MARKS), *((text, key) for key, (text, _) in GROWTH.items())]
    return [
        gr.Dropdown(kinds, value=MARKS, label="What", elem_id="edit-what"),
        gr.Checkbox(
            label="Paste back", info="Result at the image's own size; what is kept stays exact", elem_id="edit-paste"
        ),
        gr.Slider(
            0, 0.5, 0, step=0.01, label="Feather", info="Of a pasted part: how softly it ends", elem_id="edit-feather"
        ),
    ]


def add_tab(models: Models, model: Any) -> None:
    """Build the tab inside the open `gr.Tabs`.

    Args: model: the dropdown that holds the model's name.
    """
    gr = need_gradio()
    pipeline = models.open(models.names[0])
    with gr.Tab("Edit", id="edit") as tab, gr.Row(equal_height=False):
        with gr.Column(scale=2, min_width=300):
            upload, examples = upload_controls("edit")
            picker = gr.Dropdown(choices(pipeline), value=FOLLOW, label="Class", elem_id="edit-class")
            how = how_controls()
            settings = setting_controls(pipeline)
            seed = seed_controls()
        with gr.Column(scale=5, min_width=320):
            with gr.Row():
                with gr.Column(min_width=260):
                    gr.Markdown("Drag over the cells to redraw; start on a marked one to unmark.", elem_classes="note")
                    board = painter(finest_grid(pipeline), "painter")
                    start_stop = buttons("Redraw", "edit")
                with gr.Column(min_width=260):
                    line = note("Press **Redraw** to begin.", "edit-status")
                    result = slider_of_two("Before and after", "result")
            lines = code("The same edit in Python", "snippet", "python")
    wire(
        start_stop,
        partial(edit, models),
        [model, upload, board, picker, *settings, seed, *how],
        [result, line, lines],
        name="edit",
        status=line,
        **RAW,
    )
    upload.change(partial(preview, models), [model, upload], board, trigger_mode="always_last", **RAW, **HIDDEN)
    wire_model(model, partial(refresh, models), [board, picker, *settings], [model, upload], **RAW)
    wire_examples(models, model, tab, upload, examples)
