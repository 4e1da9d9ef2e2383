"""Starting from a trained model: own classes, frozen parts, learning rates by depth, LoRA."""

from __future__ import annotations

import importlib.util
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from tests.test_checkpoints import small_tokenizer, small_var
from tests.test_cli import refused, run
from tests.test_training import (
    CLASSES,
    GENERATOR,
    SLICE,
    TOKENIZER,
    assert_same,
    exported,
    hit_table,
    lines,
    quantized,
    recipe,
    signal_at,
    weights,
)
from varkit import VAR, AutoPipeline, MultiScaleVQ, Rng
from varkit.checkpoints.files import write_official
from varkit.config import ConfigError
from varkit.pipelines.class_to_image import ClassToImagePipeline
from varkit.samplers.next_group import NextGroupSampler
from varkit.training import finetune
from varkit.training.finetune import FinetuneConfig, layer_scales, resize_classes
from varkit.training.loop import train
from varkit.training.lora import LoRA, merged, targeted
from varkit.training.objectives import build_objective, next_scale, objective_config
from varkit.training.optim import OptimConfig, make_optimizer, parameter_groups, set_schedule

NAMES = {0: "Boot", 1: "Coat", 2: "Bag"}
OWN = ["bag", "Hat", "Boot", "Scarf"]  # as a source with NAMES has them: 2, none, 0, none
QUICK = ("loop.sample_every=0", "loop.validate_every=0", "loop.save_every=0", "loop.ema_decay=0", "loop.steps=3")


def tiny() -> VAR:
    """A model of three classes whose answers differ from class to class."""
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"codebook_size": 24, "latent_dim": 4, "scales": (1, 2, 4)}
    model = VAR(num_classes=3, depth=3, hidden_size=32, num_heads=2, **sizes)
    model.head.weight.data.normal_()
    model.class_emb.weight.data.normal_()
    for block in model.blocks:
        block.ada_lin[1].weight.data.normal_(std=0.2)
    return model.eval()


def inputs(count: int) -> Tensor:
    return torch.randn(count, 21, 4, generator=torch.Generator().manual_seed(3))


