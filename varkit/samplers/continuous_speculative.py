"""Continuous speculative decoding: a small MAR drafts tokens, a large one looks at many of them in one pass.

Sources: Wang et al., "Continuous Speculative Decoding for Autoregressive Image Generation" (CSpD), arXiv 2411.11925;
MarkXCloud/CSpD: spec_decode/spec_decode_runner.py (d91f721).

Both models denoise a token from the same noise, step by step (noise is keyed by position, so it is the same by itself).
Then the exponents of all transitions but the last cancel in the ratio of the two laws, and what is left is

    p(x) / q(x) = N(x; target's last step) / N(x; draft's last step) * prod(draft's stds) / prod(target's stds)

with the stds of the steps before. A draft is accepted where that exceeds a uniform number. Where it is not, a token of
max(0, p - q) is drawn by rejection: a proposal of the target's last step is kept with max(0, 1 - q / p), and the
constant cancels; where none is kept, the target's own token stands. Tokens are decided one by one, and the target's
states are of the tokens verified before the block: the law is that of the target with so many fewer iterations.

That is an approximation. The ratio leaves out transitions that the two models do not share, and MAR's last step adds no
noise, so that a draft stands at its own mean. `official_quirks=True` is as released: the product of stds enters as its
reciprocal, the residual sampler runs for all tokens of the batch and later proposals replace earlier ones, tokens
without one are zero, a block is guided as its last iteration, and the test has an inner temperature of 42.

Shapes: B images, n positions, m tokens of D channels (patches of positions), L positions in all.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from diffusers.configuration_utils import register_to_config
from diffusers.schedulers.scheduling_utils import SchedulerMixin
from torch import Tensor

from varkit.generators.mar import MAR
from varkit.heads.diffusion import Diffusion, fold, unfold
from varkit.interfaces import Cond, Generator, Tokenizer
from varkit.rng import Draw, Rng
from varkit.samplers.continuous import (
    ContinuousOutput,
    ContinuousSampler,
    ContinuousStep,
    check_predictive,
    keep_known,
    put,
    strength_at,
    take,
)
from varkit.samplers.next_group import Known

RELEASED_TEMPERATURE = 42.0

# ---- one verification ---------------------------------------------------------------------------------------------


class LastStep(NamedTuple):
    """What denoising came to, (..., D) each: mean and std of the last step; the log std of those before, summed."""

    mean: Tensor
    std: Tensor
    log_std_sum: Tensor

    @classmethod
    def of(cls, diffusion: Diffusion, places: int) -> LastStep:
        """Of a diffusion that was sampled. Args: places: positions of a token."""
        found = (diffusion.mean, diffusion.std, diffusion.log_std_sum)
        return cls(*(fold(part, places) for part in found))

    def exponent(self, x: Tensor, temperature: float = 1.0) -> Tensor:
        """(...): log density without its constant."""
        return -0.5 * ((x - self.mean) / self.std / temperature).square().sum(-1)

    def log_density(self, x: Tensor) -> Tensor:
        """(...)"""
        constant = self.std.log().sum(-1) + 0.5 * self.mean.shape[-1] * math.log(2 * math.pi)
        return self.exponent(x) - constant


def log_variance_factor(draft: LastStep, target: LastStep, official_quirks: bool = False) -> Tensor:
    """(...): log of the product of the draft's stds over that of the target's; its negative, as released."""
    factor = (draft.log_std_sum - target.log_std_sum).sum(-1)
    return -factor if official_quirks else factor


def acceptance_ratio(
    x: Tensor, draft: LastStep, target: LastStep, temperature: float = 1.0, official_quirks: bool = False
) -> Tensor:
    """How a draft x (..., D) is judged: accepted where a uniform number is below this (...), which may exceed 1.

    Args: temperature: flattens the exponents; 1 is neutral.
    """
    exponents = target.exponent(x, temperature) - draft.exponent(x, temperature)
    stds = (draft.std.log() - target.std.log()).sum(-1)
    return (exponents + stds + log_variance_factor(draft, target, official_quirks)).exp()


def residual_weight(y: Tensor, draft: LastStep, target: LastStep, official_quirks: bool = False) -> Tensor:
    """With what probability a proposal y (..., D) of the target's last step is kept: max(0, 1 - q / p), (...)."""
    factor = log_variance_factor(draft, target, official_quirks)
    if official_quirks:  # densities as they are: where they vanish this is no number, and nothing is kept
        p, q = target.log_density(y).exp(), draft.log_density(y).exp()
        return (p - q / factor.exp()).clamp_min(0) / p
    return (1 - (draft.log_density(y) - target.log_density(y) - factor).exp()).clamp_min(0)


