"""What every registered model must do, plug-ins included: one file, tiny sizes, no model named in a test.

A new paper is covered the day it registers. `tests/toy_paper` proves it: nothing here knows that paper.
"""

from __future__ import annotations

import json
from contextlib import nullcontext
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import ModelMixin
from torch import Tensor, nn

import varkit
from varkit import ClassToImagePipeline, NextGroupSampler, Rng
from varkit.generators.one_token import OneToken
from varkit.heads.categorical import Categorical
from varkit.heads.diffusion import Diffusion
from varkit.heads.flow import Flow
from varkit.interfaces import Cond, Generator, PreviousToken, Tokenizer
from varkit.registry import create_model, list_models, model_entry
from varkit.samplers.continuous import ContinuousSampler


def distinct(names: list[str]) -> list[str]:
    """The first of those that are the same when made tiny: sizes of one model are tested once."""
    found: dict[str, str] = {}
    for name in names:
        entry = model_entry(name)
        with torch.device("meta"):
            model = entry.build(**entry.tiny)
        config = {k: v for k, v in model.config.items() if not k.startswith("_")}
        found.setdefault(f"{type(model).__name__} {sorted(config.items(), key=str)} {entry.tiny_tokenizer}", name)
    return sorted(found.values())


GENERATORS = distinct(list_models(kind="generator"))
TOKENIZERS = distinct(list_models(kind="tokenizer"))


def is_discrete(name: str) -> bool:
    with torch.device("meta"):
        return create_model(name, **model_entry(name).tiny).layout.codebook_size is not None


DISCRETE = [name for name in TOKENIZERS if is_discrete(name)]
LATENT = [name for name in TOKENIZERS if name not in DISCRETE]


def _causal(name: str) -> bool:
    with torch.device("meta"):
        return model_entry(name).build(**model_entry(name).tiny).causal


CAUSAL = [name for name in GENERATORS if _causal(name)]
"""Those of which one teacher-forced pass gives all predictions; the others follow their schedule."""
MASKED = [name for name in GENERATORS if name not in CAUSAL]
OF_IDS = [name for name in GENERATORS if is_discrete(name)]
"""Those that give logits. A generator of latents gives a field over noised tokens, which has no cross entropy and no
best token, and which `forward` of all positions at once need not return: tests of these are of ids alone."""
CAUSAL_OF_IDS = [name for name in CAUSAL if name in OF_IDS]
ONE_TOKEN = [name for name in CAUSAL if issubclass(type(create_model(name, **model_entry(name).tiny)), OneToken)]

OFFICIAL_PARAMETERS = {
    "var_d16": 310_283_520,
    "var_d20": 600_917_136,
    "var_d24": 1_033_399_360,
    "var_d30": 2_010_020_356,
    "var_d36": 2_353_893_904,
    "llamagen_b": 110_888_448,
    "llamagen_l": 342_910_976,
    "llamagen_xl": 774_699_520,
    "llamagen_xxl": 1_410_972_672,
    "llamagen_3b": 3_096_659_200,
    "llamagen_t2i_xl": 777_678_080,
    "controlar_t2i_xl": 835_943_296 - 16384 * 1280 - 384,  # less what nothing reads: an embedding, a mask token
    "controlar_t2i_xl_base": 900_958_720 - 16384 * 1280 - 768,
    "controlar_c2i_b": 150_888_960 - 16384 * 768 - 768 - 384 * 385,  # less an embedding, a norm and ViT's pooler
    "controlar_c2i_l": 391_333_120 - 16384 * 1024 - 1024 - 384 * 385,
    "distilled_var_d16": 328_165_664,
    "distilled_var_d20": 635_399_088,
    "distilled_var_d24": 1_092_478_560,
    "distilled_llamagen_b": 98_321_672,
    "distilled_llamagen_l": 326_155_272,
    "vq_ds16": 71_883_403,
    "vq_ds8": 70_109_835,
    "flextok_d12_d12": 341_651_737,
    "flextok_d18_d18": 949_734_553,
    "flextok_d18_d28": 2_540_882_841,
    "mar_b": 207_924_768,
    "mar_l": 478_326_304,
    "mar_h": 942_403_104,
    "multiscale_vq_f16": 108_948_355,
    "multiscale_vq_f16_512": 108_948_355,
    "multiscale_vq_f16_1024": 108_948_355,
    "kl16": 66_456_019,
    "xar_b": 172_638_224,
    "xar_l": 608_397_968,
    "xar_h": 1_186_024_096,
    "flowar_s": 171_718_072,
    "flowar_l": 586_862_912,
    "flowar_h": 1_913_316_880,
    "rar_b": 260_923_648,
    "rar_l": 461_668_352,
    "rar_xl": 955_425_024,
    "rar_xxl": 1_498_520_704,
    "maskgit_vqgan_f16": 54_515_587,
    "maskgit_titok_l32": 177_202_432,
    "maskgit_titok_b64": 177_227_008,
    "maskgit_titok_s128": 294_990_848,
    "titok_l32": 641_054_735,
    "titok_b64": 204_814_095,
    "titok_s128": 83_674_639,
    "titok_bl64_vq8k": 390_016_148,
    "titok_bl128_vq8k": 390_179_988,
    "titok_sl256_vq8k": 330_260_884,
    "titok_ll32_vae_c16": 606_879_604,
    "titok_bl64_vae_c16": 389_418_100,
    "titok_bl128_vae_c16": 389_581_940,
    "tatitok_bl32_vq": 390_800_532,
    "tatitok_bl64_vq": 390_882_452,
    "tatitok_bl128_vq": 391_046_292,
    "tatitok_bl32_vae": 390_202_484,
    "tatitok_bl64_vae": 390_284_404,
    "tatitok_sl128_vae": 330_275_188,
    "elm_ar_l_1_16": 443_574_272,
    "elm_ar_l_2_8": 312_502_272,
    "elm_ar_l_2_10": 315_648_000,
    "elm_ar_l_2_12": 328_230_912,
    "elm_ar_xl_2_10": 741_276_160,
    "elm_ar_xl_2_12": 757_004_800,
    "elm_ar_xxl_2_12": 1_390_525_440,
    "elm_ar_2b_2_12": 1_909_458_432,
    "elm_mlm_l_1_16": 444_955_649,
    "elm_mlm_xl_1_16": 902_566_657,
    "elm_mlm_xxl_1_16": 1_564_793_345,
    "larp_tokenizer_l_long": 193_880_224,
    "larp_lp": 631_975_680,
    "larp_lp_frames": 633_157_120,
    "bae_1_16": 65_526_550,
    "bae_2_8": 65_526_550,
    "bae_2_10": 65_528_602,
    "bae_2_12": 65_530_654,
}


