"""A finished run as a model people can use: the pipeline's folder with a card, pictures and curves beside it.

Everything on the card is read from files: the recipes and metrics that the runs wrote, the reports of `varkit eval`,
and a YAML file of what only people know (`CardText`).
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import field
from operator import attrgetter
from pathlib import Path
from typing import Any, Literal

import torch

from varkit.config import build, config, load_yaml
from varkit.data.images import open_images
from varkit.data.transforms import ImageTransform
from varkit.eight_bit import pack_tensors, write_packed
from varkit.hub import HubMixin
from varkit.metrics.report import Report
from varkit.model_card import markdown_table, plain_table, read_metrics, run_facts, score_table
from varkit.pictures import grid, save_png, to_pil
from varkit.pipelines.auto import AutoPipeline
from varkit.pipelines.base import generate

CHARTS = {"frechet": "lower is better", "accuracy": "higher is better", "psnr": "dB, higher is better"}
"""Scores that are drawn over the number of tokens."""


@config
class CardRun:
    """A run behind the model. folder: it.   part: what it trained, as an attribute of the pipeline, or `classifier`."""

    folder: str = ""
    part: str = "transformer"


@config
class CardText:
    """What a card says that no file of a run knows. Texts are Markdown.

    name: of the model.   runs: title -> run, in the order in which they were trained.   classifier: folder of the judge
    to copy beside the model; None where the model has no judge of its own.   dtype: that weights are stored in.
    curves: pairs of a title of `runs` and a metric.   commands: those that gave the scores of generations and of
    reconstructions.   data, split, mode: of the held-out images that are shown.
    """

    name: str = ""
    introduction: str = ""
    limits: str = ""
    training: str = ""  # further remarks on how it was trained
    commands: tuple[str, ...] = ()
    runs: dict[str, Any] = field(default_factory=dict)
    classifier: str | None = None
    dtype: Literal["float32", "float16", "int8"] = "float32"  # int8: `varkit.eight_bit`
    curves: tuple[tuple[str, str], ...] = ()
    data: str = "fashion-mnist"
    split: str = "test"
    mode: Literal["crop", "center", "pad", "squash"] = "pad"
    licence: str = "apache-2.0"


def load_text(path: Path) -> CardText:
    """A card's YAML file. Raises ConfigError."""
    return build(CardText, load_yaml(path), source=str(path))


def pack_model(text: CardText, folder: Path) -> None:
    """Copy the pipeline that the last run exported to `folder`, and its judge if it has one.

    Weights are rounded to `text.dtype`, and opened as float32 all the same.
    Raises: ValueError when the run exported no pipeline.
    """
    runs = [build(CardRun, value) for value in text.runs.values()]
    last = next(run for run in reversed(runs) if run.part == "transformer")
    pipeline = AutoPipeline.from_pretrained(Path(last.folder) / "model")
    models = {
        name: part
        for name, part in pipeline.components.items()
        if isinstance(part, HubMixin) and isinstance(part, torch.nn.Module)
    }
    packed = {name: pack_tensors(part.state_dict()) for name, part in models.items() if text.dtype == "int8"}
    pipeline.to(torch.float32 if text.dtype == "float32" else torch.float16).save_pretrained(folder)
    for name, tensors in packed.items():
        write_packed(tensors, folder / name)
    if text.classifier is not None:
        shutil.copytree(text.classifier, folder / "classifier", dirs_exist_ok=True)


def draw_curves(runs: dict[str, Path], keys: Sequence[tuple[str, str]], path: Path) -> None:
    """One panel for each (run, metric) pair, drawn over steps.

    Raises: ImportError without matplotlib (the extra `plots`).
    """
    pyplot = _pyplot()
    figure, panels = pyplot.subplots(1, len(keys), figsize=(3.6 * len(keys), 2.7), squeeze=False)
    for panel, (run, key) in zip(panels[0], keys, strict=True):
        rows = read_metrics(runs[run])
        for name in (key, f"validation/{key}"):
            points = [(row["step"], row[name]) for row in rows if name in row]
            if points:
                panel.plot(*zip(*points, strict=True), label="held out" if "/" in name else "training", linewidth=1.2)
        panel.set_title(f"{run}: {key}", fontsize=9)
        panel.set_xlabel("step", fontsize=8)
        panel.legend(fontsize=7)
    _save(pyplot, figure, panels[0], path)


