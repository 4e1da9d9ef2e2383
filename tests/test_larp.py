"""LARP: what its tokens are, how its prior teaches the tokenizer, its generator of classes and of given frames."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tests.test_models import classes, liven, nothing, random_images, random_tokens, step_answers, tiny
from varkit import NextGroupSampler, Rng
from varkit.checkpoints import larp as keys
from varkit.checkpoints.convert import convert
from varkit.checkpoints.files import load_official, to_official, write_official
from varkit.conditioning.frames import FrameCondition
from varkit.config import ConfigError
from varkit.generators.larp import LARP, unrotated
from varkit.interfaces import Cond
from varkit.layers.llama import Rotary
from varkit.pipelines.auto import open_tokenizer
from varkit.registry import create_model, model_entry
from varkit.tokenizers.larp import LARPTokenizer, StochasticQuantizer, clip_positions
from varkit.tokenizers.larp_prior import own_token_ratio
from varkit.tokenizers.vqgan import VQGAN
from varkit.training.clip_discriminator import ClipDiscriminator, PerFrame
from varkit.training.objectives import build_objective, objective_config
from varkit.training.objectives.larp import noisy_loss
from varkit.training.optim import OptimConfig, make_optimizer, parameter_groups, set_schedule

TOKENIZER = "larp_tokenizer_l_long"


def tokenizer(**changes: Any) -> LARPTokenizer:
    torch.manual_seed(0)
    return liven(create_model(TOKENIZER, **{**model_entry(TOKENIZER).tiny, **changes}), 0.05)


# ---- the quantiser --------------------------------------------------------------------------------------------------


def test_codes_are_drawn_with_the_probabilities_of_their_cosines() -> None:
    """20,000 draws of one vector among 5 codes, at a temperature at which several are likely."""
    torch.manual_seed(0)
    quantizer = StochasticQuantizer(5, 3, 0.5, 0.25, 1.0)
    z = F.normalize(torch.randn(1, 1, 3), dim=-1).expand(20, 1000, 3)
    expected = (z[0, 0] @ F.normalize(quantizer.embedding.weight, dim=-1).T / 0.5).softmax(-1)
    torch.testing.assert_close(quantizer.probs(z)[3, 7], expected)
    drawn = quantizer.ids(z, Rng.from_seed(0, 20))
    found = torch.bincount(drawn.flatten(), minlength=5) / drawn.numel()
    assert expected.min() > 0.01 and (found - expected).abs().max() < 0.012  # three standard deviations
    assert torch.equal(quantizer.ids(z, None), expected.argmax().expand(20, 1000))


def test_a_draw_belongs_to_its_clip_and_position_and_a_cold_one_is_the_nearest() -> None:
    model = tokenizer(temperature=0.5)
    clips, rng = random_images(model, 4), Rng.from_seed(0, 4)
    drawn = model.encode(clips, rng)
    assert torch.equal(model.encode(clips, rng), drawn)
    assert torch.equal(model.encode(clips[2:3], rng[2:3]), drawn[2:3])
    assert not torch.equal(model.encode(clips, Rng.from_seed(1, 4)), drawn)
    assert not torch.equal(model.encode(clips), drawn)
    cold = tokenizer(temperature=1e-6)
    assert torch.equal(cold.encode(clips, rng), cold.encode(clips))


def test_the_quantisers_losses_and_where_their_gradients_go() -> None:
    quantizer = StochasticQuantizer(7, 4, 0.03, 0.25, 2.0)
    z = F.normalize(torch.randn(2, 3, 4), dim=-1).requires_grad_()
    code = quantizer(z, None)
    distance = (z - quantizer.codebook[code.ids]).square().mean()
    torch.testing.assert_close(code.loss, 0.25 * distance + 2.0 * distance)
    torch.testing.assert_close(code.vectors, quantizer.codebook[code.ids])
    weight = torch.randn(2, 3, 4)
    (through,) = torch.autograd.grad((code.vectors * weight).sum(), z, retain_graph=True)
    torch.testing.assert_close(through, weight)  # straight through
    (from_z,) = torch.autograd.grad(code.commitment_loss, z, retain_graph=True)
    assert from_z.abs().max() > 0
    assert torch.autograd.grad(code.commitment_loss, quantizer.embedding.weight, allow_unused=True)[0] is None


# ---- the tokenizer --------------------------------------------------------------------------------------------------


def test_patches_fill_the_clip_in_its_order_and_their_places_are_told_apart() -> None:
    """The last layer writes each patch's number: time first, then rows, then columns."""
    model = tokenizer()
    t, h, w = model.grid
    assert (t, h, w) == (2, 2, 2)
    numbers = torch.arange(t * h * w).float()

    def numbered(_module: Any, _given: Any, out: Tensor) -> Tensor:
        return numbers[None, :, None].expand_as(out)

    model.final_layer.register_forward_hook(numbered)
    clip = model.decode_vectors(torch.zeros(1, 6, 4)).add(1).div(2)[0, 0]  # T H W
    assert torch.equal(clip[::2, ::8, ::8], numbers.view(t, h, w))
    assert torch.equal(
        clip, numbers.view(t, h, w).repeat_interleave(2, 0).repeat_interleave(8, 1).repeat_interleave(8, 2)
    )
    assert len(clip_positions((3, 4, 5), 16)[0].unique(dim=0)) == 60


