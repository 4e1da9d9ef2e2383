"""The LlamaGen that draws all tokens in one pass: the student of Distilled Decoding (arXiv 2412.17153).

Source: microsoft/distilled_decoding: LlamaGen/autoregressive/models/dd.py (3b95d33); parameter names are those of the
released files.

The sequence is the class, then a vector a position, its own and not the one before; attention is causal, so a position
sees itself and those before it. Whether it is data or noise is added to the input once. Codes are unit vectors.

Shapes: B batch, L tokens, C channels of the codebook, W width.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Self, cast

import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.modeling_utils import ModelMixin
from torch import Tensor, nn

from varkit.generators.distilled import ContinuousHead, Prediction, Student, flags, require_class_teacher
from varkit.generators.llamagen import LlamaGen
from varkit.generators.prefixed import ClassPrefix
from varkit.hub import HubMixin
from varkit.interfaces import Cond
from varkit.layers.llama import RMSNorm, Rotary, llama_blocks
from varkit.layout import TokenLayout, square_grids
from varkit.registry import Checkpoint, ModelEntry, register_checkpoint, register_model
from varkit.tokenizers.vqgan import TINY as TINY_TOKENIZER


class DistilledLlamaGen(Student, HubMixin, ModelMixin, ConfigMixin):
    """The student of a class-conditional LlamaGen. The defaults are the released student of LlamaGen-B.

    Args: those of `LlamaGen`, but for texts and cond_drop_rate: guidance is learned from the teacher, and no label is
        dropped.
    Raises: ValueError where heads do not divide evenly, naming both sides.
    """

    _supports_gradient_checkpointing = True
    _no_split_modules = ("Block",)
    unit = "token"
    no_decay = ("n_d_embed.weight", "scale_shift_table")

    @register_to_config
    def __init__(
        self,
        num_classes: int = 1000,
        depth: int = 12,
        hidden_size: int = 768,
        num_heads: int = 12,
        kv_heads: int | None = None,
        ffn_size: int | None = None,
        dropout: float = 0.0,
        ffn_dropout: float = 0.0,
        attention_dropout: float = 0.0,
        drop_path_rate: float = 0.0,
        norm_eps: float = 1e-5,
        rope_base: float = 10000.0,
        grid: int | Sequence[int] = 16,
        codebook_size: int = 16384,
        latent_dim: int = 8,
    ) -> None:
        super().__init__()
        kv_heads = kv_heads or num_heads
        if hidden_size % num_heads or (hidden_size // num_heads) % 4 or num_heads % kv_heads:
            raise ValueError(
                f"hidden_size {hidden_size} must be a multiple of 4 * num_heads ({num_heads}), and num_heads one of "
                f"kv_heads {kv_heads}"
            )
        self.layout = TokenLayout(square_grids([grid]), codebook_size, latent_dim)
        self.num_classes, self.num_units = num_classes, self.layout.length
        self.gradient_checkpointing = False
        self.register_buffer("units", torch.arange(self.layout.length), persistent=False)

        self.cls_embedding = ClassPrefix(num_classes, hidden_size)
        self.tok_embeddings = nn.Linear(latent_dim, hidden_size)
        self.n_d_embed = nn.Embedding(2, hidden_size)
        self.rotary = Rotary(self.layout.grids[0], hidden_size // num_heads, rope_base)
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
        self.final_layer_conti = ContinuousHead(hidden_size, latent_dim)
        self.init_weights()

    @torch.no_grad()
    def init_weights(self, std: float = 0.02) -> None:
        """Linear and Embedding weights normal with `std`; biases, `output` and the continuous head's Linear zero."""
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Embedding):
                nn.init.normal_(module.weight, std=std)
            if isinstance(module, nn.Linear) and module.bias is not None:
                nn.init.zeros_(module.bias)
        nn.init.zeros_(self.output.weight)
        nn.init.zeros_(self.final_layer_conti.linear.weight)

    @property
    def blocks(self) -> Any:
        return self.layers

    @classmethod
    @torch.no_grad()
    def of_teacher(cls, teacher: Any, **overrides: Any) -> Self:
        """See `Student.of_teacher`. How vectors are read is new: the teacher reads ids."""
        require_class_teacher(teacher, LlamaGen)
        left_out = {"text_length", "text_dim", "token_dropout", "cond_drop_rate", "official_quirks"}
        left_out |= {"control", "control_drop_rate", "rope_grid"}
        own = {k: v for k, v in teacher.config.items() if not k.startswith("_") and k not in left_out}
        student = cls(**{**own, **overrides})
        state, given = student.state_dict(), teacher.state_dict()
        given.pop("tok_embeddings.weight")
        student.load_state_dict({**state, **{k: v for k, v in given.items() if k in state}})
        return student

    def forward(self, x: Tensor, class_labels: Tensor, known: Tensor) -> Prediction:
        """See `Student.forward`."""
        prefix = self.cls_embedding(Cond(class_labels))  # B 1 W
        h = torch.cat([prefix, self.tok_embeddings(x.to(self.tok_embeddings.weight.dtype))], 1)
        h = h + self.n_d_embed(flags(known, len(x)))
        for block in self.layers:
            if self.gradient_checkpointing and torch.is_grad_enabled():
                h = self._gradient_checkpointing_func(block, h, self.rotary)
            else:
                h = block(h, self.rotary)
        h = h[:, 1:]
        vectors = self.final_layer_conti(h, prefix[:, 0])
        return Prediction(vectors.float(), self.output(self.norm(h)).float())


