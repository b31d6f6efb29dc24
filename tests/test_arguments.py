"""Wrong arguments: an error that names the argument, what was expected and what came; no write."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from support import (
    NAMES,
    Case,
    RawTensor,
    base_of,
    check_exact,
    compiled,
    filled,
    make_case,
    raw_call,
    to_torch,
)

import qknorm_tvm
from qknorm_tvm import KernelSpec, Module, load
from qknorm_tvm.spec import MAX_COLS

ROWS, Q_COLS, K_COLS = 4, 32, 16
SPEC = KernelSpec(in_dtype="float32", q_cols=Q_COLS, k_cols=K_COLS)


@pytest.fixture(scope="module")
def module() -> Module:
    """A portable module of one float32 spec with fixed columns."""
    return load(compiled("arguments", SPEC))


def case() -> Case:
    return make_case(ROWS, Q_COLS, K_COLS, "float32")


def array(*shape: int, dtype: Any = np.float32) -> np.ndarray:
    return np.full(shape, 1, dtype)


@dataclasses.dataclass
class Bad:
    """One mistake: how it is made, and what must be said of it."""

    name: str
    make: Callable[[Case], dict[str, Any]]
    error: type[Exception]
    message: str
    #: What is said instead by the raw entry point, where it sees something else.
    raw_message: str | None = None
    front_ends: tuple[str, ...] = ("numpy", "torch", "raw")


def _swap(name: str, value: Callable[[Case], Any]) -> Callable[[Case], dict[str, Any]]:
    return lambda good: {name: value(good)}


def _mistakes() -> list[Bad]:
    mistakes: list[Bad] = []

    def add(
        name: str,
        argument: str,
        value: Callable[[Case], Any],
        error: Any,
        message: str,
        **rest: Any,
    ) -> None:
        mistakes.append(Bad(f"{argument}: {name}", _swap(argument, value), error, message, **rest))

    numpy_only: dict[str, Any] = {"front_ends": ("numpy",)}
    packed = ("numpy", "raw")  # torch has no negative strides
    shapes = {"q_out": 32, "k_out": 16, "gamma_q": 32, "gamma_k": 16, "qk_var": 2, "q": 32, "k": 16}
    for name, cols in shapes.items():
        two = not name.startswith("gamma")
        wanted = "2 dimensions" if two else "1 dimension"
        for shape in ((cols,), (ROWS, 1, cols)) if two else ((1, cols), ()):
            add(
                f"rank {len(shape)}",
                name,
                lambda _, shape=shape: array(*shape),
                ValueError,
                f"{name} must have {wanted}, got {len(shape)}",
            )
        for dtype in ("float64", "int32", "bool"):
            one_of = "one of bfloat16, float16, float32" if name in ("q", "q_out") else "float32"
            add(
                dtype,
                name,
                lambda good, name=name, dtype=dtype: getattr(good, name).astype(dtype),
                TypeError,
                f"{name} must be {one_of}, got {dtype}",
                raw_message=f"{name} must be float32, got {dtype}",
            )
        for dtype in ("bfloat16", "float16"):
            if name not in ("q", "q_out"):
                kind = ml_dtypes.bfloat16 if dtype == "bfloat16" else np.float16
                add(
                    dtype,
                    name,
                    lambda good, name=name, kind=kind: getattr(good, name).astype(kind),
                    TypeError,
                    f"{name} must be float32, got {dtype}",
                )
        if two:
            if name != "q":
                for rows in (ROWS - 1, ROWS + 1, 1, 0):
                    add(
                        f"{rows} rows",
                        name,
                        lambda _, rows=rows, cols=cols: array(rows, cols),
                        ValueError,
                        f"{name} must have {ROWS} rows like q, got {rows}",
                    )
            add(
                "reversed rows",
                name,
                lambda good, name=name: getattr(good, name).copy()[::-1],
                ValueError,
                f"{name} must have a row stride of 0 or more, got -{cols}",
                front_ends=packed,
            )
        if name not in ("q", "k"):
            for wrong in {1, cols - 1, cols + 1} - {0}:
                add(
                    f"{wrong} columns",
                    name,
                    lambda good, name=name, wrong=wrong: array(
                        *getattr(good, name).shape[:-1], wrong
                    ),
                    ValueError,
                    f"{name} must have {cols} {'columns' if two else 'elements'}, got {wrong}",
                )
        add(
            "every second column",
            name,
            lambda good, name=name: array(
                *getattr(good, name).shape[:-1], 2 * getattr(good, name).shape[-1]
            )[..., ::2],
            ValueError,
            f"{name} must be contiguous in its last dimension (stride 1), got stride 2",
        )
        add(
            "reversed columns",
            name,
            lambda good, name=name: getattr(good, name).copy()[..., ::-1],
            ValueError,
            f"{name} must be contiguous in its last dimension (stride 1), got stride -1",
            front_ends=packed,
        )
        for value, kind in (
            (None, "NoneType"),
            ("x", "str"),
            (3.0, "float"),
            ([[1.0]], "list"),
            (np.float32(1), "float32"),
        ):
            if name.endswith("_out") and value is None:
                continue
            add(
                f"a {kind}",
                name,
                lambda _, value=value: value,
                TypeError,
                f"{name} must be a NumPy array, a torch tensor or an object with DLPack, "
                f"got {kind}",
                **numpy_only,
            )
        for value, kind in ((None, "None"), ("x", "str"), (3.0, "float"), (3, "int")):
            add(
                f"a raw {kind}",
                name,
                lambda _, value=value: value,
                TypeError,
                f"{name} must be a tensor, got {kind}",
                front_ends=("raw",),
            )
        for device, text in (((2, 0), "cuda:0"), ((10, 1), "rocm:1"), ((8, 0), "device type 8")):
            add(
                f"on {text}",
                name,
                lambda good, name=name, device=device: RawTensor(
                    getattr(good, name), device=device
                ),
                ValueError,
                f"{name} must be on the CPU, got a tensor on {text}",
                front_ends=("raw",),
            )
        add(
            "a null pointer",
            name,
            lambda good, name=name: RawTensor(getattr(good, name), address=0),
            ValueError,
            f"{name} must have data, got a null pointer",
            front_ends=("raw",),
        )
        add(
            "vector elements",
            name,
            lambda good, name=name: RawTensor(getattr(good, name), lanes=2),
            TypeError,
            f"{name} must be float32, got float32x2",
            front_ends=("raw",),
        )
        add(
            "foreign byte order",
            name,
            lambda good, name=name: getattr(good, name).astype(">f4"),
            TypeError,
            f"{name} must have native byte order, got >f4",
            **numpy_only,
        )
        add(
            "uint16",
            name,
            lambda good, name=name: getattr(good, name).astype(np.uint16),
            TypeError,
            f"{name} must ",
            raw_message=f"{name} must be float32, got uint16",
            front_ends=packed,
        )
        add(
            "objects",
            name,
            lambda good, name=name: getattr(good, name).astype(object),
            TypeError,
            f"{name} must ",
            **numpy_only,
        )
        if two:
            add(
                "rows that begin inside an element",
                name,
                lambda good, name=name: np.zeros(
                    ROWS, [("byte", "u1"), ("value", "<f4", getattr(good, name).shape[1:])]
                )["value"],
                ValueError,
                f"{name} must have strides of whole elements (4 bytes)",
                **numpy_only,
            )
    for name in ("q_out", "k_out"):
        cols = shapes[name]
        add(
            "rows that overlap",
            name,
            lambda _, cols=cols: np.lib.stride_tricks.as_strided(
                array(ROWS * cols), (ROWS, cols), (4 * cols - 4, 4)
            ),
            ValueError,
            f"{name} must have rows that do not overlap (row stride {cols} or more), "
            f"got row stride {cols - 1}",
        )
        add(
            "one row for all",
            name,
            lambda _, cols=cols: np.lib.stride_tricks.as_strided(array(cols), (ROWS, cols), (0, 4)),
            ValueError,
            f"{name} must have rows that do not overlap (row stride {cols} or more), "
            "got row stride 0",
        )

        def read_only(good: Case, name: str = name) -> np.ndarray:
            frozen = getattr(good, name).copy()
            frozen.flags.writeable = False
            return frozen

        add(
            "read-only",
            name,
            read_only,
            ValueError,
            f"{name} must be writable, got a read-only array",
            **numpy_only,
        )
    return mistakes + _column_mistakes() + _overlaps() + _epsilons()


def _column_mistakes() -> list[Bad]:
    """Columns of q and k, which a fixed spec knows and the public API takes from them."""
    mistakes = []
    for name, cols in (("q", Q_COLS), ("k", K_COLS)):
        mistakes.append(
            Bad(
                f"{name}: no columns",
                _swap(name, lambda _: array(ROWS, 0)),
                ValueError,
                f"{name} must have at least 1 column, got 0",
                raw_message=f"{name} must have {cols} columns, got 0",
            )
        )
        for wrong in (1, cols - 1, cols + 1):
            mistakes.append(
                Bad(
                    f"{name}: {wrong} columns",
                    _swap(name, lambda _, wrong=wrong: array(ROWS, wrong)),
                    ValueError,
                    f"{name} must have {cols} columns, got {wrong}",
                    front_ends=("raw",),
                )
            )
            mistakes.append(
                Bad(
                    f"{name}: {wrong} columns, unlike its gamma",
                    _swap(name, lambda _, wrong=wrong: array(ROWS, wrong)),
                    ValueError,
                    f"gamma_{name} must have {wrong} elements, got {cols}",
                    front_ends=("numpy", "torch"),
                )
            )
    mistakes.append(
        Bad(
            "q: one row more than the others",
            _swap("q", lambda _: array(ROWS + 1, Q_COLS)),
            ValueError,
            f"k must have {ROWS + 1} rows like q, got {ROWS}",
        )
    )
    return mistakes


def _overlaps() -> list[Bad]:
    def fused(good: Case) -> np.ndarray:
        return filled((ROWS, 128), "float32")

    def from_one(*parts: tuple[str, int]) -> Callable[[Case], dict[str, Any]]:
        def make(good: Case) -> dict[str, Any]:
            buffer = np.ones((ROWS, 128), np.float32)
            widths = {"q_out": 32, "k_out": 16, "q": 32, "k": 16, "qk_var": 2}
            return {name: buffer[:, at : at + widths[name]] for name, at in parts}

        return make

    def with_gamma(output: str, gamma: str, at: int) -> Callable[[Case], dict[str, Any]]:
        def make(good: Case) -> dict[str, Any]:
            memory = np.ones(ROWS * 32 + 64, np.float32)
            out_cols, gamma_cols = getattr(good, output).shape[1], getattr(good, gamma).size
            out = memory[32 : 32 + ROWS * out_cols].reshape(ROWS, out_cols)
            return {output: out, gamma: memory[at : at + gamma_cols]}

        return make

    def shifted(out: str, source: str, by: int) -> Callable[[Case], dict[str, Any]]:
        def make(good: Case) -> dict[str, Any]:
            shape = getattr(good, source).shape
            memory = np.ones(shape[0] * shape[1] + 128, np.float32)
            size = shape[0] * shape[1]
            return {
                source: memory[64 : 64 + size].reshape(shape),
                out: memory[64 + by : 64 + by + size].reshape(shape),
            }

        return make

    def wider_in_place(good: Case) -> dict[str, Any]:
        memory = np.ones((ROWS, 64), np.float32)
        # Same address, other strides: row 1 of the output is inside row 0 of the input's buffer.
        return {"q": memory[:, :32], "q_out": memory.reshape(-1)[: ROWS * 32].reshape(ROWS, 32)}

    itself = "itself (same address, strides and element size) or not overlap"
    mistakes = [
        Bad(
            "k_out overlaps q_out by a column",
            from_one(("q_out", 0), ("k_out", 31)),
            ValueError,
            "k_out must not overlap q_out, got tensors that share memory",
        ),
        Bad(
            "k_out overlaps q_out's next row",
            lambda good: {
                "q_out": (memory := np.ones(ROWS * 32 + 16, np.float32))[: ROWS * 32].reshape(
                    ROWS, 32
                ),
                "k_out": memory[ROWS * 32 - 1 :][:16].reshape(1, 16).repeat(1, 0)
                if ROWS == 1
                else np.lib.stride_tricks.as_strided(memory[31:], (ROWS, 16), (128, 4)),
            },
            ValueError,
            "k_out must not overlap q_out, got tensors that share memory",
        ),
        Bad(
            "q_out overlaps k",
            from_one(("q_out", 0), ("k", 16)),
            ValueError,
            "q_out must not overlap k, got tensors that share memory",
        ),
        Bad(
            "k_out is part of q",
            from_one(("k_out", 16), ("q", 0)),
            ValueError,
            "k_out must not overlap q, got tensors that share memory",
        ),
        Bad(
            "q_out overlaps qk_var",
            from_one(("q_out", 0), ("qk_var", 31)),
            ValueError,
            "q_out must not overlap qk_var, got tensors that share memory",
        ),
        Bad(
            "k_out overlaps qk_var",
            from_one(("k_out", 8), ("qk_var", 7)),
            ValueError,
            "k_out must not overlap qk_var, got tensors that share memory",
        ),
        Bad(
            "q_out is a column beside q",
            from_one(("q_out", 1), ("q", 0)),
            ValueError,
            f"q_out must be q {itself} it",
        ),
        Bad(
            "k_out begins in k and has other strides",
            lambda good: {
                "k": (memory := np.ones(ROWS * 64, np.float32)).reshape(ROWS, 64)[:, :16],
                "k_out": memory[: ROWS * 16].reshape(ROWS, 16),
            },
            ValueError,
            f"k_out must be k {itself} it",
        ),
        Bad(
            "q_out is q with other strides", wider_in_place, ValueError, f"q_out must be q {itself}"
        ),
    ]
    for output in ("q_out", "k_out"):
        for gamma in ("gamma_q", "gamma_k"):
            at = 32 + 5
            mistakes.append(
                Bad(
                    f"{gamma} is inside {output}",
                    with_gamma(output, gamma, at),
                    ValueError,
                    f"{output} must not overlap {gamma}, got tensors that share memory",
                )
            )
    for by in (-1, 1, -31, 31, -63, 63):
        mistakes.append(
            Bad(
                f"q_out is q moved by {by}",
                shifted("q_out", "q", by),
                ValueError,
                f"q_out must be q {itself} it, got tensors that share memory otherwise",
            )
        )
    return mistakes


def _epsilons() -> list[Bad]:
    mistakes = []
    for value in (None, "1e-6", b"1", [1e-6], 1j, True, False, np.ones(2), np.bool_(True), 10**400):
        kind = {None: "None"}.get(value) if value is None else None
        mistakes.append(
            Bad(
                f"epsilon: {str(value)[:12]!r}",
                lambda _, value=value: {"epsilon": value},
                TypeError,
                f"epsilon must be a float, got {kind or repr(value)[:20]}",
                front_ends=("numpy", "torch"),
            )
        )
    for value, kind in ((None, "None"), ("1e-6", "str"), (True, "bool")):
        mistakes.append(
            Bad(
                f"raw epsilon: {value!r}",
                lambda _, value=value: {"epsilon": value},
                TypeError,
                f"epsilon must be a float, got {kind}",
                front_ends=("raw",),
            )
        )
    for value in (float("nan"), np.float32("nan")):
        mistakes.append(
            Bad(
                f"epsilon: {value!r}",
                lambda _, value=value: {"epsilon": value},
                ValueError,
                "epsilon must be a number, got nan",
            )
        )
    return mistakes


_MISTAKES = _mistakes()
_CALLS = [
    pytest.param(bad, front_end, id=f"{front_end}-{bad.name}")
    for bad in _MISTAKES
    for front_end in bad.front_ends
]


def _memory(value: Any) -> list[np.ndarray]:
    if isinstance(value, RawTensor):
        value = value._array
    return [base_of(value)] if isinstance(value, np.ndarray) else []


@pytest.mark.frameworks
@pytest.mark.parametrize(("bad", "front_end"), _CALLS)
def test_mistake(bad: Bad, front_end: str, module: Module) -> None:
    """A mistake that is accepted, badly explained, or noticed after something was written."""
    with np.errstate(all="ignore"):
        wrong = dataclasses.replace(case(), **bad.make(case()))
    memory = [array for name in NAMES for array in _memory(getattr(wrong, name))]
    before = [array.tobytes() for array in memory]
    message = bad.raw_message if front_end == "raw" and bad.raw_message else bad.message
    if front_end == "raw":
        with pytest.raises(bad.error, match="^" + re.escape(message)):
            raw_call(module, *wrong.tensors, wrong.epsilon)
    else:
        if front_end == "torch":
            pytest.importorskip("torch", reason="makes torch tensors, and torch is not installed")
            wrong = dataclasses.replace(
                wrong, **{name: to_torch(getattr(wrong, name)) for name in NAMES}
            )
        with pytest.raises(bad.error, match="^" + re.escape(message)):
            _public(wrong)
    assert [array.tobytes() for array in memory] == before, "something was written"


def _public(wrong: Case) -> Any:
    return qknorm_tvm.apply_qk_rms_norm(
        wrong.q,
        wrong.k,
        wrong.qk_var,
        wrong.gamma_q,
        wrong.gamma_k,
        wrong.epsilon,
        q_out=wrong.q_out,
        k_out=wrong.k_out,
    )


# ---- 16-bit types, which NumPy passes as integers -----------------------------------------------


def _cast(good: Case, **kinds: Any) -> Case:
    with np.errstate(all="ignore"):
        new = {name: getattr(good, name).astype(kind) for name, kind in kinds.items()}
    return dataclasses.replace(good, **new)


@pytest.mark.parametrize(
    ("q", "k"), [("bfloat16", "float16"), ("float16", "bfloat16")], ids=lambda kind: kind
)
def test_k_of_the_other_16_bit_type_is_refused(q: str, k: str) -> None:
    """k's bits read as q's type: 1.0 came out as 1.875."""
    wrong = _cast(case(), q=q, q_out=q, k=k, k_out=q)
    before = wrong.k_out.tobytes()
    with pytest.raises(TypeError, match=f"^k must be {q}, got {k}$"):
        _public(wrong)
    assert wrong.k_out.tobytes() == before
    with pytest.raises(TypeError, match=f"^k must be {q}, got {k}$"):
        qknorm_tvm.apply_qk_rms_norm(wrong.q, wrong.k, wrong.qk_var, wrong.gamma_q, wrong.gamma_k)


@pytest.mark.parametrize(
    ("q_out", "k_out"), [("bfloat16", "float16"), ("float16", "bfloat16"), ("float16", "float32")]
)
def test_k_out_of_another_type_than_q_out_is_refused(q_out: str, k_out: str) -> None:
    wrong = _cast(case(), q_out=q_out, k_out=k_out)
    with pytest.raises(TypeError, match=f"^k_out must be {q_out}, got {k_out}$"):
        _public(wrong)


@pytest.mark.parametrize("name", ["k", "k_out", "gamma_q", "gamma_k", "qk_var"])
def test_integers_are_not_taken_for_the_bits_of_bfloat16(name: str) -> None:
    """The module sees bfloat16 of NumPy as uint16; a caller's own uint16 must not pass for it."""
    good = _cast(case(), q="bfloat16", k="bfloat16", q_out="bfloat16", k_out="bfloat16")
    with pytest.raises(TypeError, match=f"^{name} must have a floating-point type, got uint16$"):
        _public(_cast(good, **{name: np.uint16}))


