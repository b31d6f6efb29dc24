"""From object files to an exported module: tables for the entry point, the C compiler, the link."""

from __future__ import annotations

import dataclasses
import functools
import json
import os
import re
import shutil
import subprocess
from collections.abc import Sequence
from importlib import resources
from pathlib import Path
from typing import Any

from ..dtypes import ELEMENT_TYPES
from ..errors import BuildError
from ..load.module_file import seal
from ..operations import OPERATIONS, TENSORS, TensorArgument
from ..peers import MAX_RANKS, TURNS
from ..spec import MAX_COLS, OPS, KernelSpec
from ..targets import MACHINES, X86_FEATURES, host_machine

#: For machines other than this one: the GNU cross compiler's name and Debian's packages of it.
_CROSS = {
    "aarch64": ("aarch64-linux-gnu-gcc", "gcc-aarch64-linux-gnu libc6-dev-arm64-cross"),
    "x86_64": ("x86_64-linux-gnu-gcc", "gcc-x86-64-linux-gnu libc6-dev-amd64-cross"),
}


@dataclasses.dataclass(frozen=True)
class Variant:
    """One scheduled function in a module, and when the entry point may call it.

    Parameters
    ----------
    name : str
        What it is for, such as ``"tile"``.
    symbol : str
        Its global symbol, unique in the module.
    min_rows, row_tile, stride_unit, alignment, min_out_bytes : int
        The conditions, see ``module.h``.
    bytes_per_task : int
        Bytes read and written that one thread gets at least; CPUs only.
    packs_gammas : bool
        Whether its tasks pack the gammas first, see `lower.cpu_packing`; CPUs only.
    waits_for_ranks : bool
        Whether it comes with a function that says how many of its blocks a GPU holds.
    """

    name: str
    symbol: str
    min_rows: int = 1
    row_tile: int = 1
    stride_unit: int = 1
    alignment: int = 1
    min_out_bytes: int = 0
    bytes_per_task: int = 1
    packs_gammas: bool = False
    waits_for_ranks: bool = False

    @property
    def resident_blocks(self) -> str:
        """The symbol of the function that says how many of its blocks a GPU holds at once."""
        return f"qkn_resident_{self.symbol}" if self.waits_for_ranks else "NULL"


@dataclasses.dataclass(frozen=True)
class Level:
    """Code for one CPU level, or for CUDA: per spec its variants, first choice first."""

    name: str
    features: tuple[str, ...]
    variants: tuple[tuple[Variant, ...], ...]


def _c_string(text: str) -> str:
    escaped = text.replace("\\", "\\\\").replace('"', '\\"')
    return '"' + escaped + '"'


def _argument(tensor: TensorArgument) -> str:
    """Return one `qkn_argument`, as an initializer in C."""
    shape = ", ".join(
        f"QKN_{extent.upper()}" if isinstance(extent, str) else str(extent)
        for extent in tensor.shape
    )
    dtype = f"QKN_{tensor.dtype.upper()}, {{0}}"  # the spec's
    if tensor.dtype in ELEMENT_TYPES:
        dtype = f"QKN_OWN_DTYPE, {ELEMENT_TYPES[tensor.dtype].c_dlpack}"
    in_place_of = tensor.in_place_of.upper() if tensor.in_place_of else "-1"
    return (
        f"{{{tensor.name.upper()}, {len(tensor.shape)}, {{{shape}}}, {dtype}, "
        f"{int(tensor.is_output)}, {int(tensor.given_if is not None)}, {in_place_of}, "
        f"{int(tensor.is_stream)}, {len(tensor.stride_names)}}}"
    )


def _spec(spec: KernelSpec, index: int) -> str:
    """Return one `qkn_spec`, as an initializer in C."""
    types = (spec.in_dtype, spec.out_dtype, spec.rotary_dtype, spec.cache_dtype)
    dtypes = ", ".join(ELEMENT_TYPES[name].c_dlpack if name else "{0}" for name in types)
    cols = ", ".join(str(-1 if cols is None else cols) for cols in (spec.q_cols, spec.k_cols))
    heads = (spec.kv_heads if spec.head_dim else 0, spec.head_dim or 0, spec.rotary_dim)
    names = {tensor.name for tensor in spec.tensors}
    given = sum(1 << i for i, name in enumerate(spec.operation.tensors) if name in names)
    given |= spec.has_peers << len(spec.operation.tensors)
    return (
        f"{{{_c_string(spec.text)}, {OPS.index(spec.op)}, {dtypes}, {cols}, "
        f"{', '.join(map(str, heads))}, {given:#x}u, code_{index}}}"
    )


