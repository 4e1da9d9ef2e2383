"""Power laws of a ladder of models: loss and token error rate against parameters and against optimal compute.

Source: VAR, arXiv 2404.02905, section 5.1 (after Kaplan et al., arXiv 2001.08361): y = (beta x)^alpha, with no
constant term, fitted as a line in logarithms; x is the number of parameters N of models trained to the end, or the
least training compute C that reaches y, read off the Pareto frontier of all validations of all models on their way.
"""

from __future__ import annotations

import csv
import io
import json
import logging
import math
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

logger = logging.getLogger(__name__)

MEASURES = {
    "loss": "cross entropy, all scales",
    "loss_last": "cross entropy, last scale",
    "error": "token error rate, all scales",
    "error_last": "token error rate, last scale",
}
"""What is fitted: name -> words for people. Loss in nats a token; the error rate is a share, 0 to 1."""

AXES = {"parameters": ("N", 1e6, "million parameters"), "compute": ("C", 1e15, "PFLOP of training")}
"""x -> its letter, the unit it is given in, and that unit's name."""


@dataclass(frozen=True)
class Point:
    """One validation of one model.

    parameters: all of the network.   compute: floating-point operations of training so far, 3 times the forward
    passes.   images: seen so far.   final: the last validation of a finished model.
    """

    member: str
    parameters: int
    step: int
    images: int
    compute: float
    final: bool
    loss: float
    loss_last: float
    error: float
    error_last: float


@dataclass(frozen=True)
class Fit:
    """y = (beta x)^alpha.

    x, y: keys of AXES and MEASURES.   log10_beta: beta is per unit of AXES; a small exponent takes it out of the range
    of floats.   error: standard error of alpha.
    pearson: correlation of log x and log y.   count: points.   low, high: range of x that was fitted, in its unit.
    """

    x: str
    y: str
    alpha: float
    log10_beta: float
    error: float
    pearson: float
    count: int
    low: float
    high: float

    def at(self, x: float) -> float:
        """y at x, in units of AXES."""
        return 10 ** (self.alpha * (self.log10_beta + math.log10(x)))

    def law(self) -> str:
        """`(2.41e-06 N)^-0.081`."""
        small = abs(self.log10_beta) < 300
        beta = f"{10**self.log10_beta:.3g}" if small else f"10^{self.log10_beta:.0f}"
        return f"({beta} {AXES[self.x][0]})^{self.alpha:.4f}"


def fit_power_law(x: Sequence[float], y: Sequence[float]) -> tuple[float, float, float, float]:
    """Least squares on log y = alpha (log x + log beta).

    Args: x, y: as many positive numbers of each, at least 3: through two points every line fits.
    Returns: alpha, log10 of beta, the standard error of alpha, Pearson's r of the logarithms.
    Raises: ValueError for fewer, for numbers that are not positive and finite, and where x or y does not change.
    """
    if len(x) != len(y) or len(x) < 3:
        raise ValueError(f"a power law needs at least 3 points; got {len(x)} x and {len(y)} y")
    if not all(math.isfinite(v) and v > 0 for v in (*x, *y)):
        raise ValueError("a power law needs positive, finite numbers")
    if len(set(x)) == 1 or len(set(y)) == 1:
        raise ValueError("all points have the same x, or the same y: there is nothing to fit")
    from scipy.stats import linregress

    line = linregress([math.log10(v) for v in x], [math.log10(v) for v in y])
    return float(line.slope), float(line.intercept / line.slope), float(line.stderr), float(line.rvalue)


def frontier(points: Sequence[Point], measure: str) -> list[Point]:
    """The points that no other one beats with as little compute, cheapest first; each is better than the one before."""
    best: list[Point] = []
    for point in sorted(points, key=lambda p: (p.compute, getattr(p, measure))):
        if not best or getattr(point, measure) < getattr(best[-1], measure):
            best.append(point)
    return best


def fit_all(points: Sequence[Point]) -> list[Fit]:
    """The laws of the paper, four measures against parameters and against compute: those that these points allow.

    Raises: ValueError when fewer than three models are finished.
    """
    finished = [p for p in points if p.final]
    if len(finished) < 3:
        raise ValueError(f"a fit needs 3 finished members or more; {len(finished)} finished")
    fits = []
    for x, (_, unit, _) in AXES.items():
        for y in MEASURES:
            used = finished if x == "parameters" else frontier(points, y)
            values = [getattr(p, x) / unit for p in used]
            try:
                alpha, log10_beta, error, pearson = fit_power_law(values, [getattr(p, y) for p in used])
            except ValueError as reason:
                logger.warning("%s against %s is not fitted: %s", y, x, reason)
                continue
            fits.append(Fit(x, y, alpha, log10_beta, error, pearson, len(used), min(values), max(values)))
    return fits


