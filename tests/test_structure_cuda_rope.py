"""What the CUDA code of rotation and of paged caches must hold and must not."""

from __future__ import annotations

import re

import cuda_code
import pytest
from cuda_code import Built, used

from qknorm_tvm import KernelSpec
from qknorm_tvm.declare.statistics import CHUNK
from qknorm_tvm.schedules.cuda_config import CudaConfig, CudaVariant
from qknorm_tvm.schedules.cuda_row_config import operand_cols, partition_chunks
from qknorm_tvm.schedules.cuda_variants import default_variants


@pytest.fixture(scope="module", params=[pytest.param("rope", marks=pytest.mark.slow)])
def built(request: pytest.FixtureRequest) -> Built:
    return cuda_code.built(request.param)


@pytest.fixture(scope="module")
def kernels(built: Built) -> dict[str, str]:
    return built.ptx()


def _shuffles(spec: KernelSpec) -> bool:
    """Return whether partners are lanes of one warp at one distance."""
    group = spec.rotary_dim // 8
    return (
        not spec.interleaved
        and group > 0
        and group & (group - 1) == 0
        and spec.head_dim % spec.rotary_dim == 0
    )


def _reads_partners(spec: KernelSpec, variant: CudaVariant) -> bool:
    if variant.alignment is None:
        return spec.rotary_dim > 0
    return spec.rotary_dim > 0 and not spec.interleaved and not _shuffles(spec)


