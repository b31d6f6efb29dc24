"""Which records are kept: clocks that lie, as noisy machines do, must not make one."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from made_up_clock import Clock, tune_by, use_clock

from qknorm_tvm import BuildError, KernelSpec, compile
from qknorm_tvm.build import tuned as selection
from qknorm_tvm.build.configs import bucket_ends
from qknorm_tvm.schedules.cuda_config import CudaConfig
from qknorm_tvm.targets import host_cpu_target
from qknorm_tvm.tuning import bench, folders
from qknorm_tvm.tuning.decision import PROCESSES, judge, paired_ratio, spread
from qknorm_tvm.tuning.targets import open_target

pytest.importorskip("cloudpickle", reason="tuning needs the extra qknorm-tvm[tune]")

SPEC = KernelSpec(op="qk_rms_norm", q_cols=512, k_cols=256, target="cuda:sm_90")
#: The default takes one row a thread there.
ROWS = (16, 600)


def tune(clock: Clock, logs: Path, rows: tuple[int, ...] = ROWS) -> selection.Outcome:
    """Tune `SPEC` by a clock; returns the outcome at the most rows."""
    summary = tune_by(clock, SPEC.target, "nvidia-made-up", logs, SPEC, rows)
    assert summary.failed == 0, summary.first_failure
    return summary.outcomes[-1]


def gaining(gain: float, at: Callable[[int], bool] = lambda rows: True) -> Clock:
    """Return a clock by which more than one row a thread is faster at some row counts."""
    return lambda config, rows, process: 6e-6 / (gain if config["rows"] > 1 and at(rows) else 1)


def test_a_gain_without_noise_is_kept_with_its_evidence(tmp_path: Path) -> None:
    """Refusing everything would pass all other tests of this file."""
    outcome = tune(gaining(1.05), tmp_path)
    assert (outcome.source, outcome.reason) == ("record", "")
    assert outcome.config == outcome.best != outcome.default
    assert [end["rows"] for end in outcome.ends] == [98, 1200]
    assert [end["gain"]["median"] for end in outcome.ends] == [1.05, 1.05]


def test_a_default_that_was_slow_in_one_process_is_not_beaten(tmp_path: Path) -> None:
    """A record of half the default's speed: 20.96 to 12.30 µs, where the default takes 5.85."""

    def clock(config: dict[str, Any], rows: int, process: int) -> float:
        if config["rows"] > 1:
            return 12.3e-6
        return 20.96e-6 if process <= 2 else 5.85e-6

    outcome = tune(clock, tmp_path, rows=(600,))
    assert outcome.source == "heuristic"
    assert "slower than the default: 5.85 µs with the default, 12.3 µs" in outcome.reason
    assert outcome.best != outcome.default == outcome.config


def test_nothing_is_decided_where_processes_differ_by_more_than_the_gain(tmp_path: Path) -> None:
    """Times that spread by 30 % prove no gain of 5 %, however well they pair."""

    def clock(config: dict[str, Any], rows: int, process: int) -> float:
        return gaining(1.05)(config, rows, process) * (1.3 if process == 3 else 1)

    outcome = tune(clock, tmp_path, rows=(600,))
    assert outcome.source == "heuristic"
    assert "undecided: " in outcome.reason
    assert outcome.spread == pytest.approx(0.3)


def test_a_gain_out_of_all_proportion_is_not_believed_where_times_spread(tmp_path: Path) -> None:
    """Threads that other programs keep waiting: a serial config won by a factor of 500."""

    def clock(config: dict[str, Any], rows: int, process: int) -> float:
        return 67e-6 if config["rows"] > 1 else (30e-3, 36e-3, 47e-3)[process % 3]

    outcome = tune(clock, tmp_path, rows=(600,))
    assert outcome.source == "heuristic"
    assert re.search(r"undecided: .* which spread by 56\.7%, more than 25%", outcome.reason)


@pytest.mark.parametrize("end", [98, 1200])
def test_a_record_must_hold_at_both_ends_of_its_bucket(end: int, tmp_path: Path) -> None:
    """A config that is twice as fast where it was measured, and half as fast where it serves."""

    def clock(config: dict[str, Any], rows: int, process: int) -> float:
        return 6e-6 * (2 if rows == end else 0.5 if rows == 600 else 1) ** (config["rows"] > 1)

    outcome = tune(clock, tmp_path)
    assert outcome.source == "heuristic"
    assert (
        f"slower than the default: 6 µs with the default, 12 µs with the config at {end} rows"
        in (outcome.reason)
    )


def test_a_bucket_ends_before_the_next_one() -> None:
    assert bucket_ends(16, [1, 16, 64]) == (4, 31)
    assert bucket_ends(1, [1, 16]) == (1, 3)
    assert bucket_ends(64, [1, 16]) == (32, 128)
    assert bucket_ends(7, []) == (1, 14)


# ---- placements of the tensors --------------------------------------------------------------


