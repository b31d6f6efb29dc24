"""The C++ example: it compiles without a warning, and its result is exact."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest
from support import OWN, compiled, smallest

from qknorm_tvm import KernelSpec

_SOURCE = Path(__file__).parent.parent / "examples" / "cpp" / "main.cpp"


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from tvm_ffi import libinfo

    compiler = shutil.which("g++")
    if compiler is None:
        pytest.skip("compiles the example with g++, which is not installed")
    library = Path(libinfo.find_libtvm_ffi()).parent
    out = tmp_path_factory.mktemp("cpp") / "main"
    command = [compiler, "-O2", "-std=c++17", "-Wall", "-Wextra"]
    # As system headers: their warnings are not this example's.
    command += ["-isystem", libinfo.find_include_path()]
    command += ["-isystem", libinfo.find_dlpack_include_path(), str(_SOURCE), "-o", str(out)]
    command += [f"-L{library}", f"-Wl,-rpath,{library}", "-ltvm_ffi"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert not done.stderr
    return out


def _run(program: Path, *arguments: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [program, *map(str, arguments)], capture_output=True, text=True, check=False, timeout=60
    )


LARGE = KernelSpec(in_dtype="bfloat16", q_cols=1536, k_cols=256)
ROPE_CACHE = LARGE.replace(op="qk_rms_norm_rope_cache", head_dim=128, rotary_dim=64)


@pytest.mark.parametrize(
    ("name", "specs"),
    [
        ("large", [LARGE]),
        pytest.param("open-bfloat16", [KernelSpec(in_dtype="bfloat16")], marks=pytest.mark.slow),
        (f"cpp-rope-{OWN}", [LARGE.replace(target=OWN), ROPE_CACHE.replace(target=OWN)]),
    ],
    ids=["fixed", "open", "rotation and cache"],
)
def test_result_and_error(program: Path, name: str, specs: list[KernelSpec]) -> None:
    """A caller from C++ gets other code, or fewer checks, than one from Python."""
    done = _run(program, compiled(name, *specs))
    assert done.returncode == 0, done.stdout + done.stderr
    stored = f"0 of {37 * 1536 + 2 * 64 * 256} elements differ, rotated and stored"
    assert done.stdout.splitlines() == [
        f"0 of {37 * (1536 + 256)} elements differ",
        *[stored] * (len(specs) > 1),
        "caught ValueError: gamma_q must have 1536 elements, got 1535",
    ]


def test_module_of_another_spec_is_an_exception(program: Path) -> None:
    done = _run(program, smallest())
    assert done.returncode == 1
    assert "TypeError: q must be float32, got bfloat16" in done.stderr


def test_file_that_is_no_module_is_an_exception(program: Path, tmp_path: Path) -> None:
    text = tmp_path / "text.so"
    text.write_text("no library")
    done = _run(program, text)
    assert done.returncode == 1
    assert "text.so" in done.stderr


@pytest.mark.slow
def test_memory_errors_under_valgrind(program: Path) -> None:
    """A read or a write beyond a tensor that no comparison of results shows."""
    valgrind = shutil.which("valgrind")
    if valgrind is None:
        pytest.skip("runs the example under valgrind, which is not installed")
    module = compiled("cpp-rope", LARGE, ROPE_CACHE)
    done = subprocess.run(
        [valgrind, "--error-exitcode=9", "--quiet", program, module],
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
        # valgrind knows no AVX-512.
        env={"QKNORM_TVM_DISABLE_CPU_FEATURES": "avx512f", "TVM_NUM_THREADS": "2"},
    )
    assert done.returncode == 0, done.stdout + done.stderr
