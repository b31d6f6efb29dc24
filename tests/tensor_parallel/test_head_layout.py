"""`HeadLayout` spreads heads, columns and scales over ranks by head; pure Python."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from support import run_python

from qknorm_tvm.tensor_parallel import HeadLayout

MINIMAX_M2 = (48, 8, 128)
OLMO2_7B = (32, 32, 128)
OLMO2_32B = (40, 8, 128)


def layouts(q_heads: int, kv_heads: int, head_dim: int, world_size: int) -> list[HeadLayout]:
    return [HeadLayout(q_heads, kv_heads, head_dim, world_size, rank) for rank in range(world_size)]


@st.composite
def legal(draw: st.DrawFn) -> tuple[int, int, int, int]:
    """Heads that divide: by fewer ranks than KV heads, or by more."""
    few, factor = draw(st.integers(1, 12)), draw(st.integers(1, 6))
    kv_heads, world = draw(st.sampled_from([(few, few * factor), (few * factor, few)]))
    step = kv_heads * world // np.gcd(kv_heads, world)
    return int(step) * draw(st.integers(1, 3)), kv_heads, draw(st.integers(1, 256)), world


@given(legal())
def test_columns_and_weights_add_up(sizes: tuple[int, int, int, int]) -> None:
    ranks = layouts(*sizes)
    q_heads, kv_heads, head_dim, world = sizes
    q_held = np.zeros(q_heads * head_dim, int)
    k_held = np.zeros(kv_heads * head_dim, int)
    for layout in ranks:
        q_held[layout.q_slice] += 1
        k_held[layout.k_slice] += 1
        assert q_held[layout.q_slice].size == layout.q_cols
        assert k_held[layout.k_slice].size == layout.k_cols
        q_weight, k_weight = layout.weights
        assert Fraction(layout.q_cols, layout.q_cols_total) == Fraction(1, world)
        assert q_weight == k_weight == 1 / world
    assert (q_held == 1).all()
    assert (k_held == ranks[0].kv_replicas).all()


@given(legal())
def test_a_rank_has_the_kv_head_of_its_query_heads(sizes: tuple[int, int, int, int]) -> None:
    """Grouped-query attention must find the KV head of every local query head on its rank."""
    q_heads, kv_heads, _, _ = sizes
    for layout in layouts(*sizes):
        for q_head in range(layout.first_q_head, layout.first_q_head + layout.q_heads_local):
            held = range(layout.first_kv_head, layout.first_kv_head + layout.kv_heads_local)
            assert q_head // (q_heads // kv_heads) in held


@pytest.mark.parametrize("world_size", [1, 2, 4, 8, 16])
def test_minimax_m2(world_size: int) -> None:
    """8 KV heads: 8, 4, 2, 1 a rank, and with 16 ranks one on two neighbours."""
    for rank, layout in enumerate(layouts(*MINIMAX_M2, world_size)):
        assert layout.kv_heads_local == max(1, 8 // world_size)
        assert layout.kv_replicas == max(1, world_size // 8)
        first = rank * 8 // world_size
        assert layout.k_slice == slice(first * 128, (first + layout.kv_heads_local) * 128)
        assert layout.q_slice == slice(rank * 6144 // world_size, (rank + 1) * 6144 // world_size)
        assert (layout.q_cols_total, layout.k_cols_total) == (6144, 1024)


def test_replicated_gamma_k_is_cut_by_head_and_not_by_rank() -> None:
    """By rank, ranks 1, 3, ... would get another head's scales, and rank 8 on none at all."""
    of_head = np.repeat(np.arange(8), 128)
    held = [
        np.unique(layout.shard_gamma_k(of_head)).tolist() for layout in layouts(*MINIMAX_M2, 16)
    ]
    assert held == [[rank // 2] for rank in range(16)]


@pytest.mark.frameworks
def test_shards_are_views_of_numpy_and_torch() -> None:
    torch = pytest.importorskip("torch", reason="torch is not installed")
    layout = HeadLayout(*OLMO2_7B, world_size=4, rank=3)
    for gamma in (np.arange(4096), torch.arange(4096)):
        for part in (layout.shard_gamma_q(gamma), layout.shard_gamma_k(gamma)):
            assert part.tolist() == list(range(3072, 4096))
            part[0] = -1
            assert gamma[3072] == -1
            gamma[3072] = 3072


def test_one_rank_holds_everything() -> None:
    layout = HeadLayout(*OLMO2_32B)
    assert (layout.q_cols, layout.k_cols, layout.weights) == (5120, 1024, (1.0, 1.0))


GOOD = {"q_heads": 48, "kv_heads": 8, "head_dim": 128, "world_size": 16, "rank": 3}


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        (
            {"q_heads": 40},
            ValueError,
            r"q_heads must be a multiple of world_size \(16\), got 40; for uneven shards give",
        ),
        (
            {"q_heads": 48, "kv_heads": 6, "world_size": 4},
            ValueError,
            r"kv_heads must be a multiple or a divisor of world_size \(4\), got 6; for uneven",
        ),
        (
            {"q_heads": 8, "kv_heads": 48},
            ValueError,
            r"q_heads must be a multiple of kv_heads \(48\), got 8",
        ),
        ({"rank": 16}, ValueError, "rank must be from 0 to 15, got 16"),
        ({"rank": -1}, ValueError, "rank must be from 0 to 15, got -1"),
        ({"head_dim": 0}, ValueError, "head_dim must be at least 1, got 0"),
        ({"world_size": 0}, ValueError, "world_size must be at least 1, got 0"),
        ({"q_heads": 48.0}, TypeError, "q_heads must be an int, got float"),
        ({"kv_heads": True}, TypeError, "kv_heads must be an int, got bool"),
        ({"rank": None}, TypeError, "rank must be an int, got NoneType"),
    ],
)
def test_a_wrong_layout_is_refused(changes: dict, error: type, message: str) -> None:
    with pytest.raises(error, match=f"^{message}"):
        HeadLayout(**{**GOOD, **changes})


