"""A finished run as a model people can use: the pipeline's folder with a card, pictures and curves beside it.

Everything on the card is read from files: the recipes and metrics that the runs wrote, the reports of `varkit eval`,
and a YAML file of what only people know (`CardText`).
"""

from __future__ import annotations

import json
import shutil
from dataclasses import field
from operator import attrgetter
from pathlib import Path
from typing import Any, Literal

import torch

from varkit.config import build, config, load_yaml
from varkit.eight_bit import pack_tensors, write_packed
from varkit.hub import HubMixin
from varkit.metrics.matcher import open_matcher
from varkit.metrics.report import Report
from varkit.model_card import PICTURES, TASKS, markdown_table, plain_table, run_facts, score_table
from varkit.pipelines.auto import AutoPipeline
from varkit.training.card_pictures import draw_curves, draw_pictures, draw_token_curves


@config
class CardRun:
    """A run behind the model. folder: it.   part: what it trained, as an attribute of the pipeline, or `classifier`."""

    folder: str = ""
    part: str = "transformer"


@config
class CardText:
    """What a card says that no file of a run knows. Texts are Markdown.

    name: of the model.   runs: title -> run, in the order in which they were trained.   classifier, matcher: folders of
    judges, of classes and of captions, to copy beside the model; None where it has none of its own.   prompts: of a
    model of texts, those that are shown.   dtype: that weights are stored in.
    curves: pairs of a title of `runs` and a metric.   commands: those that gave the scores of generations and of
    reconstructions.   data, split, mode: of the held-out images that are shown.
    """

    name: str = ""
    introduction: str = ""
    limits: str = ""
    training: str = ""  # further remarks on how it was trained
    findings: str = ""  # what else was measured, and how, with its own headings
    commands: tuple[str, ...] = ()
    runs: dict[str, Any] = field(default_factory=dict)
    classifier: str | None = None
    matcher: str | None = None
    prompts: tuple[str, ...] = ()
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
    if (folder / "text_encoder" / "config.json").is_file():
        _opened_as_float32(folder / "text_encoder" / "config.json")
    if text.matcher is not None:
        judge = open_matcher(text.matcher)
        judge.save_pretrained(folder / "matcher")
        if text.dtype == "int8":
            packed["matcher"] = pack_tensors(judge.state_dict())
    for name, tensors in packed.items():
        write_packed(tensors, folder / name)
    if text.classifier is not None:
        shutil.copytree(text.classifier, folder / "classifier", dirs_exist_ok=True)


