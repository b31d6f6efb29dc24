"""Tuning for real, on small spaces: search, resume, interruption, and what the build uses.

``QKNORM_TVM_CAMPAIGN=1`` searches further, and with either cost model.
"""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import filelock
import pytest
from made_up_clock import tune_by
from support import Case, check_exact, make_case, session_folder

from qknorm_tvm import KernelSpec, TuningError, compile, tune
from qknorm_tvm.build import tuned as selection
from qknorm_tvm.schedules.cpu_config import ROUNDINGS, CpuConfig
from qknorm_tvm.targets import host_cpu_target
from qknorm_tvm.tuning import folders, measurer, records
from qknorm_tvm.tuning.targets import open_target

pytest.importorskip("cloudpickle", reason="tuning needs the extra qknorm-tvm[tune]")
pytest.importorskip("psutil", reason="tuning needs the extra qknorm-tvm[tune]")

_CAMPAIGN = bool(os.environ.get("QKNORM_TVM_CAMPAIGN"))
SPEC = KernelSpec(q_cols=96, k_cols=64, target="cpu")
#: Of each row count in `tuned`.
TRIALS = 6
TUNE = """
import sys
from qknorm_tvm import KernelSpec, tune
tune([KernelSpec(q_cols=96, k_cols=64)], rows=(16,), trials=int(sys.argv[2]),
     cost_model="random", logs=sys.argv[1])
"""


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two threads that spin beside other tests' would measure the scheduler.

    And most of the time is that of processes that start; how many decide is tested elsewhere.
    """
    monkeypatch.setenv("TVM_NUM_THREADS", "1")
    monkeypatch.setattr(measurer, "PROCESSES", 2)


@pytest.fixture(scope="session")
def tuned() -> Path:
    """A device's folder, tuned with the random model by whichever worker is first."""
    logs = session_folder() / "tuned"
    with filelock.FileLock(str(logs) + ".lock"):
        if not logs.exists():
            _tune(logs)
    (folder,) = logs.iterdir()
    return folder


def _tune(logs: Path) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TVM_NUM_THREADS", "1")
        patch.setattr(measurer, "PROCESSES", 2)
        summary = tune([SPEC], rows=(1, 16), trials=TRIALS, cost_model="random", logs=logs)
    assert summary.failed == 0, summary.first_failure
    assert [outcome.rows for outcome in summary.outcomes] == [1, 16]
    assert [outcome.trials for outcome in summary.outcomes] == [summary.measured - TRIALS, TRIALS]


@pytest.fixture
def copy(tuned: Path, tmp_path: Path) -> Path:
    """A copy of the tuned folder, to change."""
    return Path(shutil.copytree(tuned, tmp_path / "logs" / tuned.name))


@pytest.fixture
def made_up(tmp_path: Path) -> Path:
    """A device's folder as `copy` is, tuned by a clock that finds all equally fast."""
    target, device = host_cpu_target(), selection.host_device()
    spec = SPEC.replace(target=target)
    summary = tune_by(
        lambda config, rows, process: 1e-6, target, device, tmp_path, spec, (1, 16), trials=TRIALS
    )
    return summary.folder


@pytest.mark.slow
def test_a_tuned_folder_is_whole(tuned: Path) -> None:
    assert folders.validate(tuned) == []
    provenance = json.loads((tuned / "provenance.json").read_text())
    assert provenance["device"]["cpu"]
    (session,) = provenance["sessions"]
    assert (session["trials"], session["seed"], session["ended"]) == (TRIALS, 0, "complete")
    # The default is always among the measured.
    logs = records.read_logs(tuned)
    for outcome in selection.read_outcomes(tuned):
        default = _fields(outcome.default)
        assert any(r.workload == outcome.workload and r.fields == default for r in logs.records)


def _fields(config: Mapping[str, Any]) -> dict[str, int]:
    """Return a config's fields as records have them."""
    return open_target(host_cpu_target()).encode(CpuConfig.from_dict(dict(config)))


