"""The CUDA kernel of the operations that add up rows, or rotate them: one for all of these.

Strategy. A block of threads holds whole rows of Q, K and V in registers: it reads them once, adds
up the squares in the order of `qknorm_tvm.declare.statistics`, and normalises, rotates and stores
what it still holds. Every float32 step is one of `qknorm_tvm.declare.steps`, of which the
declaration is made too.

Map from the declaration's loops::

    row    -> tile, row in tile           tile: blockIdx.x
    chunk  -> round, part, warp           warp: threadIdx.x // 32, Q's warps, then K's, then V's
    lane   -> threadIdx.x % 32            sums of halves: shuffles between the lanes of a warp
    column -> one vector access
    slot   -> the lanes of a warp, which read the chunks' sums from shared memory

1. *Load*: every thread loads its vectors of all of its rows, and gamma, before anything else; what
   leads to further loads (positions, slots) first, and what it leads to (cosines) last.
2. *Sum*, unless the statistics are given: it adds its squares, and a warp its threads' sums, by
   shuffles. They are a butterfly: addition commutes, so that every lane has the bits of the
   declared sum of halves. Each warp leaves its chunks' sums in shared memory; all wait for one
   another once; then each warp adds the slots' sums, by shuffles again.
   Between ranks, it exchanges them then, see `cuda_peers`.
3. *Normalise*, *rotate* and *store* the vectors that a thread still holds; or write the means.

Where a row's columns are open, or more than registers hold, the warps go through its chunks in
rounds, slot by slot, and read them again for the outputs unless they hold all of them at once.

Where nothing is known of alignment, elements are read and written one by one: by each thread every
32nd of a chunk, so that a warp's accesses are to neighbours; and for the sum the warp exchanges
them in shared memory, so that each thread gets the 8 neighbouring columns that the order gives it.

Lanes without columns, and chunks that a row does not have, hold zeros as in the declaration; sums
that would only add such zeros are left out.

A rotated column needs its partner's rounded norm (`_Rotation`): it is in the same vector, or
another lane of the warp has it, at one distance for all; else the thread reads the partner's column
of x too and normalises it. Outputs may be the inputs: one barrier then keeps all of the block's
reads before its first write.

TensorIR's primitives have no words for a sum in a given order over a warp and over warps, for two
operands in one block of threads, or for registers that are read before the sum and after it: this
kernel is written out, for the parameters of the declared function.
"""

# ruff: noqa: SIM102 -- a condition that is known when the kernel is made leaves no code,
# if it stands alone

from __future__ import annotations

import dataclasses
import functools
from typing import TYPE_CHECKING, Any

from tvm import tirx
from tvm.script import tirx as T

from qknorm_tvm.declare import steps
from qknorm_tvm.declare.parsing import parses_script
from qknorm_tvm.declare.statistics import CHUNK, SLOTS, VECTOR, WARP
from qknorm_tvm.peers import FAILURE, MAX_RANKS, TURNS

from . import cuda_device, cuda_peers
from .cuda_row_config import (
    MAX_PARTS,
    REGISTERS,
    RESIDENT_THREADS,
    ROUND_WARPS,
    check_row_fits,
    partition_chunks,
)

if TYPE_CHECKING:
    from qknorm_tvm.spec import KernelSpec

    from .cuda_config import CudaConfig


# ---- what is known when the kernel is made -----------------------------------------------------


