"""Turn three finished runs into a model folder with its card: how varkit/zoo/fashion-var was made.

varkit eval runs/fashion_var/model fashion-mnist -p fashion --weights runs/fashion_classifier/model \\
    --guidance 1,1.5,2,2.5,3 --bounds fashion-mnist:test --out generation.json --html report.html
varkit eval runs/fashion_var/model fashion-mnist -p fashion-rec --weights runs/fashion_classifier/model \\
    --out reconstruction.json
python eval/write_card.py generation.json reconstruction.json --page report.html \\
    --out varkit/zoo/fashion-var --machine "two CPU cores"
"""

from pathlib import Path
from typing import Annotated

import typer

INTRODUCTION = """Class-conditional images of Fashion-MNIST (padded to 32x32) by next-scale prediction: the VAR of
arXiv 2404.02905 with its multi-scale VQ tokenizer, small enough to be trained and sampled on a CPU. It is varkit's
worked example: the recipes that made it ship with the package."""

COMMAND = """varkit eval fashion-var fashion-mnist -p fashion --guidance 1,1.5,2,2.5,3 --bounds fashion-mnist:test"""

LIMITS = """- A toy: it draws 28x28 grey garments and nothing else, for demonstration, tests and teaching.
- The tokenizer smooths fine texture (prints, laces, plaids); the samples inherit that.
- The coarsest scales use few codes: pictures of ten kinds of garment on black leave a 1x1 map little to say.
- An agreement above that of real images is no merit: guidance draws typical garments, real shirts are often not.
- The judge is a small classifier trained on the same data: FD(classifier) compares models of this data set with one
  another and says nothing beside an FID.
- The data is Zalando's, catalogue photographs of 2017: its classes, cuts and styles are those of that shop.
- Data: Fashion-MNIST (Zalando SE, MIT licence), arXiv 1708.07747."""


def main(
    generation: Annotated[Path, typer.Argument(help="The report of `varkit eval --out` on the model.")],
    reconstruction: Annotated[Path, typer.Argument(help="The same on its tokenizer.")],
    out: Annotated[Path, typer.Option(help="The folder to write.")],
    page: Annotated[Path | None, typer.Option(help="The HTML report of the model, to be kept beside the card.")] = None,
    *,
    machine: Annotated[str, typer.Option(help="What the runs were made on.")],
    tokenizer_run: Annotated[Path, typer.Option(help="Folder of the tokenizer's run.")] = Path("runs/fashion_vq"),
    generator_run: Annotated[Path, typer.Option(help="Folder of the generator's run.")] = Path("runs/fashion_var"),
    classifier_run: Annotated[Path, typer.Option(help="Folder of the judge's run.")] = Path("runs/fashion_classifier"),
    title: Annotated[str, typer.Option(help="The model's name.")] = "fashion-var",
) -> None:
    """Copy the models, draw the pictures and curves, write README.md."""
    from varkit.training.card import write_card

    write_card(
        tokenizer_run,
        generator_run,
        classifier_run,
        generation,
        reconstruction,
        out,
        title=title,
        machine=machine,
        introduction=INTRODUCTION,
        limits=LIMITS,
        command=COMMAND,
        page=page,
    )
    typer.echo(f"wrote {out}/README.md")


if __name__ == "__main__":
    typer.run(main)
