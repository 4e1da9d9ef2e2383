"""What training a VQ tokenizer has in common, of one scale or several: care of the codes.

Dead codes are restarted from what was coded in the step, and usage and perplexity are logged per scale: codebook
collapse is what users of the released trainers report.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor

from varkit.config import ConfigError, config
from varkit.interfaces import Losses
from varkit.layers.code_usage import CodeUsage
from varkit.rng import Draw, Rng
from varkit.tokenizers.multiscale_vq import Quantized
from varkit.training.objectives.reconstruction import ReconstructionConfig, ReconstructionTraining
from varkit.training.sync import place, summed


@config
class VQConfig(ReconstructionConfig):
    """Keys of every such objective. The losses within the quantiser are arguments of the model, such as its
    commitment_weight."""

    quantizer_weight: float = 1.0  # of commitment and codebook losses
    codebook: Literal["gradient", "ema"] = "gradient"  # how codes follow what they code
    codebook_decay: float = 0.99  # of the ema codebook
    restart_every: int = 100  # steps between restarts of dead codes; 0: never
    restart_below: float = 0.03  # a code is dead when used less than this share of the mean
    restart_until: float = 0.7  # share of the steps after which codes are left alone

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.quantizer_weight < 0:
            raise ConfigError("objective: loss weights must not be negative")


class VQTraining(ReconstructionTraining):
    """The tokenizer has a `quantize` whose codes are its `embedding`; its forward gives a reconstruction and a
    `Quantized`, unless a subclass says otherwise."""

    cluster_size: Tensor  # V, of the ema codebook
    cluster_sum: Tensor  # V C

    def __init__(self, config: Any, classes: list[str]) -> None:
        super().__init__(config, classes)
        self.coded: list[Quantized] = []
        if self.usage is None:
            return
        self.usage.defer_usage = True  # micro-batches of a step are counted as one batch
        if config.codebook == "ema":
            self.codes.requires_grad_(False)
            self.register_buffer("cluster_size", torch.ones(len(self.codes)))
            self.register_buffer("cluster_sum", self.codes.detach().clone())

    @property
    def usage(self) -> CodeUsage | None:
        """What counts the codes: by default the quantiser itself. None of a tokenizer without codes."""
        return self.tokenizer.quantize

    @property
    def codes(self) -> Tensor:
        """(V, C): the codebook's parameter."""
        return self.tokenizer.quantize.embedding.weight

    def _freeze(self) -> list[str]:
        lines = super()._freeze()
        if self.usage is None:
            return lines
        if not self.codes.requires_grad and self.config.codebook == "ema":
            raise ConfigError("objective.freeze holds the codebook, objective.codebook=ema moves it: choose one")
        self.codebook_frozen = not self.codes.requires_grad  # the loop switches gradients by phase
        return lines

    # ---- losses ---------------------------------------------------------------------------------------------

    def begin(self, step: int) -> None:
        """Called before anything of a micro-batch is coded. The count of records is not saved, so a resumed run must
        get it from here."""
        if not self.coded and self.usage is not None:
            self.usage.records = step

    def reconstruct(self, images: Tensor, step: int, rng: Rng) -> tuple[Tensor, Tensor, Losses]:
        self.begin(step)
        reconstruction, quantized = self.tokenizer(images)
        self.coded.append(quantized)
        return reconstruction, self.config.quantizer_weight * quantized.loss, {"quantizer": quantized.loss}

    @torch.no_grad()
    def after_step(self, step: int, rng: Rng) -> None:
        super().after_step(step, rng)
        coded, self.coded = self.coded, []
        if self.usage is None:
            return
        self.usage.commit_usage()
        if self.config.codebook == "ema":
            self._follow_means(coded)
        every, until = self.config.restart_every, self.config.restart_until * self.max_steps
        if every and step % every == 0 and step <= until and not self.codebook_frozen:
            self._restart_dead_codes(coded, step, rng)

    def discard_step(self) -> None:
        super().discard_step()
        self.coded.clear()
        if self.usage is not None:
            self.usage.pending = None

    def _follow_means(self, coded: list[Quantized]) -> None:
        """Each code becomes the moving mean of what it codes (VQ-VAE, arXiv 1711.00937, appendix A)."""
        ids = torch.cat([i.flatten() for q in coded for i in q.ids])
        z = torch.cat([r for q in coded for r in q.residuals])
        counts = torch.zeros_like(self.cluster_size).index_add_(0, ids, torch.ones_like(z[:, 0]))
        sums = torch.zeros_like(self.cluster_sum).index_add_(0, ids, z)
        counts, sums = summed(counts), summed(sums)
        self.cluster_size.lerp_(counts, 1 - self.config.codebook_decay)
        self.cluster_sum.lerp_(sums, 1 - self.config.codebook_decay)
        seen = self.cluster_size > 1e-3  # a code that nothing uses keeps its place
        mean = self.cluster_sum / self.cluster_size.clamp_min(1e-3)[:, None]
        self.codes.copy_(torch.where(seen[:, None], mean, self.codes))

    def _restart_dead_codes(self, coded: list[Quantized], step: int, rng: Rng) -> None:
        """Move codes that nothing uses onto residuals of this step's images, all scales alike.

        Which ones is a function of the seed and the step: the same however the step's images were shared out.
        """
        assert self.usage is not None
        hits = self.usage.ema_vocab_hit_SV
        use = hits.sum(0)
        dead = use < self.config.restart_below * use.mean()
        count = int(dead.sum())
        if count == 0:
            return
        u = Rng.for_keys(int(rng.seeds[0]), torch.tensor([step])).uniform(torch.arange(count), Draw.RESTART, count=2)[0]
        process, processes = place()
        images = len(coded[0].ids[0])  # of one micro-batch
        fresh = torch.zeros_like(self.codes[:count])
        for row, (which_scale, which) in enumerate(u.tolist()):
            scale = int(which_scale * len(coded[0].residuals))
            spots = len(coded[0].residuals[scale]) // images
            image, spot = divmod(int(which * images * len(coded) * processes * spots), spots)
            part, image = divmod(image, images * processes)  # as StepBatches shares a step out
            owner, image = divmod(image, images)
            if owner == process:
                fresh[row] = coded[part].residuals[scale][image * spots + spot]
        summed(fresh)
        self.codes[dead] = fresh
        hits[:, dead] = use.mean() / len(hits)
        if self.config.codebook == "ema":
            self.cluster_size[dead] = 1.0
            self.cluster_sum[dead] = fresh

    # ---- what is shown --------------------------------------------------------------------------------------

    def statistics(self) -> dict[str, float]:
        """Usage (share of codes with at least 8 % of the mean use) and perplexity, per scale and over all."""
        if self.usage is None:
            return {}
        hits = self.usage.ema_vocab_hit_SV.cpu()
        numbers: dict[str, float] = {}
        rows = {f"scale{k}": row for k, row in enumerate(hits)} | {"all": hits.sum(0)}
        for name, row in rows.items():
            p = row / row.sum().clamp_min(1e-12)
            numbers[f"usage/{name}"] = float((row >= 0.08 * row.mean()).float().mean())
            numbers[f"perplexity/{name}"] = float(torch.special.entr(p).sum().exp())
        return numbers
