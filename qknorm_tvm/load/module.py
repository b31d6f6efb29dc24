"""Loading and calling exported modules. Needs ``apache-tvm-ffi``, never the compiler."""

from __future__ import annotations

import contextlib
import hashlib
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ..errors import ModuleFileError
from ..operations import OPERATIONS
from ..spec import KernelSpec
from ..targets import MACHINES, host_machine
from .module_file import ModuleFile, read_module
from .temporary import memory_file, temporary_folder
from .threads import reach_pool


class Module:
    """A loaded module.

    Its entry points are those of the operations that it holds. They go through tvm-ffi, and take
    torch tensors and whatever else offers DLPack. Asking for another is an ``AttributeError``.

    Attributes
    ----------
    apply_qk_rms_norm : callable
        ``apply_qk_rms_norm(q_out, k_out, gamma_q, gamma_k, qk_var, q, k, epsilon)``.
    row_mean_of_squares_qk : callable
        ``row_mean_of_squares_qk(qk_var, q, k)``.
    qk_rms_norm : callable
        ``qk_rms_norm(q_out, k_out, gamma_q, gamma_k, q, k, epsilon)``.
    metadata : dict
        What the file says about itself.
    path : pathlib.Path
        The file.
    """

    def __init__(self, path: Path, metadata: dict[str, Any], library: Any):
        self.path = path
        self.metadata = metadata
        self.library = library
        for op in {spec.op for spec in self.specs}:
            setattr(self, op, library.get_function(op))
        if self.specs[0].parsed_target.kind == "cpu":
            reach_pool(library)

    def __getattr__(self, name: str) -> Any:
        if name in OPERATIONS:
            held = ", ".join(sorted({spec.op for spec in self.specs}))
            raise AttributeError(
                f"{self.path} holds {held}, not {name}: export a module for it with --op {name}"
            )
        raise AttributeError(f"'Module' object has no attribute {name!r}")

    @property
    def specs(self) -> list[KernelSpec]:
        """The specs that the module holds."""
        return [KernelSpec(**fields) for fields in self.metadata["specs"]]

    @property
    def active_level(self) -> str:
        """The CPU level chosen for this machine, such as ``"x86-64-v4"``.

        ``"cuda"`` on CUDA.
        """
        return str(self.library.get_function("qknorm_active_level")())

    def __repr__(self) -> str:
        return f"Module({str(self.path)!r}, {', '.join(spec.text for spec in self.specs)})"


def load(path: str | os.PathLike[str]) -> Module:
    """Load an exported module.

    The file is read and checked before any of its code runs, and what was read is what is loaded:
    the file may be exported again, written over or removed while the module is in use, and a path
    that has been loaded before is loaded as it is now. Load only files that you trust: a ``.so`` is
    a program.

    Parameters
    ----------
    path : path-like
        A ``.so`` written by `CompiledModule.export` or ``qknorm-tvm export``.

    Returns
    -------
    Module

    Raises
    ------
    FileNotFoundError
        There is no such file.
    ModuleFileError
        The file is no module, damaged, of a newer format, or for another kind of machine.
    """
    return load_file(read_module(Path(path).absolute()))


def load_file(file: ModuleFile) -> Module:
    """Load a file that has been read and checked; see `load`."""
    path, metadata = file.path, file.metadata
    _check_specs(path, metadata)
    machine, here = file.machine, host_machine()
    if machine != here:
        raise ModuleFileError(
            f"{path} is for {MACHINES.get(machine, machine)} machines, and this one is "
            f"{MACHINES.get(here, here)}: export it for this one, or load it there"
        )
    if path.suffix != ".so":
        raise ModuleFileError(f"{path} must be named *.so to be loaded: rename it")
    module = Module(path, metadata, _library(path, file.content))
    if not module.active_level:
        needed = metadata["levels"][-1]
        raise ModuleFileError(
            f"{path} holds code for {needed['name']} ({', '.join(needed['features'])}), which this "
            "CPU cannot run; export it with --target cpu, which holds code for every x86-64 level"
        )
    return module


#: Libraries by path and content: a path that is exported again is another library.
_libraries: dict[tuple[Path, bytes], Any] = {}


def _library(path: Path, content: bytes) -> Any:
    """Load a file's content as a library, even where its path has been replaced meanwhile.

    The system's loader knows libraries by path and never unloads a module (`build.native.link`).
    Given `path`, it would return what it loaded from there before, or load what was put there after
    the check. So a copy of the checked content is loaded, in memory where the system allows it.
    """
    key = path, hashlib.sha256(content).digest()
    library = _libraries.get(key)
    if library is None:
        import tvm_ffi

        try:
            with _copy(content) as name:
                library = tvm_ffi.load_module(str(name))
        except Exception as error:
            raise ModuleFileError(f"{path} cannot be loaded on this machine: {error}") from error
        library = _libraries.setdefault(key, library)
    return library


@contextmanager
def _copy(content: bytes) -> Iterator[Path]:
    """Make a temporary copy of a file's content, under a name that is new to the loader.

    The name is never used again: a debugger or a traceback from C++ that looks for the library's
    symbols there finds no file, rather than another one.
    """
    with contextlib.ExitStack() as stack:
        try:
            handle, memory = stack.enter_context(memory_file("module.so"))
        except OSError:
            folder = stack.enter_context(temporary_folder(len(content), executable=True))
            name = Path(folder, "module.so")
            name.write_bytes(content)
        else:
            with open(handle, "wb", closefd=False) as file:
                file.write(content)
            name = Path(stack.enter_context(temporary_folder()), "module.so")
            name.symlink_to(memory)
        yield name


def _check_specs(path: Path, metadata: dict[str, Any]) -> None:
    """Refuse metadata that is not of this version's modules, whatever its checksum says."""
    try:
        specs = [KernelSpec(**fields) for fields in metadata["specs"]]
        if not specs or not metadata["levels"][-1]["name"]:
            raise ValueError("it holds no code")
        if metadata["ops"] != sorted({spec.op for spec in specs}):
            raise ValueError(f"its operations {metadata['ops']} are not those of its specs")
    except (KeyError, IndexError, TypeError, ValueError) as error:
        raise ModuleFileError(
            f"{path} holds what this qknorm-tvm does not know ({error}): export it again"
        ) from None
