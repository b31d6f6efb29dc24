"""Tuning for NVIDIA GPUs: the space, and candidates built exactly as the product builds its code.

Runs on the GPU's machine: launches are shorter than a call from the host, so they are timed in CUDA
graphs, through torch.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import tvm

from ..build.configs import cuda_default, cuda_workload
from ..schedules import cuda_sampling
from ..schedules.cuda_config import DEPENDENT_LAUNCHES, GRID_ORDERS, CudaConfig, vector_width
from ..schedules.cuda_row_config import CHUNK, partition_chunks
from ..schedules.cuda_variants import default_variants
from ..spec import KernelSpec
from ..targets import parse_target
from .target import Built, encode

if TYPE_CHECKING:
    from .measure import Bench


class CudaTarget:
    """One CUDA architecture; see `tuning.target.TunableTarget`.

    Parameters
    ----------
    text : str
        Such as ``"cuda:sm_90"``.
    """

    words: Mapping[str, Sequence[Any]] = cuda_sampling.WORDS
    schedule_version = cuda_sampling.SCHEDULE_VERSION

    def __init__(self, text: str):
        self.text = text
        self.archs = parse_target(text).variants
        if len(self.archs) != 1:
            raise ValueError(f"target must be one architecture to be tuned, got {text!r}")

    def tvm_target(self) -> tvm.target.Target:
        """Return TVM's target, which goes into records."""
        return tvm.target.Target(
            {
                "kind": "cuda",
                "arch": self.archs[0],
                "max_threads_per_block": 1024,
                "max_shared_memory_per_block": 49152,
                "thread_warp_size": 32,
            }
        )

    def workload(self, spec: KernelSpec, rows: int) -> tvm.IRModule:
        """Return the declared function, specialised to a row count, with the widest alignment."""
        return cuda_workload(spec, rows)

    def default(self, spec: KernelSpec, rows: int) -> CudaConfig:
        """Return the heuristic's config for a row count."""
        return cuda_default(spec, rows)

    def config(self, fields: Mapping[str, Any]) -> CudaConfig:
        """Build a config from its fields."""
        return CudaConfig.from_dict(dict(fields))

    def choices(self, spec: KernelSpec, rows: int) -> dict[str, list[int]]:
        """Return the values of each field worth trying, the default's among them.

        A field that changes nothing keeps the default's value alone.
        """
        base = encode(self, self.default(spec, rows))
        tiles = [tile for tile in (1, 2, 4, 8) if tile <= rows]
        if spec.op == "apply_qk_rms_norm":
            options = self._apply_options(spec)
        else:
            options = self._statistics_options(spec, base)
        options["rows"] = tiles
        return {name: sorted({value, *options.get(name, ())}) for name, value in base.items()}

    @property
    def _launches(self) -> list[int]:
        """What to try for when the next kernel may start; before sm_90 nothing waits."""
        waits = int(re.sub(r"\D", "", self.archs[0])) >= 90
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
        assert spec.q_cols is not None
        assert spec.k_cols is not None
        chunks = [-(-cols // CHUNK) for cols in (spec.q_cols, spec.k_cols)]
        # Vectors that do not make for fewer warps hold nothing, and fewer than a thread gets anyway
        # are the same kernel.

        def dealt(columns: int) -> Any:
            return partition_chunks(chunks, columns) or (columns, None)  # none: a row in rounds

        by_warps: dict[Any, int] = {}
        for columns in (1, 2, 4):
            parts, warps = dealt(columns)
            by_warps.setdefault(warps or parts, columns)
        aligned = default_variants(spec)[0].alignment is not None
        return {
            "columns": [
                columns for columns in by_warps.values() if dealt(columns) != dealt(base["columns"])
            ],
            # "off" has nothing that "exit" lacks.
            "dependent_launch": [
                mode for mode in self._launches if DEPENDENT_LAUNCHES[mode] != "off"
            ],
            # Stores of single elements are never marked.
            "streaming_stores": [0, 1] if spec.operation.normalises and aligned else [],
        }

    def sample(self, sch: Any, choices: Mapping[str, Sequence[int]], decisions: Any = None) -> Any:
        """Return a schedule for each structure, with fields that MetaSchedule samples."""
        return cuda_sampling.sample(sch, choices, decisions)

    def served(self, config: CudaConfig) -> CudaConfig:
        """Return the config that a build makes of a record's."""
        return config

    def build(self, spec: KernelSpec, rows: int, config: CudaConfig, directory: Path) -> Built:
        """Build the product's entry point with the one kernel, for this architecture alone."""
        from ..build.cuda import (
            cuda_source,
            device_check_source,
            link_cuda,
            nvcc_compile,
            scheduled_variant,
        )
        from ..build.native import Level, Variant, compile_entry, tables

        spec = spec.replace(target=self.text)
        variant = default_variants(spec, config)[0]
        symbol = "qkn_cuda_candidate"
        source = directory / "candidate.cu"
        func = scheduled_variant(spec, variant)
        source.write_text(cuda_source([(symbol, func)]) + device_check_source(symbol, self.archs))
        device_object = directory / "candidate.o"
        nvcc_compile(source, device_object, self.archs)
        entry = Variant(
            "candidate",
            symbol,
            stride_unit=variant.stride_unit,
            alignment=variant.alignment or 1,
        )
        metadata = {"kind": "cuda", "candidate": config.to_dict()}
        table = tables([spec], [Level("cuda", (), ((entry,),))], metadata, cuda=True)
        out = directory / "candidate.so"
        link_cuda([*compile_entry(directory, table, pool=False), device_object], out)
        return Built(str(out), (1, 4 * config.rows + 1))

    def bench(self, spec: KernelSpec, rows: int, session: Any = None) -> Bench:
        """Return what measures candidates."""
        from .cuda_measure import CudaBench

        assert session is None
        return CudaBench(spec.replace(target=self.text), rows)
