"""The exchange between ranks as a model, all of whose orders are searched; needs no GPU.

Two models. `Slots`: who writes, empties and reads which slot when (`schedules.cuda_peers`).
`Blocks`: which blocks are resident on a GPU, and which launches may start. A search that ends
without an error has seen every order of steps of a case; mistakes that are put in must be found.
``-rP`` shows the counts.
"""

from __future__ import annotations

import dataclasses
from collections import deque
from collections.abc import Callable, Hashable, Iterable

import pytest

from qknorm_tvm.peers import SETS

State = Hashable
EMPTY = -1


class Wrong(Exception):
    """A step that no correct protocol takes."""


@dataclasses.dataclass
class Outcome:
    """What a search has seen."""

    states: int
    wrong: str = ""


def search(start: State, steps: Callable[[State], Iterable[State]], ended: Callable[[State], bool]):
    """Visit every state that can be reached; stop at a wrong step, or where none is possible."""
    seen, queue = {start}, deque([start])
    while queue:
        state = queue.popleft()
        try:
            following = list(steps(state))
        except Wrong as error:
            return Outcome(len(seen), str(error))
        if not following and not ended(state):
            return Outcome(len(seen), "hangs")
        for successor in following:
            if successor not in seen:
                seen.add(successor)
                queue.append(successor)
    return Outcome(len(seen))


# ---- slots -------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Slots:
    """Ranks that make the same launches, of `rows` rows each, through sets of slots.

    A rank's state: its launch, and of each row of it how many ranks it has written to, whether it
    has emptied, and whether it has read. Writes to ranks arrive one by one.
    """

    ranks: int
    rows: tuple[int, ...]
    sets: int = SETS
    emptied: int = SETS - 1  # a launch of set e empties set e + this
    turn_of: str = "row"

    def turn(self, launch: int, row: int) -> int:
        """Return the set that a launch uses for a row."""
        if self.turn_of == "launch":
            return launch % self.sets
        if self.turn_of == "graph":  # replays of three launches and one more
            return launch % 4 % self.sets
        return sum(rows > row for rows in self.rows[:launch]) % self.sets

    def search(self) -> Outcome:
        most = max(self.rows)
        slot = (EMPTY,) * self.ranks
        slots = ((((slot,) * most),) * self.sets,) * self.ranks
        rank = (0, ((0, False, False),) * self.rows[0])
        return search(
            ((rank,) * self.ranks, slots), self.steps,
            lambda state: all(launch == len(self.rows) for launch, _ in state[0]),
        )  # fmt: skip

    def steps(self, state):
        ranks, slots = state
        for r, (launch, rows) in enumerate(ranks):
            if launch == len(self.rows):
                continue
            if all(emptied and read for _, emptied, read in rows):
                rows_next = self.rows[launch + 1] if launch + 1 < len(self.rows) else 0
                yield _replace(ranks, r, (launch + 1, ((0, False, False),) * rows_next)), slots
                continue
            for row, (written, emptied, read) in enumerate(rows):
                turn = self.turn(launch, row)
                own = slots[r][turn][row]

                def now(*progress, r=r, launch=launch, rows=rows, row=row):
                    return _replace(ranks, r, (launch, _replace(rows, row, progress)))

                if written < self.ranks:
                    if slots[written][turn][row][r] != EMPTY:
                        raise Wrong(
                            f"rank {r} writes to a slot of rank {written} that is not empty"
                        )
                    yield (
                        now(written + 1, emptied, read),
                        _put(slots, (written, turn, row, r), launch),
                    )
                if not emptied:
                    before = (turn + self.emptied) % self.sets
                    empty = _replace(slots[r][before], row, (EMPTY,) * self.ranks)
                    yield now(written, True, read), _put(slots, (r, before), empty)
                if not read and written == self.ranks and EMPTY not in own:
                    if any(value != launch for value in own):
                        raise Wrong(f"rank {r} reads {own} in launch {launch}")
                    yield now(written, emptied, True), slots


def _replace(values: tuple, place: int, value: object) -> tuple:
    return (*values[:place], value, *values[place + 1 :])


def _put(values: tuple, places: tuple[int, ...], value: object) -> tuple:
    first, *rest = places
    if rest:
        value = _put(values[first], tuple(rest), value)
    return _replace(values, first, value)


SLOTS = (
    Slots(1, (1,) * 6),
    Slots(2, (1,) * 7),
    Slots(2, (2, 1, 2, 1, 1)),
    Slots(2, (1, 2, 0, 2, 1)),
    Slots(3, (1,) * 5),
)


@pytest.mark.parametrize("case", SLOTS, ids=str)
def test_slots(case: Slots) -> None:
    """A sum that is lost, read in another launch, or written over."""
    result = case.search()
    print(f"{case}: {result.states:,} states")
    assert not result.wrong


