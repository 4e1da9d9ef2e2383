"""ControlAR: LlamaGen from classes or texts, steered by control images; its sizes, its files, its training."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor

from tests.test_models import classes, liven, nothing
from varkit import AutoPipeline, registry
from varkit.checkpoints import controlar as keys
from varkit.checkpoints.files import to_official
from varkit.checkpoints.formats import format_of_model
from varkit.conditioning.control_encoder import ControlEncoder
from varkit.config import ConfigError
from varkit.generators.llamagen import LlamaGen
from varkit.interfaces import Cond
from varkit.pipelines.auto import assemble
from varkit.rng import Rng
from varkit.samplers.next_group import NextGroupSampler
from varkit.samplers.speculative.sampler import SpeculativeSampler
from varkit.tokenizers.vqgan import VQGAN
from varkit.training.objectives import build_objective, objective_config
from varkit.training.sizes import Sizes

SMALL: dict[str, Any] = {"encoder": {"width": 12, "depth": 1, "heads": 2, "patch": 3, "stride": 2, "grid": 4}}
SIZES: dict[str, Any] = {"codebook_size": 24, "latent_dim": 4}


def llamagen(**changes: Any) -> Any:
    """Tokens of 2x2 pixels; without dropout, so that training is a function of its inputs."""
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"depth": 3, "hidden_size": 32, "num_heads": 2, "grid": (3, 4), "control": SMALL, **SIZES}
    none = dict.fromkeys(("token_dropout", "dropout", "ffn_dropout"), 0.0)
    return liven(LlamaGen(**{**sizes, "num_classes": 3, **none, **changes}))


def of_text(**changes: Any) -> Any:
    return llamagen(num_classes=None, text_length=5, text_dim=12, **changes)


def tokenizer(grid: Any = (3, 4)) -> Any:
    torch.manual_seed(1)
    sizes: dict[str, Any] = {"base_channels": 32, "channel_multipliers": (1, 1), "num_res_blocks": 1, "z_channels": 8}
    return liven(VQGAN(grid=grid, **SIZES, **sizes), 0.05)


def draw(model: Any, cond: Cond, guidance: float = 2.0, sampler: Any = None) -> Tensor:
    null = nothing(model, cond) if guidance != 1 else None
    settings = {"guidance_scale": guidance, "guidance_schedule": "constant", "top_k": 1}
    sampler, rng = sampler or NextGroupSampler(), Rng.from_seed(0, len(cond))
    return sampler.generate(tokenizer(model.layout.grids[0]), model, cond, rng, null=null, **settings).tokens


def quiet(pipe: Any) -> Any:
    pipe.set_progress_bar_config(disable=True)
    return pipe


# ---- decoding -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [llamagen, of_text])
def test_the_first_token_is_steered_by_its_own_control(make: Any) -> None:
    """What predicts token 0, the end of the prefix, gets the first vector; the prefix before it stays as it was."""
    model = make()
    cond = classes(model, 1)
    with torch.no_grad():
        inputs = torch.zeros(1, 12, dtype=torch.int64)
        fused = model.fuse(cond)
        for token in (0, 5):
            changed = {k: v.clone() for k, v in fused.items()}
            for v in changed.values():
                v[:, token] += 1
            model.fuse = lambda _, now=changed: now
            after = model.teacher_forced(inputs, cond).logits
            model.fuse = lambda _: fused
            before = model.teacher_forced(inputs, cond).logits
            moved = (after - before).abs().amax((0, 2)) > 1e-5
            assert not moved[:token].any() and moved[token:].all()


@pytest.mark.parametrize("guidance", [1.0, 3.0])
def test_drafts_and_trees_are_steered_where_they_stand(guidance: float) -> None:
    """The best tokens are those of plain decoding, whatever was drafted."""
    model = of_text()
    cond = classes(model, 3)
    plain = draw(model, cond, guidance)
    for drafter in ("jacobi", "n-gram", "recycling"):
        sampler = SpeculativeSampler(drafter=drafter, verifier="exact")
        assert torch.equal(draw(model, cond, guidance, sampler), plain), drafter
    assert not torch.equal(plain[0], draw(model, Cond(sequence=cond.sequence, mask=cond.mask), guidance)[0])


@pytest.mark.slow
def test_compiled_decoding_is_steered() -> None:
    model = llamagen()
    plain = draw(model, classes(model, 3))
    model.compile_decoding(backend="eager")
    assert torch.equal(draw(model, classes(model, 3)), plain)


def test_the_release_ignores_the_strength_without_guidance() -> None:
    """Here it counts; with official_quirks it is all or nothing. Under guidance both are the same."""
    mended, official = of_text(), of_text(official_quirks=True)
    cond = classes(mended, 3)  # of strength 1, 0.5 and 0
    ours, theirs = draw(mended, cond, 1.0), draw(official, cond, 1.0)
    full = draw(mended, Cond(cond.vector, cond.sequence, cond.mask, cond.control, torch.ones(3, 1)), 1.0)
    assert torch.equal(theirs[:2], full[:2]) and torch.equal(theirs[2], ours[2])
    assert not torch.equal(ours[1], full[1]) and not torch.equal(ours[2], full[2])
    assert torch.equal(draw(mended, cond), draw(official, cond))


# ---- any size -----------------------------------------------------------------------------------------------------


def test_tokens_of_any_grid_take_the_places_of_one_table_in_turn() -> None:
    model = of_text(rope_grid=(5, 4), grid=(4, 4))
    wide = model.resized((2, 9))
    assert wide.layout.grids == ((2, 9),) and wide.rotary is model.rotary and model.layout.grids == ((4, 4),)
    assert wide.layers is model.layers and wide.config.grid == (2, 9)
    with pytest.raises(ValueError, match="at most 20, of any sides"):
        model.resized((3, 7))
    with pytest.raises(ValueError, match=r"more tokens than rope_grid \(5, 4\) has places"):
        of_text(rope_grid=(5, 4), grid=(7, 3))
    inputs, cond = torch.randint(24, (2, 18)), classes(wide, 2)
    assert wide.teacher_forced(inputs, cond).logits.shape == (2, 18, 24)
    plain = Cond(sequence=cond.sequence, mask=cond.mask)  # without control nothing tells 2x9 from 3x6
    with torch.no_grad():
        other = model.resized((3, 6))
        assert torch.equal(wide.teacher_forced(inputs, plain).logits, other.teacher_forced(inputs, plain).logits)


def test_a_model_of_any_size_draws_that_of_the_control_image() -> None:
    pipe = quiet(assemble(of_text(rope_grid=(5, 4), grid=(4, 4)), tokenizer((4, 4)), {}))
    features = torch.randn(1, 5, 12)
    options: dict[str, Any] = {"features": features, "features_mask": torch.ones(1, 5), "seed": 0}
    assert pipe(control=Image.new("L", (12, 5)), **options).images[0].size == (12, 6)  # sides up to the next token
    assert pipe(control=torch.zeros(1, 3, 4, 10), **options).images[0].size == (10, 4)
    assert pipe(control=Image.new("L", (99, 7)), height=8, width=8, **options).images[0].size == (8, 8)
    with pytest.raises(ValueError, match="30 tokens; this model draws at most 20: give a smaller height= and width="):
        pipe(control=Image.new("L", (12, 10)), **options)
    fixed = quiet(assemble(of_text(grid=(4, 4)), tokenizer((4, 4)), {}))
    assert fixed(control=Image.new("L", (12, 5)), **options).images[0].size == (8, 8)


def test_a_text_pipeline_takes_control_and_reloads(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    pipe = quiet(assemble(of_text(), tokenizer(), {"guidance_scale": 2.0, "guidance_schedule": "constant"}))
    image = Image.linear_gradient("L")
    options = {"features": torch.randn(2, 5, 12), "features_mask": torch.ones(2, 5), "seed": 0, "output_type": "pt"}
    with caplog.at_level(logging.INFO, "varkit"):
        first = pipe(control=image, control_strength=[0.8, 0.0], **options).images
    assert "changes its proportions" in caplog.text
    pipe.save_pretrained(tmp_path)
    again = quiet(AutoPipeline.from_pretrained(tmp_path))
    assert torch.equal(again(control=image, control_strength=[0.8, 0.0], **options).images, first)
    without = pipe(control_strength=0, **options).images
    assert torch.equal(without[1], first[1]) and not torch.equal(without[0], first[0])
    with pytest.raises(ValueError, match=r"steered by control images \(one kind\)"):
        pipe(**options)
    with pytest.raises(ValueError, match="3 images of control for 2 images"):
        pipe(control=[image] * 3, **options)
    assert len(pipe(control=[image] * 3, seed=0).images) == 3  # of no text


# ---- files --------------------------------------------------------------------------------------------------------


def test_the_encoder_is_renamed_there_and_back() -> None:
    for scaled in (False, True):
        state = ControlEncoder(width=12, depth=2, heads=2, patch=4, grid=2, layer_scale=scaled).state_dict()
        official = keys.encoder_to_official(state)
        assert all(k.startswith(("embeddings.", "encoder.layer.", "layernorm.")) for k in official)
        back = keys.encoder_from_official({**official, "pooler.dense.weight": torch.zeros(1)})
        assert back.keys() == state.keys() and all(torch.equal(back[k], v) for k, v in state.items())


def test_official_files_say_what_they_hold() -> None:
    for make, name in ((llamagen, "ControlAR from class"), (of_text, "ControlAR from text")):
        assert format_of_model(make()).name == name
        assert format_of_model(make(control=None)).name == name.replace("ControlAR", "LlamaGen")
    official = to_official(of_text(rope_grid=(5, 4)))
    assert official["condition_mlp.uncond_embedding"].shape == (20, 32)  # the official loader compares it
    cards = {registry.checkpoint(n).filename: registry.checkpoint(n) for n in registry.list_checkpoints("controlar*")}
    assert cards.keys() == {
        f"{n}.safetensors" for n in ("canny_MR", "depth_MR", "hed", "seg_cocostuff", "edge_base", "depth_base")
    }
    resize = {name.split(".")[0]: card.overrides["control"]["resize"] for name, card in cards.items()}
    assert {n for n, r in resize.items() if r == "nearest"} == {"canny_MR", "seg_cocostuff"}


# ---- training -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("plain")
    assemble(llamagen(control=None, grid=(4, 4)), tokenizer((4, 4)), {}).save_pretrained(folder)
    return folder


def objective(folder: Path, **changes: Any) -> Any:
    control = {"kinds": ["canny"], "network": SMALL}
    values = {"name": "next-token", "model": "llamagen_b", "tokenizer": str(folder), "init_from": str(folder)}
    return build_objective(objective_config({**values, "control": control, **changes}), ["0", "1", "2"])


def test_sizes_of_batches_really_vary() -> None:
    """Also where the release, which adds the sides of a size, would have one alone."""
    sizes = Sizes()
    drawn = [sizes.draw(Rng.from_seed(s, 4)) for s in range(40)]
    assert len(set(drawn)) > 30 and all(h * w <= 768 * 768 and min(h, w) >= 384 and max(h, w) <= 1024 for h, w in drawn)
    assert (384, 1024) in sizes.all() and (768, 768) in sizes.all() and (784, 768) not in sizes.all()
    for bad, message in (({"smallest": 100}, "multiple of step"), ({"area": 9}, "less than that of 384x384")):
        with pytest.raises(ConfigError, match=message):
            Sizes(**bad)


def test_a_batch_is_trained_at_its_size(plain: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = {"smallest": 4, "largest": 12, "area": 40, "step": 2}
    own = objective(plain, model_overrides={"rope_grid": [5, 4]}, sizes=sizes)
    batch = {"images": torch.rand(2, 3, 8, 8) * 2 - 1, "labels": torch.tensor([0, 2])}
    seen: list[Any] = []
    real = LlamaGen.training_loss

    def note(self: Any, tokens: Tensor, inputs: Tensor, cond: Cond, rng: Rng, **more: Any) -> Any:
        seen.append((self.layout.grids[0], tokens.shape[1], tuple(cond.control.shape[-2:])))
        return real(self, tokens, inputs, cond, rng, **more)

    monkeypatch.setattr(LlamaGen, "training_loss", note)
    for seed in range(8):
        own(batch, "main", 0, 10, Rng.from_seed(seed, 2))["loss"].backward()
    assert len({grid for grid, *_ in seen}) > 3
    assert all(h * w == length and pixels == (2 * h, 2 * w) and length <= 10 for (h, w), length, pixels in seen)
    assert all(p.grad is not None for p in own.model.controller.parameters())
    own.eval()
    own.validate(batch, Rng.from_seed(0, 2))
    assert seen[-1] == ((4, 4), 16, (8, 8))
    for bad, message in (({**sizes, "step": 1}, "multiple of 2"), ({**sizes, "area": 96}, "at most 20")):
        with pytest.raises(ConfigError, match=message):
            objective(plain, model_overrides={"rope_grid": [5, 4]}, sizes=bad)
