"""Flows, KL autoencoders and FlexTok: what the integration, the ordered tokens and the training promise."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
from safetensors.torch import save_file
from torch import Tensor
from typer.testing import CliRunner

from tests.test_models import liven
from tests.test_training import exported, lines, recipe, signal_at, weights
from varkit import ClassToImagePipeline, NextGroupSampler, Rng
from varkit.checkpoints import flextok as keys
from varkit.checkpoints.convert import convert
from varkit.checkpoints.files import load_official, to_official, write_official
from varkit.cli import app
from varkit.config import ConfigError
from varkit.heads.flow import Flow, add_noise, draw_sigma, flow_loss
from varkit.pipelines.auto import open_tokenizer
from varkit.registry import create_model, model_entry
from varkit.samplers.ode import ProjectedGuidance, classifier_free, euler, guided, heun, integrate, times
from varkit.tokenizers.flextok import FSQ, FlexTok, attention_mask, from_patches, to_patches
from varkit.tokenizers.kl_vae import KLVAE
from varkit.training.loop import train
from varkit.training.objectives import build_objective, objective_config

OFFICIAL = json.loads((Path(__file__).parent / "checkpoints" / "flextok_d12_d12_in1k.json").read_text())["constructor"]
TINY_VAE = model_entry("kl_vae_f8").tiny


def tiny(**changes: Any) -> FlexTok:
    torch.manual_seed(0)
    return liven(FlexTok(**{**model_entry("flextok_fashion").tiny, **changes}), 0.05)


def some_images(model: Any, batch: int) -> Tensor:
    return torch.rand(batch, 3, *model.image_size, generator=torch.Generator().manual_seed(0)) * 2 - 1


# ---- flows ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(2, 3), (2, 5, 4), (2, 3, 4, 4)])
@pytest.mark.parametrize("solver", ["euler", "heun"])
def test_a_straight_flow_is_integrated_exactly_in_one_step(solver: str, shape: tuple[int, ...]) -> None:
    noise, data = torch.randn(shape), torch.randn(shape)
    torch.testing.assert_close(integrate(lambda x, t: noise - data, noise, 1, solver), data)
    sigma = torch.tensor([0.2, 0.9])
    assert flow_loss(lambda x, t: noise - data, data, noise, sigma).abs().max() < 1e-12


def test_heun_is_of_second_order_and_euler_of_first() -> None:
    """dx/dt = 2 t x has the solution x(0) = x(1) / e."""
    x, exact = torch.ones(1, 1, dtype=torch.float64), torch.e**-1
    errors = {
        solver: [abs(float(solve(lambda x, t: 2 * t[:, None] * x, x, times(n))) - exact) for n in (20, 40)]
        for solver, solve in (("euler", euler), ("heun", heun))
    }
    assert 1.8 < errors["euler"][0] / errors["euler"][1] < 2.2
    assert 3.5 < errors["heun"][0] / errors["heun"][1] < 4.5


def test_guidance_may_depend_on_time_and_on_position() -> None:
    cond, uncond = torch.randn(2, 3, 4), torch.randn(2, 3, 4)

    def pair(x: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        return cond, uncond

    t = torch.tensor([0.25, 0.5])
    expected = uncond + (4 * t).view(2, 1, 1) * (cond - uncond)
    torch.testing.assert_close(guided(pair, lambda t: 4 * t)(cond, t), expected)
    scale = torch.tensor([0.0, 1.0, 3.0])
    torch.testing.assert_close(guided(pair, scale)(cond, t), uncond + scale.view(1, 3, 1) * (cond - uncond))
    flow = Flow(lambda x, t: cond, 4, pair)
    assert flow.guide(1).pair is None and torch.equal(flow.guide(1).velocity(cond, t), cond)
    with pytest.raises(ValueError, match="unconditional"):
        flow.guide(1).guide(2.0)
    with pytest.raises(ValueError, match="no logits"):
        flow.sample(Rng.from_seed(0, 2), torch.arange(3), [lambda x: x])


def test_projected_guidance_changes_nothing_along_the_condition_and_no_more_than_the_threshold() -> None:
    cond, uncond = torch.randn(3, 2, 4, 4), 9 * torch.randn(3, 2, 4, 4)
    change = ProjectedGuidance(norm_threshold=2.5)(cond, uncond, 2.0) - cond
    assert (change * cond).sum((1, 2, 3)).abs().max() < 1e-4
    assert change.flatten(1).norm(dim=1).max() <= 2.5 + 1e-5
    plain = ProjectedGuidance(momentum=0, eta=1, norm_threshold=0)(cond, uncond, 3.0)
    torch.testing.assert_close(plain, classifier_free(cond, uncond, 3.0), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("kind", ["uniform", "logit-normal", "mode"])
def test_noise_levels(kind: Any) -> None:
    rng = Rng.from_seed(0, 4096)
    sigma = draw_sigma(rng, kind=kind)
    assert sigma.min() > 0 and sigma.max() < 1 and abs(float(sigma.mean()) - 0.5) < 0.02
    assert torch.equal(draw_sigma(rng[5:6], kind=kind), sigma[5:6])
    assert draw_sigma(rng[:3], torch.arange(7), kind=kind).shape == (3, 7)
    stratified = draw_sigma(rng, kind=kind, stratified=True)
    assert (stratified.diff() > 0).all() or (stratified.diff() < 0).all()
    spread = {"uniform": 0.289, "logit-normal": 0.208, "mode": None}[kind]
    assert spread is None or abs(float(sigma.std()) - spread) < 0.01
    with pytest.raises(ValueError, match="kind must be"):
        draw_sigma(rng, kind="other")  # type: ignore[arg-type]


def test_each_position_may_have_its_own_noise_level() -> None:
    data, noise = torch.zeros(1, 3, 2), torch.ones(1, 3, 2)
    x = add_noise(data, noise, torch.tensor([[0.0, 0.5, 1.0]]))
    assert x[0, :, 0].tolist() == [0, 0.5, 1]


# ---- the KL autoencoder ---------------------------------------------------------------------------------------


def test_any_autoencoder_of_diffusers_opens(tmp_path: Path) -> None:
    theirs = AutoencoderKL(
        in_channels=3,
        out_channels=3,
        block_out_channels=(8, 16),
        down_block_types=("DownEncoderBlock2D", "AttnDownEncoderBlock2D"),
        up_block_types=("UpDecoderBlock2D", "UpDecoderBlock2D"),
        norm_num_groups=4,
        layers_per_block=1,
        sample_size=16,
        scaling_factor=0.5,
        shift_factor=0.25,
    ).eval()
    theirs.save_pretrained(tmp_path / "theirs")
    ours = KLVAE.from_pretrained(tmp_path / "theirs")
    assert ours.image_size == (16, 16) and not ours.training
    images = some_images(ours, 2)
    with torch.no_grad():
        mean = theirs.encode(images).latent_dist.mean
        torch.testing.assert_close(ours.latents(images), (mean - 0.25) * 0.5)
        torch.testing.assert_close(ours.to_images((mean - 0.25) * 0.5), theirs.decode(mean).sample)
    ours.save_pretrained(tmp_path / "ours")
    again = open_tokenizer(str(tmp_path / "ours"))
    assert isinstance(again, KLVAE) and torch.equal(again.encode(images), ours.encode(images))
    larger = KLVAE.from_pretrained(tmp_path / "theirs", image_size=32)
    assert larger.image_size == (32, 32) and larger.layout.length == 4 * ours.layout.length


def test_samples_have_the_posteriors_mean_and_spread() -> None:
    model = liven(KLVAE(**TINY_VAE), 0.05)
    image = some_images(model, 1)
    with torch.no_grad():
        posterior = model.posterior(image)
        draws = torch.cat([model.draw(posterior, Rng.from_seed(i, 1)) for i in range(400)])
    torch.testing.assert_close(draws.mean(0), posterior.mean[0], atol=0.3, rtol=0)
    torch.testing.assert_close(draws.std(0), posterior.std[0], atol=0.25, rtol=0)


def test_grey_images_stay_grey() -> None:
    model = liven(KLVAE(**{**TINY_VAE, "image_channels": 1}), 0.05)
    decoded = model.decode(model.encode(some_images(model, 1)))
    assert decoded.shape[1] == 3 and torch.equal(decoded[:, 0], decoded[:, 2])


# ---- FlexTok --------------------------------------------------------------------------------------------------


def test_fsq_codes_every_id_once_and_passes_gradients() -> None:
    fsq = FSQ((8, 5, 4))
    ids = torch.arange(8 * 5 * 4)
    values = fsq.vectors(ids)
    assert torch.equal(fsq.ids(values), ids) and len(values.unique(dim=0)) == len(ids)
    z = torch.randn(500, 3).clamp(-3, 3).requires_grad_()
    out = fsq(z)
    assert torch.equal(fsq.vectors(fsq.ids(out)), out) and out.abs().max() <= 1
    out.sum().backward()
    assert z.grad is not None and (z.grad > 0).all()


def test_patches_come_back() -> None:
    maps = torch.randn(2, 3, 4, 6)
    patches = to_patches(maps, 2)
    assert patches.shape == (2, 2, 3, 12) and torch.equal(from_patches(patches, 2), maps)
    assert torch.equal(patches[0, 0, 1].view(2, 2, 3)[1, 0], maps[0, :, 1, 2])


def test_registers_are_ordered() -> None:
    """Register i sees all patches and no later register: what a later one is leaves it as it was."""
    mask = attention_mask([2], [3], causal=True)
    assert mask.int().tolist() == [[1, 1, 0, 0, 0]] * 2 + [[1, 1, 1, 0, 0], [1, 1, 1, 1, 0], [1, 1, 1, 1, 1]]
    model = tiny()
    latents = torch.randn(1, 4, 8, 8)
    before = model.encode_latents(latents)[2]
    with torch.no_grad():
        model.encoder.module_dict["enc_register_module"]["registers"][5].neg_()  # a shift would be normalised away
        after = model.encode_latents(latents)[2]
    assert torch.equal(after[:, :5], before[:, :5]) and (after != before)[:, 5:].any(-1).all()


def test_tokens_beyond_the_length_do_not_matter_and_lengths_may_differ() -> None:
    model = tiny()
    tokens = model.encode(some_images(model, 3))
    given = tokens.clone()
    whole = {n: model.decode(tokens[:, :n]) for n in (1, 3, 8)}
    ragged = model.decode(tokens, lengths=torch.tensor([1, 3, 8]))
    for row, n in enumerate((1, 3, 8)):
        torch.testing.assert_close(ragged[row], whole[n][row], atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(model.decode(tokens, lengths=n), whole[n], atol=1e-5, rtol=1e-5)
    assert torch.equal(tokens, given) and not torch.equal(whole[1], whole[3])
    torch.testing.assert_close(model.decode(model.vectors(tokens), lengths=3), whole[3])
    for wrong in (0, 9, [1, 2], 1.5):
        with pytest.raises(ValueError, match="lengths must be"):
            model.decode(tokens, lengths=wrong)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="reads 1 to 8"):
        model.decode(torch.cat([tokens, tokens], 1))


def test_decoding_settings() -> None:
    model = tiny()
    tokens, rng = model.encode(some_images(model, 2)), Rng.from_seed(1, 2)
    fixed = model.decode(tokens[:1].expand(2, -1))
    assert torch.equal(fixed[0], fixed[1])  # the same noise for every image, unless there is an rng
    drawn = model.decode(tokens[:1].expand(2, -1), rng)
    assert not torch.equal(drawn[0], drawn[1])
    torch.testing.assert_close(model.decode(tokens[1:], rng[1:]), model.decode(tokens, rng)[1:], atol=1e-5, rtol=1e-5)
    plain = model.decode(tokens, guidance_scale=1.0)
    settings: list[dict[str, Any]] = [{"apg": False}, {"apg": True}, {"num_steps": 5}, {"solver": "heun"}]
    for setting in settings:
        assert not torch.equal(model.decode(tokens, guidance_scale=3.0, **setting), plain)
    timed = model.decode(tokens, guidance_scale=lambda t: 1 + 0 * t, apg=False)
    torch.testing.assert_close(timed, plain, atol=1e-5, rtol=1e-5)
    with pytest.raises(ValueError, match="solver must be"):
        model.decode(tokens, solver="other")
    with pytest.raises(ValueError, match="num_steps"):
        model.decode(tokens, num_steps=0)


def test_tokens_are_counted_for_a_target() -> None:
    model = tiny()
    images = some_images(model, 4)
    tokens = model.encode(images)
    each = {}
    for n in (1, 2, 4, 8):
        mse = (model.decode(tokens, lengths=n) - images).square().flatten(1).mean(1)
        each[n] = 10 * torch.log10(4 / mse)
    target = float(torch.stack(list(each.values())).median())
    found = model.tokens_for(images, target_psnr=target)
    for row in range(4):
        good = [n for n in each if each[n][row] >= target]
        assert int(found.lengths[row]) == (good[0] if good else 8) and bool(found.reached[row]) == bool(good)
        torch.testing.assert_close(found.achieved[row], each[int(found.lengths[row])][row], atol=1e-4, rtol=1e-4)
    distance = model.tokens_for(images, target_lpips=9.0, lpips=lambda a, b: (a - b).abs().flatten(1).mean(1))
    assert distance.lengths.tolist() == [1] * 4 and distance.reached.all()
    never = model.tokens_for(images, target_psnr=99.0, lengths=[2, 3])
    assert never.lengths.tolist() == [3] * 4 and not never.reached.any() and never.achieved.isfinite().all()
    wrong: list[tuple[dict[str, Any], str]] = [
        ({}, "exactly one"),
        ({"target_psnr": 1.0, "target_lpips": 1.0}, "exactly one"),
        ({"target_lpips": 1.0}, "needs lpips"),
        ({"target_psnr": 1.0, "lengths": [0]}, "lengths must be"),
    ]
    for arguments, message in wrong:
        with pytest.raises(ValueError, match=message):
            model.tokens_for(images, **arguments)


@pytest.mark.parametrize("rule", ["pow2", "uniform_pow2", "uniform"])
def test_nested_dropout_lengths(rule: str) -> None:
    drawn = tiny(nested_dropout=rule).draw_lengths(Rng.from_seed(0, 4000))
    counts = torch.bincount(drawn, minlength=9)[1:] / 4000
    shares = {
        "pow2": [1 / 4, 1 / 4, 0, 1 / 4, 0, 0, 0, 1 / 4],
        "uniform_pow2": [1 / 8, 1 / 8, 0, 1 / 4, 0, 0, 0, 1 / 2],
        "uniform": [1 / 8] * 8,
    }
    torch.testing.assert_close(counts, torch.tensor(shares[rule]), atol=0.03, rtol=0)


def test_training_reaches_every_parameter_but_those_that_are_fixed() -> None:
    model = tiny().train()
    loss = model(some_images(model, 16), Rng.from_seed(0, 16))
    assert all(v.isfinite() for v in loss.values()) and not model.vae.training
    loss["loss"].backward()
    fixed = {k for k, p in model.named_parameters() if not p.requires_grad}
    assert {k for k in fixed if not k.startswith("vae.")} == {
        "encoder.module_dict.enc_posemb_module.posembs",
        "decoder.module_dict.dec_patches_posemb_module.posembs",
    }
    unused = [k for k, p in model.named_parameters() if k not in fixed and (p.grad is None or not p.grad.any())]
    assert not unused


def test_the_quantiser_may_be_passed_and_tokens_replaced_in_training() -> None:
    model = tiny(drop_quant_p=0.3, corrupt_tokens_p=0.5, min_corrupt_tokens_p=0.1, apply_corrupt_tokens_p=0.4)
    rng, levels = Rng.from_seed(0, 2000), model.regularizer
    z = torch.randn(2000, 8, 3).requires_grad_()
    values = levels(z)
    dropped = tiny(drop_quant_p=0.3).disturbed(z, values, rng)
    smooth = (dropped == levels.unrounded(z)).flatten(1).all(1)
    assert smooth.float().mean().item() == pytest.approx(0.3, abs=0.03)
    assert torch.equal(dropped[~smooth], values[~smooth])
    dropped.sum().backward()
    assert z.grad is not None and (z.grad > 0).all()  # the same gradient, rounded or not
    replaced = tiny(corrupt_tokens_p=0.5, min_corrupt_tokens_p=0.1, apply_corrupt_tokens_p=0.4).disturbed(
        z, values, rng
    )
    other = (replaced != values).any(-1)  # 2000 8: one draw of 36 is the token's own
    touched = other.any(1)
    assert touched.float().mean().item() == pytest.approx(0.4 * 0.88, abs=0.04)
    assert other.float().mean().item() == pytest.approx(0.4 * 0.3 * 35 / 36, abs=0.02)
    ids = levels.ids(replaced)[other]
    assert torch.equal(levels.vectors(levels.ids(replaced)), replaced.detach())
    assert torch.bincount(ids, minlength=36).min() > 0.5 * len(ids) / 36
    both = model.disturbed(z, values, rng)
    assert torch.equal(both[other], replaced[other])
    assert (both[~other] != dropped[~other]).any(-1).float().mean() < 0.01  # replaced by what it was
    part = model.disturbed(z[5:9], values[5:9], rng[5:9])
    assert torch.equal(part, both[5:9])


def test_what_disturbs_the_quantiser_is_for_training_alone() -> None:
    plain, model = tiny(), tiny(drop_quant_p=1.0, corrupt_tokens_p=1.0, apply_corrupt_tokens_p=1.0)
    model.load_state_dict(plain.state_dict())
    images, rng = some_images(model, 4), Rng.from_seed(0, 4)
    assert torch.equal(model.eval().encode(images), plain.eval().encode(images))
    assert torch.equal(model(images, rng)["loss"], plain(images, rng)["loss"])
    assert not torch.equal(model.train()(images, rng)["loss"], plain.train()(images, rng)["loss"])
    for wrong in ({"drop_quant_p": -0.1}, {"corrupt_tokens_p": 2}, {"min_corrupt_tokens_p": 3}):
        with pytest.raises(ValueError, match="is a share"):
            tiny(**wrong)


def test_hidden_patches_are_those_after_a_block_and_cost_nothing_else() -> None:
    model = tiny().train()
    images, rng = some_images(model, 3), Rng.from_seed(0, 3)
    plain = model(images, rng)
    seen: list[Tensor] = []
    block = model.decoder.module_dict["dec_transformer"].blocks[1]
    handle = block.register_forward_hook(lambda module, args, out: seen.append(out))
    told = model(images, rng, hidden_layer=1)
    handle.remove()
    hidden = told.pop("hidden")
    assert plain.keys() == told.keys() and torch.equal(plain["loss"], told["loss"])
    assert hidden.shape == (3, 16, 4, 4) and torch.equal(hidden.flatten(2).transpose(1, 2), seen[0][:, :16])
    assert not torch.equal(hidden, model(images, rng, hidden_layer=0)["hidden"])


def test_mup_keeps_the_scale_of_every_layer_over_widths() -> None:
    """From one width to four times as much: inputs stay, hidden weights fall as the root of it, ends are zero."""
    torch.manual_seed(0)
    found = {}
    for width in (64, 256):
        model = FlexTok(**{**model_entry("flextok_fashion").tiny, "encoder_width": width, "decoder_width": width})
        model.init_weights_mup(64)
        found[width] = {k: p for k, p in model.named_parameters() if p.requires_grad}
    for name, first in found[64].items():
        small, large = first.std().item(), found[256][name].std().item()
        if any(n in name for n in ("adaLN", "to_patches", "to_latents")) or name.endswith("bias"):
            assert small == large == 0
        elif name.endswith(("registers", "posembs", "token", "nullcond")):
            assert large == pytest.approx(0.02, rel=0.2)
        else:
            fixed = any(n in name for n in ("patch_proj", "from_latents", "time_embedder.mlp.0"))
            assert large == pytest.approx(small / (1 if fixed else 2), rel=0.1), name
            if first.shape[0] == first.shape[1]:
                assert small == pytest.approx(64**-0.5, rel=0.1)  # Xavier of a square layer


# ---- released files -------------------------------------------------------------------------------------------


def official_file(folder: Path, config: dict[str, Any], beside: bool) -> tuple[Path, FlexTok]:
    """A small file laid out as the released ones, its configuration in the metadata or in config.json."""
    vae = {k: v for k, v in TINY_VAE.items() if k not in ("image_size", "norm_num_groups")}
    sizes = dict.fromkeys(("encoder_width", "decoder_width", "encoder_head_dim", "decoder_head_dim"), 64)
    sizes |= {"encoder_depth": 1, "decoder_depth": 2}
    vae |= {"image_size": 16, "norm_num_groups": 32, "block_out_channels": (32, 32)}
    model = tiny(**sizes, vae_config=vae, levels=(8, 8, 8, 5, 5, 5))
    path = folder / "model.safetensors"
    text = {k: repr(v) for k, v in config.items()}
    save_file(to_official(model), path, None if beside else text)
    if beside:
        (folder / "config.json").write_text(json.dumps(config))
    return path, model


def small_config() -> dict[str, Any]:
    config = json.loads(json.dumps(OFFICIAL))
    for part, module, depth in (("encoder", "enc_transformer", 1), ("decoder", "dec_transformer", 2)):
        config[part]["module_dict"][module] |= {"dim": 64, "depth": depth, "head_dim": 32}
    config["encoder"]["module_dict"]["enc_register_module"]["n_max"] = 8
    config["decoder"]["module_dict"]["dec_time_embedder"]["max_timestep"] = 1000.0
    config["vae"] |= {"scaling_factor": 0.7, "sample_posterior": True}
    return config


@pytest.mark.parametrize("beside", [False, True])
def test_what_shapes_cannot_say_is_read_from_the_configuration(beside: bool, tmp_path: Path) -> None:
    path, model = official_file(tmp_path, small_config(), beside)
    convert(path, tmp_path / "folder")
    opened = FlexTok.from_pretrained(tmp_path / "folder")
    assert opened.config.encoder_head_dim == 32 and opened.config.max_timestep == 1000
    assert opened.vae.config.scaling_factor == 0.7 and opened.config.sample_posterior
    assert opened.vae.config.block_out_channels == [32, 32] and opened.image_size == (16, 16)
    assert all(torch.equal(v, opened.state_dict()[k]) for k, v in model.state_dict().items())
    write_official(opened, tmp_path / "back.safetensors")
    assert to_official(load_official(tmp_path / "back.safetensors")).keys() == to_official(model).keys()
    assert "licence" in (tmp_path / "folder" / "README.md").read_text().lower()


def test_configurations_that_ask_for_anything_else_are_refused(tmp_path: Path) -> None:
    for target in ("os.system", "builtins.FSQ", "flextok.evil.Runner"):
        config = small_config()
        config["regularizer"]["_target_"] = target
        with pytest.raises(ValueError, match=f"asks for '{target}'"):
            keys.flextok_arguments(config)
    config = small_config()
    config["encoder"]["module_dict"]["enc_seq_packer"]["mask_mode"] = "full"
    with pytest.raises(ValueError, match="mask_mode is 'full'; varkit has 'causal_last' only"):
        keys.flextok_arguments(config)
    with pytest.raises(ValueError, match="not a plain Python literal"):
        keys.parse_settings({"encoder": "{'a': __import__('os').getcwd()}"})
    (tmp_path / "a").mkdir()
    path, _ = official_file(tmp_path / "a", {"encoder": {}, "decoder": {}, "regularizer": {}, "vae": {}}, False)
    with pytest.raises(ValueError, match="not laid out as a FlexTok's"):
        load_official(path)


@pytest.mark.parametrize("name", ["d12_d12_in1k", "d18_d18_in1k", "d18_d28_in1k", "d18_d28_dfn"])
def test_released_configurations_are_the_registered_models(name: str) -> None:
    meta = json.loads((Path(__file__).parent / "checkpoints" / f"flextok_{name}.json").read_text())
    told = keys.flextok_arguments(meta["constructor"])
    with torch.device("meta"):
        built = create_model("flextok_" + name.rpartition("_")[0])
    assert {k: built.config[k] if k != "levels" else tuple(built.config[k]) for k in told} == told


# ---- stopping early -------------------------------------------------------------------------------------------


def test_generation_may_stop_at_any_length() -> None:
    entry = model_entry("flextok_ar_fashion")
    torch.manual_seed(0)
    model = liven(entry.build(**entry.tiny), 0.2)
    tokenizer = liven(create_model("flextok_fashion", **entry.tiny_tokenizer), 0.05)
    pipe = ClassToImagePipeline(model, tokenizer, NextGroupSampler())
    pipe.set_progress_bar_config(disable=True)
    whole = pipe([0, 1], seed=0, output_type="latent").images
    for n in (1, 4, 6):
        assert torch.equal(pipe([0, 1], seed=0, num_tokens=n, output_type="latent").images, whole[:, :n])
        out = pipe([0, 1], seed=0, num_tokens=n, output_type="pt")
        assert out.images.shape == (2, 3, *tokenizer.image_size) and out.stats["steps"] == n
    for n in (0, 7):
        with pytest.raises(ValueError, match="can stop after 1 to 6 tokens"):
            pipe([0], seed=0, num_tokens=n)
    with pytest.raises(ValueError, match="can stop after 1, 5, 21 tokens"):
        entry = model_entry("var_fashion")
        var = ClassToImagePipeline(
            entry.build(**entry.tiny), create_model(entry.tokenizer or "", **entry.tiny_tokenizer), NextGroupSampler()
        )
        var([0], num_tokens=4)


def test_the_command_stops_early_too(tmp_path: Path) -> None:
    arguments = ["sample", "fashion-var", "--class", "3", "--device", "cpu", "--out", str(tmp_path / "grid.png")]
    assert CliRunner().invoke(app, [*arguments, "--tokens", "5"]).exit_code == 0
    assert (tmp_path / "grid.png").is_file()
    refused = CliRunner().invoke(app, [*arguments, "--tokens", "4"])
    assert refused.exit_code == 2 and "can stop after 1, 5, 14" in refused.output


# ---- training -------------------------------------------------------------------------------------------------


def test_the_autoencoder_learns_and_measures_its_latents(tmp_path: Path) -> None:
    config = objective_config(
        {"name": "kl-vae", "model_overrides": dict(TINY_VAE), "adversarial_weight": 0, "perceptual_weight": 0}
    )
    torch.manual_seed(0)
    objective = build_objective(config, [])
    with np.load(Path(__file__).parent / "data" / "fashion_slice.npz") as file:
        grey = torch.from_numpy(file[file.files[0]][:16]).float().view(16, 1, 28, 28)
    images = F.interpolate(grey, 16).expand(-1, 3, -1, -1) / 127.5 - 1
    optimizer = torch.optim.Adam(objective.parameters(), 3e-3)
    losses = []
    for step in range(25):
        out = objective({"images": images}, "main", step, 25, Rng.from_seed(step, 16))
        optimizer.zero_grad()
        out["loss"].backward()
        optimizer.step()
        objective.after_step(step, Rng.from_seed(0, 1))
        losses.append(out["loss"].item())
    assert losses[-1] < 0.7 * losses[0] and float(out["kl"]) > 0
    assert objective.pictures({"images": images}, Rng.from_seed(0, 16)).shape == (32, 3, 16, 16)
    objective.export(tmp_path / "vae")
    vae = KLVAE.from_pretrained(tmp_path / "vae")
    assert vae.config.scaling_factor == pytest.approx(float(objective.variance) ** -0.5)
    assert vae.encode(images, Rng.from_seed(0, 16)).std().item() == pytest.approx(1, abs=0.4)

    flextok = {k: v for k, v in model_entry("flextok_fashion").tiny.items() if k != "vae_config"}
    config = objective_config(
        {"name": "flextok", "model": "flextok_fashion", "model_overrides": flextok, "vae": str(tmp_path / "vae")}
    )
    second = build_objective(config, [])
    assert all(torch.equal(v, second.tokenizer.vae.state_dict()[k]) for k, v in vae.state_dict().items())
    loss = second({"images": images}, "main", 0, 10, Rng.from_seed(0, 16))["loss"]
    assert loss.requires_grad
    shown = second.pictures({"images": images}, Rng.from_seed(0, 16))
    assert shown.shape == (8 * 5, 3, 16, 16)  # the originals, and 1, 2, 4 and 8 tokens
    assert {"psnr_1", "psnr_4", "psnr_8"} <= second.validate({"images": images}, Rng.from_seed(0, 16)).keys()
    second.export(tmp_path / "flextok")
    again = build_objective(objective_config({"name": "flextok", "init_from": str(tmp_path / "flextok")}), [])
    assert {k: p.requires_grad for k, p in again.named_parameters()} == {
        k: p.requires_grad for k, p in second.named_parameters()
    }


REPA = {"encoder": "test_vit.r160_in1k", "weights": "none", "size": 48}


@pytest.fixture(scope="module", name="vae")
def _vae(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("vae")
    liven(KLVAE(**TINY_VAE), 0.05).save_pretrained(folder)
    return str(folder)


def flextok_objective(vae: str, **more: Any) -> Any:
    sizes = {k: v for k, v in model_entry("flextok_fashion").tiny.items() if k != "vae_config"}
    torch.manual_seed(0)
    section = {"name": "flextok", "model": "flextok_fashion", "model_overrides": sizes, "vae": vae, **more}
    return build_objective(objective_config(section), []).train()


def test_repa_adds_a_loss_that_reaches_the_early_decoder_and_falls(vae: str) -> None:
    plain, aligned = flextok_objective(vae), flextok_objective(vae, repa={**REPA, "layer": 0, "weight": 0.5})
    assert all(torch.equal(p, dict(aligned.named_parameters())[k]) for k, p in plain.named_parameters())
    images, rng = some_images(plain.tokenizer, 8), Rng.from_seed(0, 8)
    first, second = (o({"images": images}, "main", 0, 10, rng) for o in (plain, aligned))
    torch.testing.assert_close(second["loss"], first["loss"] + 0.5 * second["repa"])
    assert aligned.validate({"images": images}, rng).keys() == plain.validate({"images": images}, rng).keys()
    grid = aligned.frozen("encoder").maps(images)
    assert grid.shape == (8, 64, 3, 3)  # 48 pixels in patches of 16; the decoder has 4x4
    network = aligned.trained("main")
    assert {id(p) for p in network.parameters()} > {id(p) for p in aligned.tokenizer.parameters()}
    assert not any("encoder.model" in k for k in aligned.state_dict())
    second["repa"].backward()
    blocks = aligned.tokenizer.decoder.module_dict["dec_transformer"].blocks
    reached = [any(p.grad is not None and bool(p.grad.any()) for p in block.parameters()) for block in blocks]
    assert reached == [True, False]
    optimizer = torch.optim.Adam([p for p in network.parameters() if p.requires_grad], 3e-3)
    values = []
    for _ in range(25):
        losses = aligned({"images": images}, "main", 0, 10, rng)
        optimizer.zero_grad()
        losses["loss"].backward()
        optimizer.step()
        values.append(float(losses["repa"].detach()))
    assert values[-1] < 0.8 * values[0]


def test_repa_runs_resumes_and_exports_the_tokenizer_alone(
    vae: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes = {k: v for k, v in model_entry("flextok_fashion").tiny.items() if k != "vae_config"}
    section = {"name": "flextok", "model": "flextok_fashion", "model_overrides": sizes, "vae": vae, "repa": REPA}
    quick = ("loop.steps=6", "loop.sample_every=0", "loop.validate_every=0", "loop.save_every=0", "loop.ema_decay=0.5")
    whole = recipe(tmp_path / "whole", section, *quick)
    train(whole)
    parted = replace(whole, out=str(tmp_path / "parted"))
    with monkeypatch.context() as patch:
        signal_at(patch, 3, 15)
        assert not train(parted).finished
    assert train(parted, resume=True).finished
    first, second = weights(whole.folder, 6), weights(parted.folder, 6)
    assert first.keys() == second.keys() and all(torch.equal(v, second[k]) for k, v in first.items())
    assert any(k.startswith("repa.projector") for k in first) and "repa" in lines(whole.folder)[0]
    assert not any("projector" in k for k in exported(whole.folder))
    assert FlexTok.from_pretrained(whole.folder / "model").layout.length == 8


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"repa": {**REPA, "layer": 2}}, r"repa.layer must be in 0 \.\. 1"),
        ({"repa": {**REPA, "layer": -1}}, "repa.layer must be at least 0"),
        ({"repa": {**REPA, "size": 50}}, "repa.size must be a multiple of 16"),
        ({"repa": {**REPA, "encoder": "test_vitt"}}, "repa.encoder must be a model of timm"),
        ({"repa": {**REPA, "weights": "absent"}}, "repa.weights must be pretrained, none or a file"),
        ({"init": "mup", "mup_base_width": 0}, "mup_base_width above 0"),
    ],
)
def test_what_cannot_be_is_refused_before_training(vae: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        flextok_objective(vae, **options)


def test_mup_is_an_option_of_a_new_flextok(vae: str) -> None:
    objective = flextok_objective(vae, init="mup", mup_base_width=16)
    assert not objective.tokenizer.encoder.module_dict["enc_to_latents"]["proj"].weight.any()
    assert objective.tokenizer.encoder.module_dict["enc_register_module"]["registers"].std() < 0.05
    assert all(
        v.isfinite() for v in objective.tokenizer(some_images(objective.tokenizer, 2), Rng.from_seed(0, 2)).values()
    )


def test_flextok_needs_one_autoencoder() -> None:
    for values in ({}, {"vae": "a", "init_from": "b"}):
        with pytest.raises(ConfigError, match="give vae"):
            objective_config({"name": "flextok", **values})


def test_an_objective_refuses_the_model_of_another() -> None:
    with pytest.raises(ConfigError, match="KL autoencoder"):
        build_objective(objective_config({"name": "kl-vae", "model": "multiscale_vq_fashion"}), [])
