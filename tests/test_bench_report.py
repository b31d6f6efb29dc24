"""Reports of ``qknorm-tvm bench``, and comparisons of two: rows in, files and verdicts out."""

from __future__ import annotations

import dataclasses
import json
import math
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest

from qknorm_tvm import QKNormError
from qknorm_tvm.bench import plots as benchmark_plots
from qknorm_tvm.bench import report as benchmark_report
from qknorm_tvm.bench.compare import LEAST_CHANGE, cases_of, compare
from qknorm_tvm.bench.report import Row, read_csv, rows_of, write_csv
from qknorm_tvm.bench.timing import Timing
from qknorm_tvm.bench.workload import BENCHMARKS
from qknorm_tvm.cli import main

FACTS = {
    "target": "x86-64-v3",
    "config": "vector=16, row_tile=4 (heuristic)",
    "device": "A Processor, with a comma",
    "versions": "qknorm-tvm 0.1.0, numpy 2.4",
    "command": "qknorm-tvm bench --rows 1,16",
    "date": "2026-01-01T00:00:00+00:00",
}
CPU_NAMES = ("ours", "copy", "NumPy", "torch", "torch.compile", "scalar")
GPU_NAMES = ("ours", "empty kernel", "copy", "two copies", "torch", "torch.compile")
ROWS = (1, 16, 256)


def synthetic(
    *,
    threads: int = 1,
    names: Sequence[str] = CPU_NAMES,
    rows: Sequence[int] = ROWS,
    shapes: Sequence[tuple[int, int]] = ((1536, 256),),
    dtype: str = "bfloat16",
    out_dtype: str = "bfloat16",
    slower: float = 1.0,
    speed: float = 1.0,
    spread: float = 0.02,
    device: str = FACTS["device"],
    op: str = "apply_qk_rms_norm",
) -> list[Row]:
    """Return the rows of a run: the second candidate takes 10 % more than the first, and so on.

    `slower` is for ours alone, `speed` for the whole machine; `spread` is half the distance
    between quartiles.
    """
    lines = []
    for q_cols, k_cols in shapes:
        for m in rows:
            timings = []
            for index, name in enumerate(names):
                time = m * (q_cols + k_cols) * 1e-10 * (1 + index / 10) / speed
                time *= slower if name == "ours" else 1
                quartiles = time * (1 - spread), time * (1 + spread)
                exact = None if name in ("copy", "two copies", "empty kernel") else True
                timings.append(Timing(name, time, *quartiles, 100, 10, exact, ""))
            missing = Timing("absent", math.nan, math.nan, math.nan, 0, 0, None, "not installed")
            columns = {
                "op": op,
                "rows": m,
                "q_cols": q_cols,
                "k_cols": k_cols,
                "in_dtype": dtype,
                "out_dtype": out_dtype,
                "threads": threads,
                "bytes_per_call": m * (q_cols + k_cols) * (2 + 2),
            }
            lines += rows_of([*timings, missing], {**columns, **FACTS, "device": device})
    return lines


def on_gpu(**fields: object) -> list[Row]:
    return synthetic(threads=0, names=GPU_NAMES, device="NVIDIA H100 (sm_90)", **fields)  # type: ignore[arg-type]


Make = Callable[..., list[Row]]
BOTH = pytest.mark.parametrize("make", [synthetic, on_gpu], ids=["cpu", "gpu"])


def same(a: Row, b: Row) -> bool:
    return a.cells() == b.cells()


# ---- rows and their file -------------------------------------------------------------------------


@BOTH
def test_csv_round_trip(make: Make, tmp_path: Path) -> None:
    """A figure, a flag or a text that a file changes."""
    rows = make(shapes=((1536, 256), (7, 3)), out_dtype="float32")
    path = tmp_path / "r.csv"
    write_csv(path, rows)
    again = read_csv(path)
    assert len(again) == len(rows)
    assert all(map(same, rows, again))
    absent = again[-1]
    assert not absent.measured
    assert math.isnan(absent.median_us)
    assert absent.exact is None
    assert again[0].exact is True


def test_share_of_copy_is_of_the_same_case() -> None:
    ours, copy, *_ = synthetic(rows=(16,))
    assert copy.share_of_copy == 1.0
    assert ours.share_of_copy == pytest.approx(1.1)
    assert ours.ratio_to_copy == pytest.approx(1 / 1.1, abs=1e-4)
    assert ours.bandwidth_GB_per_s == pytest.approx(ours.bytes_per_call / ours.median_us / 1e3)


