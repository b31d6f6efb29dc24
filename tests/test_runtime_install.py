"""The run-time half in environments of its own: NumPy and tvm-ffi, neither TVM nor a compiler.

Each environment is made with pip, from a wheel of this checkout; where no package index can be
reached the tests are skipped. torch is lent by the environment that runs the tests.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import os
import shutil
import subprocess
import sys
import textwrap
import zipfile
from collections.abc import Iterator
from pathlib import Path

import filelock
import pytest
from support import compiled, session_folder

from qknorm_tvm import KernelSpec, packing
from qknorm_tvm.targets import host_cpu_target

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[1]
#: The oldest that is supported, which vLLM and SGLang pin; the one that tuning pins; the newest.
TVM_FFI = ("==0.1.11", "==0.1.14.post1", "<0.2")

#: Calls the operations with NumPy and compares every bit.
_NUMPY = """
import sys
import numpy as np
import qknorm_tvm
assert not {"tvm", "click", "rich", "torch", "ml_dtypes"} & set(sys.modules)
rng = np.random.default_rng(0)
q, k = rng.standard_normal((5, 48), np.float32), rng.standard_normal((5, 16), np.float32)
gammas = rng.standard_normal(48, np.float32), rng.standard_normal(16, np.float32)
var = np.abs(rng.standard_normal((5, 2), np.float32))
outputs = qknorm_tvm.apply_qk_rms_norm(q, k, var, *gammas, 1e-6)
rs = np.float32(1) / np.sqrt(var + np.float32(1e-6))
for column, (x, gamma, got) in enumerate(zip((q, k), gammas, outputs)):
    assert np.array_equal((x * rs[:, column : column + 1]) * gamma, got)
assert "tvm" not in sys.modules
"""

#: The same with torch, through the API and through torch's operators.
_TORCH = """
import sys
import torch
import qknorm_tvm
from qknorm_tvm import tensor_parallel, torch_ops
torch.manual_seed(0)
q, k, var = torch.randn(5, 48), torch.randn(5, 16), torch.rand(5, 2)
gammas = torch.randn(48), torch.randn(16)
rs = (var + 1e-6).rsqrt()
want = (q * rs[:, :1]) * gammas[0], (k * rs[:, 1:]) * gammas[1]
for function in (qknorm_tvm.apply_qk_rms_norm, torch_ops.apply_qk_rms_norm):
    for got, expected in zip(function(q, k, var, *gammas, 1e-6), want):
        assert torch.equal(got, expected)
assert tensor_parallel.HeadLayout(48, 8, 128, 4).q_cols == 1536
assert not {"tvm", "click", "rich"} & set(sys.modules)
"""


@dataclasses.dataclass(frozen=True)
class Installed:
    """An environment with the run-time half."""

    bin: Path
    folder: Path

    def pip(self, *arguments: str, check: bool = True) -> subprocess.CompletedProcess[str]:
        """Run the pip that there is in it: to install another takes seconds."""
        lent = self.folder / "lent"
        return self.run("python", "-m", "pip", *arguments, check=check, PYTHONPATH=str(lent))

    def run(
        self, *command: str, check: bool = True, **variables: str
    ) -> subprocess.CompletedProcess[str]:
        """Run one of its programs, without what this process knows of packages and modules."""
        kept = {
            name: value
            for name, value in os.environ.items()
            if name != "PYTHONPATH" and not name.startswith("QKNORM_TVM_")
        }
        done = subprocess.run(
            [str(self.bin / command[0]), *command[1:]],
            capture_output=True,
            text=True,
            check=False,
            env={**kept, **variables},
            cwd=self.folder,
        )
        if check:
            assert done.returncode == 0, done.stdout + done.stderr
        return done

    def python(self, code: str, **variables: str) -> str:
        """Run Python code; returns what it printed."""
        return self.run("python", "-c", textwrap.dedent(code), **variables).stdout


@pytest.fixture(scope="module")
def wheel() -> Path:
    """A wheel of this checkout, built from a copy of it by whichever worker is first."""
    folder = session_folder() / "wheel"
    with filelock.FileLock(f"{folder}.lock"):
        if not list(folder.glob("*.whl")):
            _build_wheel(folder)
    (made,) = folder.glob("*.whl")
    return made


def _build_wheel(folder: Path) -> None:
    copy = folder / "source"
    shutil.rmtree(folder, ignore_errors=True)
    copy.mkdir(parents=True)
    for name in ("qknorm_tvm", "schedules", "tuning_logs"):
        shutil.copytree(ROOT / name, copy / name)
    for name in ("pyproject.toml", "MANIFEST.in", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, copy)
    command = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "-w", str(folder)]
    done = subprocess.run([*command, str(copy)], capture_output=True, text=True, check=False)
    if done.returncode and "setuptools" in done.stderr:
        pytest.skip(f"no package index can be reached: {done.stderr.strip().splitlines()[-1]}")
    assert done.returncode == 0, done.stderr


def test_the_wheel_has_no_measurements(wheel: Path) -> None:
    """MANIFEST.in, which is for the source distribution, brings 4 MB of databases into it."""
    names = zipfile.ZipFile(wheel).namelist()
    assert any(name.endswith("tuning_logs/nvidia-h100/tuned.json") for name in names)
    assert not [name for name in names if "database" in name]


@pytest.fixture(scope="module", params=TVM_FFI)
def environment(request: pytest.FixtureRequest, wheel: Path) -> Installed:
    """An environment with the wheel, made by whichever worker is first."""
    folder = session_folder() / f"runtime-install-{TVM_FFI.index(request.param)}"
    made = Installed(folder / "venv" / "bin", folder)
    with filelock.FileLock(f"{folder}.lock"):
        if not (folder / "whole").exists():
            _install(made, str(wheel), f"apache-tvm-ffi{request.param}")
            (folder / "whole").touch()
    return made


def _install(made: Installed, *requirements: str) -> None:
    pip = importlib.util.find_spec("pip")
    assert pip is not None
    assert pip.submodule_search_locations
    venv = [sys.executable, "-m", "venv", "--without-pip", str(made.folder / "venv")]
    shutil.rmtree(made.folder, ignore_errors=True)
    subprocess.run(venv, check=True)
    (made.folder / "lent").mkdir()
    (made.folder / "lent" / "pip").symlink_to(pip.submodule_search_locations[0])
    # To bytecode when it is imported: most of NumPy never is.
    done = made.pip("install", "-q", "--no-compile", *requirements, check=False)
    if done.returncode and "No matching distribution" in done.stderr:
        pytest.skip(f"no package index can be reached: {done.stderr.strip().splitlines()[-1]}")
    assert done.returncode == 0, done.stderr


@pytest.fixture
def installed(environment: Installed) -> Iterator[Installed]:
    """The environment for one test at a time: what one adds another would find."""
    with filelock.FileLock(environment.folder / "lock"):
        yield environment


@pytest.fixture(scope="module")
def pack(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of one module that this process, with TVM, has built."""
    spec = KernelSpec(in_dtype="float32", q_cols=48, k_cols=16)
    folder = tmp_path_factory.mktemp("modules")
    shutil.copy(compiled("runtime-install", spec), folder)
    return folder


