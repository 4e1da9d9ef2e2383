"""Training generators of single ids on a frozen tokenizer: LlamaGen, RAR, MaskGIT, FlexTok's GPT.

What a step means is the generator's own: the next token in raster order, in a random order, or all masked ones.
Source of the annealing of orders: bytedance/1d-tokenizer: configs/training/generator/rar.yaml, which trains with random
orders alone for 200 of 400 epochs, and comes down to none in the next 100 (RAR, arXiv 2411.00776, section 3.2).
"""

from __future__ import annotations

from collections.abc import Sequence
from inspect import signature
from typing import Any, Literal

import torch
from torch import Tensor

from varkit.config import ConfigError, config
from varkit.data.codes import CodeInfo
from varkit.generators.rar import random_ratio
from varkit.interfaces import Cond, Losses
from varkit.rng import Draw, Rng
from varkit.training.captions import Captions, TextEncoderConfig
from varkit.training.objectives.generation import GeneratorConfig, GeneratorTraining, registered
from varkit.training.sizes import Sizes, brought_to

ORDERS = (0.5, 0.75)
"""RAR's shares of the run."""


@config
class Config(GeneratorConfig):
    """A generator and how it learns; `GeneratorConfig` has what all generators share."""

    name: Literal["next-token"] = "next-token"
    model: str = "llamagen_b"  # a registered generator; a new one gets its sizes from the tokenizer
    label_smoothing: float | None = None  # None: as the generator's paper
    random_orders: tuple[float, float] | None = None  # RAR: shares of the run until which all images, and after which
    # none, come in a random order; None: 0.5 and 0.75
    sizes: Sizes | None = None  # of images, drawn for each batch; None: always the tokenizer's
    features: str | None = None  # of a generator of texts: a folder of `varkit features` with all captions
    text_encoder: str | TextEncoderConfig | None = None  # instead: a transformers encoder that makes them anew for each
    # batch; or a section, {width: 128, ...}, the sizes of a new one of bytes that learns along with the generator
    phrases: str | None = None  # what separates phrases in captions, such as ", ": a share of the images is drawn from
    # sets of phrases, whose order does not count; None: from whole captions alone
    phrase_share: float = 0.5  # that share, drawn anew each time an image is seen; 1: all

    def __post_init__(self) -> None:
        if self.label_smoothing is not None and not 0 <= self.label_smoothing < 1:
            raise ConfigError(f"objective.label_smoothing must be in [0, 1); got {self.label_smoothing}")
        if self.random_orders is not None and not 0 <= self.random_orders[0] <= self.random_orders[1] <= 1:
            raise ConfigError(
                f"objective.random_orders are two shares of the run, 0 to 1, the first not above the second; "
                f"got {list(self.random_orders)}"
            )
        if self.features is not None and self.text_encoder is not None:
            raise ConfigError("objective.features and objective.text_encoder both make features of captions: give one")
        if self.sizes is not None and self.any_variant:
            raise ConfigError("objective.sizes does not go with objectives that change the loss; leave one of them out")
        if isinstance(self.text_encoder, TextEncoderConfig) and self.init_from is not None:
            raise ConfigError(
                f"objective.text_encoder={{...}} is a new encoder, which the generator of objective.init_from "
                f"{self.init_from} does not know; leave one of them out"
            )
        if self.phrases is not None and self.text_encoder is None:
            raise ConfigError(
                f"objective.phrases={self.phrases!r}: each phrase is encoded by itself, so give "
                f"objective.text_encoder; a folder of features holds whole captions"
            )
        if self.phrases is not None and not self.phrases.strip():
            raise ConfigError(f"objective.phrases must hold more than spaces, such as ', '; got {self.phrases!r}")
        if not 0 < self.phrase_share <= 1:
            raise ConfigError(f"objective.phrase_share must be above 0, at most 1; got {self.phrase_share}")
        super().__post_init__()


