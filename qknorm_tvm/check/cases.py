"""The cases of a spec: every bit pattern, and shapes with special values strewn in."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator

import numpy as np
import numpy.typing as npt

from ..spec import DTYPE_BYTES, KernelSpec
from .expected import with_extra_inputs
from .inputs import Activations, generate
from .layouts import layouts_for
from .special_values import GAMMAS, VARIANCES, all_patterns, special_gamma

#: Every in and out dtype.
PAIRINGS = tuple((a, b) for a in DTYPE_BYTES for b in DTYPE_BYTES)
#: Columns of Q and K where a spec leaves them open: each number is once Q's and once K's.
COLUMNS = ((1, 7), (7, 257), (257, 1537), (1537, 1536), (1536, 8192), (8192, 1))
MORE_COLUMNS = (
    *((15, 16), (16, 17), (31, 33), (33, 63)),
    *((64, 8), (96, 100), (128, 127), (6144, 1024)),
)
ROWS = (0, 1, 17, 513)
MORE_ROWS = (2, 3, 4, 5, 8, 64, 1000)


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


def _group(spec: KernelSpec, topic: str) -> str:
    """Return a heading: operations and orders of rounding apart."""
    if spec.op != "apply_qk_rms_norm":
        return f"{spec.op}: {topic}"
    return f"cast_before_gamma: {topic}" if spec.cast_before_gamma else topic


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
        activations = Activations(
            fill(q_cols),
            fill(k_cols),
            np.stack([variances, np.roll(variances, rows)], axis=1),
            special_gamma(kinds[0], q_cols),
            special_gamma(kinds[1], k_cols),
        )
        return with_extra_inputs(spec, activations)

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
    adds_rows = all(tensor.name != "qk_var" or tensor.is_output for tensor in spec.tensors)

    def make() -> Activations:
        activations = generate(rows, q_cols, k_cols, spec.in_dtype, seed=seed)
        rng = np.random.default_rng(seed + 1)
        for x in (activations.q, activations.k):
            normal = x[::2].copy()
            bits = x.view(f"u{x.itemsize}").reshape(-1)
            where = rng.integers(0, max(bits.size, 1), bits.size // 16)
            bits[where] = rng.integers(0, 1 << 8 * x.itemsize, where.size, dtype=bits.dtype)
            if adds_rows:
                x[::2] = normal
        special = activations.qk_var[3::4]
        special[...] = rng.choice(VARIANCES, special.shape)
        return with_extra_inputs(spec, activations, seed)

    return Case(
        spec,
        _group(spec, topic),
        f"{spec.in_dtype} -> {spec.out_dtype}, M {rows}, columns {q_cols} and {k_cols}",
        layouts_for(spec),
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
    for gamma in range(0, len(GAMMAS), 1 if thorough else 2):
        yield pattern_case(spec, spec.q_cols or 1536, spec.k_cols or 1537, gamma)
    pairs = COLUMNS + (MORE_COLUMNS if thorough else ())
    # A fixed number of columns takes the place of those listed; equal pairs are tried once.
    for q_cols, k_cols in dict.fromkeys((spec.q_cols or q, spec.k_cols or k) for q, k in pairs):
        for rows in ROWS + (MORE_ROWS if thorough else ()):
            yield shape_case(spec, rows, q_cols, k_cols)
