"""The exchange between ranks on CUDA: generated kernels run on the CPU, a thread for each rank.

Shows slots, turns, the order of summation and giving up; nothing of the device's memory model or
its speed, which are tested in ``gpu/``.
"""

from __future__ import annotations

import dataclasses
import shutil
import subprocess
import threading
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from cuda_emulation import Kernel
from test_emulation_cuda_rope import _rotated, _stored

from qknorm_tvm import KernelSpec, peers
from qknorm_tvm.build import cuda as build_cuda
from qknorm_tvm.check import reference
from qknorm_tvm.check.inputs import generate
from qknorm_tvm.check.reference import NUMPY_DTYPES
from qknorm_tvm.schedules.cuda_config import CudaVariant
from qknorm_tvm.schedules.cuda_variants import default_variants

EPSILON = 1e-6
POSITIONS, BLOCKS, BLOCK_SIZE = 40, 5, 4
_SLOW = pytest.mark.slow

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="g++ is not installed")


class Ranks:
    """Slots and states of several ranks."""

    def __init__(self, count: int, max_rows: int, timeout: float = 0):
        self.count, self.max_rows = count, max_rows
        self.slots = [np.zeros((peers.slot_count(max_rows),), np.uint32) for _ in range(count)]
        self.states = [np.zeros((peers.TURNS + max_rows,), np.int64) for _ in range(count)]
        self.reports = [np.zeros((1,), np.int64) for _ in range(count)]
        self.addresses = np.array([slots.ctypes.data for slots in self.slots], np.int64)
        for rank, state in enumerate(self.states):
            self.slots[rank][:] = peers.EMPTY
            state[peers.TIMEOUT] = int(timeout * 1e9)
            state[peers.REPORT] = self.reports[rank].ctypes.data

    def arguments(self, rank: int) -> dict[str, Any]:
        return {
            "peers": self.addresses, "peer_state": self.states[rank], "peer_rank": rank,
            "peer_share": 1, "ranks": self.count, "peer_words": peers.TURNS + self.max_rows,
        }  # fmt: skip

    def run(self, work: Callable[[int], None], seconds: float = 60) -> None:
        """Run a function of the rank in a thread for each; kernels run without Python's lock."""
        errors: list[BaseException] = []

        def run(rank: int) -> None:
            try:
                work(rank)
            except BaseException as error:
                errors.append(error)

        # Daemons: a rank that waits for ever must not keep this process from ending.
        threads = [
            threading.Thread(target=run, args=(rank,), daemon=True) for rank in range(self.count)
        ]
        for thread in threads:
            thread.start()
        end = time.monotonic() + seconds
        for thread in threads:
            thread.join(max(0, end - time.monotonic()))
        if errors:
            raise errors[0]
        waiting = sum(thread.is_alive() for thread in threads)
        assert not waiting, f"{waiting} of {self.count} ranks wait for ever"


@dataclasses.dataclass
class Shard:
    """A rank's part of a layer, and the arrays of its calls."""

    spec: KernelSpec
    kernel: Kernel
    variant: CudaVariant
    arrays: dict[str, Any]
    scalars: dict[str, Any]

    def launch(self, rows: int, blocks: int) -> None:
        names = {tensor.name for tensor in self.spec.tensors}
        arrays = {
            name: x[:rows] if name in _BY_ROW else x
            for name, x in self.arrays.items()
            if name in names
        }
        scalars = {**self.scalars, "row_tiles": rows, "row_blocks": blocks}
        scalars["slots"] = min(rows, len(self.arrays.get("slot_mapping", ())))
        self.kernel(blocks, {**arrays, **scalars})


_BY_ROW = ("q", "k", "v", "q_out", "k_out", "positions", "slot_mapping")


