"""Autoencoders with a Gaussian posterior: images <-> continuous latents (Rombach et al., arXiv 2112.10752).

The network is `AutoencoderKL` of diffusers, so every VAE in its format opens here. What is added: the tokenizer
interface, keyed random numbers, grey images, and one place for the scale of the latents.

Shapes: B batch, C latent channels, h w latent sides, L = h w tokens in raster order.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any, Self, cast

import torch
from diffusers import AutoencoderKL
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from diffusers.models.modeling_utils import ModelMixin
from torch import Tensor

from varkit.hub import HubMixin
from varkit.interfaces import Tokenizer
from varkit.layout import TokenLayout
from varkit.registry import Checkpoint, ModelEntry, register_checkpoint, register_model
from varkit.rng import Draw, Rng

HUB_OPTIONS = ("cache_dir", "force_download", "local_files_only", "revision", "subfolder", "token")
"""Keyword arguments of `from_pretrained` that say where a folder is."""


class KLVAE(HubMixin, ModelMixin, ConfigMixin, Tokenizer):
    """Images <-> latents (B, L, C), one a patch. The defaults are the f8, 16-channel VAE of FlexTok.

    Args:
        image_size: side of the images that `layout` codes; `latents` and `to_images` take any that divides.
        image_channels: 3, or 1 for grey images (then `encode` averages the channels and `decode` repeats).
        latent_channels: C.
        block_out_channels, layers_per_block, norm_num_groups: as in diffusers; the downsampling factor is
            2 ** (len(block_out_channels) - 1).
        mid_attention: self-attention between the middle blocks.
        down_block_types, up_block_types: of diffusers; None is plain convolutions at every level.
        quant_convs: 1x1 convolutions around the latents.
        scaling_factor, shift_factor: latents are (z - shift) * scaling.
        latents_mean, latents_std: C numbers each, or None: latents are (z - mean) / std * scaling, as in diffusers.
            `normalise` sets them to what was measured.
    Raises: ValueError on an impossible combination.
    """

    @register_to_config
    def __init__(
        self,
        image_size: int = 256,
        image_channels: int = 3,
        latent_channels: int = 16,
        block_out_channels: Sequence[int] = (128, 256, 512, 512),
        layers_per_block: int = 2,
        norm_num_groups: int = 32,
        mid_attention: bool = True,
        down_block_types: Sequence[str] | None = None,
        up_block_types: Sequence[str] | None = None,
        quant_convs: bool = True,
        scaling_factor: float = 0.18215,
        shift_factor: float | None = None,
        latents_mean: Sequence[float] | None = None,
        latents_std: Sequence[float] | None = None,
    ) -> None:
        super().__init__()
        if image_channels not in (1, 3):
            raise ValueError(f"image_channels must be 1 (grey) or 3; got {image_channels}")
        check_statistics(latents_mean, latents_std, latent_channels, shift_factor)
        levels = len(block_out_channels)
        self.downsampling = 2 ** (levels - 1)
        self.layout = self._layout(image_size, latent_channels)
        self.vae: Any = AutoencoderKL(
            in_channels=image_channels,
            out_channels=image_channels,
            latent_channels=latent_channels,
            block_out_channels=tuple(block_out_channels),
            layers_per_block=layers_per_block,
            norm_num_groups=norm_num_groups,
            mid_block_add_attention=mid_attention,
            down_block_types=tuple(down_block_types or ("DownEncoderBlock2D",) * levels),
            up_block_types=tuple(up_block_types or ("UpDecoderBlock2D",) * levels),
            use_quant_conv=quant_convs,
            use_post_quant_conv=quant_convs,
            sample_size=image_size,
        )

    @classmethod
    def from_pretrained(cls, name_or_path: Any, **kwargs: Any) -> Self:  # type: ignore[override]
        """A saved `KLVAE`, or any `AutoencoderKL` of diffusers: a folder or a hub repository.

        Args: kwargs: those of diffusers, such as `subfolder="vae"` of a pipeline; for an `AutoencoderKL` also
            `image_size`, where its own is not wanted.
        Raises: ValueError when there is no such VAE, or its weights are not all there.
        """
        where = {k: kwargs[k] for k in HUB_OPTIONS if k in kwargs}
        name = "/".join(str(part) for part in (name_or_path, kwargs.get("subfolder")) if part)
        try:
            config = cls.load_config(name_or_path, **where)
        except OSError as error:
            raise ValueError(
                f"{name} holds no config.json that can be read: give the folder of a VAE (a pipeline of diffusers "
                f"keeps it in the folder vae: subfolder='vae'). {str(error).strip().splitlines()[0]}"
            ) from None
        kind = config.get("_class_name")
        if kind == cls.__name__:
            return cast(Self, super().from_pretrained(name_or_path, **kwargs))
        if kind != "AutoencoderKL":
            raise ValueError(
                f"{name} holds a {kind}; KLVAE opens its own folders and those of diffusers' AutoencoderKL"
            )
        size = kwargs.pop("image_size", None)
        vae, found = cast(Any, AutoencoderKL.from_pretrained(name_or_path, output_loading_info=True, **kwargs))
        wrong = {k: sorted(map(str, v)) for k, v in found.items() if v}  # diffusers goes on with random weights
        if wrong:
            lists = "; ".join(f"{k.replace('_', ' ')}: {', '.join(v[:4])} ({len(v)})" for k, v in wrong.items())
            raise ValueError(f"the weights of {name} are not those of its config.json: {lists}")
        with torch.device("meta"):
            model = cls(**arguments_of(dict(vae.config), size))
        model.vae = vae
        return model.eval()

    def _layout(self, image_size: int, channels: int) -> TokenLayout:
        if image_size < 1 or image_size % self.downsampling:
            raise ValueError(f"image_size {image_size} must be a multiple of the downsampling, {self.downsampling}")
        side = image_size // self.downsampling
        return TokenLayout(((side, side),), None, channels)

    def set_image_size(self, image_size: int) -> Self:
        """Code images of another size; no weight depends on it. Raises ValueError when it cannot be divided."""
        self.layout = self._layout(image_size, self.layout.dim)
        self.register_to_config(image_size=image_size)
        return self

    @property
    def image_size(self) -> tuple[int, int]:
        height, width = self.layout.grids[0]
        return height * self.downsampling, width * self.downsampling

    # ---- maps -----------------------------------------------------------------------------------------------

    def posterior(self, images: Tensor) -> DiagonalGaussianDistribution:
        """(B, 3, H, W) in [-1, 1] -> mean, std, logvar and kl() of the latents before scaling, (B, C, h, w) each."""
        if images.dim() != 4 or images.shape[1] != 3 or images.shape[2] % self.downsampling:
            raise ValueError(
                f"images must be (B, 3, H, W) in [-1, 1], H and W multiples of {self.downsampling}; "
                f"got shape {tuple(images.shape)}"
            )
        if self.config.image_channels == 1:
            images = images.mean(1, keepdim=True)
        return self.vae.encode(images.to(self.dtype)).latent_dist

    def latents(self, images: Tensor, rng: Rng | None = None) -> Tensor:
        """(B, 3, H, W) in [-1, 1] -> scaled latents (B, C, h, w): the posterior's mean, or with `rng` a sample."""
        return self.scaled(self.draw(self.posterior(images), rng))

    def draw(self, posterior: DiagonalGaussianDistribution, rng: Rng | None) -> Tensor:
        """The mean, or with `rng` a sample, (B, C, h, w), before scaling. Positions count in raster order."""
        if rng is None:
            return posterior.mean
        channels, height, width = posterior.mean.shape[1:]
        noise = rng.normal(torch.arange(height * width), Draw.LATENT, count=channels)  # B L C
        return posterior.mean + posterior.std * unflatten(noise, (height, width)).to(posterior.mean)

    def scale(self, like: Tensor) -> tuple[Any, Any]:
        """What the network's latents are lowered by and then multiplied by: numbers, or (C, 1, 1) each."""
        c = self.config
        if c.latents_mean is None:
            return c.shift_factor or 0.0, c.scaling_factor
        mean, std = (like.new_tensor(list(v)).view(-1, 1, 1) for v in (c.latents_mean, c.latents_std))
        return mean, c.scaling_factor / std

    def scaled(self, z: Tensor) -> Tensor:
        """The network's latents as generators see them."""
        shift, factor = self.scale(z)
        return (z - shift) * factor

    def normalise(self, mean: Sequence[float], std: Sequence[float]) -> Self:
        """Make each channel of the latents zero in the mean and one in spread, given what they are now.

        Args: mean, std: C numbers each, of scaled latents, as `varkit.pipelines.measure_latents` finds them.
        """
        c, dim = self.config, self.layout.dim
        check_statistics(mean, std, dim, None)
        shifts = c.latents_mean or [c.shift_factor or 0.0] * dim
        factors = [c.scaling_factor / s for s in c.latents_std or [1.0] * dim]
        self.register_to_config(
            latents_mean=[a + m / f for a, m, f in zip(shifts, mean, factors, strict=True)],
            latents_std=[s / f for s, f in zip(std, factors, strict=True)],
            scaling_factor=1.0,
            shift_factor=None,
        )
        return self

    def to_images(self, latents: Tensor) -> Tensor:
        """Scaled latents (B, C, h, w) -> images (B, 3, H, W), not clamped."""
        latents = latents.to(self.dtype)
        shift, factor = self.scale(latents)
        z = latents / factor + shift
        images = self.vae.decode(z).sample
        return images.expand(-1, 3, -1, -1) if self.config.image_channels == 1 else images

    # ---- tokens ---------------------------------------------------------------------------------------------

    def encode(self, images: Tensor, rng: Rng | None = None) -> Tensor:
        """(B, 3, H, W) in [-1, 1] -> scaled latents (B, L, C): the posterior's mean, or with `rng` a sample."""
        self._check_size(images)
        return flatten(self.latents(images, rng))

    def moments(self, images: Tensor) -> tuple[Tensor, Tensor]:
        self._check_size(images)
        posterior = self.posterior(images)
        return flatten(self.scaled(posterior.mean)), flatten(posterior.std * self.scale(posterior.std)[1])

    def _check_size(self, images: Tensor) -> None:
        if tuple(images.shape[-2:]) != self.image_size:
            raise ValueError(
                f"images are {images.shape[-2]}x{images.shape[-1]}, this tokenizer's are "
                f"{self.image_size[0]}x{self.image_size[1]}; resize them, or use `latents` for maps of any size"
            )

    def decode(self, tokens: Tensor, rng: Rng | None = None) -> Tensor:
        """Scaled latents (B, L, C) -> images (B, 3, H, W) in [-1, 1]."""
        (tokens,) = self.layout.split(tokens)
        return self.to_images(unflatten(tokens, self.layout.grids[0])).clamp(-1, 1)

    def forward(self, images: Tensor, rng: Rng) -> tuple[Tensor, DiagonalGaussianDistribution]:
        """Training: images -> (reconstruction from a sample, not clamped; the posterior)."""
        posterior = self.posterior(images)
        return self.to_images(self.scaled(self.draw(posterior, rng))), posterior


