"""What tuning needs to know of a target; `cpu_target` and `cuda_target` implement it."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from ..spec import KernelSpec

if TYPE_CHECKING:
    import tvm
    from tvm.s_tir import Schedule

    from .measure import Bench


@dataclasses.dataclass(frozen=True)
class Device:
    """What candidates are measured on.

    Parameters
    ----------
    folder : str
        Name of its folder of logs, such as ``"x86_64-znver4"``.
    details : mapping
        What provenance says about it, JSON-ready.
    threads : int or None
        Processors that a call may use; None when unknown.
    """

    folder: str
    details: Mapping[str, Any]
    threads: int | None = None


@dataclasses.dataclass(frozen=True)
class Built:
    """A candidate's module.

    Parameters
    ----------
    path : str
        The ``.so``: the product's entry point, with the functions that the row count needs.
    check_rows : tuple of int
        Row counts at which all of its functions run, for the check of exactness.
    """

    path: str
    check_rows: tuple[int, ...]


class TunableTarget(Protocol):
    """A target that can be tuned.

    Attributes
    ----------
    text : str
        The target of the specs that are tuned, such as ``"x86-64-v4"`` or ``"cuda:sm_90"``.
    words : mapping
        The values of the config's fields that are words: MetaSchedule samples their index.
    schedule_version : int
        Version of schedule and lowering; records of another one are not used.
    """

    text: str
    words: Mapping[str, Sequence[Any]]
    schedule_version: int

    def tvm_target(self) -> tvm.target.Target:
        """Return TVM's target, which goes into records."""

    def workload(self, spec: KernelSpec, rows: int) -> tvm.IRModule:
        """Return the declared function, specialised to a row count: static, tensors only."""

    def choices(self, spec: KernelSpec, rows: int) -> dict[str, list[int]]:
        """Return the values of each field worth trying, the default's among them."""

    def sample(
        self, sch: Schedule, choices: Mapping[str, Sequence[int]], decisions: Any = None
    ) -> Sequence[Schedule] | None:
        """Apply the product's schedule with fields that MetaSchedule samples.

        In place, or in copies that it returns where some fields decide the structure.
        """

    def default(self, spec: KernelSpec, rows: int) -> Any:
        """Return the heuristic's config."""

    def config(self, fields: Mapping[str, Any]) -> Any:
        """Build a config from its fields; wrong ones are a TypeError or ValueError."""

    def served(self, config: Any) -> Any:
        """Return the config that a build makes of a record's."""

    def build(self, spec: KernelSpec, rows: int, config: Any, directory: Path) -> Built:
        """Build a candidate; runs in a worker process."""

    def bench(self, spec: KernelSpec, rows: int, session: Any = None) -> Bench:
        """Return what measures candidates, here or in a session of TVM's RPC."""


def encode(target: TunableTarget, config: Any) -> dict[str, int]:
    """Return a config's fields as MetaSchedule samples them: words as their index."""
    return {
        name: target.words[name].index(value) if name in target.words else int(value)
        for name, value in config.to_dict().items()
    }


def decode(target: TunableTarget, fields: Mapping[str, int]) -> Any:
    """Return the config of sampled fields.

    Raises
    ------
    TypeError, ValueError
        A field is unknown, missing or out of range.
    """
    named = {
        name: target.words[name][value] if name in target.words else value
        for name, value in fields.items()
    }
    config = target.config(named)
    missing = set(config.to_dict()) - set(named)
    if missing:
        raise ValueError(f"a record must name every field, {', '.join(sorted(missing))} missing")
    return config
