"""What a generator of texts is trained on: captions of a batch -> features and their mask, as at sampling.

Source: FoundationVision/LlamaGen: autoregressive/train/train_t2i.py, dataset/t2i.py (ce98ec4). What differs: an image
without a caption is drawn from no text, as `TextToImagePipeline` draws without a prompt; there such images count for
nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from varkit.conditioning.text import TextCondition, as_read, room, side_by_side
from varkit.config import ConfigError
from varkit.data.features import FeatureSet
from varkit.interfaces import Cond


class Captions:
    """Features of captions, from a folder of `varkit features` or from a frozen encoder.

    Args: exactly one of
        features: the folder.
        encoder: the name or folder of a transformers encoder; it runs in float32.
    Raises: ValueError when they cannot be opened.
    """

    def __init__(self, features: str | None, encoder: str | None) -> None:
        self.stored = None if features is None else FeatureSet(features)
        self.condition = TextCondition(encoder or "")
        if self.stored is not None:
            self.encoder, self.clean = self.stored.info.encoder, self.stored.info.cleaned
            self.width, self.key = self.stored.info.width, f"objective.features {features}"
        else:
            self.encoder, self.clean = str(encoder), True
            self.width, self.key = self.condition.width, f"objective.text_encoder {encoder}"
            self.condition.encoder.float()
        self.places: dict[str, int] = {}  # by caption as given: its number in the folder; `check` notes them

    @property
    def network(self) -> nn.Module | None:
        """The encoder, if it runs in training."""
        return None if self.stored is not None else self.condition.encoder

    def sizes(self) -> dict[str, Any]:
        """Constructor arguments of a new generator that the features decide."""
        length = {} if self.stored is None else {"text_length": self.stored.info.max_length}
        return {"text_dim": self.width, **length}

    def fit(self, model: Any) -> None:
        """Serve this generator. Raises ConfigError when it reads features of other sizes."""
        wanted = model.config.text_length, model.config.text_dim
        length = wanted[0] if self.stored is None else self.stored.info.max_length
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

    @torch.no_grad()
    def encode(self, texts: Sequence[str], model: Any, device: torch.device) -> Cond:
        """Features (B, T, E) float32, real ones last, and their mask; of an empty caption those of no text.

        Args: texts: of sets that `check` has seen.
        """
        empty = torch.zeros(len(texts), model.config.text_length, self.width, device=device)
        none = Cond(sequence=empty, mask=torch.ones_like(empty[..., 0], dtype=torch.bool))
        sequence, mask = model.null(none).text
        sequence, mask = sequence.float().clone(), mask.clone()
        for i, row in self._rows(list(texts)):
            sequence[i], mask[i] = 0, False
            sequence[i, -len(row) :], mask[i, -len(row) :] = row.to(sequence), True
        return Cond(sequence=sequence, mask=mask)

    def _rows(self, texts: list[str]) -> list[tuple[int, Tensor]]:
        """Of each caption that says something: its place in the batch, and its features (n, E)."""
        if self.stored is None:
            read = [as_read(text, self.clean) for text in texts]
            places = [i for i, text in enumerate(read) if text]
            if not places:
                return []
            network = self.condition.encoder
            with torch.autocast(next(network.parameters()).device.type, enabled=False):
                states, real = self.condition.states([read[i] for i in places])
            return [(i, row[keep]) for i, row, keep in zip(places, states, real.bool(), strict=True)]
        return [(i, self.stored[self.places[raw]]) for i, raw in enumerate(texts) if raw in self.places]

    # ---- captions as sets of phrases ----------------------------------------------------------------------

    def split(self, text: str, separator: str) -> list[str]:
        """The phrases of a caption as they are read, each once, sorted; none where there is but one, which is a prompt,
        and none where they do not fit in side by side."""
        said = sorted({as_read(part, self.clean) for part in text.split(separator)} - {""})
        fits = len(said) > 1 and room(self.condition.lengths(said)) <= self.condition.max_length
        return said if fits else []

    def check_phrases(self, name: str, texts: Sequence[str], separator: str) -> str:
        """How many captions of a set are sets of phrases, for the log. Raises ConfigError when none is."""
        parted = [text for text in dict.fromkeys(texts) if separator in text]
        sets = sum(bool(self.split(text, separator)) for text in parted)
        if not sets:
            raise ConfigError(
                f"objective.phrases={separator!r}: no caption of {name} holds several phrases that fit in "
                f"{self.condition.max_length} tokens; give what separates phrases in these captions, or leave it out"
            )
        return (
            f"{name}: {sets} captions are sets of phrases; {len(parted) - sets} with {separator!r} are read as they "
            f"are, for they hold one phrase, or more than fit in side by side"
        )

    def as_sets(self, cond: Cond, texts: Sequence[str], rows: Tensor, separator: str) -> Cond:
        """What `encode` gave, where captions of `rows` (B,) bool that hold several phrases are sets of them."""
        sequence, mask = cond.text
        phrase = torch.zeros_like(mask, dtype=torch.int64)
        sets = {i: self.split(texts[i], separator) for i in rows.nonzero()[:, 0].tolist()}
        places = [i for i, phrases in sets.items() if phrases]
        if not places:
            return replace(cond, phrase=phrase)
        kind = next(self.condition.encoder.parameters()).device.type
        with torch.autocast(kind, enabled=False):
            made = side_by_side(self.condition.phrase_rows([sets[i] for i in places]), mask.shape[1])
        assert made.sequence is not None and made.mask is not None and made.phrase is not None
        index = torch.tensor(places, device=mask.device)
        return replace(
            cond,
            sequence=sequence.index_copy(0, index, made.sequence.to(sequence)),
            mask=mask.index_copy(0, index, made.mask.to(mask)),
            phrase=phrase.index_copy(0, index, made.phrase.to(phrase)),
        )
