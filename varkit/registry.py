"""One flat name space: `var_d16` is a builder, `var_d16.in1k_256` a checkpoint. Plug-ins join by entry point.

A model file registers its builders where they are defined; a package outside varkit names its module in
the entry-point group `varkit.models` and is imported when the registry is first read.
"""

from __future__ import annotations

import fnmatch
import logging
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from importlib import import_module
from importlib.metadata import entry_points
from pkgutil import iter_modules
from typing import Any, Literal

from varkit.config import nearest

logger = logging.getLogger(__name__)

Kind = Literal["generator", "student", "tokenizer", "drafter"]

_PACKAGES = ("varkit.tokenizers", "varkit.generators")
ENTRY_POINT_GROUP = "varkit.models"


@dataclass(frozen=True)
class ModelEntry:
    """A builder and how it is tested.

    Args:
        build: called with overrides of the constructor arguments; returns the network.
        tokenizer: for a generator or a student, the tokenizer builder it is paired with.
        tiny: overrides that make it small enough for a test of a second.
        tiny_tokenizer: overrides of the paired tokenizer that fit `tiny`.
    """

    name: str
    kind: Kind
    build: Callable[..., Any]
    summary: str
    tokenizer: str | None = None
    tiny: Mapping[str, Any] = field(default_factory=dict)
    tiny_tokenizer: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Checkpoint:
    """A released file: where it is, what it is, what it scored and how it is sampled."""

    name: str  # builder.tag
    repo_id: str
    filename: str
    licence: str
    paper: str
    resolution: int
    official_score: str
    tokenizer: str | None = None  # the checkpoint its images are decoded with
    overrides: Mapping[str, Any] = field(default_factory=dict)
    sampling: Mapping[str, Any] = field(default_factory=dict)

    @property
    def builder(self) -> str:
        return self.name.split(".")[0]


_models: dict[str, ModelEntry] = {}
_checkpoints: dict[str, Checkpoint] = {}
_loaded: set[str] = set()


def register_model(entry: ModelEntry) -> None:
    """Add a builder. Registering a name twice replaces it and warns."""
    if entry.name in _models and _models[entry.name].build is not entry.build:
        logger.warning("model %r was registered twice; the later one counts", entry.name)
    _models[entry.name] = entry


def register_checkpoint(card: Checkpoint) -> None:
    _checkpoints[card.name] = card


def _load() -> None:
    for package in _PACKAGES:
        if package not in _loaded:
            for module in iter_modules(import_module(package).__path__, package + "."):
                import_module(module.name)
            _loaded.add(package)
    for point in entry_points(group=ENTRY_POINT_GROUP):
        if point.value not in _loaded:
            _loaded.add(point.value)
            try:
                point.load()
            except Exception as error:  # a broken plug-in must not take varkit down with it
                logger.warning("plug-in %s (%s) could not be imported: %s", point.name, point.value, error)


def list_models(pattern: str = "*", kind: Kind | None = None) -> list[str]:
    """Names of registered builders that match a shell pattern, sorted."""
    _load()
    return sorted(n for n, e in _models.items() if fnmatch.fnmatch(n, pattern) and kind in (None, e.kind))


def list_checkpoints(pattern: str = "*") -> list[str]:
    """Names of known released files that match a shell pattern, sorted."""
    _load()
    return sorted(n for n in _checkpoints if fnmatch.fnmatch(n, pattern))


def model_entry(name: str) -> ModelEntry:
    """Raises ValueError naming the nearest builder when `name` is none."""
    _load()
    if name not in _models:
        raise ValueError(f"no model is called {name!r}{nearest(name, _models)}; `varkit list` shows all of them")
    return _models[name]


def checkpoint(name: str) -> Checkpoint:
    """Raises ValueError naming the nearest checkpoint when `name` is none."""
    _load()
    if name not in _checkpoints:
        raise ValueError(
            f"no checkpoint is called {name!r}{nearest(name, _checkpoints)}; `varkit list` shows all of them"
        )
    return _checkpoints[name]


def create_model(name: str, **overrides: Any) -> Any:
    """Build a registered network with fresh weights; `overrides` replace constructor arguments."""
    return model_entry(name).build(**overrides)


def model_class(name: str) -> Any:
    """The class of that name, as a folder's config.json writes it, in any module that registers a model.

    Raises: ValueError naming the classes that there are.
    """
    _load()
    modules = {sys.modules[m] for m in {e.build.__module__ for e in _models.values()} if m in sys.modules}
    found = {
        n: c
        for module in modules
        for n, c in vars(module).items()
        if isinstance(c, type) and c.__module__ == module.__name__ and hasattr(c, "from_pretrained")
    }
    if name not in found:
        raise ValueError(f"varkit has no model class {name!r}{nearest(name, found)}; it has {', '.join(sorted(found))}")
    return found[name]
