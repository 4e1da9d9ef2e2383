"""Losses shared by tokenizer objectives: the patch discriminator, adversarial terms, the adaptive weight."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from varkit.interfaces import Losses
from varkit.training.sync import SyncedBatchNorm2d, place, summed

AdversarialLoss = Literal["hinge", "vanilla", "non_saturating"]


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


class Blur(nn.Module):
    """[1, 2, 1] along both sides, border mirrored: what keeps a stride from aliasing."""

    f: Tensor  # 3, as released: before it is squared and divided by its sum

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("f", torch.tensor([1.0, 2.0, 1.0]))

    def forward(self, x: Tensor) -> Tensor:
        kernel = (self.f[:, None] * self.f / self.f.sum() ** 2).to(x)
        return F.conv2d(F.pad(x, (1, 1, 1, 1), "reflect"), kernel.expand(x.shape[1], 1, 3, 3), groups=x.shape[1])


class StyleBlock(nn.Module):
    """Two convolutions and a blurred one of stride 2, plus a skip, over sqrt(2): the sides are halved."""

    def __init__(self, width: int, out: int) -> None:
        super().__init__()
        self.conv_res = nn.Conv2d(width, out, 1, stride=2)
        self.net = nn.Sequential(
            nn.Conv2d(width, out, 3, padding=1), nn.LeakyReLU(0.2), nn.Conv2d(out, out, 3, padding=1), nn.LeakyReLU(0.2)
        )
        self.downsample = nn.Sequential(Blur(), nn.Conv2d(out, out, 3, padding=1, stride=2))

    def forward(self, x: Tensor) -> Tensor:
        return (self.downsample(self.net(x)) + self.conv_res(x)) / math.sqrt(2)


class StyleDiscriminator(nn.Module):
    """StyleGAN's discriminator (Karras et al., arXiv 1912.04958), one logit an image, without batch statistics.

    Args: image_size: a power of two, 8 to 1024.
    Raises: ValueError on another size.
    Source of names: FoundationVision/LlamaGen: tokenizer/tokenizer_image/discriminator_stylegan.py.
    """

    WIDTHS = {4: 512, 8: 512, 16: 512, 32: 512, 64: 256, 128: 128, 256: 64, 512: 32, 1024: 16}  # noqa: RUF012

    def __init__(self, in_channels: int = 3, image_size: int = 256) -> None:
        super().__init__()
        if image_size not in self.WIDTHS or image_size < 8:
            raise ValueError(f"image_size must be a power of two, 8 to 1024; got {image_size}")
        width = self.WIDTHS[image_size]
        blocks: list[nn.Module] = [nn.Conv2d(in_channels, width, 3, padding=1), nn.LeakyReLU(0.2)]
        while image_size > 4:
            image_size //= 2
            blocks.append(StyleBlock(width, self.WIDTHS[image_size]))
            width = self.WIDTHS[image_size]
        self.blocks = nn.ModuleList(blocks)
        self.final_conv = nn.Sequential(nn.Conv2d(width, width, 3, padding=1), nn.LeakyReLU(0.2))
        self.final_linear = nn.Sequential(nn.Linear(width * 16, width), nn.LeakyReLU(0.2), nn.Linear(width, 1))

    def forward(self, images: Tensor) -> Tensor:
        """(B, C, H, W) in [-1, 1] -> (B, 1) logits; positive means real."""
        x = images
        for block in self.blocks:
            x = block(x)
        return self.final_linear(self.final_conv(x).flatten(1))


def discriminator_loss(kind: AdversarialLoss, real: Tensor, fake: Tensor, official_quirks: bool = False) -> Tensor:
    """From logits of real and of reconstructed images.

    Args:
        kind: `hinge`; `vanilla` or `non_saturating`, the binary cross entropy (they differ in `generator_loss`).
        official_quirks: of `non_saturating`, what LlamaGen computes: logits and targets change places, so that the
            fake half is a constant.
    """
    real, fake = real.float(), fake.float()
    if kind == "hinge":
        return 0.5 * (F.relu(1 - real).mean() + F.relu(1 + fake).mean())
    if kind == "non_saturating" and official_quirks:
        swapped = F.binary_cross_entropy_with_logits
        return 0.5 * (swapped(torch.ones_like(real), real) + swapped(torch.zeros_like(fake), fake))
    return 0.5 * (F.softplus(-real).mean() + F.softplus(fake).mean())


def generator_loss(fake: Tensor, kind: AdversarialLoss = "hinge", official_quirks: bool = False) -> Tensor:
    """What the tokenizer adds to look real: minus the mean logit; of `non_saturating` the cross entropy with real.

    Args: official_quirks: as in `discriminator_loss`.
    """
    fake = fake.float()
    if kind != "non_saturating":
        return -fake.mean()
    if official_quirks:
        return F.binary_cross_entropy_with_logits(torch.ones_like(fake), fake)
    return F.softplus(-fake).mean()


def adaptive_weight(
    reconstruction: Tensor,
    adversarial: Tensor,
    weight: Tensor,
    low: float = 0.0,
    high: float = 1e4,
    eps: float = 1e-6,
) -> Tensor:
    """|grad of reconstruction| / (|grad of adversarial| + eps) at the decoder's last layer, clamped, detached; the
    gradients are those of the batch of all processes.

    Source: VQGAN (arXiv 2012.09841), equation 7; LlamaGen has eps 1e-4.
    """
    (a,) = torch.autograd.grad(reconstruction, weight, retain_graph=True)
    (b,) = torch.autograd.grad(adversarial, weight, retain_graph=True)
    processes = place()[1]
    a, b = (summed(g.clone()) / processes for g in (a, b))
    return (a.norm() / (b.norm() + eps)).clamp(low, high).detach()


def tokenizer_loss(
    images: Tensor,
    reconstruction: Tensor,
    quantizer: Tensor,
    last_layer: Tensor,
    *,
    l1_weight: float = 0.0,
    l2_weight: float = 1.0,
    perceptual: Callable[[Tensor, Tensor], Tensor] | None = None,
    perceptual_weight: float = 1.0,
    discriminator: Callable[[Tensor], Tensor] | None = None,
    adversarial_weight: float = 0.5,
    adversarial_loss: AdversarialLoss = "hinge",
    adaptive: bool = False,
    adaptive_low: float = 0.0,
    adaptive_high: float = 1e4,
    adaptive_eps: float = 1e-4,
) -> Losses:
    """What a VQ tokenizer minimises: reconstruction, perceptual, adversarial and quantiser losses. The defaults are
    LlamaGen's.

    Args:
        images, reconstruction: (B, 3, H, W) in [-1, 1].   quantizer: the sum of the quantiser's losses.
        last_layer: the decoder's last weight, where the gradients of `adaptive` are compared.
        perceptual: distance of two images, such as LPIPS.   discriminator: images -> logits; None before it starts.
        adaptive: multiply the adversarial term by `adaptive_weight`.
    Returns: loss; l1, l2, quantizer, lpips, adversarial, adaptive_weight, none of them weighted.
    Source: FoundationVision/LlamaGen: tokenizer/tokenizer_image/vq_loss.py (ce98ec4).
    """
    losses: Losses = {
        "l1": F.l1_loss(reconstruction, images),
        "l2": F.mse_loss(reconstruction, images),
        "quantizer": quantizer,
    }
    likeness = l1_weight * losses["l1"] + l2_weight * losses["l2"]
    if perceptual is not None:
        losses["lpips"] = perceptual(reconstruction, images).mean()
        likeness = likeness + perceptual_weight * losses["lpips"]
    loss = likeness + quantizer
    if discriminator is not None:
        losses["adversarial"] = generator_loss(discriminator(reconstruction), adversarial_loss)
        losses["adaptive_weight"] = torch.ones((), device=images.device)
        if adaptive and torch.is_grad_enabled():
            bounds = (adaptive_low, adaptive_high, adaptive_eps)
            losses["adaptive_weight"] = adaptive_weight(likeness, losses["adversarial"], last_layer, *bounds)
        loss = loss + adversarial_weight * losses["adaptive_weight"] * losses["adversarial"]
    return {"loss": loss, **losses}


def from_step(weight: float, step: int, start: int) -> float:
    """`weight` from step `start` on, 0 before."""
    return weight if step >= start else 0.0


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
