"""Which kernels the operations that add up rows get on CUDA by default. Imports no TVM.

Measured on an H100, bfloat16, 20 configs of 1 to 8 rows and 1 to 4 vectors a thread:

* Few rows: one row a block, and few warps in it, which meet at one barrier: a vector a thread, two
  where that makes over 16 warps (6144/1024, fused, one row: 1.58 µs against 1.66). The next kernel
  may start once the inputs are loaded (0.94 µs against 0.99 at once and 1.15 at the end; 1536/256,
  statistics, one row).
* Many rows: 823 blocks start in a microsecond, so that a block takes two rows of them, or four of
  short ones (statistics, 1536/256, 4,096 rows: 3.8 µs against 5.8; 640/128, 16,384 rows: 6.7 with
  four rows, 10.6 with two, 20.5 with one). Long rows are better off alone in a block for statistics
  (6144/1024, 16,384 rows: 74.8 against 75.5), and in pairs for the fused kernel, where that hides
  the barrier (1,024 rows: 7.6 against 7.9; 16,384: 157.1 against 169.9, a copy 156.5).
* Four vectors a thread are faster still at 6144/1024 (1,024 rows: 7.3 µs in pairs; 16,384: 156.7
  alone) and slower at 4096/4096 (16,384 rows: 192 against 179.7), where a multiprocessor holds one
  block less: for tuning to find.
* Any layout: a warp has four chunks (1537/257, 16,384 rows: 44.6 µs against 44.9 with two and 68.8
  with one; a copy 40.8; each thread reading its 8 neighbours one by one: 92.9).
* Open columns, in rounds of 8 warps: a chunk at a time is best where rows are short (1536/256, one
  row: 1.94 µs fused, against 2.77 with four and 1.06 with fixed columns), and two rows where there
  are many (16,384: 73.1, with fixed columns 40.7).
* Rotation and cache (bfloat16, 1536/256 with 64 of 128 columns rotated, 6144/1024 with all of them;
  11 to 18 configs each). Given statistics: a row's warps in blocks of 128 threads are best for few
  rows, where one multiprocessor would read a whole row's gamma (6144/1024, one row: 1.22 µs, in one
  block 1.81; 1536/256: 1.39). More vectors a thread share a row's cosines: two from 2,048 rows
  (1536/256, 16,384 rows: 51.5 µs, one vector 55.1, two rows 63.0; a copy of QKV 46.8), four of long
  rows from 512 (6144/1024, 16,384 rows: 180, two vectors 186, a copy 179). Blocks of one or two
  warps are far slower there (80 to 100). Own sums need one block a row: 1536/256 52.8, 6144/1024
  185. Two rows a block never paid: 61 to 72 registers. Nor did streaming stores.
* When the next kernel may start, on an H200, in chains of one kernel: at once is better than after
  the loads only up to 64 rows of 1536/256 with given statistics (1.18 µs against 1.27) or in the
  fused kernel (16 rows: 1.08 against 1.25), and worse elsewhere: rotation with own sums 1.61
  against 1.42 at 64 rows, 6144/1024 3.07 against 2.30. Streaming stores gain 4 to 6 % at 1,024
  rows of 1536/256 and nothing below. For tuning to find.
* A float8 cache (H200): values divided before it is known which rows have a slot are 3 to 5 %
  faster for few rows than within that branch. Registers decide for many: 6144/1024 with own sums,
  16,384 rows, takes 165 µs with 80 of them and 204 with 87, which leave two blocks of three.
* Loading gamma after the sum saves registers and was no faster anywhere beyond 256 rows: up to 14 %
  slower at 6144/1024. Streaming stores made no difference.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from .cuda_config import _MANY_BLOCKS, ACCESS_BYTES, CudaConfig, CudaVariant, _ceil_div, reachable

if TYPE_CHECKING:
    from qknorm_tvm.spec import KernelSpec

#: Neighbouring columns of a thread, and the columns of a warp's vectors: the order of summation.
VECTOR, CHUNK = 8, 256
#: Most vectors of a row that a thread holds.
MAX_PARTS = 4
#: Warps that go through a row of any length in rounds.
ROUND_WARPS = 8
# Most warps of a block.
_MAX_WARPS = 32
#: Threads of a kernel that waits for other ranks of which a multiprocessor holds that many at
#: least, where rows are in vectors: 64 registers each.
RESIDENT_THREADS = 1024
#: Registers of a multiprocessor.
REGISTERS = 65536
# Warps of a row, with a vector a thread, beyond which a thread has several vectors of it,
_MANY_WARPS = 16
# and up to which a block takes four rows, where that saves starting more than 2,700 blocks.
_FEW_WARPS = 4
# Chunks that a warp has where elements are read one by one.
_GENERAL_COLUMNS = 4
# Vectors of the call from which the fused kernel takes rows in pairs.
_MANY_VECTORS = 320 * 1024


#: Kernels of what rotates, by whether statistics are given, so that blocks may share a row, and
#: whether rows are long: name, from how many rows on it is chosen, and fields.
_ROTATING: dict[tuple[bool, bool], list[tuple[str, int, dict[str, int]]]] = {
    (True, False): [
        ("prefill", 2048, {"columns": 2, "threads": 1024}),
        ("decode", 1, {"columns": 1, "threads": 128}),
    ],
    (True, True): [
        ("prefill", 512, {"columns": 4, "threads": 128}),
        ("batch", 48, {"columns": 2, "threads": 256}),
        ("decode", 1, {"columns": 1, "threads": 128}),
    ],
    (False, False): [("prefill", 2048, {"columns": 2}), ("decode", 1, {"columns": 1})],
    (False, True): [("prefill", 512, {"columns": 4}), ("decode", 1, {"columns": 2})],
}


def partition_chunks(chunks: Sequence[int], wanted: int) -> tuple[int, tuple[int, ...]] | None:
    """Partition the chunks of Q and of K among the warps of a block.

    Parameters
    ----------
    chunks : sequence of int
        How many a row of each has.
    wanted : int
        Vectors of a row that a thread is to hold; it holds more where warps do not suffice.

    Returns
    -------
    (int, tuple of int) or None
        Vectors that a thread holds, and warps of each; None where a block cannot hold a row.
    """
    for parts in range(min(wanted, MAX_PARTS), MAX_PARTS + 1):
        warps = tuple(-(-count // parts) for count in chunks)
        if sum(warps) <= _MAX_WARPS:
            return parts, warps
    return None


def operand_cols(spec: KernelSpec) -> list[int | None]:
    """Return the columns of Q, K and, with a cache, V."""
    return [spec.q_cols, spec.k_cols, *([spec.k_cols] if spec.operation.has_cache else [])]


def check_row_fits(spec: KernelSpec) -> None:
    """Check that a block of threads can hold a row of what is rotated or exchanged.

    Raises
    ------
    ValueError
        It cannot; the message names the columns and the limit.
    """
    if not spec.operation.rotates and not spec.has_peers:
        return  # rounds
    chunks = [_ceil_div(cols or 1, CHUNK) for cols in operand_cols(spec)]
    if partition_chunks(chunks, MAX_PARTS) is None:
        names = "q_cols + 2 * k_cols" if spec.operation.has_cache else "q_cols + k_cols"
        step = MAX_PARTS * CHUNK
        raise ValueError(
            f"{names} must be at most {_MAX_WARPS * step}, each rounded up to a multiple of "
            f"{step}, for {spec.op} on CUDA, got q_cols={spec.q_cols} and k_cols={spec.k_cols}"
        )


def stride_unit(spec: KernelSpec) -> int:
    """Return the elements to whose multiples row strides are aligned with every access."""
    narrowest = min(spec.in_bytes, spec.out_bytes) if spec.operation.normalises else spec.in_bytes
    # Of a float8 cache a vector is 8 bytes.
    return VECTOR if spec.has_scales else ACCESS_BYTES // narrowest


def rotates_vectors(spec: KernelSpec) -> bool:
    """Return whether vectors are of one head, and rotated as a whole or not at all."""
    if not spec.operation.rotates:
        return True
    assert spec.head_dim is not None
    half = spec.rotary_dim // 2
    return spec.head_dim % VECTOR == 0 and half % (VECTOR // 2 if spec.interleaved else VECTOR) == 0


def has_whole_vectors(spec: KernelSpec) -> bool:
    """Return whether Q's and K's columns are whole vectors, or open."""
    are_whole = (cols is None or cols % VECTOR == 0 for cols in (spec.q_cols, spec.k_cols))
    return all(are_whole) and rotates_vectors(spec)


def _aligned(spec: KernelSpec, name: str, config: CudaConfig, min_rows: int = 1) -> CudaVariant:
    return CudaVariant(
        name=name,
        config=config,
        min_rows=min_rows,
        stride_unit=stride_unit(spec),
        alignment=ACCESS_BYTES,
    )


def _aligned_variants(spec: KernelSpec) -> list[CudaVariant]:
    after = "after_loads"
    if spec.q_cols is None or spec.k_cols is None:
        return [
            _aligned(
                spec, "batch", CudaConfig(rows=2, dependent_launch=after), min_rows=_MANY_BLOCKS
            ),
            _aligned(spec, "decode", CudaConfig(dependent_launch=after)),
        ]
    widths = [cols for cols in operand_cols(spec) if cols is not None]
    vectors, warps = sum(widths) // VECTOR, sum(_ceil_div(cols, CHUNK) for cols in widths)
    is_long = warps > _MANY_WARPS

    def variant(name: str, min_rows: int, **choices: Any) -> CudaVariant:
        return _aligned(spec, name, CudaConfig(**choices), min_rows)

    if spec.has_peers:
        return [variant("exchange", 1, columns=2 if is_long else 1, dependent_launch=after)]
    if spec.operation.rotates:
        choices = _ROTATING[spec.has_given_statistics, is_long]
        return [
            variant(name, min_rows, dependent_launch=after, **fields)
            for name, min_rows, fields in choices
        ]
    variants = [variant("decode", 1, columns=2 if is_long else 1, dependent_launch=after)]
    if spec.operation.normalises:
        pairs = min(_MANY_BLOCKS, _ceil_div(_MANY_VECTORS, vectors))
        variants.append(
            variant("batch", pairs, rows=2, dependent_launch="first" if is_long else after)
        )
    elif not is_long:
        variants.append(variant("batch", _MANY_BLOCKS, rows=2, dependent_launch=after))
    if warps <= _FEW_WARPS:
        variants.append(variant("prefill", 3 * _MANY_BLOCKS, rows=4, dependent_launch=after))
    return variants[::-1]


def _general_variants(spec: KernelSpec) -> list[CudaVariant]:
    is_open = spec.q_cols is None or spec.k_cols is None
    columns = 1 if is_open else _GENERAL_COLUMNS
    if spec.operation.rotates:
        columns = 2  # partners and cosines need registers too
    config = CudaConfig(vector=1, columns=columns, dependent_launch="after_loads")
    return [CudaVariant(name="general", config=config)]


def row_variants(spec: KernelSpec, config: CudaConfig | None) -> list[CudaVariant]:
    """Choose the kernels; see `cuda_variants.default_variants`.

    Raises ValueError where a block cannot hold a row of what is rotated.

    A given config of a vector of 1 is for any layout, any other for vectors of 8 columns.
    """
    check_row_fits(spec)
    general = _general_variants(spec)
    if spec.has_peers and config is not None and config.dependent_launch == "first":
        raise ValueError(
            "dependent_launch must be off, exit or after_loads for statistics='peers', as launches "
            "that wait for other ranks would pile up, got 'first'"
        )
    if config is None:
        return reachable((_aligned_variants(spec) if has_whole_vectors(spec) else []) + general)
    if config.vector == 1:
        return [CudaVariant(name="given", config=config)]
    if not rotates_vectors(spec):
        raise ValueError(
            f"head_dim must be a multiple of {VECTOR}, and rotary_dim of "
            f"{VECTOR if spec.interleaved else 2 * VECTOR}, for accesses of several elements, got "
            f"{spec.head_dim} and {spec.rotary_dim}"
        )
    for name in ("q_cols", "k_cols"):
        cols = getattr(spec, name)
        if cols is not None and cols % VECTOR:
            raise ValueError(
                f"{name} must be a multiple of {VECTOR} for accesses of several elements, got "
                f"{cols}"
            )
    return [_aligned(spec, "given", config), *general]
