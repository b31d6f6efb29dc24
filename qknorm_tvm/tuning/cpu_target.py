"""Tuning for x86-64: the space, and candidates built exactly as the product builds its code."""

from __future__ import annotations

import dataclasses
import hashlib
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import tvm

from ..build.configs import MOST_TASK_BYTES, cpu_record_config, cpu_workload
from ..build.cpu import cpu_features, generate, variants_of
from ..build.native import Level, Variant, compile_entry, link, tables
from ..schedules import cpu as llvm
from ..schedules.cpu_config import ROUNDINGS, SCHEDULE_VERSION, CpuConfig, default_config
from ..spec import KernelSpec
from .target import Built, encode

if TYPE_CHECKING:
    from .measure import Bench


class CpuTarget:
    """An x86-64 level, or a CPU by LLVM's name; see `tuning.target.TunableTarget`.

    Parameters
    ----------
    text : str
        Such as ``"x86-64-v4"``.
    threads : int, optional
        Threads of the measured calls; None when unknown.
    """

    words: Mapping[str, Sequence[str]] = {"rounding": ROUNDINGS}
    schedule_version = SCHEDULE_VERSION

    def __init__(self, text: str, threads: int | None = None):
        self.text = text
        self.threads = threads
        self.features = cpu_features(text)

    def tvm_target(self) -> tvm.target.Target:
        """Return TVM's target, which goes into records; MetaSchedule insists on ``num-cores``."""
        fields = {"kind": "llvm", "mtriple": "x86_64-linux-gnu", "mcpu": self.text}
        return tvm.target.Target({**fields, "num-cores": self.threads or 1})

    def workload(self, spec: KernelSpec, rows: int) -> tvm.IRModule:
        """Return the declared function, specialised to a row count."""
        return cpu_workload(spec, rows)

    def default(self, spec: KernelSpec, rows: int) -> CpuConfig:
        """Return the heuristic's config, which is one for all row counts."""
        return default_config(spec, frozenset(self.features))

    def config(self, fields: Mapping[str, Any]) -> CpuConfig:
        """Build a config from its fields."""
        return CpuConfig.from_dict(dict(fields))

    def choices(self, spec: KernelSpec, rows: int) -> dict[str, list[int]]:
        """Return the values of each field worth trying.

        A field that changes nothing at this row count keeps the default's value alone.
        """
        base = self.default(spec, rows)
        assert spec.q_cols is not None
        assert spec.k_cols is not None
        if not spec.operation.normalises:
            # The order of summation leaves nothing else to choose.
            fixed = {name: [value] for name, value in encode(self, base).items()}
            return {**fixed, "bytes_per_task": self._task_sizes(spec, rows, base.bytes_per_task)}
        widths = {base.vector * factor // 2 for factor in (1, 2, 4, 8)} | {base.vector}
        # A vector wider than the columns is never filled.
        widest = max(8, base.vector, spec.q_cols, spec.k_cols)
        tiles = [tile for tile in (1, 2, 4, 8, 16) if tile <= rows]
        if base.row_tile > rows:
            tiles = [base.row_tile, *(tile for tile in tiles if tile > 1)]
        roundings = range(len(ROUNDINGS)) if spec.out_dtype == "bfloat16" else [
            ROUNDINGS.index(base.rounding)
        ]  # fmt: skip
        out_bytes = rows * (spec.q_cols + spec.k_cols) * spec.out_bytes
        # Stores past the caches below the threshold look fast here, and make the next operation
        # wait for memory: only whether to stream above it is for a measurement to say.
        streams = 0 < base.streaming_bytes <= out_bytes
        return {
            "vector": sorted(width for width in widths if 8 <= width <= min(128, widest)),
            "row_tile": sorted(tiles),
            "rounding": list(roundings),
            "bytes_per_task": self._task_sizes(spec, rows, base.bytes_per_task),
            "streaming_bytes": [0, base.streaming_bytes] if streams else [base.streaming_bytes],
        }

    def _task_sizes(self, spec: KernelSpec, rows: int, default: int) -> list[int]:
        """Return sizes that cut a call into different numbers of tasks, the default's included.

        None is larger than what a build takes from a record: that would never be used.
        """
        threads = self.threads or 64
        if threads == 1:
            return [default]
        assert spec.q_cols is not None
        assert spec.k_cols is not None
        out_bytes = spec.out_bytes if spec.operation.normalises else 0
        total = rows * (spec.q_cols + spec.k_cols) * (spec.in_bytes + out_bytes)
        by_tasks: dict[int, int] = {}
        for size in (default, *(1 << shift for shift in range(14, MOST_TASK_BYTES.bit_length()))):
            tasks = total // size
            # As entry.c cuts a call.
            count = 1 if tasks <= 1 else tasks if tasks < threads else (
                threads if tasks < 2 * threads else 2 * threads
            )  # fmt: skip
            by_tasks.setdefault(count, size)
        return sorted(by_tasks.values())

    def sample(self, sch: Any, choices: Mapping[str, Sequence[int]], decisions: Any = None) -> None:
        """Apply the product's schedule with fields that MetaSchedule samples."""
        llvm.sample(sch, choices, decisions)

    def served(self, config: CpuConfig) -> CpuConfig:
        """Return the config that a build makes of a record's."""
        return cpu_record_config(config.to_dict())

    def build(self, spec: KernelSpec, rows: int, config: CpuConfig, directory: Path) -> Built:
        """Build the product's entry point with the functions that `rows` packed rows need."""
        spec = spec.replace(target=self.text)
        variants = _needed(variants_of(spec, config, "candidate"), spec, rows)
        obj = directory / "candidate.o"
        generate(self.text, [(spec, config, variant) for variant in variants]).write_to_file(
            str(obj), "o"
        )
        level = Level(self.text, self.features, (tuple(variants),))
        table = tables([spec], [level], {"kind": "cpu"}, cuda=False)
        out = directory / "candidate.so"
        link([*_native_objects(directory, table), obj], out)
        largest = max(variant.row_tile for variant in variants)
        checks = {4 * largest, 4 * largest + 1 if len(variants) > 1 else largest}
        return Built(str(out), tuple(sorted(checks)))

    def bench(self, spec: KernelSpec, rows: int, session: Any = None) -> Bench:
        """Return what measures candidates."""
        from .measure import Bench

        return Bench(spec.replace(target=self.text), rows, session)


def _needed(variants: Sequence[Variant], spec: KernelSpec, rows: int) -> list[Variant]:
    """Return the variants that the entry point picks for packed rows, first choice first."""
    assert spec.q_cols is not None
    assert spec.k_cols is not None
    cols = (spec.q_cols, spec.k_cols)
    out_bytes = rows * sum(cols) * spec.out_bytes
    needed: list[Variant] = []
    while rows:
        for variant in variants:
            aligned = all(col % variant.stride_unit == 0 for col in cols)
            if rows >= variant.min_rows and out_bytes >= variant.min_out_bytes and aligned:
                break
        if variant.min_out_bytes:
            # A check of exactness has few rows; past the caches all the same.
            variant = dataclasses.replace(variant, min_out_bytes=1)
        needed.append(variant)
        rows %= variant.row_tile
    return needed


def _native_objects(directory: Path, table: str) -> list[Path]:
    """Compile the entry point and the thread pool, or take those of an equal candidate.

    Many candidates of a session differ in generated code alone, and compiling C takes a third of
    their time.
    """
    name = hashlib.sha256(table.encode()).hexdigest()[:16]
    kept = [directory.parent / f"{name}-{part}.o" for part in ("entry", "pool")]
    if not all(path.exists() for path in kept):
        # Two workers may come here at once: each puts whole files in place.
        for made, path in zip(compile_entry(directory, table, pool=True), kept, strict=True):
            os.replace(made, path)
    return kept