def test_out_dtype_unlike_given_outputs_is_refused() -> None:
    good = case()
    with pytest.raises(TypeError, match=r"^k_out must be float16 like out_dtype, got float32$"):
        qknorm_tvm.apply_qk_rms_norm(
            good.q,
            good.k,
            good.qk_var,
            good.gamma_q,
            good.gamma_k,
            k_out=good.k_out,
            out_dtype="float16",
        )


@pytest.mark.parametrize("value", ["float64", "bf16", 3, np.float64, object()])
def test_out_dtype_that_is_none_of_the_three_is_refused(value: Any) -> None:
    good = case()
    with pytest.raises(
        ValueError, match=r"^out_dtype must be one of bfloat16, float16, float32, got"
    ):
        qknorm_tvm.apply_qk_rms_norm(
            good.q, good.k, good.qk_var, good.gamma_q, good.gamma_k, out_dtype=value
        )


@pytest.mark.parametrize("name", ["q", "k"])
def test_scalar_array_is_refused_where_outputs_are_allocated(name: str) -> None:
    """An IndexError from the allocation of the outputs, before any check."""
    good = dataclasses.replace(case(), **{name: np.array(1, np.float32)})
    with pytest.raises(ValueError, match=f"^{name} must have 2 dimensions, got 0$"):
        qknorm_tvm.apply_qk_rms_norm(good.q, good.k, good.qk_var, good.gamma_q, good.gamma_k)


