"""What is timed: an entry for each operation, and what its candidates share on every device.

A new operation joins with an entry in `BENCHMARKS`: the graph that users would write in torch, and
the names of its candidates. Its tensors are those of `qknorm_tvm.operations`. What a candidate is
on a device is said once for all operations, in `qknorm_tvm.bench.cpu` and `qknorm_tvm.bench.cuda`.
"""

from __future__ import annotations

import abc
import dataclasses
import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar

import numpy as np

from ..check.inputs import Activations, aligned_copy, generate
from ..check.reference_torch import apply_qk_rms_norm as torch_apply
from ..check.reference_torch import row_mean_of_squares_qk as torch_statistics
from ..check.reference_torch import torch_or_none
from ..dtypes import ELEMENT_TYPES, ElementType
from ..load.module import Module
from ..operations import IN_DTYPE, K_COLS, OUT_DTYPE, Q_COLS, ROWS, TensorArgument
from ..spec import KernelSpec
from .timing import (
    COPY,
    EMPTY,
    FLOOR,
    NUMPY,
    OURS,
    SCALAR,
    TORCH,
    TORCH_COMPILE,
    TWO_COPIES,
    TWO_LAUNCHES,
    Candidate,
    Timing,
)
from .torch_compile import torch_compile

NOT_INSTALLED = "torch is not installed"
#: Rows that are generated; more are these again, since random numbers take their time.
UNIQUE_ROWS = 1024


def _apply(
    q: Any, k: Any, var: Any, gamma_q: Any, gamma_k: Any, epsilon: float, dtype: Any, cast: bool
) -> Any:
    return torch_apply(q, k, var, gamma_q, gamma_k, epsilon, dtype, cast_before_gamma=cast)


def _layer(
    q: Any, k: Any, gamma_q: Any, gamma_k: Any, epsilon: float, dtype: Any, cast: bool
) -> Any:
    return _apply(q, k, torch_statistics(q, k), gamma_q, gamma_k, epsilon, dtype, cast)


@dataclasses.dataclass(frozen=True)
class Benchmark:
    """How an operation is benchmarked.

    Parameters
    ----------
    graph : callable
        The operation in torch, unfused. Takes the inputs in the operation's order; where it
        normalises also epsilon, the outputs' type and whether to cast before gamma.
    candidates : mapping of str to tuple of str
        What ours is timed against, by kind of device.
    """

    graph: Callable[..., Any]
    candidates: Mapping[str, tuple[str, ...]]


_BY_TORCH = (TORCH, TORCH_COMPILE)
#: Benchmarks by operation.
BENCHMARKS = {
    "apply_qk_rms_norm": Benchmark(
        _apply,
        {
            "cpu": (COPY, NUMPY, *_BY_TORCH, SCALAR),
            "cuda": (EMPTY, COPY, TWO_COPIES, *_BY_TORCH),
        },
    ),
    "row_mean_of_squares_qk": Benchmark(
        torch_statistics,
        {"cpu": (FLOOR, *_BY_TORCH), "cuda": (EMPTY, COPY, *_BY_TORCH)},
    ),
    "qk_rms_norm": Benchmark(
        _layer,
        {"cpu": (FLOOR, *_BY_TORCH), "cuda": (EMPTY, COPY, TWO_LAUNCHES, *_BY_TORCH)},
    ),
}


def activations(rows: int, q_cols: int, k_cols: int, dtype: str) -> Activations:
    """Generate activations; beyond `UNIQUE_ROWS` the same rows again and again."""
    a = generate(min(rows, UNIQUE_ROWS), q_cols, k_cols, dtype)
    if rows <= UNIQUE_ROWS:
        return a
    order = np.arange(rows) % UNIQUE_ROWS
    return dataclasses.replace(
        a,
        q=aligned_copy(a.q[order]),
        k=aligned_copy(a.k[order]),
        qk_var=aligned_copy(a.qk_var[order]),
    )


def held_spec(module: Module, spec: KernelSpec) -> KernelSpec | None:
    """Return the spec of a module that serves another's dtypes and columns; fixed ones first."""
    held = [
        other
        for other in module.specs
        if (other.op, other.in_dtype, other.out_dtype) == (spec.op, spec.in_dtype, spec.out_dtype)
        and other.q_cols in (None, spec.q_cols)
        and other.k_cols in (None, spec.k_cols)
    ]
    return min(held, key=has_open_columns, default=None)


def has_open_columns(spec: KernelSpec) -> bool:
    """Whether a spec leaves columns to the call."""
    return None in (spec.q_cols, spec.k_cols)


