"""RAR: orders in training and in sampling, the annealing, and what its positions mean."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from typer.testing import CliRunner

from tests.test_models import classes, nothing, random_tokens, tiny, tiny_pair
from varkit import ClassToImagePipeline, NextGroupSampler, Rng
from varkit.cli import app
from varkit.generators.rar import random_ratio
from varkit.interfaces import PreviousToken
from varkit.orders import NAMES, token_order


def stepwise(model: Any, tokens: Tensor, order: str, batch: int) -> Tensor:
    """(B, L, V) in the order of prediction, one token a step with the cache."""
    groups = model.in_order(order)
    running = PreviousToken(tokens.shape, tokens.device, torch.cat(groups))
    state, rows = model.start(classes(model, batch)), []
    for positions in groups:
        rows.append(model.predict(state, running.inputs(positions), positions).logits)
        model.append(state, tokens[:, positions], positions)
        running.record(tokens[:, positions], positions)
    return torch.cat(rows, 1)


@pytest.mark.parametrize("order", NAMES)
def test_any_order_is_cached_as_it_is_trained(order: str) -> None:
    model = tiny("rar_b")
    tokens, labels = random_tokens(model, 3), classes(model, 3).labels
    orders = token_order(order, model.layout.grids[0]).expand(3, -1)
    with torch.no_grad():
        whole, _ = model.sequence_logits(tokens.gather(1, orders)[:, :-1], labels, orders)
        torch.testing.assert_close(stepwise(model, tokens, order, 3), whole, atol=1e-4, rtol=1e-4)


def test_several_tokens_at_once_are_predicted_as_one_by_one() -> None:
    model = tiny("rar_b")
    tokens, cond = random_tokens(model, 2), classes(model, 2)
    order = token_order("spiral", model.layout.grids[0])
    inputs = PreviousToken(tokens.shape, tokens.device, order)
    inputs.record(tokens, torch.arange(model.layout.length))
    expected = stepwise(model, tokens, "spiral", 2)
    for sizes in ((5, 4, 3), (1, 11), (12,)):
        state, rows = model.start(cond), []
        for positions in order.split(sizes):
            rows.append(model.predict(state, inputs.inputs(positions), positions).logits)
            model.append(state, tokens[:, positions], positions)
        torch.testing.assert_close(torch.cat(rows, 1), expected, atol=1e-4, rtol=1e-4)


def test_the_next_position_changes_what_is_predicted() -> None:
    """Target-aware: after the same tokens, another position to come has other logits."""
    model = tiny("rar_b")
    tokens, cond = random_tokens(model, 2), classes(model, 2)
    answers = []
    for second in (1, 7):
        state = model.start(cond)
        model.predict(state, torch.zeros(2, 1, dtype=torch.int64), torch.tensor([0]))
        model.append(state, tokens[:, :1], torch.tensor([0]))
        answers.append(model.predict(state, tokens[:, :1], torch.tensor([second])).logits)
    assert (answers[0] - answers[1]).abs().max() > 0.01


def test_the_share_of_random_orders_falls_as_told() -> None:
    assert [random_ratio(s, 100, 200) for s in (0, 100, 150, 175, 200, 900)] == [1, 1, 0.5, 0.25, 0, 0]
    assert random_ratio(101, 100, 100) == 0
    model = tiny("rar_b")
    rng = Rng.from_seed(0, 2000)
    for ratio in (0.0, 0.3, 1.0):
        moved = (model.draw_orders(rng, ratio) != model.raster).any(1).float().mean()
        assert abs(float(moved) - ratio) < 0.04
    half = model.draw_orders(rng, 0.5)
    assert torch.equal(model.draw_orders(rng[torch.tensor([5, 9])], 0.5), half[[5, 9]])


def test_training_sees_the_orders_and_hidden_states_come_back_in_place() -> None:
    model, tokenizer = tiny_pair("rar_b")
    tokens, cond, rng = random_tokens(model, 2), classes(model, 2), Rng.from_seed(1, 2)
    inputs = tokenizer.embed(tokens)
    orders = model.draw_orders(rng, 1.0)
    out = model.training_loss(tokens, inputs, cond, rng, orders=orders, hidden_layer=2)
    logits, hidden = model.sequence_logits(tokens.gather(1, orders)[:, :-1], cond.labels, orders, 2)
    expected = torch.nn.functional.cross_entropy(logits.flatten(0, 1), tokens.gather(1, orders).flatten())
    torch.testing.assert_close(out["loss"], expected)
    assert torch.equal(out["hidden"][0, orders[0, 4]], hidden[0, 4])
    raster = model.training_loss(tokens, inputs, cond, rng)["loss"]
    assert abs(float(raster.detach() - out["loss"].detach())) > 1e-4
    one = torch.zeros(2, model.layout.length)
    one[:, orders[0, 3]] = 1.0
    weighted = model.training_loss(tokens[:1], inputs[:1], cond[:1], rng[:1], orders=orders[:1], weight=one[:1])
    torch.testing.assert_close(weighted["loss"], -logits[0, 3].log_softmax(-1)[tokens[0, orders[0, 3]]])


def test_a_pipeline_draws_in_any_order_and_refuses_what_is_none() -> None:
    model, tokenizer = tiny_pair("rar_b")
    pipe = ClassToImagePipeline(model, tokenizer, NextGroupSampler(guidance_scale=2.0))
    pipe.set_progress_bar_config(disable=True)

    def draw(order: str | None) -> Tensor:
        return pipe([0, 1], seed=0, output_type="latent", order=order).images

    assert torch.equal(draw(None), draw("raster")) and not torch.equal(draw("spiral"), draw("raster"))
    both = draw("spiral")
    alone = pipe([1], rng=Rng.from_seed(0, 2)[1:], output_type="latent", order="spiral").images
    assert torch.equal(alone[0], both[1])
    with pytest.raises(ValueError, match="did you mean 'snake'"):
        draw("snak")
    with pytest.raises(ValueError, match="one token a step, 12 in all; got num_steps=3"):
        pipe([0], num_inference_steps=3)
    with pytest.raises(ValueError, match="NextGroupSampler has no setting softmax_annealing"):
        pipe([0], softmax_annealing=True)
    var, its_tokenizer = tiny_pair("var_fashion")
    with pytest.raises(ValueError, match="VAR predicts its tokens in one order only"):
        NextGroupSampler().generate(its_tokenizer, var, classes(var, 1), Rng.from_seed(0, 1), order="spiral")


def test_known_tokens_are_kept_in_any_order() -> None:
    model, tokenizer = tiny_pair("rar_b")
    given, keep = random_tokens(model, 2), torch.arange(model.layout.length) % 3 == 0
    out = NextGroupSampler(order="random").generate(
        tokenizer,
        model,
        classes(model, 2),
        Rng.from_seed(0, 2),
        null=nothing(model, classes(model, 2)),
        known=(given, keep),
    )
    assert torch.equal(out.tokens[:, keep], given[:, keep]) and not torch.equal(out.tokens, given)


def test_the_command_draws_in_an_order(tmp_path: Any) -> None:
    model, tokenizer = tiny_pair("rar_fashion")
    ClassToImagePipeline(model, tokenizer, NextGroupSampler()).save_pretrained(tmp_path / "pipe")
    call = ["sample", str(tmp_path / "pipe"), "--num", "2", "--out", str(tmp_path / "x.png"), "--json"]
    result = CliRunner().invoke(app, [*call, "--order", "coarse-to-fine"])
    assert result.exit_code == 0 and '"order": "coarse-to-fine"' in result.output
    assert CliRunner().invoke(app, [*call, "--order", "zigzag"]).exit_code == 2