# ---- torch ------------------------------------------------------------------------------------


@pytest.mark.frameworks
@pytest.mark.parametrize("name", NAMES)
def test_torch_tensors_that_are_no_plain_cpu_memory_are_refused(name: str) -> None:
    """A meta or sparse tensor that torch refuses with a message that names nothing."""
    torch = pytest.importorskip("torch", reason="makes torch tensors, and torch is not installed")
    good = dataclasses.replace(case(), **{n: to_torch(getattr(case(), n)) for n in NAMES})
    tensor = getattr(good, name)
    with pytest.raises(ValueError, match=f"^{name} must be on the CPU or a CUDA device, got meta$"):
        _public(dataclasses.replace(good, **{name: tensor.to("meta")}))
    with pytest.raises(TypeError, match=f"^{name} must be a dense tensor, got torch.sparse_coo$"):
        _public(dataclasses.replace(good, **{name: tensor.to_sparse()}))
    needs_grad = tensor.clone().requires_grad_()
    with pytest.raises(ValueError, match=f"^{name} must not require grad"):
        _public(dataclasses.replace(good, **{name: needs_grad}))
    with torch.no_grad():
        _public(dataclasses.replace(good, **{name: needs_grad}))


@pytest.mark.frameworks
def test_torch_tensor_on_another_device_is_named_where_outputs_are_allocated() -> None:
    """``k_out must be on the CPU``, though the caller gave none."""
    pytest.importorskip("torch", reason="makes torch tensors, and torch is not installed")
    good = dataclasses.replace(case(), **{n: to_torch(getattr(case(), n)) for n in NAMES})
    with pytest.raises(ValueError, match=r"^k must be on the CPU or a CUDA device, got meta$"):
        qknorm_tvm.apply_qk_rms_norm(
            good.q, good.k.to("meta"), good.qk_var, good.gamma_q, good.gamma_k
        )


