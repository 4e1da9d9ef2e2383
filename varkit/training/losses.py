"""Losses shared by tokenizer objectives: the patch discriminator, adversarial terms, the adaptive weight."""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from varkit.training.sync import SyncedBatchNorm2d, place, summed

AdversarialLoss = Literal["hinge", "vanilla"]


class PatchDiscriminator(nn.Module):
    """PatchGAN (Isola et al., arXiv 1611.07004): one logit a patch. Its batch statistics are those of all processes.

    Args: width: channels of the first layer.   layers: stride-2 convolutions; 3 sees patches of 70 pixels.
    Source of names: FoundationVision/LlamaGen: tokenizer/tokenizer_image/discriminator_patchgan.py.
    """

    def __init__(self, in_channels: int = 3, width: int = 64, layers: int = 3) -> None:
        widths = [width * min(2**i, 8) for i in range(layers + 1)]
        stack: list[nn.Module] = [nn.Conv2d(in_channels, width, 4, 2, 1), nn.LeakyReLU(0.2)]
        for i in range(1, layers + 1):
            stride = 2 if i < layers else 1
            stack.append(nn.Conv2d(widths[i - 1], widths[i], 4, stride, 1, bias=False))
            stack += [SyncedBatchNorm2d(widths[i]), nn.LeakyReLU(0.2)]
        stack.append(nn.Conv2d(widths[-1], 1, 4, 1, 1))
        super().__init__()
        self.main = nn.Sequential(*stack)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.normal_(module.weight, 0, 0.02)
            elif isinstance(module, nn.BatchNorm2d):
                nn.init.normal_(module.weight, 1, 0.02)

    def forward(self, images: Tensor) -> Tensor:
        """(B, C, H, W) in [-1, 1] -> (B, 1, h, w) logits; positive means real."""
        return self.main(images)


def discriminator_loss(kind: AdversarialLoss, real: Tensor, fake: Tensor) -> Tensor:
    """From logits of real and of reconstructed images."""
    real, fake = real.float(), fake.float()
    if kind == "hinge":
        return 0.5 * (F.relu(1 - real).mean() + F.relu(1 + fake).mean())
    return 0.5 * (F.softplus(-real).mean() + F.softplus(fake).mean())


def generator_loss(fake: Tensor) -> Tensor:
    """What the tokenizer adds to look real: minus the mean logit."""
    return -fake.float().mean()


def adaptive_weight(
    reconstruction: Tensor, adversarial: Tensor, weight: Tensor, low: float = 0.0, high: float = 1e4
) -> Tensor:
    """|grad of reconstruction| / |grad of adversarial| at the decoder's last layer, clamped, detached; the gradients
    are those of the batch of all processes.

    Source: VQGAN (arXiv 2012.09841), equation 7.
    """
    (a,) = torch.autograd.grad(reconstruction, weight, retain_graph=True)
    (b,) = torch.autograd.grad(adversarial, weight, retain_graph=True)
    processes = place()[1]
    a, b = (summed(g.clone()) / processes for g in (a, b))
    return (a.norm() / (b.norm() + 1e-6)).clamp(low, high).detach()


def lecam_loss(real: Tensor, fake: Tensor, real_average: Tensor, fake_average: Tensor) -> Tensor:
    """LeCam regularisation (Tseng et al., arXiv 2104.03310) of a discriminator: its logits of real images may not rise
    far above the moving average of those of fakes, nor the other way round.

    Source: bytedance/1d-tokenizer: modeling/modules/losses.py, on batch means.
    """
    above = F.relu(real.float().mean() - fake_average).square()
    return (above + F.relu(real_average - fake.float().mean()).square()).mean()


def proxy_code_loss(logits: Tensor, codes: Tensor, quantizer_loss: Tensor, quantizer_weight: float = 1.0) -> Tensor:
    """TiTok's first stage: cross entropy of a frozen VQGAN's codes, plus the quantiser's own loss.

    Args: logits: (B, codes, h, w).   codes: (B, h * w) ids.
    """
    return F.cross_entropy(logits.float().flatten(2), codes) + quantizer_weight * quantizer_loss
