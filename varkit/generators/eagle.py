"""EAGLE: a drafter that continues the hidden states of a larger model (Li et al., arXiv 2401.15077 and 2406.16858).

Sources: SafeAILab/EAGLE: eagle/model/cnets1.py (cb7e084); jadohu/LANTERN: models/drafters/cnets_llamagen.py,
cnets_anole.py (3a56e45), whose parameter names these are. One transformer layer reads, at each place of the sequence, a
token and the state that the target predicted it from, and gives the state that the target would predict the next token
from. The target's own head makes logits of it; the head is no part of the drafter, the embedding is a frozen copy.

The pairing is one ahead: an entry holds token t + 1 beside state t. Of a target whose condition is T prefix entries,
the drafter has T - 1 (token 0 beside the states of the first T - 1), then one for each image token. As in the target,
the rotary table is zero for the prefix.

Shapes: B images, R rows (B, or 2 B under guidance, those without a condition below), n entries, C width, H heads, D
head width, P prefix entries, L image tokens, S places of the cache.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
import torch.nn.functional as F
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.modeling_utils import ModelMixin
from torch import Tensor, nn

from varkit.hub import HubMixin
from varkit.layers.llama import RMSNorm, Rotary
from varkit.layout import TokenLayout, square_grids
from varkit.registry import Checkpoint, ModelEntry, register_checkpoint, register_model


class LineRotary(nn.Module):
    """Rotates queries and keys by their place in a line; the halves of each head are the pairs (Chameleon)."""

    frequencies: Tensor  # D/2

    def __init__(self, head_dim: int, base: float) -> None:
        super().__init__()
        self.register_buffer("frequencies", base ** -(torch.arange(0, head_dim, 2) / head_dim), persistent=False)

    def forward(self, x: Tensor, positions: Tensor) -> Tensor:
        """Args: x: (R, n, H, D).   positions: (R, n)."""
        angles = (positions[..., None] * self.frequencies.float())[:, :, None]  # R n 1 D/2
        first, second = x.float().chunk(2, -1)
        cos, sin = angles.cos(), angles.sin()
        return torch.cat([first * cos - second * sin, second * cos + first * sin], -1).type_as(x)


class HeadNorm(nn.Module):
    """A layer norm over each head, with weights of its own for each."""

    def __init__(self, heads: int, head_dim: int) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.ones(heads, head_dim)), nn.Parameter(torch.zeros(heads, head_dim))

    def forward(self, x: Tensor) -> Tensor:
        return F.layer_norm(x, x.shape[-1:], eps=1e-5) * self.weight + self.bias


class EagleState:
    """Keys and values of a batch: the stable ones, and behind them those of drafts, which the next round overwrites.

    Args: lengths: (B,) int64, stable entries of each image.   guided: whether rows without a condition lie below.
    """

    def __init__(self, keys: Tensor, values: Tensor, lengths: Tensor, guided: bool) -> None:
        self.keys, self.values, self.lengths, self.guided = keys, values, lengths, guided  # keys, values: R H S D

    def rows(self, x: Tensor) -> Tensor:
        """(B, ...) -> (R, ...)."""
        return torch.cat([x, x]) if self.guided else x

    def keep(self, images: Tensor, rows: Tensor) -> None:
        """Go on with these images, and these rows of the cache."""
        self.keys, self.values, self.lengths = self.keys[rows], self.values[rows], self.lengths[images]

    def write(self, k: Tensor, v: Tensor, slots: Tensor) -> None:
        """k, v: (R, H, n, D).   slots: (R, n)."""
        where = slots[:, None, :, None].expand_as(k)
        self.keys.scatter_(2, where, k)
        self.values.scatter_(2, where, v)


class Attention(nn.Module):
    def __init__(self, dim: int, heads: int, norm_heads: bool) -> None:
        super().__init__()
        self.heads = heads
        self.q_proj, self.k_proj, self.v_proj, self.o_proj = (nn.Linear(dim, dim, bias=False) for _ in range(4))
        self.q_norm, self.k_norm = (HeadNorm(heads, dim // heads) if norm_heads else nn.Identity() for _ in range(2))

    def forward(
        self, x: Tensor, rotary: nn.Module, positions: Tensor, mask: Tensor | None, cache: Any, slots: Tensor | None
    ) -> Tensor:
        q, k, v = (p(x).unflatten(-1, (self.heads, -1)) for p in (self.q_proj, self.k_proj, self.v_proj))  # R n H D
        q, k = rotary(self.q_norm(q), positions), rotary(self.k_norm(k), positions)
        q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
        if cache is not None:
            cache.write(k, v, slots)
            k, v = cache.keys, cache.values
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None)
        return self.o_proj(out.transpose(1, 2).flatten(2))


class FeedForward(nn.Module):
    """SwiGLU."""

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.gate_proj, self.up_proj = (nn.Linear(dim, hidden, bias=False) for _ in range(2))
        self.down_proj = nn.Linear(hidden, dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Layer(nn.Module):
    def __init__(self, dim: int, heads: int, hidden: int, eps: float, norm_input: bool, norm_heads: bool) -> None:
        super().__init__()
        self.self_attn = Attention(dim, heads, norm_heads)
        self.mlp = FeedForward(dim, hidden)
        self.input_layernorm: nn.Module = RMSNorm(dim, eps) if norm_input else nn.Identity()
        self.post_attention_layernorm = RMSNorm(dim, eps)

    def forward(self, x: Tensor, *rest: Any) -> Tensor:
        x = x + self.self_attn(self.input_layernorm(x), *rest)
        return x + self.mlp(self.post_attention_layernorm(x))


class Eagle(HubMixin, ModelMixin, ConfigMixin):
    """The drafter's network. The defaults are LANTERN's drafter of the text-conditional LlamaGen at 256 px.

    Args:
        codebook_size: V, of the target's embedding.   hidden_size: C, the target's.
        num_heads, ffn_size, norm_eps: of the layer.   bias: of the layer that joins token and state.
        prefix_length: P, one fewer than the target's.   grid: of image tokens, a side or (h, w).
        line_length: entries in a line of one axis instead of a grid, prefix and image together (Chameleon).
        norm_input: whether the layer norms what it reads.   norm_heads: queries and keys, each head by itself.
        official_quirks: trained on states that LANTERN's LlamaGen gives a caption's padding, see
            `varkit.generators.llamagen.released_padding`: then the target gives those.
    Raises: ValueError where heads do not divide evenly.
    """

    _no_split_modules = ("Layer",)

    @register_to_config
    def __init__(
        self,
        codebook_size: int = 16384,
        hidden_size: int = 1280,
        num_heads: int = 20,
        ffn_size: int = 3584,
        prefix_length: int = 119,
        grid: int | Sequence[int] = 16,
        line_length: int | None = None,
        rope_base: float = 10000.0,
        norm_eps: float = 1e-6,
        norm_input: bool = False,
        norm_heads: bool = False,
        bias: bool = True,
        official_quirks: bool = False,
    ) -> None:
        super().__init__()
        if hidden_size % num_heads or (hidden_size // num_heads) % 4:
            raise ValueError(f"hidden_size {hidden_size} must be a multiple of 4 * num_heads ({num_heads})")
        grids = square_grids([grid]) if line_length is None else ((line_length - prefix_length,),)
        self.layout = TokenLayout(grids, codebook_size, hidden_size)
        self.prefix_length, self.length = prefix_length, prefix_length + self.layout.length
        self.embed_tokens: Any = nn.Embedding(codebook_size, hidden_size)
        self.fc = nn.Linear(2 * hidden_size, hidden_size, bias=bias)
        self.layers: Any = nn.ModuleList([Layer(hidden_size, num_heads, ffn_size, norm_eps, norm_input, norm_heads)])
        head_dim = hidden_size // num_heads
        self.rotary: nn.Module = (
            LineRotary(head_dim, rope_base)
            if line_length is not None
            else Rotary(grids[0], head_dim, rope_base, prefix_length)
        )
        self.init_weights()

    @torch.no_grad()
    def init_weights(self, std: float = 0.02) -> None:
        """Linear and Embedding weights normal with `std`, biases zero."""
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Embedding):
                nn.init.normal_(module.weight, std=std)
        if self.fc.bias is not None:
            nn.init.zeros_(self.fc.bias)

    @classmethod
    def of(cls, target: Any, **overrides: Any) -> Eagle:
        """A fresh drafter of a `LlamaGen`: its sizes, and a frozen copy of its embedding.

        Args: overrides: constructor arguments to use instead.
        """
        sizes = {
            "codebook_size": target.layout.codebook_size,
            "hidden_size": target.config.hidden_size,
            "num_heads": target.config.num_heads,
            "ffn_size": target.layers[0].feed_forward.w1.out_features,
            "prefix_length": target.prefix_length - 1,
            "grid": list(target.layout.grids[0]),
            "rope_base": target.config.rope_base,
        }
        model = cast(Eagle, cls(**{**sizes, **overrides}))
        model.require(target)
        with torch.no_grad():
            model.embed_tokens.weight.copy_(target.tok_embeddings.weight)
        model.embed_tokens.requires_grad_(False)
        return model

    def require(self, target: Any) -> None:
        """Raises ValueError, showing both sides, unless this drafts for a `LlamaGen` of these sizes."""
        if not hasattr(target, "prefix_length"):
            raise ValueError(f"an EAGLE drafter continues the states of LlamaGen; {type(target).__name__} is none")
        mine = {
            "codebook": self.layout.codebook_size,
            "width": self.config.hidden_size,
            "grid": self.layout.grids[0],
            "prefix": self.prefix_length + 1,
        }
        theirs = {
            "codebook": target.layout.codebook_size,
            "width": target.config.hidden_size,
            "grid": target.layout.grids[0],
            "prefix": target.prefix_length,
        }
        if mine != theirs:
            raise ValueError(
                f"this drafter was made for another target: it has {mine}, the target {theirs}. Take the drafter that "
                f"was trained with the target, or train one with train/train_drafter.py"
            )

    # ---- the network ----------------------------------------------------------------------------------------------

    def join(self, ids: Tensor, hidden: Tensor) -> Tensor:
        """Tokens (R, n) and states (R, n, C) -> (R, n, C)."""
        return self.fc(torch.cat([self.embed_tokens(ids), hidden.to(self.fc.weight.dtype)], -1))

    def forward(self, ids: Tensor, hidden: Tensor) -> Tensor:
        """The next states of a whole sequence from its start, (R, n, C). Args: ids: (R, n).   hidden: (R, n, C)."""
        positions = torch.arange(ids.shape[1], device=ids.device)[None]
        return self.layers[0](self.join(ids, hidden), self.rotary, positions, None, None, None)

    def start(self, batch: int, guided: bool, room: int) -> EagleState:
        """An empty state. Args: room: places for drafts, and at least as many as one `extend` brings entries."""
        like = self.fc.weight
        heads = self.config.num_heads
        shape = ((1 + guided) * batch, heads, self.length + room, self.config.hidden_size // heads)
        lengths = torch.zeros(batch, dtype=torch.int64, device=like.device)
        return EagleState(like.new_zeros(shape), like.new_zeros(shape), lengths, guided)

    def extend(self, state: EagleState, ids: Tensor, hidden: Tensor, count: Tensor) -> Tensor:
        """Add decided entries; the keys of drafts are forgotten.

        Args: ids: (B, n).   hidden: (R, n, C).   count: (B,), how many of the n are real, the first ones.
        Returns: (R, n, C), the states after each.
        """
        order = torch.arange(ids.shape[1], device=ids.device)
        slots = state.lengths[:, None] + order  # B n
        places = torch.arange(state.keys.shape[2], device=ids.device)
        out = self._step(state, ids, hidden, slots, slots, places <= slots[..., None])
        state.lengths = state.lengths + count
        return out

    def branch(self, state: EagleState, ids: Tensor, hidden: Tensor, ancestry: Tensor, depth: int) -> Tensor:
        """Drafted nodes of one depth, 1 for those below the newest decided token.

        Args: ids: (B, m).   hidden: (R, m, C).   ancestry: (B, m, M) bool: which of the M drafted nodes so far, these m
            the last of them, each node sees: its ancestors and itself.
        Returns: (R, m, C), the states after each.
        """
        many, every = ids.shape[1], torch.arange(ancestry.shape[2], device=ids.device)
        drafts = state.lengths[:, None] + every  # B M
        places = torch.arange(state.keys.shape[2], device=ids.device)
        mask = (places < state.lengths[:, None])[:, None].repeat(1, many, 1)  # B m S
        mask.scatter_(2, drafts[:, None].expand_as(ancestry), ancestry)
        positions = (state.lengths[:, None] + depth - 1).expand(-1, many)
        return self._step(state, ids, hidden, drafts[:, -many:], positions, mask)

    def _step(
        self, state: EagleState, ids: Tensor, hidden: Tensor, slots: Tensor, positions: Tensor, mask: Tensor
    ) -> Tensor:
        """slots, positions: (B, n), in the cache and in the sequence; drafts beyond its end stand at its end."""
        positions = state.rows(positions.clamp_max(self.length - 1))
        x = self.join(state.rows(ids), hidden)
        return self.layers[0](x, self.rotary, positions, state.rows(mask)[:, None], state, state.rows(slots))


def _builder(**preset: Any) -> Callable[..., Eagle]:
    return lambda **overrides: cast(Eagle, Eagle(**{**preset, **overrides}))


CHAMELEON: dict[str, Any] = {
    "codebook_size": 65536,
    "hidden_size": 4096,
    "num_heads": 32,
    "ffn_size": 11008,
    "prefix_length": 0,
    "line_length": 4096,
    "norm_eps": 1e-5,
    "norm_input": True,
    "norm_heads": True,
}
_TINY: dict[str, Any] = {"codebook_size": 12, "hidden_size": 32, "num_heads": 2, "ffn_size": 48, "prefix_length": 4}
for _name, _preset, _summary in (
    ("eagle_llamagen_t2i_xl", {}, "EAGLE drafter of LlamaGen-XL from text at 256x256, 45 M parameters"),
    ("eagle_llamagen_t2i_xl_512", {"grid": 32}, "EAGLE drafter of LlamaGen-XL from text at 512x512, 45 M parameters"),
    ("eagle_chameleon", CHAMELEON, "EAGLE drafter of Anole and Lumina-mGPT (Chameleon 7B), 504 M parameters"),
):
    register_model(ModelEntry(_name, "drafter", _builder(**_preset), _summary, tiny=_TINY))

for _checkpoint, _repository, _overrides in (
    ("eagle_llamagen_t2i_xl.stage1_256", "jadohu/llamagen_drafter", {}),
    ("eagle_llamagen_t2i_xl_512.stage2_512", "jadohu/llamagen2_drafter", {"grid": 32}),
    ("eagle_chameleon.anole", "jadohu/anole_drafter", {}),
):
    register_checkpoint(
        Checkpoint(
            name=_checkpoint,
            repo_id=_repository,
            filename="pytorch_model.bin",
            licence="Chameleon licence: research only",
            paper="arXiv 2410.03355",
            resolution=512 if "512" in _checkpoint or "anole" in _checkpoint else 256,
            official_score="a drafter has none: it changes how fast images come, not which",
            overrides=_overrides,
        )
    )