@pytest.mark.frameworks
def test_torch_views_that_negate_lazily_are_not_read_as_they_lie() -> None:
    """torch keeps ``x.conj().imag`` as x's memory and a flag: read raw, every sign is wrong."""
    torch = pytest.importorskip("torch", reason="makes torch tensors, and torch is not installed")
    good = make_case(ROWS, 1, 1, "float32")
    good = dataclasses.replace(good, **{n: to_torch(getattr(good, n)) for n in NAMES})
    good.q = torch.full((ROWS, 1), 2 - 3j).conj().imag
    assert good.q.is_neg()
    with pytest.raises((TypeError, ValueError), match=r"^q must "):
        _public(good)


@pytest.mark.frameworks
def test_read_only_numpy_output_beside_torch_inputs_is_refused() -> None:
    """torch's short way does not look at NumPy's flag."""
    pytest.importorskip("torch", reason="makes torch tensors, and torch is not installed")
    good = case()
    mixed = dataclasses.replace(
        good, **{n: to_torch(getattr(good, n)) for n in NAMES if n != "k_out"}
    )
    mixed.k_out.flags.writeable = False
    before = mixed.k_out.tobytes()
    with pytest.raises(ValueError, match=r"^k_out must be writable, got a read-only array$"):
        _public(mixed)
    assert mixed.k_out.tobytes() == before