def test_every_token_sees_every_frame_and_paints_every_frame() -> None:
    model = tokenizer()
    clip = random_images(model, 1)
    other = clip.clone()
    other[:, :, -1] = -other[:, :, -1]
    assert ((model.project(clip) - model.project(other)).abs().amax(-1) > 1e-4).all()
    vectors = model.vectors(random_tokens(model, 1))
    for position in range(6):
        changed = vectors.clone()
        changed[:, position] = -changed[:, position]
        assert ((model.decode_vectors(changed) - model.decode_vectors(vectors)).abs().amax((1, 3, 4)) > 1e-5).all()


def test_shorter_clips_take_as_many_tokens_and_longer_ones_are_refused() -> None:
    model = tokenizer()
    short = model.shortened(2)
    clips = random_images(short, 2)
    assert clips.shape[2] == 2 and short.encode(clips).shape == (2, 6)
    assert short.decode(short.encode(clips)).shape == clips.shape and model.num_frames == 4
    for frames in (0, 3, 6):
        with pytest.raises(ValueError, match="2 to 4 frames, a multiple of 2"):
            model.shortened(frames)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"resolution": 20}, "must fill a clip"),
        ({"num_frames": 5}, "must fill a clip"),
        ({"encoder_size": (30, 1, 4)}, "encoder_size: the width 30"),
        ({"prior_length": 5}, "positions for 5 tokens; a clip has 6"),
    ],
)
def test_impossible_sizes_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        create_model(TOKENIZER, **{**model_entry(TOKENIZER).tiny, **changes})


def test_all_tokens_are_needed() -> None:
    with pytest.raises(ValueError, match="got 5 tokens; a clip has 6"):
        tokenizer().decode(torch.zeros(1, 5, dtype=torch.int64))


# ---- the prior ------------------------------------------------------------------------------------------------------


def test_the_prior_is_causal_and_says_nothing_of_the_first_token() -> None:
    prior = tokenizer().prior_model
    assert prior is not None
    vectors = F.normalize(torch.randn(2, 6, 4), dim=-1)
    said = prior(vectors)
    assert said.shape == (2, 5, 4)
    torch.testing.assert_close(said.norm(dim=-1), torch.ones(2, 5))
    changed = vectors.clone()
    changed[:, 3] = -changed[:, 3]
    difference = (prior(changed) - said).abs().amax((0, 2))
    assert (difference[:3] == 0).all() and (difference[3:] > 1e-6).all()


