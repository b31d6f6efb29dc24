"""What the generated code must hold and must not, level by level."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
from support import LEVELS, OWN, PAIRINGS, compiled, levels, open_columns

from qknorm_tvm import KernelSpec

#: The registers in which a level's code computes.
REGISTERS = {
    "x86-64-v2": "xmm",
    "x86-64-v3": "ymm",
    "x86-64-v4": "zmm",
    "x86-64-v4-bf16": "zmm",
}
SPEC = KernelSpec(q_cols=1536, k_cols=256)


@dataclasses.dataclass
class Code:
    ir: str
    asm: str
    #: Symbols of the functions: "tile", "row" and so on.
    variants: tuple[str, ...]
    row_tile: dict[str, int]
    #: The functions whose tasks pack the gammas.
    packed: tuple[str, ...]


@functools.cache
def code_of(spec: KernelSpec, level: str) -> Code:
    """Generate a spec's code for one level, as an exported module holds it."""
    from qknorm_tvm.build import cpu as build_cpu
    from qknorm_tvm.schedules.cpu_config import default_config

    config = default_config(spec, frozenset(build_cpu.cpu_features(level)))
    variants = build_cpu.variants_of(spec, config, "code")
    module = build_cpu.generate(level, [(spec, config, variant) for variant in variants])
    return Code(
        ir=str(module.inspect_source("ll")),
        asm=str(module.inspect_source("asm")),
        variants=tuple(variant.name for variant in variants),
        row_tile={variant.name: variant.row_tile for variant in variants},
        packed=tuple(variant.name for variant in variants if variant.packs_gammas),
    )


def _functions(ir: str) -> dict[str, list[str]]:
    """Return name -> lines of every function that LLVM IR defines."""
    functions: dict[str, list[str]] = {}
    current = None
    for line in ir.splitlines():
        head = re.match(r"define .*@([\w.]+)\(", line)
        if head:
            current = functions.setdefault(head[1], [])
        if current is not None:
            current.append(line)
        if line == "}":
            current = None
    return functions


def _assembly(asm: str) -> dict[str, list[str]]:
    """Return name -> lines of every function that assembly holds."""
    functions: dict[str, list[str]] = {}
    lines: list[str] = []
    for line in asm.splitlines():
        head = re.match(r"(\w[\w.]*|\.L__tvm\w[\w.]*):", line)
        if head:
            lines = functions.setdefault(head[1], [])
        lines.append(line)
    return functions


def _launches(code: Code, variant: str) -> list[str]:
    """Return the names of the functions that a variant launches in parallel."""
    (compute,) = (
        lines for name, lines in _functions(code.ir).items() if name == f"code_{variant}_compute_"
    )
    return re.findall(r"call i32 %\w+\(ptr nonnull @([\w.]+),", "\n".join(compute))


def _lambda(code: Code, variant: str) -> list[str]:
    """Return the lines of the function that a variant's parallel loop became."""
    (name,) = _launches(code, variant)
    return _functions(code.ir)[name]


_ARITHMETIC = re.compile(
    r" = (?:tail )?(fadd|fsub|fmul|fdiv|frem|fneg|fcmp|fptrunc|fpext|call)\b(.*)"
)
_FAST = re.compile(r"\b(fast|reassoc|nnan|ninf|nsz|arcp|contract|afn)\b")


@pytest.mark.parametrize("level", levels(OWN))
@pytest.mark.parametrize(("in_dtype", "out_dtype"), PAIRINGS)
def test_no_fast_math(in_dtype: str, out_dtype: str, level: str) -> None:
    """A flag that lets LLVM reorder, contract or flush."""
    code = code_of(SPEC.replace(in_dtype=in_dtype, out_dtype=out_dtype), level)
    flagged = [
        line for line in code.ir.splitlines() if _ARITHMETIC.search(line) and _FAST.search(line)
    ]
    assert not flagged, flagged[:3]
    for attribute in ("unsafe-fp-math", "no-nans-fp-math", "denormal-fp-math", "approx-func"):
        assert f'"{attribute}"="true"' not in code.ir
        assert not re.search(rf'"{attribute}[^"]*"="(?!false|ieee)', code.ir)
    assert "llvm.fma" not in code.ir
    assert "llvm.fmuladd" not in code.ir


_NAMED = itertools.product(PAIRINGS[::4], map(pytest.param, ("sapphirerapids", "znver5")))


