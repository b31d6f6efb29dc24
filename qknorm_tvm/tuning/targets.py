"""The implementation of a target that is tuned."""

from __future__ import annotations

from ..targets import parse_target
from .target import TunableTarget


def open_target(text: str, *, threads: int | None = None) -> TunableTarget:
    """Return the implementation for a target's canonical text.

    Parameters
    ----------
    text : str
    threads : int, optional
        Threads of the measured calls, on CPUs; None when unknown.
    """
    if parse_target(text).kind == "cuda":
        from .cuda_target import CudaTarget

        return CudaTarget(text)
    from .cpu_target import CpuTarget

    return CpuTarget(text, threads)
