"""Module packs: folders of exported modules from which the API takes code before it compiles.

In: the folders and files that ``QKNORM_TVM_MODULES`` names, separated as in PATH, and after them
the packs that installed packages announce in the entry point group `ENTRY_POINTS`. Out: a loaded
module for a spec, or None. Nothing is written, and nothing but the chosen module is loaded.

A folder of ``qknorm-tvm pack`` has an index, so that one small file is read to know them all.
Without an index every ``*.so`` in the folder is read, none of it run.

What cannot serve here (of another version or format, for another CPU or GPU, damaged, or open to
others) is refused with one warning for each pack and reason, and the next source is tried.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import importlib.metadata
import importlib.util
import json
import os
import stat
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from .._version import __version__
from ..errors import ModuleFileError, warn_caller
from ..load.module import Module, load
from ..load.module_file import FORMAT, read_metadata
from ..spec import KernelSpec
from ..targets import runs_on_gpu

#: Folders of modules, and single modules, separated as in PATH.
ENVIRONMENT = "QKNORM_TVM_MODULES"
#: Entry points of installed packs: each names a package whose folder is a pack.
ENTRY_POINTS = "qknorm_tvm.modules"
INDEX = "index.json"
INDEX_FORMAT = 1


@dataclasses.dataclass(frozen=True)
class PackedModule:
    """One module of a pack, as its index describes it.

    Parameters
    ----------
    path : Path
        The file.
    specs : tuple of KernelSpec
        What it holds.
    sha256 : str
        Of the whole file; ``""`` where there is no index.
    """

    path: Path
    specs: tuple[KernelSpec, ...]
    sha256: str = ""


def index_of(files: Mapping[str, Path], layers: list[dict[str, Any]]) -> dict[str, Any]:
    """Return the index of a pack, JSON-ready.

    Parameters
    ----------
    files : mapping
        Modules by file name.
    layers : list of dict
        The layers that they are for, for people to read.
    """
    modules = []
    for name, path in sorted(files.items()):
        content = path.read_bytes()
        modules.append(
            {
                "file": name,
                "specs": [KernelSpec(**fields).text for fields in read_metadata(path)["specs"]],
                "sha256": hashlib.sha256(content).hexdigest(),
                "bytes": len(content),
            }
        )
    return {
        "format": INDEX_FORMAT,
        "module_format": FORMAT,
        "qknorm-tvm": __version__,
        "layers": layers,
        "modules": modules,
    }


def read_index(folder: Path) -> tuple[PackedModule, ...]:
    """Return the modules of a pack's index.

    Raises
    ------
    ModuleFileError
        The index is damaged, or of another version or format.
    """
    path = folder / INDEX
    damaged = f"{path} is damaged: build the pack again"
    try:
        index = json.loads(path.read_text())
        version, formats = index["qknorm-tvm"], (index["format"], index["module_format"])
    except (ValueError, KeyError, TypeError, RecursionError):
        raise ModuleFileError(damaged) from None
    if formats != (INDEX_FORMAT, FORMAT) or version != __version__:
        raise ModuleFileError(
            f"{folder} is a pack of qknorm-tvm {version} (formats {formats[0]}, {formats[1]}), and "
            f"this is {__version__} (formats {INDEX_FORMAT}, {FORMAT}): build it again"
        )
    try:
        modules = tuple(
            PackedModule(
                folder / entry["file"],
                tuple(KernelSpec.from_text(text) for text in entry["specs"]),
                str(entry["sha256"]),
            )
            for entry in index["modules"]
        )
    except (ValueError, KeyError, TypeError):
        raise ModuleFileError(damaged) from None
    for module in modules:
        if module.path.parent != folder or not module.specs:
            raise ModuleFileError(damaged)
    return modules


def check_trusted(path: Path) -> None:
    """Refuse a file or folder that somebody may change who may not change this package.

    Raises
    ------
    ModuleFileError
        It belongs to neither this user, root nor the owner of this package's files, or others may
        write to it.
    """
    ours, status = _package_status(), path.stat()
    if status.st_uid not in (os.getuid(), 0, ours.st_uid):
        raise ModuleFileError(
            f"{path} belongs to another user (uid {status.st_uid}) and will not be loaded from"
        )
    # Where a shared group may write to the installation, it may to an installed pack.
    if status.st_mode & ~ours.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        raise ModuleFileError(
            f"others may write to {path}, so it will not be loaded from; run `chmod go-w {path}`"
        )


@functools.lru_cache(maxsize=1)
def _package_status() -> os.stat_result:
    return Path(__file__).parent.stat()


# ---- finding ----------------------------------------------------------------------------------


def serves(held: KernelSpec, spec: KernelSpec) -> bool:
    """Whether code for one spec serves calls of another.

    Its columns may be open, and of its target only the kind of device counts, as what is loaded
    runs on this machine. Every other field decides the bits of a result, and must be equal.
    """
    # Most of a pack is for other columns: seen without making a spec of each.
    if held.op != spec.op or not (
        held.q_cols in (None, spec.q_cols) and held.k_cols in (None, spec.k_cols)
    ):
        return False
    same_kind = held.parsed_target.kind == spec.parsed_target.kind
    columns = {"q_cols": spec.q_cols, "k_cols": spec.k_cols}
    return same_kind and held.replace(target=spec.target, **columns) == spec


def module_for(spec: KernelSpec) -> Module | None:
    """Return a module that serves a spec, from the first pack that has one which runs here."""
    gpus = spec.parsed_target.variants if spec.parsed_target.kind == "cuda" else ()
    return _find(lambda held: serves(held, spec), gpus[0] if len(gpus) == 1 else None)


def sources_text() -> str:
    """Say where modules were looked for."""
    given = os.environ.get(ENVIRONMENT)
    looked = [str(path) for path in _installed()]
    return f"{ENVIRONMENT} is {f'{given!r}' if given else 'not set'}, " + (
        f"installed packs: {', '.join(looked)}" if looked else "no pack is installed"
    )


def _find(matches: Callable[[KernelSpec], bool], gpu: str | None) -> Module | None:
    for pack in _sources():
        candidates = []
        for module in _modules(pack):
            held = [spec for spec in module.specs if matches(spec)]
            if held:
                # Fixed columns have the faster code, machine code for this GPU starts at once.
                is_open = min((spec.q_cols is None) + (spec.k_cols is None) for spec in held)
                other_gpu = gpu is not None and gpu not in held[0].parsed_target.variants
                candidates.append((is_open, other_gpu, module))
        refusals = []
        for _, _, module in sorted(candidates, key=lambda candidate: candidate[:2]):
            try:
                return _load(module, gpu)
            except (ModuleFileError, OSError) as error:
                refusals.append((error, module.path))
        for refusal, path in refusals:
            _refuse(pack, refusal, path)
    return None


def _sources() -> Iterator[Path]:
    """Yield packs in the order in which they are tried; installed ones are looked up last."""
    for text in os.environ.get(ENVIRONMENT, "").split(os.pathsep):
        if text:
            yield Path(text).absolute()
    yield from _installed()


@functools.lru_cache(maxsize=1)
def _installed() -> tuple[Path, ...]:
    """Return the folders of the packs that installed packages announce, without importing them."""
    folders = []
    for entry in sorted(
        importlib.metadata.entry_points(group=ENTRY_POINTS), key=lambda entry: entry.name
    ):
        try:
            package = importlib.util.find_spec(entry.module)
        except (ImportError, ValueError):
            package = None
        if package is None or not package.submodule_search_locations:
            warn_caller(f"a pack of modules is not used: there is no package {entry.module}")
            continue
        folders += [Path(place) for place in package.submodule_search_locations]
    return tuple(folders)


@functools.lru_cache(maxsize=64)
def _modules(pack: Path) -> tuple[PackedModule, ...]:
    """Return a pack's modules; none, with a warning, where it cannot be used."""
    try:
        check_trusted(pack)
        if not pack.is_dir():
            return _without_index(pack, [pack])
        if not (pack / INDEX).exists():
            return _without_index(pack, sorted(pack.glob("*.so")))
        check_trusted(pack / INDEX)
        return read_index(pack)
    except (ModuleFileError, OSError) as error:
        _refuse(pack, error)
        return ()


