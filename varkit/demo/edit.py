"""The tab "Edit": redraw a box of an image, or everything around it."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any

import numpy as np
from PIL import Image, ImageOps

from varkit.demo.common import (
    NETWORK,
    Models,
    Step,
    check_class,
    check_seed,
    check_settings,
    class_choices,
    defaults,
    enlarge,
    is_pyramid,
    need_gradio,
    number,
    readable_errors,
    seed_controls,
    setting_controls,
    setting_updates,
    stream,
)
from varkit.pipelines.edit import Box, box_mask
from varkit.rng import Rng

MAX_SIDE = 4096
FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF")
FOLLOW = "follow"
INSIDE, OUTSIDE = "The box", "Everything but the box"
TINT = (249, 115, 22)

Upload = Mapping[str, Any]
"""What gradio hands over unprocessed for an image box: "path" is a file that it has taken in itself."""


def read_upload(upload: Upload | None) -> Image.Image:
    """The image in a file a visitor sent, upright, RGB. Raises ValueError: none, no image, or too large."""
    path = upload.get("path") if upload else None
    if not path:
        raise ValueError("upload an image or choose an example first")
    try:
        with Image.open(path, formats=FORMATS) as file:
            width, height = file.size  # from the header: nothing is decoded yet
            if max(width, height) <= MAX_SIDE:
                return ImageOps.exif_transpose(file).convert("RGB")
    except Image.DecompressionBombError:
        raise ValueError(f"the image is far too large; send at most {MAX_SIDE} a side") from None
    except (OSError, SyntaxError):
        raise ValueError(f"this file is not an image that can be read; send {', '.join(FORMATS)}") from None
    raise ValueError(f"the image has {width} x {height} pixels; send at most {MAX_SIDE} a side")


def to_model_size(image: Image.Image, size: tuple[int, int]) -> tuple[Image.Image, bool]:
    """The image at the model's (height, width), and whether it was one of ours enlarged: then exactly that one."""
    height, width = size
    k = image.width // width
    if k > 1 and image.size == (width * k, height * k):
        pixels = np.asarray(image)
        small = pixels[::k, ::k]
        if np.array_equal(small.repeat(k, 0).repeat(k, 1), pixels):
            return Image.fromarray(small), True
    return image.resize((width, height), Image.Resampling.LANCZOS), False


def check_region(pipeline: Any, region: Any, sides: tuple[Any, ...]) -> tuple[Box, str, np.ndarray]:
    """What to redraw: the box, the word for `keep=`, and (H, W) bool pixels, True where redrawn.

    Raises: ValueError on an impossible box, or one that covers no token.
    """
    if region not in (INSIDE, OUTSIDE):
        raise ValueError(f"redraw must be {INSIDE!r} or {OUTSIDE!r}")
    keep = "outside" if region == INSIDE else "inside"
    top, left, bottom, right = (
        number(what, side, 0, 1) for what, side in zip(("Top", "Left", "Bottom", "Right"), sides, strict=True)
    )
    if top >= bottom or left >= right:
        raise ValueError("the box is empty: top must be above bottom, and left must be left of right")
    tokenizer = pipeline.image_tokenizer
    grid = tokenizer.layout.grids[-1]
    redrawn = box_mask(grid, (top, left, bottom, right), keep).numpy() < 0.5
    if not redrawn.any():
        raise ValueError(f"nothing would be redrawn: the model works in {grid[0]} x {grid[1]} cells; change the box")
    height, width = tokenizer.image_size
    rows, columns = np.arange(height) * grid[0] // height, np.arange(width) * grid[1] // width
    return (top, left, bottom, right), keep, redrawn[rows][:, columns]


def preview(
    models: Models, name: str, upload: Upload | None, region: Any, *sides: Any
) -> tuple[Image.Image | None, str]:
    """The image as the model sees it with the part to redraw tinted, and a line about it."""
    with readable_errors():
        if upload is None:
            return None, ""
        pipeline = models.open(name)
        size = pipeline.image_tokenizer.image_size
        image, _ = to_model_size(read_upload(upload), size)
        try:
            _, _, redrawn = check_region(pipeline, region, sides)
        except ValueError as error:
            text = str(error)
            return enlarge(image), f"{text[:1].upper()}{text[1:]}."
        pixels = np.asarray(image).astype(np.float32)
        pixels[redrawn] = 0.4 * pixels[redrawn] + 0.6 * np.array(TINT, np.float32)
        share = redrawn.mean()
        note = f"**{share:.0%}** of the image will be redrawn."
        return enlarge(Image.fromarray(pixels.round().astype(np.uint8))), note


