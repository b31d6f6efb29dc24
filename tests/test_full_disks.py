"""Disks that are full, read-only or run no programs, and no home: it goes on, or says so clearly.

File systems are mounted where only the child process sees them, which needs no root where the
system lets users have namespaces of their own.
"""

from __future__ import annotations

import errno
import functools
import os
import shutil
import subprocess
import sys
import textwrap
import warnings
from pathlib import Path
from typing import Any

import pytest
from support import environment, make_case, run_python, smallest

import qknorm_tvm
from qknorm_tvm import BuildError, KernelSpec, ModuleFileError, compile
from qknorm_tvm.call import cache
from qknorm_tvm.check import reference
from qknorm_tvm.cli import main
from qknorm_tvm.load import temporary
from qknorm_tvm.targets import host_cpu_target

#: Computes with given columns through the public API, and prints what was warned of.
_USE = """
import os, sys, warnings
import numpy as np
import qknorm_tvm
from qknorm_tvm.check import reference

def use(q_cols):
    q, k = np.ones((2, q_cols), np.float32) / 3, np.ones((2, 3), np.float32) / 7
    var, gamma = np.full((2, 2), 0.3, np.float32), np.full(q_cols, 1.7, np.float32)
    arguments = q, k, var, gamma, gamma[:3]
    outputs = qknorm_tvm.apply_qk_rms_norm(*arguments)
    for got, want in zip(outputs, reference.apply_qk_rms_norm(*arguments)):
        assert reference.differing(got, want) == 0

def warned(*columns):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for q_cols in columns:
            use(q_cols)
    return [str(one.message) for one in caught if one.category is RuntimeWarning]
"""


def _spec(q_cols: int = 5) -> KernelSpec:
    return KernelSpec(in_dtype="float32", q_cols=q_cols, k_cols=3, target=host_cpu_target())


@functools.cache
def _unshare() -> tuple[str, ...]:
    program = shutil.which("unshare")
    if program is None:
        pytest.skip("mounts file systems with unshare, which is not installed")
    command = (program, "--user", "--map-root-user", "--mount", "--propagation", "private")
    probe = [*command, "sh", "-c", "mount -t tmpfs none /dev/shm"]
    done = subprocess.run(probe, capture_output=True, text=True, check=False)
    if done.returncode:
        pytest.skip(f"this system lets its users mount nothing: {done.stderr.strip()[:200]}")
    return command


def _run_mounted(
    mounts: list[str], code: str, *args: str, **env: str
) -> subprocess.CompletedProcess[str]:
    """Run Python code, as `run_python` does, with file systems mounted for it alone."""
    code = 'import sys\nsys.modules["torch"] = None\n' + textwrap.dedent(code)
    script = " && ".join([*(f"mount {mount}" for mount in mounts), 'exec "$@"'])
    command = [*_unshare(), "sh", "-c", script, "sh", sys.executable, "-c", code, *args]
    return subprocess.run(
        command, capture_output=True, text=True, timeout=120, env={**os.environ, **env}, check=False
    )


def _tmpfs(folder: Path | str, options: str) -> str:
    return f"-t tmpfs -o mode=700,{options} none {folder}"


@pytest.fixture
def folders(tmp_path: Path) -> tuple[Path, Path]:
    """Return a cache folder and a temporary one."""
    made = tmp_path / "cache", tmp_path / "temporary"
    for folder in made:
        folder.mkdir(mode=0o700)
    return made


def _environment(folders: tuple[Path, Path]) -> dict[str, str]:
    return {"QKNORM_TVM_CACHE_DIR": str(folders[0]), "TMPDIR": str(folders[1])}


# ---- real file systems ---------------------------------------------------------------------------


def test_full_temporary_folder_is_not_used(folders: tuple[Path, Path]) -> None:
    """LLVM's fatal error, past ``except`` and ``finally``; a compiler that fails for its files."""
    done = _run_mounted(
        [_tmpfs(folders[1], "size=64k"), _tmpfs("/dev/shm", "size=1g")],
        _USE
        + """
assert warned(5) == []
assert not os.listdir(os.environ["TMPDIR"]) + os.listdir("/dev/shm")
""",
        **_environment(folders),
    )
    assert (done.returncode, done.stderr) == (0, ""), done.stderr
    assert [path.suffix for path in folders[0].glob("[!.]*")].count(".so") == 1


