"""What ``run`` does in a process of its own: a JSON request in, JSON lines out."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable
from typing import Any

from ..errors import QKNormError


def call_fresh_process(request: dict[str, Any], status: Callable[[str], None]) -> dict[str, Any]:
    """Have a fresh Python process do `prove` and return what it answers.

    Parameters
    ----------
    request : dict
        JSON-ready.
    status : callable
        Told what the process says it is doing.

    Raises
    ------
    QKNormError
        The process failed; the message is its error's, or says which signal ended it.
    """
    with tempfile.TemporaryFile("w+") as complaints:
        process = subprocess.Popen(
            [sys.executable, "-m", "qknorm_tvm.cli.fresh"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=complaints,
            text=True,
        )
        assert process.stdin is not None
        assert process.stdout is not None
        answer: dict[str, Any] = {}
        try:
            with contextlib.suppress(BrokenPipeError):
                process.stdin.write(json.dumps(request))
                process.stdin.close()
            for line in process.stdout:
                said = json.loads(line)
                if "event" in said:
                    status(said["event"])
                else:
                    answer = said
            code = process.wait()
        except BaseException:
            process.kill()
            process.wait()
            raise
        if "result" in answer:
            result: dict[str, Any] = answer["result"]
            return result
        complaints.seek(0)
        tail = complaints.read()[-2000:].strip()
    if "error" in answer:
        raise QKNormError(f"in the fresh process: {answer['error']}")
    how = f"was ended by {signal.Signals(-code).name}" if code < 0 else f"exited with {code}"
    raise QKNormError(f"the fresh process {how}" + (f":\n{tail}" if tail else ""))


def prove(request: dict[str, Any], event: Callable[[str], None]) -> dict[str, Any]:
    """Check and time a module: the part of ``run`` that the fresh process does."""
    from ..bench.harness import compare, workload
    from ..bench.timing import SCALAR, TORCH_COMPILE, TWO_COPIES
    from ..bench.workload import BENCHMARKS
    from ..check.inputs import generate, read_activations
    from ..check.rope_inputs import with_model_inputs
    from ..load.module import load
    from ..spec import KernelSpec
    from .modules import facts_of
    from .options import check_device

    spec = KernelSpec.from_text(request["spec"])
    kind = spec.parsed_target.kind
    check_device(kind)
    module = load(request["module"])
    options = {}
    if kind == "cpu":
        library = module.library
        options["threads"] = request["threads"] or library.get_function("qknorm_get_num_threads")()
    left_out = {SCALAR, TWO_COPIES} | ({TORCH_COMPILE} if not request["torch_compile"] else set())
    names = [name for name in BENCHMARKS[spec.op].candidates(kind) if name not in left_out]
    facts, rows = facts_of(module), []
    for m in request["rows"]:
        event(f"M = {m}")
        if request["input"]:
            a = read_activations(request["input"])
        else:
            columns = request["q_cols"], request["k_cols"]
            a = generate(m, *columns, request["dtype"], seed=request["seed"])
        a = dataclasses.replace(a, epsilon=request["epsilon"])
        if spec.operation.rotates:
            a = with_model_inputs(spec, a)
        rows += compare(
            workload(spec, module, a, **options),
            names,
            facts,
            min_time=request["min_time"],
            status=lambda text, m=m: event(f"M = {m}: {text}"),  # type: ignore[misc]
        )
    return {
        "compiler_loaded": "tvm" in sys.modules,
        "source": a.source,
        "notes": list(a.notes),
        "rows": [dataclasses.asdict(row) for row in rows],
    }


def _main() -> None:
    # What libraries print must not get between the lines of the answer.
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)

    def say(**message: Any) -> None:
        answers.write(json.dumps(message) + "\n")

    request = json.load(sys.stdin)
    try:
        say(result=prove(request, lambda text: say(event=text)))
    except (QKNormError, ValueError, TypeError, OSError) as error:
        import traceback

        traceback.print_exc()
        say(error=str(error))
        sys.exit(2)


if __name__ == "__main__":
    _main()
