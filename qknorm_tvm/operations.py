"""The operations, and what each takes: written down here and nowhere else.

From this table derive the C entry points (`qknorm_tvm.build.native.tables`), the attributes of
`qknorm_tvm.Module`, the short ways of the Python API (`qknorm_tvm.call.arrays`), torch's operators
(`qknorm_tvm.torch_ops`), which fields of a spec an operation has, and what the command line offers.
"""

from __future__ import annotations

import dataclasses
from typing import Any

#: Dimensions besides those that are numbers. Rows are q's; columns, heads and `rotary_dim` the
#: spec's; slots at most as many as rows; the others a tensor's own, equal in two that have one.
ROWS, Q_COLS, K_COLS = "rows", "q_cols", "k_cols"
KV_HEADS, HEAD_DIM, ROTARY_DIM = "kv_heads", "head_dim", "rotary_dim"
SLOTS, MAX_POSITION, BLOCKS, BLOCK_SIZE = "slots", "max_position", "blocks", "block_size"
#: One number for all heads, or one for each.
SCALES = "scales"
#: Ranks of an exchange; and its own words with those of as many rows as it has, see `peers`.
RANKS, PEER_WORDS = "ranks", "peer_words"
#: Element types that a spec decides, besides those of `qknorm_tvm.dtypes.ELEMENT_TYPES`.
IN_DTYPE, OUT_DTYPE = "in_dtype", "out_dtype"
ROTARY_DTYPE, CACHE_DTYPE = "rotary_dtype", "cache_dtype"


@dataclasses.dataclass(frozen=True)
class TensorArgument:
    """One tensor that an operation takes.

    Its last dimension is contiguous. Rows may be strided.

    Parameters
    ----------
    name : str
    shape : tuple of str or int
        `ROWS`, `Q_COLS` or another name of this module, or a number of elements.
    dtype : str
        `IN_DTYPE`, `OUT_DTYPE`, `ROTARY_DTYPE`, `CACHE_DTYPE`, or the name of an element type.
    is_output : bool
        Whether it is written; it then has rows that do not overlap, and shares no memory with
        another tensor.
    in_place_of : str or None
        The input that an output may be all the same.
    keyword : str or None
        What the Python API calls it, by default its name.
    given_if : str or None
        The attribute of a `KernelSpec` that says whether it is given; otherwise it always is. In a
        call, None stands for a tensor that is not.
    """

    name: str
    shape: tuple[str | int, ...]
    dtype: str
    is_output: bool = False
    in_place_of: str | None = None
    keyword: str | None = None
    given_if: str | None = None

    @property
    def api_name(self) -> str:
        """What the Python API calls it."""
        return self.keyword or self.name

    @property
    def is_stream(self) -> bool:
        """Whether it holds rows of Q, K or V: functions are scheduled for its row stride."""
        return self.shape in ((ROWS, Q_COLS), (ROWS, K_COLS))

    @property
    def is_cache(self) -> bool:
        """Whether it is a paged cache: functions are scheduled for its strides."""
        return self.shape[0] == BLOCKS

    @property
    def stride_names(self) -> tuple[str, ...]:
        """The scalars by which a declared function takes its strides, all but the last one."""
        if self.is_cache:
            return tuple(f"{self.name}_{dim}_stride" for dim in ("block", "slot", "head"))
        has_rows = self.is_stream or self.shape[0] == MAX_POSITION
        return (f"{self.name}_stride",) if has_rows else ()


@dataclasses.dataclass(frozen=True)
class ScalarArgument:
    """One scalar that an operation takes, float32 or int64, with its default in Python."""

    name: str
    default: float | None = None
    dtype: str = "float32"


