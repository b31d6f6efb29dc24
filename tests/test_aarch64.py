"""AArch64 modules: built here, run under qemu-user (or on the machine itself), compared bit by bit.

qemu computes floating point as the architecture says, NaNs and denormals included.
"""

from __future__ import annotations

import functools
import itertools
import re
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import aarch64
import numpy as np
import pytest
from aarch64 import AArch64, Request
from support import (
    DTYPES,
    NAMES,
    PAIRINGS,
    Case,
    bits_of,
    compiled,
    filled,
    make_case,
    misaligned,
    random_values,
    specs_of,
)

from qknorm_tvm import BuildError, KernelSpec, ModuleFileError, compile, load, targets
from qknorm_tvm.check import reference
from qknorm_tvm.check.cases import Case as VerifyCase
from qknorm_tvm.check.cases import pattern_case, shape_case
from qknorm_tvm.check.expected import Graph, outputs_of
from qknorm_tvm.check.layouts import Placed
from qknorm_tvm.check.special_values import GAMMAS
from qknorm_tvm.check.verification import describe_difference
from qknorm_tvm.cli import main
from qknorm_tvm.load.module_file import machine_of, read_metadata
from qknorm_tvm.schedules.cpu_config import CpuConfig

TARGET = "aarch64"
SPEC = KernelSpec(q_cols=1536, k_cols=256, target=TARGET)
#: Columns, fixed and open, of every kind of rest: none, less than a vector, less than a lane.
COLUMNS = ((1, 7), (7, 257), (256, 64), (1025, 8))
slow = pytest.mark.slow


@pytest.fixture(scope="module")
def machine() -> AArch64:
    return aarch64.find()


@functools.cache
def _module(name: str, *specs: KernelSpec, config: CpuConfig | None = None) -> Path:
    aarch64.cross_compiler()
    return compiled(f"aarch64-{name}", *specs, config=config)


def _applying(in_dtype: str) -> Path:
    """One file for every output of an input with open columns, and for bfloat16 with fixed ones."""
    fixed = specs_of([("bfloat16", "bfloat16")], [*COLUMNS, (1536, 256)], TARGET)
    pairings = [pairing for pairing in PAIRINGS if pairing[0] == in_dtype]
    return _module(
        f"apply-{in_dtype}",
        *(fixed if in_dtype == "bfloat16" else ()),
        *specs_of(pairings, [(None, None)], TARGET),
    )


def _others(in_dtype: str) -> Path:
    """One file of the statistics and of the fused operation."""
    specs = [
        KernelSpec(op=op, in_dtype=in_dtype, q_cols=q_cols, k_cols=k_cols, target=TARGET)
        for op in ("row_mean_of_squares_qk", "qk_rms_norm")
        for q_cols, k_cols in ((None, None), (1536, 1024))
    ]
    return _module(f"others-{in_dtype}", *specs)


def _check(
    machine: AArch64, module: Path, case: VerifyCase, layouts: Sequence[str], threads: Sequence[int]
) -> int:
    """Run a case in each layout on each number of threads; returns the elements compared."""
    inputs = case.make()
    expected = reference.apply_qk_rms_norm(
        inputs.q, inputs.k, inputs.qk_var, inputs.gamma_q, inputs.gamma_k, inputs.epsilon,
        case.spec.out_dtype,
    )  # fmt: skip
    placed, requests = [], []
    for layout in layouts:
        for count in threads:
            copy = Placed(case.spec, inputs, layout)
            placed.append((copy, f"{case.description}; {layout}, {count} threads"))
            tensors = tuple(copy.arrays[name] for name in NAMES)
            requests.append(Request("apply_qk_rms_norm", tensors, inputs.epsilon, count))
    assert machine.call(module, *requests) == [""] * len(requests)
    compared = 0
    for copy, where in placed:
        for name, wanted in zip(("q_out", "k_out"), expected, strict=True):
            actual = copy.arrays[name]
            if reference.differing(actual, wanted):
                pytest.fail(f"{where}: {describe_difference(name, inputs, actual, wanted)}")
            compared += wanted.size
        assert copy.guards_intact(), f"{where}: memory that is no output was written to"
    return compared


