"""The causal video tokenizer: what it may not see, what first frames determine, its quantiser, precision."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.test_models import liven, tiny
from varkit.layers.fsq import FSQ
from varkit.tokenizers.magvit2 import TINY, MagViT2, Quantizer, ReleasedFSQ


def clips(model: MagViT2, batch: int = 2, seed: int = 0, frames: int | None = None) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(batch, 3, frames or model.num_frames, *model.image_size, generator=generator) * 2 - 1


def test_the_defaults_are_the_released_sizes() -> None:
    with torch.device("meta"):
        model = MagViT2()
    assert model.layout.grids == ((5, 16, 16),) and model.layout.codebook_size == 64000
    assert sum(p.numel() for p in model.parameters()) == 370_372_105


@pytest.mark.parametrize("changed", range(5))
def test_a_latent_frame_depends_on_no_later_frame_and_on_its_own(changed: int) -> None:
    model = tiny("magvit2_nbp")
    first = clips(model)
    second = first.clone()
    second[:, :, changed] = clips(model, seed=1)[:, :, changed]
    a, b = model.features(first), model.features(second)
    latent = (changed + 1) // 2  # frame 0, then two frames a latent
    torch.testing.assert_close(a[:, :, :latent], b[:, :, :latent], atol=1e-6, rtol=0)
    assert (a[:, :, latent] - b[:, :, latent]).abs().max() > 1e-3


def test_a_decoded_frame_depends_on_no_later_latent() -> None:
    model = tiny("magvit2_nbp")
    ids = model.encode(clips(model)).view(2, 3, 2, 2)
    other = ids.clone()
    other[:, 1] = (ids[:, 1] + 1) % 24
    a, b = model.decode(ids.flatten(1)), model.decode(other.flatten(1))
    torch.testing.assert_close(a[:, :, 0], b[:, :, 0], atol=1e-6, rtol=0)
    assert (a[:, :, 1:] - b[:, :, 1:]).abs().amax((0, 1, 3, 4)).min() > 1e-3


def test_first_frames_have_the_first_tokens() -> None:
    model = liven(MagViT2(**{**TINY, "num_frames": 9}), 0.05)
    given = clips(model)
    tokens = model.encode(given)
    assert tokens.shape == (2, 5 * 2 * 2)
    for frames, latents in ((1, 1), (3, 2), (7, 4), (9, 5)):
        assert torch.equal(model.encode_start(given[:, :, :frames]), tokens[:, : latents * 4])


def test_numbers_of_frames_that_do_not_fit_are_refused_with_those_that_do() -> None:
    model = tiny("magvit2_nbp")
    for frames in (2, 4):
        with pytest.raises(ValueError, match=rf"{frames} frames.*1, 3, 5"):
            model.encode_start(clips(model, frames=frames))
    with pytest.raises(ValueError, match=r"2 frames.*1, 5, 9"):
        MagViT2(**{**TINY, "strides": ((2, 2, 2), (2, 2, 2))}).encode_start(clips(model, frames=2))
    with pytest.raises(ValueError, match="9 frames are more than the 5"):
        model.encode_start(clips(model, frames=9))
    with pytest.raises(ValueError, match="encode_start"):
        model.encode(clips(model, frames=1))
    with pytest.raises(ValueError, match="image_size="):
        model.encode(torch.zeros(1, 3, 5, 16, 16))
    with pytest.raises(ValueError, match=r"\(B, 3, T, H, W\)"):
        model.features(torch.zeros(1, 3, 8, 8))


def test_frames_are_normalised_one_by_one() -> None:
    model = tiny("magvit2_nbp")
    norm = model.encoder.norm_out
    x = torch.randn(2, 16, 3, 4, 4)
    expected = torch.stack([torch.nn.functional.group_norm(f, 4, norm.weight, norm.bias) for f in x.unbind(2)], 2)
    torch.testing.assert_close(norm(x), expected)


@pytest.mark.parametrize(
    "strides", [((1, 1, 1), (2, 2, 2)), ((2, 1, 2), (1, 2, 1)), ((3, 2, 2), (1, 1, 1)), ((1, 2, 2), (4, 2, 2))]
)
def test_any_strides_give_back_the_frames_they_took(strides: Any) -> None:
    t, h, w = (a * b for a, b in zip(*strides, strict=True))
    model = liven(MagViT2(**{**TINY, "strides": strides, "num_frames": 1 + 2 * t, "image_size": (8, 4)}), 0.05)
    given = clips(model)
    reconstruction, quantized = model(given)
    assert reconstruction.shape == given.shape and model.layout.grids == ((3, 8 // h, 4 // w),)
    assert quantized.ids[0].shape == (2, model.layout.length) and torch.equal(quantized.ids[0], model.encode(given))


@pytest.mark.parametrize("num_units", [(0, 0, 0), (2, 0, 1), (0, 1, 0)])
def test_stages_may_have_no_units(num_units: tuple[int, ...]) -> None:
    model = MagViT2(**{**TINY, "num_units": num_units, "base_channels": 4})
    assert [len(s) for s in model.encoder.stages] == list(num_units) == [len(s) for s in model.decoder.stages]
    assert model(clips(model))[0].shape == (2, 3, 5, 8, 8)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_frames": 4}, "4 frames"),
        ({"image_size": 10}, "multiple of the strides, 4 and 4"),
        ({"widths": (8, 16)}, "one less; got 2, 3 and 2"),
        ({"widths": (8, 16, 18)}, "norm_groups 4; got 18"),
        ({"num_units": (0, -1, 1)}, "not be negative"),
        ({"strides": ((1, 2), (2, 2, 2))}, "three numbers"),
        ({"levels": (4, 1)}, "at least 2"),
    ],
)
def test_impossible_models_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        MagViT2(**{**TINY, **changes})


# ---- the quantiser ------------------------------------------------------------------------------------------------


def test_ids_and_values_are_one_to_one_and_little_endian() -> None:
    fsq = ReleasedFSQ((4, 3, 2))
    values = fsq.vectors(torch.arange(24))
    assert torch.equal(fsq.ids(values), torch.arange(24)) and len(values.unique(dim=0)) == 24
    assert values[1, 0] > values[0, 0] and torch.equal(values[1, 1:], values[0, 1:])


def test_it_is_another_quantiser_than_flextoks() -> None:
    z = torch.linspace(-3, 3, 200)[:, None]
    ours, theirs = ReleasedFSQ((8,)), FSQ((8,))
    far = torch.tensor([[20.0]])
    assert ours.bound(far) < 3 < theirs.bound(far)  # a margin inside the levels, and outside
    assert (ours.bound(z) - theirs.bound(z)).abs().max() > 1e-3


def test_gradients_pass_the_rounding_and_codes_are_counted_in_training_alone() -> None:
    quantizer = Quantizer((4, 3, 2))
    z = torch.randn(2, 3, 2, 2, 2, requires_grad=True)
    out = quantizer(z)
    out.features.sum().backward()
    assert z.grad is not None and z.grad.abs().min() > 0 and out.loss == 0
    assert quantizer.ema_vocab_hit_SV.sum() == 16
    quantizer.eval()(torch.zeros(1, 3, 2, 2, 2))
    assert quantizer.ema_vocab_hit_SV.sum() == 16


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_half_precision_and_channels_last_train_and_agree(dtype: torch.dtype) -> None:
    model = tiny("magvit2_nbp").train()
    given = clips(model)
    expected = model(given)[0]
    other = tiny("magvit2_nbp").train().to(dtype, memory_format=torch.channels_last_3d)
    assert other.quantize.ema_vocab_hit_SV.dtype == torch.float32
    out, _ = other(given.contiguous(memory_format=torch.channels_last_3d))
    assert out.dtype == dtype
    (out.float() - given).square().mean().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in other.parameters())
    if dtype == torch.float32:
        torch.testing.assert_close(out, expected, atol=1e-5, rtol=0)


def test_it_learns_a_clip() -> None:
    torch.manual_seed(0)
    model = MagViT2(**TINY).train()
    given = clips(model)[:, :, :1].expand(-1, -1, 5, -1, -1).mul(0.2).add(0.5)
    optim = torch.optim.Adam(model.parameters(), 3e-3)
    losses = []
    for _ in range(20):
        loss = (model(given)[0] - given).square().mean()
        optim.zero_grad()
        loss.backward()
        optim.step()
        losses.append(loss.item())
    assert losses[-1] < 0.2 * losses[0]
