"""Weights stored in eight bits: small, close, opened as if nothing was."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.test_models import liven, tiny_pair
from varkit import AutoPipeline
from varkit.eight_bit import FILE, SCALE, pack_tensors, unpack_tensors, write_packed
from varkit.interfaces import Generator
from varkit.pipelines.auto import assemble, open_tokenizer, open_transformer


def packed_pipeline(name: str, folder: Path) -> Any:
    model, tokenizer = tiny_pair(name)
    pipeline = assemble(liven(model, 0.05), liven(tokenizer, 0.05), {})
    pipeline.save_pretrained(folder)
    for part in ("transformer", "image_tokenizer"):
        write_packed(pack_tensors(getattr(pipeline, part).state_dict()), folder / part)
    return pipeline


def test_a_weight_is_off_by_half_a_step_of_its_row_at_most() -> None:
    rng = torch.Generator().manual_seed(0)
    weights = {
        "linear": torch.randn(40, 64, generator=rng) * torch.logspace(-4, 2, 40)[:, None],  # rows of any size
        "conv": torch.randn(32, 8, 3, 3, generator=rng),
        "positions": torch.randn(1, 30, 48, generator=rng) * torch.logspace(-2, 2, 30)[:, None],
        "nought": torch.zeros(40, 64),
    }
    packed = pack_tensors(weights)
    assert all(packed[name].dtype == torch.int8 for name in weights)
    assert packed["positions" + SCALE].shape == (1, 30, 1) and packed["conv" + SCALE].shape == (32, 1, 1, 1)
    back = unpack_tensors(packed)
    assert back.keys() == weights.keys()
    for name, x in weights.items():
        step = packed[name + SCALE]
        assert ((back[name] - x).abs() <= step / 2 * (1 + 1e-5)).all()
        assert (packed[name].abs().amax() == 127) or not x.any()
    again = pack_tensors(back)  # what was rounded is not rounded further
    assert all(torch.equal(again[name], packed[name]) for name in weights)


def test_vectors_small_tensors_and_integers_are_not_rounded_to_eight_bits() -> None:
    state = {"bias": torch.randn(2000), "small": torch.randn(4, 4), "ids": torch.arange(5000).view(50, 100)}
    packed = pack_tensors(state)
    assert [packed[k].dtype for k in state] == [torch.float16, torch.float16, torch.int64]
    back = unpack_tensors(packed)
    assert torch.equal(back["ids"], state["ids"]) and torch.equal(back["bias"], state["bias"].half().float())


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e6])
@pytest.mark.parametrize("shape", [(64, 64), (64,)])
def test_a_weight_that_cannot_be_stored_is_named(value: float, shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"head\.weight"):
        pack_tensors({"head.weight": torch.full(shape, value)})


@pytest.mark.parametrize("name", ["var_d16", "llamagen_b", "xar_b", "flextok_ar_fashion"])
def test_a_pipeline_opens_as_if_nothing_was(name: str, tmp_path: Path) -> None:
    pipeline = packed_pipeline(name, tmp_path / "packed")
    assert {p.name for p in (tmp_path / "packed" / "transformer").iterdir()} == {"config.json", FILE}
    again = AutoPipeline.from_pretrained(tmp_path / "packed")
    for part in ("transformer", "image_tokenizer"):
        model, own = getattr(again, part), getattr(pipeline, part).state_dict()
        assert not model.training and model.dtype == torch.float32
        wanted = unpack_tensors(pack_tensors(own))
        for key, x in model.state_dict().items():
            assert torch.equal(x, wanted[key]) and (x - own[key]).abs().max() <= own[key].abs().max() / 200
    assert again(0, seed=0).images[0].size == pipeline(0, seed=0).images[0].size
    half = AutoPipeline.from_pretrained(tmp_path / "packed", torch_dtype=torch.bfloat16)
    assert half.transformer.dtype == torch.bfloat16
    part = type(pipeline.transformer).from_pretrained(tmp_path / "packed" / "transformer", dtype=torch.bfloat16)
    assert part.dtype == torch.bfloat16
    assert type(open_transformer(str(tmp_path / "packed"), Generator)[0]) is type(pipeline.transformer)
    assert type(open_tokenizer(str(tmp_path / "packed"))) is type(pipeline.image_tokenizer)


def test_weights_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    packed_pipeline("llamagen_b", tmp_path / "packed")
    file = tmp_path / "packed" / "transformer" / FILE
    tensors = load_file(file)
    del tensors["norm.weight"]
    save_file(tensors, file)
    with pytest.raises(Exception, match=r"norm\.weight"):
        AutoPipeline.from_pretrained(tmp_path / "packed")
