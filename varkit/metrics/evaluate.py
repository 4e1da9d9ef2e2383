"""Score generated images, reconstructions or videos under a protocol: what `varkit eval` runs.

    report = evaluate("samples.npz", "VIRTUAL_imagenet256_labeled.npz", protocol="adm")
    report = evaluate("fashion-var", "fashion-mnist", protocol="fashion", guidance=[1, 2, 3])
    report = evaluate("runs/flextok_ar/model", "fashion-mnist", protocol="fashion", lengths=[1, 2, 4, 8])

All that can be refused is refused before the first image goes through a network.
"""

from __future__ import annotations

import dataclasses
import datetime
import platform
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

import varkit
from varkit.metrics.checks import check_images, check_statistics
from varkit.metrics.clip_score import clip_score
from varkit.metrics.collect import Collected, Network, Wanted, collect, gathered, process
from varkit.metrics.networks import FeatureNetwork, open_classifier, open_network
from varkit.metrics.protocol import Protocol, load_protocol
from varkit.metrics.reference import Reference, reference_of, statistics_settings
from varkit.metrics.report import Curve, Report, Result
from varkit.metrics.scores import NEED_FEATURES, Context, Scored, score
from varkit.metrics.sets import ImageSet
from varkit.metrics.sources import open_generated, open_reference, open_set
from varkit.pictures import grid, to_pil
from varkit.pipelines.auto import best_device

SHEET = 64
"""Images of a contact sheet."""
SHOWN = 8
"""Images shown with their nearest real ones."""


@dataclass
class Options:
    """How, not what: none of it changes a number beyond rounding.

    weights: path of the network's file or its folder.   download: fetch missing weights whose checksum is known.
    device: auto, cpu, cuda or mps.   batch_size: images at once.   cache: keep a reference's statistics.
    progress: draw bars on standard error.
    """

    weights: str | Path | None = None
    download: bool = False
    device: str = "auto"
    batch_size: int = 32
    cache: bool = True
    progress: bool = False

    @property
    def where(self) -> torch.device:
        return best_device() if self.device == "auto" else torch.device(self.device)

    @property
    def running(self) -> dict[str, Any]:
        return {"batch_size": self.batch_size, "device": self.where, "progress": self.progress}


def evaluate(
    generated: str | Path | Tensor | ImageSet | Sequence[ImageSet],
    reference: str | Path | Tensor | ImageSet,
    *,
    protocol: str | Path | Protocol,
    metrics: Sequence[str] = (),
    num: int | None = None,
    overrides: Sequence[str] = (),
    split: str | None = None,
    root: str | None = None,
    classifier: str | Path | None = None,
    guidance: Sequence[float] = (),
    sampling: dict[str, Any] | None = None,
    bounds: str | None = None,
    lengths: Sequence[int] = (),
    steps: Sequence[int] = (),
    **options: Any,
) -> Report:
    """A report of one or several sets beside one reference.

    Args:
        generated: a folder, .npz or .npy, the name of a data set, a model (shipped name or pipeline folder; it is
            sampled, and nothing is written), images as a tensor, or opened sets. Under a protocol for reconstructions
            a tokenizer, or reconstructions in the order of the reference; under one for videos, videos.
        reference: the same, or a file of statistics.
        protocol: a name (`varkit list`), the path of a .yaml file, or a `Protocol`.
        metrics, num, overrides: change the protocol, which the report then says: other metrics, another number of
            images, `key=value`.
        split, root: of the reference, where it is a data set with splits.
        classifier: for `accuracy` under a protocol whose network is not the classifier: its folder.
        guidance: guidance scales to sample a model at; each is a result.   sampling: further sampler settings.
        bounds: held-out real images (`fashion-mnist:test`), scored as well, as are a model's reconstructions of them:
            what bounds its samples.
        lengths: tokens to decode from, for a tokenizer of flexible length, or to draw, for a model that can stop
            early; each is a result (at each guidance scale), and every score is drawn against them.
        steps: numbers of steps to sample a model in, where it can choose; each is a result.
        options: of `Options`.
    Raises: ValueError and FileNotFoundError before any work, saying what is missing or does not fit.
    """
    if isinstance(protocol, Protocol):
        if metrics or num is not None or overrides:
            raise ValueError("metrics, num and overrides change a protocol given by name; this one is an object")
        rules = protocol
    else:
        rules = load_protocol(protocol, overrides, metrics=metrics, num=num)
    how = Options(**options)
    if rules.kind == "videos":
        from varkit.metrics.evaluate_videos import evaluate_videos

        if lengths or steps:
            raise ValueError("--tokens and --steps go with models and tokenizers of images; leave them out for videos")
        return evaluate_videos(
            generated, reference, rules, how, split=split, root=root, guidance=guidance, sampling=sampling,
            bounds=bounds
        )  # fmt: skip
    if rules.kind.endswith("reconstruction"):
        if steps:
            raise ValueError("steps (--steps) are a model's; under a protocol of reconstructions nothing is sampled")
        from varkit.metrics.evaluate_reconstructions import evaluate_reconstructions

        return evaluate_reconstructions(generated, reference, rules, how, split=split, root=root, lengths=lengths)
    return evaluate_images(
        generated, reference, rules, how, split=split, root=root, classifier=classifier, guidance=guidance,
        sampling=sampling or {}, bounds=bounds, lengths=lengths, steps=steps
    )  # fmt: skip