# ---- the raw entry point -----------------------------------------------------------------------


@pytest.mark.parametrize("count", [0, 1, 7, 10])
def test_number_of_arguments(module: Module, count: int) -> None:
    """A read beyond the arguments that came."""
    arguments = [*case().tensors, 1e-6, 1, 1][:count]
    with pytest.raises(TypeError, match=rf"^apply_qk_rms_norm takes 8 arguments .* got {count}$"):
        raw_call(module, *arguments)


@pytest.mark.parametrize("storage", [None, 1.0, "1"])
def test_storage_flag_is_an_int(module: Module, storage: Any) -> None:
    with pytest.raises(TypeError, match=r"^storage must be an int, got "):
        raw_call(module, *case().tensors, 1e-6, storage)


def test_byte_offset_and_missing_strides_are_understood(module: Module) -> None:
    """A tensor whose data pointer is not its first element, or whose strides are left out."""
    good = case()
    expected = good.expected()
    tensors = [RawTensor(array, byte_offset=64, strides=None) for array in good.tensors]
    raw_call(module, *tensors, good.epsilon)
    assert good.q_out.tobytes() == expected[0].tobytes()
    assert good.k_out.tobytes() == expected[1].tobytes()


@pytest.mark.parametrize("rows", [0, 1])
def test_strides_that_mean_nothing_are_ignored(module: Module, rows: int) -> None:
    """The row stride of one row, any stride of none: views of other frameworks carry wild ones."""
    good = make_case(rows, Q_COLS, K_COLS, "float32")
    expected = good.expected()
    tensors = [
        RawTensor(array, strides=[-7, 1] if array.ndim == 2 else None, address=None)
        for array in good.tensors
    ]
    raw_call(module, *tensors, good.epsilon)
    assert good.q_out.tobytes() == expected[0].tobytes()


