"""``qknorm-tvm export``."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import click

from ..operations import OPERATIONS
from ..spec import CHOICES, OPS
from .options import (
    Columns,
    check_module_path,
    choice_options,
    debug_option,
    dtype_choice,
    is_given,
    parse_config,
    refuse_unused,
    spec_choices,
)


@click.command(short_help="Compile to a .so.")
@click.argument("out", metavar="OUT.so", type=click.Path(dir_okay=False, path_type=Path))
@click.option("--op", "ops", multiple=True, type=click.Choice(OPS), default=[OPS[0]],
              show_default=True, metavar="OPERATION",
              help=f"One of {', '.join(OPS)}; several in one file.")  # fmt: skip
@click.option("--q-cols", type=Columns(), default="any", show_default=True, help="Columns of Q.")
@click.option("--k-cols", type=Columns(), default="any", show_default=True, help="Columns of K.")
@click.option("--dtype", type=dtype_choice, default="bfloat16", show_default=True,
              help="Element type of q and k.")  # fmt: skip
@click.option(
    "--out-dtype", type=dtype_choice, help="Element type of the outputs.  [default: dtype]"
)
@click.option("--target", default="cpu", show_default=True,
              help="cpu (x86-64-v2, v3 and v4 in one file, chosen when it is loaded), one such "
              "level, a CPU's LLVM name such as znver4, aarch64, cuda, or "
              "cuda:sm_90,... .")  # fmt: skip
@click.option("--arch", "archs", metavar="sm_80,sm_90,...",
              help="Code for these GPUs: short for --target cuda:sm_80,sm_90,...")  # fmt: skip
@choice_options
@click.option("--spec", "texts", multiple=True, metavar="TEXT",
              help="A whole spec, as inspect prints it; instead of the options above. May be "
              "given several times: the module picks one by the dtypes and columns of a "
              "call.")  # fmt: skip
@click.option("--config", "pairs", multiple=True, metavar="NAME=VALUE",
              help="A choice of the schedule, such as vector=16; what is not given is the "
              "heuristic's. One that makes no difference to the code is refused.")  # fmt: skip
@debug_option
@click.pass_context
def export(
    ctx: click.Context,
    out: Path,
    ops: tuple[str, ...],
    q_cols: int | None,
    k_cols: int | None,
    dtype: str,
    out_dtype: str | None,
    target: str,
    archs: str | None,
    texts: tuple[str, ...],
    pairs: tuple[str, ...],
    **choices: Any,
) -> None:
    """Compile apply_qk_rms_norm, or the operations that --op names, and write them to OUT.so.

    The file runs with apache-tvm-ffi alone, from Python or C++, for any number of rows:

    \b
      import tvm_ffi
      module = tvm_ffi.load_module("./OUT.so")
      module.apply_qk_rms_norm(
          q_out, k_out, gamma_q, gamma_k, qk_var, q, k, 1e-6)

    Columns that are given are fixed: faster, and the call is checked against them.

    \b
    Examples:
      qknorm-tvm export qk.so --q-cols 1536 --k-cols 256
      qknorm-tvm export qk.so --dtype float16
      qknorm-tvm export qk.so --target x86-64-v3
      qknorm-tvm export qk.so --target aarch64
      qknorm-tvm export qk.so --arch sm_80,sm_90
      qknorm-tvm export qk.so --config vector=16
      qknorm-tvm export qk.so \\
          --op row_mean_of_squares_qk --op apply_qk_rms_norm
      qknorm-tvm export attention.so \\
          --op qk_rms_norm_rope_cache --q-cols 1536 \\
          --k-cols 256 --head-dim 128 --rotary-dim 64
      qknorm-tvm export qk.so --spec \\
          'qk_rms_norm[float16->float32, q=64, k=any]@cpu'
    """
    from ..call.compiled import compile
    from ..spec import KernelSpec

    if archs is not None:
        if is_given(ctx, "target") and target != "cuda":
            raise click.UsageError(f"--arch names GPUs, and --target is {target}: give one of them")
        target = f"cuda:{archs}"
    if texts:
        _refuse_fields(ctx)
        specs = [KernelSpec.from_text(text) for text in texts]
    else:
        fields = spec_choices(choices)
        refuse_unused(ops, fields)
        specs = []
        for op in dict.fromkeys(ops):
            own = {name: x for name, x in fields.items() if name in OPERATIONS[op].spec_fields}
            if out_dtype is not None and OPERATIONS[op].normalises:
                own["out_dtype"] = out_dtype
            specs.append(
                KernelSpec(
                    op=op, in_dtype=dtype, q_cols=q_cols, k_cols=k_cols, target=target, **own
                )
            )
    check_module_path(out)
    config = parse_config(pairs, specs[0].parsed_target.kind)
    start = time.perf_counter()
    compiled = compile(specs, config=config)
    compiled.export(out)
    seconds = time.perf_counter() - start

    from .inspect_file import describe
    from .output import console, size

    printer = console()
    written = size(out.stat().st_size)
    printer.print(f"wrote {out} ({written}) in {seconds:.1f} s", soft_wrap=True)
    printer.print(describe(out, compiled.metadata))


def _refuse_fields(ctx: click.Context) -> None:
    names = ("ops", "q_cols", "k_cols", "dtype", "out_dtype", "target", "archs")
    for name in (*names, *(choice.name for choice in CHOICES)):
        if is_given(ctx, name):
            option = "--" + {"archs": "arch", "ops": "op"}.get(name, name.replace("_", "-"))
            raise click.UsageError(f"{option} and --spec exclude each other: put it into the spec")
