"""`varkit bench`: what samplers cost on a model, and what their images are worth, beside plain decoding in one run."""

from __future__ import annotations

import json
import statistics
import time
from typing import Annotated, Any

import typer

from varkit.commands.common import Device, Dtype, Json, numbers, open_pipeline, refusing, say


@refusing
def bench(
    name: Annotated[str, typer.Argument(help="A shipped model, a saved folder, a checkpoint; or a builder: var_d16.")],
    sampler: Annotated[
        list[str] | None,
        typer.Option(help="As --sampler of `varkit sample`; repeatable. Plain decoding runs beside them in any case."),
    ] = None,
    draft: Annotated[
        str | None, typer.Option(help="A smaller model of the same tokens, for the samplers cspd (MAR) and little.")
    ] = None,
    batches: Annotated[str, typer.Option(help="Images at once, separated by commas.")] = "1,8",
    repeats: Annotated[int, typer.Option(min=1, help="Of each timing, after one that is not counted.")] = 3,
    seed: Annotated[int, typer.Option(min=0, help="Names the images.")] = 0,
    guidance: Annotated[
        float | None, typer.Option(help="uncond + w (cond - uncond); the model's own by default.")
    ] = None,
    reference: Annotated[
        str | None, typer.Option(help="Real images, as `varkit eval` reads them: also score each sampler's images.")
    ] = None,
    protocol: Annotated[str, typer.Option("-p", "--protocol", help="How they are scored.")] = "fashion",
    num: Annotated[int, typer.Option(min=2, help="Images that are scored.")] = 1000,
    device: Device = "auto",
    dtype: Dtype = "float32",
    markdown: Annotated[bool, typer.Option("--markdown", help="The table as Markdown.")] = False,
    as_json: Json = False,
) -> None:
    """Time sampling by each sampler named, and plain decoding; score their images where there is a reference."""
    from varkit import registry
    from varkit.samplers.speculative.names import with_draft

    sizes: list[int] = numbers(batches, "--batches", int)
    if not sizes or min(sizes) < 1:
        raise ValueError(f"--batches {batches} must be numbers from 1, such as 1,8")
    names = list(dict.fromkeys(["plain", *with_draft(sampler or [], draft)]))
    fresh = name in registry.list_models()
    if fresh and reference:
        raise ValueError(
            f"{name} is a builder: its weights are random, so its images mean nothing; leave out --reference"
        )
    pipeline = fresh_pipeline(name, device, dtype) if fresh else open_pipeline(name, device, dtype)
    if pipeline.transformer.condition != "class":
        raise ValueError(f"{name} draws from texts; varkit bench draws from classes")
    # Chosen once, so that networks are opened and neighbours sorted once; and bad names are refused before any work.
    chosen = {each: pipeline.choose_sampler(each, sizes[0]) for each in names}
    rows = []
    for each in names:
        quality = score(pipeline, name, each, reference, protocol, num, seed, guidance) if reference else {}
        for size in sizes:
            say(f"{each}, {size} at once")
            by = each if each == "auto" else chosen[each]  # auto depends on how many images are drawn at once
            took = measure(pipeline, by, size, repeats, seed, guidance)
            rows.append({"sampler": each, "batch": size, **took, **quality})
    for row in rows:
        plain = next(r for r in rows if r["sampler"] == "plain" and r["batch"] == row["batch"])
        row["speedup"] = plain["ms_per_image"] / row["ms_per_image"]
    facts = {"model": name, "device": str(pipeline.device), "dtype": dtype, "repeats": repeats, "seed": seed}
    typer.echo(json.dumps({**facts, "rows": rows}) if as_json else table(rows, facts, markdown))


