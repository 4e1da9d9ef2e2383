"""Training options of a discrete generator: masked inputs, alignment, own tokens in the context, mixed prediction."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from tests.test_training import GENERATOR, TOKENIZER, exported, lines, recipe, signal_at, weights
from tests.toy_paper.toy_raster import ToyRaster, ToyVQ
from varkit import VAR, MultiScaleVQ, Rng
from varkit.config import ConfigError
from varkit.interfaces import Cond
from varkit.rng import Draw
from varkit.training.loop import train
from varkit.training.objectives import objective_config
from varkit.training.objectives.variants import masks, meap, self_generated, tokenunify
from varkit.training.objectives.variants.arra import Alignment, FrozenEncoder, alignment_loss
from varkit.training.objectives.variants.combined import VariantConfig, Variants
from varkit.training.objectives.variants.meap import InputMasking
from varkit.training.objectives.variants.self_generated import SelfGenerated
from varkit.training.objectives.variants.tokenunify import MixedPrediction

ENCODER = {"encoder": "test_resnet.r160_in1k", "weights": "none"}
OPTIONS: dict[str, dict[str, Any]] = {
    "input_masking": {"input_masking": {"ratio": 0.3}},
    "alignment": {"alignment": {**ENCODER, "layer": 1, "z_weight": 1e-5}},
    "self_generated": {"self_generated": {"probability": 0.3, "schedule": "linear"}},
    "rollout": {"self_generated": {"probability": 0.3, "mode": "rollout"}},
    "mixed_prediction": {"mixed_prediction": {"random": 0.5}},
}
LENGTH, BATCH = 21, 6


def parts() -> tuple[VAR, MultiScaleVQ]:
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"codebook_size": 24, "latent_dim": 4, "scales": (1, 2, 4)}
    model = VAR(num_classes=3, depth=2, hidden_size=32, num_heads=2, **sizes)
    model.head.weight.data.normal_()  # predictions that differ
    tokenizer = MultiScaleVQ(base_channels=32, channel_multipliers=(1, 1), num_res_blocks=1, **sizes)
    tokenizer.quantize.embedding.weight.data.normal_()
    return model.train(), tokenizer.eval().requires_grad_(False)


def images(count: int = BATCH) -> Tensor:
    return torch.rand(count, 3, 8, 8, generator=torch.Generator().manual_seed(1)) * 2 - 1


def losses_of(options: VariantConfig, *, step: int = 0, model: Any = None, **more: Any) -> dict[str, Tensor]:
    own, tokenizer = parts()
    model = own if model is None else model
    variants = Variants(options, model, tokenizer, feature_dim=5)
    cond = Cond(torch.arange(BATCH) % 3)
    more = {"rng": Rng.from_seed(0, BATCH), **more}
    return variants(model, tokenizer, images(), cond, step=step, max_steps=10, **more)


def plain() -> dict[str, Tensor]:
    model, tokenizer = parts()
    tokens = tokenizer.encode(images())
    cond = Cond(torch.arange(BATCH) % 3)
    return model.training_loss(tokens, tokenizer.embed(tokens), cond, Rng.from_seed(0, BATCH))


# ---- masks ----------------------------------------------------------------------------------------------------


def test_a_subset_has_its_count_and_its_candidates_and_is_each_images_own() -> None:
    candidates = torch.arange(40) % 4 > 0
    rng = Rng.from_seed(3, 200)
    drawn = masks.random_subset(rng, candidates, 10, Draw.INPUT_MASK)
    assert drawn.sum(1).eq(10).all() and not drawn[:, ~candidates].any()
    share = drawn[:, candidates].float().mean(0)
    assert (share - 10 / 30).abs().max() < 0.15 and len(drawn.unique(dim=0)) > 190
    assert torch.equal(drawn[50:60], masks.random_subset(rng[50:60], candidates, 10, Draw.INPUT_MASK))
    counts = torch.arange(200) % 7
    assert torch.equal(masks.random_subset(rng, candidates, counts, Draw.INPUT_MASK).sum(1), counts)


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("keep_last", [False, True])
def test_masked_inputs_are_the_ratio_of_those_that_are_tokens(shared: bool, keep_last: bool) -> None:
    free = torch.arange(LENGTH) > 0
    options = InputMasking(ratio=0.25, shared=shared, keep_last=keep_last)
    drawn = torch.cat([meap.masked_inputs(options, free, Rng.from_seed(step, 8), step) for step in range(40)])
    assert drawn.sum(1).eq(5).all() and not drawn[:, 0].any()
    assert bool(drawn[:, -1].any()) is not keep_last
    assert len(drawn.view(40, 8, -1)[0].unique(dim=0)) == (1 if shared else 8)


def test_shared_sets_come_again_after_their_cycle() -> None:
    free = torch.ones(100, dtype=torch.bool)
    sets = [meap.masked_inputs(InputMasking(shared=True, seed_cycle=3), free, Rng.from_seed(0, 1), s) for s in range(4)]
    assert torch.equal(sets[0], sets[3]) and not torch.equal(sets[0], sets[1])


def test_masks_change_what_is_masked_and_nothing_else() -> None:
    model, tokenizer = parts()
    mask = masks.MaskInput(model, tokenizer, "input_masking")
    inputs, masked = torch.randn(2, LENGTH, 4), torch.rand(2, LENGTH) < 0.5
    out = mask(inputs, masked)
    assert torch.equal(out[~masked], inputs[~masked]) and (out[masked] == mask.vector).all()


def test_a_generator_of_ids_is_masked_by_its_mask_id_or_refused() -> None:
    toy, tokenizer = ToyRaster(), ToyVQ()
    with pytest.raises(ConfigError, match="input_masking masks inputs, but ToyRaster reads ids and has no mask_id"):
        masks.MaskInput(toy, tokenizer, "input_masking")
    toy.mask_id = 31
    variants = Variants(VariantConfig(input_masking=InputMasking(ratio=0.5)), toy, tokenizer)
    read: list[Tensor] = []
    toy.tokens.register_forward_pre_hook(lambda module, args: read.append(args[0]))
    images = torch.rand(4, 3, 16, 16) * 2 - 1
    variants(toy, tokenizer, images, Cond(torch.zeros(4).long()), Rng.from_seed(0, 4), step=0, max_steps=1)
    true = tokenizer.embed(tokenizer.encode(images))[:, 1:]
    changed = read[0] != true
    assert changed.any() and (read[0][changed] == 31).all() and changed.sum(1).max() <= 7


# ---- each option, on VAR --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [
        VariantConfig(input_masking=InputMasking(ratio=0.0)),
        VariantConfig(alignment=Alignment(**ENCODER, weight=0.0)),
        VariantConfig(self_generated=SelfGenerated(probability=0.0)),
        VariantConfig(self_generated=SelfGenerated(probability=0.5, schedule="linear")),  # step 0
        VariantConfig(mixed_prediction=MixedPrediction(next_all=0, random=0)),
    ],
    ids=["masking", "alignment", "self-generated", "self-generated at the start", "mixture"],
)
def test_an_option_at_rate_zero_is_the_plain_loss(options: VariantConfig) -> None:
    feature = torch.randn(BATCH, 5)
    assert torch.equal(losses_of(options, feature=feature)["loss"], plain()["loss"])


def test_masked_inputs_leave_the_targets() -> None:
    model, _ = parts()
    seen: dict[str, Tensor] = {}
    real = model.training_loss

    def spy(tokens: Tensor, inputs: Tensor, *args: Any, **more: Any) -> Any:
        seen.update(tokens=tokens, inputs=inputs)
        return real(tokens, inputs, *args, **more)

    model.training_loss = spy  # type: ignore[method-assign]
    loss = losses_of(VariantConfig(input_masking=InputMasking(ratio=0.3)), model=model)["loss"]
    _, tokenizer = parts()
    tokens = tokenizer.encode(images())
    assert torch.equal(seen["tokens"], tokens)
    changed = (seen["inputs"] != tokenizer.embed(tokens)).any(-1)
    assert changed.sum(1).eq(6).all() and not changed[:, 0].any() and loss != plain()["loss"]


def test_the_alignment_is_a_cosine_and_reaches_projector_and_generator() -> None:
    feature = torch.randn(BATCH, 5)
    same = feature[:, None].expand(-1, 7, -1)
    assert alignment_loss(3 * same, feature).abs() < 1e-6
    assert alignment_loss(-same, feature).item() == pytest.approx(2)
    model, tokenizer = parts()
    variants = Variants(VariantConfig(alignment=Alignment(**ENCODER)), model, tokenizer, feature_dim=5)
    cond = Cond(torch.zeros(BATCH).long())
    out = variants(model, tokenizer, images(), cond, Rng.from_seed(0, BATCH), step=0, max_steps=1, feature=feature)
    assert torch.equal(out["loss"], plain_of(model, tokenizer, cond) + out["alignment"])
    out["alignment"].backward()
    assert all(p.grad.abs().sum() > 0 for p in variants.projector.parameters())
    assert model.blocks[0].ffn.fc2.weight.grad.abs().sum() > 0
    assert model.blocks[1].ffn.fc2.weight.grad is None  # after the first block, which is aligned


def plain_of(model: VAR, tokenizer: MultiScaleVQ, cond: Cond) -> Tensor:
    tokens = tokenizer.encode(images())
    return model.training_loss(tokens, tokenizer.embed(tokens), cond, Rng.from_seed(0, BATCH))["loss"]


def test_the_z_loss_is_logged_and_added() -> None:
    feature = torch.randn(BATCH, 5)
    without = losses_of(VariantConfig(alignment=Alignment(**ENCODER)), feature=feature)
    with_z = losses_of(VariantConfig(alignment=Alignment(**ENCODER, z_weight=0.1)), feature=feature)
    assert with_z["loss"].item() == pytest.approx((without["loss"] + 0.1 * with_z["z"]).item())


@pytest.mark.parametrize("mode", ["one_step", "rollout"])
def test_own_tokens_are_the_models_samples_and_cost_what_is_said(mode: Any) -> None:
    model, tokenizer = parts()
    model.head.bias.data[:] = -1e4
    model.head.bias.data[7] = 1e4  # a model that says 7 and nothing else
    calls = {"forward": 0, "predict": 0}
    model.register_forward_hook(lambda *_: calls.update(forward=calls["forward"] + 1))
    predict = model.predict

    def counted(*args: Any) -> Any:
        calls["predict"] += 1
        return predict(*args)

    model.predict = counted  # type: ignore[method-assign]
    tokens, cond, rng = tokenizer.encode(images()), Cond(torch.zeros(BATCH).long()), Rng.from_seed(0, BATCH)
    options = SelfGenerated(probability=0.5, mode=mode)
    targets, context = self_generated.mixed_context(
        options, model, tokenizer, images(), tokens, cond, rng, step=0, max_steps=1, sampling={"top_k": 5}
    )
    replaced = rng.uniform(torch.arange(LENGTH), Draw.OWN_TOKEN) < 0.5
    assert (context[replaced] == 7).all() and torch.equal(context[~replaced], targets[~replaced])
    assert calls == ({"forward": 1, "predict": 0} if mode == "one_step" else {"forward": 0, "predict": 3})
    assert model.training and not targets.requires_grad


def test_targets_are_coded_anew_after_the_mixed_context() -> None:
    _, tokenizer = parts()
    tokens = tokenizer.encode(images())
    own, replaced = (tokens + 1) % 24, torch.zeros(BATCH, LENGTH, dtype=torch.bool)
    assert torch.equal(tokenizer.reencode(images(), own, replaced), tokens)
    replaced[:, 0] = True
    again = tokenizer.reencode(images(), own, replaced)
    assert torch.equal(again[:, 0], tokens[:, 0]) and (again[:, 1:] != tokens[:, 1:]).any()
    context = torch.where(replaced, own, again)
    features = tokenizer.features(images())
    after_first = features - tokenizer.quantize.sums(context[:, :1])[0]
    pooled = torch.nn.functional.interpolate(after_first, size=(2, 2), mode="area").flatten(2).transpose(1, 2)
    assert torch.equal(tokenizer.quantize.nearest(pooled.reshape(-1, 4)).view(BATCH, 4), again[:, 1:5])


def test_the_share_of_own_tokens_rises_where_asked() -> None:
    options = SelfGenerated(probability=0.4, schedule="linear")
    assert [self_generated.probability_at(options, s, 5) for s in range(5)] == pytest.approx([0, 0.1, 0.2, 0.3, 0.4])
    assert self_generated.probability_at(SelfGenerated(probability=0.4), 0, 5) == 0.4


def test_the_mixture_is_the_weighted_sum() -> None:
    out = losses_of(VariantConfig(mixed_prediction=MixedPrediction(next=0.5, next_all=2, random=3)))
    assert out["next"] == plain()["loss"]
    assert out["loss"].item() == pytest.approx((0.5 * out["next"] + 2 * out["next_all"] + 3 * out["random"]).item())


def test_alternation_goes_round_those_with_a_weight() -> None:
    options = MixedPrediction(next=1, next_all=0, random=2, schedule="alternate", period=2)
    assert [tokenunify.active(options, s) for s in (0, 1, 2, 3, 4)] == [{"next": 1}] * 2 + [{"random": 2}] * 2 + [
        {"next": 1}
    ]
    out = losses_of(VariantConfig(mixed_prediction=options), step=2)
    assert "next" not in out and out["loss"] == 2 * out["random"]


@pytest.mark.parametrize("fill", ["mask", "zero", "noise"])
def test_next_all_reads_the_prefix_only(fill: Any) -> None:
    """Images that agree in the prefix are read the same; what is predicted is the rest."""
    model, _ = parts()
    seen: list[dict[str, Any]] = []
    real = model.training_loss

    def spy(tokens: Tensor, inputs: Tensor, *args: Any, **more: Any) -> Any:
        seen.append({"tokens": tokens, "inputs": inputs, **more})
        return real(tokens, inputs, *args, **more)

    model.training_loss = spy  # type: ignore[method-assign]
    losses_of(VariantConfig(mixed_prediction=MixedPrediction(next=0, random=0, fill=fill)), model=model)
    _, tokenizer = parts()
    tokens = tokenizer.encode(images())
    keep = tokenunify.prefix_lengths(Rng.from_seed(0, BATCH), 3)
    assert set(keep.tolist()) == {1, 2}
    for row, k in enumerate(keep.tolist()):
        end = (0, 1, 5)[k]
        after = (1, 5, 21)[k]  # the group that reads the prefix ends here
        assert torch.equal(seen[0]["inputs"][row, :after], tokenizer.embed(tokens)[row, :after])
        assert (seen[0]["inputs"][row, after:] != tokenizer.embed(tokens)[row, after:]).all()
        weight = seen[0]["weight"][row]
        assert (weight[:end] == 0).all() and (weight[end:] == 1 / (LENGTH - end)).all()


def test_prefixes_are_uniform_and_hidden_tokens_follow_their_ratio() -> None:
    rng = Rng.from_seed(5, 4000)
    counts = tokenunify.prefix_lengths(rng, 5).bincount()
    assert counts[0] == 0 and len(counts) == 5 and (counts[1:] - 1000).abs().max() < 120
    assert tokenunify.hidden_tokens(MixedPrediction(random_ratio=0.3), rng, 20).sum(1).eq(6).all()
    cosine = tokenunify.hidden_tokens(MixedPrediction(), rng, 20).float().mean(1)
    assert cosine.min() >= 0.05 and abs(cosine.mean().item() - 2 / torch.pi) < 0.05  # the mean of cos on a quarter turn


# ---- what does not fit ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"input_masking": {"ratio": 1.0}}, r"input_masking.ratio must be in \[0, 1\); got 1"),
        ({"input_masking": {"rate": 0.1}}, "unknown key objective.input_masking.rate .*did you mean 'ratio'"),
        ({"alignment": {"encoder": "x"}}, "objective.alignment.weights is required"),
        ({"alignment": {**ENCODER, "layer": 0}}, "alignment.layer must be at least 1; got 0"),
        ({"self_generated": {"probability": 2}}, r"self_generated.probability must be in \[0, 1\]; got 2"),
        ({"self_generated": {"mode": "twice"}}, "self_generated.mode.*'twice'"),
        ({"mixed_prediction": {"next": 0, "next_all": 0, "random": 0}}, "one of next, next_all, random must be"),
        ({"mixed_prediction": {"random_ratio": 1}}, r"random_ratio must be in \(0, 1\); got 1"),
        ({"mixed_prediction": {"next": 0}, "input_masking": {}}, "next=0 leaves nothing for objective.input_masking"),
        ({"mixed_prediction": {}, "progressive": 0.5}, "progressive trains the first scales only.*choose one"),
    ],
)
def test_a_bad_section_is_refused_with_its_key(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=f"(?s){message}"):
        objective_config({"name": "next-scale", "tokenizer": "x", **values})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (VariantConfig(alignment=Alignment(**ENCODER)), "training_loss takes 'hidden_layer'; ToyRaster takes no opt"),
        (VariantConfig(self_generated=SelfGenerated()), "needs the method teacher_forced, which ToyRaster lacks"),
        (VariantConfig(mixed_prediction=MixedPrediction(random=0)), "training_loss takes 'weight'"),
    ],
)
def test_a_generator_without_the_hook_is_refused(options: VariantConfig, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Variants(options, ToyRaster(), ToyVQ(), feature_dim=4)


def test_a_raster_generator_samples_its_own_context_by_rollout() -> None:
    toy, tokenizer = ToyRaster(), ToyVQ()
    variants = Variants(VariantConfig(self_generated=SelfGenerated(probability=0.5, mode="rollout")), toy, tokenizer)
    pictures, cond = torch.rand(4, 3, 16, 16) * 2 - 1, Cond(torch.zeros(4).long())
    out = variants(toy, tokenizer, pictures, cond, Rng.from_seed(0, 4), step=0, max_steps=1)
    assert out["loss"].isfinite() and out["loss"].requires_grad and toy.training


def test_random_prediction_needs_a_pyramid_and_a_layer_must_exist() -> None:
    toy = ToyRaster()
    toy.training_options = frozenset({"weight"})
    with pytest.raises(ConfigError, match="random needs a token pyramid"):
        Variants(VariantConfig(mixed_prediction=MixedPrediction()), toy, ToyVQ())
    with pytest.raises(ConfigError, match=r"alignment.layer must be in 1 .. 2, the blocks of the generator; got 3"):
        Variants(VariantConfig(alignment=Alignment(**ENCODER, layer=3)), *parts(), feature_dim=4)


# ---- the encoder ----------------------------------------------------------------------------------------------


def test_an_encoder_is_opened_from_a_file_and_refused_where_it_does_not_fit(tmp_path: Path) -> None:
    first = FrozenEncoder(ENCODER["encoder"], "none").eval()
    save_file(first.model.state_dict(), tmp_path / "encoder.safetensors")
    second = FrozenEncoder(ENCODER["encoder"], str(tmp_path / "encoder.safetensors")).eval()
    assert torch.equal(first(images(2)), second(images(2))) and first(images(2)).shape == (2, first.dim)
    with pytest.raises(ConfigError, match="do not fit the encoder"):
        FrozenEncoder("test_vit.r160_in1k", str(tmp_path / "encoder.safetensors"))
    with pytest.raises(ConfigError, match=r"pretrained, none or a file; got .*absent"):
        FrozenEncoder(ENCODER["encoder"], str(tmp_path / "absent"))
    with pytest.raises(ConfigError, match=r"must be a model of timm; got 'test_resnett'.*did you mean"):
        FrozenEncoder("test_resnett", "none")


# ---- the same in parts, and runs ------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [n for n in OPTIONS if n != "alignment"])
def test_two_halves_of_a_batch_are_the_batch(name: str) -> None:
    """What two processes compute: random numbers belong to images, so the mean of the halves is the whole."""
    config = objective_config({"name": "next-scale", "tokenizer": "x", **OPTIONS[name]})
    model, tokenizer = parts()
    variants = Variants(config, model, tokenizer)
    rng, cond = Rng.from_seed(0, BATCH), Cond(torch.arange(BATCH) % 3)

    def loss(rows: slice) -> Tensor:
        part = Cond(cond.vector[rows])
        return variants(model, tokenizer, images()[rows], part, rng[rows], step=5, max_steps=10)["loss"]

    halves = (loss(slice(0, 3)) + loss(slice(3, 6))) / 2
    assert halves.item() == pytest.approx(loss(slice(0, 6)).item(), rel=1e-5)


@pytest.fixture(scope="module")
def tokenizer_folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("tokenizer")
    train(recipe(folder / "run", TOKENIZER, "loop.steps=2", "loop.sample_every=0"))
    return str(folder / "run" / "model")


def run_of(folder: Path, tokenizer: str, options: dict[str, Any], *overrides: str) -> Any:
    objective = {**GENERATOR, "tokenizer": tokenizer, **options}
    quick = ("loop.sample_every=0", "loop.validate_every=0", "loop.save_every=0", "loop.ema_decay=0")
    return recipe(folder, objective, *quick, *overrides)


@pytest.mark.parametrize("name", OPTIONS)
def test_a_tiny_run_lowers_its_loss_resumes_exactly_and_exports_the_generator_alone(
    tokenizer_folder: str, tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    overrides = ("loop.steps=24", "optim.lr=4e-3")
    whole = run_of(tmp_path / "whole", tokenizer_folder, OPTIONS[name], *overrides)
    train(whole)
    losses = [line["loss"] for line in lines(whole.folder) if "loss" in line]
    assert sum(losses[-4:]) < 0.97 * sum(losses[:4])
    parted = replace(whole, out=str(tmp_path / "parted"))
    with monkeypatch.context() as patch:
        signal_at(patch, 9, 15)
        assert not train(parted).finished
    assert train(parted, resume=True).finished
    first, second = weights(whole.folder, 24), weights(parted.folder, 24)
    assert first.keys() == second.keys()
    assert [key for key in first if not torch.equal(first[key], second[key])] == []
    extra = {key for key in first if key.startswith("variants.")}
    assert bool(extra) is (name not in ("self_generated", "rollout")) and not any("encoder" in key for key in first)
    assert not any("variants" in key or "projector" in key for key in exported(whole.folder))
    if name == "alignment":
        begun = load_file(tmp_path / "parted" / "checkpoints" / "step-00000009" / "model.safetensors")
        assert not torch.equal(begun["variants.projector.layers.0.weight"], first["variants.projector.layers.0.weight"])


def test_all_options_together(tokenizer_folder: str, tmp_path: Path) -> None:
    options = {k: v for name in OPTIONS for k, v in OPTIONS[name].items()}
    plan = run_of(tmp_path / "all", tokenizer_folder, options, "loop.steps=2", "loop.ema_decay=0.5")
    train(plan)
    first = lines(plan.folder)[0]
    assert {"next", "next_all", "random", "alignment", "loss"} <= first.keys()