def evaluate_images(
    generated: Any,
    reference: Any,
    protocol: Protocol,
    options: Options,
    *,
    split: str | None = None,
    root: str | None = None,
    classifier: str | Path | None = None,
    guidance: Sequence[float] = (),
    sampling: dict[str, Any],
    bounds: str | None = None,
    lengths: Sequence[int] = (),
    steps: Sequence[int] = (),
) -> Report:
    """As `evaluate`, for a protocol of images."""
    where = options.where
    network = open_network(protocol, options.weights, where, download=options.download)
    judge = open_classifier(classifier, network, protocol, where)
    sets = open_generated(
        generated, protocol, where, guidance=guidance, lengths=lengths, steps=steps, sampling=sampling, bounds=bounds,
        root=root
    )  # fmt: skip
    real = open_reference(reference, protocol, size=sets[0].size, split=split, root=root)
    for one in sets:
        check_images(one, real, protocol, network, judge)
    single = bool(NEED_FEATURES & set(protocol.metrics))
    if isinstance(real, Reference):
        check_statistics(real, protocol, network)
        found = real
        if single and real.features is None and real.images is not None:
            taken = reference_of(real.images, protocol, network, cache=options.cache, **options.running)
            found = dataclasses.replace(real, features=taken.features, indices=taken.indices)
    else:
        outputs = [o for o, metrics in MOMENTS_FOR.items() if metrics & set(protocol.metrics)]
        found = reference_of(
            real, protocol, network, statistics=outputs, rows=single, cache=options.cache, **options.running
        )
    report = new_report(protocol, [network] if judge in (None, network) else [network, judge], found, options)
    for one in sets:
        report.results.append(score_set(one, found, protocol, network, judge, options))
    add_curves(report.results)
    unlabelled = [one.name for one in sets if one.labels is None and "accuracy" in protocol.metrics]
    if unlabelled:
        report.warnings.append(f"no accuracy: no labels in {', '.join(unlabelled)}")
    return report


def prepare(
    source: Any,
    protocol: str | Path,
    out: Path,
    options: Options,
    overrides: Sequence[str] = (),
    *,
    split: str | None = None,
    root: str | None = None,
    size: int | None = None,
    fit: str | None = None,
) -> int:
    """Write the statistics of a set of real images or videos to `out`. Returns how many there were.

    Args:
        overrides: of the protocol, `key=value`; those who use the file must say the same.
        size, fit: images are made this square size by this rule (`center`, unless the protocol has one).
    Raises: ValueError and FileNotFoundError as `evaluate`.
    """
    if out.suffix != ".npz":
        raise ValueError(f"--out {out} must end in .npz")
    rules = load_protocol(protocol, overrides)
    network = open_network(rules, options.weights, options.where, download=options.download)
    if rules.kind.startswith("video"):
        from varkit.metrics.evaluate_videos import prepare_videos

        return prepare_videos(source, rules, network, options, out, split=split, root=root)
    sizes = rules.images.sizes
    wanted = (size, size) if size else (sizes[0] if len(sizes) == 1 else None)
    rule = fit or (rules.images.fit if rules.images.fit != "none" or wanted is None else "center")
    if wanted is None and rule != "none":
        raise ValueError(f"fit {rule} needs a size (--size)")
    images = open_set(source, rules, split=split, root=root, size=wanted, fit=rule)
    outputs = ["features", "spatial"] if network.name == "inception" else ["features"]
    found = reference_of(images, rules, network, statistics=outputs, write_to=out, cache=False, **options.running)
    return int(found.num or 0)


def new_report(
    protocol: Protocol, networks: Sequence[FeatureNetwork | None], reference: Reference, options: Options
) -> Report:
    """A report without results yet, with the warnings that all of them share."""
    present = [n for n in networks if n is not None]
    environment = {
        "date": datetime.date.today().isoformat(),
        "varkit": varkit.__version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "device": str(options.where),
        "batch_size": options.batch_size,
    }
    warnings = [f"{n.what}; its numbers do not compare with published ones" for n in present if not n.released]
    warnings += [
        f"{n.what}: no checksum of the weights is known, the file was taken on trust" for n in present if n.trusted
    ]
    if reference.kind == "statistics" and not reference.about:
        warnings.append(
            f"{reference.source} does not say by which network and resize it was made; it was taken on trust"
        )
    facts = {n.name: n.facts() for n in present}
    return Report(protocol.to_dict(), facts, reference.facts(), [], environment, warnings)


