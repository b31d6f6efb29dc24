"""The layer in one launch: statistics, exchange over a `PeerWorkspace`, norm, rotation, cache."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from ..call import api
from ..call.arrays import cuda_target
from ..call.cache import entries, module_for
from ..call.torch_autograd import count_writes
from ..operations import OPERATIONS
from .workspace import PeerWorkspace


def launch(
    workspace: PeerWorkspace,
    op: str,
    tensors: Mapping[str, torch.Tensor | None],
    epsilon: float,
    divisors: tuple[float, float, float],
    **choices: Any,
) -> None:
    """Queue the one launch of an operation.

    Parameters
    ----------
    workspace : PeerWorkspace
    op : str
        One whose statistics can be exchanged.
    tensors : mapping
        By name, outputs included; None or nothing for those that are not given.
    epsilon : float
    divisors : tuple of float
        See `arguments.Call.divisors`.
    **choices
        Fields of the `KernelSpec` that the tensors do not show.

    Raises
    ------
    TypeError, ValueError, PeerError, BuildError
        As `qknorm_tvm.tensor_parallel.qk_rms_norm`.
    """
    operation, q, k = OPERATIONS[op], tensors["q"], tensors["k"]
    q_out = tensors["q_out"]
    assert q is not None
    assert k is not None
    assert q_out is not None
    key = (
        "peers", q.dtype, q_out.dtype, q.shape[-1], k.shape[-1], q.device,
        tuple(sorted(choices.items())),
    )  # fmt: skip
    function = entries[op].get(key)
    if function is None:
        out = q_out if "out_dtype" in operation.spec_fields else None
        target = cuda_target(q.device.index)
        spec = api.spec_of(op, target, q=q, k=k, q_out=out, statistics="peers", **choices)
        function = entries[op][key] = getattr(module_for(spec), op)
    given = (tensors.get(name) for name in operation.tensors)
    function(*given, float(epsilon), *workspace.arguments(*divisors))
    written = (tensors.get(name) for name in operation.outputs)
    count_writes([tensor for tensor in written if tensor is not None])
