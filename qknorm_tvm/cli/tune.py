"""``qknorm-tvm tune``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from ..spec import CHOICES, OPS
from ..tuning.api import COST_MODELS, ROWS
from .options import (
    Numbers,
    Shapes,
    choice_options,
    debug_option,
    dtype_choice,
    refuse_unused,
    spec_choices,
)


@click.command(short_help="Search for faster configs on this device, or on a fleet.")
@click.option("--target", default="cpu", show_default=True,
              help="cpu (the best level that the device runs), a level such as x86-64-v3, a CPU's "
              "LLVM name, cuda (this machine's GPU) or one architecture such as "
              "cuda:sm_90.")  # fmt: skip
@click.option("--op", type=click.Choice(OPS), default=OPS[0], show_default=True,
              metavar="OPERATION", help=f"One of {', '.join(OPS)}.")  # fmt: skip
@click.option("--shapes", type=Shapes(), metavar="Nq/Nk,...",
              help="Columns to tune.  [default: one rank of MiniMax-M2, OLMo-2 7B and 32B on 1, 2, "
              "4 and 8 ranks]")  # fmt: skip
@click.option("--dtype", type=dtype_choice, default="bfloat16", show_default=True,
              help="Element type of q and k.")  # fmt: skip
@click.option("--out-dtype", type=dtype_choice,
              help="Element type of q_out and k_out.  [default: dtype]")  # fmt: skip
@choice_options
@click.option("--rows", type=Numbers(least=1), default=",".join(map(str, ROWS)), show_default=True,
              help="Row counts to tune for; each speaks for those around it.")  # fmt: skip
@click.option("--trials", type=int, default=64, show_default=True,
              help="Most candidates for a shape and row count; recorded ones count.")  # fmt: skip
@click.option("--seed", type=int, default=0, show_default=True, help="Seed of the search.")
@click.option("--cost-model", type=click.Choice(COST_MODELS), default="auto", show_default=True,
              help="auto: xgb where xgboost is installed.")  # fmt: skip
@click.option("--logs", type=click.Path(file_okay=False, path_type=Path),
              help="Folder of logs; the build reads them there.  [default: "
              "$QKNORM_TVM_TUNING_LOGS, a checkout's tuning_logs, or the user's own]")  # fmt: skip
@click.option("--tracker", metavar="HOST:PORT", help="Measure on the servers of a TVM RPC tracker.")
@click.option("--key", help="Key under which they are registered.")
@click.option("--workers", type=int, default=1, show_default=True,
              help="Servers to use at a time.")  # fmt: skip
@click.option("--device", metavar="NAME",
              help="Name of the device's folder, such as x86_64-znver4.  [default: found out]"
              )  # fmt: skip
@debug_option
def tune(
    op: str,
    shapes: tuple[tuple[int, int], ...] | None,
    dtype: str,
    out_dtype: Any,
    **options: Any,
) -> int:
    """Search for configs that are faster than the default's, and keep them for the build.

    Candidates are proven exact before they are timed, and kept only where they beat the default by
    more than the noise, in fresh processes and wherever they would serve. Interrupt it at will: the
    same command goes on where it was.

    \b
    Examples:
      # this CPU, all default shapes
      qknorm-tvm tune
      # one shape, a minute
      qknorm-tvm tune --shapes 1536/256 --rows 1,64
      # another operation, this machine's GPU
      qknorm-tvm tune --target cuda --op qk_rms_norm
      qknorm-tvm tune --op qk_rms_norm_rope_cache \\
          --head-dim 128 --rotary-dim 64
      # four servers of a fleet
      qknorm-tvm tune --tracker 127.0.0.1:9190 --key epyc \\
          --workers 4
    """
    from ..machine import load_warning
    from ..spec import KernelSpec
    from ..targets import parse_target
    from ..tuning import tune as run
    from ..tuning.api import default_shapes
    from ..tuning.report import Reporter
    from .output import console

    out = console()
    kind = "cuda" if parse_target(options["target"]).kind == "cuda" else "cpu"
    choices = spec_choices(options)
    refuse_unused([op], choices)
    options = {name: options[name] for name in options.keys() - {choice.name for choice in CHOICES}}
    specs = [
        KernelSpec(
            op=op, in_dtype=dtype, out_dtype=out_dtype, q_cols=q, k_cols=k, target=kind, **choices
        )
        for q, k in shapes or default_shapes()
    ]
    if options["tracker"] is None and load_warning():
        out.print(f"note: {load_warning()}")
    with out.status("") as status:

        class Screen(Reporter):
            """What is done above, and how far it is, live, on the last line of a terminal."""

            def line(self, text: str) -> None:
                out.print(text)

            def status(self, text: str) -> None:
                status.update(text)

        try:
            summary = run(specs, reporter=Screen(), **options)
        except KeyboardInterrupt:
            out.print("interrupted; what was measured is kept: run the same command again to go on")
            return 130
    kept = sum(outcome.source == "record" for outcome in summary.outcomes)
    out.print(
        f"{kept} of {len(summary.outcomes)} keep a record; the others keep the default, which "
        "nothing beat by more than the noise"
    )
    if summary.failed:
        out.print(f"{summary.failed} candidates failed, the first: {summary.first_failure}")
    out.print(
        f"{summary.measured} trials in {summary.seconds / 60:.1f} minutes, {summary.reused} from "
        f"earlier sessions; logs: {summary.folder}"
    )
    return 0
