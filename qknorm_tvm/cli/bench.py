"""``qknorm-tvm bench`` and ``bench-layer``."""

from __future__ import annotations

import datetime
import functools
import itertools
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ..operations import OPERATIONS
from ..spec import OPS
from .options import (
    Numbers,
    Shapes,
    check_device,
    check_folder,
    debug_option,
    device_option,
    dtype_choice,
    echo,
    is_given,
)

if TYPE_CHECKING:
    from ..bench.compare import Comparison
    from ..bench.harness import Measured
    from ..load.module import Module
    from ..spec import KernelSpec

#: What ``bench`` times; ``bench-layer`` times the others.
_APPLY = OPS[0]
#: What --report measures where nothing else is asked for: minutes, not a quarter of an hour.
_REPORT_ROWS = (1, 4, 16, 64, 256, 1024, 4096, 16384)
_REPORT_MIN_TIME = 0.3
#: Cases without a partner that --compare names; of more it says how many.
_SHOWN_CASES = 8
#: Options that say which specs are measured.
_SPECS = ("ops", "shapes", "dtypes", "out_dtype", "target", "head_dim", "rotary_dim")
#: Options that say where results go, not what is measured.
_PLACES = ("csv_file", "as_json", "report", "compare", "against")


def _common_options(command: Callable[..., int]) -> Callable[..., int]:
    """Add the options that say what is timed, where, and how long."""
    options = (
        click.option("--shapes", type=Shapes(), default="1536/256,6144/1024", show_default=True,
                     metavar="NQ/NK,...", help="Columns of Q and K."),
        click.option("--rows", type=Numbers(1), default="1,16,256,1024,4096,16384",
                     show_default=True, metavar="M,...", help="Values of M."),
        click.option("--threads", type=Numbers(1),
                     help="Numbers of threads.  [default: 1 and all]"),
        click.option("--module", "files", multiple=True, metavar="FILE.so",
                     type=click.Path(dir_okay=False, path_type=Path),
                     help="CUDA: time these, not what is compiled now; several times."),
        click.option("--min-time", type=click.FloatRange(0), default=0.5, show_default=True,
                     help="Seconds for each candidate."),
        click.option("--torch-compile/--no-torch-compile", default=True,
                     help="Time torch.compile too: it compiles for every shape."),
        click.option("--json", "as_json", is_flag=True, help="Print JSON instead of tables."),
    )  # fmt: skip
    return functools.reduce(lambda function, option: option(function), reversed(options), command)


@click.command(short_help="Time it against the alternatives.")
@_common_options
@click.option("--op", "ops", multiple=True, type=click.Choice(OPS), default=[_APPLY],
              show_default=True, metavar="OPERATION",
              help=f"One of {', '.join(OPS)}; several times.")  # fmt: skip
@click.option("--dtype", "dtypes", type=dtype_choice, multiple=True, default=["bfloat16"],
              show_default=True, help="Element type; may be given several times.")  # fmt: skip
@click.option("--out-dtype", type=dtype_choice, help="Of the outputs.  [default: dtype]")
@click.option("--target", help="What to generate code for.  [default: this CPU's level]")
@click.option("--head-dim", type=int, default=128, show_default=True,
              help="Rotation: columns of a head.")  # fmt: skip
@click.option("--rotary-dim", type=int, default=64, show_default=True,
              help="Rotation: a head's first columns that are rotated.")  # fmt: skip
@click.option("--config", "pairs", multiple=True, metavar="NAME=VALUE",
              help="A choice of the schedule, as for export.")  # fmt: skip
@click.option("--misaligned", is_flag=True,
              help="CUDA: rows that start at every alignment.")  # fmt: skip
@click.option("--host/--no-host", default=True, help="Time what a call at M = 1 costs.")
@click.option("--cold", is_flag=True,
              help="Only: compile and import times in fresh processes, and the size of a "
              "module.")  # fmt: skip
@click.option("--csv", "csv_file", type=click.Path(dir_okay=False, path_type=Path),
              metavar="FILE", help="Also write the timings there.")  # fmt: skip
@click.option("--report", type=click.Path(file_okay=False, path_type=Path), metavar="DIR",
              help="Also write CSV, pictures and a page there; more values of M.")  # fmt: skip
@click.option("--compare", type=click.Path(exists=True, dir_okay=False, path_type=Path),
              metavar="OLD.csv",
              help="Only: time its cases again and say what got slower.")  # fmt: skip
