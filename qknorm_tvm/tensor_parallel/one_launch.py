"""The layer in one launch: statistics, exchange over a `PeerWorkspace`, norm, rotation, cache."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

import torch

from ..call import api
from ..call.arrays import cuda_target
from ..call.cache import entries, module_for
from ..call.torch_autograd import count_writes
from ..errors import QKNormError, warn_caller
from ..operations import OPERATIONS
from ..spec import KernelSpec
from .group import gathered
from .workspace import PeerWorkspace, by_rank

#: Whether all ranks have a spec's code, by workspace.
_everywhere: dict[tuple[int, KernelSpec], bool] = {}


def is_everywhere(workspace: PeerWorkspace, spec: KernelSpec) -> bool:
    """Return whether every rank has a spec's code; where one has not, a warning says why, once.

    All ranks ask together and tell one another the first time. While a graph is captured they
    cannot: then the answer is no, until they are asked again.
    """
    key = workspace.handle, spec
    if key not in _everywhere:
        if torch.cuda.is_current_stream_capturing():
            return False
        missing = ""
        try:
            module_for(spec)
        except (QKNormError, OSError, ValueError) as error:
            missing = str(error)
        everyones = gathered(missing, workspace.members)
        _everywhere[key] = not any(everyones)
        if any(everyones):
            warn_caller(
                "the layer takes three steps instead of one launch: every rank must have its "
                f"code, got {by_rank(everyones)}"
            )
    return _everywhere[key]


#: The same by what decides the code, which is found without a spec.
_possible: dict[tuple[int, tuple[Any, ...]], bool] = {}


@dataclasses.dataclass
class Launch:
    """The one launch of an operation.

    Parameters
    ----------
    workspace : PeerWorkspace
    op : str
        One whose statistics can be exchanged.
    tensors : mapping
        By name, outputs included; None or nothing for those that are not given.
    choices : dict
        Fields of the `KernelSpec` that the tensors do not show.
    """

    workspace: PeerWorkspace
    op: str
    tensors: Mapping[str, torch.Tensor | None]
    choices: dict[str, Any]

    @functools.cached_property
    def _key(self) -> tuple[Any, ...]:
        q, k, q_out = (self._given(name) for name in ("q", "k", "q_out"))
        return (
            "peers", q.dtype, q_out.dtype, q.shape[-1], k.shape[-1], q.device,
            tuple(sorted(self.choices.items())),
        )  # fmt: skip

    def _given(self, name: str) -> torch.Tensor:
        tensor = self.tensors[name]
        assert tensor is not None
        return tensor

    def _spec(self) -> KernelSpec:
        q, k, q_out = (self._given(name) for name in ("q", "k", "q_out"))
        out = q_out if "out_dtype" in OPERATIONS[self.op].spec_fields else None
        target = cuda_target(q.device.index)
        return api.spec_of(self.op, target, q=q, k=k, q_out=out, statistics="peers", **self.choices)

    def is_possible(self) -> bool:
        """Return whether every rank has the code, as `is_everywhere`."""
        key = self.workspace.handle, self._key
        possible = _possible.get(key)
        if possible is None:
            possible = is_everywhere(self.workspace, self._spec())
            if not torch.cuda.is_current_stream_capturing():
                _possible[key] = possible
        return possible

    def queue(self, epsilon: float, divisors: tuple[float, float, float]) -> None:
        """Queue it; for the divisors see `arguments.Call.divisors`.

        Raises
        ------
        TypeError, ValueError, PeerError, BuildError
            As `qknorm_tvm.tensor_parallel.qk_rms_norm`.
        """
        operation = OPERATIONS[self.op]
        function = entries[self.op].get(self._key)
        if function is None:
            function = entries[self.op][self._key] = getattr(module_for(self._spec()), self.op)
        given = (self.tensors.get(name) for name in operation.tensors)
        function(*given, float(epsilon), *self.workspace.arguments(*divisors))
        written = (self.tensors.get(name) for name in operation.outputs)
        count_writes([tensor for tensor in written if tensor is not None])
