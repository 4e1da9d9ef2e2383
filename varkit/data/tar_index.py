"""What lies where in a webdataset tar: read once from its headers, kept beside it, so that images are read at random.

A sample is the members of one key: the path up to the first dot of the file's name. `cat/001.jpg`, `cat/001.cls` and
`cat/001.txt` are one sample. Nothing is unpacked, and links are not followed.

Source of the naming rule: webdataset's documentation, https://github.com/webdataset/webdataset (basename convention).
"""

from __future__ import annotations

import hashlib
import io
import json
import logging
import os
import tarfile
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from varkit.data.fashion import cache_folder
from varkit.data.labels import Label, checked_label, label_and_text
from varkit.data.transforms import EXTENSIONS, SkippedImage, reason_of, refuse_large

log = logging.getLogger("varkit.data")

VERSION = 1
AHEAD = 8192  # bytes read at once: a header with the small members that stand beside an image
MAX_TEXT = 2**20  # bytes of a label, a caption, or a JSON object; also of a header
ENDINGS = {ending[1:] for ending in EXTENSIONS}
BESIDE = ("cls", "txt", "json")


class Sample(NamedTuple):
    """An image in a tar, with what stands beside it under the same key."""

    name: str
    offset: int
    size: int
    label: Label
    text: str | None


@dataclass
class TarIndex:
    """All samples of one tar, in its order; what is left out and why; what is odd."""

    samples: list[Sample] = field(default_factory=list)
    skipped: list[SkippedImage] = field(default_factory=list)
    """By member name, not path; an empty name is the tar itself."""
    without_image: list[str] = field(default_factory=list)
    """First members of samples that have a label or a text but no image."""
    scattered: list[str] = field(default_factory=list)
    """Members that do not stand beside the others of their key."""
    other_endings: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)


def index_tar(path: Path) -> TarIndex:
    """The index of a tar: the one kept for it if that is of this size and time, else a new one, which is then kept.

    Raises: FileNotFoundError; ValueError if it is no tar.
    """
    index = kept_index(path)
    if index is None:
        stat = path.stat()
        index = scan_tar(path)
        _keep(path, {"version": VERSION, "size": stat.st_size, "mtime_ns": stat.st_mtime_ns, **asdict(index)})
    return index


def kept_index(path: Path) -> TarIndex | None:
    """The index that is kept for this tar as it is now, or None."""
    stat = path.stat()
    for place in _places(path):
        try:
            kept = json.loads(place.read_bytes())
            if (kept.pop("version"), kept.pop("size"), kept.pop("mtime_ns")) != (
                VERSION,
                stat.st_size,
                stat.st_mtime_ns,
            ):
                continue
            kept["samples"] = [Sample(*sample) for sample in kept["samples"]]
            kept["skipped"] = [SkippedImage(*skipped) for skipped in kept["skipped"]]
            if all(0 < s.offset <= s.offset + s.size <= stat.st_size for s in kept["samples"]):
                return TarIndex(**kept)
        except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
            if not isinstance(error, FileNotFoundError):
                log.info("%s is made again: %s", place, reason_of(error))
    return None


def _places(path: Path) -> list[Path]:
    """Where an index may be kept: beside the tar, or in the cache if nothing can be written there."""
    digest = hashlib.blake2b(os.fsencode(path.resolve()), digest_size=16).hexdigest()
    return [path.with_name(f".{path.name}.index.json"), cache_folder() / "tars" / f"{digest}.json"]


def _keep(path: Path, values: dict[str, Any]) -> None:
    for place in _places(path):
        part = place.with_name(f"{place.name}.{os.getpid()}.part")
        try:
            place.parent.mkdir(parents=True, exist_ok=True)
            part.write_text(json.dumps(values), encoding="utf-8")
            os.replace(part, place)
            return
        except OSError as error:
            log.info("the index of %s is not kept at %s: %s", path, place, error)
            with suppress(OSError):
                part.unlink(missing_ok=True)


class _Headers(io.BufferedReader):
    """The file as tarfile sees it, which reads headers alone; a header may claim any length."""

    def read(self, size: int | None = -1) -> bytes:
        if size is None or not 0 <= size <= MAX_TEXT:
            raise tarfile.ReadError(f"a header of {size} bytes")
        return super().read(size)


@dataclass
class _Group:
    """The members of one key."""

    image: tarfile.TarInfo | None = None
    beside: dict[str, tarfile.TarInfo] = field(default_factory=dict)