def liven(model: nn.Module, std: float = 0.2) -> Any:
    """Add noise to all parameters: at initialisation most branches are gated to nearly nothing, and a
    wrong mask or cache would hide below any tolerance."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(std * torch.randn(parameter.shape, generator=generator))
    return model.eval()


def tiny(name: str) -> Any:
    """The model of that name, small, in eval mode, with lively weights: the same ones every time."""
    entry = model_entry(name)
    torch.manual_seed(0)
    return liven(entry.build(**entry.tiny), 0.2 if entry.kind == "generator" else 0.05)


def tiny_pair(name: str) -> tuple[Any, Any]:
    """The generator of that name and a tokenizer for it."""
    entry, model = model_entry(name), tiny(name)
    assert entry.tokenizer is not None
    return model, liven(create_model(entry.tokenizer, **entry.tiny_tokenizer), 0.05)


def other_codebook(entry: Any) -> dict[str, Any]:
    """The paired tokenizer's tiny arguments with another codebook; finite scalars have levels, binary codes bits,
    latents channels."""
    changes: dict[str, Any] = {"levels": (2, 2), "bits": 4, "latent_channels": 5}
    change = {k: v for k, v in changes.items() if k in entry.tiny_tokenizer}
    if not change and "vae_config" in entry.tiny_tokenizer:
        change = {"vae_config": {**entry.tiny_tokenizer["vae_config"], "latent_channels": 5}}
    change = change or {"codebook_size": 5}
    return {**entry.tiny_tokenizer, **change}


def classes(model: Any, batch: int) -> Cond:
    """What the model is conditioned on: classes in turn, texts of all lengths, padded on the left, or the tokens of
    given frames; and where it is steered by them, control images, some of strength 0."""
    if model.condition == "text":
        length = model.config.text_length
        words = torch.randn(batch, length, model.config.text_dim, generator=torch.Generator().manual_seed(2))
        mask = torch.arange(length) >= (torch.arange(batch) % length)[:, None]
        cond = Cond(sequence=words * mask[..., None], mask=mask)
    elif model.condition == "frames":
        cond = Cond(random_tokens(model, batch, seed=3))
    else:
        cond = Cond(torch.arange(batch) % model.num_classes)
    if "control" not in model.takes:
        return cond
    height, width = (side * model.controller.encoder.stride for side in model.layout.grids[-1])
    images = torch.rand(batch, 1, 3, height, width, generator=torch.Generator().manual_seed(4)) * 2 - 1
    weight = torch.tensor([1.0, 0.5, 0.0])[torch.arange(batch) % 3][:, None]
    return cond + Cond(control=images, control_weight=weight)


def nothing(model: Any, cond: Cond) -> Cond | None:
    """The absence of `cond`; None where there is none, of given frames."""
    if model.condition == "frames":
        return None
    return model.null(cond) if model.condition == "text" else Cond(torch.full((len(cond),), model.num_classes))


def at_once(model: Any, inputs: Tensor, cond: Cond) -> Tensor:
    """Teacher-forced logits of all positions."""
    control = {} if cond.control is None else {"control": cond.control, "control_weight": cond.control_weight}
    if cond.vector is not None:
        return model(inputs, cond.vector, **control)
    return model(inputs, *cond.text, **control)


def factors(model: Any) -> tuple[int, ...]:
    """(G,) of factorised codes, else ()."""
    size = model.layout.codebook_size
    return (len(size),) if isinstance(size, tuple) else ()


def sizes(model: Any) -> Tensor:
    """How many values an id has: one number, or (G,) of factorised codes."""
    return torch.tensor(model.layout.codebook_size)


def random_tokens(model: Any, batch: int, seed: int = 0) -> Tensor:
    """Ids (B, L), or (B, L, G) of factorised codes, or latents (B, L, C) of a tokenizer without a codebook."""
    generator = torch.Generator().manual_seed(seed)
    if model.layout.codebook_size is None:
        return torch.randn(batch, model.layout.length, model.layout.dim, generator=generator)
    shape = (batch, model.layout.length, *factors(model))
    return torch.randint(2**62, shape, generator=generator) % sizes(model)


def size_of(tokenizer: Any) -> tuple[int, ...]:
    """(H, W), or of tokenizers of clips (T, H, W)."""
    return (*(() if tokenizer.num_frames is None else (tokenizer.num_frames,)), *tokenizer.image_size)


def random_images(tokenizer: Any, batch: int, seed: int = 0) -> Tensor:
    """(B, 3, H, W), or clips (B, 3, T, H, W)."""
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(batch, 3, *size_of(tokenizer), generator=generator) * 2 - 1


def settings_of(model: Any) -> Any:
    """The configuration as JSON keeps it (a tuple comes back as a list)."""
    return json.loads(json.dumps({k: v for k, v in model.config.items() if not k.startswith("_")}))


def other_tokens(model: Any, tokens: Tensor) -> Tensor:
    """Different ones everywhere."""
    return tokens + 1 if model.layout.codebook_size is None else (tokens + 1) % sizes(model)


def said(model: Any, predictive: Any, positions: Tensor, batch: int) -> Tensor:
    """What a predictive says of `positions` (n,), as one tensor (B, n, ...): logits; or the field of a flow or a
    diffusion midway, where each position holds a noise of its own."""
    if isinstance(predictive, Categorical):
        return predictive.logits
    noise = torch.randn(model.layout.length, model.layout.dim, generator=torch.Generator().manual_seed(4))
    x = noise.to(positions.device)[positions].expand(batch, -1, -1)
    if isinstance(predictive, Flow):
        return predictive.velocity(x, x.new_full((batch,), 0.5))
    assert isinstance(predictive, Diffusion)
    return predictive.denoise(x, x.new_full((1, 1), 500.0))


def step_answers(model: Any, tokens: Tensor, inputs: Tensor, cond: Cond, null: Cond | None = None) -> Tensor:
    """(B, L, ...): what is said of every group, in order, each reading the true tokens before."""
    state, groups, answers = model.start(cond, null), model.schedule(), []
    for positions in groups:
        answers.append(said(model, model.predict(state, inputs[:, positions], positions), positions, len(tokens)))
        model.append(state, tokens[:, positions], positions)
    return torch.cat(answers, 1)[:, torch.cat(groups).argsort()]


def same(first: Tensor, second: Tensor) -> None:
    """Equal ids; or latents that differ by the rounding of other shapes, which a head's steps enlarge."""
    if not first.is_floating_point():
        assert torch.equal(first, second)
    torch.testing.assert_close(first, second, atol=1e-3 * float(second.abs().max()), rtol=0)


