"""Control images: what a user gives, the network that reads them, and the generators that they steer."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from tests.test_models import liven
from varkit import AutoPipeline
from varkit.conditioning.control import Control, ControlCondition, Projection, injection_layers, to_grid
from varkit.conditioning.control_encoder import ControlEncoder, interpolated
from varkit.generators.var import VAR
from varkit.interfaces import Cond
from varkit.pipelines.auto import assemble
from varkit.rng import Draw, RecordedRng, Rng
from varkit.samplers.next_group import NextGroupSampler
from varkit.tokenizers.multiscale_vq import MultiScaleVQ

SMALL: dict[str, Any] = {"encoder": {"width": 12, "depth": 1, "heads": 2, "patch": 4, "grid": 2}}
SIZE = (16, 24)


def tokenizer() -> Any:
    torch.manual_seed(3)
    sizes: dict[str, Any] = {"base_channels": 32, "channel_multipliers": (1, 1), "num_res_blocks": 1}
    scales = ((1, 1), (2, 2), (3, 4), (8, 12))
    return liven(MultiScaleVQ(codebook_size=24, latent_dim=4, scales=scales, **sizes), 0.05)


def var(**changes: Any) -> Any:
    """Depth 3 and a rectangular pyramid, with lively weights."""
    torch.manual_seed(0)
    sizes: dict[str, Any] = {
        "num_classes": 3,
        "depth": 3,
        "hidden_size": 32,
        "num_heads": 2,
        "scales": ((1, 1), (2, 2), (3, 4), (8, 12)),
        "codebook_size": 24,
        "latent_dim": 4,
        "control": SMALL,
    }
    return liven(VAR(**{**sizes, **changes}))


def pictures(count: int, controls: int = 1, size: tuple[int, int] = SIZE) -> Tensor:
    generator = torch.Generator().manual_seed(7)
    return torch.rand(count, controls, 3, *size, generator=generator) * 2 - 1


def steered(count: int = 3, weight: float | Sequence[float] = 1.0) -> Cond:
    weights = torch.tensor(weight).reshape(-1, 1).expand(count, 1)
    return Cond(torch.arange(count) % 3, control=pictures(count), control_weight=weights)


def draw(model: Any, cond: Cond, seed: int = 0, **settings: Any) -> Tensor:
    null = Cond(torch.full((len(cond),), model.num_classes))
    rng = Rng.from_seed(seed, len(cond))
    return NextGroupSampler(guidance_scale=2.0).generate(tokenizer(), model, cond, rng, null=null, **settings).tokens


# ---- conditions ---------------------------------------------------------------------------------------------------


def test_conditions_are_joined_sliced_and_put_beside() -> None:
    classes, steer = Cond(torch.tensor([2, 0])), Cond(control=pictures(2), control_weight=torch.ones(2, 1))
    both = classes + steer
    assert len(steer) == len(both) == 2 and torch.equal(both[1:].control, steer.control[1:])
    with pytest.raises(ValueError, match="both conditions hold a vector"):
        _ = both + classes
    with pytest.raises(ValueError, match="of 2 and of 1 images"):
        _ = classes + steer[:1]
    with pytest.raises(ValueError, match="come together"):
        Cond(control=pictures(1))
    for left, right in ((both, classes), (classes, both)):
        guided = left.beside(right)
        assert len(guided) == 4 and guided.control_weight.flatten().tolist().count(0) == 2
        assert guided.control.shape == (4, *both.control.shape[1:])
    assert ControlCondition(SIZE).null(both).control_weight.abs().sum() == 0


def test_images_of_all_modes_become_pixels_from_minus_one_to_one(caplog: pytest.LogCaptureFixture) -> None:
    ramp = np.tile(np.linspace(0, 255, 48, dtype=np.uint8), (32, 1))
    grey = Image.fromarray(ramp)
    clear = Image.merge("LA", (grey, Image.new("L", grey.size, 0)))
    seen = {}
    for image in (grey, grey.convert("1"), grey.convert("RGB"), grey.convert("RGBA"), grey.convert("P"), clear):
        cond = ControlCondition(SIZE).encode(control=image)
        assert cond.control.shape == (1, 1, 3, *SIZE) and cond.control.abs().max() <= 1
        assert torch.equal(cond.control[:, :, 0], cond.control[:, :, 2])
        seen[image.mode] = cond.control
    assert torch.equal(seen["L"], seen["RGB"]) and torch.equal(seen["L"], seen["RGBA"])
    assert set(seen["1"].unique().tolist()) != {-1.0} and torch.equal(seen["LA"], torch.full_like(seen["LA"], -1))
    deep = Image.fromarray(ramp.astype(np.uint16) * 257)
    assert torch.allclose(ControlCondition(SIZE).encode(control=deep).control, seen["L"], atol=0.01)
    with caplog.at_level("INFO", "varkit"):
        ControlCondition((8, 8)).encode(control=grey)
    assert "48x32" in caplog.text and "changes its proportions" in caplog.text


def test_several_controls_by_name_and_strengths() -> None:
    condition = ControlCondition(SIZE, ("canny", "depth"))
    image = Image.new("L", SIZE[::-1], 255)
    cond = condition.encode(control={"depth": [image, image]}, strength={"depth": [0.5, 2]})
    assert cond.control_weight.tolist() == [[0, 0.5], [0, 2]]
    assert cond.control[:, 1].min() == 1 and cond.control[:, 0].abs().sum() == 0
    one = condition.encode(control={"canny": image, "depth": pictures(3)[:, 0]}, strength=0.25)
    assert one.control.shape[:2] == (3, 2) and one.control_weight.unique().tolist() == [0.25]


@pytest.mark.parametrize(
    ("given", "error", "message"),
    [
        ({"control": "edges.png"}, TypeError, "must be a PIL image"),
        ({"control": []}, TypeError, "non-empty list"),
        ({"control": torch.zeros(1, 3, 8, 8)}, ValueError, r"\(B, 3 or 1, 16, 24\); got \(1, 3, 8, 8\)"),
        ({"control": torch.full((1, 3, 16, 24), 200.0)}, ValueError, r"must lie in \[-1, 1\]"),
        ({"control": torch.full((1, 3, 16, 24), torch.nan)}, ValueError, r"must lie in \[-1, 1\]"),
        ({"control": torch.zeros(1, 3, 16, 24, dtype=torch.int64)}, ValueError, "float in .* or uint8"),
        ({"control": Image.new("F", (8, 8))}, ValueError, "mode F"),
        ({"control": {"canny": Image.new("L", (8, 8)), "hed": Image.new("L", (8, 8))}}, ValueError, "one control"),
        ({"control": {}}, ValueError, "control is empty"),
        ({"control": torch.zeros(2, 3, 16, 24), "count": 3}, ValueError, "2 images of control for 3 images"),
        ({"control": torch.zeros(2, 3, 16, 24), "strength": [1, 2, 3]}, ValueError, "3 control strengths for 2"),
        ({"control": torch.zeros(1, 3, 16, 24), "strength": -0.1}, ValueError, "number from 0"),
        ({"control": torch.zeros(1, 3, 16, 24), "strength": float("nan")}, ValueError, "number from 0"),
    ],
)
def test_what_is_wrong_with_a_control_is_said(given: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        ControlCondition(SIZE).encode(**given)
    with pytest.raises(ValueError, match="say which"):
        ControlCondition(SIZE, ("canny", "depth")).encode(control=Image.new("L", (8, 8)))
    with pytest.raises(ValueError, match="no control 'hed'; it knows canny, depth"):
        ControlCondition(SIZE, ("canny", "depth")).encode(control={"hed": Image.new("L", (8, 8))})


# ---- the network --------------------------------------------------------------------------------------------------


def test_features_reach_each_grid() -> None:
    """The own grid is the map itself; a coarser one means of areas; a finer one stays within the map's range."""
    features = torch.randn(2, 5, 4, 6)
    assert torch.equal(to_grid(features, (4, 6)), features.flatten(2).transpose(1, 2))
    assert torch.allclose(to_grid(features, (1, 1))[:, 0], features.mean((2, 3)), atol=1e-6)
    assert torch.allclose(to_grid(features, (2, 3))[:, 4], features[:, :, 2:4, 2:4].mean((2, 3)), atol=1e-6)
    fine = to_grid(features, (7, 9))
    assert fine.shape == (2, 63, 5) and fine.amax() <= features.amax() and fine.amin() >= features.amin()