@dataclasses.dataclass(frozen=True)
class _Rotation:
    """Which columns of a head are rotated, with which partners, and where a thread has those.

    Of ``head`` (a column's place in its head) the first `rotary_dim` are. `aligned` is whether a
    thread holds vectors of neighbours, which then are rotated as a whole or not at all.
    """

    head_dim: int
    rotary_dim: int
    interleaved: bool
    aligned: bool

    @property
    def half(self) -> int:
        return self.rotary_dim // 2

    @property
    def in_vector(self) -> bool:
        """Whether a thread's own vector holds the partners."""
        return self.aligned and self.interleaved

    @property
    def lanes(self) -> int:
        """The bit in which the lanes that hold partners differ; 0 where no shuffle reaches them."""
        group = self.rotary_dim // VECTOR
        paired = group & (group - 1) == 0 and group <= WARP and self.head_dim % self.rotary_dim == 0
        return group // 2 if self.aligned and not self.interleaved and paired else 0

    @property
    def reads_partners(self) -> bool:
        return not self.in_vector and not self.lanes

    @property
    def angles(self) -> int:
        """Cosines, and sines, of a vector."""
        return VECTOR // 2 if self.in_vector else VECTOR

    def part(self, part: Any) -> Any:
        """Return the part whose cosines a part's vector takes: 0 where all parts' are the same."""
        return T.int64(0) if CHUNK % self.head_dim == 0 else part

    def angle_of(self, e: Any) -> Any:
        """Return which of a vector's cosines is its element's."""
        return tirx.floordiv(e, 2) if self.in_vector else e

    def in_head(self, column: Any) -> Any:
        return tirx.floormod(column, T.int64(self.head_dim))

    def turns(self, column: Any) -> Any:
        """Return whether a column, or the vector that begins there, is rotated."""
        return True if self.rotary_dim == self.head_dim else self.in_head(column) < self.rotary_dim

    def is_first(self, column: Any) -> Any:
        if self.interleaved:
            return tirx.floormod(self.in_head(column), T.int64(2)) == 0
        return self.in_head(column) < self.half

    def partner(self, column: Any) -> Any:
        """Return a column's partner, or where the vector of a vector's partners begins."""
        distance = 1 if self.interleaved else self.half
        # The vector's length last, or TVM does not see that the sum is a multiple of it.
        unit = VECTOR if self.aligned else 1
        place, distance = tirx.floordiv(column, T.int64(unit)), distance // unit
        return T.Select(self.is_first(column), place + distance, place - distance) * unit

    def partner_in_vector(self, e: Any) -> Any:
        return e + 1 - 2 * tirx.floormod(e, T.int64(2))

    def sine_angle(self, column: Any) -> Any:
        return self.angle(column) + self.half

    def angle(self, column: Any) -> Any:
        """Return the index in a row of cosines for a column, or for the first one of a vector."""
        if self.interleaved:
            return tirx.floordiv(self.in_head(column), T.int64(2))
        return tirx.floormod(self.in_head(column), T.int64(self.half))


@dataclasses.dataclass(frozen=True)
class _Operand:
    """Q, K or V, and the warps that go through its rows.

    In rounds, the number of warps is an expression. A condition that always holds is ``True``: no
    code is made for it.
    """

    index: int
    x: Any
    gamma: Any
    out: Any
    cache: Any
    scales: Any
    head_dim: int | None
    rotation: _Rotation | None
    is_summed: bool
    warps: Any
    parts: int
    in_rounds: bool
    first_thread: Any
    first_sum: int

    @property
    def is_normalised(self) -> bool:
        return self.gamma is not None

    @property
    def is_rotated(self) -> bool:
        return self.rotation is not None

    @property
    def is_written(self) -> bool:
        return self.out is not None

    @property
    def is_cached(self) -> bool:
        return self.cache is not None

    @property
    def is_scaled(self) -> bool:
        return self.scales is not None

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
        if not self.is_summed:
            return 0
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
        in_vectors = self.is_open or int(self.cols) % VECTOR == 0
        return cuda_device.aligned_elements(self.x) > 1 and in_vectors

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

    def element(self, column: Any, e: Any) -> Any:
        """Return the column of an element of what a thread holds from a column on."""
        return column + (e if self.aligned else e * WARP)

    def has_column(self, column: Any) -> Any:
        fills_step = not self.in_rounds and int(self.cols) == self.step * CHUNK
        return True if fills_step else column < self.cols

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
    params: dict[str, Any]
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
    variance: Any
    position: Any
    cosine: Any
    sine: Any
    partner: Any
    partner_gamma: Any
    slot: Any
    block: Any
    offset: Any
    scale: Any
    stored: Any
    float8: Any
    turn: Any
    failure: Any
    peer_slots: Any
    own_slots: Any
    roots: Any
    blocks: Any

    @property
    def rows(self) -> int:
        return self.config.rows

    def row(self, i: Any) -> Any:
        return self.tile * self.rows + i

    def has_row(self, i: Any) -> Any:
        return True if self.rows == 1 else self.row(i) < self.total_rows


def _rank_of_lane(t: _Thread) -> Any:
    """Return the rank to which a lane writes, and from whose slot it reads."""
    return tirx.floormod(t.thread, T.int64(MAX_RANKS))


def _of_operand(t: _Thread, of_q: Any, of_k: Any) -> Any:
    """Return `of_q` in the lanes that exchange Q's sums, `of_k` in those that exchange K's."""
    return T.Select(_lane(t.thread) < T.int64(MAX_RANKS), of_q, of_k)


def _lane(thread: Any) -> Any:
    return tirx.floormod(thread, T.int64(WARP))


def _registers(shape: tuple[int, ...], dtype: str = "float32") -> Any:
    return T.alloc_buffer(tuple(map(T.int64, shape)), dtype, scope="local", align=16)


