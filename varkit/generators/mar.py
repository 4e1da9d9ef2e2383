"""MAR: masked autoregressive generation of continuous tokens (Li et al., "Autoregressive Image Generation without
Vector Quantization", arXiv 2406.11838).

Source: LTH14/mar: models/mar.py (fe470ac). Parameter names are those of the released files. An encoder reads the tokens
decided so far, a decoder fills the places of the others, and a diffusion head draws each open token by itself.
What differs: orders, masks and noise are keyed by image; the head sees masked tokens only in training too; layouts are
those of the latents, also where a token is a patch of them; more steps than tokens are refused, where the release runs
empty ones.

Shapes: B batch, N latent positions of C channels, p patch side, L = N / p^2 tokens of D = p^2 C channels, k of them
decided, S buffer slots, W width.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any, cast

import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.modeling_utils import ModelMixin
from torch import Tensor, nn

from varkit.heads.diffusion import Diffusion, DiffusionHead, fold, unfold
from varkit.heads.gaussian import STEPS
from varkit.hub import HubMixin
from varkit.interfaces import Cond, Generator, Losses, State
from varkit.layers.vit import Block
from varkit.layout import TokenLayout
from varkit.orders import order_groups, random_orders, token_order
from varkit.registry import Checkpoint, ModelEntry, register_checkpoint, register_model
from varkit.rng import Draw, Rng

# ---- tokens and masks ---------------------------------------------------------------------------------------------


def patch_positions(grid: Sequence[int], patch: int) -> Tensor:
    """(L, p^2): the positions of each token in a grid (h, w) of latents; tokens and their positions in raster order."""
    height, width = grid
    places = torch.arange(height * width, device="cpu").view(height // patch, patch, width // patch, patch)
    return places.transpose(1, 2).flatten(2).flatten(0, 1)


def masked_counts(length: int, num_steps: int) -> list[int]:
    """How many tokens are masked after each step: a cosine, at least one fewer each time, and 1 after the last, which
    decides them all the same."""
    left, now = [], length
    for step in range(num_steps):
        now = max(1, min(now - 1, math.floor(length * math.cos(math.pi / 2 * (step + 1) / num_steps))))
        left.append(now)
    return left


def group_sizes(length: int, num_steps: int) -> list[int]:
    """How many tokens each step decides. Raises ValueError unless num_steps is in 1 .. length."""
    if not 1 <= num_steps <= length:
        raise ValueError(f"num_steps must be in 1 to {length}, the number of tokens; got {num_steps}")
    left = [length, *masked_counts(length, num_steps)[:-1], 0]
    return [before - after for before, after in pairwise(left)]


def first_masked(order: Tensor, ratio: float) -> Tensor:
    """(B, L) bool: the first ceil(L ratio) tokens of each order (B, L)."""
    return order.argsort(1) < math.ceil(order.shape[1] * ratio)


def tokens_at(mask: Tensor) -> Tensor:
    """(B, k): where a mask (B, L) bool with k in every row is true, rising."""
    return mask.nonzero()[:, 1].view(len(mask), -1)


def mask_ratio(u: float, least: float) -> float:
    """The quantile u of a normal of mean 1 and std 0.25, cut to [least, 1]."""
    below = 0.5 * (1 + math.erf((least - 1) / 0.25 / math.sqrt(2)))
    quantile = torch.special.ndtri(torch.tensor(below + u * (0.5 - below), dtype=torch.float64))
    return min(max(1 + 0.25 * float(quantile), least), 1.0)


class MARState(State):
    """The tokens decided so far and in what order; nothing is cached, for every step reads all of them anew.

    Args: tokens: (B, L, D).   labels: (B,), or (2B,) with those without a class below.   places: p^2.
        times: (1000, W) of the head, see `DiffusionHead.times`.
    """

    def __init__(self, tokens: Tensor, labels: Tensor, places: int, times: Tensor) -> None:
        self.tokens, self.labels, self.places, self.times = tokens, labels, places, times
        self.guided = len(labels) > len(tokens)
        self.order = torch.zeros(tokens.shape[:2], dtype=torch.int64, device=tokens.device)
        self.length = 0

    @property
    def visible(self) -> Tensor:
        """(B, k): the tokens decided, rising."""
        return self.order[:, : self.length // self.places].sort(1).values

    def rewind(self, count: int) -> None:
        if not 0 <= count <= self.length or count % self.places:
            raise ValueError(f"cannot rewind {count} of {self.length} positions in tokens of {self.places}")
        self.length -= count

    def reset(self) -> None:
        self.length = 0

    def expect_guidance(self, on: bool) -> None:
        self.guided = on and len(self.labels) > len(self.tokens)


# ---- the model ----------------------------------------------------------------------------------------------------


class MAR(HubMixin, ModelMixin, ConfigMixin, Generator):
    """The class-conditional generator of latents. The defaults are MAR-B at 256x256.

    Args:
        num_classes: not counting their absence, which is no row of the embedding but `fake_latent`.
        grid: (h, w) of the latents.   latent_dim: C.   patch_size: p.
        encoder_dim, encoder_depth, encoder_heads, decoder_dim, decoder_depth, decoder_heads, mlp_ratio: of the
            transformers.   buffer_size: slots before the tokens that hold the class.   eps: of the norms.
        head_width, head_depth: of the diffusion head.
        dropout, attention_dropout: in training.   cond_drop_rate: how often a class is dropped.
        mask_ratio_min: the least share of tokens that is masked in training.
        diffusion_batch_mul: how often each token is diffused in a training step.
        num_steps: of sampling, unless a sampler says otherwise; at most L.
    Raises: ValueError on an impossible combination.
    """

    _supports_gradient_checkpointing = True
    _no_split_modules = ("Block", "ResBlock")
    no_decay = ("diffloss",)
    """Name parts of parameters trained without weight decay, besides biases and 1-D tensors."""
    class_embedding = "class_emb"
    lora_targets = ("*.attn.qkv", "*.attn.proj", "*.mlp.fc1", "*.mlp.fc2")
    free_arguments = frozenset(
        {"dropout", "attention_dropout", "cond_drop_rate", "mask_ratio_min", "diffusion_batch_mul", "num_steps"}
    )
    """These three: see `varkit.training.finetune.Tunable`."""
    causal = False
    guidance_by = "tokens"
    sampler = "ContinuousSampler"

    @register_to_config
    def __init__(
        self,
        num_classes: int = 1000,
        grid: Sequence[int] = (16, 16),
        latent_dim: int = 16,
        patch_size: int = 1,
        encoder_dim: int = 768,
        encoder_depth: int = 12,
        encoder_heads: int = 12,
        decoder_dim: int = 768,
        decoder_depth: int = 12,
        decoder_heads: int = 12,
        mlp_ratio: float = 4.0,
        buffer_size: int = 64,
        eps: float = 1e-6,
        head_width: int = 1024,
        head_depth: int = 6,
        dropout: float = 0.1,
        attention_dropout: float = 0.1,
        cond_drop_rate: float = 0.1,
        mask_ratio_min: float = 0.7,
        diffusion_batch_mul: int = 4,
        num_steps: int = 256,
    ) -> None:
        super().__init__()
        if len(grid) != 2 or grid[0] % patch_size or grid[1] % patch_size:
            raise ValueError(f"grid must be (h, w) of whole patches of {patch_size}; got {tuple(grid)}")
        for dim, heads in ((encoder_dim, encoder_heads), (decoder_dim, decoder_heads)):
            if dim % heads:
                raise ValueError(f"a width of {dim} cannot be shared by {heads} heads")
        if not 0 < mask_ratio_min < 1 or diffusion_batch_mul < 1:
            raise ValueError(
                f"mask_ratio_min must be in (0, 1) and diffusion_batch_mul at least 1; got {mask_ratio_min} and "
                f"{diffusion_batch_mul}"
            )
        self.layout = TokenLayout((tuple(grid),), None, latent_dim)
        self.places = self.positions_per_token = patch_size**2
        self.num_classes, self.length = num_classes, self.layout.length // self.places
        self.gradient_checkpointing = False
        self.positions: Tensor
        self.register_buffer("positions", patch_positions(grid, patch_size), persistent=False)  # L p^2
        slots, channels = buffer_size + self.length, latent_dim * self.places
        rest = (dropout, attention_dropout, eps)
        self.fake_latent = nn.Parameter(torch.zeros(1, encoder_dim))
        self.encoder_pos_embed_learned = nn.Parameter(torch.zeros(1, slots, encoder_dim))
        self.mask_token = nn.Parameter(torch.zeros(1, 1, decoder_dim))
        self.decoder_pos_embed_learned = nn.Parameter(torch.zeros(1, slots, decoder_dim))
        self.diffusion_pos_embed_learned = nn.Parameter(torch.zeros(1, self.length, decoder_dim))
        self.class_emb: Any = nn.Embedding(num_classes, encoder_dim)
        self.z_proj = nn.Linear(channels, encoder_dim)
        self.z_proj_ln = nn.LayerNorm(encoder_dim, eps)
        hidden = int(encoder_dim * mlp_ratio)
        self.encoder_blocks = nn.ModuleList(
            Block(encoder_dim, encoder_heads, hidden, *rest) for _ in range(encoder_depth)
        )
        self.encoder_norm = nn.LayerNorm(encoder_dim, eps)
        self.decoder_embed = nn.Linear(encoder_dim, decoder_dim)
        hidden = int(decoder_dim * mlp_ratio)
        self.decoder_blocks = nn.ModuleList(
            Block(decoder_dim, decoder_heads, hidden, *rest) for _ in range(decoder_depth)
        )
        self.decoder_norm = nn.LayerNorm(decoder_dim, eps)
        self.diffloss = DiffusionHead(channels, decoder_dim, head_width, head_depth)
        self.init_weights()

    @torch.no_grad()
    def init_weights(self) -> None:
        """Linear layers Xavier, what is embedded normal of std 0.02, and the head its own. Starts afresh."""
        for name, parameter in self.named_parameters():
            if name.endswith(("pos_embed_learned", "class_emb.weight", "fake_latent", "mask_token")):
                nn.init.normal_(parameter, std=0.02)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
            elif isinstance(module, nn.LayerNorm):
                nn.init.ones_(module.weight)
                nn.init.zeros_(module.bias)
        self.diffloss.init_weights()

    # ---- the network ----------------------------------------------------------------------------------------------

    def patchify(self, latents: Tensor) -> Tensor:
        """Latents (B, N, C) -> tokens (B, L, D): all of a channel beside each other."""
        return fold(latents[:, self.positions.flatten()], self.places)

    def unpatchify(self, tokens: Tensor) -> Tensor:
        """Tokens (B, L, D) -> latents (B, N, C)."""
        return unfold(tokens, self.places)[:, self.positions.flatten().argsort()]

    def embed_classes(self, labels: Tensor) -> Tensor:
        """(B,) -> (B, W); `num_classes` stands for none."""
        known = self.class_emb(labels.clamp_max(self.num_classes - 1))
        return torch.where((labels < self.num_classes)[:, None], known, self.fake_latent)

    def encode(self, tokens: Tensor, visible: Tensor, classes: Tensor) -> Tensor:
        """Tokens (B, L, D) of which those at `visible` (B, k) are read, and classes (B, W) -> (B, S + k, W)."""
        size, table = self.config.buffer_size, self.encoder_pos_embed_learned[0]
        read = tokens.gather(1, visible[..., None].expand(-1, -1, tokens.shape[2]))
        x = self.z_proj(read.to(self.z_proj.weight.dtype)) + table[size + visible]
        buffer = classes[:, None] + table[:size]
        x = self.z_proj_ln(torch.cat([buffer.to(x.dtype), x], 1))
        for block in self.encoder_blocks:
            x = self.through(block, x)
        return self.encoder_norm(x)

    def decode(self, encoded: Tensor, visible: Tensor) -> Tensor:
        """(B, S + k, W) -> hidden states of all tokens (B, L, W), decided or not."""
        size = self.config.buffer_size
        x = self.decoder_embed(encoded)
        places = self.mask_token.to(x.dtype).expand(len(x), self.length, -1)
        places = places.scatter(1, visible[..., None].expand(-1, -1, x.shape[2]), x[:, size:])
        x = torch.cat([x[:, :size], places], 1) + self.decoder_pos_embed_learned
        for block in self.decoder_blocks:
            x = self.through(block, x)
        return self.decoder_norm(x)[:, size:] + self.diffusion_pos_embed_learned

    def forward(self, tokens: Tensor, visible: Tensor, class_labels: Tensor) -> Tensor:
        """Hidden states (B, L, W). Args: tokens: (B, L, D).   visible: (B, k), those decided.   class_labels: (B,)."""
        return self.decode(self.encode(tokens, visible, self.embed_classes(class_labels)), visible)

    def through(self, block: nn.Module, x: Tensor) -> Tensor:
        """One block, whose inner activations are computed again on the way back where that is wanted."""
        if self.gradient_checkpointing and torch.is_grad_enabled():
            return cast(Tensor, self._gradient_checkpointing_func(block, x))
        return cast(Tensor, block(x))

    # ---- sampling -------------------------------------------------------------------------------------------------

    def schedule(self, num_steps: int | None = None) -> list[Tensor]:
        """Groups of one random order, few tokens first. Raises ValueError when there are more steps than tokens."""
        order = token_order("random", self.token_grid).to(self.positions.device)[None]
        return [positions[0] for positions in self._split(order, self._steps(num_steps))]

    @property
    def token_grid(self) -> tuple[int, int]:
        """Tokens (patches of latents) a column and a row."""
        height, width = self.layout.grids[0]
        return height // self.config.patch_size, width // self.config.patch_size

    def in_order(self, name: str, num_steps: int | None = None) -> list[Tensor]:
        sizes = group_sizes(self.length, self._steps(num_steps))
        device = self.positions.device
        groups = [tokens.to(device) for tokens in order_groups(name, self.token_grid, sizes)]
        return [self.positions[tokens.sort().values].flatten() for tokens in groups]

    def groups(self, rng: Rng, num_steps: int | None = None, order: str | None = None) -> list[Tensor]:
        """(B, n), of each image's own random order, of which the last tokens come first, as in the release; or those of
        `in_order`, the same for every image."""
        if order is not None:
            return [positions.expand(len(rng), -1) for positions in self.in_order(order, num_steps)]
        return self._split(random_orders(rng.to(self.positions.device), self.length), self._steps(num_steps))

    def groups_around(
        self, keep: Tensor, rng: Rng, num_steps: int | None = None, order: str | None = None
    ) -> tuple[Tensor, list[Tensor]]:
        """Known tokens are read from the first step on; groups as in `groups`, of the others, no more than these.

        Of patches, those are known all of whose latents are. Raises: ValueError when images of a batch have different
        numbers of open tokens, which the encoder cannot read together, or none.
        """
        keep = keep.to(self.positions.device)
        still_open = ~keep[:, self.positions].all(-1)  # B L
        counts = still_open.sum(1)
        count = int(counts.max())
        if int(counts.min()) != count or count == 0:
            raise ValueError(
                f"of every image equally many tokens must be drawn, and at least one; these masks leave "
                f"{int(counts.min())} to {count}: draw images with other masks in another call"
            )
        if order is None:
            ranks = random_orders(rng.to(self.positions.device), self.length)
        else:  # the last come first
            ranks = self._tokens_of(torch.cat(self.in_order(order, num_steps))).flip(0).expand(len(keep), -1)
        ranks = ranks.gather(1, tokens_at(still_open.gather(1, ranks)))
        known = self.positions[tokens_at(~still_open)].flatten(1)
        return known, self._split(ranks, min(self._steps(num_steps), count))

    def _steps(self, num_steps: int | None) -> int:
        steps = min(self.config.num_steps, self.length) if num_steps is None else num_steps
        group_sizes(self.length, steps)
        return steps

    def _split(self, order: Tensor, steps: int) -> list[Tensor]:
        """Tokens in the order (B, m) -> positions (B, n p^2) of each step, rising token by token."""
        groups = order.flip(1).split(group_sizes(order.shape[1], steps), 1)
        return [self.positions[tokens.sort(1).values].flatten(1) for tokens in groups]

    def start(self, cond: Cond, null: Cond | None = None) -> MARState:
        device = self.positions.device
        tokens = torch.zeros(len(cond), self.length, self.places * self.layout.dim, device=device)
        return MARState(tokens, cond.beside(null).labels.to(device), self.places, self.diffloss.times())

    def predict(self, state: State, inputs: Tensor, positions: Tensor) -> Diffusion:
        """`inputs` are not read: what was appended is. `positions` (n,) or (B, n) are whole tokens, as `groups` gives
        them."""
        assert isinstance(state, MARState)
        tokens, visible = state.tokens, state.visible
        if state.guided:
            tokens, visible = tokens.repeat(2, 1, 1), visible.repeat(2, 1)
        z = self(tokens, visible, state.labels[: len(tokens)])
        wanted = self._tokens_of(positions).expand(len(state.tokens), -1).repeat(len(z) // len(state.tokens), 1)
        z = z.gather(1, wanted[..., None].expand(-1, -1, z.shape[2]))
        cond, *null = z.split(len(state.tokens))
        return self.diffloss.diffusion(cond, null[0] if null else None, self.places, state.times)

    def append(self, state: State, tokens: Tensor, positions: Tensor) -> None:
        """Record latents (B, n, C) at `positions` (n,) or (B, n), whole tokens as `groups` gives them."""
        assert isinstance(state, MARState)
        where = self._tokens_of(positions).expand(len(tokens), -1)
        values = fold(tokens, self.places).to(state.tokens)
        state.tokens.scatter_(1, where[..., None].expand_as(values), values)
        first = state.length // self.places
        state.order[:, first : first + where.shape[1]] = where
        state.length += positions.shape[-1]

    def _tokens_of(self, positions: Tensor) -> Tensor:
        """(n,) or (B, n) positions of whole tokens -> (m,) or (B, m) tokens. Raises ValueError on parts of tokens."""
        if positions.shape[-1] % self.places:
            raise ValueError(f"{positions.shape[-1]} positions are no whole patches of {self.places}")
        first = positions.unflatten(-1, (-1, self.places))[..., 0]
        return torch.searchsorted(self.positions[:, 0].contiguous(), first.contiguous())

    # ---- training -------------------------------------------------------------------------------------------------

    def draw_mask(self, rng: Rng) -> Tensor:
        """(B, L) bool: equally many tokens of every image, any of them. How many, the first image's numbers say."""
        u = float(rng[:1].uniform(torch.zeros(1, dtype=torch.int64), Draw.MASK, step=1))
        order = rng.uniform(torch.arange(self.length), Draw.MASK).argsort(dim=1, stable=True)
        return first_masked(order, mask_ratio(u, self.config.mask_ratio_min))

    def drop_classes(self, labels: Tensor, u: Tensor) -> Tensor:
        """In training, labels (B,) without a class where u (B,) is below the rate; else as they are."""
        if not self.training:
            return labels
        return labels.masked_fill(u.to(labels.device) < self.config.cond_drop_rate, self.num_classes)

    def losses(self, tokens: Tensor, labels: Tensor, mask: Tensor, t: Tensor, noise: Tensor) -> Losses:
        """The diffusion loss of masked tokens.

        Args:
            tokens: (B, L, D).   labels: (B,).   mask: (B, L) bool, with m in every row.
            t, noise: (R, B m) and (R, B m, D): R draws for each masked token, images in turn.
        """
        z = self(tokens, tokens_at(~mask), labels)[mask]  # B m W
        repeats = len(t)
        data = tokens[mask].repeat(repeats, 1)
        squares, bound = self.diffloss.loss(z.repeat(repeats, 1), data, t.flatten(), noise.flatten(0, 1))
        loss = (squares + bound).mean()
        return {"loss": loss, "mse": squares.mean(), "bound": bound.mean(), "masked": mask.float().mean()}

    def training_loss(self, tokens: Tensor, inputs: Tensor, cond: Cond, rng: Rng) -> Losses:  # type: ignore[override]
        """Diffusion loss of randomly masked tokens. In eval mode no class is dropped.

        Args: tokens: latents (B, N, C).   inputs: not read.   cond: class ids.
        Returns: loss; mse of the noise; bound, in bits a channel; masked, the share of masked tokens.
        """
        tokens, rng = self.patchify(tokens), rng.to(tokens.device)
        u = rng.uniform(torch.zeros(1, dtype=torch.int64), Draw.COND_DROP)[:, 0]
        mask = self.draw_mask(rng)
        where, times, noises = tokens_at(mask), [], []
        for repeat in range(self.config.diffusion_batch_mul):
            times.append((rng.uniform(where, Draw.SIGMA, step=repeat) * STEPS).long().flatten())
            noises.append(rng.normal(where, Draw.NOISE, step=repeat, count=tokens.shape[2]).flatten(0, 1))
        labels = self.drop_classes(cond.labels, u)
        return self.losses(tokens, labels, mask, torch.stack(times), torch.stack(noises))


