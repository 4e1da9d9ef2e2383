"""Adapters of the extractors of control maps. They join the table of `adapters.py`."""

from __future__ import annotations

from tests.parity.adapters import Answers, adapter
from tests.parity.weights import Case
from varkit.checkpoints.files import load_strictly
from varkit.conditioning.extractors import build_extractor
from varkit.conditioning.extractors.hed import HEDNetwork
from varkit.conditioning.extractors.lineart import LineArtNetwork


@adapter("controlar", "canny", "detect")
def _(case: Case) -> Answers:
    chosen = case.settings
    if chosen["aperture_size"] != 3 or chosen["l2_gradient"] or chosen["channel_order"] not in ("rgb", None):
        raise NotImplementedError("3x3 Sobel, L1 magnitude, RGB order")
    canny = build_extractor("canny", low=chosen["low_threshold"], high=chosen["high_threshold"])
    return {"edges": canny(case.inputs["image"][None])[0]}


@adapter("controlar", "hed", "detect")
def _(case: Case) -> Answers:
    network = HEDNetwork()
    load_strictly(network, case.fixture.state, "fixture")
    images = case.inputs["image"].float()
    sides = {f"side_{i}": side for i, side in enumerate(network.eval().sides(images), 1)}
    return {"edge": network(images), **sides}


@adapter("controlar", "lineart", "detect")
def _(case: Case) -> Answers:
    network = LineArtNetwork(**case.fixture.meta["constructor"])
    load_strictly(network, case.fixture.state, "fixture")
    return {"line": network.eval()(case.inputs["image"].float(), case.settings["input_divisor"])}
