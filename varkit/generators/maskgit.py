"""The masked generators of TiTok (Yu et al., arXiv 2406.07550, section 3.3), after MaskGIT (arXiv 2202.04200).

Source: bytedance/1d-tokenizer: modeling/maskgit.py (942a96f): `ImageBert`, a BERT encoder with norms after the
branches, and `UViTBert`, a U-shaped transformer with norms before them. Both read [class, tokens], masked where nothing
is decided, and predict every token at once. What differs: labels and masks are drawn by keyed random numbers.
Embedding rows: V codes, the mask, the classes, the dropped class.

Shapes: B batch, L tokens, S = L + 1 entries with the class, C width, V codebook.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
import torch.nn.functional as F
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.modeling_utils import ModelMixin
from torch import Tensor, nn

from varkit.conditioning.label import drop_labels
from varkit.heads.categorical import Categorical
from varkit.hub import HubMixin
from varkit.interfaces import Cond, Generator, Losses, State
from varkit.layers.vit import Attention
from varkit.layout import TokenLayout
from varkit.orders import GROUPED, order_groups, token_order
from varkit.registry import Checkpoint, ModelEntry, register_checkpoint, register_model
from varkit.rng import Draw, Rng


class FeedForward(nn.Module):
    def __init__(self, dim: int, hidden: int, dropout: float) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden)
        self.fc2 = nn.Linear(hidden, dim)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        return self.dropout(self.fc2(F.gelu(self.fc1(x))))


class Block(nn.Module):
    """A transformer block with its norms before the branches (UViT) or after the sums (BERT).

    Args: skip: whether it reads, beside its input, what an earlier block gave.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        hidden: int,
        dropout: float,
        attention_dropout: float,
        eps: float,
        *,
        norm_after: bool,
        skip: bool = False,
    ) -> None:
        super().__init__()
        self.norm_after = norm_after
        self.norm1 = nn.LayerNorm(dim, eps)
        self.attn = Attention(dim, num_heads, norm_after, dropout, attention_dropout)  # BERT's qkv has a bias
        self.norm2 = nn.LayerNorm(dim, eps)
        self.mlp = FeedForward(dim, hidden, dropout)
        if skip:
            self.skip_linear = nn.Linear(2 * dim, dim)

    def forward(self, x: Tensor, skip: Tensor | None = None) -> Tensor:
        if skip is not None:
            x = self.skip_linear(torch.cat([x, skip], -1))
        if self.norm_after:
            x = self.norm1(x + self.attn(x))
            return self.norm2(x + self.mlp(x))
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class MaskedState(State):
    """The tokens decided so far, the mask elsewhere; nothing is cached, for every step reads all of them anew."""

    def __init__(self, tokens: Tensor, labels: Tensor, guided: bool, mask_id: int) -> None:
        self.tokens, self.labels, self.guided, self.mask_id = tokens, labels, guided, mask_id
        self.order = torch.empty(tokens.shape[1], dtype=torch.int64, device=tokens.device)
        self.length = 0

    def rewind(self, count: int) -> None:
        if not 0 <= count <= self.length:
            raise ValueError(f"cannot rewind {count} of {self.length} positions")
        self.tokens[:, self.order[self.length - count : self.length]] = self.mask_id
        self.length -= count

    def reset(self) -> None:
        self.rewind(self.length)


class MaskedGenerator(Generator):
    """One whose `forward` reads all ids, (B, L) or (B, L, G) with `mask_id` where open, and classes (B,)."""

    causal = False
    sampler = "MaskedSampler"

    def predict(self, state: State, inputs: Tensor, positions: Tensor) -> Categorical:
        """`inputs` are not read: an open position reads as the mask, a decided one as what was appended there."""
        assert isinstance(state, MaskedState)
        ids = torch.cat([state.tokens, state.tokens]) if state.guided else state.tokens
        logits = cast(Any, self)(ids, state.labels)[:, positions]
        return Categorical(*logits.chunk(2)) if state.guided else Categorical(logits)

    def append(self, state: State, tokens: Tensor, positions: Tensor) -> None:
        """Record tokens (B, n) or (B, n, G) at `positions` (n,); `mask_id` stands for one that is open again."""
        assert isinstance(state, MaskedState)
        n = positions.shape[-1]
        state.tokens[:, positions] = tokens
        state.order[state.length : state.length + n] = positions
        state.length += n


