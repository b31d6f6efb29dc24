"""What is timed: an entry for each operation, and its tensors and candidates on a device.

A new operation joins with an entry in `BENCHMARKS`: the graph that users would write in torch, and,
where the defaults do not serve, its inputs, the bytes that it moves and its candidates. Names,
shapes and types of its tensors are those of `qknorm_tvm.operations`. How a candidate is made is
said once for all operations: here what devices share, in `qknorm_tvm.bench.cpu` and
`qknorm_tvm.bench.cuda` what is a device's own.
"""

from __future__ import annotations

import abc
import dataclasses
import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt

from ..call import api
from ..check.inputs import Activations, aligned_copy, generate
from ..check.reference_torch import apply_qk_rms_norm as torch_apply
from ..check.reference_torch import row_mean_of_squares_qk as torch_statistics
from ..check.reference_torch import torch_or_none
from ..check.rope_inputs import paged_inputs, with_model_inputs
from ..load.module import Module
from ..operations import OPERATIONS, ROWS, Operation
from ..spec import KernelSpec
from .timing import (
    COPY,
    EMPTY,
    NUMPY,
    OURS,
    SCALAR,
    TORCH,
    TORCH_COMPILE,
    TWO_COPIES,
    TWO_LAUNCHES,
    Candidate,
    HostSampler,
    Sampler,
)
from .torch_compile import torch_compile

NOT_INSTALLED = "torch is not installed"
#: Tensors with a row for each of Q's and K's.
_ROW_TENSORS = {
    tensor.name
    for operation in OPERATIONS.values()
    for tensor in operation.arguments
    if tensor.shape[0] == ROWS
}


def _apply(
    q: Any, k: Any, var: Any, gamma_q: Any, gamma_k: Any, epsilon: float, dtype: Any, cast: bool
) -> Any:
    return torch_apply(q, k, var, gamma_q, gamma_k, epsilon, dtype, cast_before_gamma=cast)


def _layer(
    q: Any, k: Any, gamma_q: Any, gamma_k: Any, epsilon: float, dtype: Any, cast: bool
) -> Any:
    return _apply(q, k, torch_statistics(q, k), gamma_q, gamma_k, epsilon, dtype, cast)


