"""Token files: images coded once, read many times.

    codes/layout.json        what the tokens are, which tokenizer made them, of which images, in which views
    codes/00000.safetensors  `tokens` (n, V, L), (n, V, L, G) or (n, V, L, C); `labels`, `index` (n,)
    codes/00000.texts.json   the n texts, where the images have any

A view is one crop or mirror image; training draws one of the V anew each time. Shapes: N images in the set, n in a
shard, V views, L tokens, G factors of a code, C channels of a latent.
"""

from __future__ import annotations

import json
import operator
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.utils.data import Dataset

from varkit.layout import TokenLayout
from varkit.rng import Draw, Rng

VERSION = 1
LAYOUT_FILE = "layout.json"


@dataclass(frozen=True)
class CodeInfo:
    """What `layout.json` says.

    tokenizer: its name, as it was opened.   fingerprint: of its configuration and weights.
    source, split: the images, as `open_images` took them.   count: of images.   shard_size: images a file.
    views: V, and how they were made, for people.   dtype: of the stored tokens.
    """

    layout: dict[str, Any]
    tokenizer: str
    fingerprint: str
    source: str
    split: str
    count: int
    shard_size: int
    classes: list[str]
    views: list[str]
    dtype: str
    texts: bool = False
    version: int = VERSION

    @property
    def token_layout(self) -> TokenLayout:
        return TokenLayout.from_dict(self.layout)

    @property
    def shards(self) -> int:
        return -(-self.count // self.shard_size)

    def images_of(self, shard: int) -> range:
        """Indices of the images of a shard."""
        return range(shard * self.shard_size, min((shard + 1) * self.shard_size, self.count))


def is_code_folder(source: str | Path) -> bool:
    return (Path(source).expanduser() / LAYOUT_FILE).is_file()


def shard_file(folder: Path, shard: int) -> Path:
    return folder / f"{shard:05d}.safetensors"


def texts_file(folder: Path, shard: int) -> Path:
    return folder / f"{shard:05d}.texts.json"


def write_info(folder: Path, info: CodeInfo) -> None:
    """Begin a folder, or go on with one. Raises ValueError naming what differs from what is there."""
    folder.mkdir(parents=True, exist_ok=True)
    if is_code_folder(folder):
        there, wanted = asdict(read_info(folder)), asdict(info)
        other = [f"{k}: {there[k]!r} there, {wanted[k]!r} now" for k in wanted if there[k] != wanted[k]]
        if other:
            raise ValueError(
                f"{folder} holds tokens made otherwise ({'; '.join(other)}); choose another folder, or remove that one"
            )
        return
    if any(p for p in folder.iterdir() if not p.name.startswith(".")):
        raise ValueError(f"{folder} is not empty and holds no {LAYOUT_FILE}; choose a new folder")
    _write(
        folder / LAYOUT_FILE, lambda part: part.write_text(json.dumps(asdict(info), indent=1) + "\n"), f".{os.getpid()}"
    )


def read_info(folder: str | Path) -> CodeInfo:
    """Raises FileNotFoundError, or ValueError when `layout.json` is damaged or of a later version."""
    path = Path(folder).expanduser() / LAYOUT_FILE
    if not path.is_file():
        raise FileNotFoundError(f"{folder} holds no {LAYOUT_FILE}; make token files with `varkit tokenize`")
    try:
        info = CodeInfo(**json.loads(path.read_text()))
    except (ValueError, TypeError) as error:
        raise ValueError(f"{path} is damaged, or written by another version of varkit: {error}") from None
    if info.version != VERSION:
        raise ValueError(f"{path} has version {info.version}; this varkit reads version {VERSION}")
    return info


def _write(path: Path, write: Any, tag: str = "") -> None:
    """Whole or not at all. A shard belongs to one process, whose next run replaces a part that was left behind."""
    part = path.with_name(f".{path.name}{tag}.part")
    write(part)
    os.chmod(part, 0o644)  # safetensors makes files that only their owner reads
    os.replace(part, path)


def write_shard(
    folder: Path, shard: int, tokens: Tensor, labels: Tensor, index: Tensor, texts: list[str] | None = None
) -> None:
    """Atomically; the texts first, so that a shard that is there is whole."""
    if texts is not None:
        _write(texts_file(folder, shard), lambda part: part.write_text(json.dumps(texts, ensure_ascii=False)))
    tensors = {"tokens": tokens.contiguous(), "labels": labels, "index": index}
    _write(shard_file(folder, shard), lambda part: save_file(tensors, part))


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
        random_view: False always gives the first view.   seed: of the choice of views.
    Attributes: info, layout, classes, name, source; labels int64 (N,); texts, N strings or None.
    Raises: ValueError when shards are missing, with how many; FileNotFoundError.
    """

    def __init__(self, folder: str | Path, *, random_view: bool = True, seed: int = 0) -> None:
        self.folder = Path(folder).expanduser()
        self.info = read_info(self.folder)
        missing = [k for k in range(self.info.shards) if not shard_is_whole(self.folder, self.info, k)]
        if missing:
            raise ValueError(
                f"{self.folder} is not finished: {len(missing)} of {self.info.shards} shards are missing or damaged "
                f"(the first is {shard_file(self.folder, missing[0]).name}); run the same `varkit tokenize` again"
            )
        self.random_view, self.seed = random_view, seed
        self.layout, self.classes = self.info.token_layout, list(self.info.classes)
        self.name, self.source = self.folder.name, str(self.folder)
        self._shards: list[Tensor] | None = None
        labels, index, texts = [], [], []
        for k in range(self.info.shards):
            with safe_open(shard_file(self.folder, k), "pt") as file:
                labels.append(file.get_tensor("labels"))
                index.append(file.get_tensor("index"))
            if self.info.texts:
                texts += json.loads(texts_file(self.folder, k).read_text())
        self.labels, self.index = torch.cat(labels), torch.cat(index)  # N: class, and number in the image set
        self.ends = torch.tensor([len(part) for part in labels]).cumsum(0)
        self.texts = texts if self.info.texts else None

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
        """One view of one image, as stored: (L,), (L, G) or (L, C)."""
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
