"""Entity x predictive, like for like: every pair trained on the same images for the same steps at equal parameters.

    varkit latents runs/fashion_kl/model fashion-mnist --mode pad --to runs/fashion_kl_unit   # of the recipe fashion_kl
    python benchmarks/entity_grid.py code            # codes the images once; without it trainings encode them anew
    python benchmarks/entity_grid.py train           # all pairs and seeds, one after another; run it again to go on
    python benchmarks/entity_grid.py table           # times sampling with nothing beside it, and writes the table

Several processes share the work with `train --part 1/2` and `train --part 2/2`. The pairs are those of `EntityAR`:
token, cell, subsample, scale and image, drawn by a categorical (ids of a VQ), a flow or a diffusion (latents of a
KL-VAE). What is said of them holds for this budget, which the table's title states, and for no other. docs/entities.md
has a table.
"""

import json
import math
import os
import statistics
import time
from itertools import product
from pathlib import Path
from typing import Annotated, Any

import typer

app = typer.Typer(add_completion=False, help=(__doc__ or "").splitlines()[0])

ENTITIES: dict[str, dict[str, Any]] = {
    "token": {"entity": "token"},
    "cell": {"entity": "cell", "entity_size": 4},
    "subsample": {"entity": "subsample", "entity_size": 4},
    "scale": {"entity": "scale"},
    "image": {"entity": "image"},
}
PREDICTIVES = ("categorical", "flow", "diffusion")
SIZES: dict[str, Any] = {"hidden_size": 64, "depths": [2, 2], "num_heads": 4, "head_width": 64, "head_depth": 2}
"""Of the pairs with a head of latents; those of ids have none, and a larger transformer of as many parameters."""

LEARNING_RATE = 3e-3  # so short a budget needs it
HEAD_STEPS = 25
GUIDANCE = (1.0, 2.0)


def names() -> list[str]:
    return [f"{entity}-{predictive}" for entity, predictive in product(ENTITIES, PREDICTIVES)]