def _builder(**preset: Any) -> Callable[..., DistilledLlamaGen]:
    return lambda **overrides: cast(DistilledLlamaGen, DistilledLlamaGen(**{**preset, **overrides}))


_TINY: dict[str, Any] = {
    "num_classes": 3,
    "depth": 2,
    "hidden_size": 32,
    "num_heads": 2,
    "grid": TINY_TOKENIZER["grid"],
    "codebook_size": TINY_TOKENIZER["codebook_size"],
    "latent_dim": TINY_TOKENIZER["latent_dim"],
}
SAMPLING: dict[int, dict[str, Any]] = {
    12: {"times": (0, 80), "split": 80},
    24: {"times": (0, 80), "split": 130},
}
"""Of the released students, by depth; the teacher's, where it takes part, is that of `TEACHER`."""

TEACHER = {"guidance_scale": 2.0, "guidance_schedule": "constant", "top_k": 8000}

for _size, _sizes, _parameters, _score in (
    ("b", (12, 768, 12), "98 M", "FID 15.50 in 1 step, 11.17 in 2"),
    ("l", (24, 1024, 16), "326 M", "FID 11.35 in 1 step, 7.58 in 2"),
):
    register_model(
        ModelEntry(
            f"distilled_llamagen_{_size}",
            "student",
            _builder(depth=_sizes[0], hidden_size=_sizes[1], num_heads=_sizes[2]),
            f"student of LlamaGen-{_size.upper()}: ImageNet 256x256 in one or two passes, {_parameters} parameters",
            tokenizer="vq_ds16",
            tiny=_TINY,
            tiny_tokenizer=TINY_TOKENIZER,
        )
    )
    register_checkpoint(
        Checkpoint(
            name=f"distilled_llamagen_{_size}.in1k_256",
            repo_id="microsoft/distilled_decoding",
            filename=f"LlamaGen-DD/llamagen-{_size.upper()}.pt",
            licence="not stated with the files",
            paper="arXiv 2412.17153",
            resolution=256,
            official_score=f"{_score} (README), pytorch-fid against ImageNet statistics of the authors",
            tokenizer="vq_ds16.in1k",
            sampling={**SAMPLING[_sizes[0]], **TEACHER},
        )
    )
