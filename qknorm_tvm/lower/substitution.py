"""Replacing variables in TensorIR, for the lowering of every target."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from tvm import tirx
from tvm_ffi import structural_map


def substitute(node: Any, values: Sequence[tuple[tirx.Var, Any]]) -> Any:
    """Return a statement or expression with variables replaced.

    Parameters
    ----------
    node : tirx.Stmt or tirx.Expr
    values : sequence of (tirx.Var, tirx.Expr)
        Each variable, and what takes its place.
    """

    def replace(var: tirx.Var) -> Any:
        return next((new for old, new in values if var.same_as(old)), var)

    return structural_map(node, (tirx.Var, replace))
