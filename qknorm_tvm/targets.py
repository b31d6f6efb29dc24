"""Targets: which machine code a spec asks for, and what a CPU must have to run it.

Imports nothing but the standard library: a target is parsed where neither TVM nor a GPU is.
"""

from __future__ import annotations

import dataclasses
import functools
import platform
import re
from collections.abc import Iterable
from pathlib import Path


@dataclasses.dataclass(frozen=True)
class CpuidBit:
    """Where ``cpuid`` reports an instruction set, and the register state that it needs.

    `register` is 0 to 3 for eax, ebx, ecx, edx; `state` the bits of XCR0 that the operating system
    must have enabled (6: ymm, 0xe6: zmm and masks). `proc_name` is Linux's word for it in
    ``/proc/cpuinfo``; `subleaf` what ``cpuid`` takes in ecx.
    """

    leaf: int
    register: int
    bit: int
    state: int = 0
    proc_name: str = ""
    subleaf: int = 0


_YMM, _ZMM = 0x6, 0xE6

#: The x86 instruction sets that generated code may use, by LLVM's names.
X86_FEATURES: dict[str, CpuidBit] = {
    "sse3": CpuidBit(1, 2, 0, proc_name="pni"),
    "ssse3": CpuidBit(1, 2, 9),
    "fma": CpuidBit(1, 2, 12, _YMM),
    "cx16": CpuidBit(1, 2, 13),
    "sse4.1": CpuidBit(1, 2, 19, proc_name="sse4_1"),
    "sse4.2": CpuidBit(1, 2, 20, proc_name="sse4_2"),
    "movbe": CpuidBit(1, 2, 22),
    "popcnt": CpuidBit(1, 2, 23),
    "avx": CpuidBit(1, 2, 28, _YMM),
    "f16c": CpuidBit(1, 2, 29, _YMM),
    "bmi": CpuidBit(7, 1, 3, proc_name="bmi1"),
    "avx2": CpuidBit(7, 1, 5, _YMM),
    "bmi2": CpuidBit(7, 1, 8),
    "avx512f": CpuidBit(7, 1, 16, _ZMM),
    "avx512dq": CpuidBit(7, 1, 17, _ZMM),
    "adx": CpuidBit(7, 1, 19),
    "avx512ifma": CpuidBit(7, 1, 21, _ZMM),
    "avx512cd": CpuidBit(7, 1, 28, _ZMM),
    "avx512bw": CpuidBit(7, 1, 30, _ZMM),
    "avx512vl": CpuidBit(7, 1, 31, _ZMM),
    "avx512vbmi": CpuidBit(7, 2, 1, _ZMM),
    "avx512vbmi2": CpuidBit(7, 2, 6, _ZMM, "avx512_vbmi2"),
    "gfni": CpuidBit(7, 2, 8),
    "vaes": CpuidBit(7, 2, 9, _YMM),
    "vpclmulqdq": CpuidBit(7, 2, 10, _YMM),
    "avx512vnni": CpuidBit(7, 2, 11, _ZMM, "avx512_vnni"),
    "avx512bitalg": CpuidBit(7, 2, 12, _ZMM, "avx512_bitalg"),
    "avx512vpopcntdq": CpuidBit(7, 2, 14, _ZMM, "avx512_vpopcntdq"),
    "avx512bf16": CpuidBit(7, 0, 5, _ZMM, "avx512_bf16", subleaf=1),
    "sahf": CpuidBit(0x80000001, 2, 0, proc_name="lahf_lm"),
    "lzcnt": CpuidBit(0x80000001, 2, 5, proc_name="abm"),
}

_V2 = ("cx16", "popcnt", "sahf", "sse3", "sse4.1", "sse4.2", "ssse3")
_V3 = (*_V2, "avx", "avx2", "bmi", "bmi2", "f16c", "fma", "lzcnt", "movbe")
_V4 = (*_V3, "avx512bw", "avx512cd", "avx512dq", "avx512f", "avx512vl")

#: The psABI's levels, best first, with what each needs beyond baseline x86-64. Before them the one
#: that converts to bfloat16 in hardware: Zen 4 and Sapphire Rapids have it, and what came later.
X86_LEVELS: dict[str, tuple[str, ...]] = {
    "x86-64-v4-bf16": (*_V4, "avx512bf16", "avx512vbmi"),
    "x86-64-v4": _V4,
    "x86-64-v3": _V3,
    "x86-64-v2": _V2,
}

#: Levels that round to bfloat16 otherwise than another one, and are like it in all else.
ROUNDING_LEVELS = {"x86-64-v4-bf16": "x86-64-v4"}

#: AArch64 with NEON, which every Linux there needs: one level, nothing to choose at load.
AARCH64 = "aarch64"

#: Machines that CPU modules are for, by the names of compilers and of Linux, with names for people.
MACHINES = {"x86_64": "x86-64", "aarch64": "AArch64"}