def test_positions_are_interpolated_between_trained_ones() -> None:
    table = torch.randn(1, 1 + 9, 4)
    assert torch.equal(interpolated(table, (3, 3)), table)
    other = interpolated(table, (2, 5))
    assert other.shape == (1, 11, 4) and torch.equal(other[:, 0], table[:, 0])
    with pytest.raises(ValueError, match="multiples of 4; got 16x22"):
        ControlEncoder(**SMALL["encoder"])(torch.zeros(1, 3, 16, 22))


def test_a_patch_stands_for_a_stride_of_pixels() -> None:
    """14-pixel patches on 16-pixel tokens: each token has its patch, and `nearest` makes no new values."""
    encoder = ControlEncoder(**{**SMALL["encoder"], "patch": 7, "stride": 8, "resize": "nearest"})
    lines = (torch.rand(1, 3, 16, 40) > 0.5).float() * 2 - 1
    assert encoder.resized(lines).shape == (1, 3, 14, 35) and set(encoder.resized(lines).unique().tolist()) == {-1, 1}
    assert encoder(lines).shape == (1, 12, 2, 5)


def test_injections_come_at_the_start_a_third_and_two_thirds() -> None:
    assert [injection_layers(d) for d in (3, 12, 16, 22, 36)] == [
        (0, 1, 2),
        (0, 4, 8),
        (0, 5, 10),
        (0, 7, 14),
        (0, 12, 24),
    ]
    with pytest.raises(ValueError, match="depth 2 is below 3"):
        injection_layers(2)
    for bad, message in (
        ({"encoder": "resnet"}, "dinov2-small"),
        ({"encoder": {"width": 8}}, "missing 4 required"),
        ({**SMALL, "kinds": ("a", "a")}, "must differ"),
    ):
        with pytest.raises(ValueError, match=message):
            Control(32, 3, **bad)