@dataclasses.dataclass(frozen=True)
class Tables:
    """What the entry point knows of a module, in C.

    Parameters
    ----------
    operations : str
        ``operations.h``: how the module's operations are called. The same for all modules of the
        same operations, and so is ``entry.c`` compiled against it.
    module : str
        ``tables.c``: the specs, levels and variants of one module, and its metadata.
    """

    operations: str
    module: str


def _operation_tables(held: Sequence[str], *, cuda: bool) -> str:
    """Write ``operations.h``; `held` are the operations of the module."""
    lines = [
        "#include <stddef.h>",
        '#include "module.h"',
        f"#define QKN_CUDA {int(cuda)}",
        f"#define QKN_MAX_COLS {MAX_COLS}",
        f"#define QKN_MAX_RANKS {MAX_RANKS}",
        f"#define QKN_PEER_TURNS {TURNS}",
        f"enum {{ {', '.join(name.upper() for name in TENSORS)}, NUM_TENSORS }};",
        "static const char* const qkn_names[] = {"
        + ", ".join(_c_string(name) for name in TENSORS)
        + "};",
    ]
    scalars = dict.fromkeys(s.name for op in OPERATIONS.values() for s in op.peer_scalars)
    lines.append(f"enum {{ {', '.join(name.upper() for name in scalars)}, QKN_MAX_SCALARS }};")
    rows = []
    for op, operation in OPERATIONS.items():
        arguments = ", ".join(_argument(tensor) for tensor in operation.arguments)
        checked = ", ".join(str(operation.tensors.index(t.name)) for t in operation.checked)
        lines.append(f"static const qkn_argument arguments_{op}[] = {{{arguments}}};")
        lines.append(f"static const int checked_{op}[] = {{{checked}}};")
        peers = "0, 0, NULL, NULL"
        if operation.peer_tensors:
            tensors = ", ".join(_argument(tensor) for tensor in operation.peer_tensors)
            numbers = ", ".join(
                f"{{{_c_string(scalar.name)}, {int(scalar.dtype == 'int64')}}}"
                for scalar in operation.peer_scalars
            )
            lines.append(f"static const qkn_argument peer_tensors_{op}[] = {{{tensors}}};")
            lines.append(f"static const qkn_scalar peer_scalars_{op}[] = {{{numbers}}};")
            counts = f"{len(operation.peer_tensors)}, {len(operation.peer_scalars)}"
            peers = f"{counts}, peer_tensors_{op}, peer_scalars_{op}"
        rows.append(
            f"{{{_c_string(op)}, {_c_string(operation.summary)}, {len(operation.outputs)}, "
            f"{len(operation.tensors)}, {int(operation.has_epsilon)}, "
            f"arguments_{op}, checked_{op}, {peers}}}"
        )
    lines.append(f"static const qkn_operation qkn_operations[] = {{{', '.join(rows)}}};")
    entries = " ".join(f"X({op}, {OPS.index(op)})" for op in held)
    lines.append(f"#define QKN_ENTRY_POINTS(X) {entries}")
    return "\n".join(lines) + "\n"