# ---- exactness -----------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("gamma", range(0, len(GAMMAS), 2))
@pytest.mark.parametrize("out_dtype", ["bfloat16", "float32"])
def test_every_bfloat16_pattern(machine: AArch64, out_dtype: str, gamma: int) -> None:
    """A NaN rounded to a number, a denormal flushed, an estimate of the root."""
    spec = KernelSpec(out_dtype=out_dtype, target=TARGET)
    case = pattern_case(spec, 1536, 256, gamma)
    assert _check(machine, _applying("bfloat16"), case, ["packed"], [1]) > 13 << 16


@pytest.mark.slow
@pytest.mark.parametrize(
    ("in_dtype", "out_dtype"), [("float16", "float16"), ("float16", "bfloat16")]
)
def test_every_float16_pattern(machine: AArch64, in_dtype: str, out_dtype: str) -> None:
    """float16 arithmetic, or a conversion that rounds or flushes otherwise."""
    spec = KernelSpec(in_dtype=in_dtype, out_dtype=out_dtype, target=TARGET)
    case = pattern_case(spec, 1536, 257, 4)
    assert _check(machine, _applying(in_dtype), case, ["packed"], [1]) > 13 << 16


@pytest.mark.slow
@pytest.mark.parametrize("out_dtype", ["bfloat16", "float16"])
def test_float32_patterns(machine: AArch64, out_dtype: str) -> None:
    """A payload of 0x7fffffff that rounds to -0, and ties of both roundings."""
    spec = KernelSpec(in_dtype="float32", out_dtype=out_dtype, target=TARGET)
    case = pattern_case(spec, 6144, 1024, 3)
    assert _check(machine, _applying("float32"), case, ["packed"], [1]) > 13 * 6 << 16


@pytest.mark.parametrize(
    ("in_dtype", "out_dtype"),
    [pytest.param(*pair, marks=() if pair == ("bfloat16",) * 2 else slow) for pair in PAIRINGS],
)
def test_shapes_and_layouts(machine: AArch64, in_dtype: str, out_dtype: str) -> None:
    """Columns beyond the last vector, rows beyond the last tile, places at every alignment."""
    spec = KernelSpec(in_dtype=in_dtype, out_dtype=out_dtype, target=TARGET)
    for q_cols, k_cols in COLUMNS:
        for rows in (0, 1, 4, 17):
            case = shape_case(spec, rows, q_cols, k_cols)
            _check(machine, _applying(in_dtype), case, case.layouts, [1])


@pytest.mark.parametrize("layout", ["packed", "strided"])
def test_two_threads(machine: AArch64, layout: str) -> None:
    """Tasks lost or done twice by the pool, whose atomics are other instructions there."""
    case = shape_case(SPEC, 513, 1536, 256)
    compared = _check(machine, _applying("bfloat16"), case, [layout], [1, 2, 3, 2])
    assert compared == 4 * 513 * (1536 + 256)


#: Bits of FPCR: flush to zero; rounding up and down; default NaNs; several.
_MODES = {"flush": 1 << 24, "up": 1 << 22, "down": 2 << 22, "nan": 1 << 25, "all": 0x3400000}


@pytest.mark.slow
@pytest.mark.parametrize("mode", _MODES)
def test_bits_do_not_depend_on_a_callers_mode(machine: AArch64, mode: str) -> None:
    """A pool whose threads keep the mode of whoever called first: wrong bits for all others.

    The program that calls also checks that no call changes its mode or leaves a flag.
    """
    rows, threads = 96, 3
    case = make_case(rows, 1536, 1024)
    case.gamma_q[::3] *= np.float32(2.0**-126)  # denormal outputs
    case.gamma_k[::3] *= np.float32(2.0**-126)
    q, k = (_rows_of("bfloat16", n, rows, 0, wild=False) for n in (1536, 1024))
    var = reference.row_mean_of_squares_qk(q, k)
    gammas = case.gamma_q, case.gamma_k
    fused = [reference.rms_norm(x, var[:, i], gammas[i], 1e-6, "bfloat16")
             for i, x in enumerate((q, k))]  # fmt: skip
    for module, op in (
        (_applying("bfloat16"), "apply_qk_rms_norm"),
        (_others("bfloat16"), "row_mean_of_squares_qk"),
        (_others("bfloat16"), "qk_rms_norm"),
    ):
        requests, results = [], []
        for bits in (_MODES[mode], 0, _MODES[mode], 0):
            if op == "row_mean_of_squares_qk":
                outs = [filled((rows, 2), "float32")]
                arguments: list[Any] = [*outs, q, k]
                wanted = [var]
            else:
                outs = [filled(x.shape, "bfloat16") for x in (q, k)]
                inputs = (case.qk_var, case.q, case.k) if op == "apply_qk_rms_norm" else (q, k)
                arguments = [*outs, *gammas, *inputs]
                wanted = list(case.expected()) if op == "apply_qk_rms_norm" else fused
            epsilon = None if op == "row_mean_of_squares_qk" else 1e-6
            requests.append(Request(op, arguments, epsilon, threads, bits))
            results.append((outs, wanted))
        assert machine.call(module, *requests) == [""] * len(requests)
        wrong = [sum(map(reference.differing, *pair)) for pair in results]
        assert wrong == [0] * 4, (op, wrong)


