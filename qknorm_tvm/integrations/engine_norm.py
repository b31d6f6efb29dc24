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
from .engines import say, statistics

Tensor = torch.Tensor


@dataclasses.dataclass(frozen=True)
class AttentionNorm:
    """Normalises this rank's columns of Q and K by the mean squares of the whole rows.

    One launch where one rank holds the whole layer. Otherwise a launch for the statistics, the
    engine's own all-reduce of 8 bytes a row, and a launch for the rest.

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
    head_dim : int
        Where the layer's rotation is fused: columns of a head; otherwise 0.
    interleaved : bool
        Which pairs are rotated.
    """

    epsilon: float
    cast_before_gamma: bool
    ranks: int
    all_reduce: Callable[[Tensor], Tensor]
    statistics: str
    gather: Callable[[Tensor], Tensor] | None = None
    head_dim: int = 0
    interleaved: bool = False

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
        qk_var = self.mean_squares(q, k)
        if self.rotates:
            return torch_ops.qk_rms_norm_rope(
                q, k, gamma_q, gamma_k, positions, cos_sin_cache, qk_var=qk_var,
                epsilon=self.epsilon, head_dim=self.head_dim, interleaved=self.interleaved,
                cast_before_gamma=self.cast_before_gamma,
            )  # fmt: skip
        options: dict[str, Any] = {"cast_before_gamma": self.cast_before_gamma}
        if qk_var is None:
            return torch_ops.qk_rms_norm(q, k, gamma_q, gamma_k, self.epsilon, **options)
        return torch_ops.apply_qk_rms_norm(q, k, qk_var, gamma_q, gamma_k, self.epsilon, **options)

    def mean_squares(self, q: Tensor, k: Tensor) -> Tensor | None:
        """Return the mean squares of whole rows, ``[M, 2]``; None where the launch computes them.

        The one place where ranks communicate.
        """
        if self.statistics == "torch":
            return self._mean_squares_by_torch(q, k)
        if self.ranks == 1:
            return None
        return self._over_ranks(torch_ops.row_mean_of_squares_qk(q, k))

    def _mean_squares_by_torch(self, q: Tensor, k: Tensor) -> Tensor:
        if self.gather is not None and self.ranks > 1:
            q, k = self.gather(q.contiguous()), self.gather(k.contiguous())
        qk_var = torch.cat([x.float().pow(2).mean(-1, keepdim=True) for x in (q, k)], dim=-1)
        return qk_var if self.ranks == 1 or self.gather is not None else self._over_ranks(qk_var)

    def _over_ranks(self, qk_var: Tensor) -> Tensor:
        # As one dimension: engines take tensors of two for activations, and may round those.
        return self.all_reduce(qk_var.flatten()).view_as(qk_var) / self.ranks


# ---- made when a layer is made ------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Layer:
    """One type of attention layer of an engine, as its plugin sees it.

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
        Told whether this rank can go on; returns whether all can.
    """

    engine: str
    name: str
    replaces: str
    dtype: torch.dtype
    device: torch.device
    q_cols: int
    k_cols: int
    agree: Callable[[bool], bool] = bool


def norm_for(
    layer: Layer,
    *,
    epsilon: float,
    cast_before_gamma: bool,
    ranks: int,
    all_reduce: Callable[[Tensor], Tensor],
    gather: Callable[[Tensor], Tensor] | None = None,
    rotary: Any = None,
    rotate: Callable[..., tuple[Tensor, Tensor]] | None = None,
) -> AttentionNorm | None:
    """Return what a layer calls, or None where it keeps the engine's own code; the log says which.

    Everything is loaded, and tried on a few rows, so that neither a missing module nor a rotation
    of another kind shows only when the engine serves.

    Parameters
    ----------
    layer : Layer
    epsilon, cast_before_gamma, ranks, all_reduce, gather
        As `AttentionNorm`'s.
    rotary : object, optional
        The layer's rotary embedding, with the attributes of vLLM's: `head_size`, `rotary_dim`,
        `is_neox_style` and `cos_sin_cache`. None where its class is another.
    rotate : callable, optional
        The engine's kernel of `rotary`, ``(positions, q, k) -> (q, k)``.
    """
    if layer.device.type not in ("cpu", "cuda"):
        reason = f"tensors on {layer.device.type}"
        _say(layer, f"keeps the engine's own norms: {reason}", logging.WARNING)
        return None
    norm = AttentionNorm(epsilon, cast_before_gamma, ranks, all_reduce, statistics(), gather)
    if not _agreed(layer, norm):
        return None
    rotation, without = None, "the rotary embedding is of another class"
    if rotary is not None and rotate is not None:
        rotation = dataclasses.replace(
            norm, head_dim=rotary.head_size, interleaved=not rotary.is_neox_style
        )
        without = _why_not_rotate(layer, norm, rotation, rotary, rotate)
    rotates = layer.agree(rotation is not None and not without)
    done = "and the rotation in one launch" if rotates else f"the rotation is the model's: {without}"
    if rotary is None and rotate is None:
        done = "the rotation is the model's"
    form = f"{ranks} rank{'s' if ranks > 1 else ''}, statistics {norm.statistics}"
    _say(layer, f"{layer.replaces} replaced by qknorm_tvm's kernels ({form}); {done}")
    return rotation if rotates else norm


