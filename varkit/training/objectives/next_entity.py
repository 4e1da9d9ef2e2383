"""Training generators of entities on a frozen autoencoder: whatever a step predicts, a token, a set, a cell or a scale.

They are generators of latents, and `EntityAR`, which may predict ids too.

As in the releases of MAR, FlowAR and xAR, latents are drawn from the autoencoder's posterior whenever an image is seen,
and the autoencoder computes in float32 whatever the precision of the run.
"""

from __future__ import annotations

from inspect import signature
from typing import Any, Literal

import torch
from torch import Tensor

from varkit import registry
from varkit.config import ConfigError, config
from varkit.data.codes import CodeInfo
from varkit.interfaces import Losses
from varkit.rng import Rng
from varkit.training.objectives.generation import GeneratorConfig, GeneratorTraining, registered


@config
class Config(GeneratorConfig):
    """A generator and how it learns; `GeneratorConfig` has what all generators share."""

    name: Literal["next-entity"] = "next-entity"
    model: str  # a registered generator of latents or of entities; a new one gets its sizes from the tokenizer
    image_size: int | None = None  # side of the images, where the tokenizer can code several; None: its own

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.any_variant:
            names = ("input_masking", "alignment", "self_generated", "mixed_prediction")
            given = next(n for n in names if getattr(self, n) is not None)
            raise ConfigError(f"objective.{given} is for next-token and next-scale; next-entity has no such variant")


class Training(GeneratorTraining):
    """Owns the generator; see `GeneratorTraining`."""

    config: Config

    def __init__(self, config: Config, classes: list[str]) -> None:
        model = registered(config)
        self.kind = type(model)
        if model.layout.codebook_size is not None and "predictive" not in model.config:
            raise ConfigError(
                f"objective.model: {config.model} ({model.layout.describe()}) predicts ids; next-entity trains "
                f"generators of latents, next-token, next-scale and sub-codes train the others"
            )
        if model.condition != "class":
            raise ConfigError(
                f"objective.model: {config.model} is conditioned on {model.condition}; next-entity trains generators "
                f"that are conditioned on classes"
            )
        if config.gradient_checkpointing and not self.kind._supports_gradient_checkpointing:
            raise ConfigError(f"objective.gradient_checkpointing: {self.kind.__name__} has none")
        super().__init__(config, classes)

    def open_tokenizer(self) -> Any:
        """The tokenizer of the configuration, or what the generator puts around it, such as scales around a VAE."""
        tokenizer = self._opened(image_size=self.config.image_size)
        grid = {"grid": list(tokenizer.layout.grids[-1])} if "grid" in signature(self.kind.__init__).parameters else {}
        with torch.device("meta"):
            model: Any = registry.model_entry(self.config.model).build(**grid | self.config.model_overrides)
        return model.tokenizer_for(tokenizer)

    def sizes(self, tokenizer: Any) -> dict[str, Any]:
        """Those of the tokenizer's sizes that the generator's constructor takes."""
        layout, taken = tokenizer.layout, signature(self.kind.__init__).parameters
        if layout.codebook_size is not None and not (isinstance(layout.codebook_size, int) and "predictive" in taken):
            raise ConfigError(
                f"objective.tokenizer: {self.config.tokenizer} has {layout.describe()}; {self.config.model} is trained "
                f"on latents, such as those of kl16.in1k or of an AutoencoderKL of diffusers"
            )
        known = {
            "grid": list(layout.grids[-1]),
            "scales": [list(grid) for grid in layout.grids],
            "num_tokens": layout.length,
            "latent_dim": layout.dim,
        }
        if layout.codebook_size is not None:
            known["codebook_size"] = layout.codebook_size
        return {name: value for name, value in known.items() if name in taken}

    def check_codes(self, codes: CodeInfo) -> None:
        super().check_codes(codes)
        if not codes.moments and codes.token_layout.codebook_size is None:
            self.notes.append(
                f"{codes.source}: each latent was drawn once, when it was coded; `varkit tokenize --moments` makes "
                f"token files from which it is drawn anew each time"
            )

    def tokens(self, batch: dict[str, Tensor], rng: Rng) -> Tensor:
        """Latents (B, L, C) float32, drawn from the posterior; or those of token files; or ids, where they are read."""
        if "tokens" in batch or self.model.layout.codebook_size is not None:
            return super().tokens(batch, rng)
        images = batch["images"].float()
        with torch.autocast(images.device.type, enabled=False):
            return self.frozen("tokenizer").encode(images, rng).float()

    def _losses(self, batch: dict[str, Tensor], rng: Rng, **options: Any) -> Losses:
        return {name: value.float() for name, value in super()._losses(batch, rng, **options).items()}
