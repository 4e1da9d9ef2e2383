"""Token files: images coded once, read many times.

    codes/layout.json        what the tokens are, which tokenizer made them, of which images, in which views
    codes/00000.safetensors  `tokens` (n, V, L), (n, V, L, G) or (n, V, L, C); `labels`, `index` (n,); of latents `sums`
    codes/00000.texts.json   the n texts, where the images have any

A view is one crop or mirror image; training draws one of the V anew each time. Latents are stored as they were drawn,
or by their moments: mean and standard deviation side by side, (n, V, L, 2 C), from which a latent is drawn each time.
Shapes: N images in the set, n in a shard, V views, L tokens, G factors of a code, C channels of a latent.
"""

from __future__ import annotations

import json
import operator
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.utils.data import Dataset

from varkit.data.latents import LatentStatistics
from varkit.data.shards import ShardInfo, has_layout, require_whole, shard_file, write_whole
from varkit.layout import TokenLayout
from varkit.rng import Draw, Rng


@dataclass(frozen=True, kw_only=True)
class CodeInfo(ShardInfo):
    """What `layout.json` says.

    tokenizer: its name, as it was opened.   fingerprint: of its configuration and weights.
    source, split: the images, as `open_images` took them; `count` of them.
    views: V, and how they were made, for people.   dtype: of the stored tokens.   moments: see the module.
    """

    kind: ClassVar[str] = "token files"
    made_by: ClassVar[str] = "varkit tokenize"

    layout: dict[str, Any]
    tokenizer: str
    fingerprint: str
    source: str
    split: str
    classes: list[str]
    views: list[str]
    dtype: str
    texts: bool = False
    moments: bool = False

    @property
    def token_layout(self) -> TokenLayout:
        return TokenLayout.from_dict(self.layout)


def is_code_folder(source: str | Path) -> bool:
    return has_layout(source)


def texts_file(folder: Path, shard: int) -> Path:
    return folder / f"{shard:05d}.texts.json"


def write_shard(
    folder: Path,
    shard: int,
    tokens: Tensor,
    labels: Tensor,
    index: Tensor,
    texts: list[str] | None = None,
    sums: Tensor | None = None,
) -> None:
    """Atomically; the texts first, so that a shard that is there is whole.

    Args: sums: of latents, see `latent_sums`.
    """
    if texts is not None:
        write_whole(texts_file(folder, shard), lambda part: part.write_text(json.dumps(texts, ensure_ascii=False)))
    tensors = {"tokens": tokens.contiguous(), "labels": labels, "index": index}
    tensors |= {} if sums is None else {"sums": sums}
    write_whole(shard_file(folder, shard), lambda part: save_file(tensors, part))


def shard_is_whole(folder: Path, info: CodeInfo, shard: int) -> bool:
    """Whether a shard is there and readable; of some images it may have none (unreadable files are left out)."""
    if info.texts and not texts_file(folder, shard).is_file():
        return False
    try:
        with safe_open(shard_file(folder, shard), "pt") as file:
            shape = file.get_slice("tokens").get_shape()
    except (OSError, SafetensorError):
        return False
    return shape[1] == len(info.views) and shape[2] == info.token_layout.length


def storage_dtype(layout: TokenLayout) -> torch.dtype:
    """The smallest type for ids: uint16 while every factor has at most 65,536 entries; half floats for latents."""
    size = layout.codebook_size
    if size is None:
        return torch.float16
    return torch.uint16 if max(size if isinstance(size, tuple) else (size,)) <= 2**16 else torch.int32


