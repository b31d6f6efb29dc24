"""Which CUDA kernels a spec gets, whatever its operation: the heuristics' choices, or changed."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from . import cuda_row_config
from .cuda_config import CudaConfig, CudaVariant, apply_variants, reachable

if TYPE_CHECKING:
    from qknorm_tvm.spec import KernelSpec


def fields_used(spec: KernelSpec) -> tuple[str, ...]:
    """Return the fields that make a difference to a spec's code."""
    unused: tuple[str, ...] = ()
    if spec.op != "apply_qk_rms_norm":
        unused = ("threads", "grid_order")  # the order of summation fixes them
        if spec.has_given_statistics:  # nothing is added up over a row, which blocks may share
            unused = ("grid_order",)
    if not spec.operation.normalises:
        unused += ("streaming_stores",)
    return tuple(field.name for field in dataclasses.fields(CudaConfig) if field.name not in unused)


def changed_variants(spec: KernelSpec, changes: Mapping[str, Any]) -> list[CudaVariant]:
    """Return the heuristic's kernels with some fields changed in each.

    A changed `vector` is for the kernels for aligned rows; of 1 it leaves only those for any
    layout.

    Parameters
    ----------
    spec : KernelSpec
        What is compiled.
    changes : mapping
        Values by field of `CudaConfig`.

    Raises
    ------
    ValueError
        A value is out of range, or the columns are no multiple of the vector.
    """
    vector = changes.get("vector")
    variants = default_variants(spec)
    aligned = [variant for variant in variants if variant.alignment is not None]
    general = [variant for variant in variants if variant.alignment is None]
    if vector == 1:
        aligned = []
    elif vector is not None:
        # Refuses columns that are no multiple.
        given = default_variants(spec, CudaConfig(vector=vector))[0]
        aligned = [
            dataclasses.replace(variant, stride_unit=given.stride_unit)
            for variant in aligned or [given]
        ]
    others = {name: value for name, value in changes.items() if name != "vector"}
    return reachable(
        [
            *(_changed(variant, changes) for variant in aligned),
            *(_changed(variant, others) for variant in general),
        ]
    )


def _changed(variant: CudaVariant, changes: Mapping[str, Any]) -> CudaVariant:
    return dataclasses.replace(variant, config=dataclasses.replace(variant.config, **changes))


def default_variants(spec: KernelSpec, config: CudaConfig | None = None) -> list[CudaVariant]:
    """Choose the kernels for a spec, in the order in which the entry point tries them.

    Parameters
    ----------
    spec : KernelSpec
        What is compiled.
    config : CudaConfig, optional
        Used for every number of rows instead of the heuristic's: with the alignment that its
        vectors need, where the columns allow them, else for any layout. What is left over is the
        heuristic's.

    Returns
    -------
    list of CudaVariant
        The last of them takes any number of rows and any layout.

    Raises
    ------
    ValueError
        `config` needs columns that are a multiple of its vector.
    """
    if spec.op == "apply_qk_rms_norm":
        return apply_variants(spec, config)
    return cuda_row_config.row_variants(spec, config)
