"""KL autoencoders: MAR's released file, those of diffusers by name, and latents brought to mean 0 and spread 1."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKL
from safetensors.torch import load_file, save_file
from torch import Tensor
from typer.testing import CliRunner

from tests.test_checkpoints import equal, manifest
from tests.test_models import liven, random_images, tiny
from varkit import registry
from varkit.checkpoints import kl_vae as keys
from varkit.checkpoints.files import build_official, load_official, read_state_dict, to_official, write_official
from varkit.cli import app
from varkit.config import ConfigError
from varkit.data.images import open_images
from varkit.data.latents import LatentStatistics, latent_sums
from varkit.data.transforms import ImageTransform
from varkit.pipelines import auto
from varkit.pipelines.auto import open_tokenizer
from varkit.pipelines.fingerprint import tokenizer_fingerprint
from varkit.pipelines.measure_latents import measure_latents
from varkit.rng import Rng
from varkit.tokenizers.kl_vae import KLVAE, flatten
from varkit.training.objectives import build_objective, objective_config

SLICE = Path(__file__).parent / "data" / "fashion_slice.npz"
SMALL: dict[str, Any] = {"block_out_channels": (8,) * 5, "layers_per_block": 1, "norm_num_groups": 4}


def small_kl16(**changes: Any) -> KLVAE:
    """The layout of kl16.ckpt, narrow; groups are as in the release."""
    torch.manual_seed(0)
    model = registry.create_model("kl16", block_out_channels=(32,) * 5, image_size=32, layers_per_block=1, **changes)
    return liven(model, 0.05)


# ---- the released file --------------------------------------------------------------------------------------------


def test_the_shapes_of_the_released_file_tell_what_its_builder_says() -> None:
    meta, state = manifest(Path(__file__).parent / "checkpoints" / "kl16.json")
    told, official = keys.read_arguments(state), keys.kl_vae_arguments(meta["constructor"])
    assert told == {k: official[k] for k in told}
    with torch.device("meta"):
        built = registry.create_model(registry.checkpoint("kl16.in1k").builder)
    opened = build_official(state, "kl16.ckpt")
    assert built.layout == opened.layout and built.state_dict().keys() == opened.state_dict().keys()
    assert opened.config.scaling_factor == 0.2325 and built.config.scaling_factor == 0.2325
    assert not any("decoder.up_blocks" in k and "attentions" in k for k in opened.state_dict())


@pytest.mark.parametrize("bare", [True, False])
def test_a_file_opens_strictly_and_is_given_back(bare: bool, tmp_path: Path) -> None:
    model = small_kl16()
    state = to_official(model)
    attention = [k for k in state if ".attn" in k and k.endswith(("q.weight", "proj_out.weight"))]
    assert len(attention) == 6 and all(state[k].shape == (32, 32, 1, 1) for k in attention)
    extra = {**state, "loss.logvar": torch.zeros(())}  # of the losses that trained it
    torch.save(extra if bare else {"model": extra, "epoch": 3}, tmp_path / "kl16.ckpt")
    again = load_official(tmp_path / "kl16.ckpt", image_size=32)
    assert equal(again, model) and to_official(again).keys() == state.keys()
    opened = open_tokenizer(str(tmp_path / "kl16.ckpt"), image_size=32)
    images = random_images(model, 2)
    assert torch.equal(opened.encode(images), model.encode(images))
    opened.save_pretrained(tmp_path / "folder")  # token files made by the one go with the other
    assert tokenizer_fingerprint(open_tokenizer(str(tmp_path / "folder"))) == tokenizer_fingerprint(opened)
    write_official(opened, tmp_path / "back.safetensors")
    back = read_state_dict(tmp_path / "back.safetensors")
    assert all(torch.equal(back[k], state[k]) for k in state) and back.keys() == state.keys()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"decoder.up.2.block.0.surprise": (1,)}, "not in the model: decoder.up.2.block.0.surprise"),
        ({"decoder.mid.attn_1.q.bias": None}, "missing in the file: vae.decoder.mid_block.attentions.0.to_q.bias"),
        ({"encoder.conv_out.weight": (32, 32, 1, 1)}, "other shapes"),
        ({"quant_conv.weight": (16, 32, 1, 1)}, "a VAE without variances"),
        ({"decoder.up.4.attn.0.q.weight": (32, 32, 1, 1)}, "with attention in the decoder's levels is not MAR's"),
        (
            {"post_quant_conv.weight": (4, 4, 1, 1), "quant_conv.weight": (8, 8, 1, 1)},
            "a VAE of 4 channels and 5 levels",
        ),
        ({"quantize.embedding.weight": (8, 16)}, "no file that varkit knows"),
    ],
)
def test_other_files_are_refused(change: dict[str, Any], message: str) -> None:
    state = to_official(small_kl16())
    for key, shape in change.items():
        state = {k: v for k, v in state.items() if k != key}
        state |= {} if shape is None else {key: torch.zeros(shape)}
    with pytest.raises(ValueError, match=message):
        build_official(state, "file")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"scaling_factor": 0.5}, "scaling_factor is 0.5"),
        ({"shift_factor": 0.1}, "shift_factor 0.1"),
        ({"latent_channels": 4}, "a VAE of 4 channels"),
        ({"quant_convs": False}, "1x1 convolutions"),
        ({"up_block_types": ("AttnUpDecoderBlock2D",) + ("UpDecoderBlock2D",) * 4}, "with attention"),
    ],
)
def test_what_the_official_code_would_misread_is_not_written(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        to_official(small_kl16(**changes))


# ---- diffusers by name --------------------------------------------------------------------------------------------

DIFFUSERS: dict[str, dict[str, Any]] = {
    "sd": {"latent_channels": 4, "scaling_factor": 0.18215, "sample_size": 64},
    "sdxl": {"latent_channels": 4, "scaling_factor": 0.13025, "sample_size": 128, "force_upcast": True},
    "sd3": {"scaling_factor": 1.5305, "shift_factor": 0.0609, "use_quant_conv": False, "use_post_quant_conv": False},
    "flux": {"scaling_factor": 0.3611, "shift_factor": 0.1159, "use_quant_conv": False, "use_post_quant_conv": False},
    "playground": {"latent_channels": 4, "scaling_factor": 0.5, "latents_mean": [-1.6, 1.1, 3.3, -2.8],
                   "latents_std": [8.4, 5.9, 4.2, 5.3]},
}  # fmt: skip
"""What tells the VAEs of well-known pipelines apart."""


def of_diffusers(name: str) -> AutoencoderKL:
    levels = {"block_out_channels": (8,) * 4, "layers_per_block": 1, "norm_num_groups": 4}
    blocks = {"down_block_types": ("DownEncoderBlock2D",) * 4, "up_block_types": ("UpDecoderBlock2D",) * 4}
    torch.manual_seed(0)
    return liven(
        AutoencoderKL(**{**levels, **blocks, "latent_channels": 16, "sample_size": 32, **DIFFUSERS[name]}), 0.05
    )


@pytest.mark.parametrize("name", DIFFUSERS)
def test_the_vae_of_a_known_pipeline_opens_with_its_scale(name: str, tmp_path: Path) -> None:
    theirs, given = of_diffusers(name), DIFFUSERS[name]
    theirs.save_pretrained(tmp_path / "pipe" / "vae")
    (tmp_path / "pipe" / "model_index.json").write_text(json.dumps({"_class_name": "SomePipeline"}))
    opened = [
        KLVAE.from_pretrained(tmp_path / "pipe" / "vae"),
        KLVAE.from_pretrained(tmp_path / "pipe", subfolder="vae"),
        open_tokenizer(str(tmp_path / "pipe" / "vae")),
        open_tokenizer(str(tmp_path / "pipe")),
    ]
    ours = opened[0]
    assert ours.image_size == (given.get("sample_size", 32),) * 2 and ours.layout.dim == theirs.config.latent_channels
    assert all(type(m) is KLVAE and equal(m, ours) and m.layout == ours.layout for m in opened)
    images = random_images(ours, 2)
    with torch.no_grad():
        z = theirs.encode(images).latent_dist.mean
        if "latents_mean" in given:
            mean, std = (torch.tensor(given[k]).view(1, 4, 1, 1) for k in ("latents_mean", "latents_std"))
            expected = (z - mean) * given["scaling_factor"] / std
        else:
            expected = (z - given.get("shift_factor", 0.0)) * given["scaling_factor"]
        torch.testing.assert_close(ours.latents(images), expected)
        torch.testing.assert_close(ours.to_images(expected), theirs.decode(z).sample, atol=1e-5, rtol=1e-5)
    ours.save_pretrained(tmp_path / "ours")
    again = open_tokenizer(str(tmp_path / "ours"), image_size=16)
    assert again.image_size == (16, 16) and again.encode(images[..., :16, :16]).shape[1] == 4


def test_a_hub_pipelines_vae_is_fetched_alone(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    of_diffusers("flux").save_pretrained(tmp_path / "vae")
    asked: list[Any] = []

    def download(repo: str, **options: Any) -> Path:
        asked.append((repo, options))
        return tmp_path

    monkeypatch.setattr(auto, "download", download)
    assert open_tokenizer("someone/flux/vae").config.shift_factor == 0.1159
    assert asked == [("someone/flux", {"folder": "vae"})]


def test_a_wrong_folder_is_named(tmp_path: Path) -> None:
    vae = of_diffusers("sd")
    vae.save_pretrained(tmp_path / "vae")
    config = json.loads((tmp_path / "vae" / "config.json").read_text())
    weights = load_file(tmp_path / "vae" / "diffusion_pytorch_model.safetensors")

    def folder(name: str, changes: dict[str, Any], state: dict[str, Tensor] | None = None) -> Path:
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(json.dumps(config | changes))
        save_file(weights if state is None else state, tmp_path / name / "diffusion_pytorch_model.safetensors")
        return tmp_path / name

    less = {k: v for k, v in weights.items() if k != "decoder.conv_out.bias"}
    for path, message in (
        (tmp_path, r"holds no config.json .*subfolder='vae'"),
        (folder("tiny", {"_class_name": "AutoencoderTiny"}), "holds a AutoencoderTiny; KLVAE opens"),
        (folder("less", {}, less), r"missing keys: decoder.conv_out.bias"),
        (folder("more", {}, {**weights, "extra": torch.zeros(1)}), r"unexpected keys: extra"),
        (folder("act", {"act_fn": "relu"}), "activation is 'relu'"),
        (
            folder("half", {"use_quant_conv": False}, {k: v for k, v in weights.items() if k[:5] != "quant"}),
            "one of the",
        ),
    ):
        with pytest.raises(ValueError, match=message):
            KLVAE.from_pretrained(path)
    with pytest.raises(ValueError, match=r"tiny: varkit has no model class 'AutoencoderTiny'"):
        open_tokenizer(str(tmp_path / "tiny"))
    (tmp_path / "model_index.json").write_text('{"_class_name": "SomePipeline"}')
    (tmp_path / "vae").rename(tmp_path / "unet")
    with pytest.raises(ValueError, match=r"holds a SomePipeline, which has no image_tokenizer"):
        open_tokenizer(str(tmp_path))
    tiny("toy_vq").save_pretrained(tmp_path / "toy")
    with pytest.raises(ValueError, match="codes images of 8x12 alone, not of 64x64"):
        open_tokenizer(str(tmp_path / "toy"), image_size=64)
    with pytest.raises(ValueError, match="must be a multiple of the downsampling, 8"):
        open_tokenizer(str(tmp_path / "more" / ".." / "unet"), image_size=20)


def test_training_starts_from_the_released_file_or_a_vae_of_diffusers(tmp_path: Path) -> None:
    write_official(small_kl16(), tmp_path / "kl16.pth")
    of_diffusers("sd").save_pretrained(tmp_path / "vae")
    quick = {"name": "kl-vae", "adversarial_weight": 0, "perceptual_weight": 0}
    for start, scale in (("kl16.pth", 0.2325), ("vae", 0.18215)):
        training: Any = build_objective(objective_config(quick | {"init_from": str(tmp_path / start)}), [])
        assert training.tokenizer.config.scaling_factor == scale and training.tokenizer.training
        assert all(p.requires_grad for p in training.tokenizer.parameters())
    tiny("toy_vq").save_pretrained(tmp_path / "toy")
    with pytest.raises(ConfigError, match="toy is no KL autoencoder but a ToyVQ"):
        build_objective(objective_config(quick | {"init_from": str(tmp_path / "toy")}), [])


# ---- statistics of latents ----------------------------------------------------------------------------------------


def vae(**changes: Any) -> KLVAE:
    torch.manual_seed(0)
    return liven(
        KLVAE(**{"image_size": 16, "latent_channels": 3, **SMALL, "block_out_channels": (8, 8), **changes}), 0.05
    )


def drawn(model: KLVAE, count: int = 20) -> Tensor:
    """(N, L, C): the slice's images, each latent drawn `count` times."""
    data = open_images(SLICE, transform=ImageTransform(model.image_size, mode="squash", enlarge=1.0))
    images = data.__getitems__(range(len(data)))["images"]
    with torch.no_grad():
        return torch.cat([model.encode(images, Rng.from_seed(i, len(images))) for i in range(count)])


