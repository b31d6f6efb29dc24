"""CUDA modules whose code tests read: compiled once a session, and what nvcc made on its way.

Without a GPU. Whichever test or worker asks first compiles; the others find the files in the
session's folder.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import os
import re
import shutil
import struct
import subprocess
from pathlib import Path
from typing import Any

import filelock
import pytest
from support import session_folder
from tvm import tirx

from qknorm_tvm import BuildError, KernelSpec, compile
from qknorm_tvm.build import cuda as build_cuda
from qknorm_tvm.declare.parameters import function, parameters
from qknorm_tvm.schedules import cuda_row
from qknorm_tvm.schedules.cuda_config import CudaVariant
from qknorm_tvm.schedules.cuda_variants import default_variants

SM_90 = "cuda:sm_90"
APPLY, STATISTICS, FUSED = OPERATIONS = (
    "apply_qk_rms_norm",
    "row_mean_of_squares_qk",
    "qk_rms_norm",
)
#: The specs of each module.
MODULES: dict[str, tuple[KernelSpec, ...]] = {
    "apply": tuple(
        KernelSpec(in_dtype=a, out_dtype=b, q_cols=q, k_cols=k, target=SM_90)
        for a, b, q, k in (
            ("bfloat16", "bfloat16", 1536, 256),
            ("bfloat16", "bfloat16", 6144, 1024),
            ("float16", "float16", 256, 64),
            ("float32", "float32", 1536, 256),
            ("bfloat16", "float32", 1536, 256),
            ("bfloat16", "bfloat16", 1537, 257),
        )
    ),
    # Open columns last, as a module has them.
    "statistics": tuple(
        KernelSpec(op=op, in_dtype=dtype, q_cols=q, k_cols=k, target=SM_90)
        for columns in (
            (
                ("bfloat16", 1536, 256),
                ("bfloat16", 6144, 1024),
                ("float32", 1536, 256),
                ("bfloat16", 1537, 257),
            ),
            (("bfloat16", None, None),),
        )
        for op in (STATISTICS, FUSED)
        for dtype, q, k in columns
    ),
}
MODULES["reproducible"] = (MODULES["apply"][0].replace(reproducible=True),)
ROPE, CACHE = "qk_rms_norm_rope", "qk_rms_norm_rope_cache"


def _rotating(op: str, q_cols: int, k_cols: int, head_dim: int = 128, **fields: Any) -> KernelSpec:
    return KernelSpec(
        op=op, q_cols=q_cols, k_cols=k_cols, head_dim=head_dim, target=SM_90, **fields
    )


MODULES["rope"] = (
    _rotating(CACHE, 1536, 256, rotary_dim=64),
    _rotating(CACHE, 1536, 256, rotary_dim=64, statistics="local", cache_dtype="float8_e4m3fn"),
    _rotating(ROPE, 1920, 480, 96, rotary_dim=96),
    _rotating(CACHE, 6144, 1024, rotary_dim=64),
    _rotating(CACHE, 6144, 1024, rotary_dim=128, statistics="local", writes_k_out=True),
    _rotating(CACHE, 1536, 256, rotary_dim=64, in_dtype="float32"),
    _rotating(CACHE, 1536, 256, rotary_dim=64, rotary_dtype="float32", statistics="local"),
    _rotating(CACHE, 1536, 256),
    _rotating(ROPE, 1536, 256, rotary_dim=64, interleaved=True),
    _rotating(ROPE, 1280, 320, 80, rotary_dim=32, statistics="local", in_dtype="float16"),
)
MODULES["peers"] = (
    KernelSpec(op=FUSED, q_cols=1536, k_cols=256, target=SM_90, statistics="peers"),
    _rotating(CACHE, 1536, 256, rotary_dim=64, statistics="peers"),
    _rotating(CACHE, 6144, 1024, rotary_dim=128, statistics="peers"),
)


def needs_nvcc() -> None:
    """Skip, saying what to install, where there is no nvcc."""
    try:
        build_cuda.find_nvcc()
    except BuildError as error:
        pytest.skip(str(error))


@functools.cache
def nvcc_version() -> str:
    text = subprocess.run(
        [str(build_cuda.find_nvcc()), "--version"], capture_output=True, text=True, check=True
    ).stdout
    version = re.search(r"V(\d+\.\d+\.\d+)", text)
    return version[1] if version else "unknown"


@dataclasses.dataclass
class Built:
    """A module, the source it was made of, nvcc's command line for that, and the folder of then."""

    name: str
    path: Path
    source: Path
    command: list[str]
    built_in: str

    def device_code(self, kind: str, arch: str) -> tuple[Path, str]:
        """Return ``ptx`` or ``cubin`` for an architecture, and what nvcc printed.

        The module's own, for sm_90; else the source is compiled once more as the product does.
        """
        out = self.source.with_suffix(f".{arch}.{kind}")
        log = out.with_name(out.name + ".log")
        with filelock.FileLock(str(out) + ".lock"):
            if not log.exists():
                dropped = ("-c", "-gencode", "-Xfatbin", "--compress", "-o", "-L")
                words = [word for word in self.command if not word.startswith(dropped)]
                words = [word for word in words if not word.endswith((".o", ".cu"))]
                words += [f"-{kind}", f"-arch={arch}", "-o", str(out), str(self.source)]
                words += ["-Xptxas=-v"] if kind == "cubin" else []
                done = subprocess.run(words, capture_output=True, text=True, check=True)
                log.write_text(done.stderr)
        return out, log.read_text()

    def kernels(self) -> dict[str, tuple[KernelSpec, CudaVariant]]:
        """Return the kernels that there must be, see `kernels_of`."""
        return kernels_of(self.name)

    def ptx(self) -> dict[str, str]:
        """PTX for sm_90, by kernel."""
        text = self.device_code("ptx", "sm_90")[0].read_text()
        parts = re.split(r"^\.visible \.entry (\w+)\(", text, flags=re.MULTILINE)
        return dict(zip(parts[1::2], parts[2::2], strict=True))