@pytest.mark.parametrize(
    ("in_dtype", "out_dtype", "level"),
    [
        pytest.param(*pair, *level.values, marks=level.marks)
        for pair, level in (*itertools.product(PAIRINGS, levels(OWN)), *_NAMED)
    ],
)
def test_no_instruction_that_rounds_otherwise(in_dtype: str, out_dtype: str, level: str) -> None:
    """``vcvtneps2bf16`` flushes denormals, fused multiply-add skips a rounding, rsqrt guesses.

    ``vcvtne2ps2bf16`` flushes them too: see the next test.
    """
    code = code_of(SPEC.replace(in_dtype=in_dtype, out_dtype=out_dtype), level)
    conversions = re.findall(
        r"^\s+(v?cvtne\w*bf16\w*|vf?n?m(?:add|sub)\w+|v?rsqrt\w+|v?rcp\w+|vdpbf16\w*|\w+ph)\b",
        code.asm,
        re.MULTILINE,
    )
    converts = "vcvtne2ps2bf16" in conversions
    assert converts == (out_dtype == "bfloat16" and level not in LEVELS[:-1])
    exact = {"vcvtps2ph", "vcvtph2ps", *(["vcvtne2ps2bf16"] if converts else [])}
    assert not set(conversions) - exact, set(conversions)


@pytest.mark.parametrize("fields", [{}, {"cast_before_gamma": True}, {"in_dtype": "float32"}])
def test_what_is_converted_is_tested_for_zeros(fields: dict[str, Any]) -> None:
    """A denormal result that comes out as zero, and instructions that the loop can do without.

    Each result is tested, one branch for the 64 elements of a vector; 11 instructions for 32
    elements: a load, two permutes, four products, a conversion, a test, half a branch, a store.
    """
    code = code_of(SPEC.replace(**fields), "x86-64-v4-bf16")
    casts = 2 if "cast_before_gamma" in fields else 1
    for lines in _assembly(code.asm).values():
        text = "\n".join(lines)

        def count(name: str, text: str = text) -> int:
            return len(re.findall(rf"^\s+{name}\s", text, re.MULTILINE))

        converted = count("vcvtne2ps2bf16")
        assert count("vptestnmw") == converted
        assert count("kortest[wdq]") == converted / 2
        is_widened = "in_dtype" not in fields
        assert count("vpermb") == (2 * converted if is_widened else 0)
        assert count("vmulps") == 4 * converted / casts


@pytest.mark.parametrize("level", levels(OWN))
@pytest.mark.parametrize(("in_dtype", "out_dtype"), PAIRINGS)
def test_vector_width_is_the_levels(in_dtype: str, out_dtype: str, level: str) -> None:
    """Scalar or half-wide code that is exact and slow."""
    code = code_of(SPEC.replace(in_dtype=in_dtype, out_dtype=out_dtype), level)
    meant = REGISTERS[level]
    if level == "x86-64-v2" and "float16" in (in_dtype, out_dtype):
        # No float16 conversions in this level: they are calls, one by one.
        assert "zmm" not in code.asm
        assert "ymm" not in code.asm
        return
    multiplied = re.findall(r"^\s+v?mulps\s.*%([xyz]mm)\d+\s*$", code.asm, re.MULTILINE)
    assert multiplied.count(meant) >= 2
    # The columns are whole vectors: nothing is left to narrower registers.
    assert set(multiplied) == {meant}
    wider = {"x86-64-v2": ("ymm", "zmm"), "x86-64-v3": ("zmm",)}.get(level, ())
    assert not any(register in code.asm for register in wider)


@pytest.mark.parametrize("level", levels(OWN))
def test_odd_columns_are_vectors_and_a_rest(level: str) -> None:
    """One column more that turns the whole row scalar."""
    code = code_of(SPEC.replace(q_cols=1537, k_cols=257), level)
    multiplied = re.findall(r"^\s+v?mulps\s.*%([xyz]mm)\d+\s*$", code.asm, re.MULTILINE)
    assert multiplied.count(REGISTERS[level]) >= 2


@pytest.mark.parametrize("level", levels(OWN))
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_multiplication_order(dtype: str, level: str) -> None:
    """gamma times rs hoisted out of the rows: one rounding other than the contract's.

    Each product that is scaled by gamma must itself be a product: x times rs first.
    """
    code = code_of(SPEC.replace(in_dtype=dtype, out_dtype=dtype), level)
    for variant in code.variants:
        lines = _lambda(code, variant)
        products: dict[str, tuple[str, str]] = {}
        for line in lines:
            match = re.match(r"\s+(%[\w.]+) = fmul <\d+ x float> (%?[\w.]+), (%?[\w.]+)", line)
            if match:
                products[match[1]] = (match[2], match[3])
        outer = {name for name, (a, b) in products.items() if a in products or b in products}
        inner = set(products) - outer
        assert len(outer) == len(inner) > 0
        splats = {
            match[1]
            for line in lines
            if (match := re.match(r"\s+(%[\w.]+) = shufflevector .* zeroinitializer", line))
        }
        for name in inner:
            assert splats & set(products[name]), f"{name} is no product with a broadcast rs"
        for name in outer:
            assert sum(operand in inner for operand in products[name]) == 1
            assert not splats & set(products[name])


