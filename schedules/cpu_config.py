"""What `schedules.cpu` lets be chosen, and how it is chosen by default. Imports no TVM."""

from __future__ import annotations

import dataclasses
import math
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from qknorm_tvm.spec import KernelSpec

#: Raised when the schedule, its lowering or the declaration changes so much that times measured
#: before say nothing: tuned records of another version are not used.
SCHEDULE_VERSION = 1

#: Ways to round float32 to bfloat16, half to even; the same bits, other instructions. Where columns
#: are not taken apart into even and odd ones, ``"saturate"`` is ``"shift"``. What the others mean
#: stays as it is: tuned records name them.
ROUNDINGS = ("mask", "shift", "saturate", "convert")

#: Fewest elements of a vector that is taken apart into even and odd ones.
SMALLEST_PAIRS = 4
#: Elements that AVX512-BF16's instruction converts, and instruction sets that ``"convert"`` needs.
CONVERTED = 32
CONVERT_FEATURES = frozenset({"avx512bf16", "avx512vbmi"})
#: Bytes of a task's stack that packed gammas take at most, of the 256 KiB that a worker has.
MOST_PACKED_BYTES = 1 << 16
#: Bytes that the rows of a tile take at most where they are read twice: half of an L1 cache.
TILE_BYTES = 1 << 14
#: Rows from which packing gains: 6 to 20 % at two rows, by 2 % slower at one (one Zen 3 core).
PACKED_ROWS = 2


def _check(name: str, value: Any, low: int, high: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} must be an int, got {type(value).__name__}")
    if not low <= value <= high:
        raise ValueError(f"{name} must be from {low} to {high}, got {value}")


@dataclasses.dataclass(frozen=True)
class CpuConfig:
    """Choices of the CPU schedule.

    Parameters
    ----------
    vector : int
        Columns handled by one vector statement; a power of two from 1 to 128. Columns beyond the
        last whole vector go through vectors of 8 and then one by one.
    row_tile : int
        Rows handled together: one load of gamma serves them all. Rows beyond the last whole tile
        go one by one through a function of their own; with packed gammas so do all that are stored
        past the caches.
    rounding : str
        How float32 becomes bfloat16: ``"mask"`` (a test into a mask register and two adds, which
        AVX-512 has), ``"shift"`` (shift, and, two adds), ``"saturate"`` (16-bit halves, of even
        and odd elements at once: and-not, saturating difference, shift, add), with which tasks pack
        the gammas where they can, see `packs_gammas`, or ``"convert"`` (AVX512-BF16's instruction,
        with a `vector` of whole 32; elsewhere as ``"shift"``), which needs `CONVERT_FEATURES`.
    bytes_per_task : int
        Bytes read and written that one thread gets at least. A call below twice this runs on the
        calling thread alone.
    streaming_bytes : int
        A call whose outputs have at least this many bytes stores past the caches, where rows are
        aligned to the vector; 0 never does.
    """

    vector: int = 16
    row_tile: int = 1
    rounding: str = "shift"
    bytes_per_task: int = 1 << 17
    streaming_bytes: int = 1 << 24

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
    def from_dict(cls, fields: dict[str, Any]) -> CpuConfig:
        """Build a config from `to_dict`'s result; an unknown field is a ``TypeError``."""
        return cls(**fields)


def roundings(features: frozenset[str]) -> tuple[str, ...]:
    """Return those of `ROUNDINGS` for which code that may use some instruction sets has them."""
    return tuple(name for name in ROUNDINGS if name != "convert" or features >= CONVERT_FEATURES)


def packs_gammas(spec: KernelSpec, config: CpuConfig) -> bool:
    """Whether tasks pack the gammas, of a known size, for several rows: see `schedules.cpu`."""
    if config.rounding != "saturate" or config.vector < SMALLEST_PAIRS:
        return False
    if not spec.operation.normalises or spec.out_dtype != "bfloat16":
        return False
    if spec.interleaved or spec.q_cols is None or spec.k_cols is None:
        return False
    return 4 * (spec.q_cols + spec.k_cols) <= MOST_PACKED_BYTES


def row_bytes(spec: KernelSpec) -> int:
    """Return the bytes of a row of q and k."""
    assert spec.q_cols is not None
    assert spec.k_cols is not None
    return (spec.q_cols + spec.k_cols) * spec.in_bytes


