"""`KernelSpec`: everything that decides the generated code. Equal specs mean one artifact."""

from __future__ import annotations

import dataclasses
import hashlib
import re
from typing import Any

from .dtypes import DTYPE_BYTES
from .operations import OPERATIONS, Operation
from .targets import Target, parse_target

#: Operations that can be declared.
OPS = tuple(OPERATIONS)
#: Columns above this are a mistake rather than a model.
MAX_COLS = 1 << 24

_TEXT = re.compile(
    r"(?P<op>\w+)\[(?P<in_dtype>\w+)->(?P<out_dtype>\w+), q=(?P<q>\d+|any), k=(?P<k>\d+|any)"
    r"(?P<reproducible>, reproducible)?(?P<cast_before_gamma>, cast_before_gamma)?\]"
    r"@(?P<target>[\w.,:+-]+)"
)


def _check_cols(name: str, value: Any) -> None:
    if value is None:
        return
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} must be an int or None, got {type(value).__name__}")
    if not 1 <= value <= MAX_COLS:
        raise ValueError(f"{name} must be from 1 to {MAX_COLS}, or None, got {value}")


@dataclasses.dataclass(frozen=True)
class KernelSpec:
    """What is compiled: operation, element types, columns and target.

    Parameters
    ----------
    op : str
        The operation: ``"apply_qk_rms_norm"``, ``"row_mean_of_squares_qk"`` (its statistics) or
        ``"qk_rms_norm"`` (both in one launch).
    in_dtype, out_dtype : str
        Element type of q and k, and of the outputs: ``"bfloat16"``, ``"float16"`` or
        ``"float32"``, in every pairing. `out_dtype` defaults to `in_dtype`; statistics are float32.
    q_cols, k_cols : int or None
        Columns of Q and K, fixed when compiled; ``None`` leaves them open until the call.
    target : str
        ``"cpu"`` (one file for every x86-64 level from v2 to v4, chosen at load), a level such as
        ``"x86-64-v3"``, a CPU that LLVM knows by name such as ``"znver4"``, ``"aarch64"`` (every
        AArch64 machine with Linux), ``"cuda"`` (machine code for every architecture in
        `qknorm_tvm.targets.CUDA_ARCHS`) or some of those, such as ``"cuda:sm_90"`` or
        ``"cuda:sm_80,sm_90"``. It never depends on the machine that compiles: ``"cpu"`` means
        x86-64 on AArch64 too. `qknorm_tvm.targets.host_cpu_target` returns this machine's own,
        which is what calls of the Python API compile for.
    reproducible : bool
        Compute rsqrt as 1 / sqrt, both correctly rounded, on every target, so that CPU and GPU
        agree bit for bit. CPUs always do; on CUDA the default is the hardware's rsqrt, which is
        what unfused torch uses.
    cast_before_gamma : bool
        Round ``x * rsqrt(...)`` to `in_dtype` before gamma multiplies it, as MiniMax-M2 does.

    Raises
    ------
    TypeError, ValueError
        A field has the wrong type or is out of range; the message names it.
    """

    op: str = "apply_qk_rms_norm"
    in_dtype: str = "bfloat16"
    out_dtype: str = None  # type: ignore[assignment]  # becomes in_dtype
    q_cols: int | None = None
    k_cols: int | None = None
    target: str = "cpu"
    reproducible: bool = False
    cast_before_gamma: bool = False

    def __post_init__(self) -> None:
        if self.op not in OPS:
            raise ValueError(f"op must be one of {', '.join(OPS)}, got {self.op!r}")
        if self.out_dtype is None:
            follows = "out_dtype" in self.operation.spec_fields
            object.__setattr__(self, "out_dtype", self.in_dtype if follows else "float32")
        for name in ("in_dtype", "out_dtype"):
            value = getattr(self, name)
            if not isinstance(value, str):
                raise TypeError(f"{name} must be a str, got {type(value).__name__}")
            if value not in DTYPE_BYTES:
                raise ValueError(f"{name} must be one of {', '.join(DTYPE_BYTES)}, got {value!r}")
        _check_cols("q_cols", self.q_cols)
        _check_cols("k_cols", self.k_cols)
        for name in ("reproducible", "cast_before_gamma"):
            value = getattr(self, name)
            if not isinstance(value, bool):
                raise TypeError(f"{name} must be a bool, got {type(value).__name__}")
            if value and name not in self.operation.spec_fields:
                raise ValueError(f"{name} must be False for {self.op}, got True")
        if self.out_dtype != "float32" and "out_dtype" not in self.operation.spec_fields:
            raise ValueError(f"out_dtype must be float32 for {self.op}, got {self.out_dtype!r}")
        object.__setattr__(self, "target", parse_target(self.target).text)

    @property
    def operation(self) -> Operation:
        """What the operation takes."""
        return OPERATIONS[self.op]

    @property
    def in_bytes(self) -> int:
        """Size of one element of q and k, in bytes."""
        return DTYPE_BYTES[self.in_dtype]

    @property
    def out_bytes(self) -> int:
        """Size of one element of q_out and k_out, in bytes."""
        return DTYPE_BYTES[self.out_dtype]

    @property
    def parsed_target(self) -> Target:
        """The target, taken apart."""
        return parse_target(self.target)

    @property
    def text(self) -> str:
        """The spec in one line, stable across processes; `from_text` reads it back."""
        q = "any" if self.q_cols is None else self.q_cols
        k = "any" if self.k_cols is None else self.k_cols
        flags = ", reproducible" if self.reproducible else ""
        flags += ", cast_before_gamma" if self.cast_before_gamma else ""
        return f"{self.op}[{self.in_dtype}->{self.out_dtype}, q={q}, k={k}{flags}]@{self.target}"

    def __str__(self) -> str:
        return self.text

    @property
    def digest(self) -> str:
        """16 hexadecimal digits of the SHA-256 of `text`: a stable name for files and caches."""
        return hashlib.sha256(self.text.encode()).hexdigest()[:16]

    @classmethod
    def from_text(cls, text: str) -> KernelSpec:
        """Read `text` back.

        Raises
        ------
        ValueError
            The text is not a spec's.
        """
        match = _TEXT.fullmatch(text)
        if match is None:
            raise ValueError(
                "spec must look like "
                "'apply_qk_rms_norm[bfloat16->bfloat16, q=1536, k=256]@cpu', got " + repr(text)
            )

        def cols(value: str) -> int | None:
            return None if value == "any" else int(value)

        return cls(
            op=match["op"],
            in_dtype=match["in_dtype"],
            out_dtype=match["out_dtype"],
            q_cols=cols(match["q"]),
            k_cols=cols(match["k"]),
            target=match["target"],
            reproducible=match["reproducible"] is not None,
            cast_before_gamma=match["cast_before_gamma"] is not None,
        )

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as a JSON-ready dictionary."""
        return dataclasses.asdict(self)

    def replace(self, **changes: Any) -> KernelSpec:
        """Return a copy with some fields changed."""
        return dataclasses.replace(self, **changes)
