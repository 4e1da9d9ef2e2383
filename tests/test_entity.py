"""Entity x predictive: what is read, what is seen, and that sampling with a cache is the teacher-forced network."""

from __future__ import annotations

import itertools
from typing import Any, cast

import pytest
import torch
from torch import Tensor

from varkit import NextGroupSampler, Rng
from varkit.entities import check_context_noise, entity_losses, sorted_times
from varkit.generators.entity import EntityAR, EntityState
from varkit.heads.categorical import Categorical
from varkit.heads.diffusion import Diffusion
from varkit.heads.flow import Flow
from varkit.heads.gaussian import process
from varkit.interfaces import Cond
from varkit.layers.modulated import places
from varkit.pipelines.auto import assemble
from varkit.samplers.continuous import ContinuousSampler
from varkit.tokenizers.frames import FrameTokenizer
from varkit.tokenizers.kl_vae import KLVAE
from varkit.tokenizers.latent_pyramid import LatentPyramid
from varkit.tokenizers.multiscale_vq import MultiScaleVQ
from varkit.tokenizers.vqgan import VQGAN

KINDS: dict[str, dict[str, Any]] = {
    "token": {"entity": "token"},
    "cell": {"entity": "cell", "entity_size": (4, 2)},
    "subsample": {"entity": "subsample", "entity_size": (4, 2)},
    "scale": {"entity": "scale", "scales": (1, 3, (8, 4))},
    "image": {"entity": "image"},
}
CLIPS: dict[str, dict[str, Any]] = {
    "clip-token": {"entity": "token"},
    "clip-cell": {"entity": "cell", "entity_size": (2, 2, 1)},
    "clip-row": {"entity": "cell", "entity_size": (1, 2)},
    "clip-subsample": {"entity": "subsample", "entity_size": (2, 2, 1)},
    "clip-frame": {"entity": "frame"},
    "clip-image": {"entity": "image"},
    "clip-scale": {"entity": "scale", "scales": (1, (2, 1), (4, 2))},
}
"""Of a grid (t, h, w)."""
PREDICTIVES = ("categorical", "flow", "diffusion")
GRID = [pytest.param(k, p, id=f"{k}-{p}") for k, p in itertools.product(KINDS, PREDICTIVES)]
GRID_OF_CLIPS = [pytest.param(k, p, id=f"{k}-{p}") for k, p in itertools.product(CLIPS, PREDICTIVES)]


def networks(kinds: dict[str, Any]) -> list[Any]:
    every = itertools.product(kinds, PREDICTIVES, ("entity", "token"))
    some = [(k, p, n) for k, p, n in every if (p, n) != ("categorical", "token")]  # ids have no such network
    return [pytest.param(k, p, n, id=f"{k}-{p}-{n}") for k, p, n in some]


NETWORKS = networks(KINDS)


def small(kind: str, predictive: str = "flow", **changes: Any) -> EntityAR:
    """With lively weights: gates that are closed would hide a wrong mask."""
    torch.manual_seed(0)
    noise = "clean" if kind.endswith("scale") and predictive == "categorical" else "independent"
    sizes = {"num_classes": 3, "hidden_size": 32, "depths": (2, 1), "num_heads": 2, "grid": (8, 4), "latent_dim": 4}
    head = {"codebook_size": 11, "head_width": 64, "head_depth": 1, "predictive": predictive, "context_noise": noise}
    own = KINDS[kind] if kind in KINDS else {"grid": (4, 4, 2), **CLIPS[kind]}
    model = EntityAR(**{**sizes, **head, **own, **changes})
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model.eval()


def tokens_of(model: EntityAR, batch: int, seed: int = 1) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    if model.discrete:
        return torch.randint(0, 11, (batch, model.layout.length), generator=generator)
    return torch.randn(batch, model.layout.length, model.layout.dim, generator=generator)


def inputs_of(model: EntityAR, batch: int) -> Tensor:
    """What a tokenizer would hand on at scales."""
    generator = torch.Generator().manual_seed(5)
    return torch.randn(batch, model.layout.length, model.layout.dim, generator=generator)


