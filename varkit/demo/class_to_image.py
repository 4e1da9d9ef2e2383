"""The tab "Generate": a class in, images out, coarse to fine."""

from __future__ import annotations

import shlex
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch

from varkit.demo.common import (
    SETTINGS,
    Models,
    check_class,
    check_seed,
    check_settings,
    class_name,
    defaults,
    enlarge,
    need_gradio,
    readable_errors,
    setting_updates,
    stages,
    whole,
)
from varkit.demo.controls import (
    ALL,
    RANDOM,
    buttons,
    choices,
    code,
    default_number,
    gallery,
    heading,
    note,
    seed_controls,
    setting_controls,
    wire,
    wire_model,
)
from varkit.demo.running import Step, run
from varkit.pipelines.base import speculation
from varkit.rng import Draw, Rng


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
    """The command line that makes the same images of classes."""
    return sample_line(source, class_words(labels), len(labels), seed, settings, default)


def class_words(labels: Sequence[int]) -> list[str]:
    """Words of the command line that ask for these classes."""
    period = next(p for p in range(1, len(labels) + 1) if all(labels[i] == labels[i % p] for i in range(len(labels))))
    return ["--class", ",".join(map(str, labels[:period]))]


def sample_line(
    source: str,
    asked: Sequence[str],
    num: int,
    seed: int,
    settings: dict[str, Any],
    default: dict[str, Any],
    out: str = "grid.png",
) -> str:
    """A command line of `varkit sample`.

    Args:
        asked: words that say what is drawn.
        settings, default: what was used, and what the model uses when nothing is said.
        out: the file that it writes.
    """
    words = ["varkit", "sample", source, *asked]
    words += ["--num", str(num), "--seed", str(seed), "--guidance", f"{settings['guidance_scale']:g}"]
    for name in SETTINGS[1:]:
        if name not in settings or settings[name] == default[name]:
            continue
        flag = "tokens" if name == "num_tokens" else name.replace("_", "-")
        if name == "more_smooth":
            words.append(f"--{flag}" if settings[name] else f"--no-{flag}")
        else:
            words += [f"--{flag}", str(settings[name])]
    return shlex.join([*words, "--out", out])


def generate(models: Models, name: str, choice: str, num: Any, *rest: Any) -> Iterator[tuple[Any, Any, str, str]]:
    """Yields (images with captions, stages of the first image, status, command) as the run proceeds.

    Args: rest: the six sampling settings, then the seed.
    """
    with readable_errors():
        pipeline = models.open(name)
        num = whole("Number of images", num, 1, models.limits.images)
        settings, seed = check_settings(pipeline, rest[:-1]), check_seed(rest[-1])
        rng = Rng.from_seed(seed, num)
        labels = labels_for(pipeline, choice, rng)
        line = command(models.source(name), labels, seed, settings, defaults(pipeline))
        call = partial(pipeline, labels, rng=rng, **settings)
        yield from drawing(models, pipeline, call, line, partial(captioned, pipeline, labels=labels))


def drawing(
    models: Models, pipeline: Any, call: Callable[..., Any], line: str, shown: Callable[[Any], list[Any]]
) -> Iterator[tuple[Any, Any, str, str]]:
    """Yields (images, stages of the first image, status, `line`) as a pipeline's call proceeds.

    Args: shown: images as the gallery takes them.
    """
    gr = need_gradio()
    scales: list[tuple[Any, str]] = []
    yield gr.skip(), [], "Starting ...", line
    for event in run(models.turns, call, stages(pipeline)):
        if isinstance(event, Step):
            if event.image is not None:
                scales.append((enlarge(event.image), event.caption))
            yield gr.skip(), list(scales), f"Step {event.number} of {event.total} ...", line
            continue
        yield shown(event.result.images), scales, status(event.result, event.seconds, pipeline.device.type), line


def captioned(pipeline: Any, images: Sequence[Any], labels: Sequence[int]) -> list[tuple[Any, str]]:
    """Enlarged images with the names of their classes."""
    return [(enlarge(i), class_name(pipeline, c)) for i, c in zip(images, labels, strict=True)]


def status(result: Any, seconds: float, device: str) -> str:
    """One line: what was made, how fast, in how many steps."""
    count, size = len(result.images), result.images[0].size
    made = "1 image" if count == 1 else f"{count} images"
    drafts = speculation([result.stats])
    more = f" · {drafts['tokens_per_call']:.2f} tokens a pass, {drafts['law']}" if drafts else ""
    return (
        f"**{made}** of {size[0]} x {size[1]} pixels in **{seconds:.2f} s** ({count / seconds:.1f} a second) · "
        f"{result.stats['steps']} steps · {result.stats['network_calls']} network passes{more} · {device}"
    )


def refresh(models: Models, name: str) -> list[Any]:
    """Updates of class picker, number and sampling controls for another model."""
    with readable_errors():
        gr = need_gradio()
        pipeline = models.open(name)
        picker = gr.update(choices=choices(pipeline), value=ALL)
        return [
            picker,
            default_number(pipeline, models.limits.images),
            *(gr.update(**u) for u in setting_updates(pipeline)),
        ]


def add_tab(models: Models, model: Any) -> None:
    """Build the tab inside the open `gr.Tabs`.

    Args: model: the dropdown that holds the model's name.
    """
    gr = need_gradio()
    pipeline, most = models.open(models.names[0]), models.limits.images
    with gr.Tab("Generate", id="generate"), gr.Row(equal_height=False):
        with gr.Column(scale=2, min_width=300):
            picker = gr.Dropdown(choices(pipeline), value=ALL, label="Class", elem_id="class")
            num = gr.Slider(1, most, default_number(pipeline, most), step=1, label="Images", elem_id="num")
            settings = setting_controls(pipeline)
            seed = seed_controls()
            start_stop = buttons("Generate", "generate")
        with gr.Column(scale=5, min_width=320):
            images = gallery("Images", "images", 5, buttons=["download", "download_all", "fullscreen"])
            status_line = note("Choose a class and press **Generate**.", "status")
            heading("Coarse to fine: the first image on the way (of models that can show it)")
            scales = gallery("Coarse to fine", "scales", 6)
            line = code("The same images from the command line", "command")
    wire(
        start_stop,
        partial(generate, models),
        [model, picker, num, *settings, seed],
        [images, scales, status_line, line],
        name="generate",
        status=status_line,
    )
    wire_model(model, partial(refresh, models), [picker, num, *settings])
