"""The set of images that a model is judged by: made in blocks, by any number of processes, resumed after any stop.

    sample_set(pipeline, Path("samples.npz"), num=50_000, seed=0, guidance_scale=2.0)

Image i depends on the seed, on i, on its label and on the settings alone. Where images go, and in what order, is said
in `sample_store.py`.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Sequence
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from tqdm.auto import tqdm

from varkit import __version__
from varkit.config import nearest
from varkit.pictures import UInt8Rule, to_uint8
from varkit.pipelines.auto import best_device
from varkit.pipelines.fingerprint import fingerprint
from varkit.pipelines.sample_store import SampleStore
from varkit.rng import Draw, Rng

if TYPE_CHECKING:
    from accelerate import PartialState

LABEL_RULES = ("cycled", "balanced", "random")
LONGEST_WAIT = timedelta(days=7)
"""For the slowest process and the final writing; torch's own ten minutes are less than a block may take."""


def labels_for(num: int, num_classes: int, rule: str, seed: int) -> list[int]:
    """The class of each image of a set.

    Args:
        rule: `cycled` 0, 1, ..., K-1, 0, 1, ... (TiTok, RAR); `balanced` num / K of class 0, then of class 1, ... (VAR,
            MAR, xAR, FlowAR); `random` drawn for each image from (seed, its index) (LlamaGen, DiT).
    Raises: ValueError for another rule, no images, or a `balanced` count that the classes cannot share.
    """
    if num < 1:
        raise ValueError(f"num must be at least 1; got {num}")
    if rule == "cycled":
        return [i % num_classes for i in range(num)]
    if rule == "balanced":
        if num % num_classes:
            below = num // num_classes * num_classes
            counts = f"{below} or {below + num_classes}" if below else str(num_classes)
            raise ValueError(
                f"{num} images cannot be balanced over {num_classes} classes; make {counts}, or use labels cycled"
            )
        return [i * num_classes // num for i in range(num)]
    if rule == "random":
        u = Rng.from_seed(seed, num).uniform(torch.zeros(1, dtype=torch.int64), Draw.LABEL)[:, 0]
        return (u * num_classes).long().tolist()
    raise ValueError(f"labels must be one of {', '.join(LABEL_RULES)}; got {rule!r}")


def draw(
    pipeline: Any,
    indices: Sequence[int],
    labels: Sequence[int],
    *,
    seed: int,
    rule: UInt8Rule = "round",
    **settings: Any,
) -> Tensor:
    """Some images of the set that `seed` names: uint8 (n, 3, H, W), on the device of the pipeline.

    Args:
        indices: their numbers in the set.   labels: their classes.
        rule: how floats become 8 bits; see `varkit.pictures.to_uint8`.   settings: of the pipeline's sampler.
    Raises: ValueError when they do not fit into memory at once, or one is not finite.
    """
    try:
        rng = Rng.for_keys(seed, torch.tensor(indices))
        tokens = pipeline(class_labels=list(labels), rng=rng, output_type="latent", **settings).images
        with torch.no_grad():
            images = pipeline.image_tokenizer.decode(tokens, rng.to(tokens.device)).float()  # n 3 H W in [-1, 1]
    except torch.OutOfMemoryError:
        raise ValueError(
            f"{len(indices)} images at once do not fit into memory; run the same command with a smaller batch size: "
            "finished blocks are kept"
        ) from None
    broken = (~images.isfinite()).flatten(1).any(1).nonzero().flatten().tolist()
    if broken:
        dtype = str(pipeline.transformer.dtype).removeprefix("torch.")
        raise ValueError(f"image {indices[broken[0]]} holds NaN or infinity, in {dtype}; float32 may help")
    return to_uint8(images, rule)


class SampleSet:
    """N images of a pipeline, and the `store` that they go to.

    Args:
        pipeline: class labels -> images.   out: FILE.npz or FOLDER; see `SampleStore`.
        labels: see `labels_for`.   rule: how floats become 8 bits; see `varkit.pictures.to_uint8`.
        shuffle_seed: of the order in the finished set; None keeps that of the indices.
        batch_size: images made at once.   block_size: images that are written, and lost, together.
        name: what the record calls the model.
        settings: of the pipeline's sampler, such as guidance_scale; None is the model's own.
    Raises: ValueError on a bad argument.
    """

    def __init__(
        self,
        pipeline: Any,
        out: Path,
        *,
        num: int,
        seed: int = 0,
        labels: str = "cycled",
        rule: UInt8Rule = "round",
        shuffle_seed: int | None = 0,
        batch_size: int = 64,
        block_size: int = 256,
        name: str = "",
        **settings: Any,
    ) -> None:
        if not 1 <= batch_size <= block_size:
            raise ValueError(f"batch_size must be 1 to {block_size}, the size of a block; got {batch_size}")
        known = pipeline.sampler.settings()
        for key in settings.keys() - known.keys():
            raise ValueError(f"no setting is called {key!r}{nearest(key, known)}; settings: {', '.join(known)}")
        to_uint8(torch.zeros(1), rule)  # refuses an unknown rule now, not after the first batch
        self.pipeline, self.seed, self.rule, self.batch_size = pipeline, seed, rule, batch_size
        self.settings = {k: v for k, v in settings.items() if v is not None}
        self.labels = labels_for(num, pipeline.transformer.num_classes, labels, seed)
        record = {
            "model": name,
            "weights": fingerprint(pipeline.components),
            "num": num,
            "seed": seed,
            "labels": labels,
            **pipeline.sampler.settings(**self.settings),
            "dtype": str(pipeline.transformer.dtype).removeprefix("torch."),
            "rule": rule,
            "shuffle_seed": shuffle_seed,
            "block_size": block_size,
            "version": __version__,
        }
        self.store = SampleStore(out, record, self.labels, (*pipeline.image_tokenizer.image_size, 3))

    def make_blocks(self, blocks: Sequence[int], progress: bool = False) -> None:
        """Make and write these blocks, one after another.

        Args: progress: a bar that counts the blocks of other processes too.
        Raises: as `images`.
        """
        store, interval = self.store, 0.1 if sys.stderr.isatty() else 30.0  # seconds
        done = store.done() if progress else 0
        with tqdm(total=store.num, initial=done, unit="image", mininterval=interval, disable=not progress) as bar:
            for block in blocks:
                span = store.span(block)
                pixels = np.empty((len(span), *store.shape), np.uint8)
                for first in range(0, len(span), self.batch_size):
                    indices = span[first : first + self.batch_size]
                    pixels[first : first + len(indices)] = self.images(indices)
                    if progress:
                        bar.update(store.done() + first + len(indices) - bar.n)
                store.write_block(block, pixels)

    def images(self, indices: range) -> np.ndarray:
        """Consecutive images of the set: uint8 (n, H, W, 3). Raises: as `draw`."""
        labels = self.labels[indices.start : indices.stop]
        images = draw(self.pipeline, indices, labels, seed=self.seed, rule=self.rule, **self.settings)
        return images.permute(0, 2, 3, 1).cpu().numpy()


class SampledSet(NamedTuple):
    """Where a set is; how many of its images this call made (all processes together); whether it was there before."""

    out: Path
    made: int
    there: bool


def sample_set(
    pipeline: Any,
    out: Path,
    *,
    overwrite: bool = False,
    process_index: int = 0,
    num_processes: int = 1,
    wait: Callable[[], object] | None = None,
    announce: Callable[[str], object] = lambda line: None,
    progress: bool = False,
    **choices: Any,
) -> SampledSet:
    """Make a set of images, or what is missing of it. Every process of a launch calls this alike.

    It is the same set for any number of processes and, but for rounding, any batch size.

    Args:
        overwrite: replace what is at `out`.
        process_index, num_processes, wait: this process, and a barrier of all; needed where there are several.
        announce: told, on the first process and after all checks, what will be made.
        progress: a bar on standard error, on the first process.
        choices: `num` and whatever else `SampleSet` takes.
    Raises: ValueError on a bad argument, or when something else is at `out`, before any work; later as
        `SampleSet.images` and `SampleStore.merge`.
    """
    if wait is None and num_processes > 1:
        raise ValueError(f"{num_processes} processes have to wait for each other; give wait=")
    wait, first = wait or (lambda: None), process_index == 0
    work = SampleSet(pipeline, out, **choices)
    store = work.store
    if store.is_there(overwrite):
        return SampledSet(out, 0, True)
    missing = store.missing()
    made = sum(len(store.span(b)) for b in missing)
    comments = {"device": pipeline.device.type, "batch_size": work.batch_size, "processes": num_processes}
    wait()  # every process has looked before one writes
    if first:
        store.begin(missing, comments)
        choice = ", ".join(f"{k} {v}" for k, v in store.record.items() if k not in ("model", "num"))
        where = f"{comments['device']} x {num_processes}"
        announce(f"{store.record['model']}: {made} of {store.num} images to make on {where}, into {out} ({choice})")
    wait()
    work.make_blocks(missing[process_index::num_processes], progress and first)
    wait()
    if first:
        store.merge(comments)
    wait()
    return SampledSet(out, made, False)


def launched(device: str = "auto") -> PartialState:
    """The processes of this launch, each with its own device, by accelerate.

    Args: device: auto, cpu, cuda or mps.
    Raises: ValueError for a device that this machine does not have, or several processes that do not find each other.
    """
    from accelerate import PartialState
    from accelerate.utils import parse_flag_from_env

    best = best_device().type
    if device not in ("auto", "cpu", best):
        has = "cpu" if best == "cpu" else f"{best} and cpu"
        raise ValueError(f"device {device!r} is not on this machine, which has {has}; auto takes the best")
    use_cpu = "cpu" in (device, best) or bool(parse_flag_from_env("ACCELERATE_USE_CPU"))
    state = PartialState(cpu=use_cpu, timeout=LONGEST_WAIT)
    processes = int(os.environ.get("WORLD_SIZE", 1))
    if state.num_processes != processes:
        raise ValueError(
            f"WORLD_SIZE is {processes}, but accelerate finds {state.num_processes} process on {state.device.type}; "
            "start with accelerate launch or torchrun, on cuda or cpu, or unset WORLD_SIZE"
        )
    return state
