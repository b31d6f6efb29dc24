"""``qknorm-tvm bench-layer``."""

from __future__ import annotations

import itertools
import json
from typing import TYPE_CHECKING, Any

import click

from .options import Numbers, Shapes, debug_option, dtype_choice

if TYPE_CHECKING:
    from ..benchmark import CaseResult

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
@click.option("--json", "as_json", is_flag=True, help="Print JSON instead of tables.")
@debug_option
def bench_layer(
    ops: tuple[str, ...],
    shapes: tuple[tuple[int, int], ...],
    rows: tuple[int, ...],
    dtype: str,
    threads: tuple[int, ...] | None,
    min_time: float,
    torch_compile: bool,
    as_json: bool,
) -> int:
    """Check results, then time the statistics and the layer of one rank, on this CPU.

    \b
    ours           the module, outputs given
    floor          statistics: a sum over the same bytes; layer: a copy of them
    torch          operation by operation, as models do
    torch.compile  the graph compiled for this very shape

    Candidates take turns in one process. Exit status: 0, or 1 when a result is not exact.
    """
    from ..benchmark_layer import compare_layer
    from ..inputs import generate
    from ..machine import load_warning, usable_processors
    from ..spec import KernelSpec
    from ..targets import host_cpu_target
    from .output import console, plural

    results: list[tuple[str, CaseResult]] = []
    counts = threads or sorted({1, usable_processors()})
    with console(stderr=True).status("compiling") as status:
        from ..build import compile

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
        click.echo(json.dumps([{"op": op, **one.to_dict()} for op, one in results], indent=2))
    else:
        _print(results, load_warning())
    return 0 if all(one.exact for _, one in results) else 1


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
