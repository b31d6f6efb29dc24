"""Measuring CUDA candidates: launches in a CUDA graph, as in a decode step, through torch."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from ..check.inputs import Activations
from ..check.reference_torch import to_numpy, to_torch
from ..spec import KernelSpec
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

    def __init__(self, spec: KernelSpec, rows: int):
        self._graphs: list[Any] = []
        super().__init__(spec, rows)

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

    def _storage(self, array: npt.NDArray) -> npt.NDArray:
        return array

    def _tensor(self, array: npt.NDArray) -> Any:
        return to_torch(np.ascontiguousarray(array)).to(self.device, copy=True)

    def _array(self, tensor: Any) -> npt.NDArray:
        return to_numpy(tensor.cpu())

    def _scalars(self) -> list[Any]:
        return [1e-6] if self.spec.operation.has_epsilon else []

    def _expected(self, case: Activations) -> tuple[npt.NDArray, ...]:
        from ..check.verification_cuda import expected_outputs

        return expected_outputs(self.spec, case, str(self.device))

    def arguments(self) -> list[Any]:
        """Return sets of arguments for the timed calls."""
        if self._timed is None:
            import torch

            spec = self.spec
            assert spec.q_cols is not None
            assert spec.k_cols is not None
            out_bytes = spec.out_bytes if spec.operation.normalises else 0
            size = self.rows * (spec.q_cols + spec.k_cols) * (spec.in_bytes + out_bytes)
            properties = torch.cuda.get_device_properties(0)
            cache = getattr(properties, "L2_cache_size", 0) or 40_000_000
            count = 1 if 2 * size <= cache else _SETS
            self._timed = [
                [*map(self._made, spec.operation.tensors), *self._scalars()] for _ in range(count)
            ]
        return self._timed

    def _made(self, name: str) -> Any:
        """Return a tensor for the timed calls."""
        import torch

        spec = self.spec
        if name == "qk_var":
            return torch.ones(self.rows, 2, device=self.device)
        operand = name.removeprefix("gamma_").removesuffix("_out")
        cols = {"q": spec.q_cols, "k": spec.k_cols}[operand]
        assert cols is not None
        if name.startswith("gamma_"):
            return torch.ones(cols, device=self.device)
        dtype = getattr(torch, spec.in_dtype if name == operand else str(spec.out_dtype))
        made = torch.empty(self.rows, cols, dtype=dtype, device=self.device)
        return made.normal_() if name == operand else made

    def _graph(self, module: Any) -> Any:
        import torch

        function, sets = self.call(module), self.arguments()
        side = torch.cuda.Stream()
        with torch.cuda.stream(side):
            for one in sets:
                function(*one)
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

    def _replays(self, graph: Any, plan: Plan) -> int:
        # The first replay uploads the graph.
        self._time(graph, 1)
        once = self._time(graph, 3) * _LAUNCHES
        return max(2, round(plan.sample_ms / 1e3 / once))

    def seconds(self, module: Any, plan: Plan) -> list[float]:
        """Return samples of a launch's time."""
        graph = self._graph(module)
        replays = self._replays(graph, plan)
        return [self._time(graph, replays) for _ in range(plan.samples)]

    def compare(self, modules: Sequence[Any], plan: Plan, rounds: int) -> list[list[float]]:
        """Return samples of several candidates, taken in turns."""
        graphs = [self._graph(module) for module in modules]
        replays = [self._replays(graph, plan) for graph in graphs]
        found: list[list[float]] = [[] for _ in modules]
        for turn in range(rounds):
            order = range(len(graphs)) if turn % 2 else reversed(range(len(graphs)))
            for index in order:
                pair = [self._time(graphs[index], replays[index]) for _ in range(2)]
                # The first replays run in the wake of another kernel's.
                found[index].append(statistics.fmean(pair[1:]))
        return found
