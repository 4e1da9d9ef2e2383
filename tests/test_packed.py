"""Repacked linear layers: the same numbers, the same names, never stale."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from torch import nn

from varkit.layers.packed import PackedLinear, can_pack, pack_linears
from varkit.pipelines.auto import create_pipeline

pytestmark = pytest.mark.skipif(not can_pack(), reason="this torch has no oneDNN")


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("rows", [1, 2, 7])
def test_the_product_is_that_of_the_plain_layer(bias: bool, rows: int) -> None:
    plain = nn.Linear(24, 40, bias=bias)
    x = torch.randn(rows, 3, 24)
    packed = PackedLinear.of(plain)
    assert packed.weight is plain.weight and packed.bias is plain.bias
    with torch.no_grad():
        torch.testing.assert_close(packed(x), plain(x), atol=1e-5, rtol=1e-5)
    assert packed.packed is not None
    assert list(packed.state_dict()) == list(plain.state_dict())


def test_a_change_of_the_weights_is_seen() -> None:
    plain, x = nn.Linear(8, 8), torch.randn(2, 8)
    packed = PackedLinear.of(plain)
    with torch.no_grad():
        packed(x)
        plain.weight.mul_(2)
        torch.testing.assert_close(packed(x), plain(x), atol=1e-5, rtol=1e-5)
        packed.load_state_dict({"weight": torch.eye(8), "bias": torch.zeros(8)})
        torch.testing.assert_close(packed(x), x, atol=1e-5, rtol=1e-5)
        packed.weight.data = 3 * torch.eye(8)
        torch.testing.assert_close(packed(x), 3 * x, atol=1e-5, rtol=1e-5)


def test_it_learns_copies_and_other_dtypes_as_before() -> None:
    packed, x = PackedLinear.of(nn.Linear(8, 4)), torch.randn(2, 8)
    packed(x).sum().backward()
    assert packed.weight.grad is not None and packed.packed is None
    with torch.no_grad():
        packed(x)
        twin = copy.deepcopy(packed)
        assert twin.packed is None
        torch.testing.assert_close(twin(x), packed(x))
        assert packed.bfloat16()(x.bfloat16()).dtype == torch.bfloat16


def test_a_prepared_pipeline_draws_the_same_images_and_saves_the_same_files(tmp_path: Path) -> None:
    small = {"num_classes": 3, "depth": 2, "hidden_size": 32, "num_heads": 2}
    pipe = create_pipeline("llamagen_fashion", **small)
    pipe.set_progress_bar_config(disable=True)
    nn.init.normal_(pipe.transformer.output.weight)
    before = pipe([0, 1, 2], seed=1, guidance_scale=2.0, output_type="latent").images
    linears = sum(type(m) is nn.Linear for m in pipe.transformer.modules())
    pipe.optimize_decoding()
    assert linears and sum(isinstance(m, PackedLinear) for m in pipe.transformer.modules()) == linears
    assert torch.equal(pipe([0, 1, 2], seed=1, guidance_scale=2.0, output_type="latent").images, before)
    pipe.save_pretrained(tmp_path)
    again = type(pipe).from_pretrained(tmp_path)
    again.set_progress_bar_config(disable=True)
    assert torch.equal(again([0, 1, 2], seed=1, guidance_scale=2.0, output_type="latent").images, before)
    assert pack_linears(pipe.transformer) == 0


def test_what_cannot_be_prepared_is_refused() -> None:
    pipe = create_pipeline("llamagen_fashion", num_classes=3, depth=1, hidden_size=32, num_heads=2)
    with pytest.raises(ValueError, match=r"repacking float32 weights .* this model is torch.bfloat16"):
        pipe.to(torch.bfloat16).optimize_decoding()
    pipe = create_pipeline("var_fashion", num_classes=3, depth=1, hidden_size=32, num_heads=2)
    with pytest.raises(ValueError, match="VAR does not decide one token a step"):
        pipe.optimize_decoding(backend="eager")