def flatten(maps: Tensor) -> Tensor:
    """(B, C, h, w) -> (B, h w, C)."""
    return maps.flatten(2).transpose(1, 2)


def unflatten(tokens: Tensor, grid: Sequence[int]) -> Tensor:
    """(B, h w, C) -> (B, C, h, w)."""
    return tokens.transpose(1, 2).unflatten(2, tuple(grid))


def check_statistics(
    mean: Sequence[float] | None, std: Sequence[float] | None, channels: int, shift: float | None
) -> None:
    """Raises ValueError unless there is neither of both, or C of each, without another shift."""
    if mean is None and std is None:
        return
    if mean is None or std is None or not len(mean) == len(std) == channels:
        lengths = [None if v is None else len(v) for v in (mean, std)]
        raise ValueError(f"latents_mean and latents_std have {channels} numbers each, or are None; got {lengths}")
    if min(std) <= 0:
        raise ValueError(f"latents_std must be positive; channel {list(std).index(min(std))} has {min(std):g}")
    if shift is not None:
        raise ValueError(f"latents_mean stands in the place of shift_factor; got both (shift_factor {shift:g})")


def arguments_of(config: dict[str, Any], image_size: int | None = None) -> dict[str, Any]:
    """The configuration of an `AutoencoderKL` -> arguments of `KLVAE`. What it leaves out is diffusers' default."""
    defaults = {k: p.default for k, p in _signature().items()}
    c = {**defaults, **config}
    if c["in_channels"] != c["out_channels"]:
        raise ValueError(f"the VAE reads {c['in_channels']} channels and paints {c['out_channels']}")
    if c["use_quant_conv"] != c["use_post_quant_conv"]:
        raise ValueError("the VAE has one of the two 1x1 convolutions around its latents; KLVAE has both or none")
    if c["act_fn"] != "silu":
        raise ValueError(f"the VAE's activation is {c['act_fn']!r}; KLVAE has silu alone")
    scale = 2 ** (len(c["block_out_channels"]) - 1)
    size = image_size or c["sample_size"]
    return {
        "image_size": size if size % scale == 0 else 256,  # diffusers' default is 32, whatever the depth
        "image_channels": c["in_channels"],
        "latent_channels": c["latent_channels"],
        "block_out_channels": tuple(c["block_out_channels"]),
        "layers_per_block": c["layers_per_block"],
        "norm_num_groups": c["norm_num_groups"],
        "mid_attention": c["mid_block_add_attention"],
        "down_block_types": tuple(c["down_block_types"]),
        "up_block_types": tuple(c["up_block_types"]),
        "quant_convs": c["use_quant_conv"],
        "scaling_factor": c["scaling_factor"],
        "shift_factor": c["shift_factor"],
        "latents_mean": c["latents_mean"],
        "latents_std": c["latents_std"],
    }