def _vectors_of_threads(spec: KernelSpec, columns: int) -> list[int]:
    """Return how many vectors a thread has at the most, of Q, K and V."""
    chunks = [-(-(cols or 1) // CHUNK) for cols in operand_cols(spec)]
    partition = partition_chunks(chunks, columns)
    assert partition is not None
    return [-(-count // warps) for count, warps in zip(chunks, partition[1], strict=True)]


def test_one_kernel_and_one_launch_a_variant(built: Built, kernels: dict[str, str]) -> None:
    """A second launch in a call: norm, rotation and caches are one kernel."""
    assert sorted(kernels) == sorted(built.kernels())
    source = built.source.read_text()
    assert sorted(re.findall(r"::qkn_launch<::(\w+), true>", source)) == sorted(built.kernels())
    assert "<<<" not in source


def test_arithmetic(built: Built, kernels: dict[str, str]) -> None:
    """Denormals lost; a product that is added before it is rounded, by TVM or by nvcc."""
    for name, (spec, variant) in built.kernels().items():
        text, rows, parts = kernels[name], variant.config.rows, variant.config.columns
        assert ".ftz" not in text, name
        assert "rsqrt.approx.f32" in text, name
        fused, most = text.count("fma.rn.f32"), 0
        if spec.statistics == "local":
            most += 2 * rows * parts * 8  # squares of Q and of K
        if spec.has_scales:
            # Of K and of V: corrections of each quotient, and of a reciprocal for its scale.
            scales = 2 * rows * parts * (8 if variant.alignment is None else 1)
            most += 2 * 2 * rows * parts * 8 + 2 * scales
            assert 0 < text.count("rcp.approx.f32") <= scales, name
        assert (fused > 0) == (most > 0), (name, fused)
        assert fused <= most, (name, fused)
        assert ("cvt.rn.satfinite.e4m3x2.f32" in text) == spec.has_scales, name
        # The means' alone.
        means = 2 * rows if spec.statistics == "local" else 0
        assert text.count("div.rn.f32") <= means, name
        assert "div.approx" not in text, name
        assert "div.full" not in text, name


def test_barriers_and_shuffles(built: Built, kernels: dict[str, str]) -> None:
    """A barrier where nothing is summed; partners read again where a shuffle gets them.

    In place, reads of partners come before the block's first write.
    """
    for name, (spec, variant) in built.kernels().items():
        text = kernels[name]
        waits = spec.statistics == "local" or _reads_partners(spec, variant)
        assert text.count("bar.sync") == int(waits), name
        if spec.statistics == "given" and variant.alignment is not None:
            assert ("shfl.sync.bfly" in text) == _shuffles(spec), name
        if waits:
            last = max(match.start() for match in re.finditer(r"ld\.global", text))
            first = min(match.start() for match in re.finditer(r"st\.global", text))
            assert last < text.index("bar.sync") < first, name


def test_accesses(built: Built, kernels: dict[str, str]) -> None:
    """Vectors piece by piece; rows read twice: accesses of 16 bytes, all counted."""
    for name, (spec, variant) in built.kernels().items():
        text = kernels[name]
        if variant.alignment is None:
            assert not re.search(r"[ls][dt]\.global(?:\.cs)?\.v[248]", text), name
            continue
        rows, parts = variant.config.rows, variant.config.columns
        has_cache = spec.operation.has_cache
        of_x, of_table = spec.in_bytes // 2, 1 if spec.rotary_dtype != "float32" else 2
        wide = 2 * rows * parts * of_x * (2 if _reads_partners(spec, variant) else 1)
        wide += rows * parts * of_x if has_cache else 0  # V
        wide += 2 * 2 * parts * (2 if _reads_partners(spec, variant) else 1)  # gamma
        if spec.rotary_dim and not spec.interleaved:
            per_row = parts if 256 % spec.head_dim else 1
            wide += 2 * 2 * rows * per_row * of_table
        loads = len(re.findall(r"ld\.global\.v4\.(?:b32|u32|f32)", text))
        # The compiler may join the operands' branches; it may not read more.
        assert wide // 2 <= loads <= wide, (name, loads, wide)
        assert not re.search(r"[ls][dt]\.global\.[bu](?:8|16) ", text), name
        q_parts, k_parts, *v_parts = _vectors_of_threads(spec, parts)
        k_stores = k_parts if not has_cache or spec.writes_k_out else 0
        stores = rows * of_x * (q_parts + k_stores)
        in_cache = rows * (k_parts + sum(v_parts)) if has_cache else 0
        narrow = in_cache if spec.has_scales else 0
        stores += 0 if spec.has_scales else in_cache * of_x
        assert len(re.findall(r"st\.global\.v4\.b32", text)) == stores, name
        assert len(re.findall(r"st\.global\.v2\.b32", text)) == narrow, name
        # A slot is divided by the block's size in 32 bits.
        assert not re.search(r"(?:div|rem)\.[su]64", text), name


def test_the_wait_comes_before_everything_that_touches_memory(
    built: Built, kernels: dict[str, str]
) -> None:
    """Data read before the previous kernel has written it, or written while that reads."""
    for name, text in kernels.items():
        (wait,) = re.finditer(r"griddepcontrol\.wait", text)
        touched = re.finditer(r"\b(?:ld|st)\.global", text)
        assert min(match.start() for match in touched) > wait.start(), name
        assert text.count("griddepcontrol.launch_dependents") == 1, name
        assert "ld.global.nc" not in text, name


def test_no_local_memory_and_few_registers(built: Built) -> None:
    """Arrays that went to memory; so many registers that few blocks fit a multiprocessor."""
    usage = used(built.device_code("cubin", "sm_90")[1])
    assert set(usage) == set(built.kernels())
    for name, kernel in usage.items():
        variant = built.kernels()[name][1]
        assert kernel.local_memory == 0, name
        vectors = variant.config.rows * variant.config.columns
        most = 144 if variant.alignment is None else 56 if vectors == 1 else 96
        assert kernel.registers <= most, (name, kernel.registers)


# ---- which kernels there are -------------------------------------------------------------------


@pytest.mark.parametrize(
    ("op", "q_cols", "k_cols", "names"),
    [
        (cuda_code.CACHE, 32768, 128, r"q_cols \+ 2 \* k_cols"),
        (cuda_code.ROPE, 32768, 128, r"q_cols \+ k_cols"),
    ],
)
def test_a_row_that_a_block_cannot_hold(op: str, q_cols: int, k_cols: int, names: str) -> None:
    """A kernel that leaves columns out; a message that does not say which."""
    spec = KernelSpec(op=op, q_cols=q_cols, k_cols=k_cols, head_dim=128, target=cuda_code.SM_90)
    message = names + r" must be at most 32768, .* got q_cols=32768 and k_cols=128"
    with pytest.raises(ValueError, match=message):
        default_variants(spec)
    assert default_variants(spec.replace(q_cols=28672))


@pytest.mark.parametrize(
    ("head_dim", "rotary_dim", "interleaved", "aligned"),
    [(80, 32, False, True), (80, 40, False, False), (80, 40, True, True), (30, 20, False, False)],
)
def test_vectors_only_where_they_rotate_as_a_whole(
    head_dim: int, rotary_dim: int, interleaved: bool, aligned: bool
) -> None:
    """A vector of two heads, or half of it rotated."""
    spec = KernelSpec(
        op=cuda_code.ROPE, q_cols=8 * head_dim, k_cols=4 * head_dim, head_dim=head_dim,
        rotary_dim=rotary_dim, interleaved=interleaved, target=cuda_code.SM_90,
    )  # fmt: skip
    assert any(variant.alignment is not None for variant in default_variants(spec)) == aligned
    if not aligned:
        with pytest.raises(ValueError, match=r"head_dim must be a multiple of 8, and rotary_dim"):
            default_variants(spec, CudaConfig(vector=8))