@dataclass
class Verified:
    """positions: (B, n), rising.   draft, tokens: (B, m, D) before and after.   ratio: (B, m).   accepted: (B, m) bool.
    rounds: of the residual sampler."""

    positions: Tensor
    draft: Tensor
    tokens: Tensor
    ratio: Tensor
    accepted: Tensor
    rounds: int


Numbers = Callable[[int], tuple[Tensor, Tensor]]
"""Round -> standard normal (..., D) and uniform (...) numbers of its proposals."""


def speculate(
    x: Tensor,
    draft: LastStep,
    target: LastStep,
    uniform: Tensor,
    proposals: Numbers,
    fallback: Tensor,
    *,
    temperature: float = 1.0,
    max_rounds: int = 100,
    official_quirks: bool = False,
) -> tuple[Tensor, Tensor, Tensor, int]:
    """Accept drafts, and draw others in the place of those that are not.

    Args:
        x: (..., D).   uniform: (...), of the tests.   proposals: of the residual sampler.
        fallback: (..., D), what stands where no proposal is kept in `max_rounds`; not read with the quirks: zero.
    Returns: tokens (..., D); accepted (...) bool; the ratios (...); how many rounds there were.
    """
    ratio = acceptance_ratio(x, draft, target, temperature, official_quirks)
    accepted = ratio > uniform
    other = torch.zeros_like(x) if official_quirks else fallback.clone()
    waiting = torch.ones_like(accepted) if official_quirks and not bool(accepted.all()) else ~accepted
    rounds = 0
    while bool(waiting.any()) and rounds < max_rounds:
        noise, number = proposals(rounds)
        y = target.mean + target.std * noise
        kept = number < residual_weight(y, draft, target, official_quirks)
        if not official_quirks:
            kept = kept & waiting
        other = torch.where(kept[..., None], y, other)
        waiting = waiting & ~kept
        rounds += 1
    return torch.where(accepted[..., None], x, other), accepted, ratio, rounds


# ---- the sampler --------------------------------------------------------------------------------------------------


@dataclass
class SpeculativeStep(ContinuousStep):
    """`tokens` are those after a verification; `predictive` and `predicted` of the model that drew the group.

    verified: None where nothing was.
    """

    verified: Verified | None = None


@dataclass
class ContinuousSpeculativeOutput(ContinuousOutput):
    """`network_calls` are those of the target; `head_calls` of both heads. Lists count tokens, a number an image;
    tokens_per_call: those drawn by calls of the target."""

    target_calls: int = 0
    draft_calls: int = 0
    drafted: list[int] | None = None
    accepted: list[int] | None = None
    tokens_per_call: list[float] | None = None
    lossless: bool = False


@dataclass
class _Block:
    """What was drafted since the last verification."""

    positions: list[Tensor]
    tokens: list[Tensor]
    parts: list[LastStep]
    strengths: list[float]


