"""The tab "Generate": a class in, images out, coarse to fine."""

from __future__ import annotations

import shlex
import time
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import torch

from varkit.demo.common import (
    MAX_IMAGES,
    NETWORK,
    SETTINGS,
    Models,
    Step,
    check_class,
    check_seed,
    check_settings,
    class_choices,
    class_name,
    defaults,
    enlarge,
    is_pyramid,
    need_gradio,
    readable_errors,
    seed_controls,
    setting_controls,
    setting_updates,
    stream,
    whole,
)
from varkit.rng import Draw, Rng

ALL, RANDOM = "all", "random"


def choices(pipeline: Any) -> list[tuple[str, str]]:
    return [("All classes, one after another", ALL), ("Random classes", RANDOM), *class_choices(pipeline)]


def default_number(pipeline: Any) -> int:
    classes = pipeline.transformer.num_classes
    return classes if 4 <= classes <= MAX_IMAGES else 8


def labels_for(pipeline: Any, choice: Any, rng: Rng) -> list[int]:
    """The class of each image; random ones depend only on the image's own seed. Raises ValueError."""
    classes = pipeline.transformer.num_classes
    if choice == ALL:
        return [i % classes for i in range(len(rng))]
    if choice == RANDOM:
        u = rng.uniform(torch.zeros(1, dtype=torch.int64), Draw.LABEL)[:, 0]
        return (u * classes).long().tolist()
    return [check_class(pipeline, choice)] * len(rng)


def command(source: str, labels: Sequence[int], seed: int, settings: dict[str, Any], default: dict[str, Any]) -> str:
    """The command line that makes the same images.

    Args: settings, default: what was used, and what the model uses when nothing is said.
    """
    period = next(p for p in range(1, len(labels) + 1) if all(labels[i] == labels[i % p] for i in range(len(labels))))
    words = ["varkit", "sample", source, "--class", ",".join(map(str, labels[:period]))]
    words += ["--num", str(len(labels)), "--seed", str(seed), "--guidance", f"{settings['guidance_scale']:g}"]
    for name in SETTINGS[1:]:
        if settings[name] == default[name]:
            continue
        flag = name.replace("_", "-")
        if name == "more_smooth":
            words.append(f"--{flag}" if settings[name] else f"--no-{flag}")
        else:
            words += [f"--{flag}", str(settings[name])]
    return shlex.join([*words, "--out", "grid.png"])


def generate(models: Models, name: str, choice: str, num: Any, *rest: Any) -> Iterator[tuple[Any, Any, str, str]]:
    """Yields (images with captions, scales of the first image, status, command) as the run proceeds.

    Args: rest: the five sampling settings, then the seed.
    """
    with readable_errors():
        gr = need_gradio()
        pipeline = models.open(name)
        num = whole("Number of images", num, 1, MAX_IMAGES)
        settings, seed = check_settings(pipeline, rest[:-1]), check_seed(rest[-1])
        rng = Rng.from_seed(seed, num)
        labels = labels_for(pipeline, choice, rng)
        line = command(models.source(name), labels, seed, settings, defaults(pipeline))
        grids = pipeline.image_tokenizer.layout.grids
        scales: list[tuple[Any, str]] = []
        began = time.perf_counter()
        yield gr.skip(), [], "Starting ...", line
        for event in stream(partial(pipeline, labels, rng=rng, **settings), is_pyramid(pipeline)):
            if isinstance(event, Step):
                if event.image is not None:
                    caption = " x ".join(map(str, grids[len(scales)])) if len(scales) < len(grids) else ""
                    scales.append((enlarge(event.image), caption))
                yield gr.skip(), list(scales), f"Step {event.number} of {event.total} ...", line
                continue
            seconds = time.perf_counter() - began
            images = [(enlarge(i), class_name(pipeline, c)) for i, c in zip(event.images, labels, strict=True)]
            yield images, scales, status(event, seconds, pipeline.device.type), line


def status(result: Any, seconds: float, device: str) -> str:
    """One line: what was made, how fast, in how many steps."""
    count, size = len(result.images), result.images[0].size
    made = "1 image" if count == 1 else f"{count} images"
    return (
        f"**{made}** of {size[0]} x {size[1]} pixels in **{seconds:.2f} s** ({count / seconds:.1f} a second) · "
        f"{result.stats['steps']} steps · {result.stats['network_calls']} network passes · {device}"
    )


def refresh(models: Models, name: str) -> list[Any]:
    """Updates of class picker, number and sampling controls for another model."""
    with readable_errors():
        gr = need_gradio()
        pipeline = models.open(name)
        picker = gr.update(choices=choices(pipeline), value=ALL)
        return [picker, default_number(pipeline), *(gr.update(**u) for u in setting_updates(pipeline))]


def add_tab(models: Models, model: Any) -> None:
    """Build the tab inside the open `gr.Tabs`.

    Args: model: the dropdown that holds the model's name.
    """
    gr = need_gradio()
    pipeline = models.open(models.names[0])
    with gr.Tab("Generate", id="generate"), gr.Row(equal_height=False):
        with gr.Column(scale=2, min_width=300):
            picker = gr.Dropdown(choices(pipeline), value=ALL, label="Class", elem_id="class")
            num = gr.Slider(1, MAX_IMAGES, default_number(pipeline), step=1, label="Images", elem_id="num")
            settings = setting_controls(pipeline)
            seed = seed_controls()
            button = gr.Button("Generate", variant="primary", size="lg", elem_id="generate-button")
        with gr.Column(scale=5, min_width=320):
            images = gr.Gallery(
                label="Images",
                show_label=False,
                columns=5,
                height="auto",
                object_fit="contain",
                format="png",
                interactive=False,
                fit_columns=False,
                buttons=["download", "download_all", "fullscreen"],
                elem_id="images",
                elem_classes="pictures",
            )
            note = gr.Markdown("Choose a class and press **Generate**.", elem_id="status", elem_classes="note")
            gr.Markdown("Coarse to fine: the first image after each step", elem_classes="heading")
            scales = gr.Gallery(
                label="Coarse to fine",
                show_label=False,
                columns=6,
                height="auto",
                object_fit="contain",
                format="png",
                interactive=False,
                fit_columns=False,
                buttons=["fullscreen"],
                elem_id="scales",
                elem_classes="pictures",
            )
            line = gr.Code(
                label="The same images from the command line",
                language="shell",
                interactive=False,
                lines=1,
                wrap_lines=True,
                show_line_numbers=False,
                buttons=["copy"],
                elem_id="command",
            )
    button.click(
        partial(generate, models),
        [model, picker, num, *settings, seed],
        [images, scales, note, line],
        api_name="generate",
        concurrency_limit=1,
        concurrency_id=NETWORK,
        show_progress="minimal",
        show_progress_on=note,
    )
    model.change(
        partial(refresh, models),
        model,
        [picker, num, *settings],
        api_visibility="private",
        concurrency_limit=1,
        concurrency_id=NETWORK,
    )
