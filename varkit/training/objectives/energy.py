"""Training energies of next frames on clips, coded frame by frame by a frozen autoencoder of images.

Sources: Gladstone et al., arXiv 2507.02092; alexiglad/EBT: model/vid/ebt.py, model/replay_buffer.py (0ad3628). What
differs: alpha's learning rate is relative to alpha; the replay buffer belongs to the checkpoint.

Shapes: B clips, T frames, V numbers of a frame, r replayed clips.
"""

from __future__ import annotations

from dataclasses import field
from pathlib import Path
from typing import Any, Literal, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from varkit import registry
from varkit.config import ConfigError, config
from varkit.generators.energy_video import EnergyVideoAR
from varkit.heads.diffusion import fold
from varkit.heads.energy import Descent
from varkit.interfaces import Cond, Losses, Objective
from varkit.pictures import SHOWN_FRAMES, rows_of_frames
from varkit.pipelines.auto import assemble, open_tokenizer
from varkit.rng import Draw, Rng
from varkit.tokenizers.frames import FrameTokenizer
from varkit.training.objectives.generation import registered

CLIPS = True
"""It always takes clips."""


@config
class Config:
    """A generator and how it learns. How the descent goes in training is in `model_overrides`, see `EnergyVideoAR`:
    `variant`, `num_steps`, `start_alpha`, `detach`, `truncate`, `langevin_noise`, `random_alpha`, `repeats`."""

    name: Literal["energy"] = "energy"
    tokenizer: str  # of latents: of images, which is put on each frame, or of clips, frame by frame
    model: str  # a registered EnergyVideoAR; it gets its sizes from the tokenizer
    model_overrides: dict[str, Any] = field(default_factory=dict)
    num_frames: int = 16  # of a clip, where the tokenizer is one of images
    image_size: int | None = None  # side of the frames, where the tokenizer can code several; None: its own
    alpha_lr: float = 3.0  # alpha's learning rate is this times start_alpha times optim.lr; 0: alpha stays
    replay: int = 0  # stored refined candidates (192 in the release), from which more clips start; 0: none
    sampling: dict[str, Any] = field(default_factory=dict)  # default settings of EnergySampler, and of sample sheets

    def __post_init__(self) -> None:
        if self.num_frames < 2:
            raise ConfigError(f"objective.num_frames must be at least 2; got {self.num_frames}")
        for name in ("alpha_lr", "replay"):
            if not getattr(self, name) >= 0:
                raise ConfigError(f"objective.{name} must not be negative (0: none); got {getattr(self, name)}")


