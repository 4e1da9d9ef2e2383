"""What is VAR's own: its mask, its initialisation, its training loss. The rest is in test_models.py."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tests.test_models import liven
from varkit import VAR, Rng
from varkit.conditioning.label import LabelCondition
from varkit.interfaces import Cond
from varkit.layers.drop_path import DropPath

SIZES: dict[str, Any] = {
    "num_classes": 3,
    "depth": 2,
    "hidden_size": 32,
    "num_heads": 2,
    "scales": (1, 2, 3),
    "codebook_size": 11,
    "latent_dim": 4,
}
ENDS = (1, 5, 14)


def build(**changes: Any) -> VAR:
    return liven(VAR(**{**SIZES, **changes}))


def data(batch: int = 4) -> tuple[Tensor, Tensor, Cond]:
    """Tokens, inputs, class ids."""
    g = torch.Generator().manual_seed(0)
    tokens = torch.randint(11, (batch, 14), generator=g)
    return tokens, torch.randn(batch, 14, 4, generator=g), Cond(torch.arange(batch) % 3)


# ---- the mask -------------------------------------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize("changes", [{}, {"attn_l2_norm": False}, {"shared_adaln": True}, {"scales": (1, (1, 4), 3)}])
def test_a_scale_sees_itself_and_coarser_ones_only(changes: dict[str, Any]) -> None:
    model = build(**changes)
    _, inputs, cond = data()
    before = model(inputs, cond.vector)
    for scale, part in enumerate(model.layout.slices):
        if scale == 0:
            continue  # reads nothing
        changed = inputs.clone()
        changed[:, part.stop - 1] += 1.0
        moved = (model(changed, cond.vector) - before).abs().amax(-1)  # B L
        assert (moved[:, : part.start] < 1e-6).all()  # coarser: never
        assert (moved[:, part.start :] > 1e-4).all()  # the scale itself, before and behind, and finer ones


@torch.no_grad()
def test_the_first_scale_reads_only_the_class() -> None:
    model = build()
    _, inputs, cond = data()
    before = model(inputs, cond.vector)
    inputs[:, 0] += 100
    assert torch.equal(model(inputs, cond.vector), before)
    other = model(inputs, (cond.vector + 1) % 4)
    assert ((other - before).abs().amax(-1) > 1e-4).all()


@torch.no_grad()
def test_unit_length_queries_and_keys_are_a_switch() -> None:
    _, inputs, cond = data()
    on, off = build(), build(attn_l2_norm=False)
    assert hasattr(on.blocks[0].attn, "scale_mul_1H11") and not hasattr(off.blocks[0].attn, "scale_mul_1H11")
    assert off.blocks[0].attn.scale == 0.25 / math.sqrt(16) and on.blocks[0].attn.scale == 1
    for model, invariant in ((on, True), (off, False)):
        before = model(inputs, cond.vector)
        for block in model.blocks:  # a longer q or k turns the same way
            block.attn.mat_qkv.weight[:64] *= 3
            block.attn.q_bias *= 3
        assert torch.allclose(model(inputs, cond.vector), before, atol=1e-4) is invariant


@torch.no_grad()
def test_sharpness_is_capped_at_100() -> None:
    model = build()
    _, inputs, cond = data()
    for block in model.blocks:
        block.attn.scale_mul_1H11.fill_(math.log(100))
    at_the_cap = model(inputs, cond.vector)
    for block in model.blocks:
        block.attn.scale_mul_1H11.fill_(50.0)
    assert torch.equal(model(inputs, cond.vector), at_the_cap)


# ---- initialisation -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("again", [False, True])
@pytest.mark.parametrize("shared", [False, True])
def test_initialisation_table(shared: bool, again: bool) -> None:
    width, depth = 128, 4
    model = VAR(
        **{**SIZES, "hidden_size": width, "depth": depth, "codebook_size": 200, "latent_dim": 32},
        shared_adaln=shared,
    )
    if again:
        model.init_weights(gamma_gain=0.01)
    std, gamma = math.sqrt(1 / (3 * width)), 0.01 if again else 1e-3

    def check(values: Tensor, expected: float) -> None:
        n = values.numel()
        assert values.std().item() == pytest.approx(expected, rel=5 / math.sqrt(2 * n))  # five sigma
        assert abs(values.mean().item()) < 5 * expected / math.sqrt(n)

    for value in (model.pos_start, model.pos_1LC, model.word_embed.weight, model.class_emb.weight):
        check(value, std)
    check(model.head.weight, 0.02 * std)
    check(model.head_nm.ada_lin[1].weight, 0.5 * std)
    for block in model.blocks:
        check(block.attn.mat_qkv.weight, std)
        check(block.ffn.fc1.weight, std)
        check(block.attn.proj.weight, std / math.sqrt(2 * depth))
        check(block.ffn.fc2.weight, std / math.sqrt(2 * depth))
        assert torch.equal(block.attn.scale_mul_1H11, torch.full((1, 2, 1, 1), math.log(4)))
        if shared:
            check(block.ada_gss[:, :, :2], gamma / math.sqrt(width))
            check(block.ada_gss[:, :, 2:], 0.5 / math.sqrt(width))
        else:
            check(block.ada_lin[1].weight[: 2 * width], gamma * std)
            check(block.ada_lin[1].weight[2 * width :], 0.5 * std)
    if shared:
        check(model.shared_ada_lin[1].weight, std)
    assert all(not p.any() for k, p in model.named_parameters() if k.endswith("bias"))


def test_heads_must_divide_the_width() -> None:
    with pytest.raises(ValueError, match="hidden_size 30 must be a multiple of num_heads 4"):
        VAR(**{**SIZES, "hidden_size": 30, "num_heads": 4})


# ---- stochastic depth -----------------------------------------------------------------------------------------


def test_drop_path_drops_whole_samples_and_keeps_the_mean() -> None:
    drop, x = DropPath(0.3), torch.ones(20_000, 2, 3)
    assert torch.equal(drop.eval()(x), x)
    assert torch.equal(DropPath(0.0).train()(x), x)
    y = drop.train()(x)
    assert torch.equal(y, y[:, :1, :1].expand_as(y))
    torch.testing.assert_close(y.unique(), torch.tensor([0.0, 1 / 0.7]))
    assert y.mean().item() == pytest.approx(1, abs=0.03)
    assert drop(x.bfloat16()).dtype == torch.bfloat16


def test_drop_path_rises_over_the_blocks_and_stops_in_eval() -> None:
    model = build(depth=5, drop_path_rate=0.2)
    assert [b.drop_path.rate for b in model.blocks] == pytest.approx([0, 0.05, 0.1, 0.15, 0.2])
    model = build(drop_path_rate=0.9)
    _, inputs, cond = data(16)
    assert torch.equal(model(inputs, cond.vector), model(inputs, cond.vector))
    model.train()
    assert not torch.equal(model(inputs, cond.vector), model(inputs, cond.vector))


# ---- the training loss ----------------------------------------------------------------------------------------


def losses(model: VAR, batch: int = 4, seed: int = 0, **options: Any) -> dict[str, Tensor]:
    tokens, inputs, cond = data(batch)
    return model.training_loss(tokens, inputs, cond, Rng.from_seed(seed, batch), **options)


@torch.no_grad()
def test_labels_are_dropped_in_training_only_at_the_configured_rate() -> None:
    model, batch = build(cond_drop_rate=0.25, depth=1), 4000
    seen: list[Tensor] = []
    model.class_emb.register_forward_hook(lambda _m, args, _out: seen.append(args[0]))
    _, inputs, _ = data(batch)
    tokens, cond = torch.zeros(batch, 14, dtype=torch.int64), Cond(torch.zeros(batch, dtype=torch.int64))

    def dropped(rng: Rng, rows: slice = slice(None)) -> Tensor:
        n = len(rng)
        model.training_loss(tokens[:n], inputs[:n], Cond(cond.vector[:n]), rng, num_scales=1)
        return seen.pop() == model.num_classes

    rng = Rng.from_seed(0, batch)
    assert not dropped(rng).any()  # eval mode
    model.train()
    which = dropped(rng)
    assert which.float().mean().item() == pytest.approx(0.25, abs=4 * math.sqrt(0.25 * 0.75 / batch))
    # The image decides, not its place in the batch: any rows, in any order.
    order = torch.randperm(batch)[:100]
    assert torch.equal(dropped(rng[order]), which[order])
    assert not torch.equal(dropped(Rng.from_seed(1, batch)), which)
    model.eval().register_to_config(official_quirks=True)
    assert torch.equal(dropped(rng), which)  # as released: in eval mode too
    model.register_to_config(cond_drop_rate=0.0)
    assert not dropped(rng).any()


@torch.no_grad()
def test_a_dropped_label_is_the_null_class() -> None:
    model = build(cond_drop_rate=1.0)
    tokens, inputs, cond = data()
    rng = Rng.from_seed(0, 4)
    null = LabelCondition(3).null(cond)
    assert null.vector.tolist() == [3] * 4
    dropped = model.train().training_loss(tokens, inputs, cond, rng)["loss"]
    assert torch.equal(dropped, model.eval().training_loss(tokens, inputs, null, rng)["loss"])
    assert dropped != model.training_loss(tokens, inputs, cond, rng)["loss"]


@torch.no_grad()
@pytest.mark.parametrize("count", [1, 2, 3])
def test_the_first_scales_alone_are_predicted_as_in_the_full_run(count: int) -> None:
    model = build()
    tokens, inputs, cond = data()
    full, end = model(inputs, cond.vector), ENDS[count - 1]
    torch.testing.assert_close(model(inputs[:, :end], cond.vector), full[:, :end], atol=1e-5, rtol=1e-5)
    # Every token weighs 1 / L of the whole sequence, however few scales are trained.
    each = F.cross_entropy(full.flatten(0, 1), tokens.flatten(), reduction="none").view(4, 14)
    out = losses(model, num_scales=count)
    torch.testing.assert_close(out["loss"], each[:, :end].sum(1).mean() / 14)
    last = slice(ENDS[count - 2] if count > 1 else 0, end)
    torch.testing.assert_close(out["loss_last"], each[:, last].mean())
    right = (full.argmax(-1) == tokens).float()
    torch.testing.assert_close(out["accuracy"], right[:, :end].mean())
    torch.testing.assert_close(out["accuracy_last"], right[:, last].mean())
    weighted = losses(model, num_scales=count, newest_weight=0.1)["loss"]
    torch.testing.assert_close(out["loss"] - weighted, 0.9 * each[:, last].sum(1).mean() / 14)


@torch.no_grad()
def test_label_smoothing() -> None:
    model = build()
    tokens, inputs, cond = data()
    logits = model(inputs, cond.vector).log_softmax(-1)
    expected = -(0.8 * logits.gather(-1, tokens[..., None])[..., 0] + 0.2 * logits.mean(-1)).mean()
    torch.testing.assert_close(losses(model, label_smoothing=0.2)["loss"], expected)


def test_a_learning_step_lowers_the_loss() -> None:
    model = VAR(**{**SIZES, "cond_drop_rate": 0.0}).train()
    optimiser = torch.optim.AdamW(model.parameters(), lr=3e-3)
    first = losses(model)["loss"].item()
    assert first == pytest.approx(math.log(11), abs=0.05)  # knows nothing: uniform
    for _ in range(30):
        optimiser.zero_grad()
        loss = losses(model)["loss"]
        loss.backward()
        optimiser.step()
    assert loss.item() < 0.5 * first


# ---- sampling -------------------------------------------------------------------------------------------------


def test_the_number_of_steps_is_the_number_of_scales() -> None:
    model = build()
    assert [len(g) for g in model.schedule(3)] == [1, 4, 9]
    with pytest.raises(ValueError, match=r"one scale a step, 3 in all; got num_steps=5"):
        model.schedule(5)


@torch.no_grad()
def test_the_cache_is_sized_once_and_refuses_more() -> None:
    model = build()
    _, inputs, cond = data()
    state = model.start(cond, LabelCondition(3).null(cond))
    assert len(state.cache.keys) == 2  # layers
    assert state.cache.keys[1].shape == (8, 2, 14, 16)  # twice the images, heads, tokens, head width
    where = state.cache.keys[1].data_ptr()
    for positions in model.schedule():
        model.predict(state, inputs[:, positions], positions)
        model.append(state, inputs[:, positions], positions)
    assert state.cache.keys[1].data_ptr() == where
    with pytest.raises(ValueError, match="the cache holds 14 positions; 15 were asked for"):
        state.cache.extend(0, *torch.zeros(2, 8, 2, 1, 16))
    with pytest.raises(ValueError, match="cannot rewind 15 of 14"):
        state.rewind(15)


# ---- labels ---------------------------------------------------------------------------------------------------


def test_label_condition_names_the_bad_label() -> None:
    condition = LabelCondition(3)
    assert condition.encode(class_labels=[0, 3]).vector.dtype == torch.int64
    for bad in (4, -1):
        with pytest.raises(ValueError, match=f"class {bad} does not exist: this model has classes 0 to 2"):
            condition.encode(class_labels=[0, bad])
    for labels in ([0.5], [[1]]):
        with pytest.raises(ValueError, match="list of whole numbers"):
            condition.encode(class_labels=labels)
