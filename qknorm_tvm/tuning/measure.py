"""Measuring candidates, here or in a session of TVM's RPC: exact first, then how fast.

A call's time depends on where its tensors lie by up to a factor of two: inputs and outputs with one
offset within a page compete for the same cache sets. So all tensors of a timed call are views of
one allocation, and every time is taken at `LAYOUTS` placements.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from ..check import reference
from ..check.inputs import Activations
from ..spec import KernelSpec
from ..targets import adds_fused

#: Placements of the tensors at which each candidate is timed.
LAYOUTS = 8
_PAGE = 4096


class InexactError(Exception):
    """A candidate's outputs differ from the reference."""


@dataclasses.dataclass(frozen=True)
class Plan:
    """How long to measure.

    Parameters
    ----------
    sample_ms : int
        Milliseconds of a sample; it is the mean of as many calls as that takes.
    rounds : int
        Samples at each layout where candidates are compared.
    """

    sample_ms: int = 5
    rounds: int = 2


def timed_tensors(spec: KernelSpec, rows: int) -> dict[str, tuple[tuple[int, ...], str]]:
    """Return shape and element type of an operation's tensors, by name, for packed rows."""
    q_cols, k_cols, out_dtype = spec.q_cols, spec.k_cols, str(spec.out_dtype)
    assert q_cols is not None
    assert k_cols is not None
    kinds: dict[str, tuple[tuple[int, ...], str]] = {
        "q_out": ((rows, q_cols), out_dtype), "k_out": ((rows, k_cols), out_dtype),
        "gamma_q": ((q_cols,), "float32"), "gamma_k": ((k_cols,), "float32"),
        "qk_var": ((rows, 2), "float32"),
        "q": ((rows, q_cols), spec.in_dtype), "k": ((rows, k_cols), spec.in_dtype),
    }  # fmt: skip
    return {name: kinds[name] for name in spec.operation.tensors}


def placements(sizes: Mapping[str, int], layout: int) -> dict[str, int]:
    """Return the byte at which each tensor starts within one allocation.

    From layout to layout q and k move within a page, and outputs move against them, so that the
    distance between an input and its output takes `LAYOUTS` values modulo the page.

    Parameters
    ----------
    sizes : mapping
        Bytes by tensor.
    layout : int
        From 0 to `LAYOUTS` - 1.
    """
    starts, page = {}, 0
    for name, size in sizes.items():
        offset = 0
        if not name.startswith("gamma_"):
            offset = 320 * layout + 1024 * name.startswith("k")
            if name.endswith("_out"):
                offset += layout * _PAGE // LAYOUTS
        starts[name] = page * _PAGE + offset % _PAGE
        page += math.ceil(size / _PAGE) + 1
    return starts


def arena_bytes(sizes: Mapping[str, int]) -> int:
    """Return the bytes of an allocation that holds the tensors at any layout."""
    return sum(_PAGE * (math.ceil(size / _PAGE) + 1) for size in sizes.values())


def exactness_case(spec: KernelSpec, rows: int) -> Activations:
    """Return inputs in which random bits, infinities, NaNs and denormals are strewn."""
    from ..check.cases import shape_case
    from ..check.special_values import special_gamma

    assert spec.q_cols is not None
    assert spec.k_cols is not None
    case = shape_case(spec, rows, spec.q_cols, spec.k_cols, seed=rows).make()
    for gamma in (case.gamma_q, case.gamma_k):
        gamma[::7] = special_gamma("NaN", len(gamma))[::7]
        gamma[1::11] = special_gamma("denormal", len(gamma))[1::11]
        gamma[2::13] = special_gamma("signed zero and inf", len(gamma))[2::13]
    return case