def fit_lines(fits: Sequence[Fit]) -> list[str]:
    """For a terminal: one law a line."""
    lines = []
    for x, (letter, _, unit) in AXES.items():
        lines.append(f"against {x} ({letter} in {unit}):")
        for fit in fits:
            if fit.x == x:
                lines.append(
                    f"  {MEASURES[fit.y]:<28}  {fit.law():<24}  exponent {fit.alpha:.4f} +- {fit.error:.4f}, "
                    f"Pearson r {fit.pearson:.4f}, {fit.count} points"
                )
    return lines


def write_results(folder: Path, points: Sequence[Point], fits: Sequence[Fit], facts: dict[str, Any]) -> list[Path]:
    """scaling.json (all of it) and scaling.csv (one validation a line), atomically. Returns their paths."""
    data = {**facts, "fits": [{**asdict(f), "law": f.law()} for f in fits], "points": [asdict(p) for p in points]}
    table = io.StringIO()
    writer = csv.DictWriter(table, list(Point.__dataclass_fields__), lineterminator="\n")
    writer.writeheader()
    writer.writerows(asdict(p) for p in points)
    paths = [folder / "scaling.json", folder / "scaling.csv"]
    for path, text in zip(paths, (json.dumps(data, indent=1) + "\n", table.getvalue()), strict=True):
        part = path.with_name(f".{path.name}.part")
        part.write_text(text, encoding="utf-8")
        os.replace(part, path)
    return paths


def draw_scaling(points: Sequence[Point], fits: Sequence[Fit], path: Path) -> None:
    """Four panels on logarithmic axes: loss and error rate, against parameters and against compute.

    Dots are what was fitted, dashed lines the laws, thin lines the models on their way.

    Args: path: .png or .svg.
    Raises: ImportError without matplotlib (the extra `plots`).
    """
    try:
        import matplotlib
    except ImportError as error:
        raise ImportError(f'the figure needs matplotlib: pip install "varkit[plots]" ({error})') from None
    matplotlib.use("Agg")
    from matplotlib import pyplot

    rows = {"cross entropy": ("loss", "loss_last"), "token error rate": ("error", "error_last")}
    with matplotlib.rc_context({"svg.hashsalt": "varkit", "font.size": 8}):
        figure, panels = pyplot.subplots(2, 2, figsize=(8.4, 6.0))
        for row, (title, measures) in enumerate(rows.items()):
            for column, x in enumerate(AXES):
                _panel(panels[row][column], points, [f for f in fits if f.x == x and f.y in measures])
                panels[row][column].set_ylabel(title)
        figure.tight_layout()
        kind = path.suffix.removeprefix(".")
        part = path.with_name(f".{path.name}.part")
        figure.savefig(part, dpi=110, format=kind, metadata={"Date" if kind == "svg" else "Software": None})
        pyplot.close(figure)
    os.replace(part, path)


def _panel(panel: Any, points: Sequence[Point], fits: Sequence[Fit]) -> None:
    for fit in fits:
        color = "tab:orange" if fit.y.endswith("_last") else "tab:blue"
        _, unit, words = AXES[fit.x]
        if fit.x == "compute":
            for member in dict.fromkeys(p.member for p in points):
                way = [p for p in points if p.member == member]
                panel.plot(
                    [p.compute / unit for p in way], [getattr(p, fit.y) for p in way], color=color, alpha=0.25, lw=0.8
                )
        used = frontier(points, fit.y) if fit.x == "compute" else [p for p in points if p.final]
        panel.plot([getattr(p, fit.x) / unit for p in used], [getattr(p, fit.y) for p in used], "o", color=color, ms=3)
        scale = MEASURES[fit.y].split(", ")[1]
        label = f"{scale}: {fit.law()}, r = {fit.pearson:.3f}"
        ends = [fit.low, fit.high]
        panel.plot(ends, [fit.at(v) for v in ends], "--", color=color, lw=1.2, label=label)
        panel.set_xlabel(words)
    panel.set_xscale("log")
    panel.set_yscale("log")
    low, high = panel.get_xlim()
    panel.xaxis.set_major_formatter("{x:g}")
    panel.xaxis.set_minor_formatter("" if high / low > 10 else "{x:g}")
    panel.yaxis.set_major_formatter("{x:.3g}")
    panel.yaxis.set_minor_formatter("{x:.3g}")
    panel.grid(alpha=0.3, which="both")
    if fits:
        panel.legend(fontsize=7)
