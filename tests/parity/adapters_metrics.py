"""Adapters of the metrics: features in, numbers out. They join the table of `adapters.py`."""

from __future__ import annotations

import torch
from torch import Tensor

from tests.parity.adapters import Answers, adapter
from tests.parity.weights import Case
from varkit.metrics.fid import FeatureStatistics, frechet_distance, spatial_features
from varkit.metrics.inception_score import inception_score
from varkit.metrics.kid import kernel_distance
from varkit.metrics.prdc import prdc


def dtype_of(name: str) -> torch.dtype:
    return getattr(torch, name)


def numbers(**values: float) -> Answers:
    return {name: torch.tensor([value], dtype=torch.float64) for name, value in values.items()}


# ---- fid, sfid ------------------------------------------------------------------------------------------------


def statistics_of(case: Case, features: Tensor) -> FeatureStatistics:
    s = case.settings
    types = {k: dtype_of(s[k]) for k in ("mean_dtype", "dtype")}
    statistics = FeatureStatistics(features.shape[1], ddof=s["ddof"], **types)
    statistics.update(features)
    return statistics


def spatial_of(case: Case, name: str) -> Tensor:
    return spatial_features(case.inputs[name], case.settings["channels"], case.settings["layout"])


@adapter("fid", "distance", "frechet")
def _(case: Case) -> Answers:
    first, second = (statistics_of(case, case.inputs[f"features_{i}"]) for i in (1, 2))
    return numbers(value=frechet_distance(first, second))


@adapter("sfid", "spatial_features", "statistics")
def _(case: Case) -> Answers:
    features = spatial_of(case, "activations")
    mean, covariance = statistics_of(case, features).mean_and_covariance()
    return {"features": features, "mu": mean, "sigma": covariance}


@adapter("sfid", "distance", "spatial_frechet")
def _(case: Case) -> Answers:
    first, second = (statistics_of(case, spatial_of(case, f"activations_{i}")) for i in (1, 2))
    return numbers(value=frechet_distance(first, second))


# ---- inception-score, kid, prdc -------------------------------------------------------------------------------


@adapter("inception-score", "score", "inception_score")
def _(case: Case) -> Answers:
    s = case.settings
    score = inception_score(
        case.inputs["logits"],
        splits=s["splits"],
        split_size=s["split_size"],
        shuffle={"given": None, "permutation": s["seed"]}[s["order"]],
        dtype=dtype_of(s["dtype"]),
        eps=s["eps"],
    )
    return numbers(mean=score.mean, std=score.std)


@adapter("kid", "distance", "mmd")
def _(case: Case) -> Answers:
    settings = {**case.settings, "dtype": dtype_of(case.settings["dtype"])}
    distance = kernel_distance(case.inputs["features_1"], case.inputs["features_2"], **settings)
    return numbers(mean=distance.mean, std=distance.std)


@adapter("prdc", "manifold", "precision_recall")
@adapter("prdc", "manifold", "prdc")
def _(case: Case) -> Answers:
    settings = {**case.settings, "dtype": dtype_of(case.settings["dtype"])}
    return numbers(**prdc(case.inputs["features_real"], case.inputs["features_fake"], **settings)._asdict())
