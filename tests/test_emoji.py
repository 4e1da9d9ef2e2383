"""Emoji as a data set: tiny packages in the place of the published ones."""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

from varkit.cli import app
from varkit.data import npm
from varkit.data.emoji import PACKAGES, TONES, held_out, prepare_emoji, tone_name
from varkit.data.images import ImageTransform, open_images

TONED, PLAIN = range(0x1F440, 0x1F44C), range(0x1F300, 0x1F320)


def png(seed: int, size: int = 64) -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 255, (size, size, 4), dtype=np.uint8)
    pixels[:4] = 0  # transparent black, which becomes white
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


def entries() -> list[dict[str, Any]]:
    rows = []
    for code in (*TONED, *PLAIN):
        has = {f"has_img_{vendor}": True for vendor in PACKAGES}
        row: dict[str, Any] = {"name": f"THING {code:X}", "short_name": f"thing_{code:x}", "unified": f"{code:X}"}
        row |= {"image": f"{code:x}.png", "category": "Hands" if code in TONED else "Sky", **has}
        if code in TONED:
            row["skin_variations"] = {t: {"image": f"{code:x}-{t.lower()}.png", **has} for t in TONES}
        rows.append(row)
    return rows


def files_of(vendor: str) -> dict[str, bytes]:
    found = {"emoji.json": json.dumps(entries()).encode(), f"img/{vendor}/sheets/64.png": b"never read"}
    for row in entries():
        for image in [row["image"], *(v["image"] for v in row.get("skin_variations", {}).values())]:
            found[f"img/{vendor}/64/{image}"] = png(hash_of(vendor + image))
    return found


def hash_of(text: str) -> int:
    return sum(ord(c) * 31**i for i, c in enumerate(text)) % 2**32


def pack(path: Path, files: dict[str, bytes], change: Callable[[tarfile.TarFile], None] | None = None) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w:gz") as tar:
        for name, raw in files.items():
            info = tarfile.TarInfo(f"package/{name}")
            info.size = len(raw)
            tar.addfile(info, io.BytesIO(raw))
        if change is not None:
            change(tar)
    return path


@pytest.fixture(scope="module", name="packages")
def _packages(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    folder = tmp_path_factory.mktemp("packages")
    return [str(pack(folder / p.file, files_of(vendor))) for vendor, p in PACKAGES.items()]


def lines(out: Path, split: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / split / "metadata.jsonl").read_text().splitlines()]


def test_the_command_writes_captioned_splits_that_open(packages: list[str], tmp_path: Path) -> None:
    out = tmp_path / "emoji"
    words = ["data", "emoji", str(out), "--json", *(w for p in packages for w in ("--from", p))]
    done = CliRunner().invoke(app, words)
    assert done.exit_code == 0, done.output
    counts = json.loads(done.stdout)["images"]
    assert sum(counts.values()) == 2 * (6 * len(TONED) + len(PLAIN)) and min(counts.values()) > 3
    assert "CC-BY 4.0" in (out / "CREDITS.txt").read_text() and not list(tmp_path.glob(".emoji*"))
    for split in ("train", "test"):
        dataset = open_images(out, split=split, transform=ImageTransform(64, mode="squash"))
        assert len(dataset) == counts[split] and dataset.texts is not None and len(set(dataset.texts)) == len(dataset)
        assert (dataset[0]["image"][:, :4] == 1).all()  # what was transparent is white
    captions = {row["text"]: row["file_name"] for split in ("train", "test") for row in lines(out, split)}
    assert captions["google: thing 1f440, medium-dark skin tone"] == "google/1f440-1f3fe.png"
    assert captions["twitter: thing 1f300"] == "twitter/1f300.png"
    before = (out / "train" / "metadata.jsonl").read_bytes()
    assert json.loads(CliRunner().invoke(app, words).stdout)["images"] == counts  # there already: left as it is
    again = tmp_path / "again"
    prepare_emoji(again, packages)
    assert (again / "train" / "metadata.jsonl").read_bytes() == before


