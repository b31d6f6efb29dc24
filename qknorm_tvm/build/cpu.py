"""CPU modules: schedule, lower and generate code for every level, then link."""

from __future__ import annotations

import concurrent.futures
import contextlib
import dataclasses
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import tvm
from tvm import tirx

from ..declare.norm import declare
from ..errors import BuildError
from ..load.temporary import memory_file
from ..lower.cpu import STREAM_ALIGNMENT, lower
from ..lower.tvm_version import llvm_module
from ..schedules.cpu import schedule
from ..schedules.cpu_config import (
    CONVERT_FEATURES,
    PACKED_ROWS,
    CpuConfig,
    default_config,
    packs_gammas,
    roundings,
    streams,
)
from ..spec import KernelSpec
from ..targets import AARCH64, ROUNDING_LEVELS, X86_FEATURES, X86_LEVELS
from .configs import Bucket, cpu_buckets
from .native import Level, Variant, c_compiler, compile_entry, link, tables

#: Instruction sets kept from LLVM. Some it would use change results (avxneconvert flushes denormals
#: when it rounds); the others `X86_FEATURES` cannot test for at load.
_WITHHELD = tuple(
    """avx10.1 avx10.2 avx512fp16 avx512vp2intersect avxifma avxneconvert avxvnni
    avxvnniint16 avxvnniint8 amx-avx512 amx-tile ccmp egpr fma4 ndd nf ppx push2pop2 sse4a tbm
    xop zu""".split()  # noqa: SIM905
)
#: Tuning flags against which the kernel was measured: whole zmm vectors, and blends rather than
#: three-uop word permutes.
_TUNING = ("-prefer-256-bit", "-fast-variable-crosslane-shuffle", "-fast-variable-perlane-shuffle")

#: A function of a module, with what it is made from.
_Function = tuple[KernelSpec, CpuConfig, Variant]

#: Bytes that a function takes in an object file at most: ten times what is usual.
_MOST_CODE = 1 << 17


def cpu_features(cpu: str) -> tuple[str, ...]:
    """Return the instruction sets that code for an LLVM CPU name may use, sorted.

    Those that must be tested for when a module is loaded: none on AArch64.

    Raises
    ------
    BuildError
        LLVM does not know the name.
    """
    if cpu == AARCH64:
        return ()
    if cpu in X86_LEVELS:
        return tuple(sorted(X86_LEVELS[cpu]))
    codegen = tvm.target.codegen
    generic = tvm.target.Target({"kind": "llvm", "mtriple": "x86_64-linux-gnu"})
    known = {str(name) for name in codegen.llvm_get_cpu_archlist(generic)}
    if cpu not in known:
        raise BuildError(
            f"target must be a CPU that LLVM {codegen.llvm_version_major()} knows, got {cpu!r}; "
            "for example x86-64-v3, znver4 or sapphirerapids; every AArch64 CPU's is 'aarch64'"
        )
    available = codegen.llvm_get_cpu_features(
        tvm.target.Target({"kind": "llvm", "mtriple": "x86_64-linux-gnu", "mcpu": cpu})
    )
    return tuple(sorted(set(map(str, available)) & set(X86_FEATURES)))


def llvm_target(cpu: str) -> tvm.target.Target:
    """Return TVM's target for ``"aarch64"``, an x86-64 level or CPU name."""
    if cpu == AARCH64:
        # Without bf16 and fullfp16, whose instructions round otherwise, and without SVE.
        return tvm.target.Target(
            {"kind": "llvm", "mtriple": "aarch64-linux-gnu", "mcpu": "generic"}
        )
    known = ROUNDING_LEVELS.get(cpu, cpu)
    beyond = () if known == cpu else cpu_features(cpu)
    return tvm.target.Target(
        {
            "kind": "llvm",
            "mtriple": "x86_64-linux-gnu",
            "mcpu": known,
            "mattr": [
                *(f"+{name}" for name in beyond),
                *(f"-{name}" for name in _WITHHELD),
                *_TUNING,
            ],
        }
    )