def tables(
    specs: Sequence[KernelSpec], levels: Sequence[Level], metadata: dict[str, Any], *, cuda: bool
) -> Tables:
    """Write what ``entry.c`` needs to know about one module."""
    held = [op for op in OPS if any(spec.op == op for spec in specs)]
    lines = [
        "#include <stddef.h>",
        '#include "module.h"',
        f"#define METADATA {_c_string(json.dumps(metadata, sort_keys=True))}",
        # What module_file.py reads without loading the file. The digest is filled in after linking.
        "static const struct {",
        "  char magic[16]; unsigned char digest[32]; char json[sizeof METADATA];",
        '} info __attribute__((section(".qknorm"), used, aligned(16))) =',
        '    {"QKNORM-TVM MODUL", {0}, METADATA};',
        "const char* const qkn_metadata = info.json;",
    ]
    for li, level in enumerate(levels):
        features = [X86_FEATURES[name] for name in level.features]
        if features:
            rows = ", ".join(
                f"{{{_c_string(name)}, {bit.leaf:#x}u, {bit.register}u, {bit.bit}u, "
                f"{bit.state:#x}u, {bit.subleaf}u}}"
                for name, bit in zip(level.features, features, strict=True)
            )
            lines.append(f"static const qkn_feature features_{li}[] = {{{rows}}};")
        for si, variants in enumerate(level.variants):
            for v in variants:
                lines.append(
                    f"int __tvm_ffi_{v.symbol}(void*, const TVMFFIAny*, int32_t, TVMFFIAny*);"
                )
                if v.waits_for_ranks:
                    lines.append(f"int64_t {v.resident_blocks}(int);")
            rows = ", ".join(
                f"{{{_c_string(v.name)}, __tvm_ffi_{v.symbol}, {v.min_rows}, {v.row_tile}, "
                f"{v.stride_unit}, {v.alignment}, {v.min_out_bytes}, {v.bytes_per_task}, "
                f"{v.resident_blocks}}}"
                for v in variants
            )
            lines.append(f"static const qkn_variant variants_{li}_{si}[] = {{{rows}}};")
    lines.append(f"const int qkn_num_levels = {len(levels)};")
    rows = ", ".join(
        f"{{{_c_string(level.name)}, {f'features_{li}' if level.features else 'NULL'}, "
        f"{len(level.features)}}}"
        for li, level in enumerate(levels)
    )
    lines.append(f"const qkn_level qkn_levels[] = {{{rows}}};")
    for si in range(len(specs)):
        rows = ", ".join(
            f"{{variants_{li}_{si}, {len(level.variants[si])}}}" for li, level in enumerate(levels)
        )
        lines.append(f"static const qkn_code code_{si}[] = {{{rows}}};")
    lines.append(f"const int qkn_num_specs = {len(specs)};")
    rows = ", ".join(_spec(spec, index) for index, spec in enumerate(specs))
    lines.append(f"const qkn_spec qkn_specs[] = {{{rows}}};")
    return Tables(_operation_tables(held, cuda=cuda), "\n".join(lines) + "\n")


@functools.lru_cache(maxsize=8)
def find_c_compiler(given: str | None = None) -> str:
    """Return the C compiler: ``$CC``, gcc, cc or clang.

    Raises
    ------
    BuildError
        There is none.
    """
    candidates = [given] if given else ["gcc", "cc", "clang"]
    for name in candidates:
        path = shutil.which(name)
        if path:
            return path
    missing = f"$CC names {given!r}, which is" if given else "gcc, cc and clang are"
    raise BuildError(
        f"a C compiler is needed to link a module, but {missing} not on the PATH: install one, "
        "such as with `apt-get install gcc libc6-dev`"
    )


def c_compiler(machine: str) -> str:
    """Return the C compiler for a machine of `targets.MACHINES`.

    This machine's own is `find_c_compiler`'s. For another it is a cross compiler: the program that
    ``$QKNORM_TVM_AARCH64_CC`` (or ``…_X86_64_CC``) names, otherwise the GNU one.

    Raises
    ------
    BuildError
        There is none.
    """
    if machine == host_machine():
        return find_c_compiler(os.environ.get("CC"))
    variable = f"QKNORM_TVM_{machine.upper()}_CC"
    name, packages = _CROSS[machine]
    given = os.environ.get(variable)
    path = shutil.which(given or name)
    if path:
        return path
    missing = f"${variable} names {given!r}, which" if given else name
    here = MACHINES.get(host_machine(), host_machine())
    own = "aarch64" if host_machine() == "aarch64" else "cpu"
    raise BuildError(
        f"a C cross compiler is needed to link a module for {MACHINES[machine]} machines on this "
        f"one ({here}), but {missing} is not on the PATH: install one, such as with "
        f"`apt-get install {packages}`, or compile for this machine, target {own!r}"
    )


def run_compiler(command: Sequence[str], doing: str, folder: Path) -> None:
    """Run a compiler; a failure is a `BuildError` with the first lines that it printed.

    Its own temporary files are in `folder`, which was chosen for its space, and go with it.
    """
    environment = {**os.environ, "LC_ALL": "C", "TMPDIR": str(folder)}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    if done.returncode:
        said = (done.stderr or done.stdout).strip()
        raise BuildError(f"{doing} failed ({command[0]} exited {done.returncode}):\n{said[:4000]}")


