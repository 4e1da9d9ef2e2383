"""Trajectories of Distilled Decoding: classes, noise and the tokens that the teacher makes of it (arXiv 2412.17153).

They are token files (`varkit.data.codes`) of images that the teacher drew, one view each. The noise of trajectory i is
that of `Rng.for_keys(seed, i)`, so the seed in layout.json is all that is stored of it.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch

from varkit.data.codes import CodeInfo, CodeSet
from varkit.data.shards import LAYOUT_FILE
from varkit.rng import Draw, Rng


@dataclass(frozen=True, kw_only=True)
class TrajectoryInfo(CodeInfo):
    """What `layout.json` says. source is the teacher's name, fingerprint that of its tokenizer.

    teacher: fingerprint of the teacher's configuration and weights.   seed: of the noise.
    sampling: settings that it drew with.   flow_map: the map's.
    """

    kind: ClassVar[str] = "trajectories"
    made_by: ClassVar[str] = "varkit trajectories"

    teacher: str
    seed: int
    sampling: dict[str, Any]
    flow_map: dict[str, Any]


class TrajectorySet(CodeSet):
    """A folder of trajectories; batches as those of `CodeSet` with "noise" (B, L, C) float32 besides."""

    info_class = TrajectoryInfo

    def __getitems__(self, entries: Sequence[int | tuple[int, int]]) -> dict[str, Any]:
        batch = super().__getitems__(entries)
        rng = Rng.for_keys(self.info.seed, self.index[batch["index"]])
        noise = rng.normal(torch.arange(self.layout.length), Draw.NOISE, count=self.layout.dim)
        return {**batch, "noise": noise}

    def __getitem__(self, entry: int | tuple[int, int]) -> dict[str, Any]:
        """One trajectory: as that of `CodeSet`, with "noise" (L, C)."""
        return {**super().__getitem__(entry), "noise": self.__getitems__([entry])["noise"][0]}


def open_codes(folder: str | Path, **options: Any) -> CodeSet:
    """Token files or trajectories, as the folder's layout.json says. Args: options: of `CodeSet`."""
    try:
        kind = json.loads((Path(folder).expanduser() / LAYOUT_FILE).read_text()).get("kind")
    except (ValueError, AttributeError):  # damaged: the reader says so
        kind = None
    return (TrajectorySet if kind == TrajectoryInfo.kind else CodeSet)(folder, **options)
