"""What the layer takes over ranks, beside torch's and the all-reduce alone.

All ranks call the same, in the same order and as often: a loop by the clock would leave one of
them in an all-reduce that the others never start.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Sequence

import numpy as np
import torch
from rank_cases import Case, is_near
from rank_layer import RankLayer
from rank_place import Place
from rich.table import Table

from qknorm_tvm.bench.cuda import capture
from qknorm_tvm.bench.timing import Candidate, Timing
from qknorm_tvm.cli import output

OURS, LAYER, ALONE, WITHOUT = "ours", "layer of one rank", "all-reduce alone", "ours without it"
TORCH, TORCH_COMPILE = "unfused torch", "torch.compile"
#: What is said below the tables.
METHOD = (
    "µs: median of a call {how}, candidates taking turns, of the rank that took longest; beyond "
    "all-reduce: less the all-reduce alone. Results are checked first: ours equals unfused torch "
    "given the same reduced statistics, bit for bit."
)
GRAPHS = "in a chain of {calls} inside a CUDA graph, on the same buffers"
EAGER = "made eagerly, the host's part included, since {backend} cannot be captured"
NOTE_ONE = "ours: with an all-reduce of one rank, which the layer of one rank leaves out."

_SAMPLES = 15
_GRAPH_CALLS, _REPLAYS = 20, 20
_EAGER_CALLS = 20


def candidates(rank_layer: RankLayer, case: Case, torch_compile: bool) -> list[Candidate]:
    """Return what is timed, results checked; torch.compile, which may fail, last."""
    wanted = rank_layer.expected()
    for call in (rank_layer.layer, rank_layer.with_all_reduce):
        rank_layer.poison()
        call()
        rank_layer.check_outputs(wanted)
    for got, value in zip(rank_layer.torch_layer(*rank_layer.inputs), wanted, strict=True):
        assert is_near(case, got, value), "unfused torch differs"
    timed = [
        Candidate(OURS, rank_layer.with_all_reduce),
        Candidate(ALONE, rank_layer.all_reduce),
        Candidate(WITHOUT, rank_layer.without_all_reduce),
        Candidate(TORCH, lambda: rank_layer.torch_layer(*rank_layer.inputs)),
    ]
    if rank_layer.place.world == 1:
        timed.insert(1, Candidate(LAYER, rank_layer.layer))
    if torch_compile:
        timed.append(_compiled(rank_layer, case, wanted))
    return timed


def _compiled(rank_layer: RankLayer, case: Case, wanted: Sequence[torch.Tensor]) -> Candidate:
    notes = []
    for fullgraph in (True, False):
        torch.compiler.reset()
        made = torch.compile(rank_layer.torch_layer, dynamic=False, fullgraph=fullgraph)
        try:
            outputs, failed = made(*rank_layer.inputs), ""
        except Exception as error:
            failed = f"{type(error).__name__}: {str(error).splitlines()[0][:100]}"
        if not any(rank_layer.place.everywhere(failed)):
            near = all(is_near(case, a, b) for a, b in zip(outputs, wanted, strict=True))
            notes += [] if near else ["differs by more than the bound"]
            call = functools.partial(made, *rank_layer.inputs)
            return Candidate(TORCH_COMPILE, call, note="; ".join(notes))
        notes.append(f"{'not in one graph' if fullgraph else 'failed'} ({failed})")
    return Candidate(TORCH_COMPILE, None, note="; ".join(notes))


def _graph_sampler(graph: torch.cuda.CUDAGraph) -> Callable[[], float]:
    def sample() -> float:
        first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        graph.replay()  # untimed: the ranks meet in it, and the queue fills
        first.record()
        for _ in range(_REPLAYS):
            graph.replay()
        last.record()
        last.synchronize()
        return float(first.elapsed_time(last)) * 1e-3 / (_REPLAYS * _GRAPH_CALLS)

    return sample


def _eager_sampler(function: Callable[[], object], on_gpu: bool) -> Callable[[], float]:
    def wait() -> None:
        if on_gpu:
            torch.cuda.synchronize()

    def sample() -> float:
        function()
        wait()
        start = time.perf_counter()
        for _ in range(_EAGER_CALLS):
            function()
        wait()
        return (time.perf_counter() - start) / _EAGER_CALLS

    return sample


def measure(place: Place, timed: Sequence[Candidate]) -> list[Timing]:
    """Time candidates in turns, a fixed number of them.

    Parameters
    ----------
    place : Place
    timed : sequence of Candidate
        The same on every rank. Only torch.compile's may refuse to be captured.

    Returns
    -------
    list of Timing
        Seconds a call, in the order of the candidates, of the rank whose median is the largest.
    """
    graphs, samplers = [], {}
    for candidate in timed:
        if candidate.function is None:
            continue
        function, failed = candidate.function, ""
        if not place.captures:
            samplers[candidate.name] = _eager_sampler(function, place.device != "cpu")
            continue
        try:
            graphs.append(capture(lambda _, call=function: call(), _GRAPH_CALLS))
        except RuntimeError as error:
            if candidate.name != TORCH_COMPILE:
                raise
            torch.cuda.synchronize()
            failed = str(error).splitlines()[0][:100]
        if any(place.everywhere(failed)):
            candidate.note = "; ".join(
                filter(None, [candidate.note, f"cannot be captured ({failed})"])
            )
        else:
            samplers[candidate.name] = _graph_sampler(graphs[-1])
    samples: dict[str, list[float]] = {name: [] for name in samplers}
    for turn in range(1 + _SAMPLES):
        for name, sample in samplers.items():
            took = sample()
            if turn:  # the first is warm-up
                samples[name].append(took)
    for graph in graphs:  # before the communicator that they use
        graph.reset()
    everyones = place.everywhere(samples)
    timings = []
    for candidate in timed:
        quartiles = [(float("nan"),) * 3]
        if candidate.name in samplers:
            quartiles = [np.percentile(ranks[candidate.name], [25, 50, 75]) for ranks in everyones]
        q1, median, q3 = map(float, max(quartiles, key=lambda three: three[1]))
        count = len(samples.get(candidate.name, ()))
        timings.append(Timing(candidate.name, median, q1, q3, count, 0, None, candidate.note))
    return timings


def time_layer(
    place: Place, name: str, cases: Sequence[Case], torch_compile: bool
) -> tuple[Table, list[str]]:
    """Time one layer at several numbers of rows; returns the table, and notes below it."""
    made = output.table("M", "", "µs", "quartiles", "beyond all-reduce", left=(1,))
    notes = []
    for case in cases:
        rank_layer = RankLayer(place, case)
        timings = measure(place, candidates(rank_layer, case, torch_compile))
        alone = next(timing.median for timing in timings if timing.name == ALONE)
        for index, timing in enumerate(timings):
            reduces = timing.name not in (ALONE, LAYER, WITHOUT)
            made.add_row(
                f"{case.rows:,}" if index == 0 else "",
                timing.name,
                output.microseconds(timing.median),
                f"{output.microseconds(timing.q1)}-{output.microseconds(timing.q3)}",
                output.microseconds(timing.median - alone) if reduces else "",
                end_section=index + 1 == len(timings),
            )
            if timing.note:
                notes.append(f"{name}, M = {case.rows}, {timing.name}: {timing.note}")
    cols = f"{rank_layer.layout.q_cols}/{rank_layer.layout.k_cols}"
    made.title = f"{name}, {cols} columns a rank, bfloat16, {place.world} over {place.backend}"
    return made, notes


def method(place: Place) -> str:
    """Return how it is measured, for people."""
    how = GRAPHS.format(calls=_GRAPH_CALLS) if place.captures else EAGER.format(**vars(place))
    return METHOD.format(how=how)
