"""What outputs must be: the table of references, one entry for each operation.

To verify a new operation, add it to `REFERENCES`. Its cases, memory layouts, guards and comparison
follow from the operations' table.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import numpy as np
import numpy.typing as npt

from ..operations import OPERATIONS
from ..spec import KernelSpec
from . import reference
from .inputs import Activations
from .reference_torch import apply_qk_rms_norm as torch_graph
from .reference_torch import to_numpy, to_torch
from .rope_inputs import special_rope_inputs
from .rope_reference import rotated_and_stored


@dataclasses.dataclass(frozen=True)
class Graph:
    """The steps of the unfused graph, as a device is expected to round them.

    Parameters
    ----------
    order : str
        The order in which NumPy adds up a row: ``"cpu"`` or ``"cuda"``.
    fused : bool
        Whether squares are added by a fused multiply-add.
    torch_device : str, optional
        Where torch normalises; by default NumPy does.
    """

    order: str = "cpu"
    fused: bool = True
    torch_device: str | None = None

    @property
    def by_torch(self) -> bool:
        """Whether torch normalises, not NumPy."""
        return self.torch_device is not None

    def statistics(self, a: Activations) -> npt.NDArray:
        """Return the mean squares of q and k, ``[M, 2]``."""
        return reference.row_mean_of_squares_qk(a.q, a.k, fused=self.fused, order=self.order)

    def normalise(self, a: Activations, spec: KernelSpec) -> tuple[npt.NDArray, ...]:
        """Return q and k normalised with `a.qk_var`."""
        out_dtype, cast = spec.out_dtype, spec.cast_before_gamma
        if self.torch_device is not None:
            return torch_outputs(a, out_dtype, self.torch_device, cast_before_gamma=cast)
        return reference.apply_qk_rms_norm(
            a.q, a.k, a.qk_var, a.gamma_q, a.gamma_k, a.epsilon, out_dtype, cast_before_gamma=cast
        )


@dataclasses.dataclass(frozen=True)
class Reference:
    """How an operation is verified.

    Parameters
    ----------
    outputs : callable
        Computes the outputs that calls of a spec give, in the order of the operation's. Memory of
        an output that the operation leaves alone holds `qknorm_tvm.check.layouts.CANARY` in every
        byte.
    extra_inputs : callable, optional
        Makes the inputs that are no field of `Activations`, by name, from those that are; and what
        paged caches hold before a call.
    """

    outputs: Callable[[Graph, Activations, KernelSpec], tuple[npt.NDArray, ...]]
    extra_inputs: Callable[
        [KernelSpec, Activations, np.random.Generator], dict[str, npt.NDArray]
    ] = lambda spec, activations, rng: {}


def _qk_rms_norm(graph: Graph, a: Activations, spec: KernelSpec) -> tuple[npt.NDArray, ...]:
    return graph.normalise(dataclasses.replace(a, qk_var=graph.statistics(a)), spec)


def _rotated(graph: Graph, a: Activations, spec: KernelSpec) -> tuple[npt.NDArray, ...]:
    if not spec.has_given_statistics:
        a = dataclasses.replace(a, qk_var=graph.statistics(a))
    norms = graph.normalise(a, spec)
    return tuple(rotated_and_stored(spec, a.tensors, norms).values())


#: How each operation is verified, by its name.
REFERENCES = {
    "apply_qk_rms_norm": Reference(Graph.normalise),
    "row_mean_of_squares_qk": Reference(lambda graph, a, spec: (graph.statistics(a),)),
    "qk_rms_norm": Reference(_qk_rms_norm),
    "qk_rms_norm_rope": Reference(_rotated, special_rope_inputs),
    "qk_rms_norm_rope_cache": Reference(_rotated, special_rope_inputs),
}


def with_extra_inputs(spec: KernelSpec, a: Activations, seed: int = 0) -> Activations:
    """Add the inputs that only the spec's operation takes."""
    extra = REFERENCES[spec.op].extra_inputs(spec, a, np.random.default_rng(seed))
    return dataclasses.replace(a, extra=extra)


def outputs_of(graph: Graph, a: Activations, spec: KernelSpec) -> tuple[npt.NDArray, ...]:
    """Return what the outputs of a spec's calls must be, in the order of its operation's."""
    return REFERENCES[spec.op].outputs(graph, a, spec)


def torch_outputs(
    a: Activations, out_dtype: str, device: str, *, cast_before_gamma: bool = False
) -> tuple[npt.NDArray, ...]:
    """Return the outputs of the unfused graph in torch on a device, given the statistics."""
    import torch

    outputs = torch_graph(
        **{
            name: to_torch(np.ascontiguousarray(a.tensors[name])).to(device)
            for name in OPERATIONS["apply_qk_rms_norm"].signature
        },
        epsilon=a.epsilon,
        out_dtype=getattr(torch, out_dtype),
        cast_before_gamma=cast_before_gamma,
    )
    return tuple(to_numpy(x.cpu()) for x in outputs)
