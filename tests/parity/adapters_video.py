"""Adapters of the video networks and the Frechet video distance; they join the table of `adapters.py`."""

from __future__ import annotations

from tests.parity.adapters import Answers, adapter
from tests.parity.adapters_metrics import numbers, statistics_of
from tests.parity.weights import Case
from varkit.metrics.fid import frechet_distance
from varkit.metrics.fvd import preprocess_clips
from varkit.metrics.i3d import I3D
from varkit.metrics.videomae import VideoMAE

TRAINING_ONLY = ("drop_path_rate", "init_scale")
"""Constructor arguments of the official VideoMAE that do not change what it answers."""


# ---- i3d, videomae --------------------------------------------------------------------------------------------


@adapter("i3d", "network", "features")
def _(case: Case) -> Answers:
    s = case.settings
    network = I3D.from_official(case.fixture.state, **case.fixture.meta["constructor"], norm_eps=s["norm_eps"])
    clips = preprocess_clips(case.inputs["videos"], **s["preprocess"])
    return network(clips, outputs=s["outputs"], time_average=s["time_average"])


@adapter("videomae", "network", "features")
def _(case: Case) -> Answers:
    s = case.settings
    constructor = {k: v for k, v in case.fixture.meta["constructor"].items() if k not in TRAINING_ONLY}
    network = VideoMAE.from_official(case.fixture.state, **{**constructor, "use_mean_pooling": s["pool"] == "mean"})
    clips = preprocess_clips(case.inputs["videos"], **s["preprocess"])
    return {"model_input": clips[:, :, : s["model_input_frames"]], **network(clips)}


# ---- fvd ------------------------------------------------------------------------------------------------------


@adapter("fvd", "distance", "frechet")
def _(case: Case) -> Answers:
    first, second = (statistics_of(case, case.inputs[f"features_{i}"]) for i in (1, 2))
    return numbers(value=frechet_distance(first, second))


@adapter("fvd", "preprocess", "preprocess")
def _(case: Case) -> Answers:
    settings = dict(case.settings)
    recorded = settings.pop("frames_recorded")
    return {"clip": preprocess_clips(case.inputs["videos"], **settings)[..., :recorded, :, :]}