def variants_of(
    spec: KernelSpec, config: CpuConfig, prefix: str, *, min_rows: int = 1
) -> list[Variant]:
    """Return the functions of one config for one spec and level, first choice first.

    With a `min_rows` above 1 none of them takes the rows that tiles leave over: the functions for
    fewer rows do.
    """
    variants = []
    packs = packs_gammas(spec, config)
    # Of what goes past the caches rows follow each other as in memory, where they share no gamma.
    in_order = packs or config.rounding == "convert"
    least_rows = max(min_rows, PACKED_ROWS if packs else 1)
    has_tile = packs or config.row_tile > 1
    stream_tile = 1 if in_order else config.row_tile
    common: dict[str, Any] = {"bytes_per_task": config.bytes_per_task, "packs_gammas": packs}
    vector_bytes = config.vector * spec.out_bytes
    if config.streaming_bytes and vector_bytes >= 16 and streams(spec, config.vector):
        stream = Variant(
            "stream",
            f"{prefix}_stream",
            min_rows=max(stream_tile, least_rows),
            row_tile=stream_tile,
            stride_unit=STREAM_ALIGNMENT // min(spec.in_bytes, spec.out_bytes),
            alignment=STREAM_ALIGNMENT,
            min_out_bytes=config.streaming_bytes,
            **common,
        )
        variants.append(stream)
    if has_tile:
        tile = Variant(
            "tile",
            f"{prefix}_tile",
            min_rows=max(config.row_tile, least_rows),
            row_tile=config.row_tile,
            **common,
        )
        variants.append(tile)
    if min_rows == 1 or not has_tile:
        row = Variant(
            "row", f"{prefix}_row", min_rows=min_rows, bytes_per_task=config.bytes_per_task
        )
        variants.append(row)
    return variants


def scheduled(spec: KernelSpec, config: CpuConfig, variant: Variant) -> tirx.PrimFunc:
    """Declare a spec for a variant and schedule it."""
    func = declare(
        spec,
        row_tile=variant.row_tile,
        stride_unit=variant.stride_unit,
        alignment=variant.alignment if variant.alignment > 1 else None,
    )
    func = schedule(func, config, row_tile=variant.row_tile)
    return func.with_attr("global_symbol", variant.symbol)


def generate(cpu: str, functions: Sequence[_Function]) -> Any:
    """Declare, schedule, lower and generate code for functions; returns TVM's LLVM module."""
    target = llvm_target(cpu)
    lowered = tvm.IRModule()
    for spec, config, variant in functions:
        func = scheduled(spec, config, variant)
        bound = tirx.transform.BindTarget(target.with_host(target))(
            tvm.IRModule({variant.symbol: func})
        )
        lowered.update(
            lower(
                bound, config, spec, streaming=variant.name == "stream", packed=variant.packs_gammas
            )
        )
    return llvm_module(lowered, target)


def _object_code(module: Any, directory: Path, functions: int) -> bytes:
    """Return a module's object file.

    LLVM ends the process if the file that it writes cannot grow. So the file is in memory where
    the system has such files, and it is first made as large as it may become: a full disk or a
    limit of file sizes raises an ``OSError`` here.
    """
    with contextlib.ExitStack() as stack:
        try:
            handle, path = stack.enter_context(memory_file("object.o"))
        except OSError:
            path = directory / "object.o"
            handle = stack.enter_context(open(path, "wb")).fileno()
        os.posix_fallocate(handle, 0, (1 << 20) + functions * _MOST_CODE)
        os.ftruncate(handle, 0)
        module.write_to_file(str(path), "o")
        return path.read_bytes()


@dataclasses.dataclass(frozen=True)
class _Held:
    """What a module has of one spec for one level: its configs, and the functions made of them."""

    buckets: tuple[Bucket, ...]
    functions: tuple[tuple[_Function, ...], ...]

    def is_made_of(self, buckets: Sequence[Bucket]) -> bool:
        """Whether other configs, by number of rows, would make the same functions."""
        own = [(bucket.min_rows, bucket.config) for bucket in self.buckets]
        return own == [(bucket.min_rows, bucket.config) for bucket in buckets]

    @property
    def variants(self) -> tuple[Variant, ...]:
        """The functions as the entry point knows them, first choice first."""
        return tuple(variant for of_bucket in self.functions for _, _, variant in of_bucket)

    def describe(self, spec: KernelSpec) -> list[dict[str, Any]]:
        """Return what a module's metadata says of them, JSON-ready."""
        return [
            {
                "spec": spec.text,
                **bucket.describe(),
                "variants": [variant.name for _, _, variant in of_bucket],
            }
            for bucket, of_bucket in zip(self.buckets, self.functions, strict=True)
        ]


