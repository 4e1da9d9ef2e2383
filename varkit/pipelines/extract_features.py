"""Encoding the captions of image sets once: sharded, resumable, by any number of processes.

    extract_features("google/flan-t5-xl", ["photos/"], Path("features"))

Source: FoundationVision/LlamaGen: language/extract_t5_feature.py (ce98ec4), which writes one .npy a caption, trimmed to
its tokens.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from tqdm.auto import tqdm

from varkit.conditioning.text import TextCondition, as_read
from varkit.data.codes import CodeSet, is_code_folder
from varkit.data.features import FeatureInfo, cut_captions, digest_of_all, features_are_whole, write_features
from varkit.data.images import open_images
from varkit.pipelines.fingerprint import encoder_fingerprint

logger = logging.getLogger(__name__)

STORED = ("float16", "float32")


class Captions(NamedTuple):
    """Captions of several sets. texts: each once, as the encoder reads it, in the order of the images."""

    texts: list[str]
    images: int
    empty: int  # images without a caption, or one of which cleaning leaves nothing


class Encoded(NamedTuple):
    """What `extract_features` did. cut: captions with more than max_length tokens, of this process's shards."""

    folder: Path
    images: int
    empty: int
    captions: int
    made: int
    there: int  # captions of shards that were there already
    cut: int


def read_captions(sources: Sequence[str], splits: Sequence[str] = ("train",), clean: bool = True) -> Captions:
    """The captions of image sets or token files, each source in each split (token files have none).

    Raises: ValueError when a source has no captions, or none of them says anything; as `open_images`.
    """
    found: dict[str, None] = {}
    images = empty = 0
    for source in sources:
        coded = is_code_folder(source)
        for split in splits[:1] if coded else splits:
            data = CodeSet(source) if coded else open_images(source, split=split)
            if data.texts is None:
                raise ValueError(
                    f"{source}{'' if coded else f' ({split})'} has no captions; give images with texts: `text` in "
                    f"metadata.jsonl, .txt in tars, a column of a Hugging Face set (docs/data.md)"
                )
            images += len(data)
            for raw in data.texts:
                text = as_read(raw, clean)
                empty += not text
                if text:
                    found[text] = None
    if not found:
        raise ValueError(f"all {images} captions of {', '.join(map(str, sources))} are empty: nothing to encode")
    return Captions(list(found), images, empty)


def extract_features(
    encoder: TextCondition | str,
    sources: Sequence[str],
    out: Path,
    *,
    name: str = "",
    splits: Sequence[str] = ("train",),
    max_length: int = 120,
    clean: bool = True,
    strict: bool = False,
    store: str = "float16",
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    batch_size: int = 32,
    shard_size: int = 4096,
    process_index: int = 0,
    num_processes: int = 1,
    announce: Callable[[str], None] | None = None,
    progress: bool = False,
) -> Encoded:
    """Encode each caption once, in shards; shards that are there are kept, and go to processes in turn.

    Args:
        encoder: a `TextCondition`, whose max_length and clean then count, and whose network moves to `device` and
            `dtype`; or the name or folder of an encoder.
        sources, splits: see `read_captions`.   name: what the record calls the encoder.
        max_length: tokens kept of a caption.   clean: see `TextCondition`.
        strict: refuse captions that are longer, before any work.
        store: type of the stored features.   dtype: of the encoder while it runs.
        batch_size: captions encoded at once.   shard_size: captions a file, lost together at a stop.
    Raises: ValueError before any work on a folder made otherwise, bad sizes, no captions, or (strict) long ones; and
        when features are not finite.
    """
    if min(batch_size, shard_size, max_length) < 1:
        raise ValueError(
            f"batch_size, shard_size and max_length must be at least 1; got {batch_size}, {shard_size}, {max_length}"
        )
    if store not in STORED:
        raise ValueError(f"features are stored as {' or '.join(STORED)}; got {store!r}")
    if isinstance(encoder, str):
        name, encoder = name or encoder, TextCondition(encoder, max_length=max_length, clean=clean)
    captions = read_captions(sources, splits, encoder.clean)
    encoder.open()
    if strict:
        _refuse_long(encoder, captions.texts)
    info = FeatureInfo(
        count=len(captions.texts),
        shard_size=shard_size,
        encoder=name or type(encoder.encoder).__name__,
        fingerprint=encoder_fingerprint(encoder.encoder.float(), encoder.tokenizer),
        width=encoder.width,
        max_length=encoder.max_length,
        cleaned=encoder.clean,
        dtype=store,
        computed=str(dtype).removeprefix("torch."),
        sources=[str(source) for source in sources],
        splits=list(splits),
        captions=digest_of_all(captions.texts),
    )
    info.begin(out)  # processes that start together write the same
    mine = range(process_index, info.shards, num_processes)
    wanted = [k for k in mine if not features_are_whole(out, info, k)]
    made = sum(len(info.entries(k)) for k in wanted)
    there = sum(len(info.entries(k)) for k in mine) - made
    if there and announce is not None:
        announce(f"{there} captions are there already")
    encoder.encoder.to(device, dtype)
    with tqdm(total=made, unit="caption", disable=not progress, file=sys.stderr) as bar:
        for shard in wanted:
            texts = [captions.texts[i] for i in info.entries(shard)]
            _write_shard(encoder, out, shard, texts, batch_size, getattr(torch, store), bar)
    cut = cut_captions(out, info, mine)
    if cut:
        logger.warning("%d captions have more than %d tokens: the rest is left out", cut, info.max_length)
    return Encoded(out, captions.images, captions.empty, len(captions.texts), made, there, cut)


def _refuse_long(encoder: TextCondition, texts: list[str]) -> None:
    lengths = encoder.lengths(texts)
    long = [i for i, length in enumerate(lengths) if length > encoder.max_length]
    if long:
        raise ValueError(
            f"{len(long)} of {len(texts)} captions have more than {encoder.max_length} tokens; the first has "
            f"{lengths[long[0]]}: {texts[long[0]][:60]!r}... Shorten them, raise max_length, or let them be cut "
            f"(without strict)"
        )


def _write_shard(
    encoder: TextCondition, out: Path, shard: int, texts: list[str], batch_size: int, store: torch.dtype, bar: Any
) -> None:
    """Encode the captions of a shard, those of like length together: less padding."""
    tokens, rows = encoder.lengths(texts), dict[int, Tensor]()
    order = sorted(range(len(texts)), key=lambda i: tokens[i])
    for first in range(0, len(order), batch_size):
        some = order[first : first + batch_size]
        states, real = encoder.states([texts[i] for i in some], "longest")
        states, real = states.to(store).cpu(), real.bool().cpu()
        if not states[real].isfinite().all():
            raise ValueError(
                f"features of {texts[some[0]][:60]!r} or of captions beside it are not finite in {store}; store "
                f"float32, and run the encoder in float32 or bfloat16"
            )
        rows |= {i: row[mask] for i, row, mask in zip(some, states, real, strict=True)}
        bar.update(len(some))
    write_features(out, shard, texts, [rows[i] for i in range(len(texts))], tokens)
