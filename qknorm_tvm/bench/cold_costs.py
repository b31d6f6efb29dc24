"""What compiling and importing cost, in fresh processes."""

from __future__ import annotations

import dataclasses
import json
import statistics
import subprocess
import sys

from ..spec import KernelSpec


@dataclasses.dataclass
class ColdCosts:
    """Medians over fresh processes, in seconds; `module_bytes` is a single-level file's size."""

    import_tvm: float
    compile: float
    import_qknorm: float
    module_bytes: int
    processes: int


_SCRIPT = """
import json, sys, time
import numpy
start = time.perf_counter()
import qknorm_tvm
import_qknorm = time.perf_counter() - start
assert "tvm" not in sys.modules
start = time.perf_counter()
import tvm
import_tvm = time.perf_counter() - start
spec = qknorm_tvm.KernelSpec.from_text(sys.argv[1])
start = time.perf_counter()
compiled = qknorm_tvm.compile(spec)
took = time.perf_counter() - start
print(json.dumps([import_tvm, took, import_qknorm, compiled.path.stat().st_size]))
"""


def cold_costs(spec: KernelSpec, *, processes: int = 3) -> ColdCosts:
    """Measure imports and a compilation in fresh processes.

    Parameters
    ----------
    spec : KernelSpec
    processes : int
        How many, one after the other.

    Raises
    ------
    RuntimeError
        A process failed.
    """
    times = []
    for _ in range(processes):
        done = subprocess.run(
            [sys.executable, "-c", _SCRIPT, spec.text], capture_output=True, text=True, check=False
        )
        if done.returncode:
            raise RuntimeError(f"compiling in a fresh process failed:\n{done.stderr[-2000:]}")
        times.append(json.loads(done.stdout.splitlines()[-1]))
    import_tvm, compiling, import_qknorm, sizes = zip(*times, strict=True)
    return ColdCosts(
        statistics.median(import_tvm),
        statistics.median(compiling),
        statistics.median(import_qknorm),
        sizes[0],
        processes,
    )
