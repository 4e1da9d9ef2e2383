"""Energy-based next-frame prediction: a transformer scores candidates for the next frame (Gladstone et al., arXiv
2406.08862 and 2507.02092). Experimental: no weights were ever released.

A frame is one vector, its flattened latents. Frames that are there form a causal stream, and a candidate for the frame
after the first j of them reads these and itself: candidates never meet, and nothing reads them. So frames are read
once, whatever is scored beside them, and the candidates of all frames (in training) or many of one (in sampling) share
that.

Source: alexiglad/EBT: model/vid/ebt.py, model/ar_ebt_default.py, ar_ebt_time_embed.py, ar_ebt_adaln.py (0ad3628), whose
parameter names these are. What differs: the frames' keys and values are kept, in a step of refinement and from frame to
frame; noise is keyed; best of N is there for clips too.

Shapes: B clips, T frames, S frames read, m candidates, n = h w tokens of a frame, C channels, V = n C, D width.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from functools import partial
from typing import Any, Literal, cast

import torch
import torch.nn.functional as F
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.modeling_utils import ModelMixin
from torch import Tensor, nn

from varkit.heads.diffusion import fold, unfold
from varkit.heads.energy import Descent, Energy, Initial, Refined, descend
from varkit.hub import HubMixin
from varkit.interfaces import Cond, Generator, Losses, State
from varkit.layers.cache import KVCache
from varkit.layers.llama import FeedForward, rotary_frequencies
from varkit.layout import TokenLayout
from varkit.registry import ModelEntry, register_model
from varkit.rng import Draw, Rng
from varkit.tokenizers.kl_vae import FASHION

logger = logging.getLogger(__name__)

Variant = Literal["default", "time_embed", "adaln", "adaln_zero"]
"""How the step of the descent is told: not at all; by a token before all frames; by scaling, shifting and gating."""

VARIANTS = ("default", "time_embed", "adaln", "adaln_zero")
INITIAL = ("noise", "zeros", "recent")
LOWEST_ALPHA = 1e-4

Memory = list[tuple[Tensor, Tensor]]
"""Keys and values of the frames read, of each layer, (B, heads, S, D / heads); with the step's token before them."""


class Norm(nn.Module):
    """Divides by the root mean square. Plain arithmetic in the dtype given: it is differentiated twice."""

    def __init__(self, dim: int, eps: float = 1e-5) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.eps) * self.weight


def turned(x: Tensor, by: Tensor) -> Tensor:
    """Adjacent numbers of x (B, heads, n, d) rotated as pairs. Args: by: (n, d / 2, 2), cosine and sine."""
    (a, b), (cos, sin) = x.unflatten(-1, (-1, 2)).unbind(-1), by.unbind(-1)
    return torch.stack([a * cos - b * sin, a * sin + b * cos], -1).flatten(-2)


