"""What the CUDA code must hold and must not: PTX and machine code, made by nvcc without a GPU."""

from __future__ import annotations

import dataclasses
import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from qknorm_tvm import BuildError, KernelSpec, build_cuda, compile
from qknorm_tvm.module_file import read_metadata
from qknorm_tvm.schedules.cuda_config import CudaConfig, default_variants

SM_90 = "cuda:sm_90"
SPECS = tuple(
    KernelSpec(in_dtype=a, out_dtype=b, q_cols=q, k_cols=k, target=SM_90)
    for a, b, q, k in (
        ("bfloat16", "bfloat16", 1536, 256),
        ("bfloat16", "bfloat16", 6144, 1024),
        ("float16", "float16", 256, 64),
        ("float32", "float32", 1536, 256),
        ("bfloat16", "float32", 1536, 256),
        ("bfloat16", "bfloat16", 1537, 257),
    )
)


def _needs_nvcc() -> None:
    try:
        build_cuda.find_nvcc()
    except BuildError as error:
        pytest.skip(str(error))


@dataclasses.dataclass
class Built:
    """A module, the source it was made of, and nvcc's command line for that."""

    path: Path
    source: Path
    command: list[str]

    def device_code(self, kind: str, arch: str) -> tuple[str, str]:
        """Compile the source once more as the product does, to ``ptx`` or ``cubin``."""
        dropped = ("-c", "-gencode", "-Xfatbin", "--compress", "-o", "-L")
        words = [word for word in self.command if not word.startswith(dropped)]
        words = [word for word in words if not word.endswith(".o")]
        out = self.source.with_suffix(f".{arch}.{kind}")
        words += [f"-{kind}", f"-arch={arch}", "-o", str(out)]
        words += ["-Xptxas=-v"] if kind == "cubin" else []
        done = subprocess.run(words, capture_output=True, text=True, check=True)
        return (out.read_text() if kind == "ptx" else str(out)), done.stderr


@pytest.fixture(scope="module")
def built() -> Built:
    _needs_nvcc()
    commands: list[list[str]] = []
    with pytest.MonkeyPatch.context() as patch:
        run = build_cuda.run_compiler

        def record(command: list[str], doing: str) -> None:
            commands.append(command)
            run(command, doing)

        patch.setattr(build_cuda, "run_compiler", record)
        compiled = compile(list(SPECS))
    command = next(one for one in commands if "-c" in one)
    found = Built(compiled.path, compiled.path.parent / "module.cu", command)
    found.keep = compiled  # type: ignore[attr-defined]  # its folder goes with it
    return found


@pytest.fixture(scope="module")
def kernels(built: Built) -> dict[str, str]:
    """PTX for sm_90, by kernel."""
    text, _ = built.device_code("ptx", "sm_90")
    parts = re.split(r"^\.visible \.entry (\w+)\(", text, flags=re.MULTILINE)
    return dict(zip(parts[1::2], parts[2::2], strict=True))


def _kernel_names() -> dict[str, bool]:
    """Return the kernels that there must be, and whether each may rely on alignment."""
    found = {}
    for index, spec in enumerate(SPECS):
        seen = set()
        for variant in default_variants(spec, None):
            key = (variant.config, variant.stride_unit, variant.alignment)
            if key not in seen:
                found[f"qkn_cuda_{index}_{variant.name}_kernel"] = variant.alignment is not None
            seen.add(key)
    return found


def test_one_kernel_a_variant(kernels: dict[str, str]) -> None:
    """A second launch in a call."""
    assert sorted(kernels) == sorted(_kernel_names())


def test_one_launch_a_variant(built: Built) -> None:
    source = built.source.read_text()
    launches = re.findall(r"::qkn_launch<::(\w+),", source)
    assert sorted(launches) == sorted(_kernel_names())
    assert "<<<" not in source


def test_no_flush_to_zero_and_no_fast_math(built: Built, kernels: dict[str, str]) -> None:
    """Denormals lost, divisions and roots that are not rounded correctly."""
    assert not any("fast" in word and "math" in word for word in built.command)
    for name, text in kernels.items():
        assert ".ftz" not in text, name
        assert "rsqrt.approx.f32" in text, name
        assert "fma.rn.f32" not in text, name  # would skip the rounding between two products