@pytest.mark.slow
def test_stores_past_the_caches(machine: AArch64) -> None:
    """The one config that no default has: another way to store, on aligned rows alone."""
    config = CpuConfig(vector=8, row_tile=4, streaming_bytes=1, bytes_per_task=1)
    module = _module("stream", SPEC, config=config)
    (level,) = read_metadata(module)["levels"]
    assert level["code"][0]["variants"] == ["stream", "tile", "row"]
    case = shape_case(SPEC, 18, 1536, 256)
    arrays = make_case(18, 1536, 256)
    for name in NAMES:
        setattr(arrays, name, misaligned(getattr(arrays, name), 0))
    _apply(machine, module, arrays, threads=2)
    _check(machine, module, case, ["packed", "misaligned"], [2])


@pytest.mark.slow
@pytest.mark.parametrize(("q_cols", "k_cols"), [(1536, 256), (1025, 7)])
def test_cast_before_gamma(machine: AArch64, q_cols: int, k_cols: int) -> None:
    """The rounding in the middle dropped, in a vector or in the columns beyond the last one."""
    spec = SPEC.replace(cast_before_gamma=True, q_cols=q_cols, k_cols=k_cols)
    pairs = list(itertools.product(("bfloat16", "float16"), DTYPES))
    specs = [spec.replace(in_dtype=a, out_dtype=b) for a, b in pairs]
    module = _module(f"cast-before-gamma-{q_cols}", *specs)
    for in_dtype, out_dtype in pairs:
        case = make_case(33, q_cols, k_cols, in_dtype, out_dtype)
        expected = reference.apply_qk_rms_norm(
            case.q, case.k, case.qk_var, case.gamma_q, case.gamma_k, case.epsilon, out_dtype,
            cast_before_gamma=True,
        )  # fmt: skip
        _apply(machine, module, case, expected=expected)


def _apply(
    machine: AArch64, module: Path, case: Case, *, expected: Any = None, threads: int = 1
) -> None:
    expected = expected or case.expected()
    request = Request("apply_qk_rms_norm", case.tensors, case.epsilon, threads)
    assert machine.call(module, request) == [""]
    for actual, wanted in zip((case.q_out, case.k_out), expected, strict=True):
        assert reference.differing(actual, wanted) == 0


def _rows_of(dtype: str, cols: int, rows: int, pad: int, *, wild: bool) -> np.ndarray:
    """Return rows of a wider array, of many magnitudes; every fourth may hold anything."""
    rng = np.random.default_rng([cols, rows, pad])
    padded = random_values(rng, (rows, cols + pad), dtype)
    if not wild:
        tame = rng.standard_normal((rows, cols + pad), np.float32)
        keep = np.arange(rows) % 4 != 3
        padded[keep] = tame.astype(padded.dtype)[keep]
    return padded[:, :cols]


