"""Fused QK-RMSNorm in Hugging Face transformers' own OLMo-2, OLMo-3 and MiniMax-M2.

Their attention calls four modules one after the other::

    query_states = self.q_norm(self.q_proj(hidden_states))
    key_states = self.k_norm(self.k_proj(hidden_states))

`patch` replaces the ``forward`` of these four modules, on the instance:

==========  ==============================================================================
``q_proj``  projects Q as before, and keeps ``hidden_states``
``q_norm``  projects K from ``hidden_states``, normalises Q and K in one launch, returns Q
``k_proj``  returns the K that ``q_norm`` projected
``k_norm``  returns the K that ``q_norm`` normalised
==========  ==============================================================================

Every module still takes and returns the same tensors; only K is computed earlier. Modules,
parameters and ``state_dict`` keys do not change, so checkpoints load and save as before.

Rotation follows in the same launch where the model's is that of `qknorm_tvm.qk_rms_norm_rope`: the
cosines are float32, so that each product and each sum is rounded to float32 by itself, and the
result to the model's type. So it is in OLMo-2 and OLMo-3 of any type, and in MiniMax-M2 of float32;
in bfloat16 or float16 MiniMax-M2 rounds cosines, products and sums to that type, so that logits
would change: there the model rotates, and this module's logger says so, as it does where the heads
are sharded over a group. The ``forward`` of such an attention is the class's own but for the name
``apply_rotary_pos_emb``, which returns what is rotated already.

A hook on ``q_norm``, ``k_proj`` or ``k_norm`` could observe that K is computed earlier, or change
what K is computed from. Where there is such a hook, the modules run unfused, with a warning. An
adapter that wraps a module and changes K without a hook is detected and refused.
"""

from __future__ import annotations

import dataclasses
import logging
import threading
import types
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch.nn.modules import module as nn_module

from .. import tensor_parallel, torch_ops

__all__ = ["patch", "unpatch"]

#: Attention by its class in transformers, and whether its norms round before gamma.
_CAST_BEFORE_GAMMA = {
    "Olmo2Attention": False,
    "Olmo3Attention": False,
    "MiniMaxM2Attention": True,
}
#: Attention whose rotation is rounded to the model's type at its end alone, whatever that type is.
_CASTS_ROTATED_BACK = ("Olmo2Attention", "Olmo3Attention")
_ROTATION = "apply_rotary_pos_emb"
_PARTS = ("q_proj", "q_norm", "k_proj", "k_norm")
#: What a thread's last cosines and sines came to.
_KEPT = threading.local()
_LOGGER = logging.getLogger(__name__)
_MARK = "_qknorm_tvm"


def patch(
    model: torch.nn.Module,
    *,
    statistics: str = "fused",
    group: Any = None,
    layout: Any = None,
    validate: bool = False,
) -> torch.nn.Module:
    """Normalise and rotate Q and K in one launch in every attention of a model, for inference.

    There is no backward: call the model under ``torch.no_grad()``, as ``generate`` does by itself.

    Where rotation is left to the model, the module's logger says why, at level INFO.

    While there is a hook on ``q_norm``, ``k_proj`` or ``k_norm``, or on all modules, an attention
    runs its own norms, unfused, with a ``RuntimeWarning``. With `group` it raises a
    ``RuntimeError`` instead: the model's own norms know only this rank's columns.

    Gammas are read from the model at every call, and converted to float32 in a small launch each if
    they have another type. In OLMo, ``attention.q_norm.float()`` and ``attention.k_norm.float()``
    save these launches and change no result.

    Parameters
    ----------
    model : torch.nn.Module
        OLMo-2, OLMo-3 or MiniMax-M2 of transformers, or a part that holds their attention, in
        evaluation mode; on the CPU or CUDA, in bfloat16, float16 or float32. Changed in place.
    statistics : {"fused", "torch"}
        How mean squares are computed. ``"fused"``: in the same launch. ``"torch"``: as the models
        do, ``x.float().pow(2).mean(-1)``; outputs equal the model's own bit for bit then, rotated
        or not.
    group : ProcessGroup, optional
        Ranks over which the heads are sharded: mean squares are reduced over them. The model must
        be sharded already: its projections and norms hold this rank's heads, and the sum after
        ``o_proj`` is its own business.
    layout : HeadLayout, optional
        This rank's heads. By default computed from the whole model's heads, which its
        configuration states, and the group. Only with `group`.
    validate : bool
        Check at every call that the ranks agree, at the cost of a round trip; see
        `qknorm_tvm.tensor_parallel.qk_rms_norm`. Only with `group`.

    Returns
    -------
    torch.nn.Module
        `model`.

    Raises
    ------
    TypeError, ValueError
        The model is not supported, is in training mode or is patched already, a norm's forward
        has been replaced, or an option is wrong. Nothing has been changed.
    """
    _check_model(model)
    if statistics not in ("fused", "torch"):
        raise ValueError(f"statistics must be one of fused, torch, got {statistics!r}")
    if group is None and (layout is not None or validate):
        name = "validate" if layout is None else "layout"
        raise ValueError(f"group must be given where {name} is, got None")
    if layout is not None and not isinstance(layout, tensor_parallel.HeadLayout):
        raise TypeError(f"layout must be a HeadLayout, got {type(layout).__name__}")
    if model.training:
        raise ValueError(
            "model must be in evaluation mode, got one in training mode: there is no backward; "
            "call model.eval() first"
        )
    fused_norms = []
    for name, attention in model.named_modules():
        if not _is_supported(attention):
            continue
        if _MARK in attention.__dict__:
            raise ValueError(
                f"model must not be patched already, got one whose {name or 'attention'} is: "
                "call unpatch(model) first"
            )
        options = _options(name, attention, statistics, group, layout, validate)
        fused_norms.append((attention, _FusedNorms(attention, options)))
    if not fused_norms:
        raise ValueError(
            f"model must have attention of one of transformers' classes "
            f"{', '.join(_CAST_BEFORE_GAMMA)}, got {type(model).__name__} without"
        )
    for attention, fused in fused_norms:
        fused.install()
        attention.__dict__[_MARK] = fused
    return model


def unpatch(model: torch.nn.Module) -> torch.nn.Module:
    """Undo `patch`: give the modules the forwards that they had before.

    Parameters
    ----------
    model : torch.nn.Module
        What `patch` was called with. Changed in place.

    Returns
    -------
    torch.nn.Module
        `model`.

    Raises
    ------
    TypeError, ValueError
        `model` is no module or is not patched, or a forward has been replaced again since, which
        must be undone first. Nothing has been changed.
    """
    _check_model(model)
    marked = [module for module in model.modules() if _MARK in module.__dict__]
    if not marked:
        raise ValueError("model must be patched, got one that is not")
    for attention in marked:
        attention.__dict__[_MARK].check_installed()
    for attention in marked:
        attention.__dict__.pop(_MARK).remove()
    return model


def _check_model(model: Any) -> None:
    if not isinstance(model, torch.nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")


def _is_supported(module: torch.nn.Module) -> bool:
    # Not a subclass: it may call its modules in another order.
    kind = type(module)
    return (
        kind.__module__.startswith("transformers.models.") and kind.__name__ in _CAST_BEFORE_GAMMA
    )


# ---- one attention ----------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class _Options:
    epsilon: float
    cast_before_gamma: bool
    statistics: str
    group: Any
    layout: Any
    validate: bool
    rotates: bool


def _why_model_rotates(attention: Any, group: Any) -> str:
    """Return why rotation is left to the model, or nothing where it is not."""
    kind = type(attention)
    if group is not None:
        return "its heads are sharded over a group"
    if "forward" in attention.__dict__:
        return "its forward has been replaced"
    if _ROTATION not in getattr(getattr(kind.forward, "__code__", None), "co_names", ()):
        return f"its forward does not call {_ROTATION}"
    dtype = attention.q_proj.weight.dtype
    if kind.__name__ not in _CASTS_ROTATED_BACK and dtype != torch.float32:
        return f"{kind.__name__} rounds each operation of it to {dtype}"
    return ""


def _options(
    name: str, attention: Any, statistics: str, group: Any, layout: Any, validate: bool
) -> _Options:
    q_norm, k_norm = attention.q_norm, attention.k_norm
    for norm, module in (("q_norm", q_norm), ("k_norm", k_norm)):
        # accelerate's is allowed: it only fetches weights, and a gamma that has not been fetched is
        # refused for its device.
        if "forward" in module.__dict__ and not hasattr(module, "_hf_hook"):
            raise ValueError(
                f"{name}.{norm} must have its class's forward, got one replaced: what replaces it "
                "would not be called"
            )
    for what, q_value, k_value in (
        ("epsilon", q_norm.variance_epsilon, k_norm.variance_epsilon),
        ("dtype", q_norm.weight.dtype, k_norm.weight.dtype),
    ):
        if q_value != k_value:
            raise ValueError(
                f"{name}.k_norm must have the {what} of q_norm, {q_value}, got {k_value}"
            )
    if group is not None:
        if layout is None:
            config = attention.config
            layout = tensor_parallel.HeadLayout(
                config.num_attention_heads,
                config.num_key_value_heads,
                attention.head_dim,
                torch.distributed.get_world_size(group),
                torch.distributed.get_rank(group),
            )
        for norm, cols in (("q_norm", layout.q_cols), ("k_norm", layout.k_cols)):
            scales = len(getattr(attention, norm).weight)
            if scales != cols:
                raise ValueError(
                    f"{name}.{norm} must have the {cols} scales of rank {layout.rank} of "
                    f"{layout.world_size}, got {scales}: shard the model before it is patched"
                )
    why = _why_model_rotates(attention, group)
    if why:
        _LOGGER.info("%s: rotation is left to the model: %s", name or "attention", why)
    return _Options(
        rotates=not why,
        epsilon=q_norm.variance_epsilon,
        cast_before_gamma=_CAST_BEFORE_GAMMA[type(attention).__name__],
        statistics=statistics,
        group=group,
        layout=layout,
        validate=validate,
    )


@dataclasses.dataclass
class _AttentionCall:
    """The tensors of one call of the attention, from ``q_proj`` until ``k_norm`` has returned.

    `k` and `k_out` are set by ``q_norm``, unless the modules run unfused.
    """

    hidden_states: torch.Tensor
    unfused: bool = False
    k: torch.Tensor | None = None
    k_out: torch.Tensor | None = None


class _FusedNorms:
    """The new forwards of one attention's four modules, and the state of the call in progress.

    The state is kept per thread, since several threads may run the model. If an exception ends a
    call, the next call of ``q_proj`` replaces its state.
    """

    def __init__(self, attention: torch.nn.Module, options: _Options):
        self.options = options
        self.modules = {name: getattr(attention, name) for name in _PARTS}
        self.head_dim: Any = attention.head_dim
        if options.rotates:
            self.modules["attention"] = attention
            self.model_forward = self._forward_without_rotation()
        #: Forwards that were set on the instance before, such as accelerate's.
        self.replaced: dict[str, Any] = {}
        self.thread = threading.local()

    def __getstate__(self) -> dict[str, Any]:
        # A copy of the model has no call in progress, and a function of its own.
        own = ("thread", "model_forward")
        return {name: value for name, value in self.__dict__.items() if name not in own}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, thread=threading.local())
        if self.options.rotates:
            self.model_forward = self._forward_without_rotation()

    def _forward_without_rotation(self) -> Callable[..., Any]:
        """Return the class's forward of attention, in which `rotary` stands for the rotation."""
        forward: Any = type(self.modules["attention"]).forward
        names = {**forward.__globals__, _ROTATION: self.rotary}
        # torch.compile looks up names in the module of that name otherwise.
        del names["__name__"]
        function = types.FunctionType(
            forward.__code__, names, forward.__name__, forward.__defaults__, forward.__closure__
        )
        function.__kwdefaults__ = forward.__kwdefaults__
        return function

    # ---- installed and removed ----------------------------------------------------------------

    def install(self) -> None:
        for name, module in self.modules.items():
            if "forward" in module.__dict__:
                self.replaced[name] = module.__dict__["forward"]
            module.forward = getattr(self, name)

    def check_installed(self) -> None:
        for name, module in self.modules.items():
            if module.__dict__.get("forward") != getattr(self, name):
                raise ValueError(
                    f"{name} must have the forward that patch gave it, got one replaced since: "
                    "undo that first"
                )

    def remove(self) -> None:
        for name, module in self.modules.items():
            del module.forward
            if name in self.replaced:
                module.forward = self.replaced[name]

    def original(self, name: str, x: torch.Tensor) -> torch.Tensor:
        """Call the forward that a module had before `patch`."""
        module = self.modules[name]
        if name in self.replaced:
            return self.replaced[name](x)
        return type(module).forward(module, x)

    # ---- the forwards, in the order of their calls ----------------------------------------------

    def attention(self, *args: Any, **kwargs: Any) -> Any:
        """Run the attention, whose cosines and sines `q_norm` needs."""
        turns = args[1] if len(args) > 1 else kwargs.get("position_embeddings")
        self.thread.turns, self.thread.rotated = turns, False
        try:
            return self.model_forward(self.modules["attention"], *args, **kwargs)
        finally:
            self.thread.turns = None

    def rotary(
        self, q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return Q and K, which `q_norm` has rotated; otherwise rotate them as the model does."""
        if self.thread.rotated:
            self.thread.rotated = False
            return q, k
        model_rotary = type(self.modules["attention"]).forward.__globals__[_ROTATION]
        rotated: tuple[torch.Tensor, torch.Tensor] = model_rotary(q, k, cos, sin, **kwargs)
        return rotated

    def q_proj(self, hidden_states: torch.Tensor) -> torch.Tensor:
        self.thread.call = _AttentionCall(hidden_states)
        return self.original("q_proj", hidden_states)

    def q_norm(self, q: torch.Tensor) -> torch.Tensor:
        call = self.current_call("q_norm")
        if call.k is not None:
            raise self.out_of_order("q_norm", "a second call")
        call.unfused = self.must_run_unfused()
        if call.unfused:
            return self.original("q_norm", q)
        call.k = self.original("k_proj", call.hidden_states)
        q_out, call.k_out = self.normalise(q, call.k)
        return q_out

    def k_proj(self, hidden_states: torch.Tensor) -> torch.Tensor:
        call = self.current_call("k_proj")
        if call.unfused:
            return self.original("k_proj", hidden_states)
        if call.k is None or hidden_states is not call.hidden_states:
            raise self.out_of_order("k_proj", "another tensor than q_proj's")
        return call.k

    def k_norm(self, k: torch.Tensor) -> torch.Tensor:
        call = self.current_call("k_norm")
        if call.unfused:
            self.thread.call = None
            return self.original("k_norm", k)
        if call.k_out is None or k is not call.k:
            raise self.out_of_order("k_norm", "another tensor than k_proj's")
        self.thread.call = None
        return call.k_out

    def must_run_unfused(self) -> bool:
        """Whether a hook would run between ``q_norm`` and the end of ``k_norm``; warn if so."""
        place = self.place_of_hook()
        if place is None:
            return False
        if self.options.group is not None:
            raise RuntimeError(
                f"{place} must have no hook where the heads are sharded over a group, got one: it "
                "would run after K is normalised; remove it, or call unpatch(model)"
            )
        warnings.warn(
            "attention computes its norms one by one, as the model does, instead of in one launch, "
            f"because of a hook on {place}",
            RuntimeWarning,
            stacklevel=2,
        )
        return True

    def place_of_hook(self) -> str | None:
        """Return the first place with a hook, or with a forward that wraps the new one."""
        if nn_module._global_forward_hooks or nn_module._global_forward_pre_hooks:
            return "all modules"
        if self.modules["q_norm"]._forward_hooks:
            return "q_norm"
        for name in ("k_proj", "k_norm"):
            module = self.modules[name]
            wrapped = getattr(module.forward, "__self__", None) is not self
            if module._forward_hooks or module._forward_pre_hooks or wrapped:
                return name
        return None

    def current_call(self, name: str) -> _AttentionCall:
        call = getattr(self.thread, "call", None)
        if call is None:
            raise self.out_of_order(name, "no call of q_proj before")
        return call

    @staticmethod
    def out_of_order(name: str, got: str) -> RuntimeError:
        return RuntimeError(
            f"{name} must be called in the order q_proj, q_norm, k_proj, k_norm, each on what "
            f"the attention passes on, got {got}: call unpatch(model) before the model is changed "
            "or its modules are called alone"
        )

    # ---- the operation --------------------------------------------------------------------------

    def normalise(self, q: torch.Tensor, k: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        options = self.options
        weight = self.modules["q_norm"].weight
        gamma_q, gamma_k = weight.float(), self.modules["k_norm"].weight.float()
        # MiniMax-M2 leaves the product in the type that torch promotes to, OLMo casts it back.
        out_dtype = q.dtype
        if options.cast_before_gamma:
            out_dtype = torch.promote_types(weight.dtype, q.dtype)
        scales = (gamma_q, gamma_k, options.epsilon)
        rounding: dict[str, Any] = {
            "out_dtype": out_dtype,
            "cast_before_gamma": options.cast_before_gamma,
        }
        if options.group is not None:
            return tensor_parallel.qk_rms_norm(
                q,
                k,
                *scales,
                group=options.group,
                layout=options.layout,
                statistics=options.statistics,
                validate=options.validate,
                **rounding,
            )
        q_rows, k_rows = q.reshape(-1, q.shape[-1]), k.reshape(-1, k.shape[-1])
        turns = self.rotation(q, out_dtype)
        qk_var = None
        if options.statistics == "torch":
            # Of q and k in their own shape, as the model does: torch's order of summation may
            # depend on the shape.
            means = [x.float().pow(2).mean(-1).reshape(-1) for x in (q, k)]
            qk_var = torch.stack(means, dim=1)
        if turns is not None:
            self.thread.rotated = True
            q_out, k_out = torch_ops.qk_rms_norm_rope(
                q_rows,
                k_rows,
                gamma_q,
                gamma_k,
                *turns,
                head_dim=self.head_dim,
                epsilon=options.epsilon,
                qk_var=qk_var,
                cast_before_gamma=options.cast_before_gamma,
            )
        elif qk_var is not None:
            q_out, k_out = torch_ops.apply_qk_rms_norm(q_rows, k_rows, qk_var, *scales, **rounding)
        else:
            q_out, k_out = torch_ops.qk_rms_norm(q_rows, k_rows, *scales, **rounding)
        return q_out.view(q.shape), k_out.view(k.shape)

    def rotation(
        self, q: torch.Tensor, out_dtype: torch.dtype
    ) -> tuple[torch.Tensor, torch.Tensor] | None:
        """Return `positions` and `cos_sin_cache` of the call, or None where the model rotates.

        A model's cosines and sines hold each number twice, for both columns of a pair; it has one
        pair for all layers, of which the last is kept.
        """
        turns = getattr(self.thread, "turns", None)
        if turns is None or q.dim() != 3 or out_dtype != q.dtype:
            return None
        cos, sin = turns
        if cos.dtype != torch.float32 or cos.dim() != 3:
            return None
        rows = len(q) if len(cos) == 1 else 1
        if torch.compiler.is_compiling():
            return _positions_and_angles(cos, sin, rows)
        key = [cos, sin, rows, *(0 if x.is_inference() else x._version for x in turns)]
        kept = getattr(_KEPT, "turns", None)
        if kept is None or not _same(kept[0], key):
            _KEPT.turns = kept = key, _positions_and_angles(cos, sin, rows)
        return kept[1]


def _same(kept: list[Any], key: list[Any]) -> bool:
    return kept[0] is key[0] and kept[1] is key[1] and kept[2:] == key[2:]


def _positions_and_angles(
    cos: torch.Tensor, sin: torch.Tensor, rows: int
) -> tuple[torch.Tensor, torch.Tensor]:
    half = cos.shape[-1] // 2
    cos_sin = torch.cat([cos[..., :half], sin[..., :half]], dim=-1).flatten(0, 1)
    return torch.arange(len(cos_sin), device=cos.device).repeat(rows), cos_sin
