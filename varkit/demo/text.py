"""The tab "Text": a prompt in, images out."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

from varkit.demo.class_to_image import drawing, sample_line
from varkit.demo.common import (
    Models,
    check_prompt,
    check_seed,
    check_settings,
    defaults,
    enlarge,
    need_gradio,
    readable_errors,
    setting_updates,
    whole,
)
from varkit.demo.controls import (
    buttons,
    code,
    default_number,
    gallery,
    note,
    prompt_box,
    seed_controls,
    setting_controls,
    wire,
    wire_model,
)
from varkit.rng import Rng


def generate(models: Models, name: str, prompt: Any, num: Any, *rest: Any) -> Iterator[tuple[Any, str, str]]:
    """Yields (images, status, command) as the run proceeds.

    Args: rest: the six sampling settings, then the seed.
    """
    with readable_errors():
        pipeline = models.open(name)
        prompt = check_prompt(prompt)
        num = whole("Number of images", num, 1, models.limits.images)
        settings, seed = check_settings(pipeline, rest[:-1]), check_seed(rest[-1])
        line = sample_line(models.source(name), ["--prompt", prompt], num, seed, settings, defaults(pipeline))
        call = partial(pipeline, prompt, num_images_per_prompt=num, rng=Rng.from_seed(seed, num), **settings)
        for images, _, told, _ in drawing(models, pipeline, call, line, enlarged):
            yield images, told, line


def enlarged(images: list[Any]) -> list[Any]:
    return [enlarge(image) for image in images]


def refresh(models: Models, name: str) -> list[Any]:
    """Updates of number and sampling controls for another model."""
    with readable_errors():
        gr, pipeline = need_gradio(), models.open(name)
        number = default_number(pipeline, models.limits.images)
        return [number, *(gr.update(**u) for u in setting_updates(pipeline))]


def add_tab(models: Models) -> None:
    """Build the tab inside the open `gr.Tabs`.   models: those of texts."""
    gr = need_gradio()
    pipeline, most = models.open(models.names[0]), models.limits.images
    with gr.Tab("Text", id="text"), gr.Row(equal_height=False):
        with gr.Column(scale=2, min_width=300):
            model = gr.Dropdown(models.names, value=models.names[0], label="Model of texts", elem_id="text-model")
            prompt = prompt_box("text-prompt")
            num = gr.Slider(1, most, default_number(pipeline, most), step=1, label="Images", elem_id="text-num")
            settings = setting_controls(pipeline)
            seed = seed_controls()
            start_stop = buttons("Generate", "text")
        with gr.Column(scale=5, min_width=320):
            images = gallery("Images", "text-images", 4, buttons=["download", "download_all", "fullscreen"])
            line = note("Write what is to be drawn and press **Generate**.", "text-status")
            lines = code("The same images from the command line", "text-command")
    inputs = [model, prompt, num, *settings, seed]
    wire(start_stop, partial(generate, models), inputs, [images, line, lines], name="text", status=line)
    wire_model(model, partial(refresh, models), [num, *settings])