def _opened_as_float32(config: Path) -> None:
    """transformers opens a network in the type that its file says it was stored in."""
    written = json.loads(config.read_text(encoding="utf-8"))
    config.write_text(json.dumps({**written, "dtype": "float32"}, indent=2) + "\n", encoding="utf-8")


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
        generation, reconstruction: reports that `varkit eval --out` wrote, of the model and of its tokenizer; of a
            model of texts the former is what `varkit retrieval --json` printed.
        machine: what the runs were made on, for the reader.
        page: the HTML report, copied beside the card.   root: of the held-out images.
    Raises: FileNotFoundError when a run or a report is not there.
    """
    scores, back = read_scores(generation), Report.read(reconstruction)
    card = folder / "card"
    pipeline = AutoPipeline.from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    runs = {title: build(CardRun, value, prefix=f"runs.{title}.") for title, value in text.runs.items()}
    counts = draw_pictures(pipeline, text, root, seed, card)
    draw_curves({title: Path(run.folder) for title, run in runs.items()}, text.curves, card / "curves.png")
    over_tokens = draw_token_curves([r for r in (scores, back) if isinstance(r, Report)], card / "tokens.png")
    for path, name in ((generation, "generation"), (reconstruction, "reconstruction")):
        shutil.copyfile(path, card / f"{name}.json")
    if page is not None:
        shutil.copyfile(page, card / "report.html")
    facts = {}
    for title, run in runs.items():
        part = _judge(folder) if run.part == "classifier" else attrgetter(run.part)(pipeline)
        facts[title] = run_facts(Path(run.folder), sum(p.numel() for p in part.parameters()))
    sections = [
        _head(text, pipeline),
        f"# {text.name}",
        text.introduction.strip(),
        _samples(text, pipeline),
        _usage_of_texts(text, pipeline) if text.prompts else _usage(text.name, pipeline, counts),
        _results(scores, back, text, page is not None),
        _tokens(counts, over_tokens),
        text.findings.strip(),
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


def _head(text: CardText, pipeline: Any) -> str:
    task = TASKS.get(type(pipeline).__name__, PICTURES)
    lines = ("library_name: varkit", f"license: {text.licence}", f"pipeline_tag: {task}")
    return "\n".join(["---", *lines, "datasets:", f"- {text.data}", "---"])


def _samples(text: CardText, pipeline: Any) -> str:
    if pipeline.image_tokenizer.num_frames is None:
        return f"![samples, one column a {'prompt' if text.prompts else 'class'}](card/samples.png)"
    return "![a clip of each class, playing](card/samples.webp)\n\n![film strips](card/samples.png)"


def _usage(name: str, pipeline: Any, counts: list[int]) -> str:
    layout = pipeline.transformer.layout
    if pipeline.image_tokenizer.num_frames is not None:
        first = next(iter(pipeline.labels.values()), "0")
        return (
            f'    varkit sample {name} --class "{first}" --zoom 4 --out clip.gif\n'
            f"    varkit sample {name} --continue clip.gif --frames 40 --out on.mp4\n\n"
            f"    from varkit import AutoPipeline\n"
            f'    clips = AutoPipeline.from_pretrained("{name}")(class_labels=["{first}"], seed=0).videos\n\n'
            f"Classes: {', '.join(f'{k} {v}' for k, v in pipeline.labels.items())}.\n{layout.length} tokens a clip of "
            f"{pipeline.image_tokenizer.num_frames} frames: {layout.describe()}."
        )
    some = f"\n    varkit sample {name} --tokens {counts[len(counts) // 2]} --out few.png" if counts else ""
    classes = ", ".join(f"{k} {v}" for k, v in pipeline.labels.items())
    return (
        f"    varkit sample {name} --class 0,9 --num 8 --out grid.png{some}\n\n"
        f"    from varkit import AutoPipeline\n"
        f'    images = AutoPipeline.from_pretrained("{name}")(class_labels=["Bag", "Sneaker"], seed=0).images\n\n'
        f"Classes: {classes}.\n{layout.length} tokens an image: {layout.describe()}."
    )


def _usage_of_texts(text: CardText, pipeline: Any) -> str:
    prompt, layout = text.prompts[0], pipeline.transformer.layout
    listed = "\n".join(f"{i}. {one}" for i, one in enumerate(text.prompts, 1))
    return (
        f'    varkit sample {text.name} --prompt "{prompt}" --num 4 --out grid.png\n\n'
        f"    from varkit import AutoPipeline\n"
        f'    images = AutoPipeline.from_pretrained("{text.name}")(["{prompt}"], seed=0).images\n\n'
        f"The prompts of the picture, from the left:\n\n{listed}\n\n"
        f"{layout.length} tokens an image: {layout.describe()}."
    )


def read_scores(path: Path) -> Report | dict[str, Any]:
    """A report of `varkit eval`, or what `varkit retrieval --json` printed. Raises ValueError for anything else."""
    found = json.loads(path.read_text(encoding="utf-8"))
    return found if isinstance(found, dict) and {"rows", "matcher", "settings"} <= found.keys() else Report.read(path)


def _retrieval(found: dict[str, Any]) -> str:
    """The table of a model of texts."""
    rows = []
    for row in found["rows"]:
        line = {"split": row["split"], "images": row["images"], "captions": str(row["captions"])}
        for key in ("top1", "top5"):
            ends = row[f"{key}_interval"]
            line[key.replace("p", "p-")] = f"{row[key]:.1%}" + (f" ({ends[0]:.1%} to {ends[1]:.1%})" if ends else "")
        rows.append(line)
    settings = ", ".join(f"{k} {v}" for k, v in found["settings"].items() if v)
    return (
        f"By `varkit retrieval`: how often a matcher, trained on the training split by itself, finds the caption of an "
        f"image among all\nof the split. In brackets: 95% intervals. *real* is what the matcher can do, "
        f"*reconstructed* the same through the\ntokenizer. [generation.json](card/generation.json) holds everything. "
        f"Settings: seed {found['seed']}, {settings}.\n\n{plain_table(rows)}"
    )


def _generation(scores: Report) -> str:
    rule = scores.protocol
    return (
        f"By `varkit eval`, protocol {rule['name']} (fingerprint {scores.fingerprint}): {rule['summary']}.\n"
        f"In brackets: {rule['interval']['level']:.0%} intervals. [generation.json](card/generation.json) holds\n"
        f"everything; `varkit compare` puts other reports of this protocol beside it."
    )


def _results(scores: Report | dict[str, Any], back: Report, text: CardText, page: bool) -> str:
    opens = " [report.html](card/report.html) shows it with curves and pictures." if page else ""
    commands = "\n".join(f"    {command}" for command in text.commands)
    by_scale = back.results[0].tables.get("codebook by scale")
    return "\n\n".join(
        part
        for part in (
            "## Results",
            _generation(scores) + opens if isinstance(scores, Report) else _retrieval(scores),
            score_table(scores) if isinstance(scores, Report) else "",
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
        return "Held out, above their reconstructions:\n\n![reconstructions](card/reconstructions.png)"
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
