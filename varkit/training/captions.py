"""What a generator of texts is trained on: captions of a batch -> features and their mask, as at sampling.

Source: FoundationVision/LlamaGen: autoregressive/train/train_t2i.py, dataset/t2i.py (ce98ec4). What differs: an image
without a caption is drawn from no text, as `TextToImagePipeline` draws without a prompt; there such images count for
nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from varkit.conditioning.text import TextCondition, as_read, byte_encoder, left_padded
from varkit.config import ConfigError, config
from varkit.data.features import FeatureSet
from varkit.interfaces import Cond


@config
class TextEncoderConfig:
    """A small text encoder that reads bytes (a T5) and learns along with the generator."""

    width: int = 128
    depth: int = 2
    heads: int = 4
    length: int = 96  # bytes read of a caption, one of them its end; longer ones are cut
    pool: int = 1  # neighbouring bytes whose states become one feature, so that the generator's prefix is shorter
    dropout: float = 0.1

    def __post_init__(self) -> None:
        for name in ("width", "depth", "heads", "length", "pool"):
            if getattr(self, name) < 1:
                raise ConfigError(f"objective.text_encoder.{name} must be at least 1; got {getattr(self, name)}")
        for name, by in (("width", "heads"), ("length", "pool")):
            size, part = getattr(self, name), getattr(self, by)
            if size % part:
                raise ConfigError(f"objective.text_encoder.{name} {size} must be a multiple of {by} {part}")
        if not 0 <= self.dropout < 1:
            raise ConfigError(f"objective.text_encoder.dropout must be in [0, 1); got {self.dropout}")


class Captions:
    """Features of captions, from a folder of `varkit features`, from a frozen encoder, or from one that is trained.

    Args: exactly one of
        features: the folder.
        encoder: the name or folder of a transformers encoder, which is frozen and runs in float32; or the sizes of a
            new one, which learns.
    Raises: ValueError when they cannot be opened.
    """

    def __init__(self, features: str | None, encoder: str | TextEncoderConfig | None) -> None:
        self.stored = None if features is None else FeatureSet(features)
        self.trains = isinstance(encoder, TextEncoderConfig)
        self.condition = TextCondition("" if encoder is None or self.trains else str(encoder))
        if isinstance(encoder, TextEncoderConfig):
            e = encoder
            self.condition.encoder, self.condition.tokenizer = byte_encoder(
                e.width, e.depth, e.heads, pool=e.pool, dropout=e.dropout
            )
            self.condition.max_length = e.length // e.pool
            self.encoder, self.clean = "", False  # any script is bytes: nothing is taken out
            self.width, self.key = e.width, "objective.text_encoder"
        elif self.stored is not None:
            self.encoder, self.clean = self.stored.info.encoder, self.stored.info.cleaned
            self.width, self.key = self.stored.info.width, f"objective.features {features}"
        else:
            self.encoder, self.clean = str(encoder), True
            self.width, self.key = self.condition.width, f"objective.text_encoder {encoder}"
            self.condition.encoder.float()
        self.places: dict[str, int] = {}  # by caption as given: its number in the folder; `check` notes them

    @property
    def network(self) -> nn.Module | None:
        """The encoder, if it runs in training; frozen unless it `trains`."""
        return None if self.stored is not None else self.condition.encoder

    def sizes(self) -> dict[str, Any]:
        """Constructor arguments of a new generator that the features decide."""
        length = self._length()
        return {"text_dim": self.width, **({} if length is None else {"text_length": length})}

    def _length(self) -> int | None:
        """Features of a caption, where the generator does not decide it."""
        if self.stored is not None:
            return self.stored.info.max_length
        return self.condition.max_length if self.trains else None

    def fit(self, model: Any) -> None:
        """Serve this generator. Raises ConfigError when it reads features of other sizes."""
        wanted = model.config.text_length, model.config.text_dim
        length = self._length() or wanted[0]
        if (length, self.width) != wanted:
            raise ConfigError(
                f"{self.key} gives features of {self.width} numbers, at most {length} tokens; the generator reads "
                f"{wanted[1]} numbers and {wanted[0]} tokens (text_dim, text_length). Leave both out of "
                f"objective.model_overrides, or encode the captions by the encoder that it was trained with"
            )
        self.condition.max_length = length

    def check(self, name: str, texts: Sequence[str] | None) -> list[str]:
        """Look at all captions of a set before the run.

        Args: name: of the set's key in the recipe.
        Returns: lines for the log: how many are empty, how many are cut.
        Raises: ConfigError when there are none, or some have no features.
        """
        if texts is None:
            raise ConfigError(
                f"{name} has no captions, the generator is conditioned on text: give images with texts (docs/data.md, "
                f"Captions), or a generator of classes in objective.model"
            )
        read = {raw: as_read(raw, self.clean) for raw in dict.fromkeys(texts)}
        if not any(read.values()):
            raise ConfigError(f"{name}: all {len(texts)} captions are empty; a generator of texts needs some")
        notes = []
        empty = sum(not read[raw] for raw in texts)
        if empty:
            notes.append(f"{name}: {empty} of {len(texts)} images have no caption: they teach drawing from none")
        said = [text for text in dict.fromkeys(read.values()) if text]
        if self.stored is None:
            long = sum(length > self.condition.max_length for length in self.condition.lengths(said))
            if long:
                notes.append(
                    f"{name}: {long} of {len(said)} captions have more than {self.condition.max_length} tokens: the "
                    f"rest is left out"
                )
            return notes
        places = dict(zip(said, self.stored.find(said), strict=True))
        missing = [text for text, place in places.items() if place < 0]
        if missing:
            raise ConfigError(
                f"{len(missing)} of {len(said)} captions of {name} are not in {self.key}; the first is "
                f"{missing[0][:60]!r}. Encode them too, such as `varkit features TRAIN VALIDATION --out FOLDER`, or "
                f"with --split train --split val"
            )
        self.places |= {raw: places[text] for raw, text in read.items() if text}
        return notes

    def encode(self, texts: Sequence[str], model: Any, device: torch.device) -> Cond:
        """Features (B, T, E) float32, real ones last, and their mask; of an empty caption those of no text.

        Args: texts: of sets that `check` has seen.
        """
        empty = torch.zeros(len(texts), model.config.text_length, self.width, device=device)
        none = Cond(sequence=empty, mask=torch.ones_like(empty[..., 0], dtype=torch.bool))
        sequence, mask = model.null(none).text
        places, said = self._said(list(texts))
        if said is None:
            return Cond(sequence=sequence.float(), mask=mask)
        index = torch.tensor(places, device=device)
        features, real = said.to(device).text
        return Cond(sequence=sequence.float().index_copy(0, index, features), mask=mask.index_copy(0, index, real))

    def _said(self, texts: list[str]) -> tuple[list[int], Cond | None]:
        """Places in the batch of the captions that say something, and their features."""
        if self.stored is not None:
            places = [i for i, raw in enumerate(texts) if raw in self.places]
            rows = [self.stored[self.places[texts[i]]] for i in places]
            return places, self.condition.encode(features=rows) if rows else None
        read = [as_read(text, self.clean) for text in texts]
        places = [i for i, text in enumerate(read) if text]
        if not places:
            return places, None
        network = self.condition.encoder
        with torch.autocast(next(network.parameters()).device.type, enabled=False):
            return places, left_padded(*self.condition.states([read[i] for i in places]))
