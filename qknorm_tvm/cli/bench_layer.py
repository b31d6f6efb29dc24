"""``qknorm-tvm bench-layer``."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from .options import Numbers, Shapes, check_device, debug_option, device_option, dtype_choice

if TYPE_CHECKING:
    from ..bench.timing import CaseResult, Timing

_OPS = ("row_mean_of_squares_qk", "qk_rms_norm")


@click.command(short_help="Time the statistics, and the fused layer.")
@click.option("--op", "ops", multiple=True, type=click.Choice(_OPS), default=_OPS,
              show_default=True, help="Operation.")  # fmt: skip
@click.option("--shapes", type=Shapes(), default="1536/256,6144/1024", show_default=True,
              metavar="NQ/NK,...", help="Columns of Q and K.")  # fmt: skip
@click.option("--rows", type=Numbers(1), default="1,16,256,1024,4096,16384", show_default=True,
              metavar="M,...", help="Values of M.")  # fmt: skip
@click.option("--dtype", type=dtype_choice, default="bfloat16", show_default=True,
              help="Element type.")  # fmt: skip
@click.option("--threads", type=Numbers(1), help="Numbers of threads.  [default: 1 and all]")
@click.option("--min-time", type=click.FloatRange(0), default=0.5, show_default=True,
              help="Seconds for each candidate.")  # fmt: skip
@click.option("--torch-compile/--no-torch-compile", default=True,
              help="Time torch.compile too: it compiles for every shape.")  # fmt: skip
@click.option("--module", "files", multiple=True, metavar="FILE.so",
              type=click.Path(dir_okay=False, path_type=Path),
              help="CUDA: time these, not what is compiled now; several times.")  # fmt: skip
@click.option("--json", "as_json", is_flag=True, help="Print JSON instead of tables.")
@device_option
@debug_option
def bench_layer(
    ops: tuple[str, ...],
    shapes: tuple[tuple[int, int], ...],
    rows: tuple[int, ...],
    dtype: str,
    threads: tuple[int, ...] | None,
    min_time: float,
    torch_compile: bool,
    files: tuple[Path, ...],
    as_json: bool,
    device: str,
) -> int:
    """Check results, then time the statistics and the layer of one rank.

    \b
    ours           the module, outputs given
    floor          statistics: a sum over the same bytes; layer: a copy of them
    torch          operation by operation, as models do
    torch.compile  the graph compiled for this very shape

    With --device cuda, in chains inside CUDA graphs: beside an empty kernel, a copy that moves as
    many bytes, and the layer as statistics and apply in two launches.

    Candidates take turns in one process. Exit status: 0, or 1 when a result is not exact.
    """
    check_device(device)
    if device == "cuda":
        if threads:
            raise click.UsageError("--threads is for --device cpu")
        from .cuda import measure_layer_cuda

        found, about = measure_layer_cuda(ops, shapes, dtype, rows, files, min_time, torch_compile)
        if as_json:
            click.echo(json.dumps(_as_dicts(found), indent=2))
        else:
            _print_cuda(found, about)
        return 0 if all(one.exact for _, one in found) else 1
    if files:
        raise click.UsageError("--module is for --device cuda")
    from ..bench.layer import compare_layer
    from ..check.inputs import generate
    from ..machine import load_warning, usable_processors
    from ..spec import KernelSpec
    from ..targets import host_cpu_target
    from .output import console, plural

    results: list[tuple[str, CaseResult]] = []
    counts = threads or sorted({1, usable_processors()})
    with console(stderr=True).status("compiling") as status:
        from ..call.compiled import compile

        for op, (q_cols, k_cols) in itertools.product(dict.fromkeys(ops), shapes):
            spec = KernelSpec(
                op=op, in_dtype=dtype, q_cols=q_cols, k_cols=k_cols, target=host_cpu_target()
            )
            compiled = compile(spec)
            for count, m in itertools.product(counts, rows):
                where = f"{op} {q_cols}/{k_cols}, {plural(count, 'thread')}, M = {m}"
                result = compare_layer(
                    op,
                    compiled.module,
                    generate(m, q_cols, k_cols, dtype),
                    threads=count,
                    min_time=min_time,
                    torch_compile=torch_compile,
                    status=lambda text, where=where: status.update(  # type: ignore[misc]
                        f"{where}: {text}"
                    ),
                )
                results.append((op, result))
    if as_json:
        click.echo(json.dumps(_as_dicts(results), indent=2))
    else:
        _print(results, load_warning())
    return 0 if all(one.exact for _, one in results) else 1


def _as_dicts(results: list[tuple[str, CaseResult]]) -> list[dict[str, Any]]:
    return [{"op": op, **one.to_dict()} for op, one in results]


def _print_cuda(results: list[tuple[str, CaseResult]], about: dict[str, str]) -> None:
    from ..bench.layer_cuda import METHOD
    from .output import console, facts, microseconds, ratio, table

    printer = console()
    printer.print(facts(about.items()))
    key: Any = lambda x: (x[0], x[1].q_cols, x[1].k_cols, x[1].in_dtype)  # noqa: E731
    for (op, q_cols, k_cols, dtype), group in itertools.groupby(results, key):
        cases = [result for _, result in group]
        names = [timing.name for timing in cases[0].timings]
        others = [name for name in names if name != "ours"]
        made = table(
            "M", "ours", "quartiles", "GB/s", *others, "/empty", "/copy", "exact",
            title=f"{op} {q_cols}/{k_cols} {dtype}",
        )  # fmt: skip
        for result in cases:
            ours = result.timings[0]

            def shown(name: str, result: CaseResult = result) -> str:
                timing: Timing | None = result.timing(name)
                return microseconds(timing.median) if timing else ""

            made.add_row(
                f"{result.rows:,}",
                microseconds(ours.median),
                f"{microseconds(ours.q1)}-{microseconds(ours.q3)}",
                f"{result.bandwidth(ours):.0f}",
                *map(shown, others),
                ratio(result.ratio(ours, "empty kernel")),
                ratio(result.ratio(ours, "copy")),
                "yes" if all(t.exact is not False for t in result.timings) else "NO",
            )
        printer.print(made)
    printer.print(METHOD)


def _print(results: list[tuple[str, CaseResult]], busy: str) -> None:
    from ..machine import cpu_name, library_versions
    from .output import console, facts, microseconds, plural, ratio, table

    printer = console()
    versions = ", ".join(f"{k} {v}" for k, v in library_versions().items())
    printer.print(facts([("device", cpu_name()), ("versions", versions)]))
    if busy:
        printer.print(f"\n{busy}")
    key: Any = lambda x: (x[0], x[1].q_cols, x[1].k_cols, x[1].in_dtype, x[1].threads)  # noqa: E731
    for (op, q_cols, k_cols, dtype, threads), group in itertools.groupby(results, key):
        made = table(
            "M", "ours", "quartiles", "GB/s", "floor", "/floor", "torch", "compile", "exact",
            title=f"{op} {q_cols}/{k_cols} {dtype}, {plural(threads, 'thread')}",
        )  # fmt: skip
        for _, result in group:
            ours = result.timings[0]
            floor = result.timing("floor")

            def times(name: str, result: CaseResult = result) -> str:
                timing = result.timing(name)
                return ratio(result.ratio(timing, "ours")) if timing else ""

            made.add_row(
                f"{result.rows:,}",
                microseconds(ours.median),
                f"{microseconds(ours.q1)}-{microseconds(ours.q3)}",
                f"{result.bandwidth(ours):.1f}",
                microseconds(floor.median) if floor else "",
                ratio(result.ratio(ours, "floor")),
                times("torch"),
                times("torch.compile"),
                "yes" if ours.exact else "NO",
            )
        printer.print(made)
    printer.print(
        "Times in µs. /floor: ours over the floor. torch, compile: unfused torch's and "
        "torch.compile's time over ours."
    )
    for note in dict.fromkeys(
        f"{t.name}: {t.note}" for _, r in results for t in r.timings if t.note
    ):
        printer.print(note)