def sampler_of(model: Any, **settings: Any) -> Any:
    """A sampler of ids or of latents, whose heads take few steps here."""
    if model.layout.codebook_size is None:
        return ContinuousSampler(**{"head_steps": 3, **settings})
    return NextGroupSampler(**settings)


def sample(model: Any, tokenizer: Any, cond: Cond, rng: Rng, **settings: Any) -> Tensor:
    null = nothing(model, cond)
    return sampler_of(model).generate(tokenizer, model, cond, rng, null=null, **settings).tokens


# ---- the registry ---------------------------------------------------------------------------------------------


def test_the_plug_in_is_listed_beside_our_own() -> None:
    assert {"toy_raster", "toy_vq", "var_d16", "multiscale_vq_f16"} <= set(varkit.list_models())
    assert "toy_vq" in TOKENIZERS and "toy_vq" not in GENERATORS
    assert varkit.list_models("toy_*") == ["toy_raster", "toy_vq"]


def test_the_plug_in_is_one_file_that_varkit_does_not_know() -> None:
    package = Path(varkit.__file__).parent
    assert not [p for p in package.rglob("*.py") if "toy" in p.read_text().lower()]


def test_a_wrong_name_is_answered_with_the_nearest() -> None:
    with pytest.raises(ValueError, match="did you mean 'var_d16'"):
        create_model("var_d_16")
    with pytest.raises(ValueError, match="did you mean 'toy_raster'"):
        create_model("toy_rasta")
    with pytest.raises(ValueError, match=r"no checkpoint is called 'var_d16.in1k'.*did you mean 'var_d16.in1k_256'"):
        varkit.registry.checkpoint("var_d16.in1k")


