"""The tab "Edit": redraw what a brush has marked: in-painting, out-painting, another class."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch

from varkit.demo.common import (
    Models,
    check_class,
    check_seed,
    check_settings,
    class_choices,
    defaults,
    enlarge,
    need_gradio,
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
from varkit.rng import Rng

FOLLOW = "follow"


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

    Args: marks: cells as text; see `painter`.   rest: the six sampling settings, seed.
    """
    with readable_errors():
        pipeline = models.open(name)
        check_places(pipeline)
        size = pipeline.image_tokenizer.image_size
        image, exact = to_model_size(read_upload(upload, models.limits.side), size)
        cells = read_cells(marks, finest_grid(pipeline))
        label = None if choice == FOLLOW else check_class(pipeline, choice)
        settings, seed = check_settings(pipeline, rest[:-1]), check_seed(rest[-1])
        before = enlarge(image)
        lines = snippet(
            models.source(name), image.size if exact else None, marks, label, seed, changed(pipeline, settings)
        )
        mask, rng = torch.from_numpy(cells), Rng.from_seed(seed, 1)
        call = partial(pipeline.edit, image, mask=mask, class_labels=label, rng=rng, **settings)
        yield (before, before), f"{cells.mean():.0%} of the image will be redrawn ...", lines
        for event in run(models.turns, call, stages(pipeline)):
            if isinstance(event, Step):
                after = before if event.image is None else enlarge(event.image)
                yield (before, after), f"Step {event.number} of {event.total} ...", lines
                continue
            steps, where = event.result.stats["steps"], pipeline.device.type
            text = f"Redrawn {cells.mean():.0%} in **{event.seconds:.2f} s** · {steps} steps · {where}"
            yield (before, enlarge(event.result.images[0])), text, lines


def changed(pipeline: Any, settings: dict[str, Any]) -> dict[str, Any]:
    """The settings that are not the model's own."""
    default = defaults(pipeline)
    return {k: v for k, v in settings.items() if v != default[k]}


def snippet(
    source: str,
    exact: tuple[int, int] | None,
    marks: str,
    label: int | None,
    seed: int,
    settings: dict[str, Any],
) -> str:
    """Python that makes the same edit.   exact: (width, height) when the image was enlarged from that size."""
    arguments = ["mask=mask", f"class_labels={label}", f"seed={seed}"]
    arguments += [f"{k}={v!r}" for k, v in settings.items()]
    return (
        "import torch\n"
        "from PIL import Image\n"
        "from varkit import AutoPipeline\n"
        "from varkit.data.transforms import to_rgb\n\n"
        f"{opening(source, exact)}"
        f'mask = torch.tensor([[int(cell) for cell in row] for row in "{marks}".split("/")])\n'
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
        [model, upload, board, picker, *settings, seed],
        [result, line, lines],
        name="edit",
        status=line,
        **RAW,
    )
    upload.change(partial(preview, models), [model, upload], board, trigger_mode="always_last", **RAW, **HIDDEN)
    wire_model(model, partial(refresh, models), [board, picker, *settings], [model, upload], **RAW)
    wire_examples(models, model, tab, upload, examples)
