"""Turn finished runs into a model folder with its card: how the models in varkit/zoo were made.

python eval/write_card.py pack eval/cards/fashion-var.yaml            # weights and judge into varkit/zoo/fashion-var
varkit eval fashion-var fashion-mnist -p fashion ... --out generation.json --html report.html
varkit eval fashion-var fashion-mnist -p fashion-rec --out reconstruction.json
python eval/write_card.py card eval/cards/fashion-var.yaml generation.json reconstruction.json --page report.html \\
    --machine "two CPU cores"

The YAML file says which runs, and the commands of `varkit eval` in full; `varkit.training.card.CardText` has its keys.
"""

from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(add_completion=False, help=__doc__, rich_markup_mode=None)
ZOO = Path(__file__).resolve().parents[1] / "varkit" / "zoo"

Text = Annotated[Path, typer.Argument(help="What the card says that no run knows: a file of eval/cards.")]
Out = Annotated[Path | None, typer.Option(help="The model's folder. Default: varkit/zoo/NAME.")]


@app.command()
def pack(text: Text, out: Out = None) -> None:
    """Copy the exported pipeline, and its judge if it has one, into the model's folder."""
    from varkit.training.card import load_text, pack_model

    content = load_text(text)
    folder = out or ZOO / content.name
    pack_model(content, folder)
    typer.echo(f"wrote {folder}")


@app.command()
def card(
    text: Text,
    generation: Annotated[Path, typer.Argument(help="The report of `varkit eval --out` on the model.")],
    reconstruction: Annotated[Path, typer.Argument(help="The same on its tokenizer.")],
    out: Out = None,
    page: Annotated[Path | None, typer.Option(help="The HTML report of the model, to be kept beside the card.")] = None,
    *,
    machine: Annotated[str, typer.Option(help="What the runs were made on.")],
) -> None:
    """Draw the pictures and curves of a packed model, write its README.md."""
    from varkit.training.card import load_text, write_card

    content = load_text(text)
    folder = out or ZOO / content.name
    write_card(content, folder, generation, reconstruction, machine=machine, page=page)
    typer.echo(f"wrote {folder}/README.md")


if __name__ == "__main__":
    app()
