"""Masked parallel decoding and the masked generators."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from typer.testing import CliRunner

from tests.test_models import classes, nothing, random_tokens, tiny, tiny_pair
from varkit import AutoPipeline, ClassToImagePipeline, MaskedSampler, Rng, TokenLayout
from varkit.cli import app
from varkit.generators.maskgit import MaskedState, MaskGIT
from varkit.heads.categorical import Categorical
from varkit.interfaces import Cond
from varkit.registry import create_model
from varkit.samplers.masked import MASK_SCHEDULES, least_sure

NAMES = ["maskgit_titok_l32", "maskgit_titok_s128"]


def draw(name: str, rows: Tensor | None = None, seed: int = 0, **settings: Any) -> Tensor:
    model, tokenizer = tiny_pair(name)
    rows = torch.arange(5) if rows is None else rows
    cond, rng = Cond(classes(model, 5).labels[rows]), Rng.from_seed(seed, 5)[rows]
    known = settings.pop("known", None)
    null = nothing(model, classes(model, len(rows)))
    return MaskedSampler(**settings).generate(tokenizer, model, cond, rng, null=null, known=known).tokens


@pytest.mark.parametrize("guidance", [1.0, 3.0])
@pytest.mark.parametrize("name", NAMES)
def test_an_image_is_the_same_in_any_batch_and_place(name: str, guidance: float) -> None:
    together = draw(name, guidance_scale=guidance, softmax_annealing=True)
    assert together.min() >= 0 and together.max() < 24 and len(together.unique(dim=0)) == 5
    for rows in (torch.tensor([3]), torch.tensor([4, 0, 2])):
        assert torch.equal(draw(name, rows, guidance_scale=guidance, softmax_annealing=True), together[rows])
    assert not torch.equal(draw(name, seed=1, guidance_scale=guidance, softmax_annealing=True), together)


@pytest.mark.parametrize("name", NAMES)
def test_without_noise_no_random_number_counts(name: str) -> None:
    assert torch.equal(draw(name, choice_temperature=0.0), draw(name, choice_temperature=0.0, seed=9))
    assert not torch.equal(draw(name, choice_temperature=0.0), draw(name, choice_temperature=9.0))


@pytest.mark.parametrize("schedule", MASK_SCHEDULES)
def test_as_many_stay_masked_as_the_schedule_says(schedule: str) -> None:
    """And what is decided once stays."""
    model = tiny("maskgit_titok_l32")
    model = MaskGIT(**{**model.config, "grid": (24,)}).eval()
    sampler, steps = MaskedSampler(mask_schedule=schedule, num_steps=8), 8
    read: list[Tensor] = []
    predict = model.predict
    model.predict = lambda state, ids, every: (read.append(ids.clone()), predict(state, ids, every))[1]
    tokenizer = create_model("titok_fashion", num_tokens=24, codebook_size=24, latent_dim=4)
    out = sampler.generate(tokenizer, model, classes(model, 3), Rng.from_seed(0, 3))
    assert out.steps == out.network_calls == len(read) == steps
    share = MASK_SCHEDULES[schedule]
    expected = [24, *(min(max(1, math.floor(24 * share(s / steps))), 23) for s in range(1, steps))]
    assert [(ids == model.mask_id).sum(1).tolist() for ids in read] == [[n] * 3 for n in expected]
    for before, after in zip(read, [*read[1:], out.tokens], strict=True):
        kept = before != model.mask_id
        assert torch.equal(after[kept], before[kept])


def test_schedules_fall_from_all_to_none() -> None:
    for share in MASK_SCHEDULES.values():
        values = [share(k / 10) for k in range(11)]
        assert values[0] == pytest.approx(1) and values[-1] == pytest.approx(0, abs=1e-12)
        assert values == sorted(values, reverse=True)


def test_the_least_sure_are_masked_again() -> None:
    confidence = torch.tensor([[0.5, -1.0, 3.0, 0.0], [9.0, 8.0, 7.0, 6.0], [0.0, 1.0, 2.0, 3.0], [0.0, 1.0, 2.0, 3.0]])
    still_open = torch.tensor([[1, 1, 1, 1], [0, 1, 1, 1], [0, 0, 1, 0], [0, 0, 0, 0]]).bool()
    again = least_sure(confidence, still_open, torch.tensor([2, 9, 0, 3]))
    # two of four; at most one fewer than are open; never none of some; none of none
    assert again.int().tolist() == [[0, 1, 0, 1], [0, 0, 1, 1], [0, 0, 1, 0], [0, 0, 0, 0]]


def test_known_tokens_stay_and_each_image_may_keep_others() -> None:
    model = tiny("maskgit_titok_l32")
    given = random_tokens(model, 5)
    keep = torch.tensor([[1, 0, 0, 1, 0, 0], [0] * 6, [1] * 6, [1, 1, 1, 1, 1, 0], [0, 1, 0, 1, 0, 1]]).bool()
    tokens = draw("maskgit_titok_l32", known=(given, keep))
    assert torch.equal(tokens[keep], given[keep]) and tokens.max() < 24
    free = draw("maskgit_titok_l32")
    assert torch.equal(tokens[1], free[1]) and not torch.equal(tokens[0], free[0])


def test_drawing_at_a_temperature_is_gumbel_noise_of_that_scale() -> None:
    """The release adds noise and takes the best; the softmax at the noise's scale is the same distribution."""
    logits, batch = torch.tensor([1.0, 0.0, -2.0]), 4000
    settings = MaskedSampler(choice_temperature=2.0).settings()
    drawn, confidence = MaskedSampler()._draw(
        Categorical(logits.expand(batch, 1, 3)), Rng.from_seed(0, batch), torch.arange(1), 0, 0.25, settings
    )
    share = torch.bincount(drawn[:, 0], minlength=3) / batch
    torch.testing.assert_close(share, (logits / 1.5).softmax(0), atol=0.025, rtol=0)
    noise = confidence[:, 0] - logits[drawn[:, 0]]  # Gumbel of scale 1.5: mean 0.577 * 1.5, deviation 1.283 * 1.5
    assert abs(float(noise.mean()) - 0.866) < 0.1 and abs(float(noise.std()) - 1.924) < 0.1