def test_what_is_held_out_is_the_pair_and_never_one_of_its_parts(packages: list[str], tmp_path: Path) -> None:
    out = tmp_path / "emoji"
    prepare_emoji(out, packages)

    def parts(row: dict[str, Any]) -> tuple[str, str, str]:
        vendor, _, name = row["text"].partition(": ")
        name, _, tone = name.partition(", ")
        return vendor, name, tone

    train = {parts(row) for row in lines(out, "train")}
    kinds = set()
    for row in lines(out, "test"):
        vendor, name, tone = parts(row)
        kinds.add(row["held_out"])
        assert any(n == name for _, n, _ in train) and any(t == tone for _, _, t in train)
        if row["held_out"] == "tone":
            assert tone and not any((n, t) == (name, tone) for _, n, t in train)
        else:
            assert not tone and not any((v, n) == (vendor, name) for v, n, _ in train)
    assert kinds == {"tone", "vendor"}


def test_the_rule_holds_out_the_stated_shares() -> None:
    codes = [f"{code:X}" for code in range(0x1F000, 0x1F000 + 3000)]
    tones = [held_out("google", code, "1F3FB", True) for code in codes]
    assert tones == [held_out("twitter", code, "1F3FB", True) for code in codes]
    assert 0.08 < tones.count("tone") / len(codes) < 0.12
    by_vendor = {v: {c for c in codes if held_out(v, c, "", False)} for v in PACKAGES}
    assert not by_vendor["google"] & by_vendor["twitter"] and all(80 < len(s) < 170 for s in by_vendor.values())
    assert not any(held_out("google", code, "", True) for code in codes)
    assert tone_name("1F3FB-1F3FF") == "light and dark skin tones"
    with pytest.raises(ValueError, match="skin tone '1F3AA'"):
        tone_name("1F3AA")


def test_an_image_that_training_has_too_is_not_held_out(packages: list[str], tmp_path: Path) -> None:
    prepare_emoji(tmp_path / "first", packages)
    chosen = next(row["file_name"] for row in lines(tmp_path / "first", "test") if row["held_out"] == "vendor")
    vendor, _, image = chosen.partition("/")
    files = files_of(vendor)
    seen = next(r["file_name"] for r in lines(tmp_path / "first", "train") if r["file_name"].startswith(vendor))
    files[f"img/{vendor}/64/{image}"] = files[f"img/{vendor}/64/{seen.partition('/')[2]}"]
    other = next(p for p in packages if PACKAGES[vendor].name not in p)
    prepare_emoji(tmp_path / "second", [pack(tmp_path / PACKAGES[vendor].file, files), other])
    assert chosen in {row["file_name"] for row in lines(tmp_path / "second", "train")}


def test_a_tar_reaches_nothing_outside_and_is_limited(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def hostile(tar: tarfile.TarFile) -> None:
        for name, kind in (("package/../../evil.png", tarfile.REGTYPE), ("package/emoji.json", tarfile.SYMTYPE)):
            info = tarfile.TarInfo(name)
            info.type, info.linkname = kind, "/etc/passwd"
            tar.addfile(info, io.BytesIO(b""))

    path = pack(tmp_path / "in" / "a.tgz", {"emoji.json": b"[]"}, hostile)
    assert npm.read_package(path, lambda name: name == "emoji.json") == {"emoji.json": b"[]"}
    assert sorted(p.name for p in tmp_path.rglob("*")) == ["a.tgz", "in"]
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "emoji.json").symlink_to("/etc/passwd")
    with pytest.raises(ValueError, match="none of the files"):
        npm.read_package(tmp_path / "folder", lambda name: name == "emoji.json")
    for limit in ("MAX_FILE", "MAX_PACKAGE", "MAX_MEMBERS"):
        with monkeypatch.context() as patch:
            patch.setattr(npm, limit, 1)
            with pytest.raises(ValueError, match="get it anew"):
                npm.read_package(path, lambda name: name == "emoji.json")
    path.write_bytes(path.read_bytes()[:50])
    with pytest.raises(ValueError, match=r"a.tgz is no package"):
        npm.read_package(path, lambda name: True)


