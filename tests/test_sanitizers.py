"""Exported modules under AddressSanitizer, ThreadSanitizer and valgrind, called from C.

``tests/native/driver.c`` is the caller. The sanitizers watch the entry point and the thread pool,
compiled with them; valgrind watches the generated code too, on a portable module as it is shipped,
with AVX-512 switched off, which valgrind does not know. ``QKNORM_TVM_CAMPAIGN=1`` makes it more
columns and rows, for some minutes.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path

import filelock
import pytest
from support import DISABLE_FOR_LEVEL, compiled, environment, session_folder

from qknorm_tvm import KernelSpec
from qknorm_tvm.targets import host_cpu_target, host_features

_CAMPAIGN = bool(os.environ.get("QKNORM_TVM_CAMPAIGN"))
_SOURCE = Path(__file__).parent / "native" / "driver.c"
_NORMALISE = ("apply_qk_rms_norm", "qk_rms_norm")
_STATISTICS = "row_mean_of_squares_qk"
_SPECS = tuple(
    KernelSpec(op=op, in_dtype=a, out_dtype=b)
    for a, b in (("bfloat16", "bfloat16"), ("bfloat16", "float32"), ("float32", "float32"))
    for op in _NORMALISE
) + tuple(KernelSpec(op=_STATISTICS, in_dtype=a) for a in ("bfloat16", "float32"))
#: Chosen before the open ones where they fit.
_FIXED = tuple(
    KernelSpec(op=op, in_dtype=a, q_cols=q_cols, k_cols=64)
    for a, q_cols in (("bfloat16", 257), ("float32", 31))
    for op in (*_NORMALISE, _STATISTICS)
)
#: Columns below, at and above every vector, for a module whose columns are open.
_KINDS = ("bf16-bf16-1-1", "bf16-bf16-33-5", "bf16-f32-7-16", "f32-f32-16-33")
_MORE = tuple(
    f"{pair}-{q}-{k}"
    for pair in ("bf16-bf16", "bf16-f32", "f32-f32")
    for q, k in (
        (2, 3),
        (15, 17),
        (31, 64),
        (63, 65),
        (127, 129),
        (257, 100),
        (1025, 1),
        (1536, 256),
    )
)


#: Whether squares are added by a fused multiply-add in code for this machine.
_HOST_FUSES = int("fma" in host_features())


def _exit(done: subprocess.CompletedProcess[str]) -> str:
    return f"exit status {done.returncode}\n{done.stdout[-4000:]}\n{done.stderr[-8000:]}"


def _driver(sanitizer: str) -> Path:
    """Compile the driver, with a sanitizer or (``""``) without; skip where that is missing."""
    from tvm_ffi import libinfo

    gcc = shutil.which("gcc")
    if gcc is None:
        pytest.skip("compiles a driver with gcc, which is not installed")
    flags = [f"-fsanitize={sanitizer}"] if sanitizer else []
    out = session_folder() / f"driver-{sanitizer}"
    with filelock.FileLock(str(out) + ".lock"):
        if out.exists():
            return out
        trivial = session_folder() / f"trivial-{sanitizer}.c"
        trivial.write_text("int main(void) { return 0; }\n")
        done = subprocess.run(
            [gcc, *flags, trivial, "-o", trivial.with_suffix("")],
            capture_output=True,
            text=True,
            check=False,
        )
        if done.returncode:
            pytest.skip(f"gcc has no runtime for -fsanitize={sanitizer}: {done.stderr[-200:]}")
        library = Path(libinfo.find_libtvm_ffi()).parent
        command = [gcc, *flags, "-std=gnu11", "-g", "-O1", "-ffp-contract=off", "-Wall", "-Wextra"]
        # As system headers: their warnings are not the driver's.
        command += ["-isystem", libinfo.find_include_path()]
        command += ["-isystem", libinfo.find_dlpack_include_path(), str(_SOURCE), "-o", str(out)]
        command += [f"-L{library}", f"-Wl,-rpath,{library}", "-ltvm_ffi", "-lpthread", "-ldl"]
        done = subprocess.run([*command, "-lm"], capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        assert not done.stderr
    return out


def _instrumented(sanitizer: str, *specs: KernelSpec) -> Path:
    """Export a module whose entry point and pool are compiled with a sanitizer."""
    wrapper = session_folder() / f"gcc-{sanitizer}"
    wrapper.write_text(f'#!/bin/sh\nexec gcc -fsanitize={sanitizer} -g "$@"\n')
    wrapper.chmod(0o755)
    with environment(CC=str(wrapper)):
        return compiled(
            f"instrumented-{sanitizer}-{len(specs)}",
            *(spec.replace(target=host_cpu_target()) for spec in specs),
        )


def _run(*command: str | Path | int, **env: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        list(map(str, command)),
        capture_output=True,
        text=True,
        check=False,
        timeout=1200,
        env={**os.environ, **env},
    )


def _calls(done: subprocess.CompletedProcess[str]) -> int:
    """Return how many calls a clean run made."""
    assert done.returncode == 0, _exit(done)
    assert not done.stderr, _exit(done)
    counted = re.fullmatch(r"(\d+) calls, (\d+) elements exact\n", done.stdout)
    assert counted, _exit(done)
    print(done.stdout)
    assert int(counted[2]) > 10_000
    return int(counted[1])


_ADDRESS = "address,undefined"
_ADDRESS_OPTIONS = {"UBSAN_OPTIONS": "halt_on_error=1", "ASAN_OPTIONS": "abort_on_error=0"}


@pytest.mark.slow
@pytest.mark.parametrize("callers", [0, 4])
def test_address_sanitizer_finds_nothing(callers: int) -> None:
    """A read beyond a shape, a list of strides or arguments; a leak; undefined arithmetic."""
    driver, module = _driver(_ADDRESS), _instrumented(_ADDRESS, _FIXED[0], *_SPECS)
    kinds = (*_KINDS, "bf16-bf16-257-64", "bf16-bf16-1536-256", "f32-f32-257-64")
    kinds += _MORE if _CAMPAIGN else ()
    done = _run(driver, module, 10_000, callers, _HOST_FUSES, *kinds, **_ADDRESS_OPTIONS)
    assert _calls(done) > 3000


@pytest.mark.slow
def test_address_sanitizer_watches() -> None:
    """A module that is not instrumented passes whatever it does."""
    driver, module = _driver(_ADDRESS), _instrumented(_ADDRESS, _FIXED[0], *_SPECS)
    done = _run(driver, module, 1, -1, _HOST_FUSES, "bf16-bf16-257-64")
    assert done.returncode != 0
    assert "heap-buffer-overflow" in done.stderr
    assert re.search(r"#0 .*instrumented-address", done.stderr), done.stderr


@pytest.mark.slow
def test_thread_sanitizer_finds_nothing() -> None:
    """A race in the pool: a task that another launch's closure runs, a setting half read."""
    driver, module = _driver("thread"), _instrumented("thread", *_SPECS)
    kinds = (*_KINDS, "bf16-bf16-1536-256", *(_MORE if _CAMPAIGN else ()))
    done = _run(driver, module, 10_000, 4, _HOST_FUSES, *kinds)
    if "FATAL: ThreadSanitizer: unexpected memory mapping" in done.stderr:
        pytest.skip("ThreadSanitizer cannot run under this kernel's address space layout")
    assert _calls(done) > 3000


