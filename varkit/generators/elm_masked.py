"""The masked generator of ELM (Xuantong Liu et al., arXiv 2410.16257, section 3.4), after MaskGIT (arXiv 2202.04200).

Source: Pepper-lll/LMforImageGeneration: llama/mlm_model.py (c2f29f0). Parameter names are those of the released files,
with the weights that no forward pass reads (`output`, `proj`, `pos_embed`), so that a file converts back whole. What
differs: how many tokens are masked in training is drawn for each image, not for the batch.

Every sub-code is an entry of the sequence, of which all see all: G class tokens, then the G sub-codes of each position.
One table serves all of them; its last row is the mask, which hides all sub-codes of a position. Logits are
products with the table's rows, through which no gradient flows.

Shapes: B batch, L image tokens, G sub-codes, V values of a sub-code, C width, S = (L + 1) G entries.
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
from varkit.generators.elm import (
    FREE_ARGUMENTS,
    SIZES,
    check_heads,
    fashion_sizes,
    tiny_of,
)
from varkit.generators.maskgit import MaskedGenerator, MaskedState, masked_cross_entropy
from varkit.generators.prefixed import LORA_TARGETS, ClassPrefix
from varkit.hub import HubMixin
from varkit.interfaces import Cond, Losses
from varkit.layers.llama import RMSNorm, Rotary, llama_blocks
from varkit.layout import TokenLayout, square_grids
from varkit.orders import GROUPED, order_groups, token_order
from varkit.registry import Checkpoint, ModelEntry, register_checkpoint, register_model
from varkit.rng import Draw, Rng


def mask_count(step: Tensor, num_steps: int, length: int) -> Tensor:
    """How many of `length` tokens are masked after `step` of `num_steps` steps: a cosine, at least one."""
    return (length * torch.cos(math.pi / 2 * step / num_steps)).floor().clamp_min(1)


class MaskedHead(nn.Module):
    """(B, n, C) -> logits of the table's rows."""

    def __init__(self, dim: int, rows: int) -> None:
        super().__init__()
        self.fc = nn.Linear(dim, dim)
        self.ln = nn.LayerNorm(dim)
        self.bias = nn.Parameter(torch.zeros(1, 1, rows))

    def forward(self, x: Tensor, table: Tensor) -> Tensor:
        return self.ln(F.gelu(self.fc(x))) @ table.detach().T + self.bias


