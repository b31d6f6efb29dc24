"""Bit-exactness: the cases, the memory layouts, and the comparison with the unfused graphs.

``qknorm-tvm verify`` and the tests share this. A `Case` is one set of inputs; a *check* is one call
on it, in one layout, with one number of threads. Outputs must equal what the `Device` expects bit
for bit (a NaN for a NaN), and memory that is not an output must stay as it was.
"""

from __future__ import annotations

import abc
import dataclasses
import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

import numpy as np
import numpy.typing as npt

from ..load.module import Module
from ..spec import DTYPE_BYTES, KernelSpec
from ..targets import adds_fused
from . import reference
from .calls import operation_arguments
from .inputs import Activations, generate
from .layouts import LAYOUTS, Placed, layouts_for
from .reference import NUMPY_DTYPES
from .reference_torch import apply_qk_rms_norm as torch_graph
from .reference_torch import to_numpy, to_torch, torch_or_none

#: Every in and out dtype.
PAIRINGS = tuple((a, b) for a in DTYPE_BYTES for b in DTYPE_BYTES)
#: Columns of Q and K where a spec leaves them open: each number is once Q's and once K's.
COLUMNS = ((1, 7), (7, 257), (257, 1537), (1537, 1536), (1536, 8192), (8192, 1))
MORE_COLUMNS = (
    (15, 16),
    (16, 17),
    (31, 33),
    (33, 63),
    (64, 8),
    (96, 100),
    (128, 127),
    (6144, 1024),
)
ROWS = (0, 1, 17, 513)
MORE_ROWS = (2, 3, 4, 5, 8, 64, 1000)

#: Mean squares with an epsilon of 1e-6 that have gone wrong elsewhere.
VARIANCES = np.array(
    [0.37, 1, 0, -0.0, -1, -1e-6, 1e-30, 1e-40, 1e-45, 3e38, np.inf, -np.inf, np.nan], np.float32
)
_NAN_PAYLOADS = (0x7FFFFFFF, 0xFFFFFFFF, 0x7FC00000, 0x7F800001)
_MORE_NAN_PAYLOADS = (0x7FFF7FFF, 0x7FFF8000, 0xFF800001, 0xFFC00000)
#: float32 NaNs that a rounding carry could turn into another number: 0x7fffffff rounds to -0 where
#: a NaN is rounded like a number.
NAN_BITS = np.array(_NAN_PAYLOADS + _MORE_NAN_PAYLOADS, np.uint32)


def special_gamma(kind: str, cols: int) -> npt.NDArray:
    """Return a gamma of one of the `GAMMAS`.

    Parameters
    ----------
    kind : str
        ``"ordinary"``, ``"one"``, ``"denormal"``, ``"huge"``, ``"signed zero and inf"`` or
        ``"NaN"``, with the `NAN_BITS`.
    cols : int
        Its length.
    """
    rng = np.random.default_rng(cols)
    sign = np.where(np.arange(cols) % 3 == 2, np.float32(-1), np.float32(1))
    if kind == "ordinary":
        return 1 + rng.standard_normal(cols, dtype=np.float32) / 8
    if kind == "one":
        return np.ones(cols, np.float32)
    if kind == "denormal":
        bits = rng.integers(1, 1 << 23, cols, dtype=np.uint32)
        bits[::5] = 1
        return bits.view(np.float32) * sign
    if kind == "huge":
        return rng.uniform(1e37, 3.4e38, cols).astype(np.float32) * sign
    if kind == "signed zero and inf":
        return np.resize(np.array([0, -0.0, np.inf, -np.inf], np.float32), cols)
    if kind == "NaN":
        return np.resize(NAN_BITS, cols).view(np.float32)
    raise ValueError(f"kind must be one of {', '.join(GAMMAS)}, got {kind!r}")


#: Kinds of gamma; neighbours go to Q and to K of one case.
GAMMAS = ("ordinary", "one", "denormal", "huge", "signed zero and inf", "NaN")


@dataclasses.dataclass(frozen=True)
class Case:
    """One set of inputs and what to do with it.

    Parameters
    ----------
    spec : KernelSpec
        What is called; its columns may be open.
    group : str
        What the case is about: a line of the summary.
    description : str
        Which case of the group.
    layouts : tuple of str
        Some of `qknorm_tvm.check.layouts.LAYOUTS`.
    make : callable
        Makes the inputs; cases are many and their arrays large.
    """

    spec: KernelSpec
    group: str
    description: str
    layouts: tuple[str, ...]
    make: Callable[[], Activations]

    @property
    def out_dtype(self) -> str:
        """Element type of the outputs."""
        return str(self.spec.out_dtype)