class Training(GeneratorTraining):
    """Owns the generator; see `GeneratorTraining`."""

    config: Config

    def __init__(self, config: Config, classes: list[str]) -> None:
        model = registered(config)
        self.kind, self.from_frames = type(model), model.condition == "frames"
        self._open_captions(config, model.condition)
        if config.random_orders is not None and "random_ratio" not in model.training_options:
            raise ConfigError(f"objective.random_orders is for RAR; {self.kind.__name__} has one order")
        if config.gradient_checkpointing and not self.kind._supports_gradient_checkpointing:
            raise ConfigError(f"objective.gradient_checkpointing: {self.kind.__name__} has none")
        super().__init__(config, classes)
        if config.phrases is not None and not self.model.reads_phrases:
            raise ConfigError(f"objective.phrases: {self.kind.__name__} cannot read sets of phrases; leave it out")
        if config.sizes is not None:
            config.sizes.check(self.model, self.frozen("tokenizer"))

    def check_codes(self, codes: CodeInfo) -> None:
        super().check_codes(codes)
        if self.config.sizes is not None:
            raise ConfigError("objective.sizes resizes images, token files hold none; give the images in data.train")

    def check_texts(self, name: str, texts: Sequence[str] | None) -> None:
        super().check_texts(name, texts)
        if self.captions is not None and self.config.phrases is not None:
            self.notes.append(self.captions.check_phrases(name, texts or (), self.config.phrases))

    def cond(self, batch: dict[str, Any], rng: Rng | None = None) -> Cond:
        """Some captions as sets of phrases, in training and validation alike; with no rng none."""
        cond = super().cond(batch, rng)
        if self.captions is None or self.config.phrases is None or rng is None:
            return cond
        u = rng.uniform(torch.zeros(1, dtype=torch.int64), Draw.PHRASES)[:, 0]
        return self.captions.as_sets(cond, batch["texts"], u < self.config.phrase_share, self.config.phrases)

    def _losses(self, batch: dict[str, Tensor], rng: Rng, **options: Any) -> Losses:
        """At a size of this batch in training, at the tokenizer's own in validation."""
        if self.config.sizes is None or not self.training:
            return super()._losses(batch, rng, **options)
        own, size = self.frozen("tokenizer"), self.config.sizes.draw(rng)
        patch = own.image_size[0] // own.layout.grids[-1][0]
        grid = (size[0] // patch, size[1] // patch)
        batch = {**batch, "images": brought_to(batch["images"], size)}
        with torch.no_grad():
            tokenizer = own.resized(grid)
            tokens = tokenizer.encode(batch["images"])
            inputs = tokenizer.embed(tokens)
        return self.model.resized(grid).training_loss(tokens, inputs, self.cond(batch, rng), rng, **options)

    def _open_captions(self, config: Config, condition: str) -> None:
        """Raises ConfigError when a generator of texts has no source of features, or one of classes has one."""
        given = [name for name in ("features", "text_encoder") if getattr(config, name) is not None]
        if condition == "class" and given:
            raise ConfigError(
                f"objective.{given[0]} is for generators of texts, such as llamagen_t2i_small_64; objective.model "
                f"{config.model} is conditioned on classes"
            )
        if condition == "text" and not given:
            raise ConfigError(
                f"objective.model {config.model} is conditioned on text: give objective.features, a folder that "
                f"`varkit features` wrote, or objective.text_encoder, the name of an encoder or the sizes of a new one"
            )
        if "num_classes" in config.model_overrides and (given or config.model_overrides["num_classes"] is None):
            raise ConfigError(
                f"objective.model_overrides.num_classes={config.model_overrides['num_classes']} does not go with "
                f"objective.model {config.model}, which is conditioned on {condition}"
            )
        if given:
            self.captions = Captions(config.features, config.text_encoder)

    def sizes(self, tokenizer: Any) -> dict[str, Any]:
        """Those of the tokenizer's sizes that the generator's constructor takes."""
        layout = tokenizer.layout
        if not isinstance(layout.codebook_size, int):
            raise ConfigError(
                f"objective.tokenizer: {self.config.tokenizer} has {layout.describe()}; next-token trains generators "
                f"of single ids, sub-codes those of factorised ids, next-entity those of latents"
            )
        taken = signature(self.kind.__init__).parameters
        if "scales" in taken or len(layout.grids) > 1:
            raise ConfigError(
                f"objective.model {self.config.model} and tokenizer {self.config.tokenizer} ({layout.describe()}): "
                f"next-token is for one grid of tokens; objective next-scale trains VAR on a pyramid"
            )
        known = {
            "grid": list(layout.grids[0]),
            "num_tokens": layout.length,
            "codebook_size": layout.codebook_size,
            "latent_dim": layout.dim,
        }
        if "levels" in taken:
            if "levels" not in tokenizer.config:
                raise ConfigError(
                    f"objective.model {self.config.model} is for tokenizers of quantised levels, such as FlexTok; "
                    f"{type(tokenizer).__name__} has none"
                )
            known["levels"] = list(tokenizer.config.levels)
        return {name: value for name, value in known.items() if name in taken}

    def options(self, step: int, max_steps: int) -> dict[str, Any]:
        options: dict[str, Any] = {}
        if self.config.label_smoothing is not None:
            options["label_smoothing"] = self.config.label_smoothing
        if "random_ratio" in self.model.training_options:
            start, end = self.config.random_orders or ORDERS
            options["random_ratio"] = random_ratio(step, round(start * max_steps), round(end * max_steps))
        return options