@torch.no_grad()
def answers(model: Any, labels: list[int]) -> Tensor:
    """Logits (len(labels), L, V), each label on the same inputs."""
    return model.eval()(inputs(1).expand(len(labels), -1, -1), torch.tensor(labels))


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A saved pipeline of `tiny` with class names, on a tokenizer of 8 x 8 images."""
    folder = tmp_path_factory.mktemp("source")
    torch.manual_seed(1)
    tokenizer = MultiScaleVQ(
        codebook_size=24, latent_dim=4, base_channels=32, channel_multipliers=(1, 1), num_res_blocks=1, scales=(1, 2, 4)
    )
    tokenizer.quantize.embedding.weight.data.normal_()
    labels = {str(k): v for k, v in NAMES.items()}
    ClassToImagePipeline(tiny(), tokenizer, NextGroupSampler(), id2label=labels).save_pretrained(folder)
    return folder


def values(source: Path, **changes: Any) -> dict[str, Any]:
    return {"name": "next-scale", "tokenizer": str(source), "init_from": str(source), **changes}


def objective(source: Path, classes: list[str] | None = None, **changes: Any) -> Any:
    return build_objective(objective_config(values(source, **changes)), CLASSES if classes is None else classes)


# ---- the classes ----------------------------------------------------------------------------------------------------


def test_known_classes_and_no_class_answer_as_before() -> None:
    before, model = tiny(), tiny()
    note = resize_classes(model, OWN, NAMES)
    assert note == "class embedding: 3 -> 4 classes; 2 rows kept by name, 2 new (as the null class)"
    assert model.num_classes == model.config.num_classes == 4 and model.class_emb.weight.shape == (5, 32)
    assert torch.equal(answers(model, [0, 2, 4, 1, 3]), answers(before, [2, 0, 3, 3, 3]))
    assert model.full_rate == ("class_emb.weight",)


@pytest.mark.parametrize(
    ("classes", "names", "count", "origin", "how"),
    [
        (["0", "1", "2"], {}, None, [0, 1, 2], "3 rows kept by number, 0 new"),  # nothing is known: by number
        (["a", "b", "c"], {}, None, [0, 1, 2], "3 rows kept by number, 0 new"),
        (["0", "1", "2"], NAMES, None, [0, 1, 2], "3 rows kept by number, 0 new"),
        (["a", "b"], {}, None, [3, 3], "0 rows kept by number, 2 new"),
        (["a"], {}, 3, [0, 1, 2], "3 rows kept by number, 0 new"),
        (["Coat", "x", "Boot"], NAMES, None, [1, 3, 0], "2 rows kept by name, 1 new"),
        (["Bag"], NAMES, None, [2], "1 rows kept by name, 0 new"),
        (["Bag"], NAMES, 3, [2, 1, 2], "3 rows kept by name, 0 new"),
        ([], {}, None, [3], "1 new"),
    ],
)
def test_which_rows_are_kept(
    classes: list[str], names: dict[int, str], count: int | None, origin: list[int], how: str
) -> None:
    before, model = tiny().class_emb.weight, tiny()
    assert how in resize_classes(model, classes, names, count=count)
    assert torch.equal(model.class_emb.weight, before[[*origin, 3]])
    assert bool(model.full_rate) is (3 in origin)


def test_fewer_rows_than_classes_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"the data has 4 classes, objective.model_overrides.num_classes is 2"):
        resize_classes(tiny(), OWN, count=2)


# ---- where to start -------------------------------------------------------------------------------------------------


def test_a_pipeline_a_part_and_a_shipped_name_are_opened(source: Path) -> None:
    own = objective(source, list(NAMES.values()))
    assert_same(dict(own.model.state_dict()), dict(tiny().state_dict()))
    assert own.notes == ["class embedding: 3 -> 3 classes; 3 rows kept by name, 0 new"]
    nameless = objective(source, init_from=str(source / "transformer"))
    assert nameless.notes == ["class embedding: 3 -> 10 classes; 0 rows kept by number, 10 new (as the null class)"]
    shipped = objective(Path("fashion-var"), ["Bag", "Dress"])
    assert "10 -> 2 classes; 2 rows kept by name, 0 new" in shipped.notes[0]
    with pytest.raises(ValueError, match=r"no generator at 'nowhere'.*a released checkpoint such as \w+"):
        objective(source, init_from="nowhere")
    with pytest.raises(ValueError, match="holds a MultiScaleVQ, not a VAR"):
        objective(source, init_from=str(source / "image_tokenizer"))


def test_overrides_change_what_no_weight_depends_on_and_nothing_else(source: Path) -> None:
    own = objective(source, model_overrides={"dropout": 0.3, "drop_path_rate": 0.2, "depth": 3, "scales": [1, 2, 4]})
    assert own.model.config.dropout == 0.3 and own.model.blocks[2].drop_path.rate == 0.2
    assert torch.equal(own.model.head.weight, tiny().head.weight)
    more = objective(source, ["0"], model_overrides={"num_classes": 3})
    assert torch.equal(more.model.class_emb.weight, tiny().class_emb.weight)
    with pytest.raises(ConfigError, match=r"depth=2 contradicts the weights of .*made with 3; leave it out.*dropout"):
        objective(source, model_overrides={"depth": 2})
    with pytest.raises(ConfigError, match=r"dropuot: VAR takes no such argument.*did you mean 'dropout'"):
        objective(source, model_overrides={"dropuot": 0.1})


def tokenizer_objective(source: Path, **changes: Any) -> Any:
    quick = {"name": "multiscale-vq", "adversarial_weight": 0, "init_from": str(source), "restart_every": 2}
    return build_objective(objective_config({**quick, **changes}), [])


def test_a_tokenizer_starts_from_a_pipeline_a_name_or_a_file(source: Path, tmp_path: Path) -> None:
    for where in (source, source / "image_tokenizer"):
        own = tokenizer_objective(where).tokenizer
        assert own.training and all(p.requires_grad for p in own.parameters())
        assert_same(dict(own.state_dict()), dict(MultiScaleVQ.from_pretrained(source / "image_tokenizer").state_dict()))
    assert tokenizer_objective(Path("fashion-var")).image_size == (32, 32)
    write_official(small_var(), tmp_path / "var.pth")
    write_official(small_tokenizer(), tmp_path / "vq.pth")
    with pytest.raises(ValueError, match=r"var.pth holds a VAR, not a Tokenizer"):
        tokenizer_objective(tmp_path / "var.pth")
    other = tokenizer_objective(tmp_path / "vq.pth", model_overrides={"scales": [1, 2, 4], "dropout": 0.1})
    assert other.image_size == (64, 64) and other.tokenizer.config.dropout == 0.1
    with pytest.raises(ConfigError, match=r"scales=\[1, 4\] contradicts the weights"):
        tokenizer_objective(source, model_overrides={"scales": [1, 4]})


# ---- freezing -------------------------------------------------------------------------------------------------------


def test_frozen_parameters_stay_and_the_others_move(source: Path, tmp_path: Path, capsys: Any) -> None:
    plan = recipe(tmp_path / "run", values(source, freeze=["blocks.0.*", "word_embed*"]), *QUICK)
    train(plan)
    before, after = tiny().state_dict(), exported(plan.folder)
    same = {k for k in before if k != "class_emb.weight" and torch.equal(before[k], after[f"transformer/{k}"])}
    frozen = {k for k in before if k.startswith(("blocks.0.", "word_embed"))}
    assert same == frozen and len(frozen) > 8
    count = sum(before[k].numel() for k in frozen)
    total = sum(v.numel() for v in before.values()) + 7 * 32
    assert f"{total - count:,} of {total:,} parameters are trained (" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("patterns", "message"),
    [
        (["blocks.0.atn.*"], r"'blocks.0.atn.\*' matches no parameter; near it: blocks.0.attn"),
        (["class_emb.wieght"], "near it: class_emb.weight"),
        (["zzz"], "names are such as "),
        (["*"], r"freezes every parameter; leave something"),
    ],
)
def test_patterns_that_cannot_be_meant_are_refused(patterns: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        finetune.freeze(tiny(), patterns)


def test_a_frozen_codebook_is_left_alone(source: Path) -> None:
    for patterns, moved in ((["quantize.embedding.*"], False), (["encoder.conv_in.*"], True)):
        own = tokenizer_objective(source, freeze=patterns)
        own.max_steps = 100
        before = own.tokenizer.codebook.detach().clone()
        own.tokenizer.quantize.ema_vocab_hit_SV.copy_(hit_table([3, 5]))
        own.coded = [quantized([[0], [0] * 4, [0] * 16], [torch.ones(n, 4) for n in (1, 4, 16)])]
        own.after_step(2, Rng.from_seed(0, 1))
        assert torch.equal(own.tokenizer.codebook, before) is not moved
    with pytest.raises(ConfigError, match=r"objective.freeze holds the codebook, objective.codebook=ema moves it"):
        tokenizer_objective(source, freeze=["quantize.*"], codebook="ema")
    with pytest.raises(ConfigError, match=r"objective.adaptive weighs .* set objective.adaptive=false"):
        tokenizer_objective(
            source, freeze=["decoder.*"], adversarial_weight=0.4, discriminator_layers=1, discriminator_width=8
        )


# ---- learning rates by depth ----------------------------------------------------------------------------------------


def test_rates_fall_from_the_head_to_the_embeddings(source: Path) -> None:
    scales = layer_scales(tiny(), 0.5)  # 3 blocks: depths 0 .. 4
    assert scales.keys() == dict(tiny().named_parameters()).keys()
    for part, factor in (("word_embed", 1 / 16), ("pos_", 1 / 16), ("lvl_embed", 1 / 16), ("class_emb", 1 / 16)):
        assert {v for k, v in scales.items() if k.startswith(part)} == {factor}
    for part, factor in (("blocks.0.", 1 / 8), ("blocks.1.", 1 / 4), ("blocks.2.", 1 / 2), ("head", 1)):
        assert {v for k, v in scales.items() if k.startswith(part)} == {factor}
    # With new classes their table learns at the full rate, and so does what an objective adds to the generator.
    own = objective(source, input_masking={"ratio": 0.2})
    together = layer_scales(own.trained("main"), 0.5)
    assert together["model.class_emb.weight"] == 1 and together["model.blocks.0.attn.proj.weight"] == 1 / 8
    assert {v for k, v in together.items() if k.startswith("variants.")} == {1.0}


def test_groups_hold_each_parameter_once_with_its_factor_and_its_decay() -> None:
    model = tiny()
    model.head.weight.requires_grad_(False)
    groups, plain = parameter_groups(model, 0.5), parameter_groups(model)
    assert sorted(id(p) for g in groups for p in g["params"]) == sorted(id(p) for g in plain for p in g["params"])
    assert [g["lr_scale"] for g in plain] == [1.0, 1.0]
    by_id = {
        id(p): (scale, plain_decay(model, name))
        for (name, p), scale in zip(model.named_parameters(), layer_scales(model, 0.5).values(), strict=True)
    }
    for group in groups:
        assert {by_id[id(p)] for p in group["params"]} == {(group["lr_scale"], group["decay_scale"])}
    config = OptimConfig(lr=0.5, layer_decay=0.5, warmup_steps=0, schedule="lin00", final=0.0)
    optimizer = make_optimizer(model, config)
    assert set_schedule(optimizer, config, 5, 11) == pytest.approx(0.25)  # what is logged is the head's
    assert [g["lr"] / g["lr_scale"] for g in optimizer.param_groups] == [pytest.approx(0.25)] * len(groups)
    assert min(g["lr"] for g in optimizer.param_groups) == pytest.approx(0.25 / 16)


def plain_decay(model: VAR, name: str) -> float:
    ids = {id(p) for g in parameter_groups(model) if g["decay_scale"] for p in g["params"]}
    return 1.0 if id(model.get_parameter(name)) in ids else 0.0


def test_a_network_without_blocks_and_a_bad_factor_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"optim.layer_decay is for networks with a list of blocks; Linear has none"):
        make_optimizer(nn.Linear(2, 2), OptimConfig(layer_decay=0.9))
    for bad in (0, 1.5):
        with pytest.raises(ConfigError, match=r"optim.layer_decay must be in \(0, 1\]"):
            OptimConfig(layer_decay=bad)
    with pytest.raises(ConfigError, match="MultiScaleVQ has none"):
        train(recipe(tmp_path / "run", TOKENIZER, "optim.layer_decay=0.9"))
    assert not (tmp_path / "run").exists()


# ---- LoRA -----------------------------------------------------------------------------------------------------------

LORA = {"rank": 2, "dropout": 0.1}


def test_an_adapter_changes_nothing_at_first_and_reaches_every_layer(source: Path) -> None:
    pytest.importorskip("peft", reason="the extra lora is not installed")
    own = objective(source, list(NAMES.values()), lora=LORA)
    assert isinstance(own.model, VAR)
    torch.testing.assert_close(answers(own.model, [0, 1, 3]), answers(tiny(), [0, 1, 3]), atol=1e-5, rtol=1e-5)
    trained = {k for k, p in own.model.named_parameters() if p.requires_grad}
    assert all(".lora_" in k for k in trained) and len(trained) == 2 * 4 * 3
    own.model.train()(inputs(2), torch.tensor([0, 1])).square().sum().backward()
    assert all(bool(own.model.get_parameter(k).grad.any()) for k in trained if ".lora_B." in k)  # mat_qkv too
    for k in trained:
        own.model.get_parameter(k).data.normal_(std=0.1)
    plain, keys = merged(own.model), tiny().state_dict().keys()
    assert plain.state_dict().keys() == keys and type(plain) is VAR
    torch.testing.assert_close(answers(plain, [0, 3]), answers(own.model, [0, 3]), atol=1e-4, rtol=1e-4)
    assert not torch.allclose(answers(plain, [0]), answers(tiny(), [0]), atol=1e-2)
    assert any(".lora_" in k for k in own.model.state_dict())  # the trained one keeps its adapter


def test_new_classes_are_trained_beside_the_adapter_unless_frozen(source: Path) -> None:
    pytest.importorskip("peft", reason="the extra lora is not installed")
    own = objective(source, OWN, lora=LORA)
    assert own.model.class_emb.weight.requires_grad
    assert own.notes[1] == "LoRA of rank 2 on 12 linear layers; class_emb.weight trained in full"
    less = objective(source, OWN, lora={**LORA, "targets": ["head"]}, freeze=["class_emb*"])
    assert {k for k, p in less.model.named_parameters() if p.requires_grad} == {
        "head.lora_A.default.weight",
        "head.lora_B.default.weight",
    }


def test_targets_are_linear_layers_that_are_not_frozen() -> None:
    model = tiny()
    finetune.freeze(model, ["blocks.0.*"])
    assert {n.split(".")[1] for n in targeted(model, model.lora_targets)} == {"1", "2"}
    with pytest.raises(ConfigError, match=r"'class_emb' matches no linear layer; there are word_embed"):
        targeted(model, ["class_emb"])
    with pytest.raises(ConfigError, match="are all frozen"):
        targeted(model, ["blocks.0.attn.proj"])


@pytest.mark.parametrize("variant", [{}, {"input_masking": {"ratio": 0.2}}])
def test_a_lora_run_stops_resumes_exactly_and_exports_a_plain_model(
    source: Path, tmp_path: Path, variant: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    peft = pytest.importorskip("peft", reason="the extra lora is not installed")
    settings = values(source, lora=LORA, sampling={"guidance_scale": 2.0}, **variant)
    more = ("loop.steps=6", "loop.ema_decay=0.5", "optim.layer_decay=0.8", "optim.lr=2e-2", "loop.sample_every=6")
    plan = recipe(tmp_path / "whole", settings, *QUICK, *more)
    train(plan)
    parted = replace(plan, out=str(tmp_path / "parted"))
    with monkeypatch.context() as patch:
        signal_at(patch, 2, 15)
        assert not train(parted).finished
    assert train(parted, resume=True).finished
    assert_same(weights(plan.folder, 6), weights(parted.folder, 6))
    assert_same(exported(plan.folder), exported(parted.folder))
    rates = [line["lr"] for line in lines(plan.folder) if "lr" in line]
    assert max(rates) == pytest.approx(2e-2)  # the head's, though no group has it: the head is not trained

    base, held = tiny().state_dict(), weights(plan.folder, 6)
    for name, value in base.items():
        if name != "class_emb.weight":
            part, _, leaf = name.rpartition(".")
            key = f"model.{name}" if f"model.{name}" in held else f"model.{part}.base_layer.{leaf}"
            assert torch.equal(held[key], value), name

    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "peft", None)  # who samples needs no peft
        patch.setattr("diffusers.utils.import_utils._peft_available", False)
        pipeline = AutoPipeline.from_pretrained(plan.folder / "model")
        assert pipeline([0, 9], seed=0, output_type="pt").images.isfinite().all()
    assert pipeline.transformer.state_dict().keys() == base.keys()

    start = tiny()
    resize_classes(start, CLASSES)
    opened = peft.PeftModel.from_pretrained(start, plan.folder / "model" / "adapter")
    torch.testing.assert_close(
        answers(opened.base_model.model, [0, 10]), answers(pipeline.transformer, [0, 10]), atol=1e-4, rtol=1e-4
    )
    tensors = load_file(plan.folder / "model" / "adapter" / "adapter_model.safetensors")
    assert "base_model.model.class_emb.weight" in tensors and len(tensors) == 2 * 12 + 1


def test_what_lora_needs_is_said_before_work(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match=r"objective.lora adapts a trained model; name one in objective.init_from"):
        objective_config({**GENERATOR, "tokenizer": "x", "lora": LORA})
    for bad, message in ({"rank": 0}, "rank must be at least 1"), ({"dropout": 1}, r"dropout must be in \[0, 1\)"):
        with pytest.raises(ConfigError, match=message):
            LoRA(**bad)
    find = importlib.util.find_spec
    monkeypatch.setattr("varkit.training.lora.find_spec", lambda name: None if name == "peft" else find(name))
    with pytest.raises(ImportError, match=r'pip install "varkit\[lora\]"'):
        FinetuneConfig(init_from="x", lora=LoRA()).check_finetuning()
    out = tmp_path / "run"
    words = ("train", "finetune_var", f"out={out}", f"objective.init_from={source}", "objective.lora.rank=2")
    assert "varkit[lora]" in refused(*words)
    assert not out.exists()


# ---- from a released file to pictures -------------------------------------------------------------------------------


def test_a_released_file_becomes_a_model_of_own_classes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Official keys -> `varkit convert` -> `varkit train finetune_var` -> `varkit sample`; and from the file itself."""
    monkeypatch.setattr(next_scale.Training, "pictures", lambda *_: None)  # fifty images of 256 pixels
    write_official(small_var(), tmp_path / "var_d16.pth")
    write_official(small_tokenizer(), tmp_path / "vae.pth")
    released = (tmp_path / "var_d16.pth").read_bytes()
    run("convert", tmp_path / "var_d16.pth", "--tokenizer", tmp_path / "vae.pth", "--to", tmp_path / "official")
    common = [f"data.train={SLICE}", "data.mode=squash", "data.workers=0", "loop.precision=no", *QUICK]
    common += ["loop.batch_size=2", "loop.steps=1"]
    for name, model, tokenizer in (
        ("a", tmp_path / "official", tmp_path / "official"),
        ("b", tmp_path / "var_d16.pth", tmp_path / "vae.pth"),
    ):
        words = [f"objective.init_from={model}", f"objective.tokenizer={tokenizer}", f"out={tmp_path / name}"]
        result = run("train", "finetune_var", *common, *words)
        assert "class embedding: 3 -> 10 classes; 0 rows kept by number, 10 new (as the null class)" in result.stderr
    assert_same(exported(tmp_path / "a"), exported(tmp_path / "b"))
    assert (tmp_path / "var_d16.pth").read_bytes() == released  # it was mapped into memory, not written to
    run("sample", tmp_path / "a" / "model", "--class", "9", "--num", 1, "--out", tmp_path / "one.png")
    assert (tmp_path / "one.png").stat().st_size > 1000
