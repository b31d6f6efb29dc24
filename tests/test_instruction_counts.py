"""Instructions that CPU modules execute, counted by valgrind: slower code is seen without a clock.

Counts are of the levels that valgrind can run; AVX-512 is not among them. The code of a level
depends on TVM (its LLVM) alone, the entry point's on the C compiler too. After a change that is
meant, and at a new version of TVM, count again and copy the tables into this file::

    python tests/test_instruction_counts.py
"""

from __future__ import annotations

import dataclasses
import functools
import importlib.metadata
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
from support import compiled, needs_level

from qknorm_tvm import KernelSpec

#: The versions that the tables were made with; gcc matters for `FIXED` only.
TVM_VERSION, GCC_VERSION = "0.27.0", "12"
#: Values of M.
ROWS = (1, 16, 256)
#: Instructions of a call, less those of `FIXED`, over its elements: operation, level, dtype -> at
#: each M of `ROWS`. So what the entry point does shows in `FIXED` alone.
PER_ELEMENT: dict[tuple[str, str, str], tuple[float, ...]] = {
    ("apply_qk_rms_norm", "x86-64-v3", "bfloat16"): (1.655, 1.156, 1.111),
    ("apply_qk_rms_norm", "x86-64-v3", "float16"): (0.514, 0.601, 0.6053),
    ("apply_qk_rms_norm", "x86-64-v3", "float32"): (0.3744, 0.4375, 0.4402),
    ("apply_qk_rms_norm", "x86-64-v2", "bfloat16"): (3.916, 2.692, 2.586),
    ("apply_qk_rms_norm", "x86-64-v2", "float16"): (47.96, 48.13, 48.14),
    ("apply_qk_rms_norm", "x86-64-v2", "float32"): (1.352, 1.523, 1.532),
    ("row_mean_of_squares_qk", "x86-64-v3", "bfloat16"): (0.1518, 0.387, 0.4004),
    ("row_mean_of_squares_qk", "x86-64-v3", "float32"): (0.06138, 0.2966, 0.31),
    ("qk_rms_norm", "x86-64-v3", "bfloat16"): (1.821, 1.502, 1.468),
    ("qk_rms_norm", "x86-64-v3", "float32"): (0.4487, 0.7224, 0.7384),
}
#: Instructions of a call at M = 1 with 32 columns each: nearly all are the entry point's, but for
#: the additions across a sum's lanes.
FIXED: dict[tuple[str, str], int] = {
    ("apply_qk_rms_norm", "x86-64-v3"): 2259,
    ("apply_qk_rms_norm", "x86-64-v2"): 2412,
    ("row_mean_of_squares_qk", "x86-64-v3"): 1529,
    ("qk_rms_norm", "x86-64-v3"): 2456,
}
#: What a count may exceed its table by.
ELEMENT_SLACK, FIXED_SLACK = 0.05, 0.10

#: What is counted: operation, level -> dtypes.
DTYPES: dict[tuple[str, str], tuple[str, ...]] = {
    ("apply_qk_rms_norm", "x86-64-v3"): ("bfloat16", "float16", "float32"),
    ("apply_qk_rms_norm", "x86-64-v2"): ("bfloat16", "float16", "float32"),
    ("row_mean_of_squares_qk", "x86-64-v3"): ("bfloat16", "float32"),
    ("qk_rms_norm", "x86-64-v3"): ("bfloat16", "float32"),
}
Q_COLS, K_COLS = 1536, 256
UPDATE = "if that is meant, run python tests/test_instruction_counts.py and copy its tables here"

