"""Images as files that the page serves: written whole, once, under a name that follows from their content.

gradio would write an image again each time it is shown, in place: a visitor who reads it meanwhile, because another one
has the same image (coarse scales and examples often are the same), gets a broken answer.
"""

from __future__ import annotations

import hashlib
import inspect
import io
import os
import secrets
import tempfile
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

from PIL import Image

SALT = secrets.token_bytes(16)  # so that nobody can tell from an image whether it was shown here


def keep(data: bytes, name: str, folder: str) -> str:
    """The path of a file with this content.   name: of the file.   folder: gradio's, from which it serves."""
    path = Path(folder).resolve() / hashlib.sha256(SALT + data).hexdigest() / name
    try:
        os.utime(path)  # gradio removes what is old
    except FileNotFoundError:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, part = tempfile.mkstemp(dir=path.parent)
        with os.fdopen(handle, "wb") as file:
            file.write(data)
        os.replace(part, path)
    return str(path)


def kept(value: Any, folder: str) -> Any:
    """`value`, lists, tuples and dictionaries with everything inside, with paths of PNG files for images."""
    if isinstance(value, Image.Image):
        buffer = io.BytesIO()
        value.save(buffer, "PNG")
        return keep(buffer.getvalue(), "image.png", folder)
    if isinstance(value, list | tuple):
        return type(value)(kept(item, folder) for item in value)
    if isinstance(value, dict):
        return {key: kept(item, folder) for key, item in value.items()}
    return value


def keeping(handler: Callable[..., Any], folder: str) -> Callable[..., Any]:
    """A handler, or a generator of answers, that gives files where `handler` gives images."""
    if not inspect.isgeneratorfunction(handler):
        return lambda *values: kept(handler(*values), folder)

    def answers(*values: Any) -> Iterator[Any]:
        with closing(handler(*values)) as events:
            for event in events:
                yield kept(event, folder)

    return answers
