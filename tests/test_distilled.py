"""Distilled Decoding: the map has the teacher's law, students see what they may, and few steps are what they say."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from typer.testing import CliRunner

from tests.test_models import liven, tiny_pair
from varkit import AutoPipeline, ClassToImagePipeline, NextGroupSampler, Rng
from varkit.checkpoints.files import load_official, to_official
from varkit.cli import app
from varkit.data.codes import CodeSet
from varkit.data.shards import shard_file
from varkit.data.trajectories import TrajectorySet, open_codes
from varkit.generators.distilled_llamagen import DistilledLlamaGen
from varkit.generators.distilled_var import DistilledVAR
from varkit.generators.llamagen import LlamaGen
from varkit.interfaces import Cond
from varkit.layout import TokenLayout
from varkit.pipelines import trajectories as maker
from varkit.pipelines.auto import assemble
from varkit.pipelines.distilled import DistilledPipeline
from varkit.pipelines.trajectories import make_trajectories
from varkit.registry import create_model, model_entry
from varkit.rng import Draw
from varkit.samplers.distilled import DistilledSampler, DistilledStep
from varkit.samplers.flow_map import FlowMap, nearest_codes, possible_codes, start_noise, velocity
from varkit.tokenizers.multiscale_vq import SCALES_256
from varkit.tokenizers.vqgan import TINY, VQGAN
from varkit.training.loop import train
from varkit.training.objectives.distilled import Config, Training
from varkit.training.recipe import make_recipe

TEACHERS = ("var_d16", "llamagen_b")
CHI_SQUARE = {8: 26.1, 15: 37.7}
"""Degrees of freedom -> what one in a thousand is above."""

FAST = FlowMap(12)


def chi_square(drawn: Tensor, probs: Tensor) -> float:
    """Of ids (N,) against the law `probs` (V,)."""
    counts = torch.bincount(drawn, minlength=len(probs)).double()
    assert not counts[probs == 0].any()
    expected = (probs.double() * len(drawn))[probs > 0]
    return float(((counts[probs > 0] - expected) ** 2 / expected).sum())


def teacher_of(name: str) -> ClassToImagePipeline:
    """A tiny teacher with its tokenizer, whose guidance is on."""
    model, tokenizer = tiny_pair(name)
    pipeline = assemble(model, tokenizer, {"guidance_scale": 1.5, "top_k": 12})
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def student_of(teacher: Any) -> Any:
    kind = DistilledVAR if hasattr(teacher.transformer, "lvl_embed") else DistilledLlamaGen
    torch.manual_seed(3)
    return liven(kind.of_teacher(teacher.transformer), 0.1)


def pipeline_of(name: str, **sampling: Any) -> DistilledPipeline:
    teacher = teacher_of(name)
    pipeline = assemble(student_of(teacher), teacher.image_tokenizer, sampling)
    pipeline.register_modules(teacher=teacher.transformer)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


# ---- the map --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scale", [0.3, 1.0, 4.0])
def test_the_maps_marginals_are_the_teachers_distribution(scale: float) -> None:
    """Whatever the size of the codebook's vectors beside the noise; codes of probability 0 never come."""
    generator = torch.Generator().manual_seed(1)
    codebook = scale * torch.randn(10, 3, generator=generator)
    probs = torch.rand(10, generator=generator) ** 3
    probs[4] = 0
    probs /= probs.sum()
    layout = TokenLayout(((20_000,),), 10, 3)
    noise = start_noise(Rng.from_seed(5, 1), layout)
    ids = FlowMap()(noise, probs.log().expand(1, 20_000, 10), codebook)[0]
    assert chi_square(ids, probs) < CHI_SQUARE[8]
    flatter = torch.where(probs > 0, probs.clamp_min(0).sqrt(), 0)
    assert chi_square(ids, flatter / flatter.sum()) > 10 * CHI_SQUARE[8]  # the test sees a wrong law


