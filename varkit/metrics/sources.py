"""What can be given to be scored: folders, arrays, data sets, tensors, statistics, models, videos as frames."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from varkit.data.hugging_face import PREFIX
from varkit.data.images import DATASETS
from varkit.metrics.protocol import Protocol
from varkit.metrics.reconstruction import takes_lengths
from varkit.metrics.reference import Reference, holds_images, is_statistics, read_statistics
from varkit.metrics.sets import ImageSet, Size, stored_set, tensor_set
from varkit.pictures import to_uint8
from varkit.pipelines.auto import AutoPipeline, find_folder
from varkit.pipelines.best_of import NAMES as BEST_OF
from varkit.pipelines.best_of import BestOf, judge_name
from varkit.rng import Rng


def open_set(
    source: Any,
    protocol: Protocol,
    *,
    split: str | None = None,
    root: str | None = None,
    size: Size | None = None,
    fit: str = "none",
    generated: bool = False,
) -> ImageSet:
    """One set of images, opened and looked at.

    Args: size, fit: real images are made this size by this rule.   generated: videos are cut as generated ones are.
    Raises: FileNotFoundError; ValueError for what is none, or what a score may not be taken of.
    """
    if isinstance(source, ImageSet):
        return source
    if isinstance(source, Tensor):
        return tensor_set(source, rule=protocol.images.quantise)
    if protocol.images.frames:
        from varkit.metrics.evaluate_videos import frames_as_images

        return frames_as_images(source, protocol, generated=generated)
    if isinstance(source, str):  # `fashion-mnist:test`
        name, colon, named = source.rpartition(":")
        if colon and (name in DATASETS or name.startswith(PREFIX) or Path(name).exists()) and name + colon != PREFIX:
            source, split = name, named
    return stored_set(source, split=split, root=root if source in DATASETS else None, size=size, fit=fit)


def model_set(pipeline: Any, name: str, protocol: Protocol, device: torch.device, **settings: Any) -> ImageSet:
    """A model as a set: image i is drawn when it is read, from (seed, i, its class, the settings) alone."""
    from varkit.pipelines.sample_set import draw, labels_for

    rule = protocol.sampling
    labels = labels_for(rule.num, pipeline.transformer.num_classes, rule.labels, rule.seed)
    pipeline.to(device)
    pipeline.set_progress_bar_config(disable=True)

    def read(indices: Sequence[int]) -> Tensor:
        wanted = [labels[i] for i in indices]
        return draw(pipeline, indices, wanted, seed=rule.seed, rule=protocol.images.quantise, **settings).cpu()

    chosen_sampler = settings.get("sampler")  # a name, or a sampler; None is the pipeline's own
    sampler = pipeline.choose_sampler(chosen_sampler, 1)
    used = {k: v for k, v in sampler.settings(**settings).items() if v is not None}
    if chosen_sampler is not None:
        used["sampler"] = chosen_sampler if isinstance(chosen_sampler, str) else type(chosen_sampler).__name__
        if chosen_sampler != "auto":  # which depends on how many images are drawn at once
            settings["sampler"] = sampler  # its networks opened once, not for every batch
    if chosen := {k: settings[k] for k in BEST_OF if settings.get(k) is not None}:
        chooser = BestOf(pipeline, chosen.get("best_of", 1), chosen.get("classifier"), chosen.get("accept"))
        used |= chosen | {"classifier": judge_name(chosen["classifier"])}
        settings["classifier"] = chooser.judge  # opened once, not for every batch
    return ImageSet(
        name=name,
        source=name,
        kind="model",
        channels=None,
        num=rule.num,
        size=tuple(pipeline.image_tokenizer.image_size),
        read=read,
        hash=lambda: "",
        labels=torch.tensor(labels),
        class_names=list(pipeline.labels.values()),
        settings={"seed": rule.seed, "labels": rule.labels, "quantise": protocol.images.quantise, **used},
        threads=0,
    )


def check_lengths(pipeline: Any, lengths: Sequence[int], **settings: Any) -> None:
    """Raises: ValueError where the model cannot stop after so many tokens, or they do not decode."""
    sampler, tokenizer = pipeline.sampler, pipeline.image_tokenizer
    if lengths and "num_tokens" not in sampler.settings():
        raise ValueError(f"{type(sampler).__name__} always draws all tokens: no number of them can be chosen")
    for n in lengths:
        sampler.groups(pipeline.transformer, **settings, num_tokens=n)
        if n < tokenizer.layout.length and not takes_lengths(tokenizer) and len(tokenizer.layout.grids) == 1:
            raise ValueError(
                f"{type(tokenizer).__name__} decodes all of its {tokenizer.layout.length} tokens or none; got {n}"
            )


def reconstructed_set(
    tokenizer: Any, originals: ImageSet, name: str, protocol: Protocol, device: torch.device, length: int | None = None
) -> ImageSet:
    """Originals through a tokenizer and back, when they are read. Args: length: tokens to decode from; None: all."""
    tokenizer.to(device)
    some = {} if length is None else {"lengths": length}

    @torch.no_grad()
    def read(indices: Sequence[int]) -> Tensor:
        tokens = tokenizer.encode(originals.read(indices).to(device).float().div(127.5).sub(1))
        rng = Rng.for_keys(protocol.sampling.seed, torch.tensor(list(indices))).to(device)
        return to_uint8(tokenizer.decode(tokens, rng, **some).float(), protocol.images.quantise).cpu()

    return replace(
        originals,
        name=name if length is None else f"{name}, {length} tokens",
        source=name,
        kind="reconstructions",
        channels=None,
        read=read,
        hash=lambda: "",
        threads=0,
        settings={} if length is None else {"length": length},
    )


def is_model(source: Any) -> bool:
    """A shipped model or a saved pipeline."""
    return hasattr(source, "sampler") or (isinstance(source, str | Path) and find_folder(source) is not None)


def open_generated(
    source: Any,
    protocol: Protocol,
    device: torch.device,
    *,
    guidance: Sequence[float] = (),
    lengths: Sequence[int] = (),
    steps: Sequence[int] = (),
    sampling: dict[str, Any],
    bounds: str | None = None,
    root: str | None = None,
) -> list[ImageSet]:
    """The sets to be scored; a model gives one for every guidance scale, number of steps and number of tokens.

    Raises: ValueError for sampler settings without a model to sample, and as `check_lengths`, the sampler and
        `open_set`.
    """
    pipeline = None
    sets: list[ImageSet] = []
    if is_model(source):
        pipeline = source if hasattr(source, "sampler") else AutoPipeline.from_pretrained(source)
        name = type(pipeline).__name__ if pipeline is source else str(source)
        fixed = {k: v for k, v in sampling.items() if v is not None}
        check_lengths(pipeline, lengths, **fixed)
        for wanted in steps:  # what the sampler cannot do is refused before anything is drawn
            pipeline.sampler.count_steps(pipeline.transformer, **fixed, num_steps=wanted)
        for w, count, n in itertools.product(guidance or (None,), steps or (None,), lengths or (None,)):
            asked = {"guidance_scale": w, "num_steps": count, "num_tokens": n}
            settings = fixed | {k: v for k, v in asked.items() if v}
            one = model_set(pipeline, name, protocol, device, **settings)
            built_in = "times" in one.settings  # a student has learned its teacher's guidance
            title = name if built_in else f"{name}, guidance {one.settings['guidance_scale']:g}"
            title += f", {count} step{'s'[: count != 1]}" if count else ""
            if "classifier" in one.settings:
                title += f", best of {one.settings.get('best_of', 1)} by {one.settings['classifier']}"
            sets.append(replace(one, name=title if n is None else f"{title}, {n} tokens"))
    elif guidance or steps or lengths or any(v is not None for v in sampling.values()):
        raise ValueError(f"{source} is no model (a shipped name or a pipeline folder): there is nothing to sample")
    else:
        many = isinstance(source, list | tuple)
        sets = [_open_given(one, protocol, root) for one in (source if many else [source])]
    if bounds is not None:
        real = open_set(bounds, protocol, root=root, size=sets[0].size, fit=protocol.images.fit)
        if len(real) > protocol.sampling.num:
            real = replace(
                real,
                num=protocol.sampling.num,
                labels=None if real.labels is None else real.labels[: protocol.sampling.num],
            )
        around = [replace(real, name=f"{bounds}: real images", bound=True)]
        if pipeline is not None:
            tokenizer, text = pipeline.image_tokenizer, f"{bounds}: reconstructions"
            some = lengths if takes_lengths(tokenizer) else ()
            around += [reconstructed_set(tokenizer, real, text, protocol, device, n) for n in some or (None,)]
        sets = around + sets
    return sets


def _open_given(source: Any, protocol: Protocol, root: str | None) -> ImageSet:
    """A set to be scored. Files must have the right size; real images of a named data set are given it."""
    named = isinstance(source, str) and source.split(":")[0] in DATASETS and len(protocol.images.sizes) == 1
    size, fit = (protocol.images.sizes[0], protocol.images.fit) if named else (None, "none")
    return open_set(source, protocol, generated=True, root=root, size=size, fit=fit)


def open_reference(
    source: Any, protocol: Protocol, *, size: Size, split: str | None = None, root: str | None = None
) -> ImageSet | Reference:
    """A set of real images, or a file of statistics. Raises: as `open_set` and `read_statistics`."""
    if isinstance(source, Reference):
        return source
    if isinstance(source, str | Path) and is_statistics(Path(source)):
        found = read_statistics(Path(source))
        if holds_images(Path(source)):  # as the ADM evaluator has them, for precision and recall
            found.images = stored_set(source)
        return found
    return open_set(source, protocol, split=split, root=root, size=size, fit=protocol.images.fit)
