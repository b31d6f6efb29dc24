"""Compiled modules by spec: in memory, and in the user's cache folder across processes."""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import functools
import hashlib
import os
import stat
import threading
from collections.abc import Callable, Iterator
from importlib import resources
from pathlib import Path
from typing import Any

from ..errors import BuildError, ModuleFileError, warn_caller
from ..load.module import Module, load_file
from ..load.module_file import ModuleFile, read_module
from ..machine import user_folder
from ..operations import OPERATIONS
from ..spec import KernelSpec
from . import packs

_loaded: dict[KernelSpec, Module] = {}
_given: list[Module] = []
_lock = threading.Lock()

#: By operation: from what is seen of a call to the function that serves it, without looking
#: further. `api` fills them.
entries: dict[str, dict[tuple, Callable[..., Any]]] = {op: {} for op in OPERATIONS}


def forget_entries() -> None:
    """Forget which function served which calls: the next one looks for its module again."""
    for known in entries.values():
        known.clear()


#: Open files of the locks that this process holds, see `_lock_file`.
_lock_handles: set[int] = set()


def _new_locks() -> None:
    """Replace the lock and close file locks in a forked child, which lacks their holders."""
    global _lock
    _lock = threading.Lock()
    while _lock_handles:
        os.close(_lock_handles.pop())


os.register_at_fork(after_in_child=_new_locks)


#: The files that decide code, by folder: what can be asked for, and every stage up to the `.so`.
_CODE = {
    "qknorm_tvm": ("dtypes.py", "operations.py", "peers.py", "spec.py", "targets.py"),
    "qknorm_tvm.declare": (".py",),
    "qknorm_tvm.schedules": (".py",),
    "qknorm_tvm.lower": (".py",),
    "qknorm_tvm.build": (".py",),
    "qknorm_tvm.native": (".c", ".h"),
    "qknorm_tvm.load": ("module_file.py",),
}


@functools.lru_cache(maxsize=1)
def _source_digest() -> str:
    """Digest of the sources that decide the code, so that no stale module outlives a change."""
    digest = hashlib.sha256()
    for package, endings in _CODE.items():
        for entry in sorted(resources.files(package).iterdir(), key=lambda e: e.name):
            if entry.is_file() and entry.name.endswith(endings):
                name = f"{package}/{entry.name}"
                digest.update(name.encode() + b"\0" + entry.read_bytes())
    return digest.hexdigest()


def cache_location() -> Path:
    """Return where the cache folder is or would be: see `cache_directory`.

    Raises
    ------
    FileNotFoundError
        The variable is not set, and the user has no home.
    """
    given = os.environ.get("QKNORM_TVM_CACHE_DIR")
    if given:
        return Path(given)
    return user_folder("cache")


def cache_directory() -> Path:
    """Return the cache folder: ``$QKNORM_TVM_CACHE_DIR``, or the user's own.

    It is created with access for its user only. A ``.so`` is a program, so a folder is used only if
    it is this user's or root's and nobody else may write to it.

    Raises
    ------
    ModuleFileError
        The folder belongs to somebody else, or others may write to it.
    OSError
        There is none, and it cannot be made.
    """
    directory = cache_location()
    directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    _check_owner(directory, directory.stat())
    return directory


def _check_owner(path: Path, status: os.stat_result) -> None:
    if status.st_uid not in (os.getuid(), 0):
        raise ModuleFileError(
            f"{path} belongs to another user (uid {status.st_uid}) and will not be loaded from; "
            "set QKNORM_TVM_CACHE_DIR to a folder of your own"
        )
    if status.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        raise ModuleFileError(
            f"others may write to {path}, so it will not be loaded from; run `chmod go-w {path}` "
            "or set QKNORM_TVM_CACHE_DIR"
        )


def cache_key(spec: KernelSpec) -> str:
    """Return the file name of a spec's module: all that decides its code is in it."""
    from ..build import tuned as selection
    from ..machine import cpu_name
    from .compiled import versions

    # Tuned records are picked by device: a folder shared by machines must hold a module for each.
    tuned = [selection.digest(), cpu_name()] if selection.has_outcomes() else []
    parts = [
        spec.text,
        _source_digest(),
        *tuned,
        *(f"{k}={v}" for k, v in sorted(versions().items())),
    ]
    return f"{spec.digest}-{hashlib.sha256(chr(10).join(parts).encode()).hexdigest()[:24]}.so"


