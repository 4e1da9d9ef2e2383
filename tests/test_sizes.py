"""Images of sizes a model was not trained for: the same weights at other grids."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor
from typer.testing import CliRunner

from tests.test_models import GENERATORS, random_images, sampler_of, tiny_pair
from varkit import ClassToImagePipeline, NextGroupSampler, Rng
from varkit.cli import app
from varkit.interfaces import Cond
from varkit.layout import grids_for

ABLE = ["var_fashion", next(n for n in GENERATORS if n.startswith("llamagen"))]
"""Those that take other sizes."""


def of(name: str, **settings: Any) -> Any:
    model, tokenizer = tiny_pair(name)
    pipe = ClassToImagePipeline(model, tokenizer, sampler_of(model, **settings))
    pipe.set_progress_bar_config(disable=True)
    return pipe


def test_scales_keep_their_share_of_the_finest() -> None:
    trained = tuple((n, n) for n in (1, 2, 3, 4, 5, 6, 8, 10, 13, 16))
    assert grids_for(trained, (16, 16)) == trained
    wide = grids_for(trained, (12, 21))
    assert wide[0] == (1, 1) and wide[-1] == (12, 21) and wide[5] == (4, 8)
    assert all(a[0] <= b[0] and a[1] <= b[1] for a, b in pairwise(wide))
    areas = [h * w / n[0] ** 2 for (h, w), n in zip(wide, trained, strict=True)]
    assert all(0.6 < area < 1.6 for area in areas)
    assert grids_for(((4, 6),), (3, 9)) == ((3, 9),)
    assert grids_for(trained, (2, 32))[1] == (1, 4)  # no side below one


@pytest.mark.parametrize("name", ABLE)
def test_the_native_size_is_the_same_to_the_bit(name: str) -> None:
    pipe = of(name)
    height, width = pipe.image_tokenizer.image_size
    assert pipe.at_size(height, width) is pipe and pipe.at_size() is pipe
    plain, sized = (
        pipe([0, 1], seed=3, output_type="pt", **s).images for s in ({}, {"height": height, "width": width})
    )
    assert torch.equal(plain, sized)
    state = {k: v.clone() for k, v in pipe.transformer.state_dict().items()}
    layout = pipe.transformer.layout
    pipe([0], seed=0, height=height, width=2 * width)  # leaves no trace
    assert pipe.transformer.layout == layout == pipe.image_tokenizer.layout
    assert all(torch.equal(v, state[k]) for k, v in pipe.transformer.state_dict().items())
    assert torch.equal(pipe([0, 1], seed=3, output_type="pt").images, plain)


@pytest.mark.parametrize("name", ABLE)
def test_another_size_is_drawn_by_the_same_weights(name: str) -> None:
    pipe = of(name)
    height, width = pipe.image_tokenizer.image_size
    out = pipe([0, 2], seed=0, height=height // 2, width=2 * width, output_type="pt")
    assert out.images.shape == (2, 3, height // 2, 2 * width) and out.images.std() > 0
    alone = pipe([2], rng=Rng.from_seed(0, 1, 1), height=height // 2, width=2 * width, output_type="pt").images
    torch.testing.assert_close(alone, out.images[1:], atol=1e-3, rtol=0)
    sized = pipe.at_size(height // 2, 2 * width)
    assert sized.transformer.layout == sized.image_tokenizer.layout != pipe.transformer.layout
    ours = {p.data_ptr() for p in pipe.transformer.parameters()}
    own = [n for n, p in sized.transformer.named_parameters() if p.data_ptr() not in ours]
    assert own == (["pos_1LC"] if name.startswith("var") else [])
    assert pipe([0], seed=0, width=2 * width).images[0].size == (2 * width, height)
    assert sized.at_size(height // 2, 2 * width) is sized


@pytest.mark.parametrize("name", ABLE)
def test_sampling_at_another_size_equals_teacher_forcing(name: str) -> None:
    """Greedy tokens are the best of what one teacher-forced pass says, for every position."""
    pipe = of(name)
    height, width = pipe.image_tokenizer.image_size
    sized = pipe.at_size(height * 3 // 2, width)
    model, tokenizer, cond = sized.transformer, sized.image_tokenizer, Cond(torch.tensor([0, 1, 2]))
    tokens = NextGroupSampler(top_k=1).generate(tokenizer, model, cond, Rng.from_seed(0, 3)).tokens
    inputs: Tensor = (
        model.tokenizer_for(tokenizer).embed(tokens) if not name.startswith("var") else tokenizer.quantize.embed(tokens)
    )
    with torch.no_grad():
        logits = model.teacher_forced(inputs, cond).logits
    assert (
        torch.equal(logits.argmax(-1), tokens)
        and tokens.shape[1] == model.layout.length != pipe.transformer.layout.length
    )
    assert tokenizer.decode(tokens).shape == (3, 3, height * 3 // 2, width)


def test_positions_are_interpolated_scale_by_scale() -> None:
    model: Any = tiny_pair("var_fashion")[0]  # scales 1, 2, 4
    with torch.no_grad():  # a position embedding that is a ramp over columns
        for grid, part in zip(model.layout.grids, model.layout.slices, strict=True):
            ramp = (torch.arange(grid[1]) + 0.5) / grid[1]
            model.pos_1LC[:, part] = ramp.repeat(grid[0])[None, :, None]
    wide = model.resized((4, 8))
    assert wide.layout.grids == ((1, 1), (2, 4), (4, 8)) and wide.config.scales == ((1, 1), (2, 4), (4, 8))
    assert torch.equal(wide.pos_1LC[:, 0], model.pos_1LC[:, 0]) and wide.levels.tolist() == [0] + [1] * 8 + [2] * 32
    row = wide.pos_1LC[0, -8:, 0]
    assert torch.allclose(row, (torch.arange(8) + 0.5) / 8, atol=0.04) and (row.diff() > 0).all()
    half = model.resized((2, 2))
    assert half.layout.grids == ((1, 1), (1, 1), (2, 2)) and half.pos_1LC.shape[1] == half.layout.length


def test_an_edit_at_another_size_keeps_an_image_as_it_is() -> None:
    pipe = of("var_fashion")
    image = Image.effect_noise((32, 16), 80).convert("RGB")
    out = pipe.edit(image, box=(0, 0, 1, 0.5), height=8, width=16, seed=0)
    assert out.images[0].size == (16, 8)
    tokens = pipe.edit(image, box=(0, 0, 1, 0.5), height=8, width=16, seed=0, output_type="latent").images
    assert tokens.shape[1] == 1 + 8 + 32
    tensor = random_images(pipe.at_size(8, 16).image_tokenizer, 1)
    kept = pipe.edit(tensor, box=(0, 0, 1, 0.5), height=8, width=16, seed=0, output_type="latent").images
    given = pipe.at_size(8, 16).image_tokenizer.encode(tensor)
    right = [9 + 8 * row + column for row in range(4) for column in range(4, 8)]
    assert torch.equal(kept[:, right], given[:, right])


@pytest.mark.parametrize(
    ("size", "message"),
    [
        ((9, 8), "multiples of 2 and 2, what a token covers; got 9x8, nearest is 8x8"),
        ((0, 8), "must be multiples"),
        ((32, 18), "32x18 are 144 tokens; VAR was trained on 16, and draws 4 to 64"),
        ((2, 4), "are 2 tokens"),
    ],
)
def test_sizes_out_of_reach_are_refused(size: tuple[int, int], message: str) -> None:
    pipe = of("var_fashion")
    with pytest.raises(ValueError, match=message):
        pipe([0], height=size[0], width=size[1])


@pytest.mark.parametrize("name", GENERATORS)
def test_models_that_cannot_say_why(name: str) -> None:
    model, tokenizer = tiny_pair(name)
    if model.condition != "class" or name.startswith(("var", "llamagen", "controlar")):
        pytest.skip("not of classes, or it can")
    pipe = ClassToImagePipeline(model, tokenizer, sampler_of(model))
    height, width = tokenizer.image_size
    with pytest.raises(ValueError, match=r"draws this size alone|no places in the image|draws .* tokens alone"):
        pipe([0], height=height, width=2 * width)


def test_the_command_takes_a_size(tmp_path: Path) -> None:
    of("var_fashion").save_pretrained(tmp_path / "m")

    def run(*options: str) -> Any:
        out = ["--class", "1", "--num", "1", "--json", "--out", str(tmp_path / "a.png")]
        return CliRunner().invoke(app, ["sample", str(tmp_path / "m"), *out, *options])

    result = run("--size", "8x16")
    assert result.exit_code == 0, result.output
    assert json.loads(result.output.splitlines()[-1])["settings"]["width"] == 16
    with Image.open(tmp_path / "a.png") as image:
        assert image.size == (20, 12)  # with the margin of the grid
    for size, message in (("8", "--size must be HEIGHTxWIDTH"), ("9x8", "nearest is 8x8"), ("64x64", "draws 4 to 64")):
        result = run("--size", size)
        assert result.exit_code == 2 and message in result.output
