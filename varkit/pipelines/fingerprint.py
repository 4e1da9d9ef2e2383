"""A short name for networks with their weights, by which files made by them are recognised."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

LOOK = 1024
"""Values of a tensor that its fingerprint reads."""


def fingerprint(networks: Mapping[str, Any]) -> str:
    """16 hex digits of configurations and of up to 1024 values of each tensor. What is no network is left out."""
    digest = hashlib.blake2b(digest_size=8)
    for name, part in sorted(networks.items()):
        if not isinstance(part, nn.Module):
            continue
        values: Any = part.config
        config = {k: v for k, v in values.items() if not k.startswith("_")}
        digest.update(f"{name} {type(part).__name__} {json.dumps(config, sort_keys=True, default=str)}".encode())
        for key, tensor in part.state_dict().items():
            some = tensor.detach().flatten()[:: max(1, -(-tensor.numel() // LOOK))].contiguous().cpu()
            digest.update(f"{key} {tensor.dtype} {tuple(tensor.shape)}".encode() + some.view(torch.uint8).numpy().data)
    return digest.hexdigest()


def tokenizer_fingerprint(tokenizer: Any) -> str:
    """That of a tokenizer: codes and latents of one are nothing to another, though their layouts be the same."""
    return fingerprint({"image_tokenizer": tokenizer})
