"""Exported files and loaded modules: alone in a process, damaged, on a lesser CPU, in threads."""

from __future__ import annotations

import ctypes
import json
import os
import shutil
import struct
import subprocess
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from support import (
    compiled,
    environment,
    ffi_tensors,
    make_case,
    of_every_level,
    raw_call,
    run_python,
    smallest,
)

import qknorm_tvm
from qknorm_tvm import KernelSpec, ModuleFileError, load
from qknorm_tvm.call.compiled import place
from qknorm_tvm.check import reference
from qknorm_tvm.cli import main
from qknorm_tvm.load import module as runtime
from qknorm_tvm.load import module_file
from qknorm_tvm.targets import X86_LEVELS, host_cpu_target

LARGE = KernelSpec(in_dtype="bfloat16", q_cols=1536, k_cols=256)


@pytest.fixture(scope="module")
def large() -> Path:
    return compiled("large", LARGE)


# ---- a file alone in a process -------------------------------------------------------------------


def test_import_brings_in_nothing_heavy() -> None:
    """An import that costs a second, or fails where only the runtime is installed."""
    run_python(
        """
        import sys
        import qknorm_tvm
        heavy = {"tvm", "tvm_ffi", "ml_dtypes", "scipy", "jax", "rich", "click"} & set(sys.modules)
        assert not heavy, heavy
        assert sys.modules["torch"] is None
        """
    )


def test_file_runs_with_tvm_ffi_alone(large: Path) -> None:
    """A module that needs libtvm_runtime.so, which crashes where a parallel loop begins."""
    case = make_case(1024, 1536, 256)
    q_out, k_out = case.expected()
    folder = large.parent / "alone"
    folder.mkdir(exist_ok=True)
    arrays = {n: getattr(case, n) for n in ("gamma_q", "gamma_k", "qk_var", "q", "k")}
    for name, array in {**arrays, "q_want": q_out, "k_want": k_out}.items():
        np.save(folder / f"{name}.npy", array.view(np.uint16) if array.itemsize == 2 else array)
    run_python(
        """
        import sys
        import numpy as np
        import tvm_ffi

        library, folder = sys.argv[1:]
        a = {n: np.load(f"{folder}/{n}.npy") for n in
             ("gamma_q", "gamma_k", "qk_var", "q", "k", "q_want", "k_want")}
        module = tvm_ffi.load_module(library)
        module.qknorm_set_num_threads(3)
        q_out, k_out = np.zeros_like(a["q"]), np.zeros_like(a["k"])
        module.apply_qk_rms_norm(
            q_out, k_out, a["gamma_q"], a["gamma_k"], a["qk_var"], a["q"], a["k"], 1e-6, 1
        )
        for got, want in ((q_out, a["q_want"]), (k_out, a["k_want"])):
            nan = (want & 0x7FFF) > 0x7F80
            assert (((got == want) | nan).all()), int(((got != want) & ~nan).sum())
            assert ((got[nan] & 0x7FFF) > 0x7F80).all()
        assert not {"tvm", "qknorm_tvm"} & set(sys.modules)
        maps = open("/proc/self/maps").read()
        assert "libtvm_ffi" in maps
        assert "libtvm_runtime" not in maps and "libtvm_compiler" not in maps
        """,
        str(large),
        str(folder),
    )


def test_loading_and_calling_never_imports_the_compiler(large: Path) -> None:
    """``load`` that drags in 100 MB of LLVM."""
    run_python(
        """
        import sys
        import numpy as np
        import qknorm_tvm
        module = qknorm_tvm.load(sys.argv[1])
        bits = [np.zeros((2, n), np.uint16) for n in (1536, 256, 1536, 256)]
        ones = [np.ones(s, np.float32) for s in (1536, 256, (2, 2))]
        module.apply_qk_rms_norm(bits[0], bits[1], *ones, bits[2], bits[3], 1e-6, 1)
        assert "tvm" not in sys.modules
        """,
        str(large),
    )


