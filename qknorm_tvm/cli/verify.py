"""``qknorm-tvm verify``."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from .options import check_device, debug_option, device_option

if TYPE_CHECKING:
    from ..check.verification import Report
    from ..load.module import Module


@click.command(short_help="Compare with the unfused graph, bit for bit.")
@click.argument("files", nargs=-1, metavar="[FILE.so]...", type=click.Path(path_type=Path))
@click.option("--target", "targets", multiple=True,
              help="Compile for this instead of this CPU's level; may be given several "
              "times.")  # fmt: skip
@click.option("--thorough", is_flag=True,
              help="More columns, rows and gammas, and every x86-64 level that this CPU runs: "
              "minutes.")  # fmt: skip
@click.option("--float32-sweep", is_flag=True,
              help="Instead: all 2^32 float32 patterns through four mean squares and gammas, to "
              "every output type: minutes.")  # fmt: skip
@device_option
@debug_option
def verify(
    files: tuple[Path, ...],
    targets: tuple[str, ...],
    thorough: bool,
    float32_sweep: bool,
    device: str,
) -> int:
    """Compare outputs with the unfused float32 graph in NumPy, and torch's where it is installed.

    Every bit counts; of NaNs only the position. The cases: every bfloat16 and float16 pattern (of
    float32, those around which rounding turns, and NaNs with every payload bit set) under zero,
    negative, denormal, huge, infinite and NaN mean squares and gammas; odd columns and rows; packed
    arrays, slices of a fused QKV buffer, addresses off by one byte, in place; one thread and all.
    Memory around the outputs must stay as it was.

    With FILE.so the specs in it are checked, in the code that this machine runs; otherwise a module
    for every pairing of dtypes with open columns, and one with fixed columns, compiled now.

    With --device cuda the same cases run on the GPU, addresses off by one element instead of a
    byte, and must equal torch's graph on that GPU; reproducible specs must equal NumPy's.

    \b
    Examples:
      qknorm-tvm verify
      qknorm-tvm verify qk.so --thorough
      qknorm-tvm verify --target x86-64-v2
      qknorm-tvm verify --device cuda
      qknorm-tvm verify --float32-sweep

    Exit status: 0, 1 when anything differs, 2 when the input is wrong.
    """
    check_device(device)
    if files and (targets or float32_sweep):
        given = "--target" if targets else "--float32-sweep"
        raise click.UsageError(f"{given} and FILE.so exclude each other")
    if float32_sweep:
        if device != "cpu":
            raise click.UsageError("--float32-sweep is for --device cpu")
        return _sweep(targets)
    if device == "cuda" and len(targets) > 1:
        raise click.UsageError("--target may be given once for --device cuda")
    from .modules import load_modules

    start = time.perf_counter()
    modules = load_modules(files, device) or _compiled(device, targets, thorough)
    report = _verified(modules, device, thorough)
    return _print_report(report, modules, time.perf_counter() - start, device)


def _levels(device: str, targets: tuple[str, ...], thorough: bool) -> list[str]:
    from ..targets import X86_LEVELS, host_features, host_machine
    from .modules import target_for

    if targets:
        return list(dict.fromkeys(target_for(device, target) for target in targets))
    if thorough and device == "cpu" and host_machine() == "x86_64":
        return [name for name, needed in X86_LEVELS.items() if host_features().issuperset(needed)]
    return [target_for(device, None)]


def _compiled(device: str, targets: tuple[str, ...], thorough: bool) -> list[Module]:
    from ..check.verification import default_specs
    from .modules import compile_module
    from .output import console

    modules = []
    with console(stderr=True).status("importing TVM") as status:
        for target in _levels(device, targets, thorough):
            for specs in default_specs(target):
                status.update(f"compiling {len(specs)} specs for {target}")
                modules.append(compile_module(specs))
    return modules


def _verified(modules: list[Module], device: str, thorough: bool) -> Report:
    from ..check import verification, verification_cuda
    from ..machine import usable_processors
    from .output import console

    where: verification.Device = verification_cuda.Cuda()
    if device == "cpu":
        where = verification.Cpu(sorted({1, usable_processors()}))
    report = verification.Report()
    cases = list(verification.iterate(modules, where, thorough=thorough))
    with progress_bar(console(stderr=True)) as progress:
        task = progress.add_task("verifying", total=len(cases))
        for module, case in cases:
            progress.update(task, description=case.description)
            verification.run_case(module, case, where, report)
            progress.advance(task)
    return report


def progress_bar(printer: Any) -> Any:
    """Return a progress bar that disappears at its end."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
    from rich.progress import TimeRemainingColumn as Remaining

    columns = (BarColumn(24), MofNCompleteColumn(), Remaining(), TextColumn("{task.description}"))
    return Progress(*columns, console=printer, transient=True)


