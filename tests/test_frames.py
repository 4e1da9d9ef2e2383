"""Clips by a tokenizer of images, frame by frame."""

import pytest
import torch

from tests.test_models import liven, random_images, random_tokens, tiny
from varkit.pipelines.auto import open_tokenizer
from varkit.registry import create_model, model_entry
from varkit.rng import Rng
from varkit.tokenizers.frames import FrameTokenizer

TINY = model_entry("frames_vq_fashion").tiny


def test_it_is_the_image_tokenizer_on_each_frame() -> None:
    model = tiny("frames_vq_fashion")
    clips = random_images(model, 2)
    each = [model.frame.encode(clips[:, :, t]) for t in range(clips.shape[2])]
    tokens = model.encode(clips)
    assert model.layout.grids == ((3, 4, 4),) and torch.equal(tokens, torch.cat(each, 1))
    frames = [model.frame.decode(t) for t in each]
    torch.testing.assert_close(model.decode(tokens), torch.stack(frames, 2), atol=1e-4, rtol=0)


def test_first_frames_have_the_first_tokens() -> None:
    model = tiny("frames_vq_fashion")
    clips = random_images(model, 2)
    for count in (1, 2, 3):
        start = model.encode_start(clips[:, :, :count])
        assert start.shape == (2, 16 * count) and torch.equal(start, model.encode(clips)[:, : 16 * count])
        assert model.decode(start).shape == (2, 3, count, *model.image_size)


def test_latents_of_frames_draw_their_own_noise() -> None:
    kl = create_model("kl_vae_fashion", **model_entry("kl_vae_fashion").tiny)
    model = FrameTokenizer.around(liven(kl, 0.05), 2)
    clip = random_images(kl, 1)[:, :, None].expand(-1, -1, 2, -1, -1)
    first, second = model.encode(clip, Rng.from_seed(0, 1)).chunk(2, 1)
    assert not torch.equal(first, second)
    both = model.encode(clip.expand(2, -1, -1, -1, -1), Rng.from_seed(0, 2))
    torch.testing.assert_close(both[:1], torch.cat([first, second], 1), atol=1e-5, rtol=1e-5)  # at any batch size


@pytest.mark.parametrize("kind", ["ids", "latents"])
def test_of_scales_each_comes_with_all_frames(kind: str) -> None:
    """Tokens, what is read of them, step by step too, and first frames: what the tokenizer of images says of each."""
    image = tiny("multiscale_vq_fashion" if kind == "ids" else "latent_pyramid_fashion")
    model, (count, frames) = FrameTokenizer.around(image, 3), (2, 3)
    clips = random_images(model, count)
    each = [image.encode(clips[:, :, t]) for t in range(frames)]
    tokens, sizes = model.encode(clips), image.layout.sizes
    assert model.layout.grids == tuple((3, *grid) for grid in image.layout.grids)

    def by_scale(of_frames: list[torch.Tensor]) -> torch.Tensor:
        scales = zip(*[frame.split(sizes, 1) for frame in of_frames], strict=True)
        return torch.cat([part for scale in scales for part in scale], 1)

    close = {"atol": 1e-5, "rtol": 1e-4}  # sums of more rows at once round otherwise
    torch.testing.assert_close(tokens, by_scale(each), **close)
    read = model.embed(tokens)
    torch.testing.assert_close(read, by_scale([image.embed(frame) for frame in each]), **close)
    decoded = torch.stack([image.decode(frame) for frame in each], 2)
    torch.testing.assert_close(model.decode(tokens), decoded, atol=1e-4, rtol=0)
    running = model.running(count)
    for part in model.layout.slices:
        where = torch.arange(part.start, part.stop)
        torch.testing.assert_close(running.inputs(where), read[:, part], **close)
        running.record(tokens[:, part], where)
    for first in (1, 2):
        start = model.encode_start(clips[:, :, :first])
        torch.testing.assert_close(start, by_scale(each[:first]), **close)
        torch.testing.assert_close(start, tokens[:, model.start_positions(start.shape[1])], **close)
        torch.testing.assert_close(model.decode(start), decoded[:, :, :first], atol=1e-4, rtol=0)


def test_a_tokenizer_of_images_opens_for_clips(tmp_path) -> None:  # type: ignore[no-untyped-def]
    image = tiny("frames_vq_fashion").frame
    image.save_pretrained(tmp_path / "image")
    opened = open_tokenizer(str(tmp_path / "image"), num_frames=5)
    assert isinstance(opened, FrameTokenizer) and opened.num_frames == 5
    opened.save_pretrained(tmp_path / "clips")
    assert open_tokenizer(str(tmp_path / "clips")).num_frames == 5
    assert open_tokenizer(str(tmp_path / "clips"), num_frames=7).num_frames == 7
    tiny("magvit2_moving_fashion").save_pretrained(tmp_path / "causal")
    assert open_tokenizer(str(tmp_path / "causal"), num_frames=9).num_frames == 9
    with pytest.raises(ValueError, match="cannot code clips of 6 frames"):
        open_tokenizer(str(tmp_path / "causal"), num_frames=6)
    tiny("larp_tokenizer_moving_fashion").save_pretrained(tmp_path / "larp")
    with pytest.raises(ValueError, match="codes clips of 4 frames alone, not of 6"):
        open_tokenizer(str(tmp_path / "larp"), num_frames=6)


def test_around_shares_the_weights_and_saves_them(tmp_path) -> None:  # type: ignore[no-untyped-def]
    model = tiny("frames_vq_fashion")
    again = FrameTokenizer.around(model.frame, 5)
    assert again.frame is model.frame and again.num_frames == 5 and not again.training
    again.save_pretrained(tmp_path)
    opened = FrameTokenizer.from_pretrained(tmp_path)
    ids = random_tokens(again, 1)
    assert torch.equal(opened.decode(ids), again.decode(ids))


def test_bad_arguments() -> None:
    with pytest.raises(ValueError, match="at least 1"):
        create_model("frames_vq_fashion", **{**TINY, "num_frames": 0})
    with pytest.raises(ValueError, match="no model class 'VQGAM'"):
        FrameTokenizer("VQGAM")
    with pytest.raises(ValueError, match="must be a tokenizer of images"):
        FrameTokenizer("FrameTokenizer")
    model = tiny("frames_vq_fashion")
    with pytest.raises(ValueError, match="1 to 3; got 4"):
        model.encode_start(torch.zeros(1, 3, 4, *model.image_size))
    with pytest.raises(ValueError, match="got 17 tokens; 3 frames have 16 each"):
        model.decode(torch.zeros(1, 17, dtype=torch.int64))
