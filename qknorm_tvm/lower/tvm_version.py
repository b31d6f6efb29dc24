"""What depends on TVM's version: its pipelines, and the form of the CUDA source that it writes.

At a new version of TVM, look here first, and at `declare.parsing`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection
from typing import Any

import tvm
from tvm import tirx
from tvm.backend.cuda import export_cuda_host
from tvm.tirx.compilation_pipeline import get_tir_pipeline, register_tir_pipeline

_CUDA_PIPELINE, _LOWERED_PIPELINE = "qknorm_cuda", "qknorm_lowered"

_LAUNCH = re.compile(
    r"::(?P<kernel>(?P<name>\w+)_kernel)<<<(?P<grid>dim3\([^)]*\)), (?P<block>dim3\([^)]*\)), 0, "
    r"cuda_stream>>>\((?P<arguments>[^;]*)\);\n"
    r" *if \(::tvm_cuda_host_check\(cudaGetLastError\(\), true\) != 0\) return -1;"
)


@tirx.transform.prim_func_pass(opt_level=0, name="qknorm.AllowAliases")
def _allow_aliases(func: tirx.PrimFunc, _mod: tvm.IRModule, _ctx: object) -> tirx.PrimFunc:
    return func.without_attr("tirx.noalias")


def _cuda_pipeline() -> tuple[Any, Any, Any]:
    """Return TVM's own pipeline; then pointers of kernels may be to the same memory.

    TVM marks every kernel that it splits off as free of aliases, so that its pointers become
    ``__restrict__``, which calls in place contradict.
    """
    pipeline, finalize_host, finalize_device = get_tir_pipeline("s_tir")
    return tvm.transform.Sequential([pipeline, _allow_aliases]), finalize_host, finalize_device


def _lowered_pipeline() -> tuple[Any, Any, Any]:
    """Return a pipeline that leaves functions as they are: `lower.cpu` has lowered them."""

    def nothing() -> Any:
        return tvm.transform.Sequential([])

    return nothing(), nothing, nothing


register_tir_pipeline(_CUDA_PIPELINE, _cuda_pipeline)
register_tir_pipeline(_LOWERED_PIPELINE, _lowered_pipeline)


def llvm_module(lowered: tvm.IRModule, target: tvm.target.Target) -> Any:
    """Generate code for functions of `lower.cpu`; returns TVM's LLVM module."""
    return tvm.tirx.build(lowered, target, pipeline=_LOWERED_PIPELINE)


def cuda_host_source(
    module: tvm.IRModule, launch: Callable[[str], str], kernels: Collection[str]
) -> str:
    """Generate one CUDA source for kernels and host functions with tvm-ffi's calling convention.

    TVM's code generator for such sources refuses the attribute that asks for a dependent launch, so
    the launches in its text are replaced by ones that can ask for it.

    Parameters
    ----------
    module : IRModule
        Functions bound to a grid.
    launch : callable
        Returns the expression before the parameters ``(device, grid, block, stream, ...)`` that
        launches a kernel, given the function's name.
    kernels : collection of str
        The functions' names.

    Returns
    -------
    str
        CUDA C++ for every architecture from sm_80 on.
    """
    # This architecture only bounds what TVM may use. Its checks of arguments are the entry
    # point's already.
    target = tvm.target.Target({"kind": "cuda", "arch": "sm_80"}, host={"kind": "cuda_host"})
    with tvm.transform.PassContext(config={"tirx.disable_assert": True}):
        built = tvm.compile(module, target=target, tir_pipeline=_CUDA_PIPELINE)
    source = export_cuda_host(built.mod)
    launched: set[str] = set()

    def through(match: re.Match[str]) -> str:
        launched.add(match["name"])
        return (
            f"if (::tvm_cuda_host_check({launch(match['name'])}(cuda_device, {match['grid']}, "
            f"{match['block']}, cuda_stream, {match['arguments']})) != 0) return -1;"
        )

    source = _LAUNCH.sub(through, source)
    if launched != set(kernels) or "<<<" in source:
        raise AssertionError(f"expected launches of {sorted(kernels)} in TVM's source: {launched}")
    if "__restrict__" in source:
        raise AssertionError("expected no pointer without aliases in TVM's source")
    return source
