"""What there is to use: shipped models, released checkpoints, architectures, data sets, recipes, protocols."""

from __future__ import annotations

import dataclasses
import fnmatch
import json
from pathlib import Path
from typing import Any

from varkit import registry
from varkit.config import nearest

DATA_SETS = {
    "fashion-mnist": "images: 60,000 and 10,000 garments of 10 classes, grey, 28x28 (docs/data.md)",
    "moving-fashion": "clips computed of it: one or two garments move and bounce, 30 classes (docs/video-data.md)",
}
"""Names that are data wherever a folder may be."""


def _recipe_summary(path: Path) -> str:
    first = path.read_text().splitlines()[0]
    return first.removeprefix("# What:").strip()


def catalog(pattern: str = "*") -> dict[str, dict[str, str]]:
    """Section -> name -> one line, for names that match a shell pattern."""
    from varkit.metrics.protocol import shipped_protocols
    from varkit.pipelines.auto import zoo_models
    from varkit.training.recipe import shipped_recipes
    from varkit.training.sweep import shipped_sweeps

    everything = {
        "shipped models": dict.fromkeys(zoo_models(), "ready to sample: varkit sample NAME"),
        "released checkpoints": {
            n: f"{(c := registry.checkpoint(n)).repo_id}/{c.filename}, {c.licence}; {c.official_score}"
            for n in registry.list_checkpoints()
        },
        "architectures": {n: registry.model_entry(n).summary for n in registry.list_models()},
        "data sets": DATA_SETS,
        "recipes": {n: _recipe_summary(p) for n, p in shipped_recipes().items()},
        "sweeps": {n: _recipe_summary(p) for n, p in shipped_sweeps().items()},
        "protocols": {n: _recipe_summary(p) for n, p in shipped_protocols().items()},
    }
    return {
        section: {n: text for n, text in entries.items() if fnmatch.fnmatch(n, pattern)}
        for section, entries in everything.items()
    }


def _part(model: Any) -> dict[str, Any]:
    return {
        "class": type(model).__name__,
        "parameters": sum(p.numel() for p in model.parameters()),
        "layout": f"{model.layout.length} tokens: {model.layout.describe()}",
    }


def describe(name: str) -> dict[str, Any]:
    """Facts about one name. Raises ValueError naming the nearest when there is none of it."""
    import torch

    from varkit.metrics.protocol import load_protocol, shipped_protocols
    from varkit.pipelines.auto import AutoPipeline, find_folder
    from varkit.training.recipe import load_recipe, recipe_values, shipped_recipes

    if (folder := find_folder(name)) is not None:
        pipeline = AutoPipeline.from_pretrained(name)
        card = folder / "README.md"
        return {
            "name": name,
            "kind": "pipeline",
            "transformer": json.dumps(_part(pipeline.transformer)),
            "image_tokenizer": json.dumps(_part(pipeline.image_tokenizer)),
            "classes": ", ".join(pipeline.labels.values()) or str(pipeline.transformer.num_classes),
            "sampling": json.dumps(pipeline.sampler.settings()),
            **({"card": card.read_text()} if card.is_file() else {}),
        }
    if name in registry.list_checkpoints():
        facts = dataclasses.asdict(registry.checkpoint(name))
        return {"kind": "released checkpoint", **{k: v for k, v in facts.items() if v}}
    if name in registry.list_models():
        entry = registry.model_entry(name)
        with torch.device("meta"):
            model = entry.build()
        pair = {"tokenizer": entry.tokenizer} if entry.tokenizer else {}
        return {"name": name, "kind": entry.kind, "summary": entry.summary, **_part(model), **pair}
    if name in DATA_SETS:
        return {"name": name, "kind": "data set", "summary": DATA_SETS[name]}
    recipes = shipped_recipes()
    if name in recipes:
        values = recipe_values(load_recipe(name))
        return {"name": name, "kind": "recipe", **{k: json.dumps(v) for k, v in values.items() if k != "name"}}
    if name in shipped_protocols():
        rules = load_protocol(name).to_dict()
        shown = {k: json.dumps(v) for k, v in rules.items() if k not in ("name", "kind")}
        return {"name": name, "kind": "protocol", "scores": rules["kind"], **shown}
    names = [n for section in catalog().values() for n in section]
    raise ValueError(f"nothing is called {name!r}{nearest(name, names)}; `varkit list` shows every name")