def answers(predictive: Any, x: Tensor, t: Tensor) -> list[Tensor]:
    """What a predictive says: with the condition, without it, and of the former alone."""
    if isinstance(predictive, Categorical):
        assert predictive.null_logits is not None
        return [predictive.logits, predictive.null_logits, predictive.logits]
    assert predictive.pair is not None
    if isinstance(predictive, Diffusion):
        step = torch.full((1, 1), 400.0)
        return [*predictive.pair(x, step), predictive.denoise(x, step)]
    assert isinstance(predictive, Flow)
    return [*predictive.pair(x, t), predictive.velocity(x, t)]


def whole(model: EntityAR, tokens: Tensor, inputs: Tensor, labels: Tensor, x: Tensor, t: Tensor) -> Tensor:
    """The same of all entities at once, in layout order."""
    turn = model.order.argsort()
    z = model(model.shifted(tokens, inputs), torch.zeros(len(labels), len(model.sizes)), labels)
    if model.discrete:
        return model.head.linear(z).float()[:, turn]
    where = torch.arange(len(model.order))
    if model.config.predictive == "flow":
        return model.head.ask(x[:, model.order], t, z, where, model.group)[:, turn]
    out = model.head.ask(x[:, model.order], torch.full_like(t, 0.4005), z, where, model.group)[:, turn]
    c, (velocity, share) = process().at(400), out.chunk(2, -1)
    return torch.cat([c.sigma * x + c.signal * velocity, share], -1)


@pytest.mark.parametrize(("kind", "predictive", "network"), NETWORKS + networks(CLIPS))
def test_sampling_with_a_cache_is_the_teacher_forced_network(kind: str, predictive: str, network: Any) -> None:
    model, batch = small(kind, predictive, head_network=network), 2
    tokens, inputs = tokens_of(model, batch), inputs_of(model, batch)
    labels, null = torch.arange(batch), torch.full((batch,), 3)
    x, t = torch.randn(batch, model.layout.length, 4), torch.rand(batch, len(model.sizes))
    with torch.no_grad():
        expected = [whole(model, tokens, inputs, c, x, t) for c in (labels, null)]
        state = model.start(Cond(labels), Cond(null))
        for i, positions in enumerate(model.schedule()):
            found = answers(model.predict(state, inputs[:, positions], positions), x[:, positions], t[:, i])
            for ours, full in zip(found, [*expected, expected[0]], strict=True):
                torch.testing.assert_close(ours, full[:, positions], rtol=1e-4, atol=1e-4)
            model.append(state, tokens[:, positions], positions)
    assert state.length == model.layout.length


@pytest.mark.parametrize(("kind", "predictive"), GRID + GRID_OF_CLIPS)
def test_an_entity_is_predicted_from_those_before_it(kind: str, predictive: str) -> None:
    model = small(kind, predictive)
    groups, tokens, inputs = model.schedule(), tokens_of(model, 1), inputs_of(model, 1)
    label, times = torch.tensor([1]), torch.zeros(1, len(groups))
    z = model(model.shifted(tokens, inputs), times, label)
    starts = [0, *itertools.accumulate(model.sizes)]
    for i, positions in enumerate(groups):
        changed, read = tokens.clone(), inputs.clone()
        changed[:, positions] += 1
        if i + 1 < len(groups):
            read[:, groups[i + 1]] += 1  # what a tokenizer makes of it
        if model.discrete:
            changed %= 11
        moved = (model(model.shifted(changed, read), times, label) - z).abs().amax((0, 2))
        assert not moved[: starts[i + 1]].any()
        if i + 1 < len(groups):
            assert moved[starts[i + 1] :].min() > 0