def test_zero_features_give_exactly_nothing() -> None:
    """No part after the encoder has a bias."""
    control = liven(Control(16, 3, **SMALL))
    assert all(not x.any() for x in control.project(torch.zeros(2, 5, 12)))
    assert all(m.fc1.bias is None and m.fc2.bias is None for m in control.modules() if isinstance(m, Projection))


def test_controls_are_weighted_and_summed_in_any_order() -> None:
    control, images, grids = liven(Control(16, 3, **SMALL)), pictures(2, 2), ((2, 2), (4, 6))
    weight = torch.tensor([[1.0, 0.5], [0.0, 2.0]])
    both = control(images, weight, grids)
    swapped = control(images.flip(1), weight.flip(1), grids)
    alone = [control(images[:, k : k + 1], weight[:, k : k + 1], grids) for k in range(2)]
    assert list(both) == [0, 1, 2] and both[0].shape == (2, 28, 16)
    for layer, x in both.items():
        assert torch.allclose(x, swapped[layer], atol=1e-6)
        assert torch.allclose(x, alone[0][layer] + alone[1][layer], atol=1e-5)
        with torch.no_grad():  # rows of weight 0 are skipped here
            assert torch.allclose(x, control(images, weight, grids)[layer], atol=1e-5)


def test_kinds_are_told_apart_and_named_ones_are_needed_in_full() -> None:
    control = liven(Control(16, 3, kinds=("canny", "depth"), **SMALL))
    image, one = pictures(1, 1).expand(-1, 2, -1, -1, -1), torch.tensor([[1.0, 0.0]])
    first, second = (control(image, weight, ((4, 6),)) for weight in (one, one.flip(1)))
    assert all((first[k] - second[k]).abs().max() > 1e-3 for k in first)
    with pytest.raises(ValueError, match="kinds canny, depth"):
        control(image[:, :1], one[:, :1], ((4, 6),))
    with pytest.raises(ValueError, match="place in the image"):
        control(image, one, ((8,),))


def test_several_controls_in_any_order_of_their_mapping_are_the_same() -> None:
    """Given in another order, or known to another model in another order: what they add is summed."""
    first, second = pictures(2)[:, 0], pictures(2, size=SIZE)[:, 0].flip(2)
    both = {"canny": first, "depth": second}
    turned = dict(reversed(both.items()))
    condition = ControlCondition(SIZE, ("canny", "depth"))
    a, b = (condition.encode(control=x, strength={"canny": 0.5}) for x in (both, turned))
    assert torch.equal(a.control, b.control) and torch.equal(a.control_weight, b.control_weight)
    model = var(control={**SMALL, "kinds": ["canny", "depth"]})
    labels = Cond(torch.tensor([0, 1]))
    assert torch.equal(draw(model, labels + a), draw(model, labels + b))
    other = var(control={**SMALL, "kinds": ["depth", "canny"]})
    other.load_state_dict({k: v.flip(0) if k == "controller.kind_embed" else v for k, v in model.state_dict().items()})
    c = ControlCondition(SIZE, ("depth", "canny")).encode(control=both, strength={"canny": 0.5})
    inputs = torch.randn(2, model.layout.length, 4)
    with torch.no_grad():
        x, y = (m.teacher_forced(inputs, labels + s).logits for m, s in ((model, a), (other, c)))
        torch.testing.assert_close(x, y, atol=2e-4, rtol=1e-4)
        wrong = ControlCondition(SIZE, ("depth", "canny")).encode(
            control={"canny": second, "depth": first}, strength={"canny": 0.5}
        )
        assert (other.teacher_forced(inputs, labels + wrong).logits - y).abs().max() > 1e-2