def _print_report(report: Report, modules: list[Module], seconds: float, device: str) -> int:
    from ..check.reference_torch import torch_or_none
    from ..machine import cpu_name
    from .output import console, facts, table

    printer = console()
    specs = [spec for module in modules for spec in module.specs]
    has_torch = torch_or_none() is not None
    on_gpu = device == "cuda"
    levels = list(dict.fromkeys(module.active_level for module in modules))
    lines = [
        ("machine", _gpu_name() if on_gpu else cpu_name()),
        ("code run", ", ".join(levels)),
        ("specs", specs[0].text if len(specs) == 1 else f"{len(specs)} in {len(modules)} modules"),
        ("took", f"{seconds:.1f} s"),
    ]
    printer.print(facts(lines))
    # Without torch no column for it: the names of the cases need the width.
    by_torch = ["!= torch"] if has_torch else []
    counts = table("case", "calls", "elements", "!= NumPy", *by_torch, "stray writes")
    for name, tally in report.groups.items():
        counts.add_row(
            name,
            f"{tally.checks:,}",
            f"{max(tally.elements, tally.torch_elements):,}",
            f"{tally.from_numpy:,}" if tally.elements else "not compared",
            *([f"{tally.from_torch:,}"] if has_torch else []),
            f"{tally.stray_writes:,}",
        )
    printer.print(counts)
    if on_gpu:
        printer.print("Compared with torch's graph on this GPU; reproducible specs with NumPy's.")
    elif has_torch:
        printer.print("torch's graph is compared once for each set of inputs, NumPy's every call.")
    else:
        printer.print("torch is not installed: compared with NumPy's graph alone.")
    return _print_verdict(report.first_difference)


def _print_verdict(first_difference: str | None) -> int:
    from .output import console

    printer = console()
    if first_difference is None:
        printer.print("EXACT: every output equals the unfused float32 graph bit for bit.")
        return 0
    printer.print("NOT EXACT. First difference:")
    printer.print(first_difference, soft_wrap=True)
    return 1


def _gpu_name() -> str:
    from ..bench.cuda import device_facts

    return ", ".join(device_facts().values())


def _sweep(targets: tuple[str, ...]) -> int:
    from ..check import sweep
    from ..check.reference_torch import torch_or_none
    from ..machine import cpu_name, usable_processors
    from .modules import compile_module
    from .output import console, facts

    progress_printer = console(stderr=True)
    with progress_printer.status("compiling"):
        module = compile_module(sweep.sweep_specs(_levels("cpu", targets, False)[0]))
    start = time.perf_counter()
    with progress_bar(progress_printer) as progress:
        task = progress.add_task("float32 patterns", total=1 << 32)
        result = sweep.sweep(
            module,
            workers=usable_processors(),
            progress=lambda patterns: progress.advance(task, patterns),
        )
    pairs = "; ".join(f"{var:g}, {gamma:g}" for call in sweep.PAIRS for var, gamma in call)
    by = "torch's rounding" if torch_or_none() else "NumPy's rounding"
    lines = {
        "machine": cpu_name(),
        "code run": module.active_level,
        "inputs": f"all {1 << 32:,} float32 patterns; mean square, gamma: {pairs}",
        "outputs": f"{', '.join(sweep.OUT_DTYPES)}; float16 expected by {by}",
        "compared": f"{result.compared:,} elements, {result.different:,} differ",
        "took": f"{time.perf_counter() - start:.0f} s",
    }
    console().print(facts(lines.items()))
    return _print_verdict(result.first_difference)
