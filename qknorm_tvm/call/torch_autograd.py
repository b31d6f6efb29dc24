"""What torch's autograd cannot see of these functions: derivatives to refuse, writes to count.

Imported only where torch is. The Python API, the operators and the tensor-parallel layer all use
it, so that they refuse the same calls.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch.autograd import forward_ad


def forward_mode() -> bool:
    """Whether forward-mode AD is on in this process, so that a tensor may have a tangent."""
    # Where a version of torch does not say, every tensor is asked.
    return getattr(forward_ad, "_current_level", 0) >= 0


def refuse_derivative(name: str, tensor: torch.Tensor, operator: str | None = None) -> None:
    """Raise for a tensor whose derivative is asked for: torch would drop it in silence.

    Parameters
    ----------
    name : str
        The argument.
    tensor : torch.Tensor
        Also one that ``torch.func.grad``, ``vjp``, ``jvp`` or another transform wraps.
    operator : str, optional
        The operator that has none, for the message.

    Raises
    ------
    ValueError
        It requires grad, under grad mode, or has a tangent of forward-mode AD.
    """
    has = f"{operator} has" if operator else "there is"
    if tensor.requires_grad and torch.is_grad_enabled():
        raise ValueError(
            f"{name} must not require grad ({has} no backward), got a tensor that does: "
            "call under torch.no_grad(), or pass a detached tensor"
        )
    if forward_mode() and forward_ad.unpack_dual(tensor).tangent is not None:
        raise ValueError(
            f"{name} must not have a tangent ({has} no derivative), got a dual tensor: "
            "pass its primal, or a detached tensor"
        )


def is_wrapped(tensor: torch.Tensor) -> bool:
    """Whether a transform of ``torch.func`` wraps the tensor, which then has no memory to pass."""
    return bool(torch._C._functorch.is_functorch_wrapped_tensor(tensor))


def _find_counter() -> Callable[[Iterable[torch.Tensor]], None]:
    # What `torch.autograd.graph.increment_version` calls: that takes twice the time.
    counter = getattr(torch._C, "_increment_version", None)
    try:
        counter((torch.empty(0),))  # type: ignore[misc]
    except TypeError:  # torch 2.4 takes one at a time

        def count(tensors: Iterable[torch.Tensor]) -> None:
            for tensor in tensors:
                torch.autograd.graph.increment_version(tensor)

        return count
    return counter  # type: ignore[return-value]


#: ``count_writes((tensor, ...))`` counts a write to each tensor, so that autograd sees it in a
#: tensor saved for somebody else's backward.
count_writes = _find_counter()