def _valgrind(
    level: str, max_rows: int, callers: int, *kinds: str
) -> subprocess.CompletedProcess[str]:
    valgrind = shutil.which("valgrind")
    if valgrind is None:
        pytest.skip("runs a driver under valgrind, which is not installed")
    command = [valgrind, "--error-exitcode=9", "--quiet", "--leak-check=full"]
    command += ["--show-leak-kinds=definite", "--errors-for-leak-kinds=definite"]
    module = compiled("driven", *_FIXED, *_SPECS)
    disabled = DISABLE_FOR_LEVEL[level]
    return _run(
        *command,
        _driver(""),
        module,
        max_rows,
        callers,
        int(level != "x86-64-v2"),
        *kinds,
        QKNORM_TVM_DISABLE_CPU_FEATURES=disabled,
    )


@pytest.mark.slow
@pytest.mark.parametrize("level", ["x86-64-v3", "x86-64-v2"])
def test_valgrind_finds_nothing(level: str) -> None:
    """A vector that reads or writes beyond the last column, between rows, or what is unset."""
    kinds = (*_KINDS, "bf16-bf16-257-64", "f32-f32-31-64", *(_MORE if _CAMPAIGN else ()))
    assert _calls(_valgrind(level, 100, 0, *kinds)) > 3000


@pytest.mark.slow
def test_valgrind_finds_nothing_with_several_threads() -> None:
    """The same in the pool's threads, where rows are shared out; a leak of what it allocates."""
    kinds = ("bf16-bf16-257-64", *(_MORE[::3] if _CAMPAIGN else ()))
    assert _calls(_valgrind("x86-64-v3", 100_000, 0, *kinds)) > 100


@pytest.mark.slow
def test_valgrind_watches() -> None:
    """An output that is a byte too short and goes unnoticed: then the tests above say nothing."""
    done = _valgrind("x86-64-v3", 1, -2, _KINDS[0])
    assert done.returncode == 9, _exit(done)
    assert "Invalid write" in done.stderr
