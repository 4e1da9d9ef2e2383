"""NBP: what is read and seen, blocks of any size, given frames, texts of classes, guidance, official files."""

from __future__ import annotations

import argparse
import json
import runpy
from itertools import accumulate
from pathlib import Path
from typing import Any

import pytest
import torch
import typer
from torch import Tensor
from typer.testing import CliRunner

from tests.test_clips import fashion_root as fashion_root
from tests.test_models import liven
from tests.test_training import lines
from tests.test_video_training import clips_recipe
from varkit import AutoPipeline, NextGroupSampler, Rng
from varkit.checkpoints.convert import example
from varkit.checkpoints.files import load_official, to_official, write_official
from varkit.cli import app
from varkit.generators.nbp import NBP, TINY
from varkit.heads.categorical import Categorical
from varkit.interfaces import Cond
from varkit.registry import model_entry
from varkit.tokenizers.magvit2 import TINY as TINY_TOKENIZER
from varkit.tokenizers.magvit2 import MagViT2
from varkit.training.loop import train

TEXTS = [[2, 2, 1, 5], [2, 1, 6, 7], [1, 5, 7, 8]]
CLASS: dict[str, Any] = {"num_classes": 3, "first": "begin"}
TEXT: dict[str, Any] = {"first": "hybrid", "text_length": 4, "text_vocab": 9, "class_texts": TEXTS}
GIVEN: dict[str, Any] = {"num_classes": 0, "first": "given"}
KINDS = {
    "class": CLASS,
    "nothing": {**CLASS, "num_classes": 0},
    "hybrid": {**CLASS, "first": "hybrid"},
    "text": TEXT,
    "given": GIVEN,
}
BLOCKS = (1, "row", 3, "frame", 6)
"""Of 12 tokens, (3, 2, 2)."""


def small(kind: str = "class", block: Any = "row", **changes: Any) -> NBP:
    torch.manual_seed(0)
    return liven(NBP(**{**TINY, **KINDS[kind], "block": block, **changes}), 0.2)


def tokenizer() -> MagViT2:
    torch.manual_seed(0)
    return MagViT2(**TINY_TOKENIZER).eval()


def some(batch: int = 3, seed: int = 0) -> Tensor:
    return torch.randint(0, 24, (batch, 12), generator=torch.Generator().manual_seed(seed))


def inputs_of(tokens: Tensor) -> Tensor:
    return torch.cat([torch.zeros_like(tokens[:, :1]), tokens[:, :-1]], 1)


def labels_of(model: NBP, batch: int = 3) -> Tensor:
    return torch.arange(batch) % max(model.num_classes, 1)


def step_by_step(model: NBP, tokens: Tensor, cond: Cond, null: Cond | None = None) -> list[Categorical]:
    """What is said of each group; what is handed on as read, but for what the state knows, is wrong on purpose."""
    state, said = model.start(cond, null), []
    for positions in model.schedule():
        said.append(model.predict(state, torch.zeros(len(tokens), len(positions), dtype=torch.int64), positions))
        model.append(state, tokens[:, positions], positions)
    return said


# ---- what is read, and what is seen -----------------------------------------------------------------------------


def test_what_is_read_in_each_mode() -> None:
    """Joint ids: learned tokens first, then text, then video. Blocks of four."""
    tokens = torch.arange(12)[None]
    plain, hybrid, text, given = (small(k, 4) for k in ("class", "hybrid", "text", "given"))
    assert plain.read_ids(plain.joint_ids(tokens))[0].tolist() == [0, 1, 2, 3, *range(4, 12)]
    assert hybrid.read_ids(hybrid.joint_ids(tokens))[0].tolist() == [0, 4, 5, 6, 7, 1, 2, 3, *range(8, 12)]
    assert text.read_ids(text.joint_ids(tokens))[0].tolist() == [0, 13, 14, 15, 16, 1, 2, 3, *range(17, 21)]
    assert text.text_ids(torch.tensor([1])).tolist() == [[6, 5, 10, 11]]
    assert given.read_ids(given.joint_ids(tokens))[0].tolist() == list(range(8))
    assert [len(m.schedule()) for m in (plain, hybrid, text, given)] == [3, 6, 6, 3]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("block", BLOCKS)
