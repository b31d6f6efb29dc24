"""The CUDA schedules with fields that MetaSchedule samples. Imports no TVM until it is used."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from .cuda_config import DEPENDENT_LAUNCHES, GRID_ORDERS, NOTE

if TYPE_CHECKING:
    from tvm.s_tir import Schedule

    from .cuda_config import CudaConfig

#: Raised when a schedule, its lowering or the declaration changes so much that times measured
#: before say nothing: tuned records of another version are not used.
SCHEDULE_VERSION = 1

#: Fields that are no numbers: MetaSchedule samples the index of a value.
WORDS: dict[str, Sequence[Any]] = {
    "dependent_launch": DEPENDENT_LAUNCHES,
    "grid_order": GRID_ORDERS,
    "streaming_stores": (False, True),
}
#: Fields on which the shape of the loops depends. A trace would freeze what Python decides from
#: them, so each of their combinations is a design space of its own. Where rows are added up or
#: rotated there are none: `cuda_row` makes the kernel of the config, not of the trace.
STRUCTURAL: tuple[str, ...] = ("vector", "columns", "rows")


class _Fields:
    """A config whose fields may be MetaSchedule's random variables."""

    def __init__(self, fields: Mapping[str, Any]):
        self._fields = dict(fields)

    def __getattr__(self, name: str) -> Any:
        return self._fields[name]

    def to_dict(self) -> dict[str, Any]:
        return self._fields


def sample(
    sch: Schedule,
    choices: Mapping[str, Sequence[int]],
    decisions: Mapping[str, int] | None = None,
) -> list[Schedule]:
    """Schedule with sampled fields; what follows the primitives is left to the build.

    Parameters
    ----------
    sch : Schedule
        Of a specialised instance of the declared function.
    choices : mapping
        Values by field of `CudaConfig`; those of `WORDS` as an index.
    decisions : mapping, optional
        The value to take for each field; by default MetaSchedule draws them.

    Returns
    -------
    list of Schedule
        One for each combination of the structural fields. Every field is annotated as
        ``qknorm.<field>``, so that a record's trace says the whole config.
    """
    from . import cuda

    blocks = _block_names(sch)
    schedule_body, structural = cuda.schedule_body, STRUCTURAL
    if "heads_q" in blocks or "square_x32_q" in blocks:
        schedule_body, structural = _note, ()
    fixed = [
        choices[name] if decisions is None else [decisions[name]] for name in structural
    ]  # fmt: skip
    spaces = []
    for values in itertools.product(*fixed):
        space = sch.copy()
        fields: dict[str, Any] = dict(zip(structural, values, strict=True))
        for name, options in choices.items():
            if name not in structural:
                fields[name] = space.sample_categorical(
                    list(options),
                    [1 / len(options)] * len(options),
                    None if decisions is None else list(options).index(decisions[name]),
                )
        schedule_body(space, _Fields(fields))  # type: ignore[arg-type]
        spaces.append(space)
    return spaces


def _note(sch: Schedule, config: CudaConfig) -> None:
    """Note a config on a loop over rows, so that a trace says it."""
    blocks = _block_names(sch)
    (name,) = [name for name in ("q_out", "heads_q", "mean") if name in blocks]
    row = sch.get_loops(sch.get_sblock(name))[0]
    for field, value in config.to_dict().items():
        sch.annotate(row, NOTE + field, value)


def _block_names(sch: Schedule) -> set[str]:
    import tvm_ffi
    from tvm.s_tir import SBlock

    blocks: list[SBlock] = []
    tvm_ffi.structural_walk(sch.mod["main"].body, (SBlock, blocks.append))
    return {str(block.name_hint) for block in blocks}
