"""``qknorm-tvm bench``."""

from __future__ import annotations

import csv
import itertools
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from .options import Numbers, Shapes, check_device, debug_option, device_option, dtype_choice

if TYPE_CHECKING:
    from ..benchmark import CaseResult, Timing
    from ..host_costs import ColdCosts
    from ..runtime import Module
    from ..spec import KernelSpec

#: Columns of the CSV file; units are in the names.
CSV_COLUMNS = (
    "q_cols", "k_cols", "rows", "in_dtype", "out_dtype", "threads", "candidate", "median_us",
    "q1_us", "q3_us", "samples", "calls_per_sample", "bytes_per_call", "bandwidth_GB_per_s",
    "ratio_to_copy", "ratio_to_ours", "ratio_to_empty", "exact", "note", "target",
    "config", "device", "versions",
)  # fmt: skip


@click.command(short_help="Time it against the alternatives.")
@click.option("--shapes", type=Shapes(), default="1536/256,6144/1024", show_default=True,
              metavar="NQ/NK,...", help="Columns of Q and K.")  # fmt: skip
@click.option("--rows", type=Numbers(1), default="1,16,256,1024,4096,16384", show_default=True,
              metavar="M,...", help="Values of M.")  # fmt: skip
@click.option("--dtype", "dtypes", type=dtype_choice, multiple=True, default=["bfloat16"],
              show_default=True, help="Element type; may be given several times.")  # fmt: skip
@click.option("--out-dtype", type=dtype_choice, help="Of the outputs.  [default: dtype]")
@click.option("--threads", type=Numbers(1), help="Numbers of threads.  [default: 1 and all]")
@click.option("--target", help="What to generate code for.  [default: this CPU's level]")
@click.option("--config", "pairs", multiple=True, metavar="NAME=VALUE",
              help="A choice of the schedule, as for export.")  # fmt: skip
@click.option("--module", "files", multiple=True, metavar="FILE.so",
              type=click.Path(dir_okay=False, path_type=Path),
              help="CUDA: time these, not what is compiled now; several times.")  # fmt: skip
@click.option("--misaligned", is_flag=True,
              help="CUDA: rows that start at every alignment.")  # fmt: skip
@click.option("--min-time", type=click.FloatRange(0), default=0.5, show_default=True,
              help="Seconds for each candidate.")  # fmt: skip
@click.option("--torch-compile/--no-torch-compile", default=True,
              help="Time torch.compile too: it compiles for every shape.")  # fmt: skip
@click.option("--host/--no-host", default=True, help="Time what a call at M = 1 costs.")
@click.option("--cold", is_flag=True,
              help="Only: compile and import times in fresh processes, and the size of a "
              "module.")  # fmt: skip
@click.option("--csv", "csv_file", type=click.Path(dir_okay=False, path_type=Path),
              metavar="FILE", help="Also write the timings there.")  # fmt: skip