def test_what_is_new_adds_nothing_until_it_has_learned() -> None:
    """As intended; as released, the encoder's own weights are lost and something is added from the first step."""
    control, images, grids = Control(16, 3, **SMALL), pictures(1), ((4, 6),)
    weight = torch.ones(1, 1)
    fused = control(images, weight, grids)
    assert all(not x.any() for x in fused.values())
    sum(x.sum() for x in fused.values()).backward()
    assert all(layer.fc2.weight.grad.abs().sum() > 0 for layer in control.condition_layers)
    before = {k: v.clone() for k, v in control.state_dict().items()}
    control.init_weights(encoder=False, official=True)
    changed = {k for k, v in control.state_dict().items() if not torch.equal(v, before[k])}
    assert "encoder.blocks.0.attn.qkv.weight" in changed and "encoder.patch_embed.proj.weight" not in changed
    assert not {"encoder.pos_embed", "encoder.cls_token", "encoder.norm.weight"} & changed
    assert all(x.any() for x in control(images, weight, grids).values())


# ---- VAR ----------------------------------------------------------------------------------------------------------


def test_cached_scales_are_the_network_at_once() -> None:
    """Every scale gets the slice of its own positions, in both branches of guidance."""
    model, cond, length = var(), steered(), 1 + 4 + 12 + 96
    inputs = torch.randn(3, length, 4)
    state, null, parts = model.start(cond, Cond(torch.full((3,), 3))), Cond(torch.full((3,), 3)), []
    for positions in model.schedule():
        parts.append(model.predict(state, inputs[:, positions], positions))
        model.append(state, torch.zeros(3, len(positions), dtype=torch.int64), positions)
    with torch.no_grad():
        for branch, rows in (("logits", cond), ("null_logits", null)):
            whole = model.teacher_forced(inputs, rows).logits
            torch.testing.assert_close(torch.cat([getattr(p, branch) for p in parts], 1), whole, atol=2e-4, rtol=1e-4)


def test_each_scale_reads_the_control_of_its_place() -> None:
    """A change in one corner of the map moves the tokens of that corner more than those far from it: at the finest
    scale, before any block has mixed positions, nothing else moves at all."""
    model = var()
    a = steered(1)
    image = a.control.clone()
    image[..., :4, :4] *= -1
    grids = model.layout.grids
    with torch.no_grad():
        encoder = model.controller.encoder
        encoder.blocks = torch.nn.ModuleList()  # patches that do not see each other
        fused = [model.controller(x, a.control_weight, grids)[0][0] for x in (a.control, image)]
    moved = (fused[0] - fused[1]).abs().amax(1) > 1e-6
    first, second, third, last = model.layout.split(moved[None])
    assert first.all() and second[0].tolist() == [True, False, False, False]
    assert not last.view(8, 12)[4:, 6:].any() and last.view(8, 12)[:2, :2].all()
    assert third.view(3, 4)[0, 0] and not third.view(3, 4)[2].any()


def test_no_strength_is_the_plain_model_to_the_bit() -> None:
    model, cond = var(), steered(weight=0.0)
    plain = Cond(cond.vector)
    inputs = torch.randn(3, model.layout.length, 4)
    with torch.no_grad():
        assert torch.equal(model.teacher_forced(inputs, cond).logits, model.teacher_forced(inputs, plain).logits)
        assert not torch.equal(
            model.teacher_forced(inputs, steered()).logits, model.teacher_forced(inputs, plain).logits
        )
    # with gradients the maps are read, and weighted by 0
    assert torch.equal(model.teacher_forced(inputs, cond).logits, model.teacher_forced(inputs, plain).logits)
    assert torch.equal(draw(model, cond), draw(model, plain))


