"""TiTok, TA-TiTok, the MaskGIT VQGAN: layouts, losses, the text-aware decoder; and all their official files."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.test_models import liven, random_images, random_tokens, tiny
from varkit import AutoPipeline, MaskedSampler, NextGroupSampler, Rng
from varkit.checkpoints.convert import convert
from varkit.checkpoints.files import load_official, read_state_dict, to_official, write_official
from varkit.generators.maskgit import MaskGIT
from varkit.generators.rar import RAR
from varkit.tokenizers.maskgit_vqgan import MaskGitVQGAN
from varkit.tokenizers.titok import Quantizer, TiTok, text_features

LEGACY: dict[str, Any] = {
    "num_tokens": 6,
    "codebook_size": 24,
    "latent_dim": 12,
    "resolution": 16,
    "patch": 4,
    "encoder_size": (64, 1, 1),
    "decoder_size": (64, 1, 1),
    "normalize_codes": True,
    "legacy": True,
    "proxy_codes": 12,
    "proxy_dim": 8,
    "proxy_channels": 32,
    "proxy_multipliers": (1, 2, 1),
    "proxy_blocks": 1,
}


def test_the_legacy_layout_scrambles_channels_and_tokens() -> None:
    """Without a transpose every channel of a token's vector mixes several tokens' outputs."""
    models = [tiny("titok_l32"), tiny("titok_bl64_vq8k")]
    for model, scrambled in zip(models, (True, False), strict=True):
        x = torch.randn(1, 6, 32)
        seen: list[torch.Tensor] = []
        hook = model.encoder.conv_out.register_forward_pre_hook(lambda _, given, seen=seen: seen.append(given[0]))
        model.encoder.ln_post.register_forward_hook(lambda *_, x=x: x)
        model.features(random_images(model, 1))
        hook.remove()
        assert torch.equal(seen[0][0, :, :, 0], x.reshape(32, 6) if scrambled else x[0].T)


def test_a_vqgan_block_that_changes_width_forgets_its_input() -> None:
    model = tiny("maskgit_vqgan_f16")
    block = model.encoder.down[1].block[0]
    assert block.nin_shortcut.weight.shape[:2] == (64, 64)
    x = torch.randn(1, 32, 4, 4)
    inner = block.conv2(torch.nn.functional.silu(block.norm2(block.conv1(torch.nn.functional.silu(block.norm1(x))))))
    torch.testing.assert_close(block(x), inner + block.nin_shortcut(inner))


@pytest.mark.parametrize("normalize", [False, True])
def test_the_quantiser_takes_the_nearest_and_passes_gradients_through(normalize: bool) -> None:
    torch.manual_seed(0)
    quantizer = Quantizer(16, 3, 0.25, normalize, clustering=False)
    quantizer.embedding.weight.data.normal_()
    z = torch.randn(2, 5, 3, requires_grad=True)
    out = quantizer(z)
    unit = torch.nn.functional.normalize(z, dim=-1) if normalize else z
    assert torch.equal(out.ids, torch.cdist(unit, quantizer.codebook.expand(2, -1, -1)).argmin(-1))
    torch.testing.assert_close(out.vectors, quantizer.codebook[out.ids])
    torch.testing.assert_close(out.codebook_loss, (unit - out.vectors).square().mean())
    torch.testing.assert_close(out.commitment_loss, 0.25 * out.codebook_loss)
    (out.vectors.sum() + out.loss).backward()
    assert z.grad.abs().min() > 0 and quantizer.embedding.weight.grad.abs().sum() > 0


def test_clustering_moves_unused_codes_and_leaves_used_ones() -> None:
    torch.manual_seed(0)
    quantizer = Quantizer(8, 2, 0.25, normalize=False, clustering=True)
    codes = torch.cat([torch.zeros(1, 2), torch.full((7, 2), 50.0) + torch.arange(7.0)[:, None]])
    quantizer.embedding.weight.data.copy_(codes)
    z = 0.1 * torch.randn(1, 64, 2)
    quantizer.eval()(z)
    assert torch.equal(quantizer.embedding.weight.data, codes) and not quantizer.embed_prob.any()
    quantizer.train()(z)
    moved = (quantizer.embedding.weight.data - codes).norm(dim=1)
    assert moved[0] < 1e-3 and (moved[1:] > 60).all()  # the used one stays, the dead ones lie among the features
    torch.testing.assert_close(quantizer.embed_prob, torch.tensor([0.01] + [0.0] * 7))
    assert len(quantizer(z).ids.unique()) > 1


def test_a_training_step_reaches_all_that_is_trained_in_its_stage() -> None:
    images = random_images(tiny("titok_l32"), 2)
    for name, frozen in (
        ("titok_l32", False),
        ("titok_l32", True),
        ("titok_bl64_vq8k", False),
        ("tatitok_bl64_vae", False),
    ):
        model = tiny(name).train()
        text = torch.randn(2, 5, 6) if model.config.text_length else None
        out = model(images, Rng.from_seed(0, 2), text=text, frozen=frozen)
        loss = out.images.square().mean()
        loss = loss + (out.code.kl().mean() if model.layout.codebook_size is None else out.code.loss)
        if out.proxy_logits is not None and not frozen:
            loss = loss + out.proxy_logits.square().mean()
        loss.backward()
        without = {k.split(".")[0] for k, p in model.named_parameters() if p.grad is None or not p.grad.any()}
        assert without == ({"encoder", "latent_tokens", "quantize"} if frozen else set()), name
        if frozen:
            assert out.code.loss == 0


def test_latents_of_a_kl_model_are_drawn_for_each_image() -> None:
    model = tiny("titok_bl64_vae_c16")
    images, rng = random_images(model, 3), Rng.from_seed(0, 3)
    posterior = model.posterior(images)
    drawn = model.encode(images, rng)
    assert torch.equal(model.encode(images), posterior.mean) and not torch.equal(drawn, posterior.mean)
    torch.testing.assert_close(model.encode(images[1:2], rng[1:2]), drawn[1:2], atol=1e-4, rtol=1e-4)
    expected = torch.distributions.kl_divergence(
        torch.distributions.Normal(posterior.mean, (posterior.logvar / 2).exp()),
        torch.distributions.Normal(torch.zeros(()), torch.ones(())),
    ).sum(-1)
    torch.testing.assert_close(posterior.kl(), expected)


def test_a_caption_changes_the_image_and_must_fit() -> None:
    model, plain = tiny("tatitok_bl32_vq"), tiny("titok_bl64_vq8k")
    tokens, text = random_tokens(model, 2), torch.randn(2, 5, 6)
    assert not torch.equal(model.decode(tokens, text=text), model.decode(tokens, text=text.flip(0)))
    assert torch.equal(model.decode(tokens), model.decode(tokens, text=torch.zeros(2, 5, 6)))
    with pytest.raises(ValueError, match=r"\(2, 4, 6\) were given; this decoder reads of shape \(2, 5, 6\)"):
        model.decode(tokens, text=text[:, :4])
    with pytest.raises(ValueError, match="reads none: it is not text-aware"):
        plain.decode(tokens, text=text)


def test_text_features_are_those_of_all_tokens_with_zeros_behind_the_end(tmp_path: Path) -> None:
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

    words = ["<|startoftext|>", "<|endoftext|>", "!", "a</w>", "c", "a", "t</w>", "ca", "cat</w>"]
    (tmp_path / "vocab.json").write_text(json.dumps({w: i for i, w in enumerate(words)}))
    (tmp_path / "merges.txt").write_text("#version: 0.2\nc a\nca t</w>\n")
    CLIPTokenizer(str(tmp_path / "vocab.json"), str(tmp_path / "merges.txt")).save_pretrained(tmp_path)
    config = CLIPTextConfig(
        vocab_size=len(words),
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=7,
        eos_token_id=1,
        bos_token_id=0,
        pad_token_id=1,
    )
    model = CLIPTextModel(config).eval()
    model.save_pretrained(tmp_path)
    features = text_features(["a cat", "a"], str(tmp_path))
    assert features.shape == (2, 7, 16)
    a, cat = words.index("a</w>"), words.index("cat</w>")
    ids = torch.tensor([[0, a, cat, 1, 0, 0, 0], [0, a, 1, 0, 0, 0, 0]])
    with torch.no_grad():
        torch.testing.assert_close(features, model(ids).last_hidden_state)


def test_a_text_encoder_that_is_not_there_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match=f"{tmp_path.name}.* cannot be opened by transformers"):
        text_features(["x"], str(tmp_path))
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(ImportError, match="pip install transformers"):
        text_features(["x"])


def test_impossible_sizes_are_refused() -> None:
    for settings, message in (
        ({"resolution": 30}, "multiple of patch"),
        ({"encoder_size": (30, 1, 4)}, "multiple of its 4 heads"),
        ({"image_channels": 2}, "1 .grey. or 3"),
        ({"legacy": True, "patch": 8}, "2 \\*\\* .levels - 1. pixels"),
        ({"legacy": True, "codebook_size": None}, "codebook_size None"),
    ):
        with pytest.raises(ValueError, match=message):
            TiTok(**settings)
    with pytest.raises(ValueError, match="got 3 tokens; an image has 6"):
        tiny("titok_fashion").decode(torch.zeros(1, 3, dtype=torch.int64))
    for settings, message in (({"base_channels": 20}, "multiple of 32"), ({"grid": (4,)}, r"grid must be \(h, w\)")):
        with pytest.raises(ValueError, match=message):
            MaskGitVQGAN(**settings)


# ---- official files -------------------------------------------------------------------------------------------


def masked_and_its_tokenizer(backbone: str) -> tuple[Any, Any]:
    torch.manual_seed(0)
    sizes = {"num_classes": 3, "depth": 2, "hidden_size": 32, "mlp_hidden": 48, "grid": (6,), "codebook_size": 24}
    return liven(MaskGIT(backbone, **sizes)), liven(TiTok(**LEGACY), 0.05)


def rar_and_its_tokenizer() -> tuple[Any, Any]:
    torch.manual_seed(0)
    sizes = {"num_classes": 3, "depth": 2, "hidden_size": 32, "num_heads": 4, "mlp_hidden": 48, "grid": (4, 4)}
    model = RAR(**sizes, codebook_size=24, latent_dim=256)
    return liven(model), liven(MaskGitVQGAN(24, 256, 32, (1, 1, 2), 1, grid=(4, 4)), 0.05)


@pytest.mark.parametrize("pair", ["vit", "uvit", "rar"])
def test_official_files_become_a_pipeline_and_files_again(pair: str, tmp_path: Path) -> None:
    model, tokenizer = rar_and_its_tokenizer() if pair == "rar" else masked_and_its_tokenizer(pair)
    write_official(model, tmp_path / "generator.pth")
    write_official(tokenizer, tmp_path / "tokenizer.pth")
    convert(tmp_path / "generator.pth", tmp_path / "pipe", tokenizer=tmp_path / "tokenizer.pth")
    assert "apache-2.0" in (tmp_path / "pipe" / "README.md").read_text()
    pipe = AutoPipeline.from_pretrained(tmp_path / "pipe")
    pipe.set_progress_bar_config(disable=True)
    assert type(pipe.sampler) is (NextGroupSampler if pair == "rar" else MaskedSampler)
    if pair != "rar":
        assert pipe.sampler.config.guidance_scale == 5.5 and pipe.sampler.config.softmax_annealing
    assert pipe([0, 1], seed=0, output_type="np").images.std() > 0
    for part, official in (("transformer", model), ("image_tokenizer", tokenizer)):
        convert(tmp_path / "pipe", tmp_path / f"{part}.pth", part=part)
        again, before = read_state_dict(tmp_path / f"{part}.pth"), to_official(official)
        assert again.keys() == before.keys() and all(torch.equal(again[k], before[k]) for k in before)


@pytest.mark.parametrize("name", ["titok_bl64_vq8k", "titok_bl64_vae_c16", "tatitok_bl32_vae", "titok_fashion"])
def test_official_tokenizer_files_are_read_from_their_shapes(name: str, tmp_path: Path) -> None:
    model = tiny(name)
    model = liven(TiTok(**{**model.config, "encoder_size": (64, 2, 1), "decoder_size": (64, 1, 1)}), 0.05)
    write_official(model, tmp_path / "file.pth")
    again = load_official(tmp_path / "file.pth")
    tokens = random_tokens(model, 2)
    assert torch.equal(again.decode(tokens), model.decode(tokens)) and again.layout == model.layout


def test_a_position_buffer_of_old_files_is_ignored_and_a_surprise_is_not(tmp_path: Path) -> None:
    model, _ = masked_and_its_tokenizer("vit")
    state = to_official(model)
    assert "model.encoder.layer.1.attention.self.key.bias" in state
    torch.save({**state, "model.embeddings.position_ids": torch.arange(7)[None]}, tmp_path / "old.bin")
    tokens = random_tokens(model, 2)
    labels = torch.tensor([0, 2])
    assert torch.equal(load_official(tmp_path / "old.bin")(tokens, labels), model(tokens, labels))
    for key in ("surprise", "model.encoder.layer.0.attention.extra.weight"):
        torch.save({**state, key: torch.zeros(1)}, tmp_path / "odd.bin")
        with pytest.raises(ValueError, match=f"not in the model: {key}"):
            load_official(tmp_path / "odd.bin")
