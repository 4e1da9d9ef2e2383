"""MAR and the diffusion head: what the release does, and where it is mended."""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from typer.testing import CliRunner

from varkit import ClassToImagePipeline, Rng
from varkit.checkpoints.files import load_official, to_official
from varkit.checkpoints.mar import readme_sampling
from varkit.cli import app
from varkit.generators.mar import MAR, first_masked, group_sizes, mask_ratio, masked_counts, patch_positions
from varkit.heads.diffusion import Diffusion, DiffusionHead
from varkit.heads.gaussian import STEPS, discretised_log_likelihood, process, spaced
from varkit.interfaces import Cond
from varkit.registry import checkpoint, create_model
from varkit.rng import Draw
from varkit.samplers.continuous import ContinuousSampler, ContinuousStep, steps_of
from varkit.tokenizers.kl_vae import KLVAE

EVERY = torch.arange(16)


def small(patch: int = 1, **changes: Any) -> MAR:
    """16 tokens of 4 channels or, as patches, of 16; lively weights, whose head stays near the data."""
    sizes: dict[str, Any] = {f"{part}_{k}": v for part in ("encoder", "decoder") for k, v in
                             (("dim", 32), ("depth", 1), ("heads", 2))}  # fmt: skip
    sizes |= {"num_classes": 3, "grid": (4 * patch, 4 * patch), "latent_dim": 4, "patch_size": patch, "buffer_size": 2}
    sizes |= {"head_width": 24, "head_depth": 1, "num_steps": 4, "dropout": 0.0, "attention_dropout": 0.0}
    torch.manual_seed(0)
    model = MAR(**{**sizes, **changes})
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model.eval()


def vae(patch: int = 1) -> KLVAE:
    torch.manual_seed(1)
    return KLVAE(
        image_size=8 * patch, latent_channels=4, block_out_channels=(8, 8), layers_per_block=1, norm_num_groups=4
    ).eval()


def draw(model: MAR, batch: int = 3, seed: int = 0, known: Any = None, **settings: Any) -> tuple[Tensor, list[Any]]:
    steps: list[ContinuousStep] = []
    cond, null = Cond(torch.arange(batch) % 3), Cond(torch.full((batch,), 3))
    out = ContinuousSampler(**{"head_steps": 3, **settings}).generate(
        vae(model.config.patch_size),
        model,
        cond,
        Rng.from_seed(seed, batch),
        null=null,
        known=known,
        on_step=lambda info: steps.append(info),
    )
    return out.tokens, steps


# ---- the diffusion ----------------------------------------------------------------------------------------------


def ideal(data: Tensor) -> Callable[[Tensor, Tensor], Tensor]:
    """The network that knows the one possible token: all of x besides it is noise."""

    def denoise(x: Tensor, t: Tensor) -> Tensor:
        c = process().at(int(t.flatten()[0]))
        return torch.cat([(x - c.signal * data) / c.sigma, torch.full_like(x, -1.0)], -1)

    return denoise


@pytest.mark.parametrize("solver", ["ancestral", "ddim"])
@pytest.mark.parametrize("spacing", [2, 7, 100, "ddim50", "20,20"])
def test_with_the_ideal_network_every_noise_ends_at_the_data(solver: str, spacing: int | str) -> None:
    data = torch.randn(3, 16, 4, generator=torch.Generator().manual_seed(0))
    diffusion = Diffusion(ideal(data), 4)
    drawn = diffusion.sample(Rng.from_seed(0, 3), EVERY, num_steps=spacing, solver=solver)
    torch.testing.assert_close(drawn, data, atol=2e-3, rtol=1e-3)
    assert diffusion.calls == len(spaced(spacing))


def test_the_standard_normal_is_drawn_where_the_data_are_standard_normal() -> None:
    """Then x_t is standard normal at every t, and the best guess of the noise is sigma x."""

    def denoise(x: Tensor, t: Tensor) -> Tensor:
        return torch.cat([process().at(int(t.flatten()[0])).sigma * x, torch.full_like(x, 1.0)], -1)

    drawn = Diffusion(denoise, 4).sample(Rng.from_seed(0, 500), EVERY, num_steps=100)
    assert abs(float(drawn.mean())) < 0.02 and abs(float(drawn.std()) - 1) < 0.03
    colder = Diffusion(denoise, 4).sample(Rng.from_seed(0, 500), EVERY, num_steps=100, temperature=0.5)
    assert colder.std() < 0.75 * drawn.std()
    ddim = Diffusion(denoise, 4).sample(Rng.from_seed(0, 500), EVERY, num_steps=100, solver="ddim")
    assert abs(float(ddim.std()) - 1) < 0.05


