"""What an evaluation found, with everything a number depends on; and which two reports may be compared.

A report is plain data: JSON holds all of it but the pictures, which only the HTML page carries (`varkit.metrics.html`).
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Self, SupportsFloat

from PIL import Image

FORMAT = 1
"""Version of the JSON; one that is not known is refused."""


@dataclass(frozen=True)
class Score:
    """One number.

    name: `fid`, `precision`, ...; the same in every report.   title: as printed; `FD(classifier)` where the network is
    not the one the usual name stands for.   low, high: ends of the interval, or None.   better: which way is good.
    how: what else the number depends on, in a line.
    """

    name: str
    title: str
    value: float
    low: float | None = None
    high: float | None = None
    better: Literal["lower", "higher", ""] = ""
    how: str = ""

    def text(self) -> str:
        """`3.551 [3.512, 3.590]`."""
        ends = "" if self.low is None or self.high is None else f" [{number(self.low)}, {number(self.high)}]"
        return number(self.value) + ends


@dataclass(frozen=True)
class Curve:
    """A score against something: the number of samples, the tokens of a reconstruction.

    at, values: as many of each.   limit: where the values go to, if that is known.
    """

    title: str
    x_title: str
    at: list[float]
    values: list[float]
    limit: float | None = None


@dataclass(frozen=True)
class PerClass:
    """A share for every class; NaN (None in JSON) where a class has no images."""

    title: str
    names: list[str]
    values: list[float]
    counts: list[int]


@dataclass
class Result:
    """The scores of one set of images or videos, or of one setting of a model.

    size: (H, W), or (T, H, W).   settings: how the set was made, where that is known.
    tables: title -> rows of equal keys, such as the use of a codebook, scale by scale.
    pictures: title -> picture, for the HTML page.
    bound: not to be beaten but to be measured by: real images, reconstructions.
    """

    name: str
    source: str
    num: int
    size: tuple[int, ...]
    settings: dict[str, Any] = field(default_factory=dict)
    scores: list[Score] = field(default_factory=list)
    curves: list[Curve] = field(default_factory=list)
    per_class: PerClass | None = None
    tables: dict[str, list[dict[str, Any]]] = field(default_factory=dict)
    pictures: dict[str, Image.Image] = field(default_factory=dict)
    bound: bool = False

    def score(self, name: str) -> Score:
        """Raises KeyError naming the scores there are."""
        for score in self.scores:
            if score.name == name:
                return score
        raise KeyError(f"no score {name!r}; there are {', '.join(s.name for s in self.scores)}")


@dataclass
class Report:
    """Results under one protocol, against one reference.

    protocol: every setting by name, as `Protocol.to_dict` gives them.
    networks: name -> what it is and the hash of its weights.
    reference: source, kind, num and the hash of its content.
    environment: versions, device, date; it does not decide whether reports compare.
    warnings: what a reader should know.
    """

    protocol: dict[str, Any]
    networks: dict[str, dict[str, Any]]
    reference: dict[str, Any]
    results: list[Result]
    environment: dict[str, Any] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)

    @property
    def fingerprint(self) -> str:
        """16 hex digits; equal where every number was obtained in the same way."""
        text = json.dumps(_finite(self._basis()), sort_keys=True)
        return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()

    def _basis(self) -> dict[str, Any]:
        reference = {k: v for k, v in self.reference.items() if k in ("num", "hash")}
        return {"protocol": self.protocol, "networks": self.networks, "reference": reference}

    def to_dict(self) -> dict[str, Any]:
        """Plain data that JSON holds."""
        data = {"format": FORMAT, "fingerprint": self.fingerprint}
        data |= {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.name != "results"}
        data["results"] = [
            {f.name: _plain(getattr(result, f.name)) for f in dataclasses.fields(result) if f.name != "pictures"}
            for result in self.results
        ]
        return _finite(data)

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Self:
        """Raises: ValueError for something that is no report of this format, or whose protocol was changed since."""
        if not isinstance(data, dict) or data.get("format") != FORMAT or not isinstance(data.get("protocol"), dict):
            raise ValueError(f"no evaluation report of format {FORMAT}, as `varkit eval --out` writes it")
        results = []
        for entry in data["results"]:
            per_class = entry.get("per_class")
            if per_class is not None:
                per_class = PerClass(**{**per_class, "values": [_number(v) for v in per_class["values"]]})
            scores = [Score(**{**s, "value": _number(s["value"])}) for s in entry["scores"]]
            curves = [Curve(**{**c, "values": [_number(v) for v in c["values"]]}) for c in entry["curves"]]
            changed = {"size": tuple(entry["size"]), "scores": scores, "curves": curves, "per_class": per_class}
            results.append(Result(**{**entry, **changed}))
        known = {f.name for f in dataclasses.fields(cls)}
        report = cls(**{**{k: v for k, v in data.items() if k in known}, "results": results})
        if report.fingerprint != data.get("fingerprint", report.fingerprint):
            raise ValueError("its protocol, networks or reference were changed after it was written")
        return report

    def write(self, path: str | Path) -> None:
        """As JSON, atomically."""
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_name(f".{path.name}.part")
        part.write_text(json.dumps(self.to_dict(), indent=1) + "\n", encoding="utf-8")
        os.replace(part, path)

    @classmethod
    def read(cls, path: str | Path) -> Self:
        """Raises: FileNotFoundError; ValueError, naming the file, where it is no report."""
        try:
            return cls.from_dict(json.loads(Path(path).read_text(encoding="utf-8")))
        except KeyError as error:
            raise ValueError(f"{path} is no whole report: {error} is missing") from None
        except (ValueError, TypeError, AttributeError) as error:
            raise ValueError(f"{path}: {error}") from None

    def lines(self) -> list[str]:
        """For a terminal: the numbers, and under them what they depend on."""
        rows = []
        for result in self.results:
            rows.append(f"{result.name}: {result.num} of {'x'.join(map(str, result.size))}")
            width = max((len(s.title) for s in result.scores), default=0)
            scored = [f"  {s.title:<{width}}  {s.text():<28} {s.how}".rstrip() for s in result.scores]
            rows += scored
            for title, table in result.tables.items():
                rows.append(f"  {title}:")
                rows += ["    " + "  ".join(f"{k} {_cell(v)}" for k, v in row.items()) for row in table]
        name, interval = self.protocol.get("name", "?"), self.protocol.get("interval") or {}
        rows.append(f"protocol {name} (fingerprint {self.fingerprint}): {self.protocol.get('summary', '')}")
        rows += [f"network {name}: {facts.get('what', '')}" for name, facts in self.networks.items()]
        rows.append(
            f"reference {self.reference.get('source')}: {self.reference.get('num')} ({self.reference.get('kind')})"
        )
        if interval:
            rows.append(f"[ ]: {interval['level']:.0%} intervals, {interval['resamples']} bootstrap resamples of the "
                        "images scored; the reference is held fixed")  # fmt: skip
        return rows + [f"warning: {w}" for w in self.warnings]


def join(reports: Sequence[Report]) -> Report:
    """All results in one report.

    Raises: ValueError for none, and for reports that were not obtained in the same way, saying what differs.
    """
    if not reports:
        raise ValueError("there is no report to compare")
    first = reports[0]
    for other in reports[1:]:
        if other.fingerprint != first.fingerprint:
            found = "; ".join(differences(first._basis(), other._basis())[:6])
            raise ValueError(f"these reports do not compare: {found}. Score both sets under one protocol.")
    warnings = list(dict.fromkeys(w for report in reports for w in report.warnings))
    keys = dict.fromkeys(k for report in reports for k in report.environment)
    seen = {k: list(dict.fromkeys(str(report.environment.get(k, "?")) for report in reports)) for k in keys}
    environment = {k: ", ".join(values) for k, values in seen.items()}
    results = [result for report in reports for result in report.results]
    return dataclasses.replace(first, results=results, warnings=warnings, environment=environment)


def differences(first: Any, second: Any, where: str = "") -> list[str]:
    """`protocol.num is 50000 and 10000`, for each leaf that differs."""
    first, second = _finite(first), _finite(second)
    if isinstance(first, dict) and isinstance(second, dict):
        found = []
        for key in dict.fromkeys([*first, *second]):
            name = f"{where}.{key}" if where else str(key)
            if key in first and key in second:
                found += differences(first[key], second[key], name)
            else:
                there = first if key in first else second
                found.append(f"{name} is {there[key]} in one of them only")
        return found
    return [] if first == second else [f"{where} is {first} and {second}"]


def number(value: float) -> str:
    """Four significant digits; an exponent only below a hundred thousandth."""
    if not math.isfinite(value):
        return str(float(value))
    if 0 < abs(value) < 1e-5:
        return f"{value:.3e}"
    digits = 3 if value == 0 else max(0, 3 - math.floor(math.log10(abs(float(f"{value:.4g}")))))
    return f"{value:.{digits}f}"


def _cell(value: Any) -> str:
    if value is None:
        return "-"
    return number(value) if isinstance(value, float) else str(value)


def _plain(value: Any) -> Any:
    if isinstance(value, list):
        return [_plain(v) for v in value]
    return dataclasses.asdict(value) if dataclasses.is_dataclass(value) and not isinstance(value, type) else value


def _finite(value: Any) -> Any:
    """What JSON holds: lists for tuples, None for NaN, `inf` and `-inf` as words, text for paths."""
    if isinstance(value, dict):
        return {str(k): _finite(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(v) for v in value]
    if isinstance(value, (bool, str, int, type(None))):
        return value
    if isinstance(value, SupportsFloat):
        value = float(value)
        return value if math.isfinite(value) else None if math.isnan(value) else str(value)
    return str(value)


def _number(value: Any) -> float:
    return math.nan if value is None else float(value)
