"""CUDA gives the CPU's answers: `make test-gpu` on a machine that has it."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.test_models import GENERATORS, classes, random_tokens, sampler_of, step_answers, tiny_pair
from varkit import ClassToImagePipeline, Rng
from varkit.rng import Draw

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


def test_random_numbers_are_the_same_on_both() -> None:
    positions = torch.arange(1000)
    here, there = (Rng.from_seed(5, 4).to(d).uniform(positions.to(d), Draw.TOKEN) for d in ("cpu", "cuda"))
    assert torch.equal(here, there.cpu())


@pytest.mark.parametrize("name", GENERATORS)
def test_predictions_are_the_same_on_both(name: str) -> None:
    model, tokenizer = tiny_pair(name)
    tokens, cond = random_tokens(model, 4), classes(model, 4)
    inputs = tokenizer.embed(tokens)
    with torch.no_grad():
        expected = step_answers(model, tokens, inputs, cond)
        there = step_answers(model.cuda(), tokens.cuda(), inputs.cuda(), cond.to(torch.device("cuda")))
    torch.testing.assert_close(there.cpu(), expected, atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", GENERATORS)
def test_pipelines_sample_and_edit(name: str, dtype: torch.dtype) -> None:
    model, tokenizer = tiny_pair(name)
    pipe: Any = ClassToImagePipeline(model, tokenizer, sampler_of(model, guidance_scale=2.0)).to("cuda", dtype)
    pipe.set_progress_bar_config(disable=True)
    out = pipe([0, 1], seed=0, output_type="pt")
    assert out.images.device.type == "cuda" and out.images.isfinite().all()
    edited = pipe.edit(out.images.float() * 2 - 1, box=(0, 0, 0.5, 1), seed=0, output_type="pt")
    assert edited.images.isfinite().all()


@pytest.mark.parametrize("name", GENERATORS)
def test_a_bfloat16_training_step_is_finite(name: str) -> None:
    model, tokenizer = (part.cuda() for part in tiny_pair(name))
    tokens = random_tokens(model, 8).cuda()
    model.train()
    with torch.autocast("cuda", torch.bfloat16):
        losses = model.training_loss(tokens, tokenizer.embed(tokens), classes(model, 8).to("cuda"), Rng.from_seed(0, 8))
    losses["loss"].backward()
    assert losses["loss"].isfinite() and all(p.grad.isfinite().all() for p in model.parameters())
