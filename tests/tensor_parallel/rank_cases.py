"""What each rank does and checks, in test_many_ranks and under torchrun.

Every rank runs the same cases in order. Tensors are made on a device that is named, never on a
default one: that would hide what the library itself puts on the wrong device.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist

import qknorm_tvm
from qknorm_tvm import tensor_parallel as tp
from qknorm_tvm.call import api
from qknorm_tvm.check import reference_torch
from qknorm_tvm.errors import PeerError

EPSILON = 1e-6
#: How far outputs may be from the unsharded layer's, whose mean squares are summed in float64. The
#: ranks' float32 means of up to 6144 squares, joined, are wrong by 2e-7 relative (the worst of 512
#: rows on 2 to 16 ranks); rsqrt halves that, and the results of its own rounding and the two
#: products' may differ by 1.2e-7 each at most. Seen: 3.6e-7.
FLOAT32_RELATIVE = 1e-6
#: 16-bit outputs are those numbers rounded: the neighbour at worst. Rounded before gamma too, the
#: first neighbour is up to 2 units of the product.
HALF_ULPS = {False: 1, True: 2}
#: Ranks that disagree must say so long before the group's timeout (60 s).
SECONDS = 20


@dataclasses.dataclass(frozen=True)
class Case:
    """A layer, what it is called with, and how."""

    q_heads: int
    kv_heads: int
    head_dim: int
    rows: int
    dtype: torch.dtype = torch.bfloat16
    statistics: str = "fused"
    cast_before_gamma: bool = False
    device: str = "cpu"

    def whole_layer(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        """Return q, k, gamma_q and gamma_k of all heads, the same on every rank."""
        seed = hash((self.q_heads, self.head_dim, self.rows))
        generator = torch.Generator(self.device).manual_seed(seed)
        columns = [heads * self.head_dim for heads in (self.q_heads, self.kv_heads)]

        def values(*shape: int) -> torch.Tensor:
            return torch.randn(*shape, generator=generator, device=self.device)

        scales = torch.exp2(values(self.rows, 1) * 3)
        # Heads differ in size, so that no rank's mean is near the whole's.
        inputs = [
            scales * values(self.rows, cols) * torch.linspace(0.1, 4, cols, device=self.device)
            for cols in columns
        ]
        return (*(x.to(self.dtype) for x in inputs), *(values(cols) for cols in columns))

    def expected(
        self, q: torch.Tensor, k: torch.Tensor, qk_var: torch.Tensor, *gammas: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the unfused graph's outputs."""
        if not self.cast_before_gamma:
            return reference_torch.apply_qk_rms_norm(q, k, qk_var, *gammas, EPSILON)
        ones = [torch.ones_like(gamma) for gamma in gammas]
        rounded = reference_torch.apply_qk_rms_norm(q, k, qk_var, *ones, EPSILON)
        return tuple(
            (x.float() * gamma).to(x.dtype) for x, gamma in zip(rounded, gammas, strict=True)
        )

    def unsharded(self) -> tuple[torch.Tensor, torch.Tensor]:
        q, k, gamma_q, gamma_k = self.whole_layer()
        qk_var = torch.stack([x.double().square().mean(-1) for x in (q, k)], 1).float()
        return self.expected(q, k, qk_var, gamma_q, gamma_k)

    @property
    def options(self) -> dict[str, Any]:
        return {"statistics": self.statistics, "cast_before_gamma": self.cast_before_gamma}


# ---- comparisons ----------------------------------------------------------------------------


def bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().view(torch.int16 if tensor.itemsize == 2 else torch.int32)


def ordered(tensor: torch.Tensor) -> torch.Tensor:
    """Return 16-bit floats as integers whose difference counts the values between them."""
    number = bits(tensor).int()
    return torch.where(number < 0, -(number & 0x7FFF), number)


def is_near(case: Case, got: torch.Tensor, wanted: torch.Tensor) -> bool:
    assert got.dtype == wanted.dtype
    assert got.shape == wanted.shape
    if got.dtype == torch.float32:
        return bool(((got - wanted).abs() <= FLOAT32_RELATIVE * wanted.abs()).all())
    apart = (ordered(got) - ordered(wanted)).abs()
    return bool((apart <= HALF_ULPS[case.cast_before_gamma]).all())


def check_near(case: Case, got: torch.Tensor, wanted: torch.Tensor) -> None:
    worst = (got.double() - wanted.double()).abs().max() if got.numel() else 0
    assert is_near(case, got, wanted), f"differs by up to {worst} from the unsharded layer"