@pytest.mark.parametrize("level", levels(OWN))
@pytest.mark.parametrize(("in_dtype", "out_dtype"), PAIRINGS)
def test_one_parallel_region_and_no_allocation(in_dtype: str, out_dtype: str, level: str) -> None:
    """Two launches, 12 microseconds; a workspace in every call; a check that the entry has made."""
    code = code_of(SPEC.replace(in_dtype=in_dtype, out_dtype=out_dtype), level)
    assert "malloc" not in code.ir
    assert "AllocWorkspace" not in code.ir
    for variant in code.variants:
        # On the stack, and of a fixed size.
        allocated = [line for line in _lambda(code, variant) if " = alloca " in line]
        assert all(re.match(r"\s+%packed_gamma_[qk]\d* = alloca \[", line) for line in allocated)
    for variant in code.variants:
        assert len(_launches(code, variant)) == 1
    assert code.ir.count("load ptr, ptr @__TVMBackendParallelLaunch") == len(code.variants)


@pytest.mark.parametrize("level", levels(OWN))
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_gamma_is_loaded_once_a_tile(dtype: str, level: str) -> None:
    """gamma read, and shuffled, again for each row."""
    code = code_of(SPEC.replace(in_dtype=dtype, out_dtype=dtype), level)
    for variant in code.variants:
        if variant in code.packed:
            continue
        lines = _lambda(code, variant)
        rows = code.row_tile[variant]

        def lanes(pattern: str, lines: list[str] = lines) -> int:
            return sum(int(n) for n in re.findall(pattern, "\n".join(lines)))

        columns = lanes(r"= fmul <(\d+) x float>") // 2 // rows
        loaded = lanes(r"= load <(\d+) x float>, ptr ")
        # x is float32 too there, and loaded once a row.
        assert loaded == (columns * (1 + rows) if dtype == "float32" else columns), variant


@pytest.mark.parametrize("level", ["x86-64-v2", "x86-64-v3"])
def test_gamma_is_taken_apart_once_a_task(level: str) -> None:
    """gamma shuffled, and its NaNs cleared, for each row or each tile of rows."""
    code = code_of(SPEC, level)
    assert code.packed == ("stream", "tile")
    for variant in code.packed:
        blocks = re.split(r"^\S+:", "\n".join(_lambda(code, variant)), flags=re.MULTILINE)
        output = re.compile(r"store <\d+ x (?:i\d+|bfloat)>|@qknorm_stream")
        stores = [block for block in blocks if output.search(block)]
        assert len(stores) >= 2
        for block in stores:
            assert "fcmp uno" not in block
            # A vector's even elements, then its odd ones: no other order is asked for.
            shuffled = re.findall(r"= shufflevector <\d+ x float>.*", block)
            assert all("zeroinitializer" in line for line in shuffled), shuffled[:2]


# ---- the linked file -----------------------------------------------------------------------------


def _tool(name: str, *arguments: str | Path) -> str:
    if shutil.which(name) is None:
        pytest.skip(f"reads the file with {name}, which is not installed")
    return subprocess.run(
        [name, *map(str, arguments)], check=True, capture_output=True, text=True
    ).stdout


def _single(level: str, **fields: str) -> Path:
    spec = SPEC.replace(target=level, **fields)
    return compiled(f"single-{spec.digest}", spec)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
@pytest.mark.parametrize("level", levels(OWN))
def test_size_of_a_single_level(level: str, dtype: str) -> None:
    """Dead code, debug information or a runtime that came along."""
    size = _single(level, in_dtype=dtype, out_dtype=dtype).stat().st_size
    assert size <= 60_000, f"{size} bytes"


@pytest.mark.parametrize(("level", "wider"), [("x86-64-v3", "zmm"), ("x86-64-v2", "[yz]mm")])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_single_level_file_holds_no_wider_register(level: str, wider: str, dtype: str) -> None:
    """SIGILL from a helper that was compiled for another level."""
    text = _tool(
        "objdump", "-d", "--no-show-raw-insn", _single(level, in_dtype=dtype, out_dtype=dtype)
    )
    wide = re.findall(rf"^.*%{wider}\d.*$", text, re.MULTILINE)
    assert not wide, wide[:3]
    if level == "x86-64-v2":
        vex = re.findall(r"^\s+[0-9a-f]+:\s+v(?!err|erw|m)\w+ .*%xmm.*$", text, re.MULTILINE)
        assert not vex, vex[:3]


