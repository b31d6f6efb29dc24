"""The table of operations: an entry of a new operation, and what derives from it."""

from __future__ import annotations

import dataclasses
import subprocess
from pathlib import Path

import pytest

from qknorm_tvm import KernelSpec, operations
from qknorm_tvm.build import native
from qknorm_tvm.operations import OPERATIONS, ROWS, TensorArgument

#: An operation that is not there: a number for each row.
BY_KIND = dataclasses.replace(
    OPERATIONS["qk_rms_norm"],
    name="qk_rms_norm_by_kind",
    arguments=(*OPERATIONS["qk_rms_norm"].arguments, TensorArgument("kinds", (ROWS,), "int64")),
    signature=("q", "k", "gamma_q", "gamma_k", "kinds"),
)


def test_what_derives_from_an_entry() -> None:
    assert BY_KIND.summary == ("8 arguments (q_out, k_out, gamma_q, gamma_k, q, k, kinds, epsilon)")
    assert BY_KIND.strided == ("q_out", "k_out", "q", "k")
    assert [tensor.name for tensor in BY_KIND.checked] == [
        "q", "k", "gamma_q", "gamma_k", "kinds", "q_out", "k_out",
    ]  # fmt: skip
    assert BY_KIND.shapes(5, 32, 16)["kinds"] == (5,)
    assert BY_KIND.dtypes("bfloat16", "float32")["kinds"] == "int64"


def test_the_entry_point_compiles_with_an_entry_more(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """A new operation that the C source must learn of, besides the table."""
    monkeypatch.setitem(OPERATIONS, BY_KIND.name, BY_KIND)
    monkeypatch.setattr(native, "OPS", tuple(OPERATIONS))
    monkeypatch.setattr(native, "TENSORS", (*operations.TENSORS, "kinds"))
    spec = KernelSpec(op="qk_rms_norm", q_cols=32, k_cols=16)
    object.__setattr__(spec, "op", BY_KIND.name)
    level = native.Level("x86-64-v2", (), ((native.Variant("any", "by_kind"),),))
    table = native.tables([spec], [level], {}, cuda=False)
    assert (
        "{KINDS, 1, {QKN_ROWS}, QKN_OWN_DTYPE, {kDLInt, 64, 1}, 0, 0, -1, 0, 0}" in table.operations
    )
    native.compile_entry(tmp_path, table, pool=False)
    symbols = subprocess.run(
        ["nm", str(tmp_path / "entry.o")], capture_output=True, text=True, check=True
    ).stdout
    assert " T __tvm_ffi_qk_rms_norm_by_kind" in symbols
    assert "__tvm_ffi_qk_rms_norm\n" not in symbols


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"signature": ("q", "k")}, "the signature is not its inputs"),
        ({"arguments": BY_KIND.arguments[::-1]}, "outputs come first"),
    ],
)
def test_an_entry_that_contradicts_itself(changes: dict, message: str) -> None:
    with pytest.raises(AssertionError, match=message):
        dataclasses.replace(BY_KIND, **changes)


def test_modules_of_the_same_operations_share_their_entry_point(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Seconds of gcc for each module, of a file that it does not change."""
    compiled = []
    run = native.run_compiler
    monkeypatch.setattr(
        native, "run_compiler", lambda *given: (compiled.append(given[1]), run(*given))
    )
    monkeypatch.setattr(native, "_shared_objects", {})
    for name, op, cols in (
        ("first", "qk_rms_norm", 16),
        ("other columns", "qk_rms_norm", 32),
        ("another operation", "apply_qk_rms_norm", 16),
    ):
        spec = KernelSpec(op=op, q_cols=cols, k_cols=cols)
        level = native.Level("x86-64-v2", (), ((native.Variant("any", "by_kind"),),))
        (tmp_path / name).mkdir()
        table = native.tables([spec], [level], {}, cuda=False)
        native.compile_entry(tmp_path / name, table, pool=True)
    assert compiled == [
        "compiling tables.c", "compiling entry.c", "compiling pool.c",
        "compiling tables.c",
        "compiling tables.c", "compiling entry.c",
    ]  # fmt: skip