def test_files_of_earlier_versions_can_be_read(tmp_path: Path) -> None:
    """An old run that cannot be compared with, for columns that the comparison does not need."""
    path = tmp_path / "r.csv"
    write_csv(path, synthetic())
    lines = path.read_text().splitlines()
    # The last five columns hold no comma.
    path.write_text("\n".join(line.rsplit(",", 5)[0] for line in lines) + "\n")
    again = read_csv(path)
    assert again[0].median_us == synthetic()[0].median_us
    assert again[0].command == ""
    assert math.isnan(again[0].share_of_copy)
    assert math.isnan(again[0].worst_us)
    assert again[0].op == "apply_qk_rms_norm"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "without the column q_cols"),
        ("a,b\n1,2\n", "must be a file that qknorm-tvm bench wrote"),
        (",".join(benchmark_report.COLUMNS) + "\n", "must hold timings, got none"),
    ],
    ids=["empty", "another", "no rows"],
)
def test_files_that_are_no_results_are_refused(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "r.csv"
    path.write_text(text)
    with pytest.raises(ValueError, match=message):
        read_csv(path)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        (",16,bfloat16", ",many,bfloat16", "line 9: rows must be a number, got 'many'"),
        (",True,", ",maybe,", "line 2: exact must be True, False or empty, got 'maybe'"),
    ],
)
def test_a_damaged_cell_is_named(tmp_path: Path, old: str, new: str, message: str) -> None:
    path = tmp_path / "r.csv"
    write_csv(path, synthetic())
    path.write_text(path.read_text().replace(old, new, 1))
    with pytest.raises(ValueError, match=message):
        read_csv(path)


# ---- the page ------------------------------------------------------------------------------------


@BOTH
def test_page_holds_figures_pictures_and_how_they_came_about(make: Make) -> None:
    rows = make(shapes=((1536, 256), (6144, 1024)))
    host = [Timing("module", 1e-6, 0.9e-6, 1.1e-6, 9, 9, None, "")]
    page = benchmark_report.page(
        rows, [("a picture", "p.png")], host_timings=host, warning="load average 9"
    )
    for text in ("**load average 9**", "![a picture](p.png)", *FACTS["versions"].split(", ")):
        assert text in page
    assert FACTS["command"] in page
    assert rows[0].device in page
    where = "GPU" if rows[0].threads == 0 else "1 thread"
    assert f"## 1536/256 bfloat16, {where}" in page
    assert f"## 6144/1024 bfloat16, {where}" in page
    assert "| 256 | **45.88** (44.96-46.79) |" in page
    assert "* absent: not installed" in page
    table = [line for line in page.splitlines() if line.startswith("|")]
    assert all(line.count("|") >= 3 for line in table)


def test_page_says_where_a_result_is_not_exact() -> None:
    rows = [dataclasses.replace(row, exact=False) for row in synthetic(names=("ours", "copy"))]
    assert benchmark_report.page(rows, []).count("not exact") >= len(ROWS)


# ---- pictures ------------------------------------------------------------------------------------


@BOTH
def test_pictures_show_every_candidate_and_say_their_units(make: Make) -> None:
    pytest.importorskip("matplotlib", reason="draws with matplotlib, which is not installed")
    rows = make(shapes=((1536, 256), (6144, 1024)))
    where = "GPU" if rows[0].threads == 0 else "1-thread"
    pictures = benchmark_plots.pictures(rows)
    assert list(pictures) == [
        f"roof-bfloat16-{where}",
        f"alternatives-1536-256-bfloat16-{where}",
        f"alternatives-6144-1024-bfloat16-{where}",
    ]
    _, figure = pictures[f"alternatives-1536-256-bfloat16-{where}"]
    times, shares = figure.axes
    assert (times.get_xscale(), times.get_yscale()) == ("log", "log")
    assert times.get_ylabel() == "time of a call (µs)"
    assert times.get_xlabel() == shares.get_xlabel() == "M (rows)"
    assert shares.get_ylabel() == "share of a copy's bandwidth (%)"
    names = [name for name in dict.fromkeys(row.candidate for row in rows) if name != "absent"]
    assert times.get_legend_handles_labels()[1] == names
    drawn = [name for name in names if name != "empty kernel"]  # it moves nothing
    assert shares.get_legend_handles_labels()[1] == drawn
    # A bar of quartiles for each, through the median.
    ours = times.containers[0]
    assert list(ours.lines[0].get_ydata()) == [
        row.median_us for row in rows if row.candidate == "ours" and row.q_cols == 1536
    ]
    assert all(bars.has_yerr for bars in times.containers)
    _, roof = pictures[f"roof-bfloat16-{where}"]
    assert len(roof.axes) == 2
    assert roof.axes[0].get_ylabel() == "bytes moved (GB/s)"
    first = next(row for row in rows if row.candidate == "copy")
    (line, *_), *_ = (c.lines for c in roof.axes[0].containers)
    assert line.get_ydata()[0] == pytest.approx(first.bandwidth_GB_per_s, rel=1e-3)
    labels = [text.get_text() for text in roof.axes[0].texts]
    share = rows[0].share_of_copy
    assert labels == [f"{share:.0%}"] * len(ROWS)