def _rope(
    spec: KernelSpec, tensors: Mapping[str, Any], epsilon: float, dtype: Any, cast: bool
) -> tuple[Any, ...]:
    """Normalise and rotate in torch, operation by operation, as models do; then store."""
    import torch

    q, k = tensors["q"], tensors["k"]
    var = tensors["qk_var"] if spec.has_given_statistics else torch_statistics(q, k)
    norms = _apply(q, k, var, tensors["gamma_q"], tensors["gamma_k"], epsilon, dtype, cast)
    head_dim, rotary_dim = spec.head_dim, spec.rotary_dim
    outputs = []
    for y in norms:
        heads = y.unflatten(-1, (-1, head_dim))
        if rotary_dim:
            angles = tensors["cos_sin_cache"][tensors["positions"]].float()[:, None]
            cos, sin = angles.chunk(2, dim=-1)
            rotated = heads[..., :rotary_dim].float()
            if spec.interleaved:
                a, b = rotated[..., ::2], rotated[..., 1::2]
                pair = torch.stack((a * cos - b * sin, b * cos + a * sin), dim=-1).flatten(-2)
            else:
                a, b = rotated.chunk(2, dim=-1)
                pair = torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1)
            heads = torch.cat((pair.to(dtype), heads[..., rotary_dim:]), dim=-1)
        outputs.append(heads)
    q_out, k_out = (heads.flatten(1) for heads in outputs)
    if not spec.operation.has_cache:
        return q_out, k_out
    slots = tensors["slot_mapping"]
    caches = []
    for tag, heads in (("k", outputs[1]), ("v", tensors["v"].unflatten(-1, (-1, head_dim)))):
        cache = tensors[f"{tag}_cache"]
        block_size = cache.shape[1]
        if spec.has_scales:
            scaled = heads.float() / tensors[f"{tag}_scale"][:, None]
            heads = scaled.clamp(-448, 448).to(cache.dtype)
        cache[slots // block_size, slots % block_size] = heads
        caches.append(cache)
    return (q_out, *([k_out] if spec.writes_k_out else []), *caches)


def rope_inputs(spec: KernelSpec, rows: int) -> Activations:
    """Return inputs like a model's and an engine's for a spec that rotates."""
    return with_model_inputs(spec, random_inputs(spec, rows))


def random_inputs(spec: KernelSpec, rows: int) -> Activations:
    """Return inputs like a model's for a spec with fixed columns."""
    assert spec.q_cols is not None
    assert spec.k_cols is not None
    return generate(rows, spec.q_cols, spec.k_cols, spec.in_dtype)


def bytes_of_rows(operation: Operation, tensors: Mapping[str, Any]) -> int:
    """Return the bytes of q, k, v and their outputs; of caches, of what is stored."""
    moved = sum(int(tensors[name].nbytes) for name in operation.strided if name in tensors)
    for cache in ("k_cache", "v_cache"):
        if cache in tensors:
            blocks, block_size, *head = tensors[cache].shape
            itemsize = int(tensors[cache].nbytes) // math.prod((blocks, block_size, *head))
            moved += len(tensors["slot_mapping"]) * math.prod(head) * itemsize
    return moved


@dataclasses.dataclass(frozen=True)
class Benchmark:
    """How an operation is benchmarked.

    Parameters
    ----------
    graph : callable
        The operation in torch, unfused. Takes the inputs in the operation's order, of one that
        rotates the spec and all tensors by name; where it normalises also epsilon, the outputs'
        type and whether to cast before gamma.
    inputs : callable
        Makes the inputs of a spec with so many rows.
    bytes : callable
        What a call reads and writes, from the operation and its tensors by name.
    unique_rows : int or None
        More rows are the first so many again, since random numbers and references take their time.
        None where rows depend on each other.
    cpu, cuda : tuple of str
        What ours is timed against on each kind of device.
    steps : tuple of str
        Operations that do the same one after the other: `TWO_LAUNCHES`.
    """

    graph: Callable[..., Any]
    inputs: Callable[[KernelSpec, int], Activations] = random_inputs
    bytes: Callable[[Operation, Mapping[str, Any]], int] = bytes_of_rows
    unique_rows: int | None = 1024
    cpu: tuple[str, ...] = (COPY, TORCH, TORCH_COMPILE)
    cuda: tuple[str, ...] = (EMPTY, COPY, TORCH, TORCH_COMPILE)
    steps: tuple[str, ...] = ()

    def candidates(self, kind: str) -> tuple[str, ...]:
        """Return what ours is timed against on ``"cpu"`` or ``"cuda"``."""
        return {"cpu": self.cpu, "cuda": self.cuda}[kind]


#: Benchmarks by operation.
BENCHMARKS = {
    "apply_qk_rms_norm": Benchmark(
        _apply,
        cpu=(COPY, NUMPY, TORCH, TORCH_COMPILE, SCALAR),
        cuda=(EMPTY, COPY, TWO_COPIES, TORCH, TORCH_COMPILE),
    ),
    "row_mean_of_squares_qk": Benchmark(torch_statistics),
    "qk_rms_norm": Benchmark(
        _layer,
        cuda=(EMPTY, COPY, TWO_LAUNCHES, TORCH, TORCH_COMPILE),
        steps=("row_mean_of_squares_qk", "apply_qk_rms_norm"),
    ),
    "qk_rms_norm_rope": Benchmark(_rope, rope_inputs),
    "qk_rms_norm_rope_cache": Benchmark(_rope, rope_inputs),
}


def held_spec(module: Module, spec: KernelSpec) -> KernelSpec | None:
    """Return the spec of a module that serves another's dtypes and columns; fixed ones first."""
    held = [
        other
        for other in module.specs
        if (other.op, other.in_dtype, other.out_dtype) == (spec.op, spec.in_dtype, spec.out_dtype)
        and other.tensors == spec.tensors
        and (other.head_dim, other.rotary_dim, other.interleaved)
        == (spec.head_dim, spec.rotary_dim, spec.interleaved)
        and other.q_cols in (None, spec.q_cols)
        and other.k_cols in (None, spec.k_cols)
    ]
    return min(held, key=has_open_columns, default=None)


def has_open_columns(spec: KernelSpec) -> bool:
    """Whether a spec leaves columns to the call."""
    return None in (spec.q_cols, spec.k_cols)


def copy_by_torch(pairs: Sequence[tuple[Any, Any]]) -> None:
    """Copy the second tensor of each pair to the first."""
    for target, source in pairs:
        target.copy_(source)


class Workload(abc.ABC):
    """One operation on one set of inputs: memory on a device, and the candidates on it.

    Parameters
    ----------
    spec : KernelSpec
        Operation and dtypes. How a module that holds it rounds is the module's business.
    module : Module
    activations : Activations
        The inputs, of the rows that differ.
    rows : int, optional
        M, where the inputs' rows repeat; by default theirs.

    Attributes
    ----------
    inputs : dict of str to ndarray
    sets : list of dict
        Tensors of the device by name, sets that take turns.
    bytes : int
        What a call reads and writes.
    sampler, host_sampler : callable
        Make the sampler of a candidate: of the device's time, and of the host's alone.
    """

    kind: ClassVar[str]
    threads = 0
    sets: list[dict[str, Any]]
    sampler: Callable[[Candidate], Sampler]
    host_sampler: Callable[[Candidate], Sampler] = HostSampler

    def __init__(
        self,
        spec: KernelSpec,
        module: Module,
        activations: Activations,
        rows: int | None = None,
    ):
        held = held_spec(module, spec) or spec
        self.spec = spec.replace(
            reproducible=held.reproducible, cast_before_gamma=held.cast_before_gamma
        )
        self.module, self.activations = module, activations
        self.rows = activations.rows if rows is None else rows
        self.operation, self.benchmark = spec.operation, BENCHMARKS[spec.op]
        # Steps in two launches have statistics that the operation itself has not.
        absent = set(spec.operation.tensors) - {tensor.name for tensor in spec.tensors}
        self.inputs = {
            name: self._repeated(name, array)
            for name, array in activations.tensors.items()
            if name not in absent
        }
        if self.operation.has_cache and self.rows != activations.rows:
            self.inputs |= paged_inputs(spec, self.rows)  # rows that repeat have slots of their own
        shapes = self.operation.shapes(self.rows, activations.q_cols, activations.k_cols)
        shapes |= {name: array.shape for name, array in self.inputs.items()}
        self.outputs = {
            name: (shapes[name], spec.dtype_of(self.operation[name])) for name in spec.outputs
        }
        #: Tensors that torch's graph takes.
        self.graph_tensors = tuple(
            tensor.name for tensor in spec.tensors if not tensor.is_output or tensor.is_cache
        )

    def _repeated(self, name: str, array: npt.NDArray) -> npt.NDArray:
        """Return a tensor of all rows from that of the rows that differ."""
        if name not in _ROW_TENSORS or len(array) == self.rows:
            return array
        return aligned_copy(array[np.arange(self.rows) % len(array)])

    def _of_all_rows(self, name: str, output: npt.NDArray) -> npt.NDArray:
        """Return an output of all rows from that of the rows that differ."""
        if not self.operation[name].is_cache or self.rows == self.activations.rows:
            return self._repeated(name, output)
        slots, few = self.inputs["slot_mapping"], self.activations.extra["slot_mapping"]
        cache, head = self.inputs[name].copy(), output.shape[2:]
        stored = output.reshape(-1, *head)[few]
        cache.reshape(-1, *head)[slots] = stored[np.arange(self.rows) % len(few)]
        return cache

    @functools.cached_property
    def bytes(self) -> int:
        """What a call reads and writes."""
        return self.benchmark.bytes(self.operation, self.sets[0])

    # ---- what a device says --------------------------------------------------------------------

    @abc.abstractmethod
    def placed(self, array: npt.NDArray) -> Any:
        """Return an array in the device's memory."""

    @abc.abstractmethod
    def reference(self) -> Sequence[npt.NDArray]:
        """Return what the outputs must be for the rows that differ."""

    @abc.abstractmethod
    def differ(self, actual: Any, expected: Any) -> bool:
        """Whether an output differs from what it must be."""

    @abc.abstractmethod
    def arguments(self, op: str, tensors: Mapping[str, Any]) -> tuple[Any, ...]:
        """Return what the entry point of an operation takes."""

    @abc.abstractmethod
    def overwrite(self, output: Any) -> None:
        """Fill an output with what cannot pass for a result."""

    @abc.abstractmethod
    def restore(self, cache: Any, before: npt.NDArray) -> None:
        """Fill a paged cache with what it held before all calls."""

    @abc.abstractmethod
    def torch_sets(self) -> list[dict[str, Any]]:
        """Return the sets of tensors that torch's candidates take."""

    @abc.abstractmethod
    def copy(self, name: str) -> Candidate:
        """Return a copy that reads and writes as many bytes as ours together."""

    @abc.abstractmethod
    def host_calls(self) -> list[Candidate]:
        """Return every way to call the operation from Python; what the host does is timed."""

    # ---- what all devices share ----------------------------------------------------------------

    @functools.cached_property
    def expected(self) -> list[Any]:
        """What the outputs must be, on the device."""
        return [
            self.placed(self._of_all_rows(name, array))
            for name, array in zip(self.outputs, self.reference(), strict=True)
        ]

    def is_exact(self, outputs: Sequence[Any]) -> bool:
        """Whether outputs equal the reference bit for bit."""
        pairs = zip(outputs, self.expected, strict=True)
        return not any(self.differ(actual, expected) for actual, expected in pairs)

    def candidate(self, name: str) -> Candidate:
        """Return one of `Benchmark.candidates`, its result checked."""
        if name in (TORCH, TORCH_COMPILE):
            return self._torch(name)
        assert name in (COPY, TWO_COPIES), name
        return self.copy(name)

    def ours(self, name: str = OURS, module: Module | None = None) -> Candidate:
        """Return a module's entry point as a candidate, checked with every set of tensors."""
        function = getattr(module or self.module, self.spec.op)
        sets, exact = [self.arguments(self.spec.op, tensors) for tensors in self.sets], True
        for tensors, arguments in zip(self.sets, sets, strict=True):
            outputs = [tensors[output] for output in self.outputs]
            for output_name in self.outputs:
                if output_name in self.inputs:  # elsewhere a cache must stay as it is
                    self.restore(tensors[output_name], self.inputs[output_name])
                else:
                    self.overwrite(tensors[output_name])
            function(*arguments)
            exact = self.is_exact(outputs) and exact
        return Candidate(name, function, sets, exact)

    def _torch(self, name: str) -> Candidate:
        """Return the unfused graph in torch, as it is or compiled by torch.compile."""
        torch = torch_or_none()
        if torch is None:
            return Candidate(name, None, note=NOT_INSTALLED)
        graph, sets = self.benchmark.graph, [self._graph_arguments(x) for x in self.torch_sets()]
        if name == TORCH_COMPILE:
            if self.rows == 0:
                return Candidate(name, None, note="nothing to compile for no rows")
            return torch_compile(graph, sets, self._graph_is_exact)
        with torch.no_grad():
            return Candidate(name, graph, sets, self._graph_is_exact(graph(*sets[0])))

    def _graph_arguments(self, tensors: Mapping[str, Any]) -> tuple[Any, ...]:
        import torch

        inputs: tuple[Any, ...] = tuple(
            tensors[x] for x in self.operation.signature if x in tensors
        )
        if not self.operation.normalises:
            return inputs
        if self.operation.rotates:
            inputs = (self.spec, {name: tensors[name] for name in self.graph_tensors})
        dtype = getattr(torch, str(self.spec.out_dtype))
        return (*inputs, self.activations.epsilon, dtype, self.spec.cast_before_gamma)

    def _graph_is_exact(self, outputs: Any) -> bool | None:
        # torch sums statistics in another order.
        given = "qk_var" in self.graph_tensors
        return self.is_exact(outputs) if given else None

    def copy_sizes(self, *, apart: bool) -> list[int]:
        """Return the bytes of what copies read: as much as ours moves is read and written.

        Parameters
        ----------
        apart : bool
            In two copies, in proportion to q's and k's columns, instead of in one.
        """
        a = self.activations
        cols = [a.q_cols, a.k_cols] if apart else [a.q_cols + a.k_cols]
        return [self.bytes * part // (2 * (a.q_cols + a.k_cols)) for part in cols]

    def api_call(self, tensors: Mapping[str, Any]) -> Callable[[], Any]:
        """Return a call of the Python API with outputs given."""
        outputs = {self.operation[name].api_name: tensors[name] for name in self.outputs}
        if self.operation.rotates:
            spec = self.spec
            inputs = {name: tensors.get(name) for name in self.operation.signature}
            return functools.partial(
                getattr(api, spec.op), **inputs, **outputs, epsilon=self.activations.epsilon,
                head_dim=spec.head_dim, interleaved=spec.interleaved,
                cast_before_gamma=spec.cast_before_gamma,
            )  # fmt: skip
        given = [tensors[name] for name in self.operation.signature]
        scalars = [self.activations.epsilon] * self.operation.has_epsilon
        return functools.partial(getattr(api, self.spec.op), *given, *scalars, **outputs)
