"""Norm, rotation and paged cache through the Python API, with NumPy arrays."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import pytest
from support import RawTensor, random_values

import qknorm_tvm
from qknorm_tvm import KernelSpec
from qknorm_tvm.call import cache
from qknorm_tvm.check.reference import NUMPY_DTYPES, differing
from qknorm_tvm.check.rope_reference import rope_reference
from qknorm_tvm.targets import host_cpu_target

Q_COLS, K_COLS, HEAD_DIM, MAX_POSITION = 256, 128, 64, 40
KV_HEADS = K_COLS // HEAD_DIM
BFLOAT16, FLOAT8 = ml_dtypes.bfloat16, ml_dtypes.float8_e4m3fn
#: What calls of `arguments` are compiled for.
CACHE = KernelSpec(
    op="qk_rms_norm_rope_cache",
    q_cols=Q_COLS,
    k_cols=K_COLS,
    head_dim=HEAD_DIM,
    rotary_dim=32,
    statistics="local",
    target=host_cpu_target(),
)
ALONE = CACHE.replace(op="qk_rms_norm_rope", cache_dtype=None)
FLOAT8_CACHE = CACHE.replace(cache_dtype="float8_e4m3fn")
#: What the tests below call; the fuzz tests too.
SPECS = (
    CACHE,
    CACHE.replace(rotary_dim=0),
    CACHE.replace(writes_k_out=True),
    FLOAT8_CACHE,
    ALONE,
)


def arguments(
    rows: int = 9, *, dtype: str = "bfloat16", rotary_dim: int = 32, block_size: int = 16
) -> dict[str, Any]:
    """Return random arguments of `qk_rms_norm_rope_cache`: slices of one projection, one buffer."""
    rng = np.random.default_rng(rows)
    qkv = random_values(rng, (rows, Q_COLS + 2 * K_COLS), dtype)
    blocks = -(-2 * rows // block_size) + 1
    caches = random_values(rng, (blocks, 2, block_size, KV_HEADS, HEAD_DIM), dtype)
    slots = rng.permutation(blocks * block_size)[:rows]
    return {
        "q": qkv[:, :Q_COLS],
        "k": qkv[:, Q_COLS : Q_COLS + K_COLS],
        "v": qkv[:, Q_COLS + K_COLS :],
        "gamma_q": random_values(rng, (Q_COLS,), "float32"),
        "gamma_k": random_values(rng, (K_COLS,), "float32"),
        "positions": rng.integers(0, MAX_POSITION, rows),
        "cos_sin_cache": random_values(rng, (MAX_POSITION, rotary_dim), dtype),
        "k_cache": caches[:, 0],
        "v_cache": caches[:, 1],
        "slot_mapping": np.where(rng.random(rows) < 0.3, -1 - slots, slots),
        "head_dim": HEAD_DIM,
    }


def copied(given: dict[str, Any]) -> dict[str, Any]:
    """Return arguments whose arrays are copies with the same strides."""
    new = {}
    for name, value in given.items():
        if isinstance(value, np.ndarray):
            low, high = np.lib.array_utils.byte_bounds(value) if value.size else (0, 0)
            memory = np.zeros(high - low, np.uint8)
            array = np.ndarray(value.shape, value.dtype, memory, 0, value.strides)
            array[...] = value
            value = array
        new[name] = value
    return new


def check(spec: KernelSpec, given: dict[str, Any]) -> None:
    """Call the operation, and compare every output with the reference, bit by bit."""
    expected = rope_reference(spec, given)
    before = {"slot_mapping": given["slot_mapping"].copy(), "v": given["v"].copy()}
    q_out, k_out = qknorm_tvm.qk_rms_norm_rope_cache(**given)
    outputs = {"q_out": q_out, "k_out": k_out}
    outputs |= {name: given[name] for name in ("k_cache", "v_cache")}
    assert (k_out is not None) == spec.writes_k_out
    for name, value in expected.items():
        assert differing(outputs[name], value) == 0, name
    for name, value in before.items():
        assert given[name].tobytes() == value.tobytes(), name


@pytest.mark.parametrize("rows", [0, 1, 2, 9, 64])
def test_equals_the_reference(rows: int) -> None:
    check(CACHE, arguments(rows))


@pytest.mark.parametrize("block_size", [1, 32, 64])
def test_any_block_size(block_size: int) -> None:
    check(CACHE, arguments(block_size=block_size))


@pytest.mark.parametrize("layout", ["heads before slots", "two first", "packed"])
def test_any_layout_of_caches(layout: str) -> None:
    """A stride taken for another: vLLM's and SGLang's layouts."""
    given = arguments()
    blocks, block_size = given["k_cache"].shape[:2]
    rng = np.random.default_rng(0)
    if layout == "heads before slots":
        caches = random_values(rng, (2, blocks, KV_HEADS, block_size, HEAD_DIM), "bfloat16")
        caches = caches.swapaxes(2, 3)
    else:
        caches = random_values(rng, (2, *given["k_cache"].shape), "bfloat16")
    given["k_cache"], given["v_cache"] = caches
    if layout == "packed":
        given["v_cache"] = given["v_cache"].copy()
    check(CACHE, given)


def test_fewer_slots_than_rows() -> None:
    """A batch that is padded, as engines' CUDA graphs are."""
    given = arguments()
    given["slot_mapping"] = given["slot_mapping"][:5].copy()
    check(CACHE, given)
    given["slot_mapping"] = given["slot_mapping"][:0].copy()
    check(CACHE, given)