def fresh_pipeline(name: str, device: str, dtype: str) -> Any:
    """Of a builder, with random weights: what a pass costs does not depend on them, what is accepted does."""
    import torch

    from varkit.pipelines.auto import best_device, create_pipeline

    torch.manual_seed(0)
    pipeline = create_pipeline(name)
    pipeline.to(best_device() if device == "auto" else torch.device(device), getattr(torch, dtype))
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def measure(pipeline: Any, sampler: Any, batch: int, repeats: int, seed: int, guidance: float | None) -> dict[str, Any]:
    """Medians over the repeats, whole images with their decoding; counts of the last."""
    labels = [i % pipeline.transformer.num_classes for i in range(batch)]
    times, stats = [], dict[str, Any]()
    for _ in range(repeats + 1):
        began = time.perf_counter()
        out = pipeline(class_labels=labels, seed=seed, guidance_scale=guidance, output_type="pt", sampler=sampler)
        out.images.cpu()  # a GPU answers before it is done
        times.append(time.perf_counter() - began)
        stats = out.stats
    found = {
        "ms_per_image": 1000 * statistics.median(times[1:]) / batch,
        "network_calls": stats["network_calls"],
        "lossless": stats.get("lossless", True),
    }
    if "tokens_per_call" in stats:
        calls = stats["target_calls"]
        found["target_calls"] = calls if isinstance(calls, int) else sum(calls) / batch
        found["tokens_per_call"] = sum(stats["tokens_per_call"]) / batch
    if "drafted" in stats:
        found["acceptance"] = sum(stats["accepted"]) / max(sum(stats["drafted"]), 1)
    return found


def score(
    pipeline: Any,
    name: str,
    sampler: str,
    reference: str,
    protocol: str,
    num: int,
    seed: int,
    guidance: float | None,
) -> dict[str, Any]:
    """Fréchet distance and, where classes are known, agreement of `num` images; they do not depend on the batch."""
    from varkit.metrics.evaluate import evaluate
    from varkit.metrics.protocol import load_protocol
    from varkit.metrics.sources import model_set

    say(f"{sampler}: {num} images against {reference}")
    rules = load_protocol(protocol, metrics=["frechet", "accuracy"], num=num, overrides=[f"sampling.seed={seed}"])
    settings = {"sampler": sampler} | ({} if guidance is None else {"guidance_scale": guidance})
    images = model_set(pipeline, f"{name}, {sampler}", rules, pipeline.device, **settings)
    result = evaluate(images, reference, protocol=rules).results[0]
    return {"scores": [{"title": s.title, "value": s.value} for s in result.scores], "scored": num}


def table(rows: list[dict[str, Any]], facts: dict[str, Any], markdown: bool = False) -> str:
    """Aligned text, or Markdown; one line a sampler and batch."""
    titles = [s["title"] for s in rows[0].get("scores", [])]
    lines = [["sampler", "batch", "ms/image", "speed-up", "passes", "tokens/pass", "accepted", "law", *titles]]
    for row in rows:
        rate = f"{row['tokens_per_call']:.2f}" if "tokens_per_call" in row else ""
        drafts = [rate, f"{row['acceptance']:.0%}" if "acceptance" in row else ""]
        passes = f"{row.get('target_calls', row['network_calls']):.4g}"
        law = "plain" if row["sampler"] == "plain" else "lossless" if row["lossless"] else "relaxed"
        cells = [row["sampler"], str(row["batch"]), f"{row['ms_per_image']:.0f}", f"{row['speedup']:.2f}x", passes]
        lines.append([*cells, *drafts, law, *(f"{s['value']:.4g}" for s in row.get("scores", []))])
    if markdown:
        lines.insert(1, ["---"] * len(lines[0]))
        lines = [["|", " | ".join(line), "|"] for line in lines]
    widths = [0 if markdown else max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    gap = " " if markdown else "  "
    text = "\n".join(gap.join(c.ljust(w) for c, w in zip(line, widths, strict=True)).rstrip() for line in lines)
    text += "\n" if markdown else ""
    of = f"; scores of {rows[0]['scored']:,} images each" if titles else ""
    return f"{text}\n{facts['model']}, {facts['dtype']} on {facts['device']}, median of {facts['repeats']}{of}"