def _configs_of_level(spec: KernelSpec, given: Any, cpu: str) -> list[Bucket]:
    """Return a spec's configs for a level by number of rows.

    Raises
    ------
    ValueError
        One of them needs instructions that the level has not.
    """
    features = frozenset(cpu_features(cpu))
    buckets = cpu_buckets(spec, cpu, given, default_config(spec, features))
    for bucket in buckets:
        if bucket.config.rounding not in roundings(features):
            raise ValueError(
                f"config.rounding must not be 'convert' for {cpu}, which is without "
                f"{' or '.join(sorted(CONVERT_FEATURES - features))}"
            )
    return buckets


def _functions_of(spec: KernelSpec, bucket: Bucket, prefix: str) -> tuple[_Function, ...]:
    variants = variants_of(
        spec, bucket.config, f"{prefix}_{bucket.min_rows}", min_rows=bucket.min_rows
    )
    return tuple((spec, bucket.config, variant) for variant in variants)


def build(
    specs: Sequence[KernelSpec],
    configs: Sequence[CpuConfig | None],
    metadata: dict[str, Any],
    directory: Path,
) -> Path:
    """Build one ``.so`` for specs that share a CPU target; returns its path in `directory`.

    `metadata` is completed with the levels, their features, and each spec's configs.
    """
    functions: dict[str, list[_Function]] = {}
    held: dict[str, list[_Held]] = {}
    # The least demanding level first: another may share its functions.
    for cpu in reversed(specs[0].parsed_target.variants):
        base = held.get(ROUNDING_LEVELS.get(cpu, ""))
        of_level, own = [], []
        for index, (spec, given) in enumerate(zip(specs, configs, strict=True)):
            buckets = _configs_of_level(spec, given, cpu)
            if base and base[index].is_made_of(buckets):
                of_level.append(base[index])
                continue
            prefix = re.sub(r"[-.]", "_", f"qkn_{cpu}_{index}")
            made = tuple(_functions_of(spec, bucket, prefix) for bucket in buckets)
            of_level.append(_Held(tuple(buckets), made))
            own += [function for of_bucket in made for function in of_bucket]
        if own:
            functions[cpu], held[cpu] = own, of_level
    levels: list[Level] = []
    described: list[dict[str, Any]] = []
    for cpu, of_level in reversed(held.items()):
        features = cpu_features(cpu)
        levels.append(Level(cpu, features, tuple(its.variants for its in of_level)))
        code = [
            text for spec, its in zip(specs, of_level, strict=True) for text in its.describe(spec)
        ]
        described.append({"name": cpu, "features": list(features), "code": code})
    metadata = {**metadata, "kind": "cpu", "levels": described}
    table = tables(specs, levels, metadata, cuda=False)
    machine = specs[0].parsed_target.machine
    c_compiler(machine)  # before the minutes that many specs take
    objects: list[Path] = []
    with concurrent.futures.ThreadPoolExecutor(1) as worker:
        # The C compiler beside LLVM: a third of the time.
        native = worker.submit(compile_entry, directory, table, pool=True, machine=machine)
        for cpu, of_cpu in functions.items():
            level_object = directory / f"{cpu}.o"
            generated = generate(cpu, of_cpu)
            level_object.write_bytes(_object_code(generated, directory, len(of_cpu)))
            # The least demanding first: TVM puts its float16 helpers, weak, into every object, and
            # the linker keeps the first, which has to run everywhere.
            objects.append(level_object)
        out = directory / "module.so"
        link([*native.result(), *objects], out, machine)
    return out
