"""NBP: next-block prediction of video tokens (Ren et al., arXiv 2502.07737).

Source: RenShuhuai-Andy/NBP: nbp/lm_transformer.py, nbp/modules/gpt.py (421e936), whose parameter names these are; the
network is minGPT's. What differs: blocks are any number of tokens; the cache is sized once; guidance runs; an own model
is conditioned on a class and can predict its first block; ids that stand for no video token are never drawn (the
release draws from its whole vocabulary, reads what it drew, and clamps at the end: `predict_joint`, `append_joint` and
`video_ids` do so).

A block is so many tokens in raster order of (t, h, w), such as a row. Each token predicts the one a block further on,
so the tokens of a block are drawn at once, independently of each other; a block sees itself and all before it. What is
read in place of the tokens of the first block, one of three:

    begin    learned tokens, one for each position of the block: our own models.
    hybrid   one token (id 0) which predicts the first; the first block is drawn token by token, each seeing those
             before. Behind its last token stand the block's other learned tokens, so that it predicts the second block
             as a whole. The released models of UCF-101.
    neither  nothing: the first block must be given, as the first frames are. The released models of Kinetics-600.

Before all of it stands the condition, which sees itself alone and is seen by all: a token of the class, or the text of
the class; or there is none. Ids of the one vocabulary, called joint here: learned tokens, text, video.

Shapes: B batch, R rows (2 B with guidance), L video tokens, n of them, P the length of the condition, S = P + L, D
width, V video ids, J joint ids.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, Literal, cast

import torch
import torch.nn.functional as F
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.modeling_utils import ModelMixin
from torch import Tensor, nn

from varkit.conditioning.label import drop_labels
from varkit.heads.categorical import Categorical, weighted_cross_entropy
from varkit.hub import HubMixin
from varkit.interfaces import Cond, Generator, Losses, State
from varkit.layers.cache import KVCache
from varkit.layers.modulated import block_mask
from varkit.layout import TokenLayout
from varkit.registry import Checkpoint, ModelEntry, register_checkpoint, register_model
from varkit.rng import Rng

Block = int | Literal["token", "row", "frame"]


def block_size(block: Block, grid: Sequence[int]) -> int:
    """How many tokens a block has on a grid (t, h, w). Raises ValueError naming what is allowed."""
    named = {"token": 1, "row": grid[-1], "frame": grid[-1] * grid[-2]}
    size = named.get(block, 0) if isinstance(block, str) else block
    if not 1 <= size <= math.prod(grid):
        raise ValueError(
            f"block must be token, row, frame, or a number of tokens, 1 to {math.prod(grid)} on the grid "
            f"{'x'.join(map(str, grid))}; got {block!r}"
        )
    return size


class SelfAttention(nn.Module):
    def __init__(self, dim: int, num_heads: int, dropout: float) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.key, self.query, self.value, self.proj = (nn.Linear(dim, dim) for _ in range(4))
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor, mask: Tensor | None, cache: KVCache | None, layer: int) -> Tensor:
        """mask: bool, True is seen; None is everything."""
        q, k, v = (w(x).unflatten(-1, (self.num_heads, -1)).transpose(1, 2) for w in (self.query, self.key, self.value))
        if cache is not None:
            k, v = cache.extend(layer, k, v)
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        return self.dropout(self.proj(out.transpose(1, 2).flatten(2)))


class GPTBlock(nn.Module):
    """Attention and MLP, each with a LayerNorm before it."""

    def __init__(self, dim: int, num_heads: int, dropout: float) -> None:
        super().__init__()
        self.ln1, self.ln2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.attn = SelfAttention(dim, num_heads, dropout)
        self.mlp = nn.Sequential(nn.Linear(dim, 4 * dim), nn.GELU(), nn.Linear(4 * dim, dim), nn.Dropout(dropout))

    def forward(self, x: Tensor, mask: Tensor | None, cache: KVCache | None = None, layer: int = 0) -> Tensor:
        x = x + self.attn(self.ln1(x), mask, cache, layer)
        return x + self.mlp(self.ln2(x))


class GivenBlock(Categorical):
    """What a model that goes on from given frames says of its first block: nothing. Raises ValueError when asked."""

    def process(self, processors: Any) -> Categorical:
        raise ValueError(
            f"this model goes on from given frames: its first {self.logits.shape[1]} tokens must be known. Give the "
            f"first frames (frames=), or the same tokens for all clips with known="
        )

    def guide(self, scale: float | Tensor) -> Categorical:
        return self.process(())


class NBPState(State):
    """The cache, the condition, and the joint ids of the tokens decided so far.

    Args: ends: how many tokens are decided after each group.   unread: tokens of the first block that nothing predicts.
    """

    def __init__(self, cache: KVCache, prefix: Tensor, ids: Tensor, guided: bool, ends: set[int], unread: int) -> None:
        self.cache, self.prefix, self.ids, self.guided = cache, prefix, ids, guided
        self.ends, self.unread = ends, unread
        self.length = 0

    def entries(self, length: int) -> int:
        """Entries of the cache when `length` tokens are decided."""
        return self.prefix.shape[1] + length - self.unread if length else 0

    def rewind(self, count: int) -> None:
        """Whole groups only. Raises ValueError when one would be cut."""
        left = self.length - count
        if count < 0 or left not in self.ends:
            raise ValueError(f"{count} tokens are no whole blocks of the {self.length} decided")
        self.cache.rewind(self.entries(self.length) - self.entries(left))
        self.length = left

    def reset(self) -> None:
        self.rewind(self.length)


class NBP(HubMixin, ModelMixin, ConfigMixin, Generator):
    """The semi-autoregressive transformer. The defaults are an own model of the released base size.

    Args:
        num_classes: not counting the null class; 0 for a model without condition. Of a model of texts, see there.
        depth, hidden_size, num_heads: of the transformer.
        grid: (t, h, w) of the tokens.   codebook_size, latent_dim: of the tokenizer.
        block: `token`, `row`, `frame` or a number of tokens; the last block is smaller where it does not divide.
        first: what is read in place of the first block: `begin`, `hybrid` or `given`, see the module.
        text_length, text_vocab: of the class's text, and of the text tokenizer; 0 for models of classes.
        class_texts: for each class the `text_length` ids of its text. None: no class is known, none can be drawn.
        max_positions: learned positions; None is as many as there are.
        dropout: of the embeddings and of each sub-layer's output, in training.
        cond_drop_rate: how often a class becomes the null one in training.
    Raises: ValueError on an impossible combination, naming both sides.
    """

    _supports_gradient_checkpointing = True
    _gradient_checkpointing_func: Callable[..., Tensor]  # diffusers sets it
    _no_split_modules = ("GPTBlock",)
    training_options = frozenset({"label_smoothing", "weight", "hidden_layer"})
    class_embedding = "class_emb"
    no_decay = ("pos_emb",)
    lora_targets = ("blocks.*.attn.query", "blocks.*.attn.key", "blocks.*.attn.value", "blocks.*.attn.proj")
    free_arguments = frozenset({"dropout", "cond_drop_rate", "class_texts"})
    """These: see `varkit.training.finetune.Tunable`."""

    source: Tensor  # L: for each token, the token that is read to predict it; below 0 learned ones, from -1
    texts: Tensor  # classes x P, joint ids; of models of texts

    @register_to_config
    def __init__(
        self,
        num_classes: int = 101,
        depth: int = 24,
        hidden_size: int = 1536,
        num_heads: int = 16,
        grid: Sequence[int] = (5, 16, 16),
        codebook_size: int = 64000,
        latent_dim: int = 6,
        block: Block = "row",
        first: Literal["begin", "hybrid", "given"] = "begin",
        text_length: int = 0,
        text_vocab: int = 0,
        class_texts: Sequence[Sequence[int]] | None = None,
        max_positions: int | None = None,
        dropout: float = 0.1,
        cond_drop_rate: float = 0.1,
    ) -> None:
        super().__init__()
        self.layout = TokenLayout((tuple(grid),), codebook_size, latent_dim)
        if len(grid) != 3:
            raise ValueError(f"grid must be the (t, h, w) of the tokens; got {tuple(grid)}")
        if hidden_size % num_heads:
            raise ValueError(f"a width of {hidden_size} cannot be shared by {num_heads} heads")
        if first not in ("begin", "hybrid", "given"):
            raise ValueError(f"first must be begin, hybrid or given; got {first!r}")
        self.block = size = block_size(block, grid)
        length = self.layout.length
        if first == "given" and size == length:
            raise ValueError(
                f"first=given: a block of {size} tokens is the whole clip, which leaves nothing to predict"
            )
        self.num_classes = self._check_texts(num_classes, text_length, text_vocab, class_texts)
        self.gradient_checkpointing = False
        self.specials = 0 if first == "given" else size
        self.offset = self.specials + text_vocab  # joint id of video id 0
        self.skip = size if first == "given" else 0  # first tokens that are not predicted
        starts = [1] * size if first == "hybrid" else [size]
        rest = length - size
        self.sizes = starts + [size] * (rest // size) + [rest % size] * bool(rest % size)
        self.prefix_length = text_length or int(self.num_classes > 0)
        entries = self.prefix_length + length - self.skip
        if max_positions is not None and max_positions < entries:
            raise ValueError(f"max_positions {max_positions} are fewer than the {entries} entries of the sequence")
        self.register_buffer("source", self._sources(), persistent=False)
        if text_length:
            texts = torch.tensor(class_texts or [[0] * text_length], device="cpu")
            self.register_buffer("texts", texts + self.specials, persistent=False)
            self.register_buffer("uncond_embedding", 0.02 * torch.randn(text_length, hidden_size))
        elif num_classes:
            self.class_emb = nn.Embedding(num_classes + 1, hidden_size)
        self.tok_emb = nn.Embedding(self.offset + codebook_size, hidden_size)
        self.pos_emb = nn.Parameter(torch.empty(1, max_positions or entries, hidden_size))
        self.drop = nn.Dropout(dropout)
        self.blocks: Any = nn.ModuleList(GPTBlock(hidden_size, num_heads, dropout) for _ in range(depth))
        self.ln_f = nn.LayerNorm(hidden_size)
        self.joint_offset = self.offset if text_vocab else 0  # a model of texts says logits of all joint ids
        self.head = nn.Linear(hidden_size, self.joint_offset + codebook_size, bias=False)
        self.init_weights()

    @staticmethod
    def _check_texts(num_classes: int, length: int, vocab: int, texts: Sequence[Sequence[int]] | None) -> int:
        """How many classes there are. Raises ValueError."""
        if (length > 0) != (vocab > 0):
            raise ValueError(f"text_length and text_vocab go together; got {length} and {vocab}")
        if texts is not None and (
            any(len(t) != length for t in texts) or any(not 0 <= i < vocab for t in texts for i in t)
        ):
            raise ValueError(
                f"class_texts must be lists of text_length {length} ids of the text tokenizer, 0 to {vocab - 1}: cut "
                f"and pad them as the model was trained (NBP: on the left, with id 2)"
            )
        return len(texts or ()) if length else num_classes

    def _sources(self) -> Tensor:
        """See `source`."""
        size, places = self.block, torch.arange(self.layout.length, device="cpu")
        learned = -1 - places
        if self.config.first != "hybrid":
            return torch.where(places < size, learned, places - size)
        source = torch.where(places < size, places - 1, places - size)  # -1 is the first learned one
        second = (places > size) & (places < 2 * size)  # behind the last token of the first block
        source = torch.where(second, learned + size, source)
        return torch.where(places == size, size - 1, source)

    @torch.no_grad()
    def init_weights(self, std: float = 0.02) -> None:
        """Linear and Embedding weights and positions normal with `std`, biases zero."""
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Embedding):
                nn.init.normal_(module.weight, std=std)
                if isinstance(module, nn.Linear) and module.bias is not None:
                    nn.init.zeros_(module.bias)
        nn.init.normal_(self.pos_emb, std=std)

    # ---- the sequence -------------------------------------------------------------------------------------

    def joint_ids(self, tokens: Tensor) -> Tensor:
        """Video ids -> joint ids."""
        return tokens + self.offset

    def video_ids(self, joint: Tensor) -> Tensor:
        """Joint ids -> video ids, those of no video token clamped, as released."""
        return (joint - self.offset).clamp(0, self.config.codebook_size - 1)

    def text_ids(self, labels: Tensor) -> Tensor:
        """(B,) classes -> the joint ids of their texts, (B, P). Raises ValueError when no texts were given."""
        if not self.num_classes:
            raise ValueError(
                "this model reads the texts of classes, and was given none: open it with class_texts=, the ids of "
                "each class's text (`varkit convert --class-texts FILE.json`)"
            )
        return self.texts[labels.clamp(max=self.num_classes - 1)]

    def read_ids(self, ids: Tensor, first: int = 0, end: int | None = None) -> Tensor:
        """The joint ids that are read to predict the tokens first .. end: (B, n).

        Args: ids: (B, m) joint ids of the tokens before them, from token 0.
        """
        source = self.source[max(first, self.skip) : end]
        return torch.where(source < 0, -1 - source, ids[:, source.clamp(min=0)])

    def prefix(self, labels: Tensor) -> Tensor:
        """(B,) classes, of which `num_classes` is the null one, -> (B, P, D)."""
        weight = self.tok_emb.weight
        if self.config.text_length:
            null = (labels == self.num_classes)[:, None, None]
            if self.num_classes == 0 or bool(null.all()):
                self.text_ids(labels)  # refuses where no class is known
                return self.uncond_embedding.to(weight).expand(len(labels), -1, -1)
            return torch.where(null, self.uncond_embedding.to(weight), self.tok_emb(self.text_ids(labels)))
        if self.num_classes:
            return self.class_emb(labels)[:, None]
        return weight.new_zeros(len(labels), 0, weight.shape[1])

    def mask(self) -> Tensor:
        """What each entry of the sequence sees, (S, S) bool: the condition, its own group and all groups before it."""
        return block_mask([self.prefix_length, *self.sizes[int(self.skip > 0) :]])

    # ---- the network --------------------------------------------------------------------------------------

    def forward(
        self, inputs: Tensor, class_labels: Tensor, hidden_layer: int | None = None
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Teacher-forced logits of the first n tokens.

        Args:
            inputs: (B, n) ids, each the token before; the first is not read.
            class_labels: (B,) int64; `num_classes` is the null class.
            hidden_layer: return also what this block gives at these tokens, counted from 1: (B, n, D).
        Returns: (B, n, V) float32, or a pair. Where the first block must be given, of the tokens behind it.
        """
        logits, hidden = self.joint_logits(inputs, class_labels, hidden_layer)
        logits = logits[..., self.joint_offset :]
        return logits if hidden_layer is None else (logits, hidden)

    def joint_logits(
        self, inputs: Tensor, class_labels: Tensor, hidden_layer: int | None = None
    ) -> tuple[Tensor, Tensor]:
        """As `forward`, over all joint ids where a model of texts has them: (B, n, J), and (B, n, D)."""
        count = inputs.shape[1]
        read = self.read_ids(self.joint_ids(inputs[:, 1:]), 0, count)
        x = torch.cat([self.prefix(class_labels), self.tok_emb(read)], 1)
        x = self.drop(x + self.pos_emb[:, : x.shape[1]])
        mask = self.mask()[: x.shape[1], : x.shape[1]].to(x.device)
        hidden = x
        for i, block in enumerate(self.blocks, 1):
            if self.gradient_checkpointing and torch.is_grad_enabled():
                x = self._gradient_checkpointing_func(block, x, mask)
            else:
                x = block(x, mask)
            hidden = x if i == hidden_layer else hidden
        return self.head(self.ln_f(x[:, self.prefix_length :])).float(), hidden[:, self.prefix_length :]

    def teacher_forced(self, inputs: Tensor, cond: Cond) -> Categorical:
        """What is predicted everywhere at once, given true inputs: one pass. No condition is dropped."""
        return Categorical(cast(Tensor, self(inputs, cond.labels)))

    # ---- sampling -----------------------------------------------------------------------------------------

    def schedule(self, num_steps: int | None = None) -> list[Tensor]:
        """A block a step; in hybrid models the first block token by token. Raises ValueError when asked for another
        number of steps."""
        if num_steps not in (None, len(self.sizes)):
            raise ValueError(
                f"this model draws blocks of {self.block} tokens, {len(self.sizes)} steps in all; got "
                f"num_steps={num_steps}"
            )
        return list(torch.arange(self.layout.length, device=self.source.device).split(self.sizes))

    def groups_around(
        self, keep: Tensor, rng: Rng, num_steps: int | None = None, order: str | None = None
    ) -> tuple[Tensor, list[Tensor]]:
        """First blocks that are wholly known are read in one pass, and cost no step."""
        if order is not None:
            return super().groups_around(keep, rng, num_steps, order)
        groups = self.schedule(num_steps)
        known, leading = bool(len(keep)), 0
        for group in groups:
            known = known and bool(keep[:, group.to(keep.device)].all())
            leading += known
        before = torch.arange(sum(self.sizes[:leading]), device=self.source.device)
        return before.expand(len(keep), -1), groups[leading:]

    def start(self, cond: Cond, null: Cond | None = None) -> NBPState:
        both = cond.beside(null)
        prefix = self.prefix(both.labels.to(self.source.device))  # R P D
        dim, heads = self.config.hidden_size, self.config.num_heads
        length = self.prefix_length + self.layout.length - self.skip
        cache = KVCache(len(self.blocks), len(both), heads, length, dim // heads, prefix.dtype, prefix.device)
        ids = torch.zeros(len(cond), self.layout.length, dtype=torch.int64, device=prefix.device)
        ends = {0} | {sum(self.sizes[: i + 1]) for i in range(len(self.sizes))}
        return NBPState(cache, prefix, ids, null is not None, ends, self.skip)

    def predict(self, state: State, inputs: Tensor, positions: Tensor) -> Categorical:
        """The next groups: one, or several as if each input were right; of one, the state knows what is read."""
        joint = self.predict_joint(state, inputs, positions)
        if isinstance(joint, GivenBlock):
            return joint
        parts = (joint.logits, joint.null_logits)
        return Categorical(*[None if p is None else p[..., self.joint_offset :] for p in parts])  # type: ignore[arg-type]

    def predict_joint(self, state: State, inputs: Tensor, positions: Tensor) -> Categorical:
        """As `predict`, over all joint ids where a model of texts has them.

        Raises: ValueError for positions that do not follow those decided, or that cut a block.
        """
        assert isinstance(state, NBPState)
        count, begin = positions.shape[-1], state.length
        if begin + count not in state.ends or begin not in state.ends:
            raise ValueError(f"tokens {begin} to {begin + count - 1} are no whole blocks of {self.block} tokens")
        if count > 1:
            state.ids[:, begin : begin + count - 1] = self.joint_ids(
                inputs[:, 1:]
            )  # read where they are of a block before
        read = self.read_ids(state.ids, begin, begin + count)
        if not read.shape[1]:
            return GivenBlock(torch.zeros(len(read), count, self.head.out_features, device=read.device))
        x = self.tok_emb(torch.cat([read, read]) if state.guided else read)
        x = torch.cat([state.prefix, x], 1) if begin == 0 else x
        at = state.cache.length
        end = at + x.shape[1]
        mask = self.mask()[at:end, :end].to(x.device)
        x = x + self.pos_emb[:, at:end]
        for i, block in enumerate(self.blocks):
            x = block(x, mask, state.cache, i)
        logits = self.head(self.ln_f(x[:, -read.shape[1] :])).float()
        return Categorical(*logits.chunk(2)) if state.guided else Categorical(logits)

    def append(self, state: State, tokens: Tensor, positions: Tensor) -> None:
        """Keep the keys that `predict` wrote, and the tokens. Raises ValueError on mixed codes."""
        if tokens.is_floating_point():
            raise ValueError("more_smooth hands on mixtures of codes, but this model reads ids: leave it off")
        self.append_joint(state, self.joint_ids(tokens), positions)

    def append_joint(self, state: State, ids: Tensor, positions: Tensor) -> None:
        """As `append`, of joint ids."""
        assert isinstance(state, NBPState)
        end = state.length + positions.shape[-1]
        state.ids[:, state.length : end] = ids
        state.cache.advance(state.entries(end) - state.entries(state.length))
        state.length = end

    # ---- training -----------------------------------------------------------------------------------------

    def training_loss(  # type: ignore[override]
        self,
        tokens: Tensor,
        inputs: Tensor,
        cond: Cond,
        rng: Rng,
        *,
        label_smoothing: float = 0.0,
        weight: Tensor | None = None,
        hidden_layer: int | None = None,
    ) -> Losses:
        """Cross entropy, mean over the tokens that are predicted; of models of texts over all joint ids, as released.

        Args: tokens, inputs: (B, L) both.   label_smoothing: in [0, 1).   weight: (B, L) to use instead of one over
            the number of predicted tokens.   hidden_layer: see `Generator.training_options`.
        Returns: loss; accuracy.
        """
        labels = cond.labels
        if self.training and self.num_classes:
            labels = drop_labels(labels, rng, self.config.cond_drop_rate, self.num_classes)
        if self.joint_offset:
            logits, hidden = self.joint_logits(inputs, labels, hidden_layer)
            target = self.joint_ids(tokens)
        else:  # by __call__, which torch.compile replaces
            out = self(inputs, labels, hidden_layer)
            logits, hidden = (out, out) if hidden_layer is None else out
            target = tokens
        target = target[:, self.skip :]
        weight = torch.full_like(logits[..., 0], 1 / target.shape[1]) if weight is None else weight[:, self.skip :]
        losses: Losses = {
            "loss": weighted_cross_entropy(logits, target, weight, label_smoothing),
            "accuracy": (logits.detach().argmax(-1) == target).float().mean(),
        }
        return losses if hidden_layer is None else {**losses, "hidden": hidden}


def _builder(**preset: Any) -> Callable[..., NBP]:
    return lambda **overrides: cast(NBP, NBP(**{**preset, **overrides}))


SIZES: dict[str, tuple[int, int, int, str]] = {
    "base": (24, 1536, 16, "983 M of UCF-101, 884 M of Kinetics-600 (the paper's 700M)"),
    "xl": (24, 2048, 32, "the paper's 1.2B; no file was released"),
    "3b": (32, 3072, 32, "4.23 B of UCF-101, 4.03 B of Kinetics-600"),
}
"""Depth, width and heads of the released configurations, and how many parameters."""

RELEASED_POSITIONS = 5120
HYBRID: dict[str, Any] = {
    "num_classes": 0,
    "first": "hybrid",
    "text_length": 8,
    "text_vocab": 32000,
    "max_positions": RELEASED_POSITIONS,
}
"""Arguments of the released models of UCF-101: the text of the class, in ids of Llama 2."""
GIVEN: dict[str, Any] = {"num_classes": 0, "first": "given", "max_positions": RELEASED_POSITIONS}
"""Those of Kinetics-600, which go on from given frames."""

TINY: dict[str, Any] = {
    "num_classes": 3,
    "depth": 2,
    "hidden_size": 32,
    "num_heads": 2,
    "grid": (3, 2, 2),
    "codebook_size": 24,
    "latent_dim": 3,
    "text_length": 0,
    "text_vocab": 0,
    "max_positions": None,
}
_TINY_TOKENIZER: dict[str, Any] = {
    "num_frames": 5,
    "image_size": 8,
    "base_channels": 8,
    "widths": (8, 16, 16),
    "num_units": (0, 1, 1),
    "strides": ((1, 2, 2), (2, 2, 2)),
    "levels": (4, 3, 2),
    "norm_groups": 4,
}

for _size, (_depth, _width, _heads, _count) in SIZES.items():
    for _data, _kind in (("ucf", HYBRID), ("k600", GIVEN)):
        register_model(
            ModelEntry(
                f"nbp_{_data}_{_size}",
                "generator",
                _builder(depth=_depth, hidden_size=_width, num_heads=_heads, **_kind),
                f"NBP-{_size} of {'UCF-101, from texts' if _data == 'ucf' else 'Kinetics-600, from frames'}: {_count}",
                tokenizer="magvit2_nbp",
                tiny={**TINY, "first": "hybrid" if _data == "ucf" else "begin"},
                tiny_tokenizer=_TINY_TOKENIZER,
            )
        )
register_model(
    ModelEntry(
        "nbp_moving_fashion",
        "generator",
        _builder(
            num_classes=30,
            depth=6,
            hidden_size=192,
            num_heads=6,
            grid=(5, 8, 8),
            codebook_size=1000,
            latent_dim=4,
        ),
        "moving garments, 17 frames of 32x32, row by row: 3.1 M parameters",
        tokenizer="magvit2_moving_fashion",
        tiny={**TINY, "first": "begin"},
        tiny_tokenizer=_TINY_TOKENIZER,
    )
)

SAMPLING = {"top_k": 16000, "top_p": 0.9}
"""Of the released evaluation: no guidance."""
for _name, _file, _fvd in (
    ("ucf_base", "ucf_base_nbp16_hybrid.ckpt", "gFVD 103.3 on UCF-101 (paper), 95 steps"),
    ("ucf_3b", "ucf_3b_nbp16_hybrid.ckpt", "gFVD 55.3 on UCF-101 (paper), 95 steps"),
    ("k600_base", "k600_base_nbp16.ckpt", "gFVD 25.5 on Kinetics-600 from 5 frames (paper), 48 steps"),
    ("k600_3b", "k600_3b_nbp16.ckpt", "gFVD 19.5 on Kinetics-600 from 5 frames (paper), 48 steps"),
):
    register_checkpoint(
        Checkpoint(
            name=f"nbp_{_name}.{_name.split('_')[0]}_128",
            repo_id=f"ShuhuaiRen/NBP-{_name.replace('_', '-')}",
            filename=_file,
            licence="MIT",
            paper="arXiv 2502.07737",
            resolution=128,
            official_score=_fvd,
            tokenizer=f"magvit2_nbp.{_name.split('_')[0]}",
            sampling=SAMPLING,
        )
    )