def test_images_have_their_own_strength_and_no_company() -> None:
    model = var()
    mixed = draw(model, steered(3, [0.0, 1.0, 0.5]))
    assert torch.equal(mixed[0], draw(model, Cond(steered().vector))[0])
    assert torch.equal(mixed[1], draw(model, steered())[1]) and not torch.equal(mixed[2], draw(model, steered())[2])
    cond = steered(3, [0.0, 1.0, 0.5])
    null = Cond(torch.full((1,), 3))
    for i in range(3):
        rng = Rng.from_seed(0, 1, i)
        one = NextGroupSampler(guidance_scale=2.0).generate(tokenizer(), model, cond[i : i + 1], rng, null=null)
        assert torch.equal(one.tokens[0], mixed[i])


def test_going_back_keeps_the_control() -> None:
    model, cond = var(), steered()
    inputs = torch.randn(3, model.layout.length, 4)
    groups, state = model.schedule(), model.start(cond)

    def step(i: int) -> Tensor:
        logits = model.predict(state, inputs[:, groups[i]], groups[i]).logits
        model.append(state, torch.zeros(3, len(groups[i]), dtype=torch.int64), groups[i])
        return logits

    first = [step(i) for i in range(3)]
    state.rewind(len(groups[2]))
    assert torch.equal(step(2), first[2])
    state.reset()
    assert torch.equal(step(0), first[0])


def test_class_and_control_fall_away_together_and_control_by_itself() -> None:
    model, cond = var(control_drop_rate=0.5).train(), steered(3)
    tokens, inputs = torch.zeros(3, model.layout.length, dtype=torch.int64), torch.randn(3, model.layout.length, 4)
    drop = torch.tensor([[0.05], [0.9], [0.9]])
    rng = RecordedRng(uniform={Draw.COND_DROP: drop, Draw.CONTROL_DROP: torch.tensor([[0.9], [0.1], [0.9]])})
    seen: list[Any] = []
    real = model.forward
    model.forward = lambda *args: seen.append(args) or real(*args)  # type: ignore[method-assign]
    model.training_loss(tokens, inputs, cond, rng)
    _, labels, _, _, weight = seen[0]
    assert labels.tolist() == [3, 1, 2] and weight.flatten().tolist() == [0, 0, 1]


def test_a_model_without_control_refuses_it() -> None:
    model = var(control=None)
    assert model.takes == {"class"} and var().takes == {"class", "control"}
    assert not [k for k in model.state_dict() if k.startswith("controller")]
    with pytest.raises(ValueError, match="takes no control images"):
        model.teacher_forced(torch.randn(3, model.layout.length, 4), steered())
    with pytest.raises(ValueError, match="depth 2 is below 3"):
        var(depth=2)


# ---- pipelines ----------------------------------------------------------------------------------------------------


def test_a_class_pipeline_takes_control_and_reloads(tmp_path: Path) -> None:
    pipe = assemble(var(), tokenizer(), {"guidance_scale": 2.0})
    pipe.set_progress_bar_config(disable=True)
    image = Image.fromarray(np.arange(16 * 24, dtype=np.uint8).reshape(16, 24))
    first = pipe([0, 1], control=image, control_strength=[0.8, 0.0], seed=0, output_type="pt").images
    pipe.save_pretrained(tmp_path)
    again = AutoPipeline.from_pretrained(tmp_path)
    again.set_progress_bar_config(disable=True)
    second = again([0, 1], control=image, control_strength=[0.8, 0.0], seed=0, output_type="pt").images
    assert torch.equal(second, first)
    assert torch.equal(pipe([0, 1], control_strength=0, seed=0, output_type="pt").images[1], first[1])
    assert not torch.equal(pipe([0, 1], control_strength=0, seed=0, output_type="pt").images[0], first[0])
    assert len(pipe(1, control=[image] * 3, num_images_per_prompt=2, seed=0).images) == 6
    assert len(pipe(control=[image] * 2, seed=0).class_labels) == 2


def test_a_pipeline_says_what_is_missing() -> None:
    image = Image.new("L", (24, 16))
    steers, plain = assemble(var(), tokenizer(), {}), assemble(var(control=None), tokenizer(), {})
    with pytest.raises(ValueError, match=r"steered by control images \(one kind\): give control="):
        steers([0])
    with pytest.raises(ValueError, match="takes no control images"):
        plain([0], control=image)
    for pipe in (plain, steers):
        with pytest.raises(ValueError, match="without control images"):
            pipe([0], control_strength=0.5)
    with pytest.raises(ValueError, match="2 images of control for 1 images"):
        steers([0], control=[image, image])
    sometimes = assemble(var(control_drop_rate=0.1), tokenizer(), {})
    sometimes.set_progress_bar_config(disable=True)
    assert len(sometimes([0], seed=0).images) == 1
