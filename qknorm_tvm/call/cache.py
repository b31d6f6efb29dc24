"""Compiled modules by spec: in memory, and in the user's cache folder across processes."""

from __future__ import annotations

import functools
import hashlib
import os
import stat
import tempfile
import threading
from importlib import resources
from pathlib import Path

from ..errors import BuildError, ModuleFileError, warn_caller
from ..load.module import Module, load
from ..load.module_file import read_metadata
from ..spec import KernelSpec
from ..targets import host_cpu_target
from . import packs

_loaded: dict[KernelSpec, Module] = {}
_given: list[Module] = []
_lock = threading.Lock()


def _new_lock() -> None:
    """Replace the lock: in a forked child the thread that held it is gone."""
    global _lock
    _lock = threading.Lock()


os.register_at_fork(after_in_child=_new_lock)


#: The files that decide code, by folder: what can be asked for, and every stage up to the `.so`.
_CODE = {
    "qknorm_tvm": ("operations.py", "spec.py", "targets.py"),
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
    """Return where the cache folder is or would be: see `cache_directory`."""
    given = os.environ.get("QKNORM_TVM_CACHE_DIR")
    if given:
        return Path(given)
    import platformdirs

    return Path(platformdirs.user_cache_dir("qknorm-tvm", appauthor=False))


def cache_directory() -> Path:
    """Return the cache folder: ``$QKNORM_TVM_CACHE_DIR``, or the user's own.

    It is created for its user only. A ``.so`` is a program: a folder that others can write to is
    not used.

    Raises
    ------
    ModuleFileError
        The folder belongs to somebody else, or others may write to it.
    """
    directory = cache_location()
    directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    _check_owner(directory)
    return directory


def _check_owner(path: Path) -> None:
    status = path.stat()
    if status.st_uid != os.getuid():
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


def _usable(path: Path, spec: KernelSpec) -> bool:
    """Whether a cached file is whole, ours and this spec's; what is not is built again."""
    try:
        _check_owner(path)
        return read_metadata(path)["specs"] == [spec.to_dict()]
    except FileNotFoundError:
        return False
    except (ModuleFileError, KeyError, OSError):
        return False


def _load_or_build(spec: KernelSpec) -> Module:
    from .compiled import compile, place, versions

    try:
        versions()
    except BuildError as error:
        raise BuildError(
            f"there is no module for {spec.text} ({packs.sources_text()}), and {error}; or build "
            f"it elsewhere, `qknorm-tvm export qk.so --spec '{spec.text}'`, and name its folder "
            f"in {packs.ENVIRONMENT}"
        ) from None
    try:
        directory = cache_directory()
        if not os.access(directory, os.W_OK | os.X_OK):
            raise PermissionError(f"{directory} is not writable")
    except OSError as error:
        warn_caller(
            f"qknorm-tvm compiles anew in every process: no cache folder ({error}); set "
            "QKNORM_TVM_CACHE_DIR to a folder that can be written"
        )
        compiled = compile(spec)
        keep = Path(tempfile.mkdtemp(prefix="qknorm-tvm-")) / "module.so"
        return load(place(compiled.path, keep))
    path = directory / cache_key(spec)
    if not _usable(path, spec):
        import filelock

        # One process compiles, the others wait; a lock left by a killed process is the system's
        # to free.
        with filelock.FileLock(path.with_suffix(".lock"), mode=0o600):
            if not _usable(path, spec):
                # Half a file of a process that was killed as it wrote; the lock is ours.
                for left in directory.glob(f".{path.name}.*"):
                    left.unlink(missing_ok=True)
                place(compile(spec).path, path)
    return load(path)


def use(module: Module) -> None:
    """Serve calls of `qknorm_tvm.apply_qk_rms_norm` from a loaded module, instead of compiling.

    Where it holds the dtypes and columns of a call, for the kind of device of its arrays; the
    module given last comes first. So a machine without TVM or a compiler can use the Python API.

    Parameters
    ----------
    module : Module
        From `qknorm_tvm.load`.

    Raises
    ------
    TypeError
        `module` is no `Module`.
    """
    from . import api

    if not isinstance(module, Module):
        raise TypeError(f"module must be a qknorm_tvm.Module, got {type(module).__name__}")
    with _lock:
        _given.insert(0, module)
        _loaded.clear()
    api.forget_entries()


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
                given = next((one for one in _given if _holds(one, spec)), None)
                module = given or packs.module_for(spec) or _load_or_build(spec)
                _loaded[spec] = module
    return module


def cpu_module() -> Module:
    """Return some CPU module: one that is loaded, a pack's, or a small one compiled now."""
    for module in [*_given, *_loaded.values()]:
        if module.specs[0].parsed_target.kind == "cpu":
            return module
    return packs.cpu_module() or module_for(
        KernelSpec(in_dtype="float32", target=host_cpu_target())
    )
