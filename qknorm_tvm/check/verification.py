"""Bit-exactness: cases run on a device and compared with the unfused graph.

``qknorm-tvm verify`` and the tests share this. A `Case` is one set of inputs; a *check* is one call
on it, in one layout, with one number of threads. Outputs must equal those of the device's `Graph`
bit for bit (a NaN for a NaN), and memory that is not an output must stay as it was.
"""

from __future__ import annotations

import abc
import dataclasses
import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from ..load.module import Module
from ..operations import OPERATIONS
from ..spec import KernelSpec
from ..targets import adds_fused
from . import reference
from .calls import operation_arguments
from .cases import PAIRINGS, Case, cases_for
from .expected import Graph, outputs_of
from .inputs import Activations
from .layouts import Placed
from .reference_torch import torch_or_none


@dataclasses.dataclass
class Tally:
    """Counts of one group: checks made, elements compared, and what differed.

    `elements` were compared with NumPy, `torch_elements` with torch.
    """

    checks: int = 0
    elements: int = 0
    from_numpy: int = 0
    torch_elements: int = 0
    from_torch: int = 0
    stray_writes: int = 0


@dataclasses.dataclass
class Report:
    """What a verification found.

    Attributes
    ----------
    groups : dict of str to Tally
    first_difference : str or None
        The first differing case and element, described.
    """

    groups: dict[str, Tally] = dataclasses.field(default_factory=dict)
    first_difference: str | None = None

    @property
    def exact(self) -> bool:
        """Whether nothing differed."""
        return self.first_difference is None

    def note(self, difference: str) -> None:
        """Record a difference; the first is kept."""
        if self.first_difference is None:
            self.first_difference = difference


class Device(abc.ABC):
    """Where cases run, and what their outputs are compared with.

    Attributes
    ----------
    by_element : bool
        Misaligned arrays are off by one element, not by one byte.
    threads : sequence of int
        Numbers of threads to call with; 0: there is no such choice.
    """

    by_element = False
    threads: Sequence[int] = (0,)

    def cases(self, module: Module, spec: KernelSpec, *, thorough: bool = False) -> Iterator[Case]:
        """Generate the cases of a spec that the module holds."""
        return cases_for(spec, thorough=thorough)

    @abc.abstractmethod
    def graphs(self, module: Module, spec: KernelSpec) -> Sequence[Graph]:
        """Return the graphs to compare with: the first at every call, others once a case."""

    @abc.abstractmethod
    def call(
        self, module: Module, op: str, arrays: Mapping[str, npt.NDArray], epsilon: float
    ) -> None:
        """Call an operation on NumPy arrays by name, and wait for its outputs."""


class Cpu(Device):
    """This CPU: compared with NumPy's graph, and once a case with torch's.

    Parameters
    ----------
    threads : sequence of int
        Numbers of threads to try.
    """

    def __init__(self, threads: Sequence[int] = (1,)):
        self.threads = threads

    def graphs(self, module: Module, spec: KernelSpec) -> Sequence[Graph]:
        graphs = [_numpy_graph(module)]
        # torch adds up rows in an order of its own: it serves where statistics are an input.
        if spec.op == "apply_qk_rms_norm" and torch_or_none() is not None:
            graphs.append(Graph(torch_device="cpu"))
        return graphs

    def call(
        self, module: Module, op: str, arrays: Mapping[str, npt.NDArray], epsilon: float
    ) -> None:
        getattr(module, op)(*operation_arguments(op, arrays, epsilon))


def _numpy_graph(module: Module) -> Graph:
    """Return NumPy's graph with squares added as the module's active level adds them."""
    level = next(x for x in module.metadata["levels"] if x["name"] == module.active_level)
    return Graph(fused=adds_fused(level["name"], level["features"]))


def expected_outputs(module: Module, spec: KernelSpec, a: Activations) -> tuple[npt.NDArray, ...]:
    """Return what a CPU module's outputs must be, by NumPy, in the order of the operation's."""
    return outputs_of(_numpy_graph(module), a, spec)


def run_case(module: Module, case: Case, device: Device, report: Report) -> None:
    """Make all checks of a case and add them to a report.

    Parameters
    ----------
    module : Module
        Holds the case's spec.
    case : Case
    device : Device
        The module's kind.
    report : Report
        Changed.
    """
    inputs, spec = case.make(), case.spec
    expected = [(graph, outputs_of(graph, inputs, spec)) for graph in device.graphs(module, spec)]
    tally = report.groups.setdefault(case.group, Tally())
    for layout, threads in itertools.product(case.layouts, device.threads):
        where = f"{case.description}; {layout}"
        if threads:
            module.library.get_function("qknorm_set_num_threads")(threads)
            where += f", {threads} thread{'s' * (threads > 1)}"
        placed = Placed(spec, inputs, layout, by_element=device.by_element)
        device.call(module, spec.op, placed.arrays, inputs.epsilon)
        tally.checks += 1
        outputs = {name: placed.arrays[name] for name in spec.outputs}
        for graph, wanted in expected:
            difference = _compare(outputs, wanted, inputs, tally, by_torch=graph.by_torch)
            if difference:
                report.note(f"{where}{', against torch' * graph.by_torch}: {difference}")
        # A second comparison with further graphs could not find more.
        del expected[1:]
        if not placed.guards_intact():
            tally.stray_writes += 1
            report.note(f"{where}: memory that is no output was written to")
    if any(device.threads):
        module.library.get_function("qknorm_set_num_threads")(0)


