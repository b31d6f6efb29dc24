"""Every output bit equals the unfused float32 graph's, at every CPU level.

Each level's code is in a file of its own; which of its codes a portable file runs is tested in
test_runtime.py, and their exactness in test_fuzz.py.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator

import numpy as np
import pytest
from support import (
    DTYPES,
    NAN_BITS,
    OWN,
    PAIRINGS,
    SPECIAL_GAMMAS,
    VARIANCES,
    Case,
    all_patterns,
    base_of,
    bits_of,
    check_exact,
    compiled,
    filled,
    from_torch,
    levels,
    make_case,
    misaligned,
    needs_level,
    open_columns,
    random_values,
    raw_call,
    specs_of,
    to_torch,
)

import qknorm_tvm
from qknorm_tvm import Module, load
from qknorm_tvm.check import reference
from qknorm_tvm.schedules.cpu_config import CpuConfig

#: Q of whole vectors, K of a vector at most and a rest.
MIXED = (1024, 31)
#: The awkward sizes of Q and K at each width, and the model's own: a default run's, and more.
COLUMNS = ((1, 7), (33, 257), (1536, 256))
MORE_COLUMNS = ((31, 32), (1537, 1536), (8192, 1))
FLOAT32_COLUMNS, MORE_FLOAT32_COLUMNS = ((33, 257),), ((1537, 1536),)
ROWS = (0, 1, 2, 3, 4, 5, 17, 513)


@pytest.fixture(scope="module", params=levels())
def level(request: pytest.FixtureRequest) -> str:
    needs_level(request.param)
    return request.param


@pytest.fixture(scope="module", params=levels(OWN))
def main_level(request: pytest.FixtureRequest) -> str:
    """`level`, of which a default run takes this machine's alone."""
    needs_level(request.param)
    return request.param


@pytest.fixture(scope="module")
def open_module(main_level: str) -> Module:
    return load(open_columns(main_level))


@pytest.fixture(scope="module")
def pairing_module(level: str) -> Module:
    """Every dtype pairing, columns fixed."""
    return load(compiled(f"pairings-{level}", *specs_of(PAIRINGS, [MIXED], level)))


@pytest.fixture(scope="module")
def column_module(main_level: str) -> Module:
    """Column pairs, fixed."""
    specs = [
        *specs_of([("bfloat16", "bfloat16")], COLUMNS, main_level),
        *specs_of([("float32", "float32")], FLOAT32_COLUMNS, main_level),
    ]
    return load(compiled(f"columns-{main_level}", *specs))


@pytest.fixture(scope="module")
def more_columns_module(main_level: str) -> Module:
    specs = [
        *specs_of([("bfloat16", "bfloat16")], MORE_COLUMNS, main_level),
        *specs_of([("float32", "float32")], MORE_FLOAT32_COLUMNS, main_level),
    ]
    return load(compiled(f"more-columns-{main_level}", *specs))


