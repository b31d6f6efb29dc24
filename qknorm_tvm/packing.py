"""Building module packs: from models, ranks and targets to a folder with an index, and a wheel.

`qknorm_tvm.call.packs` reads what is written here.
"""

from __future__ import annotations

import base64
import dataclasses
import hashlib
import json
import zipfile
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from ._version import __version__
from .call.packs import ENTRY_POINTS, INDEX, index_of
from .models import MODELS, STAGES, modules_of
from .spec import KernelSpec
from .targets import parse_target

#: The distribution and the package that a wheel of a pack holds.
DISTRIBUTION, PACKAGE = "qknorm-tvm-modules", "qknorm_tvm_modules"


@dataclasses.dataclass(frozen=True)
class Plan:
    """What a pack will hold.

    Parameters
    ----------
    layers : list of dict
        Each model's layer at each number of ranks, JSON-ready.
    modules : list of list of KernelSpec
        The specs of each module.
    impossible : list of str
        Why a model has no layer for a number of ranks, a sentence each.
    """

    layers: list[dict[str, Any]]
    modules: list[Sequence[KernelSpec]]
    impossible: list[str]


def plan(
    models: Iterable[str],
    ranks: Iterable[int],
    targets: Iterable[str],
    stages: Iterable[str] = ("norm",),
) -> Plan:
    """Work out what the layers of models need.

    Parameters
    ----------
    models : iterable of str
        Of `qknorm_tvm.models.MODELS`.
    ranks : iterable of int
        Numbers of tensor-parallel ranks. Where a model's heads do not divide over them, the plan
        says so.
    targets : iterable of str
        As `KernelSpec`'s.
    stages : iterable of str
        Of `qknorm_tvm.models.STAGES`: what each layer gets.

    Raises
    ------
    ValueError
        A model or stage is unknown, a target is none, or no model has a layer for any of the ranks.
    """
    layers: list[dict[str, Any]] = []
    specs: list[KernelSpec] = []
    impossible: list[str] = []
    targets = list(dict.fromkeys(parse_target(target).text for target in targets))
    ranks, stages = list(dict.fromkeys(ranks)), list(dict.fromkeys(stages))
    for stage in stages:
        if stage not in STAGES:
            raise ValueError(f"operations must be of {', '.join(STAGES)}, got {stage!r}")
    for name in dict.fromkeys(models):
        if name not in MODELS:
            raise ValueError(f"models must be of {', '.join(MODELS)}, got {name!r}")
        model = MODELS[name]
        for count in ranks:
            try:
                layout = model.layout(count)
            except ValueError as error:
                impossible.append(f"{name} has no layer for {count} ranks: {error}")
                continue
            layer = {
                "model": name, "ranks": count, "q_cols": layout.q_cols, "k_cols": layout.k_cols,
                "epsilon": model.epsilon,
            }  # fmt: skip
            layers.append(layer)
            for target in targets:
                specs += model.specs(count, target, stages)
    if not specs:
        raise ValueError("; ".join(impossible) or "models, ranks and targets must each name one")
    return Plan(layers, modules_of(specs), impossible)


def machine_of(wanted: Plan) -> str:
    """Return the machine, of `targets.MACHINES`, that all modules are for.

    Raises
    ------
    ValueError
        They are for several, which no wheel can be.
    """
    machines = sorted({specs[0].parsed_target.machine for specs in wanted.modules})
    if len(machines) > 1:
        raise ValueError(f"targets must be of one machine for a wheel, got {', '.join(machines)}")
    return machines[0]


def file_name(specs: Sequence[KernelSpec]) -> str:
    """Return the name of a module's file."""
    spec = next((spec for spec in specs if spec.operation.normalises), specs[0])
    dtypes = spec.in_dtype + (f"-{spec.out_dtype}" if spec.out_dtype != spec.in_dtype else "")
    form = "-cast_before_gamma" if spec.cast_before_gamma else ""
    target = spec.target.replace(":", "-").replace(",", "-")
    return f"{spec.q_cols}x{spec.k_cols}-{dtypes}{form}-{target}.so"