class Recorder:
    """In place of a candidate's module: notes where its arguments lie."""

    def __init__(self, takes: float = 1e-3):
        self.takes, self.addresses = takes, []

    def time_evaluator(self, name: str, device: Any, number: int, repeat: int, **_: Any) -> Any:
        def evaluate(*arguments: Any) -> Any:
            tensors = [part for part in arguments if not isinstance(part, float)]
            self.addresses.append([tensor.data_ptr() for tensor in tensors])
            return type("Result", (), {"results": [self.takes] * repeat})

        return evaluate


def test_candidates_are_timed_at_eight_distances_of_inputs_and_outputs() -> None:
    """One allocation: its addresses make a difference of up to a factor of two."""
    spec = KernelSpec(q_cols=96, k_cols=64, target=host_cpu_target())
    names = list(spec.operation.tensors)
    module = Recorder()
    (samples,) = bench.open_bench(spec, 16).compare([module])
    assert len(samples) == 8
    for operand in "qk":
        starts = np.array(module.addresses)
        inputs = starts[:, names.index(operand)] % 4096
        outputs = starts[:, names.index(f"{operand}_out")] % 4096
        assert len(set((outputs - inputs) % 4096)) == 8
        assert len(set(inputs)) == 8


@pytest.mark.parametrize("layout", range(bench.LAYOUTS))
def test_tensors_of_a_layout_do_not_overlap(layout: int) -> None:
    sizes = {"q_out": 5000, "k_out": 4096, "gamma_q": 400, "qk_var": 8, "q": 5000, "k": 1}
    starts = bench.placements(sizes, layout)
    ends = [starts[name] + size for name, size in sizes.items()]
    assert all(end <= start for end, start in zip(ends, list(starts.values())[1:], strict=False))
    assert ends[-1] <= bench.arena_bytes(sizes)
    assert {start % 64 for start in starts.values()} == {0}


def test_candidates_in_turns_share_their_addresses() -> None:
    spec = KernelSpec(op="row_mean_of_squares_qk", q_cols=96, k_cols=64, target=host_cpu_target())
    fast, slow = Recorder(1e-3), Recorder(2e-3)
    times = bench.open_bench(spec, 16).compare([fast, slow], rounds=3)
    assert times == [[1e-3] * 24, [2e-3] * 24]
    assert fast.addresses == slow.addresses


# ---- the numbers ----------------------------------------------------------------------------


def test_paired_ratio_tells_gain_from_noise() -> None:
    noise = np.random.default_rng(0).normal(1, 0.05, 21)
    base = list(noise)
    same = list(np.random.default_rng(1).normal(1, 0.05, 21))
    assert paired_ratio(base, same).low < 1 < paired_ratio(base, same).high
    gain = paired_ratio(base, [time / 1.2 for time in base])
    assert gain.low == pytest.approx(1.2)
    # One sample disturbed by another program does not matter.
    assert paired_ratio([*base, 100.0], [*(time / 1.2 for time in base), 0.1]).median < 1.3
    assert spread([1.0, 1.0, 1.0, 1.0]) == 0


def test_times_that_depend_on_addresses_alike_are_no_noise() -> None:
    """Where both take twice as long at some placements, their ratios still agree."""
    default = [1.0, 2.0] * 8
    verdict = judge(16, [[default, [time / 1.1 for time in default]]] * PROCESSES)
    assert verdict.spread == pytest.approx(0)
    assert verdict.faster


# ---- records that are there -----------------------------------------------------------------


#: Of this machine's CPU; which rounding is the default depends on its level.
CPU_SPEC = KernelSpec(q_cols=96, k_cols=64, target=host_cpu_target())


def other_rounding(config: Mapping[str, Any], rows: int, process: int) -> float:
    """Return a time by which the rounding that is not the default's is faster."""
    default = open_target(CPU_SPEC.target).default(CPU_SPEC, rows)
    return 2e-6 if config["rounding"] == default.rounding else 1e-6


@pytest.fixture
def cpu_logs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Logs of this machine's CPU with a record that a made-up clock speaks for."""
    monkeypatch.setenv("TVM_NUM_THREADS", "1")
    device = selection.host_device()
    (outcome,) = tune_by(
        other_rounding, CPU_SPEC.target, device, tmp_path, CPU_SPEC, (16,), trials=40
    ).outcomes
    assert outcome.source == "record"
    return tmp_path


def validate_by(clock: Clock, logs: Path, monkeypatch: pytest.MonkeyPatch, *options: str) -> int:
    """Run ``logs validate --measure`` with a made-up clock."""
    from qknorm_tvm.cli import main

    use_clock(clock, monkeypatch)
    return main(["logs", "validate", "--measure", "--logs", str(logs), *options])


