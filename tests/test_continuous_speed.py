"""How often the networks of the generators of latents are asked, with what, and where their caches live."""

from __future__ import annotations

import json
import runpy
from pathlib import Path
from typing import Any

import pytest
import torch
import typer
from torch import Tensor, nn
from typer.testing import CliRunner

from tests.test_models import GENERATORS, OF_IDS, classes, nothing, tiny_pair
from varkit import Rng
from varkit.layers.llama import Rotary, turn
from varkit.samplers.continuous import ContinuousSampler, ContinuousStep

LATENT = [name for name in GENERATORS if name not in OF_IDS]
BENCHMARK = Path(__file__).parents[1] / "benchmarks" / "continuous.py"
BATCH, STEPS = 3, 4


class Seen:
    """(rows, tokens) of each call of the backbone, and of the network that is asked in each step of a group."""

    def __init__(self, model: nn.Module) -> None:
        self.backbone: list[tuple[int, int]] = []
        self.head: list[tuple[int, int]] = []
        backbone = getattr(model, "trunk", model)
        if hasattr(model, "diffloss"):
            head: Any = model.diffloss.net.res_blocks[0]
        else:
            head = getattr(model, "flownet", getattr(getattr(model, "head", None), "net", backbone))
        self.same = head is backbone
        backbone.register_forward_pre_hook(lambda _, given: self.backbone.append(tuple(given[0].shape[:2])))
        head.register_forward_pre_hook(lambda _, given: self.head.append(tuple(given[0].shape[:2])))


def draw(model: Any, tokenizer: Any, seen: Seen | None = None, **settings: Any) -> list[Any]:
    """Of each group: tokens of the network, calls of the backbone and of the head, pointers, the step."""
    found: list[Any] = []
    states: list[Any] = []
    start = model.start

    def kept(*given: Any) -> Any:
        states.append(start(*given))
        return states[-1]

    def note(step: ContinuousStep) -> None:
        cache = getattr(states[-1], "cache", None)
        where = [] if cache is None else [(t.data_ptr(), tuple(t.shape)) for t in (*cache.keys, *cache.values)]
        tokens = step.positions.shape[-1] // model.positions_per_token
        calls = ([], []) if seen is None else (list(seen.backbone), list(seen.head))
        found.append((tokens, *calls, where, step))
        if seen is not None:
            seen.backbone.clear()
            seen.head.clear()

    model.start = kept
    cond = classes(model, BATCH)
    try:
        ContinuousSampler(head_steps=STEPS).generate(
            tokenizer, model, cond, Rng.from_seed(0, BATCH), nothing(model, cond), on_step=note, **settings
        )
    finally:
        del model.start
    return found


@pytest.mark.parametrize("scale", [1.0, 3.0])
@pytest.mark.parametrize("name", LATENT)
def test_a_step_is_one_call_of_all_tokens_and_both_branches(name: str, scale: float) -> None:
    model, tokenizer = tiny_pair(name)
    seen = Seen(model)
    rows = BATCH if scale == 1 else 2 * BATCH
    read = 0  # tokens of the entity before, which xAR reads clean first
    for tokens, backbone, head, _, step in draw(
        model, tokenizer, seen, guidance_scale=scale, guidance_schedule="constant"
    ):
        assert step.predictive.calls == STEPS
        clean = [(rows, read)] if seen.same and read else []
        assert head == [*clean, *[(rows, tokens)] * STEPS]
        if not seen.same:
            assert [given[0] for given in backbone] == [rows]
        read = tokens


@pytest.mark.parametrize("name", LATENT)
def test_the_unconditional_branch_is_left_out_where_nothing_is_guided(name: str) -> None:
    """In each step outside the interval; of the backbone too, unless a cache needs it later."""
    model, tokenizer = tiny_pair(name)
    seen = Seen(model)
    settings = {"guidance_scale": 3.0, "guidance_schedule": "constant", "guidance_interval": (1, 1)}
    for i, (_, backbone, head, where, step) in enumerate(draw(model, tokenizer, seen, **settings)):
        rows = 2 * BATCH if i == 1 else BATCH
        assert step.guidance == (3.0 if i == 1 else 1.0)
        assert {given[0] for given in head[-STEPS:]} == {rows}
        if not seen.same:
            assert [given[0] for given in backbone] == [2 * BATCH if where else rows]


