"""Control images and generators of entities: FlowAR, xAR, and any entity drawn by any predictive."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests import test_entity, test_flowar, test_xar
from varkit import AutoPipeline, Rng
from varkit.generators.flowar import FlowAR
from varkit.generators.xar import XAR
from varkit.interfaces import Cond
from varkit.pipelines.auto import assemble
from varkit.rng import Draw, RecordedRng
from varkit.samplers.continuous import ContinuousSampler
from varkit.tokenizers.kl_vae import KLVAE
from varkit.tokenizers.latent_pyramid import LatentPyramid
from varkit.training.objectives import build_objective, objective_config

ENCODER = {"encoder": {"width": 12, "depth": 1, "heads": 2, "patch": 4, "grid": 2}}
CELLS: dict[str, Any] = {"entity": "cell", "entity_size": (4, 2)}
MODELS: dict[str, Any] = {
    "flowar": lambda **more: test_flowar.small(**more),
    "flowar-cross": lambda **more: test_flowar.small(cross=True, depths=(2, 2), **more),
    "xar-cell": lambda **more: test_xar.small(**CELLS, **more),
    "xar-subsample": lambda **more: test_xar.small(entity="subsample", entity_size=2, depths=(1, 3), **more),
    "xar-scale": lambda **more: test_xar.small(entity="scale", scales=(1, 3, (8, 4)), **more),
    "entity-cell": lambda **more: test_entity.small("cell", **more),
    "entity-subsample-ids": lambda **more: test_entity.small("subsample", "categorical", **more),
    "entity-scale": lambda **more: test_entity.small("scale", **more),
}
CONTINUOUS = [name for name in MODELS if not name.endswith("ids")]


def steered(model: Any, weight: tuple[float, ...] = (1.0, 1.0)) -> Cond:
    """Of two images, each with a map of four pixels a token of the finest grid."""
    sides = [4 * side for side in model.layout.grids[-1]]
    maps = torch.rand(len(weight), 1, 3, *sides, generator=torch.Generator().manual_seed(7)) * 2 - 1
    return Cond(torch.arange(len(weight)), control=maps, control_weight=torch.tensor(weight)[:, None])


def no_class(count: int) -> Cond:
    return Cond(torch.full((count,), 3))


def given(model: Any, batch: int = 2, seed: int = 1) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Tokens, what a tokenizer hands on, noised states and a time for each entity."""
    generator = torch.Generator().manual_seed(seed)
    shape = (batch, model.layout.length, model.layout.dim)
    tokens, inputs, noised = (torch.randn(shape, generator=generator) for _ in range(3))
    if model.layout.codebook_size is not None:
        tokens = torch.randint(0, 11, shape[:2], generator=generator)
    return tokens, inputs, noised, torch.rand(batch, len(model.schedule()), generator=generator)


def at_once(model: Any, cond: Cond, tokens: Tensor, inputs: Tensor, noised: Tensor, t: Tensor) -> Tensor:
    """What the teacher-forced network says of all tokens, in the order of the layout."""
    control = {"control": cond.control, "control_weight": cond.control_weight}
    if isinstance(model, XAR):
        return model(noised, t, cond.labels, clean=tokens, **control)
    where = torch.arange(model.layout.length)
    if isinstance(model, FlowAR):
        z = model(inputs, cond.labels, **control)
        return model.flownet(noised, t, z, where, model.scale_of)
    z = model(model.shifted(tokens, inputs), torch.zeros_like(t), cond.labels, **control)
    turn = model.order.argsort()
    if model.discrete:
        return model.head.linear(z).float()[:, turn]
    return model.head.ask(noised[:, model.order], t, z, where, model.group)[:, turn]


def step_by_step(model: Any, cond: Cond, null: Cond | None, *data: Tensor) -> tuple[Tensor, ...]:
    """The same by the cache: with the condition, and with a null one also without it, and the former alone."""
    tokens, inputs, noised, t = data
    state, parts = model.start(cond, null), []
    for i, where in enumerate(model.schedule()):
        says = model.predict(state, inputs[:, where], where)
        if model.layout.codebook_size is not None:
            parts.append((says.logits,) if null is None else (says.logits, says.null_logits, says.logits))
        else:
            alone = says.velocity(noised[:, where], t[:, i])
            parts.append((alone,) if null is None else (*says.pair(noised[:, where], t[:, i]), alone))
        model.append(state, tokens[:, where], where)
    back = torch.cat(model.schedule()).argsort()
    return tuple(torch.cat(each, 1)[:, back] for each in zip(*parts, strict=True))


class Layout:
    """A stand-in for a tokenizer of entities that are not scales: the sampler needs no more."""

    def __init__(self, model: Any) -> None:
        self.layout = model.layout

    def running(self, batch: int) -> Any:
        return self

    def inputs(self, positions: Tensor) -> Tensor:
        return torch.zeros(1, len(positions), self.layout.dim)

    def record(self, tokens: Tensor, positions: Tensor) -> None: ...


