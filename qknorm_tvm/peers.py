"""The memory through which ranks exchange sums: a layout that kernels and workspaces share.

Every rank has *slots*, float32 ``[SETS, max_rows, 2, MAX_RANKS]``, to which the other ranks write:
the sum of squares of a row of Q (0) and of K (1) of each rank; and a *state*, int64
``[TURNS + max_rows]``, that only its own launches write: words that all rows share, then each
row's turn. However few ranks there are, a row's slots are a line of the GPU's cache, 128 bytes, so
that rows do not wait for one another. Imports nothing.
"""

from __future__ import annotations

#: Most ranks of an exchange.
MAX_RANKS = 16
#: Sets of slots, which a row's launches use in turn.
SETS = 3
#: What an empty slot holds: float32 -0.0, which no sum of squares is.
EMPTY = 0x80000000
#: Words of the state: nanoseconds after which a launch gives up, 0 for never; who was waited for
#: and in which row when one did (`failure_of`), else 0; the address in host memory to which that is
#: written too; and where the turns begin.
TIMEOUT, FAILURE, REPORT, TURNS = 0, 1, 2, 3


def slot_count(max_rows: int) -> int:
    """Return how many slots a rank has."""
    return SETS * max_rows * 2 * MAX_RANKS


def failure_of(word: int) -> tuple[int, int]:
    """Return the rank and the row of a failure."""
    return (word >> 32) - 1, word & 0xFFFFFFFF