def _say(layer: Layer, text: str, level: int = logging.INFO) -> None:
    say(layer.engine, f"{layer.name}: {text}", level)


def _inputs(layer: Layer, rows: int = 33) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    q, k = (
        torch.randn((rows, cols), generator=generator, dtype=torch.float32, device="cpu")
        for cols in (layer.q_cols, layer.k_cols)
    )
    place = {"device": layer.device, "dtype": layer.dtype}
    return q.to(**place), k.to(**place)  # type: ignore[call-overload]


def _ones(layer: Layer) -> tuple[Tensor, Tensor]:
    place: dict[str, Any] = {"device": layer.device, "dtype": torch.float32}
    return torch.ones(layer.q_cols, **place), torch.ones(layer.k_cols, **place)


#: What has been tried, by layer and norm: models have dozens of equal layers.
_tried: dict[tuple[Any, ...], bool] = {}


def _agreed(layer: Layer, norm: AttentionNorm) -> bool:
    """Return whether every rank has what a norm calls."""
    key = (layer.engine, layer.name, layer.dtype, layer.device, layer.q_cols, layer.k_cols,
           norm.epsilon, norm.cast_before_gamma, norm.ranks, norm.statistics)  # fmt: skip
    if key not in _tried:
        _tried[key] = layer.agree(_works(layer, norm))
        if not _tried[key]:
            # A rank that could go on must not wait for statistics that the others never send.
            _say(layer, "keeps the engine's own norms", logging.WARNING)
    return _tried[key]


def _works(layer: Layer, norm: AttentionNorm) -> bool:
    # Alone, without the all-reduce: another rank may not come this far.
    alone = dataclasses.replace(norm, ranks=1, gather=None)
    needed = ["qk_rms_norm"]
    if norm.ranks > 1 or norm.statistics == "torch":
        needed = ["apply_qk_rms_norm"]
    if norm.ranks > 1 and norm.statistics == "fused":
        needed.append("row_mean_of_squares_qk")
    missing = _missing(layer, needed, cast_before_gamma=norm.cast_before_gamma)
    if missing:
        _say(layer, missing, logging.WARNING)
        return False
    q, k = _inputs(layer)
    try:
        with torch.no_grad():
            if needed != ["qk_rms_norm"]:
                alone = dataclasses.replace(alone, statistics="torch")
            alone(q, k, *_ones(layer))
    except (QKNormError, RuntimeError, ValueError, TypeError) as error:
        _say(layer, f"{type(error).__name__}: {error}", logging.WARNING)
        return False
    return True


def _why_not_rotate(
    layer: Layer,
    norm: AttentionNorm,
    rotation: AttentionNorm,
    rotary: Any,
    rotate: Callable[..., tuple[Tensor, Tensor]],
) -> str:
    """Return why a rotation is left to the model, or ``""`` where fused it gives the same bits."""
    table = rotary.cos_sin_cache
    if table.device != layer.device or table.shape[-1] != rotary.rotary_dim:
        return f"its cosines are {tuple(table.shape)} on {table.device}"
    local = norm.ranks == 1 and norm.statistics == "fused"
    fields = api.rotation_fields(table, table, rotary.head_size, rotation.interleaved)
    missing = _missing(
        layer, ["qk_rms_norm_rope"], cast_before_gamma=norm.cast_before_gamma,
        statistics="local" if local else "given", **fields,
    )  # fmt: skip
    if missing:
        return missing
    q, k = _inputs(layer)
    positions = torch.linspace(0, len(table) - 1, len(q), device=layer.device).long()
    unfused, fused = (
        dataclasses.replace(each, ranks=1, gather=None, statistics="fused" if local else "torch")
        for each in (norm, rotation)
    )
    try:
        with torch.no_grad():
            gammas = _ones(layer)
            expected = rotate(positions, *unfused(q, k, *gammas))
            got = fused(q, k, *gammas, positions, table)
    except (QKNormError, RuntimeError, ValueError, TypeError) as error:
        return f"{type(error).__name__}: {error}"
    same = all(torch.equal(one, other) for one, other in zip(expected, got, strict=True))
    return "" if same else f"fused it rounds otherwise than {type(rotary).__name__}"


def _missing(layer: Layer, operations: list[str], **choices: Any) -> str:
    """Say which specs there is no module for, and what makes them; ``""`` where all are there."""
    q, k = _inputs(layer, rows=1)
    target = adapter_of("q", q).target(q)
    missing = []
    for op in operations:
        fields = {} if op == "row_mean_of_squares_qk" else choices
        spec = api.spec_of(op, target, q=q, k=k, **fields)
        try:
            cache.module_for(spec)
        except (QKNormError, OSError):  # says how to make this one; all are named below
            missing.append(spec)
    if not missing:
        return ""
    wanted = " ".join(f"--spec '{spec.text}'" for spec in missing)
    return (
        f"there is no module for {', '.join(spec.text for spec in missing)}; make it where TVM is, "
        f"`qknorm-tvm export qk.so {wanted}`, and name its folder in {ENVIRONMENT}"
    )