def test_entities_of_clips_are_what_their_names_say() -> None:
    def first(kind: str, **changes: Any) -> list[list[int]]:
        return [[int(i) for i in group] for group in small(kind, **changes).schedule()[:2]]

    assert first("clip-token") == [[0], [1]]
    assert first("clip-frame") == [list(range(8)), list(range(8, 16))]
    assert first("clip-row") == [[0, 1], [2, 3]] and first("clip-row", entity_size=(4, 2)) == first("clip-frame")
    assert first("clip-cell") == [[0, 2, 8, 10], [1, 3, 9, 11]]  # two frames, two rows, one column
    assert first("clip-subsample") == [[0, 4, 16, 20], [1, 5, 17, 21]]
    assert first("clip-subsample", entity_size=(2, 1))[0] == [0, 4, 8, 12, 16, 20, 24, 28]  # in time all frames
    assert len(first("clip-image")[0]) == 32
    assert [group.tolist() for group in small("clip-scale").schedule()] == [
        list(range(4)),
        list(range(4, 12)),
        list(range(12, 44)),  # of 1x1, 2x1 and 4x2, of all frames
    ]
    for kind in CLIPS:
        model = small(kind)
        assert torch.cat(model.schedule()).sort().values.tolist() == list(range(model.layout.length))


def test_places_of_clips_differ_in_time_too() -> None:
    """Tokens that differ in their frame alone are turned differently; those of one frame as the first axis says."""
    table = small("clip-token").trunk.rotary.table.view(4, 4, 2, -1, 2)
    for axis in range(3):
        others = [a for a in range(3) if a != axis]
        pairs = (table.diff(dim=axis).abs().amax((0, 1, 2, 4)) > 0).tolist()
        elsewhere = [(table.diff(dim=a).abs().amax((0, 1, 2, 4)) > 0).tolist() for a in others]
        assert any(pairs) and not any(a and b for other in elsewhere for a, b in zip(pairs, other, strict=True))


def test_scales_of_clips_lie_over_one_another() -> None:
    where = places(small("clip-scale").layout.grids)
    assert where.shape == (44, 3)
    assert where[:4].tolist() == [[t, 0, 0] for t in range(4)]
    assert where[4:12].tolist() == [[t, row, 0] for t in range(4) for row in (0, 2)]
    assert where[12:].tolist() == [[t, row, column] for t in range(4) for row in range(4) for column in range(2)]
    halved = small("clip-scale", scales=None)
    assert halved.layout.grids == ((4, 1, 1), (4, 2, 1), (4, 4, 2))
    again = small("clip-scale", scales=halved.layout.grids)  # as a tokenizer's layout says them
    assert again.layout == halved.layout


def test_what_is_read_is_the_entity_before_place_by_place() -> None:
    model = small("cell")
    tokens = tokens_of(model, 1)
    read = model.shifted(tokens, inputs_of(model, 1))
    first, second, *_ = model.schedule()
    assert torch.equal(read[:, : len(first)], tokens[:, first])
    assert (second[0] - first[0]) == 2  # the cell to its right
    whole = small("image")  # nothing is before the only entity
    assert whole.shifted(tokens_of(whole, 1), tokens).shape[1] == 0


@pytest.mark.parametrize("network", ["entity", "token"])
@pytest.mark.parametrize("predictive", ["flow", "diffusion"])
def test_tokens_are_drawn_together_or_each_by_itself(predictive: str, network: Any) -> None:
    model = small("cell", predictive, head_network=network)
    state, positions = model.start(Cond(torch.tensor([1])), Cond(torch.tensor([3]))), model.schedule()[0]
    found = model.predict(state, torch.zeros(1, len(positions), 4), positions)
    x, t = torch.randn(1, len(positions), 4), torch.tensor([0.4])
    changed = x.clone()
    changed[:, 0] += 1
    moved = (answers(found, changed, t)[0] - answers(found, x, t)[0]).abs().amax((0, 2))
    assert moved[0] > 0 and bool((moved[1:] > 0).all()) == (network == "entity")
    assert (moved[1:] == 0).all() == (network == "token")


# ---- what is noised in training ---------------------------------------------------------------------------------


def test_noisy_context_is_what_its_time_says() -> None:
    rng = Rng.from_seed(0, 400)
    model = small("subsample", "categorical", codebook_size=1000)
    read, t = model.noised(torch.zeros(400, 24, dtype=torch.int64), rng)
    assert not t[:, 0].any() and t[:, 1:].min() > 0  # the class is not noised
    replaced = (read > 0).float().view(400, 3, 8).mean(-1)
    assert (replaced - t[:, 1:]).mean().abs() < 0.02
    assert torch.corrcoef(torch.stack([replaced.flatten(), t[:, 1:].flatten()]))[0, 1] > 0.8
    model = small("subsample")
    ones = torch.ones(400, 24, 4)
    read, t = model.noised(ones, rng)
    each = t[:, 1:].repeat_interleave(8, 1)
    assert ((read.mean(-1) - (1 - each)) / each).std() < 0.6  # (1 - t) data + t noise
    noise = (read - (1 - each[..., None])) / each[..., None]
    torch.testing.assert_close(noise.std(), torch.tensor(1.0), atol=0.05, rtol=0)