def test_the_last_step_adds_no_noise_and_is_remembered() -> None:
    def denoise(x: Tensor, t: Tensor) -> Tensor:
        return torch.cat([0.1 * x, torch.full_like(x, 0.5)], -1)

    diffusion, steps = Diffusion(denoise, 4), process(5)
    drawn = diffusion.sample(Rng.from_seed(0, 2), EVERY, num_steps=5, temperature=0.5)
    assert torch.equal(drawn, diffusion.mean)
    logs = [0.75 * steps.at(i).log_beta + 0.25 * steps.at(i).log_posterior for i in range(5)]
    torch.testing.assert_close(diffusion.std, torch.full_like(drawn, 0.5 * math.exp(0.5 * logs[0])))
    torch.testing.assert_close(diffusion.log_std_sum, torch.full_like(drawn, 0.5 * sum(logs[1:])))


def test_noise_belongs_to_a_token_and_to_a_step_of_it() -> None:
    def denoise(x: Tensor, t: Tensor) -> Tensor:
        return torch.cat([0.1 * x, torch.zeros_like(x)], -1)

    def some(rng: Rng, positions: Tensor, **more: Any) -> Tensor:
        return Diffusion(denoise, 4).sample(rng, positions, num_steps=10, **more)

    rng = Rng.from_seed(3, 4)
    every = some(rng, EVERY)
    assert torch.equal(some(rng, EVERY[5:8]), every[:, 5:8])
    assert torch.equal(some(rng[2:3], EVERY), every[2:3])
    own = torch.stack([EVERY.roll(i)[:6] for i in range(4)])
    assert torch.equal(some(rng, own), every.gather(1, own[..., None].expand(-1, -1, 4)))
    assert not torch.isclose(some(rng, EVERY, step=1), every).any(-1).all()
    assert len(every.flatten().unique()) == every.numel()