@pytest.mark.parametrize("name", ["q_out", "k_out", "qk_var", "q", "k"])
@pytest.mark.parametrize("stride", [1 << 62, (1 << 62) + 32, 1 << 61, (1 << 63) - 1])
def test_strides_beyond_the_address_space_are_refused(
    stride: int, name: str, module: Module
) -> None:
    """A row's place that wraps round to another's: what is written twice, and passed as apart."""
    wrong = case()
    before = [array.tobytes() for array in wrong.tensors]
    tensors = [
        RawTensor(array, strides=[stride, 1]) if this == name else array
        for this, array in zip(NAMES, wrong.tensors, strict=True)
    ]
    message = (
        f"^{name} must lie within the address space, got {ROWS} rows of row stride {stride} at 0x"
    )
    with pytest.raises(ValueError, match=message):
        raw_call(module, *tensors, wrong.epsilon)
    assert [array.tobytes() for array in wrong.tensors] == before


def test_address_that_wraps_is_refused(module: Module) -> None:
    wrong = case()
    wrong.q = RawTensor(wrong.q, address=(1 << 64) - 64)
    with pytest.raises(ValueError, match=r"^q must lie within the address space, got 4 rows"):
        raw_call(module, *wrong.tensors, wrong.epsilon)


def test_open_columns_end_where_fixed_ones_do() -> None:
    """More columns than the documents, and a spec, allow."""
    module = load(compiled("open-float32", KernelSpec(in_dtype="float32")))
    many = MAX_COLS + 1
    wide, gamma = np.ones((0, many), np.float32), np.broadcast_to(np.float32(1), many)
    few, narrow_gamma, qk_var = np.ones((0, 3), np.float32), array(3), np.ones((0, 2), np.float32)
    gamma = RawTensor(gamma, strides=[1])
    for name, arguments in {
        "q": (wide, few, gamma, narrow_gamma, qk_var, wide, few),
        "k": (few, wide, narrow_gamma, gamma, qk_var, few, wide),
    }.items():
        message = f"^{name} must have at most {MAX_COLS} columns, got {many}$"
        with pytest.raises(ValueError, match=message):
            raw_call(module, *arguments, 1e-6)