def test_full_temporary_folders_are_a_build_error(folders: tuple[Path, Path]) -> None:
    """The end of the process, or an ``OSError`` that does not say what to do."""
    done = _run_mounted(
        [_tmpfs(folders[1], "size=64k"), _tmpfs("/dev/shm", "size=64k")],
        _USE
        + """
try:
    use(5)
except qknorm_tvm.BuildError as error:
    print(error)
assert not os.listdir(os.environ["TMPDIR"]) + os.listdir("/dev/shm")
""",
        **_environment(folders),
    )
    assert (done.returncode, done.stderr) == (0, ""), done.stderr
    assert "no temporary folder can be used (" in done.stdout
    assert "0 MiB free of 4 needed" in done.stdout
    assert "TMPDIR" in done.stdout


@pytest.mark.slow
def test_full_cache_folder_is_gone_without(folders: tuple[Path, Path]) -> None:
    """``OSError`` although the module is built; a warning at every spec."""
    done = _run_mounted(
        [_tmpfs(folders[0], "size=16k")],
        _USE
        + """
(message,) = warned(5, 6)
assert "No space left on device" in message and "QKNORM_TVM_CACHE_DIR" in message, message
left = [name for name in os.listdir(os.environ["QKNORM_TVM_CACHE_DIR"]) if ".so" in name]
assert not left, left
assert not os.listdir(os.environ["TMPDIR"])
""",
        **_environment(folders),
    )
    assert (done.returncode, done.stderr) == (0, ""), done.stderr


@pytest.mark.slow
def test_nothing_is_run_from_the_cache_or_the_temporary_folder(folders: tuple[Path, Path]) -> None:
    """Folders mounted ``noexec``, from which the loader maps no code."""
    done = _run_mounted(
        [_tmpfs(folder, "size=64m,noexec") for folder in folders],
        _USE
        + """
assert warned(5) == []
(path,) = [name for name in os.listdir(os.environ["QKNORM_TVM_CACHE_DIR"]) if name[-3:] == ".so"]
qknorm_tvm.load(os.path.join(os.environ["QKNORM_TVM_CACHE_DIR"], path))
""",
        **_environment(folders),
    )
    assert (done.returncode, done.stderr) == (0, ""), done.stderr


def test_without_files_in_memory_a_folder_that_runs_code_is_looked_for(
    folders: tuple[Path, Path],
) -> None:
    """A private copy in a ``noexec`` folder, where another would do."""
    done = _run_mounted(
        [_tmpfs(folders[1], "size=64m,noexec"), _tmpfs("/dev/shm", "size=64m")],
        """
        import os, sys
        from qknorm_tvm import load
        def refuse(*_):
            raise PermissionError(13, "Permission denied")
        os.memfd_create = refuse
        assert load(sys.argv[1]).active_level
        assert not os.listdir(os.environ["TMPDIR"]) + os.listdir("/dev/shm")
        """,
        str(smallest()),
        **_environment(folders),
    )
    assert (done.returncode, done.stderr) == (0, ""), done.stderr


@pytest.mark.slow
def test_read_only_prefilled_cache_serves(folders: tuple[Path, Path]) -> None:
    """A container's image: what it holds is compiled anew, or another spec cannot be."""
    env = _environment(folders)
    run_python(_USE + "use(5)\n", env=env)
    held = sorted(path.name for path in folders[0].iterdir())
    done = _run_mounted(
        [f"--bind {folders[0]} {folders[0]}", f"-o remount,bind,ro {folders[0]}"],
        _USE
        + """
assert warned(5) == []
assert "tvm" not in sys.modules
(message,) = warned(6, 7)
assert "Read-only file system" in message, message
assert not os.listdir(os.environ["TMPDIR"])
""",
        **env,
    )
    assert (done.returncode, done.stderr) == (0, ""), done.stderr
    assert sorted(path.name for path in folders[0].iterdir()) == held


# ---- the same, where nothing can be mounted ------------------------------------------------------


def _some(first: int, *others: int) -> list[Any]:
    """Return errors as parameters, the first for a default run."""
    return [first, *(pytest.param(number, marks=pytest.mark.slow) for number in others)]


