"""The declaration: names that schedules rely on, the order of operations, int64 extents."""

from __future__ import annotations

import inspect
import re
from typing import Any

import pytest
from support import PAIRINGS

from qknorm_tvm import KernelSpec
from qknorm_tvm.build.cuda import scheduled_variant
from qknorm_tvm.declare.norm import declare
from qknorm_tvm.schedules.cuda_variants import default_variants
from qknorm_tvm.spec import OPS

BLOCKS = ("rs", "x32", "scaled", "weighted")


def _script(spec: KernelSpec, **promises: int) -> str:
    return declare(spec, **promises).script()


@pytest.mark.parametrize("columns", [(1536, 256), (None, None), (1, 257)])
def test_blocks_have_the_names_that_schedules_fetch(columns: tuple[int | None, int | None]) -> None:
    script = _script(KernelSpec(q_cols=columns[0], k_cols=columns[1]))
    found = re.findall(r"T\.sblock\(\"(\w+)\"\)", script)
    expected = ["root", *(f"{name}_q" for name in BLOCKS), "q_out"]
    expected += [f"{name}_k" for name in BLOCKS] + ["k_out"]
    assert found == expected


def _statement(script: str, block: str) -> str:
    """Return the one assignment of a block, without spaces and indices."""
    body = script.split(f'T.sblock("{block}")')[1].split("T.sblock(")[0]
    (line,) = re.findall(r"^ +(\w+\[.*\] = .*)$", body, re.MULTILINE)
    return re.sub(r"\[[^\]]*\]|\s", "", line)


@pytest.mark.parametrize(("in_dtype", "out_dtype"), PAIRINGS)
def test_order_of_operations_is_the_contract(in_dtype: str, out_dtype: str) -> None:
    """gamma times rs first, a cast before the product, an intermediate in 16 bits."""
    script = _script(KernelSpec(in_dtype=in_dtype, out_dtype=out_dtype))
    for tag, suffix in (("q", ""), ("k", "_1")):
        rs, x32, scaled, weighted = (name + suffix for name in BLOCKS)
        assert _statement(script, f"rs_{tag}") == f"{rs}=T.rsqrt(qk_var+epsilon)"
        assert _statement(script, f"x32_{tag}") == f'{x32}=T.Cast("float32",{tag})'
        assert _statement(script, f"scaled_{tag}") == f"{scaled}={x32}*{rs}"
        assert _statement(script, f"weighted_{tag}") == f"{weighted}={scaled}*gamma_{tag}"
        assert _statement(script, f"{tag}_out") == f'{tag}_out=T.Cast("{out_dtype}",{weighted})'


def test_every_intermediate_is_float32() -> None:
    script = _script(KernelSpec(in_dtype="float16", out_dtype="bfloat16"))
    allocated = re.findall(r"T\.sblock_alloc_buffer\((.*)\)", script)
    assert len(allocated) == 8
    # float32 is what TVM's printer leaves out, or says.
    assert not any(
        kind in line for line in allocated for kind in ("float16", "bfloat16", "float64")
    )


def test_reproducible_writes_the_division_out() -> None:
    """rsqrt of the target where 1 / sqrt was asked for."""
    script = _script(KernelSpec(reproducible=True))
    assert "T.rsqrt" not in script
    assert script.count("= T.float32(1.0) / T.sqrt(qk_var[") == 2


@pytest.mark.parametrize("columns", [(1536, 256), (None, None)])
def test_extents_and_strides_are_int64(columns: tuple[int | None, int | None]) -> None:
    """32-bit indices overflow at M * Nq = 2**31."""
    func = declare(KernelSpec(q_cols=columns[0], k_cols=columns[1]), row_tile=4, stride_unit=8)
    for buffer in func.params[:7]:
        for extent in (*buffer.shape, *buffer.strides):
            assert str(extent.ty.dtype) == "int64", buffer


def test_parameters_are_those_of_the_operation_and_the_entry_point() -> None:
    """An order other than the definition's: arguments would be mixed up silently."""
    for spec in (KernelSpec(), *(KernelSpec(op=op, q_cols=8, k_cols=8) for op in OPS)):
        func, operation = declare(spec), spec.operation
        epsilon = ["epsilon"] if operation.has_epsilon else []
        names = [*operation.tensors, *epsilon, *operation.internal_scalars]
        assert [p.name for p in func.params] == names
        assert str(func.attrs["global_symbol"]) == operation.name


@pytest.mark.parametrize(("in_dtype", "out_dtype"), PAIRINGS)
def test_alignment_promised_is_one_element_by_default(in_dtype: str, out_dtype: str) -> None:
    """64 bytes, TVM's default: aligned moves that crash on a slice."""
    size = {"bfloat16": 2, "float16": 2, "float32": 4}
    func = declare(KernelSpec(in_dtype=in_dtype, out_dtype=out_dtype))
    for buffer in func.params[:7]:
        assert buffer.data_alignment == size[str(buffer.dtype)], buffer
    func = declare(KernelSpec(in_dtype=in_dtype, out_dtype=out_dtype), alignment=32)
    found = {buffer.name: buffer.data_alignment for buffer in func.params[:7]}
    assert {found[name] for name in ("q", "k", "q_out", "k_out")} == {32}
    assert found["gamma_q"] == found["gamma_k"] == 16
    assert found["qk_var"] == 4


def test_levels_share_a_declaration_and_targets_do_not() -> None:
    """Three levels of a portable module that parse the same script three times."""
    spec = KernelSpec(op="qk_rms_norm", q_cols=96, k_cols=32)
    assert declare(spec) is declare(spec.replace(target="x86-64-v4"))
    assert declare(spec) is not declare(spec.replace(target="cuda:sm_90"))
    assert declare(spec) is not declare(spec, row_tile=2)


@pytest.mark.parametrize("target", ["cpu", "cuda:sm_90"])
def test_the_parser_reads_no_source_of_its_callers(
    target: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Below pytest a fused operation took 0.65 s to parse, of which 0.3 were the operation's."""
    real, seen = inspect.getouterframes, []

    def frames(frame: Any, context: int = 1) -> Any:
        infos = real(frame, context)
        seen.extend(info.filename for info in infos)
        return infos

    monkeypatch.setattr(inspect, "getouterframes", frames)
    spec = KernelSpec(op="qk_rms_norm", q_cols=104, k_cols=24, target=target)
    if target == "cpu":
        declare(spec)
    else:
        scheduled_variant(spec, default_variants(spec)[0])
    assert len(seen) > 20
    assert __file__ not in seen
