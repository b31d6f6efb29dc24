"""Thread settings before a module is loaded: by the pool's own rules, and without a compiler."""

from __future__ import annotations

import os

import pytest
from support import run_python, smallest

#: What Python says without a module, then what the pool of one says.
_BOTH = """
import sys, qknorm_tvm, tvm_ffi
before = qknorm_tvm.get_num_threads()
assert "tvm" not in sys.modules, "a compiler was loaded to ask for a number"
print(before, tvm_ffi.load_module(sys.argv[1]).qknorm_get_num_threads())
"""


@pytest.mark.parametrize(
    "text", ["", "0", "-3", "many", "1", "5", " 7 ", "+2", "3x", "0x10", "1024", "100000",
             "4294967299", "99999999999999999999"]
)  # fmt: skip
def test_the_default_is_the_pools(text: str) -> None:
    """Two computations of one default that differ."""
    done = run_python(_BOTH, str(smallest()), env={"TVM_NUM_THREADS": text})
    before, after = map(int, done.stdout.split())
    assert before == after >= 1


def test_the_default_is_the_pools_with_fewer_processors() -> None:
    code = f"import os; os.sched_setaffinity(0, {{min(os.sched_getaffinity(0))}})\n{_BOTH}"
    assert (
        run_python(code, str(smallest()), env={"TVM_NUM_THREADS": ""}).stdout.split() == ["1"] * 2
    )


def test_asking_compiles_nothing(tmp_path: object) -> None:
    """`get_num_threads()` that compiles a kernel: seconds, and an error where there is no gcc."""
    code = """
import os, qknorm_tvm
assert qknorm_tvm.get_num_threads() >= 1
qknorm_tvm.set_num_threads(3)
assert qknorm_tvm.get_num_threads() == 3
qknorm_tvm.set_num_threads(0)
assert not os.listdir(os.environ["QKNORM_TVM_CACHE_DIR"])
"""
    run_python(code, env={"QKNORM_TVM_CACHE_DIR": str(tmp_path), "PATH": os.devnull})


def test_a_number_asked_for_before_reaches_the_pool() -> None:
    """A setting that is dropped because there was no pool yet."""
    code = """
import sys, qknorm_tvm
qknorm_tvm.set_num_threads(3)
module = qknorm_tvm.load(sys.argv[1])
get = module.library.get_function("qknorm_get_num_threads")
assert (get(), qknorm_tvm.get_num_threads()) == (3, 3)
qknorm_tvm.set_num_threads(5)
assert get() == 5
module.library.get_function("qknorm_set_num_threads")(2)
assert qknorm_tvm.get_num_threads() == 2
"""
    run_python(code, str(smallest()))