def test_portable_file_shares_only_code_that_runs_everywhere(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """float16 helpers of AVX-512 code that serve the levels below it: SIGILL on an older CPU."""
    from qknorm_tvm import compile
    from qknorm_tvm.build import native as native_build

    run = native_build.run_compiler

    def keep_names(command: list[str], *rest: object) -> None:
        run([word for word in command if word != "-s"], *rest)

    monkeypatch.setattr(native_build, "run_compiler", keep_names)
    compiled_now = compile(KernelSpec(in_dtype="float16", q_cols=64, k_cols=64))
    text = _tool("objdump", "-d", "--no-show-raw-insn", compiled_now.path)
    parts = re.split(r"^[0-9a-f]+ <([\w.@]+)>:$", text, flags=re.MULTILINE)
    own = re.compile(r"qkn_x86_64|__tvm_ffi_qkn_x86_64|__tvm_parallel_lambda")
    shared = {
        name: body
        for name, body in zip(parts[1::2], parts[2::2], strict=True)
        if not own.match(name)
    }
    assert "__truncsfhf2" in shared, "no helper is there to be checked"
    for name, body in shared.items():
        wide = re.findall(r"^.*%[yz]mm.*$|^\s+[0-9a-f]+:\s+v\w+ .*%xmm.*$", body, re.MULTILINE)
        assert not wide, (name, wide[:3])


@pytest.fixture(scope="module", params=[OWN, pytest.param("cpu", marks=pytest.mark.slow)])
def exported(request: pytest.FixtureRequest) -> Path:
    """A file of every pairing: of one level, and one that holds them all."""
    return open_columns(request.param)


def test_only_the_entry_points_are_exported(exported: Path) -> None:
    """Symbols that clash with another module's in the same process."""
    text = _tool("nm", "-D", "--defined-only", exported)
    assert sorted(line.split()[-1] for line in text.splitlines()) == [
        "__tvm_ffi_apply_qk_rms_norm",
        "__tvm_ffi_qknorm_active_level",
        "__tvm_ffi_qknorm_get_num_threads",
        "__tvm_ffi_qknorm_metadata",
        "__tvm_ffi_qknorm_most_cached_bytes",
        "__tvm_ffi_qknorm_set_num_threads",
        "qknorm_tvm_thread_pool_v2",
    ]


def test_nothing_but_tvm_ffi_and_the_c_library_is_needed(exported: Path) -> None:
    """A dependency on TVM, on a C++ runtime or on OpenMP."""
    text = _tool("readelf", "-d", exported)
    needed = set(re.findall(r"NEEDED\).*\[(.*)\]", text))
    assert "libtvm_ffi.so" in needed
    rest = needed - {"libtvm_ffi.so"}
    assert rest <= {
        "libc.so.6",
        "libm.so.6",
        "ld-linux-x86-64.so.2",
        "libpthread.so.0",
        "libdl.so.2",
    }
    assert "RPATH" not in text, "a path of the machine that built the file"
    assert "RUNPATH" not in text, "a path of the machine that built the file"
    assert "NODELETE" in text, "the threads of the pool outlive the module"


def test_file_calls_no_allocator(exported: Path) -> None:
    """An allocation in each call."""
    text = _tool("nm", "-D", "--undefined-only", exported)
    wanted = {line.split()[-1].partition("@")[0] for line in text.splitlines()}
    allocators = {"malloc", "calloc", "realloc", "free", "posix_memalign", "aligned_alloc", "mmap"}
    assert not wanted & allocators
    assert not any(name.startswith("TVMBackend") for name in wanted)


def test_file_holds_no_path_of_the_machine_that_built_it(exported: Path) -> None:
    """A home folder in a file that is published."""
    data = exported.read_bytes()
    for path in (Path(__file__).parent.parent, Path.home(), Path("/tmp")):
        assert str(path).encode() + b"/" not in data
    stack = _tool("readelf", "-lW", exported)
    assert re.search(r"GNU_STACK.*RW ", stack), "an executable stack"


@pytest.mark.slow
def test_two_builds_of_a_spec_are_the_same_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    """A file that cannot be checked by building it again."""
    from qknorm_tvm import compile

    monkeypatch.delenv("CC", raising=False)  # that of the tests keeps what it has compiled
    spec = KernelSpec(in_dtype="float16", q_cols=3, k_cols=5, target="x86-64-v3")
    first, second = compile(spec), compile(spec)
    assert first.path.read_bytes() == second.path.read_bytes()
