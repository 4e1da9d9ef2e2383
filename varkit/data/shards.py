"""Folders of numbered shards beside a layout.json that says what is in them; each file is whole or not there.

Token files (`varkit.data.codes`) and text features (`varkit.data.features`) are such folders.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, ClassVar, Self

LAYOUT_FILE = "layout.json"


@dataclass(frozen=True, kw_only=True)
class ShardInfo:
    """What every layout.json says.

    kind, made_by: what such a folder is called, and the command that makes one.
    count: of entries.   shard_size: entries a file.
    """

    kind: ClassVar[str]
    made_by: ClassVar[str]

    count: int
    shard_size: int
    version: int = 1

    @property
    def shards(self) -> int:
        return -(-self.count // self.shard_size)

    def entries(self, shard: int) -> range:
        """Numbers of the entries of a shard."""
        return range(shard * self.shard_size, min((shard + 1) * self.shard_size, self.count))

    def begin(self, folder: Path) -> None:
        """Begin a folder, or go on with one. Raises ValueError naming what differs from what is there."""
        folder.mkdir(parents=True, exist_ok=True)
        if has_layout(folder):
            there, wanted = asdict(self.read(folder)), asdict(self)
            other = [f"{k}: {there[k]!r} there, {wanted[k]!r} now" for k in wanted if there[k] != wanted[k]]
            if other:
                raise ValueError(
                    f"{folder} holds {self.kind} made otherwise ({'; '.join(other)}); choose another folder, or remove "
                    f"that one"
                )
            return
        if any(p for p in folder.iterdir() if not p.name.startswith(".")):
            raise ValueError(f"{folder} is not empty and holds no {LAYOUT_FILE}; choose a new folder")
        text = json.dumps({"kind": self.kind, **asdict(self)}, indent=1) + "\n"
        write_whole(folder / LAYOUT_FILE, lambda part: part.write_text(text), f".{os.getpid()}")

    @classmethod
    def read(cls, folder: str | Path) -> Self:
        """Raises FileNotFoundError, or ValueError when layout.json is damaged, of another kind or a later version."""
        path = Path(folder).expanduser() / LAYOUT_FILE
        if not path.is_file():
            raise FileNotFoundError(f"{folder} holds no {LAYOUT_FILE}; make {cls.kind} with `{cls.made_by}`")
        try:
            values = json.loads(path.read_text())
            kind = values.pop("kind", "token files")  # those of before there were other kinds do not say
            info = cls(**values) if kind == cls.kind else None
        except (ValueError, TypeError, AttributeError) as error:
            raise ValueError(f"{path} is damaged, or written by another version of varkit: {error}") from None
        if info is None:
            raise ValueError(f"{folder} holds {kind}, not {cls.kind}; make those with `{cls.made_by}`")
        if info.version != cls.version:
            raise ValueError(f"{path} has version {info.version}; this varkit reads version {cls.version}")
        return info


def has_layout(folder: str | Path) -> bool:
    return (Path(folder).expanduser() / LAYOUT_FILE).is_file()


def shard_file(folder: Path, shard: int) -> Path:
    return folder / f"{shard:05d}.safetensors"


def require_whole(folder: Path, info: ShardInfo, is_whole: Callable[[int], bool]) -> None:
    """Raises ValueError saying how many shards are missing or damaged."""
    missing = [k for k in range(info.shards) if not is_whole(k)]
    if missing:
        raise ValueError(
            f"{folder} is not finished: {len(missing)} of {info.shards} shards are missing or damaged "
            f"(the first is {shard_file(folder, missing[0]).name}); run the same `{info.made_by}` again"
        )


def write_whole(path: Path, write: Callable[[Path], Any], tag: str = "") -> None:
    """Whole or not at all. A shard belongs to one process, whose next run replaces a part that was left behind."""
    part = path.with_name(f".{path.name}{tag}.part")
    write(part)
    os.chmod(part, 0o644)  # safetensors makes files that only their owner reads
    os.replace(part, path)
