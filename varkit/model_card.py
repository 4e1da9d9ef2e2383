"""The text of a model's card: front matter that the hub reads, tables of scores and of training facts.

Everything on a card is read from files: the model's configuration and weights, the recipe and metrics of its run, and
the report of `varkit eval`.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from varkit.metrics.report import Report

PICTURES = "unconditional-image-generation"
TASKS = {"TextToImagePipeline": "text-to-image", "ClassToVideoPipeline": "text-to-video"}
"""Pipelines whose task, as the hub names it, is not `PICTURES`."""
"""The hub's word for what a class-to-image model does."""

Row = dict[str, float]


def read_metrics(run: Path) -> list[Row]:
    """The lines of a run's metrics.jsonl. Raises FileNotFoundError."""
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def run_facts(run: Path, parameters: int) -> dict[str, str]:
    """What a run was: a row of the card's table."""
    recipe, rows = yaml.safe_load((run / "recipe.yaml").read_text()), read_metrics(run)
    minutes = max(row.get("seconds", 0.0) for row in rows) / 60
    last: Row = {}
    for row in rows:
        last |= {k.removeprefix("validation/"): v for k, v in row.items() if k.startswith("validation/")}
    return {
        "recipe": f"`varkit train {recipe['name']}`",
        "parameters": f"{parameters:,}",
        "steps": f"{recipe['loop']['steps']:,} of {recipe['loop']['batch_size']}",
        "wall time": f"{minutes:.0f} min",
        "held-out, at the end": ", ".join(f"{k} {v:.4g}" for k, v in last.items()) or "not measured",
    }


def markdown_table(columns: dict[str, dict[str, str]]) -> str:
    """Column name -> row name -> text."""
    names = list(next(iter(columns.values())))
    lines = [f"| | {' | '.join(columns)} |", "|---" * (len(columns) + 1) + "|"]
    lines += [f"| {name} | {' | '.join(column[name] for column in columns.values())} |" for name in names]
    return "\n".join(lines)


def score_table(report: Report) -> str:
    """The scores of all results, one a row, with their intervals beneath; and how each was obtained."""
    titles = list(dict.fromkeys(s.title for r in report.results for s in r.scores))
    what = "clips" if str(report.protocol.get("kind", "")).startswith("video") else "images"
    lines = [f"| {what} | {' | '.join(titles)} |", "|---" * (len(titles) + 1) + "|"]
    for result in report.results:
        found = {s.title: s.text().replace(" [", "<br>[") for s in result.scores}
        lines.append(f"| {result.name} | {' | '.join(found.get(t, '-') for t in titles)} |")
    how = dict.fromkeys(f"- {s.title}: {s.how}" for s in report.results[-1].scores if s.how)
    return "\n".join([*lines, "", *how])


def plain_table(rows: Sequence[dict[str, Any]]) -> str:
    """Rows of equal keys as Markdown."""
    lines = [f"| {' | '.join(rows[0])} |", "|---" * len(rows[0]) + "|"]
    for row in rows:
        cells = [f"{v:.4g}" if isinstance(v, float) else str(v) for v in row.values()]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def folder_parts(folder: Path) -> dict[str, dict[str, Any]]:
    """What a saved pipeline or model consists of: part -> class and count of stored numbers.

    Raises: ValueError when the folder is neither.
    """
    index = folder / "model_index.json"
    if index.is_file():
        entries = json.loads(index.read_text(encoding="utf-8"))
        parts = {k: folder / k for k, v in entries.items() if isinstance(v, list) and len(v) == 2 and v[1]}
    elif (folder / "config.json").is_file():
        parts = {"model": folder}
    else:
        inside = folder / "model"
        hint = f"; did you mean {inside}?" if inside.is_dir() else ""
        raise ValueError(
            f"{folder} is no saved model: it has neither model_index.json nor config.json{hint or '.'} A run exports "
            f"one as its folder model/, save_pretrained writes one"
        )
    found: dict[str, dict[str, Any]] = {}
    for name, path in parts.items():
        if (path / "config.json").is_file():
            config = json.loads((path / "config.json").read_text(encoding="utf-8"))
            found[name] = {"class": config.get("_class_name", "?"), "numbers": stored_numbers(path)}
    return found


def stored_numbers(folder: Path) -> int:
    """How many numbers the safetensors files of a folder hold, from their headers."""
    from safetensors import safe_open

    total = 0
    for file in folder.glob("*.safetensors"):
        with safe_open(file, "pt") as tensors:
            total += sum(math.prod(tensors.get_slice(key).get_shape()) for key in tensors.keys())  # noqa: SIM118
    return total


