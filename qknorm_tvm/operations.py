"""The operations, and how each is called: the order of its tensors is the entry point's."""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(frozen=True)
class Operation:
    """What a module's entry point of one operation takes.

    Parameters
    ----------
    name : str
        Also the exported function's.
    tensors : tuple of str
        In the order of the call, outputs first.
    outputs : tuple of str
        Those that are written.
    has_epsilon : bool
        Whether epsilon follows the tensors.
    """

    name: str
    tensors: tuple[str, ...]
    outputs: tuple[str, ...]
    has_epsilon: bool

    @property
    def strided(self) -> tuple[str, ...]:
        """The tensors of Q's or K's columns, whose row strides a declared function takes."""
        return tuple(one for one in self.tensors if one in ("q_out", "k_out", "q", "k"))

    @property
    def internal_scalars(self) -> tuple[str, ...]:
        """The scalars that a declared function takes last; the entry point computes them."""
        return ("row_tiles", *(f"{one}_stride" for one in self.strided))

    @property
    def normalises(self) -> bool:
        """Whether it writes Q and K; otherwise it writes their statistics."""
        return "q_out" in self.outputs


_OUTPUTS = ("q_out", "k_out")

#: Operations by name.
OPERATIONS = {
    one.name: one
    for one in (
        Operation(
            "apply_qk_rms_norm",
            (*_OUTPUTS, "gamma_q", "gamma_k", "qk_var", "q", "k"),
            _OUTPUTS,
            has_epsilon=True,
        ),
        Operation("row_mean_of_squares_qk", ("qk_var", "q", "k"), ("qk_var",), has_epsilon=False),
        Operation(
            "qk_rms_norm",
            (*_OUTPUTS, "gamma_q", "gamma_k", "q", "k"),
            _OUTPUTS,
            has_epsilon=True,
        ),
    )
}
