"""What is the multi-scale quantiser's own. What every tokenizer must do is in test_models.py."""

from __future__ import annotations

from itertools import accumulate, pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.test_models import liven
from varkit import MultiScaleVQ
from varkit.checkpoints.files import build_official, to_official
from varkit.layout import TokenLayout, square_grids
from varkit.tokenizers.multiscale_vq import (
    SCALES_256,
    SCALES_512,
    SCALES_1024,
    MultiScaleQuantizer,
    ResidualConv,
    ResidualConvs,
)

SIZES: dict[str, Any] = {
    "codebook_size": 24,
    "latent_dim": 4,
    "base_channels": 32,
    "channel_multipliers": (1, 1),
    "num_res_blocks": 1,
    "scales": (1, 2, 4),
}
GRIDS = square_grids((1, 2, 3, 5))


def build(**changes: Any) -> MultiScaleVQ:
    torch.manual_seed(0)  # the same weights every time
    return liven(MultiScaleVQ(**{**SIZES, **changes}), 0.05)


def quantizer(**changes: Any) -> MultiScaleQuantizer:
    torch.manual_seed(0)
    return liven(MultiScaleQuantizer(40, 4, GRIDS, **changes), 0.3)


def features(batch: int = 3, seed: int = 0) -> Tensor:
    return torch.randn(batch, 4, 5, 5, generator=torch.Generator().manual_seed(seed))


def images(model: MultiScaleVQ, batch: int = 2) -> Tensor:
    return torch.rand(batch, 3, *model.image_size, generator=torch.Generator().manual_seed(0)) * 2 - 1


# ---- every switch ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "changes",
    [
        {"residual_convs": 0},
        {"residual_convs": 0, "residual_conv_count": 2},
        {"residual_convs": 1},
        {"residual_convs": 2},
        {"residual_convs": 4},
        {"residual_ratio": 0.0},
        {"residual_ratio": 0.0, "residual_convs": 1},
        {"residual_ratio": -0.5},
        {"normalize_codes": True},
        {"quant_conv_kernel": 1},
        {"image_channels": 1},
        {"attention": False},
        {"attention": False, "mid_attention": False},
        {"dropout": 0.1},
        {"scales": (1, (1, 2), (2, 3))},
        {"scales": (4,)},
        {"scales": ((2, 1), (4, 2))},
        {"channel_multipliers": (1, 2, 1)},
    ],
    ids=str,
)
def test_every_switch_encodes_decodes_and_trains(changes: dict[str, Any]) -> None:
    model = build(**changes)
    x = images(model)
    ids = model.encode(x)
    assert ids.shape == (2, model.layout.length)
    assert model.decode(ids).shape == x.shape
    assert model.embed(ids).shape == (2, model.layout.length, 4)
    running = model.running(2)
    for part in model.layout.slices:
        positions = torch.arange(part.start, part.stop)
        torch.testing.assert_close(running.inputs(positions), model.embed(ids)[:, part])
        running.record(ids[:, part], positions)
    torch.testing.assert_close(running.f_hat, model.quantize.sums(ids)[-1])
    model.train()
    out, quantized = model(x)
    (F.mse_loss(out, x) + quantized.loss).backward()
    missing = [k for k, p in model.named_parameters() if p.grad is None or not p.grad.isfinite().all()]
    used = {model.quantize.quant_resi.index(k, len(model.grids)) for k in range(len(model.grids))}
    idle = set(range(4)) - used if changes.get("residual_convs", 4) == 4 else set()  # no scale picks them
    assert {k.rsplit(".", 1)[0] for k in missing} == {
        f"quantize.quant_resi.qresi_ls.{i}" for i in idle if model.quantize.quant_resi.shared == 4
    } - ({f"quantize.quant_resi.qresi_ls.{i}" for i in range(4)} if changes.get("residual_ratio") == 0 else set())


def test_phi_kinds_have_the_official_key_names() -> None:
    def keys(**changes: Any) -> set[str]:
        return {k.removeprefix("quant_resi.").rsplit(".", 1)[0] for k in quantizer(**changes).state_dict()} - {
            "embedding",
            "ema_vocab_hit_SV",
        }

    assert keys(residual_convs=4) == {f"qresi_ls.{i}" for i in range(4)}
    assert keys(residual_convs=1) == {"qresi"}
    assert keys(residual_convs=0) == {"0", "1", "2", "3"}
    assert keys(residual_convs=0, residual_conv_count=2) == {"0", "1"}
    assert keys(residual_ratio=0.0) == set()