@click.option("--json", "as_json", is_flag=True, help="Print JSON instead of tables.")
@device_option
@debug_option
def bench(
    shapes: tuple[tuple[int, int], ...],
    rows: tuple[int, ...],
    dtypes: tuple[str, ...],
    out_dtype: str | None,
    threads: tuple[int, ...] | None,
    target: str | None,
    pairs: tuple[str, ...],
    files: tuple[Path, ...],
    misaligned: bool,
    min_time: float,
    torch_compile: bool,
    host: bool,
    cold: bool,
    csv_file: Path | None,
    as_json: bool,
    device: str,
) -> int:
    """Check results, then time the loaded module against the alternatives, interleaved.

    \b
    ours           the module, outputs given
    copy           the same bytes read and written, with as many threads
    NumPy, torch   the unfused graph, which allocates
    torch.compile  the graph compiled for this very shape
    scalar         the same schedule with vector=1 and row_tile=1; LLVM still vectorises what it can

    With --device cuda: launches in a chain inside a CUDA graph, where the empty kernel is what a
    launch takes at least; copy is torch's copy_ of as many bytes, once for q and k together and
    once for each; buffers beyond L2 rotate.

    Each sample is a run of calls after as many that warm up; candidates take turns. Where torch is
    not installed, its lines say so.

    \b
    Examples:
      qknorm-tvm bench
      qknorm-tvm bench --shapes 1536/256 --rows 1,4096 --threads 1 --no-torch-compile
      qknorm-tvm bench --dtype bfloat16 --dtype float32 --csv bench.csv
      qknorm-tvm bench --cold
      qknorm-tvm bench --device cuda --rows 1,16,64,256,1024,16384
      qknorm-tvm bench --device cuda --module qk.so --shapes 1536/256

    Exit status: 0, 1 when a result is not exact, 2 when the input is wrong.
    """
    check_device(device)
    from ..machine import load_warning
    from ..spec import KernelSpec
    from ..targets import host_cpu_target
    from .cuda import gpu_target, measure_cuda
    from .export import check_folder
    from .options import parse_config

    on_gpu = device == "cuda"
    if not on_gpu and (files or misaligned):
        raise click.UsageError("--module and --misaligned are for --device cuda")
    if on_gpu and (threads or cold):
        raise click.UsageError("--threads and --cold are for --device cpu")
    if csv_file is not None:
        check_folder(csv_file)
    specs = [
        KernelSpec(
            in_dtype=dtype,
            out_dtype=out_dtype or dtype,
            q_cols=q_cols,
            k_cols=k_cols,
            target=gpu_target(target) if on_gpu else target or host_cpu_target(),
        )
        for dtype in dict.fromkeys(dtypes)
        for q_cols, k_cols in shapes
    ]
    if not on_gpu and specs[0].parsed_target.kind != "cpu":
        raise click.UsageError(f"--target must be a CPU's for --device cpu, got {target}")
    busy = load_warning()
    if cold:
        return _cold(specs[0], as_json, busy)
    config = parse_config(pairs, device)
    if on_gpu:
        results, host_timings, module_facts = measure_cuda(
            specs, rows, files, config, min_time, torch_compile, host, misaligned
        )
    else:
        results, host_timings, module_facts = _measured(
            specs, rows, threads, config, min_time, torch_compile, host
        )
    lines = [line for spec, result in results for line in csv_lines(spec, result, module_facts)]
    if csv_file is not None:
        with csv_file.open("w", newline="") as file:
            writer = csv.DictWriter(file, CSV_COLUMNS)
            writer.writeheader()
            writer.writerows(lines)
    if as_json:
        click.echo(_as_json(lines, host_timings, busy))
    else:
        _print(results, host_timings, module_facts, busy)
        if csv_file is not None:
            click.echo(f"wrote {csv_file}")
    return 0 if all(result.exact for _, result in results) else 1


def _measured(
    specs: list[KernelSpec],
    rows: tuple[int, ...],
    threads: tuple[int, ...] | None,
    config: Any,
    min_time: float,
    torch_compile: bool,
    host: bool,
) -> tuple[list[tuple[KernelSpec, CaseResult]], list[Timing], dict[str, str]]:
    from .. import alternatives
    from ..inputs import generate
    from ..machine import usable_processors
    from .output import console, plural

    names = [name for name in alternatives.ALL if torch_compile or name != "torch.compile"]
    results: list[tuple[KernelSpec, CaseResult]] = []
    host_timings: list[Timing] = []
    facts: dict[str, str] = {}
    with console(stderr=True).status("compiling") as status:
        from ..build import compile
        from ..schedules.llvm_config import LLVMConfig

        for spec in specs:
            # Apart: what a module's search among several specs takes is not every module's.
            ours = compile(spec, config=config)
            scalar = compile(spec, config=LLVMConfig(vector=1, row_tile=1))
            facts = facts or _facts(ours.module)
            if host and spec is specs[0] and spec.in_dtype == spec.out_dtype:
                from ..host_costs import host_costs

                status.update("cost of a call")
                host_timings = host_costs(ours.module, spec, min_time=min_time)
            for count, m in itertools.product(threads or sorted({1, usable_processors()}), rows):
                assert spec.q_cols is not None
                assert spec.k_cols is not None
                columns = f"{spec.q_cols}/{spec.k_cols} {spec.in_dtype}"
                where = f"{columns}, {plural(count, 'thread')}, M = {m}"
                status.update(where)
                result = alternatives.compare(
                    ours.module,
                    generate(m, spec.q_cols, spec.k_cols, spec.in_dtype),
                    out_dtype=str(spec.out_dtype),
                    threads=count,
                    min_time=min_time,
                    names=names,
                    scalar=scalar.module,
                    status=lambda text, where=where: status.update(  # type: ignore[misc]
                        f"{where}: {text}"
                    ),
                )
                results.append((spec, result))
    return results, host_timings, facts