class MaskGIT(HubMixin, ModelMixin, ConfigMixin, MaskedGenerator):
    """The class-conditional masked generator. The defaults are the released one of TiTok-L-32.

    Args:
        backbone: `vit` (BERT) or `uvit`, whose second half reads the first; its depth is even.
        num_classes: not counting the null class.
        depth, hidden_size, num_heads, mlp_hidden: of the transformer; a UViT has one more block in its middle.
        dropout, attention_dropout: in training.   cond_drop_rate: how often a label becomes the null class.
        num_steps: of sampling, unless a sampler says otherwise.
        grid, codebook_size, latent_dim: of the tokenizer; a grid (n,) is a sequence.
    Raises: ValueError on an impossible combination.
    """

    _supports_gradient_checkpointing = True
    _no_split_modules = ("Block",)
    training_options = frozenset({"label_smoothing", "unmasked_weight"})
    no_decay = ("pos_embed", "type_embed", "embeddings")
    """Name parts of parameters trained without weight decay, besides biases and 1-D tensors."""
    class_embedding = "embeddings"
    lora_targets = ("*.attn.qkv", "*.attn.proj", "*.mlp.fc1", "*.mlp.fc2")
    free_arguments = frozenset({"dropout", "attention_dropout", "cond_drop_rate", "num_steps"})
    """These three: see `varkit.training.finetune.Tunable`."""

    @register_to_config
    def __init__(
        self,
        backbone: str = "vit",
        num_classes: int = 1000,
        depth: int = 24,
        hidden_size: int = 768,
        num_heads: int = 16,
        mlp_hidden: int = 3072,
        dropout: float = 0.1,
        attention_dropout: float = 0.1,
        cond_drop_rate: float = 0.1,
        num_steps: int = 8,
        grid: Sequence[int] = (32,),
        codebook_size: int = 4096,
        latent_dim: int = 12,
    ) -> None:
        super().__init__()
        if backbone not in ("vit", "uvit"):
            raise ValueError(f"backbone must be vit or uvit; got {backbone!r}")
        if hidden_size % num_heads:
            raise ValueError(f"hidden_size {hidden_size} must be a multiple of num_heads {num_heads}")
        if backbone == "uvit" and depth % 2:
            raise ValueError(f"the depth of a uvit must be even; got {depth}")
        self.layout = TokenLayout((tuple(grid),), codebook_size, latent_dim)
        self.num_classes = num_classes
        self.mask_id: int = codebook_size
        self.gradient_checkpointing = False
        vit = backbone == "vit"
        sizes = (hidden_size, num_heads, mlp_hidden, dropout, attention_dropout, 1e-12 if vit else 1e-5)
        self.embeddings = nn.Embedding(codebook_size + 1 + num_classes + 1, hidden_size)
        self.pos_embed = nn.Parameter(torch.zeros(1, self.layout.length + 1, hidden_size))
        if vit:
            self.type_embed = nn.Parameter(torch.zeros(2, hidden_size))  # as in BERT; only the first row is read
            self.norm = nn.LayerNorm(hidden_size, 1e-12)
            self.embed_dropout = nn.Dropout(dropout)
            self.blocks: Any = nn.ModuleList(Block(*sizes, norm_after=True) for _ in range(depth))
        else:
            self.in_blocks: Any = nn.ModuleList(Block(*sizes, norm_after=False) for _ in range(depth // 2))
            self.mid_block = Block(*sizes, norm_after=False)
            self.out_blocks: Any = nn.ModuleList(Block(*sizes, norm_after=False, skip=True) for _ in range(depth // 2))
            self.norm = nn.LayerNorm(hidden_size, 1e-5)
        self.lm_head = nn.Linear(hidden_size, codebook_size)
        self.init_weights()

    @torch.no_grad()
    def init_weights(self) -> None:
        """Normal of std 0.02, truncated for the UViT; biases 0. A second call starts afresh."""
        fill = nn.init.normal_ if self.config.backbone == "vit" else nn.init.trunc_normal_
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Embedding):
                fill(module.weight, std=0.02)
            if isinstance(module, nn.Linear) and module.bias is not None:
                nn.init.zeros_(module.bias)
        fill(self.pos_embed, std=0.02)
        if self.config.backbone == "vit":
            fill(self.type_embed, std=0.02)

    # ---- the network --------------------------------------------------------------------------------------

    def forward(self, ids: Tensor, class_labels: Tensor) -> Tensor:
        """Partly masked ids (B, L) and classes (B,) -> logits of all positions (B, L, V) float32."""
        first = class_labels[:, None] + self.mask_id + 1
        x = self.embeddings(torch.cat([first, ids], 1)) + self.pos_embed
        if self.config.backbone == "vit":
            x = self.embed_dropout(self.norm(x + self.type_embed[0]))
            for block in self.blocks:
                x = self.through(block, x)
        else:
            skips = []
            for block in self.in_blocks:
                x = self.through(block, x)
                skips.append(x)
            x = self.through(self.mid_block, x)
            for block in self.out_blocks:
                x = self.through(block, x, skips.pop())
            x = self.norm(x)
        return self.lm_head(x[:, 1:]).float()

    def through(self, block: nn.Module, *inputs: Tensor) -> Tensor:
        """One block, whose inner activations are computed again on the way back where that is wanted."""
        if self.gradient_checkpointing and torch.is_grad_enabled():
            return cast(Tensor, self._gradient_checkpointing_func(block, *inputs))
        return cast(Tensor, block(*inputs))

    # ---- sampling -----------------------------------------------------------------------------------------

    def schedule(self, num_steps: int | None = None) -> list[Tensor]:
        """Groups of a random order, few tokens first, as many as the arccos schedule of `MaskedSampler` decides.

        Raises: ValueError when there are more steps than tokens.
        """
        length = self.layout.length
        steps = min(self.config.num_steps, length) if num_steps is None else num_steps
        if not 1 <= steps <= length:
            raise ValueError(f"num_steps must be in 1 to {length}, the number of tokens; got {num_steps}")
        left = [length]  # open positions: at least one is decided a step, and one remains for each step to come
        for step in range(1, steps):
            wanted = math.floor(length * math.acos(step / steps) * 2 / math.pi)
            left.append(max(min(wanted, left[-1] - 1), steps - step))
        sizes = [a - b for a, b in zip(left, [*left[1:], 0], strict=True)]
        order = token_order("random", self.layout.grids[0]).to(self.pos_embed.device)
        return list(order.split(sizes))

    def in_order(self, name: str, num_steps: int | None = None) -> list[Tensor]:
        sizes = [1] * self.layout.length
        if num_steps is not None or name in GROUPED:
            sizes = [len(group) for group in self.schedule(num_steps)]
        return [group.to(self.pos_embed.device) for group in order_groups(name, self.layout.grids[0], sizes)]

    def start(self, cond: Cond, null: Cond | None = None) -> MaskedState:
        tokens = torch.full((len(cond), self.layout.length), self.mask_id, device=self.pos_embed.device)
        return MaskedState(tokens, cond.beside(null).labels, null is not None, self.mask_id)

    # ---- training -----------------------------------------------------------------------------------------

    def draw_mask(self, rng: Rng) -> Tensor:
        """(B, L) bool: the share acos(u) 2 / pi of each image, at least one token, any of them."""
        rng, length = rng.to(self.pos_embed.device), self.layout.length
        u = rng.uniform(torch.zeros(1, dtype=torch.int64), Draw.MASK, step=1)  # B 1
        count = (length * torch.acos(u) * 2 / math.pi).floor().clamp_min(1)
        places = torch.arange(length, device=u.device)
        return rng.uniform(places, Draw.MASK).argsort(dim=1, stable=True).argsort(1) < count

    def training_loss(  # type: ignore[override]
        self,
        tokens: Tensor,
        inputs: Tensor,
        cond: Cond,
        rng: Rng,
        *,
        label_smoothing: float = 0.1,
        unmasked_weight: float = 0.1,
    ) -> Losses:
        """Weighted cross entropy of randomly masked tokens. In eval mode no label is dropped.

        Args:
            tokens: (B, L) ids.   inputs: not read.   cond: class ids.
            label_smoothing: in [0, 1).   unmasked_weight: of the tokens that are shown.
        Returns: loss; accuracy on masked tokens; masked, their share.
        """
        labels, mask = cond.labels, self.draw_mask(rng)
        if self.training:
            labels = drop_labels(labels, rng, self.config.cond_drop_rate, self.num_classes)
        logits = self(tokens.masked_fill(mask, self.mask_id), labels)
        loss, accuracy = masked_cross_entropy(logits, tokens, mask, label_smoothing, unmasked_weight)
        return {"loss": loss, "accuracy": accuracy, "masked": mask.float().mean()}


def masked_cross_entropy(
    logits: Tensor, target: Tensor, mask: Tensor, label_smoothing: float = 0.1, unmasked_weight: float = 0.1
) -> tuple[Tensor, Tensor]:
    """The weighted mean of all tokens' cross entropies, and the images' mean share of masked tokens that are right.

    Source: bytedance/1d-tokenizer: modeling/modules/losses.py, `MLMLoss`.
    Args: logits: (B, L, V).   target: (B, L) ids.   mask: (B, L) bool, true where the token was hidden.
    """
    each = F.cross_entropy(logits.transpose(1, 2), target, label_smoothing=label_smoothing, reduction="none")  # B L
    weight = torch.where(mask, 1.0, unmasked_weight).to(each)
    right = ((logits.detach().argmax(-1) == target) & mask).sum(1) / mask.sum(1).clamp_min(1)  # B
    return (each * weight).sum() / (weight.sum() + 1e-8), right.mean()


def _builder(**preset: Any) -> Callable[..., MaskGIT]:
    return lambda **overrides: cast(MaskGIT, MaskGIT(**{**preset, **overrides}))


_TINY: dict[str, Any] = {
    "num_classes": 3,
    "depth": 2,
    "hidden_size": 32,
    "num_heads": 2,
    "mlp_hidden": 48,
    "num_steps": 4,
    "grid": (6,),
    "codebook_size": 24,
    "latent_dim": 4,
}
_TINY_TOKENIZER: dict[str, Any] = {
    "num_tokens": 6,
    "codebook_size": 24,
    "latent_dim": 4,
    "resolution": 16,
    "patch": 4,
    "encoder_size": (32, 1, 2),
    "decoder_size": (32, 1, 2),
    "proxy_codes": 12,
    "proxy_dim": 8,
    "proxy_channels": 32,
    "proxy_multipliers": (1, 1, 1),
}
_UVIT: dict[str, Any] = {
    "backbone": "uvit",
    "depth": 20,
    "hidden_size": 1024,
    "mlp_hidden": 4096,
    "num_steps": 64,
    "grid": (128,),
}
_FASHION: dict[str, Any] = {
    "backbone": "uvit",
    "num_classes": 10,
    "depth": 6,
    "hidden_size": 160,
    "num_heads": 5,
    "mlp_hidden": 640,
    "grid": (32,),
    "codebook_size": 512,
    "latent_dim": 16,
}
_PRESETS: dict[str, tuple[dict[str, Any], str, str]] = {
    "maskgit_titok_l32": ({}, "titok_l32", "masked generator over TiTok-L-32: BERT, 177 M parameters"),
    "maskgit_titok_b64": ({"grid": (64,)}, "titok_b64", "masked generator over TiTok-B-64: BERT, 177 M parameters"),
    "maskgit_titok_s128": (_UVIT, "titok_s128", "masked generator over TiTok-S-128: UViT, 295 M parameters"),
    "maskgit_titok_fashion": (_FASHION, "titok_fashion", "Fashion-MNIST at 32x32: UViT, 2.6 M parameters"),
}
for _name, (_preset, _tokenizer, _summary) in _PRESETS.items():
    register_model(
        ModelEntry(
            _name,
            "generator",
            _builder(**_preset),
            _summary,
            tokenizer=_tokenizer,
            tiny=_TINY,
            tiny_tokenizer=_TINY_TOKENIZER,
        )
    )
# The README's guidance s of cond + s (cond - uncond) is w = 1 + s here; power-cosine is w in the release too.
for _size, _fid, _sampling in (
    ("l32", "2.77", {"guidance_scale": 5.5, "guidance_schedule": "linear-open", "choice_temperature": 9.5}),
    ("b64", "2.48", {"guidance_scale": 4.0, "guidance_schedule": "linear-open", "choice_temperature": 11.0}),
    (
        "s128",
        "1.97",
        {
            "guidance_scale": 6.9,
            "guidance_schedule": "power-cosine",
            "guidance_power": 3.0,
            "choice_temperature": 2.8,
        },
    ),
):
    register_checkpoint(
        Checkpoint(
            name=f"maskgit_titok_{_size}.in1k_256",
            repo_id="fun-research/TiTok",
            filename=f"generator_titok_{_size}.bin",
            licence="Apache-2.0",
            paper="arXiv 2406.07550",
            resolution=256,
            official_score=f"FID {_fid} (README), ADM evaluator, 50,000 images with these settings",
            tokenizer=f"titok_{_size}.in1k_256",
            sampling={**_sampling, "num_steps": 64 if _size == "s128" else 8, "softmax_annealing": True},
        )
    )