def test_the_priors_gradient_reaches_the_encoder_through_what_is_read_alone() -> None:
    """Not through labels or logits; and where the second round reads an own token, not through that."""
    model = tokenizer()
    prior = model.prior_model
    assert prior is not None
    code = model.quantize(model.features(random_images(model, 2)), None)
    nobody = torch.zeros(2, 5, dtype=torch.bool)
    rounds = prior.rounds(code.vectors, code.ids, model.codebook, nobody, lambda x: x.argmax(-1))
    torch.testing.assert_close(rounds.logits[0], rounds.logits[1])
    rounds.loss.backward()
    reached = {k.split(".")[0] for k, p in model.named_parameters() if p.grad is not None and p.grad.any()}
    assert reached == {"x_embedder", "encoder_latent_query_embed", "encoder", "bottleneck", "prior_model"}
    assert model.quantize.embedding.weight.grad is None and model.bottleneck.out_linear.weight.grad is None

    vectors = code.vectors.detach().requires_grad_()
    replaced = nobody.clone()
    replaced[:, 2] = True  # of token 3
    rounds = prior.rounds(vectors, code.ids, model.codebook, replaced, lambda x: x.argmin(-1))
    own = model.codebook[rounds.logits[0].argmin(-1)[:, 2]]
    torch.testing.assert_close(rounds.inputs[:, 3], own)
    others = [0, 1, 2, 4, 5]
    assert torch.equal(rounds.inputs[:, others], vectors[:, others])
    (gradient,) = torch.autograd.grad(rounds.logits[1].square().sum(), vectors)
    seen = gradient.abs().amax((0, 2)) > 0
    assert seen.tolist() == [True, True, True, False, True, False]  # the last is read by nobody


def test_own_tokens_are_drawn_by_keyed_numbers_at_the_asked_rate() -> None:
    model = tokenizer()
    code = model.quantize(model.features(random_images(model, 64)), None)
    rng = Rng.from_seed(3, 64)
    rounds = model.prior_rounds(code, 0.3, rng)
    share = (rounds.inputs != code.vectors)[:, 1:].any(-1).float().mean()
    assert 0.15 < share < 0.35  # 0.3, less where the prior's token is the true one
    torch.testing.assert_close(model.prior_rounds(code, 0.3, rng).loss, rounds.loss)
    assert torch.equal(model.prior_rounds(code, 0.0, rng).inputs, code.vectors)
    assert [own_token_ratio(step, 1000) for step in (0, 150, 300, 900)] == [0.0, 0.25, 0.5, 0.5]


@pytest.mark.parametrize("quirks", [False, True])
def test_attention_dropout_in_eval_mode_is_the_releases_alone(quirks: bool) -> None:
    model = tokenizer(official_quirks=quirks, prior_dropout=0.5)
    assert model.prior_model is not None
    vectors = F.normalize(torch.randn(2, 6, 4), dim=-1)
    assert torch.equal(model.prior_model(vectors), model.prior_model(vectors)) is not quirks


def test_a_tokenizer_without_a_prior_says_so() -> None:
    model = tokenizer(prior_size=None)
    with pytest.raises(ValueError, match="has no prior"):
        model.prior_rounds(model.quantize(model.features(random_images(model, 1)), None), 0.0, Rng.from_seed(0, 1))


# ---- the generator --------------------------------------------------------------------------------------------------


def test_positions_are_learned_and_nothing_is_rotated() -> None:
    model = tiny("larp_lp")
    assert not [m for m in model.modules() if isinstance(m, Rotary)]
    x = torch.randn(1, 2, 3, 4)
    assert unrotated(x, 5) is x
    tokens, cond = random_tokens(model, 1), classes(model, 1)
    inputs = torch.zeros_like(tokens)  # the same id everywhere: only positions tell them apart
    logits = model(inputs, cond.labels)
    assert len(logits[0].unique(dim=0)) == len(logits[0])


