"""The declaration: names that schedules rely on, the order of operations, int64 extents."""

from __future__ import annotations

import inspect
import re
from typing import Any

import pytest
from support import PAIRINGS
from tvm.script.parser.core.diagnostics import Source

from qknorm_tvm import KernelSpec
from qknorm_tvm.build.cuda import scheduled_variant
from qknorm_tvm.declare.norm import declare
from qknorm_tvm.operations import OPERATIONS
from qknorm_tvm.schedules.cuda_variants import default_variants
from qknorm_tvm.spec import OPS

BLOCKS = ("rs", "x32", "scaled", "weighted")
_ROPE, _CACHE = (
    KernelSpec(op=op, q_cols=256, k_cols=128, head_dim=64)
    for op in ("qk_rms_norm_rope", "qk_rms_norm_rope_cache")
)
#: Specs that rotate, between them with every tensor given and not given.
ROTATING = (
    _ROPE,
    _ROPE.replace(rotary_dim=64, interleaved=True, statistics="local"),
    _CACHE.replace(rotary_dim=32, cache_dtype="float8_e4m3fn", writes_k_out=True),
    _CACHE.replace(rotary_dim=32, rotary_dtype="float32", cache_dtype="float8_e4m3fn"),
)


def _script(spec: KernelSpec, **promises: int) -> str:
    return declare(spec, **promises).script()


@pytest.mark.parametrize("columns", [(1536, 256), (None, None), (1, 257)])
def test_blocks_have_the_names_that_schedules_fetch(columns: tuple[int | None, int | None]) -> None:
    script = _script(KernelSpec(q_cols=columns[0], k_cols=columns[1]))
    blocks = re.findall(r"T\.sblock\(\"(\w+)\"\)", script)
    expected = ["root", *(f"{name}_q" for name in BLOCKS), "q_out"]
    expected += [f"{name}_k" for name in BLOCKS] + ["k_out"]
    assert blocks == expected


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
    specs = [
        KernelSpec(op=op, q_cols=16, k_cols=8, head_dim=8 if OPERATIONS[op].rotates else None)
        for op in OPS
    ]
    for spec in (KernelSpec(), *specs, *ROTATING):
        func, operation = declare(spec), spec.operation
        epsilon = ["epsilon"] if operation.has_epsilon else []
        tensors = [tensor.name for tensor in spec.tensors]
        names = [*tensors, *epsilon, *operation.internal_scalars(spec)]
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
    alignments = {buffer.name: buffer.data_alignment for buffer in func.params[:7]}
    assert {alignments[name] for name in ("q", "k", "q_out", "k_out")} == {32}
    assert alignments["gamma_q"] == alignments["gamma_k"] == 16
    assert alignments["qk_var"] == 4


@pytest.mark.parametrize("spec", ROTATING, ids=str)
def test_heads_are_one_block_of_each_operand(spec: KernelSpec) -> None:
    """A second block that writes an output: neither could be made parallel."""
    blocks = re.findall(r"T\.sblock\(\"(\w+)\"\)", _script(spec))
    heads = (
        ["heads_q", "heads_k", "heads_v"] if spec.operation.has_cache else ["heads_q", "heads_k"]
    )
    assert [name for name in blocks if name.startswith("heads")] == heads
    assert ("mean_q" in blocks) == (spec.statistics == "local")
    assert blocks.count("rs_q") == blocks.count("rs_k") == 1


def _values(script: str, block: str) -> dict[str, str]:
    """Return what a block binds, by name, without spaces and indices."""
    body = script.split(f'T.sblock("{block}")')[1].split("T.sblock(")[0]
    lines = re.findall(r"^ +(\w+): T\.let\[.*?\] = (.*)$", body, re.MULTILINE)
    return {name: re.sub(r"\[[^\[\]]*\]", "", re.sub(r"\[[^\[\]]*\]|\s", "", value))
            for name, value in lines}  # fmt: skip


@pytest.mark.parametrize("interleaved", [False, True])
def test_rotation_starts_from_the_rounded_norm(interleaved: bool) -> None:
    """A norm that stays float32 until it is rotated, sine and cosine exchanged, a wrong sign."""
    spec = _ROPE.replace(rotary_dim=32, interleaved=interleaved)
    script = _script(spec)
    for tag in ("q", "k"):
        y = f'T.Cast("bfloat16",T.Cast("float32",{tag})*rs_{tag}*gamma_{tag})'
        product = f'T.Cast("float32",{y})*T.Cast("float32",cos_sin_cache)'
        # b c + a s, as a difference: TVM would contract the sum.
        negative = f'T.Cast("float32",{y})*(T.Cast("float32",cos_sin_cache)*T.float32(-1.0))'
        assert _values(script, f"heads_{tag}") == {
            "first": f'T.Cast("bfloat16",{product}-{product})',
            "second": f'T.Cast("bfloat16",{product}-{negative})',
            "value": y,
        }


def test_columns_of_a_pair_and_of_its_angle() -> None:
    """Pairs of the other style, or a sine from the first half of its row."""
    for interleaved, pair in ((False, "vu, vu + 16"), (True, "vu * 2, vu * 2 + 1")):
        spec = _ROPE.replace(rotary_dim=32, interleaved=interleaved)
        script = re.sub(r"T\.int64\((\d+)\)", r"\1", _script(spec))
        (first,) = re.findall(r"first: .*q\[.*", script)
        (second,) = re.findall(r"second: .*q\[.*", script)
        a, b = pair.split(", ")
        b = f"({b})"
        columns = r" q\[vi, vh \* 64 \+ (.*?)\]\)"
        first, second = first.replace("(q[", "( q["), second.replace("(q[", "( q[")
        assert re.findall(columns, first) == [a, b]
        assert re.findall(columns, second) == [b, a]
        for line in (first, second):
            assert re.findall(r"cos_sin_cache\[positions\[vi\], (.*?)\]", line) == ["vu", "vu + 16"]


def test_without_rotation_nothing_is_rounded_twice() -> None:
    assert set(_values(_script(_ROPE), "heads_q")) == {"value"}
    assert "positions" not in _script(_ROPE)


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


def test_what_is_inlined_is_parsed_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """A function's source parsed at each of its calls: a sixth of the time that a kernel takes."""
    real, seen = Source.as_ast, []

    def as_ast(source: Source) -> Any:
        if source.source.startswith("@T.inline"):
            seen.append(source)
        return real(source)

    monkeypatch.setattr(Source, "as_ast", as_ast)
    spec = KernelSpec(op="qk_rms_norm", q_cols=112, k_cols=24, target="cuda:sm_90")
    scheduled_variant(spec, default_variants(spec)[0])
    assert len({id(source) for source in seen}) == len(seen)