class Bench:
    """Measures candidates of one spec and row count on a CPU, with TVM's runtime.

    Parameters
    ----------
    spec : KernelSpec
    rows : int
        M.
    session : tvm.rpc.RPCSession, optional
        Where to run; by default in this process.
    """

    #: NumPy's type of bfloat16 where the entry point takes it as bits.
    _storage_types: Mapping[str, str] = {"bfloat16": "uint16"}

    def __init__(self, spec: KernelSpec, rows: int, session: Any = None):
        self.spec, self.rows, self.session = spec, rows, session
        self.device = self._make_device()
        self._checks: dict[int, tuple[list[Any], tuple[npt.NDArray, ...]]] = {}
        self._arena: Any = None
        self._loads = 0

    def _make_device(self) -> Any:
        import tvm

        return tvm.cpu(0) if self.session is None else self.session.cpu(0)

    def load(self, path: str) -> Any:
        """Load a candidate where it is to run."""
        import tvm

        if self.session is None:
            return tvm.runtime.load_module(path)
        # A name of its own each time: to write over a file that is loaded crashes the server, and
        # TVM's servers do not outlive a session that crashed.
        self._loads += 1
        remote = f"candidate_{self._loads}.so"
        self.session.upload(path, remote)
        return self.session.load_module(remote)

    def call(self, module: Any) -> Any:
        """Return a module's entry point."""
        return module[self.spec.op]

    def _scalars(self) -> list[Any]:
        # The entry point takes bfloat16 as uint16 when one more argument says so.
        return [1e-6, 1] if self.spec.operation.has_epsilon else [1]

    # ---- exactness -------------------------------------------------------------------------

    def _tensor(self, array: npt.NDArray) -> Any:
        import tvm

        if array.dtype.name in self._storage_types:
            array = array.view(self._storage_types[array.dtype.name])
        made = tvm.runtime.empty(array.shape, array.dtype.name, self.device)
        made.copyfrom(np.ascontiguousarray(array))
        return made

    def _array(self, tensor: Any) -> npt.NDArray:
        array: npt.NDArray = tensor.numpy()
        return array

    def check(self, module: Any, rows: int) -> None:
        """Compare a candidate's outputs with the reference, bit by bit.

        Raises
        ------
        InexactError
            They differ.
        """
        operation = self.spec.operation
        if rows not in self._checks:
            case = exactness_case(self.spec, rows)
            inputs = [getattr(case, name) for name in operation.tensors
                      if name not in operation.outputs]  # fmt: skip
            self._checks[rows] = [self._tensor(array) for array in inputs], self._expected(case)
        tensors, wanted = self._checks[rows]
        outs = [self._tensor(np.zeros_like(expected)) for expected in wanted]
        self.call(module)(*outs, *tensors, *self._scalars())
        for name, tensor, expected in zip(operation.outputs, outs, wanted, strict=True):
            actual = self._array(tensor).view(expected.dtype)
            wrong = reference.differing(actual, expected)
            if wrong:
                raise InexactError(
                    f"not exact: {name} differs in {wrong} of {expected.size} elements at "
                    f"{rows} rows"
                )

    def _expected(self, case: Activations) -> tuple[npt.NDArray, ...]:
        from ..build.cpu import cpu_features

        spec, qk_var = self.spec, case.qk_var
        if spec.op != "apply_qk_rms_norm":
            (cpu,) = spec.parsed_target.variants
            fused = adds_fused(cpu, cpu_features(cpu))
            qk_var = reference.row_mean_of_squares_qk(case.q, case.k, fused=fused)
        if not spec.operation.normalises:
            return (qk_var,)
        return reference.apply_qk_rms_norm(
            case.q, case.k, qk_var, case.gamma_q, case.gamma_k, case.epsilon, spec.out_dtype,
            cast_before_gamma=spec.cast_before_gamma,
        )  # fmt: skip

    # ---- time ------------------------------------------------------------------------------

    def _allocate(self, size: int) -> Any:
        """Return memory whose elements are normal numbers, whatever their type."""
        import tvm

        arena = tvm.runtime.empty((size,), "uint8", self.device)
        # Filled where it lies: memory that was never written is one page of zeros to read.
        name = "tvm.contrib.random.random_fill_for_measure"
        find = tvm.get_global_func if self.session is None else self.session.get_function
        find(name)(self._view(arena, (size // 2,), "uint16", 0))
        return arena

    def _view(self, arena: Any, shape: tuple[int, ...], dtype: str, start: int) -> Any:
        """Return a tensor within an allocation."""
        return arena._create_view(shape, self._storage_types.get(dtype, dtype), start)

    def tensors(self, layout: int) -> list[Any]:
        """Return the tensors of timed calls at one of `LAYOUTS` placements."""
        tensors = timed_tensors(self.spec, self.rows)
        widths = {"float32": 4}
        sizes = {name: math.prod(shape) * widths.get(dtype, 2)
                 for name, (shape, dtype) in tensors.items()}  # fmt: skip
        if self._arena is None:
            self._arena = self._allocate(arena_bytes(sizes))
        starts = placements(sizes, layout)
        return [self._view(self._arena, *tensors[name], starts[name]) for name in tensors]

    def _prepare(self, module: Any, layout: int, plan: Plan) -> Any:
        """Return a function of no arguments that takes one sample, in seconds."""
        arguments = [*self.tensors(layout), *self._scalars()]
        first = module.time_evaluator(self.spec.op, self.device, number=1, repeat=2)
        once = max(min(first(*arguments).results), 1e-9)
        number = max(1, round(plan.sample_ms / 1e3 / once))
        timer = module.time_evaluator(self.spec.op, self.device, number=number, repeat=1)
        return lambda: float(timer(*arguments).results[0])

    def compare(self, modules: Sequence[Any], plan: Plan) -> list[list[float]]:
        """Return samples of candidates, taken in turns: `plan.rounds` at each layout.

        Samples of one index were taken side by side, with tensors at the same addresses.
        """
        samples: list[list[float]] = [[] for _ in modules]
        for layout in range(LAYOUTS):
            timers = [self._prepare(module, layout, plan) for module in modules]
            for turn in range(plan.rounds):
                # To and fro, so that none always runs in the wake of the same other one.
                order = range(len(modules)) if turn % 2 else reversed(range(len(modules)))
                for index in order:
                    samples[index].append(timers[index]())
        return samples

    def seconds(self, module: Any, plan: Plan) -> list[float]:
        """Return samples of a candidate's time, one at each layout."""
        return self.compare([module], dataclasses.replace(plan, rounds=1))[0]