def test_in_place() -> None:
    given = arguments()
    expected = rope_reference(CACHE, given)
    given = copied(given)
    q_out, _ = qknorm_tvm.qk_rms_norm_rope_cache(**given, q_out=given["q"])
    assert q_out is given["q"]
    assert differing(q_out, expected["q_out"]) == 0
    assert differing(given["k_cache"], expected["k_cache"]) == 0


@pytest.mark.slow
def test_k_out_and_k_in_place() -> None:
    spec = CACHE.replace(writes_k_out=True)
    given = arguments()
    check(spec, given | {"k_out": np.empty((9, K_COLS), BFLOAT16)})
    given = arguments()
    expected = rope_reference(spec, given)
    qknorm_tvm.qk_rms_norm_rope_cache(**given, q_out=given["q"], k_out=given["k"])
    for name, output in (("q_out", given["q"]), ("k_out", given["k"])):
        assert differing(output, expected[name]) == 0


def test_without_a_rotation() -> None:
    """OLMo-Hybrid's: norm and cache alone."""
    spec = CACHE.replace(rotary_dim=0)
    check(spec, arguments() | {"positions": None, "cos_sin_cache": None})


@pytest.mark.slow
def test_given_statistics_float16_and_float32_angles() -> None:
    spec = CACHE.replace(
        in_dtype="float16", out_dtype=None, cache_dtype=None, rotary_dtype="float32",
        statistics="given", interleaved=True,
    )  # fmt: skip
    given = arguments(dtype="float16")
    rng = np.random.default_rng(1)
    given |= {
        "cos_sin_cache": random_values(rng, (MAX_POSITION, 32), "float32"),
        "qk_var": np.abs(random_values(rng, (9, 2), "float32")),
        "interleaved": True,
    }
    check(spec, given)


@pytest.mark.parametrize("count", [1, KV_HEADS])
def test_float8_caches(count: int) -> None:
    """A scale for a tensor or for each head; zero-dimensional ones are engines' own."""
    spec = FLOAT8_CACHE
    given = arguments()
    for name in ("k_cache", "v_cache"):
        given[name] = np.zeros(given[name].shape, FLOAT8)
        given[name[0] + "_scale"] = np.linspace(0.01, 3, count, dtype=np.float32)
    check(spec, given)
    if count == 1:
        given |= {name: given[name].reshape(()) for name in ("k_scale", "v_scale")}
        expected = given["k_cache"].copy()
        qknorm_tvm.qk_rms_norm_rope_cache(**given)
        assert given["k_cache"].tobytes() == expected.tobytes()


@pytest.mark.slow
def test_rotation_alone_is_what_the_cache_gets() -> None:
    """The two operations of one call apart."""
    given = arguments()
    names = ("q", "k", "gamma_q", "gamma_k", "positions", "cos_sin_cache", "head_dim")
    alone = {name: given[name] for name in names}
    q_out, k_out = qknorm_tvm.qk_rms_norm_rope(**alone)
    expected = rope_reference(ALONE, given)
    assert differing(q_out, expected["q_out"]) == 0
    assert differing(k_out, expected["k_out"]) == 0
    qknorm_tvm.qk_rms_norm_rope(**alone, q_out=given["q"], k_out=given["k"])
    assert differing(given["q"], expected["q_out"]) == 0
    assert differing(given["k"], expected["k_out"]) == 0


