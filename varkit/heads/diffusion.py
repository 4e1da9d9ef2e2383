"""The diffusion predictive and its head: a small network that denoises each token by itself (MAR's DiffLoss).

Sources: Li et al., arXiv 2406.11838; LTH14/mar: models/diffloss.py (fe470ac); the process is `varkit.heads.gaussian`.
What differs: noise is keyed by token; the condition is embedded once a token, the times once for all.

Shapes: B batch, n positions, N rows, C channels of a token, Z width of the condition, W width of the head.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from varkit.heads.gaussian import STEPS, Spacing, ancestral, backward, diffuse, process, variational_bound
from varkit.interfaces import Predictive, Processor
from varkit.rng import Draw, Rng
from varkit.samplers.branches import EveryKth

Denoise = Callable[[Tensor, Tensor], Tensor]
"""x (B, n, C) and t, indices of the trained process that broadcast over (B, n), -> (B, n, 2C): noise, then variance."""

DenoisePair = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
"""As `Denoise`, with the condition and without it; t may hold the times of both branches, (2B, n)."""

SOLVERS = ("ancestral", "ddim")


# ---- the network ------------------------------------------------------------------------------------------------


class TimeEmbedder(nn.Module):
    """Indices (...) -> (..., W)."""

    def __init__(self, width: int, features: int = 256) -> None:
        super().__init__()
        self.num_features = features
        self.mlp: Any = nn.Sequential(nn.Linear(features, width), nn.SiLU(), nn.Linear(width, width))

    def features(self, t: Tensor) -> Tensor:
        """(...) -> (..., 256) float32: cosines, then sines."""
        half = self.num_features // 2
        angles = t.float()[..., None] * 10000 ** -(torch.arange(half, device=t.device) / half)
        return torch.cat([angles.cos(), angles.sin()], -1)

    def forward(self, t: Tensor) -> Tensor:
        return self.mlp(self.features(t).to(self.mlp[0].weight.dtype))


class ResBlock(nn.Module):
    """A residual MLP, modulated and gated by the condition."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.in_ln = nn.LayerNorm(width, 1e-6)
        self.mlp = nn.Sequential(nn.Linear(width, width), nn.SiLU(), nn.Linear(width, width))
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 3 * width))

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        shift, scale, gate = self.adaLN_modulation(y).chunk(3, -1)
        return x + gate * self.mlp(torch.addcmul(shift, self.in_ln(x), 1 + scale))


class FinalLayer(nn.Module):
    def __init__(self, width: int, channels: int) -> None:
        super().__init__()
        self.linear = nn.Linear(width, channels)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 2 * width))

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        shift, scale = self.adaLN_modulation(y).chunk(2, -1)
        return self.linear(torch.addcmul(shift, F.layer_norm(x, x.shape[-1:], eps=1e-6), 1 + scale))


class Denoiser(nn.Module):
    """Noised tokens, time and condition -> noise and variance, or other `outputs`, each token by itself."""

    def __init__(self, channels: int, condition: int, width: int, depth: int, outputs: int | None = None) -> None:
        super().__init__()
        self.gradient_checkpointing = False
        self.time_embed = TimeEmbedder(width)
        self.cond_embed = nn.Linear(condition, width)
        self.input_proj = nn.Linear(channels, width)
        self.res_blocks = nn.ModuleList(ResBlock(width) for _ in range(depth))
        self.final_layer = FinalLayer(width, 2 * channels if outputs is None else outputs)

    def forward(self, x: Tensor, t: Tensor, z: Tensor) -> Tensor:
        """(..., outputs) float32. Args: x: (..., C).   t: (...) indices of the trained process.   z: (..., Z)."""
        return self.denoise(x, self.time_embed(t) + self.cond_embed(z))

    def denoise(self, x: Tensor, y: Tensor) -> Tensor:
        """As `forward`, of what time and condition are embedded as, y (..., W)."""
        x = self.input_proj(x.to(self.input_proj.weight.dtype))
        for block in self.res_blocks:
            if self.gradient_checkpointing and torch.is_grad_enabled():
                x = cast(Any, self)._gradient_checkpointing_func(block, x, y)
            else:
                x = block(x, y)
        return self.final_layer(x, y).float()