@pytest.mark.parametrize(
    ("gamma", "error", "message"),
    [
        (np.ones(1024), ValueError, r"gamma_q must have the whole layer's shape \(6144,\), got"),
        (np.ones((1, 6144)), ValueError, r"gamma_q must have the whole layer's shape \(6144,\)"),
        ([1.0] * 6144, TypeError, "gamma_q must be an array with a shape, got list"),
    ],
)
def test_a_gamma_that_is_not_the_whole_layers_is_refused(
    gamma: object, error: type, message: str
) -> None:
    """A shard given as the whole would otherwise be cut once more."""
    with pytest.raises(error, match=message):
        HeadLayout(**GOOD).shard_gamma_q(gamma)


def test_a_layout_is_frozen_and_compares_by_value() -> None:
    layout = HeadLayout(**GOOD)
    assert layout == HeadLayout(**GOOD)
    assert len({layout, HeadLayout(**GOOD)}) == 1
    with pytest.raises(dataclasses.FrozenInstanceError):
        layout.rank = 1  # type: ignore[misc]


def test_without_torch_the_layout_works_and_the_rest_says_what_it_needs() -> None:
    run_python(
        """
        import qknorm_tvm.tensor_parallel as tp
        assert tp.HeadLayout(8, 2, 4, 4, 3).k_slice == slice(4, 8)
        assert "TensorParallelQKNorm" in dir(tp)
        for name in ("qk_rms_norm", "reduce_row_mean_of_squares", "TensorParallelQKNorm"):
            try:
                getattr(tp, name)
            except ImportError as error:
                assert f"tensor_parallel.{name} needs torch" in str(error), error
            else:
                raise AssertionError(name)
        """
    )


def test_importing_the_package_does_not_import_torch() -> None:
    """Torch takes seconds to import, and somebody who exports modules does not need it."""
    code = "import sys, qknorm_tvm, qknorm_tvm.tensor_parallel; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