def test_given_frames_are_read_before_everything_and_a_separator_behind_them() -> None:
    model = tiny("larp_lp_frames")
    ids, tokens = random_tokens(model, 2, seed=5), random_tokens(model, 2)
    prefix = model.prefix(Cond(ids))
    assert prefix.shape[1] == 7 == model.prefix_length
    torch.testing.assert_close(prefix[:, -1], model.tok_embeddings.weight[24].expand(2, -1))
    inputs = tokenizer().embed(tokens)
    before = model(inputs, ids)
    for position in range(6):  # each given token changes every prediction
        changed = ids.clone()
        changed[:, position] = (changed[:, position] + 1) % 24
        assert ((model(inputs, changed) - before).abs().amax(-1) > 1e-6).all()
    assert before.shape == (2, 6, 24)  # the separator is never predicted


def test_frames_become_the_tokens_of_a_clip_that_repeats_the_last() -> None:
    model = tokenizer()
    clips = random_images(model, 2)
    condition = FrameCondition(model)
    cond = condition.encode(frames=clips[:, :, :3])
    repeated = torch.cat([clips[:, :, :3], clips[:, :, 2:3]], 2)
    assert torch.equal(cond.labels, model.encode(repeated))
    assert torch.equal(condition.encode(frames=clips).labels, model.encode(clips))
    drawn = condition.encode(frames=clips, rng=Rng.from_seed(0, 2)).labels
    assert torch.equal(drawn, model.encode(clips, Rng.from_seed(0, 2)))
    with pytest.raises(ValueError, match="1 to 4 frames"):
        condition.encode(frames=torch.zeros(1, 3, 5, 16, 16))
    with pytest.raises(ValueError, match=r"frames must be \(B, 3, t, 16, 16\)"):
        condition.encode(frames=torch.zeros(1, 3, 1, 8, 16))
    with pytest.raises(ValueError, match="leave guidance_scale at 1"):
        condition.null(cond)
    with pytest.raises(ValueError, match="codes images"):
        FrameCondition(VQGAN(24, 4, 32, (1,), 1, 8, grid=2))


def test_sampling_goes_on_with_frames_and_differs_with_them() -> None:
    model, codes = tiny("larp_lp_frames"), tokenizer()
    first, second = (random_tokens(model, 2, seed=s) for s in (1, 2))
    rng = Rng.from_seed(0, 2)
    drawn = [NextGroupSampler().generate(codes, model, Cond(ids), rng).tokens for ids in (first, first, second)]
    assert torch.equal(drawn[0], drawn[1]) and not torch.equal(drawn[0], drawn[2])
    with pytest.raises(ValueError, match="needs the unconditional branch"):
        NextGroupSampler().generate(codes, model, Cond(first), rng, guidance_scale=2.0)


def test_several_positions_at_once_are_predicted_as_one_by_one() -> None:
    """What speculative decoding asks for, before and behind what is cached."""
    for name in ("larp_lp", "larp_lp_frames"):
        model = tiny(name)
        tokens, cond = random_tokens(model, 2), classes(model, 2)
        inputs = tokenizer().embed(tokens)
        expected = step_answers(model, tokens, inputs, cond)
        state = model.start(cond)
        for positions in (torch.arange(2), torch.arange(2, 6)):
            got = model.predict(state, inputs[:, positions], positions).logits
            torch.testing.assert_close(got, expected[:, positions], atol=1e-5, rtol=1e-5)
            model.append(state, tokens[:, positions], positions)


def test_classes_are_dropped_in_training_alone_and_frames_never() -> None:
    model = tiny("larp_lp")
    model.register_to_config(cond_drop_rate=1.0)
    tokens, cond = random_tokens(model, 3), classes(model, 3)
    inputs = tokenizer().embed(tokens)
    null = nothing(model, cond)
    assert null is not None

    def loss(of: Cond) -> Tensor:
        return model.training_loss(tokens, inputs, of, Rng.from_seed(0, 3))["loss"]

    assert not torch.isclose(loss(cond), loss(null))
    model.train()
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    torch.testing.assert_close(loss(cond), loss(null))