class ContinuousSpeculativeSampler(ContinuousSampler, SchedulerMixin):  # diffusers looks here for SchedulerMixin
    """Draws MAR's tokens by a draft MAR and verifies them by the transformer of the pipeline.

    Args:
        num_draft: iterations between two verifications.
        prefill: share of the iterations, at the start, that the target takes by itself.
        inner_temperature: flattens the test of acceptance, see `acceptance_ratio`; None is 1, or as released 42.
        max_rounds: of the residual sampler.   official_quirks: as released, see the module.
        model: name or folder of the draft, which a pipeline opens.
        others: see `ContinuousSampler`; of both models. head_steps_last is refused, as both must take the same steps.
    Attributes: draft_model: the draft, unless a call brings one (`draft=`); it is not saved.
    """

    draft_model: Any = None

    @property
    def model_to_open(self) -> tuple[str, str] | None:
        """The option `model` and what it says, while `draft_model` is not set."""
        return ("model", self.config.model) if self.config.model is not None and self.draft_model is None else None

    @register_to_config
    def __init__(
        self,
        num_draft: int = 8,
        prefill: float = 0.15,
        inner_temperature: float | None = None,
        max_rounds: int = 100,
        official_quirks: bool = False,
        guidance_scale: float = 1.0,
        guidance_schedule: str = "linear",
        guidance_power: float = 1.0,
        guidance_interval: Sequence[int] | None = None,
        guidance_times: Sequence[float] | None = None,
        num_steps: int | None = None,
        head_steps: int | str = 25,
        head_steps_last: int | None = None,
        solver: str | None = None,
        temperature: float = 1.0,
        guidance_every: int = 1,
        order: str | None = None,
        model: str | None = None,
    ) -> None:
        self.settings(**dict(self.config))

    def settings(self, **changes: Any) -> dict[str, Any]:
        """As those of `ContinuousSampler`; `draft` is a model for this call alone. Raises ValueError on a bad one."""
        merged = super().settings(**changes)
        for name in ("num_draft", "max_rounds"):
            if merged[name] < 1:
                raise ValueError(f"{name} must be at least 1; got {merged[name]}")
        if not 0 <= merged["prefill"] <= 1:
            raise ValueError(f"prefill is a share of the iterations, 0 to 1; got {merged['prefill']}")
        if merged["inner_temperature"] is not None and not merged["inner_temperature"] > 0:
            raise ValueError(f"inner_temperature must be > 0 (1 is neutral); got {merged['inner_temperature']}")
        if merged["head_steps_last"] is not None:
            raise ValueError(
                "head_steps_last changes the head's steps on the way, but draft and target must take the same steps of "
                "a token: leave it out"
            )
        return {**merged, "draft": changes.get("draft")}

    @staticmethod
    def check_target(model: Any, what: str = "the transformer") -> None:
        """Raises ValueError unless it is a MAR."""
        if not isinstance(model, MAR):
            raise ValueError(
                f"continuous speculative decoding is for MAR, whose head denoises each token by itself; {what} is a "
                f"{type(model).__name__}: draw with its own sampler"
            )

    @staticmethod
    def check_models(transformer: Any, draft: Any) -> None:
        """Raises ValueError unless both are MAR of the same tokens."""
        if draft is None:
            raise ValueError(
                "continuous speculative decoding needs a second, smaller MAR: draft=, the sampler's draft_model, or on "
                "the command line --draft"
            )
        ContinuousSpeculativeSampler.check_target(transformer)
        ContinuousSpeculativeSampler.check_target(draft, "the draft")
        transformer.layout.require(draft.layout, "the transformer", "the draft")
        if (transformer.places, transformer.num_classes) != (draft.places, draft.num_classes):
            raise ValueError(
                f"transformer and draft must have the same patches and classes; they have {transformer.places} and "
                f"{draft.places} latents a token, {transformer.num_classes} and {draft.num_classes} classes"
            )

    @torch.no_grad()
    def generate(  # type: ignore[override]
        self,
        tokenizer: Tokenizer,
        transformer: Generator,
        cond: Cond,
        rng: Rng,
        null: Cond | None = None,
        known: Known | None = None,
        on_step: Callable[[SpeculativeStep], None] | None = None,
        **changes: Any,
    ) -> ContinuousSpeculativeOutput:
        """Sample the latents of one image for each row of `cond`.

        Args: as those of `ContinuousSampler.generate`; in `changes` also `draft`, a MAR.
        Raises: ValueError on a bad setting, or models that do not go together, before any work.
        """
        settings = self.settings(**changes)
        settings["draft"] = settings["draft"] or self.draft_model
        self.check_models(transformer, settings["draft"])
        transformer.layout.require(tokenizer.layout, "the generator", "the tokenizer")
        if settings["guidance_scale"] != 1 and null is None:
            raise ValueError(f"guidance_scale {settings['guidance_scale']:g} needs the unconditional branch (null=)")
        began = time.perf_counter()
        run = _Run(settings, transformer, cond, rng, null, known)
        for step, positions in enumerate(run.groups):
            info = run.step(step, positions)
            if on_step is not None:
                on_step(info)
        steps, target_calls = len(run.groups), run.calls["target"]
        return ContinuousSpeculativeOutput(
            run.every,
            steps,
            target_calls,
            time.perf_counter() - began,
            head_calls=run.head_calls,
            null_calls=run.null_calls,
            target_calls=target_calls,
            draft_calls=run.calls["draft"],
            drafted=run.drafted.tolist(),
            accepted=run.accepted.tolist(),
            tokens_per_call=[sum(p.shape[-1] for p in run.groups) / run.places / target_calls] * len(cond),
        )