def streams(spec: KernelSpec, vector: int) -> bool:
    """Whether outputs can be stored past the caches: every vector of a row is whole."""
    if not spec.operation.rotates:
        return spec.operation.normalises
    assert spec.head_dim is not None
    pairs, lanes = spec.rotary_dim // 2, vector * 2 if spec.interleaved else vector
    return not (pairs % vector or (spec.head_dim - spec.rotary_dim) % lanes)


def fields_used(spec: KernelSpec) -> tuple[str, ...]:
    """Return the fields that make a difference to a spec's code."""
    if not spec.operation.normalises:
        return ("row_tile", "bytes_per_task")
    rounds = spec.out_dtype == "bfloat16" or (
        spec.cast_before_gamma and spec.in_dtype == "bfloat16"
    )
    names = [field.name for field in dataclasses.fields(CpuConfig)]
    return tuple(name for name in names if rounds or name != "rounding")


def default_config(spec: KernelSpec, features: frozenset[str]) -> CpuConfig:
    """Choose a config from the spec and the instruction sets that the code may use."""
    config = _of_norm(spec, features)
    if not spec.operation.rotates:
        return config
    vector = _whole_in_heads(spec, config.vector)
    # Rows share gamma's shuffle here too; four leave registers for the rotation.
    config = dataclasses.replace(config, vector=vector, row_tile=min(config.row_tile, 4))
    if packs_gammas(spec, config):
        return config
    return dataclasses.replace(config, streaming_bytes=0)


def _whole_in_heads(spec: KernelSpec, vector: int) -> int:
    """Return the width of which a head's pairs, its other columns and V's are whole vectors."""
    assert spec.head_dim is not None
    most = vector // 2 if spec.interleaved else vector
    return math.gcd(most, spec.rotary_dim // 2, spec.head_dim - spec.rotary_dim)


def _is_converted_whole(spec: KernelSpec) -> bool:
    """Whether what is rotated is stored in vectors that the CPU converts; all else is."""
    if not spec.operation.rotates:
        return True
    return not spec.interleaved and _whole_in_heads(spec, CONVERTED) == CONVERTED


def _of_norm(spec: KernelSpec, features: frozenset[str]) -> CpuConfig:
    avx512 = {"avx512bw", "avx512vl"} <= features
    register = 64 if avx512 else 32 if "avx2" in features else 16
    if not spec.operation.normalises:
        # The order of summation leaves nothing else to choose.
        return CpuConfig(vector=register // 4, row_tile=1)
    if spec.parsed_target.machine == "aarch64":
        # Chosen by the instructions that come out, not by time: a register of 16-bit elements, a
        # pair of registers (one load) of float32. Stores past the caches are no more than a hint
        # there, and these processors see by themselves that whole lines are written.
        return CpuConfig(
            vector=8, row_tile=4 if spec.out_dtype == "bfloat16" else 1, streaming_bytes=0
        )
    if spec.out_dtype != "bfloat16":
        # One register of float32. Nothing is worth sharing: gamma is an operand in memory, and more
        # rows at once were 3 to 30 % slower (float32, float16; M = 64 to 16384).
        return CpuConfig(vector=register // 4, row_tile=1)
    if "convert" in roundings(features) and _is_converted_whole(spec):
        # Two registers of outputs, where one test for zeros serves both. What rotates gains nothing
        # from rows that share their gammas.
        columns = [cols for cols in (spec.q_cols, spec.k_cols) if cols is not None]
        vector = max(CONVERTED, math.gcd(2 * CONVERTED, *columns))
        row_tile = 1 if spec.operation.rotates else 4
        return CpuConfig(vector=vector, row_tile=row_tile, rounding="convert")
    if avx512:
        # One register of outputs, and a test into a mask. The rows of a tile share gamma's shuffle
        # into even and odd elements: there are registers for the rs of eight.
        return CpuConfig(vector=register // 2, row_tile=8, rounding="mask")
    # Two registers of outputs: the loop's own instructions are a tenth. Where statistics come
    # before, a tile's rows hide the latency of their last additions, as long as they stay in L1
    # (1536/256, one Zen 3 core: 1.00 of both operations alone, one row 1.08).
    packed = CpuConfig(vector=register, rounding="saturate")
    if packs_gammas(spec, packed):
        adds_up = not spec.operation.rotates and all(t.name != "qk_var" for t in spec.tensors)
        row_tile = 4 if adds_up and 4 * row_bytes(spec) <= TILE_BYTES else 1
        return dataclasses.replace(packed, row_tile=row_tile)
    # The rows of a tile share gamma's shuffle; there are registers for the rs of four.
    return dataclasses.replace(packed, vector=register // 2, row_tile=4)
