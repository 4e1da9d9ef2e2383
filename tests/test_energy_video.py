"""Energies of next frames: what sees what, descents, gradients through them, going on with clips, training."""

from __future__ import annotations

import logging
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tests.test_clips import fashion_root as fashion_root
from tests.test_models import liven, random_images
from tests.test_training import lines
from tests.test_video_training import clips_recipe, resumed, same_weights
from varkit import AutoPipeline
from varkit.checkpoints.energy_video import energy_video_arguments
from varkit.config import ConfigError
from varkit.generators.energy_video import SIZES, TINY, TINY_TOKENIZER, VARIANTS, EnergyVideoAR
from varkit.heads.energy import Energy, Refined, descend
from varkit.interfaces import Cond
from varkit.pipelines.class_to_video import ClassToVideoPipeline
from varkit.registry import create_model, list_models, model_entry
from varkit.rng import Draw, Rng
from varkit.samplers.energy import EnergySampler
from varkit.tokenizers.frames import FrameTokenizer
from varkit.training.loop import train
from varkit.training.objectives import build_objective, objective_config
from varkit.training.optim import OptimConfig, make_optimizer, set_schedule

V, D, FRAMES = 16, 32, 4  # of TINY


def tiny(**changes: Any) -> EnergyVideoAR:
    torch.manual_seed(0)
    model: EnergyVideoAR = liven(EnergyVideoAR(**{**TINY, **changes}), 0.2)
    return model


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def nothing(batch: int) -> Cond:
    return Cond(torch.zeros(batch, dtype=torch.int64))


def turning(batch: int, seed: int) -> Tensor:
    """Clips (B, T, V) whose next frame is the one before, turned: copying it is a bad guess."""
    turn = torch.linalg.qr(normal(V, V, seed=5))[0]
    clips = [normal(batch, V, seed=seed)]
    for _ in range(FRAMES - 1):
        clips.append(clips[-1] @ turn)
    return torch.stack(clips, 1)


@cache
def trained() -> EnergyVideoAR:
    torch.manual_seed(0)
    model = EnergyVideoAR(**TINY).train()
    model.lr_scales = {"alpha": 3 * TINY["start_alpha"]}
    optim = OptimConfig(lr=3e-3, weight_decay=0, schedule="constant", warmup_steps=0)
    optimizer = make_optimizer(model, optim)
    for step in range(120):
        set_schedule(optimizer, optim, step, 120)
        losses, _ = model.losses_of(turning(48, seed=step), Rng.from_seed(step, 48))
        optimizer.zero_grad()
        losses["loss"].backward()
        optimizer.step()
    return model.eval()


