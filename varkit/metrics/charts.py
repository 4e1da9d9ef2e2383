"""The charts of an HTML report, drawn by matplotlib as SVG that becomes part of the page.

Colours are stand-ins, replaced by names (`var(--ink)`) which the style sheet of the page gives a value for light, for
dark and for paper. Results are told apart by a badge with their number, so that long names never enter a chart.
"""

from __future__ import annotations

import io
import math
import re
import textwrap
from collections.abc import Iterator, Sequence
from statistics import fmean
from typing import Any, NamedTuple, TypeGuard
from xml.etree import ElementTree

from varkit.metrics.report import PerClass, Report, Score, number

SERIES = 6
"""Colours; the seventh result has the first one again. Badges with the number of the result tell them apart."""

MANY_CLASSES, SHOWN = 60, 20
"""Above so many classes only so many of the worst and of the best are shown, and a histogram of all."""

DASHED = (0, (4, 2))
INK, MUTED, LINE, PAPER = "#000011", "#000012", "#000013", "#000014"
NAMES = {INK: "ink", MUTED: "muted", LINE: "line", PAPER: "paper"}
NAMES |= {f"#0000{i + 1:02x}": f"series-{i + 1}" for i in range(SERIES)}

STYLE = {
    "svg.fonttype": "none",  # text stays text
    "text.parse_math": False,
    "axes.formatter.useoffset": False,
    "font.size": 8,
    "text.color": INK,
    "axes.labelcolor": MUTED,
    "xtick.labelcolor": MUTED,
    "ytick.labelcolor": MUTED,
    "xtick.color": LINE,
    "ytick.color": LINE,
    "axes.edgecolor": LINE,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": LINE,
    "grid.linewidth": 0.6,
    "lines.linewidth": 1.4,
}


class Chart(NamedTuple):
    """svg: markup that is safe to insert."""

    title: str
    svg: str
    note: str = ""


class Shares(NamedTuple):
    """The classes of a result. groups: heading -> rows of name, share in [0, 1] and count."""

    title: str
    summary: str
    groups: dict[str, list[tuple[str, float, int]]]
    chart: Chart | None


def need_matplotlib() -> Any:
    try:
        import matplotlib
    except ImportError as error:
        raise ImportError(f'the charts of a report need matplotlib: pip install "varkit[eval]" ({error})') from None
    return matplotlib


def known(value: float | None) -> TypeGuard[float]:
    return value is not None and math.isfinite(value)


def precision_recall(report: Report) -> Iterator[Chart]:
    """Recall across, precision up: a point a result that has both."""
    points = [(i, r.score("recall"), r.score("precision")) for i, r in enumerate(report.results)
              if {"recall", "precision"} <= {s.name for s in r.scores if known(s.value)}]  # fmt: skip
    if not points:
        return
    several = len(report.results) > 1
    figure, axes = new_chart(f"{points[0][1].title} →", f"{points[0][2].title} →")
    for i, recall, precision in points:
        x, y = recall.value, precision.value
        whisker(axes, i, [recall.low, recall.high], [y, y])
        whisker(axes, i, [x, x], [precision.low, precision.high])
        badge(axes, x, y, i, several)
    for low, high, limit in ((*axes.get_xlim(), axes.set_xlim), (*axes.get_ylim(), axes.set_ylim)):
        room = max(0.0, 0.06 - (high - low)) / 2 + 0.05 * (high - low)
        limit(low - room, high + room)
    said = [f"{report.results[i].name}: recall {r.text()}, precision {p.text()}" for i, r, p in points]
    title = f"{points[0][2].title} and {points[0][1].title}"
    title = title[:1].upper() + title[1:]
    yield Chart(title, svg(figure, "precision-recall", title, said), "Up and to the right is better.")