# ---- bad input -----------------------------------------------------------------------------------


def strided(array: np.ndarray, *strides: int) -> np.ndarray:
    """Return zeros of an array's shape with other strides, in elements, in memory of their own."""
    reach = [(extent - 1) * stride for extent, stride in zip(array.shape, strides, strict=True)]
    before, after = -sum(min(step, 0) for step in reach), sum(max(step, 0) for step in reach)
    memory = np.zeros(before + after + 1, array.dtype)
    steps = [stride * array.itemsize for stride in strides]
    return np.lib.stride_tricks.as_strided(memory[before:], array.shape, steps)


#: What is changed of `arguments`, and what it gets.
REFUSED: list[Any] = [
    (lambda a: {"head_dim": 60}, ValueError, "head_dim must divide q_cols, 256, got 60"),
    (lambda a: {"head_dim": 256}, ValueError, "head_dim must divide k_cols, 128, got 256"),
    (lambda a: {"head_dim": "64"}, TypeError, "head_dim must be an int, got str"),
    (lambda a: {"head_dim": 16}, ValueError,
     r"cos_sin_cache must have an even number of columns, at most head_dim \(16\), got 32"),
    (lambda a: {"cos_sin_cache": a["cos_sin_cache"][:, :31]}, ValueError,
     r"cos_sin_cache must have an even number of columns, at most head_dim \(64\), got 31"),
    (lambda a: {"cos_sin_cache": a["cos_sin_cache"].astype("f2")}, ValueError,
     "rotary_dtype must be one of bfloat16, float32, got 'float16'"),
    (lambda a: {"cos_sin_cache": a["cos_sin_cache"][0]}, ValueError,
     "cos_sin_cache must have 2 dimensions, got 1"),
    (lambda a: {"cos_sin_cache": None}, ValueError,
     "positions and cos_sin_cache must be given both or neither, got positions alone"),
    (lambda a: {"positions": None}, ValueError,
     "positions and cos_sin_cache must be given both or neither, got cos_sin_cache alone"),
    (lambda a: {"positions": a["positions"].astype("i4")}, TypeError,
     "positions must be int64, got int32"),
    (lambda a: {"positions": a["positions"][:4]}, ValueError,
     "positions must have 9 elements like q's rows, got 4"),
    (lambda a: {"positions": a["positions"][:, None]}, ValueError,
     "positions must have 1 dimension, got 2"),
    (lambda a: {"positions": np.repeat(a["positions"], 2)[::2]}, ValueError,
     r"positions must be contiguous in its last dimension \(stride 1\), got stride 2"),
    (lambda a: {"positions": np.full(9, MAX_POSITION)}, ValueError,
     "positions must be less than cos_sin_cache's 40 rows, and 0 or more, got 40 in row 0"),
    (lambda a: {"positions": np.arange(9) - 1}, ValueError,
     "positions must be less than cos_sin_cache's 40 rows, and 0 or more, got -1 in row 0"),
    (lambda a: {"slot_mapping": a["slot_mapping"].astype("i4")}, TypeError,
     "slot_mapping must be int64, got int32"),
    (lambda a: {"slot_mapping": np.arange(10)}, ValueError,
     "slot_mapping must have at most 9 elements like q's rows, got 10"),
    (lambda a: {"slot_mapping": np.array([0, 48])}, ValueError,
     "slot_mapping must be less than k_cache's 48 slots, got 48 in row 1"),
    (lambda a: {"slot_mapping": None}, TypeError, "slot_mapping must be a NumPy array"),
    (lambda a: {"slot_mapping": 1.5}, TypeError, "slot_mapping must be a NumPy array"),
    (lambda a: {"slot_mapping": a["slot_mapping"].tolist()}, TypeError,
     "slot_mapping must be a NumPy array"),
    (lambda a: {"slot_mapping": np.full(9, np.nan)}, TypeError,
     "slot_mapping must be int64, got float64"),
    (lambda a: {"positions": a["positions"].tolist()}, TypeError,
     "positions must be a NumPy array"),
    (lambda a: {"positions": a["positions"].astype("U4")}, TypeError,
     "positions must be a numeric array, got <U4"),
    (lambda a: {"positions": a["positions"].astype("c8")}, TypeError,
     "positions must be int64, got complex64"),
    (lambda a: {"v": a["v"][:, :64]}, ValueError, "v must have 128 columns, got 64"),
    (lambda a: {"v": a["v"].astype("f4")}, TypeError, "v must be bfloat16, got float32"),
    (lambda a: {"k_cache": a["k_cache"].astype("f4")}, TypeError,
     "k_cache must be bfloat16 like q, or float8_e4m3fn, got float32"),
    (lambda a: {"v_cache": a["v_cache"].astype("f4")}, TypeError,
     "v_cache must be bfloat16, got float32"),
    (lambda a: {"k_cache": a["k_cache"][0, 0, 0]}, ValueError,
     "k_cache must have 4 dimensions, got 1"),
    *((lambda a, name=name: {name: RawTensor(a[name])}, TypeError,
       rf"{name} must have the attributes dtype and shape, got RawTensor")
      for name in ("q", "k", "cos_sin_cache", "k_cache")),
    (lambda a: {"q": np.array(1, BFLOAT16)}, ValueError, "q must have 2 dimensions, got 0"),
    (lambda a: {"k_cache": a["k_cache"][0]}, ValueError, "k_cache must have 4 dimensions, got 3"),
    (lambda a: {"k_cache": a["k_cache"][:, :, :1]}, ValueError, "k_cache must have 2 heads, got 1"),
    (lambda a: {"k_cache": a["k_cache"][..., :32]}, ValueError,
     "k_cache must have 64 columns in a head, got 32"),
    (lambda a: {"v_cache": a["v_cache"][1:]}, ValueError,
     "v_cache must have 3 blocks like k_cache, got 2"),
    (lambda a: {"v_cache": a["v_cache"][:, :8]}, ValueError,
     "v_cache must have 16 slots in a block like k_cache, got 8"),
    (lambda a: {"v_cache": a["k_cache"]}, ValueError,
     "v_cache must not overlap k_cache, got tensors that share memory"),
    (lambda a: {"k_cache": strided(a["k_cache"], 0, 128, 64, 1)}, ValueError,
     "k_cache must have slots that do not overlap, within the address space, got strides"),
    (lambda a: {"k_cache": strided(a["k_cache"], 2048, 64, 64, 1)}, ValueError,
     "k_cache must have slots that do not overlap"),
    (lambda a: {"k_cache": strided(a["k_cache"], 2048, -128, 64, 1)}, ValueError,
     "k_cache must have slots that do not overlap"),
    (lambda a: {"k_cache": strided(a["k_cache"], 4096, 128, 64, 2)}, ValueError,
     "k_cache must be contiguous in its last dimension"),
    (lambda a: {"k_scale": np.ones(1, "f4")}, ValueError,
     "k_scale must be None for a cache of bfloat16, got a scale"),
    (lambda a: {"k_cache": a["k_cache"].astype(FLOAT8), "v_cache": a["v_cache"].astype(FLOAT8)},
     ValueError, "k_scale must be given for a cache of float8_e4m3fn, got None"),
    pytest.param(lambda a: {"k_out": a["q"][:, :K_COLS]}, ValueError,
                 "k_out must not overlap q, got tensors that share memory",
                 marks=pytest.mark.slow),  # of a spec of its own
    (lambda a: {"q_out": np.empty((9, Q_COLS), "f4")}, TypeError,
     "q_out must be bfloat16, got float32"),
    pytest.param(lambda a: {"qk_var": np.zeros((3, 2), "f4")}, ValueError,
                 "qk_var must have 9 rows like q, got 3", marks=pytest.mark.slow),
    (lambda a: {"interleaved": 1}, TypeError, "interleaved must be a bool, got int"),
    (lambda a: {"epsilon": "x"}, TypeError, "epsilon must be a float, got 'x'"),
]  # fmt: skip


