"""Compile a spec, or several, to a module that can be called and exported."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import os
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from .._version import __version__
from ..errors import BuildError
from ..load.module import Module, load
from ..load.module_file import FORMAT
from ..load.temporary import temporary_folder
from ..operations import OPERATIONS
from ..spec import KernelSpec

#: Bytes that must be free in the folder where a module is built. One spec takes 0.2 MB for CPUs,
#: and 35 MB for every architecture of CUDA.
_SPACE = {"cpu": 4 << 20, "cuda": 64 << 20}

Config = Any  # schedules.cpu_config.CpuConfig or schedules.cuda_config.CudaConfig


class CompiledModule:
    """A compiled module: call it, or export it.

    The file is in a temporary folder, which is removed with this object, or at the end of a
    ``with`` block. Modules that are loaded by then go on working.

    Attributes
    ----------
    path : pathlib.Path
        The module's file in the temporary folder.
    metadata : dict
        What the file says about itself.
    """

    def __init__(self, path: Path, directory: tempfile.TemporaryDirectory[str]):
        self.path = path
        self._directory = directory
        self._module: Module | None = None

    def __enter__(self) -> CompiledModule:
        return self

    def __exit__(self, *_: object) -> None:
        self._directory.cleanup()

    @property
    def module(self) -> Module:
        """The module, loaded on first use."""
        if self._module is None:
            self._module = load(self.path)
        return self._module

    @property
    def metadata(self) -> dict[str, Any]:
        """What the file says about itself."""
        from ..load.module_file import read_metadata

        return read_metadata(self.path)

    def __getattr__(self, name: str) -> Any:
        """Return the entry point of an operation that the module holds, see `Module`."""
        if name not in OPERATIONS:
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")
        return getattr(self.module, name)

    def export(self, path: str | os.PathLike[str]) -> Path:
        """Write the module to a file, atomically.

        Parameters
        ----------
        path : path-like
            The ``.so`` to write; its folder must exist.

        Returns
        -------
        pathlib.Path
            The file written.
        """
        return place(self.path, Path(path))


def place(source: Path, target: Path) -> Path:
    """Copy a file to its place so that nobody sees it half written."""
    handle, name = tempfile.mkstemp(prefix=f".{target.name}.", dir=target.parent)
    os.close(handle)
    try:
        shutil.copyfile(source, name)
        os.chmod(name, 0o755)
        os.replace(name, target)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise
    return target


def versions() -> dict[str, str]:
    """Versions of what decides the code.

    Raises
    ------
    BuildError
        TVM is not installed, so that nothing can be compiled.
    """
    try:
        tvm = importlib.metadata.version("apache-tvm")
    except importlib.metadata.PackageNotFoundError:
        raise BuildError(
            "compiling needs TVM, which is not installed: pip install 'qknorm-tvm[compile]'"
        ) from None
    return {
        "qknorm-tvm": __version__,
        "apache-tvm": tvm,
        "apache-tvm-ffi": importlib.metadata.version("apache-tvm-ffi"),
    }


def compile(
    spec: KernelSpec | Sequence[KernelSpec],
    *,
    config: Config | Mapping[str, Any] | Mapping[KernelSpec, Config] | None = None,
) -> CompiledModule:
    """Compile one spec, or several of one target into one module.

    Parameters
    ----------
    spec : KernelSpec or sequence of KernelSpec
        What to compile. Several specs must share the target; a module has an entry point for each
        of their operations, which picks a spec by the dtypes and columns of the call; fixed columns
        before open ones, whatever the order here.
    config : CpuConfig, CudaConfig, or mapping, optional
        Choices of the schedule; by default a heuristic's, or tuned records'. A mapping from names
        of fields to values changes those of the heuristic's; one from specs to configs is for
        some of the specs.

    Returns
    -------
    CompiledModule

    Raises
    ------
    TypeError, ValueError
        An argument is wrong; the message names it.
    BuildError
        A compiler is missing or refused; the message says what to do.
    """
    specs = [spec] if isinstance(spec, KernelSpec) else list(spec)
    for item in specs:
        if not isinstance(item, KernelSpec):
            raise TypeError(f"spec must be a KernelSpec, got {type(item).__name__}")
    if not specs:
        raise ValueError("spec must name at least one KernelSpec, got none")
    if len({spec.target for spec in specs}) > 1:
        raise ValueError(
            "specs of one module must share a target, got "
            + ", ".join(sorted({spec.target for spec in specs}))
        )
    if len(set(specs)) < len(specs):
        raise ValueError("spec must not name the same KernelSpec twice")
    # The entry point takes the first that fits a call: fixed columns have the faster code.
    specs.sort(key=lambda spec: (spec.q_cols is None) + (spec.k_cols is None))
    kind = specs[0].parsed_target.kind
    given: Any = config
    if isinstance(given, Mapping) and any(isinstance(name, str) for name in given):
        configs = _changes(specs, kind, given)
    else:
        configs = [given.get(spec) if isinstance(given, Mapping) else given for spec in specs]
        _check_configs(kind, configs)
    metadata = {
        "format": FORMAT,
        "ops": sorted({spec.op for spec in specs}),
        "target": specs[0].target,
        "specs": [spec.to_dict() for spec in specs],
        "versions": versions(),
        "requires": {"apache-tvm-ffi": ">=0.1.11", "system": "Linux, glibc"},
    }
    from ..build.tuned import log_folders

    log_folders()  # warns of one that is none, also where the target or a config needs no records
    if kind == "cuda":
        from ..build.cuda import build
    else:
        from ..build.cpu import build  # type: ignore[assignment]
    directory: tempfile.TemporaryDirectory[str] | None = None
    try:
        directory = temporary_folder(_SPACE[kind])
        return CompiledModule(build(specs, configs, metadata, Path(directory.name)), directory)
    except BaseException as error:
        if directory is not None:
            directory.cleanup()
        if isinstance(error, OSError):
            raise BuildError(
                f"a module cannot be built: {error}; set TMPDIR to a folder with space"
            ) from error
        raise
    finally:
        # TVM's script keeps this frame until the next garbage collection.
        del directory


def _config_type(kind: str) -> type[Config]:
    """Return the config's class for a kind of target."""
    if kind == "cuda":
        from ..schedules.cuda_config import CudaConfig

        return CudaConfig
    from ..schedules.cpu_config import CpuConfig

    return CpuConfig


def _changes(specs: Sequence[KernelSpec], kind: str, changes: Mapping[Any, Any]) -> list[Config]:
    """Return for each spec the given fields that make a difference to it."""
    if kind == "cuda":
        from ..schedules.cuda_variants import fields_used
    else:
        from ..schedules.cpu_config import fields_used
    config_type = _config_type(kind)
    names = [field.name for field in dataclasses.fields(config_type)]
    for name in changes:
        if name not in names:
            raise ValueError(
                f"config must have fields of {config_type.__name__}, {', '.join(names)}, got "
                f"{name!r}"
            )
        if not any(name in fields_used(spec) for spec in specs):
            raise ValueError(
                f"config must not have {name} for {' and '.join(spec.text for spec in specs)}, "
                f"whose code does not depend on it, got {changes[name]!r}"
            )
    config_type(**changes)  # its ranges, before time is spent
    return [
        {name: value for name, value in changes.items() if name in fields_used(spec)} or None
        for spec in specs
    ]


def _check_configs(kind: str, configs: Sequence[Config]) -> None:
    config_type = _config_type(kind)
    for config in configs:
        if config is not None and not isinstance(config, config_type):
            raise TypeError(
                f"config must be a {config_type.__name__} for a {kind} target, got "
                f"{type(config).__name__}"
            )