def test_bad_sources_and_folders_are_refused_and_leave_nothing(packages: list[str], tmp_path: Path) -> None:
    full = tmp_path / "full"
    full.mkdir()
    (full / "photo.png").write_bytes(png(0))
    broken = files_of("google") | {"img/google/64/1f300.png": b"no image"}
    damaged = str(pack(tmp_path / PACKAGES["google"].file, broken))
    cases: list[tuple[Path, list[str], str]] = [
        (full, packages, "not empty and was not made by this command"),
        (tmp_path / "a", packages[:1], "but not twitter; give both"),
        (tmp_path / "a", [packages[0], packages[0]], "must be one of the two packages, each once"),
        (tmp_path / "a", [str(tmp_path / "nowhere.tgz")], "does not exist"),
        (tmp_path / "a", [damaged, packages[1]], "image google/1f300.png cannot be read"),
    ]
    for out, sources, message in cases:
        words = ["data", "emoji", str(out), *(w for s in sources for w in ("--from", s))]
        done = CliRunner().invoke(app, words)
        assert done.exit_code == 2 and message in done.output, done.output
    assert sorted(p.name for p in tmp_path.iterdir()) == [PACKAGES["google"].file, "full"]


def test_a_download_goes_on_is_checked_and_comes_from_the_configured_registry(
    packages: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = Path(packages[0])
    raw = whole.read_bytes()
    package = npm.Package("emoji-datasource-google", "16.0.0", npm.digest(whole))
    asked: list[tuple[str, str | None]] = []

    class Answer(io.BytesIO):
        status, headers = 200, dict[str, str]()

    def urlopen(request: Any, timeout: float) -> Answer:
        span = request.get_header("Range")
        asked.append((request.full_url, span))
        start = int(span.removeprefix("bytes=").rstrip("-")) if span else 0
        body = raw[start : start + 1000] if len(asked) == 1 else raw[start:]  # the first breaks off
        answer = Answer(body)
        answer.status, answer.headers = (206 if span else 200), {"Content-Length": str(len(raw) - start)}
        return answer

    monkeypatch.setattr(npm.urllib.request, "urlopen", urlopen)
    monkeypatch.setattr(npm.time, "sleep", lambda seconds: None)
    monkeypatch.setenv("npm_config_registry", "https://mirror.example/npm")
    path = npm.fetch(package, tmp_path / "cache")
    url = "https://mirror.example/npm/emoji-datasource-google/-/emoji-datasource-google-16.0.0.tgz"
    assert asked == [(url, None), (url, "bytes=1000-")] and path.read_bytes() == raw
    assert npm.fetch(package, tmp_path / "cache") == path and len(asked) == 2  # there already
    wrong = npm.Package(package.name, package.version, "0" * 128)
    with pytest.raises(ValueError, match=r"SHA-512 .* it was not kept"):
        npm.fetch(wrong, tmp_path / "other")
    assert not list((tmp_path / "other").iterdir())


def test_the_registry_is_read_where_npm_reads_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("npm_config_registry", "NPM_CONFIG_REGISTRY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NPM_CONFIG_USERCONFIG", str(tmp_path / "npmrc"))
    monkeypatch.setattr(npm.shutil, "which", lambda name: None)
    assert npm.registry() == npm.REGISTRY
    (tmp_path / "npmrc").write_text("fund=false\nregistry = https://own.example/npm\n")
    assert npm.registry() == "https://own.example/npm/"
    monkeypatch.setenv("NPM_CONFIG_REGISTRY", "https://set.example/")
    assert npm.registry() == "https://set.example/"
    monkeypatch.setenv("NPM_CONFIG_REGISTRY", "file:///etc")
    with pytest.raises(ValueError, match="configured as 'file:///etc'"):
        npm.registry()


def test_shift_moves_whole_images_and_repeats_the_edge() -> None:
    images = torch.randint(0, 256, (64, 3, 64, 64), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    moved = ImageTransform(64, mode="shift")(images, torch.arange(64))
    plain = ImageTransform(64, mode="squash")(images)
    offsets = set()
    for before, after in zip(plain, moved, strict=True):
        padded = torch.nn.functional.pad(before[None], (2, 2, 2, 2), mode="replicate")[0]
        windows = {(y, x): padded[:, y : y + 64, x : x + 64] for y in range(5) for x in range(5)}
        found = [at for at, window in windows.items() if torch.equal(window, after)]
        assert len(found) == 1
        offsets |= set(found)
    assert len(offsets) > 15
    again = ImageTransform(64, mode="shift")(images[3:4], torch.tensor([3]))
    assert torch.equal(again[0], moved[3])