@pytest.mark.parametrize("validate", [False, True])
@pytest.mark.parametrize(("change", "error", "message"), REFUSED)
def test_wrong_arguments_are_refused_before_anything_is_written(
    change: Any, error: type[Exception], message: str, validate: bool
) -> None:
    given = arguments()
    changed = given | change(given)
    before = {
        name: value.copy() for name, value in changed.items() if isinstance(value, np.ndarray)
    }
    if validate:  # which looks at all numbers at once
        message = message.partition(" in row")[0]
    with pytest.raises(error, match=f"^{message}"):
        qknorm_tvm.qk_rms_norm_rope_cache(**changed, validate=validate)
    for name, value in before.items():
        assert changed[name].tobytes() == value.tobytes(), name


def test_scales_of_another_number_are_refused() -> None:
    given = arguments()
    given |= {name: np.zeros(given[name].shape, FLOAT8) for name in ("k_cache", "v_cache")}
    given |= {"k_scale": np.ones(3, "f4"), "v_scale": np.ones(1, "f4")}
    message = "k_scale must have 1 or 2 elements like k's heads, got 3"
    with pytest.raises(ValueError, match=f"^{message}"):
        qknorm_tvm.qk_rms_norm_rope_cache(**given)


def test_caches_side_by_side_in_one_buffer_do_not_overlap() -> None:
    """Overlap by first and last byte: vLLM's caches would be refused; one off by a head is not."""
    given = arguments()
    buffer = np.zeros((3, 2, 16, KV_HEADS + 1, HEAD_DIM), BFLOAT16)
    given["k_cache"], given["v_cache"] = buffer[:, 0, :, :-1], buffer[:, 1, :, :-1]
    check(CACHE, given)
    given["v_cache"] = buffer[:, 0, :, 1:]
    with pytest.raises(ValueError, match=r"^v_cache must not overlap k_cache"):
        qknorm_tvm.qk_rms_norm_rope_cache(**given)
    heads = np.zeros((3, 16, 2 * KV_HEADS, HEAD_DIM), BFLOAT16)
    given["k_cache"], given["v_cache"] = heads[:, :, :KV_HEADS], heads[:, :, KV_HEADS:]
    check(CACHE, given)