def test_phi_mixes_by_its_ratio() -> None:
    conv, h = liven(ResidualConv(4, 0.3)), features()
    torch.testing.assert_close(conv(h), 0.7 * h + 0.3 * F.conv2d(h, conv.weight, conv.bias, padding=1))
    off = quantizer(residual_ratio=0.0)
    assert torch.equal(off.quant_resi(h, 2, 4), h)
    # The sign of the ratio has no meaning.
    assert torch.equal(quantizer(residual_ratio=-0.5).encode(h), quantizer(residual_ratio=0.5).encode(h))


@pytest.mark.parametrize(
    ("shared", "count", "scales", "table"),
    [
        (4, 0, 10, [0, 0, 1, 1, 1, 2, 2, 3, 3, 3]),
        (4, 0, 14, [0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2, 3, 3, 3]),
        (4, 0, 5, [0, 1, 2, 2, 3]),
        (4, 0, 4, [0, 1, 2, 3]),
        (4, 0, 3, [0, 2, 3]),
        (4, 0, 1, [0]),
        (1, 0, 4, [0, 0, 0, 0]),
        (0, 4, 4, [0, 1, 2, 3]),
        (0, 10, 10, [0, 1, 2, 3, 4, 5, 6, 7, 8, 9]),
        (2, 0, 4, [0, 0, 1, 1]),
    ],
)
def test_which_phi_serves_which_scale(shared: int, count: int, scales: int, table: list[int]) -> None:
    convs = ResidualConvs(4, 0.5, shared, count)
    assert [convs.index(k, scales) for k in range(scales)] == table
    if shared == 1:
        return
    # ... and forward uses the conv that index names.
    named = {c: n for n, c in convs.named_modules() if isinstance(c, ResidualConv)}
    used: list[str] = []
    for conv in named:
        conv.register_forward_hook(lambda m, _a, _o: used.append(named[m].split(".")[-1]))
    for k in range(scales):
        convs(features(), k, scales)
    assert used == [str(i) for i in table]


def test_a_grey_model_averages_and_repeats_the_channels() -> None:
    model = build(image_channels=1)
    x = images(model)
    assert torch.equal(model.encode(x), model.encode(x.mean(1, keepdim=True).expand(-1, 3, -1, -1)))
    out = model.decode(model.encode(x))
    assert torch.equal(out[:, 0], out[:, 1]) and torch.equal(out[:, 0], out[:, 2])
    assert model.encoder.conv_in.weight.shape[1] == 1


def test_normalised_codes_ignore_length() -> None:
    cosine, euclid = quantizer(normalize_codes=True), quantizer()
    z = features().permute(0, 2, 3, 1).reshape(-1, 4)
    distance = torch.cdist(z, euclid.codebook)
    assert torch.equal(euclid.nearest(z), distance.argmin(-1))
    similarity = F.cosine_similarity(z[:, None], cosine.codebook[None], dim=-1)
    assert torch.equal(cosine.nearest(z), similarity.argmax(-1))
    assert torch.equal(cosine.nearest(7 * z), cosine.nearest(z))
    assert not torch.equal(euclid.nearest(7 * z), euclid.nearest(z))


def test_impossible_arguments_are_refused() -> None:
    for changes, message in (
        ({"base_channels": 48}, "multiple of 32.*48"),
        ({"image_channels": 4}, "1 .grey. or 3; got 4"),
        ({"scales": ()}, "non-empty"),
        ({"scales": (1, 0)}, "positive"),
    ):
        with pytest.raises(ValueError, match=message):
            build(**changes)


# ---- the pyramid ----------------------------------------------------------------------------------------------


def reference_ids(q: MultiScaleQuantizer, f: Tensor, upsample: str = "bicubic") -> Tensor:
    """The algorithm of the paper (its Algorithm 1), written out with dense distances."""
    residual, out = f.clone(), []
    for k, grid in enumerate(GRIDS):
        z = F.adaptive_avg_pool2d(residual, grid).flatten(2).transpose(1, 2)
        ids = (z[:, :, None] - q.codebook).square().sum(-1).argmin(-1)
        h = q.codebook[ids].transpose(1, 2).reshape(-1, 4, *grid)
        residual = residual - q.quant_resi(F.interpolate(h, size=(5, 5), mode=upsample), k, len(GRIDS))
        out.append(ids)
    return torch.cat(out, 1)