@BOTH
def test_report_writes_files_that_the_page_names(make: Make, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="draws with matplotlib, which is not installed")
    from matplotlib.image import imread

    folder = tmp_path / "report"
    rows = make()
    written = benchmark_plots.write_report(folder, rows)
    assert sorted(written) == sorted(folder.iterdir())
    page = (folder / "README.md").read_text()
    pictures = [path for path in written if path.suffix == ".png"]
    assert len(pictures) == 2
    for path in pictures:
        assert f"({path.name})" in page
        image = imread(path)
        assert image.shape[0] > 400
        assert image.shape[1] > 600
        # Lines of several colours, not an empty frame.
        colours = np.round(image[..., :3] * 255).astype(np.int32) @ (1, 1 << 8, 1 << 16)
        assert np.unique(colours).size > 50
    assert len(read_csv(folder / "results.csv")) == len(rows)


def test_pictures_of_one_m_and_of_runs_without_a_copy() -> None:
    pytest.importorskip("matplotlib", reason="draws with matplotlib, which is not installed")
    assert len(benchmark_plots.pictures(synthetic(rows=(1,)))) == 2
    assert len(benchmark_plots.pictures(synthetic(names=("ours",)))) == 2


def test_without_matplotlib_one_sentence_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Ten minutes of measuring, then a traceback."""
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(QKNormError, match=r"pip install 'qknorm-tvm\[bench\]'"):
        benchmark_plots.write_report(tmp_path / "report", synthetic())
    assert main(["bench", "--report", str(tmp_path / "report")]) == 2
    assert capsys.readouterr().err == (
        "Error: pictures need matplotlib, which is not installed: pip install 'qknorm-tvm[bench]'\n"
    )
    assert not (tmp_path / "report").exists()


# ---- comparisons ---------------------------------------------------------------------------------


@BOTH
def test_compare_finds_a_slowdown_beyond_the_spread(make: Make) -> None:
    comparison = compare(make(), make(slower=1.2))
    assert [change.verdict for change in comparison.changes] == ["slower"] * len(ROWS)
    assert all(change.change == pytest.approx(0.2, abs=1e-3) for change in comparison.changes)
    assert [change.verdict for change in compare(make(slower=1.2), make()).changes] == [
        "faster"
    ] * len(ROWS)


@BOTH
def test_compare_ignores_a_slower_machine(make: Make) -> None:
    """A busy hour that reads as a regression."""
    assert not compare(make(), make(speed=0.5)).slower
    assert len(compare(make(), make(speed=2.0, slower=1.2)).slower) == len(ROWS)


@BOTH
def test_compare_ignores_noise_within_the_spread(make: Make) -> None:
    assert not compare(make(spread=0.1), make(spread=0.1, slower=1.19)).slower
    assert not compare(make(spread=0.001), make(spread=0.001, slower=1 + LEAST_CHANGE * 0.9)).slower


def test_compare_says_where_noise_hides_everything() -> None:
    """A run on a busy machine that reads as: nothing got slower."""
    comparison = compare(synthetic(), synthetic(spread=0.2, slower=1.25))
    assert [change.verdict for change in comparison.changes] == ["unclear"] * len(ROWS)
    assert len(comparison.unclear) == len(ROWS)
    assert not comparison.slower


def test_compare_names_rows_without_a_partner() -> None:
    comparison = compare(synthetic(rows=(1, 16)), synthetic(rows=(16, 256)))
    assert [change.row.rows for change in comparison.changes] == [16]
    assert comparison.only_old == ["M = 1, 1536/256 bfloat16, 1 thread"]
    assert comparison.only_new == ["M = 256, 1536/256 bfloat16, 1 thread"]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"op": "qk_rms_norm"}, "share operations to be compared, got apply_.* and qk_rms_norm"),
        ({"device": "Another"}, "share devices to be compared, got A Processor, .* and Another"),
        ({"threads": 2}, "share threads to be compared, got 1 and 2"),
        ({"dtype": "float16"}, "share dtypes to be compared, got bfloat16 and float16"),
        ({"out_dtype": "float32"}, "share out dtypes to be compared, got bfloat16 and float32"),
        ({"rows": (7,)}, "share values of M to be compared, got 1, 16, 256 and 7"),
        ({"names": ("ours",)}, "new run must hold timings of ours and of the copy, got none"),
    ],
)
def test_compare_refuses_runs_that_cannot_be_compared(
    fields: dict[str, object], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        compare(synthetic(), synthetic(**fields))  # type: ignore[arg-type]


def test_compare_refuses_a_case_that_is_there_twice() -> None:
    with pytest.raises(ValueError, match="new run must hold each case once, got two: M = 1, "):
        compare(synthetic(), synthetic() * 2)


def test_compare_tells_misaligned_rows_from_aligned_ones() -> None:
    def misaligned(row: Row) -> Row:
        note = "rows at every alignment" if row.candidate == "ours" else row.note
        return dataclasses.replace(row, note=note)

    with pytest.raises(ValueError, match="share notes to be compared"):
        compare(on_gpu(), [misaligned(row) for row in on_gpu()])


def test_compare_says_what_else_differs() -> None:
    new = [dataclasses.replace(row, versions="numpy 3") for row in synthetic()]
    assert compare(synthetic(), new).differences == [f"versions: {FACTS['versions']} -> numpy 3"]


@pytest.mark.parametrize(("slower", "status"), [(1.0, 0), (1.2, 1)])
def test_compare_command_on_two_files(
    slower: float, status: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    old, new = tmp_path / "old.csv", tmp_path / "new.csv"
    write_csv(old, synthetic(rows=(1, 16)))
    write_csv(new, synthetic(rows=(16, 256), slower=slower))
    given = ["bench", "--compare", str(old), "--against", str(new)]
    assert main(given) == status
    shown = capsys.readouterr().out
    assert "no partner, only in the old run: M = 1, 1536/256 bfloat16, 1 thread" in shown
    assert ("SLOWER" in shown) == bool(status)
    if status:
        assert "slower beyond the noise: 1 case of 1" in shown
        assert "  M = 16, 1536/256 bfloat16, 1 thread: 0.91 -> 1.09 of the copy's time" in shown
    else:
        assert "slower beyond the noise: nothing of 1" in shown
    assert main([*given, "--json"]) == status
    comparison = json.loads(capsys.readouterr().out)["comparison"]
    assert [case["verdict"] for case in comparison["cases"]] == ["slower" if status else "same"]


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--against", __file__], "--against needs --compare OLD.csv"),
        (["--cold", "--compare", __file__], "--cold excludes --report and --compare"),
        (["--compare", __file__], "must be a file that qknorm-tvm bench wrote"),
        (["--compare", "/nowhere.csv"], "does not exist"),
    ],
)
def test_compare_command_refuses_wrong_input(
    more: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["bench", *more]) == 2
    assert message in " ".join(capsys.readouterr().err.split())


def test_compare_command_refuses_another_device(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    old = tmp_path / "old.csv"
    write_csv(old, synthetic())
    assert main(["bench", "--compare", str(old)]) == 2
    assert "share devices to be compared, got A Processor" in capsys.readouterr().err
    with pytest.raises(ValueError, match="the old run is a GPU's: say --device cuda"):
        cases_of(on_gpu(), on_gpu=False)
    with pytest.raises(ValueError, match="the old run is a CPU's: leave out --device cuda"):
        cases_of(synthetic(), on_gpu=True)
    options = cases_of(on_gpu(shapes=((1536, 256), (8, 8)), out_dtype="float32"), on_gpu=True)
    assert options == {
        "ops": ("apply_qk_rms_norm",),
        "shapes": ((1536, 256), (8, 8)),
        "rows": ROWS,
        "dtypes": ("bfloat16",),
        "out_dtype": "float32",
        "threads": None,
    }


# ---- a real run ----------------------------------------------------------------------------------


def test_report_and_compare_end_to_end(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("matplotlib", reason="draws with matplotlib, which is not installed")
    folder = tmp_path / "report"
    measured = ["--shapes", "24/8", "--rows", "1,16", "--threads", "1", "--min-time", "0"]
    measured += ["--no-torch-compile", "--no-host"]
    assert main(["bench", *measured, "--report", str(folder)]) == 0
    assert f"wrote {folder / 'README.md'}" in capsys.readouterr().out.replace("\n", "")
    rows = read_csv(folder / "results.csv")
    candidates = BENCHMARKS["apply_qk_rms_norm"].candidates("cpu")
    names = ["ours", *(name for name in candidates if name != "torch.compile")]
    assert [row.candidate for row in rows] == names * 2
    assert all(
        math.isnan(row.worst_us) == (row.candidate not in ("ours", "copy", "scalar"))
        for row in rows
    )
    assert {row.rows for row in rows} == {1, 16}
    assert rows[0].command == f"qknorm-tvm bench {' '.join(measured)} --report DIR"
    assert rows[0].exact
    assert len(list(folder.glob("*.png"))) == 2
    # The same cases once more; of what is this short the verdict means nothing.
    old = str(folder / "results.csv")
    assert main(["bench", "--compare", old, "--min-time", "0", "--json"]) in (0, 1)
    answer = json.loads(capsys.readouterr().out)
    assert [line["candidate"] for line in answer["timings"]] == ["ours", "copy"] * 2
    assert len(answer["comparison"]["cases"]) == 2
    assert not answer["comparison"]["only_old"]
