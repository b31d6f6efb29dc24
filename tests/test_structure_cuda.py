"""What the CUDA code must hold and must not: PTX and machine code, made by nvcc without a GPU."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import cuda_code
import pytest
from cuda_code import MODULES, SM_90, Built, disassembled, needs_nvcc, used

from qknorm_tvm import BuildError, KernelSpec, compile
from qknorm_tvm.build import cuda as build_cuda
from qknorm_tvm.load.module_file import read_metadata
from qknorm_tvm.operations import OPERATIONS
from qknorm_tvm.schedules.cuda_config import CudaConfig
from qknorm_tvm.schedules.cuda_variants import default_variants

SPECS = MODULES["apply"]


@pytest.fixture(scope="module", params=[pytest.param("apply", marks=pytest.mark.slow)])
def built(request: pytest.FixtureRequest) -> Built:
    return cuda_code.built(request.param)


@pytest.fixture(scope="module")
def kernels(built: Built) -> dict[str, str]:
    return built.ptx()


def _kernel_names(built: Built) -> dict[str, bool]:
    """Return the kernels that there must be, and whether each may rely on alignment."""
    return {name: variant.alignment is not None for name, (_, variant) in built.kernels().items()}


def test_one_kernel_a_variant(built: Built, kernels: dict[str, str]) -> None:
    """A second launch in a call."""
    assert sorted(kernels) == sorted(_kernel_names(built))


def test_one_launch_a_variant(built: Built) -> None:
    source = built.source.read_text()
    launches = re.findall(r"::qkn_launch<::(\w+),", source)
    assert sorted(launches) == sorted(_kernel_names(built))
    assert "<<<" not in source


def test_no_flush_to_zero_and_no_fast_math(built: Built, kernels: dict[str, str]) -> None:
    """Denormals lost, divisions and roots that are not rounded correctly."""
    assert not any("fast" in word and "math" in word for word in built.command)
    for name, text in kernels.items():
        assert ".ftz" not in text, name
        assert "rsqrt.approx.f32" in text, name
        assert "fma.rn.f32" not in text, name  # would skip the rounding between two products


@pytest.mark.slow
def test_reproducible_code_divides_and_takes_roots_correctly_rounded() -> None:
    text = cuda_code.built("reproducible").device_code("ptx", "sm_90")[0].read_text()
    assert "sqrt.rn.f32" in text
    assert "rsqrt.approx" not in text


def test_accesses_of_16_bytes_where_addresses_allow(built: Built, kernels: dict[str, str]) -> None:
    """Narrow accesses, at half the bandwidth; or wide ones where addresses do not allow them."""
    for name, aligned in _kernel_names(built).items():
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
    text = built.device_code("ptx", "sm_80")[0].read_text()
    assert "griddepcontrol" not in text
    assert text.count(".visible .entry") == len(_kernel_names(built))


def test_no_local_memory_and_few_registers(built: Built) -> None:
    """Arrays that went to memory; so many registers that few blocks fit a multiprocessor."""
    _, log = built.device_code("cubin", "sm_90")
    usage = used(log)
    assert set(usage) == set(_kernel_names(built))
    for name, kernel in usage.items():
        assert kernel.local_memory == 0, name
        assert kernel.registers <= 64, (name, kernel.registers)
        assert "barriers" not in log or "used 0 barriers" in log


def test_machine_code(built: Built) -> None:
    """What ptxas may undo: wide accesses, the place of the wait, registers instead of memory."""
    code_of = disassembled(built.device_code("cubin", "sm_90")[0])
    assert set(code_of) == set(_kernel_names(built))
    for name, aligned in _kernel_names(built).items():
        code = code_of[name]
        assert not re.search(r"\b(LDL|STL)\b", code), name
        assert ".FTZ" not in code, name
        assert ".CONSTANT" not in code, name
        if aligned:
            assert re.search(r"LDG\.E\.128", code), name
            assert re.search(r"STG\.E(\.EF)?\.128", code), name
        assert code.index("ACQBULK") < min(m.start() for m in re.finditer(r"\bLDG", code)), name


@pytest.mark.slow
def test_a_compile_error_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    """A module that holds source instead of machine code, and fails where it is used."""
    needs_nvcc()
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
    for path in (Path(__file__).parent.parent, Path.home(), built.built_in, include):
        assert str(path).encode() + b"/" not in data


def test_size(built: Built) -> None:
    """CUDA's static runtime is 0.7 MB; the rest is small."""
    assert built.path.stat().st_size <= 1_200_000


@pytest.mark.slow
def test_one_module_for_a_layer(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """All operations in one file, for several architectures, each with its own entry point.

    Exported by the command line, whose ``--arch`` is a target's architectures.
    """
    needs_nvcc()
    from qknorm_tvm.cli import main

    specs = [
        KernelSpec(op=name, q_cols=64, k_cols=32, target="cuda:sm_90,sm_80",
                   head_dim=32 if operation.rotates else None)
        for name, operation in OPERATIONS.items()
    ]  # fmt: skip
    assert {spec.target for spec in specs} == {"cuda:sm_80,sm_90"}
    out = tmp_path / "qk.so"
    command = ["export", str(out), "--q-cols", "64", "--k-cols", "32"]
    ops = [word for name in OPERATIONS for word in ("--op", name)]
    assert main([*command, *ops, "--head-dim", "32", "--arch", "sm_90,sm_80"]) == 0
    metadata = read_metadata(out)
    assert metadata["kind"] == "cuda"
    assert metadata["target"] == "cuda:sm_80,sm_90"
    assert metadata["architectures"] == ["sm_80", "sm_90", "compute_90"]
    assert metadata["ops"] == sorted(OPERATIONS)
    assert metadata["specs"] == [spec.to_dict() for spec in specs]
    code = metadata["levels"][0]["code"]
    assert {variant["spec"] for variant in code} == {spec.text for spec in specs}
    for spec in specs:
        assert [variant["variants"] for variant in code if variant["spec"] == spec.text] == [
            [v.name] for v in default_variants(spec, None)
        ]
    for variant in code:
        CudaConfig(**variant["config"])

    assert main([*command, "--arch", "sm_90", "--target", "cpu"]) == 2
    assert "--arch names GPUs, and --target is cpu" in capsys.readouterr().err
    assert main([*command, "--arch", "hopper"]) == 2
    assert "such as 'cuda:sm_80,sm_90'; got 'cuda:hopper'" in capsys.readouterr().err
