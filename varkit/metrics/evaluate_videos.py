"""Videos: clips cut by the rule of a protocol, FVD; or their frames, scored as images."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from varkit.data.clip_rules import ClipRule, clips
from varkit.data.clips import CLIP_DATASETS
from varkit.data.video import VideoSet, open_videos
from varkit.metrics.checks import check_images, check_statistics
from varkit.metrics.collect import collect, gathered, process
from varkit.metrics.evaluate import Options, new_report, wanted_of
from varkit.metrics.networks import FeatureNetwork, open_network
from varkit.metrics.protocol import Protocol
from varkit.metrics.reference import Reference, is_statistics, read_statistics, reference_of
from varkit.metrics.report import Report, Result
from varkit.metrics.scores import NEED_FEATURES, Context, score
from varkit.metrics.sets import ImageSet
from varkit.metrics.sources import is_model
from varkit.metrics.video_sources import as_set, clip_set, first_clips, model_clips
from varkit.pictures import grid, to_pil
from varkit.pipelines.auto import AutoPipeline

ENOUGH = 2048
"""Videos below which a Frechet distance says little; the usual number."""
SHOWN = 8
"""Clips of a contact sheet, one a row."""


def frames_as_images(source: Any, protocol: Protocol, *, generated: bool) -> ImageSet:
    """Videos as a set of images: the first frame of each, or every frame of its clip."""
    rule = protocol.clips
    videos = source if isinstance(source, VideoSet) else open_videos(source)
    start = rule.start_generated if generated else rule.start_real
    if protocol.images.frames == "first":
        cut, each = ClipRule(frames=1, start="first"), 1
    else:
        cut, each = ClipRule(rule.frames, rule.stride, start, short=rule.short, seed=rule.seed), rule.frames
    plan = clips(videos, cut, resize=rule.load_size, quantize="truncate" if rule.load_size else "none")
    of_clips = as_set(plan, ())

    def read(indices: Sequence[int]) -> Tensor:
        wanted: dict[int, list[int]] = {}
        for i in indices:
            wanted.setdefault(i // each, []).append(i % each)
        return torch.cat([plan.read(n)[rows] for n, rows in wanted.items()]).permute(0, 3, 1, 2).contiguous()

    return ImageSet(
        name=of_clips.name,
        source=of_clips.source,
        kind=f"videos, {protocol.images.frames} frame{'s' if each > 1 else ''}",
        num=len(plan.plan) * each,
        size=of_clips.size,
        read=read,
        hash=of_clips.hash,
        threads=4,
        title=lambda i: f"frame {i % each} of {of_clips.title(i // each)}",
    )


def evaluate_videos(
    generated: Any,
    reference: Any,
    protocol: Protocol,
    options: Options,
    *,
    split: str | None = None,
    root: str | None = None,
    guidance: Sequence[float] = (),
    sampling: dict[str, Any] | None = None,
    bounds: str | None = None,
) -> Report:
    """As `varkit.metrics.evaluate.evaluate`, for a protocol of videos."""
    network = open_network(protocol, options.weights, options.where, download=options.download)
    fixed = {k: v for k, v in (sampling or {}).items() if v is not None}
    pipeline, sets = None, list[ImageSet]()
    if is_model(generated):
        pipeline = generated if hasattr(generated, "sampler") else AutoPipeline.from_pretrained(generated)
        if pipeline.image_tokenizer.num_frames is None:
            raise ValueError(f"{generated} draws images; {protocol.name} scores videos")
        size = tuple(pipeline.image_tokenizer.image_size)
    else:
        if guidance or fixed:
            raise ValueError(f"{generated} is no model of clips: there is nothing to sample")
        many = isinstance(generated, list | tuple)
        sets = [_given(one, protocol, root) for one in (generated if many else [generated])]
        size = sets[0].size[1:]
    opening: dict[str, Any] = {"generated": False, "root": root, "size": size}
    real: ImageSet | Reference
    if isinstance(reference, str | Path) and is_statistics(Path(reference)):
        real = read_statistics(Path(reference))
        check_statistics(real, protocol, network)
    else:
        real = clip_set(reference, protocol, split=split, **opening)
    if pipeline is not None:
        given = None if isinstance(real, Reference) else clip_set(
            reference, protocol, split=split, scored=False, **opening
        )  # fmt: skip
        name = type(pipeline).__name__ if pipeline is generated else str(generated)
        for w in guidance or (None,):
            settings = fixed | ({} if w is None else {"guidance_scale": w})
            one = model_clips(pipeline, name, protocol, options.where, given, **settings)
            sets.append(replace(one, name=f"{name}, guidance {one.settings['guidance_scale']:g}"))
    if bounds is not None:
        held = first_clips(clip_set(bounds, protocol, **opening), protocol.sampling.num)
        sets.insert(0, replace(held, name=f"{bounds}: real clips", bound=True))
    for one in sets:
        check_images(one, real, protocol, network, network if "accuracy" in protocol.metrics else None)
    rows = bool(NEED_FEATURES & set(protocol.metrics))
    found = real if isinstance(real, Reference) else reference_of(
        real, protocol, network, rows=rows, cache=options.cache, **options.running
    )  # fmt: skip
    report = new_report(protocol, [network], found, options)
    if protocol.sampling.num < ENOUGH:
        report.warnings.append(f"{protocol.sampling.num} videos: below {ENOUGH:,} a Frechet distance is biased upwards")
    for one in sets:
        report.results.append(_score(one, found, protocol, network, options))
    unlabelled = [one.name for one in sets if one.labels is None and "accuracy" in protocol.metrics]
    if unlabelled:
        report.warnings.append(f"no accuracy: no labels in {', '.join(unlabelled)}")
    return report


def _given(source: Any, protocol: Protocol, root: str | None) -> ImageSet:
    """Clips to be scored: of a named set, which is computed, the first so many; of files, as many as there are."""
    found = clip_set(source, protocol, generated=True, root=root)
    named = isinstance(source, str) and source.split(":")[0] in CLIP_DATASETS
    return replace(first_clips(found, protocol.sampling.num), name=source) if named else found


def _score(
    clips_of: ImageSet, reference: Reference, protocol: Protocol, network: FeatureNetwork, options: Options
) -> Result:
    metrics = tuple(m for m in protocol.metrics if m != "accuracy" or clips_of.labels is not None)
    wanted = wanted_of(metrics, protocol, logits="accuracy" in metrics)
    count = min(SHOWN, len(clips_of))
    wanted.pictures = sorted({round(i * (len(clips_of) - 1) / max(count - 1, 1)) for i in range(count)})
    seen = collect(
        network, clips_of, range(len(clips_of)), wanted, what=clips_of.name, process=process(), **options.running
    )
    made = gathered(seen)
    context = Context(
        protocol,
        network.titles("videos"),
        made,
        reference,
        labels=clips_of.labels,
        predicted=made.rows.get("logits"),
        classifier=network.what,
        class_names=clips_of.class_names,
        noun="videos",
    )
    found = score(context, metrics)
    settings = {"frames": protocol.clips.frames, "stride": protocol.clips.stride, **clips_of.settings}
    result = Result(clips_of.name, clips_of.source, len(clips_of), clips_of.size, settings, found.scores, found.curves)
    result.per_class, result.bound = found.per_class, clips_of.bound
    result.pictures["Clips, one a row: eight frames of each"] = sheet([made.pictures[i] for i in sorted(made.pictures)])
    return result


def sheet(clips_shown: Sequence[Tensor]) -> Any:
    """Clips (T, H, W, 3), uint8 or in [0, 1], one a row."""
    frames = []
    for clip in clips_shown:
        values = clip if clip.is_floating_point() else clip.float() / 255
        steps = torch.linspace(0, len(values) - 1, min(8, len(values))).round().long()
        frames += to_pil(values[steps].permute(0, 3, 1, 2) * 2 - 1)
    return grid(frames, len(frames) // len(clips_shown))


def prepare_videos(
    source: Any,
    protocol: Protocol,
    network: FeatureNetwork,
    options: Options,
    out: Path,
    *,
    split: str | None = None,
    root: str | None = None,
) -> int:
    """Write the statistics of real videos. Returns how many clips there were."""
    real = clip_set(source, protocol, generated=False, split=split, root=root)
    found = reference_of(real, protocol, network, write_to=out, cache=False, **options.running)
    return int(found.num or 0)
