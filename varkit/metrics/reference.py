"""The other side of a score: stored statistics, or a set of images whose features are taken once and cached.

A file of statistics is an .npz of `mu` (D,) and `sigma` (D, D); with `mu_s`, `sigma_s` for the spatial features, as the
ADM evaluator has them, and images `arr_0` for precision and recall. Those written here hold, besides, `num`, the
`features` of all or of some of the images, and in `about` by which network they were made.
"""

from __future__ import annotations

import hashlib
import json
import os
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from varkit.config import to_dict
from varkit.data.fashion import cache_folder
from varkit.metrics.collect import Collected, Wanted, collect, gathered, process
from varkit.metrics.fid import FeatureStatistics, Gaussian
from varkit.metrics.networks import FeatureNetwork
from varkit.metrics.protocol import Protocol
from varkit.metrics.sets import ImageSet, hash_arrays

FEATURES_KEPT = 50_000
"""Real images whose features are kept, at most; a random choice of more."""
MOMENTS = {"features": ("mu", "sigma"), "spatial": ("mu_s", "sigma_s")}


@dataclass
class Reference:
    """gaussians: output -> its normal distribution.   features: (n, D) of all or some images, or None.

    num: images, or None where a file of statistics does not say.   indices: which images the features are of.
    images: the set itself, where there is one.   about: the network and input rule it was made by; empty if unknown.
    """

    source: str
    kind: str
    hash: str
    num: int | None = None
    gaussians: dict[str, Gaussian] = field(default_factory=dict)
    features: Tensor | None = None
    indices: list[int] = field(default_factory=list)
    images: ImageSet | None = None
    about: dict[str, Any] = field(default_factory=dict)

    def facts(self) -> dict[str, Any]:
        return {"source": self.source, "kind": self.kind, "num": self.num, "hash": self.hash}


def is_statistics(path: Path) -> bool:
    """An .npz that holds a mean and a covariance."""
    if path.suffix != ".npz" or not path.is_file() or not zipfile.is_zipfile(path):
        return False
    with zipfile.ZipFile(path) as file:
        return {"mu.npy", "sigma.npy"} <= set(file.namelist())


def holds_images(path: Path) -> bool:
    """An .npz with `arr_0`."""
    with zipfile.ZipFile(path) as file:
        return "arr_0.npy" in file.namelist()


def read_statistics(path: Path) -> Reference:
    """A file of statistics; images in it are left where they are.

    Raises: ValueError, naming the file, where the moments are damaged, of wrong shapes, or no covariance.
    """
    try:
        with np.load(path, allow_pickle=False) as file:
            moments = {k: torch.from_numpy(file[k]) for pair in MOMENTS.values() for k in pair if k in file}
            about = json.loads(str(file["about"])) if "about" in file else {}
            num = int(file["num"]) if "num" in file else None
            features = torch.from_numpy(file["features"]) if "features" in file else None
            indices = file["indices"].tolist() if "indices" in file else []
        gaussians = {}
        for output, (mean, covariance) in MOMENTS.items():
            if mean in moments and covariance in moments:
                gaussians[output] = Gaussian.from_moments(moments[mean], moments[covariance])
    except Exception as error:  # a damaged archive raises all kinds of things
        if isinstance(error, OSError) and error.errno is not None:
            raise
        raise ValueError(f"{path} is no file of statistics (mu, sigma) that can be used: {error}") from error
    if features is not None and features.shape[0] == num and num <= features.shape[1]:  # exact where rank is low
        gaussians["features"] = _fitted(features, about.get("frechet", {}))
    digest = hash_arrays(*(moments[k].numpy() for k in sorted(moments)))
    return Reference(str(path), "statistics", digest, num, gaussians, features, indices, None, about)


def write_statistics(path: Path, collected: Collected, *, indices: list[int], about: dict[str, Any]) -> None:
    """As `read_statistics` wants them, uncompressed, atomically."""
    arrays: dict[str, Any] = {"num": np.asarray(collected.num), "about": np.asarray(json.dumps(about))}
    for output, names in MOMENTS.items():
        if output in collected.statistics:
            pair = collected.statistics[output].mean_and_covariance()
            arrays |= {name: value.numpy() for name, value in zip(names, pair, strict=True)}
    if "features" in collected.rows:
        arrays |= {"features": collected.rows["features"].numpy(), "indices": np.asarray(indices)}
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        with part.open("wb") as file:
            np.savez(file, **arrays)
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


def _fitted(features: Tensor, settings: Mapping[str, Any]) -> Gaussian:
    types = {k: getattr(torch, settings[k]) for k in ("mean_dtype", "dtype") if k in settings}
    statistics = FeatureStatistics(features.shape[1], ddof=settings.get("ddof", 1), **types)
    statistics.update(features)
    return statistics.gaussian()


def chosen(count: int, most: int) -> list[int]:
    """Which of `count` images to keep features of: all, or a random `most` of them, in order."""
    if count <= most:
        return list(range(count))
    return sorted(np.random.RandomState(0).permutation(count)[:most].tolist())


def about_of(protocol: Protocol, network: FeatureNetwork) -> dict[str, Any]:
    """By what statistics are made: they serve no other network, weights, input rule or covariance."""
    rules = {k: v for k, v in protocol.to_dict().items() if k in ("network", "clips")}
    return {**rules, "frechet": to_dict(protocol.frechet), "sha256": network.sha256}


def reference_of(
    images: ImageSet,
    protocol: Protocol,
    network: FeatureNetwork,
    *,
    statistics: Sequence[str] = ("features",),
    rows: bool = True,
    cache: bool = True,
    write_to: Path | None = None,
    **running: Any,
) -> Reference:
    """The reference that a set of real images is.

    Args:
        statistics: outputs whose moments are wanted.   rows: keep single features too.
        cache: read them from, and write them to, the cache folder.   write_to: a file to write them to, besides.
        running: `batch_size`, `device` and `progress` of `collect`.
    """
    digest = images.hash()
    about = about_of(protocol, network)
    indices = chosen(len(images), FEATURES_KEPT) if rows else []
    file = cache_file(digest, {**about, "statistics": sorted(statistics), "rows": rows})
    if cache and write_to is None and file.is_file():
        found = read_statistics(file)
        return replace(found, source=images.source, kind=images.kind, hash=digest, images=images)
    settings = statistics_settings(protocol)
    wanted = Wanted(dict.fromkeys(statistics, settings), {"features"} if rows else set(), indices)
    made = gathered(
        collect(network, images, range(len(images)), wanted, process=process(), what="reference", **running)
    )
    if process()[0] == 0:
        for path in ([file] if cache else []) + ([write_to] if write_to else []):
            write_statistics(path, made, indices=indices, about=about)
    gaussians = {name: found.gaussian() for name, found in made.statistics.items()}
    features = made.rows.get("features")
    return Reference(images.source, images.kind, digest, made.num, gaussians, features, indices, images, about)


def statistics_settings(protocol: Protocol) -> dict[str, Any]:
    """Arguments of `FeatureStatistics`."""
    rule = protocol.frechet
    return {"ddof": rule.ddof, "mean_dtype": getattr(torch, rule.mean_dtype), "dtype": getattr(torch, rule.dtype)}


def cache_file(digest: str, about: Mapping[str, Any]) -> Path:
    """Where the statistics of a content (by hash) under a network and its rules are kept."""
    text = f"{digest} {json.dumps(about, sort_keys=True)}"
    key = hashlib.blake2b(text.encode(), digest_size=16).hexdigest()
    return cache_folder() / "reference" / f"{key}.npz"
