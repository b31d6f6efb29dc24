"""The command line and the operations that rotate: options that are a spec's fields."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from support import OWN

from qknorm_tvm import KernelSpec, packing
from qknorm_tvm.cli import main
from qknorm_tvm.load.module_file import read_metadata


def test_export_takes_every_choice_and_inspect_shows_them(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "attention.so"
    command = (
        f"export {out} --op qk_rms_norm_rope_cache --q-cols 64 --k-cols 32 --head-dim 32 "
        f"--rotary-dim 16 --rotary-dtype float32 --interleaved --cache-dtype float8_e4m3fn "
        f"--statistics local --writes-k-out --cast-before-gamma --target {OWN}"
    )
    assert main(command.split()) == 0
    capsys.readouterr()
    spec = KernelSpec(
        op="qk_rms_norm_rope_cache", q_cols=64, k_cols=32, head_dim=32, rotary_dim=16,
        rotary_dtype="float32", interleaved=True, cache_dtype="float8_e4m3fn",
        statistics="local", writes_k_out=True, cast_before_gamma=True, target=OWN,
    )  # fmt: skip
    assert [KernelSpec(**fields) for fields in read_metadata(out)["specs"]] == [spec]
    assert main(["inspect", str(out)]) == 0
    printed = "".join(capsys.readouterr().out.split())
    assert "".join(spec.text.split()) in printed
    assert main(["verify", str(out)]) == 0
    assert "EXACT: every output equals the unfused float32 graph" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--head-dim 64", "--head-dim is for --op qk_rms_norm_rope, qk_rms_norm_rope_cache"),
        ("--op qk_rms_norm_rope --cache-dtype float8_e4m3fn",
         "--cache-dtype is for --op qk_rms_norm_rope_cache"),
        ("--op qk_rms_norm_rope --q-cols 64 --k-cols 64", "head_dim must be given"),
        ("--op qk_rms_norm_rope --q-cols 64 --k-cols 64 --head-dim 32 --rotary-dim 5",
         "rotary_dim must be even, got 5"),
        ("--head-dim 64 --spec x", "--head-dim and --spec exclude each other"),
    ],
)  # fmt: skip
def test_choices_that_do_not_fit_are_refused(
    options: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["export", str(tmp_path / "a.so"), *options.split()]) == 2
    assert message in " ".join(capsys.readouterr().err.split())


def test_tune_refuses_what_rotates(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["tune", "--op", "qk_rms_norm_rope_cache"]) == 2
    assert "--op qk_rms_norm_rope_cache cannot be tuned" in capsys.readouterr().err


def test_packs_hold_the_attention_input_where_it_is_asked_for() -> None:
    """A pack that grew without being asked, or a rotation of another model's columns."""
    before = packing.plan(["minimax-m2"], [1], ["cpu"])
    assert not any(spec.operation.rotates for specs in before.modules for spec in specs)
    models = ["minimax-m2", "olmo2-32b"]
    wanted = packing.plan(models, [1, 4], ["cpu"], ["norm", "rope-cache"])
    own = {spec for specs in wanted.modules for spec in specs if spec.operation.rotates}
    assert {(s.q_cols, s.rotary_dim, s.statistics, s.cast_before_gamma) for s in own} == {
        (6144, 64, "local", True), (6144, 64, "local", False), (5120, 128, "local", False),
        (1536, 64, "given", True), (1536, 64, "given", False), (1280, 128, "given", False),
    }  # fmt: skip
    assert {(spec.op, spec.head_dim) for spec in own} == {("qk_rms_norm_rope_cache", 128)}
    names = [packing.file_name(specs) for specs in wanted.modules]
    assert len(set(names)) == len(names)
    with pytest.raises(ValueError, match="operations must be of norm, rope, rope-cache, got 'x'"):
        packing.plan(models, [1], ["cpu"], ["x"])


@pytest.mark.slow
@pytest.mark.parametrize("op", ["qk_rms_norm_rope", "qk_rms_norm_rope_cache"])
def test_bench_checks_and_times(op: str, capsys: pytest.CaptureFixture[str]) -> None:
    command = (
        f"bench --op {op} --shapes 64/32 --head-dim 32 --rotary-dim 16 --rows 1,9 --threads 1 "
        "--min-time 0.01 --no-torch-compile --json"
    )
    assert main(command.split()) == 0
    timings = json.loads(capsys.readouterr().out)["timings"]
    assert {row["candidate"] for row in timings} >= {"ours", "copy"}
    assert all(row["exact"] is True for row in timings if row["candidate"] == "ours")
