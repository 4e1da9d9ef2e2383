"""`varkit data moving-fashion`, and what other commands say of videos."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from varkit.commands.common import Json, refusing

BLOCK = 64
"""Clips that are computed at once."""

FRAMES_AT_ONCE = 16
"""Of a video that a tokenizer of images codes frame by frame."""


@refusing
def moving_fashion(
    out: Annotated[Path, typer.Argument(help="Folder for SPLIT.npz: arr_0 uint8 (N, T, H, W, 3), arr_1 class ids.")],
    split: Annotated[str, typer.Option(help="train, or test: which garments.")] = "test",
    num: Annotated[int, typer.Option(min=1, help="Clips, from the first.")] = 2048,
    frames: Annotated[int, typer.Option(min=1, help="Frames of a clip.")] = 16,
    size: Annotated[int, typer.Option(help="Pixels of a side, even.")] = 32,
    seed: Annotated[int, typer.Option(min=0, help="Another one moves the garments otherwise.")] = 0,
    root: Annotated[str | None, typer.Option(help="Where Fashion-MNIST lies, if not in its usual place.")] = None,
    as_json: Json = False,
) -> None:
    """Write clips of Moving-Fashion, for evaluation and other tools. Training computes them and needs no file."""
    import numpy as np

    from varkit.data.moving import MovingFashion
    from varkit.data.npz import write_npz

    if split not in ("train", "test"):
        raise ValueError(f"--split must be train or test; got {split!r}")
    videos = MovingFashion(split, size=size, seed=seed, root=root, num=num)
    path = out / f"{split}.npz"
    rows = (range(first, min(first + BLOCK, num)) for first in range(0, num, BLOCK))
    blocks = (np.repeat(videos.clips(some, frames)[..., None], 3, -1) for some in rows)
    shape = (num, frames, size, size, 3)
    write_npz(path, {"arr_0": (shape, np.uint8, blocks), "arr_1": ((num,), np.int64, [videos.labels])})
    told = {"file": str(path), "clips": num, "shape": list(shape), "classes": videos.classes}
    typer.echo(
        json.dumps(told) if as_json else f"wrote {path}: {num} clips {shape[1:]} of {len(videos.classes)} classes"
    )


def check(source: str, workers: int, split: str, root: str | None, as_json: bool) -> Any:
    """The report of `varkit data check` on videos."""
    from varkit.data.check_clips import check_clips

    return check_clips(source, workers=workers, split=split, root=root, progress=sys.stderr.isatty() and not as_json)


def reconstruct(name: str, tokenizer: Any, source: str, out: Path, as_json: bool, **options: Any) -> None:
    """`varkit reconstruct` with a tokenizer of clips."""
    from varkit.metrics.video_reconstruction import reconstruct_videos, told

    result = reconstruct_videos(tokenizer, source, out, **options)
    if as_json:
        typer.echo(json.dumps(result))
        return
    for line in told(result):
        typer.echo(line)
    ssim = f", SSIM {result['ssim']:.4f}" if "ssim" in result else ""
    typer.echo(
        f"{name}: {result['frames']} frames of {len(result['videos'])} videos: PSNR {result['psnr']:.2f} dB{ssim}"
    )
    if "used" in result:
        typer.echo(f"  {result['used']} of {result['codebook']} codes used ({result['used_share']:.1%})")
    typer.echo(f"wrote {out}: originals left, reconstructions right, and metrics.json with every frame's scores")