@click.option("--against", type=click.Path(exists=True, dir_okay=False, path_type=Path),
              metavar="NEW.csv", help="With --compare: two files, nothing is timed.")  # fmt: skip
@device_option
@debug_option
@click.pass_context
def bench(
    ctx: click.Context,
    device: str,
    threads: tuple[int, ...] | None,
    files: tuple[Path, ...],
    misaligned: bool,
    cold: bool,
    csv_file: Path | None,
    as_json: bool,
    report: Path | None,
    compare: Path | None,
    against: Path | None,
    **options: Any,
) -> int:
    """Check results, then time the loaded module against the alternatives, interleaved.

    \b
    ours           the module, outputs given
    copy           as many bytes, with as many threads
    NumPy, torch   the unfused graph, which allocates
    torch.compile  the graph compiled for this very shape
    scalar         the schedule with vector=1, row_tile=1;
                   LLVM still vectorises what it can

    With --device cuda: launches in a chain inside a CUDA graph, where the empty kernel is what a
    launch takes at least; copy is torch's copy_ of as many bytes, once for q and k together and
    once for each; buffers beyond L2 rotate.

    Each sample is a run of calls after as many that warm up; candidates take turns. Where torch is
    not installed, its lines say so. On CPUs outputs take turns in lying at 8 offsets from their
    inputs within a page, on which time depends; worst is the median at the slowest.

    --compare looks at the ratio of ours to the copy in the same run, and calls slower what is
    beyond the quartiles of both runs, and beyond 5 %.

    \b
    Examples:
      qknorm-tvm bench
      qknorm-tvm bench --shapes 1536/256 --rows 1,4096 \\
          --threads 1 --no-torch-compile
      qknorm-tvm bench --dtype bfloat16 --dtype float32 \\
          --csv bench.csv
      qknorm-tvm bench --op qk_rms_norm --rows 1,256
      qknorm-tvm bench --cold
      qknorm-tvm bench --device cuda --rows 1,64,1024
      qknorm-tvm bench --device cuda --module qk.so \\
          --shapes 1536/256
      qknorm-tvm bench --report before
      qknorm-tvm bench --compare before/results.csv
      qknorm-tvm bench --compare before/results.csv \\
          --against after/results.csv

    Exit status: 0, 1 when a result is not exact or got slower, 2 when the input is wrong.
    """
    if against is not None and compare is None:
        raise click.UsageError("--against needs --compare OLD.csv")
    if compare is not None and against is not None:
        return _compare_files(compare, against, as_json)
    check_device(device)
    if device == "cpu" and (files or misaligned):
        raise click.UsageError("--module and --misaligned are for --device cuda")
    if device == "cuda" and (threads or cold):
        raise click.UsageError("--threads and --cold are for --device cpu")
    if cold and (report or compare):
        raise click.UsageError("--cold excludes --report and --compare")
    _check_places(csv_file, report)
    from ..bench.compare import cases_of
    from ..bench.compare import compare as compare_runs
    from ..bench.plots import write_report
    from ..bench.report import read_csv, write_csv
    from ..machine import load_warning

    old = read_csv(compare) if compare is not None else []
    options.update(device=device, threads=threads, files=files, misaligned=misaligned)
    defaults: dict[str, Any] = {}
    if old:
        defaults = cases_of(old, on_gpu=device == "cuda")
        if report is None:  # what the comparison needs, and no more
            options.update(copy_only=True, host=False)
    elif report is not None:
        defaults = {"rows": _REPORT_ROWS, "min_time": _REPORT_MIN_TIME}
    options.update({name: x for name, x in defaults.items() if not is_given(ctx, name)})
    specs = _specs(device, **{name: options.pop(name) for name in _SPECS})
    busy = load_warning()
    if cold:
        return _cold(specs[0], as_json, busy)
    now = datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")
    measured = _measure(specs, {"command": _command(ctx), "date": now}, **options)
    written = []
    if csv_file is not None:
        write_csv(csv_file, measured.rows)
        written.append(csv_file)
    if report is not None:
        written += write_report(
            report, measured.rows, host_timings=measured.host_timings, warning=busy
        )
    comparison = compare_runs(old, measured.rows) if old else None
    if as_json:
        click.echo(_as_json(measured, busy, comparison))
    elif comparison is None:
        _print(measured, busy)
    else:
        _print_comparison(comparison, busy)
        if not measured.exact:
            echo("NOT EXACT: outputs differ from the unfused graph; see qknorm-tvm verify")
    for file in written if not as_json else ():
        echo(f"wrote {file}")
    return 0 if measured.exact and not (comparison and comparison.slower) else 1


