"""``qknorm-tvm bench-layer``."""

from __future__ import annotations

import functools
import itertools
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from .options import Numbers, Shapes, check_device, debug_option, device_option, dtype_choice

if TYPE_CHECKING:
    from ..bench.timing import CaseResult
    from ..load.module import Module
    from ..spec import KernelSpec
    from .measure import Measured

_OPS = ("row_mean_of_squares_qk", "qk_rms_norm")
_CPU_METHOD = (
    "Times in µs. worst: with outputs at the slowest of 8 offsets from their inputs in a page. "
    "/floor: ours over the floor. torch, compile: unfused torch's and torch.compile's time over "
    "ours."
)
_CUDA_METHOD = (
    "µs: median of a launch in a chain inside a CUDA graph, candidates taking turns; buffers "
    "beyond L2 rotate. copy: one torch copy_ that reads and writes, together, as many bytes as the "
    "operation. two launches: statistics, then apply. exact: statistics equal to NumPy in the "
    "stated order, outputs to unfused torch given those."
)


@click.command(short_help="Time the statistics, and the fused layer.")
@click.option("--op", "ops", multiple=True, type=click.Choice(_OPS), default=_OPS,
              show_default=True, metavar="OPERATION",
              help="What to time; may be given several times.")  # fmt: skip
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
    floor          statistics: a sum over the same bytes;
                   layer: a copy of them
    torch          operation by operation, as models do
    torch.compile  the graph compiled for this very shape

    With --device cuda, in chains inside CUDA graphs: beside an empty kernel, a copy that moves as
    many bytes, and the layer as statistics and apply in two launches.

    Candidates take turns in one process. Exit status: 0, or 1 when a result is not exact.
    """
    check_device(device)
    on_gpu = device == "cuda"
    if on_gpu and threads:
        raise click.UsageError("--threads is for --device cpu")
    if not on_gpu and files:
        raise click.UsageError("--module is for --device cuda")
    from ..bench.timing import TORCH_COMPILE
    from ..bench.workload import BENCHMARKS
    from ..operations import OPERATIONS
    from ..spec import KernelSpec
    from .measure import measure
    from .modules import compile_module, load_modules, module_of, target_for

    target, given = target_for(device, None), load_modules(files, device)
    specs = [
        KernelSpec(op=op, in_dtype=dtype, q_cols=q_cols, k_cols=k_cols, target=target)
        for op, (q_cols, k_cols) in itertools.product(dict.fromkeys(ops), shapes)
    ]

    @functools.cache
    def all_operations(spec: KernelSpec) -> Module:
        return compile_module(
            [spec.replace(op=op, out_dtype=None) for op in OPERATIONS if not OPERATIONS[op].rotates]
        )

    def module_for(spec: KernelSpec) -> Module:
        if given:
            return module_of(given, spec)
        if not on_gpu:
            return compile_module([spec])
        # For two launches beside one.
        return all_operations(spec.replace(op="qk_rms_norm", out_dtype=None))

    def names(spec: KernelSpec) -> list[str]:
        candidates = BENCHMARKS[spec.op].candidates[device]
        return [name for name in candidates if torch_compile or name != TORCH_COMPILE]

    measured = measure(
        specs, rows, module_for=module_for, names=names, min_time=min_time, threads=threads
    )
    if as_json:
        cases = [{"op": spec.op, **result.to_dict()} for spec, result in measured.cases]
        click.echo(json.dumps(cases, indent=2))
    else:
        _print(measured, on_gpu)
    return 0 if measured.exact else 1


def _print(measured: Measured, on_gpu: bool) -> None:
    from ..bench.report import notes_of
    from ..machine import load_warning
    from .output import console, facts, plural, table

    printer = console()
    shown = measured.facts if on_gpu else {x: measured.facts[x] for x in ("device", "versions")}
    printer.print(facts(shown.items()))
    if not on_gpu and load_warning():
        printer.print(f"\n{load_warning()}")
    groups = itertools.groupby(measured.cases, lambda case: (case[0], case[1].threads))
    for (spec, threads), cases in groups:
        title = f"{spec.op} {spec.q_cols}/{spec.k_cols} {spec.in_dtype}"
        title += f", {plural(threads, 'thread')}" if threads else ""
        lines = [(_cuda_cells if on_gpu else _cpu_cells)(result) for _, result in cases]
        made = table(*lines[0], title=title)
        for cells in lines:
            made.add_row(*cells.values())
        printer.print(made)
    printer.print(_CUDA_METHOD if on_gpu else _CPU_METHOD)
    if not on_gpu:
        timings = [
            (r.rows, t.name, t.note, t.measured) for _, r in measured.cases for t in r.timings
        ]
        for note in notes_of(timings):
            printer.print(note)


def _common_cells(result: CaseResult, digits: int) -> dict[str, Any]:
    from .output import microseconds

    ours = result.timings[0]
    return {
        "M": f"{result.rows:,}",
        "ours": microseconds(ours.median),
        "quartiles": f"{microseconds(ours.q1)}-{microseconds(ours.q3)}",
        "worst": microseconds(ours.worst),
        "GB/s": f"{result.bandwidth(ours):.{digits}f}",
    }


def _cuda_cells(result: CaseResult) -> dict[str, str]:
    """Return header -> cell: times of all candidates."""
    from ..bench.timing import COPY, EMPTY
    from .output import microseconds, ratio

    ours, *others = result.timings
    cells = _common_cells(result, digits=0)
    del cells["worst"]
    cells |= {t.name: microseconds(t.median) if t.measured else "" for t in others}
    cells["/empty"] = ratio(result.ratio(ours, EMPTY))
    cells["/copy"] = ratio(result.ratio(ours, COPY))
    cells["exact"] = "yes" if all(t.exact is not False for t in result.timings) else "NO"
    return cells


def _cpu_cells(result: CaseResult) -> dict[str, str]:
    """Return header -> cell: ours and the floor, and the others' times over ours."""
    from ..bench.timing import FLOOR, OURS, TORCH, TORCH_COMPILE
    from .output import microseconds, ratio

    def over_ours(name: str) -> str:
        timing = result.timing(name)
        return ratio(result.ratio(timing, OURS)) if timing else ""

    ours, floor = result.timings[0], result.timing(FLOOR)
    return {
        **_common_cells(result, digits=1),
        "floor": microseconds(floor.median) if floor else "",
        "/floor": ratio(result.ratio(ours, FLOOR)),
        "torch": over_ours(TORCH),
        "compile": over_ours(TORCH_COMPILE),
        "exact": "yes" if ours.exact else "NO",
    }