def test_metadata_of_file_and_function_agree(large: Path) -> None:
    """A file that says one thing unloaded and another loaded."""
    module = load(large)
    answered = json.loads(module.library.get_function("qknorm_metadata")())
    assert answered == module.metadata == module_file.read_metadata(large)
    assert answered["format"] == module_file.FORMAT
    assert answered["ops"] == ["apply_qk_rms_norm"]
    assert answered["kind"] == "cpu"
    assert answered["specs"] == [LARGE.to_dict()]
    assert [level["name"] for level in answered["levels"]] == list(X86_LEVELS)
    for level in answered["levels"]:
        assert level["features"] == sorted(X86_LEVELS[level["name"]])
        (code,) = level["code"]
        assert code["spec"] == LARGE.text
        assert code["config"]["vector"] >= 1
    assert answered["versions"]["qknorm-tvm"] == qknorm_tvm.__version__
    assert set(answered["versions"]) == {"qknorm-tvm", "apache-tvm", "apache-tvm-ffi"}
    assert "apache-tvm-ffi" in answered["requires"]
    assert module.specs == [LARGE]
    assert LARGE.text in repr(module)


def test_module_picks_the_level_of_this_machine(large: Path) -> None:
    assert load(large).active_level == host_cpu_target()


def test_level_that_changes_nothing_has_no_code_of_its_own() -> None:
    """A file that grows by code which it has already: only bfloat16 outputs are converted."""
    converted = KernelSpec(q_cols=32, k_cols=32)
    same = converted.replace(in_dtype="float32", out_dtype="float32")
    alone = qknorm_tvm.compile(same)
    names = [level["name"] for level in alone.metadata["levels"]]
    assert names == ["x86-64-v4", "x86-64-v3", "x86-64-v2"]
    both = qknorm_tvm.compile([converted, same])
    levels = {level["name"]: level["code"] for level in both.metadata["levels"]}
    assert list(levels) == list(X86_LEVELS)
    assert [code["spec"] for code in levels["x86-64-v4-bf16"]] == [converted.text, same.text]
    first, second = levels["x86-64-v4-bf16"]
    assert first["config"]["rounding"] == "convert"
    assert second == levels["x86-64-v4"][1]


def test_conversion_is_refused_where_the_level_has_none() -> None:
    """A config for one level that crashes the others."""
    spec = KernelSpec(q_cols=32, k_cols=32, target="x86-64-v4")
    with pytest.raises(ValueError, match=r"rounding must not be 'convert' for x86-64-v4, which is"):
        qknorm_tvm.compile(spec, config={"rounding": "convert"})


def test_stores_go_past_the_caches_by_the_size_of_this_machines() -> None:
    """A threshold for another machine's caches, or glibc's idea of them: a whole socket's."""
    caches = Path("/sys/devices/system/cpu/cpu0/cache").glob("index*")
    sizes = {
        int((cache / "level").read_text()): (cache / "size").read_text().strip()
        for cache in caches
        if (cache / "type").read_text().strip() != "Instruction"
    }
    if not sizes:
        pytest.skip("the kernel does not say how large this machine's caches are")
    last = sizes[max(sizes)]
    assert last.endswith("K"), last
    function = load(smallest()).library.get_function("qknorm_most_cached_bytes")
    assert function() == int(last[:-1]) * 1024 // 4


# ---- a CPU that lacks what the code needs --------------------------------------------------------


def test_fixed_columns_come_before_open_ones() -> None:
    """Slower code for any columns, where the file has code for these."""
    fixed = KernelSpec(q_cols=16, k_cols=8, target=host_cpu_target())
    half, none = (fixed.replace(q_cols=None, k_cols=k) for k in (8, None))
    module = qknorm_tvm.compile([none, half, fixed]).module
    assert module.specs == [fixed, half, none]


@pytest.mark.parametrize(
    ("disabled", "level"),
    [("avx512vl", "x86-64-v3"), ("avx512f,bmi2", "x86-64-v2"), ("avx,sse3", ""), ("avx512", None)],
)
def test_level_follows_the_features_that_are_there(disabled: str, level: str | None) -> None:
    """SIGILL in the first call; a name such as avx512 that switches off what it begins."""
    done = run_python(
        """
        import sys, tvm_ffi
        print(tvm_ffi.load_module(sys.argv[1]).qknorm_active_level())
        """,
        str(of_every_level()),
        env={"QKNORM_TVM_DISABLE_CPU_FEATURES": disabled},
    )
    assert done.stdout.strip() == (host_cpu_target() if level is None else level)