def test_the_mask_opens_the_condition_and_whole_groups(kind: str, block: Any) -> None:
    model = small(kind, block)
    mask, p = model.seen, model.prefix_length
    sizes = model.sizes[1:] if kind == "given" else model.sizes
    assert p == {"class": 1, "hybrid": 1, "text": 4}.get(kind, 0) and len(mask) == p + sum(sizes)
    assert mask[:, :p].all() and not mask[:p, p:].any()
    ends = [p + e for e in accumulate(sizes)]
    for row in range(p, len(mask)):
        end = next(e for e in ends if e > row)
        assert mask[row, :end].all() and not mask[row, end:].any()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("block", BLOCKS)
def test_cached_decoding_is_the_teacher_forced_network(kind: str, block: Any) -> None:
    model, tokens = small(kind, block), some()
    labels = labels_of(model)
    null = torch.full_like(labels, model.num_classes)
    with torch.no_grad():
        full = [model(inputs_of(tokens), c) for c in (labels, null)]
        said = step_by_step(model, tokens, Cond(labels), Cond(null))
        alone = step_by_step(model, tokens, Cond(labels))
    said, alone = said[int(kind == "given") :], alone[int(kind == "given") :]  # nothing is said of a given block
    for expected, found in (
        (full[0], [c.logits for c in said]),
        (full[0], [c.logits for c in alone]),
        (full[1], [c.null_logits for c in said]),
    ):
        torch.testing.assert_close(torch.cat(found, 1), expected, atol=1e-4, rtol=1e-4)  # type: ignore[arg-type]
    assert full[0].shape[-1] == 24 and bool((full[0] - full[1]).abs().max() > 0.01) == (model.num_classes > 0)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("block", BLOCKS)
def test_a_token_matters_to_later_groups_alone(kind: str, block: Any) -> None:
    model, tokens = small(kind, block), some(1)
    labels = labels_of(model, 1)
    skip, ends = model.skip, list(accumulate(model.sizes))
    with torch.no_grad():
        before = model(inputs_of(tokens), labels)
        for place in range(11):
            changed = tokens.clone()
            changed[:, place] = (changed[:, place] + 1) % 24
            moved = (model(inputs_of(changed), labels) - before).abs().amax((0, 2))
            end = max(next(e for e in ends if e > place), skip)
            assert not moved[: end - skip].any() and (moved[end - skip :] > 0).all()


# ---- sampling ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["class", "hybrid", "text", "given"])
@pytest.mark.parametrize("block", BLOCKS)
def test_given_blocks_cost_no_step_and_change_nothing_else(kind: str, block: Any) -> None:
    """Known tokens that the model had drawn itself: the rest is drawn as it was."""
    model, sampler, images = small(kind, block), NextGroupSampler(), tokenizer()
    cond, rng, drawn = Cond(labels_of(model)), Rng.from_seed(4, 3), some()
    if kind != "given":
        drawn = sampler.generate(images, model, cond, rng).tokens
    ends = [0, *accumulate(model.sizes)]
    for count in (1, 4, 6, 8, 12):
        if kind == "given" and count < model.block:
            continue
        keep, steps = torch.arange(12) < count, []
        out = sampler.generate(images, model, cond, rng, known=(drawn, keep), on_step=lambda i, s=steps: s.append(i))
        read = max(e for e in ends if e <= count)
        assert out.steps == len(steps) == len(model.sizes) - ends.index(read)
        assert out.steps == sampler.count_steps(model, (drawn, keep))
        if kind == "given":
            assert torch.equal(out.tokens[:, :count], drawn[:, :count])
        else:
            assert torch.equal(out.tokens, drawn)


def test_known_tokens_within_a_block_are_drawn_over() -> None:
    model, sampler = small("class", 4), NextGroupSampler()
    given, keep = some(), torch.zeros(12, dtype=torch.bool)
    keep[[0, 1, 6]] = True
    out = sampler.generate(tokenizer(), model, Cond(labels_of(model)), Rng.from_seed(0, 3), known=(given, keep))
    assert out.steps == 3 and torch.equal(out.tokens[:, keep], given[:, keep])