def _facts(module: Module) -> dict[str, str]:
    from ..machine import cpu_name, library_versions
    from .inspect_file import config_text

    level = next(x for x in module.metadata["levels"] if x["name"] == module.active_level)
    code = level["code"][0]
    return {
        "device": cpu_name(),
        "target": module.active_level,
        "config": f"{config_text(code['config'])} ({code['source']})",
        "versions": ", ".join(f"{k} {v}" for k, v in library_versions().items()),
    }


def csv_lines(
    spec: KernelSpec, result: CaseResult, module_facts: dict[str, str]
) -> list[dict[str, Any]]:
    """Return a result as the lines of the CSV file; what was not measured is empty."""

    def figure(value: float, digits: int) -> float | None:
        return None if value != value else round(value, digits)

    return [
        {
            "q_cols": result.q_cols,
            "k_cols": result.k_cols,
            "rows": result.rows,
            "in_dtype": result.in_dtype,
            "out_dtype": result.out_dtype,
            "threads": result.threads or None,
            "candidate": timing.name,
            "median_us": figure(timing.median * 1e6, 4),
            "q1_us": figure(timing.q1 * 1e6, 4),
            "q3_us": figure(timing.q3 * 1e6, 4),
            "samples": timing.samples,
            "calls_per_sample": timing.calls,
            "bytes_per_call": result.bytes,
            "bandwidth_GB_per_s": figure(result.bandwidth(timing), 3),
            "ratio_to_copy": figure(result.ratio(timing, "copy"), 4),
            "ratio_to_ours": figure(result.ratio(timing, "ours"), 4),
            "ratio_to_empty": figure(result.ratio(timing, "empty kernel"), 4),
            "exact": timing.exact,
            "note": timing.note,
            **module_facts,
        }
        for timing in result.timings
    ]


def _as_json(lines: list[dict[str, Any]], host_timings: list[Timing], busy: str) -> str:
    host = [
        {"call": t.name, "median_us": t.median * 1e6, "q1_us": t.q1 * 1e6, "q3_us": t.q3 * 1e6}
        if t.measured
        else {"call": t.name, "note": t.note}
        for t in host_timings
    ]
    return json.dumps({"timings": lines, "host": host, "warning": busy}, indent=2)


def _print(
    results: list[tuple[KernelSpec, CaseResult]],
    host_timings: list[Timing],
    module_facts: dict[str, str],
    busy: str,
) -> None:
    from .output import (
        console,
        facts,
        microseconds,
        plural,
        table,
        timing_notes,
        timing_table,
    )

    printer = console()
    printer.print(facts(module_facts.items()))
    if busy:
        printer.print(f"\n{busy}")
    printer.print()
    for (spec, threads), group in itertools.groupby(results, lambda x: (x[0], x[1].threads)):
        title = spec.text + (f", {plural(threads, 'thread')}" if threads else "")
        printer.print(timing_table([result for _, result in group], title=title))
    for line in timing_notes([result for _, result in results]):
        printer.print(line)
    if host_timings:
        printer.print()
        m = 1 if results[0][1].threads else 16
        calls = table(f"One call from Python, M = {m}, outputs given", "µs", "quartiles")
        for timing in host_timings:
            spread = f"{microseconds(timing.q1)}-{microseconds(timing.q3)}"
            calls.add_row(
                timing.name,
                microseconds(timing.median) if timing.measured else timing.note,
                spread if timing.measured else "",
            )
        printer.print(calls)


def _cold(spec: KernelSpec, as_json: bool, busy: str) -> int:
    import dataclasses

    from ..host_costs import cold_costs
    from ..machine import cpu_name
    from .output import console, facts, size

    with console(stderr=True).status("fresh processes, one after the other"):
        cold: ColdCosts = cold_costs(spec)
    if as_json:
        click.echo(json.dumps({"spec": spec.text, **dataclasses.asdict(cold), "warning": busy}))
        return 0
    printer = console()
    lines = [
        ("machine", cpu_name()),
        ("spec", spec.text),
        ("import tvm", f"{cold.import_tvm:.2f} s"),
        ("compile and link", f"{cold.compile:.2f} s"),
        ("together", f"{cold.import_tvm + cold.compile:.2f} s"),
        ("import qknorm_tvm", f"{cold.import_qknorm * 1e3:.1f} ms, after numpy"),
        ("module", size(cold.module_bytes)),
    ]
    printer.print(facts(lines))
    printer.print(f"Medians of {cold.processes} fresh processes. {busy}")
    return 0
