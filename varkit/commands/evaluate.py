"""`varkit eval` and `varkit compare`: scores by a named protocol."""

from __future__ import annotations

import json
import shlex
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from varkit.commands.common import Device, Json, numbers, refusing


@refusing
def eval_(
    context: typer.Context,
    generated: Annotated[
        str,
        typer.Argument(help="A folder, .npz, tars, data set, videos; or a model, which is sampled; or a tokenizer."),
    ],
    reference: Annotated[str, typer.Argument(help="Real images or videos in the same forms, or a statistics .npz.")],
    protocol: Annotated[str, typer.Option("--protocol", "-p", help="A name (`varkit list`) or a .yaml file.")],
    metrics: Annotated[
        str | None, typer.Option(help="Instead of the protocol's, separated by commas: fid,is,...")
    ] = None,
    num: Annotated[int | None, typer.Option(min=2, help="Images to score, if not the protocol's number.")] = None,
    change: Annotated[
        list[str] | None, typer.Option("--set", help="Change the protocol: key=value. Repeatable.")
    ] = None,
    split: Annotated[str | None, typer.Option(help="Split of the reference: train, val or test.")] = None,
    root: Annotated[str | None, typer.Option(help="Where a named data set lies.")] = None,
    weights: Annotated[Path | None, typer.Option(help="The network's file, or a folder that holds it.")] = None,
    download: Annotated[bool, typer.Option(help="Fetch missing weights whose checksum is known.")] = False,
    classifier: Annotated[Path | None, typer.Option(help="Folder of the classifier that `accuracy` asks.")] = None,
    guidance: Annotated[str | None, typer.Option(help="Of a model: guidance scales, separated by commas.")] = None,
    steps: Annotated[
        str | None, typer.Option(help="Of a model whose steps can be chosen: numbers of them, separated by commas.")
    ] = None,
    schedule: Annotated[str | None, typer.Option(help="Of a model: constant, linear, cosine or late.")] = None,
    temperature: Annotated[float | None, typer.Option(help="Of a model.")] = None,
    top_k: Annotated[int | None, typer.Option(help="Of a model.")] = None,
    top_p: Annotated[float | None, typer.Option(help="Of a model.")] = None,
    bounds: Annotated[
        str | None, typer.Option(help="Held-out real images (fashion-mnist:test), scored too, and reconstructed.")
    ] = None,
    tokens: Annotated[
        str | None,
        typer.Option("--tokens", "--lengths", help="Of a model that can stop early, or a flexible tokenizer: 1,2,4,8."),
    ] = None,
    html: Annotated[Path | None, typer.Option(help="Write a report that opens in a browser (extra `eval`).")] = None,
    out: Annotated[Path | None, typer.Option(help="Write the report as JSON, for `varkit compare`.")] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Images in the network at once.")] = 32,
    cache: Annotated[bool, typer.Option(help="Keep the reference's statistics for the next time.")] = True,
    device: Device = "auto",
    as_json: Json = False,
) -> None:
    """Score images, reconstructions or videos by a named protocol, with intervals."""
    from varkit.metrics.collect import process
    from varkit.metrics.evaluate import evaluate

    sampling = {"guidance_schedule": schedule, "temperature": temperature, "top_k": top_k, "top_p": top_p}
    report = evaluate(
        generated,
        reference,
        protocol=protocol,
        metrics=metrics.split(",") if metrics else (),
        num=num,
        overrides=change or (),
        split=split,
        root=root,
        classifier=classifier,
        guidance=numbers(guidance, "--guidance", float),
        sampling=sampling,
        bounds=bounds,
        lengths=numbers(tokens, "--tokens", int),
        steps=numbers(steps, "--steps", int),
        weights=weights,
        download=download,
        device=device,
        batch_size=batch_size,
        cache=cache,
        progress=sys.stderr.isatty(),
    )
    report.environment["command"] = typed(context)
    if process()[0] == 0:
        give(report, out, html, as_json)


@refusing
def compare(
    reports: Annotated[list[Path], typer.Argument(help="JSON files that `varkit eval --out` wrote.")],
    html: Annotated[Path | None, typer.Option(help="Write all of them as one page (extra `eval`).")] = None,
    as_json: Json = False,
) -> None:
    """Put reports beside each other; those of different protocols or references are refused."""
    from varkit.metrics.report import Report, join

    give(join([Report.read(path) for path in reports]), None, html, as_json)


def typed(context: typer.Context) -> str:
    """The command as it was typed, whatever launched it: for the report, and through it for the model's card."""
    words = ["varkit", str(context.info_name)]
    for parameter in context.command.params:
        source = context.get_parameter_source(str(parameter.name))
        if source is None or source.name != "COMMANDLINE":
            continue
        value = context.params[str(parameter.name)]
        if parameter.param_type_name == "argument":
            words.append(str(value))
        elif isinstance(value, bool):
            words.append(parameter.opts[0] if value else parameter.secondary_opts[0])
        else:
            for one in value if isinstance(value, (list, tuple)) else [value]:
                words += [next(o for o in parameter.opts if o.startswith("--")), str(one)]
    return shlex.join(words)


def give(report: Any, out: Path | None, html: Path | None, as_json: bool) -> None:
    """Print a report, and write it where it was asked for."""
    if out is not None:
        report.write(out)
    if html is not None:
        from varkit.metrics.html import write_html

        write_html(report, html)
    typer.echo(json.dumps(report.to_dict()) if as_json else "\n".join(report.lines()))
    if not as_json:
        for path in (out, html):
            if path is not None:
                typer.echo(f"wrote {path}")
