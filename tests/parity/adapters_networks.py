"""Adapters of the image networks; they join the table of `adapters.py`."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from tests.parity.adapters import Answers, adapter
from tests.parity.weights import Case
from varkit.metrics.fid import spatial_features
from varkit.metrics.inception import InceptionFeatures, InceptionV3
from varkit.metrics.resize import resize

# ---- inception ------------------------------------------------------------------------------------------------


class Weights:
    """A state dict as a key of a cache: two are equal if they are the same object."""

    def __init__(self, state: dict[str, Tensor]) -> None:
        self.state = state

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Weights) and other.state is self.state

    def __hash__(self) -> int:
        return id(self.state)


@lru_cache(maxsize=2)
def network_of(weights: Weights, dtype: str) -> InceptionV3:
    return InceptionV3.from_official(weights.state, "fixture")


def features_of(case: Case) -> InceptionFeatures:
    s, constructor = case.settings, case.fixture.meta["constructor"]
    if constructor != {"num_classes": 1008, "aux_logits": False, "norm_eps": 0.001} or s["input"] != "uint8 B C H W":
        raise ValueError(f"not the network of the released file, or other input: {constructor}, {s['input']}")
    rule: dict[str, Any] = {"size": s["size"], "resize": s["resize"], "scaling": s["scaling"], "dtype": s["dtype"]}
    return InceptionFeatures(network_of(Weights(case.fixture.state), s["dtype"]), **rule)


@adapter("inception", "network", "features")
def _(case: Case) -> Answers:
    s, features = case.settings, features_of(case)
    of_network = [name for name in s["outputs"] if name not in ("softmax", "spatial")]
    spatial, softmax = s["spatial"], "softmax" in s["outputs"]
    if softmax:
        of_network.append("logits" if s["softmax_bias"] else "softmax")
    if spatial:
        of_network.append(spatial["layer"])
    with torch.no_grad():
        read = features.network(features.prepare(case.inputs["images"]), of_network)
    if softmax and s["softmax_bias"]:
        read["softmax"] = read["logits"].softmax(1)
    if spatial:
        read["spatial"] = spatial_features(read[spatial["layer"]], spatial["channels"], spatial["layout"])
    return {name: read[name].float() for name in s["outputs"]}


@adapter("inception", "resize", "resize")
def _(case: Case) -> Answers:
    settings = dict(case.settings)
    return {"images": resize(case.inputs["images"], settings.pop("size"), **settings)}
