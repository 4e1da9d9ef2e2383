"""What can be given to be scored as clips: videos in files, folders and arrays, named sets, models.

Shapes: B clips, T frames, H W pixels.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from varkit.conditioning.label import LabelCondition
from varkit.data.clip_layouts import find_clips
from varkit.data.clip_rules import ClipBatches, ClipRule, clips, cover_and_crop, to_bytes
from varkit.data.clips import CLIP_DATASETS, open_clips
from varkit.data.moving import MovingFashion
from varkit.data.video import VideoSet, open_videos
from varkit.metrics.protocol import ClipRules, Protocol
from varkit.metrics.reference import chosen
from varkit.metrics.sets import ImageSet, hash_arrays
from varkit.pictures import to_uint8
from varkit.rng import Rng


def open_labelled(
    source: Any, split: str | None = None, root: str | None = None, size: tuple[int, int] | None = None
) -> tuple[VideoSet, Tensor | None, Sequence[str]]:
    """Videos, their class ids (N,) where all have one, and the names of the classes.

    Args:
        source: a `VideoSet`, an array, a named set (`moving-fashion`, `moving-fashion:test`), or what `find_clips`
            takes, also with `:SPLIT` behind it.   split, root: of a named set, or a source that has splits.
        size: of clips that are computed.
    Raises: as `open_videos`; ValueError where a file is empty: a score of the others would be another number.
    """
    if isinstance(source, MovingFashion):
        return source, torch.from_numpy(source.labels), source.classes
    if isinstance(source, VideoSet):
        return source, None, ()
    if not isinstance(source, str | Path):
        return open_videos(source), None, ()
    text = str(source)
    name, colon, named = text.rpartition(":")
    if colon and (name in CLIP_DATASETS or Path(name).exists()):
        text, split = name, named
    if text in CLIP_DATASETS:
        found = open_clips(text, split=split or "train", root=root, size=size)
        return found.videos, found.labels, found.classes
    if not Path(text).expanduser().exists():
        return open_videos(text), None, ()  # raises, saying what is near
    layout = find_clips(text, split or "train")
    if layout.dropped:
        named = "; ".join(f"{path}: {reason}" for path, reason in layout.dropped[:5])
        raise ValueError(f"{text}: {len(layout.dropped)} videos cannot be read ({named}); replace or remove them")
    labels = layout.labels if bool((layout.labels >= 0).all()) else None
    return layout.videos, labels, layout.classes


def clip_set(
    source: Any,
    protocol: Protocol,
    *,
    generated: bool,
    split: str | None = None,
    root: str | None = None,
    size: tuple[int, int] | None = None,
    frames: int | None = None,
    scored: bool = True,
) -> ImageSet:
    """Videos as a set of clips, (T, H, W, 3) each; headers are read and lengths and sizes checked now.

    Args:
        split, root, size: see `open_labelled`.   frames: instead of the protocol's.
        scored: brought to `clips.score_size` too, where the protocol has one.
    Raises: FileNotFoundError; ImportError without PyAV; ValueError as `varkit.data.clip_rules.clips`.
    """
    if isinstance(source, ImageSet):
        return source
    rule = protocol.clips
    videos, labels, names = open_labelled(source, split, root, size)
    start = rule.start_generated if generated else rule.start_real
    stride = rule.stride if generated or rule.stride_real is None else rule.stride_real
    cut = ClipRule(frames=frames or rule.frames, stride=stride, start=start, short=rule.short, seed=rule.seed)
    covered = rule.load_size if rule.load == "cover" else None
    plan = clips(videos, cut, resize=covered, quantize=rule.quantise if covered else "none")
    if not generated and rule.real is not None:
        if len(plan.plan) < rule.real:
            raise ValueError(
                f"{videos.source} holds {len(plan.plan):,} videos that are long enough; the protocol {protocol.name} "
                f"takes {rule.real:,} real ones (--set clips.real=null takes all)"
            )
        plan.plan = [plan.plan[i] for i in chosen(len(plan.plan), rule.real)]
    made = as_set(plan, (cut.frames,), any_size=rule.load_size is not None)
    if labels is not None:
        made.labels = labels[[index for index, _, _ in plan.plan]]
        made.class_names = list(names)
    return fitted(made, rule, cover=False, scored=scored)


def as_set(plan: ClipBatches, frames: tuple[int, ...], any_size: bool = False) -> ImageSet:
    """The clips of a plan; of one size, unless `any_size` will be brought to one. Raises ValueError."""
    videos = plan.videos
    size = videos.size(plan.plan[0][0]) if plan.resize is None else (plan.resize, plan.resize)
    if plan.resize is None and not any_size:
        for index, _, _ in plan.plan:
            if videos.size(index) != size:
                (h, w), (a, b) = size, videos.size(index)
                first, other = videos.names[plan.plan[0][0]], videos.names[index]
                raise ValueError(
                    f"{videos.source}: {first} is {h}x{w}, {other} {a}x{b}; a score needs one size, or a protocol with "
                    "clips.load_size"
                )
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


def fitted(made: ImageSet, rule: ClipRules, *, cover: bool, scored: bool = True) -> ImageSet:
    """Clips at the sizes of a protocol: squashed to `load_size` (or covering it, where that is not done yet), and then
    brought to `score_size`."""
    steps: list[tuple[int, Callable[[Tensor, int], Tensor]]] = []
    if rule.load_size is not None and (cover or rule.load == "squash"):
        steps.append((rule.load_size, _covered if rule.load == "cover" else _squashed))
    if rule.score_size is not None and scored:
        steps.append((rule.score_size, _squashed))
    if not steps:
        return made
    inner, bytes_after = made.read, rule.quantise == "truncate"

    def one(clip: Tensor) -> Tensor:
        values = (clip if clip.is_floating_point() else clip.float() / 255).permute(0, 3, 1, 2)  # T 3 H W
        for side, bring in steps:
            values = bring(values, side)
        values = values.permute(0, 2, 3, 1).contiguous()
        return to_bytes(values) if bytes_after else values

    def read(indices: Sequence[int]) -> Tensor:
        return torch.cat([torch.stack([one(clip) for clip in inner([i])]) for i in indices])

    about = f"{steps[-1][0]} {[side for side, _ in steps]} {rule.load} {rule.quantise}"
    digest, side = made.hash, steps[-1][0]
    return replace(
        made,
        read=read,
        size=(made.size[0], side, side),
        hash=lambda: hashlib.blake2b(f"{digest()} {about}".encode(), digest_size=16).hexdigest(),
    )


def _covered(frames: Tensor, side: int) -> Tensor:
    return cover_and_crop(frames, side, antialias=True)


def _squashed(frames: Tensor, side: int) -> Tensor:
    """Straight to a square, as torchvision's Resize does it: bilinear with antialias."""
    if tuple(frames.shape[-2:]) == (side, side):
        return frames
    return F.interpolate(frames, (side, side), mode="bilinear", align_corners=False, antialias=True).clamp(0, 1)


