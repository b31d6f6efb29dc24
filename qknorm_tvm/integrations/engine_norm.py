"""`AttentionNorm`: what an engine's attention layer calls in place of its own norms of Q and K.

In: an engine's attention layer, when it is made. Out: an `AttentionNorm` that its forward calls,
eager, in a graph of ``torch.compile`` and in a CUDA graph; or None, and a line in the engine's log,
where there is no module for it.
"""

from __future__ import annotations

import dataclasses
import functools
import logging
from collections.abc import Callable
from typing import Any

import torch

from .. import torch_ops
from ..call import api, cache
from ..call.arrays import adapter_of
from ..call.packs import ENVIRONMENT
from ..errors import QKNormError
from ..spec import KernelSpec
from ..tensor_parallel import functional as over_ranks
from ..tensor_parallel.one_launch import is_everywhere
from ..tensor_parallel.workspace import automatic_workspace
from .engines import say, statistics

Tensor = torch.Tensor


def _mean_squares_by_torch(q: Tensor, k: Tensor) -> Tensor:
    return torch.cat([x.float().pow(2).mean(-1, keepdim=True) for x in (q, k)], dim=-1)


#: The same as an operator, which torch's compiler leaves as it is: it sums in another order.
_mean_squares_uncompiled = torch.library.custom_op(
    "qknorm_tvm::mean_squares_by_torch", _mean_squares_by_torch, mutates_args=(),
    schema="(Tensor q, Tensor k) -> Tensor",
)  # fmt: skip
_mean_squares_uncompiled.register_fake(_mean_squares_by_torch)