class Workload(abc.ABC):
    """One operation on one set of activations: memory on a device, and the candidates on it.

    Parameters
    ----------
    spec : KernelSpec
        Operation and dtypes. How a module that holds it rounds is the module's business.
    module : Module
    activations : Activations
    unique_rows : int, optional
        After how many rows they repeat; by default never.

    Attributes
    ----------
    sets : list of dict
        Tensors by name, sets that take turns.
    bytes : int
        What a call reads and writes, of q, k and their outputs.
    """

    kind: ClassVar[str]
    threads = 0
    sets: list[dict[str, Any]]

    def __init__(
        self,
        spec: KernelSpec,
        module: Module,
        activations: Activations,
        unique_rows: int | None = None,
    ):
        held = held_spec(module, spec) or spec
        self.spec = spec.replace(
            reproducible=held.reproducible, cast_before_gamma=held.cast_before_gamma
        )
        self.module, self.activations = module, activations
        self.operation, self.benchmark = spec.operation, BENCHMARKS[spec.op]
        self._unique_rows = max(1, unique_rows or activations.rows)
        streams = [tensor for tensor in self.operation.arguments if tensor.is_stream]
        self.bytes = sum(
            math.prod(self._shape(tensor)) * self._element_type(tensor).bytes for tensor in streams
        )

    def _shape(self, tensor: TensorArgument) -> tuple[int, ...]:
        a = self.activations
        sizes = {ROWS: a.rows, Q_COLS: a.q_cols, K_COLS: a.k_cols}
        return tuple(sizes[size] if isinstance(size, str) else size for size in tensor.shape)

    def _element_type(self, tensor: TensorArgument) -> ElementType:
        names = {IN_DTYPE: self.spec.in_dtype, OUT_DTYPE: str(self.spec.out_dtype)}
        return ELEMENT_TYPES[names.get(tensor.dtype, tensor.dtype)]

    # ---- what a device says --------------------------------------------------------------------

    @abc.abstractmethod
    def _reference(self, a: Activations) -> Sequence[Any]:
        """Return the outputs for some rows."""

    @abc.abstractmethod
    def _differ(self, actual: Any, expected: Any) -> bool:
        """Whether two arrays of the device differ."""

    @abc.abstractmethod
    def _call(self, function: Callable[..., Any], tensors: Mapping[str, Any]) -> tuple[Any, ...]:
        """Return the arguments of an entry point, after one call on outputs that hold no result."""

    @abc.abstractmethod
    def _torch_tensors(self) -> list[dict[str, Any]]:
        """Return the sets of tensors that torch's candidates take."""

    @abc.abstractmethod
    def candidate(self, name: str) -> Candidate:
        """Return one of the candidates of `Benchmark.candidates`, its result checked."""

    @abc.abstractmethod
    def host_calls(self) -> list[Candidate]:
        """Return every way to call the operation from Python; what the host does is timed."""

    @abc.abstractmethod
    def measure(self, candidates: Sequence[Candidate], min_time: float) -> list[Timing]:
        """Time candidates as the device is used."""

    # ---- what all devices share ----------------------------------------------------------------

    @functools.cached_property
    def _expected(self) -> Sequence[Any]:
        """What the outputs of the first `unique_rows` must be."""
        a, rows = self.activations, slice(self._unique_rows)
        return self._reference(
            dataclasses.replace(a, q=a.q[rows], k=a.k[rows], qk_var=a.qk_var[rows])
        )

    def is_exact(self, outputs: Sequence[Any]) -> bool:
        """Whether outputs equal the reference bit for bit."""
        step = self._unique_rows
        return not any(
            self._differ(actual[start : start + step], expected[: len(actual) - start])
            for actual, expected in zip(outputs, self._expected, strict=True)
            for start in range(0, len(actual), step)
        )

    def ours(self, name: str = OURS, module: Module | None = None) -> Candidate:
        """Return a module's entry point as a candidate, checked with every set of tensors."""
        function = getattr(module or self.module, self.spec.op)
        sets, exact = [], True
        for tensors in self.sets:
            sets.append(self._call(function, tensors))
            exact = self.is_exact([tensors[output] for output in self.operation.outputs]) and exact
        return Candidate(name, function, sets, exact)

    def torch(self, name: str) -> Candidate:
        """Return the unfused graph in torch, as it is or compiled by torch.compile."""
        torch = torch_or_none()
        if torch is None:
            return Candidate(name, None, note=NOT_INSTALLED)
        graph, sets = (
            self.benchmark.graph,
            [self._graph_arguments(x) for x in self._torch_tensors()],
        )
        if name == TORCH_COMPILE:
            if self.activations.rows == 0:
                return Candidate(name, None, note="nothing to compile for no rows")
            return torch_compile(graph, sets, self._graph_is_exact)
        with torch.no_grad():
            return Candidate(name, graph, sets, self._graph_is_exact(graph(*sets[0])))

    def _graph_arguments(self, tensors: Mapping[str, Any]) -> tuple[Any, ...]:
        import torch

        inputs = tuple(tensors[name] for name in self.operation.signature)
        if not self.operation.normalises:
            return inputs
        dtype = getattr(torch, str(self.spec.out_dtype))
        return (*inputs, self.activations.epsilon, dtype, self.spec.cast_before_gamma)

    def _graph_is_exact(self, outputs: Any) -> bool | None:
        # torch sums statistics in another order.
        return self.is_exact(outputs) if "qk_var" in self.operation.signature else None
