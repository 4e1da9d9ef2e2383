"""The VAR that draws all scales in one pass: the student of Distilled Decoding (arXiv 2412.17153).

Source: microsoft/distilled_decoding: VAR/models/dd.py (3b95d33); parameter names are those of the released files.

A level of one token, the class, stands before the scales, and tokens are not shifted: position p holds the vector of
token p itself. A position sees itself and coarser levels alone, for tokens of one scale are drawn apart by their own
noise. Whether a position is data or noise is embedded and added to the input, within every block between its two
branches, and before both heads. What differs from the release: the mask and the levels are no part of the weights, t
may be on any device, and `shared_adaln` teachers have students too.

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
from varkit.generators.var import VAR, ModulatedNorm, initialise, var_blocks
from varkit.hub import HubMixin
from varkit.layout import TokenLayout, square_grids
from varkit.registry import Checkpoint, ModelEntry, register_checkpoint, register_model
from varkit.tokenizers.multiscale_vq import SCALES_256


class DistilledVAR(Student, HubMixin, ModelMixin, ConfigMixin):
    """The student of a VAR. The defaults are the released student of VAR-d16.

    Args: those of `VAR`, but for cond_drop_rate: guidance is learned from the teacher, and no label is dropped.
        official_quirks: `of_teacher` damages the embedding of class 1 and leaves that of the new level alone, as the
            release does by a wrong name.
    Raises: ValueError when hidden_size is no multiple of num_heads.
    """

    _supports_gradient_checkpointing = True
    _no_split_modules = ("Block",)
    unit = "scale"
    no_decay = (*VAR.no_decay, "n_d_embed.weight", "scale_shift_table")

    @register_to_config
    def __init__(
        self,
        num_classes: int = 1000,
        depth: int = 16,
        hidden_size: int = 1024,
        num_heads: int = 16,
        mlp_ratio: float = 4.0,
        dropout: float = 0.0,
        attention_dropout: float = 0.0,
        drop_path_rate: float = 0.0,
        norm_eps: float = 1e-6,
        shared_adaln: bool = False,
        attn_l2_norm: bool = True,
        scales: Sequence[int | Sequence[int]] = SCALES_256,
        codebook_size: int = 4096,
        latent_dim: int = 32,
        official_quirks: bool = False,
    ) -> None:
        super().__init__()
        if hidden_size % num_heads:
            raise ValueError(f"hidden_size {hidden_size} must be a multiple of num_heads {num_heads}")
        self.layout = TokenLayout(square_grids(scales), codebook_size, latent_dim)
        self.num_classes, self.num_units = num_classes, len(self.layout.grids)
        self.gradient_checkpointing = False

        self.word_embed = nn.Linear(latent_dim, hidden_size)
        self.class_emb = nn.Embedding(num_classes + 1, hidden_size)
        self.pos_start = nn.Parameter(torch.empty(1, 1, hidden_size))
        self.pos_1LC = nn.Parameter(torch.empty(1, 1 + self.layout.length, hidden_size))
        self.lvl_embed = nn.Embedding(1 + self.num_units, hidden_size)
        sizes = torch.tensor((1, *self.layout.sizes))
        levels = torch.repeat_interleave(torch.arange(len(sizes)), sizes, output_size=1 + self.layout.length)
        seen = (levels[:, None] > levels) | torch.eye(len(levels), dtype=torch.bool)
        self.register_buffer("levels", levels, persistent=False)  # 1+L: 0 of the class, 1 + scale
        self.register_buffer("units", levels[1:] - 1, persistent=False)  # L
        self.register_buffer("seen", seen, persistent=False)  # 1+L 1+L

        self.shared_ada_lin = (
            nn.Sequential(nn.SiLU(), nn.Linear(hidden_size, 6 * hidden_size)) if shared_adaln else nn.Identity()
        )
        self.blocks: Any = var_blocks(
            depth,
            hidden_size,
            num_heads,
            mlp_ratio,
            shared_adaln=shared_adaln,
            l2_norm=attn_l2_norm,
            norm_eps=norm_eps,
            dropout=dropout,
            attention_dropout=attention_dropout,
            drop_path_rate=drop_path_rate,
        )
        self.head_nm: Any = ModulatedNorm(hidden_size, norm_eps)
        self.head = nn.Linear(hidden_size, codebook_size)
        self.n_d_embed = nn.Embedding(2, hidden_size)
        self.layerwise_n_d_embed: Any = nn.ModuleList(nn.Linear(hidden_size, hidden_size) for _ in range(depth + 1))
        self.final_layer_conti = ContinuousHead(hidden_size, latent_dim)
        self.init_weights()

    @torch.no_grad()
    def init_weights(self) -> None:
        """As `VAR.init_weights`; `n_d_embed` normal with a deviation of 0.02; the continuous head answers zero."""
        initialise(self)
        nn.init.normal_(self.n_d_embed.weight, std=0.02)
        nn.init.zeros_(self.final_layer_conti.linear.weight)

    @classmethod
    @torch.no_grad()
    def of_teacher(cls, teacher: Any, **overrides: Any) -> Self:
        """See `Student.of_teacher`. The teacher's first scale must be one token.

        Rows of positions and levels move up behind a new one: that of the class stays the first, as the teacher's first
        scale read the class; that of the first scale is new.
        """
        require_class_teacher(teacher, VAR)
        if teacher.layout.sizes[0] != 1:
            raise ValueError(f"the teacher's first scale must be one token; it is {teacher.layout.grids[0]}")
        own = {k: v for k, v in teacher.config.items() if not k.startswith("_")}
        left_out = ("cond_drop_rate", "official_quirks", "control", "control_drop_rate")
        own = {k: v for k, v in own.items() if k not in left_out}
        student = cls(**{**own, **overrides})
        state, given = student.state_dict(), teacher.state_dict()
        for name, rows in (("pos_1LC", given.pop("pos_1LC")[0]), ("lvl_embed.weight", given.pop("lvl_embed.weight"))):
            table = state[name].view(-1, rows.shape[-1])
            table[0], table[2:] = rows[0], rows[1:]
        student.load_state_dict({**state, **{k: v for k, v in given.items() if k in state}})
        if student.config.official_quirks:  # as the release, where the line names the wrong table
            nn.init.normal_(student.lvl_embed.weight[1])
            nn.init.trunc_normal_(student.class_emb.weight[1], std=(1 / student.config.hidden_size / 3) ** 0.5)
        return student

    def forward(self, x: Tensor, class_labels: Tensor, known: Tensor) -> Prediction:
        """See `Student.forward`."""
        cond = self.class_emb(class_labels)  # B W
        flag = flags(known, len(x))
        kinds = self.n_d_embed.weight  # 2 W: noise, data
        h = torch.cat([cond[:, None] + self.pos_start, self.word_embed(x.to(self.word_embed.weight.dtype))], 1)
        h = h + self.lvl_embed(self.levels) + self.pos_1LC + kinds[flag]
        shared = None
        if self.config.shared_adaln:
            shared = self.shared_ada_lin(cond)[:, None].unflatten(-1, (6, -1))  # B 1 6 W
        for block, layer in zip(self.blocks, self.layerwise_n_d_embed, strict=False):
            inputs = (h, block.modulation(cond, shared), self.seen, None, 0, layer(kinds)[flag])
            if self.gradient_checkpointing and torch.is_grad_enabled():
                h = self._gradient_checkpointing_func(block, *inputs)
            else:
                h = block(*inputs)
        h = (h + self.layerwise_n_d_embed[-1](kinds)[flag])[:, 1:]
        return Prediction(self.final_layer_conti(h, cond).float(), self.head(self.head_nm(h, cond)).float())


def _builder(**preset: Any) -> Callable[..., DistilledVAR]:
    return lambda **overrides: cast(DistilledVAR, DistilledVAR(**{**preset, **overrides}))


_TINY = {
    "num_classes": 3,
    "depth": 2,
    "hidden_size": 32,
    "num_heads": 2,
    "scales": (1, 2, 4),
    "codebook_size": 24,
    "latent_dim": 4,
}
_TINY_TOKENIZER = {
    "codebook_size": 24,
    "latent_dim": 4,
    "base_channels": 32,
    "channel_multipliers": (1, 1),
    "num_res_blocks": 1,
    "scales": (1, 2, 4),
}
SAMPLING: dict[int, dict[str, Any]] = {
    16: {"times": (0, 5), "split": 5},
    20: {"times": (0, 4), "split": 4},
    24: {"times": (0, 4), "split": 4},
}
"""Of the released students, by depth; the teacher's, where it takes part, is that of `TEACHER`."""