def test_a_model_of_given_frames_says_that_it_needs_them() -> None:
    model, sampler, images = small("given", 4), NextGroupSampler(), tokenizer()
    cond, rng = Cond(torch.zeros(2, dtype=torch.int64)), Rng.from_seed(0, 2)
    with pytest.raises(ValueError, match="goes on from given frames: its first 4 tokens must be known"):
        sampler.generate(images, model, cond, rng)
    with pytest.raises(ValueError, match="goes on from given frames"):
        sampler.generate(images, model, cond, rng, null=cond, guidance_scale=2.0)
    keep = torch.arange(12) < 3
    with pytest.raises(ValueError, match="goes on from given frames"):
        sampler.generate(images, model, cond, rng, known=(some(2), keep))


@pytest.mark.parametrize("kind", ["class", "hybrid", "text"])
def test_guidance_runs_and_leads_away_from_no_class(kind: str) -> None:
    model, tokens = small(kind, 4), some()
    labels = labels_of(model)
    null = Cond(torch.full_like(labels, model.num_classes))
    sampler = NextGroupSampler(guidance_schedule="constant")
    with torch.no_grad():
        said = step_by_step(model, tokens, Cond(labels), null)
    for predictive in said:
        assert predictive.null_logits is not None
        w = predictive.guide(3.0).logits
        torch.testing.assert_close(w, 3 * predictive.logits - 2 * predictive.null_logits, atol=1e-4, rtol=1e-4)
    rng = Rng.from_seed(1, 3)
    plain, guided, none = (
        sampler.generate(tokenizer(), model, Cond(labels), rng, null=null, guidance_scale=w).tokens for w in (1, 5, 0)
    )
    assert not torch.equal(plain, guided)
    assert torch.equal(none, sampler.generate(tokenizer(), model, null, rng).tokens)


def test_a_model_of_texts_draws_video_ids_alone_and_can_read_others() -> None:
    model = small("text", 4)
    first, cond = model.schedule()[0], Cond(torch.tensor([0, 1]))
    said = model.predict(model.start(cond), torch.zeros(2, 1, dtype=torch.int64), first)
    joint = model.predict_joint(model.start(cond), torch.zeros(2, 1, dtype=torch.int64), first)
    assert said.logits.shape[-1] == 24 and joint.logits.shape[-1] == 4 + 9 + 24
    assert torch.equal(said.logits, joint.logits[..., 13:])
    assert model.video_ids(torch.tensor([0, 12, 13, 14, 36])).tolist() == [0, 0, 0, 1, 23]
    states = [model.start(cond), model.start(cond)]
    for state, ids in zip(states, (torch.full((2, 1), 13), torch.full((2, 1), 7)), strict=True):
        model.predict(state, torch.zeros(2, 1, dtype=torch.int64), first)
        model.append_joint(state, ids, first)
    second = model.schedule()[1]
    a, b = (model.predict(s, torch.zeros(2, 1, dtype=torch.int64), second).logits for s in states)
    assert not torch.allclose(a, b)


def test_texts_of_classes_are_what_tells_them_apart() -> None:
    model = small("text", 4)
    swapped = small("text", 4, class_texts=[TEXTS[1], TEXTS[0], TEXTS[2]])
    inputs = inputs_of(some(2))
    with torch.no_grad():
        a, b = model(inputs, torch.tensor([0, 1])), swapped(inputs, torch.tensor([1, 0]))
        null = model(inputs, torch.tensor([3, 3]))
    torch.testing.assert_close(a, b)
    assert not torch.allclose(a, null) and model.num_classes == 3
    unknown = small("text", 4, class_texts=None)
    with pytest.raises(ValueError, match=r"was given none.*--class-texts"):
        unknown.start(Cond(torch.tensor([0])))