#: Calls a module as C does: `calls` times inside `measured`, which callgrind watches.
DRIVER = r"""
#include <dlfcn.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <tvm/ffi/c_api.h>

typedef int (*entry)(void*, const TVMFFIAny*, int32_t, TVMFFIAny*);

__attribute__((noinline)) void measured(entry called, const TVMFFIAny* arguments, int count,
                                        int calls) {
  for (int i = 0; i < calls; ++i) {
    TVMFFIAny result = {0};
    if (called(NULL, arguments, count, &result)) abort();
  }
}

static TVMFFIAny tensor(DLDataType type, int64_t rows, int64_t cols, int ndim) {
  DLTensor* t = calloc(1, sizeof *t);
  int64_t* shape = calloc(4, sizeof *shape);
  size_t size = (size_t)(rows * cols * type.bits / 8);
  shape[0] = ndim == 2 ? rows : cols;
  shape[1] = cols;
  shape[2] = ndim == 2 ? cols : 1;
  shape[3] = 1;
  t->data = aligned_alloc(64, (size + 63) / 64 * 64);
  memset(t->data, 0x3c, size); /* small normal numbers in every type */
  t->device.device_type = kDLCPU;
  t->ndim = ndim;
  t->dtype = type;
  t->shape = shape;
  t->strides = shape + 2;
  TVMFFIAny any = {0};
  any.type_index = kTVMFFIDLTensorPtr;
  any.v_ptr = t;
  return any;
}

/* driver libtvm_ffi.so, operation, then for each case:
 * module.so, DLPack type code, bits, Nq, Nk, M, calls */
int main(int argc, char** argv) {
  if (!dlopen(argv[1], RTLD_NOW | RTLD_GLOBAL)) return fputs(dlerror(), stderr), 1;
  int apply = !strcmp(argv[2], "apply_qk_rms_norm"), fused = !strcmp(argv[2], "qk_rms_norm");
  char symbol[64];
  snprintf(symbol, sizeof symbol, "__tvm_ffi_%s", argv[2]);
  for (char** at = argv + 3; at + 6 < argv + argc; at += 7) {
    void* module = dlopen(at[0], RTLD_NOW | RTLD_LOCAL);
    if (!module) return fputs(dlerror(), stderr), 1;
    entry called = (entry)dlsym(module, symbol);
    if (!called) return fputs(dlerror(), stderr), 1;
    DLDataType type = {(uint8_t)atoi(at[1]), (uint8_t)atoi(at[2]), 1}, float32 = {kDLFloat, 32, 1};
    int64_t nq = atoi(at[3]), nk = atoi(at[4]), m = atoi(at[5]);
    TVMFFIAny arguments[8] = {0};
    int count = 0;
    if (apply || fused) {
      arguments[count++] = tensor(type, m, nq, 2);
      arguments[count++] = tensor(type, m, nk, 2);
      arguments[count++] = tensor(float32, 1, nq, 1);
      arguments[count++] = tensor(float32, 1, nk, 1);
    }
    if (!fused) arguments[count++] = tensor(float32, m, 2, 2);
    arguments[count++] = tensor(type, m, nq, 2);
    arguments[count++] = tensor(type, m, nk, 2);
    if (apply || fused) {
      arguments[count].type_index = kTVMFFIFloat;
      arguments[count++].v_float64 = 1e-6;
    }
    /* What the first calls set up is not counted. */
    for (int i = 0; i < 3; ++i) {
      TVMFFIAny result = {0};
      if (called(NULL, arguments, count, &result)) return fputs("the call failed\n", stderr), 1;
    }
    measured(called, arguments, count, atoi(at[6]));
  }
  return 0;
}
"""


@dataclasses.dataclass(frozen=True)
class Counted:
    """Instructions of one call: by (dtype, M), and with next to no columns."""

    calls: dict[tuple[str, int], int]
    fixed: int

    def per_element(self, dtype: str) -> tuple[float, ...]:
        elements = Q_COLS + K_COLS
        return tuple((self.calls[dtype, m] - self.fixed) / (m * elements) for m in ROWS)


def _needs(tool: str) -> str:
    path = shutil.which(tool)
    if path is None:
        pytest.skip(f"counts instructions with {tool}, which is not installed")
    return path


@functools.cache
def _driver() -> Path:
    from tvm_ffi import libinfo

    folder = Path(tempfile.mkdtemp(prefix="driver-", dir=os.environ["QKNORM_TVM_TEST_SESSION"]))
    source, out = folder / "driver.c", folder / "driver"
    source.write_text(DRIVER)
    command = [_needs("gcc"), "-O1", "-w", str(source), "-o", str(out), "-ldl"]
    command += ["-I", libinfo.find_include_path(), "-I", libinfo.find_dlpack_include_path()]
    subprocess.run(command, check=True)
    return out


def _events(path: Path) -> int:
    """Return what a dump of callgrind counted."""
    total = re.search(r"^(?:totals|summary): (\d+)$", path.read_text(), re.MULTILINE)
    assert total, f"{path.name} holds no total"
    return int(total[1])


