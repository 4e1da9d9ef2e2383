"""The seams of varkit: what a tokenizer, a generator, a predictive and an objective promise each other.

What flows between them: images (B, 3, H, W) in [-1, 1]; tokens as ONE flat tensor in layout order,
ids (B, L) int64 or latents (B, L, C) float. Everything else is private to its file.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, Protocol, Self, cast

import torch
from torch import Tensor, nn

from varkit.layout import TokenLayout
from varkit.rng import Rng

Processor = Callable[[Tensor], Tensor]
"""A function of logits (..., V) that returns new logits of the same shape; -inf forbids an entry."""

Losses = dict[str, Tensor]
"""Named scalars; `loss` is the one to minimise, the others are for the log."""


JOINT = -1
"""In `Cond.phrase`: of what reads all phrases."""


@dataclass(frozen=True)
class Cond:
    """An encoded condition of B images: a class, a text, control images, or some of them at once.

    vector: class ids (B,) int64, or (B, D) float.
    sequence, mask: features (B, T, D) float, such as a text's, and where they are real, (B, T) bool.
    control, control_weight: K control images each, (B, K, 3, H, W) float in [-1, 1], and how strongly each steers,
        (B, K) float, 0 where it is absent.
    phrase: of a sequence that is a set of phrases, (B, T) int64: the phrase that each feature belongs to, which reads
        no other one; JOINT (the last one) reads all. None: each sequence is one phrase.
    """

    vector: Tensor | None = None
    sequence: Tensor | None = None
    mask: Tensor | None = None
    control: Tensor | None = None
    control_weight: Tensor | None = None
    phrase: Tensor | None = None

    def __post_init__(self) -> None:
        if self.vector is None and self.sequence is None and self.control is None:
            raise ValueError("a condition needs a vector, a sequence or control images")
        if (self.sequence is None) != (self.mask is None):
            raise ValueError("a sequence and its mask come together")
        if (self.control is None) != (self.control_weight is None):
            raise ValueError("control images and their weights come together")
        if self.phrase is not None and (self.mask is None or self.phrase.shape != self.mask.shape):
            raise ValueError("phrase says of each feature of a sequence to which phrase it belongs: (B, T), as mask")

    def __len__(self) -> int:
        return len(next(t for t in self._parts if t is not None))

    @property
    def _parts(self) -> tuple[Tensor | None, ...]:
        return self.vector, self.sequence, self.mask, self.control, self.control_weight, self.phrase

    @property
    def labels(self) -> Tensor:
        """The vector. Raises ValueError when there is none."""
        if self.vector is None:
            raise ValueError("this model is conditioned on classes; the condition given holds none")
        return self.vector

    @property
    def text(self) -> tuple[Tensor, Tensor]:
        """Sequence and mask. Raises ValueError when there are none."""
        if self.sequence is None or self.mask is None:
            raise ValueError("this model is conditioned on a sequence, such as a text; the condition given holds none")
        return self.sequence, self.mask

    def _each(self, change: Callable[[Tensor], Tensor]) -> Cond:
        return Cond(*[None if t is None else change(t) for t in self._parts])

    def to(self, device: torch.device) -> Cond:
        return self._each(lambda t: t.to(device))

    def __getitem__(self, rows: slice | Tensor) -> Cond:
        """The condition of some of the images."""
        return self._each(lambda t: t[rows])

    def __add__(self, other: Cond) -> Cond:
        """Both conditions of the same images. Raises ValueError where both hold the same part, or of other images."""
        if len(self) != len(other):
            raise ValueError(f"conditions of {len(self)} and of {len(other)} images cannot be joined")
        names = ("vector", "sequence", "mask", "control", "control_weight", "phrase")
        for name, a, b in zip(names, self._parts, other._parts, strict=True):
            if a is not None and b is not None:
                raise ValueError(f"both conditions hold a {name}; join conditions of different parts")
        pairs = zip(self._parts, other._parts, strict=True)
        return Cond(*[b if a is None else a for a, b in pairs])

    def _faded(self, like: Cond) -> Cond:
        """With control images as those of `like`, of weight 0, where it has none and `like` has some; and each sequence
        one phrase, where those of `like` are several."""
        same = self
        if self.control is None and like.control is not None and like.control_weight is not None:
            image, weight = (t.new_zeros(len(self), *t.shape[1:]) for t in (like.control, like.control_weight))
            same = replace(same, control=image, control_weight=weight)
        if self.phrase is None and like.phrase is not None and self.mask is not None:
            same = replace(same, phrase=torch.zeros_like(self.mask, dtype=torch.int64))
        return same

    def beside(self, other: Cond | None) -> Cond:
        """This condition with the rows of `other` below it: what a guided batch is conditioned on.

        Where one of them has no control images, its rows get some of weight 0: they are not steered.
        """
        if other is None:
            return self
        pairs = zip(self._faded(other)._parts, other._faded(self)._parts, strict=True)
        return Cond(*[None if a is None or b is None else torch.cat([a, b]) for a, b in pairs])


class Condition(ABC):
    """Turns what a user gives (labels, prompts, ...) into a `Cond`, and knows the absence of it."""

    @abstractmethod
    def encode(self, **values: Any) -> Cond:
        """Takes the values it needs by keyword. Raises ValueError naming the bad value and the allowed ones."""

    @abstractmethod
    def null(self, like: Cond) -> Cond:
        """The unconditional branch for a batch shaped as `like`."""


class Running(Protocol):
    """What has been decided so far of a batch, as the generator reads it."""

    def inputs(self, positions: Tensor) -> Tensor:
        """(B, n, C), or (B, n) ids: what is read to predict `positions` (B, n)."""
        ...

    def record(self, tokens: Tensor, positions: Tensor) -> None:
        """Note decided tokens: ids (B, n) or vectors (B, n, C)."""
        ...


class PreviousToken:
    """To predict a position, what is read is the id before it in the sequence; the first reads id 0, which models of
    this kind replace by their condition.

    Args:
        shape: (B, L), or (B, L, G) of factorised codes, or (B, L, C) of latents.
        order: (L,) positions in the order of prediction; None is that of the layout.
        latents: whether tokens are float vectors; the first then reads zeros.
    """

    def __init__(
        self, shape: Sequence[int], device: torch.device, order: Tensor | None = None, latents: bool = False
    ) -> None:
        batch, length, *more = shape
        dtype = torch.float32 if latents else torch.int64
        self.ids = torch.zeros(batch, length + 1, *more, dtype=dtype, device=device)  # shifted by one
        self.latents = latents
        self.rank = None if order is None else order.argsort().to(device)  # when each position's turn is

    def turns(self, positions: Tensor) -> Tensor:
        return positions if self.rank is None else self.rank[positions]

    def _at(self, turns: Tensor) -> tuple[Any, Tensor]:
        """Indices into `ids`: the same turns (n,) for all images, or (B, n)."""
        if turns.dim() == 1:
            return slice(None), turns
        return torch.arange(len(self.ids), device=self.ids.device)[:, None], turns

    def inputs(self, positions: Tensor) -> Tensor:
        return self.ids[self._at(self.turns(positions))]

    def record(self, tokens: Tensor, positions: Tensor) -> None:
        if tokens.is_floating_point() and not self.latents:
            raise ValueError("more_smooth hands on mixtures of codes, but this model reads ids: leave it off")
        self.ids[self._at(self.turns(positions) + 1)] = tokens.to(self.ids.dtype)


class Tokenizer(ABC):
    """Images <-> tokens, (B, L) ids or (B, L, C) latents; ids of factorised codes are (B, L, G).

    Discrete ones also give `codebook` (V, C) and `vectors(ids)`. Tokenizers of clips have `num_frames`, and take and
    give (B, 3, num_frames, H, W) wherever here it says images.
    """

    layout: TokenLayout

    num_frames: int | None = None
    """Frames of the clips that `layout` codes. None: it codes images."""

    @property
    @abstractmethod
    def image_size(self) -> tuple[int, int]:
        """Height and width of the images that `layout` codes."""

    @property
    def codebook(self) -> Tensor:
        """(V, C) float32. Raises ValueError where tokens are latents."""
        raise ValueError(f"{type(self).__name__} codes latents: it has no codebook")

    @abstractmethod
    def encode(self, images: Tensor, rng: Rng | None = None) -> Tensor:
        """(B, 3, H, W) in [-1, 1] -> tokens (B, L) or (B, L, C). Raises ValueError on another size."""

    def moments(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """(B, 3, H, W) in [-1, 1] -> mean and standard deviation (B, L, C) of the latents, normal given the images.

        `encode` with an rng adds noise of `Draw.LATENT`. Raises ValueError where tokens are ids, or another size.
        """
        raise ValueError(f"{type(self).__name__} has no posterior over latents: its tokens have no moments")

    @abstractmethod
    def decode(self, tokens: Tensor, rng: Rng | None = None) -> Tensor:
        """Ids (B, L) or vectors (B, L, C) -> images (B, 3, H, W) in [-1, 1]."""

    def encode_start(self, frames: Tensor) -> Tensor:
        """The tokens that the first frames of clips determine: (B, 3, t, H, W) in [-1, 1] -> (B, k) or (B, k, C), equal
        to those of every clip that begins so, at `start_positions(k)`.

        Raises: ValueError for a number of frames that no whole tokens cover, or where tokens depend on all frames.
        """
        raise ValueError(
            f"{type(self).__name__} codes {'a clip as a whole' if self.num_frames else 'images'}: no first tokens "
            f"belong to its first frames. Take a causal tokenizer of clips, or one that codes frame by frame"
        )

    def start_positions(self, count: int) -> Tensor:
        """(k,) int64: where in `layout` the k tokens lie that `encode_start` gives; unless said otherwise the first."""
        return torch.arange(count)

    def vectors(self, ids: Tensor) -> Tensor:
        """(B, n) ids, or (B, n, G) of factorised codes, -> (B, n, C) float32 codebook vectors."""
        raise ValueError(f"{type(self).__name__} codes latents: it has no ids")

    def embed(self, tokens: Tensor) -> Tensor:
        """Tokens (B, L) -> the generator's teacher-forcing inputs, (B, L, C) or (B, L).

        Unless a tokenizer says otherwise: the id before each position, 0 for the first.
        """
        return torch.cat([torch.zeros_like(tokens[:, :1]), tokens[:, :-1]], 1)

    def resized(self, grid: tuple[int, int]) -> Self:
        """The same network, with the same weights, for images of another grid of finest tokens (h, w).

        Raises: ValueError where it cannot.
        """
        raise ValueError(f"{type(self).__name__} codes images of {self.image_size[0]}x{self.image_size[1]} alone")

    def running(self, batch: int) -> Running:
        """The step-by-step form of `embed`, for sampling."""
        factors = self.layout.codebook_size
        if factors is None:
            device = next(cast(nn.Module, self).parameters()).device
            return PreviousToken((batch, self.layout.length, self.layout.dim), device, latents=True)
        groups = (len(factors),) if isinstance(factors, tuple) else ()
        return PreviousToken((batch, self.layout.length, *groups), self.codebook.device)


class Predictive(ABC):
    """What a generator says about the tokens at some positions."""

    @abstractmethod
    def guide(self, scale: float | Tensor) -> Self:
        """Classifier-free guidance uncond + scale * (cond - uncond); `scale` is a number or (n,)."""

    @abstractmethod
    def sample(self, rng: Rng, positions: Tensor, processors: Sequence[Processor] = ()) -> Tensor:
        """Draw tokens for `positions` (n,) or (B, n)."""


class State(ABC):
    """A generator's memory of one batch being sampled; sized once, at `start`."""

    length: int
    """Positions predicted and appended so far."""

    @abstractmethod
    def rewind(self, count: int) -> None:
        """Forget the last `count` positions."""

    @abstractmethod
    def reset(self) -> None:
        """Forget all positions; the condition stays."""

    def expect_guidance(self, on: bool) -> None:  # noqa: B027 - no duty: most states keep both branches in a cache
        """Whether the predictions from here on will be guided. Where nothing is cached, the unconditional branch can be
        left out meanwhile."""


