"""Control in training: maps are made of the images of each batch, and the generator gets a network that reads them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from varkit.conditioning.control import Controlled, drawn_pixels
from varkit.conditioning.control_encoder import ControlEncoder, interpolated
from varkit.conditioning.extractors import EXTRACTORS, build_extractor
from varkit.config import ConfigError, config
from varkit.interfaces import Cond
from varkit.training.finetune import plain

UNREAD = ("mask_token", "head.weight", "head.bias", "fc_norm.weight", "fc_norm.bias")
"""Of trained encoders: what no map of features needs."""


@config
class ControlConfig:
    """What steers a generator, and the network that reads it."""

    kinds: tuple[str, ...]  # extractors (docs/control.md); of several each image has all
    options: dict[str, Any] = field(default_factory=dict)  # of an extractor, by its name
    network: dict[str, Any] = field(default_factory=dict)  # arguments of `Control`; empty: as `init_from` has it
    encoder_weights: str | None = None  # a trained ViT to begin with: a name of timm, or a file
    official_initialisation: bool = False  # as the release: draw all linear weights anew, the encoder's too

    def __post_init__(self) -> None:
        if not self.kinds:
            raise ConfigError(f"objective.control.kinds is empty; give at least one of {', '.join(EXTRACTORS)}")
        if unknown := sorted(self.options.keys() - set(self.kinds)):
            raise ConfigError(
                f"objective.control.options.{unknown[0]}: objective.control.kinds are {', '.join(self.kinds)}"
            )


class Controls:
    """The extractors of a run. Raises ConfigError or ImportError when one cannot be built."""

    def __init__(self, plan: ControlConfig) -> None:
        self.plan = plan
        try:
            self.extractors = [build_extractor(kind, **plan.options.get(kind, {})) for kind in plan.kinds]
        except (ValueError, FileNotFoundError) as error:
            raise ConfigError(f"objective.control: {error}") from None

    def fit(self, model: Any) -> str:
        """Give the generator its network, unless it has this one. Returns a line for the log. Raises ConfigError."""
        if not isinstance(model, Controlled):
            raise ConfigError(
                f"objective.control: {type(model).__name__} takes no control images; VAR, LlamaGen, FlowAR, xAR and "
                f"EntityAR do, such as var_d16, llamagen_b and xar_b"
            )
        wanted = {**self.plan.network, "kinds": list(self.plan.kinds)}
        if model.controller is not None:
            own = plain_settings(model.config.control)
            same = own == plain_settings(wanted) if self.plan.network else own["kinds"] == wanted["kinds"]
            if not same:
                raise ConfigError(f"objective.control has {wanted}; the model was made with {own}: leave network out")
            return f"control: goes on with the network that there is, kinds {', '.join(self.plan.kinds)}"
        try:
            model.add_control(wanted)
        except ValueError as error:
            raise ConfigError(f"objective.control.network: {error}") from None
        control: Any = model.controller
        if self.plan.encoder_weights is not None:
            load_encoder(control.encoder, trained_encoder(self.plan.encoder_weights), self.plan.encoder_weights)
        if self.plan.official_initialisation:
            control.init_weights(official=True, encoder=False)
        names = tuple(f"controller.{name}" for name, _ in control.named_parameters())
        model.full_rate = (*model.full_rate, *names)
        count = sum(p.numel() for p in control.parameters())
        return f"control: {count:,} new parameters that read {', '.join(self.plan.kinds)}; at first they add nothing"

    @torch.no_grad()
    def encode(self, images: Tensor) -> Cond:
        """(B, 3, H, W) in [-1, 1] -> their maps, (B, K, 3, H, W), of weight 1."""
        pixels = images.float().add(1).mul(127.5).round().clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1)
        maps = [drawn_pixels(extract(pixels)).to(images.device) for extract in self.extractors]
        control = torch.stack(maps, 1)
        return Cond(control=control, control_weight=control.new_ones(control.shape[:2]))


def plain_settings(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments of `Control` as JSON would give them back."""
    return {"kinds": [], **{name: plain(value) for name, value in settings.items()}}


def trained_encoder(source: str) -> dict[str, Tensor]:
    """Weights of a ViT under timm's names: of a file under these or transformers' names, or of a model of timm.

    Raises: ConfigError when there is no such file or model.
    """
    if Path(source).is_file():
        from varkit.checkpoints.files import read_state_dict

        state = read_state_dict(source)
        if "embeddings.cls_token" not in state:
            return state
        from varkit.checkpoints.controlar import encoder_from_official

        return encoder_from_official(state)
    import timm

    try:
        return timm.create_model(source, pretrained=True, num_classes=0).state_dict()
    except RuntimeError as error:
        raise ConfigError(
            f"objective.control.encoder_weights={source}: no such file, and no model of timm: {error}"
        ) from None


def load_encoder(encoder: ControlEncoder, state: Mapping[str, Tensor], what: str) -> None:
    """Take the weights of a trained ViT under timm's names; its positions are interpolated to those there are.

    Raises: ValueError listing what is missing, unknown or of another shape.
    """
    from varkit.checkpoints.files import load_strictly

    own = {k: v.float().clone() for k, v in state.items() if k not in UNREAD}
    side = math.isqrt(encoder.pos_embed.shape[1] - 1)
    if "pos_embed" in own:
        own["pos_embed"] = interpolated(own["pos_embed"], (side, side))
    load_strictly(encoder, own, what)
