"""`KernelSpec`: what is refused, and text and hash that mean the same everywhere."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support import DTYPES, run_python

from qknorm_tvm import KernelSpec
from qknorm_tvm.operations import OPERATIONS
from qknorm_tvm.spec import MAX_COLS, OPS

_COLUMNS = st.none() | st.integers(1, MAX_COLS)
_TARGETS = st.sampled_from(
    [
        "cpu",
        "x86-64-v2",
        "x86-64-v3",
        "x86-64-v4",
        "znver4",
        "aarch64",
        "cuda",
        "cuda:sm_90",
        "cuda:sm_80,sm_90a",
    ]
)


@st.composite
def specs(draw: st.DrawFn) -> KernelSpec:
    return KernelSpec(
        in_dtype=draw(st.sampled_from(DTYPES)),
        out_dtype=draw(st.none() | st.sampled_from(DTYPES)),
        q_cols=draw(_COLUMNS),
        k_cols=draw(_COLUMNS),
        target=draw(_TARGETS),
        reproducible=draw(st.booleans()),
    )


@given(specs())
def test_text_is_read_back(spec: KernelSpec) -> None:
    """A field that the text loses: two specs would share a cached module."""
    assert KernelSpec.from_text(spec.text) == spec
    assert str(spec) == spec.text
    assert KernelSpec(**spec.to_dict()) == spec


@given(specs(), specs())
def test_equal_text_means_equal_spec(a: KernelSpec, b: KernelSpec) -> None:
    assert (a == b) == (a.text == b.text) == (a.digest == b.digest)
    if a == b:
        assert hash(a) == hash(b)


def test_text_and_digest_are_the_same_in_other_processes() -> None:
    """A cache key that depends on Python's hash seed is never found again."""
    spec = KernelSpec(in_dtype="float16", q_cols=1536, target="cuda:sm_90,sm_80")
    code = """
        from qknorm_tvm import KernelSpec
        spec = KernelSpec(in_dtype="float16", q_cols=1536, target="cuda:sm_80,sm_90,sm_80")
        print(spec.text, spec.digest)
    """
    printed = {
        run_python(code, env={"PYTHONHASHSEED": seed}).stdout.strip() for seed in ("0", "1", "77")
    }
    assert printed == {f"{spec.text} {spec.digest}"}


def test_text_and_digest_do_not_change_between_versions() -> None:
    """Files and caches of users carry this text."""
    spec = KernelSpec(q_cols=1536, k_cols=256)
    assert spec.text == "apply_qk_rms_norm[bfloat16->bfloat16, q=1536, k=256]@cpu"
    assert spec.digest == "e0e1cb1d0515cd75"
    other = KernelSpec(in_dtype="float32", out_dtype="bfloat16", reproducible=True)
    assert other.text == "apply_qk_rms_norm[float32->bfloat16, q=any, k=any, reproducible]@cpu"


def test_out_dtype_defaults_to_in_dtype() -> None:
    assert KernelSpec(in_dtype="float16") == KernelSpec(in_dtype="float16", out_dtype="float16")


def test_spec_is_frozen() -> None:
    """A spec changed after it became a key."""
    with pytest.raises(dataclasses.FrozenInstanceError, match="q_cols"):
        KernelSpec().q_cols = 3  # type: ignore[misc]


def test_replace_validates() -> None:
    assert KernelSpec().replace(q_cols=7).q_cols == 7
    with pytest.raises(ValueError, match=r"^q_cols must be from 1 to"):
        KernelSpec().replace(q_cols=0)


@pytest.mark.parametrize(
    ("field", "value", "error", "message"),
    [
        ("op", "rms_norm", ValueError, "op must be one of apply_qk_rms_norm, .*, got 'rms_norm'"),
        ("op", None, ValueError, "op must be one of apply_qk_rms_norm, .*, got None"),
        ("in_dtype", "float64", ValueError, "in_dtype must be one of bfloat16, float16, float32"),
        ("in_dtype", None, TypeError, "in_dtype must be a str, got NoneType"),
        ("out_dtype", "bf16", ValueError, "out_dtype must be one of .*, got 'bf16'"),
        ("out_dtype", 16, TypeError, "out_dtype must be a str, got int"),
        ("q_cols", 0, ValueError, "q_cols must be from 1 to 16777216, or None, got 0"),
        ("q_cols", -1, ValueError, "q_cols must be from 1 to 16777216, or None, got -1"),
        ("k_cols", MAX_COLS + 1, ValueError, "k_cols must be from 1 to .*, got 16777217"),
        ("k_cols", 1.0, TypeError, "k_cols must be an int or None, got float"),
        ("k_cols", True, TypeError, "k_cols must be an int or None, got bool"),
        ("k_cols", "256", TypeError, "k_cols must be an int or None, got str"),
        ("reproducible", 1, TypeError, "reproducible must be a bool, got int"),
        ("cast_before_gamma", 1, TypeError, "cast_before_gamma must be a bool, got int"),
        ("target", "gpu!", ValueError, "target must be 'cpu', .* got 'gpu!'"),
        ("target", None, TypeError, "target must be a str, got NoneType"),
    ],
)
def test_wrong_field(field: str, value: Any, error: type[Exception], message: str) -> None:
    """A spec that can be made but not built, or a message that does not name the field."""
    with pytest.raises(error, match=f"^{message}"):
        KernelSpec(**{field: value})