# ---- modules -------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_module_of_several_specs_serves_by_what_is_given() -> None:
    """A spec taken for another of the same columns: wrong strides, a tensor that is not there."""
    specs = [CACHE.replace(target="cpu"), CACHE.replace(target="cpu", rotary_dim=0)]
    module = qknorm_tvm.compile(specs).module
    for spec in specs:
        given = arguments()
        del given["head_dim"]
        if not spec.rotary_dim:
            given |= {"positions": None, "cos_sin_cache": None}
        expected = rope_reference(spec, given)
        given["q_out"] = np.empty((9, Q_COLS), BFLOAT16)
        names = spec.operation.tensors
        values = [_stored(given.get(name)) for name in names]
        module.qk_rms_norm_rope_cache(*values, 1e-6, 1)
        for name, value in expected.items():
            assert differing(given[name], value) == 0, name
    values[names.index("qk_var")] = np.zeros((9, 2), "f4")
    with pytest.raises(ValueError, match=r"^the tensors given, the dtypes and columns of cos_sin"):
        module.qk_rms_norm_rope_cache(*values, 1e-6, 1)


def _stored(value: Any) -> Any:
    return value.view(np.uint16) if getattr(value, "dtype", None) == BFLOAT16 else value


def test_a_tensor_that_the_only_spec_does_not_take() -> None:
    module = cache.module_for(CACHE)
    given = arguments()
    del given["head_dim"]
    given |= {"q_out": np.empty((9, Q_COLS), BFLOAT16)}
    values = {name: _stored(given.get(name)) for name in CACHE.operation.tensors}
    with pytest.raises(ValueError, match=r"^qk_var must be None for this module's spec "):
        module.qk_rms_norm_rope_cache(
            *(values | {"qk_var": np.zeros((9, 2), "f4")}).values(), 1e-6, 1
        )
    with pytest.raises(ValueError, match=r"^positions must be a tensor for this module's spec "):
        module.qk_rms_norm_rope_cache(*(values | {"positions": None}).values(), 1e-6, 1)
    with pytest.raises(TypeError, match=r"^q must be a tensor, got None"):
        module.qk_rms_norm_rope_cache(*(values | {"q": None}).values(), 1e-6, 1)


def test_every_operand_type_has_a_case() -> None:
    assert set(NUMPY_DTYPES) == {"bfloat16", "float16", "float32"}