def test_no_rows_need_no_data(module: Module) -> None:
    """An empty tensor has a null pointer in most frameworks."""
    good = make_case(0, Q_COLS, K_COLS, "float32")
    tensors = [RawTensor(array, address=0) if array.ndim == 2 else array for array in good.tensors]
    raw_call(module, *tensors, good.epsilon)


def test_columns_of_one_row_still_have_to_be_given(module: Module) -> None:
    """Wrong shapes are errors for no rows too, not only when something would be written."""
    good = make_case(0, Q_COLS, K_COLS, "float32")
    good.gamma_q = array(Q_COLS - 1)
    with pytest.raises(ValueError, match=r"^gamma_q must have 32 elements, got 31$"):
        raw_call(module, *good.tensors, good.epsilon)


def test_pinned_host_memory_is_cpu_memory(module: Module) -> None:
    good = case()
    expected = good.expected()
    raw_call(module, *[RawTensor(array, device=(3, 0)) for array in good.tensors], good.epsilon)
    assert good.q_out.tobytes() == expected[0].tobytes()


def test_module_of_several_specs_says_what_fits_none() -> None:
    module = load(compiled("two", SPEC, SPEC.replace(in_dtype="bfloat16", out_dtype="bfloat16")))
    check_exact(module, make_case(3, Q_COLS, K_COLS, "bfloat16"))
    check_exact(module, make_case(3, Q_COLS, K_COLS, "float32"))
    wrong = make_case(3, Q_COLS + 1, K_COLS, "bfloat16")
    with pytest.raises(
        ValueError,
        match=r"^q and k must have the columns of one of this module's specs, got 33 and 16$",
    ):
        raw_call(module, *wrong.tensors, wrong.epsilon)
    wrong = make_case(3, Q_COLS, K_COLS, "float16", "float32")
    with pytest.raises(
        TypeError,
        match=r"^q and q_out must have the dtypes of one of this module's specs, "
        r"got float16 and float32$",
    ):
        raw_call(module, *wrong.tensors, wrong.epsilon)


def test_uint16_storage_is_bfloat16_whatever_spec_comes_first() -> None:
    """NumPy's bfloat16 read as the first spec's float16."""
    half = KernelSpec(in_dtype="float16", q_cols=Q_COLS, k_cols=K_COLS)
    module = load(
        compiled("half-first", half, half.replace(in_dtype="bfloat16", out_dtype="bfloat16"))
    )
    good = make_case(3, Q_COLS, K_COLS, "bfloat16")
    expected = good.expected()
    bits = [
        array.view(np.uint16) if array.dtype.name == "bfloat16" else array for array in good.tensors
    ]
    raw_call(module, *bits, good.epsilon, 1)
    assert good.q_out.tobytes() == expected[0].tobytes()


