"""The worked example of docs/new-operation.md, applied to a copy of the package and compiled."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PATCH = ROOT / "docs" / "new-operation.patch"

CHECK = """
    import numpy as np
    import pytest

    import qknorm_tvm
    from qknorm_tvm.check.calls import operation_arguments
    from qknorm_tvm.check.verification import Cpu, Report, iterate, run_case
    from qknorm_tvm.dtypes import ELEMENT_TYPES
    from qknorm_tvm.targets import host_cpu_target

    OP = "add_apply_qk_rms_norm"
    COLUMNS = {"q": 96, "k": 33}
    rng = np.random.default_rng(0)
    specs = [
        qknorm_tvm.KernelSpec(
            op=OP, in_dtype=dtype, q_cols=96, k_cols=33, target=host_cpu_target()
        )
        for dtype in ("bfloat16", "float16", "float32")
    ]
    module = qknorm_tvm.compile(specs).module
    entry = getattr(module, OP)
    for spec in specs:
        dtype = ELEMENT_TYPES[spec.in_dtype].numpy
        for rows in (0, 1, 17):
            arrays = {"qk_var": rng.random((rows, 2)).astype("f4")}
            for tag, cols in COLUMNS.items():
                arrays[f"gamma_{tag}"] = rng.standard_normal(cols).astype("f4")
                for name in (tag, f"{tag}_residual", f"{tag}_out"):
                    arrays[name] = rng.standard_normal((rows, cols)).astype(dtype)
            entry(*operation_arguments(OP, arrays, 1e-6))
            for column, tag in enumerate(COLUMNS):
                total = arrays[tag].astype("f4") + arrays[f"{tag}_residual"].astype("f4")
                variance = arrays["qk_var"][:, column : column + 1]
                rs = np.float32(1) / np.sqrt(variance + np.float32(1e-6))
                wanted = ((total * rs) * arrays[f"gamma_{tag}"]).astype(dtype)
                np.testing.assert_array_equal(
                    arrays[f"{tag}_out"].view("u1"), wanted.view("u1")
                )
    device, report = Cpu([1, 2]), Report()
    for module, case in iterate([module], device):
        run_case(module, case, device, report)
    assert report.exact, report.first_difference
    shapes = report.groups[f"{OP}: shapes and layouts"]
    assert shapes.checks == 3 * 4 * 6 * 2  # specs, rows, layouts, threads
    arrays["q_residual"] = arrays["q_residual"].astype("f8")
    with pytest.raises(TypeError, match="q_residual must be float32, got float64"):
        entry(*operation_arguments(OP, arrays, 1e-6))
"""


@pytest.fixture
def patched(tmp_path: Path) -> dict[str, str]:
    """Return the environment of a process that imports a patched copy of the package."""
    if shutil.which("git") is None:
        pytest.skip("applies a patch, and git is not installed")
    ignored = shutil.ignore_patterns("__pycache__", "*.so")
    for name in ("qknorm_tvm", "schedules", "tuning_logs"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=ignored)
    # Outside of any repository, so that git takes the folder for the patch's root.
    environment = {**os.environ, "GIT_CEILING_DIRECTORIES": str(tmp_path.parent)}
    command = ["git", "apply", "--verbose", str(PATCH)]
    done = subprocess.run(
        command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return {**environment, "PYTHONPATH": str(tmp_path)}


def test_the_patch_applies_and_adds_an_operation(patched: dict[str, str]) -> None:
    """A document whose example no longer fits the code."""
    code = "from qknorm_tvm.operations import OPERATIONS; print(*OPERATIONS)"
    assert "add_apply_qk_rms_norm" in _run(code, patched).split()


@pytest.mark.slow
def test_worked_example(patched: dict[str, str]) -> None:
    """An operation that needs more than the document says."""
    _run(textwrap.dedent(CHECK), patched)


def _run(code: str, environment: dict[str, str]) -> str:
    command = [sys.executable, "-c", code]
    done = subprocess.run(
        command,
        cwd=environment["PYTHONPATH"],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout
