"""Videos: clips cut by the rule of a protocol, FVD; or their frames, scored as images."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from varkit.data.video import ClipBatches, ClipRule, VideoSet, clips, open_videos
from varkit.metrics.checks import check_images, check_statistics
from varkit.metrics.collect import collect, gathered, process
from varkit.metrics.evaluate import Options, new_report, wanted_of
from varkit.metrics.networks import FeatureNetwork, open_network
from varkit.metrics.protocol import Protocol
from varkit.metrics.reference import Reference, chosen, is_statistics, read_statistics, reference_of
from varkit.metrics.report import Report, Result
from varkit.metrics.scores import NEED_FEATURES, Context, score
from varkit.metrics.sets import ImageSet, hash_arrays
from varkit.pictures import grid, to_pil

ENOUGH = 2048
"""Videos below which a Frechet distance says little; the usual number."""
SHOWN = 8
"""Clips of a contact sheet, one a row."""


def clip_set(source: Any, protocol: Protocol, *, generated: bool) -> ImageSet:
    """Videos as a set of clips, (T, H, W, 3) each; headers are read and lengths and sizes checked now.

    Raises: FileNotFoundError; ImportError without PyAV; ValueError as `varkit.data.video.clips`.
    """
    if isinstance(source, ImageSet):
        return source
    rule = protocol.clips
    videos = source if isinstance(source, VideoSet) else open_videos(source)
    start = rule.start_generated if generated else rule.start_real
    cut = ClipRule(frames=rule.frames, stride=rule.stride, start=start, short=rule.short, seed=rule.seed)
    plan = clips(videos, cut, resize=rule.load_size, quantize=rule.quantise if rule.load_size else "none")
    if not generated and rule.real is not None:
        if len(plan.plan) < rule.real:
            raise ValueError(
                f"{videos.source} holds {len(plan.plan):,} videos that are long enough; the protocol {protocol.name} "
                f"takes {rule.real:,} real ones (--set clips.real=null takes all)"
            )
        plan.plan = [plan.plan[i] for i in chosen(len(plan.plan), rule.real)]
    return _as_set(plan, (rule.frames,))


def _as_set(plan: ClipBatches, frames: tuple[int, ...]) -> ImageSet:
    videos = plan.videos
    if plan.resize is None:
        size = videos.size(plan.plan[0][0])
        for index, _, _ in plan.plan:
            if videos.size(index) != size:
                (h, w), (a, b) = size, videos.size(index)
                first, other = videos.names[plan.plan[0][0]], videos.names[index]
                raise ValueError(
                    f"{videos.source}: {first} is {h}x{w}, {other} {a}x{b}; a score needs one size, or a protocol with "
                    "clips.load_size"
                )
    else:
        size = (plan.resize, plan.resize)
    return ImageSet(
        name=Path(videos.source).name or videos.source,
        source=videos.source,
        kind="videos",
        num=len(plan.plan),
        size=(*frames, *size),
        read=lambda indices: torch.stack([plan.read(i) for i in indices]),
        hash=lambda: _hash(plan),
        threads=4,
        chunk=1,
        title=lambda i: videos.names[plan.plan[i][0]],
    )


def _hash(plan: ClipBatches) -> str:
    """Of the files, and of how clips are cut from them."""
    parts = [f"{plan.plan} {plan.rule} {plan.resize} {plan.quantize}"]
    for index in sorted({index for index, _, _ in plan.plan}):
        video: Any = plan.videos.videos[index]
        if hasattr(video, "array"):
            parts.append(hash_arrays(video.array))
        elif hasattr(video, "files"):
            parts += [_digest(video.path / name) for name in video.files]
        else:
            parts.append(_digest(video.path))
    return hashlib.blake2b(" ".join(parts).encode(), digest_size=16).hexdigest()


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=16)).hexdigest()


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
    of_clips = _as_set(plan, ())

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


def evaluate_videos(generated: Any, reference: Any, protocol: Protocol, options: Options) -> Report:
    """As `varkit.metrics.evaluate.evaluate`, for a protocol of videos."""
    network = open_network(protocol, options.weights, options.where, download=options.download)
    many = isinstance(generated, list | tuple)
    sets = [clip_set(one, protocol, generated=True) for one in (generated if many else [generated])]
    real: ImageSet | Reference
    if isinstance(reference, str | Path) and is_statistics(Path(reference)):
        real = read_statistics(Path(reference))
        check_statistics(real, protocol, network)
    else:
        real = clip_set(reference, protocol, generated=False)
    for one in sets:
        check_images(one, real, protocol, network, None)
    rows = bool(NEED_FEATURES & set(protocol.metrics))
    found = real if isinstance(real, Reference) else reference_of(
        real, protocol, network, rows=rows, cache=options.cache, **options.running
    )  # fmt: skip
    report = new_report(protocol, [network], found, options)
    if protocol.sampling.num < ENOUGH:
        report.warnings.append(f"{protocol.sampling.num} videos: below {ENOUGH:,} a Frechet distance is biased upwards")
    for one in sets:
        report.results.append(_score(one, found, protocol, network, options))
    return report


def _score(
    clips_of: ImageSet, reference: Reference, protocol: Protocol, network: FeatureNetwork, options: Options
) -> Result:
    wanted = wanted_of(protocol.metrics, protocol, logits=False)
    seen = collect(
        network, clips_of, range(len(clips_of)), wanted, what=clips_of.name, process=process(), **options.running
    )
    made = gathered(seen)
    found = score(Context(protocol, network.titles("videos"), made, reference, noun="videos"), protocol.metrics)
    settings = {"frames": protocol.clips.frames, "stride": protocol.clips.stride}
    result = Result(clips_of.name, clips_of.source, len(clips_of), clips_of.size, settings, found.scores, found.curves)
    result.pictures["Clips, one a row: eight frames of each"] = _sheet(clips_of)
    return result


def _sheet(clips_of: ImageSet) -> Any:
    count = min(SHOWN, len(clips_of))
    chosen_clips = sorted({round(i * (len(clips_of) - 1) / max(count - 1, 1)) for i in range(count)})
    frames = []
    for index in chosen_clips:
        clip = clips_of.read([index])[0]  # T H W 3
        clip = clip if clip.is_floating_point() else clip.float() / 255
        steps = torch.linspace(0, len(clip) - 1, min(8, len(clip))).round().long()
        frames += to_pil(clip[steps].permute(0, 3, 1, 2) * 2 - 1)
    return grid(frames, len(frames) // len(chosen_clips))


def prepare_videos(source: Any, protocol: Protocol, network: FeatureNetwork, options: Options, out: Path) -> int:
    """Write the statistics of real videos. Returns how many clips there were."""
    real = clip_set(source, protocol, generated=False)
    found = reference_of(real, protocol, network, write_to=out, cache=False, **options.running)
    return int(found.num or 0)