def curves(report: Report) -> Iterator[Chart]:
    """One chart a title, of all results that have the curve."""
    groups = dict[tuple[str, str], list[tuple[int, list[tuple[float, float]], float | None]]]()
    for i, result in enumerate(report.results):
        for curve in result.curves:
            points = [(x, y) for x, y in zip(curve.at, curve.values, strict=True) if known(x) and known(y)]
            if points:
                groups.setdefault((curve.title, curve.x_title), []).append((i, points, curve.limit))
    for count, ((title, x_title), lines) in enumerate(groups.items()):
        figure, axes = new_chart(x_title)
        said, limits = [], False
        for i, points, limit in lines:
            axes.plot(*zip(*points, strict=True), "os^D"[i // SERIES % 4], ls="-", color=colour(i), markersize=3.5)
            if known(limit):
                axes.axhline(limit, 0 if len(lines) <= 4 else 0.9, color=colour(i), linewidth=1, linestyle=DASHED)
                limits = True
            values = ", ".join(f"{number(y)} at {x:g}" for x, y in points)
            said.append(f"{report.results[i].name}: {values}" + (f"; limit {number(limit)}" if known(limit) else ""))
        mark_x(axes, sorted({x for _, points, _ in lines for x, _ in points}))
        if len(report.results) > 1:
            mark_ends(axes, [(i, points[-1][1]) for i, points, _ in lines])
        note = "Dashed: the value that the curve goes to." if limits else ""
        yield Chart(title, svg(figure, f"curve-{count}", f"{title}, over {x_title}", said), note)


def guidance(report: Report) -> Iterator[Chart]:
    """The first score for which lower is better, against the guidance scale, where results differ in that.

    Results without guidance, such as real images and reconstructions, are dashed lines across.
    """
    first = next((s for r in report.results for s in r.scores if s.better == "lower"), None)
    lines, bounds = dict[Any, list[tuple[float, int, Score]]](), list[tuple[int, Score]]()
    for i, result in enumerate(report.results):
        scale = result.settings.get("guidance_scale")
        score = next((s for s in result.scores if first and s.name == first.name and known(s.value)), None)
        if score and scale is None:
            bounds.append((i, score))
        elif score and isinstance(scale, int | float) and known(scale):
            lines.setdefault((result.source, result.settings.get("num_tokens")), []).append((scale, i, score))
    if first is None or len({point[0] for line in lines.values() for point in line}) < 2:
        return
    figure, axes = new_chart("guidance scale")
    said = [f"{report.results[i].name}: {score.text()}" for i, score in bounds]
    for line in map(sorted, lines.values()):
        axes.plot([x for x, _, _ in line], [s.value for _, _, s in line], color=MUTED, linewidth=1)
        for x, i, score in line:
            whisker(axes, i, [x, x], [score.low, score.high])
            badge(axes, x, score.value, i, several=True)
            said.append(f"{report.results[i].name}: {score.text()} at {x:g}")
    for i, score in bounds:
        axes.axhline(score.value, color=colour(i), linewidth=1, linestyle=DASHED)
    axes.margins(0.08, 0.12)
    if bounds:
        mark_ends(axes, [(i, score.value) for i, score in bounds])
    note = "Lower is better."
    note += " A line joins results of one source." if any(len(line) > 1 for line in lines.values()) else ""
    note += " Dashed: results without guidance." if bounds else ""
    title = f"{first.title} against guidance"
    yield Chart(title, svg(figure, "guidance", title, said), note)


def shares(per_class: PerClass, name: str) -> Shares:
    """Bars in the order of the classes; of many classes the ends, and how all are distributed."""
    rows = list(zip(per_class.names, per_class.values, per_class.counts, strict=True))
    found = sorted((row for row in rows if known(row[1])), key=lambda row: row[1])
    if not found:
        return Shares(per_class.title, "No class has images.", {}, None)
    mean = fmean(value for _, value, _ in found)
    (low_name, low, _), (high_name, high, _) = found[0], found[-1]
    summary = (
        f"Mean over {len(found)} classes {mean:.1%}; lowest {low:.1%} ({low_name}), highest {high:.1%} ({high_name})."
    )
    if len(found) < len(rows):
        summary += f" Classes without images: {len(rows) - len(found)} of {len(rows)}."
    if len(rows) <= MANY_CLASSES:
        return Shares(per_class.title, summary, {"": rows}, None)
    figure, axes = new_chart(per_class.title, "classes")
    axes.hist([row[1] for row in found], bins=[i / 20 for i in range(21)], color=colour(0), edgecolor=PAPER)
    axes.xaxis.set_major_formatter("{x:.0%}")
    title = f"Classes by {per_class.title}"
    chart = Chart(title, svg(figure, name, title, [summary]))
    groups = {f"The {SHOWN} lowest": found[:SHOWN], f"The {SHOWN} highest": found[: -SHOWN - 1 : -1]}
    return Shares(per_class.title, summary, groups, chart)


def new_chart(x_title: str, y_title: str = "") -> tuple[Any, Any]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4.6, 2.8), layout="constrained")
    axes = figure.add_subplot()
    axes.set_xlabel(printable(x_title))
    axes.set_ylabel(printable(y_title))
    axes.tick_params(length=3, width=0.6)
    return figure, axes


