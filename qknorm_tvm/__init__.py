"""Fused QK-RMSNorm on Apache TVM: bit-exact, one launch, compiled modules that run alone.

`apply_qk_rms_norm` is the operation, `row_mean_of_squares_qk` makes its statistics, `qk_rms_norm`
does both, `qk_rms_norm_rope` rotates what that makes, `qk_rms_norm_rope_cache` stores it too;
`compile`, `CompiledModule.export` and `load` make and use modules. Importing this
package imports neither TVM nor tvm-ffi: that waits until something is compiled or called.
"""

import os as _os

# In a checkout `schedules` and `tuning_logs` lie beside this package, not in it: Python started
# there finds this folder before the installed one.
if not _os.path.isdir(_os.path.join(__path__[0], "schedules")):
    __path__.append(_os.path.dirname(__path__[0]))

from ._version import __version__
from .call.api import (
    apply_qk_rms_norm,
    qk_rms_norm,
    qk_rms_norm_rope,
    qk_rms_norm_rope_cache,
    row_mean_of_squares_qk,
)
from .call.cache import use
from .call.compiled import CompiledModule, compile
from .errors import BuildError, ModuleFileError, QKNormError, TuningError
from .load.module import Module, load
from .load.threads import get_num_threads, set_num_threads
from .spec import KernelSpec
from .tuning import tune

__all__ = [
    "BuildError",
    "CompiledModule",
    "KernelSpec",
    "Module",
    "ModuleFileError",
    "QKNormError",
    "TuningError",
    "__version__",
    "apply_qk_rms_norm",
    "compile",
    "get_num_threads",
    "load",
    "qk_rms_norm",
    "qk_rms_norm_rope",
    "qk_rms_norm_rope_cache",
    "row_mean_of_squares_qk",
    "set_num_threads",
    "tune",
    "use",
]
