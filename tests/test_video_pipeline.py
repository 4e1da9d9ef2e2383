"""Clips of classes and first frames: the pipeline, its windows, what it takes and gives, and files of clips."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from tests.test_models import liven, tiny_pair
from varkit import AutoPipeline, NextGroupSampler, Rng
from varkit.data.video import open_videos
from varkit.data.video_writing import write_video
from varkit.interfaces import Tokenizer
from varkit.model_card import model_card
from varkit.pictures import read_settings
from varkit.pipelines.auto import assemble
from varkit.pipelines.class_to_video import ClassToVideoPipeline
from varkit.pipelines.clips import generate_clips, read_frames, summed
from varkit.registry import model_entry

NAMES = {"0": "Boot", "1": "Coat", "2": "Bag"}
FRAMES, SIDE, EACH = 4, 8, 16
"""Of a window: frames, pixels a side, tokens of a frame."""


def parts(frames: int = FRAMES) -> tuple[Any, Any]:
    """Next-token prediction of the ids of all frames, each coded by itself."""
    tokenizer = tiny("frames_vq_fashion", num_frames=frames)
    transformer = tiny("llamagen_fashion", grid=(frames * 4, 4), num_classes=3, **of(tokenizer))
    transformer.layout = tokenizer.layout  # its places are those of frames one below the other
    return transformer, tokenizer


def tiny(name: str, **changes: Any) -> Any:
    """As `tests.test_models.tiny`, with other arguments."""
    entry = model_entry(name)
    torch.manual_seed(0)
    return liven(entry.build(**{**entry.tiny, **changes}), 0.2 if entry.kind == "generator" else 0.05)


def of(tokenizer: Any) -> dict[str, int]:
    return {"codebook_size": tokenizer.layout.codebook_size, "latent_dim": tokenizer.layout.dim}


@pytest.fixture(scope="module", name="pipe")
def _pipe() -> ClassToVideoPipeline:
    pipe = ClassToVideoPipeline(*parts(), NextGroupSampler(guidance_scale=2.0, top_p=0.9), NAMES)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def clip(pipe: Any, frames: int = 2, seed: int = 5, count: int = 1) -> Tensor:
    """Bytes (B, T, H, W, 3) that the pipeline is given."""
    size = (count, frames, *pipe.image_tokenizer.image_size, 3)
    return torch.randint(0, 256, size, generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)


def as_bytes(pt: Tensor) -> Tensor:
    """(B, T, 3, H, W) in [0, 1] -> uint8 (B, T, H, W, 3)."""
    return (pt * 255).round().to(torch.uint8).permute(0, 1, 3, 4, 2)


# ---- calls --------------------------------------------------------------------------------------------------------


def test_output_types_show_the_same_clips(pipe: ClassToVideoPipeline) -> None:
    pil, array, tensor, tokens = (
        pipe([0, "Bag"], seed=3, output_type=kind).videos for kind in ("pil", "np", "pt", "latent")
    )
    assert len(pil) == 2 and len(pil[1]) == FRAMES and isinstance(pil[0][0], Image.Image)
    assert array.shape == (2, FRAMES, SIDE, SIDE, 3) and tensor.shape == (2, FRAMES, 3, SIDE, SIDE)
    assert np.array_equal(array, tensor.permute(0, 1, 3, 4, 2).numpy())
    assert np.array_equal(np.stack([[np.asarray(i) for i in c] for c in pil]), (array * 255).round().astype(np.uint8))
    decoded = pipe.image_tokenizer.decode(tokens).clamp(-1, 1).mul(0.5).add(0.5)
    assert torch.equal(decoded.transpose(1, 2), tensor)
    assert pipe([0, 2], seed=3, output_type="latent", return_dict=False)[0].equal(tokens)
    assert pipe([0, "Bag"], seed=3, output_type="latent").class_labels == [0, 2]
    with pytest.raises(ValueError, match="output_type must be one of pil, np, pt, latent; got 'mp4'"):
        pipe([0], output_type="mp4")


def test_clips_depend_on_no_batch_size(pipe: ClassToVideoPipeline) -> None:
    def made(num: int, size: int, **more: Any) -> list[Any]:
        found = generate_clips(pipe, [0, 2], num, 7, size, output_type="np", **more)
        return [(index, label, (video * 255).round()) for index, label, video in found]

    for more in ({}, {"num_frames": FRAMES + 1}, {"frames": clip(pipe)[0], "keep_given": False}):
        whole = made(3, 3, **more)
        assert [(i, c) for i, c, _ in whole] == [(0, 0), (1, 2), (2, 0)]
        for (_, _, a), (_, _, b) in zip(whole, made(3, 2, **more), strict=True):
            assert np.array_equal(a, b)
        assert len({video.tobytes() for _, _, video in whole}) == 3


def test_no_class_draws_one_unless_frames_are_given(pipe: ClassToVideoPipeline) -> None:
    drawn = pipe(num_videos_per_prompt=40, seed=1, guidance_scale=1.0, output_type="latent").class_labels
    assert set(drawn) == {0, 1, 2}
    by_frames = pipe(frames=clip(pipe), seed=1, output_type="latent")
    null = pipe(3, frames=clip(pipe), seed=1, output_type="latent")
    assert by_frames.class_labels is None and null.class_labels == [3]
    assert torch.equal(by_frames.videos, null.videos)


def test_steps_are_told_one_by_one_through_all_windows(pipe: ClassToVideoPipeline) -> None:
    seen = []

    def note(owner: Any, step: int, position: int, values: dict[str, Any]) -> None:
        seen.append((step, values["num_steps"], values["window"], values["tokens"].shape[1]))

    out = pipe(1, seed=0, num_frames=FRAMES + 1, callback_on_step_end=note, output_type="np")
    count = FRAMES * EACH
    assert [s[0] for s in seen] == list(range(2 * count)) and {s[1] for s in seen} == {2 * count}
    assert [s[2] for s in seen] == [0] * count + [1] * count and seen[count][3] == 1
    assert out.stats["windows"] == 2 and out.stats["steps"] == out.stats["network_calls"] == 2 * count


# ---- first frames -------------------------------------------------------------------------------------------------


def test_first_frames_come_back_as_they_were_and_their_tokens_are_kept(pipe: ClassToVideoPipeline) -> None:
    given = clip(pipe, 2)
    videos = as_bytes(pipe([0], frames=given, seed=0, output_type="pt").videos)
    tokens = pipe([0], frames=given, seed=0, output_type="latent").videos
    assert videos.shape[1] == FRAMES and torch.equal(videos[:, :2], given)
    first = pipe.image_tokenizer.encode_start(read_frames(given, (SIDE, SIDE)))
    assert torch.equal(tokens[:, : 2 * EACH], first)
    free = pipe([0], seed=0, output_type="latent").videos
    assert not torch.equal(tokens, free)
    again = pipe([0], frames=given, seed=0, keep_given=False, output_type="pt").videos
    decoded = pipe.image_tokenizer.decode(tokens).clamp(-1, 1).mul(0.5).add(0.5).transpose(1, 2)
    assert torch.equal(again, decoded) and torch.equal(as_bytes(again)[:, 2:], videos[:, 2:])
    assert not torch.equal(as_bytes(again)[:, :2], given)


def test_one_clip_begins_all_or_each_label_has_its_own(pipe: ClassToVideoPipeline) -> None:
    two = clip(pipe, 1, count=2)
    own = as_bytes(pipe([0, 1], frames=two, seed=0, output_type="pt").videos)
    assert torch.equal(own[:, :1], two)
    shared = as_bytes(pipe([0, 1], frames=two[0], seed=0, output_type="pt").videos)
    assert torch.equal(shared[1, 0], two[0, 0])
    several = pipe("Coat", frames=two, seed=0, num_videos_per_prompt=2, output_type="pt")
    assert several.class_labels == [1] * 4 and torch.equal(as_bytes(several.videos)[:, 0], two[[0, 0, 1, 1], 0])
    with pytest.raises(ValueError, match="2 clips of first frames but 3 class labels"):
        pipe([0, 1, 2], frames=two)


def test_frames_are_taken_in_any_form(pipe: ClassToVideoPipeline) -> None:
    given = clip(pipe, 2)[0]  # T H W 3
    size = (SIDE, SIDE)
    floats = read_frames(given, size)
    assert floats.shape == (1, 3, 2, SIDE, SIDE) and floats.dtype == torch.float32
    pictures = [Image.fromarray(frame) for frame in given.numpy()]
    for form in (given.numpy(), given[None], pictures, [pictures], floats, floats[0]):
        assert torch.equal(read_frames(form, size), floats)
    wide = read_frames([Image.new("L", (40, 20), 255)] * 3, size)
    assert wide.shape == (1, 3, 3, SIDE, SIDE) and bool((wide == 1).all())
    wrong: list[tuple[Any, str]] = [
        ([], "frames is empty"),
        ([[pictures[0]], pictures], "clips one number of frames; got"),
        ([pictures[0], Image.new("RGB", (9, 8))], "frames must have one size"),
        (floats[..., :4], r"frames as floats must be \(B, 3, T, 8, 8\)"),
        (floats * 9, r"frames must lie in \[-1, 1\]"),
        (given.int(), "frames must be uint8"),
    ]
    for form, message in wrong:
        with pytest.raises(ValueError, match=message):
            read_frames(form, size)
    with pytest.raises(TypeError, match="frames must be PIL images, an array or a tensor; got str"):
        read_frames("clip.mp4", size)


# ---- windows ------------------------------------------------------------------------------------------------------


def test_a_long_clip_is_windows_that_go_on_from_each_other(pipe: ClassToVideoPipeline) -> None:
    assert pipe.default_context() == 2
    assert pipe.plan(0, None, None) == [(0, 4)] and pipe.plan(0, 3, None) == [(0, 4)]
    assert pipe.plan(0, 5, None) == [(0, 4), (2, 2)] and pipe.plan(0, 9, 1) == [(0, 4), (1, 3), (1, 3)]
    assert pipe.plan(3, None, None) == [(3, 1)] and pipe.plan(9, None, None) == [(2, 2)]
    assert pipe.plan(9, 12, 3) == [(3, 1)] * 3
    out = pipe([0], seed=0, num_frames=9, context_frames=1, output_type="pt")
    first, all_frames = pipe([0], seed=0, output_type="pt").videos, out.videos
    assert all_frames.shape[1] == 9 and torch.equal(all_frames[:, :FRAMES], first) and out.stats["windows"] == 3
    following = pipe(
        [0], rng=Rng.from_seed(0, 1).candidate(1), frames=first.transpose(1, 2) * 2 - 1, context_frames=1,
        output_type="pt",
    ).videos  # fmt: skip
    torch.testing.assert_close(following, all_frames[:, :7], atol=1e-5, rtol=0)
    assert not torch.equal(all_frames[:, 1:4], all_frames[:, 4:7])  # numbers of its own for each window


@pytest.mark.parametrize(
    "call, message",
    [
        ({"frames": 2, "num_frames": 2}, "more than 2 are needed; got 2"),
        ({"num_frames": 0}, "more than 0 are needed; got 0"),
        ({"num_frames": 9, "context_frames": 4}, "1 to 3 frames can be read of a clip of 4; got 4"),
        ({"context_frames": 0}, "context_frames must be at least 1; got 0"),
        ({"num_frames": 9, "output_type": "latent"}, "gives the tokens of one window"),
        ({"class_labels": [4]}, "class 4 does not exist"),
        ({"class_labels": []}, "class_labels is empty"),
        ({"prompt": "a boot"}, "draws clips and takes no prompt="),
        ({"solver": "heun"}, "has no setting solver"),
        ({"num_videos_per_prompt": 0}, "must be at least 1"),
    ],
    ids=lambda x: "_".join(map(str, x)) if isinstance(x, dict) else None,
)
def test_what_cannot_be_is_refused_before_any_work(
    pipe: ClassToVideoPipeline, call: dict[str, Any], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(type(pipe.transformer), "start", lambda *_: pytest.fail("work was begun"))
    if "frames" in call:
        call = {**call, "frames": clip(pipe, call["frames"])}
    with pytest.raises(ValueError, match=message):
        pipe(**{"class_labels": [0], **call})


def test_tokens_that_need_whole_clips_draw_single_windows(pipe: ClassToVideoPipeline) -> None:
    transformer, tokenizer = parts()
    tokenizer.encode_start = lambda frames: Tokenizer.encode_start(tokenizer, frames)  # as LARP's
    holistic = ClassToVideoPipeline(transformer, tokenizer, NextGroupSampler())
    holistic.set_progress_bar_config(disable=True)
    assert holistic([0], seed=0, output_type="pt").videos.shape[1] == FRAMES
    for more in ({"num_frames": 9}, {"frames": clip(pipe)}):
        with pytest.raises(ValueError, match="codes a clip as a whole"):
            holistic([0], **more)


def test_counts_that_tokens_do_not_allow_are_passed_over() -> None:
    transformer, tokenizer = parts(6)
    begin = tokenizer.encode_start

    def causal(frames: Tensor) -> Tensor:
        if frames.shape[2] % 2 == 0:
            raise ValueError("1, 3 or 5 frames")
        return begin(frames)

    tokenizer.encode_start = causal
    pipe = ClassToVideoPipeline(transformer, tokenizer, NextGroupSampler())
    assert pipe.default_context() == 3 and pipe.plan(2, None, None) == [(1, 5)]  # the most that fits, of two
    assert pipe.plan(4, None, None) == [(3, 3)] and pipe.plan(5, None, None) == [(5, 1)]
    with pytest.raises(ValueError, match="1, 3 or 5 frames"):
        pipe.plan(4, None, 2)


# ---- frame prediction ---------------------------------------------------------------------------------------------


class Predictor:
    """LlamaGen told the ids of the frames: its class is their sum."""

    def __init__(self, transformer: Any) -> None:
        self.start_of, self.seen = transformer.start, list[Tensor]()

    def __call__(self, cond: Any, null: Any = None) -> Any:
        self.seen.append(cond.vector)
        return self.start_of(type(cond)(cond.vector.sum(1) % 3), None)


def test_models_of_frame_prediction_read_the_padded_clip(pipe: ClassToVideoPipeline) -> None:
    transformer, tokenizer = parts()
    transformer.condition, transformer.start = "frames", Predictor(transformer)
    predict = ClassToVideoPipeline(transformer, tokenizer, NextGroupSampler())
    predict.set_progress_bar_config(disable=True)
    given = clip(pipe, 3)
    out = predict(frames=given, seed=0, num_frames=6, output_type="pt")
    assert out.class_labels is None and torch.equal(as_bytes(out.videos)[:, :3], given)
    whole = read_frames(given, (SIDE, SIDE))
    padded = torch.cat([whole, whole[:, :, -1:]], 2)
    seen = transformer.start.seen
    assert torch.equal(seen[0], tokenizer.encode(padded)) and len(seen) == 2  # of 3 and of 2 first frames
    drawn = predict(frames=given, seed=0, output_type="latent").videos
    assert not torch.equal(drawn[:, : 3 * EACH], tokenizer.encode_start(whole))  # given frames are drawn too
    for call, message in (
        ({}, "predicts what follows first frames: give frames="),
        ({"frames": given, "class_labels": [0]}, "draws from frames alone"),
        ({"frames": given, "guidance_scale": 2.0}, "guidance_scale must be 1"),
    ):
        with pytest.raises(ValueError, match=message):
            predict(**call)


def test_larp_goes_on_from_frames_and_knows_no_other_way() -> None:
    pipe = assemble(*tiny_pair("larp_moving_fashion_frames"), {})
    pipe.set_progress_bar_config(disable=True)
    given = clip(pipe, 2, count=2)
    out = pipe(frames=given, seed=0, output_type="pt")
    assert type(pipe) is ClassToVideoPipeline and out.class_labels is None
    assert out.videos.shape[:2] == (2, pipe.num_frames) and torch.equal(as_bytes(out.videos)[:, :2], given)
    one = pipe(frames=given[1], rng=Rng.from_seed(0, 2)[1:], output_type="pt").videos
    assert torch.equal(one, out.videos[1:])
    of_classes = assemble(*tiny_pair("larp_moving_fashion"), {})
    with pytest.raises(ValueError, match="codes a clip as a whole"):
        of_classes([0], frames=given)


# ---- next-block prediction ----------------------------------------------------------------------------------------


@pytest.fixture(scope="module", name="nbp")
def _nbp() -> ClassToVideoPipeline:
    pipe = assemble(*tiny_pair("nbp_moving_fashion"), {"guidance_scale": 1.5})
    pipe.set_progress_bar_config(disable=True)
    return pipe


def test_known_blocks_cost_no_steps(nbp: ClassToVideoPipeline) -> None:
    frames, steps = nbp.num_frames, len(nbp.transformer.schedule())
    given = clip(nbp, 3, count=2)
    out = nbp([0, 1], frames=given, seed=0, output_type="pt", keep_given=False)
    known = nbp.known_tokens(3)
    per_block = nbp.transformer.layout.length // steps
    assert out.stats["steps"] == steps - known // per_block < steps
    free = nbp([0, 1], seed=0, output_type="pt")
    assert free.stats["steps"] == steps and out.videos.shape == free.videos.shape == (2, frames, 3, 8, 8)
    long = nbp([0], seed=0, num_frames=11, output_type="pt")
    context = nbp.default_context()  # of a causal tokenizer one frame, or one more with each 2
    assert context == 1 and long.videos.shape[1] == 11 and long.stats["windows"] == 3
    with pytest.raises(ValueError, match="2"):
        nbp([0], frames=given[:, :2], context_frames=2)
    assert nbp([0], frames=given[:1, :2], seed=0, output_type="pt").videos.shape[1] == 2 + frames - 1  # reads the last


def test_a_folder_opens_as_the_pipeline_that_it_is(nbp: ClassToVideoPipeline, tmp_path: Path) -> None:
    nbp.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "model_index.json").read_text())["_class_name"] == "ClassToVideoPipeline"
    for opened in (AutoPipeline.from_pretrained(tmp_path), ClassToVideoPipeline.from_pretrained(tmp_path)):
        assert ".videos" in model_card(tmp_path, "user/clips") and "--out clips.gif" in model_card(
            tmp_path, "user/clips"
        )
        assert type(opened) is ClassToVideoPipeline and opened.sampler.config.guidance_scale == 1.5
        opened.set_progress_bar_config(disable=True)
        assert torch.equal(
            opened([1], seed=2, output_type="latent").videos, nbp([1], seed=2, output_type="latent").videos
        )


# ---- parts and folders --------------------------------------------------------------------------------------------


def test_parts_that_do_not_fit_make_no_pipeline() -> None:
    transformer, tokenizer = parts()
    with pytest.raises(ValueError, match="do not fit together"):
        ClassToVideoPipeline(tiny("llamagen_fashion"), tokenizer, NextGroupSampler())
    image = tiny("llamagen_fashion", num_classes=3, **of(tokenizer))
    with pytest.raises(ValueError, match="VQGAN codes images, not clips"):
        ClassToVideoPipeline(image, tokenizer.frame, NextGroupSampler())
    assert type(assemble(transformer, tokenizer, {"top_p": 0.5})) is ClassToVideoPipeline


def test_sums_of_windows() -> None:
    one = {"steps": 3, "seconds": 0.5, "accepted": [1, 2], "tokens_per_call": [2.0, 4.0], "lossless": True}
    two = {"steps": 1, "seconds": 0.5, "accepted": [0, 5], "tokens_per_call": [1.0, 2.0], "lossless": False}
    assert summed([one, two]) == {
        "steps": 4, "seconds": 1.0, "accepted": [1, 7], "tokens_per_call": [1.5, 3.0], "lossless": False, "windows": 2
    }  # fmt: skip


# ---- files --------------------------------------------------------------------------------------------------------

SETTINGS = {"seed": 3, "class": "Ankle boot — été", "guidance": [1.5, None], "long": "x" * 700}


@pytest.mark.parametrize("ending", [".avi", ".gif", ".mkv", ".mov", ".mp4", ".webm", ".webp"])
def test_files_of_clips_carry_their_settings(ending: str, tmp_path: Path) -> None:
    pytest.importorskip("av", reason="the extra video is not installed")
    frames = torch.arange(0, 240, 40, dtype=torch.uint8)[:, None, None, None].expand(6, 16, 16, 3).contiguous()
    path = tmp_path / "deep" / f"a{ending}"
    write_video(frames, path, fps=5, settings=SETTINGS)
    assert read_settings(path) == SETTINGS
    again = open_videos(path).clip(0, 6)
    assert (again.int() - frames.int()).abs().float().mean() < 3
    write_video(frames, path, fps=5)
    with pytest.raises(ValueError, match=f"a{ending} carries no varkit settings"):
        read_settings(path)
    assert [p.name for p in path.parent.iterdir()] == [path.name]


def test_an_animated_webp_keeps_every_pixel_and_every_frame(tmp_path: Path) -> None:
    frames = torch.randint(0, 256, (5, 12, 9, 3), dtype=torch.uint8)
    frames[2] = frames[1]  # stored once
    frames[4] = frames[3]
    path = tmp_path / "a.webp"
    write_video(frames, path, fps=7, lossless=True)
    videos = open_videos(path)
    assert videos.num_frames(0) == 5 and videos.size(0) == (12, 9) and videos.rate(0) == 7
    assert torch.equal(videos.clip(0, 5), frames) and torch.equal(videos.clip(0, 2, 2, 1), frames[1:4:2])
    Image.fromarray(frames[0].numpy()).save(tmp_path / "still.webp", lossless=True)
    assert torch.equal(open_videos(tmp_path / "still.webp").clip(0, 1), frames[:1])
    (tmp_path / "bad.webp").write_bytes(b"RIFF")
    with pytest.raises(ValueError, match=r"bad.webp cannot be read as a video"):
        open_videos(tmp_path / "bad.webp").num_frames(0)
    with pytest.raises(ValueError, match=r"lossless goes with .webp"):
        write_video(frames, tmp_path / "a.gif", lossless=True)
    with Image.open(path) as image:
        assert image.is_animated and image.info["loop"] == 0


def test_comments_of_others_are_no_settings(tmp_path: Path) -> None:
    pictures = [Image.new("RGB", (8, 8), c) for c in ("red", "blue")]
    for number, comment in enumerate([b"made by hand", json.dumps({"varkit": 3}).encode(), b"[1]"]):
        path = tmp_path / f"{number}.gif"
        pictures[0].save(path, save_all=True, append_images=pictures[1:], comment=comment)
        with pytest.raises(ValueError, match="carries no varkit settings"):
            read_settings(path)