def draw(model: Any, cond: Cond, first: int = 0, **settings: Any) -> Tensor:
    tokenizer: Any = Layout(model)
    rng = Rng.from_seed(7, len(cond), first)
    sampler = ContinuousSampler(head_steps=2, guidance_scale=2.0, guidance_schedule="constant")
    return sampler.generate(tokenizer, model, cond, rng, null=no_class(len(cond)), **settings).tokens


# ---- the network ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_a_cache_gives_the_teacher_forced_network(name: str) -> None:
    """Each entity gets what is of its own places, in both branches; that without condition has no control."""
    model = MODELS[name](control=ENCODER)
    data, cond, null = given(model), steered(model, (1.0, 0.5)), no_class(2)
    expected = [at_once(model, c, *data) for c in (cond, null, cond)]
    for ours, full in zip(step_by_step(model, cond, null, *data), expected, strict=True):
        torch.testing.assert_close(ours, full, rtol=1e-4, atol=2e-4)
    (alone,) = step_by_step(model, cond, None, *data)
    torch.testing.assert_close(alone, expected[0], rtol=1e-4, atol=2e-4)
    assert (expected[0] - at_once(model, Cond(cond.labels), *data)).abs().amax((1, 2)).min() > 1e-2


@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_no_strength_is_the_plain_model_to_the_bit(name: str) -> None:
    model = MODELS[name](control=ENCODER)
    data, off = given(model), steered(model, (0.0, 0.0))
    plain = Cond(off.labels)
    assert torch.equal(at_once(model, off, *data), at_once(model, plain, *data))
    for null in (None, no_class(2)):
        pairs = zip(*(step_by_step(model, c, null, *data) for c in (off, plain)), strict=True)
        assert all(torch.equal(a, b) for a, b in pairs)
    bare = MODELS[name]()
    assert not any(n.startswith("controller.") for n in bare.state_dict()) and bare.takes == {"class"}
    with pytest.raises(ValueError, match="takes no control images"):
        at_once(bare, off, *data)
    bare.load_state_dict({n: v for n, v in model.state_dict().items() if not n.startswith("controller.")})
    assert torch.equal(at_once(bare, plain, *data), at_once(model, off, *data))


@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_each_token_reads_the_control_of_its_own_place(name: str) -> None:
    """Where tokens do not see each other, a change of the map moves those of that place alone, in any order."""
    model = MODELS[name](control=ENCODER)
    model.controller.encoder.blocks = torch.nn.ModuleList()
    for module in model.modules():  # trunk and head
        if "Attention" in type(module).__name__:
            module.proj.weight.zero_()
    data, cond = given(model, 1), steered(model, (1.0,))
    assert cond.control is not None
    changed = cond.control.clone()
    changed[..., 4:8, :4] *= -1  # the token in the second row and first column
    other = replace(cond, control=changed)
    whole = at_once(model, other, *data) - at_once(model, cond, *data)
    cached = step_by_step(model, other, None, *data)[0] - step_by_step(model, cond, None, *data)[0]
    own = torch.zeros(model.layout.grids[-1])
    own[1, 0] = 1
    for moved in (whole, cached):
        finest = model.layout.split(moved.abs().amax(-1))[-1].view_as(own)
        assert torch.equal((finest > 1e-5).float(), own)


@torch.no_grad()
def test_images_have_their_own_strength_and_no_company() -> None:
    for name in ("xar-cell", "entity-cell"):
        model = MODELS[name](control=ENCODER)
        cond = steered(model, (0.0, 1.0, 0.5))
        mixed = draw(model, cond)
        for i in range(3):
            torch.testing.assert_close(draw(model, cond[i : i + 1], i)[0], mixed[i], rtol=1e-4, atol=1e-4)
        strong = draw(model, steered(model, (1.0, 1.0, 1.0)))
        assert torch.equal(strong[1], mixed[1]) and not torch.allclose(strong[2], mixed[2], atol=1e-3)
        assert torch.equal(mixed[0], draw(model, Cond(cond.labels))[0])


@torch.no_grad()
def test_going_back_keeps_the_control() -> None:
    model = MODELS["xar-cell"](control=ENCODER)
    tokens, inputs, noised, t = given(model)
    state, groups = model.start(steered(model)), model.schedule()
    seen = []
    for i in (0, 1, 1):
        if len(seen) == 2:
            state.rewind(state.length - len(groups[0]))
        seen.append(model.predict(state, inputs[:, groups[i]], groups[i]).velocity(noised[:, groups[i]], t[:, i]))
        model.append(state, tokens[:, groups[i]], groups[i])
    assert torch.equal(seen[1], seen[2])


@torch.no_grad()
def test_known_tokens_stay_and_the_others_follow_the_control() -> None:
    model = MODELS["xar-cell"](control=ENCODER)
    tokens, keep = given(model)[0], torch.arange(model.layout.length) % 3 == 0
    cond = steered(model)
    with_control, without = (draw(model, c, known=(tokens, keep)) for c in (cond, Cond(cond.labels)))
    assert torch.equal(with_control[:, keep], tokens[:, keep])
    assert (with_control - without)[:, ~keep].abs().amax((1, 2)).min() > 1e-3