def _call(monkeypatch: pytest.MonkeyPatch, *columns: int) -> list[str]:
    """Compute with an empty memory of modules; returns what was warned of."""
    monkeypatch.setattr(cache, "_loaded", {})
    monkeypatch.setattr(cache, "_warned", False)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for q_cols in columns:
            cache.forget_entries()
            case = make_case(2, q_cols, 3, "float32")
            outputs = qknorm_tvm.apply_qk_rms_norm(
                case.q, case.k, case.qk_var, case.gamma_q, case.gamma_k
            )
            for got, want in zip(outputs, case.expected(), strict=True):
                assert reference.differing(got, want) == 0
    return [str(warning.message) for warning in caught if warning.category is RuntimeWarning]


@pytest.mark.parametrize("number", _some(errno.ENOLCK, errno.EOPNOTSUPP, errno.EIO, errno.ENOSYS))
def test_folder_that_cannot_be_locked(
    number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A network's file system without locks: an error, or a wait without end."""

    def refuse(*_: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr("fcntl.flock", refuse)
    with environment(QKNORM_TVM_CACHE_DIR=str(tmp_path)):
        (message,) = _call(monkeypatch, 5, 6)
        assert os.strerror(number) in message
        assert {path.name for path in tmp_path.glob("*.so")} == {
            cache.cache_key(_spec(5)), cache.cache_key(_spec(6))
        }  # fmt: skip
        assert _call(monkeypatch, 5, 6) == []


@pytest.mark.parametrize("number", _some(errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EROFS))
def test_module_that_cannot_be_stored_serves_all_the_same(
    number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    copyfile = shutil.copyfile

    def fail(source: str, target: str) -> None:
        copyfile(source, target)
        raise OSError(number, os.strerror(number), str(target))

    monkeypatch.setattr(shutil, "copyfile", fail)
    with environment(QKNORM_TVM_CACHE_DIR=str(tmp_path)):
        (message,) = _call(monkeypatch, 5, 6)
    assert os.strerror(number) in message
    assert not [path for path in tmp_path.iterdir() if path.suffix != ".lock"]


def test_run_goes_on_where_the_cache_folder_is_full(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """``Error: ... No space left on device`` after a module was compiled."""
    monkeypatch.setenv("QKNORM_TVM_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    copyfile = shutil.copyfile

    def fail(source: str, target: str) -> None:
        if Path(target).is_relative_to(tmp_path / "cache"):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(target))
        copyfile(source, target)

    monkeypatch.setattr(shutil, "copyfile", fail)
    shape = ["--q-cols", "24", "--k-cols", "8", "--rows", "1", "--threads", "1"]
    assert main(["run", *shape, "--min-time", "0", "--no-torch-compile"]) == 0
    assert f"module    {tmp_path}/qknorm-tvm-run-" in capsys.readouterr().out


def test_user_without_a_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A container's user that no file knows: a folder named ``~`` in the current one."""

    def unknown(uid: int) -> None:
        raise KeyError(f"getpwuid(): uid not found: {uid}")

    monkeypatch.setattr("pwd.getpwuid", unknown)
    monkeypatch.chdir(tmp_path)
    for name in ("HOME", "XDG_CACHE_HOME", "XDG_DATA_HOME", "QKNORM_TVM_CACHE_DIR",
                 "QKNORM_TVM_TUNING_LOGS"):  # fmt: skip
        monkeypatch.delenv(name, raising=False)
    (message,) = _call(monkeypatch, 5, 6)
    assert "QKNORM_TVM_CACHE_DIR" in message
    assert os.listdir(tmp_path) == []


def test_cache_that_root_has_filled_is_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A container's image, made by root, that any other user of it compiles anew."""
    if os.getuid() != 0:
        pytest.skip("makes files that are root's, which only root may")
    with environment(QKNORM_TVM_CACHE_DIR=str(tmp_path)):
        tmp_path.chmod(0o755)
        assert _call(monkeypatch, 5) == []
        monkeypatch.setattr(os, "getuid", lambda: 65534)
        assert cache._usable(tmp_path / cache.cache_key(_spec()), _spec())
        os.chown(tmp_path, 65533, -1)
        with pytest.raises(ModuleFileError, match="belongs to another user"):
            cache.cache_directory()


#: Compiles where no file may grow beyond a size: it fails as on a full disk.
_LIMITED = """
import os, resource, sys
from qknorm_tvm import BuildError, KernelSpec, compile, load
import qknorm_tvm.build.cpu
limit = int(sys.argv[1])
if sys.argv[2:]:
    def refuse(*_):
        raise PermissionError(13, "Permission denied")
    os.memfd_create = refuse
before = resource.getrlimit(resource.RLIMIT_FSIZE)
resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))
try:
    compile(KernelSpec(in_dtype="float32", q_cols=5, k_cols=3))
except BuildError as error:
    print("BuildError")
    message = str(error)
else:
    print("compiled")
assert not os.listdir(os.environ["TMPDIR"]), os.listdir(os.environ["TMPDIR"])
resource.setrlimit(resource.RLIMIT_FSIZE, before)
module = compile(KernelSpec(in_dtype="float32", q_cols=5, k_cols=3))
assert module.module.active_level
"""


@pytest.mark.slow
@pytest.mark.parametrize("memory", [True, False], ids=["in memory", "without files in memory"])
@pytest.mark.parametrize("limit", [64, 4096, 16384, 32768])
def test_no_space_for_what_is_compiled_is_an_exception(
    limit: int, memory: bool, tmp_path: Path
) -> None:
    """LLVM's fatal error ends the process, and with it everything that it was doing."""
    done = run_python(
        _LIMITED, str(limit), *(() if memory else ("refuse",)), env={"TMPDIR": str(tmp_path)}
    )
    assert done.stdout == "BuildError\n", done.stderr
    assert not os.listdir(tmp_path)


def test_module_that_does_not_fit_into_memory_is_not_half_loaded(tmp_path: Path) -> None:
    """A copy cut off without a word: the end of the process where its code is reached."""
    run_python(
        """
        import resource, sys
        from qknorm_tvm import ModuleFileError, load
        before = resource.getrlimit(resource.RLIMIT_FSIZE)
        for size in (100, 4096, 40000):
            resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
            try:
                load(sys.argv[1])
            except ModuleFileError as error:
                assert "File too large" in str(error), error
            else:
                raise AssertionError(size)
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        assert load(sys.argv[1]).active_level
        """,
        str(smallest()),
        env={"TMPDIR": str(tmp_path)},
    )
    assert not os.listdir(tmp_path)


def test_compilers_write_where_there_is_space(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """gcc's and nvcc's own temporary files, which go to a full TMPDIR whatever they are given."""
    wrapper, log = tmp_path / "cc", tmp_path / "log"
    wrapper.write_text(f'#!/bin/sh\necho "$TMPDIR" >> {log}\nexec gcc "$@"\n')
    wrapper.chmod(0o755)
    monkeypatch.setenv("CC", str(wrapper))
    module = compile(_spec())
    assert set(log.read_text().split()) == {str(module.path.parent)}


def test_compiler_that_fails_leaves_no_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wrapper, folder = tmp_path / "cc", tmp_path / "temporary"
    folder.mkdir()
    wrapper.write_text("#!/bin/sh\necho 'No space left on device' >&2\nexit 1\n")
    wrapper.chmod(0o755)
    monkeypatch.setenv("CC", str(wrapper))
    monkeypatch.setattr("tempfile.tempdir", str(folder))
    with pytest.raises(BuildError, match="No space left on device"):
        compile(_spec())
    assert os.listdir(folder) == []


def test_folder_of_a_cached_module_goes_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A folder that waits for the end of the process, which may be a signal's."""
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    folder = tmp_path / "cache"
    folder.mkdir(mode=0o700)
    with environment(QKNORM_TVM_CACHE_DIR=str(folder)):
        _call(monkeypatch, 5)
    assert os.listdir(tmp_path) == ["cache"]
    folder.chmod(0o755)
    with environment(QKNORM_TVM_CACHE_DIR=str(folder / cache.cache_key(_spec()) / "below")):
        _call(monkeypatch, 5)
    assert os.listdir(tmp_path) == ["cache"]


def test_temporary_folder_is_one_with_space(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    with temporary.temporary_folder() as name:
        assert Path(name).parent == tmp_path
        assert Path(name).stat().st_mode & 0o777 == 0o700
    with pytest.raises(OSError, match=r"no temporary folder can be used \(.* free of .* needed"):
        temporary.temporary_folder(1 << 60)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "missing"))
    with temporary.temporary_folder() as name:
        assert Path(name).parent == Path("/dev/shm")
