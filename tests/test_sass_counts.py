"""Instructions and registers of CUDA kernels: slower code is seen without a clock or a GPU.

Counted in what nvcc makes for sm_90 of the shapes that matter: every kernel of every operation. A
count is of a kernel's code, not of what a thread executes: it shows accesses that fell apart, a
conversion in steps, a loop that is unrolled further, a branch that is there twice. After a change
that is meant, and at a new version of nvcc or TVM, count again and copy the tables into this file::

    python tests/test_sass_counts.py
"""

from __future__ import annotations

import importlib.metadata
import os
import re
import sys
import tempfile

import pytest
from cuda_code import (
    FUSED,
    MODULES,
    OPERATIONS,
    STATISTICS,
    Used,
    built,
    disassembled,
    instruction_counts,
    kernels_of,
    nvcc_version,
    used,
)

from qknorm_tvm import KernelSpec

#: The versions that the table was made with.
NVCC_VERSION, TVM_VERSION = "13.0.88", "0.27.0"
#: Operation, columns of Q and K, in bfloat16 -> by kernel: instructions, registers of a thread.
KERNELS: dict[tuple[str, int, int], dict[str, tuple[int, int]]] = {
    ("apply_qk_rms_norm", 1536, 256): {
        "prefill": (145, 32),
        "resident": (357, 32),
        "batch": (145, 28),
        "decode": (161, 32),
        "general_prefill": (287, 32),
        "general": (141, 21),
    },
    ("apply_qk_rms_norm", 6144, 1024): {
        "prefill": (156, 32),
        "batch": (157, 28),
        "decode": (156, 32),
        "general_prefill": (333, 30),
        "general": (154, 24),
    },
    ("row_mean_of_squares_qk", 1536, 256): {
        "batch": (636, 26),
        "decode": (321, 18),
        "general": (1021, 40),
    },
    ("row_mean_of_squares_qk", 6144, 1024): {
        "decode": (465, 22),
        "general": (1363, 70),
    },
    ("qk_rms_norm", 1536, 256): {
        "batch": (822, 32),
        "decode": (387, 38),
        "general": (1260, 72),
    },
    ("qk_rms_norm", 6144, 1024): {
        "batch": (902, 32),
        "decode": (614, 61),
        "general": (1934, 140),
    },
}
#: What instructions may exceed their table by. A warp takes registers by eights of each thread, so
#: that those up to the next eight cost nothing.
SLACK, REGISTERS_UNIT = 0.05, 8

#: What is counted.
COLUMNS = ((1536, 256), (6144, 1024))
SHAPES = [(op, *columns) for op in OPERATIONS for columns in COLUMNS]
UPDATE = "if that is meant, run python tests/test_sass_counts.py and copy its tables here"


def _module(op: str) -> str:
    return "statistics" if op in (STATISTICS, FUSED) else "apply"


def counted(op: str, q_cols: int, k_cols: int) -> dict[str, tuple[int, Used]]:
    """Count the instructions of a shape's kernels, and return what ptxas says of them."""
    shape = KernelSpec(op=op, q_cols=q_cols, k_cols=k_cols, target=MODULES["apply"][0].target)
    name = _module(op)
    cubin, log = built(name).device_code("cubin", "sm_90")
    counts, about = instruction_counts(cubin), used(log)
    return {
        variant.name: (counts[kernel], about[kernel])
        for kernel, (spec, variant) in kernels_of(name).items()
        if spec == shape
    }


def _versions() -> str:
    tvm = importlib.metadata.version("apache-tvm")
    return (
        f"with nvcc {nvcc_version()} and TVM {tvm}, the table with {NVCC_VERSION} and {TVM_VERSION}"
    )


def check(label: str, instructions: int, kernel: Used, wanted: tuple[int, int]) -> None:
    """Fail where a kernel is beyond its table."""
    bound = int(wanted[0] * (1 + SLACK))
    assert instructions <= bound, (
        f"{label}: {instructions} instructions, at most {bound} ({wanted[0]} + {SLACK:.0%}); "
        f"{_versions()}; {UPDATE}"
    )
    most = -(-wanted[1] // REGISTERS_UNIT) * REGISTERS_UNIT
    assert kernel.registers <= most, (
        f"{label}: {kernel.registers} registers, at most {most} ({wanted[1]}, taken by "
        f"{REGISTERS_UNIT}s); {_versions()}; {UPDATE}"
    )
    assert kernel.local_memory == 0, f"{label}: {kernel}, and no local memory is allowed"


@pytest.mark.slow
@pytest.mark.parametrize(("op", "q_cols", "k_cols"), SHAPES)
def test_instructions_and_registers(op: str, q_cols: int, k_cols: int) -> None:
    """Code that got slower; more registers, so that fewer warps fit a multiprocessor; spills."""
    counts, table = counted(op, q_cols, k_cols), KERNELS.get((op, q_cols, k_cols), {})
    assert list(counts) == list(table), f"these are not the table's kernels; {UPDATE}"
    for name, (instructions, kernel) in counts.items():
        check(f"{op}, {q_cols}/{k_cols}, {name}", instructions, kernel, table[name])


def test_more_than_the_table_fails_and_says_what_to_do() -> None:
    check("case", 105, Used(0, 0, 0, 24), (100, 17))
    with pytest.raises(AssertionError, match=r"case: 106 instr.* at most 105 .* copy its tables"):
        check("case", 106, Used(0, 0, 0, 24), (100, 17))
    with pytest.raises(AssertionError, match=r"case: 25 registers, at most 24 .* copy its tables"):
        check("case", 105, Used(0, 0, 0, 25), (100, 17))
    with pytest.raises(AssertionError, match=r"case: .*spill_loads=4.*no local memory"):
        check("case", 105, Used(0, 0, 4, 24), (100, 17))


@pytest.mark.slow
def test_counts_are_those_of_nvdisasm() -> None:
    """A file that is read wrongly."""
    cubin, _ = built("statistics").device_code("cubin", "sm_90")
    counts = instruction_counts(cubin)
    texts = disassembled(cubin)
    assert set(texts) == set(counts)
    for name, text in texts.items():
        lines = re.findall(r"^\s+/\*[0-9a-f]{4,}\*/\s+(.*?) *;", text, flags=re.MULTILINE)
        while re.match("NOP|BRA", lines[-1]):
            lines.pop()
        assert counts[name] == len(lines) > 50, name


def _print_tables() -> None:
    tvm = importlib.metadata.version("apache-tvm")
    print(f'NVCC_VERSION, TVM_VERSION = "{nvcc_version()}", "{tvm}"')
    print("KERNELS: dict[tuple[str, int, int], dict[str, tuple[int, int]]] = {")
    for shape in SHAPES:
        op, q_cols, k_cols = shape
        print(f'    ("{op}", {q_cols}, {k_cols}): {{')
        for name, (instructions, kernel) in counted(*shape).items():
            print(f'        "{name}": ({instructions}, {kernel.registers}),')
        print("    },")
    print("}")


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as session:
        # As tests/conftest.py does: no records of the machine at hand.
        os.environ["QKNORM_TVM_TEST_SESSION"] = session
        os.environ["QKNORM_TVM_TUNING_LOGS"] = ""
        try:
            _print_tables()
        except pytest.skip.Exception as reason:
            sys.exit(str(reason))