def edit(models: Models, name: str, upload: Upload | None, region: Any, *rest: Any) -> Iterator[tuple[Any, str, str]]:
    """Yields ((before, after), status, Python lines) as the run proceeds.

    Args: rest: top, left, bottom, right, class, the five sampling settings, seed.
    """
    with readable_errors():
        pipeline = models.open(name)
        image, exact = to_model_size(read_upload(upload), pipeline.image_tokenizer.image_size)
        box, keep, _ = check_region(pipeline, region, rest[:4])
        label = None if rest[4] == FOLLOW else check_class(pipeline, rest[4])
        settings, seed = check_settings(pipeline, rest[5:-1]), check_seed(rest[-1])
        before = enlarge(image)
        code = snippet(
            models.source(name), image.size if exact else None, box, keep, label, seed, changed(pipeline, settings)
        )
        call = partial(
            pipeline.edit, image, box=box, keep=keep, class_labels=label, rng=Rng.from_seed(seed, 1), **settings
        )
        began = time.perf_counter()
        for event in stream(call, is_pyramid(pipeline)):
            if isinstance(event, Step):
                after = before if event.image is None else enlarge(event.image)
                yield (before, after), f"Step {event.number} of {event.total} ...", code
                continue
            seconds = time.perf_counter() - began
            note = f"Redrawn in **{seconds:.2f} s** · {event.stats['steps']} steps · {pipeline.device.type}"
            yield (before, enlarge(event.images[0])), note, code


def changed(pipeline: Any, settings: dict[str, Any]) -> dict[str, Any]:
    """The settings that are not the model's own."""
    default = defaults(pipeline)
    return {k: v for k, v in settings.items() if v != default[k]}


def snippet(
    source: str,
    exact: tuple[int, int] | None,
    box: Box,
    keep: str,
    label: int | None,
    seed: int,
    settings: dict[str, Any],
) -> str:
    """Python that makes the same edit.   exact: (width, height) when the image was enlarged from that size."""
    sides = ", ".join(f"{side:g}" for side in box)
    arguments = [f"box=({sides})", f"keep={keep!r}", f"class_labels={label}", f"seed={seed}"]
    arguments += [f"{k}={v!r}" for k, v in settings.items()]
    shrink = f".resize({exact}, Image.Resampling.NEAREST)" if exact else ""
    return (
        "from PIL import Image, ImageOps\n"
        "from varkit import AutoPipeline\n\n"
        f"pipeline = AutoPipeline.from_pretrained({source!r})\n"
        f'image = ImageOps.exif_transpose(Image.open("image.png")){shrink}  # the image above\n'
        f"result = pipeline.edit(image, {', '.join(arguments)})\n"
        'result.images[0].save("edited.png")'
    )


def choices(pipeline: Any) -> list[tuple[str, str]]:
    return [("Follow the surroundings", FOLLOW), *class_choices(pipeline)]


def refresh(models: Models, name: str) -> list[Any]:
    """Updates of class picker and sampling controls for another model."""
    with readable_errors():
        gr = need_gradio()
        pipeline = models.open(name)
        picker = gr.update(choices=choices(pipeline), value=FOLLOW)
        return [picker, *(gr.update(**u) for u in setting_updates(pipeline))]


def show_examples(models: Models, name: str, upload: Upload | None) -> tuple[Any, Any]:
    """The model's own images, and the first of them where no image was given yet."""
    with readable_errors():
        gr = need_gradio()
        images = models.examples(name)
        return gr.update(value=images, visible=bool(images)), images[0] if images and upload is None else gr.skip()


def pick_example(models: Models, name: str, index: int) -> Image.Image:
    with readable_errors():
        images = models.examples(name)
        if not 0 <= index < len(images):
            raise ValueError("choose one of the examples shown")
        return images[index]