def built(name: str) -> Built:
    """Compile one of `MODULES` for the whole session."""
    needs_nvcc()
    folder = session_folder() / f"cuda-{name}"
    folder.mkdir(exist_ok=True)
    about, source, path = folder / "about.json", folder / "module.cu", folder / "module.so"
    with filelock.FileLock(folder / "lock"):
        if not about.exists():
            commands: list[list[str]] = []
            with pytest.MonkeyPatch.context() as patch:
                run = build_cuda.run_compiler

                def record(command: list[str], doing: str, here: Path) -> None:
                    commands.append(command)
                    if "-c" not in command:
                        run(command, doing, here)
                        return
                    # What nvcc makes on its way to the module is what tests read.
                    kept = here / "kept"
                    kept.mkdir()
                    words = [*command, "-keep", f"-keep-dir={kept}", "-Xptxas=-v"]
                    done = subprocess.run(words, capture_output=True, text=True, check=True)
                    for kind in ("ptx", "cubin"):
                        (made,) = kept.glob(f"*.{kind}")
                        shutil.copyfile(made, out := source.with_suffix(f".sm_90.{kind}"))
                        out.with_name(out.name + ".log").write_text(done.stderr)

                patch.setattr(build_cuda, "run_compiler", record)
                compiled = compile(list(MODULES[name]))
            here = compiled.path.parent
            shutil.copyfile(here / "module.cu", source)
            compiled.export(path)
            command = next(command for command in commands if "-c" in command)
            about.write_text(json.dumps({"command": command, "built_in": str(here)}))
    return Built(name, path, source, **json.loads(about.read_text()))


def scheduled(spec: KernelSpec, variant: CudaVariant) -> tirx.PrimFunc:
    """Make a row kernel for the parameters of a spec; it has nothing of the declared body."""
    given = parameters(spec, stride_unit=variant.stride_unit, alignment=variant.alignment)
    declared = function("declared", given, tirx.Evaluate(0))
    return cuda_row.schedule(declared, spec, variant.config)


def kernels_of(name: str) -> dict[str, tuple[KernelSpec, CudaVariant]]:
    """Return the kernels that there must be in one of `MODULES`: what each is of."""
    kernels = {}
    for index, spec in enumerate(MODULES[name]):
        seen = set()
        for variant in default_variants(spec):
            key = (variant.config, variant.stride_unit, variant.alignment)
            if key not in seen:
                kernels[f"qkn_cuda_{index}_{variant.name}_kernel"] = (spec, variant)
            seen.add(key)
    return kernels


# ---- what ptxas says, and what it wrote --------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Used:
    """What ptxas says of a kernel: bytes of local memory, registers of a thread."""

    stack: int
    spill_stores: int
    spill_loads: int
    registers: int

    @property
    def local_memory(self) -> int:
        return self.stack + self.spill_stores + self.spill_loads


def used(log: str) -> dict[str, Used]:
    """Read what ``-Xptxas=-v`` printed, by kernel."""
    functions = re.findall(
        r"Compiling entry function '(\w+)'.*?(\d+) bytes stack frame, (\d+) bytes spill stores, "
        r"(\d+) bytes spill loads.*?Used (\d+) registers",
        log,
        re.DOTALL,
    )
    return {name: Used(*map(int, numbers)) for name, *numbers in functions}


#: Bytes of an instruction since sm_70, and the operations (its low 12 bits) that only fill: the
#: jump to itself after the last one, and what follows to the end of the section.
_INSTRUCTION = 16
_FILL = {0x918: "NOP", 0x947: "BRA"}


def instruction_counts(cubin: Path) -> dict[str, int]:
    """Count the instructions of each kernel of a cubin, without the fill at its end.

    Read from the file itself, as ``nvdisasm`` does not come with nvcc everywhere.
    """
    data = cubin.read_bytes()
    assert data[:6] == b"\x7fELF\x02\x01", f"{cubin.name} is no 64-bit little-endian ELF"
    (headers,) = struct.unpack_from("<Q", data, 0x28)
    size, count, names_index = struct.unpack_from("<HHH", data, 0x3A)
    # Of each section: name, type, flags, address, offset, size.
    sections = [struct.unpack_from("<IIQQQQ", data, headers + i * size) for i in range(count)]
    names = sections[names_index][4]
    counts = {}
    for section in sections:
        start = names + section[0]
        name = data[start : data.index(b"\0", start)].decode()
        if not name.startswith(".text."):
            continue
        code = data[section[4] : section[4] + section[5]]
        words = struct.unpack(f"<{len(code) // 8}Q", code)[::2]
        assert len(code) == _INSTRUCTION * len(words), name
        left = len(words)
        while left and words[left - 1] & 0xFFF in _FILL:
            left -= 1
        counts[name.removeprefix(".text.")] = left
    return counts


def disassembled(cubin: Path) -> dict[str, str]:
    """Return the machine code of each kernel as text; skip where there is no nvdisasm."""
    tool = os.environ.get("NVDISASM") or shutil.which("nvdisasm")
    if not tool:
        pytest.skip(
            "reads machine code with nvdisasm, which is not installed, nor named by NVDISASM"
        )
    text = subprocess.run([tool, "-c", cubin], capture_output=True, text=True, check=True).stdout
    parts = re.split(r"^\.text\.(\w+):", text, flags=re.MULTILINE)
    return dict(zip(parts[1::2], parts[2::2], strict=True))