def _usable(path: Path, spec: KernelSpec) -> ModuleFile | None:
    """Return a cached file, or None where it is damaged, another user's, or another spec's.

    Owner and mode are checked on the descriptor that the content was read from. Whoever may write
    to a folder above can replace the file, but what is loaded is what only this user could write.
    """
    try:
        file = read_module(path)
        _check_owner(path, file.status)
        return file if file.metadata["specs"] == [spec.to_dict()] else None
    except FileNotFoundError:
        return None
    except (ModuleFileError, KeyError, OSError):
        return None


def _load_or_build(spec: KernelSpec) -> Module:
    from .compiled import versions

    try:
        versions()
    except BuildError as error:
        raise BuildError(
            f"there is no module for {spec.text} ({packs.sources_text()}), and {error}; or build "
            f"it elsewhere, `qknorm-tvm export qk.so --spec '{spec.text}'`, and name its folder "
            f"in {packs.ENVIRONMENT}"
        ) from None
    try:
        path = cache_directory() / cache_key(spec)
    except OSError as error:
        return load_file(_build(spec, None, error))
    file = _usable(path, spec)
    if file is None:
        # One process compiles, the others wait; a lock left by a killed process is the system's
        # to free.
        with _lock_file(path.with_suffix(".lock")) as refusal:
            held = _usable(path, spec) if refusal is None else None
            file = held or _build(spec, path, refusal)
    return load_file(file)


@contextlib.contextmanager
def _lock_file(path: Path) -> Iterator[OSError | None]:
    """Hold a lock between processes; yields the system's error where it has no locks."""
    handle = refusal = None
    try:
        try:
            handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
            _lock_handles.add(handle)
            fcntl.flock(handle, fcntl.LOCK_EX)
        except OSError as error:
            refusal = error
        yield refusal
    finally:
        if handle in _lock_handles:
            _lock_handles.remove(handle)
            if refusal is None:
                fcntl.flock(handle, fcntl.LOCK_UN)  # a child that is being forked has it open too
            os.close(handle)


def _build(spec: KernelSpec, path: Path | None, refusal: OSError | None) -> ModuleFile:
    """Compile a spec, and store it at a path in the cache where that is possible.

    `refusal` is why there is no lock, or no path. A module that cannot be stored is still returned.
    """
    from .compiled import compile, place

    with compile(spec) as compiled:
        file = read_module(compiled.path)
        if path is not None:
            try:
                if refusal is None:
                    # Half a file of a process that was killed as it wrote; the lock is ours.
                    for left in path.parent.glob(f".{path.name}.*"):
                        left.unlink(missing_ok=True)
                place(compiled.path, path)
                file = dataclasses.replace(file, path=path)
            except OSError as error:
                refusal = error
    if refusal is not None:
        _warn_once(refusal)
    return file


_warned = False


def _warn_once(error: OSError) -> None:
    global _warned
    if not _warned:
        _warned = True
        warn_caller(
            f"qknorm-tvm may compile anew in every process: the cache folder cannot be used as it "
            f"should ({error}); set QKNORM_TVM_CACHE_DIR to a folder that can be written and locked"
        )


def use(module: Module) -> None:
    """Serve calls of the Python API from a loaded module, instead of compiling.

    The module serves a call if it holds the call's spec, with fixed or open columns, for the kind
    of device that the arrays are on. Of several such modules the one that was given last serves.
    So the Python API works on a machine without TVM or a compiler. No call asks for a reproducible
    spec: the entry points of a module of one are called directly.

    Parameters
    ----------
    module : Module
        From `qknorm_tvm.load`.

    Raises
    ------
    TypeError
        `module` is no `Module`.
    """
    if not isinstance(module, Module):
        raise TypeError(f"module must be a qknorm_tvm.Module, got {type(module).__name__}")
    with _lock:
        _given.insert(0, module)
        _loaded.clear()
    forget_entries()


def _holds(module: Module, spec: KernelSpec) -> bool:
    return any(packs.serves(held, spec) for held in module.specs)


def module_for(spec: KernelSpec) -> Module:
    """Return the module of a spec: given by `use`, from a pack, from the cache, or compiled now.

    Raises
    ------
    BuildError, ModuleFileError
        It cannot be compiled, or not be cached safely.
    """
    module = _loaded.get(spec)
    if module is None:
        with _lock:
            module = _loaded.get(spec)
            if module is None:
                given = next((module for module in _given if _holds(module, spec)), None)
                module = given or packs.module_for(spec) or _load_or_build(spec)
                _loaded[spec] = module
    return module