@click.command(short_help="Time the statistics, and the fused layer.")
@_common_options
@click.option("--op", "ops", multiple=True, type=click.Choice(OPS[1:3]), default=OPS[1:3],
              show_default=True, help="Operation.")  # fmt: skip
@click.option("--dtype", type=dtype_choice, default="bfloat16", show_default=True,
              help="Element type.")  # fmt: skip
@device_option
@debug_option
@click.pass_context
def bench_layer(ctx: click.Context, dtype: str, **options: Any) -> int:
    """Check results, then time the statistics and the layer of one rank.

    \b
    ours           the module, outputs given
    copy           as many bytes, read and written together
    torch          operation by operation, as models do
    torch.compile  the graph compiled for this very shape

    With --device cuda, in chains inside CUDA graphs: beside an empty kernel too, and the layer as
    statistics and apply in two launches.

    Candidates take turns in one process. Exit status: 0, or 1 when a result is not exact.
    """
    status: int = ctx.invoke(bench, dtypes=(dtype,), host=False, **options)
    return status


def _specs(
    device: str,
    *,
    ops: Sequence[str],
    shapes: Sequence[tuple[int, int]],
    dtypes: Sequence[str],
    out_dtype: str | None,
    target: str | None,
    head_dim: int = 128,
    rotary_dim: int = 64,
) -> list[KernelSpec]:
    from ..spec import KernelSpec
    from .modules import target_for, with_op

    target = target_for(device, target)
    specs = [
        KernelSpec(
            in_dtype=dtype,
            out_dtype=out_dtype or dtype,
            q_cols=q_cols,
            k_cols=k_cols,
            target=target,
        )
        for dtype in dict.fromkeys(dtypes)
        for q_cols, k_cols in shapes
    ]
    if out_dtype is not None and any(OPERATIONS[op].rotates for op in ops):
        raise click.UsageError("--out-dtype is not for operations that rotate")
    heads = {"head_dim": head_dim, "rotary_dim": rotary_dim, "statistics": "local"}
    return [
        spec.replace(op=op, **heads) if OPERATIONS[op].rotates else with_op(spec, op)
        for op in dict.fromkeys(ops)
        for spec in specs
    ]


def _measure(
    specs: Sequence[KernelSpec],
    facts: Mapping[str, str],
    *,
    device: str,
    files: Sequence[Path],
    pairs: tuple[str, ...],
    torch_compile: bool,
    copy_only: bool = False,
    **options: Any,
) -> Measured:
    from ..bench.harness import measure_all
    from ..bench.timing import COPY, TORCH_COMPILE
    from ..bench.workload import BENCHMARKS
    from .modules import compile_module, facts_of, load_modules, module_of, with_op
    from .options import parse_config
    from .output import console

    config, given = parse_config(pairs, device), load_modules(files, device)

    def module_for(spec: KernelSpec) -> Module:
        if given:
            return module_of(given, spec)
        # Apart: what a module's search among several specs takes is not every module's. On a GPU
        # the operation's steps are timed beside it.
        steps = BENCHMARKS[spec.op].steps if device == "cuda" and config is None else ()
        return compile_module([spec, *(with_op(spec, op) for op in steps)], config)

    def is_timed(name: str) -> bool:
        return name == COPY if copy_only else torch_compile or name != TORCH_COMPILE

    with console(stderr=True).status("compiling") as status:
        return measure_all(
            specs,
            module_for=module_for,
            facts_of=lambda module: {**facts_of(module), **facts},
            is_timed=is_timed,
            status=status.update,
            **options,
        )


def _check_places(csv_file: Path | None, report: Path | None) -> None:
    """Refuse places that cannot be written to before time is spent on measuring."""
    if csv_file is not None:
        check_folder(csv_file)
    if report is not None:
        from ..bench.plots import need_matplotlib

        need_matplotlib()
        if not report.parent.is_dir():
            raise click.UsageError(f"{report}: the folder {report.parent} does not exist")


