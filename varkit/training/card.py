"""A finished run as a model people can use: the pipeline's folder with a card, pictures and curves beside it.

Everything on the card is read from files: the recipes and metrics that the runs wrote, the reports of `varkit eval`.
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from varkit.data.images import open_images
from varkit.data.transforms import ImageTransform
from varkit.metrics.report import Report
from varkit.model_card import markdown_table, plain_table, read_metrics, run_facts, score_table
from varkit.pictures import grid, save_png, to_pil
from varkit.pipelines.auto import AutoPipeline
from varkit.pipelines.base import generate


def draw_curves(runs: dict[str, Path], keys: Sequence[tuple[str, str]], path: Path) -> None:
    """One panel for each (run, metric) pair, drawn over steps.

    Raises: ImportError without matplotlib (the extra `plots`).
    """
    try:
        import matplotlib
    except ImportError as error:
        raise ImportError(f'curves need matplotlib: pip install "varkit[plots]" ({error})') from None
    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, panels = pyplot.subplots(1, len(keys), figsize=(3.6 * len(keys), 2.7), squeeze=False)
    for panel, (run, key) in zip(panels[0], keys, strict=True):
        rows = read_metrics(runs[run])
        for name in (key, f"validation/{key}"):
            points = [(row["step"], row[name]) for row in rows if name in row]
            if points:
                panel.plot(*zip(*points, strict=True), label="held out" if "/" in name else "training", linewidth=1.2)
        panel.set_title(f"{run}: {key}", fontsize=9)
        panel.set_xlabel("step", fontsize=8)
        panel.tick_params(labelsize=7)
        panel.grid(alpha=0.3)
        panel.legend(fontsize=7)
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110, metadata={"Software": None})
    pyplot.close(figure)


def reconstruction_picture(pipeline: Any, data: str, split: str, mode: str, root: str | None, path: Path) -> None:
    """Ten held-out images, one a class, above their reconstructions."""
    tokenizer = pipeline.image_tokenizer
    dataset = open_images(data, split=split, root=root)
    dataset.transform = ImageTransform(tokenizer.image_size, mode=mode)  # type: ignore[arg-type]
    batch = dataset.__getitems__(list(range(min(300, len(dataset)))))
    classes = sorted(set(batch["labels"].tolist()))[:10]
    images = batch["images"][[batch["labels"].tolist().index(c) for c in classes]]
    back = tokenizer.decode(tokenizer.encode(images))
    save_png(grid([*to_pil(images), *to_pil(back)], len(classes), 2), path, {"rows": "held-out, reconstructed"})


def write_card(
    tokenizer_run: Path,
    generator_run: Path,
    classifier_run: Path,
    generation: Path,
    reconstruction: Path,
    out: Path,
    *,
    title: str,
    machine: str,
    introduction: str,
    limits: str,
    command: str,
    page: Path | None = None,
    licence: str = "apache-2.0",
    data: str = "fashion-mnist",
    split: str = "test",
    mode: str = "pad",
    root: str | None = None,
    seed: int = 0,
) -> None:
    """Copy the exported pipeline and classifier to `out`, and write its README.md with pictures in card/.

    Args:
        generation, reconstruction: reports that `varkit eval --out` wrote, of the model and of its tokenizer.
        machine: what the runs were made on, for the reader.
        introduction, limits: Markdown paragraphs; the rest of the card is read from files.
        command: that gave the scores.   page: the HTML report, copied beside the card.
    Raises: FileNotFoundError when a run is not finished.
    """
    scores, back = Report.read(generation), Report.read(reconstruction)
    shutil.copytree(generator_run / "model", out, dirs_exist_ok=True)
    shutil.copytree(classifier_run / "model", out / "classifier", dirs_exist_ok=True)
    pipeline = AutoPipeline.from_pretrained(out)
    pipeline.set_progress_bar_config(disable=True)
    classes = pipeline.transformer.num_classes
    made = [image for _, _, image in generate(pipeline, list(range(classes)), 5 * classes, seed, 5 * classes)]
    save_png(grid(made, classes, 2), out / "card" / "samples.png", {"seed": seed, **pipeline.sampler.settings()})
    reconstruction_picture(pipeline, data, split, mode, root, out / "card" / "reconstructions.png")
    runs = {"tokenizer": tokenizer_run, "transformer": generator_run, "classifier": classifier_run}
    shown = [("tokenizer", "l2"), ("tokenizer", "psnr"), ("transformer", "loss"), ("transformer", "accuracy")]
    draw_curves(runs, shown, out / "card" / "curves.png")
    for report, name in ((scores, "generation"), (back, "reconstruction")):
        report.write(out / "card" / f"{name}.json")
    if page is not None:
        shutil.copyfile(page, out / "card" / "report.html")
    opens = " [report.html](card/report.html) shows it with curves and pictures." if page is not None else ""
    from varkit.metrics.classifier import ImageClassifier

    parts = {
        "tokenizer": pipeline.image_tokenizer,
        "transformer": pipeline.transformer,
        "classifier": ImageClassifier.from_pretrained(out / "classifier"),
    }
    facts = {name: run_facts(run, sum(p.numel() for p in parts[name].parameters())) for name, run in runs.items()}
    names = ", ".join(f"{k} {v}" for k, v in pipeline.labels.items())
    (out / "README.md").write_text(f"""---
library_name: varkit
license: {licence}
pipeline_tag: unconditional-image-generation
datasets:
- {data}
---

# {title}

{introduction}

![samples, one column a class](card/samples.png)

    varkit sample {title} --class 0,9 --num 8 --out grid.png

    from varkit import AutoPipeline
    images = AutoPipeline.from_pretrained("{title}")(class_labels=["Bag", "Sneaker"], seed=0).images

Classes: {names}.
{pipeline.transformer.layout.length} tokens an image: {pipeline.transformer.layout.describe()}.

## Results

By `varkit eval`, protocol {scores.protocol["name"]} (fingerprint {scores.fingerprint}): {scores.protocol["summary"]}.
In brackets: {scores.protocol["interval"]["level"]:.0%} intervals. [generation.json](card/generation.json) holds
everything; `varkit compare` puts other reports of this protocol beside it.{opens}

{score_table(scores)}

The command:

    {command}

Its tokenizer, protocol {back.protocol["name"]} (fingerprint {back.fingerprint}): {back.protocol["summary"]}.

{score_table(back)}

{plain_table(back.results[0].tables["codebook by scale"])}

Held-out images above their reconstructions:

![reconstructions](card/reconstructions.png)

## Training

{markdown_table(facts)}

Machine: {machine}. Curves:

![curves](card/curves.png)

To train it again: the three commands of the table, in that order (the recipes hold every setting), then `varkit eval`
as above, and `eval/write_card.py`.

## Limits

{limits}
""")
