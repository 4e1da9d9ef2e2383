"""What the commands share: options of one meaning, and how bad input ends."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Annotated, Any

import typer

Json = Annotated[bool, typer.Option("--json", help="Print one JSON object instead of text.")]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda or mps.")]
Dtype = Annotated[str, typer.Option(help="float32, bfloat16 or float16.")]


def refusing(function: Callable[..., None]) -> Callable[..., None]:
    """Bad input ends in one line on standard error and exit code 2."""

    @functools.wraps(function)
    def wrapped(*args: Any, **kwargs: Any) -> None:
        try:
            function(*args, **kwargs)
        except BrokenPipeError:  # whoever reads has seen enough
            raise typer.Exit(1) from None
        except (ValueError, OSError, ImportError) as error:
            typer.echo(f"error: {error}", err=True)
            raise typer.Exit(2) from None

    return wrapped


def say(text: str) -> None:
    typer.echo(text, err=True)


def numbers(text: str | None, option: str, kind: type[Any]) -> list[Any]:
    """`1,1.5,2` -> numbers."""
    try:
        return [kind(part) for part in text.split(",")] if text else []
    except ValueError:
        raise ValueError(f"{option} {text!r} must be numbers separated by commas, such as 1,2,4") from None


def open_pipeline(name: str, device: str, dtype: str) -> Any:
    """Any pipeline by name, on its device. Raises ValueError on another dtype; as `AutoPipeline.from_pretrained`."""
    import torch
    from diffusers.utils.logging import disable_progress_bar

    from varkit.pipelines.auto import AutoPipeline, best_device

    if dtype not in ("float32", "bfloat16", "float16"):
        raise ValueError(f"--dtype must be float32, bfloat16 or float16; got {dtype!r}")
    disable_progress_bar()  # the parts of a pipeline load in a moment
    pipeline = AutoPipeline.from_pretrained(name, dtype=getattr(torch, dtype))
    pipeline.to(best_device() if device == "auto" else torch.device(device))
    pipeline.set_progress_bar_config(disable=True)
    return pipeline