def eval_results(report: Report, task: str) -> list[Any]:
    """The scores of a report as the hub's `EvalResult`s, each with its protocol and the command that gave it.

    Real images and reconstructions that a report holds as bounds are no results of the model and are left out.
    """
    from huggingface_hub import EvalResult

    source = str(report.reference.get("source", "unknown"))
    data = Path(source).stem if "/" in source else source
    how = {"protocol": report.protocol.get("name", "?"), "fingerprint": report.fingerprint}
    if command := report.environment.get("command"):
        how["command"] = command
    found = []
    for result in (r for r in report.results if not r.bound):
        for score in (s for s in result.scores if math.isfinite(s.value)):
            more: dict[str, Any] = {"images": result.num}
            if score.low is not None and score.high is not None:
                more["interval"] = [score.low, score.high]
            if score.how:
                more["how"] = score.how
            found.append(
                EvalResult(
                    task_type=task,
                    dataset_type=data,
                    dataset_name=data,
                    metric_type=score.name,
                    metric_name=f"{score.title}, {result.name}",
                    metric_value=score.value,
                    metric_args={**how, **more},
                )
            )
    return found


def model_card(
    folder: Path,
    name: str,
    *,
    report: Report | None = None,
    run: Path | None = None,
    licence: str | None = None,
    datasets: Sequence[str] = (),
) -> str:
    """The README.md of a saved model, for a repository called `name` (`user/name`).

    A README.md in the folder is kept as it is; only the facts given here go into its front matter.

    Args:
        report: of `varkit eval`, of this model; becomes the hub's `model-index` and a table.
        run: folder of the run that trained it: recipe.yaml and metrics.jsonl.
        licence: as the hub spells it, such as apache-2.0.   datasets: names on the hub.
    Raises: ValueError when the folder holds no model, or its README.md a front matter that cannot be read;
        FileNotFoundError when the run is not whole.
    """
    from huggingface_hub import ModelCard, ModelCardData

    parts = folder_parts(folder)
    index, task = folder / "model_index.json", "image-to-image"
    if index.is_file():
        task = TASKS.get(json.loads(index.read_text(encoding="utf-8")).get("_class_name"), PICTURES)
    written = folder / "README.md"
    data, kept = {}, ""
    if written.is_file():
        try:
            card = ModelCard(written.read_text(encoding="utf-8"))
        except (ValueError, TypeError, yaml.YAMLError) as error:
            raise ValueError(f"the front matter of {written} cannot be read: {str(error).splitlines()[0]}") from None
        data, kept = card.data.to_dict(), card.text.strip()
    data.setdefault("library_name", "varkit")
    if index.is_file():
        data.setdefault("pipeline_tag", task)
    data["tags"] = list(
        dict.fromkeys([*(data.get("tags") or []), "varkit", *(p["class"].lower() for p in parts.values())])
    )
    if licence:
        data["license"] = licence
    if datasets:
        data["datasets"] = list(datasets)
    if report is not None:
        results = eval_results(report, task)
        data.pop("model-index", None)
        data = (
            ModelCardData(model_name=name.split("/")[-1], eval_results=results, **data).to_dict() if results else data
        )
    text = kept if written.is_file() else _body(folder, name, parts, report, run)
    return f"---\n{yaml.safe_dump(data, sort_keys=False, allow_unicode=True)}---\n\n{text}\n"


def _body(folder: Path, name: str, parts: dict[str, dict[str, Any]], report: Report | None, run: Path | None) -> str:
    sections = [f"# {name.split('/')[-1]}"]
    table = [{"part": k, "class": v["class"], "numbers stored": f"{v['numbers']:,}"} for k, v in parts.items()]
    if (folder / "model_index.json").is_file():
        index = json.loads((folder / "model_index.json").read_text(encoding="utf-8"))
        clips = index.get("_class_name") == "ClassToVideoPipeline"
        made, out = ("videos", "clips.gif") if clips else ("images", "grid.png")
        use = f'from varkit import AutoPipeline\n    {made} = AutoPipeline.from_pretrained("{name}")(seed=0).{made}'
        sections.append(f"    varkit sample {name} --num 8 --out {out}\n\n    {use}")
        labels = index.get("id2label")
        if isinstance(labels, dict) and len(labels) <= 20:
            sections.append("Classes: " + ", ".join(f"{k} {labels[k]}" for k in sorted(labels, key=int)) + ".")
    else:
        kind = next(iter(parts.values()), {"class": "?"})["class"]
        sections.append(f'    model = {kind}.from_pretrained("{name}")')
    if table:
        sections.append(plain_table(table))
    if report is not None:
        sections.append(score_section(report))
    if run is not None:
        trained = parts.get("transformer") or next(iter(parts.values()), {"numbers": 0})
        facts = run_facts(run, trained["numbers"])
        sections.append("## Training\n\n" + markdown_table({"this run": facts}))
        if (run / "recipe.yaml").is_file():
            recipe = (run / "recipe.yaml").read_text(encoding="utf-8").rstrip()
            sections.append(f"The whole recipe:\n\n```yaml\n{recipe}\n```")
    return "\n\n".join(sections)


def score_section(report: Report) -> str:
    """Results, the protocol that they were obtained under, and the command."""
    text = (
        f"## Results\n\nBy `varkit eval`, protocol {report.protocol.get('name', '?')} (fingerprint "
        f"{report.fingerprint}): {report.protocol.get('summary', '')}\n\n{score_table(report)}"
    )
    interval = report.protocol.get("interval")
    if interval:
        text += f"\n\nIn brackets: {interval['level']:.0%} intervals."
    if command := report.environment.get("command"):
        text += f"\n\nThe command:\n\n    {command}"
    return text
