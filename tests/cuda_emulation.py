"""Generated CUDA kernels compiled by g++ and run on the CPU; see native/cuda_emulation.h."""

from __future__ import annotations

import copy
import ctypes
import functools
import hashlib
import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

HEADER = Path(__file__).parent / "native" / "cuda_emulation.h"
_KERNEL = re.compile(
    r'extern "C" __global__ void __launch_bounds__\((\d+)(?:, \d+)?\) (\w+)\(([^)]*)\) \{',
    re.MULTILINE,
)
_STORE = re.compile(r'asm volatile\("st\.global.*;$', re.MULTILINE)
#: What ranks do with one another's memory, and the clock.
_PEERS = re.compile(
    r'asm volatile\("(?P<what>st\.relaxed|ld\.relaxed|mov\.u64 %0, %globaltimer).*;$', re.MULTILINE
)
#: The GPU's approximation of a reciprocal.
_RECIPROCAL = re.compile(r'asm\("rcp\.approx\.f32 %0, %1;" : "=f"\((\w+)\) : "f"\((\w+)\)\);')
_VALUES = re.compile(r'"=?[lrf]"\((\w+)\)')


def with_reciprocals(code: str) -> str:
    """Return code whose approximate reciprocals are those of the header."""
    return _RECIPROCAL.sub(r"\1 = approximate_reciprocal(\2);", code)


class Kernel:
    """One kernel of a generated CUDA source.

    Parameters
    ----------
    source : str
        What `build_cuda.cuda_source` returned for one function.
    """

    def __init__(self, source: str):
        head = "#define ushort unsigned short\n#endif\n"
        text = source[source.index(head) + len(head) : source.index("#include <tvm/ffi/c_api.h>")]
        # The stores, which are PTX: their address and words are parameters of a function.
        text = _STORE.sub(lambda match: f"STORE({', '.join(_VALUES.findall(match[0]))});", text)
        text = _PEERS.sub(_peer_access, text)
        text = with_reciprocals(text)
        text = text.replace("__shared__ alignas(16)", "alignas(16) __shared__")
        threads, name, parameters = _KERNEL.findall(text)[0]
        self.threads = int(threads)
        self.parameters = [parameter.rsplit(" ", 1) for parameter in parameters.split(", ")]
        passed = ", ".join(f"*({kind}*)given[{i}]" for i, (kind, _) in enumerate(self.parameters))
        text = (
            f'#include "{HEADER.name}"\n{text}\nextern "C" int run(int64_t blocks, int reverse, '
            f"void** given) {{\n  return emulate(blocks, {threads}, reverse, [=] {{ {name}({passed}"
            "); });\n}\n"
        )
        self.library = _compiled(text)

    def __call__(self, blocks: int, values: Mapping[str, Any], *, reverse: bool = False) -> None:
        """Run a grid; arrays are given by name, and so are scalars."""
        held = []
        for kind, name in self.parameters:
            value = values[name.removesuffix("_ptr")]
            if isinstance(value, np.ndarray):
                held.append(ctypes.c_void_p(value.ctypes.data))
            else:
                held.append((ctypes.c_float if kind == "float" else ctypes.c_int64)(value))
        given = (ctypes.c_void_p * len(held))(*map(ctypes.addressof, held))
        if self.library.run(ctypes.c_int64(blocks), int(reverse), given):
            raise AssertionError("not every thread comes to each shuffle and barrier")

    def copy(self) -> Kernel:
        """Return a kernel that may run at the same time: shared memory is its library's own."""
        copied = copy.copy(self)
        path = Path(self.library._name)
        with tempfile.NamedTemporaryFile(dir=path.parent, suffix=".so") as file:
            file.write(path.read_bytes())
            file.flush()
            copied.library = ctypes.CDLL(file.name)
        return copied


def _peer_access(match: re.Match[str]) -> str:
    name = {"st": "PEER_STORE", "ld": "PEER_LOAD", "mo": "PEER_CLOCK"}[match["what"][:2]]
    return f"{name}({', '.join(_VALUES.findall(match[0]))});"


@functools.cache
def _compiled(text: str) -> Any:
    folder = Path(os.environ["QKNORM_TVM_CACHE_DIR"]) / "emulation"
    folder.mkdir(parents=True, exist_ok=True)
    digest = hashlib.sha256(text.encode() + HEADER.read_bytes()).hexdigest()[:16]
    source, library = folder / f"{digest}-{os.getpid()}.cpp", folder / f"{digest}-{os.getpid()}.so"
    source.write_text(text)
    # movaps faults where an access of 16 bytes is not aligned.
    options = ["-O1", "-std=c++17", "-ffp-contract=off", "-fno-strict-aliasing", "-fPIC", "-shared"]
    # Shared memory of an inline function would be one for all copies of a kernel in a process.
    options += ["-fno-gnu-unique"]
    options += ["-w", f"-I{HEADER.parent}", "-o", str(library)]
    done = subprocess.run(
        [shutil.which("g++") or "g++", *options, str(source)], capture_output=True, text=True
    )
    if done.returncode:
        raise AssertionError(done.stderr[:4000])
    return ctypes.CDLL(str(library))
