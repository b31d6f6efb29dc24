"""`TensorParallelQKNorm`: QK-RMSNorm as a torch module that holds this rank's scales."""

from __future__ import annotations

from typing import Any

import torch

from .functional import qk_rms_norm, qk_rms_norm_rope, qk_rms_norm_rope_cache
from .group import members_of
from .layout import HeadLayout
from .workspace import PeerWorkspace


class TensorParallelQKNorm(torch.nn.Module):
    """RMSNorm over the whole Q and K projections, of which this rank holds some heads.

    Stands where a model has two norms over all heads of Q and of K. There is no backward: the
    scales do not require grad, and inputs that do are refused.

    The scales stay float32 whatever dtype the model is converted to, since they are multiplied in
    float32; a state dict in another dtype is widened when it is loaded. The state dict holds this
    rank's shards; `load_full` takes the whole layer's.

    Parameters
    ----------
    q_heads, kv_heads, head_dim : int
        Of the whole layer; see `HeadLayout` for how they are spread over the ranks.
    epsilon : float
        Added to the mean squares, as float32.
    group : ProcessGroup, optional
        The ranks that share the layer; by default the default group, which must exist when the
        module is made, or this process alone where torch.distributed is not initialised.
    statistics, cast_before_gamma, validate
        See `qknorm_tvm.tensor_parallel.qk_rms_norm`.
    fused : PeerWorkspace, "auto" or False
        Whether one launch does all, by `PeerWorkspace`. ``"auto"``: where the ranks' GPUs reach one
        another's memory and it is the faster way; otherwise, and for more rows than
        `workspace.AUTO_ROWS`, three steps, whose sums may differ in their last bit. False: always
        three steps. A workspace: always one launch, of at most its rows. The same on every rank.
    device : torch.device, optional
        Where the scales are.

    Attributes
    ----------
    layout : HeadLayout
        This rank's heads and columns.
    gamma_q, gamma_k : torch.nn.Parameter, ``[layout.q_cols]`` and ``[layout.k_cols]``, float32
        This rank's scales, ones at first.

    Raises
    ------
    TypeError, ValueError
        The heads do not divide over the ranks, or an argument is wrong.
    """

    gamma_q: torch.nn.Parameter
    gamma_k: torch.nn.Parameter

    def __init__(
        self,
        q_heads: int,
        kv_heads: int,
        head_dim: int,
        epsilon: float = 1e-6,
        *,
        group: Any = None,
        statistics: str = "fused",
        cast_before_gamma: bool = False,
        validate: bool = False,
        fused: Any = "auto",
        device: Any = None,
    ):
        super().__init__()
        members = members_of(group, may_be_alone=True)
        self.layout = HeadLayout(q_heads, kv_heads, head_dim, members.world_size, members.rank)
        self.epsilon = epsilon
        self.group = group
        self.statistics = statistics
        self.cast_before_gamma = cast_before_gamma
        self.validate = validate
        if fused is not False and fused != "auto" and not isinstance(fused, PeerWorkspace):
            raise TypeError(f"fused must be 'auto', False or a PeerWorkspace, got {fused!r}")
        self.workspace = fused or None
        for name, cols in (("gamma_q", self.layout.q_cols), ("gamma_k", self.layout.k_cols)):
            ones = torch.ones(cols, dtype=torch.float32, device=device)
            self.register_parameter(name, torch.nn.Parameter(ones, requires_grad=False))

    def forward(self, q: torch.Tensor, k: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Normalise this rank's columns.

        Parameters
        ----------
        q, k : torch.Tensor, ``[..., layout.q_cols]`` and ``[..., layout.k_cols]``
            bfloat16, float16 or float32; slices of one fused projection are taken as they are.

        Returns
        -------
        (q_out, k_out)
            New tensors of the shape and dtype of q and k.

        Raises
        ------
        TypeError, ValueError
            As `qknorm_tvm.tensor_parallel.qk_rms_norm`.
        """
        return qk_rms_norm(
            q,
            k,
            self.gamma_q,
            self.gamma_k,
            self.epsilon,
            group=self.group,
            layout=self.layout,
            statistics=self.statistics,
            cast_before_gamma=self.cast_before_gamma,
            validate=self.validate,
            workspace=self.workspace,
        )

    def attention_input(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor | None = None,
        *,
        positions: torch.Tensor | None,
        cos_sin_cache: torch.Tensor | None,
        interleaved: bool = False,
        k_cache: torch.Tensor | None = None,
        v_cache: torch.Tensor | None = None,
        slot_mapping: torch.Tensor | None = None,
        k_scale: torch.Tensor | None = None,
        v_scale: torch.Tensor | None = None,
        q_out: torch.Tensor | None = None,
        k_out: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Normalise this rank's columns, rotate their heads, and with caches store K and V.

        Parameters
        ----------
        q, k : torch.Tensor, ``[M, layout.q_cols]`` and ``[M, layout.k_cols]``
        v, k_cache, v_cache, slot_mapping, k_scale, v_scale
            As for `qknorm_tvm.tensor_parallel.qk_rms_norm_rope_cache`; all or none.
        positions, cos_sin_cache, interleaved, q_out, k_out
            As for `qknorm_tvm.tensor_parallel.qk_rms_norm_rope`.

        Returns
        -------
        (q_out, k_out)
            `k_out` is None where K goes to a cache and none is given.

        Raises
        ------
        TypeError, ValueError
            As `qknorm_tvm.tensor_parallel.qk_rms_norm`.
        """
        options: dict[str, Any] = {
            "head_dim": self.layout.head_dim, "interleaved": interleaved, "epsilon": self.epsilon,
            "group": self.group, "layout": self.layout, "statistics": self.statistics,
            "cast_before_gamma": self.cast_before_gamma, "validate": self.validate,
            "workspace": self.workspace, "q_out": q_out, "k_out": k_out,
        }  # fmt: skip
        stored = {"v": v, "k_cache": k_cache, "v_cache": v_cache, "slot_mapping": slot_mapping}
        missing = [name for name, tensor in stored.items() if tensor is None]
        if len(missing) == len(stored):
            return qk_rms_norm_rope(
                q, k, self.gamma_q, self.gamma_k, positions, cos_sin_cache, **options
            )
        if missing:
            raise TypeError(f"{missing[0]} must be a torch.Tensor with the others, got None")
        return qk_rms_norm_rope_cache(
            q, k, v, self.gamma_q, self.gamma_k, positions, cos_sin_cache,  # type: ignore[arg-type]
            k_cache, v_cache, slot_mapping, k_scale=k_scale, v_scale=v_scale,  # type: ignore[arg-type]
            **options,
        )  # fmt: skip

    @torch.no_grad()
    def load_full(self, gamma_q: torch.Tensor, gamma_k: torch.Tensor) -> None:
        """Take this rank's part, by head, of the whole layer's scales.

        Parameters
        ----------
        gamma_q, gamma_k : torch.Tensor, ``[layout.q_cols_total]`` and ``[layout.k_cols_total]``
            Of any floating-point type, on any device.

        Raises
        ------
        TypeError, ValueError
            One is no floating-point tensor, or not of the whole layer's length; neither is taken.
        """
        for name, gamma in (("gamma_q", gamma_q), ("gamma_k", gamma_k)):
            if not isinstance(gamma, torch.Tensor):
                raise TypeError(f"{name} must be a torch.Tensor, got {type(gamma).__name__}")
            if not gamma.is_floating_point():
                raise TypeError(f"{name} must have a floating-point type, got {gamma.dtype}")
        q_shard, k_shard = self.layout.shard_gamma_q(gamma_q), self.layout.shard_gamma_k(gamma_k)
        self.gamma_q.copy_(q_shard)
        self.gamma_k.copy_(k_shard)

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        # `model.to(torch.bfloat16)` and the like: moved, but not rounded.
        before = {name: gamma.data for name, gamma in self._parameters.items() if gamma is not None}
        super()._apply(fn, recurse)
        for name, values in before.items():
            gamma = self._parameters[name]
            if gamma is not None and gamma.dtype != torch.float32:
                gamma.data = values.to(gamma.device)
        return self

    def extra_repr(self) -> str:
        """Say what distinguishes this module, for `print` of a model."""
        layout = self.layout
        return (
            f"q_heads={layout.q_heads}, kv_heads={layout.kv_heads}, head_dim={layout.head_dim}, "
            f"rank={layout.rank} of {layout.world_size}, epsilon={self.epsilon}, "
            f"statistics={self.statistics!r}, cast_before_gamma={self.cast_before_gamma}"
        )