@pytest.mark.parametrize("name", list_models())
def test_full_size_layouts_fit_and_published_sizes_hold(name: str) -> None:
    entry = model_entry(name)
    with torch.device("meta"):
        model = entry.build()
        if entry.kind in ("generator", "student"):
            assert entry.tokenizer is not None
            assert model.layout == create_model(entry.tokenizer).layout
    assert all(p.is_meta for p in model.parameters())
    if name in OFFICIAL_PARAMETERS:
        assert sum(p.numel() for p in model.parameters()) == OFFICIAL_PARAMETERS[name]


# ---- all models -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", GENERATORS + TOKENIZERS)
def test_saved_and_opened_again_it_is_the_same(name: str, tmp_path: Path) -> None:
    model = tiny(name)
    assert isinstance(model, ModelMixin) and isinstance(model, Generator | Tokenizer)
    model.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path)
    assert again.layout == model.layout and not again.training
    assert settings_of(again) == settings_of(model)
    assert {k: v.dtype for k, v in again.state_dict().items()} == {k: v.dtype for k, v in model.state_dict().items()}
    if isinstance(model, Generator):
        tokens = random_tokens(model, 2)
        _, tokenizer = tiny_pair(name)
        ours, theirs = (step_answers(m, tokens, tokenizer.embed(tokens), classes(m, 2)) for m in (model, again))
    else:
        images = random_images(model, 2)
        ours, theirs = (m.decode(m.encode(images)) for m in (model, again))
    assert all(torch.equal(v, model.state_dict()[k]) for k, v in again.state_dict().items())
    if isinstance(model, Generator) and name not in OF_IDS:  # where weights lie in memory may change their rounding
        torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-4)
    else:
        assert torch.equal(ours, theirs)


# ---- generators -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", GENERATORS)
def test_layout_is_the_paired_tokenizers(name: str) -> None:
    model, tokenizer = tiny_pair(name)
    assert model.layout == tokenizer.layout
    with torch.device("meta"):
        other = create_model(model_entry(name).tokenizer or "", **other_codebook(model_entry(name)))
    with pytest.raises(ValueError, match="do not fit together"):
        sample(model, other, classes(model, 1), Rng.from_seed(0, 1))


@pytest.mark.parametrize("name", GENERATORS)
def test_schedule_decides_each_position_once(name: str) -> None:
    model = tiny(name)
    groups = model.schedule()
    assert all(g.dtype == torch.int64 and g.dim() == 1 and len(g) for g in groups)
    assert sorted(torch.cat(groups).tolist()) == list(range(model.layout.length))
    assert len(model.schedule(len(groups))) == len(groups)
    for own in model.groups(Rng.from_seed(0, 3)), model.groups(Rng.from_seed(0, 3), len(groups)):
        assert len(own) == len(groups)
        every = torch.cat([g.expand(3, -1) for g in own], 1)  # of each image
        assert torch.equal(every.sort(1).values, torch.arange(model.layout.length).expand(3, -1))


@pytest.mark.parametrize("name", CAUSAL)
def test_step_by_step_inputs_are_the_teacher_forced_ones(name: str) -> None:
    model, tokenizer = tiny_pair(name)
    tokens = random_tokens(model, 3)
    inputs, running = tokenizer.embed(tokens), tokenizer.running(3)
    assert inputs.shape[:2] == tokens.shape[:2]
    if isinstance(running, PreviousToken) and any(len(positions) > 1 for positions in model.schedule()):
        pytest.skip("several tokens at once: what they read is in the state, not the token before each")
    for positions in model.schedule():
        torch.testing.assert_close(running.inputs(positions), inputs[:, positions])
        running.record(tokens[:, positions], positions)


