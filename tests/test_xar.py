"""xAR: what an entity is, noisy and clean contexts, and that sampling with a cache is the teacher-forced network."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from varkit import AutoPipeline, Rng
from varkit.checkpoints import xar as keys
from varkit.conditioning.label import drop_labels
from varkit.entities import entities, halves
from varkit.generators.xar import XAR, XARState
from varkit.heads.flow import add_noise
from varkit.interfaces import Cond
from varkit.pipelines.auto import assemble
from varkit.registry import checkpoint
from varkit.samplers.continuous import ContinuousSampler
from varkit.tokenizers.kl_vae import KLVAE
from varkit.tokenizers.latent_pyramid import LatentPyramid

KINDS: list[dict[str, Any]] = [
    {"entity": "token"},
    {"entity": "cell", "entity_size": 2},
    {"entity": "cell", "entity_size": (4, 2)},
    {"entity": "subsample", "entity_size": 2},
    {"entity": "scale", "scales": None},
    {"entity": "scale", "scales": (1, 3, (8, 4))},
    {"entity": "image"},
]


def small(grid: tuple[int, int] = (8, 4), **changes: Any) -> XAR:
    """With lively weights: gates that are nearly closed would hide a wrong mask."""
    torch.manual_seed(0)
    sizes = {"num_classes": 3, "hidden_size": 32, "depths": (2, 1), "num_heads": 2, "grid": grid, "latent_dim": 4}
    dropouts = {"dropout": 0.0, "attention_dropout": 0.0}
    model = XAR(**{**sizes, **dropouts, **changes})
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model.eval()


def latents(model: XAR, batch: int, seed: int = 1) -> Tensor:
    shape = (batch, model.layout.length, model.layout.dim)
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


class Layout:
    """A stand-in for a tokenizer: the sampler needs no more."""

    def __init__(self, model: XAR) -> None:
        self.layout, self.model = model.layout, model

    def running(self, batch: int) -> Any:
        return self

    def inputs(self, positions: Tensor) -> Tensor:
        return torch.zeros(1, len(positions), self.layout.dim)

    def record(self, tokens: Tensor, positions: Tensor) -> None: ...


def sample(model: XAR, labels: list[int], first: int = 0, **settings: Any) -> Any:
    cond, null = Cond(torch.tensor(labels)), Cond(torch.full((len(labels),), 3))
    rng = Rng.from_seed(7, len(labels), first)
    tokenizer: Any = Layout(model)
    settings = {"head_steps": 3, "solver": "sde", **settings}
    return ContinuousSampler(**settings).generate(tokenizer, model, cond, rng, null=null)


# ---- entities ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_every_position_is_in_one_entity(kind: dict[str, Any]) -> None:
    grids, groups = entities((8, 4), kind["entity"], kind.get("entity_size"), kind.get("scales"))
    assert sorted(torch.cat(groups).tolist()) == list(range(sum(h * w for h, w in grids)))
    assert grids[-1] == (8, 4)


def test_what_each_entity_is() -> None:
    _, cells = entities((4, 6), "cell", (2, 3))
    assert cells[1].tolist() == [3, 4, 5, 9, 10, 11] and len(cells) == 4
    _, samples = entities((4, 6), "subsample", (2, 3))
    assert samples[0].tolist() == [0, 2, 4, 12, 14, 16] and len(samples) == 4
    assert [len(g) for g in entities((4, 6), "token")[1]] == [1] * 24
    assert [len(g) for g in entities((4, 6), "image")[1]] == [24]
    assert halves((16, 16)) == ((1, 1), (2, 2), (4, 4), (8, 8), (16, 16)) and halves((3, 1)) == ((1, 1), (3, 1))
    for wrong, message in (
        (("cell", 3), "does not divide"),
        (("subsample", None), "needs its size"),
        (("scale", None, (1, 2)), "the last of the scales must be the whole latent"),
        (("scale", None, ((4, 6),)), "needs two scales"),
        (("word",), "entity must be token, cell"),
    ):
        with pytest.raises(ValueError, match=message):
            entities((4, 6), *wrong)  # type: ignore[arg-type]


# ---- the network ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_sampling_with_a_cache_is_the_network_on_a_clean_context(kind: dict[str, Any], batch: int) -> None:
    model = small(**kind)
    tokens, noised = latents(model, batch), latents(model, batch, 2)
    labels, null = torch.arange(batch), torch.full((batch,), 3)
    t = torch.rand(batch, len(model.sizes))
    with torch.no_grad():
        whole = [model(noised, t, c, clean=tokens) for c in (labels, null)]
        state = model.start(Cond(labels), Cond(null))
        for i, positions in enumerate(model.schedule()):
            flow = model.predict(state, tokens[:, positions], positions)
            assert flow.pair is not None
            for _ in range(2):  # asking changes nothing
                both = flow.pair(noised[:, positions], t[:, i])
                alone = flow.velocity(noised[:, positions], t[:, i])
            for ours, full in zip((*both, alone), (*whole, whole[0]), strict=True):
                torch.testing.assert_close(ours, full[:, positions], rtol=1e-4, atol=1e-4)
            model.append(state, tokens[:, positions], positions)
    assert state.length == model.layout.length


def test_an_entity_sees_itself_and_those_before_it() -> None:
    model = small(entity="cell", entity_size=4)  # two cells
    first, second = model.schedule()
    x, t = latents(model, 1), torch.tensor([[0.3, 0.6]])
    v = model(x, t, torch.tensor([1]))
    for changed, where in ((second, first), (first, second)):
        y = x.clone()
        y[:, changed[-1]] += 1
        moved = (model(y, t, torch.tensor([1])) - v).abs().amax((0, 2))
        assert moved[changed].min() > 0  # both ways within an entity
        assert (moved[where].max() > 0) == (where is second)
    later = model(x, torch.tensor([[0.3, 0.9]]), torch.tensor([1])) - v
    assert not later[:, first].any() and later[:, second].abs().min() > 0


def test_half_precision_computes_what_single_does() -> None:
    model = small(entity="cell", entity_size=2)
    x, t, labels = latents(model, 2), torch.rand(2, 8), torch.tensor([0, 2])
    exact = model(x, t, labels)
    for dtype in (torch.bfloat16, torch.float16):
        half = small(entity="cell", entity_size=2).to(dtype)(x, t, labels)
        assert half.dtype == torch.float32 and half.isfinite().all()
        assert (half - exact).abs().max() < 0.1 * exact.abs().max()


def test_rewinding_an_entity_leaves_what_comes_next_the_same() -> None:
    model = small(entity="cell", entity_size=2)
    tokens, groups = latents(model, 2), model.schedule()
    state = model.start(Cond(torch.tensor([0, 1])))

    def asked(i: int) -> Tensor:
        return model.predict(state, tokens, groups[i]).velocity(tokens[:, groups[i]], torch.full((2,), 0.5))

    answers = []
    with torch.no_grad():
        for i, positions in enumerate(groups[:4]):
            answers.append(asked(i))
            model.append(state, tokens[:, positions], positions)
        state.rewind(8)  # one pending, one in the cache
        assert state.length == 8
        torch.testing.assert_close(asked(2), answers[2])
        state.reset()
        torch.testing.assert_close(asked(0), answers[0])
        model.append(state, tokens[:, groups[0]], groups[0])
    with pytest.raises(ValueError, match="1 tokens are less than the last entity"):
        state.rewind(1)


# ---- sampling ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("solver", ["sde", "euler", "heun", "euler-jump"])
@pytest.mark.parametrize("steps", [1, 2, 3])
def test_few_and_odd_steps(solver: str, steps: int) -> None:
    model = small(entity="cell", entity_size=4)
    out = sample(model, [0, 1], head_steps=steps, solver=solver, guidance_scale=2.0)
    assert out.tokens.isfinite().all() and out.tokens.std() > 0.01
    assert out.head_calls == len(model.sizes) * (2 * steps - 1 if solver == "heun" else steps)


def test_an_image_does_not_depend_on_its_batch() -> None:
    model = small(entity="cell", entity_size=4)
    three = sample(model, [0, 1, 2], guidance_scale=3.0).tokens
    for i in range(3):
        torch.testing.assert_close(
            sample(model, [i], first=i, guidance_scale=3.0).tokens[0], three[i], rtol=0, atol=1e-3
        )


def test_guidance_of_one_is_none_and_the_first_entity_has_none() -> None:
    model = small(entity="cell", entity_size=4)
    plain, strong = (sample(model, [0, 1], guidance_scale=w).tokens for w in (1.0, 4.0))
    first, last = model.schedule()
    torch.testing.assert_close(strong[:, first], plain[:, first])
    assert (strong[:, last] - plain[:, last]).abs().max() > 0.01
    never = sample(model, [0, 1], guidance_scale=4.0, guidance_times=(0.0, 0.0)).tokens
    torch.testing.assert_close(never, plain)


def test_steps_anneal_over_entities() -> None:
    model = small((8, 8), entity="cell", entity_size=4)
    out = sample(model, [0], head_steps=50, head_steps_last=15)
    assert out.head_calls == 50 + 38 + 26 + 15  # DiSA: int((3 - n) / 3 * 35 + 15)


def test_states_are_their_own() -> None:
    """Two batches interleaved on one model: nothing is kept on the modules."""
    model, tokens = small(entity="cell", entity_size=4), latents(small(entity="cell", entity_size=4), 2)
    groups = model.schedule()

    def run(states: list[XARState]) -> list[Tensor]:
        out = []
        for positions in groups:
            for state in states:
                flow = model.predict(state, tokens, positions)
                out.append(flow.velocity(tokens[:, positions], torch.full((2,), 0.5)))
                model.append(state, tokens[:, positions], positions)
        return out

    conds = [Cond(torch.tensor([0, 1])), Cond(torch.tensor([2, 2]))]
    with torch.no_grad():
        together = run([model.start(c) for c in conds])
        apart = [run([model.start(c)]) for c in conds]
    for i, pair in enumerate(zip(*apart, strict=True)):
        for j in range(2):
            torch.testing.assert_close(together[2 * i + j], pair[j])


# ---- training ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("context", ["independent", "clean", "increasing", "decreasing"])
def test_times_of_the_context(context: Any) -> None:
    model = small(entity="cell", entity_size=2, context_noise=context)
    t = model.times(Rng.from_seed(0, 64))
    assert t.shape == (64, 8) and float(t.min()) > 0 and float(t.max()) < 1
    rising = sum(bool((a < b).all()) for a, b in pairwise(t.T))
    assert rising == {"increasing": 7}.get(context, 0)
    assert bool((t.diff() <= 0).all()) == (context == "decreasing")
    tokens, cond = latents(model, 2), Cond(torch.tensor([0, 1]))
    losses = model.train().training_loss(tokens, torch.zeros_like(tokens), cond, Rng.from_seed(1, 2))
    losses["loss"].backward()
    assert set(losses) == {"loss", "loss_first", "loss_last"}
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


def test_the_clean_context_is_what_sampling_reads() -> None:
    """The first entity has no context: its loss is the same; the others' is not."""
    noisy, clean = (small(entity="cell", entity_size=4, context_noise=c) for c in ("independent", "clean"))
    tokens, noise, t = latents(noisy, 2), latents(noisy, 2, 3), torch.tensor([[0.5, 0.9], [0.4, 0.7]])
    a, b = (m.loss_at(tokens, noise, t, torch.tensor([0, 1])) for m in (noisy, clean))
    torch.testing.assert_close(a["loss_first"], b["loss_first"])
    assert abs(float(a["loss_last"] - b["loss_last"])) > 1e-4
    noised = add_noise(tokens, noise, t[:, clean.group[clean.turn]])
    torch.testing.assert_close(b["velocity"], clean(noised, t, torch.tensor([0, 1]), clean=tokens))


