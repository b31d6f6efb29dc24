"""AArch64 modules under test: called by a C program under qemu-user, or on the machine itself.

`AArch64.call` takes NumPy arrays in any layout and leaves in them what the call left, as a call in
this process would. What it needs and is not installed is a skip that says how to get it.
"""

from __future__ import annotations

import dataclasses
import importlib.metadata
import os
import shutil
import struct
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import filelock
import numpy as np
import pytest
from support import base_of, session_folder

from qknorm_tvm import BuildError
from qknorm_tvm.build.native import c_compiler
from qknorm_tvm.targets import host_machine

_SOURCE = Path(__file__).parent / "native" / "call_module.c"
_CODES = {"bfloat16": 4, "float16": 2, "float32": 2, "int64": 0, "float8_e4m3fn": 10}
_DIMS = 4
#: For a machine without a network: the libtvm_ffi.so of tvm-ffi's AArch64 wheel.
_LIBRARY_VARIABLE = "QKNORM_TVM_TEST_AARCH64_TVM_FFI"


@dataclasses.dataclass
class Request:
    """One call: the function, its tensors in order, its threads, and its caller's FPCR."""

    function: str
    tensors: Sequence[np.ndarray | None] = ()
    epsilon: float | None = None
    threads: int = 0
    mode: int = 0


class AArch64:
    """What runs AArch64 programs here.

    Parameters
    ----------
    runner : sequence of str
        Command line before the program: qemu's; none on AArch64.
    program : Path
        ``call_module.c``, compiled.
    tvm_ffi : Path
        tvm-ffi's own library for AArch64.
    """

    def __init__(self, runner: Sequence[str], program: Path, tvm_ffi: Path):
        self._command = [*runner, str(program), str(tvm_ffi)]

    def call(self, module: Path, *requests: Request) -> list[str]:
        """Make calls in one process; the arrays then hold what the calls left in memory.

        Returns
        -------
        list of str
            Of each call its result as a text, or the error's kind and message.
        """
        parts, memories = [struct.pack("<i", len(requests))], []
        for request in requests:
            part, bases = _packed(request)
            parts.append(part)
            memories.append(bases)
        with tempfile.TemporaryDirectory() as folder:
            asked, answered = Path(folder, "requests"), Path(folder, "answers")
            asked.write_bytes(b"".join(parts))
            done = subprocess.run(
                [*self._command, str(module), str(asked), str(answered)],
                capture_output=True,
                text=True,
                check=False,
                timeout=300,
            )
            assert done.returncode == 0, f"exit status {done.returncode}: {done.stderr}"
            data = answered.read_bytes()
        texts, at = [], 0
        for bases in memories:
            status, length = struct.unpack_from("<ii", data, at)
            at += 8
            texts.append(data[at : at + length].decode())
            assert status in (0, -1), status
            at += length
            for base in bases:
                after = np.frombuffer(data, np.uint8, base.nbytes, at)
                base.reshape(-1).view(np.uint8)[...] = after
                at += base.nbytes
        assert at == len(data)
        return texts