def test_an_unconditional_model_has_one_class_of_none() -> None:
    model = liven(LARP(**{**model_entry("larp_lp").tiny, "num_classes": 0}))
    cond = Cond(torch.zeros(2, dtype=torch.int64))
    assert torch.equal(model.null(cond).labels, cond.labels)
    assert NextGroupSampler().generate(tokenizer(), model, cond, Rng.from_seed(0, 2)).tokens.shape == (2, 6)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hidden_size": 30, "num_heads": 4}, "must be a multiple of num_heads"),
        ({"condition": "text"}, "condition must be class or frames"),
        ({"condition": "frames", "num_classes": 3}, "num_classes must be 0"),
    ],
)
def test_bad_arguments_of_the_generator_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        LARP(**{**model_entry("larp_lp").tiny, **changes})


def test_conditions_of_another_shape_are_refused_before_work() -> None:
    with pytest.raises(ValueError, match=r"given frames must be \(B, 6\) ids"):
        tiny("larp_lp_frames").start(Cond(torch.zeros(2, 5, dtype=torch.int64)))
    with pytest.raises(ValueError, match=r"classes must be \(B,\) ids"):
        tiny("larp_lp").start(Cond(torch.zeros(2, 6, dtype=torch.int64)))
    with pytest.raises(ValueError, match="one token a step, 6 in all; got num_steps=3"):
        tiny("larp_lp").schedule(3)


# ---- official files -------------------------------------------------------------------------------------------------


