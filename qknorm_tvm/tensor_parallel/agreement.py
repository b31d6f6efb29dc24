"""What the ranks of a call must agree on, and how they find out together before it is too late.

A rank that raises while the others enter a collective leaves them waiting. So under
``validate=True`` every rank first tells the others, in one message of fixed size, what it was
called with, or that its arguments are wrong; then all raise the same error or none does.
"""

from __future__ import annotations

import dataclasses
import fractions
import json
from collections.abc import Sequence

import torch
import torch.distributed as dist

from .process_group import Members

#: Bytes of one rank's message, of a fixed size so that one collective is enough.
MESSAGE_BYTES = 2048
#: Characters of an error that travel: ASCII, which JSON writes in six bytes each at most.
_ERROR_CHARACTERS = 250


@dataclasses.dataclass(frozen=True)
class Facts:
    """What one rank was called with; of its error, if it has one, only the text.

    `rows` to `cast_before_gamma` must be the same on every rank; columns must add up. `weighted`
    says that the ranks' statistics are weighted by given column totals, and not all alike.
    """

    rows: int = 0
    dtype: str = ""
    out_dtype: str = ""
    epsilon: str = ""
    statistics: str = ""
    weighted: bool = False
    q_cols_total: int | None = None
    k_cols_total: int | None = None
    cast_before_gamma: bool = False
    q_cols: int = 0
    k_cols: int = 0
    k_replicas: int = 1
    error: str = ""


_SAME = (
    ("rows", "rows of q and k"),
    ("dtype", "dtype of q and k"),
    ("out_dtype", "dtype of the outputs"),
    ("epsilon", "epsilon"),
    ("statistics", "statistics"),
    ("cast_before_gamma", "cast_before_gamma"),
    ("weighted", "weighting by column totals"),
    ("q_cols_total", "q_cols_total"),
    ("k_cols_total", "k_cols_total"),
)


def error_facts(error: Exception) -> Facts:
    """Return what a rank with an error tells the others."""
    text = f"{type(error).__name__}: {error}".encode("ascii", "backslashreplace").decode("ascii")
    if len(text) > _ERROR_CHARACTERS:
        text = text[: _ERROR_CHARACTERS - 3] + "..."
    return Facts(error=text)


def disagreement(ranks: Sequence[Facts]) -> str | None:
    """Return what is wrong among the ranks, in the same words on each, or None."""
    failed = [f"on rank {rank}: {facts.error}" for rank, facts in enumerate(ranks) if facts.error]
    if failed:
        return f"arguments must be right on every rank, got {'; '.join(failed)}"
    for field, name in _SAME:
        values = [getattr(facts, field) for facts in ranks]
        if any(value != values[0] for value in values):
            return f"{name} must be the same on every rank, got {_by_rank(values)}"
    return _columns("q", ranks) or _columns("k", ranks)


def _columns(which: str, ranks: Sequence[Facts]) -> str | None:
    columns = [getattr(facts, f"{which}_cols") for facts in ranks]
    total = getattr(ranks[0], f"{which}_cols_total")
    if total is None:
        if len(set(columns)) > 1:
            return (
                f"columns of {which} must be the same on every rank where {which}_cols_total is "
                f"not given, got {_by_rank(columns)}"
            )
        return None
    replicas = [facts.k_replicas if which == "k" else 1 for facts in ranks]
    found = sum(map(fractions.Fraction, columns, replicas))
    if found == total:
        return None
    shares = [
        f"{columns}" if replicas == 1 else f"{columns} / {replicas} replicas"
        for columns, replicas in zip(columns, replicas, strict=True)
    ]
    return (
        f"columns of {which} must add up to {which}_cols_total ({total}), "
        f"got {found} in all: {_by_rank(shares)}"
    )


def _by_rank(values: Sequence[object]) -> str:
    """Say which ranks have which value: ``4 on ranks 0, 2; 5 on rank 1``."""
    ranks: dict[object, list[str]] = {}
    for rank, value in enumerate(values):
        ranks.setdefault(value, []).append(str(rank))
    return "; ".join(
        f"{value} on rank{'s' if len(having) > 1 else ''} {', '.join(having)}"
        for value, having in ranks.items()
    )


def exchange(facts: Facts, members: Members) -> list[Facts]:
    """Return the facts of every rank, in one all-gather."""
    device = members.exchange_device()
    text = json.dumps(dataclasses.asdict(facts)).encode("ascii").ljust(MESSAGE_BYTES)
    assert len(text) == MESSAGE_BYTES, "facts are larger than the message"
    mine = torch.frombuffer(bytearray(text), dtype=torch.uint8).to(device)
    theirs = [torch.empty_like(mine) for _ in range(members.world_size)]
    dist.all_gather(theirs, mine, group=members.group)
    return [Facts(**json.loads(bytes(message.tolist()))) for message in theirs]
