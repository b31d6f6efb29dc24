"""Calling a loaded module with NumPy arrays: the argument list, made once and used often."""

from __future__ import annotations

from typing import Any

import numpy.typing as npt

from .arrays import adapter_of
from .inputs import Activations

_TENSORS = ("q_out", "k_out", "gamma_q", "gamma_k", "qk_var", "q", "k")


def module_arguments(
    activations: Activations, q_out: npt.NDArray, k_out: npt.NDArray
) -> tuple[Any, ...]:
    """Return what a module's ``apply_qk_rms_norm`` takes for these arrays; nothing is copied.

    The arrays must outlive the calls. The last argument, 1, says that 16-bit integers are bfloat16.
    """
    a = activations
    tensors = (q_out, k_out, a.gamma_q, a.gamma_k, a.qk_var, a.q, a.k)
    views = [
        adapter_of(name, array).view(name, array, writable=name.endswith("_out"))
        for name, array in zip(_TENSORS, tensors, strict=True)
    ]
    return (*views, float(a.epsilon), 1)
