"""`varkit features`: the captions of image sets, encoded once."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from varkit.commands.common import Device, Dtype, Json, refusing, say

if TYPE_CHECKING:
    from torch import Tensor


@refusing
def features(
    data: Annotated[list[str], typer.Argument(help="Images with captions, or token files; several in one folder.")],
    out: Annotated[Path, typer.Option(help="Folder for the features; an unfinished one is gone on with.")],
    encoder: Annotated[str, typer.Option(help="A transformers text encoder, by name or folder.")] = "google/flan-t5-xl",
    max_length: Annotated[int, typer.Option(min=1, help="Tokens kept of a caption.")] = 120,
    split: Annotated[
        list[str] | None, typer.Option(help="train, val, validation or test; repeatable. Default: train.")
    ] = None,
    clean: Annotated[
        bool, typer.Option("--clean/--no-clean", help="Take links, mark-up and codes out first, as LlamaGen does.")
    ] = True,
    strict: Annotated[bool, typer.Option("--strict", help="Refuse captions that are too long.")] = False,
    store: Annotated[str, typer.Option(help="Type of the stored features: float16 or float32.")] = "float16",
    batch_size: Annotated[int, typer.Option(min=1, help="Captions encoded at once.")] = 32,
    shard_size: Annotated[
        int, typer.Option(min=1, help="Captions that are written, or lost at a stop, together.")
    ] = 4096,
    device: Device = "auto",
    dtype: Dtype = "float32",
    as_json: Json = False,
) -> None:
    """Encode the captions of image sets once, for training from text. Run it again to go on after a stop."""
    import torch

    from varkit.pipelines.extract_features import extract_features
    from varkit.pipelines.sample_set import launched

    if dtype not in ("float32", "bfloat16", "float16"):
        raise ValueError(f"--dtype must be float32, bfloat16 or float16; got {dtype!r}")
    state = launched(device)
    began = time.perf_counter()
    result = extract_features(
        encoder,
        data,
        out,
        splits=split or ["train"],
        max_length=max_length,
        clean=clean,
        strict=strict,
        store=store,
        dtype=getattr(torch, dtype),
        device=state.device,
        batch_size=batch_size,
        shard_size=shard_size,
        process_index=state.process_index,
        num_processes=state.num_processes,
        announce=say,
        progress=state.is_main_process and not as_json,
    )
    state.wait_for_everyone()
    seconds = time.perf_counter() - began
    if state.is_main_process:
        if as_json:
            typer.echo(json.dumps({**result._asdict(), "folder": str(out), "seconds": seconds}))
        else:
            whose = "" if state.num_processes == 1 else " by this process"
            typer.echo(
                f"wrote {out}: {result.made} captions{whose} in {seconds:.1f} s, {result.there} were there; "
                f"{result.captions} distinct ones of {result.images} images, {result.empty} images without any, "
                f"{result.cut} cut to {max_length} tokens"
            )
    state.destroy_process_group()


def features_of(given: Sequence[Path], prompts: Sequence[str]) -> dict[str, Tensor]:
    """What `varkit sample --features` names: features (n, E) by prompt or by file.

    Raises: ValueError when a folder lacks a prompt, or prompts come with files; as `read_features`.
    """
    from varkit.conditioning.text import as_read, read_features
    from varkit.data.features import FeatureSet

    if len(given) > 1 or not given[0].is_dir():
        if prompts:
            raise ValueError("--features names files, which stand for prompts; leave --prompt out, or name a folder")
        return {str(path): read_features(path) for path in given}
    stored = FeatureSet(given[0])
    if not prompts:
        raise ValueError(f"{given[0]} holds features of {len(stored)} captions; say which by --prompt")
    numbers = stored.find([as_read(prompt, stored.info.cleaned) for prompt in prompts])
    missing = [prompt for prompt, number in zip(prompts, numbers, strict=True) if number < 0]
    if missing:
        raise ValueError(f"{given[0]} has no features of {missing[0]!r}; without --features the encoder makes them")
    return {prompt: stored[number].float() for prompt, number in zip(prompts, numbers, strict=True)}