@pytest.mark.slow
def test_what_is_recorded_is_not_measured_again(copy: Path) -> None:
    before = (copy / records.RECORDS).read_bytes()
    summary = tune([SPEC], rows=(1, 16), trials=TRIALS, cost_model="random", logs=copy.parent)
    assert summary.measured == 0
    assert summary.reused == len(before.splitlines())
    assert (copy / records.RECORDS).read_bytes() == before


@pytest.mark.slow
@pytest.mark.parametrize(
    ("cost_model", "trials"), [("xgb", 14), *([("random", 12), ("xgb", 28)] if _CAMPAIGN else [])]
)
def test_a_session_goes_on_past_damaged_lines(copy: Path, cost_model: str, trials: int) -> None:
    """And where the model of costs is another than the one that began."""
    if cost_model == "xgb":
        pytest.importorskip("xgboost")
    path = copy / records.RECORDS
    lines = path.read_text().splitlines()
    path.write_text("\n".join([lines[0], "", "{}", *lines[1:-1], lines[-1][:50]]) + "\n")
    summary = tune([SPEC], rows=(16,), trials=trials, cost_model=cost_model, logs=copy.parent)
    assert [problem.line for problem in summary.rejected] == [2, 3, len(lines) + 2]
    (outcome,) = summary.outcomes
    assert outcome.trials == trials
    assert summary.measured == trials - (TRIALS - 1)  # the last line is cut
    logs = records.read_logs(copy)
    assert logs.problems == []
    assert len({record.key for record in logs.records}) == len(logs.records)


@pytest.mark.slow
def test_a_killed_session_keeps_its_batches_and_its_lock_is_free(tmp_path: Path) -> None:
    arguments = [sys.executable, "-c", TUNE, str(tmp_path), "60"]
    with subprocess.Popen(arguments, start_new_session=True) as tuner:
        while not _recorded(tmp_path):
            assert tuner.poll() is None
            time.sleep(0.1)
        # Meanwhile nobody else may write there.
        with pytest.raises(TuningError, match=f"in use by process {tuner.pid} "):
            tune([SPEC], rows=(16,), trials=1, logs=tmp_path)
        os.kill(tuner.pid, signal.SIGKILL)
    kept = _recorded(tmp_path)
    assert kept >= 1
    # A line may have been cut, or written after it was killed.
    summary = tune([SPEC], rows=(16,), trials=kept + 2, cost_model="random", logs=tmp_path)
    assert 1 <= summary.measured <= 3
    assert _recorded(tmp_path) == kept + 2


@pytest.mark.slow
def test_sigterm_ends_in_good_order(tmp_path: Path) -> None:
    with subprocess.Popen([sys.executable, "-c", TUNE, str(tmp_path), "60"]) as tuner:
        while not _recorded(tmp_path):
            assert tuner.poll() is None
            time.sleep(0.1)
        tuner.terminate()
        assert tuner.wait(20) != 0
    (folder,) = tmp_path.iterdir()
    (session,) = json.loads((folder / "provenance.json").read_text())["sessions"]
    assert session["ended"] == "interrupted"
    assert records.read_logs(folder).problems == []
    assert not (folder / ".lock-holder").exists()


def _recorded(logs: Path) -> int:
    return sum(len(path.read_text().splitlines()) for path in logs.glob(f"*/{records.RECORDS}"))


# ---- the build ------------------------------------------------------------------------------


def keep_records(folder: Path) -> dict[int, dict]:
    """Declare a record that is not the default the winner at every row count."""
    logs = records.read_logs(folder)
    outcomes, configs = [], {}
    for outcome in selection.read_outcomes(folder):
        for record in logs.records:
            fields = {**record.fields, "rounding": ROUNDINGS[record.fields["rounding"]]}
            if record.workload == outcome.workload and fields != outcome.default:
                configs[outcome.rows] = fields
        config = configs[outcome.rows]
        outcomes.append(dataclasses.replace(outcome, source="record", config=config))
    selection.write_outcomes(folder, outcomes)
    return configs


