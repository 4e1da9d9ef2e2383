"""MAR: from a recorded call to our public classes."""

from __future__ import annotations

from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from tests.parity.adapters import Answers, adapter
from tests.parity.weights import Case
from varkit.checkpoints import mar as keys
from varkit.checkpoints.files import load_strictly
from varkit.conditioning.label import LabelCondition
from varkit.generators.mar import MAR, first_masked, group_sizes, masked_counts, tokens_at
from varkit.heads.diffusion import Denoiser, fold, unfold
from varkit.heads.gaussian import STEPS, ancestral, backward, diffuse, process
from varkit.rng import Draw, Rng
from varkit.samplers.continuous import ContinuousSampler, ContinuousStep, token_progress
from varkit.samplers.guidance import guidance_schedule
from varkit.tokenizers.kl_vae import KLVAE, flatten, unflatten


def mar_of(case: Case) -> MAR:
    model = MAR(**keys.mar_arguments(case.fixture.meta["constructor"]))
    load_strictly(model, case.fixture.state, "fixture")
    return model.eval()


# ---- the network ----------------------------------------------------------------------------------------------


@adapter("mar", "model", "patchify")
def _(case: Case) -> Answers:
    model = mar_of(case)
    tokens = model.patchify(flatten(case.inputs["latents"]))
    return {"tokens": tokens, "latents": unflatten(model.unpatchify(tokens), model.layout.grids[0])}


@adapter("mar", "model", "encode_decode")
def _(case: Case) -> Answers:
    model, tokens, labels = mar_of(case), case.inputs["tokens"], case.inputs["labels"]
    visible = tokens_at(~case.inputs["mask"].bool())
    nothing = LabelCondition(model.num_classes).null(LabelCondition(model.num_classes).encode(class_labels=labels))
    classes = model.embed_classes(labels)
    return {
        "class_embedding": classes,
        "enc": model.encode(tokens, visible, classes),
        "z": model(tokens, visible, labels),
        "z_all_masked": model(torch.zeros_like(tokens), visible[:, :0], labels),
        "z_uncond": model(tokens, visible, nothing.labels),
    }


@adapter("mar", "model", "loss")
def _(case: Case) -> Answers:
    model, given = mar_of(case).train(case.settings["mode"] == "train"), case.inputs
    mask = first_masked(given["orders"], float(given["mask_rate"]))
    masked = mask.flatten()
    losses = model.losses(
        model.patchify(flatten(given["latents"])),
        model.drop_classes(given["labels"], given["drop_uniform"]),
        mask,
        given["t"].unflatten(0, (-1, masked.numel()))[:, masked],
        given["noise"].unflatten(0, (-1, masked.numel()))[:, masked],
    )
    losses["loss"].backward()
    parameters = dict(model.named_parameters())
    norms = [parameters[name].grad.norm() for name in case.settings["gradients"]]
    return {"loss": losses["loss"].reshape(1), "grad_norm": torch.stack(norms)}


# ---- the head -------------------------------------------------------------------------------------------------


@adapter("mar", "head", "forward")
def _(case: Case) -> Answers:
    head, given = mar_of(case).diffloss, case.inputs
    (x, _), times, (cond, null) = (given[name][None].chunk(2, 1) for name in ("x", "t", "c"))
    t = torch.cat(times)  # each branch at times of its own
    diffusion = head.diffusion(cond, null)
    guided = diffusion.guide(case.settings["cfg"]).denoise(x, t)[0]
    assert diffusion.pair is not None
    without = diffusion.pair(x, t)[1][0]
    other = torch.cat([guided.chunk(2, -1)[0], without.chunk(2, -1)[1]], -1)
    return {
        "out": head.net(given["x"], given["t"], given["c"]),
        "out_cfg": torch.cat([guided, other]),
        "t_emb": head.net.time_embed.features(given["t"]),
        "time_embed": head.net.time_embed(given["t"]),
    }


@adapter("mar", "diffusion", "loss")
def _(case: Case) -> Answers:
    head, given = mar_of(case).diffloss, case.inputs
    mse, bound = head.loss(given["c"], given["target"], given["t"], given["noise"])
    return {
        "x_t": diffuse(process().at(given["t"]), given["target"], given["noise"]),
        "mse": mse,
        "vb": bound,
        "loss": mse + bound,
        "masked": (mse + bound)[given["mask"].bool()].mean().reshape(1),
    }