def small_teacher() -> Any:
    """Two tokens of four codes, the second depending on the first: 16 sequences, whose law can be written down."""
    torch.manual_seed(0)
    sizes = {"grid": (1, 2), "codebook_size": 4, "latent_dim": 2}
    model = LlamaGen(1, depth=1, hidden_size=16, num_heads=2, ffn_size=32, **sizes)  # type: ignore[arg-type]
    tokenizer = VQGAN(**{**TINY, **sizes})
    liven(model, 1.0)
    with torch.no_grad():
        model.output.weight.mul_(0.35)  # else the first token is nearly certain, and nothing depends on it
    pipeline = assemble(model, tokenizer.eval(), {})
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def law_of(pipeline: Any) -> Tensor:
    """(16,): the probability of each pair of tokens."""
    cond, first = Cond(torch.zeros(4, dtype=torch.int64)), torch.arange(4)
    inputs = torch.stack([torch.zeros(4, dtype=torch.int64), first], 1)
    with torch.no_grad():
        probs = pipeline.transformer.teacher_forced(inputs, cond).probs()
    return (probs[:, 0].diagonal()[:, None] * probs[:, 1]).flatten()


def test_a_teacher_drawn_by_the_map_keeps_its_joint_law() -> None:
    teacher = small_teacher()
    law = law_of(teacher)
    drawn = maker.draw(
        teacher, torch.zeros(6000, dtype=torch.int64), Rng.from_seed(2, 6000), FlowMap(), teacher.sampler.settings()
    )
    assert chi_square(drawn[:, 0] * 4 + drawn[:, 1], law) < CHI_SQUARE[15]
    apart = (law.view(4, 4).sum(1)[:, None] * law.view(4, 4).sum(0)).flatten()
    assert chi_square(drawn[:, 0] * 4 + drawn[:, 1], apart) > 10 * CHI_SQUARE[15]


def test_few_possible_codes_are_gathered_and_give_the_same() -> None:
    generator = torch.Generator().manual_seed(0)
    codebook, noise = torch.randn(200, 4, generator=generator), torch.randn(2, 50, 4, generator=generator)
    logits = torch.randn(2, 50, 200, generator=generator)
    log_probs = logits.masked_fill(logits < logits.topk(9).values[..., -1:], -torch.inf).log_softmax(-1)
    kept, codes, ids = possible_codes(log_probs, codebook)
    assert ids is not None and kept.shape == (2, 50, 9) and codes.shape == (2, 50, 9, 4)
    assert possible_codes(logits, codebook)[2] is None
    whole = velocity(noise, 0.4, log_probs, codebook)[0]
    torch.testing.assert_close(velocity(noise, 0.4, kept, codes)[0], whole)
    exact = FlowMap()(noise.double(), log_probs.double(), codebook.double())
    assert (FlowMap()(noise, log_probs, codebook) == exact).float().mean() > 0.98


def test_a_certain_code_is_always_reached() -> None:
    log_probs = torch.tensor([-torch.inf, 0.0, -torch.inf]).expand(1, 7, 3)
    codebook = torch.tensor([[0.0, 0.0], [50.0, -3.0], [1.0, 1.0]])
    assert (FlowMap(1, "euler")(torch.randn(1, 7, 2), log_probs, codebook) == 1).all()


@pytest.mark.parametrize("bad", [{"steps": 0}, {"solver": "rk9"}, {"stop": 1.0}])
def test_bad_settings_of_the_map_are_refused(bad: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="the map takes at least 1 step"):
        FlowMap(**bad)


# ---- students -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", TEACHERS)
def test_a_position_sees_itself_and_units_before_alone(name: str) -> None:
    student = student_of(teacher_of(name))
    length, dim = student.layout.length, student.layout.dim
    x = torch.randn(1, length, dim)
    labels, known = torch.tensor([1]), student.known(0)
    with torch.no_grad():
        before = student(x, labels, known)
        for place in (0, 1, 3, length - 1):
            changed = x.clone()
            changed[:, place] += 1
            after = student(changed, labels, known)
            moved = ((after.vectors - before.vectors).abs().amax(-1) > 1e-6)[0]
            expected = student.units > student.units[place]
            expected[place] = True
            assert torch.equal(moved, expected)
        assert not torch.allclose(student(x, labels, student.known(2)).logits, before.logits)  # noise or data: told
        assert not torch.allclose(student(x, torch.tensor([0]), known).logits, before.logits)


@pytest.mark.parametrize("name", TEACHERS)
def test_t_may_be_a_number_or_one_an_image(name: str) -> None:
    student = student_of(teacher_of(name))
    data, noise = torch.zeros(2, student.layout.length, 1), torch.ones(2, student.layout.length, 1)
    mixed = student.mix(data, noise, torch.tensor([1.0, 2.0]))[..., 0]
    first = [int((student.units < t).sum()) for t in (1, 2)]
    assert mixed.sum(1).tolist() == [student.layout.length - n for n in first]
    assert torch.equal(mixed[:1], student.mix(data[:1], noise[:1], 1)[..., 0])


