"""``qknorm-tvm run``: the whole story on one machine."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ..operations import OPERATIONS
from ..spec import CHOICES, OPS
from .options import (
    Numbers,
    check_device,
    check_module_path,
    choice_options,
    debug_option,
    device_option,
    dtype_choice,
    is_given,
    refuse_unused,
    spec_choices,
)

if TYPE_CHECKING:
    from ..bench.report import Row
    from ..call.compiled import CompiledModule
    from ..spec import KernelSpec

#: MiniMax-M2's Q and K of one rank at tensor parallel 4.
Q_COLS, K_COLS, ROWS = 1536, 256, (1, 16, 512, 4096)
#: Its heads.
HEADS = {"head_dim": 128, "rotary_dim": 64}


@click.command(short_help="Compile, prove, time.")
@click.option("--op", type=click.Choice(OPS), default=OPS[0], show_default=True,
              metavar="OPERATION", help=f"One of {', '.join(OPS)}.")  # fmt: skip
@click.option("--input", "input_file", type=click.Path(path_type=Path), metavar="FILE",
              help="Real activations: .safetensors or .npz with q, k, gamma_q, gamma_k and "
              "perhaps qk_var. Shapes and dtype are the file's.")  # fmt: skip
@click.option("--q-cols", type=click.IntRange(1), help=f"Columns of Q.  [default: {Q_COLS}]")
@click.option("--k-cols", type=click.IntRange(1), help=f"Columns of K.  [default: {K_COLS}]")
@click.option("--dtype", type=dtype_choice, help="Element type of q and k.  [default: bfloat16]")
@click.option(
    "--out-dtype", type=dtype_choice, help="Element type of the outputs.  [default: dtype]"
)
@choice_options
@click.option("--rows", type=Numbers(0),
              help=f"Values of M.  [default: {','.join(map(str, ROWS))}]")  # fmt: skip
@click.option("--epsilon", type=float, default=1e-6, show_default=True,
              help="Added to the mean squares.")  # fmt: skip
@click.option("--target", help="What to generate code for.  [default: this CPU's level]")
@device_option
@click.option("--output", type=click.Path(dir_okay=False, path_type=Path), metavar="OUT.so",
              help="Where to write the module.  [default: the user's cache folder]")  # fmt: skip
@click.option("--module", "module_file", type=click.Path(dir_okay=False, path_type=Path),
              metavar="FILE.so", help="Use a module exported before.")  # fmt: skip
@click.option("--threads", type=click.IntRange(1),
              help="Threads to use.  [default: every processor of this process]")  # fmt: skip
@click.option("--seed", type=click.IntRange(0), help="For random activations.  [default: 0]")
@click.option("--min-time", type=click.FloatRange(0), default=0.3, show_default=True,
              help="Seconds to time each candidate for.")  # fmt: skip
@click.option("--torch-compile/--no-torch-compile", default=True,
              help="Time torch.compile too, where torch is installed.")  # fmt: skip
@debug_option
@click.pass_context
def run(
    ctx: click.Context,
    op: str,
    input_file: Path | None,
    device: str,
    output: Path | None,
    module_file: Path | None,
    target: str | None,
    epsilon: float,
    threads: int | None,
    min_time: float,
    torch_compile: bool,
    **given: Any,
) -> int:
    """Compile for this machine, export, load the .so in a fresh process, prove and time it there.

    The fresh process has the file and apache-tvm-ffi, not the compiler. In it the outputs must
    equal the unfused NumPy graph bit for bit, and the unfused torch graph where torch is installed.
    Then the module is timed, interleaved, against a copy of the same bytes, both graphs and
    torch.compile. With --device cuda all of that happens on the GPU: equal to unfused torch on that
    GPU, timed inside a CUDA graph.

    Without options: the Q and K projections of MiniMax-M2 on one rank at tensor parallel 4, with
    its heads where the operation rotates. What that takes besides is made: positions and slots in
    any order, angles as a model's.

    \b
    Examples:
      qknorm-tvm run
      qknorm-tvm run --q-cols 6144 --k-cols 1024 --rows 1,256
      qknorm-tvm run --dtype float16 --output qk.so
      qknorm-tvm run --input activations.safetensors
      qknorm-tvm run --device cuda
      qknorm-tvm run --op qk_rms_norm_rope_cache

    Exit status: 0, 1 when a result is not exact, 2 when the input is wrong or something cannot be
    built.
    """
    check_device(device)
    request = _request(input_file, given)
    request.update(
        epsilon=epsilon,
        threads=threads or 0,
        min_time=min_time,
        torch_compile=torch_compile,
    )
    from ..spec import KernelSpec
    from .modules import need_compiler, target_for

    choices = spec_choices(given)
    refuse_unused([op], choices)
    if OPERATIONS[op].rotates:
        heads = {name: x for name, x in HEADS.items() if not is_given(ctx, name)}
        choices = {**choices, **heads}
    spec = KernelSpec(
        op=op,
        in_dtype=request["dtype"],
        out_dtype=given["out_dtype"],
        q_cols=request["q_cols"],
        k_cols=request["k_cols"],
        target=target_for(device, target),
        **choices,
    )
    if module_file is not None and not module_file.is_file():
        raise click.UsageError(f"{module_file}: no such file")
    request.update(spec=spec.text)

    from .output import console

    progress = console(stderr=True)
    with progress.status("importing TVM") as status:
        path, seconds = module_file, None
        if path is None:
            need_compiler("give --module FILE.so, exported")
            path, seconds = _export(spec, output, status.update)
        request["module"] = str(path.absolute())
        from .fresh import call_fresh_process

        answer = call_fresh_process(request, status.update)
    return _report(spec, path, seconds, answer)


def _request(input_file: Path | None, given: dict[str, Any]) -> dict[str, Any]:
    """Return the shapes to run, from the options or from the file, which is checked here."""
    if input_file is None:
        return {
            "input": None,
            "q_cols": given["q_cols"] or Q_COLS,
            "k_cols": given["k_cols"] or K_COLS,
            "dtype": given["dtype"] or "bfloat16",
            "rows": given["rows"] or ROWS,
            "seed": given["seed"] or 0,
        }
    for name in ("q_cols", "k_cols", "dtype", "rows", "seed"):
        if given[name] is not None:
            option = "--" + name.replace("_", "-")
            raise click.UsageError(f"{option} and --input exclude each other: the file decides")
    from ..check.inputs import read_activations

    a = read_activations(input_file)
    return {
        "input": str(input_file.absolute()),
        "q_cols": a.q_cols,
        "k_cols": a.k_cols,
        "dtype": a.dtype,
        "rows": [a.rows],
    }


def _export(spec: KernelSpec, output: Path | None, status: Any) -> tuple[Path, float]:
    if output is not None:
        check_module_path(output)
    # Imported apart: what the import of the compiler takes is not what compiling takes.
    import tvm  # noqa: F401

    from ..call.compiled import compile

    status("compiling")
    start = time.perf_counter()
    with compile(spec) as compiled:
        path = _keep(compiled, spec) if output is None else compiled.export(output)
        return path, time.perf_counter() - start


def _keep(compiled: CompiledModule, spec: KernelSpec) -> Path:
    """Export a module to the cache, or where that cannot be written to a temporary folder."""
    from ..call.cache import cache_directory

    # Choices have no place in a name; its digest does.
    choices = any(getattr(spec, choice.name) != choice.default for choice in CHOICES)
    name = "-".join(
        [spec.op, f"{spec.q_cols}x{spec.k_cols}", spec.in_dtype, spec.out_dtype, spec.target]
        + [spec.digest] * choices
    )
    name += ".so"
    try:
        folder = cache_directory() / "run"
        folder.mkdir(mode=0o700, exist_ok=True)
        return compiled.export(folder / name)
    except OSError:
        # It stays: the module is printed as the command's result.
        return compiled.export(Path(tempfile.mkdtemp(prefix="qknorm-tvm-run-"), name))


def _report(spec: KernelSpec, path: Path, seconds: float | None, answer: dict[str, Any]) -> int:
    from ..bench.report import Row
    from ..machine import load_warning, usable_processors
    from .output import console, facts, plural, size, timing_notes, timing_table

    printer = console()
    rows = [Row(**fields) for fields in answer["rows"]]
    about = rows[0]
    on_gpu, threads = about.kind == "cuda", about.threads
    how = "given" if seconds is None else f"compiled in {seconds:.1f} s"
    how += f", {size(path.stat().st_size)}"
    lines = {"spec": spec.text}
    if on_gpu:
        lines["device"] = about.device
        how += f", code for {about.target}"
    else:
        lines["machine"] = f"{about.device}, {threads} of {usable_processors()} processors"
        lines["target"] = f"{spec.target}; runs its {about.target} code"
        lines["config"] = about.config
    lines["versions"] = about.versions
    lines["inputs"] = "; ".join([answer["source"], *answer["notes"]])
    lines["module"] = how
    printer.print(facts(lines.items()))
    printer.print(f"module    {path}", soft_wrap=True)
    printer.print()
    exact = _print_proof(rows, with_compiler=answer["compiler_loaded"])
    title = "Time in a CUDA graph" if on_gpu else f"Time, {plural(threads, 'thread')}"
    printer.print(timing_table(rows, title=title))
    for line in [*timing_notes(rows), "" if on_gpu else load_warning()]:
        if line:
            printer.print(line)
    if not exact:
        printer.print("\nNOT EXACT: outputs differ from the unfused graph, see the tables above")
    return 0 if exact else 1


def _print_proof(rows: Sequence[Row], *, with_compiler: bool) -> bool:
    """Print whether outputs equal each of the graphs; returns whether all do."""
    from ..bench.timing import OURS, TORCH
    from .output import console, table

    on_gpu = rows[0].kind == "cuda"
    graphs = ["torch graph on this GPU"] if on_gpu else ["NumPy graph", "torch graph"]
    compiler = "with" if with_compiler else "without"
    title = f"Outputs, bit for bit, in a fresh process {compiler} the compiler"
    proof = table("M", "elements", *graphs, title=title)
    words = {True: "equal", False: "DIFFERS", None: "not installed"}
    if any(row.candidate == TORCH and row.measured for row in rows):
        words[None] = "sums in another order"
    exact = True
    by_torch = {row.rows: row.exact for row in rows if row.candidate == TORCH and row.measured}
    for row in rows:
        if row.candidate != OURS:
            continue
        equal = [row.exact]
        if not on_gpu:
            # Both are compared with NumPy: torch equals ours where both equal that.
            torch_equal = by_torch.get(row.rows)
            equal.append(None if torch_equal is None else row.exact and torch_equal)
        exact = exact and False not in equal
        elements = row.rows * (row.q_cols + row.k_cols)
        proof.add_row(f"{row.rows:,}", f"{elements:,}", *(words[answer] for answer in equal))
    console().print(proof)
    return exact
