"""Class names of a pipeline, and the ids that users mean by them."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from varkit.config import nearest


class Labelled:
    """A pipeline whose configuration holds `id2label`."""

    @property
    def labels(self: Any) -> dict[int, str]:
        """Class names by id, in the order of ids; empty when the model has none."""
        return dict(sorted((int(k), v) for k, v in (self.config.id2label or {}).items()))

    def split_labels(self, text: str) -> list[str]:
        """Names and numbers separated by commas; a comma within a name, as in `bag, diagonal`, separates nothing."""
        known = {name.lower() for name in self.labels.values()}
        parts, found = text.split(","), list[str]()
        while parts:
            sizes = (n for n in range(len(parts), 1, -1) if ",".join(parts[:n]).strip().lower() in known)
            size = next(sizes, 1)
            found.append(",".join(parts[:size]).strip())
            parts = parts[size:]
        return found

    def label_ids(self: Any, names: Sequence[str | int]) -> list[int]:
        """Class ids of names or numbers. Raises ValueError naming the nearest class."""
        by_name = {v.lower(): k for k, v in self.labels.items()}
        ids = []
        for name in names:
            text = str(name).strip()
            if re.fullmatch(r"-?[0-9]+", text):
                ids.append(int(text))
            elif text.lower() in by_name:
                ids.append(by_name[text.lower()])
            else:
                known = ", ".join(self.labels.values()) or f"0 to {self.transformer.num_classes - 1}"
                raise ValueError(f"no class is called {text!r}{nearest(text.lower(), by_name)}; classes: {known}")
        return ids