class Factorised(torch.nn.Module):
    """The least that a masked generator of (B, L, G) ids needs: it remembers nothing but what was appended."""

    causal, mask_id, layout = False, 4, TokenLayout(((5,),), (4, 4), 2)

    def schedule(self, num_steps: int | None = None) -> list[Tensor]:
        return [torch.arange(5)]

    def start(self, cond: Cond, null: Cond | None = None) -> Any:
        return MaskedState(torch.full((len(cond), 5, 2), 4), cond.labels, False, 4)

    def append(self, state: Any, tokens: Tensor, positions: Tensor) -> None:
        MaskGIT.append(self, state, tokens, positions)  # type: ignore[arg-type]

    def predict(self, state: Any, inputs: Tensor, positions: Tensor) -> Categorical:
        masked = (inputs == 4).sum((1, 2)).float()[:, None, None, None]
        return Categorical(torch.randn(1, 5, 2, 4, generator=torch.Generator().manual_seed(0)) * (1 + masked))


def test_factorised_ids_are_drawn_and_masked_position_by_position() -> None:
    model, seen = Factorised(), []
    sampler = MaskedSampler(mask_schedule="cosine", draw="plain", confidence="log-prob", num_steps=4)
    tokenizer = type("Any", (), {"layout": model.layout})()
    for rows in (slice(0, 6), slice(2, 4)):
        cond, rng = Cond(torch.zeros(6, dtype=torch.int64)), Rng.from_seed(0, 6)
        seen.append(sampler.generate(tokenizer, model, cond[rows], rng[rows]).tokens)
    assert seen[0].shape == (6, 5, 2) and seen[0].max() < 4 and len(seen[0].unique(dim=0)) > 1
    assert torch.equal(seen[0][2:4], seen[1])


def test_wrong_settings_and_models_are_refused() -> None:
    wrong: list[tuple[dict[str, Any], str]] = [
        ({"mask_schedule": "cosin"}, "did you mean 'cosine'"),
        ({"draw": "none"}, "draw must be one of annealed, plain"),
        ({"confidence": "sure"}, "confidence must be one of"),
        ({"choice_temperature": -1.0}, "choice_temperature must be >= 0"),
        ({"num_steps": 0}, "num_steps must be at least 1"),
        ({"guidance_power": -1.0}, "guidance_power must be >= 0"),
        ({"top_p": 0.0}, "top_p must be in"),
    ]
    for settings, message in wrong:
        with pytest.raises(ValueError, match=message):
            MaskedSampler(**settings)
    rar, tokenizer = tiny_pair("rar_b")
    with pytest.raises(ValueError, match="draws from masked generators; RAR is none"):
        MaskedSampler().generate(tokenizer, rar, classes(rar, 1), Rng.from_seed(0, 1))
    model, tokenizer = tiny_pair("maskgit_titok_l32")
    with pytest.raises(ValueError, match="unconditional branch"):
        MaskedSampler(guidance_scale=2.0).generate(tokenizer, model, classes(model, 1), Rng.from_seed(0, 1))
    for settings, message in (
        ({"backbone": "unet"}, "backbone must be vit or uvit"),
        ({"backbone": "uvit", "depth": 3}, "must be even"),
        ({"hidden_size": 30}, "multiple of num_heads"),
    ):
        with pytest.raises(ValueError, match=message):
            MaskGIT(**settings)
    with pytest.raises(ValueError, match="num_steps must be in 1 to 6"):
        model.schedule(7)


