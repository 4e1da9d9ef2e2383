"""Take the statistics of real images or videos once, for `varkit eval` to be given instead of them.

    accelerate launch eval/prepare_reference.py IMAGES --protocol adm --split val --size 256 --out imagenet_256.npz

The file holds moments (mu, sigma; with Inception also mu_s, sigma_s), the features of up to 50,000 images, and by which
network and rules they were made; a protocol of other rules refuses it.
"""

import sys
from pathlib import Path
from typing import Annotated

import typer

from varkit.commands.common import refusing

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command()
@refusing
def main(
    source: Annotated[str, typer.Argument(help="A folder, .npz, IDX files, the name of a data set, or videos.")],
    protocol: Annotated[str, typer.Option("--protocol", "-p", help="A name (`varkit list`) or a .yaml file.")],
    out: Annotated[Path, typer.Option(help="The .npz to write.")],
    split: Annotated[str | None, typer.Option(help="train, val or test, where the source has splits.")] = None,
    root: Annotated[str | None, typer.Option(help="Where a named data set lies.")] = None,
    size: Annotated[int | None, typer.Option(min=8, help="Make images this square size, by the rule --fit.")] = None,
    fit: Annotated[
        str | None, typer.Option(help="center, squash or pad. Default: the protocol's, else center.")
    ] = None,
    change: Annotated[
        list[str] | None, typer.Option("--set", help="Change the protocol: key=value. Repeatable.")
    ] = None,
    weights: Annotated[Path | None, typer.Option(help="The network's file, or a folder that holds it.")] = None,
    download: Annotated[bool, typer.Option(help="Fetch missing weights whose checksum is known.")] = False,
    batch_size: Annotated[int, typer.Option(min=1, help="Images in the network at once.")] = 32,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or mps.")] = "auto",
) -> None:
    """Write the statistics of a set of real images or videos."""
    from accelerate import PartialState

    from varkit.metrics.evaluate import Options, prepare

    PartialState()
    options = Options(weights, download, device, batch_size, progress=sys.stderr.isatty())
    count = prepare(source, protocol, out, options, change or (), split=split, root=root, size=size, fit=fit)
    if PartialState().is_main_process:
        typer.echo(f"wrote {out}: {count:,} of {source} by the rules of {protocol}")


if __name__ == "__main__":
    app()
