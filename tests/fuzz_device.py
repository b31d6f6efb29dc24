"""Random calls on a device's memory, each drawn from its number: exact, or refused with no effect.

All tensors of a case lie in one buffer on the device, full of other bytes, all of which are looked
at afterwards. In a process of its own, since what reads or writes elsewhere may end the device's
context; a case is made again by its number::

    python tests/fuzz_device.py DEVICE FIRST COUNT MODULE.so...

The device is torch's; with modules for CPUs it may be ``cpu``, which tests this file.
"""

from __future__ import annotations

import collections
import dataclasses
import faulthandler
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import fuzz_mistakes
import numpy as np
import pytest
from fuzz_cases import (
    REFUSED,
    Choices,
    Elsewhere,
    FromNumber,
    FuzzCase,
    Kind,
    Region,
    draw_case,
    draw_kind,
)
from fuzz_mistakes import Given, make_mistake
from support import from_torch, raw_call, to_torch

import qknorm_tvm
from qknorm_tvm import KernelSpec, Module, load
from qknorm_tvm.check import reference
from qknorm_tvm.check.expected import Graph
from qknorm_tvm.dtypes import ELEMENT_TYPES

_ROWS = (0, 1, 2, 3, 4, 5, 9, 17)
#: Elements of Q and K in the larger calls, which go to the kernels for many rows.
_MOST_ELEMENTS = 1_500_000
#: Columns of those where they are open, at most.
_FEW_COLUMNS = 130
#: Where columns are not fixed: whole chunks and vectors of them, and one beside.
_UNITS = (8, 64, 256, 1024)
#: What is counted.
DONE = ("exact", "refused", "many rows")
_REFUSED_BY_API = f"{REFUSED}|^q_out and k_out must be given for Elsewhere"


@dataclasses.dataclass
class Held:
    """A spec of a module, and the numbers of rows at which its kernels change."""

    module: Module
    spec: KernelSpec
    starts: tuple[int, ...]


def _held(module: Module) -> Iterator[Held]:
    code = [kernel for level in module.metadata["levels"] for kernel in level["code"]]
    for spec in module.specs:
        starts = {kernel.get("min_rows", 1) for kernel in code if kernel["spec"] == spec.text}
        if not spec.reproducible:  # on a GPU that is not torch's rsqrt
            yield Held(module, spec, tuple(sorted(starts - {1})))


@dataclasses.dataclass
class Placed:
    """A case's memory: the host's, and what was copied from it to the device."""

    memory: np.ndarray
    arrays: dict[str, np.ndarray]
    buffer: Any
    given: dict[str, Given]


@dataclasses.dataclass
class Call:
    """What a case comes to: a call, whether it is right, and what its refusal says."""

    function: Callable[[], Any]
    legal: bool
    refusal: str