def test_a_student_starts_from_its_teacher_and_the_quirk_damages_one_class() -> None:
    teacher = teacher_of("var_d16").transformer
    student = DistilledVAR.of_teacher(teacher, dropout=0.25)
    assert student.config.dropout == 0.25 and student.layout == teacher.layout
    assert torch.equal(student.class_emb.weight, teacher.class_emb.weight)
    assert torch.equal(student.pos_1LC[0, 0], teacher.pos_1LC[0, 0])
    assert torch.equal(student.pos_1LC[0, 2:], teacher.pos_1LC[0, 1:])
    assert torch.equal(student.lvl_embed.weight[2:], teacher.lvl_embed.weight[1:])
    assert torch.equal(student.blocks[1].ffn.fc1.weight, teacher.blocks[1].ffn.fc1.weight)
    damaged = DistilledVAR.of_teacher(teacher, official_quirks=True)
    same = (damaged.class_emb.weight == teacher.class_emb.weight).all(1)
    assert same.tolist() == [True, False, True, True]
    with pytest.raises(ValueError, match="learns from a VAR of classes; the teacher is a LlamaGen"):
        DistilledVAR.of_teacher(teacher_of("llamagen_b").transformer)


@pytest.mark.parametrize("name", ["distilled_var_d16", "distilled_llamagen_b"])
def test_a_student_is_saved_and_opened_and_written_as_released(name: str, tmp_path: Path) -> None:
    student = liven(create_model(name, **model_entry(name).tiny))
    student.save_pretrained(tmp_path / "folder")
    again = type(student).from_pretrained(tmp_path / "folder")
    assert all(torch.equal(v, student.state_dict()[k]) for k, v in again.state_dict().items())
    wrapped = {"ema": to_official(student)} if "llamagen" in name else {"trainer": {"ema_parameters": {}}}
    if "var" in name:  # averaged weights lack the constant buffers, raw ones lie beside them
        state = to_official(create_model(name, **{**model_entry(name).tiny, "scales": SCALES_256}))
        kept = {k: v for k, v in state.items() if not k.endswith(("lvl_1L", "masking", "zero_k_bias"))}
        wrapped = {"trainer": {"ema_parameters": kept, "var_wo_ddp": {k: v * 0 for k, v in state.items()}}}
    torch.save(wrapped, tmp_path / "student.pth")
    loaded = load_official(tmp_path / "student.pth", **({"grid": 4} if "llamagen" in name else {}))
    assert type(loaded) is type(student)
    assert float(loaded.n_d_embed.weight.abs().sum()) > 0  # type: ignore[union-attr, operator]