def add_tab(models: Models, model: Any) -> None:
    """Build the tab inside the open `gr.Tabs`.

    Args: model: the dropdown that holds the model's name.
    """
    gr = need_gradio()
    pipeline = models.open(models.names[0])
    with gr.Tab("Edit", id="edit") as tab, gr.Row(equal_height=False):
        with gr.Column(scale=2, min_width=300):
            upload = gr.Image(
                label="Image",
                format="png",
                height=260,
                sources=["upload", "clipboard"],
                buttons=[],
                elem_id="upload",
            )
            gr.Markdown("Or choose one that the model drew:", elem_classes="note")
            examples = gr.Gallery(
                label="Examples",
                show_label=False,
                columns=6,
                height="auto",
                object_fit="contain",
                format="png",
                allow_preview=False,
                interactive=False,
                buttons=[],
                elem_id="examples",
                elem_classes="pictures",
            )
            region = gr.Radio([INSIDE, OUTSIDE], value=INSIDE, label="Redraw", elem_id="region")
            with gr.Group():
                with gr.Row():
                    top = gr.Slider(0, 1, 0.5, step=0.05, label="Top", min_width=120)
                    bottom = gr.Slider(0, 1, 1, step=0.05, label="Bottom", min_width=120)
                with gr.Row():
                    left = gr.Slider(0, 1, 0, step=0.05, label="Left", min_width=120)
                    right = gr.Slider(0, 1, 1, step=0.05, label="Right", min_width=120)
            picker = gr.Dropdown(choices(pipeline), value=FOLLOW, label="Class", elem_id="edit-class")
            settings = setting_controls(pipeline)
            seed = seed_controls()
            button = gr.Button("Redraw", variant="primary", size="lg", elem_id="edit-button")
        with gr.Column(scale=5, min_width=320):
            with gr.Row():
                with gr.Column(min_width=260):
                    shown = gr.Image(
                        label="To be redrawn",
                        type="pil",
                        format="png",
                        interactive=False,
                        buttons=[],
                        elem_id="preview",
                    )
                    share = gr.Markdown("", elem_classes="note")
                with gr.Column(min_width=260):
                    result = gr.ImageSlider(
                        label="Before and after",
                        type="pil",
                        format="png",
                        interactive=False,
                        buttons=["download", "fullscreen"],
                        elem_id="result",
                    )
                    note = gr.Markdown("Press **Redraw** to begin.", elem_id="edit-status", elem_classes="note")
            code = gr.Code(
                label="The same edit in Python",
                language="python",
                interactive=False,
                lines=1,
                wrap_lines=True,
                show_line_numbers=False,
                buttons=["copy"],
                elem_id="snippet",
            )

    def on_pick(name: str, event: Any) -> Image.Image:
        return pick_example(models, name, event.index)

    on_pick.__annotations__ = {"event": gr.SelectData}  # gradio goes by the annotation

    sides = [top, left, bottom, right]
    hidden: dict[str, Any] = {"api_visibility": "private", "show_progress": "hidden"}
    network: dict[str, Any] = {"concurrency_limit": 1, "concurrency_id": NETWORK}
    raw: dict[str, Any] = {"preprocess": False}  # else gradio opens uploads itself, and fails on a broken one
    button.click(
        partial(edit, models),
        [model, upload, region, *sides, picker, *settings, seed],
        [result, note, code],
        api_name="edit",
        show_progress="minimal",
        show_progress_on=note,
        **raw,
        **network,
    )
    look = (partial(preview, models), [model, upload, region, *sides], [shown, share])
    gr.on([c.change for c in (upload, region, *sides)], *look, trigger_mode="always_last", **raw, **hidden)
    fill = (partial(show_examples, models), [model, upload], [examples, upload])
    tab.select(*fill, **raw, **network, **hidden)
    examples.select(on_pick, model, upload, **hidden)
    changed_model = model.change(partial(refresh, models), model, [picker, *settings], **network, **hidden)
    changed_model.then(*fill, **raw, **network, **hidden)
    changed_model.then(*look, **raw, **hidden)