@pytest.mark.slow
@pytest.mark.parametrize(
    "dtype", [pytest.param(d, marks=() if d == "bfloat16" else slow) for d in DTYPES]
)
def test_statistics_and_the_fused_operation(machine: AArch64, dtype: str) -> None:
    """Another order of summation, a multiply-add that rounds twice, or one where none belongs."""
    requests, checks = [], []
    for q_cols, k_cols in ((1, 63), (64, 1023), (1025, 2048), (1536, 1024), (4097, 96)):
        for rows, pad in ((0, 0), (1, 0), (5, 3), (9, 0)):
            q, k = (_rows_of(dtype, n, rows, pad, wild=False) for n in (q_cols, k_cols))
            var = filled((rows, 2), "float32")
            wanted = reference.row_mean_of_squares_qk(q, k)
            requests.append(Request("row_mean_of_squares_qk", (var, q, k)))
            checks.append((f"statistics, M {rows}, {q_cols} and {k_cols}", var, wanted))
            gammas = [
                random_values(np.random.default_rng(n), (n,), "float32") for n in (q_cols, k_cols)
            ]
            outs = [filled(x.shape, dtype) for x in (q, k)]
            requests.append(Request("qk_rms_norm", (*outs, *gammas, q, k), 1e-6, 2))
            for column, (out, x, gamma) in enumerate(zip(outs, (q, k), gammas, strict=True)):
                normed = reference.rms_norm(x, wanted[:, column], gamma, 1e-6, dtype)
                checks.append((f"fused, M {rows}, {x.shape[1]} columns", out, normed))
    assert machine.call(_others(dtype), *requests) == [""] * len(requests)
    for where, actual, wanted in checks:
        assert reference.differing(actual, wanted) == 0, where


CACHE = KernelSpec(
    op="qk_rms_norm_rope_cache", q_cols=192, k_cols=128, head_dim=64, rotary_dim=32, target=TARGET
)


@pytest.mark.slow
@pytest.mark.parametrize(
    "spec",
    [
        CACHE.replace(statistics="local"),
        *(
            pytest.param(spec, marks=slow)
            for spec in (
                CACHE.replace(rotary_dim=64, interleaved=True, cache_dtype="float8_e4m3fn"),
                CACHE.replace(rotary_dim=0, writes_k_out=True, cast_before_gamma=True),
                CACHE.replace(
                    op="qk_rms_norm_rope", in_dtype="float16", out_dtype=None, cache_dtype=None,
                    rotary_dtype="float32",
                ),
                CACHE.replace(
                    in_dtype="float32", out_dtype=None, cache_dtype=None, rotary_dtype=None,
                    statistics="local",
                ),
            )
        ),
    ],
    ids=lambda spec: spec.digest,
)  # fmt: skip
def test_rotation_and_cache(machine: AArch64, spec: KernelSpec) -> None:
    """A product and a sum in one rounding; float8 of a quotient that is rounded otherwise."""
    module, graph = _module(spec.digest, spec), Graph()
    for rows in (0, 1, 7, 33):
        case = shape_case(spec, rows, 192, 128)
        inputs = case.make()
        expected = outputs_of(graph, inputs, spec)
        copies = [Placed(spec, inputs, layout) for layout in case.layouts for _ in range(2)]
        requests = [
            Request(
                spec.op,
                [copy.arrays.get(name) for name in spec.operation.tensors],
                inputs.epsilon,
                1 + index % 2,
            )
            for index, copy in enumerate(copies)
        ]
        assert machine.call(module, *requests) == [""] * len(requests)
        for copy in copies:
            for name, wanted in zip(spec.outputs, expected, strict=True):
                assert reference.differing(copy.arrays[name], wanted) == 0, (name, rows)
            assert copy.guards_intact(), rows


@pytest.mark.slow
def test_epsilon_is_added_to_the_rounded_mean(machine: AArch64) -> None:
    """See the test of this name in ``test_statistics.py``."""
    q, k = filled((1, 1536), "float32", 0), filled((1, 1024), "float32", 0)
    k[0, :3] = 2.0**-70
    gammas = [np.ones(n, np.float32) for n in (1536, 1024)]
    outs = [filled(x.shape, "float32") for x in (q, k)]
    request = Request("qk_rms_norm", (*outs, *gammas, q, k), 1e-45)
    assert machine.call(_others("float32"), request) == [""]
    var = reference.row_mean_of_squares_qk(q, k)
    wanted = reference.apply_qk_rms_norm(q, k, var, *gammas, 1e-45)
    assert reference.differing(outs[0], wanted[0]) == 0
    assert reference.differing(outs[1], wanted[1]) == 0