# ---- the sampler ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", TEACHERS)
def test_an_image_does_not_depend_on_its_batch(name: str) -> None:
    pipeline = pipeline_of(name, times=(0, 2), split=1)
    together = pipeline(class_labels=[0, 1, 2], rng=Rng.from_seed(4, 3), output_type="latent").images
    alone = pipeline(class_labels=[2], rng=Rng.from_seed(4, 1, first=2), output_type="latent").images
    torch.testing.assert_close(together[2:], alone, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", TEACHERS)
def test_the_second_pass_keeps_the_first_units_and_gives_the_others_their_noise_back(name: str) -> None:
    pipeline = pipeline_of(name, times=(0, 2), split=2)
    student, steps = pipeline.transformer, list[DistilledStep]()
    cond, rng = Cond(torch.tensor([1, 2])), Rng.from_seed(0, 2)
    seen: list[tuple[Tensor, Tensor]] = []
    handle = student.register_forward_pre_hook(lambda module, inputs: seen.append((inputs[0], inputs[2])))
    sampler, tokenizer = pipeline.sampler, pipeline.image_tokenizer
    out = sampler.generate(tokenizer, student, cond, rng, on_step=steps.append)
    handle.remove()
    assert [(s.by, len(s.positions)) for s in steps] == [
        ("student", student.layout.length),
        ("student", int((student.units >= 2).sum())),
    ]
    noise, first = start_noise(rng, student.layout, Draw.STUDENT_NOISE), student.units < 2
    assert torch.equal(seen[0][0], noise) and not seen[0][1].any()
    assert not torch.isclose(noise, start_noise(rng, student.layout)).any()  # that of trajectories of this seed
    assert torch.equal(seen[1][0][:, ~first], noise[:, ~first])
    assert torch.equal(seen[1][0][:, first], steps[0].tokens[:, first]) and torch.equal(seen[1][1][0], first)
    assert torch.equal(out.tokens[:, first], steps[0].tokens[:, first])
    snapped = tokenizer.codebook[nearest_codes(out.tokens, tokenizer.codebook)]
    assert torch.equal(out.tokens[:, first], snapped[:, first])  # read from the logits: codes
    assert not torch.allclose(out.tokens[:, ~first], snapped[:, ~first])  # from the continuous head: not
    one = sampler.generate(tokenizer, student, cond, rng, num_steps=1)
    assert one.network_calls == 1 and torch.equal(one.tokens, steps[0].tokens)


@pytest.mark.parametrize("name", TEACHERS)
def test_the_teacher_draws_as_it_always_does_behind_the_students_prefix(name: str) -> None:
    pipeline = pipeline_of(name, times=(0, 2), split=1)
    student, tokenizer, sampler = pipeline.transformer, pipeline.image_tokenizer, pipeline.sampler
    cond, rng = Cond(torch.tensor([1, 2])), Rng.from_seed(0, 2)
    null, settings = Cond(torch.tensor([3, 3])), {"guidance_scale": 1.5, "top_k": 12, "guidance_schedule": "constant"}
    for start in (0, 1):
        steps: list[DistilledStep] = []
        more = {"null": null, "teacher": pipeline.teacher, "on_step": steps.append, "teacher_start": start, **settings}
        out = sampler.generate(tokenizer, student, cond, rng, **more)
        assert out.steps == len(steps) == sampler.count_steps(student, teacher_start=start)
        drawn = nearest_codes(out.tokens, tokenizer.codebook)
        given = torch.where(student.units < start, drawn, 0)
        keep = student.units < start
        last = int((student.units < 2).sum())
        plain = NextGroupSampler().generate(
            tokenizer, pipeline.teacher, cond, rng, null=null, known=(given, keep), num_tokens=last, **settings
        )
        assert torch.equal(drawn[:, :last], plain.tokens)


def test_the_prefill_without_a_mask_is_another_and_only_a_quirk() -> None:
    teacher = teacher_of("var_d16").transformer
    cond, tokens = Cond(torch.tensor([0])), torch.arange(21)[None]
    inputs = tiny_pair("var_d16")[1].embed(tokens)
    positions = torch.arange(21)
    answers = []
    with torch.no_grad():
        for causal in (True, False):
            state = teacher.start(cond)
            state.block_causal = causal
            answers.append(teacher.predict(state, inputs, positions).logits)
        whole = teacher(inputs, cond.labels)
    torch.testing.assert_close(answers[0], whole, atol=1e-5, rtol=1e-5)
    assert not torch.allclose(answers[1], whole, atol=1e-2)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"times": (1, 2)}, "times must rise from 0"),
        ({"times": (0, 2, 2)}, "times must rise from 0"),
        ({"num_steps": 2}, "num_steps must be 1 to 1"),
        ({"teacher_start": 0}, "goes with two times"),
        ({"times": (0, 2), "teacher_start": 2}, "below the second of two times"),
        ({"guidance_scale": 2.0}, "a setting of the teacher"),
        ({"top_k": 5}, "a setting of the teacher"),
        ({"times": (0, 3)}, "draws 3 scales: times must be below that"),
        ({"split": 4}, "draws 3 scales"),
    ],
)
def test_settings_that_mean_nothing_are_refused(settings: dict[str, Any], message: str) -> None:
    pipeline = pipeline_of("var_d16")
    with pytest.raises(ValueError, match=message):
        pipeline.sampler.generate(
            pipeline.image_tokenizer, pipeline.transformer, Cond(torch.tensor([0])), Rng.from_seed(0, 1), **settings
        )


