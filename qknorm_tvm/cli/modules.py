"""Modules for a device, loaded from files or compiled, and their description."""

from __future__ import annotations

import dataclasses
import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from ..load.module import Module
    from ..spec import KernelSpec


def target_for(device: str, target: str | None) -> str:
    """Return the target to compile for: the one given, or this machine's CPU's or GPU's."""
    from ..targets import host_cpu_target, parse_target

    if target is None:
        if device == "cpu":
            return host_cpu_target()
        from ..call.arrays import cuda_target

        return cuda_target(0)
    if parse_target(target).kind != device:
        if device == "cpu":
            raise click.UsageError(f"--target must be a CPU's for --device cpu, got {target}")
        raise click.UsageError(f"--target must be cuda or cuda:sm_... for --device cuda: {target}")
    return target


def with_op(spec: KernelSpec, op: str) -> KernelSpec:
    """Return a spec of another operation, without the fields that it does not have."""
    from ..operations import OPERATIONS

    defaults = {field.name: field.default for field in dataclasses.fields(spec)}
    lost = set(spec.operation.spec_fields) - set(OPERATIONS[op].spec_fields)
    return spec.replace(op=op, **{name: defaults[name] for name in lost})


def load_modules(files: Sequence[Path], device: str) -> list[Module]:
    """Load modules and refuse those that are not for a device."""
    from ..load.module import load

    modules = [load(file) for file in files]
    for module in modules:
        if module.metadata.get("kind") != device:
            target = module.metadata["target"]
            raise click.UsageError(f"{module.path} is for {target}, not for --device {device}")
    return modules


def need_compiler(instead: str) -> None:
    """Refuse to compile where TVM is not installed, with what to do `instead`."""
    if importlib.util.find_spec("tvm") is None:
        raise click.UsageError(
            f"compiling needs apache-tvm, which is not installed; {instead} on a machine that "
            "has it, with qknorm-tvm export"
        )


def module_of(modules: Sequence[Module], spec: KernelSpec) -> Module:
    """Return the module that holds a spec's dtypes and columns; fixed columns come first."""
    from ..bench.workload import has_open_columns, held_spec

    holding = [(held, module) for module in modules if (held := held_spec(module, spec))]
    if not holding:
        raise click.UsageError(f"none of the modules given holds {spec.text}")
    return min(holding, key=lambda pair: has_open_columns(pair[0]))[1]


def compile_module(specs: Sequence[KernelSpec], config: Any = None) -> Module:
    """Compile specs to one module."""
    need_compiler("give --module FILE.so, exported")
    from ..call.compiled import compile

    return compile(list(specs), config=config).module


def facts_of(module: Module) -> dict[str, str]:
    """Return what a measurement is taken on, for people and for the CSV file."""
    from ..machine import cpu_name, library_versions
    from .inspect_file import config_text

    versions = library_versions()
    if module.metadata.get("kind") == "cuda":
        from ..bench.cuda import device_facts

        gpu = device_facts()
        device, target = gpu["device"], str(module.metadata["target"])
        versions["CUDA"] = gpu["cuda"]
        sources = {code["source"] for level in module.metadata["levels"] for code in level["code"]}
        config = ", ".join(sorted(sources))
    else:
        device, target = cpu_name(), module.active_level
        level = next(x for x in module.metadata["levels"] if x["name"] == target)
        code = level["code"][0]
        config = f"{config_text(code['config'])} ({code['source']})"
    return {
        "device": device,
        "target": target,
        "config": config,
        "versions": ", ".join(f"{name} {version}" for name, version in versions.items()),
    }
