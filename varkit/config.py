"""Configuration: dataclass <- YAML <- `key=value`, with errors that name the key and the nearest valid one."""

from __future__ import annotations

import dataclasses
import difflib
import types
import typing
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, TypeVar, dataclass_transform

import yaml

T = TypeVar("T")


class ConfigError(ValueError):
    """A configuration that cannot be used; the message says which key, what was given, what is allowed."""


@dataclass_transform(frozen_default=True, kw_only_default=True)
def config(cls: type[T]) -> type[T]:
    """Make `cls` a frozen, keyword-only dataclass that refuses unknown keys."""
    cls.__pydantic_config__ = {"extra": "forbid"}  # type: ignore[attr-defined]
    return dataclasses.dataclass(frozen=True, kw_only=True)(cls)


def build(cls: type[T], values: Mapping[str, Any], *, source: str = "", prefix: str = "") -> T:
    """Validate `values` into an instance of the config dataclass `cls`.

    Args:
        values: nested plain data. Text such as `2e-4` (what YAML 1.1 reads) becomes a float.
        source: named in errors (a file).   prefix: prepended to key names in errors.
    Raises: ConfigError naming every bad key, what it got, what it takes, and the nearest valid key.
    """
    from pydantic import TypeAdapter, ValidationError

    try:
        return TypeAdapter(cls).validate_python(_words(cls, values))
    except ValidationError as error:
        lines = [_explain(cls, e, prefix) for e in error.errors()]
    except (ValueError, TypeError) as error:
        lines = [str(error)]
    where = f" in {source}" if source else ""
    raise ConfigError(f"bad configuration{where}:\n" + "\n".join(f"  {line}" for line in dict.fromkeys(lines)))


def load_yaml(path: Path) -> dict[str, Any]:
    """A YAML mapping. Raises ConfigError when the file is missing, is not YAML or is no mapping."""
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(f"no such file: {path}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} cannot be read: {error}") from None
    except yaml.YAMLError as error:
        raise ConfigError(f"{path} is not valid YAML: {error}") from None
    if not isinstance(values, dict):
        raise ConfigError(f"{path} must hold a mapping of keys to values; got {type(values).__name__}")
    return values


def override(values: dict[str, Any], assignments: Iterable[str]) -> dict[str, Any]:
    """A copy of `values` with `a.b=c` assignments applied; c is read as YAML (`[1, 2]`, `true`, `2e-4`)."""
    result = _copy(values)
    for text in assignments:
        key, equals, value = text.partition("=")
        if not equals or not key:
            raise ConfigError(f"{text!r} is not key=value; write for instance optim.lr=2e-4")
        node = result
        *parents, leaf = key.split(".")
        for parent in parents:
            node = node.setdefault(parent, {})
            if not isinstance(node, dict):
                raise ConfigError(f"{key}: {parent} is a value, not a section")
        try:
            node[leaf] = yaml.safe_load(value) if value else ""
        except yaml.YAMLError as error:
            raise ConfigError(f"{key}: {value!r} cannot be read: {error}") from None
    return result


def to_dict(instance: Any) -> dict[str, Any]:
    """A config instance as plain nested data that `yaml.safe_dump` and JSON take."""

    def plain(value: Any) -> Any:
        if dataclasses.is_dataclass(value) and not isinstance(value, type):
            return {f.name: plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
        if isinstance(value, Mapping):
            return {str(k): plain(v) for k, v in value.items()}
        if isinstance(value, (list, tuple)):
            return [plain(v) for v in value]
        return str(value) if isinstance(value, Path) else value

    return plain(instance)


def nearest(word: str, choices: Iterable[str]) -> str:
    """` (did you mean 'x'?)`, or nothing when no choice is close."""
    close = difflib.get_close_matches(word, list(choices), n=1, cutoff=0.5)
    return f" (did you mean {close[0]!r}?)" if close else ""


def _copy(values: dict[str, Any]) -> dict[str, Any]:
    return {k: _copy(v) if isinstance(v, dict) else v for k, v in values.items()}


def _fields(cls: Any) -> dict[str, Any]:
    """Field name -> type of a dataclass, looking through Optional; empty for anything else."""
    if typing.get_origin(cls) in (typing.Union, types.UnionType):
        cls = next((a for a in typing.get_args(cls) if dataclasses.is_dataclass(a)), None)
    if not dataclasses.is_dataclass(cls):
        return {}
    hints = typing.get_type_hints(cls)
    return {f.name: hints[f.name] for f in dataclasses.fields(cls)}


def _words(cls: Any, values: Mapping[str, Any]) -> dict[str, Any]:
    """`values`, with the word `no`, which YAML 1.1 reads as false, given back to fields that take the word."""
    fields = _fields(cls)
    result = dict(values)
    for key, value in values.items():
        if value is False and "no" in typing.get_args(fields.get(key)):
            result[key] = "no"
        elif isinstance(value, Mapping):
            result[key] = _words(fields.get(key), value)
    return result


def _explain(cls: type, error: Any, prefix: str) -> str:
    location = [str(part) for part in error["loc"]]
    key = (prefix + ".".join(location)).rstrip(".")
    if error["type"] in ("unexpected_keyword_argument", "extra_forbidden"):
        for part in location[:-1]:
            cls = _fields(cls).get(part, cls)
        valid = sorted(_fields(cls))
        return f"unknown key {key}{nearest(location[-1], valid)}; valid keys here: {', '.join(valid)}"
    if error["type"] in ("missing", "missing_argument", "missing_keyword_only_argument"):
        return f"{key} is required"
    own = error.get("ctx", {}).get("error")
    if isinstance(own, ConfigError):  # from a __post_init__: it names key and value itself
        return str(own) if str(own).startswith(key) else f"{key}: {own}"
    message = error["msg"].removeprefix("Value error, ")
    message = message[:1].lower() + message[1:]
    return f"{key}: {message}; got {error['input']!r}" if key else message
