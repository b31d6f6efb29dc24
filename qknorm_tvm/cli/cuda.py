"""What ``run``, ``verify`` and ``bench`` do with ``--device cuda``."""

from __future__ import annotations

import dataclasses
import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from ..bench.timing import CaseResult, Timing
    from ..check.inputs import Activations
    from ..check.verification import Report
    from ..load.module import Module
    from ..spec import KernelSpec

#: Rows that are generated; more are these again, since random numbers take their time.
_GENERATED_ROWS = 1024


def gpu_target(target: str | None) -> str:
    """Return the target to compile for: the one given, or this machine's GPU's."""
    from ..call.arrays import cuda_target
    from ..targets import parse_target

    if target is None:
        return cuda_target(0)
    if parse_target(target).kind != "cuda":
        raise click.UsageError(f"--target must be cuda or cuda:sm_... for --device cuda: {target}")
    return target


def load_modules(files: Sequence[Path]) -> list[Module]:
    """Load modules and refuse those that are not for CUDA."""
    from ..load.module import load

    modules = [load(file) for file in files]
    for module in modules:
        if module.metadata.get("kind") != "cuda":
            target = module.metadata["target"]
            raise click.UsageError(f"{module.path} is for {target}, not for --device cuda")
    return modules


def need_compiler(instead: str) -> None:
    """Refuse to compile where TVM is not installed, before anything else fails for it."""
    if importlib.util.find_spec("tvm") is None:
        raise click.UsageError(
            f"compiling needs apache-tvm, which is not installed; {instead} on a machine that "
            "has it, with qknorm-tvm export --target cuda"
        )


def module_of(modules: Sequence[Module], spec: KernelSpec) -> Module | None:
    """Return the module that holds a spec's dtypes and columns; fixed columns come first."""
    for fixed in (True, False):
        for module in modules:
            for held in module.specs:
                if (held.op, held.in_dtype, held.out_dtype) != (
                    spec.op, spec.in_dtype, spec.out_dtype,
                ):  # fmt: skip
                    continue
                columns = (held.q_cols, held.k_cols)
                wanted = (spec.q_cols, spec.k_cols)
                if columns == wanted if fixed else None in columns and _open(columns, wanted):
                    return module
    return None


def _open(held: tuple[int | None, int | None], wanted: tuple[int | None, int | None]) -> bool:
    return all(have in (None, want) for have, want in zip(held, wanted, strict=True))


# ---- verify ----------------------------------------------------------------------------------


def verify_cuda(modules: Sequence[Module], thorough: bool) -> Report:
    """Check every case of every spec of some modules, with a progress bar."""
    from ..check import verification_cuda
    from ..check.verification import Report
    from .output import console
    from .verify import progress_bar

    report = Report()
    cases = list(verification_cuda.iterate(modules, thorough=thorough))
    with progress_bar(console(stderr=True)) as progress:
        task = progress.add_task("verifying", total=len(cases))
        for module, spec, case in cases:
            progress.update(task, description=case.description)
            verification_cuda.run_case(module, spec, case, report)
            progress.advance(task)
    return report


def compile_for_verify(target: str | None) -> list[Module]:
    """Compile what ``verify`` checks where it is given no file."""
    need_compiler("export modules")
    from ..call.compiled import compile
    from ..check.verification import default_specs
    from .output import console

    modules = []
    with console(stderr=True).status("importing TVM") as status:
        for specs in default_specs(gpu_target(target)):
            status.update(f"compiling {len(specs)} specs")
            modules.append(compile(list(specs)).module)
    return modules


# ---- bench -----------------------------------------------------------------------------------


def activations(rows: int, spec: KernelSpec) -> Activations:
    """Generate activations, the same rows again and again where there are many."""
    import numpy as np

    from ..check.inputs import aligned_copy, generate

    assert spec.q_cols is not None
    assert spec.k_cols is not None
    a = generate(min(rows, _GENERATED_ROWS), spec.q_cols, spec.k_cols, spec.in_dtype)
    if rows <= _GENERATED_ROWS:
        return a
    order = np.arange(rows) % _GENERATED_ROWS
    return dataclasses.replace(
        a, q=aligned_copy(a.q[order]), k=aligned_copy(a.k[order]), qk_var=a.qk_var[order]
    )