@pytest.mark.parametrize("order", ["increasing", "decreasing"])
def test_noise_may_grow_or_shrink_along_the_order(order: Any) -> None:
    _, t = small("subsample", context_noise=order).noised(torch.ones(9, 24, 4), Rng.from_seed(0, 9))
    steps = t[:, 1:].diff(dim=1)
    assert (steps > 0).all() if order == "increasing" else (steps < 0).all()


def test_a_clean_context_is_left_alone_and_knows_no_time() -> None:
    model = small("subsample", context_noise="clean")
    read = torch.randn(2, 24, 4)
    assert model.noised(read, Rng.from_seed(0, 2))[0] is read and not hasattr(model, "time_embed")


def test_the_network_is_told_how_noisy_its_context_is() -> None:
    model = small("cell")
    read, label = torch.randn(1, 24, 4), torch.tensor([0])
    t = torch.tensor([[0.0, 0.2, 0.2, 0.2]])
    late = t.clone()
    late[0, 2] = 0.8
    moved = (model(read, t, label) - model(read, late, label)).abs().amax((0, 2)).view(4, 8)
    assert not moved[:2].any() and moved[2:].min() > 0


# ---- training ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("kind", "predictive", "network"), NETWORKS)
def test_training_learns_one_image(kind: str, predictive: str, network: Any) -> None:
    model = small(kind, predictive, head_network=network, cond_drop_rate=0.0).train()
    tokens, inputs = tokens_of(model, 1), inputs_of(model, 1).repeat(4, 1, 1)
    tokens = tokens.expand(4, *tokens.shape[1:])
    cond = Cond(torch.full((4,), 1))
    optimiser = torch.optim.AdamW(model.parameters(), lr=3e-3)
    losses = []
    for step in range(40):
        out = model.training_loss(tokens, inputs, cond, Rng.from_seed(step, 4))
        optimiser.zero_grad()
        out["loss"].backward()
        optimiser.step()
        losses.append(float(out["loss"].detach()))
    assert sum(losses[-5:]) < 0.75 * sum(losses[:5])
    unused = [name for name, p in model.named_parameters() if p.grad is None]
    assert not unused or (kind == "image" and set(unused) <= {"z_proj.weight", "z_proj.bias", "tok_embeddings.weight"})


def test_repeats_are_further_draws_for_one_pass_of_the_backbone() -> None:
    model, tokens = small("cell", head_repeats=3), torch.randn(2, 32, 4)
    once = small("cell")
    passes: list[int] = []
    model.trunk.register_forward_hook(lambda *_: passes.append(1))
    z = model(model.shifted(tokens, tokens), torch.zeros(2, 4), torch.tensor([0, 1]))
    rng = Rng.from_seed(0, 2)
    many, one = (m.head.losses(z, tokens, m.order, rng)["error"] for m in (model, once))
    assert len(passes) == 1 and many.shape == one.shape == (2, 32)
    assert not torch.allclose(many, one)
    fewer = small("cell", head_repeats=2).head.losses(z, tokens, model.order, rng)["error"]
    third = 3 * many - 2 * fewer  # what the third draw alone gave
    assert third.min() > 0 and not torch.allclose(third, one)


def test_weights_of_tokens_and_hidden_states_come_in_layout_order() -> None:
    model, tokens = small("cell"), torch.randn(2, 32, 4)
    cond, rng = Cond(torch.tensor([0, 1])), Rng.from_seed(0, 2)
    model.train()
    plain = model.training_loss(tokens, tokens, cond, rng)
    even = model.training_loss(tokens, tokens, cond, rng, weight=torch.full((2, 32), 1 / 32), hidden_layer=2)
    torch.testing.assert_close(plain["loss"], even["loss"])
    assert even["hidden"].shape == (2, 32, 32)
    first = torch.zeros(2, 32)
    first[:, model.schedule()[0]] = 1 / 8
    torch.testing.assert_close(
        model.training_loss(tokens, tokens, cond, rng, weight=first)["loss"], plain["loss_first"]
    )