def _compare(
    outputs: Mapping[str, npt.NDArray],
    expected: Sequence[npt.NDArray],
    inputs: Activations,
    tally: Tally,
    *,
    by_torch: bool,
) -> str:
    """Count what differs from the expected outputs; return the first difference, or ``""``."""
    first = ""
    for (name, actual), wanted in zip(outputs.items(), expected, strict=True):
        different = reference.differing(actual, wanted)
        if by_torch:
            tally.torch_elements += wanted.size
            tally.from_torch += different
        else:
            tally.elements += wanted.size
            tally.from_numpy += different
        if different and not first:
            first = describe_difference(name, inputs, actual, wanted)
    return first


def describe_difference(name: str, a: Activations, actual: npt.NDArray, wanted: npt.NDArray) -> str:
    """Describe the first element that differs, of the output of that name."""
    bits = f"u{wanted.itemsize}"
    unequal = np.ascontiguousarray(actual).view(bits) != np.ascontiguousarray(wanted).view(bits)
    both_nan = np.isnan(actual.astype(np.float32)) & np.isnan(wanted.astype(np.float32))
    index = tuple(map(int, np.argwhere(unequal & ~both_nan)[0]))
    element = f"{name}[{', '.join(map(str, index))}]"
    if name == "qk_var":
        told, must = float(actual[index]).hex(), float(wanted[index]).hex()
        return f"{element} is {told}, must be {must}"

    def shown(value: npt.NDArray) -> str:
        pattern = int(value.view(f"u{value.itemsize}"))
        return f"{float(value):.9g} (0x{pattern:0{2 * value.itemsize}x})"

    difference = f"{element} is {shown(actual[index])}, must be {shown(wanted[index])}"
    if name not in ("q_out", "k_out"):
        return difference
    row, col = index
    if "positions" in a.extra:  # it comes from two elements, or, where these are NaN, from neither
        return f"{difference}, at position {a.extra['positions'][row]}"
    operand = name[0]
    x, gamma = (a.q, a.gamma_q) if operand == "q" else (a.k, a.gamma_k)
    var = a.qk_var[row, "qk".index(operand)]
    return (
        f"{difference}, from {operand} = {shown(x[row, col])}, qk_var = {shown(var)}, "
        f"gamma_{operand} = {shown(gamma[col])}, epsilon = {a.epsilon:g}"
    )


#: What ``verify`` compiles of the operations that rotate, and of those that store: columns small,
#: heads of MiniMax-M2 and OLMo (128), of others (64), and of no power of two (80).
_ROTATING: tuple[tuple[str, int, int, dict[str, Any]], ...] = (
    ("bfloat16", 256, 128, {"head_dim": 128, "rotary_dim": 64}),
    ("bfloat16", 160, 80, {
        "head_dim": 80, "rotary_dim": 80, "interleaved": True, "statistics": "local",
    }),
    ("float16", 128, 64, {
        "head_dim": 64, "rotary_dim": 64, "rotary_dtype": "float32", "cast_before_gamma": True,
    }),
    ("float32", 192, 64, {"head_dim": 64, "rotary_dim": 32, "reproducible": True}),
)  # fmt: skip
_STORING: tuple[tuple[str, int, int, dict[str, Any]], ...] = (
    ("bfloat16", 384, 128, {
        "head_dim": 128, "rotary_dim": 128, "statistics": "local", "writes_k_out": True,
    }),
    ("bfloat16", 192, 128, {
        "head_dim": 64, "rotary_dim": 64, "interleaved": True, "cache_dtype": "float8_e4m3fn",
    }),
    ("bfloat16", 128, 128, {"head_dim": 64, "statistics": "local"}),
    ("float16", 240, 160, {"head_dim": 80, "rotary_dim": 32, "cache_dtype": "float8_e4m3fn"}),
)  # fmt: skip


def default_specs(target: str) -> tuple[tuple[KernelSpec, ...], ...]:
    """Return what ``verify`` compiles, by module.

    Every pairing open, some columns fixed, the other operations, and those that rotate.
    """
    fixed = (
        ("bfloat16", "bfloat16", 1536, 256),
        ("bfloat16", "bfloat16", 257, 1537),
        ("bfloat16", "bfloat16", 7, 1),
        ("bfloat16", "float32", 1536, 256),
        ("float16", "float16", 1536, 256),
        ("float32", "float32", 1536, 256),
    )
    others = (
        ("bfloat16", None, None),
        ("bfloat16", 1536, 256),
        ("float16", 192, 64),
        ("float32", None, None),
    )
    cast = (("bfloat16", "bfloat16"), ("float16", "bfloat16"), ("bfloat16", "float32"))
    return (
        tuple(KernelSpec(in_dtype=a, out_dtype=b, target=target) for a, b in PAIRINGS),
        tuple(
            KernelSpec(in_dtype=a, out_dtype=b, q_cols=q, k_cols=k, target=target)
            for a, b, q, k in fixed
        ),
        (
            *(
                KernelSpec(op=op, in_dtype=a, q_cols=q, k_cols=k, target=target)
                for op, operation in OPERATIONS.items()
                if op != "apply_qk_rms_norm" and not operation.rotates
                for a, q, k in others
            ),
            *(
                KernelSpec(in_dtype=a, out_dtype=b, cast_before_gamma=True, target=target)
                for a, b in cast
            ),
        ),
        tuple(
            KernelSpec(op=op, in_dtype=a, q_cols=q, k_cols=k, target=target, **choices)
            for op, rotating in (
                ("qk_rms_norm_rope", _ROTATING),
                ("qk_rms_norm_rope_cache", _STORING),
            )
            for a, q, k, choices in rotating
        ),
    )


def iterate(
    modules: Iterable[Module], device: Device, *, thorough: bool = False
) -> Iterator[tuple[Module, Case]]:
    """Generate every case of every spec of some modules."""
    for module in modules:
        for spec in module.specs:
            spec.check_alone("verified")
            for case in device.cases(module, spec, thorough=thorough):
                yield module, case