def test_rewinding_takes_whole_blocks() -> None:
    model, tokens = small("class", 4), some(1)
    state, groups = model.start(Cond(torch.tensor([0]))), model.schedule()
    for positions in groups[:2]:
        model.predict(state, tokens[:, positions], positions)
        model.append(state, tokens[:, positions], positions)
    with pytest.raises(ValueError, match="no whole blocks"):
        state.rewind(3)
    with pytest.raises(ValueError, match="no whole blocks"):
        model.predict(state, tokens[:, 8:10], torch.arange(8, 10))
    state.rewind(4)
    assert state.length == 4 and state.cache.length == 5
    state.reset()
    assert state.length == state.cache.length == 0
    with pytest.raises(ValueError, match="more_smooth"):
        model.append(state, torch.zeros(1, 4, 3), groups[0])


def test_several_groups_may_be_read_at_once() -> None:
    model, tokens = small("hybrid", 4), some()
    labels = labels_of(model)
    with torch.no_grad():
        full = model(inputs_of(tokens), labels)
        state, where = model.start(Cond(labels)), torch.arange(8)
        said = model.predict(state, inputs_of(tokens)[:, :8], where)
        model.append(state, tokens[:, :8], where)
        rest = model.predict(state, inputs_of(tokens)[:, 8:], torch.arange(8, 12))
    torch.testing.assert_close(torch.cat([said.logits, rest.logits], 1), full, atol=1e-4, rtol=1e-4)


# ---- training ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_it_learns_a_clip_and_its_first_block_with_it(kind: str) -> None:
    torch.manual_seed(0)
    model = NBP(**{**TINY, **KINDS[kind], "block": 4, "dropout": 0.0}).train()
    tokens = some(1).expand(4, -1)
    cond = Cond(torch.full((4,), min(1, model.num_classes)))
    optim = torch.optim.AdamW(model.parameters(), 1e-2)
    for step in range(60):
        losses = model.training_loss(tokens, inputs_of(tokens), cond, Rng.from_seed(step, 4))
        optim.zero_grad()
        losses["loss"].backward()
        optim.step()
    assert losses["loss"] < 0.3 and losses["accuracy"] > 0.95


def test_weights_of_tokens_and_the_vocabulary_of_the_loss() -> None:
    model, tokens = small("class", 4), some()
    cond, rng = Cond(labels_of(model)), Rng.from_seed(0, 3)
    plain = model.training_loss(tokens, inputs_of(tokens), cond, rng)["loss"]
    even = model.training_loss(tokens, inputs_of(tokens), cond, rng, weight=torch.full((3, 12), 1 / 12), hidden_layer=2)
    torch.testing.assert_close(plain, even["loss"])
    assert even["hidden"].shape == (3, 12, 32)
    given = small("given", 4)
    weight = torch.zeros(3, 12)
    weight[:, :4] = 1.0  # which are given, not learned
    assert given.training_loss(tokens, inputs_of(tokens), cond, rng, weight=weight)["loss"] == 0
    text = small("text", 4)
    logits, _ = text.joint_logits(inputs_of(tokens), labels_of(text))
    expected = torch.nn.functional.cross_entropy(logits.flatten(0, 1), text.joint_ids(tokens).flatten())
    torch.testing.assert_close(text.training_loss(tokens, inputs_of(tokens), cond, rng)["loss"], expected)


def objective(tokenizer_folder: Path, name: str, model: str, **overrides: Any) -> dict[str, Any]:
    return {
        "name": name,
        "model": model,
        "tokenizer": str(tokenizer_folder),
        "model_overrides": overrides,
        "sampling": {"guidance_scale": 2.0},
    }