@pytest.mark.parametrize("changes", [{}, {"shift_factor": 0.3, "scaling_factor": 2.0}])
def test_measured_statistics_are_those_of_drawn_latents_and_normalise_them(changes: dict[str, Any]) -> None:
    model = vae(**changes)
    found = measure_latents(model, str(SLICE), mode="squash", batch_size=7)
    latents = drawn(model).flatten(0, 1)
    assert found.count == len(latents) // 20
    torch.testing.assert_close(torch.tensor(found.mean), latents.mean(0), atol=0.02, rtol=0.02)
    torch.testing.assert_close(torch.tensor(found.std), latents.std(0), atol=0.02, rtol=0.02)
    assert found.overall == pytest.approx((latents.mean().item(), latents.std().item()), abs=0.02)
    images = random_images(model, 2)
    with torch.no_grad():
        before, decoded = model.latents(images), model.to_images(model.latents(images))
        model.normalise(found.mean, found.std)
        now = model.latents(images)
        scaled = (flatten(before) - torch.tensor(found.mean)) / torch.tensor(found.std)
        torch.testing.assert_close(flatten(now), scaled, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(model.to_images(now), decoded, atol=1e-5, rtol=1e-5)
    again = measure_latents(model, str(SLICE), mode="squash")
    torch.testing.assert_close(torch.tensor([again.mean, again.std]), torch.tensor([[0.0] * 3, [1.0] * 3]))
    assert again.overall == pytest.approx((0, 1), abs=1e-5)


def test_moments_are_what_encode_draws_from() -> None:
    for model in (vae(shift_factor=0.1, scaling_factor=3.0), vae(latents_mean=[1, 2, 3], latents_std=[4, 5, 6])):
        images, rng = random_images(model, 3), Rng.from_seed(0, 3)
        with torch.no_grad():
            mean, std = model.moments(images)
            torch.testing.assert_close(mean, model.encode(images))
            noise = (model.encode(images, rng) - mean) / std
            other = (model.encode(images * 0.5, rng) - model.moments(images * 0.5)[0]) / model.moments(images * 0.5)[1]
        torch.testing.assert_close(noise, other, atol=1e-3, rtol=1e-3)  # the same numbers, whatever the image
    with pytest.raises(ValueError, match="no posterior over latents"):
        tiny("toy_vq").moments(torch.zeros(1, 3, 8, 12))


def test_sums_make_statistics() -> None:
    values, std = torch.randn(40, 5, 3).half(), torch.rand(40, 5, 3)
    found = LatentStatistics.of(latent_sums(values), 200)
    torch.testing.assert_close(torch.tensor(found.mean), values.float().mean((0, 1)))
    torch.testing.assert_close(torch.tensor(found.std), values.float().flatten(0, 1).std(0, correction=0))
    wider = LatentStatistics.of(latent_sums(values, std), 200)
    variance = torch.tensor(wider.std).square() - torch.tensor(found.std).square()
    torch.testing.assert_close(variance, std.square().mean((0, 1)), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"latents_mean": [0, 0, 0]}, "3 numbers each"),
        ({"latents_mean": [0, 0], "latents_std": [1, 1]}, r"got \[2, 2\]"),
        ({"latents_mean": [0, 0, 0], "latents_std": [1, 0, 1]}, "channel 1 has 0"),
        ({"latents_mean": [0, 0, 0], "latents_std": [1, 1, 1], "shift_factor": 0.5}, "in the place of shift_factor"),
    ],
)
def test_statistics_that_cannot_be_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        vae(**changes)