# ---- sampling ---------------------------------------------------------------------------------------------------


def tokenizer_of(kind: str, predictive: str) -> Any:
    torch.manual_seed(0)
    if predictive != "categorical":
        vae = {"block_out_channels": (8, 8), "layers_per_block": 1, "norm_num_groups": 4, "down_block_types": None}
        return KLVAE(image_size=16, latent_channels=4, **vae).eval()
    sizes: dict[str, Any] = {"codebook_size": 11, "latent_dim": 4, "base_channels": 32, "channel_multipliers": (1, 1)}
    if kind == "scale":
        return MultiScaleVQ(**sizes, num_res_blocks=1, scales=(1, 2, 8)).eval()
    return VQGAN(**sizes, num_res_blocks=1, z_channels=8, grid=8).eval()


@pytest.mark.parametrize(("kind", "predictive"), GRID)
def test_a_pipeline_draws_images_the_same_in_any_batch(kind: str, predictive: str, tmp_path: Any) -> None:
    tokenizer = tokenizer_of(kind, predictive)
    options: dict[str, Any] = {"grid": (8, 8), "scales": (1, 2, 8) if kind == "scale" else None}
    model = small(kind, predictive, **options)
    pipeline = assemble(model, tokenizer, {"guidance_scale": 2.0})
    assert isinstance(pipeline.image_tokenizer, LatentPyramid) == (kind == "scale" and predictive != "categorical")
    pipeline.set_progress_bar_config(disable=True)
    steps = {} if predictive == "categorical" else {"head_steps": 3}
    three = pipeline(class_labels=[0, 1, 2], rng=Rng.from_seed(3, 3), output_type="pt", **steps)
    one = pipeline(class_labels=[2], rng=Rng.from_seed(3, 1, first=2), output_type="pt", **steps)
    rounding = {"rtol": 0, "atol": 0.02 if predictive == "diffusion" else 1e-4}  # which lively weights enlarge
    torch.testing.assert_close(three.images[2:], one.images, **rounding)
    pipeline.save_pretrained(tmp_path)
    again = type(pipeline).from_pretrained(tmp_path)
    again.set_progress_bar_config(disable=True)
    found = again(class_labels=[2], rng=Rng.from_seed(3, 1, first=2), output_type="pt", **steps)
    torch.testing.assert_close(found.images, one.images, **rounding)


