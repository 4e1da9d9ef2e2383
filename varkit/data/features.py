"""Text features: captions encoded once, read many times.

    features/layout.json        which encoder made them, of which captions, how long and in which type
    features/00000.safetensors  `features` (sum of lengths, E), the captions of the shard one after the other, without
                                padding; `lengths` and `tokens` int32 (n,), tokens kept and before cutting; `digests`
                                uint8 (n, 16), by which captions are found

A caption is known by what the encoder reads, so two that are the same once cleaned are one. Shapes: N captions, n in a
shard, E numbers a token.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from varkit.data.shards import ShardInfo, require_whole, shard_file, write_whole

DIGEST = 16
"""Bytes of a caption's digest."""


@dataclass(frozen=True, kw_only=True)
class FeatureInfo(ShardInfo):
    """What `layout.json` says.

    encoder: its name, as it was opened.   fingerprint: of its weights and its tokenizer.
    width: E.   max_length: tokens that are kept of a caption.   cleaned: whether links and mark-up were taken out.
    dtype: of the stored features.   computed: of the encoder's weights.
    sources, splits: the data sets that the captions are from.   captions: digest of all, in order.
    """

    kind: ClassVar[str] = "text features"
    made_by: ClassVar[str] = "varkit features"

    encoder: str
    fingerprint: str
    width: int
    max_length: int
    cleaned: bool
    dtype: str
    computed: str
    sources: list[str]
    splits: list[str]
    captions: str


def digest(text: str) -> bytes:
    """16 bytes by which a caption, as the encoder reads it, is found."""
    return hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=DIGEST).digest()


def digest_of_all(texts: Iterable[str]) -> str:
    """16 hex digits of captions in order."""
    whole = hashlib.blake2b(digest_size=8)
    for text in texts:
        whole.update(digest(text))
    return whole.hexdigest()


def write_features(
    folder: Path, shard: int, texts: Sequence[str], rows: Sequence[Tensor], tokens: Sequence[int]
) -> None:
    """One shard, whole or not at all.

    Args: texts: as the encoder read them.   rows: (length, E) each.   tokens: before anything was cut off.
    """
    digests = np.frombuffer(b"".join(digest(text) for text in texts), np.uint8).reshape(-1, DIGEST)
    tensors = {
        "features": torch.cat(list(rows)),
        "lengths": torch.tensor([len(row) for row in rows], dtype=torch.int32),
        "tokens": torch.tensor(list(tokens), dtype=torch.int32),
        "digests": torch.from_numpy(digests.copy()),
    }
    write_whole(shard_file(folder, shard), lambda part: save_file(tensors, part))


def features_are_whole(folder: Path, info: FeatureInfo, shard: int) -> bool:
    """Whether a shard is there and readable."""
    try:
        with safe_open(shard_file(folder, shard), "pt") as file:
            lengths = file.get_tensor("lengths")
            shape = file.get_slice("features").get_shape()
    except (OSError, SafetensorError):
        return False
    return len(lengths) == len(info.entries(shard)) and shape == [int(lengths.sum()), info.width]


def cut_captions(folder: Path, info: FeatureInfo, shards: Iterable[int]) -> int:
    """How many captions of some shards were longer than `max_length` tokens."""
    count = 0
    for shard in shards:
        with safe_open(shard_file(folder, shard), "pt") as file:
            count += int((file.get_tensor("tokens") > info.max_length).sum())
    return count


class FeatureSet:
    """The captions of a folder of text features, found by their text.

    Attributes: info; folder.
    Raises: ValueError when shards are missing, with how many; FileNotFoundError.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder).expanduser()
        self.info = FeatureInfo.read(self.folder)
        require_whole(self.folder, self.info, lambda k: features_are_whole(self.folder, self.info, k))
        self._features: dict[int, Tensor] = {}
        lengths, digests = [], []
        for k in range(self.info.shards):
            with safe_open(shard_file(self.folder, k), "pt") as file:
                lengths.append(file.get_tensor("lengths").long())
                digests.append(file.get_tensor("digests").numpy())
        self.lengths = lengths  # by shard, (n,)
        self.ends = [part.cumsum(0) for part in lengths]
        keys = np.concatenate(digests).view(f"S{DIGEST}")[:, 0]
        self._order = np.argsort(keys, kind="stable")
        self._keys = keys[self._order]

    def __len__(self) -> int:
        return self.info.count

    def find(self, texts: Sequence[str]) -> list[int]:
        """The number of each caption, as the encoder reads it; -1 where it is not here."""
        wanted = np.frombuffer(b"".join(digest(text) for text in texts), f"S{DIGEST}")
        places = np.minimum(np.searchsorted(self._keys, wanted), len(self) - 1)
        return np.where(self._keys[places] == wanted, self._order[places], -1).tolist()

    def __getitem__(self, number: int) -> Tensor:
        """Features of a caption, (length, E) as stored, mapped from the file."""
        shard, place = divmod(number, self.info.shard_size)
        if shard not in self._features:
            with safe_open(shard_file(self.folder, shard), "pt") as file:
                self._features[shard] = file.get_tensor("features")
        end = int(self.ends[shard][place])
        return self._features[shard][end - int(self.lengths[shard][place]) : end]
