"""The command line: which command is in which file. Heavy imports sit inside each command, so `varkit --help` answers
at once."""

from __future__ import annotations

from typing import Annotated

import typer

import varkit
from varkit.commands import (
    bench,
    clips,
    coding,
    control,
    data,
    evaluate,
    features,
    latents,
    models,
    retrieval,
    sample,
    training,
    trajectories,
)
from varkit.commands.common import refusing

ABOUT = "varkit: images and videos by next-scale, next-token and next-block prediction."

app = typer.Typer(help=ABOUT, no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)
data_app = typer.Typer(help="Look at a data folder; prepare a named data set.", no_args_is_help=True)
app.add_typer(data_app, name="data")


def version(value: bool) -> None:
    if value:
        typer.echo(f"varkit {varkit.__version__}")
        raise typer.Exit


@app.callback(help=ABOUT)
def root(
    show: Annotated[
        bool, typer.Option("--version", callback=version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    pass


app.command()(sample.sample)
app.command()(coding.reconstruct)
app.command("eval")(evaluate.eval_)
app.command()(evaluate.compare)
app.command()(coding.tokenize)
app.command()(bench.bench)
app.command()(control.control)
app.command("control-score")(control.control_score)
app.command()(features.features)
app.command()(latents.latents)
app.command()(trajectories.trajectories)
app.command()(retrieval.retrieval)
app.command()(training.train)
app.command()(training.sweep)
app.command()(models.convert)
app.command()(models.push)
app.command("list")(models.list_)
app.command()(models.info)
data_app.command()(data.check)
data_app.command("fashion-mnist")(data.fashion_mnist)
data_app.command("moving-fashion")(clips.moving_fashion)
data_app.command("emoji")(data.emoji)


@app.command()
@refusing
def demo(
    model: Annotated[
        list[str] | None, typer.Option(help="A shipped model or a saved folder. Repeatable. Default: fashion-var.")
    ] = None,
    host: Annotated[str, typer.Option(help="Address to listen on; 0.0.0.0 is every network.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=1, max=65535)] = 7860,
    reference: Annotated[str, typer.Option(help="Real images that Evaluate scores against.")] = "fashion-mnist",
    max_images: Annotated[int, typer.Option(min=1, help="Images of one request.")] = 16,
    max_evaluated: Annotated[int, typer.Option(min=16, help="Images of one evaluation.")] = 256,
    max_waiting: Annotated[int, typer.Option(min=1, help="Requests in the queue, of all visitors.")] = 200,
    max_upload_mb: Annotated[int, typer.Option(min=1, help="Megabytes of an uploaded file.")] = 10,
    max_side: Annotated[int, typer.Option(min=1, help="Pixels of an uploaded image's longer side.")] = 4096,
    max_frames: Annotated[int, typer.Option(min=1, help="Frames of a clip, drawn or sent to be continued.")] = 128,
    max_seconds: Annotated[int, typer.Option(min=1, help="Seconds of an uploaded clip.")] = 60,
) -> None:
    """Open the web demo (needs the extra `app`)."""
    from varkit.demo.app import launch
    from varkit.demo.limits import Limits

    limits = Limits(max_images, max_evaluated, max_waiting, max_upload_mb, max_side, max_frames, max_seconds)
    launch(host=host, port=port, model=model or ["fashion-var"], limits=limits, reference=reference)


def main() -> None:
    """Entry point of the `varkit` command."""
    app()
