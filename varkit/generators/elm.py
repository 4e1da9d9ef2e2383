"""ELM: a Llama over tokens of sub-codes (Xuantong Liu et al., arXiv 2410.16257, sections 3.3 and 3.4).

Source: Pepper-lll/LMforImageGeneration: llama/ar_model.py (c2f29f0). Parameter names are those of the released files.
What differs: keys and values are cached in sampling.

A token is G sub-codes (`varkit.tokenizers.binary_autoencoder`), also where G is 1. Each sub-code has an embedding
table; the G vectors are joined and projected. G heads read the same hidden state, so the sub-codes of a position are
drawn independently of each other. As in LlamaGen the class token stands first and is not rotated but zeroed.

Shapes: B batch, L image tokens, G sub-codes, V values of a sub-code, C width, R rows of the cache (B, or 2 B under
guidance).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.modeling_utils import ModelMixin
from torch import Tensor, nn

from varkit.conditioning.label import drop_labels
from varkit.generators.prefixed import LORA_TARGETS, ClassPrefix, Prefixed
from varkit.heads.categorical import Categorical, weighted_cross_entropy
from varkit.hub import HubMixin
from varkit.interfaces import Cond, Generator, Losses
from varkit.layers.llama import RMSNorm, Rotary, llama_blocks
from varkit.layout import TokenLayout, square_grids
from varkit.registry import Checkpoint, ModelEntry, register_checkpoint, register_model
from varkit.rng import Rng
from varkit.tokenizers.binary_autoencoder import TINY as TINY_TOKENIZER
from varkit.tokenizers.binary_autoencoder import VOCABULARIES

FREE_ARGUMENTS = frozenset({"token_dropout", "dropout", "ffn_dropout", "cond_drop_rate"})
"""These two, and the class embedding: see `varkit.training.finetune.Tunable`."""


def check_heads(hidden_size: int, num_heads: int) -> None:
    if hidden_size % (4 * num_heads):
        raise ValueError(f"hidden_size {hidden_size} must be a multiple of 4 * num_heads ({num_heads})")


class ELM(Prefixed, HubMixin, ModelMixin, ConfigMixin, Generator):
    """The next-token transformer, conditioned on a class. The defaults are the released L-2-12.

    Args:
        num_classes: not counting the null class.
        depth, hidden_size, num_heads: of the transformer.   ffn_size: None is `feed_forward_size(hidden_size)`.
        token_dropout, dropout, ffn_dropout: of the sequence, of attention's output, of the feed-forward network.
        cond_drop_rate: how often a label becomes the null class in training.
        grid: image tokens a side, or (height, width). No weight depends on it.
        sub_codes, code_bits: G, and the bits of each: V = 2 ** code_bits.   latent_dim: of the tokenizer.
    Raises: ValueError where heads do not divide evenly, naming both sides.
    """

    _supports_gradient_checkpointing = True
    _no_split_modules = ("Block",)
    training_options = frozenset({"label_smoothing", "weight", "hidden_layer"})
    class_embedding = "cls_embedding.embedding_table"
    lora_targets = LORA_TARGETS
    free_arguments = FREE_ARGUMENTS

    @register_to_config
    def __init__(
        self,
        num_classes: int = 1000,
        depth: int = 24,
        hidden_size: int = 1024,
        num_heads: int = 16,
        ffn_size: int | None = None,
        token_dropout: float = 0.1,
        dropout: float = 0.1,
        ffn_dropout: float = 0.1,
        norm_eps: float = 1e-5,
        rope_base: float = 10000.0,
        cond_drop_rate: float = 0.1,
        grid: int | Sequence[int] = 16,
        sub_codes: int = 2,
        code_bits: int = 12,
        latent_dim: int = 256,
    ) -> None:
        super().__init__()
        check_heads(hidden_size, num_heads)
        values = 2**code_bits
        self.layout = TokenLayout(square_grids([grid]), (values,) * sub_codes, latent_dim)
        self.num_classes = num_classes
        self.gradient_checkpointing = False
        self.cls_embedding = ClassPrefix(num_classes, hidden_size)
        if sub_codes == 1:
            self.tok_embedder: Any = nn.Embedding(values, hidden_size)
            self.output: Any = nn.Linear(hidden_size, values, bias=False)
        else:
            self.tok_embedder = nn.ModuleList(nn.Embedding(values, hidden_size) for _ in range(sub_codes))
            self.proj = nn.Linear(sub_codes * hidden_size, hidden_size, bias=False)
            self.output = nn.ModuleList(nn.Linear(hidden_size, values, bias=False) for _ in range(sub_codes))
        self.tok_dropout = nn.Dropout(token_dropout)
        self.rotary = Rotary(self.layout.grids[0], hidden_size // num_heads, rope_base)
        self.layers: Any = llama_blocks(
            depth,
            hidden_size,
            num_heads,
            ffn_size=ffn_size,
            norm_eps=norm_eps,
            dropout=dropout,
            ffn_dropout=ffn_dropout,
        )
        self.norm = RMSNorm(hidden_size, norm_eps)
        self.init_weights()

    @torch.no_grad()
    def init_weights(self, std: float = 0.02) -> None:
        """Linear and Embedding weights normal with `std`; the heads zero."""
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Embedding):
                nn.init.normal_(module.weight, std=std)
        for parameter in self.output.parameters():
            nn.init.zeros_(parameter)

    # ---- the network --------------------------------------------------------------------------------------

    def prefix(self, cond: Cond) -> Tensor:
        return self.cls_embedding(cond)

    def embed(self, ids: Tensor) -> Tensor:
        """(B, n, G) -> (B, n, C)."""
        if isinstance(self.tok_embedder, nn.Embedding):
            return self.tok_embedder(ids[..., 0])
        return self.proj(torch.cat([table(ids[..., g]) for g, table in enumerate(self.tok_embedder)], -1))

    def logits(self, x: Tensor) -> Tensor:
        """(B, n, C) -> (B, n, G, V) float32."""
        return self.output_of(self.norm(x))

    def forward(self, inputs: Tensor, class_labels: Tensor, hidden_layer: int | None = None) -> Any:
        """Teacher-forced logits of the first n positions: (B, n, G, V) float32.

        Args:
            inputs: (B, n, G) ids, each the token before; the first is not read.
            class_labels: (B,), of which `num_classes` is the null class.
            hidden_layer: return also what this block gives, counted from 1: (B, n, C).
        """
        x = self.tok_dropout(torch.cat([self.cls_embedding(Cond(class_labels)), self.embed(inputs[:, 1:])], 1))
        hidden = None
        for i, block in enumerate(self.layers, 1):
            if self.gradient_checkpointing and torch.is_grad_enabled():
                x = self._gradient_checkpointing_func(block, x, self.rotary)
            else:
                x = block(x, self.rotary)
            hidden = x if i == hidden_layer else hidden
        return self.logits(x) if hidden_layer is None else (self.logits(x), hidden)

    def teacher_forced(self, inputs: Tensor, cond: Cond) -> Categorical:
        """What is predicted everywhere at once, given true inputs: one pass. No condition is dropped."""
        return Categorical(self(inputs, cond.labels))

    def output_of(self, hidden: Tensor) -> Tensor:
        heads = [self.output] if isinstance(self.output, nn.Linear) else self.output
        return torch.stack([head(hidden) for head in heads], -2).float()

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
        """Cross entropy, mean over tokens and sub-codes. In training labels are dropped.

        Args:
            tokens, inputs: (B, L, G) both.   cond: class ids.   label_smoothing: in [0, 1).
            weight: (B, L) to use instead of 1 / L.   hidden_layer: see `Generator.training_options`.
        Returns: loss; accuracy, of sub-codes.
        """
        labels = cond.labels
        if self.training:
            labels = drop_labels(labels, rng, self.config.cond_drop_rate, self.num_classes)
        out = self(inputs, labels, hidden_layer)
        logits, hidden = (out, None) if hidden_layer is None else out
        loss = weighted_cross_entropy(
            logits, tokens, 1 / self.layout.length if weight is None else weight, label_smoothing
        )
        log: Losses = {"accuracy": (logits.detach().argmax(-1) == tokens).float().mean()}
        if hidden is not None:
            log["hidden"] = hidden
        return {"loss": loss, **log}


def _builder(**preset: Any) -> Callable[..., ELM]:
    return lambda **overrides: cast(ELM, ELM(**{**preset, **overrides}))


SIZES: dict[str, tuple[int, int, int]] = {
    "l": (24, 1024, 16),
    "xl": (36, 1280, 20),
    "xxl": (48, 1536, 24),
    "2b": (48, 1792, 28),
}
"""Depth, width and heads of the released sizes."""

_RELEASED = (
    ("l", "1_16", "443.6 M"),
    ("l", "2_8", "312.5 M"),
    ("l", "2_10", "315.6 M"),
    ("l", "2_12", "328.2 M"),
    ("xl", "2_10", "741.3 M"),
    ("xl", "2_12", "757.0 M"),
    ("xxl", "2_12", "1.39 B"),
    ("2b", "2_12", "1.91 B"),
)
_SCORES = {
    ("l", "2_10"): "FID 15.95 without guidance (50,000 images, pytorch-fid; paper)",
    ("xl", "2_10"): "FID 12.70 without guidance (50,000 images, pytorch-fid; paper)",
    ("xxl", "2_12"): "FID 10.11 without guidance (50,000 images, pytorch-fid; paper)",
    ("2b", "2_12"): "FID 1.54 at the best guidance (paper); the release's script draws 32,000 images, 32 a class",
}
AR_SAMPLING = {"guidance_scale": 4.0, "guidance_schedule": "linear-next", "top_k": 1000}
"""Those of the release's evaluation of L-2-10."""

