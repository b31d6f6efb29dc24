"""``qknorm-tvm inspect``."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ..errors import ModuleFileError
from .options import debug_option

if TYPE_CHECKING:
    from rich.console import RenderableType


@click.command("inspect", short_help="Say what a .so holds.")
@click.argument("file", metavar="FILE.so", type=click.Path(path_type=Path))
@click.option("--json", "as_json", is_flag=True, help="Print the metadata as JSON.")
@debug_option
def inspect_file(file: Path, as_json: bool) -> None:
    """Say what an exported module holds, and whether this machine can run it.

    The file is read and its checksum compared, but none of its code runs: that is safe with a file
    of unknown origin.

    \b
    Examples:
      qknorm-tvm inspect qk.so
      qknorm-tvm inspect qk.so --json | jq .specs
    """
    from ..load.module_file import read_metadata

    metadata = read_metadata(file)
    try:
        runs, why = runs_here(file, metadata)
        described = None if as_json else describe(file, metadata)
    except (AttributeError, IndexError, KeyError, TypeError, ValueError) as error:
        raise ModuleFileError(
            f"{file} holds what this qknorm-tvm does not know ({type(error).__name__})"
        ) from None
    if as_json:
        answer = {
            **metadata,
            "file": {"path": str(file), "bytes": file.stat().st_size},
            "runs_here": runs,
            "runs_here_because": why,
        }
        click.echo(json.dumps(answer, indent=2, sort_keys=True))
        return
    from .output import console, size

    printer = console()
    printer.print(f"{file} ({size(file.stat().st_size)})", soft_wrap=True)
    printer.print(described)


def runs_here(file: Path, metadata: Mapping[str, Any]) -> tuple[bool, str]:
    """Return whether this machine can run a module, and the reason for people."""
    from ..load.module_file import machine_of
    from ..targets import MACHINES, host_features, host_machine, runs_on_gpu

    machine, here = machine_of(file), host_machine()
    if machine != here:
        names = [MACHINES.get(name, name) for name in (machine, here)]
        return False, f"no: it is for {names[0]} machines, and this one is {names[1]}"
    if metadata.get("kind") != "cpu":
        try:
            from ..call.arrays import cuda_target

            gpu = cuda_target(0).partition(":")[2]
        except (OSError, RuntimeError):
            return False, "no: this machine has no CUDA driver, or no GPU"
        held = [str(arch) for arch in metadata["architectures"]]
        if any(runs_on_gpu(arch, gpu) for arch in held):
            return True, f"yes, on this machine's GPU ({gpu})"
        return False, f"no: it holds {', '.join(held)}, and this machine's GPU is {gpu}"
    features = host_features()
    for level in metadata["levels"]:
        if features.issuperset(level["features"]):
            return True, f"yes, with its code for {level['name']}"
    lacking = sorted(set(metadata["levels"][-1]["features"]) - features)
    return False, f"no: this CPU lacks {', '.join(lacking)}"


def describe(file: Path, metadata: Mapping[str, Any]) -> RenderableType:
    """Return tables of a module's metadata."""
    from rich.console import Group

    from ..spec import KernelSpec
    from .output import facts, table

    specs = [KernelSpec(**fields).text for fields in metadata["specs"]]
    numbers = {text: f"#{i}" for i, text in enumerate(specs)}
    code = table("code", "spec", "from M", "config; variants", left=(0, 3))
    for level in metadata.get("levels", []):
        for index, kernel in enumerate(level.get("code", [])):
            config = f"{config_text(kernel['config'])} ({kernel['source']})"
            code.add_row(
                str(level["name"]) if index == 0 else "",
                numbers.get(kernel["spec"], "?"),
                f"{kernel['min_rows']:,}",
                f"{config}; {', '.join(kernel['variants'])}",
            )
    versions = ", ".join(f"{name} {version}" for name, version in metadata["versions"].items())
    needs = ", ".join(f"{name} {version}" for name, version in metadata["requires"].items())
    lines = [
        *((f"spec #{i}", text) for i, text in enumerate(specs)),
        ("target", str(metadata["target"])),
        ("runs here", runs_here(file, metadata)[1]),
        ("needs", needs),
        ("built with", versions),
        ("format", str(metadata["format"])),
    ]
    return Group(facts(lines), *([code] if code.row_count else []))


def config_text(config: Mapping[str, Any]) -> str:
    """Return a config in one line."""
    return ", ".join(f"{name}={value}" for name, value in config.items())