def scan_tar(path: Path) -> TarIndex:
    """Read all headers of a tar, and its labels and texts. Raises: ValueError if it is no tar."""
    index = TarIndex()
    groups: dict[str, _Group] = {}
    endings: dict[str, None] = {}
    end, last = path.stat().st_size, ""
    with _Headers(io.FileIO(path), AHEAD) as file:
        try:
            tar = tarfile.TarFile(fileobj=file, mode="r")
        except tarfile.TarError as error:
            raise ValueError(f"{path} is no uncompressed tar ({reason_of(error)})") from error
        while (member := _next(tar, index)) is not None:
            key, ending = _key_and_ending(member.name)
            if not ending or member.isdir():
                continue
            if ending not in ENDINGS and ending not in BESIDE:
                endings.setdefault(ending)
            elif reason := _unusable(member, end):
                index.skipped.append(SkippedImage(_shown(member.name), reason))
            else:
                if key != last and key in groups:
                    index.scattered.append(_shown(member.name))
                _add(groups.setdefault(key, _Group()), member, ending, index)
                last = key
        index.warnings += _end_of(file, tar.offset, index)
        for group in groups.values():
            _finish(file, group, index)
    index.other_endings = list(endings)[:20]
    return index


def _next(tar: tarfile.TarFile, index: TarIndex) -> tarfile.TarInfo | None:
    tar.members = []  # type: ignore[attr-defined]  # or it keeps every header in memory
    try:
        return tar.next()
    except (tarfile.TarError, ValueError, OSError) as error:
        index.skipped.append(SkippedImage("", f"damaged or cut short, what follows is lost ({reason_of(error)})"))
        return None


def _end_of(file: io.BufferedReader, offset: int, index: TarIndex) -> list[str]:
    """What is wrong with the end of a tar, at which tarfile stops without a word."""
    if index.skipped and not index.skipped[-1].path:
        return []
    file.seek(offset)
    block = file.read(tarfile.BLOCKSIZE)
    if any(block):
        index.skipped.append(SkippedImage("", f"damaged at byte {offset:,}, what follows is lost"))
    return [] if block else ["it lacks the closing blocks of a tar and may be cut short"]


def _key_and_ending(name: str) -> tuple[str, str]:
    """`cat/a.seg.PNG` -> (`cat/a`, `seg.png`); no ending for hidden files and those without."""
    folder, _, base = name.rpartition("/")
    stem, _, ending = base.partition(".")
    return f"{folder}/{stem}", ending.lower() if stem else ""


def _shown(name: str) -> str:
    """A member's name without bytes that are no UTF-8, which could not be printed."""
    return name.encode("utf-8", "replace").decode()


def _unusable(member: tarfile.TarInfo, end: int) -> str:
    if member.issym() or member.islnk():
        return "a link; links are not followed"
    if not member.isreg() or member.issparse():
        return "no plain file"
    if member.offset_data + member.size > end:
        return "cut short: the tar ends before it"
    try:
        refuse_large(member.size)
    except ValueError as error:
        return str(error)
    return "" if member.size or not member.name.lower().endswith(EXTENSIONS) else "empty file"


def _add(group: _Group, member: tarfile.TarInfo, ending: str, index: TarIndex) -> None:
    before = group.beside.get(ending) if ending in BESIDE else group.image
    if before is not None:
        same = before.name == member.name
        what = "a second member of this name" if same else f"a second image of its sample, beside {_shown(before.name)}"
        index.skipped.append(SkippedImage(_shown(member.name), f"{what}; the first is used"))
    elif ending in BESIDE:
        group.beside[ending] = member
    else:
        group.image = member


def _finish(file: io.BufferedReader, group: _Group, index: TarIndex) -> None:
    """A group -> a sample."""
    if group.image is None:
        index.without_image.append(_shown(next(iter(group.beside.values())).name))
        return
    name = _shown(group.image.name)
    try:
        label, text = _label_and_text(file, group.beside)
    except ValueError as error:
        index.skipped.append(SkippedImage(name, str(error)))
        return
    index.samples.append(Sample(name, group.image.offset_data, group.image.size, label, text))


def _label_and_text(file: io.BufferedReader, beside: dict[str, tarfile.TarInfo]) -> tuple[Label, str | None]:
    """Of `.cls`, else `.json`; and of `.txt`, else `.json`."""
    label, text = None, None
    if "json" in beside:
        where = _shown(beside["json"].name)
        try:
            values = json.loads(_read_text(file, beside["json"]))
        except RecursionError:
            raise ValueError(f"{where}: nested too deeply") from None
        except json.JSONDecodeError as error:
            raise ValueError(f"{where}: not JSON ({error})") from error
        if not isinstance(values, dict):
            raise ValueError(f"{where}: {type(values).__name__}; expected one JSON object")
        label, text = label_and_text(values, where)
    if "cls" in beside:
        word = _read_text(file, beside["cls"]).strip()
        number = int(word) if word.removeprefix("-").isdecimal() and len(word) < 20 else None
        label = (
            None
            if number == -1 or not word
            else checked_label(word if number is None else number, _shown(beside["cls"].name))
        )
    if "txt" in beside:
        text = _read_text(file, beside["txt"]).strip()
    return label, text


def _read_text(file: io.BufferedReader, member: tarfile.TarInfo) -> str:
    if member.size > MAX_TEXT:
        raise ValueError(f"{_shown(member.name)}: {member.size:,} bytes; a label or text may have {MAX_TEXT:,} at most")
    file.seek(member.offset_data)
    try:
        return file.read(member.size).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{_shown(member.name)}: no UTF-8 text ({error.reason})") from error
