"""Which config a spec's code gets, by number of rows: the one door for all three sources.

A user's override holds for all rows. Otherwise tuned records hold from the row counts for which
they were measured, and the heuristic's config everywhere else.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from ..declare.workload import declared, specialise, workload_hash
from ..schedules import cpu_config, cuda_sampling
from ..schedules.cuda_config import CudaConfig, CudaVariant
from ..schedules.cuda_variants import changed_variants, default_variants
from ..spec import KernelSpec
from .tuned import cpu_device, cuda_device, tuned

#: Makes a config of a record's fields.
Decode = Callable[[Mapping[str, Any]], Any]
#: A kernel, the source of its config as in `Bucket`, and for a record where it comes from.
ChosenVariant = tuple[CudaVariant, str, Mapping[str, Any] | None]


@dataclasses.dataclass(frozen=True)
class Bucket:
    """A config, and from how many rows on it is used.

    Parameters
    ----------
    min_rows : int
        Rows from which it is used, up to the next bucket's.
    config : CpuConfig or CudaConfig
        Choices of the schedule.
    source : str
        ``"heuristic"``, ``"record"`` or ``"user"``.
    record : mapping, optional
        For a record, where it comes from: device, rows measured, date, gain.
    """

    min_rows: int
    config: Any
    source: str
    record: Mapping[str, Any] | None = None

    def describe(self) -> dict[str, Any]:
        """Return what a module's metadata says about the bucket, JSON-ready."""
        about: dict[str, Any] = {"min_rows": self.min_rows, "source": self.source}
        if self.record is not None:
            about["record"] = dict(self.record)
        return {**about, "config": self.config.to_dict()}


#: Most bytes of a task that a record may ask for.
MOST_TASK_BYTES = 1 << 18


def bucket_starts(rows: Sequence[int]) -> dict[int, int]:
    """Return, for each measured row count, the smallest number of rows that uses its outcome.

    The border between two measured counts is their geometric mean. The outcome of the smallest
    count is used for all smaller ones too.
    """
    ordered = sorted(set(rows))
    starts = {ordered[0]: 1} if ordered else {}
    for low, high in itertools.pairwise(ordered):
        starts[high] = max(low + 1, round((low * high) ** 0.5))
    return starts


def bucket_ends(rows: int, measured: Sequence[int]) -> tuple[int, int]:
    """Return the smallest and the largest number of rows that use a measured row count's outcome.

    The bucket of the largest count has no end; twice that count is returned for it.
    """
    starts = bucket_starts([*measured, rows])
    later = [start for start in starts.values() if start > starts[rows]]
    return starts[rows], min(later) - 1 if later else 2 * rows


def merge(buckets: Sequence[Bucket]) -> list[Bucket]:
    """Return buckets by descending `min_rows`; neighbours with equal configs become one."""
    merged: list[Bucket] = []
    for bucket in sorted(buckets, key=lambda bucket: bucket.min_rows):
        if merged and (merged[-1].config, merged[-1].source) == (bucket.config, bucket.source):
            continue
        merged.append(bucket)
    return merged[::-1]


def cpu_buckets(spec: KernelSpec, cpu: str, given: Any, default: Any) -> list[Bucket]:
    """Choose the configs of a spec's code for one CPU level.

    Parameters
    ----------
    spec : KernelSpec
    cpu : str
        Level or CPU for which code is generated.
    given : CpuConfig, mapping or None
        The user's: a whole config, or the fields that are to differ from the heuristic's.
    default : CpuConfig
        The heuristic's.

    Returns
    -------
    list of Bucket
        The one for the most rows first; the last is for any number of rows.
    """
    if isinstance(given, Mapping):
        given = dataclasses.replace(default, **given)
    if given is not None:
        return [Bucket(1, given, "user")]
    outcomes = {}
    if spec.q_cols is not None and spec.k_cols is not None:
        outcomes = tuned(
            spec,
            cpu,
            cpu_device(cpu),
            schedule_version=cpu_config.SCHEDULE_VERSION,
            default=lambda rows: default,
            workload=lambda rows: workload_hash(cpu_workload(spec, rows)),
        )
    return from_outcomes(outcomes, cpu_record_config, lambda rows: default)


def cpu_workload(spec: KernelSpec, rows: int) -> Any:
    """Return the declared function that is tuned for CPUs, specialised to a row count."""
    return specialise(declared(spec), rows)


def cuda_workload(spec: KernelSpec, rows: int) -> Any:
    """Return the declared function that is tuned for GPUs, with the widest alignment."""
    first = default_variants(spec)[0]
    func = declared(spec, stride_unit=first.stride_unit, alignment=first.alignment)
    return specialise(func, rows, stride_unit=first.stride_unit)