def test_a_pipeline_takes_it_saves_it_and_the_command_shows_it(tmp_path: Path) -> None:
    model, tokenizer = tiny_pair("maskgit_titok_fashion")
    pipe = ClassToImagePipeline(
        model, tokenizer, MaskedSampler(num_steps=3, guidance_scale=2.0, choice_temperature=7.0)
    )
    pipe.set_progress_bar_config(disable=True)
    steps: list[int] = []
    out = pipe([0, 1], seed=0, output_type="np", callback_on_step_end=lambda p, s, i, v: steps.append(v["num_steps"]))
    assert steps == [3, 3, 3] and out.stats["network_calls"] == 3 and out.images.std() > 0
    pipe.save_pretrained(tmp_path / "pipe")
    again = AutoPipeline.from_pretrained(tmp_path / "pipe")
    again.set_progress_bar_config(disable=True)
    assert isinstance(again.sampler, MaskedSampler) and again.sampler.config.choice_temperature == 7.0
    assert (again([0, 1], seed=0, output_type="np").images == out.images).all()
    more = again([0, 1], seed=0, output_type="np", num_inference_steps=5, softmax_annealing=True)
    assert more.stats["steps"] == 5
    with pytest.raises(ValueError, match="MaskedSampler has no setting more_smooth;"):
        pipe([0], order="raster", more_smooth=True)
    call = ["sample", str(tmp_path / "pipe"), "--num", "2", "--steps", "4", "--out", str(tmp_path / "x.png"), "--json"]
    result = CliRunner().invoke(app, call)
    assert result.exit_code == 0, result.output
    settings = json.loads(result.output.splitlines()[-1])["settings"]
    assert settings["num_steps"] == 4 and settings["mask_schedule"] == "arccos"


def test_a_saved_pipeline_opens_where_nothing_has_imported_its_sampler(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, tokenizer = tiny_pair("maskgit_titok_fashion")
    ClassToImagePipeline(model, tokenizer, MaskedSampler(num_steps=3)).save_pretrained(tmp_path / "pipe")
    monkeypatch.delitem(sys.modules, "varkit.samplers.masked")
    assert AutoPipeline.from_pretrained(tmp_path / "pipe").sampler.config.num_steps == 3


# ---- training -------------------------------------------------------------------------------------------------


def test_masks_follow_the_arccos_schedule_and_belong_to_images() -> None:
    model = tiny("maskgit_titok_l32")
    mask = model.draw_mask(Rng.from_seed(0, 4000))
    counts = mask.sum(1)
    assert counts.min() == 1 and counts.max() == 5  # acos(u) 2 / pi < 1, floored, at least one
    # P(count >= k) = P(acos(u) 2 / pi >= k / 6) = cos(pi k / 12)
    for k in range(2, 6):
        assert abs(float((counts >= k).float().mean()) - math.cos(math.pi * k / 12)) < 0.03
    assert ((mask.float().mean(0) - mask.float().mean()).abs() < 0.03).all()  # no place is preferred
    assert torch.equal(model.draw_mask(Rng.from_seed(0, 4000)[torch.tensor([7, 3])]), mask[[7, 3]])


def test_the_loss_does_not_see_hidden_tokens_and_weighs_the_shown_ones_less() -> None:
    model, rng = tiny("maskgit_titok_s128"), Rng.from_seed(0, 2)
    tokens, cond = random_tokens(model, 2), classes(model, 2)
    mask, read = model.draw_mask(rng), []
    model.register_forward_pre_hook(lambda _, given: read.append(given[0]))
    out = model.training_loss(tokens, tokens, cond, rng, label_smoothing=0.0, unmasked_weight=0.0)
    assert torch.equal(read[0] == model.mask_id, mask) and torch.equal(read[0][~mask], tokens[~mask])
    each = -model(read[0], cond.labels).log_softmax(-1).gather(-1, tokens[..., None])[..., 0]
    torch.testing.assert_close(out["loss"], each[mask].mean())
    torch.testing.assert_close(out["masked"], mask.float().mean())
    equal = model.training_loss(tokens, tokens, cond, rng, label_smoothing=0.0, unmasked_weight=1.0)
    torch.testing.assert_close(equal["loss"], each.mean())


def test_classes_are_dropped_in_training_only() -> None:
    model = tiny("maskgit_titok_l32")
    model = MaskGIT(**{**model.config, "cond_drop_rate": 0.3, "dropout": 0.0, "attention_dropout": 0.0})
    labels: list[Tensor] = []
    model.register_forward_pre_hook(lambda _, given: labels.append(given[1]))
    tokens, rng = random_tokens(model, 1).expand(3000, -1), Rng.from_seed(0, 3000)
    for training in (True, False):
        with torch.no_grad():
            model.train(training).training_loss(tokens, tokens, Cond(torch.zeros(3000, dtype=torch.int64)), rng)
    assert abs(float((labels[0] == model.num_classes).float().mean()) - 0.3) < 0.03 and not labels[1].any()
