"""Large .npz files in little memory: one written array by array in blocks, one read as a memory map.

An .npz is a zip of .npy files. A member that is stored, not deflated, lies in the file as it lies in memory.
"""

from __future__ import annotations

import math
import os
import zipfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import IO, Any

import numpy as np
import numpy.typing as npt

_LOCAL_HEADER = 30  # bytes before the name of a member; its two lengths end it

Stream = tuple[tuple[int, ...], npt.DTypeLike, Iterable[npt.ArrayLike]]
"""An array to write: its shape, its dtype, and its rows in blocks of any length."""


def map_npz(path: Path, key: str) -> np.ndarray | None:
    """The array `key` of an .npz, read-only and read from the disk only where it is looked at.

    Returns: a `np.memmap`; None where the member is compressed, encrypted or empty, and must be read as usual.
        Checksums are not verified: that would read the whole file.
    Raises: KeyError if there is no such array; ValueError if it is damaged or holds pickled objects;
        zipfile.BadZipFile if the file is no zip. They name the array, not the file.
    """
    with zipfile.ZipFile(path) as archive:
        member = archive.getinfo(f"{key}.npy")
    if member.compress_type != zipfile.ZIP_STORED or member.flag_bits & 1:
        return None
    with path.open("rb") as file:
        file.seek(member.header_offset)
        header = file.read(_LOCAL_HEADER)
        if len(header) < _LOCAL_HEADER or not header.startswith(b"PK\x03\x04"):
            raise ValueError(f"{key}.npy is not where the directory of the zip says; the file is damaged")
        lengths = (header[26:28], header[28:30])  # of the name, and of extra fields (the directory's may differ)
        start = member.header_offset + _LOCAL_HEADER + sum(int.from_bytes(n, "little") for n in lengths)
        file.seek(start)
        shape, fortran, dtype = _read_header(file, f"{key}.npy")
        offset = file.tell()
    size, stored = math.prod(shape) * dtype.itemsize, start + member.file_size - offset
    if size != stored:
        raise ValueError(f"{key}.npy says {dtype} {shape}, {size} bytes, but holds {stored}; the file is damaged")
    if size == 0:
        return None  # nothing can be mapped
    return np.memmap(path, dtype, mode="r", offset=offset, shape=shape, order="F" if fortran else "C")


def _read_header(file: IO[bytes], what: str) -> tuple[tuple[int, ...], bool, np.dtype[Any]]:
    version = np.lib.format.read_magic(file)
    readers = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
    if version not in readers:
        raise ValueError(f"{what} is written in .npy format {version}; expected 1.0 or 2.0, as for any plain array")
    shape, fortran, dtype = readers[version](file)
    if dtype.hasobject:
        raise ValueError(f"{what} holds pickled objects, which are refused")
    return shape, fortran, dtype


def write_npz(path: Path, arrays: Mapping[str, Stream]) -> None:
    """Write arrays into an uncompressed .npz, a block at a time; the file appears whole or not at all.

    `np.load(path, allow_pickle=False)` and `map_npz` read it. Equal arrays make equal bytes.

    Args: arrays: name -> (shape, dtype, blocks): blocks (n, *shape[1:]) that join to the array along axis 0.
    Raises: ValueError if blocks have another dtype or do not make that shape; nothing is then left behind.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        with part.open("wb") as file:
            with zipfile.ZipFile(file, "w", zipfile.ZIP_STORED) as archive:
                for name, (shape, dtype, blocks) in arrays.items():
                    entry = zipfile.ZipInfo(f"{name}.npy")  # of 1980 by default: equal arrays make equal files
                    with archive.open(entry, "w", force_zip64=True) as member:
                        _write_array(member, name, tuple(shape), np.dtype(dtype), blocks)
            file.flush()
            os.fsync(file.fileno())  # the rename must not reach the disk before the bytes
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


def _write_array(
    file: IO[bytes], name: str, shape: tuple[int, ...], dtype: np.dtype[Any], blocks: Iterable[npt.ArrayLike]
) -> None:
    expected = f"{dtype} (n{''.join(f', {side}' for side in shape[1:])})"
    if dtype.hasobject:
        raise ValueError(f"{name} is to hold {dtype}; only plain numbers can be written")
    descr = np.lib.format.dtype_to_descr(dtype)
    np.lib.format.write_array_header_1_0(file, {"descr": descr, "fortran_order": False, "shape": shape})
    rows = 0
    for given in blocks:
        block = np.ascontiguousarray(given)
        if block.dtype != dtype or block.shape[1:] != shape[1:]:
            raise ValueError(f"{name}: a block is {block.dtype} {block.shape}; expected {expected}")
        file.write(block.data)
        rows += len(block)
    if rows != shape[0]:
        raise ValueError(f"{name}: its blocks hold {rows} rows; expected {shape[0]}")