def check_same(got: torch.Tensor, wanted: torch.Tensor) -> None:
    assert torch.equal(bits(got), bits(wanted)), "not bit-equal"


def gathered(tensor: torch.Tensor, group: Any = None) -> list[torch.Tensor]:
    """Return every rank's tensor, all of one shape."""
    if not tensor.numel():
        return [tensor] * dist.get_world_size(group)
    mine = tensor.contiguous()
    raw = [torch.empty_like(mine) for _ in range(dist.get_world_size(group))]
    dist.all_gather([x.view(torch.uint8) for x in raw], mine.view(torch.uint8), group=group)
    return raw


def reduced(q: torch.Tensor, k: torch.Tensor, statistics: str, **weights: Any) -> torch.Tensor:
    """Return the statistics that the call has used, by the steps on their own."""
    if statistics == "fused":
        local = qknorm_tvm.row_mean_of_squares_qk(q, k)
    else:
        local = torch.stack([x.float().pow(2).mean(-1) for x in (q, k)], 1)
    result = tp.reduce_row_mean_of_squares(local, **weights)
    assert result is local
    return result


# ---- cases ----------------------------------------------------------------------------------


def check_layer(case: Case, group: Any = None) -> None:
    """A layer over a group: exact for its statistics, near the unsharded one, copies equal."""
    world, rank = dist.get_world_size(group), dist.get_rank(group)
    layout = tp.HeadLayout(case.q_heads, case.kv_heads, case.head_dim, world, rank)
    q, k, gamma_q, gamma_k = case.whole_layer()
    # Slices of a fused projection, as a model has them.
    qkv = torch.cat([q[:, layout.q_slice], k[:, layout.k_slice], k[:, layout.k_slice]], 1)
    q, k, _ = qkv.split([layout.q_cols, layout.k_cols, layout.k_cols], 1)
    gammas = layout.shard_gamma_q(gamma_q), layout.shard_gamma_k(gamma_k)
    outputs = tp.qk_rms_norm(q, k, *gammas, EPSILON, group=group, layout=layout, **case.options)

    qk_var = reduced(q, k, case.statistics, group=group)
    for other in gathered(qk_var, group):
        check_same(other, qk_var)
    for got, wanted in zip(outputs, case.expected(q, k, qk_var, *gammas), strict=True):
        check_same(got, wanted)

    # By default, and by totals: the same, since the weights are powers of two.
    totals = {
        "q_cols_total": layout.q_cols_total,
        "k_cols_total": layout.k_cols_total,
        "k_replicas": layout.kv_replicas,
    }
    no_rounding = world & (world - 1) == 0
    for extra in ({}, {"validate": True}, *([totals] if no_rounding else [])):
        again = tp.qk_rms_norm(q, k, *gammas, EPSILON, group=group, **case.options, **extra)
        for got, wanted in zip(again, outputs, strict=True):
            check_same(got, wanted)

    q_all, k_all = (gathered(out, group) for out in outputs)
    for other in range(world):
        check_same(k_all[other], k_all[other // layout.kv_replicas * layout.kv_replicas])
    q_wanted, k_wanted = case.unsharded()
    check_near(case, torch.cat(q_all, 1), q_wanted)
    check_near(case, torch.cat(k_all[:: layout.kv_replicas], 1), k_wanted)


def check_gamma_cut_by_rank_is_noticed() -> None:
    """The mistake that `HeadLayout` is for must fail the comparison, where copies exist."""
    world, rank = dist.get_world_size(), dist.get_rank()
    case = Case(q_heads=2 * world, kv_heads=max(1, world // 2), head_dim=32, rows=7)
    layout = tp.HeadLayout(case.q_heads, case.kv_heads, case.head_dim, world, rank)
    q, k, gamma_q, gamma_k = case.whole_layer()
    start = rank * layout.k_cols % layout.k_cols_total
    by_rank = gamma_k[start : start + layout.k_cols]
    right = torch.equal(by_rank, layout.shard_gamma_k(gamma_k))
    assert right == (rank * layout.k_cols % layout.k_cols_total == layout.k_slice.start)
    _, k_out = tp.qk_rms_norm(
        q[:, layout.q_slice], k[:, layout.k_slice], layout.shard_gamma_q(gamma_q), by_rank, EPSILON
    )
    assert is_near(case, k_out, case.unsharded()[1][:, layout.k_slice]) == right
    wrong = [not x.item() for x in gathered(torch.tensor([right]))]
    assert any(wrong) == (world > 2), wrong


def _part(widths: Sequence[int]) -> slice:
    start = sum(widths[: dist.get_rank()])
    return slice(start, start + widths[dist.get_rank()])


def check_uneven(dtype: torch.dtype, rows: int, device: str = "cpu") -> None:
    """Shards of several widths through explicit totals; without them the mean would be wrong."""
    world = dist.get_world_size()
    q_widths = [32 * (1 + rank % 3) for rank in range(world)]
    k_widths = [16 * (3 - rank % 2) for rank in range(world)]
    case = Case(sum(q_widths), sum(k_widths), 1, rows, dtype, device=device)
    q, k, gamma_q, gamma_k = case.whole_layer()
    q_part, k_part = _part(q_widths), _part(k_widths)
    arguments = (q[:, q_part], k[:, k_part], gamma_q[q_part], gamma_k[k_part], EPSILON)
    totals = {"q_cols_total": sum(q_widths), "k_cols_total": sum(k_widths)}
    q_wanted, k_wanted = case.unsharded()
    for validate in (False, True):
        q_out, k_out = tp.qk_rms_norm(*arguments, **totals, validate=validate)
        check_near(case, q_out, q_wanted[:, q_part])
        check_near(case, k_out, k_wanted[:, k_part])
    weights = {
        "q_weight": q_widths[dist.get_rank()] / sum(q_widths),
        "k_weight": k_widths[dist.get_rank()] / sum(k_widths),
    }
    qk_var = reduced(*arguments[:2], "fused", **weights)
    q_same, k_same = case.expected(*arguments[:2], qk_var, *arguments[2:4])
    check_same(q_out, q_same)
    check_same(k_out, k_same)
    if rows:
        q_out, k_out = tp.qk_rms_norm(*arguments)
        assert not is_near(case, q_out, q_wanted[:, q_part])
        assert not is_near(case, k_out, k_wanted[:, k_part])


def check_uneven_replicas() -> None:
    """Two KV heads, the first on all ranks but the last: a copy counts by its own replicas."""
    world, rank = dist.get_world_size(), dist.get_rank()
    case = Case(q_heads=2 * world, kv_heads=2, head_dim=16, rows=5)
    q, k, gamma_q, gamma_k = case.whole_layer()
    last = rank == world - 1
    q_part, k_part = _part([32] * world), slice(16, 32) if last else slice(0, 16)
    q_out, k_out = tp.qk_rms_norm(
        q[:, q_part],
        k[:, k_part],
        gamma_q[q_part],
        gamma_k[k_part],
        EPSILON,
        k_cols_total=32,
        k_replicas=1 if last else world - 1,
        validate=True,
    )
    q_wanted, k_wanted = case.unsharded()
    check_near(case, q_out, q_wanted[:, q_part])
    check_near(case, k_out, k_wanted[:, k_part])


def check_powers_of_two_add_no_rounding() -> None:
    """Equal statistics, whose plain sum over the ranks would overflow, stay as they are.

    Of 20 bits, so that sums of up to 16 of them are exact and only the weights could round.
    """
    values = torch.tensor([[1 / 3, 3.4e38], [1e-30, 0.1]])
    values = (values.view(torch.int32) & ~0xF).view(torch.float32)
    for weights in ({}, dict.fromkeys(("q_weight", "k_weight"), 1 / dist.get_world_size())):
        check_same(tp.reduce_row_mean_of_squares(values.clone(), **weights), values)


def check_module(device: str = "cpu") -> None:
    """The module: scales by head from bfloat16, leading dimensions, its own state dict."""
    world, rank = dist.get_world_size(), dist.get_rank()
    case = Case(q_heads=2 * world, kv_heads=max(1, world // 2), head_dim=32, rows=6, device=device)
    q, k, gamma_q, gamma_k = case.whole_layer()
    gammas = gamma_q.bfloat16(), gamma_k.bfloat16()
    heads = (case.q_heads, case.kv_heads, 32, EPSILON)
    norm = tp.TensorParallelQKNorm(*heads, validate=True, device=device)
    norm.load_full(*gammas)
    layout = norm.layout
    assert (layout.world_size, layout.rank) == (world, rank)
    q, k = q[:, layout.q_slice], k[:, layout.k_slice]
    q_out, k_out = norm(q.view(2, 3, -1), k.view(2, 3, -1))
    assert q_out.shape == (2, 3, layout.q_cols)
    assert k_out.shape == (2, 3, layout.k_cols)
    wanted = case.expected(
        q,
        k,
        reduced(q, k, "fused"),
        layout.shard_gamma_q(gammas[0].float()),
        layout.shard_gamma_k(gammas[1].float()),
    )
    check_same(q_out.view(6, -1), wanted[0])
    check_same(k_out.view(6, -1), wanted[1])
    other = tp.TensorParallelQKNorm(*heads, device=device)
    other.load_state_dict(norm.state_dict())
    check_same(other(q, k)[1], wanted[1])


def check_subgroups() -> None:
    """A layer over every second rank, by both halves at once; neither may touch the other."""
    world, rank = dist.get_world_size(), dist.get_rank()
    halves = [dist.new_group(list(range(half, world, 2))) for half in (0, 1)]
    mine = halves[rank % 2]
    check_layer(Case(world, world, 8, rows=3 + rank % 2), mine)
    raises(
        ValueError,
        "group must be one that this process belongs to, got one that it is not in "
        f"(it is rank {rank} of the default group)",
        lambda: tp.reduce_row_mean_of_squares(torch.ones(1, 2), group=halves[1 - rank % 2]),
    )
    if world > 2:
        three = dist.new_group([0, 1, 2])
        if rank < 3:
            check_layer(Case(6, 3, 32, rows=5), three)
            check_layer(Case(6, 1, 32, 5, torch.float32), three)


def check_heads_that_do_not_divide() -> None:
    """OLMo-2 32B's 40 query heads on 16 ranks: refused on every one of them."""
    raises(
        ValueError,
        "q_heads must be a multiple of world_size (16), got 40; for uneven shards give column "
        "totals to tensor_parallel.qk_rms_norm",
        lambda: tp.TensorParallelQKNorm(40, 8, 128),
    )


def raises(kind: type[Exception], message: str, call: Callable[[], object]) -> None:
    start, raised = time.monotonic(), None
    try:
        call()
    except Exception as error:
        raised = error
    assert type(raised) is kind, repr(raised)
    assert str(raised) == message, f"{raised}\nis not\n{message}"
    assert time.monotonic() - start < SECONDS


def check_disagreement(device: str = "cpu") -> None:
    """Whatever one rank does otherwise, all raise the same, at once, and the group still works."""
    world, rank = dist.get_world_size(), dist.get_rank()
    last = world - 1
    others = ", ".join(map(str, range(last)))
    others = f"rank{'s' if last > 1 else ''} {others}"

    def call(
        rows: int = 3,
        q_cols: int = 32,
        dtype: torch.dtype = torch.bfloat16,
        k_dtype: torch.dtype | None = None,
        epsilon: float = EPSILON,
        **keywords: Any,
    ) -> Callable[[], object]:
        q = torch.ones(rows, q_cols, dtype=dtype, device=device)
        k = torch.ones(rows, 16, dtype=k_dtype or dtype, device=device)
        gammas = [torch.ones(cols, device=device) for cols in (q_cols, 16)]
        return lambda: tp.qk_rms_norm(q, k, *gammas, epsilon, validate=True, **keywords)

    def one_differs(message: str, **changes: Any) -> None:
        raises(ValueError, message, call(**changes) if rank == last else call())

    same = "must be the same on every rank"
    one_differs(f"rows of q and k {same}, got 3 on {others}; 4 on rank {last}", rows=4)
    one_differs(f"rows of q and k {same}, got 3 on {others}; 0 on rank {last}", rows=0)
    one_differs(
        f"dtype of q and k {same}, got bfloat16 on {others}; float32 on rank {last}",
        dtype=torch.float32,
    )
    one_differs(f"epsilon {same}, got 1e-06 on {others}; 0.0 on rank {last}", epsilon=0.0)
    one_differs(
        f"columns of q {same} where q_cols_total is not given, got 32 on {others}; "
        f"48 on rank {last}",
        q_cols=48,
    )
    one_differs(
        f"weighting by column totals {same}, got False on {others}; True on rank {last}",
        q_cols_total=32 * world,
    )
    wrong = "arguments must be right on every rank, got on rank"
    one_differs(
        f"{wrong} {last}: TypeError: k must be bfloat16 like q, got float16", k_dtype=torch.float16
    )
    one_differs(
        f"{wrong} {last}: TypeError: q must be one of bfloat16, float16, float32, got int32",
        dtype=torch.int32,
    )
    one_differs(
        f"{wrong} {last}: ValueError: statistics must be one of fused, torch, got 'exact'",
        statistics="exact",
    )
    raises(
        ValueError,
        f"columns of q must add up to q_cols_total ({32 * world + 1}), got {32 * world} in all: "
        f"32 on {others}, {last}".replace("rank 0,", "ranks 0,"),
        call(q_cols_total=32 * world + 1),
    )
    call()()


def check_what_only_apply_refuses(device: str = "cpu") -> None:
    """Outputs that overlap on one rank, or code that it cannot get: all raise, nothing is written.

    Found after the all-reduce, the other ranks would have gone on.
    """
    world, rank = dist.get_world_size(), dist.get_rank()
    last = rank == world - 1
    wrong = f"arguments must be right on every rank, got on rank {world - 1}: "
    buffer = torch.arange(3 * 64, dtype=torch.float32, device=device).view(3, 64)
    before = buffer.clone()
    q, k = buffer[:, :32], buffer[:, 32:48]
    gammas = [torch.ones(cols, device=device) for cols in (32, 16)]

    def call(q_out: Any, k_out: Any) -> Callable[[], object]:
        return lambda: tp.qk_rms_norm(q, k, *gammas, q_out=q_out, k_out=k_out, validate=True)

    raises(
        ValueError,
        f"{wrong}ValueError: k_out must not overlap q_out, got tensors that share memory",
        call(q, q[:, :16] if last else k),
    )
    check_same(buffer, before)
    apply = api.apply_qk_rms_norm

    def no_compiler(*_: Any, **__: Any) -> None:
        raise qknorm_tvm.BuildError("no compiler here")

    try:
        if last:
            api.apply_qk_rms_norm = no_compiler
        raises(ValueError, f"{wrong}BuildError: no compiler here", call(q, k))
    finally:
        api.apply_qk_rms_norm = apply
    check_same(buffer, before)
    wanted = tp.qk_rms_norm(q, k, *gammas)
    call(q, k)()
    check_same(q, wanted[0])
    check_same(k, wanted[1])


def check_compiled(backend: str = "aot_eager") -> None:
    """The module in one graph, over the default group and over one that is given."""
    world, rank = dist.get_world_size(), dist.get_rank()
    pairs = [dist.new_group([first, first + 1]) for first in range(0, world, 2)]
    case = Case(q_heads=2 * world, kv_heads=world, head_dim=16, rows=5)
    q, k, gamma_q, gamma_k = case.whole_layer()
    for group in (None, pairs[rank // 2]):
        norm = tp.TensorParallelQKNorm(2 * world, world, 16, EPSILON, group=group)
        norm.load_full(gamma_q, gamma_k)
        arguments = q[:, norm.layout.q_slice], k[:, norm.layout.k_slice]
        wanted = norm(*arguments)
        got = torch.compile(norm, fullgraph=True, backend=backend)(*arguments)
        for mine, other in zip(got, wanted, strict=True):
            check_same(mine, other)


def check_attention_input() -> None:
    """Rotation and cache after the all-reduce: of other statistics, heads, slots or positions."""
    world, rank = dist.get_world_size(), dist.get_rank()
    case = Case(q_heads=3 * world, kv_heads=world, head_dim=32, rows=7)
    q, k, gamma_q, gamma_k = case.whole_layer()
    layer = tp.TensorParallelQKNorm(3 * world, world, 32, EPSILON, validate=True)
    layer.load_full(gamma_q, gamma_k)
    layout = layer.layout
    q, k = q[:, layout.q_slice], k[:, layout.k_slice]
    generator = torch.Generator().manual_seed(rank)
    v = torch.randn(k.shape, generator=generator).to(k.dtype)
    angles = torch.randn(40, 16, generator=generator).to(k.dtype)
    positions = torch.randint(0, 40, (7,), generator=generator)
    slots = torch.tensor([5, -1, 0, 9, 2])
    qk_var = reduced(q, k, "fused")
    gammas = layer.gamma_q, layer.gamma_k
    heads = {"head_dim": 32, "epsilon": EPSILON, "qk_var": qk_var}
    wanted = qknorm_tvm.qk_rms_norm_rope(q, k, *gammas, positions, angles, **heads)
    rotation = {"positions": positions, "cos_sin_cache": angles}
    for got, value in zip(layer.attention_input(q, k, **rotation), wanted, strict=True):
        check_same(got, value)
    caches = [torch.zeros(3, 4, 1, 32, dtype=k.dtype) for _ in range(4)]
    q_out, _ = qknorm_tvm.qk_rms_norm_rope_cache(
        q, k, v, *gammas, positions, angles, *caches[:2], slots, **heads
    )
    stored = {"k_cache": caches[2], "v_cache": caches[3], "slot_mapping": slots}
    got, k_out = layer.attention_input(q, k, v, **rotation, **stored)
    assert k_out is None
    check_same(got, q_out)
    check_same(caches[2], caches[0])
    check_same(caches[3], caches[1])
    # What one rank alone finds wrong, all are told, and nothing is stored.
    before = [cache.clone() for cache in caches[2:]]
    wrong = v[:, 1:] if rank == world - 1 else v
    raises(
        ValueError,
        f"arguments must be right on every rank, got on rank {world - 1}: ValueError: v must have "
        "32 columns, got 31",
        lambda: layer.attention_input(q, k, wrong, **rotation, **stored),
    )
    for cache, value in zip(caches[2:], before, strict=True):
        check_same(cache, value)


def check_no_workspace() -> None:
    """Ranks that cannot reach one another's memory, and wait; a layer that needs that."""
    if torch.cuda.is_available():
        return
    none = f"PeerError: a CUDA device is needed, got none (torch {torch.__version__}) on rank"
    wrong = "every rank must be able to take part, got"
    raises(PeerError, f"{wrong} {none} 0; {none} 1", lambda: tp.PeerWorkspace())
    raises(
        ValueError,
        f"{wrong} {none} 0; ValueError: max_rows must be from 1 to 16777216, got 0 on rank 1",
        lambda: tp.PeerWorkspace(max_rows=4 * (1 - dist.get_rank())),
    )
    q, k = torch.ones(2, 32), torch.ones(2, 16)
    gammas = torch.ones(32), torch.ones(16)
    wanted = tp.qk_rms_norm(q, k, *gammas)
    for got, value in zip(tp.qk_rms_norm(q, k, *gammas, workspace="auto"), wanted, strict=True):
        check_same(got, value)


def cases(world: int) -> list[tuple[str, Callable[[], object]]]:
    """Return what to run with so many ranks, by name."""
    listed: list[tuple[str, Callable[[], object]]] = []

    def layer(name: str, *sizes: Any, **options: Any) -> None:
        listed.append((name, lambda: check_layer(Case(*sizes, **options))))

    for rows in (0, 1, 7, 16):
        for dtype in (torch.bfloat16, torch.float32):
            name = f"{rows} rows of {str(dtype).rpartition('.')[2]}"
            layer(f"MiniMax-M2 (heads of 32), {name}", 48, 8, 32, rows, dtype)
            layer(f"OLMo-2 7B (heads of 16), {name}", 32, 32, 16, rows, dtype)
    layer("MiniMax-M2, full size", 48, 8, 128, 16)
    layer("MiniMax-M2, rounded before gamma", 48, 8, 32, 5, cast_before_gamma=True)
    layer("float16, statistics by torch", 48, 8, 32, 5, torch.float16, "torch")
    if world < 16:
        layer("OLMo-2 32B (heads of 16)", 40, 8, 16, 5)
    else:
        listed.append(("OLMo-2 32B is refused", check_heads_that_do_not_divide))
    listed += [
        ("gamma cut by rank", check_gamma_cut_by_rank_is_noticed),
        ("uneven shards, bfloat16", lambda: check_uneven(torch.bfloat16, 7)),
        ("uneven shards, float32", lambda: check_uneven(torch.float32, 16)),
        ("uneven shards, no rows", lambda: check_uneven(torch.bfloat16, 0)),
        ("uneven replicas", check_uneven_replicas),
        ("powers of two", check_powers_of_two_add_no_rounding),
        ("module", check_module),
        ("subgroups", check_subgroups),
        ("disagreement", check_disagreement),
        ("what only apply refuses", check_what_only_apply_refuses),
    ]
    if world == 2:  # once: they take seconds
        listed.append(("torch.compile", check_compiled))
        listed.append(("rotation and cache", check_attention_input))
        listed.append(("no workspace", check_no_workspace))
    return listed
