"""Many calls in one process: memory, files and threads do not grow.

About a hundred thousand calls in some seconds; ``QKNORM_TVM_CAMPAIGN=1`` makes it more than a
million.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from support import compiled, open_columns, run_python

from qknorm_tvm import KernelSpec

_TIMES = 12 if os.environ.get("QKNORM_TVM_CAMPAIGN") else 1

_COMMON = """
import os, sys
import numpy as np
import qknorm_tvm
from qknorm_tvm.check import reference
from support import RawTensor, ffi_tensors, make_case

def used():
    pages = int(open("/proc/self/statm").read().split()[1])
    return pages * 4096, len(os.listdir("/proc/self/fd")), len(os.listdir("/proc/self/task"))

def soak(call, calls):
    '''Call call(i) for i in range(calls); say how memory, files and threads grew after a tenth.'''
    for i in range(calls // 10):
        call(i)
    before = used()
    for i in range(calls):
        call(i)
    after = used()
    grown = [b - a for a, b in zip(before, after)]
    assert grown[1:] == [0, 0], grown
    assert grown[0] < 3 << 20, grown
    print(calls + calls // 10, *grown)

def exact(outputs, case):
    for got, want in zip(outputs, case.expected()):
        assert reference.differing(got, want) == 0
"""

_RAW = (
    _COMMON
    + """
import itertools, tvm_ffi
module = qknorm_tvm.load(sys.argv[1])
function = module.apply_qk_rms_norm
set_threads = module.library.get_function("qknorm_set_num_threads")
pairs = list(itertools.product(("bfloat16", "float16", "float32"), repeat=2))
cases = []
for seed in range(200):
    rng = np.random.default_rng(seed)
    # The last ten are enough for several threads.
    rows = int(rng.integers(0, 9)) if seed < 190 else 300
    q_cols, k_cols = map(int, rng.integers(1, 200 if seed < 190 else 900, 2))
    cases.append(make_case(rows, q_cols, k_cols, *pairs[seed % 9], seed=seed))
wrong = make_case(3, 33, 5)
wrong.gamma_k = np.ones(6, np.float32)
wrong = [RawTensor(one) for one in wrong.tensors]

def call(i):
    case = cases[i % 190 if i % 50 else 190 + i // 50 % 10]
    # New tensors for every call, as from an interpreter that makes them.
    tensors, alive = ffi_tensors(case.tensors)
    function(*tensors, 1e-6)
    if i % 10 == 0:
        try:
            function(*map(tvm_ffi.from_dlpack, wrong), 1e-6)
        except ValueError:
            pass
        else:
            raise AssertionError("accepted")
    if i % 100 == 0:
        set_threads(i // 100 % 4)
    if i % 5000 < 200:
        case.q_out[...] = 0
        function(*tensors, 1e-6)
        exact((case.q_out, case.k_out), case)

soak(call, int(sys.argv[2]))
"""
)

_FAST = (
    _COMMON
    + """
import tvm_ffi
function = qknorm_tvm.load(sys.argv[1]).apply_qk_rms_norm
cases = [make_case(rows, 33, 5) for rows in range(40)]
kept = [[RawTensor(one) for one in case.tensors] for case in cases]
lists = [[tvm_ffi.from_dlpack(one) for one in some] + [1e-6] for some in kept]
expected = [case.expected() for case in cases]

def call(i):
    function(*lists[i % 40])

soak(call, int(sys.argv[2]))
for case, wanted in zip(cases, expected):
    for got, want in zip((case.q_out, case.k_out), wanted):
        assert reference.differing(got, want) == 0
"""
)

_API = (
    _COMMON
    + """
if len(sys.argv) > 3:
    import torch
    from support import to_torch, from_torch
    def given(case):
        return [to_torch(x) for x in (case.q, case.k, case.qk_var, case.gamma_q, case.gamma_k)]
else:
    def given(case):
        return case.q, case.k, case.qk_var, case.gamma_q, case.gamma_k
    from_torch = lambda array: array
qknorm_tvm.use(qknorm_tvm.load(sys.argv[1]))
cases = [
    make_case(seed % 9, 1 + seed % 67, 1 + seed % 31, *(("bfloat16",), ("float32",))[seed % 2])
    for seed in range(300)
]
arguments = [given(case) for case in cases]
outputs = [qknorm_tvm.apply_qk_rms_norm(*one) for one in arguments]
short = [list(one) for one in arguments]
for one in short:
    one[4] = one[4][:0]

def call(i):
    which = i % 300
    if i % 3:
        q_out, k_out = outputs[which]
        out = qknorm_tvm.apply_qk_rms_norm(*arguments[which], q_out=q_out, k_out=k_out)
    else:
        out = qknorm_tvm.apply_qk_rms_norm(*arguments[which])
    if i % 7 == 0:
        try:
            qknorm_tvm.apply_qk_rms_norm(*short[which])
        except ValueError:
            pass
        else:
            raise AssertionError("accepted")
    if i % 5000 < 300:
        exact([from_torch(one) for one in out], cases[which])

soak(call, int(sys.argv[2]))
assert "tvm" not in sys.modules
"""
)


def _bfloat16() -> Path:
    return compiled("fast", KernelSpec(in_dtype="bfloat16", q_cols=33, k_cols=5))


@pytest.mark.slow
def test_raw_calls_with_new_tensors_shapes_and_errors() -> None:
    """A descriptor, a shape or an error object leaked a call; a thread for each setting."""
    done = run_python(_RAW, str(open_columns()), str(12_000 * _TIMES), timeout=900)
    print(done.stdout)


@pytest.mark.slow
def test_raw_calls_alone() -> None:
    """The same in the calls that cost nothing else."""
    done = run_python(_FAST, str(_bfloat16()), str(150_000 * _TIMES), timeout=900)
    print(done.stdout)


@pytest.mark.slow
@pytest.mark.frameworks
@pytest.mark.parametrize("framework", ["numpy", "torch"])
def test_calls_of_the_api(framework: str) -> None:
    """An entry remembered for each call; outputs or views that are never freed."""
    arguments = [str(open_columns()), str(20_000 * _TIMES)]
    code = _API
    if framework == "torch":
        pytest.importorskip("torch", reason="makes torch tensors, and torch is not installed")
        code = 'del sys.modules["torch"]\n' + _API  # run_python leaves it out
        arguments.append("torch")
    done = run_python(code, *arguments, timeout=900)
    print(done.stdout)
