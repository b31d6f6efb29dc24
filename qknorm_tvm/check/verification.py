"""Bit-exactness: the cases, the memory layouts, and the comparison with the unfused graphs.

``qknorm-tvm verify`` and the tests share this. A `Case` is one set of inputs; a *check* is one call
on it, in one layout, with one number of threads. Outputs must equal `qknorm_tvm.check.reference`
bit for bit (a NaN for a NaN), and memory that is not an output must stay as it was.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Sequence

import numpy as np
import numpy.typing as npt

from ..load.module import Module
from ..operations import OPERATIONS
from ..spec import DTYPE_BYTES, KernelSpec
from ..targets import adds_fused
from . import reference
from .calls import operation_arguments
from .inputs import Activations, generate
from .layouts import LAYOUTS, Placed, layouts_for
from .reference import NUMPY_DTYPES
from .reference_torch import apply_qk_rms_norm as torch_graph
from .reference_torch import to_numpy, to_torch, torch_or_none

#: Every in and out dtype. A module for NumPy calls names bfloat16 first, see ``entry.c``.
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


def special_gamma(kind: str, cols: int) -> npt.NDArray:
    """Return a gamma of one of the `GAMMAS`.

    Parameters
    ----------
    kind : str
        ``"ordinary"``, ``"one"``, ``"denormal"``, ``"huge"``, ``"signed zero and inf"`` or
        ``"NaN"``; the last with the payload 0x7fffffff, which rounds to -0 when a NaN is rounded
        like a number.
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
        bits = np.array([0x7FFFFFFF, 0xFFFFFFFF, 0x7FC00000, 0x7F800001], np.uint32)
        return np.resize(bits, cols).view(np.float32)
    raise ValueError(f"kind must be one of {', '.join(GAMMAS)}, got {kind!r}")


#: Kinds of gamma; neighbours go to Q and to K of one case.
GAMMAS = ("ordinary", "one", "denormal", "huge", "signed zero and inf", "NaN")


@dataclasses.dataclass(frozen=True)
class Case:
    """One set of inputs and what to do with it.

    Parameters
    ----------
    group : str
        What it is about: a line of the summary.
    description : str
        Which case of the group.
    out_dtype : str
        Element type of the outputs.
    layouts : tuple of str
        Some of `qknorm_tvm.check.layouts.LAYOUTS`.
    make : callable
        Makes the inputs; cases are many and their arrays large.
    op : str
        The operation that is called.
    cast_before_gamma : bool
        The spec's.
    """

    group: str
    description: str
    out_dtype: str
    layouts: tuple[str, ...]
    make: Callable[[], Activations]
    op: str = "apply_qk_rms_norm"
    cast_before_gamma: bool = False


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

    return Case(
        f"every {spec.in_dtype} pattern" if spec.in_bytes == 2 else "float32 patterns",
        f"{spec.in_dtype} -> {spec.out_dtype}, columns {q_cols} and {k_cols}, gamma_q {kinds[0]}, "
        f"gamma_k {kinds[1]}",
        str(spec.out_dtype),
        ("packed",),
        make,
    )