@torch.no_grad()
@pytest.mark.parametrize("convs", [0, 1, 4])
def test_encoding_is_the_papers_algorithm(convs: int) -> None:
    q, f = quantizer(residual_convs=convs), features()
    assert torch.equal(q.encode(f), reference_ids(q, f))
    assert not torch.equal(q.encode(f), reference_ids(q, f, "bilinear"))


@torch.no_grad()
def test_each_scale_of_a_rich_codebook_lowers_the_residual() -> None:
    torch.manual_seed(0)
    q = MultiScaleQuantizer(4096, 4, GRIDS, residual_ratio=0.0)
    nn.init.normal_(q.embedding.weight)
    q.embedding.weight[0] = 0  # so that coding nothing is always possible
    f = features()
    errors = [f.square().mean()] + [(f - f_hat).square().mean() for _, _, f_hat in q.walk(f, GRIDS)]
    assert all(after < before for before, after in pairwise(errors))
    assert errors[-1] < 0.2 * errors[0]


@torch.no_grad()
def test_sums_of_the_ids_are_what_encoding_summed() -> None:
    q, f = quantizer(), features()
    walked = [f_hat for _, _, f_hat in q.walk(f, GRIDS)]
    ids = q.encode(f)
    for ours, theirs in zip(q.sums(ids), walked, strict=True):
        torch.testing.assert_close(ours, theirs)
    for a, b in zip(q.sums(q.embedding(ids)), walked, strict=True):
        torch.testing.assert_close(a, b)  # vectors as well as ids
    for k, end in enumerate(accumulate(h * w for h, w in GRIDS)):
        torch.testing.assert_close(q.sums(ids[:, :end])[-1], walked[k])
    with pytest.raises(ValueError, match=r"7 tokens do not end with a scale; scales end at \[1, 5, 14, 39\]"):
        q.sums(ids[:, :7])


@torch.no_grad()
def test_inputs_read_coarser_scales_only() -> None:
    q = quantizer()
    ids = q.encode(features())
    before, layout = q.embed(ids), TokenLayout(GRIDS, 40, 4)
    assert before.shape == (3, 39, 4) and not before[:, :1].any()
    for k, part in enumerate(layout.slices):
        changed = ids.clone()
        changed[:, part.start] = (changed[:, part.start] + 1) % 40
        moved = (q.embed(changed) - before).abs().amax(-1)
        assert not moved[:, : part.stop].any()
        assert k == len(GRIDS) - 1 or (moved[:, part.stop :] > 0).any(-1).all()


@torch.no_grad()
def test_scales_may_be_given_per_call() -> None:
    model = build()
    wide = torch.rand(2, 3, 4, 12) * 2 - 1
    scales = (1, (1, 3), (2, 6))
    ids = model.encode(wide, scales=scales)
    assert ids.shape == (2, 1 + 3 + 12)
    assert model.decode(ids, scales=scales).shape == wide.shape
    with pytest.raises(ValueError, match=r"images are 4x12 but the last scale \(4, 4\) needs 8x8"):
        model.encode(wide)


# ---- training -------------------------------------------------------------------------------------------------


def test_gradients_pass_straight_through_to_the_encoder() -> None:
    q, f = quantizer().train(), features().requires_grad_()
    out, weight = q(f), torch.randn(3, 4, 5, 5)
    torch.testing.assert_close(out.features.detach(), q.sums(torch.cat(out.ids, 1))[-1])
    (out.features * weight).sum().backward()
    torch.testing.assert_close(f.grad, weight)  # as if there were no quantiser
    assert q.embedding.weight.grad is None or not q.embedding.weight.grad.any()


def test_loss_is_commitment_and_codebook_terms_over_scales() -> None:
    q, f = quantizer(commitment_weight=0.25).train(), features().requires_grad_()
    sums = [f_hat for _, _, f_hat in q.walk(f, GRIDS)]
    out = q(f)
    torch.testing.assert_close(out.loss, sum(1.25 * F.mse_loss(s, f) for s in sums) / len(GRIDS))
    out.loss.backward()
    commitment = sum(0.25 * 2 * (f - s) / f.numel() for s in sums) / len(GRIDS)
    torch.testing.assert_close(f.grad, commitment.detach())
    assert q.embedding.weight.grad.any() and q.quant_resi.qresi_ls[0].weight.grad.any()
    assert [r.shape for r in out.residuals] == [(3 * h * w, 4) for h, w in GRIDS]


