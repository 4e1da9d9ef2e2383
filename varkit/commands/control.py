"""`varkit control` and `varkit control-score`: control maps made of images, and how well images keep to theirs."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Annotated, Any

import typer

from varkit.commands.common import Device, Json, refusing, say

Kind = Annotated[str, typer.Argument(help="canny, hed, lineart, lineart-white, depth, depth-midas or seg.")]
Low = Annotated[float | None, typer.Option(help="Of canny: the lower threshold. Default: 100.")]
High = Annotated[float | None, typer.Option(help="Of canny: the upper threshold. Default: 200.")]
Weights = Annotated[Path | None, typer.Option(help="Of hed and lineart: the released file, or its folder.")]
Model = Annotated[str | None, typer.Option(help="Of depth and seg: a network of transformers, by name or folder.")]
Size = Annotated[int | None, typer.Option(min=1, help="Of depth: pixels a side at which the network sees images.")]


@refusing
def control(
    kind: Kind,
    images: Annotated[Path, typer.Argument(help="An image, or a folder of images (with all folders in it).")],
    out: Annotated[Path, typer.Option(help="Folder for the maps, of the same paths; what is there is kept.")],
    low: Low = None,
    high: High = None,
    weights: Weights = None,
    model: Model = None,
    size: Size = None,
    palette: Annotated[str | None, typer.Option(help="Of seg: ade20k, coco-stuff or ids (grey levels).")] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Images of one size extracted at once.")] = 16,
    device: Device = "auto",
    as_json: Json = False,
) -> None:
    """Make control maps of images: edges, lines, depth, classes. Run it again to go on after a stop."""
    from varkit.conditioning.extractors import build_extractor, extractor_entry
    from varkit.pipelines.extract_controls import extract_controls
    from varkit.pipelines.sample_set import launched

    entry = extractor_entry(kind)
    if kind == "map":
        raise ValueError("map hands maps on as they are: there is nothing to make")
    options = given(low=low, high=high, weights=weights, model=model, size=size, palette=palette)
    state = launched(device)
    where = {"device": state.device} if entry.network else {}
    began = time.perf_counter()
    made, there, skipped = extract_controls(
        lambda: build_extractor(kind, **options, **where),
        images,
        out,
        record={"kind": kind, **{k: str(v) if isinstance(v, Path) else v for k, v in options.items()}},
        batch_size=batch_size,
        process_index=state.process_index,
        num_processes=state.num_processes,
        progress=state.is_main_process and not as_json and sys.stderr.isatty(),
    )
    for path, reason in skipped[:20]:
        say(f"skipping {path}: {reason}")
    state.wait_for_everyone()
    if state.is_main_process:
        seconds = time.perf_counter() - began
        if as_json:
            told = {"kind": kind, "made": made, "there": there, "skipped": len(skipped), "folder": str(out)}
            typer.echo(json.dumps({**told, "seconds": seconds}))
        else:
            lost = f", {len(skipped)} unreadable and left out" if skipped else ""
            whose = "" if state.num_processes == 1 else " by this process"
            typer.echo(f"wrote {out}: {made} maps{whose} in {seconds:.1f} s, {there} were there{lost}; {entry.meaning}")
    state.destroy_process_group()


@refusing
def control_score(
    kind: Kind,
    generated: Annotated[Path, typer.Argument(help="Folder of generated images.")],
    controls: Annotated[
        Path, typer.Argument(help="Folder of the maps that they were made from, of the same paths; of seg label maps.")
    ],
    low: Low = None,
    high: High = None,
    weights: Weights = None,
    model: Model = None,
    size: Size = None,
    labels: Annotated[str, typer.Option(help="Of seg: what label maps hold: ids, ade20k or coco-stuff.")] = "ids",
    allow_missing: Annotated[
        bool, typer.Option("--allow-missing", help="Leave images out that have no control.")
    ] = False,
    batch_size: Annotated[int, typer.Option(min=1, help="Images extracted at once.")] = 16,
    out: Annotated[Path | None, typer.Option(help="Write the scores, image by image, as JSON.")] = None,
    device: Device = "auto",
    as_json: Json = False,
) -> None:
    """Extract controls of generated images again and compare them with those that they were made from."""
    from varkit.conditioning.extractors import extractor_entry
    from varkit.metrics.control_score import control_score as score
    from varkit.pipelines.sample_set import launched

    options = given(low=low, high=high, weights=weights, model=model, size=size)
    if extractor_entry(kind).network:
        options["device"] = launched(device).device
    result = score(
        generated,
        controls,
        kind,
        labels=labels,
        batch_size=batch_size,
        progress=not as_json and sys.stderr.isatty(),
        allow_missing=allow_missing,
        **options,
    )
    text = json.dumps(result.to_dict())
    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
        part = out.with_name(f".{out.name}.part")
        part.write_text(text + "\n", encoding="utf-8")
        part.replace(out)
    if as_json:
        typer.echo(text)
        return
    left = f"; {result.missing} without a control left out" if result.missing else ""
    typer.echo(f"{result.metric} {result.mean:.4f} over {len(result.per_image)} images ({kind}){left}")
    if out is not None:
        typer.echo(f"wrote {out}")


def given(**options: Any) -> dict[str, Any]:
    """The options that were given."""
    return {name: value for name, value in options.items() if value is not None}