def shape_case(spec: KernelSpec, rows: int, q_cols: int, k_cols: int, *, seed: int = 0) -> Case:
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

    return Case(
        "shapes and layouts",
        f"{spec.in_dtype} -> {spec.out_dtype}, M {rows}, columns {q_cols} and {k_cols}",
        str(spec.out_dtype),
        layouts_for(spec.in_dtype, str(spec.out_dtype)),
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


def of_operation(spec: KernelSpec, case: Case) -> Case:
    """Return a case as one of the spec's operation, under a heading of its own."""
    group = case.group
    if spec.op != "apply_qk_rms_norm":
        group = f"{spec.op}: {case.group}"
    elif spec.cast_before_gamma:
        group = f"cast_before_gamma: {case.group}"
    layouts = case.layouts if spec.operation.normalises else LAYOUTS[:4]
    return dataclasses.replace(
        case, group=group, layouts=layouts, op=spec.op, cast_before_gamma=spec.cast_before_gamma
    )


@dataclasses.dataclass
class Tally:
    """Counts of one group: checks made, elements compared, and what differed."""

    checks: int = 0
    elements: int = 0
    from_numpy: int = 0
    from_torch: int = 0
    spoilt: int = 0
    torch_elements: int = 0


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


def run_case(module: Module, case: Case, threads: Sequence[int], report: Report) -> None:
    """Make all checks of a case and add them to a report.

    Parameters
    ----------
    module : Module
        A CPU module that holds a spec for the case.
    case : Case
    threads : sequence of int
        Numbers of threads to try.
    report : Report
        Changed.
    """
    set_threads = module.library.get_function("qknorm_set_num_threads")
    inputs = case.make()
    outputs = OPERATIONS[case.op].outputs
    expected = _expected(module, inputs, case)
    # torch sums in another order: it is beside what takes its statistics from the caller.
    by_torch = _torch_outputs(inputs, case) if case.op == "apply_qk_rms_norm" else None
    tally = report.groups.setdefault(case.group, Tally())
    for layout in case.layouts:
        for count in threads:
            set_threads(count)
            placed = Placed(inputs, case.out_dtype, layout)
            a, guarded = placed.activations, Guarded(inputs.qk_var.shape)
            arrays = {"q_out": placed.q_out, "k_out": placed.k_out, "q": a.q, "k": a.k}
            arrays |= {"gamma_q": a.gamma_q, "gamma_k": a.gamma_k}
            arrays["qk_var"] = guarded.array if "qk_var" in outputs else a.qk_var
            getattr(module, case.op)(*operation_arguments(case.op, arrays, inputs.epsilon))
            tally.checks += 1
            where = f"{case.description}; {layout}, {count} thread{'s' * (count > 1)}"
            for name, wanted in zip(outputs, expected, strict=True):
                tally.elements += wanted.size
                wrong = reference.differing(arrays[name], wanted)
                tally.from_numpy += wrong
                if wrong:
                    told = describe_difference(name, inputs, arrays[name], wanted)
                    report.note(f"{where}: {told}")
            # The graphs are compared with each other once a case; a second look at each layout
            # could not find more.
            if by_torch is not None and layout == case.layouts[0] and count == threads[0]:
                for name, wanted in zip(outputs, by_torch, strict=True):
                    tally.torch_elements += wanted.size
                    wrong = reference.differing(arrays[name], wanted)
                    tally.from_torch += wrong
                    if wrong:
                        told = describe_difference(name, inputs, arrays[name], wanted)
                        report.note(f"{where}, against torch: {told}")
            if not (placed.intact() and guarded.intact()):
                tally.spoilt += 1
                report.note(f"{where}: memory that is no output was written to")
    set_threads(0)


class Guarded:
    """An array of float32 with guards around it.

    Parameters
    ----------
    shape : tuple of int
    """

    def __init__(self, shape: tuple[int, ...]):
        self._memory = np.full(int(np.prod(shape)) + 32, -77.0, np.float32)
        self.array = self._memory[16:-16].reshape(shape)

    def intact(self) -> bool:
        """Whether the guards are as they were."""
        return bool((self._memory[:16] == -77).all() and (self._memory[-16:] == -77).all())


def _expected(module: Module, a: Activations, case: Case) -> tuple[npt.NDArray, ...]:
    qk_var = a.qk_var
    if case.op != "apply_qk_rms_norm":
        qk_var = expected_statistics(module, a)
    if not OPERATIONS[case.op].normalises:
        return (qk_var,)
    return reference.apply_qk_rms_norm(
        a.q, a.k, qk_var, a.gamma_q, a.gamma_k, a.epsilon, case.out_dtype,
        cast_before_gamma=case.cast_before_gamma,
    )  # fmt: skip


def expected_statistics(module: Module, a: Activations) -> npt.NDArray:
    """Return what ``row_mean_of_squares_qk`` of a module's active level must compute."""
    level = next(x for x in module.metadata["levels"] if x["name"] == module.active_level)
    fused = adds_fused(level["name"], level["features"])
    return reference.row_mean_of_squares_qk(a.q, a.k, fused=fused)


def _torch_outputs(inputs: Activations, case: Case) -> tuple[npt.NDArray, ...] | None:
    torch = torch_or_none()
    if torch is None:
        return None
    a = inputs
    q, k, qk_var, gamma_q, gamma_k = (
        to_torch(np.ascontiguousarray(x)) for x in (a.q, a.k, a.qk_var, a.gamma_q, a.gamma_k)
    )
    out = torch_graph(
        q, k, qk_var, gamma_q, gamma_k, a.epsilon, getattr(torch, case.out_dtype),
        cast_before_gamma=case.cast_before_gamma,
    )  # fmt: skip
    return tuple(to_numpy(x) for x in out)


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


def iterate(modules: Iterable[Module], *, thorough: bool = False) -> Iterator[tuple[Module, Case]]:
    """Generate every case of every spec of some modules."""
    for module in modules:
        for spec in module.specs:
            for case in cases_for(spec, thorough=thorough):
                yield module, of_operation(spec, case)