class Generator(ABC):
    """Predicts tokens group by group. `schedule` is the paper's flavour; `predict` runs the network."""

    layout: TokenLayout

    training_options: frozenset[str] = frozenset()
    """What `training_loss` takes besides its tensors. Two names mean the same for every generator: `weight`, (B, L) of
    each token's loss; and `hidden_layer`, the block, from 1, whose output (B, n, C) comes back as `hidden`."""

    condition: str = "class"
    """What it is conditioned on: `class`, ids of which the last, `num_classes`, stands for none; or `text`, a sequence
    of `config.text_length` features of `config.text_dim` numbers, for which `null(cond)` gives the absence."""

    @property
    def takes(self) -> frozenset[str]:
        """All that it is conditioned on: its `condition`, and `control` where it has a network for control images."""
        steered = getattr(self, "controller", None) is not None
        return frozenset({self.condition, "control"} if steered else {self.condition})

    reads_phrases: bool = False
    """Of a generator of texts: whether it can read a set of phrases (`Cond.phrase`) whose order has no meaning."""

    mask_id: int | None = None
    """Of a generator that reads ids: the id that it reads where an input is masked, if it has one."""

    causal: bool = True
    """Whether what is predicted depends on tokens decided before alone, so that one teacher-forced pass gives all
    predictions at once. A masked generator's does not: it depends on which positions are still open."""

    guidance_by: Literal["groups", "tokens"] = "groups"
    """What a guidance schedule counts where tokens are continuous: groups drawn, or the share of tokens."""

    first_frames: int = 0
    """Of a generator of clips: how many first frames must be known, because it predicts what follows them."""

    positions_per_token: int = 1
    """Positions that are always decided together, such as those of a patch; guidance by tokens counts them as one."""

    sampler: str = "NextGroupSampler"
    """The class of the sampler that its pipelines get unless another is given."""

    @abstractmethod
    def schedule(self, num_steps: int | None = None) -> list[Tensor]:
        """The groups, in order: (n,) int64 positions each, the same for every image."""

    def groups(self, rng: Rng, num_steps: int | None = None, order: str | None = None) -> list[Tensor]:
        """The groups of one batch: those of `schedule`, or of `in_order`, (n,) each, or (B, n) where each image has its
        own."""
        return self.schedule(num_steps) if order is None else self.in_order(order, num_steps)

    def groups_around(
        self, keep: Tensor, rng: Rng, num_steps: int | None = None, order: str | None = None
    ) -> tuple[Tensor, list[Tensor]]:
        """As `groups`, where the tokens of `keep` (B, L) bool are known.

        Returns: positions (B, k) whose known tokens are appended before the first group, and the groups, of all others.
        A generator that can read known tokens in any order gives the former. Others draw all tokens, and known ones
        take their places as they come.
        """
        return torch.zeros(len(keep), 0, dtype=torch.int64, device=keep.device), self.groups(rng, num_steps, order)

    def in_order(self, name: str, num_steps: int | None = None) -> list[Tensor]:
        """As `schedule`, in the order of that name (`varkit.orders`).

        Args: num_steps: groups as large as those of `schedule`; None is one position a step, or of an order of groups
            (`lpd`) and of generators that are never asked for single positions (MAR) their own number.
        Raises: ValueError when this generator knows no other order than its own, or not this one.
        """
        raise ValueError(
            f"{type(self).__name__} predicts its tokens in one order only; order= goes with RAR, MaskGIT, MAR and alike"
        )

    def resized(self, grid: tuple[int, int]) -> Self:
        """The same network, with the same weights, for images of another grid of finest tokens (h, w).

        Raises: ValueError where it cannot, and why.
        """
        raise ValueError(
            f"{type(self).__name__} has learned positions of its own grid {self.layout.grids[-1]} and draws this size "
            f"alone; VAR, whose positions are interpolated, and LlamaGen, whose are computed, draw others"
        )

    def tokenizer_for(self, tokenizer: Tokenizer) -> Tokenizer:
        """The tokenizer whose tokens it predicts, around or instead of the one given; most take it as it is."""
        return tokenizer

    @abstractmethod
    def start(self, cond: Cond, null: Cond | None = None) -> State:
        """Begin a batch; with `null` every prediction carries the unconditional branch too."""

    @abstractmethod
    def predict(self, state: State, inputs: Tensor, positions: Tensor) -> Predictive:
        """`inputs[:, i]` is what is read to predict `positions[i]`."""

    @abstractmethod
    def append(self, state: State, tokens: Tensor, positions: Tensor) -> None:
        """Record decided tokens."""

    @abstractmethod
    def training_loss(self, tokens: Tensor, inputs: Tensor, cond: Cond, rng: Rng, **options: Any) -> Losses:
        """Named losses of teacher-forced prediction."""


