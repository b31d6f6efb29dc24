"""Logs, outcomes, buckets and locks: what needs no candidate to be measured."""

from __future__ import annotations

import base64
import json
import re
import struct
import subprocess
import sys
from pathlib import Path

import pytest

from qknorm_tvm import KernelSpec, TuningError
from qknorm_tvm.build import tuned as selection
from qknorm_tvm.build.configs import Bucket, bucket_starts, from_outcomes, merge
from qknorm_tvm.schedules.cpu_config import CpuConfig
from qknorm_tvm.tuning import api, folders, records
from qknorm_tvm.tuning.api import default_shapes
from qknorm_tvm.tuning.records import sampled_fields


def workload_line(name: str = "123") -> str:
    module = json.dumps({"root_index": 0, "nodes": [{"type": "ir.IRModule"}]}).encode()
    return json.dumps([name, base64.b64encode(struct.pack("<Q", len(module)) + module).decode()])


def record_line(
    index: object = 0, vector: int = 16, seconds: object = (2e-6, 1e-6, 3e-6), tensors: int = 7
) -> str:
    trace = [
        [
            ["SampleCategorical", [], [[8, 16, 32], [0.3, 0.3, 0.4]], ["v0"]],
            ["Annotate", ["l1", "v0"], ["qknorm.vector"], []],
            ["Annotate", ["l1", 4], ["qknorm.row_tile"], []],
        ],
        [[0, [8, 16, 32].index(vector)]],
    ]
    seconds = list(seconds) if isinstance(seconds, tuple) else seconds
    args = [["TENSOR", "float32", [1, 2]]] * tensors
    return json.dumps([index, [trace, seconds, {"kind": "llvm"}, args]])


def write(folder: Path, workloads: list[str], lines: list[str]) -> None:
    (folder / records.WORKLOADS).write_text("".join(line + "\n" for line in workloads))
    (folder / records.RECORDS).write_text("".join(line + "\n" for line in lines))


# ---- reading --------------------------------------------------------------------------------


def test_good_lines_are_read(tmp_path: Path) -> None:
    write(tmp_path, [workload_line()], [record_line(), record_line(vector=32, tensors=13)])
    logs = records.read_logs(tmp_path)
    assert logs.problems == []
    assert [record.fields for record in logs.records] == [
        {"vector": 16, "row_tile": 4},
        {"vector": 32, "row_tile": 4},
    ]
    assert logs.records[0].median == 2e-6


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("", "blank line"),
        ("   ", "blank line"),
        ("{}", "foreign line: must be a list, got dict"),
        ("[]", "foreign line: must be .workload"),
        ("null", "foreign line: must be a list, got NoneType"),
        (record_line()[:-40], "truncated or no JSON"),
        ("\x00\xff garbage", "truncated or no JSON"),
        (record_line(index=7), "workload 7 does not exist"),
        (record_line(index=-1), "workload -1 does not exist"),
        (record_line(index="x"), "workload x does not exist"),
        (record_line(seconds=[]), "it holds no times"),
        (record_line(seconds=[1e10]), "a candidate that failed"),
        (record_line(seconds=None), "it holds no times"),
        (record_line(tensors=4), "no operation's tensors"),
        (json.dumps([0, [[[], []], [1.0], {"kind": "llvm"}, []]]), "no operation's tensors"),
        (
            json.dumps([0, [[[["Split", [], [], []]], []], [1.0], {"kind": "llvm"}, [
                ["TENSOR", "float32", [1]]] * 7]]),
            "not of this project's schedules",
        ),
    ],
)  # fmt: skip
def test_a_bad_record_is_named_kept_aside_and_costs_nothing_else(
    tmp_path: Path, line: str, reason: str
) -> None:
    """TVM's loader dies of a blank line or {}, and does not say which line is truncated."""
    write(tmp_path, [workload_line()], [record_line(), line, record_line(vector=32)])
    (problem,) = records.repair(tmp_path)
    assert str(problem).startswith(f"{tmp_path / records.RECORDS}:2: ")
    assert re.search(reason, problem.reason)
    logs = records.read_logs(tmp_path)
    assert logs.problems == []
    assert [record.fields["vector"] for record in logs.records] == [16, 32]
    aside = (tmp_path / f"{records.RECORDS}.rejected").read_text().splitlines()
    assert [json.loads(line)["line"] for line in aside] == [2]


@pytest.mark.parametrize(
    "line", ["{}", workload_line()[:-30], '["123", "AAAA"]', '["x", "AAAA"]', "[1, 2]"]
)
def test_records_keep_their_workload_when_one_before_is_damaged(tmp_path: Path, line: str) -> None:
    """Records name workloads by line: to drop one must not shift the others."""
    write(tmp_path, [line, workload_line("77")], [record_line(0), record_line(1, vector=32)])
    problems = records.repair(tmp_path)
    assert [(problem.path.name, problem.line) for problem in problems] == [
        (records.WORKLOADS, 1),
        (records.RECORDS, 1),
    ]
    logs = records.read_logs(tmp_path)
    assert logs.problems == []
    assert [(record.workload, record.fields["vector"]) for record in logs.records] == [("77", 32)]


