"""QK-RMSNorm over tensor-parallel ranks: local statistics, one all-reduce, apply.

::

    local  = mean of squares of this rank's columns      float32 [M, 2], one launch
    qk_var = weighted mean of `local` over the ranks     one all-reduce of 8 bytes a row
    q_out, k_out = qknorm_tvm.apply_qk_rms_norm(...)     one launch

`HeadLayout` says which heads a rank holds, and needs no torch. `qk_rms_norm` is the operation on
tensors, `reduce_row_mean_of_squares` its middle step alone, `TensorParallelQKNorm` a module with
this rank's gammas. torch is imported when one of those three is first asked for.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from .layout import HeadLayout

if TYPE_CHECKING:
    from .functional import (
        qk_rms_norm,
        qk_rms_norm_rope,
        qk_rms_norm_rope_cache,
        reduce_row_mean_of_squares,
    )
    from .module import TensorParallelQKNorm
    from .workspace import PeerWorkspace

__all__ = [
    "HeadLayout",
    "PeerWorkspace",
    "TensorParallelQKNorm",
    "qk_rms_norm",
    "qk_rms_norm_rope",
    "qk_rms_norm_rope_cache",
    "reduce_row_mean_of_squares",
]
_MODULES = {"PeerWorkspace": ".workspace", "TensorParallelQKNorm": ".module"}


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    try:
        module = importlib.import_module(_MODULES.get(name, ".functional"), __name__)
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] != "torch":
            raise
        raise ImportError(
            f"{__name__}.{name} needs torch 2.4 or newer: pip install 'qknorm-tvm[torch]'"
        ) from error
    value = globals()[name] = getattr(module, name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