def test_much_noise_is_drawn_in_parts_and_stays_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    from varkit.heads import diffusion

    rng = Rng.from_seed(0, 2)
    few = list(diffusion.step_noise(rng, EVERY, 0, 4, 9))
    assert len(few) == 9 and few[0].shape == (2, 16, 4) and len(torch.stack(few).unique()) == 9 * 128
    asked: list[int] = []

    class Counting(Rng):
        def normal(self, positions: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            asked.append(positions.shape[-1])
            return super().normal(positions, *args, **kwargs)

    monkeypatch.setattr(diffusion, "_AT_ONCE", 256)
    parts = list(diffusion.step_noise(Counting(rng.seeds), EVERY, 0, 4, 9))
    assert len(asked) == 5 and all(torch.equal(a, b) for a, b in zip(few, parts, strict=True))


def test_guidance_leads_the_noise_and_leaves_the_variance() -> None:
    def pair(x: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        return torch.cat([x + 1, 0 * x + 0.25], -1), torch.cat([x - 1, 0 * x - 0.75], -1)

    guided = Diffusion(lambda x, t: pair(x, t)[0], 4, pair).guide(3.0)
    noise, share = guided.denoise(torch.zeros(1, 2, 4), torch.zeros(1, 1)).chunk(2, -1)
    assert (noise == 5).all() and (share == 0.25).all()
    each = Diffusion(lambda x, t: pair(x, t)[0], 4, pair).guide(torch.tensor([0.0, 1.0]))
    assert each.denoise(torch.zeros(1, 2, 4), torch.zeros(1, 1))[0, :, 0].tolist() == [-1, 1]


def test_which_steps_are_taken() -> None:
    assert spaced(100) == [round(i * 999 / 99) for i in range(100)]
    assert spaced("ddim50") == list(range(0, 1000, 20))
    assert spaced("4,0") == [0, 166, 333, 499] and spaced(STEPS) == list(range(1000))
    for wrong in ("ddim999", "fast", 1001, "600,1"):
        with pytest.raises(ValueError, match=r"steps of a diffusion|cannot take"):
            spaced(wrong)
    for few in (1, "1,0"):
        with pytest.raises(ValueError, match="at least 2 steps; got 1"):
            process(few)


def test_refusals_of_a_diffusion() -> None:
    diffusion, rng = Diffusion(ideal(torch.zeros(1, 16, 4)), 4), Rng.from_seed(0, 1)
    with pytest.raises(ValueError, match="must be one of ancestral, ddim; got 'euler'"):
        diffusion.sample(rng, EVERY, solver="euler")
    with pytest.raises(ValueError, match="ddim adds no noise"):
        diffusion.sample(rng, EVERY, solver="ddim", temperature=0.9)
    with pytest.raises(ValueError, match="needs an unconditional branch"):
        diffusion.guide(2.0)


def test_the_loss_of_a_head_at_its_start_is_that_of_no_noise_predicted() -> None:
    """Its output is zero then: the squared error is that of the noise, and the bound that of the middle variance."""
    head = DiffusionHead(4, 8, 16, 2)
    head.init_weights()
    g = torch.Generator().manual_seed(0)
    noise, data, z = (torch.randn(4000, n, generator=g) for n in (4, 4, 8))
    t = torch.randint(0, STEPS, (4000,), generator=g)
    squares, bound = head.loss(z, data, t, noise)
    torch.testing.assert_close(squares, noise.square().mean(-1))
    assert bound.isfinite().all() and (bound[t > 0] > 0).all()


def test_the_variance_is_taught_by_the_bound_alone_and_the_noise_by_the_square() -> None:
    head = DiffusionHead(4, 8, 16, 1)
    head.init_weights()
    g = torch.Generator().manual_seed(0)
    noise, data, z = (torch.randn(64, n, generator=g) for n in (4, 4, 8))
    squares, bound = head.loss(z, data, torch.arange(1, 65), noise)
    rows = head.net.final_layer.linear.bias
    of_square, of_bound = (torch.autograd.grad(v.sum(), rows, retain_graph=True)[0] for v in (squares, bound))
    assert of_square[:4].any() and not of_square[4:].any()
    assert not of_bound[:4].any() and of_bound[4:].any()


def test_the_likelihood_of_all_bins_is_one_and_far_data_have_finite_gradients() -> None:
    bins = torch.linspace(-1, 1, 256)[:, None].expand(-1, 3)
    mean, log_std = torch.tensor([0.0, 0.7, -1.0]), torch.tensor([-1.0, -4.0, -2.0])
    total = discretised_log_likelihood(bins, mean, log_std).exp().sum(0)
    torch.testing.assert_close(total, torch.ones(3), atol=1e-3, rtol=0)
    far = torch.tensor([1e15], requires_grad=True)
    discretised_log_likelihood(torch.zeros(1), far, torch.tensor([-8.0])).sum().backward()
    assert far.grad is not None and far.grad.isfinite().all()


# ---- tokens, masks, groups --------------------------------------------------------------------------------------


def test_a_patch_is_a_token() -> None:
    assert patch_positions((4, 4), 2).tolist() == [[0, 1, 4, 5], [2, 3, 6, 7], [8, 9, 12, 13], [10, 11, 14, 15]]
    model = small(2)
    latents = torch.randn(2, 64, 4)
    tokens = model.patchify(latents)
    assert tokens.shape == (2, 16, 16) and torch.equal(model.unpatchify(tokens), latents)
    assert torch.equal(tokens[0, 5, 4:8], latents[0, model.positions[5], 1])  # the second channel's four


@pytest.mark.parametrize("length", [1, 2, 16, 64, 256])
def test_every_step_decides_something(length: int) -> None:
    """In the release steps beyond the number of tokens run the head on nothing; here they are refused."""
    for steps in range(1, length + 1):
        sizes = group_sizes(length, steps)
        assert len(sizes) == steps and sum(sizes) == length and min(sizes) > 0
    assert masked_counts(16, 5) == [15, 12, 9, 4, 1]
    with pytest.raises(ValueError, match=f"num_steps must be in 1 to {length}"):
        group_sizes(length, length + 1)


def test_more_steps_than_tokens_are_refused_before_any_work() -> None:
    with pytest.raises(ValueError, match="num_steps must be in 1 to 16, the number of tokens; got 17"):
        draw(small(), num_steps=17)
    with pytest.raises(ValueError, match="num_steps must be in 1 to 16"):
        small().schedule(0)


def test_the_last_of_an_order_is_drawn_first() -> None:
    model, rng = small(), Rng.from_seed(0, 3)
    order = rng.uniform(EVERY, Draw.ORDER).argsort(1)
    groups = model.groups(rng)
    start = 16
    for positions in groups:
        start -= positions.shape[1]
        assert torch.equal(positions, order[:, start : start + positions.shape[1]].sort(1).values)
    assert len({tuple(p.tolist()) for p in groups[0]}) > 1  # each image has its own


def test_how_many_are_masked_in_training() -> None:
    ratios = [mask_ratio((i + 0.5) / 4000, 0.7) for i in range(4000)]
    assert min(ratios) >= 0.7 and max(ratios) <= 1 and ratios == sorted(ratios)
    normal = torch.distributions.Normal(1.0, 0.25)
    low = normal.cdf(torch.tensor(0.7))
    for at in (0.75, 0.85, 0.95):  # the cut normal's distribution function
        share = sum(r < at for r in ratios) / 4000
        assert share == pytest.approx(float((normal.cdf(torch.tensor(at)) - low) / (0.5 - low)), abs=2e-3)
    order = torch.stack([torch.randperm(10) for _ in range(4)])
    mask = first_masked(order, 0.71)
    assert mask.sum(1).tolist() == [8] * 4 and all(mask[i, order[i, :8]].all() for i in range(4))


def test_which_tokens_are_masked_belongs_to_the_image() -> None:
    model, rng = small(), Rng.from_seed(0, 4)
    together = model.draw_mask(rng)
    assert len(set(together.sum(1).tolist())) == 1 and together.sum(1)[0] >= 12
    alone = model.draw_mask(rng[:1])
    assert torch.equal(alone, together[:1])


# ---- the model --------------------------------------------------------------------------------------------------


def test_a_masked_token_is_not_read_and_a_decided_one_is() -> None:
    model, tokens = small(), torch.randn(1, 16, 4)
    visible, labels = torch.tensor([[2, 5, 11]]), torch.tensor([1])
    with torch.no_grad():
        before = model(tokens, visible, labels)
        for place in range(16):
            changed = tokens.clone()
            changed[:, place] += 1
            assert (model(changed, visible, labels) - before).abs().max().gt(1e-4) == (place in (2, 5, 11))


def test_no_class_is_the_vector_of_its_own() -> None:
    """In the release labels=None means that; here the id after the last class does, and no id is out of range."""
    model = small()
    vectors = torch.cat([model.class_emb.weight[1:2], model.fake_latent])
    assert torch.equal(model.embed_classes(torch.tensor([1, 3])), vectors)
    pipe = ClassToImagePipeline(model, vae(), ContinuousSampler(head_steps=2))
    pipe.set_progress_bar_config(disable=True)
    with pytest.raises(ValueError, match="class 4 does not exist: this model has classes 0 to 2"):
        pipe(4, seed=0)
    out = pipe(seed=0, output_type="latent")
    assert out.class_labels[0] < 3  # without a label a class is drawn, and told
    none = pipe(3, seed=0, output_type="latent").images
    model.class_emb.weight.data.normal_()
    assert torch.equal(pipe(3, seed=0, output_type="latent").images, none)


def test_classes_are_dropped_in_training_alone() -> None:
    """The release drops labels whenever the module is not in eval mode, and users forget it."""
    model, u = small(cond_drop_rate=0.5), torch.tensor([0.4, 0.6, 0.1])
    labels = torch.tensor([0, 1, 2])
    assert model.drop_classes(labels, u).tolist() == [0, 1, 2]
    first = draw(model)[0]
    model.train()
    assert model.drop_classes(labels, u).tolist() == [3, 1, 3]
    assert torch.equal(draw(model)[0], first)  # drawing drops nothing, whatever the mode
    again = MAR.from_config(model.config)
    assert create_model("mar_fashion").config.cond_drop_rate == 0.1 and again.config.cond_drop_rate == 0.5


def test_one_step_of_training_is_the_same_whatever_torch_draws() -> None:
    model, tokens, cond = small(), torch.randn(4, 16, 4), Cond(torch.tensor([0, 1, 2, 0]))
    model.train()
    losses = []
    for seed in (0, 0, 1):
        torch.manual_seed(len(losses))
        losses.append(float(model.training_loss(tokens, tokens, cond, Rng.from_seed(seed, 4))["loss"].detach()))
    assert losses[0] == losses[1] != losses[2]


def test_the_loss_falls_where_there_is_something_to_learn() -> None:
    """Two classes of constant images."""
    model = small(cond_drop_rate=0.0, num_classes=2)
    model.init_weights()
    model.train()
    optimiser = torch.optim.AdamW(model.parameters(), 3e-3)
    labels = torch.arange(16) % 2
    tokens = (labels[:, None, None] - 0.5).expand(-1, 16, 4).contiguous()
    squares = []
    for step in range(150):
        loss = model.training_loss(tokens, tokens, Cond(labels), Rng.from_seed(step, 16))
        optimiser.zero_grad()
        loss["loss"].backward()
        optimiser.step()
        squares.append(float(loss["mse"].detach()))
    assert sum(squares[-10:]) < 0.3 * sum(squares[:10])
    tokens, _ = draw(model.eval(), 2, head_steps=50)
    assert tokens[0].mean() < -0.3 and tokens[1].mean() > 0.3


# ---- sampling ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("patch", [1, 2])
def test_guidance_follows_the_share_of_decided_tokens(patch: int) -> None:
    """1 + (w - 1) (L - masked) / L with what is masked after the step, one token at least: w itself is never used."""
    _, steps = draw(small(patch), guidance_scale=3.0, num_steps=5)
    assert [s.guidance for s in steps] == [1 + 2 * (16 - left) / 16 for left in masked_counts(16, 5)]
    assert [s.guidance for s in draw(small(patch), guidance_scale=3.0, guidance_schedule="constant")[1]] == [3.0] * 4
    some = draw(small(patch), guidance_scale=3.0, guidance_interval=(1, 2))[1]
    assert [s.guidance > 1 for s in some] == [False, True, True, False]


def test_steps_of_the_head_fall_over_the_groups() -> None:
    """DiSA for MAR: 50 at the first of 64 groups, 5 at the last."""
    counts = [steps_of(i, 64, 50, 5) for i in range(64)]
    assert counts[0] == 50 and counts[-1] == 5 and counts == sorted(counts, reverse=True)
    model = small()
    _, steps = draw(model, head_steps=8, head_steps_last=2)
    assert [s.predictive.calls for s in steps] == [8, 6, 4, 2]
    with pytest.raises(ValueError, match="head_steps_last goes with a number"):
        ContinuousSampler(head_steps="ddim50", head_steps_last=5)
    with pytest.raises(ValueError, match="steps of a diffusion"):
        ContinuousSampler(head_steps="quick")


@pytest.mark.parametrize("patch", [1, 2])
def test_known_tokens_are_read_from_the_first_step_and_kept(patch: int) -> None:
    model = small(patch)
    given = torch.randn(2, model.layout.length, 4)
    keep = torch.zeros(model.layout.length, dtype=torch.bool)
    keep[: model.layout.length // 2] = True
    tokens, steps = draw(model, 2, known=(given, keep), num_steps=16)
    assert torch.equal(tokens[:, keep], given[:, keep])
    drawn = torch.cat([s.positions for s in steps], 1)
    assert torch.equal(drawn.sort(1).values, (~keep).nonzero()[:, 0].expand(2, -1))
    assert len(steps) == 8  # no more than there are tokens to draw
    other, _ = draw(model, 2, known=(given + 1, keep), num_steps=16)
    first = steps[0].positions[0]
    assert (other[0, first] - tokens[0, first]).abs().max() > 1e-3  # the very first read them
    guided = draw(model, 2, known=(given, keep), guidance_scale=3.0, num_steps=4)[1]
    assert guided[0].guidance >= 1 + 2 * 9 / 16  # half is decided before


def test_a_patch_of_which_a_part_is_known_is_drawn_around_it() -> None:
    model, given = small(2), torch.randn(1, 64, 4)
    keep = torch.zeros(1, 64, dtype=torch.bool)
    keep[0, [0, 1, 4, 5, 8, 9, 2]] = True  # of the first row's patches: [0 1 8 9], and parts of [2 3 10 11], [4 5 ..]
    tokens, steps = draw(model, 1, known=(given, keep))
    assert torch.equal(tokens[keep], given[keep])
    drawn = torch.cat([s.positions for s in steps], 1)[0].tolist()
    assert not {0, 1, 8, 9} & set(drawn) and {2, 3, 10, 11, 4, 5, 12, 13} <= set(drawn)


def test_masks_may_differ_between_images_if_as_much_is_open() -> None:
    model, given = small(), torch.randn(2, 16, 4)
    keep = torch.zeros(2, 16, dtype=torch.bool)
    keep[0, :5], keep[1, 9:14] = True, True
    tokens, _ = draw(model, 2, known=(given, keep))
    assert torch.equal(tokens[keep], given[keep])
    alone, _ = draw(model, 1, known=(given[:1], keep[:1]))
    torch.testing.assert_close(alone, tokens[:1], atol=1e-3, rtol=1e-3)
    keep[0, 7] = True
    with pytest.raises(ValueError, match="these masks leave 10 to 11: draw images with other masks in another call"):
        draw(model, 2, known=(given, keep))
    with pytest.raises(ValueError, match="at least one"):
        draw(model, 2, known=(given, torch.ones(16, dtype=torch.bool)))


def test_an_edit_counts_its_own_steps() -> None:
    pipe = ClassToImagePipeline(small(), vae(), ContinuousSampler(head_steps=2, num_steps=16))
    pipe.set_progress_bar_config(disable=True)
    totals: list[int] = []
    bar = pipe.progress_bar
    pipe.progress_bar = lambda total: totals.append(total) or bar(total=total)
    image = torch.rand(1, 3, 8, 8) * 2 - 1
    out = pipe.edit(image, box=(0, 0, 0.5, 0.5), seed=0, output_type="latent")
    assert totals == [4] and out.stats["steps"] == 4


# ---- files and commands -----------------------------------------------------------------------------------------


def test_the_average_of_a_training_file_is_taken(tmp_path: Path) -> None:
    model, average = small(encoder_heads=1, decoder_heads=1), small(encoder_heads=1, decoder_heads=1)
    average.fake_latent.data += 1
    states = {"model": to_official(model), "model_ema": to_official(average)}
    torch.save({**states, "args": argparse.Namespace(lr=1), "epoch": 3}, tmp_path / "checkpoint-last.pth")
    again = load_official(tmp_path / "checkpoint-last.pth")
    assert isinstance(again, MAR) and torch.equal(again.fake_latent, average.fake_latent)
    assert again.config.buffer_size == 2 and again.config.num_steps == 16 and again.layout == model.layout
    assert readme_sampling(again)["num_steps"] == 16


def test_what_no_key_tells_is_said(tmp_path: Path) -> None:
    model = small(2, encoder_heads=1, decoder_heads=1)
    torch.save(to_official(model), tmp_path / "mar.pth")
    again: Any = load_official(tmp_path / "mar.pth", patch_size=2, latent_dim=4, grid=(8, 8))
    assert again.layout == model.layout and torch.equal(again.positions, model.positions)


def test_the_released_sizes_are_sampled_as_their_readme_says() -> None:
    for size, scale in (("b", 2.9), ("l", 3.0), ("h", 3.2)):
        with torch.device("meta"):
            model = create_model(f"mar_{size}")
        told = readme_sampling(model)
        assert told["guidance_scale"] == scale and told["head_steps"] == 100
        assert told | checkpoint(f"mar_{size}.in1k_256").sampling == told
        ContinuousSampler(**told)


def test_the_command_takes_the_steps_of_the_head(tmp_path: Path) -> None:
    pipe = ClassToImagePipeline(small(), vae(), ContinuousSampler(head_steps=2))
    pipe.save_pretrained(tmp_path / "mar")
    out = ["--class", "1", "--num", "1", "--steps", "2", "--temperature", "0.9", "--json"]
    result = CliRunner().invoke(
        app, ["sample", str(tmp_path / "mar"), *out, "--head-steps", "6,3", "--out", str(tmp_path / "a.png")]
    )
    assert result.exit_code == 0, result.output
    assert '"head_steps": 6, "head_steps_last": 3' in result.output and '"num_steps": 2' in result.output
    result = CliRunner().invoke(app, ["sample", str(tmp_path / "mar"), *out, "--head-steps", "1,2,3"])
    assert result.exit_code == 2 and "--head-steps" in result.output