def test_file_refuses_a_cpu_that_lacks_a_feature(tmp_path: Path) -> None:
    """A module built for another CPU that dies with SIGILL, loaded either way."""
    library = tmp_path / "copy.so"
    shutil.copyfile(smallest(), library)
    with environment(QKNORM_TVM_DISABLE_CPU_FEATURES="sse4.2,popcnt"):
        with pytest.raises(
            ModuleFileError, match=r"copy.so holds code for x86-64-v2 .*which this CPU cannot run"
        ):
            load(library)
        import tvm_ffi

        raw = tvm_ffi.load_module(str(library))
    case = make_case(2, 33, 7, "float32")
    tensors, alive = ffi_tensors(case.tensors)
    with pytest.raises(
        RuntimeError, match=r"this CPU cannot run this module: it lacks .*popcnt, sse4.2; export it"
    ):
        raw.apply_qk_rms_norm(*tensors, 1e-6)
    assert (case.q_out.view(np.uint8) == 0xA5).all()
    assert raw.qknorm_active_level() == ""
    assert json.loads(raw.qknorm_metadata())["kind"] == "cpu"
    del alive


# ---- files that are no module --------------------------------------------------------------------


def _sections(data: bytes) -> dict[str, tuple[int, int, int]]:
    """Return name -> (offset, size, place of its header) of an ELF file."""
    (table,) = struct.unpack_from("<Q", data, 0x28)
    entry, count, names_index = struct.unpack_from("<HHH", data, 0x3A)
    headers = [table + i * entry for i in range(count)]
    (names,) = struct.unpack_from("<Q", data, headers[names_index] + 0x18)
    symbols = {}
    for at in headers:
        (name,) = struct.unpack_from("<I", data, at)
        end = data.index(b"\0", names + name)
        offset, size = struct.unpack_from("<QQ", data, at + 0x18)
        symbols[data[names + name : end].decode()] = (offset, size, at)
    return symbols


_TRUNCATIONS: dict[str, Callable[[bytes], int]] = {
    "empty": lambda _: 0,
    "one byte": lambda _: 1,
    "the magic number": lambda _: 4,
    "ELF class and order": lambda _: 6,
    "half of the ELF header": lambda _: 40,
    "the ELF header": lambda _: 64,
    "the program headers": lambda _: 300,
    "half": lambda data: len(data) // 2,
    "code": lambda data: _sections(data)[".text"][0] + 100,
    "before the metadata": lambda data: _sections(data)[".qknorm"][0],
    "inside the digest": lambda data: _sections(data)[".qknorm"][0] + 20,
    "inside the metadata": lambda data: _sections(data)[".qknorm"][0] + 500,
    "before the section headers": lambda data: struct.unpack_from("<Q", data, 0x28)[0],
    "inside the section headers": lambda data: struct.unpack_from("<Q", data, 0x28)[0] + 70,
    "without the last byte": lambda data: len(data) - 1,
}


@pytest.mark.parametrize("where", _TRUNCATIONS)
def test_truncated_file_is_refused(where: str, tmp_path: Path) -> None:
    """A crash of the loader, or code of half a file that runs."""
    data = smallest().read_bytes()
    path = tmp_path / "short.so"
    path.write_bytes(data[: _TRUNCATIONS[where](data)])
    for reader in (load, module_file.read_metadata):
        with pytest.raises(ModuleFileError, match=r"short.so is (not a qknorm-tvm module|damaged)"):
            reader(path)


