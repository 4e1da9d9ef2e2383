"""LARP's generator: a Llama with learned positions over a clip's tokens (Wang et al., arXiv 2410.21264, section 3.4).

Source: hywang66/LARP: models/larp_ar.py, ar/generate.py (8aaed63). Parameter names are those of the released files.
What differs: the cache is sized once and passed in; labels are never negative, the last id stands for no class.

The sequence is a prefix, then the tokens; each token is predicted by the entry before it. The prefix is one class, or,
in frame prediction, the tokens of a clip whose first frames are given (`varkit.conditioning.frames`) and a separator.

Shapes: B batch, L tokens, T prefix entries, S = T + L - 1, C width, V codebook, R rows of the cache (B, or 2 B under
guidance).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, cast

import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.modeling_utils import ModelMixin
from torch import Tensor, nn

from varkit.conditioning.label import drop_labels
from varkit.generators.prefixed import LORA_TARGETS, ClassPrefix, Prefixed, PrefixState
from varkit.heads.categorical import Categorical, weighted_cross_entropy
from varkit.hub import HubMixin
from varkit.interfaces import Cond, Generator, Losses
from varkit.layers.llama import RMSNorm, llama_blocks
from varkit.layout import TokenLayout
from varkit.registry import Checkpoint, ModelEntry, register_checkpoint, register_model
from varkit.rng import Rng
from varkit.tokenizers.larp import TINY as TINY_TOKENIZER


def unrotated(x: Tensor, start: int | Tensor = 0) -> Tensor:
    """In place of a rotary table: positions are learned and added."""
    return x


class LARP(Prefixed, HubMixin, ModelMixin, ConfigMixin, Generator):
    """The next-token transformer of clips. The defaults are the released model of UCF-101 (llama-abs-LP).

    Args:
        condition: `class`, or `frames` for frame prediction, whose `Cond.vector` holds ids (B, L) of `FrameCondition`.
        num_classes: not counting the null class; 0 is a model without a condition, or of frames.
        depth, hidden_size, num_heads: of the transformer.   ffn_size: None is `feed_forward_size(hidden_size)`.
        token_dropout, dropout, ffn_dropout, attention_dropout: of the sequence, of attention's output, of the
            feed-forward network, and of attention weights.
        cond_drop_rate: how often a class becomes the null one in training.
        num_tokens, codebook_size, latent_dim: of the tokenizer.
    Raises: ValueError where heads do not divide evenly, or frames come with classes.
    """

    _supports_gradient_checkpointing = True
    _no_split_modules = ("Block",)
    training_options = frozenset({"label_smoothing", "weight"})
    class_embedding = "cls_embedding.embedding_table"
    lora_targets = LORA_TARGETS
    free_arguments = frozenset({"token_dropout", "dropout", "ffn_dropout", "attention_dropout", "cond_drop_rate"})
    """These three: see `varkit.training.finetune.Tunable`."""
    rotary = staticmethod(unrotated)

    @register_to_config
    def __init__(
        self,
        condition: Literal["class", "frames"] = "class",
        num_classes: int = 101,
        depth: int = 30,
        hidden_size: int = 1280,
        num_heads: int = 20,
        ffn_size: int | None = None,
        token_dropout: float = 0.1,
        dropout: float = 0.1,
        ffn_dropout: float = 0.1,
        attention_dropout: float = 0.0,
        norm_eps: float = 1e-5,
        cond_drop_rate: float = 0.1,
        num_tokens: int = 1024,
        codebook_size: int = 8192,
        latent_dim: int = 16,
    ) -> None:
        super().__init__()
        if hidden_size % num_heads:
            raise ValueError(f"hidden_size {hidden_size} must be a multiple of num_heads {num_heads}")
        if condition not in ("class", "frames"):
            raise ValueError(f"condition must be class or frames; got {condition!r}")
        if condition == "frames" and num_classes:
            raise ValueError(f"a model of frames has no classes: num_classes must be 0; got {num_classes}")
        self.layout = TokenLayout(((num_tokens,),), codebook_size, latent_dim)
        self.condition, self.num_classes = condition, num_classes
        self.prefix_length = num_tokens + 1 if condition == "frames" else 1
        self.gradient_checkpointing = False

        self.abs_pe = nn.Parameter(torch.empty(1, self.prefix_length + num_tokens - 1, hidden_size))
        if condition == "class":
            self.cls_embedding = ClassPrefix(num_classes, hidden_size)
        self.tok_embeddings = nn.Embedding(codebook_size + (condition == "frames"), hidden_size)
        self.tok_dropout = nn.Dropout(token_dropout)
        self.layers: Any = llama_blocks(
            depth,
            hidden_size,
            num_heads,
            ffn_size=ffn_size,
            norm_eps=norm_eps,
            dropout=dropout,
            attention_dropout=attention_dropout,
            ffn_dropout=ffn_dropout,
        )
        self.norm = RMSNorm(hidden_size, norm_eps)
        self.output = nn.Linear(hidden_size, codebook_size, bias=False)
        self.init_weights()

    @torch.no_grad()
    def init_weights(self, std: float = 0.02) -> None:
        """Linear and Embedding weights and positions normal with `std`; `output` zero."""
        nn.init.normal_(self.abs_pe, std=std)
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Embedding):
                nn.init.normal_(module.weight, std=std)
        nn.init.zeros_(self.output.weight)

    # ---- the network --------------------------------------------------------------------------------------

    def prefix(self, cond: Cond) -> Tensor:
        """What stands before the tokens: (B, T, C). Raises ValueError when the condition does not fit."""
        given = cond.labels
        if self.condition == "class":
            if given.dim() != 1:
                raise ValueError(f"classes must be (B,) ids; got shape {tuple(given.shape)}")
            return self.cls_embedding(cond)
        if given.dim() != 2 or given.shape[1] != self.layout.length:
            raise ValueError(
                f"given frames must be (B, {self.layout.length}) ids, as FrameCondition makes them; got shape "
                f"{tuple(given.shape)}"
            )
        separator = given.new_full((len(given), 1), self.config.codebook_size)  # the row behind the codes
        return self.tok_embeddings(torch.cat([given, separator], 1))  # B n+1 C

    def embed(self, ids: Tensor) -> Tensor:
        return self.tok_embeddings(ids)

    def placed(self, x: Tensor, places: Any) -> Tensor:
        return x + self.abs_pe[0, places]

    def null(self, cond: Cond) -> Cond:
        """The absence of a class. Raises ValueError for a model of frames, which knows none."""
        if self.condition == "frames":
            raise ValueError("frame prediction has no unconditional branch: leave guidance_scale at 1")
        return Cond(torch.full_like(cond.labels, self.num_classes))

    def forward(self, inputs: Tensor, condition: Tensor) -> Tensor:
        """Teacher-forced logits of the first n positions, (B, n, V) float32.

        Args:
            inputs: (B, n) ids, each the token before; the first is not read.
            condition: (B,) class ids, of which `num_classes` is the null class; or ids (B, L) of given frames.
        """
        x = torch.cat([self.prefix(Cond(condition)), self.tok_embeddings(inputs[:, 1:])], 1)
        x = self.tok_dropout(x + self.abs_pe[:, : x.shape[1]])
        for block in self.layers:
            if self.gradient_checkpointing and torch.is_grad_enabled():
                x = self._gradient_checkpointing_func(block, x, unrotated)
            else:
                x = block(x, unrotated)
        return self.output_of(self.norm(x[:, self.prefix_length - 1 :]))

    def teacher_forced(self, inputs: Tensor, cond: Cond) -> Categorical:
        """What is predicted everywhere at once, given true inputs: one pass. No condition is dropped."""
        return Categorical(self(inputs, cond.labels))

    # ---- sampling -----------------------------------------------------------------------------------------

    def start(self, cond: Cond, null: Cond | None = None) -> PrefixState:
        if null is not None and self.condition == "frames":
            self.null(cond)  # refuses
        return super().start(cond, null)

    def output_of(self, hidden: Tensor) -> Tensor:
        return self.output(hidden).float()

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
    ) -> Losses:
        """Cross entropy, mean over tokens. In training some classes are dropped.

        Args:
            tokens, inputs: (B, L) both.   cond: class ids, or ids of given frames.
            label_smoothing: in [0, 1).   weight: (B, L) to use instead of 1 / L.
        Returns: loss; accuracy.
        """
        given = cond.labels
        if self.training and self.condition == "class":
            given = drop_labels(given, rng, self.config.cond_drop_rate, self.num_classes)
        logits = self(inputs, given)
        each = 1 / self.layout.length if weight is None else weight
        return {
            "loss": weighted_cross_entropy(logits, tokens, each, label_smoothing),
            "accuracy": (logits.detach().argmax(-1) == tokens).float().mean(),
        }


def _builder(**preset: Any) -> Callable[..., LARP]:
    return lambda **overrides: cast(LARP, LARP(**{**preset, **overrides}))


SIZES: dict[str, tuple[int, int, int, str]] = {
    "s": (12, 384, 6, "28 M"),
    "b": (12, 768, 12, "98 M"),
    "l": (24, 1024, 16, "326 M"),
    "lp": (30, 1280, 20, "632 M"),
    "xl": (36, 1280, 20, "754 M"),
    "xxl": (48, 1536, 24, "1.39 B"),
    "xxxl": (48, 2560, 40, "3.85 B"),
}
"""Depth, width and heads of the official classes (llama-abs-S to XXXL), and how many parameters."""

TINY: dict[str, Any] = {
    "depth": 2,
    "hidden_size": 32,
    "num_heads": 2,
    "ffn_size": 48,
    "num_tokens": TINY_TOKENIZER["num_tokens"],
    "codebook_size": TINY_TOKENIZER["codebook_size"],
    "latent_dim": TINY_TOKENIZER["latent_dim"],
}
_SMALL: dict[str, Any] = {
    "depth": 6,
    "hidden_size": 192,
    "num_heads": 6,
    "num_tokens": 64,
    "codebook_size": 512,
    "latent_dim": 8,
}
_FRAMES: dict[str, Any] = {"condition": "frames", "num_classes": 0}
_PRESETS: dict[str, tuple[dict[str, Any], str, str]] = {
    **{
        f"larp_{name}": (
            {"depth": depth, "hidden_size": width, "num_heads": heads},
            "larp_tokenizer_l_long",
            f"LARP-AR {name.upper()}: UCF-101, 16 frames at 128x128, {size} parameters",
        )
        for name, (depth, width, heads, size) in SIZES.items()
    },
    "larp_lp_frames": (
        _FRAMES,
        "larp_tokenizer_l_long",
        "LARP-AR-FP: frame prediction on Kinetics-600, 16 frames at 128x128, 633 M parameters",
    ),
    "larp_moving_fashion": (
        {"num_classes": 30, **_SMALL},
        "larp_tokenizer_moving_fashion",
        "moving-fashion, 16 frames at 32x32, 2.9 M parameters",
    ),
    "larp_moving_fashion_frames": (
        {**_FRAMES, **_SMALL},
        "larp_tokenizer_moving_fashion",
        "frame prediction on moving-fashion, 16 frames at 32x32, 2.9 M parameters",
    ),
}
for _name, (_preset, _tokenizer, _summary) in _PRESETS.items():
    register_model(
        ModelEntry(
            _name,
            "generator",
            _builder(**_preset),
            _summary,
            tokenizer=_tokenizer,
            tiny=TINY if "condition" in _preset else {**TINY, "num_classes": 3},
            tiny_tokenizer=TINY_TOKENIZER,
        )
    )

CLASS_SAMPLING = {"guidance_scale": 1.25, "guidance_schedule": "constant"}
"""Of the released UCF-101 model (sample.py)."""

for _name, _repo, _score, _sampling in (
    ("larp_lp.ucf101", "hywang66/LARP-L-long-AR", "gFVD 57 on UCF-101 (README)", CLASS_SAMPLING),
    ("larp_lp_frames.k600", "hywang66/LARP-L-long-AR-FP", "FVD 5.1 on Kinetics-600, 5 frames given (README)", {}),
):
    register_checkpoint(
        Checkpoint(
            name=_name,
            repo_id=_repo,
            filename="model.safetensors",
            licence="MIT",
            paper="arXiv 2410.21264",
            resolution=128,
            official_score=_score,
            tokenizer="larp_tokenizer_l_long.k600_ucf101",
            sampling=_sampling,
        )
    )