def test_reproducible_code_divides_and_takes_roots_correctly_rounded() -> None:
    _needs_nvcc()
    compiled = compile(SPECS[0].replace(reproducible=True))
    with pytest.MonkeyPatch.context():
        source = compiled.path.parent / "module.cu"
        out = source.with_suffix(".ptx")
        import tvm_ffi.libinfo as ffi

        include = [f"-I{ffi.find_include_path()}", f"-I{ffi.find_dlpack_include_path()}"]
        command = [str(build_cuda.find_nvcc()), "-ptx", "-arch=sm_90", "-std=c++17", *include]
        subprocess.run([*command, str(source), "-o", str(out)], check=True, capture_output=True)
    text = out.read_text()
    assert "sqrt.rn.f32" in text
    assert "rsqrt.approx" not in text


def test_accesses_of_16_bytes_where_addresses_allow(kernels: dict[str, str]) -> None:
    """Narrow accesses, at half the bandwidth; or wide ones where addresses do not allow them."""
    for name, aligned in _kernel_names().items():
        text = kernels[name]
        wide = re.findall(r"ld\.global\.v4\.(?:b32|u32|f32)", text)
        stores = re.findall(r"st\.global(?:\.cs)?\.v4\.b32", text)
        if aligned:
            assert wide, name
            assert stores, name
            assert not re.search(r"ld\.global\.[bu]16", text), name
        else:
            assert not wide, name
            assert not re.search(r"[ls][dt]\.global(?:\.cs)?\.v[248]", text), name


def test_the_wait_comes_before_every_load_of_inputs(kernels: dict[str, str]) -> None:
    """Data read before the previous kernel has written it."""
    for name, text in kernels.items():
        waits = [m.start() for m in re.finditer(r"griddepcontrol\.wait", text)]
        assert waits, name
        loads = [m.start() for m in re.finditer(r"\bld\.global", text)]
        stores = [m.start() for m in re.finditer(r"\bst\.global", text)]
        assert min(loads + stores) > waits[0], name
        # One wait for the threads of Q, one for those of K, each ahead of all that it guards.
        assert len(waits) == 2 or min(stores) > max(waits), name
        assert "griddepcontrol.launch_dependents" in text, name


def test_inputs_are_read_coherently(kernels: dict[str, str]) -> None:
    """``ld.global.nc`` of what another kernel may just have written, or of outputs in place."""
    for name, text in kernels.items():
        assert "ld.global.nc" not in text, name


def test_older_gpus_get_no_dependent_launch(built: Built) -> None:
    """Instructions that ptxas refuses below sm_90."""
    text, _ = built.device_code("ptx", "sm_80")
    assert "griddepcontrol" not in text
    assert text.count(".visible .entry") == len(_kernel_names())


def test_no_local_memory_and_few_registers(built: Built) -> None:
    """Arrays that went to memory; so many registers that few blocks fit a multiprocessor."""
    _, log = built.device_code("cubin", "sm_90")
    functions = re.findall(
        r"Compiling entry function '(\w+)'.*?(\d+) bytes stack frame, (\d+) bytes spill stores, "
        r"(\d+) bytes spill loads.*?Used (\d+) registers",
        log,
        re.DOTALL,
    )
    assert {name for name, *_ in functions} == set(_kernel_names())
    for name, stack, stores, loads, registers in functions:
        assert (stack, stores, loads) == ("0", "0", "0"), name
        assert int(registers) <= 64, (name, registers)
        assert "barriers" not in log or "used 0 barriers" in log


def _disassembler() -> str:
    given = shutil.which("nvdisasm") or os.environ.get("NVDISASM")
    if not given:
        pytest.skip("reads machine code with nvdisasm, which is not installed")
    return given


