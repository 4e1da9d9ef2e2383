"""A toy paper, as its authors would publish it: patches are coded one by one and predicted in raster order.

One file outside varkit. Nothing in varkit knows it; its entry point registers both builders, and the suite
of registered models runs on them as on any other.

Shapes: B images, L patches in raster order, V codes, C code channels, D width.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.modeling_utils import ModelMixin
from torch import Tensor, nn

from varkit.heads.categorical import Categorical, weighted_cross_entropy
from varkit.interfaces import Cond, Generator, Losses, State, Tokenizer
from varkit.layout import TokenLayout
from varkit.registry import ModelEntry, register_model
from varkit.rng import Draw, Rng


class PreviousToken:
    """To predict a patch the generator reads the id of the patch before it; the first reads id 0."""

    def __init__(self, batch: int, length: int, device: torch.device) -> None:
        self.ids = torch.zeros(batch, length + 1, dtype=torch.int64, device=device)  # shifted by one

    def inputs(self, positions: Tensor) -> Tensor:
        return self.ids[:, positions]

    def record(self, tokens: Tensor, positions: Tensor) -> None:
        self.ids[:, positions + 1] = tokens


class ToyVQ(ModelMixin, ConfigMixin, Tokenizer):
    """Each patch becomes the nearest of V codes; a code is painted back by one linear layer."""

    @register_to_config
    def __init__(
        self, grid: tuple[int, int] = (4, 4), patch: int = 4, codebook_size: int = 32, latent_dim: int = 8
    ) -> None:
        super().__init__()
        self.layout = TokenLayout((tuple(grid),), codebook_size, latent_dim)
        self.proj_in = nn.Linear(3 * patch * patch, latent_dim)
        self.codes = nn.Embedding(codebook_size, latent_dim)
        self.proj_out = nn.Linear(latent_dim, 3 * patch * patch)

    @property
    def image_size(self) -> tuple[int, int]:
        height, width = self.layout.grids[0]
        return height * self.config.patch, width * self.config.patch

    @property
    def codebook(self) -> Tensor:
        return self.codes.weight.float()

    def encode(self, images: Tensor, rng: Rng | None = None) -> Tensor:
        if tuple(images.shape[1:]) != (3, *self.image_size):
            raise ValueError(f"images must be (B, 3, *{self.image_size}); got {tuple(images.shape)}")
        patches = F.unfold(images, self.config.patch, stride=self.config.patch).transpose(1, 2)  # B L 3pp
        z = self.proj_in(patches.to(self.proj_in.weight.dtype)).float()
        return torch.cdist(z, self.codebook.expand(len(z), -1, -1)).argmin(-1)

    def decode(self, tokens: Tensor, rng: Rng | None = None) -> Tensor:
        vectors = tokens if tokens.is_floating_point() else self.vectors(tokens)
        patches = self.proj_out(vectors.to(self.proj_out.weight.dtype)).transpose(1, 2)  # B 3pp L
        return F.fold(patches, self.image_size, self.config.patch, stride=self.config.patch).clamp(-1, 1)

    def vectors(self, ids: Tensor) -> Tensor:
        return self.codes(ids).float()

    def embed(self, tokens: Tensor) -> Tensor:
        return F.pad(tokens[:, :-1], (1, 0))

    def running(self, batch: int) -> PreviousToken:
        return PreviousToken(batch, self.layout.length, self.codes.weight.device)


class ToyState(State):
    """What the generator has read so far: it keeps inputs, not keys, and reads them all again each step."""

    def __init__(self, labels: Tensor, guided: bool) -> None:
        self.labels, self.guided, self.length = labels, guided, 0
        self.read = torch.empty(len(labels), 0, dtype=torch.int64, device=labels.device)

    def rewind(self, count: int) -> None:
        self.length -= count
        self.read = self.read[:, : self.length]

    def reset(self) -> None:
        self.rewind(self.length)


class ToyRaster(ModelMixin, ConfigMixin, Generator):
    """A recurrent next-patch generator that starts from its class."""

    @register_to_config
    def __init__(
        self,
        num_classes: int = 3,
        hidden_size: int = 32,
        cond_drop_rate: float = 0.1,
        grid: tuple[int, int] = (4, 4),
        codebook_size: int = 32,
        latent_dim: int = 8,
    ) -> None:
        super().__init__()
        self.layout = TokenLayout((tuple(grid),), codebook_size, latent_dim)
        self.num_classes = num_classes
        self.classes = nn.Embedding(num_classes + 1, hidden_size)
        self.tokens = nn.Embedding(codebook_size, hidden_size)
        self.positions = nn.Parameter(torch.randn(self.layout.length, hidden_size))
        self.network = nn.GRU(hidden_size, hidden_size, batch_first=True)
        self.head = nn.Linear(hidden_size, codebook_size)

    def forward(self, inputs: Tensor, class_labels: Tensor) -> Tensor:
        """Ids read (B, n) and classes (B,) -> teacher-forced logits (B, n, V) float32."""
        x = torch.cat([self.classes(class_labels)[:, None], self.tokens(inputs[:, 1:])], 1)
        return self.head(self.network(x + self.positions[: x.shape[1]])[0]).float()

    def schedule(self, num_steps: int | None = None) -> list[Tensor]:
        if num_steps not in (None, self.layout.length):
            raise ValueError(f"one patch a step, {self.layout.length} in all; got num_steps={num_steps}")
        return list(torch.arange(self.layout.length, device=self.positions.device).split(1))

    def start(self, cond: Cond, null: Cond | None = None) -> ToyState:
        return ToyState(cond.vector if null is None else torch.cat([cond.vector, null.vector]), null is not None)

    def predict(self, state: State, inputs: Tensor, positions: Tensor) -> Categorical:
        assert isinstance(state, ToyState)
        n = positions.shape[-1]
        inputs = torch.cat([inputs, inputs]) if state.guided else inputs
        state.read = torch.cat([state.read[:, : state.length], inputs], 1)
        logits = self(state.read, state.labels)[:, -n:]
        return Categorical(*logits.chunk(2)) if state.guided else Categorical(logits)

    def append(self, state: State, tokens: Tensor, positions: Tensor) -> None:
        assert isinstance(state, ToyState)
        state.length += positions.shape[-1]

    def training_loss(self, tokens: Tensor, inputs: Tensor, cond: Cond, rng: Rng, **options: Any) -> Losses:
        labels = cond.vector
        if self.training:
            u = rng.uniform(torch.zeros(1, dtype=torch.int64), Draw.COND_DROP)[:, 0]
            labels = labels.masked_fill(u.to(labels.device) < self.config.cond_drop_rate, self.num_classes)
        return {"loss": weighted_cross_entropy(self(inputs, labels), tokens, 1 / self.layout.length)}


def _builder(cls: Callable[..., Any]) -> Callable[..., Any]:
    return lambda **overrides: cls(**overrides)


_TINY = {"grid": (2, 3), "codebook_size": 7, "latent_dim": 4}
register_model(ModelEntry("toy_vq", "tokenizer", _builder(ToyVQ), "a plain patch quantiser", tiny=_TINY))
register_model(
    ModelEntry(
        "toy_raster",
        "generator",
        _builder(ToyRaster),
        "next patch in raster order",
        tokenizer="toy_vq",
        tiny={**_TINY, "hidden_size": 16},
        tiny_tokenizer=_TINY,
    )
)
