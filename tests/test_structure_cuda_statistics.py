"""What the CUDA code of the operations that add up rows must hold and must not."""

from __future__ import annotations

import re

import cuda_code
import pytest
from cuda_code import FUSED, Built, used

from qknorm_tvm import KernelSpec


@pytest.fixture(scope="module", params=[pytest.param("statistics", marks=pytest.mark.slow)])
def built(request: pytest.FixtureRequest) -> Built:
    return cuda_code.built(request.param)


@pytest.fixture(scope="module")
def kernels(built: Built) -> dict[str, str]:
    return built.ptx()


def _kernel_names(built: Built) -> dict[str, tuple[KernelSpec, bool]]:
    """Return the kernels that there must be: spec, and whether each may rely on alignment."""
    kernels = built.kernels()
    return {
        name: (spec, variant.alignment is not None) for name, (spec, variant) in kernels.items()
    }


def test_one_kernel_and_one_launch_a_variant(built: Built, kernels: dict[str, str]) -> None:
    """A second launch in a call: statistics and outputs are one kernel."""
    assert sorted(kernels) == sorted(_kernel_names(built))
    source = built.source.read_text()
    assert sorted(re.findall(r"::qkn_launch<::(\w+), true>", source)) == sorted(
        _kernel_names(built)
    )
    assert "<<<" not in source


def test_arithmetic(built: Built, kernels: dict[str, str]) -> None:
    """Denormals lost, a mean that is a product, squares that are rounded before they are added."""
    for name, (spec, _) in _kernel_names(built).items():
        text = kernels[name]
        assert ".ftz" not in text, name
        assert ("rsqrt.approx.f32" in text) == (spec.op == FUSED), name
        assert "fma.rn.f32" in text, name
        # A power of two may be divided by exactly by multiplying.
        assert "div.rn.f32" in text or spec.q_cols == spec.k_cols == 256, name
        # No barrier between the threads of a warp, one between warps.
        assert text.count("bar.sync") == 1, name
        assert "shfl.sync.bfly.b32" in text, name
        assert "red.global" not in text, name
        assert "atom" not in text, name


def test_rows_are_read_once(built: Built, kernels: dict[str, str]) -> None:
    """q and k read again for the outputs, or piece by piece: accesses of x's 16 bytes, all counted.

    An operand's threads and the other's are two branches, so that each is counted on its own.
    """
    for name, (spec, variant) in built.kernels().items():
        if variant.alignment is None or spec.q_cols is None:
            continue
        wide = re.findall(r"ld\.global\.v4\.(?:b32|u32|f32)", kernels[name])
        assert not re.search(r"ld\.global\.[buf](?:16|32) ", kernels[name]), name
        vectors = 2 * variant.config.rows * variant.config.columns
        accesses = vectors * spec.in_bytes // 2
        if spec.op == FUSED:
            # Gamma: two accesses for each vector of columns.
            accesses += 2 * 2 * variant.config.columns
        # The compiler may join the branches; it may not read more.
        assert accesses // 2 <= len(wide) <= accesses, (name, spec.text)


def test_general_kernels_rely_on_no_alignment(built: Built, kernels: dict[str, str]) -> None:
    for name, (_, aligned) in _kernel_names(built).items():
        if not aligned:
            assert not re.search(r"[ls][dt]\.global(?:\.cs)?\.v[248]", kernels[name]), name


def test_the_wait_comes_before_everything_that_touches_memory(
    built: Built, kernels: dict[str, str]
) -> None:
    """Data read before the previous kernel has written it, or written while that reads."""
    for name, text in kernels.items():
        waits = [m.start() for m in re.finditer(r"griddepcontrol\.wait", text)]
        assert len(waits) == 1, name
        touched = re.finditer(r"\b(ld|st)\.global", text)
        assert min(m.start() for m in touched) > waits[0], name
        assert text.count("griddepcontrol.launch_dependents") == 1, name
        assert "ld.global.nc" not in text, name


def test_older_gpus_get_no_dependent_launch(built: Built) -> None:
    text = built.device_code("ptx", "sm_80")[0].read_text()
    assert "griddepcontrol" not in text
    assert text.count(".visible .entry") == len(_kernel_names(built))


def test_no_local_memory_and_few_registers(built: Built) -> None:
    """Arrays that went to memory; so many registers that few blocks fit a multiprocessor."""
    _, log = built.device_code("cubin", "sm_90")
    usage = used(log)
    assert set(usage) == set(_kernel_names(built))
    for name, kernel in usage.items():
        # In rounds, where columns are open, the compiler gives up a loop's counter for more blocks.
        spec, variant = built.kernels()[name]
        assert kernel.local_memory <= (16 if spec.q_cols is None else 0), name
        # Without alignment an address for every element.
        most = 80 if variant.alignment else 144
        assert kernel.registers <= most, (name, kernel.registers)
