"""Continuous speculative decoding of MAR (CSpD) beside plain MAR with all its iterations, and beside plain MAR with as
many calls of the large model, in one run.

    python benchmarks/cspd.py                                  # random weights, about a minute on one core
    python benchmarks/cspd.py --target runs/large/model --draft runs/small/model --inner-temperature 42

With random weights only times and calls mean something: what is accepted of a draft that has nothing in common with
its target says nothing of trained models, and a rejected token costs proposals besides. With two trained models the
share of accepted tokens is theirs. Times are of latents: the tokenizer's decoder is not run.
"""

from __future__ import annotations

import json
import statistics
import time
from typing import Annotated, Any

import typer

Row = dict[str, Any]


def random_model(width: int, depth: int, grid: int) -> Any:
    """A MAR of 16 channels, encoder and decoder of `depth` blocks each; weights that start at zero are drawn too."""
    import torch

    from varkit.generators.mar import MAR

    transformers = {f"{part}_{name}": value for part in ("encoder", "decoder") for name, value in
                    (("dim", width), ("depth", depth), ("heads", max(1, width // 64)))}  # fmt: skip
    model = MAR(**transformers, head_width=width, head_depth=3, grid=(grid, grid), latent_dim=16, num_classes=1000)
    for parameter in model.parameters():
        if not parameter.any():
            torch.nn.init.normal_(parameter, std=0.02)
    return model.eval()


def random_pair(sizes: dict[str, int]) -> tuple[Any, Any, Any]:
    """Target, draft and a tokenizer of the same layout, of which nothing else is used."""
    import torch

    from varkit.tokenizers.kl_vae import KLVAE

    torch.manual_seed(0)
    grid = sizes["grid"]
    tokenizer = KLVAE(
        image_size=2 * grid, latent_channels=16, block_out_channels=(8, 8), layers_per_block=1, norm_num_groups=4
    )
    target = random_model(sizes["width"], sizes["depth"], grid)
    return target, random_model(sizes["draft_width"], sizes["draft_depth"], grid), tokenizer.eval()


def trained_pair(target: str, draft: str, device: str) -> tuple[Any, Any, Any, dict[str, Any]]:
    """Those of two folders or names, and the settings of the large pipeline's sampler."""
    from varkit.commands.common import open_pipeline
    from varkit.samplers.continuous_speculative import ContinuousSpeculativeSampler

    pipeline = open_pipeline(target, device, "float32")
    ContinuousSpeculativeSampler.check_target(pipeline.transformer)
    small = pipeline.open_draft("model", draft)
    return pipeline.transformer, small, pipeline.image_tokenizer, pipeline.sampler.settings()


def measure(sampler: Any, models: tuple[Any, Any, Any], batch: int, repeats: int, **changes: Any) -> Row:
    """Median milliseconds an image after a run that is not counted, and the calls of the last run."""
    import torch

    from varkit import Rng
    from varkit.interfaces import Cond

    target, _, tokenizer = models
    device = target.positions.device
    labels = torch.arange(batch, device=device) * 7 % target.num_classes
    null, times, out = Cond(torch.full_like(labels, target.num_classes)), list[float](), None
    for _ in range(repeats + 1):
        began = time.perf_counter()
        out = sampler.generate(
            tokenizer, target, Cond(labels), Rng.from_seed(0, batch).to(device), null=null, **changes
        )
        out.tokens.cpu()
        times.append(time.perf_counter() - began)
    assert out is not None
    drafted = sum(getattr(out, "drafted", None) or [0])
    return {
        "ms_per_image": 1000 * statistics.median(times[1:]) / batch,
        "iterations": out.steps,
        "target_calls": out.network_calls,
        "draft_calls": getattr(out, "draft_calls", 0),
        "acceptance": sum(out.accepted) / drafted if drafted else None,
    }


def compare(models: tuple[Any, Any, Any], settings: dict[str, Any], options: dict[str, Any]) -> list[Row]:
    """CSpD and its two baselines. Args: settings: of both samplers.   options: of CSpD alone, batch and repeats."""
    from varkit.samplers.continuous import ContinuousSampler
    from varkit.samplers.continuous_speculative import ContinuousSpeculativeSampler

    options = dict(options)
    batch, repeats = options.pop("batch"), options.pop("repeats")
    plain, speculative = ContinuousSampler(**settings), ContinuousSpeculativeSampler(**settings, **options)
    rows = [
        {"what": "plain MAR", **measure(plain, models, batch, repeats)},
        {"what": "CSpD", **measure(speculative, models, batch, repeats, draft=models[1])},
    ]
    calls = rows[1]["target_calls"]
    rows.append({"what": f"plain MAR, {calls} iterations", **measure(plain, models, batch, repeats, num_steps=calls)})
    for row in rows:
        row["speed"] = rows[0]["ms_per_image"] / row["ms_per_image"]
    return rows


def table(rows: list[Row]) -> str:
    lines = [["", "ms/image", "against plain", "large calls", "small calls", "accepted"]]
    for row in rows:
        accepted = "" if row["acceptance"] is None else f"{row['acceptance']:.0%}"
        counts = [str(row["target_calls"]), str(row["draft_calls"] or "")]
        lines.append([row["what"], f"{row['ms_per_image']:.0f}", f"{row['speed']:.2f}x", *counts, accepted])
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    return "\n".join("  ".join(c.ljust(w) for c, w in zip(line, widths, strict=True)).rstrip() for line in lines)


def main(
    target: Annotated[str | None, typer.Option(help="A trained MAR, by name or folder; else random weights.")] = None,
    draft: Annotated[str | None, typer.Option(help="A smaller one of the same tokenizer; goes with --target.")] = None,
    width: Annotated[int, typer.Option(min=1, help="Of the random target, a multiple of 64.")] = 512,
    depth: Annotated[int, typer.Option(min=1, help="Blocks of its encoder and of its decoder.")] = 6,
    draft_width: Annotated[int, typer.Option(min=1, help="Of the random draft.")] = 128,
    draft_depth: Annotated[int, typer.Option(min=1)] = 2,
    grid: Annotated[int, typer.Option(min=1, help="Tokens a side, of random models.")] = 16,
    steps: Annotated[int, typer.Option(min=1, help="Iterations.")] = 32,
    head_steps: Annotated[int, typer.Option(min=1, help="Steps of a token.")] = 10,
    guidance: Annotated[float, typer.Option(help="uncond + w (cond - uncond); 1 is off.")] = 3.0,
    num_draft: Annotated[int, typer.Option(min=1, help="Iterations between two verifications.")] = 8,
    prefill: Annotated[float, typer.Option(help="Share of the iterations that the target takes by itself.")] = 0.15,
    inner_temperature: Annotated[float | None, typer.Option(help="Of the test of acceptance; released: 42.")] = None,
    batch: Annotated[int, typer.Option(min=1, help="Images at once.")] = 1,
    repeats: Annotated[int, typer.Option(min=1, help="Timed runs a row; the median counts.")] = 1,
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    as_json: Annotated[bool, typer.Option("--json", help="Rows as JSON.")] = False,
) -> None:
    """Milliseconds an image, calls, acceptance, and ratios within this run."""
    import torch

    if (target is None) != (draft is None):
        raise typer.BadParameter("--target and --draft go together; without both the weights are random")
    settings: dict[str, Any] = {"guidance_scale": guidance, "num_steps": steps, "head_steps": head_steps}
    sizes = {"width": width, "depth": depth, "draft_width": draft_width, "draft_depth": draft_depth, "grid": grid}
    if target is not None and draft is not None:
        *models, own = trained_pair(target, draft, device)
        settings = {**{k: v for k, v in own.items() if k != "head_steps_last"}, **settings}
    else:
        models = [model.to(device) for model in random_pair(sizes)]
    options = {"num_draft": num_draft, "prefill": prefill, "inner_temperature": inner_temperature}
    rows = compare(tuple(models), settings, {**options, "batch": batch, "repeats": repeats})  # type: ignore[arg-type]
    if as_json:
        typer.echo(json.dumps(rows))
        return
    count = [sum(p.numel() for p in m.parameters()) / 1e6 for m in models[:2]]
    what = "trained weights" if target else "random weights: acceptance means little"
    typer.echo(f"{device}, float32, {torch.get_num_threads()} threads, {count[0]:.1f} M and {count[1]:.1f} M, {what}")
    typer.echo(table(rows))


if __name__ == "__main__":
    typer.run(main)