@functools.cache
def counted(op: str, level: str) -> Counted:
    """Count every case of an operation and a level in one process."""
    from tvm_ffi import libinfo

    needs_level(level)
    valgrind = _needs("valgrind")
    dtypes = DTYPES[op, level]
    specs = [
        KernelSpec(op=op, in_dtype=dtype, q_cols=Q_COLS, k_cols=K_COLS, target=level)
        for dtype in dtypes
    ]
    # Apart: what a module's search among several specs takes is not every module's.
    modules = [compiled(f"counted-{spec.digest}", spec) for spec in specs]
    tiny = KernelSpec(op=op, q_cols=32, k_cols=32, target=level)
    code = {"bfloat16": ("4", "16"), "float16": ("2", "16"), "float32": ("2", "32")}
    cases: list[tuple[str, int]] = []
    words: list[str] = []
    calls: list[int] = []
    for dtype, module in zip(dtypes, modules, strict=True):
        for m in ROWS:
            cases.append((dtype, m))
            calls.append(20 if m == 1 else 1)
            words += [str(module), *code[dtype], str(Q_COLS), str(K_COLS), str(m), str(calls[-1])]
    calls.append(20)
    words += [
        str(compiled(f"counted-{tiny.digest}", tiny)),
        *code["bfloat16"],
        "32",
        "32",
        "1",
        "20",
    ]
    folder = Path(tempfile.mkdtemp(prefix="counts-", dir=os.environ["QKNORM_TVM_TEST_SESSION"]))
    done = subprocess.run(
        [
            *(valgrind, "--tool=callgrind", "--collect-atstart=no", "--toggle-collect=measured"),
            *("--dump-after=measured", f"--callgrind-out-file={folder / 'dump'}"),
            *(str(_driver()), libinfo.find_libtvm_ffi(), op, *words),
        ],
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
        env={**os.environ, "TVM_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr[-2000:]
    dumps = sorted(folder.glob("dump.*"), key=lambda path: int(path.suffix[1:]))
    assert len(dumps) >= len(calls), [path.name for path in dumps]
    each = [_events(path) // n for path, n in zip(dumps, calls, strict=False)]
    return Counted(dict(zip(cases, each, strict=False)), each[-1])


def _versions() -> str:
    tvm = importlib.metadata.version("apache-tvm")
    return f"counted with TVM {tvm} and gcc {_gcc()}, the table with {TVM_VERSION}, {GCC_VERSION}"


def _gcc() -> str:
    return subprocess.run(
        ["gcc", "-dumpversion"], capture_output=True, text=True, check=True
    ).stdout.strip()


def check(label: str, count: float, wanted: float, slack: float, unit: str) -> None:
    """Fail where a count is beyond its table's."""
    bound = wanted * (1 + slack)
    assert count <= bound, (
        f"{label}: {count:.4g} {unit}, at most {bound:.4g} ({wanted:.4g} + {slack:.0%}); "
        f"{_versions()}; {UPDATE}"
    )


@pytest.mark.slow
@pytest.mark.parametrize(("op", "level", "dtype"), PER_ELEMENT)
def test_instructions_of_an_element(op: str, level: str, dtype: str) -> None:
    """Code that got slower: a conversion that is a call, scalar code, vectors of half the width."""
    counts = counted(op, level).per_element(dtype)
    for m, count, wanted in zip(ROWS, counts, PER_ELEMENT[op, level, dtype], strict=True):
        label = f"{op}, {level} {dtype}, M = {m}"
        check(label, count, wanted, ELEMENT_SLACK, "instructions an element")


@pytest.mark.slow
@pytest.mark.parametrize(("op", "level"), FIXED)
def test_fixed_instructions_of_a_call(op: str, level: str) -> None:
    """Checks that are made twice, a search that got longer: what each decode step pays."""
    count = counted(op, level).fixed
    label = f"{op}, {level}, a call with M = 1 and 32/32 columns"
    check(label, count, FIXED[op, level], FIXED_SLACK, "instructions")


def test_more_instructions_than_the_table_fail_and_say_what_to_do() -> None:
    check("case", 1.05, 1.0, 0.05, "instructions an element")
    with pytest.raises(AssertionError, match=r"case: 1\.06 .* at most 1\.05 .* copy its tables"):
        check("case", 1.06, 1.0, 0.05, "instructions an element")


def _print_tables() -> None:
    tables = {key: counted(*key) for key in DTYPES}
    tvm = importlib.metadata.version("apache-tvm")
    print(f'TVM_VERSION, GCC_VERSION = "{tvm}", "{_gcc()}"')
    print("PER_ELEMENT: dict[tuple[str, str, str], tuple[float, ...]] = {")
    for (op, level), dtypes in DTYPES.items():
        for dtype in dtypes:
            figures = ", ".join(f"{x:.4g}" for x in tables[op, level].per_element(dtype))
            print(f'    ("{op}", "{level}", "{dtype}"): ({figures}),')
    print("}")
    print("FIXED: dict[tuple[str, str], int] = {")
    for (op, level), table in tables.items():
        print(f'    ("{op}", "{level}"): {table.fixed},')
    print("}")


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as session:
        # As tests/conftest.py does: no records of the machine at hand.
        os.environ["QKNORM_TVM_TEST_SESSION"] = session
        os.environ["QKNORM_TVM_CACHE_DIR"] = os.path.join(session, "cache")
        os.environ["QKNORM_TVM_TUNING_LOGS"] = ""
        os.environ.pop("QKNORM_TVM_DISABLE_CPU_FEATURES", None)
        try:
            _print_tables()
        except pytest.skip.Exception as reason:
            sys.exit(str(reason))
