"""The tab "Evaluate": a few images of the chosen model, scored by `varkit.metrics` under the protocol `fashion`."""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor

from varkit.demo.common import Models, check_seed, enlarge, need_gradio, number, readable_errors, setting_updates, whole
from varkit.demo.controls import LONG, buttons, code, gallery, heading, note, seed_controls, wire, wire_model
from varkit.demo.files import keep
from varkit.demo.running import Step, Teller, stream
from varkit.metrics.evaluate import evaluate as score
from varkit.metrics.protocol import Protocol, load_protocol
from varkit.metrics.report import Report
from varkit.metrics.report import number as digits
from varkit.metrics.sources import model_set, open_set

PROTOCOL = "fashion"
METRICS = ("frechet", "accuracy", "precision", "neighbours")
"""Those of the protocol that say something about few images."""
FEWEST, AT_ONCE = 16, 16
TITLE = "A quick look, not a published number: see the counts and the intervals."


def evaluate(
    models: Models, reference: str, folder: str, name: str, num: Any, guidance: Any, seed: Any
) -> Iterator[tuple[Any, ...]]:
    """Yields (status, pictures, table, the report's file, command) as the evaluation proceeds.

    Args: reference: real images, as `varkit eval` takes them.   folder: where gradio keeps files.
    """
    with readable_errors():
        gr = need_gradio()
        pipeline = models.open(name)
        num = whole("Number of images", num, FEWEST, models.limits.evaluated)
        guidance, seed = number("Guidance", guidance, 0.1, 100), check_seed(seed)
        rules = load_protocol(PROTOCOL, [f"sampling.seed={seed}"], metrics=METRICS, num=num)
        check_model(pipeline, rules)
        line = command(models.source(name), reference, num, guidance, seed)
        yield "Waiting for a turn ...", [], "", gr.update(interactive=False), line
        work = partial(measure, models, pipeline, name, reference, rules, guidance)
        for event in stream(work):
            if isinstance(event, Step):
                done = f"{event.number} of {event.total} images drawn ..."
                yield done if event.number < event.total else "Scoring ...", gr.skip(), gr.skip(), gr.skip(), line
                continue
            found: Report = event.result
            pictures = [(enlarge(image), title) for title, image in found.results[0].pictures.items()]
            file, why = save(found, folder)
            status = f"**{num} images** drawn and scored in **{event.seconds:.1f} s**, waiting included. {TITLE}{why}"
            yield status, pictures, table(found), gr.update(value=file, interactive=file is not None), line


def check_model(pipeline: Any, rules: Protocol) -> None:
    """Raises ValueError for a model whose images or classes the protocol does not score."""
    size, classes = tuple(pipeline.image_tokenizer.image_size), pipeline.transformer.num_classes
    if size not in rules.images.sizes or classes > 10:
        raise ValueError(
            f"the quick evaluation is for models of the ten classes of Fashion-MNIST at 32 x 32; this one draws "
            f"{classes} classes at {size[1]} x {size[0]}. `varkit eval` scores it under another protocol"
        )


def measure(
    models: Models, pipeline: Any, name: str, reference: str, rules: Protocol, guidance: float, tell: Teller
) -> Report:
    """The report. Each batch is drawn in a turn of its own, so that other visitors come in between."""
    made = model_set(pipeline, name, rules, pipeline.device, guidance_scale=guidance)
    real = open_set(reference, rules, size=made.size, fit=rules.images.fit)
    source = Path(reference).name  # what is printed names no folder of this machine
    real = replace(real, source=source, read=watched(real.read, tell))
    drawn = 0

    def draw(indices: Sequence[int]) -> Tensor:
        nonlocal drawn
        with models.turns.take():
            tell.check()
            images = made.read(indices)
        drawn += len(indices)
        tell(Step(drawn, len(made), None))
        return images

    one = replace(made, name=f"{name}, guidance {guidance:g}", read=draw)
    return score([one], real, protocol=rules, device=pipeline.device.type, batch_size=AT_ONCE)


def watched(read: Any, tell: Teller) -> Any:
    """`read` that fails once the visitor is gone."""

    def reading(indices: Sequence[int]) -> Tensor:
        tell.check()
        return read(indices)

    return reading


def table(report: Report) -> str:
    """The scores as Markdown, each with its interval and what it is of."""
    level = (report.protocol.get("interval") or {}).get("level", 0)
    rows = [f"| score | value | {level:.0%} interval | of |", "|:--|--:|:--|:--|"]
    for one in report.results[0].scores:
        ends = f"{digits(one.low)} to {digits(one.high)}" if one.low is not None and one.high is not None else "none"
        better = {"lower": " (lower is better)", "higher": " (higher is better)"}.get(one.better, "")
        rows.append(f"| **{one.title}**{better} | {digits(one.value)} | {ends} | {one.how} |")
    return "\n".join([*rows, "", f"Protocol `{PROTOCOL}`, fingerprint `{report.fingerprint}`. A distance of few images "
                      "is larger than one of many, and no FID."])  # fmt: skip


def save(report: Report, folder: str) -> tuple[str | None, str]:
    """The report's page as a file that gradio may serve; or None, and a sentence that says why."""
    from varkit.metrics.html import html

    try:
        page = html(report)
    except ImportError:
        return None, " The report needs `varkit[eval]` on the server."
    return keep(page.encode(), "varkit-report.html", folder), ""


def command(source: str, reference: str, num: int, guidance: float, seed: int) -> str:
    """The command line that gives the same numbers."""
    words = ["varkit", "eval", source, reference, "--protocol", PROTOCOL, "--metrics", ",".join(METRICS)]
    words += ["--num", str(num), "--set", f"sampling.seed={seed}", "--guidance", f"{guidance:g}"]
    return shlex.join([*words, "--batch-size", str(AT_ONCE), "--html", "report.html"])


def refresh(models: Models, name: str) -> Any:
    """Update of the guidance slider for another model."""
    with readable_errors():
        return need_gradio().update(**setting_updates(models.open(name))[0])


def add_tab(models: Models, model: Any, reference: str) -> None:
    """Build the tab inside the open `gr.Tabs`.

    Args: model: the dropdown that holds the model's name.   reference: real images, named when the server starts.
    """
    gr = need_gradio()
    most = models.limits.evaluated
    guidance_of = setting_updates(models.open(models.names[0]))[0]
    with gr.Tab("Evaluate", id="evaluate"), gr.Row(equal_height=False):
        with gr.Column(scale=2, min_width=300):
            num = gr.Slider(FEWEST, most, min(64, most), step=1, label="Images", elem_id="evaluate-num")
            guidance = gr.Slider(1, step=0.1, label="Guidance", **guidance_of)
            seed = seed_controls()
            start_stop = buttons("Evaluate", "evaluate")
            line = note("Draws a few images and scores them against real ones.", "evaluate-status")
            file = gr.DownloadButton("Report (HTML)", interactive=False, elem_id="evaluate-report")
        with gr.Column(scale=5, min_width=320):
            scores = gr.Markdown("", elem_id="evaluate-scores")
            heading("What was scored")
            pictures = gallery("What was scored", "evaluate-pictures", 2)
            lines = code("The same numbers from the command line", "evaluate-command")
    wire(
        start_stop,
        partial(evaluate, models, reference, file.GRADIO_CACHE),
        [model, num, guidance, seed],
        [line, pictures, scores, file, lines],
        name="evaluate",
        status=line,
        lane=LONG,
    )
    wire_model(model, partial(refresh, models), [guidance])