def build(wanted: Plan, folder: Path, status: Callable[[str], None] = lambda text: None) -> Path:
    """Build a pack into a new or empty folder; the index comes last.

    Parameters
    ----------
    wanted : Plan
        From `plan`.
    folder : Path
        Its parent must exist.
    status : callable
        Told the name of each module before it is built.

    Returns
    -------
    Path
        `folder`.

    Raises
    ------
    ValueError
        The folder holds something.
    BuildError
        A compiler is missing or refused.
    """
    from .call.compiled import compile

    if folder.is_dir() and any(folder.iterdir()):
        raise ValueError(f"OUT must be a new or an empty folder, got {folder}, which holds files")
    folder.mkdir(exist_ok=True)
    for specs in wanted.modules:
        name = file_name(specs)
        status(name)
        compile(specs).export(folder / name)
    write_index(folder, wanted)
    return folder


def write_index(folder: Path, wanted: Plan) -> None:
    """Write the index of a folder that holds the modules of a plan."""
    files = {name: folder / name for name in map(file_name, wanted.modules)}
    content = json.dumps(index_of(files, wanted.layers), indent=1)
    (folder / INDEX).write_text(content + "\n")


# ---- the wheel --------------------------------------------------------------------------------


def write_wheel(pack: Path, wanted: Plan, out: Path) -> Path:
    """Make a wheel of a pack: a package of its files, announced by an entry point.

    Equal packs make equal wheels.

    Parameters
    ----------
    pack : Path
        A folder that `build` has written.
    wanted : Plan
        What it was built from.
    out : Path
        The folder to write the wheel to; created where it is missing.

    Returns
    -------
    Path
        The wheel.

    Raises
    ------
    ValueError
        Its modules are for machines of several kinds, which no wheel can be.
    """
    names = [INDEX, *(file_name(specs) for specs in wanted.modules)]
    tag = f"py3-none-linux_{machine_of(wanted)}"
    info = f"{PACKAGE}-{__version__}.dist-info"
    layers = "".join(f"* {layer['model']} on {layer['ranks']}\n" for layer in wanted.layers)
    contents = {
        f"{PACKAGE}/__init__.py": b'"""Compiled modules of qknorm-tvm, which finds them here."""\n',
        **{f"{PACKAGE}/{name}": (pack / name).read_bytes() for name in names},
        f"{info}/METADATA": (
            f"Metadata-Version: 2.1\nName: {DISTRIBUTION}\nVersion: {__version__}\n"
            "Summary: Compiled modules of qknorm-tvm\nLicense: Apache-2.0\n"
            f"Requires-Python: >=3.10\nRequires-Dist: qknorm-tvm=={__version__}\n"
            f"\nFor these models and numbers of tensor-parallel ranks:\n\n{layers}"
        ).encode(),
        f"{info}/WHEEL": (
            f"Wheel-Version: 1.0\nGenerator: qknorm-tvm {__version__}\n"
            f"Root-Is-Purelib: false\nTag: {tag}\n"
        ).encode(),
        f"{info}/entry_points.txt": f"[{ENTRY_POINTS}]\n{DISTRIBUTION} = {PACKAGE}\n".encode(),
    }
    record = []
    for name, content in contents.items():
        digest = base64.urlsafe_b64encode(hashlib.sha256(content).digest()).rstrip(b"=").decode()
        record.append(f"{name},sha256={digest},{len(content)}\n")
    contents[f"{info}/RECORD"] = ("".join(record) + f"{info}/RECORD,,\n").encode()
    out.mkdir(parents=True, exist_ok=True)
    wheel = out / f"{PACKAGE}-{__version__}-{tag}.whl"
    with zipfile.ZipFile(wheel, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in contents.items():
            entry = zipfile.ZipInfo(name, date_time=(1980, 1, 1, 0, 0, 0))
            entry.compress_type = zipfile.ZIP_DEFLATED
            entry.external_attr = 0o100644 << 16
            archive.writestr(entry, content)
    return wheel
