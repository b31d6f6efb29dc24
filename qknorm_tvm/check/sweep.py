"""Every float32 bit pattern through a few variances and gammas: 2^32 inputs, minutes."""

from __future__ import annotations

import concurrent.futures
import dataclasses
from collections.abc import Callable, Mapping, Sequence

import numpy as np
import numpy.typing as npt

from ..load.module import Module
from ..spec import KernelSpec
from . import reference
from .calls import operation_arguments
from .inputs import Activations, aligned_empty
from .reference_torch import to_numpy, to_torch, torch_or_none

#: Mean square and gamma, two a call (Q's and K's), with an epsilon of 0. The first is the identity,
#: so that the rounding of every pattern itself is seen; the last two send most products below the
#: normal numbers, and beyond the largest.
PAIRS = (((1.0, 1.0), (0.7311, 1.3137)), ((3e38, -0.5), (1.2e-38, -3.1)))
OUT_DTYPES = ("bfloat16", "float16", "float32")
#: One call: small enough that what NumPy computes beside it stays in a cache.
_ROWS, _COLS = 256, 1024
_CHUNK = _ROWS * _COLS
_BLOCK = 64  # chunks between two words of progress


def sweep_specs(target: str) -> tuple[KernelSpec, ...]:
    """Return the specs of the module that `sweep` needs."""
    return tuple(
        KernelSpec(
            in_dtype="float32", out_dtype=out_dtype, q_cols=_COLS, k_cols=_COLS, target=target
        )
        for out_dtype in OUT_DTYPES
    )


@dataclasses.dataclass
class SweepResult:
    """Outputs compared, how many differ, and the first difference described."""

    compared: int = 0
    different: int = 0
    first_difference: str | None = None

    def add(self, other: SweepResult) -> None:
        """Count another part of the sweep too."""
        self.compared += other.compared
        self.different += other.different
        self.first_difference = self.first_difference or other.first_difference


def sweep(
    module: Module,
    *,
    workers: int,
    start: int = 0,
    stop: int = 1 << 32,
    progress: Callable[[int], None] = lambda patterns: None,
) -> SweepResult:
    """Compare outputs for all float32 patterns with the reference, for every output dtype.

    Parameters
    ----------
    module : Module
        Holds `sweep_specs`.
    workers : int
        Threads; each calls the module with one thread.
    start, stop : int
        Patterns; whole chunks are compared, so a few beyond `stop` may be.
    progress : callable
        Told how many patterns were done since it was last called, from several threads.

    Returns
    -------
    SweepResult

    Notes
    -----
    NumPy rounds to float16 at some 100 ns an element where the result overflows. Where torch is
    installed, its rounding takes the place of NumPy's there.
    """
    set_threads = module.library.get_function("qknorm_set_num_threads")
    torch = torch_or_none()
    torch_threads = torch.get_num_threads() if torch else 0
    set_threads(1)
    if torch:
        torch.set_num_threads(1)
    blocks = range(start, stop, _CHUNK * _BLOCK)
    result = SweepResult()
    try:
        with concurrent.futures.ThreadPoolExecutor(workers) as pool:
            jobs = [pool.submit(_block, module, at, stop) for at in blocks]
            for job in concurrent.futures.as_completed(jobs):
                result.add(job.result())
                progress(min(_CHUNK * _BLOCK, stop - start))
    finally:
        set_threads(0)
        if torch:
            torch.set_num_threads(torch_threads)
    return result


def _block(module: Module, start: int, stop: int) -> SweepResult:
    """Compare the chunks of one block."""
    result = SweepResult()
    x = aligned_empty((_ROWS, _COLS), np.float32)
    outputs = {
        name: tuple(aligned_empty(x.shape, reference.NUMPY_DTYPES[name]) for _ in "qk")
        for name in OUT_DTYPES
    }
    for first in range(start, min(start + _CHUNK * _BLOCK, stop), _CHUNK):
        x.view(np.uint32).reshape(-1)[:] = np.arange(first, first + _CHUNK, dtype=np.uint64)
        for pairs in PAIRS:
            result.add(_compare(module, x, first, pairs, outputs))
    return result


def _compare(
    module: Module,
    x: npt.NDArray,
    first: int,
    pairs: Sequence[tuple[float, float]],
    outputs: Mapping[str, tuple[npt.NDArray, ...]],
) -> SweepResult:
    """Compare one call for each output type; `x` is q and k, the patterns from `first` on."""
    (q_var, q_gamma), (k_var, k_gamma) = pairs
    inputs = Activations(
        x,
        x,
        np.tile(np.array([q_var, k_var], np.float32), (_ROWS, 1)),
        np.full(_COLS, q_gamma, np.float32),
        np.full(_COLS, k_gamma, np.float32),
        epsilon=0.0,
    )
    weighted = reference.apply_qk_rms_norm(
        x, x, inputs.qk_var, inputs.gamma_q, inputs.gamma_k, 0.0, "float32"
    )
    result = SweepResult()
    for out_dtype, (q_out, k_out) in outputs.items():
        arrays = {**inputs.tensors, "q_out": q_out, "k_out": k_out}
        module.apply_qk_rms_norm(*operation_arguments("apply_qk_rms_norm", arrays, 0.0))
        for out, product, (var, gamma) in zip((q_out, k_out), weighted, pairs, strict=True):
            different = reference.differing(out, _rounded(product, out_dtype))
            difference = (
                f"{different} of the patterns 0x{first:08x} to 0x{first + _CHUNK - 1:08x}, "
                f"float32 -> {out_dtype}, mean square {var:g}, gamma {gamma:g}"
            )
            result.add(SweepResult(out.size, different, difference if different else None))
    return result


def _rounded(product: npt.NDArray, out_dtype: str) -> npt.NDArray:
    """Round float32 as the last step of `reference.rms_norm` does."""
    torch = torch_or_none() if out_dtype == "float16" else None
    if torch:
        return to_numpy(to_torch(product).to(torch.float16))
    with np.errstate(all="ignore"):
        return product.astype(reference.NUMPY_DTYPES[out_dtype])
