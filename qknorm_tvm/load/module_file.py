"""Exported files: what they carry about themselves, read and checked without loading them.

A module is an ELF shared library with a section ``.qknorm``: 16 bytes of magic, the SHA-256 of the
file (computed with these 32 bytes zero), and the metadata as JSON, ended by a zero. Loading a
library runs its code, so a file is checked first: a truncated or altered file is refused here.
It is opened and read once, as a `ModuleFile`: what was checked is what is loaded, whatever becomes
of the path meanwhile.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import stat
import struct
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from ..errors import ModuleFileError

#: ELF's numbers for the machines that modules are for, see `targets.MACHINES`.
_ELF_MACHINES = {62: "x86_64", 183: "aarch64"}
#: Version of the metadata; a reader refuses any other. 2: several operations in one module.
FORMAT = 2
SECTION = ".qknorm"
MAGIC = b"QKNORM-TVM MODUL"
_DIGEST_BYTES = 32
#: Levels of lists and mappings in metadata: twice what is there.
_MOST_NESTED = 16


def _section(data: bytes, path: str | os.PathLike[str]) -> tuple[int, int]:
    """Return offset and size of the section `SECTION` of a 64-bit little-endian ELF file."""
    if data[:6] != b"\x7fELF\x02\x01":
        raise ModuleFileError(f"{path} is not a qknorm-tvm module: it is no 64-bit ELF library")
    foreign = ModuleFileError(
        f"{path} is not a qknorm-tvm module: the library has no {SECTION} section"
    )
    damaged = ModuleFileError(f"{path} is damaged or truncated: export it again")
    try:
        (table,) = struct.unpack_from("<Q", data, 0x28)
        entry_size, count, names_index = struct.unpack_from("<HHH", data, 0x3A)
        if count == 0:
            raise foreign
        if entry_size < 64 or table + count * entry_size > len(data):
            raise damaged

        def header(index: int) -> tuple[int, int, int]:
            at = table + index * entry_size
            (name,) = struct.unpack_from("<I", data, at)
            offset, size = struct.unpack_from("<QQ", data, at + 0x18)
            return name, offset, size

        _, names, names_size = header(names_index)
        for index in range(count):
            name, offset, size = header(index)
            start = names + name
            if data[start : data.find(b"\0", start, names + names_size)] == SECTION.encode():
                if offset + size > len(data) or size < len(MAGIC) + _DIGEST_BYTES:
                    raise damaged
                return offset, size
    except struct.error:
        raise damaged from None
    raise foreign


def _machine_in(data: bytes, path: str | os.PathLike[str]) -> str:
    if len(data) < 20:
        raise ModuleFileError(f"{path} is damaged or truncated: export it again")
    (number,) = struct.unpack_from("<H", data, 18)
    return _ELF_MACHINES.get(number, f"ELF machine {number}")


def machine_of(path: str | os.PathLike[str]) -> str:
    """Return the machine that a library is for: one of `targets.MACHINES`, else ELF's number."""
    return _machine_in(_read(path)[0], path)


def _digest(data: bytes, offset: int) -> bytes:
    start = offset + len(MAGIC)
    state = hashlib.sha256(data[:start])
    state.update(bytes(_DIGEST_BYTES))
    state.update(memoryview(data)[start + _DIGEST_BYTES :])
    return state.digest()


def seal(path: Path) -> None:
    """Write the file's digest into it; the last step of an export."""
    data = bytearray(path.read_bytes())
    offset, _ = _section(bytes(data), path)
    start = offset + len(MAGIC)
    data[start : start + _DIGEST_BYTES] = _digest(bytes(data), offset)
    path.write_bytes(data)


def _read(path: str | os.PathLike[str]) -> tuple[bytes, os.stat_result]:
    """Return a file's content and its owner and mode, of the very file that was read."""
    # Without O_NONBLOCK the open of a FIFO waits for somebody who writes to it.
    handle = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    status = os.fstat(handle)
    if not stat.S_ISREG(status.st_mode):
        os.close(handle)
        raise ModuleFileError(f"{path} is not a qknorm-tvm module: it is no regular file")
    with open(handle, "rb") as file:
        return file.read(), status


@dataclasses.dataclass(frozen=True)
class ModuleFile:
    """A module's file, read once and checked.

    Attributes
    ----------
    path : pathlib.Path
        Where it was read from.
    content : bytes
        All of it.
    status : os.stat_result
        Its owner and mode.
    metadata : dict
        What the module holds: ``specs``, ``target``, ``versions`` and so on.
    """

    path: Path
    content: bytes = dataclasses.field(repr=False)
    status: os.stat_result
    metadata: dict[str, Any]

    @property
    def machine(self) -> str:
        """The machine that it is for: one of `targets.MACHINES`, else ELF's number."""
        return _machine_in(self.content, self.path)


def read_module(path: str | os.PathLike[str]) -> ModuleFile:
    """Read a file and check it, without loading it.

    Parameters
    ----------
    path : path-like
        An exported module.

    Returns
    -------
    ModuleFile

    Raises
    ------
    FileNotFoundError
        There is no such file.
    ModuleFileError
        The file is no module, damaged, or of a newer format.
    """
    content, status = _read(path)
    return ModuleFile(Path(path), content, status, _metadata_in(content, path))


def read_metadata(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Check a file and return its metadata, without loading it: see `read_module`."""
    return read_module(path).metadata


def _inner(value: Any) -> Iterable[Any]:
    if isinstance(value, dict):
        return value.values()
    return value if isinstance(value, list) else ()


def _metadata_in(data: bytes, path: str | os.PathLike[str]) -> dict[str, Any]:
    offset, size = _section(data, path)
    if data[offset : offset + len(MAGIC)] != MAGIC:
        raise ModuleFileError(
            f"{path} is not a qknorm-tvm module: its {SECTION} section is another's"
        )
    start = offset + len(MAGIC)
    if data[start : start + _DIGEST_BYTES] != _digest(data, offset):
        raise ModuleFileError(f"{path} is damaged: its content does not match its checksum")
    text = data[start + _DIGEST_BYTES : offset + size].split(b"\0", 1)[0]
    try:
        metadata = json.loads(text)
        version = metadata["format"]
    except (ValueError, KeyError, TypeError, RecursionError):
        raise ModuleFileError(f"{path} is damaged: its metadata is no JSON") from None
    nested = [metadata]
    for _ in range(_MOST_NESTED):
        nested = [inner for value in nested for inner in _inner(value)]
    if nested:  # what looks at it later may recurse
        raise ModuleFileError(f"{path} is damaged: its metadata is nested too deeply")
    if isinstance(version, bool) or not isinstance(version, int) or version < 1:
        raise ModuleFileError(f"{path} is damaged: its metadata has format {version!r}")
    if version < FORMAT:
        raise ModuleFileError(
            f"{path} has format {version}, of an earlier qknorm-tvm; this one reads format "
            f"{FORMAT}: export it again"
        )
    if version > FORMAT:
        raise ModuleFileError(
            f"{path} has format {version}; this qknorm-tvm reads up to {FORMAT}: upgrade it"
        )
    return metadata