class Attention(nn.Module):
    def __init__(self, dim: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.wq, self.wk, self.wv, self.wo = (nn.Linear(dim, dim, bias=False) for _ in range(4))

    def _qkv(self, x: Tensor, by: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = (w(x).unflatten(-1, (self.num_heads, -1)).transpose(1, 2) for w in (self.wq, self.wk, self.wv))
        return turned(q, by), turned(k, by), v

    def observe(self, x: Tensor, by: Tensor, cache: KVCache | None, layer: int, memory: Memory) -> Tensor:
        """Frames (B, n, D) among themselves and, with a cache, behind those in it. Their keys go into `memory`."""
        q, k, v = self._qkv(x, by)
        if cache is not None:
            k, v = cache.extend(layer, k, v)
        memory.append((k, v))
        n, every = q.shape[2], k.shape[2]
        mask = torch.ones(n, every, dtype=torch.bool, device=x.device).tril(every - n)
        return self.wo(F.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2).flatten(2))

    def look(self, x: Tensor, by: Tensor, read: tuple[Tensor, Tensor], seen: Tensor) -> Tensor:
        """Candidates (B, m, D), each at the frames it sees and at itself, in one softmax. Args: seen: (m, S) bool.

        Written out: kernels of attention cannot be differentiated twice.
        """
        (q, k, v), (keys, values) = self._qkv(x, by), read
        scale = q.shape[-1] ** -0.5
        others = (q @ keys.transpose(-1, -2) * scale).masked_fill(~seen, -torch.inf)  # B heads m S
        itself = (q * k).sum(-1, keepdim=True) * scale
        weights = torch.cat([others, itself], -1).softmax(-1)
        out = weights[..., :-1] @ values + weights[..., -1:] * v
        return self.wo(out.transpose(1, 2).flatten(2))


def modulation(dim: int, parts: int) -> nn.Sequential:
    return nn.Sequential(nn.SiLU(), nn.Linear(dim, parts * dim))


class Block(nn.Module):
    def __init__(self, dim: int, num_heads: int, hidden: int, modulated: bool) -> None:
        super().__init__()
        self.attention = Attention(dim, num_heads)
        self.feed_forward = FeedForward(dim, hidden, 0.0)
        self.attention_norm, self.ffn_norm = Norm(dim), Norm(dim)
        self.adaLN_modulation = modulation(dim, 6) if modulated else None

    def forward(self, x: Tensor, attend: Callable[[Tensor], Tensor], step: Tensor | None) -> Tensor:
        """(B, n, D). Args: attend: one of the two attentions, of what is normed.   step: (D,), where it is told."""
        if self.adaLN_modulation is None:
            x = x + attend(self.attention_norm(x))
            return x + self.feed_forward(self.ffn_norm(x))
        shift1, scale1, gate1, shift2, scale2, gate2 = self.adaLN_modulation(step).chunk(6, -1)
        x = x + gate1 * attend(torch.addcmul(shift1, self.attention_norm(x), 1 + scale1))
        return x + gate2 * self.feed_forward(torch.addcmul(shift2, self.ffn_norm(x), 1 + scale2))


class FinalLayer(nn.Module):
    """The energy, where the step scales and shifts what it is read from."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.linear = nn.Linear(dim, 1, bias=False)
        self.adaLN_modulation = modulation(dim, 2)

    def forward(self, x: Tensor, step: Tensor) -> Tensor:
        shift, scale = self.adaLN_modulation(step).chunk(2, -1)
        return self.linear(torch.addcmul(shift, x, 1 + scale))


class EnergyState(State):
    """The frames that are there, (B, V) each, and what each landscape has read of them."""

    def __init__(self, caches: list[KVCache], places: int, lead: int) -> None:
        self.caches, self.places, self.lead = caches, places, lead  # lead: entries of a cache before the first frame
        self.frames: list[Tensor] = []

    @property
    def length(self) -> int:  # type: ignore[override]
        return len(self.frames) * self.places

    def rewind(self, count: int) -> None:
        """Whole frames only. Raises ValueError when one would be cut, or there are not as many."""
        frames, rest = divmod(count, self.places)
        if rest or not 0 <= frames <= len(self.frames):
            raise ValueError(f"{count} tokens are no whole frames, of {self.places} each, of the {self.length} decided")
        self.frames = self.frames[: len(self.frames) - frames]
        for cache in self.caches:
            cache.rewind(max(0, cache.length - self.lead - len(self.frames)))

    def reset(self) -> None:
        self.frames = []
        for cache in self.caches:
            cache.reset()


class EnergyVideoAR(HubMixin, ModelMixin, ConfigMixin, Generator):
    """Scores candidates for the next frame of a clip. The defaults are the smallest released size on SD's latents.

    It goes on with given frames and knows no class: `num_classes` is 0, the first frame must be known. Weights stay
    float32.

    Args:
        num_frames: T.   grid: (h, w) of a frame's latents.   latent_dim: C.
        hidden_size, depth, num_heads: of the transformer.   ffn_multiplier: of its feed-forward width.
        variant: see `Variant`.
        num_steps: of the descent, each in a landscape of its own where the step is told.
        start_alpha: alpha, how far a step goes, at the start of training; it is learned.
        initial: see `Initial`. From `zeros` gradients are huge at first.
        langevin_noise: standard deviation of what each step adds to the embedded candidates.
        random_alpha: s; in training each candidate's alpha is uniform in [alpha / s, alpha s]. 1 is off.
        repeats: fewest and most steps in a landscape, drawn for each batch of training; else once, the last one most.
        repeat_last: so in the last landscape alone.
        detach, truncate: how training differentiates through the descent, see `descend`; with truncate the loss is of
            the last step alone ("System 2").
    Raises: ValueError on an impossible combination.
    """

    _supports_gradient_checkpointing = False
    no_decay = ("time_embeddings",)
    num_classes = 0
    first_frames = 1
    sampler = "EnergySampler"

    table: Tensor  # T+2 D/heads/2 2

    @register_to_config
    def __init__(
        self,
        num_frames: int = 16,
        grid: Sequence[int] = (28, 28),
        latent_dim: int = 4,
        hidden_size: int = 384,
        depth: int = 6,
        num_heads: int = 6,
        ffn_multiplier: float = 1.0,
        variant: Variant = "default",
        num_steps: int = 2,
        start_alpha: float = 30000.0,
        initial: Initial = "noise",
        langevin_noise: float = 0.0,
        random_alpha: float = 1.0,
        repeats: Sequence[int] = (1, 1),
        repeat_last: bool = False,
        detach: bool = True,
        truncate: bool = False,
    ) -> None:
        super().__init__()
        check_arguments(dict(self.config))
        height, width = grid
        self.layout = TokenLayout(((num_frames, height, width),), None, latent_dim)
        self.places = height * width
        self.lead = 1 if variant == "time_embed" else 0  # tokens before the frames
        vector, modulated = self.places * latent_dim, variant.startswith("adaln")
        # As released: vectors that are as wide as the network enter it as they are.
        self.project = nn.Identity() if vector == hidden_size else nn.Linear(vector, hidden_size)
        if variant != "default":
            self.time_embeddings = nn.Embedding(num_steps, hidden_size)
        hidden = int(hidden_size * ffn_multiplier)
        self.layers = nn.ModuleList(Block(hidden_size, num_heads, hidden, modulated) for _ in range(depth))
        self.norm = Norm(hidden_size)
        self.final_layer: Any = FinalLayer(hidden_size) if modulated else nn.Linear(hidden_size, 1, bias=False)
        self.alpha = nn.Parameter(torch.tensor(float(start_alpha)))
        angles = torch.arange(num_frames + 2)[:, None] * rotary_frequencies(2 * hidden_size // num_heads)
        self.register_buffer("table", torch.stack([angles.cos(), angles.sin()], -1), persistent=False)
        self.init_weights()

    @torch.no_grad()
    def init_weights(self) -> None:
        """Xavier (normal), biases zero; of adaln_zero modulations and the energy too."""
        zero = self.config.variant == "adaln_zero"
        for name, module in self.named_modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_normal_(module.weight)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
                if zero and (name.endswith("adaLN_modulation.1") or name.startswith("final_layer")):
                    nn.init.zeros_(module.weight)

    # ---- the network --------------------------------------------------------------------------------------

    @property
    def landscapes_read(self) -> int:
        """In how many ways frames are read: once for all steps where the step is not told."""
        return 1 if self.config.variant == "default" else self.config.num_steps

    def _step(self, landscape: int) -> Tensor | None:
        """The embedding (D,) of a step that scales and shifts."""
        return self.time_embeddings.weight[landscape] if self.config.variant.startswith("adaln") else None

    def observe(self, frames: Tensor, landscape: int = 0, cache: KVCache | None = None) -> Memory:
        """Read frames (B, S, V): all, or with a cache those behind the ones it holds; the memory has all."""
        with whole_precision(frames):
            x, step = self.project(frames.to(self.alpha.dtype)), self._step(landscape)
            begin = 0 if cache is None else cache.length
            if self.lead and begin == 0:
                first = self.time_embeddings.weight[landscape].expand(len(x), 1, -1)
                x = torch.cat([first, x], 1)
            by, memory = self.table[begin : begin + x.shape[1]], Memory()
            for i, block in enumerate(self.layers):
                attend = partial(block.attention.observe, by=by, cache=cache, layer=i, memory=memory)
                x = block(x, attend, step)
            if cache is not None:
                cache.advance(x.shape[1])
        return memory

    def energy(
        self, candidates: Tensor, memory: Memory, seen: Tensor, landscape: int = 0, noise: Tensor | None = None
    ) -> Tensor:
        """Energies (B, m) of candidates (B, m, V).

        Args: memory: of the frames read in this landscape.   seen: (m,) int64, how many frames come before each.
            noise: (B, m, D), added to the embedded candidates.
        """
        with whole_precision(candidates):
            x, step = self.project(candidates.to(self.alpha.dtype)), self._step(landscape)
            x = x if noise is None else x + noise
            where = seen + self.lead
            every = torch.arange(memory[0][0].shape[2], device=x.device)
            by, visible = self.table[where], every < where[:, None]
            for block, read in zip(self.layers, memory, strict=True):
                x = block(x, partial(block.attention.look, by=by, read=read, seen=visible), step)
            x = self.norm(x)
            return (self.final_layer(x) if step is None else self.final_layer(x, step))[..., 0]

    def forward(self, frames: Tensor, candidates: Tensor, landscape: int = 0) -> Tensor:
        """Energies (B, S) of candidates (B, S, V) for the frames after each of `frames` (B, S, V)."""
        seen = torch.arange(1, frames.shape[1] + 1, device=frames.device)
        return self.energy(candidates, self.observe(frames, landscape), seen, landscape)

    def landscapes(self, num_steps: int | None = None, rng: Rng | None = None) -> list[int]:
        """The landscape of each step.

        Args:
            num_steps: in all; those beyond the model's own are in the last landscape. None is as it was trained.
            rng: draws how often each is repeated, one number for the batch; None is at most once but in the last.
        """
        own, (fewest, most) = self.config.num_steps, self.config.repeats
        if num_steps is not None:
            return [min(i, own - 1) for i in range(num_steps)]
        if rng is None:
            return [*range(own - 1), *[own - 1] * most]
        u = rng[:1].uniform(torch.arange(own), Draw.DESCENT, step=1)[0].tolist()
        counts = [fewest + min(int(x * (most - fewest + 1)), most - fewest) for x in u]
        only_last = self.config.repeat_last
        return [k for k in range(own) for _ in range(1 if only_last and k < own - 1 else counts[k])]

    def step_size(self) -> Tensor:
        """alpha, ()."""
        return self.alpha.clamp_min(LOWEST_ALPHA)

    # ---- sampling -----------------------------------------------------------------------------------------

    def schedule(self, num_steps: int | None = None) -> list[Tensor]:
        """One frame a step. Raises ValueError when asked for another number of steps."""
        frames = self.config.num_frames
        if num_steps not in (None, frames):
            raise ValueError(f"one frame a step is drawn, {frames} in all; got num_steps={num_steps}")
        return list(torch.arange(self.layout.length, device=self.alpha.device).split(self.places))

    def groups_around(
        self, keep: Tensor, rng: Rng, num_steps: int | None = None, order: str | None = None
    ) -> tuple[Tensor, list[Tensor]]:
        """Whole first frames that are known in all clips are read at once. Raises ValueError where there are none."""
        groups = self.groups(rng, num_steps, order)
        known = keep.unflatten(1, (-1, self.places)).all(-1).all(0)  # T
        count = int(known.long().cumprod(0).sum())
        if count == 0:
            raise ValueError("energies predict what follows given frames: the whole first frame must be known, or more")
        before = torch.cat(groups[:count])
        return before.expand(len(keep), -1), groups[count:]

    def start(self, cond: Cond, null: Cond | None = None) -> EnergyState:
        """Raises ValueError on weights that are not float32 (or float64), or when asked for guidance."""
        if null is not None:
            raise ValueError("EnergyVideoAR knows no absence of a condition, so there is no unconditional branch")
        self.require_precision()
        c, parameter = self.config, self.alpha
        caches = [
            KVCache(
                layers=c.depth,
                rows=len(cond),
                heads=c.num_heads,
                length=c.num_frames + self.lead,
                head_dim=c.hidden_size // c.num_heads,
                dtype=parameter.dtype,
                device=parameter.device,
            )
            for _ in range(self.landscapes_read)
        ]
        return EnergyState(caches, self.places, self.lead)

    def require_precision(self) -> None:
        if self.alpha.dtype not in (torch.float32, torch.float64):
            raise ValueError(
                f"energies are differentiated, in training twice, and half precision is too coarse for that: these "
                f"weights are {self.alpha.dtype}; call .float()"
            )

    @torch.no_grad()
    def _memory(self, state: EnergyState, landscape: int) -> Memory:
        """Of all frames of the state, reading those that this landscape has not read yet."""
        cache = state.caches[min(landscape, self.landscapes_read - 1)]
        new = state.frames[max(0, cache.length - self.lead) :]
        if new:
            self.observe(torch.stack(new, 1), landscape, cache)
        return [
            (k[:, :, : cache.length], v[:, :, : cache.length]) for k, v in zip(cache.keys, cache.values, strict=True)
        ]

    def predict(self, state: State, inputs: Tensor, positions: Tensor) -> Energy:
        """The energies of the next frame. `inputs` are not read: the state knows the frames.

        Raises: ValueError where there are none.
        """
        assert isinstance(state, EnergyState)
        if not state.frames:
            raise ValueError("energies predict what follows given frames: append at least one frame first")
        count, c = len(state.frames), self.config

        def score(candidates: Tensor, landscape: int, noise: Tensor | None) -> Tensor:
            seen = torch.full((candidates.shape[1],), count, device=candidates.device)
            return self.energy(candidates, self._memory(state, landscape), seen, landscape, noise)

        return Energy(
            score,
            self.landscapes,
            self.step_size().detach(),
            places=self.places,
            dim=self.layout.dim,
            width=c.hidden_size,
            noise=c.langevin_noise,
            initial=c.initial,
            recent=state.frames[-1],
        )

    def append(self, state: State, tokens: Tensor, positions: Tensor) -> None:
        """Note frames, in order. Raises ValueError on a part of one."""
        assert isinstance(state, EnergyState)
        if tokens.shape[1] % self.places:
            raise ValueError(f"frames have {self.places} tokens each; got {tokens.shape[1]}")
        state.frames += fold(tokens.to(self.alpha.dtype), self.places).unbind(1)

    def refine(
        self,
        candidates: Tensor,
        context: Tensor,
        *,
        steps: int | None = None,
        alpha: float | None = None,
        noise: Callable[[int], Tensor] | None = None,
        select: str = "min_energy",
    ) -> Refined:
        """Refine candidates (B, N, n, C) for the frame after `context` (B, S n, C), and pick one of each clip.

        Args: steps, alpha, noise, select: see `Energy.refine`.
        """
        state = self.start(Cond(torch.zeros(len(context), dtype=torch.int64)))
        self.append(state, context, torch.arange(context.shape[1]))
        energy = self.predict(state, context, torch.arange(self.places))
        start = torch.cat([fold(c, self.places) for c in candidates.to(self.alpha.dtype).unbind(1)], 1)
        return energy.refine(start, num_steps=steps, alpha=alpha, noise=noise, select=select)

    # ---- training -----------------------------------------------------------------------------------------

    def initial_candidates(self, frames: Tensor, rng: Rng) -> Tensor:
        """Where the descents of all frames but the first start, (B, T - 1, V)."""
        before = frames[:, :-1]
        if self.config.initial == "noise":
            where = torch.arange(self.places, frames.shape[1] * self.places)
            return fold(rng.normal(where, Draw.NOISE, count=self.layout.dim), self.places).to(before)
        return before if self.config.initial == "recent" else torch.zeros_like(before)

    def loss_at(
        self,
        frames: Tensor,
        start: Tensor,
        landscapes: Sequence[int],
        alpha: Tensor,
        noise: Callable[[int], Tensor] | None = None,
    ) -> tuple[Losses, Descent]:
        """The loss of descents from given candidates, with a graph where gradients are on; see `training_loss`.

        Args: frames: (B, T, V).   start: (B, T - 1, V).   alpha: () or (B, T - 1, 1).   noise: of a step, (B, T-1, D).
        """
        self.require_precision()
        learn, memories = torch.is_grad_enabled(), dict[int, Memory]()
        seen = torch.arange(1, frames.shape[1], device=frames.device)

        def score(candidates: Tensor, landscape: int, i: int) -> Tensor:
            reading = min(landscape, self.landscapes_read - 1)
            if reading not in memories:
                with torch.set_grad_enabled(learn):
                    memories[reading] = self.observe(frames[:, :-1], reading)
            return self.energy(candidates, memories[reading], seen, landscape, None if noise is None else noise(i))

        c = self.config
        descent = descend(score, start, landscapes, alpha, learn=learn, detach=c.detach, truncate=c.truncate)
        each = [F.smooth_l1_loss(x, frames[:, 1:]) for x in descent.candidates]
        losses = {
            "loss": each[-1] if c.truncate else torch.stack(each).mean(),
            "loss_first": each[0].detach(),
            "loss_last": each[-1].detach(),
            "energy_drop": (descent.energies[0] - descent.energies[-1]).mean(),
        }
        return losses, descent

    def losses_of(self, frames: Tensor, rng: Rng, replayed: Tensor | None = None) -> tuple[Losses, Descent]:
        """As `loss_at`, with all that is drawn in training.

        Args: frames: (B, T, V).   replayed: (r, T - 1, V) that the last r clips start from.
        """
        c, alpha, std = self.config, self.step_size(), self.config.langevin_noise
        start = self.initial_candidates(frames, rng)
        if replayed is not None:
            start = torch.cat([start[: len(start) - len(replayed)], replayed.to(start)])
        turns = torch.arange(1, frames.shape[1])
        if self.training and c.random_alpha != 1:
            u = rng.uniform(turns, Draw.DESCENT).to(frames)[..., None]  # B T-1 1
            alpha = torch.lerp((alpha / c.random_alpha).expand_as(u), (alpha * c.random_alpha).expand_as(u), u)

        def langevin(step: int) -> Tensor:
            drawn = rng.normal(turns * self.places, Draw.SOLVER_NOISE, step=step, count=c.hidden_size)
            return std * drawn.to(frames)

        steps = self.landscapes(rng=rng if self.training else None)
        return self.loss_at(frames, start, steps, alpha, langevin if std else None)

    def training_loss(self, tokens: Tensor, inputs: Tensor, cond: Cond, rng: Rng) -> Losses:  # type: ignore[override]
        """The smooth L1 distance of refined candidates to the frames, mean over steps, or of the last one.

        Args: tokens: (B, L, C).   inputs, cond: not read.
        Returns: loss; loss_first, loss_last: of the first and the last step; energy_drop, from the first to the last.
        """
        return self.losses_of(fold(tokens.to(self.alpha.dtype), self.places), rng)[0]

    def tokens_of(self, vectors: Tensor) -> Tensor:
        """Frames as vectors (B, k, V) -> latents (B, k n, C)."""
        return unfold(vectors, self.places)


def whole_precision(like: Tensor) -> AbstractContextManager[Any]:
    """No automatic half precision: energies are differentiated twice."""
    return torch.autocast(like.device.type, enabled=False)


def check_arguments(c: dict[str, Any]) -> None:
    """Raises ValueError on arguments of `EnergyVideoAR` that cannot be; warns of a start at zero."""
    for name, allowed in (("variant", VARIANTS), ("initial", INITIAL)):
        if c[name] not in allowed:
            raise ValueError(f"{name} must be one of {', '.join(allowed)}; got {c[name]!r}")
    if c["num_frames"] < 2 or c["num_steps"] < 1:
        raise ValueError(
            f"a clip has at least 2 frames and a descent 1 step; got num_frames {c['num_frames']} and num_steps "
            f"{c['num_steps']}"
        )
    if c["hidden_size"] % (2 * c["num_heads"]):
        raise ValueError(
            f"hidden_size {c['hidden_size']} cannot be shared by {c['num_heads']} heads of an even number of channels"
        )
    for name, least in (("start_alpha", LOWEST_ALPHA), ("random_alpha", 1.0), ("langevin_noise", 0.0)):
        if not c[name] >= least:
            raise ValueError(f"{name} must be at least {least:g}; got {c[name]}")
    fewest, most = c["repeats"]
    if not 1 <= fewest <= most:
        raise ValueError(f"repeats are the fewest, at least 1, and the most steps in a landscape; got {c['repeats']}")
    if c["initial"] == "zeros":
        logger.warning(
            "initial 'zeros' starts every descent where the first norm divides by nearly nothing: gradients of the "
            "energy are up to 316 times those at a vector of unit size, and training may not survive it; take 'noise'"
        )


def _builder(**preset: Any) -> Callable[..., EnergyVideoAR]:
    return lambda **overrides: cast(EnergyVideoAR, EnergyVideoAR(**{**preset, **overrides}))


TINY: dict[str, Any] = {
    "num_frames": 4,
    "grid": (2, 2),
    "latent_dim": 4,
    "hidden_size": 32,
    "depth": 2,
    "num_heads": 2,
    "start_alpha": 5.0,
}
TINY_TOKENIZER: dict[str, Any] = {
    "frame_config": {**FASHION, "image_size": 4, "block_out_channels": (8, 8), "norm_num_groups": 4},
    "num_frames": 4,
}
SIZES: dict[str, tuple[int, int, int, str]] = {
    "2xs": (6, 6, 384, "6.2"),
    "xs": (12, 6, 384, "12.4"),
    "s": (12, 12, 768, "49.6"),
    "m": (24, 16, 1024, "176.2"),
    "l": (24, 16, 1536, "396.4"),
    "xl": (24, 32, 2048, "704.7"),
}
"""Of the release: depth, heads, width, and millions of parameters, not counting how frames and steps are embedded."""

for _name, (_depth, _heads, _width, _millions) in SIZES.items():
    register_model(
        ModelEntry(
            f"ebt_{_name}",
            "generator",
            _builder(hidden_size=_width, depth=_depth, num_heads=_heads, variant="time_embed"),
            f"experimental: energies of the next of 16 frames, SD's latents at 224x224, {_millions} M parameters",
            tokenizer="frames_kl_sd",
            tiny={**TINY, "variant": "time_embed"},
            tiny_tokenizer=TINY_TOKENIZER,
        )
    )
register_model(
    ModelEntry(
        "ebt_fashion",
        "generator",
        _builder(grid=(8, 8), hidden_size=256, depth=6, num_heads=8, variant="time_embed", start_alpha=5.0),
        "experimental: energies of the next of 16 frames of 32x32, 2.8 M parameters",
        tokenizer="frames_kl_fashion",
        tiny={**TINY, "variant": "time_embed"},
        tiny_tokenizer=TINY_TOKENIZER,
    )
)
