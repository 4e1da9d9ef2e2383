"""ZipAR: which passes there are, what a pass may see, and where it is plain decoding."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from typer.testing import CliRunner

from tests.test_speculative import Table
from varkit import AutoPipeline, NextGroupSampler, Rng
from varkit.cli import app
from varkit.interfaces import Cond
from varkit.pipelines.auto import assemble
from varkit.registry import create_model, model_entry
from varkit.samplers.zipar import ZipARSampler, zip_steps

NAMES = ["llamagen_b", "rar_b", "elm_ar_l_2_12"]


def pipeline(name: str) -> Any:
    """Tiny, with lively weights."""
    entry = model_entry(name)
    torch.manual_seed(3)
    model: Any = entry.build(**entry.tiny)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    tokenizer = create_model(str(entry.tokenizer), **model_entry(str(entry.tokenizer)).tiny).eval()
    made = assemble(model.eval(), tokenizer, {})
    made.set_progress_bar_config(disable=True)
    return made


def tokens(pipe: Any, classes: list[int], sampler: Any, **more: Any) -> Tensor:
    found: Tensor = pipe(classes, seed=4, sampler=sampler, output_type="latent", guidance_scale=2.0, **more).images
    return found


@pytest.mark.parametrize("size", [4, 8, 16])
def test_a_square_takes_2s_and_s_minus_2_windows(size: int) -> None:
    for window in range(1, size):
        steps = zip_steps((size, size), window)
        assert len(steps) == 2 * size + (size - 2) * window
        assert max(len(s.positions) for s in steps) <= -(-size // window) + 1
    assert len(zip_steps((size, size), size)) == size * size == len(zip_steps((size, size), 99))
    assert len(zip_steps((8, 8), 8, official_quirks=True)) == 58
    assert len(zip_steps((3, 7), 2)) == 2 * 7 + 2 and len(zip_steps((1, 5), 2)) == 5


@pytest.mark.parametrize(
    ("grid", "window"), [((5, 4), 1), ((5, 4), 3), ((4, 7), 2), ((6, 6), 5), ((9, 3), 2), ((4, 4), 4)]
)
def test_each_position_is_drawn_once_behind_a_window_of_the_row_above(grid: tuple[int, int], window: int) -> None:
    height, width = grid
    when = torch.full((height * width,), -1)
    real = torch.zeros(height * width, dtype=torch.bool)  # whether the entry before a position has read its own token
    for number, step in enumerate(zip_steps(grid, window)):
        assert (step.positions.diff() > 0).all()
        for position, drawn, read in zip(step.positions.tolist(), step.drawn, step.reads.tolist(), strict=True):
            assert read == -1 or 0 <= when[read] < number  # what is read is there
            real[position] |= read == position - 1
            if drawn:
                assert when[position] == -1
                when[position] = number
                row, column = divmod(position, width)
                if row and column == 0:
                    above = when[(row - 1) * width : row * width]
                    assert int(((above >= 0) & (above < number)).sum()) >= min(window, width)
            else:
                assert when[position] >= 0 and read == position - 1
    assert (when >= 0).all() and real.all()


@pytest.mark.parametrize("name", NAMES)
def test_a_window_of_a_row_is_plain_decoding(name: str) -> None:
    pipe = pipeline(name)
    width = pipe.transformer.layout.grids[0][1]
    plain = tokens(pipe, [0, 2], None)
    assert torch.equal(tokens(pipe, [0, 2], f"zipar:window={width}"), plain)
    assert not torch.equal(tokens(pipe, [0, 2], "zipar:window=1"), plain)
    stats = [pipe([0], sampler=f"zipar:window={w}", output_type="latent").stats for w in (width, 1)]
    assert [s["lossless"] for s in stats] == [True, False]
    length, calls = pipe.transformer.layout.length, stats[1]["network_calls"]
    assert stats[1]["target_calls"] == [calls] and stats[1]["tokens_per_call"] == [length / calls] and calls < length


@pytest.mark.parametrize("name", NAMES)
def test_an_image_is_the_same_in_any_batch(name: str) -> None:
    pipe = pipeline(name)
    three = tokens(pipe, [0, 1, 2], "zipar:window=2")
    for i in range(3):
        alone = pipe(
            [i], rng=Rng.from_seed(4, 1, i), sampler="zipar:window=2", output_type="latent", guidance_scale=2.0
        )
        assert torch.equal(alone.images[0], three[i])


def test_what_is_not_decided_is_not_seen() -> None:
    """Keys that are left in the memory of places not decided yet change nothing, unless as released."""
    pipe = pipeline("llamagen_b")
    model, found = pipe.transformer, dict[bool, list[Tensor]]()
    original = type(model).start
    for fill in (0.0, 5.0):

        def start(cond: Cond, null: Cond | None = None, fill: float = fill) -> Any:
            state = original(model, cond, null)
            for memory in (*state.cache.keys, *state.cache.values):
                memory.fill_(fill)
            return state

        model.start = start
        for quirks in (False, True):
            found.setdefault(quirks, []).append(
                tokens(pipe, [0, 1], ZipARSampler(window=2, official_quirks=quirks, guidance_schedule="constant"))
            )
    assert torch.equal(*found[False]) and torch.equal(*found[True])  # the release's zeros are zeros
    assert not torch.equal(found[False][0], found[True][0])


def test_a_row_reads_its_true_history() -> None:
    """On a table of logits by history that sees exactly the keys there are: with the last token of each row known, the
    first token of the next row has, of the row above, the window alone."""
    model = Table(values=3, grid=(3, 3), seed=2)
    seen = list[tuple[list[int], list[int]]]()
    original = model.nodes

    def nodes(inputs: Tensor, slots: Any, positions: Tensor, extra: Any, layers: int | None = None) -> Tensor:
        out = original(inputs, slots, positions, extra, layers)
        for n, position in enumerate(positions.tolist()):
            keys, mask = slots.keys[0][0, 0, : slots.end], slots.visible()[0, 0, n]
            seen.append(([position], keys[mask][:, 0].long().tolist()))
        return out

    model.nodes = nodes  # type: ignore[method-assign]
    tokenizer: Any = type("Any", (), {"layout": model.layout})()
    ZipARSampler(window=1).generate(tokenizer, model, Cond(torch.zeros(1, dtype=torch.int64)), Rng.from_seed(0, 1))
    places = {position: held for (position,), held in seen}  # the last pass that read it
    assert places[1] == [0, 1] and places[4] == [0, 1, 2, 3, 4]
    first_of_row = next(held for (position,), held in seen if position == 6)
    assert first_of_row == [0, 1, 2, 3, 4, 6]  # not 5: that token is not decided


def test_known_tokens_stay_and_stand_for_themselves() -> None:
    pipe = pipeline("llamagen_b")
    plain = tokens(pipe, [0, 1], None)
    keep = torch.zeros_like(plain, dtype=torch.bool)
    width = pipe.transformer.layout.grids[0][1]
    keep[:, width - 1 :: width] = True
    out = tokens(pipe, [0, 1], "zipar:window=2", known=(plain, keep))
    assert torch.equal(out[keep], plain[keep])
    everything = tokens(pipe, [0, 1], "zipar:window=2", known=(plain, torch.ones_like(keep)))
    assert torch.equal(everything, plain)


def test_it_is_saved_and_opened_again(tmp_path: Path) -> None:
    pipe = pipeline("llamagen_b")
    before = tokens(pipe, [0, 1], "zipar:window=2")
    pipe.register_modules(sampler=pipe.choose_sampler("zipar:window=2", 1))
    pipe.save_pretrained(tmp_path)
    again = AutoPipeline.from_pretrained(tmp_path)
    again.set_progress_bar_config(disable=True)
    assert isinstance(again.sampler, ZipARSampler)
    assert torch.equal(tokens(again, [0, 1], None), before)
    assert type(again.choose_sampler("plain", 1)) is NextGroupSampler
    seen: list[int] = []
    again([0], callback_on_step_end=lambda pipe, step, last, state: seen.append(state["tokens"].shape[1]))
    assert seen[-1] == pipe.transformer.layout.length and seen == sorted(seen)


@pytest.mark.parametrize(
    ("name", "sampler", "message"),
    [
        ("var_d16", "zipar", "does not decide one token a step"),
        ("llamagen_b", "zipar:window=0", "at least 1; got 0"),
        ("llamagen_b", "zipar:window=1,official_quirks=true", "at least 2; got 1"),
        ("llamagen_b", "zipar:window=99,official_quirks=true", "at most a row"),
        ("llamagen_b", "zipar:windows=3", "has no option windows"),
        ("llamagen_b", "zippar", "no sampler is called 'zippar'"),
    ],
)
def test_what_cannot_be_is_refused(name: str, sampler: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        pipeline(name).choose_sampler(sampler, 1)


def test_tokens_without_rows_are_refused() -> None:
    entry = model_entry("flextok_ar_fashion")
    with pytest.raises(ValueError, match="rows of a grid"):
        ZipARSampler().steps(entry.build(**entry.tiny))


def test_an_order_or_part_of_the_tokens_is_refused() -> None:
    for setting in ({"order": "spiral"}, {"num_tokens": 4}, {"more_smooth": True}):
        with pytest.raises(ValueError, match="leave out order"):
            pipeline("rar_b")([0], sampler="zipar:window=2", **setting)


def test_the_commands_count_passes(tmp_path: Path) -> None:
    args = [
        "sample",
        "fashion-llamagen",
        "--class",
        "3",
        "--sampler",
        "zipar:window=3",
        "--out",
        str(tmp_path / "x.png"),
    ]
    done = CliRunner().invoke(app, [*args, "--device", "cpu"])
    assert done.exit_code == 0, done.output
    assert "1.88 tokens a pass, not lossless" in done.output  # 64 tokens, 34 passes
    done = CliRunner().invoke(
        app,
        [
            "bench",
            "fashion-llamagen",
            "--sampler",
            "zipar:window=4",
            "--batches",
            "1",
            "--repeats",
            "1",
            "--device",
            "cpu",
        ],
    )
    assert done.exit_code == 0, done.output
    (line,) = [line for line in done.stdout.splitlines() if line.startswith("zipar")]
    assert line.split()[4:] == ["40", "1.60", "relaxed"]