def test_validate_measures_records_again(
    cpu_logs: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A record that was true once, or never, costs every build from then on."""
    assert validate_by(other_rounding, cpu_logs, monkeypatch) == 0
    assert "good" in capsys.readouterr().out
    assert validate_by(lambda config, *_: 2e-6, cpu_logs, monkeypatch) == 1
    said = capsys.readouterr().out
    assert "at 16 rows: not faster by more than the noise: 2 µs with the default, 2 µs" in said


def test_validate_with_fix_keeps_the_default(
    cpu_logs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert validate_by(lambda config, *_: 2e-6, cpu_logs, monkeypatch, "--fix") == 1
    (outcome,) = selection.read_outcomes(cpu_logs / selection.host_device())
    assert outcome.source == "heuristic"
    assert outcome.config == outcome.default != outcome.best
    assert "not faster" in outcome.reason
    assert folders.validate(cpu_logs / selection.host_device()) == []


def test_records_of_another_device_are_not_measured_here(
    cpu_logs: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    os.rename(cpu_logs / selection.host_device(), cpu_logs / "x86_64-other")
    assert validate_by(lambda *_: 1e-6, cpu_logs, monkeypatch) == 1
    assert "x86_64-other: not measured: its records are of another" in capsys.readouterr().out


def test_prune_keeps_what_shows_why_a_default_was_kept(tmp_path: Path) -> None:
    """Without the records of both, nobody can tell later whether the decision was right."""
    from qknorm_tvm.tuning import records

    # Equally fast at first, and the default's equal when it matters.
    tune(lambda config, rows, process: 6e-6 if process or config["rows"] == 1 else 5e-6, tmp_path)
    folder = tmp_path / "nvidia-made-up"
    assert {outcome.source for outcome in selection.read_outcomes(folder)} == {"heuristic"}
    assert folders.prune(folder, 2) > 0
    left = records.read_logs(folder)
    for outcome in selection.read_outcomes(folder):
        kept = [record for record in left.records if record.workload == outcome.workload]
        for config in (outcome.default, outcome.best):
            fields = open_target(SPEC.target).encode(CudaConfig.from_dict(dict(config)))
            assert fields in [record.fields for record in kept]
        assert len(kept) >= 2
    assert folders.validate(folder) == []


# ---- where logs are -------------------------------------------------------------------------


@pytest.mark.parametrize("columns", [60, 80, 100])
def test_logs_list_is_whole_at_any_width(
    columns: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Headers and dates that are cut; and shipped logs that it does not find."""
    from qknorm_tvm.cli import main

    monkeypatch.delenv(selection.ENVIRONMENT)
    monkeypatch.setenv("COLUMNS", str(columns))
    # An installed package: tuning would write elsewhere.
    monkeypatch.setattr(selection, "default_logs", lambda: Path("/nonexistent"))
    assert main(["logs", "list"]) == 0
    lines = capsys.readouterr().out.splitlines()
    words = set(" ".join(lines).split())
    assert {"device", "workloads", "records", "kept", "sessions", "last", "size"} <= words
    assert {"nvidia-h100", "2026-11-23"} <= words
    assert all(len(line.rstrip()) <= columns for line in lines[1:])


def test_a_mistyped_folder_of_logs_is_warned_of(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Records that are silently not used."""
    monkeypatch.setenv(selection.ENVIRONMENT, f"{tmp_path}{os.pathsep}{tmp_path / 'tunning'}")
    with pytest.warns(RuntimeWarning, match=r"QKNORM_TVM_TUNING_LOGS names .*tunning, which is no"):
        assert selection.log_folders() == [tmp_path, tmp_path / "tunning"]


@pytest.mark.parametrize("target", ["cpu", "x86-64-v2", "aarch64", "cuda:sm_90", "cuda"])
def test_every_build_warns_of_it(
    target: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A target for which no records are looked up, and which therefore hid the mistake."""

    def stop(*_: object) -> None:
        raise BuildError("not built")

    kind = "cuda" if target.startswith("cuda") else "cpu"
    monkeypatch.setattr(f"qknorm_tvm.build.{kind}.build", stop)
    monkeypatch.setenv(selection.ENVIRONMENT, str(tmp_path / "tunning"))
    spec = KernelSpec(in_dtype="float32", q_cols=33, k_cols=7, target=target)
    with (
        pytest.warns(RuntimeWarning, match=r"names .*tunning, which is no folder") as caught,
        pytest.raises(BuildError, match="not built"),
    ):
        compile(spec)
    assert [warning.filename for warning in caught] == [__file__]


def test_the_command_line_warns_in_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A line of click's code, which no user of a command has written."""
    from qknorm_tvm.cli import main

    monkeypatch.setenv(selection.ENVIRONMENT, str(tmp_path / "tunning"))
    assert main(["logs", "list"]) == 2
    first, *_ = capsys.readouterr().err.splitlines()
    assert re.fullmatch(
        r"Warning: QKNORM_TVM_TUNING_LOGS names .*tunning, which is no folder.*", first
    )
