"""How closely a model of classes follows control images: Canny edges of test images, drawn from, and extracted again.

    python benchmarks/controllability.py runs/fashion_var_control/model --strength 0,0.5,1 --guidance 1,2 --num 500

Each image is drawn from the class and the edges of a test image, with the same noise at every setting. The score is
the mean over images of the F1 of edge pixels (`varkit.metrics.controllability.canny_f1`). Strength 0 is what the class
alone brings; the test images' reconstructions by the model's tokenizer say how much of the edges survives its tokens.
Thresholds and how images are brought to size should be those of the training.
"""

import json
import math
from typing import Annotated, Any

import typer

app = typer.Typer(add_completion=False, help=(__doc__ or "").splitlines()[0])


@app.command()
def main(
    model: Annotated[str, typer.Argument(help="A model of classes that control images steer: its name or folder.")],
    strength: Annotated[str, typer.Option(help="Control strengths, by commas.")] = "0,0.5,1",
    guidance: Annotated[str, typer.Option(help="Guidance scales, by commas.")] = "1,2",
    num: Annotated[int, typer.Option(min=1, help="Test images, spread evenly over the set.")] = 500,
    data: Annotated[str, typer.Option(help="The images, with the classes of the model.")] = "fashion-mnist",
    split: Annotated[str, typer.Option(help="Of the data.")] = "test",
    mode: Annotated[str, typer.Option(help="How images are brought to size: pad, center or squash.")] = "pad",
    low: Annotated[int, typer.Option(help="Of Canny.")] = 100,
    high: Annotated[int, typer.Option(help="Of Canny.")] = 200,
    batch_size: Annotated[int, typer.Option(min=1, help="Images at once.")] = 50,
    seed: Annotated[int, typer.Option(help="Of the noise.")] = 0,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
) -> None:
    """Measure, and print a table."""
    from varkit import AutoPipeline
    from varkit.conditioning.extractors import build_extractor

    strengths, scales = numbers(strength, "--strength", 0), numbers(guidance, "--guidance", 1)
    pipe = AutoPipeline.from_pretrained(model)
    pipe.set_progress_bar_config(disable=True)
    if pipe.transformer.takes != {"class", "control"}:
        raise typer.BadParameter(f"{model} is conditioned on {' and '.join(sorted(pipe.transformer.takes))}")
    kinds = pipe.transformer.controller.kinds
    if kinds and "canny" not in kinds:
        raise typer.BadParameter(f"{model} was trained with {', '.join(kinds)}, not with canny")
    images, labels = held_out(data, split, mode, pipe, num)
    edges = build_extractor("canny", low=low, high=high)
    wanted = edges(pixels(images))
    decoded = [pipe.image_tokenizer.decode(pipe.image_tokenizer.encode(x)) for x in images.split(batch_size)]
    rows = [{"what": "reconstructions", **score(edges, decoded, wanted)}]
    for w in scales:
        for s in strengths:
            drawn = draw(pipe, labels, wanted, kinds, w, s, seed, batch_size)
            rows.append({"what": "samples", "guidance": w, "strength": s, **score(edges, drawn, wanted)})
    facts = {"model": model, "data": data, "split": split, "mode": mode, "images": len(images), "seed": seed}
    facts |= {"low": low, "high": high, "edge_share": float((wanted == 255).float().mean())}
    typer.echo(json.dumps({**facts, "rows": rows}) if as_json else markdown(facts, rows))


def numbers(text: str, option: str, least: float) -> list[float]:
    """Raises typer.BadParameter unless these are numbers from `least`."""
    try:
        values = [float(part) for part in text.split(",")]
    except ValueError:
        values = []
    if not values or not all(math.isfinite(v) and v >= least for v in values):
        raise typer.BadParameter(f"{option} must be numbers from {least:g}, by commas; got {text!r}")
    return values


def held_out(data: str, split: str, mode: str, pipe: Any, num: int) -> tuple[Any, list[int]]:
    """Images (N, 3, H, W) in [-1, 1] and their classes."""
    import torch

    from varkit.data import ImageTransform, open_images

    if mode not in ("pad", "center", "squash"):
        raise typer.BadParameter(f"--mode must be pad, center or squash; got {mode!r}")
    rows = open_images(data, split=split, transform=ImageTransform(pipe.image_tokenizer.image_size, mode=mode))  # type: ignore[arg-type]
    if not 0 < rows.num_classes <= pipe.transformer.num_classes:
        raise typer.BadParameter(f"{data} has {rows.num_classes} classes, the model {pipe.transformer.num_classes}")
    if num > len(rows):
        raise typer.BadParameter(f"{data} has {len(rows)} images; --num {num} is too many")
    places = torch.linspace(0, len(rows) - 1, num).round().long().tolist()
    batch = rows.__getitems__(places)
    return batch["images"], batch["labels"].tolist()


def pixels(images: Any) -> Any:
    """(B, 3, H, W) in [-1, 1] -> uint8 (B, H, W, 3)."""
    import torch

    return images.float().add(1).mul(127.5).round().clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1)


def draw(
    pipe: Any, labels: list[int], edges: Any, kinds: tuple[str, ...], w: float, s: float, seed: int, batch_size: int
) -> list[Any]:
    """One image for each edge map, in batches (B, 3, H, W) in [-1, 1]. Its noise is of its number alone."""
    from varkit import Rng

    made = []
    for first in range(0, len(labels), batch_size):
        some = labels[first : first + batch_size]
        maps = edges[first : first + batch_size, None]
        control = {"canny": maps} if len(kinds) > 1 else maps
        out = pipe(
            some,
            control=control,
            control_strength=s,
            guidance_scale=w,
            rng=Rng.from_seed(seed, len(some), first),
            output_type="pt",
        )
        made.append(out.images * 2 - 1)
    return made


def score(edges: Any, images: list[Any], wanted: Any) -> dict[str, float]:
    """The mean F1 over images and its standard error; and the share of edge pixels."""
    import torch

    from varkit.metrics.controllability import canny_f1

    found = torch.cat([edges(pixels(x)) for x in images])
    f1 = canny_f1(found, wanted).per_image
    error = float(f1.std() / math.sqrt(len(f1))) if len(f1) > 1 else 0.0
    return {"f1": float(f1.mean()), "standard_error": error, "edge_share": float((found == 255).float().mean())}


def markdown(facts: dict[str, Any], rows: list[dict[str, Any]]) -> str:
    """The table, titled with what was measured."""
    lines = [
        f"**{facts['model']}: Canny F1 ({facts['low']}, {facts['high']}) of {facts['images']:,} images of "
        f"{facts['data']} ({facts['split']}, {facts['mode']}), seed {facts['seed']}; "
        f"{100 * facts['edge_share']:.1f} % of the pixels of their maps are edges.**",
        "",
        "| | guidance | strength | F1 (standard error) | edge pixels |",
        "|---|---|---|---|---|",
    ]
    for row in rows:
        setting = f"{row['guidance']:g} | {row['strength']:g}" if "guidance" in row else "- | -"
        lines.append(
            f"| {row['what']} | {setting} | {row['f1']:.3f} ({row['standard_error']:.3f}) | "
            f"{100 * row['edge_share']:.1f} % |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    app()
