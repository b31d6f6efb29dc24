"""What several test files use: inputs, raw DLPack tensors, modules compiled once, child processes.

No computation of the operation is here: `qknorm_tvm.check.reference` is the only one.
"""

from __future__ import annotations

import ctypes
import dataclasses
import functools
import importlib.util
import itertools
import os
import shutil
import subprocess
import sys
import textwrap
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import filelock
import numpy as np
import pytest

from qknorm_tvm import BuildError, KernelSpec, Module, compile, load
from qknorm_tvm.check import reference
from qknorm_tvm.check.cases import PAIRINGS
from qknorm_tvm.check.reference_torch import to_numpy as from_torch  # noqa: F401  # for the tests
from qknorm_tvm.check.reference_torch import to_torch  # noqa: F401
from qknorm_tvm.check.special_values import (  # noqa: F401
    GAMMAS,
    NAN_BITS,
    VARIANCES,
    all_patterns,
    special_gamma,
)
from qknorm_tvm.dtypes import ELEMENT_TYPES
from qknorm_tvm.targets import X86_LEVELS, host_cpu_target, host_features

DTYPES = ("bfloat16", "float16", "float32")
LEVELS = ("x86-64-v2", "x86-64-v3", "x86-64-v4", "x86-64-v4-bf16")
#: The best level of this machine, as a target: what the API compiles for here.
OWN = host_cpu_target()
#: What a default run tests beside `OWN`: the level whose code differs most, without fused
#: multiply-add and conversions of float16.
PLAIN = "x86-64-v2"
NAMES = ("q_out", "k_out", "gamma_q", "gamma_k", "qk_var", "q", "k")
EPSILON = 1e-6

#: Scales that go wrong first: four of each kind of ``qknorm-tvm verify``.
SPECIAL_GAMMAS = np.concatenate([special_gamma(kind, 4) for kind in GAMMAS])


# ---- inputs ---------------------------------------------------------------------------------


def random_values(rng: np.random.Generator, shape: Sequence[int], dtype: str) -> np.ndarray:
    """Return values of many magnitudes, one in 50 of any bits at all."""
    kind = reference.NUMPY_DTYPES[dtype]
    values = rng.standard_normal(shape) * np.exp2(rng.integers(-12, 12, shape))
    values = values.astype(np.float32).astype(kind)
    wild = rng.random(shape) < 0.02
    bits = np.dtype(f"u{kind.itemsize}")
    values.view(bits)[wild] = rng.integers(0, 1 << 8 * kind.itemsize, int(wild.sum()), bits)
    return values


@dataclasses.dataclass
class Case:
    """The arguments of one call, as NumPy arrays."""

    q_out: Any
    k_out: Any
    gamma_q: Any
    gamma_k: Any
    qk_var: Any
    q: Any
    k: Any
    epsilon: Any = EPSILON

    @property
    def tensors(self) -> list[Any]:
        return [getattr(self, name) for name in NAMES]

    def expected(self) -> tuple[np.ndarray, np.ndarray]:
        """Compute what the outputs must be; before the call, which may be in place."""
        return (
            reference.rms_norm(
                self.q, self.qk_var[:, 0], self.gamma_q, self.epsilon, self.q_out.dtype.name
            ),
            reference.rms_norm(
                self.k, self.qk_var[:, 1], self.gamma_k, self.epsilon, self.k_out.dtype.name
            ),
        )


def filled(shape: Sequence[int], dtype: str, byte: int = 0xA5) -> np.ndarray:
    """Return an array whose every byte is `byte`: a canary, or an output to be written."""
    kind = ELEMENT_TYPES[dtype].numpy
    size = int(np.prod(shape)) * kind.itemsize
    return np.full(size, byte, np.uint8).view(kind).reshape(shape)