def _group(spec: KernelSpec, topic: str) -> str:
    """Return a heading: operations and orders of rounding apart."""
    if spec.op != "apply_qk_rms_norm":
        return f"{spec.op}: {topic}"
    return f"cast_before_gamma: {topic}" if spec.cast_before_gamma else topic


def all_patterns(dtype: str) -> npt.NDArray:
    """Return every bit pattern of a 16-bit type; of float32 every upper half with several lower.

    The lower halves are those around which rounding to bfloat16 turns, and two random ones, so
    that the NaNs with all payload bits set are among them.
    """
    upper = np.arange(1 << 16, dtype=np.uint16)
    if dtype != "float32":
        return upper.view(NUMPY_DTYPES[dtype])
    lower = np.random.default_rng(0).integers(0, 1 << 16, (1 << 16, 6), dtype=np.uint32)
    lower[:, :4] = (0, 0x7FFF, 0x8000, 0xFFFF)
    return ((upper.astype(np.uint32)[:, None] << 16) | lower).reshape(-1).view(np.float32)


def pattern_case(spec: KernelSpec, q_cols: int, k_cols: int, gamma: int) -> Case:
    """Return a case with `all_patterns` in q and in k, under every one of `VARIANCES`.

    Parameters
    ----------
    spec : KernelSpec
        For its dtypes.
    q_cols, k_cols : int
        Where one is far smaller than the other, it gets a part of the patterns only.
    gamma : int
        Which of the `GAMMAS` q gets; k gets the next.
    """
    kinds = GAMMAS[gamma % len(GAMMAS)], GAMMAS[(gamma + 1) % len(GAMMAS)]

    def make() -> Activations:
        patterns = all_patterns(spec.in_dtype)
        rows = -(-len(patterns) // max(min(q_cols, k_cols), max(q_cols, k_cols) // 8))
        variances = np.repeat(VARIANCES, rows)

        def fill(cols: int) -> npt.NDArray:
            return np.tile(np.resize(patterns, (rows, cols)), (len(VARIANCES), 1))

        # k meets the variances in another order, so that a mix-up of the columns shows.
        return Activations(
            fill(q_cols),
            fill(k_cols),
            np.stack([variances, np.roll(variances, rows)], axis=1),
            special_gamma(kinds[0], q_cols),
            special_gamma(kinds[1], k_cols),
        )

    topic = f"every {spec.in_dtype} pattern" if spec.in_bytes == 2 else "float32 patterns"
    return Case(
        spec,
        _group(spec, topic),
        f"{spec.in_dtype} -> {spec.out_dtype}, columns {q_cols} and {k_cols}, gamma_q {kinds[0]}, "
        f"gamma_k {kinds[1]}",
        ("packed",),
        make,
    )


def shape_case(
    spec: KernelSpec,
    rows: int,
    q_cols: int,
    k_cols: int,
    *,
    seed: int = 0,
    topic: str = "shapes and layouts",
) -> Case:
    """Return a case of one shape in every layout: normal data, with special values strewn in.

    Where rows are added up, every other row has none: one infinity makes a row's sum infinite,
    whatever else is wrong with it.
    """

    def make() -> Activations:
        a = generate(rows, q_cols, k_cols, spec.in_dtype, seed=seed)
        rng = np.random.default_rng(seed + 1)
        for x in (a.q, a.k):
            normal = x[::2].copy()
            bits = x.view(f"u{x.itemsize}").reshape(-1)
            where = rng.integers(0, max(bits.size, 1), bits.size // 16)
            bits[where] = rng.integers(0, 1 << 8 * x.itemsize, where.size, dtype=bits.dtype)
            if spec.op != "apply_qk_rms_norm":
                x[::2] = normal
        a.qk_var[3::4] = rng.choice(VARIANCES, a.qk_var[3::4].shape)
        return a

    # Statistics have no output like q or k, which could be in place.
    in_place = spec.operation.normalises
    return Case(
        spec,
        _group(spec, topic),
        f"{spec.in_dtype} -> {spec.out_dtype}, M {rows}, columns {q_cols} and {k_cols}",
        layouts_for(spec.in_dtype, str(spec.out_dtype)) if in_place else LAYOUTS[:4],
        make,
    )


def cases_for(spec: KernelSpec, *, thorough: bool = False) -> Iterator[Case]:
    """Generate the cases for one spec: bit patterns, then shapes.

    Parameters
    ----------
    spec : KernelSpec
        Open columns stand for all of `COLUMNS`.
    thorough : bool
        Also `MORE_COLUMNS`, `MORE_ROWS`, and every kind of gamma for q and for k.
    """
    columns: Iterable[tuple[int, int]]
    if spec.q_cols is None or spec.k_cols is None:
        pairs = COLUMNS + (MORE_COLUMNS if thorough else ())
        # One column may be open and the other not.
        columns = dict.fromkeys((spec.q_cols or q, spec.k_cols or k) for q, k in pairs)
        pattern_columns = (spec.q_cols or 1536, spec.k_cols or 1537)
    else:
        columns = [(spec.q_cols, spec.k_cols)]
        pattern_columns = (spec.q_cols, spec.k_cols)
    for gamma in range(0, len(GAMMAS), 1 if thorough else 2):
        yield pattern_case(spec, *pattern_columns, gamma)
    for q_cols, k_cols in columns:
        for rows in ROWS + (MORE_ROWS if thorough else ()):
            yield shape_case(spec, rows, q_cols, k_cols)


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


@dataclasses.dataclass(frozen=True)
class Expected:
    """What outputs must be.

    Parameters
    ----------
    outputs : tuple of ndarray
        In the order of the operation's.
    by_torch : bool
        Whether torch computed them, not NumPy.
    once : bool
        Whether the first call of a case is compared, and no other.
    """

    outputs: tuple[npt.NDArray, ...]
    by_torch: bool = False
    once: bool = False


class Device(abc.ABC):
    """Where cases run: their memory, calls and references.

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
    def expected(self, module: Module, spec: KernelSpec, inputs: Activations) -> list[Expected]:
        """Return what outputs are compared with."""

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

    def expected(self, module: Module, spec: KernelSpec, inputs: Activations) -> list[Expected]:
        expected = [Expected(expected_outputs(module, spec, inputs))]
        # torch sums in another order: it is beside what takes its statistics from the caller.
        if spec.op == "apply_qk_rms_norm" and torch_or_none() is not None:
            by_torch = torch_outputs(
                inputs, str(spec.out_dtype), "cpu", cast_before_gamma=spec.cast_before_gamma
            )
            # Once: a second look at each layout could not find more.
            expected.append(Expected(by_torch, by_torch=True, once=True))
        return expected

    def call(
        self, module: Module, op: str, arrays: Mapping[str, npt.NDArray], epsilon: float
    ) -> None:
        getattr(module, op)(*operation_arguments(op, arrays, epsilon))


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
    expected = device.expected(module, spec, inputs)
    tally = report.groups.setdefault(case.group, Tally())
    calls = list(itertools.product(case.layouts, device.threads))
    for layout, threads in calls:
        where = f"{case.description}; {layout}"
        if threads:
            module.library.get_function("qknorm_set_num_threads")(threads)
            where += f", {threads} thread{'s' * (threads > 1)}"
        placed = Placed(inputs, case.out_dtype, layout, by_element=device.by_element)
        arrays = placed.arrays(spec.operation.outputs)
        device.call(module, spec.op, arrays, inputs.epsilon)
        tally.checks += 1
        for wanted in expected:
            if wanted.once and (layout, threads) != calls[0]:
                continue
            outputs = {name: arrays[name] for name in spec.operation.outputs}
            difference = _compare(outputs, wanted, inputs, tally)
            if difference:
                report.note(f"{where}{', against torch' * wanted.by_torch}: {difference}")
        if not placed.guards_intact():
            tally.stray_writes += 1
            report.note(f"{where}: memory that is no output was written to")
    if any(device.threads):
        module.library.get_function("qknorm_set_num_threads")(0)


def _compare(
    outputs: Mapping[str, npt.NDArray], expected: Expected, inputs: Activations, tally: Tally
) -> str:
    """Count what differs from the expected outputs; returns the first difference, or ``""``."""
    first = ""
    for (name, actual), wanted in zip(outputs.items(), expected.outputs, strict=True):
        different = reference.differing(actual, wanted)
        if expected.by_torch:
            tally.torch_elements += wanted.size
            tally.from_torch += different
        else:
            tally.elements += wanted.size
            tally.from_numpy += different
        if different and not first:
            first = describe_difference(name, inputs, actual, wanted)
    return first


def expected_outputs(module: Module, spec: KernelSpec, a: Activations) -> tuple[npt.NDArray, ...]:
    """Return what a CPU module's outputs must be, by NumPy.

    Parameters
    ----------
    module : Module
        Its active level decides how squares are added.
    spec : KernelSpec
    a : Activations

    Returns
    -------
    tuple of ndarray
        In the order of the operation's outputs.
    """
    qk_var = a.qk_var
    if spec.op != "apply_qk_rms_norm":
        level = next(x for x in module.metadata["levels"] if x["name"] == module.active_level)
        fused = adds_fused(level["name"], level["features"])
        qk_var = reference.row_mean_of_squares_qk(a.q, a.k, fused=fused)
    if not spec.operation.normalises:
        return (qk_var,)
    return reference.apply_qk_rms_norm(
        a.q, a.k, qk_var, a.gamma_q, a.gamma_k, a.epsilon, str(spec.out_dtype),
        cast_before_gamma=spec.cast_before_gamma,
    )  # fmt: skip


def torch_outputs(
    a: Activations, out_dtype: str, device: str, *, cast_before_gamma: bool = False
) -> tuple[npt.NDArray, ...]:
    """Return the outputs of the unfused graph in torch on a device, given the statistics."""
    import torch

    inputs = {
        name: to_torch(np.ascontiguousarray(array)).to(device) for name, array in a.tensors.items()
    }
    outputs = torch_graph(
        **inputs,
        epsilon=a.epsilon,
        out_dtype=getattr(torch, out_dtype),
        cast_before_gamma=cast_before_gamma,
    )
    return tuple(to_numpy(x.cpu()) for x in outputs)


def describe_difference(name: str, a: Activations, actual: npt.NDArray, wanted: npt.NDArray) -> str:
    """Describe the first element of an output that differs."""
    bits = f"u{wanted.itemsize}"
    got, want = np.ascontiguousarray(actual).view(bits), np.ascontiguousarray(wanted).view(bits)
    nan = np.isnan(actual.astype(np.float32)) & np.isnan(wanted.astype(np.float32))
    row, col = map(int, np.argwhere((got != want) & ~nan)[0])
    if name == "qk_var":
        told, must = float(actual[row, col]).hex(), float(wanted[row, col]).hex()
        return f"qk_var[{row}, {col}] is {told}, must be {must}"
    operand = name[0]
    x, gamma = (a.q, a.gamma_q) if operand == "q" else (a.k, a.gamma_k)
    var = a.qk_var[row, "qk".index(operand)]

    def shown(array: npt.NDArray, *at: int) -> str:
        digits = 2 * array.itemsize
        return f"{float(array[at]):.9g} (0x{int(array[at].view(f'u{array.itemsize}')):0{digits}x})"

    return (
        f"{operand}_out[{row}, {col}] is {shown(actual, row, col)}, must be "
        f"{shown(wanted, row, col)}, from {operand} = {shown(x, row, col)}, "
        f"qk_var = {shown(var.reshape(1), 0)}, gamma_{operand} = {shown(gamma, col)}, "
        f"epsilon = {a.epsilon:g}"
    )


def default_specs(target: str) -> tuple[tuple[KernelSpec, ...], ...]:
    """Return what ``verify`` compiles, by module.

    Every pairing open, some columns fixed, and the other operations.
    """
    pairings = tuple(KernelSpec(in_dtype=a, out_dtype=b, target=target) for a, b in PAIRINGS)
    fixed = [("bfloat16", "bfloat16", 1536, 256), ("bfloat16", "bfloat16", 257, 1537)]
    fixed += [("bfloat16", "bfloat16", 7, 1), ("bfloat16", "float32", 1536, 256)]
    fixed += [("float16", "float16", 1536, 256), ("float32", "float32", 1536, 256)]
    layer = [("bfloat16", None, None), ("bfloat16", 1536, 256), ("float16", 192, 64)]
    layer += [("float32", None, None)]
    others = [
        KernelSpec(op=op, in_dtype=a, q_cols=q, k_cols=k, target=target)
        for op in ("row_mean_of_squares_qk", "qk_rms_norm")
        for a, q, k in layer
    ]
    others += [
        KernelSpec(in_dtype=a, out_dtype=b, cast_before_gamma=True, target=target)
        for a, b in (("bfloat16", "bfloat16"), ("float16", "bfloat16"), ("bfloat16", "float32"))
    ]
    return (
        pairings,
        tuple(
            KernelSpec(in_dtype=a, out_dtype=b, q_cols=q, k_cols=k, target=target)
            for a, b, q, k in fixed
        ),
        tuple(others),
    )


def iterate(
    modules: Iterable[Module], device: Device, *, thorough: bool = False
) -> Iterator[tuple[Module, Case]]:
    """Generate every case of every spec of some modules."""
    for module in modules:
        for spec in module.specs:
            for case in device.cases(module, spec, thorough=thorough):
                yield module, case