def _unrolled(count: int) -> Any:
    return T.unroll(T.int64(count))


def _move(to: Any, to_index: Any, source: Any, index: Any) -> Any:
    """Return the statement that copies one element, or the bits of one."""
    value = tirx.BufferLoad(source, list(index))
    if to.dtype != source.dtype:
        value = T.reinterpret(str(to.dtype), value)
    return tirx.BufferStore(to, value, list(to_index))


def _clear(registers: Any, index: Any) -> Any:
    zero = tirx.Cast(str(registers.dtype), tirx.FloatImm("float32", 0.0))
    return tirx.BufferStore(registers, zero, list(index))


def _access(buffer: Any) -> int:
    """Return the elements of an access: a vector, or what 16 bytes hold of it."""
    return min(VECTOR, cuda_device.aligned_elements(buffer))


def _quotient(count: Any, step: Any) -> Any:
    """Return ``ceil(count / step)`` of chunks or slots, computed in 32 bits, which hold both."""
    short = [tirx.Cast("int32", term) for term in (count + (step - 1), step)]
    return tirx.Cast("int64", tirx.truncdiv(*short))


def _pieces(threads: int, wanted: int) -> int:
    """Return the fewest blocks of equal size, of `wanted` threads at most, that make `threads`."""
    warps = threads // WARP
    return next(n for n in range(1, warps + 1) if warps % n == 0 and threads // n <= wanted)


def _quotient_of(block: Any, pieces: int) -> Any:
    return block if pieces == 1 else tirx.floordiv(block, T.int64(pieces))


def _remainder_of(block: Any, pieces: int) -> Any:
    return 0 if pieces == 1 else tirx.floormod(block, T.int64(pieces))


def _row_index(row: Any, column: Any, e: Any) -> tuple[Any, ...]:
    """Return the index of an element of the vector that begins at a column."""
    return row, column + e


def _cache_index(t: _Thread, i: Any, operand: _Operand, column: Any, e: Any) -> tuple[Any, ...]:
    """Return the same of a paged cache; a vector is of one head."""
    head_dim = T.int64(operand.head_dim)
    head, in_head = tirx.floordiv(column, head_dim), tirx.floormod(column, head_dim)
    return t.block[i], t.offset[i], head, in_head + e


def _scale_index(operand: _Operand, column: Any) -> Any:
    """Return the index of a column's scale: its head's, or the only one."""
    head = tirx.floordiv(column, T.int64(operand.head_dim))
    return steps.scale_index(head, operand.scales)


def _operands(spec: KernelSpec, params: dict[str, Any], wanted: int) -> tuple[_Operand, ...]:
    """Partition a block's warps: as many as chunks, or as many as a block may have."""
    tags = [tag for tag in "qkv" if tag in params]
    cols = [params[tag].shape[1] for tag in tags]
    partition = None
    if all(isinstance(count, tirx.IntImm) for count in cols):
        partition = partition_chunks([-(-int(count) // CHUNK) for count in cols], wanted)
    if partition is not None:
        parts, warps = partition
    else:
        # A variable, or every index would have all that it is computed from in it.
        parts, k_warps = min(wanted, MAX_PARTS), tirx.Var("k_warps", "int64")
        warps = (ROUND_WARPS - k_warps, k_warps)
    operands: list[_Operand] = []
    first_thread, first_sum = 0, 0
    for index, tag in enumerate(tags):
        operand = _Operand(
            index=index,
            x=params[tag],
            gamma=params.get(f"gamma_{tag}"),
            out=params.get(f"{tag}_out"),
            cache=params.get(f"{tag}_cache"),
            scales=params.get(f"{tag}_scale"),
            head_dim=spec.head_dim,
            rotation=None,
            is_summed=tag != "v" and not spec.has_given_statistics,
            warps=warps[index],
            parts=parts,
            in_rounds=partition is None,
            first_thread=first_thread,
            first_sum=first_sum,
        )
        if spec.rotary_dim and operand.is_normalised:
            assert spec.head_dim is not None
            rotation = _Rotation(spec.head_dim, spec.rotary_dim, spec.interleaved, operand.aligned)
            operand = dataclasses.replace(operand, rotation=rotation)
        first_thread, first_sum = (
            operand.first_thread + operand.warps * WARP,
            first_sum + operand.sums,
        )
        operands.append(operand)
    return tuple(operands)


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
def _read_elsewhere(operand, registers, place, source, row, column, place_of, count):
    """Read `count` neighbours from ``place_of(column)`` on, for the columns that are rotated."""
    rotation = T.meta_var(operand.rotation)
    if operand.aligned:
        if operand.has_column(column):
            if rotation.turns(column):
                lanes = T.meta_var(min(count, _access(source)))
                for access in _unrolled(count // lanes):
                    for lane in T.vectorized(T.int64(lanes)):
                        e = T.meta_var(access * lanes + lane)
                        _move(registers, (*place, e), source, (*row, place_of(column) + e))
    else:
        for e in _unrolled(count):
            if operand.has_column(column + e * WARP):
                if rotation.turns(column + e * WARP):
                    _move(registers, (*place, e), source, (*row, place_of(column + e * WARP)))


@T.inline
def _write(operand, to, index_of, column, registers, place, streaming):
    """Write a vector from registers."""
    if operand.aligned:
        if operand.has_column(column):
            if operand.has_vector(column):
                lanes = T.meta_var(_access(to))
                for access in _unrolled(VECTOR // lanes):
                    e = T.meta_var(access * lanes)
                    cuda_device.store_vector(
                        to, index_of(column, e), registers, (*place, e), lanes, streaming
                    )
            else:
                for e in _unrolled(VECTOR):
                    if operand.has_column(column + e):
                        _move(to, index_of(column, e), registers, (*place, e))
    else:
        for e in _unrolled(VECTOR):
            if operand.has_column(column + e * WARP):
                _move(to, index_of(column + e * WARP, 0), registers, (*place, e))


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
def _load_positions(t):
    for i in _unrolled(t.rows):
        if t.has_row(i):
            t.position[i] = t.params["positions"][t.row(i)]


@T.inline
def _load_slots(t):
    """Load where rows go in the caches; rows without a slot have -1."""
    for i in _unrolled(t.rows):
        t.slot[i] = T.int64(-1)
        if t.row(i) < t.params["slot_mapping"].shape[0]:
            t.slot[i] = t.params["slot_mapping"][t.row(i)]


@T.inline
def _load_scales(t, operand):
    for j in _unrolled(t.parts):
        column = T.meta_var(operand.held_column(t.thread, j, T.int64(0)))
        for e in _unrolled(1 if operand.aligned else VECTOR):
            if operand.has_column(operand.element(column, e)):
                index = T.meta_var(_scale_index(operand, operand.element(column, e)))
                t.scale[j, e] = operand.scales[index]


@T.inline
def _load_variances(t, operand):
    for i in _unrolled(t.rows):
        if t.has_row(i):
            t.variance[i] = t.params["qk_var"][t.row(i), operand.index]


@T.inline
def _load_turns(t):
    """Load, in the warp that exchanges, where the rows' sums go and come from."""
    if t.thread < T.int64(WARP):
        peers, state = T.meta_var(t.params["peers"]), T.meta_var(t.params["peer_state"])
        for i in _unrolled(t.rows):
            if t.has_row(i):
                t.turn[i] = state[TURNS + t.row(i)]
        t.failure[0] = state[FAILURE]
        t.own_slots[0] = peers[t.params["peer_rank"]]
        t.peer_slots[0] = peers[T.min(_rank_of_lane(t), peers.shape[0] - 1)]


@T.inline
def _load_partners(t, operand):
    """Load x and gamma of the columns with which the thread's own are rotated."""
    place_of = T.meta_var(operand.rotation.partner)
    for j in _unrolled(t.parts):
        column = T.meta_var(operand.held_column(t.thread, j, T.int64(0)))
        for i in _unrolled(t.rows):
            if t.has_row(i):
                _read_elsewhere(
                    operand, t.partner, (i, j), operand.x, (t.row(i),), column, place_of, VECTOR
                )
        _read_elsewhere(operand, t.partner_gamma, (j,), operand.gamma, (), column, place_of, VECTOR)


@T.inline
def _load(t, operand):
    """Load what the thread holds of its rows; in rounds gamma alone, if it holds a row's."""
    if operand.is_rotated:
        _load_positions(t)
    if operand.is_cached:
        _load_slots(t)
    if operand.is_normalised and t.spec.has_given_statistics:
        _load_variances(t, operand)
    if t.spec.has_peers:
        _load_turns(t)
    if not operand.in_rounds:
        _load_x(t, operand, T.int64(0), None)
    if operand.is_normalised:
        if operand.holds_a_row:
            _load_gamma(t, operand, T.int64(0))
    if operand.is_scaled:
        _load_scales(t, operand)
    if operand.is_rotated:
        if operand.rotation.reads_partners:
            _load_partners(t, operand)


@T.inline
def _load_rotation(t, operand):
    """Load cosines and sines, once the positions have come."""
    if operand.is_rotated:
        rotation = T.meta_var(operand.rotation)
        table = T.meta_var(t.params["cos_sin_cache"])
        for i in _unrolled(t.rows):
            for j in _unrolled(t.cosine.shape[1]):
                if t.has_row(i):
                    row = T.meta_var((t.position[i],))
                    column = T.meta_var(operand.held_column(t.thread, j, T.int64(0)))
                    _read_elsewhere(
                        operand, t.cosine, (i, j), table, row, column, rotation.angle,
                        rotation.angles,
                    )  # fmt: skip
                    _read_elsewhere(
                        operand, t.sine, (i, j), table, row, column, rotation.sine_angle,
                        rotation.angles,
                    )  # fmt: skip


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
    if not operand.is_summed:
        T.evaluate(0)
    elif operand.in_rounds:
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
def _write_means(t, operand):
    """Write the statistics: row by row, each by another warp."""
    for i in _unrolled(t.rows):
        if operand.warp(t.thread) == (0 if operand.in_rounds else i % operand.warps):
            _sum_slots(t, operand, i)
            if _lane(t.thread) == T.int64(0):
                if t.has_row(i):
                    qk_var = T.meta_var(t.params["qk_var"])
                    qk_var[t.row(i), operand.index] = steps.mean(t.total[i], operand.cols)


@T.inline
def _empty_slots(t):
    """Empty the rows' slots of the launch before, and note the turn of the next one."""
    state = T.meta_var(t.params["peer_state"])
    if t.thread < T.int64(WARP):
        for i in _unrolled(t.rows):
            if t.has_row(i):
                before = T.meta_var(cuda_peers.turn_before(t.turn[i]))
                slots = T.meta_var(cuda_peers.row_slots(state, before, t.row(i)))
                if _rank_of_lane(t) < t.params["peers"].shape[0]:
                    cuda_peers.empty_slot(t.own_slots[0] + slots + t.thread * 4)
                if t.thread == T.int64(0):
                    state[TURNS + t.row(i)] = cuda_peers.next_turn(t.turn[i])


@T.inline
def _sum_both(t, operands, i):
    """Add up the warps' sums of a row: Q's in the lanes that exchange Q, K's in those of K."""
    q, k = T.meta_var(operands[0]), T.meta_var(operands[1])
    width = T.meta_var(max(q.slot_width, k.slot_width))
    if width <= MAX_RANKS:
        slot = T.meta_var(tirx.floormod(t.thread, T.int64(width)))
        count = T.meta_var(_of_operand(t, T.int64(q.slot_count), T.int64(k.slot_count)))
        first = T.meta_var(_of_operand(t, T.int64(q.first_sum), T.int64(k.first_sum)))
        t.total[i] = T.float32(0)
        if slot < count:
            t.total[i] = t.sums[i * t.sums_of_row + (first + slot)]
        if width > 1:
            t.total[i] = T.cuda.warp_sum(t.total[i], width)
    else:
        _sum_slots(t, k, i)
        t.variance[i] = t.total[i]
        _sum_slots(t, q, i)
        t.total[i] = _of_operand(t, t.total[i], t.variance[i])


@T.inline
def _exchange(t, operands):
    """Make the sums of this rank's rows those of all ranks, and leave the rows' roots."""
    state, ranks = T.meta_var(t.params["peer_state"]), T.meta_var(t.params["peers"].shape[0])
    weight = T.meta_var(_of_operand(t, T.float32(1), t.params["k_weight"]))
    divisor = T.meta_var(_of_operand(t, t.params["q_divisor"], t.params["k_divisor"]))
    of_k = T.meta_var(_of_operand(t, T.int64(0), T.int64(MAX_RANKS)))
    for i in _unrolled(t.rows):
        if t.has_row(i):
            _sum_both(t, operands, i)
            slots = T.meta_var(cuda_peers.row_slots(state, t.turn[i], t.row(i)))
            if _rank_of_lane(t) < ranks:
                own = T.meta_var((of_k + t.params["peer_rank"]) * 4)
                cuda_peers.store_slot(t.peer_slots[0] + slots + own, t.total[i] * weight)
    for i in _unrolled(t.rows):
        if t.has_row(i):
            slots = T.meta_var(cuda_peers.row_slots(state, t.turn[i], t.row(i)))
            t.total[i] = cuda_peers.gather_sums(
                t.own_slots[0] + slots + t.thread * 4, ranks, t.row(i), t.failure[0], state
            )
            variance = T.meta_var(steps.over_columns(t.total[i], divisor))
            t.rs[i] = steps.inverse_root(
                variance, t.params["epsilon"], reproducible=t.spec.reproducible
            )
            if _rank_of_lane(t) == T.int64(0):
                t.roots[2 * i + _of_operand(t, T.int64(0), T.int64(1))] = t.rs[i]


@T.inline
def _load_roots(t, operand):
    for i in _unrolled(t.rows):
        t.rs[i] = t.roots[2 * i + operand.index]


@T.inline
def _roots(t, operand):
    epsilon = T.meta_var(t.params["epsilon"])
    for i in _unrolled(t.rows):
        if t.spec.has_given_statistics:
            t.rs[i] = steps.inverse_root(t.variance[i], epsilon, reproducible=t.spec.reproducible)
        else:
            _sum_slots(t, operand, i)
            variance = T.meta_var(steps.mean(t.total[i], operand.cols))
            t.rs[i] = steps.inverse_root(variance, epsilon, reproducible=t.spec.reproducible)


@T.inline
def _normalise(t):
    for i in _unrolled(t.rows):
        for j in _unrolled(t.parts):
            for e in _unrolled(VECTOR):
                t.out[i, j, e] = steps.normalised(t.spec, t.x[i, j, e], t.rs[i], t.gamma[j, e])


def _rotated(t: _Thread, rotation: _Rotation, i: Any, j: Any, e: Any, column: Any) -> Any:
    """Return an element of `t.out` rotated with its partner."""
    angle = (i, rotation.part(j), rotation.angle_of(e))
    own, partner, cosine, sine = (
        steps.widened(tirx.BufferLoad(registers, list(place)))
        for registers, place in (
            (t.out, (i, j, e)), (t.partner, (i, j, e)), (t.cosine, angle), (t.sine, angle),
        )
    )  # fmt: skip
    sign = T.Select(rotation.is_first(column), T.float32(1), steps.negated(T.float32(1)))
    return steps.rounded(steps.rotated(own, partner, cosine, sine * sign), t.spec.out_dtype)


@T.inline
def _rotate(t, operand):
    """Rotate the rounded norm."""
    rotation = T.meta_var(operand.rotation)
    for i in _unrolled(t.rows):
        for j in _unrolled(t.parts):
            column = T.meta_var(operand.held_column(t.thread, j, T.int64(0)))
            if rotation.lanes > 0:
                # All lanes of the warp, whether they have columns or not.
                cuda_device.shuffle_vector(t.out, t.partner, (i, j), rotation.lanes)
            for e in _unrolled(VECTOR):
                if rotation.in_vector:
                    t.partner[i, j, e] = t.out[i, j, rotation.partner_in_vector(e)]
                if rotation.reads_partners:
                    t.partner[i, j, e] = steps.normalised(
                        t.spec, t.partner[i, j, e], t.rs[i], t.partner_gamma[j, e]
                    )
            if operand.aligned:
                if rotation.turns(column):
                    for e in _unrolled(VECTOR):
                        first = T.meta_var(column + e if rotation.in_vector else column)
                        t.out[i, j, e] = _rotated(t, rotation, i, j, e, first)
            else:
                for e in _unrolled(VECTOR):
                    if rotation.turns(column + e * WARP):
                        t.out[i, j, e] = _rotated(t, rotation, i, j, e, column + e * WARP)


@T.inline
def _store(t, operand, first):
    for i in _unrolled(t.rows):
        for j in _unrolled(t.parts):
            if t.has_row(i):
                column = T.meta_var(operand.held_column(t.thread, j, first))
                streaming = T.meta_var(t.config.streaming_stores)
                index_of = T.meta_var(functools.partial(_row_index, t.row(i)))
                _write(operand, operand.out, index_of, column, t.out, (i, j), streaming)


@T.inline
def _store_cache(t, operand, registers):
    """Store rows that have a slot, in the cache's type."""
    # The entry point sees to it that 32 bits hold every slot: a division of them is far shorter.
    block_size = T.meta_var(tirx.Cast("uint32", operand.cache.shape[1]))
    streaming = T.meta_var(t.config.streaming_stores)
    # Before it is known which rows have a slot: with the addresses beside it takes more registers.
    if operand.is_scaled:
        for i in _unrolled(t.rows):
            for j in _unrolled(t.parts):
                for e in _unrolled(VECTOR):
                    t.stored[e] = steps.widened(registers[i, j, e])
                cuda_device.over_scales(t.stored, t.scale, j, operand.aligned, t.float8, (i, j))
    values = T.meta_var(t.float8 if operand.is_scaled else registers)
    for i in _unrolled(t.rows):
        if t.slot[i] >= T.int64(0):
            slot = T.meta_var(tirx.Cast("uint32", t.slot[i]))
            t.block[i] = tirx.Cast("int64", tirx.truncdiv(slot, block_size))
            t.offset[i] = tirx.Cast("int64", tirx.truncmod(slot, block_size))
            index_of = T.meta_var(functools.partial(_cache_index, t, i, operand))
            for j in _unrolled(t.parts):
                column = T.meta_var(operand.held_column(t.thread, j, T.int64(0)))
                _write(operand, operand.cache, index_of, column, values, (i, j), streaming)


@T.inline
def _write_outputs(t, operand):
    if operand.is_normalised:
        if t.spec.has_peers:
            _load_roots(t, operand)
        else:
            _roots(t, operand)
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
            if operand.is_rotated:
                _rotate(t, operand)
            if operand.is_written:
                _store(t, operand, T.int64(0))
    if operand.is_cached:
        _store_cache(t, operand, t.out if operand.is_normalised else t.x)


@T.inline
def _by_operand(t, operands, stage):
    """Take each operand's warps through a stage."""
    if t.thread < operands[1].first_thread:
        stage(t, operands[0])
    elif len(operands) == 2 or t.thread < operands[2].first_thread:
        stage(t, operands[1])
    else:
        stage(t, operands[2])


@T.inline
def _take_tile(t, operands, waits_for_warps):
    """Take a block's rows through all stages."""
    _by_operand(t, operands, _load)
    if t.config.dependent_launch == "after_loads" and not t.spec.has_peers:
        cuda_device.grid_dependency("launch_dependents")
    if operands[0].is_rotated:
        _by_operand(t, operands, _load_rotation)
    if t.sums_of_row > 0:
        _by_operand(t, operands, _sum_chunks)
    if t.spec.has_peers:
        _empty_slots(t)
    if waits_for_warps:
        # Of the block's barriers, the one that TVM knows: beside another it puts its own.
        T.tvm_storage_sync("shared")
    if t.spec.has_peers:
        if t.thread < T.int64(WARP):
            _exchange(t, operands)
        elif len(operands) > 2:
            if t.thread >= operands[2].first_thread:
                _write_outputs(t, operands[2])  # V does not wait
        T.tvm_storage_sync("shared")
        if t.config.dependent_launch == "after_loads":
            # The peers' sums are what it loads last.
            if (t.tile + t.blocks) * t.rows >= t.total_rows:
                cuda_device.grid_dependency("launch_dependents")
        if t.thread < operands[1].first_thread:
            _write_outputs(t, operands[0])
        elif len(operands) == 2 or t.thread < operands[2].first_thread:
            _write_outputs(t, operands[1])
    elif t.spec.operation.normalises:
        _by_operand(t, operands, _write_outputs)
    else:
        _by_operand(t, operands, _write_means)


# ---- the kernel --------------------------------------------------------------------------------


@parses_script
def schedule(func: tirx.PrimFunc, spec: KernelSpec, config: CudaConfig) -> tirx.PrimFunc:
    """Make the kernel of any operation but ``apply_qk_rms_norm``.

    Parameters
    ----------
    func : tirx.PrimFunc
        A function of `qknorm_tvm.declare.norm.declare` with ``row_tile=1``, whose parameters the
        kernel takes. Their alignment decides how wide accesses are.
    spec : KernelSpec
        What the function was declared of.
    config : CudaConfig
        ``rows``, ``columns`` (vectors of a thread in a row; more where a row would have more than
        1024 threads), ``dependent_launch`` and ``streaming_stores``; where the statistics are given
        also ``threads``, of a block: several share a row. The order of summation fixes the rest:
        vectors of 8 columns, and as many threads as that makes.

    Returns
    -------
    tirx.PrimFunc
        The function bound to one grid, ready for `qknorm_tvm.build.cuda.cuda_source`.
    """
    check_row_fits(spec)
    params = {str(param.name): param for param in func.params}
    total_rows, launch = params["q"].shape[0], config.dependent_launch
    operands = _operands(spec, params, config.columns)
    last, rotation = operands[-1], operands[0].rotation
    rows, parts, in_rounds = config.rows, last.parts, last.in_rounds
    threads = WARP * (ROUND_WARPS if in_rounds else sum(operand.warps for operand in operands))
    sums_of_row = sum(operand.sums for operand in operands)
    waits_for_warps = sums_of_row > 0 or (rotation is not None and rotation.reads_partners)
    angle_parts = parts if rotation is not None and CHUNK % rotation.head_dim else 1
    tiles = tirx.floordiv(total_rows + (rows - 1), T.int64(rows))
    # Warps that wait for no other may be those of several blocks.
    pieces = 1 if waits_for_warps or in_rounds else _pieces(threads, config.threads)
    block_threads = threads // pieces if pieces > 1 else threads
    # Those that wait for other ranks take tiles one after the other, as all must run at once.
    blocks = params["row_blocks"] if spec.has_peers else tiles * pieces
    own_tile = tirx.Var("tile", "int64") if spec.has_peers else None

    holds_little = operands[0].aligned and parts == 1 and rows == 1
    min_blocks = max(1, RESIDENT_THREADS // threads) if holds_little else 1
    # Two vectors and the division by scales take 56 registers, of which ptxas 13.0, left to itself,
    # spills some for one more block; asked for fewer blocks than these it takes more.
    spills = spec.has_scales and operands[0].aligned and parts == 2 and rows == 1
    most_blocks = max(1, REGISTERS // (56 * block_threads))

    def tile_of(block: Any) -> Any:
        return _quotient_of(block, pieces) if own_tile is None else own_tile

    @T.prim_func(s_tir=True, check_well_formed=False)
    def kernel():
        for block in T.thread_binding(blocks, thread="blockIdx.x"):
            for thread_of_block in T.thread_binding(T.int64(block_threads), thread="threadIdx.x"):
                tile = T.meta_var(tile_of(block))
                thread = T.meta_var(thread_of_block + _remainder_of(block, pieces) * block_threads)
                # Those that an operation does not use are not there in its code.
                x = _registers((rows, parts, VECTOR), spec.in_dtype)
                neighbours = _registers((VECTOR,), spec.in_dtype)
                squares = _registers((rows, parts))
                chunk_sums = _registers((rows, parts))
                sums = T.alloc_buffer((max(1, rows * sums_of_row),), scope="shared", align=16)
                total = _registers((rows,))
                rs = _registers((rows,))
                gamma = _registers((parts, VECTOR))
                out = _registers((rows, parts, VECTOR), spec.out_dtype)
                variance = _registers((rows,))
                position = _registers((rows,), "int64")
                cosine = _registers((rows, angle_parts, VECTOR), spec.rotary_dtype or "float32")
                sine = _registers((rows, angle_parts, VECTOR), spec.rotary_dtype or "float32")
                partner = _registers((rows, parts, VECTOR), spec.in_dtype)
                partner_gamma = _registers((parts, VECTOR))
                slot = _registers((rows,), "int64")
                place_block = _registers((rows,), "int64")
                offset = _registers((rows,), "int64")
                scale = _registers((parts, VECTOR))
                stored = _registers((VECTOR,))
                float8 = _registers((rows, parts, VECTOR), "uint8")
                turn = _registers((rows,), "int64")
                failure = _registers((1,), "int64")
                peer_slots = _registers((1,), "int64")
                own_slots = _registers((1,), "int64")
                roots = T.alloc_buffer((2 * rows,), scope="shared", align=16)
                next_tile = _registers((1,), "int64")
                t = T.meta_var(
                    _Thread(
                        spec, config, parts, block_threads, sums_of_row, params, total_rows, tile,
                        thread, x, neighbours, squares, chunk_sums, sums, total, rs, gamma, out,
                        variance, position, cosine, sine, partner, partner_gamma, slot,
                        place_block, offset, scale, stored, float8, turn, failure, peer_slots,
                        own_slots, roots, blocks,
                    )
                )  # fmt: skip
                if in_rounds:
                    T.bind(
                        cuda_device.warps_of_k(operands[0].chunks, last.chunks, ROUND_WARPS),
                        var=last.warps,
                    )
                if launch == "first":
                    cuda_device.grid_dependency("launch_dependents")
                if launch != "off":
                    cuda_device.grid_dependency("wait")
                if spec.has_peers:
                    next_tile[0] = block
                    # Registers for so many blocks: ranks that share a GPU share them.
                    with T.attr(0, cuda_device.MIN_BLOCKS_ATTR, min_blocks):
                        while next_tile[0] < tiles:
                            T.bind(next_tile[0], var=tile)
                            _take_tile(t, operands, waits_for_warps)
                            next_tile[0] = next_tile[0] + blocks
                elif spills:
                    with T.attr(0, cuda_device.MIN_BLOCKS_ATTR, most_blocks):
                        _take_tile(t, operands, waits_for_warps)
                else:
                    _take_tile(t, operands, waits_for_warps)

    func = func.with_body(kernel.body)
    return func.with_attr(cuda_device.DEPENDENT_ATTR, launch != "off")
