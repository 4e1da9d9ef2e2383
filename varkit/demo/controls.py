"""The boxes, galleries and wires that the tabs share."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

from varkit.demo.common import MAX_PROMPT, MAX_SEED, class_choices, need_gradio, new_seed, setting_updates
from varkit.demo.files import keeping

NETWORK: dict[str, Any] = {"concurrency_limit": 1, "concurrency_id": "network"}
"""Arguments of events that run a network for a moment: one line of waiting for all of them."""
LONG: dict[str, Any] = {"concurrency_limit": 1, "concurrency_id": "long"}
"""Of comparisons and evaluations: a line of their own, which takes turns with the other (`Turns`)."""
HIDDEN: dict[str, Any] = {"api_visibility": "private", "show_progress": "hidden"}
RAW: dict[str, Any] = {"preprocess": False}
"""gradio would open uploads itself, and fail on a broken one."""

ALL, RANDOM = "all", "random"


def choices(pipeline: Any) -> list[tuple[str, str]]:
    """Of the class picker; none of a model of texts."""
    if pipeline.transformer.condition == "text":
        return []
    return [("All classes, one after another", ALL), ("Random classes", RANDOM), *class_choices(pipeline)]


def default_number(pipeline: Any, most: int) -> int:
    """Of images: one a class where these are few; four of a text."""
    classes = 4 if pipeline.transformer.condition == "text" else pipeline.transformer.num_classes
    return classes if 4 <= classes <= most else min(8, most)


def gallery(label: str, name: str, columns: int, **options: Any) -> Any:
    """Images that are shown as they are.   name: of the element."""
    gr = need_gradio()
    usual = {"buttons": ["fullscreen"], "elem_classes": "pictures"}
    return gr.Gallery(
        label=label,
        show_label=False,
        columns=columns,
        height="auto",
        object_fit="contain",
        format="png",
        interactive=False,
        fit_columns=False,
        elem_id=name,
        **{**usual, **options},
    )


def code(label: str, name: str, language: str = "shell") -> Any:
    """Lines to copy."""
    return need_gradio().Code(
        label=label,
        language=language,
        interactive=False,
        lines=1,
        wrap_lines=True,
        show_line_numbers=False,
        buttons=["copy"],
        elem_id=name,
    )


def note(text: str, name: str) -> Any:
    """The line that says how far a run is."""
    return need_gradio().Markdown(text, elem_id=name, elem_classes="note")


def heading(text: str) -> Any:
    return need_gradio().Markdown(text, elem_classes="heading")


def slider_of_two(label: str, name: str) -> Any:
    """Two images under a line that can be dragged."""
    return need_gradio().ImageSlider(
        label=label,
        type="pil",
        format="png",
        interactive=False,
        buttons=["download", "fullscreen"],
        elem_id=name,
    )


def setting_controls(pipeline: Any) -> list[Any]:
    """A guidance slider and an accordion with the rest, at the model's defaults."""
    gr = need_gradio()
    guidance, temperature, top_k, top_p, more_smooth, num_tokens = setting_updates(pipeline)
    controls = [
        gr.Slider(1, step=0.1, label="Guidance", info="1 is off; higher follows the class more closely", **guidance)
    ]
    with gr.Accordion("Sampling", open=False):
        controls += [
            gr.Slider(0.1, step=0.05, label="Temperature", info="Below 1 safer, above 1 more varied", **temperature),
            gr.Slider(0, step=1, label="Top-k", info="Choose among the k likeliest codes; 0 is off", **top_k),
            gr.Slider(0.05, 1, step=0.01, label="Top-p", info="Choose among this share of likely codes", **top_p),
            gr.Checkbox(label="Smoother pictures", info="Blends codes: nicer to look at, less exact", **more_smooth),
        ]
    controls.append(gr.Slider(1, step=1, label="Tokens", info="Stop after so many: fewer are rougher", **num_tokens))
    return controls


def prompt_box(name: str, **options: Any) -> Any:
    """Where a text is written, in any script.   name: of the element."""
    return need_gradio().Textbox(
        label="Prompt",
        placeholder="What is to be drawn",
        lines=2,
        max_lines=6,
        max_length=MAX_PROMPT,
        elem_id=name,
        elem_classes="prompt",
        **options,
    )


def seed_controls() -> Any:
    """A seed box with its button, wired; returns the box."""
    gr = need_gradio()
    with gr.Row(equal_height=True, elem_classes="seed-row"):
        seed = gr.Number(0, label="Seed", precision=0, minimum=0, maximum=MAX_SEED, scale=2, min_width=120)
        button = gr.Button("New seed", scale=1, min_width=90, elem_classes="new-seed")
    button.click(new_seed, outputs=seed, queue=False, **HIDDEN)
    return seed


def buttons(text: str, name: str) -> tuple[Any, Any]:
    """The button that starts, and one that stops."""
    gr = need_gradio()
    with gr.Row(elem_classes="run-row"):
        start = gr.Button(text, variant="primary", size="lg", scale=3, min_width=140, elem_id=f"{name}-button")
        stop = gr.Button("Stop", size="lg", scale=1, min_width=80, elem_id=f"{name}-stop")
    return start, stop


def wire(
    start_stop: tuple[Any, Any],
    handler: Callable[..., Any],
    inputs: Sequence[Any],
    outputs: Sequence[Any],
    *,
    name: str,
    status: Any,
    lane: dict[str, Any] = NETWORK,
    **more: Any,
) -> None:
    """Let the two buttons start and stop `handler`.

    Args: name: of the call for programs.   status: the note, one of the outputs.   lane: NETWORK or LONG.
    """
    start, stop = start_stop
    event = start.click(
        keeping(handler, status.GRADIO_CACHE),
        list(inputs),
        list(outputs),
        api_name=name,
        show_progress="minimal",
        show_progress_on=status,
        trigger_mode="multiple",  # a click while a stopped run is still ending counts: "once" would lose it
        **lane,
        **more,
    )
    stopped = stop.click(lambda: "Stopped.", outputs=status, cancels=[event], queue=False, **HIDDEN)
    stopped.then(settled, outputs=status, queue=False, **HIDDEN)


def settled() -> str:
    """The same word again: a step that was already on its way to the browser may have come after the first."""
    time.sleep(0.25)
    return "Stopped."


def wire_model(
    model: Any, handler: Callable[..., Any], outputs: Sequence[Any], inputs: Sequence[Any] = (), **more: Any
) -> None:
    """Call `handler(name)` when another model is chosen.   inputs: others than the model's name."""
    model.change(handler, list(inputs) or model, list(outputs), **NETWORK, **HIDDEN, **more)
