"""Text as a condition: features of a text encoder, padded on the left.

Source: FoundationVision/LlamaGen: language/t5.py, autoregressive/sample/sample_t2i.py (ce98ec4).
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from varkit.conditioning.captions import clean_caption
from varkit.interfaces import Cond, Condition

logger = logging.getLogger(__name__)

T5 = "google/flan-t5-xl"


def as_read(text: str, clean: bool) -> str:
    """A caption as the encoder reads it; nothing may be left of it."""
    return clean_caption(text) if clean else text.strip()


def left_padded(sequence: Tensor, mask: Tensor) -> Cond:
    """Right-padded features (B, T, E) and mask (B, T), 1 where real -> real ones last, zeros before."""
    count = mask.shape[1]
    real = mask.bool().sum(1, keepdim=True)  # B 1
    index = (torch.arange(count, device=mask.device) + real) % count  # B T: rotated by the number of pads
    rolled = sequence.gather(1, index[..., None].expand_as(sequence))
    visible = mask.gather(1, index)
    return Cond(sequence=rolled * visible[..., None].to(sequence), mask=visible.bool())


def pooled(states: Tensor, mask: Tensor, pool: int) -> tuple[Tensor, Tensor]:
    """Means of `pool` neighbours that are real: (B, n, E) and (B, n) padded on the right -> ceil(n / pool) of each."""
    if pool == 1:
        return states, mask
    room = -states.shape[1] % pool
    states, mask = F.pad(states, (0, 0, 0, room)), F.pad(mask, (0, room))
    real = mask.unflatten(1, (-1, pool))[..., None].to(states)  # B m pool 1
    means = (states.unflatten(1, (-1, pool)) * real).sum(2) / real.sum(2).clamp_min(1)
    return means, mask.unflatten(1, (-1, pool)).amax(2)


def byte_encoder(width: int, depth: int, heads: int, *, pool: int = 1, dropout: float = 0.1) -> tuple[Any, Any]:
    """A new T5 that reads bytes, and its tokenizer, which needs no files.

    Args: pool: neighbouring bytes whose states become one feature, noted in the encoder's config.
    Raises: ImportError without transformers; ValueError where heads do not divide the width.
    """
    try:
        from transformers import ByT5Tokenizer, T5Config, T5EncoderModel
    except ImportError:
        raise ImportError("a text encoder needs the package transformers: pip install 'varkit[text]'") from None
    if width % heads:
        raise ValueError(f"the text encoder's width {width} must be a multiple of its heads {heads}")
    tokenizer = ByT5Tokenizer(extra_ids=0)
    sizes: dict[str, Any] = {"d_model": width, "d_kv": width // heads, "d_ff": 4 * width, "pool": pool}
    sizes |= {"num_layers": depth, "num_heads": heads, "dropout_rate": dropout, "feed_forward_proj": "gated-gelu"}
    config = T5Config(vocab_size=len(tokenizer), **sizes)
    return T5EncoderModel(config), tokenizer


class TextCondition(Condition):
    """Prompts, or features made of them before, as a condition.

    Args:
        encoder: a transformers encoder (such as a T5EncoderModel), or the name or folder of one (T5 and whatever else
            `AutoModelForTextEncoding` opens), opened when first needed.
        tokenizer: its tokenizer; opened with the encoder when that is a name.
        max_length: T, features a caption; shorter ones are padded on the left, longer ones cut with a warning. A
            feature is of one token, or the mean of `pool` neighbours where the encoder's config has that number.
        clean: take links, mark-up and codes out first (`clean_caption`).
        strict: refuse captions that are too long.
        null_features: (T, E) of no text, for `null`.
    """

    def __init__(
        self,
        encoder: Any = T5,
        tokenizer: Any = None,
        *,
        max_length: int = 120,
        clean: bool = True,
        strict: bool = False,
        null_features: Tensor | None = None,
    ) -> None:
        self.encoder, self.tokenizer = encoder, tokenizer
        self.max_length, self.clean, self.strict, self.null_features = max_length, clean, strict, null_features

    def open(self) -> None:
        """Load encoder and tokenizer where they are names. Raises ImportError or ValueError saying what to do."""
        if not isinstance(self.encoder, str | Path):
            return
        try:
            from transformers import AutoModelForTextEncoding, AutoTokenizer
        except ImportError:
            raise ImportError("prompts need the package transformers: pip install 'varkit[text]'") from None
        name = str(self.encoder)
        try:
            self.tokenizer = self.tokenizer or AutoTokenizer.from_pretrained(name)
            self.encoder = AutoModelForTextEncoding.from_pretrained(name).eval()
        except (OSError, ValueError) as error:
            first = str(error).strip().splitlines()[0]
            raise ValueError(
                f"the text encoder {name!r} cannot be opened: {first}. Give the folder of a transformers encoder, "
                f"such as a T5, or features made of the prompts before (features=)"
            ) from None

    def encode(  # type: ignore[override]
        self,
        *,
        prompt: str | Sequence[str] | None = None,
        features: Tensor | str | Path | Sequence[str | Path | Tensor] | None = None,
        mask: Tensor | None = None,
        **_: Any,
    ) -> Cond:
        """Prompts, or features, -> features (B, T, E) padded on the left, and where they are real.

        Args:
            prompt: one text or several. An empty one is an error: no condition at all is `null`.
            features: instead of prompts: (B, T, E) padded on the right, with `mask` (B, T); or for each caption a
                tensor (n, E) of its n tokens, or a file, .npy or .safetensors, that holds (n, E) or (1, n, E).
        Raises: ValueError on an empty or (strict) too long prompt, or other shapes; FileNotFoundError.
        """
        if (prompt is None) == (features is None):
            raise ValueError("give exactly one of prompt= and features=")
        if features is not None:
            return self._from_features(features, mask)
        texts = self.cleaned([prompt] if isinstance(prompt, str) else list(prompt or ()))
        for text, length in zip(texts, self.lengths(texts), strict=True):
            if length > self.max_length:
                told = f"the prompt {text[:40]!r}... has {length} tokens; {self.max_length} are read"
                if self.strict:
                    raise ValueError(f"{told}. Shorten it")
                logger.warning("%s: the rest is left out", told)
        return left_padded(*self.states(texts))

    @property
    def width(self) -> int:
        """E of the encoder; opens it."""
        self.open()
        return int(self.encoder.config.hidden_size)

    @property
    def pool(self) -> int:
        """Tokens that become one feature; opens the encoder."""
        self.open()
        return int(getattr(self.encoder.config, "pool", 1))

    def lengths(self, texts: Sequence[str]) -> list[int]:
        """Features of each text, none cut off. `texts` are as the encoder reads them (`as_read`)."""
        self.open()
        if self.tokenizer is None:
            raise ValueError("a text encoder needs its tokenizer: give tokenizer=")
        return [-(-len(ids) // self.pool) for ids in self.tokenizer(list(texts))["input_ids"]]

    def states(self, texts: Sequence[str], padding: str = "max_length") -> tuple[Tensor, Tensor]:
        """What the encoder makes of texts as it reads them: (B, T, E) padded on the right, and (B, T), 1 where real.

        Gradients flow while the encoder is in training mode.

        Args: padding: `max_length`, or `longest`, which is faster, and the same but for rounding.
        """
        pool = self.pool
        batch = self.tokenizer(
            list(texts), max_length=self.max_length * pool, padding=padding, truncation=True, return_tensors="pt"
        )
        device = next(self.encoder.parameters()).device
        ids, real = batch["input_ids"].to(device), batch["attention_mask"].to(device)
        with torch.set_grad_enabled(torch.is_grad_enabled() and self.encoder.training):
            return pooled(self.encoder(input_ids=ids, attention_mask=real).last_hidden_state, real, pool)

    def cleaned(self, prompts: Sequence[str]) -> list[str]:
        """The prompts as they are encoded. Raises ValueError naming the first of which nothing is left."""
        if not prompts:
            raise ValueError("prompt is empty: give at least one text")
        texts = []
        for i, prompt in enumerate(prompts):
            if not isinstance(prompt, str):
                raise ValueError(f"prompt {i} must be a text; got {type(prompt).__name__}")
            text = as_read(prompt, self.clean)
            if not text:
                why = f"nothing is left of {prompt!r} when it is cleaned" if prompt.strip() else "it is empty"
                raise ValueError(f"prompt {i}: {why}. Write what to draw; without any condition, leave prompt out")
            texts.append(text)
        return texts

    def _from_features(self, features: Any, mask: Tensor | None) -> Cond:
        if isinstance(features, Tensor):
            if features.dim() != 3 or mask is None or mask.shape != features.shape[:2]:
                raise ValueError(
                    f"features must be (B, T, E) with mask= (B, T), 1 where real; got {tuple(features.shape)} and "
                    f"{None if mask is None else tuple(mask.shape)}"
                )
            rows = [f[m.bool()] for f, m in zip(features, mask, strict=True)]
        else:
            given = [features] if isinstance(features, str | Path) else features
            rows = [f.float() if isinstance(f, Tensor) else read_features(Path(f)) for f in given]
        if not rows or any(len(row) == 0 for row in rows) or len({row.shape[-1] for row in rows}) > 1:
            raise ValueError("features must hold at least one token each, all of one width")
        padded = rows[0].new_zeros(len(rows), self.max_length, rows[0].shape[-1])
        real = torch.zeros(padded.shape[:2], dtype=torch.int64, device=padded.device)
        for i, row in enumerate(rows):
            if len(row) > self.max_length:
                told = f"caption {i} has features of {len(row)} tokens; {self.max_length} are read"
                if self.strict:
                    raise ValueError(f"{told}. Cut them")
                logger.warning("%s: the rest is left out", told)
            padded[i, : len(row)] = row[: self.max_length]
            real[i, : len(row)] = 1
        return left_padded(padded, real)

    def null(self, like: Cond) -> Cond:
        """The features of no text, under the mask of `like`, as released."""
        if self.null_features is None:
            raise ValueError("the features of no text are the generator's: give null_features=")
        sequence, mask = like.text
        return Cond(sequence=self.null_features.to(sequence).expand_as(sequence), mask=mask)


def read_features(path: Path) -> Tensor:
    """(n, E) float32 features of a caption, of one .npy or .safetensors file. Raises FileNotFoundError, ValueError."""
    if not path.is_file():
        raise FileNotFoundError(f"no such file of text features: {path}")
    if path.suffix == ".safetensors":
        from safetensors.torch import load_file

        tensors = load_file(path)
        if len(tensors) != 1:
            raise ValueError(f"{path} must hold one tensor of features; it holds {sorted(tensors)}")
        (features,) = tensors.values()
    elif path.suffix == ".npy":
        features = torch.from_numpy(np.load(path, allow_pickle=False))
    else:
        raise ValueError(f"text features are .npy or .safetensors files; got {path}")
    if features.dim() == 3 and len(features) == 1:
        features = features[0]
    if features.dim() != 2 or not features.is_floating_point():
        raise ValueError(f"{path} must hold floats (n, E) or (1, n, E); got {features.dtype} {tuple(features.shape)}")
    return features.float()
