"""The loss of a discrete generator under any of the four options, alone or together.

In one step: own tokens enter the context, inputs are masked, the generator's own loss is taken with the alignment
beside it, and the other predictions of the mixture are added. What it learns besides the generator (mask vectors, a
projector) is optimised, averaged and kept in checkpoints, never exported.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from varkit.config import ConfigError, config
from varkit.interfaces import Cond, Generator, Losses, Tokenizer
from varkit.rng import Draw, Rng
from varkit.training.objectives.variants import meap, self_generated, tokenunify
from varkit.training.objectives.variants.arra import Alignment, Projector, alignment_loss, image_positions
from varkit.training.objectives.variants.masks import MaskInput, groups_of
from varkit.training.objectives.variants.meap import InputMasking
from varkit.training.objectives.variants.self_generated import SelfGenerated
from varkit.training.objectives.variants.tokenunify import MixedPrediction


@config
class VariantConfig:
    """Sections that the configuration of a discrete generator's objective has; None switches an option off."""

    input_masking: InputMasking | None = None
    alignment: Alignment | None = None
    self_generated: SelfGenerated | None = None
    mixed_prediction: MixedPrediction | None = None

    def __post_init__(self) -> None:
        mixed = self.mixed_prediction
        others = [n for n in ("input_masking", "alignment", "self_generated") if getattr(self, n) is not None]
        if mixed is not None and not mixed.next and others:
            raise ConfigError(
                f"objective.mixed_prediction.next=0 leaves nothing for objective.{others[0]}, which changes the next-"
                f"token loss; give next a weight or leave {others[0]} out"
            )

    @property
    def any_variant(self) -> bool:
        return any((self.input_masking, self.alignment, self.self_generated, self.mixed_prediction))


