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
        _weights(digest, part)
    return digest.hexdigest()


def _weights(digest: Any, part: nn.Module) -> None:
    for key, tensor in part.state_dict().items():
        some = tensor.detach().flatten()[:: max(1, -(-tensor.numel() // LOOK))].contiguous().cpu()
        digest.update(f"{key} {tensor.dtype} {tuple(tensor.shape)}".encode() + some.view(torch.uint8).numpy().data)


def tokenizer_fingerprint(tokenizer: Any) -> str:
    """That of a tokenizer: codes and latents of one are nothing to another, though their layouts be the same."""
    return fingerprint({"image_tokenizer": tokenizer})


def encoder_fingerprint(encoder: nn.Module, tokenizer: Any) -> str:
    """That of a text encoder and its tokenizer: 16 hex digits of the weights and of the ids of a sentence."""
    ids = tokenizer("The quick brown fox, 12 of them, jumps over a lazy dog!")["input_ids"]
    digest = hashlib.blake2b(f"{type(encoder).__name__} {len(tokenizer)} {ids}".encode(), digest_size=8)
    _weights(digest, encoder)
    return digest.hexdigest()
