"""The tab "Control": edges and other maps, of an image or drawn by hand, steer what is generated."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

from varkit.demo.class_to_image import captioned, class_words, drawing, labels_for, sample_line
from varkit.demo.common import (
    Models,
    check_prompt,
    check_seed,
    check_settings,
    defaults,
    need_gradio,
    number,
    readable_errors,
    setting_updates,
    whole,
)
from varkit.demo.control_map import DRAWN, MAP, TITLES, board_grid, board_of, control_map, sources
from varkit.demo.controls import (
    ALL,
    HIDDEN,
    NETWORK,
    RAW,
    buttons,
    choices,
    code,
    default_number,
    gallery,
    heading,
    note,
    prompt_box,
    seed_controls,
    setting_controls,
    wire,
    wire_model,
)
from varkit.demo.files import keeping
from varkit.demo.painter import no_marks, painter
from varkit.demo.text import enlarged
from varkit.demo.uploads import Upload, upload_box
from varkit.rng import Rng

MOST_STRENGTH = 2.0
ABOUT = "What steers. Edges are drawn by dragging; start on a line to take it away"


def kinds_of(pipeline: Any) -> tuple[str, ...]:
    return pipeline.transformer.controller.kinds


def preview(models: Models, name: str, upload: Upload | None, source: Any) -> Any:
    """The map of what was uploaded; none where there is nothing to show."""
    with readable_errors():
        if upload is None or source == DRAWN:
            return None
        return control_map(models, models.open(name), upload, source, None)


def generate(
    models: Models, name: str, upload: Upload | None, source: Any, marks: Any, kind: Any, strength: Any, *rest: Any
) -> Iterator[tuple[Any, Any, Any, str, str]]:
    """Yields (map, images, stages of the first image, status, command) as the run proceeds.

    Args: rest: class, prompt, number of images, the six sampling settings, seed.
    """
    with readable_errors():
        pipeline = models.open(name)
        choice, prompt, num, *sampling, seed = rest
        num = whole("Number of images", num, 1, models.limits.images)
        strength = number("Strength", strength, 0, MOST_STRENGTH)
        settings, seed = check_settings(pipeline, sampling), check_seed(seed)
        rng, kinds = Rng.from_seed(seed, num), kinds_of(pipeline)
        if kinds and kind not in kinds:
            raise ValueError(f"the kind of control must be one of {', '.join(kinds)}; got {str(kind)[:40]}")
        if pipeline.transformer.condition == "text":
            prompt = check_prompt(prompt)
            asked, show = ["--prompt", prompt], enlarged
            call = partial(pipeline, prompt, num_images_per_prompt=num, rng=rng, **settings)
        else:
            labels = labels_for(pipeline, choice, rng)
            asked, show = class_words(labels), partial(captioned, pipeline, labels=labels)
            call = partial(pipeline, labels, rng=rng, **settings)
        made = control_map(models, pipeline, upload, source, marks)
        asked += words(source, kind if len(kinds) > 1 else "", strength)
        line = sample_line(models.source(name), asked, num, seed, settings, defaults(pipeline))
        call = partial(call, control={kind: made} if kinds else made, control_strength=strength)
        for event in drawing(models, pipeline, call, line, show):
            yield made, *event


def words(source: str, kind: str, strength: float) -> list[str]:
    """Of the command line: `image.png` is what was uploaded, `map.png` the map that is shown."""
    extracted = source not in (MAP, DRAWN)
    of_kind = f"{kind}=" if kind else ""
    said = ["--control", of_kind + ("image.png" if extracted else "map.png")]
    said += ["--extract", source] if extracted else []
    return said if strength == 1 else [*said, "--control-strength", f"{strength:g}"]


def refresh(models: Models, name: str, source: Any) -> list[Any]:
    """Updates of board, kind, class, prompt, number and sampling controls for another model."""
    with readable_errors():
        gr, pipeline = need_gradio(), models.open(name)
        text, kinds = pipeline.transformer.condition == "text", kinds_of(pipeline)
        return [
            gr.update(visible=shown(source), **board_of(pipeline)),
            gr.update(choices=list(kinds), value=next(iter(kinds), None), visible=len(kinds) > 1),
            gr.update(choices=choices(pipeline), value=None if text else ALL, visible=not text),
            gr.update(visible=text),
            default_number(pipeline, models.limits.images),
            *(gr.update(**u) for u in setting_updates(pipeline)),
        ]


def shown(source: Any) -> bool | str:
    """Of the board. Left out of the page and put in later, its template would not find its properties."""
    return True if source == DRAWN else "hidden"


def boxes(source: Any) -> tuple[Any, Any]:
    """Updates of the image box and the board: one of them is shown."""
    update = need_gradio().update
    return update(visible=source != DRAWN), update(visible=shown(source))


def input_controls(pipeline: Any, source: str) -> tuple[list[Any], list[Any]]:
    """The boxes of a control (upload, source, board, kind, strength) and of what is drawn (class, prompt)."""
    gr, kinds, text = need_gradio(), kinds_of(pipeline), pipeline.transformer.condition == "text"
    offered = [(TITLES[name], name) for name in sources()]
    where = gr.Dropdown(offered, value=source, label="Control", info=ABOUT, elem_id="control-source")
    upload = upload_box("control", visible=source != DRAWN)
    board = painter(
        board_grid(pipeline), "control-board", marks=no_marks(board_grid(pipeline)), image=board_of(pipeline)["image"],
        tools=("frame", "invert", "clear"), about="Edges", ink="white", brush=0.5, visible=shown(source),
    )  # fmt: skip
    kind = gr.Dropdown(list(kinds), value=next(iter(kinds), None), label="Kind of map", visible=len(kinds) > 1)
    strength = gr.Slider(
        0,
        MOST_STRENGTH,
        1,
        step=0.05,
        label="Strength",
        info="0 is no control, 1 as trained",
        elem_id="control-strength",
    )
    picker = gr.Dropdown(
        choices(pipeline), value=None if text else ALL, label="Class", elem_id="control-class", visible=not text
    )
    return [upload, where, board, kind, strength], [picker, prompt_box("control-prompt", visible=text)]


def add_tab(models: Models) -> None:
    """Build the tab inside the open `gr.Tabs`.   models: those that take control images."""
    gr = need_gradio()
    pipeline, most = models.open(models.names[0]), models.limits.images
    with gr.Tab("Control", id="control"), gr.Row(equal_height=False):
        with gr.Column(scale=2, min_width=300):
            model = gr.Dropdown(
                models.names, value=models.names[0], label="Model with control", elem_id="control-model"
            )
            steering, asking = input_controls(pipeline, sources()[0])
            num = gr.Slider(1, most, default_number(pipeline, most), step=1, label="Images", elem_id="control-num")
            settings = setting_controls(pipeline)
            seed = seed_controls()
            start_stop = buttons("Generate", "control")
        with gr.Column(scale=5, min_width=320):
            with gr.Row(equal_height=False):
                with gr.Column(scale=1, min_width=200):
                    made = gr.Image(
                        label="The map",
                        format="png",
                        height=220,
                        interactive=False,
                        buttons=["download"],
                        elem_id="control-map",
                    )
                with gr.Column(scale=3, min_width=300):
                    images = gallery("Images", "control-images", 4, buttons=["download", "download_all", "fullscreen"])
            line = note("Give an image, or draw edges, and press **Generate**.", "control-status")
            heading("Coarse to fine: the first image on the way (of models that can show it)")
            scales = gallery("Coarse to fine", "control-scales", 6)
            lines = code(
                "The same from the command line: image.png is what you sent, map.png the map shown", "control-command"
            )
    wire(
        start_stop,
        partial(generate, models),
        [model, *steering, *asking, num, *settings, seed],
        [made, images, scales, line, lines],
        name="control",
        status=line,
        **RAW,
    )
    upload, source, board, kind, _ = steering
    look = (keeping(partial(preview, models), made.GRADIO_CACHE), [model, upload, source], made)
    for changed in (upload, source, model):
        changed.change(*look, trigger_mode="always_last", **RAW, **NETWORK, **HIDDEN)
    source.change(boxes, source, [upload, board], queue=False, **HIDDEN)
    wire_model(model, partial(refresh, models), [board, kind, *asking, num, *settings], [model, source], **RAW)
