"""Files that are no whole module of this machine and version: an error that says so, no crash.

What is cut off, altered, or another's; more than the samples in ``test_runtime.py``. Most of the
files carry a checksum that does not fit; some are crafted and sealed, as another version or another
machine would have made them. ``QKNORM_TVM_CAMPAIGN=1`` draws fifty times as many.
"""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cuda_code
import numpy as np
import pytest
from support import RawTensor, environment, make_case, raw_call, run_python, smallest

from qknorm_tvm import Module, ModuleFileError, load
from qknorm_tvm.cli import main
from qknorm_tvm.load import module_file

_SAMPLES = 300 * (50 if os.environ.get("QKNORM_TVM_CAMPAIGN") else 1)
_REFUSED = r"is (not a qknorm-tvm module: |damaged)"
_EDGES = (0, 1, 2, 7, 63, 64, 255, 1 << 15, 0xFFFF, 1 << 31, (1 << 32) - 1, 1 << 63, (1 << 64) - 1)


def _headers(data: bytes) -> tuple[int, int]:
    """Return where the section headers begin, and how many there are."""
    (table,) = struct.unpack_from("<Q", data, 0x28)
    (count,) = struct.unpack_from("<H", data, 0x3C)
    return table, count


def _boundaries(data: bytes) -> set[int]:
    """Return where headers, segments and sections begin and end."""
    table, count = _headers(data)
    (programs,) = struct.unpack_from("<Q", data, 0x20)
    (program_count,) = struct.unpack_from("<H", data, 0x38)
    places = {0, 64, programs, table, table + 64 * count}
    places |= {programs + 56 * i for i in range(program_count)}
    for index in range(count):
        kind, offset, size = struct.unpack_from("<4xI16xQQ", data, table + 64 * index)
        places |= {table + 64 * index, offset, offset + (size if kind != 8 else 0)}
    offset, size = module_file._section(data, "a module")
    head = offset + len(module_file.MAGIC)
    return places | {head, head + 32, offset + size // 2}


def _refused(path: Path, content: bytes) -> None:
    path.write_bytes(content)
    for reader in (module_file.read_metadata, load):
        with pytest.raises(ModuleFileError, match=_REFUSED):
            reader(path)


# ---- files with a checksum that does not fit -----------------------------------------------------


def test_any_truncation_is_refused(tmp_path: Path) -> None:
    """Half a download: every 64th of the file, and each boundary with its neighbours."""
    data = smallest().read_bytes()
    lengths = {len(data) * i // 64 for i in range(64)}
    lengths |= {at + by for at in _boundaries(data) for by in (-1, 0, 1)}
    for length in sorted(length for length in lengths if 0 <= length < len(data)):
        _refused(tmp_path / "short.so", data[:length])


@pytest.mark.parametrize("filler", [b"\0", b"\xff"], ids=["zeros", "ones"])
def test_file_of_full_length_without_its_end_is_refused(filler: bytes, tmp_path: Path) -> None:
    """What a crash of the machine leaves of a file that was being written: the length, no data."""
    data = smallest().read_bytes()
    for part in range(64):
        length = len(data) * part // 64
        _refused(tmp_path / "sparse.so", data[:length] + filler * (len(data) - length))


def test_any_block_lost_is_refused(tmp_path: Path) -> None:
    """A block of a disk that reads as zeros, or as its neighbour."""
    data = smallest().read_bytes()
    for block in (512, 4096):
        for at in range(0, len(data), block):
            lost, before = data[at : at + block], data[at - block : at]
            for other in (bytes(len(lost)), before[: len(lost)].ljust(len(lost), b"\0")):
                if other != lost:
                    _refused(tmp_path / "block.so", data[:at] + other + data[at + len(lost) :])


def test_flipped_bits_anywhere_are_refused(tmp_path: Path) -> None:
    """One bit, sampled over the whole file; half of the samples in headers and metadata."""
    data = smallest().read_bytes()
    rng = np.random.default_rng(0)
    table, count = _headers(data)
    offset, size = module_file._section(data, "a module")
    dense = [*range(64), *range(table, table + 64 * count), *range(offset, offset + size)]
    for sample in range(_SAMPLES):
        at = int(rng.choice(dense) if sample % 2 else rng.integers(len(data)))
        changed = bytearray(data)
        changed[at] ^= 1 << int(rng.integers(8))
        _refused(tmp_path / "flipped.so", bytes(changed))


def test_header_fields_out_of_range_are_refused(tmp_path: Path) -> None:
    """Sizes and places at the edges of their types: an IndexError, or memory for 2^63 bytes."""
    data = smallest().read_bytes()
    rng = np.random.default_rng(1)
    table, count = _headers(data)
    fields = [(at, size) for size in (2, 4, 8) for at in range(16, 64, size)]
    fields += [(table + i, size) for size in (4, 8) for i in range(0, 64 * count, size)]
    for _ in range(_SAMPLES):
        changed = bytearray(data)
        for _ in range(int(rng.integers(1, 4))):
            at, size = fields[int(rng.integers(len(fields)))]
            edge = (*_EDGES, len(data), len(data) - 1, table)[int(rng.integers(len(_EDGES) + 3))]
            changed[at : at + size] = (edge % (1 << 8 * size)).to_bytes(size, "little")
        if changed != data:
            _refused(tmp_path / "fields.so", bytes(changed))


def test_random_bytes_are_refused(tmp_path: Path) -> None:
    """Rubbish behind a right beginning, in which the section table may be anything."""
    rng = np.random.default_rng(2)
    for length in rng.integers(0, 5000, _SAMPLES):
        rubbish = rng.integers(0, 256, int(length), dtype=np.uint8).tobytes()
        head = b"\x7fELF\x02\x01" if rng.random() < 0.8 else b""
        content = bytearray(head + rubbish)
        if len(content) > 64:  # section headers that lie in the file, so that they are looked at
            struct.pack_into("<Q", content, 0x28, int(rng.integers(len(content))))
            struct.pack_into("<HHH", content, 0x3A, 64, *map(int, rng.integers(0, 40, 2)))
        _refused(tmp_path / "rubbish.so", bytes(content))


# ---- what is no regular file ---------------------------------------------------------------------


def test_folder_is_refused(tmp_path: Path) -> None:
    for reader in (module_file.read_metadata, load):
        with pytest.raises((ModuleFileError, IsADirectoryError), match=str(tmp_path)):
            reader(tmp_path)


def test_link_to_nothing_is_file_not_found(tmp_path: Path) -> None:
    link = tmp_path / "link.so"
    link.symlink_to(tmp_path / "gone.so")
    with pytest.raises(FileNotFoundError, match=r"link\.so"):
        load(link)


def test_links_and_odd_names_are_followed(tmp_path: Path) -> None:
    """A path that the loader takes apart: spaces, quotes, dashes, not ASCII."""
    for name in ("a b'c\".so", "ünïcode.so", "-rf.so", "module.1.so"):
        link = tmp_path / name
        link.symlink_to(smallest())
        module = load(link)
        case = make_case(2, 33, 7, "float32")
        expected = case.expected()
        raw_call(module, *case.tensors, case.epsilon)
        assert case.q_out.tobytes() == expected[0].tobytes()


def test_name_that_tvm_ffi_does_not_take_is_refused(tmp_path: Path) -> None:
    """tvm-ffi goes by the name's end: an error that does not say which file it was."""
    link = tmp_path / "module.so.1"
    link.symlink_to(smallest())
    with pytest.raises(ModuleFileError, match=r"module\.so\.1 must be named \*\.so"):
        load(link)


def test_unreadable_file_is_a_permission_error(tmp_path: Path) -> None:
    if os.getuid() == 0:
        pytest.skip("root may read every file")
    path = tmp_path / "secret.so"
    path.write_bytes(smallest().read_bytes())
    path.chmod(0)
    with pytest.raises(PermissionError, match=r"secret\.so"):
        load(path)


@pytest.mark.parametrize("command", ["inspect", "verify"])
@pytest.mark.parametrize("kind", ["truncated", "empty", "text", "folder", "/dev/null"])
def test_commands_refuse_it_in_one_line(
    kind: str, command: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A traceback, or the exit status that means "not exact"."""
    path = tmp_path / "bad.so"
    if kind == "folder":
        path.mkdir()
    elif kind == "/dev/null":
        path = Path(kind)
    else:
        content = smallest().read_bytes()
        path.write_bytes({"truncated": content[:3000], "empty": b""}.get(kind, b"some text\n" * 99))
    assert main([command, str(path)]) == 2
    captured = capsys.readouterr()
    assert not captured.out
    assert captured.err.startswith("Error: ")
    assert path.name in captured.err
    assert captured.err.count("\n") == 1


# ---- whole files of another machine or version ---------------------------------------------------


def _metadata() -> dict[str, Any]:
    return module_file.read_metadata(smallest())


def _crafted(
    path: Path,
    *,
    metadata: Any = None,
    edit: Callable[[bytearray], None] = lambda _: None,
) -> Path:
    """Write a copy of a module with other metadata or bytes, and a checksum that fits."""
    data = bytearray(smallest().read_bytes())
    if metadata is not None:
        offset, size = module_file._section(bytes(data), "a module")
        start = offset + len(module_file.MAGIC) + 32
        text = json.dumps(metadata).encode()
        assert len(text) < offset + size - start
        data[start : offset + size] = text.ljust(offset + size - start, b"\0")
    edit(data)
    path.write_bytes(data)
    module_file.seal(path)
    return path


@pytest.mark.parametrize(
    ("place", "form", "value"),
    [(18, "<H", 183), (18, "<H", 243), (18, "<H", 3), (16, "<H", 1), (20, "<I", 2)],
    ids=["aarch64", "riscv", "i386", "relocatable", "ELF version 2"],
)
def test_library_of_another_machine_is_refused(
    place: int, form: str, value: int, tmp_path: Path
) -> None:
    path = _crafted(
        tmp_path / "foreign.so", edit=lambda data: struct.pack_into(form, data, place, value)
    )
    expected = r"foreign\.so (cannot be loaded on this machine: |is for .* machines, and this one )"
    with pytest.raises(ModuleFileError, match=expected):
        load(path)


@pytest.mark.parametrize(("place", "value"), [(4, 1), (5, 2)], ids=["32 bits", "big-endian"])
def test_library_of_another_word_size_or_order_is_refused(
    place: int, value: int, tmp_path: Path
) -> None:
    data = bytearray(smallest().read_bytes())
    data[place] = value
    path = tmp_path / "foreign.so"
    path.write_bytes(data)
    with pytest.raises(ModuleFileError, match=r"foreign\.so .* it is no 64-bit ELF library"):
        load(path)


def _renamed(before: bytes, after: bytes) -> Callable[[bytearray], None]:
    def edit(data: bytearray) -> None:
        assert data.count(before + b"\0") == 1
        assert len(before) == len(after)
        data[:] = data.replace(before + b"\0", after + b"\0")

    return edit


def test_missing_library_is_named(tmp_path: Path) -> None:
    """A module that needs what this machine lacks: an error from the depths of the loader."""
    path = _crafted(tmp_path / "needs.so", edit=_renamed(b"libtvm_ffi.so", b"libtvm_fff.so"))
    with pytest.raises(
        ModuleFileError, match=r"needs\.so cannot be loaded on this machine: .*libtvm_fff\.so"
    ):
        load(path)


def test_function_that_tvm_ffi_lacks_is_noticed_when_loaded(tmp_path: Path) -> None:
    """With an older tvm-ffi: a process that ends, status 127, in the middle of a call."""
    name = b"TVMFFIErrorSetRaisedFromCStr"
    path = _crafted(tmp_path / "newer.so", edit=_renamed(name, name[:-1] + b"9"))
    done = run_python(
        """
        import sys
        from qknorm_tvm import ModuleFileError, load
        try:
            module = load(sys.argv[1])
        except ModuleFileError as error:
            assert "cannot be loaded on this machine" in str(error), error
            assert "TVMFFIErrorSetRaisedFromCSt9" in str(error), error
        else:
            module.apply_qk_rms_norm()
        """,
        str(path),
        check=False,
    )
    assert done.returncode == 0, done.stderr


def _without(key: str) -> dict[str, Any]:
    return {name: value for name, value in _metadata().items() if name != key}


_STRANGE: dict[str, Callable[[], Any]] = {
    "another operation": lambda: {**_without("versions"), "ops": ["apply_rope"]},
    "a spec of another operation": lambda: {
        **_metadata(),
        "specs": [{**_metadata()["specs"][0], "op": "apply_rope"}],
    },
    "a spec of another dtype": lambda: {
        **_metadata(),
        "specs": [{**_metadata()["specs"][0], "in_dtype": "fp8"}],
    },
    "a spec with another field": lambda: {
        **_without("versions"),
        "specs": [{**_metadata()["specs"][0], "x": 1}],
    },
    "specs that are no list": lambda: {**_metadata(), "specs": 3},
    "no specs": lambda: {**_metadata(), "specs": []},
    "specs missing": lambda: _without("specs"),
    "format 0": lambda: {**_metadata(), "format": 0},
    "format true": lambda: {**_without("versions"), "format": True},
}


@pytest.mark.parametrize("kind", _STRANGE)
def test_metadata_of_another_version_is_refused(kind: str, tmp_path: Path) -> None:
    """A module of another operation that loads; a KeyError in the first look at its specs."""
    path = _crafted(tmp_path / "strange.so", metadata=_STRANGE[kind]())
    with pytest.raises(ModuleFileError, match=r"strange\.so "):
        load(path)


def test_newer_format_is_refused_whatever_else_it_says(tmp_path: Path) -> None:
    """A newer version's metadata read by this one's rules before its format is."""
    path = _crafted(tmp_path / "newer.so", metadata={"format": 99, "specs": "elsewhere"})
    for reader in (module_file.read_metadata, load):
        with pytest.raises(ModuleFileError, match=r"newer\.so has format 99; .* upgrade it"):
            reader(path)


# ---- a module for GPUs where there is none -------------------------------------------------------


@pytest.fixture(scope="module")
def for_gpus() -> Path:
    from qknorm_tvm.call.arrays import cuda_target

    try:
        target = cuda_target(0)
    except (OSError, RuntimeError):
        target = None
    if target is not None:
        pytest.skip(f"looks at what happens without a GPU; this machine has one ({target})")
    return cuda_code.built("apply").path


@pytest.fixture
def cuda_module(for_gpus: Path) -> Module:
    return load(for_gpus)


@pytest.mark.slow
def test_cuda_module_without_a_gpu_says_so(cuda_module: Module) -> None:
    """A crash in the driver that is not there, or a launch that fails unsaid."""
    case = make_case(2, 1536, 256, "float32")
    with pytest.raises(ValueError, match=r"^q must be on a CUDA device, got a tensor on the CPU$"):
        raw_call(cuda_module, *case.tensors, case.epsilon)
    for index in (0, 7):
        tensors = [RawTensor(array, device=(2, index)) for array in case.tensors]
        with pytest.raises(RuntimeError, match=rf"^cuda:{index} cannot run this module: .*driver"):
            raw_call(cuda_module, *tensors, case.epsilon)
    assert (case.q_out.view(np.uint8) == 0xA5).all()


@pytest.mark.slow
def test_cuda_module_is_inspected_and_not_verified_without_a_gpu(
    for_gpus: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["inspect", str(for_gpus)]) == 0
    assert "no: this machine has no CUDA driver, or no GPU" in capsys.readouterr().out
    assert main(["verify", str(for_gpus)]) == 2
    assert "is for cuda:sm_90, not for --device cpu" in capsys.readouterr().err


@pytest.mark.slow
def test_cuda_module_does_not_serve_arrays_on_the_cpu(for_gpus: Path, tmp_path: Path) -> None:
    """``use`` of a module for GPUs that CPU calls are sent to."""
    with environment(QKNORM_TVM_CACHE_DIR=str(tmp_path)):
        run_python(
            """
            import sys
            import numpy as np
            import qknorm_tvm
            from qknorm_tvm.call import cache
            qknorm_tvm.use(qknorm_tvm.load(sys.argv[1]))
            asked = []
            cache._load_or_build = lambda spec: asked.append(spec) or sys.exit(7)
            ones = [np.ones(s, np.float32) for s in ((2, 1536), (2, 256), (2, 2), 1536, 256)]
            try:
                qknorm_tvm.apply_qk_rms_norm(*ones)
            except SystemExit:
                assert asked[0].parsed_target.kind == "cpu"
            else:
                raise AssertionError("served by a module for GPUs")
            """,
            str(for_gpus),
        )