def test_usage_is_counted_per_scale_in_training_only() -> None:
    q, f = quantizer(), features()
    q(f)
    assert not q.ema_vocab_hit_SV.any()
    q.train()
    first = q(f)
    counts = torch.stack([torch.bincount(i.flatten(), minlength=40) for i in first.ids]).float()
    assert torch.equal(q.ema_vocab_hit_SV, counts)  # the first record is taken whole
    assert q.ema_vocab_hit_SV.sum(1).tolist() == [3 * h * w for h, w in GRIDS]
    second = q(features(seed=1))
    fresh = torch.stack([torch.bincount(i.flatten(), minlength=40) for i in second.ids]).float()
    torch.testing.assert_close(q.ema_vocab_hit_SV, 0.9 * counts + 0.1 * fresh)
    q.records, before = 100, q.ema_vocab_hit_SV.clone()
    q(features(seed=1))
    torch.testing.assert_close(q.ema_vocab_hit_SV, 0.99 * before + 0.01 * fresh)
    before = q.ema_vocab_hit_SV.clone()
    q(f, GRIDS[1:])  # another list of scales has no row to be counted in
    assert torch.equal(q.ema_vocab_hit_SV, before)


# ---- numbers --------------------------------------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_quantiser_stays_float32(dtype: torch.dtype) -> None:
    model = build()
    ids = model.encode(images(model))
    expected = model.quantize.sums(ids)[-1]
    low = build().to(dtype)
    assert low.encoder.conv_in.weight.dtype == dtype
    assert {v.dtype for v in low.quantize.state_dict().values()} == {torch.float32}
    assert torch.equal(low.codebook, model.codebook)  # no rounding on the way
    assert torch.equal(low.quantize.sums(ids)[-1], expected)
    assert low.decode(ids).dtype == dtype
    assert {v.dtype for v in low.float().state_dict().values()} == {torch.float32}
    assert low.double().quantize.embedding.weight.dtype == torch.float32


@pytest.mark.parametrize("dtype", [None, torch.bfloat16, torch.float16])
def test_the_quantiser_is_opened_in_float32(dtype: torch.dtype | None, tmp_path: Path) -> None:
    model = build()
    model.save_pretrained(tmp_path)
    again = MultiScaleVQ.from_pretrained(tmp_path, **({} if dtype is None else {"torch_dtype": dtype}))
    assert again.encoder.conv_in.weight.dtype == (dtype or torch.float32)
    assert {v.dtype for v in again.quantize.state_dict().values()} == {torch.float32}
    assert torch.equal(again.codebook, model.codebook)
    assert again.decode(again.encode(images(again))).isfinite().all()


@torch.no_grad()
def test_autocast_does_not_reach_the_quantiser() -> None:
    q, f = quantizer(), features(8)
    ids, sums, inputs = q.encode(f), q.sums(q.encode(f)), q.embed(q.encode(f))
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(q.encode(f), ids)
        assert all(torch.equal(a, b) for a, b in zip(q.sums(ids), sums, strict=True))
        assert torch.equal(q.embed(ids), inputs) and q(f).features.dtype == torch.float32


@torch.no_grad()
def test_half_precision_features_are_quantised_in_float32() -> None:
    q, f = quantizer(), features().bfloat16()
    assert torch.equal(q.encode(f), q.encode(f.float()))
    assert q(f).features.dtype == torch.float32


# ---- official files -------------------------------------------------------------------------------------------


def test_published_lists_of_scales() -> None:
    assert [sum(s * s for s in scales) for scales in (SCALES_256, SCALES_512, SCALES_1024)] == [680, 2240, 9451]


def test_one_file_serves_every_list_of_scales() -> None:
    """10 scales in the file: 10 others and 14 open it; statistics of another count start from zero."""
    state = to_official(build(channel_multipliers=(1,), scales=SCALES_256))
    state["quantize.ema_vocab_hit_SV"] = torch.rand(10, 24)
    same = build_official(state, "file")
    assert torch.equal(same.quantize.ema_vocab_hit_SV, state["quantize.ema_vocab_hit_SV"])
    larger = build_official(state, "file", scales=SCALES_512)
    assert larger.image_size == (32, 32)
    assert torch.equal(larger.quantize.ema_vocab_hit_SV, state["quantize.ema_vocab_hit_SV"])
    largest = build_official(state, "file", scales=SCALES_1024)
    assert largest.quantize.ema_vocab_hit_SV.shape == (14, 24) and not largest.quantize.ema_vocab_hit_SV.any()
    assert largest.encode(torch.zeros(1, 3, 64, 64)).shape == (1, 9451)
    assert torch.equal(largest.codebook, same.codebook)
    np.testing.assert_array_equal(state["quantize.ema_vocab_hit_SV"].shape, (10, 24))  # the caller's stays
