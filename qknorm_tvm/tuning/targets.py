"""Targets that can be tuned: their spaces, and candidates built exactly as the product builds code.

A space is the product's schedule with the fields of its config left to MetaSchedule, each with the
values worth trying; a field that changes nothing at a row count keeps the default's value alone.
"""

from __future__ import annotations

import dataclasses
import importlib.metadata
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import tvm

from ..build.configs import (
    MOST_TASK_BYTES,
    cpu_record_config,
    cpu_workload,
    cuda_default,
    cuda_workload,
)
from ..build.cpu import build as build_cpu
from ..build.cpu import cpu_features
from ..build.cuda import build as build_cuda
from ..dtypes import ELEMENT_TYPES
from ..operations import K_COLS
from ..schedules import cpu_config, cuda_sampling, cuda_variants
from ..schedules.cpu_config import ROUNDINGS, CpuConfig, default_config
from ..schedules.cuda_config import DEPENDENT_LAUNCHES, GRID_ORDERS, CudaConfig, vector_width
from ..schedules.cuda_row_config import CHUNK, operand_cols, partition_chunks
from ..schedules.cuda_variants import default_variants
from ..spec import KernelSpec
from ..targets import parse_target
from .bench import Built


class Target:
    """What `CpuTarget` and `CudaTarget` have alike.

    Attributes
    ----------
    text : str
        The target of the specs that are tuned, such as ``"x86-64-v4"`` or ``"cuda:sm_90"``.
    config : type
        `CpuConfig` or `CudaConfig`.
    words : mapping
        The values of the config's fields that are words: MetaSchedule samples their index.
    schedule_version : int
        Version of schedule and lowering; records of another one are not used.
    workload : callable
        The declared function of a spec, specialised to a row count: static, tensors only.
    default : callable
        The heuristic's config for a spec and row count.
    served : callable
        The config that a build makes of a record's fields.
    """

    text: str
    config: Any
    words: Mapping[str, Sequence[Any]]
    schedule_version: int

    @property
    def versions(self) -> dict[str, Any]:
        """The versions under which times may be compared."""
        tvm_version = importlib.metadata.version("apache-tvm")
        return {"apache-tvm": tvm_version, "schedule": self.schedule_version}

    def encode(self, config: Any) -> dict[str, int]:
        """Return a config's fields as MetaSchedule samples them: words as their index."""
        return {
            name: self.words[name].index(value) if name in self.words else int(value)
            for name, value in config.to_dict().items()
        }

    def decode(self, fields: Mapping[str, int]) -> Any:
        """Return the config of sampled fields; TypeError or ValueError where they make none."""
        named = {
            name: self.words[name][value] if name in self.words else value
            for name, value in fields.items()
        }
        config = self.config.from_dict(named)
        missing = set(config.to_dict()) - set(named)
        if missing:
            raise ValueError(
                f"a record must name every field, {', '.join(sorted(missing))} missing"
            )
        return config


