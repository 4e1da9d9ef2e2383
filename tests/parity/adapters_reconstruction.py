"""Adapters of reconstruction, perceptual and controllability metrics. They join the table of `adapters.py`."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from tests.parity.adapters import Answers, adapter
from tests.parity.adapters_metrics import numbers
from tests.parity.weights import Case
from varkit.layout import TokenLayout
from varkit.metrics.clip_score import clip_score
from varkit.metrics.controllability import PerImage, canny_f1, depth_rmse, map_similarity, mean_iou
from varkit.metrics.lpips import LPIPS
from varkit.metrics.reconstruction import CodebookUse, psnr, psnr_set
from varkit.metrics.structural import ssim
from varkit.pictures import to_uint8

# ---- reconstruction -------------------------------------------------------------------------------------------


def images_of(case: Case) -> tuple[Tensor, Tensor]:
    """The two images or sets, as (B, C, H, W)."""
    arranged = {"uint8 H W C": lambda x: x[None].movedim(-1, 1), "uint8 B H W C": lambda x: x.movedim(-1, 1)}
    first, second = (case.inputs[name] for name in sorted(case.inputs))
    return arranged[case.settings["input"]](first), arranged[case.settings["input"]](second)


def chosen(case: Case, *names: str) -> dict[str, Any]:
    return {name: case.settings[name] for name in names}


@adapter("reconstruction", "psnr", "psnr")
def _(case: Case) -> Answers:
    return {"value": psnr(*images_of(case), **chosen(case, "scale", "data_range", "cap", "cap_below_mse"))}


@adapter("reconstruction", "psnr", "psnr_set")
def _(case: Case) -> Answers:
    return numbers(value=psnr_set(*images_of(case), **chosen(case, "scale", "data_range", "average")))


@adapter("reconstruction", "ssim", "ssim")
def _(case: Case) -> Answers:
    window = chosen(case, "window", "window_size", "sigma", "covariance", "border", "k1", "k2")
    if case.settings["channel"] != "mean":
        raise NotImplementedError("channels are averaged")
    return {"value": ssim(*images_of(case), **window, **chosen(case, "scale", "data_range"))}


@adapter("reconstruction", "image_io", "to_uint8")
def _(case: Case) -> Answers:
    return {"pixels": to_uint8(case.inputs["x"], case.settings["rule"])}


@adapter("reconstruction", "codebook", "usage")
def _(case: Case) -> Answers:
    ids = case.inputs["indices"]
    layout = TokenLayout(((ids.shape[1],),), case.settings["codebook_size"], 1)
    use = CodebookUse(layout, **chosen(case, "entropy_eps", "perplexity_eps"))
    use.update(ids)
    found = use.compute()
    return numbers(
        usage=found["used_share"],
        entropy_bits=found["titok_entropy_bits"],
        entropy_exact=found["entropy_bits"],
        perplexity=found["taming_perplexity"],
        perplexity_exact=found["perplexity"],
    )


@adapter("reconstruction", "clip_score", "clip_score")
def _(case: Case) -> Answers:
    pair = case.inputs["image_embeddings"], case.inputs["text_embeddings"]
    return numbers(value=clip_score(*pair, **chosen(case, "scale", "clamp")).value)


# ---- lpips ----------------------------------------------------------------------------------------------------


@adapter("lpips", "metric", "distance")
def _(case: Case) -> Answers:
    settings, state = case.settings, case.fixture.state
    if settings["heads"] == "given":
        given = {f"{name}.model.1.weight": v for name, v in case.inputs.items() if name.startswith("lin")}
        state = {k: v for k, v in state.items() if not k.startswith("lin")} | given
    model = LPIPS(
        case.fixture.meta["constructor"]["net"],
        heads=settings["heads"] != "none",
        scaling_layer=settings["scaling_layer"],
    )
    model.load_official(state)
    pair = case.inputs["in0"], case.inputs["in1"]
    if settings["spatial"]:
        return {"map": model(*pair, normalize=settings["normalize"], spatial=True)}
    return {
        "value": model(*pair, normalize=settings["normalize"]),
        "per_layer": model.per_layer(*pair, normalize=settings["normalize"]),
    }


# ---- controlar: metrics ---------------------------------------------------------------------------------------


def scored(case: Case, name: str, found: PerImage) -> Answers:
    if case.settings["reduction"] != "mean":
        raise NotImplementedError("images are averaged")
    return {**numbers(**{name: found.mean}), "per_image": found.per_image}


def maps_of(case: Case) -> tuple[Tensor, Tensor]:
    return case.inputs["prediction"], case.inputs["label"]


@adapter("controlar", "metrics", "ms_ssim")
def _(case: Case) -> Answers:
    return scored(case, "ms_ssim", map_similarity(*maps_of(case), **chosen(case, "input_divisor", "data_range")))


@adapter("controlar", "metrics", "canny_f1")
def _(case: Case) -> Answers:
    return scored(case, "mean", canny_f1(*maps_of(case), **chosen(case, "positive_value", "zero_division")))


@adapter("controlar", "metrics", "depth_rmse")
def _(case: Case) -> Answers:
    return scored(case, "mean", depth_rmse(*maps_of(case), **chosen(case, "prediction_max")))


@adapter("controlar", "metrics", "miou")
def _(case: Case) -> Answers:
    if case.settings["absent_class_iou"] != "nan":
        raise NotImplementedError("a class that the labels lack has NaN")
    found = mean_iou(*maps_of(case), **chosen(case, "num_classes", "ignore_label", "prediction_offset"))
    return {**numbers(miou=found.miou), "iou": found.iou}