def _shards(
    specs: list[KernelSpec], ranks: Ranks, pick: int = 0, replicas: int = 1, seed: int = 0
) -> list[Shard]:
    """Make every rank's inputs; `max_rows` rows."""
    rows, shards, kernels = ranks.max_rows, [], {}
    for rank, spec in enumerate(specs):
        variant = default_variants(spec)[pick]
        if spec not in kernels:
            func = build_cuda.scheduled_variant(spec, variant)
            kernels[spec] = Kernel(build_cuda.cuda_source([("emulated", func)]))
        a = generate(rows, spec.q_cols, spec.k_cols, spec.in_dtype, seed=seed + rank // replicas)
        rng = np.random.default_rng(seed + rank)
        arrays: dict[str, Any] = {"q": a.q, "k": a.k, "v": (40 * a.k).astype(a.k.dtype)}
        arrays |= {"gamma_q": a.gamma_q, "gamma_k": a.gamma_k}
        dtype = NUMPY_DTYPES[spec.in_dtype]
        for tag in "qk":
            arrays[f"{tag}_out"] = np.zeros(arrays[tag].shape, dtype)
        if spec.rotary_dim:
            arrays["positions"] = rng.integers(0, POSITIONS, rows).astype(np.int64)
            angles = rng.uniform(0, 6.3, (POSITIONS, spec.rotary_dim // 2))
            table = np.concatenate([np.cos(angles), np.sin(angles)], axis=1)
            arrays["cos_sin_cache"] = table.astype(NUMPY_DTYPES[spec.rotary_dtype])
        if spec.operation.has_cache:
            arrays["slot_mapping"] = rng.permutation(BLOCKS * BLOCK_SIZE)[:rows].astype(np.int64)
            shape = (BLOCKS, BLOCK_SIZE, spec.kv_heads, spec.head_dim)
            arrays |= {f"{tag}_cache": np.zeros(shape, dtype) for tag in "kv"}
        scalars: dict[str, Any] = {"epsilon": EPSILON, "max_position": POSITIONS}
        scalars |= {"blocks": BLOCKS, "block_size": BLOCK_SIZE}
        scalars["q_divisor"] = sum(of_rank.q_cols for of_rank in specs)
        scalars["k_divisor"] = sum(of_rank.k_cols for of_rank in specs) // replicas
        scalars["k_weight"] = 1 / replicas
        for tensor in spec.tensors:
            if tensor.name in arrays:
                x = arrays[tensor.name]
                for name, stride in zip(tensor.stride_names, x.strides, strict=False):
                    scalars[name] = stride // x.itemsize // variant.stride_unit
        shards.append(
            Shard(spec, kernels[spec].copy(), variant, arrays | ranks.arguments(rank),
                  scalars | ranks.arguments(rank))
        )  # fmt: skip
    return shards


def _totals(shards: list[Shard], rows: int) -> npt.NDArray:
    """Return the mean squares of the whole rows, added in the order of ranks."""
    total = np.zeros((rows, 2), np.float32)
    for shard in shards:
        operands = (shard.arrays[tag][:rows] for tag in "qk")
        sums = np.stack([reference.sum_of_squares_cuda(x) for x in operands], axis=1)
        weight = np.array([1, shard.scalars["k_weight"]], np.float32)
        total = total + sums * weight
    s = shards[0].scalars
    return total / np.array([s["q_divisor"], s["k_divisor"]], np.float32)


def _check(shards: list[Shard], rows: int) -> None:
    qk_var = _totals(shards, rows)
    for shard in shards:
        x, spec = shard.arrays, shard.spec
        wanted = reference.apply_qk_rms_norm(
            x["q"][:rows], x["k"][:rows], qk_var, x["gamma_q"], x["gamma_k"], EPSILON
        )
        if spec.rotary_dim:
            cos_sin = x["cos_sin_cache"][x["positions"][:rows]]
            wanted = tuple(_rotated(y, spec, cos_sin) for y in wanted)
        names = {tensor.name for tensor in spec.tensors}
        for tag, y in zip("qk", wanted, strict=True):
            if f"{tag}_out" in names:
                assert reference.differing(x[f"{tag}_out"][:rows], y) == 0
        if spec.operation.has_cache:
            heads = {"k": _stored(wanted[1], spec, None), "v": _stored(x["v"][:rows], spec, None)}
            for tag, values in heads.items():
                for row, slot in enumerate(x["slot_mapping"][:rows]):
                    got = x[f"{tag}_cache"][slot // BLOCK_SIZE, slot % BLOCK_SIZE]
                    assert reference.differing(got, values[row]) == 0


NORM = KernelSpec(op="qk_rms_norm", q_cols=384, k_cols=64, target="cuda:sm_90", statistics="peers")
CACHE = KernelSpec(
    op="qk_rms_norm_rope_cache", q_cols=384, k_cols=128, head_dim=64, rotary_dim=32,
    target="cuda:sm_90", statistics="peers",
)  # fmt: skip


def test_ranks_share_no_memory_of_the_emulation() -> None:
    """A static variable that the loader makes one for all libraries of a process."""
    func = build_cuda.scheduled_variant(CACHE, default_variants(CACHE)[1])
    library = Kernel(build_cuda.cuda_source([("emulated", func)])).library._name
    symbols = subprocess.run(["nm", library], capture_output=True, text=True, check=True).stdout
    assert " run\n" in symbols
    assert not [line for line in symbols.splitlines() if " u " in line]


@pytest.mark.parametrize(
    ("count", "spec", "pick"),
    [
        pytest.param(1, NORM, 0, marks=_SLOW),
        (2, NORM, 0),
        pytest.param(3, CACHE, 0, marks=_SLOW),
        pytest.param(2, CACHE, 1, marks=_SLOW),
        pytest.param(5, NORM, 0, marks=_SLOW),
        pytest.param(2, NORM.replace(q_cols=391, k_cols=7), 0, marks=_SLOW),
    ],
)
def test_exchange(count: int, spec: KernelSpec, pick: int) -> None:
    """A sum of another rank, row, operand or launch; sums in another order; a rank that hangs."""
    ranks = Ranks(count, 6)
    shards = _shards([spec] * count, ranks, pick)
    # More launches than sets, of other rows, in rounds and at once.
    launches = ((6, 6), (1, 1), (6, 2), (0, 0), (3, 3), (2, 1), (6, 4), (6, 6))

    def work(rank: int) -> None:
        rng = np.random.default_rng(rank)
        for rows, blocks in launches:
            time.sleep(rng.uniform(0, 0.01))
            shards[rank].launch(rows, blocks)

    ranks.run(work)
    _check(shards, 6)
    for state in ranks.states:
        assert not state[peers.FAILURE]
        turns = [sum(rows > row for rows, _ in launches) % peers.SETS for row in range(6)]
        assert list(state[peers.TURNS :]) == turns


@pytest.mark.slow
def test_unequal_shards() -> None:
    """A mean over this rank's columns, or over all ranks' as if they had as many."""
    ranks = Ranks(2, 3)
    shards = _shards([NORM, NORM.replace(q_cols=640, k_cols=32)], ranks)
    ranks.run(lambda rank: shards[rank].launch(3, 3))
    _check(shards, 3)


def test_replicated_heads() -> None:
    """Columns of K that two ranks hold, counted twice; copies that differ."""
    ranks = Ranks(4, 3)
    shards = _shards([NORM] * 4, ranks, replicas=2)
    ranks.run(lambda rank: shards[rank].launch(3, 3))
    _check(shards, 3)
    for a, b in ((0, 1), (2, 3)):
        same = reference.differing(shards[a].arrays["k_out"], shards[b].arrays["k_out"])
        assert (same == 0) == bool(
            (shards[a].arrays["gamma_k"] == shards[b].arrays["gamma_k"]).all()
        )


def test_a_rank_that_does_not_come() -> None:
    """A wait without an end; outputs that look like results; a second wait after a failure."""
    ranks = Ranks(2, 4, timeout=0.2)
    shards = _shards([CACHE] * 2, ranks)

    def work(rank: int) -> None:
        shards[rank].launch(4, 4)
        if rank == 0:
            start = time.monotonic()
            shards[rank].launch(3, 2)
            assert 0.15 < time.monotonic() - start < 30  # a busy machine; the next would take 60
            ranks.states[0][peers.TIMEOUT] = int(60e9)
            shards[rank].launch(4, 4)  # at once

    ranks.run(work)
    failed, row = peers.failure_of(int(ranks.reports[0][0]))
    assert (failed, row) == (1, 0)
    assert ranks.states[0][peers.FAILURE] == ranks.reports[0][0]
    assert not ranks.reports[1][0]
    x = shards[0].arrays
    assert np.isnan(x["q_out"].astype(np.float32)).all()
    for row, slot in enumerate(x["slot_mapping"]):
        stored = x["k_cache"][slot // BLOCK_SIZE, slot % BLOCK_SIZE].astype(np.float32)
        assert np.isnan(stored).all(), row
