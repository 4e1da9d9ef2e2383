"""LlamaGen: a Llama that predicts image tokens in raster order (Sun et al., arXiv 2406.06525).

Source: FoundationVision/LlamaGen: autoregressive/models/gpt.py (ce98ec4). Parameter names are those of the released
files. What differs: the cache is sized once and passed in, and holds the grouped heads that there are; a prefix is
never cut or padded here (`TextCondition` does that); any grid, square or not.

The sequence is a prefix (one class token, or T caption tokens), then the image tokens; position p of the layout is
predicted by the token before it, the first by the end of the prefix. **The rotary table is zero for the prefix** (both
sine and cosine), as the weights were trained: queries and keys of the prefix vanish, so every image token gives each
prefix token the same logit 0, and a caption acts through its values alone.

Shapes: B batch, L image tokens, T prefix tokens, S = T + L - 1, C width, H heads, G key-value heads, D head width, V
codebook, R rows of the cache (B, or 2 B under guidance).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, Self, cast

import torch
import torch.nn.functional as F
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.modeling_utils import ModelMixin
from torch import Tensor, nn

from varkit.conditioning.control import Controlled, Fused, dropped, inject
from varkit.generators.prefixed import LORA_TARGETS, ClassPrefix, Prefixed, PrefixState
from varkit.heads.categorical import Categorical, weighted_cross_entropy, z_loss
from varkit.hub import HubMixin
from varkit.interfaces import JOINT, Cond, Generator, Losses
from varkit.layers.cache import CacheSlots
from varkit.layers.llama import RMSNorm, Rotary, causal, llama_blocks
from varkit.layers.share import sharing
from varkit.layout import TokenLayout, square_grids
from varkit.registry import Checkpoint, ModelEntry, register_checkpoint, register_model
from varkit.rng import Draw, Rng
from varkit.tokenizers.vqgan import TINY as TINY_TOKENIZER


class CaptionPrefix(nn.Module):
    """Text features through a two-layer network. Features of no text are drawn once and never trained."""

    uncond_embedding: Tensor  # T E

    def __init__(self, length: int, text_dim: int, dim: int) -> None:
        super().__init__()
        self.register_buffer("uncond_embedding", torch.randn(length, text_dim) / math.sqrt(text_dim))
        self.cap_proj: Any = nn.Module()
        self.cap_proj.fc1 = nn.Linear(text_dim, dim, bias=False)
        self.cap_proj.fc2 = nn.Linear(dim, dim, bias=False)

    def forward(self, cond: Cond) -> Tensor:
        sequence, mask = cond.text
        expected = tuple(self.uncond_embedding.shape)
        if tuple(sequence.shape[1:]) != expected or mask.shape != sequence.shape[:2]:
            raise ValueError(
                f"text features must be (B, {expected[0]}, {expected[1]}) with a mask (B, {expected[0]}); got "
                f"{tuple(sequence.shape)} and {tuple(mask.shape)}. TextCondition makes them so"
            )
        hidden = self.cap_proj.fc1(sequence.to(self.cap_proj.fc1.weight.dtype))
        return self.cap_proj.fc2(F.gelu(hidden, approximate="tanh"))  # B T C

    def null(self, cond: Cond) -> Cond:
        """As released, the mask stays that of the caption. It is one phrase."""
        sequence, mask = cond.text
        return Cond(sequence=self.uncond_embedding.to(sequence).expand_as(sequence), mask=mask)


def released_padding(visible: Tensor) -> Tensor:
    """What LANTERN's LlamaGen lets each entry of a prefix see, (B, n) bool -> (B, 1, n, n) bool.

    Padding sees the padding before it and the caption behind it: where the masks of both were added, one minimum is as
    good as none. No image token reads padding, so only a drafter trained on these states notices.
    """
    n = visible.shape[1]
    lower = torch.ones(n, n, dtype=torch.bool, device=visible.device).tril()
    key, query = visible[:, None, None, :], visible[:, None, :, None]
    return torch.where(query, lower & key, lower ^ key)


def apart(phrase: Tensor, count: int) -> Tensor:
    """Which of `count` entries of the sequence see which where the prefix is a set of phrases (B, T), see `Cond`:
    (B, 1, n, n) bool. A phrase sees itself alone, image tokens all. Whether something is later does not count here."""
    own = F.pad(phrase, (0, count - phrase.shape[1]), value=JOINT)
    query, key = own[:, None, :, None], own[:, None, None, :]
    return (query == key) | (query == JOINT)


class LlamaGen(Prefixed, Controlled, HubMixin, ModelMixin, ConfigMixin, Generator):
    """The next-token transformer, conditioned on a class or on a text. The defaults are the released GPT-B at 256 px.

    Args:
        num_classes: not counting the null class; None for a model conditioned on text.
        text_length, text_dim: of the caption's features, for a model conditioned on text.
        depth, hidden_size, num_heads: of the transformer.   kv_heads: None is num_heads.
        ffn_size: None is `feed_forward_size(hidden_size)`.
        token_dropout, dropout, ffn_dropout, attention_dropout: of the sequence, of attention's output, of the
            feed-forward network, and of attention weights.   drop_path_rate: of the last block; it rises linearly.
        cond_drop_rate: how often a condition becomes the null one in training.
        grid: image tokens a side, or (height, width). No weight depends on it.
        codebook_size, latent_dim: of the tokenizer.
        rope_grid: ControlAR's models of any size: the grid whose rotary places tokens take in turn, whatever the grid
            that they fill. Control images alone tell them the width. None is `grid`.
        control: arguments of `Control`, for a model that control images steer too (ControlAR).
        control_drop_rate: how often a control is left out in training while class or text stays.
        official_quirks: without guidance, control images have full strength whatever was asked, as in the release.
    Raises: ValueError where heads do not divide evenly, naming both sides, or on a bad argument of `Control`.
    """

    _supports_gradient_checkpointing = True
    _no_split_modules = ("Block",)
    training_options = frozenset({"label_smoothing", "weight", "hidden_layer", "z_weight", "valid"})
    class_embedding = "cls_embedding.embedding_table"
    lora_targets = LORA_TARGETS
    free_arguments = frozenset(
        {
            "token_dropout",
            "dropout",
            "ffn_dropout",
            "attention_dropout",
            "drop_path_rate",
            "cond_drop_rate",
            "control_drop_rate",
            "official_quirks",
            "grid",
            "rope_grid",
        }
    )
    """These three: see `varkit.training.finetune.Tunable`."""

    @register_to_config
    def __init__(
        self,
        num_classes: int | None = 1000,
        text_length: int = 120,
        text_dim: int = 2048,
        depth: int = 12,
        hidden_size: int = 768,
        num_heads: int = 12,
        kv_heads: int | None = None,
        ffn_size: int | None = None,
        token_dropout: float = 0.1,
        dropout: float = 0.1,
        ffn_dropout: float = 0.1,
        attention_dropout: float = 0.0,
        drop_path_rate: float = 0.0,
        norm_eps: float = 1e-5,
        rope_base: float = 10000.0,
        cond_drop_rate: float = 0.1,
        grid: int | Sequence[int] = 16,
        codebook_size: int = 16384,
        latent_dim: int = 8,
        rope_grid: Sequence[int] | None = None,
        control: dict[str, Any] | None = None,
        control_drop_rate: float = 0.0,
        official_quirks: bool = False,
    ) -> None:
        super().__init__()
        kv_heads = kv_heads or num_heads
        if hidden_size % num_heads or (hidden_size // num_heads) % 4 or num_heads % kv_heads:
            raise ValueError(
                f"hidden_size {hidden_size} must be a multiple of 4 * num_heads ({num_heads}), and num_heads one of "
                f"kv_heads {kv_heads}"
            )
        self.layout = TokenLayout(square_grids([grid]), codebook_size, latent_dim)
        self.condition = "text" if num_classes is None else "class"
        self.reads_phrases = num_classes is None
        self.num_classes = num_classes or 0
        self.prefix_length = text_length if num_classes is None else 1
        self.gradient_checkpointing = False

        self.cls_embedding: Any = (
            CaptionPrefix(text_length, text_dim, hidden_size)
            if num_classes is None
            else ClassPrefix(num_classes, hidden_size)
        )
        self.tok_embeddings = nn.Embedding(codebook_size, hidden_size)
        self.tok_dropout = nn.Dropout(token_dropout)
        places = self.layout.grids[0] if rope_grid is None else tuple(rope_grid)
        if self.layout.length > math.prod(places):
            raise ValueError(f"grid {self.layout.grids[0]} has more tokens than rope_grid {places} has places")
        self.rotary = Rotary(places, hidden_size // num_heads, rope_base, self.prefix_length)
        self.layers: Any = llama_blocks(
            depth,
            hidden_size,
            num_heads,
            kv_heads=kv_heads,
            ffn_size=ffn_size,
            norm_eps=norm_eps,
            dropout=dropout,
            attention_dropout=attention_dropout,
            ffn_dropout=ffn_dropout,
            drop_path_rate=drop_path_rate,
        )
        self.norm = RMSNorm(hidden_size, norm_eps)
        self.output = nn.Linear(hidden_size, codebook_size, bias=False)
        self.add_control(control)
        self.init_weights()

    @torch.no_grad()
    def init_weights(self, std: float = 0.02) -> None:
        """Linear and Embedding weights normal with `std`; `output` zero; control as its own `init_weights`."""
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Embedding):
                nn.init.normal_(module.weight, std=std)
        nn.init.zeros_(self.output.weight)
        if self.controller is not None:
            self.controller.init_weights()

    # ---- the network --------------------------------------------------------------------------------------

    def prefix(self, cond: Cond) -> Tensor:
        """What stands before the image tokens: (B, T, C)."""
        return self.cls_embedding(cond)

    def null(self, cond: Cond) -> Cond:
        """The condition that stands for none, for a batch shaped as `cond`. A text's mask is kept, as released."""
        return self.cls_embedding.null(cond)

    def replace_by_null(self, cond: Cond, rows: Tensor) -> Cond:
        """`cond` with no condition in some rows, (B,) bool: neither class or text, nor control."""
        null, rows = self.null(cond), rows.to(next(self.parameters()).device)
        weight = None
        if cond.control_weight is not None:
            weight = cond.control_weight.masked_fill(rows[:, None].to(cond.control_weight.device), 0)
        if cond.vector is not None:
            labels = torch.where(rows, null.labels, cond.labels)
            return Cond(labels, control=cond.control, control_weight=weight)
        sequence, mask = cond.text
        text = torch.where(rows[:, None, None], null.text[0], sequence)
        phrase = None if cond.phrase is None else cond.phrase.masked_fill(rows[:, None].to(cond.phrase.device), 0)
        return Cond(sequence=text, mask=mask, control=cond.control, control_weight=weight, phrase=phrase)

    def drop_condition(self, cond: Cond, rng: Rng) -> Cond:
        """`cond` with no condition in each row whose number is below cond_drop_rate, and some controls left out."""
        if self.config.cond_drop_rate > 0:
            u = rng.uniform(torch.zeros(1, dtype=torch.int64), Draw.COND_DROP)[:, 0]
            cond = self.replace_by_null(cond, u < self.config.cond_drop_rate)
        nobody = torch.zeros(len(cond), dtype=torch.bool)
        return replace(cond, control_weight=dropped(cond.control_weight, nobody, rng, self.config.control_drop_rate))

    def embed(self, ids: Tensor) -> Tensor:
        return self.tok_embeddings(ids)

    def visible(self, cond: Cond) -> Tensor | None:
        """Which positions of the whole sequence may be seen, (B, S) bool; None: all."""
        if cond.mask is None:
            return None
        return F.pad(cond.mask.bool(), (0, self.layout.length - 1), value=True)

    def logits(self, x: Tensor) -> Tensor:
        """(B, n, C) -> (B, n, V) float32."""
        return self.output(self.norm(x)).float()

    def forward(
        self,
        inputs: Tensor,
        condition: Tensor,
        mask: Tensor | None = None,
        hidden_layer: int | None = None,
        control: Tensor | None = None,
        control_weight: Tensor | None = None,
        phrase: Tensor | None = None,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Teacher-forced logits of the first n positions.

        Args:
            inputs: (B, n) ids, each the token before; the first is not read.
            condition: (B,) class ids, of which `num_classes` is the null class; or text features (B, T, E).
            mask: with text features, where they are real, (B, T) bool; they stand at the end (left padding).
            hidden_layer: return also what this block gives at the n positions, counted from 1: (B, n, C).
            control, control_weight, phrase: see `Cond`.
        Returns: (B, n, V) float32, or a pair.
        """
        cond = Cond(condition) if mask is None else Cond(sequence=condition, mask=mask, phrase=phrase)
        return self._run(inputs, replace(cond, control=control, control_weight=control_weight), hidden_layer)

    def _run(self, inputs: Tensor, cond: Cond, hidden_layer: int | None) -> Any:
        x, hidden = self._through(inputs, cond, hidden_layer)
        logits = self.logits(x[:, self.prefix_length - 1 :])
        return logits if hidden_layer is None else (logits, hidden[:, self.prefix_length - 1 :])

    def _through(self, inputs: Tensor, cond: Cond, hidden_layer: int | None) -> tuple[Tensor, Tensor]:
        """What the last block and that one give, of the whole sequence: (B, T + n - 1, C) both."""
        x = self.tok_dropout(torch.cat([self.prefix(cond), self.tok_embeddings(inputs[:, 1:])], 1))
        visible = self.visible(cond)
        seen = None if visible is None else causal(visible[:, : x.shape[1]])
        if seen is not None and cond.phrase is not None:
            seen = seen & apart(cond.phrase.to(x.device), x.shape[1])
        hidden, fused, count = x, self.fuse(cond), inputs.shape[1]
        for i, block in enumerate(self.layers, 1):
            x = self.steer(x, fused, i - 1, slice(count))
            if self.gradient_checkpointing and torch.is_grad_enabled():
                x = self._gradient_checkpointing_func(block, x, self.rotary, seen)
            else:
                x = block(x, self.rotary, seen)
            hidden = x if i == hidden_layer else hidden
        return x, hidden

    def steer(self, x: Tensor, fused: Fused | None, layer: int, where: slice) -> Tensor:
        """`inject` into the last hidden states, those that predict the positions `where`; the prefix before stays."""
        if fused is None or layer not in fused:
            return x
        before = x.shape[1] - len(range(*where.indices(fused[layer].shape[1])))
        return (
            torch.cat([x[:, :before], inject(x[:, before:], fused, layer, where)], 1)
            if before
            else inject(x, fused, layer, where)
        )

    def last_states(self, inputs: Tensor, cond: Cond) -> Tensor:
        """What `output` reads, of the whole sequence, teacher-forced: (B, T + n - 1, C), the prefix first.

        Args: inputs: (B, n) ids, each the token before; the first is not read.
        """
        return self.norm(self._through(inputs, cond, None)[0])

    def teacher_forced(self, inputs: Tensor, cond: Cond) -> Categorical:
        """What is predicted everywhere at once, given true inputs: one pass. No condition is dropped."""
        return Categorical(self._run(inputs, cond, None))

    # ---- other sizes --------------------------------------------------------------------------------------

    def resized(self, grid: tuple[int, int]) -> Self:
        """The same weights with the rotary table of another grid. What a network was not trained on, it draws worse."""
        if tuple(grid) == self.layout.grids[0]:
            return self
        if self.config.rope_grid is not None:
            return self._refilled(grid)
        made, config = sharing(self), self.config
        made.layout = TokenLayout((tuple(grid),), self.layout.codebook_size, self.layout.dim)
        rotary = Rotary(grid, config.hidden_size // config.num_heads, config.rope_base, self.prefix_length)
        made.rotary = rotary.to(self.rotary.cos.device)
        made.compiled = made._lent = None  # compiled for a cache of the own length
        made.register_to_config(grid=tuple(grid))
        return made

    def _refilled(self, grid: tuple[int, int]) -> Self:
        """The same weights and rotary places for another grid. Raises ValueError where there are not enough places."""
        most = math.prod(self.config.rope_grid)
        if grid[0] * grid[1] > most:
            raise ValueError(
                f"{grid[0]}x{grid[1]} are {grid[0] * grid[1]} tokens; this model draws at most {most}, of any sides"
            )
        made = sharing(self)
        made.layout = TokenLayout((tuple(grid),), self.layout.codebook_size, self.layout.dim)
        made.compiled = made._lent = None
        made.register_to_config(grid=tuple(grid))
        return made

    # ---- sampling -----------------------------------------------------------------------------------------

    def start(self, cond: Cond, null: Cond | None = None) -> PrefixState:
        if self.config.official_quirks and null is None and cond.control_weight is not None:
            cond = replace(cond, control_weight=(cond.control_weight != 0).to(cond.control_weight))
        state, both = super().start(cond, null), cond.beside(null)
        visible, device = self.visible(both), state.prefix.device
        state.visible = None if visible is None else visible.to(device)
        state.fused = self.fuse(both)
        state.phrase = None if both.phrase is None else both.phrase.to(device)
        return state

    def seen(self, state: PrefixState, first: int, end: int) -> Tensor | None:
        if state.visible is None:
            mask = super().seen(state, first, end)
        elif state.official_padding and first == 0:
            mask = released_padding(state.visible[:, :end])
        elif end - first == 1:
            mask = state.visible[:, None, None, :end]
        else:
            mask = causal(state.visible[:, :end])[:, :, first:]
        if mask is not None and state.phrase is not None and first == 0:
            mask = mask & apart(state.phrase, end)
        return mask

    def nodes(
        self, inputs: Tensor, slots: CacheSlots, positions: Tensor, extra: tuple[Any, ...], layers: int | None = None
    ) -> Tensor:
        visible, fused = extra
        x, mask = self.tok_embeddings(inputs), slots.visible(visible)
        for i, block in enumerate(self.layers if layers is None else self.layers[:layers]):
            x = block(inject(x, fused, i), self.rotary, mask, slots, i, slots.places)
        return self.norm(x)

    def output_of(self, hidden: Tensor) -> Tensor:
        return self.output(hidden).float()

    def extra(self, state: Any, before: Tensor, rows: Tensor | None = None) -> tuple[Any, ...]:
        visible, fused = state.visible, state.fused
        if fused is not None:
            turns = (before + 1).clamp(max=self.layout.length - 1)  # of the tokens that are predicted
            some = slice(None) if rows is None else rows
            if turns.dim() == 2:
                some = torch.arange(len(turns), device=turns.device)[:, None] if rows is None else rows[:, None]
            fused = {layer: x[some][:, turns] if turns.dim() == 1 else x[some, turns] for layer, x in fused.items()}
        return (visible if rows is None or visible is None else visible[rows], fused)

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
        z_weight: float = 0.0,
        valid: Tensor | None = None,
    ) -> Losses:
        """Cross entropy, mean over tokens. In training conditions are dropped.

        Args:
            tokens, inputs: (B, L) both.   cond: class ids, or text features and their mask; and control images.
            label_smoothing: in [0, 1).
            weight: (B, L) to use instead of 1 / L.   hidden_layer: see `Generator.training_options`.
            z_weight: of the mean squared logarithm of the softmax's denominator, which keeps logits small.
            valid: (B,), 0 for images that do not count (unreadable ones, say); the mean is over the others.
        Returns: loss; accuracy.
        """
        if self.training:
            cond = self.drop_condition(cond, rng)
        given = (cond.labels,) if cond.vector is not None else cond.text
        steering = {"control": cond.control, "control_weight": cond.control_weight, "phrase": cond.phrase}
        out = self(inputs, *given, hidden_layer=hidden_layer, **steering)  # by __call__, which torch.compile replaces
        logits, hidden = (out, None) if hidden_layer is None else out
        if weight is None:
            weight = torch.full_like(logits[..., 0], 1 / self.layout.length)
        if valid is not None:
            counted = valid.to(weight)
            weight = weight * (counted * len(counted) / counted.sum().clamp_min(1))[:, None]
        loss = weighted_cross_entropy(logits, tokens, weight, label_smoothing)
        log: Losses = {"accuracy": (logits.detach().argmax(-1) == tokens).float().mean()}
        if z_weight:
            log["z"] = z_loss(logits)
            loss = loss + z_weight * log["z"]
        if hidden is not None:
            log["hidden"] = hidden
        return {"loss": loss, **log}


def builder(**preset: Any) -> Callable[..., LlamaGen]:
    return lambda **overrides: cast(LlamaGen, LlamaGen(**{**preset, **overrides}))


SIZES: dict[str, tuple[int, int, int, str]] = {
    "b": (12, 768, 12, "111 M"),
    "l": (24, 1024, 16, "343 M"),
    "xl": (36, 1280, 20, "775 M"),
    "xxl": (48, 1536, 24, "1.41 B"),
    "xxxl": (48, 2560, 40, "3.9 B"),
    "1b": (22, 2048, 32, "1.2 B"),
    "3b": (24, 3200, 32, "3.10 B"),
    "7b": (32, 4096, 32, "6.6 B"),
}
"""Depth, width and heads of the released classes (GPT-B to GPT-7B), and how many parameters."""

_TINY: dict[str, Any] = {
    "depth": 2,
    "hidden_size": 32,
    "num_heads": 2,
    "grid": TINY_TOKENIZER["grid"],
    "codebook_size": TINY_TOKENIZER["codebook_size"],
    "latent_dim": TINY_TOKENIZER["latent_dim"],
}
TINY_CLASS = {**_TINY, "num_classes": 3}
TINY_TEXT = {**_TINY, "text_length": 5, "text_dim": 12}
_PRESETS: dict[str, tuple[dict[str, Any], str, str]] = {
    **{
        f"llamagen_{name}": (
            {"depth": depth, "hidden_size": width, "num_heads": heads},
            "vq_ds16",
            f"LlamaGen-{name.upper()}: ImageNet 256x256, {size} parameters",
        )
        for name, (depth, width, heads, size) in SIZES.items()
    },
    "llamagen_t2i_xl": (
        {"num_classes": None, "depth": 36, "hidden_size": 1280, "num_heads": 20},
        "vq_ds16",
        "LlamaGen-XL from text: 256x256, flan-t5-xl features, 778 M parameters",
    ),
    "llamagen_small_64": (
        {"num_classes": 10, "depth": 8, "hidden_size": 384, "num_heads": 6, "grid": 8, "codebook_size": 1024},
        "vq_f8_64",
        "a small one for folders of 64x64 images, 15 M parameters",
    ),
    "llamagen_t2i_small_64": (
        {
            "num_classes": None,
            "text_dim": 768,
            "depth": 8,
            "hidden_size": 384,
            "num_heads": 6,
            "grid": 8,
            "codebook_size": 1024,
        },
        "vq_f8_64",
        "a small one for captioned images of 64x64 and features of 768 numbers, 15 M parameters",
    ),
    "llamagen_emoji": (
        {
            "num_classes": None,
            "text_length": 16,
            "text_dim": 128,
            "depth": 6,
            "hidden_size": 224,
            "num_heads": 7,
            "grid": 8,
            "codebook_size": 1024,
        },
        "vq_emoji",
        "captioned drawings of 64x64 pixels, with a text encoder of 128 numbers, 4.8 M parameters",
    ),
    "llamagen_fashion": (
        {"num_classes": 10, "depth": 6, "hidden_size": 192, "num_heads": 6, "grid": 8, "codebook_size": 512},
        "vq_fashion",
        "Fashion-MNIST at 32x32, 2.9 M parameters",
    ),
}
for _name, (_preset, _tokenizer, _summary) in _PRESETS.items():
    register_model(
        ModelEntry(
            _name,
            "generator",
            builder(**_preset),
            _summary,
            tokenizer=_tokenizer,
            tiny=TINY_TEXT if _preset.get("num_classes", 0) is None else TINY_CLASS,
            tiny_tokenizer=TINY_TOKENIZER,
        )
    )

CLASS_SAMPLING = {"guidance_scale": 4.0, "guidance_schedule": "constant", "top_k": 2000}
"""The official demo's; the published FIDs are of other settings."""

TEXT_SAMPLING = {"guidance_scale": 7.5, "guidance_schedule": "constant", "top_k": 1000}

for _size, _pixels, _score in (
    ("b", 256, "FID 5.46, IS 193.6 (README), ADM evaluator, guidance 2.0, top_k 0"),
    ("b", 384, "FID 6.09 (README), images resized to 256, ADM evaluator, guidance 2.0, top_k 0"),
    ("l", 256, "FID 3.80, IS 248.3 (README), ADM evaluator, top_k 0"),
    ("l", 384, "FID 3.07, IS 256.1 (README), images resized to 256, ADM evaluator, guidance 2.0, top_k 0"),
    ("xl", 384, "FID 2.62, IS 244.1 (README), images resized to 256, ADM evaluator, guidance 1.75, top_k 0"),
    ("xxl", 384, "FID 2.34, IS 253.9 (README), images resized to 256, ADM evaluator, guidance 1.75, top_k 0"),
    ("3b", 384, "FID 2.18, IS 263.3 (README), images resized to 256, ADM evaluator, guidance 1.65, top_k 0"),
):
    register_checkpoint(
        Checkpoint(
            name=f"llamagen_{_size}.in1k_{_pixels}",
            repo_id="FoundationVision/LlamaGen",
            filename=f"c2i_{_size.upper()}_{_pixels}.pt",
            licence="MIT",
            paper="arXiv 2406.06525",
            resolution=_pixels,
            official_score=_score,
            tokenizer="vq_ds16.in1k",
            overrides={"grid": _pixels // 16},
            sampling=CLASS_SAMPLING,
        )
    )
for _stage, _pixels in ((1, 256), (2, 512)):
    register_checkpoint(
        Checkpoint(
            name=f"llamagen_t2i_xl.stage{_stage}_{_pixels}",
            repo_id="peizesun/llamagen_t2i",
            filename=f"t2i_XL_stage{_stage}_{_pixels}.pt",
            licence="MIT",
            paper="arXiv 2406.06525",
            resolution=_pixels,
            official_score="none published for this file",
            tokenizer="vq_ds16.t2i",
            overrides={"grid": _pixels // 16},
            sampling=TEXT_SAMPLING,
        )
    )