def score_set(
    images: ImageSet,
    reference: Reference,
    protocol: Protocol,
    network: FeatureNetwork,
    judge: FeatureNetwork | None,
    options: Options,
) -> Result:
    """One result: features, numbers, pictures."""
    num = len(images)
    metrics = tuple(m for m in protocol.metrics if m != "accuracy" or images.labels is not None)
    judged = judge is not None and "accuracy" in metrics
    wanted = wanted_of(metrics, protocol, logits=judged and judge is network)
    wanted.pictures = sorted({round(i * (num - 1) / (SHEET - 1)) for i in range(SHEET)} | {*range(min(SHOWN, num))})
    made = _collected(network, images, wanted, options, images.name)
    predicted = made.rows.get("logits") if judged else None
    if judged and judge is not network:
        assert judge is not None
        predicted = _collected(judge, images, Wanted(rows={"logits"}), options, f"{images.name}: classes").rows[
            "logits"
        ]
    similarity = None
    if "clip-score" in metrics and network.embed_texts is not None and images.texts is not None:
        similarity = clip_score(made.rows["features"], network.embed_texts(images.texts), scale=1.0).per_sample
    context = Context(
        protocol,
        network.titles(protocol.kind),
        made,
        reference,
        labels=images.labels,
        predicted=predicted,
        classifier="" if judge is None else judge.what,
        class_names=images.class_names,
        texts=similarity,
    )
    found = score(context, metrics)
    result = Result(images.name, images.source, num, images.size, dict(images.settings), found.scores, found.curves)
    result.per_class, result.bound = found.per_class, images.bound
    result.pictures = pictures(made, found, reference)
    return result


def add_curves(results: Sequence[Result]) -> None:
    """Every score against the number of tokens, where results of one source differ in nothing else.

    A curve belongs to the last of its results.
    """
    groups: dict[tuple[str, Any], list[tuple[int, Result]]] = {}
    for one in results:
        count = one.settings.get("num_tokens", one.settings.get("length"))
        if count is not None:
            groups.setdefault((one.source, one.settings.get("guidance_scale")), []).append((count, one))
    for group in groups.values():
        rows = sorted(group, key=lambda row: row[0])
        if len(rows) < 2:
            continue
        for shown in rows[0][1].scores:
            values = [row.score(shown.name).value for _, row in rows]
            group[-1][1].curves.append(Curve(shown.title, "tokens", [float(n) for n, _ in rows], values))


MOMENTS_FOR = {"features": {"frechet", "infinity"}, "spatial": {"spatial"}}
"""Output -> metrics that need its mean and covariance."""


def wanted_of(metrics: Sequence[str], protocol: Protocol, *, logits: bool) -> Wanted:
    """What the metrics read; single features are kept for intervals as well."""
    asked = set(metrics)
    outputs = [o for o, users in MOMENTS_FOR.items() if users & asked]
    rows = {"features"} if asked & (NEED_FEATURES | {"infinity", "clip-score"}) else set()
    if protocol.interval is not None:
        rows |= set(outputs)
    if logits or "score" in asked:
        rows |= {"logits"}
    return Wanted(dict.fromkeys(outputs, statistics_settings(protocol)), rows)


def _collected(network: Network, images: ImageSet, wanted: Wanted, options: Options, what: str) -> Collected:
    seen = collect(network, images, range(len(images)), wanted, what=what, process=process(), **options.running)
    return gathered(seen)


def pictures(made: Collected, found: Scored, reference: Reference) -> dict[str, Image.Image]:
    """A contact sheet; and the first images with the real ones nearest to them, where single features were compared."""
    shown = {i: to_pil(one[None].float().div(127.5).sub(1))[0] for i, one in sorted(made.pictures.items())}
    sheet = [one for i, one in shown.items() if i >= SHOWN or i == 0 or len(shown) <= SHOWN]
    result = {
        "Contact sheet: evenly spaced through the set": grid(sheet[:SHEET], 16 if len(sheet) > 16 else len(sheet))
    }
    if found.nearest is not None and reference.images is not None and reference.indices:
        rows = []
        for i in range(min(SHOWN, made.num)):
            near = [reference.indices[j] for j in found.nearest[i].tolist()]
            rows += [shown[i], *to_pil(reference.images.read(near).float().div(127.5).sub(1))]
        title = "The first images (left) and the real images nearest to each"
        result[title] = grid(rows, len(rows) // min(SHOWN, made.num))
    return result
