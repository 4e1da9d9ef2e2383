"""Continuous speculative decoding: from a recorded call to our public classes."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tests.parity.adapters import Answers, adapter
from tests.parity.weights import Case
from varkit.checkpoints import mar as keys
from varkit.checkpoints.files import load_strictly
from varkit.conditioning.label import LabelCondition
from varkit.generators.mar import MAR
from varkit.heads.gaussian import process
from varkit.rng import Draw, Rng
from varkit.samplers.continuous_speculative import (
    ContinuousSpeculativeSampler,
    LastStep,
    SpeculativeStep,
    acceptance_ratio,
    log_variance_factor,
    residual_weight,
    speculate,
)
from varkit.tokenizers.kl_vae import KLVAE, unflatten

PARTS = ("mean", "std", "logstd_sum")


def mar_of(case: Case, part: str) -> MAR:
    state = case.fixture.part(f"{part}.")
    classes = keys.read_mar_arguments(state)["num_classes"]  # the release has 1000, whatever the argument says
    model = MAR(**keys.mar_arguments({**case.fixture.meta["constructor"][part], "class_num": classes}))
    load_strictly(model, state, "fixture")
    return model.eval()


def quirks(case: Case) -> bool:
    s = case.settings
    released = s["variance_factor"] == "target_over_draft"
    if released != (s["fallback"] == "zero"):
        raise ValueError("the reciprocal factor and the zero fallback are one option")
    return released


@adapter("cspd", "verifier", "verify")
def _(case: Case) -> Answers:
    s, given, released = case.settings, case.inputs, quirks(case)
    draft, target = (LastStep(*(given[f"{who}_{part}"] for part in PARTS)) for who in ("draft", "target"))
    x, temperature = given["x"], s["inner_temperature"]
    tokens, accepted, ratio, rounds = speculate(
        x,
        draft,
        target,
        given["accept_uniform"],
        lambda k: (given["proposal_noise"][k], given["proposal_uniform"][k]),
        target.mean,
        temperature=temperature,
        max_rounds=s["max_rounds"],
        official_quirks=released,
    )
    return {
        "fixed": log_variance_factor(draft, target, released).exp(),
        "p_pdf": target.log_density(x).exp(),
        "q_pdf": draft.log_density(x).exp(),
        "p_unnorm": target.exponent(x, temperature).exp(),
        "q_unnorm": draft.exponent(x, temperature).exp(),
        "ratio": ratio,
        "accepted": accepted,
        "residual_alpha_at_x": residual_weight(x, draft, target, released),
        "sample": tokens,
        "rounds": torch.tensor([rounds]),
    }


class Shared(Rng):
    """Noise by position, and the recorded numbers of verifications as they are asked for."""

    def __init__(self, noise: Tensor, inter_noise: Tensor, case: Case | None = None) -> None:
        self.noise, self.inter_noise, self.case = noise, inter_noise, case  # B L C; B L S C, by respaced index
        self.verification, self.every = -1, torch.arange(len(noise))[:, None]
        super().__init__(torch.arange(len(noise)))

    def to(self, device: Any) -> Shared:
        return self

    def recorded(self, name: str, like: Tensor) -> Tensor:
        assert self.case is not None
        return self.case.inputs[f"verify{self.verification}/{name}"].unflatten(
            -1 if like.dim() == 2 else -2, (len(like), -1)
        )

    def uniform(self, positions: Tensor, kind: int, step: int = 0, count: int | None = None) -> Tensor:
        assert self.case is not None
        if kind == Draw.ORDER:
            return self.case.inputs["orders"].argsort(1).float()
        assert kind == Draw.LATENT_ACCEPT
        if step == 0:
            self.verification += 1
            return self.recorded("accept_uniform", positions)
        return self.recorded("proposal_uniform", positions)[step - 1]

    def normal(self, positions: Tensor, kind: int, step: int = 0, count: int | None = None) -> Tensor:
        if kind == Draw.NOISE:
            return self.noise[self.every, positions]
        if kind == Draw.LATENT_RESIDUAL:
            return self.recorded("proposal_noise", positions[..., None])[step]
        where = positions.expand(len(self.noise), -1)
        taken = self.inter_noise.shape[2] - 1 - (where >> 20)  # the steps that were taken stand above the position
        return self.inter_noise[self.every, where & 0xFFFFF, taken]


@adapter("cspd", "head", "aligned_denoise")
def _(case: Case) -> Answers:
    s, given = case.settings, case.inputs
    if s["cfg"] != 1 or s["clip_denoised"]:
        raise ValueError("only without guidance and clipping")
    answers = {}
    for part in ("draft", "target"):
        spacing = case.fixture.meta["constructor"][part]["num_sampling_steps"]
        model, z = mar_of(case, part), given[f"{part}/z"]
        assert len(process(spacing)) == len(given["inter_noise"])
        rng = Shared(given["noise"][None], given["inter_noise"].transpose(0, 1)[None])
        diffusion = model.diffloss.diffusion(z[None])
        sample = diffusion.sample(rng, torch.arange(len(z)), num_steps=spacing, temperature=s["temperature"])
        found = (sample, diffusion.mean, diffusion.std, diffusion.log_std_sum)
        answers |= {f"{part}/{name}": value[0] for name, value in zip(("sample", *PARTS), found, strict=True)}
    return answers


@adapter("cspd", "runner", "generate")
def _(case: Case) -> Answers:
    s, given = case.settings, case.inputs
    target, draft = mar_of(case, "target"), mar_of(case, "draft")
    official = case.fixture.meta["constructor"]["target"]
    tokenizer = KLVAE(
        image_size=2 * target.layout.grids[0][0],
        latent_channels=target.layout.dim,
        block_out_channels=(8, 8),
        layers_per_block=1,
        norm_num_groups=4,
    )
    condition = LabelCondition(target.num_classes)
    labels = given["labels"] if s["conditional"] else torch.full_like(given["labels"], target.num_classes)
    cond, steps = condition.encode(class_labels=labels), list[SpeculativeStep]()
    settings = keys.sampling_arguments({**s, "num_sampling_steps": official["num_sampling_steps"]})
    sampler = ContinuousSpeculativeSampler(
        num_draft=s["num_draft"],
        prefill=s["ratio"],
        inner_temperature=s["inner_temperature"],
        max_rounds=s["max_rounds"],
        official_quirks=quirks(case),
        **settings,
    )
    out = sampler.generate(
        tokenizer,
        target,
        cond,
        Shared(given["noise"], given["inter_noise"], case),
        null=condition.null(cond),
        on_step=steps.append,
        draft=draft,
    )
    checks = [info.verified for info in steps if info.verified is not None]
    assert len(checks) == s["num_verifications"]
    answers: Answers = {"latents": unflatten(out.tokens, target.layout.grids[0])}
    for k, check in enumerate(checks):
        answers |= {
            f"verify{k}/draft_tokens": check.draft.flatten(0, 1),
            f"verify{k}/ratio": check.ratio.flatten(),
            f"verify{k}/rounds": torch.tensor([check.rounds]),
            f"verify{k}/tokens": check.tokens.flatten(0, 1),
        }
    return answers


@adapter("parallel-decoding", "cspd", "acceptance")
def _(case: Case) -> Answers:
    given, released = case.inputs, case.meta.get("quirk", False)
    draft, target = (
        LastStep(*(given[f"{who}_{part}"] for part in ("mean", "std", "log_var"))) for who in ("draft", "target")
    )
    temperature = case.settings["inner_temperature"]
    return {
        "ratio": acceptance_ratio(given["x"], draft, target, temperature, released),
        "residual_weight": residual_weight(given["y"], draft, target, released),
    }