class CodeSet(Dataset[dict[str, Any]]):
    """The images of a folder of token files; items and batches as those of `ImageDataset`, with tokens for pixels.

    An item is asked for by its index, or by `(index, key)`: the key chooses the view, so a sampler that gives a new
    key each epoch gets another view, the same on every machine.

    Args:
        folder: as `varkit tokenize` writes it.
        random_view: False always gives the first view.   seed: of the choice of views, and of latents drawn from
            moments: the key gives the numbers that `Tokenizer.encode` would use of `Rng.for_keys(seed, keys)`.
    Attributes: info, layout, classes, name, source; labels int64 (N,); texts, N strings or None; statistics of latents
        (`LatentStatistics`), None for ids.
    Raises: ValueError when shards are missing, with how many; FileNotFoundError.
    """

    info_class: ClassVar[type[CodeInfo]] = CodeInfo

    def __init__(self, folder: str | Path, *, random_view: bool = True, seed: int = 0) -> None:
        self.folder = Path(folder).expanduser()
        self.info: Any = self.info_class.read(self.folder)
        require_whole(self.folder, self.info, lambda k: shard_is_whole(self.folder, self.info, k))
        self.random_view, self.seed = random_view, seed
        self.layout, self.classes = self.info.token_layout, list(self.info.classes)
        self.name, self.source = self.folder.name, str(self.folder)
        self._shards: list[Tensor] | None = None
        labels, index, texts, sums = [], [], [], []
        for k in range(self.info.shards):
            with safe_open(shard_file(self.folder, k), "pt") as file:
                labels.append(file.get_tensor("labels"))
                index.append(file.get_tensor("index"))
                if "sums" in file.keys():  # noqa: SIM118 - it is no mapping
                    sums.append(file.get_tensor("sums"))
            if self.info.texts:
                texts += json.loads(texts_file(self.folder, k).read_text())
        self.labels, self.index = torch.cat(labels), torch.cat(index)  # N: class, and number in the image set
        self.ends = torch.tensor([len(part) for part in labels]).cumsum(0)
        self.texts = texts if self.info.texts else None
        count = len(self.labels) * len(self.info.views) * self.layout.length
        self.statistics = LatentStatistics.of(torch.stack(sums).sum(0), count) if sums and count else None

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_shards": None}  # a worker maps the files itself

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def shards(self) -> list[Tensor]:
        """The tokens, mapped from the files: pages are read when they are needed."""
        if self._shards is None:
            self._shards = []
            for k in range(self.info.shards):
                with safe_open(shard_file(self.folder, k), "pt") as file:
                    self._shards.append(file.get_tensor("tokens"))
        return self._shards

    def tokens(self, entry: int, view: int) -> Tensor:
        """One view of one image, as stored: (L,), (L, G), (L, C), or (L, 2 C) of moments."""
        shard = int(torch.searchsorted(self.ends, entry, right=True))
        first = int(self.ends[shard - 1]) if shard else 0
        return self.shards[shard][entry - first, view]

    def __getitem__(self, entry: int | tuple[int, int]) -> dict[str, Any]:
        """One image: "tokens" (L,), (L, G) int64 or (L, C) float32; "label", "index", "key"; "text" if there is one."""
        batch = self.__getitems__([entry])
        item = {"tokens": batch["tokens"][0], "label": int(batch["labels"][0])}
        item |= {"index": int(batch["index"][0]), "key": int(batch["keys"][0])}
        return item | ({"text": batch["texts"][0]} if "texts" in batch else {})

    def __getitems__(self, entries: Sequence[int | tuple[int, int]]) -> dict[str, Any]:
        """A batch: "tokens" (B, L), (B, L, G) int64 or (B, L, C) float32; "labels", "index", "keys" int64 (B,); and
        "texts", a list, if there are any. Raises IndexError."""
        pairs = [self._pair(entry) for entry in entries]
        keys = torch.tensor([key for _, key in pairs], dtype=torch.int64)
        views = torch.zeros(len(keys), dtype=torch.int64)
        if self.random_view and len(self.info.views) > 1:
            u = Rng.for_keys(self.seed, keys).uniform(torch.zeros(1, dtype=torch.int64), Draw.AUGMENT)[:, 0]
            views = (u * len(self.info.views)).long().clamp_max(len(self.info.views) - 1)
        rows = [self.tokens(i, v) for (i, _), v in zip(pairs, views.tolist(), strict=True)]
        stacked = torch.stack(rows)
        if self.info.moments:
            mean, std = stacked.float().chunk(2, -1)
            every = torch.arange(self.layout.length)
            noise = Rng.for_keys(self.seed, keys).normal(every, Draw.LATENT, count=self.layout.dim)
            stacked = mean + std * noise
        index = torch.tensor([i for i, _ in pairs], dtype=torch.int64)
        batch: dict[str, Any] = {
            "tokens": stacked.float() if stacked.is_floating_point() else stacked.to(torch.int64),
            "labels": self.labels[index],
            "index": index,
            "keys": keys,
        }
        return batch | ({"texts": [self.texts[i] for i, _ in pairs]} if self.texts is not None else {})

    def _pair(self, entry: int | tuple[int, int]) -> tuple[int, int]:
        index, key = entry if isinstance(entry, tuple | list) else (entry, None)
        index = operator.index(index)
        if not -len(self) <= index < len(self):
            raise IndexError(f"index {index} is out of range for {len(self)} images of {self.name}")
        index %= len(self)
        return index, index if key is None else operator.index(key)
