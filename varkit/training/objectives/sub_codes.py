"""Training generators of factorised ids, next-token or masked, on a frozen binary autoencoder: ELM.

As in the release (arXiv 2410.16257, section 3), the bits of an image are drawn anew whenever it is seen, a kind of
augmentation; in validation, and in token files, they are cut at the autoencoder's threshold.
"""

from __future__ import annotations

from math import log2
from typing import Any, Literal

import torch
from torch import Tensor

from varkit.config import ConfigError, config
from varkit.data.codes import CodeInfo
from varkit.interfaces import Losses
from varkit.rng import Rng
from varkit.tokenizers.binary_autoencoder import BinaryAutoencoder
from varkit.training.objectives.generation import GeneratorConfig, GeneratorTraining, registered


@config
class Config(GeneratorConfig):
    """A generator and how it learns; `GeneratorConfig` has what all generators share."""

    name: Literal["sub-codes"] = "sub-codes"
    model: str = "elm_ar_l_2_12"  # a registered generator; a new one gets its sizes from the tokenizer
    label_smoothing: float | None = None  # None: as the generator's paper
    drawn: bool = True  # bits are drawn in training; false: cut at the tokenizer's threshold

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.label_smoothing is not None and not 0 <= self.label_smoothing < 1:
            raise ConfigError(f"objective.label_smoothing must be in [0, 1); got {self.label_smoothing}")


class Training(GeneratorTraining):
    """Owns the generator; see `GeneratorTraining`."""

    config: Config

    def __init__(self, config: Config, classes: list[str]) -> None:
        model = registered(config)
        self.kind = type(model)
        if not isinstance(model.layout.codebook_size, tuple):
            raise ConfigError(
                f"objective.model: {config.model} ({model.layout.describe()}) predicts single ids; sub-codes trains "
                f"generators of factorised ids, such as elm_ar_l_2_12; objective next-token trains the others"
            )
        super().__init__(config, classes)
        for name in self.unread:
            self.model.get_parameter(name).requires_grad_(False)

    def _build(self, tokenizer: Any) -> Any:
        if not isinstance(tokenizer, BinaryAutoencoder):
            raise ConfigError(
                f"objective.tokenizer: {self.config.tokenizer} is a {type(tokenizer).__name__} "
                f"({tokenizer.layout.describe()}); sub-codes trains on a binary autoencoder, such as bae_2_12.in1k_256"
            )
        model = super()._build(tokenizer)
        self.unread = [name for name, p in model.named_parameters() if not p.requires_grad]
        return model

    def sizes(self, tokenizer: Any) -> dict[str, Any]:
        factors = tokenizer.layout.codebook_size
        return {
            "grid": list(tokenizer.layout.grids[0]),
            "sub_codes": len(factors),
            "code_bits": int(log2(factors[0])),
            "latent_dim": tokenizer.layout.dim,
        }

    def options(self, step: int, max_steps: int) -> dict[str, Any]:
        smoothing = self.config.label_smoothing
        return {} if smoothing is None else {"label_smoothing": smoothing}

    def check_codes(self, codes: CodeInfo) -> None:
        super().check_codes(codes)
        if self.config.drawn:
            raise ConfigError(
                "objective.drawn draws the bits of images; token files hold bits that are cut. Set "
                "objective.drawn=false, or give the images in data.train"
            )

    def forward(self, batch: dict[str, Tensor], phase: str, step: int, max_steps: int, rng: Rng) -> Losses:
        if self.config.drawn:
            with torch.no_grad():
                tokens = self.frozen("tokenizer").encode(batch["images"], rng, stochastic=True)
            batch = {**batch, "tokens": tokens}
        return super().forward(batch, phase, step, max_steps, rng)