def measure_cuda(
    specs: Sequence[KernelSpec],
    rows: Sequence[int],
    files: Sequence[Path],
    config: Any,
    min_time: float,
    torch_compile: bool,
    host: bool,
    misaligned: bool,
) -> tuple[list[tuple[KernelSpec, CaseResult]], list[Timing], dict[str, str]]:
    """Time every shape on the GPU; returns what ``bench`` prints."""
    from ..bench import alternatives
    from ..bench import cuda as benchmark_cuda
    from ..call import cache
    from .output import console

    names = [n for n in benchmark_cuda.ALL if torch_compile or n != alternatives.TORCH_COMPILE]
    given = load_modules(files)
    results: list[tuple[KernelSpec, CaseResult]] = []
    host_timings: list[Timing] = []
    facts: dict[str, str] = {}
    with console(stderr=True).status("compiling") as status:
        for spec in specs:
            module = module_of(given, spec) if given else _compile(spec, config)
            if module is None:
                raise click.UsageError(f"none of the modules given holds {spec.text}")
            facts = facts or cuda_facts(module)
            if host and not host_timings and spec.in_dtype == spec.out_dtype:
                status.update("cost of a call")
                cache.use(module)
                host_timings = benchmark_cuda.host_costs(
                    module, activations(16, spec), min_time=min_time
                )
            for m in rows:
                where = f"{spec.q_cols}/{spec.k_cols} {spec.in_dtype}, M = {m}"
                status.update(where)
                result = benchmark_cuda.compare(
                    module,
                    activations(m, spec),
                    out_dtype=str(spec.out_dtype),
                    min_time=min_time,
                    names=names,
                    misaligned=misaligned,
                    status=lambda text, where=where: status.update(  # type: ignore[misc]
                        f"{where}: {text}"
                    ),
                )
                results.append((spec, result))
    return results, host_timings, facts


def measure_layer_cuda(
    ops: Sequence[str],
    shapes: Sequence[tuple[int, int]],
    dtype: str,
    rows: Sequence[int],
    files: Sequence[Path],
    min_time: float,
    torch_compile: bool,
) -> tuple[list[tuple[str, CaseResult]], dict[str, str]]:
    """Time the statistics and the layer on the GPU; returns what ``bench-layer`` prints."""
    from ..bench import alternatives
    from ..bench import layer_cuda as benchmark_layer_cuda
    from ..operations import OPERATIONS
    from ..spec import KernelSpec
    from .output import console

    names = [
        name
        for name in benchmark_layer_cuda.ALL
        if torch_compile or name != alternatives.TORCH_COMPILE
    ]
    given = load_modules(files)
    results: list[tuple[str, CaseResult]] = []
    facts: dict[str, str] = {}
    with console(stderr=True).status("compiling") as status:
        for q_cols, k_cols in shapes:
            specs = [
                KernelSpec(
                    op=op, in_dtype=dtype, q_cols=q_cols, k_cols=k_cols, target=gpu_target(None)
                )
                for op in OPERATIONS
            ]
            compiled = None if given else _compile(specs, None)
            for spec in (one for op in dict.fromkeys(ops) for one in specs if one.op == op):
                module = compiled or module_of(given, spec)
                if module is None:
                    raise click.UsageError(f"none of the modules given holds {spec.text}")
                facts = facts or cuda_facts(module)
                for m in rows:
                    where = f"{spec.op} {q_cols}/{k_cols}, M = {m}"
                    result = benchmark_layer_cuda.compare_layer(
                        spec.op,
                        module,
                        activations(m, spec),
                        min_time=min_time,
                        names=names,
                        status=lambda text, where=where: status.update(  # type: ignore[misc]
                            f"{where}: {text}"
                        ),
                    )
                    results.append((spec.op, result))
    return results, facts