#: What ``target="cuda"`` holds machine code for; PTX is added for GPUs to come.
CUDA_ARCHS = ("sm_80", "sm_86", "sm_89", "sm_90", "sm_100", "sm_120")

_CPU_NAME = re.compile(r"[a-z0-9][a-z0-9_.-]*")
_CUDA_ARCH = re.compile(r"sm_\d{2,3}[af]?")


@dataclasses.dataclass(frozen=True)
class Target:
    """A target, taken apart.

    Parameters
    ----------
    kind : str
        ``"cpu"`` or ``"cuda"``.
    text : str
        Its canonical text; equal texts mean equal targets.
    variants : tuple of str
        For a CPU the LLVM names to generate code for, best first; for CUDA the architectures.
    """

    kind: str
    text: str
    variants: tuple[str, ...]

    @property
    def machine(self) -> str:
        """The machine, of `MACHINES`, that a CPU target is for; this one for CUDA."""
        if self.kind != "cpu":
            return host_machine()
        return "aarch64" if self.text == AARCH64 else "x86_64"


def adds_fused(cpu: str, features: Iterable[str]) -> bool:
    """Whether code for a CPU adds squares by a fused multiply-add: every AArch64 CPU has one.

    Parameters
    ----------
    cpu : str
        Level or name that the code is for.
    features : iterable of str
        Instruction sets that it may use.
    """
    return cpu == AARCH64 or "fma" in features


@functools.lru_cache(maxsize=256)
def parse_target(text: str) -> Target:
    """Take a target's text apart.

    Raises
    ------
    TypeError, ValueError
        `text` is no string, or names nothing that can be a target. Whether LLVM knows a CPU's
        name shows only when it is compiled for.
    """
    if not isinstance(text, str):
        raise TypeError(f"target must be a str, got {type(text).__name__}")
    expected = (
        "target must be 'cpu', a level such as 'x86-64-v3', a CPU's LLVM name such as 'znver4', "
        "'aarch64', 'cuda', or architectures such as 'cuda:sm_80,sm_90'"
    )
    if text == "cpu":
        return Target("cpu", text, tuple(X86_LEVELS))
    if text == "cuda":
        return Target("cuda", text, CUDA_ARCHS)
    kind, _, rest = text.partition(":")
    if kind == "cuda":
        archs = tuple(sorted(set(rest.split(",")), key=lambda a: (len(a), a)))
        if not all(_CUDA_ARCH.fullmatch(arch) for arch in archs):
            raise ValueError(f"{expected}; got {text!r}")
        return Target("cuda", "cuda:" + ",".join(archs), archs)
    if text in ("native", "x86-64", "arm64", "llvm") or not _CPU_NAME.fullmatch(text):
        raise ValueError(f"{expected}; got {text!r}")
    return Target("cpu", text, (text,))


def runs_on_gpu(held: str, gpu: str) -> bool:
    """Whether code for one architecture, or PTX (``compute_80``), runs on a GPU of another.

    Machine code runs on its own generation from its own version on, PTX on all that is newer.

    Parameters
    ----------
    held : str
        What a module holds, such as ``"sm_80"`` or ``"compute_80"``.
    gpu : str
        The GPU's architecture, such as ``"sm_90"``.
    """
    kind, _, version = held.partition("_")
    number, of_gpu = (int(text.rstrip("af")) for text in (version, gpu.partition("_")[2]))
    return number <= of_gpu and (kind == "compute" or number // 10 == of_gpu // 10)


def host_machine() -> str:
    """Return this machine's name, one of `MACHINES` where CPU modules can be for it."""
    name = platform.machine()
    return {"AMD64": "x86_64", "arm64": "aarch64"}.get(name, name)


def feature_in_proc(name: str) -> str:
    """Return the word by which ``/proc/cpuinfo`` lists an instruction set."""
    return X86_FEATURES[name].proc_name or name


@functools.lru_cache(maxsize=1)
def host_features() -> frozenset[str]:
    """Instruction sets of `X86_FEATURES` that this machine and its kernel offer."""
    if host_machine() != "x86_64":
        return frozenset()
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return frozenset()
    flags = re.search(r"^flags\s*:(.*)$", text, re.MULTILINE)
    words = frozenset(flags[1].split()) if flags else frozenset()
    return frozenset(name for name in X86_FEATURES if feature_in_proc(name) in words)


@functools.lru_cache(maxsize=1)
def host_cpu_target() -> str:
    """Return the best level that this machine runs, such as ``"x86-64-v4"`` or ``"aarch64"``.

    Raises
    ------
    RuntimeError
        The machine is neither x86-64 nor AArch64, or older than x86-64-v2 (2009).
    """
    if host_machine() == "aarch64":
        return AARCH64
    features = host_features()
    for level, needed in X86_LEVELS.items():
        if features.issuperset(needed):
            return level
    raise RuntimeError(
        f"this CPU ({platform.machine()}) is not x86-64-v2 or better, nor AArch64; "
        "qknorm-tvm's CPU modules need SSE4.2"
    )