class Training(Objective):
    """Owns the generator and the replay buffer; the tokenizer is frozen."""

    replay_frames: Tensor  # N T V, a ring
    replay_refined: Tensor  # N T-1 V
    replay_written: Tensor  # () int64, in all

    def __init__(self, config: Config, classes: list[str]) -> None:
        super().__init__()
        self.config, self.classes = config, classes
        if not isinstance(registered(config), EnergyVideoAR):
            raise ConfigError(f"objective.model: {config.model} has no energies; objective energy trains EnergyVideoAR")
        tokenizer = self._tokenizer()
        self.freeze("tokenizer", tokenizer)
        self.image_size, self.num_frames, self.columns = tokenizer.image_size, tokenizer.num_frames, SHOWN_FRAMES
        (grid,), dim = tokenizer.layout.grids, tokenizer.layout.dim
        sizes = {"num_frames": grid[0], "grid": list(grid[1:]), "latent_dim": dim}
        try:
            self.model: EnergyVideoAR = registry.create_model(config.model, **sizes | config.model_overrides)
        except (TypeError, ValueError) as error:
            raise ConfigError(f"objective.model_overrides: {error}") from None
        self.model.layout.require(tokenizer.layout, "the generator", f"tokenizer {config.tokenizer}")
        if config.alpha_lr:
            self.model.lr_scales = {"alpha": config.alpha_lr * self.model.config.start_alpha}
        else:
            self.model.alpha.requires_grad_(False)
        self.max_steps = 1
        self._refined: list[tuple[Tensor, Tensor]] = []  # of this step: frames, refined
        if config.replay:
            frames, vector = self.model.config.num_frames, self.model.places * dim
            self.register_buffer("replay_frames", torch.zeros(config.replay, frames, vector))
            self.register_buffer("replay_refined", torch.zeros(config.replay, frames - 1, vector))
            self.register_buffer("replay_written", torch.zeros((), dtype=torch.int64))
        self._pipeline()  # settings that the sampler does not know are refused now, not at the end

    def _tokenizer(self) -> Any:
        c = self.config
        tokenizer = open_tokenizer(c.tokenizer, image_size=c.image_size)
        if tokenizer.layout.codebook_size is not None:
            raise ConfigError(
                f"objective.tokenizer: {c.tokenizer} has {tokenizer.layout.describe()}; energies are of latents, such "
                f"as those of a run of objective kl-vae"
            )
        if len(tokenizer.layout.grids) > 1:
            raise ConfigError(
                f"objective.tokenizer: {c.tokenizer} has {tokenizer.layout.describe()}; energies are of one grid of "
                f"latents a frame, not of scales"
            )
        if tokenizer.num_frames is None:
            return FrameTokenizer.around(tokenizer, c.num_frames)
        if not isinstance(tokenizer, FrameTokenizer):
            raise ConfigError(f"objective.tokenizer: {c.tokenizer} codes clips, but not frame by frame")
        return tokenizer

    def trained(self, phase: str) -> nn.Module:
        return self.model

    # ---- losses -------------------------------------------------------------------------------------------

    @torch.no_grad()
    def frames(self, clips: Tensor) -> Tensor:
        """(B, 3, T, H, W) -> the means of the latents, one vector a frame, (B, T, V) float32."""
        with torch.autocast(clips.device.type, enabled=False):
            return fold(self.frozen("tokenizer").encode(clips.float()).float(), self.model.places)

    def _replay(self, frames: Tensor, rng: Rng) -> tuple[Tensor, Rng, Tensor | None]:
        """Clips with stored ones below, half as many at most; their random numbers; what these start from, (r, ...)."""
        stored = min(int(self.replay_written), self.config.replay)
        count = min(len(frames) // 2, stored)
        if count == 0:
            return frames, rng, None
        u = rng[:count].uniform(torch.zeros(1, dtype=torch.int64), Draw.REPLAY)[:, 0]
        which = (u * stored).long().clamp_max(stored - 1).to(frames.device)
        rng = Rng(torch.cat([rng.seeds, rng.candidate(1).seeds[:count]]))
        return torch.cat([frames, self.replay_frames[which]]), rng, self.replay_refined[which]

    def forward(self, batch: dict[str, Tensor], phase: str, step: int, max_steps: int, rng: Rng) -> Losses:
        frames = self.frames(batch["images"])
        if not self.config.replay:
            return self.model.losses_of(frames, rng)[0]
        losses, descent = self.model.losses_of(*self._replay(frames, rng))
        self._refined.append((frames, descent.candidates[-1][: len(frames)].detach()))
        return losses

    @torch.no_grad()
    def after_step(self, step: int, rng: Rng) -> None:
        """Store what this step refined, over the oldest."""
        for pair in self._refined:
            for frames, refined in zip(*pair, strict=True):
                place = int(self.replay_written) % self.config.replay
                self.replay_frames[place], self.replay_refined[place] = frames, refined
                self.replay_written += 1
        self._refined = []

    def discard_step(self) -> None:
        self._refined = []

    def statistics(self) -> dict[str, float]:
        return {"alpha": float(self.model.step_size().detach())}

    # ---- what is shown ------------------------------------------------------------------------------------

    @torch.no_grad()
    def validate(self, batch: dict[str, Tensor], rng: Rng) -> Losses:
        """The loss, also after each step of the descent, and of copying the frame before; and of the last frame of
        clips, predicted from the true ones before it, the PSNR in pixels, beside that of copying."""
        clips, frames = batch["images"].float(), self.frames(batch["images"])
        losses, descent = self.model.losses_of(frames, rng)
        result = {"loss": losses["loss"], "energy_drop": losses["energy_drop"], **self._by_step(frames, descent)}
        last = self.frozen("tokenizer").decode(self.model.tokens_of(descent.candidates[-1][:, -1:]))[:, :, 0]
        return result | {
            "psnr": psnr(last.float(), clips[:, :, -1]),
            "psnr_copy": psnr(clips[:, :, -2], clips[:, :, -1]),
        }

    @staticmethod
    def _by_step(frames: Tensor, descent: Descent) -> Losses:
        steps = {f"step_{i}": F.smooth_l1_loss(x, frames[:, 1:]) for i, x in enumerate(descent.candidates, 1)}
        return {**steps, "copy": F.smooth_l1_loss(frames[:, :-1], frames[:, 1:])}

    @torch.no_grad()
    def pictures(self, batch: dict[str, Tensor], rng: Rng) -> Tensor:
        """Of up to four clips some frames in a row, and below them how a quarter of all frames goes on."""
        clips, total = batch["images"][:4].float(), cast(int, self.num_frames)
        tokens, given = self.frozen("tokenizer").encode(clips).float(), max(1, total // 4)
        keep = torch.arange(tokens.shape[1], device=tokens.device) < given * self.model.places
        out = self._pipeline().sampler.generate(
            self.frozen("tokenizer"),
            self.model,
            Cond(torch.zeros(len(clips), dtype=torch.int64, device=clips.device)),
            Rng.from_seed(0, len(clips)),
            known=(tokens, keep),
        )
        both = torch.stack([clips, self.frozen("tokenizer").decode(out.tokens).float()], 1)  # B 2 3 T H W
        return rows_of_frames(both.flatten(0, 1), SHOWN_FRAMES)

    def _pipeline(self) -> Any:
        return assemble(self.model, self.frozen("tokenizer"), self.config.sampling)

    def export(self, folder: Path) -> None:
        self._pipeline().save_pretrained(folder)


def psnr(images: Tensor, others: Tensor) -> Tensor:
    """Of images in [-1, 1], mean over them, in dB; equal ones count as 100."""
    error = (images - others).square().flatten(1).mean(1) / 4
    return (-10 * error.clamp_min(1e-10).log10()).mean()