def _compile(spec: KernelSpec | Sequence[KernelSpec], config: Any) -> Module:
    need_compiler("give --module FILE.so, exported")
    from ..call.compiled import compile

    return compile(spec, config=config).module


def cuda_facts(module: Module) -> dict[str, str]:
    """Return what a measurement was taken on, for people and for the CSV file."""
    from ..bench.cuda import device_facts
    from ..machine import library_versions

    found = device_facts()
    versions = {**library_versions(), "CUDA": found["cuda"]}
    sources = {code["source"] for level in module.metadata["levels"] for code in level["code"]}
    return {
        "device": found["device"],
        "target": str(module.metadata["target"]),
        "config": ", ".join(sorted(sources)),
        "versions": ", ".join(f"{k} {v}" for k, v in versions.items()),
    }


# ---- run: the part that the fresh process does ---------------------------------------------------


def prove(request: dict[str, Any], event: Any) -> dict[str, Any]:
    """Check and time a module on the GPU: the part of ``run`` that the fresh process does."""
    import sys

    from ..bench import alternatives
    from ..bench import cuda as benchmark_cuda
    from ..check.inputs import generate, read_activations
    from ..load.module import load
    from .options import check_device

    check_device("cuda")
    module = load(request["module"])
    names = [benchmark_cuda.EMPTY, alternatives.COPY, alternatives.TORCH]
    names += [alternatives.TORCH_COMPILE] if request["torch_compile"] else []
    results = []
    a = None
    for rows in request["rows"]:
        event(f"M = {rows}")
        a = (
            read_activations(request["input"])
            if request["input"]
            else generate(
                rows, request["q_cols"], request["k_cols"], request["dtype"], seed=request["seed"]
            )
        )
        result = benchmark_cuda.compare(
            module,
            dataclasses.replace(a, epsilon=request["epsilon"]),
            out_dtype=request["out_dtype"],
            min_time=request["min_time"],
            names=names,
            status=lambda text, rows=rows: event(f"M = {rows}: {text}"),  # type: ignore[misc]
        )
        results.append(result.to_dict())
    return {
        "facts": cuda_facts(module),
        "compiler_loaded": "tvm" in sys.modules,
        "source": a.source if a else "",
        "notes": list(a.notes) if a else [],
        "results": results,
    }


def report_run(spec: KernelSpec, path: Path, seconds: float | None, found: dict[str, Any]) -> int:
    """Print what the fresh process found; returns the exit status."""
    from ..bench.timing import CaseResult
    from .output import console, facts, size, table, timing_notes, timing_table

    printer = console()
    how = "given" if seconds is None else f"compiled in {seconds:.1f} s"
    lines = [
        ("spec", spec.text),
        *((name, found["facts"][name]) for name in ("device", "versions")),
        ("inputs", "; ".join([found["source"], *found["notes"]])),
        ("module", f"{how}, {size(path.stat().st_size)}, code for {found['facts']['target']}"),
    ]
    printer.print(facts(lines))
    printer.print(f"module    {path}", soft_wrap=True)
    printer.print()
    results = [CaseResult.from_dict(one) for one in found["results"]]
    compiler = "with" if found["compiler_loaded"] else "without"
    title = f"Outputs, bit for bit, in a fresh process {compiler} the compiler"
    proof = table("M", "elements", "torch graph on this GPU", title=title)
    for result in results:
        elements = result.rows * (result.q_cols + result.k_cols)
        proof.add_row(f"{result.rows:,}", f"{elements:,}", "equal" if result.exact else "DIFFERS")
    printer.print(proof)
    printer.print(timing_table(results, title="Time in a CUDA graph"))
    for line in timing_notes(results):
        printer.print(line)
    if all(result.exact for result in results):
        return 0
    printer.print("\nNOT EXACT: outputs differ from the unfused graph, see the tables above")
    return 1