@dataclasses.dataclass(frozen=True)
class AttentionNorm:
    """Normalises this rank's columns of Q and K by the mean squares of the whole rows.

    One launch where one rank holds the whole layer, and over ranks where `group` is given and the
    rows are few (`qknorm_tvm.tensor_parallel`, workspace ``"auto"``). Otherwise a launch for the
    statistics, the engine's own all-reduce of 8 bytes a row, and a launch for the rest.

    Parameters
    ----------
    epsilon : float
        Added to the mean squares.
    cast_before_gamma : bool
        Whether the engine rounds before the multiplication by gamma.
    ranks : int
        That share the layer; each holds equally many columns, of replicated KV heads too.
    all_reduce : callable
        The engine's own sum of a float32 tensor of one dimension over these ranks.
    statistics : {"fused", "torch"}
        ``"torch"``: ``x.float().pow(2).mean(-1)``, as engines compute them without own kernels.
    gather : callable or None
        With ``"torch"``, for an engine that computes the statistics of whole rows: makes them from
        each rank's columns.
    uncompiled : bool
        With ``"torch"``, for an engine that computes the statistics in an operator of its own, so
        that they are not compiled in compiled graphs.
    head_dim : int
        Where the layer's rotation is fused: columns of a head; otherwise 0.
    interleaved : bool
        Which pairs are rotated.
    group : ProcessGroup, optional
        Of the ranks, where they exchange their sums within the launch.
    """

    epsilon: float
    cast_before_gamma: bool
    ranks: int
    all_reduce: Callable[[Tensor], Tensor]
    statistics: str
    gather: Callable[[Tensor], Tensor] | None = None
    uncompiled: bool = False
    head_dim: int = 0
    interleaved: bool = False
    group: Any = None

    @property
    def is_local(self) -> bool:
        """Whether the launch that normalises computes the statistics itself."""
        return self.ranks == 1 and self.statistics == "fused"

    @property
    def rotates(self) -> bool:
        """Whether the rotation is fused."""
        return self.head_dim != 0

    def __call__(
        self,
        q: Tensor,
        k: Tensor,
        gamma_q: Tensor,
        gamma_k: Tensor,
        positions: Tensor | None = None,
        cos_sin_cache: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Return Q and K normalised, and rotated where the rotation is fused.

        Parameters
        ----------
        q, k : torch.Tensor, ``[M, Nq]`` and ``[M, Nk]``
        gamma_q, gamma_k : torch.Tensor, ``[Nq]`` and ``[Nk]``, float32
        positions, cos_sin_cache : torch.Tensor, optional
            Where the rotation is fused.
        """
        options: dict[str, Any] = {"cast_before_gamma": self.cast_before_gamma}
        heads: dict[str, Any] = {"head_dim": self.head_dim, "interleaved": self.interleaved}
        if self.group is not None:
            options |= {"epsilon": self.epsilon, "group": self.group, "workspace": "auto"}
            if self.rotates:
                return over_ranks.qk_rms_norm_rope(
                    q, k, gamma_q, gamma_k, positions, cos_sin_cache, **heads, **options
                )
            return over_ranks.qk_rms_norm(q, k, gamma_q, gamma_k, **options)
        qk_var = self.mean_squares(q, k)
        if self.rotates:
            return torch_ops.qk_rms_norm_rope(
                q, k, gamma_q, gamma_k, positions, cos_sin_cache, qk_var=qk_var,
                epsilon=self.epsilon, **heads, **options,
            )  # fmt: skip
        if qk_var is None:
            return torch_ops.qk_rms_norm(q, k, gamma_q, gamma_k, self.epsilon, **options)
        return torch_ops.apply_qk_rms_norm(q, k, qk_var, gamma_q, gamma_k, self.epsilon, **options)

    def mean_squares(self, q: Tensor, k: Tensor) -> Tensor | None:
        """Return the mean squares of whole rows, ``[M, 2]``; None where the launch has them."""
        if self.statistics == "torch":
            return self._engines_mean_squares(q, k)
        if self.is_local:
            return None
        return self._over_ranks(torch_ops.row_mean_of_squares_qk(q, k))

    def _engines_mean_squares(self, q: Tensor, k: Tensor) -> Tensor:
        if self.gather is not None and self.ranks > 1:
            q, k = self.gather(q.contiguous()), self.gather(k.contiguous())
        qk_var = (_mean_squares_uncompiled if self.uncompiled else _mean_squares_by_torch)(q, k)
        return qk_var if self.ranks == 1 or self.gather is not None else self._over_ranks(qk_var)

    def _over_ranks(self, qk_var: Tensor) -> Tensor:
        # As one dimension: engines take tensors of two for activations, and may round those.
        return self.all_reduce(qk_var.flatten()).view_as(qk_var) / self.ranks


# ---- made when a layer is made ------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Layer:
    """One attention layer of an engine, as its plugin sees it.

    Parameters
    ----------
    engine : str
    name : str
        Its class, for the log.
    replaces : str
        What of the engine's is replaced, for the log.
    dtype : torch.dtype
        Of Q and K.
    device : torch.device
    q_cols, k_cols : int
        Of this rank.
    agree : callable
        Told whether this rank can go on; returns whether all of them can. Ranks replace a layer
        together: one alone would wait for statistics that the others never send.
    """

    engine: str
    name: str
    replaces: str
    dtype: torch.dtype
    device: torch.device
    q_cols: int
    k_cols: int
    agree: Callable[[bool], bool] = bool

    def say(self, text: str, level: int = logging.INFO) -> None:
        """Write a line about this type of layer to the engine's log, once."""
        say(self.engine, f"{self.name}: {text}", level)

    def inputs(self, rows: int) -> tuple[Tensor, Tensor]:
        """Return Q and K with random numbers."""
        generator = torch.Generator().manual_seed(0)
        q, k = (
            torch.randn((rows, cols), generator=generator, dtype=torch.float32, device="cpu")
            for cols in (self.q_cols, self.k_cols)
        )
        return q.to(self.device, self.dtype), k.to(self.device, self.dtype)

    def gammas(self) -> tuple[Tensor, Tensor]:
        """Return scales of one."""
        place: dict[str, Any] = {"device": self.device, "dtype": torch.float32}
        return torch.ones(self.q_cols, **place), torch.ones(self.k_cols, **place)


def agree_over(group: Any) -> Callable[[bool], bool]:
    """Return a `Layer.agree` for an engine's group of ranks, None where there is one rank.

    Parameters
    ----------
    group : object or None
        With `world_size` and `cpu_group`, as vLLM and SGLang have it.
    """

    def agree(ok: bool) -> bool:
        if group is None or group.world_size == 1:
            return ok
        answer = torch.tensor([int(ok)], dtype=torch.int32, device="cpu")
        torch.distributed.all_reduce(answer, torch.distributed.ReduceOp.MIN, group=group.cpu_group)
        return bool(answer.item())

    return agree


def widen(norm: Any) -> None:
    """Turn a norm's weight into float32, which is exact, before a checkpoint is loaded into it.

    So it is converted once, and again only where an engine loads new weights.
    """
    narrow = norm.weight
    wide = torch.nn.Parameter(narrow.data.float(), requires_grad=False)
    wide.__dict__.update(narrow.__dict__)  # engines keep how a weight is loaded there
    norm.weight = wide


def norm_for(
    layer: Layer,
    *,
    epsilon: float,
    cast_before_gamma: bool,
    ranks: int,
    all_reduce: Callable[[Tensor], Tensor],
    group: Any,
    gather: Callable[[Tensor], Tensor] | None = None,
    uncompiled: bool = False,
    rotary: Any = None,
    rotate: Callable[..., tuple[Tensor, Tensor]] | None = None,
) -> AttentionNorm | None:
    """Return what a layer calls, or None where it keeps the engine's own code; the log says which.

    Everything is loaded, and tried on a few rows, so that neither a missing module nor a rotation
    of another kind shows only when the engine serves.

    Parameters
    ----------
    layer : Layer
    epsilon, cast_before_gamma, ranks, all_reduce, gather, uncompiled
        As `AttentionNorm`'s.
    group : ProcessGroup or None
        The engine's own of these ranks, on their devices.
    rotary : object, optional
        The layer's rotary embedding, where the plugin can fuse it, with the attributes of vLLM's:
        `head_size`, `rotary_dim`, `is_neox_style` and `cos_sin_cache`.
    rotate : callable, optional
        The engine's kernel of `rotary`, ``(positions, q, k) -> (q, k)``, which may write in place.
        None where the class of `rotary` is not the contract's.
    """
    norm = AttentionNorm(
        epsilon, cast_before_gamma, ranks, all_reduce, statistics(), gather, uncompiled
    )
    rotation, left = None, "this plugin fuses none here"
    if rotary is not None and rotate is None:
        left = f"{type(rotary).__name__} is not the contract's class"
    elif rotary is not None:
        rotation, left = _rotation(layer, norm, rotary)
    refusal = _refusal(layer, norm, rotation, rotary)
    if not layer.agree(not refusal):
        refusal = refusal or "another rank cannot go on"
        layer.say(f"the engine's own norms are kept: {refusal}", logging.WARNING)
        return None
    if rotation is not None:
        assert rotate is not None, "with a rotary embedding"
        left = _difference(layer, norm, rotation, rotary, rotate)
    if not layer.agree(not left):
        rotation, left = None, left or "it is of another kind on another rank"
    chosen = rotation or norm
    if _can_exchange(layer, chosen, rotary, group):
        chosen = dataclasses.replace(chosen, group=group)
    form = f"{ranks} rank{'s' if ranks > 1 else ''}, statistics {norm.statistics}"
    form += ", exchanged within the launch" if chosen.group is not None else ""
    done = "norms and rotation in one launch" if rotation else f"the model rotates: {left}"
    layer.say(f"{layer.replaces} replaced by qknorm_tvm's kernels ({form}); {done}")
    return chosen


def _can_exchange(layer: Layer, norm: AttentionNorm, rotary: Any, group: Any) -> bool:
    """Return whether the ranks can have one launch: GPUs with modules and memory for it.

    The workspace is made here, by all ranks, and they agree that each has the code: calls in a
    graph that is captured could not.
    """
    suits = norm.ranks > 1 and norm.statistics == "fused" and layer.device.type == "cuda"
    if not suits or group is None:
        return False
    exchanging = dataclasses.replace(norm, group=group)
    specs = _specs(layer, exchanging, rotary)
    if not layer.agree(all(_has_module(spec) for spec in specs)):
        return False
    workspace = automatic_workspace(group, layer.device)
    exchanged = [spec for spec in specs if spec.has_peers]
    return workspace is not None and all(is_everywhere(workspace, spec) for spec in exchanged)


def _rotation(layer: Layer, norm: AttentionNorm, rotary: Any) -> tuple[AttentionNorm | None, str]:
    """Return the form of a norm that rotates, or None and why there is none."""
    table, heads = rotary.cos_sin_cache, rotary.head_size
    if table.device != layer.device or table.dim() != 2 or table.shape[1] != rotary.rotary_dim:
        return None, f"its cosines and sines are {tuple(table.shape)} on {table.device}"
    if layer.q_cols % heads or layer.k_cols % heads:
        return None, f"its heads have {heads} columns"
    return dataclasses.replace(norm, head_dim=heads, interleaved=not rotary.is_neox_style), ""


def _refusal(layer: Layer, norm: AttentionNorm, rotation: AttentionNorm | None, rotary: Any) -> str:
    """Return why a norm cannot be used, or ``""``."""
    if layer.device.type not in ("cpu", "cuda"):
        return f"its weights are on {layer.device.type}"
    missing = [spec for spec in _specs(layer, norm, None) if not _has_module(spec)]
    if missing and rotation is not None:
        missing += [spec for spec in _specs(layer, rotation, rotary) if not _has_module(spec)]
    if missing:
        return _how_to_make(missing)
    q, k = layer.inputs(rows=2)
    try:
        _alone(norm)(q, k, *layer.gammas())
        if norm.ranks > 1 and norm.statistics == "fused":
            torch_ops.row_mean_of_squares_qk(q, k)
    except _FAILURES as error:
        return f"{type(error).__name__}: {error}"
    return ""


def _difference(
    layer: Layer,
    norm: AttentionNorm,
    rotation: AttentionNorm,
    rotary: Any,
    rotate: Callable[..., tuple[Tensor, Tensor]],
) -> str:
    """Return why a rotation is not fused, or ``""`` where fused it gives the engine's own bits."""
    missing = [spec for spec in _specs(layer, rotation, rotary) if not _has_module(spec)]
    if missing:
        return _how_to_make(missing)
    table, gammas = rotary.cos_sin_cache, layer.gammas()
    q, k = layer.inputs(rows=33)
    positions = torch.linspace(0, len(table) - 1, len(q), device=layer.device).long()
    try:
        expected = rotate(positions, *_alone(norm)(q, k, *gammas))
        fused = _alone(rotation)(q, k, *gammas, positions, table)
    except _FAILURES as error:
        return f"{type(error).__name__}: {error}"
    same = all(torch.equal(one, other) for one, other in zip(expected, fused, strict=True))
    return "" if same else f"the bits of {type(rotary).__name__} are not those of the contract"


#: What a trial may raise: it is told, and the engine goes on with its own code.
_FAILURES = (QKNormError, OSError, RuntimeError, TypeError, ValueError)


def _alone(norm: AttentionNorm) -> AttentionNorm:
    """Return a norm that needs the same modules but no other rank."""
    kind = "fused" if norm.is_local else "torch"
    return dataclasses.replace(norm, ranks=1, gather=None, statistics=kind, group=None)


# ---- modules ------------------------------------------------------------------------------------


def _specs(layer: Layer, norm: AttentionNorm, rotary: Any) -> list[KernelSpec]:
    """Return what a norm calls."""
    q, k = layer.inputs(rows=1)
    choices: dict[str, Any] = {"cast_before_gamma": norm.cast_before_gamma}
    if norm.rotates:
        op = "qk_rms_norm_rope"
        choices["statistics"] = "local" if norm.is_local else "given"
        table = rotary.cos_sin_cache
        choices |= api.rotation_fields(table, table, norm.head_dim, norm.interleaved)
    else:
        op = "qk_rms_norm" if norm.is_local else "apply_qk_rms_norm"
    if norm.group is not None:
        op = "qk_rms_norm_rope" if norm.rotates else "qk_rms_norm"
        choices["statistics"] = "peers"
    calls = [(op, choices)]
    if norm.ranks > 1 and norm.statistics == "fused":
        calls.append(("row_mean_of_squares_qk", {}))
    target = adapter_of("q", q).target(q)
    return [api.spec_of(op, target, q=q, k=k, **fields) for op, fields in calls]


@functools.lru_cache(maxsize=64)
def _has_module(spec: KernelSpec) -> bool:
    """Return whether there is a module for a spec, or it can be made; models have many layers."""
    try:
        cache.module_for(spec)
    except (QKNormError, OSError):  # they say how to make this one; all are told together
        return False
    return True


def _how_to_make(missing: list[KernelSpec]) -> str:
    specs = list(dict.fromkeys(spec.text for spec in missing))
    options = " ".join(f"--spec '{spec}'" for spec in specs)
    return (
        f"there is no module for {', '.join(specs)}; make it where TVM is, "
        f"`qknorm-tvm export qk.so {options}`, and name its folder in {ENVIRONMENT}"
    )
