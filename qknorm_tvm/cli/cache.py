"""``qknorm-tvm cache``: list, clear."""

from __future__ import annotations

import contextlib
import dataclasses
import re
import time
from collections.abc import Iterator
from pathlib import Path

import click

from .options import debug_option

#: Files of the cache: modules named by spec and by what decides their code.
_MODULE = re.compile(r"[0-9a-f]{16}-[0-9a-f]{24}\.so")


@dataclasses.dataclass(frozen=True)
class Entry:
    """A module in the cache; `state` says whether this version uses it."""

    path: Path
    spec: str
    state: str


@click.group(short_help="List and clear what was compiled on first use.")
def cache() -> None:
    """Look after the modules that the Python API has compiled on first use.

    They are in the user's cache folder, or in QKNORM_TVM_CACHE_DIR. What is deleted is compiled
    again when it is needed.

    \b
    Examples:
      qknorm-tvm cache list
      qknorm-tvm cache clear --old
      qknorm-tvm cache clear
    """


@cache.command("list", short_help="Say what there is.")
@debug_option
def list_cache() -> int:
    """Say what the cache holds, a line for each module.

    In use: calls of this version on this machine load it. Old: of another version of qknorm-tvm,
    TVM or tvm-ffi, or of other tuned records.
    """
    from ..call.cache import cache_location
    from .output import console, plural, size, table

    printer = console()
    modules = table("spec", "size", "written", "state", left=(0, 2, 3))
    total = count = 0
    for entry in _entries(cache_location()):
        status = entry.path.stat()
        count, total = count + 1, total + status.st_size
        modules.add_row(
            entry.spec,
            size(status.st_size),
            time.strftime("%Y-%m-%d", time.localtime(status.st_mtime)),
            entry.state,
        )
    if count:
        printer.print(modules)
    held = f"{plural(count, 'module')}, {size(total)}"
    printer.print(f"{held} in {cache_location()}", soft_wrap=True)
    return 0


@cache.command("clear", short_help="Delete modules.")
@click.option("--old", is_flag=True, help="Only what this version does not use.")
@debug_option
def clear_cache(old: bool) -> int:
    """Delete the modules that the cache holds; other files in its folder stay.

    Processes that have loaded one keep it.
    """
    from ..call.cache import cache_directory, cache_location
    from .output import console, plural, size

    folder = cache_location()
    count = freed = 0
    if folder.is_dir():
        cache_directory()  # refuses a folder that is somebody else's
        for entry in list(_entries(folder)):
            if old and entry.state not in ("old", "damaged"):
                continue
            freed += entry.path.stat().st_size
            count += 1
            _delete(entry.path)
    console().print(
        f"deleted {plural(count, 'module')}, {size(freed)}, in {folder}", soft_wrap=True
    )
    return 0


def _delete(path: Path) -> None:
    import filelock

    path.unlink(missing_ok=True)
    lock = path.with_suffix(".lock")
    # A lock that is held stays: its holder is about to write the module anew.
    if lock.exists():
        with (
            contextlib.suppress(filelock.Timeout, OSError),
            filelock.FileLock(lock, mode=0o600, timeout=0),
        ):
            lock.unlink(missing_ok=True)


def _entries(folder: Path) -> Iterator[Entry]:
    """Yield the modules in a cache folder, and those of ``qknorm-tvm run``."""
    from ..call.cache import cache_key
    from ..errors import BuildError, ModuleFileError
    from ..load.module_file import read_metadata
    from ..spec import KernelSpec

    modules = [path for path in sorted(folder.glob("*.so")) if _MODULE.fullmatch(path.name)]
    for path in [*modules, *sorted((folder / "run").glob("*.so"))]:
        try:
            (fields,) = read_metadata(path)["specs"]
            spec = KernelSpec(**fields)
        except (ModuleFileError, OSError, KeyError, TypeError, ValueError):
            yield Entry(path, path.name, "damaged" if path.parent == folder else "from run")
            continue
        state = "old"
        if path.parent != folder:
            state = "from run"
        else:
            # Without TVM none is used: nobody could tell which version would have built it.
            with contextlib.suppress(BuildError):
                state = "in use" if path.name == cache_key(spec) else "old"
        yield Entry(path, spec.text, state)
