"""The CUDA kernel of the operations that add up rows: statistics, alone or before the norm.

Strategy. A block of threads holds whole rows of Q and of K in registers: it reads them once, adds
up the squares in the order of `qknorm_tvm.declare.statistics`, and normalises what it still holds.
Every float32 step is one of `qknorm_tvm.declare.steps`, of which the declaration is made too.

Map from the declaration's loops::

    row    -> tile, row in tile           tile: blockIdx.x
    chunk  -> round, part, warp           warp: threadIdx.x // 32, Q's warps and then K's
    lane   -> threadIdx.x % 32            sums of halves: shuffles between the lanes of a warp
    column -> one vector access
    slot   -> the lanes of a warp, which read the chunks' sums from shared memory

1. *Load*: every thread loads its vectors of all of its rows, and gamma, before anything else.
2. *Sum*: it adds its squares, and a warp its threads' sums, by shuffles. They are a butterfly:
   addition commutes, so that every lane has the bits of the declared sum of halves. Each warp
   leaves its chunks' sums in shared memory; all wait for one another once; then each warp adds the
   slots' sums, by shuffles again.
3. *Normalise* and *store* the vectors that a thread still holds; or write the means.

Where a row's columns are open, or more than registers hold, the warps go through its chunks in
rounds, slot by slot, and read them again for the outputs unless they hold all of them at once.

Where nothing is known of alignment, elements are read and written one by one: by each thread every
32nd of a chunk, so that a warp's accesses are to neighbours; and for the sum the warp exchanges
them in shared memory, so that each thread gets the 8 neighbouring columns that the order gives it.

Lanes without columns, and chunks that a row does not have, hold zeros as in the declaration; sums
that would only add such zeros are left out.

TensorIR's primitives have no words for a sum in a given order over a warp and over warps, for two
operands in one block of threads, or for registers that are read before the sum and after it: this
kernel is written out, for the parameters of the declared function.
"""

# ruff: noqa: SIM102 -- nested, a condition that is True when the kernel is made leaves no code

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

import tvm_ffi
from tvm import tirx
from tvm.s_tir import SBlock
from tvm.script import tirx as T

from qknorm_tvm.declare import steps
from qknorm_tvm.declare.parsing import parses_script
from qknorm_tvm.declare.statistics import CHUNK, SLOTS, VECTOR, WARP

from . import cuda_device
from .cuda_config import NOTE
from .cuda_row_config import MAX_PARTS, ROUND_WARPS, partition_chunks

if TYPE_CHECKING:
    from tvm.s_tir import Schedule

    from qknorm_tvm.spec import KernelSpec

    from .cuda_config import CudaConfig


# ---- what is known when the kernel is made -----------------------------------------------------