def test_the_build_uses_records_by_rows_and_stays_exact(
    made_up: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Records end in configs by the heuristic's own door, each for the rows it was measured at."""
    configs = keep_records(made_up)
    assert configs[1] != configs[16]
    assert folders.validate(made_up) == []
    monkeypatch.setenv(selection.ENVIRONMENT, str(made_up.parent))
    module = compile(SPEC.replace(target=host_cpu_target()))
    code = module.metadata["levels"][0]["code"]
    assert [(entry["min_rows"], entry["source"], entry["config"]) for entry in code] == [
        (4, "record", configs[16]),
        (1, "record", configs[1]),
    ]
    assert code[0]["record"]["device"] == made_up.name
    assert code[0]["record"]["rows"] == 16
    for rows in (0, 1, 3, 4, 5, 16, 17, 33, 257):
        check_exact(module.module, make_case(rows, 96, 64), label=f"{rows} rows")
    check_exact(module.module, _strided(17), label="strided")


def _strided(rows: int) -> Case:
    case = make_case(rows, 96, 64)
    wide = make_case(rows, 200, 64).q
    wide[:, :96] = case.q
    case.q = wide[:, :96]
    return case


@pytest.mark.slow
def test_records_are_for_their_device_and_level_and_a_user_comes_first(
    copy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    configs = keep_records(copy)
    monkeypatch.setenv(selection.ENVIRONMENT, str(copy.parent))
    levels = {level["name"]: level["code"] for level in compile(SPEC).metadata["levels"]}
    for name, code in levels.items():
        expected = "record" if name == host_cpu_target() else "heuristic"
        assert {entry["source"] for entry in code} == {expected}, name
    mine = CpuConfig(vector=8)
    (code,) = compile(SPEC.replace(target=host_cpu_target()), config=mine).metadata["levels"][0][
        "code"
    ]
    assert (code["source"], code["config"]) == ("user", mine.to_dict())
    assert configs


def test_records_of_another_declaration_are_not_used_and_validate_says_so(
    made_up: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    keep_records(made_up)
    monkeypatch.setenv(selection.ENVIRONMENT, str(made_up.parent))
    from qknorm_tvm.build import configs
    from qknorm_tvm.declare import workload

    monkeypatch.setattr(configs, "workload_hash", lambda mod: "1")
    monkeypatch.setattr(workload, "workload_hash", lambda mod: "1")
    module = compile(SPEC.replace(target=host_cpu_target()))
    assert {code["source"] for code in module.metadata["levels"][0]["code"]} == {"heuristic"}
    problems = folders.validate(made_up)
    assert len(problems) == 2
    assert all("another version of the declaration" in problem for problem in problems)


def test_shipped_logs_are_valid() -> None:
    """A declaration or a config that changed, and no shipped record is used any more."""
    shipped = selection.package_logs()
    assert shipped is not None
    # What is installed has no databases: those are in the checkout and the source distribution.
    sources = folders.device_folders(Path(__file__).parents[1] / "tuning_logs")
    installed = folders.device_folders(shipped)
    assert [folder.name for folder in installed] == [folder.name for folder in sources]
    for folder in (*sources, *installed):
        assert folders.validate(folder) == []
    for folder in sources:
        assert records.read_logs(folder).records


def test_validate_finds_a_config_without_a_record(made_up: Path) -> None:
    keep_records(made_up)
    path = made_up / selection.FILE_NAME
    content = json.loads(path.read_text())
    content["outcomes"][0]["config"]["bytes_per_task"] = 12345
    path.write_text(json.dumps(content))
    (problem,) = folders.validate(made_up)
    assert "has no record in the database" in problem


def test_prune_keeps_what_is_in_use(made_up: Path) -> None:
    keep_records(made_up)
    before = len(records.read_logs(made_up).records)
    gone = folders.prune(made_up, 1)
    assert gone > 0
    assert len(records.read_logs(made_up).records) == before - gone
    assert folders.validate(made_up) == []


@pytest.mark.slow
@pytest.mark.parametrize("op", ["row_mean_of_squares_qk", "qk_rms_norm"])
def test_the_other_operations_are_tuned_the_same_way(op: str, tmp_path: Path) -> None:
    """A space, a check or a workload that knows one operation only."""
    spec = KernelSpec(op=op, q_cols=256, k_cols=64, target=host_cpu_target())
    rows = (3, 40) if _CAMPAIGN else (40,)
    summary = tune([spec], rows=rows, trials=3, cost_model="random", logs=tmp_path)
    assert summary.failed == 0
    assert tuple(outcome.rows for outcome in summary.outcomes) == rows
    assert folders.validate(summary.folder) == []


# ---- candidates that fail -------------------------------------------------------------------


@pytest.mark.slow
def test_candidates_that_are_not_exact_fail_and_are_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A fast wrong answer must not win: here the reference expects another epsilon."""
    import cloudpickle

    # The worker processes do not know this file.
    cloudpickle.register_pickle_by_value(sys.modules[__name__])
    monkeypatch.setattr(measurer, "time_group", _time_wrongly)
    with pytest.raises(TuningError, match=r"the default of .* fails: .*not exact: q_out differs"):
        tune([SPEC], rows=(16,), trials=2, cost_model="random", logs=tmp_path)
    (folder,) = tmp_path.iterdir()
    assert records.read_logs(folder).records == []
    (session,) = json.loads((folder / "provenance.json").read_text())["sessions"]
    assert (session["measured"], session["failed"]) == (0, 1)


def _time_wrongly(*arguments: Any) -> list[list[float]]:
    from qknorm_tvm.check import reference
    from qknorm_tvm.tuning import workers

    right = reference.apply_qk_rms_norm
    reference.apply_qk_rms_norm = lambda *a, **how: right(*a[:5], 1.0, a[6], **how)
    return workers.time_group(*arguments)


def test_a_default_that_does_not_build_is_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    compiler = tmp_path / "compiler"
    compiler.write_text("#!/bin/sh\necho no such instruction >&2; exit 1\n")
    compiler.chmod(0o755)
    monkeypatch.setenv("CC", str(compiler))
    with pytest.raises(TuningError, match=r"the default of .* fails: .*compiling tables\.c failed"):
        tune([SPEC], rows=(16,), trials=1, cost_model="random", logs=tmp_path / "logs")


# ---- operations that rotate ----------------------------------------------------------------------

ROTATING = KernelSpec(
    op="qk_rms_norm_rope_cache", q_cols=96, k_cols=64, head_dim=32, rotary_dim=16,
    statistics="local", cache_dtype="float8_e4m3fn",
)  # fmt: skip


@pytest.mark.parametrize("text", [host_cpu_target(), "cuda:sm_90"])
@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"rotary_dim": 0, "statistics": "given"},
        {"op": "qk_rms_norm_rope", "cache_dtype": None, "interleaved": True},
    ],
)
def test_what_rotates_has_a_space_with_its_default(text: str, fields: dict[str, Any]) -> None:
    """Of tensors with extents that only a call knows; a trace that says another config."""
    from tvm.s_tir.meta_schedule.database import MemoryDatabase

    from qknorm_tvm.tuning.search import Search

    target = open_target(text, threads=2)
    spec = ROTATING.replace(target=text, **fields)
    choices, default = target.choices(spec, 16), target.default(spec, 16)
    assert all(value in choices[name] for name, value in target.encode(default).items())
    assert any(len(values) > 1 for values in choices.values())
    search = Search(
        target, target.workload(spec, 16), choices, MemoryDatabase(), "random",
        seed=0, budget=1, batch=1,
    )  # fmt: skip
    assert search.config_of(search.candidate(default)) == default


@pytest.mark.slow
def test_what_rotates_is_tuned_and_its_record_is_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    summary = tune([ROTATING], rows=(16,), trials=4, cost_model="random", logs=tmp_path)
    assert (summary.measured, summary.failed) == (4, 0), summary.first_failure
    configs = keep_records(summary.folder)
    monkeypatch.setenv("QKNORM_TVM_TUNING_LOGS", str(tmp_path))
    module = compile(ROTATING.replace(target=host_cpu_target())).module
    (level,) = module.metadata["levels"]
    (code, *_) = level["code"]
    assert code["source"] == "record"
    assert code["config"] == configs[16]
