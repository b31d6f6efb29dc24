"""Measuring CUDA candidates: launches in a CUDA graph, as in a decode step, through torch."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from ..check.inputs import Activations
from ..check.reference_torch import to_numpy, to_torch
from .measure import Bench, Plan

#: Launches in a graph.
_LAUNCHES = 40
#: Sets of buffers taken in turn where one does not fit half the L2 cache: none is found warm.
_SETS = 3


class CudaBench(Bench):
    """Measures candidates of one spec and row count on the GPU.

    The time of a launch is that of a graph of launches, one after the other, divided by their
    number. Buffers that fit L2 are reused, as a model finds its activations there; others are taken
    in turn.

    Parameters
    ----------
    spec : KernelSpec
    rows : int
        M.
    """

    _storage_types: Mapping[str, str] = {}

    def _make_device(self) -> Any:
        import torch

        return torch.device("cuda", 0)

    def load(self, path: str) -> Any:
        """Load a candidate."""
        import tvm_ffi

        return tvm_ffi.load_module(path)

    def call(self, module: Any) -> Any:
        """Return a module's entry point."""
        return module.get_function(self.spec.op)

    def _scalars(self) -> list[Any]:
        return [1e-6] if self.spec.operation.has_epsilon else []

    def _tensor(self, array: npt.NDArray) -> Any:
        return to_torch(np.ascontiguousarray(array)).to(self.device, copy=True)

    def _array(self, tensor: Any) -> npt.NDArray:
        return to_numpy(tensor.cpu())

    def _expected(self, case: Activations) -> tuple[npt.NDArray, ...]:
        from ..check.verification_cuda import expected_outputs

        return expected_outputs(self.spec, case, str(self.device))

    def _allocate(self, size: int) -> Any:
        """Return as many allocations as are taken in turn."""
        import torch

        cache = 0
        if self.device.type == "cuda":
            cache = getattr(torch.cuda.get_device_properties(0), "L2_cache_size", 0)
        count = 1 if 2 * size <= (cache or 40_000_000) else _SETS
        # Half-precision numbers from 1 to 10: normal ones too when they are read as other types.
        values = [
            torch.empty(size // 2, dtype=torch.float16, device=self.device).uniform_(1, 10)
            for _ in range(count)
        ]
        return [value.view(torch.uint8) for value in values]

    def _view(self, arena: Any, shape: tuple[int, ...], dtype: str, start: int) -> Any:
        import torch

        element = getattr(torch, dtype)
        size = math.prod(shape) * element.itemsize
        return [part[start : start + size].view(element).view(shape) for part in arena]

    def _graph(self, module: Any, layout: int) -> Any:
        import torch

        # Of each tensor as many as are taken in turn.
        sets = [[*tensors, *self._scalars()] for tensors in zip(*self.tensors(layout), strict=True)]
        function = self.call(module)
        side = torch.cuda.Stream()
        with torch.cuda.stream(side):
            for arguments in sets:
                function(*arguments)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=side):
            for index in range(_LAUNCHES):
                function(*sets[index % len(sets)])
        return graph

    def _time(self, graph: Any, replays: int) -> float:
        """Return seconds of a launch."""
        import torch

        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        for _ in range(replays):
            graph.replay()
        end.record()
        end.synchronize()
        return float(start.elapsed_time(end)) / 1e3 / replays / _LAUNCHES

    def _prepare(self, module: Any, layout: int, plan: Plan) -> Any:
        graph = self._graph(module, layout)
        # The first replay uploads the graph.
        self._time(graph, 1)
        once = self._time(graph, 3) * _LAUNCHES
        replays = max(2, round(plan.sample_ms / 1e3 / once))

        def sample() -> float:
            self._time(graph, 1)  # runs in the wake of another kernel's
            return self._time(graph, replays)

        return sample
