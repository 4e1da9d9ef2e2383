"""Starting from a trained generator: own classes, frozen parts, learning rates by depth, LoRA.

Nothing here knows a paper. A generator takes part by the few attributes of `Tunable`; its objective inherits
`FinetuneConfig` and calls `start_from` and `prepare`.

Source of the learning rates by depth: BEiT, arXiv 2106.08254, section 3.2 and appendix; He et al., MAE,
arXiv 2111.06377, appendix A.1.
"""

from __future__ import annotations

import difflib
import fnmatch
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import field
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from varkit.config import ConfigError, config, nearest
from varkit.pipelines.auto import open_transformer
from varkit.training.lora import LoRA, add_adapter, require_peft


class Tunable(Protocol):
    """What fine-tuning reads of a generator, besides that it is a `ModelMixin`.

    class_embedding: name of its `nn.Embedding` whose last num_classes + 1 rows are the classes, and the last of all the
        null class; with num_classes rows in all the null class is zero, and no row. A model whose layer itself has
        this name need not say so.
    blocks: the layers by depth. What the constructor makes before them is the bottom, what it makes after them the top.
    lora_targets: name patterns of the linear layers that LoRA adapts by default.
    free_arguments: constructor arguments that no weight depends on, such as dropout.
    """

    class_embedding: str
    num_classes: int
    blocks: nn.ModuleList
    lora_targets: tuple[str, ...]
    free_arguments: frozenset[str]


@config
class FinetuneConfig:
    """Keys of every generator's objective."""

    model_overrides: dict[str, Any] = field(default_factory=dict)  # constructor arguments to change
    init_from: str | None = None  # to start from: a shipped model, a folder, a released checkpoint or its file
    freeze: tuple[str, ...] = ()  # name patterns of parameters that are not trained, such as blocks.0.*
    lora: LoRA | None = None  # train low-rank additions to linear layers instead of the layers (extra `lora`)

    def check_finetuning(self) -> None:
        """Raises ConfigError or ImportError."""
        if self.lora is None:
            return
        if self.init_from is None:
            raise ConfigError("objective.lora adapts a trained model; name one in objective.init_from")
        require_peft()


# ---- the model to start from ----------------------------------------------------------------------------------------


def start_from(plan: FinetuneConfig, kind: type[Any], classes: Sequence[str]) -> tuple[Any, str]:
    """The model of `plan.init_from` with the classes of the data.

    Args:
        kind: the generator's class.
        classes: names of the data's classes, by id; empty when it has none. Of use to models of classes alone.
    Returns: the model, float32, and a line for the log.
    Raises: ConfigError when `model_overrides` contradict the weights; ValueError when there is no such model.
    """
    assert plan.init_from is not None
    wanted = dict(plan.model_overrides)
    count = wanted.pop("num_classes", None)
    model, names = open_transformer(
        plan.init_from, kind, **{k: v for k, v in wanted.items() if k in kind.free_arguments}
    )
    require_same(model, wanted, plan.init_from)
    model = model.float()
    if model.condition != "class":
        return model, f"starts from {plan.init_from}, conditioned on {model.condition}: no class embedding is resized"
    return model, resize_classes(model, classes, names, count=count)


def require_same(model: Any, overrides: Mapping[str, Any], source: str) -> None:
    """Raises ConfigError when an override is not what the weights of `model` were made for."""
    for key, value in overrides.items():
        if key not in model.config:
            known = [k for k in model.config if not k.startswith("_")]
            raise ConfigError(
                f"objective.model_overrides.{key}: {type(model).__name__} takes no such argument{nearest(key, known)}"
            )
        if plain(model.config[key]) != plain(value):
            raise ConfigError(
                f"objective.model_overrides.{key}={value} contradicts the weights of {source}, which were made with "
                f"{plain(model.config[key])}; leave it out. What may change: "
                f"{', '.join(sorted(model.free_arguments | ({'num_classes'} & model.config.keys())))}"
            )


def plain(value: Any) -> Any:
    """Tuples and lists alike, at any depth."""
    return [plain(v) for v in value] if isinstance(value, list | tuple) else value


def telling(names: Iterable[str]) -> bool:
    """Whether class names say more than their numbers."""
    return [str(n) for n in names] != [str(i) for i, _ in enumerate(names)]