def test_too_few_blocks_and_bad_arguments_are_refused() -> None:
    with pytest.raises(ValueError, match="depth 2 is below 3"):
        test_xar.small(**CELLS, depths=(1, 1), control=ENCODER)
    with pytest.raises(ValueError, match="encoder, kinds and resize"):
        test_flowar.small(control={"size": 3})


# ---- training ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", MODELS)
def test_class_and_control_fall_away_together_and_control_by_itself(name: str) -> None:
    model = MODELS[name](control=ENCODER, control_drop_rate=0.5).train()
    tokens, inputs, *_ = given(model, 3)
    cond = steered(model, (1.0, 1.0, 0.7))
    rng = RecordedRng(
        uniform={
            Draw.COND_DROP: torch.tensor([[0.05], [0.9], [0.9]]),
            Draw.CONTROL_DROP: torch.tensor([[0.9], [0.1], [0.9]]),
        }
    )
    seen: list[Any] = []
    real = model.forward
    model.forward = lambda *args: seen.append(args) or real(*args)  # type: ignore[method-assign]
    own = Rng.from_seed(0, 3)
    rng.normal, rng.to = own.normal, lambda _: own  # type: ignore[method-assign, assignment]
    drawn = rng.uniform
    rng.uniform = lambda where, kind, **more: (  # type: ignore[method-assign, assignment]
        drawn(where, kind, **more) if kind in (Draw.COND_DROP, Draw.CONTROL_DROP) else own.uniform(where, kind, **more)
    )
    model.training_loss(tokens, inputs, cond, rng)
    (args,) = seen
    labels = next(a for a in args if isinstance(a, Tensor) and a.dtype == torch.int64 and a.shape == (3,))
    assert labels.tolist() == [3, 1, 2]
    torch.testing.assert_close(args[-1].flatten(), torch.tensor([0.0, 0.0, 0.7]))


def vae() -> KLVAE:
    torch.manual_seed(2)
    sizes: dict[str, Any] = {"latent_channels": 4, "block_out_channels": (8, 8), "layers_per_block": 1}
    return KLVAE(image_size=8, norm_num_groups=4, **sizes).eval()


@pytest.mark.parametrize("name", ["xar", "flowar"])
def test_a_trained_model_learns_to_follow_maps_and_is_exported(name: str, tmp_path: Path) -> None:
    pytest.importorskip("cv2", reason="the extra control is not installed")
    if name == "xar":
        plain: Any = test_xar.small((4, 4), entity="cell", entity_size=2)
        tokenizer: Any = vae()
    else:
        plain, tokenizer = test_flowar.small(), LatentPyramid.around(vae(), test_flowar.SCALES)
    assemble(plain, tokenizer, {"head_steps": 2}).save_pretrained(tmp_path / "plain")
    base = {"name": "next-entity", "model": f"{name}_fashion", "sampling": {"head_steps": 2}}
    base |= {"tokenizer": str(tmp_path / "plain"), "init_from": str(tmp_path / "plain")}
    control = {"kinds": ["canny"], "network": ENCODER}
    own, without = (
        build_objective(objective_config({**base, **more}), ["0", "1", "2"]) for more in ({"control": control}, {})
    )
    assert any("at first they add nothing" in note for note in own.notes)
    images = torch.full((3, 3, 8, 8), -1.0)
    for i in range(3):
        images[i, :, 2:6, 1 : 4 + i] = 1
    batch = {"images": images, "labels": torch.arange(3)}

    def loss(objective: Any) -> Tensor:
        return objective(batch, "main", 0, 10, Rng.from_seed(0, 3))["loss"]

    own.eval(), without.eval()
    assert torch.equal(loss(own), loss(without))
    own.train()
    optimizer = torch.optim.Adam([p for n, p in own.named_parameters() if ".controller." in n], lr=0.02)
    losses = []
    for _ in range(8):
        losses.append(loss(own))
        optimizer.zero_grad()
        losses[-1].backward()
        optimizer.step()
    assert losses[-1] < losses[0]
    assert own.pictures(batch, Rng.from_seed(0, 3)).shape == (6, 3, 8, 8)
    own.export(tmp_path / "made")
    pipe = AutoPipeline.from_pretrained(tmp_path / "made")
    pipe.set_progress_bar_config(disable=True)
    assert pipe.transformer.takes == {"class", "control"}
    maps = own.cond(batch).control[:, 0]
    on, off = (pipe([0, 1, 2], control=maps, control_strength=s, seed=0, output_type="pt").images for s in (1.0, 0.0))
    again = pipe([0, 1, 2], control_strength=0, seed=0, output_type="pt").images
    assert not torch.equal(on, off) and torch.equal(off, again)
