"""ELM: bits and sub-codes, and the generators over them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from varkit import AutoPipeline, MaskedSampler, NextGroupSampler
from varkit.checkpoints.convert import convert
from varkit.checkpoints.files import load_official, to_official, write_official
from varkit.generators.elm import ELM, tiny_of
from varkit.generators.elm_masked import MASKED_SAMPLING, ELMMasked
from varkit.interfaces import Cond
from varkit.rng import Rng
from varkit.tokenizers.binary_autoencoder import TINY, BinaryAutoencoder, pack_bits, unpack_bits


def autoencoder(**changes: Any) -> BinaryAutoencoder:
    torch.manual_seed(0)
    return BinaryAutoencoder(**{**TINY, **changes}).eval()


def images(model: BinaryAutoencoder, batch: int) -> Tensor:
    return torch.rand(batch, 3, *model.image_size, generator=torch.Generator().manual_seed(1)) * 2 - 1


@pytest.mark.parametrize("sub_codes", [1, 2, 3])
def test_bits_and_numbers_are_each_others_inverse(sub_codes: int) -> None:
    ids = torch.cartesian_prod(*[torch.arange(2 ** (6 // sub_codes))] * sub_codes).view(-1, sub_codes)
    bits = unpack_bits(ids, 6)
    assert len(bits.unique(dim=0)) == 64  # every code is used once
    assert torch.equal(pack_bits(bits, sub_codes), ids)
    assert pack_bits(torch.tensor([0, 0, 1, 1, 0, 0]), 2).tolist() == [1, 4]  # the highest bit first


def test_bits_are_drawn_only_when_asked_and_with_their_probabilities() -> None:
    model, batch = autoencoder(), 64
    pictures, rng = images(model, 1).expand(batch, -1, -1, -1), Rng.from_seed(0, batch)
    with torch.no_grad():
        plain = model.encode(pictures)
        assert torch.equal(model.encode(pictures, rng), plain)
        drawn = model.encode(pictures, rng, stochastic=True)
        p = model.quantize.probability(model.features(pictures[:1]))[0].flatten(1).T  # L K
        assert torch.equal(model.encode(pictures[3:5], rng[3:5], stochastic=True), drawn[3:5])
    assert torch.equal(unpack_bits(plain[0], 6), (p > 0.5).float())
    share = unpack_bits(drawn, 6).mean(0)
    assert (share - p).abs().max() < 5 * (0.25 / batch) ** 0.5
    assert len(drawn.flatten(1).unique(dim=0)) == batch
    with pytest.raises(ValueError, match="pass rng="):
        model.encode(pictures, stochastic=True)


def test_gradients_go_straight_through_the_bits() -> None:
    model = autoencoder(code_weight=1.0)
    picture, quantized = model(images(model, 2), Rng.from_seed(0, 2))
    assert set(quantized.bits.unique().tolist()) <= {0.0, 1.0}
    (picture.mean() + quantized.loss).backward()
    gradient = model.encoder.blocks[0].weight.grad
    assert gradient is not None and gradient.abs().sum() > 0


@pytest.mark.parametrize("wrong", [{"sub_codes": 4}, {"latent_dim": 20}, {"threshold": 1.0}, {"image_channels": 2}])
def test_impossible_autoencoders_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(wrong))):
        autoencoder(**wrong)


def test_an_autoencoders_file_may_hold_the_networks_of_its_training(tmp_path: Path) -> None:
    model = autoencoder(channel_multipliers=(1, 1), grid=128)
    state = {f"ae.{k}": v for k, v in to_official(model).items()}
    torch.save({**state, "disc.0.weight": torch.zeros(1), "perceptual.x": torch.zeros(1)}, tmp_path / "all.th")
    write_official(model, tmp_path / "own.safetensors")
    for name in ("all.th", "own.safetensors"):
        again = load_official(tmp_path / name)
        assert isinstance(again, BinaryAutoencoder) and again.layout == model.layout
        assert all(torch.equal(v, again.state_dict()[k]) for k, v in model.state_dict().items())


def generator(kind: Any, sub_codes: int, **changes: Any) -> Any:
    torch.manual_seed(0)
    model = kind(**{**tiny_of(sub_codes)[0], **changes})
    for parameter in model.parameters():
        parameter.data += 0.2 * torch.randn(parameter.shape)
    return model.eval()


@pytest.mark.parametrize("sub_codes", [1, 2])
def test_the_masked_sampler_decides_every_sub_code(sub_codes: int) -> None:
    model, tokenizer = generator(ELMMasked, sub_codes, num_steps=4), autoencoder(sub_codes=sub_codes)
    cond, null, rng = Cond(torch.arange(3)), Cond(torch.full((3,), 3)), Rng.from_seed(0, 3)
    open_before: list[int] = []
    model.register_forward_pre_hook(lambda _, inputs: open_before.append(int((inputs[0][0] == model.mask_id).sum())))
    settings = {**MASKED_SAMPLING, "num_steps": 4, "guidance_scale": 2.0}
    tokens = MaskedSampler().generate(tokenizer, model, cond, rng, null=null, **settings).tokens
    assert tokens.shape == (3, 16, sub_codes) and tokens.min() >= 0 and tokens.max() < 2 ** (6 // sub_codes)
    assert open_before == [n * sub_codes for n in (16, 14, 11, 6)]  # floor(16 cos(pi k / 8))
    known = (tokens, torch.arange(16) < 5)
    again = MaskedSampler().generate(tokenizer, model, cond, Rng.from_seed(1, 3), null=null, known=known, **settings)
    assert torch.equal(again.tokens[:, :5], tokens[:, :5]) and not torch.equal(again.tokens, tokens)


def test_mixtures_of_factorised_codes_are_refused() -> None:
    with pytest.raises(ValueError, match="factorised"):
        NextGroupSampler().generate(
            autoencoder(), generator(ELM, 2), Cond(torch.arange(2)), Rng.from_seed(0, 2), more_smooth=True
        )


def test_a_masked_loss_is_of_masked_sub_codes_alone() -> None:
    model = generator(ELMMasked, 2)
    tokens = torch.randint(8, (2, 16, 2), generator=torch.Generator().manual_seed(0))
    mask = torch.arange(16).expand(2, -1) < 5
    labels = torch.tensor([0, 1])
    with torch.no_grad():
        loss = model.masked_loss(tokens, mask, labels, label_smoothing=0.0)["loss"]
        logits = model(tokens.masked_fill(mask[..., None], model.mask_id), labels)
    expected = -logits.log_softmax(-1).gather(-1, tokens[..., None])[:, :5].mean()
    torch.testing.assert_close(loss, expected)


def test_tokens_are_weighed_and_hidden_states_come_back() -> None:
    model = generator(ELM, 2)
    tokens = torch.randint(8, (2, 16, 2), generator=torch.Generator().manual_seed(0))
    inputs, cond, rng = autoencoder().embed(tokens), Cond(torch.tensor([0, 1])), Rng.from_seed(0, 2)
    weight = (torch.arange(16) < 3).float().expand(2, -1)
    losses = model.training_loss(tokens, inputs, cond, rng, weight=weight, hidden_layer=1)
    each = -model(inputs, cond.labels).log_softmax(-1).gather(-1, tokens[..., None])[..., 0].mean(-1)  # B L
    torch.testing.assert_close(losses["loss"], each[:, :3].sum(1).mean())
    seen: list[Tensor] = []
    model.layers[0].register_forward_hook(lambda _, __, out: seen.append(out))
    model(inputs, cond.labels)
    assert torch.equal(losses["hidden"], seen[0]) and losses["hidden"].shape == (2, 16, 32)
    assert "hidden" not in model.training_loss(tokens, inputs, cond, rng)


@pytest.mark.parametrize("kind", [ELM, ELMMasked])
@pytest.mark.parametrize("sub_codes", [1, 2])
def test_generators_written_and_read_again_are_the_same(kind: Any, sub_codes: int, tmp_path: Path) -> None:
    model = generator(kind, sub_codes, hidden_size=64, num_heads=1, grid=16)
    write_official(model, tmp_path / "file.pth")
    again = load_official(tmp_path / "file.pth", latent_dim=32)
    assert type(again) is kind and again.layout == model.layout
    assert all(torch.equal(v, again.state_dict()[k]) for k, v in model.state_dict().items())


def test_a_masked_file_without_the_heads_that_are_not_read_loads(tmp_path: Path) -> None:
    model = generator(ELMMasked, 1, hidden_size=64, num_heads=1, grid=16)
    torch.save({k: v for k, v in to_official(model).items() if k != "output.weight"}, tmp_path / "file.pth")
    again = load_official(tmp_path / "file.pth", latent_dim=32)
    ids, labels = torch.zeros(1, 256, 1, dtype=torch.int64), torch.tensor([0])
    assert torch.equal(again(ids, labels), model(ids, labels))


def test_two_released_files_become_a_pipeline(tmp_path: Path) -> None:
    """The generator says into how many sub-codes the tokenizer's bits are cut."""
    model = generator(ELM, 1, hidden_size=64, num_heads=1, grid=16, latent_dim=256)
    tokenizer = autoencoder(sub_codes=1, latent_dim=256, grid=16)
    write_official(model, tmp_path / "L.pth")
    write_official(tokenizer, tmp_path / "bae.pth")
    convert(tmp_path / "L.pth", tmp_path / "pipe", tokenizer=tmp_path / "bae.pth")
    pipe = AutoPipeline.from_pretrained(tmp_path / "pipe")
    assert pipe.image_tokenizer.layout == model.layout and pipe.sampler.config.guidance_schedule == "linear-next"