def cuda_default(spec: KernelSpec, rows: int) -> CudaConfig:
    """Return the heuristic's config for a row count on a GPU."""
    return next(variant.config for variant in default_variants(spec) if rows >= variant.min_rows)


def cpu_record_config(record: Mapping[str, Any]) -> cpu_config.CpuConfig:
    """Return a record's config, with at most `MOST_TASK_BYTES` a task.

    The record serves calls of fewer rows than it was measured with, and larger tasks are too few
    there for all threads: 1536/256 at M = 256, two threads, took 40 µs instead of 21 with the
    record of M = 512.
    """
    config = cpu_config.CpuConfig.from_dict(dict(record))
    size = min(config.bytes_per_task, MOST_TASK_BYTES)
    return dataclasses.replace(config, bytes_per_task=size)


def _from_record(start: int, rows: int, outcome: Any, device: str, decode: Decode) -> Bucket:
    """Return the bucket of a record that was measured at `rows` and is used from `start` on."""
    about = {
        "device": device,
        "rows": rows,
        "date": outcome.date,
        "gain": round(outcome.gain["median"], 3),
    }
    return Bucket(start, decode(outcome.config), "record", about)


def from_outcomes(outcomes: Mapping[int, Any], decode: Decode, default: Any) -> list[Bucket]:
    """Return the buckets of tuned outcomes, and of the heuristic where there are none."""
    buckets = []
    for rows, start in bucket_starts(list(outcomes)).items():
        outcome, device = outcomes[rows]
        if outcome.source != "record":
            buckets.append(Bucket(start, default(rows), "heuristic"))
            continue
        buckets.append(_from_record(start, rows, outcome, device, decode))
    return merge(buckets) or [Bucket(1, default(1), "heuristic")]


def cuda_buckets(spec: KernelSpec, given: Any) -> list[ChosenVariant]:
    """Choose the kernels of a spec for CUDA, in the order in which the entry point tries them.

    Tuned records hold for the layouts that the heuristic's aligned kernels are for, and only where
    the target is the one architecture that was tuned.

    Parameters
    ----------
    spec : KernelSpec
    given : CudaConfig, mapping or None
        The user's: a whole config, or the fields that are to differ from the heuristic's.

    Returns
    -------
    list of (CudaVariant, source, record)
        The last takes any number of rows and any layout.
    """
    if isinstance(given, Mapping):
        return [(variant, "user", None) for variant in changed_variants(spec, given)]
    variants = default_variants(spec, given)
    if given is not None:
        return [(v, "user" if v.config == given else "heuristic", None) for v in variants]
    has_fixed_columns = spec.q_cols is not None and spec.k_cols is not None
    is_for_one_gpu = len(spec.parsed_target.variants) == 1
    outcomes = tuned(
        spec,
        spec.target,
        cuda_device(spec) if has_fixed_columns and is_for_one_gpu else None,
        schedule_version=cuda_sampling.SCHEDULE_VERSION,
        default=lambda rows: cuda_default(spec, rows),
        workload=lambda rows: workload_hash(cuda_workload(spec, rows)),
    )
    if not any(outcome.source == "record" for outcome, _ in outcomes.values()):
        return [(variant, "heuristic", None) for variant in variants]
    # Columns that allow no aligned kernels are tuned with the others.
    aligned = [v for v in variants if v.alignment is not None] or variants
    unaligned = [v for v in variants if v not in aligned]
    # Borders are the records' and the heuristic's own: between records that keeps its choices.
    rows_at = {start: rows for rows, start in bucket_starts(list(outcomes)).items()}
    buckets = []
    for border in sorted({*rows_at, *(v.min_rows for v in aligned)}):
        rows = rows_at[max(start for start in rows_at if start <= border)]
        outcome, device = outcomes[rows]
        if outcome.source == "record":
            buckets.append(_from_record(border, rows, outcome, device, _cuda_record_config))
        else:
            buckets.append(Bucket(border, cuda_default(spec, border), "heuristic"))
    chosen: list[ChosenVariant] = []
    for bucket in merge(buckets):
        name, min_rows = f"rows_{bucket.min_rows}", bucket.min_rows
        variant = dataclasses.replace(
            aligned[0], name=name, config=bucket.config, min_rows=min_rows
        )
        chosen.append((variant, bucket.source, bucket.record))
    return [*chosen, *((variant, "heuristic", None) for variant in unaligned)]


def _cuda_record_config(record: Mapping[str, Any]) -> CudaConfig:
    return CudaConfig.from_dict(dict(record))
