"""Measuring CUDA candidates: launches in a CUDA graph, as in a decode step, through torch."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import Any

from ..spec import KernelSpec
from .measure import Bench, InexactError, Plan, exactness_case

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

    def _dtype(self, name: str) -> Any:
        import torch

        return getattr(torch, name)

    def check(self, module: Any, rows: int) -> None:
        """Compare with the unfused graph on the same device, bit by bit but for NaN payloads."""
        import torch

        from ..reference_torch import apply_qk_rms_norm, to_torch

        case = exactness_case(self.spec, rows)
        q, k, qk_var, gamma_q, gamma_k = (
            to_torch(one).to(self.device)
            for one in (case.q, case.k, case.qk_var, case.gamma_q, case.gamma_k)
        )
        out_dtype = self._dtype(str(self.spec.out_dtype))
        wanted = apply_qk_rms_norm(q, k, qk_var, gamma_q, gamma_k, case.epsilon, out_dtype)
        outs = [torch.zeros_like(one) for one in wanted]
        self.call(module)(*outs, gamma_q, gamma_k, qk_var, q, k, case.epsilon)
        torch.cuda.synchronize()
        bits = torch.int32 if out_dtype == torch.float32 else torch.int16
        for name, actual, expected in zip(("q_out", "k_out"), outs, wanted, strict=True):
            unequal = (actual.view(bits) != expected.view(bits)) & ~(
                actual.isnan() & expected.isnan()
            )
            wrong = int(unequal.sum())
            if wrong:
                raise InexactError(
                    f"not exact: {name} differs in {wrong} of {expected.numel()} elements at "
                    f"{rows} rows"
                )

    def arguments(self) -> list[Any]:
        """Return sets of arguments for the timed calls."""
        if self._timed is None:
            import torch

            spec = self.spec
            assert spec.q_cols is not None
            assert spec.k_cols is not None
            size = self.rows * (spec.q_cols + spec.k_cols) * (spec.in_bytes + spec.out_bytes)
            properties = torch.cuda.get_device_properties(0)
            cache = getattr(properties, "L2_cache_size", 0) or 40_000_000
            in_dtype = self._dtype(spec.in_dtype)
            out_dtype = self._dtype(str(spec.out_dtype))

            def normal(cols: int) -> Any:
                made = torch.empty(self.rows, cols, dtype=in_dtype, device=self.device)
                return made.normal_()

            def one_set() -> list[Any]:
                q, k = normal(spec.q_cols or 0), normal(spec.k_cols or 0)
                empty = [torch.empty_like(one, dtype=out_dtype) for one in (q, k)]
                gammas = [torch.ones(one.shape[1], device=self.device) for one in (q, k)]
                qk_var = torch.ones(self.rows, 2, device=self.device)
                return [*empty, *gammas, qk_var, q, k, 1e-6]

            self._timed = [one_set() for _ in range(1 if 2 * size <= cache else _SETS)]
        return self._timed

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
