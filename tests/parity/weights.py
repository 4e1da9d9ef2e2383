"""Fixture files: weights computed from key, rule and seed; recorded inputs and outputs.

A fixture stores, for every key of the reference model's state dict, its shape and a fill rule. numpy's
RandomState stream is frozen by its compatibility policy, so the same values come out everywhere.
"""

from __future__ import annotations

import json
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor


def fill(key: str, shape: list[int], rule: dict[str, Any], seed: int) -> Tensor:
    """`constant` is mean everywhere; `normal` mean + std z; `positive` mean + std |z|."""
    if rule["kind"] == "constant":
        return torch.full(shape, rule["mean"], dtype=torch.float32)
    stream = np.random.RandomState((zlib.crc32(key.encode()) ^ seed) & 0x7FFFFFFF)
    z = stream.standard_normal(int(np.prod(shape, dtype=np.int64))).astype(np.float32).reshape(shape)
    if rule["kind"] == "positive":
        z = np.abs(z)
    elif rule["kind"] != "normal":
        raise ValueError(f"{key}: unknown fill kind {rule['kind']!r}")
    return torch.from_numpy((np.float32(rule["mean"]) + np.float32(rule["std"]) * z).astype(np.float32))


@dataclass
class Fixture:
    """One recorded configuration of one system."""

    meta: dict[str, Any]
    state: dict[str, Tensor]
    tensors: dict[str, Tensor]

    def part(self, prefix: str) -> dict[str, Tensor]:
        """The weights under `prefix`, without it."""
        return {k.removeprefix(prefix): v for k, v in self.state.items() if k.startswith(prefix)}


@dataclass
class Case:
    """One recorded call."""

    fixture: Fixture
    name: str

    @property
    def meta(self) -> dict[str, Any]:
        return self.fixture.meta["cases"][self.name]

    @property
    def settings(self) -> dict[str, Any]:
        return self.meta.get("settings", {})

    def _side(self, side: str) -> dict[str, Tensor]:
        prefix = f"{self.name}/{side}/"
        return {k.removeprefix(prefix): v for k, v in self.fixture.tensors.items() if k.startswith(prefix)}

    @property
    def inputs(self) -> dict[str, Tensor]:
        return self._side("in")

    @property
    def outputs(self) -> dict[str, Tensor]:
        return self._side("out")


def load_fixture(path: Path) -> Fixture:
    meta = json.loads(path.with_suffix(".json").read_text())
    stored = load_file(path.with_suffix(".safetensors"))
    state = {}
    for key, entry in meta.get("weights", {}).items():
        if entry["fill"]["kind"] == "stored":
            state[key] = stored[f"state/{key}"].reshape(entry["shape"])  # scalars are stored with shape [1]
        else:
            state[key] = fill(key, entry["shape"], entry["fill"], meta["seed"])
    return Fixture(meta, state, {k: v for k, v in stored.items() if not k.startswith("state/")})
