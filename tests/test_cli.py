"""The command line: output, exit statuses, and one clear sentence for bad input."""

from __future__ import annotations

import csv
import dataclasses
import itertools
import json
import math
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import click
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file
from support import base_of, smallest

from qknorm_tvm import KernelSpec
from qknorm_tvm import compile as compile_specs
from qknorm_tvm.bench import cuda as bench_cuda
from qknorm_tvm.bench.cpu import OFFSETS, CpuWorkload
from qknorm_tvm.bench.harness import workload_of_rows
from qknorm_tvm.bench.timing import Candidate, measure
from qknorm_tvm.bench.torch_compile import torch_compile
from qknorm_tvm.bench.workload import BENCHMARKS, random_inputs
from qknorm_tvm.call import cache
from qknorm_tvm.check import (
    cases,
    layouts,
    reference,
    special_values,
    sweep,
    verification,
    verification_cuda,
)
from qknorm_tvm.check.inputs import Activations, generate, read_activations
from qknorm_tvm.cli import main
from qknorm_tvm.cli.app import commands
from qknorm_tvm.cli.modules import with_op
from qknorm_tvm.load.module import Module, load
from qknorm_tvm.operations import OPERATIONS
from qknorm_tvm.targets import host_cpu_target

BFLOAT16 = ml_dtypes.bfloat16


def arrays(rows: int = 5, q_cols: int = 24, k_cols: int = 8) -> dict[str, np.ndarray]:
    a = generate(rows, q_cols, k_cols, "bfloat16")
    return {"q": a.q, "k": a.k, "gamma_q": a.gamma_q, "gamma_k": a.gamma_k}


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small module with two specs; bfloat16 first."""
    spec = KernelSpec(q_cols=24, k_cols=8, target=host_cpu_target())
    path = tmp_path_factory.mktemp("modules") / "two.so"
    compile_specs([spec, spec.replace(out_dtype="float32")]).export(path)
    return path


@pytest.fixture(scope="module")
def module(exported: Path) -> Module:
    return load(exported)


def in_process_without_torch(*arguments: str, folder: Path) -> subprocess.CompletedProcess[str]:
    """Run the command line where torch cannot be found."""
    (folder / "sitecustomize.py").write_text("import sys\nsys.modules['torch'] = None\n")
    path = os.pathsep.join([str(folder), os.environ.get("PYTHONPATH", "")])
    code = "import sys; from qknorm_tvm.cli import main; sys.exit(main())"
    return subprocess.run(
        [sys.executable, "-c", code, *arguments],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "PYTHONPATH": path},
    )


# ---- the group ---------------------------------------------------------------------------------


def test_help_lists_every_command_and_imports_neither_tvm_nor_numpy() -> None:
    """A slow ``--help`` is one that nobody reads."""
    code = (
        "import sys; from qknorm_tvm.cli import main; status = main(['--help']); "
        "print(status, sorted({'tvm', 'numpy', 'rich', 'torch'} & set(sys.modules)))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    ).stdout
    assert done.endswith("0 []\n")
    for command in ("run", "export", "pack", "inspect", "verify", "bench", "cache"):
        assert f"\n  {command} " in done


def test_python_m_is_the_command_line() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "qknorm_tvm", "nothing"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 2
    assert "Usage: qknorm-tvm" in done.stderr
    assert "No such command 'nothing'" in done.stderr


@pytest.mark.parametrize("missing", [("click", "rich"), ("rich",)])
def test_without_its_packages_one_sentence_says_what_to_install(missing: tuple[str, ...]) -> None:
    """A traceback from the console script of a run-time install."""
    code = f"import sys; sys.modules.update(dict.fromkeys({missing})); " + (
        "from qknorm_tvm.cli import main; sys.exit(main(['run']))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr == (
        f"Error: the command line needs {' and '.join(missing)}: "
        "pip install 'qknorm-tvm[compile]'\n"
    )


def test_importing_the_package_imports_no_half_that_may_be_missing() -> None:
    """An engine that pays for TVM, or fails without it, at import."""
    code = (
        "import sys; import qknorm_tvm, qknorm_tvm.call.packs; print(sorted("
        "{'tvm', 'tvm_ffi', 'click', 'rich', 'ml_dtypes', 'filelock', 'platformdirs', "
        "'safetensors', 'torch', 'numpy'} & set(sys.modules)))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    ).stdout
    assert done == "[]\n"


def every_command(command: click.Command, name: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    """Yield the words of a command, and of those below it."""
    yield name
    if isinstance(command, click.Group):
        context = click.Context(command)
        for child in command.list_commands(context):
            below = command.get_command(context, child)
            assert below is not None
            yield from every_command(below, (*name, child))


@pytest.mark.parametrize("columns", [60, 80])
def test_help_of_every_command_fits_a_narrow_terminal(
    columns: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Examples and tables are not wrapped: their lines were up to 100 columns wide."""
    monkeypatch.setenv("COLUMNS", str(columns))
    names = list(every_command(commands))
    assert {(), ("bench-layer",), ("tune",), ("logs", "list"), ("cache", "clear")} <= set(names)
    too_wide = {}
    for name in names:
        assert main([*name, "--help"]) == 0
        shown = capsys.readouterr().out
        assert "Usage: " in shown
        if wide := [line for line in shown.splitlines() if len(line) > columns]:
            too_wide[name] = wide
    assert too_wide == {}


