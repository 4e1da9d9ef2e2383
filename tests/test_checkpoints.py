"""Released files: every key of the published lists, both directions, and what is refused."""

from __future__ import annotations

import argparse
import json
import pickle
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from varkit import AutoPipeline, registry
from varkit.checkpoints import controlar
from varkit.checkpoints import var as keys
from varkit.checkpoints.convert import convert
from varkit.checkpoints.files import (
    build_official,
    load_official,
    load_strictly,
    read_state_dict,
    to_official,
    write_official,
)
from varkit.generators.var import VAR
from varkit.layout import TokenLayout, square_grids
from varkit.tokenizers.multiscale_vq import SCALES_256, SCALES_1024, MultiScaleVQ

NETWORKS = ("i3d", "inception", "lpips", "videomae")  # of the metrics: read elsewhere
MANIFESTS = sorted(p for p in (Path(__file__).parent / "checkpoints").glob("*.json") if not p.name.startswith(NETWORKS))
UNRELEASED = {"LlamaGen-B.pt", "LlamaGen-L.pt", "seg_ade20k.pt"}  # ControlAR's README names them
VAR_MANIFESTS = [p for p in MANIFESTS if p.name.startswith("var-")]
DTYPES = {"lvl_1L": torch.int64}


def manifest(path: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """A published list of keys and shapes, and such a file on the meta device."""
    meta = json.loads(path.read_text())
    state = {k: torch.empty(s, device="meta", dtype=DTYPES.get(k, torch.float32)) for k, s in meta["keys"].items()}
    return meta, state


def small_var(**changes: Any) -> VAR:
    torch.manual_seed(0)
    return VAR(**{"num_classes": 3, "depth": 2, "hidden_size": 64, "num_heads": 2, "latent_dim": 8, **changes}).eval()


def small_tokenizer(**changes: Any) -> MultiScaleVQ:
    torch.manual_seed(1)
    sizes: dict[str, Any] = {
        "codebook_size": 4096,
        "latent_dim": 8,
        "base_channels": 32,
        "channel_multipliers": (1,) * 5,
        "num_res_blocks": 1,
    }
    return MultiScaleVQ(**{**sizes, **changes}).eval()


def equal(first: nn.Module, second: nn.Module) -> bool:
    a, b = first.state_dict(), second.state_dict()
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


# ---- the published lists ------------------------------------------------------------------------------------------


def test_all_released_files_are_listed() -> None:
    files = {
        f
        for p in MANIFESTS
        for f in re.findall(r"\S+\.(?:pth|pt|th|bin|ckpt|safetensors)\b(?: of \S+)?", json.loads(p.read_text())["file"])
    }
    files = {f for f in files if f.split("/")[-1].strip("()") not in UNRELEASED}
    assert len(files) >= len(MANIFESTS) - 1 - len(UNRELEASED)
    cards = [registry.checkpoint(name) for name in registry.list_checkpoints("*")]
    # Where each file has a repository of its own, that is what names it.
    named = {f"{card.repo_id.split('/')[-1].removeprefix('tokenizer_')}.bin" for card in cards}
    known = {c.filename for c in cards} | {f"{c.filename} of {c.repo_id}" for c in cards} | named
    assert {f for f in files if f.split()[0] not in known and f.split("/")[-1] not in known} <= known


@pytest.mark.parametrize("path", MANIFESTS, ids=lambda p: p.stem)
def test_every_key_of_a_released_file_is_accounted_for_and_given_back(path: Path) -> None:
    meta, state = manifest(path)
    model = build_official(state, meta["file"])
    back = to_official(model)
    # ControlAR's files hold parameters that nothing reads; this one is a buffer
    unread = {k for k in controlar.UNREAD if k in back} - {"condition_mlp.uncond_embedding"}
    assert sum(p.numel() for p in model.parameters()) + sum(back[k].numel() for k in unread) == meta["parameters"]
    assert {k: list(v.shape) for k, v in back.items()} == meta["keys"]
    assert all(back[k].dtype == v.dtype for k, v in state.items())


@pytest.mark.parametrize("path", VAR_MANIFESTS, ids=lambda p: p.stem)
def test_shapes_alone_tell_the_constructor_arguments(path: Path) -> None:
    meta, state = manifest(path)
    if keys.is_var(state):
        told, official = keys.read_var_arguments(state), keys.var_arguments(meta["constructor"])
        official["drop_path_rate"] = pytest.approx(official["drop_path_rate"])
    else:
        told, official = keys.read_tokenizer_arguments(state), keys.tokenizer_arguments(meta["constructor"])
    for name in told.keys() & official.keys():
        ours = list(told[name]) if isinstance(told[name], tuple) else told[name]
        assert ours == official[name], name


@pytest.mark.parametrize("path", VAR_MANIFESTS, ids=lambda p: p.stem)
def test_one_key_more_less_or_reshaped_is_an_error_that_names_it(path: Path) -> None:
    _, state = manifest(path)
    name = "head.weight" if keys.is_var(state) else "decoder.conv_in.bias"
    with pytest.raises(ValueError, match="not in the model: surprise"):
        build_official({**state, "surprise": torch.empty(1, device="meta")}, "file")
    if name != "head.weight":  # head.weight is what tells the codebook's size
        with pytest.raises(ValueError, match=f"missing in the file: {name}"):
            build_official({k: v for k, v in state.items() if k != name}, "file")
    wrong = "class_emb.weight" if keys.is_var(state) else name
    twice = {**state, wrong: torch.empty(*[2 * s for s in state[wrong].shape], device="meta")}
    with pytest.raises(ValueError, match=r"other shapes|2048"):
        build_official(twice, "file")


def test_registered_names_agree_with_their_builders() -> None:
    for path in VAR_MANIFESTS:
        meta, state = manifest(path)
        name = next(n for n in registry.list_checkpoints() if registry.checkpoint(n).filename == meta["file"])
        with torch.device("meta"):
            built = registry.create_model(registry.checkpoint(name).builder)
        assert built.layout == build_official(state, name).layout


# ---- files ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
@pytest.mark.parametrize("model", [small_var(), small_var(shared_adaln=True), small_tokenizer()], ids=str)
def test_written_and_read_again_it_is_the_same(model: nn.Module, suffix: str, tmp_path: Path) -> None:
    write_official(model, tmp_path / f"official{suffix}")
    again = load_official(tmp_path / f"official{suffix}")
    assert type(again) is type(model) and equal(again, model)
    assert not any(p.requires_grad for p in again.parameters()) and not again.training
    assert [p.name for p in tmp_path.iterdir()] == [f"official{suffix}"]


def test_the_constant_buffers_are_the_official_ones(tmp_path: Path) -> None:
    model = small_var()
    state = to_official(model)
    sizes = [s * s for s in SCALES_256]
    assert state["lvl_1L"].shape == (1, 680) and state["lvl_1L"][0, :6].tolist() == [0, 1, 1, 1, 1, 2]
    bias = state["attn_bias_for_masking"][0, 0]
    assert bias.shape == (680, 680) and bias[0, 1] == -torch.inf and bias[1, 4] == 0 and bias[1, 5] == -torch.inf
    assert (bias == 0).sum() == sum(n * sum(sizes[: k + 1]) for k, n in enumerate(sizes))
    assert not state["blocks.0.attn.zero_k_bias"].any()


def test_a_bias_on_keys_is_refused() -> None:
    state = to_official(small_var())
    state["blocks.1.attn.zero_k_bias"] = torch.ones_like(state["blocks.1.attn.zero_k_bias"])
    with pytest.raises(ValueError, match=r"blocks.1.attn.zero_k_bias is not zero"):
        build_official(state, "file")


def test_usage_statistics_of_another_number_of_scales_are_replaced_by_zeros() -> None:
    model = small_tokenizer()
    model.quantize.ema_vocab_hit_SV.fill_(3.0)
    longer = build_official(to_official(model), "file", scales=SCALES_1024)
    assert longer.quantize.ema_vocab_hit_SV.shape == (14, 4096) and not longer.quantize.ema_vocab_hit_SV.any()
    assert longer.layout == TokenLayout(square_grids(SCALES_1024), 4096, 8)
    same = build_official(to_official(model), "file")
    assert (same.quantize.ema_vocab_hit_SV == 3).all()


@pytest.mark.parametrize("wrapper", ["model", "state_dict", "trainer"])
def test_wrappers_of_training_scripts_are_looked_through(wrapper: str, tmp_path: Path) -> None:
    state = to_official(small_var())
    torch.save({wrapper: state, "args": argparse.Namespace(lr=1), "epoch": 3}, tmp_path / "ckpt.pth")
    assert equal(load_official(tmp_path / "ckpt.pth"), small_var())


class Harmful:
    ran = False

    def __reduce__(self) -> Any:
        return (setattr, (Harmful, "ran", True))


def test_code_in_a_file_is_never_run(tmp_path: Path) -> None:
    torch.save({"model": Harmful()}, tmp_path / "bad.pth")
    (tmp_path / "plain.pth").write_bytes(pickle.dumps({"a": Harmful()}))
    for name in ("bad.pth", "plain.pth"):
        with pytest.raises(ValueError, match=f"{name} cannot be read as a file of plain tensors"):
            read_state_dict(tmp_path / name)
    assert not Harmful.ran


def test_other_files_are_refused_in_words(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"no such file: .*gone.pth"):
        read_state_dict(tmp_path / "gone.pth")
    (tmp_path / "text.pth").write_text("hello")
    with pytest.raises(ValueError, match="cannot be read as a file of plain tensors"):
        read_state_dict(tmp_path / "text.pth")
    torch.save([1, 2], tmp_path / "list.pth")
    with pytest.raises(ValueError, match="holds no state dict"):
        read_state_dict(tmp_path / "list.pth")
    torch.save({"unet.weight": torch.zeros(2)}, tmp_path / "other.pth")
    with pytest.raises(ValueError, match=r"no file that varkit knows.*VAR transformer \(pos_1LC\).*unet.weight"):
        load_official(tmp_path / "other.pth")
    with pytest.raises(ValueError, match=r"42 positions; released lists of scales have \[680, 2240, 9451\]"):
        build_official({**to_official(small_var()), "pos_1LC": torch.zeros(1, 42, 64)}, "file")


def test_strict_loading_lists_both_sides() -> None:
    model = nn.Linear(2, 3)
    with pytest.raises(ValueError) as error:
        load_strictly(model, {"weight": torch.zeros(3, 3), "extra": torch.zeros(1)}, "x.pth")
    for words in ("x.pth does not fit Linear", "missing in the file: bias", "not in the model: extra", "file (3, 3)"):
        assert words in str(error.value)


# ---- convert ------------------------------------------------------------------------------------------------------


def test_two_released_files_become_a_pipeline_and_files_again(tmp_path: Path) -> None:
    model, tokenizer = small_var(), small_tokenizer()
    write_official(model, tmp_path / "var_d2.pth")
    write_official(tokenizer, tmp_path / "vae.pth")
    lines = convert(tmp_path / "var_d2.pth", tmp_path / "pipe", tokenizer=tmp_path / "vae.pth")
    assert any("MIT" in line for line in lines)
    card = (tmp_path / "pipe" / "README.md").read_text()
    assert "license: mit" in card and "MIT (FoundationVision/VAR)" in card and "680 tokens" in card
    pipe = AutoPipeline.from_pretrained(tmp_path / "pipe")
    pipe.set_progress_bar_config(disable=True)
    assert equal(pipe.transformer, model) and equal(pipe.image_tokenizer, tokenizer)
    settings = pipe.sampler.settings()
    assert settings["guidance_scale"] == 2.5 and settings["top_k"] == 900 and settings["top_p"] == 0.96
    direct = AutoPipeline.from_single_file(tmp_path / "var_d2.pth", tmp_path / "vae.pth", guidance_scale=2.5)
    direct.set_progress_bar_config(disable=True)
    call = {"class_labels": [1], "seed": 0, "output_type": "latent", "top_k": 900, "top_p": 0.96}
    assert torch.equal(pipe(**call).images, direct(**call).images)
    for part, official in (("transformer", model), ("image_tokenizer", tokenizer)):
        convert(tmp_path / "pipe", tmp_path / "back" / f"{part}.pth", part=part)
        again, before = read_state_dict(tmp_path / "back" / f"{part}.pth"), to_official(official)
        assert again.keys() == before.keys() and all(torch.equal(again[k], before[k]) for k in before)


def test_one_file_becomes_one_part(tmp_path: Path) -> None:
    write_official(small_tokenizer(), tmp_path / "vae.safetensors")
    convert(tmp_path / "vae.safetensors", tmp_path / "part", dtype="bfloat16")
    again = MultiScaleVQ.from_pretrained(tmp_path / "part")
    assert equal(again.quantize, small_tokenizer().quantize)  # the quantiser stays float32
    convert(tmp_path / "part", tmp_path / "vae.pth")
    assert read_state_dict(tmp_path / "vae.pth").keys() == to_official(small_tokenizer()).keys()


def test_conversions_that_cannot_be_are_refused_before_anything_is_written(tmp_path: Path) -> None:
    write_official(small_tokenizer(), tmp_path / "vae.pth")
    full = tmp_path / "full"
    full.mkdir()
    (full / "file").touch()
    wrong: list[tuple[dict[str, Any], str]] = [
        ({"source": tmp_path / "vae.pth", "to": tmp_path / "x.pth"}, "must be a folder"),
        ({"source": tmp_path / "vae.pth", "to": full}, "is not empty"),
        ({"source": tmp_path / "vae.pth", "to": tmp_path / "y", "dtype": "int8"}, "dtype must be"),
        (
            {"source": tmp_path / "vae.pth", "to": tmp_path / "y", "tokenizer": tmp_path / "vae.pth"},
            "goes with a generator",
        ),
        ({"source": full, "to": tmp_path / "y.pth"}, "holds no config.json"),
        ({"source": full, "to": tmp_path / "y"}, r"must end in .pth or .safetensors"),
        ({"source": full, "to": tmp_path / "y.pth", "part": "vae"}, "transformer or image_tokenizer"),
    ]
    for arguments, message in wrong:
        with pytest.raises(ValueError, match=message):
            convert(**arguments)
    with pytest.raises(FileNotFoundError):
        convert(tmp_path / "gone.pth", tmp_path / "y")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["full", "vae.pth"]
