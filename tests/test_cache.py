"""The cache on disk: found again, safe to load from, whole whoever writes to it."""

from __future__ import annotations

import dataclasses
import os
import stat
import subprocess
import sys
import warnings
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from support import COMPUTE, COMPUTED, compiled, environment, make_case, run_python

import qknorm_tvm
from qknorm_tvm import KernelSpec, Module, ModuleFileError, load
from qknorm_tvm.call import cache
from qknorm_tvm.check import reference


def _use(folder: Path, **env: str) -> bool:
    """Compute in a fresh process; returns whether the compiler was needed."""
    done = run_python(COMPUTE, env={"QKNORM_TVM_CACHE_DIR": str(folder), **env})
    return done.stdout.strip() == "True"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "cache"


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """The file that the cache holds for `COMPUTE`, built once."""
    folder = tmp_path_factory.mktemp("built") / "cache"
    assert _use(folder)
    return (folder / cache.cache_key(COMPUTED)).read_bytes()


def _fill(folder: Path, content: bytes) -> Path:
    folder.mkdir(mode=0o700)
    path = folder / cache.cache_key(COMPUTED)
    path.write_bytes(content)
    path.chmod(0o755)
    return path


def _modules(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if path.suffix != ".lock")


def test_second_process_does_not_compile(folder: Path, built: bytes) -> None:
    """Two seconds at the start of every process; a key that differs between processes."""
    path = _fill(folder, built)
    before = path.stat().st_mtime_ns, path.stat().st_ino
    assert not _use(folder, PYTHONHASHSEED="1")
    assert not _use(folder, PYTHONHASHSEED="2")
    assert (path.stat().st_mtime_ns, path.stat().st_ino) == before
    assert _modules(folder) == [path.name]


@pytest.mark.slow
@pytest.mark.parametrize(
    "kind",
    [
        "altered",
        "another spec's",
        *(pytest.param(kind, marks=pytest.mark.slow) for kind in ("truncated", "empty", "text")),
    ],
)
def test_unusable_file_is_built_again(kind: str, folder: Path, built: bytes) -> None:
    """A crash, or a wrong result, from what a killed process or a full disk left."""
    altered = bytearray(built)
    altered[len(built) // 2] ^= 1
    content = {
        "truncated": built[: len(built) // 2],
        "altered": bytes(altered),
        "empty": b"",
        "text": b"not a library",
    }.get(kind)
    if content is None:
        other = COMPUTED.replace(q_cols=6)
        with environment(QKNORM_TVM_CACHE_DIR=str(folder.with_name("other"))):
            content = cache.module_for(other).path.read_bytes()
    path = _fill(folder, content)
    assert _use(folder)
    assert path.read_bytes() == built
    assert not _use(folder)


def test_file_that_others_may_write_to_is_built_again(folder: Path, built: bytes) -> None:
    """Code that another user put into a file of ours."""
    path = _fill(folder, built)
    path.chmod(0o777)
    assert _use(folder)
    assert path.stat().st_mode & 0o777 == 0o755


#: Any user but this one.
_NOBODY = 65534


def _needs_root() -> None:
    if os.getuid() != 0:
        pytest.skip("gives a file to another user, which only root may")


@pytest.mark.slow
def test_file_of_somebody_else_is_built_again(folder: Path, built: bytes) -> None:
    """Code that another user put into a folder that was open once."""
    _needs_root()
    path = _fill(folder, built)
    os.chown(path, _NOBODY, -1)
    assert not cache._usable(path, COMPUTED)
    assert _use(folder)
    assert path.stat().st_uid == os.getuid()
    assert path.read_bytes() == built


@pytest.mark.parametrize("mode", [0o775, 0o757, 0o720])
def test_file_that_a_group_or_others_may_write_to_is_not_used(
    mode: int, folder: Path, built: bytes
) -> None:
    path = _fill(folder, built)
    assert cache._usable(path, COMPUTED)
    path.chmod(mode)
    assert not cache._usable(path, COMPUTED)


@pytest.mark.slow
def test_link_is_judged_by_what_it_leads_to(folder: Path, built: bytes, tmp_path: Path) -> None:
    """A link of ours to a file that somebody else may change at any time."""
    path = _fill(folder, built)
    other = tmp_path / "other.so"
    path.rename(other)
    path.symlink_to(other)
    assert cache._usable(path, COMPUTED)
    other.chmod(0o777)
    assert not cache._usable(path, COMPUTED)
    assert _use(folder)
    assert not path.is_symlink()
    assert path.read_bytes() == built
    path.unlink()
    path.symlink_to(tmp_path / "nowhere.so")
    assert not cache._usable(path, COMPUTED)


def test_folder_swapped_after_the_check(
    folder: Path, built: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Code of whoever may rename in a folder above, put in place between the check and the load."""
    path = _fill(folder, built)
    theirs = compiled(
        "swapped", KernelSpec(in_dtype="float32", q_cols=5, k_cols=3, cast_before_gamma=True),
        KernelSpec(in_dtype="float32", q_cols=9, k_cols=9),
    )  # fmt: skip
    usable = cache._usable

    def check_then_swap(path: Path, spec: KernelSpec) -> object:
        checked = usable(path, spec)
        folder.rename(tmp_path / "checked")
        _fill(folder, theirs.read_bytes())
        return checked

    monkeypatch.setattr(cache, "_usable", check_then_swap)
    with environment(QKNORM_TVM_CACHE_DIR=str(folder)):
        module = cache._load_or_build(COMPUTED)
    assert path.read_bytes() == theirs.read_bytes()
    assert module.specs == [COMPUTED]


def test_what_is_written_is_the_users_whatever_the_umask(folder: Path) -> None:
    """A module or a lock that others may write to, from a process that masks nothing."""
    with environment(QKNORM_TVM_CACHE_DIR=str(folder)):
        run_python("import os; os.umask(0)\n" + COMPUTE)
    modes = {path.suffix: stat.S_IMODE(path.stat().st_mode) for path in folder.iterdir()}
    assert modes == {".so": 0o755, ".lock": 0o600}
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700


@pytest.mark.slow
def test_four_processes_at_once(folder: Path, built: bytes) -> None:
    """Two writers of one file; a reader of half a file."""
    code = 'import sys\nsys.modules["torch"] = None\n' + COMPUTE
    env = {**os.environ, "QKNORM_TVM_CACHE_DIR": str(folder)}
    running = [
        subprocess.Popen(
            [sys.executable, "-c", code], env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE
        )
        for _ in range(4)
    ]
    ends = [process.communicate(timeout=120) for process in running]
    assert [process.returncode for process in running] == [0] * 4, ends
    assert sum(out.strip() == b"True" for out, _ in ends) == 1, "compiled more than once"
    assert (folder / cache.cache_key(COMPUTED)).read_bytes() == built
    assert _modules(folder) == [cache.cache_key(COMPUTED)]


def test_folder_is_made_for_its_user_alone(folder: Path, built: bytes) -> None:
    """A cache that others may write to, whatever the umask."""
    assert built
    deep = folder / "a" / "b"
    before = os.umask(0)
    try:
        with environment(QKNORM_TVM_CACHE_DIR=str(deep)):
            assert cache.cache_directory() == deep
    finally:
        os.umask(before)
    assert stat.S_IMODE(deep.stat().st_mode) == 0o700


@pytest.mark.parametrize("mode", [0o770, 0o707, 0o777])
def test_folder_that_others_may_write_to_is_refused(mode: int, folder: Path) -> None:
    """A ``.so`` is a program: whoever writes to the folder runs as the user."""
    folder.mkdir()
    folder.chmod(mode)
    with (
        environment(QKNORM_TVM_CACHE_DIR=str(folder)),
        pytest.raises(ModuleFileError, match=r"others may write to .* run `chmod go-w"),
    ):
        cache.cache_directory()


def test_folder_of_somebody_else_is_refused(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder.mkdir(mode=0o700)
    if os.getuid() == 0:  # root's own is anybody's to use
        os.chown(folder, _NOBODY, -1)
    owner = folder.stat().st_uid
    monkeypatch.setattr(os, "getuid", lambda: owner + 1)
    with (
        environment(QKNORM_TVM_CACHE_DIR=str(folder)),
        pytest.raises(ModuleFileError, match=rf"belongs to another user \(uid {owner}\)"),
    ):
        cache.cache_directory()


def test_folder_given_to_somebody_else_is_refused_in_a_call(folder: Path, built: bytes) -> None:
    """A call that loads from there all the same, or compiles without a word at every start."""
    _needs_root()
    path = _fill(folder, built)
    os.chown(folder, _NOBODY, -1)
    done = run_python(COMPUTE, env={"QKNORM_TVM_CACHE_DIR": str(folder)}, check=False)
    assert done.returncode == 1
    assert f"ModuleFileError: {folder} belongs to another user (uid {_NOBODY})" in done.stderr
    assert "set QKNORM_TVM_CACHE_DIR to a folder of your own" in done.stderr
    assert path.read_bytes() == built


def test_folder_behind_a_link_is_judged_by_itself(folder: Path, tmp_path: Path) -> None:
    """A link of ours into a folder that others may write to."""
    folder.mkdir()
    folder.chmod(0o777)
    link = tmp_path / "link"
    link.symlink_to(folder)
    with (
        environment(QKNORM_TVM_CACHE_DIR=str(link)),
        pytest.raises(ModuleFileError, match=r"others may write to .*link"),
    ):
        cache.cache_directory()


def test_default_folder_is_the_users(tmp_path: Path) -> None:
    """A cache in the current folder or in /tmp."""
    with environment(QKNORM_TVM_CACHE_DIR="", XDG_CACHE_HOME=str(tmp_path)):
        assert cache.cache_directory() == tmp_path / "qknorm-tvm"


def _call_with_new_memory(monkeypatch: pytest.MonkeyPatch) -> tuple[np.ndarray, np.ndarray]:
    monkeypatch.setattr(cache, "_loaded", {})
    cache.forget_entries()
    case = make_case(2, 5, 3, "float32")
    outputs = qknorm_tvm.apply_qk_rms_norm(case.q, case.k, case.qk_var, case.gamma_q, case.gamma_k)
    for got, want in zip(outputs, case.expected(), strict=True):
        assert reference.differing(got, want) == 0
    return outputs


def test_without_a_folder_it_warns_and_works(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A home that makes the operation unusable, or slow without a word; see `test_full_disks`."""
    folder.write_text("")
    monkeypatch.setattr(cache, "_warned", False)
    with (
        environment(QKNORM_TVM_CACHE_DIR=str(folder / "cache")),
        pytest.warns(RuntimeWarning, match=r"compile anew .* \(.*Not a directory"),
    ):
        _call_with_new_memory(monkeypatch)


def test_with_a_folder_nothing_is_warned_of(
    folder: Path, built: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    _fill(folder, built)
    with environment(QKNORM_TVM_CACHE_DIR=str(folder)), warnings.catch_warnings():
        warnings.simplefilter("error")
        _call_with_new_memory(monkeypatch)


def test_memory_holds_one_module_a_spec() -> None:
    """A file read and checked at every call."""
    assert cache.module_for(COMPUTED) is cache.module_for(COMPUTED)


_OTHER = {
    "op": "qk_rms_norm",
    "in_dtype": "bfloat16",
    "out_dtype": "bfloat16",
    "q_cols": 6,
    "k_cols": 4,
    "target": "cuda:sm_90",
    "reproducible": True,
    "cast_before_gamma": True,
}


_ROTATION = {
    "op": "qk_rms_norm_rope_cache",
    "in_dtype": "bfloat16",
    "out_dtype": "bfloat16",
    "q_cols": 64,
    "k_cols": 32,
    "head_dim": 32,
    "rotary_dim": 16,
}
_OTHER_ROTATION = {
    "statistics": "local",
    "head_dim": 16,
    "rotary_dim": 8,
    "rotary_dtype": "float32",
    "interleaved": True,
    "cache_dtype": "float8_e4m3fn",
    "writes_k_out": True,
}


@pytest.mark.parametrize("field", [field.name for field in dataclasses.fields(KernelSpec)])
def test_a_given_module_serves_no_call_of_another_spec(field: str) -> None:
    """A reproducible module, or one that casts elsewhere, that answers ordinary calls."""

    def holding(spec: KernelSpec) -> Module:
        return Module(Path(), {"specs": [spec.to_dict()]}, SimpleNamespace(get_function=str))

    spec, other = COMPUTED, _OTHER
    if field in _OTHER_ROTATION:
        spec, other = spec.replace(**_ROTATION), _OTHER_ROTATION
    else:
        assert cache._holds(holding(spec.replace(q_cols=None, k_cols=None)), spec)
    assert cache._holds(holding(spec), spec)
    assert not cache._holds(holding(spec.replace(**{field: other[field]})), spec)
    assert not cache._holds(holding(spec), spec.replace(**{field: other[field]}))


def test_after_use_of_a_reproducible_module_ordinary_calls_are_not_its(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(cache, "_given", [])
    monkeypatch.setattr(cache, "_loaded", {})
    spec = COMPUTED.replace(reproducible=True)
    given = load(compiled("reproducible", spec))
    qknorm_tvm.use(given)
    assert cache.module_for(spec) is given
    assert cache.module_for(COMPUTED) is not given
    qknorm_tvm.call.cache.forget_entries()


def test_key_changes_with_versions_and_sources(monkeypatch: pytest.MonkeyPatch) -> None:
    """Code of an older version that is served after an upgrade."""
    key = cache.cache_key(COMPUTED)
    assert key.startswith(COMPUTED.digest)
    assert cache.cache_key(COMPUTED.replace(q_cols=6)) != key
    monkeypatch.setattr(cache, "_source_digest", lambda: "other")
    other = cache.cache_key(COMPUTED)
    assert other != key
    monkeypatch.setattr("qknorm_tvm.call.compiled.versions", lambda: {"apache-tvm": "9"})
    assert cache.cache_key(COMPUTED) not in (key, other)
