"""Which CPU or GPU is tuned on, here or behind a tracker, and which code it gets."""

from __future__ import annotations

import dataclasses
import os
import platform
import re
from collections.abc import Mapping
from typing import Any

from ..errors import BuildError, TuningError
from ..machine import usable_processors
from ..targets import (
    AARCH64,
    X86_LEVELS,
    host_cpu_target,
    host_features,
    host_machine,
    parse_target,
)
from .fleet import Fleet
from .workers import remote_cpu


@dataclasses.dataclass(frozen=True)
class Device:
    """What candidates are measured on."""

    #: Name of its folder of logs, such as ``"x86_64-znver4"``.
    folder: str
    #: What provenance says about it, JSON-ready.
    details: Mapping[str, Any]
    #: Processors that a call may use; None when unknown.
    threads: int | None = None


def resolve(target: str, fleet: Fleet | None, name: str | None) -> tuple[str, Device]:
    """Return the level, CPU or architecture to generate code for, and the device.

    A `name` is that of the device's folder.

    Raises
    ------
    TypeError, ValueError
        The target is none, or names several architectures.
    TuningError
        It cannot be tuned here, or the device cannot be found out.
    BuildError
        LLVM does not know the target's CPU.
    """
    if parse_target(target).kind == "cuda":
        return _gpu(target, fleet, name)
    if target == AARCH64 or (target == "cpu" and fleet is None and host_machine() == AARCH64):
        raise TuningError(
            "aarch64 cannot be tuned: its modules use the heuristic's configs; give a config of "
            "your own to qknorm_tvm.compile"
        )
    return _local_cpu(target, name) if fleet is None else _remote_cpu(target, fleet, name)


def _local_cpu(target: str, name: str | None) -> tuple[str, Device]:
    from ..build.cpu import cpu_features
    from ..build.tuned import host_device
    from ..machine import cpu_name

    try:
        text = host_cpu_target() if target == "cpu" else target
    except RuntimeError as error:
        raise TuningError(str(error)) from None
    lacking = sorted(set(cpu_features(text)) - host_features())
    if lacking:
        raise TuningError(
            f"this CPU cannot run code for {text}: it lacks {', '.join(lacking)}; tune where it "
            "runs, or through a tracker with --tracker HOST:PORT --key KEY"
        )
    # What the module's own pool defaults to.
    given = os.environ.get("TVM_NUM_THREADS", "")
    threads = int(given) if given.isdigit() and int(given) > 0 else usable_processors()
    details = {
        "cpu": cpu_name(),
        "threads": threads,
        "system": f"{platform.system()} {platform.release()}",
    }
    return text, Device(name or host_device(), details, threads)


def _remote_cpu(target: str, fleet: Fleet, name: str | None) -> tuple[str, Device]:
    from ..build.cpu import cpu_features

    cpu = name.partition("-")[2] if name else remote_cpu(fleet)
    text = target
    if target == "cpu":
        try:
            features = set(cpu_features(cpu))
        except BuildError:
            features = set()
        fitting = [level for level, needed in X86_LEVELS.items() if features.issuperset(needed)]
        if not fitting:
            raise TuningError(
                f"no x86-64 level is known for the server's CPU {cpu!r}; give one with --target, "
                "such as x86-64-v3"
            )
        text = fitting[0]
    details = {"cpu": cpu, "tracker": str(fleet), "key": fleet.key}
    return text, Device(name or f"x86_64-{cpu}", details)


def _gpu(target: str, fleet: Fleet | None, name: str | None) -> tuple[str, Device]:
    if fleet is not None:
        raise TuningError(
            "a CUDA device is tuned on its own machine, without --tracker: launches are timed in "
            "CUDA graphs, which TVM's RPC does not offer"
        )
    from ..check.reference_torch import torch_or_none

    torch = torch_or_none()
    if torch is None or not torch.cuda.is_available():
        raise TuningError(
            "tuning for CUDA needs an NVIDIA GPU and torch with CUDA, to time launches in CUDA "
            "graphs; run it on the GPU's machine, with torch installed as "
            "https://pytorch.org/get-started says"
        )
    major, minor = torch.cuda.get_device_capability(0)
    own = f"cuda:sm_{major}{minor}"
    if target != "cuda" and parse_target(target).text != own:
        raise TuningError(f"this machine's GPU is {own}, got target {target!r}; give {own}")
    about = torch.cuda.get_device_properties(0)
    details = {
        "gpu": about.name,
        "memory_gb": round(about.total_memory / 1e9, 1),
        "multiprocessors": about.multi_processor_count,
        "l2_bytes": getattr(about, "L2_cache_size", None),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
    }
    return own, Device(name or folder_name(about.name), details)


def folder_name(gpu: str) -> str:
    """Return the folder of records for a GPU's name: without memory size, type and socket."""
    words = re.split(r"[ -]+", gpu.lower())
    noise = re.compile(r"\d+gb|hbm\d\w?|sxm\d?|pcie|nvl")
    return "-".join(word for word in words if word and not noise.fullmatch(word))
