"""Heads for entities of any kind: ids, or latents drawn by a flow or a diffusion, token by token or together.

All answer to the same two calls: `losses` of the true tokens of all entities at once, and `predictive` of one entity.
The network of latents is either MAR's residual MLP, which draws each token by itself (`token`), or FlowAR's small
transformer, which draws the tokens of an entity together (`entity`).

Sources: Li et al., arXiv 2406.11838 (MLP, diffusion); Ren et al., arXiv 2412.15205 (transformer, flow).

Shapes: R rows (2 B with guidance), L tokens of all entities, E entities, n tokens of one, D width of the vectors z that
the backbone gives, C latent channels, V codebook size.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from varkit.entities import group_of
from varkit.heads.categorical import Categorical
from varkit.heads.diffusion import Denoiser, Diffusion
from varkit.heads.flow import Flow, SigmaKind, add_noise, draw_sigma
from varkit.heads.flow_transformer import Context, FlowHead
from varkit.heads.gaussian import STEPS, Coefficients, backward, diffuse, process, variational_bound
from varkit.interfaces import Losses, Predictive
from varkit.layers.modulated import TimeEmbedding
from varkit.rng import Draw, Rng

PredictiveKind = Literal["categorical", "flow", "diffusion"]
Network = Literal["token", "entity"]


class CategoricalHead(nn.Module):
    """Logits over a codebook; tokens of an entity are drawn independently of each other."""

    def __init__(self, context: int, codebook_size: int) -> None:
        super().__init__()
        self.linear = nn.Linear(context, codebook_size)

    def losses(self, z: Tensor, tokens: Tensor, positions: Tensor, rng: Rng) -> Losses:
        """Cross entropy `error` and whether the likeliest id is right, `hit`: (B, L) float32.

        Args: z: (B, L, D).   tokens: (B, L) ids.   positions, rng: not read.
        """
        logits = self.linear(z).float()
        error = F.cross_entropy(logits.flatten(0, 1), tokens.flatten(), reduction="none").view_as(tokens)
        return {"error": error, "hit": (logits.detach().argmax(-1) == tokens).float()}

    def predictive(self, z: Tensor, where: Tensor, guided: bool) -> Predictive:
        """Args: z: (R, n, D), with guidance those without a condition below.   where: not read."""
        logits = self.linear(z).float()
        return Categorical(*logits.chunk(2)) if guided else Categorical(logits)


class LatentHead(nn.Module):
    """Noised tokens, times and vectors -> what a flow or a diffusion predicts of them.

    Args:
        channels: C.   outputs: numbers predicted a token.   context: D.   width, depth: of the network.
        network: `token` or `entity`, see the module.
        places: (L, 2), row and column of each token, or (L, 3), frame first.
        sizes: tokens of each entity, in order.   repeats: draws of noise and time in a training step, for one pass of
            the backbone.
    Raises: ValueError on another network or no draw.
    """

    sizes: Sequence[int]
    group: Tensor

    def __init__(
        self,
        channels: int,
        outputs: int,
        context: int,
        width: int,
        depth: int,
        network: Network,
        places: Tensor,
        sizes: Sequence[int],
        repeats: int = 1,
    ) -> None:
        super().__init__()
        if network not in ("token", "entity"):
            raise ValueError(f"the network of a head is token or entity; got {network!r}")
        if repeats < 1:
            raise ValueError(f"head_repeats must be at least 1; got {repeats}")
        self.channels, self.repeats, self.sizes = channels, repeats, sizes
        self.together = network == "entity"
        self.register_buffer("group", group_of(sizes).to(places.device), persistent=False)  # L
        self.net: Denoiser | FlowHead
        if self.together:
            self.net = FlowHead(channels, context, width, depth, False, places, outputs)
        else:
            self.net = Denoiser(channels, context, width, depth, outputs)

    def ask(
        self,
        x: Tensor,
        t: Tensor,
        z: Tensor,
        where: Tensor,
        group: Tensor | None = None,
        context: Context | None = None,
    ) -> Tensor:
        """(R, n, outputs) float32.

        Args:
            x: (R, n, C).   t: (R,) in [0, 1]; or with `group` (n,), (R, E), of token i number group[i].
            z: (R, n, D).   where: (n,), turns of the tokens.   context: of a transformer, see `FlowHead.context`.
        """
        if isinstance(self.net, FlowHead):
            return self.net(x, t, z, where, group, context)
        each = t[:, None] if group is None else t[:, group]
        return self.net(x, TimeEmbedding.index(each).float(), z)

    def branches(
        self, z: Tensor, where: Tensor, guided: bool
    ) -> tuple[Callable[..., Tensor], Callable[..., Any] | None]:
        """The network of one entity as functions of x (B, n, C) and t (B,): with the condition, and both branches at
        once. What no time changes is computed here. Args: as `predictive`."""
        batch = len(z) // 2 if guided else len(z)
        whole = self.net.context(z, where) if isinstance(self.net, FlowHead) else None
        part = None if whole is None else whole.rows(batch)

        def alone(x: Tensor, t: Tensor) -> Tensor:
            return self.ask(x, t, z[:batch], where, context=part)

        def both(x: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
            cond, null = self.ask(torch.cat([x, x]), torch.cat([t, t]), z, where, context=whole).chunk(2)
            return cond, null

        return alone, both if guided else None

    def draws(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Keys of the times of a training step, (T,), and the time of each token, (L,): one an entity where its tokens
        are drawn together, else one a token."""
        if self.together:
            return torch.arange(len(self.sizes)), self.group
        return positions, torch.arange(len(positions), device=positions.device)