def make_case(
    rows: int,
    q_cols: int,
    k_cols: int,
    in_dtype: str = "bfloat16",
    out_dtype: str | None = None,
    *,
    seed: int = 0,
) -> Case:
    """Return packed random inputs and canary-filled outputs."""
    rng = np.random.default_rng([seed, rows, q_cols, k_cols])
    out_dtype = out_dtype or in_dtype
    return Case(
        q_out=filled((rows, q_cols), out_dtype),
        k_out=filled((rows, k_cols), out_dtype),
        gamma_q=random_values(rng, (q_cols,), "float32"),
        gamma_k=random_values(rng, (k_cols,), "float32"),
        qk_var=np.abs(random_values(rng, (rows, 2), "float32")),
        q=random_values(rng, (rows, q_cols), in_dtype),
        k=random_values(rng, (rows, k_cols), in_dtype),
    )


def misaligned(array: np.ndarray, offset: int) -> np.ndarray:
    """Return a packed copy that starts `offset` bytes after an address divisible by 64."""
    memory = np.zeros(array.nbytes + 128, np.uint8)
    start = -memory.ctypes.data % 64 + offset
    copy = memory[start : start + array.nbytes].view(array.dtype).reshape(array.shape)
    copy[...] = array
    return copy


def bits_of(array: np.ndarray) -> bytes:
    """Return an array's content, for comparisons in which NaN payloads count."""
    return np.ascontiguousarray(array).tobytes()


def base_of(array: np.ndarray) -> np.ndarray:
    """Return the array that owns the memory: to see writes beside a slice too."""
    while isinstance(array.base, np.ndarray):
        array = array.base
    return array


# ---- raw tensors ----------------------------------------------------------------------------


class _DLTensor(ctypes.Structure):
    _fields_ = (
        ("data", ctypes.c_void_p),
        ("device_type", ctypes.c_int32),
        ("device_id", ctypes.c_int32),
        ("ndim", ctypes.c_int32),
        ("code", ctypes.c_uint8),
        ("bits", ctypes.c_uint8),
        ("lanes", ctypes.c_uint16),
        ("shape", ctypes.POINTER(ctypes.c_int64)),
        ("strides", ctypes.POINTER(ctypes.c_int64)),
        ("byte_offset", ctypes.c_uint64),
    )


class _DLManagedTensor(ctypes.Structure):
    _fields_ = (
        ("tensor", _DLTensor),
        ("manager", ctypes.c_void_p),
        ("deleter", ctypes.c_void_p),
    )


_TYPE_CODES = {"i": 0, "u": 1, "f": 2, "c": 5, "b": 6, "bfloat16": 4, "float8_e4m3fn": 10}


