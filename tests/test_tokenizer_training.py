"""Training TiTok in one and in two stages, ELM's binary autoencoder, and the generators of factorised ids on it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor

from tests.test_training import assert_same, exported, lines, recipe, weights
from varkit import AutoPipeline, Rng, registry
from varkit.config import ConfigError
from varkit.pipelines.auto import open_tokenizer
from varkit.tokenizers.binary_autoencoder import unpack_bits
from varkit.training.augment import SHIFT, diff_augment, moved
from varkit.training.loop import train
from varkit.training.losses import discriminator_loss, lecam_loss
from varkit.training.objectives import build_objective, objective_config
from varkit.training.recipe import Recipe

CLASSES = [str(i) for i in range(10)]
GAN: dict[str, Any] = {"discriminator_width": 8, "discriminator_layers": 1, "adversarial_start": 0.5}


def tiny_of(model: str) -> dict[str, Any]:
    return {"name": "titok", "model": model, "model_overrides": dict(registry.model_entry(model).tiny), **GAN}


TITOK, KL = tiny_of("titok_fashion"), tiny_of("titok_bl64_vae_c16")
SMALL = {"num_tokens": 6, "codebook_size": 24, "latent_dim": 4, "encoder_size": [32, 1, 2], "decoder_size": [32, 1, 2]}
BAE: dict[str, Any] = {
    "name": "bae",
    "model": "bae_fashion",
    "model_overrides": {**registry.model_entry("bae_fashion").tiny, "code_weight": 0.1},
    **GAN,
}
STEPS = 12


def teacher(folder: Path, **changes: Any) -> str:
    torch.manual_seed(0)
    sizes = {**registry.model_entry("maskgit_vqgan_f16").tiny, "grid": (8, 8), **changes}
    model = registry.create_model("maskgit_vqgan_f16", **sizes)
    model.quantize.embedding.weight.data.normal_()  # type: ignore[attr-defined]
    model.save_pretrained(folder)  # type: ignore[attr-defined]
    return str(folder)


def two_stages(folder: Path) -> dict[str, dict[str, Any]]:
    """Both stages; the second starts from what the first would export at its beginning."""
    plan = {"name": "titok", "model": "titok_l32", "model_overrides": SMALL, "stage": "codes"}
    plan["teacher"] = teacher(folder / "teacher")
    built(plan).export(folder / "codes")
    second = {"name": "titok", "stage": "decoder", "init_from": str(folder / "codes"), **GAN}
    return {"codes": plan, "decoder": second | {"adaptive": True}}


def built(plan: dict[str, Any], max_steps: int = 10) -> Any:
    torch.manual_seed(0)
    objective: Any = build_objective(objective_config(plan), CLASSES)
    objective.max_steps = max_steps
    return objective.train()


def batch(objective: Any, count: int = 4, seed: int = 0) -> tuple[dict[str, Tensor], Rng]:
    height, width = objective.image_size
    pixels = torch.rand(count, 3, height, width, generator=torch.Generator().manual_seed(seed)) * 2 - 1
    return {"images": pixels, "labels": torch.arange(count) % 10}, Rng.from_seed(0, count)


def tiny_run(folder: Path, plan: dict[str, Any]) -> Recipe:
    changes = (f"loop.steps={STEPS}", "loop.validate_every=3", "loop.save_every=6", "loop.sample_every=0")
    return recipe(folder, plan, *changes, "optim.lr=3e-3")


def resumed(plan: dict[str, Any], folder: Path) -> tuple[Path, list[dict[str, float]]]:
    """A run that equals the one that goes on from its middle. Returns: its folder and lines."""
    whole = train(tiny_run(folder / "whole", plan))
    again = tiny_run(folder / "again", plan)
    (folder / "again" / "checkpoints").mkdir(parents=True)
    (whole.folder / "checkpoints" / "step-00000006").rename(folder / "again" / "checkpoints" / "step-00000006")
    train(again, resume=True)
    assert_same(weights(whole.folder, STEPS), weights(again.folder, STEPS))
    assert_same(exported(whole.folder), exported(again.folder))
    found = lines(whole.folder)
    assert [line for line in found if line["step"] > 6] == lines(again.folder)
    return whole.folder, found


@pytest.mark.parametrize("kind", ["vq", "kl", "codes", "decoder", "bae"])
def test_a_run_learns_resumes_exactly_and_exports_a_tokenizer(kind: str, tmp_path: Path) -> None:
    stages = two_stages(tmp_path) if kind in ("codes", "decoder") else {}
    plan = {"vq": TITOK | {"restart_every": 2}, "kl": KL, "bae": BAE, **stages}[kind]
    folder, found = resumed(plan, tmp_path)
    score = "validation/accuracy" if kind == "codes" else "validation/psnr"
    validated = [line[score] for line in found if score in line]
    assert validated[-1] > validated[0]
    numbers: set[str] = set().union(*found)
    assert ("discriminator/loss" in numbers) is (kind != "codes")
    assert ("discriminator/lecam" in numbers) is (kind not in ("codes", "bae"))
    assert ("usage/all" in numbers) is (kind not in ("kl", "bae"))
    assert {"kl": "kl", "bae": "bits/entropy"}.get(kind, "quantizer") in numbers
    model = open_tokenizer(str(folder / "model"))
    images = batch(model, 2)[0]["images"]
    assert model.decode(model.encode(images)).shape == images.shape


def test_the_second_stage_leaves_what_makes_tokens(tmp_path: Path) -> None:
    plan = two_stages(tmp_path)["decoder"]
    train(tiny_run(tmp_path / "run", plan))
    before = load_file(next((tmp_path / "codes").glob("*.safetensors")))
    after = load_file(next((tmp_path / "run" / "model").glob("*.safetensors")))
    held = {k for k in before if k.startswith(("encoder.", "quantize.", "latent_tokens"))}
    assert len(held) > 10 and all(torch.equal(before[k], after[k]) for k in held)
    moved_parts = {k.split(".")[0] for k in before.keys() - held if not torch.equal(before[k], after[k])}
    assert moved_parts == {"decoder", "pixel_decoder", "pixel_quantize"}


def test_the_first_stage_is_taught_the_codes_of_the_vqgan(tmp_path: Path) -> None:
    objective = built(two_stages(tmp_path)["codes"])
    vqgan, model = open_tokenizer(str(tmp_path / "teacher")), objective.tokenizer
    assert_same(dict(model.pixel_decoder.state_dict()), dict(vqgan.decoder.state_dict()))
    assert_same(dict(model.pixel_quantize.state_dict()), dict(vqgan.quantize.state_dict()))
    data, rng = batch(objective)
    losses = objective(data, "main", 0, 10, rng)
    losses["loss"].backward()
    with torch.no_grad():
        codes = vqgan.encode(data["images"])
        logits = model(data["images"]).proxy_logits
    assert len(codes.unique()) > 1
    by_hand = -logits.log_softmax(1).flatten(2).gather(1, codes[:, None]).mean()
    torch.testing.assert_close(losses["loss"], by_hand + losses["quantizer"])
    without = {name.split(".")[0] for name, p in model.named_parameters() if p.grad is None}
    assert without == {"pixel_quantize", "pixel_decoder"}
    assert objective.all_phases() == ["main"] and not any(p.requires_grad for p in model.pixel_decoder.parameters())


def test_a_kl_models_divergence_is_that_of_an_image() -> None:
    objective = built(KL | {"kl_weight": 0.5, "adversarial_weight": 0})
    data, rng = batch(objective)
    losses = objective(data, "main", 0, 10, rng)
    posterior = objective.tokenizer.posterior(data["images"])
    normal = torch.distributions.Normal(posterior.mean, (posterior.logvar / 2).exp())
    divergence = torch.distributions.kl_divergence(normal, torch.distributions.Normal(0.0, 1.0)).sum((1, 2)).mean()
    torch.testing.assert_close(losses["kl"], divergence)
    torch.testing.assert_close(losses["loss"], 0.25 * losses["l2"] + 0.5 * divergence)
    assert objective.statistics() == {} and "quantizer" not in losses
    drawn = objective.tokenizer.decode_latents(
        objective.tokenizer.latents(posterior.sample(objective.tokenizer.noise(rng)))
    )
    torch.testing.assert_close(losses["l2"], F.mse_loss(drawn, data["images"]))


def test_a_clustering_codebook_moves_once_a_step_and_not_in_a_discarded_one() -> None:
    objective = built(TITOK | {"adversarial_weight": 0})
    codes, first = objective.tokenizer.quantize.embedding.weight, None
    for seed in range(3):  # micro-batches
        data, rng = batch(objective, seed=seed)
        before = codes.detach().clone()
        objective(data, "main", 0, 10, rng)
        assert torch.equal(codes, before)
        first = objective.coded[0].ids[0] if first is None else first
    objective.discard_step()
    assert torch.equal(codes, before) and objective.coded == [] and objective.counter.pending is None
    data, rng = batch(objective)
    objective(data, "main", 0, 10, rng)
    used = objective.coded[0].ids[0].unique()
    objective.after_step(0, Rng.from_seed(0, 1))
    moved_codes = (codes - before).abs().amax(1) > 0
    assert moved_codes.sum() >= 24 - len(used) > 0  # all that nothing used
    usage = objective.counter.ema_vocab_hit_SV[0]
    assert usage.sum() == 24 and (usage > 0).sum() == len(used)


@pytest.mark.parametrize("weight", [0.0, 0.3])
def test_lecam_holds_the_logits_near_their_averages(weight: float) -> None:
    objective = built(TITOK | {"lecam_weight": weight, "lecam_decay": 0.75, "adversarial_start": 0.0})
    data, rng = batch(objective)
    objective(data, "main", 0, 10, rng)
    fake = objective.fakes[0]
    judge = objective.discriminator
    real_logits, fake_logits = judge(torch.cat([data["images"], fake])).detach().chunk(2)
    losses = objective(data, "discriminator", 0, 10, rng)
    hinge = discriminator_loss("hinge", real_logits, fake_logits)
    if not weight:
        torch.testing.assert_close(losses["loss"], hinge)
        assert "logit_averages" not in objective.state_dict()
        return
    lecam = lecam_loss(real_logits, fake_logits, torch.zeros(()), torch.zeros(()))
    torch.testing.assert_close(losses["loss"], hinge + weight * lecam)
    objective.after_step(0, Rng.from_seed(0, 1))
    means = torch.stack([real_logits.mean(), fake_logits.mean()])
    torch.testing.assert_close(objective.logit_averages, 0.25 * means)
    objective(data, "main", 1, 10, rng)
    objective(data, "discriminator", 1, 10, rng)
    objective.discard_step()
    assert objective.judged == objective.fakes == []


# ---- bits --------------------------------------------------------------------------------------------------------


def test_bits_are_drawn_in_training_unless_they_are_to_be_cut() -> None:
    found = {}
    for drawn in (True, False):
        objective = built(BAE | {"drawn": drawn, "adversarial_weight": 0})
        data, rng = batch(objective)
        losses = objective(data, "main", 0, 10, rng)
        picture, quantized = objective.tokenizer(data["images"], rng if drawn else None)
        by_hand = 0.5 * F.l1_loss(picture, data["images"]) + 0.1 * quantized.code_loss
        torch.testing.assert_close(losses["loss"], by_hand)
        found[drawn] = quantized.bits
        losses["loss"].backward()
        unread = {k for k, p in objective.tokenizer.named_parameters() if not p.requires_grad}
        assert unread == {k for k in objective.tokenizer.state_dict() if k.startswith("generator.logsigma")}
        objective.after_step(0, Rng.from_seed(0, 1))
        torch.testing.assert_close(objective.bit_share, quantized.bits.mean((0, 2, 3)))
    assert not torch.equal(found[True], found[False])


def test_the_entropy_of_bits_by_value() -> None:
    objective = built(BAE)
    objective.bit_share.copy_(torch.tensor([0.5, 0.5, 0.5, 0.25, 1.0, 0.0]))
    quarter = 0.25 * 2 + 0.75 * torch.tensor(4 / 3).log2().item()
    numbers = objective.statistics()
    assert numbers["bits/entropy"] == pytest.approx((3 + quarter) / 6, rel=1e-5) and numbers["bits/least"] == 0


def test_the_adversarial_weight_of_bits_is_at_most_one() -> None:
    objective = built(BAE | {"adversarial_start": 0.0})
    objective.discriminator.main[-1].weight.data.mul_(1e-4)  # a judge without gradient asks for a large weight
    data, rng = batch(objective)
    losses = objective(data, "main", 0, 10, rng)
    assert losses["adaptive_weight"] == 1


# ---- what the discriminator sees ---------------------------------------------------------------------------------


def test_images_are_moved_and_leave_grey_behind() -> None:
    images = torch.rand(3, 3, 16, 16) + 1
    for axis in (2, 3):
        out = moved(images, axis, torch.tensor([0.0, 0.5, 1.0]))
        assert torch.equal(out[1], images[1])
        step, across = int(16 * SHIFT), axis - 1
        assert torch.equal(out[0].narrow(across, step, 14), images[0].narrow(across, 0, 14))
        assert torch.equal(out[2].narrow(across, 0, 14), images[2].narrow(across, step, 14))
        assert not out[0].narrow(across, 0, step).any() and not out[2].narrow(across, 14, step).any()


def test_augmentation_belongs_to_the_image_and_passes_gradients() -> None:
    images, rng = torch.rand(64, 3, 16, 16, requires_grad=True), Rng.from_seed(0, 64)
    out = diff_augment(images, rng, step=0)
    torch.testing.assert_close(diff_augment(images[5:7], rng[5:7], step=0), out[5:7])
    assert not torch.equal(diff_augment(images, rng, step=1), out)
    out.sum().backward()
    assert images.grad is not None and (images.grad != 0).float().mean() > 0.7
    grey = diff_augment(torch.full((64, 3, 16, 16), 0.25), rng, step=0)
    middle = grey[:, :, 4:12, 4:12]
    assert (middle.amax((1, 2, 3)) - middle.amin((1, 2, 3)) < 1e-6).all()  # one colour stays one
    change = middle.mean((1, 2, 3)) - 0.25
    assert change.min() < -0.4 and change.max() > 0.4 and change.abs().max() < 0.5 and change.mean().abs() < 0.12


def test_the_discriminator_sees_changed_images_where_asked() -> None:
    plain, changed = (built(TITOK | {"adversarial_start": 0.0, "augment": a}) for a in (False, True))
    data, rng = batch(plain)
    for phase, name in (("main", "adversarial"), ("discriminator", "loss")):
        first, second = (o(data, phase, 0, 10, rng) for o in (plain, changed))
        assert first[name] != second[name] and second["loss"].requires_grad


# ---- what does not go together -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("plan", "message"),
    [
        (TITOK | {"model": "vq_fashion", "model_overrides": {}}, "titok trains a TiTok; .* vq_fashion is a VQGAN"),
        (tiny_of("titok_l32"), "titok_l32 is of the two-stage kind"),
        (tiny_of("tatitok_bl32_vq"), "text-aware"),
        (TITOK | {"stage": "codes"}, "objective.teacher, a MaskGIT VQGAN"),
        (TITOK | {"teacher": "x"}, "goes with objective.stage=codes"),
        (TITOK | {"stage": "decoder"}, "name it in objective.init_from"),
        (TITOK | {"codebook": "ema"}, "clustering codebook, objective.codebook=ema moves it too"),
        (KL | {"restart_every": 5}, "a KL model without codes"),
        (KL | {"kl_weight": -1}, "must not be negative"),
        (TITOK | {"lecam_weight": -1}, "must not be negative"),
        (TITOK | {"discriminator_layers": 3}, "needs images of at least 24 pixels"),
        (TITOK | {"adaptive": True, "freeze": ["decoder.*"]}, "gradients of decoder.conv_out.weight"),
        (BAE | {"adaptive": True, "freeze": ["generator.*"]}, r"gradients of generator.blocks.\d+.weight"),
        (BAE | {"model": "vq_fashion", "model_overrides": {}}, "bae trains a BinaryAutoencoder"),
    ],
)
def test_what_does_not_go_together_is_refused(plan: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        build_objective(objective_config(plan), CLASSES)


def test_a_teacher_that_does_not_fit_is_refused(tmp_path: Path) -> None:
    plan = two_stages(tmp_path)["codes"]
    registry.create_model("titok_fashion", **TITOK["model_overrides"]).save_pretrained(tmp_path / "no")  # type: ignore[attr-defined]
    for changes, message in (
        ({"teacher": str(tmp_path / "no")}, "must be a MaskGIT VQGAN; .* holds a TiTok"),
        ({"init_from": str(tmp_path / "no"), "model_overrides": {}}, "stage=codes is for the legacy models"),
        ({"model": "vq_fashion", "model_overrides": {}}, "titok trains a TiTok; .* vq_fashion is a VQGAN"),
        ({"model_overrides": {**SMALL, "proxy_codes": 7}}, "do not fit together: proxy_codes 24 and 7"),
        ({"teacher": teacher(tmp_path / "grey", image_channels=1)}, "with 1 channels; .* RGB"),
    ):
        with pytest.raises(ConfigError, match=message):
            build_objective(objective_config(plan | changes), CLASSES)


# ---- generators of factorised ids --------------------------------------------------------------------------------


def elm(folder: Path, model: str = "elm_fashion", **changes: Any) -> dict[str, Any]:
    entry = registry.model_entry(model)
    sized = {"num_classes", "grid", "sub_codes", "code_bits", "latent_dim"}
    torch.manual_seed(0)
    tokenizer: Any = registry.create_model("bae_fashion", **entry.tiny_tokenizer)
    tokenizer.quantize.proj[0].weight.data.mul_(30)  # most bits are sure: what is drawn can be learned
    tokenizer.save_pretrained(folder)
    shape = {k: v for k, v in entry.tiny.items() if k not in sized}
    return {"name": "sub-codes", "model": model, "model_overrides": shape, "tokenizer": str(folder)} | changes


@pytest.mark.parametrize("model", ["elm_fashion", "elm_mlm_fashion"])
def test_a_generator_of_sub_codes_learns_resumes_exactly_and_draws(model: str, tmp_path: Path) -> None:
    folder, found = resumed(elm(tmp_path / "bae", model, sampling={"guidance_scale": 2.0}), tmp_path)
    validated = [line["validation/loss"] for line in found if "validation/loss" in line]
    assert validated[-1] < validated[0]
    pipeline = AutoPipeline.from_pretrained(folder / "model")
    images = pipeline(class_labels=[0, 1], seed=0, output_type="pt").images
    assert images.shape[0] == 2 and images.isfinite().all()


def test_bits_are_drawn_anew_in_training_and_cut_in_validation(tmp_path: Path) -> None:
    seen: list[Tensor] = []
    for drawn in (True, False):
        objective = built(elm(tmp_path / "bae", drawn=drawn))
        real = objective.model.training_loss
        objective.model.training_loss = lambda tokens, *a, real=real, **k: seen.append(tokens) or real(tokens, *a, **k)
        data, rng = batch(objective)
        objective(data, "main", 0, 10, rng)
        objective(data, "main", 1, 10, Rng.from_seed(1, 4))
        objective.validate(data, rng)
    cut = objective.frozen("tokenizer").encode(data["images"])
    assert all(torch.equal(tokens, cut) for tokens in seen[2:])
    assert len({str(tokens.tolist()) for tokens in seen[:3]}) == 3
    p = objective.frozen("tokenizer").quantize.probability(objective.frozen("tokenizer").features(data["images"]))
    sure = (p.flatten(2).transpose(1, 2) - 0.5).abs() > 0.499
    assert torch.equal(unpack_bits(seen[0], 6)[sure], unpack_bits(cut, 6)[sure])


def test_what_a_masked_generator_does_not_read_is_not_trained(tmp_path: Path) -> None:
    objective = built(elm(tmp_path / "bae", "elm_mlm_fashion", gradient_checkpointing=True))
    fixed = {name.split(".")[0] for name, p in objective.model.named_parameters() if not p.requires_grad}
    assert fixed == {"output", "proj", "pos_embed"} and objective.model.gradient_checkpointing


def test_a_generator_of_sub_codes_takes_other_classes_and_alignment(tmp_path: Path) -> None:
    plan = elm(tmp_path / "bae")
    built(plan).export(tmp_path / "model")
    second: Any = build_objective(
        objective_config(plan | {"init_from": str(tmp_path / "model"), "model_overrides": {"dropout": 0.3}}), ["a", "b"]
    )
    assert "10 -> 2 classes" in second.notes[0] and second.model.config.dropout == 0.3
    adapted = built(plan | {"init_from": str(tmp_path / "model"), "model_overrides": {}, "lora": {"rank": 2}})
    assert "LoRA of rank 2 on 10 linear layers" in adapted.notes[1]  # five in each of two blocks
    encoder = {"encoder": "test_resnet.r160_in1k", "weights": "none"}
    aligned = built(plan | {"alignment": encoder})
    data, rng = batch(aligned)
    losses = aligned(data, "main", 0, 10, rng)
    losses["loss"].backward()
    assert 0 < losses["alignment"] < 2 and losses["loss"] > losses["alignment"]
    with pytest.raises(ConfigError, match="but alignment, are for generators of single ids"):
        built(plan | {"self_generated": {}})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": "vq_fashion"}, "vq_fashion is a tokenizer"),
        ({"model": "llamagen_fashion"}, "predicts single ids; .* next-token trains the others"),
        ({"label_smoothing": 1.0}, r"label_smoothing must be in \[0, 1\)"),
        ({"tokenizer": "titok"}, r"is a TiTok \(.*\); sub-codes trains on a binary autoencoder"),
    ],
)
def test_other_generators_and_tokenizers_are_refused(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    plan = elm(tmp_path / "bae", model_overrides={}) | changes
    if changes.get("tokenizer"):
        built(TITOK | {"adversarial_weight": 0}).export(tmp_path / "titok")
        plan["tokenizer"] = str(tmp_path / "titok")
    with pytest.raises(ConfigError, match=message):
        build_objective(objective_config(plan), CLASSES)


def test_token_files_train_with_cut_bits(tmp_path: Path) -> None:
    from tests.test_next_token import coded

    plan = elm(tmp_path / "bae", drawn=False)
    codes = coded(plan["tokenizer"], tmp_path / "codes")
    changes = ("loop.steps=2", "loop.validate_every=2", "loop.sample_every=0", "data.flip=false")
    pixels = train(recipe(tmp_path / "pixels", plan, *changes))
    files = (f"data.train={codes}", f"data.validation={codes}")
    tokens = train(recipe(tmp_path / "tokens", plan, *changes, *files))
    assert lines(pixels.folder) == lines(tokens.folder)
    with pytest.raises(ConfigError, match=r"Set objective\.drawn=false"):
        train(recipe(tmp_path / "drawn", plan | {"drawn": True}, *changes, *files))
