"""A report as one HTML file: it opens without a server and without a network, in light and dark, and prints.

The page is `report.html.jinja`; the charts are those of `charts.py`.
"""

from __future__ import annotations

import base64
import io
import math
import os
from collections.abc import Iterator, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any, NamedTuple

from PIL import Image

from varkit.metrics.charts import (
    SERIES,
    STYLE,
    curves,
    guidance,
    known,
    need_matplotlib,
    precision_recall,
    shares,
)
from varkit.metrics.report import Report, Result, Score, number

PICTURE_SIZE = (1024, 640)
"""Small pictures are enlarged by a whole factor to at most this width and height, in CSS pixels."""

DASH, TIMES, INFINITY = "\N{EN DASH}", "\N{MULTIPLICATION SIGN}", "\N{INFINITY}"


class Cell(NamedTuple):
    """Of the table of scores. missing: why there is no value."""

    text: str = ""
    interval: str = ""
    best: bool = False
    missing: str = ""


class Column(NamedTuple):
    """One score of all results. how: line -> the results it holds for, empty where it holds for all."""

    title: str
    better: str
    how: dict[str, str]
    cells: list[Cell]

    @property
    def incomplete(self) -> bool:
        return any(cell.missing for cell in self.cells)


def write_html(report: Report, path: str | Path) -> None:
    """The page as a file, atomically. Raises: ImportError without matplotlib."""
    text, path = html(report), Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.part")
    part.write_text(text, encoding="utf-8")
    os.replace(part, path)


def html(report: Report) -> str:
    """The page. The same report gives the same text.

    Raises: ImportError without matplotlib (the extra `eval`).
    """
    matplotlib = need_matplotlib()
    from jinja2 import Environment, StrictUndefined

    page = Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=StrictUndefined)
    page.filters |= {"facts": facts, "show": show, "entry": entry, "numeric": numeric, "png": png, "factor": factor}
    source = files("varkit.metrics").joinpath("report.html.jinja").read_text(encoding="utf-8")
    with matplotlib.rc_context():
        matplotlib.rcdefaults()  # whatever the user's own style is
        matplotlib.rcParams.update(STYLE)
        charts = [*precision_recall(report), *curves(report), *guidance(report)]
        classes = [r.per_class and shares(r.per_class, f"classes-{i}") for i, r in enumerate(report.results)]
    interval = report.protocol.get("interval") or {}
    same, differing = made(report.results)
    return (
        page.from_string(source)
        .render(
            report=report,
            columns=columns(report.results),
            charts=charts,
            classes=classes,
            interval=interval,
            same=same,
            differing=differing,
            series=SERIES,
        )
        .lstrip()
    )


# Values as text


def missing(value: Any) -> bool:
    return value is None or (isinstance(value, float) and math.isnan(value))


def show(value: Any) -> str:
    """A setting or an entry of a table; empty for what the page shows as a dash."""
    if missing(value):
        return ""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:.10g}".replace("inf", INFINITY)
    if isinstance(value, list | tuple):
        return ", ".join(show(v) or DASH for v in value)
    if isinstance(value, dict):
        return ", ".join(f"{k}: {show(v) or DASH}" for k, v in value.items())
    return str(value)


def entry(value: Any) -> str:
    """An entry of a table: real numbers as scores are printed."""
    return number(value) if isinstance(value, float) and math.isfinite(value) else show(value)


def facts(mapping: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    """Names and texts, those of nested settings with a dot: `interval.level`."""
    for key, value in mapping.items():
        if isinstance(value, dict) and value:
            yield from facts(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", show(value)


def numeric(rows: Sequence[dict[str, Any]], key: str) -> bool:
    """Whether a column of a table is of numbers."""
    return all(isinstance(r.get(key), int | float | None) and not isinstance(r.get(key), bool) for r in rows)


def made(results: Sequence[Result]) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """How the results were made: what all share, and for each its number in the table, its name and the rest."""
    each = [
        {"source": r.source, "num": r.num, "size": TIMES.join(map(str, r.size)), **dict(facts(r.settings))}
        for r in results
    ]
    names = list(dict.fromkeys(name for entries in each for name in entries))
    same = {n: each[0][n] for n in names if all(n in e and e[n] == each[0][n] for e in each)}
    rest = [{"result": f"{i + 1} {r.name}", **{n: e.get(n, "") for n in names if n not in same}}
            for i, (r, e) in enumerate(zip(results, each, strict=True))]  # fmt: skip
    return same, rest


def columns(results: Sequence[Result]) -> list[Column]:
    """The table of scores, in the order in which results bring them."""
    keys = dict.fromkeys((s.name, s.title) for result in results for s in result.scores)
    return [column([next((s for s in r.scores if (s.name, s.title) == key), None) for r in results], results)
            for key in keys]  # fmt: skip


def column(scores: Sequence[Score | None], results: Sequence[Result]) -> Column:
    first = next(s for s in scores if s is not None)
    rows = zip(scores, results, strict=True)
    values = [s.value for s, r in rows if s is not None and not missing(s.value) and not r.bound]
    best = {"lower": min, "higher": max}[first.better](values) if first.better and len(values) > 1 else None
    cells, holds = [], dict[str, list[str]]()
    for score, result in zip(scores, results, strict=True):
        if score is None:
            cells.append(Cell(missing="not measured for this result"))
            continue
        if score.how:
            holds.setdefault(score.how, []).append(result.name)
        if missing(score.value):
            cells.append(Cell(missing="no number came out"))
            continue
        ends = score.text().partition(" ")[2] if known(score.low) and known(score.high) else ""
        cells.append(Cell(number(score.value).replace("inf", INFINITY), ends, score.value == best and not result.bound))
    how = {line: "" if len(holds) == 1 else ", ".join(names) for line, names in holds.items()}
    return Column(first.title, first.better, how, cells)


# Pictures


def png(image: Image.Image) -> str:
    """As a data URI."""
    if image.mode not in ("1", "L", "LA", "P", "RGB", "RGBA"):
        image = image.convert("RGB")
    buffer = io.BytesIO()
    image.save(buffer, format="PNG")
    return f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}"


def factor(image: Image.Image) -> int:
    """How many times a picture is enlarged to be seen well."""
    return max(1, min(most // side for most, side in zip(PICTURE_SIZE, image.size, strict=True)))