@pytest.mark.parametrize("name", CAUSAL_OF_IDS)
def test_cached_logits_are_the_teacher_forced_ones(name: str) -> None:
    model, tokenizer = tiny_pair(name)
    tokens, cond = random_tokens(model, 4), classes(model, 4)
    null = nothing(model, cond)
    inputs = tokenizer.embed(tokens)
    with torch.no_grad():
        stepwise = step_answers(model, tokens, inputs, cond)
        torch.testing.assert_close(stepwise, at_once(model, inputs, cond), atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(step_answers(model, tokens, inputs, cond, null), stepwise, atol=1e-4, rtol=1e-4)
        loss = model.training_loss(tokens, inputs, cond, Rng.from_seed(0, 4))["loss"]
    expected = -stepwise.log_softmax(-1).gather(-1, tokens[..., None]).mean()
    torch.testing.assert_close(loss, expected, atol=1e-5, rtol=1e-5)
    assert stepwise.dtype == torch.float32 and stepwise.std() > 0.1


@pytest.mark.parametrize("name", CAUSAL_OF_IDS)
def test_every_decided_token_matters_to_what_follows_and_none_that_follows_does(name: str) -> None:
    """Causality over groups: a changed token changes later groups' logits and no earlier one."""
    model, tokenizer = tiny_pair(name)
    tokens, cond, groups = random_tokens(model, 2), classes(model, 2), model.schedule()
    with torch.no_grad():
        before = at_once(model, tokenizer.embed(tokens), cond)
        for g, positions in enumerate(groups[:-1]):
            changed = tokens.clone()
            changed[:, positions] = other_tokens(model, changed[:, positions])
            after = at_once(model, tokenizer.embed(changed), cond)
            past, future = torch.cat(groups[: g + 1]), torch.cat(groups[g + 1 :])
            torch.testing.assert_close(after[:, past], before[:, past], atol=1e-5, rtol=1e-5)
            assert ((after - before)[:, future].abs().amax(-1) > 1e-5).all()


@pytest.mark.parametrize("name", MASKED)
def test_every_decided_token_of_a_masked_generator_matters_to_all_that_is_open(name: str) -> None:
    model = tiny(name)
    cond = classes(model, 2)
    tokens, groups = random_tokens(model, 2), model.schedule()
    with torch.no_grad():
        for g in range(1, len(groups)):
            decided, still_open = torch.cat(groups[:g]), torch.cat(groups[g:])
            answers = []
            for changed in (tokens, other_tokens(model, tokens)):
                state = model.start(cond)
                model.append(state, changed[:, decided], decided)
                predictive = model.predict(state, changed[:, still_open], still_open)
                answers.append(said(model, predictive, still_open, 2))
            assert ((answers[0] - answers[1]).abs().amax(-1) > 1e-5).all()


@pytest.mark.parametrize("name", GENERATORS)
def test_training_loss_reaches_every_parameter(name: str) -> None:
    model, tokenizer = tiny_pair(name)
    model.train()
    tokens = random_tokens(model, 8)
    losses = model.training_loss(tokens, tokenizer.embed(tokens), classes(model, 8), Rng.from_seed(0, 8))
    assert losses["loss"].requires_grad and all(v.isfinite() and v.dim() == 0 for v in losses.values())
    losses["loss"].backward()
    unused = [k for k, p in model.named_parameters() if p.requires_grad and (p.grad is None or not p.grad.any())]
    assert not unused
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.requires_grad)


@pytest.mark.parametrize("name", GENERATORS)
def test_gradient_checkpointing_changes_no_gradient(name: str) -> None:
    model, tokenizer = tiny_pair(name)
    if not model._supports_gradient_checkpointing:
        pytest.skip("does not offer gradient checkpointing")
    tokens, gradients = random_tokens(model, 4), []
    blocks = [module for module in model.modules() if type(module).__name__ in model._no_split_modules]
    calls = [0] * len(blocks)

    def count(i: int, *_: Any) -> None:
        calls[i] += 1

    model.train()
    for i, block in enumerate(blocks):
        block.register_forward_pre_hook(partial(count, i))
    for on in (False, True):
        if on:
            model.enable_gradient_checkpointing()
            calls[:] = [0] * len(blocks)
        torch.manual_seed(3)  # for whatever a network drops at random
        model.zero_grad()
        model.training_loss(tokens, tokenizer.embed(tokens), classes(model, 4), Rng.from_seed(0, 4))["loss"].backward()
        gradients.append({k: p.grad.clone() for k, p in model.named_parameters() if p.requires_grad})
    assert blocks and set(calls) == {2}  # once forward, once again on the way back
    torch.testing.assert_close(gradients[1], gradients[0])