def printable(text: str) -> str:
    """For a chart: no control characters, lines that fit."""
    return textwrap.fill("".join(c if c.isprintable() else " " for c in text), 48)


def colour(result: int) -> str:
    return f"#0000{result % SERIES + 1:02x}"


def whisker(axes: Any, result: int, x: list[float | None], y: list[float | None]) -> None:
    """An interval; it need not hold the value, as bootstrap intervals of a biased score may not."""
    if all(map(known, [*x, *y])):
        axes.plot(x, y, color=colour(result), linewidth=1.2, marker="_" if x[0] == x[1] else "|", markersize=5)


def badge(axes: Any, x: float, y: float, result: int, several: bool, inside: bool = True) -> None:
    """A disc with the number that the result has in the table; plain where there is only one."""
    place = {"transform": axes.transData if inside else axes.transAxes, "clip_on": False}
    axes.plot([x], [y], "o", color=colour(result), markersize=11 if several else 7, zorder=4, **place)
    if several:
        style = {"ha": "center", "va": "center_baseline", "color": PAPER, "fontsize": 7, "fontweight": "bold"}
        axes.text(x, y, str(result + 1), zorder=5, **style, **place)


def mark_ends(axes: Any, ends: Sequence[tuple[int, float]]) -> None:
    """Badges beside the last points, moved up or down where they would overlap."""
    low, high = axes.get_ylim()
    ends = sorted(ends, key=lambda end: end[1])
    places = spread([(value - low) / (high - low) for _, value in ends], min(0.085, 1 / len(ends)))
    for (result, _), place in zip(ends, places, strict=True):
        badge(axes, 1.05, place, result, several=True, inside=False)


def spread(places: Sequence[float], gap: float) -> list[float]:
    """Ascending places in [0, 1], moved as little as can be (in squares) until neighbours are `gap` apart."""
    groups: list[list[float]] = []  # less i gaps, places must ascend: those that do not are set to their mean
    for i, place in enumerate(places):
        group = [place - i * gap]
        while groups and fmean(groups[-1]) > fmean(group):
            group = groups.pop() + group
        groups.append(group)
    last = 1 - (len(places) - 1) * gap
    means = [min(max(fmean(group), 0), last) for group in groups for _ in group]
    return [mean + i * gap for i, mean in enumerate(means)]


def mark_x(axes: Any, at: Sequence[float]) -> None:
    """Ticks at the points, on a logarithmic axis where they span a wide range."""
    if at[0] > 0 and at[-1] / at[0] >= 16:
        axes.set_xscale("log")
        axes.set_xticks(at[:: -(-len(at) // 9)])
        axes.minorticks_off()
    elif len(at) <= 6:
        axes.set_xticks(at)
    axes.xaxis.set_major_formatter(lambda x, _: f"{x:,.10g}")


def svg(figure: Any, name: str, title: str, said: Sequence[str]) -> str:
    """The chart as an element of the page: named colours, no style sheet of its own, ids that only it has."""
    import matplotlib

    buffer = io.BytesIO()
    with matplotlib.rc_context({"svg.hashsalt": name}):
        figure.savefig(
            buffer, format="svg", transparent=True, metadata=dict.fromkeys(("Creator", "Date", "Format", "Type"))
        )
    root = ElementTree.fromstring(buffer.getvalue())
    for parent in list(root.iter()):
        parent[:] = [child for child in parent if not child.tag.endswith("}style")]
    for element in root.iter():
        element.tag = element.tag.rpartition("}")[2]
        element.attrib = {key.rpartition("}")[2]: value for key, value in element.attrib.items()}
        for key, value in element.attrib.items():
            if key == "id":
                element.set(key, f"{name}-{value}")
            elif key == "href":
                element.set(key, f"#{name}-{value[1:]}")
            elif key in ("style", "clip-path"):
                value = re.sub(r"#0000\w\w\b", lambda found: f"var(--{NAMES[found[0]]})", value)
                element.set(key, value.replace("url(#", f"url(#{name}-"))
    for key in ("width", "height", "version", "id"):
        root.attrib.pop(key, None)
    root.attrib |= {"role": "img", "aria-label": f"{title}. {'; '.join(said)}"}
    return ElementTree.tostring(root, encoding="unicode", short_empty_elements=False)