class CpuTarget(Target):
    """An x86-64 level, or a CPU by LLVM's name; `threads` is None when unknown."""

    config = CpuConfig
    words = {"rounding": ROUNDINGS}  # noqa: RUF012
    schedule_version = cpu_config.SCHEDULE_VERSION
    workload = staticmethod(cpu_workload)
    served = staticmethod(cpu_record_config)

    def __init__(self, text: str, threads: int | None = None):
        self.text = text
        self.threads = threads
        self._features = cpu_features(text)

    def tvm_target(self) -> tvm.target.Target:
        """Return TVM's target, which goes into records; MetaSchedule insists on ``num-cores``."""
        fields = {"kind": "llvm", "mtriple": "x86_64-linux-gnu", "mcpu": self.text}
        return tvm.target.Target({**fields, "num-cores": self.threads or 1})

    def default(self, spec: KernelSpec, rows: int) -> CpuConfig:
        """Return the heuristic's config, which is the same for all row counts."""
        return default_config(spec, frozenset(self._features))

    def sample(self, sch: Any, choices: Mapping[str, Sequence[int]], decisions: Any = None) -> Any:
        """Apply the product's schedule with fields from `choices`; a schedule for each structure.

        MetaSchedule draws the values that `decisions` do not give.
        """
        from ..schedules import cpu

        cpu.sample(sch, choices, decisions)
        return [sch]

    def choices(self, spec: KernelSpec, rows: int) -> dict[str, list[int]]:
        """Return the values of each field worth trying, the default's among them."""
        base, used = self.default(spec, rows), cpu_config.fields_used(spec)
        assert spec.q_cols is not None
        assert spec.k_cols is not None
        options = {"bytes_per_task": self._task_sizes(spec, rows, base.bytes_per_task)}
        if spec.operation.normalises:  # else the order of summation leaves nothing else to choose
            # A vector wider than the columns, or than a head's pairs, is never filled.
            widest = max(8, spec.q_cols, spec.k_cols)
            widths = [base.vector * factor // 2 for factor in (1, 2, 4, 8)]
            if spec.operation.rotates:
                assert spec.head_dim is not None
                widest = max(8, spec.rotary_dim // 2, spec.head_dim - spec.rotary_dim)
                widths = [8, 16, 32, 64]
            options["vector"] = [width for width in widths if 8 <= width <= min(128, widest)]
            # Rows of a head and its partners fill the registers sooner, and take long to compile.
            most = min(rows, 8 if spec.operation.rotates else 16)
            tiles = [tile for tile in (1, 2, 4, 8, 16) if tile <= most]
            # A tile that no call fills is the code for single rows.
            options["row_tile"] = tiles[base.row_tile > rows :]
        if "rounding" in used:
            usable = cpu_config.roundings(frozenset(self._features))
            options["rounding"] = [ROUNDINGS.index(name) for name in usable]
        # Stores past the caches below the threshold look fast here, and make the next operation
        # wait for memory: only whether to stream above it is for a measurement to say.
        out_bytes = rows * (spec.q_cols + spec.k_cols) * spec.out_bytes
        if "streaming_bytes" in used and 0 < base.streaming_bytes <= out_bytes:
            options["streaming_bytes"] = [0]
        encoded = self.encode(base)
        return {name: sorted({value, *options.get(name, ())}) for name, value in encoded.items()}

    def _task_sizes(self, spec: KernelSpec, rows: int, default: int) -> list[int]:
        """Return sizes that cut a call into different numbers of tasks, the default's included.

        None is larger than what a build takes from a record: that would never be used.
        """
        threads = self.threads or 64
        if threads == 1:
            return [default]
        total = rows * _row_bytes(spec)
        by_tasks: dict[int, int] = {}
        for size in (default, *(1 << shift for shift in range(14, MOST_TASK_BYTES.bit_length()))):
            tasks = total // size
            # As entry.c cuts a call.
            count = 1 if tasks <= 1 else tasks if tasks < threads else (
                threads if tasks < 2 * threads else 2 * threads
            )  # fmt: skip
            by_tasks.setdefault(count, size)
        return sorted(by_tasks.values())

    def build(self, spec: KernelSpec, rows: int, config: CpuConfig, directory: Path) -> Built:
        """Build the product's module, with the functions that `rows` packed rows get."""
        assert spec.q_cols is not None
        assert spec.k_cols is not None
        streams = 0 < config.streaming_bytes <= rows * (spec.q_cols + spec.k_cols) * spec.out_bytes
        # A check of exactness has few rows; past the caches all the same.
        config = dataclasses.replace(config, streaming_bytes=int(streams))
        path = build_cpu([spec], [config], {}, directory)
        return Built(str(path), (4 * config.row_tile, 4 * config.row_tile + 1))


class CudaTarget(Target):
    """One CUDA architecture. Its methods are those of `CpuTarget`."""

    config = CudaConfig
    words = cuda_sampling.WORDS
    schedule_version = cuda_sampling.SCHEDULE_VERSION
    workload = staticmethod(cuda_workload)
    default = staticmethod(cuda_default)
    served = staticmethod(lambda record: CudaConfig.from_dict(dict(record)))

    def __init__(self, text: str):
        self.text = text
        self._archs = parse_target(text).variants
        if len(self._archs) != 1:
            raise ValueError(f"target must be one architecture to be tuned, got {text!r}")

    def tvm_target(self) -> tvm.target.Target:
        """Return TVM's target, which goes into records."""
        return tvm.target.Target(
            {
                "kind": "cuda",
                "arch": self._archs[0],
                "max_threads_per_block": 1024,
                "max_shared_memory_per_block": 49152,
                "thread_warp_size": 32,
            }
        )

    def sample(self, sch: Any, choices: Mapping[str, Sequence[int]], decisions: Any = None) -> Any:
        """Return a schedule for each structure, with sampled fields."""
        return cuda_sampling.sample(sch, choices, decisions)

    def choices(self, spec: KernelSpec, rows: int) -> dict[str, list[int]]:
        """Return the values of each field worth trying, the default's among them."""
        base = self.encode(self.default(spec, rows))
        if spec.op == "apply_qk_rms_norm":
            options = self._apply_options(spec)
        else:
            options = self._statistics_options(spec, base)
        # What rotates holds partners and cosines too: more rows would spill.
        tiles = (1, 2) if spec.operation.rotates else (1, 2, 4, 8)
        options["rows"] = [tile for tile in tiles if tile <= rows]
        return {name: sorted({value, *options.get(name, ())}) for name, value in base.items()}

    @property
    def _launches(self) -> list[int]:
        """Values to try of ``dependent_launch``, by index; none before sm_90, which lacks it."""
        waits = int(re.sub(r"\D", "", self._archs[0])) >= 90
        return list(range(len(DEPENDENT_LAUNCHES))) if waits else []

    def _apply_options(self, spec: KernelSpec) -> dict[str, Sequence[int]]:
        width = vector_width(spec)
        return {
            "threads": [64, 96, 128, 192, 224, 256, 320, 384, 448, 512, 640, 768, 896, 1024],
            "vector": [1] if width is None else [width // 2, width] if width > 1 else [width],
            "columns": [1, 2, 4] if width is None else [1, 2],
            "dependent_launch": self._launches,
            "grid_order": range(len(GRID_ORDERS)),
            "streaming_stores": [0, 1],
        }

    def _statistics_options(
        self, spec: KernelSpec, base: Mapping[str, int]
    ) -> dict[str, Sequence[int]]:
        """Return what the order of summation leaves to be chosen."""
        chunks = [-(-(cols or 1) // CHUNK) for cols in operand_cols(spec)]

        def partition(columns: int) -> Any:
            return partition_chunks(chunks, columns) or (columns, None)  # none: a row in rounds

        # Vectors that do not make for fewer warps hold nothing, and fewer than a thread gets anyway
        # are the same kernel.
        by_warps: dict[Any, int] = {}
        for columns in (1, 2, 4):
            parts, warps = partition(columns)
            by_warps.setdefault(warps or parts, columns)
        aligned = default_variants(spec)[0].alignment is not None
        # Where nothing is added up several blocks may share a row.
        shares_rows = "threads" in cuda_variants.fields_used(spec)
        return {
            "threads": [128, 256, 512, 1024] if shares_rows else [],
            "columns": [columns for columns in by_warps.values()
                        if partition(columns) != partition(base["columns"])],
            # "off" has nothing that "exit" lacks.
            "dependent_launch": [
                mode for mode in self._launches if DEPENDENT_LAUNCHES[mode] != "off"
            ],
            # Stores of single elements are never marked.
            "streaming_stores": [0, 1] if spec.operation.normalises and aligned else [],
        }  # fmt: skip

    def build(self, spec: KernelSpec, rows: int, config: CudaConfig, directory: Path) -> Built:
        """Build the product's module, for this architecture alone."""
        path = build_cuda([spec], [config], {}, directory)
        return Built(str(path), (1, 4 * config.rows + 1))


def _row_bytes(spec: KernelSpec) -> int:
    """Return the bytes of a row that a call reads and writes, as entry.c counts them."""
    sizes = {
        tensor.name: int(spec.k_cols or 0) if tensor.is_cache or tensor.shape[1:] == (K_COLS,)
        else int(spec.q_cols or 0)
        for tensor in spec.tensors if tensor.is_cache or tensor.is_stream
    }  # fmt: skip
    return sum(
        sizes[tensor.name] * ELEMENT_TYPES[spec.dtype_of(tensor)].bytes
        for tensor in spec.tensors if tensor.name in sizes
    )  # fmt: skip


TunableTarget = CpuTarget | CudaTarget


def open_target(text: str, *, threads: int | None = None) -> TunableTarget:
    """Return what is tuned, for a target's canonical text; `threads` of measured calls, on CPUs."""
    if parse_target(text).kind == "cuda":
        return CudaTarget(text)
    return CpuTarget(text, threads)
