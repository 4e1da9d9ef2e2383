"""Training LlamaGen's VQ tokenizer (arXiv 2406.06525, section 3.1).

Weights and schedule are those of FoundationVision/LlamaGen: tokenizer/tokenizer_image/vq_train.py and vq_loss.py
(ce98ec4). What differs: the adversarial loss starts after a share of the run, not at step 20,000; dead codes can be
restarted.
"""

from __future__ import annotations

from typing import Literal

from varkit.config import config
from varkit.tokenizers.vqgan import VQGAN
from varkit.training.objectives.vq_tokenizer import VQConfig, VQTraining
from varkit.training.optim import OptimConfig


@config
class Config(VQConfig):
    """A VQ tokenizer of one grid and its losses. The weight of the entropy loss is an argument of the model
    (model_overrides.entropy_weight)."""

    name: Literal["vq"] = "vq"
    model: str = "vq_ds16"  # a registered tokenizer
    l1_weight: float = 0.0
    adversarial_weight: float = 0.5
    adversarial_start: float = 0.05
    adaptive: bool = False
    adaptive_low: float = 0.0
    discriminator_optim: OptimConfig = OptimConfig(lr=1e-4, betas=(0.9, 0.95), weight_decay=0.05, clip=1.0)
    restart_every: int = 0


class Training(VQTraining):
    """See `VQTraining`."""

    kind = VQGAN
    adaptive_eps = 1e-4
