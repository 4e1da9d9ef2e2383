"""Opening networks of transformers for extractors: by hub name or folder, with messages that say what is missing."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch


def open_transformers(
    name: str | Path, openers: tuple[str, ...], device: torch.device | str, what: str
) -> tuple[Any, Any]:
    """The network and its image processor.

    Args:
        name: hub repository, or folder of config.json, preprocessor_config.json and the weights.
        openers: classes of transformers, tried in turn where the one before does not know the architecture.
        what: for people.
    Raises: ImportError without transformers; ValueError naming the file or repository, and where it was looked for.
    """
    try:
        import transformers
    except ImportError:
        raise ImportError(f"{what} needs the package transformers: pip install 'varkit[text]'") from None
    processor = _opened(transformers.AutoImageProcessor.from_pretrained, name, what)
    for i, opener in enumerate(openers):
        try:
            network = _opened(getattr(transformers, opener).from_pretrained, name, what)
            break
        except ValueError as error:
            if i + 1 == len(openers) or "Unrecognized configuration" not in str(error):
                raise
    return network.requires_grad_(False).eval().to(device), processor


def _opened(opener: Callable[..., Any], name: str | Path, what: str) -> Any:
    try:
        return opener(str(name))
    except (OSError, ValueError) as error:
        from huggingface_hub.constants import HF_HUB_CACHE

        path = Path(name)
        if path.is_dir():
            where = f"the folder holds {', '.join(sorted(os.listdir(path))[:8]) or 'nothing'}"
        else:
            where = f"there is no such folder, and it is not in the cache {HF_HUB_CACHE} nor to be had from the hub"
        first = str(error).strip().splitlines()[0].split(". ")[0]
        raise ValueError(
            f"{what}: {str(name)!r} cannot be opened: {where} ({first}). Give the name of a repository of the hub, or "
            "a folder with config.json, preprocessor_config.json and model.safetensors (model=)"
        ) from None