def overrides_of(name: str, tokenizer: Any) -> dict[str, Any]:
    """Constructor arguments of a pair; its parameters are as many as those of cell-flow, or as near as blocks come."""
    entity, predictive = name.split("-")
    own = {**SIZES, **ENTITIES[entity], "predictive": predictive}
    clean = predictive == "categorical" or entity == "image"  # ids are read as they are, as in LlamaGen and VAR
    own["context_noise"] = "clean" if clean else "independent"
    if predictive != "categorical":
        return own
    layout = tokenizer.layout
    of_ids = {"grid": list(layout.grids[-1]), "latent_dim": layout.dim, "codebook_size": layout.codebook_size}
    of_ids |= {"scales": [list(grid) for grid in layout.grids]} if entity == "scale" else {}
    wanted = parameters(**SIZES, **ENTITIES["cell"])
    choices = [{**own, "depths": [depth // 2, depth - depth // 2]} for depth in range(4, 9)]
    return min(choices, key=lambda sizes: abs(parameters(**sizes, **of_ids) - wanted))


def parameters(**overrides: Any) -> int:
    import torch

    from varkit.registry import create_model

    with torch.device("meta"):
        return sum(p.numel() for p in create_model("entity_fashion", **overrides).parameters())


def sampling_of(name: str) -> dict[str, Any]:
    steps = {} if name.endswith("categorical") else {"head_steps": HEAD_STEPS}
    return {"guidance_schedule": "constant", **steps}


Latents = Annotated[str, typer.Option(help="The KL-VAE, channels of mean 0 and spread 1.")]
Ids = Annotated[str, typer.Option(help="The VQ of all entities but scales: a model or a tokenizer.")]
Scales = Annotated[str, typer.Option(help="The multi-scale VQ.")]
Data = Annotated[str, typer.Option(help="The images.")]
Out = Annotated[Path, typer.Option(help="Folder of all runs.")]
LATENTS, IDS, SCALES = "runs/fashion_kl_unit", "fashion-llamagen", "fashion-var"
DATA, OUT = "fashion-mnist", "runs/entity_grid"


@app.command()
def code(
    latents: Latents = LATENTS, ids: Ids = IDS, scales: Scales = SCALES, data: Data = DATA, out: Out = Path(OUT)
) -> None:
    """Code the images by each tokenizer, but for scales of latents, which are made in training."""
    from varkit.pipelines.extract_codes import Views, extract_codes

    for kind, tokenizer in (("latents", latents), ("ids", ids), ("scales", scales)):
        for split in ("train", "test"):
            folder = out / "codes" / f"{kind}-{split}"
            extract_codes(
                tokenizer, data, folder, split=split, views=Views(mode="pad"), moments=kind == "latents", progress=True
            )
            (folder / "finished").touch()


@app.command()
def train(
    latents: Latents = LATENTS,
    ids: Ids = IDS,
    scales: Scales = SCALES,
    data: Data = DATA,
    reference: Annotated[str, typer.Option(help="What samples are compared with.")] = "fashion-mnist",
    protocol: Annotated[str, typer.Option(help="How.")] = "fashion",
    steps: Annotated[int, typer.Option(min=1, help="Of training.")] = 600,
    batch: Annotated[int, typer.Option(min=1, help="Images a step.")] = 32,
    seeds: Annotated[str, typer.Option(help="One training each.")] = "0,1",
    num: Annotated[int, typer.Option(min=2, help="Images that are drawn and compared.")] = 1000,
    only: Annotated[list[str] | None, typer.Option(help="Pairs such as cell-flow; all unless given.")] = None,
    part: Annotated[str, typer.Option(help="Which share of the trainings, such as 1/2.")] = "1/1",
    out: Out = Path(OUT),
) -> None:
    """Train and score pairs that are not finished yet."""
    wanted = only or names()
    if unknown := sorted(set(wanted) - set(names())):
        raise typer.BadParameter(f"no pair is called {', '.join(unknown)}; pairs: {', '.join(names())}")
    share, of = (int(x) for x in part.split("/"))
    jobs = [(name, int(seed)) for seed in seeds.split(",") for name in wanted]
    for name, seed in jobs[share - 1 :: of]:
        folder = out / f"{name}-{seed}"
        if (folder / "result.json").is_file():
            continue
        kind = "latents" if not name.endswith("categorical") else "scales" if name.startswith("scale") else "ids"
        tokenizer = {"latents": latents, "ids": ids, "scales": scales}[kind]
        sets = [out / "codes" / f"{kind}-{split}" for split in ("train", "test")]
        coded = all((s / "finished").is_file() for s in sets) and name not in ("scale-flow", "scale-diffusion")
        data_sets = (str(sets[0]), str(sets[1])) if coded else (data, data)
        facts = train_one(name, seed, folder, tokenizer, data_sets, steps, batch)
        facts |= score(folder / "model", name, reference, protocol, num)
        facts |= {"tokenizer": tokenizer, "steps": steps, "batch": batch, "num": num, "protocol": protocol}
        part_file = folder / ".result.json.part"
        part_file.write_text(json.dumps(facts, indent=1) + "\n")
        os.replace(part_file, folder / "result.json")
        typer.echo(f"{name} seed {seed}: {facts}")


def train_one(
    name: str, seed: int, folder: Path, tokenizer: str, data: tuple[str, str], steps: int, batch: int
) -> dict[str, Any]:
    """One training, or the rest of it, on images or token files. Returns: parameters, validation loss, seconds."""
    from varkit.pipelines.auto import open_tokenizer
    from varkit.training.checkpoint import Checkpoints
    from varkit.training.loop import Trainer
    from varkit.training.recipe import load_recipe

    changes = {
        "objective.tokenizer": tokenizer,
        "objective.model_overrides": overrides_of(name, open_tokenizer(tokenizer)),
        "objective.sampling": sampling_of(name),
        "data.train": data[0],
        "data.validation": data[1],
        "loop.steps": steps,
        "loop.batch_size": batch,
        "loop.seed": seed,
        "loop.ema_decay": 0.99,
        "optim.lr": LEARNING_RATE,
        "loop.validate_every": steps,
        "loop.sample_every": steps,
        "loop.save_every": max(steps // 2, 1),
        "optim.warmup_steps": min(100, steps // 2),
        "name": f"{name}-{seed}",
        "out": str(folder),
    }
    recipe = load_recipe("fashion_entity", [f"{key}={json.dumps(value)}" for key, value in changes.items()])
    trainer = Trainer(recipe, Checkpoints(folder / "checkpoints", recipe.loop.keep).latest() is not None)
    result = trainer.run()
    if not result.finished:
        raise typer.Exit(1)
    logged = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return {
        "parameters": sum(p.numel() for p in trainer.objective.trained("main").parameters()),
        "validation_loss": [row["validation/loss"] for row in logged if "validation/loss" in row][-1],
        "seconds": result.seconds,
    }


def score(model: Path, name: str, reference: str, protocol: str, num: int) -> dict[str, Any]:
    """FD and class agreement of samples at each guidance, with the names of both as the protocol says them."""
    from varkit.metrics.evaluate import evaluate

    report = evaluate(
        str(model),
        reference,
        protocol=protocol,
        metrics=["frechet", "accuracy"],
        num=num,
        guidance=GUIDANCE,
        sampling={k: v for k, v in sampling_of(name).items() if k != "guidance_schedule"},
    )
    rows = [{s.name: s.value for s in result.scores} for result in report.results]
    return {"scores": rows, "title": report.results[0].scores[0].title}


def cost(model: Path, batch: int, repeats: int) -> dict[str, float]:
    """Milliseconds an image in a batch, and calls of backbone and head for one image; with guidance."""
    from varkit import AutoPipeline

    pipeline = AutoPipeline.from_pretrained(model)
    pipeline.set_progress_bar_config(disable=True)
    network = pipeline.transformer
    calls = {"backbone": 0, "head": 0}

    def count(kind: str) -> Any:
        def hook(*_: Any) -> None:
            calls[kind] += 1

        return hook

    head = network.head.linear if hasattr(network.head, "linear") else network.head.net
    hooks = [network.trunk.register_forward_hook(count("backbone")), head.register_forward_hook(count("head"))]
    labels = [i % network.num_classes for i in range(batch)]
    pipeline(class_labels=labels[:1], seed=0, guidance_scale=GUIDANCE[-1], output_type="pt")
    for hook in hooks:
        hook.remove()
    found: dict[str, float] = dict(calls)
    for key, some in (("ms_alone", labels[:1]), ("ms", labels)):
        times = []
        for _ in range(repeats):
            began = time.perf_counter()
            pipeline(class_labels=some, seed=0, guidance_scale=GUIDANCE[-1], output_type="pt")
            times.append(time.perf_counter() - began)
        found[key] = 1000 * statistics.median(times) / len(some)
    return found


@app.command()
def table(
    out: Out = Path(OUT),
    batch: Annotated[int, typer.Option(min=1, help="Images drawn at once when timed.")] = 32,
    repeats: Annotated[int, typer.Option(min=1, help="Of each timing; the median counts.")] = 3,
) -> None:
    """Write OUT/table.md and OUT/table.json of the pairs that are finished."""
    import torch

    rows: list[dict[str, Any]] = []
    for name in names():
        runs = [json.loads(p.read_text()) for p in sorted(out.glob(f"{name}-*/result.json"))]
        if runs:
            model = sorted(out.glob(f"{name}-*/model"))[0]
            rows.append({"name": name, "runs": runs, **cost(model, batch, repeats)})
    if not rows:
        raise typer.BadParameter(f"{out} holds no finished pair: run `train` first")
    text = markdown(rows, batch, torch.get_num_threads())
    (out / "table.md").write_text(text)
    (out / "table.json").write_text(json.dumps(rows, indent=1) + "\n")
    typer.echo(text)


def markdown(rows: list[dict[str, Any]], batch: int, threads: int) -> str:
    """The table, titled with its budget; below it the pairs that did not train, and those that are missing."""
    first = rows[0]["runs"][0]
    budgets = {(run["steps"], run["batch"], run["num"]) for row in rows for run in row["runs"]}
    if len(budgets) > 1:
        raise typer.BadParameter(f"the runs have several budgets, {sorted(budgets)}: keep each in a folder of its own")
    seeds = sorted({len(row["runs"]) for row in rows})
    smallest, largest = (f(run["parameters"] for row in rows for run in row["runs"]) for f in (min, max))
    lines = [
        f"**Budget: {first['steps']:,} steps of {first['batch']} images, {'/'.join(map(str, seeds))} seeds, "
        f"{smallest / 1e6:.2f} to {largest / 1e6:.2f} M parameters; {first['num']:,} samples "
        f"({first['title']}, protocol {first['protocol']}), {HEAD_STEPS} head steps.**",
        "",
        f"| entity | predictive | FD, guidance {GUIDANCE[0]:g} | FD, guidance {GUIDANCE[1]:g} | "
        f"class agreement, guidance {GUIDANCE[1]:g} | calls: backbone + head | ms an image, alone | "
        f"ms an image, {batch} at once |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        entity, predictive = row["name"].split("-")
        off, on = (spread([run["scores"][i]["frechet"] for run in row["runs"]], 2) for i in (0, 1))
        agreement = spread([100 * run["scores"][1]["accuracy"] for run in row["runs"]], 1)
        lines.append(
            f"| {entity} | {predictive} | {off} | {on} | {agreement} % | {row['backbone']} + {row['head']} | "
            f"{row['ms_alone']:.0f} | {row['ms']:.1f} |"
        )
    lines += ["", f"Several seeds: mean, lowest to highest. Timed in float32 on {threads} thread(s), guided."]
    failed = [row["name"] for row in rows if not trains(row)]
    missing = sorted(set(names()) - {row["name"] for row in rows})
    for said, which in (("Did not train (see `trains`)", failed), ("Not run", missing)):
        if which:
            lines.append(f"{said}: {', '.join(which)}.")
    return "\n".join(lines) + "\n"


def spread(values: list[float], digits: int) -> str:
    mean = f"{statistics.mean(values):.{digits}f}"
    return mean if len(values) == 1 else f"{mean} ({min(values):.{digits}f} to {max(values):.{digits}f})"


def trains(row: dict[str, Any]) -> bool:
    """Whether losses are finite, and guided samples are of their class more than twice as often as by chance of ten."""
    return all(math.isfinite(run["validation_loss"]) and run["scores"][1]["accuracy"] > 0.2 for run in row["runs"])


if __name__ == "__main__":
    app()
