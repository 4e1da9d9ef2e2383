"""The pictures of a model's card: samples, reconstructions, curves of the training, quality over tokens."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from varkit.data.clips import open_clips
from varkit.data.images import open_images
from varkit.data.transforms import ImageTransform
from varkit.data.video_writing import write_video
from varkit.metrics.report import Report
from varkit.model_card import read_metrics
from varkit.pictures import grid, rows_of_frames, save_png, titled_grids, to_pil
from varkit.pipelines.base import generate
from varkit.pipelines.clips import generate_clips

if TYPE_CHECKING:
    from varkit.training.card import CardText

CHARTS = {"frechet": "lower is better", "accuracy": "higher is better", "psnr": "dB, higher is better"}
"""Scores that are drawn over the number of tokens."""

FPS, STRIP = 8, 9
"""Of the clips that play, and frames of a film strip."""


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


def draw_clips(pipeline: Any, text: CardText, root: str | None, seed: int, out: Path) -> None:
    """samples.webp, a clip of each class playing; samples.png, film strips of some; reconstructions.png, strips of
    held-out clips and of what comes back."""
    tokenizer, classes = pipeline.image_tokenizer, pipeline.transformer.num_classes
    clips = [frames for _, _, frames in generate_clips(pipeline, list(range(classes)), classes, seed, 10)]
    settings = {"seed": seed, **pipeline.sampler.settings()}
    names = [pipeline.labels.get(i, str(i)) for i in range(classes)]
    sheets = titled_grids(clips, names, min(classes, 10), 2)
    write_video(np.stack([np.asarray(sheet) for sheet in sheets]), out / "samples.webp", FPS, settings)
    which = np.linspace(0, tokenizer.num_frames - 1, min(STRIP, tokenizer.num_frames)).round().astype(int)
    some = list(range(0, classes, max(1, classes // 8)))[:8]
    save_png(grid([clips[i][t] for i in some for t in which], len(which), 2), out / "samples.png", settings)
    dataset = open_clips(
        text.data, split=text.split, frames=tokenizer.num_frames, size=tokenizer.image_size[0], root=root
    )
    real = dataset.__getitems__(list(range(4)))["images"]
    with torch.no_grad():
        back = tokenizer.decode(tokenizer.encode(real)).float()
    pairs = torch.stack([real, back], 1).flatten(0, 1)
    save_png(grid(to_pil(rows_of_frames(pairs, len(which))), len(which), 2), out / "reconstructions.png")


def draw_pictures(pipeline: Any, text: CardText, root: str | None, seed: int, out: Path) -> list[int]:
    """samples.png and reconstructions.png; of a model that may stop early also tokens-samples.png, and both of the
    latter have a row a number of tokens. Returns these numbers, from 1 up, or nothing."""
    if pipeline.image_tokenizer.num_frames is not None:
        draw_clips(pipeline, text, root, seed, out)
        return []
    tokenizer, of_text = pipeline.image_tokenizer, pipeline.transformer.condition == "text"
    asked: list[Any] = list(text.prompts) if of_text else list(range(pipeline.transformer.num_classes))
    classes, zoom = len(asked), 1 if of_text else 2
    made = [image for _, _, image in generate(pipeline, asked, 5 * classes, seed, 5 * classes)]
    settings = {"seed": seed, **pipeline.sampler.settings(), **({"prompts": asked} if of_text else {})}
    save_png(grid(made, classes, zoom), out / "samples.png", settings)
    images = one_of_each_class(text, tokenizer.image_size, root)
    counts = tokenizer.powers_of_two() if hasattr(tokenizer, "powers_of_two") else []
    with torch.no_grad():
        tokens = tokenizer.encode(images)
        back = [tokenizer.decode(tokens, lengths=n) for n in counts] or [tokenizer.decode(tokens)]
    shown = [image for row in (images, *back) for image in to_pil(row.float())]
    save_png(grid(shown, len(images), zoom), out / "reconstructions.png", {"rows": ["held-out", *map(str, counts)]})
    if counts:
        drawn = [
            image
            for n in counts
            for _, _, image in generate(pipeline, list(range(classes)), classes, seed, classes, num_tokens=n)
        ]
        save_png(grid(drawn, classes, 2), out / "tokens-samples.png", {**settings, "num_tokens": counts})
    return counts