def test_an_interruption_between_the_two_files_loses_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One new and one old file would give records to the wrong workloads."""
    write(tmp_path, ["garbage", workload_line("2")], [record_line(0), record_line(1, vector=32)])

    def interrupted(path: Path, lines: list[str]) -> None:
        replace(path, lines)
        raise KeyboardInterrupt

    replace = records._write
    monkeypatch.setattr(records, "_write", interrupted)
    with pytest.raises(KeyboardInterrupt):
        records.repair(tmp_path)
    monkeypatch.undo()
    records.repair(tmp_path)
    logs = records.read_logs(tmp_path)
    assert logs.problems == []
    assert [(record.workload, record.fields["vector"]) for record in logs.records] == [("2", 32)]


def test_prune_keeps_the_latest_of_a_candidate_the_fastest_and_those_in_use(tmp_path: Path) -> None:
    lines = [record_line(seconds=(5e-6,)), record_line(seconds=(4e-6,))]
    lines += [record_line(vector=8, seconds=(1e-6,)), record_line(vector=32, seconds=(2e-6,))]
    write(tmp_path, [workload_line(), workload_line("9")], lines)

    def medians() -> list[float]:
        return [record.median for record in records.read_logs(tmp_path).records]

    assert records.prune(tmp_path, 3) == 1
    assert medians() == [4e-6, 1e-6, 2e-6]
    in_use = records.read_logs(tmp_path).records[0].key
    assert records.prune(tmp_path, 1, [in_use]) == 1
    assert medians() == [4e-6, 1e-6]


def test_sampled_fields_need_a_trace_of_ours() -> None:
    with pytest.raises(ValueError, match="names no config"):
        sampled_fields([[], []])
    with pytest.raises(ValueError, match="damaged"):
        sampled_fields([1])


# ---- outcomes and buckets -------------------------------------------------------------------


def outcome(rows: int, source: str = "record", **changes: object) -> selection.Outcome:
    fields: dict = {
        "spec": "apply_qk_rms_norm[bfloat16->bfloat16, q=96, k=64]@x86-64-v3",
        "rows": rows,
        "workload": f"w{rows}",
        "source": source,
        "config": CpuConfig(vector=8).to_dict(),
        "default": CpuConfig().to_dict(),
        "default_us": 2.0,
        "best_us": 1.0,
        "gain": {"low": 1.5, "median": 2.0, "high": 2.5},
        "spread": 0.1,
        "trials": 3,
        "failed": 0,
        "versions": {"apache-tvm": "0.27.0", "schedule": 1},
        "date": "2026-01-01T00:00:00Z",
    }
    return selection.Outcome(**{**fields, **changes})


def test_borders_lie_half_way_between_measured_row_counts() -> None:
    assert bucket_starts([1, 16, 64, 512, 4096]) == {1: 1, 16: 4, 64: 32, 512: 181, 4096: 1448}
    assert bucket_starts([512]) == {512: 1}
    assert bucket_starts([1, 2]) == {1: 1, 2: 2}
    assert bucket_starts([]) == {}


def test_neighbours_of_one_config_are_one_bucket() -> None:
    a, b = CpuConfig(vector=8), CpuConfig(vector=16)
    buckets = [Bucket(1, a, "record"), Bucket(4, a, "record"), Bucket(32, b, "heuristic")]
    assert [(bucket.min_rows, bucket.config) for bucket in merge(buckets)] == [(32, b), (1, a)]


def test_a_row_count_whose_default_was_kept_is_not_spoken_for_by_its_neighbour() -> None:
    outcomes = {rows: (outcome(rows, source), "device") for rows, source in
                [(1, "heuristic"), (16, "record"), (64, "heuristic")]}  # fmt: skip
    buckets = from_outcomes(outcomes, CpuConfig.from_dict, lambda rows: CpuConfig())
    assert [(bucket.min_rows, bucket.source) for bucket in buckets] == [
        (32, "heuristic"),
        (4, "record"),
        (1, "heuristic"),
    ]
    assert buckets[1].describe()["record"]["gain"] == 2.0


@pytest.fixture
def logs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv(selection.ENVIRONMENT, str(tmp_path))
    (tmp_path / "device").mkdir()
    return tmp_path


def chosen(default: CpuConfig | None = None, workload: str = "w1", version: int = 1) -> list[int]:
    spec = KernelSpec(q_cols=96, k_cols=64, target="cpu")
    outcomes = selection.tuned(
        spec, "x86-64-v3", "device", schedule_version=version,
        default=lambda rows: default or CpuConfig(), workload=lambda rows: workload,
    )  # fmt: skip
    return sorted(outcomes)


def test_a_record_is_used_only_if_workload_target_versions_and_default_fit(logs: Path) -> None:
    selection.write_outcomes(logs / "device", [outcome(1)])
    assert chosen() == [1]
    assert chosen(workload="another") == []
    assert chosen(version=2) == []
    assert chosen(default=CpuConfig(vector=32)) == []
    selection.write_outcomes(
        logs / "device", [outcome(1, versions={"apache-tvm": "0.26.0", "schedule": 1})]
    )
    assert chosen() == []
    selection.write_outcomes(
        logs / "device",
        [outcome(1, spec="apply_qk_rms_norm[bfloat16->bfloat16, q=96, k=64]@x86-64-v4")],
    )
    assert chosen() == []


def test_damaged_outcomes_are_said_and_not_used(logs: Path) -> None:
    (logs / "device" / selection.FILE_NAME).write_text('{"format": 1, "outco')
    with pytest.warns(RuntimeWarning, match=r"tuned\.json is damaged"):
        assert chosen() == []


def test_digest_follows_the_outcomes(logs: Path) -> None:
    """A cached module must not outlive the records that it was built without."""
    before = selection.digest()
    selection.write_outcomes(logs / "device", [outcome(1)])
    assert selection.digest() != before


# ---- what is checked before the first trial ---------------------------------------------------


def test_default_shapes_are_those_of_the_models() -> None:
    shapes = default_shapes()
    assert len(shapes) == len(set(shapes)) == 12
    assert {(6144, 1024), (768, 128), (4096, 4096), (5120, 1024), (640, 128)} <= set(shapes)


def test_a_missing_extra_is_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(api.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(TuningError, match=r"cloudpickle and psutil, which are not installed.*pip"):
        api.check_packages("auto", remote=False)
    with pytest.raises(TuningError, match="and tornado and xgboost"):
        api.check_packages("xgb", remote=True)


def test_without_xgboost_the_model_is_random(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        api.importlib.util, "find_spec", lambda name: None if name == "xgboost" else 1
    )
    assert api.check_packages("auto", remote=True) == "random"


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"trials": 0}, ValueError, "trials must be at least 1, got 0"),
        ({"trials": 2.5}, TypeError, "trials must be an int, got float"),
        ({"rows": (0,)}, ValueError, "rows must be at least 1, got 0"),
        ({"rows": ()}, ValueError, "rows must name at least one row count"),
        ({"seed": -1}, ValueError, "seed must be 0 or more, got -1"),
        ({"cost_model": "mlp"}, ValueError, "cost_model must be one of auto, xgb, random"),
        ({"key": "cpu"}, ValueError, "key needs tracker"),
        ({"tracker": "nowhere", "key": "x"}, ValueError, "tracker must be HOST:PORT"),
        ({"tracker": "127.0.0.1:9"}, ValueError, "key must name the servers"),
        ({"specs": []}, ValueError, "specs must name at least one"),
        ({"specs": ["x"]}, TypeError, "specs must be KernelSpecs, got str"),
        ({"specs": [KernelSpec()]}, ValueError, "specs must have fixed columns"),
        (
            {"specs": [KernelSpec(q_cols=8, k_cols=8, target="cuda")]},
            ValueError,
            "specs must be for x86-64",
        ),
    ],
)
def test_wrong_arguments_are_named_before_the_first_trial(
    tmp_path: Path, arguments: dict, error: type, message: str
) -> None:
    from qknorm_tvm import tune

    with pytest.raises(error, match=message):
        tune(logs=tmp_path / "logs", **arguments)
    assert not (tmp_path / "logs").exists()


def test_no_tracker_is_said_at_once(tmp_path: Path) -> None:
    from qknorm_tvm import tune

    with pytest.raises(TuningError, match=r"no tracker at 127\.0\.0\.1:9 .*rpc_tracker --host"):
        tune(logs=tmp_path, tracker="127.0.0.1:9", key="cpu")


def test_a_missing_compiler_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from qknorm_tvm import tune

    monkeypatch.setenv("CC", "no-such-compiler")
    with pytest.raises(TuningError, match="no-such-compiler"):
        tune(logs=tmp_path)


def test_a_folder_that_is_in_use_says_by_whom(tmp_path: Path) -> None:
    code = (
        "import sys, pathlib, time\n"
        "from qknorm_tvm.tuning.folders import locked\n"
        "with locked(pathlib.Path(sys.argv[1])):\n"
        "    print('held', flush=True); time.sleep(60)\n"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path)], stdout=subprocess.PIPE, text=True
    ) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "held\n"
        with (
            pytest.raises(TuningError, match=rf"in use by process {holder.pid} on .* since 20"),
            folders.locked(tmp_path),
        ):
            pass
        holder.kill()
        holder.wait()
        # A killed holder's lock is free.
        with folders.locked(tmp_path):
            pass