@adapter("mar", "diffusion", "tables")
def _(case: Case) -> Answers:
    p, stride = process(case.settings["timestep_respacing"] or STEPS), case.settings["stride"]
    tables = {
        "alphas_cumprod": p.alphas_cumprod,
        "betas": p.betas,
        "posterior_log_variance_clipped": p.posterior_log_variance,
        "posterior_mean_coef1": p.from_x0,
        "posterior_mean_coef2": p.from_x,
        "timestep_map": p.indices,
    }
    return {name: torch.from_numpy(tables[name][::stride].copy()) for name in case.outputs}


@adapter("mar", "diffusion", "denoise")
def _(case: Case) -> Answers:
    net: Denoiser = mar_of(case).diffloss.net
    steps, rows = process(case.settings["timestep_respacing"]), []
    for index, x, noise in zip(case.settings["indices"], case.inputs["x"], case.inputs["noise"], strict=True):
        t = torch.full((len(x),), int(steps.indices[index]))
        at = backward(steps.at(index), x, net(x, t, case.inputs["c"]))
        sample = ancestral(at, noise if index else None, case.settings["temperature"])
        rows.append((at.mean, at.log_variance, at.x0, sample))
    names = ("mean", "log_variance", "pred_xstart", "sample")
    return {name: torch.stack(values) for name, values in zip(names, zip(*rows, strict=True), strict=True)}


# ---- sampling -------------------------------------------------------------------------------------------------


class Replayed(Rng):
    """Recorded orders, and noises in the order in which groups ask for them."""

    def __init__(self, case: Case, places: int) -> None:
        self.orders, self.places = case.inputs["orders"], places
        super().__init__(torch.arange(len(self.orders)))
        tensors, self.noises = case.inputs, {Draw.NOISE: [], Draw.DENOISE: []}  # type: ignore[var-annotated]
        for k in range(sum(name.endswith("init_noise") for name in tensors)):
            self.noises[Draw.NOISE].append(self._rows(tensors[f"iter{k}/init_noise"]))
            steps = [self._rows(noise) for noise in tensors[f"iter{k}/step_noise"]]
            self.noises[Draw.DENOISE].append(torch.stack(steps, 2))  # B n S C

    def _rows(self, noise: Tensor) -> Tensor:
        return unfold(noise.unflatten(0, (len(self.orders), -1)), self.places)

    def to(self, device: Any) -> Replayed:
        return self

    def uniform(self, positions: Tensor, kind: int, step: int = 0, count: int | None = None) -> Tensor:
        assert kind == Draw.ORDER
        return self.orders.argsort(1).float()

    def normal(self, positions: Tensor, kind: int, step: int = 0, count: int | None = None) -> Tensor:
        noise = self.noises[Draw(kind)].pop(0)
        return noise if kind == Draw.NOISE else noise[:, :, :-1].flatten(1, 2)  # none is added at the last step


@adapter("mar", "model", "generate")
def _(case: Case) -> Answers:
    model, condition = mar_of(case), LabelCondition(case.fixture.meta["constructor"]["class_num"])
    tokenizer = KLVAE(
        image_size=2 * model.layout.grids[0][0],
        latent_channels=model.layout.dim,
        block_out_channels=(8, 8),
        layers_per_block=1,
        norm_num_groups=4,
    )
    labels = case.inputs.get("labels", torch.full((len(case.inputs["orders"]),), model.num_classes))
    cond = condition.encode(class_labels=labels)
    steps: list[ContinuousStep] = []
    out = ContinuousSampler(**keys.sampling_arguments(case.settings)).generate(
        tokenizer, model, cond, Replayed(case, model.places), null=condition.null(cond), on_step=steps.append
    )
    answers: Answers = {"latents": unflatten(out.tokens, model.layout.grids[0])}
    for info in steps:
        answers[f"iter{info.step}/tokens"] = fold(info.predicted, model.places).flatten(0, 1)
        answers[f"iter{info.step}/z"] = info.predictive.hidden.flatten(0, 1)  # type: ignore[attr-defined]
    return answers | {"cfg": torch.tensor([info.guidance for info in steps])}


@adapter("mar", "schedule", "masking")
def _(case: Case) -> Answers:
    s = case.settings
    sizes, schedule = group_sizes(s["seq_len"], s["num_iter"]), guidance_schedule(s["cfg_schedule"])
    scales = [schedule(s["cfg"], *token_progress(decided, s["seq_len"])) for decided in accumulate(sizes)]
    return {
        "mask_len": torch.tensor(masked_counts(s["seq_len"], s["num_iter"])),
        "num_predicted": torch.tensor(sizes),
        "cfg": torch.tensor(scales),
    }
