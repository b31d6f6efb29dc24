"""What `schedules.llvm` lets be chosen, and how it is chosen by default. Imports no TVM."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from qknorm_tvm.spec import KernelSpec

#: Ways to round float32 to bfloat16, half to even; the same bits, other instructions.
ROUNDINGS = ("mask", "shift")


def _check(name: str, value: Any, low: int, high: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} must be an int, got {type(value).__name__}")
    if not low <= value <= high:
        raise ValueError(f"{name} must be from {low} to {high}, got {value}")


@dataclasses.dataclass(frozen=True)
class LLVMConfig:
    """Choices of the CPU schedule.

    Parameters
    ----------
    vector : int
        Columns handled by one vector statement; a power of two from 1 to 128. Columns beyond the
        last whole vector go through vectors of 8 and then one by one.
    row_tile : int
        Rows handled together: one load of gamma serves them all. Rows beyond the last whole tile
        go one by one through a function of their own.
    rounding : str
        How float32 becomes bfloat16: ``"mask"`` (a test into a mask register and two adds, which
        AVX-512 has) or ``"shift"`` (shift, and, two adds).
    bytes_per_task : int
        Bytes read and written that one thread gets at least. A call below twice this runs on the
        calling thread alone.
    streaming_bytes : int
        A call whose outputs have at least this many bytes stores past the caches, where rows are
        aligned to the vector; 0 never does.
    """

    vector: int = 32
    row_tile: int = 4
    rounding: str = "shift"
    bytes_per_task: int = 1 << 17
    streaming_bytes: int = 1 << 25

    def __post_init__(self) -> None:
        _check("vector", self.vector, 1, 128)
        if self.vector & (self.vector - 1):
            raise ValueError(f"vector must be a power of two, got {self.vector}")
        _check("row_tile", self.row_tile, 1, 16)
        if self.rounding not in ROUNDINGS:
            raise ValueError(
                f"rounding must be one of {', '.join(ROUNDINGS)}, got {self.rounding!r}"
            )
        _check("bytes_per_task", self.bytes_per_task, 1, 1 << 40)
        _check("streaming_bytes", self.streaming_bytes, 0, 1 << 50)

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as a JSON-ready dictionary."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, fields: dict[str, Any]) -> LLVMConfig:
        """Build a config from `to_dict`'s result; an unknown field is a ``TypeError``."""
        return cls(**fields)


def default_config(spec: KernelSpec, features: frozenset[str]) -> LLVMConfig:
    """Choose a config from the spec and the instruction sets that the code may use."""
    avx512 = {"avx512bw", "avx512vl"} <= features
    both_16_bit = spec.in_bytes == 2 and spec.out_bytes == 2
    if avx512:
        vector = 32 if both_16_bit else 16
    elif "avx2" in features:
        vector = 16 if both_16_bit else 8
    else:
        vector = 8 if both_16_bit else 4
    # Without F16C a float16 conversion is a call; nothing is gained by holding several rows.
    row_tile = 4 if "f16c" in features or "float16" not in (spec.in_dtype, spec.out_dtype) else 1
    return LLVMConfig(vector=vector, row_tile=row_tile, rounding="mask" if avx512 else "shift")
