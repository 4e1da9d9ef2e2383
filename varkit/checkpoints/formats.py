"""What a released file can be: one `OfficialFormat` a kind, one key-map file a release.

A key-map file beside this one ends with `register_format(...)`; `files.py` and `varkit convert` know no release by
name.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from pkgutil import iter_modules
from typing import Any

from torch import Tensor

StateDict = dict[str, Tensor]


def _no_settings(path: Path) -> dict[str, Any]:
    return {}


def _unchanged(state: StateDict, model: Any) -> StateDict:
    return dict(state)


@dataclass(frozen=True)
class Release:
    """Where files come from. licence: of the weights; spdx: as the hub writes it (`other` where it has no name)."""

    repository: str  # on GitHub
    paper: str
    licence: str
    spdx: str


@dataclass(frozen=True)
class OfficialFormat:
    """One kind of released file and the class that it becomes.

    Args:
        name: for people, as in "VAR transformer".
        sign: the key that tells it, as an error shows it.
        model: the class, as "module:Name"; imported when first needed.
        is_it: whether a state dict is of this kind, from its keys.
        arguments: constructor arguments from keys and shapes alone.
        settings: further constructor arguments, written in the file or beside it: they win over those of the shapes,
            a mapping argument entry by entry.
        from_official, to_official: state dict and model -> state dict, in both directions.
        wrapped: what a `.pth` file of the release holds around the state dict.
        sampling: settings of the generator's sampler that the release recommends, for all sizes or by model; empty for
            tokenizers.
        condition: of generators, what it is conditioned on, where one class serves several.
        control: of generators, whether it has a network for control images.
    """

    name: str
    sign: str
    model: str
    is_it: Callable[[Mapping[str, Tensor]], bool]
    arguments: Callable[[Mapping[str, Tensor]], dict[str, Any]]
    release: Release
    from_official: Callable[[StateDict, Any], StateDict] = _unchanged
    to_official: Callable[[StateDict, Any], StateDict] = _unchanged
    wrapped: Callable[[StateDict], dict[str, Any]] = dict
    sampling: Mapping[str, Any] | Callable[[Any], Mapping[str, Any]] = field(default_factory=dict)
    condition: str | None = None
    control: bool = False
    settings: Callable[[Path], dict[str, Any]] = _no_settings

    def model_class(self) -> Any:
        module, _, name = self.model.partition(":")
        return getattr(import_module(module), name)

    def sampling_for(self, model: Any) -> dict[str, Any]:
        """What the release recommends for this model."""
        return dict(self.sampling(model) if callable(self.sampling) else self.sampling)


_formats: dict[str, OfficialFormat] = {}


def register_format(entry: OfficialFormat) -> None:
    _formats[entry.name] = entry


def formats() -> list[OfficialFormat]:
    """All kinds of released files that varkit reads."""
    for module in iter_modules(import_module("varkit.checkpoints").__path__, "varkit.checkpoints."):
        if module.name.rpartition(".")[2] not in ("convert", "files", "formats"):
            import_module(module.name)
    return list(_formats.values())


def format_of_state(state: Mapping[str, Tensor], what: str) -> OfficialFormat:
    """Raises ValueError listing what is known when no format, or more than one, answers to the keys."""
    found = [f for f in formats() if f.is_it(state)]
    if len(found) == 1:
        return found[0]
    if found:
        raise ValueError(f"{what} could be any of {', '.join(f.name for f in found)}: its keys fit all of them")
    known = ", ".join(f"{f.name} ({f.sign})" for f in formats())
    raise ValueError(
        f"{what} is no file that varkit knows; known: {known}. Its first keys: {', '.join(list(state)[:5])}"
    )


def format_of_model(model: Any) -> OfficialFormat:
    """Raises ValueError when no released file has the model's class."""
    for entry in formats():
        fits = entry.condition in (None, getattr(model, "condition", None))
        fits = fits and entry.control == ("control" in getattr(model, "takes", ()))
        if type(model) is entry.model_class() and fits:
            return entry
    raise ValueError(
        f"no official file exists for a {type(model).__name__}; official files exist for "
        f"{', '.join(sorted({f.model.partition(':')[2] for f in formats()}))}"
    )
