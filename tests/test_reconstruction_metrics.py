"""Reconstruction, perceptual and controllability metrics: properties, second implementations and counts by hand."""

from __future__ import annotations

import importlib.util
import json
import logging
import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from varkit.layout import TokenLayout
from varkit.metrics import lpips as lpips_module
from varkit.metrics.clip_score import clip_score
from varkit.metrics.controllability import MeanIoU, canny_f1, depth_rmse, map_similarity, mean_iou
from varkit.metrics.lpips import LPIPS, TRUNKS, find_lpips, from_official, to_official
from varkit.metrics.reconstruction import (
    CodebookUse,
    ReconstructionMetrics,
    psnr,
    psnr_set,
    reconstruction_curve,
    reconstruction_report,
)
from varkit.metrics.structural import SCALE_WEIGHTS, SSIM_DEFAULT, SSIM_LLAMAGEN, multi_scale_ssim, ssim
from varkit.pictures import to_uint8

MANIFESTS = sorted((Path(__file__).parent / "checkpoints").glob("lpips-*.json"))


def smooth(count: int = 2, height: int = 24, width: int = 20, seed: int = 0) -> Tensor:
    """Images in [-1, 1] with structure: noise enlarged from a coarse grid."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.rand(count, 3, 5, 5, generator=generator) * 2 - 1
    return F.interpolate(coarse, (height, width), mode="bicubic").clamp(-1, 1)


def noisy(images: Tensor, strength: float, seed: int = 1) -> Tensor:
    noise = torch.randn(images.shape, generator=torch.Generator().manual_seed(seed))
    return (images + strength * noise).clamp(-1, 1)


@pytest.fixture(scope="module")
def squeeze() -> LPIPS:
    torch.manual_seed(0)
    model = LPIPS("squeeze")
    for head in model.heads:
        head.data.uniform_(0, 1)
    return model


MEASURES: dict[str, tuple[Callable[[Tensor, Tensor], Tensor], float]] = {
    "psnr": (psnr, math.inf),
    "ssim": (ssim, 1.0),
    "ssim of LlamaGen": (lambda a, b: ssim(a, b, **SSIM_LLAMAGEN), 1.0),
    "ms_ssim": (multi_scale_ssim, 1.0),
    "ms_ssim of torchmetrics": (lambda a, b: multi_scale_ssim(a, b, variant="torchmetrics"), 1.0),
}


@pytest.mark.parametrize("name", MEASURES)
def test_a_similarity_is_best_for_equal_images_symmetric_and_falls_with_noise(name: str) -> None:
    measure, best = MEASURES[name]
    x = smooth(2, 180, 177)
    torch.testing.assert_close(measure(x, x), torch.full((2,), best, dtype=torch.float64))
    grades = [measure(x, noisy(x, s)) for s in (0.02, 0.1, 0.4)]
    assert (grades[0] > grades[1]).all() and (grades[1] > grades[2]).all() and (grades[0] < best).all()
    torch.testing.assert_close(measure(noisy(x, 0.1), x), grades[1])
    torch.testing.assert_close(measure(x[1:], noisy(x, 0.1)[1:]), grades[1][1:])  # each pair by itself


@pytest.mark.parametrize("name", MEASURES)
def test_bytes_and_floats_of_the_same_images_score_the_same(name: str) -> None:
    measure, _ = MEASURES[name]
    a, b = (to_uint8(x) for x in (smooth(2, 180, 177), noisy(smooth(2, 180, 177), 0.1)))
    as_floats = measure(a.double() / 127.5 - 1, b.double() / 127.5 - 1)
    torch.testing.assert_close(measure(a, b), as_floats, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(measure(a, b.double() / 127.5 - 1), as_floats, rtol=1e-6, atol=1e-6)


# ---- PSNR -----------------------------------------------------------------------------------------------------


def test_psnr_is_the_same_on_every_scale_unless_the_peak_is_another() -> None:
    x, y = smooth(), noisy(smooth(), 0.1)
    expected = psnr(x, y)
    for scale in ((0.0, 1.0), (0.0, 255.0)):
        torch.testing.assert_close(psnr(x, y, scale=scale), expected)
    torch.testing.assert_close(psnr(x, y, 4.0), expected + 20 * math.log10(2))
    torch.testing.assert_close(psnr(x, y, 2.0, scale=None), expected)


def test_the_cap_applies_to_equal_images_or_below_an_error() -> None:
    x = smooth(3)
    y = x.clone()
    y[1] += 1e-4
    y[2] += 0.5
    assert psnr(x, y, cap=99.0).tolist()[0] == 99.0 and psnr(x, y, cap=99.0)[1] > 80
    assert psnr(x, y, cap=70.0, cap_below_mse=1e-6).tolist()[:2] == [70.0, 70.0]
    assert torch.equal(psnr(x, y, cap=70.0, cap_below_mse=1e-6)[2:], psnr(x, y)[2:])
    with pytest.raises(ValueError, match="cap_below_mse needs the value to give there"):
        psnr(x, y, cap_below_mse=1e-6)


def test_a_set_is_averaged_by_image_and_a_clip_by_its_whole_error() -> None:
    x = torch.zeros(2, 3, 8, 8)
    y = x.clone()
    y[0] += 0.02  # 40 dB
    y[1] += 0.2  # 20 dB
    assert psnr_set(x, y) == pytest.approx(30)
    pooled = 10 * math.log10(4 / ((0.02**2 + 0.2**2) / 2))
    assert psnr_set(x, y, average="mse") == pytest.approx(pooled, rel=1e-6)
    clip = psnr(x.movedim(0, 1)[None], y.movedim(0, 1)[None])
    assert clip.tolist() == pytest.approx([pooled], rel=1e-6)
    assert psnr_set(x, y, 255.0, scale=(0.0, 255.0)) == pytest.approx(30)
    with pytest.raises(ValueError, match="average must be psnr or mse; got 'dB'"):
        psnr_set(x, y, average="dB")  # type: ignore[arg-type]


@pytest.mark.parametrize("measure", [psnr, ssim])
def test_pairs_that_are_none_are_refused(measure: Callable[..., Tensor]) -> None:
    x = smooth()
    for other in (x[:1], x[..., :-1], x[:, :1]):
        with pytest.raises(ValueError, match="two equal shapes"):
            measure(x, other)
    with pytest.raises(ValueError, match="two equal shapes"):
        measure(x[0], x[0])
    with pytest.raises(ValueError, match=r"uint8, or floats in \[-1, 1\]; got torch.int64"):
        measure(x.long(), x.long())
    with pytest.raises(ValueError, match="need a data_range"):
        measure(x, x, scale=None)


# ---- SSIM -----------------------------------------------------------------------------------------------------


def window_of(settings: dict[str, Any]) -> Tensor:
    """The whole window (n, n), by the density of each pixel."""
    n = settings["window_size"]
    y, x = torch.meshgrid(torch.arange(n) - n // 2, torch.arange(n) - n // 2, indexing="ij")
    if settings["window"] == "uniform":
        return torch.full((n, n), 1 / n**2, dtype=torch.float64)
    density = torch.exp(-(x**2 + y**2) / (2 * settings["sigma"] ** 2)).double()
    return density / density.sum()


def slow_ssim(first: Tensor, second: Tensor, settings: dict[str, Any], peak: float) -> tuple[Tensor, Tensor]:
    """Window by window, with centred second moments, on values as they are: maps (B, C, windows) of score, contrast."""
    n = settings["window_size"]
    weights = window_of(settings).flatten()
    if settings["border"] == "reflect":
        first, second = (F.pad(x, (n // 2,) * 4, mode="reflect") for x in (first, second))
    b, c = first.shape[:2]
    p, q = (F.unfold(x.double().flatten(0, 1)[:, None], n).view(b, c, n * n, -1).mT for x in (first, second))
    mean_p, mean_q = (p * weights).sum(-1, keepdim=True), (q * weights).sum(-1, keepdim=True)
    more = n**2 / (n**2 - 1) if settings["covariance"] == "sample" else 1
    variance_p, variance_q, covariance = (
        more * (weights * (u - mu) * (v - nu)).sum(-1)
        for u, mu, v, nu in ((p, mean_p, p, mean_p), (q, mean_q, q, mean_q), (p, mean_p, q, mean_q))
    )
    mean_p, mean_q = mean_p[..., 0], mean_q[..., 0]
    c1, c2 = (0.01 * peak) ** 2, (0.03 * peak) ** 2
    contrast = (2 * covariance + c2) / (variance_p + variance_q + c2)
    return (2 * mean_p * mean_q + c1) / (mean_p**2 + mean_q**2 + c1) * contrast, contrast


@pytest.mark.parametrize("border", ["crop", "reflect"])
@pytest.mark.parametrize("covariance", ["population", "sample"])
@pytest.mark.parametrize(
    ("window", "size", "sigma"), [("gaussian", 11, 1.5), ("gaussian", 5, 0.8), ("uniform", 7, None)]
)
def test_ssim_is_that_of_every_window_by_itself(
    window: str, size: int, sigma: float | None, covariance: str, border: str
) -> None:
    settings = {"window": window, "window_size": size, "sigma": sigma, "covariance": covariance, "border": border}
    x, y = smooth(2, 17, 13), noisy(smooth(2, 17, 13), 0.3)
    for scale, peak in (((0.0, 1.0), 1.0), ((0.0, 255.0), 255.0), ((0.0, 1.0), 2.0)):
        a, b = ((v.double() + 1) / 2 * scale[1] for v in (x, y))
        expected = slow_ssim(a, b, settings, peak)[0].mean((1, 2))
        torch.testing.assert_close(ssim(x, y, scale=scale, data_range=peak, **settings), expected)
        torch.testing.assert_close(ssim(a, b, scale=None, data_range=peak, **settings), expected)


def test_the_named_definitions_differ_as_they_should() -> None:
    x, y = smooth(2, 32, 32), noisy(smooth(2, 32, 32), 0.2)
    assert torch.equal(ssim(x, y), ssim(x, y, **SSIM_DEFAULT))
    right = ssim(x, y, **{**SSIM_LLAMAGEN, "data_range": 1.0})
    assert (ssim(x, y, **SSIM_LLAMAGEN) > right).all()  # a range of 2 for images in [0, 1] raises it
    assert (ssim(x, y, scale=(-1.0, 1.0)) - ssim(x, y)).abs().min() > 1e-4  # black must be 0


def test_ssim_of_colours_is_the_mean_of_their_channels() -> None:
    x, y = smooth(), noisy(smooth(), 0.2)
    channels = torch.stack([ssim(x[:, c : c + 1], y[:, c : c + 1]) for c in range(3)])
    torch.testing.assert_close(ssim(x, y), channels.mean(0))


def test_ssim_refuses_images_below_its_window_and_windows_that_are_none() -> None:
    x = smooth(1, 11, 11)
    ssim(x, x)
    for small in (x[..., :10], x[..., :10, :]):
        with pytest.raises(ValueError, match=r"a window of 11 \(border crop\) needs images .* at least 11 pixels"):
            ssim(small, small)
    ssim(x[..., :6, :6], x[..., :6, :6], border="reflect")
    with pytest.raises(ValueError, match="at least 6 pixels a side"):
        ssim(x[..., :5], x[..., :5], border="reflect")
    with pytest.raises(ValueError, match="at least 11 pixels a side"):
        ssim(x[:, :, None], x[:, :, None])
    wrong: list[tuple[dict[str, Any], str]] = [
        ({"window_size": 10}, "odd and at least 3; got 10"),
        ({"window_size": 1}, "odd and at least 3; got 1"),
        ({"window": "round"}, "got 'round'"),
        ({"sigma": None}, "gaussian with a positive sigma"),
        ({"sigma": -1.0}, "gaussian with a positive sigma"),
        ({"covariance": "biased"}, "covariance is population or sample"),
        ({"border": "wrap"}, "border crop or reflect"),
    ]
    for arguments, message in wrong:
        with pytest.raises(ValueError, match=message):
            ssim(x, x, **arguments)


@pytest.mark.parametrize(("variant", "size"), [("wang", (161, 170)), ("torchmetrics", (179, 176))])
def test_multi_scale_ssim_is_the_product_of_its_scales(variant: Any, size: tuple[int, int]) -> None:
    x = smooth(1, *size)[:, :2]
    y = noisy(x, 0.3)
    a, b = ((v.double() + 1) / 2 for v in (x, y))
    padded = variant == "torchmetrics"
    terms = []
    for i, weight in enumerate(SCALE_WEIGHTS):
        score, contrast = slow_ssim(a, b, {**SSIM_DEFAULT, "border": "crop"}, 1.0)
        term = contrast
        if i == 4:
            term = slow_ssim(a, b, {**SSIM_DEFAULT, "border": "reflect"}, 1.0)[0] if padded else score
        terms.append(term.mean((1, 2), keepdim=True) ** weight if padded else term.mean(2) ** weight)
        if padded:
            a, b = (v[..., : v.shape[-2] // 2 * 2, : v.shape[-1] // 2 * 2] for v in (a, b))
        else:
            a, b = (F.pad(v, (0, v.shape[-1] % 2, 0, v.shape[-2] % 2), mode="replicate") for v in (a, b))
        a, b = (v.unflatten(-1, (-1, 2)).unflatten(-3, (-1, 2)).mean((-1, -3)) for v in (a, b))
    expected = math.prod(terms).flatten(1).mean(1)  # type: ignore[union-attr]
    torch.testing.assert_close(multi_scale_ssim(x, y, variant=variant), expected)
    assert abs(float(expected) - float(ssim(x, y))) > 0.01


def test_multi_scale_ssim_refuses_what_has_no_five_scales() -> None:
    x = smooth(1, 175, 161)
    multi_scale_ssim(x, x)
    for small in (x[..., :160], x[..., :160, :]):
        with pytest.raises(ValueError, match="at least 161 pixels a side"):
            multi_scale_ssim(small, small)
    with pytest.raises(ValueError, match="at least 176 pixels a side"):
        multi_scale_ssim(x, x, variant="torchmetrics")
    with pytest.raises(ValueError, match="variant must be wang or torchmetrics"):
        multi_scale_ssim(x, x, variant="mean")  # type: ignore[arg-type]
    inverted = multi_scale_ssim(x, -x)  # negative contrasts have no powers
    assert inverted.tolist() == [0.0]


# ---- bytes ----------------------------------------------------------------------------------------------------

ROUNDING = ("round", "llamagen", "mar", "titok_eval", "save_image")
TRUNCATING = ("adm", "var", "titok_sample")


@pytest.mark.parametrize("rule", ROUNDING + TRUNCATING)
def test_every_rule_keeps_order_range_and_shape(rule: Any) -> None:
    levels = torch.arange(256).view(2, 8, 16)
    grid = to_uint8(levels / 127.5 - 1, rule)
    assert grid.dtype == torch.uint8 and grid.shape == levels.shape
    below = levels - grid.long()
    assert not below.any() if rule in ROUNDING else ((below == 0) | (below == 1)).all()
    ramp = to_uint8(torch.linspace(-1.5, 1.5, 3001), rule).long()
    assert (ramp.diff() >= 0).all() and ramp[0] == 0 and ramp[-1] == 255 and ramp.diff().max() == 1
    expected_zero = 128 if rule in ROUNDING else 127
    assert int(to_uint8(torch.zeros(()), rule)) == expected_zero
    assert torch.equal(to_uint8(torch.zeros(3, dtype=torch.bfloat16), rule).long(), torch.full((3,), expected_zero))


def test_truncation_darkens_and_rounding_does_not() -> None:
    x = torch.linspace(-1, 1, 100_001)
    for rule, bias in [(r, 0.0) for r in ROUNDING] + [(r, -0.5) for r in TRUNCATING]:
        mean = (to_uint8(x, rule).double() - (x.double() + 1) * 127.5).mean().item()  # type: ignore[arg-type]
        assert mean == pytest.approx(bias, abs=0.01)


def test_bytes_are_made_of_floats_by_a_known_rule() -> None:
    with pytest.raises(ValueError, match=r"rule must be one of round, llamagen, .*; got 'floor'"):
        to_uint8(torch.zeros(2), "floor")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"floats in \[-1, 1\]; got torch.uint8"):
        to_uint8(torch.zeros(2, dtype=torch.uint8))


# ---- the codebook ---------------------------------------------------------------------------------------------


def test_codebook_use_counts_factors_and_their_combinations() -> None:
    layout = TokenLayout(((1, 1), (1, 2)), (2, 3), 2)
    ids = torch.tensor([[[0, 0], [1, 2], [1, 2]], [[0, 1], [1, 2], [0, 2]]])  # B L G
    use = CodebookUse(layout)
    use.update(ids)
    result = json.loads(json.dumps(use.compute()))
    assert result["codebook"] == [2, 3] and result["tokens"] == 6
    assert result["used"] == 4 and result["used_share"] == pytest.approx(4 / 6)
    entropy = -sum(p * math.log2(p) for p in (1 / 6, 1 / 6, 1 / 2, 1 / 6))
    assert result["entropy_bits"] == pytest.approx(entropy) and result["perplexity"] == pytest.approx(2**entropy)
    assert [(s["grid"], s["used"]) for s in result["scales"]] == [("1x1", 2), ("1x2", 2)]
    assert [f["codebook"] for f in result["factors"]] == [2, 3]
    assert [f["used"] for f in result["factors"]] == [2, 3]
    assert [f["entropy_bits"] for f in result["factors"]] == pytest.approx(
        [1.0, -sum(p * math.log2(p) for p in (1 / 6, 1 / 6, 2 / 3))]
    )
    assert [s["used"] for f in result["factors"] for s in f["scales"]] == [1, 2, 2, 1]


def test_too_many_combinations_are_not_counted() -> None:
    use = CodebookUse(TokenLayout(((4,),), (2,) * 80, 80))
    use.update(torch.randint(2, (5, 4, 80)))
    result = use.compute()
    assert "used" not in result and len(result["factors"]) == 80 and result["tokens"] == 20
    assert all(0 <= f["entropy_bits"] <= 1 for f in result["factors"])
    assert max(f["entropy_bits"] for f in result["factors"]) > 0.9


@pytest.mark.parametrize("size", [7, (3, 4)])
def test_codebook_use_in_batches_or_merged_is_that_of_the_whole(size: int | tuple[int, ...]) -> None:
    layout = TokenLayout(((1, 1), (2, 2)), size, 2)
    shape = (6, 5) if isinstance(size, int) else (6, 5, 2)
    ids = torch.randint(3, shape, generator=torch.Generator().manual_seed(0))
    whole, parts, other = (CodebookUse(layout) for _ in range(3))
    whole.update(ids)
    parts.update(ids[:2])
    other.update(ids[2:])
    assert parts.compute() != whole.compute()
    parts.merge(other)
    assert parts.compute() == whole.compute()
    with pytest.raises(ValueError, match="do not fit together"):
        parts.merge(CodebookUse(TokenLayout(((1, 1),), size, 2)))


def test_the_evaluators_terms_are_shifted_by_their_eps_only() -> None:
    ids = torch.tensor([[0, 0, 1]])
    use = CodebookUse(TokenLayout(((3,),), 4, 1), entropy_eps=0.1, perplexity_eps=0.2)
    use.update(ids)
    result = use.compute()
    assert result["titok_entropy_bits"] == pytest.approx(
        -(2 / 3 * math.log2(2 / 3 + 0.1) + 1 / 3 * math.log2(1 / 3 + 0.1))
    )
    assert result["taming_perplexity"] == pytest.approx(
        math.exp(-(2 / 3 * math.log(2 / 3 + 0.2) + 1 / 3 * math.log(1 / 3 + 0.2)))
    )


def test_ids_that_are_none_are_refused() -> None:
    use = CodebookUse(TokenLayout(((3,),), 4, 1))
    for bad in (torch.tensor([[0, 4, 1]]), torch.tensor([[0, -1, 1]])):
        with pytest.raises(ValueError, match="ids must be in"):
            use.update(bad)
    with pytest.raises(ValueError, match="another shape"):
        use.update(torch.zeros(2, 3, 1, dtype=torch.int64))
    with pytest.raises(ValueError, match="got 2 tokens"):
        use.update(torch.zeros(2, 2, dtype=torch.int64))
    with pytest.raises(ValueError, match="another shape"):
        CodebookUse(TokenLayout(((3,),), (4, 4), 1)).update(torch.zeros(2, 3, dtype=torch.int64))
    assert use.compute()["tokens"] == 0


# ---- a set of images ------------------------------------------------------------------------------------------


def test_metrics_in_batches_or_merged_are_those_of_the_whole(squeeze: LPIPS) -> None:
    x, y = smooth(5, 32, 40), noisy(smooth(5, 32, 40), 0.2)
    whole, parts, other = (ReconstructionMetrics([squeeze]) for _ in range(3))
    whole.update(y, x)
    parts.update(y[:1], x[:1])
    parts.update(y[1:3], x[1:3])
    other.update(y[3:], x[3:])
    parts.merge(other)
    expected, found = whole.compute(), parts.compute()
    assert expected["images"] == found["images"] == 5
    assert list(expected["per_image"]) == ["psnr", "ssim", "lpips_squeeze"]  # too small for five scales
    for name, values in expected["per_image"].items():
        torch.testing.assert_close(found["per_image"][name], values, rtol=1e-4, atol=1e-6)
        assert expected[name] == pytest.approx(values.mean().item())
    torch.testing.assert_close(expected["per_image"]["psnr"], psnr(y, x))
    torch.testing.assert_close(expected["per_image"]["ssim"], ssim(y, x))
    torch.testing.assert_close(expected["per_image"]["lpips_squeeze"], squeeze(y, x).double())
    assert json.loads(json.dumps(whole.means())) == {k: v for k, v in expected.items() if k != "per_image"}
    whole.reset()
    with pytest.raises(ValueError, match="no images to average over"):
        whole.compute()
    with pytest.raises(ValueError, match="different measures"):
        parts.merge(ReconstructionMetrics())


def test_an_image_too_small_for_a_measure_does_not_count_in_it(squeeze: LPIPS) -> None:
    metrics = ReconstructionMetrics([squeeze])
    for side in (8, 12, 17, 161):
        x = smooth(1, side, side)
        metrics.update(to_uint8(noisy(x, 0.1)), x)
    values = metrics.compute()["per_image"]
    assert values["psnr"].isnan().tolist() == [False] * 4
    assert values["ssim"].isnan().tolist() == [True, False, False, False]
    assert values["lpips_squeeze"].isnan().tolist() == [True, True, False, False]
    assert values["ms_ssim"].isnan().tolist() == [True, True, True, False]
    assert metrics.compute()["ssim"] == pytest.approx(values["ssim"][1:].mean().item())


def test_a_clip_is_the_mean_of_its_frames_but_for_psnr(squeeze: LPIPS) -> None:
    x = smooth(4, 20, 20).unflatten(0, (2, 2)).transpose(1, 2)  # B C T H W
    y = noisy(x, 0.2)
    frames, clips = ReconstructionMetrics([squeeze]), ReconstructionMetrics([squeeze])
    frames.update(*(v.transpose(1, 2).flatten(0, 1) for v in (y, x)))
    clips.update(y, x)
    by_frame, by_clip = frames.compute()["per_image"], clips.compute()["per_image"]
    for name in ("ssim", "lpips_squeeze"):
        torch.testing.assert_close(by_clip[name], by_frame[name].view(2, 2).mean(1), rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(by_clip["psnr"], psnr(y, x))


def test_images_that_are_refused_leave_no_trace(squeeze: LPIPS) -> None:
    metrics, x = ReconstructionMetrics([squeeze]), smooth(3)
    with pytest.raises(ValueError, match=r"\(B, 3, H, W\) twice is needed"):
        metrics.update(x[:, :1], x[:, :1])
    y = x.clone()
    y[1, 0, 0, 0] = torch.nan
    y[2, 0, 0, 0] = torch.inf
    with pytest.raises(ValueError, match=r"reconstruction: images \[1, 2\] \(from 0\) of this batch are not finite"):
        metrics.update(y, x)
    with pytest.raises(ValueError, match="original: images"):
        metrics.update(x, y)
    metrics.update(x, x)
    assert metrics.compute()["images"] == 3 and metrics.compute()["psnr"] == math.inf
    assert {len(values) for values in metrics.compute()["per_image"].values()} == {3}


class Rows:
    """A tokenizer of flexible length: token i is the mean colour of row i; rows that were not kept are grey."""

    def __init__(self, codebook_size: int | None = 256) -> None:
        self.layout, self.encoded = TokenLayout(((16,),), codebook_size, 1), 0

    def encode(self, images: Tensor, rng: None = None) -> Tensor:
        self.encoded += len(images)
        return to_uint8(images.mean((1, 3))).long()

    def decode(self, tokens: Tensor, lengths: int | None = None, rng: None = None) -> Tensor:
        kept = torch.arange(tokens.shape[1]) < (tokens.shape[1] if lengths is None else lengths)
        rows = torch.where(kept, tokens / 127.5 - 1, 0.0)
        return rows[:, None, :, None].expand(-1, 3, -1, 16)


class Whole(Rows):
    def decode(self, tokens: Tensor, rng: None = None) -> Tensor:  # type: ignore[override]
        return super().decode(tokens)


def striped(count: int) -> Tensor:
    rows = torch.rand(count, 1, 16, 1, generator=torch.Generator().manual_seed(3)) * 2 - 1
    return rows.expand(count, 3, 16, 16)


def test_the_curve_grows_with_the_tokens_and_encodes_each_image_once() -> None:
    tokenizer, x = Rows(), striped(6)
    curve = reconstruction_curve(tokenizer, x.split(4), [1, 4, 16])
    assert [row["length"] for row in curve] == [1, 4, 16] and tokenizer.encoded == 6
    assert all(row["images"] == 6 for row in curve)
    assert curve[0]["psnr"] < curve[1]["psnr"] < curve[2]["psnr"] and curve[0]["ssim"] < curve[2]["ssim"]
    report = reconstruction_report(Rows(), x.split(4))
    assert {k: v for k, v in curve[2].items() if k != "length"} == {k: report[k] for k in ("images", "psnr", "ssim")}
    assert curve[1]["psnr"] == pytest.approx(psnr(tokenizer.decode(tokenizer.encode(x), 4), x).mean().item())


def test_a_curve_needs_a_tokenizer_of_flexible_length_and_lengths_it_has() -> None:
    tokenizer = Whole()
    with pytest.raises(ValueError, match="Whole always decodes all of its 16 tokens"):
        reconstruction_curve(tokenizer, striped(2).split(2), [4])
    for lengths in ([0, 4], [17], []):
        with pytest.raises(ValueError, match=r"lengths must be in 1 \.\. 16"):
            reconstruction_curve(tokenizer := Rows(), striped(2).split(2), lengths)
    assert tokenizer.encoded == 0


def test_a_report_of_latents_has_no_codebook() -> None:
    report = reconstruction_report(Rows(None), [striped(2)])
    assert set(report) == {"images", "psnr", "ssim"}
    assert reconstruction_report(Rows(), [striped(2)])["codebook"] == 256


# ---- LPIPS ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("trunk", TRUNKS)
def test_lpips_reads_images_down_to_a_size_and_refuses_smaller_ones(trunk: Any) -> None:
    model = LPIPS(trunk)
    side = model.smallest
    assert side == {"alex": 31, "vgg": 16, "squeeze": 17}[trunk]
    x = torch.rand(1, 3, side, side)
    assert model(x, 1 - x).isfinite().all()
    with pytest.raises(RuntimeError):  # the network itself has nothing left there
        y = x[..., : side - 1]
        for part in model.slices:
            y = part(y)
    for small in (x[..., : side - 1], x[..., : side - 1, :]):
        with pytest.raises(ValueError, match=rf"LPIPS\({trunk}\) needs images of at least {side} pixels a side; got"):
            model(small, small)
    with pytest.raises(ValueError, match=r"\(B, 3, H, W\) twice is needed"):
        model(x[:, :1], x[:, :1])


def test_lpips_of_zero_to_one_as_a_map_and_layer_by_layer(squeeze: LPIPS) -> None:
    x, y = smooth(2, 40, 48), noisy(smooth(2, 40, 48), 0.3)
    distance = squeeze(x, y)
    torch.testing.assert_close(squeeze((x + 1) / 2, (y + 1) / 2, normalize=True), distance, rtol=1e-4, atol=1e-6)
    assert (squeeze((x + 1) / 2, (y + 1) / 2) - distance).abs().min() > 1e-3
    layers = squeeze.per_layer(x, y)
    assert layers.shape == (7, 2) and (layers > 0).all()
    torch.testing.assert_close(layers.sum(0), distance)
    spatial = squeeze(x, y, spatial=True)
    assert spatial.shape == (2, 1, 40, 48)
    torch.testing.assert_close(spatial.mean((1, 2, 3)), distance, rtol=0.1, atol=0)
    y = torch.cat([x[..., :40], noisy(x, 1.0)[..., 40:]], -1)  # only the right edge differs
    spatial = squeeze(x, y, spatial=True)
    assert spatial[..., 40:].mean() > 3 * spatial[..., :8].mean()


def test_heads_weigh_channels_and_the_scaling_layer_is_a_choice(squeeze: LPIPS) -> None:
    x, y = smooth(2, 32, 32), noisy(smooth(2, 32, 32), 0.3)
    plain, ones = LPIPS("squeeze", heads=False), LPIPS("squeeze")
    plain.load_official(to_official(squeeze))  # leaves its heads
    ones.load_official({k: torch.ones_like(v) if k.startswith("lin") else v for k, v in to_official(squeeze).items()})
    torch.testing.assert_close(plain(x, y), ones(x, y))
    assert (plain(x, y) > squeeze(x, y)).all()
    unscaled = LPIPS("squeeze", scaling_layer=False)
    unscaled.load_official(to_official(squeeze))
    scaled = [(v - squeeze.shift) / squeeze.scale for v in (x, y)]
    torch.testing.assert_close(unscaled(*scaled), squeeze(x, y))
    assert (unscaled(x, y) - squeeze(x, y)).abs().min() > 1e-4


@pytest.mark.parametrize("case", ["dead", "vanishing"])
def test_the_gradient_is_finite_where_no_channel_is_left(squeeze: LPIPS, case: str) -> None:
    """Where all are 0 the ReLU before hides an infinite derivative; not where only their squares are 0."""
    model = LPIPS("squeeze")
    model.load_official({k: v.clone() for k, v in to_official(squeeze).items()})
    first = model.slices[0][0]
    if case == "dead":
        first.bias.sub_(1.0)  # dark or flat places have no feature left
    else:
        first.weight.mul_(1e-30)
        first.bias.mul_(1e-30)
    x, y = torch.zeros(1, 3, 32, 32), smooth(1, 32, 32) * 3
    y[..., :16] = 0
    with torch.no_grad():
        squares = model.slices[0]((y - model.shift) / model.scale).square().sum(1)
    assert (squares == 0).any() and (case == "vanishing" or (squares > 0).any())
    x.requires_grad_()
    for pair in ((x, y), (x + y, x.detach()), (x, x + y)):
        (grad,) = torch.autograd.grad(model(*pair).sum(), x)
        assert grad.isfinite().all()


@pytest.mark.parametrize("path", MANIFESTS, ids=lambda p: p.stem)
def test_every_key_of_the_released_files_is_accounted_for_both_ways(path: Path) -> None:
    meta = json.loads(path.read_text())
    on_meta = {
        part: {k: torch.empty(s, device="meta") for k, s in meta[part].items()} for part in ("heads", "backbone")
    }
    full = {k: torch.empty(s, device="meta") for k, s in meta["full"].items()}
    with torch.device("meta"):
        model = LPIPS(meta["constructor"]["net"])
    for load in (lambda: model.load(on_meta["backbone"], on_meta["heads"]), lambda: model.load_official(full)):
        load()
        assert {k: list(v.shape) for k, v in to_official(model).items()} == meta["full"]
    with pytest.raises(ValueError, match="not in the model: surprise"):
        model.load_official({**full, "surprise": torch.empty(1, device="meta")})
    with pytest.raises(ValueError, match=r"not in the model: features.99.weight"):
        model.load({**on_meta["backbone"], "features.99.weight": full["scaling_layer.shift"]}, on_meta["heads"])
    with pytest.raises(ValueError, match=r"missing in the file: slices.1"):
        model.load_official({k: v for k, v in full.items() if not k.startswith("net.slice2")})


def test_there_are_released_files_of_every_trunk() -> None:
    assert {json.loads(p.read_text())["constructor"]["net"] for p in MANIFESTS} == set(TRUNKS)


def test_official_keys_there_and_back_and_an_alias_that_is_none(squeeze: LPIPS) -> None:
    official = to_official(squeeze)
    own = from_official(official)
    assert own.keys() == squeeze.state_dict().keys()
    assert all(torch.equal(own[k], v) for k, v in squeeze.state_dict().items())
    without = {k: v for k, v in official.items() if not k.startswith("lins.")}
    assert from_official(without).keys() == own.keys()  # older files have no alias
    name = "lins.2.model.1.weight"
    for bad in (
        {**official, name: official[name] + 1},
        {k: v for k, v in official.items() if k != name.replace("s.", "")},
    ):
        with pytest.raises(ValueError, match=rf"{name} must be the same as lin2.model.1.weight"):
            from_official(bad)


# ---- where LPIPS is found -------------------------------------------------------------------------------------

SQUEEZE_FILE = "squeezenet1_1-b8a52dc0.pth"


@pytest.fixture
def places(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty hub cache, no folder named, no package and no network."""

    def no_network(url: str, *rest: Any, **settings: Any) -> None:
        raise OSError(f"no network for {url}")

    monkeypatch.delenv("VARKIT_WEIGHTS", raising=False)
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))
    monkeypatch.setattr(torch.hub, "download_url_to_file", no_network)
    monkeypatch.setattr(lpips_module.importlib.util, "find_spec", lambda name: None)
    return tmp_path