def _command(ctx: click.Context) -> str:
    """Return the command line, without options that only say where results go."""

    def text(value: Any) -> str:
        if isinstance(value, Path):
            return value.name  # the folder is this machine's business
        if isinstance(value, tuple):
            return ",".join(
                "/".join(map(str, x)) if isinstance(x, tuple) else str(x) for x in value
            )
        return f"{value:g}" if isinstance(value, float) else str(value)

    words = ["qknorm-tvm", "bench"]
    for option in ctx.command.params:
        assert isinstance(option, click.Option)
        assert option.name is not None
        if option.name in _PLACES or not option.expose_value or not is_given(ctx, option.name):
            continue
        value = ctx.params[option.name]
        if option.is_flag:
            words.append(option.opts[0] if value else option.secondary_opts[0])
            continue
        for item in value if option.multiple else [value]:
            words += [option.opts[0], text(item)]
    if ctx.params["report"] is not None:
        words += ["--report", "DIR"]
    if ctx.params["compare"] is not None:
        words += ["--compare", ctx.params["compare"].name]
    return " ".join(words)


def _compare_files(old: Path, new: Path, as_json: bool) -> int:
    from ..bench.compare import compare
    from ..bench.report import read_csv

    comparison = compare(read_csv(old), read_csv(new))
    if as_json:
        click.echo(json.dumps({"comparison": comparison.to_dict()}, indent=2))
    else:
        _print_comparison(comparison, "")
    return 1 if comparison.slower else 0


def _print_comparison(comparison: Comparison, busy: str) -> None:
    from ..bench.compare import METHOD
    from .output import console, plural, table

    printer = console()
    for line in filter(None, (busy, *comparison.differences)):
        printer.print(line)
    groups = itertools.groupby(comparison.changes, lambda change: change.row.title)
    for title, changes in groups:
        headers = ("M", "old / copy", "new / copy", "change", "noise", "")
        changed = table(*headers, title=title, left=(5,))
        for change in changes:
            changed.add_row(
                f"{change.row.rows:,}",
                *(f"{ratio.value:.2f}" for ratio in (change.old, change.new)),
                f"{change.change:+.1%}",
                f"{change.noise:.1%}",
                change.verdict.upper() if change.verdict == "slower" else change.verdict,
            )
        printer.print(changed)
    printer.print(METHOD)
    for name, cases in (("old", comparison.only_old), ("new", comparison.only_new)):
        for case in cases[:_SHOWN_CASES]:
            printer.print(f"no partner, only in the {name} run: {case}")
        if len(cases) > _SHOWN_CASES:
            printer.print(f"no partner, only in the {name} run: {len(cases) - _SHOWN_CASES} more")
    if comparison.unclear:
        count = plural(len(comparison.unclear), "case")
        printer.print(f"too much noise to tell: {count}; measure again on a quiet machine")
    slower = plural(len(comparison.slower), "case") if comparison.slower else "nothing"
    printer.print(f"slower beyond the noise: {slower} of {len(comparison.changes)}")
    for change in comparison.slower:
        printer.print(f"  {change.text}", soft_wrap=True)


def _as_json(measured: Measured, busy: str, comparison: Comparison | None) -> str:
    host = [
        {"call": t.name, "median_us": t.median * 1e6, "q1_us": t.q1 * 1e6, "q3_us": t.q3 * 1e6}
        if t.measured
        else {"call": t.name, "note": t.note}
        for t in measured.host_timings
    ]
    timings = [row.cells() for row in measured.rows]
    answer: dict[str, Any] = {"timings": timings, "host": host, "warning": busy}
    if comparison is not None:
        answer["comparison"] = comparison.to_dict()
    return json.dumps(answer, indent=2)


def _print(measured: Measured, busy: str) -> None:
    from ..bench.report import HOST_ROWS, groups_of, microseconds
    from .output import console, facts, table, timing_notes, timing_table

    printer, first = console(), measured.rows[0]
    names = ("device", "target", "config", "versions")
    printer.print(facts((name, getattr(first, name)) for name in names))
    if busy:
        printer.print(f"\n{busy}")
    printer.print()
    for rows in groups_of(measured.rows):
        printer.print(timing_table(rows, title=rows[0].title))
    for line in timing_notes(measured.rows):
        printer.print(line)
    if measured.host_timings:
        printer.print()
        m = HOST_ROWS[first.kind]
        calls = table(f"One call from Python, M = {m}, outputs given", "µs", "quartiles")
        for timing in measured.host_timings:
            median, q1, q3 = map(microseconds, (timing.median, timing.q1, timing.q3))
            cells = (median, f"{q1}-{q3}") if timing.measured else (timing.note, "")
            calls.add_row(timing.name, *cells)
        printer.print(calls)


def _cold(spec: KernelSpec, as_json: bool, busy: str) -> int:
    import dataclasses

    from ..bench.cold_costs import cold_costs
    from ..machine import cpu_name
    from .output import console, facts, size

    with console(stderr=True).status("fresh processes, one after the other"):
        cold = cold_costs(spec)
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
