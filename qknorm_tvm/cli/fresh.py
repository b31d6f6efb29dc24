"""A process of its own for the proof of ``run``: a JSON request in, JSON lines out."""

from __future__ import annotations

import contextlib
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
    """Have a fresh Python process do `run.prove` and return what it answers.

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


def _main() -> None:
    from .run import prove

    # What libraries print must not get between the lines of the answer.
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)

    def say(**what: Any) -> None:
        answers.write(json.dumps(what) + "\n")

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