@pytest.mark.parametrize(
    ("name", "model", "overrides"),
    [
        ("next-token", "nbp_moving_fashion", {"block": "frame"}),
        ("next-token", "nbp_moving_fashion", {"block": 1}),
        ("next-token", "nbp_moving_fashion", {"block": 2, "first": "hybrid"}),
        ("next-entity", "entity_moving_fashion", {}),
        (
            "next-entity",
            "entity_moving_fashion",
            {"entity": "cell", "entity_size": [1, 2, 1], "context_noise": "clean"},
        ),
    ],
    ids=["frame", "token", "hybrid", "entity-frame", "entity-cell"],
)
def test_a_run_on_clips_learns_and_exports_what_goes_on_from_frames(
    name: str, model: str, overrides: dict[str, Any], fashion_root: Path, tmp_path: Path
) -> None:
    tokenizer().save_pretrained(tmp_path / "tokenizer")
    sizes = {"hidden_size": 32, "num_heads": 2} | ({"depths": [1, 1]} if "entity" in model else {"depth": 2})
    plan = objective(tmp_path / "tokenizer", name, model, **sizes, **overrides)
    settings = (
        "loop.steps=40",
        "loop.validate_every=20",
        "loop.save_every=40",
        "loop.sample_every=40",
        "optim.lr=1e-2",
    )
    run = train(clips_recipe(tmp_path / "run", plan, fashion_root, *settings)).folder
    validated = [line["validation/loss"] for line in lines(run) if "validation/loss" in line]
    assert validated[-1] < 0.9 * lines(run)[0]["loss"]
    pipeline = AutoPipeline.from_pretrained(run / "model")
    pipeline.set_progress_bar_config(disable=True)
    assert pipeline.transformer.layout.grids == ((3, 2, 2),) and pipeline.transformer.num_classes == 30
    given = torch.rand(1, 3, 3, 8, 8) * 2 - 1
    out = pipeline([4, 7], frames=given, seed=0, output_type="pt")
    assert out.videos.shape == (2, 5, 3, 8, 8) and out.videos.isfinite().all()
    torch.testing.assert_close(out.videos[:, :3], ((given + 1) / 2).transpose(1, 2).expand(2, -1, -1, -1, -1))
    if name == "next-token" and overrides["block"] == "frame":
        assert out.stats["steps"] == 1  # two of three latent frames are read at once


def test_the_benchmark_of_blocks_compares_with_single_tokens() -> None:
    script = Path(__file__).parents[1] / "benchmarks" / "video_blocks.py"
    bench = typer.Typer()
    bench.command()(runpy.run_path(str(script))["main"])
    told = CliRunner().invoke(bench, ["--blocks", "64", "--batches", "1", "--repeats", "1"]).output
    token, frame = (line.split() for line in told.splitlines()[2:4])
    assert [token[0], token[2], token[-1]] == ["token", "320", "1.00x"]
    assert [frame[0], frame[2]] == ["64", "5"] and float(frame[-1][:-1]) > 2


# ---- what is refused --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"block": "line"}, "divides the 12 tokens of the grid 3x2x2: 1, 2, 3, 4, 6, 12; got 'line'"),
        ({"block": 0}, "got 0"),
        ({"block": 5}, "got 5"),
        ({"block": 13}, "got 13"),
        ({"grid": (4, 4)}, r"the \(t, h, w\)"),
        ({"num_heads": 5}, "5 heads"),
        ({"first": "middle"}, "begin, hybrid or given"),
        ({"first": "given", "block": 12}, "leaves nothing to predict"),
        ({"max_positions": 12}, "12 are fewer than the 13 entries"),
        ({"text_length": 4}, "go together"),
        ({**TEXT, "class_texts": [[1, 2, 3]]}, "lists of text_length 4 ids"),
        ({**TEXT, "class_texts": [[1, 2, 3, 9]]}, "0 to 8"),
    ],
)
def test_impossible_models_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        NBP(**{**TINY, **CLASS, **changes})


def test_another_number_of_steps_is_refused() -> None:
    model = small("class", "row")
    assert len(model.schedule(6)) == 6
    with pytest.raises(ValueError, match="blocks of 2 tokens, 6 steps in all; got num_steps=4"):
        model.schedule(4)


# ---- official files ---------------------------------------------------------------------------------------------


def released(kind: str) -> NBP:
    """As a released file has it: blocks of 16, the released codebook, positions to spare."""
    sizes = {"grid": (5, 16, 16), "codebook_size": 64000, "latent_dim": 6, "max_positions": 1300, "hidden_size": 8}
    return small(kind, "row", **{**sizes, "num_heads": 1, "depth": 1})