def put(model: LPIPS, folder: Path, heads: str = "squeeze.pth") -> None:
    """The two files, in the format before PyTorch 1.6 as the released ones are."""
    trunk = {f"features.{k}": v for part in model.slices for k, v in part.state_dict().items()}
    head = {f"lin{i}.model.1.weight": h.detach().view(1, -1, 1, 1) for i, h in enumerate(model.heads)}
    (folder / heads).parent.mkdir(parents=True, exist_ok=True)
    torch.save(trunk, folder / SQUEEZE_FILE, _use_new_zipfile_serialization=False)
    torch.save(head, folder / heads, _use_new_zipfile_serialization=False)


def test_what_is_missing_is_named_before_a_network_is_built(
    squeeze: LPIPS, places: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def never(*_: Any, **__: Any) -> None:
        raise AssertionError("built for nothing")

    put(squeeze, places / "full")
    monkeypatch.setattr(LPIPS, "__init__", never)
    monkeypatch.setenv("VARKIT_WEIGHTS", str(places / "mine"))
    for trunk, file in (
        ("alex", "alexnet-owt-7be5be79.pth"),
        ("vgg", "vgg16-397923af.pth"),
        ("squeeze", SQUEEZE_FILE),
    ):
        with pytest.raises(FileNotFoundError) as error:
            find_lpips("auto", trunk, download=False)  # type: ignore[arg-type]
        for words in (file, str(places / "mine"), str(places / "hub" / "checkpoints"), f"pytorch.org/models/{file}"):
            assert words in str(error.value)
    (places / "full" / "squeeze.pth").unlink()
    with pytest.raises(FileNotFoundError, match=r"needs squeeze.pth.*lpips/weights/v0.1/squeeze.pth and put it into"):
        find_lpips(str(places / "full"), "squeeze")
    with pytest.raises(ValueError, match=r"version 0.1 or 0.0; got 'squeeze', '1.0'"):
        find_lpips("auto", "squeeze", version="1.0")  # type: ignore[arg-type]


@pytest.mark.parametrize("heads", ["squeeze.pth", "v0.1/squeeze.pth"])
def test_the_named_folder_comes_before_the_cache(
    squeeze: LPIPS, places: Path, monkeypatch: pytest.MonkeyPatch, heads: str
) -> None:
    x, y = smooth(1, 24, 24), noisy(smooth(1, 24, 24), 0.3)
    torch.manual_seed(5)
    put(other := LPIPS("squeeze"), places / "hub" / "checkpoints", "lpips_squeeze.pth")
    cached = find_lpips("auto", "squeeze", download=False)
    assert cached is not None and torch.equal(cached(x, y), other(x, y))
    put(squeeze, places / "mine", heads)
    monkeypatch.setenv("VARKIT_WEIGHTS", str(places / "mine"))
    named = find_lpips("auto", "squeeze", download=False)
    assert named is not None and torch.equal(named(x, y), squeeze(x, y))
    given = find_lpips(str(places / "mine"), "squeeze")
    assert given is not None and torch.equal(given(x, y), squeeze(x, y))


def test_what_is_missing_is_fetched_only_when_asked_for(
    squeeze: LPIPS, places: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        assert find_lpips("auto", "squeeze") is None
    assert (
        "not reachable (no network for https://download.pytorch.org/models/squeezenet1_1-b8a52dc0.pth)" in caplog.text
    )
    fetched = []

    def fetch(url: str, target: str, sha256: str | None, **settings: Any) -> None:
        put(squeeze, places / "net")
        Path(target).write_bytes((places / "net" / Path(url).name).read_bytes())
        fetched.append((Path(target).name, sha256))

    monkeypatch.setattr(torch.hub, "download_url_to_file", fetch)
    with pytest.raises(FileNotFoundError):
        find_lpips("auto", "squeeze", download=False)
    assert fetched == []
    for _ in range(2):
        assert find_lpips("auto", "squeeze") is not None
    assert fetched == [(SQUEEZE_FILE, "b8a52dc0"), ("lpips_squeeze.pth", None)]


def test_a_broken_file_is_named(squeeze: LPIPS, places: Path) -> None:
    put(squeeze, places)
    for damage in (b"", b"hello", (places / SQUEEZE_FILE).read_bytes()[:5000]):
        (places / SQUEEZE_FILE).write_bytes(damage)
        with pytest.raises(ValueError, match=rf"{SQUEEZE_FILE} is no file of plain tensors"):
            find_lpips(str(places), "squeeze")


@pytest.mark.skipif(importlib.util.find_spec("lpips") is None, reason="the package lpips is not installed")
def test_heads_come_from_the_package_without_importing_it(
    squeeze: LPIPS, places: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.undo()
    put(squeeze, places)
    (places / "squeeze.pth").unlink()
    before = {name for name in sys.modules if name.split(".")[0] == "lpips"}
    new, old = (find_lpips(str(places), "squeeze", version=v) for v in ("0.1", "0.0"))
    assert {name for name in sys.modules if name.split(".")[0] == "lpips"} == before
    assert new is not None and old is not None and new.scaling_layer and not old.scaling_layer
    assert float(new.heads[0][0]) == pytest.approx(0.204709068) and float(old.heads[0][0]) == pytest.approx(0.322066546)
    assert all((head >= 0).all() for model in (new, old) for head in model.heads)


# ---- CLIP score -----------------------------------------------------------------------------------------------


def test_clip_score_is_a_cosine_and_its_clamps_are_three() -> None:
    images = torch.tensor([[3.0, 0.0], [0.0, 2.0], [1.0, 1.0]])
    texts = torch.tensor([[5.0, 0.0], [0.0, -1.0], [0.0, 4.0]])  # cosines 1, -1, 1 / sqrt 2
    root = 1 / math.sqrt(2)
    score = clip_score(images, texts)
    assert score.per_sample.tolist() == pytest.approx([100, -100, 100 * root])
    assert score.value == pytest.approx(100 * root / 3)
    clamped = clip_score(images, texts, 2.5, "sample")
    assert clamped.per_sample.tolist() == pytest.approx([2.5, 0, 2.5 * root])
    assert clamped.value == pytest.approx(2.5 * (1 + root) / 3)
    assert clip_score(images[1:2], texts[1:2], 1.0).value == pytest.approx(-1)
    assert clip_score(images[1:2], texts[1:2], 1.0, "mean").value == 0
    assert clip_score(images, texts, clamp="mean").value == pytest.approx(score.value)
    assert clip_score(images * 7, texts * 0.1).value == pytest.approx(score.value)


def test_clip_score_refuses_rows_that_do_not_pair() -> None:
    x = torch.ones(3, 4)
    for other in (x[:2], x[:, :3]):
        with pytest.raises(ValueError, match="as many texts as images, of one width"):
            clip_score(x, other)
    bad = x.clone()
    bad[1] = 0
    with pytest.raises(ValueError, match=r"text embeddings of length 0 have no direction: rows \[1\]"):
        clip_score(x, bad)
    bad[2, 0] = torch.nan
    with pytest.raises(ValueError, match="image embeddings: 1 of 3 rows not finite"):
        clip_score(bad, x)
    with pytest.raises(ValueError, match="needs at least 1 samples"):
        clip_score(x[:0], x[:0])
    with pytest.raises(ValueError, match="clamp must be none, sample or mean"):
        clip_score(x, x, clamp="zero")  # type: ignore[arg-type]


# ---- controllability ------------------------------------------------------------------------------------------


def test_edges_are_scored_image_by_image() -> None:
    label = torch.zeros(4, 2, 4, dtype=torch.uint8)
    label[:3, 0] = 255  # four edge pixels, none in the last
    prediction = label.clone()
    prediction[1, 0, :2] = 0  # two missed,
    prediction[1, 1, 0] = 255  # one too many: 2 * 2 / (3 + 4)
    prediction[2] = 254  # nearly white is no edge
    found = canny_f1(prediction, label)
    assert found.per_image.tolist() == pytest.approx([1, 4 / 7, 0, 0])
    assert found.mean == pytest.approx((1 + 4 / 7) / 4)
    assert canny_f1(prediction, label, zero_division=1.0).per_image.tolist() == pytest.approx([1, 4 / 7, 0, 1])
    assert canny_f1(prediction // 255, label // 255, positive_value=1).per_image[1] == pytest.approx(4 / 7)
    swapped = canny_f1(label, prediction)
    torch.testing.assert_close(swapped.per_image, found.per_image)
    with pytest.raises(ValueError, match=r"two equal shapes \(B, H, W\)"):
        canny_f1(prediction[:, None], label[:, None])


def test_depth_is_compared_at_its_own_largest_value() -> None:
    label = torch.tensor([[[0, 255], [51, 102]], [[10, 20], [30, 250]]], dtype=torch.uint8)
    assert depth_rmse(label.float() * 0.37, label).per_image.tolist()[0] == pytest.approx(0, abs=1e-4)
    prediction = torch.tensor([[[0.0, 5.0], [1.0, 3.0]], [[1.0, 2.0], [3.0, 25.5]]])
    expected = [math.sqrt(51**2 / 4), math.sqrt(5**2 / 4)]
    found = depth_rmse(prediction, label)
    assert found.per_image.tolist() == pytest.approx(expected)
    assert found.mean == pytest.approx(sum(expected) / 2)  # not the root of all pixels' mean
    assert depth_rmse(prediction * 4, label).mean == pytest.approx(found.mean)
    with pytest.raises(ValueError, match=r"images \[1\] \(from 0\) have none"):
        depth_rmse(torch.stack([prediction[0], torch.zeros(2, 2)]), label)


def test_map_similarity_takes_maps_of_zero_to_255() -> None:
    x = (smooth(2, 176, 180)[:, :1] + 1) * 127.5
    y = (x + 40 * torch.randn(x.shape, generator=torch.Generator().manual_seed(0))).clamp(0, 255)
    found = map_similarity(x, y)
    expected = multi_scale_ssim(x / 127.5 - 1, y / 127.5 - 1, variant="torchmetrics")
    torch.testing.assert_close(found.per_image, expected, rtol=1e-6, atol=1e-6)
    assert found.mean == pytest.approx(expected.mean().item())
    assert map_similarity(x / 255, y / 255, input_divisor=1.0).mean == pytest.approx(found.mean, rel=1e-5)
    assert map_similarity(x.byte(), x.byte()).mean == pytest.approx(1)
    torch.testing.assert_close(
        map_similarity(x * 2 - 100, y).per_image, map_similarity((x * 2 - 100).clamp(0, 255), y)[1]
    )


def test_mean_iou_by_hand() -> None:
    label = torch.tensor([[[0, 0, 1], [1, 9, 9]]], dtype=torch.uint8)
    prediction = torch.tensor([[[0, 1, 1], [1, 2, 3]]], dtype=torch.uint8)
    found = mean_iou(prediction, label, 4, ignore_label=9)
    assert found.iou.tolist()[:2] == pytest.approx([1 / 2, 2 / 3]) and found.iou[2:].isnan().all()
    assert found.miou == pytest.approx((1 / 2 + 2 / 3) / 2)  # the predictions at ignored pixels do not count
    prediction[0, 0, 0] = 2
    found = mean_iou(prediction, label, 4, ignore_label=9)
    assert found.miou == pytest.approx((0 + 2 / 3 + 0) / 3)  # a class that is only predicted counts as 0
    assert found.iou[2:].isnan().all()
    shifted = mean_iou(prediction, torch.where(label == 9, 9, label + 1), 5, ignore_label=9, prediction_offset=1)
    assert shifted.miou == pytest.approx(found.miou)
    torch.testing.assert_close(shifted.iou[1:], found.iou, equal_nan=True)


def test_mean_iou_in_batches_or_merged_is_that_of_the_whole() -> None:
    generator = torch.Generator().manual_seed(0)
    label, prediction = (torch.randint(6, (5, 4, 4), generator=generator) for _ in range(2))
    settings: dict[str, Any] = {"ignore_label": 5, "prediction_offset": -1}
    prediction = prediction.clamp_min(1)
    expected = mean_iou(prediction, label, 5, **settings)
    one, two = MeanIoU(5, **settings), MeanIoU(5, **settings)
    one.update(prediction[:1], label[:1])
    one.update(prediction[1:3], label[1:3])
    two.update(prediction[3:], label[3:])
    one.merge(two)
    assert one.compute().miou == expected.miou and torch.equal(one.compute().iou, expected.iou)
    by_image = sum(mean_iou(prediction[i : i + 1], label[i : i + 1], 5, **settings).miou for i in range(5)) / 5
    assert by_image != pytest.approx(expected.miou)  # one matrix of all pixels
    with pytest.raises(ValueError, match="differ"):
        one.merge(MeanIoU(5))


def test_the_class_that_shares_its_index_with_the_ignored_label_is_lost_unless_counted() -> None:
    label = torch.tensor([[[1, 2, 3, 0]]])
    prediction = torch.tensor([[[0, 1, 1, 2]]])  # with the offset 1, 2, 2, 3
    lost = mean_iou(prediction, label, 3, ignore_label=0, prediction_offset=1)
    assert lost.iou.isnan().tolist() == [True, False, False] and lost.miou == 1  # the wrong pixel went with its label
    counted = mean_iou(prediction, label, 4, ignore_label=0, prediction_offset=1)
    assert counted.iou[1:].tolist() == [1, 0.5, 0] and counted.miou == pytest.approx(0.5)


def test_mean_iou_refuses_ids_beyond_its_classes() -> None:
    metric = MeanIoU(3, ignore_label=255)
    good = torch.tensor([[[0, 1, 2, 255]]])
    with pytest.raises(ValueError, match=r"predictions \(after the offset\) must be in 0 \.\. 3.*got 0 \.\. 255"):
        metric.update(good, good)
    with pytest.raises(ValueError, match=r"labels must be in 0 \.\. 3.*got 0 \.\. 4"):
        metric.update(good.clamp_max(2), torch.tensor([[[0, 1, 2, 4]]]))
    with pytest.raises(ValueError, match="no pixel counts"):
        metric.compute()
    with pytest.raises(ValueError, match="num_classes must be at least 1"):
        MeanIoU(0)
    metric.update(good.clamp_max(2), good)
    assert metric.compute().miou == 1
