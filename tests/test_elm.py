"""ELM: bits and sub-codes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from varkit.checkpoints.files import load_official, to_official, write_official
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