def test_a_student_has_nothing_to_draft_and_is_timed_as_it_is() -> None:
    """`auto` and `plain` are its own sampler; others say why not."""
    pipeline = pipeline_of("var_d16")
    assert pipeline.choose_sampler("auto", 1) is pipeline.choose_sampler("plain", 1) is pipeline.sampler
    with pytest.raises(ValueError, match=r"one token|draft"):
        pipeline.choose_sampler("sjd", 1)
    done = CliRunner().invoke(app, ["bench", "fashion-var-one-step", "--batches", "1", "--repeats", "1", "--json"])
    assert done.exit_code == 0, done.output
    (row,) = json.loads(done.stdout[done.stdout.index("{") :])["rows"]
    assert row["network_calls"] == 1


def test_a_pipeline_is_saved_with_its_teacher_or_without(tmp_path: Path) -> None:
    pipeline = pipeline_of("var_d16", times=(0, 2), split=1)
    images = pipeline(class_labels=[0, 1], seed=1, output_type="pt").images
    helped = pipeline(class_labels=[0, 1], seed=1, teacher_start=1, output_type="pt").images
    assert not torch.equal(images, helped)
    pipeline.save_pretrained(tmp_path / "both")
    pipeline.register_modules(teacher=None)
    pipeline.save_pretrained(tmp_path / "alone")
    both, alone = (AutoPipeline.from_pretrained(tmp_path / name) for name in ("both", "alone"))
    assert isinstance(both, DistilledPipeline) and alone.teacher is None and both.sampler.config.split == 1
    torch.testing.assert_close(both(class_labels=[0, 1], seed=1, output_type="pt").images, images)
    torch.testing.assert_close(both(class_labels=[0, 1], seed=1, teacher_start=1, output_type="pt").images, helped)
    with pytest.raises(ValueError, match="teacher_start needs the teacher"):
        alone(class_labels=[0], teacher_start=1)
    with pytest.raises(ValueError, match="edit with its teacher"):
        both.edit(images[0], box=(0, 0, 1, 1))
    out = tmp_path / "grid.png"
    run = ["sample", str(tmp_path / "both"), "--steps", "1", "--num", "3", "--out", str(out), "--json"]
    result = CliRunner().invoke(app, run)
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["settings"]["num_steps"] == 1 and out.is_file()
    run[2:4] = ["--teacher-start", "1"]
    result = CliRunner().invoke(app, run)
    assert result.exit_code == 0 and json.loads(result.stdout)["settings"]["teacher_start"] == 1
    refused = CliRunner().invoke(app, ["sample", str(tmp_path / "alone"), "--guidance", "3", "--out", str(out)])
    assert refused.exit_code == 2 and "guidance" in refused.output


# ---- trajectories ---------------------------------------------------------------------------------------------


def make(teacher: Any, out: Path, num: int = 10, **choices: Any) -> TrajectorySet:
    made = make_trajectories(
        teacher, out, num=num, **{"flow_map": FAST, "batch_size": 3, "shard_size": 4, "seed": 7, **choices}
    )
    assert made.trajectories == num
    return TrajectorySet(out)


def files(folder: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in folder.iterdir()}


@pytest.mark.parametrize("name", TEACHERS)
def test_trajectories_are_the_same_however_they_are_made(name: str, tmp_path: Path) -> None:
    teacher = teacher_of(name)
    whole = make(teacher, tmp_path / "whole")
    for process in (1, 0):
        make_trajectories(
            teacher, tmp_path / "shared", num=10, flow_map=FAST, batch_size=4, shard_size=4, seed=7,
            process_index=process, num_processes=2,
        )  # fmt: skip
    assert files(tmp_path / "whole") == files(tmp_path / "shared")
    assert whole.labels.tolist() == [0, 1, 2, 0, 1, 2, 0, 1, 2, 0]
    batch = whole.__getitems__([3, 8])
    rng = Rng.for_keys(7, torch.tensor([3, 8]))
    assert torch.equal(batch["noise"], start_noise(rng, teacher.transformer.layout))
    ours = maker.draw(teacher, batch["labels"], rng, FAST, teacher.sampler.settings())
    assert torch.equal(batch["tokens"], ours)
    item = whole[8]
    assert torch.equal(item["noise"], batch["noise"][1]) and torch.equal(item["tokens"], ours[1])
    assert type(open_codes(tmp_path / "whole")) is TrajectorySet
    with pytest.raises(ValueError, match="holds trajectories, not token files"):
        CodeSet(tmp_path / "whole")