def test_every_flipped_byte_is_noticed(tmp_path: Path) -> None:
    """An altered instruction or table that loads and computes something else."""
    data = smallest().read_bytes()
    sections = _sections(data)
    places = set(range(0, len(data), 509)) | set(range(64)) | {len(data) - 1}
    for name in (".qknorm", ".text", ".rodata", ".dynamic", ".shstrtab"):
        offset, size, header = sections[name]
        places |= {offset, offset + size // 2, offset + size - 1}
        places |= set(range(header, header + 64, 4))
    start = sections[".qknorm"][0]
    places |= set(range(start, start + 64))
    path = tmp_path / "flipped.so"
    for place_ in sorted(places):
        changed = bytearray(data)
        changed[place_] ^= 0x41
        path.write_bytes(changed)
        with pytest.raises(ModuleFileError, match=r"flipped.so is (not a qknorm-tvm|damaged)"):
            module_file.read_metadata(path)


def test_appended_bytes_are_noticed(tmp_path: Path) -> None:
    path = tmp_path / "longer.so"
    path.write_bytes(smallest().read_bytes() + b"\0")
    with pytest.raises(ModuleFileError, match=r"longer.so is damaged: its content does not match"):
        load(path)


def _foreign(tmp_path: Path) -> dict[str, Path]:
    source = tmp_path / "empty.c"
    source.write_text("int nothing(void) { return 0; }\n")
    built = tmp_path / "other.so"
    subprocess.run(["gcc", "-shared", "-fPIC", "-o", built, source], check=True)
    text = tmp_path / "text.so"
    text.write_text("This is no library.\n" * 100)
    libc = next(
        Path(line.split()[-1])
        for line in Path("/proc/self/maps").read_text().splitlines()
        if line.endswith("libc.so.6")
    )
    return {"another library": built, "text": text, "libc": libc}


@pytest.mark.parametrize("kind", ["another library", "text", "libc"])
def test_unrelated_file_is_refused(kind: str, tmp_path: Path) -> None:
    if shutil.which("gcc") is None:
        pytest.skip("compiles a library with gcc, which is not installed")
    path = _foreign(tmp_path)[kind]
    with pytest.raises(ModuleFileError, match=r" is not a qknorm-tvm module: "):
        load(path)


def test_library_without_section_headers_is_refused(tmp_path: Path) -> None:
    """``count`` of zero: every ELF file may be stripped of its section headers."""
    data = bytearray(smallest().read_bytes())
    struct.pack_into("<H", data, 0x3C, 0)
    path = tmp_path / "bare.so"
    path.write_bytes(data)
    with pytest.raises(ModuleFileError, match=r"the library has no .qknorm section"):
        load(path)


def test_missing_file_is_file_not_found(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"nowhere.so"):
        load(tmp_path / "nowhere.so")


def _with_metadata(path: Path, metadata: bytes) -> Path:
    """Write a copy of a module with other metadata, and a digest that fits."""
    data = bytearray(smallest().read_bytes())
    offset, size, _ = _sections(bytes(data))[".qknorm"]
    start = offset + len(module_file.MAGIC) + 32
    space = offset + size - start
    assert len(metadata) < space
    data[start : offset + size] = metadata + bytes(space - len(metadata))
    path.write_bytes(data)
    module_file.seal(path)
    return path


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        (b'{"format": 3}', "has format 3; this qknorm-tvm reads up to 2: upgrade it"),
        (
            b'{"format": 1}',
            "has format 1, of an earlier qknorm-tvm; this one reads format 2",
        ),
        (b'{"format": "2"}', "is damaged: its metadata has format '2'"),
        (b'{"format": 1', "is damaged: its metadata is no JSON"),
        (b"[1]", "is damaged: its metadata is no JSON"),
        (b"{}", "is damaged: its metadata is no JSON"),
        (b"\xff\xfe", "is damaged: its metadata is no JSON"),
        (b"", "is damaged: its metadata is no JSON"),
    ],
)
def test_metadata_that_cannot_be_read(metadata: bytes, message: str, tmp_path: Path) -> None:
    """A file of a newer version taken for this one's, or a KeyError from the depths."""
    path = _with_metadata(tmp_path / "other.so", metadata)
    with pytest.raises(ModuleFileError, match=message):
        load(path)


def test_fifo_is_refused_at_once(tmp_path: Path) -> None:
    """A read that waits for ever for somebody who writes."""
    os.mkfifo(tmp_path / "module.so")
    with pytest.raises(ModuleFileError, match="it is no regular file"):
        module_file.read_metadata(tmp_path / "module.so")


def test_deep_metadata_is_refused(tmp_path: Path) -> None:
    """A RecursionError from the depths of the reader."""
    path = _with_metadata(tmp_path / "deep.so", b"[" * 1600)
    with pytest.raises(ModuleFileError, match="its metadata is no JSON"):
        module_file.read_metadata(path)