class ELMMasked(HubMixin, ModelMixin, ConfigMixin, MaskedGenerator):
    """The class-conditional masked generator. The defaults are the released L-1-16.

    Args:
        num_steps: of sampling, unless a sampler says otherwise; training masks as sampling of so many steps does.
        Others: as `ELM`.
    Raises: ValueError where heads do not divide evenly, naming both sides.
    """

    _supports_gradient_checkpointing = True
    _no_split_modules = ("Block",)
    training_options = frozenset({"label_smoothing"})
    class_embedding = "cls_embedding.embedding_table"
    lora_targets = LORA_TARGETS
    free_arguments = FREE_ARGUMENTS | {"num_steps"}

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
        num_steps: int = 10,
        grid: int | Sequence[int] = 16,
        sub_codes: int = 1,
        code_bits: int = 16,
        latent_dim: int = 256,
    ) -> None:
        super().__init__()
        check_heads(hidden_size, num_heads)
        values = 2**code_bits
        self.layout = TokenLayout(square_grids([grid]), (values,) * sub_codes, latent_dim)
        self.num_classes = num_classes
        self.mask_id: int = values
        self.gradient_checkpointing = False
        self.cls_embedding = ClassPrefix(num_classes, hidden_size)
        self.tok_embedder = nn.Embedding(values + 1, hidden_size)
        self.tok_dropout = nn.Dropout(token_dropout)
        self.rotary = Rotary(self.layout.grids[0], hidden_size // num_heads, rope_base, repeats=sub_codes)
        self.layers: Any = llama_blocks(
            depth,
            hidden_size,
            num_heads,
            ffn_size=ffn_size,
            norm_eps=norm_eps,
            dropout=dropout,
            ffn_dropout=ffn_dropout,
            causal=False,
        )
        self.norm = RMSNorm(hidden_size, norm_eps)
        self.mlm_layer = MaskedHead(hidden_size, values + 1)
        self.pos_embed = nn.Embedding(self.layout.length, hidden_size).requires_grad_(False)
        heads = [nn.Linear(hidden_size, values + 1, bias=False) for _ in range(sub_codes)]
        self.output = (heads[0] if sub_codes == 1 else nn.ModuleList(heads)).requires_grad_(False)
        if sub_codes > 1:
            self.proj = nn.Linear(sub_codes * hidden_size, hidden_size, bias=False).requires_grad_(False)
        self.init_weights()

    @torch.no_grad()
    def init_weights(self, std: float = 0.02) -> None:
        """Linear and Embedding weights normal with `std`; biases and the heads that are not read zero."""
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Embedding):
                nn.init.normal_(module.weight, std=std)
            if isinstance(module, nn.Linear) and module.bias is not None:
                nn.init.zeros_(module.bias)
        for parameter in self.output.parameters():
            nn.init.zeros_(parameter)

    @property
    def blocks(self) -> Any:
        return self.layers

    # ---- the network --------------------------------------------------------------------------------------

    def forward(self, ids: Tensor, class_labels: Tensor) -> Tensor:
        """Partly masked ids (B, L, G) and classes (B,) -> logits of all positions (B, L, G, V) float32."""
        parts = ids.shape[2]
        first = self.cls_embedding(Cond(class_labels)).expand(-1, parts, -1)
        x = self.tok_dropout(torch.cat([first, self.tok_embedder(ids.flatten(1))], 1))  # B S C
        for block in self.layers:
            if self.gradient_checkpointing and torch.is_grad_enabled():
                x = self._gradient_checkpointing_func(block, x, self.rotary)
            else:
                x = block(x, self.rotary)
        logits = self.mlm_layer(self.norm(x[:, parts:]), self.tok_embedder.weight)
        return logits[..., : self.mask_id].float().unflatten(1, (-1, parts))

    # ---- sampling -----------------------------------------------------------------------------------------

    def schedule(self, num_steps: int | None = None) -> list[Tensor]:
        """Groups of a random order, few tokens first, as many as the cosine schedule of `MaskedSampler` decides.

        Raises: ValueError when there are more steps than tokens.
        """
        length = self.layout.length
        steps = min(self.config.num_steps, length) if num_steps is None else num_steps
        if not 1 <= steps <= length:
            raise ValueError(f"num_steps must be in 1 to {length}, the number of tokens; got {num_steps}")
        left = [length]  # open positions: at least one is decided a step, and one remains for each step to come
        for step in range(1, steps):
            wanted = int(mask_count(torch.tensor(step), steps, length))
            left.append(max(min(wanted, left[-1] - 1), steps - step))
        sizes = [a - b for a, b in zip(left, [*left[1:], 0], strict=True)]
        return list(token_order("random", self.layout.grids[0]).to(self.rotary.cos.device).split(sizes))

    def in_order(self, name: str, num_steps: int | None = None) -> list[Tensor]:
        sizes = [1] * self.layout.length
        if num_steps is not None or name in GROUPED:
            sizes = [len(group) for group in self.schedule(num_steps)]
        return [group.to(self.rotary.cos.device) for group in order_groups(name, self.layout.grids[0], sizes)]

    def start(self, cond: Cond, null: Cond | None = None) -> MaskedState:
        shape = (len(cond), self.layout.length, self.config.sub_codes)
        tokens = torch.full(shape, self.mask_id, device=self.rotary.cos.device)
        return MaskedState(tokens, cond.beside(null).labels, null is not None, self.mask_id)

    # ---- training -----------------------------------------------------------------------------------------

    def draw_mask(self, rng: Rng) -> Tensor:
        """(B, L) bool: as many as are masked at some step of sampling, any of them."""
        rng, length, steps = rng.to(self.rotary.cos.device), self.layout.length, self.config.num_steps
        u = rng.uniform(torch.zeros(1, dtype=torch.int64), Draw.MASK, step=1)  # B 1
        count = mask_count((u * steps).floor(), steps, length)
        places = torch.arange(length, device=u.device)
        return rng.uniform(places, Draw.MASK).argsort(dim=1, stable=True).argsort(1) < count

    def training_loss(  # type: ignore[override]
        self, tokens: Tensor, inputs: Tensor, cond: Cond, rng: Rng, *, label_smoothing: float = 0.1
    ) -> Losses:
        """Cross entropy of randomly masked tokens, mean over their sub-codes. In eval mode no label is dropped.

        Args: tokens: (B, L, G) ids.   inputs: not read.   cond: class ids.   label_smoothing: in [0, 1).
        Returns: loss; accuracy on masked sub-codes; masked, their share.
        """
        labels, mask = cond.labels, self.draw_mask(rng)
        if self.training:
            labels = drop_labels(labels, rng, self.config.cond_drop_rate, self.num_classes)
        return self.masked_loss(tokens, mask, labels, label_smoothing)

    def masked_loss(self, tokens: Tensor, mask: Tensor, labels: Tensor, label_smoothing: float = 0.1) -> Losses:
        """As `training_loss`, with the mask given, (B, L) bool."""
        logits = self(tokens.masked_fill(mask[..., None], self.mask_id), labels)
        every = mask[..., None].expand_as(tokens).flatten(1)  # B LG
        loss, accuracy = masked_cross_entropy(logits.flatten(1, 2), tokens.flatten(1), every, label_smoothing, 0.0)
        return {"loss": loss, "accuracy": accuracy, "masked": mask.float().mean()}


