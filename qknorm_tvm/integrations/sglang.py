"""SGLang's plugin: QK-norm of MiniMax-M2, OLMo-2 and OLMo-3 by this package's kernels.

SGLang calls `register` in each of its processes, by the entry point ``qknorm_tvm`` of the group
``sglang.srt.plugins``. What is replaced, by hooks of SGLang's own registry once the model's module
is imported:

=====================================  ==========================================================
``MiniMaxM2QKRMSNorm.forward``         statistics, their all-reduce, and both norms
``Olmo2Attention._apply_qk_norm``      both norms in one launch, and under tensor parallelism
                                       without gathering Q and K; OLMo-3 has the same class
=====================================  ==========================================================

Whether a layer is replaced is decided when it is made, see `qknorm_tvm.integrations.engine_norm`;
one that is not keeps SGLang's own code. Rotation is left to the model: SGLang's cosines and sines
are float32 on GPUs, and its kernels round otherwise there. ``QKNORM_TVM_ENGINES=0`` leaves all of
SGLang as it is.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from types import ModuleType

from . import engines

_MODELS = "sglang.srt.models"


def register() -> None:
    """Replace SGLang's QK-norms where this version of it is known."""
    if engines.may_change("sglang"):
        hooks = {f"{_MODELS}.minimax_m2": "minimax_m2_hooks", f"{_MODELS}.olmo2": "olmo2_hooks"}
        changes = {module: functools.partial(_hook, hooks=name) for module, name in hooks.items()}
        engines.when_imported("sglang", changes)


def _hook(module: ModuleType, hooks: str) -> None:
    """Register the hooks of one model's module, and apply them."""
    from sglang.srt.plugins.hook_registry import HookRegistry, HookSource, HookType

    from . import sglang_layers

    made: dict[str, tuple[Callable, Callable]] = getattr(sglang_layers, hooks)()
    source = HookSource("qknorm_tvm", "qknorm-tvm")
    for name, (after_init, around) in made.items():
        cls = name.partition(".")[0]
        for target, hook, kind in (
            (f"{cls}.__init__", after_init, HookType.AFTER),
            (name, around, HookType.AROUND),
        ):
            HookRegistry.register(f"{module.__name__}.{target}", hook, kind, source=source)
    HookRegistry.apply_hooks()