@pytest.mark.parametrize("command", ["run", "export", "pack", "inspect", "verify", "bench"])
def test_every_command_has_help_with_examples(
    command: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([command, "--help"]) == 0
    assert f"Examples:\n    qknorm-tvm {command}" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nothing"], "No such command 'nothing'"),
        (["run", "--rows", "1,x"], "must be numbers separated by commas, got '1,x'"),
        (["run", "--dtype", "int8"], "'int8' is not one of"),
        (["run", "--target", "native"], "target must be 'cpu', a level"),
        (["run", "--target", "cuda"], "--target must be a CPU's for --device cpu, got cuda"),
        (["run", "--output", "/nowhere/a.so"], "the folder /nowhere does not exist"),
        (["export", "/nowhere/a.so"], "the folder /nowhere does not exist"),
        (["export", "a.so", "--q-cols", "some"], "must be a number of columns or 'any'"),
        (["export", "a.so", "--q-cols", "0"], "q_cols must be from 1 to"),
        (["export", "a.so", "--spec", "x"], "spec must look like"),
        (["export", "a.so", "--spec", "x", "--dtype", "float16"], "--dtype and --spec exclude"),
        (["export", "a.so", "--config", "colour=red"], "NAME one of vector, row_tile"),
        (["export", "a.so", "--config", "vector=x"], "vector must be a number, got 'x'"),
        (["export", "a.so", "--config", "vector=3"], "vector must be a power of two, got 3"),
        (
            ["export", "a.so", "--op", "row_mean_of_squares_qk", "--config", "vector=8"],
            "config must not have vector for row_mean_of_squares_qk[",
        ),
        (
            ["export", "a.so", "--dtype", "float32", "--config", "rounding=mask"],
            "config must not have rounding for apply_qk_rms_norm[float32->float32",
        ),
        (["export", "a.txt"], "a.txt must be named *.so"),
        (["run", "--output", "a.txt"], "a.txt must be named *.so"),
        (["pack", "out"], "Missing option '--models'"),
        (["pack", "out", "--models", "gpt-2"], "models must be of minimax-m2"),
        (["pack", "out", "--models", "olmoe,"], "must be names separated by commas"),
        (["pack", "/nowhere/out", "--models", "olmoe"], "the folder /nowhere does not exist"),
        (
            ["pack", "out", "--models", "olmo2-13b", "--tensor-parallel", "16"],
            "olmo2-13b has no layer for 16 ranks",
        ),
        (
            ["pack", "out", "--models", "olmoe", "--targets", "cpu,aarch64", "--wheel", "dist"],
            "targets must be of one machine for a wheel",
        ),
        (["inspect", "/nowhere/a.so"], "/nowhere/a.so: No such file or directory"),
        (["inspect", __file__], "is not a qknorm-tvm module"),
        (["verify", "/nowhere/a.so"], "/nowhere/a.so: No such file or directory"),
        (["verify", __file__], "is not a qknorm-tvm module"),
        (["verify", __file__, "--float32-sweep"], "--float32-sweep and FILE.so exclude"),
        (["bench", "--shapes", "8x8"], "must look like 1536/256,6144/1024"),
        (["bench", "--rows", "0"], "must be 1 or more, got '0'"),
        (["bench", "--csv", "/nowhere/a.csv"], "the folder /nowhere does not exist"),
    ],
)
def test_bad_arguments_exit_with_2_and_say_why(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments) == 2
    said = capsys.readouterr()
    assert message in said.err
    assert "Traceback" not in said.err
    assert said.out == ""


@pytest.mark.frameworks
@pytest.mark.parametrize("command", ["run", "verify", "bench"])
def test_cuda_without_a_gpu_is_refused_at_once(
    command: str, capsys: pytest.CaptureFixture[str]
) -> None:
    torch = pytest.importorskip("torch")
    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    assert main([command, "--device", "cuda"]) == 2
    assert "--device cuda needs torch with CUDA" in capsys.readouterr().err


# ---- export and inspect ------------------------------------------------------------------------


