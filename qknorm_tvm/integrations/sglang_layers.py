"""The attention layers of SGLang that `qknorm_tvm.integrations.sglang` changes; needs both."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from ..tensor_parallel import HeadLayout
from .engine_norm import AttentionNorm, Layer, agree_over, norm_for, widen

#: By what is replaced: a hook for after the class's ``__init__``, and one around it.
Hooks = dict[str, tuple[Callable[..., None], Callable[..., Any]]]
Tensor = torch.Tensor
Outputs = tuple[Tensor, Tensor]


def _prepare(
    layer: Any, replaces: str, norms: tuple[Any, Any], cols: tuple[int, int], group: Any,
    ranks: int, **options: Any,
) -> None:  # fmt: skip
    """Give a layer what its method calls, `norm_for`'s; `group` is SGLang's, None for one rank."""
    weight, epsilon = norms[0].weight, norms[0].variance_epsilon
    layer._qknorm_tvm = norm_for(
        Layer(
            "sglang", type(layer).__name__, replaces, torch.get_default_dtype(), weight.device,
            *cols, agree_over(group),
        ),
        epsilon=epsilon, cast_before_gamma=False, ranks=ranks,
        group=getattr(group, "device_group", None), **options,
    )  # fmt: skip
    if layer._qknorm_tvm is not None:
        for norm in norms:
            widen(norm)


def minimax_m2_hooks() -> Hooks:
    """Return the hooks of ``sglang.srt.models.minimax_m2``."""
    from sglang.srt.layers.dp_attention import attn_tp_all_reduce
    from sglang.srt.runtime_context import get_parallel

    def after_init(result: None, self: Any, q_norm: Any, k_norm: Any) -> None:
        ranks = q_norm.attn_tp_size
        _prepare(
            self, "forward", (q_norm, k_norm), (len(q_norm.weight), len(k_norm.weight)),
            get_parallel().attn_tp_group if ranks > 1 else None, ranks,
            all_reduce=attn_tp_all_reduce,
        )  # fmt: skip

    def forward(original: Callable, self: Any, q: Tensor, k: Tensor) -> Outputs:
        norm: AttentionNorm | None = self._qknorm_tvm
        if norm is None:
            return original(self, q, k)
        return norm(q, k, self._q_norm.weight, self._k_norm.weight)

    return {"MiniMaxM2QKRMSNorm.forward": (after_init, forward)}


def olmo2_hooks() -> Hooks:
    """Return the hooks of ``sglang.srt.models.olmo2``, which serves OLMo-3 too."""
    from sglang.srt.distributed import (
        get_tp_group,
        tensor_model_parallel_all_gather,
        tensor_model_parallel_all_reduce,
    )

    def after_init(result: None, self: Any, *args: Any, **options: Any) -> None:
        ranks = self.tp_size
        heads = HeadLayout(
            self.total_num_heads, self.total_num_kv_heads, self.head_dim, ranks, self.tp_rank
        )
        self._qknorm_tvm_parts = heads.q_slice, heads.k_slice
        _prepare(
            self, "_apply_qk_norm", (self.q_norm, self.k_norm), (heads.q_cols, heads.k_cols),
            get_tp_group() if ranks > 1 else None, ranks,
            all_reduce=tensor_model_parallel_all_reduce, gather=tensor_model_parallel_all_gather,
        )  # fmt: skip

    def apply_qk_norm(original: Callable, self: Any, q: Tensor, k: Tensor) -> Outputs:
        norm: AttentionNorm | None = self._qknorm_tvm
        if norm is None:
            return original(self, q, k)
        q_part, k_part = self._qknorm_tvm_parts
        return norm(q, k, self.q_norm.weight[q_part], self.k_norm.weight[k_part])

    return {"Olmo2Attention._apply_qk_norm": (after_init, apply_qk_norm)}
