"""Activations to run on: made from a seed, or read from a ``.safetensors`` or ``.npz`` file."""

from __future__ import annotations

import dataclasses
import os
import zipfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt

from ..spec import DTYPE_BYTES
from .reference import NUMPY_DTYPES, mean_of_squares

#: Bytes to which generated arrays are aligned: a cache line, as frameworks' allocators do.
_ALIGNMENT = 64
#: What a file must hold, and what it may.
_REQUIRED = ("q", "k", "gamma_q", "gamma_k")
_NAMES = (*_REQUIRED, "qk_var")


@dataclasses.dataclass(frozen=True)
class Activations:
    """The inputs of one call, as NumPy arrays.

    Parameters
    ----------
    q, k : ndarray, ``[M, Nq]`` and ``[M, Nk]``, bfloat16, float16 or float32
    qk_var : ndarray, ``[M, 2]``, float32
    gamma_q, gamma_k : ndarray, ``[Nq]`` and ``[Nk]``, float32
    epsilon : float
    source : str
        Where they come from, for people.
    notes : tuple of str
        What was computed or converted on the way.
    extra : mapping of str to ndarray
        Inputs by name that only some operations take, and what paged caches hold before a call.
    """

    q: npt.NDArray
    k: npt.NDArray
    qk_var: npt.NDArray
    gamma_q: npt.NDArray
    gamma_k: npt.NDArray
    epsilon: float = 1e-6
    source: str = ""
    notes: tuple[str, ...] = ()
    extra: Mapping[str, npt.NDArray] = dataclasses.field(default_factory=dict)

    @property
    def tensors(self) -> dict[str, npt.NDArray]:
        """The arrays by name."""
        return {**{name: getattr(self, name) for name in _NAMES}, **self.extra}

    @property
    def rows(self) -> int:
        """M."""
        return int(self.q.shape[0])

    @property
    def q_cols(self) -> int:
        """Nq."""
        return int(self.q.shape[1])

    @property
    def k_cols(self) -> int:
        """Nk."""
        return int(self.k.shape[1])

    @property
    def dtype(self) -> str:
        """Element type of q and k."""
        return str(self.q.dtype.name)


def aligned_empty(shape: Sequence[int], dtype: npt.DTypeLike) -> npt.NDArray:
    """Allocate a packed array whose data starts on a cache line."""
    dtype = np.dtype(dtype)
    size = int(np.prod(shape, dtype=np.int64)) * dtype.itemsize
    memory = np.empty(size + _ALIGNMENT, np.uint8)
    start = -memory.ctypes.data % _ALIGNMENT
    return memory[start : start + size].view(dtype).reshape(shape)


def aligned_copy(array: npt.NDArray) -> npt.NDArray:
    """Copy an array to packed rows that start on a cache line."""
    copy = aligned_empty(array.shape, array.dtype)
    copy[...] = array
    return copy


def generate(
    rows: int, q_cols: int, k_cols: int, dtype: str, *, epsilon: float = 1e-6, seed: int = 0
) -> Activations:
    """Make activations like a model's: normal q and k, gamma around 1, their own mean squares.

    Parameters
    ----------
    rows, q_cols, k_cols : int
        M, Nq and Nk.
    dtype : str
        Element type of q and k.
    epsilon : float
        Passed on.
    seed : int
        Equal seeds make equal arrays.

    Returns
    -------
    Activations
    """
    rng = np.random.default_rng(seed)

    def normal(cols: int) -> npt.NDArray:
        # Real rows differ in size by token.
        scale = rng.lognormal(sigma=0.5, size=(rows, 1)).astype(np.float32)
        values = rng.standard_normal((rows, cols), dtype=np.float32) * scale
        return aligned_copy(values.astype(NUMPY_DTYPES[dtype]))

    def gamma(cols: int) -> npt.NDArray:
        return aligned_copy(1 + rng.standard_normal(cols, dtype=np.float32) / 8)

    q, k = normal(q_cols), normal(k_cols)
    return Activations(
        q,
        k,
        _mean_squares(q, k),
        gamma(q_cols),
        gamma(k_cols),
        epsilon,
        source=f"random normal, seed {seed}",
    )


def _mean_squares(q: npt.NDArray, k: npt.NDArray) -> npt.NDArray:
    # In blocks: the float64 copy of a large q would not be small.
    blocks = [
        np.stack([mean_of_squares(q[i : i + 1024]), mean_of_squares(k[i : i + 1024])], axis=1)
        for i in range(0, len(q), 1024)
    ]
    return aligned_copy(np.concatenate(blocks)) if blocks else np.empty((0, 2), np.float32)


def read_activations(path: str | os.PathLike[str], *, epsilon: float = 1e-6) -> Activations:
    """Read activations from a file.

    Parameters
    ----------
    path : path-like
        A ``.safetensors`` or ``.npz`` file with arrays named ``q`` and ``k`` (bfloat16, float16 or
        float32, two dimensions), ``gamma_q`` and ``gamma_k`` (float32; 16-bit floats are widened,
        which is exact) and optionally ``qk_var`` (float32, ``[M, 2]``). Other arrays are left
        alone. Without ``qk_var`` the float32 mean of squares of each row of q and k is computed.
    epsilon : float
        Passed on.

    Returns
    -------
    Activations
        `Activations.notes` says what was computed or widened.

    Raises
    ------
    FileNotFoundError
        There is no such file.
    TypeError, ValueError
        The file cannot be read, lacks an array, or holds one of the wrong shape or type; the
        message names the file and the array.
    """
    path = Path(path)
    readers: dict[str, Callable[[Path], dict[str, Any]]] = {
        ".safetensors": _read_safetensors,
        ".npz": _read_npz,
    }
    if path.suffix not in readers:
        raise ValueError(
            f"{path}: input must be a .safetensors or .npz file, got "
            + (f"extension {path.suffix!r}" if path.suffix else "no extension")
        )
    if not path.is_file():
        raise FileNotFoundError(
            f"{path}: "
            + ("input must be a file, got a folder" if path.exists() else "no such file")
        )
    return _checked(path, readers[path.suffix](path), epsilon)


