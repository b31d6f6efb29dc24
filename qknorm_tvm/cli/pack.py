"""``qknorm-tvm pack``."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import click

from ..models import MODELS, STAGES
from .options import Names, Numbers, debug_option, echo


class Targets(Names):
    """Targets separated by commas; ``cuda:sm_80,sm_90`` is one."""

    name = "targets"

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> tuple[str, ...]:
        targets: list[str] = []
        for name in super().convert(value, param, ctx):
            if name.startswith("sm_") and targets and targets[-1].startswith("cuda:"):
                targets[-1] += f",{name}"
            else:
                targets.append(name)
        return tuple(targets)


@click.command(short_help="Compile a model's modules.")
@click.argument("out", metavar="OUT", type=click.Path(file_okay=False, path_type=Path))
@click.option("--models", type=Names(), required=True, metavar="NAME,...",
              help=f"Of {', '.join(MODELS)}.")  # fmt: skip
@click.option("--tensor-parallel", "ranks", type=Numbers(1), default="1,2,4,8",
              show_default=True, metavar="N,...", help="Numbers of ranks.")  # fmt: skip
@click.option("--targets", type=Targets(), default="cpu", show_default=True, metavar="TARGET,...",
              help="As for export: cpu,cuda:sm_90 makes two modules of each.")  # fmt: skip
@click.option("--operations", type=Names(), default="norm", show_default=True,
              metavar="NAME,...",
              help=f"Of {', '.join(STAGES)}: the norm and its statistics; norm and rotation in one "
              "launch; these and the store in a paged cache.")  # fmt: skip
@click.option("--wheel", "wheel_folder", metavar="FOLDER",
              type=click.Path(file_okay=False, path_type=Path),
              help="Write an installable wheel of it there too.")  # fmt: skip
@debug_option
def pack(
    out: Path,
    models: tuple[str, ...],
    ranks: tuple[int, ...],
    targets: tuple[str, ...],
    operations: tuple[str, ...],
    wheel_folder: Path | None,
) -> int:
    """Compile every module that the layers of some models need into the folder OUT.

    The Python API takes modules from it before it compiles, where QKNORM_TVM_MODULES names the
    folder or the wheel is installed. There neither TVM nor a compiler is needed:

    \b
      pip install qknorm-tvm
      export QKNORM_TVM_MODULES=/path/to/OUT

    OUT must be new or empty. It gets an index of its files, specs and checksums.

    \b
    Examples:
      qknorm-tvm pack modules --models minimax-m2
      qknorm-tvm pack modules --models olmo2-7b,olmo2-32b \\
          --tensor-parallel 1,2 --targets cpu,cuda:sm_90
      qknorm-tvm pack modules --models minimax-m2 --wheel dist
    """
    from .. import packing
    from .output import console, plural, size

    plan = packing.plan(models, ranks, targets, operations)
    if not out.parent.is_dir():
        raise click.UsageError(f"{out}: the folder {out.parent} does not exist")
    if wheel_folder is not None:
        packing.machine_of(plan)  # refuses what no wheel can hold, before time is spent
    for sentence in plan.impossible:
        echo(f"skipped: {sentence}", err=True)
    start, done = time.perf_counter(), 0
    with console(stderr=True).status("importing TVM") as status:

        def show(name: str) -> None:
            nonlocal done
            done += 1
            status.update(f"compiling {done} of {len(plan.modules)}: {name}")

        packing.build(plan, out, show)
    seconds = time.perf_counter() - start
    files = list(out.glob("*.so"))
    printer = console()
    total = size(sum(path.stat().st_size for path in files))
    text = f"wrote {plural(len(files), 'module')} ({total}) to {out} in {seconds:.0f} s"
    printer.print(text, soft_wrap=True)
    if wheel_folder is not None:
        wheel = packing.write_wheel(out, plan, wheel_folder)
        printer.print(f"wrote {wheel} ({size(wheel.stat().st_size)})", soft_wrap=True)
    return 0
