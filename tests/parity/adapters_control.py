"""Adapters of the extractors of control maps. They join the table of `adapters.py`."""

from __future__ import annotations

from tests.parity.adapters import Answers, adapter
from tests.parity.weights import Case
from varkit.conditioning.extractors import build_extractor


@adapter("controlar", "canny", "detect")
def _(case: Case) -> Answers:
    chosen = case.settings
    if chosen["aperture_size"] != 3 or chosen["l2_gradient"] or chosen["channel_order"] not in ("rgb", None):
        raise NotImplementedError("3x3 Sobel, L1 magnitude, RGB order")
    canny = build_extractor("canny", low=chosen["low_threshold"], high=chosen["high_threshold"])
    return {"edges": canny(case.inputs["image"][None])[0]}
