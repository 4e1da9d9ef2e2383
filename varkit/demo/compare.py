"""The tab "Compare": two models, or one model with two settings, from the same seed."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import numpy as np

from varkit.demo.class_to_image import captioned, command, labels_for, status
from varkit.demo.common import (
    SETTINGS,
    Models,
    check_seed,
    check_settings,
    defaults,
    need_gradio,
    readable_errors,
    setting_updates,
    whole,
)
from varkit.demo.controls import (
    ALL,
    LONG,
    buttons,
    choices,
    code,
    gallery,
    note,
    seed_controls,
    setting_controls,
    wire,
    wire_model,
)
from varkit.demo.running import Done, Step, run
from varkit.rng import Rng

SIDES = ("A", "B")


def compare(models: Models, choice: str, num: Any, seed: Any, *rest: Any) -> Iterator[tuple[Any, ...]]:
    """Yields (images of A, line of A, images of B, line of B, status, commands) as the two runs proceed.

    Args: rest: of A its model and six sampling settings, then of B.
    """
    with readable_errors():
        num, seed = whole("Number of images", num, 1, models.limits.images), check_seed(seed)
        each, calls, commands = 1 + len(SETTINGS), [], []
        for values in (rest[:each], rest[each:]):
            pipeline = models.open(values[0])
            settings, rng = check_settings(pipeline, values[1:]), Rng.from_seed(seed, num)
            labels = labels_for(pipeline, choice, rng)
            calls.append((pipeline, labels, partial(pipeline, labels, rng=rng, **settings)))
            commands.append(command(models.source(values[0]), labels, seed, settings, defaults(pipeline)))
        lines, ended = "\n".join(commands), list[Done]()
        shown: list[Any] = [[], "", [], ""]
        for side, (pipeline, labels, call) in zip(SIDES, calls, strict=True):
            yield (*shown, f"{side}: starting ...", lines)
            for event in run(models.turns, call, {}):
                if isinstance(event, Step):
                    yield (*shown, f"{side}: step {event.number} of {event.total} ...", lines)
                    continue
                place = 2 * len(ended)
                shown[place] = captioned(pipeline, event.result.images, labels)
                shown[place + 1] = status(event.result, event.seconds, pipeline.device.type)
                ended.append(event)
        yield (*shown, verdict(ended), lines)


def verdict(ended: Sequence[Done]) -> str:
    """Which was faster, and how many images agree to the pixel."""
    (a, b), count = ended, len(ended[0].result.images)
    pairs = zip(a.result.images, b.result.images, strict=True)
    equal = sum(x.size == y.size and np.array_equal(np.asarray(x), np.asarray(y)) for x, y in pairs)
    fast, slow = sorted((a.seconds, b.seconds))
    first = "A" if a.seconds <= b.seconds else "B"
    return (
        f"**{first}** took {fast:.2f} s, the other {slow:.2f} s ({slow / max(fast, 1e-9):.2f} times as long) · "
        f"{equal} of {count} images are the same · one run each, on a shared machine"
    )


def refresh(models: Models, name: str) -> list[Any]:
    """Updates of a side's sampling controls for another model."""
    with readable_errors():
        gr = need_gradio()
        return [gr.update(**u) for u in setting_updates(models.open(name))]


def refresh_classes(models: Models, name: str) -> Any:
    with readable_errors():
        return need_gradio().update(choices=choices(models.open(name)), value=ALL)


def add_tab(models: Models) -> None:
    """Build the tab inside the open `gr.Tabs`."""
    gr = need_gradio()
    names, most = models.names, models.limits.images
    pipeline = models.open(names[0])
    sides, images, notes = [], [], []
    with gr.Tab("Compare", id="compare"):
        with gr.Row(equal_height=False):
            for side, name in zip(SIDES, (names[0], names[0]), strict=True):
                with gr.Column(min_width=300):
                    chosen = gr.Dropdown(names, value=name, label=f"Model {side}", elem_id=f"compare-model-{side}")
                    sides.append([chosen, *setting_controls(pipeline)])
        with gr.Row(equal_height=False):
            picker = gr.Dropdown(choices(pipeline), value=ALL, label="Class", elem_id="compare-class", min_width=240)
            num = gr.Slider(1, most, min(6, most), step=1, label="Images of each", min_width=240)
            with gr.Column(min_width=240):
                seed = seed_controls()
        start_stop = buttons("Compare", "compare")
        line = note("Change something on one side, such as guidance, and press **Compare**.", "compare-status")
        with gr.Row(equal_height=False):
            for side in SIDES:
                with gr.Column(min_width=300):
                    images.append(gallery(side, f"compare-images-{side}", 3))
                    notes.append(note("", f"compare-note-{side}"))
        commands = code("The two from the command line", "compare-command")
    sides[1][1].value = 1.0  # something to see at the first click: B without guidance
    outputs = [images[0], notes[0], images[1], notes[1], line, commands]
    inputs = [picker, num, seed, *sides[0], *sides[1]]
    wire(start_stop, partial(compare, models), inputs, outputs, name="compare", status=line, lane=LONG)
    for chosen, *settings in sides:
        wire_model(chosen, partial(refresh, models), settings)
    wire_model(sides[0][0], partial(refresh_classes, models), [picker])