class DiffusionHead(nn.Module):
    """Hidden states -> a `Diffusion`, and its training loss.

    Args: channels: C.   condition: Z.   width, depth: of the MLP.
    """

    def __init__(self, channels: int, condition: int, width: int, depth: int) -> None:
        super().__init__()
        self.channels = channels
        self.net = Denoiser(channels, condition, width, depth)

    @torch.no_grad()
    def init_weights(self) -> None:
        """Xavier, the embedding of time normal of std 0.02, and modulations and output zero. Starts afresh."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
        for linear in (self.net.time_embed.mlp[0], self.net.time_embed.mlp[2]):
            nn.init.normal_(linear.weight, std=0.02)
        layers: list[Any] = [*self.net.res_blocks, self.net.final_layer]
        for linear in [self.net.final_layer.linear, *[layer.adaLN_modulation[1] for layer in layers]]:
            nn.init.zeros_(linear.weight)

    def loss(self, z: Tensor, data: Tensor, t: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
        """Squared error of the noise, and the bound's term in bits, of each row: (N,) float32; train on their sum.

        The bound teaches the variance alone: the noise is detached in it.
        Args: z: (N, Z).   data, noise: (N, C).   t: (N,) int64 in 0 .. 999.
        """
        c, data, noise = process().at(t), data.float(), noise.float()
        x = diffuse(c, data, noise)
        out = self.net(x, t, z)
        predicted, share = out.chunk(2, -1)
        step = backward(c, x, torch.cat([predicted.detach(), share], -1))
        return (predicted - noise).square().mean(-1), variational_bound(c, x, data, step, t)

    def times(self) -> Tensor:
        """(1000, W): what each index of the trained process is embedded as, for `diffusion`."""
        return self.net.time_embed(torch.arange(STEPS, device=self.net.input_proj.weight.device))

    def diffusion(
        self, z: Tensor, null: Tensor | None = None, places: int = 1, times: Tensor | None = None
    ) -> Diffusion:
        """The predictive of tokens with hidden states z (B, m, Z), and without a condition null (B, m, Z).

        Args:
            places: positions that a token of the network holds, in turn: n = m * places, and the network has
                places * C channels.
            times: what `times` gave, where many groups are drawn; None embeds the time of each step anew.
        """
        hidden = z if null is None else torch.cat([z, null])
        embedded = self.net.cond_embed(hidden)

        def ask(x: Tensor, t: Tensor, condition: Tensor) -> Tensor:
            time = self.net.time_embed(t) if times is None else times[t.long()]
            out = self.net.denoise(fold(x, places), time + condition)
            return out if places == 1 else torch.cat([unfold(half, places) for half in out.chunk(2, -1)], -1)

        def denoise(x: Tensor, t: Tensor) -> Tensor:
            return ask(x, t, embedded[: len(z)])

        def pair(x: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
            cond, without = ask(x.repeat(2, 1, 1), t, embedded).chunk(2)
            return cond, without

        return Diffusion(denoise, self.channels // places, pair if null is not None else None, hidden)


def fold(x: Tensor, places: int) -> Tensor:
    """(B, m places, C) -> (B, m, C places): all of a channel beside each other."""
    return x if places == 1 else x.unflatten(1, (-1, places)).transpose(2, 3).flatten(2)


def unfold(x: Tensor, places: int) -> Tensor:
    """What `fold` undoes: (B, m, C places) -> (B, m places, C)."""
    return x if places == 1 else x.unflatten(-1, (-1, places)).transpose(2, 3).flatten(1, 2)


# ---- the predictive ---------------------------------------------------------------------------------------------


class Diffusion(Predictive):
    """Tokens (B, n, C) from noise at the last step to data at the first.

    Args:
        denoise: of the conditional branch alone.
        dim: C.
        pair: both branches in one call; needed for guidance.
        hidden: the states that it was made of; in a guided batch those without a condition lie below.
        branches: of a guided diffusion, what `denoise` asks for both branches.
    Attributes, of the last `sample`:
        calls: how often the network was asked.
        mean, std: (B, n, C), of the last step, at which no noise is added: std is what it would have had.
        log_std_sum: (B, n, C), of all steps before it, without the temperature.
    """

    def __init__(
        self,
        denoise: Denoise,
        dim: int,
        pair: DenoisePair | None = None,
        hidden: Tensor | None = None,
        branches: EveryKth | None = None,
    ) -> None:
        self.denoise, self.dim, self.pair, self.hidden, self.branches = denoise, dim, pair, hidden, branches
        self.calls = 0
        self.mean = self.std = self.log_std_sum = torch.empty(0)

    @property
    def null_calls(self) -> int:
        """How many of the `calls` were for the branch without a condition too."""
        return 0 if self.branches is None else self.branches.calls

    def guide(self, scale: float | Tensor, every: int = 1) -> Diffusion:
        """uncond + scale * (cond - uncond) of the noise; the variance stays the conditional one, as in the release.

        Both branches see the same x. Args: scale: 1 is off; or (n,), or (B, n).   every: k, the unconditional branch
        runs in each k-th step, see `EveryKth`.
        Raises: ValueError when there is no unconditional branch.
        """
        if isinstance(scale, int | float) and scale == 1:
            return Diffusion(self.denoise, self.dim, hidden=self.hidden)
        if self.pair is None:
            raise ValueError("guidance needs an unconditional branch: pass null= to start()")
        branches = EveryKth(self.pair, self.denoise, every)

        def guided(x: Tensor, t: Tensor) -> Tensor:
            (noise, share), (null, _) = (out.chunk(2, -1) for out in branches(x, t))
            w = scale.to(noise)[..., None] if isinstance(scale, Tensor) else scale
            return torch.cat([torch.lerp(null, noise, w), share], -1)

        return Diffusion(guided, self.dim, hidden=self.hidden, branches=branches)

    def sample(
        self,
        rng: Rng,
        positions: Tensor,
        processors: Sequence[Processor] = (),
        *,
        num_steps: Spacing = 100,
        solver: str = "ancestral",
        temperature: float = 1.0,
        step: int = 0,
    ) -> Tensor:
        """Latents (B, n, C) float32.

        Args:
            num_steps: at least 2, see `Spacing`.
            solver: `ancestral` adds noise at every step but the last; `ddim` (Song et al., arXiv 2010.02502) adds none.
            temperature: of that noise; where it starts is not changed.
            step: a word of the random numbers' key, for tokens drawn anew.
        Raises: ValueError on another solver or spacing, for logit processors, or a temperature with ddim.
        """
        if processors:
            raise ValueError("a diffusion has no logits to process")
        if solver not in SOLVERS:
            raise ValueError(f"the solver of a diffusion must be one of {', '.join(SOLVERS)}; got {solver!r}")
        if solver == "ddim" and temperature != 1:
            raise ValueError(f"ddim adds no noise and has no temperature (1 is neutral); got {temperature:g}")
        steps = process(num_steps)
        x = rng.normal(positions, Draw.NOISE, step=step, count=self.dim)  # B n C
        noises = step_noise(rng, positions, step, self.dim, len(steps) - 1) if solver == "ancestral" else iter(())
        self.calls, self.log_std_sum = 0, torch.zeros_like(x)
        if self.branches is not None:
            self.branches.begin()
        for index in reversed(range(len(steps))):
            c = steps.at(index)
            if self.branches is not None:
                self.branches.step = self.calls
            t = x.new_full((1, 1), float(steps.indices[index]))
            at = backward(c, x, self.denoise(x, t))
            self.calls += 1
            if index == 0:
                self.mean, self.std = at.mean, (0.5 * at.log_variance).exp() * temperature
            else:
                self.log_std_sum = self.log_std_sum + 0.5 * at.log_variance
            if solver == "ddim":
                x = c.signal_before * at.x0 + c.sigma_before * at.noise
            else:
                x = ancestral(at, next(noises, None), temperature)
        return x


_STEP_SHIFT = 20
"""The key of a step's noise: the position, and from this bit on how many steps were taken."""

_AT_ONCE = 2**20
"""How many of these numbers are drawn together."""


def step_noise(rng: Rng, positions: Tensor, step: int, dim: int, count: int) -> Iterator[Tensor]:
    """Standard normal noise of `count` steps in turn, (B, n, C) each, drawn for many steps at once."""
    rows = max(len(rng), len(positions) if positions.dim() == 2 else 1) * positions.shape[-1]
    many = max(1, _AT_ONCE // max(rows * dim, 1))
    for first in range(0, count, many):
        taken = torch.arange(first, min(first + many, count), device=positions.device)
        keys = (positions[..., None] + (taken << _STEP_SHIFT)).flatten(-2)  # n T, or B n T
        noise = rng.normal(keys, Draw.DENOISE, step=step, count=dim)
        yield from noise.unflatten(1, (-1, len(taken))).unbind(2)
