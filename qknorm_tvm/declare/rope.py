"""The declaration of the operations that rotate: norm, rotation, paged cache.

A head's columns go by *units*: each pair that is rotated, then each column that is not. Of a unit
of Q or K, all in float32 but for what is rounded to the operands' type::

    rs = rsqrt(var + epsilon)                       var given, or the mean of `declare.statistics`
    y  = cast((cast(x, float32) * rs) * gamma, in_dtype)
    first, second of a pair:  cast(a * cos - b * sin, in_dtype), cast(b * cos + a * sin, in_dtype)
    of another column:        y

with a, b the pair's y as float32, and the cosine and the sine of the row's position. Both are known
before either is stored: an output may be the input. K goes to its cache so, and V as it came, to
slot ``slot_mapping[row]`` where there is one that is not negative; a float8 cache holds
``cast(x / scale, float8)`` of each.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from tvm import tirx
from tvm.script import tirx as T

from . import steps
from .parameters import function, parameters
from .statistics import row_mean, sum_of_squares

if TYPE_CHECKING:
    from ..spec import KernelSpec


def pair_columns(spec: KernelSpec, pair: Any) -> tuple[Any, Any]:
    """Return the columns of a head that are rotated with one another."""
    if spec.interleaved:
        return pair * 2, pair * 2 + 1
    return pair, pair + spec.rotary_dim // 2


def stored(spec: KernelSpec, x: Any, scales: Any, head: Any) -> Any:
    """Return an element as its cache holds it; `scales` has one number, or one for each head."""
    if spec.cache_dtype is None or not spec.has_scales:
        return x
    scale = scales[steps.scale_index(head, scales)]
    return steps.rounded(steps.divided_by_scale(steps.widened(x), scale), spec.cache_dtype)


def _root(tag: str, spec: KernelSpec) -> Callable[..., Any]:
    rs_name, reproducible = f"rs_{tag}", spec.reproducible

    @T.inline
    def root(rs, var, column, rows, epsilon):
        for i in range(rows):
            with T.sblock(rs_name):
                vi = T.axis.spatial(rows, i)
                rs[vi] = steps.inverse_root(var[vi, column], epsilon, reproducible=reproducible)

    return root


def _heads(tag: str, spec: KernelSpec, given: dict[str, Any]) -> Callable[..., Any]:
    """Return the statements that write one operand's heads, in one block ``heads_{tag}``."""
    assert spec.head_dim is not None
    name, in_dtype, head_dim = f"heads_{tag}", spec.in_dtype, spec.head_dim
    pairs, rest = spec.rotary_dim // 2, head_dim - spec.rotary_dim
    x, gamma, out = given[tag], given[f"gamma_{tag}"], given.get(f"{tag}_out")
    heads = x.shape[1] // head_dim
    positions: Any = given.get("positions")
    cos_sin: Any = given.get("cos_sin_cache")
    cache, scales = given.get(f"{tag}_cache"), given.get(f"{tag}_scale")

    def y(rs, row, column):
        return steps.normalised(spec, x[row, column], rs[row], gamma[column])

    def rotated(rs, row, head, pair):
        a, b = (
            steps.widened(y(rs, row, head * head_dim + column))
            for column in pair_columns(spec, pair)
        )
        cosine, sine = (
            steps.widened(cos_sin[positions[row], column]) for column in (pair, pair + pairs)
        )
        first = steps.rotated_first(a, b, cosine, sine)
        second = steps.rotated_second(a, b, cosine, sine)
        return steps.rounded(first, in_dtype), steps.rounded(second, in_dtype)

    @T.inline
    def store(place, row, head, columns, values):
        if out is not None:
            out[row, head * head_dim + columns[0]] = values[0]
            if len(columns) == 2:
                out[row, head * head_dim + columns[1]] = values[1]
        if cache is not None:
            _store(spec, cache, place, scales, row, head, columns, values)

    @T.inline
    def write_pair(rs, place, row, head, pair):
        values = T.meta_var(rotated(rs, row, head, pair))
        first = T.bind(values[0])
        second = T.bind(values[1])
        store(place, row, head, pair_columns(spec, pair), (first, second))

    @T.inline
    def write_column(rs, place, row, head, column):
        value = T.bind(y(rs, row, head * head_dim + column))
        store(place, row, head, (column,), (value,))

    @T.inline
    def write_heads(rs, place):
        for i, head, unit in T.grid(x.shape[0], heads, T.int64(pairs + rest)):
            with T.sblock(name):
                vi, vh, vu = T.axis.remap("SSS", [i, head, unit])
                if pairs == 0:
                    write_column(rs, place, vi, vh, vu)
                elif rest == 0:
                    write_pair(rs, place, vi, vh, vu)
                else:
                    if vu < pairs:
                        write_pair(rs, place, vi, vh, vu)
                    else:
                        write_column(rs, place, vi, vh, vu + pairs)

    return write_heads