class RawTensor:
    """A DLPack tensor with every field free to be wrong; whoever makes it keeps it alive."""

    def __init__(
        self,
        array: np.ndarray,
        *,
        address: int | None = None,
        byte_offset: int = 0,
        device: tuple[int, int] = (1, 0),
        strides: Sequence[int] | str | None = "array",
        lanes: int = 1,
    ):
        code = _TYPE_CODES.get(array.dtype.name) or _TYPE_CODES[array.dtype.kind]
        if strides == "array":
            strides = [stride // array.itemsize for stride in array.strides]
        ndim = array.ndim
        self._array = array
        self._shape = (ctypes.c_int64 * max(ndim, 1))(*array.shape)
        self._strides = None if strides is None else (ctypes.c_int64 * max(ndim, 1))(*strides)
        self._device = device
        self._managed = _DLManagedTensor(
            _DLTensor(
                array.ctypes.data - byte_offset if address is None else address,
                *device,
                ndim,
                code,
                array.itemsize * 8,
                lanes,
                self._shape,
                self._strides,
                byte_offset,
            )
        )

    def __dlpack_device__(self) -> tuple[int, int]:
        return self._device

    def __dlpack__(self, **_: Any) -> Any:
        new = ctypes.pythonapi.PyCapsule_New
        new.restype, new.argtypes = (
            ctypes.py_object,
            (ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p),
        )
        return new(ctypes.addressof(self._managed), b"dltensor", None)


def ffi_tensors(arrays: Sequence[Any]) -> tuple[list[Any], list[Any]]:
    """Return tvm-ffi tensors over NumPy arrays, and what must be kept alive as long as they."""
    import tvm_ffi

    raw = [RawTensor(x) if isinstance(x, np.ndarray) else x for x in arrays]
    return [tvm_ffi.from_dlpack(x) if isinstance(x, RawTensor) else x for x in raw], raw


def raw_call(module: Module, *arrays: Any, op: str = "apply_qk_rms_norm") -> None:
    """Call a module's own entry point, as C++ would: bfloat16 is bfloat16."""
    tensors, alive = ffi_tensors(arrays)
    getattr(module, op)(*tensors)
    del alive


def check_exact(module: Module, case: Case, *, label: str = "") -> None:
    """Call the entry point and compare both outputs with the reference, bit by bit."""
    expected = case.expected()
    raw_call(module, *case.tensors, case.epsilon)
    for name, wanted in zip(("q_out", "k_out"), expected, strict=True):
        wrong = reference.differing(getattr(case, name), wanted)
        assert wrong == 0, f"{name} differs in {wrong} of {wanted.size} elements; {label}"


# ---- levels ---------------------------------------------------------------------------------


def levels(*default: str) -> list[Any]:
    """Return `LEVELS` as parameters: slow, but for those in `default` (`OWN` and `PLAIN`)."""
    default = default or (OWN, PLAIN)
    slow = pytest.mark.slow
    return [pytest.param(level, marks=() if level in default else slow) for level in LEVELS]


# ---- modules --------------------------------------------------------------------------------


def session_folder() -> Path:
    return Path(os.environ["QKNORM_TVM_TEST_SESSION"])


_compiled: dict[str, Path] = {}


def compiled(name: str, *specs: KernelSpec, config: Any = None) -> Path:
    """Export one module for the whole session, whichever worker is first; returns its path."""
    if name not in _compiled:
        path = session_folder() / f"{name}.so"
        with filelock.FileLock(str(path) + ".lock"):
            failed = path.with_suffix(".failed")
            if failed.exists():  # said once more, not compiled once more for every test
                raise BuildError(failed.read_text())
            if not path.exists():
                try:
                    compile(list(specs), config=config).export(path)
                except BuildError as error:
                    failed.write_text(str(error))
                    raise
        _compiled[name] = path
    return _compiled[name]


def needs_level(level: str) -> None:
    """Skip, saying why, where this machine cannot run a level."""
    missing = sorted(set(X86_LEVELS[level]) - host_features())
    if missing:
        pytest.skip(f"this CPU cannot run {level}: it lacks {', '.join(missing)}")


#: What to switch off so that a portable module picks a level.
DISABLE_FOR_LEVEL = {
    "x86-64-v4-bf16": "",
    "x86-64-v4": "avx512bf16",
    "x86-64-v3": "avx512f",
    "x86-64-v2": "avx512f,avx2",
}


@functools.cache
def load_at_level(path: Path, level: str) -> Module:
    """Load a portable module so that it picks `level`.

    A module decides when it is loaded, once for each file: so each level gets a copy of its own.
    """
    copy = path.with_name(f"{path.stem}-{level}-{os.getpid()}.so")
    shutil.copyfile(path, copy)
    with environment(QKNORM_TVM_DISABLE_CPU_FEATURES=DISABLE_FOR_LEVEL[level]):
        module = load(copy)
    assert module.active_level == level
    return module


class environment:
    """Environment variables for a while, seen by C's getenv too."""

    def __init__(self, **values: str):
        self._values = values

    def __enter__(self) -> None:
        self._before = {name: os.environ.get(name) for name in self._values}
        os.environ.update(self._values)

    def __exit__(self, *_: object) -> None:
        for name, value in self._before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


def specs_of(
    pairings: Sequence[tuple[str, str]],
    columns: Sequence[tuple[int | None, int | None]],
    target: str = "cpu",
) -> Iterator[KernelSpec]:
    for (in_dtype, out_dtype), (q_cols, k_cols) in itertools.product(pairings, columns):
        yield KernelSpec(
            in_dtype=in_dtype, out_dtype=out_dtype, q_cols=q_cols, k_cols=k_cols, target=target
        )


def open_columns(target: str = OWN) -> Path:
    """One file for every dtype pairing, with columns known at the call only."""
    return compiled(f"open-{target}", *specs_of(PAIRINGS, [(None, None)], target))


#: Fixed in `statistics_and_fused`; the others go through its open columns.
FIXED_COLUMNS = ((1536, 256), (129, 1090))


def statistics_and_fused(in_dtype: str, target: str = OWN) -> Path:
    """One file of the two operations of one dtype: some columns fixed, any others open.

    All open for float16, which goes through the code of the others but for its casts.
    """
    fixed = () if in_dtype == "float16" else FIXED_COLUMNS
    return compiled(
        f"statistics-{in_dtype}-{target}",
        *(
            KernelSpec(op=op, in_dtype=in_dtype, q_cols=q_cols, k_cols=k_cols, target=target)
            for op in ("row_mean_of_squares_qk", "qk_rms_norm")
            for q_cols, k_cols in (*fixed, (None, None))
        ),
    )


def of_every_level() -> Path:
    """Export a small module that has code of its own for each level."""
    return compiled("every-level", KernelSpec(q_cols=33, k_cols=7))


def smallest() -> Path:
    """One portable file of one spec, for tests of files and processes; columns 33 and 7."""
    return compiled("smallest", KernelSpec(in_dtype="float32", q_cols=33, k_cols=7))


# ---- child processes ------------------------------------------------------------------------

#: Waits for the file that an argument names, if one does; then computes `COMPUTED` through the
#: public API and checks the result. Prints whether the compiler was needed.
COMPUTE = """
import os, sys, time
import numpy as np
import tvm_ffi
import qknorm_tvm
from qknorm_tvm.check import reference
q, k = np.ones((2, 5), np.float32) / 3, np.ones((2, 3), np.float32) / 7
var, gamma = np.full((2, 2), 0.3, np.float32), np.full(5, 1.7, np.float32)
arguments = q, k, var, gamma, gamma[:3]
while len(sys.argv) > 1 and not os.path.exists(sys.argv[1]):
    time.sleep(0.002)
outputs = qknorm_tvm.apply_qk_rms_norm(*arguments)
for got, want in zip(outputs, reference.apply_qk_rms_norm(*arguments)):
    assert reference.differing(got, want) == 0
print("tvm" in sys.modules)
"""
COMPUTED = KernelSpec(in_dtype="float32", q_cols=5, k_cols=3, target=OWN)


def engine_python(engine: str, variable: str, group: str) -> str:
    """Return a Python that has an engine and this package's entry point in `group`, or skip."""
    given = os.environ.get(variable)
    if given is None and importlib.util.find_spec(engine) is None:
        pytest.skip(f"{engine} is not installed, and {variable} names no Python that has it")
    python = given or sys.executable
    code = (
        "import importlib.metadata as m, importlib.util as u, sys\n"
        "plugins = m.entry_points(group=sys.argv[2])\n"
        "print(u.find_spec(sys.argv[1]) is not None, 'qknorm_tvm' in [p.name for p in plugins])"
    )
    probe = subprocess.run(
        [python, "-c", code, engine, group], capture_output=True, text=True, check=True
    )
    if probe.stdout.split() != ["True", "True"]:
        pytest.skip(f"{python} lacks {engine}, or qknorm-tvm installed with its entry points")
    return python


def run_python(
    code: str, *args: str, env: dict[str, str] | None = None, check: bool = True, timeout: int = 120
) -> subprocess.CompletedProcess[str]:
    """Run Python code in a fresh process, with the tests' folder on its path, without torch.

    tvm-ffi imports torch where it is installed, which takes seconds and hides what is missing
    where it is not.
    """
    code = 'import sys\nsys.modules["torch"] = None\n' + textwrap.dedent(code)
    environment = {**os.environ, **(env or {})}
    path = [str(Path(__file__).parent), environment.get("PYTHONPATH", "")]
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, path))
    done = subprocess.run(
        [sys.executable, "-c", code, *args],
        capture_output=True,
        text=True,
        timeout=timeout,
        env=environment,
        check=False,
    )
    if check:
        assert done.returncode == 0, f"exit status {done.returncode}\n{done.stdout}\n{done.stderr}"
    return done


Call = Callable[..., Any]