def test_labels_are_dropped_in_training_alone() -> None:
    labels, rng = torch.zeros(200, dtype=torch.int64), Rng.from_seed(0, 200)
    assert 70 < int((drop_labels(labels, rng, 0.5, 3) == 3).sum()) < 130
    assert torch.equal(drop_labels(labels, rng, 0.0, 3), labels)
    model = small(entity="cell", entity_size=4, cond_drop_rate=1.0)
    tokens = latents(model, 2)

    def loss(label: int) -> float:
        return float(model.training_loss(tokens, tokens, Cond(torch.full((2,), label)), Rng.from_seed(0, 2))["loss"])

    assert loss(0) != loss(3)
    model.train()
    assert loss(0) == loss(1) == loss(3)


def test_weights_weigh_and_a_blocks_output_comes_back() -> None:
    model = small(entity="cell", entity_size=4)
    tokens, cond = latents(model, 1), Cond(torch.tensor([0]))  # a batch of one
    given: Any = (tokens, torch.zeros_like(tokens), cond, Rng.from_seed(0, 1))
    even = torch.full((1, model.layout.length), 1 / model.layout.length)
    torch.testing.assert_close(model.training_loss(*given)["loss"], model.training_loss(*given, weight=even)["loss"])
    hidden = model.training_loss(*given, hidden_layer=2)["hidden"]
    assert hidden.shape == (1, model.layout.length, 32)


