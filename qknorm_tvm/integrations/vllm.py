"""vLLM's plugin: QK-norm of MiniMax-M2, OLMo-2 and OLMo-3 by this package's kernels.

vLLM calls `register` in each of its processes, by the entry point ``qknorm_tvm`` of the group
``vllm.general_plugins``. What is replaced, once its module is imported:

========================================  =======================================================
``MiniMaxText01RMSNormTP.forward_qkv``    statistics, their all-reduce, and both norms
``MiniMaxM2Attention.forward``            these and the rotation, where it is the contract's
``Olmo2Attention``, ``Olmo3Attention``    on the transformers backend: both norms in one launch, and
                                          under tensor parallelism without gathering Q and K
========================================  =======================================================

Whether a layer is replaced is decided when it is made, see `qknorm_tvm.integrations.engine_norm`;
one that is not keeps vLLM's own code. ``QKNORM_TVM_ENGINES=0`` leaves all of vLLM as it is.
"""

from __future__ import annotations

from types import ModuleType

from . import engines


def register() -> None:
    """Replace vLLM's QK-norms where this version of it is known."""
    if engines.may_change("vllm"):
        models = "vllm.model_executor.models"
        engines.when_imported(
            "vllm",
            {
                f"{models}.minimax_m2": _change_minimax_m2,
                f"{models}.transformers.base": _change_transformers_backend,
            },
        )


def _change_minimax_m2(module: ModuleType) -> None:
    from . import vllm_layers

    vllm_layers.change_minimax_m2(module)


def _change_transformers_backend(module: ModuleType) -> None:
    from . import vllm_layers

    vllm_layers.change_transformers_backend(module)