@pytest.mark.parametrize(
    ("case", "wrong"),
    [
        # Erases what a faster rank has written.
        (Slots(2, (1,) * 5, emptied=1), "hangs"),
        (Slots(3, (1,) * 4, emptied=1), "hangs"),
        # Two sets: there is none that neither rank uses.
        (Slots(2, (1,) * 5, sets=2, emptied=1), ""),
        # A launch's turn, where rows differ from launch to launch; one that a graph has captured.
        (Slots(2, (2, 1, 1, 2, 1), turn_of="launch"), ""),
        (Slots(2, (1,) * 6, turn_of="graph"), ""),
    ],
    ids=str,
)
def test_mistakes_with_slots_are_found(case: Slots, wrong: str) -> None:
    result = case.search()
    print(f"{case}: {result.wrong!r} after {result.states:,} states")
    assert wrong in result.wrong
    assert result.wrong


# ---- blocks ------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Blocks:
    """Ranks that share one GPU and make `launches` launches of `rows` rows each.

    The GPU holds `resident` blocks at once. A launch has `blocks` blocks; each takes the rows
    ``block``, ``block + blocks``, ... and stops being resident after its last. A row ends when all
    ranks have begun it in that launch. Blocks of a rank's next launch may become resident when all
    blocks of the one before allow it: at once, or after their last row. That launch begins when the
    one before has ended.

    A rank's state: for each of the two launches that may have resident blocks, how many rows each
    block has begun and ended; None for a block that has not been resident yet.
    """

    ranks: int
    launches: int
    rows: int
    blocks: int
    resident: int
    dependents: str = "after_loads"

    def search(self) -> Outcome:
        rank = (0, ((None,) * self.blocks, (None,) * self.blocks))
        return search(
            (rank,) * self.ranks, self.steps,
            lambda state: all(launch == self.launches for launch, _ in state),
        )  # fmt: skip

    def of_block(self, block: int) -> int:
        return len(range(block, self.rows, self.blocks))

    def begun(self, state, rank: int, launch: int, row: int) -> bool:
        at, (now, _) = state[rank]
        if launch != at:
            return launch < at
        progress = now[row % self.blocks]
        return progress is not None and progress[0] > row // self.blocks

    def steps(self, state):
        taken = sum(
            progress is not None and progress[1] < self.of_block(block)
            for _, launches in state
            for launch in launches
            for block, progress in enumerate(launch)
        )
        for r, (launch, (now, following)) in enumerate(state):
            if launch == self.launches:
                continue
            ends = [p is not None and p[1] == self.of_block(b) for b, p in enumerate(now)]
            if all(ends):
                # Rows that begin before the one before has ended would be wrong: see below.
                yield _replace(state, r, (launch + 1, (following, (None,) * self.blocks)))
            for block, progress in enumerate(now):
                count = self.of_block(block)

                def moved(new, r=r, launch=launch, now=now, following=following, block=block):
                    return _replace(state, r, (launch, (_replace(now, block, new), following)))

                if progress is None:
                    if taken < self.resident:
                        yield moved((0, 0))
                    continue
                begun, ended = progress
                if begun == ended and begun < count:
                    yield moved((begun + 1, ended))
                if begun > ended:
                    row = block + ended * self.blocks
                    if all(self.begun(state, other, launch, row) for other in range(self.ranks)):
                        yield moved((begun, ended + 1))
            lets = all(
                progress is not None
                and (self.dependents == "first" or progress[1] == self.of_block(block))
                for block, progress in enumerate(now)
            )
            if lets and launch + 1 < self.launches and taken < self.resident:
                for block, progress in enumerate(following):
                    if progress is None:
                        new = (now, _replace(following, block, (0, 0)))
                        yield _replace(state, r, (launch, new))


BLOCKS = (
    Blocks(1, 3, 3, 2, 2),
    Blocks(2, 3, 2, 2, 4),
    Blocks(2, 3, 4, 2, 4),
    Blocks(2, 2, 3, 3, 6),
    Blocks(3, 2, 2, 1, 3),
    Blocks(3, 2, 2, 2, 6),
)


@pytest.mark.parametrize("case", BLOCKS, ids=str)
def test_blocks(case: Blocks) -> None:
    """Blocks that wait for blocks that are not resident."""
    result = case.search()
    print(f"{case}: {result.states:,} states")
    assert not result.wrong


@pytest.mark.parametrize(
    "case",
    [
        # Dependents that start at once pile up, and keep another rank out.
        Blocks(2, 3, 2, 2, 4, dependents="first"),
        Blocks(2, 2, 1, 1, 2, dependents="first"),
        # More blocks than can be resident at once.
        Blocks(2, 2, 2, 2, 2),
        Blocks(2, 1, 4, 4, 4),
    ],
    ids=str,
)
def test_mistakes_with_blocks_are_found(case: Blocks) -> None:
    result = case.search()
    print(f"{case}: {result.wrong!r} after {result.states:,} states")
    assert result.wrong == "hangs"
