"""What ranks that were called differently are told; the exchange itself is in test_many_ranks."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import pytest

pytest.importorskip("torch", reason="torch is not installed")

from qknorm_tvm.tensor_parallel.agreement import MESSAGE_BYTES, Facts, disagreement, error_facts

pytestmark = pytest.mark.frameworks
GOOD = Facts(
    rows=4,
    dtype="bfloat16",
    out_dtype="bfloat16",
    epsilon="1e-06",
    statistics="fused",
    q_cols=32,
    k_cols=8,
)


def ranks(*changes: dict[str, Any], **of_all: Any) -> list[Facts]:
    return [dataclasses.replace(GOOD, **{**of_all, **one}) for one in changes]


def test_ranks_that_agree() -> None:
    assert disagreement(ranks({}, {}, {})) is None
    assert disagreement(ranks({"q_cols": 32}, {"q_cols": 64}, q_cols_total=96)) is None


@pytest.mark.parametrize(
    ("facts", "message"),
    [
        (
            ranks({}, {"rows": 5}, {}),
            "rows of q and k must be the same on every rank, got 4 on ranks 0, 2; 5 on rank 1",
        ),
        (
            ranks({"dtype": "float16"}, {}),
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
            ranks({"weighted": True}, {}),
            "weighting by column totals must be the same on every rank, got True on rank 0; "
            "False on rank 1",
        ),
        (
            ranks({}, {"k_cols": 16}),
            "columns of k must be the same on every rank where k_cols_total is not given, got "
            "8 on rank 0; 16 on rank 1",
        ),
        (
            ranks({}, {"q_cols": 16}, q_cols_total=64),
            "columns of q must add up to q_cols_total (64), got 48 in all: 32 on rank 0; "
            "16 on rank 1",
        ),
        (
            ranks({"k_replicas": 2}, {"k_replicas": 2}, {}, k_cols_total=8),
            "columns of k must add up to k_cols_total (8), got 16 in all: "
            "8 / 2 replicas on ranks 0, 1; 8 on rank 2",
        ),
        (
            [GOOD, error_facts(TypeError("k must be float32 like q, got float64"))],
            "arguments must be right on every rank, got on rank 1: TypeError: k must be float32 "
            "like q, got float64",
        ),
    ],
)
def test_ranks_that_do_not(facts: list[Facts], message: str) -> None:
    assert disagreement(facts) == message


def test_replicas_may_differ_from_rank_to_rank() -> None:
    """Two KV heads on three ranks: one of them twice."""
    facts = ranks({"k_replicas": 2}, {"k_replicas": 2}, {}, k_cols_total=16)
    assert disagreement(facts) is None


@pytest.mark.parametrize("text", ["x" * 5000, "\0" * 5000, "\U0001f600" * 5000])
def test_any_error_fits_the_message(text: str) -> None:
    """A message that grew past its size would be cut, or leave the other ranks waiting."""
    facts = dataclasses.replace(
        error_facts(ValueError(text)), rows=2**63, q_cols_total=2**63, epsilon=repr(-5e-324)
    )
    assert len(json.dumps(dataclasses.asdict(facts))) <= MESSAGE_BYTES