class _Run:
    """One batch on its way."""

    def __init__(
        self, settings: dict[str, Any], target: Any, cond: Cond, rng: Rng, null: Cond | None, known: Known | None
    ) -> None:
        self.settings, self.rng, self.known = settings, rng, known
        self.models = {"target": target, "draft": settings["draft"]}
        batch, length, steps = len(cond), target.layout.length, settings["num_steps"]
        if known is None:
            before, self.groups = None, target.groups(rng, steps, settings["order"])
        else:
            before, self.groups = target.groups_around(known[1].expand(batch, length), rng, steps, settings["order"])
        guided = settings["guidance_scale"] != 1
        self.states = {name: model.start(cond, null if guided else None) for name, model in self.models.items()}
        device = self.groups[0].device
        self.every = torch.zeros(batch, length, target.layout.dim, device=device)
        self.places, self.decided, self.head_calls, self.null_calls = target.places, 0, 0, 0
        self.calls = {"target": 0, "draft": 0}
        self.drafted, self.accepted = (torch.zeros(batch, dtype=torch.int64, device=device) for _ in range(2))
        self.block = _Block([], [], [], [])
        if known is not None and before is not None and before.numel():
            self.decided = before.shape[1]
            for name in self.models:
                self.record(name, take(known[0], before).to(self.every), before)

    def record(self, name: str, tokens: Tensor, positions: Tensor) -> None:
        self.models[name].append(self.states[name], tokens, positions)
        put(self.every, positions, tokens)

    def draw(self, name: str, positions: Tensor, strength: float | Tensor) -> tuple[Tensor, Diffusion]:
        """Tokens of one pass of a model, latents (B, n, C), and the predictive that knows its last step."""
        predictive: Any = self.models[name].predict(self.states[name], self.every, positions)
        self.calls[name] += 1
        check_predictive(predictive, type(self.models[name]).__name__, self.settings)
        if self.settings["guidance_scale"] != 1:
            predictive = predictive.guide(strength, self.settings["guidance_every"])
        options = {"solver": self.settings["solver"]} if self.settings["solver"] is not None else {}
        steps, temperature = self.settings["head_steps"], self.settings["temperature"]
        tokens = predictive.sample(self.rng, positions, num_steps=steps, temperature=temperature, **options)
        self.head_calls += predictive.calls
        self.null_calls += predictive.null_calls
        return tokens, predictive

    def kept(self, tokens: Tensor, positions: Tensor) -> Tensor:
        return tokens if self.known is None else keep_known(tokens, self.known, positions)

    def step(self, step: int, positions: Tensor) -> SpeculativeStep:
        """One iteration: of the target while pre-filling, else of the draft, with a verification where one is due."""
        count = len(self.groups)
        filling = step <= self.settings["prefill"] * count
        self.decided += positions.shape[-1]
        strength = 1.0
        if self.settings["guidance_scale"] != 1:
            strength = strength_at(self.settings, step, count, self.decided, self.models["target"])
        predicted, predictive = self.draw("target" if filling else "draft", positions, strength)
        tokens, verified = self.kept(predicted, positions), None
        self.record("draft", tokens, positions)
        if filling:
            self.record("target", tokens, positions)
        else:
            self.block.positions.append(positions)
            self.block.tokens.append(tokens)
            self.block.parts.append(LastStep.of(predictive, self.places))
            self.block.strengths.append(strength)
            if step % self.settings["num_draft"] == 0 or step == count - 1:
                verified = self.verify(strength)
        return SpeculativeStep(step, count, positions, predicted, self.every, predictive, strength, verified)

    def verify(self, strength: float) -> Verified:
        """Look at the block by the target; what it decides is what both models read from then on."""
        block, self.block = self.block, _Block([], [], [], [])
        places, settings = self.places, self.settings
        inner = settings["inner_temperature"] or (RELEASED_TEMPERATURE if settings["official_quirks"] else 1.0)
        positions, tokens = torch.cat(block.positions, 1), fold(torch.cat(block.tokens, 1), places)
        sizes = [p.shape[1] for p in block.positions]
        strengths = torch.tensor(block.strengths).repeat_interleave(torch.tensor(sizes))
        first = positions.unflatten(1, (-1, places))[..., 0]  # B m
        order = first.argsort(1)
        whole = (order[..., None] * places + torch.arange(places, device=order.device)).flatten(1)  # B n
        positions, first = positions.gather(1, whole), first.gather(1, order)
        draft = LastStep(*(rows(torch.cat(part, 1), order) for part in zip(*block.parts, strict=True)))
        x = rows(tokens, order)
        of_each = strength if settings["official_quirks"] else strengths.to(positions.device)[whole]
        own, predictive = self.draw("target", positions, of_each)
        target = LastStep.of(predictive, places)
        out, accepted, ratio, rounds = speculate(
            x,
            draft,
            target,
            self.rng.uniform(first, Draw.LATENT_ACCEPT),
            lambda k: (
                self.rng.normal(first, Draw.LATENT_RESIDUAL, step=k, count=x.shape[-1]),
                self.rng.uniform(first, Draw.LATENT_ACCEPT, step=k + 1),
            ),
            fold(own, places),
            temperature=inner,
            max_rounds=settings["max_rounds"],
            official_quirks=settings["official_quirks"],
        )
        self.drafted += accepted.shape[1]
        self.accepted += accepted.sum(1)
        decided = self.kept(unfold(out, places), positions)
        self.states["draft"].rewind(positions.shape[1])
        for name in self.models:
            self.record(name, decided, positions)
        return Verified(positions, x, out, ratio, accepted, rounds)


def rows(x: Tensor, order: Tensor) -> Tensor:
    """(B, m, D) in the order (B, m)."""
    return x.gather(1, order[..., None].expand_as(x))