@pytest.mark.parametrize(("kind", "predictive"), GRID_OF_CLIPS)
def test_clips_are_the_same_in_any_batch_and_keep_given_frames(kind: str, predictive: str) -> None:
    scales = {"scales": (1, 2, 4)} if kind == "clip-scale" else {}
    model = small(kind, predictive, grid=(4, 4, 4), **scales)
    made: Any = tokenizer_of(kind.removeprefix("clip-"), predictive)
    config = {k: v for k, v in made.config.items() if not k.startswith("_")}
    config |= {KLVAE: {"image_size": 8}, VQGAN: {"grid": 4}, MultiScaleVQ: scales}[type(made)]
    tokenizer = cast(Any, model.tokenizer_for(FrameTokenizer(type(made).__name__, config, 4).eval()))
    assert tokenizer.layout == model.layout
    sampler: Any = NextGroupSampler() if model.discrete else ContinuousSampler(head_steps=2)
    cond, null, rng = Cond(torch.arange(3)), Cond(torch.full((3,), 3)), Rng.from_seed(3, 3)
    given = tokens_of(model, 3)  # of the first frame
    keep = torch.zeros(model.layout.length, dtype=torch.bool)
    keep[tokenizer.start_positions(model.layout.length // 4)] = True

    def draw(rows: slice) -> Tensor:
        known, settings = (given[rows], keep), {"guidance_scale": 2.0}
        return sampler.generate(tokenizer, model, cond[rows], rng[rows], null[rows], known, **settings).tokens

    three, one = draw(slice(0, 3)), draw(slice(2, 3))
    atol = 0.02 * float(three.abs().max()) if predictive == "diffusion" else 1e-3  # lively weights enlarge rounding
    torch.testing.assert_close(three[2:], one, rtol=0, atol=atol)
    assert torch.equal(three[:, keep], given[:, keep]) and not torch.equal(three, given)
    assert tokenizer.decode(three).shape == (3, 3, 4, *tokenizer.image_size)


def test_rewind_forgets_whole_entities() -> None:
    model = small("cell")
    first, second, *_ = model.schedule()
    tokens = tokens_of(model, 1)
    state = model.start(Cond(torch.tensor([0])))
    assert isinstance(state, EntityState)
    x, t = torch.randn(1, 8, 4), torch.tensor([0.5])

    def say(where: Tensor) -> Tensor:
        found = model.predict(state, tokens[:, where], where)
        assert isinstance(found, Flow)
        return found.velocity(x, t)

    say(first)
    model.append(state, tokens[:, first], first)
    before = say(second)
    model.append(state, tokens[:, second] + 1, second)
    with pytest.raises(ValueError, match="no whole entities"):
        state.rewind(3)
    assert state.length == 16
    state.rewind(8)
    torch.testing.assert_close(say(second), before)
    state.reset()
    assert state.length == 0 and not state.drawn


# ---- what is refused --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "predictive", "changes", "message"),
    [
        ("cell", "words", {}, "predictive must be categorical, flow or diffusion"),
        ("cell", "flow", {"context_noise": "some"}, "context_noise must be independent"),
        ("scale", "categorical", {"context_noise": "independent"}, "context_noise must be clean"),
        ("cell", "flow", {"head_network": "conv"}, "token or entity"),
        ("cell", "flow", {"head_repeats": 0}, "at least 1"),
        ("cell", "flow", {"entity_size": 3}, "does not divide"),
        ("cell", "flow", {"entity_size": (1, 2, 2)}, "2 to 2 sides"),
        ("cell", "flow", {"entity": "frame"}, "for clips"),
        ("cell", "flow", {"entity": "thing"}, "frame or image; got 'thing'"),
        ("clip-cell", "flow", {"entity_size": (3, 2, 2)}, "3x2x2 does not divide a latent of 4x4x2"),
        ("clip-scale", "flow", {"scales": (1, 2)}, "the whole latent, 4x4x2, and each have its 4 frames"),
        ("clip-scale", "flow", {"scales": ((2, 1, 1), (4, 4, 2))}, "each have its 4 frames"),
        ("scale", "flow", {"scales": ((1, 8, 4),)}, "the whole latent, 8x4; got"),
        ("clip-cell", "flow", {"control": {"kinds": ["canny"]}}, "a place in the image"),
        ("cell", "flow", {"head_width": 40}, "multiple of it"),
    ],
)
def test_impossible_models_are_refused(kind: str, predictive: str, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        small(kind, predictive, **changes)


def test_another_number_of_steps_and_mixtures_of_codes_are_refused() -> None:
    model = small("cell", "categorical")
    with pytest.raises(ValueError, match="4 in all"):
        model.schedule(3)
    state, first = model.start(Cond(torch.tensor([0]))), model.schedule()[0]
    model.predict(state, torch.zeros(1, 8, dtype=torch.int64), first)
    with pytest.raises(ValueError, match="more_smooth"):
        model.append(state, torch.zeros(1, 8, 4), first)


def test_losses_of_entities() -> None:
    error = torch.arange(12.0).view(2, 6)
    found = entity_losses(error, [1, 2, 3])
    assert found["loss"] == error.mean() and found["loss_first"] == 3 and found["loss_last"] == error[:, 3:].mean()
    assert entity_losses(error, [1, 2, 3], 0.5)["loss"] == error.sum(1).mean() / 2
    check_context_noise("clean")
    t = torch.tensor([[0.3, 0.9, 0.1]])
    assert sorted_times(t, "decreasing").tolist() == [t[0, [1, 0, 2]].tolist()] and sorted_times(t, "independent") is t