def _builder(**preset: Any) -> Callable[..., ELMMasked]:
    return lambda **overrides: cast(ELMMasked, ELMMasked(**{**preset, **overrides}))


MASKED_SAMPLING = {"num_steps": 10, "mask_schedule": "cosine", "draw": "plain", "confidence": "log-prob"}
"""The release's way of drawing; it names no guidance for these files."""

_PRESETS: dict[str, tuple[dict[str, Any], str, str]] = {
    "elm_mlm_fashion": (fashion_sizes(), "bae_fashion", "Fashion-MNIST at 32x32: masked, 64 tokens of two sub-codes")
}
for _size, _count in (("l", "445 M"), ("xl", "903 M"), ("xxl", "1.56 B")):
    _depth, _width, _heads = SIZES[_size]
    _PRESETS[f"elm_mlm_{_size}_1_16"] = (
        {"depth": _depth, "hidden_size": _width, "num_heads": _heads},
        "bae_1_16",
        f"ELM MLM-{_size.upper()}-1-16: masked, ImageNet 256x256, {_count} parameters with those that are not read",
    )
    register_checkpoint(
        Checkpoint(
            name=f"elm_mlm_{_size}_1_16.in1k_256",
            repo_id="xuantonglll/ELM",
            filename=f"gpt/mlm{_size.upper()}-1-16.pth",
            licence="not stated with the files",
            paper="arXiv 2410.16257",
            resolution=256,
            official_score="none noted here",
            tokenizer="bae_1_16.in1k_256",
            sampling=MASKED_SAMPLING,
        )
    )
for _name, (_preset, _tokenizer, _summary) in _PRESETS.items():
    _tiny, _tiny_tokenizer = tiny_of(_preset.get("sub_codes", 1))
    register_model(
        ModelEntry(
            _name,
            "generator",
            _builder(**_preset),
            _summary,
            tokenizer=_tokenizer,
            tiny={**_tiny, "num_steps": 4},
            tiny_tokenizer=_tiny_tokenizer,
        )
    )
