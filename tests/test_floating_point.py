"""The floating-point mode and flags of the threads that call, which must neither enter nor change.

In fresh processes: a pool's threads keep what they were started with.
"""

from __future__ import annotations

import ctypes.util
from pathlib import Path

import pytest
from support import OWN, compiled, run_python

from qknorm_tvm import KernelSpec
from qknorm_tvm.operations import OPERATIONS

#: Bits of MXCSR: flush to zero with denormals as zero; rounding up and down; both.
_MODES = {"flush": 0x8040, "up": 0x4000, "down": 0x2000, "flush-up": 0xC040}

_SETUP = """
import ctypes
import sys
import threading
import numpy as np
from support import bits_of, ffi_tensors, make_case
from qknorm_tvm import load
from qknorm_tvm.check import reference

library, pool, bits = sys.argv[1], sys.argv[2], int(sys.argv[3])
libm = ctypes.CDLL("libm.so.6")
if pool == "openmp":
    ctypes.CDLL("libgomp.so.1", ctypes.RTLD_GLOBAL)

def mxcsr():
    environment = (ctypes.c_uint32 * 8)()
    libm.fegetenv(environment)
    return environment[7]

def set_mxcsr(value):
    environment = (ctypes.c_uint32 * 8)()
    libm.fegetenv(environment)
    environment[7] = value
    libm.fesetenv(environment)

module = load(library)
module.library.get_function("qknorm_set_num_threads")(4)
case = make_case(512, 1536, 256)
# Denormal outputs, denormal inputs, and ordinary ones.
case.gamma_q[::3] *= np.float32(2.0**-126)
case.gamma_k[::3] *= np.float32(2.0**-126)
calls = {
    "apply_qk_rms_norm": (*case.tensors, 1e-6),
    "qk_rms_norm": (case.q_out, case.k_out, case.gamma_q, case.gamma_k, case.q, case.k, 1e-6),
    "row_mean_of_squares_qk": (case.qk_var.copy(), case.q, case.k),
}
var = np.stack([reference.row_mean_of_squares(x) for x in (case.q, case.k)], 1)
fused = [
    reference.rms_norm(x, var[:, i], gamma, 1e-6, "bfloat16")
    for i, (x, gamma) in enumerate(((case.q, case.gamma_q), (case.k, case.gamma_k)))
]
expected = {
    "apply_qk_rms_norm": case.expected(), "qk_rms_norm": fused, "row_mean_of_squares_qk": [var],
}
prepared = {name: ffi_tensors(arguments) for name, arguments in calls.items()}

def wrong(mode):
    counts, changed = {}, {}
    for name, (tensors, _) in prepared.items():
        before = mxcsr()
        set_mxcsr(mode)
        getattr(module, name)(*tensors)
        after = mxcsr()
        set_mxcsr(before)
        if after != mode:
            changed[name] = f"{mode:#x} became {after:#x}"
        outputs = calls[name][: len(expected[name])]
        pairs = zip(outputs, expected[name], strict=True)
        differing = sum(reference.differing(got, want) for got, want in pairs)
        if differing:
            counts[name] = differing
    return counts, changed

def in_another_thread(mode):
    results = []
    thread = threading.Thread(target=lambda: results.append(wrong(mode)))
    thread.start()
    thread.join()
    return results[0]
"""


@pytest.fixture(scope="module")
def every_operation() -> Path:
    return compiled(
        "floating-point",
        *(
            KernelSpec(op=name, in_dtype="bfloat16", q_cols=1536, k_cols=256, target=OWN)
            for name, operation in OPERATIONS.items()
            if not operation.rotates
        ),
    )


def _arguments(library: Path, pool: str, bits: int) -> tuple[str, dict[str, str]]:
    if pool == "openmp" and ctypes.util.find_library("gomp") is None:
        pytest.skip("GNU OpenMP is not installed")
    return str(library), {"QKNORM_TVM_OPENMP": "0" if pool == "own" else "1"}


@pytest.mark.parametrize(
    ("mode", "pool"),
    [
        *((mode, "own") for mode in _MODES),
        ("flush-up", "openmp"),
        *(pytest.param(mode, "openmp", marks=pytest.mark.slow) for mode in list(_MODES)[:-1]),
    ],
)
def test_bits_do_not_depend_on_a_callers_mode(mode: str, pool: str, every_operation: Path) -> None:
    """A pool whose threads keep the mode of whoever called first: wrong bits for all others."""
    library, env = _arguments(every_operation, pool, _MODES[mode])
    run_python(
        _SETUP
        + """
default = 0x1F80
assert mxcsr() & ~0x3F == default
found = [wrong(default | bits), in_another_thread(default), wrong(default)]
found += [in_another_thread(default | bits), wrong(default)]
wrong_elements = [counts for counts, _ in found]
assert not any(wrong_elements), wrong_elements
""",
        library,
        pool,
        str(_MODES[mode]),
        env=env,
    )


@pytest.mark.parametrize("pool", ["own", "openmp"])
def test_a_call_raises_no_flag_and_no_trap(pool: str, every_operation: Path) -> None:
    """SIGFPE from the mean of finite squares, where a program lets divisions by zero trap."""
    library, env = _arguments(every_operation, pool, 0)
    run_python(
        _SETUP
        + """
found = {hex(mode): wrong(mode) for mode in (0x1F80, 0x1F80 & ~0x0200, 0x1F80 & ~0x1F80)}
assert found == dict.fromkeys(found, ({}, {})), found
""",
        library,
        pool,
        "0",
        env=env,
    )