def test_statistics_of_every_bfloat16_pattern(machine: AArch64) -> None:
    """Squares that overflow, vanish or are NaN; each pattern fills a row of its own."""
    patterns = np.arange(1 << 16, dtype=np.uint16).view(reference.NUMPY_DTYPES["bfloat16"])
    q, k = patterns.reshape(-1, 1), np.repeat(patterns[::-1], 3).reshape(-1, 3)
    var = filled((1 << 16, 2), "float32")
    wanted = reference.row_mean_of_squares_qk(q, k)
    request = Request("row_mean_of_squares_qk", (var, q, k), threads=2)
    assert machine.call(_others("bfloat16"), request) == [""]
    assert reference.differing(var, wanted) == 0


# ---- the entry point -----------------------------------------------------------------------------


def test_wrong_arguments_are_said_and_nothing_is_written(machine: AArch64) -> None:
    module = _module("small", SPEC.replace(q_cols=33, k_cols=7))
    wrong = {
        "TypeError: q must be bfloat16, got float16": {"q": filled((2, 33), "float16")},
        "ValueError: gamma_q must have 33 elements, got 32": {"gamma_q": filled((32,), "float32")},
        "ValueError: k_out must have 2 rows like q, got 3": {"k_out": filled((3, 7), "bfloat16")},
        "ValueError: q must have 2 dimensions, got 1": {"q": filled((33,), "bfloat16")},
        "ValueError: epsilon must be a number, got nan": {"epsilon": float("nan")},
    }
    cases = [make_case(2, 33, 7) for _ in wrong]
    before = [bits_of(case.q_out) for case in cases]
    for case, fields in zip(cases, wrong.values(), strict=True):
        for name, value in fields.items():
            setattr(case, name, value)
    overlapping = make_case(2, 33, 7)
    overlapping.k_out = overlapping.q_out[:, :7]
    short = make_case(2, 33, 7)
    requests = [Request("apply_qk_rms_norm", case.tensors, case.epsilon) for case in cases]
    requests.append(Request("apply_qk_rms_norm", overlapping.tensors, 1e-6))
    requests.append(Request("apply_qk_rms_norm", short.tensors))
    assert machine.call(module, *requests) == [
        *wrong,
        "ValueError: k_out must not overlap q_out, got tensors that share memory",
        "TypeError: apply_qk_rms_norm takes 8 arguments (q_out, k_out, gamma_q, gamma_k, qk_var, "
        "q, k, epsilon), got 7",
    ]
    assert [bits_of(case.q_out) for case in cases] == before


def test_what_a_module_says_of_itself(machine: AArch64) -> None:
    module = _module("small", SPEC.replace(q_cols=33, k_cols=7))
    level, threads = machine.call(
        module, Request("qknorm_active_level"), Request("qknorm_get_num_threads", threads=3)
    )
    assert (level, threads) == ("aarch64", "3")


# ---- the file ------------------------------------------------------------------------------------


def _disassembly(path: Path) -> list[tuple[str, str]]:
    """Return mnemonic and operands of every instruction."""
    tool = "objdump" if targets.host_machine() == "aarch64" else "aarch64-linux-gnu-objdump"
    if shutil.which(tool) is None:
        pytest.skip(f"reads the code with {tool}: apt-get install binutils-aarch64-linux-gnu")
    command = [tool, "-d", "--no-show-raw-insn", str(path)]
    text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    instructions = re.findall(r"^\s+[0-9a-f]+:\t(\S+)(?:\t(.*))?$", text, re.MULTILINE)
    assert len(instructions) > 1000
    return instructions