def _without_index(pack: Path, files: list[Path]) -> tuple[PackedModule, ...]:
    modules = []
    for path in files:
        try:
            metadata = read_metadata(path)
            built_by = metadata["versions"]["qknorm-tvm"]
            if built_by != __version__:
                raise ModuleFileError(
                    f"{path} was built by qknorm-tvm {built_by}, and this is {__version__}: "
                    "export it again, or give it to qknorm_tvm.use"
                )
            specs = tuple(KernelSpec(**fields) for fields in metadata["specs"])
        except (KeyError, TypeError, ValueError):
            _refuse(pack, ModuleFileError(f"{path} holds what this qknorm-tvm does not know"), path)
        except (ModuleFileError, OSError) as error:
            _refuse(pack, error, path)
        else:
            modules.append(PackedModule(path, specs))
    return tuple(modules)


def _load(module: PackedModule, gpu: str | None) -> Module:
    """Load a module of a pack, or say why not."""
    path = module.path
    check_trusted(path)
    if module.sha256 and hashlib.sha256(path.read_bytes()).hexdigest() != module.sha256:
        raise ModuleFileError(f"{path} is not the file that the pack's index describes")
    if gpu is not None:
        held = read_metadata(path)["architectures"]
        if not any(runs_on_gpu(arch, gpu) for arch in held):
            raise ModuleFileError(f"{path} holds code for {', '.join(held)}, and the GPU is {gpu}")
    loaded = load(path)
    if set(loaded.specs) != set(module.specs):
        raise ModuleFileError(f"{path} does not hold the specs that the pack's index names")
    return loaded


_refused: set[tuple[Path, str]] = set()


def _refuse(pack: Path, error: Exception, path: Path | None = None) -> None:
    """Warn that a pack, or one of its modules, is not used: once for each pack and reason."""
    text = str(error)
    reason = text if path is None else text.replace(str(path), "")
    if (pack, reason) not in _refused:
        _refused.add((pack, reason))
        warn_caller(f"a pack of modules is not used: {text}")
