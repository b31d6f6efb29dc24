"""`KernelSpec`: everything that decides the generated code. Equal specs mean one artifact."""

from __future__ import annotations

import dataclasses
import hashlib
import re
from collections.abc import Iterable
from typing import Any

from .dtypes import DTYPE_BYTES
from .operations import OPERATIONS, Operation, TensorArgument
from .targets import Target, parse_target

#: Operations that can be declared.
OPS = tuple(OPERATIONS)
#: Columns above this are a mistake rather than a model.
MAX_COLS = 1 << 24

_TEXT = re.compile(
    r"(?P<op>\w+)\[(?P<in_dtype>\w+)->(?P<out_dtype>\w+), q=(?P<q>\d+|any), k=(?P<k>\d+|any)"
    r"(?P<choices>(, \w+(=\w+)?)*)\]@(?P<target>[\w.,:+-]+)"
)
#: What fields of text may be.
_TEXTS = {
    "statistics": ("given", "local", "peers"),
    "rotary_dtype": ("in_dtype", "float32"),
    "cache_dtype": ("in_dtype", "float8_e4m3fn"),
}


def _check_number(
    name: str, value: Any, least: int, most: int, *, needed_for: str | None = None
) -> None:
    or_none = "" if needed_for else " or None"
    if value is None and needed_for is None:
        return
    if value is None:
        raise ValueError(f"{name} must be given for {needed_for}, got None")
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} must be an int{or_none}, got {type(value).__name__}")
    if not least <= value <= most:
        or_none = "" if needed_for else ", or None"
        raise ValueError(f"{name} must be from {least} to {most}{or_none}, got {value}")


def _check_text(name: str, value: Any, allowed: Iterable[str]) -> None:
    if not isinstance(value, str):
        raise TypeError(f"{name} must be a str, got {type(value).__name__}")
    if value not in allowed:
        raise ValueError(f"{name} must be one of {', '.join(allowed)}, got {value!r}")


