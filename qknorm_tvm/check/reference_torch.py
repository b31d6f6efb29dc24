"""The unfused float32 graph in torch, and NumPy arrays as torch tensors. torch is optional here."""

from __future__ import annotations

import functools
import importlib.util
from typing import Any

import numpy.typing as npt

from ..dtypes import ELEMENT_TYPES


@functools.lru_cache(maxsize=1)
def torch_or_none() -> Any:
    """Return torch, imported, or None where it is not installed."""
    if importlib.util.find_spec("torch") is None:
        return None
    import torch

    return torch


def to_torch(array: npt.NDArray) -> Any:
    """Return a tensor on the memory of a NumPy array, which must be aligned."""
    import torch

    element = ELEMENT_TYPES.get(array.dtype.name)
    if element is not None and element.storage:
        return torch.from_numpy(array.view(element.storage)).view(element.torch)
    return torch.from_numpy(array)


def to_numpy(tensor: Any) -> npt.NDArray:
    """Return a NumPy array on the memory of a CPU tensor, with ml_dtypes' types where needed."""
    import torch

    element = ELEMENT_TYPES.get(str(tensor.dtype).removeprefix("torch."))
    if element is not None and element.storage:
        return tensor.view(getattr(torch, element.storage)).numpy().view(element.numpy)
    return tensor.numpy()


def apply_qk_rms_norm(
    q: Any,
    k: Any,
    qk_var: Any,
    gamma_q: Any,
    gamma_k: Any,
    epsilon: float = 1e-6,
    out_dtype: Any = None,
    *,
    cast_before_gamma: bool = False,
) -> tuple[Any, Any]:
    """Compute both operands of the definition in torch, operation by operation.

    Parameters
    ----------
    q, k, qk_var, gamma_q, gamma_k : torch.Tensor
        See `qknorm_tvm.apply_qk_rms_norm`.
    epsilon : float
    out_dtype : torch.dtype, optional
        By default q's.
    cast_before_gamma : bool
        Round to q's type before gamma multiplies.

    Returns
    -------
    (q_out, k_out)
    """
    dtype = out_dtype or q.dtype
    rs = (qk_var + epsilon).rsqrt()
    scaled_q, scaled_k = q.float() * rs[:, 0:1], k.float() * rs[:, 1:2]
    if cast_before_gamma:
        scaled_q, scaled_k = scaled_q.to(q.dtype).float(), scaled_k.to(k.dtype).float()
    return (scaled_q * gamma_q).to(dtype), (scaled_k * gamma_k).to(dtype)


def row_mean_of_squares_qk(q: Any, k: Any) -> Any:
    """Compute the statistics as models do, ``x.float().pow(2).mean(-1)``; the order is torch's.

    Parameters
    ----------
    q, k : torch.Tensor
        ``[M, Nq]`` and ``[M, Nk]``.

    Returns
    -------
    torch.Tensor, ``[M, 2]``, float32
    """
    import torch

    return torch.stack([x.float().pow(2).mean(-1) for x in (q, k)], dim=1)
