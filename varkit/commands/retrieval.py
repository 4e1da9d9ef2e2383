"""`varkit retrieval`: whether a model of texts draws what it is asked for, by a matcher."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from varkit.commands.common import Device, Json, open_pipeline, refusing, say


@refusing
def retrieval(
    name: Annotated[str, typer.Argument(help="A model of texts: a shipped one, a folder, a hub repository.")],
    data: Annotated[str, typer.Argument(help="Captioned images with splits, such as data/emoji.")],
    matcher: Annotated[
        Path | None,
        typer.Option(
            help="Folder of the matcher: model/ of a run of the objective `matcher`. Default: matcher/ in the model's."
        ),
    ] = None,
    split: Annotated[
        list[str] | None, typer.Option(help="Repeatable; each is scored by itself. Default: train and test.")
    ] = None,
    num: Annotated[int, typer.Option(min=2, help="Captions of each split, from the first.")] = 128,
    seed: Annotated[int, typer.Option(min=0, help="Of the images.")] = 0,
    guidance: Annotated[float | None, typer.Option(help="Default: the model's own, as for all of these.")] = None,
    temperature: Annotated[float | None, typer.Option()] = None,
    top_k: Annotated[int | None, typer.Option()] = None,
    top_p: Annotated[float | None, typer.Option()] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Images drawn at once.")] = 32,
    device: Device = "auto",
    as_json: Json = False,
) -> None:
    """Draw the captions of a data set; how often does a matcher find each image's caption among them?"""
    from varkit.metrics.matcher import open_matcher
    from varkit.metrics.retrieval import retrieval as run

    judge = open_matcher(matcher or beside(name))
    judged_by = str(matcher or f"{name}/matcher")
    pipeline = open_pipeline(name, device, "float32")
    splits = tuple(split or ("train", "test"))
    rows = run(
        pipeline,
        judge.to(pipeline.device),
        data,
        splits=splits,
        num=num,
        seed=seed,
        batch_size=batch_size,
        announce=say if sys.stderr.isatty() and not as_json else lambda text: None,
        guidance_scale=guidance,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
    )
    if as_json:
        given = {"guidance_scale": guidance, "temperature": temperature, "top_k": top_k, "top_p": top_p}
        settings = pipeline.sampler.settings(**{k: v for k, v in given.items() if v is not None})
        told = {"model": name, "matcher": judged_by, "data": data, "seed": seed, "settings": settings}
        typer.echo(json.dumps({**told, "rows": [asdict(row) for row in rows]}))
        return
    typer.echo(f"{name}, seed {seed}, judged by {judged_by}: captions found among those of the split")
    for row in rows:
        ends = [f" [{e[0]:.1%}, {e[1]:.1%}]" if e else "" for e in (row.top1_interval, row.top5_interval)]
        typer.echo(
            f"{row.split:>10}  {row.images:<13}  {row.captions:>5} captions  "
            f"top-1 {row.top1:.1%}{ends[0]}  top-5 {row.top5:.1%}{ends[1]}"
        )


def beside(name: str) -> Path:
    """The matcher that a model was shipped with. Raises ValueError where there is none."""
    from varkit.pipelines.auto import find_folder

    folder = find_folder(name)
    if folder is None or not (folder / "matcher" / "config.json").is_file():
        raise ValueError(
            f"{name} has no matcher beside it: give --matcher, the model/ folder of a run of the objective `matcher`, "
            f"such as `varkit train emoji_matcher`"
        )
    return folder / "matcher"