@dataclasses.dataclass(frozen=True)
class _Operand:
    """Q or K, and the warps that go through its rows.

    In rounds, the number of warps is an expression. A condition that always holds is ``True``: no
    code is made for it.
    """

    index: int
    x: Any
    gamma: Any
    out: Any
    warps: Any
    parts: int
    in_rounds: bool
    first_thread: Any
    first_sum: int

    @property
    def cols(self) -> Any:
        return self.x.shape[1]

    @property
    def is_open(self) -> bool:
        return not isinstance(self.cols, tirx.IntImm)

    @property
    def chunks(self) -> Any:
        """Chunks of a row, the last of them perhaps not whole."""
        return tirx.floordiv(self.cols + (CHUNK - 1), T.int64(CHUNK))

    @property
    def step(self) -> Any:
        """How many chunks its warps hold at a time."""
        return self.warps * self.parts

    @property
    def holds_a_row(self) -> Any:
        return self.chunks <= self.step if self.in_rounds else True

    @property
    def sums(self) -> Any:
        """Sums of a row in shared memory: no warp has to test whether it has a chunk."""
        return SLOTS if self.in_rounds else self.step

    @property
    def slot_count(self) -> Any:
        if self.in_rounds:
            return tirx.min(T.int64(SLOTS), self.chunks)
        return -(-int(self.cols) // CHUNK)

    @property
    def slot_width(self) -> int:
        """Lanes that have slots: all, or a power of two that suffices."""
        if self.in_rounds:
            return SLOTS
        return min(SLOTS, 1 << (self.slot_count - 1).bit_length())

    @property
    def aligned(self) -> bool:
        """Whether vectors are accessed as such: all of them, or all but the last of a row."""
        whole = self.is_open or int(self.cols) % VECTOR == 0
        return cuda_device.aligned_elements(self.x) > 1 and whole

    def warp(self, thread: Any) -> Any:
        return tirx.floordiv(thread - self.first_thread, T.int64(WARP))

    def chunk(self, thread: Any, part: Any, first: Any) -> Any:
        """Return a warp's chunk, where the operand's first warp has chunk `first`."""
        return first + part * self.warps + self.warp(thread)

    def summed_column(self, thread: Any, part: Any, first: Any) -> Any:
        """Return the first of the neighbouring columns whose squares a thread adds."""
        return ((first + part * self.warps) * WARP + (thread - self.first_thread)) * VECTOR

    def held_column(self, thread: Any, part: Any, first: Any) -> Any:
        """Return the first of the columns that a thread holds; unaligned, they are 32 apart."""
        if self.aligned:
            return self.summed_column(thread, part, first)
        return self.chunk(thread, part, first) * CHUNK + _lane(thread)

    def has_column(self, column: Any) -> Any:
        whole = not self.in_rounds and int(self.cols) == self.step * CHUNK
        return True if whole else column < self.cols

    def has_vector(self, column: Any) -> Any:
        return column + VECTOR <= self.cols if self.is_open else True

    def has_slot(self, thread: Any, part: Any, slot: Any) -> Any:
        return (
            True if slot is None or not self.in_rounds else self.chunk(thread, part, slot) < SLOTS
        )


@dataclasses.dataclass(frozen=True)
class _Thread:
    """A thread: of which kernel, where in it, and its registers; `sums` are its block's."""

    spec: KernelSpec
    config: CudaConfig
    parts: int
    block_threads: int
    sums_of_row: int
    total_rows: Any
    tile: Any
    thread: Any
    x: Any
    neighbours: Any
    squares: Any
    chunk_sums: Any
    sums: Any
    total: Any
    rs: Any
    gamma: Any
    out: Any

    @property
    def rows(self) -> int:
        return self.config.rows

    def row(self, i: Any) -> Any:
        return self.tile * self.rows + i

    def has_row(self, i: Any) -> Any:
        return True if self.rows == 1 else self.row(i) < self.total_rows


def _lane(thread: Any) -> Any:
    return tirx.floormod(thread, T.int64(WARP))


def _registers(shape: tuple[int, ...], dtype: str = "float32") -> Any:
    return T.alloc_buffer(tuple(map(T.int64, shape)), dtype, scope="local", align=16)


def _unrolled(count: int) -> Any:
    return T.unroll(T.int64(count))


def _move(to: Any, to_index: Any, source: Any, index: Any) -> Any:
    """Return the statement that copies one element."""
    return tirx.BufferStore(to, tirx.BufferLoad(source, list(index)), list(to_index))


def _clear(registers: Any, index: Any) -> Any:
    zero = tirx.Cast(str(registers.dtype), tirx.FloatImm("float32", 0.0))
    return tirx.BufferStore(registers, zero, list(index))


def _access(buffer: Any) -> int:
    """Return the elements of an access: a vector, or what 16 bytes hold of it."""
    return min(VECTOR, cuda_device.aligned_elements(buffer))


def _quotient(count: Any, step: Any) -> Any:
    """Return how many steps make a count of chunks, or of slots, which 32 bits hold."""
    short = [tirx.Cast("int32", term) for term in (count + (step - 1), step)]
    return tirx.Cast("int64", tirx.truncdiv(*short))


def _operands(params: dict[str, Any], wanted: int) -> tuple[_Operand, _Operand]:
    """Partition a block's warps: as many as chunks, or as many as a block may have."""
    q, k = (
        {"x": params[tag], "gamma": params.get(f"gamma_{tag}"), "out": params.get(f"{tag}_out")}
        for tag in "qk"
    )
    cols = [params[tag].shape[1] for tag in "qk"]
    partition = None
    if all(isinstance(count, tirx.IntImm) for count in cols):
        partition = partition_chunks([-(-int(count) // CHUNK) for count in cols], wanted)
    if partition is not None:
        parts, (q_warps, k_warps) = partition
    else:
        # A variable, or every index would have all that it is computed from in it.
        parts, k_warps = min(wanted, MAX_PARTS), tirx.Var("k_warps", "int64")
        q_warps = ROUND_WARPS - k_warps
    shared: dict[str, Any] = {"parts": parts, "in_rounds": partition is None}
    of_q = _Operand(index=0, **q, warps=q_warps, **shared, first_thread=0, first_sum=0)
    of_k = _Operand(
        index=1, **k, warps=k_warps, **shared, first_thread=q_warps * WARP, first_sum=of_q.sums
    )
    return of_q, of_k


# ---- stages ------------------------------------------------------------------------------------
# `t` is the thread, `first` the chunk of the operand's first warp and `slot`, in rounds, its slot.


@T.inline
def _read(operand, registers, place, source, row, column, zeros):
    """Read a vector into registers; with `zeros`, a column that a row does not have is zero."""
    if operand.aligned:
        if operand.has_column(column):
            if operand.has_vector(column):
                lanes = T.meta_var(_access(source))
                for access in _unrolled(VECTOR // lanes):
                    for lane in T.vectorized(T.int64(lanes)):
                        e = T.meta_var(access * lanes + lane)
                        _move(registers, (*place, e), source, (*row, column + e))
            else:
                for e in _unrolled(VECTOR):
                    if operand.has_column(column + e):
                        _move(registers, (*place, e), source, (*row, column + e))
                    elif zeros:
                        _clear(registers, (*place, e))
    else:
        for e in _unrolled(VECTOR):
            if operand.has_column(column + e * WARP):
                _move(registers, (*place, e), source, (*row, column + e * WARP))


@T.inline
def _write(operand, to, row, column, registers, place, streaming):
    """Write a vector from registers."""
    if operand.aligned:
        if operand.has_column(column):
            if operand.has_vector(column):
                lanes = T.meta_var(_access(to))
                for access in _unrolled(VECTOR // lanes):
                    e = T.meta_var(access * lanes)
                    cuda_device.store_vector(
                        to, (*row, column + e), registers, (*place, e), lanes, streaming
                    )
            else:
                for e in _unrolled(VECTOR):
                    if operand.has_column(column + e):
                        _move(to, (*row, column + e), registers, (*place, e))
    else:
        for e in _unrolled(VECTOR):
            if operand.has_column(column + e * WARP):
                _move(to, (*row, column + e * WARP), registers, (*place, e))


@T.inline
def _load_x(t, operand, first, slot):
    for i in _unrolled(t.rows):
        for j in _unrolled(t.parts):
            if t.has_row(i):
                if operand.has_slot(t.thread, j, slot):
                    column = T.meta_var(operand.held_column(t.thread, j, first))
                    _read(operand, t.x, (i, j), operand.x, (t.row(i),), column, True)


@T.inline
def _load_gamma(t, operand, first):
    for j in _unrolled(t.parts):
        column = T.meta_var(operand.held_column(t.thread, j, first))
        _read(operand, t.gamma, (j,), operand.gamma, (), column, False)


@T.inline
def _load(t, operand):
    """Load what the thread holds of its rows; in rounds gamma alone, if it holds a row's."""
    if not operand.in_rounds:
        _load_x(t, operand, T.int64(0), None)
    if t.spec.operation.normalises:
        if operand.holds_a_row:
            _load_gamma(t, operand, T.int64(0))


@T.inline
def _add_squares(t, operand, first, slot):
    """Add up the squares of the vectors that the order of summation gives a thread."""
    for i in _unrolled(t.rows):
        for j in _unrolled(t.parts):
            column = T.meta_var(operand.summed_column(t.thread, j, first))
            t.squares[i, j] = T.float32(0)
            if operand.aligned:
                if operand.has_column(column):
                    if operand.has_slot(t.thread, j, slot):
                        if t.has_row(i):
                            for e in _unrolled(VECTOR):
                                t.squares[i, j] = steps.add_square(
                                    t.squares[i, j], steps.widened(t.x[i, j, e])
                                )
            else:
                cuda_device.exchange(t.x, (i, j), t.neighbours, t.block_threads)
                if operand.has_slot(t.thread, j, slot):
                    if t.has_row(i):
                        for e in _unrolled(VECTOR):
                            if operand.has_column(column + e):
                                t.squares[i, j] = steps.add_square(
                                    t.squares[i, j], steps.widened(t.neighbours[e])
                                )


@T.inline
def _share(t, operand, first):
    """Leave a warp's sums in shared memory."""
    if _lane(t.thread) == T.int64(0):
        for i in _unrolled(t.rows):
            for j in _unrolled(t.parts):
                if operand.has_slot(t.thread, j, first):
                    sum_index = T.meta_var(operand.first_sum + operand.chunk(t.thread, j, first))
                    t.sums[i * t.sums_of_row + sum_index] = t.chunk_sums[i, j]


@T.inline
def _sum_chunks(t, operand):
    """Leave the sums of chunks, in rounds those of slots, in shared memory."""
    if operand.in_rounds:
        for group in T.serial(_quotient(tirx.min(T.int64(SLOTS), operand.chunks), operand.step)):
            slot = T.meta_var(group * operand.step)
            for i in _unrolled(t.rows):
                for j in _unrolled(t.parts):
                    t.chunk_sums[i, j] = T.float32(0)
            for turn in T.serial(T.ceildiv(operand.cols, T.int64(CHUNK * SLOTS))):
                first = T.meta_var(turn * SLOTS + slot)
                # All threads of a warp, or none: its sums are shuffles.
                if operand.chunk(t.thread, 0, first) * CHUNK < operand.cols:
                    _load_x(t, operand, first, slot)
                    _add_squares(t, operand, first, slot)
                    for i in _unrolled(t.rows):
                        for j in _unrolled(t.parts):
                            t.chunk_sums[i, j] = t.chunk_sums[i, j] + T.cuda.warp_sum(
                                t.squares[i, j]
                            )
            _share(t, operand, slot)
    else:
        _add_squares(t, operand, T.int64(0), None)
        for i in _unrolled(t.rows):
            for j in _unrolled(t.parts):
                t.chunk_sums[i, j] = T.cuda.warp_sum(t.squares[i, j])
        _share(t, operand, T.int64(0))


@T.inline
def _sum_slots(t, operand, i):
    """Add up what the operand's warps have left of a row; every lane gets the sum."""
    count = T.meta_var(operand.slot_count)
    width = T.meta_var(operand.slot_width)
    slot = T.meta_var(tirx.floormod(t.thread, T.int64(width)))
    t.total[i] = T.float32(0)
    for turn in _unrolled(1 if operand.in_rounds else -(-count // SLOTS)):
        if turn * SLOTS + slot < count:
            sum_index = T.meta_var(operand.first_sum + (turn * SLOTS + slot))
            t.total[i] = t.total[i] + t.sums[i * t.sums_of_row + sum_index]
    if width > 1:
        t.total[i] = T.cuda.warp_sum(t.total[i], width)


@T.inline
def _write_means(t, operand, qk_var):
    """Write the statistics: row by row, each by another warp."""
    for i in _unrolled(t.rows):
        if operand.warp(t.thread) == (0 if operand.in_rounds else i % operand.warps):
            _sum_slots(t, operand, i)
            if _lane(t.thread) == T.int64(0):
                if t.has_row(i):
                    qk_var[t.row(i), operand.index] = steps.mean(t.total[i], operand.cols)


@T.inline
def _roots(t, operand, epsilon):
    for i in _unrolled(t.rows):
        _sum_slots(t, operand, i)
        variance = T.meta_var(steps.mean(t.total[i], operand.cols))
        t.rs[i] = steps.inverse_root(variance, epsilon, reproducible=t.spec.reproducible)


@T.inline
def _normalise(t):
    for i in _unrolled(t.rows):
        for j in _unrolled(t.parts):
            for e in _unrolled(VECTOR):
                x32 = T.meta_var(steps.widened(t.x[i, j, e]))
                scaled = T.meta_var(steps.scaled(x32, t.rs[i], steps.type_before_gamma(t.spec)))
                weighted = T.meta_var(steps.weighted(scaled, t.gamma[j, e]))
                t.out[i, j, e] = steps.rounded(weighted, t.spec.out_dtype)


@T.inline
def _store(t, operand, first):
    for i in _unrolled(t.rows):
        for j in _unrolled(t.parts):
            if t.has_row(i):
                column = T.meta_var(operand.held_column(t.thread, j, first))
                streaming = T.meta_var(t.config.streaming_stores)
                _write(operand, operand.out, (t.row(i),), column, t.out, (i, j), streaming)


@T.inline
def _write_outputs(t, operand, epsilon):
    _roots(t, operand, epsilon)
    if operand.in_rounds:
        for turn in T.serial(_quotient(operand.chunks, operand.step)):
            first = T.meta_var(turn * operand.step)
            # A row that the warps hold at once is still there.
            if operand.chunks > operand.step:
                _load_x(t, operand, first, None)
                _load_gamma(t, operand, first)
            _normalise(t)
            _store(t, operand, first)
    else:
        _normalise(t)
        _store(t, operand, T.int64(0))


# ---- the kernel --------------------------------------------------------------------------------


@parses_script
def schedule(func: tirx.PrimFunc, spec: KernelSpec, config: CudaConfig) -> tirx.PrimFunc:
    """Make the kernel of ``row_mean_of_squares_qk`` or ``qk_rms_norm``.

    Parameters
    ----------
    func : tirx.PrimFunc
        A function of `qknorm_tvm.declare.norm.declare` with ``row_tile=1``, whose parameters the
        kernel takes. Their alignment decides how wide accesses are.
    spec : KernelSpec
        What the function was declared of.
    config : CudaConfig
        ``rows``, ``columns`` (vectors of a thread in a row; more where a block would have more than
        1024 threads), ``dependent_launch`` and ``streaming_stores``. The order of summation fixes
        the rest: vectors of 8 columns, and as many threads as that makes.

    Returns
    -------
    tirx.PrimFunc
        The function bound to one grid, ready for `qknorm_tvm.build.cuda.cuda_source`.
    """
    params = {str(param.name): param for param in func.params}
    qk_var, epsilon, total_rows = params.get("qk_var"), params.get("epsilon"), params["q"].shape[0]
    normalises, launch = spec.operation.normalises, config.dependent_launch
    q, k = _operands(params, config.columns)
    rows, parts = config.rows, q.parts
    threads = WARP * (ROUND_WARPS if q.in_rounds else q.warps + k.warps)
    tiles = tirx.floordiv(total_rows + (rows - 1), T.int64(rows))

    @T.prim_func(s_tir=True, check_well_formed=False)
    def kernel():
        for tile in T.thread_binding(tiles, thread="blockIdx.x"):
            for thread in T.thread_binding(T.int64(threads), thread="threadIdx.x"):
                x = _registers((rows, parts, VECTOR), spec.in_dtype)
                neighbours = _registers((VECTOR,), spec.in_dtype)
                squares = _registers((rows, parts))
                chunk_sums = _registers((rows, parts))
                sums = T.alloc_buffer((rows * (q.sums + k.sums),), scope="shared", align=16)
                total = _registers((rows,))
                rs = _registers((rows,))
                gamma = _registers((parts, VECTOR))
                out = _registers((rows, parts, VECTOR), spec.out_dtype)
                t = T.meta_var(
                    _Thread(
                        spec, config, parts, threads, q.sums + k.sums, total_rows, tile, thread,
                        x, neighbours, squares, chunk_sums, sums, total, rs, gamma, out,
                    )
                )  # fmt: skip
                if q.in_rounds:
                    T.bind(cuda_device.warps_of_k(q.chunks, k.chunks, ROUND_WARPS), var=k.warps)
                if launch == "first":
                    cuda_device.grid_dependency("launch_dependents")
                if launch != "off":
                    cuda_device.grid_dependency("wait")
                if thread < k.first_thread:
                    _load(t, q)
                else:
                    _load(t, k)
                if launch == "after_loads":
                    cuda_device.grid_dependency("launch_dependents")
                if thread < k.first_thread:
                    _sum_chunks(t, q)
                else:
                    _sum_chunks(t, k)
                # Of the block's barriers, the one that TVM knows: beside another it puts its own.
                T.tvm_storage_sync("shared")
                if normalises:
                    if thread < k.first_thread:
                        _write_outputs(t, q, epsilon)
                    else:
                        _write_outputs(t, k, epsilon)
                elif thread < k.first_thread:
                    _write_means(t, q, qk_var)
                else:
                    _write_means(t, k, qk_var)

    func = func.with_body(kernel.body)
    return func.with_attr(cuda_device.DEPENDENT_ATTR, launch != "off")


# ---- what tuning samples -----------------------------------------------------------------------


def adds_rows(sch: Schedule) -> bool:
    """Whether a schedule is of a function that adds up rows."""
    return "square_x32_q" in _block_names(sch)


def schedule_body(sch: Schedule, config: CudaConfig) -> None:
    """Note a config on the loop over rows, so that a trace says it; `schedule` makes the kernel."""
    last = "q_out" if "q_out" in _block_names(sch) else "mean"
    row = sch.get_loops(sch.get_sblock(last))[0]
    for field, value in config.to_dict().items():
        sch.annotate(row, NOTE + field, value)


def _block_names(sch: Schedule) -> set[str]:
    blocks: list[SBlock] = []
    tvm_ffi.structural_walk(sch.mod["main"].body, (SBlock, blocks.append))
    return {str(block.name_hint) for block in blocks}
