"""`varkit convert`, `push`, `list` and `info`: models as files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from varkit.commands.common import Dtype, Json, refusing, say


@refusing
def convert(
    source: Annotated[Path, typer.Argument(help="A released file (.pth, .pt), or a folder to convert back.")],
    to: Annotated[Path, typer.Option(help="The folder to write; or, back, a .pth or .safetensors file.")],
    tokenizer: Annotated[
        Path | None, typer.Option(help="With a generator's file: its tokenizer's, for a whole pipeline.")
    ] = None,
    part: Annotated[str, typer.Option(help="Back, from a pipeline: transformer or image_tokenizer.")] = "transformer",
    dtype: Dtype = "float32",
    grid: Annotated[
        int | None,
        typer.Option(min=1, help="Tokens a side, where neither keys nor the file's name tell: 24 for 384 px."),
    ] = None,
    class_texts: Annotated[
        Path | None, typer.Option(help="Of NBP's files of UCF-101: JSON with the ids of each class's text.")
    ] = None,
) -> None:
    """Released files <-> the diffusers folder format."""
    from varkit.checkpoints.convert import convert as run

    options: dict[str, Any] = {"part": part, "dtype": dtype, "grid": grid, "class_texts": class_texts}
    for line in run(source, to, tokenizer=tokenizer, **options):
        typer.echo(line)


@refusing
def push(
    folder: Annotated[Path, typer.Argument(help="A saved pipeline or model, such as the model/ folder of a run.")],
    repo: Annotated[str, typer.Argument(help="The hub repository, user/name; made if there is none.")],
    private: Annotated[bool, typer.Option("--private", help="Make a new repository private.")] = False,
    report: Annotated[Path | None, typer.Option(help="JSON of `varkit eval --out`: the card's scores.")] = None,
    run: Annotated[
        Path | None, typer.Option(help="Folder of the run, for the card. Default: the one that holds FOLDER.")
    ] = None,
    licence: Annotated[str | None, typer.Option(help="As the hub spells it: apache-2.0, mit, ...")] = None,
    dataset: Annotated[list[str] | None, typer.Option(help="Trained on, by its name on the hub. Repeatable.")] = None,
    include: Annotated[
        list[str] | None, typer.Option(help="Send this file of FOLDER too, whatever it is. Repeatable.")
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the card and the files; send nothing.")] = False,
) -> None:
    """Upload a model with its card to the Hugging Face Hub: safetensors, JSON, Markdown and PNG files alone."""
    from varkit.hub import plan_upload
    from varkit.hub import push as send

    plan = plan_upload(
        folder, repo, report=report, run=run, licence=licence, datasets=dataset or (), include=include or ()
    )
    if dry_run:
        typer.echo(plan.files["README.md"])
    for name in plan.files:
        say(f"{'would send' if dry_run else 'sending'} {name}")
    for name in plan.left_out:
        say(f"stays here: {name} (--include sends it)")
    if not dry_run:
        address = send(plan, repo, private=private or None)
        typer.echo(f"pushed {len(plan.files)} files to {address}")


@refusing
def list_(
    pattern: Annotated[str, typer.Argument(help="A shell pattern, such as 'var*'.")] = "*",
    as_json: Json = False,
) -> None:
    """Shipped models, released checkpoints, architectures, data sets and recipes."""
    from varkit.catalog import catalog

    found = catalog(pattern)
    if as_json:
        typer.echo(json.dumps(found))
        return
    for section, entries in found.items():
        typer.echo(f"{section}:")
        width = max((len(n) for n in entries), default=0)
        for key, text in entries.items():
            typer.echo(f"  {key:<{width}}  {text}")
        if not entries:
            typer.echo(f"  none matches {pattern!r}")


@refusing
def info(
    name: Annotated[str, typer.Argument(help="A name that `varkit list` shows, or a saved folder.")],
    as_json: Json = False,
) -> None:
    """Parameters, token layout, licence, card."""
    from varkit.catalog import describe

    found = describe(name)
    if as_json:
        typer.echo(json.dumps(found))
        return
    card = found.pop("card", None)
    width = max(len(k) for k in found)
    for key, value in found.items():
        typer.echo(f"{key.replace('_', ' '):<{width}}  {value}")
    if card:
        typer.echo(f"\n{card}")