def test_export_writes_what_inspect_reads(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "a.so"
    target = host_cpu_target()
    texts = [
        f"apply_qk_rms_norm[bfloat16->bfloat16, q=24, k=8]@{target}",
        f"apply_qk_rms_norm[float16->float32, q=any, k=any]@{target}",
    ]
    config = ["--config", "vector=8", "--config", "row_tile=2"]
    assert main(["export", str(out), "--spec", texts[0], "--spec", texts[1], *config]) == 0
    assert f"wrote {out}" in capsys.readouterr().out

    assert main(["inspect", str(out)]) == 0
    shown = capsys.readouterr().out
    for text in [*texts, "yes, with its code for", "vector=8", "row_tile=2"]:
        assert text in shown

    assert main(["inspect", str(out), "--json"]) == 0
    metadata = json.loads(capsys.readouterr().out)
    assert [KernelSpec(**fields).text for fields in metadata["specs"]] == texts
    assert metadata["runs_here"] is True
    assert metadata["file"] == {"path": str(out), "bytes": out.stat().st_size}


def test_inspect_refuses_a_file_that_was_altered(
    exported: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = bytearray(exported.read_bytes())
    data[len(data) // 2] ^= 1
    (tmp_path / "bad.so").write_bytes(data)
    assert main(["inspect", str(tmp_path / "bad.so")]) == 2
    assert "is damaged" in capsys.readouterr().err


@pytest.mark.parametrize("columns", [60, 80])
def test_inspect_fits_a_narrow_terminal(
    columns: int,
    exported: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("COLUMNS", str(columns))
    monkeypatch.chdir(exported.parent)
    assert main(["inspect", exported.name]) == 0
    shown = capsys.readouterr().out
    assert [line for line in shown.splitlines() if len(line.rstrip()) > columns] == []
    for header in ("code", "spec", "from M", "config; variants"):
        assert header in shown


def test_config_changes_the_heuristics_choices(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """One field named, and every other lost to the dataclass's defaults."""
    from qknorm_tvm.schedules.cpu_config import default_config
    from qknorm_tvm.targets import X86_LEVELS

    spec = KernelSpec(q_cols=24, k_cols=8)
    assert (
        main(["export", str(tmp_path / "a.so"), "--spec", spec.text, "--config", "row_tile=3"]) == 0
    )
    capsys.readouterr()
    assert main(["inspect", str(tmp_path / "a.so"), "--json"]) == 0
    levels = json.loads(capsys.readouterr().out)["levels"]
    assert [level["name"] for level in levels] == list(X86_LEVELS)
    for level in levels:
        expected = default_config(spec, frozenset(level["features"])).to_dict()
        (code,) = level["code"]
        assert code["config"] == {**expected, "row_tile": 3}
        assert code["source"] == "user"


# ---- the cache ---------------------------------------------------------------------------------


def test_cache_is_listed_and_cleared(
    exported: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    folder = tmp_path / "cache"
    monkeypatch.setenv("QKNORM_TVM_CACHE_DIR", str(folder))
    monkeypatch.setenv("COLUMNS", "60")
    assert main(["cache", "list"]) == 0
    assert f"0 modules, 0.0 kB in {folder}" in capsys.readouterr().out
    assert not folder.exists(), "a list that makes a folder"

    spec = KernelSpec(in_dtype="float32", q_cols=33, k_cols=7)
    current = cache.cache_directory() / cache.cache_key(spec)
    old = folder / f"{spec.digest}-{'0' * 24}.so"
    for path in (current, old):
        shutil.copy(smallest(), path)
    damaged = folder / f"{spec.digest}-{'1' * 24}.so"
    damaged.write_text("")
    damaged.with_suffix(".lock").touch()
    stranger = folder / "notes.so"
    stranger.write_text("")
    (folder / "run").mkdir()
    from_run = folder / "run" / "of-run.so"
    shutil.copy(smallest(), from_run)

    assert main(["cache", "list"]) == 0
    shown = capsys.readouterr().out
    assert [line for line in shown.splitlines()[:-1] if len(line.rstrip()) > 60] == []
    assert [state for state in ("in use", "old", "damaged", "from run") if state not in shown] == []
    assert f"4 modules, {3 * current.stat().st_size / 1000:.1f} kB in {folder}" in shown

    assert main(["cache", "clear", "--old"]) == 0
    assert "deleted 2 modules" in capsys.readouterr().out
    left = {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}
    assert left == {current.name, "notes.so", "run/of-run.so"}

    assert main(["cache", "clear"]) == 0
    assert "deleted 2 modules" in capsys.readouterr().out
    assert [path.name for path in folder.rglob("*") if path.is_file()] == ["notes.so"]


def test_cache_of_somebody_else_is_not_cleared(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("QKNORM_TVM_CACHE_DIR", str(tmp_path))
    tmp_path.chmod(0o777)
    assert main(["cache", "clear"]) == 2
    assert "others may write to" in capsys.readouterr().err


def test_pack_writes_a_folder_and_a_wheel(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, dist = tmp_path / "modules", tmp_path / "dist"
    command = ["pack", str(out), "--models", "olmoe", "--tensor-parallel", "16,32"]
    command += ["--targets", host_cpu_target(), "--wheel", str(dist)]
    assert main(command) == 0
    said = capsys.readouterr()
    assert "skipped: olmoe has no layer for 32 ranks" in said.err
    assert "wrote 1 module (" in said.out
    (wheel,) = dist.iterdir()
    assert str(wheel) in said.out
    assert {path.suffix for path in out.iterdir()} == {".so", ".json"}
    assert main(command) == 2
    assert "OUT must be a new or an empty folder" in capsys.readouterr().err


# ---- run ---------------------------------------------------------------------------------------

QUICK = ["--min-time", "0", "--no-torch-compile"]


def test_run_proves_and_times_in_a_fresh_process(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "a.so"
    shape = ["--q-cols", "24", "--k-cols", "8", "--rows", "0,1,5", "--out-dtype", "float32"]
    assert main(["run", *shape, *QUICK, "--threads", "2", "--output", str(out)]) == 0
    shown = capsys.readouterr().out
    assert "without the compiler" in shown
    assert "DIFFERS" not in shown
    assert shown.count(" equal ") >= 3
    assert str(out) in shown
    for text in ("ours", "copy", "NumPy", "torch", "GB/s", "row_tile=", host_cpu_target()):
        assert text in shown
    assert load(out).specs == [
        KernelSpec(q_cols=24, k_cols=8, out_dtype="float32", target=host_cpu_target())
    ]


def test_run_without_a_cache_folder_uses_a_temporary_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A home that cannot be written to."""
    (tmp_path / "file").touch()
    monkeypatch.setenv("QKNORM_TVM_CACHE_DIR", str(tmp_path / "file" / "cache"))
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    monkeypatch.setenv("COLUMNS", "60")
    shape = ["--q-cols", "24", "--k-cols", "8", "--rows", "1", "--threads", "1"]
    assert main(["run", *shape, *QUICK]) == 0
    shown = capsys.readouterr().out
    assert f"module    {tmp_path}/qknorm-tvm-run-" in shown
    wide = [line for line in shown.splitlines() if len(line.rstrip()) > 60]
    assert [line for line in wide if not line.startswith("module ")] == []
    for header in ("GB/s", "/ copy", "/ ours", "exact"):
        assert header in shown


def test_run_takes_real_activations(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "a.safetensors"
    held = arrays()
    held["gamma_q"] = held["gamma_q"].astype(BFLOAT16)
    save_file(held, str(path))
    assert main(["run", "--input", str(path), *QUICK]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert "q=24, k=8" in shown
    assert "gamma_q is bfloat16: widened to float32" in shown
    assert "qk_var is not in the file: computed" in shown
    assert main(["run", "--input", str(path), "--rows", "3"]) == 2
    assert "--rows and --input exclude each other" in capsys.readouterr().err


def test_run_reports_an_error_of_the_fresh_process(
    capsys: pytest.CaptureFixture[str],
) -> None:
    shape = ["--q-cols", "24", "--k-cols", "8", "--rows", "1"]
    assert main(["run", *shape, *QUICK, "--epsilon", "nan"]) == 2
    said = capsys.readouterr().err
    assert "in the fresh process: epsilon must be a number, got nan" in said
    assert "Traceback" not in said


@pytest.mark.slow
def test_run_without_torch_says_so_and_succeeds(tmp_path: Path) -> None:
    shape = ["--q-cols", "24", "--k-cols", "8", "--rows", "1", "--threads", "2"]
    done = in_process_without_torch("run", *shape, "--min-time", "0", folder=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "not installed" in done.stdout
    assert "torch: torch is not installed" in done.stdout


# ---- input files -------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["npz", "safetensors"])
def test_both_kinds_of_file_give_the_arrays_bit_for_bit(kind: str, tmp_path: Path) -> None:
    """NumPy stores ml_dtypes' bfloat16 as raw bytes, so it comes back as no type at all."""
    held = {**arrays(), "qk_var": np.ones((5, 2), np.float32), "unrelated": np.zeros(3)}
    path = tmp_path / f"a.{kind}"
    np.savez(path, **held) if kind == "npz" else save_file(held, str(path))
    a = read_activations(path, epsilon=0.5)
    assert a.epsilon == 0.5
    assert a.notes == ()
    for name in ("q", "k", "gamma_q", "gamma_k", "qk_var"):
        read = getattr(a, name)
        assert read.dtype == held[name].dtype
        assert read.tobytes() == held[name].tobytes()


def test_qk_var_is_computed_as_the_reference_does(tmp_path: Path) -> None:
    held = arrays(rows=1030)
    np.savez(tmp_path / "a.npz", **held)
    a = read_activations(tmp_path / "a.npz")
    expected = [reference.mean_of_squares(held[name]) for name in "qk"]
    assert np.array_equal(a.qk_var, np.stack(expected, axis=1))


def _q3d(a: dict) -> None:
    a["q"] = a["q"].reshape(5, 3, 8)


BAD_ARRAYS: dict[str, tuple[Callable[[dict], object], str]] = {
    "missing": (lambda a: a.pop("gamma_k"), "gamma_k missing, it holds gamma_q, k, q"),
    "3-D": (_q3d, r"q must have 2 dimensions, \[rows, columns\], got 3, \[5, 3, 8\]: join"),
    "rows": (lambda a: a.update(k=a["k"][:2]), "k must have 5 rows like q, got 2"),
    "dtypes": (
        lambda a: a.update(k=a["k"].astype(np.float16)),
        "k must be bfloat16 like q, got float16",
    ),
    "float64": (
        lambda a: a.update(q=a["q"].astype(np.float64)),
        "q must be bfloat16, float16 or float32, got float64",
    ),
    "uint16": (
        lambda a: a.update(q=a["q"].view(np.uint16)),
        r"got uint16 \(save bfloat16 as ml_dtypes.bfloat16\)",
    ),
    "gamma shape": (
        lambda a: a.update(gamma_q=a["gamma_q"][:3]),
        r"gamma_q must be \[24\], one scale a column of q, got \[3\]",
    ),
    "gamma dtype": (
        lambda a: a.update(gamma_k=a["gamma_k"].astype(np.float64)),
        "gamma_k must be float32, bfloat16 or float16, got float64",
    ),
    "qk_var shape": (
        lambda a: a.update(qk_var=np.ones((5, 3), np.float32)),
        r"qk_var must be \[5, 2\], got \[5, 3\]",
    ),
    "qk_var dtype": (
        lambda a: a.update(qk_var=np.ones((5, 2), BFLOAT16)),
        "qk_var must be float32, got bfloat16",
    ),
}


@pytest.mark.parametrize("kind", ["npz", "safetensors"])
@pytest.mark.parametrize("case", BAD_ARRAYS)
def test_bad_arrays_are_named(case: str, kind: str, tmp_path: Path) -> None:
    change, message = BAD_ARRAYS[case]
    held = arrays()
    change(held)
    path = tmp_path / f"a.{kind}"
    np.savez(path, **held) if kind == "npz" else save_file(held, str(path))
    with pytest.raises((TypeError, ValueError), match=message) as raised:
        read_activations(path)
    assert str(raised.value).startswith(str(path))


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", b"", "must be a .safetensors or .npz file, got extension '.txt'"),
        ("a", b"", "got no extension"),
        ("a.npz", b"hello", "cannot be read as .npz: it is no zip file"),
        ("a.npz", b"", "cannot be read as .npz"),
        ("a.safetensors", b"hello world, hello", "cannot be read as safetensors"),
        ("a.safetensors", b"", "cannot be read as safetensors"),
    ],
)
def test_broken_files_exit_with_2(
    name: str, content: bytes, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / name).write_bytes(content)
    assert main(["run", "--input", str(tmp_path / name)]) == 2
    said = capsys.readouterr().err
    assert message in said
    assert "Traceback" not in said


@pytest.mark.parametrize("kind", ["npz", "safetensors"])
def test_truncated_files_are_refused(kind: str, tmp_path: Path) -> None:
    complete, truncated = tmp_path / f"complete.{kind}", tmp_path / f"truncated.{kind}"
    np.savez(complete, **arrays()) if kind == "npz" else save_file(arrays(), str(complete))
    truncated.write_bytes(complete.read_bytes()[:-100])
    with pytest.raises(ValueError, match="cannot be read as"):
        read_activations(truncated)


def test_a_missing_file_is_said_to_be_missing(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no such file"):
        read_activations(tmp_path / "a.npz")


# ---- verify ------------------------------------------------------------------------------------


def test_verify_passes_an_exported_file(
    exported: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A table whose names wrap, so that nobody can search for them."""
    monkeypatch.setenv("COLUMNS", "80")
    assert main(["verify", str(exported)]) == 0
    shown = capsys.readouterr().out
    assert "EXACT: every output equals" in shown
    assert "every bfloat16 pattern" in shown
    assert "shapes and layouts" in shown


def test_verify_fails_where_a_result_differs(
    exported: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A verification that cannot fail proves nothing: the reference is off by one bit here."""
    original = reference.rms_norm

    def off_by_one_bit(*arguments: object, **how: object) -> np.ndarray:
        out = original(*arguments, **how)  # type: ignore[arg-type]
        if out.size > 40:
            out.view(f"u{out.itemsize}")[2, 3] ^= 1
        return out

    monkeypatch.setattr(reference, "rms_norm", off_by_one_bit)
    assert main(["verify", str(exported)]) == 1
    shown = capsys.readouterr().out
    assert "NOT EXACT. First difference:" in shown
    assert "q_out[2, 3] is" in shown


@pytest.mark.parametrize("corrupted", ["beside an output", "an input"])
def test_writes_outside_the_outputs_are_found(corrupted: str, module: Module) -> None:
    class Corrupting:
        library, metadata = module.library, module.metadata
        active_level = module.active_level

        @staticmethod
        def apply_qk_rms_norm(*arguments: object) -> None:
            module.apply_qk_rms_norm(*arguments)
            placed = made[-1]
            if corrupted == "an input":
                placed.arrays["qk_var"][0, 0] += 1
            else:
                base_of(placed.arrays["q_out"])[3] ^= 1

    made: list[layouts.Placed] = []
    original = layouts.Placed

    def recorded(*arguments: object, **how: object) -> layouts.Placed:
        made.append(original(*arguments, **how))  # type: ignore[arg-type]
        return made[-1]

    case = cases.shape_case(module.specs[0], 5, 24, 8)
    report = verification.Report()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(verification, "Placed", recorded)
        verification.run_case(Corrupting, case, verification.Cpu(), report)  # type: ignore[arg-type]
    assert not report.exact
    assert report.groups["shapes and layouts"].stray_writes == len(layouts.LAYOUTS)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_pattern_cases_hold_every_pattern_with_every_variance(dtype: str) -> None:
    spec = KernelSpec(in_dtype=dtype)
    for q_cols, k_cols in ((1536, 1537), (24, 8)):
        a = cases.pattern_case(spec, q_cols, k_cols, 0).make()
        for x, var in ((a.q, a.qk_var[:, 0]), (a.k, a.qk_var[:, 1])):
            for value in special_values.VARIANCES[[0, 3, -1]]:
                rows = var.view(np.uint32) == value.view(np.uint32)
                assert len(np.unique(x[rows].view(np.uint16))) == 1 << 16


def test_float32_patterns_hold_what_has_gone_wrong() -> None:
    bits = set(special_values.all_patterns("float32").view(np.uint32).tolist())
    assert {0x7FFFFFFF, 0xFFFFFFFF, 0x7F800001 - 1, 0x3F808000, 0x00000000, 0x80000000} <= bits


def test_cases_cover_the_layouts_columns_and_rows_promised() -> None:
    shapes = [case for case in cases.cases_for(KernelSpec()) if case.group == "shapes and layouts"]
    assert {case.layouts for case in shapes} == {layouts.LAYOUTS}
    described = " ".join(case.description for case in shapes)
    for cols in (1, 7, 257, 1537, 1536, 8192):
        assert f"columns {cols} and" in described
        assert f"and {cols}" in described
    for rows in (0, 1, 17, 513):
        assert f"M {rows}," in described


def test_misaligned_means_an_odd_address() -> None:
    a = generate(3, 24, 8, "bfloat16")
    spec = KernelSpec(out_dtype="float32")
    placed = layouts.Placed(spec, a, "misaligned")
    for name in spec.operation.tensors:
        assert placed.arrays[name].ctypes.data % 2 == 1, name


@pytest.mark.parametrize("layout", [*layouts.LAYOUTS, layouts.PADDED])
def test_looking_at_the_guards_changes_no_output(layout: str) -> None:
    a = generate(3, 24, 7, "bfloat16")
    placed = layouts.Placed(KernelSpec(op="qk_rms_norm"), a, layout)
    for name in ("q_out", "k_out"):
        placed.arrays[name][...] = 2
    assert placed.guards_intact()
    assert (placed.arrays["q_out"] == 2).all()
    assert (placed.arrays["k_out"] == 2).all()


def test_sweep_compares_every_output_and_can_fail(monkeypatch: pytest.MonkeyPatch) -> None:
    swept = compile_specs(list(sweep.sweep_specs(host_cpu_target()))).module
    start = 0x3F800000
    result = sweep.sweep(swept, workers=2, start=start, stop=start + 1)
    chunk = sweep._CHUNK
    assert result == sweep.SweepResult(compared=chunk * 4 * 3)
    original = sweep._rounded
    monkeypatch.setattr(sweep, "_rounded", lambda x, dtype: original(-x, dtype))
    result = sweep.sweep(swept, workers=2, start=start, stop=start + 1)
    assert result.different == result.compared
    assert result.first_difference is not None
    assert "0x3f800000" in result.first_difference


# ---- bench -------------------------------------------------------------------------------------


def test_bench_writes_csv_and_json(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "b.csv"
    shape = ["--shapes", "24/8", "--rows", "1,3", "--threads", "1"]
    assert main(["bench", *shape, *QUICK, "--csv", str(out), "--json"]) == 0
    answer = json.loads(capsys.readouterr().out)
    lines = list(csv.DictReader(out.open()))
    candidates = BENCHMARKS["apply_qk_rms_norm"].candidates("cpu")
    names = [name for name in ("ours", *candidates) if name != "torch.compile"]
    assert [line["candidate"] for line in lines] == names * 2
    assert [line["candidate"] for line in answer["timings"]] == names * 2
    first = lines[0]
    assert float(first["median_us"]) > 0
    assert float(first["q1_us"]) <= float(first["median_us"]) <= float(first["q3_us"])
    assert first["bytes_per_call"] == str((24 + 8) * 4)
    assert first["ratio_to_ours"] == "1.0"
    assert first["exact"] == "True"
    assert len(answer["host"]) == 4


def test_bench_prints_tables_that_fit_80_columns(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    shape = ["--shapes", "24/8", "--rows", "3", "--threads", "1,2"]
    assert main(["bench", *shape, *QUICK]) == 0
    shown = capsys.readouterr().out
    assert max(map(len, shown.splitlines())) <= 80
    assert "One call from Python, M = 1" in shown
    for name in ("ours", "copy", "NumPy", "torch", "scalar"):
        assert f" {name} " in shown


@pytest.mark.slow
def test_bench_layer_prints_tables_that_fit_80_columns(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    shape = ["--shapes", "192/64", "--rows", "3", "--threads", "1,2", "--min-time", "0"]
    assert main(["bench-layer", *shape, "--no-torch-compile"]) == 0
    shown = capsys.readouterr().out
    assert max(map(len, shown.splitlines())) <= 80
    assert "\nrow_mean_of_squares_qk 192/64 bfloat16 to float32, 1 thread" in shown
    assert "\nqk_rms_norm 192/64 bfloat16, 2 threads" in shown
    assert " NO" not in shown


def test_bench_layer_fails_where_a_result_differs(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(reference, "differing", lambda actual, expected: 1)
    shape = ["--shapes", "192/64", "--rows", "3", "--threads", "1", "--min-time", "0"]
    assert main(["bench-layer", *shape, "--no-torch-compile", "--json"]) == 1
    timings = json.loads(capsys.readouterr().out)["timings"]
    ours = [row for row in timings if row["candidate"] == "ours"]
    assert [row["op"] for row in ours] == ["row_mean_of_squares_qk", "qk_rms_norm"]
    assert {row["exact"] for row in ours} == {False}


def test_export_holds_several_operations(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "layer.so"
    ops = ["row_mean_of_squares_qk", "apply_qk_rms_norm"]
    given = [part for op in ops for part in ("--op", op)]
    columns = ["--q-cols", "192", "--k-cols", "64", "--target", host_cpu_target()]
    assert main(["export", str(out), *given, *columns, "--cast-before-gamma"]) == 0
    assert "row_mean_of_squares_qk[bfloat16->float32" in capsys.readouterr().out
    module = load(out)
    assert [spec.op for spec in module.specs] == ops
    assert [spec.cast_before_gamma for spec in module.specs] == [False, True]
    assert main(["verify", str(out)]) == 0
    assert "EXACT" in capsys.readouterr().out


def test_bench_fails_where_a_result_differs(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A benchmark of wrong results is worth nothing."""
    monkeypatch.setattr(reference, "differing", lambda actual, expected: 1)
    shape = ["--shapes", "24/8", "--rows", "3", "--threads", "1", "--no-host"]
    assert main(["bench", *shape, *QUICK]) == 1
    assert " NO" in capsys.readouterr().out


def test_measure_takes_turns_and_reports_what_could_not_run() -> None:
    order: list[str] = []
    quick = Candidate("quick", order.append, [("quick",)])
    other = Candidate("other", order.append, [("other",)], exact=True)
    absent = Candidate("absent", None, note="not here")
    timings = measure([quick, other, absent], min_time=0.0)
    assert [t.name for t in timings] == ["quick", "other", "absent"]
    assert all(t.samples >= 5 and t.q1 <= t.median <= t.q3 for t in timings[:2])
    assert not timings[2].measured
    assert timings[2].note == "not here"
    switches = sum(a != b for a, b in itertools.pairwise(order))
    assert switches > 3  # one after the other: first calibration, then samples


def test_measure_reports_the_slowest_of_several_addresses() -> None:
    """A median of one lucky placement that hides what other addresses cost."""
    slow = Candidate("slow", time.sleep, [(0.0,)] * 7 + [(3e-3,)])
    (timing,) = measure([slow], min_time=0.0)
    assert timing.samples >= 16
    assert timing.worst >= 3e-3 > 10 * timing.median
    (timing,) = measure([Candidate("alone", time.sleep, [(0.0,)])], min_time=0.0)
    assert math.isnan(timing.worst)


def _workload(spec: KernelSpec, module: Module, rows: int) -> CpuWorkload:
    assert spec.q_cols is not None
    assert spec.k_cols is not None
    return CpuWorkload(spec, module, generate(rows, spec.q_cols, spec.k_cols, spec.in_dtype))


def test_outputs_lie_at_every_offset_from_their_inputs(module: Module) -> None:
    work = _workload(module.specs[0], module, 5)
    assert len(OFFSETS) >= 8
    for operand in "qk":
        offsets = {
            (tensors[f"{operand}_out"].ctypes.data - tensors[operand].ctypes.data) % 4096
            for tensors in work.sets
        }
        assert offsets == set(OFFSETS)
    assert work.ours().exact


def test_a_wrong_result_at_one_offset_is_seen(module: Module) -> None:
    """A check of one placement for timings of eight."""
    work = _workload(module.specs[0], module, 5)
    right = module.apply_qk_rms_norm
    calls: list[int] = []

    class Wrong:
        @staticmethod
        def apply_qk_rms_norm(*arguments: object) -> None:
            calls.append(1)
            if len(calls) != 5:
                right(*arguments)

    assert not work.ours(module=Wrong).exact  # type: ignore[arg-type]
    assert len(calls) == len(OFFSETS)


def test_an_operation_is_an_entry(module: Module, monkeypatch: pytest.MonkeyPatch) -> None:
    """An operation that no command can time; inputs or bytes that an entry cannot decide."""
    assert list(BENCHMARKS) == list(OPERATIONS)
    spec = module.specs[0]
    entry = dataclasses.replace(
        BENCHMARKS[spec.op],
        inputs=lambda spec, rows: generate(rows, 24, 8, spec.in_dtype, seed=rows),
        bytes=lambda operation, tensors: tensors["gamma_q"].nbytes,
        unique_rows=None,
    )
    for unique_rows, given in ((None, 1030), (1024, 1024)):
        entry = dataclasses.replace(entry, unique_rows=unique_rows)
        monkeypatch.setitem(BENCHMARKS, spec.op, entry)
        work = workload_of_rows(spec, module, 1030)
        assert work.bytes == 24 * 4
        expected = generate(given, 24, 8, spec.in_dtype, seed=given).q
        assert len(work.inputs["q"]) == work.rows == 1030
        assert np.array_equal(work.inputs["q"], np.concatenate([expected, expected[:6]])[:1030])
        assert work.ours().exact


def test_a_copy_moves_as_many_bytes_where_dtypes_differ() -> None:
    spec = KernelSpec(out_dtype="float32", q_cols=24, k_cols=8, target=host_cpu_target())
    work = _workload(spec, compile_specs(spec).module, 6)
    copy = work.candidate("copy")
    assert len(copy.sets) == len(OFFSETS)
    for (pairs,) in copy.sets:
        assert sum(to.nbytes + x.nbytes for to, x in pairs) == 6 * 32 * (2 + 4) == work.bytes


@pytest.mark.frameworks
def test_torch_compile_is_bounded_in_time() -> None:
    torch = pytest.importorskip("torch")
    graph = BENCHMARKS["row_mean_of_squares_qk"].graph
    # Whatever is compiled within the limit: looking at the outputs is not done within it.
    arguments = [(torch.ones(3, 23), torch.ones(3, 9))]
    candidate = torch_compile(graph, arguments, lambda outputs: time.sleep(5), limit=0.01)
    assert candidate.function is None
    assert "compiled for over 0.01 s" in candidate.note


@pytest.mark.frameworks
@pytest.mark.parametrize("misaligned", [False, True])
def test_candidates_of_a_gpu_on_this_cpu(
    misaligned: bool, module: Module, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Arguments in another order, too few bytes copied, a check that sees no difference."""
    pytest.importorskip("torch", reason="runs on tensors of torch, which is not installed")
    monkeypatch.setattr(bench_cuda, "rotation", lambda moved: (3, 12))
    spec = module.specs[0]
    how = {"misaligned": misaligned, "device": "cpu"}
    inputs = random_inputs(spec, 1024)
    work = bench_cuda.CudaWorkload(spec, module, inputs, 1030, **how)  # type: ignore[arg-type]
    ours = work.ours()
    assert ours.exact
    assert len({arguments[0].data_ptr() for arguments in ours.sets}) == 3
    for name in ("copy", "two copies"):
        copy = work.candidate(name)
        assert copy.function is not None
        copy.function(*copy.sets[0])
        assert 2 * sum(to.nbytes for _, to in copy.sets[0][0]) == work.bytes
    assert work.candidate("torch").exact
    work.expected[1][-1, -1] += 1
    assert not work.ours().exact


@pytest.mark.frameworks
def test_two_launches_compute_what_one_does(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("torch", reason="runs on tensors of torch, which is not installed")
    monkeypatch.setattr(bench_cuda, "rotation", lambda moved: (2, 12))
    spec = KernelSpec(op="qk_rms_norm", q_cols=24, k_cols=8, target=host_cpu_target())
    steps = BENCHMARKS[spec.op].steps
    specs = [spec, *(with_op(spec, op) for op in steps)]
    for held, runs in ((specs, True), (specs[:2], False)):
        work = bench_cuda.CudaWorkload(
            spec, compile_specs(held).module, random_inputs(spec, 7), device="cpu"
        )
        candidate = work.candidate("two launches")
        assert (candidate.function is not None) == runs
        if candidate.function is None:
            assert candidate.note == f"needs a module that also holds {' and '.join(steps)}"
            continue
        work.ours()
        outputs = [work.sets[1][name] for name in work.outputs]
        wanted = [output.clone() for output in outputs]
        for output in outputs:
            work.overwrite(output)
        candidate.function(*candidate.sets[1])
        assert not any(map(work.differ, outputs, wanted))


@pytest.mark.frameworks
def test_verification_of_a_gpu_on_this_cpu(module: Module) -> None:
    """Memory that comes back from the device without what was written there."""
    pytest.importorskip("torch", reason="runs on tensors of torch, which is not installed")

    class Corrupting:
        metadata = module.metadata

        @staticmethod
        def apply_qk_rms_norm(q_out: Any, *others: object) -> None:
            module.apply_qk_rms_norm(q_out, *others)
            q_out.untyped_storage()[0] ^= 1

    device = verification_cuda.Cuda("cpu")
    case = next(
        case
        for case in device.cases(module, module.specs[0])
        if case.group == "shapes and layouts" and "M 17" in case.description
    )
    report = verification.Report()
    verification.run_case(module, case, device, report)
    assert report.exact
    tally = report.groups[case.group]
    assert tally.checks == len(layouts.LAYOUTS) + 1
    assert tally.torch_elements == tally.checks * 17 * (24 + 8)
    verification.run_case(Corrupting, case, device, report)  # type: ignore[arg-type]
    assert tally.stray_writes == len(case.layouts)
    assert not report.exact


def test_activations_generated_are_repeatable_and_aligned() -> None:
    first, second = (generate(3, 24, 8, "float16", seed=7) for _ in range(2))
    assert isinstance(first, Activations)
    for name in ("q", "k", "qk_var", "gamma_q", "gamma_k"):
        assert getattr(first, name).tobytes() == getattr(second, name).tobytes()
        assert getattr(first, name).ctypes.data % 64 == 0
