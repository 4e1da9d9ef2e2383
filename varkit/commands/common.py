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
