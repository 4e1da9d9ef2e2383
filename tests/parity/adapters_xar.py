"""xAR and FlowAR: from a recorded call to our public classes."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tests.parity.adapters import Answers, adapter
from tests.parity.weights import Case
from varkit.checkpoints import flowar as flowar_keys
from varkit.checkpoints import xar as xar_keys
from varkit.checkpoints.files import load_strictly
from varkit.conditioning.label import drop_labels
from varkit.entities import entities
from varkit.generators.flowar import FlowAR
from varkit.generators.xar import XAR
from varkit.heads.flow import Flow, add_noise, flow_loss
from varkit.heads.flow_transformer import FlowHead
from varkit.interfaces import Cond
from varkit.layers.llama import Rotary
from varkit.layers.modulated import TimeEmbedding, block_mask, places
from varkit.layout import Grid, square_grids
from varkit.rng import Draw, RecordedRng, Rng
from varkit.samplers.continuous import ContinuousSampler
from varkit.samplers.guidance import guidance_schedule
from varkit.samplers.ode import find_solver, integrate, sde_times, times
from varkit.tokenizers.kl_vae import KLVAE, flatten, unflatten
from varkit.tokenizers.latent_pyramid import LatentPyramid, inputs_of, pyramid


class Replay(Rng):
    """Recorded noise: where flows start, (B, L, C), and what each step adds, (steps, B, L, C)."""

    def __init__(self, start: Tensor, steps: Tensor | None = None) -> None:
        super().__init__(torch.arange(len(start)))
        self.start, self.steps = start, steps

    def normal(self, positions: Tensor, kind: int, step: int = 0, count: int | None = None) -> Tensor:
        if kind == Draw.NOISE:
            return self.start[:, positions]
        assert kind == Draw.SOLVER_NOISE and self.steps is not None
        return self.steps[step][:, positions]


def small_vae(side: int, channels: int) -> KLVAE:
    """A VAE with latents of that size: here it only says the layout."""
    return KLVAE(
        image_size=side, latent_channels=channels, block_out_channels=(8,), layers_per_block=1, norm_num_groups=4
    )


def null(case: Case, like: Tensor) -> Cond:
    return Cond(torch.full_like(like, case.settings["unconditional_label"]))


def dropped(model: Any, case: Case) -> Tensor:
    """The labels of a training step, some of them dropped by the recorded numbers."""
    if case.settings["mode"] != "train":
        raise ValueError(f"labels are dropped in training alone; got mode {case.settings['mode']!r}")
    drawn = RecordedRng(uniform={Draw.COND_DROP: case.inputs["drop_uniform"][:, None]})
    rate = model.train().config.cond_drop_rate
    return drop_labels(case.inputs["labels"], drawn, rate, case.settings["unconditional_label"])


def norms(model: Any, case: Case, keys: Any) -> Tensor:
    """L2 norms of the gradients of the recorded parameters, by their official names."""
    given = {k: p.grad for k, p in model.named_parameters() if p.grad is not None}
    official = keys.to_official(given, model)
    return torch.stack([official[name].norm() for name in case.settings["gradients"]])


def grids_of(case: Case, grid: Grid) -> tuple[tuple[Grid, ...], list[Tensor]]:
    s = case.settings
    return entities(grid, s["entity"], s["entity_size"], s.get("scales"))


# ---- xar ------------------------------------------------------------------------------------------------------


def xar_of(case: Case) -> XAR:
    model = XAR(**xar_keys.xar_arguments(case.fixture.meta["constructor"]))
    load_strictly(model, xar_keys.from_official(case.fixture.state), "fixture")
    back = xar_keys.to_official(model.state_dict(), model)
    assert back.keys() == case.fixture.state.keys()
    for name, tensor in case.fixture.state.items():
        torch.testing.assert_close(back[name], tensor, rtol=0, atol=1e-6)
    return model.eval()


@adapter("xar", "entities", "split")
def _(case: Case) -> Answers:
    latents = case.inputs["latents"]
    grids, groups = grids_of(case, (latents.shape[2], latents.shape[3]))
    return {"sequence": pyramid(latents, grids, case.settings["resize"] or "nearest")[:, torch.cat(groups)]}


@adapter("xar", "entities", "mask")
def _(case: Case) -> Answers:
    return {"mask": block_mask(case.settings["entity_sizes"])}


@adapter("xar", "entities", "noise")
def _(case: Case) -> Answers:
    c, given = case.fixture.meta["constructor"], case.inputs
    _, groups = grids_of(case, (c["height"], c["width"]))
    group = torch.repeat_interleave(torch.arange(len(groups)), torch.tensor([len(g) for g in groups]))
    return {
        "x_t": add_noise(given["x"], given["noise"], given["t"][:, group]),
        "target": given["noise"] - given["x"],
    }


@adapter("xar", "rope", "apply")
def _(case: Case) -> Answers:
    s, q = case.settings, case.inputs["q"]
    grids, groups = grids_of(case, (s["grid"], s["grid"]))
    where = places(grids)[torch.cat([groups[i] for i in s["entities"]])]
    rotary = Rotary(where, q.shape[-1], base=s["theta"], prefix=0)
    return {"out": rotary(q.transpose(1, 2)).transpose(1, 2)}


@adapter("xar", "model", "time_embed")
def _(case: Case) -> Answers:
    t = case.inputs["t"]
    return {"index": TimeEmbedding.index(t), "emb": xar_of(case).time_embed(t)}


@adapter("xar", "model", "loss")
def _(case: Case) -> Answers:
    model, given = xar_of(case), case.inputs
    labels = dropped(model, case)
    t = given["t"].unflatten(0, (-1, len(labels))).T  # B E
    noise = given["noise"].flatten(1, 2)[:, model.turn]
    losses = model.loss_at(flatten(given["latents"]), noise, t, labels)
    losses["loss"].backward()
    return {
        "condition": model.condition_on(model.class_emb(labels), t).transpose(0, 1).flatten(0, 1),
        "v": losses["velocity"][:, model.order],
        "loss": losses["loss"].reshape(1),
        "grad_norm": norms(model, case, xar_keys),
    }


@adapter("xar", "model", "velocity")
@torch.no_grad()
def _(case: Case) -> Answers:
    model, given, s = xar_of(case), case.inputs, case.settings
    groups = model.schedule()
    if (s["context_entity"], s["entity_index"], s["context_time"]) != (0, 1, 0.0):
        raise ValueError("a fresh state is followed by the first entity, clean, and then the second")
    state = model.start(Cond(given["labels"]))
    model.append(state, given["context"], groups[0])
    flow = model.predict(state, given["context"], groups[1])
    layer = s["cache_layer"] + (model.config.depths[0] if s["cache_stack"] == "decoder" else 0)
    return {
        "v": flow.velocity(given["x"], torch.full((len(given["x"]),), s["time"])),
        "v_next": flow.velocity(given["x_next"], torch.full((len(given["x"]),), s["next_time"])),
        "cache_k": state.cache.keys[layer][:, :, : state.cache.length],
    }


@adapter("xar", "model", "generate")
def _(case: Case) -> Answers:
    model, given, s = xar_of(case), case.inputs, case.settings
    steps = given.get("step_noise")
    if steps is not None:  # steps E B n C -> steps B L C
        steps = steps.transpose(1, 2).flatten(2, 3)[:, :, model.turn]
    rng = Replay(given["init_noise"].flatten(1, 2)[:, model.turn], steps)
    (grid,), labels = model.layout.grids, given["labels"]
    settings = xar_keys.sampling_arguments(s)
    out = ContinuousSampler(**settings).generate(
        small_vae(grid[0], model.layout.dim), model, Cond(labels), rng, null=null(case, labels)
    )
    last = len(model.sizes) - 1
    scales = [guidance_schedule(s["cfg_schedule"])(s["cfg"], i, last) for i in range(last + 1)]
    return {"latents": unflatten(out.tokens, grid), "cell_cfg": torch.tensor(scales)}


@adapter("xar", "sampler", "time_grid")
def _(case: Case) -> Answers:
    s = case.settings
    grid = sde_times(s["num_steps"], s["last_time"]) if s["solver"] == "sde" else times(s["num_steps"])
    t = torch.tensor(grid, dtype=torch.float64)
    return {"t": t, "time_index": TimeEmbedding.index(t[:-1])}


# ---- flowar ---------------------------------------------------------------------------------------------------


def flowar_of(case: Case) -> FlowAR:
    model = FlowAR(**flowar_keys.flowar_arguments(case.fixture.meta["constructor"]))
    load_strictly(model, flowar_keys.from_official(case.fixture.state), "fixture")
    back = flowar_keys.to_official(model.state_dict(), model)
    assert back.keys() == case.fixture.state.keys()
    for name, tensor in case.fixture.state.items():
        torch.testing.assert_close(back[name], tensor, rtol=0, atol=1e-6)
    return model.eval()


def head_of(case: Case) -> tuple[FlowHead, Tensor]:
    """The head, and the positions of the scale: the first of a scale that lies in the grid of 16."""
    scale = case.settings["scale"]
    where = places(((scale, scale), (16, 16)))
    head = FlowHead(**flowar_keys.head_arguments(case.fixture.meta["constructor"]), places=where)
    load_strictly(head, flowar_keys.head_from_official(case.fixture.state), "fixture")
    return head.eval(), torch.arange(scale**2)


@adapter("flowar", "model", "pyramid")
def _(case: Case) -> Answers:
    s, latents = case.settings, case.inputs["latents"]
    if (s["upsample_mode"], s["downsample_mode"]) != ("bicubic", "area"):
        raise ValueError("inputs are enlarged bicubic, then averaged down")
    grids = square_grids(s["scales"])
    tokens = pyramid(latents, grids, s["target_mode"])
    sizes = [h * w for h, w in grids]
    parts = zip(grids, tokens.split(sizes, 1), inputs_of(tokens, grids).split(sizes, 1), strict=True)
    answers = {}
    for (h, w), target, read in parts:
        answers[f"targets/{h}"], answers[f"inputs/{h}"] = unflatten(target, (h, w)), unflatten(read, (h, w))
    return answers


@adapter("flowar", "model", "loss")
def _(case: Case) -> Answers:
    model, given = flowar_of(case), case.inputs
    grids = model.layout.grids
    tokens = pyramid(given["latents"], grids)
    noise = torch.cat([given[f"noise/{h}"] for h, _ in grids], 1)
    losses = model.loss_at(tokens, inputs_of(tokens, grids), noise, given["t"], dropped(model, case))
    losses["loss"].backward()
    return {
        "z": losses["vectors"],
        "scale_loss": losses["scale_losses"],
        "loss": losses["loss"].reshape(1),
        "grad_norm": norms(model, case, flowar_keys),
    }


@adapter("flowar", "model", "generate")
def _(case: Case) -> Answers:
    model, given, s = flowar_of(case), case.inputs, case.settings
    grids, labels = model.layout.grids, given["labels"]
    tokenizer = LatentPyramid.around(small_vae(grids[-1][0], model.layout.dim), grids)
    noise = torch.cat([given[f"noise/{h}"] for h, _ in grids], 1)
    out = ContinuousSampler(**flowar_keys.sampling_arguments(s)).generate(
        tokenizer, model, Cond(labels), Replay(noise[: len(labels)]), null=null(case, labels)
    )
    inputs = tokenizer.embed(out.tokens)
    z = torch.cat([model(inputs, c.labels) for c in (Cond(labels), null(case, labels))])
    schedule = guidance_schedule(s["cfg_schedule"])
    answers = {
        "scale_cfg": torch.tensor([schedule(s["cfg"], i, len(grids) - 1) for i in range(len(grids))]),
        "latents": unflatten(model.layout.split(out.tokens)[-1], grids[-1]),
    }
    for (h, _), own, vectors in zip(grids, model.layout.split(out.tokens), model.layout.split(z), strict=True):
        answers[f"tokens/{h}"], answers[f"z/{h}"] = own, vectors
    return answers


@adapter("flowar", "head", "forward")
def _(case: Case) -> Answers:
    (head, where), given = head_of(case), case.inputs
    return {"v": head(given["x"], given["t"], given["condition"], where)}


@adapter("flowar", "head", "solve")
@torch.no_grad()
def _(case: Case) -> Answers:
    (head, where), given, s = head_of(case), case.inputs, case.settings
    cond, uncond = given["condition"].chunk(2)

    def alone(x: Tensor, t: Tensor) -> Tensor:
        return head(x, t, cond, where)

    flow = Flow(
        alone, case.fixture.meta["constructor"]["in_channels"], lambda x, t: (alone(x, t), head(x, t, uncond, where))
    )
    flow = flow.guide(s["cfg"], interval=(s["guidance_low"], s["guidance_high"]))
    solver = flowar_keys.solver_arguments(s["num_steps"])
    return {"x": integrate(flow.velocity, given["noise"][: len(cond)], solver["head_steps"], solver["solver"])}


@adapter("flowar", "head", "loss")
def _(case: Case) -> Answers:
    (head, where), given = head_of(case), case.inputs
    loss = flow_loss(
        lambda x, t: head(x, t, given["condition"], where), given["x"], given["noise"], given["t"].flatten()
    )
    return {"loss": loss}


@adapter("flowar", "rope", "apply")
def _(case: Case) -> Answers:
    s, q = case.settings, case.inputs["q"]
    where = places(((s["scale"], s["scale"]), (s["grid"], s["grid"])))
    return {"out": Rotary(where, q.shape[-1], base=s["theta"], prefix=0)(q.transpose(1, 2)).transpose(1, 2)}


@adapter("flowar", "sampler", "time_grid")
def _(case: Case) -> Answers:
    solver = flowar_keys.solver_arguments(case.settings["num_steps"])
    t = torch.tensor(find_solver(solver["solver"]).grid(solver["head_steps"])[:-1])
    return {"t": t, "time_index": TimeEmbedding.index(t)}