@pytest.mark.parametrize(
    ("field", "value"),
    [("out_dtype", "bfloat16"), ("reproducible", True), ("cast_before_gamma", True)],
)
def test_statistics_have_no_such_choice(field: str, value: Any) -> None:
    """Two specs for one artifact."""
    with pytest.raises(ValueError, match=f"^{field} must be .* for row_mean_of_squares_qk, got "):
        KernelSpec(op="row_mean_of_squares_qk", **{field: value})


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("cols", [None, 128])
def test_text_of_every_operation_reads_back(op: str, cols: int | None) -> None:
    operation = OPERATIONS[op]
    fixed: dict[str, Any] = {"k_cols": 64, "head_dim": 32} if operation.rotates else {}
    cols = 128 if operation.rotates else cols
    for flag in (False, operation.normalises):
        choices = {"cast_before_gamma": flag, "reproducible": flag}
        spec = KernelSpec(op=op, q_cols=cols, **choices, **fixed)
        assert KernelSpec.from_text(spec.text) == spec


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("cache_dtype", [None, "float8_e4m3fn"])
@pytest.mark.parametrize("rotary_dtype", [None, "float32"])
def test_text_of_every_choice_of_a_rotation_reads_back(
    rotary_dtype: str | None, cache_dtype: str | None, interleaved: bool
) -> None:
    for statistics, writes_k_out in (("given", True), ("local", False)):
        spec = KernelSpec(
            op="qk_rms_norm_rope_cache",
            in_dtype="float16",
            q_cols=256,
            k_cols=128,
            head_dim=64,
            rotary_dim=32,
            rotary_dtype=rotary_dtype,
            interleaved=interleaved,
            cache_dtype=cache_dtype,
            statistics=statistics,
            writes_k_out=writes_k_out,
        )
        assert KernelSpec.from_text(spec.text) == spec
        assert KernelSpec(**spec.to_dict()) == spec


ROPE = {"op": "qk_rms_norm_rope", "q_cols": 256, "k_cols": 128, "head_dim": 64, "rotary_dim": 32}


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"head_dim": None}, ValueError, "head_dim must be given for qk_rms_norm_rope, got None"),
        ({"head_dim": 48}, ValueError, "head_dim must divide q_cols, 256, got 48"),
        ({"head_dim": 256}, ValueError, "head_dim must divide k_cols, 128, got 256"),
        ({"head_dim": "64"}, TypeError, "head_dim must be an int, got str"),
        ({"rotary_dim": 31}, ValueError, "rotary_dim must be even, got 31"),
        ({"rotary_dim": 66}, ValueError, "rotary_dim must be from 0 to 64, got 66"),
        ({"rotary_dim": True}, TypeError, "rotary_dim must be an int, got bool"),
        ({"q_cols": None}, ValueError, "q_cols must be given for qk_rms_norm_rope, got None"),
        ({"rotary_dtype": "float16"}, ValueError, "rotary_dtype must be one of bfloat16, float32"),
        ({"statistics": "mine"}, ValueError, "statistics must be one of given, local, peers, got"),
        ({"statistics": "peers"}, ValueError, "statistics must be given or local for target 'cpu'"),
        ({"out_dtype": "float32"}, ValueError, "out_dtype must be bfloat16 for qk_rms_norm_rope"),
        ({"cache_dtype": "bfloat16"}, ValueError, "cache_dtype must be None for qk_rms_norm_rope"),
        ({"rotary_dim": 0, "interleaved": True}, ValueError, "interleaved must be False without"),
        ({"op": "qk_rms_norm"}, ValueError, "head_dim must be None for qk_rms_norm, got 64"),
    ],
)
def test_wrong_choices_of_a_rotation_are_refused(
    changes: dict[str, Any], error: type[Exception], message: str
) -> None:
    """A kernel of heads that the columns do not have; two specs for one artifact."""
    with pytest.raises(error, match=f"^{message}"):
        KernelSpec(**{**ROPE, **changes})


@pytest.mark.parametrize(
    "text",
    [
        "",
        "apply_qk_rms_norm",
        "apply_qk_rms_norm[bfloat16->bfloat16, q=1536, k=256]",
        "apply_qk_rms_norm[bfloat16->bfloat16, q=-1, k=256]@cpu",
        "apply_qk_rms_norm[bfloat16->bfloat16, q=None, k=256]@cpu",
        "apply_qk_rms_norm[bfloat16->bfloat16, q=1536, k=256]@cpu\n",
    ],
)
def test_text_that_is_no_spec(text: str) -> None:
    with pytest.raises(ValueError, match=r"^spec must look like 'apply_qk_rms_norm\[.* got "):
        KernelSpec.from_text(text)


def test_statistics_of_peers() -> None:
    """A default that is written out, so that files and caches of one artifact have two names."""
    local = KernelSpec(op="qk_rms_norm", q_cols=256, k_cols=128, target="cuda")
    assert local.statistics == "local"
    assert local == local.replace(statistics="local")
    assert "statistics" not in local.text
    peers = local.replace(statistics="peers")
    assert KernelSpec.from_text(peers.text) == peers
    assert peers.has_peers
    assert not local.has_peers
    names = [tensor.name for tensor in peers.tensors if tensor not in local.tensors]
    assert names == ["peers", "peer_state"]
    assert local.replace(op="apply_qk_rms_norm").statistics is None
    with pytest.raises(ValueError, match=r"^q_cols must be given for statistics='peers', got None"):
        peers.replace(q_cols=None)
    with pytest.raises(ValueError, match=r"^statistics must be one of local, peers, got 'given'"):
        local.replace(statistics="given")
    with pytest.raises(ValueError, match=r"^statistics must be local for target 'cpu'"):
        peers.replace(target="cpu")
    local.check_alone("timed")
    with pytest.raises(ValueError, match=r"^specs must be of one rank to be timed, got"):
        peers.check_alone("timed")
