"""Random calls: bit-exact, or an error and nothing written.

Of every operation, and of two kinds. The public API, on NumPy arrays and torch tensors that lie
anyhow in one buffer, drawn by hypothesis. And the entry point of exported modules, on raw tensors
flush against pages that nobody may touch, in a process of its own for each CPU level, each case
drawn from its number: what reads or writes a byte too far is a crash, reported with that number.

``QKNORM_TVM_FUZZ_CASES=10000`` makes so many cases of the first kind and of the second for each
level, other ones in every run; by default there are some hundreds, always the same.
"""

from __future__ import annotations

import ctypes
import dataclasses
import faulthandler
import importlib.util
import itertools
import math
import mmap
import os
import secrets
import signal
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import fuzz_mistakes
import numpy as np
import pytest
import test_rope
from fuzz_cases import (
    EPSILONS,
    INDICES,
    REFUSED,
    SPECIAL,
    SPECIAL_INPUTS,
    Elsewhere,
    FromNumber,
    Kind,
    cache_strides,
    draw_case,
    draw_kind,
    draw_rotating,
    fill_indices,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from support import (
    DISABLE_FOR_LEVEL,
    DTYPES,
    FIXED_COLUMNS,
    LEVELS,
    OWN,
    PAIRINGS,
    RawTensor,
    compiled,
    needs_level,
    open_columns,
    random_values,
    raw_call,
    run_python,
    smallest,
    statistics_and_fused,
    to_torch,
)

import qknorm_tvm
from qknorm_tvm import KernelSpec, Module, load
from qknorm_tvm.check import reference
from qknorm_tvm.check.expected import Graph
from qknorm_tvm.dtypes import ELEMENT_TYPES
from qknorm_tvm.operations import OPERATIONS, TENSORS
from qknorm_tvm.targets import host_features

_GIVEN = os.environ.get("QKNORM_TVM_FUZZ_CASES")
_CASES = int(_GIVEN or 400)
#: Of the first kind, which hypothesis draws in as long as all the rest takes.
_API_CASES = int(_GIVEN or 150)

#: Few pairs of columns and dtypes: each is a module to compile.
KINDS = (
    ("bfloat16", "bfloat16", 33, 5),
    ("float16", "float32", 7, 16),
    ("float32", "bfloat16", 16, 33),
)
#: Of `KINDS`, the input that is rounded before gamma in half of the calls.
_CASTS = "bfloat16"
#: Operations that neither rotate nor store.
_PLAIN = [op for op in OPERATIONS.values() if not op.rotates]
#: What rotates: `test_rope`'s, which it compiles too; others where there is time.
_ROTATING = test_rope.SPECS
if _GIVEN:
    _ROTATING = tuple(draw_rotating(FromNumber(secrets.randbelow(1 << 40)), OWN) for _ in range(8))
#: Whether squares are added by a fused multiply-add in what the API compiles here.
_HOST_FUSES = "fma" in host_features()
_GRAPH = Graph(fused=_HOST_FUSES)
#: Half of the calls pass torch tensors where it is installed.
_HAS_TORCH = importlib.util.find_spec("torch") is not None


class _FromHypothesis:
    """Choices that hypothesis makes, and makes simpler where a test fails."""

    def __init__(self, data: st.DataObject):
        self._data = data

    def one_of(self, options: Any, label: str) -> Any:
        return self._data.draw(st.sampled_from(options), label)

    def integer(self, low: int, high: int, label: str) -> int:
        return self._data.draw(st.integers(low, high), label)


@pytest.mark.slow
@settings(max_examples=_API_CASES, derandomize=_GIVEN is None)
@given(data=st.data())
def test_exact_or_refused(data: st.DataObject) -> None:
    """Any layout in one buffer: a wrong bit, a byte written beside an output, or by a refusal."""
    choices = _FromHypothesis(data)
    rows = choices.one_of([0, 1, 2, 3, 4, 5, 9], "rows")
    kind = draw_kind(choices, _draw_spec(choices), rows)
    case = draw_case(choices, kind, rows, wrong_indices=True)
    memory, arrays = case.fill()
    before = memory.copy()
    arguments: dict[str, Any] = dict(arrays)
    plain = all(region.is_plain() for region in case.regions.values())
    use_torch = _HAS_TORCH and plain and choices.one_of([False, True], "torch")
    if use_torch:
        arguments = {name: to_torch(array) for name, array in arrays.items()}
    if case.mistake == "device":
        device = choices.one_of([(2, 0), (10, 1), (8, 0), (13, 0)], "device")
        arguments[case.victim] = Elsewhere(arrays[case.victim], device=device)
    elif case.mistake == "none":
        arguments[case.victim] = None
    call = getattr(qknorm_tvm, kind.op.name)
    given = kind.api_arguments(arguments, case.epsilon)

    if not case.is_legal():
        with pytest.raises((TypeError, ValueError), match=REFUSED):
            call(**given)
        assert (memory == before).all(), "a refused call wrote"
        return
    expected = kind.expected(arrays, case.epsilon, _GRAPH)
    outputs = call(**given)
    for got in outputs if kind.op.normalises else (outputs,):
        assert any(got is argument for argument in (*arguments.values(), None))
    case.check_written(before, memory, expected)


def _draw_spec(choices: _FromHypothesis) -> KernelSpec:
    if choices.one_of([False, True], "rotates"):
        return choices.one_of(_ROTATING, "spec")
    op = choices.one_of(_PLAIN, "operation")
    kinds = KINDS if _GIVEN else KINDS[::2]
    in_dtype, out_dtype, q_cols, k_cols = choices.one_of(kinds, "kind")
    cast = op.normalises and in_dtype == _CASTS and choices.one_of([False, True], "cast")
    return KernelSpec(
        op=op.name,
        in_dtype=in_dtype,
        out_dtype=out_dtype if op.normalises else "float32",
        q_cols=q_cols,
        k_cols=k_cols,
        cast_before_gamma=cast,
        target=OWN,
    )


# ---- the entry point, between pages that nobody may touch --------------------------------------

_PAGE = mmap.PAGESIZE
_NONE, _READ, _WRITE = 0, mmap.PROT_READ, mmap.PROT_READ | mmap.PROT_WRITE
_CANARY = 0xA5
#: Bytes of an arena; the larger one takes calls that store past the caches.
_SMALL, _LARGE = 1 << 21, 20 << 20


class Arena:
    """Memory between two pages that nobody may read or write."""

    def __init__(self, size: int):
        self._map = mmap.mmap(-1, size + 2 * _PAGE)
        self.size = size
        self.memory = np.frombuffer(self._map, np.uint8, size, _PAGE)
        self.start = self.memory.ctypes.data
        self._protect = ctypes.CDLL(None, use_errno=True).mprotect
        self._protect.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
        self._set(self.start - _PAGE, _PAGE, _NONE)
        self._set(self.start + size, _PAGE, _NONE)

    def _set(self, address: int, size: int, access: int) -> None:
        if self._protect(address, size, access):
            raise OSError(ctypes.get_errno(), "mprotect failed")

    def allow(self, access: int) -> None:
        self._set(self.start, self.size, access)


@dataclasses.dataclass
class Placed:
    """One argument in its arena."""

    arena: Arena
    array: np.ndarray
    start: int
    extent: int

    def window(self) -> slice:
        """Return the bytes around it that are painted before a call and looked at after it."""
        return slice(max(0, self.start - 4096), self.start + self.extent + 4096)


class Guarded:
    """Cases from numbers, and their calls."""

    def __init__(self, modules: dict[str, Module]):
        self.modules = modules
        self._dtypes = [dtype for dtype in DTYPES if dtype in modules]
        self._rotating = modules["rotating"].specs if "rotating" in modules else ()
        self.small = {name: Arena(_SMALL) for name in TENSORS}
        self.large: dict[str, Arena] = {}
        rng = np.random.default_rng(0)
        self._pool = {kind: random_values(rng, (1 << 18,), kind) for kind in DTYPES}
        # In a sum of squares one value of any bits hides the others.
        self._plain = {
            kind: rng.standard_normal(1 << 18, np.float32).astype(reference.NUMPY_DTYPES[kind])
            for kind in DTYPES
        }
        self.done = {"exact": 0, "refused": 0, "streamed": 0}

    def _values(
        self, rng: np.random.Generator, shape: tuple[int, ...], pool: np.ndarray
    ) -> np.ndarray:
        size = math.prod(shape)
        first = int(rng.integers(0, len(pool)))
        return np.resize(np.roll(pool, -first)[: max(size, 1)], size).reshape(shape)

    def _place(
        self,
        rng: np.random.Generator,
        arena: Arena,
        shape: tuple[int, ...],
        kind: str,
        strides: tuple[int, ...],
    ) -> Placed:
        dtype = ELEMENT_TYPES[kind].numpy
        steps = (s * (n - 1) for s, n in zip(strides, shape, strict=True))
        extent = (sum(steps) + 1) * dtype.itemsize if math.prod(shape) else 0
        shift = int(rng.choice([0, 0, 0, 0, 0, 1, 2, 4, 16, 100]))
        at_end = rng.random() < 0.6
        start = arena.size - extent - shift if at_end else shift
        placed = Placed(arena, np.empty(0), start, extent)
        arena.memory[placed.window()] = _CANARY
        byte_strides = tuple(s * dtype.itemsize for s in strides)
        if extent:
            placed.array = np.ndarray(shape, dtype, arena.memory, start, byte_strides)
        else:
            placed.array = np.empty(shape, dtype)
        return placed

    def _columns(self, rng: np.random.Generator) -> int:
        """Draw a number of columns: many small ones, and those around a block's and a lane's."""
        which = rng.random()
        if which < 0.25:
            unit = int(rng.choice([64, 64, 1024]))
            return unit * int(rng.integers(1, 2200 // unit + 1)) + int(rng.integers(-1, 2))
        return int(rng.integers(1, int(rng.choice([9, 40, 40, 140, 140, 600, 2201]))))

    def _spec(self, rng: np.random.Generator) -> tuple[KernelSpec, str]:
        """Draw what is called, and the module that holds it."""
        if self._rotating and rng.random() < 0.4:
            return self._rotating[int(rng.integers(len(self._rotating)))], "rotating"
        op = _PLAIN[int(rng.integers(len(_PLAIN)))]
        which = rng.random()
        columns = self._columns(rng), self._columns(rng)

        def spec(
            in_dtype: str, out_dtype: str | None, q_cols: int, k_cols: int, cast: bool = False
        ) -> KernelSpec:
            return KernelSpec(
                op=op.name, in_dtype=in_dtype, out_dtype=out_dtype,  # type: ignore[arg-type]
                q_cols=q_cols, k_cols=k_cols, cast_before_gamma=cast,
            )  # fmt: skip

        if op.name == "apply_qk_rms_norm":
            if which < 0.15:
                return spec("float32", "float32", 33, 7), "smallest"
            if which < 0.25:
                return spec("bfloat16", "bfloat16", 1536, 256), "large"
            if which < 0.4 and "mixed" in self.modules:
                columns = (33, 7) if which < 0.3 else columns
                return spec("bfloat16", "bfloat16", *columns, True), "mixed"
            in_dtype, out_dtype = PAIRINGS[int(rng.integers(len(PAIRINGS)))]
            return spec(in_dtype, out_dtype, *columns), "open"
        if which < 0.2:
            columns = FIXED_COLUMNS[int(rng.integers(len(FIXED_COLUMNS)))]
        elif which > 0.7 and op.normalises and "mixed" in self.modules:
            cast = rng.random() < 0.5
            return spec("bfloat16", "bfloat16" if cast else "float32", *columns, cast), "mixed"
        dtype = self._dtypes[int(rng.integers(len(self._dtypes)))]
        return spec(dtype, None, *columns), dtype

    def _fill(self, rng: np.random.Generator, kind: Kind, placed: dict[str, Placed]) -> None:
        dtypes, given = kind.dtypes(), "qk_var" in kind.tensors and kind.op.normalises
        plain = not given and rng.random() < 0.7
        specials = plain and rng.random() < 0.3
        for name in kind.tensors:
            array = placed[name].array
            if name in kind.op.outputs:
                continue  # caches hold canaries
            if name in INDICES:
                fill_indices(rng, name, array, kind)
                continue
            pool = (self._plain if plain else self._pool)[dtypes[name]]
            array[...] = self._values(rng, array.shape, pool)
            if name in SPECIAL:
                wild = rng.random(array.shape) < 0.1
                with np.errstate(over="ignore"):
                    values = rng.choice(SPECIAL[name], int(wild.sum())).astype(array.dtype)
                array[wild] = values
            elif specials and array.size:
                for row in rng.integers(0, len(array), 3):
                    value = rng.choice(SPECIAL_INPUTS)
                    with np.errstate(over="ignore"):
                        array[row, rng.integers(array.shape[1])] = value.astype(array.dtype)
                if rng.random() < 0.3:
                    array[rng.integers(len(array))] = 0

    def _strides(
        self,
        rng: np.random.Generator,
        name: str,
        kind: Kind,
        shape: tuple[int, ...],
        *,
        packed: bool,
    ) -> tuple[int, ...]:
        """Draw the strides of a tensor, in elements."""
        if len(shape) == 4:
            return cache_strides(FromNumber(rng), shape)[0]
        stride = shape[-1] + (0 if packed else int(rng.choice([0, 0, 1, rng.integers(1, 70)])))
        if name not in kind.op.outputs and rng.random() < 0.1:
            stride = int(rng.integers(0, shape[-1] + 1))  # rows of an input may overlap
        return (stride, 1)[-len(shape) :]

    def run(self, number: int) -> None:
        """Make one case and check it."""
        rng = np.random.default_rng(number)
        spec, name = self._spec(rng)
        module, op = self.modules[name], spec.operation
        q_cols, k_cols = spec.q_cols or 1, spec.k_cols or 1
        refused = rng.random() < 0.35
        rows = int(rng.choice([1, 2, 3, 4, 7, 8, 9, 16, 17, 30]))
        arenas = self.small
        if not refused:
            special = rng.random()
            if special < 0.04:
                rows = 0
            elif special < 0.14:  # enough for several threads
                rows = 500_000 // (4 * (q_cols + k_cols + 2 * 70)) + 1
            elif special < 0.15 and op.normalises and not op.rotates:  # past the caches
                items = [spec.out_bytes, spec.in_bytes]
                many = (17 << 20) // (items[0] * (q_cols + k_cols)) + 1
                if many * max(items) * max(q_cols, k_cols) < _LARGE - _PAGE and many <= 100_000:
                    rows = many
                    arenas = self.large = self.large or {name: Arena(_LARGE) for name in TENSORS}
                    self.done["streamed"] += 1
        rows = max(rows, 2) if refused else rows
        kind = draw_kind(FromNumber(rng), spec, rows)
        shapes, dtypes = kind.shapes(rows), kind.dtypes()
        placed: dict[str, Placed] = {}
        for name in kind.tensors:
            packed = arenas is not self.small
            strides = self._strides(rng, name, kind, shapes[name], packed=packed)
            placed[name] = self._place(rng, arenas[name], shapes[name], dtypes[name], strides)
        for own in ("q", "k"):
            same = spec.in_dtype == spec.out_dtype and f"{own}_out" in placed
            if same and rng.random() < 0.12:
                placed[own] = placed[f"{own}_out"]
        self._fill(rng, kind, placed)
        epsilon = EPSILONS[int(rng.integers(len(EPSILONS) - 1))]
        if rng.random() < 0.05:
            module.library.get_function("qknorm_set_num_threads")(int(rng.integers(0, 5)))
        arguments: dict[str, Any] = {}
        for name, tensor in placed.items():
            extra: dict[str, Any] = {}
            if not tensor.extent:  # nothing to read: whoever looks reads the guard page
                extra["address"] = tensor.arena.start - _PAGE + 64
            elif rng.random() < 0.1:
                extra["byte_offset"] = int(rng.integers(1, 1 << 40))
            arguments[name] = RawTensor(tensor.array, **extra)
        values = [*map(arguments.get, op.tensors), *([epsilon] if op.has_epsilon else [])]
        if refused:
            self._check_refused(rng, kind, module, placed, values)
        else:
            self._check_exact(kind, module, placed, values, epsilon)
        for arena in arenas.values():
            arena.allow(_WRITE)

    def _check_exact(
        self,
        kind: Kind,
        module: Module,
        placed: dict[str, Placed],
        arguments: list[Any],
        epsilon: float,
    ) -> None:
        op = kind.op
        graph = Graph(fused=module.active_level != "x86-64-v2")
        expected = kind.expected(
            {name: tensor.array for name, tensor in placed.items()}, epsilon, graph
        )
        for name in kind.tensors:
            if name not in op.outputs and placed[name] is not placed.get(f"{name}_out"):
                placed[name].arena.allow(_READ)
        raw_call(module, *arguments, op=op.name)
        for name, wanted in expected.items():
            output = placed[name]
            wrong = reference.differing(output.array, wanted) if wanted.size else 0
            assert wrong == 0, f"{kind}: {name} differs in {wrong} of {wanted.size} elements"
            output.array.view(f"u{output.array.itemsize}")[...] = int.from_bytes(
                bytes([_CANARY]) * output.array.itemsize, "little"
            )
            beside = int((output.arena.memory[output.window()] != _CANARY).sum())
            assert beside == 0, f"{kind}: {beside} bytes beside {name} were written"
        self.done["exact"] += 1

    def _check_refused(
        self,
        rng: np.random.Generator,
        kind: Kind,
        module: Module,
        placed: dict[str, Placed],
        arguments: list[Any],
    ) -> None:
        given = {
            name: fuzz_mistakes.Given(tensor.array, tensor.array.ctypes.data, tensor.extent)
            for name, tensor in placed.items()
        }
        mistake, victim, arguments = fuzz_mistakes.make_mistake(rng, kind, given, arguments)
        for name, tensor in placed.items():
            # Numbers are looked at once all else is right.
            tensor.arena.allow(_READ if mistake == "index" and name in INDICES else _NONE)
        try:
            with pytest.raises((TypeError, ValueError), match=fuzz_mistakes.REFUSED):
                raw_call(module, *arguments, op=kind.op.name)
        except BaseException as error:
            raise AssertionError(
                f"{kind}: wrong {mistake} of {victim or 'the call'} is not refused"
            ) from error
        self.done["refused"] += 1


def _paths(target: str, dtypes: Sequence[str], *, mixed: bool) -> dict[str, Path]:
    """Compile the modules; all but two are other test files' too.

    A dtype's are those of its statistics and fused operation.
    """
    large = KernelSpec(in_dtype="bfloat16", q_cols=1536, k_cols=256, target=target)
    paths = {
        "open": open_columns(target),
        "smallest": smallest(),
        "large": compiled(f"large-{target}", large),
        **{dtype: statistics_and_fused(dtype, target) for dtype in dtypes},
    }
    if mixed:
        paths["mixed"] = _mixed(target)
    paths["rotating"] = rotating(target, count=4)
    return paths


def rotating(target: str, count: int) -> Path:
    """Compile operations that rotate, always the same; others where cases are."""
    first = 0 if _GIVEN is None else secrets.randbelow(1 << 40)
    specs = [draw_rotating(FromNumber(first + number), target) for number in range(count)]
    return compiled(f"rotating-{first}-{target}", *dict.fromkeys(specs))


def _mixed(target: str) -> Path:
    """Compile other outputs, and inputs rounded before gamma."""
    cast = KernelSpec(cast_before_gamma=True, target=target)
    fused = cast.replace(op="qk_rms_norm")
    specs = [fused.replace(cast_before_gamma=False, out_dtype="float32"), fused]
    specs += [cast.replace(q_cols=33, k_cols=7), cast]
    return compiled(f"mixed-{target}", *specs)


def run_guarded(progress: str, first: str, count: str, *paths: str) -> None:
    """Run cases in this process; each one's number is in the file `progress` before it begins.

    `paths` are names of modules, each before its file.
    """
    faulthandler.enable()
    modules = {name: load(path) for name, path in zip(paths[::2], paths[1::2], strict=True)}
    guarded = Guarded(modules)
    note = os.open(progress, os.O_WRONLY | os.O_CREAT, 0o600)
    for number in range(int(first), int(first) + int(count)):
        os.pwrite(note, b"%20d" % number, 0)
        guarded.run(number)
    print(modules["open"].active_level, *guarded.done.values())


@pytest.mark.slow
@pytest.mark.parametrize(
    ("target", "level"),
    # A file of this CPU's level alone has the same code as the portable one.
    [*(("cpu", level) for level in LEVELS), *([(OWN, OWN)] if _GIVEN or OWN not in LEVELS else [])],
)
def test_exact_or_refused_between_guard_pages(target: str, level: str, tmp_path: Path) -> None:
    """A byte read or written before or after a tensor; an input written; a refusal that looks."""
    portable = target == "cpu"
    if portable:
        needs_level(level)
    # What takes longest to compile is tested in the portable files alone, every type by campaigns.
    dtypes = DTYPES if portable and _GIVEN else ("bfloat16", "float32")
    paths = _paths(target, dtypes, mixed=portable)
    progress = tmp_path / "case"
    first = 0 if _GIVEN is None else secrets.randbelow(1 << 40)
    done = run_python(
        "import sys, test_fuzz; test_fuzz.run_guarded(*sys.argv[1:])",
        str(progress),
        str(first),
        str(_CASES),
        *map(str, itertools.chain.from_iterable(paths.items())),
        env={"QKNORM_TVM_DISABLE_CPU_FEATURES": DISABLE_FOR_LEVEL.get(level, "")},
        check=False,
        timeout=60 + _CASES,
    )
    number = int(progress.read_text()) if progress.exists() else None
    assert done.returncode == 0, (
        f"case {number} ended with status {done.returncode}\n{done.stderr[-6000:]}"
    )
    ran, exact, refused, streamed = done.stdout.split()
    assert ran == level
    assert int(exact) + int(refused) == _CASES
    assert min(int(exact), int(refused)) > _CASES // 5
    print(f"from case {first}: {exact} exact ({streamed} past the caches), {refused} refused")


@pytest.mark.parametrize("edge", ["after", "before"])
def test_guard_pages_are_there(edge: str) -> None:
    """A byte too far that goes unnoticed: then the test above says nothing."""
    done = run_python(
        """
        import sys
        import numpy as np
        from support import Case, RawTensor, raw_call
        from test_fuzz import Arena
        from qknorm_tvm import load
        edge = sys.argv[2]
        arena = Arena(1 << 16)
        size = 4 * 33 * 4
        start = arena.size - size + 1 if edge == "after" else -1
        f4 = [np.ones(s, np.float32) for s in ((4, 7), 33, 7, (4, 2), (4, 33), (4, 7))]
        q_out = RawTensor(np.empty((4, 33), np.float32), address=arena.start + start)
        raw_call(load(sys.argv[1]), q_out, *f4, 1e-6)
        """,
        str(smallest()),
        edge,
        check=False,
    )
    assert done.returncode == -signal.SIGSEGV, (done.returncode, done.stderr)
