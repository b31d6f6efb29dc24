"""What the CUDA code of the operations that add up rows must hold and must not."""

from __future__ import annotations

import re

import pytest
from test_structure_cuda import Built, _needs_nvcc

from qknorm_tvm import KernelSpec, build_cuda, compile
from qknorm_tvm.module_file import read_metadata
from qknorm_tvm.schedules.cuda_config import default_variants

SPECS = tuple(
    KernelSpec(op=op, in_dtype=dtype, q_cols=q, k_cols=k, target="cuda:sm_90")
    for op in ("row_mean_of_squares_qk", "qk_rms_norm")
    for dtype, q, k in (
        ("bfloat16", 1536, 256),
        ("bfloat16", 6144, 1024),
        ("float32", 1536, 256),
        ("bfloat16", 1537, 257),
        ("bfloat16", None, None),
    )
)


@pytest.fixture(scope="module")
def built() -> Built:
    _needs_nvcc()
    commands: list[list[str]] = []
    with pytest.MonkeyPatch.context() as patch:
        run = build_cuda.run_compiler

        def record(command: list[str], doing: str) -> None:
            commands.append(command)
            run(command, doing)

        patch.setattr(build_cuda, "run_compiler", record)
        compiled = compile(list(SPECS))
    command = next(one for one in commands if "-c" in one)
    found = Built(compiled.path, compiled.path.parent / "module.cu", command)
    found.keep = compiled  # type: ignore[attr-defined]  # its folder goes with it
    return found


@pytest.fixture(scope="module")
def kernels(built: Built) -> dict[str, str]:
    """PTX for sm_90, by kernel."""
    text, _ = built.device_code("ptx", "sm_90")
    parts = re.split(r"^\.visible \.entry (\w+)\(", text, flags=re.MULTILINE)
    return dict(zip(parts[1::2], parts[2::2], strict=True))


def _kernel_names() -> dict[str, tuple[KernelSpec, bool]]:
    """Return the kernels that there must be: spec, and whether each may rely on alignment."""
    found = {}
    for index, spec in enumerate(SPECS):
        seen = set()
        for variant in default_variants(spec):
            key = (variant.config, variant.stride_unit, variant.alignment)
            if key not in seen:
                name = f"qkn_cuda_{index}_{variant.name}_kernel"
                found[name] = (spec, variant.alignment is not None)
            seen.add(key)
    return found


def test_one_kernel_and_one_launch_a_variant(built: Built, kernels: dict[str, str]) -> None:
    """A second launch in a call: statistics and outputs are one kernel."""
    assert sorted(kernels) == sorted(_kernel_names())
    source = built.source.read_text()
    assert sorted(re.findall(r"::qkn_launch<::(\w+), true>", source)) == sorted(_kernel_names())
    assert "<<<" not in source


def test_arithmetic(kernels: dict[str, str]) -> None:
    """Denormals lost, a mean that is a product, squares that are rounded before they are added."""
    for name, (spec, _) in _kernel_names().items():
        text = kernels[name]
        assert ".ftz" not in text, name
        assert ("rsqrt.approx.f32" in text) == (spec.op == "qk_rms_norm"), name
        assert "fma.rn.f32" in text, name
        # A power of two may be divided by exactly by multiplying.
        assert "div.rn.f32" in text or spec.q_cols == spec.k_cols == 256, name
        # No barrier between the threads of a warp, one between warps.
        assert text.count("bar.sync") == 1, name
        assert "shfl.sync.bfly.b32" in text, name
        assert "red.global" not in text, name
        assert "atom" not in text, name


def test_rows_are_read_once(kernels: dict[str, str]) -> None:
    """q and k read again for the outputs, or piece by piece: accesses of x's 16 bytes, all counted.

    An operand's threads and the other's are two branches, so that each is counted on its own.
    """
    for index, spec in enumerate(SPECS):
        for variant in default_variants(spec):
            text = kernels.get(f"qkn_cuda_{index}_{variant.name}_kernel")
            if text is None or variant.alignment is None:
                continue
            wide = re.findall(r"ld\.global\.v4\.(?:b32|u32|f32)", text)
            assert not re.search(r"ld\.global\.[buf](?:16|32) ", text), variant.name
            vectors = 2 * variant.config.rows * variant.config.columns
            accesses = vectors * spec.in_bytes // 2
            if spec.op == "qk_rms_norm":
                # Gamma: two accesses for each vector of columns.
                accesses += 2 * 2 * variant.config.columns
            # The compiler may join the branches; it may not read more.
            assert accesses // 2 <= len(wide) <= accesses, (variant.name, spec.text)


def test_general_kernels_rely_on_no_alignment(kernels: dict[str, str]) -> None:
    for name, (_, aligned) in _kernel_names().items():
        if not aligned:
            assert not re.search(r"[ls][dt]\.global(?:\.cs)?\.v[248]", kernels[name]), name


def test_the_wait_comes_before_everything_that_touches_memory(kernels: dict[str, str]) -> None:
    """Data read before the previous kernel has written it, or written while that reads."""
    for name, text in kernels.items():
        waits = [m.start() for m in re.finditer(r"griddepcontrol\.wait", text)]
        assert len(waits) == 1, name
        touched = re.finditer(r"\b(ld|st)\.global", text)
        assert min(m.start() for m in touched) > waits[0], name
        assert text.count("griddepcontrol.launch_dependents") == 1, name
        assert "ld.global.nc" not in text, name


def test_older_gpus_get_no_dependent_launch(built: Built) -> None:
    text, _ = built.device_code("ptx", "sm_80")
    assert "griddepcontrol" not in text
    assert text.count(".visible .entry") == len(_kernel_names())


def test_no_local_memory_and_few_registers(built: Built) -> None:
    """Arrays that went to memory; so many registers that few blocks fit a multiprocessor."""
    _, log = built.device_code("cubin", "sm_90")
    functions = re.findall(
        r"Compiling entry function '(\w+)'.*?(\d+) bytes stack frame, (\d+) bytes spill stores, "
        r"(\d+) bytes spill loads.*?Used (\d+) registers",
        log,
        re.DOTALL,
    )
    assert {name for name, *_ in functions} == set(_kernel_names())
    for name, stack, stores, loads, registers in functions:
        assert (stack, stores, loads) == ("0", "0", "0"), name
        # Two rows of four vectors in flight, and gamma for them, are the most that was of use.
        assert int(registers) <= (128 if "batch" in name else 80), (name, registers)


def test_one_module_for_a_layer() -> None:
    """All operations in one file, for several architectures, each with its own entry point."""
    _needs_nvcc()
    ops = ("apply_qk_rms_norm", "row_mean_of_squares_qk", "qk_rms_norm")
    target = "cuda:sm_80,sm_90"
    compiled = compile([KernelSpec(op=op, q_cols=64, k_cols=32, target=target) for op in ops])
    metadata = read_metadata(compiled.path)
    assert metadata["ops"] == sorted(ops)
    described = {code["spec"] for code in metadata["levels"][0]["code"]}
    assert described == {KernelSpec(op=op, q_cols=64, k_cols=32, target=target).text for op in ops}
