"""Training the multi-scale VQ tokenizer: the piece of VAR that was never released.

The paper's loss (arXiv 2404.02905, section 3.2) is reconstruction + quantisation + perceptual + adversarial.
Weights and schedule follow the closest thing its authors published, the single-scale trainer
FoundationVision/vaex; what that lacks, a remedy for codebook collapse, is in `vq_tokenizer`.
"""

from __future__ import annotations

from typing import Literal

from varkit.config import config
from varkit.tokenizers.multiscale_vq import MultiScaleVQ
from varkit.training.objectives.vq_tokenizer import VQConfig, VQTraining


@config
class Config(VQConfig):
    """A multi-scale VQ tokenizer and its losses; the defaults of `VQConfig` are its own."""

    name: Literal["multiscale-vq"] = "multiscale-vq"
    model: str = "multiscale_vq_f16"  # a registered tokenizer


class Training(VQTraining):
    """See `VQTraining`."""

    kind = MultiScaleVQ
    released_arguments = frozenset({"scales"})  # a released file serves other scales than its own too