class Variants(nn.Module):
    """The losses under `options`. The generator is passed to each call, not held.

    Args:
        sampling: temperature, top_k, top_p and min_p of the model's own tokens.
        feature_dim: width of the encoder's feature, for alignment.
    Raises: ConfigError when generator or tokenizer lack what an option needs.
    """

    def __init__(
        self,
        options: VariantConfig,
        generator: Generator,
        tokenizer: Tokenizer,
        *,
        sampling: dict[str, Any] | None = None,
        feature_dim: int | None = None,
    ) -> None:
        super().__init__()
        self.options = options
        names = ("temperature", "top_k", "top_p", "min_p")
        self.sampling = {k: v for k, v in (sampling or {}).items() if k in names}
        single = isinstance(tokenizer.layout.codebook_size, int)
        if not single and (options.input_masking or options.self_generated or options.mixed_prediction):
            raise ConfigError(
                "these options, but alignment, are for generators of single ids; this tokenizer gives other tokens"
            )
        self.groups = groups_of(generator)  # L
        self.free = self.groups > 0  # the first group reads no tokens
        if options.input_masking is not None:
            self.masked_input = MaskInput(generator, tokenizer, "input_masking")
        if options.alignment is not None:
            self._require(generator, "hidden_layer", "alignment")
            depth, width = len(generator.blocks), generator.config.hidden_size  # type: ignore[attr-defined]
            if options.alignment.layer > depth:
                raise ConfigError(
                    f"objective.alignment.layer must be in 1 .. {depth}, the blocks of the generator; "
                    f"got {options.alignment.layer}"
                )
            if feature_dim is None:
                raise ValueError("alignment needs feature_dim, the width of the encoder's feature")
            self.projector = Projector(width, feature_dim, options.alignment.projector_depth)
        if options.self_generated is not None:
            self_generated.check(options.self_generated, generator, tokenizer)
        if options.mixed_prediction is not None:
            self._check_mixture(options.mixed_prediction, generator, tokenizer)

    @staticmethod
    def _require(generator: Generator, option: str, section: str) -> None:
        if option not in generator.training_options:
            raise ConfigError(
                f"objective.{section} needs a generator whose training_loss takes {option!r}; "
                f"{type(generator).__name__} takes {sorted(generator.training_options) or 'no options'}"
            )

    def _check_mixture(self, mixed: MixedPrediction, generator: Generator, tokenizer: Tokenizer) -> None:
        if mixed.next_all or mixed.random:
            self._require(generator, "weight", "mixed_prediction")
        if mixed.random and len(tokenizer.layout.grids) == 1:
            raise ConfigError(
                "objective.mixed_prediction.random needs a token pyramid: a generator of one grid in a fixed order "
                "cannot read past a hidden token; set random=0"
            )
        if not mixed.next_all:
            return
        if int(self.groups.max()) < 1:
            raise ConfigError("objective.mixed_prediction.next_all needs a generator with at least two steps")
        if mixed.fill == "mask":
            self.rest_input = MaskInput(generator, tokenizer, "mixed_prediction")
        elif not tokenizer.embed(torch.zeros(1, len(self.groups), dtype=torch.int64)).is_floating_point():
            raise ConfigError(f"objective.mixed_prediction.fill={mixed.fill} is for generators that read vectors")

    def forward(
        self,
        generator: Generator,
        tokenizer: Any,
        images: Tensor | None,
        cond: Cond,
        rng: Rng,
        *,
        tokens: Tensor | None = None,
        step: int,
        max_steps: int,
        feature: Tensor | None = None,
        **more: Any,
    ) -> Losses:
        """Losses of a batch.

        Args:
            images: (B, 3, H, W) in [-1, 1], or None where `tokens` (B, L), their codes, are given: then without
                self_generated, which reads the images.
            feature: (B, D), the encoder's, for alignment.
            more: options of `generator.training_loss`.
        Returns: `loss` and what the generator logs; `alignment`, `next`, `next_all`, `random` where they are trained.
        """
        o = self.options
        if tokens is None:
            with torch.no_grad():
                tokens = tokenizer.encode(images)
        mixture = {"next": 1.0} if o.mixed_prediction is None else tokenunify.active(o.mixed_prediction, step)
        losses: Losses = {}
        if "next" in mixture:
            targets = context = tokens
            if o.self_generated is not None:
                assert images is not None
                targets, context = self_generated.mixed_context(
                    o.self_generated,
                    generator,
                    tokenizer,
                    images,
                    tokens,
                    cond,
                    rng,
                    step=step,
                    max_steps=max_steps,
                    sampling=self.sampling,
                )
            with torch.no_grad():
                inputs = tokenizer.embed(context)
            losses = self._next(generator, targets, inputs, cond, rng, step, feature, more)
        if o.mixed_prediction is None:
            return losses
        parts = {"next": losses["loss"]} if losses else {}
        if "next_all" in mixture:
            parts["next_all"] = self._next_all(generator, tokenizer, tokens, cond, rng, more)
        if "random" in mixture:
            parts["random"] = self._random(generator, tokenizer, tokens, cond, rng, more)
        total = torch.stack([mixture[name] * part for name, part in parts.items()]).sum()
        return {**losses, **parts, "loss": total}

    def _next(
        self,
        generator: Generator,
        targets: Tensor,
        inputs: Tensor,
        cond: Cond,
        rng: Rng,
        step: int,
        feature: Tensor | None,
        more: dict[str, Any],
    ) -> Losses:
        """The generator's own loss on changed inputs, and the alignment."""
        o = self.options
        if o.input_masking is not None:
            masked = meap.masked_inputs(o.input_masking, self.free, rng, step)
            inputs = self.masked_input(inputs, masked)
        if o.alignment is None:
            return generator.training_loss(targets, inputs, cond, rng, **more)
        assert feature is not None
        more = {**more, "hidden_layer": o.alignment.layer}
        if o.alignment.z_weight:
            self._require(generator, "z_weight", "alignment.z_weight")
            more["z_weight"] = o.alignment.z_weight
        losses = generator.training_loss(targets, inputs, cond, rng, **more)
        hidden = image_positions(losses.pop("hidden"), generator.layout, o.alignment.positions)
        losses["alignment"] = alignment_loss(self.projector(hidden), feature)
        return {**losses, "loss": losses["loss"] + o.alignment.weight * losses["alignment"]}

    def _next_all(
        self, generator: Generator, tokenizer: Any, tokens: Tensor, cond: Cond, rng: Rng, more: dict[str, Any]
    ) -> Tensor:
        mixed = self.options.mixed_prediction
        assert mixed is not None
        with torch.no_grad():
            inputs = tokenizer.embed(tokens)
        keep = tokenunify.prefix_lengths(rng, int(self.groups.max()) + 1).cpu()[:, None]  # B 1
        unknown = self.groups > keep  # B L: group `keep` reads the prefix; those after it would read more
        if mixed.fill == "mask":
            inputs = self.rest_input(inputs, unknown)
        elif mixed.fill == "zero":
            inputs = inputs.masked_fill(unknown.to(inputs.device)[..., None], 0)
        else:
            noise = rng.normal(torch.arange(len(self.groups)), Draw.FILL_NOISE, count=inputs.shape[-1])
            inputs = torch.where(unknown.to(inputs.device)[..., None], noise.to(inputs), inputs)
        predicted = self.groups >= keep if mixed.next_all_positions == "rest" else torch.ones_like(unknown)
        weight = tokenunify.mean_weight(predicted).to(inputs.device)
        return generator.training_loss(tokens, inputs, cond, rng, weight=weight, **more)["loss"]

    def _random(
        self, generator: Generator, tokenizer: Any, tokens: Tensor, cond: Cond, rng: Rng, more: dict[str, Any]
    ) -> Tensor:
        mixed = self.options.mixed_prediction
        assert mixed is not None
        hidden = tokenunify.hidden_tokens(mixed, rng, len(self.groups)).to(tokens.device)
        with torch.no_grad():
            inputs = tokenizer.embed(tokenizer.vectors(tokens).masked_fill(hidden[..., None], 0))
        weight = tokenunify.mean_weight(hidden)
        return generator.training_loss(tokens, inputs, cond, rng, weight=weight, **more)["loss"]


class Together(nn.Module):
    """A network and what learns with it, such as its options, as the one module that is optimised and averaged."""

    def __init__(self, model: nn.Module, **others: nn.Module) -> None:
        super().__init__()
        self.model = model
        for name, module in others.items():
            self.add_module(name, module)
        self.no_decay = getattr(model, "no_decay", ())

    def compile(self, *args: Any, **kwargs: Any) -> None:
        """The network only: it is what costs."""
        self.model.compile(*args, **kwargs)
