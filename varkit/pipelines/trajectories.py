"""Trajectories of a teacher, for distilling it: sharded, resumable, by any number of processes.

    make_trajectories("fashion-var", Path("trajectories"), num=20_000)

Tokens are drawn by the map of `varkit.samplers.flow_map` instead of at random, so they are a function of the noise, and
have the law that the teacher's settings (guidance, top-k, top-p) give them.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from tqdm.auto import tqdm

from varkit.conditioning.label import LabelCondition
from varkit.data.codes import shard_is_whole, storage_dtype, write_shard
from varkit.data.trajectories import TrajectoryInfo
from varkit.interfaces import Generator
from varkit.pipelines.auto import AutoPipeline
from varkit.pipelines.fingerprint import fingerprint, tokenizer_fingerprint
from varkit.rng import Rng
from varkit.samplers.flow_map import FlowMap, start_noise

WITHOUT_MEANING = ("more_smooth", "num_tokens", "order")
"""Settings of the sampler that a trajectory cannot have: its tokens are ids, all of them, in the layout's order."""


class Made(NamedTuple):
    """What `make_trajectories` did: how many there are in all, were made now, and were there before."""

    folder: Path
    trajectories: int
    made: int
    there: int


def make_trajectories(
    teacher: Any,
    out: Path,
    *,
    num: int,
    name: str | None = None,
    seed: int = 0,
    flow_map: FlowMap | None = None,
    batch_size: int = 64,
    shard_size: int = 1024,
    process_index: int = 0,
    num_processes: int = 1,
    announce: Callable[[str], None] | None = None,
    progress: bool = False,
    **sampling: Any,
) -> Made:
    """Write `num` trajectories, classes in turn; what is there already is kept, so a stopped run goes on.

    A trajectory does not depend on batch, shard or process, but for rounding. Shards go to processes in turn.

    Args:
        teacher: a pipeline on its device, or a name that `AutoPipeline` takes.   name: what the record calls it.
        seed: of the noise.   flow_map: None is 50 steps of Heun.
        shard_size: trajectories that are written, or lost at a stop, together.
        process_index, num_processes: of a launch.   announce: told what is there already.
        sampling: settings of the teacher's sampler, None is its own.
    Raises: ValueError when the teacher does not draw ids group by group, on a setting that makes no sense here, or
        when the folder holds trajectories that were made otherwise.
    """
    if isinstance(teacher, str):
        name, teacher = name or teacher, AutoPipeline.from_pretrained(teacher)
    require_teacher(teacher)
    flow_map = FlowMap() if flow_map is None else flow_map
    settings = teacher.sampler.settings(**sampling)
    for key in WITHOUT_MEANING:
        if settings[key]:
            raise ValueError(f"{key}={settings[key]} makes no sense of trajectories: leave it off")
    transformer, tokenizer = teacher.transformer, teacher.image_tokenizer
    storage = storage_dtype(tokenizer.layout)
    labels = teacher.labels
    info = TrajectoryInfo(
        layout=tokenizer.layout.to_dict(),
        tokenizer=name or type(tokenizer).__name__,
        fingerprint=tokenizer_fingerprint(tokenizer),
        source=name or type(transformer).__name__,
        split="train",
        count=num,
        shard_size=shard_size,
        classes=[labels.get(i, str(i)) for i in range(transformer.num_classes)],
        views=["drawn"],
        dtype=str(storage).removeprefix("torch."),
        teacher=fingerprint({"transformer": transformer}),
        seed=seed,
        sampling={k: list(v) if isinstance(v, tuple) else v for k, v in settings.items() if k not in WITHOUT_MEANING},
        flow_map=asdict(flow_map),
    )
    info.begin(out)
    mine = range(process_index, info.shards, num_processes)
    wanted = [k for k in mine if not shard_is_whole(out, info, k)]
    made = sum(len(info.entries(k)) for k in wanted)
    there = sum(len(info.entries(k)) for k in mine) - made
    if there and announce is not None:
        announce(f"{there} trajectories are there already")
    with tqdm(total=made, unit="trajectory", disable=not progress, file=sys.stderr) as bar:
        for shard in wanted:
            index = torch.tensor(info.entries(shard))
            classes = index % transformer.num_classes
            parts = []
            for rows in torch.arange(len(index)).split(batch_size):
                parts.append(draw(teacher, classes[rows], Rng.for_keys(seed, index[rows]), flow_map, settings))
                bar.update(len(rows))
            write_shard(out, shard, torch.cat(parts)[:, None].to(storage), classes, index)
    return Made(out, num, made, there)


def require_teacher(pipeline: Any) -> None:
    """Raises ValueError unless its generator draws single ids of classes, group by group."""
    transformer = pipeline.transformer
    draws = isinstance(transformer, Generator) and transformer.sampler == "NextGroupSampler"
    if not draws or transformer.condition != "class" or not isinstance(transformer.layout.codebook_size, int):
        raise ValueError(
            f"a teacher draws ids of one codebook, group by group, from classes (VAR, LlamaGen); "
            f"{type(transformer).__name__} ({transformer.layout.describe()}) does not"
        )


@torch.no_grad()
def draw(pipeline: Any, classes: Tensor, rng: Rng, flow_map: FlowMap, settings: dict[str, Any]) -> Tensor:
    """The tokens (B, L), on the CPU, that the teacher makes of the noise of `rng`."""
    transformer, tokenizer = pipeline.transformer, pipeline.image_tokenizer
    device = next(transformer.parameters()).device
    condition, rng = LabelCondition(transformer.num_classes), rng.to(device)
    cond = condition.encode(class_labels=classes).to(device)
    drawn = flow_map.drawing(start_noise(rng, transformer.layout), tokenizer.codebook)
    null = condition.null(cond)
    out = pipeline.sampler.generate(tokenizer, transformer, cond, rng, null=null, draw=drawn, **settings)
    return out.tokens.cpu()