def _packed(request: Request) -> tuple[bytes, list[np.ndarray]]:
    bases: list[np.ndarray] = []
    tensors = []
    for array in request.tensors:
        if array is None:
            tensors.append(struct.pack(f"<4i{1 + 2 * _DIMS}q", -1, *[0] * (4 + 2 * _DIMS)))
            continue
        base = base_of(array)
        index = next((i for i, known in enumerate(bases) if known is base), len(bases))
        if index == len(bases):
            bases.append(base)
        rest = [0] * (_DIMS - array.ndim)
        shape = [*array.shape, *rest]
        strides = [*(s // array.itemsize for s in array.strides), *rest]
        code, bits = _CODES[array.dtype.name], array.itemsize * 8
        offset = array.ctypes.data - base.ctypes.data
        tensors.append(
            struct.pack(
                f"<4i{1 + 2 * _DIMS}q", index, code, bits, array.ndim, offset, *shape, *strides
            )
        )
    has_epsilon, epsilon = request.epsilon is not None, request.epsilon or 0.0
    parts = [
        struct.pack("<32siid", request.function.encode(), request.threads, has_epsilon, epsilon),
        struct.pack("<I", request.mode),
        struct.pack("<i", len(bases)),
    ]
    for base in bases:
        parts += [struct.pack("<qq", base.nbytes, base.ctypes.data % 64), base.tobytes()]
    return b"".join([*parts, struct.pack("<i", len(tensors)), *tensors]), bases


def _run(command: Sequence[str]) -> str:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def _file_of(compiler: str, name: str) -> Path | None:
    """Return a file of the compiler's libraries; gcc answers with the bare name if it has none."""
    path = Path(_run([compiler, f"-print-file-name={name}"]))
    return path.resolve() if path.is_absolute() and path.exists() else None


def _qemu(compiler: str) -> list[str]:
    qemu = shutil.which("qemu-aarch64") or shutil.which("qemu-aarch64-static")
    if qemu is None:
        pytest.skip(
            "runs AArch64 code under qemu, which is not installed: apt-get install qemu-user"
        )
    if _file_of(compiler, "libstdc++.so.6") is None:
        pytest.skip(
            "tvm-ffi needs a C++ runtime for AArch64: apt-get install libstdc++6-arm64-cross"
        )
    loader = _file_of(compiler, "ld-linux-aarch64.so.1")
    if loader is None:
        pytest.skip("there is no C library for AArch64: apt-get install libc6-arm64-cross")
    # Of the first AArch64 processors: an instruction that not every machine has is a SIGILL.
    return [qemu, "-cpu", "cortex-a53", "-L", str(loader.parent.parent)]


def _tvm_ffi(folder: Path) -> Path:
    """Return tvm-ffi's library for AArch64, from the wheel of the version that is installed."""
    if _LIBRARY_VARIABLE in os.environ:
        return Path(os.environ[_LIBRARY_VARIABLE])
    version = importlib.metadata.version("apache-tvm-ffi")
    command = [sys.executable, "-m", "pip", "download", f"apache-tvm-ffi=={version}", "--no-deps"]
    command += ["--only-binary=:all:", "--platform=manylinux_2_28_aarch64", "--python-version=312"]
    command += ["--retries=0", "--timeout=15", "--quiet", f"--dest={folder}"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        reason = (done.stderr.strip().splitlines() or ["no reason given"])[-1]
        pytest.skip(f"runs with tvm-ffi's wheel for AArch64, which pip cannot get: {reason}")
    (wheel,) = folder.glob("apache_tvm_ffi-*.whl")
    with zipfile.ZipFile(wheel) as archive:
        return Path(archive.extract("tvm_ffi/lib/libtvm_ffi.so", folder))


def cross_compiler() -> str:
    """Return the C compiler for AArch64; without one this skips the test."""
    try:
        return c_compiler("aarch64")
    except BuildError as error:
        pytest.skip(str(error))


def find() -> AArch64:
    """Return what runs AArch64 code here; what is missing skips the test, saying so."""
    from tvm_ffi import libinfo

    compiler = cross_compiler()
    native = host_machine() == "aarch64"
    runner = [] if native else _qemu(compiler)
    folder = session_folder() / "aarch64"
    with filelock.FileLock(f"{folder}.lock"):
        folder.mkdir(exist_ok=True)
        known = folder / "tvm_ffi" / "lib" / "libtvm_ffi.so"
        if native:
            library = Path(libinfo.find_libtvm_ffi())
        else:
            library = known if known.exists() else _tvm_ffi(folder)
        program = folder / "call_module"
        if not program.exists():
            command: list[Any] = [compiler, "-std=gnu11", "-O2", "-Wall", "-Wextra", "-Werror"]
            command += ["-isystem", libinfo.find_include_path()]
            command += ["-isystem", libinfo.find_dlpack_include_path()]
            _run([*command, str(_SOURCE), "-o", str(program), "-ldl"])
    return AArch64(runner, program, library)