def test_inspect_sends_no_control_sequence_to_the_terminal(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Metadata of a file of unknown origin that retitles the terminal, or worse."""
    metadata = module_file.read_metadata(smallest())
    metadata["versions"] = {"\x1b]0;title\x07": "\x9b3"}
    path = _with_metadata(tmp_path / "hostile.so", json.dumps(metadata).encode())
    assert main(["inspect", str(path)]) == 0
    printed = capsys.readouterr().out
    assert "title" in printed
    assert not set(printed) & {"\x1b", "\x07", "\x9b"}


def test_foreign_section_of_the_same_name(tmp_path: Path) -> None:
    data = bytearray(smallest().read_bytes())
    offset = _sections(bytes(data))[".qknorm"][0]
    data[offset : offset + 16] = b"SOMEBODY ELSE'S!"
    path = tmp_path / "section.so"
    path.write_bytes(data)
    with pytest.raises(ModuleFileError, match=r"its .qknorm section is another's"):
        load(path)


# ---- the file that was checked is the one that runs ----------------------------------------------


def _two_graphs() -> tuple[Path, Path]:
    """Two files for the same calls that differ in the graph: where gamma multiplies."""
    spec = KernelSpec(in_dtype="bfloat16", q_cols=33, k_cols=7)
    late = spec.replace(cast_before_gamma=True)
    return compiled("before-cast", spec), compiled("after-cast", late)


def _check_graph(call: Callable[..., object], *, cast_before_gamma: bool) -> None:
    case = make_case(64, 33, 7)
    tensors, alive = ffi_tensors(case.tensors)
    call(*tensors, case.epsilon)
    wanted = reference.apply_qk_rms_norm(
        case.q, case.k, case.qk_var, case.gamma_q, case.gamma_k, case.epsilon, "bfloat16",
        cast_before_gamma=cast_before_gamma,
    )  # fmt: skip
    wrong = sum(map(reference.differing, (case.q_out, case.k_out), wanted))
    assert wrong == 0, f"{wrong} wrong elements"
    del alive


@pytest.mark.parametrize(
    "how", [pytest.param("exported again", marks=pytest.mark.slow), "written over"]
)
def test_path_that_was_loaded_before_is_loaded_as_it_is_now(how: str, tmp_path: Path) -> None:
    """The new file's metadata with the old one's code, which the loader knows by its path."""
    target = tmp_path / "module.so"
    plain, late = _two_graphs()
    place(plain, target)
    old = load(target)
    _check_graph(old.apply_qk_rms_norm, cast_before_gamma=False)
    if how == "exported again":
        place(late, target)
    else:
        target.write_bytes(late.read_bytes())
    new = load(target)
    assert [spec.cast_before_gamma for spec in new.specs] == [True]
    _check_graph(new.apply_qk_rms_norm, cast_before_gamma=True)
    _check_graph(old.apply_qk_rms_norm, cast_before_gamma=False)
    target.unlink()
    place(plain, target)
    _check_graph(load(target).apply_qk_rms_norm, cast_before_gamma=False)
    _check_graph(new.apply_qk_rms_norm, cast_before_gamma=True)


def test_use_of_a_path_exported_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`use` of a new file whose calls are served by the code of the one before."""
    monkeypatch.setattr("qknorm_tvm.call.cache._given", [])
    monkeypatch.setattr("qknorm_tvm.call.cache._loaded", {})
    target = tmp_path / "module.so"
    for path, late in zip(_two_graphs(), (False, True), strict=True):
        place(path, target)
        qknorm_tvm.use(load(target))
        case = make_case(64, 33, 7)
        arguments = (case.q, case.k, case.qk_var, case.gamma_q, case.gamma_k)
        outputs = qknorm_tvm.apply_qk_rms_norm(*arguments, cast_before_gamma=late)
        wanted = reference.apply_qk_rms_norm(
            *arguments, case.epsilon, "bfloat16", cast_before_gamma=late
        )
        assert sum(map(reference.differing, outputs, wanted)) == 0
    qknorm_tvm.call.cache.forget_entries()


def test_file_replaced_after_it_was_checked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another file's code, put in place between the check and the load."""
    target = tmp_path / "module.so"
    plain, late = _two_graphs()
    place(plain, target)
    check = runtime._check_specs

    def check_then_replace(path: Path, metadata: dict) -> None:
        check(path, metadata)
        place(late, target)

    monkeypatch.setattr(runtime, "_check_specs", check_then_replace)
    _check_graph(load(target).apply_qk_rms_norm, cast_before_gamma=False)


def test_loading_leaves_no_file_open_and_no_copy(tmp_path: Path) -> None:
    """A descriptor or a folder left for each file that is loaded."""
    paths = [tmp_path / f"{i}.so" for i in range(40)]
    for path in paths:
        shutil.copyfile(smallest(), path)
    temporary = tmp_path / "temporary"
    temporary.mkdir()
    run_python(
        """
        import os, sys
        from qknorm_tvm import load
        load(sys.argv[1])
        before = len(os.listdir("/proc/self/fd"))
        modules = [load(path) for path in sys.argv[1:] * 3]
        assert len(os.listdir("/proc/self/fd")) == before
        assert not os.listdir(os.environ["TMPDIR"])
        assert len({id(module.library) for module in modules}) == len(sys.argv) - 1
        """,
        *map(str, paths),
        env={"TMPDIR": str(temporary)},
    )


def test_without_files_in_memory_a_private_copy_is_loaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A kernel set up with vm.memfd_noexec=2, which refuses them."""
    temporary = tmp_path / "temporary"
    temporary.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(temporary))

    def refuse(*_: object) -> int:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(os, "memfd_create", refuse)
    target = tmp_path / "module.so"
    for path, late in zip(_two_graphs(), (False, True), strict=True):
        place(path, target)
        _check_graph(load(target).apply_qk_rms_norm, cast_before_gamma=late)
    assert not os.listdir(temporary)


# ---- export --------------------------------------------------------------------------------------


def test_export_replaces_a_file_in_one_step(tmp_path: Path) -> None:
    """A reader that sees half a file; a file that is loaded and overwritten in place (SIGBUS)."""
    target = tmp_path / "module.so"
    place(smallest(), target)
    inode, loaded = target.stat().st_ino, load(target)
    assert place(smallest(), target) == target
    assert target.stat().st_ino != inode
    assert target.read_bytes() == smallest().read_bytes()
    assert target.stat().st_mode & 0o777 == 0o755
    assert os.listdir(tmp_path) == ["module.so"]
    case = make_case(3, 33, 7, "float32")
    expected = case.expected()
    raw_call(loaded, *case.tensors, case.epsilon)
    assert reference.differing(case.q_out, expected[0]) == 0


def test_export_that_fails_leaves_the_old_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A full disk that costs the user the file that was there, or leaves rubbish beside it."""
    target = tmp_path / "module.so"
    target.write_text("old")

    def full(source: Path, name: str) -> None:
        Path(name).write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(shutil, "copyfile", full)
    with pytest.raises(OSError, match="No space left"):
        place(smallest(), target)
    assert os.listdir(tmp_path) == ["module.so"]
    assert target.read_text() == "old"


def test_export_into_a_missing_folder_says_so(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"missing"):
        place(smallest(), tmp_path / "missing" / "module.so")


# ---- threads -------------------------------------------------------------------------------------

_GET = "import sys, tvm_ffi; print(tvm_ffi.load_module(sys.argv[1]).qknorm_get_num_threads())"


@pytest.mark.parametrize(("text", "threads"), [("1", 1), ("5", 5), ("100000", 1024)])
def test_tvm_num_threads_is_honoured(text: str, threads: int) -> None:
    done = run_python(_GET, str(smallest()), env={"TVM_NUM_THREADS": text})
    assert int(done.stdout) == threads


@pytest.mark.parametrize("text", ["", "0", "-3", "many"])
def test_tvm_num_threads_that_is_no_number_means_the_default(text: str) -> None:
    plain = {"TVM_NUM_THREADS": text}
    assert int(run_python(_GET, str(smallest()), env=plain).stdout) >= 1


def test_default_number_of_threads_is_the_affinity() -> None:
    """Half of the processors, as TVM's own pool has it, or more than the process may use."""
    if not hasattr(os, "sched_setaffinity"):
        pytest.skip("sets the processor affinity, which this system does not offer")
    code = f"import os; os.sched_setaffinity(0, {{min(os.sched_getaffinity(0))}}); {_GET}"
    env = {"TVM_NUM_THREADS": ""}
    assert int(run_python(code, str(smallest()), env=env).stdout) == 1
    everything = int(run_python(_GET, str(smallest()), env=env).stdout)
    assert 1 <= everything <= len(os.sched_getaffinity(0))
    quota = Path("/sys/fs/cgroup/cpu.max")
    if not quota.exists() or quota.read_text().startswith("max"):
        assert everything == len(os.sched_getaffinity(0))


def test_modules_share_one_pool(large: Path, tmp_path: Path) -> None:
    """Two files that each start a thread per processor; a setting that reaches one of them only."""
    other = tmp_path / "other.so"
    shutil.copyfile(smallest(), other)
    first, second = load(large).library, load(other).library
    # A test before this one may have set a number.
    first.get_function("qknorm_set_num_threads")(0)
    default = first.get_function("qknorm_get_num_threads")()
    try:
        first.get_function("qknorm_set_num_threads")(7)
        assert second.get_function("qknorm_get_num_threads")() == 7
        second.get_function("qknorm_set_num_threads")(2)
        assert first.get_function("qknorm_get_num_threads")() == 2
        assert qknorm_tvm.get_num_threads() == 2
        qknorm_tvm.set_num_threads(3)
        assert first.get_function("qknorm_get_num_threads")() == 3
        qknorm_tvm.set_num_threads(0)
        assert qknorm_tvm.get_num_threads() == default
    finally:
        first.get_function("qknorm_set_num_threads")(0)


def test_one_pool_starts_no_more_threads_than_asked_for(large: Path, tmp_path: Path) -> None:
    """Threads that pile up with each module or each call."""
    other = tmp_path / "other.so"
    shutil.copyfile(large, other)
    run_python(
        """
        import os, sys
        import numpy as np, tvm_ffi
        modules = [tvm_ffi.load_module(path) for path in sys.argv[1:]]
        modules[0].qknorm_set_num_threads(3)
        before = len(os.listdir("/proc/self/task"))
        bits = [np.zeros((2048, n), np.uint16) for n in (1536, 256, 1536, 256)]
        ones = [np.ones(s, np.float32) for s in (1536, 256, (2048, 2))]
        for _ in range(10):
            for module in modules:
                module.apply_qk_rms_norm(bits[0], bits[1], *ones, bits[2], bits[3], 1e-6, 1)
        started = len(os.listdir("/proc/self/task")) - before
        assert started == 2, started
        """,
        str(large),
        str(other),
    )


@pytest.mark.parametrize(
    ("value", "error", "message"),
    [
        (-1, ValueError, "threads must be 0 or more, got -1"),
        (1.5, TypeError, "threads must be an int, got float"),
        (True, TypeError, "threads must be an int, got bool"),
        (None, TypeError, "threads must be an int, got NoneType"),
    ],
)
def test_set_num_threads_refuses(value: object, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=f"^{message}$"):
        qknorm_tvm.set_num_threads(value)  # type: ignore[arg-type]


def test_raw_set_num_threads_refuses(large: Path) -> None:
    function = load(large).library.get_function("qknorm_set_num_threads")
    for arguments, got in (((), "nothing"), (("2",), "str"), ((None,), "None"), ((2.0,), "float")):
        with pytest.raises(TypeError, match=f"^threads must be an int, got {got}$"):
            function(*arguments)


@pytest.mark.parametrize("threads", [-(2**32) + 5, -(2**63), -1, 0])
def test_raw_set_num_threads_of_none_is_the_default(threads: int) -> None:
    """A number cut to 32 bits: -4294967291 was 5."""
    library = load(smallest()).library
    set_threads = library.get_function("qknorm_set_num_threads")
    get_threads = library.get_function("qknorm_get_num_threads")
    set_threads(0)
    default = get_threads()
    try:
        set_threads(7)
        set_threads(threads)
        assert get_threads() == default
    finally:
        set_threads(0)


_LARGE_CALLS = """
import os, sys
import numpy as np, tvm_ffi
module = tvm_ffi.load_module(sys.argv[1])
module.qknorm_set_num_threads(3)
before = len(os.listdir("/proc/self/task"))
bits = [np.zeros((2048, n), np.uint16) for n in (1536, 256, 1536, 256)]
ones = [np.ones(s, np.float32) for s in (1536, 256, (2048, 2))]
for _ in range(10):
    module.apply_qk_rms_norm(bits[0], bits[1], *ones, bits[2], bits[3], 1e-6, 1)
print(len(os.listdir("/proc/self/task")) - before)
"""


def _preloaded(folder: Path, source: str) -> dict[str, str]:
    (folder / "preload.c").write_text(source)
    library = folder / "preload.so"
    command = ["gcc", "-shared", "-fPIC", str(folder / "preload.c"), "-o", str(library)]
    subprocess.run(command, check=True)
    return {"LD_PRELOAD": str(library), "QKNORM_TVM_OPENMP": "0"}


def test_threads_start_beside_large_thread_local_storage(large: Path, tmp_path: Path) -> None:
    """A stack of 256 kB that thread-local storage fills: one thread, without a word."""
    env = _preloaded(tmp_path, "__thread char storage[1 << 20]; char* get(void){return storage;}")
    assert run_python(_LARGE_CALLS, str(large), env=env).stdout.strip() == "2"


def test_threads_that_cannot_be_had_are_said_once(large: Path, tmp_path: Path) -> None:
    """A process that may start no thread: serial without a word, and tried again at each call."""
    env = _preloaded(
        tmp_path,
        "#include <errno.h>\n#include <stdio.h>\n"
        'int pthread_create() { fputs("tried;", stderr); return EAGAIN; }',
    )
    done = run_python(_LARGE_CALLS, str(large), env={**env, "OPENBLAS_NUM_THREADS": "1"})
    assert done.stdout.strip() == "0"
    assert done.stderr.count("tried;") == 1
    assert done.stderr.count("qknorm-tvm: 1 of 3 threads could be started") == 1


def test_child_of_a_fork_computes(large: Path) -> None:
    """A child that waits for threads which only the parent has."""
    run_python(
        """
        import os, sys, signal
        import numpy as np, tvm_ffi
        module = tvm_ffi.load_module(sys.argv[1])
        module.qknorm_set_num_threads(4)
        q = np.full((1024, 1536), 0x3F80, np.uint16)
        k = np.full((1024, 256), 0x3F80, np.uint16)
        ones = [np.ones(s, np.float32) for s in (1536, 256, (1024, 2))]
        def right():
            q_out, k_out = np.zeros_like(q), np.zeros_like(k)
            module.apply_qk_rms_norm(q_out, k_out, *ones, q, k, 0.0, 1)
            return (q_out == q).all() and (k_out == k).all()
        assert right()
        children = []
        for _ in range(3):
            child = os.fork()
            if child == 0:
                signal.alarm(60)
                os._exit(0 if all(right() for _ in range(20)) else 1)
            children.append(child)
        assert right()
        for child in children:
            status = os.waitpid(child, 0)[1]
            assert status == 0, status
        assert right()
        """,
        str(large),
    )


# ---- memory --------------------------------------------------------------------------------------

_ALLOCATIONS = """
import sys
import ctypes
import numpy as np
import tvm_ffi

class Info(ctypes.Structure):
    names = "arena ordblks smblks hblks hblkhd usmblks fsmblks uordblks fordblks keepcost"
    _fields_ = [(name, ctypes.c_size_t) for name in names.split()]

libc = ctypes.CDLL(None)
libc.mallinfo2.restype = Info
module = tvm_ffi.load_module(sys.argv[1])
module.qknorm_set_num_threads(int(sys.argv[2]))
rows = int(sys.argv[3])
arrays = [np.zeros((rows, n), np.uint16) for n in (1536, 256)]
arrays += [np.ones(s, np.float32) for s in (1536, 256, (rows, 2))]
arrays += [np.zeros((rows, n), np.uint16) for n in (1536, 256)]
tensors = [tvm_ffi.from_dlpack(a) for a in arrays]
function = module.apply_qk_rms_norm
def calls(n):
    for _ in range(n):
        function(*tensors, 1e-6, 1)
calls(100)
before = libc.mallinfo2()
calls(int(sys.argv[4]))
after = libc.mallinfo2()
print(after.uordblks + after.hblkhd - before.uordblks - before.hblkhd)
"""


@pytest.mark.parametrize(
    ("threads", "rows", "calls"), [(1, 1, 10_000), (3, 512, 300)], ids=["serial", "parallel"]
)
def test_memory_does_not_grow_with_calls(large: Path, threads: int, rows: int, calls: int) -> None:
    """One byte leaked a call shows as 10,000."""
    libc = ctypes.CDLL(None)
    if not hasattr(libc, "mallinfo2"):
        pytest.skip("reads glibc's mallinfo2, which this C library does not have")
    done = run_python(_ALLOCATIONS, str(large), str(threads), str(rows), str(calls))
    assert abs(int(done.stdout)) < calls // 3
