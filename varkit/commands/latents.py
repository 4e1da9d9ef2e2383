"""`varkit latents`: the latents of a tokenizer measured, and brought to mean 0 and spread 1 channel by channel."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from varkit.commands.common import Device, Json, refusing


@refusing
def latents(
    name: Annotated[str, typer.Argument(help="A tokenizer of latents: a folder, a hub repository, a released file.")],
    data: Annotated[str, typer.Argument(help="Images: whatever `varkit data check` reads.")],
    to: Annotated[
        Path | None, typer.Option(help="Write the tokenizer there, its channels brought to mean 0 and spread 1.")
    ] = None,
    num: Annotated[int, typer.Option(min=1, help="Images, evenly spaced over the set.")] = 10_000,
    split: Annotated[str, typer.Option(help="train, val, validation or test.")] = "train",
    root: Annotated[str | None, typer.Option(help="Where a named data set lies.")] = None,
    mode: Annotated[
        str, typer.Option(help="center, pad or squash: how images come to the tokenizer's size.")
    ] = "center",
    image_size: Annotated[
        int | None, typer.Option(min=1, help="Side of the images, where the tokenizer can code several.")
    ] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Images encoded at once.")] = 64,
    workers: Annotated[int, typer.Option(min=0, help="Processes that read images.")] = 0,
    device: Device = "auto",
    as_json: Json = False,
) -> None:
    """Measure mean and spread of each channel of a tokenizer's latents, as generators see them."""
    import torch

    from varkit.pipelines.auto import best_device, open_tokenizer
    from varkit.pipelines.measure_latents import measure_latents
    from varkit.tokenizers.kl_vae import KLVAE

    if to is not None and to.exists() and any(to.iterdir()):
        raise ValueError(f"{to} is not empty; choose a new folder")
    tokenizer = open_tokenizer(name, image_size=image_size).eval()
    if to is not None and not isinstance(tokenizer, KLVAE):
        raise ValueError(f"--to normalises KL autoencoders (KLVAE); {name} is a {type(tokenizer).__name__}")
    tokenizer.to(best_device() if device == "auto" else torch.device(device))
    found = measure_latents(
        tokenizer,
        data,
        num=num,
        split=split,
        root=root,
        mode=mode,  # type: ignore[arg-type]
        batch_size=batch_size,
        workers=workers,
        progress=sys.stderr.isatty() and not as_json,
    )
    if to is not None:
        tokenizer.normalise(found.mean, found.std).save_pretrained(to)
    if as_json:
        typer.echo(json.dumps({**asdict(found), "to": None if to is None else str(to)}))
        return
    typer.echo("channel      mean       std")
    for channel, (mean, std) in enumerate(zip(found.mean, found.std, strict=True)):
        typer.echo(f"{channel:7}  {mean:8.4f}  {std:8.4f}")
    typer.echo(f"latents: {found}")
    if to is not None:
        typer.echo(f"wrote {to}: latents_mean and latents_std in its config.json; generators see mean 0, std 1")
