"""LlamaGen: tokenizer, transformer and files, beyond what the suite of registered models asks."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from tests.test_models import classes, liven, random_images, random_tokens, tiny
from varkit import VQGAN, AutoPipeline, LlamaGen, NextGroupSampler, Rng, TextToImagePipeline, create_model
from varkit.checkpoints.convert import convert
from varkit.checkpoints.files import build_official, load_official, read_state_dict, to_official, write_official
from varkit.generators.llamagen import SIZES
from varkit.interfaces import Cond
from varkit.layers.llama import Rotary, feed_forward_size
from varkit.samplers.guidance import guidance_interval
from varkit.tokenizers.vqgan import TINY, USAGE_WINDOW, VectorQuantizer, entropy_loss


def small(**changes: Any) -> LlamaGen:
    torch.manual_seed(0)
    sizes = {"num_classes": 3, "depth": 2, "hidden_size": 32, "num_heads": 4, "grid": (3, 4), "codebook_size": 24}
    return liven(LlamaGen(**{**sizes, "latent_dim": 4, **changes}))


def stepwise(model: LlamaGen, tokens: torch.Tensor, cond: Cond, group: int = 1) -> torch.Tensor:
    inputs = F.pad(tokens[:, :-1], (1, 0))
    state, logits = model.start(cond), []
    for positions in torch.arange(model.layout.length).split(group):
        logits.append(model.predict(state, inputs[:, positions], positions).logits)
        model.append(state, tokens[:, positions], positions)
    return torch.cat(logits, 1)


# ---- transformer --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("text", [False, True])
@pytest.mark.parametrize("kv_heads", [None, 2, 1])
def test_grouped_heads_decode_as_they_train(kv_heads: int | None, text: bool) -> None:
    more = {"num_classes": None, "text_length": 5, "text_dim": 12} if text else {}
    model = small(kv_heads=kv_heads, **more)
    tokens, cond = random_tokens(model, 3), classes(model, 3)
    with torch.no_grad():
        expected = model.teacher_forced(F.pad(tokens[:, :-1], (1, 0)), cond).logits
        for group in (1, 5):  # also several positions at once
            torch.testing.assert_close(stepwise(model, tokens, cond, group), expected, atol=1e-4, rtol=1e-4)
    cache = model.start(cond).cache
    assert cache.keys[0].shape[1] == (kv_heads or 4)
    assert cache.keys[0].shape[2] == model.prefix_length + model.layout.length - 1


def test_decoding_grows_no_cache() -> None:
    model = small()
    state = model.start(classes(model, 2))
    places = state.cache.keys[0].data_ptr(), state.cache.values[0].data_ptr()
    tokens = random_tokens(model, 2)
    for positions in model.schedule():
        model.predict(state, tokens[:, positions], positions)
        model.append(state, tokens[:, positions], positions)
    assert (state.cache.keys[0].data_ptr(), state.cache.values[0].data_ptr()) == places
    assert state.cache.length == state.cache.keys[0].shape[2]


def test_rotation_depends_on_distance_alone_and_silences_the_prefix() -> None:
    rotary = Rotary((4, 6), 16, prefix=3)
    q, k = torch.randn(2, 16)
    both = rotary(torch.stack([q, k]).expand(1, 27, 2, 16))[0]
    assert not both[:3].any()  # zero vectors, not unrotated ones
    at = both[3:].view(4, 6, 2, 16)
    products = torch.stack([(at[r, c, 0] * at[r + 1, c + 2, 1]).sum() for r in range(3) for c in range(4)])
    torch.testing.assert_close(products, products[:1].expand(12), atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(at[0, 0], torch.stack([q, k]))
    torch.testing.assert_close(at.norm(dim=-1)[2, 5], torch.stack([q, k]).norm(dim=-1))
    assert rotary.to(torch.bfloat16).cos.dtype == torch.float32


def test_a_caption_acts_through_its_values_alone_and_padding_not_at_all() -> None:
    model = small(num_classes=None, text_length=5, text_dim=12)
    tokens, cond = random_tokens(model, 4), classes(model, 4)
    inputs = F.pad(tokens[:, :-1], (1, 0))
    sequence, mask = cond.text
    noise = torch.where(mask[..., None], sequence, torch.randn(sequence.shape))
    with torch.no_grad():
        before = model.teacher_forced(inputs, cond).logits
        after = model.teacher_forced(inputs, Cond(sequence=noise, mask=mask)).logits
        torch.testing.assert_close(after, before, atol=1e-4, rtol=1e-4)
        other = model.teacher_forced(inputs, Cond(sequence=sequence.flip(0), mask=mask)).logits
    assert (other - before).abs().amax() > 1e-2
    with pytest.raises(ValueError, match=r"text features must be \(B, 5, 12\)"):
        model.start(Cond(sequence=sequence[:, 1:], mask=mask[:, 1:]))


def test_conditions_are_dropped_in_training_only_and_keep_their_masks() -> None:
    for more in ({}, {"num_classes": None, "text_length": 5, "text_dim": 12}):
        model = small(cond_drop_rate=0.5, **more)
        cond, null = classes(model, 64), model.null(classes(model, 64))
        dropped = model.drop_condition(cond, Rng.from_seed(0, 64))
        if cond.vector is None:
            changed = (dropped.text[0] != cond.text[0]).flatten(1).any(1)
            assert torch.equal(dropped.text[1], cond.text[1])
            assert torch.equal(dropped.text[0][changed], null.text[0][changed])
        else:
            changed = dropped.labels == model.num_classes
            assert torch.equal(dropped.labels[~changed], cond.labels[~changed])
        assert 20 < int(changed.sum()) < 44


def test_images_that_do_not_count_change_no_loss() -> None:
    model, valid = small().eval(), torch.tensor([1, 0, 1])
    tokens, rng = random_tokens(model, 3), Rng.from_seed(0, 3)
    inputs, cond = F.pad(tokens[:, :-1], (1, 0)), classes(model, 3)
    kept = valid.bool()
    expected = model.training_loss(tokens[kept], inputs[kept], cond[kept], rng)["loss"]
    torch.testing.assert_close(model.training_loss(tokens, inputs, cond, rng, valid=valid)["loss"], expected)
    assert model.training_loss(tokens, inputs, cond, rng, valid=torch.zeros(3))["loss"] == 0


def test_sizes_follow_the_releases_rule() -> None:
    widths = {"b": 2048, "l": 2816, "xl": 3584, "xxl": 4096, "xxxl": 6912, "1b": 5632, "3b": 8704, "7b": 11008}
    assert {name: feed_forward_size(SIZES[name][1]) for name in SIZES} == widths
    for heads, kv_heads in ((5, None), (4, 3)):
        with pytest.raises(ValueError, match="must be a multiple"):
            LlamaGen(hidden_size=32, num_heads=heads, kv_heads=kv_heads)
    with pytest.raises(ValueError, match="decides one token a step, 12 in all; got num_steps=3"):
        small().schedule(3)


# ---- guidance over an interval ------------------------------------------------------------------------------------


def test_outside_the_interval_the_condition_counts_alone() -> None:
    model = small()
    tokenizer = VQGAN(24, 4, 32, (1, 1), 1, 8, grid=(3, 4))
    cond, rng = classes(model, 3), Rng.from_seed(0, 3)
    seen: list[torch.Tensor] = []

    def run(**settings: Any) -> torch.Tensor:
        seen.clear()
        out = NextGroupSampler(guidance_schedule="constant").generate(
            tokenizer, model, cond, rng, null=model.null(cond), on_step=lambda i: seen.append(i.logits), **settings
        )
        return out.tokens

    plain, guided = run(guidance_scale=1.0), run(guidance_scale=3.0)
    assert torch.equal(run(guidance_scale=3.0, guidance_interval=(0, 99)), guided)
    assert torch.equal(run(guidance_scale=3.0, guidance_interval=(12, 99)), plain)
    part = run(guidance_scale=3.0, guidance_interval=(4, 6))
    assert torch.equal(part[:, :4], plain[:, :4])
    with torch.no_grad():
        expected = model.teacher_forced(F.pad(part[:, :-1], (1, 0)), cond).logits
    for step in range(12):
        differs = float((seen[step] - expected[:, step : step + 1]).abs().max())
        assert (differs > 1e-2) == (4 <= step <= 6), step
    assert guidance_interval([0, 5]) == (0, 5) and guidance_interval(None) is None
    for wrong in ((3, 2), (-1, 2), (1,), (0.0, 1.0)):
        with pytest.raises(ValueError, match="first and the last guided step"):
            NextGroupSampler(guidance_interval=wrong)


def test_mixtures_of_codes_are_refused_by_a_model_that_reads_ids() -> None:
    model, tokenizer = small(), VQGAN(24, 4, 32, (1, 1), 1, 8, grid=(3, 4))
    with pytest.raises(ValueError, match="more_smooth"):
        NextGroupSampler().generate(tokenizer, model, classes(model, 1), Rng.from_seed(0, 1), more_smooth=True)


# ---- tokenizer ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("normalize", [True, False])
def test_each_position_gets_the_nearest_code_and_gradients_pass_straight_through(normalize: bool) -> None:
    torch.manual_seed(0)
    quantizer = VectorQuantizer(16, 4, normalize_codes=normalize, entropy_weight=0.1).train()
    liven(quantizer).train()
    features = torch.randn(2, 4, 3, 5, requires_grad=True)
    out = quantizer(features)
    z = quantizer.positions(features)
    assert torch.equal(out.ids[0].flatten(), torch.cdist(z, quantizer.codes).argmin(-1))
    assert torch.equal(quantizer.nearest(z), out.ids[0].flatten())
    codes = quantizer.codes[out.ids[0]].transpose(1, 2).view(2, 4, 3, 5)
    torch.testing.assert_close(out.features, codes)
    torch.testing.assert_close(out.loss, out.codebook_loss + out.commitment_loss + out.entropy_loss)
    direction = torch.randn(2, 4, 3, 5)
    (through,) = torch.autograd.grad((out.features * direction).sum(), features, retain_graph=True)
    towards = F.normalize(features, dim=1) if normalize else features
    (expected,) = torch.autograd.grad((towards * direction).sum(), features)
    torch.testing.assert_close(through, expected)
    if normalize:
        torch.testing.assert_close(quantizer.codes.norm(dim=-1), torch.ones(16))


def test_usage_is_that_of_the_last_tokens() -> None:
    quantizer = VectorQuantizer(8, 4)
    assert quantizer.record_window(torch.tensor([3, 3, 5])).item() == 3 / 8  # 0 counts from the start, as released
    assert quantizer.codebook_used[-3:].tolist() == [3, 3, 5]
    assert quantizer.record_window(torch.full((USAGE_WINDOW + 7,), 2)).item() == 1 / 8


def test_the_entropy_term_rewards_sure_choices_and_all_codes() -> None:
    sure = 10 * torch.eye(4)
    assert entropy_loss(sure).item() == pytest.approx(-torch.tensor(4.0).log().item(), abs=1e-3)
    assert entropy_loss(sure[:1].expand(4, 4)).item() == pytest.approx(0, abs=1e-3)
    assert entropy_loss(torch.zeros(4, 4)).item() == pytest.approx(0, abs=1e-3)


def test_any_grid_square_or_not_and_refusals() -> None:
    model = tiny("vq_ds16")
    images = random_images(create_model("vq_ds16", **{**TINY, "grid": (3, 5)}), 2)
    ids = model.encode(images, grid=(3, 5))
    assert ids.shape == (2, 15) and model.decode(ids, grid=(3, 5)).shape == images.shape
    reconstruction, quantized = model(images)
    assert torch.equal(quantized.ids[0], ids) and reconstruction.shape == images.shape
    torch.testing.assert_close(model.decode(ids, grid=(3, 5)), reconstruction.clamp(-1, 1), atol=1e-4, rtol=1e-4)
    with pytest.raises(ValueError, match=r"images are 6x10 but the grid \(4, 4\) needs 8x8"):
        model.encode(images)
    with pytest.raises(ValueError, match="15 tokens do not fill the grid 4x4"):
        model.decode(ids)
    with pytest.raises(ValueError, match="multiple of 32"):
        VQGAN(base_channels=20)


# ---- files --------------------------------------------------------------------------------------------------------


def small_tokenizer() -> VQGAN:
    torch.manual_seed(1)
    return liven(VQGAN(24, 8, 32, (1,) * 5, 1, 8, grid=2), 0.05)


def same(first: torch.nn.Module, second: torch.nn.Module) -> bool:
    a, b = first.state_dict(), second.state_dict()
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


@pytest.mark.parametrize("text", [False, True])
def test_two_files_become_a_pipeline_and_files_again(text: bool, tmp_path: Path) -> None:
    more = {"num_classes": None, "text_length": 5, "text_dim": 12} if text else {}
    model, tokenizer = small(hidden_size=64, num_heads=1, grid=2, latent_dim=8, **more), small_tokenizer()
    write_official(model, tmp_path / "gpt.pth")
    state = read_state_dict(tmp_path / "gpt.pth")
    torch.save({"model": {**state, "freqs_cis": torch.zeros(5, 16, 2)}, "steps": 3}, tmp_path / "gpt.pt")
    write_official(tokenizer, tmp_path / "vq.pth")
    lines = convert(tmp_path / "gpt.pt", tmp_path / "pipe", tokenizer=tmp_path / "vq.pth", grid=2)
    assert ("--prompt" in lines[0]) == text
    pipe = AutoPipeline.from_pretrained(tmp_path / "pipe")
    assert isinstance(pipe, TextToImagePipeline) == text
    assert same(pipe.transformer, model) and same(pipe.image_tokenizer, tokenizer)
    settings = pipe.sampler.settings()
    assert (settings["guidance_scale"], settings["top_k"]) == ((7.5, 1000) if text else (4.0, 2000))
    convert(tmp_path / "pipe", tmp_path / "back.safetensors")
    again = read_state_dict(tmp_path / "back.safetensors")
    assert again.keys() == state.keys() and all(torch.equal(again[k], state[k]) for k in again)
    assert ("cls_embedding.uncond_embedding" in again) == text


def test_the_name_of_a_released_file_tells_the_size_of_its_images(tmp_path: Path) -> None:
    write_official(small(hidden_size=64, num_heads=1), tmp_path / "c2i_B_384.pt")
    (tmp_path / "c2i_B_384.pt").rename(tmp_path / "c2i_B_384.copy.pt")
    assert load_official(tmp_path / "c2i_B_384.copy.pt").layout.grids == ((16, 16),)
    (tmp_path / "c2i_B_384.copy.pt").rename(tmp_path / "c2i_B_384.pt")
    assert load_official(tmp_path / "c2i_B_384.pt").layout.grids == ((24, 24),)
    assert load_official(tmp_path / "c2i_B_384.pt", grid=(3, 4)).layout.grids == ((3, 4),)


def test_the_average_of_a_training_checkpoint_is_preferred_and_usage_survives(tmp_path: Path) -> None:
    model = small_tokenizer()
    model.quantize.codebook_used[-1] = 7.0
    state = to_official(model)
    assert "quantize.ema_vocab_hit_SV" not in state and state["quantize.codebook_used"][-1] == 7
    assert state["encoder.mid.1.q.weight"].shape == (32, 32, 1, 1)
    torch.save({"model": {k: v + 1 for k, v in state.items()}, "ema": state}, tmp_path / "vq.pt")
    again = load_official(tmp_path / "vq.pt", grid=2)
    images = random_images(model, 1)
    assert same(again, model) and torch.equal(again.decode(again.encode(images)), model.decode(model.encode(images)))


def test_one_key_more_or_less_is_named() -> None:
    state = to_official(small(hidden_size=64, num_heads=1))
    with pytest.raises(ValueError, match="not in the model: surprise"):
        build_official({**state, "surprise": torch.zeros(1)}, "file")
    with pytest.raises(ValueError, match=r"missing in the file: norm\.weight"):
        build_official({k: v for k, v in state.items() if k != "norm.weight"}, "file")


def test_the_configuration_says_everything(tmp_path: Path) -> None:
    model = small(kv_heads=2)
    model.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["grid"] == [3, 4]
    again = LlamaGen.from_pretrained(tmp_path)
    assert torch.equal(again.rotary.table, model.rotary.table) and same(again, model)