TEACHER = {"guidance_scale": 3.0, "guidance_schedule": "linear", "top_k": 900, "top_p": 0.95}
"""Official cfg 2.0 is guidance_scale 3.0 here: w = 1 + cfg."""

for _depth, _parameters, _score in (
    (16, "328 M", "FID 9.94 in 1 step, 7.82 in 2"),
    (20, "635 M", "FID 9.55 in 1 step, 7.33 in 2"),
    (24, "1.09 B", "FID 8.92 in 1 step, 6.95 in 2"),
):
    register_model(
        ModelEntry(
            f"distilled_var_d{_depth}",
            "student",
            _builder(depth=_depth, hidden_size=64 * _depth, num_heads=_depth, drop_path_rate=0.1 * _depth / 24),
            f"student of VAR-d{_depth}: ImageNet 256x256 in one or two passes, {_parameters} parameters",
            tokenizer="multiscale_vq_f16",
            tiny=_TINY,
            tiny_tokenizer=_TINY_TOKENIZER,
        )
    )
    register_checkpoint(
        Checkpoint(
            name=f"distilled_var_d{_depth}.in1k_256",
            repo_id="microsoft/distilled_decoding",
            filename=f"VAR-DD/var-d{_depth}.pth",
            licence="not stated with the files",
            paper="arXiv 2412.17153",
            resolution=256,
            official_score=f"{_score} (README), pytorch-fid against ImageNet statistics of the authors",
            tokenizer="multiscale_vq_f16.openimages",
            sampling={**SAMPLING[_depth], **TEACHER},
        )
    )