class Fuzz:
    """Cases from numbers, and their calls, on one device.

    Parameters
    ----------
    modules : sequence of Module
        What cases call. The Python API is served from them too.
    device : str
        ``"cuda"``, or ``"cpu"``.
    """

    def __init__(self, modules: Sequence[Module], device: str):
        self.device, self.cuda = device, device != "cpu"
        self.where = (2, 0) if self.cuda else (1, 0)
        self.done = dict.fromkeys(DONE, 0)
        self._held: dict[str, list[Held]] = collections.defaultdict(list)
        for module in modules:
            qknorm_tvm.use(module)
            for held in _held(module):
                self._held[held.spec.op].append(held)
        self._graph = Graph(
            order="cuda" if self.cuda else "cpu",
            fused=modules[0].active_level != "x86-64-v2",
            torch_device=device,
        )

    # ---- what is called

    def _columns(self, choices: Choices) -> int:
        if choices.one_of([True, False], "whole units"):
            unit = choices.one_of(_UNITS, "unit")
            columns = unit * choices.integer(1, 2200 // unit, "units")
            return max(1, columns + choices.one_of([-1, 0, 0, 1], "beside"))
        return choices.integer(1, choices.one_of([9, 40, 140, 600, 2200, 9000], "most"), "columns")

    def _kind(self, choices: Choices) -> tuple[Module, Kind, int, bool]:
        """Draw what is called, the module that holds it, how many rows, and whether for those."""
        op = choices.one_of(list(self._held), "operation")
        held = choices.one_of(self._held[op], "spec")
        spec, rows = held.spec, choices.one_of(_ROWS, "rows")
        cols = sum(cols or _FEW_COLUMNS for cols in (spec.q_cols, spec.k_cols))
        starts = [start for start in held.starts if start * cols <= _MOST_ELEMENTS]
        many = bool(starts) and choices.integer(0, 9, "many rows") == 0
        if many:
            rows = choices.one_of(starts, "kernel") + choices.one_of([-1, 0, 1, 7], "beside")
            self.done["many rows"] += 1
        q_cols, k_cols = (
            cols or (choices.integer(1, _FEW_COLUMNS, "few") if many else self._columns(choices))
            for cols in (spec.q_cols, spec.k_cols)
        )
        kind = draw_kind(choices, spec.replace(q_cols=q_cols, k_cols=k_cols), rows)
        return held.module, kind, rows, many

    # ---- tensors

    def _place(self, case: FuzzCase) -> Placed:
        memory, arrays = case.fill()
        buffer = to_torch(memory.copy()).to(self.device)
        given = {}
        for name, array in arrays.items():
            low, high = case.regions[name].span()
            address = buffer.data_ptr() + case.regions[name].start
            given[name] = Given(array, address, high - low, self.where)
        return Placed(memory, arrays, buffer, given)

    def _tensor(self, placed: Placed, name: str, region: Region) -> Any:
        """Return torch's tensor of a region."""

        elements = placed.buffer.view(ELEMENT_TYPES[placed.arrays[name].dtype.name].torch)
        strides = [stride // region.item for stride in region.strides]
        return elements.as_strided(region.shape, strides, region.start // region.item)

    def _elsewhere(self, choices: Choices, given: Given) -> Any:
        """Return a tensor on a device that is not the call's."""
        kinds = [(2, 0), (10, 1)]
        if self.cuda:
            kinds = [(1, 0), (3, 0), (2, self.where[1] + 1), (10, 0), (13, 0), "numpy", "torch"]
        device = choices.one_of(kinds, "device")
        if isinstance(device, tuple):
            return Elsewhere(given.array, address=given.address, device=device)
        array = np.ascontiguousarray(given.array)
        return to_torch(array) if device == "torch" else array

    # ---- one case

    def run(self, number: int) -> None:
        """Make one case and check it."""
        choices = FromNumber(number)
        module, kind, rows, many = self._kind(choices)
        # Of many rows it is the kernels that matter.
        orderly = many and choices.integer(0, 3, "orderly") > 0
        by_api = choices.one_of([True, False], "by the API")
        missing: tuple[str, ...] = ()
        if by_api and choices.integer(0, 2, "missing") == 0:
            # Caches are always given, and K beside its cache if at all.
            some = kind.op.outputs[:1] if kind.op.has_cache else kind.op.outputs
            missing = choices.one_of([some, some[:1]], "which")
        case = draw_case(
            choices, kind, rows, by_element=self.cuda, orderly=orderly, missing=missing,
            wrong_indices=by_api or not self.cuda,
        )  # fmt: skip
        try:
            placed = self._place(case)
            if by_api:
                call = self._api_call(choices, case, placed)
            else:
                call = self._raw_call(choices, case, placed, module)
            self.check(case, placed, call)
        except BaseException as error:
            how = "the API" if by_api else module.path.name
            raise AssertionError(f"case {number} of {how}: {case}") from error

    def _api_call(self, choices: Choices, case: FuzzCase, placed: Placed) -> Call:
        op, legal, given = case.kind.op, case.is_legal(by_element=self.cuda), {}
        for name, tensor in placed.given.items():
            region = case.regions[name]
            if case.mistake == "device" and name == case.victim:
                given[name] = self._elsewhere(choices, tensor)
            elif region.is_plain() and choices.integer(0, 7, "torch's"):
                given[name] = self._tensor(placed, name, region)
            else:
                given[name] = Elsewhere(tensor.array, address=tensor.address, device=tensor.device)
        if case.mistake == "none":
            given[case.victim] = None
        missing = [name for name in case.kind.spec.outputs if name not in given]
        options = case.kind.api_arguments(given, case.epsilon)
        if missing and "out_dtype" in op.spec_fields:
            options["out_dtype"] = case.kind.spec.out_dtype
        if op.rotates:  # else a GPU does not look
            options["validate"] = self.cuda and case.mistake == "index"
        if missing and isinstance(given["q"], Elsewhere):
            legal = False  # no framework that could allocate them

        def function() -> dict[str, Any]:
            outputs = getattr(qknorm_tvm, op.name)(**options)
            by_name = dict(zip(op.outputs, outputs if op.normalises else (outputs,), strict=False))
            return {name: by_name[name] for name in missing}

        return Call(function, legal, _REFUSED_BY_API)

    def _raw_call(self, choices: Choices, case: FuzzCase, placed: Placed, module: Module) -> Call:
        op, legal, arguments = case.kind.op, case.is_legal(by_element=self.cuda), []
        for name in op.tensors:
            if name not in case.regions or (case.mistake == "none" and name == case.victim):
                arguments.append(None)
                continue
            region, tensor = case.regions[name], placed.given[name]
            if case.mistake == "device" and name == case.victim:
                arguments.append(self._elsewhere(choices, tensor))
            elif region.is_plain() and choices.one_of([True, False], "torch's"):
                arguments.append(self._tensor(placed, name, region))
            elif not tensor.array.size:  # nothing to read
                arguments.append(tensor.raw(address=choices.one_of([0, 64], "address")))
            else:
                ahead = choices.one_of([0, 0, 8, 1 << 39], "byte offset")
                arguments.append(tensor.raw(address=tensor.address - ahead, byte_offset=ahead))
        arguments += [case.epsilon] if op.has_epsilon else []
        if legal and case.rows > 1 and choices.integer(0, 2, "mistake") == 0:
            rng, legal = np.random.default_rng(case.seed), False
            case.mistake, case.victim, arguments = make_mistake(
                rng, case.kind, placed.given, arguments
            )

        def function() -> dict[str, Any]:
            raw_call(module, *arguments, op=op.name)
            return {}

        return Call(function, legal, fuzz_mistakes.REFUSED)

    def check(self, case: FuzzCase, placed: Placed, call: Call) -> None:
        """Make the call; look at what came of it, and at every byte of the buffer."""
        if not call.legal:
            with pytest.raises((TypeError, ValueError), match=call.refusal):
                call.function()
            assert (self.fetch(placed.buffer) == placed.memory).all(), "a refused call wrote"
            self.done["refused"] += 1
            return
        allocated = call.function()
        expected = case.kind.expected(placed.arrays, case.epsilon, self._graph)
        case.check_written(placed.memory, self.fetch(placed.buffer), expected)
        for name, out in allocated.items():
            wrong = reference.differing(self.fetch(out), expected[name])
            assert wrong == 0, f"{name}, which was allocated, differs in {wrong} elements"
        self.done["exact"] += 1

    def fetch(self, tensor: Any) -> np.ndarray:
        """Return a tensor in the host's memory, once all work on the device is done."""
        return from_torch(tensor.cpu())


# ---- in a process of its own -------------------------------------------------------------------


def main(device: str, first: str, count: str, *paths: str) -> None:
    """Run cases in this process; the number of each is printed before it begins."""
    faulthandler.enable()
    fuzz = Fuzz([load(path) for path in paths], device)
    for number in range(int(first), int(first) + int(count)):
        os.write(2, b"case %d\n" % number)
        fuzz.run(number)
    print(*fuzz.done.values())


def run_cases(device: str, first: int, count: int, paths: Sequence[Path]) -> dict[str, int]:
    """Run cases in a process of their own; return how many there were of each of `DONE`.

    Raises
    ------
    AssertionError
        One failed; the message says its number, and how to make it again.
    """
    files = [str(path) for path in paths]
    command = [sys.executable, __file__, device, str(first), str(count), *files]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120 + count, check=False)
    if done.returncode:
        begun = re.compile(r"^case (\d+)\n", re.MULTILINE)
        number = begun.findall(done.stderr)[-1:]
        again = " ".join(["python tests/fuzz_device.py", device, *number, "1", *files])
        raise AssertionError(
            f"status {done.returncode} at case {', '.join(number)}; to make it again: {again}\n"
            f"{begun.sub('', done.stderr)[-6000:]}"
        )
    return dict(zip(DONE, map(int, done.stdout.split()), strict=True))


if __name__ == "__main__":
    main(*sys.argv[1:])