def test_a_stopped_run_goes_on_and_ends_alike(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    teacher, draw, calls = teacher_of("var_d16"), maker.draw, 0
    make(teacher, tmp_path / "whole")

    def stop(*arguments: Any) -> Tensor:
        nonlocal calls
        calls += 1
        if calls == 4:  # in the second shard
            raise KeyboardInterrupt
        return draw(*arguments)

    monkeypatch.setattr(maker, "draw", stop)
    with pytest.raises(KeyboardInterrupt):
        make(teacher, tmp_path / "stopped")
    monkeypatch.undo()
    assert shard_file(tmp_path / "stopped", 0).is_file() and not shard_file(tmp_path / "stopped", 1).is_file()
    with pytest.raises(ValueError, match=r"2 of 3 shards are missing .* run the same `varkit trajectories` again"):
        TrajectorySet(tmp_path / "stopped")
    said: list[str] = []
    make(teacher, tmp_path / "stopped", announce=said.append)
    assert said == ["4 trajectories are there already"]
    assert files(tmp_path / "whole") == files(tmp_path / "stopped")
    with pytest.raises(ValueError, match=r"made otherwise .*sampling"):
        make(teacher, tmp_path / "stopped", guidance_scale=3.0)


def test_the_command_makes_them_and_says_what_it_cannot(tmp_path: Path) -> None:
    teacher_of("var_d16").save_pretrained(tmp_path / "teacher")
    run = ["trajectories", str(tmp_path / "teacher"), "--num", "5", "--out", str(tmp_path / "made")]
    run += ["--map-steps", "4", "--shard-size", "2", "--device", "cpu", "--guidance", "2", "--json"]
    result = CliRunner().invoke(app, run)
    assert result.exit_code == 0, result.output
    told = json.loads(result.stdout)
    assert (told["made"], told["there"]) == (5, 0)
    made = TrajectorySet(tmp_path / "made")
    assert len(made) == 5 and made.info.sampling["guidance_scale"] == 2 and made.info.flow_map["steps"] == 4
    again = json.loads(CliRunner().invoke(app, run).stdout)
    assert (again["made"], again["there"]) == (0, 5)
    for name, message in (("var_d16", "architecture without weights"), (str(tmp_path / "none"), "neither")):
        refused = CliRunner().invoke(app, ["trajectories", name, "--num", "1", "--out", str(tmp_path / "x")])
        assert refused.exit_code == 2 and message in refused.output
    with pytest.raises(ValueError, match="more_smooth=True makes no sense"):
        make_trajectories(teacher_of("var_d16"), tmp_path / "y", num=1, more_smooth=True)
    with pytest.raises(ValueError, match="a teacher draws ids of one codebook"):
        make_trajectories(pipeline_of("var_d16"), tmp_path / "y", num=1)


# ---- training -------------------------------------------------------------------------------------------------


def objective_of(folder: Path, **settings: Any) -> Training:
    return Training(Config(**{"teacher": str(folder), **settings}), [])


def test_a_student_learns_the_joint_law_that_independent_tokens_cannot_have(tmp_path: Path) -> None:
    """One pass, both tokens at once: nearer to the teacher's law than the product of its exact marginals."""
    teacher = small_teacher()
    teacher.save_pretrained(tmp_path / "teacher")
    data = make(teacher, tmp_path / "made", num=2048, batch_size=2048, shard_size=2048, flow_map=FlowMap(30))
    objective = objective_of(tmp_path / "teacher", vectors_weight=0.3)
    batch = data.__getitems__(list(range(2048)))
    optimizer = torch.optim.Adam(objective.model.parameters(), 5e-3)
    for step in range(150):
        rows = torch.randint(2048, (256,), generator=torch.Generator().manual_seed(step))
        optimizer.zero_grad()
        part = {name: batch[name][rows] for name in ("tokens", "noise", "labels")}
        objective.losses(part, torch.zeros(256)).pop("loss").backward()
        optimizer.step()
    student, count = assemble(objective.model.eval(), teacher.image_tokenizer, {}), 4000
    tokens = student.sampler.generate(
        student.image_tokenizer,
        student.transformer,
        Cond(torch.zeros(count, dtype=torch.int64)),
        Rng.from_seed(99, count),
    ).tokens
    ids = nearest_codes(tokens, student.image_tokenizer.codebook)
    law = law_of(teacher)
    apart = (law.view(4, 4).sum(1)[:, None] * law.view(4, 4).sum(0)).flatten()
    found = torch.bincount(ids[:, 0] * 4 + ids[:, 1], minlength=16) / count
    far, near = (apart - law).abs().sum() / 2, (found - law).abs().sum() / 2
    assert far > 0.1 and near < far / 2, (float(far), float(near))


@pytest.mark.parametrize("name", TEACHERS)
def test_training_lowers_the_loss_and_its_model_opens(name: str, tmp_path: Path) -> None:
    teacher_of(name).save_pretrained(tmp_path / "teacher")
    make(AutoPipeline.from_pretrained(tmp_path / "teacher"), tmp_path / "made", num=24, batch_size=24)
    recipe = make_recipe(
        {
            "name": "distil",
            "objective": {
                "name": "distilled",
                "teacher": str(tmp_path / "teacher"),
                "times": [0, 2],
                "split": 1,
                "keep_teacher": True,
                "sampling": {"guidance_scale": 1.5},
            },
            "data": {"train": str(tmp_path / "made"), "validation": str(tmp_path / "made"), "workers": 0},
            "optim": {"lr": 3e-3, "warmup_steps": 1},
            "loop": {
                "steps": 24,
                "batch_size": 8,
                "precision": "no",
                "ema_decay": 0.5,
                "log_every": 4,
                "validate_every": 0,
                "sample_every": 0,
            },
            "out": str(tmp_path / "run"),
        }
    )
    result = train(recipe)
    assert result.finished and result.model is not None
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    losses = [line["loss"] for line in lines if "loss" in line]
    assert losses[-1] < 0.9 * losses[0]
    last = [line for line in lines if "validation/loss" in line][-1]
    assert {"validation/accuracy_0", "validation/accuracy_2"} <= last.keys()
    pipeline = AutoPipeline.from_pretrained(result.model)
    assert isinstance(pipeline.sampler, DistilledSampler) and tuple(pipeline.sampler.config.times) == (0, 2)
    assert len(pipeline(class_labels=[0, 1], seed=0, teacher_start=1).images) == 2
    assert (tmp_path / "run" / "samples").is_dir()


def test_each_head_learns_where_it_is_read_if_losses_are_split(tmp_path: Path) -> None:
    teacher_of("var_d16").save_pretrained(tmp_path / "teacher")
    data = make(AutoPipeline.from_pretrained(tmp_path / "teacher"), tmp_path / "made", num=4)
    batch = data.__getitems__([0, 1, 2, 3])
    for split_losses in (False, True):
        objective = objective_of(
            tmp_path / "teacher", times=(0, 1), split=1, split_losses=split_losses, pixels_weight=0.5
        )
        losses = objective.losses(batch, torch.ones(4))  # the first scale is known, the rest is for the vectors
        assert (float(losses["cross_entropy"].detach()) == 0) == split_losses
        assert losses["distance"].detach() > 0 and losses["pixels"].detach() > 0
        losses["loss"].backward()
        assert objective.model.final_layer_conti.linear.weight.grad.abs().sum() > 0
        assert bool(objective.model.head.weight.grad.abs().sum() == 0) == split_losses
        assert all(p.grad is None for p in objective.frozen("tokenizer").parameters())


def test_only_trajectories_of_the_teacher_are_learned_from(tmp_path: Path) -> None:
    teacher_of("var_d16").save_pretrained(tmp_path / "teacher")
    objective = objective_of(tmp_path / "teacher")
    other = teacher_of("var_d16")
    with torch.no_grad():
        other.transformer.head.bias.add_(1)
    with pytest.raises(ValueError, match="fingerprint of the teacher"):
        objective.check_codes(make(other, tmp_path / "other", num=2).info)
    objective.check_codes(make(teacher_of("var_d16"), tmp_path / "own", num=2).info)
    with pytest.raises(ValueError, match=r"holds images; .*varkit trajectories"):
        objective.check_images("photos")
    with pytest.raises(ValueError, match=r"split_losses needs objective\.split"):
        Config(teacher="x", split_losses=True)
    with pytest.raises(ValueError, match="nor all of them 0"):
        Config(teacher="x", logits_weight=0, vectors_weight=0)
    with pytest.raises(ValueError, match="LPIPS needs images of at least 48"):
        objective_of(tmp_path / "teacher", perceptual_weight=1.0)
    with pytest.raises(ValueError, match="draws 3 scales"):
        objective_of(tmp_path / "teacher", times=(0, 3))