@dataclasses.dataclass(frozen=True)
class Operation:
    """What a module's entry point of one operation takes.

    Parameters
    ----------
    name : str
        Also the exported function's.
    arguments : tuple of TensorArgument
        In the order of the entry point, outputs first.
    signature : tuple of str
        The inputs in the order of the Python API, which is also the order of the checks.
    scalars : tuple of ScalarArgument
        They follow the tensors.
    spec_fields : tuple of str
        Fields of a `KernelSpec` that change its code, and that other operations must leave alone.
    statistics : tuple of str
        What a `KernelSpec.statistics` may be, the default first; none where there is no choice.
        With ``"peers"`` calls give `peer_tensors` and `peer_scalars` after everything else.
    """

    name: str
    arguments: tuple[TensorArgument, ...]
    signature: tuple[str, ...]
    scalars: tuple[ScalarArgument, ...] = ()
    spec_fields: tuple[str, ...] = ()
    statistics: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        inputs = {tensor.name for tensor in self.arguments if not tensor.is_output}
        assert set(self.signature) == inputs, f"{self.name}: the signature is not its inputs"
        assert len(self.tensors) == len(set(self.tensors)), f"{self.name}: a name stands twice"
        first = self.arguments[: len(self.outputs)]
        assert all(tensor.is_output for tensor in first), f"{self.name}: outputs come first"
        assert first, f"{self.name}: it writes nothing"

    def __getitem__(self, name: str) -> TensorArgument:
        return next(tensor for tensor in self.arguments if tensor.name == name)

    @property
    def tensors(self) -> tuple[str, ...]:
        """Names of the tensors, in the order of the entry point."""
        return tuple(tensor.name for tensor in self.arguments)

    @property
    def outputs(self) -> tuple[str, ...]:
        """Names of those that are written."""
        return tuple(tensor.name for tensor in self.arguments if tensor.is_output)

    @property
    def checked(self) -> tuple[TensorArgument, ...]:
        """The tensors in the order of the checks: inputs as in Python, then outputs."""
        return tuple(self[name] for name in (*self.signature, *self.outputs))

    @property
    def names(self) -> tuple[str, ...]:
        """Everything that the entry point takes, in order."""
        return (*self.tensors, *(scalar.name for scalar in self.scalars))

    @property
    def summary(self) -> str:
        """What the entry point takes, for messages."""
        return f"{len(self.names)} arguments ({', '.join(self.names)})"

    def shapes(self, rows: int, q_cols: int, k_cols: int, **extents: int) -> dict[str, Any]:
        """Return the tensors' shapes, by name; `extents` are those of other dimensions."""
        known = {ROWS: rows, Q_COLS: q_cols, K_COLS: k_cols, **extents}
        return {
            tensor.name: tuple(known[e] if isinstance(e, str) else e for e in tensor.shape)
            for tensor in self.arguments
            if all(not isinstance(e, str) or e in known for e in tensor.shape)
        }

    def dtypes(self, in_dtype: str, out_dtype: str, **others: str | None) -> dict[str, Any]:
        """Return the tensors' element types, by name; `others` are those of a spec's fields."""
        types = {IN_DTYPE: in_dtype, OUT_DTYPE: out_dtype, **others}
        tensors = (*self.arguments, *self.peer_tensors)
        return {tensor.name: types.get(tensor.dtype, tensor.dtype) for tensor in tensors}

    @property
    def peer_tensors(self) -> tuple[TensorArgument, ...]:
        """The tensors by which statistics are exchanged with other ranks, if they can be."""
        return _PEER_TENSORS if "peers" in self.statistics else ()

    @property
    def peer_scalars(self) -> tuple[ScalarArgument, ...]:
        """The scalars that go with `peer_tensors`, after them."""
        return _PEER_SCALARS if "peers" in self.statistics else ()

    def given(self, spec: Any) -> tuple[TensorArgument, ...]:
        """Return the tensors that a `KernelSpec`'s calls give, in the order of the entry point."""
        return tuple(
            tensor
            for tensor in (*self.arguments, *self.peer_tensors)
            if tensor.given_if is None or getattr(spec, tensor.given_if)
        )

    def scalars_given(self, spec: Any) -> tuple[ScalarArgument, ...]:
        """Return the scalars that a `KernelSpec`'s calls give, in the order of the entry point."""
        return (*self.scalars, *(self.peer_scalars if spec.has_peers else ()))

    @property
    def has_epsilon(self) -> bool:
        """Whether epsilon follows the tensors."""
        return any(scalar.name == "epsilon" for scalar in self.scalars)

    @property
    def strided(self) -> tuple[str, ...]:
        """The tensors of Q's or K's columns, whose row strides a declared function takes."""
        return tuple(tensor.name for tensor in self.arguments if tensor.is_stream)

    def internal_scalars(self, spec: Any) -> tuple[str, ...]:
        """Return the scalars that a spec's declared function takes last.

        The entry point computes them.
        """
        strides = [name for tensor in self.given(spec) for name in tensor.stride_names]
        blocks = ("row_blocks",) if spec.has_peers else ()
        return ("row_tiles", *blocks, *strides)

    @property
    def normalises(self) -> bool:
        """Whether it writes Q and K; otherwise it writes their statistics."""
        return "q_out" in self.outputs

    @property
    def rotates(self) -> bool:
        """Whether it may rotate Q and K, by heads."""
        return "cos_sin_cache" in self.tensors

    @property
    def has_cache(self) -> bool:
        """Whether it stores K and V into a paged cache."""
        return "k_cache" in self.tensors