# ---- overlap -----------------------------------------------------------------------------------


def _bytes_of(start: int, rows: int, cols: int, stride: int) -> set[int]:
    """Every byte of a float32 tensor, one by one."""
    return {
        byte
        for row in range(rows)
        for byte in range(start + 4 * row * stride, start + 4 * (row * stride + cols))
    }


_OVERLAP_COLS = (3, 2)


@pytest.fixture(scope="module")
def narrow() -> Module:
    return load(
        compiled(
            "narrow",
            KernelSpec(in_dtype="float32", q_cols=_OVERLAP_COLS[0], k_cols=_OVERLAP_COLS[1]),
        )
    )


@given(data=st.data())
def test_overlap_is_exact(narrow: Module, data: st.DataObject) -> None:
    """A pair of row-strided tensors taken for disjoint though they share a byte, or the reverse.

    The oracle is the set of bytes of each tensor; every argument lies in one buffer.
    """
    rows = data.draw(st.integers(1, 5), "rows")
    widths = {"q_out": 3, "k_out": 2, "gamma_q": 3, "gamma_k": 2, "qk_var": 2, "q": 3, "k": 2}
    stride_all = data.draw(st.sampled_from([None, 3, 5, 6, 8, 16]), "one stride for all")
    size = 160
    buffer = np.ones(size, np.float32)
    arrays, places = {}, {}
    for name, cols in widths.items():
        near = data.draw(st.integers(0, 40), f"place of {name}")
        count = 1 if name.startswith("gamma") else rows
        low = cols if name.endswith("_out") else 0
        stride = (
            max(stride_all, low)
            if stride_all
            else data.draw(st.integers(low, 12), f"stride {name}")
        )
        apart = near % 2 == 0 and not name.endswith("_out")
        start = near * 4
        if apart:  # most inputs elsewhere, so that legal calls are drawn too
            memory, address = np.ones(size, np.float32), None
        else:
            memory, address = buffer, start
        view = np.lib.stride_tricks.as_strided(memory[near:], (count, cols), (4 * stride, 4))
        arrays[name] = view[0] if name.startswith("gamma") else view
        if address is not None:
            places[name] = (start, count, cols, stride)
    shared = {name: _bytes_of(*place) for name, place in places.items()}
    forbidden = None
    if shared["q_out"] & shared["k_out"]:
        forbidden = "k_out must not overlap q_out"
    for out in ("q_out", "k_out"):
        for name in ("gamma_q", "gamma_k", "qk_var", "q", "k"):
            if name not in shared or forbidden:
                continue
            start, count, _, stride = places[out]
            same = places[name][0] == start and (count == 1 or places[name][3] == stride)
            if name == out[0] and same:
                continue
            if shared[out] & shared[name]:
                forbidden = f"{out} must "
    arguments = Case(**arrays)
    before = buffer.tobytes()
    if forbidden:
        with pytest.raises(ValueError, match=f"^{forbidden}"):
            raw_call(narrow, *arguments.tensors, arguments.epsilon)
        assert buffer.tobytes() == before
    else:
        expected = arguments.expected()
        raw_call(narrow, *arguments.tensors, arguments.epsilon)
        assert arguments.q_out.tobytes() == expected[0].tobytes()
        assert arguments.k_out.tobytes() == expected[1].tobytes()
        written = shared["q_out"] | shared["k_out"]
        kept = [byte for byte in range(4 * size) if byte not in written]
        assert bytes(buffer.tobytes()[i] for i in kept) == bytes(before[i] for i in kept)


@given(rows=st.integers(1, 6), order=st.permutations(range(5)), gap=st.integers(0, 3))
@example(rows=4, order=[0, 1, 2, 3, 4], gap=0)
def test_interleaved_slices_of_one_buffer_are_legal(
    narrow: Module, rows: int, order: list[int], gap: int
) -> None:
    """Slices of one fused buffer refused because the ranges that they span meet."""
    widths = [3, 2, 2, 3, 2]
    names = ["q_out", "k_out", "qk_var", "q", "k"]
    fused = np.random.default_rng(rows).random((rows, sum(widths) + 5 * gap)).astype(np.float32)
    good = make_case(rows, *_OVERLAP_COLS, "float32")
    at = 0
    for index in order:
        setattr(good, names[index], fused[:, at : at + widths[index]])
        at += widths[index] + gap
    check_exact(narrow, good)
