"""Editing: what is kept, in tokens and in pixels; images and masks of any kind; models that see what is known."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from tests.test_models import GENERATORS, OF_IDS, liven, random_images, sampler_of, tiny_pair
from varkit import ClassToImagePipeline, NextGroupSampler, Rng
from varkit.heads.flow import Flow
from varkit.interfaces import Cond
from varkit.pipelines import canvas
from varkit.pipelines.canvas import feathered, mask_values, on_canvas, open_image, paste_back, place, read_image
from varkit.pipelines.edit import keep_coarse, keep_pyramid
from varkit.registry import model_entry

SIDE = 8


def quiet(pipe: Any) -> Any:
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture(scope="module", name="pipe")
def _pipe() -> ClassToImagePipeline:
    return quiet(ClassToImagePipeline(*tiny_pair("var_fashion"), NextGroupSampler(guidance_scale=2.0)))


def of(name: str) -> Any:
    model, tokenizer = tiny_pair(name)
    return quiet(ClassToImagePipeline(model, tokenizer, sampler_of(model)))


def photo(height: int, width: int, seed: int = 0) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


def marks(height: int, width: int, rows: slice = slice(0, 0), columns: slice = slice(None)) -> Image.Image:
    values = np.zeros((height, width), np.uint8)
    values[rows, columns] = 255
    return Image.fromarray(values)


def array(image: Image.Image) -> np.ndarray:
    return np.asarray(image).astype(int)


# ---- frames ---------------------------------------------------------------------------------------------------------


def test_where_the_canvas_lies() -> None:
    assert place((20, 30), (8, 8), "stretch").whole
    assert place((20, 30), (8, 8), "crop").window == (0, 5, 20, 25)
    assert place((20, 30), (8, 8), "pad").window == (-5, 0, 25, 30)
    assert place((20, 30), (4, 8), "crop").window == (2, 0, 17, 30)
    assert place((30, 20), (4, 8), "pad").window == (0, -20, 30, 40)
    grown = place((20, 20), (8, 8), "pad", (0, 0.5, 0, 0))
    assert grown.shown == (0, -10, 20, 20) and grown.window == (-5, -10, 25, 20)
    for fit in ("stretch", "crop", "pad"):  # of the canvas' own aspect ratio all three are the same
        assert place((16, 16), (8, 8), fit).whole


def test_a_window_repeats_the_edge_and_a_canvas_shows_it() -> None:
    image = Image.fromarray(np.repeat(np.array([[[10], [200]]], np.uint8), 3, 2))  # 1 x 2, dark and light
    padded = on_canvas(image, place((1, 2), (2, 2), "pad"), (2, 2))
    assert torch.equal(padded[:, 0], padded[:, 1]) and padded[0, 0].tolist() == pytest.approx(
        [10 / 127.5 - 1, 200 / 127.5 - 1]
    )
    values = torch.arange(6.0).view(1, 2, 3)
    assert canvas.look(values, (-1, 1, 3, 4)).tolist() == [[[1, 2, 2], [1, 2, 2], [4, 5, 5], [4, 5, 5]]]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (((4, 4), (8, 8), "cover"), "fit must be one of stretch, crop, pad; got 'cover'"),
        (((4, 4), (8, 8), "crop", 0.5), "fit='crop' would cut off what extend= adds"),
        (((4, 4), (8, 8), "pad", 3.0), "each from 0 to 2"),
        (((4, 4), (8, 8), "pad", (0, 1)), "one share or four"),
        (((4, 4), (8, 8), "pad", 0.01), "adds no pixel to an image of 4x4"),
    ],
)
def test_frames_that_cannot_be(arguments: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        place(*arguments)


def test_pasting_keeps_to_the_bit_and_takes_the_rest() -> None:
    original, alpha = torch.rand(3, 21, 30), torch.zeros(21, 30)
    alpha[3:9, 10:20] = 1
    for fit in ("stretch", "crop", "pad"):
        frame = place((21, 30), (8, 8), fit)
        drawn = torch.rand(3, 8, 8)
        out = paste_back(drawn, original, frame, alpha)
        assert torch.equal(out[:, alpha == 0], original[:, alpha == 0])
        assert not torch.isclose(out[:, alpha == 1], original[:, alpha == 1]).all(0).any()
    flat = paste_back(torch.full((3, 8, 8), 0.25), original, place((21, 30), (8, 8), "stretch"), torch.ones(21, 30))
    assert torch.allclose(flat, torch.tensor(0.25))
    same = torch.rand(3, 8, 8)
    assert torch.equal(paste_back(same, torch.rand(3, 8, 8), place((8, 8), (8, 8), "pad"), torch.ones(8, 8)), same)


@pytest.mark.parametrize(("side", "width"), [(40, 6), (1100, 80)])
def test_a_feather_fades_outwards_over_its_width(side: int, width: int) -> None:
    alpha = torch.zeros(side, side)
    alpha[:, side // 2 :] = 1
    soft = feathered(alpha, width)
    row = soft[side // 2]
    assert (row[side // 2 :] == 1).all() and (row.diff() >= -1e-6).all()
    assert (row[: side // 2 - width - 2] == 0).all() and 0.3 < row[side // 2 - width // 2] < 0.7
    assert torch.equal(feathered(alpha, 0), alpha)


# ---- images and masks of any kind ------------------------------------------------------------------------------------


def test_images_of_every_mode_are_read() -> None:
    grey = np.linspace(0, 255, 64).astype(np.uint8).reshape(8, 8)
    rgb = Image.fromarray(grey)
    expected = array(rgb.convert("RGB"))
    opaque = rgb.convert("LA")
    for image in (rgb, rgb.convert("RGB"), rgb.convert("P"), opaque, rgb.convert("RGBA"), rgb.convert("CMYK")):
        assert np.abs(array(read_image(image)) - expected).max() <= 1, image.mode
    assert np.array_equal(array(read_image(Image.fromarray(grey.astype(np.uint16) * 257))), expected)
    assert set(np.unique(array(read_image(rgb.convert("1"))))) == {0, 255}
    opaque.putalpha(0)
    assert (array(read_image(opaque)) == 255).all()  # what is transparent lies on white
    with pytest.raises(ValueError, match="float images have no fixed range"):
        read_image(Image.fromarray(grey.astype(np.float32)))


def test_masks_of_every_mode_are_read() -> None:
    half = marks(4, 6, slice(0, 2))
    expected = torch.zeros(4, 6)
    expected[:2] = 1
    wide = Image.fromarray(np.asarray(half).astype(np.uint16) * 257)
    unit = Image.fromarray(np.asarray(half, np.float32) / 255)
    for mode in ("1", "L", "P", "RGB", "RGBA", "LA", "CMYK"):
        assert torch.equal(mask_values(half.convert(mode)), expected), mode
    for mask in (wide, unit, expected, expected.bool(), expected[None, None]):
        assert torch.equal(mask_values(mask), expected)
    painted = Image.new("RGBA", (6, 4), (255, 255, 255, 0))
    painted.paste((255, 255, 255, 255), (0, 0, 6, 2))
    assert torch.equal(mask_values(painted), expected)  # what is transparent is kept
    turned = half.transpose(Image.Transpose.ROTATE_90)
    exif = turned.getexif()
    exif[0x0112] = 6
    assert torch.equal(mask_values(turned), expected)
    for bad, message in ((torch.zeros(2, 3, 4), r"must be \(H, W\)"), (torch.full((2, 2), torch.nan), r"in \[0, 1\]")):
        with pytest.raises(ValueError, match=message):
            mask_values(bad)


def test_files_that_are_no_image_to_edit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    moving = tmp_path / "a.gif"
    photo(4, 5).quantize(8).save(moving, save_all=True, append_images=[photo(4, 5, 1).quantize(8)])
    with Image.open(moving) as file:
        assert file.n_frames == 2
        assert np.array_equal(array(read_image(open_image(moving))), array(file.convert("RGB")))
    sideways = Image.Exif()
    sideways[0x0112] = 6
    photo(4, 6).save(tmp_path / "b.png", exif=sideways)
    assert open_image(tmp_path / "b.png").size == (4, 6)
    (tmp_path / "c.png").write_bytes((tmp_path / "b.png").read_bytes()[:60])
    (tmp_path / "d.png").write_text("no image")
    for name in ("c.png", "d.png"):
        with pytest.raises(ValueError, match=f"{name} is not an image that can be read"):
            open_image(tmp_path / name)
    with pytest.raises(FileNotFoundError):
        open_image(tmp_path / "e.png")
    monkeypatch.setattr(canvas, "MAX_PIXELS", 20)
    with pytest.raises(ValueError, match=r"b.png has 6 x 4 pixels; 1 to 20 are edited"):
        open_image(tmp_path / "b.png")
    for limit in (20, 5):  # between one and two times Pillow's limit it warns, above it raises
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", limit)
        with pytest.raises(ValueError, match="far more than the 20 pixels"):
            open_image(tmp_path / "b.png")
    with pytest.raises(ValueError, match="the image has 5 x 5 pixels"):
        read_image(photo(5, 5))


# ---- edits ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", GENERATORS)
def test_every_model_of_a_grid_pastes_back_into_the_image(name: str) -> None:
    model, tokenizer = tiny_pair(name)
    if model.condition != "class" or len(tokenizer.layout.grids[-1]) != 2:
        pytest.skip("not of classes, or tokens without places")
    if type(model).sampler == "DistilledSampler":
        pytest.skip("draws from noise alone")
    pipe, image = of(name), photo(19, 26)
    out = pipe.edit(image, box=(0, 0, 0.5, 0.5), class_labels=1, paste_back=True, fit="pad", seed=0)
    (after,) = out.images
    assert after.size == image.size and out.class_labels == [1] and "note" not in out.stats
    changed = (array(after) != array(image)).any(-1)
    assert not changed[10:].any() and not changed[:, 13:].any() and changed[:10, :13].mean() > 0.5


def test_the_size_and_the_kept_pixels_are_those_of_the_image(pipe: Any) -> None:
    image, mask = photo(30, 50), marks(30, 50, slice(5, 20), slice(20, 40))
    for fit in ("stretch", "crop", "pad"):
        small = pipe.edit(image, mask=mask, fit=fit, seed=0).images[0]
        assert small.size == (SIDE, SIDE)
        after = pipe.edit(image, mask=mask, fit=fit, paste_back=True, seed=0).images[0]
        kept = np.asarray(mask) == 0
        assert after.size == (50, 30) and np.array_equal(array(after)[kept], array(image)[kept])
        assert (array(after)[~kept] != array(image)[~kept]).any(-1).mean() > 0.9
        soft = pipe.edit(image, mask=mask, fit=fit, paste_back=True, feather=0.2, seed=0).images[0]
        assert (
            np.array_equal(array(soft)[~kept], array(after)[~kept]) and (array(soft)[kept] != array(image)[kept]).any()
        )
        assert np.array_equal(array(soft)[28:], array(image)[28:])  # further than 0.2 * 30 pixels


def test_a_soft_mask_is_blended_and_its_tokens_go_by_the_threshold(pipe: Any) -> None:
    image = photo(SIDE, SIDE)
    for level, threshold, drawn in ((0.4, 0.5, False), (0.6, 0.5, True), (0.4, 0.3, True), (0.6, 0.7, False)):
        mask = torch.zeros(SIDE, SIDE)
        mask[:4] = level
        out = pipe.edit(image, mask=mask, threshold=threshold, paste_back=True, output_type="pt", seed=0)
        assert (out.stats["steps"] > 0) == drawn
    whole = pipe.edit(image, mask=(mask > 0).float(), threshold=0.3, output_type="pt", seed=0).images[0]
    out = pipe.edit(image, mask=mask, threshold=0.3, paste_back=True, output_type="pt", seed=0).images[0]
    before = torch.from_numpy(array(image)).permute(2, 0, 1) / 255
    assert torch.equal(out[:, 4:], before[:, 4:])
    torch.testing.assert_close(out[:, :4], torch.lerp(before, whole, 0.6)[:, :4])


def test_out_painting_grows_the_image_around_what_it_is(pipe: Any) -> None:
    image = photo(20, 20)
    out = pipe.edit(image, extend=0.5, paste_back=True, seed=0).images[0]
    assert out.size == (40, 40) and np.array_equal(array(out)[10:30, 10:30], array(image))
    assert array(out)[:8].std() > 0
    side = pipe.edit(image, extend=(0, 0, 0, 1.0), paste_back=True, seed=0).images[0]
    assert side.size == (40, 20) and np.array_equal(array(side)[:, :20], array(image))
    inside = pipe.edit(image, extend=0.5, seed=0, output_type="latent").images
    small = on_canvas(image, place((20, 20), (SIDE, SIDE), "pad", 0.5), (SIDE, SIDE))
    given = pipe.image_tokenizer.encode(small[None])
    kept = torch.zeros(4, 4)
    kept[1:3, 1:3] = 1
    kept = keep_pyramid(pipe.image_tokenizer.layout, kept)
    assert torch.equal(inside[:, kept], given[:, kept]) and not torch.equal(inside[:, ~kept], given[:, ~kept])
    tensor = random_images(pipe.image_tokenizer, 2)
    both = pipe.edit(tensor, extend=0.5, paste_back=True, output_type="pt", seed=0).images
    assert both.shape == (2, 3, 16, 16)
    torch.testing.assert_close(both[:, :, 4:12, 4:12], tensor / 2 + 0.5)
    masked = pipe.edit(image, mask=marks(20, 20, slice(0, 10)), extend=0.5, paste_back=True, seed=0).images[0]
    assert np.array_equal(array(masked)[20:30, 10:30], array(image)[10:])
    assert (array(masked)[10:20, 10:30] != array(image)[:10]).any(-1).mean() > 0.5


@pytest.mark.parametrize("name", ["var_fashion", "flowar_s", "mar_b", "xar_b"])
def test_everything_marked_is_plain_generation_and_nothing_is_the_image(name: str) -> None:
    pipe = of(name)
    image = photo(*pipe.image_tokenizer.image_size)
    everything = pipe.edit(image, box=(0, 0, 1, 1), class_labels=2, seed=4, output_type="pt")
    assert torch.equal(everything.images, pipe(2, seed=4, output_type="pt").images)
    assert everything.stats["note"].startswith("everything is marked")
    nothing = pipe.edit(image, mask=marks(9, 9), class_labels=2, num_images_per_prompt=2, seed=4, output_type="pt")
    read = on_canvas(
        image, place(image.size[::-1], pipe.image_tokenizer.image_size, "stretch"), pipe.image_tokenizer.image_size
    )
    back = pipe.to_images(pipe.image_tokenizer.encode(read[None]), "pt")
    torch.testing.assert_close(nothing.images, back.detach().repeat(2, 1, 1, 1), atol=1e-5, rtol=0)
    assert nothing.class_labels == [2, 2]
    assert nothing.stats["steps"] == 0 and nothing.stats["note"].startswith("nothing is marked")
    pasted = pipe.edit(image, mask=marks(9, 9), paste_back=True, feather=0.3).images[0]
    assert np.array_equal(array(pasted), array(image))


def test_a_mask_that_reaches_no_token_is_said(pipe: Any, caplog: pytest.LogCaptureFixture) -> None:
    image = photo(40, 80)
    corner = marks(40, 80, slice(0, 3), slice(0, 3))
    assert pipe.edit(image, mask=corner, seed=0).stats["note"].startswith("no token is redrawn")
    assert "no token is redrawn" in caplog.text
    beside = marks(40, 80, slice(0, 40), slice(0, 15))  # left of what a crop shows
    out = pipe.edit(image, mask=beside, fit="crop", paste_back=True, seed=0)
    assert "fit='crop'" in out.stats["note"] and np.array_equal(array(out.images[0]), array(image))
    assert "note" not in pipe.edit(image, mask=corner, threshold=0.01, seed=0).stats


def test_masks_of_another_size_are_stretched_over_the_image(pipe: Any) -> None:
    image, half = photo(24, 40), torch.tensor([[1.0, 0.0], [1.0, 0.0]])
    for fit in ("stretch", "crop", "pad"):
        small = pipe.edit(image, mask=half, fit=fit, paste_back=True, seed=0).images[0]
        large = pipe.edit(
            image, mask=marks(24, 40, slice(None), slice(0, 20)), fit=fit, paste_back=True, seed=0
        ).images[0]
        boxed = pipe.edit(image, box=(0, 0, 1, 0.5), fit=fit, paste_back=True, seed=0).images[0]
        assert np.array_equal(array(small), array(large)) and np.array_equal(array(small), array(boxed))


def test_images_and_masks_of_several_sizes_in_one_call(pipe: Any) -> None:
    images, masks = [photo(20, 30), photo(16, 16, 1)], [marks(20, 30, slice(0, 10)), marks(4, 4, slice(2, 4))]
    both = pipe.edit(images, mask=masks, fit="pad", paste_back=True, num_images_per_prompt=2, rng=Rng.from_seed(0, 4))
    assert [i.size for i in both.images] == [(30, 20)] * 2 + [(16, 16)] * 2
    for n, (image, mask) in enumerate(zip(images, masks, strict=True)):
        one = pipe.edit(
            image, mask=mask, fit="pad", paste_back=True, num_images_per_prompt=2, rng=Rng.from_seed(0, 2, 2 * n)
        )
        for a, b in zip(one.images, both.images[2 * n : 2 * n + 2], strict=True):
            assert np.array_equal(array(a), array(b))
    with pytest.raises(ValueError, match="2 images but 3 masks"):
        pipe.edit(images, mask=[*masks, masks[0]])
    with pytest.raises(ValueError, match="each image its own size: take output_type='pil'"):
        pipe.edit(images, mask=masks, paste_back=True, output_type="np", seed=0)


# ---- variations -----------------------------------------------------------------------------------------------------


def test_a_variation_keeps_the_coarse_scales(pipe: Any) -> None:
    images, layout = random_images(pipe.image_tokenizer, 1), pipe.image_tokenizer.layout
    given = pipe.image_tokenizer.encode(images)
    for strength, kept in ((1 / 3, 5), (0.5, 1), (2 / 3, 1), (0.9, 0)):
        tokens = pipe.edit(images, strength=strength, class_labels=1, seed=0, output_type="latent").images
        assert keep_coarse(layout, strength, False).sum() == kept
        assert torch.equal(tokens[:, :kept], given[:, :kept]) and not torch.equal(tokens[:, kept:], given[:, kept:])
    plain = pipe(1, seed=0, output_type="latent").images
    assert torch.equal(pipe.edit(images, strength=1.0, class_labels=1, seed=0, output_type="latent").images, plain)
    same = pipe.edit(images, strength=0.0, seed=0)
    assert same.stats["steps"] == 0
    under = pipe.edit(images, box=(0, 0, 0.5, 1), strength=1 / 3, seed=0, output_type="latent").images
    assert torch.equal(under[:, :5], given[:, :5]) and torch.equal(under[:, 13:], given[:, 13:])
    assert not torch.equal(under[:, 5:13], given[:, 5:13])


def test_a_variation_of_ordered_tokens_keeps_the_first() -> None:
    model, tokenizer = tiny_pair(
        next(
            n
            for n in GENERATORS
            if n.startswith("flextok") and model_entry(n).build(**model_entry(n).tiny).condition == "class"
        )
    )
    pipe = quiet(ClassToImagePipeline(model, tokenizer, sampler_of(model)))
    images = random_images(tokenizer, 1)
    given, length = tokenizer.encode(images), tokenizer.layout.length
    tokens = pipe.edit(images, strength=0.5, seed=0, output_type="latent").images
    assert torch.equal(tokens[:, : length // 2], given[:, : length // 2]) and not torch.equal(tokens, given)
    with pytest.raises(ValueError, match=r"have no places in the image .*strength= alone"):
        pipe.edit(images, box=(0, 0, 1, 0.5))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({}, "exactly one of mask= and box=, or neither with extend="),
        ({"strength": 1.5}, r"strength must be in \[0, 1\]"),
        ({"box": (0, 0, 1, 0.5), "threshold": 0.0}, r"threshold must be in \(0, 1\]"),
        ({"box": (0, 0, 1, 0.5), "feather": 0.1}, "it goes with paste_back=True"),
        ({"box": (0, 0, 1, 0.5), "paste_back": True, "feather": 0.7}, r"feather must be in \[0, 0.5\]"),
        (
            {"box": (0, 0, 1, 0.5), "paste_back": True, "output_type": "latent"},
            "leave it out with output_type='latent'",
        ),
        ({"box": (0, 0, 1, 0.5), "fit": "cover"}, "fit must be one of"),
        ({"box": (0, 0, 1, 0.5), "mask": torch.ones(4, 4)}, "exactly one of mask= and box="),
    ],
)
def test_edits_that_cannot_be_are_refused(pipe: Any, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        pipe.edit(photo(8, 8), **settings)


def test_equally_fine_tokens_have_no_variations() -> None:
    pipe = of("llamagen_b")
    with pytest.raises(ValueError, match="tokens of this model are all equally fine; give mask= or box="):
        pipe.edit(random_images(pipe.image_tokenizer, 1), strength=0.5)


# ---- what the drawn tokens see --------------------------------------------------------------------------------------


def drawn(name: str, given: Tensor, keep: Tensor, **settings: Any) -> tuple[Tensor, Any]:
    model, tokenizer = tiny_pair(name)
    liven(model)
    sampler = sampler_of(model)
    cond = Cond(torch.zeros(len(given), dtype=torch.int64))
    out = sampler.generate(tokenizer, model, cond, Rng.from_seed(0, len(given)), known=(given, keep), **settings)
    return out.tokens, out


@pytest.mark.parametrize("name", ["rar_b", "mar_b", "xar_b", "flowar_s"])
def test_what_is_drawn_depends_on_known_tokens_behind_it(name: str) -> None:
    """The last position is known and another one each time: earlier ones must notice, where the model can see it."""
    name = next(n for n in GENERATORS if n.startswith(name[:3]))
    layout = tiny_pair(name)[0].layout
    keep = torch.zeros(layout.length, dtype=torch.bool)
    keep[-1] = True
    shape = (1, layout.length) if name in OF_IDS else (1, layout.length, layout.dim)
    one = torch.zeros(shape, dtype=torch.int64) if name in OF_IDS else torch.zeros(shape)
    other = one + 5 if name in OF_IDS else one + 3.0
    (a, _), (b, _) = drawn(name, one, keep), drawn(name, other, keep)
    assert torch.equal(a[:, -1], one[:, -1]) and torch.equal(b[:, -1], other[:, -1])
    assert not torch.equal(a[:, :-1], b[:, :-1])


def test_raster_models_do_not_see_what_comes_later() -> None:
    layout = tiny_pair("llamagen_b")[0].layout
    keep = torch.zeros(layout.length, dtype=torch.bool)
    keep[-1] = True
    (a, _), (b, _) = (drawn("llamagen_b", torch.full((1, layout.length), i), keep) for i in (0, 5))
    assert torch.equal(a[:, :-1], b[:, :-1])


def test_rar_reads_known_tokens_first_unless_an_order_is_asked_for() -> None:
    name = next(n for n in GENERATORS if n.startswith("rar"))
    model, _ = tiny_pair(name)
    length = model.layout.length
    given = torch.randint(0, 24, (2, length), generator=torch.Generator().manual_seed(0))
    keep = torch.zeros(length, dtype=torch.bool)
    keep[[1, 4, length - 1]] = True
    tokens, out = drawn(name, given, keep)
    assert torch.equal(tokens[:, keep], given[:, keep]) and not torch.equal(tokens, given)
    assert out.steps == length - 3 and out.network_calls == length - 2
    order = torch.cat([torch.arange(length)[keep], torch.arange(length)[~keep]])
    predictive = model_logits(name, tokens, order)
    best, _ = drawn(name, given, keep, top_k=1)
    assert torch.equal(
        model_logits(name, best, order).argmax(-1)[:, 3:], best[:, order][:, 3:]
    )  # teacher forcing agrees
    assert predictive.shape[1] == length
    raster, plain = drawn(name, given, keep, order="raster")
    assert plain.steps == length and torch.equal(raster[:, keep], given[:, keep])
    everything, out = drawn(name, given, torch.ones(length, dtype=torch.bool))
    assert torch.equal(everything, given) and out.steps == 0


def model_logits(name: str, tokens: Tensor, order: Tensor) -> Tensor:
    model: Any = tiny_pair(name)[0]
    liven(model)
    with torch.no_grad():
        labels = torch.zeros(len(tokens), dtype=torch.int64)
        return model.sequence_logits(tokens[:, order][:, :-1], labels, order[None].expand(len(tokens), -1))[0]


@pytest.mark.parametrize("solver", ["euler", "heun", "euler-jump", "sde"])
def test_a_flow_shows_known_latents_at_their_noise(solver: str) -> None:
    """A velocity that carries all to the mean of what it is shown: with half known, the other half ends near it."""
    seen: list[Tensor] = []

    def velocity(x: Tensor, t: Tensor) -> Tensor:
        seen.append(x[:, 1] - (1 - t)[:, None] * 2.0)  # t * noise, if the known latent, 2, is shown at its noise
        return (x - 2.0) / t.clamp_min(1e-3)[:, None, None]

    flow = Flow(velocity, 3)
    given, keep = torch.full((2, 2, 3), 2.0), torch.tensor([[False, True]] * 2)
    flow.known = (given, keep)
    flow.sample(Rng.from_seed(0, 2), torch.arange(2), num_steps=5, solver=solver)
    noise = seen[0]
    times = [float((s / noise).mean()) for s in seen]
    assert times[0] == 1 and times == sorted(times, reverse=True)
    assert all(torch.allclose(s, t * noise, atol=1e-5) for s, t in zip(seen, times, strict=True))