_OUTPUTS = (
    TensorArgument("q_out", (ROWS, Q_COLS), OUT_DTYPE, is_output=True, in_place_of="q"),
    TensorArgument("k_out", (ROWS, K_COLS), OUT_DTYPE, is_output=True, in_place_of="k"),
)
_GAMMAS = (
    TensorArgument("gamma_q", (Q_COLS,), "float32"),
    TensorArgument("gamma_k", (K_COLS,), "float32"),
)
_STATISTICS = TensorArgument("qk_var", (ROWS, 2), "float32")
_OPERANDS = (
    TensorArgument("q", (ROWS, Q_COLS), IN_DTYPE),
    TensorArgument("k", (ROWS, K_COLS), IN_DTYPE),
)
_ROTATION = (
    TensorArgument("positions", (ROWS,), "int64", given_if="rotary_dim"),
    TensorArgument(
        "cos_sin_cache", (MAX_POSITION, ROTARY_DIM), ROTARY_DTYPE, given_if="rotary_dim"
    ),
)
_CACHE_SHAPE = (BLOCKS, BLOCK_SIZE, KV_HEADS, HEAD_DIM)
_CACHES = tuple(
    TensorArgument(name, _CACHE_SHAPE, CACHE_DTYPE, is_output=True)
    for name in ("k_cache", "v_cache")
)
_SCALES = tuple(
    TensorArgument(name, (SCALES,), "float32", given_if="has_scales")
    for name in ("k_scale", "v_scale")
)
_PEER_TENSORS = (
    TensorArgument("peers", (RANKS,), "int64", given_if="has_peers"),
    TensorArgument("peer_state", (PEER_WORDS,), "int64", given_if="has_peers"),
)
#: This rank; how many launches share the GPU's blocks; what sums are divided by, once they are
#: added; and what this rank's sum of K is multiplied by before, where others have copies.
_PEER_SCALARS = (
    ScalarArgument("peer_rank", dtype="int64"),
    ScalarArgument("peer_share", dtype="int64"),
    ScalarArgument("q_divisor"),
    ScalarArgument("k_divisor"),
    ScalarArgument("k_weight"),
)
_GIVEN_STATISTICS = dataclasses.replace(_STATISTICS, given_if="has_given_statistics")
_EPSILON = ScalarArgument("epsilon", 1e-6)
_NORM_FIELDS = ("out_dtype", "reproducible", "cast_before_gamma")
_STATISTICS_OF_ROPE = ("given", "local", "peers")
_ROPE_FIELDS = (
    "reproducible",
    "cast_before_gamma",
    "statistics",
    "head_dim",
    "rotary_dim",
    "rotary_dtype",
    "interleaved",
)

#: Operations by name.
OPERATIONS = {
    operation.name: operation
    for operation in (
        Operation(
            "apply_qk_rms_norm",
            (*_OUTPUTS, *_GAMMAS, _STATISTICS, *_OPERANDS),
            ("q", "k", "qk_var", "gamma_q", "gamma_k"),
            (_EPSILON,),
            _NORM_FIELDS,
        ),
        Operation(
            "row_mean_of_squares_qk",
            (
                dataclasses.replace(_STATISTICS, is_output=True, keyword="qk_var_out"),
                *_OPERANDS,
            ),
            ("q", "k"),
        ),
        Operation(
            "qk_rms_norm",
            (*_OUTPUTS, *_GAMMAS, *_OPERANDS),
            ("q", "k", "gamma_q", "gamma_k"),
            (_EPSILON,),
            (*_NORM_FIELDS, "statistics"),
            ("local", "peers"),
        ),
        Operation(
            "qk_rms_norm_rope",
            (*_OUTPUTS, *_GAMMAS, _GIVEN_STATISTICS, *_OPERANDS, *_ROTATION),
            ("q", "k", "gamma_q", "gamma_k", "positions", "cos_sin_cache", "qk_var"),
            (_EPSILON,),
            _ROPE_FIELDS,
            _STATISTICS_OF_ROPE,
        ),
        Operation(
            "qk_rms_norm_rope_cache",
            (
                _OUTPUTS[0],
                dataclasses.replace(_OUTPUTS[1], given_if="writes_k_out"),
                *_CACHES,
                *_GAMMAS,
                _GIVEN_STATISTICS,
                *_OPERANDS,
                TensorArgument("v", (ROWS, K_COLS), IN_DTYPE),
                *_ROTATION,
                TensorArgument("slot_mapping", (SLOTS,), "int64"),
                *_SCALES,
            ),
            (
                "q",
                "k",
                "v",
                "gamma_q",
                "gamma_k",
                "positions",
                "cos_sin_cache",
                "slot_mapping",
                "qk_var",
                "k_scale",
                "v_scale",
            ),
            (_EPSILON,),
            (*_ROPE_FIELDS, "cache_dtype", "writes_k_out"),
            _STATISTICS_OF_ROPE,
        ),
    )
}

#: Names of all tensors of all operations, each once.
TENSORS = tuple(
    dict.fromkeys(
        [name for operation in OPERATIONS.values() for name in operation.tensors]
        + [tensor.name for tensor in _PEER_TENSORS]
    )
)