class Objective(nn.Module, ABC):
    """What is trained and how: `forward` IS the loss. The loop wraps the objective and knows no paper.

    Networks that are used but not trained go through `freeze`, which keeps them out of checkpoints and
    optimisers while `.to()` still moves them.
    """

    image_size: tuple[int, int]
    """Height and width of the images the objective takes."""

    num_frames: int | None = None
    """Frames of the clips it takes, in `images`, (B, 3, num_frames, H, W). None: it takes images."""

    columns: int | None = None
    """Of the sample grid; None: 10 where that divides the pictures, else 8."""

    max_steps: int
    """Steps of the whole run; the loop sets it before training starts."""

    notes: list[str]
    """Lines that the loop shows at the start of a run: what was done to the networks."""

    shards: bool = False
    """Whether the weights may be sharded over processes (FSDP): one network with one optimiser, whose blocks are named
    in its `_no_split_modules`, and nothing writes into weights between steps. Blocks that have methods which read
    weights and are called beside `forward` name them in `sharded_methods`."""

    sharded_methods = ("validate", "pictures")

    def __init__(self) -> None:
        super().__init__()
        self.notes = []
        self._frozen: dict[str, nn.Module] = {}

    def freeze(self, name: str, module: nn.Module) -> None:
        self._frozen[name] = module.eval().requires_grad_(False)

    def frozen(self, name: str) -> Any:
        return self._frozen[name]

    def frozen_parts(self) -> dict[str, nn.Module]:
        return dict(self._frozen)

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> Self:
        for module in self._frozen.values():
            module._apply(fn, recurse)
        return super()._apply(fn, recurse)

    def check_codes(self, codes: Any) -> None:
        """Called before a run whose data are token files, with what their layout.json says.

        Raises: ValueError when the objective cannot use them, with what to do.
        """
        raise ValueError(
            f"{codes.source} was coded by `{codes.made_by}`, but this objective reads images; give the images in "
            f"data.train and data.validation. Token files are for generators: next-token, next-scale, next-entity"
        )

    def check_images(self, source: str) -> None:
        """Called before a run whose data are the images of `source`.

        Raises: ValueError when the objective cannot use images, with what to do.
        """

    def check_texts(self, name: str, texts: Sequence[str] | None) -> None:
        """Called before a run with the captions of each set of images, None where it has none.

        Args: name: of the set's key in the recipe.
        Raises: ValueError when the objective cannot use them, with what to do.
        """

    @abstractmethod
    def forward(self, batch: dict[str, Tensor], phase: str, step: int, max_steps: int, rng: Rng) -> Losses:
        """Losses of one micro-batch in one phase of optimiser step `step` (from 0)."""

    def all_phases(self) -> list[str]:
        """The phases that a step may have; each has an optimiser of its own."""
        return ["main"]

    def phases(self, step: int) -> list[str]:
        """The phases of this step, in order."""
        return ["main"]

    @abstractmethod
    def trained(self, phase: str) -> nn.Module:
        """The sub-module that `phase` trains. That of `main` is averaged (EMA) and exported."""

    def optim(self, phase: str, default: Any) -> Any:
        """The `OptimConfig` of a phase, given the recipe's own."""
        return default

    def after_step(self, step: int, rng: Rng) -> None:
        """Called after the optimisers have stepped."""

    def discard_step(self) -> None:
        """Called instead of `after_step` when the step was skipped: forget what `forward` kept of it."""

    def statistics(self) -> dict[str, float]:
        """Further numbers for the log, asked for only when a line is written."""
        return {}

    @abstractmethod
    @torch.no_grad()
    def validate(self, batch: dict[str, Tensor], rng: Rng) -> Losses:
        """Per-image means on held-out images, for the log."""

    @torch.no_grad()
    def pictures(self, batch: dict[str, Tensor], rng: Rng) -> Tensor | None:
        """(N, 3, H, W) in [-1, 1] for the sample grid, rows of `columns`; None when there is nothing to show."""
        return None

    @abstractmethod
    def export(self, folder: Any) -> None:
        """Write the trained parts so that `from_pretrained` opens them."""