def _read_safetensors(path: Path) -> dict[str, Any]:
    import safetensors

    try:
        # ml_dtypes, imported above, gives NumPy the name bfloat16 that safetensors asks for.
        with safetensors.safe_open(str(path), framework="numpy") as file:
            # keys() lists names; the file holds tensors that are not asked for, perhaps large.
            names = list(file.keys())
            return {name: file.get_tensor(name) if name in _NAMES else None for name in names}
    except (safetensors.SafetensorError, OSError, TypeError, AttributeError) as error:
        raise ValueError(f"{path}: cannot be read as safetensors: {error}") from error


def _read_npz(path: Path) -> dict[str, Any]:
    # A .npz is a zip file; NumPy takes another file for a pickle and says so confusingly.
    if not zipfile.is_zipfile(path):
        raise ValueError(f"{path}: cannot be read as .npz: it is no zip file, or truncated")
    arrays: dict[str, Any] = {}
    try:
        with np.load(path, allow_pickle=False) as file:
            for name in file.files:
                arrays[name] = file[name] if name in _NAMES else None
    except (ValueError, OSError, EOFError, zipfile.BadZipFile, KeyError) as error:
        raise ValueError(f"{path}: cannot be read as .npz: {error}") from error
    # NumPy stores ml_dtypes' bfloat16 as two bytes of nothing in particular.
    for name, array in arrays.items():
        if array is not None and array.dtype == np.dtype("V2"):
            arrays[name] = array.view(ml_dtypes.bfloat16)
    return arrays


def _checked(path: Path, arrays: dict[str, Any], epsilon: float) -> Activations:
    missing = [name for name in _REQUIRED if name not in arrays]
    if missing:
        raise ValueError(
            f"{path}: must hold arrays q, k, gamma_q and gamma_k; {', '.join(missing)} missing, "
            f"it holds {', '.join(sorted(arrays)) or 'none'}"
        )
    notes: list[str] = []
    q, k = _projection(path, "q", arrays["q"]), _projection(path, "k", arrays["k"])
    if q.dtype != k.dtype:
        raise TypeError(f"{path}: k must be {q.dtype.name} like q, got {k.dtype.name}")
    if len(q) != len(k):
        raise ValueError(f"{path}: k must have {len(q)} rows like q, got {len(k)}")
    gamma_q = _gamma(path, "gamma_q", arrays["gamma_q"], q.shape[1], notes)
    gamma_k = _gamma(path, "gamma_k", arrays["gamma_k"], k.shape[1], notes)
    qk_var = arrays.get("qk_var")
    if qk_var is None:
        qk_var = _mean_squares(q, k)
        notes.append("qk_var is not in the file: computed as the mean squares of these q and k")
    elif qk_var.dtype != np.float32:
        raise TypeError(f"{path}: qk_var must be float32, got {qk_var.dtype.name}")
    elif qk_var.shape != (len(q), 2):
        raise ValueError(f"{path}: qk_var must be [{len(q)}, 2], got {list(qk_var.shape)}")
    return Activations(
        aligned_copy(q),
        aligned_copy(k),
        aligned_copy(qk_var),
        gamma_q,
        gamma_k,
        epsilon,
        source=str(path),
        notes=tuple(notes),
    )


def _projection(path: Path, name: str, array: npt.NDArray) -> npt.NDArray:
    if array.ndim != 2:
        hint = ": join batch and tokens to rows, and heads to columns" if array.ndim > 2 else ""
        raise ValueError(
            f"{path}: {name} must have 2 dimensions, [rows, columns], got {array.ndim}, "
            f"{list(array.shape)}{hint}"
        )
    if array.dtype.name not in DTYPE_BYTES or not array.dtype.isnative:
        hint = " (save bfloat16 as ml_dtypes.bfloat16)" if array.dtype.name == "uint16" else ""
        raise TypeError(
            f"{path}: {name} must be bfloat16, float16 or float32, got {array.dtype}{hint}"
        )
    if array.shape[1] < 1:
        raise ValueError(f"{path}: {name} must have at least 1 column, got 0")
    return array


def _gamma(path: Path, name: str, array: npt.NDArray, cols: int, notes: list[str]) -> npt.NDArray:
    if array.shape != (cols,):
        raise ValueError(
            f"{path}: {name} must be [{cols}], one scale a column of {name[-1]}, "
            f"got {list(array.shape)}"
        )
    if array.dtype.name in ("bfloat16", "float16"):
        notes.append(f"{name} is {array.dtype.name}: widened to float32, which is exact")
    elif array.dtype != np.float32:
        raise TypeError(f"{path}: {name} must be float32, bfloat16 or float16, got {array.dtype}")
    return aligned_copy(array.astype(np.float32))