def test_the_command_measures_and_writes_a_tokenizer_that_is_normal(tmp_path: Path) -> None:
    vae().save_pretrained(tmp_path / "vae")
    command = ["latents", str(tmp_path / "vae"), str(SLICE), "--mode", "squash", "--num", "12", "--device", "cpu"]
    first = CliRunner().invoke(app, [*command, "--to", str(tmp_path / "normal"), "--image-size", "32"])
    assert first.exit_code == 0 and "of 3,072 latents" in first.output and "std 1" in first.output, first.output
    normal = open_tokenizer(str(tmp_path / "normal"))
    assert normal.image_size == (32, 32) and normal.config.latents_std is not None
    again = CliRunner().invoke(app, ["latents", str(tmp_path / "normal"), *command[2:], "--json"])
    told = json.loads(again.stdout)
    assert told["std"] == pytest.approx([1, 1, 1], abs=1e-3) and told["mean"] == pytest.approx([0, 0, 0], abs=1e-3)
    full = CliRunner().invoke(app, [*command, "--to", str(tmp_path / "normal")])
    assert full.exit_code == 2 and "is not empty" in full.output
    tiny("toy_vq").save_pretrained(tmp_path / "toy")
    ids = CliRunner().invoke(app, ["latents", str(tmp_path / "toy"), str(SLICE)])
    assert ids.exit_code == 2 and "ids, not latents" in ids.output