@pytest.mark.parametrize(
    "dtypes", [("bfloat16",), pytest.param(DTYPES, marks=slow)], ids=["bfloat16", "all"]
)
@pytest.mark.parametrize("which", ["apply", "others"])
def test_instructions(which: str, dtypes: tuple[str, ...]) -> None:
    """Scalar code; estimates; bf16, fp16 or SVE instructions, which not every machine has."""
    module_of = _applying if which == "apply" else _others
    code = [line for dtype in dtypes for line in _disassembly(module_of(dtype))]
    names = {name for name, _ in code}
    assert not [
        name for name in names if re.match(r"(u?frsqrt|frecp|ursqrte|urecpe|bf\w*cvt|bfm)", name)
    ]
    assert not [operands for name, operands in code if re.search(r"\b[zp]\d+\.[bhsd]\b", operands)]
    # Only conversions touch float16.
    halves = {
        name
        for name, operands in code
        if re.match(r"f", name) and re.search(r"\.[48]h\b|\bh\d", operands)
    }
    assert halves <= {"fcvt", "fcvtl", "fcvtl2", "fcvtn", "fcvtn2"}, halves
    assert {"fsqrt", "fdiv"} <= names
    assert "float16" not in dtypes or {"fcvtl", "fcvtn"} <= names
    vector = [name for name, operands in code if ".4s" in operands]
    assert vector.count("fmul") > 30 * len(dtypes)
    if which == "apply":
        # One instruction packs a pair of rounded words.
        assert "sri" in vector
        assert not {"fmla", "fmls", "fmadd", "fmsub", "fnmadd", "fnmsub"} & names
    else:
        assert vector.count("fmla") > 30 * len(dtypes)


def test_file_is_for_aarch64_and_needs_what_others_need() -> None:
    path = _module("small", SPEC.replace(q_cols=33, k_cols=7))
    assert machine_of(path) == "aarch64"
    if shutil.which("readelf") is None:
        pytest.skip("reads the file with readelf, which is not installed")
    text = subprocess.run(["readelf", "-dW", path], capture_output=True, text=True).stdout
    needed = set(re.findall(r"NEEDED\).*\[(.*)\]", text))
    assert "libtvm_ffi.so" in needed
    assert needed - {"libtvm_ffi.so"} <= {
        "libc.so.6", "libm.so.6", "libpthread.so.0", "libdl.so.2", "ld-linux-aarch64.so.1",
    }  # fmt: skip
    assert "RPATH" not in text
    assert "RUNPATH" not in text
    assert "NODELETE" in text


@pytest.mark.skipif(targets.host_machine() == TARGET, reason="this machine is AArch64")
def test_another_machine_refuses_it_and_inspect_says_so(
    capsys: pytest.CaptureFixture[str],
) -> None:
    """The dynamic loader's "cannot open shared object file"; code that is taken to run here."""
    path = _module("small", SPEC.replace(q_cols=33, k_cols=7))
    with pytest.raises(
        ModuleFileError, match=r"small.so is for AArch64 machines, and this one is x86-64: export"
    ):
        load(path)
    assert main(["inspect", str(path)]) == 0
    printed = capsys.readouterr().out
    assert "no: it is for AArch64 machines, and this one is x86-64" in printed
    assert "@aarch64" in printed


@pytest.mark.skipif(targets.host_machine() == TARGET, reason="this machine is AArch64")
def test_missing_cross_compiler_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    spec = SPEC.replace(q_cols=3, k_cols=5)
    monkeypatch.setenv("QKNORM_TVM_AARCH64_CC", "no-such-compiler")
    with pytest.raises(
        BuildError, match=r"\$QKNORM_TVM_AARCH64_CC names 'no-such-compiler', which is"
    ):
        compile(spec)
    monkeypatch.delenv("QKNORM_TVM_AARCH64_CC")
    monkeypatch.setenv("PATH", "")
    with pytest.raises(BuildError, match=r"apt-get install gcc-aarch64-linux-gnu libc6-dev-arm64"):
        compile(spec)


def test_export_command(tmp_path: Path) -> None:
    aarch64.cross_compiler()
    out = tmp_path / "qk.so"
    columns = ["--q-cols", "33", "--k-cols", "7"]
    assert main(["export", str(out), *columns, "--target", "aarch64"]) == 0
    assert machine_of(out) == TARGET
    assert read_metadata(out)["target"] == TARGET


@pytest.mark.slow
def test_two_builds_are_the_same_bytes() -> None:
    aarch64.cross_compiler()
    spec = SPEC.replace(in_dtype="float16", q_cols=3, k_cols=5)
    first, second = compile(spec), compile(spec)
    assert first.path.read_bytes() == second.path.read_bytes()


def test_tuning_is_refused() -> None:
    """x86-64 records under another machine's name."""
    from qknorm_tvm import TuningError
    from qknorm_tvm.tuning.devices import resolve

    with pytest.raises(TuningError, match=r"^aarch64 cannot be tuned"):
        resolve(TARGET, None, None)