# ---- what sees what -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("variant", VARIANTS)
@torch.no_grad()
def test_a_candidate_is_read_by_itself_alone_and_reads_the_frames_before(variant: str) -> None:
    model = tiny(variant=variant)
    frames, candidates = normal(2, 3, V), normal(2, 3, V, seed=1)
    before = model(frames, candidates, 1)
    assert before.shape == (2, 3) and before.std() > 0.01
    for i in range(3):
        other = candidates.clone()
        other[:, i] += 1
        changed = (model(frames, other, 1) - before).abs() > 1e-5
        assert changed[:, i].all() and not changed[:, [j for j in range(3) if j != i]].any()
        other = frames.clone()
        other[:, i] += 1
        changed = (model(other, candidates, 1) - before).abs() > 1e-5
        assert changed[:, i:].all() and not changed[:, :i].any()
        alone = model(frames[:, : i + 1], candidates[:, : i + 1], 1)[:, i]  # nothing of what follows counts
        torch.testing.assert_close(alone, before[:, i], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("variant", VARIANTS)
@torch.no_grad()
def test_the_step_is_told_by_all_variants_but_the_first(variant: str) -> None:
    model = tiny(variant=variant)
    frames, candidates = normal(2, 3, V), normal(2, 3, V, seed=1)
    first, second = (model(frames, candidates, k) for k in (0, 1))
    assert torch.equal(first, second) == (variant == "default")
    at_start = EnergyVideoAR(**{**TINY, "variant": variant})
    assert (at_start(frames, candidates).abs().max() == 0) == (variant == "adaln_zero")


@pytest.mark.parametrize("variant", VARIANTS)
@torch.no_grad()
def test_frame_by_frame_energies_are_the_teacher_forced_ones(variant: str) -> None:
    """With keys of earlier frames kept, also after wrong frames were read and forgotten, in any landscape."""
    model = tiny(variant=variant)
    frames, candidates = normal(2, FRAMES, V), normal(2, FRAMES - 1, V, seed=1)
    tokens, wrong = model.tokens_of(frames), model.tokens_of(normal(2, FRAMES, V, seed=2))
    expected = [model(frames[:, :-1], candidates, k) for k in range(2)]
    state, groups = model.start(nothing(2)), model.schedule()
    assert torch.equal(torch.cat(groups), torch.arange(model.layout.length)) and len(groups) == FRAMES
    model.append(state, tokens[:, groups[0]], groups[0])
    for j in range(FRAMES - 1):
        energy = model.predict(state, tokens, groups[j + 1])
        assert state.length == 4 * (j + 1)
        for k in range(2):
            if (j, k) != (1, 1):  # one landscape that reads two frames at once later
                mine = energy.score(candidates[:, j : j + 1], k, None)
                torch.testing.assert_close(mine[:, 0], expected[k][:, j], atol=1e-4, rtol=1e-4)
        model.append(state, wrong[:, groups[j + 1]], groups[j + 1])
        if j < FRAMES - 2:
            model.predict(state, tokens, groups[0]).score(candidates[:, :1], 0, None)
            model.append(state, wrong[:, groups[j + 2]], groups[j + 2])
            state.rewind(4)
        state.rewind(4)
        model.append(state, tokens[:, groups[j + 1]], groups[j + 1])
    state.reset()
    assert state.length == 0
    with pytest.raises(ValueError, match="given frames"):
        model.predict(state, tokens, groups[0])
    with pytest.raises(ValueError, match="no whole frames"):
        state.rewind(2)
    with pytest.raises(ValueError, match="4 tokens each; got 3"):
        model.append(state, tokens[:, :3], groups[0][:3])


@torch.no_grad()
def test_automatic_half_precision_changes_nothing_and_half_weights_are_refused() -> None:
    model = tiny()
    frames, candidates = normal(2, 3, V), normal(2, 3, V, seed=1)
    expected = model(frames, candidates)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(model(frames, candidates), expected)
    with pytest.raises(ValueError, match="half precision is too coarse"):
        model.to(torch.bfloat16).start(nothing(2))


def test_a_saved_model_opens_as_it_was(tmp_path: Path) -> None:
    model = tiny(variant="adaln", repeats=(1, 2))
    model.save_pretrained(tmp_path)
    again = EnergyVideoAR.from_pretrained(tmp_path)
    frames, candidates = normal(2, 3, V), normal(2, 3, V, seed=1)
    assert again.layout == model.layout and again.landscapes() == model.landscapes() == [0, 1, 1]
    torch.testing.assert_close(again(frames, candidates, 1), model(frames, candidates, 1))
    assert again.step_size() == model.step_size()


def test_sizes_are_the_released_ones() -> None:
    """Not counting what the papers do not: how frames and steps are embedded, and alpha."""
    assert {f"ebt_{name}" for name in SIZES} | {"ebt_fashion"} == set(list_models("ebt_*"))
    for name, (*_, millions) in SIZES.items():
        with torch.device("meta"):
            model = create_model(f"ebt_{name}")
        assert model.layout.grids == ((16, 28, 28),) and model.first_frames == 1 and model.num_classes == 0
        own = [p.numel() for k, p in model.named_parameters() if not k.startswith(("project", "time_embed", "alpha"))]
        assert f"{sum(own) / 1e6:.1f}" == millions


# ---- descents -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("steps", "detach"), [(1, True), (2, False)])
@pytest.mark.parametrize("variant", ["default", "time_embed", "adaln"])
def test_the_gradient_through_a_descent_is_that_of_finite_differences(variant: str, steps: int, detach: bool) -> None:
    model = tiny(variant=variant, num_steps=steps, detach=detach).double()
    frames, start = normal(2, FRAMES, V).double(), normal(2, FRAMES - 1, V, seed=1).double()

    def loss() -> Tensor:
        return model.loss_at(frames, start, model.landscapes(), model.step_size())[0]["loss"]

    loss().backward()
    named = dict(model.named_parameters())
    names = ["alpha", "project.weight", "layers.0.attention.wq.weight", "layers.1.attention.wk.weight", "norm.weight"]
    for name in names:
        parameter = named[name]
        assert parameter.grad is not None
        direction = normal(*parameter.shape, seed=3).double()
        with torch.no_grad():
            sides = []
            for sign in (1, -1):
                parameter += sign * 1e-5 * direction
                sides.append(loss())
                parameter -= sign * 1e-5 * direction
        expected = (sides[0] - sides[1]) / 2e-5
        torch.testing.assert_close((parameter.grad * direction).sum(), expected, rtol=1e-4, atol=1e-8)


def test_the_same_descent_with_and_without_a_graph() -> None:
    model = tiny(variant="time_embed")
    frames, start = normal(2, FRAMES, V), normal(2, FRAMES - 1, V, seed=1)
    learned, descent = model.loss_at(frames, start, [0, 1, 1], model.step_size())
    with torch.no_grad():
        told, plain = model.loss_at(frames, start, [0, 1, 1], model.step_size())
    assert learned["loss"].requires_grad and not told["loss"].requires_grad
    for a, b in zip([*descent.candidates, *descent.energies], [*plain.candidates, *plain.energies], strict=True):
        assert not b.requires_grad
        torch.testing.assert_close(a.detach(), b)
    torch.testing.assert_close(told["loss"], torch.stack([F.smooth_l1_loss(x, frames[:, 1:]) for x in plain[0]]).mean())


def test_system_two_learns_from_the_last_step_alone() -> None:
    frames, start = normal(2, FRAMES, V), normal(2, FRAMES - 1, V, seed=1)
    gradients = {}
    for truncate in (False, True):
        model = tiny(truncate=truncate, detach=False)
        losses, _ = model.loss_at(frames, start, [0, 1], model.step_size())
        assert torch.equal(losses["loss"], losses["loss_last"]) == truncate
        losses["loss"].backward()
        gradients[truncate] = model.layers[0].attention.wq.weight.grad
    assert not torch.allclose(gradients[False], gradients[True])


def test_each_step_of_a_trained_model_goes_downhill() -> None:
    model, frames = trained(), turning(64, seed=10_000)
    start = model.initial_candidates(frames, Rng.from_seed(1, 64))
    with torch.no_grad():
        losses, descent = model.loss_at(frames, start, model.landscapes(4), model.step_size())
    means = [float(e.mean()) for e in descent.energies]
    assert means == sorted(means, reverse=True) and means[0] - means[1] > 0.1
    assert (descent.energies[1] < descent.energies[0]).float().mean() > 0.95
    copying = F.smooth_l1_loss(frames[:, :-1], frames[:, 1:])
    assert losses["loss_last"] < losses["loss_first"] and losses["loss_last"] < 0.6 * copying


def test_the_candidate_of_the_lowest_energy_is_kept() -> None:
    model, frames = trained(), turning(6, seed=10_001)
    rng, where = Rng.from_seed(2, 6), model.schedule()[2]

    def energy() -> Energy:
        state = model.start(nothing(6))
        model.append(state, model.tokens_of(frames[:, :2]), where)
        return model.predict(state, frames, where)

    one, many = energy(), energy()
    alone = one.sample(rng, where)
    best = many.sample(rng, where, candidates=5)
    energies, candidates = many.refined.energies, many.refined.candidates
    assert energies.shape == (6, 5) and candidates.shape == (6, 5, V) and many.calls == one.calls == 3
    chosen = energies.argmin(1)
    assert len(chosen.unique()) > 1
    assert torch.equal(best, model.tokens_of(candidates[torch.arange(6), chosen][:, None]))
    torch.testing.assert_close(candidates[:, 0], one.refined.best)  # the first is the only one of a single draw
    torch.testing.assert_close(alone, model.tokens_of(candidates[:, :1]))
    for i in range(5):  # together as each by itself
        torch.testing.assert_close(energy().sample(rng.candidate(i), where), model.tokens_of(candidates[:, i : i + 1]))
    dropped = energy()
    kept = dropped.sample(rng, where, candidates=5, select="largest_drop")
    fell = dropped.refined.descent.energies[0] - dropped.refined.energies
    assert torch.equal(kept, model.tokens_of(candidates[torch.arange(6), fell.argmax(1)][:, None]))
    given = model.tokens_of(candidates.flatten(0, 1)[:, None]).unflatten(0, (6, 5))  # of the model, from candidates
    further = model.refine(given, model.tokens_of(frames[:, :2]), steps=1)
    assert isinstance(further, Refined)
    torch.testing.assert_close(further.descent.energies[0], energies, atol=1e-4, rtol=1e-4)


def test_noise_and_alpha_of_a_draw() -> None:
    model = tiny(langevin_noise=0.5)
    rng, where = Rng.from_seed(3, 2), model.schedule()[1]

    def drawn(**settings: Any) -> Tensor:
        state = model.start(nothing(2))
        model.append(state, normal(2, 4, 4), where)
        return model.predict(state, normal(2, 4, 4), where).sample(rng, where, **settings)

    as_trained = drawn()
    assert torch.equal(as_trained, drawn(noise=0.5)) and not torch.allclose(as_trained, drawn(noise=0))
    start = rng.normal(where, Draw.NOISE, count=4)
    tiny_steps = drawn(noise=0, alpha=1e-6)
    torch.testing.assert_close(tiny_steps, start, atol=1e-3, rtol=1e-3)
    assert (drawn(noise=0, num_steps=6) - start).norm() > (drawn(noise=0, num_steps=1) - start).norm()
    with pytest.raises(ValueError, match="ran away in 2 steps of alpha 1e\\+38"):
        drawn(alpha=1e38)


def test_descents_start_where_they_are_told(caplog: pytest.LogCaptureFixture) -> None:
    frames = normal(2, FRAMES, V)
    with caplog.at_level(logging.WARNING):
        for initial, expected in (("recent", frames[:, :-1]), ("zeros", torch.zeros(2, FRAMES - 1, V))):
            assert not caplog.records
            model = tiny(initial=initial)
            assert torch.equal(model.initial_candidates(frames, Rng.from_seed(0, 2)), expected)
            state = model.start(nothing(2))
            model.append(state, model.tokens_of(frames[:, :2]), torch.arange(8))
            energy = model.predict(state, frames, torch.arange(4))
            assert torch.equal(energy.start(Rng.from_seed(0, 2), torch.arange(4), 1)[:, 0], expected[:, 1])
            with pytest.raises(ValueError, match="they would be one"):
                energy.sample(Rng.from_seed(0, 2), torch.arange(4), candidates=2)
            energy.sample(Rng.from_seed(0, 2), torch.arange(4), candidates=2, noise=0.1)
    assert "316 times" in caplog.text


def test_a_start_at_zero_has_huge_gradients_as_warned() -> None:
    model, frames = EnergyVideoAR(**TINY), normal(4, FRAMES - 1, V)
    steps = [
        descend(lambda x, k, _: model(frames, x, k), start, [0], torch.ones(())).candidates[0] - start
        for start in (torch.zeros_like(frames), normal(4, FRAMES - 1, V, seed=1))
    ]
    assert 30 < float(steps[0].norm() / steps[1].norm()) < 1000


# ---- what training draws --------------------------------------------------------------------------------------------


def test_repeats_are_drawn_for_a_batch_and_the_most_are_taken_after_training() -> None:
    model = tiny(num_steps=2, repeats=(2, 4))
    drawn = [model.landscapes(rng=Rng.from_seed(seed, 3)) for seed in range(40)]
    assert {(x.count(0), x.count(1)) for x in drawn} == {(i, j) for i in (2, 3, 4) for j in (2, 3, 4)}
    assert all(x == sorted(x) for x in drawn) and model.landscapes() == [0, 1, 1, 1, 1]
    assert model.landscapes(5) == [0, 1, 1, 1, 1] and model.landscapes(1) == [0]
    last = tiny(num_steps=3, repeats=(1, 2), repeat_last=True)
    assert {tuple(last.landscapes(rng=Rng.from_seed(seed, 1))) for seed in range(20)} == {(0, 1, 2), (0, 1, 2, 2)}


def test_random_alphas_and_noise_are_of_training_and_of_each_clip() -> None:
    model = tiny(random_alpha=2.0, langevin_noise=0.0, initial="recent", num_steps=1)
    frames, rng = normal(5, FRAMES, V), Rng.from_seed(4, 5)

    def moved() -> Tensor:
        return (model.losses_of(frames, rng)[1].candidates[0] - frames[:, :-1]).norm(dim=-1).detach()

    plain = moved()
    factor = model.train() and moved() / plain
    assert factor.min() >= 0.5 and factor.max() <= 2 and factor.std() > 0.1
    torch.testing.assert_close(factor, moved() / plain)
    noisy = tiny(langevin_noise=1.0)
    both = noisy.losses_of(frames, rng)[1].candidates[-1]
    torch.testing.assert_close(noisy.losses_of(frames[3:], rng[3:])[1].candidates[-1], both[3:], atol=1e-4, rtol=1e-4)
    assert not torch.allclose(noisy.losses_of(frames, Rng.from_seed(5, 5))[1].candidates[-1], both, atol=1e-2)


@pytest.mark.parametrize("variant", VARIANTS)
def test_training_reaches_every_parameter(variant: str) -> None:
    model = tiny(variant=variant, langevin_noise=0.1, random_alpha=1.5, repeats=(1, 2)).train()
    losses = model.training_loss(normal(4, 16, 4), normal(4, 16, 4), nothing(4), Rng.from_seed(0, 4))
    assert all(v.isfinite() and v.dim() == 0 for v in losses.values())
    losses["loss"].backward()
    assert not [k for k, p in model.named_parameters() if p.grad is None or not p.grad.any()]


# ---- going on with clips --------------------------------------------------------------------------------------------


def pair() -> tuple[EnergyVideoAR, FrameTokenizer]:
    tokenizer = liven(create_model("frames_kl_fashion", **TINY_TOKENIZER), 0.05)
    return tiny(variant="time_embed"), tokenizer


def test_the_registered_pair_fits() -> None:
    entry = model_entry("ebt_fashion")
    tokenizer = create_model(str(entry.tokenizer), **entry.tiny_tokenizer)
    assert entry.build(**entry.tiny).layout == tokenizer.layout


def test_clips_go_on_frame_by_frame() -> None:
    model, tokenizer = pair()
    clips = random_images(tokenizer, 4)
    start = tokenizer.encode_start(clips[:, :, :2])
    tokens = torch.zeros(4, 16, 4)
    tokens[:, :8] = start
    known, rng, seen = (tokens, torch.arange(16) < 8), Rng.from_seed(6, 4), list[Any]()
    sampler = EnergySampler(candidates=3, head_steps=4)
    assert sampler.count_steps(model, known=known) == 2
    out = sampler.generate(tokenizer, model, nothing(4), rng, known=known, on_step=seen.append)
    assert torch.equal(out.tokens[:, :8], start) and out.tokens.isfinite().all()
    assert (out.steps, out.head_calls) == (2, 2 * 5) and [s.positions.tolist()[0] for s in seen] == [8, 12]
    assert all(s.energies.shape == (4, 3) for s in seen)
    assert torch.equal(out.tokens[:, 8:], torch.cat([s.predicted for s in seen], 1))
    assert tokenizer.decode(out.tokens).shape == clips.shape
    for rows in (torch.tensor([2, 0]), torch.tensor([3])):  # the same in any batch and place
        some = sampler.generate(tokenizer, model, nothing(len(rows)), rng[rows], known=(tokens[rows], known[1]))
        torch.testing.assert_close(some.tokens, out.tokens[rows], atol=1e-3, rtol=1e-3)
    longer = sampler.generate(tokenizer, model, nothing(4), rng, known=(out.tokens, torch.arange(16) < 12))
    torch.testing.assert_close(longer.tokens, out.tokens, atol=1e-3, rtol=1e-3)  # three given frames, as one was drawn
    part = sampler.generate(tokenizer, model, nothing(4), rng, known=(tokens + 1, torch.arange(16) < 9))
    assert torch.equal(part.tokens[:, :9], (tokens + 1)[:, :9]) and part.steps == 2
    settings = {"head_steps": 4, "candidates": 1}
    single = sampler.generate(tokenizer, model, nothing(4), rng, known=known, **settings)
    assert not torch.equal(single.tokens[:, 8:], out.tokens[:, 8:])


def test_what_cannot_go_on_is_refused() -> None:
    model, tokenizer = pair()
    tokens, rng = torch.zeros(1, 16, 4), Rng.from_seed(0, 1)
    sampler = EnergySampler()
    for known, message in (
        (None, "give the first frame or frames"),
        ((tokens, torch.arange(16) < 3), "the whole first frame must be known"),
        ((tokens, torch.arange(16) >= 4), "the whole first frame must be known"),
    ):
        with pytest.raises(ValueError, match=message):
            sampler.generate(tokenizer, model, nothing(1), rng, known=known)
        with pytest.raises(ValueError, match=message):
            sampler.count_steps(model, known=known)
    other = create_model("frames_kl_fashion", **{**TINY_TOKENIZER, "num_frames": 3})
    with pytest.raises(ValueError, match="do not fit together"):
        sampler.generate(other, model, nothing(1), rng, known=(tokens, torch.arange(16) < 4))
    with pytest.raises(ValueError, match="no unconditional branch"):
        model.start(nothing(1), nothing(1))
    state = model.start(nothing(1))
    model.append(state, tokens[:, :4], torch.arange(4))
    energy = model.predict(state, tokens, torch.arange(4, 8))
    assert energy.guide(1.0) is energy
    for scale in (2.0, torch.ones(4)):
        with pytest.raises(ValueError, match="guidance_scale must be 1"):
            energy.guide(scale)
    with pytest.raises(ValueError, match="no logits"):
        energy.sample(rng, torch.arange(4, 8), [lambda logits: logits])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"head_steps": 0}, "number of steps must be at least 1; got 0"),
        ({"candidates": 0}, "number of candidates must be at least 1; got 0"),
        ({"alpha": 0.0}, "alpha must be > 0"),
        ({"noise": -1.0}, "noise must not be negative"),
        ({"select": "max_energy"}, "min_energy, largest_drop; got 'max_energy'"),
    ],
)
def test_bad_settings(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        EnergySampler(**settings)
    with pytest.raises(ValueError, match=message):
        EnergySampler().settings(**settings)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"variant": "film"}, "default, time_embed, adaln, adaln_zero; got 'film'"),
        ({"initial": "random"}, "noise, zeros, recent; got 'random'"),
        ({"num_frames": 1}, "at least 2 frames"),
        ({"num_steps": 0}, "a descent 1 step"),
        ({"num_heads": 3}, "cannot be shared by 3 heads"),
        ({"start_alpha": 0.0}, "start_alpha must be at least 0.0001; got 0"),
        ({"random_alpha": 0.5}, "random_alpha must be at least 1"),
        ({"langevin_noise": -0.1}, "langevin_noise must be at least 0"),
        ({"repeats": (0, 1)}, "fewest, at least 1"),
        ({"repeats": (3, 2)}, "fewest, at least 1"),
    ],
)
def test_bad_arguments(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        EnergyVideoAR(**{**TINY, **changes})
    with pytest.raises(ValueError, match="one frame a step is drawn, 4 in all; got num_steps=2"):
        tiny().schedule(2)


def test_official_settings_that_are_not_there_are_refused() -> None:
    with pytest.raises(ValueError, match="no clamp_futures_grad other than False; got True"):
        energy_video_arguments({"clamp_futures_grad": True})


# ---- training -----------------------------------------------------------------------------------------------------


def plan(folder: Path, **changes: Any) -> dict[str, Any]:
    """An objective on a small VAE, for clips of four frames of 8x8."""
    if not folder.exists():
        torch.manual_seed(0)
        sizes = {"image_size": 8, "block_out_channels": (8, 8), "norm_num_groups": 4, "layers_per_block": 1}
        create_model("kl_vae_fashion", **sizes).save_pretrained(folder)
    sizes = {"hidden_size": 32, "depth": 1, "num_heads": 2}
    base = {"name": "energy", "tokenizer": str(folder), "model": "ebt_fashion", "num_frames": 4}
    return {**base, "model_overrides": {**sizes, **changes.pop("model_overrides", {})}, **changes}


def built(folder: Path, **changes: Any) -> Any:
    return build_objective(objective_config(plan(folder, **changes)), ["a", "b"])


def batch(count: int, seed: int = 0) -> dict[str, Tensor]:
    """Random clips, each frame a little brighter than the one before."""
    first = normal(count, 3, 1, 8, 8, seed=seed).mul(0.3)
    clips = first + torch.linspace(0, 0.5, 4).view(1, 1, 4, 1, 1)
    return {"images": clips.clamp(-1, 1), "labels": torch.zeros(count, dtype=torch.int64)}


def test_an_objective_learns_and_exports_what_goes_on(tmp_path: Path) -> None:
    objective = built(tmp_path / "vae", sampling={"head_steps": 3, "candidates": 2})
    assert (objective.num_frames, objective.image_size) == (4, (8, 8))
    optim = OptimConfig(lr=3e-3, weight_decay=0.1, schedule="constant", warmup_steps=0)
    optimizer = make_optimizer(objective.trained("main"), optim)
    (own,) = [g for g in optimizer.param_groups if any(p is objective.model.alpha for p in g["params"])]
    set_schedule(optimizer, optim, 0, 40)
    assert len(own["params"]) == 1 and own["lr"] == pytest.approx(15 * 3e-3) and own["weight_decay"] == 0
    before = objective.eval().validate(batch(16, seed=99), Rng.from_seed(0, 16))
    objective.train()
    for step in range(40):
        losses = objective(batch(8, seed=step), "main", step, 40, Rng.from_seed(step, 8))
        optimizer.zero_grad()
        losses["loss"].backward()
        optimizer.step()
        objective.after_step(step, Rng.from_seed(step, 1))
    after = objective.eval().validate(batch(16, seed=99), Rng.from_seed(0, 16))
    assert after["loss"] < 0.7 * before["loss"]
    assert {"psnr", "step_1", "step_2", "copy", "psnr_copy", "energy_drop"} < after.keys()
    assert not any(v.requires_grad for v in after.values())
    torch.testing.assert_close((after["step_1"] + after["step_2"]) / 2, after["loss"])
    clips = batch(16)["images"]
    error = (clips[:, :, -1] - clips[:, :, -2]).square().flatten(1).mean(1)
    told = objective.validate(batch(16), Rng.from_seed(0, 16))
    torch.testing.assert_close(told["psnr_copy"], (10 * (4 / error).log10()).mean())
    assert objective.statistics()["alpha"] == pytest.approx(float(objective.model.alpha.detach()))
    shown = objective.pictures(batch(3), Rng.from_seed(0, 3))
    assert shown.shape == (3 * 2 * 8, 3, 8, 8) and shown.isfinite().all()
    torch.testing.assert_close(shown[:8][[0, -1]], batch(3)["images"][0, :, [0, -1]].transpose(0, 1))  # as they are
    objective.export(tmp_path / "model")
    model = EnergyVideoAR.from_pretrained(tmp_path / "model" / "transformer")
    pipe = AutoPipeline.from_pretrained(tmp_path / "model")
    pipe.set_progress_bar_config(disable=True)
    assert isinstance(pipe, ClassToVideoPipeline) and pipe.sampler.settings()["candidates"] == 2
    assert model.step_size() == objective.model.step_size()
    given = batch(2)["images"][:, :, :1]
    out = pipe(frames=given, num_frames=6, context_frames=2, seed=3, output_type="pt")  # two windows
    assert out.videos.shape == (2, 6, 3, 8, 8) and out.videos.isfinite().all() and out.class_labels is None
    torch.testing.assert_close(out.videos[:, 0], given[:, :, 0] * 0.5 + 0.5)
    assert out.stats["steps"] == 5 and out.stats["head_calls"] == 5 * 4
    longer = pipe(frames=given, num_frames=6, context_frames=2, seed=3, output_type="pt", head_steps=8)
    assert not torch.equal(longer.videos[:, 1:], out.videos[:, 1:])
    with pytest.raises(ValueError, match="give the first frame or frames"):
        pipe(seed=3)
    with pytest.raises(ValueError, match="EnergySampler has no setting guidance_scale"):
        pipe(frames=given, guidance_scale=2.0)


SYSTEM_2 = {
    "num_steps": 1,
    "repeats": [2, 3],
    "truncate": True,
    "detach": False,
    "langevin_noise": 0.1,
    "random_alpha": 2.0,
}


def test_clips_start_from_what_earlier_steps_refined(tmp_path: Path) -> None:
    objective = built(tmp_path / "vae", replay=6, alpha_lr=0, model_overrides=SYSTEM_2)
    assert not objective.model.alpha.requires_grad
    asked: list[Any] = []
    plain = objective.model.losses_of
    objective.model.losses_of = lambda *given: asked.append(given) or plain(*given)
    for step in range(3):
        objective(batch(4, seed=step), "main", step, 3, Rng.from_seed(step, 4))["loss"].backward()
        if step == 1:
            objective.discard_step()
        else:
            objective.after_step(step, Rng.from_seed(step, 1))
    assert [len(frames) for frames, *_ in asked] == [4, 6, 6] and asked[0][2] is None
    frames, rng, replayed = asked[1]
    assert len(rng) == 6 and len(rng.seeds.unique()) == 6 and replayed.shape == (2, 3, 64)
    assert all((frames[4 + i] == asked[0][0]).flatten(1).all(1).any() for i in range(2))  # clips of the first step
    assert int(objective.replay_written) == 8  # of four clips twice; the step between was skipped
    newest = objective.frames(batch(4, seed=2)["images"])
    torch.testing.assert_close(objective.replay_frames[[4, 5, 0, 1]], newest)  # a ring of six
    stored = objective.state_dict()
    assert {"replay_frames", "replay_refined", "replay_written"} <= stored.keys()


def test_a_run_of_system_two_resumes_exactly(fashion_root: Path, tmp_path: Path) -> None:
    """What was refined before a stop is started from after it."""
    objective = plan(tmp_path / "vae", replay=6, model_overrides=SYSTEM_2)
    settings = ("loop.validate_images=4", "loop.steps=6", "loop.save_every=3", "optim.warmup_steps=0")
    whole = train(clips_recipe(tmp_path / "whole", objective, fashion_root, *settings)).folder
    log = lines(whole)
    assert {"loss", "loss_last", "alpha"} <= log[0].keys()
    assert any({"validation/step_3", "validation/psnr_copy"} <= line.keys() for line in log)
    again = resumed(whole, clips_recipe(tmp_path / "again", objective, fashion_root, *settings), 3)
    assert same_weights(whole / "model", again / "model")


def test_what_cannot_be_trained_is_refused(tmp_path: Path) -> None:
    plan(tmp_path / "vae")
    for name, folder in (("vq_fashion", "vq"), ("latent_pyramid_fashion", "scales")):
        create_model(name, **model_entry(name).tiny).save_pretrained(tmp_path / folder)
    for changes, message in (
        ({"model": "xar_fashion"}, "xar_fashion has no energies"),
        ({"tokenizer": str(tmp_path / "vq")}, "energies are of latents"),
        ({"tokenizer": str(tmp_path / "scales")}, "one grid of latents a frame, not of scales"),
        ({"num_frames": 1}, "num_frames must be at least 2"),
        ({"alpha_lr": -1}, "alpha_lr must not be negative"),
        ({"replay": -1}, "replay must not be negative"),
        ({"model_overrides": {"variant": "film"}}, "got 'film'"),
        ({"model_overrides": {"variants": "default"}}, "variants"),
        ({"sampling": {"select": "worst"}}, "got 'worst'"),
    ):
        with pytest.raises((ConfigError, ValueError), match=message):
            built(tmp_path / "vae", **changes)
