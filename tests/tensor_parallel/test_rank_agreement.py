"""What ranks that were called differently are told; the exchange itself is in test_many_ranks."""

from __future__ import annotations

from typing import Any

import pytest

pytest.importorskip("torch", reason="torch is not installed")

from qknorm_tvm.tensor_parallel.group import Report, disagreement

pytestmark = pytest.mark.frameworks
ALIKE = {
    "rows of q and k": 4,
    "dtype of q and k": "bfloat16",
    "epsilon": "1e-06",
    "statistics": "fused",
    "weighting by column totals": False,
    "q_cols_total": None,
    "k_cols_total": None,
}
#: This rank's columns, and how many ranks hold them.
COLUMNS = {"q": (32, 1), "k": (8, 1)}


def ranks(*changes: dict[str, Any], **of_all: Any) -> list[Report]:
    """Return what ranks tell: of each what is different there, of all what is for all."""
    told = [{**ALIKE, **COLUMNS, **of_all, **change} for change in changes]
    return [
        Report({name: facts[name] for name in ALIKE}, {name: facts[name] for name in COLUMNS})
        for facts in told
    ]


def test_ranks_that_agree() -> None:
    assert disagreement(ranks({}, {}, {})) is None
    assert disagreement(ranks({"q": (32, 1)}, {"q": (64, 1)}, q_cols_total=96)) is None


@pytest.mark.parametrize(
    ("facts", "message"),
    [
        (
            ranks({}, {"rows of q and k": 5}, {}),
            "rows of q and k must be the same on every rank, got 4 on ranks 0, 2; 5 on rank 1",
        ),
        (
            ranks({"dtype of q and k": "float16"}, {}),
            "dtype of q and k must be the same on every rank, got float16 on rank 0; "
            "bfloat16 on rank 1",
        ),
        (
            ranks({}, {"epsilon": "1e-05"}),
            "epsilon must be the same on every rank, got 1e-06 on rank 0; 1e-05 on rank 1",
        ),
        (
            ranks({}, {"statistics": "torch"}),
            "statistics must be the same on every rank, got fused on rank 0; torch on rank 1",
        ),
        (
            ranks({"weighting by column totals": True}, {}),
            "weighting by column totals must be the same on every rank, got True on rank 0; "
            "False on rank 1",
        ),
        (
            ranks({}, {"k": (16, 1)}),
            "columns of k must be the same on every rank where k_cols_total is not given, got "
            "8 on rank 0; 16 on rank 1",
        ),
        (
            ranks({}, {"q": (16, 1)}, q_cols_total=64),
            "columns of q must add up to q_cols_total (64), got 48 in all: 32 on rank 0; "
            "16 on rank 1",
        ),
        (
            ranks({"k": (8, 2)}, {"k": (8, 2)}, {}, k_cols_total=8),
            "columns of k must add up to k_cols_total (8), got 16 in all: "
            "8 / 2 replicas on ranks 0, 1; 8 on rank 2",
        ),
        (
            [*ranks({}), Report(error="TypeError: k must be float32 like q, got float64")],
            "arguments must be right on every rank, got on rank 1: TypeError: k must be float32 "
            "like q, got float64",
        ),
    ],
)
def test_ranks_that_do_not(facts: list[Report], message: str) -> None:
    assert disagreement(facts) == message


def test_replicas_may_differ_from_rank_to_rank() -> None:
    """Two KV heads on three ranks: one of them twice."""
    facts = ranks({"k": (8, 2)}, {"k": (8, 2)}, {}, k_cols_total=16)
    assert disagreement(facts) is None