def _special_case(
    values: np.ndarray, q_cols: int, k_cols: int, out_dtype: str, gamma: int, *, cover: str = "q"
) -> Case:
    """Every value in the operand `cover`, under every special variance, with special gammas.

    Each column has one gamma: over ``len(SPECIAL_GAMMAS)`` shifts each value meets each gamma.
    """
    rows = -(-values.size // (q_cols if cover == "q" else k_cols))

    def blocks(cols: int) -> np.ndarray:
        block = np.resize(values, (rows, cols))
        return np.concatenate([block] * len(VARIANCES))

    variances = np.repeat(VARIANCES, rows)
    total = len(variances)
    return Case(
        q_out=filled((total, q_cols), out_dtype),
        k_out=filled((total, k_cols), out_dtype),
        gamma_q=np.resize(np.roll(SPECIAL_GAMMAS, gamma), q_cols),
        gamma_k=np.resize(np.roll(SPECIAL_GAMMAS, gamma), k_cols),
        qk_var=np.stack([variances, variances[::-1]], axis=1),
        q=blocks(q_cols),
        k=blocks(k_cols),
    )


# ---- values ---------------------------------------------------------------------------------


@pytest.mark.parametrize("out_dtype", DTYPES)
@pytest.mark.parametrize("in_dtype", ["bfloat16", "float16"])
def test_all_16_bit_patterns_under_special_variances_and_gammas(
    pairing_module: Module, in_dtype: str, out_dtype: str
) -> None:
    """A rounding, a denormal or a NaN that the vector code treats unlike the float32 graph."""
    for gamma in range(0, len(SPECIAL_GAMMAS), 3):
        case = _special_case(all_patterns(in_dtype), *MIXED, out_dtype, gamma)
        check_exact(pairing_module, case, label=f"gammas rolled by {gamma}")


@pytest.mark.parametrize("epsilon", [0.0, 1e-6, 1e-45, 1e-300, -0.5, 1, float("inf"), 1e39])
def test_epsilon_is_rounded_to_float32_before_it_is_added(
    pairing_module: Module, epsilon: float
) -> None:
    """An epsilon added in float64, or flushed to zero as a denormal."""
    case = _special_case(all_patterns("bfloat16")[::131], *MIXED, "bfloat16", 3)
    check_exact(pairing_module, dataclasses.replace(case, epsilon=epsilon))


@pytest.mark.parametrize(("in_dtype", "out_dtype"), PAIRINGS)
def test_patterns_in_the_columns_beyond_whole_vectors(
    pairing_module: Module, in_dtype: str, out_dtype: str
) -> None:
    """A tail whose scalar code rounds or widens unlike the vector code."""
    values = _float32_sweep() if in_dtype == "float32" else all_patterns(in_dtype)
    check_exact(pairing_module, _special_case(values[::11], *MIXED, out_dtype, 1, cover="k"))


@pytest.mark.parametrize(("in_dtype", "out_dtype"), PAIRINGS)
def test_patterns_with_columns_left_open(
    open_module: Module, in_dtype: str, out_dtype: str
) -> None:
    """Code for columns known at the call only that differs from code for fixed columns."""
    values = _float32_sweep() if in_dtype == "float32" else all_patterns(in_dtype)
    check_exact(open_module, _special_case(values[::7], 512, 263, out_dtype, 2))


def _float32_sweep() -> np.ndarray:
    """Return 65,536 float32 values over all exponents, with the roundings' ties among them."""
    high = np.arange(1 << 16, dtype=np.uint32) << 16
    low = np.resize(
        np.array([0, 1, 0x7FFF, 0x8000, 0x8001, 0xFFFF, 0x1000, 0x0FFF, 0x1001], np.uint32), 1 << 16
    )
    return (high | low).view(np.float32)


@pytest.mark.parametrize("out_dtype", DTYPES)
def test_float32_values_at_rounding_ties(pairing_module: Module, out_dtype: str) -> None:
    """Half-way cases rounded away from even, or rounded twice."""
    check_exact(pairing_module, _special_case(_float32_sweep(), *MIXED, out_dtype, 2))
    # x * 1 * 1: the input itself reaches the last cast, so each tie is one there too.
    values = _float32_sweep().reshape(64, 1024)
    case = make_case(64, *MIXED, "float32", out_dtype)
    case.q, case.k = values, values[:, 5:36].copy()
    case.gamma_q[:], case.gamma_k[:], case.qk_var[:], case.epsilon = 1, 1, 1, 0.0
    check_exact(pairing_module, case, label="scaled by one")


@pytest.mark.parametrize("in_dtype", DTYPES)
@pytest.mark.parametrize("where", ["q", "gamma", "qk_var"])
def test_no_nan_becomes_a_number_in_bfloat16(
    pairing_module: Module, where: str, in_dtype: str
) -> None:
    """The rounding carry of a NaN with a full payload runs into the sign: 0x7fffffff becomes -0."""
    if where == "q" and in_dtype != "float32":
        nans = all_patterns(in_dtype)
        nans = nans[np.isnan(nans.astype(np.float32))]
    else:
        nans = NAN_BITS.view(np.float32)
    for shift in range(0, len(nans), max(1, len(nans) // 8)):
        case = make_case(5, *MIXED, in_dtype, "bfloat16")
        case.q = np.ones_like(case.q)
        case.k = np.ones_like(case.k)
        case.gamma_q[:], case.gamma_k[:], case.qk_var[:] = 1, 1, 1
        rolled = np.roll(nans, shift)
        if where == "q":
            case.q[...], case.k[...] = (
                np.resize(rolled, case.q.shape),
                np.resize(rolled, case.k.shape),
            )
        elif where == "gamma":
            case.gamma_q[:] = np.resize(rolled, case.gamma_q.shape)
            case.gamma_k[:] = np.resize(rolled, case.gamma_k.shape)
        else:
            case.qk_var[...] = np.resize(rolled, case.qk_var.shape)
        raw_call(pairing_module, *case.tensors, case.epsilon)
        assert np.isnan(case.q_out.astype(np.float32)).all()
        assert np.isnan(case.k_out.astype(np.float32)).all()


# ---- shapes ---------------------------------------------------------------------------------


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize(
    ("dtype", "q_cols", "k_cols"),
    [("bfloat16", *pair) for pair in COLUMNS] + [("float32", *pair) for pair in FLOAT32_COLUMNS],
)
def test_fixed_columns(
    column_module: Module, dtype: str, q_cols: int, k_cols: int, rows: int
) -> None:
    """A tile, panel or tail that is skipped or done twice at some size."""
    check_exact(column_module, make_case(rows, q_cols, k_cols, dtype))


@pytest.mark.slow
@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize(
    ("dtype", "q_cols", "k_cols"),
    [("bfloat16", *pair) for pair in MORE_COLUMNS]
    + [("float32", *pair) for pair in MORE_FLOAT32_COLUMNS],
)
def test_more_fixed_columns(
    more_columns_module: Module, dtype: str, q_cols: int, k_cols: int, rows: int
) -> None:
    check_exact(more_columns_module, make_case(rows, q_cols, k_cols, dtype))


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize(("in_dtype", "out_dtype"), PAIRINGS)
def test_open_columns(open_module: Module, in_dtype: str, out_dtype: str, rows: int) -> None:
    """Open columns at sizes below, at and above a vector."""
    for q_cols, k_cols in ((1, 7), (31, 32), (33, 257)):
        check_exact(open_module, make_case(rows, q_cols, k_cols, in_dtype, out_dtype))


@pytest.mark.parametrize(("q_cols", "k_cols"), [(1537, 1536), (8192, 1), (1, 8192)])
def test_open_columns_large(open_module: Module, q_cols: int, k_cols: int) -> None:
    check_exact(open_module, make_case(17, q_cols, k_cols))


@pytest.mark.parametrize("threads", [1, 2, 3])
@pytest.mark.parametrize("rows", [1, 255, 1023, 1024])
def test_threads(column_module: Module, threads: int, rows: int) -> None:
    """Rows between two tasks that are left out or written by both."""
    set_threads = column_module.library.get_function("qknorm_set_num_threads")
    set_threads(threads)
    try:
        assert column_module.library.get_function("qknorm_get_num_threads")() == threads
        check_exact(column_module, make_case(rows, 1536, 256))
        check_exact(column_module, make_case(rows, 33, 257, "float32"))
    finally:
        set_threads(0)


# ---- layouts --------------------------------------------------------------------------------


def _layouts(case: Case) -> Iterator[tuple[str, Case]]:
    """Yield the same numbers in every layout that is legal."""
    rows, q_cols = case.q.shape
    k_cols = case.k.shape[1]

    def slices(gap: int, q: np.ndarray, k: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        fused = filled((rows, gap + q_cols + k_cols + q_cols), q.dtype.name)
        parts = fused[:, gap : gap + q_cols], fused[:, gap + q_cols : gap + q_cols + k_cols]
        parts[0][...], parts[1][...] = q, k
        return parts

    for gap in (0, 1, 32):
        q, k = slices(gap, case.q, case.k)
        yield f"inputs are slices after {gap} columns", dataclasses.replace(case, q=q, k=k)
        q_out, k_out = slices(gap, case.q_out, case.k_out)
        yield (
            f"outputs are slices after {gap} columns",
            dataclasses.replace(case, q_out=q_out, k_out=k_out),
        )
        yield (
            f"inputs and outputs are slices after {gap} columns",
            dataclasses.replace(case, q_out=q_out.copy(), k_out=k_out, q=q, k=k),
        )
    yield (
        "rows of the inputs repeat one (stride 0)",
        dataclasses.replace(
            case,
            q=np.broadcast_to(case.q[:1], case.q.shape),
            k=np.broadcast_to(case.k[:1], case.k.shape),
        ),
    )
    yield (
        "rows of the inputs overlap",
        dataclasses.replace(
            case,
            q=np.lib.stride_tricks.as_strided(
                np.resize(case.q, rows + q_cols), case.q.shape, (case.q.itemsize,) * 2
            ),
        ),
    )
    yield (
        "one mean square for all rows (stride 0)",
        dataclasses.replace(case, qk_var=np.broadcast_to(case.qk_var[:1], case.qk_var.shape)),
    )
    wide = np.full((rows, 5), 7, np.float32)
    wide[:, 2:4] = case.qk_var
    yield "mean squares in a wider buffer", dataclasses.replace(case, qk_var=wide[:, 2:4])
    everything = {
        name: getattr(case, name)
        for name in ("q_out", "k_out", "gamma_q", "gamma_k", "qk_var", "q", "k")
    }
    for name, array in everything.items():
        for offset in (1, array.itemsize, 16, 63):
            moved = misaligned(array, offset)
            yield (
                f"{name} is misaligned by {offset} bytes",
                dataclasses.replace(case, **{name: moved}),
            )
    moved_all = {name: misaligned(array, 1) for name, array in everything.items()}
    yield "everything is misaligned by 1 byte", dataclasses.replace(case, **moved_all)


@pytest.mark.parametrize("rows", [1, 3, 6])
@pytest.mark.parametrize(("in_dtype", "out_dtype"), PAIRINGS)
def test_layouts(pairing_module: Module, in_dtype: str, out_dtype: str, rows: int) -> None:
    """A stride or an alignment that the code assumed; a write beside an output's rows."""
    for label, case in _layouts(make_case(rows, *MIXED, in_dtype, out_dtype)):
        outside = []
        for out in (case.q_out, case.k_out):
            base = base_of(out)
            if base is not out and base.dtype == out.dtype and base.shape[0] == rows:
                outside.append((base, base.copy(), out))
        check_exact(pairing_module, case, label=label)
        for base, before, out in outside:
            if base is base_of(case.q_out) and base is base_of(case.k_out):
                first = case.q_out.ctypes.data - base.ctypes.data
                start = first // base.itemsize
                width = case.q_out.shape[1] + case.k_out.shape[1]
            else:
                start = (out.ctypes.data - base.ctypes.data) // base.itemsize
                width = out.shape[1]
            for part in (slice(None, start), slice(start + width, None)):
                assert bits_of(base[:, part]) == bits_of(before[:, part]), f"wrote beside; {label}"


@pytest.mark.parametrize("rows", [1, 4, 17, 513])
@pytest.mark.parametrize("dtype", DTYPES)
def test_in_place(pairing_module: Module, dtype: str, rows: int) -> None:
    """An input read again after its place was written."""
    case = make_case(rows, *MIXED, dtype)
    check_exact(pairing_module, dataclasses.replace(case, q_out=case.q, k_out=case.k))
    fused = random_values(np.random.default_rng(rows), (rows, 2 * sum(MIXED)), dtype)
    q = fused[:, : MIXED[0]]
    k = fused[:, MIXED[0] : sum(MIXED)]
    rest = fused[:, sum(MIXED) :].copy()
    check_exact(pairing_module, dataclasses.replace(case, q_out=q, k_out=k, q=q, k=k))
    assert bits_of(fused[:, sum(MIXED) :]) == bits_of(rest)


def test_in_place_of_one_operand_alone(pairing_module: Module) -> None:
    case = make_case(17, *MIXED)
    check_exact(pairing_module, dataclasses.replace(case, k_out=case.k))


def test_in_place_where_float16_becomes_bfloat16(pairing_module: Module) -> None:
    """Equal sizes of elements, other types: in place is still defined."""
    case = make_case(17, *MIXED, "float16", "bfloat16")
    case.q_out = case.q.view(reference.NUMPY_DTYPES["bfloat16"])
    check_exact(pairing_module, case)


def test_outputs_between_inputs_of_one_buffer(pairing_module: Module) -> None:
    """Outputs in columns of the fused buffer that hold no input are no overlap."""
    case = make_case(9, *MIXED)
    fused = filled((9, 2 * sum(MIXED)), "bfloat16")
    starts = np.cumsum([0, MIXED[0], MIXED[0], MIXED[1], MIXED[1]])
    q, q_out, k, k_out = (fused[:, a:b] for a, b in itertools.pairwise(starts))
    q[...], k[...] = case.q, case.k
    check_exact(pairing_module, dataclasses.replace(case, q=q, k=k, q_out=q_out, k_out=k_out))
    assert bits_of(q) == bits_of(case.q)
    assert bits_of(k) == bits_of(case.k)


# ---- configs --------------------------------------------------------------------------------

#: Everything that a config can ask for, each with a spec of its own (columns tell them apart).
CONFIGS = (
    CpuConfig(vector=1, row_tile=1, rounding="shift", streaming_bytes=0),
    CpuConfig(vector=2, row_tile=3, rounding="mask", bytes_per_task=1),
    CpuConfig(vector=4, row_tile=2, rounding="saturate", streaming_bytes=1),
    CpuConfig(vector=8, row_tile=16, rounding="saturate", streaming_bytes=1),
    CpuConfig(vector=16, row_tile=4, rounding="mask", streaming_bytes=1),
    CpuConfig(vector=32, row_tile=1, rounding="saturate", streaming_bytes=1),
    CpuConfig(vector=64, row_tile=2, rounding="mask", streaming_bytes=1, bytes_per_task=1),
    CpuConfig(vector=128, row_tile=1, rounding="shift", streaming_bytes=1),
)
CONFIG_PAIRINGS = (("bfloat16", "bfloat16"), ("float32", "bfloat16"))


#: Of these a default run takes one that is narrow, one of many rows, and one that is wide.
FEW_CONFIGS = (2, 4, 7)


def _few(pairing: tuple[str, str], index: int) -> bool:
    return index in FEW_CONFIGS and pairing == CONFIG_PAIRINGS[index % 2]


@pytest.mark.parametrize(
    ("pairing", "index"),
    [
        pytest.param(
            pairing,
            index,
            marks=() if _few(pairing, index) else pytest.mark.slow,
            id=f"{'-'.join(pairing)}-vector{CONFIGS[index].vector}",
        )
        for pairing in CONFIG_PAIRINGS
        for index in range(len(CONFIGS))
    ],
)
def test_every_config_is_exact(main_level: str, pairing: tuple[str, str], index: int) -> None:
    """A field of the config that changes results."""
    # Two files a level: that of a default run is small. Columns tell a file's specs apart.
    few = _few(pairing, index)
    specs = {
        spec: config
        for each, (i, config) in itertools.product(CONFIG_PAIRINGS, enumerate(CONFIGS))
        for spec in specs_of([each], [(160 + i, 64)], main_level)
        if _few(each, i) is few
    }
    name = f"{'few' if few else 'other'}-configs-{main_level}"
    module = load(compiled(name, *specs, config=specs))
    for rows in (1, 2, 7, 33):
        check_exact(module, make_case(rows, 160 + index, 64, *pairing))
    values = _float32_sweep() if pairing[0] == "float32" else all_patterns(pairing[0])
    check_exact(module, _special_case(values[::23], 160 + index, 64, pairing[1], index))


def test_every_conversion_is_exact() -> None:
    """A width, a tile or a store past the caches that the CPU's own conversion does not fit."""
    level = "x86-64-v4-bf16"
    needs_level(level)
    configs = [
        CpuConfig(vector=vector, row_tile=row_tile, rounding="convert", streaming_bytes=streaming)
        for vector in (16, 32, 64, 128)
        for row_tile, streaming in ((1, 1), (3, 1), (4, 0))
    ]
    specs = {
        spec: config
        for i, config in enumerate(configs)
        for spec in specs_of(CONFIG_PAIRINGS, [(160 + i, 128)], level)
    }
    module = load(compiled("conversions", *specs, config=specs))
    for spec in specs:
        for rows in (1, 2, 7, 33):
            check_exact(module, make_case(rows, spec.q_cols, 128, spec.in_dtype, "bfloat16"))
        values = _float32_sweep() if spec.in_dtype == "float32" else all_patterns(spec.in_dtype)
        check_exact(module, _special_case(values[::23], spec.q_cols, 128, "bfloat16", 0))


STREAM_PAIRINGS = (
    ("bfloat16", "bfloat16"),
    ("float16", "float16"),
    ("float32", "float32"),
    ("bfloat16", "float32"),
    ("float32", "bfloat16"),
)


@pytest.fixture(scope="module")
def stream_module(main_level: str) -> Module:
    """Stores past the caches at every size; columns of whole cache lines, and not."""
    specs = list(specs_of(STREAM_PAIRINGS, [(256, 40)], main_level))
    config = {
        spec: CpuConfig(vector=32 if spec.out_bytes == 2 else 16, row_tile=4, streaming_bytes=1)
        for spec in specs
    }
    return load(compiled(f"stream-{main_level}", *specs, config=config))


@pytest.mark.slow
@pytest.mark.parametrize(("in_dtype", "out_dtype"), STREAM_PAIRINGS)
def test_stores_past_the_caches(stream_module: Module, in_dtype: str, out_dtype: str) -> None:
    """Rows aligned at the first only; a tail beside a streamed line; stores not yet seen."""
    for rows, gap, shift in itertools.product((4, 9, 257), (0, 32, 1), (0, 2)):
        case = make_case(rows, 256, 40, in_dtype, out_dtype)
        for name in ("q_out", "k_out", "q", "k"):
            array = getattr(case, name)
            cols = -(-array.shape[1] // 32) * 32 + gap
            wide = misaligned(np.resize(array, (rows, cols)), shift * array.itemsize)
            wide[:, : array.shape[1]] = array
            setattr(case, name, wide[:, : array.shape[1]])
            if name.endswith("_out"):
                wide.view(np.uint8)[...] = 0xA5
        check_exact(stream_module, case, label=f"{rows} rows, gap {gap}, shifted by {shift}")
        for out in (case.q_out, case.k_out):
            wide = base_of(out).view(np.uint8)
            start = out.ctypes.data - wide.ctypes.data
            assert wide[:start].tobytes() == bytes(start), "wrote before the output"
            step, width = out.strides[0], out.shape[1] * out.itemsize
            for row in range(rows - 1):
                beside = wide[start + row * step + width : start + (row + 1) * step]
                assert (beside == 0xA5).all(), "wrote beside the output"
    if in_dtype == out_dtype:
        case = make_case(8, 256, 40, in_dtype)
        q, k = misaligned(case.q, 0), misaligned(case.k, 0)
        check_exact(stream_module, dataclasses.replace(case, q=q, k=k, q_out=q, k_out=k))


def test_outputs_beyond_the_caches(column_module: Module) -> None:
    """The size from which the default config stores past the caches, with several tasks."""
    case = make_case(9400, 1536, 256)
    case.q_out, case.k_out = misaligned(case.q_out, 0), misaligned(case.k_out, 0)
    case.q, case.k = misaligned(case.q, 0), misaligned(case.k, 0)
    assert case.q_out.nbytes + case.k_out.nbytes > 1 << 25
    column_module.library.get_function("qknorm_set_num_threads")(2)
    try:
        check_exact(column_module, case)
    finally:
        column_module.library.get_function("qknorm_set_num_threads")(0)


# ---- torch ----------------------------------------------------------------------------------


@pytest.mark.frameworks
@pytest.mark.parametrize("out_dtype", DTYPES)
@pytest.mark.parametrize("in_dtype", DTYPES)
def test_equals_unfused_torch(in_dtype: str, out_dtype: str) -> None:
    """A reference that agrees with itself but not with the graph that models run."""
    torch = pytest.importorskip("torch", reason="compares with torch, which is not installed")
    values = _float32_sweep() if in_dtype == "float32" else all_patterns(in_dtype)
    case = _special_case(values, *MIXED, out_dtype, 4)
    q, k, var, gamma_q, gamma_k = map(
        to_torch, (case.q, case.k, case.qk_var, case.gamma_q, case.gamma_k)
    )
    kind = getattr(torch, out_dtype)

    def unfused(x, column, gamma):
        rs = torch.rsqrt(var[:, column : column + 1] + case.epsilon)
        return ((x.float() * rs) * gamma).to(kind)

    outputs = qknorm_tvm.apply_qk_rms_norm(
        q, k, var, gamma_q, gamma_k, case.epsilon, out_dtype=kind
    )
    for actual, wanted in zip(
        outputs, (unfused(q, 0, gamma_q), unfused(k, 1, gamma_k)), strict=True
    ):
        assert reference.differing(from_torch(actual), from_torch(wanted)) == 0
