"""Measuring candidates, here or in a session of TVM's RPC: exact first, then how fast."""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from ..check import reference
from ..check.inputs import Activations
from ..spec import KernelSpec
from ..targets import adds_fused


class InexactError(Exception):
    """A candidate's outputs differ from the reference."""


@dataclasses.dataclass(frozen=True)
class Plan:
    """How long to measure.

    Parameters
    ----------
    samples : int
        Samples of a candidate; each is the mean of as many calls as `sample_ms` takes.
    sample_ms : int
        Milliseconds of a sample.
    """

    samples: int = 5
    sample_ms: int = 8


def exactness_case(spec: KernelSpec, rows: int) -> Activations:
    """Return inputs in which random bits, infinities, NaNs and denormals are strewn."""
    from ..check.verification import shape_case, special_gamma

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

    def __init__(self, spec: KernelSpec, rows: int, session: Any = None):
        self.spec, self.rows, self.session = spec, rows, session
        self.device = self._make_device()
        self._checks: dict[int, tuple[list[Any], tuple[npt.NDArray, ...]]] = {}
        self._timed: list[Any] | None = None
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

    def _storage(self, array: npt.NDArray) -> npt.NDArray:
        # The entry point takes bfloat16 as uint16 when a ninth argument says so.
        return array.view(np.uint16) if array.dtype.name == "bfloat16" else array

    def _tensor(self, array: npt.NDArray) -> Any:
        import tvm

        made = tvm.runtime.empty(array.shape, array.dtype.name, self.device)
        made.copyfrom(np.ascontiguousarray(array))
        return made

    def _array(self, tensor: Any) -> npt.NDArray:
        found: npt.NDArray = tensor.numpy()
        return found

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
            self._checks[rows] = (
                [self._tensor(self._storage(array)) for array in inputs],
                self._expected(case),
            )
        tensors, wanted = self._checks[rows]
        outs = [self._tensor(self._storage(np.zeros_like(one))) for one in wanted]
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
        spec, qk_var = self.spec, case.qk_var
        if spec.op != "apply_qk_rms_norm":
            qk_var = reference.row_mean_of_squares_qk(case.q, case.k, fused=self._fused)
        if not spec.operation.normalises:
            return (qk_var,)
        return reference.apply_qk_rms_norm(
            case.q, case.k, qk_var, case.gamma_q, case.gamma_k, case.epsilon, spec.out_dtype,
            cast_before_gamma=spec.cast_before_gamma,
        )  # fmt: skip

    @property
    def _fused(self) -> bool:
        """Whether the target's code adds squares by a fused multiply-add."""
        from ..build.cpu import cpu_features

        (cpu,) = self.spec.parsed_target.variants
        return adds_fused(cpu, cpu_features(cpu))

    def _scalars(self) -> list[Any]:
        return [1e-6, 1] if self.spec.operation.has_epsilon else [1]

    def call(self, module: Any) -> Any:
        """Return a module's entry point."""
        return module[self.spec.op]

    def arguments(self) -> list[Any]:
        """Return the arguments of the timed calls, allocated once."""
        if self._timed is None:
            import tvm

            spec, rows = self.spec, self.rows
            storage = {"bfloat16": "uint16"}
            inp = storage.get(spec.in_dtype, spec.in_dtype)
            out = storage.get(str(spec.out_dtype), str(spec.out_dtype))
            q_cols, k_cols = spec.q_cols, spec.k_cols
            kinds = {
                "q_out": ((rows, q_cols), out), "k_out": ((rows, k_cols), out),
                "gamma_q": ((q_cols,), "float32"), "gamma_k": ((k_cols,), "float32"),
                "qk_var": ((rows, 2), "float32"),
                "q": ((rows, q_cols), inp), "k": ((rows, k_cols), inp),
            }  # fmt: skip
            shapes = [kinds[name] for name in spec.operation.tensors]
            tensors = [tvm.runtime.empty(shape, kind, self.device) for shape, kind in shapes]
            # Filled where it lies: memory that was never written is one page of zeros to read.
            name = "tvm.contrib.random.random_fill_for_measure"
            fill = (
                tvm.get_global_func(name) if self.session is None
                else self.session.get_function(name)
            )  # fmt: skip
            for tensor in tensors:
                fill(tensor)
            self._timed = [*tensors, *self._scalars()]
        return self._timed

    def seconds(self, module: Any, plan: Plan) -> list[float]:
        """Return samples of a call's time."""
        timer = module.time_evaluator(
            self.spec.op, self.device, number=1, repeat=plan.samples, min_repeat_ms=plan.sample_ms
        )
        return [float(one) for one in timer(*self.arguments()).results]

    def compare(self, modules: Sequence[Any], plan: Plan, rounds: int) -> list[list[float]]:
        """Return samples of several candidates, taken in turns."""
        found: list[list[float]] = [[] for _ in modules]
        timers = []
        for module in modules:
            first = statistics.median(self.seconds(module, Plan(3, plan.sample_ms)))
            number = max(1, round(plan.sample_ms / 1e3 / first))
            timers.append(module.time_evaluator(self.spec.op, self.device, number=number, repeat=1))
        arguments = self.arguments()
        for turn in range(rounds):
            # To and fro, so that none always runs in the wake of the same other one.
            order = range(len(modules)) if turn % 2 else reversed(range(len(modules)))
            for index in order:
                found[index].append(float(timers[index](*arguments).results[0]))
        return found