@T.inline
def _store(spec, cache, place, scales, row, head, columns, values):
    if place[0][row] >= 0:
        cache[place[0][row], place[1][row], head, columns[0]] = stored(
            spec, values[0], scales, head
        )
        if len(columns) == 2:
            cache[place[0][row], place[1][row], head, columns[1]] = stored(
                spec, values[1], scales, head
            )


def declare_rope(spec: KernelSpec, **promises: Any) -> tirx.PrimFunc:
    """Declare an operation that rotates; see `declare.norm.declare`."""
    given = parameters(spec, **promises)
    rows, epsilon = given["q"].shape[0], given["epsilon"]
    adds_up = not spec.has_given_statistics
    root_q, root_k = _root("q", spec), _root("k", spec)
    add_up_q, add_up_k = (sum_of_squares(tag, spec.parsed_target.kind) for tag in ("q", "k"))
    mean_q, mean_k = row_mean("q"), row_mean("k")
    heads_q, heads_k = _heads("q", spec, given), _heads("k", spec, given)
    q, k, v, nq, nk = given["q"], given["k"], given.get("v"), spec.q_cols, spec.k_cols
    given_var, v_cache = given.get("qk_var"), given.get("v_cache")
    slots: Any = given.get("slot_mapping")
    block_size = None if v_cache is None else v_cache.shape[1]

    @T.prim_func(s_tir=True, check_well_formed=False)
    def body():
        rs_q = T.sblock_alloc_buffer((rows,), "float32")
        rs_k = T.sblock_alloc_buffer((rows,), "float32")
        if adds_up:
            var_q = T.sblock_alloc_buffer((rows, T.int64(1)), "float32")
            var_k = T.sblock_alloc_buffer((rows, T.int64(1)), "float32")
            total_q = T.sblock_alloc_buffer((rows, T.int64(1)), "float32")
            total_k = T.sblock_alloc_buffer((rows, T.int64(1)), "float32")
            add_up_q(total_q, q, rows, T.int64(nq))
            mean_q(var_q, total_q, rows, T.int64(nq))
            add_up_k(total_k, k, rows, T.int64(nk))
            mean_k(var_k, total_k, rows, T.int64(nk))
            root_q(rs_q, var_q, 0, rows, epsilon)
            root_k(rs_k, var_k, 0, rows, epsilon)
        else:
            root_q(rs_q, given_var, 0, rows, epsilon)
            root_k(rs_k, given_var, 1, rows, epsilon)
        if v is None:
            heads_q(rs_q, None)
            heads_k(rs_k, None)
        else:
            block = T.sblock_alloc_buffer((rows,), "int64")
            offset = T.sblock_alloc_buffer((rows,), "int64")
            place = T.meta_var((block, offset))
            # Where each row goes in the caches: a block, negative for nowhere, and a slot of it.
            for i in range(rows):
                with T.sblock("place_block"):
                    vi = T.axis.spatial(rows, i)
                    block[vi] = T.if_then_else(
                        vi < slots.shape[0], T.floordiv(slots[vi], block_size), T.int64(-1)
                    )
            for i in range(rows):
                with T.sblock("place_offset"):
                    vi = T.axis.spatial(rows, i)
                    offset[vi] = T.if_then_else(
                        vi < slots.shape[0], T.floormod(slots[vi], block_size), T.int64(-1)
                    )
            heads_q(rs_q, place)
            heads_k(rs_k, place)
            for i, head, column in T.grid(rows, T.int64(spec.kv_heads), T.int64(spec.head_dim)):
                with T.sblock("heads_v"):
                    vi, vh, vc = T.axis.remap("SSS", [i, head, column])
                    value = T.meta_var(v[vi, vh * spec.head_dim + vc])
                    _store(spec, v_cache, place, given.get("v_scale"), vi, vh, (vc,), (value,))

    return function(spec.op, given, body.body)