def _hash(plan: ClipBatches) -> str:
    """Of the files, and of how clips are cut from them."""
    parts = [f"{plan.plan} {plan.rule} {plan.resize} {plan.quantize}"]
    if isinstance(plan.videos, MovingFashion):
        clips_of = plan.videos
        parts += [hash_arrays(clips_of.garments), f"{clips_of.seed} {clips_of.held_out} {clips_of.side}"]
        return hashlib.blake2b(" ".join(parts).encode(), digest_size=16).hexdigest()
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


def first_clips(clips_of: ImageSet, num: int) -> ImageSet:
    """The first so many, where there are more."""
    if len(clips_of) <= num:
        return clips_of
    return replace(clips_of, num=num, labels=None if clips_of.labels is None else clips_of.labels[:num])


# ---- models -------------------------------------------------------------------------------------------------------


def model_clips(
    pipeline: Any, name: str, protocol: Protocol, device: torch.device, real: ImageSet | None, **settings: Any
) -> ImageSet:
    """A model of clips as a set: clip i is drawn when it is read, from (seed, i, its class or frames, the settings).

    Args: real: clips whose classes (`sampling.labels: reference`) or first frames (`clips.given`) it is given, in turn.
    Raises: ValueError where the protocol needs real clips, or what they do not have; or for more frames than can be.
    """
    from varkit.pipelines.sample_set import labels_for

    rule, cut = protocol.sampling, protocol.clips
    classes = getattr(pipeline.transformer, "num_classes", None) or 0
    if pipeline.transformer.condition == "frames" and not cut.given:
        raise ValueError(f"{name} predicts what follows first frames: take a protocol with clips.given, such as 5")
    needs = [n for n, on in (("clips.given", cut.given), ("labels: reference", rule.labels == "reference")) if on]
    if needs and real is None:
        raise ValueError(f"{needs[0]} of {protocol.name} is taken from real clips: give videos, no file of statistics")
    labels: list[int] | None = None
    if classes and not cut.given:
        if rule.labels != "reference":
            labels = labels_for(rule.num, classes, rule.labels, rule.seed)
        elif real is None or real.labels is None:
            raise ValueError(
                f"{protocol.name} draws the classes of the real clips, but these have none "
                f"(--set sampling.labels=cycled takes all classes in turn)"
            )
        else:
            labels = [int(real.labels[i % len(real)]) for i in range(rule.num)]
            LabelCondition(classes).encode(class_labels=labels)
    pipeline.to(device)
    pipeline.set_progress_bar_config(disable=True)
    frames = (cut.frames - 1) * cut.stride + 1
    longer = {"num_frames": frames} if frames > pipeline.num_frames else {}
    pipeline.plan(cut.given, longer.get("num_frames"), None)
    used = pipeline.sampler.settings(**pipeline.check_settings(settings))

    def read(indices: Sequence[int]) -> Tensor:
        more: dict[str, Any] = dict(longer)
        if labels is not None:
            more["class_labels"] = [labels[i] for i in indices]
        elif not cut.given:
            more["num_videos_per_prompt"] = len(indices)
        if cut.given and real is not None:
            first = real.read([i % len(real) for i in indices])[:, : cut.given]
            more |= {"frames": _as_given(first, pipeline.image_tokenizer.image_size), "keep_given": False}
        rng = Rng.for_keys(rule.seed, torch.tensor(list(indices)))
        videos = pipeline(rng=rng, output_type="pt", **more, **settings).videos  # B T 3 H W in [0, 1]
        broken = (~videos.isfinite()).flatten(1).any(1).nonzero().flatten().tolist()
        if broken:
            raise ValueError(f"clip {indices[broken[0]]} holds NaN or infinity; float32 may help")
        pixels = videos[:, :frames][:, :: cut.stride].permute(0, 1, 3, 4, 2).float().cpu()
        return to_uint8(pixels * 2 - 1, protocol.images.quantise) if cut.load_size is None else pixels.clamp(0, 1)

    about = {"seed": rule.seed, "labels": rule.labels if labels is not None else "none"}
    if cut.given:
        about |= {"given": cut.given}
    made = ImageSet(
        name=name,
        source=name,
        kind="model",
        channels=None,
        num=rule.num,
        size=(cut.frames, *pipeline.image_tokenizer.image_size),
        read=read,
        hash=lambda: "",
        labels=None if labels is None else torch.tensor(labels),
        class_names=list(pipeline.labels.values()),
        settings={**about, **{k: v for k, v in used.items() if v is not None}},
        threads=0,
        title="clip {}".format,
    )
    return fitted(made, cut, cover=True)


def _as_given(frames: Tensor, size: tuple[int, int]) -> Any:
    """Real frames (B, t, H, W, 3), uint8 or in [0, 1], as a pipeline takes them."""
    if not frames.is_floating_point():
        return frames.numpy()
    if tuple(frames.shape[2:4]) == size:
        return frames.permute(0, 4, 1, 2, 3) * 2 - 1
    return np.asarray(to_uint8(frames * 2 - 1))
