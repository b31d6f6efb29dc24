"""The harness of the GPU's fuzz test, tried without a GPU: on this CPU, and on CUDA's refusals.

``QKNORM_TVM_CAMPAIGN=1`` draws more of these.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import cuda_code
import numpy as np
import pytest
import test_rope
from fuzz_cases import Elsewhere, FuzzCase, Region
from fuzz_device import Call, Fuzz, Placed, run_cases
from support import open_columns, statistics_and_fused

from qknorm_tvm import load
from qknorm_tvm.call import arrays, cache

pytest.importorskip("torch", reason="calls with torch tensors, and torch is not installed")

pytestmark = pytest.mark.frameworks


@pytest.fixture
def served(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Let the API be served from other modules for one test."""
    monkeypatch.setattr(cache, "_given", [])
    monkeypatch.setattr(cache, "_loaded", {})
    cache.forget_entries()
    yield
    cache.forget_entries()


def _modules() -> list[Path]:
    """Return the modules of all operations; of those that rotate what `test_rope` compiles too."""
    rotating = [cache.module_for(spec).path for spec in test_rope.SPECS]
    return [open_columns(), statistics_and_fused("bfloat16"), *rotating]


def test_modules_for_cpus() -> None:
    """A harness that fails where nothing is wrong, and so would be of no use on a GPU."""
    done = run_cases("cpu", 0, 400, _modules())
    assert min(done["exact"], done["refused"]) > 60, done


class _Corrupting(Fuzz):
    """Changes one byte of the buffer after each call."""

    def check(self, case: FuzzCase, placed: Placed, call: Call) -> None:
        written = np.zeros(case.size, bool)
        for name in case.kind.op.outputs if call.legal else ():
            if name in case.regions:
                written[case.regions[name].bytes()] = True
        beside = np.flatnonzero(~written)
        self._byte = int(np.random.default_rng(case.seed).choice(beside))
        super().check(case, placed, call)

    def fetch(self, tensor: Any) -> np.ndarray:
        copy = super().fetch(tensor).copy()
        if copy.dtype == np.uint8:
            copy[self._byte] ^= 1
        return copy


@pytest.mark.usefixtures("served")
def test_one_byte_is_seen() -> None:
    """A stray write that goes unnoticed: then exact cases and refused ones say nothing."""
    fuzz = _Corrupting([load(path) for path in _modules()], "cpu")
    for number in range(60):
        with pytest.raises(AssertionError, match=f"case {number} of") as failed:
            fuzz.run(number)
        assert re.search("beside the outputs|a refused call wrote", str(failed.value.__cause__))


class _NoDevice(Fuzz):
    """Calls modules for CUDA on a device that no machine has: they check all, and run nothing."""

    def __init__(self, modules: Any):
        super().__init__(modules, "cuda")
        self.device, self.where = "cpu", (2, 99)

    def _tensor(self, placed: Placed, name: str, region: Region) -> Any:
        tensor = placed.given[name]
        return Elsewhere(tensor.array, address=tensor.address, device=tensor.device)

    def check(self, case: FuzzCase, placed: Placed, call: Call) -> None:
        if call.legal and case.rows:
            with pytest.raises(RuntimeError, match=r"^cuda:99 cannot run this module: "):
                call.function()
            self.done["exact"] += 1
        elif call.legal:
            call.function()
        else:
            super().check(case, placed, call)


@pytest.mark.usefixtures("served")
def test_what_modules_for_cuda_refuse(monkeypatch: pytest.MonkeyPatch) -> None:
    """A call that the documentation allows and a module for CUDA refuses, or the other way."""
    paths = [cuda_code.built(name).path for name in ("apply", "statistics", "rope")]
    monkeypatch.setattr(arrays, "cuda_target", lambda index: cuda_code.SM_90)
    fuzz = _NoDevice([load(path) for path in paths])
    count = 2000 if os.environ.get("QKNORM_TVM_CAMPAIGN") else 200
    for number in range(count):
        fuzz.run(number)
    assert min(fuzz.done["exact"], fuzz.done["refused"]) > count // 10, fuzz.done
    assert fuzz.done["many rows"] > count // 50, fuzz.done