@pytest.mark.parametrize("kind", ["text", "given"])
def test_files_of_lightning_are_read_and_written(kind: str, tmp_path: Path) -> None:
    model = released(kind)
    state = to_official(model)
    extra = {"first_stage_model.x": torch.zeros(2), "transformer.mask": torch.zeros(1)}
    content = {
        "state_dict": {**state, **extra},
        "hyper_parameters": {"args": argparse.Namespace(n_head=1)},
        "epoch": 3,
        "global_step": 9,
    }
    torch.save(content, tmp_path / "model.ckpt")
    again = load_official(tmp_path / "model.ckpt", **({"class_texts": TEXTS} if kind == "text" else {}))
    assert isinstance(again, NBP) and again.config.first == {"text": "hybrid", "given": "given"}[kind]
    labels, inputs = labels_of(model), torch.arange(60).view(3, 20)
    with torch.no_grad():
        assert torch.equal(model(inputs, labels), again(inputs, labels))
    write_official(again, tmp_path / "back.pth")
    back = torch.load(tmp_path / "back.pth", weights_only=True)["state_dict"]
    assert back.keys() == state.keys() and all(torch.equal(v, state[k]) for k, v in back.items())
    assert back["transformer.uncond_embedding"].shape == (model.config.text_length, 8)


def test_an_own_model_has_no_official_file(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"texts .*first=hybrid.*first=given.*first=begin and 3 classes"):
        to_official(small("class"))


def test_a_tokenizers_file_has_the_prefix_that_the_official_loader_drops(tmp_path: Path) -> None:
    model = tokenizer()
    write_official(model, tmp_path / "tokenizer.pth")
    stored = torch.load(tmp_path / "tokenizer.pth", weights_only=True)
    assert list(stored) == ["model_state_dict"] and all(k.startswith("module.") for k in stored["model_state_dict"])
    sizes = {"num_frames": 5, "image_size": 8, "levels": (4, 3, 2), "norm_groups": 4}
    again = load_official(tmp_path / "tokenizer.pth", **sizes)
    assert isinstance(again, MagViT2)
    clips = torch.rand(2, 3, 5, 8, 8) * 2 - 1
    assert torch.equal(again.decode(again.encode(clips)), model.decode(model.encode(clips)))
    assert tuple(again.config.widths) == TINY_TOKENIZER["widths"] and tuple(again.config.num_units) == (0, 1, 1)


def test_what_convert_says_to_try_fits_the_model() -> None:
    clips, images = model_entry("frames_vq_fashion"), model_entry("vq_fashion")
    by_clips, by_images = clips.build(**clips.tiny), images.build(**images.tiny)
    assert example(small(), by_clips) == "--class 5 --out clip.mp4"
    assert example(small(num_classes=0), by_clips) == "--continue walk.mp4 --out on.mp4"
    assert example(small(), by_images) == "--class 207"


def test_convert_takes_the_texts_of_classes(tmp_path: Path) -> None:
    write_official(released("text"), tmp_path / "ucf.pth")
    texts = tmp_path / "texts.json"
    texts.write_text(json.dumps(TEXTS))
    run = CliRunner().invoke
    done = run(app, ["convert", str(tmp_path / "ucf.pth"), "--to", str(tmp_path / "out"), "--class-texts", str(texts)])
    assert done.exit_code == 0, done.output
    model = NBP.from_pretrained(tmp_path / "out")
    assert model.num_classes == 3 and model.text_ids(torch.tensor([2])).tolist() == [[17, 21, 23, 24]]
    texts.write_text('{"a": 1}')
    done = run(app, ["convert", str(tmp_path / "ucf.pth"), "--to", str(tmp_path / "x"), "--class-texts", str(texts)])
    assert done.exit_code == 2 and "list of lists" in done.output
    write_official(tokenizer(), tmp_path / "t.pth")
    texts.write_text(json.dumps(TEXTS))
    done = run(app, ["convert", str(tmp_path / "t.pth"), "--to", str(tmp_path / "y"), "--class-texts", str(texts)])
    assert done.exit_code == 2 and "has no class_texts" in " ".join(done.output.split())