@torch.no_grad()
def resize_classes(
    model: Any,
    classes: Sequence[str],
    names: Mapping[int, str] | None = None,
    *,
    count: int | None = None,
) -> str:
    """Give the class embedding a row for each class of the data; the null row stays the last.

    A class whose name the source knows takes its row along. Without names on both sides rows are kept by number, if the
    number of classes stays the same. All others are new: copies of the null row, so the model draws them as any class.

    Args:
        model: a `Tunable`, changed in place.
        classes: names by id.   names: those of the model, if it is known what it was trained on.
        count: rows without the null class; None: as many as `classes`, at least 1.
    Returns: one line for the log.
    Raises: ConfigError when `count` is less than the classes.
    """
    name = getattr(type(model), "class_embedding", "class_embedding")
    old = model.get_submodule(name)
    before, target = model.num_classes, max(len(classes), 1) if count is None else count
    table, null_row = old.weight, len(old.weight) > before
    others = table[: -before - 1] if null_row else table[:0]  # codes, where one table holds both
    rows: Tensor = table[len(others) :] if null_row else torch.cat([table, torch.zeros_like(table[:1])])  # K+1 C
    if target < max(len(classes), 1):
        raise ConfigError(f"the data has {len(classes)} classes, objective.model_overrides.num_classes is {target}")
    own = list(classes) if telling(classes) else []
    known = {v.casefold(): k for k, v in (names or {}).items()} if telling((names or {}).values()) else {}
    by_name = bool(own and known)
    origin: list[int | None] = []
    for i in range(target):
        row = known.get(own[i].casefold()) if by_name and i < len(own) else None
        if row is None and target == before and (not by_name or i >= len(own)):
            row = i
        origin.append(row)
    fresh = torch.cat([others, rows[[before if row is None else row for row in [*origin, None]]]])
    fresh = fresh if null_row else fresh[:-1]
    embedding = nn.Embedding(len(fresh), fresh.shape[1], device="meta")
    embedding.weight = nn.Parameter(fresh)
    model.set_submodule(name, embedding)
    model.num_classes = target
    model.register_to_config(num_classes=target)
    new = origin.count(None)
    model.full_rate = (f"{name}.weight",) if new else ()
    kept = f"{target - new} rows kept by {'name' if by_name else 'number'}"
    return f"class embedding: {before} -> {target} classes; {kept}, {new} new" + (" (as the null class)" if new else "")


# ---- what is trained of it ------------------------------------------------------------------------------------------


def prepare(model: Any, plan: FinetuneConfig) -> list[str]:
    """Freeze what `plan.freeze` names and add `plan.lora`, in place.

    Returns: lines for the log.
    Raises: ConfigError on a pattern that matches nothing, or when nothing is left to train.
    """
    model.train().requires_grad_(True)
    lines = freeze(model, plan.freeze)
    if plan.lora is not None:
        new = getattr(model, "full_rate", ())  # fresh rows know nothing yet: trained beside the adapter
        lines = [add_adapter(model, plan.lora, new), trained_share(model)]
    return lines


def trained_share(model: nn.Module) -> str:
    count = sum(p.numel() for p in model.parameters())
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    return f"{trained:,} of {count:,} parameters are trained ({trained / count:.1%})"


def freeze(model: nn.Module, patterns: Sequence[str]) -> list[str]:
    """Switch the gradient off of parameters whose names match one of `patterns` (`fnmatch`, * crosses dots).

    Returns: what is left to train, for the log; nothing without patterns.
    Raises: ConfigError naming near names when a pattern matches nothing, or when nothing is left to train.
    """
    parameters = dict(model.named_parameters())
    for pattern in patterns:
        found = fnmatch.filter(parameters, pattern)
        if not found:
            close = near_names(pattern, parameters)
            raise ConfigError(
                f"objective.freeze: {pattern!r} matches no parameter; "
                + (f"near it: {', '.join(close)}" if close else f"names are such as {', '.join(list(parameters)[:3])}")
            )
        for name in found:
            parameters[name].requires_grad_(False)
    if patterns and not any(p.requires_grad for p in parameters.values()):
        raise ConfigError(f"objective.freeze={list(patterns)} freezes every parameter; leave something to train")
    return [trained_share(model)] if patterns else []


def near_names(pattern: str, names: Iterable[str], count: int = 3) -> list[str]:
    """Names most like a pattern, of those with the same leading part where there are any."""
    bare = pattern.replace("*", "").replace("?", "").strip(".")
    whole = list(names)
    return (
        difflib.get_close_matches(bare, whole, n=count, cutoff=0.4)
        or [n for n in whole if n.startswith(bare.split(".")[0]) and bare][:count]
    )


def layer_scales(module: nn.Module, decay: float) -> dict[str, float]:
    """Parameter name -> factor of the learning rate: `decay` to the power of the distance from the top.

    Depth 0 is what is made before the blocks (embeddings), k the k-th block, and the top, factor 1, what comes after
    them (head) and what is not the generator's at all. New rows of the class embedding learn at factor 1 too, with the
    rest of their table: what is new has the farthest to go.

    Raises: ConfigError when `module` has no blocks.
    """
    prefix = "" if hasattr(module, "blocks") else "model."
    network: Any = module if hasattr(module, "blocks") else getattr(module, "model", None)
    if not hasattr(network, "blocks"):
        raise ConfigError(f"optim.layer_decay is for networks with a list of blocks; {type(module).__name__} has none")
    top, depth, scales = len(network.blocks) + 1, 0, dict[str, float]()
    full = {prefix + name for name in getattr(network, "full_rate", ())}
    layers = next(name for name, part in network.named_children() if part is network.blocks) + "."
    for name, _ in module.named_parameters():
        part = name.removeprefix(prefix)
        if not name.startswith(prefix):
            depth = top
        elif part.startswith(layers):
            depth = int(part.split(".")[1]) + 1
        elif depth > 0:
            depth = top
        scales[name] = decay ** (top - depth) if name not in full else 1.0
    return scales