def test_checkpointing_gives_the_same_gradients() -> None:
    grads = []
    for checkpointed in (False, True):
        model = small(entity="cell", entity_size=4).train()
        if checkpointed:
            model.enable_gradient_checkpointing()
        tokens = latents(model, 2)
        model.training_loss(tokens, tokens, Cond(torch.tensor([0, 1])), Rng.from_seed(0, 2))["loss"].backward()
        grads.append([p.grad for p in model.parameters()])
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b)


# ---- around the model -------------------------------------------------------------------------------------------


def test_a_pipeline_of_scales_gets_its_tokenizer(tmp_path: Path) -> None:
    vae = KLVAE(image_size=16, latent_channels=4, block_out_channels=(8, 8), layers_per_block=1, norm_num_groups=4)
    model = small((8, 8), entity="scale")
    pipeline = assemble(model, vae.eval(), {"head_steps": 2, "solver": "sde", "guidance_scale": 2.0})
    assert isinstance(pipeline.image_tokenizer, LatentPyramid) and pipeline.image_tokenizer.config.resize == "nearest"
    pipeline.save_pretrained(tmp_path)
    again = AutoPipeline.from_pretrained(tmp_path)
    images = [p(class_labels=[1], seed=3, output_type="pt").images for p in (pipeline, again)]
    assert images[0].shape == (1, 3, 16, 16)
    torch.testing.assert_close(*images, rtol=0, atol=1e-4)
    cells = small((8, 8), entity="cell", entity_size=4)
    assert cells.tokenizer_for(vae) is vae


def test_the_readmes_settings() -> None:
    for name, steps, scale in (("b", 40, 2.7), ("l", 50, 2.3), ("h", 50, 2.2)):
        card = checkpoint(f"xar_{name}.in1k_256")
        told = keys.sampling_arguments({"cfg": scale, "num_steps": steps})
        assert told == {**card.sampling, "guidance_times": (0.0, 1.0)}
        ContinuousSampler(**card.sampling)


def test_refusals() -> None:
    with pytest.raises(ValueError, match="context_noise must be"):
        small(context_noise="some")
    with pytest.raises(ValueError, match="cannot be shared by 3 heads"):
        small(num_heads=3, entity="token")
    with pytest.raises(ValueError, match="one entity a step, 2 in all"):
        small(entity="cell", entity_size=4).schedule(3)
