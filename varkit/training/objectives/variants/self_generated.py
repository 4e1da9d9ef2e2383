"""Self-generated context: some true tokens of the context give way to the model's own; targets stay true.

Paper: "Bridging the Training-Inference Gap in LLMs by Leveraging Self-Generated Tokens" (2024), batch-scheduled
sampling; there is no official code and the paper is on language, so how the tokens are drawn is our reading. For a
token pyramid (VAR) the context is mixed first, and the image is then coded again from it: later scales are asked to
repair what the own tokens got wrong. Without that, inputs and targets of a residual code contradict each other.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor

from varkit.config import ConfigError, config
from varkit.heads.categorical import Categorical
from varkit.interfaces import Cond, Generator, Tokenizer
from varkit.rng import Draw, Rng
from varkit.samplers.next_group import NextGroupSampler
from varkit.samplers.processors import build_processors


@config
class SelfGenerated:
    """The model's own tokens in its context."""

    probability: float = 0.2  # that a token is replaced; above 0.3 context and target may contradict
    schedule: Literal["constant", "linear"] = "constant"  # linear: from 0 at the start to `probability` at the end
    mode: Literal["one_step", "rollout"] = "one_step"  # from the true context, one pass; or group after group
    recompute_targets: bool = True  # of a pyramid: code the image again after the mixed context

    def __post_init__(self) -> None:
        if not 0 <= self.probability <= 1:
            raise ConfigError(f"objective.self_generated.probability must be in [0, 1]; got {self.probability}")


def check(options: SelfGenerated, generator: Generator, tokenizer: Tokenizer) -> None:
    """Raises ConfigError naming the hook that a part lacks."""
    if options.mode == "one_step" and not hasattr(generator, "teacher_forced"):
        raise ConfigError(
            f"objective.self_generated.mode=one_step needs the method teacher_forced, which "
            f"{type(generator).__name__} lacks; use mode=rollout"
        )
    if options.recompute_targets and len(tokenizer.layout.grids) > 1 and not hasattr(tokenizer, "reencode"):
        raise ConfigError(
            f"objective.self_generated.recompute_targets needs the method reencode, which "
            f"{type(tokenizer).__name__} lacks; set recompute_targets=false"
        )


def probability_at(options: SelfGenerated, step: int, max_steps: int) -> float:
    if options.schedule == "constant":
        return options.probability
    return options.probability * step / max(max_steps - 1, 1)


@torch.no_grad()
def own_tokens(
    options: SelfGenerated,
    generator: Any,
    tokenizer: Tokenizer,
    tokens: Tensor,
    replaced: Tensor,
    cond: Cond,
    rng: Rng,
    sampling: dict[str, Any],
) -> Tensor:
    """Tokens (B, L) that the generator draws itself, in eval mode, without guidance.

    `one_step` draws each from the prediction that follows the true tokens: one pass. `rollout` goes through the
    groups as sampling does, each own token drawn after the mixed tokens before it: one sampled batch.

    Args: sampling: temperature, top_k, top_p and min_p.
    """
    training = generator.training
    generator.eval()
    try:
        if options.mode == "rollout":
            sampler = NextGroupSampler(**sampling)
            drawn = sampler.generate(tokenizer, generator, cond, rng, known=(tokens, ~replaced))
            return drawn.tokens
        predictive: Categorical = generator.teacher_forced(tokenizer.embed(tokens), cond)
        positions = torch.arange(tokens.shape[1])
        uniform_on = rng.to(tokens.device)
        return predictive.sample(uniform_on, positions, build_processors(**sampling))
    finally:
        generator.train(training)


@torch.no_grad()
def mixed_context(
    options: SelfGenerated,
    generator: Generator,
    tokenizer: Any,
    images: Tensor,
    tokens: Tensor,
    cond: Cond,
    rng: Rng,
    *,
    step: int,
    max_steps: int,
    sampling: dict[str, Any],
) -> tuple[Tensor, Tensor]:
    """Targets and context, (B, L) each: the true tokens and, in the context, own ones here and there."""
    u = rng.uniform(torch.arange(tokens.shape[1]), Draw.OWN_TOKEN)
    replaced = (u < probability_at(options, step, max_steps)).to(tokens.device)
    own = own_tokens(options, generator, tokenizer, tokens, replaced, cond, rng.to(tokens.device), sampling)
    targets = tokens
    if options.recompute_targets and len(tokenizer.layout.grids) > 1:
        targets = tokenizer.reencode(images, own, replaced)
    return targets, torch.where(replaced, own, targets)
