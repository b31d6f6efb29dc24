"""The attention layers of vLLM that `qknorm_tvm.integrations.vllm` changes; needs both."""

from __future__ import annotations

import functools
import logging
from types import MethodType, ModuleType
from typing import Any

import torch

from .._version import __version__
from ..tensor_parallel import HeadLayout
from .engine_norm import AttentionNorm, Layer, agree_over, norm_for, widen
from .engines import say

#: Where a layer, or its norm of Q, keeps its `AttentionNorm`. Classes that are changed have it too.
_MARK = "_qknorm_tvm"


def _keep(name: str, reason: str) -> None:
    say("vllm", f"{name}: the engine's own norms are kept: {reason}", logging.WARNING)


def _has_key(config: Any) -> bool:
    """Return whether `_name_in_caches` can do its work: platforms may have made it an object."""
    return isinstance(config.additional_config, dict)


_NO_KEY = "additional_config is no dict, and must name them in vLLM's caches of compiled graphs"


def _name_in_caches(config: Any, name: str, norm: AttentionNorm) -> None:
    """Have vLLM's caches of compiled graphs tell a layer that is changed from one that is not.

    Their keys know vLLM's own settings and sources: a graph without these kernels would be loaded
    in place of one with them, and the other way round.
    """
    key = f"{__version__}, statistics {norm.statistics}, rotates {norm.rotates}"
    config.additional_config[f"qknorm_tvm {name}"] = key


# ---- MiniMax-M2 ---------------------------------------------------------------------------------


def change_minimax_m2(module: ModuleType) -> None:
    """Change ``MiniMaxM2Attention`` and its norms in their module."""
    attention, norms = module.MiniMaxM2Attention, module.MiniMaxText01RMSNormTP
    if _MARK in attention.__dict__:
        return
    setattr(attention, _MARK, None)
    own_init, own_forward = attention.__init__, attention.forward
    own_forward_qkv = norms.forward_qkv

    @functools.wraps(own_init)
    def init(self: Any, *args: Any, **options: Any) -> None:
        own_init(self, *args, **options)
        _prepare_minimax_m2(self, may_rotate=type(self).forward is forward)

    @functools.wraps(own_forward)
    def forward(self: Any, positions: torch.Tensor, hidden_states: torch.Tensor) -> torch.Tensor:
        norm: AttentionNorm | None = self._qknorm_tvm
        if norm is None:
            return own_forward(self, positions, hidden_states)
        qkv, _ = self.qkv_proj(hidden_states)
        q, k, v = qkv.split([self.q_size, self.kv_size, self.kv_size], dim=-1)
        q, k = norm(
            q, k, self.q_norm.weight, self.k_norm.weight, positions, self.rotary_emb.cos_sin_cache
        )
        output, _ = self.o_proj(self.attn(q, k, v))
        return output

    @functools.wraps(own_forward_qkv)
    def forward_qkv(
        q_norm: Any, k_norm: Any, qkv: torch.Tensor, q_size: int, kv_size: int
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        norm: AttentionNorm | None = getattr(q_norm, _MARK, None)
        if norm is None:
            return own_forward_qkv(q_norm, k_norm, qkv, q_size, kv_size)
        q, k, v = qkv.split([q_size, kv_size, kv_size], dim=-1)
        q, k = norm(q, k, q_norm.weight, k_norm.weight)
        return q, k, v

    attention.__init__, attention.forward = init, forward
    norms.forward_qkv = staticmethod(forward_qkv)


def _prepare_minimax_m2(attention: Any, *, may_rotate: bool) -> None:
    from vllm.config import get_current_vllm_config
    from vllm.distributed import get_tp_group, tensor_model_parallel_all_reduce
    from vllm.model_executor.layers.rotary_embedding.base import RotaryEmbedding

    config = get_current_vllm_config()
    if not _has_key(config):
        _keep(type(attention).__name__, _NO_KEY)
        return
    q_norm, k_norm = attention.q_norm, attention.k_norm
    rotary, device = attention.rotary_emb, q_norm.weight.device
    rotates = may_rotate and type(rotary) is RotaryEmbedding
    norm = norm_for(
        Layer(
            "vllm", type(attention).__name__, "MiniMaxText01RMSNormTP.forward_qkv",
            torch.get_default_dtype(), device, attention.q_size, attention.kv_size,
            agree_over(get_tp_group()),
        ),
        epsilon=q_norm.variance_epsilon,
        cast_before_gamma=False,
        ranks=q_norm.tp_world,
        all_reduce=tensor_model_parallel_all_reduce,
        group=get_tp_group().device_group,
        uncompiled=q_norm.tp_world > 1,  # vLLM's operator minimax_qk_norm_fusion
        rotary=rotary if may_rotate else None,
        rotate=getattr(rotary, f"forward_{device.type}", None) if rotates else None,
    )  # fmt: skip
    if norm is None:
        return
    _name_in_caches(config, type(attention).__name__, norm)
    widen(q_norm)
    widen(k_norm)
    setattr(attention if norm.rotates else q_norm, _MARK, norm)


# ---- OLMo on the transformers backend -----------------------------------------------------------


def change_transformers_backend(module: ModuleType) -> None:
    """Change how models are made on the transformers backend, for OLMo's attention in them."""
    base = module.Base
    if _MARK in base.__dict__:
        return
    setattr(base, _MARK, None)
    own_init = base.__init__

    @functools.wraps(own_init)
    def init(self: Any, *args: Any, **options: Any) -> None:
        own_init(self, *args, **options)
        for attention in self.model.modules():
            kind = type(attention)
            if kind.__module__.startswith("transformers.models.olmo") and kind.__name__ in (
                "Olmo2Attention",
                "Olmo3Attention",
            ):
                _prepare_olmo(attention, self.vllm_config)

    base.__init__ = init


def _prepare_olmo(attention: Any, config: Any) -> None:
    """Have ``qkv_proj`` return Q and K normalised, and both norms what they are given.

    vLLM has rewritten the forward to ``q, k, v = qkv_proj(x).split(...)``, and ``q_norm(q)``,
    ``k_norm(k)`` after it. So both are at hand together, and no line of the forward is needed
    twice.
    """
    from vllm.distributed import (
        get_tp_group,
        tensor_model_parallel_all_gather,
        tensor_model_parallel_all_reduce,
    )
    from vllm.model_executor.layers.linear import QKVParallelLinear
    from vllm.model_executor.models.transformers.fusers.rms_norm import TPAwareRMSNorm

    name, q_norm, k_norm = type(attention).__name__, attention.q_norm, attention.k_norm
    projection: Any = getattr(attention, "qkv_proj", None)
    reason = ""
    if type(projection) is not QKVParallelLinear:
        reason = "vLLM has not joined its projections"
    elif {type(q_norm), type(k_norm)} != {TPAwareRMSNorm}:
        reason = f"its norms are {type(q_norm).__name__}, not TPAwareRMSNorm"
    elif config.lora_config is not None:
        reason = "LoRA replaces the projection that they follow"
    elif not _has_key(config):
        reason = _NO_KEY
    if reason:
        _keep(name, reason)
        return
    heads = HeadLayout(
        projection.total_num_heads, projection.total_num_kv_heads, projection.head_size,
        projection.tp_size, projection.tp_rank,
    )  # fmt: skip
    dtype = torch.get_default_dtype()
    norm = norm_for(
        Layer(
            "vllm", name, "q_norm and k_norm (TPAwareRMSNorm)",
            dtype, q_norm.weight.device, heads.q_cols, heads.k_cols, agree_over(get_tp_group()),
        ),
        epsilon=q_norm.variance_epsilon,
        # vLLM's RMSNorm rounds to the type of its weight first.
        cast_before_gamma=q_norm.weight.dtype != torch.float32,
        ranks=projection.tp_size,
        all_reduce=tensor_model_parallel_all_reduce,
        group=get_tp_group().device_group,
        gather=tensor_model_parallel_all_gather,
    )  # fmt: skip
    if norm is None:
        return
    _name_in_caches(config, name, norm)
    widths = [heads.q_cols, heads.k_cols, heads.k_cols]
    q_part, k_part = heads.q_slice, heads.k_slice

    def project(self: Any, hidden_states: torch.Tensor) -> _Split:
        q, k, v = QKVParallelLinear.forward(self, hidden_states).split(widths, dim=-1)
        q_out, k_out = norm(
            q.flatten(0, -2), k.flatten(0, -2), q_norm.weight[q_part], k_norm.weight[k_part]
        )
        return _Split(widths, (q_out.view(q.shape), k_out.view(k.shape), v))

    for each in (q_norm, k_norm):
        widen(each)
        each.forward = _as_it_came
    projection.forward = MethodType(project, projection)


class _Split:
    """Q, K and V for one who splits them from a tensor: without a copy of them in one.

    In place of the projection's output would save as much, but torch's compiler cannot follow it
    in graphs of any number of rows.
    """

    def __init__(self, widths: list[int], parts: tuple[torch.Tensor, torch.Tensor, torch.Tensor]):
        self.widths, self.parts = widths, parts

    def split(self, widths: list[int], dim: int) -> tuple[torch.Tensor, ...]:
        """Return the parts, as a tensor's `split` does."""
        assert widths == self.widths, "the layer's own"
        assert dim == -1
        return self.parts


def _as_it_came(x: torch.Tensor) -> torch.Tensor:
    return x