class EntityFlow(LatentHead):
    """A rectified flow; see `LatentHead`. Args: sigma: how the times of training are drawn, see `draw_sigma`."""

    def __init__(self, channels: int, context: int, sigma: SigmaKind, **network: object) -> None:
        super().__init__(channels, channels, context, **network)  # type: ignore[arg-type]
        self.sigma: SigmaKind = sigma

    def losses(self, z: Tensor, tokens: Tensor, positions: Tensor, rng: Rng) -> Losses:
        """Squared `error` of the velocity, (B, L) float32, the mean of all draws.

        Args: z: (B, L, D).   tokens: (B, L, C).   positions: (L,), the keys of the random numbers.
        """
        keys, group = self.draws(positions)
        where, errors = torch.arange(len(positions), device=z.device), []
        for repeat in range(self.repeats):
            t = draw_sigma(rng, keys, kind=self.sigma, step=repeat).to(z.device)
            noise = rng.normal(positions, Draw.NOISE, step=repeat, count=self.channels).to(tokens)
            v = self.ask(add_noise(tokens, noise, t[:, group]), t, z, where, group)
            errors.append((v - (noise - tokens).float()).square().mean(-1))
        return {"error": torch.stack(errors).mean(0)}

    def predictive(self, z: Tensor, where: Tensor, guided: bool) -> Predictive:
        """Args: z: (R, n, D), with guidance those without a condition below.   where: (n,), turns of the tokens."""
        alone, both = self.branches(z, where, guided)
        return Flow(alone, self.channels, both)


class EntityDiffusion(LatentHead):
    """The Gaussian diffusion of MAR, its variance learned; see `LatentHead`.

    What differs: the network says the velocity v = signal noise - sigma data (Salimans and Ho, arXiv 2202.00512), of
    which the noise is sigma x + signal v. Where almost nothing but noise is left, the noise is then almost x whatever
    the network says; an error of a network that says the noise itself is divided by the signal there, 20,000 times
    larger, and few steps of sampling do not forgive it. Released heads were trained for long enough.
    """

    def __init__(self, channels: int, context: int, **network: object) -> None:
        super().__init__(channels, 2 * channels, context, **network)  # type: ignore[arg-type]

    def losses(self, z: Tensor, tokens: Tensor, positions: Tensor, rng: Rng) -> Losses:
        """Squared error of the velocity plus the bound's term, which teaches the variance: `error` (B, L) float32; and
        the former alone, `mse`. Args: as `EntityFlow.losses`."""
        keys, group = self.draws(positions)
        where, errors, squares = torch.arange(len(positions), device=z.device), [], []
        data = tokens.float().flatten(0, 1)  # B L, C: rows
        for repeat in range(self.repeats):
            t = (rng.uniform(keys, Draw.SIGMA, step=repeat) * STEPS).long().to(z.device)  # B T
            noise = rng.normal(positions, Draw.NOISE, step=repeat, count=self.channels).to(data).flatten(0, 1)
            at = t[:, group].flatten()
            c = process().at(at)
            x = diffuse(c, data, noise)
            out = self.ask(x.view(tokens.shape), self.times(t), z, where, group).flatten(0, 1)
            velocity, share = out.chunk(2, -1)
            square = (velocity - (c.signal * noise - c.sigma * data)).square().mean(-1)
            step = backward(c, x, noise_and_share(c, x, torch.cat([velocity.detach(), share], -1)))
            errors.append((square + variational_bound(c, x, data, step, at)).view(tokens.shape[:2]))
            squares.append(square.detach().view(tokens.shape[:2]))
        return {"error": torch.stack(errors).mean(0), "mse": torch.stack(squares).mean(0)}

    def predictive(self, z: Tensor, where: Tensor, guided: bool) -> Predictive:
        """Args: z: (R, n, D), with guidance those without a condition below.   where: (n,), turns of the tokens."""
        alone, both = self.branches(z, where, guided)

        def denoise(x: Tensor, t: Tensor) -> Tensor:
            return noise_and_share(self.at(t), x, alone(x, self.times(t).flatten().expand(len(x))))

        def pair(x: Tensor, t: Tensor) -> Any:
            assert both is not None
            c, times = self.at(t), self.times(t).flatten().expand(len(x))
            cond, null = both(x, times)
            return noise_and_share(c, x, cond), noise_and_share(c, x, null)

        return Diffusion(denoise, self.channels, pair if guided else None, z)

    @staticmethod
    def times(t: Tensor) -> Tensor:
        """Indices of the trained process -> the middles of their thousandths, which the network reads whole."""
        return (t + 0.5) / STEPS

    @staticmethod
    def at(t: Tensor) -> Coefficients:
        """Of indices (1, 1) or (B, 1)."""
        return Coefficients(*(part[:, None] for part in process().at(t.long().flatten())))  # 1 1 1, or B 1 1


def noise_and_share(c: Coefficients, x: Tensor, out: Tensor) -> Tensor:
    """What a network says, velocity and share of the variance (..., 2C), as noise and share; at x (..., C)."""
    velocity, share = out.chunk(2, -1)
    return torch.cat([c.sigma * x + c.signal * velocity, share], -1)