def config_of(name: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((Path(__file__).parent / "checkpoints" / f"{name}.json").read_text())
    return found["constructor"]


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_a_written_official_file_is_read_again(suffix: str, tmp_path: Path) -> None:
    for i, name in enumerate((TOKENIZER, "larp_lp", "larp_lp_frames")):
        changes: dict[str, Any] = {"num_frames": 16, "encoder_size": (64, 2, 1), "decoder_size": (64, 1, 1)}
        changes |= {"prior_size": (64, 1, 1)}
        model = tokenizer(**changes) if name == TOKENIZER else tiny(name)
        path = tmp_path / f"{i}{suffix}"
        write_official(model, path)
        overrides = {} if name == TOKENIZER else {"num_heads": 2, "latent_dim": 4}
        again = load_official(path, **overrides)
        assert type(again) is type(model) and again.layout == model.layout
        assert all(torch.equal(v, model.state_dict()[k]) for k, v in again.state_dict().items())


def test_a_file_without_a_prior_and_a_training_checkpoint_are_read(tmp_path: Path) -> None:
    model = tokenizer(num_frames=16, encoder_size=(64, 2, 1), decoder_size=(64, 1, 1), prior_size=(64, 1, 1))
    state = to_official(model)
    torch.save({"model": {"name": "larp", "args": {"a": [1]}, "sd": state}, "epoch": 3}, tmp_path / "run.pth")
    whole: Any = load_official(tmp_path / "run.pth")
    assert whole.prior_model is not None and whole.config.prior_size == (64, 1, 1)
    torch.save({k: v for k, v in state.items() if not k.startswith("prior_model.")}, tmp_path / "bare.pth")
    bare: Any = load_official(tmp_path / "bare.pth")
    assert bare.prior_model is None
    clips = random_images(model, 1)
    assert torch.equal(bare.encode(clips), model.encode(clips)) and torch.equal(
        whole.encode(clips), model.encode(clips)
    )


def test_config_json_beside_a_file_says_what_shapes_cannot(tmp_path: Path) -> None:
    model = tokenizer(num_frames=8, encoder_size=(64, 1, 4), decoder_size=(64, 1, 2), prior_size=None, temperature=0.2)
    write_official(model, tmp_path / "model.safetensors")
    official = config_of("larp-tokenizer-L-long")
    official |= {"bottleneck_token_num": 6, "frame_num": 8, "input_size": 16}
    official |= {"temporal_patch_size": 2, "decoder_temporal_patch_size": 2}
    for side, size in (("encoder", (64, 1, 4)), ("decoder", (64, 1, 2))):
        official |= {f"{side}_{k}": v for k, v in zip(("hidden_size", "depth", "num_heads"), size, strict=True)}
    regularizer = official["bottleneck"]["args"]["regularizer"]["args"]
    regularizer |= {"codebook_size": 24, "stochastic_temperature": 0.2}
    official["bottleneck"]["args"]["bottleneck_dim"] = 4
    (tmp_path / "config.json").write_text(json.dumps(official))
    again: Any = load_official(tmp_path / "model.safetensors")
    assert again.num_frames == 8 and tuple(again.config.encoder_size) == (64, 1, 4)
    assert again.config.temperature == 0.2 and again.prior_model is None
    regularizer["entropy_loss_weight"] = 0.1
    (tmp_path / "config.json").write_text(json.dumps(official))
    with pytest.raises(ValueError, match=r"regularizer.entropy_loss_weight is 0.1; varkit has 0.0 only"):
        load_official(tmp_path / "model.safetensors")


def test_official_arguments_are_those_that_shapes_tell() -> None:
    for name, read in (("larp-ar-ucf101", "class"), ("larp-ar-fp-k600", "frames")):
        arguments = keys.transformer_arguments(config_of(name))
        meta = json.loads((Path(__file__).parent / "checkpoints" / f"{name}.json").read_text())
        told = keys.read_transformer_arguments({k: torch.empty(s, device="meta") for k, s in meta["keys"].items()})
        assert told["condition"] == read and {k: arguments[k] for k in told} == told
    arguments = keys.tokenizer_arguments(config_of("larp-tokenizer-L-long"))
    meta = json.loads((Path(__file__).parent / "checkpoints" / "larp-tokenizer-L-long.json").read_text())
    told = keys.read_tokenizer_arguments({k: torch.empty(s, device="meta") for k, s in meta["keys"].items()})
    assert {k: arguments[k] for k in told.keys() & arguments.keys()} == {
        k: v for k, v in told.items() if k in arguments
    }
    with pytest.raises(ValueError, match=r"config\.use_fixed_pe is True; varkit has False only"):
        keys.transformer_arguments({**config_of("larp-ar-ucf101"), "use_fixed_pe": True})


def test_convert_writes_folders_and_gives_the_official_file_back(tmp_path: Path) -> None:
    model = tokenizer(num_frames=16, encoder_size=(64, 2, 1), decoder_size=(64, 1, 1), prior_size=(64, 1, 1))
    write_official(model, tmp_path / "model.safetensors")
    lines = convert(tmp_path / "model.safetensors", tmp_path / "folder")
    assert any("MIT" in line for line in lines)
    opened = open_tokenizer(str(tmp_path / "folder"))
    assert torch.equal(opened.encode(random_images(model, 1)), model.encode(random_images(model, 1)))
    convert(tmp_path / "folder", tmp_path / "back.safetensors")
    again = load_official(tmp_path / "back.safetensors")
    assert all(torch.equal(v, model.state_dict()[k]) for k, v in again.state_dict().items())


# ---- training -------------------------------------------------------------------------------------------------------

PLAN: dict[str, Any] = {
    "name": "larp",
    "model": TOKENIZER,
    "model_overrides": dict(model_entry(TOKENIZER).tiny),
    "discriminator_size": [16, 1, 2],
}


def objective_of(**changes: Any) -> Any:
    torch.manual_seed(0)
    made: Any = build_objective(objective_config({**PLAN, **changes}), [])
    made.max_steps = 20
    return made.train()


def moving_squares(count: int, seed: int = 0) -> Tensor:
    """(B, 3, 4, 16, 16) in [-1, 1]: a bright square that moves to the right on black."""
    places = torch.randint(0, 6, (count, 2), generator=torch.Generator().manual_seed(seed))
    clips = torch.full((count, 3, 4, 16, 16), -1.0)
    for i, (y, x) in enumerate(places.tolist()):
        for t in range(4):
            clips[i, :, t, y : y + 6, x + t : x + t + 6] = 1.0
    return clips


def steps(objective: Any, count: int, lr: float = 3e-3) -> list[dict[str, float]]:
    """Some steps of all phases, as the loop takes them."""
    plan = OptimConfig(lr=lr, weight_decay=0.0, warmup_steps=0, schedule="constant")
    optimizers = {p: make_optimizer(objective.trained(p), plan) for p in objective.all_phases()}
    found = []
    for step in range(count):
        data, rng = {"images": moving_squares(8, step)}, Rng.from_seed(step, 8)
        numbers: dict[str, float] = {}
        for phase in objective.phases(step):
            for name, module in (("main", objective.tokenizer), ("discriminator", objective.discriminator)):
                if module is not None:
                    module.requires_grad_(name == phase)
            set_schedule(optimizers[phase], plan, step, count)
            optimizers[phase].zero_grad()
            losses = objective(data, phase, step, objective.max_steps, rng)
            losses["loss"].backward()
            optimizers[phase].step()
            numbers |= {f"{phase}/{k}": float(v.detach()) for k, v in losses.items()}
        objective.after_step(step, rng)
        found.append(numbers)
    return found


@pytest.mark.parametrize("kind", ["transformer", "patch"])
def test_a_few_steps_learn_and_the_discriminator_learns_in_every_fifth(kind: str) -> None:
    weights = {"l2_weight": 1.0, "adversarial_weight": 0.01, "prior_lr_scale": 2.0}
    objective = objective_of(discriminator=kind, discriminator_width=8, discriminator_layers=1, **weights)
    assert isinstance(objective.discriminator, PerFrame if kind == "patch" else ClipDiscriminator)
    data, rng = {"images": moving_squares(8, 99)}, Rng.from_seed(99, 8)
    before = objective.validate(data, rng)
    found = steps(objective, 20, lr=1e-3)
    after = objective.validate(data, rng)
    assert after["psnr"] > before["psnr"] + 0.5 and {"psnr", "l2", "prior"} == set(after)
    assert after["prior"] < before["prior"]
    assert found[-1]["main/l2"] < 0.9 * found[0]["main/l2"]
    learned = [i for i, numbers in enumerate(found) if "discriminator/loss" in numbers]
    assert learned == [0, 5, 10, 15] and not objective.fakes
    assert all({"main/adversarial", "main/prior", "main/quantizer"} <= numbers.keys() for numbers in found)
    assert "discriminator/lecam" in found[0] and objective.statistics()["usage/all"] > 0
    assert objective.pictures(data, rng).shape == (4 * 2 * 4, 3, 16, 16) and objective.columns == 4
    assert objective.num_frames == 4 and objective.image_size == (16, 16)


def test_the_total_is_the_weighted_sum_of_the_sheet() -> None:
    objective = objective_of()
    data, rng = {"images": moving_squares(4)}, Rng.from_seed(0, 4)
    liven(objective.tokenizer, 0.05).train()
    torch.manual_seed(5)
    losses = objective(data, "main", 3, 20, rng)
    expected = 0.5 * losses["l1"] + 0.3 * losses["adversarial"] + 0.1 * losses["quantizer"] + 0.06 * losses["prior"]
    torch.testing.assert_close(losses["loss"], expected)


def test_the_perceptual_distance_is_that_of_frames() -> None:
    seen: list[tuple[int, ...]] = []

    class Distance(torch.nn.Module):
        def forward(self, first: Tensor, second: Tensor) -> Tensor:
            seen.append(tuple(first.shape))
            return (first - second).abs().mean((1, 2, 3))

    clips = torch.randn(2, 3, 4, 8, 8)
    expected = (clips - clips.flip(0)).abs().mean((1, 3, 4)).flatten()
    torch.testing.assert_close(PerFrame(Distance())(clips, clips.flip(0)), expected)
    assert seen == [(8, 3, 8, 8)]


def test_the_prior_learns_fifty_times_as_fast_in_groups_of_its_own() -> None:
    objective = objective_of()
    prior = {id(p) for p in objective.tokenizer.prior_model.parameters()}
    groups = parameter_groups(objective.trained("main"))
    of_prior = [g for g in groups if {id(p) for p in g["params"]} & prior]
    assert {g["lr_scale"] for g in of_prior} == {50.0} and {g["lr_scale"] for g in groups} == {50.0, 1.0}
    assert {id(p) for g in of_prior for p in g["params"]} == prior
    assert sum(len(g["params"]) for g in groups) == len(list(objective.tokenizer.parameters()))
    optimizer = make_optimizer(objective.trained("main"), OptimConfig(lr=1e-4))
    set_schedule(optimizer, OptimConfig(lr=1e-4, warmup_steps=0, schedule="constant"), 0, 10)
    assert sorted({g["lr"] for g in optimizer.param_groups}) == pytest.approx([1e-4, 5e-3])


def test_without_its_weight_the_prior_is_left_alone() -> None:
    objective = objective_of(prior_weight=0.0, adversarial_weight=0.0)
    before = {k: v.clone() for k, v in objective.tokenizer.prior_model.state_dict().items()}
    assert not any(p.requires_grad for p in objective.tokenizer.prior_model.parameters())
    assert "prior" not in objective({"images": moving_squares(2)}, "main", 0, 20, Rng.from_seed(0, 2))
    assert all(torch.equal(v, before[k]) for k, v in objective.tokenizer.prior_model.state_dict().items())


def test_the_discriminators_targets_are_one_sided_and_bounded() -> None:
    objective = objective_of()
    off = objective._targets(Rng.from_seed(0, 4000), 4000)
    assert off.shape == (2, 4000) and off.min() >= 0 and off.max() == pytest.approx(0.3)
    assert off.mean() == pytest.approx(0.15 * 0.79, abs=0.01)  # of |N|, cut at 2
    logits = torch.tensor([[2.0], [-1.0]])
    plain = noisy_loss(logits, logits, "non_saturating", torch.zeros(2, 2))
    torch.testing.assert_close(plain, 0.5 * (F.softplus(-logits).mean() + F.softplus(logits).mean()))
    by_hand = -(0.7 * F.logsigmoid(logits) + 0.3 * F.logsigmoid(-logits)).mean()  # of both halves, by symmetry
    other = -(0.3 * F.logsigmoid(logits) + 0.7 * F.logsigmoid(-logits)).mean()
    noisy = noisy_loss(logits, logits, "non_saturating", torch.full((2, 2), 0.3))
    torch.testing.assert_close(noisy, 0.5 * (by_hand + other))


def test_a_discriminator_of_clips_sees_motion_and_refuses_what_does_not_fit() -> None:
    judge = liven(ClipDiscriminator((4, 16, 16), (2, 8, 8), (16, 1, 2)))
    clips = torch.randn(2, 3, 4, 16, 16)
    assert judge(clips).shape == (2, 8)
    assert not torch.allclose(judge(clips).mean(), judge(clips.flip(2)).mean())
    with pytest.raises(ValueError, match="do not fill a clip"):
        ClipDiscriminator((5, 16, 16), (2, 8, 8), (16, 1, 2))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"prior_weight": -1.0}, "prior_weight"),
        ({"own_tokens": 2.0}, "own_tokens"),
        ({"discriminator_every": 0}, "discriminator_every"),
        ({"adversarial_loss": "hinge"}, "target_noise is for non_saturating"),
        ({"augment": True}, "augment changes single images"),
        ({"model": "vq_fashion", "model_overrides": {}}, "trains a LARPTokenizer"),
        ({"model_overrides": {**PLAN["model_overrides"], "prior_size": None}}, "has no prior"),
    ],
)
def test_bad_recipes_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        objective_of(**changes)


def test_the_trained_tokenizer_is_exported_whole(tmp_path: Path) -> None:
    objective = objective_of(adversarial_weight=0.0)
    steps(objective, 2)
    objective.eval().export(tmp_path)
    again = open_tokenizer(str(tmp_path))
    clips = moving_squares(2)
    assert torch.equal(again.encode(clips), objective.tokenizer.encode(clips)) and again.prior_model is not None
