"""What the code of kernels that exchange statistics with other ranks must hold, and must not."""

from __future__ import annotations

import re

import pytest
from cuda_code import Built, built, used


@pytest.fixture(scope="module", params=[pytest.param("peers", marks=pytest.mark.slow)])
def kernels(request: pytest.FixtureRequest) -> Built:
    return built(request.param)


def test_one_kernel_a_call(kernels: Built) -> None:
    """A launch that became several; lost denormals; q, k, v or gamma read piece by piece."""
    ptx = kernels.ptx()
    assert len(ptx) == len(kernels.kernels())
    for name, (spec, variant) in kernels.kernels().items():
        text = ptx[name]
        assert ".ftz" not in text, name
        assert "ld.global.nc" not in text, name
        if variant.alignment is None:
            continue
        # What moves in elements: turns, positions and slots, of 8 bytes, and peers' sums.
        assert not re.search(r"[ls][dt]\.global\.[buf](?:16|8) ", text), name
        wide = re.findall(r"ld\.global\.v4\.(?:b32|u32|f32)", text)
        operands = 3 if spec.operation.has_cache else 2
        of_parts = operands + 2 * 2 + (4 if spec.rotary_dim else 0)
        assert len(wide) <= of_parts * variant.config.columns, name


def test_sums_go_straight_to_peers(kernels: Built) -> None:
    """Sums that a cache keeps back; atomic operations, or fences, where nothing goes wrong."""
    for name, text in kernels.ptx().items():
        # One written to each rank, one emptied; one loop that waits.
        assert text.count("st.relaxed.sys.global.f32") == 2, name
        assert text.count("ld.relaxed.sys.global.f32") == 1, name
        assert len(re.findall(r"\batom\.", text)) == 1, name  # giving up
        assert len(re.findall(r"\b(?:fence|membar)\.", text)) == 1, name
        assert text.count("bar.sync") == 2, name


def test_dependents_start_after_the_exchange(kernels: Built) -> None:
    """Launches that pile up and keep another rank of the same GPU out: the peers hang."""
    for name, text in kernels.ptx().items():
        (wait,) = (m.start() for m in re.finditer(r"griddepcontrol\.wait", text))
        (lets,) = (m.start() for m in re.finditer(r"griddepcontrol\.launch_dependents", text))
        (reads,) = (m.start() for m in re.finditer(r"ld\.relaxed\.sys", text))
        barriers = [m.start() for m in re.finditer(r"bar\.sync", text)]
        assert wait < min(m.start() for m in re.finditer(r"\b(ld|st)\.(global|relaxed)", text)), (
            name
        )
        assert reads < barriers[1] < lets, name


def test_no_local_memory_and_few_registers(kernels: Built) -> None:
    """Arrays that went to memory; so many registers that few blocks fit a multiprocessor."""
    _, log = kernels.device_code("cubin", "sm_90")
    for name, kernel in used(log).items():
        _, variant = kernels.kernels()[name]
        assert kernel.local_memory == 0, name
        # A row in two vectors a thread: as many as the same kernel without ranks.
        vectors = variant.config.rows * variant.config.columns
        most = 144 if variant.alignment is None else 64 if vectors == 1 else 96
        assert kernel.registers <= most, (name, kernel.registers)