@pytest.mark.parametrize("name", LATENT)
def test_keys_and_values_stay_where_they_are(name: str) -> None:
    model, tokenizer = tiny_pair(name)
    places = [where for *_, where, _ in draw(model, tokenizer, guidance_scale=3.0)]
    assert len(places) > 1 and all(where == places[0] for where in places)
    assert all(shape[:1] + shape[2:3] == (2 * BATCH, model.layout.length) for _, shape in places[0])


@pytest.mark.parametrize("name", LATENT)
def test_a_guided_interval_draws_what_the_two_ways_draw_alone(name: str) -> None:
    """Groups before the interval are those without guidance, whatever was left out for them."""
    model, tokenizer = tiny_pair(name)
    plain, late = (
        draw(model, tokenizer, guidance_scale=w, guidance_schedule="constant", guidance_interval=(1, 9))
        for w in (1.0, 3.0)
    )
    torch.testing.assert_close(late[0][-1].predicted, plain[0][-1].predicted, rtol=1e-4, atol=1e-4)
    assert (late[1][-1].predicted - plain[1][-1].predicted).abs().max() > 1e-3


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_turning_by_what_was_looked_up_is_the_rotary_embedding(dtype: torch.dtype) -> None:
    rotary, where = Rotary((3, 5), 16, prefix=2), torch.tensor([4, 0, 16, 7])
    x: Tensor = torch.randn(2, 4, 9, 16, dtype=dtype)
    for given in (x, x.transpose(1, 2).contiguous().transpose(1, 2), x[:, :, 3:6]):
        torch.testing.assert_close(turn(given, rotary.at(where)), rotary(given, where), rtol=1e-5, atol=1e-6)
    compiled = torch.compile(turn, backend="eager")
    torch.testing.assert_close(compiled(x, rotary.at(where)), rotary(x, where), rtol=1e-5, atol=1e-6)


# ---- the benchmark ----------------------------------------------------------------------------------------------


def bench(*arguments: str) -> Any:
    app = typer.Typer()
    app.command()(runpy.run_path(str(BENCHMARK))["main"])
    return CliRunner().invoke(app, ["--tiny", "--repeats", "1", *arguments])


def test_the_benchmark_says_what_it_left_out() -> None:
    result = bench("xar_b", "flowar_s", "--batches", "1", "--head-steps", "2", "--variants")
    assert result.exit_code == 0, result.output
    assert "~ extrapolated" in result.output and "guided in groups 1-1" in result.output and "DiSA" in result.output
    assert result.output.count("checked: an evaluation was one call") == 2
    assert result.output.count("no head: the backbone is the flow") == 1


def test_the_benchmark_counts_all_calls_whether_run_or_not() -> None:
    """The released steps: 100 of a diffusion in each of 64 groups, 40 of a flow in each of 2 cells, 24 in 2 scales."""
    result = bench("mar_b", "xar_b", "flowar_s", "--batches", "2", "--head-steps", "3", "--json")
    mar, xar, flowar = json.loads(result.output)
    assert (mar["backbone_calls"], mar["head_calls"]) == (64, 6400) and mar["groups"] == [4, 64]
    assert (xar["backbone_calls"], xar["head"]) == (2 * 40 + 1, None) and xar["groups"] == [2, 2]
    assert (flowar["backbone_calls"], flowar["head_calls"]) == (2, 48)
    assert all(row["extrapolated"] and row["steps"][0] < row["steps"][1] for row in (mar, xar, flowar))
    for row in (mar, xar, flowar):
        assert 0 < row["backbone"] + (row["head"] or 0) < row["seconds"] and row["speed"] == 1


def test_the_benchmark_measures_in_full_what_it_can() -> None:
    settings = ("--batches", "1", "--head-steps", "99", "--no-guidance")
    (row,) = json.loads(bench("flowar_s", *settings, "--json").output)
    assert not row["extrapolated"] and row["steps"] == [48, 48]
    assert "~" not in bench("flowar_s", *settings).output


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["var_d16"], "no generator of latents"),
        (["flowar_s", "--dtype", "float8"], "dtype must be float32 or bfloat16"),
    ],
    ids=["ids", "dtype"],
)
def test_the_benchmark_refuses(arguments: list[str], told: str) -> None:
    result = bench(*arguments)
    assert result.exit_code == 2 and told in " ".join(result.output.replace("│", " ").split())