@dataclasses.dataclass(frozen=True)
class KernelSpec:
    """What is compiled: operation, element types, columns and target.

    Parameters
    ----------
    op : str
        The operation: ``"apply_qk_rms_norm"``, ``"row_mean_of_squares_qk"`` (its statistics),
        ``"qk_rms_norm"`` (both in one launch), ``"qk_rms_norm_rope"`` (then rotated) or
        ``"qk_rms_norm_rope_cache"`` (then stored in a paged cache).
    in_dtype, out_dtype : str
        Element type of q and k, and of the outputs: ``"bfloat16"``, ``"float16"`` or
        ``"float32"``, in every pairing. `out_dtype` defaults to `in_dtype`; statistics are float32,
        and what is rotated keeps its type.
    q_cols, k_cols : int or None
        Columns of Q and K, fixed when compiled; ``None`` leaves them open until the call. The
        operations that rotate need them fixed.
    target : str
        ``"cpu"`` (one file for every level of `qknorm_tvm.targets.X86_LEVELS`, chosen at load), a
        level such as ``"x86-64-v3"``, a CPU that LLVM knows by name such as ``"znver4"``,
        ``"aarch64"`` (every AArch64 machine with Linux), ``"cuda"`` (machine code for every
        architecture in `qknorm_tvm.targets.CUDA_ARCHS`) or some of those, such as
        ``"cuda:sm_90"`` or ``"cuda:sm_80,sm_90"``. It never depends on the machine that compiles:
        ``"cpu"`` means x86-64 on AArch64 too. `qknorm_tvm.targets.host_cpu_target` returns this
        machine's own, which is what calls of the Python API compile for.
    reproducible : bool
        Compute rsqrt as 1 / sqrt, both correctly rounded, on every target, so that CPU and GPU
        agree bit for bit. CPUs always do; on CUDA the default is the hardware's rsqrt, which is
        what unfused torch uses.
    cast_before_gamma : bool
        Round ``x * rsqrt(...)`` to `in_dtype` before gamma multiplies it, as MiniMax-M2 does.
    statistics : str or None
        Of the operations that rotate: ``"given"`` (a tensor, `qk_var`), ``"local"`` (computed in
        the launch, by the order of ``row_mean_of_squares_qk``) or ``"peers"`` (computed, and
        exchanged with other ranks through their memory: CUDA only). Of ``"qk_rms_norm"`` the last
        two. By default the first.
    head_dim : int or None
        Of the operations that rotate, which need it: columns of a head.
    rotary_dim : int
        Of the same: how many of a head's first columns are rotated, an even number; 0: none.
    rotary_dtype : str or None
        Of the same: the element type of `cos_sin_cache`, `in_dtype` (the default) or float32.
    interleaved : bool
        Of the same: rotate columns 2 i and 2 i + 1 of a head with one another, as GPT-J does,
        instead of i and i + rotary_dim / 2, as GPT-NeoX does.
    cache_dtype : str or None
        Of ``"qk_rms_norm_rope_cache"``: the element type of `k_cache` and `v_cache`, `in_dtype`
        (the default) or ``"float8_e4m3fn"``, with scales.
    writes_k_out : bool
        Of the same: write K to `k_out` as well as to its cache.

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
    statistics: str = None  # type: ignore[assignment]  # becomes the operation's default
    head_dim: int | None = None
    rotary_dim: int = 0
    rotary_dtype: str | None = None
    interleaved: bool = False
    cache_dtype: str | None = None
    writes_k_out: bool = False

    def __post_init__(self) -> None:
        if self.op not in OPS:
            raise ValueError(f"op must be one of {', '.join(OPS)}, got {self.op!r}")
        operation = self.operation
        if self.out_dtype is None:
            object.__setattr__(
                self, "out_dtype", self.in_dtype if operation.normalises else "float32"
            )
        for name in ("in_dtype", "out_dtype"):
            _check_text(name, getattr(self, name), DTYPE_BYTES)
        _check_number("q_cols", self.q_cols, 1, MAX_COLS)
        _check_number("k_cols", self.k_cols, 1, MAX_COLS)
        if "out_dtype" not in operation.spec_fields:
            fixed = self.in_dtype if operation.normalises else "float32"
            if self.out_dtype != fixed:
                raise ValueError(f"out_dtype must be {fixed} for {self.op}, got {self.out_dtype!r}")
        if self.statistics is None and operation.statistics:
            object.__setattr__(self, "statistics", operation.statistics[0])
        self._check_choices()
        if operation.rotates:
            self._check_heads()
        object.__setattr__(self, "target", parse_target(self.target).text)
        if self.has_peers:
            self._check_peers()

    def _check_peers(self) -> None:
        if self.parsed_target.kind != "cuda":
            raise ValueError(
                f"statistics must be {' or '.join(self.operation.statistics[:-1])} for target "
                f"{self.target!r}, as peers' memory is that of CUDA devices, got 'peers'"
            )
        for name in ("q_cols", "k_cols"):
            _check_number(name, getattr(self, name), 1, MAX_COLS, needed_for="statistics='peers'")

    def _check_choices(self) -> None:
        """Check the types of the fields that not every operation has, and set their defaults."""
        for field in _CHOICE_FIELDS:
            value, has_field = getattr(self, field.name), field.name in self.operation.spec_fields
            if not has_field and value != field.default:
                raise ValueError(
                    f"{field.name} must be {field.default!r} for {self.op}, got {value!r}"
                )
            if isinstance(field.default, bool) and not isinstance(value, bool):
                raise TypeError(f"{field.name} must be a bool, got {type(value).__name__}")
            if field.name in _TEXTS and has_field:
                if value is None:
                    value = self.in_dtype
                    object.__setattr__(self, field.name, value)
                texts = _TEXTS[field.name]
                texts = self.operation.statistics if field.name == "statistics" else texts
                allowed = [self.in_dtype if text == "in_dtype" else text for text in texts]
                _check_text(field.name, value, dict.fromkeys(allowed))

    def _check_heads(self) -> None:
        _check_number("head_dim", self.head_dim, 1, MAX_COLS, needed_for=self.op)
        assert self.head_dim is not None
        for name in ("q_cols", "k_cols"):
            cols = getattr(self, name)
            if cols is None:
                raise ValueError(f"{name} must be given for {self.op}, got None")
            if cols % self.head_dim:
                raise ValueError(f"head_dim must divide {name}, {cols}, got {self.head_dim}")
        _check_number("rotary_dim", self.rotary_dim, 0, self.head_dim, needed_for=self.op)
        if self.rotary_dim % 2:
            raise ValueError(f"rotary_dim must be even, got {self.rotary_dim}")
        if not self.rotary_dim:  # equal specs mean one artifact
            if self.interleaved:
                raise ValueError("interleaved must be False without rotary_dim, got True")
            object.__setattr__(self, "rotary_dtype", self.in_dtype)

    @property
    def has_given_statistics(self) -> bool:
        """Whether calls give `qk_var` to an operation that could compute it."""
        return self.operation.rotates and self.statistics == "given"

    @property
    def has_peers(self) -> bool:
        """Whether the launch exchanges statistics with other ranks."""
        return self.statistics == "peers"

    def check_alone(self, doing: str) -> None:
        """Refuse a spec whose launches wait for other ranks, where there are none.

        Raises
        ------
        ValueError
            It is one; the message says what was to be done with it.
        """
        if self.has_peers:
            raise ValueError(f"specs must be of one rank to be {doing}, got {self.text}")

    @property
    def has_scales(self) -> bool:
        """Whether calls give `k_scale` and `v_scale`: the cache's type needs them."""
        return self.cache_dtype == "float8_e4m3fn"

    @property
    def tensors(self) -> tuple[TensorArgument, ...]:
        """The tensors that calls give, in the order of the entry point."""
        return self.operation.given(self)

    @property
    def outputs(self) -> tuple[str, ...]:
        """Names of those that are written."""
        return tuple(tensor.name for tensor in self.tensors if tensor.is_output)

    def dtype_of(self, tensor: TensorArgument) -> str:
        """Return the element type of a tensor in calls of this spec."""
        return self.operation.dtypes(
            self.in_dtype,
            self.out_dtype,
            rotary_dtype=self.rotary_dtype,
            cache_dtype=self.cache_dtype,
        )[tensor.name]

    @property
    def kv_heads(self) -> int:
        """Heads of K and V, of an operation that rotates."""
        assert self.k_cols is not None
        assert self.head_dim is not None
        return self.k_cols // self.head_dim

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
        choices = ""
        for field in _CHOICE_FIELDS:
            value = getattr(self, field.name)
            if value in (field.default, self.in_dtype, *self.operation.statistics[:1]):
                continue
            choices += f", {field.name}" if value is True else f", {field.name}={value}"
        return f"{self.op}[{self.in_dtype}->{self.out_dtype}, q={q}, k={k}{choices}]@{self.target}"

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

        choices: dict[str, Any] = {}
        for choice in match["choices"].split(", ")[1:]:
            name, given, value = choice.partition("=")
            if name not in _CHOICE_NAMES or name in choices:
                raise ValueError(
                    f"spec must have each of its fields once, got {choice!r} in {text!r}"
                )
            choices[name] = (int(value) if value.isdecimal() else value) if given else True
        return cls(
            op=match["op"],
            in_dtype=match["in_dtype"],
            out_dtype=match["out_dtype"],
            q_cols=cols(match["q"]),
            k_cols=cols(match["k"]),
            target=match["target"],
            **choices,
        )

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as a JSON-ready dictionary."""
        return dataclasses.asdict(self)

    def replace(self, **changes: Any) -> KernelSpec:
        """Return a copy with some fields changed; a default of the operation stays its default."""
        if self.statistics in self.operation.statistics[:1]:
            changes = {"statistics": None, **changes}
        return dataclasses.replace(self, **changes)


#: Fields that only some operations have, in the order of a spec's text.
_CHOICE_FIELDS = tuple(
    field
    for field in dataclasses.fields(KernelSpec)
    if field.name not in ("op", "in_dtype", "out_dtype", "q_cols", "k_cols", "target")
)
_CHOICE_NAMES = {field.name for field in _CHOICE_FIELDS}


@dataclasses.dataclass(frozen=True)
class Choice:
    """A field that only some operations have, as the command line offers it.

    Parameters
    ----------
    name : str
    default : bool, int, str or None
    texts : tuple of str
        What a field of text may be; ``"in_dtype"`` stands for the spec's.
    operations : tuple of str
        Those that have it.
    """

    name: str
    default: bool | int | str | None
    texts: tuple[str, ...]
    operations: tuple[str, ...]


#: The choices, in the order of a spec's text.
CHOICES = tuple(
    Choice(
        field.name,
        field.default,  # type: ignore[arg-type]
        _TEXTS.get(field.name, ()),
        tuple(name for name, op in OPERATIONS.items() if field.name in op.spec_fields),
    )
    for field in _CHOICE_FIELDS
)