def test_machine_code(built: Built) -> None:
    """What ptxas may undo: wide accesses, the place of the wait, registers instead of memory."""
    tool = _disassembler()
    path, _ = built.device_code("cubin", "sm_90")
    text = subprocess.run([tool, "-c", path], capture_output=True, text=True, check=True).stdout
    parts = re.split(r"^\.text\.(\w+):", text, flags=re.MULTILINE)
    found = dict(zip(parts[1::2], parts[2::2], strict=True))
    assert set(found) == set(_kernel_names())
    for name, aligned in _kernel_names().items():
        code = found[name]
        assert not re.search(r"\b(LDL|STL)\b", code), name
        assert ".FTZ" not in code, name
        assert ".CONSTANT" not in code, name
        if aligned:
            assert re.search(r"LDG\.E\.128", code), name
            assert re.search(r"STG\.E(\.EF)?\.128", code), name
        assert code.index("ACQBULK") < min(m.start() for m in re.finditer(r"\bLDG", code)), name


def test_a_compile_error_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    """A module that holds source instead of machine code, and fails where it is used."""
    _needs_nvcc()
    source = build_cuda.cuda_source
    monkeypatch.setattr(
        build_cuda, "cuda_source", lambda functions: source(functions) + "\nint broken = ;\n"
    )
    with pytest.raises(BuildError, match="expected an expression"):
        compile(KernelSpec(q_cols=64, k_cols=32, target=SM_90))


def test_without_nvcc_one_sentence_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(build_cuda.shutil, "which", lambda name: None)
    monkeypatch.setattr(build_cuda.sys, "path", [str(tmp_path)])
    for name in ("CUDA_HOME", "CUDA_PATH"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(BuildError, match=r"pip install 'qknorm-tvm\[cuda\]'"):
        build_cuda.find_nvcc()


def test_file_needs_tvm_ffi_and_the_system_only(built: Built) -> None:
    """A CUDA runtime, TVM, or a path of the machine that built it."""
    if shutil.which("readelf") is None:
        pytest.skip("reads the file with readelf, which is not installed")
    text = subprocess.run(
        ["readelf", "-d", str(built.path)], capture_output=True, text=True, check=True
    ).stdout
    needed = set(re.findall(r"NEEDED\).*\[(.*)\]", text))
    assert "libtvm_ffi.so" in needed
    assert needed - {"libtvm_ffi.so"} <= {
        "libc.so.6",
        "libm.so.6",
        "libstdc++.so.6",
        "libgcc_s.so.1",
        "libpthread.so.0",
        "libdl.so.2",
        "librt.so.1",
        "ld-linux-x86-64.so.2",
    }
    assert "RPATH" not in text
    assert "RUNPATH" not in text
    data = built.path.read_bytes()
    import tvm_ffi.libinfo as ffi

    # tvm-ffi's headers name themselves in the messages of their checks.
    include = Path(ffi.find_include_path())
    for path in (Path(__file__).parent.parent, Path.home(), built.path.parent, include):
        assert str(path).encode() + b"/" not in data


def test_size(built: Built) -> None:
    """CUDA's static runtime is 0.7 MB; the rest is small."""
    assert built.path.stat().st_size <= 1_200_000


def test_metadata_and_architectures() -> None:
    _needs_nvcc()
    spec = KernelSpec(q_cols=64, k_cols=32, target="cuda:sm_90,sm_80")
    assert spec.target == "cuda:sm_80,sm_90"
    metadata = read_metadata(compile(spec).path)
    assert metadata["kind"] == "cuda"
    assert metadata["architectures"] == ["sm_80", "sm_90", "compute_90"]
    assert metadata["specs"] == [spec.to_dict()]
    code = metadata["levels"][0]["code"]
    assert [one["variants"] for one in code] == [[v.name] for v in default_variants(spec, None)]
    for one in code:
        CudaConfig(**one["config"])


def test_export_takes_architectures(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    _needs_nvcc()
    from qknorm_tvm.cli import main

    out = tmp_path / "qk.so"
    columns = ["--q-cols", "64", "--k-cols", "32"]
    assert main(["export", str(out), *columns, "--arch", "sm_90,sm_80"]) == 0
    assert read_metadata(out)["target"] == "cuda:sm_80,sm_90"
    assert main(["export", str(out), *columns, "--arch", "sm_90", "--target", "cpu"]) == 2
    assert "--arch names GPUs, and --target is cpu" in capsys.readouterr().err
    assert main(["export", str(out), *columns, "--arch", "hopper"]) == 2
    assert "such as 'cuda:sm_80,sm_90'; got 'cuda:hopper'" in capsys.readouterr().err
