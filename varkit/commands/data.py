"""`varkit data check`, `fashion-mnist` and `emoji`."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated

import typer

from varkit.commands import clips as of_clips
from varkit.commands.common import Json, refusing, say


@refusing
def check(
    source: Annotated[
        str, typer.Argument(help="A folder, .npz, .npy or IDX file, tars, hf:NAME, videos, or a named data set.")
    ],
    workers: Annotated[int, typer.Option(min=0, help="Threads that decode images or videos.")] = 0,
    split: Annotated[str, typer.Option(help="train, val or test, where the source has splits.")] = "train",
    root: Annotated[str | None, typer.Option(help="Where a named data set lies.")] = None,
    videos: Annotated[
        bool,
        typer.Option("--videos", help="Also where there are images: their folders are videos, one frame each."),
    ] = False,
    as_json: Json = False,
) -> None:
    """Read every image or video; report classes, counts, sizes and broken files. Exit code 1 if any is broken."""
    from varkit.data.check import DataReport, check_images
    from varkit.data.check_clips import ClipReport, is_video_source

    report: DataReport | ClipReport
    if videos or is_video_source(source):
        report = of_clips.check(source, workers, split, root, as_json)
    else:
        bar = sys.stderr.isatty() and not as_json
        report = check_images(source, workers=workers, split=split, root=root, progress=bar)
    typer.echo(json.dumps(report.to_dict()) if as_json else "\n".join(report.lines()))
    if report.broken:
        raise typer.Exit(1)


@refusing
def fashion_mnist(
    out: Annotated[Path, typer.Option(help="Folder for train.npz and test.npz.")] = Path("data/fashion-mnist"),
    root: Annotated[Path | None, typer.Option(help="Folder with the IDX files, if not in its usual place.")] = None,
) -> None:
    """Write Fashion-MNIST as train.npz and test.npz (ADM layout)."""
    from varkit.data.fashion import prepare_fashion_mnist

    counts = prepare_fashion_mnist(out, root)
    typer.echo(f"wrote {', '.join(f'{split}.npz ({n} images)' for split, n in counts.items())} into {out}")


@refusing
def emoji(
    out: Annotated[Path, typer.Argument(help="Folder to make, with train/ and test/ in it.")] = Path("data/emoji"),
    sources: Annotated[
        list[str] | None,
        typer.Option("--from", help="Each package as a .tgz file or an unpacked folder, instead of a download."),
    ] = None,
    as_json: Json = False,
) -> None:
    """Write emoji of Google and Twitter, 64x64, with captions; fetched from the npm registry (136 MB)."""
    from varkit.data.emoji import prepare_emoji

    counts = prepare_emoji(out, sources or (), announce=say, progress=sys.stderr.isatty() and not as_json)
    told = ", ".join(f"{split} ({n} images)" for split, n in counts.items())
    typer.echo(json.dumps({"folder": str(out), "images": counts}) if as_json else f"{out} holds {told} and CREDITS.txt")