_TINY: dict[str, Any] = {
    "num_classes": 3,
    "depth": 2,
    "hidden_size": 32,
    "num_heads": 2,
    "grid": TINY_TOKENIZER["grid"],
    "latent_dim": TINY_TOKENIZER["latent_dim"],
}


def tiny_of(sub_codes: int) -> tuple[dict[str, Any], dict[str, Any]]:
    """Arguments of a small generator with that many sub-codes, and of a tokenizer for it."""
    sizes = {"sub_codes": sub_codes, "code_bits": TINY_TOKENIZER["bits"] // sub_codes}
    return {**_TINY, **sizes}, {**TINY_TOKENIZER, "sub_codes": sub_codes}


def fashion_sizes() -> dict[str, Any]:
    """Of the small generators of Fashion-MNIST."""
    sizes = {"num_classes": 10, "depth": 6, "hidden_size": 192, "num_heads": 6, "grid": 8}
    return {**sizes, "sub_codes": 2, "code_bits": 6, "latent_dim": 64}


_PRESETS: dict[str, tuple[dict[str, Any], str, str]] = {
    "elm_fashion": (
        fashion_sizes(),
        "bae_fashion",
        "Fashion-MNIST at 32x32: 64 tokens of two sub-codes, 2.8 M",
    )
}
for _size, _vocabulary, _count in _RELEASED:
    _depth, _width, _heads = SIZES[_size]
    _bits, _parts = VOCABULARIES[_vocabulary]
    _PRESETS[f"elm_ar_{_size}_{_vocabulary}"] = (
        {
            "depth": _depth,
            "hidden_size": _width,
            "num_heads": _heads,
            "sub_codes": _parts,
            "code_bits": _bits // _parts,
        },
        f"bae_{_vocabulary}",
        f"ELM {_size.upper()}-{_vocabulary.replace('_', '-')}: ImageNet 256x256, {_count} parameters",
    )
    register_checkpoint(
        Checkpoint(
            name=f"elm_ar_{_size}_{_vocabulary}.in1k_256",
            repo_id="xuantonglll/ELM",
            filename=f"gpt/{_size.upper()}-{_vocabulary.replace('_', '-')}.pth",
            licence="not stated with the files",
            paper="arXiv 2410.16257",
            resolution=256,
            official_score=_SCORES.get((_size, _vocabulary), "none noted here"),
            tokenizer=f"bae_{_vocabulary}.in1k_256",
            sampling=AR_SAMPLING,
        )
    )
for _name, (_preset, _tokenizer, _summary) in _PRESETS.items():
    _tiny, _tiny_tokenizer = tiny_of(_preset["sub_codes"])
    register_model(
        ModelEntry(
            _name,
            "generator",
            _builder(**_preset),
            _summary,
            tokenizer=_tokenizer,
            tiny=_tiny,
            tiny_tokenizer=_tiny_tokenizer,
        )
    )