def _builder(**preset: Any) -> Callable[..., MAR]:
    return lambda **overrides: cast(MAR, MAR(**{**preset, **overrides}))


def _sizes(dim: int, depth: int, heads: int, head_width: int, head_depth: int) -> dict[str, Any]:
    transformers = {f"{part}_{name}": value for part in ("encoder", "decoder") for name, value in
                    (("dim", dim), ("depth", depth), ("heads", heads))}  # fmt: skip
    return {**transformers, "head_width": head_width, "head_depth": head_depth}


_TINY: dict[str, Any] = {
    **_sizes(32, 1, 2, 24, 1),
    "num_classes": 3,
    "grid": (8, 8),
    "latent_dim": 4,
    "buffer_size": 3,
    "dropout": 0.0,
    "attention_dropout": 0.0,
    "cond_drop_rate": 0.4,
    "num_steps": 4,
}
_TINY_TOKENIZER: dict[str, Any] = {
    "image_size": 16,
    "latent_channels": 4,
    "block_out_channels": (8, 8),
    "down_block_types": None,
    "layers_per_block": 1,
    "norm_num_groups": 4,
}
_FASHION = {
    **_sizes(160, 4, 5, 192, 3),
    "num_classes": 10,
    "grid": (8, 8),
    "latent_dim": 4,
    "buffer_size": 16,
    "num_steps": 16,
}
_PRESETS: dict[str, tuple[dict[str, Any], str, str, dict[str, Any]]] = {
    "mar_b": ({}, "kl16", "MAR-B at 256x256, 208 M parameters", _TINY),
    "mar_l": (_sizes(1024, 16, 16, 1280, 8), "kl16", "MAR-L at 256x256, 478 M parameters", _TINY),
    "mar_h": (_sizes(1280, 20, 16, 1536, 12), "kl16", "MAR-H at 256x256, 942 M parameters", _TINY),
    "mar_fashion": (
        _FASHION,
        "kl_vae_fashion",
        "Fashion-MNIST at 32x32, 3.3 M parameters",
        {**_TINY, "patch_size": 2},
    ),
}
for _name, (_preset, _tokenizer, _summary, _tiny) in _PRESETS.items():
    register_model(
        ModelEntry(
            _name,
            "generator",
            _builder(**_preset),
            _summary,
            tokenizer=_tokenizer,
            tiny=_tiny,
            tiny_tokenizer=_TINY_TOKENIZER,
        )
    )
for _size, _long, _fid, _scale in (("b", "base", "2.31", 2.9), ("l", "large", "1.78", 3.0), ("h", "huge", "1.55", 3.2)):
    register_checkpoint(
        Checkpoint(
            name=f"mar_{_size}.in1k_256",
            repo_id="LTH14/mar",
            filename=f"pretrained_models/mar/mar_{_long}/checkpoint-last.pth",
            licence="MIT (LTH14/mar)",
            paper="arXiv 2406.11838",
            resolution=256,
            official_score=f"FID {_fid} (README), 50,000 images with these settings",
            tokenizer="kl16.in1k",
            sampling={
                "guidance_scale": _scale,
                "guidance_schedule": "linear",
                "num_steps": 256,
                "head_steps": 100,
            },
        )
    )