@pytest.mark.parametrize("name", GENERATORS)
def test_rewound_groups_leave_no_trace(name: str) -> None:
    model, tokenizer = tiny_pair(name)
    tokens, other, cond = random_tokens(model, 2), random_tokens(model, 2, seed=1), classes(model, 2)
    inputs, wrong, groups = tokenizer.embed(tokens), tokenizer.embed(other), model.schedule()
    with torch.no_grad():
        expected = step_answers(model, tokens, inputs, cond)
        state = model.start(cond)
        for g, positions in enumerate(groups):
            for detour in groups[g : g + 2]:  # take up to two steps on wrong inputs, then go back
                model.predict(state, wrong[:, detour], detour)
                model.append(state, other[:, detour], detour)
            state.rewind(sum(len(d) for d in groups[g : g + 2]))
            assert state.length == sum(len(p) for p in groups[:g])
            answer = said(model, model.predict(state, inputs[:, positions], positions), positions, 2)
            torch.testing.assert_close(answer, expected[:, positions], atol=1e-5, rtol=1e-5)
            model.append(state, tokens[:, positions], positions)
        assert state.length == model.layout.length
        state.reset()
        assert state.length == 0
        first = said(model, model.predict(state, inputs[:, groups[0]], groups[0]), groups[0], 2)
        torch.testing.assert_close(first, expected[:, groups[0]], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", ONE_TOKEN)
def test_the_compiled_step_predicts_as_the_plain_one(name: str) -> None:
    """One graph for all steps and batches of a size, also after going back, and with a batch before still held."""
    torch._dynamo.reset()
    model, tokenizer = tiny_pair(name)
    tokens, cond = random_tokens(model, 3), classes(model, 3)
    null = nothing(model, cond)
    inputs = tokenizer.embed(tokens)
    graphs: list[Any] = []

    def count(graph: Any, example: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    with torch.no_grad():
        for guided in (False,) if null is None else (False, True):
            expected = step_answers(model, tokens, inputs, cond, null if guided else None)
            compiled = tiny(name)
            compiled.load_state_dict(model.state_dict())
            compiled.compile_decoding(backend=count)
            held = compiled.start(cond, null if guided else None)
            for _ in range(2):
                got = step_answers(compiled, tokens, inputs, cond, null if guided else None)
                torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-5)
            assert held.length == 0
            state = compiled.start(cond, null if guided else None)
            groups = compiled.schedule()
            for positions in groups[:3]:
                compiled.predict(state, inputs[:, positions], positions)
                compiled.append(state, tokens[:, positions], positions)
            state.rewind(1)
            again = compiled.predict(state, inputs[:, groups[2]], groups[2])
            torch.testing.assert_close(again.logits[:, 0], expected[:, 2], atol=1e-5, rtol=1e-5)
            assert graphs, "nothing was compiled"
            assert len(graphs) == 1 + guided, "a step had other shapes than the one before"


def test_a_compiled_step_reuses_its_memory_but_never_a_live_one() -> None:
    name = ONE_TOKEN[0]
    model = tiny(name).compile_decoding(backend="eager")
    first = model.start(classes(model, 2))
    where = first.cache.keys[0].data_ptr()
    second = model.start(classes(model, 2))
    assert second.cache.keys[0].data_ptr() != where
    del first
    third = model.start(classes(model, 2))
    assert third.cache.keys[0].data_ptr() not in (second.cache.keys[0].data_ptr(),) and third.cache.length == 0
    del second, third
    kept = model.start(classes(model, 2)).cache.keys[0].data_ptr()
    assert model.start(classes(model, 2)).cache.keys[0].data_ptr() == kept
    assert len(model.start(classes(model, 3)).cache.keys[0]) == 3


@pytest.mark.parametrize("name", OF_IDS)
def test_top_1_is_greedy(name: str) -> None:
    model, tokenizer = tiny_pair(name)
    best: list[Tensor] = []
    cond = classes(model, 3)
    tokens = sample(
        model, tokenizer, cond, Rng.from_seed(0, 3), top_k=1, on_step=lambda i: best.append(i.logits.argmax(-1))
    )
    assert torch.equal(tokens, torch.cat(best, 1)[:, torch.cat(model.schedule()).argsort()])
    assert torch.equal(tokens, sample(model, tokenizer, cond, Rng.from_seed(9, 3), top_k=1))
    assert not torch.equal(tokens, sample(model, tokenizer, cond, Rng.from_seed(9, 3)))


@pytest.mark.parametrize("name", GENERATORS)
def test_guidance(name: str) -> None:
    """Scale 1 is the condition alone, 0 the absence of it, and between and beyond it is linear."""
    model, tokenizer = tiny_pair(name)
    cond, first = classes(model, 3), model.schedule()[0]
    null = nothing(model, cond)
    if null is None:
        with pytest.raises(ValueError, match="no unconditional branch"):
            model.start(cond, cond)
        return

    def answer(predictive: Any) -> Tensor:
        out = said(model, predictive, first, 3)
        return out[..., : model.layout.dim] if isinstance(predictive, Diffusion) else out  # the variance is not guided

    with torch.no_grad():
        inputs = tokenizer.running(3).inputs(first)
        with_class = answer(model.predict(model.start(cond), inputs, first))
        without = answer(model.predict(model.start(null), inputs, first))
        both = model.predict(model.start(cond, null), inputs, first)
        for w in (0.0, 1.0, 0.5, 4.0):
            expected = without + w * (with_class - without)
            torch.testing.assert_close(answer(both.guide(w)), expected, atol=1e-4, rtol=1e-4)
            per_position = answer(both.guide(torch.full((len(first),), w)))
            torch.testing.assert_close(per_position, expected, atol=1e-4, rtol=1e-4)
    assert (with_class - without).abs().max() > 0.01
    rng, sampler = Rng.from_seed(0, 3), sampler_of(model)
    plain = sampler.generate(tokenizer, model, cond, rng).tokens
    assert torch.equal(plain, sample(model, tokenizer, cond, rng, guidance_scale=1.0))
    assert not torch.equal(plain, sample(model, tokenizer, cond, rng, guidance_scale=9.0))
    if not isinstance(both, Diffusion):
        nulled = sample(model, tokenizer, cond, rng, guidance_scale=0.0, guidance_schedule="constant")
        same(nulled, sampler.generate(tokenizer, model, null, rng).tokens)
    with pytest.raises(ValueError, match="unconditional branch"):
        sampler.generate(tokenizer, model, cond, rng, guidance_scale=2.0)


@pytest.mark.parametrize("guidance", [1.0, 3.0])
@pytest.mark.parametrize("name", GENERATORS)
def test_an_image_is_the_same_in_any_batch_and_place(name: str, guidance: float) -> None:
    model, tokenizer = tiny_pair(name)
    rng, cond = Rng.from_seed(7, 8), classes(model, 8)
    if guidance != 1 and nothing(model, cond) is None:
        pytest.skip("knows no absence of its condition")

    def some(rows: Tensor) -> Tensor:
        settings = {"guidance_scale": guidance} | ({"top_p": 0.95} if name in OF_IDS else {})
        return sample(model, tokenizer, cond[rows], rng[rows], **settings)

    all_at_once = some(torch.arange(8))
    assert len(all_at_once.unique(dim=0)) == 8
    for rows in (torch.tensor([5, 0, 3]), torch.arange(8).flip(0), *torch.arange(8).split(1)):
        same(some(rows), all_at_once[rows])


@pytest.mark.parametrize("name", GENERATORS)
def test_bfloat16_runs(name: str) -> None:
    model, tokenizer = (m.to(torch.bfloat16) for m in tiny_pair(name))
    seen: list[Tensor] = []
    tokens = sample(
        model,
        tokenizer,
        classes(model, 2),
        Rng.from_seed(0, 2),
        guidance_scale=1.0 if model.condition == "frames" else 2.0,
        on_step=lambda i: seen.append(i.logits if name in OF_IDS else i.predicted),
    )
    assert all(s.isfinite().all() and s.dtype == torch.float32 for s in seen)
    assert tokenizer.decode(tokens).isfinite().all()
    model.train()
    loss = model.training_loss(tokens, tokenizer.embed(tokens), classes(model, 2), Rng.from_seed(0, 2))["loss"]
    loss.backward()
    assert loss.isfinite() and all(p.grad.isfinite().all() for p in model.parameters() if p.requires_grad)


@pytest.mark.parametrize("name", GENERATORS)
def test_the_same_pipeline_draws_edits_saves_and_opens_it(name: str, tmp_path: Path) -> None:
    model, tokenizer = tiny_pair(name)
    if model.condition != "class" or tokenizer.num_frames is not None:
        pytest.skip("opened by another pipeline, which has tests of its own")
    sampler = sampler_of(model, **({"top_p": 0.9} if name in OF_IDS else {"head_steps": 4}))
    pipe = ClassToImagePipeline(model, tokenizer, sampler)
    pipe.set_progress_bar_config(disable=True)
    totals: list[int] = []
    bar = pipe.progress_bar
    pipe.progress_bar = lambda total: totals.append(total) or bar(total=total)

    def note(_pipe: Any, _step: int, _position: int, values: dict[str, Any]) -> None:
        totals.append(values["num_steps"])

    out = pipe([0, 1], seed=0, output_type="pt", callback_on_step_end=note)
    assert out.images.shape == (2, 3, *tokenizer.image_size)
    assert 0 <= out.images.min() < out.images.max() <= 1
    assert totals == [len(model.schedule())] * (1 + len(model.schedule()))  # the bar, then every step
    del pipe.progress_bar
    pipe.save_pretrained(tmp_path)
    again = varkit.AutoPipeline.from_pretrained(tmp_path)
    again.set_progress_bar_config(disable=True)
    assert again.transformer.layout == model.layout and again.sampler.settings() == sampler.settings()
    assert type(again.sampler) is type(sampler)
    ours, theirs = (p([0, 1], seed=0, output_type="np").images for p in (pipe, again))
    assert np.array_equal(ours, theirs) if name in OF_IDS else np.allclose(ours, theirs, atol=1e-3)
    if len(tokenizer.layout.grids[-1]) != 2:
        with pytest.raises(ValueError, match="have no places in the image"):
            pipe.edit(random_images(tokenizer, 1), box=(0, 0, 0.5, 0.5), seed=0)
        return
    edited = pipe.edit(random_images(tokenizer, 1), box=(0, 0, 0.5, 0.5), seed=0, output_type="latent").images
    kept = tokenizer.encode(random_images(tokenizer, 1))
    assert edited.shape == kept.shape and torch.equal(edited[0, -1], kept[0, -1])  # the last token lies outside the box


# ---- tokenizers -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", TOKENIZERS)
def test_encode_and_decode(name: str) -> None:
    model = tiny(name)
    images = random_images(model, 3)
    with torch.no_grad():
        tokens = model.encode(images)
        decoded = model.decode(tokens)
    if name in DISCRETE:
        assert tokens.dtype == torch.int64 and tokens.shape == (3, model.layout.length, *factors(model))
        assert tokens.min() >= 0 and (tokens < sizes(model)).all() and len(tokens.unique()) > 1
    else:
        assert tokens.is_floating_point() and tokens.shape == (3, model.layout.length, model.layout.dim)
        assert tokens.std() > 0
    assert decoded.shape == images.shape and decoded.abs().max() <= 1 and decoded.std() > 0
    assert torch.equal(tokens, model.encode(images))
    torch.testing.assert_close(tokens[1:2], model.encode(images[1:2]), atol=1e-4, rtol=1e-4)  # ids: equal
    # An eighth of an 8-bit level: group norms of nearly constant maps, as random weights make them, amplify rounding.
    torch.testing.assert_close(decoded[1:2], model.decode(tokens[1:2]), atol=1e-3, rtol=0)


@pytest.mark.parametrize("name", DISCRETE)
def test_codebook_and_vectors(name: str) -> None:
    model = tiny(name)
    if model.layout.codebook_size is None:
        with pytest.raises(ValueError, match="latents"):
            model.codebook  # noqa: B018
        return
    tokens = random_tokens(model, 2)
    vectors = model.vectors(tokens)
    assert vectors.shape == (*tokens.shape[:2], model.layout.dim) and vectors.dtype == torch.float32
    if factors(model):  # every sub-code has a part in the vector; how, the family says
        for factor in range(tokens.shape[-1]):
            other = tokens.clone()
            other[..., factor] = (other[..., factor] + 1) % sizes(model)[factor]
            assert (model.vectors(other) != vectors).any(-1).all()
    else:
        assert model.codebook.shape == (model.layout.codebook_size, model.layout.dim)
        assert torch.equal(vectors, model.codebook[tokens])
    assert torch.equal(model.decode(vectors), model.decode(tokens))


@pytest.mark.parametrize("name", DISCRETE)
def test_any_number_of_whole_grids_decodes(name: str) -> None:
    model = tiny(name)
    tokens, seen = random_tokens(model, 2), []
    for part in model.layout.slices:
        seen.append(model.decode(tokens[:, : part.stop]))
        assert seen[-1].shape == (2, 3, *size_of(model))
    assert torch.equal(seen[-1], model.decode(tokens))
    assert all(not torch.equal(a, b) for a, b in pairwise(seen))


@pytest.mark.parametrize("name", LATENT)
def test_latents_have_no_codebook_and_may_be_sampled(name: str) -> None:
    model = tiny(name)
    images = random_images(model, 4)
    with torch.no_grad():
        mean, rng = model.encode(images), Rng.from_seed(0, 4)
        sample = model.encode(images, rng)
        torch.testing.assert_close(model.encode(images[2:3], rng[2:3]), sample[2:3], atol=1e-5, rtol=1e-5)
    assert not torch.equal(sample, mean) and torch.equal(sample, model.encode(images, rng))
    with pytest.raises(ValueError, match="no codebook"):
        _ = model.codebook
    with pytest.raises(ValueError, match="latents"):
        model.vectors(torch.zeros(1, 1, dtype=torch.int64))


@pytest.mark.parametrize("name", TOKENIZERS)
def test_another_image_size_is_refused(name: str) -> None:
    model = tiny(name)
    *frames, height, width = size_of(model)
    for channels, *shape in ((3, height + 1, width), (3, height, 2 * width), (1, height, width)):
        with pytest.raises(ValueError, match="clips" if frames else "images"):
            model.encode(torch.zeros(1, channels, *frames, *shape))
    for count in (frames[0] - 1, frames[0] + 1) if frames else ():
        with pytest.raises(ValueError, match="frames"):
            model.encode(torch.zeros(1, 3, count, height, width))
    whole = "codes a clip as a whole" if len(model.layout.grids[0]) == 1 else None  # tokens without a place
    refused = whole if frames else "codes images"
    with pytest.raises(ValueError, match=refused) if refused else nullcontext():
        model.encode_start(torch.zeros(1, 3, 1, height, width))
