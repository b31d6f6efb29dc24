"""What a call costs the host, and what compiling and importing cost: the fixed times."""

from __future__ import annotations

import dataclasses
import json
import statistics
import subprocess
import sys
from typing import Any

from ..call import api
from ..check.calls import module_arguments
from ..check.inputs import aligned_empty, generate
from ..check.reference_torch import to_torch, torch_or_none
from ..load.module import Module
from ..spec import KernelSpec
from . import alternatives
from .timing import Candidate, Timing, measure


def host_costs(module: Module, spec: KernelSpec, *, min_time: float) -> list[Timing]:
    """Time calls at M = 1, outputs given, by every way to call.

    Parameters
    ----------
    module : Module
        Holds `spec`.
    spec : KernelSpec
        With fixed columns and equal in and out dtypes.
    min_time : float
        Seconds for each way.

    Returns
    -------
    list of Timing
        The loaded module with tvm-ffi's tensors and with torch's, the public API with NumPy's
        arrays and with torch's.
    """
    a = generate(1, spec.q_cols or 1536, spec.k_cols or 256, spec.in_dtype)
    q_out, k_out = aligned_empty(a.q.shape, a.q.dtype), aligned_empty(a.k.shape, a.k.dtype)
    alternatives.set_num_threads(module, 1)
    inputs = (a.q, a.k, a.qk_var, a.gamma_q, a.gamma_k)

    def public(q_out: Any, k_out: Any, q: Any, k: Any, var: Any, gamma_q: Any, gamma_k: Any) -> Any:
        return lambda: api.apply_qk_rms_norm(
            q, k, var, gamma_q, gamma_k, 1e-6, q_out=q_out, k_out=k_out
        )

    function = module.apply_qk_rms_norm
    candidates = [
        Candidate("module, tvm-ffi tensors", function, module_arguments(a, q_out, k_out)),
        Candidate("API, NumPy arrays", public(q_out, k_out, *inputs)),
    ]
    torch = torch_or_none()
    missing = "" if torch else alternatives.NOT_INSTALLED
    by_module = Candidate("module, torch tensors", None, note=missing)
    by_api = Candidate("API, torch tensors", None, note=missing)
    if torch:
        q, k, var, gamma_q, gamma_k = tensors = [to_torch(x) for x in inputs]
        outs = to_torch(q_out), to_torch(k_out)
        by_module.function = function
        by_module.arguments = (*outs, gamma_q, gamma_k, var, q, k, a.epsilon)
        by_api.function = public(*outs, *tensors)
    return measure([candidates[0], by_module, candidates[1], by_api], min_time=min_time)


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
    found = []
    for _ in range(processes):
        done = subprocess.run(
            [sys.executable, "-c", _SCRIPT, spec.text], capture_output=True, text=True, check=False
        )
        if done.returncode:
            raise RuntimeError(f"compiling in a fresh process failed:\n{done.stderr[-2000:]}")
        found.append(json.loads(done.stdout.splitlines()[-1]))
    import_tvm, compiling, import_qknorm, sizes = zip(*found, strict=True)
    return ColdCosts(
        statistics.median(import_tvm),
        statistics.median(compiling),
        statistics.median(import_qknorm),
        sizes[0],
        processes,
    )