def _signature() -> dict[str, Any]:
    return {k: p for k, p in inspect.signature(AutoencoderKL.__init__).parameters.items() if k != "self"}


def _builder(**preset: Any) -> Callable[..., KLVAE]:
    return lambda **overrides: cast(KLVAE, KLVAE(**{**preset, **overrides}))


_TINY = {
    "image_size": 16,
    "latent_channels": 4,
    "block_out_channels": (8, 8),
    "layers_per_block": 1,
    "norm_num_groups": 4,
}
FASHION: dict[str, Any] = {
    "image_size": 32,
    "image_channels": 1,
    "latent_channels": 4,
    "block_out_channels": (16, 32, 64),
    "layers_per_block": 1,
    "norm_num_groups": 16,
    "mid_attention": False,
    "scaling_factor": 1.0,
}
"""Arguments of the VAE of the Fashion-MNIST recipes."""

KL16: dict[str, Any] = {
    "block_out_channels": (128, 128, 256, 256, 512),
    "down_block_types": ("DownEncoderBlock2D",) * 4 + ("AttnDownEncoderBlock2D",),
    "scaling_factor": 0.2325,
}
"""The VAE of MAR, FlowAR, xAR and CSpD: f16, 16 channels; attention at 16x16 in the encoder, but not in the decoder."""

register_model(ModelEntry("kl_vae_f8", "tokenizer", _builder(), "a KL-VAE at 256x256: f8, 16 channels", tiny=_TINY))
register_model(
    ModelEntry("kl_vae_fashion", "tokenizer", _builder(**FASHION), "Fashion-MNIST at 32x32: f4, 4 channels", tiny=_TINY)
)
register_model(
    ModelEntry(
        "kl16",
        "tokenizer",
        _builder(**KL16),
        "the KL-VAE of MAR at 256x256: f16, 16 channels",
        tiny={**_TINY, "image_size": 32, "block_out_channels": (8,) * 5},
    )
)
register_checkpoint(
    Checkpoint(
        name="kl16.in1k",
        repo_id="LTH14/mar",
        filename="kl16.ckpt",
        licence="MIT",
        paper="arXiv 2406.11838",
        resolution=256,
        official_score="rFID 0.53 on ImageNet validation images (a user's measurement, LTH14/mar issue 3)",
    )
)
