"""From features to scores: each metric of a protocol, with its interval and a line on how it was obtained."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor

from varkit.config import to_dict
from varkit.metrics.collect import Collected
from varkit.metrics.fid import FeatureStatistics, frechet_contributions, frechet_distance
from varkit.metrics.inception_score import inception_score_with_contributions
from varkit.metrics.interval import bootstrap_interval
from varkit.metrics.kid import kernel_contributions, kernel_distance
from varkit.metrics.prdc import Memberships, distances, memberships
from varkit.metrics.protocol import Protocol
from varkit.metrics.reference import Reference, statistics_settings
from varkit.metrics.report import Curve, PerClass, Score

NoInterval = tuple[None, None]
COPY = 0.1
"""Below this share of the usual distance between real images, an image counts as a near copy."""


@dataclass
class Scored:
    """All that a set of images was found to be."""

    scores: list[Score] = field(default_factory=list)
    curves: list[Curve] = field(default_factory=list)
    tables: dict[str, list[dict[str, Any]]] = field(default_factory=dict)
    per_class: PerClass | None = None
    nearest: Tensor | None = None


@dataclass
class Context:
    """What the metrics read.

    titles: metric -> as printed.   labels: (N,) the classes asked for, or None.   predicted: logits of a classifier for
    the same images, or None.   texts: similarity of image and text (N,), or None.
    """

    protocol: Protocol
    titles: Mapping[str, str]
    made: Collected
    reference: Reference
    labels: Tensor | None = None
    predicted: Tensor | None = None
    classifier: str = ""
    class_names: list[str] = field(default_factory=list)
    texts: Tensor | None = None
    noun: str = "images"

    @property
    def counts(self) -> str:
        real = "an unknown number of" if self.reference.num is None else f"{self.reference.num:,}"
        return f"{self.made.num:,} against {real} {self.noun}"

    def interval(
        self, value: float, contributions: Tensor, count: int | None = None
    ) -> tuple[float, float] | NoInterval:
        rule = self.protocol.interval
        if rule is None:
            return None, None
        options = {"level": rule.level, "resamples": rule.resamples, "seed": rule.seed}
        return bootstrap_interval(value, contributions, count=count, **options)  # type: ignore[arg-type]

    def mean(self, values: Tensor) -> tuple[float, float | None, float | None]:
        """The mean of (N,) and its interval."""
        value = float(values.double().mean())
        return value, *self.interval(value, values)

    @cached_property
    def real(self) -> Tensor:
        """Features of real images; that there are some was checked before any work."""
        assert self.reference.features is not None
        return self.reference.features

    @cached_property
    def manifold_real(self) -> Tensor:
        most = self.protocol.manifold.real
        if len(self.real) <= most:
            return self.real
        return self.real[sorted(np.random.RandomState(0).permutation(len(self.real))[:most].tolist())]

    @cached_property
    def memberships(self) -> Memberships:
        rule = self.protocol.manifold
        fake = self.made.rows["features"][: rule.generated]
        return memberships(self.manifold_real, fake, k=rule.k, comparison=rule.comparison)


def _distance(c: Context, metric: str, output: str) -> Score:
    reference = c.reference.gaussians[output]
    value = frechet_distance(c.made.statistics[output], reference)
    low = high = None
    if output in c.made.rows:
        rows = c.made.rows[output]
        low, high = c.interval(value, frechet_contributions(rows, reference, ddof=c.protocol.frechet.ddof))
        low = None if low is None else max(low, 0.0)
    how = f"{c.counts}; covariance over N{' - 1' if c.protocol.frechet.ddof else ''}"
    if c.protocol.frechet.mean_dtype != "float64":
        how += f", mean in {c.protocol.frechet.mean_dtype}"
    return Score(metric, c.titles[metric], value, low, high, "lower", how)


def _frechet(c: Context, out: Scored) -> None:
    out.scores.append(_distance(c, "frechet", "features"))


def _spatial(c: Context, out: Scored) -> None:
    out.scores.append(_distance(c, "spatial", "spatial"))


def _score(c: Context, out: Scored) -> None:
    rule = c.protocol.score
    options = {**to_dict(rule), "dtype": getattr(torch, rule.dtype)}
    score, contributions = inception_score_with_contributions(c.made.rows["logits"], **options)
    parts = f"{rule.splits} splits" if rule.splits else f"blocks of {rule.split_size:,}"
    order = "in the order given" if rule.shuffle is None else f"after a permutation (seed {rule.shuffle})"
    how = f"{c.made.num:,} images, {parts} {order}; deviation between parts {score.std:.4g}"
    low, high = c.interval(score.mean, contributions)
    out.scores.append(
        Score("score", c.titles["score"], score.mean, None if low is None else max(low, 1.0), high, "higher", how)
    )


def _kernel(c: Context, out: Scored) -> None:
    rule = c.protocol.kernel
    made = c.made.rows["features"]
    distance = kernel_distance(made, c.real, subsets=rule.subsets, subset_size=rule.subset_size, seed=rule.seed)
    low, high = c.interval(distance.mean, kernel_contributions(made, c.real), count=len(made))
    how = f"{len(made):,} against {len(c.real):,} {c.noun}"
    if rule.subsets is not None:
        how += f", {rule.subsets} subsets of {rule.subset_size:,} (seed {rule.seed}), deviation {distance.std:.2g}"
    out.scores.append(Score("kernel", c.titles["kernel"], distance.mean, low, high, "lower", how))


def _manifold(which: str) -> Callable[[Context, Scored], None]:
    def add(c: Context, out: Scored) -> None:
        members: Tensor = getattr(c.memberships, which)
        value, low, high = c.mean(members)
        rule = c.protocol.manifold
        ball = "inside" if rule.comparison == "strict" else "inside or on the ball"
        how = f"k = {rule.k}, {ball}; {len(c.manifold_real):,} real and {len(c.memberships.precision):,} generated"
        out.scores.append(Score(which, c.titles[which], value, low, high, "higher", how))

    return add


def _infinity(c: Context, out: Scored) -> None:
    rule, rows = c.protocol.infinity, c.made.rows["features"]
    reference = c.reference.gaussians["features"]
    count = len(rows)
    least = max(2, min(rule.least, max(count // 10, 2)))
    sizes = np.unique(np.linspace(least, count, rule.points).astype(int))
    stream = np.random.RandomState(rule.seed)
    values = []
    for size in sizes:
        subset = FeatureStatistics(rows.shape[1], **statistics_settings(c.protocol))
        subset.update(rows[torch.from_numpy(stream.choice(count, size, replace=False))])
        values.append(frechet_distance(subset, reference))
    _slope, limit = np.polyfit(1 / sizes, values, 1)
    contributions = frechet_contributions(rows, reference, ddof=c.protocol.frechet.ddof)
    low, high = c.interval(float(limit), contributions)
    how = f"intercept of a line through {len(sizes)} subsets of {sizes[0]:,} to {count:,} images against 1/N"
    out.scores.append(Score("infinity", c.titles["infinity"], float(limit), low, high, "lower", how))
    title = f"{c.titles['frechet']} against samples"
    out.curves.append(Curve(title, "samples", [float(s) for s in sizes], [float(v) for v in values], float(limit)))


def _accuracy(c: Context, out: Scored) -> None:
    assert c.predicted is not None and c.labels is not None
    right = (c.predicted.argmax(1) == c.labels).double()
    value, low, high = c.mean(right)
    how = f"{len(right):,} {c.noun}, {c.classifier}"
    out.scores.append(Score("accuracy", c.titles["accuracy"], value, low, high, "higher", how))
    classes = c.predicted.shape[1]
    counts = torch.bincount(c.labels, minlength=classes)
    shares = torch.bincount(c.labels, weights=right, minlength=classes) / counts
    names = c.class_names if len(c.class_names) == classes else [str(i) for i in range(classes)]
    out.per_class = PerClass(f"Accuracy by {c.classifier}", names, shares.tolist(), counts.tolist())


def _neighbours(c: Context, out: Scored) -> None:
    """How near generated images lie to training images, beside how near these lie to one another."""
    made, real = c.made.rows["features"], c.real
    found, out.nearest = _nearest(made, real, 4)
    own, _ = _nearest(real[: len(made)], real, 2)  # the first is the image itself
    ratio = found[:, 0] / own[:, -1].median().clamp_min(1e-12)
    copies = int((ratio < COPY).sum())
    how = (
        f"median distance to the nearest of {len(real):,} real images, over that between real images; "
        f"{copies:,} of {len(made):,} are below {COPY}, near copies"
    )
    title = c.titles["neighbours"]
    out.scores.append(Score("neighbours", title, float(ratio.median()), None, None, "", how))


def _nearest(rows: Tensor, others: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Distances (N, count) to the nearest rows of `others`, and which they are."""
    centre = others.mean(0)
    others = others - centre
    parts = [
        distances(block - centre, others, "euclidean").topk(min(count, len(others)), largest=False)
        for block in rows.split(512)
    ]
    return torch.cat([p.values for p in parts]), torch.cat([p.indices for p in parts])


def _clip_score(c: Context, out: Scored) -> None:
    assert c.texts is not None
    value, low, high = c.mean(c.texts)
    how = f"mean cosine of {len(c.texts):,} images and their texts, no clamp"
    out.scores.append(Score("clip-score", c.titles["clip-score"], value, low, high, "higher", how))


FUNCTIONS: dict[str, Callable[[Context, Scored], None]] = {
    "frechet": _frechet,
    "spatial": _spatial,
    "score": _score,
    "kernel": _kernel,
    "precision": _manifold("precision"),
    "recall": _manifold("recall"),
    "density": _manifold("density"),
    "coverage": _manifold("coverage"),
    "infinity": _infinity,
    "accuracy": _accuracy,
    "neighbours": _neighbours,
    "clip-score": _clip_score,
}
NEED_FEATURES = {"kernel", "precision", "recall", "density", "coverage", "neighbours"}
"""Metrics that compare single real images, which moments alone do not give."""


def score(context: Context, metrics: tuple[str, ...]) -> Scored:
    """The metrics in order."""
    out = Scored()
    for metric in metrics:
        FUNCTIONS[metric](context, out)
    return out