def test_it_is_small_and_whole(installed: Installed) -> None:
    """An install that brings TVM, or that breaks what an engine pins."""
    installed.pip("check")
    listed = installed.pip("list", "--format=freeze").stdout
    names = {line.partition("==")[0].lower().replace("_", "-") for line in listed.splitlines()}
    assert names == {"apache-tvm-ffi", "numpy", "qknorm-tvm", "typing-extensions"}


def test_numpy_calls_a_module_built_elsewhere(installed: Installed, pack: Path) -> None:
    installed.python(_NUMPY, QKNORM_TVM_MODULES=str(pack))


def test_numpy_has_bfloat16_where_ml_dtypes_is(installed: Installed, pack: Path) -> None:
    done = installed.run(
        "python",
        "-c",
        "import numpy as np, qknorm_tvm\n"
        "a = np.ones((2, 48), 'f4')\n"
        "qknorm_tvm.apply_qk_rms_norm(a, a[:, :16], a[:, :2], a[0], a[0, :16],"
        " out_dtype='bfloat16')",
        check=False,
        QKNORM_TVM_MODULES=str(pack),
    )
    assert "ValueError: out_dtype must be float16 or float32 for NumPy arrays" in done.stderr


@pytest.mark.frameworks
def test_torch_calls_it(installed: Installed, pack: Path, tmp_path: Path) -> None:
    if importlib.util.find_spec("torch") is None:
        pytest.skip("torch is not installed where the tests run")
    lent = ("torch", "torchgen", "functorch", "sympy", "mpmath", "networkx", "jinja2", "markupsafe",
            "fsspec", "filelock")  # fmt: skip
    for name in lent:
        package = importlib.util.find_spec(name)
        if package is not None and package.submodule_search_locations:
            (tmp_path / name).symlink_to(package.submodule_search_locations[0])
    installed.python(_TORCH, QKNORM_TVM_MODULES=str(pack), PYTHONPATH=str(tmp_path))


def test_without_a_module_one_error_says_what_to_do(installed: Installed) -> None:
    done = installed.run("python", "-c", _NUMPY, check=False)
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith(
        "qknorm_tvm.errors.BuildError: there is no module for apply_qk_rms_norm[float32->float32, "
        f"q=48, k=16]@{host_cpu_target()} (QKNORM_TVM_MODULES is not set, no pack is installed)"
    )
    assert "pip install 'qknorm-tvm[compile]'" in last


@pytest.mark.parametrize("command", [("qknorm-tvm", "run"), ("python", "-m", "qknorm_tvm")])
def test_command_line_says_what_it_needs(installed: Installed, command: tuple[str, ...]) -> None:
    done = installed.run(*command, check=False)
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr == (
        "Error: the command line needs click and rich: pip install 'qknorm-tvm[compile]'\n"
    )


def test_wheel_of_a_pack_serves(
    installed: Installed, pack: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """Two wheels in a container, and no compiler."""
    folder = tmp_path_factory.mktemp("pack")
    plan = packing.Plan([], [[KernelSpec(in_dtype="float32", q_cols=48, k_cols=16)]], [])
    (module,) = pack.glob("*.so")
    name = packing.file_name(plan.modules[0])
    shutil.copy(module, folder / name)
    packing.write_index(folder, plan)
    made = packing.write_wheel(folder, plan, folder / "dist")
    assert zipfile.is_zipfile(made)
    installed.pip("install", "-q", "--no-deps", str(made))
    try:
        installed.pip("check")
        installed.python(_NUMPY)
    finally:
        installed.pip("uninstall", "-q", "-y", packing.DISTRIBUTION)