def draw_token_curves(reports: Sequence[Report], path: Path) -> bool:
    """One panel for each score of `CHARTS`, over the number of tokens; False, and no file, where nothing varies in it.

    Raises: ImportError without matplotlib.
    """
    lines: dict[str, dict[str, list[tuple[int, float]]]] = {}
    for report in reports:
        for result in report.results:
            count = result.settings.get("num_tokens", result.settings.get("length"))
            guidance = result.settings.get("guidance_scale")
            name = "reconstructions" if guidance is None else f"generations, guidance {guidance:g}"
            for score in result.scores:
                if count is not None and score.name in CHARTS:
                    lines.setdefault(f"{score.title} ({CHARTS[score.name]})", {}).setdefault(name, []).append(
                        (int(count), score.value)
                    )
    lines = {title: {n: p for n, p in each.items() if len(p) > 1} for title, each in lines.items()}
    lines = {title: each for title, each in lines.items() if each}
    if not lines:
        return False
    pyplot = _pyplot()
    figure, panels = pyplot.subplots(1, len(lines), figsize=(3.6 * len(lines), 2.7), squeeze=False)
    for panel, (title, each) in zip(panels[0], lines.items(), strict=True):
        for name, points in each.items():
            panel.plot(*zip(*sorted(points), strict=True), "o-", label=name, linewidth=1.2, markersize=3)
        panel.set_xscale("log", base=2)
        panel.set_title(title, fontsize=9)
        panel.set_xlabel("tokens", fontsize=8)
        panel.legend(fontsize=7)
    _save(pyplot, figure, panels[0], path)
    return True


def _pyplot() -> Any:
    try:
        import matplotlib
    except ImportError as error:
        raise ImportError(f'curves need matplotlib: pip install "varkit[plots]" ({error})') from None
    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot


def _save(pyplot: Any, figure: Any, panels: Any, path: Path) -> None:
    for panel in panels:
        panel.tick_params(labelsize=7)
        panel.grid(alpha=0.3)
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110, metadata={"Software": None})
    pyplot.close(figure)


def one_of_each_class(text: CardText, image_size: Any, root: str | None) -> torch.Tensor:
    """(n, 3, H, W) in [-1, 1]: the first held-out image of each of at most ten classes."""
    dataset = open_images(text.data, split=text.split, root=root)
    dataset.transform = ImageTransform(image_size, mode=text.mode)
    batch = dataset.__getitems__(list(range(min(300, len(dataset)))))
    labels = batch["labels"].tolist()
    return batch["images"][[labels.index(c) for c in sorted(set(labels))[:10]]]


def draw_pictures(pipeline: Any, text: CardText, root: str | None, seed: int, out: Path) -> list[int]:
    """samples.png and reconstructions.png; of a model that may stop early also tokens-samples.png, and both of the
    latter have a row a number of tokens. Returns these numbers, from 1 up, or nothing."""
    tokenizer, classes = pipeline.image_tokenizer, pipeline.transformer.num_classes
    made = [image for _, _, image in generate(pipeline, list(range(classes)), 5 * classes, seed, 5 * classes)]
    settings = {"seed": seed, **pipeline.sampler.settings()}
    save_png(grid(made, classes, 2), out / "samples.png", settings)
    images = one_of_each_class(text, tokenizer.image_size, root)
    counts = tokenizer.powers_of_two() if hasattr(tokenizer, "powers_of_two") else []
    with torch.no_grad():
        tokens = tokenizer.encode(images)
        back = [tokenizer.decode(tokens, lengths=n) for n in counts] or [tokenizer.decode(tokens)]
    shown = [image for row in (images, *back) for image in to_pil(row.float())]
    save_png(grid(shown, len(images), 2), out / "reconstructions.png", {"rows": ["held-out", *map(str, counts)]})
    if counts:
        drawn = [
            image
            for n in counts
            for _, _, image in generate(pipeline, list(range(classes)), classes, seed, classes, num_tokens=n)
        ]
        save_png(grid(drawn, classes, 2), out / "tokens-samples.png", {**settings, "num_tokens": counts})
    return counts


def write_card(
    text: CardText,
    folder: Path,
    generation: Path,
    reconstruction: Path,
    *,
    machine: str,
    page: Path | None = None,
    root: str | None = None,
    seed: int = 0,
) -> None:
    """Write README.md of the packed model in `folder`, with pictures, curves and reports in card/.

    Args:
        generation, reconstruction: reports that `varkit eval --out` wrote, of the model and of its tokenizer.
        machine: what the runs were made on, for the reader.
        page: the HTML report, copied beside the card.   root: of the held-out images.
    Raises: FileNotFoundError when a run or a report is not there.
    """
    scores, back = Report.read(generation), Report.read(reconstruction)
    card = folder / "card"
    pipeline = AutoPipeline.from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    runs = {title: build(CardRun, value, prefix=f"runs.{title}.") for title, value in text.runs.items()}
    counts = draw_pictures(pipeline, text, root, seed, card)
    draw_curves({title: Path(run.folder) for title, run in runs.items()}, text.curves, card / "curves.png")
    over_tokens = draw_token_curves([scores, back], card / "tokens.png")
    for report, name in ((scores, "generation"), (back, "reconstruction")):
        report.write(card / f"{name}.json")
    if page is not None:
        shutil.copyfile(page, card / "report.html")
    facts = {}
    for title, run in runs.items():
        part = _judge(folder) if run.part == "classifier" else attrgetter(run.part)(pipeline)
        facts[title] = run_facts(Path(run.folder), sum(p.numel() for p in part.parameters()))
    sections = [
        _head(text),
        f"# {text.name}",
        text.introduction.strip(),
        "![samples, one column a class](card/samples.png)",
        _usage(text.name, pipeline, counts),
        _results(scores, back, text, page is not None),
        _tokens(counts, over_tokens),
        "## Training",
        markdown_table(facts),
        f"Machine: {machine}. {text.training.strip()} Curves:".replace("  ", " "),
        "![curves](card/curves.png)",
        "To train it again: the commands of the table, in that order (the recipes hold every setting), then\n"
        "`python eval/write_card.py pack`, `varkit eval` as above, and `python eval/write_card.py card`.",
        "## Limits",
        text.limits.strip(),
    ]
    (folder / "README.md").write_text("\n\n".join(s for s in sections if s) + "\n")


def _judge(folder: Path) -> Any:
    from varkit.metrics.classifier import ImageClassifier

    return ImageClassifier.from_pretrained(folder / "classifier")


def _head(text: CardText) -> str:
    lines = ("library_name: varkit", f"license: {text.licence}", "pipeline_tag: unconditional-image-generation")
    return "\n".join(["---", *lines, "datasets:", f"- {text.data}", "---"])


def _usage(name: str, pipeline: Any, counts: list[int]) -> str:
    layout = pipeline.transformer.layout
    some = f"\n    varkit sample {name} --tokens {counts[len(counts) // 2]} --out few.png" if counts else ""
    classes = ", ".join(f"{k} {v}" for k, v in pipeline.labels.items())
    return (
        f"    varkit sample {name} --class 0,9 --num 8 --out grid.png{some}\n\n"
        f"    from varkit import AutoPipeline\n"
        f'    images = AutoPipeline.from_pretrained("{name}")(class_labels=["Bag", "Sneaker"], seed=0).images\n\n'
        f"Classes: {classes}.\n{layout.length} tokens an image: {layout.describe()}."
    )


def _results(scores: Report, back: Report, text: CardText, page: bool) -> str:
    opens = " [report.html](card/report.html) shows it with curves and pictures." if page else ""
    commands = "\n".join(f"    {command}" for command in text.commands)
    by_scale = back.results[0].tables.get("codebook by scale")
    return "\n\n".join(
        part
        for part in (
            "## Results",
            f"By `varkit eval`, protocol {scores.protocol['name']} (fingerprint {scores.fingerprint}): "
            f"{scores.protocol['summary']}.\nIn brackets: {scores.protocol['interval']['level']:.0%} intervals. "
            f"[generation.json](card/generation.json) holds\neverything; `varkit compare` puts other reports of this "
            f"protocol beside it.{opens}",
            score_table(scores),
            f"Its tokenizer, protocol {back.protocol['name']} (fingerprint {back.fingerprint}): "
            f"{back.protocol['summary']}.",
            score_table(back),
            plain_table(by_scale) if by_scale and len(by_scale) > 1 else "",
            f"The commands:\n\n{commands}",
        )
        if part
    )


def _tokens(counts: list[int], over_tokens: bool) -> str:
    if not counts:
        return "Held-out images above their reconstructions:\n\n![reconstructions](card/reconstructions.png)"
    named = ", ".join(map(str, counts[:-1])) + f" and {counts[-1]}"
    parts = [
        "## Any number of tokens",
        f"Held-out images, and below them their reconstructions from the first {named} tokens:",
        "![reconstructions](card/reconstructions.png)",
        f"Generations that stop after {named} tokens, of one seed (an image's tokens do not change, there are more):",
        "![generations](card/tokens-samples.png)",
    ]
    curves = ["Quality over tokens:", "![quality over tokens](card/tokens.png)"] if over_tokens else []
    return "\n\n".join([*parts, *curves])
