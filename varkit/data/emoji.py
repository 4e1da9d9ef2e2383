"""Emoji with captions: 64x64 images of two npm packages, by vendor, name and skin tone, written as captioned folders.

Source: https://github.com/iamcal/emoji-data, packages emoji-datasource-google and emoji-datasource-twitter 16.0.0.
Their README names the licences: data MIT (Cal Henderson), Noto images Apache-2.0, Twemoji images CC-BY 4.0.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import re
import shutil
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from PIL import Image

from varkit.data.fashion import cache_folder
from varkit.data.npm import Package, fetch, read_package
from varkit.data.transforms import to_rgb

SIDE = 64
VERSION = "16.0.0"
PACKAGES = {
    "google": Package(
        "emoji-datasource-google",
        VERSION,
        "6517b17f3b3b315a0b9e6cd998db0ee132a19c0269e43fbe566e8fa54a47fe31104257a6a7797cf028d9f83a19d9f68cf51e10c5990e3c90a"
        "84fc0e53e17d0dc",
    ),
    "twitter": Package(
        "emoji-datasource-twitter",
        VERSION,
        "ec5fae0ae1c7fbb427adcd793f9b676ef2a483d13ab65ce2e0c9d3dae5b5465378a4b613cdae9c3ff76cb487d20ccb698c52d6b997b05a0f2"
        "305bb8bd9ec842d",
    ),
}
CREDITS = """Emoji images and names of the npm packages emoji-datasource-google and emoji-datasource-twitter 16.0.0
(https://github.com/iamcal/emoji-data), laid on white.
- Images in google/: Noto Emoji, Copyright Google LLC, Apache License 2.0 (https://github.com/googlefonts/noto-emoji).
- Images in twitter/: Twemoji, Copyright Twitter, Inc and other contributors, CC-BY 4.0
  (https://creativecommons.org/licenses/by/4.0/, https://github.com/jdecked/twemoji).
- Names, categories and their order: emoji-data, Copyright (c) 2013 Cal Henderson, MIT licence.
"""
TONES = {"1F3FB": "light", "1F3FC": "medium-light", "1F3FD": "medium", "1F3FE": "medium-dark", "1F3FF": "dark"}
TONE_SHARE, VENDOR_SHARE = 10, 12
"""One pair in so many is held out: of emoji and skin tone, of emoji without tones and vendor."""
MARK = "emoji.json"
RULES = {"version": VERSION, "captions": 1, "split": 1, "side": SIDE}
_IMAGE = re.compile(r"[0-9a-f]{2,6}(-[0-9a-f]{2,6})*\.png")


@dataclass(frozen=True)
class Emoji:
    """One image to be: whose, of what, in which skin tone (a key of emoji.json such as 1F3FB or 1F3FB-1F3FF)."""

    vendor: str
    code: str  # code points of the emoji without tone
    tone: str
    image: str  # name of its file
    caption: str
    category: str
    held_out: str  # "", "tone" or "vendor": which pair training does not see


def prepare_emoji(
    out: Path,
    sources: Sequence[str | Path] = (),
    *,
    announce: Callable[[str], None] = lambda text: None,
    progress: bool = False,
) -> dict[str, int]:
    """Write `out`/train and `out`/test, folders of 64x64 PNG with metadata.jsonl, which `open_images(out)` reads.

    Args:
        sources: the two packages as .tgz files or unpacked folders; empty: downloaded from the npm registry.
        announce: given lines on what is done.   progress: draw bars.
    Returns: number of images by split. The folder appears whole or not at all; one that is there already, made by
        the same rules, is left as it is.
    Raises: ValueError when `out` holds something else, or a package is damaged or another; OSError without network.
    """
    out = Path(out)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        return _there(out)
    read = {}
    for vendor, path in _located(sources, announce, progress).items():
        announce(f"reading {path}")
        read[vendor] = read_package(path, _wanted(vendor))
    found = (item for vendor, files in read.items() for item in emoji_of(vendor, _names(files, vendor)))
    items = sorted(found, key=_place)
    _require_distinct(items)
    images = [pixels(_file(read, item), f"{item.vendor}/{item.image}") for item in items]
    part = out.with_name(f".{out.name}.part")
    shutil.rmtree(part, ignore_errors=True)
    try:
        counts = _write(part, split(items, images), images, progress)
        (part / "CREDITS.txt").write_text(CREDITS, encoding="utf-8")
        (part / MARK).write_text(json.dumps({**RULES, "images": counts}) + "\n", encoding="utf-8")
        if out.exists():
            out.rmdir()
        os.replace(part, out)
    finally:
        shutil.rmtree(part, ignore_errors=True)
    return counts


def emoji_of(vendor: str, entries: Iterable[dict[str, Any]]) -> Iterator[Emoji]:
    """The emoji of emoji.json's entries that have an image of this vendor, with and without skin tones."""
    entries = list(entries)
    names = Counter(_plain(entry["name"]) for entry in entries)
    for entry in entries:
        name = _plain(entry["name"])
        if names[name] > 1:  # two emoji of one name are told apart by their short names
            name = _plain(entry["short_name"])
        tones: dict[str, dict[str, Any]] = entry.get("skin_variations") or {}
        for tone, image in {"": entry, **tones}.items():
            if not image.get(f"has_img_{vendor}"):
                continue
            caption = f"{vendor}: {name}" + (f", {tone_name(tone)}" if tone else "")
            why = held_out(vendor, entry["unified"], tone, bool(tones))
            yield Emoji(vendor, entry["unified"], tone, image["image"], caption, entry["category"], why)


def tone_name(tone: str) -> str:
    """1F3FB -> light skin tone; 1F3FB-1F3FF -> light and dark skin tones. Raises: ValueError on another key."""
    parts = tone.split("-")
    if not 1 <= len(parts) <= 2 or not set(parts) <= set(TONES):
        raise ValueError(f"skin tone {tone!r} of emoji.json is none of {', '.join(TONES)}, or two of them")
    return " and ".join(TONES[part] for part in parts) + (" skin tone" if len(parts) == 1 else " skin tones")


def held_out(vendor: str, code: str, tone: str, has_tones: bool) -> str:
    """Which pair of an image training does not see: `tone`, `vendor`, or none (empty).

    A tenth of the pairs of emoji and skin tone are held out, of all vendors; and of a twelfth of the emoji without
    tones, the image of one vendor. What is chosen are digits of SHA-256 of the pair.
    """
    if tone:
        return "" if _digest(f"tone {code} {tone}") % TONE_SHARE else "tone"
    if has_tones:
        return ""
    number, vendors = _digest(f"vendor {code}"), list(PACKAGES)
    chosen = number % VENDOR_SHARE == 0 and vendors[number // VENDOR_SHARE % len(vendors)] == vendor
    return "vendor" if chosen else ""


def _digest(text: str) -> int:
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big")


def _place(item: Emoji) -> int:
    """Order of the lines: mixed, the same always, so that the first few are of all kinds."""
    return _digest(f"{item.vendor} {item.image}")


def _plain(name: str) -> str:
    """WAVING HAND SIGN -> waving hand sign."""
    return " ".join(str(name).replace("_", " ").lower().split())


def _located(sources: Sequence[str | Path], announce: Callable[[str], None], progress: bool) -> dict[str, Path]:
    """Each vendor's package: among the given ones, by its name, or downloaded into the cache."""
    if not sources:
        return {v: fetch(p, cache_folder() / "npm", announce=announce, progress=progress) for v, p in PACKAGES.items()}
    found: dict[str, Path] = {}
    for source in map(Path, sources):
        if not source.exists():
            raise FileNotFoundError(f"--from {source} does not exist; give {_both('.tgz')}, or the unpacked folders")
        names = [
            v for v in PACKAGES if source.is_dir() and any((source / d / "img" / v).is_dir() for d in ("", "package"))
        ]
        names = names or [v for v, p in PACKAGES.items() if p.name in source.name]
        if len(names) != 1 or names[0] in found:
            raise ValueError(
                f"--from {source} must be one of the two packages, each once: {_both('.tgz')}, or unpacked"
            )
        found[names[0]] = source
    if missing := [v for v in PACKAGES if v not in found]:
        raise ValueError(f"--from gives {', '.join(found)} but not {', '.join(missing)}; give both: {_both('.tgz')}")
    return {v: found[v] for v in PACKAGES}


def _both(ending: str) -> str:
    return " and ".join(f"{p.name}-{p.version}{ending}" for p in PACKAGES.values())


def _wanted(vendor: str) -> Callable[[str], bool]:
    folder = f"img/{vendor}/{SIDE}/"
    return lambda name: (
        name == "emoji.json" or (name.startswith(folder) and bool(_IMAGE.fullmatch(name[len(folder) :])))
    )


def _names(files: dict[str, bytes], vendor: str) -> list[dict[str, Any]]:
    """The entries of emoji.json. Raises ValueError when they are not what is read here."""
    try:
        entries = json.loads(files["emoji.json"])
        for entry in entries:
            known = all(isinstance(entry[key], str) for key in ("name", "short_name", "unified", "image", "category"))
            images = [entry["image"], *(v["image"] for v in (entry.get("skin_variations") or {}).values())]
            if not known or not all(_IMAGE.fullmatch(image) for image in images):
                raise ValueError(f"the entry {str(entry)[:60]}... lacks a name or an image")
    except (KeyError, ValueError, TypeError, AttributeError) as error:
        raise ValueError(
            f"{PACKAGES[vendor].name}: emoji.json cannot be read: {error!r}; get {VERSION} anew"
        ) from error
    return list(entries)


def _require_distinct(items: list[Emoji]) -> None:
    twice = [caption for caption, count in Counter(item.caption for item in items).items() if count > 1]
    if twice or not items:
        raise ValueError(
            f"emoji.json gives {len(items)} images, {len(twice)} captions twice ({twice[:3]}); get {VERSION}"
        )


def _file(read: dict[str, dict[str, bytes]], item: Emoji) -> bytes:
    raw = read[item.vendor].get(f"img/{item.vendor}/{SIDE}/{item.image}")
    if raw is None:
        raise ValueError(f"{PACKAGES[item.vendor].name} has no image {item.image}, which its emoji.json names")
    return raw


def split(items: list[Emoji], images: list[Image.Image]) -> list[Emoji]:
    """The items, of which those go back into training whose image is pixel for pixel one of training."""
    seen = {image.tobytes() for item, image in zip(items, images, strict=True) if not item.held_out}
    pairs = zip(items, images, strict=True)
    return [replace(item, held_out="") if image.tobytes() in seen else item for item, image in pairs]


def _write(part: Path, items: list[Emoji], images: list[Image.Image], progress: bool) -> dict[str, int]:
    from tqdm.auto import tqdm

    lines: dict[str, list[str]] = {"train": [], "test": []}
    for item, image in tqdm(zip(items, images, strict=True), total=len(items), unit="image", disable=not progress):
        place, name = "test" if item.held_out else "train", f"{item.vendor}/{item.image}"
        path = part / place / name
        path.parent.mkdir(parents=True, exist_ok=True)
        image.save(path)
        line = {"file_name": name, "text": item.caption, "label": item.category}
        lines[place].append(json.dumps(line | ({"held_out": item.held_out} if item.held_out else {})))
    for place, rows in lines.items():
        if not rows:
            raise ValueError(f"no image falls into {place}; are these whole packages?")
        (part / place / "metadata.jsonl").write_text("\n".join(rows) + "\n", encoding="utf-8")
    return {place: len(rows) for place, rows in lines.items()}


def pixels(raw: bytes, name: str) -> Image.Image:
    """An encoded image as RGB of 64x64 on white. Raises ValueError naming it."""
    try:
        with Image.open(io.BytesIO(raw), formats=["PNG"]) as image:
            if max(image.size) > 4 * SIDE:
                raise ValueError(f"{image.size[0]}x{image.size[1]} pixels")
            rgb = to_rgb(image)
    except Exception as error:  # Pillow's plugins raise anything on damaged files
        raise ValueError(f"image {name} cannot be read: {error}") from error
    return rgb if rgb.size == (SIDE, SIDE) else rgb.resize((SIDE, SIDE), Image.Resampling.LANCZOS)


def _there(out: Path) -> dict[str, int]:
    """Counts of a folder made by these rules. Raises ValueError when it is another."""
    try:
        mark = json.loads((out / MARK).read_text(encoding="utf-8"))
        counts = mark.pop("images")
        if mark == RULES:
            return {str(split): int(count) for split, count in counts.items()}
    except (OSError, ValueError, KeyError, AttributeError):
        pass
    raise ValueError(f"{out} is not empty and was not made by this command; give another folder, or remove it")
