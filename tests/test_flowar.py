"""FlowAR and its pyramid of latents: scales, the chain of inputs, and sampling with a cache."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from varkit import AutoPipeline, Rng
from varkit.checkpoints import flowar as keys
from varkit.checkpoints.convert import convert
from varkit.checkpoints.files import read_state_dict, write_official
from varkit.generators.flowar import FlowAR
from varkit.interfaces import Cond
from varkit.pipelines.auto import assemble
from varkit.registry import checkpoint, create_model
from varkit.samplers.continuous import ContinuousSampler, steps_of
from varkit.samplers.ode import find_solver
from varkit.tokenizers.kl_vae import KLVAE, unflatten
from varkit.tokenizers.latent_pyramid import LatentPyramid, pyramid

SCALES = (1, 2, 4)


def tokenizer_of(scales: Any = SCALES, side: int = 8) -> LatentPyramid:
    torch.manual_seed(2)
    vae = {
        "image_size": side,
        "latent_channels": 4,
        "block_out_channels": (8, 8),
        "layers_per_block": 1,
        "norm_num_groups": 4,
    }
    return LatentPyramid(vae, scales).eval()


def small(**changes: Any) -> FlowAR:
    """With lively weights: gates that are nearly closed would hide a wrong mask."""
    torch.manual_seed(0)
    sizes = {"num_classes": 3, "hidden_size": 32, "depths": (1, 2), "num_heads": 2, "scales": SCALES, "latent_dim": 4}
    head = {"head_width": 64, "head_depth": 2, "dropout": 0.0, "attention_dropout": 0.0}
    model = FlowAR(**{**sizes, **head, **changes})
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model.eval()


def latents(model: FlowAR, batch: int, seed: int = 1) -> Tensor:
    shape = (batch, model.layout.length, model.layout.dim)
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def sample(model: FlowAR, labels: list[int], first: int = 0, **settings: Any) -> Any:
    cond, null = Cond(torch.tensor(labels)), Cond(torch.full((len(labels),), 3))
    settings = {"head_steps": 3, "solver": "euler-jump", **settings}
    rng = Rng.from_seed(7, len(labels), first)
    return ContinuousSampler(**settings).generate(tokenizer_of(), model, cond, rng, null=null)


# ---- the pyramid ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scales", [SCALES, (1, 3, 4), ((1, 2), 4)], ids=str)
def test_scales_are_means_of_the_latent(scales: Any) -> None:
    tokenizer = tokenizer_of(scales)
    images = torch.rand(2, 3, 8, 8) * 2 - 1
    tokens = tokenizer.encode(images)
    parts = tokenizer.layout.split(tokens)
    torch.testing.assert_close(parts[-1], tokenizer.vae.encode(images))
    for part in parts:  # a mean of means is the mean, where the scale divides the latent
        if 16 % part.shape[1] == 0:
            torch.testing.assert_close(part.mean(1), parts[-1].mean(1))
    torch.testing.assert_close(tokenizer.decode(tokens), tokenizer.vae.decode(parts[-1]))
    drawn = tokenizer.layout.split(tokenizer.encode(images, Rng.from_seed(0, 2)))  # one draw, and its means
    assert not torch.allclose(drawn[-1], parts[-1])
    torch.testing.assert_close(drawn[0], pyramid(unflatten(drawn[-1], (4, 4)), tokenizer.layout.grids[:1]))


def test_what_is_read_comes_from_the_scale_before_by_way_of_the_whole() -> None:
    tokenizer = tokenizer_of()
    tokens = torch.randn(2, 21, 4)
    inputs = tokenizer.embed(tokens)
    assert not inputs[:, 0].any()
    torch.testing.assert_close(inputs[:, 1:5], tokens[:, :1].expand(-1, 4, -1))  # of one token, only itself
    up = F.interpolate(unflatten(tokens[:, 1:5], (2, 2)), size=(4, 4), mode="bicubic")
    torch.testing.assert_close(unflatten(inputs[:, 5:], (4, 4)), up)
    running = tokenizer.running(2)
    for part in tokenizer.layout.slices:
        where = torch.arange(part.start, part.stop)
        torch.testing.assert_close(running.inputs(where), inputs[:, part])
        running.record(tokens[:, part], where)


def test_the_first_scales_alone_are_an_image_too() -> None:
    tokenizer = tokenizer_of()
    flat = torch.full((1, 21, 4), 0.5)
    for end in (1, 5, 21):  # a constant stays one, whatever enlarges it
        torch.testing.assert_close(tokenizer.decode(flat[:, :end]), tokenizer.decode(flat))
    tokens = torch.randn(1, 21, 4)
    assert not torch.allclose(tokenizer.decode(tokens[:, :5]), tokenizer.decode(tokens))
    with pytest.raises(ValueError, match="the scales end at 1, 5, 21 tokens; got 7"):
        tokenizer.decode(tokens[:, :7])


def test_a_pyramid_around_a_vae_shares_its_weights(tmp_path: Path) -> None:
    vae = tokenizer_of().vae
    around = LatentPyramid.around(vae, SCALES, "nearest")
    assert around.vae is vae and not around.training
    around.save_pretrained(tmp_path)
    again = LatentPyramid.from_pretrained(tmp_path)
    images = torch.rand(1, 3, 8, 8)
    torch.testing.assert_close(again.encode(images), around.encode(images))
    assert not torch.allclose(around.encode(images), LatentPyramid.around(vae, SCALES).encode(images))
    with pytest.raises(ValueError, match="the last of the scales must be the whole latent, 4x4"):
        LatentPyramid.around(vae, (1, 2))
    with pytest.raises(ValueError, match="resize must be area or nearest"):
        LatentPyramid.around(vae, SCALES, "cubic")  # type: ignore[arg-type]


# ---- the network ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize(
    "changes", [{}, {"cross": True}, {"scales": ((1, 2), 3, (4, 4))}], ids=["mlp", "cross", "scales"]
)
def test_sampling_with_a_cache_is_the_network_at_once(changes: dict[str, Any], batch: int) -> None:
    model = small(**changes)
    tokens, noised = latents(model, batch), latents(model, batch, 2)
    tokenizer = tokenizer_of(model.config.scales)
    inputs = tokenizer.embed(tokens)
    labels, null = torch.arange(batch), torch.full((batch,), 3)
    with torch.no_grad():
        whole = [model(inputs, c) for c in (labels, null)]
        state = model.start(Cond(labels), Cond(null))
        for positions in model.schedule():
            x, t = noised[:, positions], torch.linspace(0.2, 0.9, batch)
            flow = model.predict(state, inputs[:, positions], positions)
            assert flow.pair is not None
            expected = [model.flownet(x, t, z[:, positions], positions) for z in whole]
            for ours, full in zip((*flow.pair(x, t), flow.velocity(x, t)), (*expected, expected[0]), strict=True):
                torch.testing.assert_close(ours, full, rtol=1e-4, atol=1e-4)
            model.append(state, tokens[:, positions], positions)
        state.rewind(len(positions))
        again = model.predict(state, inputs[:, positions], positions).velocity(x, t)
        torch.testing.assert_close(again, expected[0], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("cross", [False, True])
def test_a_token_of_the_flow_sees_its_whole_scale_and_each_vector(cross: bool) -> None:
    model = small(cross=cross)
    where, x, z, t = torch.arange(5, 21), torch.randn(1, 16, 4), torch.randn(1, 16, 32), torch.tensor([0.5])
    v = model.flownet(x, t, z, where)
    for i, changed in enumerate((x, z)):
        moved = changed.clone()
        moved[:, 3] += 1
        given = (moved, t, z) if i == 0 else (x, t, moved)
        assert ((model.flownet(*given, where) - v).abs().amax((0, 2)) > 0).all()
    assert (model.flownet(x, torch.tensor([0.7]), z, where) - v).abs().max() > 1e-3
    assert (model.flownet(x, t, z, where.flip(0)) - v).abs().max() > 1e-3  # places count


def test_half_precision_computes_what_single_does() -> None:
    model = small(cross=True)
    inputs, labels = latents(model, 2), torch.tensor([0, 2])
    exact = model(inputs, labels)
    for dtype in (torch.bfloat16, torch.float16):
        half = small(cross=True).to(dtype)
        z = half(inputs, labels)
        assert z.isfinite().all() and (z.float() - exact).abs().max() < 0.1 * exact.abs().max()
        v = half.flownet(inputs[:, :1], torch.tensor([0.5, 0.1]), z[:, :1], torch.arange(1))
        assert v.dtype == torch.float32 and v.isfinite().all()


# ---- sampling ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("solver", ["sde", "euler", "heun", "euler-jump"])
@pytest.mark.parametrize("steps", [1, 2, 3])
def test_few_and_odd_steps(solver: str, steps: int) -> None:
    out = sample(small(), [0, 1], head_steps=steps, solver=solver, guidance_scale=2.0)
    assert out.tokens.isfinite().all() and out.tokens.std() > 0.01
    assert out.head_calls == 3 * (2 * steps - 1 if solver == "heun" else steps)


def test_an_image_does_not_depend_on_its_batch() -> None:
    model = small()
    three = sample(model, [0, 1, 2], guidance_scale=3.0).tokens
    for i in range(3):
        torch.testing.assert_close(
            sample(model, [i], first=i, guidance_scale=3.0).tokens[0], three[i], rtol=0, atol=1e-3
        )


def test_guidance_of_one_is_none_and_the_first_scale_has_none() -> None:
    model = small()
    plain, strong = (sample(model, [0, 1], guidance_scale=w).tokens for w in (1.0, 4.0))
    torch.testing.assert_close(strong[:, :1], plain[:, :1])
    assert (strong[:, 1:] - plain[:, 1:]).abs().max() > 0.01
    late = sample(model, [0, 1], guidance_scale=4.0, guidance_times=(0.0, 0.5)).tokens
    assert (late - strong).abs().max() > 1e-3 and (late - plain).abs().max() > 1e-3
    with pytest.raises(ValueError, match="times of guidance are"):
        ContinuousSampler(guidance_times=(0.9, 0.1))


def test_steps_anneal_over_scales() -> None:
    assert [steps_of(k, 5, 25, 15) for k in range(5)] == [int((25 - 15) * (4 - k) / 4 + 15) for k in range(5)]
    assert [steps_of(k, 5, 50, 15) for k in range(5)] == [50, 41, 32, 23, 15]
    assert sample(small(), [0], head_steps=9, head_steps_last=4).head_calls == 9 + 6 + 4


# ---- training ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("cross", [False, True])
def test_each_token_counts_the_same(cross: bool) -> None:
    model = small(cross=cross).train()
    tokens = latents(model, 1)  # a batch of one
    given: Any = (tokens, tokenizer_of().embed(tokens), Cond(torch.tensor([0])), Rng.from_seed(0, 1))
    losses = model.training_loss(*given)
    losses["loss"].backward()
    assert set(losses) == {"loss", "loss_first", "loss_last"}
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    even = torch.full((1, 21), 1 / 16)
    torch.testing.assert_close(model.training_loss(*given, weight=even)["loss"], losses["loss"])
    assert model.training_loss(*given, hidden_layer=1)["hidden"].shape == (1, 21, 32)


def test_a_scale_does_not_see_finer_ones_in_training() -> None:
    model = small()
    inputs, labels = latents(model, 1), torch.tensor([1])
    z = model(inputs, labels)
    changed = inputs.clone()
    changed[:, 5:] += 1
    moved = (model(changed, labels) - z).abs().amax((0, 2))
    assert not moved[:5].any() and moved[5:].min() > 0
    first = inputs.clone()
    first[:, :1] += 1  # the first scale reads the class alone
    assert torch.equal(model(first, labels), z)
    torch.testing.assert_close(model(inputs[:, :5], labels), z[:, :5])


def test_labels_are_dropped_in_training_alone() -> None:
    model = small(cond_drop_rate=1.0)
    tokens = latents(model, 2)
    given: Any = (tokens, tokenizer_of().embed(tokens))

    def loss(label: int) -> float:
        return float(model.training_loss(*given, Cond(torch.full((2,), label)), Rng.from_seed(0, 2))["loss"])

    assert loss(0) != loss(3)
    model.train()
    assert loss(0) == loss(1) == loss(3)


def test_checkpointing_gives_the_same_gradients() -> None:
    grads = []
    for checkpointed in (False, True):
        model = small().train()
        if checkpointed:
            model.enable_gradient_checkpointing()
        tokens = latents(model, 2)
        model.training_loss(tokens, tokens, Cond(torch.tensor([0, 1])), Rng.from_seed(0, 2))["loss"].backward()
        grads.append([p.grad for p in model.parameters()])
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b)


# ---- around the model -------------------------------------------------------------------------------------------


def test_a_pipeline_from_a_vae_gets_its_scales(tmp_path: Path) -> None:
    vae: KLVAE = tokenizer_of().vae
    settings = {"head_steps": 2, "solver": "euler-jump", "guidance_scale": 2.0, "guidance_times": (0.0, 0.9)}
    pipeline = assemble(small(), vae, settings)
    assert isinstance(pipeline.image_tokenizer, LatentPyramid) and pipeline.image_tokenizer.vae is vae
    pipeline.save_pretrained(tmp_path)
    again = AutoPipeline.from_pretrained(tmp_path)
    images = [p(class_labels=[1], seed=3, output_type="pt").images for p in (pipeline, again)]
    assert images[0].shape == (1, 3, 8, 8)
    torch.testing.assert_close(*images, rtol=0, atol=1e-4)


def test_two_files_become_a_pipeline_and_files_again(tmp_path: Path) -> None:
    """Of small networks in the released layouts; FlowAR's file alone says that the VAE needs scales."""
    model = small(scales=(1, 2, 4, 8, 16), latent_dim=16)
    vae = create_model("kl16", block_out_channels=(32,) * 5, layers_per_block=1)
    write_official(model, tmp_path / "own.pth")
    write_official(vae, tmp_path / "vae.ckpt")
    convert(tmp_path / "own.pth", tmp_path / "folder", tokenizer=tmp_path / "vae.ckpt")
    pipeline = AutoPipeline.from_pretrained(tmp_path / "folder")
    assert pipeline.image_tokenizer.layout == pipeline.transformer.layout == model.layout
    for ours, theirs in ((model, pipeline.transformer), (vae, pipeline.image_tokenizer.vae)):
        own, other = ours.state_dict(), theirs.state_dict()
        assert own.keys() == other.keys() and all(torch.equal(own[k], other[k]) for k in own)
    sampling = checkpoint("flowar_s.in1k_256").sampling
    assert {k: pipeline.sampler.settings()[k] for k in sampling} == sampling
    convert(tmp_path / "folder", tmp_path / "again.pth")
    first, again = (read_state_dict(tmp_path / name) for name in ("own.pth", "again.pth"))
    assert first.keys() == again.keys() and all(torch.equal(first[k], again[k]) for k in first)
    assert {"mask", "flownet.res_blocks.0.ada_lin.weight", "flownet.res_blocks.0.attn.rope.freqs"} <= first.keys()


def test_the_readmes_settings() -> None:
    """25 steps of the release are the 24 that it takes."""
    for name, steps, scale, high in (("s", 25, 4.3, 0.9), ("l", 25, 2.4, 0.9), ("h", 50, 2.4, 0.7)):
        card = checkpoint(f"flowar_{name}.in1k_256")
        assert keys.sampling_arguments({"cfg": scale, "num_steps": steps, "guidance_high": high}) == card.sampling
        ContinuousSampler(**card.sampling)
    odd = keys.solver_arguments(25)
    assert len(find_solver(odd["solver"]).grid(odd["head_steps"])) == 25


def test_refusals() -> None:
    with pytest.raises(ValueError, match="its width must be a multiple of it; got 100"):
        small(head_width=100)
    with pytest.raises(ValueError, match="it needs two or more"):
        small(scales=(4,))
    with pytest.raises(ValueError, match="one scale a step, 3 in all"):
        small().schedule(4)
