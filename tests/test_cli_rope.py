"""The command line and the operations that rotate: options that are a spec's fields."""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path
from typing import Any

import pytest
import test_rope
from support import OWN

from qknorm_tvm import KernelSpec, packing, tuning
from qknorm_tvm.bench.harness import workload_of_rows
from qknorm_tvm.bench.workload import BENCHMARKS
from qknorm_tvm.call import cache
from qknorm_tvm.cli import main
from qknorm_tvm.cli import options as cli_options
from qknorm_tvm.load.module_file import read_metadata
from qknorm_tvm.spec import CHOICES, Choice


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


def test_tune_takes_every_choice(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    asked: list[KernelSpec] = []

    def tune(specs: list[KernelSpec], **options: Any) -> Any:
        asked.extend(specs)
        return session.Summary(tmp_path)

    session = pytest.importorskip("qknorm_tvm.tuning.session")
    monkeypatch.setattr(tuning, "tune", tune)
    command = "tune --op qk_rms_norm_rope --shapes 64/32 --head-dim 32 --rotary-dim 16"
    assert main([*command.split(), "--statistics", "local", "--interleaved"]) == 0
    (spec,) = asked
    assert spec.text == (
        "qk_rms_norm_rope[bfloat16->bfloat16, q=64, k=32, statistics=local, head_dim=32, "
        "rotary_dim=16, interleaved]@cpu"
    )
    assert main(["tune", "--head-dim", "32"]) == 2


@pytest.mark.parametrize(
    "options",
    [
        "qk_rms_norm_rope_cache --head-dim 32 --rotary-dim 16",
        pytest.param(
            "qk_rms_norm_rope_cache --head-dim 16 --rotary-dim 0 --cache-dtype float8_e4m3fn "
            "--statistics local --writes-k-out",
            marks=pytest.mark.slow,
        ),
        pytest.param("qk_rms_norm_rope --head-dim 32 --rotary-dim 32", marks=pytest.mark.slow),
        pytest.param("row_mean_of_squares_qk", marks=pytest.mark.slow),
        pytest.param("qk_rms_norm --dtype float16", marks=pytest.mark.slow),
    ],
)
def test_run_takes_every_operation(
    options: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """In a fresh process: inputs that a file does not hold, a comparison that leaves out caches."""
    command = f"run --op {options} --q-cols 64 --k-cols 32 --rows 0,5 --min-time 0"
    command += f" --no-torch-compile --output {tmp_path / 'a.so'}"
    assert main(command.split()) == 0
    printed = capsys.readouterr().out
    assert options.split()[0] in printed
    assert "DIFFERS" not in printed
    assert "equal" in printed


def test_run_has_the_heads_of_its_default(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["run", "--op", "qk_rms_norm_rope", "--k-cols", "100"]) == 2
    assert "head_dim must divide k_cols, 100, got 128" in capsys.readouterr().err
    assert main(["run", "--head-dim", "64"]) == 2
    assert "--head-dim is for --op qk_rms_norm_rope" in " ".join(capsys.readouterr().err.split())


def test_every_choice_is_explained_and_one_that_is_not_still_has_an_option() -> None:
    """A new field of a spec that broke every command."""
    for choice in CHOICES:
        text = cli_options._choice_help(choice)
        assert re.fullmatch(r"((Rotation|Paged cache): )?[A-Z\"].*\.", text), (choice.name, text)
    new = Choice("new_field", False, (), ("qk_rms_norm_rope_cache",))
    assert cli_options._choice_help(new) == ""


def test_packs_hold_the_attention_input_where_it_is_asked_for() -> None:
    """A pack that grew without being asked, or a rotation of another model's columns."""
    before = packing.plan(["minimax-m2"], [1], ["cpu"])
    assert not any(spec.operation.rotates for specs in before.modules for spec in specs)
    models = ["minimax-m2", "olmo2-32b"]
    wanted = packing.plan(models, [1, 4], ["cpu"], ["norm", "rope-cache"])
    own = {spec for specs in wanted.modules for spec in specs if spec.operation.rotates}
    assert {(s.q_cols, s.rotary_dim, s.statistics, s.cast_before_gamma) for s in own} == {
        (cols, rotary_dim, statistics, cast)
        for cols, rotary_dim, statistics in (
            (6144, 64, "local"), (5120, 128, "local"), (1536, 64, "given"), (1280, 128, "given"),
        )
        for cast in (True, False)
    }  # fmt: skip
    assert {(spec.op, spec.head_dim) for spec in own} == {("qk_rms_norm_rope_cache", 128)}
    on_gpus = packing.plan(models, [1, 4], ["cuda:sm_90"], ["rope-cache"])
    kinds = {(spec.q_cols, spec.statistics) for specs in on_gpus.modules for spec in specs}
    assert kinds == {
        *((6144, "local"), (5120, "local")),
        *((cols, kind) for cols in (1536, 1280) for kind in ("given", "peers")),
    }
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


@pytest.mark.parametrize(
    "spec", [test_rope.CACHE, pytest.param(test_rope.FLOAT8_CACHE, marks=pytest.mark.slow)]
)
def test_bench_of_repeated_rows_checks_every_slot(
    spec: KernelSpec, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rows that repeat and share a slot; a cache always at one address, or taken as it was left."""
    entry = dataclasses.replace(BENCHMARKS[spec.op], unique_rows=20)
    monkeypatch.setitem(BENCHMARKS, spec.op, entry)
    work = workload_of_rows(spec, cache.module_for(spec), 50)
    assert work.activations.rows == 20
    assert len(set(work.inputs["slot_mapping"].tolist())) == 50
    for name in ("k_cache", "v_cache"):
        assert len({tensors[name].ctypes.data % 4096 for tensors in work.sets}) == 8
    assert work.ours().exact
    (*_, last) = work.sets
    assert work.is_exact([last[name] for name in work.outputs])
    last["k_cache"][work.inputs["slot_mapping"][45] // 16] *= -1
    assert not work.is_exact([last[name] for name in work.outputs])