def compile_entry(
    directory: Path, table: Tables, *, pool: bool, machine: str | None = None
) -> list[Path]:
    """Compile the entry point, a module's tables, and for CPUs the thread pool.

    `machine` is the one that the code is for, by default this one.
    """
    compiler = c_compiler(machine or host_machine())
    (directory / "tables.c").write_text(table.module)
    objects = [directory / "tables.o"]
    _compile_c(compiler, directory / "tables.c", objects[0])
    shared = {"entry": table.operations, "pool": ""} if pool else {"entry": table.operations}
    for name, operations in shared.items():
        objects.append(directory / f"{name}.o")
        objects[-1].write_bytes(_shared_object(compiler, name, operations, directory))
    return objects


#: Compiled once in a process: most of what a small module takes to build is its entry point.
_shared_objects: dict[tuple[str, str, str], bytes] = {}


def _shared_object(compiler: str, name: str, operations: str, directory: Path) -> bytes:
    """Return the object of ``entry.c`` or ``pool.c``, in which nothing is of one module."""
    key = (compiler, name, operations)
    if key not in _shared_objects:
        (directory / "operations.h").write_text(operations)
        with resources.as_file(resources.files("qknorm_tvm.native") / f"{name}.c") as source:
            _compile_c(compiler, source, directory / f"{name}.o")
        _shared_objects[key] = (directory / f"{name}.o").read_bytes()
    return _shared_objects[key]


def _compile_c(compiler: str, source: Path, out: Path) -> None:
    import tvm_ffi.libinfo as ffi

    with resources.as_file(resources.files("qknorm_tvm.native") / "module.h") as header:
        command = [compiler, "-c", "-std=gnu11", "-O2", "-fPIC", "-fvisibility=hidden", "-g0"]
        command += ["-Wall", "-Wextra", "-Wno-missing-field-initializers"]
        command += [f"-I{out.parent}", f"-I{header.parent}", f"-I{ffi.find_include_path()}"]
        command += [f"-I{ffi.find_dlpack_include_path()}", str(source), "-o", str(out)]
        run_compiler(command, f"compiling {source.name}", out.parent)


def exported_symbols() -> str:
    """Return the linker's script for what a module shows: its entry points, and its pool."""
    names = "; ".join(f"__tvm_ffi_{op}" for op in OPS)
    return f"{{ global: {names}; __tvm_ffi_qknorm_*; qknorm_tvm_thread_pool_v*; local: *; }};\n"


def _stand_in_for_tvm_ffi(directory: Path, compiler: str) -> Path:
    """Make a library with tvm-ffi's name and the names of its C functions, to link against.

    The tvm-ffi of another machine is not here. The process that loads the module has it.
    """
    import tvm_ffi.libinfo as ffi

    header = Path(ffi.find_include_path()) / "tvm" / "ffi" / "c_api.h"
    names = sorted(set(re.findall(r"\b(TVMFFI\w+)\(", header.read_text())))
    source, library = directory / "stand_in.c", directory / "libtvm_ffi.so"
    source.write_text("".join(f"void {name}(void) {{}}\n" for name in names))
    command = [compiler, "-shared", "-fPIC", "-nostdlib", "-Wl,-soname,libtvm_ffi.so"]
    command += [str(source), "-o", str(library)]
    run_compiler(command, "making a stand-in for libtvm_ffi", directory)
    return library


def link(objects: Sequence[Path], out: Path, machine: str | None = None) -> None:
    """Link objects to a module that exports its entry points alone, and seal it.

    `machine` is the one that the code is for, by default this one.
    """
    import tvm_ffi.libinfo as ffi

    machine = machine or host_machine()
    compiler = c_compiler(machine)
    script = out.with_suffix(".exports")
    script.write_text(exported_symbols())
    command = [compiler, "-shared", "-s", "-o", str(out)]
    command += map(str, objects)
    # Never unloaded: its pool's threads may serve other modules.
    command += ["-Wl,-z,nodelete", "-Wl,-z,noexecstack", "-Wl,-z,relro", "-Wl,--gc-sections"]
    # Bound when it is loaded: a tvm-ffi that lacks a function is noticed then, not in a call.
    command += ["-Wl,-z,now"]
    command += [f"-Wl,--version-script={script}", "-Wl,--build-id=none", "-Wl,--no-undefined"]
    if machine == host_machine():
        library = Path(ffi.find_libtvm_ffi())
    else:
        library = _stand_in_for_tvm_ffi(out.parent, compiler)
    command += [f"-L{library.parent}", "-ltvm_ffi", "-lpthread", "-ldl", "-lm"]
    run_compiler(command, "linking", out.parent)
    seal(out)
