"""`verify` of the operations that rotate: its cases, and mistakes that it must find."""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
import pytest
from support import OWN

from qknorm_tvm import KernelSpec, Module, compile
from qknorm_tvm.check import cases, layouts, verification
from qknorm_tvm.check.calls import operation_arguments
from qknorm_tvm.operations import OPERATIONS

NORM = KernelSpec(
    op="qk_rms_norm_rope", q_cols=96, k_cols=32, head_dim=32, rotary_dim=16, target=OWN
)
#: Float8, a V, and no k_out beside a K that is in place.
STORE = NORM.replace(
    op="qk_rms_norm_rope_cache", cache_dtype="float8_e4m3fn", q_cols=64, k_cols=64,
    interleaved=True, statistics="local",
)  # fmt: skip
CPU = verification.Cpu([1])


@functools.lru_cache(maxsize=1)
def module() -> Module:
    return compile([NORM, STORE]).module


def shape_case(spec: KernelSpec, rows: int = 17) -> cases.Case:
    assert spec.q_cols is not None
    assert spec.k_cols is not None
    return cases.shape_case(spec, rows, spec.q_cols, spec.k_cols)


@pytest.mark.slow
@pytest.mark.parametrize("spec", [NORM, STORE], ids=["rope", "cache"])
def test_every_case_is_exact(spec: KernelSpec) -> None:
    report = verification.Report()
    groups = set()
    for case in cases.cases_for(spec):
        groups.add(case.group)
        verification.run_case(module(), case, CPU, report)
    assert report.exact, report.first_difference
    assert groups == {f"{spec.op}: every bfloat16 pattern", f"{spec.op}: shapes and layouts"}
    assert report.groups[f"{spec.op}: shapes and layouts"].checks == 4 * len(layouts.LAYOUTS)


class Corrupting:
    """A module that changes an argument after each call."""

    def __init__(self, name: str) -> None:
        self.name, self.library, self.metadata = name, module().library, module().metadata
        self.active_level = module().active_level
        self.view: Any = None

    def __getattr__(self, op: str) -> Any:
        if op not in OPERATIONS:
            raise AttributeError(op)

        def call(*arguments: Any) -> None:
            getattr(module(), op)(*arguments)
            tensor = arguments[OPERATIONS[op].names.index(self.name)]
            array = np.from_dlpack(tensor)
            array.view(np.uint8).flat[-1] ^= 1

        return call


@pytest.mark.parametrize("name", ["q_out", "k_out"])
def test_a_wrong_element_is_found_with_its_position(name: str) -> None:
    report = verification.Report()
    verification.run_case(Corrupting(name), shape_case(NORM), CPU, report)  # type: ignore[arg-type]
    assert f"{name}[16, " in str(report.first_difference)
    assert ", at position " in str(report.first_difference)


@pytest.mark.parametrize("name", ["positions", "slot_mapping", "v", "cos_sin_cache"])
def test_a_write_to_an_input_is_found(name: str) -> None:
    report = verification.Report()
    case = shape_case(STORE)
    verification.run_case(Corrupting(name), case, CPU, report)  # type: ignore[arg-type]
    assert report.groups[case.group].stray_writes == len(case.layouts)


@pytest.mark.parametrize("layout", layouts.LAYOUTS)
def test_a_write_to_a_slot_that_no_row_has_is_found(layout: str) -> None:
    """What a cache holds elsewhere belongs to other requests."""
    inputs = shape_case(STORE).make()
    (expected,) = (
        value
        for name, value in zip(
            STORE.outputs, verification.expected_outputs(module(), STORE, inputs), strict=True
        )
        if name == "v_cache"
    )
    slots = inputs.extra["slot_mapping"]
    blocks, block_size = expected.shape[:2]
    stored = slots[slots >= 0]
    assert 0 < len(stored) < len(slots) < inputs.rows
    other = np.setdiff1d(np.arange(blocks * block_size), stored)
    before = inputs.extra["v_cache"]
    for slot in other:
        place = np.divmod(slot, block_size)
        assert expected[place].tobytes() == before[place].tobytes()
    placed = layouts.Placed(STORE, inputs, layout)
    getattr(module(), STORE.op)(*operation_arguments(STORE.op, placed.arrays, inputs.epsilon))
    assert placed.guards_intact()
    k_cache, v_cache = placed.arrays["k_cache"], placed.arrays["v_cache"]
    assert v_cache.tobytes() == expected.tobytes()
    assert k_cache.strides == v_cache.strides
    assert (k_cache.strides[1] < k_cache.strides[2]) == layout.endswith("strided")


def test_guards_beside_caches_are_looked_at() -> None:
    """The element between blocks whose heads come before slots."""
    placed = layouts.Placed(STORE, shape_case(STORE).make(), "strided")
    cache = placed.arrays["k_cache"]
    head_and_guard = np.lib.stride_tricks.as_strided(
        cache.view(np.uint8)[0, -1, -1], (STORE.head_dim + 1,), (1,)
    )
    assert placed.guards_intact()
    head_and_guard[-1] ^= 1
    assert not placed.guards_intact()


def test_every_choice_is_in_a_default_spec() -> None:
    """A choice of an operation that `verify` never makes."""
    specs = [spec for module in verification.default_specs(OWN) for spec in module]
    assert {spec.op for spec in specs} == set(OPERATIONS)
    rotating = [spec for spec in specs if spec.operation.rotates]
    for field in OPERATIONS[STORE.op].spec_fields:
        assert len({getattr(spec, field) for spec in rotating}) > 1, field
